"""`saffron collect`: the policy's own continuations; and annotating them with a reward of text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

pytest.importorskip("pyarrow")

from saffron.cli import main
from saffron.errors import ConfigError, PromptTooLongError
from saffron.models.policy import Policy
from saffron.training.annotate import AnnotateConfig, Annotator, annotate
from saffron.training.collect import CORPUS, DRAWS, CollectConfig, Collector, attacks, collect
from saffron.training.conversations import Conversation, read_corpus
from saffron.training.layout import AGENT, ConversationLayout
from saffron.training.shards import read_rewards
from saffron.workers import Workers

PROMPTS = [("hello there", "the quick"), ("please tell me", ""), ("hello there", "a kind")]
SMALL = CollectConfig(samples=2, even=1, max_new_tokens=5, batch=2)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def collected(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    collect(PROMPTS, str(policy), out, SMALL)
    return out


def test_prompts_are_continued_with_prefill_and_without() -> None:
    found = [(one.prompt, one.prefill) for one in attacks(PROMPTS)]
    assert found == [
        ("hello there", ""),
        ("please tell me", ""),
        ("hello there", "the quick"),
        ("hello there", "a kind"),
    ]


def test_what_is_drawn(policy: Path, collected: Path) -> None:
    records = [json.loads(line) for line in (collected / DRAWS).read_text().splitlines()[1:]]
    assert len(records) == 4
    model = Policy.from_pretrained(policy)
    for record in records:
        assert [one["draw"] for one in record["responses"]] == ["sampled-0", "sampled-1", "even-0"]
        for one in record["responses"]:
            assert 0 <= len(one["ids"]) <= 5 and not set(one["ids"]) & set(model.eos_token_id)
            assert one["text"] == model.decode(one["ids"])
    corpus = [json.loads(line) for line in (collected / CORPUS).read_text().splitlines()]
    assert max(Counter((one["prompt"], one["text"]) for one in corpus).values()) == 1
    drawn = {(r["prompt"], one["text"]) for r in records for one in r["responses"] if one["ids"]}
    assert {(one["prompt"], one["text"]) for one in corpus} == drawn
    assert read_corpus(str(collected / CORPUS))[0] == Conversation((corpus[0]["prompt"], tuple(corpus[0]["response"])))


def test_a_corpus_of_another_is_not_overwritten(policy: Path, collected: Path, tmp_path: Path) -> None:
    (tmp_path / CORPUS).write_text("precious")
    with pytest.raises(ConfigError, match="holds corpus.jsonl of something else; choose another folder"):
        collect(PROMPTS, str(policy), tmp_path, SMALL)
    assert (tmp_path / CORPUS).read_text() == "precious"
    before = (collected / CORPUS).read_bytes()
    collect(PROMPTS, str(policy), collected, SMALL)  # our own is written again
    assert (collected / CORPUS).read_bytes() == before


def test_equal_answers_are_one_conversation(policy: Path, tmp_path: Path) -> None:
    config = CollectConfig(samples=4, even=0, max_new_tokens=3, top_p=1e-6, batch=2)  # one token in each nucleus
    corpus = collect(PROMPTS[:1], str(policy), tmp_path, config)
    assert 1 <= len(corpus) <= 2


class LastFirst(Workers):
    """Work that is done in another order, as that of several processes is."""

    def run(self, make: Callable[[], Callable[[Any], Any]], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        function = make()
        return ((number, function(items[number])) for number in reversed(range(len(items))))


def test_interrupted_and_spread_runs_are_the_same(policy: Path, collected: Path, tmp_path: Path) -> None:
    wanted = (collected / CORPUS).read_bytes()
    lines = (collected / DRAWS).read_text().splitlines(keepends=True)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / DRAWS).write_text("".join(lines[:3]) + lines[3][:20])
    seen: list[tuple[int, int]] = []
    collect(PROMPTS, str(policy), cut, SMALL, progress=lambda *done: seen.append(done))
    assert seen == [(2, 4), (4, 4)] and (cut / CORPUS).read_bytes() == wanted
    collect(PROMPTS, str(policy), tmp_path / "two", SMALL, LastFirst())
    assert (tmp_path / "two" / CORPUS).read_bytes() == wanted
    with pytest.raises(ConfigError, match="seed was 0 and is now 1"):
        collect(PROMPTS, str(policy), cut, CollectConfig(samples=2, even=1, max_new_tokens=5, batch=2, seed=1))


def test_seeds_and_bad_arguments(policy: Path, tmp_path: Path) -> None:
    model = Policy.from_pretrained(policy)
    drawn = []
    for seed in (0, 1):
        config = CollectConfig(samples=2, even=2, max_new_tokens=5, top_p=1.0, seed=seed)
        drawn.append(Collector(model, config)(attacks(PROMPTS)))
    assert drawn[0] != drawn[1]
    assert model.kv.num_nodes == 0
    with pytest.raises(ConfigError, match="samples and even"):
        CollectConfig(samples=0, even=0)
    with pytest.raises(ConfigError, match="even: got -1"):
        CollectConfig(even=-1)
    with pytest.raises(ConfigError, match="prompts: got none"):
        collect([], str(policy), tmp_path / "none", SMALL)
    with pytest.raises(PromptTooLongError):
        Collector(model, SMALL)(attacks([("a b " * 300, "")]))


REWARD = "def vowels(conversations, responses):\n    return [sum(c in 'aeiou' for c in r) for r in responses]\n"


@pytest.fixture
def reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "vowel_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "vowel_reward:vowels"


def test_rewards_of_text_for_every_prefix(policy: Path, collected: Path, reward: str, tmp_path: Path) -> None:
    corpus = read_corpus(str(collected / CORPUS))
    config = AnnotateConfig(prefixes="response", shard_size=3, scale=2.0)
    annotate(corpus, reward, tmp_path / "out", config, tokenizer=str(policy))
    data = read_rewards(tmp_path / "out")
    model = Policy.from_pretrained(policy)
    assert data.manifest["base"] == str(policy) and data.manifest["prm"]["source"] == reward
    for row, conversation in zip(data.rows, corpus, strict=True):
        response = conversation.turns[1]
        assert row.input_ids[row.roles == AGENT].tolist() == list(response)
        expected = [2.0 * sum(c in "aeiou" for c in model.decode(response[:n])) for n in range(1, len(response) + 1)]
        assert row.rewards[row.roles == AGENT].tolist() == expected
        assert np.isnan(row.rewards[row.roles != AGENT]).all()
    assert max(np.nanmax(row.rewards) for row in data.rows) > 2


def test_a_reward_of_text_is_shown_the_turns_before(policy: Path) -> None:
    encoder = Policy.from_pretrained(policy).encoder
    layout = ConversationLayout(encoder, prefixes="response")(Conversation(("hello", "a kind", "tell me", "bread")))
    turns = [encoder.tokenizer.decode(turn) for turn in layout.turns()]
    assert turns == ["hello", "a kind", "tell me", "bread"]
    assert ConversationLayout(encoder)(Conversation(("", "a kind"))).turns()[0] == []
    with pytest.raises(ConfigError, match="turn 1: got the id 1000000"):
        ConversationLayout(encoder)(Conversation(("a", (10**6,))))


def test_what_a_reward_of_text_needs(policy: Path, reward: str, tmp_path: Path) -> None:
    corpus = [Conversation(("hello", "a kind"))]
    with pytest.raises(ConfigError, match="tokenizer: got none"):
        annotate(corpus, reward, tmp_path / "out", AnnotateConfig(prefixes="response"))
    with pytest.raises(ConfigError, match="prefixes: got 'conversation'"):
        annotate(corpus, reward, tmp_path / "out", AnnotateConfig(), tokenizer=str(policy))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="scale"):
        AnnotateConfig(scale=0.0)
    annotator = Annotator.load(reward, AnnotateConfig(prefixes="response"), str(policy))
    assert annotator.rewards([]) == []


def test_the_commands(policy: Path, reward: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p, "prefill": f}) + "\n" for p, f in PROMPTS))
    small = ["--policy", str(policy), "--max-new-tokens", "4", "--samples", "1", "--even", "1", "--device", "cpu"]
    assert main(["collect", str(prompts), "--output", str(tmp_path / "corpus"), *small, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    corpus = tmp_path / "corpus" / CORPUS
    assert done["conversations"] == len(corpus.read_text().splitlines()) > 1
    rewards = ["--reward", reward, "--tokenizer", str(policy), "--output", str(tmp_path / "rewards")]
    assert main(["annotate", str(corpus), *rewards, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewards"] == done["tokens"]
    assert main(["annotate", str(corpus), "--reward", reward, "--output", str(tmp_path / "other")]) == 2
    assert "tokenizer: got none" in capsys.readouterr().err
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["collect", str(tmp_path / "empty.jsonl"), "--output", str(tmp_path / "x"), *small]) == 2
    assert "holds no prompts" in capsys.readouterr().err
