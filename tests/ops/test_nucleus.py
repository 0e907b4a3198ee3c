"""The exact top-p set of every row, in its total order."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import oracle
import pytest
import torch
from cases import LAYOUTS, i32, randn
from hypothesis import given
from tolerance import assert_as_good_as_torch
from torch import Tensor

from saffron_kernels import nucleus
from saffron_kernels.checks import compute_dtype

OP = "nucleus"
pytestmark = pytest.mark.usefixtures("poisoned")


def check(logits: Tensor, top_p: float | Tensor, banned: Tensor | None = None) -> list[list[int]]:
    """Tokens of each row. Where the mass before a token is `top_p` but for rounding, it may be in or out."""
    tokens, probability, offsets = nucleus(logits, top_p, banned)
    computed = compute_dtype(logits.dtype)
    assert tokens.dtype == offsets.dtype == torch.int32 and probability.dtype == computed
    assert offsets.shape == (logits.shape[0] + 1,) and tokens.shape == probability.shape
    bounds = offsets.tolist()
    assert bounds[0] == 0 and bounds[-1] == tokens.numel()
    rounding = 1e-12 if computed == torch.float64 else 4e-6
    smallest = torch.finfo(computed).tiny

    found, exact = [], []
    limits = top_p.tolist() if isinstance(top_p, Tensor) else [top_p] * logits.shape[0]
    for row, (expected, limit) in enumerate(zip(oracle.nucleus(logits, banned), limits, strict=True)):
        kept = tokens[bounds[row] : bounds[row + 1]].tolist()
        surely = sum(before < limit - rounding and p >= smallest for _, p, before in expected)
        perhaps = sum(before < limit + rounding for _, _, before in expected)
        assert kept == [t for t, _, _ in expected[: len(kept)]], "not the most probable tokens, in their order"
        assert max(1, surely) <= len(kept) <= perhaps
        found.append(kept)
        exact += [p for _, p, _ in expected[: len(kept)]]

    assert bool((probability > 0).all())
    own = torch.cat(own_probabilities(logits, banned, found)).cpu().double()
    check_probabilities(probability, torch.tensor(exact, dtype=torch.float64), own)
    return found


def check_probabilities(actual: Tensor, exact: Tensor, own: Tensor) -> None:
    """Relative errors, where the dtype has all its digits. exp(x) costs as many units as x is large."""
    full = exact >= 1e4 * torch.finfo(actual.dtype).tiny
    ratio = (actual.cpu().double() / exact).to(actual.dtype)
    steps = max(1.0, -math.log(min([1.0, *exact[full].tolist()])))
    assert_as_good_as_torch("probabilities", ratio[full], torch.ones_like(exact)[full], (own / exact)[full], steps)


def own_probabilities(logits: Tensor, banned: Tensor | None, found: list[list[int]]) -> list[Tensor]:
    x = logits.to(compute_dtype(logits.dtype))
    for row, tokens in enumerate(oracle.ids_of_rows(banned, len(x))):
        x = x.index_put((i32([row], x.device), i32(tokens, x.device)), x.new_tensor(-torch.inf))
    return [p[kept] for p, kept in zip(x.softmax(1), found, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows, vocab", [(1, 1), (3, 7), (5, 130), (1, 1025), (33, 64)])
@pytest.mark.parametrize("top_p", [0.05, 0.8, 1.0])
def test_against_oracle(top_p, rows, vocab, layout, backend, device, dtype) -> None:
    logits = 3 * randn(1, rows, vocab, dtype=dtype, device=device)
    check(LAYOUTS[layout](logits), top_p)


@pytest.mark.parametrize("temperature", [1e-3, 0.05, 5.0, 40.0])
def test_flat_and_peaked_rows(temperature, backend, device, dtype) -> None:
    check((temperature * randn(2, 6, 333, dtype=torch.float64)).to(dtype).to(device), 0.9)


@pytest.mark.parametrize("vocab", [4096, 50_257])
def test_real_vocabularies(vocab, backend, limit, device, dtype) -> None:
    if 2 * vocab > limit:
        pytest.skip("too large for this backend here")
    logits = 4 * randn(3, 2, vocab, dtype=dtype, device=device)
    logits[1] = logits[1].round()  # a great many equal logits
    check(logits, 0.8, i32([int(logits[0].argmax()), 0, vocab - 1], device))


@pytest.mark.parametrize("top_p", [0.3, 0.8, 0.99])
@pytest.mark.parametrize("sampled, others", [(0.0, -3.0), (0.0, -30.0), (-3.0, 0.0), (-30.0, 0.0)])
def test_rows_of_which_a_sample_tells_wrong(sampled, others, top_p, backend, limit, device, dtype) -> None:
    """The CPU backend samples flat rows to guess a threshold: here tokens that it looks at differ from all others."""
    if limit < 8 * 4096:
        pytest.skip("too large for this backend here")
    logits = torch.full((1, 4096), others, dtype=torch.float64)
    token = torch.arange(4096)
    logits[:, token % 16 == token // 256 % 16] = sampled
    logits += 0.01 * randn(5, 1, 4096, dtype=torch.float64)
    check(logits.to(dtype).to(device), top_p)


@pytest.mark.parametrize("vocab", [1, 2, 8, 256])
@pytest.mark.parametrize("kept", [0.25, 0.5, 1.0])
def test_equal_logits_are_cut_exactly(kept, vocab, backend, device, dtype) -> None:
    """All probabilities are the same power of two: no rounding, so the set is exact, by ascending token id."""
    logits = torch.full((2, vocab), 1.5, dtype=dtype, device=device)
    tokens, probability, offsets = nucleus(logits, kept)
    count = max(1, int(kept * vocab))
    assert tokens.tolist() == 2 * list(range(count)) and offsets.tolist() == [0, count, 2 * count]
    assert bool((probability == 1 / vocab).all())


def test_just_above_the_cut_takes_one_more(backend, device, dtype) -> None:
    logits = torch.zeros(1, 8, dtype=dtype, device=device)
    assert nucleus(logits, math.nextafter(0.5, 1))[0].tolist() == [0, 1, 2, 3, 4]
    assert nucleus(logits, math.nextafter(0.5, 0))[0].tolist() == [0, 1, 2, 3]
    assert nucleus(logits, 5e-324)[0].tolist() == [0]


def test_ties_across_the_cut(backend, device, dtype) -> None:
    logits = torch.tensor([[0, 1, 0, 1, 0, 1, 1, 0.0]], dtype=dtype, device=device)
    assert check(logits, 0.5) == [[1, 3, 5]]
    assert check(logits, 0.75) == [[1, 3, 5, 6, 0]]


def test_logits_that_differ_in_the_last_bit(backend, device, dtype) -> None:
    """Their probabilities may round to one number: the logits still decide, and only then the token id."""
    one = torch.tensor(0.001953125, dtype=dtype)
    above = torch.nextafter(one, torch.tensor(1, dtype=dtype))
    logits = torch.stack([one, above, one, above, one])[None].to(device)
    assert nucleus(logits, 1.0)[0].tolist()[:4] == [1, 3, 0, 2]


def test_signed_zeros_are_equal(backend, device, dtype) -> None:
    assert nucleus(torch.tensor([[-0.0, 0.0, -0.0, 0.0]], dtype=dtype, device=device), 0.75)[0].tolist() == [0, 1, 2]


def test_tokens_without_probability_are_never_in(backend, device, dtype) -> None:
    inf = torch.inf
    logits = torch.tensor([[-inf, 2, -inf, 1, -2e4], [-inf, -inf, -inf, -inf, -60000]], dtype=dtype, device=device)
    tokens, probability, offsets = nucleus(logits, 1.0)
    assert tokens.tolist() == [1, 3, 4] and offsets.tolist() == [0, 2, 3] and probability[2] == 1


@pytest.mark.parametrize("banned", [[], [1], [1, 1, 3], [0, 2, 3, 4]])
def test_banned(banned, backend, device, dtype) -> None:
    logits = torch.tensor([[0, 9, 1, 2, 0.5]], dtype=dtype, device=device)
    (kept,) = check(logits, 1.0, i32(banned, device))
    assert not set(kept) & set(banned)
    check(logits, 0.3, LAYOUTS["gaps"](i32(banned, device)))


@pytest.mark.parametrize("few", [1, 3])
def test_numbers_at_the_ends_of_the_range(few, backend, device, dtype) -> None:
    """The lowest finite number is what masks are often made of; a row of nothing else is a row of equal logits."""
    lowest, highest = torch.finfo(dtype).min, torch.finfo(dtype).max
    logits = torch.full((3, 300), lowest, dtype=dtype, device=device)
    logits[1, 7 : 7 + few] = highest
    logits[2, :-few] = -torch.inf
    tokens, probability, offsets = nucleus(logits, 1.0)
    assert offsets.tolist() == [0, 300, 300 + few, 300 + 2 * few]
    assert tokens.tolist() == [*range(300), *range(7, 7 + few), *range(300 - few, 300)]
    expected = torch.tensor([1 / 300] * 300 + [1 / few] * 2 * few, dtype=probability.dtype, device=device)
    assert torch.allclose(probability, expected)


def test_no_rows(backend, device, dtype) -> None:
    tokens, probability, offsets = nucleus(torch.zeros(0, 5, dtype=dtype, device=device), 0.5)
    assert tokens.numel() == probability.numel() == 0 and offsets.tolist() == [0]


def test_random(backend, examples, device, dtype) -> None:
    values = st.one_of(st.integers(-4, 4).map(float), st.floats(-30, 30), st.just(-torch.inf))

    @examples
    @given(st.data(), st.integers(1, 12), st.floats(0.01, 1), st.sampled_from(sorted(LAYOUTS)))
    def run(data: st.DataObject, vocab: int, top_p: float, layout: str) -> None:
        row = st.tuples(st.floats(-30, 30), *[values] * (vocab - 1))  # one token at least
        rows = data.draw(st.lists(row.flatmap(lambda r: st.permutations(r)), min_size=1, max_size=3))
        check(LAYOUTS[layout](torch.tensor(rows, dtype=dtype, device=device)), top_p)

    run()


def test_random_parameters_of_each_row(backend, examples, device, dtype) -> None:
    @examples
    @given(st.data(), st.integers(1, 4), st.integers(2, 12), st.sampled_from(sorted(LAYOUTS)), st.integers(0, 2**20))
    def run(data: st.DataObject, rows: int, vocab: int, layout: str, seed: int) -> None:
        logits = 3 * randn(seed, rows, vocab, dtype=dtype, device=device)
        width = data.draw(st.integers(0, 4))
        ids = st.lists(st.integers(-1, vocab - 2), min_size=width, max_size=width)  # the last token is never banned
        banned = torch.tensor(data.draw(st.lists(ids, min_size=rows, max_size=rows)), dtype=torch.int32, device=device)
        banned = banned.reshape(rows, width)
        floats = data.draw(st.sampled_from([torch.float32, torch.float64]))
        top_ps = data.draw(st.lists(st.floats(0.01, 1), min_size=rows, max_size=rows))
        top_p = torch.tensor(top_ps, dtype=floats, device=device)
        lay = LAYOUTS[layout]
        check(lay(logits), lay(top_p), lay(banned))
        together = nucleus(logits, top_p, banned)
        bounds = together[2].tolist()
        for row in range(rows):  # the same bits as alone, with numbers for tensors
            alone = nucleus(logits[row : row + 1], float(top_p[row]), banned[row][banned[row] >= 0])
            own = slice(bounds[row], bounds[row + 1])
            assert torch.equal(together[0][own], alone[0]) and torch.equal(together[1][own], alone[1])

    run()


def test_parameters_of_each_row_that_are_those_of_all(backend, device, dtype) -> None:
    """The same bits."""
    logits = 3 * randn(5, 6, 333, dtype=dtype, device=device)
    banned = i32([7, 300, 7], device)
    for top_p in (0.3, 0.8, 1.0):
        for floats in (torch.float32, torch.float64):
            all_rows = torch.full((6,), top_p, dtype=floats, device=device)
            expected = nucleus(logits, float(all_rows[0]), banned)
            each = nucleus(logits, all_rows, torch.cat([banned, i32([-1, -1], device)]).expand(6, -1))
            assert all(torch.equal(x, y) for x, y in zip(expected, each, strict=True))


def test_rows_do_not_touch_each_other(backend, device, dtype) -> None:
    """The same row has the same result, bit for bit, wherever it stands and whatever stands next to it."""
    logits = 3 * randn(5, 7, 97, dtype=dtype, device=device)
    order = [4, 0, 6, 2, 2, 5, 1, 3]
    tokens, probability, offsets = nucleus(logits, 0.9)
    moved_tokens, moved_probability, moved_offsets = nucleus(logits[order], 0.9)
    bounds, moved_bounds = offsets.tolist(), moved_offsets.tolist()
    for new, old in enumerate(order):
        a, b = slice(bounds[old], bounds[old + 1]), slice(moved_bounds[new], moved_bounds[new + 1])
        assert torch.equal(tokens[a], moved_tokens[b]) and torch.equal(probability[a], moved_probability[b])


@pytest.mark.parametrize("vocab, top_p", [(10, 0.3), (10, 0.7), (25, 0.2), (3, 2 / 3)])
def test_equal_rows_are_cut_alike(vocab, top_p, backend, device, dtype) -> None:
    """Also where the sum of the mass meets `top_p` but for its last bit."""
    logits = torch.zeros(40, vocab, dtype=dtype, device=device)
    offsets = nucleus(logits, top_p)[2]
    assert len(set(offsets.diff().tolist())) == 1


def test_row_with_nan_or_infinity(backend, examples, device, dtype) -> None:
    """Whichever lane holds it; where the token is banned, its logit is not looked at."""

    @examples
    @given(st.integers(0, 3), st.integers(1, 75), st.data(), st.sampled_from([torch.nan, -torch.nan, torch.inf]))
    def run(row: int, vocab: int, data: st.DataObject, bad: float) -> None:
        logits = randn(6, 4, vocab, dtype=dtype, device=device)
        place, other = data.draw(st.integers(0, vocab - 1)), data.draw(st.integers(0, vocab - 1))
        logits[row, place] = bad
        with pytest.raises(ValueError, match=f"logits: row {row}"):
            nucleus(logits, 0.5)
        with pytest.raises(ValueError, match=f"logits: row {row}"):
            nucleus(logits, 0.5, i32([-1 if other == place else other], device))
        if vocab > 1:
            check(logits, 0.5, i32([place], device))
            each = torch.full((4, 1), -1, dtype=torch.int32, device=device)
            each[row] = place
            check(logits, 0.5, each)

    run()


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
def test_the_message_says_which(bad) -> None:
    for vocab in (1, 300):
        logits = torch.zeros(1, vocab)
        logits[0, -1] = bad
        with pytest.raises(ValueError, match=f"row 0 has maximum {abs(bad)};"):
            nucleus(logits, 0.5)


def test_row_with_no_token_left(backend, device, dtype) -> None:
    logits = torch.tensor([[0, 1], [-torch.inf, 3], [0, 0]], dtype=dtype, device=device)
    with pytest.raises(ValueError, match="logits: row 1"):
        nucleus(logits, 0.5, i32([1], device))
    with pytest.raises(ValueError, match="logits: row 0"):
        nucleus(logits, 0.5, i32([1, 0], device))


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.0000001, math.nan, math.inf])
def test_top_p_out_of_range(top_p, device) -> None:
    with pytest.raises(ValueError, match="top_p"):
        nucleus(torch.zeros(1, 3, device=device), top_p)


@pytest.mark.parametrize("bad", [math.nan, 0.0, -0.5, 1.0000001, math.inf, -math.inf])
@pytest.mark.parametrize("floats", [torch.float32, torch.float64])
def test_top_p_of_a_row_out_of_range(floats, bad, backend, device) -> None:
    top_p = torch.tensor([0.5, 1.0, bad, bad], dtype=floats, device=device)
    with pytest.raises(ValueError, match="top_p: row 2"):
        nucleus(torch.zeros(4, 3, device=device), top_p)


@pytest.mark.parametrize("bad", [-2, 5])
@pytest.mark.parametrize("each", [False, True])
def test_banned_token_outside_the_vocabulary(each, bad, backend, device, dtype) -> None:
    banned = torch.stack([i32([0, -1], device), i32([0, bad], device)]) if each else i32([0, bad], device)
    with pytest.raises(ValueError, match="banned"):
        nucleus(torch.zeros(2, 5, dtype=dtype, device=device), 0.5, banned)


def test_empty_vocabulary(device) -> None:
    with pytest.raises(ValueError, match="logits"):
        nucleus(torch.zeros(1, 0, device=device), 0.5)
