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
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from saffron.integrations.vllm import NAME
from saffron.integrations.vllm.plan_buffers import PlanBuffers
from saffron_kernels import append_kv, block_plan, tree_attention


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
    def supports_compute_capability(cls, capability: object) -> bool:
        """What the kernels are compiled for. They never ran on a GPU."""
        major, minor = capability  # type: ignore[misc]
        return (major, minor) >= (8, 0)

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
        count: `[1]`, how many tokens it has; None: all.
    """

    num_actual_tokens: int
    order: Tensor | None
    slot: Tensor
    begin: Tensor
    end: Tensor
    count: Tensor | None = None


class SaffronMetadataBuilder(AttentionMetadataBuilder[SaffronMetadata]):
    """Plans each step from the block table."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    buffers: PlanBuffers | None = None

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        if device.type != "cpu":
            blocks, limits = vllm_config.cache_config.num_gpu_blocks or 0, vllm_config.scheduler_config
            sizes = blocks, limits.max_num_seqs, vllm_config.model_config.max_model_len, limits.max_num_batched_tokens
            self.buffers = PlanBuffers(self.block_size, *sizes, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SaffronMetadata:
        batch = common_attn_metadata
        if batch.causal is not True:
            raise NotImplementedError(f"{NAME}: attention that is not causal is not served")
        table, starts = batch.block_table_tensor, batch.query_start_loc
        queries = batch.num_actual_tokens
        if self.buffers is not None:
            most = batch.seq_lens_cpu_upper_bound
            return SaffronMetadata(queries, *self.buffers.fill(table, batch.seq_lens, starts, queries, most))
        order, slot, begin, end, _ = block_plan(table, batch.seq_lens, starts, self.block_size, queries)
        same = bool((order[1:] > order[:-1]).all())
        return SaffronMetadata(queries, None if same else order, slot, begin, end)


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
            f"a KV cache of dtype {kv_cache_dtype}": kv_cache_dtype != "auto",
        }
        for what, asked in refused.items():
            if asked:
                raise NotImplementedError(f"{NAME}: {what} is not served; choose another attention backend")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        tokens = slot_mapping.shape[0]
        slots = slot_mapping.to(torch.int32).clamp_(min=-1)
        append_kv(key[:tokens], value[:tokens], slots, *_rows(kv_cache))

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
        if plan.order is not None:
            q = q.index_select(0, plan.order)
        out, _ = tree_attention(q, *_rows(kv_cache), plan.slot, plan.begin, plan.end, self.scale, count=plan.count)
        place = output[:queries].view(queries, self.num_heads, self.head_size)
        if plan.order is None:
            place.copy_(out)
        else:
            place.index_copy_(0, plan.order.long(), out)
        return output


def _rows(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """K and V `[blocks * block_size, kv_heads, head_size]` of `[blocks, kv_heads, block_size, 2 * head_size]`."""
    blocks, kv_heads, block_size, both = kv_cache.shape
    rows = kv_cache.transpose(1, 2).view(blocks * block_size, kv_heads, both)
    return rows[..., : both // 2], rows[..., both // 2 :]
