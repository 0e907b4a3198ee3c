"""Every method against one written from its paper (`dense_methods`), and what must hold for some of them."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from dense_methods import END, REFERENCES, Dense, Tokens, dense_copy
from hypothesis import given
from hypothesis import strategies as st

from saffron.models.bundled import Models
from saffron.models.policy import Policy
from saffron.search import MCTS, METHODS, BeamConfig, BeamSearch, Decoder, Request, mcts, parse_method
from saffron.search.rebase import allocate
from saffron.search.result import SearchResult, Tally
from saffron.search.rewards import ProcessReward, RewardScorer

PROMPTS, PREFILLS = ["hello there", "please tell me how to bake"], ["the quick", ""]
SPECS = [
    "sample", "sample:temperature=2,top_p=1", "best-of-n:n=5", "best-of-n-mrm:n=5,temperature=1.5",
    "beam:width=2,children=3", "beam:width=3,children=2,step_tokens=3", "beam-mrm:width=2,children=4",
    "rebase:width=5,step_tokens=2", "rebase:width=4,step_tokens=3,balance=0.1", "rebase-mrm:width=4,step_tokens=1",
    "deal:children=3,lookahead=2", "deal:children=4,width=2,lookahead=0", "deal:children=3,width=2,policy_weight=0.5",
    "deal-mrm:children=3,lookahead=1", "mcts:simulations=6,children=3,lookahead=2",
    "mcts:simulations=12,children=2,lookahead=0,exploration=0.1", "mcts-mrm:simulations=8,children=4,lookahead=1",
    "args:children=4", "args:children=6,reward_weight=0.2,top_p=1", "args:children=5,choice_temperature=2",
    "args-mrm:children=4,choice_temperature=0.5", "cards:reward_threshold=0,attempts=3,entropy_threshold=0",
    "cards:reward_threshold=2,attempts=4,shortest=2,entropy_threshold=4.5,beta=2,alpha=0.2,top_p=1",
    "cards:reward_threshold=-1,longest=2,shortest=1", "cards-mrm:reward_threshold=1,attempts=5,shortest=1,longest=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def trio() -> Models:
    models = tiny.trio(5)
    with torch.no_grad():  # responses that end are to be met as well
        models.policy.model.get_output_embeddings().weight[END] *= 3
    return models


@pytest.fixture
def models(trio: Models) -> Iterator[Models]:
    yield trio
    assert [model.kv.num_nodes for model in trio] == [0, 0, 0]


@pytest.mark.parametrize("spec", SPECS)
def test_equals_the_method_as_the_paper_has_it(models: Models, spec: str) -> None:
    reference = REFERENCES[spec.partition(":")[0].removesuffix("-mrm")]
    for seed in (0,) if spec.startswith(("deal", "mcts")) else (0, 1):  # nothing is drawn there
        method = parse_method(spec, models, max_new_tokens=7, min_new_tokens=2, seed=seed)
        assert isinstance(method, Decoder)
        results = method.generate(PROMPTS, PREFILLS)
        for prompt, prefill, result in zip(PROMPTS, PREFILLS, results, strict=True):
            tokens, score = reference(Dense(models, method, prompt, prefill))
            assert tuple(result.token_ids) == tokens
            assert result.score == pytest.approx(score, abs=1e-3)


def test_every_method_has_a_reference() -> None:
    named = {name.removesuffix("-mrm") for name in METHODS} - {
        "greedy",
        "saffron",
        "adaptive",
    }  # whose own tests compare them
    assert named == REFERENCES.keys()


# --- invariants ---


def test_one_sample_is_sampling_and_more_contain_fewer(models: Models) -> None:
    options = {"max_new_tokens": 8, "min_new_tokens": 2, "top_p": 1.0}
    (sampled,) = parse_method("sample", models, **options).generate(["hello there"])
    scores = []
    for n in (1, 2, 4, 8):
        (result,) = parse_method(f"best-of-n:n={n}", models, **options).generate(["hello there"])
        scores.append(result.score)
        if n == 1:
            assert result.token_ids == sampled.token_ids
    assert all(less <= more + 1e-5 for less, more in itertools.pairwise(scores))


def test_draws_follow_the_policy(models: Models) -> None:
    """First tokens of many samples against the nucleus: total variation within what chance allows."""
    method = parse_method("best-of-n:n=4000", models, max_new_tokens=1, min_new_tokens=0)
    assert isinstance(method, Decoder)
    dense = Dense(models, method, "hello there", "")
    tokens, probabilities = dense.nucleus(())
    counted = Counter(dense.draw((), np.random.default_rng([*dense.seed, i]).random())[0] for i in range(4000))
    assert set(counted) <= set(tokens)
    apart = (
        sum(abs(counted[t] / 4000 - p / probabilities.sum()) for t, p in zip(tokens, probabilities, strict=True)) / 2
    )
    assert apart < 2 * math.sqrt(len(tokens) / 4000)
    (result,) = method.generate(["hello there"])
    assert result.token_ids[0] in counted


class ByLogProbability(RewardScorer):
    """A reward that is the log-probability of the response under the policy: beam search then finds the likeliest."""

    def __init__(self, policy: Policy) -> None:
        self.model = policy  # type: ignore[assignment]

    longest_suffix = 0

    def open(self, contexts: Sequence[Tokens], eos_token_id: frozenset[int]) -> Any:
        return self

    tallies = (Tally(),)

    def score(self, owners: Sequence[int], responses: Sequence[Tokens]) -> list[float]:
        return [self.log_probability(response) for response in responses]

    def log_probability(self, response: Tokens) -> float:
        with torch.no_grad():
            scores = dense_copy(self.model)(torch.tensor([[0, 3, *response]])).logits[0].log_softmax(-1)
        return sum(float(scores[1 + i, token]) for i, token in enumerate(response))

    def retain(self, wanted: Any) -> None: ...

    def close(self) -> None: ...


def test_beam_search_over_all_children_finds_the_likeliest_response() -> None:
    policy = Policy(tiny.model(vocab_size=6))
    policy.model.generation_config.eos_token_id = 5
    config = BeamConfig(width=6**3, children=6, max_new_tokens=3, min_new_tokens=3, top_p=1.0)
    method = BeamSearch.__new__(BeamSearch)
    Decoder.__init__(method, policy, ByLogProbability(policy), config)
    (result,) = method.search([Request((0, 3), (0,))])
    everything = {r: ByLogProbability(policy).log_probability(r) for r in itertools.product(range(5), repeat=3)}
    likeliest = max(everything, key=everything.__getitem__)
    assert tuple(result.token_ids) == likeliest
    assert result.score == pytest.approx(everything[likeliest], abs=1e-3)
    assert result.cost.policy_calls == 1 + 5 + 25


def test_without_lookahead_deal_is_greedy_by_reward(models: Models) -> None:
    method = parse_method("deal:lookahead=0,children=4", models, max_new_tokens=6, min_new_tokens=6)
    assert isinstance(method, Decoder)
    (result,) = method.generate(["hello there"])
    dense, response = Dense(models, method, "hello there", ""), ()
    while len(response) < 6:
        response = max(((*response, t) for t in dense.nucleus(response)[0][:4]), key=dense.reward)
    assert tuple(result.token_ids) == response


def test_args_is_deal_without_lookahead(models: Models) -> None:
    """Of one response the log-probability of the path and that of its last token order the children alike."""
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    for weight in (0.5, 2.0):
        answers = [
            parse_method(spec, models, **options).generate(["hello there"])[0].token_ids
            for spec in (f"args:children=4,reward_weight={weight}",
                         f"deal:children=4,lookahead=0,policy_weight={1 / weight}")
        ]  # fmt: skip
        assert answers[0] == answers[1]
    (unguided,) = parse_method("args:reward_weight=0", models, **options).generate(["hello there"])
    (greedy,) = parse_method("greedy", models, **options).generate(["hello there"])
    assert unguided.token_ids == greedy.token_ids


def test_cards_accepts_what_is_above_its_threshold_and_else_the_best_attempt(models: Models) -> None:
    def answer(spec: str) -> SearchResult:
        method = parse_method(f"cards:{spec}", models, max_new_tokens=6, min_new_tokens=6)
        return method.generate(["hello there"])[0]

    assert answer("reward_threshold=-1e6,longest=3,shortest=3").cost.reward_calls == 1 + 2  # the prompt, two segments
    first, best = (answer(f"reward_threshold={threshold},shortest=6,attempts=7") for threshold in (-1e6, 1e6))
    assert 1 + 1 < best.cost.reward_calls <= 1 + 7  # equal segments are scored once
    assert best.score >= first.score  # the first of the seven is that one
    assert answer("reward_threshold=1e6,shortest=6,attempts=1").token_ids == first.token_ids


def test_visits_of_a_monte_carlo_tree_add_up(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    roots: list[mcts.TreeNode] = []
    plain = mcts.chosen

    def check(node: mcts.TreeNode, own: int) -> None:
        assert 0 <= node.mean <= 1
        if node.children:
            assert node.visits == own + sum(child.visits for child in node.children)
            for child in node.children:
                assert child.response[:-1] == node.response
                check(child, 1)

    def record(root: mcts.TreeNode) -> mcts.TreeNode:
        roots.append(root)
        check(root, own=1 if root.response and root.visits else 0)
        assert root.visits >= 9 or len(root.children or []) == 1
        picked = plain(root)
        assert picked.visits == max(child.visits for child in root.children or [])
        return picked

    monkeypatch.setattr(mcts, "chosen", record)
    method = parse_method("mcts:simulations=9,children=3", models, max_new_tokens=6, min_new_tokens=6)
    assert isinstance(method, MCTS)
    method.generate(["hello there"])
    assert len(roots) == 6 and max(root.visits for root in roots) == 9


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=12), st.integers(1, 64), st.sampled_from([0.1, 1.0, 10.0]))
def test_rebase_shares_out_its_width(rewards: list[int], budget: int, balance: float) -> None:
    shares = allocate(rewards, budget, balance)
    assert sum(shares) == budget and min(shares) >= 0
    weights = [math.exp((r - max(rewards)) / balance) for r in rewards]
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - budget * weight / sum(weights)) < 1 + 1e-6
    for (a, share), (b, other) in itertools.combinations(zip(rewards, shares, strict=True), 2):
        assert a == b or (share >= other) == (a > b) or share == other
    assert allocate([], 3, 1.0) == []


def test_a_prm_call_runs_new_tokens_and_the_suffix_alone(models: Models) -> None:
    guard, prompt = models.guard, "hello there"
    context = guard.context_tokens(prompt)
    reward = ProcessReward(models.policy, guard, [tuple(context)], frozenset({END}))
    suffix = len(guard.suffix_tokens())
    try:
        (first,) = reward.score([0], [(7, 8, 9)])
        assert (reward.tallies[0].tokens, reward.tallies[0].calls) == (len(context) + 3 + suffix, 1)
        a, b, ended, again = reward.score([0] * 4, [(7, 8, 9, 10), (7, 8, 11), (7, 8, 9, 10, END), (7, 8, 9)])
        assert (reward.tallies[0].tokens, reward.tallies[0].calls) == (len(context) + 5 + 3 * suffix, 3)
        assert a == ended and again == first
        expected = guard.score([(prompt, r) for r in ((7, 8, 9), (7, 8, 9, 10), (7, 8, 11))]).tolist()
        assert [first, a, b] == pytest.approx(expected, abs=1e-4)
        reward.retain(lambda search, response: response == (7, 8, 11))
        assert guard.kv.num_nodes == len(context) + 3
    finally:
        reward.close()
