"""What a caller of the package meets: one form of constructors, short reprs, wrong objects by name, silence."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from typing import Any

import pytest
import tiny

import saffron
from saffron import Policy, SaffronSearch, SearchConfig
from saffron.errors import ConfigError
from saffron.models.bundled import Models
from saffron.search import (
    METHODS,
    BeamConfig,
    BeamSearch,
    Decoder,
    GreedyConfig,
    GreedyDecoding,
    Sampling,
    parse_method,
)
from saffron.search.result import Cost, SearchResult

SMALL = {"max_new_tokens": 4, "min_new_tokens": 0}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "how are you"},
    {"role": "user", "content": "please tell me"},
]
PREFILLED = [*MESSAGES, {"role": "assistant", "content": "the quick"}]


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny.trio()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from saffron.cli import main

    assert saffron.__version__ == importlib.metadata.version("saffron-kernels")
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"saffron {saffron.__version__}\n"


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_takes_texts_and_conversations(name: str, models: Models) -> None:
    method = parse_method(name, models, **SMALL)
    one, *_ = results = method.generate("hello there")
    assert len(results) == 1 and one.prompt == "hello there" and one.prefill == ""
    conversation, forced, text = method.generate([MESSAGES, PREFILLED, "hello there"])  # type: ignore[list-item]
    assert conversation.prompt == forced.prompt == MESSAGES and forced.prefill == "the quick"
    assert text.token_ids == one.token_ids and text.score == pytest.approx(one.score, abs=1e-4)
    assert forced.to_json()["prompt"] == MESSAGES
    (again,) = method.generate(PREFILLED)  # type: ignore[arg-type]
    (same,) = method.generate([MESSAGES], "the quick")  # type: ignore[list-item]
    assert again.token_ids == same.token_ids == forced.token_ids
    assert method.generate([]) == []
    with pytest.raises(ConfigError, match=r"prompts\[1\]: got ''"):
        method.generate(["a", ""])
    assert repr(method).startswith(type(method).__name__ + "(") and len(repr(method)) < 400


def test_models_are_shown_the_conversation_of_a_search(models: Models) -> None:
    search = SaffronSearch(models.policy, models.mrm, SearchConfig(**SMALL))
    request = search.request(PREFILLED)
    assert list(request.policy) == models.policy.chat(MESSAGES, "the quick")
    assert list(request.reward) == models.mrm.context_tokens(MESSAGES)
    assert "".join(search.stream(PREFILLED)) == search.generate(PREFILLED)[0].text  # type: ignore[arg-type]


def test_one_form_of_constructor(models: Models) -> None:
    policy, mrm, guard = models
    for name, kind in METHODS.items():
        if name == "adaptive":
            continue  # takes both reward models
        method = parse_method(name, models)
        reward = None if name in ("greedy", "sample") else guard if name in ("best-of-n", "beam") else mrm
        again: Any = type(method)(policy, reward, kind.config())  # type: ignore[call-arg]
        assert again.config == method.config  # type: ignore[attr-defined]


def test_wrong_objects_are_named(models: Models) -> None:
    policy, mrm, guard = models
    cases: list[tuple[Any, tuple[Any, ...], str]] = [
        (SaffronSearch, (policy, guard), "mrm: got a value of type ProcessRewardModel, expected Multifurcation"),
        (SaffronSearch, (policy, None), "mrm: got None"),
        (SaffronSearch, (guard, mrm), "policy: got a value of type ProcessRewardModel, expected Policy"),
        (SaffronSearch, (policy, mrm, {"width": 3}), "config: got a value of type dict, expected SearchConfig"),
        (SaffronSearch, (policy, mrm, {}), "config: got a value of type dict"),
        (SaffronSearch, (policy, mrm, BeamConfig()), "config: got a value of type BeamConfig"),
        (BeamSearch, (policy, policy), "reward_model: got a value of type Policy, expected ProcessRewardModel or"),
        (BeamSearch, (mrm, guard), "policy: got a value of type MultifurcationRewardModel"),
        (BeamSearch, (policy, guard, SearchConfig()), "config: got a value of type SearchConfig, expected BeamConfig"),
        (BeamSearch, (policy, guard, 0), "config: got a value of type int"),
        (GreedyDecoding, (guard,), "policy: got"),
        (GreedyDecoding, (policy, guard), "reward_model: got a value of type ProcessRewardModel, expected None"),
        (GreedyDecoding, (policy, None, 12), "config: got a value of type int, expected GreedyConfig"),
        (Sampling, (policy, None, GreedyConfig()), "config: got a value of type GreedyConfig, expected SamplingConfig"),
    ]
    for method, arguments, message in cases:
        with pytest.raises(ConfigError, match=message):
            method(*arguments)
    search = SaffronSearch(policy, mrm, SearchConfig(**SMALL))
    for wrong in (["hi"], 3, None, ""):
        with pytest.raises(ConfigError, match="prompt"):
            list(search.stream(wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1e300, -1e31, float("inf"), float("nan"), True, "x", None, 10**400])
def test_unseen_rewards_are_numbers_that_stay_finite(value: Any) -> None:
    with pytest.raises(ConfigError, match="unseen_reward: got"):
        SearchConfig(unseen_reward=value)


def test_reprs_are_short(models: Models) -> None:
    (result,) = SaffronSearch(models.policy, models.mrm, SearchConfig(**SMALL)).generate("hello there")
    assert repr(result).startswith("SearchResult(") and len(repr(result)) < 200
    long = SearchResult("x" * 500, [1] * 500, -1.5, "length", Cost(1, 1, 1, 1, 1, 1))
    assert repr(long) == f"SearchResult('{'x' * 57}...', 500 tokens, score -1.5, 'length')"
    assert repr(models.policy) == "Policy('LlamaForCausalLM', float32, cpu)"
    assert all(len(repr(model)) < 100 for model in models)
    assert issubclass(BeamSearch, Decoder)


def test_nothing_is_printed(tmp_path: Any) -> None:
    """A whole use of the package in a process of its own: no progress bars, no warnings, no advice."""
    program = (
        "from saffron import SaffronSearch, SearchConfig, load_bundled\n"
        "models = load_bundled()\n"
        "search = SaffronSearch(models.policy, models.mrm, SearchConfig(max_new_tokens=2, min_new_tokens=0))\n"
        "search.generate('hello')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_policies_are_exported() -> None:
    assert Policy is saffron.Policy and "__version__" not in saffron.__all__
