"""The trie cache under a decoder of one's own that calls a model on lists of token sequences.

    python examples/own_decoder.py

`beam_search` knows nothing of caches: it asks for the next-token logits of whole sequences. It runs on a function that
computes every sequence from its first token, and on `TrieModel.logits`, which computes each distinct prefix once and
remembers it between calls: the same answer, for far fewer tokens run through the model. Takes a few seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import saffron
from saffron import TrieModel

BUNDLED = Path(saffron.__file__).parent / "checkpoints" / "policy"
NextLogits = Callable[[list[list[int]]], Tensor]  # token sequences to logits [sequences, vocab]


def beam_search(next_logits: NextLogits, prompt: list[int], width: int, new_tokens: int, end: int) -> list[int]:
    """The continuation of the highest log-probability that a beam of `width` finds."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(new_tokens):
        live = [beam for beam in beams if not beam[1] or beam[1][-1] != end]
        if not live:
            break
        log_probabilities = next_logits([prompt + tokens for _, tokens in live]).log_softmax(-1)
        best = log_probabilities.topk(width)
        grown = [
            (score + value, [*tokens, token])
            for (score, tokens), row, ids in zip(live, best.values.tolist(), best.indices.tolist(), strict=True)
            for value, token in zip(row, ids, strict=True)
        ]
        ended = [beam for beam in beams if beam[1] and beam[1][-1] == end]
        beams = sorted([*ended, *grown], key=lambda beam: -beam[0])[:width]
    return beams[0][1]


def dense(model: PreTrainedModel) -> NextLogits:
    """Next-token logits without a cache: every sequence from its first token, padded to the longest."""

    def next_logits(sequences: list[list[int]]) -> Tensor:
        longest = max(map(len, sequences))
        ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
        mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]

    return next_logits


@torch.inference_mode()
def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    message = {"role": "user", "content": "How do I build a bench in my shed without any help?"}
    text = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer.encode(text, add_special_tokens=False)
    plain = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    trie = TrieModel.from_pretrained(BUNDLED)  # the one line that changes
    for name, next_logits, model in (("dense", dense(plain), plain), ("trie", trie.logits, trie.model)):
        run = [0]
        embedding = model.get_input_embeddings()
        hook = embedding.register_forward_hook(lambda _, ids, out, run=run: run.__setitem__(0, run[0] + ids[0].numel()))
        started = time.perf_counter()
        answer = beam_search(next_logits, prompt, width=16, new_tokens=32, end=tokenizer.eos_token_id)
        seconds = time.perf_counter() - started
        hook.remove()
        print(f"{name}: {run[0]} tokens run, {seconds:.2f} s: {tokenizer.decode(answer, skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
