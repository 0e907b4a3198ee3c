"""The MRM's noise among the tokens of one nucleus: what decides whether a search by its rewards keeps the language."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import numpy as np
import torch
from numpy.typing import NDArray

from reproduce.real_text.judges import vader
from reproduce.real_text.scales import REWARD_SCALE, TOP_P
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.storage.results import Record
from saffron_kernels import nucleus

Floats = NDArray[np.float64]
FIGURES = ("size", "unseen", "noise", "signal", "correlation", "regret", "price", "sampled_price")


def in_nucleus(rewards: Floats, exact: Floats, probabilities: Floats, unseen: NDArray[np.bool_]) -> dict[str, float]:
    """Figures of one nucleus; what is not defined is left out.

    All but "size" and "unseen" are of the tokens that a search may choose: those the MRM has seen, or all if it has
    seen none of them.

    Args:
        rewards, exact: of the MRM, and true, for each token of the nucleus.
        probabilities: of the policy.
        unseen: tokens that the MRM was never trained on.

    Returns:
        "size" of the nucleus and its share that is "unseen"; "noise": spread of (MRM - exact); "signal": spread of the
        exact reward; their "correlation"; "regret": how far the exact reward of the token that the MRM ranks first is
        below the best one's; "price": how far its log-probability is below the most probable token's;
        "sampled_price": the same of a token that the policy draws.
    """
    found = {"size": float(len(rewards)), "unseen": float(unseen.mean())}
    choice = ~unseen if not unseen.all() else np.ones_like(unseen)
    rewards, exact, probabilities = rewards[choice], exact[choice], probabilities[choice]
    if len(rewards) < 2:
        return found
    first, log_probabilities = int(np.argmax(rewards)), np.log(probabilities)
    lost = log_probabilities.max() - log_probabilities
    found |= {
        "noise": float((rewards - exact).std()),
        "signal": float(exact.std()),
        "regret": float(exact.max() - exact[first]),
        "price": float(lost[first]),
        "sampled_price": float((probabilities * lost).sum() / probabilities.sum()),
    }
    if exact.std() > 0 and rewards.std() > 0:
        found["correlation"] = float(np.corrcoef(rewards, exact)[0, 1])
    return found


@torch.inference_mode()
def nucleus_noise(
    records: Sequence[Record], policy: Policy, mrm: MultifurcationRewardModel, count: int = 100
) -> dict[str, float]:
    """Means of `in_nucleus` over `count` prefixes of sampled answers, in units of VADER's score; NaN without any."""
    rng = np.random.default_rng(0)
    answers = [r for r in records if r["method"] == "sample" and r["prefill"]]
    answers.sort(key=itemgetter("prompt", "prefill"))  # whoever answered first
    found: list[dict[str, float]] = []
    for _ in range(count if answers else 0):
        record = answers[int(rng.integers(len(answers)))]
        ids = policy.encode(record["text"])
        prefix = ids[: int(rng.integers(0, max(1, len(ids))))]
        logits = policy.logits([[*policy.chat(record["prompt"], record["prefill"]), *prefix]])
        tokens, probabilities, _ = nucleus(logits.float(), TOP_P)
        chosen = tokens.long()
        rewards = mrm.logits([[*mrm.context_tokens(record["prompt"]), *prefix]])[0].float()[chosen] / REWARD_SCALE
        exact = vader([], [policy.decode([*prefix, token]) for token in tokens.tolist()])
        unseen = mrm.unseen[chosen] if mrm.unseen is not None else torch.zeros(len(chosen), dtype=torch.bool)
        found.append(
            in_nucleus(rewards.double().numpy(), np.array(exact), probabilities.double().numpy(), unseen.numpy())
        )
    values = {name: [one[name] for one in found if name in one] for name in FIGURES}
    return {name: float(np.mean(some)) if some else float("nan") for name, some in values.items()}
