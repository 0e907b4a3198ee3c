#pragma once

// Copying rows `[n, heads, head_dim]` of any dtype and layout in the widest units that fit.

#include <initializer_list>

#include "cuda/ops.h"

namespace saffron::cuda {

/// A tensor `[n, heads, dims]` of `Unit`s; strides count units.
template <class Unit>
struct Rows {
  Unit* data;
  int64_t stride_n, stride_head, stride_dim;

  __device__ __forceinline__ Unit* at(int64_t n, int64_t head, int64_t dim) const {
    return data + n * stride_n + head * stride_head + dim * stride_dim;
  }
};

template <class Unit>
Rows<Unit> rows(const View& tensor, DType dtype) {
  const int64_t elements = static_cast<int64_t>(sizeof(Unit)) / item_size(dtype);  // in a unit
  return {tensor.as<Unit>(), tensor.stride[0] / elements, tensor.stride[1] / elements,
          elements == 1 ? tensor.stride[2] : 1};
}

/// Whether every head's row is a whole number of units of so many `elements`, each of them aligned
/// to its size (to 16 bytes, where it is larger).
inline bool in_units(int64_t elements, DType dtype, int64_t head_dim,
                     std::initializer_list<const View*> tensors) {
  const int64_t bytes = elements * item_size(dtype), aligned = bytes < 16 ? bytes : 16;
  if (head_dim % elements != 0) return false;
  for (const View* tensor : tensors) {
    if (reinterpret_cast<uintptr_t>(tensor->data) % aligned != 0 || tensor->stride[2] != 1 ||
        tensor->stride[0] % elements != 0 || tensor->stride[1] % elements != 0) {
      return false;
    }
  }
  return true;
}

/// Whether every head's row begins at a multiple of 16 bytes and is a whole number of such units.
inline bool in_vectors(DType dtype, int64_t head_dim, std::initializer_list<const View*> tensors) {
  return in_units(16 / item_size(dtype), dtype, head_dim, tensors);
}

/// Calls `run(unit, units in a head's row)` with a unit of the widest type that the tensors allow.
template <class Run>
void with_unit(DType dtype, int64_t head_dim, std::initializer_list<const View*> tensors, Run run) {
  if (in_vectors(dtype, head_dim, tensors)) {
    run(uint4{}, head_dim * item_size(dtype) / 16);
  } else if (item_size(dtype) == 4) {
    run(uint32_t{}, head_dim);
  } else if (item_size(dtype) == 1) {
    run(uint8_t{}, head_dim);
  } else {
    run(uint16_t{}, head_dim);
  }
}

}  // namespace saffron::cuda
