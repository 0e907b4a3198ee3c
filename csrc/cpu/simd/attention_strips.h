#pragma once

// Attention of a few rows over tokens that just these rows see, with the head size along the lanes:
// K and V are read where they lie, nothing is masked, and no lane is empty because rows are few.

#include "cpu/simd/attention.h"

namespace saffron::cpu::SAFFRON_ISA {

/// A partial result of strips: outputs [row, v_dim], then maxima and sums [row]. A row whose
/// maximum is -infinity saw nothing, and its outputs and its sum are undefined.
struct StripPartial {
  float *out, *maximum, *sum;
  StripPartial(float* base, int64_t rows, int64_t v_dim)
      : out(base), maximum(base + rows * v_dim), sum(maximum + rows) {}
};
inline int64_t strip_partial_size(int64_t rows, int64_t v_dim) {
  return round_up(rows * (v_dim + 2), 16);
}

/// Rows that a strip may have at most, or 0 if these sizes do not come in whole vectors.
inline int64_t strip_rows(DType, int64_t head_dim, int64_t v_dim) {
  if (head_dim % (2 * kLanes) != 0 || v_dim % (2 * kLanes) != 0 || head_dim == 0) return 0;
  return kLanes;
}

constexpr int64_t kStripSlack = 32;  // tokens behind the last one that are computed, and not used

/// Puts two vectors of outputs that half_of() took apart back in order.
SAFFRON_INLINE void interleave(float* p) {
  VecI low{}, high{};
  for (int j = 0; j < kLanes; ++j) {
    low[j] = j % 2 * kLanes + j / 2;
    high[j] = low[j] + kLanes / 2;
  }
  const Vec even = load(p), odd = load(p + kLanes);
  store(p, __builtin_shuffle(even, odd, low));
  store(p + kLanes, __builtin_shuffle(even, odd, high));
}

/// Lane i of the result: the sum of the lanes of x[i].
SAFFRON_INLINE Vec sums_of(Vec (&x)[kLanes]) {
  constexpr int kBlocks = kLanes / 4;
  VecI even{}, even_block{};
  for (int j = 0; j < kLanes; ++j) {
    const int block = j / 4, k = j % 4;
    even[j] = (k < 2 ? 0 : kLanes - 4) + 4 * block + 2 * k;
    if (kBlocks > 1) {
      even_block[j] = (block < kBlocks / 2 ? 0 : kLanes - 4 * kBlocks) + 8 * block + k;
    }
  }
  int count = kLanes / 2;
  for (int round = 0; round < 2; ++round, count /= 2) {
    for (int i = 0; i < count; ++i) {
      x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even) +
             __builtin_shuffle(x[2 * i], x[2 * i + 1], even + 1);
    }
  }
  for (; count > 0; count /= 2) {
    for (int i = 0; i < count; ++i) {
      x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], even_block) +
             __builtin_shuffle(x[2 * i], x[2 * i + 1], even_block + 4);
    }
  }
  return x[0];
}

/// How a strip of kRows rows is worked on: a vector of scores has those of several tokens.
template <int kRows>
struct StripShape {
  static constexpr int kPadded = kRows <= 1   ? 1
                                 : kRows <= 2 ? 2
                                 : kRows <= 4 ? 4
                                 : kRows <= 8 ? 8
                                              : 16;
  static constexpr int kTokens = kLanes / kPadded;  // of a vector of scores
  // Vectors at once: each multiplication waits for the one before it in its sum.
  static constexpr int kVectors = 12 / (kRows * kTokens) > 1 ? 12 / (kRows * kTokens) : 1;
  static constexpr int kAtOnce = kTokens * kVectors;
};

/// Scores of kAtOnce tokens, whose keys lie `offset[i]` bytes from `base`: [token, kPadded].
template <class T, int kRows>
__attribute__((noinline)) void score_strip(const char* base, const int64_t* offset, const float* q,
                                           int64_t head_dim, float* scores) {
  using Shape = StripShape<kRows>;
  constexpr int kCount = Shape::kAtOnce;
  Vec sum[kCount][kRows] = {};
  const T* key[kCount];
  for (int i = 0; i < kCount; ++i) key[i] = reinterpret_cast<const T*>(base + offset[i]);
  for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
    for (int half = 0; half < 2; ++half) {
      Vec right[kCount];
      for (int i = 0; i < kCount; ++i) right[i] = half_of(key[i] + d, half);
      for (int r = 0; r < kRows; ++r) {
        const Vec left = load(q + r * head_dim + d + half * kLanes);
        for (int i = 0; i < kCount; ++i) sum[i][r] += left * right[i];
      }
    }
  }
  for (int v = 0; v < Shape::kVectors; ++v) {
    Vec lanes[kLanes] = {};
    for (int i = 0; i < Shape::kTokens; ++i) {
      for (int r = 0; r < kRows; ++r) {
        lanes[i * Shape::kPadded + r] = sum[v * Shape::kTokens + i][r];
      }
    }
    store(scores + v * kLanes, sums_of(lanes));
  }
}

/// Adds the values of `count` tokens, each times its weight, to kPairs * 2 vectors of kRows rows.
/// Weights are [token, kPadded].
template <class T, int kRows, int kPairs, int kPadded>
__attribute__((noinline)) void add_values(const char* base, const int64_t* offset, int64_t count,
                                          const float* weights, float* out, int64_t v_dim) {
  Vec sum[kRows][2 * kPairs];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < 2 * kPairs; ++j) sum[r][j] = load(out + r * v_dim + j * kLanes);
  }
  for (int64_t t = 0; t < count; ++t) {
    const auto* value = reinterpret_cast<const T*>(base + offset[t]);
    const float* weight = weights + t * kPadded;
    for (int j = 0; j < 2 * kPairs; ++j) {
      const Vec right = half_of(value + j / 2 * 2 * kLanes, j % 2);
      for (int r = 0; r < kRows; ++r) sum[r][j] += splat(weight[r]) * right;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < 2 * kPairs; ++j) store(out + r * v_dim + j * kLanes, sum[r][j]);
  }
}

/// The same for all of v_dim, and for more rows than fit the registers.
template <class T, int kRows, int kPadded>
inline void add_all_values(const char* base, const int64_t* offset, int64_t count,
                           const float* weights, float* out, int64_t v_dim) {
  constexpr int kMostRows = kLanes == 16 ? 8 : 4;
  if constexpr (kRows > kMostRows) {
    constexpr int kFirst = (kRows + 1) / 2;
    add_all_values<T, kFirst, kPadded>(base, offset, count, weights, out, v_dim);
    add_all_values<T, kRows - kFirst, kPadded>(base, offset, count, weights + kFirst,
                                               out + kFirst * v_dim, v_dim);
  } else {
    constexpr int kPairs = kRows == 1 ? 4 : kRows * 4 <= (kLanes == 16 ? 16 : 12) ? 2 : 1;
    constexpr int64_t kStep = 2 * kLanes, kItem = sizeof(T);
    int64_t d = 0;
    for (; d + kPairs * kStep <= v_dim; d += kPairs * kStep) {
      add_values<T, kRows, kPairs, kPadded>(base + d * kItem, offset, count, weights, out + d,
                                            v_dim);
    }
    for (; d < v_dim; d += kStep) {
      add_values<T, kRows, 1, kPadded>(base + d * kItem, offset, count, weights, out + d, v_dim);
    }
  }
}

/// The larger or the sum over the lanes of each row, in all of them.
template <int kPadded, class F>
SAFFRON_INLINE Vec across_tokens(Vec x, F&& join) {
  for (int step = kPadded; step < kLanes; step *= 2) {
    VecI from{};
    for (int j = 0; j < kLanes; ++j) from[j] = j ^ step;
    x = join(x, (Vec)__builtin_shuffle(x, from));
  }
  return x;
}

/// What one head has of the rows that are worked on: lane i has row i % kPadded.
struct StripState {
  Vec maximum, sum;  // the sum is that of all lanes of a row
};

/// Turns scores into weights, and brings maxima, sums and outputs up to date.
template <int kRows>
inline void online_softmax_strip(const Scaling& scaling, int64_t count, float* scores,
                                 StripState& state, float* out, int64_t v_dim) {
  constexpr int kPadded = StripShape<kRows>::kPadded;
  const int64_t vectors = ceil_div(count * kPadded, kLanes);
  if (scaling.capped) cap_scores(scaling, vectors, scores);
  const Vec lowest = splat(-__builtin_inff());
  for (int64_t i = count * kPadded; i < vectors * kLanes; ++i) scores[i] = -__builtin_inff();
  Vec found[2] = {lowest, lowest};
  for (int64_t i = 0; i < vectors; ++i) found[i % 2] = max(found[i % 2], load(scores + i * kLanes));
  const auto larger = [](Vec a, Vec b) { return max(a, b); };
  const Vec highest = across_tokens<kPadded>(max(found[0], found[1]), larger);
  const Vec largest = max(splat(kLowestSeen), highest * scaling.scale);

  const VecI rises = largest > state.maximum + kSlack;  // true at the first score
  if (bits(rises)) {
    const Vec raised = rises ? largest : state.maximum;
    const Vec factor = rises ? exp2(state.maximum - raised) : splat(1.f);
    state.maximum = raised;
    state.sum *= factor;
    for (int r = 0; r < kRows; ++r) {
      for (int64_t d = 0; d < v_dim; d += kLanes) {
        store(out + r * v_dim + d, load(out + r * v_dim + d) * splat(factor[r]));
      }
    }
  }
  Vec total{};
  for (int64_t i = 0; i < vectors; ++i) {
    const Vec weight = exp2(load(scores + i * kLanes) * scaling.scale - state.maximum);
    store(scores + i * kLanes, weight);
    total += weight;
  }
  state.sum += total;
}

/// Works on one strip after the other, each for all heads of the task.
template <class T>
class Strips {
 public:
  explicit Strips(const StripTask& task) : task_(task), head_dim_(task.q.shape[2]) {
    ScratchAllocator allocator{task.scratch};
    q_ = allocator.take<float>(task.heads * kLanes * head_dim_);
    scores_ = allocator.take<float>((kStripTokens + kStripSlack) * kLanes);
    states_ = allocator.take<StripState>(task.heads);
    for (int which = 0; which < 2; ++which) {
      k_[which] = allocator.take<int64_t>(kStripTokens + kStripSlack);
      v_[which] = allocator.take<int64_t>(kStripTokens + kStripSlack);
    }
    used = allocator.used;
  }
  int64_t used;

  void run() {
    const float size = task_.scale < 0 ? -task_.scale : task_.scale == 0 ? 1.f : task_.scale;
    scaling_ = {task_.capped ? 1.f : kLog2E * size, task_.capped, size / task_.softcap,
                task_.softcap * kLog2E};
    for (int64_t head = 0; head < task_.heads; ++head) {
      const StripPartial partial = partial_of(head);
      for (int64_t r = 0; r < task_.rows; ++r) partial.maximum[r] = -__builtin_inff();
    }
    if (task_.num_strips > 0) locate(0);
    for (int64_t i = 0; i < task_.num_strips; ++i) {
      if (i + 1 < task_.num_strips) locate(i + 1);
      work_any<1>(i);
    }
    if constexpr (sizeof(T) == 2) put_in_order();
  }

 private:
  StripPartial partial_of(int64_t head) const {
    return StripPartial(task_.partial + head * task_.partial_stride, task_.rows, task_.v_dim);
  }

  /// Where K and V of a strip's tokens lie; those of the last one again behind it.
  void locate(int64_t i) {
    const Strip& strip = task_.strips[i];
    for (int64_t t = 0; t < strip.count; ++t) {
      k_[i % 2][t] = strip.slot[t] * task_.k_stride;
      v_[i % 2][t] = strip.slot[t] * task_.v_stride;
    }
    for (int64_t t = strip.count; t < strip.count + kStripSlack; ++t) {
      k_[i % 2][t] = k_[i % 2][strip.count - 1];
    }
  }

  /// With the number of rows as a constant.
  template <int kRows>
  void work_any(int64_t i) {
    if (task_.strips[i].rows == kRows) return work<kRows>(i);
    if constexpr (kRows < kLanes) work_any<kRows + 1>(i);
  }

  template <int kRows>
  void work(int64_t i) {
    constexpr int kPadded = StripShape<kRows>::kPadded, kAtOnce = StripShape<kRows>::kAtOnce;
    const Strip& strip = task_.strips[i];
    const auto same = [&](const Strip& other) {
      return other.first_row == strip.first_row && other.rows == strip.rows;
    };
    const bool first = i == 0 || !same(task_.strips[i - 1]);
    const bool last = i + 1 == task_.num_strips || !same(task_.strips[i + 1]);
    const int64_t ahead = last && i + 1 == task_.num_strips ? 0 : task_.strips[i + 1].count;
    for (int64_t head = 0; head < task_.heads; ++head) {
      if (first) start<kRows>(strip, head);
      const float* q = q_ + head * kRows * head_dim_;
      const char* k = task_.k + head * task_.k_head_stride;
      const char* v = task_.v + head * task_.v_head_stride;
      for (int64_t t = 0; t < strip.count; t += kAtOnce) {
        for (int64_t j = t; j < t + kAtOnce && j < ahead; ++j) {
          prefetch(k + k_[(i + 1) % 2][j], head_dim_);
          prefetch(v + v_[(i + 1) % 2][j], task_.v_dim);
        }
        score_strip<T, kRows>(k, k_[i % 2] + t, q, head_dim_, scores_ + t * kPadded);
      }
      for (int64_t j = round_up(strip.count, kAtOnce); j < ahead; ++j) {
        prefetch(k + k_[(i + 1) % 2][j], head_dim_);
        prefetch(v + v_[(i + 1) % 2][j], task_.v_dim);
      }
      float* out = partial_of(head).out + (strip.first_row - task_.first_row) * task_.v_dim;
      online_softmax_strip<kRows>(scaling_, strip.count, scores_, states_[head], out, task_.v_dim);
      add_all_values<T, kRows, kPadded>(v, v_[i % 2], strip.count, scores_, out, task_.v_dim);
      if (last) stop<kRows>(strip, head);
    }
  }

  /// Into the second-level cache.
  static SAFFRON_INLINE void prefetch(const char* row, int64_t size) {
    for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += 64) {
      __builtin_prefetch(row + i, 0, 2);
    }
  }

  /// Takes up rows: their queries, and what they have seen so far.
  template <int kRows>
  void start(const Strip& strip, int64_t head) {
    constexpr int kPadded = StripShape<kRows>::kPadded;
    const float sign = task_.scale > 0 ? 1.f : task_.scale < 0 ? -1.f : task_.scale * 0.f;
    const StripPartial partial = partial_of(head);
    StripState& state = states_[head];
    state = {splat(-__builtin_inff()), Vec{}};
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = strip.first_row + r, own = row - task_.first_row;
      const auto* from = reinterpret_cast<const T*>(
          task_.q.at(task_.first_query + row / task_.group,
                     (task_.first_head + head) * task_.group + row % task_.group));
      float* to = q_ + (head * kRows + r) * head_dim_;
      for (int64_t d = 0; d < head_dim_; d += 2 * kLanes) {
        store(to + d, half_of(from + d, 0) * sign);
        store(to + d + kLanes, half_of(from + d, 1) * sign);
      }
      if (partial.maximum[own] == -__builtin_inff()) {
        clear(partial.out + own * task_.v_dim, task_.v_dim);
      } else {
        for (int lane = r; lane < kLanes; lane += kPadded)
          state.maximum[lane] = partial.maximum[own];
        state.sum[r] = partial.sum[own];
      }
    }
  }

  template <int kRows>
  void stop(const Strip& strip, int64_t head) {
    const auto add = [](Vec a, Vec b) { return a + b; };
    const Vec sum = across_tokens<StripShape<kRows>::kPadded>(states_[head].sum, add);
    const StripPartial partial = partial_of(head);
    for (int r = 0; r < kRows; ++r) {
      partial.maximum[strip.first_row - task_.first_row + r] = states_[head].maximum[r];
      partial.sum[strip.first_row - task_.first_row + r] = sum[r];
    }
  }

  void put_in_order() {
    for (int64_t head = 0; head < task_.heads; ++head) {
      const StripPartial partial = partial_of(head);
      for (int64_t r = 0; r < task_.rows; ++r) {
        if (partial.maximum[r] == -__builtin_inff()) continue;
        for (int64_t d = 0; d < task_.v_dim; d += 2 * kLanes) {
          interleave(partial.out + r * task_.v_dim + d);
        }
      }
    }
  }

  const StripTask& task_;
  int64_t head_dim_;
  Scaling scaling_{};
  float *q_, *scores_;
  StripState* states_;
  int64_t *k_[2],
      *v_[2];  // bytes from the head's first row, of the strips with even and odd numbers
};

inline int64_t strip_scratch(int64_t heads, int64_t head_dim) {
  StripTask task{};
  task.heads = heads;
  task.q.shape[2] = head_dim;
  return Strips<float>(task).used;
}

}  // namespace saffron::cpu::SAFFRON_ISA
