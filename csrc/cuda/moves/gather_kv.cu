// K and V of whole sequences, copied out of the trie. One block a (sequence, position) pair; units
// as in append_kv.

#include <numeric>

#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"

namespace saffron::cuda {
namespace {

constexpr int kThreads = 128;

template <class Unit>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(Rows<const Unit> k_cache, Rows<const Unit> v_cache, const int32_t* slots,
                  int64_t slots_stride_n, int64_t slots_stride_t, Unit* k, Unit* v, int length,
                  int kv_heads, int k_dims, int v_dims, int64_t num_slots, int32_t* fault) {
  const int64_t sequence = blockIdx.x / static_cast<unsigned>(length);
  const int64_t position = blockIdx.x % static_cast<unsigned>(length);
  const int64_t slot = slots[sequence * slots_stride_n + position * slots_stride_t];
  const bool exists = slot >= 0 && slot < num_slots;
  if (!exists && slot != -1 && threadIdx.x == 0) atomicOr(fault, kSlotFault);
  const int dims = k_dims + v_dims;
  for (int i = static_cast<int>(threadIdx.x); i < kv_heads * dims; i += kThreads) {
    const int head = i / dims, of_both = i % dims;
    const bool is_k = of_both < k_dims;
    const int dim = is_k ? of_both : of_both - k_dims;
    Unit found = {};
    if (exists) found = *(is_k ? k_cache : v_cache).at(slot, head, dim);
    const int64_t row = (sequence * kv_heads + head) * length + position;
    if (is_k) {
      k[row * k_dims + dim] = found;
    } else {
      v[row * v_dims + dim] = found;
    }
  }
}

}  // namespace

void gather_kv(const KVCaches& caches, const View& slots, const View& k, const View& v,
               const Launch& on) {
  const int64_t num_slots = caches.k.shape[0], kv_heads = caches.k.shape[1];
  const int64_t head_dim = caches.k.shape[2], v_dim = caches.v.shape[2];
  const int64_t sequences = slots.shape[0], length = slots.shape[1];
  const DType dtype = caches.k.dtype;
  // Outputs are fresh and contiguous: what the caches allow, they do.
  with_unit(dtype, std::gcd(head_dim, v_dim), {&caches.k, &caches.v}, [&](auto unit, int64_t) {
    using Unit = decltype(unit);
    const auto units = [&](int64_t size) {
      return static_cast<int>(size * item_size(dtype) / static_cast<int64_t>(sizeof(Unit)));
    };
    launch<gather_kernel<Unit>>(
        dim3(static_cast<unsigned>(sequences * length)), kThreads, 0, on.stream,
        rows<const Unit>(caches.k, dtype), rows<const Unit>(caches.v, dtype), slots.as<int32_t>(),
        slots.stride[0], slots.stride[1], k.as<Unit>(), v.as<Unit>(), length, kv_heads,
        units(head_dim), units(v_dim), num_slots, on.fault.as<int32_t>());
  });
}

}  // namespace saffron::cuda
