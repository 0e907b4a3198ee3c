"""The experiment on real text, with a tiny random policy: that it runs, resumes, and what its figures mean."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("vaderSentiment")
pytest.importorskip("textblob")

from reproduce.real_text import page, runs
from reproduce.real_text.__main__ import main, tiny_policy
from reproduce.real_text.judges import judged, vader
from reproduce.real_text.noise import in_nucleus, nucleus_noise
from reproduce.real_text.prompts import OPENINGS, PROMPTS, cases
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("real")
    policy = tiny_policy(folder / "policy")
    assert (
        main(["--quick", "--policy", str(policy), "--output", str(folder / "out"), "--docs", str(folder / "docs")]) == 0
    )
    return policy, folder / "out"


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
    assert runs.log_probabilities(model, [(runs.Case(one["prompt"], one["prefill"]), tokens)]) == [
        pytest.approx(sum(values) / len(values), abs=1e-4)
    ]


def test_it_takes_up_what_is_there(made: tuple[Path, Path]) -> None:
    policy, out = made
    changing = ("seconds.json", "results-real.md")
    before = {f: f.read_bytes() for f in out.rglob("*") if f.is_file() and f.name not in changing}
    answers = out / "answers.jsonl"
    whole = answers.read_text()
    answers.write_text(whole[: whole.rindex("\n", 0, len(whole) - 1) + 30])  # cut within the last line
    assert main(["--quick", "--policy", str(policy), "--output", str(out)]) == 0
    assert {name: json.loads(line)["text"] for name, line in enumerate(answers.read_text().splitlines()[1:])} == {
        name: json.loads(line)["text"] for name, line in enumerate(whole.splitlines()[1:])
    }
    assert all(file.read_bytes() == content for file, content in before.items() if file != answers)


def test_the_cap_is_what_the_mrm_says_of_safe_text(made: tuple[Path, Path]) -> None:
    _, out = made
    mrm = MultifurcationRewardModel.from_pretrained(out / "mrm", device="cpu")
    found = runs.safe_level(mrm, out)
    assert math.isfinite(found) and -8 < found < 8


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
    assert 0.15 < noisy["noise"] < 0.35 and noisy["signal"] == pytest.approx(exact["signal"])
    assert all(math.isnan(value) for value in nucleus_noise([], policy, mrm).values())


def test_figures() -> None:
    assert page.interval([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)
    none, low, high = page.share([False] * 12)
    assert none == low == 0.0 and high == pytest.approx(0.2425, abs=1e-3)  # Wilson (1927): z² / (n + z²)
    mean, low, high = page.interval([0.0, 1.0] * 50)
    assert mean == 0.5 and 0.38 < low < 0.45 and 0.55 < high < 0.62
    assert runs.distinct("a b a b") == 0.5 and runs.distinct("") == 0.0
    assert runs.similarity("a b", "b a") == pytest.approx(1.0) and runs.similarity("a", "b") == 0.0
