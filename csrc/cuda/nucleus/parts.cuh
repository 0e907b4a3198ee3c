#pragma once

// Part of nucleus.cu: how the nucleus of a row is found, and what each part of a row does for it.
//
// A row is cut into parts of a fixed size, a block each, which reads its part once, into shared
// memory. Three steps, and blocks of a row meet between them:
//
// 1. The largest logit of every part and its sum of exponentials; together they are the row's.
// 2. With these every part puts into bins, by logit, the tokens that may be in the nucleus (the
//    others weigh less than 1 - top_p together), and tells the mass of each bin.
// 3. The last block to arrive adds up the bins of all parts. Before the bin in which the mass
//    reaches top_p all tokens are members; only the tokens of that bin are looked at one by one.
//
// No block depends on another that is not done: one that has waited for the row's sum in vain
// leaves the second step of its part to the last block.
//
// How a row is cut, and so how its sums are rounded, depends on nothing but the vocabulary and the
// dtype; the mass of tokens is added up in integers, whose sum does not depend on the order.

#include "cuda/common/entries.cuh"
#include "cuda/common/types.cuh"
#include "cuda/nucleus/peers.cuh"
#include "cuda/ops.h"

namespace saffron::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kVectors = 4;   // of 16 bytes, that a thread reads
constexpr int kHeld = 4096;   // tokens at the edge that fit shared memory; more stay in the lists
constexpr int kBins = 256;    // of a row, and of a round of the search at its edge
constexpr int kPairs = 128;   // tokens at the edge that are compared each with each
constexpr int kTogether = 4;  // loads under way before the first is used
constexpr int kMostParts = 128;  // of a row
constexpr int kPolls = 64;       // how often a block looks whether the row's sum is there
constexpr float kLog2e = 1.44269504f;
constexpr float kFarthest = 87.33f;  // below the largest logit; e^-x is a normal float up to here

// A row's counter counts three things: parts that are read, that are in bins, and blocks that are
// done.
constexpr uint32_t kField = 1 << 10, kRead = 1, kBinned = kField, kDone = kField * kField;
static_assert(kMostParts < kField, "fields");

template <class T>
constexpr int kPartTokens = kThreads * kVectors * Vector<T>::kSize;

/// What a block tells of its part.
struct alignas(16) Part {
  float largest;  // logit; -inf if there is none
  float sum;      // of e^(logit - largest); NaN if a logit is NaN or +inf
  int binned, unused;
};

/// The tokens of a part that may be in the nucleus, by bin.
struct Bins {
  uint64_t mass[kBins];
  int end[kBins];  // in the part's list, where tokens stand in order of their bins
};

struct Arguments {
  const void* logits;
  int64_t stride_row, stride_token;
  double top_p;
  const void* top_ps;  // [rows], or null: top_p for all
  int64_t stride_top_p;
  bool wide;              // top_ps in fp64
  const int32_t* banned;  // [rows, num_banned], -1 pads
  int64_t stride_banned_row, stride_banned;
  int num_banned;
  const int32_t* groups;  // null: every row takes part
  int64_t stride_groups;
  int num_groups;
  int vocab, parts;
  float mass_unit;    // mass in integers, per e^(logit - largest)
  Part* part;         // [rows, parts]
  Bins* bins;         // [rows, parts]
  Entry* listed;      // [rows, vocab]; part i of a row lists from its first token on
  uint32_t* counter;  // [rows]
  NucleusLists found;
  float2* stats;  // [rows] largest logit, sum of e^(logit - largest); or null
  int32_t* fault;
};

__device__ __forceinline__ double top_p_of(const Arguments& a, int64_t row) {
  const int64_t at = row * a.stride_top_p;
  if (a.top_ps == nullptr) return a.top_p;
  return a.wide ? static_cast<const double*>(a.top_ps)[at]
                : static_cast<double>(static_cast<const float*>(a.top_ps)[at]);
}

/// The logarithm to base 2 of half of the bound on a token outside the nucleus, and nothing near
/// top_p = 1 (-inf): rounding must not decide. Tokens below it weigh less than 1 - top_p together.
__device__ __forceinline__ float log2_least(const Arguments& a, int64_t row) {
  const auto least = static_cast<float>(0.5 * (1 - top_p_of(a, row) - 1e-4) / a.vocab);
  return least > 0.f ? log2f(least) : -INFINITY;
}

/// Pieces of the lists of all parts of a row, put together.
struct Pieces {
  int start[kMostParts + 1];  // of a part's piece among all
  int from[kMostParts];       // where the piece begins in the part's list
};

struct Shared {
  alignas(16) Entry space[kHeld + 2];  // the part, at first up to 14 bytes behind; later the edge
  Entry edge[kPairs];
  uint64_t edge_mass[kPairs];
  uint32_t bin_low[kBins], bin_high[kBins];  // halves of the mass
  int bin_end[kBins];
  float by_warp[2][kWarps];
  Pieces members, at_edge;
  uint64_t above;  // mass before the edge
  double sum;      // of the row
  float largest;
  uint32_t seen;  // of the row's counter
  int count, edge_bin, found;
};
static_assert(sizeof(Shared::space) == (kThreads * kVectors + 1) * 16, "a part fits");

// --- a part ---

template <class T>
__device__ __forceinline__ T no_logit();
template <>
__device__ __forceinline__ float no_logit<float>() {
  return -INFINITY;
}
template <>
__device__ __forceinline__ BFloat16 no_logit<BFloat16>() {
  return {0xff80};
}
template <>
__device__ __forceinline__ Float16 no_logit<Float16>() {
  return {0xfc00};
}

/// Brings a part to shared memory. Beyond the vocabulary and where a token is banned lies -inf.
/// A part that begins between vectors (rows of an odd vocabulary) arrives as far behind as it does
/// in memory, vectors in between and single tokens before and after, and is then moved to the
/// front.
template <class T>
__device__ __forceinline__ void fetch(const Arguments& a, Shared& s, int64_t row_index, int index) {
  constexpr int kSize = Vector<T>::kSize, kWords = kVectors * 4;  // of a thread
  const int thread = static_cast<int>(threadIdx.x), first = index * kPartTokens<T>;
  const T* row = static_cast<const T*>(a.logits) + row_index * a.stride_row;
  const int there = min(kPartTokens<T>, a.vocab - first);
  const bool dense = a.stride_token == 1;
  const int behind = dense ? static_cast<int>(reinterpret_cast<uintptr_t>(row + first) % 16) : 0;
  const int before = (16 - behind) % 16 / static_cast<int>(sizeof(T));   // tokens before a vector
  const int whole = dense ? max(there - before, 0) / kSize * kSize : 0;  // tokens in vectors
  T* part = reinterpret_cast<T*>(s.space) + behind / static_cast<int>(sizeof(T));
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const int i = (u * kThreads + thread) * kSize;
    if (i < whole) ptx::copy16(part + before + i, row + first + before + i, true);
  }
  for (int i = thread; i < kPartTokens<T> - whole; i += kThreads) {
    const int at = i < before ? i : i + whole;
    part[at] = at < there ? row[(first + at) * a.stride_token] : no_logit<T>();
  }
  ptx::copy_commit();
  ptx::copy_wait<0>();
  __syncthreads();
  if (behind != 0) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(s.space);
    uint32_t own[kWords];
#pragma unroll
    for (int u = 0; u < kWords; ++u) {
      const uint32_t* from = words + u * kThreads + thread + behind / 4;
      own[u] = __funnelshift_r(from[0], from[1], static_cast<unsigned>(behind) % 4 * 8);
    }
    __syncthreads();
#pragma unroll
    for (int u = 0; u < kWords; ++u) {
      reinterpret_cast<uint32_t*>(s.space)[u * kThreads + thread] = own[u];
    }
    __syncthreads();
    part = reinterpret_cast<T*>(s.space);
  }
  if (a.num_banned == 0) return;
#pragma unroll 1
  for (int i = thread; i < a.num_banned; i += kThreads) {
    const int token = a.banned[row_index * a.stride_banned_row + i * a.stride_banned];
    if (token < -1 || token >= a.vocab) {
      atomicOr(a.fault, kBannedFault);
    } else if (token >= first && token - first < there) {
      part[token - first] = no_logit<T>();
    }
  }
  __syncthreads();
}

/// The largest of all threads' numbers, which lie in `by_warp` meanwhile.
__device__ __forceinline__ float largest_of(float (&by_warp)[kWarps], float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) x = fmaxf(x, by_warp[w]);
  return x;
}

/// Their sum, in an order that is always the same.
__device__ __forceinline__ float sum_of(float (&by_warp)[kWarps], float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) x += by_warp[w];
  return x;
}

/// The largest logit of a part in shared memory, and its sum.
template <class T>
__device__ __forceinline__ Part measure(Shared& s) {
  constexpr int kSize = Vector<T>::kSize;
  const Vector<T>* x = reinterpret_cast<const Vector<T>*>(s.space) + threadIdx.x;
  float largest = -INFINITY, sum = 0.f;
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const Vector<T> own = x[u * kThreads];
#pragma unroll
    for (int j = 0; j < kSize; ++j) largest = fmaxf(largest, to_float(own.values[j]));
  }
  largest = largest_of(s.by_warp[0], largest);
  const float base = largest == -INFINITY ? 0.f : largest;
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const Vector<T> own = x[u * kThreads];
    float some = 0.f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      some += ptx::exp2((to_float(own.values[j]) - base) * kLog2e);
    }
    sum += some;
  }
  return {largest, sum_of(s.by_warp[1], sum), 0, 0};
}

/// The largest logit and the sum of a row of which every part is read.
__device__ __forceinline__ void join_parts(const Arguments& a, Shared& s, int64_t row) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 32) {
    float top[kMostParts / 32], part_sum[kMostParts / 32], largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kMostParts / 32; ++j) {
      const int i = j * 32 + lane;
      top[j] = -INFINITY, part_sum[j] = 0.f;
      if (i < a.parts) {
        const float2 x = __ldcg(reinterpret_cast<const float2*>(a.part + row * a.parts + i));
        top[j] = x.x, part_sum[j] = x.y;
      }
      largest = fmaxf(largest, top[j]);
    }
    for (int step = 16; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    double sum = 0;
#pragma unroll
    for (int j = 0; j < kMostParts / 32; ++j) {
      if (part_sum[j] != 0.f) sum += static_cast<double>(part_sum[j]) * e_to(top[j] - largest);
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0) s.largest = largest, s.sum = sum;
  }
  __syncthreads();
}

__device__ __forceinline__ bool good(const Shared& s) {
  return s.largest > -INFINITY && s.sum == s.sum;
}

__device__ __forceinline__ uint64_t mass(const Arguments& a, const Shared& s, float logit) {
  return static_cast<uint64_t>(e_to(logit - s.largest) * a.mass_unit);
}

/// Adds to a bin. Shared memory has atomics of 32 bits only: the carry goes along.
__device__ __forceinline__ void add(Shared& s, int bin, uint64_t mass) {
  const uint32_t low = static_cast<uint32_t>(mass);
  const uint32_t carry = atomicAdd(&s.bin_low[bin], low) > ~low ? 1 : 0;
  atomicAdd(&s.bin_high[bin], static_cast<uint32_t>(mass >> 32) + carry);
}

/// Adds what every lane of a warp has to its bin: of two bins by lanes together, of others each.
__device__ __forceinline__ void add_all(Shared& s, int bin, uint64_t mass) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Peers peers(bin);
    const uint64_t together = peers.sum(mass);
    if (bin >= 0 && peers.leads()) add(s, bin, together);
    if (peers.has_this_lane()) bin = -1;
  }
  if (bin >= 0) add(s, bin, mass);
}

/// Puts a part in shared memory into the bins of its row, and lists the tokens by bin.
template <class T>
__device__ __forceinline__ void fill_bins(const Arguments& a, Shared& s, int64_t row, int index) {
  constexpr int kSize = Vector<T>::kSize;
  const int thread = static_cast<int>(threadIdx.x);
  // No token farther from the largest than this is in the nucleus. Bins are equal shares of it.
  const float log2_lost = -log2_least(a, row) - log2f(static_cast<float>(s.sum));
  const float span = fminf(log2_lost / kLog2e, kFarthest);
  const float scale = kBins / span;
  const T* part = reinterpret_cast<const T*>(s.space);
  uint32_t near = 0;  // a bit for each of this thread's tokens
  static_assert(kVectors * kSize <= 32, "bits");
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const auto own = reinterpret_cast<const Vector<T>*>(part)[u * kThreads + thread];
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      near |= s.largest - to_float(own.values[j]) <= span ? 1u << (u * kSize + j) : 0u;
    }
  }
  const auto each = [&](auto visit) {  // by whole warps: below 0 is the bin of no token
    for (uint32_t rest = near; __any_sync(0xffffffffu, rest != 0); rest &= rest - 1) {
      const int k = rest != 0 ? __ffs(static_cast<int>(rest)) - 1 : 0;
      const int i = (k / kSize * kThreads + thread) * kSize + k % kSize;
      const float logit = to_float(part[i]);
      const int bin = min(static_cast<int>((s.largest - logit) * scale), kBins - 1);
      visit(rest != 0 ? bin : -1, logit, i);
    }
  };
  if (thread < kBins) s.bin_low[thread] = s.bin_high[thread] = 0, s.bin_end[thread] = 0;
  __syncthreads();
  each([&](int bin, float logit, int) {
    add_all(s, bin, mass(a, s, logit));
    Peers(bin).count(s.bin_end, bin);
  });
  __syncthreads();
  if (thread < 32) {  // where the bins begin
    int own[kBins / 32], through = 0;
#pragma unroll
    for (int j = 0; j < kBins / 32; ++j) through += own[j] = s.bin_end[thread * (kBins / 32) + j];
    int before = -through;
    for (unsigned step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, through, step);
      if (thread >= static_cast<int>(step)) through += other;
    }
    before += through;
#pragma unroll
    for (int j = 0; j < kBins / 32; ++j) {
      s.bin_end[thread * (kBins / 32) + j] = before;
      before += own[j];
    }
  }
  __syncthreads();
  const int first = index * kPartTokens<T>;
  Entry* list = a.listed + row * a.vocab + first;
  each([&](int bin, float logit, int i) {
    const int place = Peers(bin).count(s.bin_end, bin);
    if (bin >= 0) list[place] = entry(logit, first + i);
  });
  __syncthreads();
  if (thread < kBins) {
    Bins& bins = a.bins[row * a.parts + index];
    bins.mass[thread] = static_cast<uint64_t>(s.bin_high[thread]) << 32 | s.bin_low[thread];
    bins.end[thread] = s.bin_end[thread];
  }
}

}  // namespace
}  // namespace saffron::cuda
