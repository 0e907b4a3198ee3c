#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace saffron {

/// The set of free slots: insert and take-the-lowest in O(log64 capacity).
///
/// The lowest first, because then a chain of tokens gets consecutive slots wherever that is
/// possible (matching and planning run through memory in order), and because the choice depends on
/// the set alone, not on its history.
///
/// A bit is set in level 0 for a free slot, and in each further level for a word of the level below
/// that is not zero.
class FreeSlots {
 public:
  int64_t size() const { return size_; }

  /// Makes room for slots below `capacity`; the new ones are not free until they are inserted.
  void grow(int64_t capacity) {
    int64_t bits = capacity;
    for (size_t level = 0; level == 0 || bits > 1; ++level) {
      if (level == levels_.size()) levels_.emplace_back();
      const size_t words = static_cast<size_t>((bits + 63) / 64);
      // A level that is new, above one that was the highest, has to count what stands there
      // already.
      const bool is_new = levels_[level].empty();
      levels_[level].resize(words, 0);
      if (is_new && level > 0 && !levels_[level - 1].empty() && levels_[level - 1][0]) {
        levels_[level][0] = 1;
      }
      bits = static_cast<int64_t>(words);
    }
  }

  void insert(int32_t slot) {
    ++size_;
    uint32_t index = static_cast<uint32_t>(slot);
    for (auto& level : levels_) {
      uint64_t& word = level[index / 64];
      const bool was_empty = word == 0;
      word |= uint64_t{1} << (index % 64);
      if (!was_empty) return;
      index /= 64;
    }
  }

  /// Removes and returns the lowest free slot; there has to be one.
  int32_t take() {
    --size_;
    uint32_t index = 0;
    for (size_t level = levels_.size(); level-- > 0;) {
      index = index * 64 + static_cast<uint32_t>(__builtin_ctzll(levels_[level][index]));
    }
    const int32_t slot = static_cast<int32_t>(index);
    for (auto& level : levels_) {
      uint64_t& word = level[index / 64];
      word &= ~(uint64_t{1} << (index % 64));
      if (word) break;
      index /= 64;
    }
    return slot;
  }

 private:
  int64_t size_ = 0;
  std::vector<std::vector<uint64_t>> levels_;
};

}  // namespace saffron
