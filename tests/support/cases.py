"""Inputs for the ops: random forests flattened to plans, K/V caches with poison where nobody may look, candidates."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from torch import Tensor

Path = tuple[int, ...]
NONSENSE = 2**31 - 9  # an index that no tensor has


def i32(values: Sequence[int] | range, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """The same normal numbers on every device, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


# --- layouts ---------------------------------------------------------------------------------------------------------


def gaps(x: Tensor) -> Tensor:
    """The same values with a gap of poison between any two, in storage that begins and ends with poison."""
    poison = torch.nan if x.is_floating_point() else True if x.dtype == torch.bool else NONSENSE
    storage = torch.full([2 * n + 1 for n in x.shape], poison, dtype=x.dtype, device=x.device)
    view = storage[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


def transposed(x: Tensor) -> Tensor:
    """The same values with the first two dimensions exchanged in memory."""
    return x if x.dim() < 2 else x.transpose(0, 1).contiguous().transpose(0, 1)


def shifted(x: Tensor) -> Tensor:
    """The same values, contiguous, from the second element of a storage: aligned to one element only."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


LAYOUTS = {"contiguous": lambda x: x, "gaps": gaps, "transposed": transposed, "shifted": shifted}


# --- forests ---------------------------------------------------------------------------------------------------------


@dataclass
class Forest:
    """A flattened forest: `paths[q]` is the sequence that query `q` ends, `seen[q]` the slots it sees, in order."""

    paths: list[Path]
    slot: Tensor
    begin: Tensor
    end: Tensor
    slots: int
    seen: list[list[int]]

    @property
    def queries(self) -> int:
        return len(self.paths)

    def mask(self) -> Tensor:
        """`[queries, tokens]`, true where the query sees the token."""
        query = torch.arange(self.queries, device=self.slot.device)[:, None]
        return (self.begin <= query) & (query < self.end)

    def to(self, device: torch.device) -> Forest:
        return Forest(
            self.paths, self.slot.to(device), self.begin.to(device), self.end.to(device), self.slots, self.seen
        )


def flatten(queries: Sequence[Path], seed: int = 0, *, spare: int = 3, dead: int = 3, shuffle: bool = True) -> Forest:
    """Numbers the queries depth first and gives every prefix a random slot.

    `spare` slots stay unused. `dead` tokens that nobody sees are mixed in: their slots do not exist, are -1 or unused.
    """
    rng = random.Random(seed)
    paths = sorted(set(queries))  # a prefix sorts before its extensions: depth first
    tokens: list[list[int]] = []  # [node, begin, end]
    branch: list[int] = []  # the nodes on the path of the latest query
    nodes_seen = []
    for q, path in enumerate(paths):
        previous = paths[q - 1] if q else ()
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(previous, path, strict=False)))
        branch = branch[:shared] + list(range(len(tokens), len(tokens) + len(path) - shared))
        tokens += [[node, q, q + 1] for node in branch[shared:]]
        for node in branch:
            tokens[node][2] = q + 1
        nodes_seen.append(branch)
    nodes = len(tokens)
    slots = list(range(nodes + spare))
    rng.shuffle(slots)
    tokens = [[slots[node], begin, end] for node, begin, end in tokens]
    for i in range(dead):
        nowhere = (-1, NONSENSE, slots[nodes] if spare else -1)[i % 3]
        begin = rng.randrange(len(paths) + 1)
        tokens.append([nowhere, begin, rng.randrange(begin + 1)])
    if shuffle:
        rng.shuffle(tokens)
    slot, begin, end = ([t[i] for t in tokens] for i in range(3))
    seen = [[slots[node] for node in branch] for branch in nodes_seen]
    return Forest(paths, i32(slot), i32(begin), i32(end), len(slots), seen)


def beams(seed: int, roots: int, width: int, prompt: int, levels: int) -> list[Path]:
    """Live sequences of `roots` searches of `width` beams, after `levels` steps below prompts of `prompt` tokens."""
    rng = random.Random(seed)
    found: list[Path] = []
    for root in range(roots):
        live = [(root, *(rng.randrange(50) for _ in range(prompt - 1)))]
        for level in range(levels):
            grown = {(*rng.choice(live), rng.randrange(50)) for _ in range(width)}
            if level == levels - 1:
                while len(grown) < width:  # a whole beam at the end, whatever fell together
                    grown.add((*rng.choice(live), rng.randrange(1000)))
            live = sorted(grown)
        found += live
    return found


def prefill(sequences: Sequence[Path], cached: int = 0) -> list[Path]:
    """One query for every prefix longer than `cached`."""
    return [s[:n] for s in sequences for n in range(cached + 1, len(s) + 1)]


@st.composite
def forests(draw: st.DrawFn) -> Forest:
    """Any small forest with queries anywhere in it; sequences that are prefixes of each other among them."""
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
    queries = draw(st.lists(tokens, max_size=9))
    seed, dead = draw(st.integers(0, 2**20)), draw(st.integers(0, 4))
    return flatten(queries, seed, dead=dead, shuffle=draw(st.booleans()))


def caches(
    seed: int,
    forest: Forest,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    v_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Normal K and V where a query looks, NaN and infinity in all other slots."""
    k = randn(seed, forest.slots, kv_heads, head_dim, dtype=dtype, device=device)
    v = randn(seed + 1, forest.slots, kv_heads, v_dim or head_dim, dtype=dtype, device=device)
    looked_at = set(itertools.chain.from_iterable(forest.seen))
    for slot in set(range(forest.slots)) - looked_at:
        k[slot], v[slot] = torch.nan, torch.inf
    return k, v


# --- candidates ------------------------------------------------------------------------------------------------------


@dataclass
class Candidates:
    """Some tokens for every row, as `nucleus` returns them: no token twice in a row."""

    tokens: Tensor
    offsets: Tensor
    rows: list[int]


def candidates(seed: int, counts: Sequence[int], vocab: int, device: torch.device | str = "cpu") -> Candidates:
    rng = random.Random(seed)
    tokens = [t for count in counts for t in rng.sample(range(vocab), count)]
    offsets = [0, *itertools.accumulate(counts)]
    rows = [r for r, count in enumerate(counts) for _ in range(count)]
    return Candidates(i32(tokens, device), i32(offsets, device), rows)


# --- one good call of every op ---------------------------------------------------------------------------------------


def example(op: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> dict[str, object]:
    """Arguments of a small, ordinary call, in the order of the schema."""
    dev = torch.device(device)
    forest = flatten(beams(1, roots=2, width=3, prompt=4, levels=2), seed=1).to(dev)
    k_cache, v_cache = caches(2, forest, kv_heads=2, head_dim=8, dtype=dtype, device=dev, v_dim=6)
    plan = {"slot": forest.slot, "begin": forest.begin, "end": forest.end}
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    found = candidates(3, [3, 0, 4, 2], vocab=11, device=dev)
    found_args = {"tokens": found.tokens, "offsets": found.offsets}
    head = {
        "hidden": randn(4, 4, 6, dtype=dtype, device=dev),
        "weight": randn(5, 11, 6, dtype=dtype, device=dev),
        "bias": randn(6, 11, dtype=torch.float32, device=dev),
        "unseen": torch.arange(11, device=dev) % 4 == 0,
        "unseen_reward": -7.0,
    }
    groups = {"groups": i32([0, 0, 1, 1], dev), "num_groups": 2, "width": 3}
    widths = {"widths": i32([3, 2], dev)}
    rows = {name: randn(7 + i, 6, 4, 8, dtype=dtype, device=dev) for i, name in enumerate(("out_a", "out_b"))}
    lses = {name: randn(9 + i, 6, 4, dtype=compute, device=dev) for i, name in enumerate(("lse_a", "lse_b"))}
    logits = randn(11, 4, 11, dtype=dtype, device=dev)
    turn = {name: randn(18 + i, 5, 6, dtype=dtype, device=dev) for i, name in enumerate(("cos", "sin"))}
    count = {"count": i32([len(forest.slot) - 2], dev)}
    scales = {"k_scale": None, "v_scale": None}  # for fp8 caches
    if op == "append_kv":
        new = {name: randn(12 + i, 5, 2, 8 - 2 * i, dtype=dtype, device=dev) for i, name in enumerate("kv")}
        return {**new, "slots": i32([4, -1, 0, 7, 2], dev), "k_cache": k_cache, "v_cache": v_cache, **turn, **scales}
    if op == "tree_attention":
        q = randn(14, forest.queries, 4, 8, dtype=dtype, device=dev)
        extra = {"softcap": 1.5, "sinks": randn(20, 4, dtype=dtype, device=dev)}
        return {"q": q, "k_cache": k_cache, "v_cache": v_cache, **plan, "scale": 8**-0.5, **count, **scales, **extra}
    if op == "merge_attention":
        return {"out_a": rows["out_a"], "lse_a": lses["lse_a"], "out_b": rows["out_b"], "lse_b": lses["lse_b"]}
    if op == "gather_kv":
        slots = torch.tensor([[0, 3, -1], [5, -1, 1]], dtype=torch.int32, device=dev)
        return {"k_cache": k_cache.nan_to_num(1, 2), "v_cache": v_cache.nan_to_num(1, 2), "slots": slots}
    if op == "nucleus":
        return {"logits": logits, "top_p": 0.8, "banned": i32([2, 9], dev)}
    if op == "multifurcation_head":
        return {**head, **found_args}
    if op == "select_beam":
        return {"rewards": randn(15, 9, dtype=compute, device=dev), **found_args, **groups, **widths}
    if op == "multifurcate":
        inherit = {
            "scores": randn(16, 4, dtype=compute, device=dev),
            "end_tokens": i32([3], dev),
            "finished_scores": randn(17, 2, dtype=compute, device=dev),
            "finished_groups": i32([0, 1], dev),
        }
        return {"logits": logits, **head, **groups, "top_p": 0.8, "banned": i32([2, 9], dev), **inherit, **widths}
    if op == "block_plan":
        table = i32([[4, 2, 9], [8, 1, 0], [4, 2, 7]], dev)
        lengths, starts = i32([5, 3, 6], dev), i32([0, 1, 3, 4], dev)
        sizes = {"block_size": 2, "queries": 4, "size": 20}
        return {"block_table": table, "seq_lens": lengths, "query_start": starts, **sizes}
    assert op == "advance_tree"
    parents = i32([0, 0, 2, 3, 3, forest.queries], dev)
    return {**plan, "parents": parents, "new_slots": i32(range(20, 26), dev), "queries": forest.queries, "count": None}
