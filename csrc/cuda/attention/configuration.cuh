#pragma once

// Part of tree_attention.cu: the configurations of the kernel for tensor cores, and what a warp
// holds.

#include "cuda/attention/arguments.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/types.cuh"

namespace saffron::cuda {
namespace {

/// Rows of K and V in shared memory as the caches hold them, where they are converted from there.
template <int kBytes>
struct Raw {
  alignas(16) uint8_t raw[kBytes];
};
template <>
struct Raw<0> {};

/// One configuration: `kWarpsM` warps along the rows, 16 each, times `kWarpsN` along the tokens.
/// Caches hold `Stored`; tensor cores multiply `T`.
template <class T_, class Stored_, int kD_, int kWarpsM_, int kWarpsN_>
struct Configuration {
  using T = T_;
  using Stored = Stored_;
  static constexpr int kD = kD_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
  static constexpr bool kConvert = !std::is_same_v<T, Stored>;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRows = 16 * kWarpsM;
  static constexpr int kTokens = kWarpsN > 1 || (kWarpsM == 8 && kD <= 128) ? 64 : 32;
  static constexpr int kWarpTokens = kTokens / kWarpsN;
  static constexpr int kStages = kConvert || (kD > 128 && kWarpsM != 4) ? 2 : 3;
  // Tiles as they are multiplied: with two of them the next is converted while one is in use.
  static constexpr int kTiles = !kConvert ? kStages : kD > 128 && kWarpsM != 4 ? 1 : 2;
  static constexpr int kChunk = 16 / sizeof(Stored);  // elements that are copied together
  static constexpr int kListed = 4 * kThreads;        // tokens that are looked at together
  static constexpr int kSlice = kRows > 16 ? 8 : 4;   // rows that are joined together
  static constexpr int kTogether = kD > 128 ? 4 : 8;  // partials that are read at once
  static constexpr bool kHoldQ = kD <= 128;
  static constexpr int kMinBlocks = kWarpsM == 8 || kD > 128 ? 1 : 2;
  // Rows in shared memory are 16 bytes longer than kD, and so begin in different banks.
  static constexpr int kStride = kD + 8;
  static constexpr int kFloatStride = kD + 8;

  struct Shared : Raw<kConvert ? kStages * 2 * kTokens * kD : 0> {
    alignas(16) uint16_t q[kRows * kStride];
    union {
      alignas(16) uint16_t kv[kTiles][2][kTokens * kStride];
      // When all tiles are done: the result of every warp, then weights [kSlice, parts].
      alignas(16) float out[kWarpsM * kWarpsN * 16 * kFloatStride];
    };
    int slot[kListed], begin[kListed], end[kListed];
    int counts[4 * kWarpsM * kWarpsN];
    float largest[kWarpsN][kRows], total[kWarpsN][kRows];
    uint32_t message;  // from thread 0 to all
  };
  static_assert(sizeof(Shared) <= 163 * 1024, "more than an A100 has");
  static_assert(kListed % kTokens == 0 && kWarpTokens % 16 == 0);

  static constexpr int kMaxSplits = kWarpsM * kWarpsN * 16 * kFloatStride / kSlice;

  /// A barrier of all who compute.
  static __device__ __forceinline__ void sync() { __syncthreads(); }
};

template <class T, int kD, int kWarpsM, int kWarpsN>
struct Tile : Configuration<T, T, kD, kWarpsM, kWarpsN> {};
template <class T, int kD, int kWarpsM, int kWarpsN>
struct Float8Tile : Configuration<T, Float8, kD, kWarpsM, kWarpsN> {};

/// What a warp's rows are, and their result so far. Lane = 4 g + t has rows g and g + 8.
template <class C>
struct Warp {
  uint32_t q[C::kHoldQ ? C::kD / 16 : 1][4];
  float acc[C::kD / 8][4];
  float largest[2], total[2];
  int query[2];                 // of its rows g and g + 8
  int first_query, last_query;  // of the warp; none if first > last
  float scale;                  // of its scores, where it depends on the KV head
};

}  // namespace
}  // namespace saffron::cuda
