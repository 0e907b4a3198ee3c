// What tree_attention's blocks would work on, without the work: for test_cuda_schedule.py.

#include <cstdio>
#include <stdexcept>

#include "cuda/attention/tile.cuh"
#include "cuda/attention/work.cuh"
#include "cuda/common/launch.cuh"

namespace saffron::cuda {
namespace {

using C = Tile<BFloat16, 128, 8, 1>;

__global__ void look_kernel(const Arguments a, int3* found) {
  const int3 of_chunk = look_through(a, static_cast<int>(blockIdx.x), tokens_of(a));
  if (threadIdx.x == 0) found[blockIdx.x] = of_chunk;
}

/// Counts how often a token is given to a group, and notes the block; `[groups, tokens]`.
__global__ void schedule_kernel(const Arguments a, int* times, int* owner) {
  auto& s = shared<typename C::Shared>();
  auto& plan = schedule_of<C>(s);
  if (a.query_blocks > 1) make_schedule<C, C::kThreads>(a, plan);
  __syncthreads();
  Shares shares(a, plan, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  for (int at = shares.first; at < shares.last;) {
    const Segment g = shares.segment(a, plan, at);
    if (a.query_blocks > 1) {
      __syncthreads();
      if (threadIdx.x < 32) Tokens::list(a, plan, g);
      __syncthreads();
    }
    const Tokens tokens(a, plan, g);
    for (int i = static_cast<int>(threadIdx.x); i < tokens.size; i += C::kThreads) {
      const int token = tokens.at(i);
      if (token >= tokens.end) continue;
      const int place = (g.kv_head * a.query_blocks + g.query_block) * a.tokens + token;
      atomicAdd(&times[place], 1);
      owner[place] = static_cast<int>(blockIdx.x);
    }
    // Every part knows the same of its group.
    const Parts parts = shares.parts(g);
    const int b = static_cast<int>(blockIdx.x);
    if (b < parts.block || b >= parts.block + parts.count) host::fail("not among the parts");
    if (g.is_whole() != (parts.count == 1)) host::fail("a whole group has one part");
    const int slot = 2 * b + (g.begin > shares.first ? 1 : 0);
    if (parts.rows_of<C>(b - parts.block) != static_cast<int64_t>(slot) * C::kRows) {
      host::fail("a part is looked for where it is not");
    }
    at += g.count;
  }
}

}  // namespace
}  // namespace saffron::cuda

/// Returns how many blocks there are; below 0: an error, of which `message` tells.
extern "C" __attribute__((visibility("default"))) int schedule(int queries, int group, int kv_heads,
                                                               int tokens, const int* begin,
                                                               const int* end, int* times,
                                                               int* owner, char* message) {
  using namespace saffron::cuda;
  Arguments a = {};
  a.begin = begin;
  a.end = end;
  a.tokens = tokens;
  a.queries = queries;
  a.group = group;
  a.kv_heads = kv_heads;
  std::vector<int3> found(kMostChunks);
  a.looked_through = found.data();
  try {
    const Cut cut = cut_work<C>(a, device_properties());
    if (a.looked_through != nullptr) {
      launch<look_kernel>(dim3(static_cast<unsigned>(cut.chunks)), 32, 0, 0, a, found.data());
    }
    launch<schedule_kernel>(dim3(cut.blocks), C::kThreads,
                            sizeof(typename C::Shared) + cut.schedule_bytes(), 0, a, times, owner);
    return static_cast<int>(cut.blocks);
  } catch (const std::runtime_error& error) {
    std::snprintf(message, 200, "%s", error.what());
    return -1;
  }
}
