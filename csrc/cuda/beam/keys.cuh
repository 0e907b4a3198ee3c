#pragma once

// Candidates as keys in the total order of a group, and the best of many, by a block.

#include "cuda/common/entries.cuh"
#include "cuda/common/numbers.cuh"

namespace saffron::cuda {

constexpr int kBeamThreads = 512, kBeamWarps = kBeamThreads / 32;

/// A candidate; the lower key is the better candidate. No two keys of a group are equal.
struct alignas(16) Key {
  Entry reward;  // with the row in the place of a token: the lower row first
  Entry place;   // of the candidate in its row

  __device__ __forceinline__ int row() const { return token_of(reward); }
};

/// A NaN is recorded, and stands for -inf.
__device__ __forceinline__ Key make_key(float reward, int row, Entry place, int32_t* fault) {
  if (reward != reward) {
    atomicOr(fault, kRewardFault);
    reward = -INFINITY;
  }
  return {entry(reward, row), place};
}

/// Whether `a` stands before `b` in a beam: ordered by row, within a row the better first.
__device__ __forceinline__ bool stands_before(const Key& a, const Key& b) {
  if (a.row() != b.row()) return a.row() < b.row();
  return a.reward != b.reward ? a.reward < b.reward : a.place < b.place;
}

/// What the threads of a block tell each other. Keys lie behind it.
struct alignas(16) BlockScratch {
  uint32_t bins[256];
  int warp_sums[kBeamWarps];
  uint32_t digit;      // of the last key that stays
  int inside, wanted;  // how many keys have that digit, and how many of them stay
  int kept;
  uint32_t before;
  // Of the candidates, or groups, that the threads are at.
  int token[kBeamThreads], row[kBeamThreads];
  float product[kBeamThreads];
};

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

/// The sum of `value` over the threads before this one, and over all. A barrier for the block.
__device__ __forceinline__ int sum_before(BlockScratch& scratch, int value, int& all) {
  const int lane = thread() % 32, warp = thread() / 32;
  int sum = value;
#pragma unroll
  for (unsigned by = 1; by < 32; by *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, by);
    if (lane >= static_cast<int>(by)) sum += other;
  }
  __syncthreads();  // nobody needs the sums of the last time any more
  if (lane == 31) scratch.warp_sums[warp] = sum;
  __syncthreads();
  int before = 0;
  all = 0;
#pragma unroll
  for (int w = 0; w < kBeamWarps; ++w) {
    if (w < warp) before += scratch.warp_sums[w];
    all += scratch.warp_sums[w];
  }
  return before + sum - value;
}

/// Finds in the histogram the digit of the `wanted`-th key; by one warp.
__device__ __forceinline__ void find_digit(BlockScratch& scratch, int wanted) {
  const int lane = thread() % 32;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += static_cast<int>(scratch.bins[8 * lane + i]);
  int before = sum;
#pragma unroll
  for (unsigned by = 1; by < 32; by *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, by);
    if (lane >= static_cast<int>(by)) before += other;
  }
  before -= sum;
  if (before >= wanted || before + sum < wanted) return;
  int digit = 8 * lane;
#pragma unroll 1
  while (before + static_cast<int>(scratch.bins[digit]) < wanted) {
    before += static_cast<int>(scratch.bins[digit++]);
  }
  scratch.digit = static_cast<uint32_t>(digit);
  scratch.inside = static_cast<int>(scratch.bins[digit]);
  scratch.wanted = wanted - before;
}

/// Moves the best `keep` of `size` keys in shared memory to the front, in any order; returns how
/// many keys there are then. Radix selection: digit after digit of the last key that stays is
/// found, until all that share them with it stay too. Usually that takes the four of the reward.
static __device__ __attribute__((noinline)) int keep_best(BlockScratch& scratch, Key* keys,
                                                          int size, int keep) {
  __syncthreads();
  if (size <= keep) return size;
  Key known = {0, 0}, mask = {0, 0};
  int wanted = keep;
#pragma unroll 1
  for (int digit = 15;; --digit) {
    const int shift = digit % 8 * 8;
    if (thread() < 256) scratch.bins[thread()] = 0;
    __syncthreads();
#pragma unroll 1
    for (int i = thread(); i < size; i += kBeamThreads) {
      const Key key = keys[i];
      if ((key.reward & mask.reward) == known.reward && (key.place & mask.place) == known.place) {
        atomicAdd(&scratch.bins[(digit < 8 ? key.place : key.reward) >> shift & 255], 1u);
      }
    }
    __syncthreads();
    if (thread() < 32) find_digit(scratch, wanted);
    __syncthreads();
    const uint64_t found = static_cast<uint64_t>(scratch.digit) << shift;
    if (digit < 8) {
      known.place |= found;
      mask.place |= uint64_t{255} << shift;
    } else {
      known.reward |= found;
      mask.reward |= uint64_t{255} << shift;
    }
    wanted = scratch.wanted;
    if (scratch.inside == wanted || digit == 0) break;
  }
  if (thread() == 0) scratch.kept = 0;
  __syncthreads();
  for (int first = 0; first < size; first += kBeamThreads) {
    const int i = first + thread();
    Key key = {0, 0};
    bool stays = false;
    if (i < size) {
      key = keys[i];
      const Entry reward = key.reward & mask.reward;
      stays = reward < known.reward ||
              (reward == known.reward && (key.place & mask.place) <= known.place);
    }
    __syncthreads();  // the keys of this round are read; to those of later ones nothing is written
    if (stays) keys[atomicAdd(&scratch.kept, 1)] = key;
  }
  __syncthreads();
  return keep;
}

}  // namespace saffron::cuda
