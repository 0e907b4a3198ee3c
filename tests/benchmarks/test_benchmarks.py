"""What benchmarks compute besides times: workloads, what competitors are given, floors and ratios."""

from __future__ import annotations

import csv
import importlib
import json
import time
from pathlib import Path

import compare
import decide
import floors
import harness
import pytest
import report
import timing
import torch
import workloads

PLANS = pytest.mark.parametrize("name", ["search", "forest", "bundled", "apart", "tree", "chain"])


def plan_of(name: str) -> workloads.Plan:
    return {
        "search": lambda: workloads.search_plan(8, prompt=5, levels=6),
        "forest": lambda: workloads.search_plan(4, prompt=3, levels=9, searches=3),
        "bundled": lambda: workloads.search_plan(16, prompt=4, levels=20, models="bundled"),
        "apart": lambda: workloads.search_plan(3, prompt=2, levels=4, apart=True),
        "tree": lambda: workloads.parse_tree("1,2,5/3,2,4"),
        "chain": lambda: workloads.chain_plan(7),
    }[name]()


@PLANS
def test_every_query_sees_a_sequence(name: str) -> None:
    """Itself and what it shares; nothing is planned that nobody sees, and no slot twice."""
    plan = plan_of(name)
    assert len(plan.slot) == len(set(plan.slot.tolist())) and int(plan.slot.max()) < plan.slots
    assert bool(plan.mask.any(0).all()) and bool(plan.mask.any(1).all())
    assert plan.pairs == int(plan.mask.sum()) == sum(len(s) for s in plan.sequences())
    lengths = {len(s) for s in plan.sequences()}
    expected = {"search": 11, "forest": 12, "bundled": 24, "apart": 6, "tree": 9}
    assert lengths == ({expected[name]} if name in expected else set(range(1, 8)))


def test_trees_have_the_published_sizes() -> None:
    assert len(workloads.TREES) == 15
    assert {text: plan.queries for text in workloads.TREES[:2] if (plan := workloads.parse_tree(text))} == {
        "1,2,64/8,256,32": 64,
        "1,4,256/8,256,32": 256,
    }
    assert len(workloads.parse_tree("1,10/4000,400").slot) == 8000


def test_levels_that_were_not_recorded() -> None:
    with pytest.raises(ValueError, match="levels: got 65"):
        workloads.search_plan(8, prompt=5, levels=65)


def test_competitor_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "left_out", [])

    def missing() -> None:
        importlib.import_module("no_such_module")

    def check(result: object) -> None:
        assert result == 1, "another result"

    makers = {"absent": missing, "wrong": lambda: lambda: 2, "good": lambda: lambda: 1}
    assert list(harness.usable(makers, check)) == ["good"]
    assert harness.left_out == ["absent: not installed (no_such_module)", "wrong: AssertionError: another result"]


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor is what binds; a contender that did a part of the work is credited with that part."""
    monkeypatch.setattr(harness, "copy_rate", lambda: 1e9)
    monkeypatch.setattr(harness, "matmul_rate", lambda dtype: 1e12)
    case = harness.Case(
        op="tree_attention", shape={"n": 1}, dtype=torch.float32, work=1e6, bytes=1e4,
        ours=int, contenders={"half": int}, part={"half": 0.5},
    )  # fmt: skip
    times = {"": harness.Times([1e-5, 2e-5, 4e-5]), "half": harness.Times([3e-5])}
    ours, half = harness.rows(case, times)
    assert (ours["backend"], ours["competitor"], half["competitor"]) == (
        harness.chosen_backend("tree_attention", torch.float32), "", "half",
    )  # fmt: skip
    assert (ours["median_us"], ours["p20_us"], ours["p80_us"]) == ("20.00", "10.00", "40.00")
    assert (ours["floor_us"], ours["times_floor"], ours["gb_per_s"]) == ("10.0", "2.00", "0.50")
    assert (half["median_us"], half["ratio"]) == ("60.00", "3.00")
    key = tuple(str(ours[name]) for name in report.CASE)
    rows = {key: {k: str(v) for k, v in ours.items()}, (*key[:-1], "half"): {k: str(v) for k, v in half.items()}}
    assert "| 2.00 | 50 | 3.0x half |" in report.table(rows)
    assert "50%  3.00x half" in report.brief(rows)


def test_contenders_take_turns() -> None:
    order: list[str] = []
    times = timing.time_in_turn({name: lambda name=name: order.append(name) for name in "ab"}, 0.0)
    assert order == ["a", "b"] * 4 and [len(t.seconds) for t in times.values()] == [3, 3]


def test_a_slow_contender_is_timed_once() -> None:
    order: list[str] = []
    calls = {"fast": lambda: order.append("fast"), "slow": lambda: order.append("slow") or time.sleep(0.12)}
    times = timing.time_in_turn(calls, 0.0)
    assert order == ["fast", "slow", "fast", "fast", "fast"]
    assert [*times] == [*calls] and [len(t.seconds) for t in times.values()] == [3, 1]


def test_the_rate_of_a_dtype_that_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 100.0, torch.bfloat16: 2.0, torch.float16: 300.0}
    monkeypatch.setattr(timing, "product_rate", rates.__getitem__)
    monkeypatch.setattr(timing, "DEVICE", torch.device("cpu"))
    timing.matmul_rate.cache_clear()
    found = [timing.matmul_rate(dtype) for dtype in (torch.int32, torch.float32, torch.bfloat16, torch.float16)]
    timing.matmul_rate.cache_clear()
    assert found == [100.0, 100.0, 100.0, 300.0]


def test_ratios_of_two_commits() -> None:
    case, only_new = ("op", "{}", "float32", "cpu"), ("other", "{}", "float32", "cpu")
    found = compare.ratios({case: [2.0, 4.0, 3.0], only_new: [1.0]}, {case: [4.0, 4.0, 9.0]})
    assert found == {case: (4.0, 3.0, 2.0, 1.0, 3.0)} and not found[case].is_slower


@pytest.mark.parametrize(
    "now, is_slower",
    [([11.0, 10.8, 12.0], True), ([11.0, 9.9, 12.0], False), ([10.3, 10.2, 10.4], False), ([9.0, 9.0, 9.0], False)],
)
def test_what_is_slower_beyond_noise(now: list[float], is_slower: bool) -> None:
    """In every round, and at the median by more than two runs of one build differ."""
    case = ("op", "{}", "float32", "cpu")
    found = compare.ratios({case: now}, {case: [10.0, 10.0, 10.0]})
    assert found[case].is_slower is is_slower
    text, any_slower = report.comparison("main", found, "3 runs", [])
    assert any_slower is is_slower and f"{int(is_slower)} of 1 cases are slower" in text


def test_comparison_with_a_file(tmp_path: Path) -> None:
    """Cases of another machine do not count."""
    columns = dict.fromkeys(harness.COLUMNS, "") | {"op": "nucleus", "shape": "{}", "device": "a", "threads": "1"}
    rows = [
        columns | {"device": device, "shape": f'{{"n": {n}}}', "median_us": us, "p20_us": us, "p80_us": us}
        for n, (device, us) in enumerate([("a", "10.0"), ("a", "5.0"), ("b", "1.0")])
    ]
    with (tmp_path / "before.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, harness.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    now = report.latest([row | {"median_us": "6.0", "p20_us": "5.9", "p80_us": "6.1", "device": "a"} for row in rows])
    text, is_slower = report.against_file(tmp_path / "before.csv", now)
    assert is_slower and "1.67x" in text and "0.83x (0.82-0.85) | slower" in text and "2 cases stand on one" in text


def row(backend: str, competitor: str, us: float, op: str = "gather_kv", **shape: object) -> dict[str, str]:
    floor = {"times_floor": str(us / 2.0)}
    named = {"op": op, "backend": backend, "competitor": competitor, "dtype": "bfloat16", "device": "GPU"}
    return {**named, **floor, "shape": json.dumps(shape), "median_us": str(us)}


def test_cuda_is_chosen_where_it_is_nowhere_slower() -> None:
    """By graphs where there are such; a case that one of the two was not measured in does not count."""
    rows = [
        row("triton", "", 9.0, n=1), row("triton", "cuda backend", 10.0, n=1), row("triton", "PyTorch", 1.0, n=1),
        row("triton", "", 9.8, n=1, graph=True), row("triton", "cuda backend", 10.0, n=1, graph=True),
        row("cuda", "", 5.0, n=2, graph=True), row("cuda", "triton backend", 20.0, n=2, graph=True),
        row("triton", "", 1.0, n=3, graph=True), row("triton", "PyTorch", 0.1, n=3, graph=True),
    ]  # fmt: skip
    found = decide.by_backend(rows)
    assert decide.decisions(found) == [
        ["gather_kv", "bfloat16", "GPU", "2", "1.98x", "0.98x (n 1, graph True)", "cuda"]
    ]
    slower = row("triton", "cuda backend", 11.0, n=1, graph=True)
    assert decide.decisions(decide.by_backend([*rows, slower]))[0][-1] == "slower in 1"
    assert decide.decisions(decide.by_backend([rows[3], slower]))[0][-1] == "triton"
    assert "No case was measured on both" in decide.report([rows[-2]])


def test_targets_of_attention() -> None:
    def attention(tokens: int, us: float, **shape: object) -> dict[str, str]:
        return row("triton", "cuda backend", us, "tree_attention", plan="search", tokens=tokens, graph=True, **shape)

    rows = [attention(700, 6.9), attention(4097, 1e3), attention(33000, 2.3), attention(33001, 2.4)]
    lines = decide.targets(decide.by_backend(rows))
    assert [(line[2], line[-1]) for line in lines] == [("cuda", "yes"), ("cuda", "no"), ("cuda", "yes")]
    assert "| 6.9 us | 29 % | 7 us | yes |" in decide.report(rows)


def test_paths_of_attention() -> None:
    def path(name: str, us: float, **shape: object) -> dict[str, str]:
        size = {"plan": "search", "heads": [32, 8], "head_dim": 128, "beams": 32, **shape}
        return row("triton", f"cuda {name}", us, "tree_attention", **size)

    graph = {"graph": True, "prompt": 512}
    rows = [path("mma", 9.0, **graph), path("wgmma", 6.0, **graph)]
    rows += [path("mma", 1.0), path("wgmma", 9.0), path("mma", 1.0, graph=True, prompt=1)]
    rows += [path(name, 1.0, graph=True, plan="8 searches") for name in ("mma", "wgmma")]
    assert decide.paths(rows) == [["bfloat16", "128", "128", "1", "1.50x", "1.50x"]]
    assert not decide.by_backend(rows) and "| bfloat16 | 128 | 128 | 1 | 1.50x |" in decide.report(rows)


def test_revision_that_does_not_exist() -> None:
    with pytest.raises(compare.CannotCompare, match="git rev-parse"), compare.checked_out("no-such-revision"):
        pass


def test_floors_in_the_documentation() -> None:
    text = (harness.FOLDER.parent / "docs" / "kernels.md").read_text()
    found = text.partition("<!-- begin of the floors -->")[2].partition("<!-- end of the floors -->")[0]
    assert found.strip() == floors.table().strip()
