"""An MRM on a frozen trunk: what is learned, and that it is read as it was trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

pytest.importorskip("pyarrow")

from saffron.cli import main
from saffron.errors import ConfigError
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import SaffronSearch
from saffron.search.config import SearchConfig
from saffron.training.annotate import AnnotateConfig, annotate
from saffron.training.conversations import Conversation
from saffron.training.evaluate import predict
from saffron.training.head import HeadConfig, RewardHead, fit, train_head
from saffron.training.layout import AGENT, FORMAT
from saffron.training.shards import AnnotatedConversation, RewardData

CONFIG = HeadConfig(rank=4, epochs=30, batch=64, lr=1e-2, weight_decay=0.0, read_batch=8, heldout_share=0.2)


def made_up(count: int = 400, vocab: int = 40) -> RewardData:
    """Conversations whose reward is the number of even tokens of the response so far, less that of odd ones."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        ids = rng.integers(3, vocab, int(rng.integers(4, 10)))
        rewards = np.cumsum(np.where(ids % 2 == 0, 1.0, -1.0)).astype(np.float32)
        context = np.array([2, 2], dtype=np.int64)
        roles = np.array([FORMAT] * 2 + [AGENT] * len(ids), dtype=np.int8)
        rows.append(
            AnnotatedConversation(
                np.concatenate([context, ids]), roles, np.concatenate([[np.nan] * 2, rewards]).astype(np.float32)
            )
        )
    return RewardData({"made": "up", "count": count}, rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("base"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("mrm")
    return out, train_head(str(base), made_up(), out, CONFIG, device="cpu")


def test_it_learns_and_is_read_as_trained(base: Path, trained: tuple[Path, dict]) -> None:
    out, summary = trained
    assert summary["heldout"]["correlation"] > 0.5
    mrm = MultifurcationRewardModel.from_pretrained(out, device="cpu")
    found = predict(mrm, made_up().rows)
    assert np.corrcoef(found.predicted, found.true)[0, 1] > 0.5
    assert int(mrm.unseen.sum()) == summary["unseen"] == summary["vocabulary"] - 37
    trunk = Policy.from_pretrained(base, device="cpu").model
    assert torch.equal(mrm.model.get_input_embeddings().weight, trunk.get_input_embeddings().weight)
    search = SaffronSearch(Policy.from_pretrained(base, device="cpu"), mrm, SearchConfig(width=2, max_new_tokens=4))
    assert len(search.generate("hello there")[0].token_ids) >= 1


def test_folding_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    states, embeddings = torch.randn(50, 8, generator=generator) * 3 + 1, torch.randn(20, 8, generator=generator) - 2
    head = RewardHead(states, embeddings, 3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weight, bias = head.folded()
    for token in range(20):
        expected = head(states, torch.full((50,), token))
        torch.testing.assert_close(states @ weight[token] + bias[token], expected, rtol=1e-4, atol=1e-3)


def test_the_best_epoch_counts() -> None:
    """Rewards that are noise: what is kept is not what the last epoch overfitted."""
    generator = torch.Generator().manual_seed(0)
    states, embeddings = torch.randn(100, 8, generator=generator), torch.randn(20, 8, generator=generator)
    tokens, rewards = torch.arange(100) % 20, torch.randn(100, generator=generator)
    parts = states[:80], tokens[:80], rewards[:80], states[80:], tokens[80:], rewards[80:]
    errors = [
        fit(embeddings, *parts, HeadConfig(rank=4, epochs=epochs, lr=5e-2))[1].root_mean_square_error
        for epochs in (1, 3, 40)
    ]
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < float(rewards[80:].square().mean().sqrt()) * 1.1


def test_interrupted_and_other_runs(base: Path, trained: tuple[Path, dict], tmp_path: Path) -> None:
    out, summary = trained
    read: list[int] = []
    again = train_head(str(base), made_up(), out, CONFIG, device="cpu", progress=lambda done, *_: read.append(done))
    assert again == summary and not read
    (out / "training" / "summary.json").unlink()  # as if killed before the end: the states are there
    assert (
        train_head(str(base), made_up(), out, CONFIG, device="cpu", progress=lambda done, *_: read.append(done))
        == summary
    )
    assert not read
    with pytest.raises(ConfigError, match="rank was 4 and is now 5"):
        train_head(str(base), made_up(), out, HeadConfig(rank=5), device="cpu")
    for name, value in (("rank", 0), ("lr", 0.0), ("heldout_share", 1.0)):
        with pytest.raises(ConfigError, match=name):
            HeadConfig(**{name: value})


def test_a_model_of_another_is_not_spoilt(base: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in base.iterdir()}
    with pytest.raises(ConfigError, match="holds config.json of something else; choose another folder"):
        train_head(str(base), made_up(), base, CONFIG, device="cpu", run=tmp_path)
    assert {file: file.read_bytes() for file in base.iterdir()} == before


def test_the_command(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "length_reward.py").write_text(
        "def score(conversations, responses):\n    return list(map(len, responses))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    texts = ["hello there", "a kind gardener", "bread", "good day", "please tell me", "the quick brown fox"]
    corpus = [Conversation(("hello", text)) for text in texts]
    config = AnnotateConfig(prefixes="response")
    annotate(corpus, "length_reward:score", tmp_path / "rewards", config, tokenizer=str(base))
    command = ["train-mrm", str(tmp_path / "rewards"), "--output", str(tmp_path / "mrm"), "--trunk", "frozen"]
    command += ["--rank", "2", "--heldout-share", "0.3", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["conversations"] == 4 and said["heldout_conversations"] == 2
    stored = json.loads((tmp_path / "mrm" / "training" / "settings.json").read_text())
    assert (stored["rank"], stored["epochs"]) == (2, HeadConfig().epochs)
    assert main([*command, "--heldout", str(tmp_path / "rewards")]) == 2
    assert "--heldout: works with --trunk lora" in capsys.readouterr().err
    assert main([*command, "--dropout", "0.5"]) == 2
    assert "--dropout: works with --trunk lora" in capsys.readouterr().err
