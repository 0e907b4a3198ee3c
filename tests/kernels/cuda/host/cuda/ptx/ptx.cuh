#pragma once

// Stands in for csrc/cuda/ptx/ptx.cuh, function by function: what each PTX operation does, in plain
// C++. Source: NVIDIA, "Parallel Thread Execution ISA".

#include <cmath>
#include <cstdint>
#include <cstring>

namespace saffron::cuda::ptx {

// --- numbers ---

inline float exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}

inline float reciprocal(float x) { return 1.f / x; }

/// A 16-bit float of `kMantissa` explicit bits and a largest exponent of `kBias`, nearest even.
template <int kMantissa, int kBias>
uint32_t round_to_16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 31 << 15;
  const uint32_t infinity = (2 * kBias + 1u) << kMantissa;
  if (std::isnan(x)) return 0x7fffu;  // as the hardware does
  const double size = std::fabs(static_cast<double>(x));
  int exponent = 0;
  if (size > 0) std::frexp(size, &exponent);
  // The distance between neighbours there; below the least normal number it stays the same.
  const double unit = std::ldexp(1.0, std::max(exponent - 1, 1 - kBias) - kMantissa);
  const double rounded = std::nearbyint(size / unit) * unit;
  if (rounded >= std::ldexp(1.0, kBias + 1)) return sign | infinity;
  const double least = std::ldexp(1.0, 1 - kBias);
  if (rounded < least) return sign | static_cast<uint32_t>(rounded / unit);
  std::frexp(rounded, &exponent);
  const double fraction = std::ldexp(rounded, 1 - exponent) - 1;
  const auto low = static_cast<uint32_t>(std::ldexp(fraction, kMantissa));
  return sign | static_cast<uint32_t>(exponent - 1 + kBias) << kMantissa | low;
}

inline uint32_t pack_bf16(float low, float high) {
  return round_to_16_bits<7, 127>(low) | round_to_16_bits<7, 127>(high) << 16;
}

inline uint32_t pack_half(float low, float high) {
  return round_to_16_bits<10, 15>(low) | round_to_16_bits<10, 15>(high) << 16;
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size = std::ldexp(static_cast<float>(fraction + (exponent ? 1024 : 0)),
                          (exponent ? exponent : 1) - 25);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return bits >> 15 ? -size : size;
}

inline float bf16_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

inline uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  const auto product = [&](int shift) {
    return bf16_to_float(static_cast<uint16_t>(a >> shift)) *
           bf16_to_float(static_cast<uint16_t>(b >> shift));
  };
  return pack_bf16(product(0), product(16));
}

inline uint32_t multiply_half(uint32_t a, uint32_t b) {
  const auto product = [&](int shift) {
    return half_to_float(static_cast<uint16_t>(a >> shift)) *
           half_to_float(static_cast<uint16_t>(b >> shift));
  };
  return pack_half(product(0), product(16));
}

// --- memory between blocks ---

inline void fence() { host::may_switch(); }

inline uint32_t arrive(uint32_t* counter, uint32_t value = 1) {
  fence();
  const uint32_t before = atomicAdd(counter, value);
  fence();
  return before;
}

inline uint32_t load_acquire(const uint32_t* address) {
  host::yield();
  return *address;
}

// --- asynchronous copies ---

inline void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    host::fail("an address is not 16-byte aligned");
}

inline void copy16(void* shared, const void* global, bool read) {
  check_aligned(shared);
  if (read) check_aligned(global);
  host::copy(shared, global, 16, read);
}

inline void copy_commit() { host::copy_commit(); }

template <int kPending>
void copy_wait() {
  host::copy_wait(kPending);
}

// --- tensor cores ---

struct MatrixLoad {
  const void* row;
  uint32_t* r;
};

template <bool kTransposed>
void load_four_matrices(uint32_t (&r)[4], const void* row) {
  check_aligned(row);
  MatrixLoad own{row, r};
  host::collective(host::kWholeWarp, &own, kTransposed ? "ldmatrix.trans" : "ldmatrix",
                   [](void** lanes, unsigned) {
                     for (int m = 0; m < 4; ++m) {
                       uint16_t matrix[8][8];
                       for (int i = 0; i < 8; ++i) {
                         std::memcpy(matrix[i], static_cast<MatrixLoad*>(lanes[8 * m + i])->row,
                                     16);
                       }
                       for (int lane = 0; lane < 32; ++lane) {
                         const int i = lane / 4, j = 2 * (lane % 4);
                         const uint32_t low = kTransposed ? matrix[j][i] : matrix[i][j];
                         const uint32_t high = kTransposed ? matrix[j + 1][i] : matrix[i][j + 1];
                         static_cast<MatrixLoad*>(lanes[lane])->r[m] = low | high << 16;
                       }
                     }
                   });
}

inline void load_matrices(uint32_t (&r)[4], const void* row) { load_four_matrices<false>(r, row); }

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  load_four_matrices<true>(r, row);
}

struct Multiply {
  float* acc;
  const uint32_t* a;
  uint32_t b[2];
};

template <float (*kToFloat)(uint16_t)>
void multiply(void** lanes, unsigned) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<Multiply*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float* to = &a[g + 8 * (i % 2)][2 * t + 8 * (i / 2)];
      to[0] = kToFloat(static_cast<uint16_t>(own.a[i]));
      to[1] = kToFloat(static_cast<uint16_t>(own.a[i] >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = kToFloat(static_cast<uint16_t>(own.b[i]));
      b[2 * t + 8 * i + 1][g] = kToFloat(static_cast<uint16_t>(own.b[i] >> 16));
    }
  }
  float product[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) product[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* acc = static_cast<Multiply*>(lanes[lane])->acc;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) acc[i] += product[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

inline void mma_bf16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Multiply own{acc, a, {b0, b1}};
  host::collective(host::kWholeWarp, &own, "mma bf16", multiply<bf16_to_float>);
}

inline void mma_half(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Multiply own{acc, a, {b0, b1}};
  host::collective(host::kWholeWarp, &own, "mma fp16", multiply<half_to_float>);
}

}  // namespace saffron::cuda::ptx
