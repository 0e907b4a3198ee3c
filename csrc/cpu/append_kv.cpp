#include <cstring>

#include "cpu/ops.h"
#include "cpu/threads.h"

namespace saffron::cpu {
namespace {

/// Copies one [kv_heads, head_dim] row, whatever the strides.
void copy_row(const Tensor& from, int64_t i, const Tensor& to, int64_t j) {
  const int64_t heads = from.shape[1], head_dim = from.shape[2], size = item_size(from.dtype);
  for (int64_t h = 0; h < heads; ++h) {
    if (from.stride[2] == 1 && to.stride[2] == 1) {
      std::memcpy(to.at(j, h), from.at(i, h), static_cast<size_t>(head_dim * size));
      continue;
    }
    for (int64_t d = 0; d < head_dim; ++d) {
      std::memcpy(to.at(j, h, d), from.at(i, h, d), static_cast<size_t>(size));
    }
  }
}

}  // namespace

void append_kv(const Tensor& k, const Tensor& v, const Tensor& slots, const Tensor& k_cache,
               const Tensor& v_cache, int threads) {
  const IntView slot(slots);
  check_index("slots", slot, k_cache.shape[0], -1);
  constexpr int64_t block = 64;  // tokens a task: a decode step is one task and starts no threads
  parallel_for((slot.size + block - 1) / block, threads, [&](int64_t task, int) {
    for (int64_t t = task * block; t < slot.size && t < (task + 1) * block; ++t) {
      if (slot[t] < 0) continue;
      copy_row(k, t, k_cache, slot[t]);
      copy_row(v, t, v_cache, slot[t]);
    }
  });
}

}  // namespace saffron::cpu
