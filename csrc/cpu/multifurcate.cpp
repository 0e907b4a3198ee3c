#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/ops.h"

namespace saffron::cpu {
namespace {

/// Which groups have unseen candidates and none, end tokens aside, that is not.
std::vector<uint8_t> find_blind(const Tensor& unseen, const std::vector<int32_t>& row,
                                const std::vector<int32_t>& tokens,
                                const std::vector<uint8_t>& ends, const std::vector<int32_t>& group,
                                int64_t num_groups) {
  std::vector<uint8_t> seen(static_cast<size_t>(num_groups)), all_unseen(seen.size());
  for (size_t i = 0; unseen.given() && i < tokens.size(); ++i) {
    if (ends[i]) continue;
    const auto g = static_cast<size_t>(group[static_cast<size_t>(row[i])]);
    (*unseen.at(tokens[i]) ? all_unseen : seen)[g] = 1;
  }
  for (size_t g = 0; g < all_unseen.size(); ++g) all_unseen[g] = all_unseen[g] && !seen[g];
  return all_unseen;
}

[[noreturn]] void refuse_nan(const std::string& what) {
  throw std::invalid_argument(what + " has NaN; rewards and scores must be numbers");
}

std::vector<int32_t> copy(const IntView& ints) {
  std::vector<int32_t> values(static_cast<size_t>(ints.size));
  for (int64_t i = 0; i < ints.size; ++i) values[static_cast<size_t>(i)] = ints[i];
  return values;
}

}  // namespace

void multifurcate(const Tensor& logits, const Head& head, const Search& search, const Beam& beam,
                  const Tensor& counts, const Tensor& all_unseen, int threads) {
  const int64_t num_groups = search.widths.num_groups;
  check_index("groups", search.groups, num_groups + 1);
  if (search.finished_groups.given()) {
    check_index("finished_groups", search.finished_groups, num_groups + 1);
  }
  check_widths(search.widths);
  std::vector<int32_t> group = copy(search.groups);
  std::vector<uint8_t> unused(group.size());  // rows of no group: they have no candidates
  for (size_t r = 0; r < group.size(); ++r) unused[r] = group[r] == num_groups;
  Candidates found = nucleus(logits, search.top_p, search.banned, unused, threads);
  std::vector<int32_t>& tokens = found.tokens;
  const Tensor offsets{reinterpret_cast<char*>(found.offsets.data()),
                       DType::kInt32,
                       1,
                       {static_cast<int64_t>(found.offsets.size())},
                       {1}};
  std::vector<int32_t> row = rows_of(offsets, static_cast<int64_t>(tokens.size()));

  std::vector<uint8_t> inherits(tokens.size(), 0);
  if (search.end_tokens.given()) {
    std::vector<int32_t> ends;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const bool first = i == 0, next_row = !first && row[i] != row[i - 1];
      if (first || (next_row && search.end_tokens.rank == 2)) {
        ends = copy(IntView(search.end_tokens, row[i]));
        std::sort(ends.begin(), ends.end());
      }
      inherits[i] = std::binary_search(ends.begin(), ends.end(), tokens[i]);
    }
  }
  const std::vector<uint8_t> is_all_unseen =
      find_blind(head.unseen, row, tokens, inherits, group, num_groups);

  std::vector<float> rewards(tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    const auto r = static_cast<size_t>(row[i]);
    inherits[i] =
        search.scores.given() && (inherits[i] || is_all_unseen[static_cast<size_t>(group[r])]);
    if (!inherits[i]) continue;
    rewards[i] = load_float(search.scores, row[i]);
    if (std::isnan(rewards[i])) refuse_nan("scores: row " + std::to_string(row[i]));
  }
  reward_candidates(head, row, tokens.data(), inherits, rewards.data(), threads);
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (!std::isnan(rewards[i])) continue;
    refuse_nan("rewards: token " + std::to_string(tokens[i]) + " of row " + std::to_string(row[i]));
  }

  if (search.finished_scores.given()) {
    const IntView finished(search.finished_groups);
    for (int64_t i = 0; i < finished.size; ++i) {
      row.push_back(static_cast<int32_t>(group.size()));
      group.push_back(finished[i]);
      tokens.push_back(-1);
      rewards.push_back(load_float(search.finished_scores, i));
      if (finished[i] != num_groups && std::isnan(rewards.back())) {
        refuse_nan("finished_scores: node " + std::to_string(i));
      }
    }
  }
  choose(rewards.data(), row, tokens.data(), group, search.widths, beam);
  for (int64_t r = 0; r < logits.shape[0]; ++r) {
    counts.as<int32_t>()[r] =
        found.offsets[static_cast<size_t>(r + 1)] - found.offsets[static_cast<size_t>(r)];
  }
  std::copy(is_all_unseen.begin(), is_all_unseen.end(), all_unseen.as<uint8_t>());
}

}  // namespace saffron::cpu
