#pragma once

// Part of tree_attention: what its kernels are given, and its second path.

#include "cuda/ops.h"

namespace saffron::cuda {

struct Arguments {
  const void *q, *k, *v;
  int64_t q_stride_n, q_stride_h, k_stride_s, k_stride_h, v_stride_s, v_stride_h;
  const int32_t *slot, *begin, *end, *count;
  const float *k_scale, *v_scale;  // [KV heads] for fp8 caches, or none
  void* out;
  float* lse;
  float *part, *part_lse;       // [units * rows of a block, kD], [units * rows of a block]
  uint32_t *arrived, *claimed;  // [KV heads * query blocks], zero between launches
  uint32_t *drawn, *left;       // zero between launches
  int tokens, queries, group, kv_heads, head_dim, num_slots, query_blocks, splits;
  float scale_log2;
  int32_t* fault;
};

/// Whether a launch takes the path of tree_attention_hopper.cu, with q `[queries, group heads of
/// every KV head, head_dim]` and caches in `stored`.
///
/// Throws std::invalid_argument if SAFFRON_CUDA_ATTENTION names no path.
bool hopper_takes(int64_t queries, int64_t group, int64_t head_dim, DType stored);

/// As tree_attention_workspace, for launches that take that path.
int64_t hopper_workspace(int64_t queries, int64_t group, int64_t kv_heads, int64_t head_dim,
                         int64_t tokens);

/// Launches it. How the work is cut is not in `a` yet. q and caches in `dtype`.
void launch_hopper(Arguments a, DType dtype, Stream stream);

}  // namespace saffron::cuda
