#pragma once

// The two products of attention in fp32, with vectors of any width.

#include "cpu/simd/attention.h"

namespace saffron::cpu::SAFFRON_ISA {

/// C[i, r] (+)= sum over k of A(i, k) * B[k, r], for kRows values of i and kVecs vectors of r. A is
/// read one element at a time; B and C have rows of kPanel.
template <int kRows, int kVecs, bool kAccumulate, bool kPrefetch, class A>
inline void multiply_block(int64_t size, const A& a, const float* b, float* c, Prefetch& ahead) {
  Vec sum[kRows][kVecs];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVecs; ++j) {
      sum[i][j] = kAccumulate ? load(c + i * kPanel + j * kLanes) : Vec{};
    }
  }
  for (int64_t k = 0; k < size; ++k) {
    if (kPrefetch && k % 4 != 3)
      ahead.next();  // so often that a single panel gets through the tile
    const float* left = a.row(k);
    Vec right[kVecs];
    for (int j = 0; j < kVecs; ++j) right[j] = load(b + k * kPanel + j * kLanes);
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kVecs; ++j) sum[i][j] += splat(left[i * A::kStep]) * right[j];
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVecs; ++j) store(c + i * kPanel + j * kLanes, sum[i][j]);
  }
}

/// The same for any number of rows; `left(i, n)` is A from row i on, of which n rows are needed.
template <int kVecs, bool kAccumulate, class F>
inline void multiply(int64_t rows, int64_t size, F&& left, const float* b, float* c,
                     Prefetch& ahead) {
  constexpr int kRows = kLanes == 16 ? 12 : 4;  // as many sums as the registers hold
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    const auto a = left(i, kRows);
    if (ahead.active()) {
      multiply_block<kRows, kVecs, kAccumulate, true>(size, a, b, c + i * kPanel, ahead);
    } else {
      multiply_block<kRows, kVecs, kAccumulate, false>(size, a, b, c + i * kPanel, ahead);
    }
  }
  for (; i + 4 <= rows; i += 4) {
    multiply_block<4, kVecs, kAccumulate, true>(size, left(i, 4), b, c + i * kPanel, ahead);
  }
  for (; i < rows; ++i) {
    multiply_block<1, kVecs, kAccumulate, false>(size, left(i, 1), b, c + i * kPanel, ahead);
  }
}

/// Both products in fp32, whatever the storage. kRow: floats from token to token in the copies of K
/// and V, a constant that is at least head_dim.
template <class T, int kRow>
struct FloatMath {
  using Storage = T;
  static constexpr int64_t kTileTokens = 64;

  int64_t head_dim;
  float *q, *k, *v, *scores, *staged;

  FloatMath(Carver& carver, int64_t panels, int64_t head_dim)
      : head_dim(head_dim),
        q(carver.take<float>(panels * head_dim * kPanel)),
        k(carver.take<float>(kTileTokens * kRow)),
        v(carver.take<float>(kTileTokens * kRow)),
        scores(carver.take<float>(kTileTokens * kPanel)),
        staged(carver.take<float>(kLanes * round_up(head_dim, kLanes))) {}

  /// One vector of rows of a panel, `rows` of them; the rest are zeros.
  void set_queries(int64_t panel, int vec, const T* const* row, int64_t step, int64_t rows,
                   float sign) {
    const int64_t width = round_up(head_dim, kLanes);
    for (int64_t r = 0; r < kLanes; ++r) {
      for (int64_t d = 0; d < width; ++d) {
        staged[r * width + d] = r < rows && d < head_dim ? as_float(row[r][d * step]) * sign : 0.f;
      }
    }
    float* to = q + panel * head_dim * kPanel + vec * kLanes;
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = load(staged + i * width + d);
      transpose<1>(block);
      for (int i = 0; i < kLanes && d + i < head_dim; ++i) store(to + (d + i) * kPanel, block[i]);
    }
  }

  /// K is copied piece by piece when the first panel needs it, and stays only if there are more.
  void load_tile(const AttentionTask& task, const Tile& tile, bool several_panels) {
    k_rows = {task.k, task.row_stride, task.slot + tile.first};
    v_rows = {task.v, task.v_row_stride, task.slot + tile.first};
    keep = several_panels;
    loaded = 0;
    if constexpr (!kDirect) {
      for (int64_t t = 0; t < tile.count; ++t) copy(v_rows.at(t), v + t * kRow);
    }
  }

  void score(int64_t panel, int first_vec, int vecs, int64_t count, Prefetch& ahead) {
    const float* b = q + panel * head_dim * kPanel + first_vec * kLanes;
    float* c = scores + first_vec * kLanes;
    const auto left = [&](int64_t i, int64_t rows) {
      float* to = keep ? k + i * kRow : k;
      for (; loaded < i + rows; ++loaded) copy(k_rows.at(loaded), to + (loaded - i) * kRow);
      return CopiedKeys{to};
    };
    if (vecs == 2) {
      multiply<2, false>(count, head_dim, left, b, c, ahead);
    } else {
      multiply<1, false>(count, head_dim, left, b, c, ahead);
    }
  }

  /// One line with every step of a product: that is fast enough with a single panel.
  void pace(const Prefetch&, int64_t) {}
  void between_weights(Prefetch&) {}

  static Vec weight(Vec x) { return exp2(x); }

  /// Weights take the place of the scores.
  void set_weight_pair(int64_t t, int vec, Vec even, Vec odd) {
    store(scores + t * kPanel + vec * kLanes, even);
    store(scores + (t + 1) * kPanel + vec * kLanes, odd);
  }
  void set_last_weight(int64_t t, int vec, Vec weight) {
    store(scores + t * kPanel + vec * kLanes, weight);
  }

  void accumulate(float* out, int first_vec, int vecs, int64_t count, Prefetch& ahead) {
    const float* b = scores + first_vec * kLanes;
    float* c = out + first_vec * kLanes;
    const auto left = [&](int64_t d, int64_t) {
      if constexpr (kDirect) {
        return CachedValues{v_rows, d};
      } else {
        return CopiedValues{v + d};
      }
    };
    if (vecs == 2) {
      multiply<2, true>(head_dim, count, left, b, c, ahead);
    } else {
      multiply<1, true>(head_dim, count, left, b, c, ahead);
    }
  }

 private:
  static constexpr bool kDirect = sizeof(T) == sizeof(float);  // V is read where it lies

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

  void copy(const T* from, float* to) const {
    int64_t d = 0;
    for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load(from + d));
    for (; d < head_dim; ++d) to[d] = as_float(from[d]);
  }
};

}  // namespace saffron::cpu::SAFFRON_ISA
