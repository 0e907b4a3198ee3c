#pragma once

// Storage types of tensors and their arithmetic, which is fp32 throughout.

#include <type_traits>

#include "cuda/ptx/ptx.cuh"

namespace saffron::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
/// e4m3: 4 bits of exponent, 3 of mantissa, no infinity, largest number 448.
struct Float8 {
  uint8_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(Float16 x) { return ptx::half_to_float(x.bits); }

/// Rounded to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return {static_cast<uint16_t>(ptx::pack_bf16(x, 0.f))};
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return {static_cast<uint16_t>(ptx::pack_half(x, 0.f))};
}

/// As PyTorch does, but what is larger than 448 becomes 448.
template <>
__device__ __forceinline__ Float8 from_float<Float8>(float x) {
  const uint32_t bits = __float_as_uint(x), size = bits & 0x7fffffffu;
  uint32_t code;
  if (size >= 0x43e00000u) {  // 448
    code = size > 0x7f800000u ? 0x7fu : 0x7eu;
  } else if (size < 0x3c800000u) {  // 2^-6, below which neighbours are 2^-9 apart, as above 2^14
    code = __float_as_uint(__fadd_rn(__uint_as_float(size), 0x1p14f)) - 0x46800000u;
  } else {
    code = ((size + 0x7ffffu + (size >> 20 & 1)) >> 20) - ((127u - 7u) << 3);
  }
  return {static_cast<uint8_t>((bits >> 24 & 0x80u) | code)};
}

/// Four e4m3 numbers as two registers of a 16-bit type, exactly.
template <class T>
__device__ __forceinline__ void widen(uint32_t four, uint32_t (&pairs)[2]) {
  constexpr bool kHalf = std::is_same_v<T, Float16>;
  constexpr int kShift = kHalf ? 1 : 4;  // exponent and mantissa: where those of T meet
  constexpr uint32_t kRest = 0x7f00u >> kShift;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t high = __byte_perm(four, 0, i == 0 ? 0x1404 : 0x3424);  // of each 16 bits
    const uint32_t bits = (high & 0x80008000u) | (high >> kShift & (kRest << 16 | kRest));
    // Now only the exponents are biased otherwise: by 15 - 7 and 127 - 7.
    pairs[i] = kHalf ? ptx::multiply_half(bits, 0x5c005c00u)   // 2^8
                     : ptx::multiply_bf16(bits, 0x7b807b80u);  // 2^120
  }
  // NaN has the code of the number after the largest: all bits but the sign.
  const uint32_t nans = ((four & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
  if (nans != 0) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t two = nans >> (16 * i);
      pairs[i] |= ((two & 0x80u) != 0 ? 0x7fffu : 0u) | ((two & 0x8000u) != 0 ? 0x7fff0000u : 0u);
    }
  }
}

/// Two numbers of a 16-bit type in one register, `low` in the lower half.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  return ptx::pack_bf16(low, high);
}
template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  return ptx::pack_half(low, high);
}

/// acc += a @ b on the tensor cores, for one warp: a 16x16, b 16x8, fragments as PTX defines them
/// for mma.m16n8k16.
template <class T>
__device__ __forceinline__ void mma(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);
template <>
__device__ __forceinline__ void mma<BFloat16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                              uint32_t b1) {
  ptx::mma_bf16(acc, a, b0, b1);
}
template <>
__device__ __forceinline__ void mma<Float16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  ptx::mma_half(acc, a, b0, b1);
}

/// Numbers side by side, aligned to their size (to 16 bytes, where it is larger).
template <class T, int kN>
struct alignas(sizeof(T) * kN < 16 ? sizeof(T) * kN : 16) Pack {
  T values[kN];
};

template <class To, class From, int kN>
__device__ __forceinline__ Pack<To, kN> converted(const Pack<From, kN>& from) {
  Pack<To, kN> to;
#pragma unroll
  for (int i = 0; i < kN; ++i) to.values[i] = from_float<To>(to_float(from.values[i]));
  return to;
}

/// 16 bytes of a tensor.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

/// One element where the layout allows no more.
template <class T>
struct Scalar {
  static constexpr int kSize = 1;
  T values[1];
};

}  // namespace saffron::cuda
