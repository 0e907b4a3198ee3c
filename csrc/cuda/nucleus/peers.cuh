#pragma once

// Part of nucleus.cu: lanes of a warp that have the same bin.

#include "cuda/common/types.cuh"

namespace saffron::cuda {
namespace {

/// The lanes of a warp that have the same bin as the first lane of those that have one. They need
/// one atomic together: atomics on one address take turns, and in a flat row all have one bin.
struct Peers {
  unsigned lanes;
  int leader;

  /// By a whole warp; `bin` is below 0 where a lane has none.
  __device__ __forceinline__ explicit Peers(int bin) {
    leader = max(__ffs(static_cast<int>(__ballot_sync(0xffffffffu, bin >= 0))) - 1, 0);
    lanes = __ballot_sync(0xffffffffu, bin == __shfl_sync(0xffffffffu, bin, leader));
  }
  static __device__ __forceinline__ int this_lane() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ __forceinline__ bool leads() const { return this_lane() == leader; }
  __device__ __forceinline__ bool has_this_lane() const { return (lanes >> this_lane() & 1) != 0; }

  /// The sum of what these lanes have.
  __device__ __forceinline__ uint64_t sum(uint64_t x) const {
    if (__popc(lanes) == 1) return x;  // of use to this lane alone
    uint64_t sum = 0;
#pragma unroll
    for (int shift = 0; shift < 64; shift += 24) {  // digits whose sums fit 32 bits
      const auto digit = static_cast<uint32_t>(x >> shift) & 0xffffffu;
      const uint32_t all = __reduce_add_sync(0xffffffffu, has_this_lane() ? digit : 0u);
      sum += static_cast<uint64_t>(all) << shift;
    }
    return sum;
  }

  /// Counts every lane that has a bin; returns how many came before it.
  __device__ __forceinline__ int count(int* counts, int bin) const {
    const bool together = has_this_lane();
    int before = 0;
    if (bin >= 0 && (leads() || !together)) {
      before = atomicAdd(&counts[bin], leads() ? __popc(lanes) : 1);
    }
    const int of_all = __shfl_sync(0xffffffffu, before, leader);
    return together ? of_all + __popc(lanes & ((1u << this_lane()) - 1)) : before;
  }
};

}  // namespace
}  // namespace saffron::cuda
