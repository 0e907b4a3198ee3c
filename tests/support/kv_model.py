"""Searches on a KVTrie with K and V of their own: what a model would write and attend to, and what it has to get."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from saffron_kernels import Beams, KVTrie, TreeStep, append_kv, tree_attention

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 3
Path = tuple[int, ...]


def ints(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def prefixes(paths: Sequence[Path]) -> set[Path]:
    return {path[:n] for path in paths for n in range(1, len(path) + 1)}


@functools.cache
def rows(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """K, V `[layers, kv_heads, head_dim]` and q `[layers, heads, head_dim]` of a prefix's last token: its own alone."""
    normal = np.random.default_rng([len(path), *path]).standard_normal
    k, v = (torch.from_numpy(normal((LAYERS, KV_HEADS, HEAD_DIM))) for _ in range(2))
    return k, v, torch.from_numpy(normal((LAYERS, HEADS, HEAD_DIM)))


def dense(path: Path, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention of the last token of one sequence over that sequence, nothing shared, in fp64."""

    def stored(x: Tensor) -> Tensor:
        return x[layer].to(dtype).double()

    history = [rows(path[:n]) for n in range(1, len(path) + 1)]
    k, v = (torch.stack([stored(r[i]) for r in history]).repeat_interleave(HEADS // KV_HEADS, 1) for i in range(2))
    scores = torch.einsum("hd,thd->ht", stored(rows(path)[2]), k) * 0.5
    return torch.einsum("ht,thd->hd", scores.softmax(-1), v), scores.logsumexp(-1)


def new_trie(dtype: torch.dtype = torch.float64, device: str = "cpu", **more) -> KVTrie:
    return KVTrie(LAYERS, KV_HEADS, HEAD_DIM, dtype=dtype, device=device, **more)


def poison_free_slots(trie: KVTrie) -> None:
    free = np.setdiff1d(np.arange(trie.capacity), trie.index.snapshot()["node"])
    trie.k[:, free] = torch.nan
    trie.v[:, free] = torch.nan


def attend(trie: KVTrie, plan: TreeStep | Beams, paths: Sequence[Path]) -> None:
    """Query `i` of the plan is the last token of `paths[i]`, and gets what that sequence alone would get."""
    for layer in range(LAYERS):
        q = (
            torch.stack([rows(path)[2][layer] for path in paths]).to(trie.k)
            if paths
            else trie.k.new_zeros(0, HEADS, HEAD_DIM)
        )
        out, lse = tree_attention(q, trie.k[layer], trie.v[layer], plan.slot, plan.begin, plan.end, 0.5)
        eps = torch.finfo(trie.k.dtype).eps
        for i, path in enumerate(paths):
            exact, exact_lse = dense(path, layer, trie.k.dtype)
            assert torch.allclose(
                out[i].cpu().double(), exact, rtol=4 * eps, atol=32 * eps if eps < 1e-4 else 4 * eps
            ), path
            lse_eps = torch.finfo(lse.dtype).eps
            assert torch.allclose(lse[i].cpu().double(), exact_lse, rtol=32 * lse_eps, atol=32 * lse_eps), path


def forward(trie: KVTrie, step: TreeStep, paths: Sequence[Path]) -> None:
    """A forward pass: K and V of the queries are written where the step says, then every query attends."""
    assert step.positions.tolist() == [len(path) - 1 for path in paths]
    assert step.length == max(map(len, paths), default=0)
    for layer in range(LAYERS if paths else 0):
        k, v = (torch.stack([rows(path)[i][layer] for path in paths]).to(trie.k) for i in range(2))
        append_kv(k, v, step.write_slots, trie.k[layer], trie.v[layer])
    attend(trie, step, paths)


def insert(trie: KVTrie, sequences: Sequence[Path]) -> np.ndarray:
    """Prefills the sequences, and checks the plan of the pass against what was cached before."""
    before = {tuple(trie.index.path(node).tolist()) for node in trie.index.snapshot()["node"].tolist()}
    cached = [len(prefixes([s]) & before) for s in sequences]
    filled = trie.insert(sequences)
    poison_free_slots(trie)
    assert filled.cached.tolist() == cached
    node_of = dict(zip(filled.last.tolist(), filled.leaves.tolist(), strict=True))
    writes = filled.step.write_slots.tolist()
    paths = [tuple(trie.index.path(w if w >= 0 else node_of[i]).tolist()) for i, w in enumerate(writes)]
    assert len(set(paths)) == len(paths) and set(paths) == prefixes(sequences) - before | set(sequences)
    assert all((w < 0) == (path in before) for w, path in zip(writes, paths, strict=True))
    assert [paths[i] for i in filled.last] == list(sequences)
    assert filled.tokens.tolist() == [path[-1] for path in paths]
    forward(trie, filled.step, paths)
    return filled.leaves


def start(trie: KVTrie, leaves: np.ndarray, sequences: Sequence[Path]) -> tuple[Beams, list[Path]]:
    beams, number = trie.beams(leaves)
    paths = [tuple(trie.index.path(int(node)).tolist()) for node in beams.nodes]
    assert len(set(paths)) == len(paths) and [paths[i] for i in number] == list(sequences)
    assert beams.positions.tolist() == [len(path) - 1 for path in paths]
    attend(trie, beams, paths)
    return beams, paths


def advance(
    trie: KVTrie, beams: Beams, paths: Sequence[Path], children: Sequence[tuple[int, int]]
) -> tuple[Beams, list[Path]]:
    parents, tokens = ints([p for p, _ in children]), ints([t for _, t in children])
    after, step = trie.advance(beams, parents, tokens)
    poison_free_slots(trie)
    grown = [(*paths[p], t) for p, t in children]
    assert [tuple(trie.index.path(int(node)).tolist()) for node in after.nodes] == grown
    forward(trie, step, grown)
    attend(trie, after, grown)
    same_as_host_plan(trie, after)
    return after, grown


def same_as_host_plan(trie: KVTrie, beams: Beams) -> None:
    """The plan that two gathers made is the one that walking the trie makes.

    Where beams are prefixes of each other the host may number them in another order, or a slot may stand in the plan
    twice; then what every query sees must agree.
    """
    nodes, first = np.unique(beams.nodes, return_index=True)
    order, *plan, depth = trie.index.plan(nodes[np.argsort(first)])
    mine = [x.tolist() for x in (beams.slot, beams.begin, beams.end)]
    if len(nodes) == len(beams.nodes) and order.tolist() == list(range(len(nodes))):
        assert depth.tolist() == beams.positions.tolist()
        host, ours = (sorted(zip(*x, strict=True)) for x in ([a.tolist() for a in plan], mine))
        if len({slot for slot, _, _ in ours}) == len(ours):
            assert ours == host
    for i, node in enumerate(beams.nodes.tolist()):
        seen = [s for s, b, e in zip(*mine, strict=True) if b <= i < e]
        own = [s for s, b, e in zip(*trie.index.plan(ints([node]))[1:4], strict=True) if b <= 0 < e]
        assert sorted(seen) == sorted(own)


def state_of(trie: KVTrie) -> tuple:
    """All of a trie's state that a failed call has to leave as it was."""
    snapshot = trie.index.snapshot()
    index = {name: snapshot[name].tolist() for name in ("node", "parent", "token", "holds")}
    by_age = sorted(zip(snapshot["used"].tolist(), snapshot["node"].tolist(), strict=True))
    kv = [x.clone().view(torch.int64) for x in (trie.k, trie.v)]
    return index, [node for _, node in by_age], trie.capacity, [x.tolist() for x in kv]
