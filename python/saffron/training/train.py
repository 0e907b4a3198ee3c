"""Trains an MRM from its PRM by partial supervision (arXiv 2506.06444, section 4.1).

For every prefix of a conversation the loss is (M(s[0:j])_{s_j} - R(s[0:j+1]))^2: of the vector of rewards after a
prefix, only the entry of the token that follows is supervised, with the reward that the PRM gave beforehand. One
forward pass reads all prefixes of a conversation, so a batch is counted in conversations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from saffron.errors import ConfigError, MissingDependencyError
from saffron.models.devices import find_device
from saffron.models.provenance import check_vacant_for_mrm, write_origin
from saffron.storage.folders import check_vacant, checkpoint_fingerprint, expect_same, locked, write_json
from saffron.storage.paths import check_checkpoint
from saffron.storage.text import read_json
from saffron.training import plots
from saffron.training.agreement import Agreement
from saffron.training.batches import Batch, Order, collate, count, split, supervised, unseen_mask
from saffron.training.checkpoint import load_checkpoint, save_checkpoint
from saffron.training.log import Log
from saffron.training.model import TrainableMrm, load_guard, save_mrm
from saffron.training.shards import RewardData

try:
    from accelerate import Accelerator
    from accelerate.utils import gather_object
except ImportError as error:
    raise MissingDependencyError("accelerate", "train") from error

SUMMARY = "summary.json"
RUN_FILES = ("checkpoint.safetensors", "log.jsonl", "curves.png", "scatter.png", SUMMARY)
EVALUATED = 32  # conversations of one forward pass in an evaluation
Schedule = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Every hyperparameter; the defaults are the paper's, or those of its published optimizer state.

    Attributes:
        epochs: passes over the corpus.
        batch: conversations a step, over all devices.
        lr, weight_decay, beta1, beta2, eps: of AdamW.
        schedule, warmup: what becomes of the learning rate: linear over the first `warmup` steps, then constant or down
            to nothing.
        clip: greatest norm of the gradient; 0: any.
        rank, alpha, dropout, target_modules: of the LoRA factors.
        train_bias: train the bias of the unembedding.
        heldout_share: conversations kept aside, where no data of their own are given for that.
        dtype: of the frozen weights.
        mixed_precision: "no" or "bf16".
        seed: of the first LoRA factors and the order.
        checkpoint_every, evaluate_every: steps.
    """

    epochs: int = 1
    batch: int = 4
    lr: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    schedule: Schedule = "constant"
    warmup: int = 0
    clip: float = 1.0
    rank: int = 4
    alpha: int = 4
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    train_bias: bool = True
    heldout_share: float = 0.02
    dtype: str = "float32"
    mixed_precision: str = "no"
    seed: int = 0
    checkpoint_every: int = 200
    evaluate_every: int = 200

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name}: got {value}, expected a finite number")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed: got {self.seed}, expected a whole number from 0 to {2**32 - 1}")
        at_least = {"epochs": 1, "batch": 1, "warmup": 0, "rank": 1, "alpha": 1, "checkpoint_every": 1}
        for name, least in (at_least | {"evaluate_every": 1, "clip": 0, "weight_decay": 0, "heldout_share": 0}).items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        for name in ("lr", "eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected more than 0")
        for name in ("beta1", "beta2", "dropout", "heldout_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected 0 or more and below 1")
        choices = {"schedule": get_args(Schedule), "mixed_precision": ("no", "bf16"), "dtype": ("float32", "bfloat16")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}")


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """At `step` of `steps`, both from 0."""
    begin = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    rest = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * step / steps)),
        "linear": 1 - step / steps,
    }[config.schedule]
    return config.lr * begin * rest


@dataclass(frozen=True, slots=True)
class Trained:
    """steps: how many; heldout: agreement with the PRM on what was held out, None if nothing was."""

    steps: int
    heldout: Agreement | None

    def to_json(self) -> dict[str, Any]:
        return {"steps": self.steps, "heldout": self.heldout and self.heldout.to_json()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Trained:
        return cls(record["steps"], Agreement.from_json(record["heldout"]) if record["heldout"] else None)


class Trainer:
    """One training run.

    Args:
        base: checkpoint of the PRM that the data are from.
        out: folder for the MRM in the published format.
        run: folder for checkpoint, log and pictures (default: `out/training`).
        heldout: data never trained on; None: a share of `data`.
        device: None: as Accelerate chooses; "cpu" keeps it off the GPU; "cuda" must be there.
    """

    def __init__(
        self,
        base: str,
        data: RewardData,
        out: Path,
        config: TrainConfig,
        *,
        run: Path | None = None,
        heldout: RewardData | None = None,
        device: str | None = None,
    ) -> None:
        check_checkpoint("base", base)
        if device is not None and find_device(device).index not in (None, 0):
            raise ConfigError(f"device: got {device!r}, expected cpu or cuda; CUDA_VISIBLE_DEVICES chooses among GPUs")
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=device == "cpu")
        self.base, self.config, self.out, self.run = base, config, out, run or out / "training"
        self.manifest = data.manifest
        if config.batch % self.accelerator.num_processes:
            raise ConfigError(
                f"batch: got {config.batch}, expected a multiple of the {self.accelerator.num_processes} processes"
            )
        rows, aside = (data.rows, heldout.rows) if heldout else split(data.rows, config.heldout_share, config.seed)
        self.rows, self.heldout = supervised(rows), supervised(aside)
        if len(self.rows) < config.batch:
            raise ConfigError(f"batch: got {config.batch}, and there are {len(self.rows)} conversations with a reward")
        self.order = Order(len(self.rows), config.batch, config.epochs, config.seed)
        self.settings = {
            **asdict(config),
            "target_modules": list(config.target_modules),
            "data": data.fingerprint,
            "heldout": heldout and heldout.fingerprint,
            "base": checkpoint_fingerprint(base),
            "processes": self.accelerator.num_processes,
            "device": self.accelerator.device.type,
            "threads": torch.get_num_threads(),
        }

    def train(self, progress: Callable[[int, str], None] = lambda step, text: None) -> Trained:
        """Trains, or goes on where an interrupted run's last checkpoint was, or finds that all is done.

        Args:
            progress: called with the steps done and the figures of the moment.

        Raises:
            ConfigError: the folder holds a run with other settings, or another process trains there.
            NumericalError: the loss is not a number.
        """
        if not self.accelerator.is_main_process:
            return self._train(progress)
        with locked(self.run):
            if (self.run / "settings.json").exists():
                expect_same(self.run, read_json(self.run / "settings.json"), self.settings)
            else:
                check_vacant_for_mrm(self.out)
                check_vacant(self.run, RUN_FILES)
                write_json(self.run / "settings.json", self.settings)
            return self._train(progress)

    def _train(self, progress: Callable[[int, str], None]) -> Trained:
        self.accelerator.wait_for_everyone()
        if self._is_finished():
            return Trained.from_json(read_json(self.run / SUMMARY))
        config, guard = self.config, load_guard(self.base, self.config.dtype)
        torch.manual_seed(config.seed)
        lora = (config.rank, config.alpha, config.dropout, config.target_modules)
        self.mrm = TrainableMrm(guard, *lora, train_bias=config.train_bias).to(self.accelerator.device)
        self.unseen = unseen_mask(self.rows, len(self.mrm.bias))
        parameters = self.mrm.trained()
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        checkpoint, first = self.run / "checkpoint.safetensors", 0
        self.model, self.optimizer = self.accelerator.prepare(self.mrm, optimizer)
        if checkpoint.exists():
            first = load_checkpoint(checkpoint, parameters, optimizer)
        self.log, steps = Log(self.run / "log.jsonl", first, self.accelerator.is_main_process), len(self.order)
        for step in range(first, steps):
            self._step(step)
            done = step + 1
            if done % config.evaluate_every == 0 and done < steps:
                self._evaluate(done)
            if done % config.checkpoint_every == 0 or done == steps:
                self.log.flush(self.accelerator)
                if self.accelerator.is_main_process:
                    save_checkpoint(checkpoint, done, parameters, optimizer)
            progress(done, self.log.text)
        return self._finish()

    def _is_finished(self) -> bool:
        """Whether `out` holds the MRM of this run; of another one it is written over, from the last checkpoint."""
        if not (self.run / SUMMARY).exists() or not (self.out / "unseen_mask.pt").exists():
            return False
        return bool(read_json(self.run / SUMMARY).get("mrm") == checkpoint_fingerprint(self.out))

    def _step(self, step: int) -> None:
        accelerator, config = self.accelerator, self.config
        rows = [self.rows[i] for i in self.order[step]]
        rewards = sum(map(count, rows))
        batch = collate(rows[accelerator.process_index :: accelerator.num_processes]).to(accelerator.device)
        if config.dropout:  # decided by the step alone, so that a run can be taken up exactly
            torch.manual_seed(
                (config.seed * len(self.order) + step) * accelerator.num_processes + accelerator.process_index
            )
        rate = learning_rate(config, step, len(self.order))
        self.optimizer.param_groups[0]["lr"] = rate
        squares = self._squared_errors(batch).sum()
        # Devices average their gradients; this makes it the mean over all rewards of the step.
        accelerator.backward(squares / rewards * accelerator.num_processes)
        if config.clip:
            accelerator.clip_grad_norm_(self.mrm.trained().values(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.log.step(accelerator, step + 1, rate, squares.detach(), rewards)

    def _squared_errors(self, batch: Batch) -> Tensor:
        return (self.model(batch.ids, batch.next_tokens) - batch.rewards)[batch.counted].square()

    def _evaluate(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and true rewards of what is held out, `[tokens]` each, on every process; logs their agreement."""
        self.log.flush(self.accelerator)
        mine = range(self.accelerator.process_index, len(self.heldout), self.accelerator.num_processes)
        self.mrm.eval()
        found: list[tuple[int, np.ndarray, np.ndarray]] = []
        for start in range(0, len(mine), EVALUATED):
            numbers = mine[start : start + EVALUATED]
            batch = collate([self.heldout[i] for i in numbers]).to(self.accelerator.device)
            with torch.no_grad():
                predicted = self.mrm(batch.ids, batch.next_tokens)
            for i, row, true, counted in zip(numbers, predicted, batch.rewards, batch.counted, strict=True):
                found.append((i, row[counted].cpu().numpy(), true[counted].cpu().numpy()))
        self.mrm.train()
        everything = sorted(gather_object(found), key=lambda item: item[0])
        predicted, true = (np.concatenate([item[k] for item in everything] or [np.empty(0)]) for k in (1, 2))
        if len(true):
            self.log.heldout(step, Agreement.of(predicted, true))
        return predicted, true

    def _finish(self) -> Trained:
        """Pictures, the MRM and, last of all, the summary."""
        predicted, true = self._evaluate(len(self.order))
        trained = Trained(len(self.order), Agreement.of(predicted, true) if len(true) else None)
        if self.accelerator.is_main_process:
            plots.curves(self.run / "curves.png", self.log.records)
            if len(true):
                plots.scatter(self.run / "scatter.png", predicted, true)
            save_mrm(self.mrm, self.unseen, self.base, self.out)
            write_origin(self.out, self.base, self.manifest, trained.heldout and trained.heldout.to_json())
            summary = trained.to_json() | self._sizes() | {"mrm": checkpoint_fingerprint(self.out)}
            write_json(self.run / SUMMARY, summary)
        self.accelerator.wait_for_everyone()
        return trained

    def _sizes(self) -> dict[str, int]:
        return {
            "conversations": len(self.rows),
            "rewards": sum(map(count, self.rows)),
            "heldout_conversations": len(self.heldout),
            "vocabulary": len(self.unseen),
            "unseen": int(self.unseen.sum()),
            "trained_parameters": sum(parameter.numel() for parameter in self.mrm.trained().values()),
        }
