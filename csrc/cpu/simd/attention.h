#pragma once

// Attention of one block of rows over a run of tiles, with the rows along the lanes: a column is
// one vector of rows, its scores stand as [token, lane] and its outputs as [head_dim, lane]. So the
// softmax needs no operation across lanes. Two columns are worked on at once.
//
// `Math` supplies the two matrix products and the exponentials between them: FloatMath in
// attention_float.h, PairMath in attention_bf16.h.

#include "cpu/simd/attention_memory.h"

namespace saffron::cpu::SAFFRON_ISA {

constexpr float kLog2E = 1.4426950408889634f;
// Outputs are rescaled only when a score exceeds the running maximum by this many powers of two:
// exponentials stay below 2^8, far from overflow, and most tiles rescale nothing.
constexpr float kSlack = 8.f;
// The maximum of a row that has seen a token is at least this, even if its scores are NaN or
// -infinity: -infinity is the maximum of a row that has seen nothing, and of no other.
constexpr float kLowestSeen = -__FLT_MAX__;

/// Walks over the K and V rows of the next tile, those of all the task's heads at once: if there
/// are several they lie side by side, or K and V in turn. Brings them into the second-level cache,
/// line by line between the multiplications of this tile: a processor waits when it asks for many
/// at once.
class Prefetch {
 public:
  Prefetch(const AttentionTask& task, const Tile& tile, int64_t item)
      : task_(task), slot_(task.slot + tile.first), count_(tile.count) {
    const int64_t k_size = task.q.shape[2] * item, v_size = task.v_dim * item;
    const bool adjacent = task.k_head_stride == k_size && task.v_head_stride == v_size;
    pieces_ = adjacent ? 1 : task.heads;
    k_lines_ = ceil_div(k_size * (adjacent ? task.heads : 1), 64);
    v_lines_ = ceil_div(v_size * (adjacent ? task.heads : 1), 64);
    start_piece();
  }

  SAFFRON_INLINE int64_t lines() const { return count_ * pieces_ * (k_lines_ + v_lines_); }
  SAFFRON_INLINE bool active() const { return row_ < 2 * count_; }
  /// Harmless after the last line.
  SAFFRON_INLINE void next() {
    __builtin_prefetch(at_, 0, 2);
    at_ += step_;
    if (--left_ == 0) {
      if (++piece_ == pieces_) {
        piece_ = 0;
        ++row_;
      }
      start_piece();
    }
  }
  SAFFRON_INLINE void next(int64_t lines) {
    for (int64_t i = 0; i < lines && active(); ++i) next();
  }

 private:
  void start_piece() {
    if (!active()) {
      step_ = 0;
      left_ = INT64_MAX;
      return;
    }
    const bool key = row_ < count_;
    const int64_t slot = slot_[key ? row_ : row_ - count_];
    at_ = key ? task_.k + slot * task_.k_stride + piece_ * task_.k_head_stride
              : task_.v + slot * task_.v_stride + piece_ * task_.v_head_stride;
    left_ = key ? k_lines_ : v_lines_;
  }

  const AttentionTask& task_;
  const int32_t* slot_;
  int64_t count_, pieces_, k_lines_, v_lines_, row_ = 0, piece_ = 0, left_ = 0, step_ = 64;
  const char* at_ = nullptr;
};

/// Which rows see which tokens of a tile.
struct Masks {
  const int32_t *begin, *end;
  bool full;  // every row sees every token

  /// Lanes of token `t` among the rows given that see it.
  VecI visible(int64_t t, VecI row) const {
    return (row >= splat_int(begin[t])) & (row < splat_int(end[t]));
  }
};

/// How scores become those of softmax in base 2.
struct Scaling {
  float scale;  // above 0; 1 where the scores are capped, which scales them
  bool capped;  // to outer * tanh(score * inner)
  float inner, outer;
};

/// tanh(x), right to 2 units in the last place: a polynomial near 0 (Cephes' tanhf), where the
/// quotient of exponentials cancels.
inline Vec tanh(Vec x) {
  const Vec size = (x < Vec{}) ? -x : x;
  const Vec e = exp2(size * (-2 * kLog2E));
  const Vec far = (1.f - e) / (1.f + e);
  const Vec z = x * x;
  Vec y = splat(-5.70498872745e-3f);
  y = y * z + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
  return (size < splat(0.625f)) ? y * z * x + x : (x < Vec{}) ? -far : far;
}

inline void cap_scores(const Scaling& scaling, int64_t count, float* scores) {
  for (int64_t t = 0; t < count; ++t) {
    const Vec score = load(scores + t * kLanes) * scaling.inner;
    store(scores + t * kLanes, tanh(score) * scaling.outer);
  }
}

/// The largest of a column's scores that are numbers; those of tokens that a row does not see
/// become -infinity. `seen` says which rows see a token.
inline Vec mask_scores(const Masks& masks, int64_t first_row, int64_t count, int64_t padded,
                       float* scores, VecI& seen) {
  const Vec lowest = splat(-__builtin_inff());
  Vec largest = lowest;
  seen = splat_int(-1);
  if (masks.full && count == padded) {
    Vec more[4] = {lowest, lowest, lowest, lowest};  // a single one would wait for each comparison
    int64_t t = 0;
    for (; t + 4 <= count; t += 4) {
      for (int i = 0; i < 4; ++i) more[i] = max(more[i], load(scores + (t + i) * kLanes));
    }
    for (; t < count; ++t) largest = max(largest, load(scores + t * kLanes));
    return max(max(largest, more[0]), max(max(more[1], more[2]), more[3]));
  }
  seen = VecI{};
  const VecI row = lane_numbers() + splat_int(static_cast<int32_t>(first_row));
  for (int64_t t = 0; t < count; ++t) {
    const VecI visible = masks.visible(t, row);
    seen |= visible;
    const Vec score = visible ? load(scores + t * kLanes) : lowest;
    store(scores + t * kLanes, score);
    largest = max(largest, score);
  }
  for (int64_t t = count; t < padded; ++t) store(scores + t * kLanes, lowest);
  return largest;
}

/// Turns a column's scores into weights, and brings its maxima, sums and outputs up to date.
/// `which` of the columns worked on, `column` of the block. Returns whether this is the first thing
/// that the column sees: then its outputs hold nothing yet.
template <class Math>
inline bool online_softmax(Math& math, const Masks& masks, int64_t which, int64_t column,
                           int64_t count, const Scaling& scaling, const Partial& partial) {
  const int64_t padded = round_up(count, Math::kPadding);
  float* scores = math.scores + which * Math::kTileTokens * kLanes;
  if (scaling.capped) cap_scores(scaling, count, scores);
  VecI seen;
  const Vec found = mask_scores(masks, column * kLanes, count, padded, scores, seen);
  const Vec lowest = splat(-__builtin_inff());
  const Vec largest = seen ? max(splat(kLowestSeen), found * scaling.scale) : lowest;

  float* maximum = partial.maximum + column * kLanes;
  float* sum = partial.sum + column * kLanes;
  Vec shift = load(maximum), total = load(sum);
  const bool fresh = bits(shift > lowest) == 0;
  // True at the first score: the maximum starts at -infinity.
  const VecI rises = largest > shift + kSlack;
  if (bits(rises)) {
    const Vec raised = rises ? largest : shift;
    // 0 where nothing was seen before.
    const Vec factor = rises ? exp2(shift - raised) : splat(1.f);
    store(maximum, raised);
    total *= factor;
    float* out = partial.out + column * column_size(math.v_dim);
    for (int64_t d = 0; d < math.v_dim && !fresh; ++d) {
      store(out + d * kLanes, load(out + d * kLanes) * factor);
    }
    shift = raised;
  }
  shift = (shift == lowest) ? Vec{} : shift;
  store(sum, total + math.weigh(which, padded, scaling.scale, shift));
  return fresh;
}

/// Adds the values of a tile to a column's outputs token by token, each to the rows that see it.
template <class Math, class T>
inline void accumulate_seen(const Math& math, const AttentionTask& task, const Tile& tile,
                            const Masks& masks, int64_t head, int64_t which, int64_t column,
                            float* out) {
  const VecI row = lane_numbers() + splat_int(static_cast<int32_t>(column * kLanes));
  for (int64_t t = 0; t < tile.count; ++t) {
    const VecI visible = masks.visible(t, row);
    const Vec weight = math.weight(which, t);
    const auto* value = reinterpret_cast<const T*>(task.v + head * task.v_head_stride +
                                                   task.slot[tile.first + t] * task.v_stride);
    for (int64_t d = 0; d < task.v_dim; ++d) {
      const Vec so_far = load(out + d * kLanes);
      const Vec sum = so_far + weight * splat(as_float(value[d]));
      store(out + d * kLanes, visible ? sum : so_far);
    }
  }
}

/// Whether an output of a row is not a number although its weights are: a token's V may be to
/// blame that the row does not see, as 0 times NaN is NaN.
inline bool is_spoilt(const Partial& partial, int64_t columns, int64_t v_dim) {
  VecI spoilt{};
  for (int64_t column = 0; column < columns; ++column) {
    const Vec sum = load(partial.sum + column * kLanes);
    const Vec maximum = load(partial.maximum + column * kLanes);
    const VecI counts = (sum == sum) & (maximum > splat(-__builtin_inff()));
    if (bits(counts) == 0) continue;  // its outputs may hold nothing
    Vec zero{};
    const float* out = partial.out + column * column_size(v_dim);
    for (int64_t d = 0; d < v_dim; ++d) zero += load(out + d * kLanes) * 0.f;
    spoilt |= counts & (zero != zero);
  }
  return bits(spoilt) != 0;
}

/// Fills in the queries of one KV head and empties its partial result.
template <class Math, class T>
inline void start_head(Math& math, const AttentionTask& task, int64_t head,
                       const Partial& partial) {
  const int64_t rows = task.queries * task.group, columns = ceil_div(rows, kLanes);
  const float sign = task.scale > 0 ? 1.f : task.scale < 0 ? -1.f : task.scale * 0.f;
  for (int64_t column = 0; column < columns; ++column) {
    const T* row[kLanes] = {};
    int64_t count = 0;
    for (int64_t r = column * kLanes; r < rows && count < kLanes; ++r, ++count) {
      row[count] = reinterpret_cast<const T*>(
          task.q.at(task.first_query + r / task.group,
                    (task.first_head + head) * task.group + r % task.group));
    }
    math.set_queries(head * columns + column, row, count, sign);
  }
  for (int64_t r = 0; r < columns * kLanes; ++r) {
    partial.maximum[r] = -__builtin_inff();
    partial.sum[r] = 0;
  }
}

/// `kCareful`: no V of a token meets rows that do not see it.
template <class Math, class T, bool kCareful>
SAFFRON_INLINE void attend_tiles(const AttentionTask& task) {
  const int64_t rows = task.queries * task.group, columns = ceil_div(rows, kLanes);
  ScratchAllocator allocator{task.scratch};
  Math math(allocator, columns * task.heads, task.q.shape[2], task.v_dim);
  const auto partial_of = [&](int64_t head) {
    return Partial(task.partial + head * task.partial_stride, columns, task.v_dim);
  };
  for (int64_t head = 0; head < task.heads; ++head) {
    start_head<Math, T>(math, task, head, partial_of(head));
  }

  // The sign of the scale went to the queries: so a maximum of scores is one of scaled scores too.
  const float size = task.scale < 0 ? -task.scale : task.scale == 0 ? 1.f : task.scale;
  const Scaling scaling = {task.capped ? 1.f : kLog2E * size, task.capped, size / task.softcap,
                           task.softcap * kLog2E};
  for (int64_t i = 0; i < task.num_tiles; ++i) {
    const Tile& tile = task.tiles[i];
    const Masks masks{task.begin + tile.first, task.end + tile.first, tile.full};
    const int64_t pairs = ceil_div(tile.end_column - tile.first_column, 2);
    const Tile none{0, 0, 0, 0, true}, &next = i + 1 < task.num_tiles ? task.tiles[i + 1] : none;
    Prefetch ahead(task, next, sizeof(T));
    math.pace(ahead, tile.count, pairs * task.heads);
    for (int64_t head = 0; head < task.heads; ++head) {
      const Partial partial = partial_of(head);
      math.load_tile(task, tile, head, pairs > 1);
      for (int64_t c = tile.first_column; c < tile.end_column; c += 2) {
        const int wide = c + 1 < tile.end_column ? 2 : 1;
        math.score(head * columns + c, wide, tile.count, ahead);
        const int64_t size_of_column = column_size(task.v_dim);
        float* out = partial.out + c * size_of_column;
        bool fresh[2] = {true, true};
        for (int which = 0; which < wide; ++which) {
          fresh[which] =
              online_softmax(math, masks, which, c + which, tile.count, scaling, partial);
        }
        const bool by_token = kCareful && !tile.full;
        for (int which = 0; which < wide && (by_token || fresh[0] != fresh[1]); ++which) {
          if (fresh[which]) clear(out + which * size_of_column, size_of_column);
        }
        if (!by_token) {
          math.accumulate(out, wide, tile.count, fresh[0] && fresh[1], ahead);
          continue;
        }
        for (int which = 0; which < wide; ++which) {
          accumulate_seen<Math, T>(math, task, tile, masks, head, which, c + which,
                                   out + which * size_of_column);
        }
      }
    }
  }
}

// Two functions, so that the rare one takes nothing from what the compiler inlines into the other.
template <class Math, class T>
__attribute__((noinline)) void attend_fast(const AttentionTask& task) {
  attend_tiles<Math, T, false>(task);
}
template <class Math, class T>
__attribute__((noinline, cold)) void attend_careful(const AttentionTask& task) {
  attend_tiles<Math, T, true>(task);
}

template <class Math, class T>
inline void attend(const AttentionTask& task) {
  attend_fast<Math, T>(task);
  const int64_t columns = ceil_div(task.queries * task.group, kLanes);
  for (int64_t head = 0; head < task.heads; ++head) {
    AttentionTask one = task;
    one.k += head * task.k_head_stride;
    one.v += head * task.v_head_stride;
    one.first_head += head;
    one.heads = 1;
    one.partial += head * task.partial_stride;
    if (is_spoilt(Partial(one.partial, columns, task.v_dim), columns, task.v_dim)) {
      attend_careful<Math, T>(one);
    }
  }
}

}  // namespace saffron::cpu::SAFFRON_ISA
