#include <cstring>

#include "cpu/ops.h"
#include "cpu/threads.h"

namespace saffron::cpu {
namespace {

void gather(const Tensor& cache, const int32_t* slot, int64_t step, int64_t length, int64_t head,
            char* to) {
  const int64_t size = item_size(cache.dtype), bytes = cache.shape[2] * size;
  for (int64_t t = 0; t < length; ++t, to += bytes) {
    const int32_t row = slot[t * step];
    if (row < 0) {
      std::memset(to, 0, static_cast<size_t>(bytes));
    } else if (cache.stride[2] == 1) {
      std::memcpy(to, cache.at(row, head), static_cast<size_t>(bytes));
    } else {
      for (int64_t d = 0; d < cache.shape[2]; ++d) {
        std::memcpy(to + d * size, cache.at(row, head, d), static_cast<size_t>(size));
      }
    }
  }
}

}  // namespace

void gather_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots, const Tensor& k,
               const Tensor& v, int threads) {
  const int64_t sequences = slots.shape[0], length = slots.shape[1], heads = k_cache.shape[1];
  for (int64_t s = 0; s < sequences; ++s) {
    Tensor row = slots;
    row.data = slots.at(s);
    row.shape[0] = length;
    row.stride[0] = slots.stride[1];
    check_index("slots", row, k_cache.shape[0], -1);
  }
  constexpr int64_t small = 1 << 15;  // numbers below which starting threads costs more
  if (sequences * heads * length * (k_cache.shape[2] + v_cache.shape[2]) < small) threads = 1;
  parallel_for(sequences * heads, threads, [&](int64_t task, int) {
    const int64_t s = task / heads, head = task % heads;
    const auto* slot = reinterpret_cast<const int32_t*>(slots.at(s));
    gather(k_cache, slot, slots.stride[1], length, head, k.at(s, head));
    gather(v_cache, slot, slots.stride[1], length, head, v.at(s, head));
  });
}

}  // namespace saffron::cpu
