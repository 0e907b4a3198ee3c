#pragma once

// The PTX operations that only Hopper has (sm_90, `wgmma`: sm_90a), as cuda/ptx/ptx.cuh has those
// of all. tests/kernels/cuda/host/cuda/ptx/hopper.cuh stands in for this file where kernels run on
// the CPU.
//
// Source of the semantics and layouts: NVIDIA, "Parallel Thread Execution ISA", mbarrier,
// cp.async.bulk.tensor, wgmma; "CUDA C++ Programming Guide", tensor memory access, swizzling.

#include "cuda/ptx/ptx.cuh"
#include "cuda/ptx/tensor_map.cuh"

// A kernel that uses what is here has an empty body where this is 0.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SAFFRON_HOPPER 1
#else
#define SAFFRON_HOPPER 0
#endif

namespace saffron::cuda::ptx {

// --- barriers that count arrivals and bytes, in shared memory ---

/// A phase of the barrier is complete when `arrivals` threads have arrived and all bytes that were
/// expected have come. Called by one thread, before `fence_async` and a barrier of the block.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

/// What this thread wrote before is seen by those who wait for the phase.
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

/// Arrives, and has the phase wait for so many bytes of boxes besides.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

/// Has the phase wait for those copies of 16 bytes that this thread began before. It has to arrive
/// afterwards as well.
__device__ __forceinline__ void barrier_await_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

/// Waits until the phase of this parity is complete: 0 for the first, then 1, 0, ... Before the
/// first is complete, the one of parity 1 counts as complete.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (!complete) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

/// Waits until `kThreads` threads, whole warps, have come to barrier `kNumber` of the block, from 1
/// to 15.
template <int kNumber, int kThreads>
__device__ __forceinline__ void sync_some() {
  asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
}

/// From here on this warpgroup, all warps of which call it, has so many registers a thread: less
/// than it had, or, when others have given up theirs, more.
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// Boxes and `wgmma` access shared memory by another way ("proxy") than ordinary instructions and
/// copies of 16 bytes. What this thread knows to have been done by the one before this is seen by
/// the other after it.
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- boxes of a tensor, global to shared memory ---

/// Copies the box of a tensor that begins at (x, y, z), with zeros where the tensor ends, to
/// `shared`, a multiple of 128 bytes. A row of the box has 128 bytes; its 16 bytes number i lie at
/// place i ^ (address / 128 % 8) of the row. One thread calls it; `barrier` counts the bytes.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, int x, int y, int z,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
      : "memory");
}

/// The map will soon be used.
__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// --- tensor cores, four warps ---

/// Describes a matrix B of 16-bit numbers, k by n, in shared memory that begins at a multiple of 16
/// bytes. Its rows there have 128 bytes and are stored as `copy_box` stores them.
///
/// A row for every n, holding 64 of k: `stride` bytes from one 8 rows to the next; `leading`
/// unused. A row for every k, holding 64 of n (kTransposed below): `stride` bytes from one 8 rows
/// to the next; `leading` bytes from one 64 of n to the next.
__device__ __forceinline__ uint64_t matrix(const void* shared, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128Bytes = 1ull << 62;
  return kSwizzle128Bytes | static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 |
         static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
         (shared_address(shared) & 0x3ffff) >> 4;
}

/// What this thread did with registers comes before the products that follow. Needed before the
/// first product and whenever accumulators or A were touched.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

/// The products since the last commit become one group.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most `kPending` groups of this warp, the latest ones, are still under way. `acc`
/// is what they were adding to: before this it must not be touched, nor B be written.
template <int kPending, int kBlocks>
__device__ __forceinline__ void wgmma_wait(float (&acc)[kBlocks][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {  // the compiler reads nothing earlier
    asm volatile("" : "+f"(acc[i][0]), "+f"(acc[i][1]), "+f"(acc[i][2]), "+f"(acc[i][3])::"memory");
  }
}

#define SAFFRON_ACC(i) "+f"(acc[i][0]), "+f"(acc[i][1]), "+f"(acc[i][2]), "+f"(acc[i][3])
#define SAFFRON_ACC_4(i) \
  SAFFRON_ACC(i), SAFFRON_ACC((i) + 1), SAFFRON_ACC((i) + 2), SAFFRON_ACC((i) + 3)
#define SAFFRON_ACC_64 SAFFRON_ACC_4(0), SAFFRON_ACC_4(4)
#define SAFFRON_ACC_128 SAFFRON_ACC_64, SAFFRON_ACC_4(8), SAFFRON_ACC_4(12)
#define SAFFRON_WGMMA_64(type)                                                        \
  "{\n"                                                                               \
  ".reg .pred add;\n"                                                                 \
  "setp.ne.b32 add, %37, 0;\n"                                                        \
  "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                         \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
  "{%32, %33, %34, %35}, %36, add, 1, 1, %38;\n"                                      \
  "}"
#define SAFFRON_WGMMA_128(type)                                                       \
  "{\n"                                                                               \
  ".reg .pred add;\n"                                                                 \
  "setp.ne.b32 add, %69, 0;\n"                                                        \
  "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                        \
  " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
  "{%64, %65, %66, %67}, %68, add, 1, 1, %70;\n"                                      \
  "}"
#define SAFFRON_WGMMA(text, registers)                                                  \
  asm volatile(text                                                                     \
               : registers                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0), \
                 "n"(kTransposed ? 1 : 0))

/// acc = a @ b (+ acc), begun but not waited for: A 64 by 16, B 16 by 8 kBlocks, described by
/// `matrix`. Warp i of the warpgroup has rows 16 i to 16 i + 15 of A and acc, as fragments like
/// those of `mma_bf16`. All four warps begin the same products in the same order.
template <bool kTransposed, bool kAdd, int kBlocks>
__device__ __forceinline__ void wgmma_bf16(float (&acc)[kBlocks][4], const uint32_t (&a)[4],
                                           uint64_t b) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  if constexpr (kBlocks == 8) {
    SAFFRON_WGMMA(SAFFRON_WGMMA_64("bf16"), SAFFRON_ACC_64);
  } else {
    SAFFRON_WGMMA(SAFFRON_WGMMA_128("bf16"), SAFFRON_ACC_128);
  }
}

template <bool kTransposed, bool kAdd, int kBlocks>
__device__ __forceinline__ void wgmma_half(float (&acc)[kBlocks][4], const uint32_t (&a)[4],
                                           uint64_t b) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  if constexpr (kBlocks == 8) {
    SAFFRON_WGMMA(SAFFRON_WGMMA_64("f16"), SAFFRON_ACC_64);
  } else {
    SAFFRON_WGMMA(SAFFRON_WGMMA_128("f16"), SAFFRON_ACC_128);
  }
}

#undef SAFFRON_WGMMA
#undef SAFFRON_WGMMA_128
#undef SAFFRON_WGMMA_64
#undef SAFFRON_ACC_128
#undef SAFFRON_ACC_64
#undef SAFFRON_ACC_4
#undef SAFFRON_ACC

}  // namespace saffron::cuda::ptx
