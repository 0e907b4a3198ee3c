#pragma once

// What bulk copies of boxes of a tensor are given: how the tensor lies in memory. Made on the host
// without a call into the device, so that a launch with it can be captured in a graph.
// tests/kernels/cuda/host/cuda/ptx/tensor_map.cuh stands in for this file where kernels run on the
// CPU.

#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/ops.h"

namespace saffron::cuda {

using TensorMap = CUtensorMap;

/// Describes a tensor of 16-bit numbers, of which boxes will be copied whose innermost row, 128
/// bytes, is swizzled. Dimensions innermost first, strides of the second and third in bytes. False
/// where it cannot be described, or the driver does not know how.
inline bool encode(TensorMap& map, const void* data, const int64_t (&sizes)[3],
                   const int64_t (&strides)[2], const int (&box)[3]) {
  // Looked up at run time: nothing is linked against the driver.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode known = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                                12000, cudaEnableDefault, &result);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      cudaGetLastError();  // not an error of whoever comes next
      return static_cast<Encode>(nullptr);
    }
    return reinterpret_cast<Encode>(found);
  }();
  const auto wide = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  const auto narrow = [](int x) { return static_cast<cuuint32_t>(x); };
  const cuuint64_t size[3] = {wide(sizes[0]), wide(sizes[1]), wide(sizes[2])};
  const cuuint64_t stride[2] = {wide(strides[0]), wide(strides[1])};
  const cuuint32_t boxes[3] = {narrow(box[0]), narrow(box[1]), narrow(box[2])};
  const cuuint32_t steps[3] = {1, 1, 1};
  // UINT16: bits are copied, and zeros beyond the end are zeros in any type.
  return known != nullptr && known(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(data),
                                   size, stride, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace saffron::cuda
