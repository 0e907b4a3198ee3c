#pragma once

// Loops over rows of numbers: what nucleus, multifurcation_head and merge_attention are made of.

#include "cpu/simd/kernels.h"
#include "cpu/simd/vec.h"

namespace saffron::cpu::SAFFRON_ISA {

constexpr float kToLog2 = 1.4426950408889634f;

/// e^x for x <= 0: 2^(x log2 e) with the product's rounding error made good, as fp32 softmax needs.
inline Vec exp(Vec x) {
  x = (x < splat(-200.f)) ? splat(-200.f) : x;  // 0 either way, but -infinity would give NaN below
  const Vec high = x * kToLog2;
  const Vec low = x * kToLog2 - high + x * 1.925963033500011e-08f;  // one FMA: exact
  const Vec y = exp2(high);
  return y + y * (low * 0.69314718055994531f);
}

template <class T>
inline float largest(const T* x, int64_t count) {
  const Vec lowest = splat(-__builtin_inff());
  Vec best[4] = {lowest, lowest, lowest, lowest};
  VecI numbers = splat_int(-1);
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const Vec v = load(x + i + j * kLanes);
      numbers &= v == v;
      best[j] = max(best[j], v);
    }
  }
  bool number = bits(numbers) == bits(splat_int(-1));
  float result = reduce_max(max(max(best[0], best[1]), max(best[2], best[3])));
  for (; i < count; ++i) {
    const float v = as_float(x[i]);
    number &= v == v;
    result = result < v ? v : result;
  }
  return number ? result : __builtin_nanf("");
}

template <class T>
inline void exponentials(const T* x, int64_t count, float shift, float* e) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(e + i, exp(load(x + i) - shift));
  if (i == count) return;
  float rest[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) rest[j] = i + j < count ? as_float(x[i + j]) : shift;
  const Vec result = exp(load(rest) - shift);
  for (int64_t j = 0; i + j < count; ++j) e[i + j] = result[j];
}

inline void masses_above(const float* e, int64_t count, const float* thresholds, double* masses) {
  Vec least[kThresholds];
  for (int j = 0; j < kThresholds; ++j) {
    least[j] = splat(thresholds[j]);
    masses[j] = 0;
  }
  constexpr int64_t run =
      32 * kLanes;  // short runs in fp32, then fp64: as exact as fp64 throughout
  int64_t i = 0;
  while (i + kLanes <= count) {
    Vec sum[kThresholds] = {};
    for (const int64_t end = i + run; i + kLanes <= count && i < end; i += kLanes) {
      const Vec v = load(e + i);
      for (int j = 0; j < kThresholds; ++j) sum[j] += (v >= least[j]) ? v : Vec{};
    }
    for (int j = 0; j < kThresholds; ++j) masses[j] += static_cast<double>(reduce_add(sum[j]));
  }
  for (; i < count; ++i) {
    for (int j = 0; j < kThresholds; ++j) masses[j] += e[i] >= thresholds[j] ? e[i] : 0;
  }
}

template <class T>
inline int64_t collect(const T* x, const float* e, int64_t count, float threshold, uint64_t* keys) {
  uint64_t* const first = keys;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    uint32_t found = bits(load(e + i) >= splat(threshold));
    if (found == 0) continue;
#if defined(__AVX512F__)
    // All lanes at once: the ones in question first, and what follows them is overwritten next
    // time.
    const VecU value = (VecU)(load(x + i) + 0.f);
    const VecU key = ((VecI)value < 0) ? value : ~(value | 0x80000000u);
    const VecU token = (VecU)lane_numbers() + static_cast<uint32_t>(i);
    uint32_t packed[2][kLanes];
    const auto mask = static_cast<__mmask16>(found);
    _mm512_storeu_si512(packed[0], _mm512_maskz_compress_epi32(mask, (__m512i)key));
    _mm512_storeu_si512(packed[1], _mm512_maskz_compress_epi32(mask, (__m512i)token));
    for (int j = 0; j < kLanes; ++j) keys[j] = uint64_t{packed[0][j]} << 32 | packed[1][j];
    keys += __builtin_popcount(found);
#else
    for (; found != 0; found &= found - 1) {
      const int64_t token = i + __builtin_ctz(found);
      *keys++ = uint64_t{descending_key(as_float(x[token]))} << 32 | static_cast<uint64_t>(token);
    }
#endif
  }
  for (; i < count; ++i) {
    if (e[i] < threshold) continue;
    *keys++ = uint64_t{descending_key(as_float(x[i]))} << 32 | static_cast<uint64_t>(i);
  }
  return keys - first;
}

inline void probabilities(const uint64_t* keys, int64_t count, float shift, float sum, float* p) {
  for (int64_t i = 0; i < count; i += kLanes) {
    float some[kLanes];
    const int64_t filled = count - i < kLanes ? count - i : kLanes;
    for (int64_t j = 0; j < kLanes; ++j) {
      some[j] = j < filled ? value_of_key(static_cast<uint32_t>(keys[i + j] >> 32)) : shift;
    }
    const Vec value = exp(load(some) - shift) / sum;
    for (int64_t j = 0; j < filled; ++j) p[i + j] = value[j];
  }
}

/// The same order of additions for any number of rows, so that a reward does not depend on what
/// else is asked for.
template <int kRows, class T>
inline void dot_block(const T* weight, const float* const (&hidden)[kRows], int64_t size,
                      float (&out)[kRows]) {
  Vec sum[kRows][2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    const Vec low = load(weight + i), high = load(weight + i + kLanes);
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] += low * load(hidden[r] + i);
      sum[r][1] += high * load(hidden[r] + i + kLanes);
    }
  }
  for (int r = 0; r < kRows; ++r) out[r] = reduce_add(sum[r][0] + sum[r][1]);
  for (; i < size; ++i) {
    for (int r = 0; r < kRows; ++r) out[r] += as_float(weight[i]) * hidden[r][i];
  }
}

template <class T>
inline void dots(const T* weight, const float* hidden, int64_t hidden_stride, int64_t size,
                 const int32_t* rows, int64_t count, float* out) {
  constexpr int kBlock = 4;
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    const float* some[kBlock];
    float result[kBlock];
    for (int r = 0; r < kBlock; ++r) some[r] = hidden + rows[i + r] * hidden_stride;
    dot_block<kBlock>(weight, some, size, result);
    for (int r = 0; r < kBlock; ++r) out[i + r] = result[r];
  }
  for (; i < count; ++i) {
    const float* one[1] = {hidden + rows[i] * hidden_stride};
    float result[1];
    dot_block<1>(weight, one, size, result);
    out[i] = result[0];
  }
}

template <class T>
inline void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = as_float(from[i]);
}

template <class T>
inline void blend(const T* a, const T* b, float weight_a, float weight_b, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    if (i + kLanes <= count) {
      store(to + i, load(a + i) * weight_a + load(b + i) * weight_b);
      continue;
    }
    T rest_a[kLanes] = {}, rest_b[kLanes] = {}, rest[kLanes];
    for (int64_t j = 0; i + j < count; ++j) {
      rest_a[j] = a[i + j];
      rest_b[j] = b[i + j];
    }
    store(rest, load(rest_a) * weight_a + load(rest_b) * weight_b);
    for (int64_t j = 0; i + j < count; ++j) to[i + j] = rest[j];
  }
}

}  // namespace saffron::cpu::SAFFRON_ISA
