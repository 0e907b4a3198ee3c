"""A training corpus of the policy's own continuations: what a search will propose, the MRM should have seen.

Continuations are drawn from the policy's nucleus in two ways: by its probabilities, which gives what the policy says,
and evenly, which gives what a search may choose. A prompt that comes with a prefill is continued with it and without.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from saffron.errors import CheckpointError, ConfigError, outside
from saffron.models.bundled import FOLDER
from saffron.models.policy import Policy, end_tokens
from saffron.models.provenance import fingerprint
from saffron.search.config import Request, check_whole
from saffron.search.decoding import DrawingConfig
from saffron.search.method import SearchBatch
from saffron.search.proposals import sample
from saffron.storage.folders import check_vacant, locked, write_atomically
from saffron.storage.paths import check_checkpoint, check_output_folder
from saffron.storage.results import Record, Schema, open_results
from saffron.workers import Workers

DRAWS, CORPUS = "draws.jsonl", "corpus.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectConfig(DrawingConfig):
    """What decides the corpus.

    Attributes:
        min_new_tokens, max_new_tokens, temperature, top_p, seed: see `DrawingConfig`.
        samples: continuations of each prompt, with each prefill and without, drawn by the policy's probabilities.
        even: the same, drawn evenly from the nucleus.
        batch: prompts of one forward pass. It may change the last bits of the policy's logits, and so the draws.
    """

    min_new_tokens: int = 0
    samples: int = 2
    even: int = 2
    batch: int = 8

    def __post_init__(self) -> None:
        DrawingConfig.__post_init__(self)
        check_whole(self, samples=0, even=0, batch=1)
        if not self.samples + self.even:
            raise ConfigError("samples and even: got 0 and 0, expected a continuation of at least one of both")


@dataclass(frozen=True, slots=True)
class Attack:
    """What the policy continues: a user's prompt, and how its answer is forced to begin ("": it is not)."""

    prompt: str
    prefill: str = ""


def attacks(prompts: Iterable[tuple[str, str]]) -> list[Attack]:
    """Every prompt without a prefill, and every (prompt, prefill) pair; each once."""
    given = list(prompts)
    plain, forced = [Attack(prompt) for prompt, _ in given], [Attack(*pair) for pair in given if pair[1]]
    return list(dict.fromkeys([*plain, *forced]))


def _fits(record: Record) -> bool:
    drawn = record.get("responses")
    return isinstance(drawn, list) and all(
        isinstance(one, dict) and {"draw", "ids", "text"} <= one.keys() for one in drawn
    )


SCHEMA = Schema("collect", ("prompt", "prefill"), _fits)


class Collector:
    """Draws continuations. It is called with the prompts of one forward pass.

    Args:
        policy: whose continuations they are.
    """

    def __init__(self, policy: Policy, config: CollectConfig) -> None:
        self.policy, self.config = policy, config

    @classmethod
    def load(cls, policy: str, config: CollectConfig, device: str | None) -> Collector:
        with outside(f"{policy}: cannot be used as a policy", CheckpointError):
            return cls(Policy.from_pretrained(policy, device=device), config)

    @torch.inference_mode()
    def __call__(self, work: Sequence[Attack]) -> list[Record]:
        """One record for each: its continuations without the end token, as ids and as text."""
        config, eos_token_id = self.config, end_tokens(self.policy, None)
        requests = [Request(tuple(self.policy.chat(one.prompt, one.prefill))) for one in work]
        for one, request in zip(work, requests, strict=True):
            self.policy.check_length(f"prompt {one.prompt!r}", len(request.policy), config.max_new_tokens)
        kinds = [f"sampled-{i}" for i in range(config.samples)] + [f"even-{i}" for i in range(config.even)]
        count = len(kinds)
        batch = SearchBatch(self.policy, None, config, eos_token_id, requests)
        steps = sample(
            batch,
            [(search, ()) for search in range(len(work)) for _ in kinds],
            config.max_new_tokens,
            [batch.stream(search, i) for search in range(len(work)) for i in range(count)],
            even=[kind.startswith("even") for _ in work for kind in kinds],
        )
        try:
            while True:
                next(steps)
        except StopIteration as end:
            grown = end.value
        finally:
            batch.close()
        records = []
        for search, one in enumerate(work):
            drawn = grown[search * count : (search + 1) * count]
            records.append(
                {**asdict(one), "responses": [self._response(*pair) for pair in zip(kinds, drawn, strict=True)]}
            )
        return records

    def _response(self, kind: str, drawn: tuple[int, tuple[int, ...]]) -> dict[str, Any]:
        tokens = [token for token in drawn[1] if token not in end_tokens(self.policy, None)]
        return {"draw": kind, "ids": tokens, "text": self.policy.decode(tokens)}


def collect(
    prompts: Iterable[tuple[str, str]],
    policy: str | None,
    out: Path,
    config: CollectConfig,
    workers: Workers | None = None,
    *,
    device: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Record]:
    """Writes the corpus to the folder `out`; what an interrupted run left there is taken up.

    `draws.jsonl` holds all that was drawn, `corpus.jsonl` every conversation once, as `saffron annotate` reads it: its
    "response" is in the policy's token ids, "text" is the same in words.

    Args:
        prompts: (prompt, prefill) pairs; "" is no prefill.
        policy: checkpoint; None: the bundled one.
        progress: called with prompts done and all there are.

    Returns:
        The records of `corpus.jsonl`.

    Raises:
        ConfigError: `out` holds the corpus of another policy or configuration, or another process writes there.
        PromptTooLongError: a prompt that leaves no room for a continuation.
    """
    workers, path = workers or Workers(), policy or str(FOLDER / "policy")
    check_checkpoint("policy", policy)
    check_output_folder("output", out)
    work = attacks(prompts)
    if not work:
        raise ConfigError("prompts: got none, expected at least one")
    settings = {**asdict(config), "policy": fingerprint(path), "threads": workers.threads}
    batches = [work[first : first + config.batch] for first in range(0, len(work), config.batch)]
    with locked(out), open_results(out / DRAWS, SCHEMA, settings) as results:
        if not results.records:
            check_vacant(out, [CORPUS])
        missing = [one for one in batches if not all((a.prompt, a.prefill) in results.done for a in one)]
        progress(len(work) - sum(map(len, missing)), len(work))
        for _, records in workers.run(partial(Collector.load, path, config, device), missing):
            results.append(records)
            progress(len(results.done), len(work))
        found = {SCHEMA.of(record): record for record in results.records}
        corpus = _corpus(found[one.prompt, one.prefill] for one in work)
        write_atomically(out / CORPUS, "".join(json.dumps(one) + "\n" for one in corpus).encode())
    return corpus


def _corpus(records: Iterable[Record]) -> list[Record]:
    """Conversations, each once: the same answer to the same prompt, however it was forced to begin, is one."""
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        for drawn in record["responses"]:
            if drawn["ids"]:
                conversation = {"prompt": record["prompt"], "response": drawn["ids"], "text": drawn["text"]}
                found.setdefault(
                    (record["prompt"], drawn["text"]),
                    {**conversation, "prefill": record["prefill"], "draw": drawn["draw"]},
                )
    return list(found.values())
