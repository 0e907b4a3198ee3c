// block_plan on the CPU against brute force, over as many random block tables as the argument says.
// What a plan has to be: requests in the order of their full blocks, every query sees its tokens in
// their order and nothing else, and no block that requests share at the front stands there twice.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "cpu/ops.h"

namespace {

using saffron::cpu::DType;
using saffron::cpu::PagedPlan;
using saffron::cpu::Tensor;
using Row = std::vector<int32_t>;

struct Batch {
  std::vector<Row> rows;
  Row lengths, starts;
  int block_size, padding;
};

/// Few different blocks, so that rows share some anywhere; rows fork from others, or are equal.
Batch draw(std::mt19937& random) {
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  Batch batch;
  batch.block_size = 1 + below(4);
  batch.padding = below(3);
  const int requests = below(9), blocks = 2 + below(4), width = 1 + below(8);
  batch.starts.push_back(0);
  for (int r = 0; r < requests; ++r) {
    Row row = r > 0 && below(3) ? batch.rows[static_cast<size_t>(below(r))]
                                : Row(static_cast<size_t>(width));
    for (int c = below(width + 1); c < width; ++c) row[static_cast<size_t>(c)] = below(blocks);
    batch.rows.push_back(row);
    const int length = below(width * batch.block_size + 1);
    batch.lengths.push_back(length);
    batch.starts.push_back(batch.starts.back() + (below(4) ? std::min(length, 1 + below(3)) : 0));
  }
  return batch;
}

bool right(const Batch& batch, const PagedPlan& plan) {
  const int size = batch.block_size, owned = batch.starts.back();
  const auto requests = batch.rows.size();
  std::vector<size_t> order;
  std::vector<Row> full(requests);
  std::set<Row> shared;
  size_t tokens = 0;
  for (size_t r = 0; r < requests; ++r) {
    const int queries = batch.starts[r + 1] - batch.starts[r];
    if (queries == 0) continue;
    const int blocks = (batch.lengths[r] - queries) / size;
    for (int c = 0; c < blocks; ++c) {
      full[r].push_back(batch.rows[r][static_cast<size_t>(c)]);
      shared.insert(full[r]);
    }
    tokens += static_cast<size_t>(batch.lengths[r] - blocks * size);
    order.push_back(r);
  }
  tokens += shared.size() * static_cast<size_t>(size);
  if (plan.slot.size() != tokens) return false;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return full[a] < full[b]; });
  size_t place = 0;
  for (const size_t r : order) {
    for (int query = batch.starts[r]; query < batch.starts[r + 1]; ++query, ++place) {
      if (plan.order[place] != query) return false;
      int position = 0;
      const int reach = batch.lengths[r] - (batch.starts[r + 1] - 1 - query);
      for (size_t t = 0; t < tokens; ++t) {
        const auto at = static_cast<int32_t>(place);
        if (at < plan.begin[t] || at >= plan.end[t]) continue;
        const int32_t block = batch.rows[r][static_cast<size_t>(position / size)];
        if (position == reach || plan.slot[t] != block * size + position % size) return false;
        ++position;
      }
      if (position != reach) return false;
    }
  }
  for (; place < plan.order.size(); ++place) {
    if (plan.order[place] != static_cast<int32_t>(place)) return false;
  }
  return place == static_cast<size_t>(owned + batch.padding);
}

Tensor tensor(Row& values, int64_t rows, int64_t columns) {
  Tensor made;
  made.data = reinterpret_cast<char*>(values.data());
  made.dtype = DType::kInt32;
  made.rank = columns < 0 ? 1 : 2;
  made.shape[0] = rows;
  made.shape[1] = std::max<int64_t>(columns, 0);
  made.stride[0] = columns < 0 ? 1 : columns;
  made.stride[1] = 1;
  return made;
}

}  // namespace

int main(int, char** arguments) {
  std::mt19937 random(1);
  for (int i = 0; i < std::atoi(arguments[1]); ++i) {
    Batch batch = draw(random);
    Row table;
    for (const Row& row : batch.rows) table.insert(table.end(), row.begin(), row.end());
    const auto requests = static_cast<int64_t>(batch.rows.size());
    const int64_t columns = requests ? static_cast<int64_t>(batch.rows[0].size()) : 0;
    PagedPlan plan = saffron::cpu::block_plan(
        tensor(table, requests, columns), tensor(batch.lengths, requests, -1),
        tensor(batch.starts, requests + 1, -1), batch.block_size,
        batch.starts.back() + batch.padding, -1);
    if (arguments[2] && !plan.end.empty()) --plan.end[i % plan.end.size()];
    if (!right(batch, plan)) {
      std::printf("table %d is planned wrong\n", i);
      return 1;
    }
  }
  return 0;
}
