#pragma once

#include <cstdint>
#include <vector>

#include "cpu/simd/kernels.h"
#include "cpu/tensor.h"

namespace saffron::cpu {

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

/// The tokens that any query sees; rows are queries here. Throws if one of them has no slot.
Tokens visible_tokens(const IntView& slot, const IntView& begin, const IntView& end, int64_t slots,
                      int64_t queries);

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

/// Ends of runs of tiles that take about the same time, at most `count` of them; one run at least.
std::vector<int64_t> split_evenly(const std::vector<Tile>& tiles, int64_t lanes, int64_t count);

}  // namespace saffron::cpu
