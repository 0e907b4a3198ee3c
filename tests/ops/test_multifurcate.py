"""One whole search step: the three ops it joins, and the rules of who inherits and which groups are all unseen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import LAYOUTS, i32, randn
from hypothesis import given
from hypothesis import strategies as st
from steps import check, step
from torch import Tensor

from saffron_kernels import multifurcate
from saffron_kernels.checks import compute_dtype

OP = "multifurcate"
FLOATS = [torch.float32, torch.float64]
pytestmark = pytest.mark.usefixtures("poisoned")

GROUPS = {
    "one_beam": ([0], 1, 1),
    "one_search": ([0, 0, 0, 0, 0], 1, 7),
    "forest": ([0, 0, 2, 2, 2, 3], 4, 3),
    "no_rows": ([], 2, 3),
    "nothing": ([], 0, 3),
    "rows_of_no_group": ([0, 0, 2, 3, 3, 3], 3, 3),
    "only_rows_of_no_group": ([2, 2], 2, 2),
    "no_groups": ([0, 0], 0, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("extras", ["plain", "released", "everything"])
@pytest.mark.parametrize("case", GROUPS)
def test_against_oracle(case, extras, layout, backend, device, dtype) -> None:
    groups, num_groups, width = GROUPS[case]
    vocab, rows = 29, len(groups)
    more: dict[str, Any] = {}
    if extras != "plain":
        unseen = torch.arange(vocab, device=device) % 3 == 0
        more = {"unseen": unseen, "bias": randn(9, vocab, dtype=dtype, device=device), "unseen_reward": -7.0}
    if extras == "everything":
        more["scores"] = randn(10, rows, dtype=compute_dtype(dtype), device=device)
        more["end_tokens"], more["banned"] = i32([5, 6, 28], device), i32([0, 7], device)
        # The last two belong to no group.
        more["finished_scores"] = randn(11, 5, dtype=compute_dtype(dtype), device=device)
        more["finished_scores"][3:] = torch.tensor([torch.inf, torch.nan])
        more["finished_groups"] = i32([max(0, num_groups - 1), 0, 0, num_groups, num_groups], device)
        if not num_groups:
            more["finished_scores"].fill_(torch.nan)
    arguments = step(groups, num_groups, width, vocab, dtype, device, **more)
    lay = LAYOUTS[layout]
    check({name: lay(x) if isinstance(x, Tensor) else x for name, x in arguments.items()})


def test_random(backend, examples, device, dtype) -> None:
    @examples
    @given(st.data(), st.lists(st.integers(0, 3), max_size=5), st.integers(1, 6), st.integers(0, 2**20))
    def run(data: st.DataObject, groups: list[int], width: int, seed: int) -> None:  # group 3 is none
        vocab, wide = 9, compute_dtype(dtype)
        few = st.lists(st.integers(0, vocab - 1), max_size=4)
        padded = st.lists(st.integers(-1, vocab - 1), min_size=4, max_size=4)

        def ids() -> Tensor:
            """For all rows, or for each."""
            if data.draw(st.booleans()):
                return i32(data.draw(few), device)
            lists = data.draw(st.lists(padded, min_size=len(groups), max_size=len(groups)))
            return torch.tensor(lists, dtype=torch.int32, device=device).reshape(len(groups), 4)

        top_p = st.sampled_from([0.1, 0.8, 0.99])
        more: dict[str, Any] = {"top_p": data.draw(top_p)}
        if data.draw(st.booleans()):
            each = data.draw(st.lists(top_p, min_size=len(groups), max_size=len(groups)))
            more["top_p"] = torch.tensor(each, dtype=data.draw(st.sampled_from(FLOATS)), device=device)
        if data.draw(st.booleans()):
            more["widths"] = i32(data.draw(st.lists(st.integers(1, width), min_size=3, max_size=3)), device)
        if data.draw(st.booleans()):
            seen = data.draw(few)
            more["unseen"] = torch.ones(vocab, dtype=torch.bool, device=device).index_fill(
                0, i32(seen, device).long(), False
            )
        if data.draw(st.booleans()):
            more["scores"] = randn(seed + 5, len(groups), dtype=wide, device=device).round(decimals=1)
        if data.draw(st.booleans()):
            more["end_tokens"] = ids()
        if data.draw(st.booleans()):
            more["banned"] = ids()
        if data.draw(st.booleans()):
            finished = data.draw(st.lists(st.integers(0, 3), max_size=4))
            more["finished_scores"] = randn(seed + 6, len(finished), dtype=wide, device=device)
            more["finished_scores"][i32(finished, device) == 3] = torch.inf
            more["finished_groups"] = i32(finished, device)
        check(step(sorted(groups), 3, width, vocab, dtype, device, seed, **more))

    run()


def test_all_unseen_group_keeps_the_order_of_the_policy(backend, device, dtype) -> None:
    logits = torch.tensor([[0, 5, 4, 3.0], [1, 2, 3, 4]], dtype=dtype, device=device)
    unseen = torch.ones(4, dtype=torch.bool, device=device)
    scores = torch.tensor([1.0, 1.0], device=device, dtype=compute_dtype(dtype))
    arguments = step([0, 0], 1, 3, 4, dtype, device, logits=logits, unseen=unseen, scores=scores, top_p=1.0)
    parent, token, reward, counts, all_unseen = check(arguments)
    assert parent.tolist() == [0, 0, 0] and token.tolist() == [1, 2, 3]
    assert reward.tolist() == [1, 1, 1] and counts.tolist() == [4, 4] and all_unseen.tolist() == [True]


def test_one_seen_candidate_gives_the_group_its_sight_back(backend, device, dtype) -> None:
    logits = torch.tensor([[3, 2, 1.0], [3, 2, 1]], dtype=dtype, device=device)
    unseen = torch.tensor([True, True, False], device=device)
    scores = torch.zeros(2, device=device, dtype=compute_dtype(dtype))
    one = step(
        [0, 1], 2, 2, 3, dtype, device, logits=logits, unseen=unseen, scores=scores, unseen_reward=-9.0, top_p=1.0
    )
    _, token, _, _, all_unseen = check(one)
    assert all_unseen.tolist() == [False, False] and token.tolist()[0] == 2
    # End tokens aside: as an end token the seen one counts for nothing.
    _, _, reward, _, all_unseen = check(one | {"end_tokens": i32([2], device)})
    assert all_unseen.tolist() == [True, True] and reward.tolist() == [0, 0, 0, 0]


def test_all_unseen_is_told_without_scores(backend, device, dtype) -> None:
    unseen = torch.ones(5, dtype=torch.bool, device=device)
    arguments = step([0, 1], 3, 2, 5, dtype, device, unseen=unseen, unseen_reward=-4.0)
    _, _, reward, _, all_unseen = check(arguments)
    assert all_unseen.tolist() == [True, True, False]  # the third group has no candidates at all
    assert set(reward.tolist()) <= {-4.0, -torch.inf}


def test_finished_nodes_compete(backend, device, dtype) -> None:
    """They stand after all rows, win where they score higher, and give way to equal candidates."""
    wide = compute_dtype(dtype)
    head = {"weight": torch.zeros(4, 6, dtype=dtype, device=device), "top_p": 1.0}
    finished = {
        "finished_scores": torch.tensor([0.0, 1.0, -1.0], device=device, dtype=wide),
        "finished_groups": i32([0, 1, 1], device),
    }
    parent, token, reward, _, _ = check(step([0, 1], 2, 3, 4, dtype, device, **head, **finished))
    assert parent.tolist() == [0, 0, 0, 1, 1, 3] and token.tolist()[-1] == -1 and reward.tolist() == [0, 0, 0, 0, 0, 1]


def test_only_finished_nodes(backend, device, dtype) -> None:
    finished = {"finished_scores": torch.tensor([2.0, 3.0], device=device), "finished_groups": i32([1, 0], device)}
    parent, token, reward, counts, all_unseen = check(step([], 2, 2, 4, dtype, device, **finished))
    assert parent.tolist() == [0, 1, 2, 2] and token.tolist() == [-1] * 4 and reward.tolist()[:2] == [2, 3]
    assert counts.numel() == 0 and all_unseen.tolist() == [False, False]


def test_rows_of_no_group_change_nothing(backend, device, dtype) -> None:
    """The same bits as without them, but for the numbers of what stands behind the rows."""
    scores = randn(4, 7, dtype=compute_dtype(dtype), device=device)
    finished = {
        "finished_scores": scores[:2] + 1,
        "finished_groups": i32([1, 0], device),
        "end_tokens": i32([3], device),
    }
    unseen = {"unseen": torch.arange(29, device=device) % 2 == 0, "unseen_reward": -7.0}
    padded = step([0, 0, 1, 2, 2, 2, 2], 2, 4, 29, dtype, device, scores=scores, **finished, **unseen)
    rows = {name: padded[name][:3] for name in ("logits", "hidden", "scores", "groups")}
    parent, *rest, sizes, all_unseen = check(padded)
    expected, *others, few_sizes, few_all_unseen = check(padded | rows)
    assert torch.equal(parent, torch.where(expected < 3, expected, expected + 4))
    assert sizes.tolist() == few_sizes.tolist() + [0] * 4 and torch.equal(all_unseen, few_all_unseen)
    assert all(torch.equal(x, y) for x, y in zip(rest, others, strict=True))


def test_head_with_more_rows_than_the_policy_has_tokens(backend, device, dtype) -> None:
    """Embedding matrices are padded."""
    weight = randn(3, 40, 6, dtype=dtype, device=device)
    weight[29:] = torch.nan
    check(step([0, 0], 1, 4, 29, dtype, device, weight=weight))


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_policy_and_reward_model_in_different_dtypes(hidden, backend, device) -> None:
    arguments = step([0, 0, 1], 2, 3, 29, torch.float32, device)
    check(arguments | {name: arguments[name].to(hidden) for name in ("hidden", "weight")})


def test_searching_together_or_alone(backend, device, dtype) -> None:
    together = step([0, 0, 1, 1, 1], 2, 3, 29, dtype, device)
    parent, token, reward, counts, _ = check(together)
    again = multifurcate(**together)
    assert torch.equal(again[0], parent) and torch.equal(again[1], token) and torch.equal(again[2], reward)
    for group, rows in ((0, slice(0, 2)), (1, slice(2, 5))):
        own = {name: together[name][rows] for name in ("logits", "hidden")}
        groups = torch.zeros(rows.stop - rows.start, dtype=torch.int32, device=device)
        alone = check(together | own | {"groups": groups, "num_groups": 1})
        mine = slice(3 * group, 3 * group + 3)
        assert torch.equal(alone[0] + rows.start, parent[mine]) and torch.equal(alone[1], token[mine])
        assert torch.equal(alone[3], counts[rows])


@pytest.mark.parametrize(
    "name, value",
    [
        ("logits", torch.tensor([[0, torch.nan, 0, 0, 0], [0.0, 0, 0, 0, 0]])),
        ("logits", torch.zeros(2, 7)),  # tokens that the head does not have
        ("hidden", torch.zeros(3, 6)),
        ("groups", i32([0, 2])),
        ("groups", i32([0])),
        ("banned", i32([5])),
        ("scores", torch.zeros(3)),
        ("finished_groups", i32([0])),
        ("finished_groups", i32([2])),
        ("finished_scores", torch.zeros(2)),
        ("rewards", torch.full((2, 6), torch.nan)),  # as `hidden`: what the head makes of it cannot be ranked
        ("top_p", torch.tensor([0.5, torch.nan])),
        ("top_p", torch.tensor([0.0, 0.5])),
        ("top_p", torch.tensor([0.5])),
        ("top_p", math.nan),
        ("unseen_reward", math.nan),
        ("banned", torch.tensor([[0, -1], [5, 0]], dtype=torch.int32)),
        ("banned", torch.tensor([[0, -1]], dtype=torch.int32)),
        ("end_tokens", torch.tensor([[0, -1]], dtype=torch.int32)),
        ("widths", i32([0])),
        ("widths", i32([3])),
        ("widths", i32([1, 1])),
    ],
)
def test_errors(name, value, backend, device) -> None:
    arguments = step([0, 0], 1, 2, 5, torch.float32, device)
    value = value.to(device) if isinstance(value, Tensor) else value
    if name == "finished_groups" and value.tolist() == [2]:
        arguments["finished_scores"] = torch.zeros(1, device=device)  # a group that does not exist
    with pytest.raises(ValueError, match=name if name != "finished_scores" else "finished"):
        multifurcate(**arguments | {"hidden" if name == "rewards" else name: value})


def test_infinite_rewards_are_ranked(backend, device, dtype) -> None:
    """Infinities are numbers: +inf first, -inf before empty places."""
    bias = torch.tensor([torch.inf, 0, -torch.inf, 1], dtype=dtype, device=device)
    head = {"weight": torch.zeros(4, 6, dtype=dtype, device=device), "bias": bias, "top_p": 1.0}
    parent, token, reward, _, _ = check(step([0], 1, 5, 4, dtype, device, **head))
    assert token.tolist() == [0, 3, 1, 2, -1] and parent.tolist() == [0, 0, 0, 0, 1]
    assert reward.tolist() == [torch.inf, 1, 0, -torch.inf, -torch.inf]
