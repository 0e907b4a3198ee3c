#include <string>

#include "cpu/ops.h"

namespace saffron::cpu {

void advance_tree(const Tensor& slot, const Tensor& begin, const Tensor& end, const Tensor& parents,
                  const Tensor& new_slots, int64_t queries, const Tensor& new_slot,
                  const Tensor& new_begin, const Tensor& new_end) {
  const IntView parent(parents), old_slot(slot), old_begin(begin), old_end(end), own(new_slots);
  for (int64_t i = 0, last = 0; i < parent.size; last = parent[i++]) {
    if (parent[i] < last) {
      throw std::invalid_argument(
          "parents: must ascend from 0 (new queries are numbered by parent)");
    }
  }
  check_index("begin", old_begin, queries + 1);
  check_index("end", old_end, queries + 1);

  // before[i]: children of the queries before i.
  std::vector<int32_t> before(static_cast<size_t>(queries + 1));
  for (int64_t i = 0, children = 0; i <= queries; ++i) {
    while (children < parent.size && parent[children] < i) ++children;
    before[static_cast<size_t>(i)] = static_cast<int32_t>(children);
  }
  auto *slots = new_slot.as<int32_t>(), *begins = new_begin.as<int32_t>();
  auto* ends = new_end.as<int32_t>();
  const int64_t tokens = old_slot.size;
  for (int64_t t = 0; t < tokens; ++t) {
    slots[t] = old_slot[t];
    begins[t] = before[static_cast<size_t>(old_begin[t])];
    ends[t] = before[static_cast<size_t>(old_end[t])];
  }
  for (int64_t j = 0; j < parent.size; ++j) {
    slots[tokens + j] = own[j];
    begins[tokens + j] = static_cast<int32_t>(j);
    ends[tokens + j] = static_cast<int32_t>(j + (parent[j] < queries));
  }
}

}  // namespace saffron::cpu
