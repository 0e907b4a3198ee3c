"""The engine: searches that join and leave between steps answer as if each were alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import REQUESTS

from saffron.errors import (
    CancelledError,
)
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import Engine, Handle, Request
from saffron.search.config import SearchConfig
from saffron.search.eager_step import ModelPair


def doubles(seed: int = 0, **options: object) -> tuple[Policy, MultifurcationRewardModel]:
    """`tiny.pair` in fp64: what rounding does stays far below the distance between two rewards."""
    policy, mrm = tiny.pair(seed)
    assert mrm.bias is not None
    return Policy(policy.model.double(), **options), MultifurcationRewardModel(  # type: ignore[arg-type]
        mrm.model.double(),
        bias=mrm.bias,
        unseen=mrm.unseen,
        **options,  # type: ignore[arg-type]
    )


PAIR = doubles()
PROMPTS = [*REQUESTS, Request(tuple(range(2, 40)), tuple(range(3, 50))), Request(tuple(range(2, 30)), (5,))]


def schedule(widths: tuple[int, ...]) -> Callable[[Handle], None]:
    """Sets the width of the next step by what the search has done."""

    def on_step(handle: Handle) -> None:
        if widths:
            handle.width = widths[len(handle.tree.steps) % len(widths)]

    return on_step


def alone(request: Request, config: SearchConfig, ends: frozenset[int], widths: tuple[int, ...], trace: bool) -> Handle:
    engine = Engine(ModelPair(*PAIR), prefill_tokens=None)
    handle = engine.submit(request, config, end_tokens=ends, max_width=8, trace=trace, on_step=schedule(widths))
    engine.run()
    return handle


def same(handle: Handle, other: Handle, tolerance: float) -> None:
    """Equal in all but the last bits of scores, and the time it took."""
    one, two = handle.result(), other.result()
    assert one.tokens == two.tokens and one.stop == two.stop and one.cost == two.cost and one.steps == two.steps
    assert [n.tokens() for n in handle.tree.beam] == [n.tokens() for n in other.tree.beam]
    assert [n.score for n in handle.tree.beam] == pytest.approx([n.score for n in other.tree.beam], abs=tolerance)
    assert (one.trace is None) == (two.trace is None)
    for step, expected in zip(one.trace or [], two.trace or [], strict=True):
        assert step["beam"] == [{**n, "score": pytest.approx(n["score"], abs=tolerance)} for n in expected["beam"]]
        for node, other_node in zip(step["expanded"], expected["expanded"], strict=True):
            assert [c["token"] for c in node["candidates"]] == [c["token"] for c in other_node["candidates"]]


configs = st.builds(
    SearchConfig,
    width=st.integers(1, 6),
    top_p=st.sampled_from([0.3, 0.8, 0.95, 1.0]),
    max_new_tokens=st.integers(1, 9),
    min_new_tokens=st.integers(0, 6),
    ranking=st.sampled_from(["paper", "released"]),
    eos_score=st.sampled_from(["parent", "mrm"]),
    unseen_reward=st.sampled_from([-1024.0, 0.0]),
    lm_head_bias=st.booleans(),
)
searches = st.tuples(
    st.integers(0, 12),  # the step before which it joins
    st.integers(0, len(PROMPTS) - 1),
    configs,
    st.sampled_from([frozenset({1}), frozenset({1, 30}), frozenset(range(40, 90)), frozenset[int]()]),
    st.lists(st.integers(1, 8), max_size=3).map(tuple),
    st.none() | st.integers(0, 8),  # steps after which it is cancelled
    st.booleans(),
)


@given(
    st.lists(searches, min_size=1, max_size=6),
    st.sampled_from([None, 1, 7, 30]),
    st.none() | st.integers(1, 3),
    st.sampled_from([None, 450]),
)
@settings(max_examples=40, deadline=None)
def test_answers_as_if_alone(plan, prefill_tokens, max_searches, cache_tokens) -> None:
    """Whatever else joins, leaves or is cancelled, whatever the others want, and however prompts are cut."""
    policy, mrm = PAIR
    engine = Engine(
        ModelPair(*PAIR), prefill_tokens=prefill_tokens, max_searches=max_searches, cache_tokens=cache_tokens
    )
    handles: dict[int, Handle] = {}
    step = 0
    while len(handles) < len(plan) or engine.busy:
        for i, (joins, prompt, config, ends, widths, _, trace) in enumerate(plan):
            if joins == step:
                handles[i] = engine.submit(
                    PROMPTS[prompt], config, end_tokens=ends, max_width=8, trace=trace, on_step=schedule(widths)
                )
        for i, (joins, _, _, _, _, cancelled, _) in enumerate(plan):
            if cancelled is not None and joins + cancelled == step and not handles[i].done:
                handles[i].cancel()
                assert handles[i].done and isinstance(handles[i].error, CancelledError)
        engine.step()
        assert policy.kv.num_nodes <= policy.kv.reserved and mrm.kv.num_nodes <= mrm.kv.reserved
        assert cache_tokens is None or max(policy.kv.reserved, mrm.kv.reserved) <= cache_tokens
        step += 1
    assert policy.kv.num_nodes == mrm.kv.num_nodes == policy.kv.reserved == mrm.kv.reserved == 0
    for i, (_, prompt, config, ends, widths, cancelled, trace) in enumerate(plan):
        handle = handles[i]
        if handle.error is None:
            same(handle, alone(PROMPTS[prompt], config, ends, widths, trace), 1e-9)
        else:
            assert cancelled is not None
            with pytest.raises(CancelledError):
                handle.result()
