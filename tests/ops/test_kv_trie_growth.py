"""KVTrie that grows: two threads, growth that fails, slots set aside, V of its own size."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from switching import in_threads

from saffron_kernels import CacheFullError, KVTrie, append_kv, tree_attention

OP = "tree_attention"


def test_two_threads_drive_a_trie_through_growth() -> None:
    """10,000 growths: index and caches always agree, and every sequence keeps the rows it wrote."""
    tries = [KVTrie(1, 1, 1, capacity=1) for _ in range(2_500)]
    errors: list[BaseException] = []
    start = threading.Barrier(2)

    def client(number: int) -> None:
        try:
            for trie in tries:
                start.wait()
                held = []
                for i in range(8):
                    with trie.lock:
                        step = trie.insert([[number, i]])
                        trie.k[0, step.leaves] = float(10 * number + i)
                    held.append(int(step.leaves[0]))
                for i, node in enumerate(held):
                    assert trie.k[0, node] == 10 * number + i
                trie.release(np.array(held, dtype=np.int32), discard=True)
        except BaseException as error:
            errors.append(error)
            start.abort()

    in_threads(2, client, interval=1e-6)
    assert not errors
    assert all(t.capacity == t.k.shape[1] == t.v.shape[1] and t.num_nodes == 0 for t in tries)
    assert sum(t.capacity.bit_length() - 1 for t in tries) >= 10_000


def test_growth_that_fails_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    trie = KVTrie(2, 1, 4, capacity=4)
    beams, _ = trie.beams(trie.insert([[1, 2], [1, 3]]).leaves)
    before, k = trie.index.snapshot(), trie.k

    def full(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr(torch, "cat", full)
    for change in (
        lambda: trie.insert([[5, 6, 7, 8]]),
        lambda: trie.advance(beams, np.array([0, 0, 1, 1], np.int32), np.array([1, 2, 3, 4], np.int32)),
    ):
        with pytest.raises(
            CacheFullError, match="4 more slots cannot be had: DefaultCPUAllocator: can't allocate memory$"
        ):
            change()
        after = trie.index.snapshot()
        assert trie.k is k and trie.capacity == 4
        assert all((before[name] == after[name]).all() for name in ("node", "parent", "token", "holds"))
    monkeypatch.undo()
    trie.advance(beams, np.array([0, 0, 1, 1], np.int32), np.array([1, 2, 3, 4], np.int32))
    assert trie.capacity == 8 == trie.k.shape[1]


def test_slots_set_aside() -> None:
    trie = KVTrie(1, 1, 1, capacity=8, grow=False)
    assert trie.reserve(5) and not trie.reserve(4) and trie.reserve(3) and trie.reserved == 8
    assert trie.reserve(-8) and not trie.reserve(5, limit=4) and trie.reserved == 0
    grows = KVTrie(1, 1, 1, capacity=8)
    assert grows.reserve(100) and not grows.reserve(1, limit=100)


def test_v_of_another_size() -> None:
    """MLA models: K of 192, V of 128; what is appended is read again, through growth too."""
    trie = KVTrie(layers=2, kv_heads=3, head_dim=24, v_dim=16, capacity=4)
    assert trie.bytes_per_token == 2 * 3 * (24 + 16) * 4
    filled = trie.insert([[1, 2, 3], [1, 2, 4, 5, 6, 7]])
    assert trie.k.shape == (2, 8, 3, 24) and trie.v.shape == (2, 8, 3, 16)
    step = filled.step
    k, v, q = (torch.randn(len(step.positions), heads, size) for heads, size in ((3, 24), (3, 16), (6, 24)))
    append_kv(k, v, step.write_slots, trie.k[1], trie.v[1])
    out, _ = tree_attention(q, trie.k[1], trie.v[1], step.slot, step.begin, step.end, 0.2)
    assert out.shape == (7, 6, 16)
    first = int(step.positions.argmin())  # the query that sees itself alone
    torch.testing.assert_close(out[first], v[first].repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="v_dim: got 0, expected at least 1"):
        KVTrie(layers=1, kv_heads=1, head_dim=4, v_dim=0)
