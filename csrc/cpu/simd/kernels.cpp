// Compiled once for each instruction set, with SAFFRON_ISA as its name.

#include "cpu/simd/kernels.h"

#include <type_traits>

#include "cpu/simd/attention.h"
#include "cpu/simd/attention_finish.h"
#include "cpu/simd/attention_float.h"
#include "cpu/simd/attention_strips.h"
#include "cpu/simd/rows.h"

namespace saffron::cpu::SAFFRON_ISA {
namespace {

/// Calls f with a null pointer to the Math for a dtype and the sizes of rows of K and V.
template <class F>
inline auto with_math(DType dtype, int64_t head_dim, int64_t v_dim, F&& f) {
  const int64_t size = head_dim > v_dim ? head_dim : v_dim;
  if (dtype == DType::kBFloat16) {
    if (size <= 64) return f(static_cast<FloatMath<uint16_t, 64>*>(nullptr));
    if (size <= 128) return f(static_cast<FloatMath<uint16_t, 128>*>(nullptr));
    return f(static_cast<FloatMath<uint16_t, kMaxHeadDim>*>(nullptr));
  }
  if (size <= 64) return f(static_cast<FloatMath<float, 64>*>(nullptr));
  if (size <= 128) return f(static_cast<FloatMath<float, 128>*>(nullptr));
  return f(static_cast<FloatMath<float, kMaxHeadDim>*>(nullptr));
}

/// Calls f with a pointer of the storage type.
template <class F>
inline auto with_type(DType dtype, const char* data, F&& f) {
  return dtype == DType::kBFloat16 ? f(reinterpret_cast<const uint16_t*>(data))
                                   : f(reinterpret_cast<const float*>(data));
}

int64_t tile_tokens(DType dtype, int64_t head_dim, int64_t v_dim) {
  return with_math(dtype, head_dim, v_dim,
                   [](auto* math) { return std::remove_pointer_t<decltype(math)>::kTileTokens; });
}

int64_t attend_scratch(DType dtype, int64_t rows, int64_t heads, int64_t head_dim, int64_t v_dim) {
  return with_math(dtype, head_dim, v_dim, [&](auto* math) {
    ScratchAllocator allocator{nullptr};
    std::remove_pointer_t<decltype(math)>(allocator, ceil_div(rows, kLanes) * heads, head_dim,
                                          v_dim);
    return allocator.used;
  });
}

void attend_any(const AttentionTask& task) {
  with_math(task.q.dtype, task.q.shape[2], task.v_dim, [&](auto* math) {
    using Math = std::remove_pointer_t<decltype(math)>;
    attend<Math, typename Math::Storage>(task);
  });
}

void attend_strips_any(const StripTask& task) {
  task.q.dtype == DType::kBFloat16 ? Strips<uint16_t>(task).run() : Strips<float>(task).run();
}

void finish_any(const FinishTask& task) {
  task.out.dtype == DType::kBFloat16 ? finish<uint16_t>(task) : finish<float>(task);
}

void blend_any(const char* a, const char* b, float weight_a, float weight_b, DType dtype,
               int64_t count, char* to) {
  with_type(dtype, a, [&](auto* first) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(first)>>;
    blend(first, reinterpret_cast<const T*>(b), weight_a, weight_b, count,
          reinterpret_cast<T*>(to));
  });
}

void scan_any(const char* const* blocks, DType dtype, int64_t count, int64_t size_of_last,
              float* top, float* sum) {
  with_type(dtype, blocks[0], [&](auto* x) {
    scan(reinterpret_cast<decltype(x) const*>(blocks), count, size_of_last, top, sum);
  });
}

int64_t collect_any(const char* logits, DType dtype, int64_t count, int64_t first_token,
                    float threshold, float shift, uint64_t* keys, double* mass) {
  return with_type(dtype, logits, [&](auto* x) {
    return collect(x, count, first_token, threshold, shift, keys, mass);
  });
}

void dots_any(const char* weight, DType dtype, const float* hidden, int64_t hidden_stride,
              int64_t size, const int32_t* rows, int64_t count, float* out) {
  with_type(dtype, weight,
            [&](auto* w) { dots(w, hidden, hidden_stride, size, rows, count, out); });
}

void widen_any(const char* from, DType dtype, int64_t count, float* to) {
  with_type(dtype, from, [&](auto* x) { widen(x, count, to); });
}

}  // namespace

#define SAFFRON_TEXT(x) #x
#define SAFFRON_NAME(x) SAFFRON_TEXT(x)
extern const Kernels table;
const Kernels table = {SAFFRON_NAME(SAFFRON_ISA),
                       kLanes,
                       &tile_tokens,
                       &partial_size,
                       &attend_scratch,
                       &attend_any,
                       &strip_rows,
                       &strip_partial_size,
                       &strip_scratch,
                       &attend_strips_any,
                       &finish_any,
                       &blend_any,
                       &scan_any,
                       &join,
                       &collect_any,
                       &probabilities,
                       &dots_any,
                       &widen_any};

}  // namespace saffron::cpu::SAFFRON_ISA
