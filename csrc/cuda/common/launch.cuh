#pragma once

// How a kernel is started and gets its shared memory.
// tests/kernels/cuda/host/cuda/common/launch.cuh stands in for this file where kernels run on the
// CPU.

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/ops.h"

namespace saffron::cuda {

/// The block's dynamic shared memory, at a multiple of 1024 bytes. `launch` is told its size.
template <class T>
__device__ __forceinline__ T& shared() {
  extern __shared__ __align__(1024) uint4 saffron_shared_memory[];
  return *reinterpret_cast<T*>(saffron_shared_memory);
}

constexpr int kMostDevices = 64;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

template <class... Parameters, class... Arguments>
cudaError_t start(void (*kernel)(Parameters...), const cudaLaunchConfig_t& config,
                  Arguments... arguments) {
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

/// Lets the kernel have so much shared memory on the current device, where it may not yet.
template <auto kKernel>
void allow_shared(size_t bytes) {
  static std::atomic<size_t> allowed[kMostDevices];
  int device = 0;
  check(cudaGetDevice(&device), "device");
  if (device < kMostDevices && allowed[device].load(std::memory_order_relaxed) >= bytes) return;
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  check(cudaFuncSetAttribute(kKernel, attribute, static_cast<int>(bytes)), "shared memory");
  if (device < kMostDevices) allowed[device].store(bytes, std::memory_order_relaxed);
}

/// `kKernel<<<grid, threads, shared_bytes, stream>>>(arguments...)`; nothing where the grid is
/// empty. Every argument is converted to the kernel's parameter.
///
/// Throws std::runtime_error if the launch is refused.
template <auto kKernel, class... Arguments>
void launch(dim3 grid, int threads, size_t shared_bytes, Stream stream, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > 48 * 1024) allow_shared<kKernel>(shared_bytes);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  check(start(kKernel, config, arguments...), "launch");
}

/// Whether the kernel, as it was compiled for the current device, may run with so many threads.
template <auto kKernel>
bool admits(int threads) {
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, kKernel), "kernel");
  return attributes.maxThreadsPerBlock >= threads;
}

/// What the cutting of work depends on.
struct DeviceProperties {
  int64_t processors;    // multiprocessors
  int64_t shared_bytes;  // shared memory of each
  int64_t block_bytes;   // of which a block may have so much
  int capability;        // 90 for 9.0
  // So few tokens one block goes through sooner than several would join their parts: a prediction.
  int64_t tokens_alone = 256;
};

/// The current device; asked once.
inline const DeviceProperties& device_properties() {
  static DeviceProperties known[kMostDevices];
  static std::once_flag asked[kMostDevices];
  int device = 0;
  check(cudaGetDevice(&device), "device");
  if (device >= kMostDevices) throw std::runtime_error("more devices than are supported");
  std::call_once(asked[device], [device] {
    const auto attribute = [device](cudaDeviceAttr name) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, name, device), "device");
      return value;
    };
    known[device] = {attribute(cudaDevAttrMultiProcessorCount),
                     attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                     attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                     10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                         attribute(cudaDevAttrComputeCapabilityMinor)};
  });
  return known[device];
}

/// Identifies the graph that `stream` is being captured into; 0 if it is not being captured.
inline uint64_t graph_of(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(stream), &status, &id), "capture");
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

/// Blocks, at most, that a grid needs which loops over the rest.
inline unsigned blocks_for(int64_t work, int64_t per_block) {
  constexpr int64_t most = 0x7fffffff;
  const int64_t blocks = (work + per_block - 1) / per_block;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

}  // namespace saffron::cuda
