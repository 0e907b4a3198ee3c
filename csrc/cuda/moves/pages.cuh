#pragma once

// Rows of a block table, told apart by a block of threads each. block_plan.cu says how.

#include <cstdint>

#include "cuda/ops.h"

namespace saffron::cuda {

constexpr int kThreads = 256, kUnroll = 4;

// A key sorts the rows of a group after a round: in its upper half where a row leaves the pivot,
// kEqual if nowhere (below: it comes before the pivot, the earlier the sooner they part; above:
// after it, the other way round); in its lower half 1 + the block it has there, 0 if it ends there.
constexpr int kEqual = 1 << 29;  // more blocks than a request can have

using Key = uint64_t;

/// The block at which rows of this key leave their pivot; kEqual if nowhere.
__device__ __forceinline__ int parting(Key key) {
  const int where = static_cast<int>(key >> 32);
  return where > kEqual ? 2 * kEqual - where : where;
}

/// Whether rows of this key are equal: to their pivot, or because they end where they leave it.
__device__ __forceinline__ bool settled(Key key) {
  return static_cast<uint32_t>(key) == 0 || parting(key) == kEqual;
}

struct Request {
  int64_t first, queries, length;
  int full;        // blocks that are full of tokens from earlier steps
  bool live, bad;  // whether it takes part; whether what is said of it cannot be
};

/// What the op was given.
struct Pages {
  const int32_t *table, *lens, *start;
  int64_t row_stride, column_stride, lens_stride, start_stride;
  int requests, columns, block_size;

  __device__ __forceinline__ const int32_t* row(int r) const {
    return table + static_cast<int64_t>(r) * row_stride;
  }
  __device__ __forceinline__ Request at(int r) const {
    Request found;
    found.first = start[r * start_stride];
    found.queries = start[(r + 1) * start_stride] - found.first;
    found.length = lens[r * lens_stride];
    const int64_t room = static_cast<int64_t>(columns) * block_size;
    found.bad = found.queries < 0 ||
                (found.queries > 0 && (found.length < found.queries || found.length > room));
    found.live = found.queries > 0 && !found.bad;
    found.full = found.live ? static_cast<int>(found.length - found.queries) / block_size : 0;
    return found;
  }
};

/// By row: the place in the order at which its group begins (-1: it takes no part), how many blocks
/// the group's first row shares with the row before it, and the row's key in this round.
struct State {
  int32_t *start, *common;
  Key* key;
};

struct Shared {
  int before, equal, earlier, common, least;
  unsigned pivot;
};

/// How many blocks two rows share at the front, of which `first` are known, at most `most`. For the
/// whole block of threads.
__device__ inline int shared_blocks(const int32_t* a, const int32_t* b, int first, int most,
                                    int64_t stride, Shared& shared) {
  for (int at = first; at < most; at += kThreads * kUnroll) {
    int mine[kUnroll], theirs[kUnroll], least = most;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int column = at + i * kThreads + static_cast<int>(threadIdx.x);
      mine[i] = column < most ? a[column * stride] : 0;
      theirs[i] = column < most ? b[column * stride] : 0;
    }
#pragma unroll
    for (int i = kUnroll - 1; i >= 0; --i) {
      if (mine[i] != theirs[i]) least = at + i * kThreads + static_cast<int>(threadIdx.x);
    }
    if (threadIdx.x == 0) shared.least = most;
    if (__syncthreads_or(least < most)) {
      if (least < most) atomicMin(&shared.least, least);
      __syncthreads();
      const int found = shared.least;
      __syncthreads();
      return found;
    }
  }
  return max(first, most);
}

/// The key of `row` with `other` as the pivot; they share the first `first` blocks.
__device__ inline Key compared(const Pages& pages, int row, int other, int first, Shared& shared) {
  const int full = pages.at(row).full, others = pages.at(other).full;
  const int32_t *a = pages.row(row), *b = pages.row(other);
  const int common = shared_blocks(a, b, first, min(full, others), pages.column_stride, shared);
  const int64_t at = common * pages.column_stride;
  const int64_t mine = common < full ? int64_t{a[at]} + 1 : 0;
  const int64_t theirs = common < others ? int64_t{b[at]} + 1 : 0;
  const int where = mine < theirs ? common : mine > theirs ? 2 * kEqual - common : kEqual;
  return static_cast<Key>(where) << 32 | static_cast<uint32_t>(mine);
}

/// Pivots are drawn: the row whose number, shifted by the round, has the least multiple of an odd
/// number, from which the row is found again.
constexpr unsigned kOdd = 0x9e3779b1u;
constexpr unsigned inverse(unsigned odd) {
  unsigned x = odd;
  for (int i = 0; i < 5; ++i) x *= 2 - odd * x;
  return x;
}
constexpr unsigned kInverse = inverse(kOdd);
static_assert(kOdd * kInverse == 1);

/// Of the rows of one group, for the whole block of threads: how many come before `row`, how many
/// are equal so far, how many of those are earlier rows, the most blocks that it shares with one
/// that comes before, and the pivot of those that are equal.
template <bool kFirst>
__device__ void count(const Pages& pages, const State& state, int row, int start, Key key,
                      unsigned round, Shared& shared) {
  if (threadIdx.x == 0) shared = {0, 0, 0, 0, 0, ~0u};
  __syncthreads();
  int before = 0, equal = 0, earlier = 0, common = 0;
  unsigned pivot = ~0u;
  for (int other = static_cast<int>(threadIdx.x); other < pages.requests; other += kThreads) {
    const bool same = kFirst ? pages.at(other).live : state.start[other] == start;
    if (!same) continue;
    const Key theirs = kFirst ? 0 : state.key[other];
    if (theirs < key) {
      ++before;
      common = max(common, min(parting(theirs), parting(key)));
    } else if (theirs == key) {
      ++equal;
      earlier += other < row;
      pivot = min(pivot, (static_cast<unsigned>(other) + round) * kOdd);
    }
  }
  before = __reduce_add_sync(0xffffffffu, before);
  equal = __reduce_add_sync(0xffffffffu, equal);
  earlier = __reduce_add_sync(0xffffffffu, earlier);
  common = __reduce_max_sync(0xffffffffu, common);
  pivot = __reduce_min_sync(0xffffffffu, pivot);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&shared.before, before);
    atomicAdd(&shared.equal, equal);
    atomicAdd(&shared.earlier, earlier);
    atomicMax(&shared.common, common);
    atomicMin(&shared.pivot, pivot);
  }
  __syncthreads();
}

}  // namespace saffron::cuda
