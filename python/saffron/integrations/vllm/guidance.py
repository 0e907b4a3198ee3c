"""MRM guidance for requests to vLLM: `LLM(logits_processors=["saffron.integrations.vllm.guidance:MrmGuidance"])`."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState

from saffron.errors import ConfigError, SaffronError, shown
from saffron.integrations.guidance import Guide, check_guidance
from saffron.integrations.mrm_prompt import mrm_contexts
from saffron.integrations.vllm.processor import RequestProcessor, Wanted
from saffron.models.bundled import FOLDER
from saffron.models.chat import check_text
from saffron.models.loading import load_tokenizer
from saffron.models.reward_models import MultifurcationRewardModel

BETA, TOP_P, PROMPT = "saffron_beta", "saffron_top_p", "saffron_mrm_prompt"
MRM = "SAFFRON_VLLM_MRM"
logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name


class Wish(NamedTuple):
    """How one request is guided."""

    beta: float
    top_p: float
    prompt: str | list[int] | None


class MrmGuidance(RequestProcessor[Wish]):
    """`RewardGuidance` in vLLM: tokens of the nucleus get `logit + beta * reward`, all others -inf.

    Which requests, and how, say `SamplingParams.extra_args`, which is `vllm_xargs` of the API: `saffron_beta` (at least
    0; without it a request is not guided), `saffron_top_p` (0.8), and `saffron_mrm_prompt`, what the MRM is shown as
    the prompt, a text or the ids of its whole context (the text of the prompt, without special tokens).

    The MRM is the folder or hub name `additional_config["saffron_mrm"]` of the engine or, where that says nothing, of
    the variable SAFFRON_VLLM_MRM ("bundled": the one that comes with this package). It must share the policy's
    tokenizer; each rank of a tensor-parallel engine loads one. Where a response has grown beyond what the MRM can read,
    or where its prompt is none that the MRM can read, the answer ends there, with an end token: it would be unguided.

    Raises:
        ConfigError: no MRM is named, or one that does not fit. CheckpointError: it cannot be loaded.
    """

    def __init__(
        self, vllm_config: VllmConfig, place: torch.device | LogitsProcRequestState, is_pin_memory: bool = False
    ) -> None:
        super().__init__(vllm_config, place, is_pin_memory)
        named = (vllm_config.additional_config or {}).get("saffron_mrm") or os.environ.get(MRM)
        if not named:
            raise ConfigError(f"{MRM}: got nothing, nor additional_config['saffron_mrm']; expected the MRM to guide by")
        path = FOLDER / "mrm" if named == "bundled" else named
        self.guide = Guide(
            MultifurcationRewardModel.from_pretrained(path, device=self.device), _end_tokens(vllm_config)
        )
        needed, there = vllm_config.model_config.get_vocab_size(), self.guide.mrm.vocab_size
        if there < needed:
            raise ConfigError(f"{path}: its vocabulary has {there} entries, the policy's {needed}")
        own, other = load_tokenizer(vllm_config.model_config.tokenizer), self.guide.mrm.tokenizer
        if own is not None and other is not None and own.get_vocab() != other.get_vocab():
            raise ConfigError(f"{path}: its tokenizer is another one than the policy's, whose token ids it has to read")
        self._contexts: dict[Any, tuple[int, ...] | None] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises `ConfigError` (a `ValueError`) at admission; called by both runners' front ends."""
        known = BETA, TOP_P, PROMPT
        for name in sampling_params.extra_args or {}:
            if str(name).startswith("saffron_") and name not in known:
                raise ConfigError(f"extra_args: got {shown(name)}, expected {', '.join(known)}")
        wish = _wish(sampling_params)
        if wish is None:
            return
        prompt = wish.prompt
        if isinstance(prompt, str):
            check_text(PROMPT, prompt)
        ids = isinstance(prompt, list) and all(type(one) is int and one >= 0 for one in prompt)
        if prompt is not None and not ((isinstance(prompt, str) or ids) and prompt):
            raise ConfigError(f"{PROMPT}: got {shown(prompt)}, expected a text or token ids")
        try:
            check_guidance(wish.beta, wish.top_p)
        except ConfigError as error:
            raise ConfigError(f"saffron_{error}") from error

    def read(self, params: SamplingParams) -> Wish | None:
        return _wish(params)

    def process(self, logits: Tensor, wanted: list[Wanted[Wish]]) -> None:
        texts, guided = [], []
        mrm, ends = self.guide.mrm, self.guide.ends.long().to(logits.device)
        for one in wanted:
            prompt, response = one.tokens()
            context = self._context(tuple(prompt), one.options.prompt)
            if context is None or (mrm.context is not None and len(context) + len(response) > mrm.context):
                last = logits[one.row, ends]
                if bool((last == -torch.inf).all()):  # `min_tokens`, `allowed_token_ids` or a grammar forbade the end
                    last = torch.zeros_like(last)
                logits[one.row] = -torch.inf
                logits[one.row, ends] = last
            else:
                texts.append((context, list(response)))
                guided.append(one)
        if not guided:
            return
        rows = [one.row for one in guided]
        beta = torch.tensor([one.options.beta for one in guided], dtype=torch.float32, device=logits.device)
        top_p = torch.tensor([one.options.top_p for one in guided], dtype=torch.float64, device=logits.device)
        logits[rows] = self.guide.guided(texts, logits[rows], beta, top_p).to(logits.dtype)

    def _context(self, prompt: tuple[int, ...], given: str | list[int] | None) -> tuple[int, ...] | None:
        """What the MRM reads before the response, None if it cannot; kept, as each step asks again."""
        key = prompt, tuple(given) if isinstance(given, list) else given
        most = self.guide.mrm.context
        if key not in self._contexts:
            if len(self._contexts) > 1024:
                self._contexts.clear()
            try:
                shown_to_it: Any = None if given is None else [given]
                (self._contexts[key],) = mrm_contexts(self.guide.mrm, [prompt], shown_to_it)
            except SaffronError as error:  # an error here would end the engine
                logger.error("a request cannot be guided, and is ended: %s", error)
                self._contexts[key] = None
            if most is not None and len(self._contexts[key] or ()) > most:
                logger.error(
                    "a request cannot be guided, and is ended: its prompt is longer than the MRM reads (%d)", most
                )
        return self._contexts[key]


def _wish(params: SamplingParams) -> Wish | None:
    given: dict[str, Any] = params.extra_args or {}
    if BETA in given:
        return Wish(given[BETA], given.get(TOP_P, 0.8), given.get(PROMPT))
    if TOP_P in given or PROMPT in given:
        raise ConfigError(f"{BETA}: got nothing, expected the weight of the reward, as {TOP_P} or {PROMPT} is given")
    return None


def _end_tokens(config: VllmConfig) -> list[int]:
    """Ids that end a response: of the generation configuration, else of the model's.

    Raises:
        ConfigError: there are none.
    """
    model = config.model_config
    ids = (model.try_get_generation_config() or {}).get("eos_token_id")
    ids = getattr(model.hf_config, "eos_token_id", None) if ids is None else ids
    if ids is None or ids == []:
        raise ConfigError("eos_token_id: the policy's configuration names none, so no response could end")
    return [ids] if isinstance(ids, int) else list(ids)
