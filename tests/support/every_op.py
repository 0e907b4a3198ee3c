"""Calls every op on every backend of a device: what a memory checker runs (`python tests/support/every_op.py`).

Small calls of each op with its options and without, and with caches in fp8; then calls just large enough for every
configuration of the kernels: all heights of a tile of rows, tokens split over blocks, a real vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import traceback
from collections.abc import Iterator

import torch
from cases import beams, caches, example, flatten, i32, randn
from torch.utils._pytree import tree_leaves

import saffron_kernels
from saffron_kernels import backends, ops
from saffron_kernels.checks import FP8

Arguments = dict[str, object]
OPTIONS = (
    "count",
    "softcap",
    "sinks",
    "cos",
    "sin",
    "banned",
    "bias",
    "unseen",
    "scores",
    "end_tokens",
    "finished_scores",
    "finished_groups",
    "widths",
)
DTYPES = ["bfloat16", "float16", "float32"]
BACKENDS = [name for name in backends.MODULES if name != "reference"]


def in_fp8(arguments: Arguments) -> Arguments:
    """The same call with caches in fp8."""
    caches = {name: arguments[name].to(FP8) for name in ("k_cache", "v_cache")}  # type: ignore[attr-defined]
    kv_heads, device = caches["k_cache"].shape[1], caches["k_cache"].device
    scales = {name: torch.full((kv_heads,), 0.5, device=device) for name in ("k_scale", "v_scale") if name in arguments}
    return {**arguments, **caches, **scales}


def attention(dtype: torch.dtype, device: torch.device, width: int, prompt: int, head_dim: int) -> Arguments:
    """Beams of 8 query heads over 2 KV heads: 4 rows of a tile a beam."""
    forest = flatten(beams(1, 1, width, prompt, 4), seed=1).to(device)
    k_cache, v_cache = caches(2, forest, 2, head_dim, dtype, device)
    q = randn(3, forest.queries, 8, head_dim, dtype=dtype, device=device)
    plan = {"slot": forest.slot, "begin": forest.begin, "end": forest.end}
    return {"q": q, "k_cache": k_cache, "v_cache": v_cache, **plan, "scale": head_dim**-0.5}


def multifurcation(dtype: torch.dtype, device: torch.device, flat: bool, vocab: int = 128_256) -> Arguments:
    """4 rows of a real vocabulary: nuclei of some tokens, or (`flat`) of most."""
    logits = randn(4, 4, vocab, dtype=dtype, device=device) * (0.01 if flat else 4)
    hidden, weight = (randn(5 + n, n, 64, dtype=dtype, device=device) for n in (4, vocab))
    groups = i32([0, 0, 1, 1], device)
    return {
        **{"logits": logits, "hidden": hidden, "weight": weight, "bias": None, "unseen": None, "unseen_reward": 0.0},
        **{"groups": groups, "num_groups": 2, "width": 3, "top_p": 0.8},
    }


def calls(op: str, dtype: torch.dtype, device: torch.device) -> Iterator[Arguments]:
    """Arguments of every call of one op with products in one dtype."""
    plain = example(op, dtype, device)
    yield plain
    if given := [name for name in OPTIONS if plain.get(name) is not None]:
        yield {**plain, **dict.fromkeys(given)}
    if "k_cache" in plain:
        yield in_fp8(plain)
    if op == "tree_attention":
        for width, prompt, head_dim in ((3, 700, 64), (12, 300, 128), (40, 700, 128), (40, 300, 64), (5, 90, 256)):
            large = attention(dtype, device, width, prompt, head_dim)
            yield large
            yield in_fp8(large)
    if op in ("multifurcate", "nucleus"):
        for flat in (False, True):
            large = multifurcation(dtype, device, flat)
            yield large if op == "multifurcate" else {name: large[name] for name in ("logits", "top_p")}


def storage(arguments: Arguments) -> set[torch.dtype]:
    """The dtypes that a backend has to serve, as `schemas` counts them."""
    named = arguments.items()
    tensors = {name: x for name, x in named if isinstance(x, torch.Tensor) and name not in ("cos", "sin", "sinks")}
    floating = {x.dtype for name, x in tensors.items() if x.is_floating_point() and not name.endswith("_scale")}
    return floating or {next(iter(tensors.values())).dtype}


def compare(op: str, name: str, arguments: Arguments) -> None:
    """Raises unless backend `name` agrees with the reference in what it returns and in what it writes.

    Sums in another order may put the token at the edge of a nucleus on the other side, and exchange two rewards that
    all but agree: of large calls only.
    """
    found = []
    for backend in (name, "reference"):
        given = {key: x.clone() if key.endswith("_cache") else x for key, x in arguments.items()}  # type: ignore[attr-defined]
        with backends.backend(backend):
            result = getattr(saffron_kernels, op)(**given)
        found.append([given["k_cache"], given["v_cache"]] if op == "append_kv" else list(tree_leaves(result)))
    ours, theirs = found
    if op in ("nucleus", "multifurcate") and arguments["logits"].shape[1] > 1000:  # type: ignore[attr-defined]
        sizes = [x[2].diff() if op == "nucleus" else x[3] for x in found]
        assert int((sizes[0] - sizes[1]).abs().max()) <= 1, f"{op} on {name}: nuclei of other sizes"
        if op == "nucleus" and not torch.equal(*sizes):
            return
        ours, theirs = (x[1:2] if op == "nucleus" else [x[2]] for x in found)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), f"{op} on {name}: another form"
        loose = 0.13 if one.dtype == FP8 else 2e-3 if one.dtype == torch.float32 else 2e-2
        tolerance = loose if one.is_floating_point() else 0.0
        pair = (one.double(), other.double())
        torch.testing.assert_close(
            *pair, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{op}: {text}"
        )


def run(op: str, name: str, dtypes: list[torch.dtype], device: torch.device, check: bool) -> int:
    """Calls of one op on one backend; how many there were."""
    called = 0
    for dtype in dtypes:
        for arguments in calls(op, dtype, device):
            if backends.why_not(name, op, device, *storage(arguments)) is not None:
                continue
            called += 1
            if check:
                compare(op, name, arguments)
                continue
            with backends.backend(name):
                getattr(saffron_kernels, op)(**arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()  # so that an error is this op's
    return called


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="only this one; may be repeated")
    parser.add_argument("--op", action="append", choices=ops.NAMES, help="only this one; may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this one; may be repeated")
    parser.add_argument("--check", action="store_true", help="compare each call with the reference; goes on after one")
    args = parser.parse_args()
    dtypes = [getattr(torch, name) for name in args.dtype or DTYPES]
    called, failed = dict.fromkeys(args.backend or BACKENDS, 0), []
    for op, name in itertools.product(args.op or ops.NAMES, called):
        try:
            called[name] += run(op, name, dtypes, args.device, args.check)
        except Exception:  # noqa: BLE001 (what is wrong with one op says nothing of the next)
            if not args.check:
                raise
            traceback.print_exc()
            failed.append(f"{op} on {name}")
    if not any(called.values()) and not failed:
        parser.exit(2, f"no backend runs on {args.device}\n")
    print(", ".join(f"{count} calls on {name}" for name, count in called.items() if count))
    if failed:
        parser.exit(1, f"wrong: {', '.join(failed)}\n")


if __name__ == "__main__":
    main()
