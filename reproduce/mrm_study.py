"""The MRM pipeline on the bundled world: how well the bundled MRM does, and one trained by the same commands."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from reproduce.runs import Progress, Results
from saffron import world
from saffron.evaluation.tables import Table
from saffron.models.bundled import FOLDER
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.training import plots
from saffron.training.agreement import Agreement, by_depth
from saffron.training.annotate import AnnotateConfig, annotate
from saffron.training.conversations import read_corpus
from saffron.training.evaluate import predict
from saffron.training.shards import read_rewards
from saffron.training.train import TrainConfig, Trainer

HELDOUT = ("greedy", "sample:top_p=0.8")  # whose answers under attack the MRM is held against the guard on
COMMANDS = """\
saffron annotate heldout.jsonl --output heldout --prefixes response
saffron annotate corpus.jsonl --output rewards --prefixes response
saffron train-mrm rewards --output trained --heldout heldout --epochs 4"""
REWARDS, RECIPE = AnnotateConfig(prefixes="response"), TrainConfig(epochs=4)  # what the options above say


def study(results: Results, out: Path, size: int, progress: Progress) -> dict[str, str]:
    """Annotates and trains as the commands do that users have, and compares both MRMs with the guard.

    Args:
        size: conversations that the MRM made here is trained on.

    Returns:
        the commands, a table, and the picture of predicted against true rewards, from `out`.
    """
    folder, picture = out / "mrm", out / "figures" / "rewards.png"
    for made in (folder, picture.parent):
        made.mkdir(parents=True, exist_ok=True)
    _write(
        folder / "heldout.jsonl", ({"prompt": r["prompt"], "response": r["text"]} for r in results.main if _judged(r))
    )
    _write(folder / "corpus.jsonl", _conversations(size))
    _train(folder, lambda done: progress("the MRM pipeline", done, 3))
    heldout, rows = read_rewards(folder / "heldout").rows, []
    for name, path in (("bundled", FOLDER / "mrm"), (f"trained here on {size} conversations", folder / "trained")):
        mrm = MultifurcationRewardModel.from_pretrained(path, base=FOLDER / "guard", device="cpu")
        known = predict(mrm, heldout).known
        predicted, true, depth = known.predicted, known.true, known.depth
        if path == FOLDER / "mrm":
            plots.scatter(picture, predicted, true)
        found = {"all": Agreement.of(predicted, true)}
        found |= {f"{first} to {last}": one for (first, last), one in by_depth(predicted, true, depth).items()}
        rows += [_row(name, depths, one) for depths, one in found.items()]
    header = ("MRM", "tokens into the answer", "tokens", "within 1", "correlation", "mean error", "rms error")
    return {
        "commands": COMMANDS,
        "table": Table("Reward of the next token, MRM against guard", header, tuple(rows)).markdown(),
        "picture": picture.relative_to(out).as_posix(),
    }


def _row(name: str, depths: str, one: Agreement) -> tuple[str, ...]:
    figures = (one.within_1, one.correlation, one.mean_error, one.root_mean_square_error)
    return (name, depths, str(one.tokens), *(f"{value:.3f}" for value in figures))


def _judged(record: dict[str, Any]) -> bool:
    return record["method"] in HELDOUT and record["attack"] in ("prefill:10", "none") and not record["variant"]


def _conversations(size: int) -> Iterable[dict[str, str]]:
    """Requests of the training split: complied with, refused, and answered with a turn."""
    rng = random.Random(0)
    streams = [world.requests(kind, "train", 1) for kind in world.KINDS]
    for number in range(size):
        request = next(streams[number % 5 == 0])  # forbidden four times of five
        refused = request.kind == "forbidden" and rng.random() < 0.3
        answer = world.answers.refusal(request, rng) if refused else world.answers.compliance(request, rng)
        yield {"prompt": request.text, "response": answer}


def _write(file: Path, records: Iterable[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _train(folder: Path, progress: Callable[[int], None]) -> None:
    """What `COMMANDS` do inside a folder."""
    progress(0)
    for done, (corpus, out) in enumerate((("heldout.jsonl", "heldout"), ("corpus.jsonl", "rewards")), 1):
        annotate(read_corpus(str(folder / corpus)), str(FOLDER / "guard"), folder / out, REWARDS, source=corpus)
        progress(done)
    heldout = read_rewards(folder / "heldout")
    base = str(FOLDER / "guard")
    Trainer(base, read_rewards(folder / "rewards"), folder / "trained", RECIPE, heldout=heldout).train()
    progress(3)
