"""Kernels for safety inference scaling: tensors in, tensors out. Knows no model, no tokenizer, no search."""

from saffron_kernels._native import CacheFullError
from saffron_kernels.backends import BackendError, backend
from saffron_kernels.describe import describe
from saffron_kernels.kv_trie import Beams, KVTrie, Prefill, TreeStep
from saffron_kernels.ops import (
    advance_tree,
    append_kv,
    block_plan,
    gather_kv,
    merge_attention,
    multifurcate,
    multifurcation_head,
    nucleus,
    select_beam,
    tree_attention,
)

__all__ = [
    "BackendError",
    "Beams",
    "CacheFullError",
    "KVTrie",
    "Prefill",
    "TreeStep",
    "advance_tree",
    "append_kv",
    "backend",
    "block_plan",
    "describe",
    "gather_kv",
    "merge_attention",
    "multifurcate",
    "multifurcation_head",
    "nucleus",
    "select_beam",
    "tree_attention",
]
