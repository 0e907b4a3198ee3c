#pragma once

// Part of tree_attention: what its kernels are given, and its second path.

#include "cuda/ops.h"

namespace saffron::cuda {

struct Arguments {
  const void *q, *k, *v;
  int64_t q_stride_n, q_stride_h, k_stride_s, k_stride_h, v_stride_s, v_stride_h;
  const int32_t *slot, *begin, *end, *count;
  const float *k_scale, *v_scale;  // [KV heads] for fp8 caches, or none
  const float* sinks;              // [heads], or none
  void* out;
  float* lse;
  float *part, *part_lse;  // of two segments of every block: [rows of a block, kD], [rows]
  uint32_t *arrived, *claimed, *left;  // [blocks], [blocks], [1], zero between launches
  const int3* looked_through;          // [chunks], if another launch does it: work.cuh
  int tokens, queries, group, kv_heads, head_dim, v_dim, num_slots;
  int query_blocks, rows_log2, chunk_log2, band_log2;  // how the work is cut: work.cuh
  // Scores are multiplied by `scale`; if they are capped, then tanh of them by `cap`.
  float scale, cap;
  bool capped;
  int32_t* fault;

  int wide() const { return head_dim > v_dim ? head_dim : v_dim; }
};

/// The launches of mma_*.cu: products and caches in bf16 or fp16, or caches in fp8. How the work is
/// cut is not in `a` yet.
void launch_bf16(const Arguments& a, Stream stream);
void launch_fp16(const Arguments& a, Stream stream);
void launch_bf16_fp8(const Arguments& a, Stream stream);
void launch_fp16_fp8(const Arguments& a, Stream stream);

/// Fills `looked_through`. How the work is cut is in `a`.
void launch_look(const Arguments& a, int64_t chunks, Stream stream);

/// Whether a launch takes the path of tree_attention_hopper.cu, with q `[queries, group heads of
/// every KV head, head_dim]` and caches in `stored`.
///
/// Throws std::invalid_argument if SAFFRON_CUDA_ATTENTION names no path.
bool hopper_takes(int64_t queries, int64_t group, int64_t head_dim, DType stored);

/// Floats of workspace for partial results, for launches that take that path.
int64_t hopper_workspace(int64_t queries, int64_t group, int64_t kv_heads, int64_t head_dim,
                         int64_t tokens);

/// Launches it. How the work is cut is not in `a` yet. q and caches in `dtype`.
void launch_hopper(Arguments a, DType dtype, Stream stream);

}  // namespace saffron::cuda
