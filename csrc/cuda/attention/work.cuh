#pragma once

// Part of tree_attention: how the work is cut, and how the blocks share it.

#include "cuda/attention/join.cuh"

namespace saffron::cuda {
namespace {

constexpr int kPolls = 256;  // how often a block looks whether there is something to help with

/// One unit: the rows of a block, and a range of tokens.
struct Unit {
  int kv_head, first_row, first, last;
};

template <class C>
__device__ __forceinline__ Unit unit_at(const Arguments& a, uint32_t number) {
  const int groups = a.kv_heads * a.query_blocks;
  const int tokens = a.count == nullptr ? a.tokens : min(max(*a.count, 0), a.tokens);
  // Whole pairs of sectors; the last ranges may be empty.
  const int range = ((tokens + a.splits - 1) / a.splits + 15) / 16 * 16;
  const int group_index = static_cast<int>(number) % groups;
  const int first = static_cast<int>(number) / groups * range;
  return {group_index / a.query_blocks, group_index % a.query_blocks * C::kRows, min(first, tokens),
          min(first + range, tokens)};
}

/// What every block does: has `attend(unit)` leave the result of each of its units in `s.out`, and
/// joins partial results. `next(number)` is the unit after this one.
template <class C, class Attend, class Next>
__device__ __forceinline__ void work_through(const Arguments& a, typename C::Shared& s,
                                             Attend attend, Next next) {
  const int rows = a.queries * a.group, groups = a.kv_heads * a.query_blocks;
  const uint32_t units = static_cast<uint32_t>(groups) * static_cast<uint32_t>(a.splits);
  int group_index = 0;
  bool arrived_last = false;
  for (uint32_t number = blockIdx.x; number < units;) {
    attend(unit_at<C>(a, number));
    // Computed again: registers are scarce until here.
    group_index = static_cast<int>(number) % groups;
    store<C>(a, s, number, group_index / a.query_blocks, group_index % a.query_blocks * C::kRows,
             rows);
    if (a.splits > 1) {
      __threadfence();
      C::sync();
      const uint32_t before = threadIdx.x == 0 ? atomicAdd(&a.arrived[group_index], 1u) : 0u;
      arrived_last = from_thread_0<C>(s, before) + 1 == static_cast<uint32_t>(a.splits);
      if (arrived_last) {
        __threadfence();
        join_slices<C>(a, s, group_index, rows);
      }
    }
    if (gridDim.x >= units) break;
    number = next(number);
  }
  if (a.splits > 1 && !arrived_last) {
    // Nobody depends on this block any more; it helps if the others are not far behind.
    uint32_t complete = 0;
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i < kPolls && !complete; ++i) {
        complete = ptx::load_acquire(&a.arrived[group_index]) == static_cast<uint32_t>(a.splits);
      }
    }
    if (from_thread_0<C>(s, complete)) join_slices<C>(a, s, group_index, rows);
  }
  // The last block of all leaves the counters as it found them.
  if (from_thread_0<C>(s, threadIdx.x == 0 ? atomicInc(a.left, gridDim.x - 1) : 0u) + 1 ==
      gridDim.x) {
    for (int i = static_cast<int>(threadIdx.x); i < groups; i += C::kThreads) {
      if (a.splits > 1) a.arrived[i] = a.claimed[i] = 0;
    }
    if (threadIdx.x == 0) *a.drawn = 0;
  }
}

/// How the work is cut.
struct Cut {
  int query_blocks, splits;
  unsigned blocks;
};

template <class C>
Cut cut_for(int64_t queries, int64_t group, int64_t kv_heads, int64_t tokens, const Chip& chip) {
  const int64_t query_blocks = (queries * group + C::kRows - 1) / C::kRows;
  const int64_t fitting =
      chip.shared_bytes / static_cast<int64_t>(sizeof(typename C::Shared) + 1024);
  const int64_t resident =
      chip.processors * std::max<int64_t>(1, std::min<int64_t>(fitting, C::kMinBlocks));
  const int64_t groups = kv_heads * query_blocks;
  // One range a multiprocessor, none below 32 tokens. A second block there hides latency, but
  // doubles the partials: only where they are little beside K and V.
  const bool is_long = tokens >= resident / groups * 4 * C::kRows;
  const int64_t ranges = (is_long ? resident : chip.processors) / groups;
  const int64_t most = std::min<int64_t>({ranges, (tokens + 31) / 32, C::kMaxSplits});
  const int64_t splits = std::max<int64_t>(1, most);
  const int64_t blocks = std::min(resident, groups * splits);
  return {static_cast<int>(query_blocks), static_cast<int>(splits), static_cast<unsigned>(blocks)};
}

/// Completes what the kernel is given by how the work is cut.
template <class C>
Cut cut_work(Arguments& a, const Chip& chip) {
  const Cut cut = cut_for<C>(a.queries, a.group, a.kv_heads, a.tokens, chip);
  const int64_t groups = static_cast<int64_t>(a.kv_heads) * cut.query_blocks;
  a.query_blocks = cut.query_blocks;
  a.splits = cut.splits;
  a.part_lse = a.part + groups * cut.splits * C::kRows * C::kD;
  a.claimed = a.arrived + groups;
  return cut;
}

/// Floats of workspace for a launch of this configuration.
template <class C>
int64_t workspace_for(int64_t queries, int64_t group, int64_t kv_heads, int64_t tokens,
                      const Chip& chip) {
  const Cut cut = cut_for<C>(queries, group, kv_heads, tokens, chip);
  if (cut.splits == 1) return 0;
  return kv_heads * cut.query_blocks * cut.splits * C::kRows * (C::kD + 1);
}

}  // namespace
}  // namespace saffron::cuda
