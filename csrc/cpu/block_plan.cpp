#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include "cpu/ops.h"

namespace saffron::cpu {
namespace {

/// One request that has queries in this step.
struct Request {
  const int32_t* blocks;
  int64_t cached;   // blocks that are full of tokens from earlier steps
  int64_t context;  // tokens from earlier steps
  int64_t length;   // tokens in all
  int64_t query;    // its first query, as the caller numbers them
};

[[noreturn]] void refuse(const char* name, int64_t request, const std::string& what) {
  throw std::invalid_argument(std::string(name) + ": request " + std::to_string(request) + " " +
                              what);
}

std::vector<Request> read(const Tensor& block_table, const IntView& seq_lens,
                          const IntView& query_start, int64_t block_size, int64_t total) {
  std::vector<Request> requests;
  if (query_start[0] != 0 || query_start[seq_lens.size] > total) {
    throw std::invalid_argument("query_start: got " + std::to_string(query_start[0]) + " to " +
                                std::to_string(query_start[seq_lens.size]) +
                                ", expected 0 to at most the number of queries, " +
                                std::to_string(total));
  }
  for (int64_t r = 0; r < seq_lens.size; ++r) {
    const int64_t queries = query_start[r + 1] - query_start[r], length = seq_lens[r];
    if (queries < 0) refuse("query_start", r, "has fewer than 0 queries");
    if (queries == 0) continue;  // padding
    if (length < queries) {
      refuse("seq_lens", r,
             "has " + std::to_string(length) + " tokens and " + std::to_string(queries) +
                 " queries, expected at least as many tokens");
    }
    const int64_t used = (length + block_size - 1) / block_size;
    if (used > block_table.shape[1]) {
      refuse("seq_lens", r,
             "needs " + std::to_string(used) + " blocks, the table has " +
                 std::to_string(block_table.shape[1]));
    }
    const auto* blocks = reinterpret_cast<const int32_t*>(block_table.at(r));
    if (used > 0 && *std::min_element(blocks, blocks + used) < 0) {
      refuse("block_table", r, "uses a block below 0");
    }
    const int64_t context = length - queries;
    requests.push_back({blocks, context / block_size, context, length, query_start[r]});
  }
  return requests;
}

/// How many of their cached blocks two requests share at the front.
int64_t shared(const Request& a, const Request& b) {
  constexpr int64_t chunk = 64;
  const int64_t most = std::min(a.cached, b.cached);
  int64_t c = 0;
  while (c + chunk <= most && std::memcmp(a.blocks + c, b.blocks + c, chunk * 4) == 0) c += chunk;
  while (c < most && a.blocks[c] == b.blocks[c]) ++c;
  return c;
}

bool before(const Request& a, const Request& b) {
  const int64_t c = shared(a, b);
  if (c < a.cached && c < b.cached) return a.blocks[c] < b.blocks[c];
  return a.cached < b.cached;
}

}  // namespace

PagedPlan block_plan(const Tensor& block_table, const Tensor& seq_lens, const Tensor& query_start,
                     int64_t block_size, int64_t queries, int64_t most) {
  std::vector<Request> requests = read(block_table, seq_lens, query_start, block_size, queries);
  std::stable_sort(requests.begin(), requests.end(), before);
  const auto rows = static_cast<int64_t>(requests.size());
  // common[i]: blocks that request i shares with the one before it; first[i]: its first query.
  std::vector<int64_t> common(static_cast<size_t>(rows) + 1, 0),
      first(static_cast<size_t>(rows) + 1, 0);
  int64_t tokens = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const Request& request = requests[static_cast<size_t>(i)];
    if (i > 0) {
      common[static_cast<size_t>(i)] = shared(requests[static_cast<size_t>(i - 1)], request);
    }
    first[static_cast<size_t>(i) + 1] =
        first[static_cast<size_t>(i)] + request.length - request.context;
    tokens += request.length - common[static_cast<size_t>(i)] * block_size;
  }
  if (most >= 0 && tokens > most) {
    throw std::invalid_argument("size: got " + std::to_string(most) + ", the plan has " +
                                std::to_string(tokens) + " tokens");
  }
  PagedPlan plan;
  plan.order.resize(static_cast<size_t>(queries));
  plan.slot.resize(static_cast<size_t>(tokens));
  plan.begin.resize(static_cast<size_t>(tokens));
  plan.end.resize(static_cast<size_t>(tokens));
  int32_t *orders = plan.order.data(), *slots = plan.slot.data(), *begins = plan.begin.data(),
          *ends = plan.end.data();
  const int32_t owned =
      IntView(query_start)[seq_lens.shape[0]];  // those behind belong to no request
  std::iota(orders + owned, orders + queries, owned);
  for (int64_t i = 0; i < rows; ++i) {
    const Request& request = requests[static_cast<size_t>(i)];
    const int64_t own = first[static_cast<size_t>(i)], next = first[static_cast<size_t>(i) + 1];
    const int64_t from = common[static_cast<size_t>(i)];
    std::iota(orders + own, orders + next, static_cast<int32_t>(request.query));
    // Full blocks from the last to the first: the earlier a block, the more requests share it.
    const int64_t written = (request.cached - from) * block_size;
    for (int64_t c = request.cached - 1, j = i + 1; c >= from; --c) {
      while (j < rows && common[static_cast<size_t>(j)] > c) ++j;
      const int64_t at = (c - from) * block_size;
      std::iota(slots + at, slots + at + block_size,
                static_cast<int32_t>(request.blocks[c] * block_size));
      std::fill_n(begins + at, block_size, static_cast<int32_t>(own));
      std::fill_n(ends + at, block_size, static_cast<int32_t>(first[static_cast<size_t>(j)]));
    }
    slots += written, begins += written, ends += written;
    for (int64_t p = request.cached * block_size; p < request.length; ++p) {
      *slots++ = static_cast<int32_t>(request.blocks[p / block_size] * block_size + p % block_size);
      *begins++ = static_cast<int32_t>(own + std::max<int64_t>(0, p - request.context));
      *ends++ = static_cast<int32_t>(next);
    }
  }
  return plan;
}

}  // namespace saffron::cpu
