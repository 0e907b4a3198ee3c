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

/// One block of queries and some KV heads. The rows are the block's queries times the query heads
/// of a KV head: row = query * group + head.
struct HeadsTask {
  Tensor q;                              // [queries, heads, head_dim], head_dim contiguous
  const char *k, *v;                     // the first head's row of slot 0
  int64_t k_stride, v_stride;            // bytes from slot to slot,
  int64_t k_head_stride, v_head_stride;  // and from head to head
  int64_t first_query, queries, group;
  int64_t first_head, heads;  // of KV; several only if they lie inside the same row of the cache
  int64_t v_dim;              // size of a row of V; of K: q's
  float scale, softcap;
  bool capped;             // else softcap says nothing
  float* partial;          // of the first head, written: as many floats as the kernel says
  int64_t partial_stride;  // floats from head to head
  char* scratch;           // as many bytes as the kernel says
};

/// Attention over one run of tiles.
struct AttentionTask : HeadsTask {
  const int32_t *slot, *begin, *end;  // of the block's tokens; rows that see them
  const Tile* tiles;
  int64_t num_tiles;
};

/// Tokens that rows `first_row .. first_row + rows - 1` of a block see, and no others.
struct Strip {
  const int32_t* slot;
  int64_t count;  // at most kStripTokens
  int64_t first_row, rows;
};
constexpr int64_t kStripTokens = 64;

/// Attention over one run of strips, whose rows lie in `first_row .. first_row + rows - 1`.
struct StripTask : HeadsTask {
  const Strip* strips;
  int64_t num_strips;
  int64_t first_row, rows;
};

/// The rows of a partial result of strips, and where it stands.
struct StripRows {
  int64_t first, count, offset;
};

constexpr int64_t kMaxPartials = 64;
constexpr int kMaxHeadDim = 512;

/// Joins the partial results of one KV head and one block of queries, in order.
struct FinishTask {
  const float* partials;
  int64_t num_partials;  // at most kMaxPartials
  const float* strip_partials;
  const StripRows* strips;
  int64_t num_strips;  // at most kMaxPartials
  Tensor out;          // [queries, heads, v_dim], contiguous
  const float* sinks;  // [heads], or none
  float* lse;          // [queries, heads], contiguous
  int64_t first_query, queries, first_head, group;
};

/// Tokens of a block of a row of logits.
constexpr int64_t kScanTokens = 256;
constexpr int kCollectSlack = 16;

struct Kernels {
  const char* name;
  int64_t lanes;  // rows of a column
  /// Tokens a tile may hold.
  int64_t (*tile_tokens)(DType, int64_t head_dim, int64_t v_dim);
  int64_t (*partial_size)(int64_t rows, int64_t v_dim);
  int64_t (*attend_scratch)(DType, int64_t rows, int64_t heads, int64_t head_dim, int64_t v_dim);
  void (*attend)(const AttentionTask&);
  /// Rows a strip may have; 0 if heads of these sizes have no strips.
  int64_t (*strip_rows)(DType, int64_t head_dim, int64_t v_dim);
  int64_t (*strip_partial_size)(int64_t rows, int64_t v_dim);
  int64_t (*strip_scratch)(int64_t heads, int64_t head_dim);
  void (*attend_strips)(const StripTask&);
  void (*finish)(const FinishTask&);
  /// to[i] = a[i] * weight_a + b[i] * weight_b, all of one dtype, contiguous.
  void (*blend)(const char* a, const char* b, float weight_a, float weight_b, DType, int64_t count,
                char* to);
  /// Of each block of kScanTokens logits, `size_of_last` in the last one: the largest (a finite
  /// number) and the sum of e^(logit - that), NaN if a logit is NaN or +infinity.
  void (*scan)(const char* const* blocks, DType dtype, int64_t count, int64_t size_of_last,
               float* top, float* sum);
  /// The largest of all blocks; the sums become those of e^(logit - largest of all), and their sum
  /// is returned.
  double (*join)(const float* tops, float* sums, int64_t blocks, float* largest);
  /// Writes `descending_key(logit) << 32 | token` for each logit from `threshold` on, in their
  /// order, and returns how many; adds the sum of their e^(logit - shift) to `mass`. Up to
  /// kCollectSlack elements after the last are overwritten.
  int64_t (*collect)(const char* logits, DType dtype, int64_t count, int64_t first_token,
                     float threshold, float shift, uint64_t* keys, double* mass);
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
