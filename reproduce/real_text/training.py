"""The MRM: collects, annotates, trains. Each stage takes up what is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reproduce.real_text.answers import REWARD, Progress
from reproduce.real_text.prompts import cases
from reproduce.real_text.scales import REWARD_SCALE, TOP_P, Scale
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.training.annotate import AnnotateConfig, annotate
from saffron.training.collect import CORPUS, CollectConfig, collect
from saffron.training.conversations import read_corpus
from saffron.training.head import STATES, HeadConfig, train_head
from saffron.training.shards import read_rewards


def make_mrm(scale: Scale, policy: str, out: Path, progress: Progress) -> dict[str, Any]:
    """Returns what is known of the MRM, which is in `out/mrm`."""
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


def safe_levels(mrm: MultifurcationRewardModel, out: Path, quantiles: Sequence[float]) -> dict[float, float]:
    """Quantiles of the MRM's reward of held-out prefixes whose exact reward is 0: what it says of text that is safe."""
    from safetensors.torch import load_file

    held = load_file(out / "training" / f"heldout-{STATES}")
    assert mrm.bias is not None
    tokens, safe = held["tokens"], held["rewards"] == 0
    predicted = (held["states"] * mrm.head_weight.float()[tokens]).sum(1) + mrm.bias.float()[tokens]
    return {q: round(float(torch.quantile(predicted[safe], q)), 3) for q in quantiles}
