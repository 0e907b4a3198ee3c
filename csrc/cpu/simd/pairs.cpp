// Compiled once for each instruction set that multiplies pairs of bf16 numbers, with SAFFRON_ISA as
// its name. Only attention in bf16 differs from AVX-512: the rest is compiled once, for that.

#ifdef __AVX512BF16__

#include "cpu/simd/attention_bf16.h"

namespace saffron::cpu::SAFFRON_ISA {
namespace {

const Kernels* rest = nullptr;

int64_t tile_tokens(DType dtype, int64_t head_dim, int64_t v_dim) {
  return dtype == DType::kBFloat16 ? PairMath::kTileTokens
                                   : rest->tile_tokens(dtype, head_dim, v_dim);
}

int64_t attend_scratch(DType dtype, int64_t rows, int64_t heads, int64_t head_dim, int64_t v_dim) {
  if (dtype != DType::kBFloat16) return rest->attend_scratch(dtype, rows, heads, head_dim, v_dim);
  ScratchAllocator allocator{nullptr};
  PairMath(allocator, ceil_div(rows, kLanes) * heads, head_dim, v_dim);
  return allocator.used;
}

void attend_any(const AttentionTask& task) {
  task.q.dtype == DType::kBFloat16 ? attend<PairMath, uint16_t>(task) : rest->attend(task);
}

int64_t strip_rows(DType dtype, int64_t head_dim, int64_t v_dim) {
#ifdef __AMX_BF16__
  constexpr int64_t most = 4;
#else
  constexpr int64_t most = 8;
#endif
  const int64_t rows = rest->strip_rows(dtype, head_dim, v_dim);
  return dtype == DType::kBFloat16 && rows > most ? most : rows;  // beyond, pairs take less time
}

}  // namespace

Kernels over(const Kernels& avx512, const char* name) {
  rest = &avx512;
  Kernels table = avx512;
  table.name = name;
  table.tile_tokens = &tile_tokens;
  table.attend_scratch = &attend_scratch;
  table.attend = &attend_any;
  table.strip_rows = &strip_rows;
  return table;
}

}  // namespace saffron::cpu::SAFFRON_ISA

#endif
