#pragma once

// Part of tree_attention_hopper.cu: the configurations, and the warps that fetch K and V.

#include "cuda/attention/tile.cuh"
#include "cuda/attention/work.cuh"
#include "cuda/ptx/hopper.cuh"

namespace saffron::cuda {
namespace {

/// One configuration: `kWarpgroups` of four warps, 64 rows each, that compute; one warpgroup more
/// fetches.
template <class T_, int kD_, int kWarpgroups_>
struct Wide {
  using T = T_;
  static constexpr int kD = kD_, kWarpgroups = kWarpgroups_;
  static constexpr int kWarpsM = 4 * kWarpgroups, kWarpsN = 1;
  static constexpr int kThreads = 128 * kWarpgroups;  // that compute
  static constexpr int kFetching = 128, kLaunched = kThreads + kFetching;
  static constexpr int kRows = 64 * kWarpgroups;
  static constexpr int kTokens = 64;
  static constexpr int kMinBlocks = 1;
  // Of a multiprocessor's 65536 registers; what a block is launched with is redistributed.
  static constexpr int kFewRegisters = kWarpgroups > 1 ? 88 : 128;
  static constexpr int kManyRegisters = kWarpgroups > 1 ? 208 : 240;
  static constexpr int kStages = kD > 64 ? (kWarpgroups > 1 ? 6 : 3) : 6;
  static constexpr int kSlice = 8;     // rows that are joined together
  static constexpr int kTogether = 8;  // partials that are read at once
  static constexpr bool kHoldQ = true, kConvert = false;
  static constexpr int kFloatStride = kD + 8;
  static constexpr int kRowBytes = 128;  // of shared memory, so of 64 columns
  static constexpr int kHalf = kTokens * 64;
  static constexpr uint32_t kTileBytes = 2 * kTokens * kD * 2;

  struct Shared {
    union {
      // Of every stage K and V, each by 64 columns: [tokens, 64], as `copy_box` stores it.
      alignas(1024) uint16_t kv[kStages][2][kD / 64][kHalf];
      // When all tiles are done: the result, then weights [kSlice, parts].
      alignas(16) float out[kRows * kFloatStride];
    };
    int begin[kStages][kTokens], end[kStages][kTokens];
    int listed[kStages];   // tokens of the tile, below 0 if gathered; 0 after the last tile
    int slot[4][kTokens];  // of the tile that is being listed, by each warp that fetches
    alignas(8) uint64_t full[kStages], empty[kStages], stored;
    float largest[1][kRows], total[1][kRows];
    uint32_t message;  // from thread 0 to all
  };
  static_assert(128 * kFewRegisters + kThreads * kManyRegisters <=
                    65536 / (kMinBlocks * kLaunched) / 8 * 8 * kLaunched,
                "more registers than a block is launched with");
  static_assert(sizeof(Shared) + (kWarpgroups > 1 ? sizeof(Schedule) : 0) <=
                    227 * 1024 / kMinBlocks - 1024,
                "more than an H200 has");

  static constexpr int kMaxSplits = kRows * kFloatStride / kSlice;

  /// A barrier of all who compute.
  static __device__ __forceinline__ void sync() { ptx::sync_some<1, kThreads>(); }
};

/// The caches, and whether they could be described.
struct Caches {
  TensorMap k, v;
  bool described;
};

/// The stage that comes next, in the order of both those who fill and those who use them.
template <class C>
struct Turn {
  int stage = 0;
  uint32_t parity = 0;  // of the phase in which the stage is filled

  __device__ __forceinline__ void advance() {
    if (++stage == C::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Token {
  int slot, begin, end;
};

/// Whether a query from `low` to `high` sees the token.
__device__ __forceinline__ bool is_seen(const Arguments& a, const Token& t, int low, int high) {
  const bool exists = t.slot >= 0 && t.slot < a.num_slots;
  // A token that some query of the launch sees, here or elsewhere, has to have a slot.
  if (t.begin < t.end && t.begin < a.queries && t.end > 0 && !exists) {
    atomicOr(a.fault, kSlotFault);
  }
  return exists && t.begin < t.end && t.begin <= high && t.end > low;
}

/// Every warp that fetches lists all slots; the first one says who sees the tokens.
template <class C>
__device__ __forceinline__ void put(typename C::Shared& s, int warp, int stage, int place,
                                    const Token& t) {
  s.slot[warp][place] = t.slot;
  if (warp == 0) {
    s.begin[stage][place] = t.begin;
    s.end[stage][place] = t.end;
  }
}

/// Copies this warp's quarter of the K and V of the listed tokens into a stage, 16 bytes at a time;
/// zeros where there is no token. The warp has to arrive at the barrier afterwards.
template <class C>
__device__ __forceinline__ void fetch_rows(const Arguments& a, typename C::Shared& s, int warp,
                                           int kv_head, int stage) {
  using T = typename C::T;
  constexpr int kChunks = C::kD / 8, kTogether = 32 / kChunks;  // rows of the warp at once
  constexpr int kRows = C::kTokens / 4 / kTogether;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int chunk = lane % kChunks, half = chunk / 8;
  const int first = warp * (C::kTokens / 4) + lane / kChunks;
  const T* k = static_cast<const T*>(a.k) + kv_head * a.k_stride_h + chunk * 8;
  const T* v = static_cast<const T*>(a.v) + kv_head * a.v_stride_h + chunk * 8;
  constexpr int kAtOnce = 2;  // registers
  static_assert(kRows % kAtOnce == 0);
#pragma unroll 1
  for (int batch = 0; batch < kRows; batch += kAtOnce) {
    int slot[kAtOnce];  // all of them before the first address is needed
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) slot[i] = s.slot[warp][first + (batch + i) * kTogether];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = first + (batch + i) * kTogether;
      const bool read_k = slot[i] >= 0 && chunk * 8 < a.head_dim;
      const bool read_v = slot[i] >= 0 && chunk * 8 < a.v_dim;
      const int64_t from = slot[i];
      const int at = row * 64 + (chunk % 8 ^ row % 8) * 8;  // as copy_box would
      ptx::copy16(&s.kv[stage][0][half][at], read_k ? k + from * a.k_stride_s : a.k, read_k);
      ptx::copy16(&s.kv[stage][1][half][at], read_v ? v + from * a.v_stride_s : a.v, read_v);
    }
  }
  ptx::barrier_await_copies(&s.full[stage]);
}

/// Fills the stage with the tile that is listed, of which `listed` tokens exist; by all warps that
/// fetch, each of which has listed the same.
template <class C>
__device__ __forceinline__ void fetch(const Arguments& a, const Caches& caches,
                                      typename C::Shared& s, int warp, int kv_head, int stage,
                                      int listed) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  __syncwarp();  // the list is there
  const int first = s.slot[warp][0];
  bool run = caches.described;
#pragma unroll
  for (int place = lane; place < C::kTokens; place += 32) {
    run &= s.slot[warp][place] == first + place;
  }
  run = __all_sync(0xffffffffu, run);
  if (!run) fetch_rows<C>(a, s, warp, kv_head, stage);
  if (warp == 0 && lane == 0) {
    s.listed[stage] = run ? listed : -listed;
    ptx::barrier_arrive_expecting(&s.full[stage], run ? C::kTileBytes : 0);
    if (run) {
#pragma unroll
      for (int half = 0; half < C::kD / 64; ++half) {
        ptx::copy_box(s.kv[stage][0][half], caches.k, half * 64, kv_head, first, &s.full[stage]);
        ptx::copy_box(s.kv[stage][1][half], caches.v, half * 64, kv_head, first, &s.full[stage]);
      }
    }
  } else {
    ptx::barrier_arrive(&s.full[stage]);
  }
  __syncwarp();  // the list may be written again
}

/// Lists those of `tokens` that a query from `low` to `high` sees, in order, and fetches them by
/// whole tiles; in the end says that there are no more.
template <class C>
__device__ __forceinline__ void fetch_all(const Arguments& a, const Caches& caches,
                                          typename C::Shared& s, Turn<C>& turn, int warp,
                                          int kv_head, int low, int high, const Tokens& tokens) {
  const int lane = static_cast<int>(threadIdx.x) % 32, size = tokens.size;
  const auto load = [&](int number) -> Token {
    const int token = number < size ? tokens.at(number) : tokens.end;
    if (token >= tokens.end) return {-1, 0, 0};
    return {a.slot[token], a.begin[token], a.end[token]};
  };
  Token next[2] = {load(lane), load(32 + lane)};  // read before they are needed
  int listed = 0, first = 0;
  ptx::barrier_wait(&s.empty[turn.stage], turn.parity ^ 1);
  while (first < size || listed > 0) {
    const Token now = next[0];
    next[0] = next[1];
    next[1] = load(first + 2 * 32 + lane);
    const bool seen = is_seen(a, now, low, high);
    const unsigned live = __ballot_sync(0xffffffffu, seen);
    const int place = listed + __popc(live & ((1u << lane) - 1));
    if (seen && place < C::kTokens) put<C>(s, warp, turn.stage, place, now);
    listed += __popc(live);
    first += 32;
    if (listed < C::kTokens && first < size) continue;
    if (listed == 0) break;
    const int whole = min(listed, C::kTokens);
    for (int i = whole + lane; i < C::kTokens; i += 32) {
      put<C>(s, warp, turn.stage, i, {-1, 0x7fffffff, -0x7fffffff});
    }
    fetch<C>(a, caches, s, warp, kv_head, turn.stage, whole);
    turn.advance();
    ptx::barrier_wait(&s.empty[turn.stage], turn.parity ^ 1);
    if (seen && place >= C::kTokens) put<C>(s, warp, turn.stage, place - C::kTokens, now);
    listed -= whole;
  }
  if (warp == 0 && lane == 0) s.listed[turn.stage] = 0;
  ptx::barrier_arrive(&s.full[turn.stage]);
  turn.advance();
}

}  // namespace
}  // namespace saffron::cuda
