"""How tree_attention cuts its work: every token that a group sees goes to one block, and all blocks get as much."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import cuda_host
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

SOURCE = cuda_host.ROOT / "tests" / "kernels" / "cuda" / "schedule.cu"
ROWS, TILE = 128, 64  # of a block; tokens of a tile
KV_HEADS, GROUP, PROCESSORS = 8, 4, 132  # an 8B model on an H200


class Plan(NamedTuple):
    """What a launch is given: the queries `begin .. end` that see each token."""

    queries: int
    begin: np.ndarray
    end: np.ndarray


def forest(prompts: int, beams: int, context: int, levels: int = 0) -> Plan:
    """`prompts` searches of `beams` beams each; then the tokens of `levels` steps, one of a beam's own each."""
    queries = prompts * beams
    first = np.arange(prompts).repeat(context) * beams
    own = np.tile(np.arange(queries), levels)
    begin = np.concatenate([first, own]).astype(np.int32)
    return Plan(queries, begin, np.concatenate([first + beams, own + 1]).astype(np.int32))


def prefill(*prompts: int) -> Plan:
    """Every token of each prompt sees those before it, and itself."""
    begin = np.arange(sum(prompts), dtype=np.int32)
    end = np.repeat(np.cumsum(prompts), prompts).astype(np.int32)
    return Plan(len(begin), begin, end)


class Work(NamedTuple):
    """Of every group of queries, KV head first: which tokens it sees, how often it is given each, which block gets it.

    All `[kv_heads, query blocks, tokens]`.
    """

    visible: np.ndarray
    times: np.ndarray
    owner: np.ndarray
    blocks: int

    def tiles(self) -> np.ndarray:
        """`[blocks]`: tiles of tokens that each block goes through, of each group whole ones."""
        kv_heads, query_blocks, _ = self.visible.shape
        tiles = np.zeros(self.blocks, np.int64)
        for kv_head in range(kv_heads):
            for block in range(query_blocks):
                owners = self.owner[kv_head, block][self.visible[kv_head, block]]
                tiles += -(-np.bincount(owners, minlength=self.blocks) // TILE)
        return tiles

    def efficiency(self, processors: int = PROCESSORS) -> float:
        """Share of the multiprocessors' time in which they work, if a tile costs the same wherever it is."""
        return self.visible.sum() / TILE / (processors * self.tiles().max())


def cut(plan: Plan, group: int = GROUP, kv_heads: int = KV_HEADS) -> Work:
    queries, tokens = plan.queries, len(plan.begin)
    query_blocks = -(-queries * group // ROWS)
    first = np.arange(query_blocks) * ROWS // group
    last = (np.minimum((np.arange(query_blocks) + 1) * ROWS, queries * group) - 1) // group
    begin, end = plan.begin[None], plan.end[None]
    seen = (begin < end) & (begin <= last[:, None]) & (end > first[:, None])
    times, owner = (np.zeros((kv_heads, query_blocks, tokens), np.int32) for _ in range(2))
    library = ctypes.CDLL(cuda_host.build({SOURCE: cuda_host.AS_KERNEL}))
    message = ctypes.create_string_buffer(200)
    at = [x.ctypes.data_as(ctypes.c_void_p) for x in (plan.begin, plan.end, times, owner)]
    blocks = library.schedule(queries, group, kv_heads, tokens, *at, message)
    assert blocks > 0, message.value.decode()
    return Work(np.broadcast_to(seen, times.shape), times, owner, blocks)


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFFRON_CUDA_HOST_CAPABILITY", "90")
    monkeypatch.setenv("SAFFRON_CUDA_HOST_PROCESSORS", str(PROCESSORS))


@pytest.mark.parametrize(
    "plan, least",
    [
        (forest(4, 32, 4096), 0.95),
        (forest(8, 16, 4096), 0.95),
        (forest(4, 32, 1200), 0.85),
        (forest(1, 32, 4096), 0.95),
        (forest(1, 32, 4096, levels=32), 0.95),
        (forest(4, 32, 4096, levels=32), 0.85),
        (forest(5, 32, 4096), 0.85),
        (forest(9, 32, 1200), 0.85),
    ],
    ids=lambda x: "" if isinstance(x, float) else f"{x.queries} beams, {len(x.begin)} tokens",
)
def test_forests_keep_every_multiprocessor_busy(plan, least) -> None:
    work = cut(plan)
    assert (work.times[work.visible] == 1).all() and (work.times <= 1).all()
    assert work.efficiency() >= least


@pytest.mark.parametrize("prompts, least", [((1200,), 0.9), ((2048,), 0.9), ((500, 900, 300), 0.8)])
def test_prefills_keep_every_multiprocessor_busy(prompts, least) -> None:
    work = cut(prefill(*prompts))
    assert (work.times[work.visible] == 1).all() and (work.times <= 1).all()
    assert work.efficiency() >= least


@pytest.mark.parametrize("context, whole", [(256, True), (300, False)])
def test_short_prompts_are_not_split(context, whole, monkeypatch) -> None:
    """To join parts takes longer than to go through so few tokens: one block a KV head."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST_ALONE", "256")
    work = cut(forest(1, 32, context))
    assert (work.times[work.visible] == 1).all()
    split = [len(np.unique(work.owner[kv_head])) > 1 for kv_head in range(KV_HEADS)]
    assert split == [not whole] * KV_HEADS and (work.blocks == KV_HEADS) == whole


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any intervals in any order, some empty, some beyond the queries; sizes around those of chunks."""
    queries = draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    tokens = draw(st.sampled_from([0, 1, 63, 64, 65, 200, 700]))
    begin = rng.integers(-3, queries + 3, tokens).astype(np.int32)
    longest = draw(st.sampled_from([0, 2, 40, queries]))
    end = begin + rng.integers(-2, longest + 1, tokens).astype(np.int32)
    if draw(st.booleans()):
        order = np.argsort(begin, kind="stable")
        begin, end = begin[order], end[order]
    return Plan(queries, begin, end)


@given(plan=plans(), group=st.integers(1, 5), kv_heads=st.integers(1, 3), processors=st.sampled_from([1, 2, 7, 40]))
@settings(max_examples=25)
def test_every_token_goes_to_one_block(plan, group, kv_heads, processors) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFFRON_CUDA_HOST_PROCESSORS", str(processors))
        work = cut(plan, group, kv_heads)
    inside = (plan.begin < plan.queries) & (plan.end > 0)
    assert (work.times[work.visible & inside] == 1).all() and (work.times <= 1).all()


def test_more_bands_and_chunks_than_tables_hold(monkeypatch) -> None:
    """Two query blocks per band, 128 tokens per chunk."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST_PROCESSORS", "5")
    tokens, queries = 70_000, 600 * ROWS
    begin = (np.arange(tokens) * (queries // tokens)).astype(np.int32)
    work = cut(Plan(queries, begin, begin + 1), group=1, kv_heads=1)
    assert (work.times[work.visible] == 1).all() and (work.times <= 1).all()
