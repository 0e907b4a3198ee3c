"""The stages: collect, annotate, train, evaluate. Each takes up what is there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from reproduce.real_text.judges import judged, sentiment, vader
from reproduce.real_text.prompts import Case, cases
from saffron.models.bundled import Models
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.text_rewards import TextReward
from saffron.search import parse_method
from saffron.storage.folders import checkpoint_fingerprint
from saffron.storage.results import Record, Schema, open_results
from saffron.training.annotate import AnnotateConfig, annotate
from saffron.training.collect import CORPUS, CollectConfig, collect
from saffron.training.conversations import read_corpus
from saffron.training.head import STATES, HeadConfig, train_head
from saffron.training.shards import read_rewards

Progress = Callable[[str, int, int], None]
REWARD = "reproduce.real_text.judges:vader"
REWARD_SCALE = 8.0  # the MRM learns rewards of this times min(0, compound), from -8 to 0
TOP_P = 0.8
SCHEMA = Schema("real-text", ("method", "prompt", "prefill"), lambda record: isinstance(record.get("text"), str))


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is run.

    Attributes:
        train: attacked prompts that the policy continues for the corpus; each is continued without the attack too.
        samples, even: continuations of each, by probability and evenly from the nucleus.
        tokens: longest continuation and answer.
        test, plain: attacked and unattacked test prompts.
        methods: run on the attacked ones; `{cap}` stands for the calibrated cap.
        plain_methods: on the unattacked ones.
        epochs, rank: of the MRM's head.
        batch: prompts decoded together.
    """

    train: int
    samples: int
    even: int
    tokens: int
    test: int
    plain: int
    methods: tuple[str, ...]
    plain_methods: tuple[str, ...]
    epochs: int = 20
    rank: int = 8
    batch: int = 20


PAPER = tuple(f"saffron:width={width}" for width in (1, 2, 4, 8, 16))
CAPPED = tuple(f"saffron:width={width},reward_cap={{cap}}" for width in (1, 2, 4, 8, 16))
SWEEP = (
    "saffron:width=8,reward_tolerance=0.8",
    "saffron:width=8,reward_tolerance=1.6",
    "saffron:width=8,policy_weight=0.8",
    "saffron:width=8,policy_weight=2.4",
)
FULL = Scale(
    train=180,
    samples=4,
    even=4,
    tokens=24,
    test=60,
    plain=20,
    methods=(
        "greedy", "sample", *(f"best-of-n:n={n}" for n in (2, 4, 8, 16, 32)), *PAPER, *CAPPED, *SWEEP,
        "beam:width=4,children=8", "rebase:width=16", "deal:width=1,children=8,lookahead=4",
        "mcts:simulations=16,children=8",
    ),
    plain_methods=("greedy", "saffron:width=8", "saffron:width=8,reward_cap={cap}"),
)  # fmt: skip
SMALL = Scale(
    train=180,
    samples=2,
    even=2,
    tokens=24,
    test=40,
    plain=20,
    methods=(
        "greedy", "sample", "saffron:width=8,reward_cap={cap}", "best-of-n:n=16", "saffron:width=8",
        "saffron:width=4,reward_cap={cap}", "saffron:width=8,policy_weight=2.4", "saffron:width=8,reward_tolerance=1.6",
        "saffron:width=4", "best-of-n:n=8", "beam:width=2,children=8",
    ),
    plain_methods=("greedy", "saffron:width=8,reward_cap={cap}"),
)  # fmt: skip
QUICK = Scale(
    train=4,
    samples=1,
    even=1,
    tokens=6,
    test=3,
    plain=2,
    methods=("greedy", "sample", "best-of-n:n=2", "saffron:width=2", "saffron:width=2,reward_cap={cap}"),
    plain_methods=("greedy", "saffron:width=2,reward_cap={cap}"),
    epochs=2,
    rank=2,
)
SCALES = {"full": FULL, "small": SMALL, "quick": QUICK}


def make_mrm(scale: Scale, policy: str, out: Path, progress: Progress) -> dict[str, Any]:
    """Collects, annotates, trains; returns what is known of the MRM, which is in `out/mrm`."""
    config = CollectConfig(samples=scale.samples, even=scale.even, max_new_tokens=scale.tokens, top_p=TOP_P, batch=32)
    given = cases("train", scale.train)
    collect(given, policy, out / "corpus", config, progress=lambda *done: progress("collecting", *done))
    corpus = read_corpus(str(out / "corpus" / CORPUS))
    settings = AnnotateConfig(prefixes="response", scale=REWARD_SCALE)
    annotate(corpus, REWARD, out / "rewards", settings, tokenizer=policy, source="corpus")
    head = HeadConfig(rank=scale.rank, epochs=scale.epochs)
    data = read_rewards(out / "rewards")
    summary = train_head(policy, data, out / "mrm", head, run=out / "training",
                         progress=lambda done, total, _: progress("reading the corpus", done, total))  # fmt: skip
    return summary | {"responses": len(corpus), "attacks": len(given)}


def safe_level(mrm: MultifurcationRewardModel, out: Path) -> float:
    """The MRM's median reward of held-out prefixes whose exact reward is 0: what it says of text that is safe."""
    from safetensors.torch import load_file

    held = load_file(out / "training" / f"heldout-{STATES}")
    assert mrm.bias is not None
    tokens, safe = held["tokens"], held["rewards"] == 0
    predicted = (held["states"] * mrm.head_weight.float()[tokens]).sum(1) + mrm.bias.float()[tokens]
    return round(float(predicted[safe].median()), 3)


def run_methods(
    scale: Scale,
    policy: Policy,
    mrm: MultifurcationRewardModel,
    cap: float,
    out: Path,
    progress: Progress,
    *,
    answer: bool = True,
) -> list[Record]:
    """Answers of every method to every test prompt, with what the judges say."""
    reward = TextReward(vader, name=REWARD)
    models = Models(policy, mrm, reward)
    attacked, plain = cases("test", scale.test), [Case(case.prompt, "") for case in cases("test", scale.plain)]
    work = [(method.format(cap=cap), plain) for method in scale.plain_methods]
    work += [(method.format(cap=cap), attacked) for method in scale.methods]
    settings = {"tokens": scale.tokens, "batch": scale.batch, "top_p": TOP_P,
                "models": checkpoint_fingerprint(out / "mrm")}  # fmt: skip
    total, done = sum(len(given) for _, given in work), 0
    with open_results(out / "answers.jsonl", SCHEMA, settings) as results:
        for first in range(0, max(len(attacked), len(plain)), scale.batch):
            for name, given in work:
                part = given[first : first + scale.batch]
                if answer and part and not all((name, *case) in results.done for case in part):
                    results.append(_answers(name, part, models, scale.tokens))
                done += len(part)
                progress("answering", done, total)
        return list(results.records)


def _answers(name: str, given: Sequence[Case], models: Models, tokens: int) -> list[Record]:
    method = parse_method(name, models, max_new_tokens=tokens, min_new_tokens=min(16, tokens), top_p=TOP_P)
    found = method.generate([case.prompt for case in given], [case.prefill for case in given])
    likely = log_probabilities(
        models.policy, [(case, result.token_ids) for case, result in zip(given, found, strict=True)]
    )
    return [
        {
            "method": name, **case._asdict(), "text": result.text, "tokens": len(result.token_ids),
            "reward": min(0.0, sentiment(result.text)), "judge": judged(result.text), "log_probability": chance,
            "distinct": distinct(result.text), "cost": asdict(result.cost),
        }
        for case, result, chance in zip(given, found, likely, strict=True)
    ]  # fmt: skip


@torch.inference_mode()
def log_probabilities(policy: Policy, answers: Iterable[tuple[Case, Sequence[int]]]) -> list[float]:
    """Mean log-probability per token of each answer, under the undefended policy after the attack."""
    found = []
    for case, tokens in answers:
        context = policy.chat(case.prompt, case.prefill)
        rows, logits = policy.prefill([[*context, *tokens[:i]] for i in range(len(tokens))])
        policy.release(rows)
        chosen = torch.tensor(list(tokens))[:, None]
        found.append(float(logits.float().log_softmax(-1).cpu().gather(1, chosen).mean()))
    return found


def distinct(text: str) -> float:
    """Share of the words that are different ones (distinct-1)."""
    words = text.lower().split()
    return len(set(words)) / len(words) if words else 0.0


def similarity(one: str, other: str) -> float:
    """Cosine of the counts of words."""
    a, b = Counter(one.lower().split()), Counter(other.lower().split())
    norm = math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    return sum(a[word] * b[word] for word in a) / norm if norm else 0.0
