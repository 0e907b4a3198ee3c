// K and V rows of new tokens, written into their slots: K rotated by its position where cos and sin
// are given, both divided by their scales and rounded where the caches are fp8. One block per
// token. A thread has the same 16 bytes of the left and of the right half of what is rotated, or 16
// bytes that are only copied; one element where the layout allows no more.

#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/types.cuh"

namespace saffron::cuda {
namespace {

constexpr int kThreads = 128;

/// cos or sin, `[tokens, rotated]`; strides count elements.
struct Turn {
  const void* data;
  int64_t stride_n, stride_dim;

  /// `kN` of them, side by side where `kN` is not 1.
  template <int kN>
  __device__ __forceinline__ Pack<float, kN> at(DType dtype, int64_t n, int64_t dim) const {
    const int64_t place = n * stride_n + dim * stride_dim;
    if (dtype == DType::kFloat32) return load<float, kN>(place);
    return dtype == DType::kBFloat16 ? load<BFloat16, kN>(place) : load<Float16, kN>(place);
  }

 private:
  template <class T, int kN>
  __device__ __forceinline__ Pack<float, kN> load(int64_t place) const {
    return converted<float>(loaded<T, kN>(static_cast<const T*>(data) + place));
  }
};

template <class From, class To>
struct Arguments {
  Rows<const From> k, v;
  Rows<To> k_cache, v_cache;
  Turn cos, sin;
  DType rotary;
  const int32_t* slots;
  int64_t slots_stride;
  const float *k_scale, *v_scale;
  int kv_heads, head_dim, v_dim, rotated;
  int64_t num_slots;
  int32_t* fault;
};

template <class To, int kN>
__device__ __forceinline__ void store(To* to, Pack<float, kN> x, const float* scales, int head) {
  if constexpr (std::is_same_v<To, Float8>) {
    const float scale = scales == nullptr ? 1.f : scales[head];
#pragma unroll
    for (int i = 0; i < kN; ++i) x.values[i] = __fdiv_rn(x.values[i], scale);
  }
  *reinterpret_cast<Pack<To, kN>*>(to) = converted<To>(x);
}

template <class From, class To, int kN>
__global__ void __launch_bounds__(kThreads) append_kernel(const Arguments<From, To> a) {
  using Given = Pack<From, kN>;
  const int64_t token = blockIdx.x;
  const int64_t slot = a.slots[token * a.slots_stride];
  if (slot < 0 || slot >= a.num_slots) {
    if (slot != -1 && threadIdx.x == 0) atomicOr(a.fault, kSlotFault);
    return;
  }
  const int half = a.rotated / 2, pairs = half / kN, dims = a.head_dim / kN;
  const int units =
      dims - pairs + a.v_dim / kN;  // of a head: of K what is rotated, then the rest, then V
  for (int i = static_cast<int>(threadIdx.x); i < a.kv_heads * units; i += kThreads) {
    const int head = i / units, unit = i % units;
    if (unit < pairs) {
      const int dim = unit * kN;
      const auto cos_l = a.cos.template at<kN>(a.rotary, token, dim);
      const auto cos_r = a.cos.template at<kN>(a.rotary, token, half + dim);
      const auto sin_l = a.sin.template at<kN>(a.rotary, token, dim);
      const auto sin_r = a.sin.template at<kN>(a.rotary, token, half + dim);
      auto left = converted<float>(loaded<From, kN>(a.k.at(token, head, dim)));
      auto right = converted<float>(loaded<From, kN>(a.k.at(token, head, half + dim)));
#pragma unroll
      for (int j = 0; j < kN; ++j) {  // no fused multiply-add: the bits of PyTorch's own
        const float l = left.values[j], r = right.values[j];
        left.values[j] = __fadd_rn(__fmul_rn(l, cos_l.values[j]), __fmul_rn(-r, sin_l.values[j]));
        right.values[j] = __fadd_rn(__fmul_rn(r, cos_r.values[j]), __fmul_rn(l, sin_r.values[j]));
      }
      store<To, kN>(a.k_cache.at(slot, head, dim), left, a.k_scale, head);
      store<To, kN>(a.k_cache.at(slot, head, half + dim), right, a.k_scale, head);
    } else {
      const bool is_k = unit < dims - pairs;
      const int dim = (is_k ? unit + pairs : unit - (dims - pairs)) * kN;
      const auto given = loaded<From, kN>((is_k ? a.k : a.v).at(token, head, dim));
      To* to = (is_k ? a.k_cache : a.v_cache).at(slot, head, dim);
      if constexpr (std::is_same_v<From, To>) {
        *reinterpret_cast<Given*>(to) = given;
      } else {
        store<To, kN>(to, converted<float>(given), is_k ? a.k_scale : a.v_scale, head);
      }
    }
  }
}

/// Calls `run` with a value of the type that `dtype` names.
template <class Run>
void with_type(DType dtype, Run run) {
  if (dtype == DType::kFloat32) {
    run(float{});
  } else if (dtype == DType::kBFloat16) {
    run(BFloat16{});
  } else {
    run(Float16{});
  }
}

}  // namespace

void append_kv(const View& k, const View& v, const View& slots, const KVCaches& caches,
               const Rotary& rotary, const Launch& on) {
  const int64_t head_dim = k.shape[2], v_dim = v.shape[2], rotated = rotary.cos.shape[1];
  const DType dtype = k.dtype, stored = caches.k.dtype, turned_in = rotary.cos.dtype;
  const int64_t wide = 16 / item_size(dtype);
  const View &k_cache = caches.k, &v_cache = caches.v, &cos = rotary.cos, &sin = rotary.sin;
  const View angles[2] = {{cos.data, {cos.stride[0], 0, cos.stride[1]}},
                          {sin.data, {sin.stride[0], 0, sin.stride[1]}}};
  const bool vectors =
      in_units(wide, dtype, head_dim, {&k}) && in_units(wide, dtype, v_dim, {&v}) &&
      in_units(wide, stored, head_dim, {&k_cache}) && in_units(wide, stored, v_dim, {&v_cache}) &&
      (rotated == 0 || in_units(wide, turned_in, rotated / 2, {&angles[0], &angles[1]}));
  const auto run = [&](auto from, auto to, auto size) {
    using From = decltype(from);
    using To = decltype(to);
    Arguments<From, To> a = {};
    a.k = rows<const From>(k, dtype);
    a.v = rows<const From>(v, dtype);
    a.k_cache = rows<To>(k_cache, stored);
    a.v_cache = rows<To>(v_cache, stored);
    a.cos = {cos.data, cos.stride[0], cos.stride[1]};
    a.sin = {sin.data, sin.stride[0], sin.stride[1]};
    a.rotary = turned_in;
    a.slots = slots.as<int32_t>();
    a.slots_stride = slots.stride[0];
    a.k_scale = caches.k_scale.as<float>();
    a.v_scale = caches.v_scale.as<float>();
    a.kv_heads = static_cast<int>(k.shape[1]);
    a.head_dim = static_cast<int>(head_dim);
    a.v_dim = static_cast<int>(v_dim);
    a.rotated = static_cast<int>(rotated);
    a.num_slots = k_cache.shape[0];
    a.fault = on.fault.as<int32_t>();
    launch<append_kernel<From, To, decltype(size)::value>>(dim3(static_cast<unsigned>(k.shape[0])),
                                                           kThreads, 0, on.stream, a);
  };
  with_type(dtype, [&](auto from) {
    using From = decltype(from);
    const auto to_type = [&](auto to) {
      if (vectors) {
        run(from, to, std::integral_constant<int, 16 / sizeof(From)>{});
      } else {
        run(from, to, std::integral_constant<int, 1>{});
      }
    };
    if (stored == DType::kFloat8) {
      to_type(Float8{});
    } else {
      to_type(from);
    }
  });
}

}  // namespace saffron::cuda
