#pragma once

// Part of tree_attention: how a unit's result is written, and partial results are joined.

#include "cuda/attention/tile.cuh"

namespace saffron::cuda {
namespace {

constexpr float kLn2 = 0.6931471805599453f;

/// Lays the results of all warps down in shared memory, for `store`.
template <class C>
__device__ __forceinline__ void lay_down(typename C::Shared& s, Warp<C>& own, int warp_m,
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

/// Writes four numbers of one row of the result.
template <class C>
__device__ __forceinline__ void store_out(const Arguments& a, int kv_head, int row, int column,
                                          float4 x) {
  using T = typename C::T;
  if (column >= a.head_dim) return;
  if (C::kConvert && a.v_scale != nullptr) {
    const float scale = a.v_scale[kv_head];
    x = make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
  }
  const int64_t query = row / a.group, head = kv_head * a.group + row % a.group;
  T* to = static_cast<T*>(a.out) + (query * a.kv_heads * a.group + head) * a.head_dim + column;
  *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(x.x, x.y), pack<T>(x.z, x.w));
}

__device__ __forceinline__ void store_lse(const Arguments& a, int kv_head, int row,
                                          float log2_mass) {
  const int64_t query = row / a.group, head = kv_head * a.group + row % a.group;
  a.lse[query * a.kv_heads * a.group + head] = log2_mass * kLn2;
}

/// Writes what `lay_down` laid down: the result, or the partial result of a unit.
template <class C>
__device__ __forceinline__ void store(const Arguments& a, const typename C::Shared& s, int64_t unit,
                                      int kv_head, int first_row, int rows) {
  constexpr int kColumns = C::kD / 4;
  for (int i = static_cast<int>(threadIdx.x); i < C::kRows * kColumns; i += C::kThreads) {
    const int row = i / kColumns, column = i % kColumns * 4;
    if (first_row + row >= rows) break;
    float largest = s.largest[0][row];
#pragma unroll
    for (int w = 1; w < C::kWarpsN; ++w) largest = fmaxf(largest, s.largest[w][row]);
    const float base = largest == -INFINITY ? 0.f : largest;
    float total = 0.f;
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
    const bool nothing = total == 0.f;
    const float scale = nothing ? 0.f : 1.f / total;
    const float lse = nothing ? -INFINITY : base + log2f(total);
    sum = make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
    if (a.splits == 1) {
      store_out<C>(a, kv_head, first_row + row, column, sum);
      if (column == 0) store_lse(a, kv_head, first_row + row, lse);
    } else {
      const int64_t place = unit * C::kRows + row;
      if (column == 0) a.part_lse[place] = lse;
      // A row that saw nothing is not written: its lse says so, and nobody will read it.
      if (!nothing) *reinterpret_cast<float4*>(a.part + place * C::kD + column) = sum;
    }
  }
}

/// Joins the partial results of the rows `first .. first + kSlice` of a block of rows.
template <class C>
__device__ __forceinline__ void join(const Arguments& a, typename C::Shared& s, int group_index,
                                     int first, int rows) {
  constexpr int kWarps = C::kWarpsM * C::kWarpsN, kColumns = C::kD / 4;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int kv_head = group_index / a.query_blocks, block = group_index % a.query_blocks;
  const int first_row = block * C::kRows + first;
  const int64_t groups = static_cast<int64_t>(a.kv_heads) * a.query_blocks;
  for (int row = warp; row < C::kSlice && first_row + row < rows; row += kWarps) {
    const float* lse = a.part_lse + static_cast<int64_t>(group_index) * C::kRows + first + row;
    float largest = -INFINITY;
    for (int split = lane; split < a.splits; split += 32) {
      largest = fmaxf(largest, __ldcg(lse + split * groups * C::kRows));
    }
    for (int step = 16; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    const float base = largest == -INFINITY ? 0.f : largest;
    float total = 0.f;
    for (int split = lane; split < a.splits; split += 32) {
      const float weight = ptx::exp2(__ldcg(lse + split * groups * C::kRows) - base);
      s.out[row * a.splits + split] = weight;
      total += weight;
    }
    for (int step = 16; step > 0; step /= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, step);
    }
    if (lane == 0) {
      s.total[0][row] = total == 0.f ? 0.f : 1.f / total;
      store_lse(a, kv_head, first_row + row, total == 0.f ? -INFINITY : base + log2f(total));
    }
  }
  C::sync();
  for (int i = static_cast<int>(threadIdx.x); i < C::kSlice * kColumns; i += C::kThreads) {
    const int row = i / kColumns, column = i % kColumns * 4;
    if (first_row + row >= rows) break;
    const float* weights = &s.out[row * a.splits];
    const int64_t place = static_cast<int64_t>(group_index) * C::kRows + first + row;
    const float* part = a.part + place * C::kD + column;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int split = 0; split < a.splits; split += C::kTogether) {
      float weight[C::kTogether];
      float4 x[C::kTogether];  // all on their way before the first is used
#pragma unroll
      for (int j = 0; j < C::kTogether; ++j) {
        weight[j] = split + j < a.splits ? weights[split + j] : 0.f;
        x[j] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (weight[j] != 0.f) {  // else perhaps never written
          x[j] = __ldcg(
              reinterpret_cast<const float4*>(part + (split + j) * groups * C::kRows * C::kD));
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
                 make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale));
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
                                            int group_index, int rows) {
  const int present = min(C::kRows, rows - group_index % a.query_blocks * C::kRows);
  const uint32_t slices = static_cast<uint32_t>((present + C::kSlice - 1) / C::kSlice);
  while (true) {
    const uint32_t claim = threadIdx.x == 0 ? atomicAdd(&a.claimed[group_index], 1u) : 0u;
    const uint32_t slice = from_thread_0<C>(s, claim);
    if (slice >= slices) return;
    join<C>(a, s, group_index, static_cast<int>(slice) * C::kSlice, rows);
  }
}

}  // namespace
}  // namespace saffron::cuda
