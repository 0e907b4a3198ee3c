"""Trains the policy: a small chat model whose alignment is as shallow as its first tokens."""

import math
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reproduce.checkpoints.corpus import IGNORED, policy_batches
from reproduce.checkpoints.tokenizer import CONTEXT, POLICY_TEMPLATE, save_tokenizer

BATCH, LEARNING_RATE, WARMUP = 64, 3e-3, 50


def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised Llama of about a million parameters: policy and guard are of this shape."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def schedule(step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then a cosine down to nothing."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_policy(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    tokenizer.chat_template = POLICY_TEMPLATE
    model = llama(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    batches = policy_batches(tokenizer, BATCH, seed)
    for step in (progress := tqdm(range(steps), desc="policy", mininterval=2)):
        ids, labels = next(batches)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * schedule(step, steps)
        learned = labels[:, 1:] != IGNORED
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[learned]  # no logits where nothing is learned
        loss = cross_entropy(model.lm_head(hidden), labels[:, 1:][learned])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path, template: str) -> None:
    """Weights in 16 bits (they are run in fp32), configuration and tokenizer."""
    model.to(torch.bfloat16).save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone
    save_tokenizer(tokenizer, directory, template)
