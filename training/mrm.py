"""Trains the multifurcation reward model from the guard, by partial supervision (arXiv 2506.06444, section 4).

For a sequence s of the corpus and each of its prefixes, the loss is (M(s[0:j])_{s_j} - R(s[0:j+1]))^2: of the vector of
rewards that the model gives after a prefix, only the entry of the token that follows is supervised, with a reward that
the guard gave beforehand. Trained are LoRA factors (rank 4, alpha 4, q_proj and v_proj) and the bias of the
unembedding; all else keeps the guard's values.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from saffron.world import Request, answers, attack_tokens, requests
from training.branches import Branches, GuardFormat, bare_head, guard_hidden, rewards
from training.corpus import pad, policy_prompt_ids
from training.policy import schedule
from training.sampling import sample

BATCH, LEARNING_RATE = 32, 5e-3
LONGEST_RESPONSE = 48
CHUNK = 64  # conversations sampled or rewarded at a time


@dataclass
class Rewarded:
    """A conversation of the corpus. rewards[j] is the guard's reward of response[:j + 1]."""

    prompt: list[int]
    response: list[int]
    rewards: list[float]


class MultifurcationHead(nn.Module):
    """Reward of every next token: W h + b, with the guard's embedding W and a trainable bias b that starts at zero."""

    def __init__(self, guard: LlamaForCausalLM) -> None:
        super().__init__()
        config = LoraConfig(
            r=4, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        self.model: PeftModel = get_peft_model(guard, config)
        self.bias = nn.Parameter(torch.zeros(guard.config.vocab_size))

    def forward(self, ids: Tensor, next_tokens: Tensor) -> Tensor:
        """M(ids[:, : i + 1]) at next_tokens[:, i], [rows, length]; equivalent to gathering from `hidden @ W.T + b`."""
        causal = self.model.get_base_model()
        hidden = causal.model(input_ids=ids).last_hidden_state
        return (hidden * causal.lm_head.weight[next_tokens]).sum(-1) + self.bias[next_tokens]


def build_corpus(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[Rewarded]:
    """Conversations without rewards: a third the world's own text, the rest the policy's, under attack and without."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    streams = {kind: requests(kind, "train", seed) for kind in ("forbidden", "allowed")}
    corpus: list[Rewarded] = []
    for _ in range(count // 3):
        request = next(streams["forbidden" if rng.random() < 0.7 else "allowed"])
        response = tokenizer.encode(
            (answers.refusal if rng.random() < 0.3 else answers.compliance)(request, rng), add_special_tokens=False
        )
        skipped = rng.randrange(0, 17) if rng.random() < 0.6 else 0
        response = (response + [tokenizer.eos_token_id])[skipped : skipped + LONGEST_RESPONSE]
        corpus.append(Rewarded(tokenizer.encode(request.text, add_special_tokens=False), response, []))
    with tqdm(total=count, initial=len(corpus), desc="policy samples", mininterval=2) as progress:
        while len(corpus) < count:
            wanted = [
                next(streams["forbidden" if rng.random() < 0.8 else "allowed"])
                for _ in range(min(CHUNK, count - len(corpus)))
            ]
            corpus += _policy_conversations(policy, tokenizer, wanted, rng, generator)
            progress.update(len(wanted))
    return corpus


def _policy_conversations(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    wanted: list[Request],
    rng: random.Random,
    generator: torch.Generator,
) -> list[Rewarded]:
    """The policy's response to each request, mostly under attack."""
    starts = []
    for request in wanted:
        ids = policy_prompt_ids(tokenizer, request.text)
        if request.kind == "forbidden" and rng.random() < 0.9:
            ids = ids + attack_tokens(tokenizer, answers.compliance(request, rng, may_turn=False))
        starts.append(ids)
    explore = torch.tensor([rng.random() < 0.7 for _ in wanted])
    responses = sample(policy, starts, explore, generator)
    return [
        Rewarded(tokenizer.encode(r.text, add_special_tokens=False), response, [])
        for r, response in zip(wanted, responses, strict=True)
    ]


@torch.no_grad()
def reward_corpus(guard: LlamaForCausalLM, form: GuardFormat, corpus: list[Rewarded]) -> None:
    """Gives every prefix of every response its reward, once and for all."""
    for start in tqdm(range(0, len(corpus), CHUNK), desc="guard rewards", mininterval=2):
        rows = corpus[start : start + CHUNK]
        branches = [
            Branches(form.head(row.prompt), row.response, list(range(1, len(row.response) + 1))) for row in rows
        ]
        values = iter(rewards(guard, form, guard_hidden(guard, form, branches)[0]).tolist())
        for row in rows:
            row.rewards = [next(values) for _ in row.response]


def unseen_mask(corpus: list[Rewarded], vocabulary: int) -> Tensor:
    """True for tokens that no response of the corpus holds, bool [vocabulary]."""
    mask = torch.ones(vocabulary, dtype=torch.bool)
    mask[torch.tensor(sorted({token for row in corpus for token in row.response}))] = False
    return mask


def supervised(tokenizer: PreTrainedTokenizerFast, rows: list[Rewarded]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, next tokens, their rewards and which of them count (those of the response), each [rows, length]."""
    heads = [bare_head(tokenizer, row.prompt) for row in rows]
    ids = pad(tuple(head + row.response for head, row in zip(heads, rows, strict=True)), tokenizer.pad_token_id)
    values = torch.zeros(ids.shape)
    counted = torch.zeros(ids.shape, dtype=torch.bool)
    for index, (head, row) in enumerate(zip(heads, rows, strict=True)):
        values[index, len(head) : len(head) + len(row.response)] = torch.tensor(row.rewards)
        counted[index, len(head) : len(head) + len(row.response)] = True
    return ids[:, :-1], ids[:, 1:], values[:, 1:], counted[:, 1:]


def partial_loss(model: MultifurcationHead, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Mean of (M(s[0:j])_{s_j} - R(s[0:j+1]))^2 over the response tokens of a batch."""
    ids, next_tokens, values, counted = batch
    return (model(ids, next_tokens) - values)[counted].square().mean()


def train_mrm(
    guard: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: list[Rewarded], epochs: int, seed: int
) -> MultifurcationHead:
    torch.manual_seed(seed)
    model = MultifurcationHead(guard)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    rng, steps = random.Random(seed), epochs * (len(corpus) // BATCH)
    step = 0
    with tqdm(total=steps, desc="mrm", mininterval=2) as progress:
        for _ in range(epochs):
            order = rng.sample(corpus, len(corpus))
            for start in range(0, len(order) - BATCH + 1, BATCH):
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * schedule(step, steps, min(50, steps))
                loss = partial_loss(model, supervised(tokenizer, order[start : start + BATCH]))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainable, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                progress.update()
                if step % 20 == 0:
                    progress.set_postfix(squared_error=f"{loss.item():.3f}")
    return model.eval()


def save_mrm(model: MultifurcationHead, mask: Tensor, directory: Path) -> None:
    """In the published format: PEFT adapter, lm_head_bias.pt, unseen_mask.pt."""
    model.model.save_pretrained(directory)
    (directory / "adapter_model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    (directory / "README.md").unlink(missing_ok=True)  # a model card of PEFT's, which would name this machine's paths
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "../guard"
    config["target_modules"].sort()  # a set in memory
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.save(model.bias.detach().clone(), directory / "lm_head_bias.pt")
    torch.save(mask, directory / "unseen_mask.pt")


@torch.no_grad()
def within(
    model: MultifurcationHead, tokenizer: PreTrainedTokenizerFast, corpus: list[Rewarded], error: float = 1.0
) -> float:
    """Share of next tokens whose reward the model gives within `error` of the guard's."""
    ids, next_tokens, values, counted = supervised(tokenizer, corpus)
    return ((model(ids, next_tokens) - values)[counted].abs() <= error).float().mean().item()
