"""What holds for every op alike: registration, compilation, fake tensors, inference only, errors before effects."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import example, gaps
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import saffron_kernels
from saffron_kernels import ops

NAMES = [
    "append_kv",
    "tree_attention",
    "merge_attention",
    "gather_kv",
    "nucleus",
    "multifurcation_head",
    "select_beam",
    "multifurcate",
    "advance_tree",
    "block_plan",
]
INDICES_ONLY = {"advance_tree", "block_plan"}
IN_PLACE = {"append_kv": ("k_cache", "v_cache")}
Arguments = dict[str, Any]


@pytest.fixture(params=NAMES)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def arguments(op: str, dtype: torch.dtype, device: torch.device) -> Arguments:
    if op in INDICES_ONLY and dtype != torch.float32:
        pytest.skip("indices only: once is enough")
    return example(op, dtype, device)


def registered(op: str) -> Callable[..., Any]:
    return getattr(torch.ops.saffron_kernels, op).default


def clone(arguments: Arguments) -> Arguments:
    return tree_map_only(Tensor, torch.clone, arguments)


def same(a: object, b: object) -> bool:
    """Tensors bit for bit, but any NaN equals any NaN."""
    one, other = tree_leaves(a), tree_leaves(b)
    return len(one) == len(other) and all(
        torch.equal(torch.nan_to_num(x, 0.5), torch.nan_to_num(y, 0.5)) and torch.equal(x.isnan(), y.isnan())
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else x == y
        for x, y in zip(one, other, strict=True)
    )


def outputs(op: str, arguments: Arguments, result: object) -> list[Tensor]:
    return [arguments[name] for name in IN_PLACE.get(op, ())] or tree_leaves(result)


def test_every_op_is_here() -> None:
    assert set(NAMES) <= set(saffron_kernels.__all__)
    defined = {name for name, f in vars(ops).items() if inspect.isfunction(f) and f.__module__ == ops.__name__}
    assert {name for name in defined if not name.startswith("_")} == set(NAMES)


def test_example_has_the_arguments_of_the_schema(op) -> None:
    schema = [a.name for a in registered(op)._schema.arguments]
    assert list(example(op, torch.float32)) == schema == list(inspect.signature(getattr(ops, op)).parameters)


def test_opcheck(op, arguments, backend, dtype, limit) -> None:
    if limit < 1 << 30 and dtype != torch.float32:
        pytest.skip("interpreted: what is checked is the op around the kernels, once is enough")
    torch.library.opcheck(registered(op), tuple(arguments.values()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(op, arguments, backend, dtype, dynamic) -> None:
    if dynamic and dtype != torch.float32:
        pytest.skip("once is enough")
    function = getattr(ops, op)
    compiled_arguments = clone(arguments)
    expected = function(**arguments)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    result = compiled(**compiled_arguments)
    assert same(outputs(op, compiled_arguments, result), outputs(op, arguments, expected))


def test_fake_agrees_with_real(op, arguments, backend) -> None:
    with FakeTensorMode(
        allow_non_fake_inputs=False, shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()
    ) as mode:
        fake = registered(op)(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments.values()))
    real = registered(op)(*arguments.values())
    fake, real = tree_leaves(fake), tree_leaves(real)
    assert len(fake) == len(real)
    for f, r in zip(fake, real, strict=True):
        assert f is r is None or (f.dtype, f.device, f.dim()) == (r.dtype, r.device, r.dim())
        for i in range(0 if r is None else r.dim()):
            assert not isinstance(f.shape[i], int) or f.shape[i] == r.shape[i]
            assert not isinstance(f.stride(i), int) or f.stride(i) == r.stride(i)


def test_meta_tensors(op, arguments) -> None:
    if op in ("nucleus",):
        pytest.skip("its output size is only known to the kernel")
    result = registered(op)(*tree_map_only(Tensor, lambda x: x.to("meta"), list(arguments.values())))
    real = registered(op)(*arguments.values())
    for m, r in zip(tree_leaves(result), tree_leaves(real), strict=True):
        assert m is r is None or (m.shape, m.dtype) == (r.shape, r.dtype)


def test_inputs_are_left_alone(op, arguments, backend) -> None:
    before = clone(arguments)
    getattr(ops, op)(**arguments)
    for name in set(arguments) - set(IN_PLACE.get(op, ())):
        assert same(arguments[name], before[name]), name


def test_same_input_same_bits(op, arguments, backend) -> None:
    again = clone(arguments)
    expected, result = getattr(ops, op)(**arguments), getattr(ops, op)(**again)
    assert same(outputs(op, arguments, expected), outputs(op, again, result))


def test_strides_do_not_matter(op, arguments, backend) -> None:
    spread = tree_map_only(Tensor, gaps, arguments)
    expected, result = getattr(ops, op)(**arguments), getattr(ops, op)(**spread)
    pairs = zip(outputs(op, arguments, expected), outputs(op, spread, result), strict=True)
    for x, y in pairs:
        eps = torch.finfo(x.dtype).eps if x.is_floating_point() else 0
        assert torch.allclose(x.double(), y.double(), rtol=8 * eps, atol=8 * eps, equal_nan=True)
        assert op in IN_PLACE or x.stride() == y.stride()


def test_gradients_are_refused(op, arguments, backend, dtype) -> None:
    """Whichever argument requires one; and nothing was written. Where gradients are off, outputs have none."""
    floating = [name for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]
    before = clone(arguments)
    for name in floating:
        wanting = arguments | {name: arguments[name].clone().requires_grad_()}
        functions = [getattr(ops, op)]
        if dtype == torch.float32:
            torch._dynamo.reset()
            functions.append(torch.compile(functions[0], fullgraph=True, backend="aot_eager"))
        for function in functions:
            with pytest.raises(RuntimeError, match=rf"{op}: {name} requires a gradient.*no_grad.*DynamicCache"):
                function(**wanting)
        assert same(arguments, before)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                result = getattr(ops, op)(**clone(wanting))
            for output in filter(torch.is_tensor, tree_leaves(result)):
                assert not output.requires_grad and output.grad_fn is None


def wrong_ways(name: str, x: Tensor) -> list[tuple[str, Tensor]]:
    other_device = "meta" if x.device.type == "cpu" else "cpu"
    integer = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
    ways = [
        ("shape", x[None]),
        ("shape", x.flatten()[:0].reshape(0, 0, 0, 0)),
        ("dtype", integer),
        ("device", x.to(other_device)),
    ]
    if not x.is_floating_point():
        ways.append(("dtype", x.float()))
    return ways


def test_wrong_tensors_are_named(op, arguments, device) -> None:
    """Every tensor in turn gets a wrong shape, dtype or device: the error names it, and nothing was written."""
    before = clone(arguments)
    missed = []
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            continue
        for what, wrong in wrong_ways(name, x):
            try:
                registered(op)(*(arguments | {name: wrong}).values())
            except (ValueError, TypeError) as error:
                # Of two tensors on different devices either may be the wrong one.
                if name not in str(error) and what != "device":
                    missed.append(f"{name}, wrong {what}: does not say so: {error}")
            except Exception as error:  # noqa: BLE001
                missed.append(f"{name}, wrong {what}: {type(error).__name__}: {error}")
            else:
                missed.append(f"{name}, wrong {what} ({wrong.dtype}, {list(wrong.shape)}): accepted")
        assert same(arguments, before), f"{name}: something was written before the error"
    assert not missed, "\n".join(missed)


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("op", ["nucleus", "multifurcate"])
def test_overload_with_parameters_of_each_row(op, dtype, device, backend) -> None:
    """`top_p` as a tensor: the same schema else; it compiles whole, and other values do not compile it again."""
    arguments = example(op, dtype, device)
    rows = arguments["logits"].shape[0]
    arguments["top_p"] = torch.linspace(0.3, 1, rows, dtype=torch.float64, device=device)
    for name in ("banned", "end_tokens"):
        if name in arguments:
            arguments[name] = torch.stack([arguments[name], arguments[name] * 0 - 1] * (rows // 2))
    overload = getattr(torch.ops.saffron_kernels, op).rows
    types = [(a.name, str(a.type)) for a in overload._schema.arguments]
    assert types == [(a.name, "Tensor" if a.name == "top_p" else str(a.type)) for a in registered(op)._schema.arguments]
    torch.library.opcheck(overload, tuple(arguments.values()))

    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager")
    assert same(compiled(**arguments), getattr(ops, op)(**arguments))
    others = arguments | {"top_p": arguments["top_p"].flip(0)}
    with torch.compiler.set_stance("fail_on_recompile"):
        assert same(compiled(**others), getattr(ops, op)(**others))
