// A kernel with boxes and products of a warpgroup, right or with one mistake: what executing it on
// the CPU has to find.

#include <cstdio>
#include <stdexcept>

#include "cuda/common/launch.cuh"
#include "cuda/ptx/hopper.cuh"

namespace saffron::cuda {
namespace {

constexpr int kThreads = 128, kRows = 64, kColumns = 64;

/// In the order of MISTAKES in test_cuda_host.py.
enum Mistake : int {
  kInitNotFenced,
  kCopiesNotFenced,
  kStoresNotFenced,
  kTooFewBytes,
  kTooManyArrive,
  kOneDoesNotArrive,
  kNotAwaited,
  kNotSwizzled,
  kWrongStride,
  kWrongLeading,
  kNoRegisterFence,
  kProductNotAwaited,
  kOverwritten,
  kThreeWarps,
  kCrookedBox,
  kRight,
};

struct Shared {
  alignas(1024) uint16_t copied[kRows * kColumns], boxed[2][kRows * kColumns];
  alignas(8) uint64_t copies, boxes;
};

/// acc += 64 rows of ones and twos @ B, of which `transposed` says how it lies.
template <bool kTransposed, int kBlocks>
__device__ void multiply(float (&acc)[kBlocks][4], const uint16_t* b, uint32_t leading,
                         uint32_t stride) {
  const uint32_t one = 0x3f80, two = 0x4000;
  const uint32_t a[4] = {one | two << 16, two | one << 16, one | one << 16, two | two << 16};
  for (int step = 0; step < 4; ++step) {
    const uint16_t* at = b + step * (kTransposed ? 16 * kColumns : 16);
    ptx::wgmma_bf16<kTransposed, true>(acc, a, ptx::matrix(at, leading, stride));
  }
}

/// B arrives row by row, then as a box after it was overwritten; both are multiplied, as they lie
/// and transposed. `out` gets a weighted sum of every thread's results.
__global__ void product_kernel(float* out, const uint16_t* in, const TensorMap map, Mistake wrong) {
  auto& s = shared<Shared>();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    ptx::barrier_init(&s.copies, kThreads);
    ptx::barrier_init(&s.boxes, 1);
    if (wrong != kInitNotFenced) ptx::fence_async();
  }
  __syncthreads();

  for (int i = thread; i < kRows * kColumns / 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    const int place = wrong == kNotSwizzled ? chunk : chunk ^ row % 8;
    ptx::copy16(&s.copied[row * kColumns + place * 8], in + row * kColumns + chunk * 8, true);
  }
  ptx::barrier_await_copies(&s.copies);
  if (wrong != kOneDoesNotArrive || thread != 5) ptx::barrier_arrive(&s.copies);
  if (wrong == kTooManyArrive && thread == 5) ptx::barrier_arrive(&s.copies);
  ptx::barrier_wait(&s.copies, 0);
  if (wrong != kCopiesNotFenced) ptx::fence_async();

  for (int parity = 0; parity < 2; ++parity) {  // two boxes, one after the other
    if (thread == 0) {
      const uint32_t bytes = sizeof(s.boxed) - (wrong == kTooFewBytes ? 16 : 0);
      ptx::barrier_arrive_expecting(&s.boxes, bytes);
      for (int half = 0; half < 2; ++half) {
        ptx::copy_box(s.boxed[half] + (wrong == kCrookedBox ? 8 : 0), map, 0, 0, 0, &s.boxes);
      }
    }
    if (wrong != kNotAwaited || parity == 0) ptx::barrier_wait(&s.boxes, parity);
    if (parity == 1) break;
    __syncthreads();
    s.boxed[0][thread] = 7;
    __syncthreads();
    if (wrong != kStoresNotFenced) ptx::fence_async();
    __syncthreads();
  }

  float as_it_lies[8][4] = {}, transposed[16][4] = {};
  if (wrong == kThreeWarps && thread >= 96) return;
  if (wrong != kNoRegisterFence) ptx::wgmma_fence();
  multiply<false>(as_it_lies, s.copied, 0, wrong == kWrongStride ? 512 : 1024);
  multiply<true>(transposed, s.boxed[0], wrong == kWrongLeading ? 1024 : sizeof(s.boxed[0]), 1024);
  ptx::wgmma_commit();
  if (wrong == kOverwritten) s.copied[thread] = 0x3f80;
  if (wrong != kProductNotAwaited) {
    ptx::wgmma_wait<0>(as_it_lies);
    ptx::wgmma_wait<0>(transposed);
  }
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<float>(i + 1) * as_it_lies[i / 4][i % 4];
  for (int i = 0; i < 64; ++i) sum += static_cast<float>(i + 1) * transposed[i / 4][i % 4];
  out[thread] = sum;
}

}  // namespace
}  // namespace saffron::cuda

/// Runs the kernel on `in` `[64, 64]`, small numbers; false and a message if the executor finds
/// something.
extern "C" __attribute__((visibility("default"))) bool run(int wrong, float* out,
                                                           const uint16_t* in, char* message) {
  using namespace saffron::cuda;
  try {
    TensorMap map;
    if (!encode(map, in, {kColumns, 1, kRows}, {2 * kColumns, 2 * kColumns}, {64, 1, kRows})) {
      throw std::runtime_error("the map is refused");
    }
    launch<product_kernel>(dim3(1), kThreads, sizeof(Shared), 0, out, in, map,
                           static_cast<Mistake>(wrong));
    return true;
  } catch (const std::runtime_error& error) {
    std::snprintf(message, 200, "%s", error.what());
    return false;
  }
}

/// Whether a tensor map would be accepted: address, strides of the outer dimensions in bytes, box.
extern "C" __attribute__((visibility("default"))) bool accepted(uintptr_t address, int64_t inner,
                                                                int64_t outer, int width,
                                                                int depth) {
  saffron::cuda::TensorMap map;
  return encode(map, reinterpret_cast<const void*>(address), {64, 4, 100}, {inner, outer},
                {width, 1, depth});
}
