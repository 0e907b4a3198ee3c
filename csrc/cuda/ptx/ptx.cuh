#pragma once

// Every PTX operation that kernels use, one function each. tests/kernels/cuda/host/cuda/ptx/ptx.cuh
// stands in for this file where kernels run on the CPU, and says in plain C++ what each function
// does.
//
// Source of the semantics and fragment layouts: NVIDIA, "Parallel Thread Execution ISA".

#include <cstdint>

namespace saffron::cuda::ptx {

// --- numbers ---

/// 2^x, to 2 units in the last place; subnormal results are 0.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x, to 1 unit in the last place; subnormal numbers count as 0.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Both rounded to nearest even; `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

/// Both products, rounded to nearest even; subnormal numbers stay.
__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t both;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(a), "r"(b), "r"(0x80008000u));  // a b - 0
  return both;
}

__device__ __forceinline__ uint32_t multiply_half(uint32_t a, uint32_t b) {
  uint32_t both;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
  return both;
}

/// The same number, of which the compiler does not know that it is: what is made of it is computed
/// again rather than kept in registers.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// --- memory between blocks ---

/// With an atomic operation of this thread behind it, a release; with one before it, an acquire.
/// For all of the block: a barrier before a release, and one after an acquire.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

/// Adds to a counter that blocks share, by one thread between two barriers of the block: what the
/// block wrote before is seen by whoever comes to the counter later, and it sees what those wrote
/// who came before. Returns the counter as it was.
__device__ __forceinline__ uint32_t arrive(uint32_t* counter, uint32_t value = 1) {
  fence();
  const uint32_t before = atomicAdd(counter, value);
  fence();
  return before;
}

/// What other blocks wrote before they released the value is seen after this.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// --- asynchronous copies, global to shared memory (sm_80) ---

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

/// Copies 16 bytes past the L1 cache, or writes zeros and does not look at `global`. Both 16-byte
/// aligned. The bytes are there for this thread after a wait, for others after a barrier besides.
__device__ __forceinline__ void copy16(void* shared, const void* global, bool read) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(read ? 16 : 0)
               : "memory");
}

/// What was copied since the last commit becomes one group.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until at most `kPending` groups of this thread, the latest ones, are still under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- tensor cores, one warp (sm_80) ---

/// Four 8x8 matrices of 16-bit numbers. Lane i gives the address of row i % 8 of matrix i / 8 (16
/// bytes, aligned) and gets elements 2 (i % 4) and the next of row i / 4 of every matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

/// The same with every matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

/// acc += a @ b, a 16x16, b 16x8, acc 16x8 in fp32. With g = lane / 4 and t = lane % 4:
/// a[0], a[1]: rows g and g + 8, columns 2t, 2t + 1; a[2], a[3]: the same rows, columns + 8;
/// b0, b1: rows 2t, 2t + 1 and these + 8, column g;
/// acc[0], acc[1]: row g, columns 2t, 2t + 1; acc[2], acc[3]: row g + 8.
__device__ __forceinline__ void mma_bf16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_half(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace saffron::cuda::ptx
