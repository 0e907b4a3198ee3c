#pragma once

#include <cstdint>
#include <vector>

#include "cpu/simd/kernels.h"
#include "cpu/tensor.h"

namespace saffron::cpu {

/// Tokens of a plan that the same queries see, `begin .. end - 1`, and that stand side by side.
struct Run {
  int64_t first, count;
  int32_t begin, end;
};

/// The runs that any query sees, cut to the queries there are. Throws if a token that is seen has
/// no slot.
std::vector<Run> visible_runs(const IntView& slot, const IntView& begin, const IntView& end,
                              int64_t slots, int64_t queries);

/// Tokens of a plan. Which rows see token i: `begin[i] .. end[i] - 1`.
struct Tokens {
  std::vector<int32_t> slot, begin, end;

  int64_t size() const { return static_cast<int64_t>(slot.size()); }
  void push(int32_t s, int32_t b, int32_t e) {
    slot.push_back(s);
    begin.push_back(b);
    end.push_back(e);
  }
};

/// Consecutive queries: each has `group` rows, one per query head, and rows come in columns of
/// `lanes`.
struct Block {
  int64_t first_query, queries, group, lanes;

  int64_t rows() const { return queries * group; }
};

/// What a block sees, cut into tiles of at most `tile_tokens`. A token that several tiles need
/// stands in each of them.
struct FlatBlock {
  Tokens tokens;  // rows of the block
  std::vector<Tile> tiles;
};
FlatBlock flatten(const Tokens& visible, const Block& block, int64_t tile_tokens);

/// Ends of runs of tiles that take about the same time, at most `count` of them; none if there are
/// no tiles.
std::vector<int64_t> split_evenly(const std::vector<Tile>& tiles, int64_t lanes, int64_t count);

/// What few rows of a block see, as strips in the order of their rows.
struct Strips {
  std::vector<int32_t> gathered;  // slots of tokens that do not stand side by side
  std::vector<Strip> strips;
  int64_t tokens = 0;
};

/// The strips of a block, for tokens that at most `most_rows` rows see; `others` takes those that
/// make no strip. `slot` is that of the plan and has to stay where it is.
Strips cut_strips(const std::vector<Run>& runs, const int32_t* slot, const Block& block,
                  int64_t most_rows, Tokens& others);

/// Ends of runs of strips, as of tiles.
std::vector<int64_t> split_evenly(const Strips& strips, int64_t count);

}  // namespace saffron::cpu
