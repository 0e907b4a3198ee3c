"""Recorded runs of the published search, replayed: every step and the answer must be the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saffron.errors import CheckpointError, outside
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import Request, SaffronSearch
from saffron.search.config import SearchConfig
from saffron.search.tree import Node
from saffron.storage.text import parse_json, read_bytes


@dataclass(frozen=True, slots=True)
class CaseReport:
    """One recorded run next to ours.

    Attributes:
        case: its number in `cases.json`.
        steps, same_steps: recorded steps, and how many from the first on are identical.
        same_finished, same_output: whether the finished responses with their rewards, and the answer, are.
    """

    case: int
    steps: int
    same_steps: int
    same_finished: bool
    same_output: bool

    @property
    def identical(self) -> bool:
        return self.same_steps == self.steps and self.same_finished and self.same_output


def replay(folder: str | Path) -> Iterator[CaseReport]:
    """Runs every case of a folder (`policy/`, `guard/`, `mrm/`, `cases.json`) in `ranking="released"`.

    Raises:
        CheckpointError: a file that is missing or damaged.
    """
    folder = Path(folder)
    cases = _load_cases(folder / "cases.json")
    policy = Policy.from_pretrained(folder / "policy")
    mrm = MultifurcationRewardModel.from_pretrained(folder / "mrm", base=folder / "guard")
    for number, case in enumerate(cases):
        with outside(f"{folder / 'cases.json'}: case {number} is not a recorded run", CheckpointError):
            report = _replay_case(number, case, policy, mrm)
        yield report


def _load_cases(file: Path) -> list[dict[str, Any]]:
    cases = parse_json(read_bytes(file, CheckpointError), f"{file}: no recorded cases there", CheckpointError)
    if not isinstance(cases, list) or not all(isinstance(case, dict) and "steps" in case for case in cases):
        raise CheckpointError(f"{file}: expected a list of recorded runs")
    return cases


def _replay_case(number: int, case: dict[str, Any], policy: Policy, mrm: MultifurcationRewardModel) -> CaseReport:
    config = SearchConfig(
        width=case["width"],
        top_p=case["top_p"],
        max_new_tokens=case["max_new_tokens"],
        min_new_tokens=case["min_new_tokens"],
        ranking="released",
        eos_score="mrm",
        unseen_reward=case["unseen_reward"],
        lm_head_bias=case["lm_head_bias"],
    )
    ours, theirs = case["policy"], case["mrm"]
    request = Request(
        (ours["bos"], *case["prompt"], *ours["infix"]), (*theirs["prefix"], *case["prompt"], *theirs["infix"])
    )
    beams: list[list[Node]] = []
    for (search,) in SaffronSearch(policy, mrm, config, eos_token_id=[ours["eos"]]).run([request]):
        beams.append(list(search.tree.beam))
    beams += [beams[-1]] * (len(case["steps"]) - len(beams))  # once all are finished, steps change nothing

    seen = [sorted([node.tokens(), node.finished] for node in beam) for beam in beams]
    recorded = [sorted([list(tokens), bool(done)] for tokens, done in step) for step in case["steps"]]
    same = [a == b for a, b in zip(seen, recorded, strict=True)]
    finished = sorted((node.tokens(), node.score) for node in beams[-1] if node.finished)
    return CaseReport(
        case=number,
        steps=len(recorded),
        same_steps=len(same) if all(same) else same.index(False),
        same_finished=_same_finished(finished, sorted((list(t), r) for t, r in case["finished"])),
        same_output=beams[-1][0].tokens() == case["output"],
    )


def _same_finished(ours: list[tuple[list[int], float]], recorded: list[tuple[list[int], float]]) -> bool:
    """Same responses; rewards equal up to fp32 rounding."""
    return [t for t, _ in ours] == [t for t, _ in recorded] and all(
        abs(a - b) <= 1e-3 * max(1.0, abs(b)) for (_, a), (_, b) in zip(ours, recorded, strict=True)
    )
