// Kernels with a mistake each: what executing kernels on the CPU has to find. The same kernel
// without its mistake (`right`) has to pass.

#include <cstdio>
#include <stdexcept>

#include "cuda/common/launch.cuh"
#include "cuda/ptx/ptx.cuh"

namespace saffron::cuda {
namespace {

constexpr int kThreads = 64;

struct Numbers {
  alignas(16) int of[kThreads + 4];
};

/// Every thread writes its number and reads its neighbour's.
__global__ void missing_barrier_kernel(int* out, bool right) {
  auto& s = shared<Numbers>();
  const int i = static_cast<int>(threadIdx.x);
  s.of[i] = i + 1;
  if (right) __syncthreads();
  out[i] = s.of[(i + 1) % kThreads];
}

/// The sum of all threads' numbers, read and written in two steps.
__global__ void lost_update_kernel(int* out, bool right) {
  if (right) {
    atomicAdd(out, 1);
  } else {
    const int before = *out;
    __threadfence();
    *out = before + 1;
  }
}

/// Reads a copy that it has not waited for.
__global__ void missing_wait_kernel(int* out, const int* in, bool right) {
  auto& s = shared<Numbers>();
  const int i = static_cast<int>(threadIdx.x);
  if (i < kThreads / 4) {
    ptx::copy16(&s.of[4 * i], in + 4 * i, true);
    ptx::copy_commit();
    if (right) ptx::copy_wait<0>();
  }
  __syncthreads();
  out[i] = s.of[i];
  if (!right) ptx::copy_wait<0>();
}

/// Half of the threads go past a barrier.
__global__ void uneven_barrier_kernel(int* out, bool right) {
  const int i = static_cast<int>(threadIdx.x);
  if (right || i % 2) __syncthreads();
  if (!right) __syncwarp();
  out[i] = i;
}

/// A shuffle that only some lanes of its mask take part in.
__global__ void missing_lanes_kernel(int* out, bool right) {
  const int i = static_cast<int>(threadIdx.x);
  out[i] = i;
  if (right || i < 7) out[i] = __shfl_xor_sync(0xffffffffu, i, 1);
}

/// A copy from an address that is not aligned.
__global__ void crooked_copy_kernel(int* out, const int* in, bool right) {
  auto& s = shared<Numbers>();
  if (threadIdx.x == 0) ptx::copy16(s.of, in + (right ? 4 : 1), true);
  ptx::copy_commit();
  ptx::copy_wait<0>();
  __syncthreads();
  out[threadIdx.x] = s.of[0];
}

void launch_one(int which, int* out, const int* in, bool right) {
  constexpr size_t bytes = sizeof(Numbers);
  const dim3 one(1);
  if (which == 0) launch<missing_barrier_kernel>(one, kThreads, bytes, 0, out, right);
  if (which == 1) launch<lost_update_kernel>(one, kThreads, bytes, 0, out, right);
  if (which == 2) launch<missing_wait_kernel>(one, kThreads, bytes, 0, out, in, right);
  if (which == 3) launch<uneven_barrier_kernel>(one, kThreads, bytes, 0, out, right);
  if (which == 4) launch<missing_lanes_kernel>(one, kThreads, bytes, 0, out, right);
  if (which == 5) launch<crooked_copy_kernel>(one, kThreads, bytes, 0, out, in, right);
}

}  // namespace
}  // namespace saffron::cuda

/// Runs kernel `which`; false and a message if the executor finds something.
extern "C" __attribute__((visibility("default"))) bool run(int which, int* out, const int* in,
                                                           bool right, char* message) {
  try {
    saffron::cuda::launch_one(which, out, in, right);
    return true;
  } catch (const std::runtime_error& error) {
    std::snprintf(message, 200, "%s", error.what());
    return false;
  }
}
