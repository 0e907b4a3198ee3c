#pragma once

// Attention of one block of rows over a run of tiles, with the rows along the lanes: scores stand
// as [token, row] and outputs as [head_dim, row], so that the softmax needs no operation across
// lanes, and K and V enter both products as they lie in the cache. Rows come in panels of two
// vectors, small enough for a panel's queries, scores and outputs to stay in the first-level cache.
//
// `Math` supplies the two matrix products: FloatMath in attention_float.h, AmxMath in
// attention_amx.h.

#include "cpu/simd/kernels.h"
#include "cpu/simd/vec.h"

namespace saffron::cpu::SAFFRON_ISA {

constexpr int64_t kPanel = 2 * kLanes;
constexpr float kLog2E = 1.4426950408889634f;
// Outputs are rescaled only when a score exceeds the running maximum by this many powers of two:
// exponentials stay below 2^8, far from overflow, and most tiles rescale nothing.
constexpr float kSlack = 8.f;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/// Hands out parts of a buffer; with no buffer it only counts.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
};

/// A partial result: outputs [panel, head_dim, kPanel], then maxima and sums [panel, kPanel].
struct Partial {
  float *out, *maximum, *sum;
  Partial(float* base, int64_t panels, int64_t head_dim)
      : out(base), maximum(base + panels * head_dim * kPanel), sum(maximum + panels * kPanel) {}
};

inline int64_t partial_size(int64_t rows, int64_t head_dim) {
  return ceil_div(rows, kPanel) * kPanel * (head_dim + 2);
}

/// Walks over the K and V rows of the next tile and brings them into the second-level cache, line
/// by line between the multiplications of this one: a processor waits when it asks for many at
/// once.
class Prefetch {
 public:
  Prefetch(const AttentionTask& task, const Tile& tile, int64_t row_bytes)
      : task_(task),
        slot_(task.slot + tile.first),
        count_(tile.count),
        lines_(ceil_div(row_bytes, 64)) {
    start_row();
  }

  int64_t lines() const { return 2 * count_ * lines_; }
  bool active() const { return row_ < 2 * count_; }
  /// Harmless after the last line.
  void next() {
    __builtin_prefetch(at_, 0, 2);
    at_ += step_;
    if (--left_ == 0) {
      ++row_;
      start_row();
    }
  }
  void next(int64_t lines) {
    for (int64_t i = 0; i < lines && active(); ++i) next();
  }

 private:
  void start_row() {
    if (!active()) {
      step_ = 0;
      left_ = INT64_MAX;
      return;
    }
    const bool key = row_ < count_;
    const int64_t slot = slot_[key ? row_ : row_ - count_];
    at_ = key ? task_.k + slot * task_.row_stride : task_.v + slot * task_.v_row_stride;
    left_ = lines_;
  }

  const AttentionTask& task_;
  const int32_t* slot_;
  int64_t count_, lines_, row_ = 0, left_ = 0, step_ = 64;
  const char* at_ = nullptr;
};

/// What tile and rows have to do with each other.
struct Masks {
  const int32_t *begin, *end;  // of the tile's tokens
  int64_t first_query, queries, group;
  bool full;  // every token is seen by every row in question

  /// Lanes of token `t` among rows `row .. row + kLanes - 1` that see it.
  VecI visible(int64_t t, VecI row) const {
    const int64_t b = clamp(begin[t]) * group, e = clamp(end[t]) * group;
    return (row >= splat_int(static_cast<int32_t>(b))) & (row < splat_int(static_cast<int32_t>(e)));
  }
  int64_t clamp(int64_t query) const {
    query -= first_query;
    return query < 0 ? 0 : query > queries ? queries : query;
  }
};

/// Turns one vector of rows' scores into weights, and brings their maxima, sums and outputs up to
/// date. `scale` is positive.
template <class Math>
inline void soften(Math& math, const Masks& masks, int64_t panel, int vec, int64_t count,
                   float scale, Partial& partial, Prefetch& ahead) {
  float* scores = math.scores + vec * kLanes;
  const Vec lowest = splat(-__builtin_inff());
  Vec largest = lowest, other = lowest;
  if (masks.full) {
    int64_t t = 0;
    for (; t + 2 <= count; t += 2) {
      largest = max(largest, load(scores + t * kPanel));
      other = max(other, load(scores + (t + 1) * kPanel));
    }
    if (t < count) largest = max(largest, load(scores + t * kPanel));
  } else {
    const VecI row =
        lane_numbers() + splat_int(static_cast<int32_t>(panel * kPanel + vec * kLanes));
    for (int64_t t = 0; t < count; ++t) {
      const Vec score = masks.visible(t, row) ? load(scores + t * kPanel) : lowest;
      store(scores + t * kPanel, score);
      largest = max(largest, score);
    }
  }
  largest = max(largest, other) * scale;

  float* maximum = partial.maximum + panel * kPanel + vec * kLanes;
  float* sum = partial.sum + panel * kPanel + vec * kLanes;
  Vec shift = load(maximum), total = load(sum);
  const VecI rises =
      largest > shift + kSlack;  // true at the first score: the maximum starts at -inf
  if (bits(rises)) {
    const Vec raised = rises ? largest : shift;
    const Vec factor =
        rises ? exp2(shift - raised) : splat(1.f);  // 0 where nothing was seen before
    store(maximum, raised);
    total *= factor;
    float* out = partial.out + panel * math.head_dim * kPanel + vec * kLanes;
    for (int64_t d = 0; d < math.head_dim; ++d) {
      store(out + d * kPanel, load(out + d * kPanel) * factor);
    }
    shift = raised;
  }
  shift = (shift == lowest) ? Vec{} : shift;

  Vec rest{};
  int64_t t = 0;
  for (; t + 2 <= count; t += 2) {
    const Vec a = math.weight(load(scores + t * kPanel) * scale - shift);
    const Vec b = math.weight(load(scores + (t + 1) * kPanel) * scale - shift);
    total += a;
    rest += b;
    math.set_weight_pair(t, vec, a, b);
    math.between_weights(ahead);
  }
  if (t < count) {
    const Vec a = math.weight(load(scores + t * kPanel) * scale - shift);
    total += a;
    math.set_last_weight(t, vec, a);
  }
  store(sum, total + rest);
}

template <class Math, class T>
inline void attend(const AttentionTask& task) {
  const int64_t head_dim = task.q.shape[2], rows = task.queries * task.group;
  const int64_t panels = ceil_div(rows, kPanel);
  Carver carver{task.scratch};
  Math math(carver, panels, head_dim);
  Partial partial(task.partial, panels, head_dim);

  // The sign of the scale goes to the queries: so a maximum of scores is one of scaled scores too.
  const float sign = task.scale > 0 ? 1.f : task.scale < 0 ? -1.f : task.scale * 0.f;
  const float scale = kLog2E * (sign == 0 ? 1.f : task.scale * sign);
  for (int64_t first = 0; first < panels * kPanel; first += kLanes) {
    const T* row[kLanes] = {};
    int64_t count = 0;
    for (int64_t r = first; r < rows && count < kLanes; ++r, ++count) {
      row[count] = reinterpret_cast<const T*>(
          task.q.at(task.first_query + r / task.group, task.first_head + r % task.group));
    }
    math.set_queries(first / kPanel, static_cast<int>(first % kPanel / kLanes), row,
                     task.q.stride[2], count, sign);
  }
  std::memset(partial.out, 0, static_cast<size_t>(panels * head_dim * kPanel) * sizeof(float));
  for (int64_t r = 0; r < panels * kPanel; ++r) {
    partial.maximum[r] = -__builtin_inff();
    partial.sum[r] = 0;
  }

  const int64_t row_bytes = head_dim * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < task.num_tiles; ++i) {
    const Tile& tile = task.tiles[i];
    Masks masks{task.begin + tile.first,
                task.end + tile.first,
                task.first_query,
                task.queries,
                task.group,
                true};
    const int64_t begin = masks.clamp(tile.begin) * task.group;
    const int64_t end = masks.clamp(tile.end) * task.group;
    if (begin >= end) continue;
    for (int64_t t = 0; t < tile.count; ++t) {
      masks.full &= masks.clamp(masks.begin[t]) * task.group <= begin &&
                    masks.clamp(masks.end[t]) * task.group >= end;
    }
    // Rows beside the tile's own, in the same vectors, must not see its tokens either.
    masks.full &= begin % kLanes == 0 && (end % kLanes == 0 || end == rows);

    const int64_t first_panel = begin / kPanel, last_panel = ceil_div(end, kPanel);
    math.load_tile(task, tile, last_panel - first_panel > 1);
    const Tile none{0, 0, 0, 0}, &next = i + 1 < task.num_tiles ? task.tiles[i + 1] : none;
    Prefetch ahead(task, next, row_bytes);
    math.pace(ahead, last_panel - first_panel);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      const int64_t first_row = panel * kPanel;
      const int first_vec = begin >= first_row + kLanes ? 1 : 0;
      const int vecs = (end > first_row + kLanes ? 2 : 1) - first_vec;
      math.score(panel, first_vec, vecs, tile.count, ahead);
      for (int vec = first_vec; vec < first_vec + vecs; ++vec) {
        soften(math, masks, panel, vec, tile.count, scale, partial, ahead);
      }
      math.accumulate(partial.out + panel * head_dim * kPanel, first_vec, vecs, tile.count, ahead);
    }
  }
}

/// Joins partial results and writes them out as [query, head, head_dim].
template <class T>
inline void finish(const FinishTask& task) {
  const int64_t head_dim = task.out.shape[2], rows = task.queries * task.group;
  const int64_t heads = task.out.shape[1], panels = ceil_div(rows, kPanel);
  const int64_t size = partial_size(rows, head_dim);
  auto part = [&](int64_t i) {
    return Partial(const_cast<float*>(task.partials) + i * size, panels, head_dim);
  };
  const Vec lowest = splat(-__builtin_inff());
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t at = row, panel = row / kPanel, lane = row % kPanel;
    Vec maximum = lowest, sum{};
    for (int64_t i = 0; i < task.num_partials; ++i)
      maximum = max(maximum, load(part(i).maximum + at));
    Vec weight[kMaxPartials];
    for (int64_t i = 0; i < task.num_partials; ++i) {
      const Vec own = load(part(i).maximum + at);
      weight[i] = (own == lowest) ? Vec{} : exp2(own - maximum);
      sum += load(part(i).sum + at) * weight[i];
    }
    const Vec inverse = (sum == Vec{}) ? Vec{} : 1.f / sum;
    for (int64_t i = 0; i < task.num_partials; ++i) weight[i] *= inverse;

    const int64_t filled = rows - row < kLanes ? rows - row : kLanes;
    T* to[kLanes];
    for (int64_t r = 0; r < filled; ++r) {
      const int64_t query = task.first_query + (row + r) / task.group;
      const int64_t head = task.first_head + (row + r) % task.group;
      to[r] = reinterpret_cast<T*>(task.out.data) + (query * heads + head) * head_dim;
      task.lse[query * heads + head] =
          maximum[r] * 0.69314718055994531f + __builtin_logf(sum[r]);  // log 0 is -infinity
    }
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      Vec block[kLanes];
      const int64_t wide = head_dim - d < kLanes ? head_dim - d : kLanes;
      for (int64_t j = 0; j < kLanes; ++j) {
        block[j] = Vec{};
        for (int64_t i = 0; j < wide && i < task.num_partials; ++i) {
          block[j] += load(part(i).out + (panel * head_dim + d + j) * kPanel + lane) * weight[i];
        }
      }
      transpose<1>(block);
      for (int64_t r = 0; r < filled; ++r) {
        if (wide == kLanes) {
          store(to[r] + d, block[r]);
        } else {
          T row_part[kLanes];
          store(row_part, block[r]);
          for (int64_t j = 0; j < wide; ++j) to[r][d + j] = row_part[j];
        }
      }
    }
  }
}

}  // namespace saffron::cpu::SAFFRON_ISA
