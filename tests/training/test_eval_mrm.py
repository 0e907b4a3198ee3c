"""`saffron eval-mrm`: against one pass per prefix and arithmetic by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import trio

pytest.importorskip("pyarrow")

from saffron import world
from saffron.cli import main
from saffron.errors import ConfigError, PromptTooLongError
from saffron.models.bundled import FOLDER
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.training.annotate import AnnotateConfig, annotate
from saffron.training.conversations import Conversation
from saffron.training.evaluate import evaluate, nucleus_on_unseen, predict
from saffron.training.layout import AGENT, FORMAT, USER
from saffron.training.shards import AnnotatedConversation, read_rewards


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def annotated(tmp_path_factory) -> Path:
    rng, requests = random.Random(3), world.requests("forbidden", "train", 4)
    corpus = [
        Conversation((r.text, world.answers.compliance(r, rng))) for r, _ in zip(requests, range(3), strict=False)
    ]
    corpus.append(Conversation((*corpus[0].turns, "And then?", "Stir it well.")))
    out = tmp_path_factory.mktemp("annotated")
    annotate(corpus, str(FOLDER / "guard"), out, AnnotateConfig(device="cpu"))
    return out


@pytest.fixture(scope="module")
def mrm() -> MultifurcationRewardModel:
    """The bundled one, with a mask that these conversations meet."""
    found = MultifurcationRewardModel.from_pretrained(FOLDER / "mrm", device="cpu")
    assert found.unseen is not None
    found.unseen = found.unseen | (torch.arange(found.vocab_size) % 4 == 0)
    return found


def by_hand(
    mrm: MultifurcationRewardModel, row: AnnotatedConversation, roles: set[int]
) -> Iterator[tuple[float, float, int, bool]]:
    depth = 0
    for j, (token, role, reward) in enumerate(zip(row.input_ids.tolist(), row.roles, row.rewards, strict=True)):
        depth = 0 if role == FORMAT else depth + 1
        if role in roles and j:
            vector = mrm.logits([row.input_ids[:j].tolist()])[0]
            yield vector[token].item(), float(reward), depth, bool(mrm.unseen[token])


@pytest.mark.parametrize(("turns", "roles"), [("responses", {AGENT}), ("all", {USER, AGENT})])
def test_predictions_equal_one_pass_a_prefix(annotated, mrm, turns, roles):
    rows, done = read_rewards(annotated).rows, []
    found = predict(mrm, rows, turns, done.append)
    predicted, true, depth, unseen = zip(*(item for row in rows for item in by_hand(mrm, row, roles)), strict=True)
    np.testing.assert_allclose(found.predicted, predicted, atol=2e-3)
    np.testing.assert_array_equal(found.true, np.array(true, np.float32))
    np.testing.assert_array_equal(found.depth, depth)
    np.testing.assert_array_equal(found.unseen, unseen)
    assert found.unseen.any() and not found.unseen.all()
    assert sum(done) == len(rows)


def test_figures_by_hand(annotated, mrm):
    rows = read_rewards(annotated).rows
    found = evaluate(predict(mrm, rows), mrm, None)
    items = [item for row in rows for item in by_hand(mrm, row, {AGENT})]
    known = [(p - t, d) for p, t, d, unseen in items if not unseen]
    errors = [error for error, _ in known]
    assert found.known.tokens == len(errors)
    assert found.unseen.tokens == len(items) - len(errors) > 0
    assert found.known.within_1 == pytest.approx(sum(abs(e) <= 1 for e in errors) / len(errors), abs=1 / len(errors))
    assert found.known.mean_error == pytest.approx(np.mean(errors), abs=1e-3)
    pairs = np.array([(p, t) for p, t, _, unseen in items if not unseen])
    assert found.known.correlation == pytest.approx(np.corrcoef(pairs.T)[0, 1], abs=1e-4)
    assert sum(one.tokens for one in found.by_depth.values()) == len(errors)
    for (first, last), one in found.by_depth.items():
        here = [error for error, depth in known if first <= depth <= last]
        assert (one.tokens, one.mean_error) == (len(here), pytest.approx(np.mean(here), abs=1e-3))
    assert (found.vocabulary, found.vocabulary_unseen) == (mrm.vocab_size, int(mrm.unseen.sum()))


def test_mrm_without_mask_or_bias(annotated):
    plain = MultifurcationRewardModel.from_pretrained(FOLDER / "mrm", device="cpu")
    plain.bias = plain.unseen = None
    rows = read_rewards(annotated).rows[:1]
    found = predict(plain, rows)
    assert not found.unseen.any()
    ids = rows[0].input_ids.tolist()
    last = plain.logits([ids[:-1]])[0, ids[-1]].item()
    assert found.predicted[-1] == pytest.approx(last, abs=2e-3)
    assert evaluate(found, plain, None).to_json()["unseen"]["within_1"] is None


@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_nucleus_on_unseen_by_hand(annotated, mrm, top_p):
    policy = Policy.from_pretrained(FOLDER / "policy", device="cpu")
    row = read_rewards(annotated).rows[3]  # of two exchanges; the first one counts
    found = nucleus_on_unseen(policy, mrm, [row], top_p)
    begin = row.roles.tolist().index(AGENT)
    answer = row.input_ids[begin : begin + row.roles.tolist()[begin:].index(FORMAT)].tolist()
    prompt = mrm.decode(row.input_ids[:begin]).split("User:")[1].split("\n\n")[0]
    context = policy.chat(prompt)
    mass, some, only = [], [], []
    for n in range(len(answer)):
        p, token = policy.logits([context + answer[:n]])[0].double().softmax(-1).sort(descending=True)
        keep = (p.cumsum(-1) - p < top_p) & (p > 0)
        bad = mrm.unseen[token] & ~torch.isin(token, torch.tensor(policy.eos_token_id))
        mass.append((p[keep & bad].sum() / p[keep].sum()).item())
        some.append((keep & bad).any().item())
        only.append((bad | ~keep).all().item())
    assert found.positions == len(answer)
    assert found.mass == pytest.approx(np.mean(mass), abs=1e-3)
    assert found.mass > 0
    assert (found.some, found.only) == (pytest.approx(np.mean(some)), pytest.approx(np.mean(only)))


def test_end_tokens_are_never_unseen(annotated, mrm, monkeypatch):
    policy, rows = Policy.from_pretrained(FOLDER / "policy", device="cpu"), read_rewards(annotated).rows[:1]
    monkeypatch.setattr(mrm, "unseen", torch.ones_like(mrm.unseen))
    assert nucleus_on_unseen(policy, mrm, rows).only == 1
    said = rows[0].input_ids[rows[0].roles == AGENT].tolist()
    monkeypatch.setattr(Policy, "eos_token_id", (said[1],))
    found = nucleus_on_unseen(policy, mrm, rows)
    assert 0 < found.only < 1
    assert 0 < found.mass < 1


def test_tokenizers_that_differ(annotated, mrm):
    policy = trio().policy
    row = read_rewards(annotated).rows[0]
    end = row.roles.tolist().index(AGENT) + 6
    short = AnnotatedConversation(row.input_ids[:end], row.roles[:end], row.rewards[:end])
    said = policy.encode(mrm.decode(short.input_ids[short.roles == AGENT]))
    assert nucleus_on_unseen(policy, mrm, [short]).positions == len(said) > 6


def test_errors_are_named(annotated, mrm):
    policy, rows = Policy.from_pretrained(FOLDER / "policy", device="cpu"), read_rewards(annotated).rows
    with pytest.raises(ConfigError, match="turns"):
        predict(mrm, rows, "some")
    with pytest.raises(ConfigError, match="no rewards"):
        predict(
            mrm, [AnnotatedConversation(row.input_ids, row.roles, np.full_like(row.rewards, np.nan)) for row in rows]
        )
    with pytest.raises(ConfigError, match="top_p"):
        nucleus_on_unseen(policy, mrm, rows, 0.0)
    with pytest.raises(ConfigError, match="no answers"):
        nucleus_on_unseen(
            policy, mrm, [AnnotatedConversation(rows[0].input_ids[:5], rows[0].roles[:5], rows[0].rewards[:5])]
        )
    alien = AnnotatedConversation(rows[0].input_ids + mrm.vocab_size, rows[0].roles, rows[0].rewards)
    with pytest.raises(ConfigError, match="annotated conversation"):
        predict(mrm, [alien])
    long = AnnotatedConversation(*(np.tile(getattr(rows[0], name), 12) for name in ("input_ids", "roles", "rewards")))
    with pytest.raises(PromptTooLongError, match="annotated conversation"):
        predict(mrm, [long])


def test_command(annotated, tmp_path, capsys):
    picture = tmp_path / "scatter.png"
    command = ["eval-mrm", str(annotated), "--device", "cpu", "--limit", "2"]
    depths = tmp_path / "depth.svg"
    assert main([*command, "--json", "--policy", "--plot", str(picture), "--plot-depth", str(depths)]) == 0
    said = json.loads(capsys.readouterr().out)
    bundled = MultifurcationRewardModel.from_pretrained(FOLDER / "mrm", device="cpu")
    rows = read_rewards(annotated).rows[:2]
    assert said["known"]["within_1"] == evaluate(predict(bundled, rows), bundled, None).known.within_1
    assert said["nucleus"]["top_p"] == 0.8
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in depths.read_bytes()
    assert main([*command, "--plot", str(tmp_path / "scatter.doc")]) == 2
    assert "scatter.doc: cannot be drawn" in capsys.readouterr().err
    assert main([*command, "--mrm", str(FOLDER / "mrm"), "--base", str(FOLDER / "guard")]) == 0
    table = capsys.readouterr().out
    assert f"{said['known']['within_1']:.3f}" in table
    assert f"unseen: {int(bundled.unseen.sum())} of {bundled.vocab_size} tokens of the vocabulary" in table
    assert main(["eval-mrm", str(tmp_path)]) == 2
    assert "manifest.json" in capsys.readouterr().err
    assert main([*command, "--mrm", str(tmp_path)]) == 2
