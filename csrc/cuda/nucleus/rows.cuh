#pragma once

// Part of nucleus.cu: the nucleus of a row, from the bins of its parts (parts.cuh).

#include "cuda/nucleus/parts.cuh"

namespace saffron::cuda {
namespace {

/// One warp: the bin in which the mass reaches `limit` (kBins: none), and the mass before it.
__device__ __forceinline__ void find_edge(Shared& s, uint64_t limit) {
  const int lane = static_cast<int>(threadIdx.x);
  uint64_t own[kBins / 32], sum = 0;
#pragma unroll
  for (int j = 0; j < kBins / 32; ++j) {
    const int bin = lane * (kBins / 32) + j;
    own[j] = static_cast<uint64_t>(s.bin_high[bin]) << 32 | s.bin_low[bin];
    sum += own[j];
  }
  uint64_t through = sum;
  for (unsigned step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(0xffffffffu, through, step);
    if (lane >= static_cast<int>(step)) through += other;
  }
  uint64_t before = s.above + through - sum, before_edge = 0;
  int edge = kBins;
#pragma unroll
  for (int j = 0; j < kBins / 32; ++j) {
    if (edge == kBins && before + own[j] >= limit) {
      edge = lane * (kBins / 32) + j;
      before_edge = before;
    }
    before += own[j];
  }
  const int lowest = __reduce_min_sync(0xffffffffu, edge);
  if (lane == 0) s.edge_bin = lowest;
  __syncwarp();
  if (lowest < kBins && edge == lowest) s.above = before_edge;
}

/// Where the members before the edge's bin lie in the lists, and the tokens of that bin.
__device__ __forceinline__ void find_pieces(const Arguments& a, Shared& s, int64_t row) {
  const int lane = static_cast<int>(threadIdx.x), bin = s.edge_bin;
  if (lane < 32) {
    int members = 0, at_edge = 0;
#pragma unroll 1
    for (int first = 0; first < a.parts; first += 32) {
      const int i = first + lane;
      int begin = 0, end = 0;
      if (i < a.parts) {
        const int* ends = a.bins[row * a.parts + i].end;
        if (bin > 0) begin = __ldcg(ends + bin - 1);
        end = bin < kBins ? __ldcg(ends + bin) : begin;
      }
      int through = begin, through_edge = end - begin;
      for (unsigned step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, through, step);
        const int other_edge = __shfl_up_sync(0xffffffffu, through_edge, step);
        if (lane >= static_cast<int>(step)) through += other, through_edge += other_edge;
      }
      if (i < a.parts) {
        s.members.start[i + 1] = members + through;
        s.members.from[i] = 0;
        s.at_edge.start[i + 1] = at_edge + through_edge;
        s.at_edge.from[i] = begin;
      }
      members += __shfl_sync(0xffffffffu, through, 31);
      at_edge += __shfl_sync(0xffffffffu, through_edge, 31);
    }
    if (lane == 0) s.members.start[0] = s.at_edge.start[0] = 0, s.found = members;
  }
  __syncthreads();
}

/// Entry `i` of all pieces.
template <class T>
__device__ __forceinline__ Entry listed(const Arguments& a, const Pieces& pieces, int64_t row,
                                        int i) {
  int low = 0, high = a.parts;  // the part is the last that starts at i or before
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (pieces.start[middle] <= i ? low : high) = middle;
  }
  const int place = low * kPartTokens<T> + pieces.from[low] + i - pieces.start[low];
  return __ldcg(a.listed + row * a.vocab + place);
}

/// The range of entries among which the edge of the nucleus lies, in bins of equal size.
struct Range {
  Entry first, last;
  int shift;

  __device__ __forceinline__ Range(Entry first, Entry last) : first(first), last(last) {
    shift = max(0, 64 - __clzll(last - first) - 8);
  }
  __device__ __forceinline__ bool holds(Entry e) const { return e >= first && e <= last; }
  __device__ __forceinline__ int bin(Entry e) const {
    return static_cast<int>((e - first) >> shift);
  }
  /// What is left of the range when the edge is known to lie in this bin.
  __device__ __forceinline__ Range narrowed(int bin) const {
    const Entry begin = first + (static_cast<Entry>(bin) << shift);
    return Range(begin, min(last, begin + ((Entry{1} << shift) - 1)));
  }
};

/// Writes member `i` of the nucleus.
__device__ __forceinline__ void take(const Arguments& a, int64_t row, int i, Entry e) {
  a.found.token[row * a.vocab + i] = token_of(e);
  a.found.logit[row * a.vocab + i] = logit_of(e);
}

/// Writes what comes before the edge's bin.
template <class T>
__device__ __forceinline__ void take_members(const Arguments& a, const Shared& s, int64_t row) {
  const int count = s.members.start[a.parts];
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads * kTogether) {
    Entry e[kTogether];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      e[j] = listed<T>(a, s.members, row, min(i + j * kThreads, count - 1));
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      if (i + j * kThreads < count) take(a, row, i + j * kThreads, e[j]);
    }
  }
}

/// From the least to the largest of the entries that threads have.
__device__ __forceinline__ Range range_of(Shared& s, Entry least, Entry most) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int step = 16; step > 0; step /= 2) {
    least = min(least, __shfl_xor_sync(0xffffffffu, least, step));
    most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
  }
  if (lane == 0) s.edge[warp] = least, s.edge[kWarps + warp] = most;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    least = min(least, s.edge[w]);
    most = max(most, s.edge[kWarps + w]);
  }
  return Range(least, most);
}

/// Writes the members among the tokens of the edge's bin.
template <class T>
__device__ __forceinline__ void take_at_edge(const Arguments& a, Shared& s, int64_t row,
                                             uint64_t limit) {
  const int thread = static_cast<int>(threadIdx.x), all = s.at_edge.start[a.parts];
  const bool held = all <= kHeld;
  if (held) {
    for (int i = thread; i < all; i += kThreads) s.space[i] = listed<T>(a, s.at_edge, row, i);
  }
  Range range(0, ~Entry{0});
  const auto each = [&](auto visit) {  // by whole warps: false, and any entry, where there is none
#pragma unroll 1
    for (int first = 0; first < all; first += kThreads * kTogether) {
      Entry e[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int i = min(first + j * kThreads + thread, all - 1);
        e[j] = held ? s.space[i] : listed<T>(a, s.at_edge, row, i);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        visit(first + j * kThreads + thread < all && range.holds(e[j]), e[j]);
      }
    }
  };
  int count = all;  // of those in the range
  while (count > kPairs) {
    Entry least = ~Entry{0}, most = 0;
    each([&](bool there, Entry e) {
      if (there) least = min(least, e), most = max(most, e);
    });
    range = range_of(s, least, most);  // all bins are of use: of equal logits only tokens differ
    if (thread < kBins) s.bin_low[thread] = s.bin_high[thread] = 0;
    if (thread == 0) s.count = 0;
    __syncthreads();
    each([&](bool there, Entry e) {
      const int bin = there ? range.bin(e) : -1;
      add_all(s, bin, mass(a, s, logit_of(e)));
    });
    __syncthreads();
    if (thread < 32) find_edge(s, limit);
    __syncthreads();
    const int edge_bin = s.edge_bin;
    each([&](bool there, Entry e) {
      const int bin = there ? range.bin(e) : kBins;
      const int mine = bin < edge_bin ? 0 : -1, at_edge = bin == edge_bin && there ? 0 : -1;
      const int place = Peers(mine).count(&s.found, mine);
      if (mine == 0) take(a, row, place, e);
      Peers(at_edge).count(&s.count, at_edge);
    });
    range = range.narrowed(edge_bin);
    __syncthreads();
    count = s.count;
    __syncthreads();
  }
  if (thread == 0) s.count = 0;
  __syncthreads();
  each([&](bool there, Entry e) {
    if (!there) return;
    const int i = atomicAdd(&s.count, 1);
    s.edge[i] = e;
    s.edge_mass[i] = mass(a, s, logit_of(e));
  });
  __syncthreads();
  if (thread < count) {
    const Entry e = s.edge[thread];
    uint64_t before = s.above;
    for (int i = 0; i < count; ++i) before += s.edge[i] < e ? s.edge_mass[i] : 0;
    if (before < limit) take(a, row, atomicAdd(&s.found, 1), e);
  }
}

/// Finds the nucleus of a row of which every part is in bins.
template <class T>
__device__ __forceinline__ void select(const Arguments& a, Shared& s, int64_t row) {
  const int thread = static_cast<int>(threadIdx.x);
  // A member iff the mass before it is less than this. Rounded up, as mass is a whole number.
  const double top_p = top_p_of(a, row);
  const uint64_t limit =
      top_p >= 1 ? ~uint64_t{0} : static_cast<uint64_t>(ceil(top_p * (s.sum * a.mass_unit)));
  if (thread < kBins) {
    uint64_t mass = 0;
#pragma unroll 4
    for (int i = 0; i < a.parts; ++i) mass += __ldcg(a.bins[row * a.parts + i].mass + thread);
    s.bin_low[thread] = static_cast<uint32_t>(mass);
    s.bin_high[thread] = static_cast<uint32_t>(mass >> 32);
  }
  if (thread == 0) s.above = 0;
  __syncthreads();
  if (thread < 32) find_edge(s, limit);
  __syncthreads();
  find_pieces(a, s, row);
  take_members<T>(a, s, row);
  take_at_edge<T>(a, s, row, limit);
  __syncthreads();
  if (thread == 0) a.found.count[row] = s.found;
}

/// A block's whole work.
template <class T>
__device__ __forceinline__ void find_nucleus(const Arguments& a, int64_t row, int index) {
  auto& s = shared<Shared>();
  const bool leads = threadIdx.x == 0;
  if (a.groups != nullptr) {
    const int group = a.groups[row * a.stride_groups];
    if (group < 0 || group >= a.num_groups) {
      if (leads && index == 0) a.found.count[row] = 0;
      return;
    }
  }
  const double top_p = top_p_of(a, row);
  if (!(top_p > 0 && top_p <= 1)) {
    if (leads && index == 0) {
      atomicOr(a.fault, kTopPFault);
      a.found.count[row] = 0;
    }
    return;
  }
  const auto parts = static_cast<uint32_t>(a.parts);
  uint32_t* counter = a.counter + row;
  Part* part = a.part + row * a.parts;
  fetch<T>(a, s, row, index);
  const Part own = measure<T>(s);
  if (leads) {
    part[index] = own;
    uint32_t seen = ptx::arrive(counter, kRead) + kRead;
#pragma unroll 1
    for (int i = 0; i < kPolls && seen % kField != parts; ++i) seen = ptx::load_acquire(counter);
    s.seen = seen;
  }
  __syncthreads();
  const bool binned = s.seen % kField == parts;
  if (binned) {
    join_parts(a, s, row);
    if (good(s)) fill_bins<T>(a, s, row, index);
  }
  __syncthreads();
  if (leads) {
    const uint32_t step = kDone + (binned ? kBinned : 0);
    part[index].binned = binned;
    s.seen = ptx::arrive(counter, step) + step;
  }
  __syncthreads();
  if (s.seen / kDone != parts) return;

  // The last block to arrive.
  if (leads) *counter = 0;  // for the next launch
  if (!binned) join_parts(a, s, row);
  if (leads && a.stats != nullptr) a.stats[row] = make_float2(s.largest, static_cast<float>(s.sum));
  if (!good(s)) {
    if (leads) {
      atomicOr(a.fault, kLogitsFault);
      a.found.count[row] = 0;
    }
    return;
  }
  if (s.seen / kBinned % kField != parts) {
    for (int i = 0; i < a.parts; ++i) {
      if (__ldcg(&part[i].binned)) continue;
      fetch<T>(a, s, row, i);
      fill_bins<T>(a, s, row, i);
      __syncthreads();
    }
  }
  select<T>(a, s, row);
}

}  // namespace
}  // namespace saffron::cuda
