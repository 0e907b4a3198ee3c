"""The policy of a search, run by vLLM: with its scheduler, its paged K/V cache, and as many devices as it spans."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from vllm import LLM, EngineArgs, SamplingParams
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.sampling_params import RequestOutputKind
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import InprocClient
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor
from vllm.v1.request import Request as VllmRequest

from saffron.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineError,
    SaffronError,
    UnsupportedModelError,
    outside,
    reason,
    shown,
)
from saffron.integrations.vllm import BACKEND
from saffron.integrations.vllm.processor import RequestProcessor, Wanted
from saffron.models.chat import check_template_options
from saffron.models.checks import expect
from saffron.models.flops import ModelFlops
from saffron.models.loading import check_place, load_tokenizer, quiet
from saffron.models.policy import Policy
from saffron.models.trie_model import Index, Rows
from saffron_kernels import KVTrie

KEY = "saffron_rows"
ROWS = "saffron.integrations.vllm.policy:LogitRows"
REMEMBERED = 1024  # sequences of the last passes whose blocks' hashes are kept
_NONE: Index = np.empty(0, dtype=np.int32)


class LogitRows(RequestProcessor[tuple[dict[int, Tensor], int]]):
    """Hands the rows of logits over, on their device, to whoever wants them in the worker's process."""

    def read(self, params: SamplingParams) -> tuple[dict[int, Tensor], int] | None:
        return (params.extra_args or {}).get(KEY)

    def process(self, logits: Tensor, wanted: list[Wanted[tuple[dict[int, Tensor], int]]]) -> None:
        copies = logits[[one.row for one in wanted]]
        for one, row in zip(wanted, copies.unbind(), strict=True):
            rows, i = one.options
            rows[i] = row  # of a prompt that is read in chunks, the last one stays


class VllmPolicy(Policy):
    """A policy whose forward passes a vLLM engine runs; all else of a search is as ever::

        policy = VllmPolicy.from_pretrained("meta-llama/Llama-3.1-70B-Instruct", tensor_parallel_size=4)
        SaffronSearch(policy, mrm).generate("...")

    A pass is one request of one token for each beam, which finds all tokens but the last in vLLM's prefix cache, if
    the size of its blocks is 1; otherwise it runs those of an incomplete block again. No request outlives a pass, so
    vLLM's cache is never too full for a search: what it had to drop is run again. `cache_tokens` is what it holds.

    The logits come from the worker, if that runs in this process (`LogitRows`), else as vLLM's own "logprobs": with
    several processes (tensor or pipeline parallel) an engine has to be made with `logprobs_mode="raw_logits"` and
    `max_logprobs=-1`, which costs a sort of each row.

    Args:
        engine: an `LLM` or `LLMEngine`, made with `logits_processors=[ROWS]` or as above. While a search runs nobody
            else may use it. In one process vLLM serves one engine: to end another one ends what they share.
        chat_template_kwargs, split_special_tokens: as for `Policy`.

    Attributes:
        cache_tokens: tokens that vLLM's K/V cache holds.

    Raises:
        ConfigError: an engine that cannot serve a policy.
    """

    def __init__(
        self,
        engine: LLM | LLMEngine,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        split_special_tokens: bool = True,
    ) -> None:
        expect("engine", engine, LLM, LLMEngine)
        self.engine = engine.llm_engine if isinstance(engine, LLM) else engine
        config = self.engine.vllm_config
        self._in_process = _check(config, isinstance(self.engine.engine_core, InprocClient))
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._ended: str | None = None  # why nothing can be run any more
        self._hashes: dict[tuple[int, ...], list[Any]] = {}
        self._params = SamplingParams(
            max_tokens=1, temperature=0, detokenize=False, logprobs=None if self._in_process else -1,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        self.model = _skeleton(config)
        self.tokenizer = load_tokenizer(config.model_config.model)
        self.flops = ModelFlops.of(self.model)
        self.chat_template_kwargs = check_template_options(chat_template_kwargs)
        self.split_special_tokens, self._encoder = split_special_tokens, None
        embeddings: Any = self.model.get_input_embeddings()
        self._input_size = int(embeddings.weight.shape[0])
        # Of a trie cache: prompts may be read in parts, and nothing is ever held.
        self.share_prefixes, self.keep_prefixes, self.cache_dtype = True, True, None
        self.kv = KVTrie(1, 1, 1, capacity=1)
        cache = config.cache_config
        self.cache_tokens = (cache.num_gpu_blocks or 0) * cache.block_size

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        split_special_tokens: bool = True,
        **options: Any,
    ) -> Self:
        """Starts an engine in this process; its workers are processes of their own where there are several.

        Args:
            path: the checkpoint, a folder or a hub name.
            dtype: of weights and cache; None: fp32 on a CPU, the checkpoint's own elsewhere.
            device: vLLM runs where it was built for: "cpu" or "cuda" can only be confirmed.
            chat_template_kwargs, split_special_tokens: as for `Policy`.
            options: of vLLM's `EngineArgs` (`tensor_parallel_size`, `gpu_memory_utilization`, `max_model_len`, ...).
                `block_size` is 1 where the attention of this package runs, on CPUs with `SAFFRON_VLLM=1`.

        Raises:
            CheckpointError: vLLM cannot load or run it. CapacityError: its K/V cache does not hold the context.
            ConfigError: options that `EngineArgs` does not have or that vLLM's error names, or another device.
        """
        place = check_place(path, "config.json")
        own = current_platform.device_type
        if device is not None and torch.device(device).type != own:
            raise ConfigError(f"device: got {device}, and this vLLM runs on {own}")
        unknown = sorted(set(options) - {field.name for field in fields(EngineArgs)})
        if unknown:
            raise ConfigError(f"options: got {', '.join(unknown)}, which vLLM's EngineArgs does not have")
        try:
            config = EngineArgs(**_arguments(place, dtype, options)).create_engine_config()
            if config.parallel_config.world_size == 1:  # on CPUs vLLM chooses a process of its own
                config.parallel_config.distributed_executor_backend = "uni"
            _check(config, True)
            engine = LLMEngine(config, Executor.get_class(config), log_stats=False, multiprocess_mode=False)
        except SaffronError:
            raise
        except Exception as error:  # of many types, from many places
            given = {**options, **({} if dtype is None else {"dtype": dtype})}
            named = any(re.search(rf"\b{name}\b", str(error)) for name in given)
            kind = CapacityError if "KV cache" in str(error) else ConfigError if named else CheckpointError
            raise kind(f"{path}: vLLM cannot run it ({_said(error)})") from error
        return cls(engine, chat_template_kwargs=chat_template_kwargs, split_special_tokens=split_special_tokens)

    def __getstate__(self) -> NoReturn:
        raise ConfigError("VllmPolicy: it holds a running engine, of which there are no copies and pickles")

    @property
    def device(self) -> torch.device:
        """Where the logits are."""
        own = current_platform.device_type
        return torch.device(own, torch.cuda.current_device()) if own == "cuda" else torch.device(own)

    @property
    def context(self) -> int:
        return int(self.engine.model_config.max_model_len)

    def close(self) -> None:
        """Ends the engine and its workers."""
        with self._lock:
            self._ended = "it was closed"
            self.engine.engine_core.shutdown()

    # In the place of the trie: every row is a sequence.

    def new_rows(self) -> Rows:
        return Rows(None, _NONE)

    def read(self, sequences: Sequence[Sequence[int]]) -> tuple[Index, Tensor]:
        if not sequences:
            raise ConfigError("sequences: got none, expected at least one")
        for i, sequence in enumerate(sequences):
            self.check_tokens(f"sequences[{i}]", sequence)
            self.check_length(f"sequences[{i}]", len(sequence), 1)  # vLLM always generates one
        return np.zeros(len(sequences), dtype=np.int32), self.run_alone(sequences)

    def forget(self, leaves: Index) -> None:
        """Nothing was held."""

    def logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return self.read(sequences)[1]

    def check_weights(self) -> None:
        """Whoever changes the weights of the engine resets its prefix cache."""

    def run_alone(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The logits `[sequences, vocab]` behind each sequence, by one request for each."""
        core = self.engine.engine_core
        rows: dict[int, Tensor] = {}
        with self._lock:
            if self._ended:
                raise EngineError(f"VllmPolicy: {self._ended}; make another one")
            if self.engine.has_unfinished_requests():
                raise EngineError("VllmPolicy: its vLLM engine runs requests of others, whose outputs would be lost")
            left = {f"saffron-{next(self._numbers)}": i for i in range(len(sequences))}
            try:
                with outside("VllmPolicy: vLLM stopped", EngineError):
                    for name, i in left.items():
                        self._submit(self._request(name, sequences[i], (rows, i)))
                    while left:
                        # Half a step leaves rows in the worker that do not fit its requests: wrong logits, no error.
                        self._ended = "vLLM was stopped within a step, so that its rows may be wrong"
                        outputs = core.get_output().outputs
                        self._ended = None
                        for output in outputs:
                            i = left.pop(output.request_id)
                            if output.finish_reason not in (FinishReason.LENGTH, FinishReason.STOP):
                                raise EngineError(f"VllmPolicy: vLLM gave a request up ({output.finish_reason})")
                            if output.new_logprobs is not None:
                                rows[i] = self._row(*output.new_logprobs[:2])
            finally:
                core.abort_requests(list(left))
        return torch.stack([rows[i] for i in range(len(sequences))])

    def _request(self, name: str, tokens: Sequence[int], target: tuple[dict[int, Tensor], int]) -> EngineCoreRequest:
        params = copy.copy(self._params)
        if self._in_process:
            params.extra_args = {KEY: target}
        return EngineCoreRequest(
            request_id=name, prompt_token_ids=list(tokens), mm_features=None, sampling_params=params,
            pooling_params=None, arrival_time=time.time(), lora_request=None, cache_salt=None, data_parallel_rank=None,
        )  # fmt: skip

    def _submit(self, request: EngineCoreRequest) -> None:
        """Blocks are found by hashes of all tokens up to their end. In this process a beam takes over those of the beam
        that it continues, so that one is made for each new token."""
        client = self.engine.engine_core
        if not isinstance(client, InprocClient):
            return client.add_request(request)
        core, tokens = client.engine_core, tuple(request.prompt_token_ids or ())
        beam = VllmRequest.from_engine_core_request(request, None)
        beam.block_hashes = list(self._hashes.get(tokens[:-1], ()))
        assert core.request_block_hasher is not None  # as prefixes are cached
        beam.block_hashes += core.request_block_hasher(beam)
        self._hashes[tokens] = beam.block_hashes
        if len(self._hashes) > REMEMBERED:
            del self._hashes[next(iter(self._hashes))]
        core.add_request(beam)

    def _row(self, tokens: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> Tensor:
        """Logits by token id, of one position's tokens and logits in the order of the latter."""
        row = torch.full((self.vocab_size,), -torch.inf)
        row[torch.tensor(tokens[0], dtype=torch.long)] = torch.tensor(values[0])
        return row.to(self.device)


def _check(config: VllmConfig, core_is_here: bool) -> bool:
    """Whether the worker runs in this process, so that its rows can be had there.

    Args:
        core_is_here: the engine's core does.

    Raises:
        ConfigError: an engine that does not give logits, or not in time.
    """
    model = config.model_config
    if not config.cache_config.enable_prefix_caching:
        raise ConfigError("engine: prefix caching is off, so that each step would run whole prompts again")
    for what, there in (
        ("speculative decoding", config.speculative_config is not None),
        ("data parallelism", config.parallel_config.data_parallel_size > 1),
        ("a pooling model", model.runner_type == "pooling"),
    ):
        if there:
            raise ConfigError(f"engine: got one with {what}, which does not serve a policy")
    here = core_is_here and config.parallel_config.distributed_executor_backend == "uni"
    if here and any(one in (ROWS, LogitRows) for one in model.logits_processors or ()):
        return True
    if model.logprobs_mode != "raw_logits" or model.max_logprobs != -1:
        raise ConfigError(
            f"engine: it shows nobody its logits; expected one in this process, made with logits_processors=[{ROWS!r}],"
            ' or logprobs_mode="raw_logits" and max_logprobs=-1'
        )
    return False


def _arguments(path: str, dtype: torch.dtype | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an engine for a policy; `options` replace some of them."""
    load_general_plugins()
    cpu = current_platform.is_cpu()
    chosen: dict[str, Any] = {
        "model": path,
        "dtype": str(dtype).removeprefix("torch.") if dtype else "float32" if cpu else "auto",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "prefix_caching_hash_algo": "xxhash" if importlib.util.find_spec("xxhash") else "sha256",
        "disable_log_stats": True,
    }
    if cpu:
        ours = AttentionBackendEnum.CPU_ATTN.get_path() == BACKEND
        chosen |= {
            "block_size": 1 if ours else 32,  # vLLM's own wants multiples of 32
            "enforce_eager": True,
            "kv_cache_memory_bytes": 4 << 30,  # VLLM_CPU_KVCACHE_SPACE replaces it
        }
    if max(options.get("tensor_parallel_size", 1), options.get("pipeline_parallel_size", 1)) > 1:
        chosen |= {"logprobs_mode": "raw_logits", "max_logprobs": -1}
    else:
        chosen["logits_processors"] = [ROWS]
    return {**chosen, **options}


def _said(error: Exception) -> str:
    """Of errors of its configuration also which argument is wrong."""
    if not isinstance(error, ValidationError):
        return reason(error)
    wrong = [(".".join(map(str, one["loc"])), one) for one in error.errors()]
    return "; ".join(f"{name}: got {shown(one['input'])}, {one['msg']}" if name else one["msg"] for name, one in wrong)


def _skeleton(config: VllmConfig) -> PreTrainedModel:
    """The model without weights: its configuration, and what its layers' sizes say."""
    no_model = f"{config.model_config.model}: transformers cannot make its layers"
    with quiet(), torch.device("meta"), outside(no_model, UnsupportedModelError):
        hf = copy.deepcopy(config.model_config.hf_config)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(hf, dtype=config.model_config.dtype)
    generation = config.model_config.try_get_generation_config()
    if generation:
        model.generation_config = GenerationConfig.from_dict(generation)
    return model
