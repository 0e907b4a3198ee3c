#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cpu/ops.h"
#include "cpu/simd/kernels.h"

namespace saffron::cpu {
namespace {

struct Chosen {
  int32_t row;
  uint32_t reward;  // descending_key()
  int64_t candidate;

  bool operator<(const Chosen& other) const {
    if (row != other.row) return row < other.row;
    if (reward != other.reward) return reward < other.reward;
    return candidate < other.candidate;
  }
};

}  // namespace

std::vector<int32_t> rows_of(const IntView& offsets, int64_t count) {
  const int64_t rows = offsets.size - 1;
  bool valid = offsets[0] == 0 && offsets[rows] == count;
  for (int64_t r = 0; r < rows; ++r) valid = valid && offsets[r] <= offsets[r + 1];
  if (!valid) {
    throw std::invalid_argument("offsets: must ascend from 0 to the number of candidates, " +
                                std::to_string(count));
  }
  std::vector<int32_t> row(static_cast<size_t>(count));
  for (int64_t r = 0; r < rows; ++r) {
    std::fill(row.begin() + offsets[r], row.begin() + offsets[r + 1], static_cast<int32_t>(r));
  }
  return row;
}

void check_widths(const Widths& widths) {
  if (widths.of_group.given()) check_index("widths", widths.of_group, widths.largest + 1, 1);
}

void choose(const float* rewards, const std::vector<int32_t>& row, const int32_t* tokens,
            const std::vector<int32_t>& group, const Widths& widths, const Beam& beam) {
  const int64_t num_groups = widths.num_groups;
  const auto count = static_cast<int64_t>(row.size());
  std::vector<int64_t> first(static_cast<size_t>(num_groups + 1), 0);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t g = group[static_cast<size_t>(row[static_cast<size_t>(i)])];
    if (g == num_groups) continue;
    if (std::isnan(rewards[i])) {
      throw std::invalid_argument("rewards: candidate " + std::to_string(i) +
                                  " is NaN; rewards must be numbers");
    }
    ++first[static_cast<size_t>(g + 1)];
  }
  for (int64_t g = 0; g < num_groups; ++g) first[g + 1] += first[g];

  // The candidates of each group, as keys in the order of choice.
  std::vector<uint64_t> keys(static_cast<size_t>(count));
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t g = group[static_cast<size_t>(row[static_cast<size_t>(i)])];
    if (g == num_groups) continue;
    keys[static_cast<size_t>(next[g]++)] = uint64_t{descending_key(rewards[i])} << 32 | uint64_t(i);
  }
  std::vector<Chosen> chosen;
  for (int64_t g = 0; g < num_groups; ++g) {
    const auto begin = keys.begin() + first[g], end = keys.begin() + first[g + 1];
    const auto last = begin + std::min<int64_t>(widths.of(g), end - begin);
    if (last != end) std::nth_element(begin, last, end);
    for (auto key = begin; key != last; ++key) {
      const auto candidate = static_cast<uint32_t>(*key);
      chosen.push_back({row[candidate], static_cast<uint32_t>(*key >> 32), candidate});
    }
  }
  std::sort(chosen.begin(), chosen.end());  // by parent; siblings by reward

  auto *parent = beam.parent.as<int32_t>(), *token = beam.token.as<int32_t>();
  auto* reward = beam.reward.as<float>();
  const auto made = static_cast<int64_t>(chosen.size());
  for (int64_t i = 0; i < num_groups * widths.largest; ++i) {
    parent[i] = i < made ? chosen[i].row : static_cast<int32_t>(group.size());
    token[i] = i < made ? tokens[chosen[i].candidate] : -1;
    reward[i] = i < made ? rewards[chosen[i].candidate] : -std::numeric_limits<float>::infinity();
  }
}

void select_beam(const Tensor& rewards, const Tensor& tokens, const Tensor& offsets,
                 const Tensor& groups, const Widths& widths, const Beam& beam) {
  const IntView given(groups), named(tokens);
  check_index("groups", given, widths.num_groups + 1);
  check_widths(widths);
  const std::vector<int32_t> row = rows_of(offsets, rewards.shape[0]);
  std::vector<float> reward(row.size());
  std::vector<int32_t> token(row.size()), group(static_cast<size_t>(given.size));
  for (size_t i = 0; i < row.size(); ++i) {
    reward[i] = load_float(rewards, static_cast<int64_t>(i));
    token[i] = named[static_cast<int64_t>(i)];
  }
  for (int64_t r = 0; r < given.size; ++r) group[static_cast<size_t>(r)] = given[r];
  choose(reward.data(), row, token.data(), group, widths, beam);
}

}  // namespace saffron::cpu
