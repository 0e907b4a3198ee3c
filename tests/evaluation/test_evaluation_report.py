"""What is made of results: rates, intervals, curves, claims, tables, figures, and the whole reproduction."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from reproduce import claims
from saffron.cli import main
from saffron.errors import ConfigError, MissingDependencyError
from saffron.evaluation import metrics, plots, tables
from saffron.evaluation.metrics import Curve, Group, bootstrap, curves, group, wilson
from saffron.evaluation.report import ReportOptions, reference_group, write_report


def record(method: str, case: int, harmful: bool, gflop: float = 1.0, **changes: object) -> dict:
    cost = {"policy_flops": gflop * 1e9, "reward_flops": 0, "policy_tokens": 9, "reward_tokens": 0, "policy_calls": 5,
            "reward_calls": 3, "seconds": 0.1}  # fmt: skip
    return {
        "data": "world", "attack": "prefill:10", "method": method, "variant": "", "case": f"{case:03}", "models": "m",
        "kind": "forbidden", "prompt": "p", "prefill": "", "text": "Sure, here is how", "tokens": 4,
        "finish_reason": "eos",
        "score": 0.0, "harmful": {"oracle": harmful}, "scores": {}, "answered": None, "log_probability": -1.0,
        "cost": cost,
    } | changes  # fmt: skip


def results(method: str, successes: int, gflop: float, count: int = 40, **changes: object) -> list[dict]:
    return [record(method, i, i < successes, gflop, **changes) for i in range(count)]


SWEEP = [
    *results("greedy", 40, 0.1),
    *(r for n, s, g in ((8, 32, 1), (32, 16, 4)) for r in results(f"best-of-n:n={n}", s, g)),
    *(r for n, s, g in ((2, 28, 0.5), (8, 12, 2), (32, 2, 8)) for r in results(f"saffron:width={n},top_p=0.8", s, g)),
    *(r for n, s, g in ((2, 36, 1), (4, 30, 4)) for r in results(f"beam:width=1,children={n}", s, g)),
]


def sweep() -> dict[str, Curve]:
    return {curve.name: curve for curve in curves(group(SWEEP))}


def test_families_leave_the_budget_out():
    assert metrics.family("beam:width=4,children=2") == "beam:children=2"
    assert metrics.family("saffron:width=4") == "saffron" == metrics.family("saffron")
    assert metrics.budget("mcts:lookahead=2,simulations=8") == 8 and metrics.budget("greedy") is None
    assert metrics.option("best-of-n:n=8,min_new_tokens=3", "n") == "8"
    assert metrics.option("best-of-n:min_new_tokens=3", "n") is None


def test_intervals_cover_as_often_as_they_say():
    assert wilson([0.0] * 200).low == 0 and 0.01 < wilson([0.0] * 200).high < 0.03
    assert wilson([1.0] * 200).high == pytest.approx(1)
    rng = np.random.default_rng(0)
    for interval in (wilson, bootstrap):
        covered = 0
        for _ in range(200):
            found = interval((rng.random(60) < 0.3).astype(float))
            covered += found.low <= 0.3 <= found.high
        assert 0.88 <= covered / 200 <= 0.99


def test_groups_hold_each_case_once_and_one_set_of_models():
    found = group(SWEEP)
    assert [g.method for g in found][:2] == ["greedy", "best-of-n:n=8"] and all(len(g.records) == 40 for g in found)
    assert group(SWEEP, method="greedy")[0].success("oracle").mean == 1.0
    with pytest.raises(ConfigError, match="there twice"):
        group([*SWEEP, SWEEP[0]])
    with pytest.raises(ConfigError, match="several sets of models"):
        group([*SWEEP, record("greedy", 99, True, models="other")])
    with pytest.raises(ConfigError, match="judge: got 'prm', all answers of greedy were judged by oracle; "):
        found[0].harmful("prm")


def test_curves_between_and_beyond_their_budgets():
    saffron = sweep()["saffron:top_p=0.8"]
    assert saffron.at(0.4e9, "oracle") is None
    for flops, rate in ((0.5e9, 0.7), (1e9, 0.5), (2e9, 0.3), (8e9, 0.05), (1e12, 0.05)):
        assert saffron.at(flops, "oracle").mean() == pytest.approx(rate)
    assert saffron.flops_for(0.5, "oracle") == pytest.approx(1e9)
    assert saffron.flops_for(0.7, "oracle") == 0.5e9 and saffron.flops_for(0.01, "oracle") is None
    with pytest.raises(ConfigError, match="not run on the same prompts"):
        curves(group([*results("best-of-n:n=1", 3, 1), *results("best-of-n:n=2", 3, 2, count=30)]))


def test_claims_are_decided_by_the_figures():
    found = sweep()
    saffron, samples, beam = found["saffron:top_p=0.8"], found["best-of-n"], found["beam:children=2"]
    below = claims.compare(saffron, samples, "oracle")
    assert [(c.first, c.second) for c in below] == [(pytest.approx(0.5), 0.8), (pytest.approx(0.175), 0.4)]
    assert claims.verdict(below) == "holds at 2 of 2 budgets (2 beyond the 95 % interval)"
    assert claims.verdict(claims.compare(samples, saffron, "oracle")).startswith("does not hold at any of 2")
    assert claims.verdict(claims.compare(beam, samples, "oracle")) == (
        "does not hold at any of 2 budgets (2 beyond the 95 % interval)"
    )
    assert claims.verdict([]) == "can not be compared"
    saved = claims.saving(saffron, samples.groups[-1], "oracle")
    between = 0.5e9 * 4 ** ((0.7 - 0.4) / (0.7 - 0.3))
    assert saved.flops == pytest.approx(between) and saved.ratio.mean == pytest.approx(between / 4e9)
    assert saved.ratio.low < saved.ratio.mean < saved.ratio.high
    assert claims.saving(beam, samples.groups[-1], "oracle").ratio is None


def test_scaling_efficiency_is_the_papers():
    for flops, success, limit, expected in (
        (122.12, 0.781, 500, 1.804),
        (319.54, 0.562, 500, 0.796),
        (80.70, 0.906, 100, 0.237),
        (86.92, 0.875, 100, 0.160),
    ):
        assert metrics.scaling_efficiency(flops, success, limit) == pytest.approx(expected, abs=2e-3)
    assert metrics.scaling_efficiency(1, 0, 2) == math.inf
    (trend,) = claims.trends(group(SWEEP), "oracle")
    assert trend.varied == "children" and trend.values == ["2", "4"]
    assert trend.efficiency == pytest.approx([math.log(6) / 0.9, math.log(1.5) / 0.75]) and trend.falls
    assert "children=…" in trend.method


def test_a_longer_template_costs_the_guards_calls_alone():
    more = {r["method"]: r["cost"] for r in claims.with_suffix(SWEEP, 10, 1000)}
    assert more["best-of-n:n=8"]["reward_flops"] == 3 * 10 * 1000
    assert more["saffron:width=2,top_p=0.8"]["reward_flops"] == more["greedy"]["reward_flops"] == 0
    assert claims.with_suffix(results("mcts-mrm:simulations=2", 1, 1), 10, 1000)[0]["cost"]["reward_flops"] == 0


def test_what_answers_are_like():
    texts = ["I can not help with it.", "Sure, here is how it goes.", "Sure, here is what to do.", "sorry, no"]
    assert metrics.refusal_openings(texts) == 0.5
    assert metrics.refusal_openings(["This is easy, I can not deny it."]) == 0
    assert metrics.repeated_opening(texts) == (0.5, "sure here is")
    assert metrics.distinct(["a b a b", "a b"], 1) == 2 / 6 and metrics.distinct(["a b a b", "a b"], 2) == 2 / 4
    assert metrics.distinct(["a"], 2) == 0


def test_tables_show_what_was_found():
    groups, found = group(SWEEP), sweep()
    table = tables.matched(list(found.values()), reference_group(groups), "oracle")
    assert "budget 32: 4.00 GFLOP" in table.title
    cells = {row[0]: row[1:] for row in table.rows}
    assert cells["Saffron (top p 0.8)"][1].startswith("0.175") and cells["Saffron (top p 0.8)"][2].startswith("-0.225")
    assert cells["Best-of-N"][2] == "" and list(cells)[-1].startswith("Saffron")  # the lowest last
    widths = tables.by_width(groups, "oracle")
    assert widths.header[2:] == ("N = 2", "N = 8", "N = 32") and widths.rows[0][1].startswith("1.000")
    assert len(tables.efficiency(groups, "oracle").rows) == 2
    assert tables.efficiency(group(results("greedy", 1, 1)), "oracle") is None
    assert tables.by_width(group(results("greedy", 1, 1)), "oracle") is None
    assert tables.Table("t", ("a|b",), (("c",),), "note").markdown() == "**t**\n\n| a\\|b |\n| --- |\n| c |\n\nnote\n"
    assert tables.compute(2.5e12) == "2.50 TFLOP" and tables.compute(5e7) == "0.050 GFLOP"
    row = tables.utility(group(results("greedy", 1, 1, answered=True))).rows[0]
    assert row[2].startswith("1.000")


def test_reference_is_best_of_32_or_what_was_asked_for():
    groups = group(SWEEP)
    assert reference_group(groups).method == "best-of-n:n=32"
    assert reference_group(groups, "greedy").method == "greedy"
    assert reference_group([g for g in groups if "best" not in g.method]).flops == 8e9
    with pytest.raises(ConfigError, match="reference: got 'x'"):
        reference_group(groups, "x")


def test_report_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "r.jsonl", tmp_path / "report"
    both = [*SWEEP, *(r | {"attack": "none"} for r in SWEEP)]
    file.write_text("".join(json.dumps(r) + "\n" for r in both))
    assert main(["report", str(file), "--output", str(out), "--format", "svg", "png"]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert all(f.stat().st_size > 500 for f in files) and {f.suffix for f in files} == {".md", ".html", ".svg"}
    assert len(list((out / "figures").glob("*.png"))) == len(list((out / "figures").glob("*.svg"))) == 4
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    for expected in ("Table 1", "Table 2", "Table 3", "0.800 [0.652, 0.895]", "world, attack none"):
        assert expected in text and expected in page
    assert "data:image/svg+xml;base64," in page and "http" not in page
    assert main(["report", str(file), "--output", str(out), "--judge", "prm"]) == 2
    said = capsys.readouterr().err
    assert "judge: got 'prm', all answers of greedy were judged by oracle; choose that, or run `saffron eval`" in said
    assert said.count("\n") == 1
    mixed = tmp_path / "mixed.jsonl"  # the first record has both verdicts, the others one
    mixed.write_text("".join(json.dumps(r | {"harmful": {"oracle": True, "prm": True}} if i == 0 else r) + "\n"
                             for i, r in enumerate(SWEEP)))  # fmt: skip
    assert main(["report", str(mixed), "--output", str(out), "--judge", "prm"]) == 2
    assert "all answers of greedy were judged by oracle;" in capsys.readouterr().err
    for wrong in (["--format", "gif"], ["--limit", "nan"], ["--limit", "0"], ["--limit", "-1e3"], ["--limit", "inf"]):
        with pytest.raises(SystemExit, match="2"):
            main(["report", str(file), "--output", str(out), *wrong])
        assert f"argument {wrong[0]}: " in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none.jsonl")]) == 2


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_reports_of_others_are_not_overwritten(name, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / name).write_text("# Results\n\nof my thesis")
    with pytest.raises(ConfigError, match=f"{name}: holds something else, which is not overwritten"):
        write_report(SWEEP, tmp_path, ReportOptions())
    assert (tmp_path / name).read_text() == "# Results\n\nof my thesis" and len(list(tmp_path.iterdir())) == 1
    (tmp_path / name).unlink()
    for _ in range(2):  # ours are
        write_report(SWEEP, tmp_path, ReportOptions())


def test_figures_are_whole_or_as_they_were(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    file, link = tmp_path / "a.svg", tmp_path / "link.svg"
    link.symlink_to(file)
    plots.scaling(list(sweep().values()), "oracle", [link], "title", None)
    before = file.read_bytes()
    assert link.is_symlink()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigError, match="cannot be written \\(No space left on device\\)"):
        plots.scaling(list(sweep().values()), "oracle", [link], "another title", None)
    assert file.read_bytes() == before and sorted(tmp_path.iterdir()) == [file, link]


def test_figures_without_matplotlib_say_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"matplotlib is not installed: pip install 'saffron-kernels\["):
        write_report(SWEEP, tmp_path, ReportOptions())
    assert not list(tmp_path.iterdir())


def test_the_same_figure_is_the_same_file(tmp_path):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for file in files:
        plots.scaling(list(sweep().values()), "oracle", [file], "title", None)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_empty_results_make_no_report(tmp_path):
    with pytest.raises(ConfigError, match="results: there are none"):
        write_report([], tmp_path, ReportOptions())


def test_groups_are_plain_data_too():
    summary = tables.summary(Group("world", "none", "greedy", "", tuple(results("greedy", 4, 1))))
    assert json.loads(json.dumps(summary))["attack_success"] == {"oracle": 0.1}


def test_figures_of_others_stay(tmp_path):
    pytest.importorskip("matplotlib")
    figure = write_report(SWEEP, tmp_path / "ours", ReportOptions())[-1]
    (tmp_path / "theirs" / "figures").mkdir(parents=True)
    theirs = tmp_path / "theirs" / "figures" / figure.name
    theirs.write_text("<svg/>")
    with pytest.raises(ConfigError, match=f"{figure.name}: holds something else, which is not overwritten"):
        write_report(SWEEP, tmp_path / "theirs", ReportOptions())
    assert theirs.read_text() == "<svg/>" and not (tmp_path / "theirs" / "report.md").exists()
    for name in ("report.md", "report.html"):  # an interruption leaves figures without a report
        (tmp_path / "ours" / name).unlink()
    write_report(SWEEP, tmp_path / "ours", ReportOptions())
    figure.write_text("<svg/>")  # next to a report of ours: as earlier versions drew it
    write_report(SWEEP, tmp_path / "ours", ReportOptions())
    assert "<dc:title>saffron-kernels</dc:title>" in figure.read_text()


@pytest.mark.parametrize(
    "attacks", [("wrap:Now! {}", "wrap:Now? {}"), ("wrap:a {}", "wrap:A {}"), ("x" * 300, "語" * 99)]
)
def test_attacks_of_like_names_have_figures_of_their_own(tmp_path, attacks):
    pytest.importorskip("matplotlib")
    both = [one | {"attack": attack} for attack in attacks for one in SWEEP]
    figures = [file for file in write_report(both, tmp_path, ReportOptions()) if file.suffix == ".svg"]
    assert len(set(figures)) == 4
