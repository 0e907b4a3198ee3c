#pragma once

// Part of tree_attention: which configuration of its tiles serves which sizes, on which device.

#include "cuda/attention/tile.cuh"
#include "cuda/common/launch.cuh"

namespace saffron::cuda {
namespace {

/// Calls `run` with the configuration for so many rows of a KV head: the best of those that fit the
/// shared memory that a block may have. Chips of compute capability 8.6, 8.9 and 12.x, which allow
/// 99 KB, get blocks of 64 rows (32 for the largest head size) where others have 16 or 128. That
/// leaves most warps idle below 17 rows; yet one of them takes 16 KB of K and V every 0.5 us, and
/// with all multiprocessors several times what the memory of such a chip delivers.
template <template <class, int, int, int> class C, class T, int kD, class Run>
auto with_rows(int64_t rows, const DeviceProperties& device, Run run) {
  const auto fits = [&](auto tile) {
    return static_cast<int64_t>(sizeof(typename decltype(tile)::Shared)) <= device.block_bytes;
  };
  if (rows <= 16 && fits(C<T, kD, 1, 4>{})) return run(C<T, kD, 1, 4>{});
  if constexpr (kD <= 128) {
    if (rows > 64 && fits(C<T, kD, 8, 1>{})) return run(C<T, kD, 8, 1>{});
  } else {
    if (!fits(C<T, kD, 4, 1>{})) return run(C<T, kD, 2, 1>{});
  }
  return run(C<T, kD, 4, 1>{});
}

template <template <class, int, int, int> class C, class T, class Run>
auto with_tile(int64_t head_dim, int64_t rows, const DeviceProperties& device, Run run) {
  if (head_dim <= 64) return with_rows<C, T, 64>(rows, device, run);
  // What lies behind a row of fp8 is not read, so that fewer sizes do.
  if constexpr (!C<T, 128, 4, 1>::kConvert) {
    if (head_dim <= 96) return with_rows<C, T, 96>(rows, device, run);
  }
  if (head_dim <= 128) return with_rows<C, T, 128>(rows, device, run);
  return with_rows<C, T, 256>(rows, device, run);
}

}  // namespace
}  // namespace saffron::cuda
