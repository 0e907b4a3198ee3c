#pragma once

// Loops over rows of numbers: what nucleus, multifurcation_head and merge_attention are made of.

#include "cpu/simd/kernels.h"
#include "cpu/simd/vec.h"

namespace saffron::cpu::SAFFRON_ISA {

constexpr float kToLog2 = 1.4426950408889634f;
constexpr float kLowest = -__FLT_MAX__;

/// e^x for x <= 0: 2^(x log2 e) with the product's rounding error made good, as fp32 softmax needs.
inline Vec exp(Vec x) {
  x = (x < splat(-200.f)) ? splat(-200.f) : x;  // 0 either way, but -infinity would give NaN below
  const Vec high = x * kToLog2;
  const Vec low = x * kToLog2 - high + x * 1.925963033500011e-08f;  // one FMA: exact
  const Vec y = exp2(high);
  return y + y * (low * 0.69314718055994531f);
}

/// The value that a token has where there is none.
template <class T>
inline T no_logit() {
  if constexpr (sizeof(T) == 2) {
    return T{0xff80};  // bf16
  } else {
    return -__builtin_inff();
  }
}

constexpr int kScanVectors = kScanTokens / kLanes, kScannedAtOnce = 4;

/// Vectors of a block of logits from the i-th on; the order of the tokens does not matter to them.
template <class T>
SAFFRON_INLINE void load_scanned(const T* block, int i, Vec (&v)[kScannedAtOnce]) {
  for (int j = 0; j < kScannedAtOnce; ++j) v[j] = half_of(block + (i + j / 2 * 2) * kLanes, j % 2);
}

/// The largest of a block's logits, or the lowest number: -infinity would give NaN as a base.
template <class T>
inline float largest_of(const T* block) {
  Vec best[kScannedAtOnce], v[kScannedAtOnce];
  load_scanned(block, 0, best);
  for (int i = kScannedAtOnce; i < kScanVectors; i += kScannedAtOnce) {
    load_scanned(block, i, v);
    for (int j = 0; j < kScannedAtOnce; ++j) best[j] = max(best[j], v[j]);
  }
  return reduce_max(max(splat(kLowest), max(max(best[0], best[1]), max(best[2], best[3]))));
}

/// The sum of e^(logit - largest) over a block. The largest counts 1, exactly; the error of the
/// others grows with the distance from it, as they get smaller. Inlined, GCC would load all
/// constants again for each vector.
template <class T>
__attribute__((noinline)) float mass_of(const T* block, float largest) {
  Vec sums[2] = {}, e[kScannedAtOnce];
  for (int i = 0; i < kScanVectors; i += kScannedAtOnce) {
    load_scanned(block, i, e);
    for (int j = 0; j < kScannedAtOnce; ++j) e[j] -= largest;
    exp_addends(e);
    for (int j = 0; j < kScannedAtOnce; ++j) sums[j % 2] += e[j];
  }
  return reduce_add(sums[0] + sums[1]);
}

template <class T>
inline void scan(const T* const* blocks, int64_t count, int64_t size_of_last, float* top,
                 float* sum) {
  T padded[kScanTokens];
  const T* last = blocks[count - 1];
  if (size_of_last < kScanTokens) {
    for (int64_t i = 0; i < kScanTokens; ++i)
      padded[i] = i < size_of_last ? last[i] : no_logit<T>();
    last = padded;
  }
  const auto block = [&](int64_t b) { return b < count - 1 ? blocks[b] : last; };
  // One block ahead, so that no exponential waits for the largest logit to cross the lanes.
  top[0] = largest_of(block(0));
  for (int64_t b = 0; b < count; ++b) {
    if (b + 1 < count) top[b + 1] = largest_of(block(b + 1));
    sum[b] = mass_of(block(b), top[b]);
  }
}

inline double join(const float* tops, float* sums, int64_t blocks, float* largest) {
  float most = kLowest;
  for (int64_t b = 0; b < blocks; ++b) most = most < tops[b] ? tops[b] : most;
  *largest = most;
  double total = 0;
  for (int64_t b = 0; b < blocks; b += kLanes) {
    const int64_t count = blocks - b < kLanes ? blocks - b : kLanes;
    float top[kLanes] = {}, sum[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      top[i] = tops[b + i];
      sum[i] = sums[b + i];
    }
    store(sum, load(sum) * exp(load(top) - most));
    for (int64_t i = 0; i < count; ++i) total += static_cast<double>(sums[b + i] = sum[i]);
  }
  return total;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
/// For each mask of eight lanes, the numbers of those that are set, in order.
struct SetLanes {
  uint8_t lane[256][8] = {};
  constexpr SetLanes() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int i = 0; i < 8; ++i) {
        if (mask >> i & 1) lane[mask][count++] = static_cast<uint8_t>(i);
      }
    }
  }
};
constexpr SetLanes kSetLanes;
#endif

template <class T>
inline int64_t collect(const T* x, int64_t count, int64_t first_token, float threshold, float shift,
                       uint64_t* keys, double* mass) {
  uint64_t* const first = keys;
  Vec sum{};
  for (int64_t i = 0; i < count; i += kLanes) {
    T rest[kLanes];
    const T* from = x + i;
    if (i + kLanes > count) {
      for (int64_t j = 0; j < kLanes; ++j) rest[j] = i + j < count ? x[i + j] : no_logit<T>();
      from = rest;
    }
    const Vec v = load(from);
    const VecI reaches = v >= splat(threshold);
    uint32_t found = bits(reaches);
    if (found == 0) continue;
    Vec e[1] = {v - shift};
    exp_addends(e);
    sum += reaches ? e[0] : Vec{};
#if defined(__AVX2__)
    // All lanes at once: the ones in question first, and what follows them is overwritten next
    // time.
    const VecU value = (VecU)(v + 0.f);
    const VecU key = ((VecI)value < 0) ? value : ~(value | 0x80000000u);
    const VecU token = (VecU)lane_numbers() + static_cast<uint32_t>(first_token + i);
#if defined(__AVX512F__)
    const auto mask = static_cast<__mmask16>(found);
    const __m512i packed_key = _mm512_maskz_compress_epi32(mask, (__m512i)key);
    const __m512i packed_token = _mm512_maskz_compress_epi32(mask, (__m512i)token);
    const __m512i low = _mm512_unpacklo_epi32(packed_token, packed_key);
    const __m512i high = _mm512_unpackhi_epi32(packed_token, packed_key);
    const __m512i order_low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i order_high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(keys, _mm512_permutex2var_epi64(low, order_low, high));
    _mm512_storeu_si512(keys + 8, _mm512_permutex2var_epi64(low, order_high, high));
#else
    __m128i lanes{};
    std::memcpy(&lanes, kSetLanes.lane[found], 8);
    const __m256i order = _mm256_cvtepu8_epi32(lanes);
    const __m256i packed_key = _mm256_permutevar8x32_epi32((__m256i)key, order);
    const __m256i packed_token = _mm256_permutevar8x32_epi32((__m256i)token, order);
    const __m256i low = _mm256_unpacklo_epi32(packed_token, packed_key);
    const __m256i high = _mm256_unpackhi_epi32(packed_token, packed_key);
    auto* to = reinterpret_cast<__m256i*>(keys);
    _mm256_storeu_si256(to, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(low, high, 0x31));
#endif
    keys += __builtin_popcount(found);
#else
    for (; found != 0; found &= found - 1) {
      const int lane = __builtin_ctz(found);
      *keys++ = uint64_t{descending_key(as_float(from[lane]))} << 32 |
                static_cast<uint64_t>(first_token + i + lane);
    }
#endif
  }
  *mass += static_cast<double>(reduce_add(sum));
  return keys - first;
}

inline void probabilities(const uint64_t* keys, int64_t count, float shift, float sum, float* p) {
  const VecI odd = 2 * lane_numbers() + 1;
  const auto of = [&](const uint64_t* some) {
    VecU halves[2];  // of each key the token, then what stands for the logit
    std::memcpy(halves, some, sizeof halves);
    const VecU key = __builtin_shuffle(halves[0], halves[1], odd);
    return exp((Vec)(((VecI)key < 0) ? key : ~key & 0x7fffffffu) - shift) / sum;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(p + i, of(keys + i));
  uint64_t rest[kLanes] = {};
  for (int64_t j = i; j < count; ++j) rest[j - i] = keys[j];
  const Vec last = of(rest);
  for (int64_t j = i; j < count; ++j) p[j] = last[j - i];
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
