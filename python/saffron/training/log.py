"""What happened in a training: JSON lines, one per step and one per evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saffron.errors import CheckpointError, NumericalError, outside
from saffron.storage.folders import write_atomically
from saffron.storage.text import parse_json, read_bytes
from saffron.training.agreement import Agreement

EVERY = 20  # steps whose loss is fetched from the device together


class Log:
    """Keeps {"step", "lr", "loss", "rewards"} and {"step", "heldout"} records.

    Args:
        first: steps that are done; what an interrupted run wrote of later ones is dropped, for they are done again.
        write: whether this process writes the file.
    """

    def __init__(self, file: Path, first: int, write: bool) -> None:
        self.file, self.write, self.text = file, write, ""
        self.records: list[dict[str, Any]] = []
        if file.exists():
            lines = read_bytes(file, CheckpointError).split(b"\n")[:-1]
            with outside(f"{file}: not the log of a training", CheckpointError):
                records = [parse_json(line, f"line {number}") for number, line in enumerate(lines, 1)]
                self.records = [r for r in records if r["step"] <= first]
        if write:
            write_atomically(file, "".join(map(_line, self.records)).encode())
        self._waiting: list[tuple[int, float, Tensor, int]] = []

    def step(self, accelerator: Any, step: int, lr: float, squares: Tensor, rewards: int) -> None:
        """squares: the sum of squared errors on this device; rewards: their number on all devices."""
        self._waiting.append((step, lr, squares, rewards))
        if len(self._waiting) >= EVERY:
            self.flush(accelerator)

    def flush(self, accelerator: Any) -> None:
        if not self._waiting:
            return
        steps, rates, squares, rewards = zip(*self._waiting, strict=True)
        sums = accelerator.reduce(torch.stack(squares), "sum").tolist()
        self._waiting.clear()
        self._append(
            {"step": step, "lr": lr, "loss": total / number, "rewards": number}
            for step, lr, total, number in zip(steps, rates, sums, rewards, strict=True)
        )
        loss = self.records[-1]["loss"]
        if not abs(loss) < float("inf"):
            raise NumericalError(f"step {steps[-1]}: the loss is {loss}; a lower learning rate may help")
        self.text = f"loss {loss:.3f}"

    def heldout(self, step: int, agreement: Agreement) -> None:
        """An evaluation after `step` steps; once, however often the run was taken up there."""
        if not any(record["step"] == step and "heldout" in record for record in self.records):
            self._append([{"step": step, "heldout": agreement.to_json()}])

    def _append(self, records: Any) -> None:
        records = list(records)
        self.records.extend(records)
        if self.write:
            with outside(f"{self.file}: cannot be written"), self.file.open("a") as stream:
                stream.writelines(map(_line, records))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"
