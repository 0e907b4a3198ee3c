"""`TrieModel.logits`: next-token logits for decoders that call a model on lists of token sequences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tiny
import torch

from saffron import TrieModel
from saffron.errors import ConfigError
from saffron_kernels import CacheFullError

NextLogits = Callable[[list[list[int]]], torch.Tensor]


def dense(model: torch.nn.Module) -> NextLogits:
    def next_logits(sequences: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.stack([model(torch.tensor([tokens])).logits[0, -1] for tokens in sequences])

    return next_logits


def count_tokens(model: TrieModel) -> list[int]:
    """Grows by the number of tokens run in each forward pass."""
    run: list[int] = []
    model.model.get_input_embeddings().register_forward_hook(lambda _, ids, out: run.append(ids[0].numel()))
    return run


@pytest.mark.parametrize("capacity", [256, 24])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_equal_to_a_dense_forward_pass_whatever_was_asked_before(architecture: str, capacity: int) -> None:
    ours = TrieModel(tiny.model(architecture), capacity=capacity)
    theirs = dense(tiny.model(architecture, attention="sdpa"))
    generator = np.random.default_rng(0)
    asked = [[0, 5]]
    for _ in range(12):  # old sequences, their prefixes and new ones, equal ones among them
        chosen = [asked[i] for i in generator.integers(0, len(asked), size=5)]
        chosen = [s[: generator.integers(1, len(s) + 1)] + generator.integers(2, 90, size=2).tolist() for s in chosen]
        chosen += [chosen[0], asked[-1]]
        assert (ours.logits(chosen) - theirs(chosen)).abs().max() <= 1e-4
        asked += chosen


def test_only_what_no_cached_sequence_begins_with_is_run() -> None:
    ours = TrieModel(tiny.model())
    run = count_tokens(ours)
    ours.logits([[0, 5, 6, 7], [0, 5, 6, 8]])
    ours.logits([[0, 5, 6, 7, 9], [0, 5, 6, 7, 10], [0, 5, 6, 8, 9]])
    ours.logits([[0, 5, 6, 8, 9]])  # its K and V are there; the output is made again
    ours.logits([[0, 5, 6, 11]])  # a branch of what was asked for three calls ago
    assert run == [5, 3, 1, 1]
    assert ours.kv.num_nodes == 9


def test_a_full_cache_gives_up_what_was_asked_for_longest_ago() -> None:
    ours, theirs = TrieModel(tiny.model(), capacity=12, grow=False), dense(tiny.model(attention="sdpa"))
    run = count_tokens(ours)
    first, second, third = ([t] * 5 for t in (10, 20, 30))
    for sequences in ([first], [second], [first], [third]):  # the third pushes most of the second out
        assert (ours.logits(sequences) - theirs(sequences)).abs().max() <= 1e-4
    assert run == [5, 5, 1, 5] and ours.kv.capacity == 12
    ours.logits([first])
    assert (ours.logits([second]) - theirs([second])).abs().max() <= 1e-4
    assert run[4:] == [1, 3]  # two of its tokens had room
    with pytest.raises(CacheFullError):
        ours.logits([[t] * 7 for t in (40, 50)])
    assert (ours.logits([second, third]) - theirs([second, third])).abs().max() <= 1e-4


def test_memory_is_bounded_by_what_one_call_needs() -> None:
    ours = TrieModel(tiny.model(), capacity=8)
    generator = np.random.default_rng(0)
    for _ in range(40):
        ours.logits(generator.integers(2, 90, size=(4, 8)).tolist())
    assert ours.kv.capacity <= 2 * 4 * 8 and ours.kv.index.num_held == 0


def test_rewards_of_a_reward_model() -> None:
    _, mrm = tiny.pair()
    theirs = tiny.model(seed=1, attention="sdpa", hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    sequences = [[0, 5, 6, 7], [0, 5], [0, 5, 6, 8]]
    assert mrm.bias is not None
    assert (mrm.logits(sequences) - dense(theirs)(sequences) - mrm.bias).abs().max() <= 1e-4
    mrm.bias = None
    assert (mrm.logits(sequences) - dense(theirs)(sequences)).abs().max() <= 1e-4


def test_the_result_is_an_ordinary_tensor() -> None:
    policy, mrm = tiny.pair()
    for model in (policy, mrm):
        logits = model.logits([[0, 5], [0, 6]])
        logits[:, 1] = -torch.inf
        assert logits.shape == (2, 97) and not logits.requires_grad
        assert model.logits([[0, 5], [0, 6]])[:, 1].isfinite().all()


def test_bad_sequences_are_named() -> None:
    ours = TrieModel(tiny.model())
    with pytest.raises(ConfigError, match="sequences: got none"):
        ours.logits([])
    for bad in ([], [-1], [97]):
        with pytest.raises(ConfigError, match=r"sequences\[1\]"):
            ours.logits([[0], bad])


class Decoder:
    """A decoder as such code is often written: every live response of a step in one call of each model, whole.

    Keeps the `width` responses that the second model likes best among the likely tokens of the first.
    """

    def __init__(self, policy: NextLogits, reward: NextLogits, width: int) -> None:
        self.policy, self.reward, self.width = policy, reward, width

    def __call__(self, prompt: list[int], reward_prompt: list[int], steps: int) -> list[list[int]]:
        beam: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(steps):
            done = [(score, tokens) for score, tokens in beam if tokens[-1:] == [1]]
            live = [tokens for _, tokens in beam if tokens[-1:] != [1]]
            if not live:
                break
            likely = self.policy([prompt + tokens for tokens in live]).softmax(-1).topk(6).indices
            rewards = self.reward([reward_prompt + tokens for tokens in live]).gather(1, likely)
            grown = [
                (reward, [*tokens, token])
                for tokens, ids, row in zip(live, likely.tolist(), rewards.tolist(), strict=True)
                for token, reward in zip(ids, row, strict=True)
            ]
            beam = sorted(done + grown, key=lambda entry: -entry[0])[: self.width]
        return [tokens for _, tokens in beam]


@pytest.mark.parametrize("width", [1, 3, 8])
def test_a_decoder_that_knows_nothing_of_caches_gives_the_same_answers(width: int) -> None:
    policy, mrm = tiny.pair()
    small = tiny.model(seed=1, attention="sdpa", hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    bias = mrm.bias
    slow = Decoder(dense(tiny.model(attention="sdpa")), lambda s: dense(small)(s) + bias, width)
    fast = Decoder(policy.logits, mrm.logits, width)
    run = count_tokens(policy)
    for prompt in ([0, 5, 6, 7], [0, 5, 9]):
        assert fast(prompt, [3, *prompt], 10) == slow(prompt, [3, *prompt], 10)
    assert all(new <= width for new in run[1:10])  # after the prompt every response costs one token a step
