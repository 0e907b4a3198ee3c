"""A Llama in plain PyTorch over the trie cache, without transformers: the ops in a model of one's own.

    python examples/plain_llama.py

Loads the policy that ships with the package and continues three prompts greedily in one batch, storing what they have
in common once. What differs from any other Llama is `attention`: it writes the K and V of the new tokens into their
slots of the trie and lets every query see what the plan of this forward pass says. Runs in a second.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

import saffron
from saffron_kernels import KVTrie, TreeStep, append_kv, tree_attention

BUNDLED = Path(saffron.__file__).parent / "checkpoints" / "policy"


class Llama:
    """Weights and trie cache of a Llama checkpoint (`config.json` and `model.safetensors`), in fp32."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
        self.embedding = self.weights["model.embed_tokens.weight"]
        self.head = self.weights.get("lm_head.weight", self.embedding)  # absent where tied
        self.layers, self.epsilon = config["num_hidden_layers"], config["rms_norm_eps"]
        self.end = config["eos_token_id"]
        self.head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        exponents = torch.arange(0, self.head_dim, 2) / self.head_dim
        self.frequencies = config["rope_parameters"]["rope_theta"] ** -exponents
        self.trie = KVTrie(self.layers, config["num_key_value_heads"], self.head_dim)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, step: TreeStep) -> Tensor:
        """Next-token logits `[queries, vocab]` of the new tokens `[queries]` of all sequences, in the trie's order."""
        angles = step.positions[:, None] * self.frequencies
        rotation = torch.cat([angles, angles], 1)[:, None]  # [queries, 1, head_dim]
        x = self.embedding[tokens]
        for layer in range(self.layers):
            x = x + self.attention(layer, self.norm(x, f"layers.{layer}.input_layernorm"), rotation, step)
            h = self.norm(x, f"layers.{layer}.post_attention_layernorm")
            gate, up = self.project(h, layer, "mlp.gate_proj"), self.project(h, layer, "mlp.up_proj")
            x = x + self.project(silu(gate) * up, layer, "mlp.down_proj")
        return linear(self.norm(x, "norm"), self.head)

    def attention(self, layer: int, x: Tensor, rotation: Tensor, step: TreeStep) -> Tensor:
        q, k, v = (
            self.project(x, layer, f"self_attn.{name}_proj").view(len(x), -1, self.head_dim) for name in ("q", "k", "v")
        )
        q, k = rotate(q, rotation), rotate(k, rotation)
        append_kv(k, v, step.write_slots, self.trie.k[layer], self.trie.v[layer])
        out, _ = tree_attention(
            q, self.trie.k[layer], self.trie.v[layer], step.slot, step.begin, step.end, self.head_dim**-0.5
        )
        return self.project(out.flatten(1), layer, "self_attn.o_proj")

    def norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, x.shape[-1:], self.weights[f"model.{name}.weight"], self.epsilon)

    def project(self, x: Tensor, layer: int, name: str) -> Tensor:
        return linear(x, self.weights[f"model.layers.{layer}.{name}.weight"])


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE: turns each pair (i, i + head_dim / 2) of `x [queries, heads, head_dim]` by its angle."""
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def decode_greedily(llama: Llama, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """The most probable continuation of each prompt, up to its end token; prompts must differ."""
    trie = llama.trie
    fill = trie.insert(prompts)  # one forward pass over every distinct prefix
    logits = llama.forward(fill.tokens, fill.step)[fill.last]
    beams, beam = trie.beams(fill.leaves)
    answers: list[list[int]] = [[] for _ in prompts]
    row_of_beam = np.argsort(beam)  # the trie numbers beams depth first
    best = logits.argmax(1).numpy()[row_of_beam]
    for _ in range(new_tokens):
        for row, token in zip(row_of_beam, best, strict=True):
            answers[row].append(int(token))
        parents = np.flatnonzero(best != llama.end).astype(np.int32)  # beams without children end here
        beams, step = trie.advance(beams, parents, best[parents].astype(np.int32))
        row_of_beam = row_of_beam[parents]
        if len(parents) == 0:
            break
        best = llama.forward(torch.from_numpy(best[parents]), step).argmax(1).numpy()
    trie.release(beams.nodes, discard=True)
    return answers


def main() -> None:
    llama, tokenizer = Llama(BUNDLED), Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    asked = "<|begin|><|user|>How do I build a bench in my shed without any help?<|end|><|assistant|>"
    texts = [asked, asked + "Certainly, ", asked + "Happy to help, "]
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    answers = decode_greedily(llama, prompts, 32)
    for text, answer in zip(texts, answers, strict=True):
        print(f"{text[len(asked) :]}[{tokenizer.decode(answer).strip()}]")
    wholes = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    slots = len({tuple(whole[:i]) for whole in wholes for i in range(1, len(whole) + 1)})
    print(f"{sum(map(len, wholes))} tokens, {slots} slots: the trie has one for each distinct prefix")


if __name__ == "__main__":
    main()
