#pragma once

// What is compiled once for each instruction set, and the table through which the ops reach it.

#include <cstdint>

#include "cpu/tensor.h"

namespace saffron::cpu {

/// Consecutive tokens of a block, and the columns that see any of them: column c has the rows
/// `c * lanes .. (c + 1) * lanes - 1`.
struct Tile {
  int64_t first, count;
  int64_t first_column, end_column;
  bool full;  // every row sees every token
};

/// One block of queries, some KV heads, one run of tiles. The rows are the block's queries times
/// the query heads of a KV head: row = query * group + head.
struct AttentionTask {
  Tensor q;                              // [queries, heads, head_dim], head_dim contiguous
  const char *k, *v;                     // the first head's row of slot 0
  int64_t k_stride, v_stride;            // bytes from slot to slot,
  int64_t k_head_stride, v_head_stride;  // and from head to head
  const int32_t *slot, *begin, *end;     // of the block's tokens; rows that see them
  const Tile* tiles;
  int64_t num_tiles;
  int64_t first_query, queries, group;
  int64_t first_head, heads;  // of KV; several only if they lie side by side in a row of the cache
  int64_t v_dim;              // size of a row of V; of K: q's
  float scale, softcap;
  bool capped;             // else softcap says nothing
  float* partial;          // of the first head: Kernels::partial_size() floats, written
  int64_t partial_stride;  // floats from head to head
  char* scratch;           // Kernels::attend_scratch() bytes
};

constexpr int64_t kMaxPartials = 64;
constexpr int kMaxHeadDim = 512;

/// Joins the partial results of one KV head and one block of queries, in order.
struct FinishTask {
  const float* partials;
  int64_t num_partials;  // at most kMaxPartials
  Tensor out;            // [queries, heads, v_dim], contiguous
  const float* sinks;    // [heads], or none
  float* lse;            // [queries, heads], contiguous
  int64_t first_query, queries, first_head, group;
};

/// How many thresholds Kernels::masses_above takes at once.
constexpr int kThresholds = 8;
constexpr int kCollectSlack = 16;

struct Kernels {
  const char* name;
  int64_t lanes;  // rows of a column
  /// Tokens a tile may hold.
  int64_t (*tile_tokens)(DType, int64_t head_dim, int64_t v_dim);
  int64_t (*partial_size)(int64_t rows, int64_t v_dim);
  int64_t (*attend_scratch)(DType, int64_t rows, int64_t heads, int64_t head_dim, int64_t v_dim);
  void (*attend)(const AttentionTask&);
  void (*finish)(const FinishTask&);
  /// to[i] = a[i] * weight_a + b[i] * weight_b, all of one dtype, contiguous.
  void (*blend)(const char* a, const char* b, float weight_a, float weight_b, DType, int64_t count,
                char* to);
  /// Largest of some logits; NaN if there is one, -infinity if there are none.
  float (*largest)(const char* logits, DType dtype, int64_t count);
  /// e[i] = exp(logit - shift), for logits up to `shift`.
  void (*exponentials)(const char* logits, DType dtype, int64_t count, float shift, float* e);
  /// masses[j] = sum of the e that reach thresholds[j], added up in fp64.
  void (*masses_above)(const float* e, int64_t count, const float* thresholds, double* masses);
  /// Writes `descending_key(logit) << 32 | token` for each token with e >= threshold, in the order
  /// of tokens, and returns how many. Up to kCollectSlack elements after the last are overwritten.
  int64_t (*collect)(const char* logits, DType dtype, const float* e, int64_t count,
                     float threshold, uint64_t* keys);
  /// probabilities[i] = exp(logit - shift) / sum, of the logits in the keys.
  void (*probabilities)(const uint64_t* keys, int64_t count, float shift, float sum,
                        float* probabilities);
  /// out[i] = the dot product of weight (`dtype`, contiguous) and hidden row rows[i] (fp32).
  void (*dots)(const char* weight, DType dtype, const float* hidden, int64_t hidden_stride,
               int64_t size, const int32_t* rows, int64_t count, float* out);
  /// Converts a row to fp32.
  void (*widen)(const char* from, DType dtype, int64_t count, float* to);
};

/// The table for this machine; the environment variable SAFFRON_CPU_ISA asks for a lesser one.
const Kernels& kernels();

/// Ascending keys are descending values; +0 and -0 share a key.
SAFFRON_INLINE uint32_t descending_key(float value) {
  value += 0.f;
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return (bits & 0x80000000u) ? bits : ~(bits | 0x80000000u);
}
SAFFRON_INLINE float value_of_key(uint32_t key) {
  const uint32_t bits = (key & 0x80000000u) ? key : (~key & 0x7fffffffu);
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace saffron::cpu
