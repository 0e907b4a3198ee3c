"""Bad content of tensors: checked before a launch where that costs no synchronisation, else found by the kernels.

Shapes, dtypes and devices are checked by `saffron_kernels.ops`. What only the content shows (a slot that does not
exist, a row of logits that is NaN) is checked here before anything is written, on the CPU (where tests execute the
kernels of GPUs), and on a GPU if the environment variable `SAFFRON_EAGER_CHECKS` is 1, at the price of waiting for it.

Otherwise a GPU kernel leaves out what it cannot serve, touches nothing outside its tensors, and sets a bit of one word
per device, which `raise_faults` reads when the caller decides. `nucleus`, which synchronises anyway, raises at once.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from saffron_kernels.backends import reference_paged
from saffron_kernels.backends.contents import check_top_ps
from saffron_kernels.checks import expect

SLOT = 1
LOGITS = 2
CANDIDATE = 4
REWARD = 8
GROUP = 16
PLAN = 32
BANNED = 64
WIDTH = 128
TOP_P = 256
PAGES = 512

_MESSAGES = {
    SLOT: "slots: an op was given a slot that does not exist",
    LOGITS: (
        "logits: a row has no finite maximum; every row needs finite logits (no NaN, no +inf) and one token that is "
        "neither -inf nor banned"
    ),
    CANDIDATE: "tokens, offsets: an op was given a token outside the vocabulary of the head, or bad offsets",
    REWARD: (
        "rewards, scores, finished_scores: the reward of a candidate is NaN, by what hidden, weight and bias hold or "
        "by the score that it takes; rewards and scores must be numbers"
    ),
    GROUP: "groups: a row or a finished node belongs to a group that does not exist",
    BANNED: "banned: a token is outside the vocabulary",
    WIDTH: "widths: the width of a group is not from 1 to width",
    TOP_P: "top_p: that of a row is NaN, or not above 0 and at most 1",
    PAGES: (
        "query_start, seq_lens, block_table, size: query_start must ascend from 0 to at most the queries, requests "
        "have as many tokens as queries and blocks that hold them, blocks be at least 0 and their slots fit int32, and "
        "the plan of a paged cache must have room"
    ),
    PLAN: (
        "parents, begin, end, count: parents must ascend from 0, intervals lie within the old queries, and the arrays "
        "of a plan must hold as many tokens as count says, and the new ones behind them"
    ),
}
_EAGER = os.environ.get("SAFFRON_EAGER_CHECKS", "0") == "1"

_words: dict[torch.device, Tensor] = {}


def word(device: torch.device) -> Tensor:
    """The word `[1]` int32 in which kernels on `device` set bits. Its address never changes (CUDA graphs).

    It is made by the first op on a device, which therefore must not be inside a graph capture: warm up before.
    """
    if device not in _words:
        with torch.inference_mode(False):  # otherwise it could not be zeroed outside of that mode
            _words[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return _words[device]


def raise_faults(device: torch.device | str) -> None:
    """Raises what kernels on `device` found since the last call, if anything; waits for the device.

    Raises:
        ValueError: the content of an argument of an earlier op was bad; its results are not to be used.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    recorded = word(device)
    bits = int(recorded.item())
    if bits:
        recorded.zero_()
        raise ValueError("; ".join(message for bit, message in _MESSAGES.items() if bits & bit))


def clear(device: torch.device) -> None:
    """Forgets what was recorded: for an op that says more about it than the record does."""
    word(device).zero_()


def eager(tensor: Tensor) -> bool:
    """Whether content is checked before the launch."""
    return tensor.device.type == "cpu" or _EAGER


def raise_if_eager(tensor: Tensor) -> None:
    """The end of an op whose faults only its kernels can see."""
    if eager(tensor):
        raise_faults(tensor.device)


def check_index(name: str, index: Tensor | None, size: int, lowest: int = 0) -> None:
    """Where content is checked eagerly: every index is from `lowest` to `size - 1`.

    Raises:
        ValueError: one is not.
    """
    if index is not None and eager(index) and index.numel():
        smallest, largest = (int(x) for x in index.aminmax())
        allowed = f"{lowest} to {size - 1}"
        expect(smallest >= lowest and largest < size, name, f"values from {smallest} to {largest}", allowed)


def check_parameters(
    vocab: int,
    top_p: float | Tensor,
    banned: Tensor | None,
    groups: Tensor | None = None,
    num_groups: int = 0,
) -> None:
    """Where content is checked eagerly: `top_p` and `banned`, as `nucleus` takes them, for the rows of a group.

    Raises:
        ValueError: a top_p that is NaN or out of range, or a banned token outside the vocabulary.
    """
    tensors = [x for x in (top_p, banned) if isinstance(x, Tensor)]
    if not tensors or not eager(tensors[0]):
        return
    used = slice(None) if groups is None else groups < num_groups
    if isinstance(top_p, Tensor):
        check_top_ps(top_p[used])  # rows of no group are the last ones
    if banned is not None:
        check_index("banned", banned[used] if banned.dim() == 2 else banned, vocab, lowest=-1)


def check_ascending(name: str, index: Tensor, first: int | None = None, last: int | None = None) -> None:
    """Where content is checked eagerly: `index` ascends, from `first` to `last` if those are given.

    Raises:
        ValueError: it does not.
    """
    if eager(index) and index.numel():
        ends = (first is None or int(index[0]) == first) and (last is None or int(index[-1]) == last)
        allowed = "ascending values" + (f" from {first} to {last}" if last is not None else "")
        expect(ends and not bool((index.diff() < 0).any()), name, "something else", allowed)


def check_numbers(name: str, values: Tensor) -> None:
    """Where content is checked eagerly: no value is NaN.

    Raises:
        ValueError: one is.
    """
    if eager(values) and bool(values.isnan().any()):
        raise ValueError(f"{name} {int(values.isnan().nonzero()[0])} is NaN; rewards must be numbers")


def check_rewards(rewards: Tensor, offsets: Tensor, groups: Tensor, num_groups: int) -> None:
    """Where content is checked eagerly: what `select_beam` is given; rewards of rows of no group are not looked at.

    Raises:
        ValueError: a group that does not exist, offsets that do not fit, or a reward that is NaN.
    """
    check_index("groups", groups, num_groups + 1)
    check_ascending("offsets", offsets, 0, rewards.shape[0])
    if eager(rewards):
        of_none = (groups == num_groups).repeat_interleave(offsets.diff())
        check_numbers("rewards: candidate", rewards.masked_fill(of_none, 0))


def check_count(count: Tensor | None, most: int) -> int:
    """Where content is checked eagerly: `count` holds 0 to `most`.

    Returns:
        how many entries the checks of a plan may look at: those that `count` says; `most`, where there is no `count`,
        or where it is left to the kernels.

    Raises:
        ValueError: it does not.
    """
    if count is None or not eager(count):
        return most
    held = int(count)
    expect(0 <= held <= most, "count", held, f"0 to {most} tokens")
    return held


def check_requests(block_table: Tensor, seq_lens: Tensor, query_start: Tensor, block_size: int, queries: int) -> None:
    """Where content is checked eagerly: the requests of a paged cache, as `block_plan` takes them.

    Raises:
        ValueError: `query_start` does not ascend from 0 to at most `queries`, a request has more queries than tokens or
            more tokens than blocks, or a block that it uses does not exist.
    """
    if eager(block_table):
        table, lengths, starts = block_table.tolist(), seq_lens.tolist(), query_start.tolist()
        reference_paged.check_requests(table, lengths, starts, block_size, queries)
