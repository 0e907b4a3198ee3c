// Two attention results over disjoint tokens, joined. A thread joins 16 bytes of a row where the
// layout allows, else one element, and works out the two weights of its row for itself.

#include "cuda/common/launch.cuh"
#include "cuda/common/rows.cuh"
#include "cuda/common/types.cuh"

namespace saffron::cuda {
namespace {

constexpr int kThreads = 128;

struct Lse {
  const float* data;
  int64_t stride_query, stride_head;
};

template <class T, template <class> class Unit>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(Rows<const Unit<T>> a, Lse lse_a, Rows<const Unit<T>> b, Lse lse_b, Unit<T>* out,
                 float* lse, int64_t units, int heads, int dims) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= units) return;
  const int64_t row = i / dims, query = row / heads;
  const int dim = static_cast<int>(i % dims), head = static_cast<int>(row % heads);
  const float x = lse_a.data[query * lse_a.stride_query + head * lse_a.stride_head];
  const float y = lse_b.data[query * lse_b.stride_query + head * lse_b.stride_head];
  const float largest = fmaxf(x, y);
  const float base = largest == -INFINITY ? 0.f : largest;  // no -inf - -inf
  const float mass_a = expf(x - base), mass_b = expf(y - base);
  const float mass = mass_a + mass_b;  // 0, or from 1 to 2
  const bool nothing = mass == 0.f;
  if (dim == 0) lse[row] = nothing ? -INFINITY : base + logf(mass);

  const float weight_a = nothing ? 0.f : mass_a / mass, weight_b = nothing ? 0.f : mass_b / mass;
  const Unit<T> of_a = *a.at(query, head, dim), of_b = *b.at(query, head, dim);
  Unit<T> joined;
#pragma unroll
  for (int j = 0; j < Unit<T>::kSize; ++j) {
    joined.values[j] =
        from_float<T>(to_float(of_a.values[j]) * weight_a + to_float(of_b.values[j]) * weight_b);
  }
  out[i] = joined;
}

template <class T, template <class> class Unit>
void merge(const Attended& a, const Attended& b, const Attended& result, const Launch& on) {
  const int64_t queries = result.out.shape[0], heads = result.out.shape[1];
  const DType dtype = result.out.dtype;
  const int64_t dims = result.out.shape[2] / Unit<T>::kSize, units = queries * heads * dims;
  launch<merge_kernel<T, Unit>>(
      dim3(blocks_for(units, kThreads)), kThreads, 0, on.stream, rows<const Unit<T>>(a.out, dtype),
      Lse{a.lse.as<float>(), a.lse.stride[0], a.lse.stride[1]}, rows<const Unit<T>>(b.out, dtype),
      Lse{b.lse.as<float>(), b.lse.stride[0], b.lse.stride[1]}, result.out.as<Unit<T>>(),
      result.lse.as<float>(), units, heads, dims);
}

}  // namespace

void merge_attention(const Attended& a, const Attended& b, const Attended& result,
                     const Launch& on) {
  const DType dtype = result.out.dtype;
  const bool wide = in_vectors(dtype, result.out.shape[2], {&a.out, &b.out});
  const auto run = [&](auto of) {
    using T = decltype(of);
    const auto chosen = wide ? &merge<T, Vector> : &merge<T, Scalar>;
    chosen(a, b, result, on);
  };
  if (dtype == DType::kFloat32) {
    run(float{});
  } else if (dtype == DType::kBFloat16) {
    run(BFloat16{});
  } else {
    run(Float16{});
  }
}

}  // namespace saffron::cuda
