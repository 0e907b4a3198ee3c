#pragma once

// The two products of attention on the matrix unit (AMX): bf16 tiles of 16 rows x 32 columns, fp32
// sums. The right-hand side of a product (queries, weights) holds pairs of consecutive k in one
// dword. K enters as it is; V has to be transposed, once per tile of tokens.

#include <immintrin.h>

#include "cpu/simd/attention.h"

namespace saffron::cpu::SAFFRON_ISA {

static_assert(kLanes == 16, "an AMX tile has 16 rows, and so has a vector");

/// All eight tile registers with 16 rows of 64 bytes, as long as this lives.
struct TileRegisters {
  TileRegisters() {
    alignas(64) uint8_t config[64] = {1};  // palette 1; bytes from 16 on: columns, from 48 on: rows
    for (int i = 0; i < 8; ++i) {
      config[16 + 2 * i] = 64;
      config[48 + i] = 16;
    }
    _tile_loadconfig(config);
  }
  ~TileRegisters() { _tile_release(); }
};

/// C (+)= A * B: kTall x kWide tiles of fp32, over `steps` tiles of A (row-major, `a_stride` bytes)
/// and of B (pairs, rows of kPanel dwords). C has rows of kPanel floats.
template <int kTall, int kWide, bool kAccumulate>
inline void multiply_tiles(int64_t steps, const uint16_t* a, int64_t a_stride, const uint32_t* b,
                           float* c, Prefetch& ahead, int64_t lines) {
  constexpr int64_t row = kPanel * 4;
  if constexpr (kAccumulate) {
    _tile_loadd(0, c, row);
    if constexpr (kWide == 2) _tile_loadd(1, c + 16, row);
    if constexpr (kTall == 2) _tile_loadd(2, c + 16 * kPanel, row);
    if constexpr (kTall == 2 && kWide == 2) _tile_loadd(3, c + 16 * kPanel + 16, row);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k) {
    ahead.next(lines);
    _tile_loadd(4, a + k * 32, a_stride);
    _tile_loadd(6, b + k * 16 * kPanel, row);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kWide == 2) {
      _tile_loadd(7, b + k * 16 * kPanel + 16, row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTall == 2) {
      _tile_loadd(5, a + k * 32 + 8 * a_stride, a_stride);  // 16 rows on; a counts half bytes
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kTall == 2 && kWide == 2) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, row);
  if constexpr (kWide == 2) _tile_stored(1, c + 16, row);
  if constexpr (kTall == 2) _tile_stored(2, c + 16 * kPanel, row);
  if constexpr (kTall == 2 && kWide == 2) _tile_stored(3, c + 16 * kPanel + 16, row);
}

struct AmxMath {
  const TileRegisters registers;
  using Storage = uint16_t;
  static constexpr int64_t kTileTokens = 128;

  int64_t head_dim, k_size, v_size;  // head_dim, and rounded up to tiles as K and as V
  uint32_t* q;                       // [panel, k_size / 2, kPanel] pairs
  uint16_t *k, *v;                   // [token, k_size], [v_size, token]
  float *scores, *out;
  uint32_t* weights;  // [token / 2, kPanel] pairs
  uint16_t* staged;   // [16, k_size] queries
  int64_t lines_per_step = 0, lines_per_pair = 0;

  AmxMath(Carver& carver, int64_t panels, int64_t head_dim)
      : head_dim(head_dim),
        k_size(round_up(head_dim, 32)),
        v_size(round_up(head_dim, 16)),
        q(carver.take<uint32_t>(panels * k_size / 2 * kPanel)),
        k(carver.take<uint16_t>(kTileTokens * k_size)),
        v(carver.take<uint16_t>(v_size * kTileTokens)),
        scores(carver.take<float>(kTileTokens * kPanel)),
        out(carver.take<float>(16 * kPanel)),
        weights(carver.take<uint32_t>(kTileTokens / 2 * kPanel)),
        staged(carver.take<uint16_t>(16 * k_size)) {}

  void set_queries(int64_t panel, int vec, const uint16_t* const* row, int64_t step, int64_t rows,
                   float sign) {
    std::memset(staged, 0, static_cast<size_t>(16 * k_size) * sizeof *staged);
    const uint16_t flip = sign < 0 ? 0x8000 : 0, keep = sign == 0 ? 0 : 0xffff;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < head_dim; ++d)
        staged[r * k_size + d] = (row[r][d * step] & keep) ^ flip;
    }
    uint32_t* to = q + panel * k_size / 2 * kPanel + vec * 16;
    for (int64_t d = 0; d < k_size; d += 32) {
      Vec block[16];  // of pairs
      for (int i = 0; i < 16; ++i) std::memcpy(&block[i], staged + i * k_size + d, 64);
      transpose<1>(block);
      for (int i = 0; i < 16; ++i) std::memcpy(to + (d / 2 + i) * kPanel, &block[i], 64);
    }
    // What pads K and V must be finite: 0 times whatever the buffer held could be NaN.
    if (k_size != head_dim)
      std::memset(k, 0, static_cast<size_t>(kTileTokens * k_size) * sizeof *k);
    if (v_size != head_dim)
      std::memset(v, 0, static_cast<size_t>(v_size * kTileTokens) * sizeof *v);
  }

  void load_tile(const AttentionTask& task, const Tile& tile, bool) {
    const int64_t count = tile.count;
    const int32_t* slot = task.slot + tile.first;
    for (int64_t t = 0; t < count; ++t) {
      const char* row = task.k + slot[t] * task.row_stride;
      int64_t at = 0;
      for (; at + 64 <= head_dim * 2; at += 64) {
        std::memcpy(reinterpret_cast<char*>(k + t * k_size) + at, row + at, 64);
      }
      for (; at < head_dim * 2; at += 2) {
        std::memcpy(reinterpret_cast<char*>(k + t * k_size) + at, row + at, 2);
      }
    }
    const int64_t padded = round_up(count, 32);
    for (int64_t t = 0; t < padded; t += 32) {
      const uint16_t* rows[32];
      for (int64_t i = 0; i < 32; ++i) {
        const char* row = t + i < count ? task.v + slot[t + i] * task.v_row_stride : nullptr;
        rows[i] = reinterpret_cast<const uint16_t*>(row);
      }
      for (int64_t d = 0; d < head_dim; d += 16) transpose_values(rows, d, v + d * kTileTokens + t);
    }
  }

  void score(int64_t panel, int first_vec, int vecs, int64_t count, Prefetch& ahead) {
    const uint32_t* b = q + panel * k_size / 2 * kPanel + first_vec * 16;
    float* c = scores + first_vec * 16;
    multiply_all<false>(round_up(count, 16), k_size / 32, k, k_size * 2, b, c, vecs, ahead);
  }

  /// Spreads the lines of the next tile: half over the steps of the products, half over the
  /// weights.
  void pace(const Prefetch& ahead, int64_t panels) {
    const int64_t steps = kTileTokens / 32 * (k_size + v_size) / 32 * panels;
    lines_per_step = ceil_div(ahead.lines() / 2, steps);
    lines_per_pair = ceil_div(ahead.lines() / 2, kTileTokens * panels);
  }
  void between_weights(Prefetch& ahead) { ahead.next(lines_per_pair); }

  /// A short polynomial will do: weights are rounded to bf16, 2e-3.
  static Vec weight(Vec x) { return exp2<true>(x); }

  void set_weight_pair(int64_t t, int vec, Vec even, Vec odd) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    const __m512i pairs = _mm512_maskz_permutexvar_epi16(~0u, interleave(), halves);
    std::memcpy(weights + t / 2 * kPanel + vec * 16, &pairs, sizeof pairs);
  }
  void set_last_weight(int64_t t, int vec, Vec weight) { set_weight_pair(t, vec, weight, Vec{}); }

  void accumulate(float* to, int first_vec, int vecs, int64_t count, Prefetch& ahead) {
    for (int64_t t = round_up(count, 2); t < round_up(count, 32); t += 2) {
      for (int vec = first_vec; vec < first_vec + vecs; ++vec)
        set_weight_pair(t, vec, Vec{}, Vec{});
    }
    const uint32_t* b = weights + first_vec * 16;
    const int64_t steps = ceil_div(count, 32), whole = head_dim / 16 * 16;
    multiply_all<true>(whole, steps, v, kTileTokens * 2, b, to + first_vec * 16, vecs, ahead);
    if (whole == head_dim) return;
    // A tile that reaches beyond the outputs works on a copy.
    const size_t rest = static_cast<size_t>((head_dim - whole) * kPanel) * sizeof(float);
    std::memcpy(out, to + whole * kPanel, rest);
    multiply_all<true>(16, steps, v + whole * kTileTokens, kTileTokens * 2, b, out + first_vec * 16,
                       vecs, ahead);
    std::memcpy(to + whole * kPanel, out, rest);
  }

 private:
  /// 0, 16, 1, 17, ...: pairs from the numbers of two halves.
  static __m512i interleave() {
    const VecU pairs = (VecU)lane_numbers() * 0x10001u + 0x100000u;
    return (__m512i)pairs;
  }

  /// 32 rows of V (null: zeros), 16 columns from `d`: to 16 rows of 32.
  void transpose_values(const uint16_t* const (&rows)[32], int64_t d, uint16_t* to) const {
    Vec pairs[16];
    for (int i = 0; i < 16; ++i) {
      pairs[i] = (Vec)((VecU)columns(rows[2 * i], d) >> 16 | (VecU)columns(rows[2 * i + 1], d));
    }
    transpose<1>(pairs);
    for (int i = 0; i < 16; ++i) std::memcpy(to + i * kTileTokens, &pairs[i], sizeof pairs[i]);
  }
  Vec columns(const uint16_t* row, int64_t d) const {
    if (row == nullptr) return Vec{};
    if (d + 16 <= head_dim) return load(row + d);
    uint16_t part[16] = {};
    for (int64_t i = d; i < head_dim; ++i) part[i - d] = row[i];
    return load(part);
  }

  template <bool kAccumulate>
  void multiply_all(int64_t rows, int64_t steps, const uint16_t* a, int64_t a_stride,
                    const uint32_t* b, float* c, int vecs, Prefetch& ahead) {
    for (int64_t i = 0; i < rows; i += 32) {
      const uint16_t* left = a + i * a_stride / 2;
      if (rows - i >= 32) {
        if (vecs == 2) {
          multiply_tiles<2, 2, kAccumulate>(steps, left, a_stride, b, c + i * kPanel, ahead,
                                            lines_per_step);
        } else {
          multiply_tiles<2, 1, kAccumulate>(steps, left, a_stride, b, c + i * kPanel, ahead,
                                            lines_per_step);
        }
      } else if (vecs == 2) {
        multiply_tiles<1, 2, kAccumulate>(steps, left, a_stride, b, c + i * kPanel, ahead,
                                          lines_per_step);
      } else {
        multiply_tiles<1, 1, kAccumulate>(steps, left, a_stride, b, c + i * kPanel, ahead,
                                          lines_per_step);
      }
    }
  }
};

}  // namespace saffron::cpu::SAFFRON_ISA
