// The plan after one search step: two look-ups a token, and one new token a new query. One thread a
// token; the look-ups are binary searches in the ascending parents.

#include "cuda/common/launch.cuh"

namespace saffron::cuda {
namespace {

constexpr int kThreads = 256;

/// How many of the ascending `parents` are below `query`.
__device__ __forceinline__ int children_before(const int32_t* parents, int fresh, int query) {
  int low = 0, high = fresh;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (parents[middle] < query) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kThreads)
    advance_kernel(const int32_t* slot, const int32_t* begin, const int32_t* end,
                   const int32_t* parents, const int32_t* new_slots, const int32_t* count,
                   int32_t* out_slot, int32_t* out_begin, int32_t* out_end, int64_t tokens,
                   int fresh, int64_t queries, int32_t* fault) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t size = count == nullptr ? tokens + fresh : tokens;
  if (count != nullptr) {
    const int64_t room = tokens;
    tokens = *count;
    if (tokens < 0 || tokens + fresh > room) atomicOr(fault, kPlanFault);
    tokens = max(tokens, int64_t{0});
  }
  if (token >= size) return;
  if (token < tokens) {
    const int from = begin[token], to = end[token];
    if (from < 0 || from > queries || to < 0 || to > queries) atomicOr(fault, kPlanFault);
    out_slot[token] = slot[token];
    out_begin[token] = children_before(parents, fresh, from);
    out_end[token] = children_before(parents, fresh, to);
  } else if (token < tokens + fresh) {
    const int query = static_cast<int>(token - tokens);
    const int parent = parents[query];
    if (parent < 0 || (query > 0 && parents[query - 1] > parent)) atomicOr(fault, kPlanFault);
    out_slot[token] = new_slots[query];
    out_begin[token] = query;
    out_end[token] = query + (parent < queries ? 1 : 0);  // without a parent nobody sees it
  } else {
    // Room that is left is dead.
    out_slot[token] = -1;
    out_begin[token] = out_end[token] = 0;
  }
}

}  // namespace

void advance_tree(const TriePlan& plan, const View& parents, const View& new_slots, int64_t queries,
                  const TriePlan& result, const Launch& on) {
  const int64_t tokens = plan.slot.shape[0], fresh = parents.shape[0];
  launch<advance_kernel>(dim3(blocks_for(std::max<int64_t>(result.slot.shape[0], 1), kThreads)),
                         kThreads, 0, on.stream, plan.slot.as<int32_t>(), plan.begin.as<int32_t>(),
                         plan.end.as<int32_t>(), parents.as<int32_t>(), new_slots.as<int32_t>(),
                         plan.count.as<int32_t>(), result.slot.as<int32_t>(),
                         result.begin.as<int32_t>(), result.end.as<int32_t>(), tokens, fresh,
                         queries, on.fault.as<int32_t>());
}

}  // namespace saffron::cuda
