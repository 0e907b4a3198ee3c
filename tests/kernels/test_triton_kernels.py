"""What only the Triton backend has, interpreted: lists longer than a block, many splits, faults that kernels record."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from cases import i32, randn

pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl

from saffron_kernels import backends
from saffron_kernels.backends import faults, reference
from saffron_kernels.backends.triton import (
    advance_tree,
    append_kv,
    gather_kv,
    launch,
    multifurcate,
    multifurcation_head,
    nucleus,
    ordering,
    raise_faults,
    select_beam,
    tree_attention,
)
from saffron_kernels.backends.triton.launch import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 is not set")
CPU = torch.device("cpu")


@pytest.fixture
def deferred(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device where content is not looked at before a launch: what is wrong with it the kernels have to find."""
    reason = backends.why_not("triton", "nucleus", device, torch.float32)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(faults, "eager", lambda tensor: False)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    faults.clear(device)
    yield device
    faults.clear(device)


def test_interpreted_only_where_asked_for() -> None:
    reason = backends.why_not("triton", "nucleus", CPU, torch.float32)
    assert reason is None if INTERPRETED else "TRITON_INTERPRET" in str(reason)
    assert "torch.float64" in str(backends.why_not("triton", "nucleus", CPU, torch.float64))
    assert "CUDA" in str(backends.why_not("triton", "nucleus", torch.device("meta"), torch.float32))


def test_package_imports_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import saffron_kernels as s, torch; "
        "assert s.nucleus(torch.zeros(1, 4), 0.5)[0].tolist() == [0, 1]; "
        "print(s.backends.why_not('triton', 'nucleus', torch.device('cpu'), torch.float32))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "cannot be imported" in result.stdout, result.stderr


@interpreted
@pytest.mark.parametrize("pairs", [16, 64])
def test_lists_of_many_blocks(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks sorted by a sorting network (16) and by comparing all pairs (64), then ranked across blocks."""
    monkeypatch.setattr(ordering, "_PAIRS", tl.constexpr(pairs))
    monkeypatch.setattr(ordering, "_BLOCK", 32)
    logits = (2 * randn(1, 2, 150)).round()  # ties everywhere
    logits[1, 40:90] = -torch.inf
    for result, expected in zip(nucleus(logits, 0.95, None), reference.nucleus(logits, 0.95, None), strict=True):
        assert torch.equal(result, expected) if result.dtype == torch.int32 else torch.allclose(result, expected)


@interpreted
def test_search_over_a_list_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold is found over several loads of the list, with ties across them."""
    logits = randn(2, 1, 700).round()
    tokens, _, _ = nucleus(logits, 0.9, i32([3, 4]))
    assert torch.equal(tokens, reference.nucleus(logits, 0.9, i32([3, 4]))[0])


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are cut into parts of 128 tokens."""
    monkeypatch.setattr(importlib.import_module("saffron_kernels.backends.triton.nucleus"), "_PART", 128)


@interpreted
@pytest.mark.parametrize("scale, top_p", [(0.02, 0.8), (1.0, 0.999), (8.0, 0.8), (8.0, 1.0)])
def test_rows_of_many_parts(scale, top_p, short_parts) -> None:
    """Flat, as drawn and peaked; a part without a token, and bans that differ by row."""
    logits = scale * randn(3, 2, 390)
    logits[0, 128:256] = -torch.inf
    banned = i32([[3, 389, -1], [128, 300, 301]])
    found, exact = nucleus(logits, top_p, banned), reference.nucleus(logits.double(), top_p, banned)
    for row in range(2):
        ours, theirs = (x[0][slice(*x[2][row : row + 2].tolist())] for x in (found, exact))
        both = min(len(ours), len(theirs))  # a sum may round to the other side of the edge
        least = len(theirs) if top_p < 1 else int(logits[row].isfinite().sum()) - [2, 3][row]
        assert abs(len(ours) - least) <= 1 and torch.equal(ours[:both], theirs[:both])


@interpreted
@pytest.mark.parametrize("kept", [1, 128, 129])
def test_one_logit_in_all_parts(kept, short_parts) -> None:
    """All probabilities are 2^-8: the set is exact, by ascending token id, and all tokens are at the edge."""
    logits = torch.full((1, 390), -torch.inf)
    alive = torch.arange(390)[torch.arange(390) % 4 < 3][:256]
    logits[0, alive] = -3.25
    tokens, probability, _ = nucleus(logits, kept / 256, None)
    assert torch.equal(tokens, alive[:kept].int()) and bool((probability == 2.0**-8).all())


@interpreted
def test_logits_that_share_a_bin_and_its_first_bits(short_parts) -> None:
    one = torch.tensor(1.0).view(torch.int32)
    logits = (one + torch.arange(390, dtype=torch.int32) * 419 % 390).view(torch.float32)[None]
    tokens, _, offsets = nucleus(logits, 0.3, None)
    assert torch.equal(tokens, logits[0].argsort(descending=True)[: tokens.shape[0]].int())
    assert abs(int(offsets[1]) - 117) <= 1


def test_a_row_is_read_by_as_many_programs_as_it_has_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one goes through what may be in the nucleus, not through the vocabulary."""
    module, grids = importlib.import_module("saffron_kernels.backends.triton.nucleus"), {}
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *_, **__: grids.update({kernel.__name__: grid}))
    module.find_members(torch.empty(3, 128_256), 0.8, None)
    assert grids == {"_measure_kernel": (3, 63), "_list_kernel": (3, 63), "_select_kernel": (3,)}


@interpreted
@pytest.mark.parametrize("processors", [1, 64])
def test_any_number_of_splits(processors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also such that see nothing, and whose partial results are not written."""
    monkeypatch.setattr(launch, "_INTERPRETER", launch.DeviceProperties(90, processors))
    tokens, queries = 700, 3
    slot = torch.randperm(800, generator=torch.Generator().manual_seed(3))[:tokens].int()
    begin, end = torch.zeros(tokens, dtype=torch.int32), torch.full((tokens,), 2, dtype=torch.int32)
    begin[100:400], end[100:400] = 5, 5  # dead
    begin[400:500], end[400:500] = 2, 3
    q, cache = randn(4, queries, 2, 16), randn(5, 800, 1, 16)
    out, lse = tree_attention(q, cache, cache, slot, begin, end, 0.25)
    exact = reference.tree_attention(
        q.double(), cache.double(), cache.double(), slot, begin, end, 0.25, None, None, None
    )
    assert torch.allclose(out.double(), exact[0], atol=1e-5) and torch.allclose(lse.double(), exact[1], atol=1e-5)


@interpreted
def test_dead_entries_at_the_end_of_a_plan() -> None:
    """As plans of fixed capacity have them."""
    slot, begin, end = i32(range(64)), i32([0] * 64), i32([2] * 64)
    q, cache = randn(6, 2, 2, 16), randn(7, 64, 1, 16)
    dead = i32([-7] * 40)
    padded = torch.cat([slot, dead]), torch.cat([begin, dead]), torch.cat([end, dead])
    short = tree_attention(q, cache, cache, slot, begin, end, 0.25)
    long = tree_attention(q, cache, cache, *padded, 0.25)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(short, long, strict=True))


class TestFaults:
    """Kernels skip what they cannot serve, write nothing outside, and leave a word about it."""

    def recorded(self, name: str, device: torch.device) -> None:
        with pytest.raises(ValueError, match=name):
            raise_faults(device)
        raise_faults(device)  # once

    def test_append_kv(self, deferred: torch.device) -> None:
        k, storage = randn(1, 3, 1, 4, device=deferred), torch.zeros(6, 1, 4, device=deferred)
        append_kv(k, k, i32([1, 2, -2], deferred), storage[2:4], storage[2:4].clone())
        assert torch.equal(storage[3], k[0]) and not storage[[0, 1, 2, 4, 5]].any()
        self.recorded("slots", deferred)

    def test_gather_kv(self, deferred: torch.device) -> None:
        cache = randn(2, 4, 1, 4, device=deferred)
        k, _ = gather_kv(cache[1:3], cache[1:3], i32([0, 2, -2, -1], deferred).view(1, 4))
        assert torch.equal(k[0, 0, 0], cache[1, 0]) and not k[0, 0, 1:].any()
        self.recorded("slots", deferred)

    def test_tree_attention(self, deferred: torch.device) -> None:
        cache, q = randn(3, 2, 1, 4, device=deferred), randn(4, 1, 1, 4, device=deferred)

        def attend(*plan: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            return tree_attention(q, cache, cache, *(i32(values, deferred) for values in plan), 1.0)

        good, bad = attend([1], [0], [1]), attend([1, 9, -1], [0, 0, 0], [1, 1, 1])
        assert torch.equal(good[0], bad[0]) and torch.equal(good[1], bad[1])
        self.recorded("slot", deferred)

    def test_nucleus(self, deferred: torch.device) -> None:
        """It waits for the device anyway, so it raises at once, and leaves no word."""
        logits = torch.tensor([[0.0, 1, 2], [0, torch.nan, 0]], device=deferred)
        with pytest.raises(ValueError, match="logits: row 1"):
            nucleus(logits, 0.5, None)
        raise_faults(deferred)

    def test_banned_may_be_padded(self, deferred: torch.device) -> None:
        tokens, _, _ = nucleus(torch.zeros(1, 3, device=deferred), 1.0, i32([-1, 1], deferred))
        assert tokens.tolist() == [0, 2]
        raise_faults(deferred)

    @pytest.mark.parametrize("bad", [-2, 3, 1 << 30])
    def test_banned(self, bad: int, deferred: torch.device) -> None:
        tokens, _, _ = nucleus(torch.zeros(1, 3, device=deferred), 1.0, i32([bad, 1], deferred))
        assert tokens.tolist() == [0, 2]
        self.recorded("banned", deferred)

    def test_multifurcation_head(self, deferred: torch.device) -> None:
        hidden, weight = randn(5, 2, 4, device=deferred), randn(6, 3, 4, device=deferred)
        candidates = i32([2, 3, -1], deferred), i32([0, 2, 9], deferred)
        rewards = multifurcation_head(hidden, weight, None, None, 0.0, *candidates)
        assert torch.allclose(rewards[0], hidden[0] @ weight[2], rtol=1e-4, atol=1e-5)
        assert rewards[1:].isnan().all()  # no step can take one of them for a reward
        self.recorded("tokens", deferred)

    @pytest.mark.parametrize("rewards, groups, name", [([0, 1], [0, 5], "groups"), ([torch.nan, 1], [0, 1], "rewards")])
    def test_select_beam(self, rewards, groups, name, deferred: torch.device) -> None:
        indices = (i32(values, deferred) for values in ([7, 8], [0, 1, 2], groups))
        parent, token, _ = select_beam(torch.tensor(rewards, device=deferred).float(), *indices, 2, 1)
        assert set(parent.tolist()) <= {0, 1, 2} and set(token.tolist()) <= {7, 8, -1}
        self.recorded(name, deferred)

    def test_multifurcate(self, deferred: torch.device) -> None:
        logits = torch.tensor([[0.0, 1, 2], [0, torch.nan, 0]], device=deferred)
        head = (randn(7, 2, 4, device=deferred), randn(8, 3, 4, device=deferred), None, None, 0.0)
        none = (None,) * 5
        parent, _, _, sizes, _ = multifurcate(logits, *head, i32([0, 0], deferred), 1, 5, 1.0, *none)
        assert sizes.tolist() == [3, 0] and parent.tolist() == [0, 0, 0, 2, 2]
        self.recorded("logits", deferred)

    @pytest.mark.parametrize("finished_group", [-1, 2])
    def test_group_of_a_finished_node(self, finished_group: int, deferred: torch.device) -> None:
        """The node is left out; the step is done."""
        head = (randn(7, 1, 4, device=deferred), randn(8, 3, 4, device=deferred), None, None, 0.0)
        finished = torch.tensor([1e9], device=deferred), i32([finished_group], deferred)
        logits = torch.zeros(1, 3, device=deferred)
        result = multifurcate(logits, *head, i32([0], deferred), 1, 4, 1.0, None, None, None, *finished)
        assert result[0].tolist() == [0, 0, 0, 2]
        self.recorded("groups", deferred)

    @pytest.mark.parametrize("begin, parents", [(0, [1, 0]), (0, [-1, 0]), (7, [0, 0]), (-1, [0, 0])])
    def test_advance_tree(self, begin, parents, deferred: torch.device) -> None:
        plan = (i32(values, deferred) for values in ([0], [begin], [1], parents, [5, 6]))
        _, start, stop = advance_tree(*plan, 2)
        assert int(start.min()) >= 0 and int(stop.max()) <= 2
        self.recorded("parents", deferred)
