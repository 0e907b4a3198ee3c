"""What is wrong with the content of a search step's tensors, where nobody looks before the launch: kernels record it.

On the CPU: Triton interpreted, CUDA executed. On a GPU all of it is so.
"""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType
from typing import Any

import cuda_host
import hypothesis
import pytest
import torch
from cases import i32, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saffron_kernels import backends
from saffron_kernels.backends import faults

CPU = torch.device("cpu")
VOCAB, GROUPS = 21, [0, 0, 1, 1, 2]  # the last row belongs to no group
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["triton", "cuda"])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param == "cuda":
        monkeypatch.setenv("SAFFRON_CUDA_HOST", cuda_host.module())
    if reason := backends.why_not(request.param, "multifurcate", CPU, torch.float32):
        pytest.skip(reason)
    monkeypatch.setattr(faults, "eager", lambda tensor: False)
    faults.clear(CPU)
    return importlib.import_module(f"saffron_kernels.backends.{request.param}")


def test_the_word_is_made_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """By an engine, whose callers are not in that mode."""
    monkeypatch.setattr(faults, "_words", {})
    with torch.inference_mode():
        word = faults.word(CPU)
    word.fill_(faults.LOGITS)
    with pytest.raises(ValueError, match="logits"):
        faults.raise_faults(CPU)
    faults.raise_faults(CPU)  # once


@pytest.fixture
def tries(ops: ModuleType) -> hypothesis.settings:
    return hypothesis.settings(max_examples=15 if ops.__name__.endswith("triton") else 60)


def step(size: int) -> dict[str, Any]:
    """All rows have 2 end tokens and 1 banned one of their own; the others are seen, unseen, or inherit nothing."""
    rows = len(GROUPS)
    ids = {
        "banned": [[row, -1, -1] for row in range(rows)],
        "end_tokens": [[18, 19 + row % 2, -1] for row in range(rows)],
    }
    arguments: dict[str, Any] = {
        "logits": randn(1, rows, VOCAB),
        "hidden": randn(2, rows, size),
        "weight": randn(3, VOCAB, size),
        "bias": randn(4, VOCAB),
        "unseen": torch.arange(VOCAB) % 4 == 3,
        "unseen_reward": -5.0,
        "groups": i32(GROUPS),
        "num_groups": 2,
        "width": 4,
        "top_p": torch.tensor([0.4, 1.0, 0.7, 0.9, torch.nan]),
        "scores": randn(5, rows),
        "finished_scores": torch.tensor([0.0, 1.0, torch.nan]),
        "finished_groups": i32([1, 0, 2]),
        "widths": i32([2, 4]),
    }
    arguments |= {name: torch.tensor(lists, dtype=torch.int32) for name, lists in ids.items()}
    for name in ("logits", "hidden", "scores"):
        arguments[name][4:] = torch.nan
    arguments["banned"][4:] = arguments["end_tokens"][4:] = 10**6
    return arguments


def multifurcate(ops: ModuleType, **arguments: Any) -> tuple[Tensor, ...]:
    schema = torch.ops.saffron_kernels.multifurcate.default._schema
    return ops.multifurcate(*(arguments[argument.name] for argument in schema.arguments))


def recorded(device: torch.device = CPU) -> str:
    """The message of what was recorded, if anything was."""
    try:
        faults.raise_faults(device)
    except ValueError as error:
        return str(error)
    return ""


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_nan_in_any_operand_and_lane(ops, tries) -> None:
    """Recorded where a reward, a maximum or a limit comes from it, and nothing is recorded where it does not."""
    names = {"hidden": "rewards", "weight": "rewards", "bias": "rewards", "logits": "logits", "top_p": "top_p"}
    names |= {"scores": "scores", "finished_scores": "finished_scores"}

    @tries
    @given(st.data(), st.sampled_from(sorted(names)), st.sampled_from([1, 7, 40]))
    def run(data: st.DataObject, name: str, size: int) -> None:
        arguments = step(size)
        good = multifurcate(ops, **arguments)
        assert recorded() == ""
        tokens, _, offsets = ops.nucleus(arguments["logits"][:4], arguments["top_p"][:4], arguments["banned"][:4])
        bounds = offsets.tolist()
        found = {(r, int(t)) for r in range(4) for t in tokens[bounds[r] : bounds[r + 1]]}
        ends = {(r, t) for r, t in found if t in arguments["end_tokens"][r]}
        scored = {(r, t) for r, t in found - ends if t % 4 != 3}
        place = tuple(data.draw(st.integers(0, n - 1)) for n in arguments[name].shape)
        matters = {
            "hidden": place[0] in {r for r, _ in scored},
            "weight": place[0] in {t for _, t in scored},
            "bias": place[0] in {t for _, t in scored},
            "logits": place[0] < 4 and place[-1] != place[0],  # a row's own number is banned there
            "top_p": place[0] < 4,
            "scores": place[0] in {r for r, _ in ends},
            "finished_scores": place[0] < 2,
        }[name]
        spoilt = arguments | {name: arguments[name].clone()}
        spoilt[name][place] = torch.nan
        result = multifurcate(ops, **spoilt)
        assert (names[name] in recorded()) == matters
        assert matters or same(result, good)

    run()


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("bad", [0, -3, 5, 2**31 - 1])
def test_bad_widths(bad, place, ops) -> None:
    arguments = step(6)
    arguments["widths"][place] = bad
    parent, token, _, _, _ = multifurcate(ops, **arguments)
    assert "widths" in recorded()
    assert bool(((parent >= 0) & (parent <= 8)).all()) and bool((token < VOCAB).all())
    given = randn(1, 6), i32(range(6)), i32([0, 3, 6]), i32([0, 1]), 2, 4, arguments["widths"]
    ops.select_beam(*given)
    assert "widths" in recorded()
    ops.select_beam(*given[:-1], i32([1, 4]))
    assert recorded() == ""


@pytest.mark.parametrize("bad", [0.0, -1.0, 1.5, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("floats", [torch.float32, torch.float64])
def test_bad_top_p(floats, bad, ops) -> None:
    """Its row has no candidates; the others are as they were."""
    arguments = step(6) | {"finished_scores": None, "finished_groups": None}
    arguments["top_p"] = arguments["top_p"].to(floats)
    good = multifurcate(ops, **arguments)
    arguments["top_p"][1] = bad
    found = multifurcate(ops, **arguments)
    assert "top_p" in recorded()
    assert found[3][1] == 0 and found[3][[0, 2, 3, 4]].tolist() == good[3][[0, 2, 3, 4]].tolist()
    with pytest.raises(ValueError, match="top_p: row 1"):
        ops.nucleus(arguments["logits"], arguments["top_p"][:4].repeat(2)[:5], None)
    assert recorded() == ""  # it was raised already


@pytest.mark.parametrize("bad", [-2, VOCAB, 2**31 - 1])
def test_bad_banned_tokens(bad, ops) -> None:
    arguments = step(6)
    good = multifurcate(ops, **arguments)
    for row in range(5):
        changed = arguments | {"banned": arguments["banned"].clone()}
        changed["banned"][row, 1] = bad
        assert same(multifurcate(ops, **changed), good)  # the others are banned all the same
        assert ("banned" in recorded()) == (row < 4)


@pytest.mark.parametrize(
    "table, lengths, starts, size",
    [
        ([[1], [1]], [3, 1], [0, 1, 2], 9),  # more tokens than its block holds
        ([[1], [1]], [1, 2**31 - 1], [0, 1, 2], 9),
        ([[1], [1]], [1, 1], [0, 2, 2], 9),  # more queries than tokens
        ([[1], [1]], [1, -5], [0, 1, 2], 9),
        ([[1], [1]], [2, 2], [0, 1, 4], 9),  # more queries than there are
        ([[1], [1]], [2, 2], [1, 2, 3], 9),
        ([[1], [1]], [2, 2], [0, 3, 2], 9),
        ([[1], [1]], [2, 2], [-(2**31), 2**31 - 1, 3], 9),
        ([[1], [1]], [2, 2], [0, 1, 2], 3),  # no room: the last block is not full, nothing is shared
    ],
)
def test_bad_pages(table, lengths, starts, size, ops) -> None:
    """There is no plan, and queries stay where they are; nothing outside the tensors is read or written."""
    given = (i32(table[0] + table[1]).view(2, 1), i32(lengths), i32(starts))
    order, slot, begin, end, count = ops.block_plan(*given, 2, 3, size)
    assert "seq_lens" in recorded() and int(count) == 0 and order.tolist() == [0, 1, 2]
    assert slot.tolist() == [-1] * size and begin.tolist() == end.tolist() == [0] * size


@pytest.mark.parametrize("block", [-1, 2**30, 2**31 - 1])
def test_bad_blocks_of_pages(block, ops) -> None:
    """Their tokens are left out."""
    _, slot, begin, end, count = ops.block_plan(i32([3, block]).view(1, 2), i32([3]), i32([0, 1]), 2, 1, 4)
    assert "block_table" in recorded() and int(count) == 3
    assert slot.tolist() == [6, 7, -1, -1] and begin.tolist() == [0] * 4 and end.tolist() == [1, 1, 0, 0]


def test_values_are_not_compiled_in(ops, monkeypatch) -> None:
    """One kernel serves all values of a search: as many launches, with the same pointers and sizes."""
    if not ops.__name__.endswith("triton"):
        pytest.skip("compiled before it is called")
    names = ("multifurcate", "multifurcation_head", "nucleus", "ordering", "select_beam")
    modules = [importlib.import_module(f"{ops.__name__}.{name}") for name in names]
    launch = modules[0].launch  # type: ignore[attr-defined]
    seen: list[list[tuple[Any, ...]]] = []

    def watch(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        shapes = [(x.dtype, x.stride()) if isinstance(x, Tensor) else x for x in args]
        seen[-1].append((kernel, grid, *shapes, *sorted(meta.items(), key=str)))
        launch(kernel, grid, *args, **meta)

    for module in modules:
        monkeypatch.setattr(module, "launch", watch)
    arguments = step(6)
    for top_p, widths in itertools.product((0.2, 0.9), ([1, 1], [4, 3])):
        seen.append([])
        multifurcate(ops, **arguments | {"top_p": torch.full((5,), top_p), "widths": i32(widths)})
    assert len(seen[0]) > 5 and all(str(launches) == str(seen[0]) for launches in seen)
