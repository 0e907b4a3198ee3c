"""An MRM on a frozen trunk: the base as it is, and an unembedding that is learned from its hidden states.

The reward of token v after a prefix with hidden state h is `h' A B e_v + h' g + e_v c + b_v`, where e_v is the token's
embedding in the base's unembedding: what is learned of one token serves tokens like it. All of it is one matrix and one
bias of the vocabulary, so that the MRM is read like any other. The trunk is run once over the corpus, whose hidden
states are kept, so that this takes minutes where LoRA takes hours; it learns less. Where the base is the policy, so is
the trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from saffron.errors import CheckpointError, ConfigError, NumericalError, outside
from saffron.models.loading import load_model, load_tokenizer
from saffron.models.provenance import check_vacant_for_mrm, write_origin
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search.config import check_number, check_whole
from saffron.storage.folders import (
    check_vacant,
    checkpoint_fingerprint,
    expect_same,
    locked,
    write_atomically,
    write_json,
)
from saffron.storage.paths import check_checkpoint
from saffron.storage.text import read_json
from saffron.training.agreement import Agreement
from saffron.training.batches import collate, split, supervised, unseen_mask
from saffron.training.shards import AnnotatedConversation, RewardData

STATES, SUMMARY = "states.safetensors", "summary.json"


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """Hyperparameters.

    Attributes:
        rank: of `A B`.
        epochs: passes over the rewards at most; the best by the held-out error counts, before the first included.
        batch: rewards of one step.
        lr, weight_decay: of AdamW.
        heldout_share: conversations kept aside.
        read_batch: conversations of one forward pass of the trunk.
        seed: of the first values, the order and what is held out.
    """

    rank: int = 8
    epochs: int = 20
    batch: int = 256
    lr: float = 5e-4
    weight_decay: float = 0.5
    heldout_share: float = 0.1
    read_batch: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(self, rank=1, epochs=1, batch=1, read_batch=1, seed=0)
        check_number(self, lr=True, weight_decay=False, heldout_share=True)
        if self.heldout_share >= 1:
            raise ConfigError(f"heldout_share: got {self.heldout_share}, expected above 0 and below 1")


class RewardHead(nn.Module):
    """`h' A B e_v + h' g + e_v c + b_v` over hidden states and embeddings of mean 0 and spread 1.

    Args:
        states: `[rewards, hidden]`, whose mean and spread are taken.
        embeddings: `[vocab, hidden]`, the base's unembedding.
    """

    def __init__(self, states: Tensor, embeddings: Tensor, rank: int) -> None:
        super().__init__()
        hidden, vocab = embeddings.shape[1], embeddings.shape[0]
        self.mean, self.spread = states.mean(0), states.std(0).clamp_min(1e-6)
        center, width = embeddings.mean(0), embeddings.std(0).clamp_min(1e-6)
        self.embeddings = (embeddings - center) / width
        self.left = nn.Parameter(torch.randn(hidden, rank) / hidden**0.5)
        self.right = nn.Parameter(torch.zeros(rank, hidden))
        self.of_state = nn.Parameter(torch.zeros(hidden))
        self.of_token = nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.zeros(vocab))
        self.level = nn.Parameter(torch.zeros(()))

    def forward(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Rewards `[rows]` of one token after each state."""
        states, embeddings = (states - self.mean) / self.spread, self.embeddings[tokens]
        scale = embeddings.shape[1] ** -0.5
        both = ((states @ self.left) * (embeddings @ self.right.T)).sum(1)
        return both + (states @ self.of_state + embeddings @ self.of_token) * scale + self.bias[tokens] + self.level

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """The same as an unembedding `[vocab, hidden]` and its bias `[vocab]`."""
        scale = self.embeddings.shape[1] ** -0.5
        weight = (self.embeddings @ self.right.T @ self.left.T + self.of_state * scale) / self.spread
        bias = self.embeddings @ self.of_token * scale + self.bias + self.level - weight @ self.mean
        return weight, bias


def train_head(
    base: str,
    data: RewardData,
    out: Path,
    config: HeadConfig,
    *,
    run: Path | None = None,
    device: str | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, Any]:
    """Trains an MRM whose trunk is `base` and writes it to `out`, whole; the hidden states are kept in `run`.

    Args:
        base: checkpoint of the trunk, whose tokenizer the rewards were annotated for.
        run: folder for states and summary (default: `out/training`).
        progress: called with conversations read, all there are, and figures.

    Returns:
        The summary: sizes, and agreement on what was held out.

    Raises:
        ConfigError: `run` holds another training, or too few conversations. NumericalError: the loss is not a number.
    """
    check_checkpoint("base", base)
    run = run or out / "training"
    rows = supervised(data.rows)
    trained, aside = split(rows, config.heldout_share, config.seed)
    settings = {**asdict(config), "data": data.fingerprint, "base": checkpoint_fingerprint(base), "trunk": "frozen"}
    with locked(run):
        if (run / "settings.json").exists():
            expect_same(run, read_json(run / "settings.json"), settings)
        else:
            check_vacant_for_mrm(out)
            check_vacant(run, (f"trained-{STATES}", f"heldout-{STATES}", SUMMARY))
        write_json(run / "settings.json", settings)
        if (run / SUMMARY).exists() and read_json(run / SUMMARY).get("mrm") == checkpoint_fingerprint(out):
            return read_json(run / SUMMARY)
        with outside(f"{base}: cannot be loaded as a causal language model", CheckpointError):
            trunk = MultifurcationRewardModel(load_model(base, torch.float32, device), load_tokenizer(base))
        states = [_states(trunk, part, config, run / f"{name}-{STATES}", progress)
                  for name, part in (("trained", trained), ("heldout", aside))]  # fmt: skip
        head, found = fit(trunk.head_weight.float(), *states[0], *states[1], config)
        _write(trunk, head, unseen_mask(trained, trunk.vocab_size), out)
        write_origin(out, base, data.manifest, found.to_json())
        summary = {
            "conversations": len(trained), "heldout_conversations": len(aside), "rewards": len(states[0][1]),
            "vocabulary": trunk.vocab_size, "unseen": int(unseen_mask(trained, trunk.vocab_size).sum()),
            "heldout": found.to_json(), "steps": -(-len(states[0][1]) // config.batch) * config.epochs,
            "trained_parameters": sum(p.numel() for p in head.parameters()), "mrm": checkpoint_fingerprint(out),
        }  # fmt: skip
        write_json(run / SUMMARY, summary)
    return summary


def fit(
    embeddings: Tensor,
    states: Tensor,
    tokens: Tensor,
    rewards: Tensor,
    heldout_states: Tensor,
    heldout_tokens: Tensor,
    heldout_rewards: Tensor,
    config: HeadConfig,
) -> tuple[RewardHead, Agreement]:
    """The head with the lowest held-out error over the epochs, and its agreement on what was held out."""
    torch.manual_seed(config.seed)
    head = RewardHead(states, embeddings, config.rank)
    heldout = heldout_states, heldout_tokens, heldout_rewards
    best = _start(head, (states, tokens, rewards), heldout)
    kept = {name: p.detach().clone() for name, p in head.named_parameters()}
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    order = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        for chosen in torch.randperm(len(tokens), generator=order).split(config.batch):
            loss = (head(states[chosen], tokens[chosen]) - rewards[chosen]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        error = _error(head, *heldout)
        if not np.isfinite(error):
            raise NumericalError("the loss is not a number; a lower lr may help")
        if error < best:
            best, kept = error, {name: p.detach().clone() for name, p in head.named_parameters()}
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(kept[name])
        predicted = head(heldout_states, heldout_tokens)
    return head, Agreement.of(predicted.cpu().numpy(), heldout_rewards.cpu().numpy())


RIDGES = (1e2, 1e3, 3e3, 1e4, 3e4, 1e5, 1e6)
Part = tuple[Tensor, Tensor, Tensor]  # states, tokens, rewards


@torch.no_grad()
def _error(head: RewardHead, states: Tensor, tokens: Tensor, rewards: Tensor) -> float:
    return float((head(states, tokens) - rewards).square().mean())


@torch.no_grad()
def _start(head: RewardHead, trained: Part, heldout: Part) -> float:
    """Sets what is linear in state and token by ridge regression, of the penalty that is best on what is held out.

    Little data bear no more than this; what the steps of gradient find comes on top. Returns the held-out error.
    """
    states, tokens, rewards = trained
    features = torch.cat([(states - head.mean) / head.spread, head.embeddings[tokens]], 1)
    hidden = states.shape[1]
    head.level.fill_(float(rewards.mean()))
    gram, target = features.T @ features, features.T @ (rewards - head.level)
    found: list[tuple[float, Tensor]] = []
    for ridge in RIDGES:
        weights = torch.linalg.solve(gram + ridge * torch.eye(2 * hidden), target) * hidden**0.5
        head.of_state.copy_(weights[:hidden])
        head.of_token.copy_(weights[hidden:])
        found.append((_error(head, *heldout), weights))
    error, weights = min(found, key=lambda one: one[0])
    head.of_state.copy_(weights[:hidden])
    head.of_token.copy_(weights[hidden:])
    return error


def _states(
    trunk: MultifurcationRewardModel,
    rows: Sequence[AnnotatedConversation],
    config: HeadConfig,
    file: Path,
    progress: Callable[[int, int, str], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states `[rewards, hidden]` before each token that has a reward, the tokens and the rewards."""
    if file.exists():
        with outside(f"{file}: cannot be read", CheckpointError):
            stored = load_file(file)
            return stored["states"], stored["tokens"], stored["rewards"]
    causal: Any = trunk.model
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    ordered = sorted(rows, key=lambda row: len(row.input_ids))  # little padding
    implementation = causal.config._attn_implementation
    causal.set_attn_implementation("sdpa")
    with torch.inference_mode():
        for first in range(0, len(ordered), config.read_batch):
            batch = collate(ordered[first : first + config.read_batch]).to(trunk.device)
            hidden = causal.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state.float()
            found.append((hidden[batch.counted], batch.next_tokens[batch.counted], batch.rewards[batch.counted]))
            progress(min(first + config.read_batch, len(rows)), len(rows), "")
    causal.set_attn_implementation(implementation)
    states, tokens, rewards = (torch.cat(part).cpu().clone() for part in zip(*found, strict=True))
    write_atomically(file, save({"states": states, "tokens": tokens, "rewards": rewards}))
    return states, tokens, rewards


def _write(trunk: MultifurcationRewardModel, head: RewardHead, unseen: Tensor, out: Path) -> None:
    weight, bias = head.folded()
    model: Any = trunk.model
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    model.set_output_embeddings(layer)  # the input embeddings stay the base's
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    MultifurcationRewardModel(model, trunk.tokenizer, bias=bias, unseen=unseen).save_pretrained(out)
