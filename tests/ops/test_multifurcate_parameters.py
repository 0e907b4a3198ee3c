"""A step whose rows and groups have parameters of their own, and NaN in any operand."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from cases import i32, randn
from hypothesis import given
from hypothesis import strategies as st
from steps import check, step

from saffron_kernels import multifurcate, nucleus
from saffron_kernels.checks import compute_dtype

OP = "multifurcate"
pytestmark = pytest.mark.usefixtures("poisoned")


def test_searches_with_their_own_parameters(backend, examples, device, dtype) -> None:
    """Together each has, bit for bit, what it has alone with numbers in place of tensors.

    (But for rewards by the reference: a matrix product may add up in another order in another place.)
    """
    rounding = 64 * torch.finfo(compute_dtype(dtype)).eps if backend == "reference" else 0

    @examples
    @given(st.data(), st.integers(0, 2**20))
    def run(data: st.DataObject, seed: int) -> None:
        groups, vocab, largest = [0, 0, 1, 1, 1, 3, 4], 17, 4  # a group without rows, a row of no group
        rows = len(groups)
        few = st.lists(st.integers(0, vocab - 1), max_size=3, unique=True)
        own = [
            {
                "top_p": data.draw(st.floats(0.05, 1)),
                "width": data.draw(st.integers(1, largest)),
                "banned": data.draw(few),
                "end_tokens": data.draw(few),
            }
            for _ in range(4)
        ]
        unused = own[0]  # step() spoils what the row of no group has
        of_row = [own[g] if g < 4 else unused for g in groups]
        more = {
            "top_p": torch.tensor([p["top_p"] for p in of_row], dtype=torch.float64, device=device),
            "scores": randn(seed + 5, rows, dtype=compute_dtype(dtype), device=device),
            "unseen": torch.arange(vocab, device=device) % 3 != 1,
            "unseen_reward": -7.0,
            "bias": randn(seed + 6, vocab, dtype=dtype, device=device),
        }
        for name in ("banned", "end_tokens"):
            lists = [p[name] + [-1] * (3 - len(p[name])) for p in of_row]
            more[name] = torch.tensor(lists, dtype=torch.int32, device=device)
        arguments = step(groups, 4, largest, vocab, dtype, device, seed, **more)
        arguments["widths"] = i32([p["width"] for p in own], device)
        parent, token, reward, counts, all_unseen = (x.cpu() for x in check(arguments))
        filled = 0
        for g, parameters in enumerate(own):
            mine = [r for r in range(rows) if groups[r] == g]
            rest = {name: arguments[name][mine] for name in ("logits", "hidden", "scores")}
            lists = {name: i32(parameters[name], device) for name in ("banned", "end_tokens")}
            one = {
                "groups": i32([0] * len(mine), device),
                "num_groups": 1,
                "widths": None,
                "top_p": parameters["top_p"],
            }
            alone = check(arguments | rest | lists | one | {"width": parameters["width"]})
            found = int((alone[0] < len(mine)).sum())
            place = slice(filled, filled + found)
            assert [mine[r] for r in alone[0][:found].tolist()] == parent[place].tolist()
            assert torch.equal(alone[1][:found].cpu(), token[place])
            assert torch.allclose(alone[2][:found].cpu(), reward[place], rtol=0, atol=rounding)
            assert alone[3].tolist() == counts[mine].tolist() and bool(alone[4]) == bool(all_unseen[g])
            filled += found

    run()


def test_parameters_of_each_that_are_those_of_all(backend, device, dtype) -> None:
    """The same bits."""
    more = {"banned": i32([3, 9], device), "end_tokens": i32([5, 6], device)}
    more["scores"] = randn(4, 4, dtype=compute_dtype(dtype), device=device)
    arguments = step([0, 0, 1, 1], 2, 3, 29, dtype, device, **more)
    expected = check(arguments)
    each = {name: more[name].expand(4, -1) for name in ("banned", "end_tokens")}
    each |= {"top_p": torch.full((4,), arguments["top_p"], dtype=torch.float64), "widths": i32([3, 3])}
    found = check(arguments | {name: x.to(device) for name, x in each.items()})
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


POISONED = ["logits", "hidden", "weight", "bias", "scores", "finished_scores", "top_p"]


def test_nan_is_refused_where_it_counts(backend, examples, device, dtype) -> None:
    """NaN in one lane of one operand: an error that names it if the step depends on it, else the same bits."""

    @examples
    @given(st.data(), st.sampled_from(POISONED), st.integers(1, 40), st.booleans())
    def run(data: st.DataObject, name: str, size: int, inherit: bool) -> None:
        vocab, rows, wide = 23, 5, compute_dtype(dtype)
        more: dict[str, Any] = {
            "hidden": randn(2, rows, size, dtype=dtype, device=device),
            "weight": randn(3, vocab, size, dtype=dtype, device=device),
            "bias": randn(4, vocab, dtype=dtype, device=device),
            "unseen": torch.arange(vocab, device=device) % 4 == 0,
            "unseen_reward": -3.0,
            "top_p": torch.full((rows,), 0.7, device=device),
            "finished_scores": randn(5, 3, dtype=wide, device=device),
            "finished_groups": i32([0, 1, 2], device),  # the last belongs to no group
            "banned": i32([7], device),
        }
        if inherit:
            more["scores"] = randn(6, rows, dtype=wide, device=device)
            more["end_tokens"] = i32([1, 2, 3, 5], device)
        elif name == "scores":
            return
        arguments = step([0, 0, 1, 1, 2], 2, 3, vocab, dtype, device, **more)
        tokens, _, offsets = nucleus(arguments["logits"][:4], 0.7, arguments["banned"])
        named = list(zip(oracle.rows_of(offsets), tokens.tolist(), strict=True))
        ends = [1, 2, 3, 5] if inherit else []
        all_unseen = multifurcate(**arguments)[4].tolist()
        inheriting = [t in ends or (inherit and all_unseen[r // 2]) for r, t in named]
        scored = [c for c, own in zip(named, inheriting, strict=True) if not own and c[1] % 4]
        place = tuple(data.draw(st.integers(0, n - 1)) for n in arguments[name].shape)
        counts = {
            "logits": place[0] < 4 and place[-1] != 7,
            "hidden": place[0] in [r for r, _ in scored],
            "weight": place[0] in [t for _, t in scored],
            "bias": place[0] in [t for _, t in scored],
            "scores": place[0] in [c[0] for c, own in zip(named, inheriting, strict=True) if own],
            "finished_scores": place[0] < 2,
            "top_p": place[0] < 4,
        }[name]
        spoilt = arguments[name].clone()
        spoilt[place] = torch.nan
        if counts:
            with pytest.raises(ValueError, match="rewards" if name in ("hidden", "weight", "bias") else name):
                multifurcate(**arguments | {name: spoilt})
        else:
            expected, found = multifurcate(**arguments), multifurcate(**arguments | {name: spoilt})
            assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))

    run()
