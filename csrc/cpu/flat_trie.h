#pragma once

#include <cstdint>
#include <vector>

#include "cpu/simd/kernels.h"
#include "cpu/tensor.h"

namespace saffron::cpu {

/// The tokens that queries see, in an order that puts together what the same queries see, and cut
/// into tiles.
struct FlatTrie {
  std::vector<int32_t> slot, begin, end;
  std::vector<Tile> tiles;
};

/// Throws if a token that a query sees has no slot.
///
/// Args:
///   group: query heads a KV head, that is, rows a query.
///   tile_tokens: most tokens of a tile.
FlatTrie flatten(const IntView& slot, const IntView& begin, const IntView& end, int64_t slots,
                 int64_t queries, int64_t group, int64_t tile_tokens);

/// Ends of runs of tiles that take about the same time, at most `count` of them.
std::vector<int64_t> split_evenly(const std::vector<Tile>& tiles, int64_t group, int64_t count);

}  // namespace saffron::cpu
