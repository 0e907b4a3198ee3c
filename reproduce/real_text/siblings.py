"""`python -m reproduce.real_text.siblings`: does it help to spread the beams over more parents?

An experiment that is no option of the search, as it did not help (docs/fluent.md). With the MRM that
`python -m reproduce.real_text` left in a folder, its calibrated cap and width 8, on the attacked test prompts:

- quota: at most so many children of a beam are kept, unless that leaves places of the beam empty;
- penalty: between equal scores a child counts so much less in log-probability per token as it has better siblings.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reproduce.real_text.answers import Answers, Task
from reproduce.real_text.comparisons import likely, loops, mean, negative, share, shown
from reproduce.real_text.prompts import cases
from reproduce.real_text.scales import SCALES
from reproduce.real_text.sweep import CALIBRATED
from reproduce.real_text.training import safe_levels
from saffron.evaluation.metrics import bootstrap
from saffron.models.mrm_files import is_on
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import selection
from saffron.storage.results import Record

SETTINGS = ((0, 0.0), (4, 0.0), (2, 0.0), (1, 0.0), (0, 0.5))  # quota (0: none) and penalty


@contextmanager
def spread(quota: int, penalty: float) -> Iterator[list[int]]:
    """While it lasts, searches spread their beams; yields how many parents the beams of each step have."""
    best = selection.best
    parents: list[int] = []

    def spread_best(
        groups: Tensor, score: Tensor, tie: Tensor, parent: Tensor, widths: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        order = tie.argsort(descending=True, stable=True)
        order = order[score[order].argsort(descending=True, stable=True)]
        order = order[parent[order].argsort(stable=True)]
        place = torch.empty_like(order)  # among siblings
        place[order] = torch.arange(len(order)) - torch.searchsorted(parent[order], parent[order])
        of_group = torch.unique(torch.stack([groups, parent]), dim=1)[0].bincount(minlength=len(widths) + 1)
        if quota:
            most = (-(-width // of_group.clamp(min=1))).clamp(min=quota)
            groups = torch.where(place < most[groups], groups, len(widths))
        index, chosen = best(groups, score, tie - penalty * place, parent, widths, width)
        kept = torch.where(chosen, parent[index], -1).view(-1, width)
        parents.extend(len({*row} - {-1}) for row in kept.tolist())
        return index, chosen

    selection.best = spread_best
    try:
        yield parents
    finally:
        selection.best = best


def paired(one: list[Record], other: list[Record], value: Callable[[Record], float]) -> str:
    """The mean of a value in one list less that in the other, prompt by prompt."""
    return shown(bootstrap(np.array([value(a) - value(b) for a, b in zip(one, other, strict=True)])))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reproduce.real_text.siblings", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--policy", required=True, help="folder of the policy that the MRM was trained for")
    parser.add_argument("--output", type=Path, required=True, help="folder of the experiment, which holds the MRM")
    parser.add_argument(
        "--scale", choices=sorted(SCALES), default="full", help="how many prompts, and how long answers"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    scale, mrm = SCALES[options.scale], options.output / "mrm"
    if not mrm.is_dir():
        parser.error(f"--output: {options.output} holds no MRM; run python -m reproduce.real_text first")
    if not is_on(mrm, options.policy):
        parser.error(f"--policy: {options.policy} is not what {mrm} was trained on")
    if (file := options.output / "siblings.jsonl").exists():
        parser.error(f"{file}: is there already")
    level = safe_levels(MultifurcationRewardModel.from_pretrained(mrm, device="cpu"), options.output, [CALIBRATED])
    answers, given = Answers(options.policy, mrm, scale.tokens), cases("test", scale.test)
    method = f"saffron:width=8,reward_cap={level[CALIBRATED]}"
    columns = "negative by the judge", "fewer", "log-probability per token", "more", "loops"
    print(f"{method}\n| {' | '.join(('quota', 'penalty', 'parents', *columns))} |\n{'|---' * 8}|", flush=True)
    plain: list[Record] = []
    with file.open("x", encoding="utf-8") as out:
        for quota, penalty in SETTINGS:
            with spread(quota, penalty) as parents:
                found = [
                    record
                    for first in range(0, len(given), scale.batch)
                    for record in answers(Task(method, tuple(given[first : first + scale.batch])))
                ]
            plain = plain or found
            out.writelines(json.dumps({"quota": quota, "penalty": penalty, **one}) + "\n" for one in found)
            cells = (
                f"{quota}", f"{penalty}", f"{sum(parents) / len(parents):.1f}",
                share(found, negative), paired(plain, found, negative),
                mean(found, likely), paired(found, plain, likely), share(found, loops),
            )  # fmt: skip
            print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
