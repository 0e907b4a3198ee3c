#include "cpu/flat_trie.h"

#include <algorithm>
#include <string>

namespace saffron::cpu {
namespace {

/// Stable counting sort of `order` by key(token), a number in 0 .. keys - 1.
template <class F>
std::vector<int32_t> sorted_by(const std::vector<int32_t>& order, int64_t keys, F&& key) {
  std::vector<int32_t> at(static_cast<size_t>(keys + 1), 0), result(order.size());
  for (const int32_t t : order) ++at[static_cast<size_t>(key(t) + 1)];
  for (size_t i = 1; i < at.size(); ++i) at[i] += at[i - 1];
  for (const int32_t t : order) result[static_cast<size_t>(at[static_cast<size_t>(key(t))]++)] = t;
  return result;
}

/// Depth first: by begin, and among those that begin together the widest first. A search appends
/// its tokens level by level; only in this order do the tokens of one beam share a tile.
void sort_depth_first(FlatTrie& trie, int64_t queries) {
  const auto count = static_cast<int32_t>(trie.slot.size());
  auto before = [&](int32_t a, int32_t b) {
    return trie.begin[a] != trie.begin[b] ? trie.begin[a] < trie.begin[b]
                                          : trie.end[a] > trie.end[b];
  };
  int32_t t = 1;
  while (t < count && !before(t, t - 1)) ++t;
  if (t >= count) return;
  std::vector<int32_t> order(static_cast<size_t>(count));
  for (int32_t i = 0; i < count; ++i) order[static_cast<size_t>(i)] = i;
  order = sorted_by(order, queries + 1, [&](int32_t i) { return queries - trie.end[i]; });
  order = sorted_by(order, queries + 1, [&](int32_t i) { return trie.begin[i]; });
  for (std::vector<int32_t>* column : {&trie.slot, &trie.begin, &trie.end}) {
    std::vector<int32_t> moved(column->size());
    for (size_t i = 0; i < moved.size(); ++i) moved[i] = (*column)[static_cast<size_t>(order[i])];
    *column = std::move(moved);
  }
}

/// Cuts where a token would make the tile work for many rows that only some of its tokens need.
void cut(FlatTrie& trie, int64_t group, int64_t tile_tokens) {
  constexpr int64_t lanes = 16;
  const auto count = static_cast<int64_t>(trie.slot.size());
  auto vectors = [&](int64_t queries) { return (queries * group + lanes - 1) / lanes; };
  for (int64_t t = 0; t < count; ++t) {
    const int32_t begin = trie.begin[t], end = trie.end[t];
    bool fits = false;
    if (!trie.tiles.empty() && trie.tiles.back().count < tile_tokens) {
      const Tile& tile = trie.tiles.back();
      const int64_t joined = vectors(std::max(end, tile.end) - std::min(begin, tile.begin));
      const int64_t apart = std::min(vectors(tile.end - tile.begin), vectors(end - begin));
      fits = joined <= 2 * apart;
    }
    if (fits) {
      Tile& tile = trie.tiles.back();
      ++tile.count;
      tile.begin = std::min(tile.begin, begin);
      tile.end = std::max(tile.end, end);
    } else {
      trie.tiles.push_back({t, 1, begin, end});
    }
  }
}

}  // namespace

FlatTrie flatten(const IntView& slot, const IntView& begin, const IntView& end, int64_t slots,
                 int64_t queries, int64_t group, int64_t tile_tokens) {
  FlatTrie trie;
  for (std::vector<int32_t>* column : {&trie.slot, &trie.begin, &trie.end}) {
    column->reserve(static_cast<size_t>(slot.size));
  }
  for (int64_t t = 0; t < slot.size; ++t) {
    if (begin[t] >= end[t]) continue;
    if (slot[t] < 0 || slot[t] >= slots) {
      throw std::invalid_argument("slot: token " + std::to_string(t) + " has slot " +
                                  std::to_string(slot[t]) + ", allowed are 0 to " +
                                  std::to_string(slots - 1));
    }
    const auto first = static_cast<int32_t>(std::max(begin[t], 0));
    const auto last = static_cast<int32_t>(std::min<int64_t>(end[t], queries));
    if (first >= last) continue;
    trie.slot.push_back(slot[t]);
    trie.begin.push_back(first);
    trie.end.push_back(last);
  }
  sort_depth_first(trie, queries);
  cut(trie, group, tile_tokens);
  return trie;
}

std::vector<int64_t> split_evenly(const std::vector<Tile>& tiles, int64_t group, int64_t count) {
  // Loading a token costs about as much as 32 rows' products with it.
  auto cost = [&](const Tile& tile) { return tile.count * ((tile.end - tile.begin) * group + 32); };
  int64_t total = 0, done = 0;
  for (const Tile& tile : tiles) total += cost(tile);
  std::vector<int64_t> ends;
  for (size_t i = 0; i < tiles.size(); ++i) {
    done += cost(tiles[i]);
    const auto made = static_cast<int64_t>(ends.size());
    if (done * count >= total * (made + 1)) ends.push_back(static_cast<int64_t>(i) + 1);
  }
  if (ends.empty()) ends.push_back(0);  // no tokens at all: one empty run
  return ends;
}

}  // namespace saffron::cpu
