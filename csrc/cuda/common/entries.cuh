#pragma once

// A token and its logit as one integer: ascending entries are in the order of the nucleus, more
// probable first, then by token id.

#include <cstdint>

#include "cuda/ptx/ptx.cuh"

namespace saffron::cuda {

using Entry = uint64_t;

/// -0.0 and 0.0 are one logit. NaN has no place in the order.
__device__ __forceinline__ Entry entry(float logit, int32_t token) {
  const uint32_t bits = __float_as_uint(logit == 0.f ? 0.f : logit);
  const uint32_t key = bits >> 31 ? bits : bits ^ 0x7fffffffu;
  return static_cast<Entry>(key) << 32 | static_cast<uint32_t>(token);
}

__device__ __forceinline__ float logit_of(Entry e) {
  const auto key = static_cast<uint32_t>(e >> 32);
  return __uint_as_float(key >> 31 ? key : key ^ 0x7fffffffu);
}

__device__ __forceinline__ int32_t token_of(Entry e) { return static_cast<int32_t>(e); }

/// e^x to about one unit in the last place, 0 where that is below the least normal float. The
/// rounding of x * log2(e), which would cost |x| units, is made good.
__device__ __forceinline__ float e_to(float x) {
  constexpr float kLog2e = 1.44269502f, kRest = 1.92596299e-8f, kLn2 = 0.693147181f;
  const float high = x * kLog2e;
  const float low = __fmaf_rn(x, kLog2e, -high) + x * kRest;
  const float power = ptx::exp2(high);
  return power > 0.f ? power + power * (low * kLn2) : power;  // -inf has a low part of NaN
}

}  // namespace saffron::cuda
