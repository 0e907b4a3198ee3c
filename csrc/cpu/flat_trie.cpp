#include "cpu/flat_trie.h"

#include <algorithm>

namespace saffron::cpu {
namespace {

// Tiles are worked on in steps of so many tokens: what is beyond a multiple of it costs a whole
// step.
constexpr int64_t kStep = 32;
// Two columns are worked on at once. So few tokens that only one of them sees are masked instead of
// having tiles of their own.
constexpr int64_t kMasked = 64;

/// A segment tree over the columns of a block. Every token goes to the fewest nodes whose rows all
/// see it, and to single columns where only some rows do. A node's tokens make its tiles; what does
/// not fill a step goes down to the children, to fill up theirs.
class ColumnTree {
 public:
  ColumnTree(const Tokens& visible, const Block& block, int64_t tile_tokens, FlatBlock& result)
      : visible_(visible), block_(block), tile_tokens_(tile_tokens), result_(result) {
    const int64_t columns = (block.rows() + block.lanes - 1) / block.lanes;
    int64_t leaves = 1;
    while (leaves < columns) leaves *= 2;
    nodes_.resize(static_cast<size_t>(2 * leaves));
    for (int64_t t = 0; t < visible.size(); ++t) {
      const auto token = static_cast<int32_t>(t);
      if (first_row(token) < end_row(token)) place(token, 1, 0, columns);
    }
    emit(1, 0, columns, {});
  }

 private:
  struct Node {
    std::vector<int32_t> tokens;
    bool more = false;  // below
  };

  int64_t first_row(int32_t t) const {
    return std::max<int64_t>(visible_.begin[t] - block_.first_query, 0) * block_.group;
  }
  int64_t end_row(int32_t t) const {
    return std::min(visible_.end[t] - block_.first_query, block_.queries) * block_.group;
  }
  /// All rows of these columns see token t.
  bool covers(int32_t t, int64_t first, int64_t end) const {
    return first_row(t) <= first * block_.lanes &&
           end_row(t) >= std::min(end * block_.lanes, block_.rows());
  }

  void place(int32_t t, size_t node, int64_t first, int64_t end) {
    if (end - first == 1 || covers(t, first, end)) {
      nodes_[node].tokens.push_back(t);
      return;
    }
    nodes_[node].more = true;
    const int64_t middle = (first + end + 1) / 2;
    if (first_row(t) < middle * block_.lanes) place(t, 2 * node, first, middle);
    if (end_row(t) > middle * block_.lanes) place(t, 2 * node + 1, middle, end);
  }

  void collect_below(size_t node, std::vector<int32_t>& tokens) const {
    if (!nodes_[node].more) return;
    for (const size_t child : {2 * node, 2 * node + 1}) {
      tokens.insert(tokens.end(), nodes_[child].tokens.begin(), nodes_[child].tokens.end());
      collect_below(child, tokens);
    }
  }

  void emit(size_t node, int64_t first, int64_t end, const std::vector<int32_t>& inherited) {
    std::vector<int32_t> tokens = inherited;
    tokens.insert(tokens.end(), nodes_[node].tokens.begin(), nodes_[node].tokens.end());
    const auto own = static_cast<int64_t>(tokens.size());
    bool divide = nodes_[node].more;
    if (divide) {
      std::vector<int32_t> below;
      collect_below(node, below);
      std::sort(below.begin(), below.end());
      below.erase(std::unique(below.begin(), below.end()), below.end());
      const auto count = static_cast<int64_t>(below.size());
      if (own % kStep + count <= kStep || (end - first <= 2 && count <= kMasked)) {
        tokens.insert(tokens.end(), below.begin(), below.end());
        divide = false;
      }
    }
    const auto keep = static_cast<int64_t>(tokens.size()) - (divide ? own % kStep : 0);
    for (int64_t i = 0; i < keep; i += tile_tokens_) {
      add_tile(&tokens[static_cast<size_t>(i)], std::min(tile_tokens_, keep - i), first, end);
    }
    if (!divide) return;
    tokens.erase(tokens.begin(), tokens.begin() + keep);
    const int64_t middle = (first + end + 1) / 2;
    emit(2 * node, first, middle, tokens);
    emit(2 * node + 1, middle, end, tokens);
  }

  void add_tile(const int32_t* tokens, int64_t count, int64_t first, int64_t end) {
    Tile tile{result_.tokens.size(), count, first, end, true};
    for (int64_t i = 0; i < count; ++i) {
      const int32_t t = tokens[i];
      result_.tokens.push(visible_.slot[t], static_cast<int32_t>(first_row(t)),
                          static_cast<int32_t>(end_row(t)));
      tile.full &= covers(t, first, end);
    }
    result_.tiles.push_back(tile);
  }

  const Tokens& visible_;
  const Block& block_;
  int64_t tile_tokens_;
  FlatBlock& result_;
  std::vector<Node> nodes_;  // the children of node i are 2 i and 2 i + 1
};

}  // namespace

FlatBlock flatten(const Tokens& visible, const Block& block, int64_t tile_tokens) {
  FlatBlock result;
  ColumnTree(visible, block, tile_tokens, result);
  return result;
}

std::vector<int64_t> split_evenly(const std::vector<Tile>& tiles, int64_t lanes, int64_t count) {
  // Loading a token costs about as much as 32 rows' products with it.
  auto cost = [&](const Tile& tile) {
    return tile.count * ((tile.end_column - tile.first_column) * lanes + 32);
  };
  int64_t total = 0, done = 0;
  for (const Tile& tile : tiles) total += cost(tile);
  std::vector<int64_t> ends;
  for (size_t i = 0; i < tiles.size(); ++i) {
    done += cost(tiles[i]);
    const auto made = static_cast<int64_t>(ends.size());
    if (done * count >= total * (made + 1)) ends.push_back(static_cast<int64_t>(i) + 1);
  }
  return ends;
}

}  // namespace saffron::cpu
