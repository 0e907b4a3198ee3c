#pragma once

// One reward: the product of a hidden state and the row of the head that a token names, by a warp.

#include "cuda/common/rows.cuh"
#include "cuda/common/types.cuh"

namespace saffron::cuda {

/// A matrix `[n, columns]` as rows.cuh takes tensors: of one head.
inline View one_head(const View& matrix) {
  View view = matrix;
  view.stride[1] = 0;
  view.stride[2] = matrix.stride[1];
  return view;
}

template <class T, template <class> class Unit>
struct HeadRows {
  Rows<const Unit<T>> hidden, weight;
  int units;  // in a row
};

template <class T, template <class> class Unit>
HeadRows<T, Unit> head_rows(const View& hidden, const View& weight, int64_t size, DType dtype) {
  return {rows<const Unit<T>>(one_head(hidden), dtype),
          rows<const Unit<T>>(one_head(weight), dtype), static_cast<int>(size / Unit<T>::kSize)};
}

/// Calls `run(HeadRows)` with the widest units that both matrices allow.
template <class Run>
void with_head_rows(const View& hidden, const View& weight, Run run) {
  const int64_t size = hidden.shape[1];
  const DType dtype = hidden.dtype;
  const View h = one_head(hidden), w = one_head(weight);
  const bool wide = in_vectors(dtype, size, {&h, &w});
  const auto of = [&](auto number) {
    using T = decltype(number);
    if (wide) {
      run(head_rows<T, Vector>(hidden, weight, size, dtype));
    } else {
      run(head_rows<T, Scalar>(hidden, weight, size, dtype));
    }
  };
  if (dtype == DType::kFloat32) {
    of(float{});
  } else if (dtype == DType::kBFloat16) {
    of(BFloat16{});
  } else {
    of(Float16{});
  }
}

/// The product of one row of each, for all lanes of the warp. All loads of 4 KB of a row are under
/// way at once: 2048 numbers in bf16 cost one latency.
template <class T, template <class> class Unit>
__device__ __forceinline__ float dot(const HeadRows<T, Unit>& head, int row, int token) {
  constexpr int kAtOnce = 8, kSize = Unit<T>::kSize;
  // The distance of one load of a lane to its next.
  const int64_t h_step = 32 * (kSize > 1 ? 1 : head.hidden.stride_dim);
  const int64_t w_step = 32 * (kSize > 1 ? 1 : head.weight.stride_dim);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const Unit<T>* h_from = head.hidden.at(row, 0, kSize > 1 ? 0 : lane) + (kSize > 1 ? lane : 0);
  const Unit<T>* w_from = head.weight.at(token, 0, kSize > 1 ? 0 : lane) + (kSize > 1 ? lane : 0);
  float sums[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) sums[i] = 0.f;
#pragma unroll 1
  for (int left = head.units - lane; left > 0; left -= 32 * kAtOnce) {
    Unit<T> w[kAtOnce], h[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (32 * j < left) w[j] = w_from[j * w_step];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (32 * j < left) h[j] = h_from[j * h_step];
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (32 * j >= left) break;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        sums[i] = __fmaf_rn(to_float(h[j].values[i]), to_float(w[j].values[i]), sums[i]);
      }
    }
    w_from += kAtOnce * w_step;
    h_from += kAtOnce * h_step;
  }
#pragma unroll
  for (int half = kSize / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  float sum = sums[0];
#pragma unroll
  for (int with = 16; with > 0; with /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, with);
  return sum;
}

}  // namespace saffron::cuda
