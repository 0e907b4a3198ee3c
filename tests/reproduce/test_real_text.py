"""The experiment on real text, with a tiny random policy: that it runs, resumes, and what its figures mean."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("pyarrow")
pytest.importorskip("vaderSentiment")
pytest.importorskip("textblob")

from reproduce.real_text import comparisons, siblings, sweep
from reproduce.real_text.__main__ import main, tiny_policy
from reproduce.real_text.answers import answered, main_tasks, similarity, sweep_tasks
from reproduce.real_text.judges import judged, vader
from reproduce.real_text.noise import in_nucleus, nucleus_noise
from reproduce.real_text.prompts import OPENINGS, PROMPTS, cases
from reproduce.real_text.scales import FULL, QUICK, SCALES, SMALL
from reproduce.real_text.training import safe_levels
from saffron.evaluation.run import log_probability
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import parse_config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("real")
    policy = tiny_policy(folder / "policy")
    assert (
        main(["--quick", "--policy", str(policy), "--output", str(folder / "out"), "--docs", str(folder / "docs")]) == 0
    )
    return policy, folder / "out"


def test_siblings(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    policy, out = made
    options = ["--policy", str(policy), "--scale", "quick", "--output"]
    assert siblings.main([*options, str(out)]) == 0
    header, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == len(siblings.SETTINGS) and all(row.count("|") == header.count("|") for row in rows)
    written = [json.loads(line) for line in (out / "siblings.jsonl").read_text().splitlines()]
    assert len(written) == len(siblings.SETTINGS) * QUICK.test
    for other in (
        [*options, str(out)],
        [*options, str(out / "nowhere")],
        ["--policy", str(out), *options[2:], str(out)],
    ):
        with pytest.raises(SystemExit):
            siblings.main(other)


def test_beams_are_spread() -> None:
    """Two searches of 5 places: one parent has the best children of the first, and the only ones of the second."""
    groups = torch.tensor([0] * 6 + [1] * 6)
    parent = torch.tensor([0, 0, 0, 0, 1, 1, *[2] * 6])
    score = torch.tensor([9.0, 8, 7, 6, 1, 0, 5, 4, 3, 2, 1, 0])
    tie, widths = torch.zeros(12), torch.tensor([5, 5])

    def chosen(quota: int) -> list[list[int]]:
        with siblings.spread(quota, 0.0) as parents:
            index, used = siblings.selection.best(groups, score, tie, parent, widths, 5)
        assert parents == [2, 1] and bool(used.all())
        return index.view(2, 5).sort(1).values.tolist()

    assert chosen(4) == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert chosen(1) == [[0, 1, 2, 4, 5], [6, 7, 8, 9, 10]]  # 3 of each of two parents fill 5 places


def test_parts_share_nothing() -> None:
    assert len(set(PROMPTS)) == 60 and len(set(OPENINGS)) == 10
    parts = [cases(part) for part in ("train", "validation", "test")]
    for i, one in enumerate(parts):
        assert len(set(one)) == len(one)
        for other in parts[i + 1 :]:
            assert not {c.prompt for c in one} & {c.prompt for c in other}
            assert not {c.prefill for c in one} & {c.prefill for c in other}
    assert [len(part) for part in parts] == [180, 10, 60]


def test_reward_and_judge() -> None:
    bad, good = "I hate this horrible, stupid place.", "I love this wonderful place."
    assert vader([], [bad, good, ""])[0] < -0.5 and vader([], [good, ""]) == [0.0, 0.0]
    assert judged(bad) < 0 < judged(good)


def test_the_page_says_what_the_answers_say(made: tuple[Path, Path]) -> None:
    policy, out = made
    text = (out / "results-real.md").read_text()
    assert (out.parent / "docs" / "results-real.md").read_text() == text
    records = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()[1:]]
    attacked = [r for r in records if r["method"] == "greedy" and r["prefill"]]
    assert len(attacked) == 3
    mean = sum(r["log_probability"] for r in attacked) / 3
    assert "| `greedy` | 3 | " in text and f"| {mean:.2f} [" in text
    assert "nan" not in text.split("## Under attack")[1] and str(out.parent) not in text
    model = Policy.from_pretrained(policy)
    one = attacked[0]
    context, tokens = model.chat(one["prompt"], one["prefill"]), model.encode(one["text"])
    values = [float(model.logits([context + tokens[:i]])[0].log_softmax(-1)[t]) for i, t in enumerate(tokens)]
    likely = log_probability(model, one["prompt"], one["prefill"], tokens)
    assert likely == pytest.approx(sum(values) / len(values), abs=1e-4)


class Backwards:
    """Workers that are done in the reverse order, and get their function as another process would."""

    def __init__(self, count: int) -> None:
        assert count == 2

    def run(self, make: Any, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        function = pickle.loads(pickle.dumps(make))()
        for number in reversed(range(len(items))):
            yield number, function(items[number])


def test_it_takes_up_what_is_there(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a cut, and with workers that are done in another order: the same answers, and the same page."""
    policy, out = made
    changing = ("seconds.json", "results-real.md")
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file() and f.name not in changing}
    answers, swept, page = out / "answers.jsonl", out / "validation.jsonl", (out / "results-real.md").read_text()
    whole = [json.loads(line) for line in answers.read_text().splitlines()[1:]]
    for file in (answers, swept):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:-4]) + lines[-4][:30])
    arguments = ["--quick", "--policy", str(policy), "--output", str(out)]
    assert main([*arguments, "--page-only"]) == 0  # from less than all: says so, runs nothing
    some = (out / "results-real.md").read_text()
    assert f"{len(whole)} answers are wanted and {len(whole) - 4} are there" in some and some != page
    monkeypatch.setattr("reproduce.real_text.__main__.Workers", Backwards)
    assert main([*arguments, "--workers", "2"]) == 0

    def text(records: list[dict[str, Any]]) -> dict[tuple[str, ...], Any]:
        return {(r["method"], r["prompt"], r["prefill"]): (r["text"], r["log_probability"]) for r in records}

    assert text(answered(answers)) == text(whole)
    assert _without_time((out / "results-real.md").read_text()) == _without_time(page)
    assert all(file.read_bytes() == content for file, content in before.items() if file not in (answers, swept))


def _without_time(page: str) -> str:
    return re.sub(r"which took .* minutes \(.*?\)", "", page)


def test_the_page_shows_the_sweep(made: tuple[Path, Path]) -> None:
    _, out = made
    levels = safe_levels(MultifurcationRewardModel.from_pretrained(out / "mrm", device="cpu"), out, (0.5, 0.9))
    swept, answers = answered(out / "validation.jsonl"), answered(out / "answers.jsonl")
    cap = sweep.chosen(QUICK.grid, levels, swept)["cap"]
    section = (out / "results-real.md").read_text().split("## The settings")[1].split("## Under attack")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) == len(QUICK.grid.methods(levels)) == len({r["method"] for r in swept})
    (chosen,) = [line for line in rows if line.endswith("| chosen |")]
    assert f"`saffron:width=2,reward_cap={cap}`" in chosen and "; calibrated | " in section and sweep.RULE in section
    assert f"saffron:width=2,reward_cap={cap}" in {r["method"] for r in answers}
    validation = {tuple(case) for case in cases("validation")}
    assert {(r["prompt"], r["prefill"]) for r in swept} <= validation
    assert not validation & {(r["prompt"], r["prefill"]) for r in answers}


def test_the_rule_of_the_sweep() -> None:
    rows = [
        sweep.Row("best but no language", 10, 0.0, 0.0, -4.0),
        sweep.Row("fluent and good", 10, -0.1, 0.2, -1.5),
        sweep.Row("fluent, good, and more so", 10, -0.1, 0.2, -1.2),
        sweep.Row("most fluent", 10, -0.3, 0.6, -1.0),
    ]
    assert sweep.choose(rows, floor=-2.0).method == "fluent, good, and more so"
    assert sweep.choose(rows, floor=-5.0).method == "best but no language"
    assert sweep.choose(rows, floor=-0.5).method == "most fluent"  # none is that fluent


def test_what_is_chosen_before_and_after_the_sweep() -> None:
    grid, levels = sweep.Grid(4, 2, (0.1, 0.9), (1.6,), ()), {0.1: -2.0, 0.5: -0.5, 0.9: 0.25}
    assert grid.methods(levels) == [
        "sample", "saffron:width=4,reward_cap=-2", "saffron:width=4,reward_cap=0.25",
        "saffron:width=4,reward_tolerance=1.6",
    ]  # fmt: skip
    assert sweep.chosen(grid, levels, []) == {"calibrated": "-0.5", "cap": "-0.5", "tolerance": "1.6"}

    def records(method: str, reward: float, likely: float, count: int = 2) -> list[dict[str, Any]]:
        return [{"method": method, "reward": reward, "log_probability": likely, "judge": 0.0}] * count

    base, low = records("sample", -0.5, -2.0), records("saffron:width=4,reward_cap=-2", -0.4, -1.0)
    high = records("saffron:width=4,reward_cap=0.25", -0.1, -1.5)
    assert sweep.chosen(grid, levels, base + low + high)["cap"] == "0.25"
    assert sweep.chosen(grid, levels, base + low + high[:1])["cap"] == "-2"  # not run on all prompts
    assert sweep.chosen(grid, levels, low + high)["cap"] == "-0.5"  # nothing to compare with


@pytest.mark.parametrize("name", sorted(SCALES))
def test_all_methods_of_a_scale(name: str) -> None:
    """They parse; batches of prompts come before methods, costly methods last; tasks share no answer."""
    scale = SCALES[name]
    levels = {q: -q for q in (*scale.grid.quantiles, sweep.CALIBRATED)}
    values = sweep.chosen(scale.grid, levels, [])
    tasks = main_tasks(scale, values)
    for task in (*tasks, *sweep_tasks(scale, scale.grid.methods(levels))):
        parse_config(task.method)
    keys = [(task.method, *case) for task in tasks for case in task.cases]
    assert len(set(keys)) == len(keys)
    assert values["cap"] == values["calibrated"]  # so that a method has two names, and still runs once
    ordinary = list(dict.fromkeys(method.format(**values) for method in scale.methods))
    assert [task.method for task in tasks[: len(ordinary)]] == ordinary
    assert all(task.cases[0] == cases("test", 1)[0] for task in tasks[: len(ordinary)])
    assert [task.method for task in tasks[len(tasks) - len(scale.costly) :]] == list(scale.costly)
    for method in scale.costly:
        assert sum(len(task.cases) for task in tasks if task.method == method) == scale.few


def test_args_and_cards_are_compared() -> None:
    for scale in (FULL, SMALL):
        assert {"args", "cards"} <= {method.partition(":")[0] for method in scale.methods}


def test_caps_are_what_the_mrm_says_of_safe_text(made: tuple[Path, Path]) -> None:
    """By hand: held-out prefixes of exact reward 0, each by the full table of rewards that the MRM has for it."""
    _, out = made
    mrm = MultifurcationRewardModel.from_pretrained(out / "mrm", device="cpu")
    held = load_file(out / "training" / "heldout-states.safetensors")
    table = held["states"] @ mrm.head_weight.float().T + mrm.bias.float()
    said = [float(table[i, t]) for i, t in enumerate(held["tokens"].tolist()) if held["rewards"][i] == 0]
    found = safe_levels(mrm, out, (0.1, 0.5, 0.9))
    assert found == {q: pytest.approx(np.quantile(said, q), abs=1e-3) for q in (0.1, 0.5, 0.9)}


def test_noise_in_a_nucleus() -> None:
    """Five tokens, of which one is masked; worked out by hand."""
    rewards, exact = np.array([0.0, -0.5, 0.2, 9.0, -0.1]), np.array([-0.2, -0.4, -0.6, 0.0, 0.0])
    probabilities = np.array([0.4, 0.2, 0.1, 0.1, 0.05])
    masked = np.array([False, False, False, True, False])
    found = in_nucleus(rewards, exact, probabilities, masked)
    assert (found["size"], found["unseen"]) == (5.0, 0.2)
    assert found["noise"] == pytest.approx(np.std([0.2, -0.1, 0.8, -0.1]))
    assert found["signal"] == pytest.approx(np.std([-0.2, -0.4, -0.6, 0.0]))
    assert found["regret"] == pytest.approx(0.6) and found["price"] == pytest.approx(math.log(4))  # of the third
    lost = 0.2 * math.log(2) + 0.1 * math.log(4) + 0.05 * math.log(8)
    assert found["sampled_price"] == pytest.approx(lost / 0.75)
    assert found["correlation"] == pytest.approx(np.corrcoef([0.0, -0.5, 0.2, -0.1], [-0.2, -0.4, -0.6, 0.0])[0, 1])
    assert in_nucleus(rewards, exact, probabilities, ~masked).keys() == {"size", "unseen"}  # one is left
    every = in_nucleus(exact, exact, probabilities, np.ones(5, dtype=bool))  # none is left: the search takes all
    assert every["noise"] == every["regret"] == 0 and every["correlation"] == pytest.approx(1)
    assert "correlation" not in in_nucleus(rewards, np.zeros(5), probabilities, masked)


def test_an_mrm_that_is_exact_has_no_noise(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole measurement, with an MRM that says what VADER says, and with errors of a known size."""
    folder, out = made
    policy = Policy.from_pretrained(folder, device="cpu")
    mrm = MultifurcationRewardModel.from_pretrained(out / "mrm", device="cpu")
    mrm.unseen = None
    records = [{"method": "sample", "prompt": PROMPTS[0], "prefill": OPENINGS[0], "text": "I hate this stupid place."}]
    context, errors = (
        mrm.context_tokens(PROMPTS[0]),
        torch.randn(mrm.vocab_size, generator=torch.Generator().manual_seed(0)) * 0.25,
    )

    def rewards(sequences: list[list[int]]) -> torch.Tensor:
        prefix = sequences[0][len(context) :]
        return torch.tensor([vader([], [policy.decode([*prefix, t]) for t in range(mrm.vocab_size)])]) * 8 + added

    monkeypatch.setattr(mrm, "logits", rewards)
    added = torch.zeros(mrm.vocab_size)
    exact = nucleus_noise(records, policy, mrm, count=6)
    assert exact["noise"] < 1e-6 and exact["regret"] < 1e-6 and exact["size"] > 2
    added = errors * 8
    noisy = nucleus_noise(records, policy, mrm, count=6)
    more = [records[0] | {"prefill": opening} for opening in OPENINGS[1:6]]
    one, other = (nucleus_noise(given, policy, mrm, count=2) for given in ([*records, *more], [*more[::-1], *records]))
    assert one == pytest.approx(other, nan_ok=True)  # whoever answered first
    assert 0.15 < noisy["noise"] < 0.35 and noisy["signal"] == pytest.approx(exact["signal"])
    assert all(math.isnan(value) for value in nucleus_noise([], policy, mrm).values())


def _record(method: str, prompt: str, judge: float, likely: float, **more: Any) -> dict[str, Any]:
    cost = {"policy_flops": 1e9, "reward_flops": 0, "reward_calls": 2}
    return {"method": method, "prompt": prompt, "prefill": "!", "text": "so so", "tokens": 5, "judge": judge,
            "score": 0.0, "reward": 0.0, "log_probability": likely, "cost": cost} | more  # fmt: skip


def test_comparisons_are_of_the_prompts_that_both_answered() -> None:
    capped, best = "saffron:width=8,reward_cap=0", "best-of-n:n=16"
    records = [_record(m, p, -1.0 if m == best else 1.0, likely)
               for m, likely in ((best, -2.0), (capped, -1.0), ("sample", -2.0)) for p in "ab"]  # fmt: skip
    records.append(_record(capped, "c", -1.0, -50.0))  # nobody else answered it
    found = comparisons.by_method(records, ["sample", capped])
    assert list(found) == ["sample", capped, best]
    assert f"| `{capped}` | `{best}` | 2 | -1.00 [-1.00, -1.00] | 1.00 [1.00, 1.00] |" in comparisons.differences(
        found, [(capped, best), (capped, "mcts")]
    )
    said = comparisons.verdict(found, capped, best, "sample")
    assert said.startswith("go (2 prompts)") and "-1.00 against -2.00" in said
    assert "no-go" in comparisons.verdict(found, best, capped, "sample")
    assert "not run" in comparisons.verdict(found, capped, "mcts", "sample")


def test_a_hacked_reward_is_called_so() -> None:
    records = [_record(f"saffron:width={w}", p, judge, likely, score=8.0 * w)
               for w, judge, likely in ((1, 1.0, -1.0), (16, -1.0, -6.0)) for p in "abcd"]  # fmt: skip
    records += [_record(f"best-of-n:n={n}", p, judge, -1.0) for n, judge in ((2, -1.0), (4, 1.0)) for p in "abcd"]
    records += [_record("best-of-n:n=32", "z", 1.0, -1.0), _record("saffron:width=1,reward_cap=0", "a", 1.0, -1.0)]
    text = comparisons.widening(comparisons.by_method(records))
    assert (
        "From `saffron:width=1` to `saffron:width=16`: negative by the reward 0.00 [0.00, 0.00]; by the judge 1.00"
        in text
    )
    assert "[1.00, 1.00], which rises: the search games its reward" in text
    assert (
        "log-probability per token -5.00 [-5.00, -5.00], which falls" in text
        and "| `saffron:width=16` | 4 | 16.000 |" in text
    )
    assert "reward_cap" not in text  # of one width
    assert "best-of-n" not in text  # no prompt that all of them answered
    assert comparisons.widening({}) == "No method was run at two widths.\n"


def test_calls_of_the_reward_are_charged_as_a_guard() -> None:
    """Two calls, one GFLOP per token: of answers, of segments, of tokens; an MRM is charged already."""
    cost = {"policy_flops": 1e9, "reward_flops": 1e9, "reward_calls": 2}
    records = [_record(m, "a", 1.0, -1.0) for m in ("best-of-n:n=2", "cards", "args")]
    text = comparisons.table(
        comparisons.by_method([*records, _record("saffron", "a", 1.0, -1.0, cost=cost)]), {"a": "so so"}, 10**9
    )
    ends = {line.split("|")[1].strip(" `"): line.split("|")[-3:-1] for line in text.splitlines()[2:]}
    totals = {method: (float(own), float(guard)) for method, (own, guard) in ends.items()}
    assert totals == {"best-of-n:n=2": (1, 31), "cards": (1, 29), "args": (1, 23), "saffron": (2, 2)}
    assert "| 0.50, 1.00 | 1.00 |" in text  # "so so": distinct-1 and -2, and similarity to itself


def test_loops() -> None:
    for text in ("the bestestestest", "I am here. I am here. I am here.", "iron iron iron", "bababa"):
        assert comparisons.loops({"text": text}) == 1, text
    for text in ("a banana", "very very good", "I am here. I am here.", "zoo...", "", "one, two, one, two, three"):
        assert comparisons.loops({"text": text}) == 0, text


def test_similarity() -> None:
    assert similarity("a b", "b a") == pytest.approx(1.0) and similarity("a", "b") == 0.0
    assert comparisons.chance_similarity(["a", "a", "b"]) == pytest.approx(1 / 3)
    assert comparisons.chance_similarity(["a"]) is None
