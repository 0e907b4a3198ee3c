#pragma once

// Part of tree_attention: the kernel that multiplies with `mma.sync`, on every device. Compiled
// file by file for the types of the products and of the caches, side by side: mma_*.cu.

#include "cuda/attention/choose.cuh"
#include "cuda/attention/join.cuh"
#include "cuda/attention/tile.cuh"
#include "cuda/attention/work.cuh"

namespace saffron::cuda {
namespace {

/// Leaves the result of a segment in `s.out`.
template <class C>
__device__ __forceinline__ void attend_segment(const Arguments& a, typename C::Shared& s,
                                               const Segment& segment) {
  const int kv_head = segment.kv_head, first_row = segment.query_block * C::kRows;
  const int rows = a.queries * a.group;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_m = warp % C::kWarpsM, warp_n = warp / C::kWarpsM;
  Warp<C> own;
#pragma unroll
  for (int d = 0; d < C::kD / 8; ++d) {
#pragma unroll
    for (int i = 0; i < 4; ++i) own.acc[d][i] = 0.f;
  }
  const int warp_row = first_row + warp_m * 16;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    own.largest[r] = -INFINITY;
    own.total[r] = 0.f;
    own.query[r] = (warp_row + lane / 4 + 8 * r) / a.group;
  }
  if constexpr (C::kConvert) {  // else a.scale, which would cost a register here
    own.scale = a.k_scale != nullptr ? a.scale * a.k_scale[kv_head] : a.scale;
  }
  own.first_query = warp_row / a.group;
  own.last_query = warp_row < rows ? (min(warp_row + 16, rows) - 1) / a.group : -1;
  const int low = first_row / a.group, high = (min(first_row + C::kRows, rows) - 1) / a.group;

  fetch_q<C>(a, s, kv_head, first_row, rows);
  ptx::copy_commit();
  auto& plan = schedule_of<C>(s);
  if (a.query_blocks > 1) {
    if (warp == 0) Tokens::list(a, plan, segment);
    __syncthreads();
  }
  const Tokens tokens(a, plan, segment);
  constexpr int kAhead = C::kConvert ? C::kStages : C::kStages - 1;  // tiles on their way
  bool have_q = false;
  for (int first = 0; first < tokens.size; first += C::kListed) {
    const int listed = list_tokens<C>(a, s, tokens, first, low, high);
    const int tiles = (listed + C::kTokens - 1) / C::kTokens;
    if (tiles == 0) continue;
#pragma unroll
    for (int tile = 0; tile < kAhead; ++tile) {
      if (tile < tiles) fetch_tile<C>(a, s, kv_head, tile * C::kTokens, tile);
      ptx::copy_commit();
    }
    if constexpr (C::kHoldQ) {
      if (!have_q) {
        ptx::copy_wait<kAhead>();
        __syncthreads();
#pragma unroll
        for (int step = 0; step < C::kD / 16; ++step) load_q<C>(s, own.q[step], warp_m, step);
        have_q = true;
      }
    }
    int stage = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      const int multiplied = C::kTiles == 1 ? 0 : stage;  // the tile that mma reads
      ptx::copy_wait<kAhead - 1>();
      if constexpr (C::kConvert) {
        if (C::kTiles == 1) __syncthreads();  // the tile before is no longer needed
        convert_tile<C>(s, stage, multiplied);
      }
      __syncthreads();  // the tile is there for all, and the one before it no longer needed
      // Where tiles are converted, this thread alone had a use for what it copied.
      const int next = tile + kAhead;
      if (next < tiles) {
        const int free = C::kConvert ? stage : stage == 0 ? C::kStages - 1 : stage - 1;
        fetch_tile<C>(a, s, kv_head, next * C::kTokens, free);
      }
      ptx::copy_commit();
      attend<C>(a, s, own, warp_m, warp_n, tile * C::kTokens, multiplied);
      stage = stage + 1 == C::kStages ? 0 : stage + 1;
    }
  }
  ptx::copy_wait<0>();
  __syncthreads();
  stage_results<C>(s, own, warp_m, warp_n);
  __syncthreads();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) attention_kernel(const Arguments a) {
  auto& s = shared<typename C::Shared>();
  if (a.query_blocks > 1) make_schedule<C, C::kThreads>(a, schedule_of<C>(s));
  __syncthreads();
  const auto attend = [&](const Segment& segment) { attend_segment<C>(a, s, segment); };
  // What lies in `s.out` is stored before copies arrive there.
  work_through<C>(a, s, attend, [] { __syncthreads(); });
}

/// Launches the kernel with products in `T`. How the work is cut is not in `a` yet.
template <template <class, int, int, int> class C, class T>
void launch_tiles(Arguments a, Stream stream) {
  const int64_t rows = static_cast<int64_t>(a.queries) * a.group;
  with_tile<C, T>(a.wide(), rows, device_properties(), [&](auto tile) {
    using Chosen = decltype(tile);
    const Cut cut = cut_work<Chosen>(a, device_properties());
    if (a.looked_through != nullptr) launch_look(a, cut.chunks, stream);
    launch<attention_kernel<Chosen>>(dim3(cut.blocks), Chosen::kThreads,
                                     sizeof(typename Chosen::Shared) + cut.schedule_bytes(), stream,
                                     a);
  });
}

}  // namespace
}  // namespace saffron::cuda
