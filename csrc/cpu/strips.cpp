// Plans by runs of tokens that the same queries see: long ones cost nothing per token.

#include <algorithm>
#include <string>

#include "cpu/flat_trie.h"

namespace saffron::cpu {
namespace {

/// So few tokens of the same few rows are masked among others: taking up the rows costs as much.
constexpr int64_t kLeastTokens = 8;
/// Tokens that are looked at together.
constexpr int64_t kAtOnce = 32;

/// `kAtOnce` tokens that the same queries see, and that all have a slot.
bool alike(const int32_t* slot, const int32_t* begin, const int32_t* end, int64_t slots) {
  uint32_t differ = 0, largest = 0;
  for (int64_t i = 0; i < kAtOnce; ++i) {
    differ |= static_cast<uint32_t>((begin[i] ^ begin[0]) | (end[i] ^ end[0]));
    largest = std::max(largest, static_cast<uint32_t>(slot[i]));  // of a slot below 0: beyond all
  }
  return differ == 0 && largest < slots;
}

void check_slot(const IntView& slot, int64_t t, int64_t slots) {
  if (slot[t] >= 0 && slot[t] < slots) return;
  throw std::invalid_argument("slot: token " + std::to_string(t) + " has slot " +
                              std::to_string(slot[t]) + ", allowed are 0 to " +
                              std::to_string(slots - 1));
}

}  // namespace

std::vector<Run> visible_runs(const IntView& slot, const IntView& begin, const IntView& end,
                              int64_t slots, int64_t queries) {
  std::vector<Run> runs;
  const bool adjacent = slot.stride == 1 && begin.stride == 1 && end.stride == 1;
  const auto add = [&](int64_t t, int64_t count) {
    const int32_t first = std::max(begin[t], 0);
    const auto last = static_cast<int32_t>(std::min<int64_t>(end[t], queries));
    if (first >= last) return;
    if (!runs.empty() && runs.back().begin == first && runs.back().end == last &&
        runs.back().first + runs.back().count == t) {
      runs.back().count += count;
    } else {
      runs.push_back({t, count, first, last});
    }
  };
  for (int64_t t = 0; t < slot.size;) {
    if (begin[t] >= end[t]) {
      ++t;
    } else if (adjacent && t + kAtOnce <= slot.size &&
               alike(slot.data + t, begin.data + t, end.data + t, slots)) {
      add(t, kAtOnce);
      t += kAtOnce;
    } else {
      check_slot(slot, t, slots);
      add(t++, 1);
    }
  }
  return runs;
}

Strips cut_strips(const std::vector<Run>& runs, const int32_t* slot, const Block& block,
                  int64_t most_rows, Tokens& others) {
  std::vector<Run> narrow;  // with queries of the block
  const auto first_query = static_cast<int32_t>(block.first_query);
  const auto give = [&](const Run& run, int32_t begin, int32_t end) {
    for (int64_t t = run.first; t < run.first + run.count; ++t) others.push(slot[t], begin, end);
  };
  for (const Run& run : runs) {
    const int32_t begin = std::max(run.begin - first_query, 0);
    const auto end = static_cast<int32_t>(std::min<int64_t>(run.end - first_query, block.queries));
    if (begin >= end) continue;
    if ((end - begin) * block.group <= most_rows) {
      narrow.push_back({run.first, run.count, begin, end});
    } else {
      give(run, run.begin, run.end);
    }
  }
  std::stable_sort(narrow.begin(), narrow.end(), [](const Run& a, const Run& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
  });

  Strips result;
  int64_t short_tokens = 0;
  for (const Run& run : narrow) short_tokens += run.count < kStripTokens ? run.count : 0;
  result.gathered.reserve(static_cast<size_t>(short_tokens));  // strips point into it
  const auto add = [&](const int32_t* slots, int64_t count, const Run& like) {
    result.tokens += count;
    for (int64_t t = 0; t < count; t += kStripTokens) {
      result.strips.push_back({slots + t, std::min(kStripTokens, count - t),
                               like.begin * block.group, (like.end - like.begin) * block.group});
    }
  };
  for (size_t i = 0, next; i < narrow.size(); i = next) {
    int64_t count = 0;
    for (next = i; next < narrow.size() && narrow[next].begin == narrow[i].begin &&
                   narrow[next].end == narrow[i].end;
         ++next) {
      count += narrow[next].count;
    }
    const auto held = static_cast<int64_t>(result.gathered.size());
    for (size_t j = i; j < next; ++j) {
      const int32_t* slots = slot + narrow[j].first;
      if (count < kLeastTokens) {
        give(narrow[j], narrow[j].begin + first_query, narrow[j].end + first_query);
      } else if (narrow[j].count < kStripTokens) {
        result.gathered.insert(result.gathered.end(), slots, slots + narrow[j].count);
      } else {
        add(slots, narrow[j].count, narrow[i]);
      }
    }
    add(result.gathered.data() + held, static_cast<int64_t>(result.gathered.size()) - held,
        narrow[i]);
  }
  return result;
}

std::vector<int64_t> split_evenly(const Strips& strips, int64_t count) {
  int64_t done = 0;
  std::vector<int64_t> ends;
  for (size_t i = 0; i < strips.strips.size(); ++i) {
    done += strips.strips[i].count;
    const auto made = static_cast<int64_t>(ends.size());
    if (done * count >= strips.tokens * (made + 1)) ends.push_back(static_cast<int64_t>(i) + 1);
  }
  return ends;
}

}  // namespace saffron::cpu
