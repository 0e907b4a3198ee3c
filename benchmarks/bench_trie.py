"""The host trie at up to a million tokens: `pytest benchmarks/bench_trie.py`. Each case is checked, then timed."""

from __future__ import annotations

import numpy as np
import pytest

from saffron_kernels._native import Trie

VOCABULARY = 128_256
MILLION = 1_000_000
RANDOM = np.random.default_rng(0)


def batch(sequences: int, shared: int, own: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of `shared` equal tokens and `own` different ones, as `Trie.insert` takes them."""
    tokens = RANDOM.integers(0, VOCABULARY, (sequences, shared + own), dtype=np.int32)
    tokens[:, :shared] = tokens[0, :shared]
    return tokens.ravel(), np.arange(sequences + 1) * (shared + own)


ONE_MILLION = batch(1, 0, MILLION)
MANY = batch(64, 8192, 8192)
CASES = pytest.mark.parametrize("case", [ONE_MILLION, MANY], ids=["1x1M", "64x16k-half-shared"])


@CASES
def test_insert(benchmark, case) -> None:
    def fresh():
        return (Trie(MILLION + 64), *case), {}

    _, _, created = Trie(MILLION + 64).insert(*case)
    assert len(created) == (MILLION if case is ONE_MILLION else 8192 + 64 * 8192)
    benchmark.pedantic(lambda trie, *sequences: trie.insert(*sequences), setup=fresh, rounds=15)


def test_insert_that_evicts_a_million(benchmark) -> None:
    other = batch(1, 0, MILLION)

    def full():
        trie = Trie(MILLION)
        leaves, _, _ = trie.insert(*ONE_MILLION)
        trie.release(leaves)
        return (trie, *other), {}

    (trie, *_), _ = full()
    assert len(trie.insert(*other)[2]) == MILLION and trie.match(ONE_MILLION[0]).size == 0
    benchmark.pedantic(lambda trie, *sequences: trie.insert(*sequences), setup=full, rounds=15)


@CASES
def test_match(benchmark, case) -> None:
    tokens, offsets = case
    trie = Trie(MILLION + 64)
    trie.insert(tokens, offsets)
    sequences = np.split(tokens, offsets[1:-1])
    assert all((trie.tokens(trie.match(s)) == s).all() for s in sequences)
    benchmark(lambda: [trie.match(s) for s in sequences])


@CASES
@pytest.mark.parametrize("queries", ["leaves", "all"])
def test_plan(benchmark, case, queries: str) -> None:
    trie = Trie(MILLION + 64)
    leaves, _, created = trie.insert(*case)
    asked = leaves if queries == "leaves" else created
    _, slot, begin, end, depth = trie.plan(asked)
    assert len(slot) == len(created) and (end > begin).all() and (end - begin).sum() == (depth.astype(int) + 1).sum()
    benchmark(lambda: trie.plan(asked))


@pytest.mark.parametrize("width", [8, 64])
def test_advance(benchmark, width: int) -> None:
    """One step of a beam search below a prompt of 512 tokens, with random parents."""
    trie = Trie(10_000)
    prompt, _, _ = trie.insert(*batch(1, 0, 512))
    steps = [
        (np.sort(RANDOM.integers(0, width, width)).astype(np.int32), RANDOM.permutation(width).astype(np.int32))
        for _ in range(97)
    ]
    beams = trie.extend(np.repeat(prompt, width), steps[0][1])
    number = 0

    def step() -> None:
        nonlocal beams, number
        beams = trie.advance(beams, *steps[number % len(steps)])
        number += 1

    for _ in range(50):
        step()
        live = {int(n) for n in trie.plan(np.unique(beams))[1]}
        assert trie.num_nodes == len(live)  # the prompt is held too, but it is part of every path
    benchmark.pedantic(step, rounds=3000)
    assert trie.num_nodes == trie.num_held
