#pragma once

// The two products of attention in bf16 with fp32 sums, by tiles of 16 rows x 32 columns: on the
// matrix unit (AMX), or with the dot products of pairs that AVX512_BF16 has. The right-hand side of
// a product (queries, weights) holds pairs of consecutive k in one dword. All operands are stored
// tile by tile, 1 KiB each, in the order of their use. K enters as it is; V has to be transposed,
// once per tile of tokens and head.

#include <immintrin.h>

#include <type_traits>

#include "cpu/simd/attention.h"

namespace saffron::cpu::SAFFRON_ISA {

static_assert(kLanes == 16, "a tile has 16 rows, and so has a vector");

constexpr int64_t kHalves = 512;  // bf16 numbers in a tile; half as many dwords

/// Left-hand side of a product: where its tiles lie. All strides in bytes.
struct Left {
  const char* data;
  int64_t row, step, down;  // from row to row of a tile, to the next tile of k, to the next 16 rows

  const char* tile(int64_t i, int64_t k) const { return data + i * down + k * step; }
};

#ifdef __AMX_BF16__

/// All eight tile registers with 16 rows of 64 bytes, as long as this lives.
struct TileRegisters {
  TileRegisters() {
    alignas(64) uint8_t config[64] = {1};  // palette 1; bytes from 16 on: columns, from 48 on: rows
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;
      config[48 + i] = 16;
    }
    // GCC's intrinsic says that it reads 8 bytes: without this, stores to the others are dropped.
    __asm__ volatile("" : : "r"(config) : "memory");
    _tile_loadconfig(config);
  }
  ~TileRegisters() { _tile_release(); }
};

/// C (+)= A * B for the 32 rows of A from tile `i` on and one or two columns (`kWide`) of B, over
/// `steps` tiles; from one column to the next it is `b_stride` dwords and `c_stride` floats. The
/// first `rows` of them are needed.
template <int kWide, bool kAccumulate>
inline void multiply_tiles(int64_t, int64_t steps, const Left& a, int64_t i, const uint32_t* b,
                           int64_t b_stride, float* c, int64_t c_stride, Prefetch& ahead,
                           int64_t lines) {
  constexpr int64_t row = 64, tile = kHalves / 2;
  if constexpr (kAccumulate) {
    _tile_loadd(0, c, row);
    _tile_loadd(2, c + tile, row);
    if constexpr (kWide == 2) _tile_loadd(1, c + c_stride, row);
    if constexpr (kWide == 2) _tile_loadd(3, c + c_stride + tile, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k) {
    ahead.next(lines);
    _tile_loadd(4, a.tile(i, k), a.row);
    _tile_loadd(6, b + k * tile, row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kWide == 2) {
      _tile_loadd(7, b + b_stride + k * tile, row);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_loadd(5, a.tile(i + 1, k), a.row);
    _tile_dpbf16ps(2, 5, 6);
    if constexpr (kWide == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, row);
  _tile_stored(2, c + tile, row);
  if constexpr (kWide == 2) _tile_stored(1, c + c_stride, row);
  if constexpr (kWide == 2) _tile_stored(3, c + c_stride + tile, row);
}

#else

struct TileRegisters {};

/// Rows `first` and after of the product below; with `kRows * kWide` sums in registers, none waits
/// for the one before it.
template <int kRows, int kWide, bool kAccumulate>
__attribute__((noinline)) void multiply_rows(int64_t steps, const Left& a, int64_t first,
                                             const uint32_t* b, int64_t b_stride, float* c,
                                             int64_t c_stride, Prefetch& ahead, int64_t lines) {
  constexpr int64_t row = 64, tile = kHalves / 2;
  __m512 sum[kRows][kWide];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kWide; ++j) {
      sum[r][j] =
          kAccumulate ? _mm512_loadu_ps(c + j * c_stride + r * kLanes) : _mm512_setzero_ps();
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    ahead.next(lines);
    const char* left = a.tile(first / 16, k) + first % 16 * row;
    for (int pair = 0; pair < 16; ++pair, left += 4) {
      __m512bh right[kWide];
      for (int j = 0; j < kWide; ++j) {
        right[j] = (__m512bh)_mm512_loadu_si512(b + j * b_stride + k * tile + pair * kLanes);
      }
      for (int r = 0; r < kRows; ++r) {
        int32_t both;
        std::memcpy(&both, left + r * row, sizeof both);
        for (int j = 0; j < kWide; ++j) {
          sum[r][j] = _mm512_dpbf16_ps(sum[r][j], right[j], (__m512bh)_mm512_set1_epi32(both));
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kWide; ++j) _mm512_storeu_ps(c + j * c_stride + r * kLanes, sum[r][j]);
  }
}

/// C (+)= A * B for 32 rows of A, as above.
template <int kWide, bool kAccumulate>
inline void multiply_tiles(int64_t rows, int64_t steps, const Left& a, int64_t i, const uint32_t* b,
                           int64_t b_stride, float* c, int64_t c_stride, Prefetch& ahead,
                           int64_t lines) {
  constexpr int kRows = 16 / kWide;
  for (int64_t r = 0; r < 32 && r < rows; r += kRows) {
    multiply_rows<kRows, kWide, kAccumulate>(steps, a, 16 * i + r, b, b_stride, c + r * kLanes,
                                             c_stride, ahead, r == 0 ? lines : 0);
  }
}

#endif

/// out[i] holds dword i of each of 16 rows of 32 halves; from row to row it is `stride` halves.
inline void transpose_dwords(const uint16_t* rows, int64_t stride, __m512i (&out)[16]) {
  for (int part = 0; part < 4; ++part) {
    // Sixteen bytes each of rows j, j + 4, j + 8 and j + 12: what is left to do stays in its lane.
    __m512i x[4];
    for (int j = 0; j < 4; ++j) {
      const auto quarter = [&](int i) {
        return _mm_loadu_si128(
            reinterpret_cast<const __m128i*>(rows + (j + 4 * i) * stride + 8 * part));
      };
      x[j] = _mm512_castsi128_si512(quarter(0));
      x[j] = _mm512_mask_broadcast_i32x4(x[j], 0x00f0, quarter(1));
      x[j] = _mm512_mask_broadcast_i32x4(x[j], 0x0f00, quarter(2));
      x[j] = _mm512_mask_broadcast_i32x4(x[j], 0xf000, quarter(3));
    }
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    out[4 * part] = _mm512_unpacklo_epi64(a, c);
    out[4 * part + 1] = _mm512_unpackhi_epi64(a, c);
    out[4 * part + 2] = _mm512_unpacklo_epi64(b, d);
    out[4 * part + 3] = _mm512_unpackhi_epi64(b, d);
  }
}

/// 2^x for x <= 127, right to 2e-7, in half the operations of exp2(): one instruction takes the
/// whole part off, another puts it back, and the minimax polynomial between them is shorter.
inline Vec exp2_short(Vec x) {
  const Vec f = (Vec)_mm512_maskz_reduce_ps(0xffff, (__m512)x, 9);  // x - floor(x), no exceptions
  Vec y = splat(0.00186713017f);
  y = y * f + 0.00901702978f;
  y = y * f + 0.0557999127f;
  y = y * f + 0.240164444f;
  y = y * f + 0.693151295f;
  y = y * f + 1.f;
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)y, (__m512)x);  // y * 2^floor(x)
}

struct PairMath {
  const TileRegisters registers{};
  using Storage = uint16_t;
  static constexpr int64_t kTileTokens = 128;
  static constexpr int64_t kPadding = 32;  // tokens of a tile of V

  int64_t head_dim, v_dim, size, v_size;  // of rows of K and V, and rounded up to tiles
  uint32_t* q;                            // [column, size / 32] tiles of 16 pairs x 16 lanes
  uint16_t *k, *v;    // tiles: [token / 16, size / 32] and [v_size / 16, token / 32]
  float* scores;      // [2, token, lane]
  uint32_t* weights;  // [2, token / 32] tiles of 16 pairs x 16 lanes
  uint16_t* staged;   // 32 rows of `size` or `v_size`
  Left keys{};
  int64_t lines_per_step = 0;

  PairMath(ScratchAllocator& allocator, int64_t columns, int64_t head_dim, int64_t v_dim)
      : head_dim(head_dim),
        v_dim(v_dim),
        size(round_up(head_dim, 32)),
        v_size(round_up(v_dim, 32)),
        q(allocator.take<uint32_t>(columns * size / 2 * kLanes)),
        k(allocator.take<uint16_t>(kTileTokens * size)),
        v(allocator.take<uint16_t>(kTileTokens * v_size)),
        scores(allocator.take<float>(2 * kTileTokens * kLanes)),
        weights(allocator.take<uint32_t>(2 * kTileTokens / 2 * kLanes)),
        staged(allocator.take<uint16_t>(32 * (size > v_size ? size : v_size))) {}

  void set_queries(int64_t column, const uint16_t* const* row, int64_t count, float sign) {
    const __m512i flip = _mm512_set1_epi16(sign < 0 ? INT16_MIN : 0);
    const __m512i exponent = _mm512_set1_epi16(0x7f80), nan = _mm512_set1_epi16(0x7fc0);
    const auto signed_pairs = [&](__m512i x) {
      if (sign != 0) return x ^ flip;
      // Times 0: NaN where it is not finite.
      return _mm512_maskz_mov_epi16(_mm512_cmpeq_epi16_mask(x & exponent, exponent), nan);
    };
    if (count < 16 || size != head_dim) {
      std::memset(staged, 0, static_cast<size_t>(16 * size * 2));
    }
    for (int64_t r = 0; r < count; ++r) copy_row(row[r], head_dim, staged + r * size, 32);
    uint32_t* to = q + column * size / 2 * kLanes;
    for (int64_t d = 0; d < size; d += 32) {
      __m512i pairs[16];
      transpose_dwords(staged + d, size, pairs);
      for (int i = 0; i < 16; ++i, to += kLanes) {
        _mm512_storeu_si512(to, signed_pairs(pairs[i]));
      }
    }
  }

  /// K is copied to stay near by, unless the matrix unit needs it once only and it lies in even
  /// steps.
  void load_tile(const AttentionTask& task, const Tile& tile, int64_t head, bool several) {
    const int32_t* slot = task.slot + tile.first;
    const int64_t steps = ceil_div(tile.count, 32);
    const char* k_rows = task.k + head * task.k_head_stride;
    const char* v_rows = task.v + head * task.v_head_stride;
#ifdef __AMX_BF16__
    const bool direct = !several && size == head_dim && consecutive(slot, tile.count);
#else
    constexpr bool direct = false;
    (void)several;
#endif
    keys = {reinterpret_cast<const char*>(k), 64, 2 * kHalves, 2 * kHalves * (size / 32)};
    if (direct) keys = {k_rows + slot[0] * task.k_stride, task.k_stride, 64, 16 * task.k_stride};
    for (int64_t t = 0; t < 32 * steps; t += 32) {
      const int64_t count = tile.count - t < 32 ? tile.count - t : 32;
      for (int64_t i = 0; i < count && !direct; ++i) {
        copy_row(k_rows + slot[t + i] * task.k_stride, head_dim,
                 k + (t + i / 16 * 16) * size + i % 16 * 32, kHalves);
      }
      for (int64_t i = 0; i < count; ++i) {
        copy_row(v_rows + slot[t + i] * task.v_stride, v_dim, staged + i * v_size, 32);
      }
      std::memset(staged + count * v_size, 0, static_cast<size_t>((32 - count) * v_size * 2));
      for (int64_t d = 0; d < v_size; d += 32) {
        transpose_values(staged + d, steps * kHalves, v + (d / 16 * steps + t / 32) * kHalves);
      }
    }
  }

  void score(int64_t column, int wide, int64_t count, Prefetch& ahead) {
    multiply_all<false>(count, size / 32, keys, q + column * size / 2 * kLanes, size / 2 * kLanes,
                        wide, scores, kTileTokens * kLanes, ahead);
  }

  /// Spreads the lines of the next tile over the steps of the products.
  void pace(const Prefetch& ahead, int64_t count, int64_t pairs) {
    const int64_t steps = ceil_div(count, 32) * ((size + v_size) / 32);
    lines_per_step = ceil_div(ahead.lines(), steps * pairs);
  }

  /// Weights of tokens t and t + 16 of 32 form a pair, and V is transposed to the same order.
  Vec weigh(int64_t which, int64_t padded, float scale, Vec shift) {
    const float* from = scores + which * kTileTokens * kLanes;
    uint32_t* to = weights + which * kTileTokens / 2 * kLanes;
    Vec total{}, rest{};
    for (int64_t step = 0; step < padded; step += 32) {
      for (int64_t t = step; t < step + 16; ++t) {
        const Vec a = exp2_short(load(from + t * kLanes) * scale - shift);
        const Vec b = exp2_short(load(from + (t + 16) * kLanes) * scale - shift);
        total += a;
        rest += b;
        // Rounded to bf16, to nearest. Ties are too rare to be told apart; NaN stays NaN, as the
        // low half of one that bf16 numbers and instructions make is 0.
        const __m512i low = (__m512i)(((VecU)a + 0x8000) >> 16), high = (__m512i)((VecU)b + 0x8000);
        _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, low, high));
        to += kLanes;
      }
    }
    return total + rest;
  }
  Vec weight(int64_t which, int64_t t) const {
    const int64_t pair = which * kTileTokens / 2 + t / 32 * 16 + t % 16;
    VecU both;
    std::memcpy(&both, weights + pair * kLanes, sizeof both);
    return (Vec)(t % 32 < 16 ? both << 16 : both & 0xffff0000u);
  }

  void accumulate(float* to, int wide, int64_t count, bool fresh, Prefetch& ahead) {
    const int64_t steps = ceil_div(count, 32);
    const Left values{reinterpret_cast<const char*>(v), 64, 2 * kHalves, 2 * kHalves * steps};
    const auto run = [&](auto add) {
      multiply_all<add>(v_dim, steps, values, weights, kTileTokens / 2 * kLanes, wide, to,
                        column_size(v_dim), ahead);
    };
    fresh ? run(std::false_type{}) : run(std::true_type{});
  }

 private:
  static bool consecutive(const int32_t* slot, int64_t count) {
    if (count % 32 != 0) return false;  // what follows the last row may not be ours to read
    for (int64_t t = 1; t < count; ++t) {
      if (slot[t] != slot[0] + t) return false;
    }
    return true;
  }

  /// A row of `size` numbers in pieces of 32, `step` apart; zeros beyond its end.
  static void copy_row(const void* row, int64_t size, uint16_t* to, int64_t step) {
    const auto* from = static_cast<const uint16_t*>(row);
    const int64_t whole = size / 32, rest = size % 32;
    for (int64_t i = 0; i < whole; ++i) {
      _mm512_storeu_si512(to + i * step, _mm512_loadu_si512(from + i * 32));
    }
    if (rest != 0) {
      const __m512i part = _mm512_maskz_loadu_epi16((1u << rest) - 1, from + whole * 32);
      _mm512_storeu_si512(to + whole * step, part);
    }
  }

  /// 32 columns of 32 staged rows: to two tiles, `next` halves apart.
  void transpose_values(const uint16_t* rows, int64_t next, uint16_t* to) const {
    __m512i even[16], odd[16];  // the pairs of columns of tokens 0 to 15 and 16 to 31
    transpose_dwords(rows, v_size, even);
    transpose_dwords(rows + 16 * v_size, v_size, odd);
    for (int i = 0; i < 16; ++i) {
      const __m512i low =
          _mm512_mask_blend_epi16(0xaaaaaaaa, even[i], (__m512i)((VecU)odd[i] << 16));
      const __m512i high =
          _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)((VecU)even[i] >> 16), odd[i]);
      uint16_t* row = to + i / 8 * next + i % 8 * 64;
      _mm512_storeu_si512(row, low);
      _mm512_storeu_si512(row + 32, high);
    }
  }

  template <bool kAccumulate>
  void multiply_all(int64_t rows, int64_t steps, const Left& a, const uint32_t* b, int64_t b_stride,
                    int wide, float* c, int64_t c_stride, Prefetch& ahead) {
    for (int64_t i = 0; rows > 0; i += 2, rows -= 32, c += 32 * kLanes) {
      if (wide == 2) {
        multiply_tiles<2, kAccumulate>(rows, steps, a, i, b, b_stride, c, c_stride, ahead,
                                       lines_per_step);
      } else {
        multiply_tiles<1, kAccumulate>(rows, steps, a, i, b, b_stride, c, c_stride, ahead,
                                       lines_per_step);
      }
    }
  }
};

}  // namespace saffron::cpu::SAFFRON_ISA
