"""`PrefixScorer`: outputs, what stays cached, and costs, against a set of the prefixes that are held."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saffron.errors import PromptTooLongError
from saffron.models.policy import Policy
from saffron.search.prefix_scorer import PrefixScorer

Tokens = tuple[int, ...]
CONTEXTS: list[Tokens] = [(0, 3, 4), (0, 3, 4), (0, 3), (0, 7, 8, 9)]  # equal ones, and one that begins another
RESPONSES = st.lists(st.integers(3, 5), max_size=4).map(tuple)
READS = st.lists(st.lists(st.tuples(st.integers(0, 3), RESPONSES), min_size=1, max_size=5), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def policy() -> Iterator[Policy]:
    model = Policy(tiny.model(num_hidden_layers=1))
    yield model
    assert model.kv.num_nodes == 0


def prefixes(sequence: Tokens) -> set[Tokens]:
    return {sequence[: i + 1] for i in range(len(sequence))}


class Model:
    """One search alone, as sets of prefixes."""

    def __init__(self, policy: Policy, context: Tokens) -> None:
        self.flops_of, self.context = policy.flops, context
        self.held: set[Tokens] = set()
        self.flops = self.tokens = self.calls = 0

    def cached(self) -> set[Tokens]:
        return {prefix for response in self.held for prefix in prefixes(self.context + response)}

    def read(self, responses: list[Tokens], suffix: Tokens, head_rows: int) -> None:
        asked = {self.context + response + suffix for response in responses}
        wanted = asked | {self.context + response for response in responses}
        # What is new, and the ends of all that is named, whose output is made again.
        run = {prefix for sequence in wanted for prefix in prefixes(sequence)} - self.cached() | wanted
        self.tokens += len(run)
        self.calls += len(asked)
        self.flops += sum(self.flops_of.token(len(prefix) - 1) for prefix in run)
        self.flops += len(asked) * head_rows * self.flops_of.per_head_row
        self.held |= set(responses)


@settings(max_examples=40)
@given(reads=READS, suffix=st.sampled_from([(), (6, 7)]), keep=st.integers(0, 2))
def test_costs_and_cache_of_every_search(policy: Policy, reads: list, suffix: Tokens, keep: int) -> None:
    reading = PrefixScorer(policy, dict(enumerate(CONTEXTS)), head_rows=2)
    models = [Model(policy, context) for context in CONTEXTS]
    try:
        for asked in reads:
            owners, responses = [g for g, _ in asked], [r for _, r in asked]
            output = reading.read(owners, responses, suffix)
            rows, alone = policy.prefill([[*CONTEXTS[g], *r, *suffix] for g, r in asked])
            policy.release(rows)
            torch.testing.assert_close(output, alone, atol=1e-4, rtol=1e-4)
            for g, model in enumerate(models):
                mine = [r for owner, r in asked if owner == g]
                if mine:
                    model.read(mine, suffix, 2)
                tally = reading.tallies[g]
                assert (tally.tokens, tally.calls, tally.flops) == (model.tokens, model.calls, model.flops)
            assert policy.kv.num_nodes == len(set().union(*(model.cached() for model in models)))
            reading.retain(lambda g, response: len(response) > keep + g % 2)
            for g, model in enumerate(models):
                model.held = {r for r in model.held if len(r) > keep + g % 2}
            assert policy.kv.num_nodes == len(set().union(*(model.cached() for model in models)))
    finally:
        reading.close()
    assert policy.kv.num_nodes == 0


def test_what_does_not_fit_is_refused_and_nothing_is_held(policy: Policy) -> None:
    reading = PrefixScorer(policy, {0: (0, 3)}, head_rows=0)
    with pytest.raises(PromptTooLongError, match="response 1: 262 tokens"):
        reading.read([0, 0], [(3,), (3,) * 258], (4, 5))
    assert policy.kv.num_nodes == 0
    assert reading.tallies[0].tokens == 0


def test_prefixes_that_are_kept_cost_as_if_they_were_not() -> None:
    policy = Policy(tiny.model(num_hidden_layers=1), keep_prefixes=True)
    costs = []
    for _ in range(2):
        reading = PrefixScorer(policy, {0: (0, 3, 4)}, head_rows=1)
        reading.read([0], [(5, 6)])
        reading.close()
        costs.append(reading.tallies[0])
    assert costs[0] == costs[1] and costs[0].tokens == 5
    assert policy.kv.num_nodes == 5
