#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/ops.h"
#include "cpu/simd/kernels.h"
#include "cpu/threads.h"

namespace saffron::cpu {

void merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                     const Tensor& lse_b, const Tensor& out, const Tensor& lse, int threads) {
  const int64_t queries = out.shape[0], heads = out.shape[1], head_dim = out.shape[2];
  constexpr int64_t block = 16;  // queries a task
  parallel_for((queries + block - 1) / block, threads, [&](int64_t task, int) {
    for (int64_t q = task * block; q < std::min(queries, (task + 1) * block); ++q) {
      for (int64_t h = 0; h < heads; ++h) {
        const float a = *reinterpret_cast<const float*>(lse_a.at(q, h));
        const float b = *reinterpret_cast<const float*>(lse_b.at(q, h));
        const bool nothing = a == b && std::isinf(a) && a < 0;
        // NaN in either is NaN: they are not compared but subtracted.
        const float larger = a < b ? b : a;
        const float joined =
            a == b ? a + 0.69314718f : larger + std::log1p(std::exp(-std::abs(a - b)));
        const float base = nothing ? 0.f : joined;
        *reinterpret_cast<float*>(lse.at(q, h)) = joined;
        kernels().blend(out_a.at(q, h), out_b.at(q, h), std::exp(a - base), std::exp(b - base),
                        out.dtype, head_dim, out.at(q, h));
      }
    }
  });
}

}  // namespace saffron::cpu
