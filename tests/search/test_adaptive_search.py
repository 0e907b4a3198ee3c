"""Adaptive width on an engine: schedules, verdicts, the method by name. Searches are compared with the engine's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from saffron.adaptive import AdaptiveWidth, LoggedSearch, WidthSettings
from saffron.conservative import Confidence, Drift
from saffron.errors import ConfigError
from saffron.models.bundled import Models
from saffron.search import AdaptiveSearch, SaffronSearch, parse_method
from saffron.search.config import SearchConfig

CONFIG = SearchConfig(max_new_tokens=8, min_new_tokens=2)
SETTINGS = WidthSettings(
    floors=(0.5,), widths=(1, 3), phases=2, phase_tokens=4, wide=3, confidence=Confidence(scale=0.003), drift=Drift()
)
PROMPTS = ["hello there", "please tell me how to bake", "hello"]


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny.trio(3)


def make(models: Models, adaptive: AdaptiveWidth | None = None, **options: bool) -> AdaptiveSearch:
    return AdaptiveSearch(*models, adaptive or AdaptiveWidth(SETTINGS), CONFIG, **options)


def test_without_evidence_it_is_the_widest_search(models: Models) -> None:
    """And the verdicts are counted, each in the bin of its risk."""
    search = make(models)
    answers = search.answer(PROMPTS, "the quick")
    fixed = SaffronSearch(models.policy, models.mrm, replace(CONFIG, width=3)).generate(PROMPTS, "the quick")
    for (result, logged), expected in zip(answers, fixed, strict=True):
        assert result.token_ids == expected.token_ids
        searched, cost = expected.cost, result.cost
        assert cost.policy_flops == searched.policy_flops and cost.policy_tokens == searched.policy_tokens
        assert cost.reward_calls == searched.reward_calls + 2 and cost.reward_flops > searched.reward_flops
        assert (result.prompt, result.prefill) == (expected.prompt, "the quick")
        assert logged.scores[-1] == result.score and set(logged.widths) == {3}
        (judged,) = models.guard.score([(expected.prompt, expected.text)]).tolist()  # type: ignore[list-item]
        assert logged.safe == (judged >= 0)
    risks = models.guard.score([(p, "the quick") for p in PROMPTS]).tolist()
    assert [a.logged.risk for a in answers] == pytest.approx(risks, abs=1e-4)
    assert [s["requests"] for s in search.adaptive.status()] == [sum(r < 0 for r in risks), sum(r >= 0 for r in risks)]


def test_the_width_changes_between_phases(models: Models) -> None:
    """A plan that was learned from a log: 3 for four tokens and then 1. The search obeys from the fifth on."""
    adaptive = AdaptiveWidth(replace(SETTINGS, floors=(0.8,)))
    log = [
        LoggedSearch(risk, widths, (1.0, 1.0), widths[0] == 3)
        for risk in (-1.0, 1.0) for widths in ((1, 1), (1, 3), (3, 1), (3, 3)) for _ in range(2000)
    ]  # fmt: skip
    adaptive.warm_start(log)
    search = make(models, adaptive, learn=False)
    for result, logged in search.answer(PROMPTS):
        assert logged.widths == (3, 1)
        assert [min(step.live + step.finished, 3) for step in result.steps[1:4]] == [3, 3, 3]
        assert all(step.live <= 1 for step in result.steps[4:])
    assert [s["requests"] for s in adaptive.status()] == [0, 0]  # it does not learn


def test_on_an_engine_that_others_share(models: Models) -> None:
    search = make(models)
    with search.base.engine() as engine:
        other = engine.submit(search.base.request("hello there"), replace(CONFIG, width=2))
        control = search.begin(PROMPTS[1], "the quick")
        handle = search.submit(engine, control, PROMPTS[1], "the quick")
        result, logged = search.finish(control, handle, PROMPTS[1], "the quick", timeout=60)
        cancelled = search.submit(engine, search.begin("hello"), "hello")
        cancelled.cancel()
        assert other.result(60).text is not None
    (alone,) = make(models).answer([PROMPTS[1]], "the quick")
    assert result.token_ids == alone.result.token_ids and logged.widths == alone.logged.widths
    assert result.cost == alone.result.cost  # with what the guard read
    assert sum(s["requests"] for s in search.adaptive.status()) == 1
    with pytest.raises(ConfigError, match="finished before"):
        control.finish(True)


def test_a_log_of_fixed_widths_counts_nothing(models: Models) -> None:
    search = make(models)
    for width in SETTINGS.widths:
        fixed = SaffronSearch(models.policy, models.mrm, replace(CONFIG, width=width)).generate(PROMPTS)
        answers = search.log(PROMPTS, width=width)
        assert [a.result.token_ids for a in answers] == [r.token_ids for r in fixed]
        assert all(set(a.logged.widths) == {width} for a in answers)
    assert sum(s["requests"] for s in search.adaptive.status()) == 0
    with pytest.raises(ConfigError, match="width: got 2"):
        search.log(PROMPTS, width=2)


def test_by_name_it_plays_a_file(models: Models, tmp_path: Path) -> None:
    adaptive = AdaptiveWidth(replace(SETTINGS, floors=(0.3,)))
    log = [LoggedSearch(r, (w, w), (1.0, 1.0), w == 3) for r in (-1.0, 1.0) for w in (1, 3) for _ in range(2000)]
    adaptive.warm_start(log)  # mixes both widths
    adaptive.save(tmp_path / "state.npz")
    spec = f"adaptive:state={tmp_path / 'state.npz'},max_new_tokens=8,min_new_tokens=2"
    words = ("there", "bake", "you", "quick", "please", "tell", "how", "me", "the", "to", "a", "again")
    prompts = [f"hello {word}" for word in words]
    search = parse_method(spec, models)
    assert isinstance(search, AdaptiveSearch) and not search.learn
    first = search.answer(prompts)
    assert {one.logged.widths for one in first} == {(3, 3), (3, 1)}
    assert [one.result for one in first] == parse_method(spec, models).generate(prompts)
    for place in (0, 5):
        (alone,) = search.answer(prompts[place])
        assert alone.logged.widths == first[place].logged.widths  # draws belong to the request
        assert alone.result.token_ids == first[place].result.token_ids
    other = parse_method(f"{spec},seed=1", models)
    assert isinstance(other, AdaptiveSearch)
    assert [one.logged.widths for one in other.answer(prompts)] != [one.logged.widths for one in first]
