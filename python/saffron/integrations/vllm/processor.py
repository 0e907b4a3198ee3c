"""A logits processor for both of vLLM's model runners: V1 numbers requests by row, V2 by slot."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

T = TypeVar("T")
Tokens = Callable[[], tuple[list[int], list[int]]]  # of a request: its prompt, and what it has generated


class Wanted(NamedTuple, Generic[T]):
    """A request that asked for the processor: its row of the logits, what it asked for, and its tokens."""

    row: int
    options: T
    tokens: Tokens


class RequestProcessor(V1LogitsProcessor, V2LogitsProcessor, Generic[T]):
    """Calls `process` with the requests for which `read` finds something in their sampling parameters.

    Args:
        place: the device (V1), or the runner's state (V2).
    """

    def __init__(
        self, vllm_config: VllmConfig, place: torch.device | LogitsProcRequestState, is_pin_memory: bool = False
    ) -> None:
        self._state = None if isinstance(place, torch.device) else place
        self.device = place if isinstance(place, torch.device) else place.device
        self._asked: dict[int, tuple[T, Tokens]] = {}

    @abstractmethod
    def read(self, params: SamplingParams) -> T | None:
        """What a request asks of the processor; None: nothing."""

    @abstractmethod
    def process(self, logits: Tensor, wanted: list[Wanted[T]]) -> None:
        """Changes rows of `logits [rows, vocab]`, in place."""

    def is_argmax_invariant(self) -> bool:
        """V1: False, so that greedy requests pass as well."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """V1: requests have come, gone or moved; the list of generated tokens is the runner's own, which grows."""

        def begin(params: SamplingParams, prompt: list[int] | None, output: list[int]) -> tuple[T, Tokens] | None:
            options = self.read(params)
            return None if options is None else (options, lambda: (prompt or [], output))

        process_dict_updates(self._asked, batch_update, begin)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes a slot, in which another one may have been."""
        options = self.read(sampling_params)
        if options is None:
            self._asked.pop(req_idx, None)
        else:
            self._asked[req_idx] = options, lambda: self._tokens_at(req_idx)
        return options is not None

    def apply(self, logits: Tensor, ctx: LogitsContext | None = None) -> Tensor:
        slots = list(self._asked) if ctx is None else ctx.idx_mapping_np.tolist()
        if ctx is not None and len(slots) != len(logits):
            raise NotImplementedError(f"{type(self).__name__}: speculative decoding is not served")
        rows = zip(slots if ctx is None else range(len(slots)), slots, strict=True)
        wanted = [Wanted(row, *self._asked[slot]) for row, slot in rows if slot in self._asked]
        if wanted:
            self.process(logits, wanted)
        return logits

    def _tokens_at(self, slot: int) -> tuple[list[int], list[int]]:
        """V2: the tokens lie on the device."""
        state: Any = self._state
        prompt, total = int(state.prompt_len.np[slot]), int(state.total_len.gpu[slot])
        tokens = state.all_token_ids.gpu[slot, :total].tolist()
        return tokens[:prompt], tokens[prompt:]
