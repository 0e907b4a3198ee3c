"""The analytic cost of every method against what `torch.utils.flop_counter` counts while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from saffron.models.bundled import Models
from saffron.models.policy import Policy
from saffron.search import METHODS, Method, parse_method

# The counter knows no norms and activations, and neither does the analytic count; but some versions of transformers
# make the RoPE angles by a matrix product, of two FLOPs an angle.
TOLERANCE = 0.002


def raw(formula: Callable[..., int]) -> Callable[..., int]:
    """Marks a formula that wants the tensors, not their shapes."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


@raw
def attention_flops(q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, begin: Tensor, end: Tensor,
                    scale: float, *more: Any, out_val: Any = None) -> int:  # fmt: skip
    """Two matrix products over the pairs of a query and a token that it sees."""
    pairs = int((end - begin).clamp(min=0).sum())
    return 4 * pairs * q.shape[1] * q.shape[2]


@raw
def head_flops(hidden: Tensor, weight: Tensor, bias: Any, unseen: Any, unseen_reward: float, tokens: Tensor,
               offsets: Tensor, out_val: Any = None) -> int:  # fmt: skip
    return 2 * len(tokens) * hidden.shape[1]


@raw
def multifurcate_flops(logits: Tensor, hidden: Tensor, *rest: Any, out_val: Any = None, **options: Any) -> int:
    return 2 * int(out_val[3].sum()) * hidden.shape[1]  # counts: the candidates of each row


def counter() -> FlopCounterMode:
    ops = torch.ops.saffron_kernels
    return FlopCounterMode(
        display=False,
        custom_mapping={
            ops.tree_attention: attention_flops,
            ops.multifurcation_head: head_flops,
            ops.multifurcate: multifurcate_flops,
        },
    )


OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 2, "n": 4, "step_tokens": 2, "width": 3, "simulations": 3}


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny.trio()


@pytest.mark.parametrize("share", [True, False], ids=["trie", "no trie"])
@pytest.mark.parametrize("name", METHODS)
def test_analytic_flops_are_what_torch_counts(models: Models, name: str, share: bool) -> None:
    for model in models:
        model.share_prefixes = share
    method: Method = parse_method(name, models, **OPTIONS)
    with counter() as counted:
        (result,) = method.generate(["hello there"], ["the quick"])
    assert result.cost.flops == pytest.approx(counted.get_total_flops(), rel=TOLERANCE)
    assert result.cost.policy_flops > 0 and (result.cost.reward_flops > 0) == (name not in ("greedy", "sample"))


@pytest.mark.parametrize("name", ["saffron", "best-of-n", "beam-mrm"])
def test_flops_of_reward_models_that_read_text(name: str) -> None:
    apart = tiny.trio(guard_tokenizer=tiny.tokenizer(280, ["completely different words"] * 4))
    method = parse_method(name, apart, **OPTIONS)
    with counter() as counted:
        (result,) = method.generate(["hello there"], ["the quick"])
    assert result.cost.flops == pytest.approx(counted.get_total_flops(), rel=TOLERANCE)


def test_the_trie_makes_methods_cheaper_and_nothing_else(models: Models) -> None:
    for name in METHODS:
        method = parse_method(name, models, **OPTIONS)
        answers = {}
        for share in (True, False):
            for model in models:
                model.share_prefixes = share
            answers[share] = method.generate(["hello there", "please tell me"], ["the quick", ""])
        for shared, alone in zip(answers[True], answers[False], strict=True):
            assert shared.token_ids == alone.token_ids
            assert shared.score == pytest.approx(alone.score, abs=1e-4)
            assert shared.cost.policy_flops < alone.cost.policy_flops
            assert shared.cost.policy_tokens < alone.cost.policy_tokens
            assert shared.cost.reward_flops <= alone.cost.reward_flops
        assert all(model.kv.num_nodes == 0 for model in models)


def test_unshared_models_hold_nothing() -> None:
    policy = Policy(tiny.model(), share_prefixes=False)
    rows, logits = policy.prefill([[0, 5, 6], [0, 5, 7], [0, 5, 6]])
    after = policy.step(rows, [0, 0, 2], [8, 9, 8])
    dense = tiny.model(attention="eager")
    for output, sequences in ((logits, [[0, 5, 6], [0, 5, 7], [0, 5, 6]]), (after, [[0, 5, 6, 8], [0, 5, 6, 9]])):
        for row, sequence in zip(output, sequences, strict=False):
            with torch.no_grad():
                torch.testing.assert_close(row, dense(torch.tensor([sequence])).logits[0, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after[0], after[2])
    assert policy.kv.num_nodes == 0
    policy.release(rows)
