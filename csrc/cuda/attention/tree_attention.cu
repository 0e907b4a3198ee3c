// Attention over a flattened trie in one launch. Rows of a tile are (query, query head) pairs that
// share a KV head, so K and V are read once for all of them.
//
// The work is a list of units (token range, KV head, block of rows), which resident blocks draw
// from. For its unit a block first lists the tokens that any of its queries sees, in order, then
// streams their K and V rows through shared memory, whole tiles of live tokens at a time. A warp
// leaves out the tiles that none of its own rows see. Softmax is online, in fp32.
//
// Rows of fp8 are copied as they are and converted once for all warps, each 16 bytes by the thread
// that copied them; the scale of K is that of the scores, and V's is the result's.
//
// Where the tokens are split, each unit leaves a partial result in fp32. When the last unit of a
// block of rows has arrived, the partials are joined in slices of rows, each in the order of the
// tokens: the same bits, whoever joins. The last block to arrive joins what nobody else has
// claimed; the others wait for it for a while, to help.

#include "cuda/attention/arguments.cuh"
#include "cuda/attention/join.cuh"
#include "cuda/attention/tile.cuh"
#include "cuda/attention/work.cuh"

namespace saffron::cuda {
namespace {

/// One unit: the rows of a block and the tokens of a range. Leaves the result in `s.out`.
template <class C>
__device__ __forceinline__ void attend_range(const Arguments& a, typename C::Shared& s, int kv_head,
                                             int first_row, int rows, int first, int last) {
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
  if constexpr (C::kConvert) {  // else a.scale_log2, which would cost a register here
    own.scale_log2 = a.k_scale != nullptr ? a.scale_log2 * a.k_scale[kv_head] : a.scale_log2;
  }
  own.first_query = warp_row / a.group;
  own.last_query = warp_row < rows ? (min(warp_row + 16, rows) - 1) / a.group : -1;
  const int low = first_row / a.group, high = (min(first_row + C::kRows, rows) - 1) / a.group;

  fetch_q<C>(a, s, kv_head, first_row, rows);
  ptx::copy_commit();
  constexpr int kAhead = C::kConvert ? C::kStages : C::kStages - 1;  // tiles on their way
  bool have_q = false;
  for (; first < last; first += C::kListed) {
    const int listed = list_tokens<C>(a, s, first, last, low, high);
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
  lay_down<C>(s, own, warp_m, warp_n);
  __syncthreads();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) attention_kernel(const Arguments a) {
  auto& s = shared<typename C::Shared>();
  const auto attend = [&](const Unit& unit) {
    attend_range<C>(a, s, unit.kv_head, unit.first_row, a.queries * a.group, unit.first, unit.last);
  };
  const auto next = [&](uint32_t) {
    return from_thread_0<C>(s, threadIdx.x == 0 ? gridDim.x + atomicAdd(a.drawn, 1u) : 0u);
  };
  work_through<C>(a, s, attend, next);
}

/// Calls `run` with the configuration for these sizes.
template <template <class, int, int, int> class C, class T, int kD, class Run>
auto with_rows(int64_t rows, Run run) {
  if (rows <= 16) return run(C<T, kD, 1, 4>{});
  if constexpr (kD <= 128) {
    if (rows > 64) return run(C<T, kD, 8, 1>{});
  }
  return run(C<T, kD, 4, 1>{});
}

template <class T, class Run>
auto with_tile(DType stored, int64_t head_dim, int64_t rows, Run run) {
  if (stored == DType::kFloat8) {  // what lies behind a row is not read, so that fewer sizes do
    if (head_dim <= 64) return with_rows<Float8Tile, T, 64>(rows, run);
    if (head_dim <= 128) return with_rows<Float8Tile, T, 128>(rows, run);
    return with_rows<Float8Tile, T, 256>(rows, run);
  }
  if (head_dim <= 64) return with_rows<Tile, T, 64>(rows, run);
  if (head_dim <= 96) return with_rows<Tile, T, 96>(rows, run);
  if (head_dim <= 128) return with_rows<Tile, T, 128>(rows, run);
  return with_rows<Tile, T, 256>(rows, run);
}

}  // namespace

uint64_t capture_id(Stream stream) { return graph_of(stream); }

const char* tree_attention_path(int64_t queries, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                DType stored) {
  if (queries == 0 || heads == 0) return "mma";
  return hopper_takes(queries, heads / kv_heads, head_dim, stored) ? "wgmma" : "mma";
}

int64_t tree_attention_workspace(int64_t queries, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                 int64_t tokens, DType stored) {
  if (queries == 0 || heads == 0) return 0;
  const int64_t group = heads / kv_heads;
  if (hopper_takes(queries, group, head_dim, stored)) {
    return hopper_workspace(queries, group, kv_heads, head_dim, tokens);
  }
  return with_tile<BFloat16>(stored, head_dim, queries * group, [&](auto tile) {
    return workspace_for<decltype(tile)>(queries, group, kv_heads, tokens, chip());
  });
}

void tree_attention(const View& q, const View& k_cache, const View& v_cache, const View& slot,
                    const View& begin, const View& end, const View& count, const View& k_scale,
                    const View& v_scale, double scale, const View& out, const View& lse,
                    const View& workspace, const View& counters, int64_t queries, int64_t heads,
                    int64_t kv_heads, int64_t head_dim, int64_t tokens, int64_t num_slots,
                    DType dtype, DType stored, const View& fault, Stream stream) {
  if (queries == 0 || heads == 0) return;
  Arguments a = {};
  a.q = q.data;
  a.k = k_cache.data;
  a.v = v_cache.data;
  a.q_stride_n = q.stride[0];
  a.q_stride_h = q.stride[1];
  a.k_stride_s = k_cache.stride[0];
  a.k_stride_h = k_cache.stride[1];
  a.v_stride_s = v_cache.stride[0];
  a.v_stride_h = v_cache.stride[1];
  a.slot = slot.as<int32_t>();
  a.begin = begin.as<int32_t>();
  a.end = end.as<int32_t>();
  a.count = count.as<int32_t>();
  a.k_scale = k_scale.as<float>();
  a.v_scale = v_scale.as<float>();
  a.out = out.data;
  a.lse = lse.as<float>();
  a.part = workspace.as<float>();
  a.drawn = counters.as<uint32_t>();
  a.left = a.drawn + 1;
  a.arrived = a.drawn + 2;
  a.tokens = static_cast<int>(tokens);
  a.queries = static_cast<int>(queries);
  a.group = static_cast<int>(heads / kv_heads);
  a.kv_heads = static_cast<int>(kv_heads);
  a.head_dim = static_cast<int>(head_dim);
  a.num_slots = static_cast<int>(num_slots);
  a.scale_log2 = static_cast<float>(scale * 1.4426950408889634);
  a.fault = fault.as<int32_t>();
  if (hopper_takes(queries, a.group, head_dim, stored)) return launch_hopper(a, dtype, stream);
  const auto run = [&](auto tile) {
    using C = decltype(tile);
    const Cut cut = cut_work<C>(a, chip());
    launch<attention_kernel<C>>(dim3(cut.blocks), C::kThreads, sizeof(typename C::Shared), stream,
                                a);
  };
  if (dtype == DType::kBFloat16) {
    with_tile<BFloat16>(stored, head_dim, queries * a.group, run);
  } else {
    with_tile<Float16>(stored, head_dim, queries * a.group, run);
  }
}

}  // namespace saffron::cuda
