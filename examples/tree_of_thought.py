"""Tree of thoughts by hand with KVTrie and the ops (breadth first, after Yao et al., arXiv 2305.10601).

    python examples/tree_of_thought.py

A thought is LENGTH tokens drawn from the policy's nucleus. Every round the states propose KEEP * BRANCH thoughts, the
guard values them, and the best KEEP go on. States share the K and V of what they have in common; dropped ones free
their slots with the next token. The answer is forced to begin with compliance, and the tree looks for a way out of it.
"""

import numpy as np
import torch

from saffron import load_bundled, world
from saffron.models.attention import TrieStep
from saffron_kernels import KVTrie, nucleus

ROUNDS, KEEP, BRANCH, LENGTH = 5, 8, 4, 6


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    policy, _, guard = load_bundled()
    model, config, ends = policy.model, policy.model.config, torch.tensor(policy.eos_token_id, dtype=torch.int32)
    kv = KVTrie(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)

    def forward(tokens, step):  # all states are one row: next-token logits [states, vocab]
        return model(tokens[None], **TrieStep(kv, step).arguments()).logits[0]

    def draw(logits):  # one token for each row, from its nucleus
        tokens, probabilities, offsets = nucleus(logits, 0.8, ends)
        rows = zip(
            tokens.tensor_split(offsets[1:-1].long()), probabilities.tensor_split(offsets[1:-1].long()), strict=True
        )
        return np.array([int(ids[torch.multinomial(p, 1)]) for ids, p in rows], dtype=np.int32)

    example = world.examples("forbidden", "heldout", 1, seed=3)[0]
    opening = world.attack_tokens(policy.tokenizer, example.target)
    print(f"{example.prompt}\n{policy.decode(opening)} ...")

    fill = kv.insert([policy.chat(example.prompt, opening)])
    logits, (beams, _) = forward(fill.tokens, fill.step)[fill.last], kv.beams(fill.leaves)
    texts, states = [[]], np.zeros(1, dtype=np.int32)
    for round_ in range(1, ROUNDS + 1):
        parents = np.repeat(states, KEEP * BRANCH // len(states))
        for _ in range(LENGTH):
            tokens = draw(logits[parents])
            beams, step = kv.advance(beams, parents, tokens)
            logits = forward(torch.from_numpy(tokens), step)
            texts = [[*texts[p], int(t)] for p, t in zip(parents, tokens, strict=True)]
            parents = np.arange(len(texts), dtype=np.int32)
        values = guard.score([(example.prompt, policy.decode(text)) for text in texts])
        states = values.topk(KEEP).indices.sort().values.numpy().astype(np.int32)
        print(f"\nround {round_}: {len(texts)} states in {kv.num_nodes} slots; the best {KEEP}, by value:")
        for value, text in sorted({(float(values[i]), policy.decode(texts[i])) for i in states}):
            print(f"{value:+6.2f} ...{text}")


if __name__ == "__main__":
    main()
