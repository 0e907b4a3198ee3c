// The exact top-p set of every row, without a sort of the vocabulary: parts.cuh and
// rows.cuh find it, the kernels below put it in order where the op itself is asked for.

#include <cmath>

#include "cuda/common/launch.cuh"
#include "cuda/nucleus/rows.cuh"

namespace saffron::cuda {
namespace {

constexpr int kChunk = 2048;  // members that are sorted together
constexpr int kJoined = 8;    // sorted runs that one launch makes one of

template <class T>
__global__ void __launch_bounds__(kThreads, 2) nucleus_kernel(Arguments a) {
  find_nucleus<T>(a, blockIdx.y, static_cast<int>(blockIdx.x));
}

struct Sorting {
  NucleusLists found;
  const float2* stats;
  Entry* sorted;  // [rows, vocab], every chunk of a row by itself; unused for rows of one chunk
  const int32_t* offsets;
  int32_t* token;
  float* probability;
  int vocab;
};

struct Chunk {
  Entry entries[kChunk];
};

__device__ __forceinline__ void write(const Sorting& a, int64_t row, int rank, Entry e) {
  const int64_t place = a.offsets[row] + rank;
  a.token[place] = token_of(e);
  a.probability[place] = e_to(logit_of(e) - a.stats[row].x) / a.stats[row].y;
}

/// Sorts one chunk of a row's members; of a row that has no other, that is the result.
__global__ void __launch_bounds__(kThreads) sort_nuclei_kernel(Sorting a) {
  auto& s = shared<Chunk>();
  const int64_t row = blockIdx.y;
  const int first = static_cast<int>(blockIdx.x) * kChunk, total = a.found.count[row];
  const int count = min(kChunk, total - first);
  if (count <= 0) return;
  int size = 1;
  while (size < count) size *= 2;
  const int64_t base = row * a.vocab + first;
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
    s.entries[i] = i < count ? entry(a.found.logit[base + i], a.found.token[base + i]) : ~Entry{0};
  }
  // Bitonic: runs of `run` ascend and descend in turns, and are merged two by two.
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < size / 2; i += kThreads) {
        const int low = 2 * i - i % step, high = low + step;
        const Entry x = s.entries[low], y = s.entries[high];
        const bool ascends = (low & run) == 0;
        if ((x > y) == ascends) {
          s.entries[low] = y;
          s.entries[high] = x;
        }
      }
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    if (total <= kChunk) {
      write(a, row, i, s.entries[i]);
    } else {
      a.sorted[base + i] = s.entries[i];
    }
  }
}

/// Joins sorted runs of a row, `kJoined` at a time: a member comes after those of every run that
/// are below it. Runs lie in `sorted` and become runs in `found`, or the other way round, taken
/// apart; those that are all of a row become the result. `run` is a power of two.
template <bool kTakenApart>
__global__ void __launch_bounds__(kThreads) join_nuclei_kernel(Sorting a, int run) {
  const int64_t row = blockIdx.y, base = row * a.vocab;
  const int total = a.found.count[row], first = static_cast<int>(blockIdx.x) * kChunk;
  if (total <= run) return;
  const auto member = [&](int i) {
    if constexpr (kTakenApart) return entry(a.found.logit[base + i], a.found.token[base + i]);
    return a.sorted[base + i];
  };
  const int together = first / run / kJoined * kJoined * run;  // where the first of the runs begins
  const int end = min(total, first + kChunk);
  for (int i = first + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    const Entry e = member(i);
    int before[kJoined] = {};
    for (int step = run; step > 0; step /= 2) {
#pragma unroll
      for (int j = 0; j < kJoined; ++j) {  // independent of each other, so under way together
        const int more = before[j] + step, last = together + j * run + more - 1;
        if (more <= run && last < total && member(last) < e) before[j] = more;
      }
    }
    int rank = together;
#pragma unroll
    for (int j = 0; j < kJoined; ++j) rank += before[j];
    if (total <= run * kJoined) {
      write(a, row, rank, e);
    } else if constexpr (kTakenApart) {
      a.sorted[base + rank] = e;
    } else {
      a.found.token[base + rank] = token_of(e);
      a.found.logit[base + rank] = logit_of(e);
    }
  }
}

template <class T>
int64_t parts(int64_t vocab) {
  return (vocab + kPartTokens<T> - 1) / kPartTokens<T>;
}
static_assert(kMaxVocab / kPartTokens<float> <= kMostParts, "tables in shared memory");

/// The workspace: what is told of parts, their bins, then the lists.
struct Workspace {
  Part* part;
  Bins* bins;
  Entry* listed;
};
constexpr int64_t kPartWords = (sizeof(Part) + sizeof(Bins)) / sizeof(Entry);

Workspace divided(const View& workspace, int64_t rows, int64_t vocab) {
  const int64_t all = rows * parts<float>(vocab);
  auto* part = workspace.as<Part>();
  auto* bins = reinterpret_cast<Bins*>(part + all);
  return {part, bins, reinterpret_cast<Entry*>(bins + all)};
}

/// The largest power of two for which a whole vocabulary's mass fits 63 bits.
float mass_unit(int64_t vocab) {
  int bits = 0;
  while (int64_t{1} << bits < vocab) ++bits;
  return std::ldexp(1.f, 62 - bits);
}

template <class T>
void find(Arguments a, int64_t rows, Stream stream) {
  a.parts = static_cast<int>(parts<T>(a.vocab));
  const dim3 grid(static_cast<unsigned>(a.parts), static_cast<unsigned>(rows));
  launch<nucleus_kernel<T>>(grid, kThreads, sizeof(Shared), stream, a);
}

NucleusLists lists(const Nuclei& nuclei) {
  return {nuclei.tokens.as<int32_t>(), nuclei.logits.as<float>(), nuclei.counts.as<int32_t>()};
}

}  // namespace

int64_t nucleus_workspace(int64_t rows, int64_t vocab) {
  return rows * (parts<float>(vocab) * kPartWords + vocab);
}

void find_nuclei(const View& logits, const Limits& limits, const Groups& groups,
                 const NucleusLists& found, const View& stats, const Scratch& scratch,
                 const Launch& on) {
  const int64_t rows = logits.shape[0], vocab = logits.shape[1];
  const Workspace all = divided(scratch.workspace, rows, vocab);
  Arguments a = {};
  a.stride_row = logits.stride[0];
  a.stride_token = logits.stride[1];
  a.top_p = limits.top_p;
  a.top_ps = limits.top_ps.data;
  a.stride_top_p = limits.top_ps.stride[0];
  a.wide = limits.top_ps.dtype == DType::kFloat64;
  a.banned = limits.banned.as<int32_t>();
  a.stride_banned_row = limits.banned.stride[0];
  a.stride_banned = limits.banned.stride[1];
  a.num_banned = static_cast<int>(limits.banned.shape[1]);
  a.stride_groups = groups.of_row.stride[0];
  a.num_groups = static_cast<int>(groups.number);
  a.vocab = static_cast<int>(vocab);
  a.mass_unit = mass_unit(vocab);
  a.counter = scratch.counters.as<uint32_t>();
  a.fault = on.fault.as<int32_t>();
  a.logits = logits.data;
  a.groups = groups.of_row.as<int32_t>();
  a.part = all.part;
  a.bins = all.bins;
  a.listed = all.listed;
  a.found = found;
  a.stats = stats.as<float2>();
  if (logits.dtype == DType::kFloat32) {
    find<float>(a, rows, on.stream);
  } else if (logits.dtype == DType::kBFloat16) {
    find<BFloat16>(a, rows, on.stream);
  } else {
    find<Float16>(a, rows, on.stream);
  }
}

void nucleus(const View& logits, const Limits& limits, const Nuclei& found, const Scratch& scratch,
             const Launch& on) {
  find_nuclei(logits, limits, Groups{}, lists(found), found.stats, scratch, on);
}

void sort_nuclei(const Nuclei& found, const Candidates& sorted, const View& probabilities,
                 int64_t most, const Scratch& scratch, const Launch& on) {
  const int64_t rows = found.tokens.shape[0], vocab = found.tokens.shape[1];
  Sorting a = {};
  a.found = lists(found);
  a.stats = found.stats.as<float2>();
  a.sorted = divided(scratch.workspace, rows, vocab).listed;
  a.offsets = sorted.offsets.as<int32_t>();
  a.token = sorted.tokens.as<int32_t>();
  a.probability = probabilities.as<float>();
  a.vocab = static_cast<int>(vocab);
  const dim3 grid(blocks_for(most, kChunk), static_cast<unsigned>(rows));
  launch<sort_nuclei_kernel>(grid, kThreads, sizeof(Chunk), on.stream, a);
  bool taken_apart = false;
  for (int run = kChunk; run < most; run *= kJoined, taken_apart = !taken_apart) {
    if (taken_apart) {
      launch<join_nuclei_kernel<true>>(grid, kThreads, 0, on.stream, a, run);
    } else {
      launch<join_nuclei_kernel<false>>(grid, kThreads, 0, on.stream, a, run);
    }
  }
}

}  // namespace saffron::cuda
