"""Stands for FlashInfer in tests: what versions 0.5 to 0.7 take alike, computed in plain PyTorch.

Arguments whose place differs between versions are taken by name alone. What is asserted of them is what FlashInfer's
documentation asks for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Pages = tuple[Tensor, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows `[rows, heads, head_dim]` over tokens `[tokens, kv_heads, head_dim]`; the LSE to base 2."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,thd->hqt", q.float(), keys) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1) if scores.shape[-1] else scores
    return torch.einsum("hqt,thd->qhd", weights, values), scores.logsumexp(-1).T / math.log(2)


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        *,
        backend: str = "auto",
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and float_workspace_buffer.numel() >= 128 << 20
        assert kv_layout == "NHD" and backend in ("auto", "fa2", "fa3")
        self.backend = backend

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        custom_mask: Tensor | None = None,
        sm_scale: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        lists = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert all(x.dtype == torch.int32 and x.dim() == 1 for x in lists)
        requests = len(qo_indptr) - 1
        assert len(paged_kv_indptr) == requests + 1 and len(paged_kv_last_page_len) == requests
        assert int(paged_kv_indptr[-1]) == len(paged_kv_indices) and page_size == 1
        pages = paged_kv_indptr.diff()
        assert torch.equal(paged_kv_last_page_len, pages.clamp(max=page_size)), "tokens in each last page"
        if custom_mask is not None:
            assert custom_mask.dtype == torch.bool
            assert custom_mask.numel() == int((qo_indptr.diff() * pages).sum()) and self.backend != "fa3"
        self.sizes = (num_qo_heads, num_kv_heads, head_dim_qk)
        self.dtypes = (q_data_type, kv_data_type)
        self.rows, self.pages = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self.indices, self.mask, self.scale = paged_kv_indices.long(), custom_mask, sm_scale

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Pages,
        *,
        out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        k, v = paged_kv_cache
        assert (q.shape[1], k.shape[2], q.shape[2]) == self.sizes and k.dim() == 4 and k.shape[1] == 1
        assert (q.dtype, k.dtype) == self.dtypes and k.shape == v.shape and self.scale is not None
        out, total = torch.empty_like(q) if out is None else out, q.new_empty(q.shape[:2], dtype=torch.float32)
        masked = 0
        for request, (first, last) in enumerate(zip(self.rows, self.rows[1:], strict=False)):
            tokens = self.indices[self.pages[request] : self.pages[request + 1]]
            size = (last - first) * len(tokens)
            mask = None if self.mask is None else self.mask[masked : masked + size].view(last - first, -1)
            masked += size
            mine = slice(first, last)
            out[mine], total[mine] = attend(q[mine], k[tokens, 0], v[tokens, 0], self.scale, mask)
        return (out, total) if return_lse else out


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        *,
        use_tensor_cores: bool = False,
        backend: str = "auto",
    ) -> None:
        self._inner = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, backend=backend)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: str | torch.dtype | None = "float16",
        kv_data_type: str | torch.dtype | None = None,
        sm_scale: float | None = None,
    ) -> None:
        each = torch.arange(len(indptr), dtype=torch.int32)
        sizes = num_qo_heads, num_kv_heads, head_dim, page_size
        kinds = {"sm_scale": sm_scale, "q_data_type": q_data_type, "kv_data_type": kv_data_type}
        self._inner.plan(each, indptr, indices, last_page_len, *sizes, **kinds)  # type: ignore[arg-type]

    def run(self, q: Tensor, paged_kv_cache: Pages, *, out: Tensor | None = None) -> object:
        return self._inner.run(q, paged_kv_cache, out=out)


class MultiLevelCascadeAttentionWrapper:
    def __init__(self, num_levels: int, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        self._levels = [
            BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout) for _ in range(num_levels)
        ]

    def plan(
        self,
        qo_indptr_arr: list[Tensor],
        paged_kv_indptr_arr: list[Tensor],
        paged_kv_indices_arr: list[Tensor],
        paged_kv_last_page_len: list[Tensor],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        sm_scale: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
    ) -> None:
        sizes = num_qo_heads, num_kv_heads, head_dim, page_size
        kinds = {"sm_scale": sm_scale, "q_data_type": q_data_type, "kv_data_type": kv_data_type}
        lists = (qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len)
        for level, given in zip(self._levels, zip(*lists, strict=True), strict=True):
            level.plan(*given, *sizes, **kinds)  # type: ignore[arg-type]

    def run(self, q: Tensor, paged_kv_cache: Pages) -> Tensor:
        out, lse = self._levels[-1].run(q, paged_kv_cache, return_lse=True)
        for level in self._levels[:-1]:
            merge_state_in_place(out, lse, *level.run(q, paged_kv_cache, return_lse=True))
        return out


def merge_state_in_place(v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None) -> None:
    """Joins two results in the first, by their LSE to base 2."""
    assert s.dtype == s_other.dtype == torch.float32 and s.shape == v.shape[:2]
    total = torch.logaddexp2(s, s_other)
    parts = ((x.float() * (own - total).exp2()[..., None]).nan_to_num() for x, own in ((v, s), (v_other, s_other)))
    v.copy_(sum(parts))
    s.copy_(total)
