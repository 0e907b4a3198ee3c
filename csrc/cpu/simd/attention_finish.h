#pragma once

// Partial results of attention, joined: those of tiles, with rows along the lanes, and those of
// strips, with the head size along them.

#include "cpu/simd/attention.h"
#include "cpu/simd/attention_strips.h"

namespace saffron::cpu::SAFFRON_ISA {

/// The partial results that hold any of the rows of one column.
struct ColumnParts {
  struct Part {
    const float* out;  // of tiles: of the column; of strips: of the column's first row
    Vec maximum, sum;  // -infinity for a row that saw nothing
    Vec weight;
  };
  Part tiles[kMaxPartials], strips[kMaxPartials];
  int64_t num_tiles = 0, num_strips = 0;

  ColumnParts(const FinishTask& task, int64_t row, int64_t filled) {
    const int64_t v_dim = task.out.shape[2], rows = task.queries * task.group;
    const int64_t columns = ceil_div(rows, kLanes), size = partial_size(rows, v_dim);
    for (int64_t i = 0; i < task.num_partials; ++i) {
      const Partial part(const_cast<float*>(task.partials) + i * size, columns, v_dim);
      const Vec maximum = load(part.maximum + row);
      if (bits(maximum > splat(-__builtin_inff())) == 0) continue;
      const float* out = part.out + row / kLanes * column_size(v_dim);
      tiles[num_tiles++] = {out, maximum, load(part.sum + row), Vec{}};
    }
    for (int64_t i = 0; i < task.num_strips; ++i) {
      const StripRows& of = task.strips[i];
      const int64_t first = row > of.first ? row : of.first;
      const int64_t end = row + filled < of.first + of.count ? row + filled : of.first + of.count;
      if (first >= end) continue;
      const StripPartial part(const_cast<float*>(task.strip_partials) + of.offset, of.count, v_dim);
      Vec maximum = splat(-__builtin_inff()), sum{};
      for (int64_t r = first; r < end; ++r) {
        maximum[r - row] = part.maximum[r - of.first];
        sum[r - row] = part.sum[r - of.first];
      }
      strips[num_strips++] = {part.out + (row - of.first) * v_dim, maximum, sum, Vec{}};
    }
  }

  template <class F>
  SAFFRON_INLINE void each(F&& f) {
    for (int64_t i = 0; i < num_tiles; ++i) f(tiles[i]);
    for (int64_t i = 0; i < num_strips; ++i) f(strips[i]);
  }

  /// Elements `d ..` of the column's rows.
  SAFFRON_INLINE void outputs(int64_t d, int64_t wide, int64_t filled, int64_t v_dim, VecI seen,
                              Vec (&block)[kLanes]) const {
    for (Vec& row : block) row = Vec{};
    for (int64_t i = 0; i < num_tiles; ++i) {
      const float* out = tiles[i].out + d * kLanes;
      for (int64_t j = 0; j < wide; ++j) block[j] += load(out + j * kLanes) * tiles[i].weight;
    }
    for (Vec& lanes : block) lanes = seen ? lanes : Vec{};
    if (num_tiles > 0) transpose<1>(block);
    for (int64_t i = 0; i < num_strips; ++i) {
      for (int64_t r = 0; r < filled; ++r) {
        if (strips[i].maximum[r] == -__builtin_inff()) continue;
        block[r] += load(strips[i].out + r * v_dim + d) * strips[i].weight[r];
      }
    }
  }
};

/// Joins partial results and writes them out as [query, head, v_dim].
template <class T>
inline void finish(const FinishTask& task) {
  const int64_t v_dim = task.out.shape[2], rows = task.queries * task.group;
  const int64_t heads = task.out.shape[1];
  const Vec lowest = splat(-__builtin_inff());
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t filled = rows - row < kLanes ? rows - row : kLanes;
    ColumnParts parts(task, row, filled);
    Vec maximum = lowest, sink = lowest, sum{};
    parts.each([&](const ColumnParts::Part& part) { maximum = max(maximum, part.maximum); });
    for (int64_t r = 0; r < filled && task.sinks != nullptr; ++r) {
      sink[r] = task.sinks[task.first_head + (row + r) % task.group] * kLog2E;
    }
    const Vec largest = task.sinks != nullptr ? max(sink, maximum) : maximum;  // NaN if the sink is
    sum += (sink == lowest) ? Vec{} : exp2(sink - largest);
    parts.each([&](ColumnParts::Part& part) {
      part.weight = (part.maximum == lowest) ? Vec{} : exp2(part.maximum - largest);
      sum += (part.maximum == lowest) ? Vec{} : part.sum * part.weight;
    });
    const VecI seen = maximum > lowest;
    const Vec inverse = 1.f / sum;  // of 0 where all scores that are seen are -infinity: NaN
    parts.each([&](ColumnParts::Part& part) { part.weight *= inverse; });

    T* to[kLanes];
    for (int64_t r = 0; r < filled; ++r) {
      const int64_t query = task.first_query + (row + r) / task.group;
      const int64_t head = task.first_head + (row + r) % task.group;
      to[r] = reinterpret_cast<T*>(task.out.data) + (query * heads + head) * v_dim;
      task.lse[query * heads + head] =
          largest[r] * 0.69314718055994531f + __builtin_logf(sum[r]);  // log 0 is -infinity
    }
    for (int64_t d = 0; d < v_dim; d += kLanes) {
      Vec block[kLanes];
      const int64_t wide = v_dim - d < kLanes ? v_dim - d : kLanes;
      parts.outputs(d, wide, filled, v_dim, seen, block);
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
