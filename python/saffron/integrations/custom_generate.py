"""Saffron search from a plain call: `model.generate(**inputs, custom_generate=saffron.generate, mrm=mrm)`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import (
    BaseStreamer,
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from saffron.errors import ConfigError
from saffron.integrations.mrm_prompt import MRMPrompt, mrm_contexts
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.trie_model import Index, Rows
from saffron.search import Handle, Request, SaffronSearch
from saffron.search.config import SearchConfig
from saffron.search.result import SearchResult

_NONE: Index = np.empty(0, dtype=np.int32)
# Options that ask for something else than one deterministic answer a row, with why the search cannot honour them.
_REFUSED = {
    "num_beams": "the search keeps `width` beams",
    "num_beam_groups": "the search keeps `width` beams",
    "num_return_sequences": "the search gives one answer a prompt",
    "penalty_alpha": "contrastive search is another decoder",
    "dola_layers": "DoLa is another decoder",
    "constraints": "constrained beam search is another decoder",
    "force_words_ids": "constrained beam search is another decoder",
    "prompt_lookup_num_tokens": "the search does not speculate",
    "use_mtp": "the search does not speculate",
    "output_scores": "`sequences_scores` and `results` say what the search knows",
    "output_logits": "the search keeps no logits",
    "output_attentions": "the trie cache has no attention weights",
    "output_hidden_states": "the search keeps no hidden states",
}
# These count rows or keep a state for each, and the rows of a search are not those of the batch.
_BOUND_TO_ROWS = (
    PrefixConstrainedLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
# What `generate` hands on whatever it was told, and what changes nothing here.
_UNUSED = ("use_cache", "logits_to_keep", "cache_position", "return_dict")


@dataclass
class SaffronOutput(GenerateDecoderOnlyOutput):
    """What `generate` returns with `return_dict_in_generate=True`. Of its base only `sequences` is set.

    Attributes:
        sequences: `[batch, length]` prompts and answers, padded on the right.
        sequences_scores: `[batch]` fp32, the score of each answer.
        results: the `SearchResult` of each answer.
    """

    sequences_scores: Tensor | None = None
    results: list[SearchResult] | None = None


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    *,
    mrm: MultifurcationRewardModel,
    mrm_prompt: MRMPrompt | None = None,
    policy_tokenizer: PreTrainedTokenizerBase | None = None,
    width: int | None = None,
    top_p: float | None = None,
    search_config: SearchConfig | None = None,
    **model_kwargs: Any,
) -> SaffronOutput | Tensor:
    """Saffron search as the decoding loop of `model.generate`, which prepares the arguments in front of `mrm`::

        model.generate(**inputs, custom_generate=saffron.generate, mrm=mrm, width=16, max_new_tokens=32)

    The model is an ordinary one; it runs over the trie cache for the call and is afterwards as it was. End and pad
    tokens and lengths are those of the generation configuration (`min_new_tokens` 0 unless set); sampling that the
    model brings along is left aside. Logits processors act before the nucleus is taken. A streamer gets tokens as soon
    as no beam can change them.

    Args:
        model, mrm: the policy and the reward model.
        input_ids: `[batch, length]`; what `attention_mask` marks as padding is left out.
        mrm_prompt: what the MRM is shown as the prompt, for each row: a text, or the token ids of its whole context.
            None: the text of the row without special tokens; words of a chat template and a prefill stay in it.
        policy_tokenizer: None: the MRM's tokenizer is the policy's too. (`generate` keeps `tokenizer` for itself.)
        width, top_p: of the search; None: as in `search_config`.
        search_config: everything else about the search; its `max_new_tokens` and `min_new_tokens` do not count.

    Returns:
        `[batch, length]` prompts and answers, or `SaffronOutput` where `return_dict_in_generate` is set.

    Raises:
        ConfigError: an option that the search cannot honour, by name, or a wrong prompt. Others as `SaffronSearch`.
    """
    call = _arguments_of(inspect.currentframe())
    streamer = streamer or call.get("streamer")
    if streamer is not None and len(input_ids) > 1:
        raise ConfigError(f"streamer: got {len(input_ids)} prompts, expected one")
    _check_options(generation_config, model.generation_config, stopping_criteria, call)
    prompts = _unpadded(input_ids, **model_kwargs)
    config = _search_config(generation_config, input_ids.shape[1], search_config, width, top_p)
    contexts = mrm_contexts(mrm, prompts, mrm_prompt, policy_tokenizer)
    tokenizer = policy_tokenizer or mrm.tokenizer
    ends = _ids(generation_config.eos_token_id)
    pad = [*_ids(generation_config.pad_token_id), *ends, 0][0]
    processors = _processors(generation_config, logits_processor)
    with _left_as_it_was(model):
        policy = Policy(model, tokenizer)
        if processors:
            policy = _ProcessedPolicy(model, tokenizer, processors, input_ids.shape[1], pad)
        requests = [Request(tuple(p), c) for p, c in zip(prompts, contexts, strict=True)]
        results = _search(SaffronSearch(policy, mrm, config, end_tokens=ends), requests, streamer)
    output = _output(input_ids, results, pad)
    return output if generation_config.return_dict_in_generate else output.sequences


class _ProcessedPolicy(Policy):
    """A policy whose logits pass through logits processors, which see the rows as in transformers' own loops.

    Args:
        processors: act on the logits.
        length, pad: rows are padded on the left with `pad` to `length` before the response.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        processors: LogitsProcessorList,
        length: int,
        pad: int,
    ) -> None:
        super().__init__(model, tokenizer)
        self.processors, self.length, self.pad = processors, length, pad
        self.ids = torch.empty(0, length, dtype=torch.long, device=self.device)

    def read(self, sequences: Sequence[Sequence[int]]) -> tuple[Index, Tensor]:
        leaves, logits = super().read(sequences)
        return leaves, self._process(self._padded(sequences), logits)

    def regroup(
        self, rows: Rows, keep: Sequence[int], sequences: Sequence[Sequence[int]] = (), leaves: Index = _NONE
    ) -> None:
        super().regroup(rows, keep, sequences, leaves)
        self.ids = torch.cat([self.ids[list(keep)], self._padded(sequences)])

    def step(self, rows: Rows, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        logits = super().step(rows, parents, tokens)
        new = torch.tensor(list(tokens), device=self.device)
        self.ids = torch.cat([self.ids[list(parents)], new[:, None]], 1)
        return self._process(self.ids, logits)

    def _padded(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        length = max(self.length, self.ids.shape[1])
        rows = [[self.pad] * (length - len(s)) + list(s) for s in sequences]
        return torch.tensor(rows, dtype=torch.long, device=self.device).reshape(-1, length)

    @torch.inference_mode()
    def _process(self, ids: Tensor, logits: Tensor) -> Tensor:
        return self.processors(ids, logits.float())  # type: ignore[arg-type]


def _search(search: SaffronSearch, requests: Sequence[Request], streamer: BaseStreamer | None) -> list[SearchResult]:
    """Searches, and puts tokens into the streamer as they are settled."""
    handles: list[Handle] = []
    put = 0
    for handles in search.run(requests):
        if streamer is not None:
            tokens = handles[0].tokens
            for token in tokens[put:]:
                streamer.put(torch.tensor([token]))
            put = max(put, len(tokens))
    if streamer is not None:
        streamer.end()
    return [handle.result() for handle in handles]


def _arguments_of(frame: FrameType | None) -> Mapping[str, Any]:
    """The arguments of the `model.generate` that called us, empty if somebody else did.

    transformers (5.17 to 5.23 at least) puts the prompt into a streamer and then hands neither the streamer nor an
    assistant model on to a callable `custom_generate`: this is where they can still be found.
    """
    caller = frame.f_back if frame is not None else None
    if caller is None or caller.f_code is not inspect.unwrap(GenerationMixin.generate).__code__:
        return {}
    return caller.f_locals


def _check_options(
    asked: GenerationConfig, default: GenerationConfig, criteria: StoppingCriteriaList, call: Mapping[str, Any]
) -> None:
    """Refuses what the search cannot honour; `default` is the model's own configuration."""
    for name in ("assistant_model", "synced_gpus"):
        if call.get(name) not in (None, False):
            raise ConfigError(f"{name}: the search runs one model on one device; leave it out")
    for name, why in _REFUSED.items():
        value = getattr(asked, name, None)
        if value and not (name.startswith("num_") and value == 1):
            raise ConfigError(f"{name}: got {value!r}; {why}; leave it out")
    if asked.do_sample and not default.do_sample:
        raise ConfigError("do_sample: got True; the search draws nothing at random; pass do_sample=False")
    for criterion in criteria:
        if not isinstance(criterion, MaxLengthCriteria | EosTokenCriteria):
            raise ConfigError(
                f"stopping_criteria: got {type(criterion).__name__}; a response ends by an end token or at its "
                "greatest length; leave it out"
            )


def _processors(config: GenerationConfig, processors: LogitsProcessorList) -> LogitsProcessorList:
    """The processors that act on the logits of the search.

    Left out are the shortest length, which the search knows by itself, and what `do_sample` brings.
    """
    done: tuple[str, ...] = (MinLengthLogitsProcessor.__name__, MinNewTokensLengthLogitsProcessor.__name__)
    kept = LogitsProcessorList()
    for processor in processors:
        if isinstance(processor, _BOUND_TO_ROWS):
            raise ConfigError(
                f"logits_processor: got {type(processor).__name__}, which counts the rows of a batch; the rows of a "
                "search are its beams; leave it out"
            )
        name = type(processor).__name__
        if name not in done and not (config.do_sample and name.endswith("Warper")):
            kept.append(processor)
    return kept


def _search_config(
    config: GenerationConfig, prompt: int, search: SearchConfig | None, width: int | None, top_p: float | None
) -> SearchConfig:
    """The search's configuration for prompts of `prompt` tokens, padding included."""
    search = search or SearchConfig()
    return replace(
        search,
        width=search.width if width is None else width,
        top_p=search.top_p if top_p is None else top_p,
        max_new_tokens=config.max_length - prompt,
        min_new_tokens=max(0, (config.min_length or 0) - prompt),
    )


def _unpadded(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    **others: Any,
) -> list[list[int]]:
    """The prompts without padding. Refuses model inputs that would not reach the model."""
    for name, value in others.items():
        if name not in _UNUSED and value is not None:
            raise ConfigError(f"{name}: the search reads input_ids alone; leave it out")
    if past_key_values is not None and (
        getattr(past_key_values, "_is_user_defined", False) or past_key_values.get_seq_length() > 0
    ):
        raise ConfigError("past_key_values: the search keeps a trie cache of its own; leave it out")
    keep = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    keep = keep.to(input_ids.device)
    if not bool(keep.any(1).all()):
        raise ConfigError("attention_mask: a row is nothing but padding, expected at least one token")
    if position_ids is not None:
        expected = keep.long().cumsum(1) - 1
        if not bool((position_ids.to(keep.device).expand_as(keep) == expected)[keep].all()):
            raise ConfigError("position_ids: the search counts positions from 0 in each prompt; leave it out")
    return [row[kept].tolist() for row, kept in zip(input_ids, keep, strict=True)]


def _output(input_ids: Tensor, results: list[SearchResult], pad: int) -> SaffronOutput:
    """Prompts and answers, padded on the right."""
    longest = max(len(result.tokens) for result in results)
    answers = [result.tokens + [pad] * (longest - len(result.tokens)) for result in results]
    sequences = torch.cat([input_ids, torch.tensor(answers, dtype=input_ids.dtype, device=input_ids.device)], 1)
    scores = torch.tensor([result.score for result in results], device=input_ids.device)
    return SaffronOutput(sequences=sequences, sequences_scores=scores, results=results)  # type: ignore[arg-type]


def _ids(tokens: int | Sequence[int] | None) -> list[int]:
    if tokens is None:
        return []
    return [int(tokens)] if isinstance(tokens, int) else [int(token) for token in tokens]


@contextmanager
def _left_as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Undoes what running over the trie cache sets: the attention implementation and evaluation mode."""
    attention, training = model.config._attn_implementation, model.training
    try:
        yield
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        if training:
            model.train()
