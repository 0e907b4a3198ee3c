"""Pictures of a training and of an MRM."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saffron.errors import MissingDependencyError, outside
from saffron.storage.folders import PICTURE, write_atomically
from saffron.training.agreement import Agreement

MARK = PICTURE
SMOOTHED = 50  # points of the smoothed curve of the loss
MOST_POINTS = 20_000


def scatter(file: Path, predicted: np.ndarray, true: np.ndarray) -> None:
    """Predicted against true rewards, `[tokens]` each (arXiv 2506.06444, figure 4b); the band is +-1."""
    figure, axes = _axes((5, 5))
    if len(true) > MOST_POINTS:
        chosen = np.random.default_rng(0).choice(len(true), MOST_POINTS, replace=False)
        predicted, true = predicted[chosen], true[chosen]
    ends = np.array([min(true.min(), predicted.min()) - 1, max(true.max(), predicted.max()) + 1])
    axes.fill_between(ends, ends - 1, ends + 1, alpha=0.2, color="tab:green", linewidth=0, label="±1")
    axes.plot(ends, ends, color="tab:green", linewidth=1)
    axes.scatter(true, predicted, s=4, alpha=0.25, linewidths=0, rasterized=True)
    agreement = Agreement.of(predicted, true)
    axes.set(xlim=ends, ylim=ends, aspect="equal", xlabel="reward of the PRM", ylabel="reward predicted by the MRM")
    axes.set_title(f"{agreement.within_1:.1%} within ±1, correlation {agreement.correlation:.3f}")
    axes.legend(loc="upper left")
    _save(figure, file)


def curves(file: Path, log: Sequence[dict[str, Any]]) -> None:
    """Squared error of the training steps and on what was held out."""
    figure, axes = _axes((7, 4))
    steps = np.array([record["step"] for record in log if "loss" in record])
    loss = np.array([record["loss"] for record in log if "loss" in record])
    axes.plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=0.8, label="a step's batch")
    width = max(1, len(loss) // SMOOTHED)
    if len(loss) > width > 1:
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"mean of {width} steps")
    heldout = [(record["step"], record["heldout"]) for record in log if "heldout" in record]
    if heldout:
        error = [found["root_mean_square_error"] ** 2 for _, found in heldout]
        axes.plot([step for step, _ in heldout], error, "o-", color="tab:orange", markersize=3, label="held out")
    axes.set(xlabel="step", ylabel="mean squared error", yscale="log")
    axes.legend()
    _save(figure, file)


def calibration(file: Path, table: dict[tuple[int, int], Agreement]) -> None:
    """Share within 1 and mean error by depth."""
    figure, axes = _axes((7, 4))
    names = [f"{first}" if first == last else f"{first}–{last}" for first, last in table]
    axes.bar(names, [row.within_1 for row in table.values()], color="tab:blue", alpha=0.6)
    axes.set(xlabel="tokens into the turn", ylabel="share within ±1", ylim=(0, 1))
    other = axes.twinx()
    other.errorbar(
        names,
        [row.mean_error for row in table.values()],
        [row.root_mean_square_error for row in table.values()],
        fmt="o",
        color="tab:orange",
        capsize=3,
    )
    other.axhline(0, color="tab:orange", linewidth=0.5)
    other.set_ylabel("mean error ± root mean square error")
    _save(figure, file)


def _axes(size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "train") from error
    figure = Figure(size, layout="constrained", dpi=150)  # without pyplot: no display, no state
    return figure, figure.subplots()


def _save(figure: Any, file: Path) -> None:
    with outside(f"{file}: cannot be drawn"):  # no such folder; a format that matplotlib lacks
        kind = file.suffix.removeprefix(".").lower() or "png"
        metadata = {"Title": MARK.decode(), **({"Software": None} if kind == "png" else {})}
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, metadata=metadata if kind in ("png", "svg", "pdf") else None)
    write_atomically(file, picture.getvalue())
