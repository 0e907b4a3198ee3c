"""Engines over tiny models in fp64, and what they are compared with: each search alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
from searches import CONFIG, REQUESTS

from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import Engine, Handle, Request
from saffron.search.config import SearchConfig
from saffron.search.model_pair import ModelPair


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
    handle = engine.submit(request, config, eos_token_id=ends, max_width=8, trace=trace, on_step=schedule(widths))
    engine.run()
    return handle


def same(handle: Handle, other: Handle, tolerance: float) -> None:
    """Equal in all but the last bits of scores, and the time it took."""
    one, two = handle.result(), other.result()
    assert (
        one.token_ids == two.token_ids
        and one.finish_reason == two.finish_reason
        and one.cost == two.cost
        and one.steps == two.steps
    )
    assert [n.tokens() for n in handle.tree.beam] == [n.tokens() for n in other.tree.beam]
    assert [n.score for n in handle.tree.beam] == pytest.approx([n.score for n in other.tree.beam], abs=tolerance)
    assert (one.trace is None) == (two.trace is None)
    for step, expected in zip(one.trace or [], two.trace or [], strict=True):
        assert step["beam"] == [{**n, "score": pytest.approx(n["score"], abs=tolerance)} for n in expected["beam"]]
        for node, other_node in zip(step["expanded"], expected["expanded"], strict=True):
            assert [c["token"] for c in node["candidates"]] == [c["token"] for c in other_node["candidates"]]


def make(pair=PAIR, **limits: object) -> Engine:
    return Engine(ModelPair(*pair), CONFIG, **limits)  # type: ignore[arg-type]
