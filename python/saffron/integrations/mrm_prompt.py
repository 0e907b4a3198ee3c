"""What the MRM reads before a response, where prompts come as token ids of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from saffron.errors import ConfigError
from saffron.models.reward_models import MultifurcationRewardModel

MRMPrompt = str | Sequence[str] | Sequence[Sequence[int]]


def mrm_contexts(
    mrm: MultifurcationRewardModel,
    rows: Sequence[Sequence[int]],
    prompts: MRMPrompt | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of everything before the response, in the MRM's own format.

    Args:
        mrm: the reward model.
        rows: the policy's prompts, token ids without padding.
        prompts: what the MRM is shown of each: a text, which it puts between its prefix and infix, or the ids of
            its whole context. One text serves a single row. None: the text of the row, without special tokens.
        tokenizer: the policy's, to decode rows with; None: the MRM's own.

    Raises:
        ConfigError: no MRM, another number of prompts than rows, an empty one, or rows to decode and no tokenizer.
    """
    if not isinstance(mrm, MultifurcationRewardModel):
        raise ConfigError(f"mrm: got {type(mrm).__name__}, expected a MultifurcationRewardModel")
    if prompts is None:
        tokenizer = tokenizer or mrm.tokenizer
        if tokenizer is None:
            raise ConfigError(
                "mrm_prompt: got None, and there is no tokenizer to decode input_ids with; pass token ids"
            )
        prompts = [str(tokenizer.decode(list(row), skip_special_tokens=True)) for row in rows]
    given: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
    if len(given) != len(rows):
        raise ConfigError(f"mrm_prompt: got {len(given)} for {len(rows)} rows of input_ids, expected one each")
    contexts = []
    for i, prompt in enumerate(given):
        if len(prompt) == 0:
            raise ConfigError(f"mrm_prompt: row {i} is empty, expected a text or token ids")
        contexts.append(tuple(mrm.context_tokens(prompt) if isinstance(prompt, str) else prompt))
        mrm.check_tokens(f"mrm_prompt, row {i}", contexts[-1])
    return contexts
