#pragma once

// Part of tree_attention: how a segment's result is written, and partial results are joined.

#include "cuda/attention/tile.cuh"

namespace saffron::cuda {
namespace {

constexpr float kLn2 = 0.6931471805599453f;

/// Puts the results of all warps into shared memory, for `store`.
template <class C>
__device__ __forceinline__ void stage_results(typename C::Shared& s, Warp<C>& own, int warp_m,
                                              int warp_n) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    own.total[r] += __shfl_xor_sync(0xffffffffu, own.total[r], 1);
    own.total[r] += __shfl_xor_sync(0xffffffffu, own.total[r], 2);
    const int row = warp_m * 16 + g + 8 * r;
    if (t == 0) {
      s.largest[warp_n][row] = own.largest[r];
      s.total[warp_n][row] = own.total[r];
    }
    float* to = s.out + (warp_n * C::kRows + row) * C::kFloatStride + 2 * t;
#pragma unroll
    for (int d = 0; d < C::kD / 8; ++d) {
      *reinterpret_cast<float2*>(to + 8 * d) =
          make_float2(own.acc[d][2 * r], own.acc[d][2 * r + 1]);
    }
  }
}

/// Writes four numbers of one row of the result; of a row that has seen nothing they are 0.
template <class C>
__device__ __forceinline__ void store_out(const Arguments& a, int kv_head, int row, int column,
                                          float4 x, bool nothing) {
  using T = typename C::T;
  if (column >= a.v_dim) return;
  if (C::kConvert && a.v_scale != nullptr && !nothing) {
    const float scale = a.v_scale[kv_head];
    x = make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
  }
  const int64_t query = row / a.group, head = kv_head * a.group + row % a.group;
  T* to = static_cast<T*>(a.out) + (query * a.kv_heads * a.group + head) * a.v_dim + column;
  *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
}

__device__ __forceinline__ void store_lse(const Arguments& a, int kv_head, int row,
                                          float log2_mass) {
  const int64_t query = row / a.group, head = kv_head * a.group + row % a.group;
  a.lse[query * a.kv_heads * a.group + head] = log2_mass * kLn2;
}

/// The logit that joins the softmax of a row, in base 2; -infinity where there is none.
__device__ __forceinline__ float sink_of(const Arguments& a, int kv_head, int row) {
  return a.sinks == nullptr ? -INFINITY : a.sinks[kv_head * a.group + row % a.group] * 1.44269504f;
}

/// The partial results of a group: of successive blocks, the first of them from its first or second
/// segment, which is `slot` among all, and from the first segment of the others.
struct Parts {
  int kv_head, query_block;
  int block, count;
  int slot;

  /// Where the rows of part number `i` lie, among those of all slots.
  template <class C>
  __device__ __forceinline__ int64_t rows_of(int i) const {
    return static_cast<int64_t>(i == 0 ? slot : 2 * (block + i)) * C::kRows;
  }
};

/// Writes what `stage_results` has put there: the result (`slot` below 0), or the partial result of
/// a segment.
template <class C>
__device__ __forceinline__ void store(const Arguments& a, const typename C::Shared& s, int slot,
                                      const Parts& parts, int rows) {
  constexpr int kColumns = C::kD / 4;
  const int kv_head = parts.kv_head, first_row = parts.query_block * C::kRows;
  for (int i = static_cast<int>(threadIdx.x); i < C::kRows * kColumns; i += C::kThreads) {
    const int row = i / kColumns, column = i % kColumns * 4;
    if (first_row + row >= rows) break;
    float largest = s.largest[0][row];
#pragma unroll
    for (int w = 1; w < C::kWarpsN; ++w) largest = fmaxf(largest, s.largest[w][row]);
    const bool nothing = largest == -INFINITY;
    const float sink = slot < 0 ? sink_of(a, kv_head, first_row + row) : -INFINITY;
    const float top = fmaxf(largest, sink), base = top == -INFINITY ? 0.f : top;
    float total = ptx::exp2(sink - base);
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int w = 0; w < C::kWarpsN; ++w) {
      const float weight = ptx::exp2(s.largest[w][row] - base);
      total += weight * s.total[w][row];
      const float4 x =
          *reinterpret_cast<const float4*>(s.out + (w * C::kRows + row) * C::kFloatStride + column);
      sum.x += weight * x.x;
      sum.y += weight * x.y;
      sum.z += weight * x.z;
      sum.w += weight * x.w;
    }
    // 1 / 0 where all scores that are seen are -infinity: the result is NaN.
    const float scale = nothing ? 0.f : 1.f / total;
    const float lse = total == 0.f ? -INFINITY : base + log2f(total);
    sum = make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
    if (slot < 0) {
      store_out<C>(a, kv_head, first_row + row, column, sum, nothing);
      if (column == 0) store_lse(a, kv_head, first_row + row, lse);
    } else {
      const int64_t place = static_cast<int64_t>(slot) * C::kRows + row;
      if (column == 0) {
        a.part_lse[place] = total == 0.f && !nothing ? kLowestSeen : lse;
      }
      // A row that saw nothing is not written: its lse says so, and nobody will read it.
      if (!nothing) *reinterpret_cast<float4*>(a.part + place * C::kD + column) = sum;
    }
  }
}

/// Joins the partial results of the rows `first .. first + kSlice` of a block of rows.
template <class C>
__device__ __forceinline__ void join(const Arguments& a, typename C::Shared& s, const Parts& parts,
                                     int first, int rows) {
  constexpr int kWarps = C::kWarpsM * C::kWarpsN, kColumns = C::kD / 4;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int kv_head = parts.kv_head, first_row = parts.query_block * C::kRows + first;
  for (int row = warp; row < C::kSlice && first_row + row < rows; row += kWarps) {
    const float* lse = a.part_lse + first + row;
    float largest = -INFINITY;
    for (int split = lane; split < parts.count; split += 32) {
      largest = fmaxf(largest, __ldcg(lse + parts.rows_of<C>(split)));
    }
    for (int step = 16; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    const float sink = sink_of(a, kv_head, first_row + row), top = fmaxf(largest, sink);
    const float base = top == -INFINITY ? 0.f : top;
    float total = 0.f;
    for (int split = lane; split < parts.count; split += 32) {
      const float weight = ptx::exp2(__ldcg(lse + parts.rows_of<C>(split)) - base);
      s.out[row * parts.count + split] = weight;
      total += weight;
    }
    for (int step = 16; step > 0; step /= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, step);
    }
    if (lane == 0) {
      const bool nothing = largest == -INFINITY && total == 0.f;  // else NaN
      total += ptx::exp2(sink - base);
      s.total[0][row] = nothing ? 0.f : 1.f / total;
      // Only of parts all of whose scores are -infinity.
      const bool empty = total == 0.f || (base == kLowestSeen && total == total);
      store_lse(a, kv_head, first_row + row, empty ? -INFINITY : base + log2f(total));
    }
  }
  C::sync();
  for (int i = static_cast<int>(threadIdx.x); i < C::kSlice * kColumns; i += C::kThreads) {
    const int row = i / kColumns, column = i % kColumns * 4;
    if (first_row + row >= rows) break;
    const float* weights = &s.out[row * parts.count];
    const float* part = a.part + static_cast<int64_t>(first + row) * C::kD + column;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int split = 0; split < parts.count; split += C::kTogether) {
      float weight[C::kTogether];
      float4 x[C::kTogether];  // all on their way before the first is used
#pragma unroll
      for (int j = 0; j < C::kTogether; ++j) {
        weight[j] = split + j < parts.count ? weights[split + j] : 0.f;
        x[j] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (weight[j] != 0.f) {  // else perhaps never written
          x[j] =
              __ldcg(reinterpret_cast<const float4*>(part + parts.rows_of<C>(split + j) * C::kD));
        }
      }
#pragma unroll
      for (int j = 0; j < C::kTogether; ++j) {
        sum.x += weight[j] * x[j].x;
        sum.y += weight[j] * x[j].y;
        sum.z += weight[j] * x[j].z;
        sum.w += weight[j] * x[j].w;
      }
    }
    const float scale = s.total[0][row];
    store_out<C>(a, kv_head, first_row + row, column,
                 make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale),
                 scale == 0.f);
  }
}

/// The value that thread 0 has.
template <class C>
__device__ __forceinline__ uint32_t from_thread_0(typename C::Shared& s, uint32_t value) {
  C::sync();
  if (threadIdx.x == 0) s.message = value;
  C::sync();
  return s.message;
}

/// Joins slices of a block of rows, all of whose partials are there, until none is left.
template <class C>
__device__ __forceinline__ void join_slices(const Arguments& a, typename C::Shared& s,
                                            const Parts& parts, int rows) {
  const int present = min(C::kRows, rows - parts.query_block * C::kRows);
  const uint32_t slices = static_cast<uint32_t>((present + C::kSlice - 1) / C::kSlice);
  while (true) {
    const uint32_t claim = threadIdx.x == 0 ? atomicAdd(&a.claimed[parts.block], 1u) : 0u;
    const uint32_t slice = from_thread_0<C>(s, claim);
    if (slice >= slices) return;
    join<C>(a, s, parts, static_cast<int>(slice) * C::kSlice, rows);
  }
}

}  // namespace
}  // namespace saffron::cuda
