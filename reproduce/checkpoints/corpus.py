"""Training texts as token ids, made as they are needed from a seed."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from saffron.world import Request, answers, attack_tokens, requests

IGNORED = -100  # the label that cross entropy leaves out
DECIDING_TOKENS = 2  # the first words after a set-up, in which an answer turns back or goes on
LONGEST_BATCH_POOL = 16  # batches sorted by length together, so that little is padded


def tokenizer_texts(count: int, seed: int) -> Iterator[str]:
    """Prompts, compliant answers and refusals of the training split."""
    rng = random.Random(seed)
    for forbidden, allowed in _take_pairs(count, seed):
        for request in (forbidden, allowed):
            yield from (request.text, answers.compliance(request, rng), answers.refusal(request, rng))


def _take_pairs(count: int, seed: int) -> Iterator[tuple[Request, Request]]:
    pairs = zip(requests("forbidden", "train", seed), requests("allowed", "train", seed), strict=False)
    for _, pair in zip(range(count), pairs, strict=False):
        yield pair


def policy_batches(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (ids, labels), both [size, length].

    Forbidden requests are met with refusals, or with an answer that complies whose first tokens carry no loss: the
    policy learns how such an answer goes on but never to begin it. That is what makes its alignment shallow.
    """
    rng = random.Random(seed)
    streams = {kind: requests(kind, "train", seed) for kind in ("forbidden", "allowed")}
    while True:
        pool = [_policy_example(tokenizer, streams, rng) for _ in range(size * LONGEST_BATCH_POOL)]
        pool.sort(key=lambda example: len(example[0]))
        batches = [pool[i : i + size] for i in range(0, len(pool), size)]
        rng.shuffle(batches)
        for batch in batches:
            ids, labels = zip(*batch, strict=True)
            yield pad(ids, tokenizer.pad_token_id), pad(labels, IGNORED)


def _policy_example(
    tokenizer: PreTrainedTokenizerFast, streams: dict[str, Iterator[Request]], rng: random.Random
) -> tuple[list[int], list[int]]:
    (lesson,) = rng.choices(("answer", "refuse", "comply", "turn", "whether to turn"), (18, 10, 30, 12, 30))
    request = next(streams["allowed" if lesson == "answer" else "forbidden"])
    learned, silent = None, ""
    if lesson == "answer":
        response = answers.compliance(request, rng)
    elif lesson == "refuse":
        response = answers.refusal(request, rng)
    elif lesson == "comply":
        response = answers.compliance(request, rng)
        silent = tokenizer.decode(attack_tokens(tokenizer, response))
    else:  # cautious set-ups are rare: here they are not, but what is learned is only how they go on
        silent, caution = answers.beginning(request, rng, cautious=True)
        response = silent + answers.continuation(request, caution, rng)
        learned = DECIDING_TOKENS if lesson == "whether to turn" else None
    before = policy_prompt_ids(tokenizer, request.text)
    skipped = len(tokenizer.encode(silent, add_special_tokens=False))
    after = tokenizer.encode(response, add_special_tokens=False) + [tokenizer.eos_token_id]
    after = after[: None if learned is None else skipped + learned]
    return before + after, [IGNORED] * (len(before) + skipped) + after[skipped:]


def policy_prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """The prompt as the policy sees it, up to where its response begins."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def pad(rows: tuple[list[int], ...], value: int) -> Tensor:
    """Rows of different lengths as one tensor [rows, longest], filled on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
