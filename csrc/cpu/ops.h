#pragma once

// The ops as saffron_kernels/ops.py documents them. Shapes and dtypes were checked there; what the
// contents have to fulfil is checked here, before anything is written (std::invalid_argument).
// Outputs are allocated by the caller and contiguous, unless their size is only known here.

#include <cstdint>
#include <vector>

#include "cpu/tensor.h"

namespace saffron::cpu {

void append_kv(const Tensor& k, const Tensor& v, const Tensor& slots, const Tensor& k_cache,
               const Tensor& v_cache, int threads);

/// The last dimension of q and of the caches is contiguous.
void tree_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slot, const Tensor& begin, const Tensor& end, float scale,
                    const Tensor& out, const Tensor& lse, int threads);

/// The last dimension of all inputs is contiguous.
void merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                     const Tensor& lse_b, const Tensor& out, const Tensor& lse, int threads);

void gather_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots, const Tensor& k,
               const Tensor& v, int threads);

struct Candidates {
  std::vector<int32_t> tokens;
  std::vector<float> probabilities;
  std::vector<int32_t> offsets;
};

/// The last dimension of the logits is contiguous. `banned` may be absent. Rows with `skip` set are
/// not looked at and have no candidates; none are where it is empty.
Candidates nucleus(const Tensor& logits, double top_p, const Tensor& banned,
                   const std::vector<uint8_t>& skip, int threads);

/// What the rewards are computed from; bias and unseen may be absent. The last dimension of hidden
/// and weight is contiguous.
struct Head {
  Tensor hidden, weight, bias, unseen;
  float unseen_reward;
};

void multifurcation_head(const Head& head, const Tensor& tokens, const Tensor& offsets,
                         const Tensor& rewards, int threads);

/// What select_beam chose.
struct Beam {
  Tensor parent, token, reward;
};

void select_beam(const Tensor& rewards, const Tensor& tokens, const Tensor& offsets,
                 const Tensor& groups, int64_t num_groups, int64_t width, const Beam& beam);

/// What takes part in a step besides the models' output; all may be absent but the groups.
struct Search {
  Tensor groups, banned, scores, end_tokens, carried_scores, carried_groups;
  int64_t num_groups, width;
  double top_p;
};

void multifurcate(const Tensor& logits, const Head& head, const Search& search, const Beam& beam,
                  const Tensor& counts, const Tensor& blind, int threads);

void advance_tree(const Tensor& slot, const Tensor& begin, const Tensor& end, const Tensor& parents,
                  const Tensor& new_slots, int64_t queries, const Tensor& new_slot,
                  const Tensor& new_begin, const Tensor& new_end);

/// A plan of a paged KV cache, and the caller's query at each of its places.
struct PagedPlan {
  std::vector<int32_t> order, slot, begin, end;
};

/// The rows of the table are contiguous. More than `most` tokens are refused, unless it is below 0.
PagedPlan block_plan(const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start,
                     int64_t block_size, int64_t queries, int64_t most);

// Parts that multifurcate shares with the ops above.

/// Rewards of candidates whose rows are numbered; those with `skip` set keep what `rewards` holds.
void reward_candidates(const Head& head, const std::vector<int32_t>& row, const int32_t* tokens,
                       const std::vector<uint8_t>& skip, float* rewards, int threads);

/// `row` ascends and indexes `group`, whose size is the parent of an empty place. Candidates of
/// group `num_groups` are left out.
void choose(const float* rewards, const std::vector<int32_t>& row, const int32_t* tokens,
            const std::vector<int32_t>& group, int64_t num_groups, int64_t width, const Beam& beam);

/// The row of every candidate.
std::vector<int32_t> rows_of(const IntView& offsets, int64_t count);

/// Sorts by the upper 32 bits; equal ones keep their order. `spare` has room for as many.
void radix_sort(uint64_t* keys, uint64_t* spare, int64_t count);

}  // namespace saffron::cpu
