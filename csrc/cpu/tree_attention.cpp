#include <algorithm>
#include <atomic>
#include <memory>
#include <string>

#include "cpu/flat_trie.h"
#include "cpu/ops.h"
#include "cpu/simd/kernels.h"
#include "cpu/threads.h"

namespace saffron::cpu {
namespace {

// All sizes below depend on the arguments alone, never on the number of threads: the same input
// gives the same bits however many there are.
constexpr int64_t kBlockRows = 256;     // rows a task: their queries and outputs fit the L2 cache
constexpr int64_t kTasks = 64;          // enough to keep as many threads busy,
constexpr int64_t kLeastTokens = 1024;  // but not with fewer tokens than this
constexpr int64_t kSmall = 1 << 20;     // multiplications below which starting threads costs more

struct Work {
  int64_t blocks, block_queries, kv_heads, group;
  std::vector<int64_t> ends;  // of the runs of tiles

  int64_t runs() const { return static_cast<int64_t>(ends.size()); }
  int64_t outputs() const { return blocks * kv_heads; }
};

Work divide(const FlatTrie& trie, int64_t queries, int64_t kv_heads, int64_t group) {
  Work work{};
  work.kv_heads = kv_heads;
  work.group = group;
  work.blocks = (queries * group + kBlockRows - 1) / kBlockRows;
  work.block_queries = (queries + work.blocks - 1) / work.blocks;
  work.blocks = (queries + work.block_queries - 1) / work.block_queries;
  const int64_t wanted = (kTasks + work.outputs() - 1) / work.outputs();
  const int64_t sensible = static_cast<int64_t>(trie.slot.size()) / kLeastTokens;
  work.ends = split_evenly(trie.tiles, group,
                           std::clamp<int64_t>(std::min(wanted, sensible), 1, kMaxPartials));
  return work;
}

}  // namespace

void tree_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slot, const Tensor& begin, const Tensor& end, float scale,
                    const Tensor& out, const Tensor& lse, int threads) {
  const int64_t queries = q.shape[0], heads = q.shape[1], head_dim = q.shape[2];
  const int64_t kv_heads = k_cache.shape[1], group = heads / kv_heads;
  const Kernels& kernel = kernels();
  if (head_dim > kMaxHeadDim) {
    throw std::invalid_argument("q: got a head size of " + std::to_string(head_dim) +
                                ", allowed are at most " + std::to_string(kMaxHeadDim));
  }
  const FlatTrie trie = flatten(slot, begin, end, k_cache.shape[0], queries, group,
                                kernel.tile_tokens(q.dtype, head_dim));
  if (queries * heads == 0) return;
  const Work work = divide(trie, queries, kv_heads, group);
  if (queries * heads * head_dim * static_cast<int64_t>(trie.slot.size()) < kSmall) threads = 1;

  const int64_t rows = work.block_queries * group, item = item_size(q.dtype);
  const int64_t partial = kernel.partial_size(rows, head_dim);
  const int64_t partials = work.outputs() * work.runs();
  const int64_t task_size = kernel.attend_scratch(q.dtype, rows, head_dim);
  auto* results = reinterpret_cast<float*>(
      scratch(partials * partial * int64_t{sizeof(float)} + threads * task_size));
  char* task_scratch = reinterpret_cast<char*>(results + partials * partial);

  std::unique_ptr<std::atomic<int>[]> done(new std::atomic<int>[work.outputs()]());
  parallel_for(partials, threads, [&](int64_t number, int worker) {
    // Blocks of one head and run follow each other: they read the same K and V.
    const int64_t block = number % work.blocks, head = number / work.blocks % kv_heads;
    const int64_t run = number / work.outputs(), output = head * work.blocks + block;
    float* const first_result = results + output * work.runs() * partial;
    const int64_t first_tile = run == 0 ? 0 : work.ends[run - 1];
    const int64_t first_query = block * work.block_queries;
    const int64_t count = std::min(work.block_queries, queries - first_query);
    const int64_t size = kernel.partial_size(count * group, head_dim);

    AttentionTask task{q,
                       k_cache.at(0, head),
                       v_cache.at(0, head),
                       k_cache.stride[0] * item,
                       v_cache.stride[0] * item,
                       trie.slot.data(),
                       trie.begin.data(),
                       trie.end.data(),
                       trie.tiles.data() + first_tile,
                       work.ends[run] - first_tile,
                       first_query,
                       count,
                       head * group,
                       group,
                       scale,
                       first_result + run * size,
                       task_scratch + worker * task_size};
    kernel.attend(task);
    // Whoever comes last joins the runs, in their order.
    if (done[output].fetch_add(1, std::memory_order_acq_rel) + 1 == work.runs()) {
      kernel.finish({first_result, work.runs(), out, lse.as<float>(), first_query, count,
                     head * group, group});
    }
  });
}

}  // namespace saffron::cpu
