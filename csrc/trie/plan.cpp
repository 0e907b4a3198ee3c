// Trie::plan: from nodes to intervals of queries.

#include "trie/errors.h"
#include "trie/trie.h"

namespace saffron {

/// First half of plan(): fills entries_ up to the number returned. Entry 0 is the virtual node
/// above the roots; the others follow their parent, and those of their siblings that come first in
/// the plan.
int32_t Trie::collect(Span<int32_t> queries) {
  auto& [node_of, up, query, nodes_below, queries_below, path] = entries_;
  for (auto* column : {&node_of, &up, &query, &nodes_below, &queries_below, &path}) {
    if (static_cast<int64_t>(column->size()) <= num_nodes()) column->resize(num_nodes() + 1);
  }
  nodes_below[0] = queries_below[0] = 0;
  local_[kNone] = 0;
  int32_t total = 1;
  int64_t twice = -1;
  for (int64_t i = 0; i < queries.size; ++i) {
    int32_t length = 0;
    int32_t node = queries[i];
    for (; local_[node] == kNone; node = parent_[node]) path[length++] = node;
    int32_t last = local_[node];
    while (length > 0) {
      node = path[--length];
      local_[node] = total;
      node_of[total] = node;
      up[total] = last;
      query[total] = kNone;
      nodes_below[total] = 1;
      queries_below[total] = 0;
      last = total++;
    }
    if (query[last] != kNone) twice = i;
    query[last] = static_cast<int32_t>(i);
  }
  for (int32_t k = 1; k < total; ++k) local_[node_of[k]] = kNone;
  if (twice >= 0) invalid(item("queries", twice, queries[twice]) + ": is there twice");
  return total;
}

Trie::Plan Trie::plan(Span<int32_t> queries) {
  check_nodes(queries, "queries");
  const int32_t total = collect(queries);
  auto& [node_of, up, query, nodes_below, queries_below, path] = entries_;
  // Chains are most of the work: what an entry passes on to the one next to it stays in registers.
  int32_t nodes = 0, count = 0;
  for (int32_t k = total; --k > 0;) {
    nodes = nodes_below[k] += nodes;
    count = queries_below[k] += count + (query[k] != kNone);
    if (up[k] == k - 1) continue;
    nodes_below[up[k]] += nodes;
    queries_below[up[k]] += count;
    nodes = count = 0;
  }
  Plan plan;
  for (Ints* column : {&plan.order, &plan.depth}) column->resize(queries.size);
  for (Ints* column : {&plan.slot, &plan.begin, &plan.end}) column->resize(total - 1);
  // An entry that is done turns its counts into the next position and query number below it that
  // are still to give away, and `up` into its depth.
  up[0] = -1;
  int32_t position = 0, number = 0, depth = -1;
  for (int32_t k = 1; k < total; ++k) {
    const int32_t above = up[k];
    if (above != k - 1) {
      position = nodes_below[above];
      number = queries_below[above];
      depth = up[above];
    }
    const int32_t end = number + queries_below[k];
    nodes_below[above] = position + nodes_below[k];
    queries_below[above] = end;
    plan.slot[position] = node_of[k];
    plan.begin[position] = number;
    plan.end[position] = end;
    ++position;
    ++depth;
    if (query[k] != kNone) {
      plan.order[number] = query[k];
      plan.depth[number] = depth;
      ++number;
    }
    nodes_below[k] = position;
    queries_below[k] = number;
    up[k] = depth;
  }
  return plan;
}

}  // namespace saffron
