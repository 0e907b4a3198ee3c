"""The rewards of the candidates, held against fp64."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from cases import LAYOUTS, Candidates, candidates, i32, randn
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_good_as_torch
from torch import Tensor

from saffron_kernels import multifurcation_head
from saffron_kernels.checks import compute_dtype

OP = "multifurcation_head"
BAD = [torch.nan, -torch.nan, torch.inf, -torch.inf]
pytestmark = pytest.mark.usefixtures("poisoned")

COUNTS = {"one": [1], "odd": [3, 0, 7, 1, 5], "none": [0, 0], "no_rows": [], "many": [17] * 33, "lone_last": [0, 0, 2]}


def inputs(
    counts: list[int], vocab: int, hidden: int, dtype, device, seed: int = 1
) -> tuple[Candidates, Tensor, Tensor]:
    found = candidates(seed, counts, vocab, device)
    h = randn(seed + 1, len(counts), hidden, dtype=dtype, device=device)
    w = randn(seed + 2, vocab, hidden, dtype=dtype, device=device)
    named = found.tokens.unique().long()
    unnamed = torch.ones(vocab, dtype=torch.bool, device=device).index_fill(0, named, False)
    w[unnamed] = torch.nan  # only the rows that candidates name may be read
    return found, h, w


def check(
    hidden: Tensor, weight: Tensor, bias, unseen, unseen_reward: float, tokens: Tensor, offsets: Tensor
) -> Tensor:
    rewards = multifurcation_head(hidden, weight, bias, unseen, unseen_reward, tokens, offsets)
    wide = compute_dtype(hidden.dtype)
    assert rewards.dtype == wide and rewards.shape == tokens.shape
    exact = oracle.multifurcation_head(hidden, weight, bias, unseen, unseen_reward, tokens, offsets)
    rows = torch.tensor(oracle.rows_of(offsets), dtype=torch.long, device=hidden.device)
    h, w = hidden.to(wide)[rows], weight.to(wide)[tokens.long()]
    own = torch.bmm(h[:, None], w[:, :, None]).flatten()
    size = (h.abs() * w.abs()).sum(1)
    if bias is not None:
        own, size = own + bias[tokens].to(wide), size + bias[tokens].abs()
    if unseen is not None:
        own = torch.where(unseen[tokens], unseen_reward, own)
    assert_as_good_as_torch("rewards", rewards, exact, own, max([0.0, *size.tolist()]))
    return rewards


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("extras", ["plain", "bias", "unseen", "both"])
@pytest.mark.parametrize("counts", COUNTS)
def test_against_oracle(counts, extras, layout, backend, device, dtype) -> None:
    found, h, w = inputs(COUNTS[counts], 61, 19, dtype, device)
    bias = randn(4, 61, dtype=dtype, device=device) if extras in ("bias", "both") else None
    unseen = randn(5, 61, device=device) > 0.3 if extras in ("unseen", "both") else None
    tensors = (x if x is None else LAYOUTS[layout](x) for x in (h, w, bias, unseen))
    check(*tensors, -3.5, LAYOUTS[layout](found.tokens), LAYOUTS[layout](found.offsets))


@pytest.mark.parametrize("hidden", [1, 64, 100, 2048])
def test_hidden_sizes(hidden, backend, device, dtype) -> None:
    found, h, w = inputs([4, 0, 6], 23, hidden, dtype, device)
    check(h, w, None, None, 0.0, found.tokens, found.offsets)


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_in_another_dtype(other, backend, device, dtype) -> None:
    found, h, w = inputs([4, 5], 23, 8, dtype, device)
    check(h, w, randn(6, 23, dtype=other, device=device), None, 0.0, found.tokens, found.offsets)


@pytest.mark.parametrize("unseen_reward", [-torch.inf, 0.0, 1.5])
def test_unseen_reward(unseen_reward, backend, device, dtype) -> None:
    """What the reward model says of an unseen token does not matter, not even NaN."""
    found, h, w = inputs([4, 5], 23, 8, dtype, device)
    unseen = torch.zeros(23, dtype=torch.bool, device=device)
    unseen[found.tokens[::2].long()] = True
    expected = check(h, w, None, unseen, unseen_reward, found.tokens, found.offsets)
    w[unseen] = torch.nan
    rewards = multifurcation_head(h, w, None, unseen, unseen_reward, found.tokens, found.offsets)
    assert torch.equal(rewards, expected)


def test_random(backend, examples, device, dtype) -> None:
    @examples
    @given(
        st.lists(st.integers(0, 9), max_size=6),
        st.integers(1, 12),
        st.integers(0, 2**20),
        st.sampled_from(sorted(LAYOUTS)),
    )
    def run(counts: list[int], hidden: int, seed: int, layout: str) -> None:
        found, h, w = inputs(counts, 9, hidden, dtype, device, seed)
        lay = LAYOUTS[layout]
        check(lay(h), lay(w), None, None, 0.0, found.tokens, found.offsets)

    run()


def test_nan_in_nan_out(backend, examples, device, dtype) -> None:
    """Whichever lane of hidden, weight or bias holds it: those candidates, and no others."""

    @examples
    @given(st.data(), st.sampled_from(["hidden", "weight", "bias"]), st.integers(1, 75), st.sampled_from(BAD))
    def run(data: st.DataObject, name: str, size: int, bad: float) -> None:
        found, h, w = inputs([3, 0, 6, 2], 9, size, dtype, device)
        given = {"hidden": h, "weight": w.nan_to_num(), "bias": randn(4, 9, dtype=dtype, device=device)}
        unseen = torch.arange(9, device=device) % 4 == 1
        rest = unseen, -2.0, found.tokens, found.offsets
        expected = multifurcation_head(*given.values(), *rest)
        place = tuple(data.draw(st.integers(0, n - 1)) for n in given[name].shape)
        given[name][place] = bad
        rewards = multifurcation_head(*given.values(), *rest)
        tokens, rows = found.tokens.tolist(), oracle.rows_of(found.offsets)
        of_it = [(r if name == "hidden" else t) == place[0] and t % 4 != 1 for r, t in zip(rows, tokens, strict=True)]
        touched = torch.tensor(of_it, dtype=torch.bool, device=device)
        if bad == bad:  # infinite: an infinity, or NaN where the other factor is 0
            assert not bool(rewards[touched].isfinite().any())
        else:
            assert bool(rewards[touched].isnan().all())
        assert torch.equal(rewards[~touched], expected[~touched])

    run()


def test_unseen_reward_is_a_number(backend, device) -> None:
    found, h, w = inputs([2], 9, 4, torch.float32, device)
    with pytest.raises(ValueError, match="unseen_reward"):
        multifurcation_head(h, w, None, None, math.nan, found.tokens, found.offsets)


def test_same_input_same_bits(backend, device, dtype) -> None:
    found, h, w = inputs(COUNTS["many"], 61, 40, dtype, device)
    first, *others = (multifurcation_head(h, w, None, None, 0.0, found.tokens, found.offsets) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_permuting_rows_permutes_rewards(backend, device, dtype) -> None:
    counts = [3, 2, 6, 1]
    found, h, w = inputs(counts, 31, 24, dtype, device)
    rewards = check(h, w, None, None, 0.0, found.tokens, found.offsets)
    order = [2, 0, 3, 1]
    bounds = found.offsets.tolist()
    moved = [c for row in order for c in range(bounds[row], bounds[row + 1])]
    offsets = i32([0, 6, 9, 10, 12], device)
    other = multifurcation_head(h[order], w, None, None, 0.0, found.tokens[moved], offsets)
    # A matrix product may add up in another order in another place.
    assert torch.allclose(other, rewards[moved], rtol=0, atol=64 * torch.finfo(rewards.dtype).eps)


@pytest.mark.parametrize("bad", [-1, 9, 2**31 - 1])
def test_token_outside_the_vocabulary(bad, backend, device, dtype) -> None:
    h, w = randn(7, 1, 4, dtype=dtype, device=device), randn(8, 9, 4, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="tokens"):
        multifurcation_head(h, w, None, None, 0.0, i32([0, bad], device), i32([0, 2], device))
