// The rewards of the candidates only. A warp takes a range of candidates, all ranges of one size;
// it reads the row of the head that each names 16 bytes per lane.
//
// Floor: the named rows, once. 640 candidates of 2048 numbers in bf16 are 2.6 MB, 0.6 us at
// 4.3 TB/s; predicted 4 us on an H200, which are a launch and three dependent loads (the row, the
// token, its weights).

#include "cuda/beam/head_rows.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/numbers.cuh"

namespace saffron::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

/// The row of `candidate`: the last one whose offset is not above it. All lanes look at once.
__device__ __forceinline__ int row_of(const int32_t* offsets, int rows, int candidate) {
  int low = 0, high = rows;
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const int row = low + static_cast<int>(threadIdx.x) % 32 * step;
    const unsigned up_to = __ballot_sync(0xffffffffu, row < high && offsets[row] <= candidate);
    const int found = max(__popc(up_to) - 1, 0);
    low += found * step;
    high = min(high, low + step);
  }
  return low;
}

template <class Head>
__global__ void __launch_bounds__(kThreads, 4)
    head_kernel(Head head, Numbers bias, const uint8_t* unseen, int64_t unseen_stride,
                float unseen_reward, const int32_t* tokens, const int32_t* offsets, float* rewards,
                int rows, int vocab, int candidates, int range, int32_t* fault) {
  if (blockIdx.x == 0) {
    bool bad = offsets[0] != 0 || offsets[rows] != candidates;
    for (int r = static_cast<int>(threadIdx.x); r < rows; r += kThreads) {
      bad |= offsets[r] > offsets[r + 1];
    }
    if (bad) atomicOr(fault, kCandidateFault);
  }
  if (rows == 0) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t begin = warp * range;
  if (begin >= candidates) return;
  const int end = static_cast<int>(begin + range < candidates ? begin + range : candidates);
  int row = row_of(offsets, rows, static_cast<int>(begin));
  for (int first = static_cast<int>(begin); first < end; first += 32) {
    const int here = min(end - first, 32);
    int token = lane < here ? tokens[first + lane] : 0;
    if (token < 0 || token >= vocab) {
      atomicOr(fault, kCandidateFault);
      token = -1;
    }
    const bool unknown = unseen != nullptr && token >= 0 && unseen[token * unseen_stride] != 0;
    float reward = token < 0 ? NAN : bias.given() ? bias.at(token) : 0.f;
    for (int i = 0; i < here; ++i) {
      while (row + 1 < rows && offsets[row + 1] <= first + i) ++row;
      const int named = __shfl_sync(0xffffffffu, token, i);
      // Rows of unseen tokens are not read; for the first nobody waits to learn what it is.
      if (named < 0 || (i > 0 && __shfl_sync(0xffffffffu, unknown ? 1 : 0, i))) continue;
      const float product = dot(head, row, named);
      if (lane == i) reward += product;
    }
    if (lane < here) rewards[first + lane] = unknown ? unseen_reward : reward;
  }
}

}  // namespace

void multifurcation_head(const RewardHead& head, const Candidates& candidates, const View& rewards,
                         const Launch& on) {
  const int64_t warps = 8 * device_properties().processors * kWarps;  // at most
  const int64_t count = candidates.tokens.shape[0], range = (count + warps - 1) / warps;
  const unsigned blocks = count == 0 ? 0 : blocks_for(count, range * kWarps);
  with_head_rows(head.hidden, head.weight, [&](auto rows) {
    launch<head_kernel<decltype(rows)>>(
        dim3(blocks), kThreads, 0, on.stream, rows, numbers(head.bias), head.unseen.as<uint8_t>(),
        head.unseen.stride[0], head.unseen_reward, candidates.tokens.as<int32_t>(),
        candidates.offsets.as<int32_t>(), rewards.as<float>(), head.hidden.shape[0],
        head.weight.shape[0], count, range, on.fault.as<int32_t>());
  });
}

}  // namespace saffron::cuda
