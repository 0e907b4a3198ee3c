#include <algorithm>
#include <utility>

#include "cpu/ops.h"
#include "cpu/simd/kernels.h"
#include "cpu/threads.h"

namespace saffron::cpu {

void reward_candidates(const Head& head, const std::vector<int32_t>& row, const int32_t* tokens,
                       const std::vector<uint8_t>& skip, float* rewards, int threads) {
  const int64_t rows = row.empty() ? 0 : row.back() + 1;  // beyond them nobody has candidates
  const int64_t size = head.hidden.shape[1];
  // Candidates in the order of their tokens: each weight row is read once for all that name it.
  std::vector<uint64_t> order, spare;
  order.reserve(row.size());
  for (size_t i = 0; i < row.size(); ++i) {
    if (skip[i]) continue;
    const int32_t token = tokens[i];
    if (head.unseen.given() && *head.unseen.at(token)) {
      rewards[i] = head.unseen_reward;
    } else {
      order.push_back(static_cast<uint64_t>(token) << 32 | i);
    }
  }
  spare.resize(order.size());
  radix_sort(order.data(), spare.data(), static_cast<int64_t>(order.size()));

  const int64_t row_floats = (size + 15) / 16 * 16;
  auto* hidden = reinterpret_cast<float*>(scratch(rows * row_floats * int64_t{sizeof(float)}));
  for (int64_t r = 0; r < rows; ++r) {
    kernels().widen(head.hidden.at(r), head.hidden.dtype, size, hidden + r * row_floats);
  }

  // Runs of candidates that share a token, some 32 candidates a task.
  constexpr size_t block = 32;
  std::vector<size_t> tasks{0};
  for (size_t i = 1; i <= order.size(); ++i) {
    const bool new_token = i == order.size() || order[i] >> 32 != order[i - 1] >> 32;
    if (new_token && (i - tasks.back() >= block || i == order.size())) tasks.push_back(i);
  }
  parallel_for(static_cast<int64_t>(tasks.size()) - 1, threads, [&](int64_t task, int) {
    std::vector<int32_t> named;
    std::vector<float> dots;
    for (size_t i = tasks[task], next; i < tasks[task + 1]; i = next) {
      const auto token = static_cast<int64_t>(order[i] >> 32);
      named.clear();
      for (next = i; next < tasks[task + 1] && order[next] >> 32 == order[i] >> 32; ++next) {
        named.push_back(row[static_cast<uint32_t>(order[next])]);
      }
      if (next < order.size()) {
        // Into the second-level cache: the first has too few misses under way for a row.
        const char* ahead = head.weight.at(static_cast<int64_t>(order[next] >> 32));
        const int64_t bytes = size * item_size(head.weight.dtype);
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(ahead + at, 0, 2);
      }
      dots.resize(named.size());
      kernels().dots(head.weight.at(token), head.weight.dtype, hidden, row_floats, size,
                     named.data(), static_cast<int64_t>(named.size()), dots.data());
      const float bias = head.bias.given() ? load_float(head.bias, token) : 0.f;
      for (size_t j = i; j < next; ++j) {
        rewards[static_cast<uint32_t>(order[j])] = dots[j - i] + bias;
      }
    }
  });
}

void multifurcation_head(const Head& head, const Tensor& tokens, const Tensor& offsets,
                         const Tensor& rewards, int threads) {
  const IntView named(tokens);
  check_index("tokens", named, head.weight.shape[0]);
  const std::vector<int32_t> row = rows_of(offsets, named.size);
  std::vector<int32_t> token(row.size());
  for (size_t i = 0; i < row.size(); ++i) token[i] = named[static_cast<int64_t>(i)];
  reward_candidates(head, row, token.data(), std::vector<uint8_t>(row.size(), 0),
                    rewards.as<float>(), threads);
}

}  // namespace saffron::cpu
