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
constexpr int64_t kBlockRows = 256;       // rows a task: their queries and outputs fit the L2 cache
constexpr int64_t kTasks = 64;            // enough to keep as many threads busy,
constexpr int64_t kLeastTokens = 1024;    // but not with fewer tokens than this
constexpr int64_t kStripBytes = 1 << 17;  // of K and V that are at work: they stay in the L2 cache
constexpr int64_t kSmall = 1 << 16;       // multiplications below which starting threads costs more
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

/// A block and how its tiles and strips are divided.
struct Part {
  Block block;
  FlatBlock flat;
  Strips narrow;
  std::vector<int64_t> ends;          // of the runs of tiles,
  std::vector<int64_t> strip_ends;    // and of strips
  std::vector<StripRows> strip_rows;  // of each run of strips: its partial result
  int64_t base, floats;  // where the partial results of a head stand: first those of tiles

  int64_t runs() const { return static_cast<int64_t>(ends.size() + strip_ends.size()); }
};

/// How many pieces make sense of so many tokens.
int64_t pieces(int64_t tokens, int64_t wanted) {
  return std::clamp<int64_t>(std::min(wanted, tokens / kLeastTokens), 1, kMaxPartials);
}

Part divide(const Call& call, const std::vector<Run>& runs, const int32_t* slot, const Block& block,
            int64_t wanted) {
  const DType dtype = call.q.dtype;
  const int64_t head_dim = call.head_dim(), v_dim = call.v_dim();
  Tokens wide;
  Part part{};
  part.block = block;
  part.narrow = cut_strips(runs, slot, block, call.kernel.strip_rows(dtype, head_dim, v_dim), wide);
  part.strip_ends = split_evenly(part.narrow, pieces(part.narrow.tokens, wanted));
  if (wide.size() > 0) {
    part.flat = flatten(wide, block, call.kernel.tile_tokens(dtype, head_dim, v_dim));
    part.ends = split_evenly(part.flat.tiles, block.lanes, pieces(part.flat.tokens.size(), wanted));
  }
  part.floats =
      static_cast<int64_t>(part.ends.size()) * call.kernel.partial_size(block.rows(), v_dim);
  int64_t first = 0;
  for (const int64_t end : part.strip_ends) {
    const Strip* strips = part.narrow.strips.data();
    int64_t row = strips[first].first_row, end_row = row;
    for (; first < end; ++first) {
      end_row = std::max(end_row, strips[first].first_row + strips[first].rows);
    }
    part.strip_rows.push_back({row, end_row - row, part.floats});
    part.floats += call.kernel.strip_partial_size(end_row - row, v_dim);
  }
  return part;
}

/// A run of tiles or of strips of a part, for some heads.
struct Job {
  int64_t part, run, head, heads;
};

/// The heads of a slot lie inside its row: several can be worked on while their K and V are near.
bool nested(const Tensor& cache) {
  return cache.shape[1] == 1 || cache.stride[1] * cache.shape[1] <= cache.stride[0];
}

/// Several heads a job where rows are few: this changes no result.
std::vector<Job> jobs_of(const Call& call, const std::vector<Part>& parts) {
  const int64_t kv_heads = call.kv_heads(), rows = parts.front().block.rows();
  int64_t most_runs = 0, all_runs = 0, all_strips = 0;
  for (const Part& part : parts) {
    most_runs = std::max(most_runs, part.runs());
    all_runs += static_cast<int64_t>(part.ends.size());
    all_strips += static_cast<int64_t>(part.strip_ends.size());
  }
  const bool together = nested(call.k_cache) && nested(call.v_cache);
  const auto heads = [&](int64_t runs, int64_t most) {
    const int64_t sensible = call.threads == 1 ? kv_heads : runs * kv_heads / (8 * call.threads);
    return std::clamp<int64_t>(together ? std::min(sensible, most) : 1, 1, kv_heads);
  };
  const int64_t row_bytes = (call.head_dim() + call.v_dim()) * item_size(call.q.dtype);
  const int64_t of_tiles = heads(all_runs, kBlockRows / rows);
  const int64_t of_strips =
      heads(all_strips, kStripBytes / (kStripTokens * std::max<int64_t>(row_bytes, 1)));
  std::vector<Job> jobs;
  for (int64_t run = 0; run < most_runs; ++run) {
    for (const bool strips : {false, true}) {
      const int64_t step = strips ? of_strips : of_tiles;
      for (int64_t head = 0; head < kv_heads; head += step) {
        // Blocks of one head and run follow each other: they read the same K and V.
        for (size_t i = 0; i < parts.size(); ++i) {
          const auto tiles = static_cast<int64_t>(parts[i].ends.size());
          if (run < parts[i].runs() && (run >= tiles) == strips) {
            jobs.push_back({static_cast<int64_t>(i), run, head, std::min(step, kv_heads - head)});
          }
        }
      }
    }
  }
  return jobs;
}

/// What tiles and strips have in common; `results` are those of the job's first head.
HeadsTask heads_task(const Call& call, const Part& part, const Job& job, float* results,
                     char* scratch) {
  const int64_t item = item_size(call.q.dtype);
  return {call.q,
          call.k_cache.at(0, job.head),
          call.v_cache.at(0, job.head),
          call.k_cache.stride[0] * item,
          call.v_cache.stride[0] * item,
          call.k_cache.stride[1] * item,
          call.v_cache.stride[1] * item,
          part.block.first_query,
          part.block.queries,
          call.group(),
          job.head,
          job.heads,
          call.v_dim(),
          call.scale,
          call.softcap,
          call.capped,
          results,
          part.floats,
          scratch};
}

void run_job(const Call& call, const Part& part, const Job& job, float* results, char* scratch) {
  const auto tiles = static_cast<int64_t>(part.ends.size());
  const auto from = [](const std::vector<int64_t>& ends, int64_t run) {
    return run == 0 ? 0 : ends[static_cast<size_t>(run - 1)];
  };
  if (job.run < tiles) {
    const int64_t size = call.kernel.partial_size(part.block.rows(), call.v_dim());
    const int64_t first = from(part.ends, job.run);
    const Tokens& tokens = part.flat.tokens;
    call.kernel.attend({heads_task(call, part, job, results + job.run * size, scratch),
                        tokens.slot.data(), tokens.begin.data(), tokens.end.data(),
                        part.flat.tiles.data() + first,
                        part.ends[static_cast<size_t>(job.run)] - first});
    return;
  }
  const int64_t run = job.run - tiles, first = from(part.strip_ends, run);
  const StripRows& rows = part.strip_rows[static_cast<size_t>(run)];
  call.kernel.attend_strips({heads_task(call, part, job, results + rows.offset, scratch),
                             part.narrow.strips.data() + first,
                             part.strip_ends[static_cast<size_t>(run)] - first, rows.first,
                             rows.count});
}

void attend(const Call& call, std::vector<Part>& parts) {
  const int64_t kv_heads = call.kv_heads(), group = call.group(), v_dim = call.v_dim();
  const std::vector<Job> jobs = jobs_of(call, parts);
  int64_t floats = 0, task_size = 0;
  for (Part& part : parts) {
    part.base = floats;
    floats += part.floats * kv_heads;
  }
  const int64_t rows = parts.front().block.rows();
  for (const Job& job : jobs) {
    const Part& part = parts[static_cast<size_t>(job.part)];
    const bool tiles = job.run < static_cast<int64_t>(part.ends.size());
    task_size = std::max(
        task_size,
        tiles ? call.kernel.attend_scratch(call.q.dtype, rows, job.heads, call.head_dim(), v_dim)
              : call.kernel.strip_scratch(job.heads, call.head_dim()));
  }
  auto* results =
      reinterpret_cast<float*>(scratch(floats * int64_t{sizeof(float)} + call.threads * task_size));
  char* const task_scratch = reinterpret_cast<char*>(results + floats);
  const auto num_parts = static_cast<int64_t>(parts.size());
  std::unique_ptr<std::atomic<int>[]> done(new std::atomic<int>[num_parts * kv_heads]());
  const auto result = [&](const Part& part, int64_t head) {
    return results + part.base + head * part.floats;
  };
  const auto finish = [&](const Part& part, int64_t head) {
    const Block& block = part.block;
    float* own = result(part, head);
    call.kernel.finish({own, static_cast<int64_t>(part.ends.size()), own, part.strip_rows.data(),
                        static_cast<int64_t>(part.strip_rows.size()), call.out,
                        call.sinks.as<float>(), call.lse.as<float>(), block.first_query,
                        block.queries, head * group, group});
  };
  for (const Part& part : parts) {
    for (int64_t head = 0; head < kv_heads && part.runs() == 0; ++head) finish(part, head);
  }
  parallel_for(static_cast<int64_t>(jobs.size()), call.threads, [&](int64_t number, int worker) {
    const Job& job = jobs[static_cast<size_t>(number)];
    const Part& part = parts[static_cast<size_t>(job.part)];
    run_job(call, part, job, result(part, job.head), task_scratch + worker * task_size);
    for (int64_t head = job.head; head < job.head + job.heads; ++head) {
      // Whoever comes last joins the runs, in their order.
      std::atomic<int>& ended = done[job.part * kv_heads + head];
      if (ended.fetch_add(1, std::memory_order_acq_rel) + 1 == part.runs()) finish(part, head);
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
  const std::vector<Run> runs = visible_runs(slot, begin, end, k_cache.shape[0], queries);
  if (queries * heads == 0) return;
  std::vector<int32_t> copied;  // of slots that do not lie side by side
  if (slot.stride[0] != 1) {
    const IntView given(slot);
    for (int64_t t = 0; t < given.size; ++t) copied.push_back(given[t]);
  }
  const int32_t* slots = copied.empty() ? slot.as<int32_t>() : copied.data();
  int64_t tokens = 0, seen = 0;
  for (const Run& run : runs) {
    tokens += run.count;
    seen += run.count * (run.end - run.begin);
  }
  if (seen * heads * (call.head_dim() + call.v_dim()) / 2 < kSmall) call.threads = 1;

  const int64_t blocks = (queries * call.group() + kBlockRows - 1) / kBlockRows;
  const int64_t block_queries = (queries + blocks - 1) / blocks;
  const int64_t outputs = (queries + block_queries - 1) / block_queries * call.kv_heads();
  const int64_t wanted = (kTasks + outputs - 1) / outputs;
  const int64_t at_once = std::max<int64_t>(kTokensAtOnce / (tokens + 1), 1) * block_queries;
  for (int64_t first = 0; first < queries; first += at_once) {
    std::vector<Part> parts;
    for (int64_t q = first; q < std::min(first + at_once, queries); q += block_queries) {
      const Block block{q, std::min(block_queries, queries - q), call.group(), call.kernel.lanes};
      parts.push_back(divide(call, runs, slots, block, wanted));
    }
    attend(call, parts);
  }
}

}  // namespace saffron::cpu
