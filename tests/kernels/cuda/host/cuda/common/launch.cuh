#pragma once

// Stands in for csrc/cuda/common/launch.cuh: a launch is a loop on the CPU.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "cuda/ops.h"

namespace saffron::cuda {

template <class T>
T& shared() {
  return *reinterpret_cast<T*>(host::current().block->shared);
}

template <class... Parameters, class... Arguments>
void call(void (*kernel)(Parameters...), Arguments... arguments) {
  kernel(static_cast<Parameters>(arguments)...);
}

struct DeviceProperties {
  int64_t processors, shared_bytes, block_bytes;
  int capability;
  int64_t tokens_alone;
};

inline int number_asked(const char* variable, int otherwise) {
  const char* asked = std::getenv(variable);
  return asked ? std::atoi(asked) : otherwise;
}

/// KiB of shared memory of a multiprocessor by compute capability; a block may have one less.
/// Source: NVIDIA, "CUDA C++ Programming Guide", technical specifications.
inline int shared_of(int capability) {
  if (capability == 80 || capability == 87) return 164;
  return capability == 86 || capability == 89 || capability >= 120 ? 100 : 228;
}

/// Few processors, yet enough that work is split; SAFFRON_CUDA_HOST_PROCESSORS asks for more. It is
/// of capability 8.0 unless SAFFRON_CUDA_HOST_CAPABILITY says otherwise (90). Few tokens are split
/// as well, so that small tests see it; SAFFRON_CUDA_HOST_ALONE says up to how many are not.
inline DeviceProperties device_properties() {
  const int capability = number_asked("SAFFRON_CUDA_HOST_CAPABILITY", 80);
  const int kib = shared_of(capability);
  return {number_asked("SAFFRON_CUDA_HOST_PROCESSORS", 6), kib * 1024, (kib - 1) * 1024, capability,
          number_asked("SAFFRON_CUDA_HOST_ALONE", 0)};
}

template <auto kKernel, class... Arguments>
void launch(dim3 grid, int threads, size_t shared_bytes, Stream, Arguments... arguments) {
  if (shared_bytes > static_cast<size_t>(device_properties().block_bytes)) {
    throw std::runtime_error("shared memory: more than a block may have");
  }
  host::run(__PRETTY_FUNCTION__, grid, static_cast<unsigned>(threads), shared_bytes,
            [&] { call(kKernel, arguments...); });
}

template <auto kKernel>
bool admits(int) {
  return true;
}

inline uint64_t graph_of(Stream) { return 0; }

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  return static_cast<unsigned>((work + per_block - 1) / per_block);
}

}  // namespace saffron::cuda
