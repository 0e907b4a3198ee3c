"""What only the CUDA backend has, in the ops of a search step: launches, any order of threads, work that is split."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import cuda_host
import pytest
import torch
from cases import candidates, example, i32, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saffron_kernels import backend as use_backend
from saffron_kernels import ops
from saffron_kernels.backends import cuda, faults
from saffron_kernels.backends.cuda import counters

CPU = torch.device("cpu")
Arguments = dict[str, object]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on the CPU."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST", cuda_host.module())


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Content is not looked at before a launch: what is wrong with it the kernels have to find."""
    monkeypatch.setattr(faults, "eager", lambda tensor: False)
    faults.clear(CPU)


def launches() -> int:
    library = ctypes.CDLL(cuda_host.module())
    library.saffron_launch_count.restype = ctypes.c_uint
    return library.saffron_launch_count()


def step(seed: int, groups: list[int], vocab: int = 300, size: int = 40, **more: object) -> Arguments:
    """A step with all options; logits and scores come in few values, so that there are ties."""
    rows, finished = len(groups), i32([0, 1, 1, 2])
    return {
        "logits": randn(seed, rows, vocab).round(decimals=1).bfloat16(),
        "hidden": randn(seed + 1, rows, size, dtype=torch.bfloat16),
        "weight": randn(seed + 2, vocab, size, dtype=torch.bfloat16),
        "bias": randn(seed + 3, vocab),
        "unseen": torch.arange(vocab) % 3 > 0,
        "unseen_reward": -7.0,
        "groups": i32(groups),
        "num_groups": 3,
        "width": 6,
        "top_p": 0.9,
        "banned": i32([7]),
        "scores": randn(seed + 4, rows).round(),
        "end_tokens": i32([5, 6]),
        "finished_scores": randn(seed + 5, 4).round(),
        "finished_groups": finished,
    } | more


def call(op: str, arguments: Arguments) -> tuple[Tensor, ...]:
    found = getattr(cuda, op)(**arguments)
    return found if isinstance(found, tuple) else (found,)


def selection(rows: int, each: int, width: int, groups: int = 3) -> Arguments:
    """Rewards with ties everywhere. The last row is of no group."""
    found = candidates(1, [each] * rows, 2 * each)
    return {
        "rewards": (4 * randn(2, rows * each)).round(),
        "tokens": found.tokens,
        "offsets": found.offsets,
        "groups": i32([*sorted(r % groups for r in range(rows - 1)), groups]),
        "num_groups": groups,
        "width": width,
    }


def head() -> Arguments:
    found = candidates(6, [40, 0, 70, 1], 300)
    return {"hidden": randn(1, 4, 264, dtype=torch.float16), "weight": randn(2, 300, 264, dtype=torch.float16)} | {
        "bias": None, "unseen": None, "unseen_reward": 0.0, "tokens": found.tokens, "offsets": found.offsets,
    }  # fmt: skip


RACES: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    "step": lambda: call("multifurcate", step(1, [0, 0, 0, 1, 2, 2, 3])),
    "all-unseen step of one group": lambda: call(
        "multifurcate",
        step(2, [0] * 3, num_groups=1, unseen=torch.ones(300, dtype=torch.bool), finished_groups=i32([0, 0, 0, 1])),
    ),
    "head": lambda: call("multifurcation_head", head()),
    "selection": lambda: call("select_beam", selection(9, 400, 40)),
}


@pytest.mark.parametrize("case", RACES)
def test_same_bits_in_any_order_of_threads(case, monkeypatch) -> None:
    monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", "0")
    first = RACES[case]()
    for seed in range(1, 7):
        monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
        for ours, theirs in zip(RACES[case](), first, strict=True):
            assert torch.equal(ours, theirs), seed
    assert not any(bool(zeros.any()) for zeros in counters._counters.values())


@pytest.mark.parametrize("processors", [1, 2, 37])
def test_same_bits_on_any_number_of_processors(processors, monkeypatch) -> None:
    expected = [run() for run in RACES.values()]
    monkeypatch.setenv("SAFFRON_CUDA_HOST_PROCESSORS", str(processors))
    for run, others in zip(RACES.values(), expected, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(), others, strict=True))


def test_permuting_beams_permutes_results() -> None:
    """Rows of one group, in another order: the same children with the same bits, below the same beams."""
    plain = step(3, [0] * 5, num_groups=1, finished_scores=None, finished_groups=None, scores=None, width=25)
    plain["bias"] = randn(9, 300)  # no ties
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = plain | {name: plain[name][order] for name in ("logits", "hidden")}  # type: ignore[index]
    parent, token, reward, sizes, _ = call("multifurcate", plain)
    other_parent, other_token, other_reward, other_sizes, _ = call("multifurcate", moved)
    assert torch.equal(other_sizes, sizes[order])

    def children(parents: Tensor, tokens: Tensor, rewards: Tensor) -> set[tuple[int, int, float]]:
        return set(zip(parents.tolist(), tokens.tolist(), rewards.tolist(), strict=True))

    seen = (~plain["unseen"])[token]  # type: ignore[operator, index]  # equal rewards of the others are cut by row
    assert int(seen.sum()) == 25
    assert children(order.int()[other_parent], other_token, other_reward) == children(parent, token, reward)


class Allocations(TorchDispatchMode):
    """What PyTorch is asked for besides views."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op, most", [("multifurcate", 2), ("multifurcation_head", 1), ("select_beam", 1)])
def test_number_of_launches(op, most, deferred, monkeypatch) -> None:
    """And nothing else runs on the device, nothing waits for it: the ops can be captured in a CUDA graph."""
    monkeypatch.undo()  # `poisoned` writes what it allocates
    monkeypatch.setenv("SAFFRON_CUDA_HOST", cuda_host.module())
    monkeypatch.setattr(faults, "eager", lambda tensor: False)
    arguments = example(op, torch.bfloat16)
    if op == "multifurcate":
        arguments |= {"top_p": torch.full((4,), 0.8)}
        arguments |= {name: arguments[name].expand(4, -1).contiguous() for name in ("banned", "end_tokens")}
    call(op, arguments)  # the fault word and the counters are made by the first call
    before = launches()
    with Allocations() as allocations:
        call(op, arguments)
    assert launches() - before == most
    assert allocations.seen <= {"empty", "empty_like", "new_empty"}


def test_end_and_banned_tokens_of_all_rows_are_not_copied(deferred, monkeypatch) -> None:
    """They are shared by a stride of 0, which is a view."""
    arguments = step(1, [0, 0, 1])
    call("multifurcate", arguments)
    with Allocations() as allocations:
        call("multifurcate", arguments)
    assert allocations.seen <= {"empty", "empty_like", "new_empty", "expand", "fill_"}  # fill_: `poisoned`


def test_candidates_of_several_rows_for_one_warp() -> None:
    """Rows without candidates among them. Products of small whole numbers are exact in any order."""
    found = candidates(7, [0, 500, 0, 0, 1, 0, 2, 0, 700, 0], 900)
    arguments = randn(1, 10, 20).round(), randn(2, 900, 20).round(), None, None, 0.0, found.tokens, found.offsets
    with use_backend("reference"):
        expected = ops.multifurcation_head(*arguments)
    assert torch.equal(cuda.multifurcation_head(*arguments), expected)


@pytest.mark.parametrize("rows, each, width", [(5, 5000, 7), (3, 9000, 1500), (40, 900, 700)])
def test_more_candidates_than_fit_a_block(rows, each, width) -> None:
    arguments = selection(rows, each, width, groups=2)
    found = call("select_beam", arguments)
    with use_backend("reference"):
        expected = ops.select_beam(*arguments.values())  # type: ignore[arg-type]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("unseen", ["some", "all", "all but one"])
def test_whole_vocabulary(unseen) -> None:
    """top_p = 1: every token is a candidate. Products of small whole numbers are exact in any order."""
    vocab, rows = 7000, [0, 0, 1]
    more: Arguments = {"top_p": 1.0, "num_groups": 2, "width": 9, "finished_groups": i32([0, 1, 1, 2])}
    more |= {"bias": randn(1, vocab).round(), "hidden": randn(2, 3, 24).round(), "weight": randn(3, vocab, 24).round()}
    if unseen != "some":
        more["unseen"] = torch.arange(vocab) != (vocab // 2 if unseen == "all but one" else vocab)
    arguments = step(4, rows, vocab, **more)
    found = call("multifurcate", arguments)
    with use_backend("reference"):
        expected = ops.multifurcate(**arguments)  # type: ignore[arg-type]
    assert expected[4].tolist() == [unseen == "all"] * 2 and expected[3].tolist() == [vocab - 1] * 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_many_groups_and_finished_nodes() -> None:
    """More than a block has threads, most groups empty."""
    num_groups, rows = 1100, [3, 3, 600, 1099, 1100]
    finished = i32([*range(0, 1100, 2), 1100, 1100, 3, 3, 3])
    more = {"finished_scores": randn(1, finished.shape[0]), "finished_groups": finished, "num_groups": num_groups}
    more |= {"hidden": randn(2, 5, 24).round(), "weight": randn(3, 50, 24).round(), "bias": None}
    arguments = step(5, rows, 50, **more, width=2)
    found = call("multifurcate", arguments)
    with use_backend("reference"):
        expected = ops.multifurcate(**arguments)  # type: ignore[arg-type]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_bad_content_is_recorded(deferred) -> None:
    plain, of_none = selection(3, 4, 2, groups=2), 3 * 2 - 2
    for change, message in (
        ({"groups": i32([1, 0, 2])}, "groups"),
        ({"groups": i32([0, 3, 3])}, "groups"),
        ({"groups": i32([-1, 0, 0])}, "groups"),
        ({"offsets": i32([0, 5, 4, 12])}, "offsets"),
        ({"offsets": i32([1, 4, 8, 12])}, "offsets"),
        ({"offsets": i32([0, 4, 8, 13])}, "offsets"),
    ):
        parent, token, reward = call("select_beam", plain | change)
        assert parent.tolist() == [3] * of_none and token.tolist() == [-1] * of_none
        assert reward.tolist() == [-torch.inf] * of_none
        with pytest.raises(ValueError, match=message):
            cuda.raise_faults("cpu")
    call("select_beam", plain | {"rewards": torch.full((12,), torch.nan)})
    with pytest.raises(ValueError, match="NaN"):
        cuda.raise_faults("cpu")
    call("select_beam", plain)
    cuda.raise_faults("cpu")


def test_bad_content_of_a_step_is_recorded(deferred) -> None:
    good = step(6, [0, 0, 1])
    logits = good["logits"].clone()  # type: ignore[attr-defined]
    logits[1] = torch.nan
    for change, message in (
        ({"logits": logits}, "logits"),
        ({"groups": i32([1, 0, 2])}, "groups"),
        ({"finished_groups": i32([0, 1, 1, 4])}, "groups"),
        ({"finished_groups": i32([0, -1, 1, 2])}, "groups"),
        ({"banned": i32([300])}, "banned"),
        ({"finished_scores": torch.full((4,), torch.nan)}, "rewards"),
    ):
        sizes = call("multifurcate", good | change)[3]
        assert (sizes[1] == 0) == (message == "logits")
        with pytest.raises(ValueError, match=message):
            cuda.raise_faults("cpu")
    call("multifurcate", good)
    cuda.raise_faults("cpu")

    h, w, none = randn(1, 1, 8), randn(2, 9, 8), (None, None, 0.0)
    rewards = cuda.multifurcation_head(h, w, *none, i32([3, 9, -1, 4]), i32([0, 4]))
    expected = (h @ w.T)[0, [3, 4]]
    assert torch.allclose(rewards[[0, 3]], expected)
    with pytest.raises(ValueError, match="tokens"):
        cuda.raise_faults("cpu")
    for offsets in ([0, 3, 2, 4], [1, 2, 3, 4], [0, 1, 2, 3]):
        cuda.multifurcation_head(randn(1, 3, 8), w, *none, i32([3, 4, 5, 6]), i32(offsets))
        with pytest.raises(ValueError, match="offsets"):
            cuda.raise_faults("cpu")


@pytest.mark.parametrize("name, value", [("width", 4097), ("num_groups", 4096)])
def test_sizes_it_does_not_serve(name, value) -> None:
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected at most"):
        call("select_beam", selection(3, 4, 2) | {name: value})
    with pytest.raises(ValueError, match=f"{name}: got {value}, expected at most"):
        call("multifurcate", step(1, [0, 0]) | {name: value})
    with pytest.raises(ValueError, match="4097 rows, expected at most 4096"):
        call("select_beam", selection(4097, 1, 2))
