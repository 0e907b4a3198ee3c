"""What holds for every method: batches, seeds, budgets, costs, errors, and what it is made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import tiny
import torch

from saffron.errors import CapacityError, ConfigError, NumericalError, PromptTooLongError
from saffron.models.bundled import Models
from saffron.search import METHODS, Decoder, SaffronSearch, parse_config, parse_method
from saffron.search.result import Cost, SearchResult
from saffron_kernels import CacheFullError

SMALL = {"max_new_tokens": 8, "min_new_tokens": 2, "n": 4, "width": 3, "children": 3, "simulations": 4, "lookahead": 2}
PROMPTS = ["hello there", "please tell me how to bake", "hello there", "hello there"]
PREFILLS = ["the quick", "", "", "the quick"]
GUIDED = [name for name in METHODS if name not in ("greedy", "sample")]
DRAWING = [name for name in METHODS if name.split("-mrm")[0] in ("sample", "best-of-n", "beam", "rebase", "cards")]


@pytest.fixture(scope="module")
def trio() -> Models:
    return tiny.trio(3)


@pytest.fixture
def models(trio: Models) -> Iterator[Models]:
    """Their caches are empty after every test."""
    yield trio
    assert [model.kv.num_nodes for model in trio] == [0, 0, 0]


def comparable(result: SearchResult) -> dict[str, Any]:
    data = result.to_json()
    del data["score"], data["cost"]["seconds"]
    return data


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_equals_answering_alone(models: Models, name: str) -> None:
    method = parse_method(name, models, **SMALL)
    together = method.generate(PROMPTS, PREFILLS)
    assert comparable(together[0]) == comparable(together[3])
    for prompt, prefill, result in zip(PROMPTS[:3], PREFILLS, together, strict=False):
        (alone,) = method.generate([prompt], prefill)
        assert comparable(result) == comparable(alone)
        assert result.score == pytest.approx(alone.score, abs=1e-4)
        assert (result.prompt, result.prefill) == (prompt, prefill)
    assert method.generate([]) == []


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_bits(models: Models, name: str) -> None:
    first, second = (parse_method(name, models, **SMALL).generate(PROMPTS, PREFILLS) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", DRAWING)
def test_another_seed_draws_something_else(models: Models, name: str) -> None:
    answers = [parse_method(f"{name}:seed={s},top_p=1", models, **SMALL).generate(PROMPTS, PREFILLS) for s in range(4)]
    assert len({tuple(tuple(r.token_ids) for r in results) for results in answers}) > 1


@pytest.mark.parametrize("name", METHODS)
def test_lengths_and_ends(models: Models, name: str) -> None:
    policy = models.policy
    ends = set(policy.eos_token_id)
    weight = policy.model.get_output_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad():  # a policy that likes to end
        weight[min(ends)] *= 6
    try:
        results = [
            r for seed in range(3)
            for r in parse_method(name, models, **{**SMALL, "seed": seed, "top_p": 1.0}).generate(PROMPTS, PREFILLS)
        ]  # fmt: skip
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert {r.finish_reason for r in results} & {"eos"}
    for result in results:
        assert 1 <= len(result.token_ids) <= 8 and not ends & set(result.token_ids[:-1])
        ended = result.token_ids[-1] in ends
        assert result.finish_reason == ("eos" if ended else "length")
        assert len(result.token_ids) > 2 if ended else len(result.token_ids) == 8
        assert result.text == policy.decode(result.token_ids)


@pytest.mark.parametrize("name", METHODS)
def test_results_say_what_they_cost(models: Models, name: str) -> None:
    method = parse_method(name, models, **SMALL)
    done: list[tuple[int, int]] = []
    results = method.generate(PROMPTS, PREFILLS, progress=lambda *at: done.append(at))
    assert done and [d for d, _ in done] == sorted({d for d, _ in done}) and all(d <= total for d, total in done)
    for result in results:
        cost = result.cost
        data = json.loads(json.dumps(result.to_json()))
        assert Cost(**data["cost"]) == cost and data["cost"]["seconds"] == cost.seconds > 0
        assert cost.flops == cost.policy_flops + cost.reward_flops
        assert cost.policy_tokens > cost.policy_calls > 0
        assert (cost.reward_calls > 0) == (cost.reward_tokens > 0) == (name in GUIDED)
    assert len({result.cost.seconds for result in results}) == 1


BUDGETS = [
    ("saffron", "width", [1, 3, 6]), ("best-of-n", "n", [1, 3, 8]), ("best-of-n-mrm", "n", [1, 3, 8]),
    ("beam", "width", [1, 2, 4]), ("beam", "children", [1, 2, 4]), ("rebase", "width", [1, 4, 12]),
    ("deal", "children", [1, 2, 4]), ("mcts", "simulations", [2, 6, 16]), ("mcts-mrm", "simulations", [2, 6, 16]),
    ("sample", "max_new_tokens", [2, 4, 8]),
    ("args", "max_new_tokens", [2, 4, 8]), ("cards", "max_new_tokens", [2, 4, 8]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "option", "values"), BUDGETS)
def test_more_budget_costs_more(models: Models, name: str, option: str, values: list[int]) -> None:
    # No ends: a search that ends sooner is cheaper.
    budgets = [{**SMALL, option: v, "min_new_tokens": v if option == "max_new_tokens" else 8} for v in values]
    results = [parse_method(name, models, **budget).generate(PROMPTS, PREFILLS) for budget in budgets]
    for less, more in zip(results, results[1:], strict=False):
        assert sum(r.cost.flops for r in less) < sum(r.cost.flops for r in more)
        assert sum(r.cost.policy_calls for r in less) < sum(r.cost.policy_calls for r in more)


@pytest.mark.parametrize(
    ("spec", "live", "beyond"),
    [  # responses that may go on, and what is remembered beyond each
        ("beam:width=2,children=4", 2, 0),
        ("beam:width=2,children=4,step_tokens=2", 2, 0),
        ("beam-mrm:width=2,children=4", 2, 0),
        ("rebase:width=3,step_tokens=2", 3, 0),
        ("deal:width=2,children=4,lookahead=3", 2, 3),
        ("mcts:simulations=3,children=3,lookahead=2", 1, 3 * 3),
        ("args:children=4", 1, 0),
        ("cards:longest=4,reward_threshold=1e6,attempts=3", 1, 4),
    ],
)
def test_caches_hold_what_may_still_be_asked_for(models: Models, spec: str, live: int, beyond: int) -> None:
    method = parse_method(spec, models, max_new_tokens=12, min_new_tokens=12, top_p=1.0)
    assert isinstance(method, Decoder) and method.scorer is not None
    contexts = len(models.policy.chat("hello there")), len(method.scorer.model.context_tokens("hello there"))
    held: list[tuple[int, int, int]] = []
    method.generate(
        ["hello there"],
        progress=lambda done, _: held.append((done, models.policy.kv.num_nodes, method.scorer.model.kv.num_nodes)),  # type: ignore[union-attr]
    )
    assert held[-1][0] == 12
    for done, *nodes in held:
        for context, count in zip(contexts, nodes, strict=True):
            assert count <= context + live * (done + beyond)


@pytest.mark.parametrize("name", [name for name in GUIDED if name != "adaptive"])  # which asks for the risk of it
def test_reward_models_are_not_shown_the_prefill(models: Models, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    for model in (models.mrm, models.guard):
        plain = model._forward
        monkeypatch.setattr(
            model, "_forward", lambda tokens, *rest, plain=plain: read.append(tokens.tolist()) or plain(tokens, *rest)
        )
    bare, attacked = ([], [])
    for seen, prefill in ((bare, ""), (attacked, "the quick")):
        read.clear()
        parse_method(name, models, **SMALL).generate(["hello there"], prefill)
        seen += read
    context = models.guard.context_tokens("hello there"), models.mrm.context_tokens("hello there")
    for seen in (bare, attacked):
        assert any(seen[0][: len(c)] == c for c in context)  # what follows the prompt is the response
    quick = models.policy.encode("the quick")
    assert all(tokens[len(context[0]) :][: len(quick)] != quick for tokens in attacked[:1])


@dataclass
class Failing:
    """A forward pass that raises an error when it has run for the (`at` + 1)-th time."""

    plain: Callable[..., torch.Tensor]
    at: int
    error: BaseException
    raised: list[int]
    calls: int = 0

    def __call__(self, *args: Any) -> torch.Tensor:
        result = self.plain(*args)
        self.calls += 1
        if self.calls == self.at + 1:
            self.raised.append(self.at)
            raise self.error
        return result


@pytest.mark.parametrize("which", ["policy", "reward"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_errors_give_the_caches_back(
    models: Models, name: str, which: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = parse_method(name, models, **SMALL)
    faulty = [models.policy] if which == "policy" else [models.mrm, models.guard]
    for failing in (0, 1, 3):  # which forward pass
        raised: list[int] = []
        with monkeypatch.context() as patch, suppress(type(error)):
            for model in faulty:
                patch.setattr(model, "output", Failing(model.output, failing, error, raised))
            method.generate(PROMPTS, PREFILLS)
        assert bool(raised) or failing > 0 or (which == "reward" and name not in GUIDED)
        assert [model.kv.num_nodes for model in models] == [0, 0, 0], f"forward pass {failing}"


@pytest.mark.parametrize("name", METHODS)
def test_numbers_that_are_not_finite_stop_the_search(name: str) -> None:
    for which in ("policy", "mrm", "guard"):
        models = tiny.trio()
        model = getattr(models, which)
        with torch.no_grad():
            model.model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = torch.nan
        used = (
            which == "policy"
            or name == "adaptive"
            or (name in GUIDED and (which == "mrm") == (name == "saffron" or "-mrm" in name))
        )
        method = parse_method(name, models, **SMALL)
        if used:
            with pytest.raises(NumericalError, match={"policy": "policy", "mrm": "mrm", "guard": "guard|prm"}[which]):
                method.generate(PROMPTS, PREFILLS)
        else:
            method.generate(PROMPTS[:1])
        assert [model.kv.num_nodes for model in models] == [0, 0, 0]


@pytest.mark.parametrize("name", METHODS)
def test_a_cache_that_is_full_and_may_not_grow(name: str) -> None:
    models = tiny.trio(capacity=60, grow=False)
    with pytest.raises(CapacityError if name == "saffron" else CacheFullError):  # the engine sees it before
        parse_method(name, models, **{**SMALL, "max_new_tokens": 60}).generate(PROMPTS, PREFILLS)
    assert [model.kv.num_nodes for model in models] == [0, 0, 0]


@pytest.mark.parametrize("name", METHODS)
def test_prompts_that_do_not_fit_are_refused_before_anything_runs(
    models: Models, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = parse_method(name, models, **SMALL)
    for model in models:
        monkeypatch.setattr(model, "_forward", None)
    with pytest.raises(PromptTooLongError, match="prompt 1"):
        method.generate(["hello", "hello " * 130])
    with pytest.raises(ConfigError, match="prefill: got 1 for 2"):
        method.generate(["a", "b"], ["c"])
    with pytest.raises(ConfigError, match=r"prompts\[0\]: got ''"):
        method.generate([""])


def test_another_tokenizer_reads_text(models: Models) -> None:
    other = tiny.tokenizer(280, ["completely different words make a different vocabulary"] * 4)
    apart = tiny.trio(3, guard_tokenizer=other)
    mixed = Models(models.policy, apart.mrm, apart.guard)
    for name in GUIDED:
        method = parse_method(name, mixed, **SMALL)
        together = method.generate(PROMPTS[:2], PREFILLS[:2])
        for prompt, prefill, result in zip(PROMPTS, PREFILLS, together, strict=False):
            (alone,) = method.generate([prompt], prefill)
            assert comparable(result) == comparable(alone)
        if name in ("best-of-n", "beam", "rebase"):
            said = models.policy.decode(together[0].token_ids)
            assert together[0].score == pytest.approx(float(apart.guard.score([(PROMPTS[0], said)])), abs=1e-4)
    assert apart.mrm.kv.num_nodes == apart.guard.kv.num_nodes == 0


def test_text_that_outgrows_the_reward_models_context(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reward models take two tokens per character; the check of the prompt counts one for one of the policy's."""
    apart = tiny.trio(3, guard_tokenizer=tiny.tokenizer(258, ["a"]))
    for model, suffix in ((apart.guard, "hello assessment:"), (apart.mrm, "")):

        def twice(text: str, plain: Callable[[str], list[int]] = model.encode) -> list[int]:
            return [t for t in plain(text) for _ in range(2)]

        monkeypatch.setattr(model, "encode", twice)
        monkeypatch.setattr(model.encoder, "text", twice)
        monkeypatch.setattr(model.encoder, "texts", lambda texts, twice=twice: list(map(twice, texts)))
        fits = len(model.context_tokens("hello there")) + len(model.encode(suffix)) + 50
        model.model.config.max_position_embeddings = fits
    options = {**SMALL, "max_new_tokens": 40, "min_new_tokens": 40}
    for name in ("best-of-n", "saffron", "best-of-n-mrm"):
        method = parse_method(name, Models(models.policy, apart.mrm, apart.guard), **options)
        with pytest.raises(PromptTooLongError, match="response"):
            method.generate(["hello there"])
        assert apart.mrm.kv.num_nodes == apart.guard.kv.num_nodes == models.policy.kv.num_nodes == 0


# --- what a method is made from ---


def test_specs(models: Models) -> None:
    method = parse_method("best-of-n-mrm : n=8, temperature=0.5", models, max_new_tokens=9, width=4)
    assert isinstance(method, Decoder) and method.scorer is not None and method.scorer.model is models.mrm
    assert method.config == replace(METHODS["best-of-n"].config(), n=8, temperature=0.5, max_new_tokens=9)
    search = parse_method("saffron:width=3,top_p=0.5,lm_head_bias=false,ranking=released", models, width=4)
    assert isinstance(search, SaffronSearch)
    config = search.config
    assert (config.width, config.top_p, config.lm_head_bias, config.ranking) == (3, 0.5, False, "released")
    for name, kind in METHODS.items():
        assert kind.summary and kind.options().keys() == {f.name for f in fields(kind.config)}
        assert parse_config(name) == (kind, kind.config())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("best", "method: got 'best', expected one of greedy, sample, saffron"),
        ("", "method: got ''"),
        ("best-of-n:m=3", "best-of-n: got 'm=3', expected option=value with one of max_new_tokens"),
        ("best-of-n:n", "best-of-n: got 'n', expected option=value"),
        ("best-of-n:n=3,n=4", "best-of-n: got n twice"),
        ("best-of-n:n=3.5", "n: got '3.5', expected a whole number of at least 1"),
        ("best-of-n:n=0", "n: got 0"),
        ("sample:temperature=0", "temperature: got 0.0, expected a finite number above 0"),
        ("sample:temperature=nan", "temperature: got nan"),
        ("sample:top_p=1.1", "top_p: got 1.1"),
        ("sample:seed=-1", "seed: got -1"),
        ("greedy:max_new_tokens=0", "max_new_tokens: got 0"),
        ("beam:width=0", "width: got 0"),
        ("beam:children=0", "children: got 0"),
        ("beam:step_tokens=0", "step_tokens: got 0"),
        ("rebase:balance=0", "balance: got 0.0"),
        ("rebase:width=x", "width: got 'x'"),
        ("deal:lookahead=-1", "lookahead: got -1"),
        ("deal:policy_weight=-1", "policy_weight: got -1.0, expected a finite number of at least 0"),
        ("mcts:simulations=0", "simulations: got 0"),
        ("mcts:exploration=inf", "exploration: got inf"),
        ("mcts-mrm:children=0", "children: got 0"),
        ("mcts:seed=1", "mcts: got 'seed=1', expected option=value with one of max_new_tokens"),
        ("args:children=0", "children: got 0"),
        ("args:reward_weight=-1", "reward_weight: got -1.0"),
        ("args:choice_temperature=nan", "choice_temperature: got nan"),
        ("cards:alpha=1.5", "alpha: got 1.5, expected a number from 0 to 1"),
        ("cards:beta=0", "beta: got 0.0"),
        ("cards:reward_threshold=inf", "reward_threshold: got inf"),
        ("cards:attempts=0", "attempts: got 0"),
        ("cards:longest=3", "longest: got 3, expected at least shortest, 4"),
        ("saffron:lm_head_bias=maybe", "lm_head_bias: got 'maybe', expected True or False"),
    ],
)
def test_specs_that_are_not_allowed(spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(spec)
    assert str(caught.value).startswith(message)
