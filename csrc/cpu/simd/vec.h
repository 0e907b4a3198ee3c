#pragma once

// Vectors of the width that the file is compiled for. Everything in simd/ is compiled once for each
// instruction set (see CMakeLists.txt), inside a namespace of its own, and uses nothing of the
// standard library that is not inlined: the linker keeps one copy of a template function, and a
// copy built for AVX-512 would crash older machines.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/tensor.h"

#ifndef SAFFRON_ISA
#define SAFFRON_ISA generic
#endif

namespace saffron::cpu::SAFFRON_ISA {

#if defined(SAFFRON_LANES)  // tests: a width that this machine has no registers for
constexpr int kLanes = SAFFRON_LANES;
#elif defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

SAFFRON_INLINE Vec splat(float x) {
  return x - Vec{};
}  // unlike `x + 0`, the same as x even for -0: free
SAFFRON_INLINE VecI splat_int(int32_t x) { return x - VecI{}; }

SAFFRON_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SAFFRON_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

SAFFRON_INLINE Vec load(const uint16_t* p) {  // bf16
  VecH h;
  std::memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)  // GCC splits the conversion in two otherwise
  return (Vec)((VecU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h) << 16);
#elif defined(__AVX2__)
  return (Vec)((VecU)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
  return (Vec)(__builtin_convertvector(h, VecU) << 16);
#endif
}

/// One of the two vectors that 2 * kLanes numbers make. Of bf16 the first has those at even places
/// and the second those at odd ones, which takes one operation each.
SAFFRON_INLINE Vec half_of(const float* p, int half) { return load(p + half * kLanes); }
SAFFRON_INLINE Vec half_of(const uint16_t* p, int half) {
  VecU both;
  std::memcpy(&both, p, sizeof both);
  return half == 0 ? (Vec)(both << 16) : (Vec)(both & 0xffff0000u);
}

SAFFRON_INLINE float as_float(float x) { return x; }
SAFFRON_INLINE float as_float(uint16_t x) {  // bf16
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// fp32 to bf16, rounded to nearest even; NaN stays NaN.
SAFFRON_INLINE VecU round_bf16(Vec v) {
  const VecU bits = (VecU)v;
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (VecU)((v == v) ? (VecI)rounded : (VecI)((bits >> 16) | 0x40));
}
SAFFRON_INLINE void store(uint16_t* p, Vec v) {
  const VecH h = __builtin_convertvector(round_bf16(v), VecH);
  std::memcpy(p, &h, sizeof h);
}

/// The larger; `a` if either is NaN.
SAFFRON_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)b, (__m512)a);  // GCC warns of the plain one
#elif defined(__AVX__)
  return (Vec)_mm256_max_ps((__m256)b, (__m256)a);
#else
  return (a < b) ? b : a;
#endif
}

SAFFRON_INLINE VecI lane_numbers() {
  VecI v{};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

/// One bit for each lane of a comparison's result.
SAFFRON_INLINE uint32_t bits(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t set = 0;
  for (int i = 0; i < kLanes; ++i) set |= (mask[i] != 0) << i;
  return set;
#endif
}

/// Lane i + width of each lane i, for one that has such a lane.
template <int kWidth>
SAFFRON_INLINE Vec lanes_from(Vec v) {
  return __builtin_shuffle(v, (lane_numbers() + kWidth) & (kLanes - 1));
}

template <int kWidth = kLanes / 2>
SAFFRON_INLINE float reduce_add(Vec v) {
  v += lanes_from<kWidth>(v);
  if constexpr (kWidth > 1) return reduce_add<kWidth / 2>(v);
  return v[0];
}

template <int kWidth = kLanes / 2>
SAFFRON_INLINE float reduce_max(Vec v) {
  v = max(v, lanes_from<kWidth>(v));
  if constexpr (kWidth > 1) return reduce_max<kWidth / 2>(v);
  return v[0];
}

/// 2^f for -0.5 <= f <= 0.5: the Taylor series.
SAFFRON_INLINE Vec exp2_fraction(Vec f) {
  Vec y = splat(1.5403530393381609954e-4f);
  y = y * f + 1.3333558146428443423e-3f;
  y = y * f + 9.6181291076284771619e-3f;
  y = y * f + 5.5504108664821579953e-2f;
  y = y * f + 2.4022650695910071233e-1f;
  y = y * f + 6.9314718055994530942e-1f;
  return y * f + 1.f;
}

/// 2^x for x <= 127, within 2 units in the last place; 0 below the normal numbers, NaN for NaN.
SAFFRON_INLINE Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const __m512 floor = _mm512_set1_ps(-126.f);
  const __m512 clamped = _mm512_maskz_max_ps(0xffff, floor, (__m512)x);  // NaN stays
  const __m512 whole = _mm512_maskz_roundscale_ps(0xffff, clamped, 8);  // to nearest, no exceptions
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, floor, _CMP_NLT_UQ);
  const Vec fraction = exp2_fraction((Vec)clamped - (Vec)whole);
  return (Vec)_mm512_maskz_scalef_ps(normal, (__m512)fraction, whole);
#else
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec clamped = (x < splat(-126.f)) ? splat(-126.f) : x;
  const Vec shifted = clamped + magic;
  const VecU power = ((VecU)shifted + 127) << 23;  // the low bits of `shifted` hold the integer
  const Vec result = exp2_fraction(clamped - (shifted - magic)) * (Vec)power;
  return (x < splat(-126.f)) ? Vec{} : result;
#endif
}

// 2^x = 2^whole * 2^(part / kParts) * 2^rest: the second factor comes from a table that lies in
// registers, so that few terms make the third.
#if defined(__AVX512F__)
constexpr int kPartBits = 5;
constexpr double kPartStep = 1.0218971486541166;               // 2^(1 / 32)
constexpr float kRestTerm[] = {0.2402265f, 0.69315733f, 1.f};  // right to 5e-8 up to 1/64
#elif defined(__AVX2__)
constexpr int kPartBits = 3;
constexpr double kPartStep = 1.0905077326652577;                              // 2^(1 / 8)
constexpr float kRestTerm[] = {5.549622e-2f, 0.24025763f, 0.69314721f, 1.f};  // 3e-8, 1/16
#else
constexpr int kPartBits = 0;
constexpr double kPartStep = 2;
constexpr float kRestTerm[] = {1.3264727e-3f, 9.6715126e-3f, 5.5507337e-2f,
                               2.4022242e-1f, 6.9314698e-1f, 1.f};  // 1e-7, 1/2
#endif
constexpr int kParts = 1 << kPartBits;

/// The bits of 2^(part / kParts), less those of `part` where they are added to them.
struct PartBits {
  uint32_t of[kParts] = {};
  constexpr PartBits() {
    double power = 1;
    for (uint32_t part = 0; part < kParts; ++part) {
      of[part] =
          __builtin_bit_cast(uint32_t, static_cast<float>(power)) - (part << (23 - kPartBits));
      power *= kPartStep;
    }
  }
};
constexpr PartBits kPart;

/// 2^(number / kParts), for integers in the low bits of `number`.
SAFFRON_INLINE Vec power_of_parts(VecU number) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_loadu_si512(kPart.of), high = _mm512_loadu_si512(kPart.of + 16);
  const VecU part = (VecU)_mm512_permutex2var_epi32(low, (__m512i)number, high);
#elif defined(__AVX2__)
  const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPart.of));
  const VecU part = (VecU)_mm256_permutevar8x32_epi32(all, (__m256i)number);
#else
  const VecU part = VecU{} + kPart.of[0];
#endif
  return (Vec)(part + (number << (23 - kPartBits)));
}

/// e^x of N vectors, x <= 0, good enough to be added to 1: within 2e-7 of it, nearly 0 below e^-87;
/// 1 for 0, NaN for NaN. Stage by stage, as the schedulers of a processor hold few of the long
/// chains.
template <int N>
SAFFRON_INLINE void exp_addends(Vec (&x)[N]) {
  constexpr float kToLog2 = 1.4426950408889634f;
  constexpr float kMagic = 12582912.f / kParts;  // adding it rounds to parts
  constexpr int kTerms = sizeof(kRestTerm) / sizeof(float);
  Vec number[N], y[N];
  for (int j = 0; j < N; ++j) x[j] = max(x[j], splat(-87.f));  // NaN stays
  for (int j = 0; j < N; ++j) number[j] = x[j] * kToLog2 + kMagic;
  for (int j = 0; j < N; ++j) x[j] = x[j] * kToLog2 - (number[j] - kMagic);
  for (int j = 0; j < N; ++j) y[j] = splat(kRestTerm[0]);
  for (int k = 1; k < kTerms; ++k) {
    for (int j = 0; j < N; ++j) y[j] = y[j] * x[j] + kRestTerm[k];
  }
  for (int j = 0; j < N; ++j) x[j] = y[j] * power_of_parts((VecU)number[j]);
}

/// Transposes kLanes vectors in place. `Step` exchanges blocks of 1, 2, 4, ... lanes.
template <int kStep>
SAFFRON_INLINE void transpose(Vec (&rows)[kLanes]) {
  if constexpr (kStep < kLanes) {
    VecI low{}, high{};
    for (int j = 0; j < kLanes; ++j) {
      low[j] = (j & kStep) ? j - kStep + kLanes : j;
      high[j] = (j & kStep) ? j + kLanes : j + kStep;
    }
    for (int i = 0; i < kLanes; ++i) {
      if (i & kStep) continue;
      const Vec a = rows[i], b = rows[i + kStep];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + kStep] = __builtin_shuffle(a, b, high);
    }
    transpose<2 * kStep>(rows);
  }
}

}  // namespace saffron::cpu::SAFFRON_ISA
