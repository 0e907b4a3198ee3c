#pragma once

// How attention lays out its buffers: parts of one allocation, and partial results.

#include "cpu/simd/kernels.h"
#include "cpu/simd/vec.h"

namespace saffron::cpu::SAFFRON_ISA {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/// Hands out parts of a buffer; with no buffer it only counts.
struct ScratchAllocator {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
};

/// Floats of a column's outputs: [v_dim, lane], with v_dim rounded up to what AMX needs.
inline int64_t column_size(int64_t v_dim) { return round_up(v_dim, 32) * kLanes; }

inline void clear(float* to, int64_t count) {
  std::memset(to, 0, static_cast<size_t>(count) * sizeof *to);
}

/// A partial result: outputs [column, v_dim, lane], then maxima and sums [column, lane]. A row
/// whose maximum is -infinity saw nothing, and its outputs and its sum are undefined.
struct Partial {
  float *out, *maximum, *sum;
  Partial(float* base, int64_t columns, int64_t v_dim)
      : out(base), maximum(base + columns * column_size(v_dim)), sum(maximum + columns * kLanes) {}
};

inline int64_t partial_size(int64_t rows, int64_t v_dim) {
  return ceil_div(rows, kLanes) * (column_size(v_dim) + 2 * kLanes);
}

}  // namespace saffron::cpu::SAFFRON_ISA
