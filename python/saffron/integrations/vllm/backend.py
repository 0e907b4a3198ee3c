"""The attention backend: one plan per step (`block_plan`), shared by all layers, then `tree_attention` over the blocks.

vLLM's paged KV cache is used as it is: with the layout LBNHC the token at offset `o` of block `b` is row
`b * block_size + o`, which is also what vLLM calls its slot.

On CUDA devices the plan is made on the device, into buffers of a fixed size, and its length stays there: nothing waits
for the device, and all steps can be replayed as CUDA graphs. None of that ever ran on a GPU: tests execute the kernels
on the CPU, and what this file does around them runs on the CPU with such buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from saffron.integrations.vllm import NAME
from saffron.integrations.vllm.plan_buffers import PlanBuffers
from saffron_kernels import append_kv, block_plan, tree_attention
from saffron_kernels.backends import cpu, implementation

logger = init_logger(f"vllm.{__name__}")  # vLLM shows what is logged below its own name


class SaffronAttentionBackend(AttentionBackend):
    """Causal decoder attention; what else vLLM may ask for is refused by name."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[SaffronAttention]:
        return SaffronAttention

    @staticmethod
    def get_builder_cls() -> type[SaffronMetadataBuilder]:
        return SaffronMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """What the kernels are compiled for. They never ran on a GPU."""
        return (capability.major, capability.minor) >= (8, 0)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER


@dataclass
class SaffronMetadata:
    """The plan of one step.

    Attributes:
        num_actual_tokens: queries; rows behind them are padding.
        order: `[queries]` int32, the query at each place of the plan; None: they stand in vLLM's order.
        slot, begin, end: the plan, as for `tree_attention`.
        prepared: the same plan for the layers, where the CPU backend serves it.
        slot_mapping: `[queries]`, where K and V of this step go; vLLM looks for it here.
        count: `[1]`, how many tokens the plan has; None: all.
    """

    num_actual_tokens: int
    order: Tensor | None
    slot: Tensor
    begin: Tensor
    end: Tensor
    prepared: cpu.PlannedAttention | None = None
    slot_mapping: Tensor | None = None
    count: Tensor | None = None


def plan_step(
    table: Tensor, lengths: Tensor, starts: Tensor, block_size: int, queries: int, heads: int, dtype: torch.dtype
) -> SaffronMetadata:
    """The plan of a step on a CPU: the block table of its requests, their tokens and the first query of each."""
    order, slot, begin, end, _ = block_plan(table, lengths, starts, block_size, queries)
    same = torch.equal(order, torch.arange(queries, dtype=torch.int32))
    metadata = SaffronMetadata(queries, None if same else order, slot, begin, end)
    if dtype != torch.float16 and implementation("tree_attention", table.device, dtype) is cpu.tree_attention:
        metadata.prepared = cpu.PlannedAttention(slot, begin, end, queries, heads)
    return metadata


class SaffronMetadataBuilder(AttentionMetadataBuilder[SaffronMetadata]):
    """Plans each step from the block table."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    buffers: PlanBuffers | None = None

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        model = vllm_config.model_config
        layer_heads = get_num_attention_heads_from_layers(vllm_config, layer_names)
        self.heads = layer_heads or model.get_num_attention_heads(vllm_config.parallel_config)
        self.dtype = model.dtype
        if device.type != "cpu":
            blocks, limits = vllm_config.cache_config.num_gpu_blocks or 0, vllm_config.scheduler_config
            sizes = blocks, limits.max_num_seqs, model.max_model_len, limits.max_num_batched_tokens
            self.buffers = PlanBuffers(self.block_size, *sizes, device)
        logger.info("%s: attention of %d layers, blocks of %d tokens", NAME, len(layer_names), self.block_size)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SaffronMetadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise NotImplementedError(f"{NAME}: attention that is not causal is not served")
        table, starts = batch.block_table_tensor, batch.query_start_loc
        queries = batch.num_actual_tokens
        if self.buffers is None:
            metadata = plan_step(table, batch.seq_lens, starts, self.block_size, queries, self.heads, self.dtype)
        else:
            most = batch.seq_lens_cpu_upper_bound
            order, slot, begin, end, count = self.buffers.fill(table, batch.seq_lens, starts, queries, most)
            metadata = SaffronMetadata(queries, order, slot, begin, end, count=count)
        metadata.slot_mapping = batch.slot_mapping
        return metadata


class SaffronAttention(AttentionImpl[SaffronMetadata]):
    """One layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "soft-capped logits": bool(logits_soft_cap),
            f"attention of type {attn_type}": attn_type != AttentionType.DECODER,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
            "attention sinks": sinks is not None,
            f"kv_cache_dtype={kv_cache_dtype}": kv_cache_dtype != "auto",
        }
        for what, asked in refused.items():
            if asked:
                raise NotImplementedError(f"{NAME}: {what} is not served; choose another attention backend")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self._seen: tuple[tuple[object, ...], tuple[cpu.View, cpu.View]] | None = None

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        tokens = slot_mapping.shape[0]
        slots = slot_mapping.to(torch.int32).clamp_(min=-1)
        append_kv(key[:tokens], value[:tokens], slots, *_rows(kv_cache, self.head_size))

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SaffronMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(f"{NAME}: quantised outputs are not served")
        if attn_metadata is None:  # vLLM measures how much memory the model takes
            return output.fill_(0)
        plan, queries = attn_metadata, attn_metadata.num_actual_tokens
        q = query[:queries].view(queries, self.num_heads, self.head_size)
        place = output[:queries].view(queries, self.num_heads, kv_cache.shape[-1] - self.head_size)
        if plan.order is not None:
            q = q.index_select(0, plan.order)
        if plan.prepared is None:
            where = plan.slot, plan.begin, plan.end
            out, _ = tree_attention(q, *_rows(kv_cache, self.head_size), *where, self.scale, count=plan.count)
        else:
            out = place if plan.order is None else torch.empty_like(place)
            plan.prepared(q, *self._views(kv_cache), self.scale, out)
        if plan.order is not None:
            place.index_copy_(0, plan.order.long(), out)
        elif out is not place:
            place.copy_(out)
        return output

    def _views(self, kv_cache: Tensor) -> tuple[cpu.View, cpu.View]:
        """K and V as the CPU backend takes them; the same in every step."""
        where = kv_cache.data_ptr(), kv_cache.shape, kv_cache.stride()
        if self._seen is None or self._seen[0] != where:
            keys, values = _rows(kv_cache, self.head_size)
            self._seen = where, (cpu.view(keys), cpu.view(values))
        return self._seen[1]


def _rows(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """K and V `[blocks * block_size, kv_heads, ...]` of `[blocks, kv_heads, block_size, head_size + V's head size]`."""
    blocks, kv_heads, block_size, both = kv_cache.shape
    rows = kv_cache.transpose(1, 2).view(blocks * block_size, kv_heads, both)
    return rows[..., :head_size], rows[..., head_size:]
