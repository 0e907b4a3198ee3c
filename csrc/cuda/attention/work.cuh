#pragma once

// Part of tree_attention: how the work is cut, and how the blocks share it.
//
// A group is a KV head with a block of query rows. In a forest of many prompts it sees the tokens
// of its own prompts alone, so what a group costs is what of the plan it sees: chunks, 64
// successive tokens or more, each by the share of its tokens that the group sees, in quarters. The
// costs of all groups, one after the other, are cut into equal shares, a block each. A block's
// share is a list of segments, each the whole of a group or a part of it; the parts of a group,
// which are those of successive blocks, are joined in the end (join.cuh).

#include "cuda/attention/join.cuh"

namespace saffron::cuda {
namespace {

constexpr int kPolls = 16;  // how often a block looks whether there is something to help with
constexpr int kMostChunks = 1024, kMostBands = 512;
constexpr int kWhole = 4;          // what a chunk costs of which a group sees every token
constexpr int kTile = 2 * kWhole;  // what 64 tokens cost that a group sees
// So many tokens every block looks through by itself; for more another launch does it before.
constexpr int kLookedThrough = 8192;

/// Which chunks may be visible to which bands, that is successive query blocks, a power of two of
/// them. Behind a block's `Shared`, if there is more than one query block.
struct Schedule {
  int offset[kMostBands + 1];  // what all bands before this one cost
  uint16_t first[kMostChunks],
      last[kMostChunks];          // bands that may see the chunk; none: first > last
  uint16_t visible[kMostChunks];  // chunks of the segment, in order
  uint8_t cost[kMostChunks];      // to each of those bands
  int listed;                     // how many chunks the segment has
};

template <class C>
__device__ __forceinline__ Schedule& schedule_of(typename C::Shared& s) {
  return *reinterpret_cast<Schedule*>(&s + 1);
}

__device__ __forceinline__ int tokens_of(const Arguments& a) {
  return a.count == nullptr ? a.tokens : min(max(*a.count, 0), a.tokens);
}

__device__ __forceinline__ int chunks_of(const Arguments& a) {
  return (tokens_of(a) + (1 << a.chunk_log2) - 1) >> a.chunk_log2;
}

__device__ __forceinline__ int bands_of(const Arguments& a) {
  return ((a.query_blocks - 1) >> a.band_log2) + 1;
}

/// The bands that may see a token of a chunk, from x to y, and what it costs each of them. By one
/// warp.
__device__ __forceinline__ int3 look_through(const Arguments& a, int chunk, int tokens) {
  const int first = chunk << a.chunk_log2;
  const int last = min(tokens - first, 1 << a.chunk_log2) + first;
  const int log2 = a.rows_log2 + a.band_log2;
  int low = kMostBands, high = -1, seen = 0;
#pragma unroll 2
  for (int token = first + static_cast<int>(threadIdx.x) % 32; token < last; token += 32) {
    const int begin = max(a.begin[token], 0), end = min(a.end[token], a.queries);
    if (begin >= end) continue;
    const int from = begin * a.group >> log2, to = (end * a.group - 1) >> log2;
    low = min(low, from), high = max(high, to), seen += to - from + 1;
  }
  low = __reduce_min_sync(0xffffffffu, low);
  high = __reduce_max_sync(0xffffffffu, high);
  seen = __reduce_add_sync(0xffffffffu, seen);
  const float of_all = static_cast<float>(high - low + 1) * static_cast<float>(1 << a.chunk_log2);
  const int cost = static_cast<int>(kWhole * static_cast<float>(seen) / of_all + 0.5f);
  return make_int3(low, high, max(cost, 1));
}

/// Fills the schedule; by all of the block's `kThreads` threads.
template <class C, int kThreads>
__device__ __forceinline__ void make_schedule(const Arguments& a, Schedule& plan) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int tokens = tokens_of(a), chunks = chunks_of(a);
  const int bands = bands_of(a);
  for (int i = thread; i <= bands; i += kThreads) plan.offset[i] = 0;
  __syncthreads();
  const auto enter = [&](int chunk, int3 found) {
    plan.first[chunk] = static_cast<uint16_t>(found.x);
    plan.last[chunk] = static_cast<uint16_t>(max(found.y, 0));
    plan.cost[chunk] = static_cast<uint8_t>(found.z);
    if (found.x > found.y) return;
    atomicAdd(&plan.offset[found.x], found.z);
    atomicAdd(&plan.offset[found.y + 1], -found.z);
  };
  if (a.looked_through != nullptr) {
    for (int chunk = thread; chunk < chunks; chunk += kThreads) {
      enter(chunk, a.looked_through[chunk]);
    }
  } else {
#pragma unroll 4
    for (int chunk = thread / 32; chunk < chunks; chunk += kThreads / 32) {
      const int3 found = look_through(a, chunk, tokens);
      if (lane == 0) enter(chunk, found);
    }
  }
  __syncthreads();
  if (thread >= 32) return;
  // From what a band costs more than the one before to what all before it cost.
  int cost = 0, before = 0;
  for (int first = 0; first <= bands; first += 32) {
    int own = first + lane <= bands ? plan.offset[first + lane] : 0;
    for (unsigned step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, own, step);
      if (lane >= static_cast<int>(step)) own += other;
    }
    own += cost;
    cost = __shfl_sync(0xffffffffu, own, 31);
    // Whole tiles, and never none: the result has to be written.
    const int size = (max(own, 1) + kTile - 1) / kTile * kTile << a.band_log2;
    int through = size;
    for (unsigned step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, through, step);
      if (lane >= static_cast<int>(step)) through += other;
    }
    if (first + lane <= bands) plan.offset[first + lane] = before + through - size;
    before += __shfl_sync(0xffffffffu, through, 31);
  }
}

/// A part of the work of a group, or all of it.
struct Segment {
  int kv_head, query_block;
  int first, count;  // of what the group costs
  int begin, size;   // what all groups before cost, and this one

  __device__ __forceinline__ bool is_whole() const { return count == size; }
};

/// All the work, and the share of a block.
struct Shares {
  int band, position;  // a band, and where its first group begins
  int share, first, last;

  /// `plan` is looked at if there is more than one query block.
  __device__ __forceinline__ Shares(const Arguments& a, const Schedule& plan, int block, int blocks)
      : band(0), position(0) {
    int total = (max(chunks_of(a), 1) * kWhole + kTile - 1) / kTile * kTile;
    if (a.query_blocks > 1) {
      const int bands = bands_of(a);
      const int missing = (bands << a.band_log2) - a.query_blocks;  // of the last band
      const int of_last = (plan.offset[bands] - plan.offset[bands - 1]) >> a.band_log2;
      total = plan.offset[bands] - missing * of_last;
    }
    total *= a.kv_heads;
    share = (total + blocks * kTile - 1) / (blocks * kTile) * kTile;
    first = static_cast<int>(min(static_cast<int64_t>(block) * share, static_cast<int64_t>(total)));
    last = min(total - first, share) + first;
  }

  /// That of this block, computed again by every call.
  static __device__ __forceinline__ Shares of_block(const Arguments& a, const Schedule& plan) {
    return Shares(a, plan, ptx::opaque(static_cast<int>(blockIdx.x)),
                  ptx::opaque(static_cast<int>(gridDim.x)));
  }

  /// The segment that begins where all before cost `at`.
  __device__ __forceinline__ Segment segment(const Arguments& a, const Schedule& plan, int at) {
    Segment g;
    g.size = (max(chunks_of(a), 1) * kWhole + kTile - 1) / kTile * kTile;
    g.query_block = 0;
    g.begin = 0;
    if (a.query_blocks > 1) {
      while (true) {  // on from the band of the segment before
        const int end = plan.offset[band + 1] * a.kv_heads;
        if (at < end) break;
        position = end, ++band;
      }
      g.size = (plan.offset[band + 1] - plan.offset[band]) >> a.band_log2;
      const int of_block = g.size * a.kv_heads, blocks = (at - position) / of_block;
      g.query_block = (band << a.band_log2) + blocks;
      g.begin = position + blocks * of_block;
    }
    g.kv_head = (at - g.begin) / g.size;
    g.begin += g.kv_head * g.size;
    g.first = at - g.begin;
    g.count = min(last - at, g.size - g.first);
    return g;
  }

  /// The parts of its group.
  __device__ __forceinline__ Parts parts(const Segment& g) const {
    const int block = g.begin / share;
    const int of_all = (g.begin + g.size - 1) / share - block + 1;
    return {g.kv_head, g.query_block, block, of_all, 2 * block + (g.begin > block * share ? 1 : 0)};
  }
};

/// The tokens of a segment, in order.
struct Tokens {
  const Schedule& plan;  // which lists its chunks, if there is more than one query block
  bool is_listed;
  int base, size, chunk_log2, end;

  /// Lists the chunks of a segment; by one warp. Nobody may still read those of the one before.
  static __device__ __forceinline__ void list(const Arguments& a, Schedule& plan,
                                              const Segment& g) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int chunks = chunks_of(a), band = g.query_block >> a.band_log2;
    int before = -g.first, listed = 0;
    for (int first = 0; first < chunks && before < g.count; first += 32) {
      const int chunk = first + lane;
      const bool seen = chunk < chunks && plan.first[chunk] <= band && band <= plan.last[chunk];
      if (__ballot_sync(0xffffffffu, seen) == 0) continue;
      const int cost = seen ? plan.cost[chunk] : 0;
      int through = cost;
      for (unsigned step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, through, step);
        if (lane >= static_cast<int>(step)) through += other;
      }
      const int middle = 2 * (before + through) - cost;  // a chunk goes to the part with its middle
      const bool own = seen && middle >= 0 && middle < 2 * g.count;
      const unsigned all = __ballot_sync(0xffffffffu, own);
      const int place = listed + __popc(all & ((1u << lane) - 1));
      if (own) plan.visible[place] = static_cast<uint16_t>(chunk);
      listed += __popc(all);
      before += __shfl_sync(0xffffffffu, through, 31);
    }
    if (lane == 0) plan.listed = listed;
  }

  /// After `list`, and a barrier of all who listed and who read.
  __device__ __forceinline__ Tokens(const Arguments& a, const Schedule& plan, const Segment& g)
      : plan(plan),
        is_listed(a.query_blocks > 1),
        base(g.first / kWhole << a.chunk_log2),
        size((is_listed ? plan.listed : (g.count + kWhole - 1) / kWhole) << a.chunk_log2),
        chunk_log2(a.chunk_log2),
        end(tokens_of(a)) {}

  /// Token number `i` below `size`; `end` or more where there is none.
  __device__ __forceinline__ int at(int i) const {
    if (!is_listed) return base + i;
    return (plan.visible[i >> chunk_log2] << chunk_log2) + (i & ((1 << chunk_log2) - 1));
  }
};

/// What every block does: has `attend(segment)` leave the result of each of its segments in
/// `s.out`, and joins partial results. `next()` comes before every segment but the first.
template <class C, class Attend, class Next>
__device__ __forceinline__ void work_through(const Arguments& a, typename C::Shared& s,
                                             Attend attend, Next next) {
  const int rows = a.queries * a.group;
  const auto& plan = schedule_of<C>(s);
  Parts parts = {};
  bool helps = false;
  int at = Shares::of_block(a, plan).first;
  while (true) {
    {
      Shares shares = Shares::of_block(a, plan);
      if (at >= shares.last) break;
      attend(shares.segment(a, plan, at));
    }
    Shares shares = Shares::of_block(a, plan);  // again: registers are scarce until here
    const Segment g = shares.segment(a, plan, at);
    parts = shares.parts(g);
    // At most the first and the last segment of a block are parts.
    const int slot = 2 * static_cast<int>(blockIdx.x) + (g.begin > shares.first ? 1 : 0);
    store<C>(a, s, g.is_whole() ? -1 : slot, parts, rows);
    helps = false;
    if (!g.is_whole()) {
      C::sync();  // what all have written, thread 0 announces
      const uint32_t before = threadIdx.x == 0 ? ptx::arrive(&a.arrived[parts.block]) : 0u;
      helps = from_thread_0<C>(s, before) + 1 != static_cast<uint32_t>(parts.count);
      if (!helps) join_slices<C>(a, s, parts, rows);
    }
    at += g.count;
    if (at < shares.last) next();
  }
  if (helps) {
    // Nobody depends on this block any more; it helps if the others are not far behind.
    uint32_t complete = 0;
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i < kPolls && !complete; ++i) {
        complete = ptx::load_acquire(&a.arrived[parts.block]) == static_cast<uint32_t>(parts.count);
      }
    }
    if (from_thread_0<C>(s, complete)) join_slices<C>(a, s, parts, rows);
  }
  // The last block of all leaves the counters as it found them.
  if (from_thread_0<C>(s, threadIdx.x == 0 ? ptx::arrive(a.left) : 0u) + 1 == gridDim.x) {
    for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(gridDim.x); i += C::kThreads) {
      a.arrived[i] = a.claimed[i] = 0;
    }
    if (threadIdx.x == 0) *a.left = 0;
  }
}

template <int kPower>
constexpr int kLog2 = 1 + kLog2<kPower / 2>;
template <>
constexpr int kLog2<1> = 0;

/// How the work is cut.
struct Cut {
  int query_blocks, chunk_log2, band_log2;
  int64_t chunks;
  unsigned blocks;

  size_t schedule_bytes() const { return query_blocks > 1 ? sizeof(Schedule) : 0; }
  bool looks_before(int64_t tokens) const { return query_blocks > 1 && tokens > kLookedThrough; }
};

template <class C>
Cut cut_for(int64_t queries, int64_t group, int64_t kv_heads, int64_t tokens,
            const DeviceProperties& device) {
  Cut cut = {};
  const int64_t query_blocks = (queries * group + C::kRows - 1) / C::kRows;
  cut.query_blocks = static_cast<int>(query_blocks);
  cut.chunk_log2 = 5;
  while ((tokens >> cut.chunk_log2) >= kMostChunks) ++cut.chunk_log2;
  while ((query_blocks >> cut.band_log2) >= kMostBands) ++cut.band_log2;
  cut.chunks = (tokens + (int64_t{1} << cut.chunk_log2) - 1) >> cut.chunk_log2;
  const auto bytes = static_cast<int64_t>(sizeof(typename C::Shared) + cut.schedule_bytes());
  const int64_t resident =
      device.processors *
      std::max<int64_t>(1, std::min<int64_t>(device.shared_bytes / (bytes + 1024), C::kMinBlocks));
  const int64_t groups = kv_heads * query_blocks;
  // A second block on a multiprocessor hides latency, but doubles the partials: only where they are
  // little compared with K and V.
  const bool is_long = tokens * groups >= resident * 4 * C::kRows;
  const int64_t useful =
      std::min(is_long ? resident : device.processors, groups * std::max<int64_t>(cut.chunks, 1));
  // Else each group is a block's share.
  const bool splits = query_blocks > 1 || tokens > device.tokens_alone;
  cut.blocks = static_cast<unsigned>(
      std::min<int64_t>({splits ? useful : kv_heads, C::kMaxSplits, (kCounters - 1) / 2}));
  return cut;
}

/// Completes what the kernel is given by how the work is cut.
template <class C>
Cut cut_work(Arguments& a, const DeviceProperties& device) {
  const Cut cut = cut_for<C>(a.queries, a.group, a.kv_heads, a.tokens, device);
  a.query_blocks = cut.query_blocks;
  a.chunk_log2 = cut.chunk_log2;
  a.band_log2 = cut.band_log2;
  a.part_lse = a.part + int64_t{2} * cut.blocks * C::kRows * C::kD;
  a.claimed = a.arrived + cut.blocks;
  a.rows_log2 = kLog2<C::kRows>;
  if (!cut.looks_before(a.tokens)) a.looked_through = nullptr;
  return cut;
}

/// Floats of workspace for a launch of this configuration.
template <class C>
int64_t workspace_for(int64_t queries, int64_t group, int64_t kv_heads, int64_t tokens,
                      const DeviceProperties& device) {
  const Cut cut = cut_for<C>(queries, group, kv_heads, tokens, device);
  return int64_t{2} * cut.blocks * C::kRows * (C::kD + 1);
}

}  // namespace
}  // namespace saffron::cuda
