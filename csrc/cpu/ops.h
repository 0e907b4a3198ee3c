#pragma once

// The ops as saffron_kernels/ops.py documents them. Shapes and dtypes were checked there; what the
// contents have to fulfil is checked here, before anything is written (std::invalid_argument).
// Outputs are allocated by the caller and contiguous, unless their size is only known here.

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/tensor.h"

namespace saffron::cpu {

void append_kv(const Tensor& k, const Tensor& v, const Tensor& slots, const Tensor& k_cache,
               const Tensor& v_cache, int threads);

/// The last dimension of q and of the caches is contiguous. sinks fp32, contiguous, or none.
void tree_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slot, const Tensor& begin, const Tensor& end, float scale,
                    std::optional<float> softcap, const Tensor& sinks, const Tensor& out,
                    const Tensor& lse, int threads);

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

/// The last dimension of the logits is contiguous. `top_p` [rows] is fp64; `banned` may be absent.
/// Rows with `skip` set are not looked at and have no candidates; none are where it is empty.
Candidates nucleus(const Tensor& logits, const Tensor& top_p, const Tensor& banned,
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

/// How many groups there are, and places for each. `of_group` may be absent: `largest` for all.
struct Widths {
  int64_t num_groups, largest;
  Tensor of_group;

  int64_t of(int64_t g) const { return of_group.given() ? IntView(of_group)[g] : largest; }
};

void select_beam(const Tensor& rewards, const Tensor& tokens, const Tensor& offsets,
                 const Tensor& groups, const Widths& widths, const Beam& beam);

/// What takes part in a step besides the models' output; all may be absent but groups and top_p.
struct Search {
  Tensor groups, top_p, banned, scores, end_tokens, finished_scores, finished_groups;
  Widths widths;
};

void multifurcate(const Tensor& logits, const Head& head, const Search& search, const Beam& beam,
                  const Tensor& counts, const Tensor& all_unseen, int threads);

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
            const std::vector<int32_t>& group, const Widths& widths, const Beam& beam);

/// Throws unless every width is from 1 to the largest.
void check_widths(const Widths& widths);

/// The row of every candidate.
std::vector<int32_t> rows_of(const IntView& offsets, int64_t count);

/// Sorts by the upper 32 bits; of equal ones the lower bits ascend, before as after. `spare` has
/// room for as many.
void radix_sort(uint64_t* keys, uint64_t* spare, int64_t count);

}  // namespace saffron::cpu
