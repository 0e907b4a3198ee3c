#pragma once

// Numbers of a tensor whose storage type is known at run time only.

#include "cuda/common/types.cuh"
#include "cuda/ops.h"

namespace saffron::cuda {

/// A vector of numbers; the stride counts elements.
struct Numbers {
  void* data;
  int64_t stride;
  DType dtype;

  __device__ __forceinline__ bool given() const { return data != nullptr; }

  __device__ __forceinline__ float at(int64_t i) const {
    if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i * stride];
    const uint16_t bits = static_cast<const uint16_t*>(data)[i * stride];
    return dtype == DType::kBFloat16 ? to_float(BFloat16{bits}) : to_float(Float16{bits});
  }

  __device__ __forceinline__ void set(int64_t i, float x) const {
    if (dtype == DType::kFloat32) {
      static_cast<float*>(data)[i * stride] = x;
    } else {
      static_cast<uint16_t*>(data)[i * stride] =
          dtype == DType::kBFloat16 ? from_float<BFloat16>(x).bits : from_float<Float16>(x).bits;
    }
  }
};

inline Numbers numbers(const View& vector) { return {vector.data, vector.stride[0], vector.dtype}; }

}  // namespace saffron::cuda
