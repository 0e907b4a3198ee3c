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

// What is added up in which order depends on these sizes and the arguments alone, never on the
// number of threads: the same input gives the same bits however many there are.
constexpr int64_t kBlockRows = 256;     // rows a task: their queries and outputs fit the L2 cache
constexpr int64_t kTasks = 64;          // enough to keep as many threads busy,
constexpr int64_t kLeastTokens = 1024;  // but not with fewer tokens than this
constexpr int64_t kSmall = 1 << 20;     // multiplications below which starting threads costs more
constexpr int64_t kTokensAtOnce = 1 << 20;  // that the flattened blocks may hold, 12 bytes each

struct Call {
  const Kernels& kernel;
  const Tensor &q, &k_cache, &v_cache, &sinks, &out, &lse;
  float scale, softcap;
  bool capped;
  int threads;

  int64_t queries() const { return q.shape[0]; }
  int64_t head_dim() const { return q.shape[2]; }
  int64_t v_dim() const { return v_cache.shape[2]; }
  int64_t kv_heads() const { return k_cache.shape[1]; }
  int64_t group() const { return q.shape[1] / kv_heads(); }
};

/// A block and how its tiles are divided.
struct Part {
  Block block;
  FlatBlock flat;
  std::vector<int64_t> ends;  // of the runs of tiles

  int64_t runs() const { return static_cast<int64_t>(ends.size()); }
};

std::vector<Part> divide(const Call& call, const Tokens& visible, int64_t first_query,
                         int64_t end_query, int64_t block_queries) {
  std::vector<Part> parts;
  const int64_t blocks = (call.queries() + block_queries - 1) / block_queries;
  const int64_t outputs = blocks * call.kv_heads();
  const int64_t wanted = (kTasks + outputs - 1) / outputs;
  for (; first_query < end_query; first_query += block_queries) {
    const int64_t count = std::min(block_queries, call.queries() - first_query);
    const Block block{first_query, count, call.group(), call.kernel.lanes};
    const int64_t tile_tokens =
        call.kernel.tile_tokens(call.q.dtype, call.head_dim(), call.v_dim());
    Part part{block, flatten(visible, block, tile_tokens), {}};
    const int64_t sensible = part.flat.tokens.size() / kLeastTokens;
    part.ends = split_evenly(part.flat.tiles, block.lanes,
                             std::clamp<int64_t>(std::min(wanted, sensible), 1, kMaxPartials));
    parts.push_back(std::move(part));
  }
  return parts;
}

void attend(const Call& call, const std::vector<Part>& parts) {
  const int64_t kv_heads = call.kv_heads(), group = call.group(), v_dim = call.v_dim();
  int64_t most_runs = 0, all_runs = 0;
  for (const Part& part : parts) {
    most_runs = std::max(most_runs, part.runs());
    all_runs += part.runs();
  }
  // Few rows: several heads a task, if their K and V lie side by side. This changes no result.
  const int64_t rows = parts.front().block.rows();
  const bool adjacent =
      call.k_cache.stride[1] == call.head_dim() && call.v_cache.stride[1] == v_dim;
  const int64_t sensible = std::min(kBlockRows / rows, all_runs * kv_heads / (8 * call.threads));
  const int64_t heads = std::clamp<int64_t>(adjacent ? sensible : 1, 1, kv_heads);
  struct Job {
    int64_t part, run, head;
  };
  std::vector<Job> jobs;
  for (int64_t run = 0; run < most_runs; ++run) {
    for (int64_t head = 0; head < kv_heads; head += heads) {
      // Blocks of one head and run follow each other: they read the same K and V.
      for (size_t i = 0; i < parts.size(); ++i) {
        if (run < parts[i].runs()) jobs.push_back({static_cast<int64_t>(i), run, head});
      }
    }
  }

  const auto num_parts = static_cast<int64_t>(parts.size());
  const int64_t partial = call.kernel.partial_size(rows, v_dim);
  const int64_t task_size =
      call.kernel.attend_scratch(call.q.dtype, rows, heads, call.head_dim(), v_dim);
  const int64_t floats = num_parts * kv_heads * most_runs * partial;
  auto* results =
      reinterpret_cast<float*>(scratch(floats * int64_t{sizeof(float)} + call.threads * task_size));
  char* const task_scratch = reinterpret_cast<char*>(results + floats);
  std::unique_ptr<std::atomic<int>[]> done(new std::atomic<int>[num_parts * kv_heads]());
  const int64_t item = item_size(call.q.dtype);

  parallel_for(static_cast<int64_t>(jobs.size()), call.threads, [&](int64_t number, int worker) {
    const Job& job = jobs[static_cast<size_t>(number)];
    const Part& part = parts[static_cast<size_t>(job.part)];
    const Tokens& tokens = part.flat.tokens;
    const Block& block = part.block;
    const int64_t size = call.kernel.partial_size(block.rows(), v_dim);
    const auto output = [&](int64_t head) { return job.part * kv_heads + head; };
    const auto result = [&](int64_t head) { return results + output(head) * most_runs * partial; };
    const int64_t first_tile = job.run == 0 ? 0 : part.ends[static_cast<size_t>(job.run - 1)];
    const int64_t count = std::min(heads, kv_heads - job.head);

    AttentionTask task{call.q,
                       call.k_cache.at(0, job.head),
                       call.v_cache.at(0, job.head),
                       call.k_cache.stride[0] * item,
                       call.v_cache.stride[0] * item,
                       call.k_cache.stride[1] * item,
                       call.v_cache.stride[1] * item,
                       tokens.slot.data(),
                       tokens.begin.data(),
                       tokens.end.data(),
                       part.flat.tiles.data() + first_tile,
                       part.ends[static_cast<size_t>(job.run)] - first_tile,
                       block.first_query,
                       block.queries,
                       group,
                       job.head,
                       count,
                       v_dim,
                       call.scale,
                       call.softcap,
                       call.capped,
                       result(job.head) + job.run * size,
                       most_runs * partial,
                       task_scratch + worker * task_size};
    call.kernel.attend(task);
    for (int64_t head = job.head; head < job.head + count; ++head) {
      // Whoever comes last joins the runs, in their order.
      if (done[output(head)].fetch_add(1, std::memory_order_acq_rel) + 1 == part.runs()) {
        call.kernel.finish({result(head), part.runs(), call.out, call.sinks.as<float>(),
                            call.lse.as<float>(), block.first_query, block.queries, head * group,
                            group});
      }
    }
  });
}

}  // namespace

void tree_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slot, const Tensor& begin, const Tensor& end, float scale,
                    std::optional<float> softcap, const Tensor& sinks, const Tensor& out,
                    const Tensor& lse, int threads) {
  Call call{
      kernels(),           q,      k_cache, v_cache, sinks, out, lse, scale, softcap.value_or(1.f),
      softcap.has_value(), threads};
  for (const Tensor* rows : {&q, &v_cache}) {
    if (rows->shape[2] > kMaxHeadDim) {
      throw std::invalid_argument(std::string(rows == &q ? "q" : "v_cache") +
                                  ": got a head size of " + std::to_string(rows->shape[2]) +
                                  ", allowed are at most " + std::to_string(kMaxHeadDim));
    }
  }
  const int64_t queries = call.queries(), heads = q.shape[1];
  const Tokens visible = visible_tokens(slot, begin, end, k_cache.shape[0], queries);
  if (queries * heads == 0) return;
  const int64_t size = (call.head_dim() + call.v_dim()) / 2;
  if (queries * heads * size * visible.size() < kSmall) call.threads = 1;

  const int64_t blocks = (queries * call.group() + kBlockRows - 1) / kBlockRows;
  const int64_t block_queries = (queries + blocks - 1) / blocks;
  const int64_t at_once =
      std::max<int64_t>(kTokensAtOnce / (visible.size() + 1), 1) * block_queries;
  for (int64_t first = 0; first < queries; first += at_once) {
    attend(call, divide(call, visible, first, std::min(first + at_once, queries), block_queries));
  }
}

}  // namespace saffron::cpu
