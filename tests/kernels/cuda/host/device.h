#pragma once

// What nvcc knows by itself, for a C++ compiler: so that the kernels of csrc/cuda run on the CPU.
// It is included before everything else (-include device.h), and cuda/common/launch.cuh and
// cuda/ptx/ptx.cuh next to it take the place of those in csrc. scheduler.h says how threads run.
//
// Only what the kernels use is here. A collective whose lanes do not all come, or a barrier that
// not all threads reach, is an error.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (host::current().thread_index)
#define blockIdx (host::current().block->index)
#define blockDim (host::current().block->threads)
#define gridDim (host::current().block->grid)

using host::dim3;

struct alignas(8) int2 {
  int32_t x, y;
};
struct int3 {
  int32_t x, y, z;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

// --- bits and numbers ---

template <class To, class From>
To host_cast(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __uint_as_float(uint32_t x) { return host_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return host_cast<uint32_t>(x); }
inline float __int_as_float(int32_t x) { return host_cast<float>(x); }
inline int32_t __float_as_int(float x) { return host_cast<int32_t>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(uint64_t x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __brev(uint32_t x) {
  uint32_t y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
/// Byte i of the result is the byte of `y:x` that the i-th four bits of `selector` name.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
/// The lower word of `high:low` shifted right by less than 32 bits.
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
template <class T>
T __ldg(const T* address) {
  return *address;
}

template <class T>
T __ldcg(const T* address) {
  return *address;
}

// --- barriers and warp collectives ---

inline void __syncthreads() { host::block_barrier(); }
inline int __syncthreads_or(int predicate) { return host::block_count(predicate != 0) > 0; }
inline int __syncthreads_and(int predicate) { return host::block_count(predicate == 0) == 0; }
inline int __syncthreads_count(int predicate) { return host::block_count(predicate != 0); }

namespace host {

constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T>
struct Exchange {
  T given, taken;
  int source;  // lane
};

/// Every lane of `mask` gives a value and takes that of its source lane.
template <class T>
T exchange(unsigned mask, T value, int source) {
  Exchange<T> own{value, value, source};
  collective(mask, &own, "shuffle", [](void** lanes, unsigned present) {
    for (int i = 0; i < 32; ++i) {
      if (!(present >> i & 1)) continue;
      auto* lane = static_cast<Exchange<T>*>(lanes[i]);
      if (present >> lane->source & 1) {
        lane->taken = static_cast<Exchange<T>*>(lanes[lane->source])->given;
      } else {
        fail("a shuffle reads a lane that is not in its mask");
      }
    }
  });
  return own.taken;
}

/// What `combine` makes of the values of all lanes of the mask.
template <class T, class Combine>
T reduce(unsigned mask, T value, Combine) {
  struct Lane {
    T value, result;
  } own{value, value};
  collective(mask, &own, "reduction", [](void** lanes, unsigned present) {
    bool first = true;
    T all{};
    for (int i = 0; i < 32; ++i) {
      if (!(present >> i & 1)) continue;
      const T x = static_cast<Lane*>(lanes[i])->value;
      all = first ? x : Combine{}(all, x);
      first = false;
    }
    for (int i = 0; i < 32; ++i) {
      if (present >> i & 1) static_cast<Lane*>(lanes[i])->result = all;
    }
  });
  return own.result;
}

struct Least {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Most {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};

inline int lane_of_thread() { return static_cast<int>(current().lane); }

}  // namespace host

inline void __syncwarp(unsigned mask = host::kWholeWarp) {
  int nothing = 0;
  host::collective(mask, &nothing, "syncwarp", [](void**, unsigned) {});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = host::lane_of_thread();
  return host::exchange(mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int = 32) {
  return host::exchange(mask, value, host::lane_of_thread() ^ with);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = host::lane_of_thread(), own = lane & (width - 1);
  return host::exchange(mask, value,
                        own >= static_cast<int>(by) ? lane - static_cast<int>(by) : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = host::lane_of_thread(), own = lane & (width - 1);
  return host::exchange(mask, value,
                        own + static_cast<int>(by) < width ? lane + static_cast<int>(by) : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = predicate ? 1u << host::lane_of_thread() : 0u;
  return host::reduce(mask, bit, std::bit_or<unsigned>());
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate == 0) == 0;
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return host::reduce(mask, value, std::plus<T>());
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return host::reduce(mask, value, host::Least());
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return host::reduce(mask, value, host::Most());
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return host::reduce(mask, value, std::bit_or<unsigned>());
}

// --- memory that blocks share ---

inline void __threadfence() { host::may_switch(); }
inline void __threadfence_block() { host::may_switch(); }

namespace host {

/// Threads change places only where one waits or here, so nothing comes between reading and
/// writing.
template <class T, class Change>
T atomic(T* address, Change change) {
  may_switch();
  ++atomics_done;
  const T before = *address;
  *address = change(before);
  told(address);
  return before;
}

}  // namespace host

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return host::atomic(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicOr(T* address, std::common_type_t<T> value) {
  return host::atomic(address, [&](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicAnd(T* address, std::common_type_t<T> value) {
  return host::atomic(address, [&](T old) { return static_cast<T>(old & value); });
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  return host::atomic(address, [&](T old) { return std::min(old, value); });
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return host::atomic(address, [&](T old) { return std::max(old, value); });
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return host::atomic(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  return host::atomic(address, [&](T old) { return old == compare ? value : old; });
}
