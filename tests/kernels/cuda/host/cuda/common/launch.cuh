#pragma once

// Stands in for csrc/cuda/common/launch.cuh: a launch is a loop on the CPU.

#include <algorithm>
#include <cmath>
#include <cstdlib>

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

template <auto kKernel, class... Arguments>
void launch(dim3 grid, int threads, size_t shared_bytes, Stream, Arguments... arguments) {
  host::run(__PRETTY_FUNCTION__, grid, static_cast<unsigned>(threads), shared_bytes,
            [&] { call(kKernel, arguments...); });
}

template <auto kKernel>
bool admits(int) {
  return true;
}

struct Chip {
  int64_t processors, shared_bytes;
  int capability;
};

inline int number_asked(const char* variable, int otherwise) {
  const char* asked = std::getenv(variable);
  return asked ? std::atoi(asked) : otherwise;
}

/// Few processors, yet enough that work is split; SAFFRON_CUDA_HOST_PROCESSORS asks for more. It is
/// of capability 8.0 unless SAFFRON_CUDA_HOST_CAPABILITY says otherwise (90).
inline Chip chip() {
  return {number_asked("SAFFRON_CUDA_HOST_PROCESSORS", 6), 228 * 1024,
          number_asked("SAFFRON_CUDA_HOST_CAPABILITY", 80)};
}

inline uint64_t graph_of(Stream) { return 0; }

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  return static_cast<unsigned>((work + per_block - 1) / per_block);
}

}  // namespace saffron::cuda
