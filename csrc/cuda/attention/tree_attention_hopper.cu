// Attention over a flattened trie on Hopper, for many rows: the same work as in tree_attention.cu,
// cut and joined in the same way, with `wgmma` on tiles that mostly arrive as boxes of a tensor.
//
// Four warps list the tokens that any query of the block sees, 64 to a tile, and fetch K and V of
// them: as boxes where their slots follow each other (a prompt), else row by row, a quarter each.
// They run ahead of four or eight warps that compute, as far as there are stages. Those hold Q in
// registers as A of
// S = Q K^T, B being K as it lies in memory; exp(S) is A of S V, B being V transposed.
//
// Why, and when (`hopper_takes`): a token costs a KV head 4 head_dim bytes and, for R rows, 4 R
// head_dim operations. At 4.3 TB/s, and the 60 % of 989 Tflop/s that mma.sync reaches, both take
// equally long at R = 138; at the 75 % or so to be expected here, at R = 172. From 65 rows on a
// block of tree_attention.cu has 128, and so 0.93 of the memory's time to compute, not overlapped
// perfectly; here 0.74. Up to 64 rows it is less than half, and fetching is all that counts. These
// are predictions: no GPU has measured them.

#include <array>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/attention/arguments.cuh"
#include "cuda/attention/hopper.cuh"
#include "cuda/attention/work.cuh"

namespace saffron::cuda {
namespace {

template <class T, bool kTransposed, bool kAdd, int kBlocks>
__device__ __forceinline__ void wgmma(float (&acc)[kBlocks][4], const uint32_t (&a)[4],
                                      uint64_t b) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    ptx::wgmma_bf16<kTransposed, kAdd>(acc, a, b);
  } else {
    ptx::wgmma_half<kTransposed, kAdd>(acc, a, b);
  }
}

/// This lane's part of Q as A of the products; zeros beyond the rows and columns that there are.
template <class C>
__device__ __forceinline__ void load_q(const Arguments& a, Warp<C>& own, int kv_head, int row,
                                       int rows) {
  using T = typename C::T;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = row + lane / 4 + 8 * r;
    const bool exists = at < rows;
    const int64_t head = kv_head * a.group + at % a.group;
    const T* q = static_cast<const T*>(a.q);
    if (exists) q += own.query[r] * a.q_stride_n + head * a.q_stride_h;
#pragma unroll
    for (int i = 0; i < C::kD / 8; ++i) {
      const int column = i * 8 + lane % 4 * 2;
      own.q[i / 2][r + i % 2 * 2] =
          exists && column < a.head_dim ? *reinterpret_cast<const uint32_t*>(q + column) : 0;
    }
  }
}

/// Adds the tile of a stage to the result of the rows of a warpgroup, all warps of which call it.
template <class C>
__device__ __forceinline__ void attend_tile(const Arguments& a, const typename C::Shared& s,
                                            Warp<C>& own, int stage, bool all) {
  using T = typename C::T;
  constexpr uint32_t kRow = C::kRowBytes;
  float score[C::kTokens / 8][4];
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < C::kD / 16; ++step) {
    const uint16_t* k = &s.kv[stage][0][step / 4][step % 4 * 16];
    const uint64_t b = ptx::matrix(k, 0, 8 * kRow);
    if (step == 0) {
      wgmma<T, false, false>(score, own.q[step], b);
    } else {
      wgmma<T, false, true>(score, own.q[step], b);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(score);

  exponentiate(a, own, score, a.scale, s.begin[stage], s.end[stage], all);
  if (!all) {  // for all warps of the warpgroup alike, and so is what they find in V
    const uint16_t* numbers = s.kv[stage][1][0];
    if (is_unfit_tile<T>(C::kTokens * C::kD, [&](int i) { return numbers + 8 * i; })) {
      const auto pair = [&](int token, int column) {  // as copy_box stored them
        const int chunk = column / 8 % 8 ^ token % 8;
        return &s.kv[stage][1][column / 64][token * 64 + chunk * 8 + column % 8];
      };
      return add_by_token(own, score, s.begin[stage], s.end[stage], pair);
    }
  }

  uint32_t p[C::kTokens / 16][4];
#pragma unroll
  for (int step = 0; step < C::kTokens / 16; ++step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& x = score[2 * step + i / 2];
      p[step][i] = pack<T>(x[i % 2 * 2], x[i % 2 * 2 + 1]);
    }
  }
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < C::kTokens / 16; ++step) {
    const uint16_t* v = &s.kv[stage][1][0][step * 16 * 64];
    wgmma<T, true, true>(own.acc, p[step], ptx::matrix(v, C::kTokens * kRow, 8 * kRow));
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>(own.acc);
}

/// Attends to all tiles of a unit, as they come. `row` is the first of this warp's rows.
template <class C>
__device__ __forceinline__ void attend_all(const Arguments& a, typename C::Shared& s, Turn<C>& turn,
                                           Warp<C>& own, int kv_head, int row) {
  const int rows = a.queries * a.group;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int d = 0; d < C::kD / 8; ++d) {
#pragma unroll
    for (int i = 0; i < 4; ++i) own.acc[d][i] = 0.f;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    own.largest[r] = -INFINITY;
    own.total[r] = 0.f;
    own.query[r] = (row + lane / 4 + 8 * r) / a.group;
  }
  load_q<C>(a, own, kv_head, row, rows);
  // What concerns the products concerns all four warps of the warpgroup alike.
  const int first_row = row / 64 * 64;
  const int low = first_row / a.group;
  const int high = first_row < rows ? (min(first_row + 64, rows) - 1) / a.group : -1;
  while (true) {
    ptx::barrier_wait(&s.full[turn.stage], turn.parity);
    const int listed = s.listed[turn.stage];
    const bool more = listed != 0;
    if (listed < 0) ptx::fence_async();  // the rows were copied 16 bytes at a time
    bool any = false, all = true;
#pragma unroll
    for (int token = lane; token < C::kTokens; token += 32) {
      const int begin = s.begin[turn.stage][token], end = s.end[turn.stage][token];
      any |= begin <= high && end > low;
      all &= begin <= low && end > high;
    }
    any = more && __any_sync(0xffffffffu, any);
    all = __all_sync(0xffffffffu, all);
    if (any) attend_tile<C>(a, s, own, turn.stage, all);
    __syncwarp();  // all lanes have read the intervals
    if (lane == 0) ptx::barrier_arrive(&s.empty[turn.stage]);
    turn.advance();
    if (!more) return;
  }
}

/// What the warps that fetch do: the tiles of all segments of this block.
template <class C>
__device__ __forceinline__ void produce(const Arguments& a, const Caches& caches,
                                        typename C::Shared& s, int warp) {
  const int rows = a.queries * a.group;
  auto& plan = schedule_of<C>(s);
  Shares shares(a, plan, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  Turn<C> turn;
  uint32_t parity = 0;
  for (int at = shares.first; at < shares.last;) {
    if (at != shares.first) {
      ptx::barrier_wait(&s.stored, parity);  // the result stood where the stages are
      parity ^= 1;
    }
    const Segment g = shares.segment(a, plan, at);
    if (a.query_blocks > 1) {
      ptx::sync_some<2, C::kFetching>();  // nobody reads the chunks of the segment before
      if (warp == 0) Tokens::list(a, plan, g);
      ptx::sync_some<2, C::kFetching>();
    }
    const Tokens tokens(a, plan, g);
    const int first_row = g.query_block * C::kRows;
    const int low = first_row / a.group;
    const int high = (min(first_row + C::kRows, rows) - 1) / a.group;
    fetch_all<C>(a, caches, s, turn, warp, g.kv_head, low, high, tokens);
    at += shares.segment(a, plan, at).count;  // again: registers are scarce until here
  }
}

template <class C>
__global__ void __launch_bounds__(SAFFRON_HOPPER ? C::kLaunched : 32, C::kMinBlocks)
    wide_attention_kernel(const Arguments a, const __grid_constant__ Caches caches) {
#if SAFFRON_HOPPER
  auto& s = shared<typename C::Shared>();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::barrier_init(&s.full[stage], C::kFetching);
      ptx::barrier_init(&s.empty[stage], C::kWarpsM);
    }
    ptx::barrier_init(&s.stored, C::kThreads);
    ptx::fence_async();
    if (caches.described) ptx::prefetch(caches.k), ptx::prefetch(caches.v);
  }
  if (a.query_blocks > 1) make_schedule<C, C::kLaunched>(a, schedule_of<C>(s));
  __syncthreads();
  if (warp >= C::kWarpsM) {
    ptx::give_up_registers<C::kFewRegisters>();
    produce<C>(a, caches, s, warp - C::kWarpsM);
  } else {
    ptx::take_registers<C::kManyRegisters>();
    Turn<C> turn;
    const auto attend = [&](const Segment& segment) {
      Warp<C> own;
      const int first_row = segment.query_block * C::kRows;
      attend_all<C>(a, s, turn, own, segment.kv_head, first_row + warp * 16);
      C::sync();  // nobody needs a tile any more
      stage_results<C>(s, own, warp, 0);
      C::sync();
    };
    const auto next = [&] {
      ptx::fence_async();  // boxes may now be written over the result
      ptx::barrier_arrive(&s.stored);
    };
    work_through<C>(a, s, attend, next);
  }
#endif
}

/// `encode` for boxes of 64 columns and so many `tokens`, once for the same arguments, of which
/// alone a map is made: a model's caches are the same in every step.
bool encode_once(TensorMap& map, const void* cache, const int64_t (&sizes)[3],
                 const int64_t (&strides)[2], int tokens) {
  using Key = std::array<int64_t, 7>;
  constexpr size_t most = 1024;
  thread_local std::map<Key, TensorMap> known;
  const Key key = {static_cast<int64_t>(reinterpret_cast<intptr_t>(cache)),
                   sizes[0],
                   sizes[1],
                   sizes[2],
                   strides[0],
                   strides[1],
                   tokens};
  const auto found = known.find(key);
  if (found == known.end()) {
    if (!encode(map, cache, sizes, strides, {64, 1, tokens})) return false;
    if (known.size() >= most) known.clear();
    known.emplace(key, map);
  } else {
    map = found->second;
  }
  return true;
}

/// Describes a cache for boxes of 64 columns of one KV head in successive slots. False where its
/// layout is not one of slots, each of KV heads with `size` numbers; strides count elements.
template <class C>
bool describe(TensorMap& map, const Arguments& a, const void* cache, int size, int64_t stride_h,
              int64_t stride_s) {
  if (a.kv_heads == 1) stride_h = size;
  // Each stride has to be a multiple of the one before.
  if (a.num_slots == 0 || stride_h < size || stride_s < stride_h * a.kv_heads ||
      stride_s % stride_h != 0) {
    return false;
  }
  return encode_once(map, cache, {size, a.kv_heads, a.num_slots}, {2 * stride_h, 2 * stride_s},
                     C::kTokens);
}

/// Calls `run` with the configuration for these sizes.
template <class T, class Run>
auto with_wide(int64_t head_dim, int64_t rows, Run run) {
  if (head_dim <= 64) {
    if (rows <= 64) return run(Wide<T, 64, 1>{});
    return run(Wide<T, 64, 2>{});
  }
  return run(Wide<T, 128, 1>{});  // two warpgroups of this size do not fit into the registers
}

}  // namespace

bool hopper_takes(int64_t queries, int64_t group, int64_t head_dim, DType stored) {
  const bool converted = stored == DType::kFloat8;  // by the other path
  if (device_properties().capability != 90 || head_dim > 128 || converted) return false;
  // An empty kernel stands where the module was not compiled for sm_90a.
  static const bool compiled = admits<wide_attention_kernel<Wide<BFloat16, 64, 2>>>(384);
  if (!compiled) return false;
  if (const char* asked = std::getenv("SAFFRON_CUDA_ATTENTION")) {
    const std::string path = asked;
    if (path == "wgmma" || path == "mma") return path == "wgmma";
    if (!path.empty()) {
      throw std::invalid_argument("SAFFRON_CUDA_ATTENTION: got '" + path +
                                  "', expected 'mma', 'wgmma' or nothing");
    }
  }
  return (head_dim == 64 || head_dim == 128) && queries * group > 64;
}

int64_t hopper_workspace(int64_t queries, int64_t group, int64_t kv_heads, int64_t head_dim,
                         int64_t tokens) {
  return with_wide<BFloat16>(head_dim, queries * group, [&](auto wide) {
    return workspace_for<decltype(wide)>(queries, group, kv_heads, tokens, device_properties());
  });
}

void launch_hopper(Arguments a, DType dtype, Stream stream) {
  const auto run = [&](auto wide) {
    using C = decltype(wide);
    const Cut cut = cut_work<C>(a, device_properties());
    if (a.looked_through != nullptr) launch_look(a, cut.chunks, stream);
    Caches caches = {};
    caches.described = describe<C>(caches.k, a, a.k, a.head_dim, a.k_stride_h, a.k_stride_s) &&
                       describe<C>(caches.v, a, a.v, a.v_dim, a.v_stride_h, a.v_stride_s);
    launch<wide_attention_kernel<C>>(dim3(cut.blocks), C::kLaunched,
                                     sizeof(typename C::Shared) + cut.schedule_bytes(), stream, a,
                                     caches);
  };
  const int64_t rows = static_cast<int64_t>(a.queries) * a.group;
  if (dtype == DType::kBFloat16) {
    with_wide<BFloat16>(a.wide(), rows, run);
  } else {
    with_wide<Float16>(a.wide(), rows, run);
  }
}

}  // namespace saffron::cuda
