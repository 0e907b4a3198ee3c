#pragma once

// Part of tree_attention.cu: what a warp does with one tile of tokens.

#include "cuda/attention/configuration.cuh"

namespace saffron::cuda {
namespace {

/// Copies K and V of the listed tokens `first ..` into a stage; rows of zeros where there is no
/// token.
template <class C>
__device__ __forceinline__ void fetch_tile(const Arguments& a, typename C::Shared& s, int kv_head,
                                           int first, int stage) {
  using Stored = typename C::Stored;
  constexpr int kChunks = C::kD / C::kChunk;
  const Stored* k = static_cast<const Stored*>(a.k) + kv_head * a.k_stride_h;
  const Stored* v = static_cast<const Stored*>(a.v) + kv_head * a.v_stride_h;
  constexpr int kCopies = C::kTokens * kChunks / C::kThreads;  // of a thread
  static_assert(C::kTokens * kChunks % C::kThreads == 0);
#pragma unroll(C::kD > 128 ? 2 : 4)  // registers
  for (int i = 0; i < kCopies; ++i) {
    const int place = static_cast<int>(threadIdx.x) + i * C::kThreads;
    const int row = place / kChunks, column = place % kChunks * C::kChunk;
    const int64_t slot = s.slot[first + row];
    const bool read_k = slot >= 0 && column < a.head_dim;
    const bool read_v = slot >= 0 && column < a.v_dim;
    void *to_k, *to_v;
    if constexpr (C::kConvert) {
      to_k = &s.raw[(stage * 2 * C::kThreads * kCopies + place) * 16];
      to_v = &s.raw[((stage * 2 + 1) * C::kThreads * kCopies + place) * 16];
    } else {
      const int at = row * C::kStride + column;
      to_k = &s.kv[stage][0][at];
      to_v = &s.kv[stage][1][at];
    }
    ptx::copy16(to_k, k + (read_k ? slot * a.k_stride_s + column : 0), read_k);
    ptx::copy16(to_v, v + (read_v ? slot * a.v_stride_s + column : 0), read_v);
  }
}

/// Converts what this thread has copied into a stage, so that no other has to wait for it.
template <class C>
__device__ __forceinline__ void convert_tile(typename C::Shared& s, int stage, int tile) {
  constexpr int kChunks = C::kD / 16, kCopies = C::kTokens * kChunks / C::kThreads;
#pragma unroll(C::kThreads < 128 ? 2 : 4)  // registers
  for (int i = 0; i < kCopies; ++i) {
    const int place = static_cast<int>(threadIdx.x) + i * C::kThreads;
    const int row = place / kChunks, chunk = place % kChunks;
    // Which half of its 32 bytes a thread writes first differs, and so does the bank.
    const bool swapped = chunk / 4 % 2 != 0;
#pragma unroll
    for (int kv = 0; kv < 2; ++kv) {
      const uint4 raw = *reinterpret_cast<const uint4*>(
          &s.raw[((stage * 2 + kv) * C::kThreads * kCopies + place) * 16]);
      const uint32_t words[4] = {swapped ? raw.z : raw.x, swapped ? raw.w : raw.y,
                                 swapped ? raw.x : raw.z, swapped ? raw.y : raw.w};
      uint16_t* to = &s.kv[tile][kv][row * C::kStride + chunk * 16];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t low[2], high[2];
        widen<typename C::T>(words[2 * half], low);
        widen<typename C::T>(words[2 * half + 1], high);
        *reinterpret_cast<uint4*>(to + (swapped == (half == 0) ? 8 : 0)) =
            make_uint4(low[0], low[1], high[0], high[1]);
      }
    }
  }
}

template <class C>
__device__ __forceinline__ void fetch_q(const Arguments& a, typename C::Shared& s, int kv_head,
                                        int first_row, int rows) {
  using T = typename C::T;
  constexpr int kChunks = C::kD / 8;
  const T* q = static_cast<const T*>(a.q);
  for (int place = static_cast<int>(threadIdx.x); place < C::kRows * kChunks;
       place += C::kThreads) {
    const int row = place / kChunks, chunk = place % kChunks;
    const bool read = first_row + row < rows && chunk * 8 < a.head_dim;
    const int64_t query = (first_row + row) / a.group;
    const int64_t head = kv_head * a.group + (first_row + row) % a.group;
    const int64_t from = read ? query * a.q_stride_n + head * a.q_stride_h + chunk * 8 : 0;
    ptx::copy16(&s.q[row * C::kStride + chunk * 8], q + from, read);
  }
}

/// Lists those of `tokens`, from number `first` on, that a query from `low` to `high` sees, in
/// order, and fills the last tile up with tokens that nobody sees. At most kListed tokens. Returns
/// how many are listed.
template <class C, class Tokens>
__device__ __forceinline__ int list_tokens(const Arguments& a, typename C::Shared& s,
                                           const Tokens& tokens, int first, int low, int high) {
  constexpr int kWarps = C::kWarpsM * C::kWarpsN;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  int slot[4], begin[4], end[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int number = first + i * C::kThreads + thread;
    const int token = number < tokens.size ? tokens.at(number) : tokens.end;
    const bool exists = token < tokens.end;
    slot[i] = exists ? a.slot[token] : -1;
    begin[i] = exists ? a.begin[token] : 0;
    end[i] = exists ? a.end[token] : 0;
  }
  unsigned live[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool seen = begin[i] < end[i] && begin[i] <= high && end[i] > low;
    const bool exists = slot[i] >= 0 && slot[i] < a.num_slots;
    // A token that some query of the launch sees, here or elsewhere, has to have a slot.
    if (begin[i] < end[i] && begin[i] < a.queries && end[i] > 0 && !exists) {
      atomicOr(a.fault, kSlotFault);
    }
    live[i] = __ballot_sync(0xffffffffu, seen && exists);
    if (lane == 0) s.counts[i * kWarps + warp] = __popc(live[i]);
  }
  __syncthreads();  // counts are there; nobody needs the previous list and its tiles
  int sum = lane < 4 * kWarps ? s.counts[lane] : 0;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += before;
  }
  const int listed = __shfl_sync(0xffffffffu, sum, 31);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int segment = i * kWarps + warp;
    const int before = __shfl_sync(0xffffffffu, sum, segment > 0 ? segment - 1 : 0);
    if (live[i] >> lane & 1) {
      const int place = (segment > 0 ? before : 0) + __popc(live[i] & ((1u << lane) - 1));
      s.slot[place] = slot[i];
      s.begin[place] = begin[i];
      s.end[place] = end[i];
    }
  }
  const int fill = listed + thread;
  if (thread < C::kTokens && fill < (listed + C::kTokens - 1) / C::kTokens * C::kTokens) {
    s.slot[fill] = -1;
    s.begin[fill] = 0x7fffffff;
    s.end[fill] = -0x7fffffff;
  }
  __syncthreads();
  return listed;
}

/// One 16x16 fragment of this warp's rows of Q.
template <class C>
__device__ __forceinline__ void load_q(const typename C::Shared& s, uint32_t (&q)[4], int warp_m,
                                       int step) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int row = warp_m * 16 + lane % 16;
  ptx::load_matrices(q, &s.q[row * C::kStride + step * 16 + lane / 16 * 8]);
}

/// The largest score of a row is at least this once the row has seen a token, even if its scores
/// are NaN or -infinity: -infinity is that of a row that has seen nothing, and of no other.
constexpr float kLowestSeen = -3.402823466e38f;

/// tanh(x), right to a few units in the last place: a polynomial near 0 (Cephes' tanhf), where the
/// quotient of exponentials cancels.
__device__ __forceinline__ float tanh_of(float x) {
  const float e = ptx::exp2(fabsf(x) * -2.885390082f);
  const float far = copysignf((1.f - e) * ptx::reciprocal(1.f + e), x);
  const float z = x * x;
  float y = -5.70498872745e-3f * z + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
  return fabsf(x) < 0.625f ? y * z * x + x : far;
}

/// Leaves in `score` what the tokens of a tile weigh in the rows of this warp, having adapted the
/// result so far to the largest score. `all`: every row sees every token, nothing is masked.
template <class C, int kBlocks>
__device__ __forceinline__ void exponentiate(const Arguments& a, Warp<C>& own,
                                             float (&score)[kBlocks][4], float scale,
                                             const int* begins, const int* ends, bool all) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float largest[2] = {own.largest[0], own.largest[1]};
  bool sees[2] = {all, all};
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) score[block][i] *= scale;
    if (a.capped) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[block][i] = tanh_of(score[block][i]) * a.cap;
    }
    if (!all) {
      const int token = block * 8 + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int query = own.query[i / 2];
        // Both are loaded and `|` decides: `||` would be a branch for every score.
        const bool hidden = (query < begins[token + i % 2]) | (query >= ends[token + i % 2]);
        score[block][i] = hidden ? -INFINITY : score[block][i];
        sees[i / 2] |= !hidden;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], score[block][i]);
  }
  float decay[2], base[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (sees[r]) largest[r] = fmaxf(largest[r], kLowestSeen);
    largest[r] = fmaxf(largest[r], __shfl_xor_sync(0xffffffffu, largest[r], 1));
    largest[r] = fmaxf(largest[r], __shfl_xor_sync(0xffffffffu, largest[r], 2));
    base[r] = largest[r] == -INFINITY ? 0.f : largest[r];  // no -inf - -inf
    decay[r] = ptx::exp2(own.largest[r] - base[r]);
    own.largest[r] = largest[r];
    own.total[r] *= decay[r];
  }
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      score[block][i] = ptx::exp2(score[block][i] - base[i / 2]);
      own.total[i / 2] += score[block][i];
    }
  }
#pragma unroll
  for (int d = 0; d < C::kD / 8; ++d) {
#pragma unroll
    for (int i = 0; i < 4; ++i) own.acc[d][i] *= decay[i / 2];
  }
}

/// Whether one of two 16-bit numbers is NaN or infinite.
template <class T>
__device__ __forceinline__ bool is_unfit(uint32_t pair) {
  const uint32_t zero =
      std::is_same_v<T, BFloat16> ? ptx::multiply_bf16(pair, 0u) : ptx::multiply_half(pair, 0u);
  return (zero & 0x7fff7fffu) != 0;
}

/// Whether some V of a tile that not all rows see is not finite. It would spoil the rows that do
/// not see it, as 0 times NaN is NaN. `eight(i)` are the numbers 8 i to 8 i + 7 of the tile. Called
/// by a whole warp, whose lanes all get the answer.
template <class T, class F>
__device__ __forceinline__ bool is_unfit_tile(int numbers, F eight) {
  bool unfit = false;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < numbers / 8; i += 32) {
    const uint4 x = *reinterpret_cast<const uint4*>(eight(i));
    unfit |= is_unfit<T>(x.x) | is_unfit<T>(x.y) | is_unfit<T>(x.z) | is_unfit<T>(x.w);
  }
  return __any_sync(0xffffffffu, unfit);
}

/// Adds V of a tile token by token, each to those of the warp's rows that see it. `pair(token,
/// column)` is where two numbers stand.
template <class C, int kBlocks, class F>
__device__ __forceinline__ void add_by_token(Warp<C>& own, const float (&weight)[kBlocks][4],
                                             const int* begins, const int* ends, F pair) {
  using T = typename C::T;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
  for (int token = 0; token < 8 * kBlocks; ++token) {
    float w[2];
    bool sees[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float held = 0.f;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const float x = token % 2 == 0 ? weight[block][2 * r] : weight[block][2 * r + 1];
        held = block == token / 8 ? x : held;
      }
      w[r] = __shfl_sync(0xffffffffu, held, lane / 4 * 4 + token % 8 / 2);
      sees[r] = own.query[r] >= begins[token] && own.query[r] < ends[token];
    }
#pragma unroll
    for (int d = 0; d < C::kD / 8; ++d) {
      const uint32_t both = *reinterpret_cast<const uint32_t*>(pair(token, 8 * d + lane % 4 * 2));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = to_float(T{static_cast<uint16_t>(i % 2 == 0 ? both : both >> 16)});
        own.acc[d][i] = sees[i / 2] ? own.acc[d][i] + w[i / 2] * x : own.acc[d][i];
      }
    }
  }
}

/// Adds the tokens of one tile, `first ..` in the list, to the result of the warp's rows.
template <class C>
__device__ __forceinline__ void attend(const Arguments& a, const typename C::Shared& s,
                                       Warp<C>& own, int warp_m, int warp_n, int first, int tile) {
  using T = typename C::T;
  constexpr int kBlocks = C::kWarpTokens / 8;  // of 8 tokens
  const int lane = static_cast<int>(threadIdx.x) % 32;
  first += warp_n * C::kWarpTokens;
  bool any = false, all = true;
  for (int i = lane; i < C::kWarpTokens; i += 32) {
    const int begin = s.begin[first + i], end = s.end[first + i];
    any |= begin <= own.last_query && end > own.first_query;
    all &= begin <= own.first_query && end > own.last_query;
  }
  if (own.first_query > own.last_query || !__any_sync(0xffffffffu, any)) return;
  all = __all_sync(0xffffffffu, all);

  float score[kBlocks][4] = {};
  const uint16_t* k = s.kv[tile][0];
  const int k_row = warp_n * C::kWarpTokens + lane / 16 * 8 + lane % 8;
  const int k_column = lane / 8 % 2 * 8;
#pragma unroll
  for (int step = 0; step < C::kD / 16; ++step) {
    uint32_t q[4];
    if constexpr (!C::kHoldQ) load_q<C>(s, q, warp_m, step);
#pragma unroll
    for (int pair = 0; pair < kBlocks / 2; ++pair) {
      uint32_t b[4];
      ptx::load_matrices(b, k + (k_row + pair * 16) * C::kStride + step * 16 + k_column);
      if constexpr (C::kHoldQ) {
        mma<T>(score[2 * pair], own.q[step], b[0], b[1]);
        mma<T>(score[2 * pair + 1], own.q[step], b[2], b[3]);
      } else {
        mma<T>(score[2 * pair], q, b[0], b[1]);
        mma<T>(score[2 * pair + 1], q, b[2], b[3]);
      }
    }
  }

  const float scale = C::kConvert ? own.scale : a.scale;
  exponentiate(a, own, score, scale, s.begin + first, s.end + first, all);

  const uint16_t* v = s.kv[tile][1];
  if (!all) {
    const uint16_t* rows = v + warp_n * C::kWarpTokens * C::kStride;
    const auto eight = [&](int i) {
      return rows + i / (C::kD / 8) * C::kStride + i % (C::kD / 8) * 8;
    };
    if (is_unfit_tile<T>(C::kWarpTokens * C::kD, eight)) {
      const auto pair = [&](int token, int column) { return rows + token * C::kStride + column; };
      return add_by_token(own, score, s.begin + first, s.end + first, pair);
    }
  }
  const int v_row = warp_n * C::kWarpTokens + lane % 16, v_column = lane / 16 * 8;
#pragma unroll
  for (int step = 0; step < kBlocks / 2; ++step) {
    const auto &left = score[2 * step], &right = score[2 * step + 1];
    const uint32_t p[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                           pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
    for (int d = 0; d < C::kD / 16; ++d) {
      uint32_t b[4];
      ptx::load_matrices_transposed(b, v + (v_row + step * 16) * C::kStride + d * 16 + v_column);
      mma<T>(own.acc[2 * d], p, b[0], b[1]);
      mma<T>(own.acc[2 * d + 1], p, b[2], b[3]);
    }
  }
}

}  // namespace
}  // namespace saffron::cuda
