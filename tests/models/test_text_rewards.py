"""Anything that scores text as a process reward: functions, classifiers, what methods make of them, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from saffron.errors import CheckpointError, ConfigError, NumericalError
from saffron.models.chat import Conversation
from saffron.models.guard import ProcessRewardModel
from saffron.models.text_rewards import TextReward, check_reward, load_reward, reward_fingerprint
from saffron.search import BeamConfig, BeamSearch, BestOfN, BestOfNConfig, SaffronSearch, parse_method
from saffron.search.config import Request
from saffron.search.proposals import Nuclei

VOWELS = "aeiou"


def vowels(conversations: Sequence[Conversation], responses: Sequence[str]) -> list[float]:
    return [float(sum(letter in VOWELS for letter in text)) for text in responses]


@pytest.mark.parametrize("name", ["best-of-n", "beam", "rebase", "deal", "mcts", "args", "cards"])
def test_methods_take_it(name: str) -> None:
    models = tiny.trio(3)._replace(guard=TextReward(vowels, flops=7))
    options = {"max_new_tokens": 6, "min_new_tokens": 2, "n": 4, "width": 3, "simulations": 4}
    method = parse_method(name, models, **options)
    first, second = method.generate(["hello there", "please tell me"], "the quick")
    (alone,) = method.generate("hello there", "the quick")
    assert first.token_ids == alone.token_ids and first.cost == alone.cost
    assert first.cost.reward_flops == 7 * first.cost.reward_calls > 0 and first.cost.reward_tokens == 0
    if name in ("best-of-n", "beam"):
        assert first.score == vowels([], [first.text])[0] and second.score == vowels([], [second.text])[0]


def test_an_engine_runs_methods_with_it() -> None:
    models = tiny.trio(3)
    method = BestOfN(models.policy, TextReward(vowels), BestOfNConfig(n=3, max_new_tokens=4, min_new_tokens=0))
    request = Request(
        tuple(models.policy.chat("hello there")), tuple(method.scorer.model.context_tokens("hello there"))
    )
    engine = SaffronSearch(models.policy, models.mrm).engine()
    job = engine.submit_job(method, request)
    while not job.done:
        engine.step()
    assert job.result().token_ids == method.search([request])[0].token_ids


def test_best_of_n_answers_with_the_best_text() -> None:
    policy, seen = tiny.trio(3).policy, []

    def remember(conversations: Sequence[Conversation], responses: Sequence[str]) -> list[float]:
        seen.extend(zip(conversations, responses, strict=True))
        return vowels(conversations, responses)

    config = BestOfNConfig(n=8, max_new_tokens=6, min_new_tokens=6, top_p=1.0)
    (found,) = BestOfN(policy, TextReward(remember), config).generate("hello there", "the quick")
    assert found.score == max(vowels([], [text])[0] for _, text in seen) > 0
    assert len({text for _, text in seen}) == len(seen) > 1  # equal texts are scored once
    assert {conversation.turns for conversation, _ in seen} == {("hello there",)}  # the prefill is not shown


def test_a_search_over_a_conversation_sees_its_turns() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "grüße 👋"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "more"},
    ]
    reward = TextReward(vowels)
    assert reward.conversation(reward.context_tokens(messages)) == Conversation(("grüße 👋", "hi", "more"))
    search = BeamSearch(tiny.trio().policy, reward, BeamConfig(max_new_tokens=2))
    for wrong in ((), (1, 2), (91, 93), tuple(b"[1]"), (300,)):
        with pytest.raises(ConfigError, match=r"requests\[0\]"):
            search.search([Request((0, 5), wrong)])


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_scores_are_in_order(batch: int) -> None:
    calls: list[int] = []

    def lengths(conversations: Sequence[Conversation], responses: Sequence[str]) -> np.ndarray:
        calls.append(len(responses))
        return np.array([len(c.turns[0]) * 100 + len(r) for c, r in zip(conversations, responses, strict=True)])

    scores = TextReward(lengths, batch=batch).score([("a", "bcd"), ("ab", ""), ("abc", "d")])
    assert scores.tolist() == [103.0, 200.0, 301.0] and scores.dtype == torch.float32
    assert max(calls) <= batch and sum(calls) == 3
    assert TextReward(lengths).score([]).tolist() == []


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1.0], ConfigError, "1 rewards for 2"),
        (ZeroDivisionError("lexicon is empty"), ConfigError, "the function failed .lexicon is empty"),
        (["x", "y"], ConfigError, "expected a number"),
        (None, ConfigError, "expected a number"),
        ([1.0, math.nan], NumericalError, "not finite"),
        ([1.0, math.inf], NumericalError, "not finite"),
    ],
)
def test_wrong_answers_of_a_function_are_named(given: Any, error: type[Exception], message: str) -> None:
    def score(*_: object) -> Any:
        if isinstance(given, Exception):
            raise given
        return given

    with pytest.raises(error, match=f"reward mine.*{message}"):
        TextReward(score, name="mine").score([("a", "b"), ("c", "d")])


class Classifier:
    """What scikit-learn gives: classes and probabilities, or a decision function."""

    def __init__(self, probabilities: bool) -> None:
        self.classes_ = np.array(["bad", "good"])
        if probabilities:
            self.predict_proba = lambda texts: np.array([[1 - self.chance(t), self.chance(t)] for t in texts])
        else:
            self.decision_function = lambda texts: np.array([len(t) for t in texts])

    def chance(self, text: str) -> float:
        return 1 / (1 + math.exp(-len(text)))


@pytest.mark.parametrize("probabilities", [True, False])
def test_scikit_learn_classifiers(probabilities: bool) -> None:
    pairs = [("a", "xyz"), ("a", "")]
    good, bad = (TextReward.classifier(Classifier(probabilities), label) for label in ("good", "bad"))
    assert good.score(pairs).tolist() == pytest.approx([3.0, 0.0], abs=1e-5)
    assert bad.score(pairs).tolist() == pytest.approx([-3.0, 0.0], abs=1e-5)
    with pytest.raises(ConfigError, match="label: got 'safe', expected one of bad, good"):
        TextReward.classifier(Classifier(True), "safe")
    with pytest.raises(ConfigError, match="model: expected predict_proba"):
        TextReward.classifier(SimpleNamespace(classes_=["a", "b", "c"], decision_function=len), "a")


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An encoder of three labels, and a decoder of one output whose tokenizer has no padding token."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("bert", "llama")}
    torch.manual_seed(0)
    made = tiny.tokenizer()
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    labels = {"id2label": {0: "kind", 1: "rude", 2: "odd"}, "label2id": {"kind": 0, "rude": 1, "odd": 2}}
    bert = BertConfig(vocab_size=len(made), initializer_range=0.5, pad_token_id=0, **small, **labels)
    BertForSequenceClassification(bert).save_pretrained(folders["bert"])
    one = LlamaConfig(vocab_size=len(made), num_labels=1, pad_token_id=None, initializer_range=0.5, **small)
    LlamaForSequenceClassification(one).save_pretrained(folders["llama"])
    for folder in folders.values():
        made.save_pretrained(folder)
    return folders


def test_sequence_classifiers(classifiers: dict[str, Path]) -> None:
    folder, texts = classifiers["bert"], ["hello there", "please tell me how to bake", "a"]
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        alone = [model(torch.tensor([tiny.tokenizer().encode(text)])).logits[0].double() for text in texts]
    kind = load_reward(f"hf:{folder}#kind", device="cpu")
    assert isinstance(kind, TextReward) and kind.flops > 0
    expected = [float(a[0] - a[1:].logsumexp(0)) for a in alone]
    assert kind.score([("x", text) for text in texts]).tolist() == pytest.approx(expected, abs=1e-4)
    no_rude = load_reward(f"hf:{folder}#!rude", device="cpu").score([("x", text) for text in texts])
    expected = [float(a[[0, 2]].logsumexp(0) - a[1]) for a in alone]
    assert no_rude.tolist() == pytest.approx(expected, abs=1e-4)


def test_a_model_of_one_output(classifiers: dict[str, Path]) -> None:
    reward = load_reward(f"hf:{classifiers['llama']}", device="cpu")
    texts = ["hello there", "please tell me how to bake", "a"]
    together = reward.score([("x", text) for text in texts])
    assert together.tolist() == pytest.approx([reward.score([("x", text)]).item() for text in texts], abs=1e-4)
    assert len(set(together.tolist())) == 3


def test_what_a_text_names(classifiers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def score(conversations, responses):\n    return [len(r) for r in responses]\n\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward("my_rewards:score").score([("a", "bcd")]).tolist() == [3.0]
    guard = tiny.save_checkpoint(tmp_path / "guard")
    words = {"safe": "e", "unsafe": "a"}
    assert isinstance(load_reward(f"guard:{guard}", device="cpu", **words), ProcessRewardModel)
    assert reward_fingerprint(f"guard:{guard}") == reward_fingerprint(guard)
    before = reward_fingerprint("my_rewards:score")
    assert before == reward_fingerprint("my_rewards:score") != reward_fingerprint("my_rewards:number")
    bert = classifiers["bert"]
    assert reward_fingerprint(f"hf:{bert}#kind") != reward_fingerprint(f"hf:{bert}#rude")
    for wrong, error, message in (
        ("my_rewards:other", ConfigError, "no other"),
        ("my_rewards:number", ConfigError, "function: got a value of type int"),
        ("no_such_module:score", ConfigError, "no_such_module cannot be imported"),
        (f"hf:{bert}", ConfigError, "label: got '', expected one of kind, rude, odd"),
        (f"hf:{bert}#safe", ConfigError, "'safe', expected one of kind"),
        (f"hf:{classifiers['llama']}#safe", ConfigError, "one output"),
        (f"hf:{guard}#LABEL_0", CheckpointError, "head are missing"),
        ("hf:", ConfigError, "module:function"),
        ("guard:", ConfigError, "module:function"),
    ):
        with pytest.raises(error, match=message):
            load_reward(wrong, device="cpu")
    for wrong in (f"hf:{tmp_path}/none#x", f"guard:{tmp_path}/none", f"{tmp_path}/none"):
        with pytest.raises(CheckpointError, match="--reward"):
            check_reward("--reward", wrong)
    with pytest.raises(ConfigError, match="flops: got -1"):
        TextReward(vowels, flops=-1)


def test_even_draws_are_uniform_over_the_nucleus() -> None:
    logits = torch.tensor([[5.0, 3.0, 1.0, -9.0], [0.0, 0.0, 0.0, 0.0]])
    nuclei = Nuclei(logits, 1.0, 0.95)
    tokens, _ = nuclei.row(0)
    assert len(tokens) == 2
    grid = [(i + 0.5) / 100 for i in range(100)]
    evenly = [nuclei.draw([u, u], [True, False])[0] for u in grid]
    assert [evenly.count(t) for t in tokens.tolist()] == [50, 50]
    freely = [nuclei.draw([u, u], [False, True])[0] for u in grid]
    assert freely == [nuclei.draw([u, u])[0] for u in grid] and freely.count(0) > 80
    assert json.dumps(evenly)  # plain integers
