#pragma once

// Stands in for csrc/cuda/ptx/tensor_map.cuh. Source of the rules: NVIDIA, "CUDA Driver API",
// cuTensorMapEncodeTiled.

#include <algorithm>

#include "cuda/ops.h"

namespace saffron::cuda {

struct TensorMap {
  const unsigned char* data;
  int64_t size[3], stride[3];  // innermost first; in bytes
  int box[3];
};

/// What the driver refuses to encode.
inline bool is_encodable(const TensorMap& map) {
  if (reinterpret_cast<uintptr_t>(map.data) % 16 != 0) return false;
  for (int i = 0; i < 3; ++i) {
    if (map.size[i] < 1 || map.size[i] > int64_t{1} << 32) return false;
    if (map.box[i] < 1 || map.box[i] > 256) return false;
  }
  for (int i = 1; i < 3; ++i) {  // the innermost stride is not given
    if (map.stride[i] < 0 || map.stride[i] >= int64_t{1} << 40 || map.stride[i] % 16 != 0) {
      return false;
    }
  }
  if (map.stride[2] % std::max<int64_t>(map.stride[1], 1) != 0) return false;
  const int64_t row = map.box[0] * map.stride[0];
  return row % 16 == 0 && row <= 128;  // of a box with a swizzle of 128 bytes
}

inline bool encode(TensorMap& map, const void* data, const int64_t (&sizes)[3],
                   const int64_t (&strides)[2], const int (&box)[3]) {
  ++host::tensors_described;
  map = {static_cast<const unsigned char*>(data),
         {sizes[0], sizes[1], sizes[2]},
         {2, strides[0], strides[1]},
         {box[0], box[1], box[2]}};
  return is_encodable(map);
}

}  // namespace saffron::cuda
