"""Random joins, leaves, cancellations and parameters: every search answers as if it were alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engines import PAIR, PROMPTS, alone, same, schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import CONFIG

from saffron.errors import (
    CancelledError,
)
from saffron.search import Engine, Handle
from saffron.search.captured_step import CapturedStep
from saffron.search.config import SearchConfig
from saffron.search.model_pair import ModelPair

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
                    PROMPTS[prompt], config, eos_token_id=ends, max_width=8, trace=trace, on_step=schedule(widths)
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


captured_searches = st.tuples(
    st.integers(0, 20),
    st.integers(0, len(PROMPTS) - 1),
    st.integers(1, 5),
    st.sampled_from([0.5, 0.8, 1.0]),
    st.integers(1, 20),
    st.integers(0, 12),
    st.sampled_from([frozenset({1}), frozenset(range(40, 47)), frozenset[int]()]),
    st.none() | st.integers(0, 20),
)


@given(st.lists(captured_searches, min_size=1, max_size=6), st.sampled_from([None, 5]), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_captured_steps_answer_as_if_alone(plan, prefill_tokens, groups) -> None:
    """Joining and leaving lays the buffers out again; every search has its own parameters on the device."""
    policy, mrm = PAIR
    step = CapturedStep(ModelPair(*PAIR), replace(CONFIG, width=5), groups, capture=None)
    engine = Engine(ModelPair(*PAIR), CONFIG, prefill_tokens=prefill_tokens, step=step)
    handles: dict[int, Handle] = {}
    configs = [
        SearchConfig(width=width, top_p=top_p, max_new_tokens=most, min_new_tokens=least)
        for _, _, width, top_p, most, least, _, _ in plan
    ]
    now = 0
    while len(handles) < len(plan) or engine.busy:
        for i, (joins, prompt, *_, ends, _) in enumerate(plan):
            if joins == now:
                handles[i] = engine.submit(PROMPTS[prompt], configs[i], eos_token_id=ends)
        for i, (joins, *_, cancelled) in enumerate(plan):
            if cancelled is not None and joins + cancelled == now and not handles[i].done:
                handles[i].cancel()
        engine.step()
        now += 1
    assert policy.kv.num_nodes == mrm.kv.num_nodes == policy.kv.reserved == mrm.kv.reserved == 0
    for i, (_, prompt, *_, ends, cancelled) in enumerate(plan):
        if handles[i].error is None:
            same(handles[i], alone(PROMPTS[prompt], configs[i], ends, (), False), 1e-5)  # fp32 on the device
        else:
            assert cancelled is not None and isinstance(handles[i].error, CancelledError)
