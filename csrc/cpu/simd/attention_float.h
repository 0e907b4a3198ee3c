#pragma once

// The two products of attention in fp32, with vectors of any width.

#include <type_traits>

#include "cpu/simd/attention.h"

namespace saffron::cpu::SAFFRON_ISA {

/// Columns of B or C, from one to the next `stride` floats.
template <class T>
struct Columns {
  T* data;
  int64_t stride;
};

/// C[i, lane] (+)= sum over k of A(i, k) * B[k, lane], for kRows values of i and kWide columns. A
/// is read one element at a time. Not inlined: among other code GCC keeps some of the sums in
/// memory.
template <int kRows, int kWide, bool kAccumulate, bool kPrefetch, class A>
__attribute__((noinline)) void multiply_block(int64_t size, const A& a, Columns<const float> b,
                                              Columns<float> c, Prefetch& ahead) {
  Vec sum[kRows][kWide];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kWide; ++j) {
      sum[i][j] = kAccumulate ? load(c.data + j * c.stride + i * kLanes) : Vec{};
    }
  }
  for (int64_t k = 0; k < size; ++k) {
    if (kPrefetch && k % 4 != 3)
      ahead.next();  // so often that a single pair of columns gets through the tile
    const float* left = a.row(k);
    Vec right[kWide];
    for (int j = 0; j < kWide; ++j) right[j] = load(b.data + j * b.stride + k * kLanes);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kWide; ++j) sum[i][j] += splat(left[i * A::kStep]) * right[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kWide; ++j) store(c.data + j * c.stride + i * kLanes, sum[i][j]);
  }
}

/// The same for any number of rows; `left(i, n)` is A from row i on, of which n rows are needed.
template <int kWide, bool kAccumulate, class F>
inline void multiply(int64_t rows, int64_t size, F&& left, Columns<const float> b, Columns<float> c,
                     Prefetch& ahead) {
  // As many sums as the registers hold: with few, each multiplication waits for the one before.
  constexpr int kRows = kLanes == 16 ? 12 : kLanes == 8 ? 12 / kWide : 8 / kWide;
  int64_t i = 0;
  const auto from = [&](int64_t row) { return Columns<float>{c.data + row * kLanes, c.stride}; };
  for (; rows - i >= kRows && (kRows != 6 || rows - i != 8); i += kRows) {  // 8: twice 4
    const auto a = left(i, kRows);
    if (ahead.active()) {
      multiply_block<kRows, kWide, kAccumulate, true>(size, a, b, from(i), ahead);
    } else {
      multiply_block<kRows, kWide, kAccumulate, false>(size, a, b, from(i), ahead);
    }
  }
  for (; i + 4 <= rows; i += 4) {
    multiply_block<4, kWide, kAccumulate, true>(size, left(i, 4), b, from(i), ahead);
  }
  for (; i < rows; ++i) {
    multiply_block<1, kWide, kAccumulate, false>(size, left(i, 1), b, from(i), ahead);
  }
}

/// Both products in fp32, whatever the storage. kRow: floats from token to token in the copies of K
/// and V, a constant that is at least head_dim and v_dim.
template <class T, int kRow>
struct FloatMath {
  using Storage = T;
  static constexpr int64_t kTileTokens = 64;
  static constexpr int64_t kPadding = 1;

  int64_t head_dim, v_dim;
  float *q, *k, *v, *scores;

  FloatMath(ScratchAllocator& allocator, int64_t columns, int64_t head_dim, int64_t v_dim)
      : head_dim(head_dim),
        v_dim(v_dim),
        q(allocator.take<float>(columns * kRow * kLanes)),
        k(allocator.take<float>(kTileTokens * kRow)),
        v(allocator.take<float>(kTileTokens * kRow)),
        scores(allocator.take<float>(2 * kTileTokens * kLanes)) {}

  void set_queries(int64_t column, const T* const* row, int64_t count, float sign) {
    float* to = q + column * kRow * kLanes;
    for (int64_t d = 0; d < head_dim; d += kLanes, to += kLanes * kLanes) {
      const int64_t wide = head_dim - d < kLanes ? head_dim - d : kLanes;
      Vec block[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        if (wide == kLanes) {
          block[i] = load(row[i] + d) * sign;
        } else {
          for (int64_t j = 0; j < wide; ++j) block[i][j] = as_float(row[i][d + j]) * sign;
        }
      }
      transpose<1>(block);
      for (int64_t j = 0; j < wide; ++j) store(to + j * kLanes, block[j]);
    }
  }

  /// K is copied piece by piece when the first columns need it; it stays, and V is copied, only if
  /// others do.
  void load_tile(const AttentionTask& task, const Tile& tile, int64_t head, bool several) {
    const int32_t* slot = task.slot + tile.first;
    k_rows = {task.k + head * task.k_head_stride, task.k_stride, slot};
    v_rows = {task.v + head * task.v_head_stride, task.v_stride, slot};
    keep = several;
    loaded = 0;
    if (!direct()) {
      for (int64_t t = 0; t < tile.count; ++t) copy(v_rows.at(t), v_dim, v + t * kRow);
    }
  }

  void score(int64_t column, int wide, int64_t count, Prefetch& ahead) {
    const Columns<const float> b{q + column * kRow * kLanes, kRow * kLanes};
    const Columns<float> c{scores, kTileTokens * kLanes};
    const auto left = [&](int64_t i, int64_t rows) {
      float* to = keep ? k + i * kRow : k;
      for (; loaded < i + rows; ++loaded) {
        copy(k_rows.at(loaded), head_dim, to + (loaded - i) * kRow);
      }
      return CopiedKeys{to};
    };
    if (wide == 2) {
      multiply<2, false>(count, head_dim, left, b, c, ahead);
    } else {
      multiply<1, false>(count, head_dim, left, b, c, ahead);
    }
  }

  /// One line with every step of a product: that is fast enough with a single pair of columns.
  void pace(const Prefetch&, int64_t, int64_t) {}

  /// Weights take the place of the scores.
  Vec weigh(int64_t which, int64_t count, float scale, Vec shift) {
    float* at = scores + which * kTileTokens * kLanes;
    Vec total{};
    for (int64_t t = 0; t < count; ++t) {
      const Vec weight = exp2(load(at + t * kLanes) * scale - shift);
      store(at + t * kLanes, weight);
      total += weight;
    }
    return total;
  }
  Vec weight(int64_t which, int64_t t) const {
    return load(scores + (which * kTileTokens + t) * kLanes);
  }

  void accumulate(float* out, int wide, int64_t count, bool fresh, Prefetch& ahead) {
    const Columns<const float> b{scores, kTileTokens * kLanes};
    const Columns<float> c{out, column_size(v_dim)};
    const auto run = [&](auto add, auto&& left) {
      if (wide == 2) {
        multiply<2, add>(v_dim, count, left, b, c, ahead);
      } else {
        multiply<1, add>(v_dim, count, left, b, c, ahead);
      }
    };
    const auto run_any = [&](auto&& left) {
      fresh ? run(std::false_type{}, left) : run(std::true_type{}, left);
    };
    if constexpr (sizeof(T) == sizeof(float)) {
      if (direct()) return run_any([&](int64_t d, int64_t) { return CachedValues{v_rows, d}; });
    }
    run_any([&](int64_t d, int64_t) { return CopiedValues{v + d}; });
  }

 private:
  struct Rows {
    const char* base;
    int64_t stride;
    const int32_t* slot;
    const T* at(int64_t t) const { return reinterpret_cast<const T*>(base + slot[t] * stride); }
  };
  // Left-hand sides: K by (token, dimension), V by (dimension, token).
  struct CopiedKeys {
    static constexpr int kStep = kRow;
    const float* from;
    const float* row(int64_t d) const { return from + d; }
  };
  struct CopiedValues {
    static constexpr int kStep = 1;
    const float* from;
    const float* row(int64_t t) const { return from + t * kRow; }
  };
  struct CachedValues {
    static constexpr int kStep = 1;
    const Rows& rows;
    int64_t first;
    const float* row(int64_t t) const { return reinterpret_cast<const float*>(rows.at(t)) + first; }
  };

  Rows k_rows{}, v_rows{};
  bool keep = false;
  int64_t loaded = 0;

  /// V is read where it lies.
  bool direct() const { return sizeof(T) == sizeof(float) && !keep; }

  static void copy(const T* from, int64_t size, float* to) {
    int64_t d = 0;
    for (; d + kLanes <= size; d += kLanes) store(to + d, load(from + d));
    for (; d < size; ++d) to[d] = as_float(from[d]);
  }
};

}  // namespace saffron::cpu::SAFFRON_ISA
