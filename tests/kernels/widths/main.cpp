// `tree_attention` with vectors of 16 numbers, which not every machine that runs the tests has,
// against the formula in fp64: for every number of rows that a strip can have, and next to tiles.
// Prints what is wrong, and returns 0 if nothing is.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/ops.h"

using namespace saffron::cpu;

namespace {

constexpr int64_t kKvHeads = 2, kDim = 64, kOwn = 150, kShared = 90;

float widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

/// Random numbers, and the tensor of them in fp32 or bf16.
struct Numbers {
  std::vector<float> value;
  std::vector<uint16_t> halves;
  Tensor tensor;

  Numbers(std::mt19937& random, bool half, int64_t a, int64_t b) {
    std::normal_distribution<float> normal;
    value.resize(static_cast<size_t>(a * b * kDim));
    for (float& x : value) {
      const float drawn = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &drawn, sizeof bits);
      halves.push_back(static_cast<uint16_t>(bits >> 16));
      x = half ? widened(halves.back()) : drawn;
    }
    tensor.data =
        half ? reinterpret_cast<char*>(halves.data()) : reinterpret_cast<char*>(value.data());
    tensor.dtype = half ? DType::kBFloat16 : DType::kFloat32;
    tensor.rank = 3;
    const int64_t shape[] = {a, b, kDim}, stride[] = {b * kDim, kDim, 1};
    std::memcpy(tensor.shape, shape, sizeof shape);
    std::memcpy(tensor.stride, stride, sizeof stride);
  }
  const float* at(int64_t i, int64_t j) const { return &value[(i * tensor.shape[1] + j) * kDim]; }
};

Tensor ints(std::vector<int32_t>& x) {
  Tensor t;
  t.data = reinterpret_cast<char*>(x.data());
  t.dtype = DType::kInt32;
  t.rank = 1;
  t.shape[0] = static_cast<int64_t>(x.size());
  t.stride[0] = 1;
  return t;
}

/// The largest error of any output. Query i sees its own tokens, some in runs and some apart, and
/// those of all.
double error(int64_t queries, int64_t group, bool half) {
  std::mt19937 random(static_cast<unsigned>(queries * 100 + group));
  const int64_t slots = queries * kOwn + kShared;
  Numbers q(random, half, queries, group * kKvHeads), k(random, half, slots, kKvHeads),
      v(random, half, slots, kKvHeads);
  std::vector<int32_t> slot, begin, end;
  const auto see = [&](int64_t s, int64_t b, int64_t e) {
    slot.push_back(static_cast<int32_t>(s));
    begin.push_back(static_cast<int32_t>(b));
    end.push_back(static_cast<int32_t>(e));
  };
  for (int64_t t = 0; t < kShared; ++t) see(slots - 1 - t, 0, queries);
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t t = 0; t < kOwn - 20; ++t) see(i * kOwn + t, i, i + 1);
  }
  for (int64_t t = kOwn - 20; t < kOwn; ++t) {
    for (int64_t i = 0; i < queries; ++i) see(i * kOwn + t, i, i + 1);
  }
  Numbers found(random, half, queries, group * kKvHeads);
  std::vector<float> lse(static_cast<size_t>(queries * group * kKvHeads));
  Tensor lses = found.tensor;
  lses.data = reinterpret_cast<char*>(lse.data());
  lses.dtype = DType::kFloat32;
  lses.rank = 2;
  tree_attention(q.tensor, k.tensor, v.tensor, ints(slot), ints(begin), ints(end), 0.2f,
                 std::nullopt, Tensor{}, found.tensor, lses, 1);
  double worst = 0;
  for (int64_t i = 0; i < queries; ++i) {
    for (int64_t h = 0; h < group * kKvHeads; ++h) {
      std::vector<double> out(kDim, 0);
      double sum = 0;
      for (size_t t = 0; t < slot.size(); ++t) {
        if (i < begin[t] || i >= end[t]) continue;
        double score = 0;
        for (int64_t d = 0; d < kDim; ++d) {
          score += static_cast<double>(q.at(i, h)[d]) * k.at(slot[t], h / group)[d];
        }
        const double weight = std::exp(0.2 * score);
        sum += weight;
        for (int64_t d = 0; d < kDim; ++d) out[d] += weight * v.at(slot[t], h / group)[d];
      }
      const int64_t row = i * group * kKvHeads + h;
      worst = std::max(worst, std::abs(std::log(sum) - lse[static_cast<size_t>(row)]));
      for (int64_t d = 0; d < kDim; ++d) {
        const auto at = static_cast<size_t>(row * kDim + d);
        const float got = half ? widened(found.halves[at]) : found.value[at];
        worst = std::max(worst, std::abs(out[d] / sum - got));
      }
    }
  }
  return worst;
}

}  // namespace

int main() {
  bool right = true;
  for (const bool half : {false, true}) {
    for (int64_t group = 1; group <= 17; ++group) {  // one more than a strip can have
      for (const int64_t queries : {1, 3}) {
        const double off = error(queries, group, half);
        if (off < (half ? 4e-3 : 4e-6)) continue;
        std::printf("bf16 %d, %d queries of %d rows: off by %g\n", half, static_cast<int>(queries),
                    static_cast<int>(group), off);
        right = false;
      }
    }
  }
  return right ? 0 : 1;
}
