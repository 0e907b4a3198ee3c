#pragma once

// The best `width` candidates of every group of rows, in one launch, for select_beam and
// multifurcate.
//
// All candidates, row after row, are cut into one range for every block, whatever the rows and
// groups are. For the part of a group in its range (a segment) a block makes keys and keeps the
// best `width`. The last block to arrive at a group takes the keys of all its segments and its
// finished nodes, and puts the best in order; the last group to be done puts the beams one after
// the other. Keys are all different, so that nothing depends on who comes when.
//
// All of it is a few dependent steps of about half a microsecond each: the rows, the candidates,
// keys out, arrival, keys in, selection. With one group the last needs no arrival of groups.

#include "cuda/beam/beams.cuh"

namespace saffron::cuda {

/// The workspace that `Beams` points to, at 16 bytes.
struct BeamWorkspace {
  int64_t segments, best, live, is_chosen, bytes;

  BeamWorkspace(int64_t blocks, int64_t num_groups, int64_t width, int64_t finished) {
    constexpr auto key = static_cast<int64_t>(sizeof(Key));
    segments = 0;
    best = segments + (blocks + num_groups) * width * key;
    live = best + num_groups * width * key;
    is_chosen = live + num_groups * 4;
    bytes = (is_chosen + finished * 4 + 15) / 16 * 16;
  }

  void lay_out(char* at, Beams& a) const {
    a.segments = reinterpret_cast<Key*>(at + segments);
    a.best = reinterpret_cast<Key*>(at + best);
    a.live = reinterpret_cast<int32_t*>(at + live);
    a.is_chosen = reinterpret_cast<int32_t*>(at + is_chosen);
  }
};

/// Keys that a block holds for this width.
inline int64_t beam_capacity(int64_t width) {
  return std::max<int64_t>(4 * kBeamThreads, width + 2 * kBeamThreads);
}

/// Shared memory: a BlockScratch, then the keys, then the rows.
inline int64_t beam_shared(int64_t rows, int64_t width) {
  return static_cast<int64_t>(sizeof(BlockScratch)) +
         beam_capacity(width) * static_cast<int64_t>(sizeof(Key)) + (2 * rows + 1) * 4;
}

/// What both ops are given alike; without a workspace, finished nodes and what is all unseen.
inline Beams beams(const Groups& groups, const Beam& beam, const Scratch& scratch,
                   const Launch& on) {
  Beams a = {};
  a.groups = groups.of_row.as<int32_t>();
  a.widths = groups.widths.as<int32_t>();
  a.arrived = scratch.counters.as<uint32_t>();
  a.parent = beam.parent.as<int32_t>();
  a.token = beam.token.as<int32_t>();
  a.reward = numbers(beam.reward);
  a.fault = on.fault.as<int32_t>();
  a.rows = static_cast<int>(groups.of_row.shape[0]);
  a.num_groups = static_cast<int>(groups.number);
  a.width = static_cast<int>(groups.width);
  a.capacity = static_cast<int>(beam_capacity(groups.width));
  return a;
}

/// Where the candidates of all rows lie, in shared memory.
struct RowTable {
  int* offset;  // `[rows + 1]`
  int* group;   // `[rows]`
  int rows;

  /// The row of a candidate.
  __device__ __forceinline__ int row_of(int candidate) const {
    int low = 0, high = rows - 1;
#pragma unroll 1
    while (low < high) {
      const int middle = (low + high) / 2;
      if (offset[middle + 1] <= candidate) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  /// The first candidate of a group and all after it.
  __device__ __forceinline__ int begin_of(int of_group) const {
    int low = 0, high = rows;
#pragma unroll 1
    while (low < high) {
      const int middle = (low + high) / 2;
      if (group[middle] < of_group) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return offset[low];
  }
};

/// What a block works with. `Source` says what the candidates are:
///
///   int count(int row)                       candidates of the row, below 0: bad offsets
///   void open(int begin, int end)            the block comes to a group with these candidates
///   void collect(int first, int n, Key* to)  keys of n candidates, one per thread at most;
///                                            by the whole block
///   bool is_all_unseen()                          the group, after all of the block's share is
///   collected int token(const Key&)                    of a candidate that is not finished
template <class Source>
struct Selector {
  const Beams& a;
  Source& source;
  BlockScratch& scratch;
  Key* keys;
  RowTable table;
  int range;  // candidates of a block
  int width;  // of the group that the block is at

  __device__ __forceinline__ void run() {
    const int total = load_rows();
    const int blocks = static_cast<int>(gridDim.x);
    range = max(1, (total + blocks - 1) / blocks);
    const int64_t begins = static_cast<int64_t>(blockIdx.x) * range;
    int first = begins < total ? static_cast<int>(begins) : total;
    const int last = total - first < range ? total : first + range;
    int empty = static_cast<int>(blockIdx.x);
    bool is_done = false;
#pragma unroll 1
    while (true) {
      int group, size = 0;
      bool all_unseen = false;
      if (first < last) {
        group = table.group[table.row_of(first)];
        const int begin = table.begin_of(group), end = table.begin_of(group + 1);
        const int stop = min(last, end);
        width = a.width_of(group);
        size = collect(begin, end, first, stop);
        all_unseen = source.is_all_unseen();
        first = stop;
        if (!arrive(group, begin, end, size)) continue;
      } else {
        // A group without candidates has nobody to arrive at it.
        group = empty;
        if (group >= a.num_groups) break;
        empty += blocks;
        if (table.begin_of(group) != table.begin_of(group + 1)) continue;
        width = a.width_of(group);
      }
      is_done = finish(group, all_unseen, size);
    }
    if (is_done) place_all();
  }

  /// Fills the table; returns how many candidates there are. After a fault there are none.
  __device__ __forceinline__ int load_rows() {
    int total = 0;
    int32_t bad = 0;
#pragma unroll 1
    for (int first = 0; first < a.rows; first += kBeamThreads) {
      const int row = first + thread();
      int count = 0;
      if (row < a.rows) {
        const int group = a.groups[row], before = row > 0 ? a.groups[row - 1] : 0;
        count = source.count(row);
        if (group < before || group > a.num_groups) bad |= kGroupFault;
        if (count < 0) bad |= kCandidateFault;
        if (group >= a.num_groups) count = 0;
        table.group[row] = group;
      }
      int all;
      const int place = sum_before(scratch, count, all);
      if (row < a.rows) table.offset[row] = total + place;
      total += all;
    }
    if (blockIdx.x == 0) {
#pragma unroll 1
      for (int i = thread(); i < a.finished; i += kBeamThreads) {
        const int group = a.finished_groups[i];
        if (group < 0 || group > a.num_groups) atomicOr(a.fault, kGroupFault);
      }
#pragma unroll 1
      for (int i = thread(); a.widths != nullptr && i < a.num_groups; i += kBeamThreads) {
        if (a.widths[i] < 1 || a.widths[i] > a.width) atomicOr(a.fault, kWidthFault);
      }
    }
    if (bad) atomicOr(a.fault, bad);
    if (__syncthreads_or(bad != 0)) {
      total = 0;
#pragma unroll 1
      for (int row = thread(); row < a.rows; row += kBeamThreads) table.offset[row] = 0;
    }
    if (thread() == 0) table.offset[a.rows] = total;
    __syncthreads();
    return total;
  }

  /// Keeps the best of the candidates `first` to `last` of a group; returns how many those are.
  __device__ __forceinline__ int collect(int begin, int end, int first, int last) {
    source.open(begin, end);
    int size = 0;
#pragma unroll 1
    for (; first < last; first += kBeamThreads) {
      if (size + kBeamThreads > a.capacity) size = keep_best(scratch, keys, size, width);
      const int n = min(last - first, kBeamThreads);
      source.collect(first, n, keys + size);
      size += n;
    }
    return keep_best(scratch, keys, size, width);
  }

  /// Leaves the keys of a segment for the last block of its group. If that is this block, it gets
  /// those of all segments.
  __device__ __forceinline__ bool arrive(int group, int begin, int end, int& size) {
    const int first = begin / range, last = (end - 1) / range;  // blocks
    if (first == last) return true;
    Key* own = segment(static_cast<int>(blockIdx.x), group);
#pragma unroll 1
    for (int i = thread(); i < size; i += kBeamThreads) own[i] = keys[i];
    if (!is_last(a.arrived + 1 + group, last - first + 1)) return false;
    size = gather(group, begin, end, first, last);
    return true;
  }

  /// One after the other in the order of (block, group), of which each pair's successor adds one to
  /// either: no two have the same place.
  __device__ __forceinline__ Key* segment(int block, int group) const {
    return a.segments + static_cast<int64_t>(block + group) * a.width;
  }

  /// Whether this block is the last of so many to arrive; it then sees what the others wrote.
  __device__ __forceinline__ bool is_last(uint32_t* counter, int of_all) {
    __syncthreads();
    if (thread() == 0) scratch.before = ptx::arrive(counter);
    __syncthreads();
    return scratch.before + 1 == static_cast<uint32_t>(of_all);
  }

  /// The keys of all segments of a group, of which blocks `first` to `last` have one each.
  __device__ __forceinline__ int gather(int group, int begin, int end, int first, int last) {
    const int64_t second = static_cast<int64_t>(first + 1) * range;
    const int of_first = min(static_cast<int>(second - begin), width);
    const int of_others = min(range, width);
    const int64_t of_last =
        min(end - static_cast<int64_t>(last) * range, static_cast<int64_t>(width));
    const int all = of_first + (last - first - 1) * of_others + static_cast<int>(of_last);
    int size = 0;
#pragma unroll 1
    for (int done = 0; done < all; done += kBeamThreads) {
      if (size + kBeamThreads > a.capacity) size = keep_best(scratch, keys, size, width);
      const int i = done + thread(), after_first = i - of_first;
      if (i < all) {
        const Key* from = after_first < 0 ? segment(first, group) + i
                                          : segment(first + 1 + after_first / of_others, group) +
                                                after_first % of_others;
        keys[size + thread()] = {__ldcg(&from->reward), __ldcg(&from->place)};
      }
      size += min(all - done, kBeamThreads);
    }
    return size;
  }

  /// The best of a group: of `size` keys that are there, and of its finished nodes. Returns whether
  /// it was the last of all groups.
  __device__ __forceinline__ bool finish(int group, bool all_unseen, int size) {
    size = add_finished(group, size);
    size = keep_best(scratch, keys, size, width);
    const int lane = thread() % 32;
    Key* best = a.best + static_cast<int64_t>(group) * a.width;
#pragma unroll 1
    for (int i = thread() / 32; i < size; i += kBeamWarps) {
      const Key key = keys[i];
      unsigned before = 0;
#pragma unroll 1
      for (int other = lane; other < size; other += 32) before += stands_before(keys[other], key);
      before = __reduce_add_sync(0xffffffffu, before);
      if (lane == 0) best[before] = key;
    }
    int live = 0;
#pragma unroll 1
    for (int first = 0; first < size; first += kBeamThreads) {
      const int i = first + thread();
      const int row = i < size ? keys[i].row() : a.rows;
      live += __syncthreads_count(i < size && row < a.rows);
      if (i < size && row >= a.rows) a.is_chosen[row - a.rows] = 1;
    }
    if (thread() == 0) {
      a.live[group] = live;
      if (a.all_unseen != nullptr) a.all_unseen[group] = all_unseen;
    }
    if (a.num_groups > 1) return is_last(a.arrived, a.num_groups);
    __syncthreads();
    return true;
  }

  /// Adds the finished nodes of a group to `size` keys.
  __device__ __forceinline__ int add_finished(int group, int size) {
#pragma unroll 1
    for (int first = 0; first < a.finished; first += kBeamThreads) {
      if (size + kBeamThreads > a.capacity) size = keep_best(scratch, keys, size, width);
      const int i = first + thread();
      const bool own = i < a.finished && a.finished_groups[i] == group;
      int all;
      const int place = sum_before(scratch, own ? 1 : 0, all);
      if (own) {
        keys[size + place] = make_key(a.finished_scores.at(i), a.rows + i, 0, a.fault);
        a.is_chosen[i] = 0;
      }
      size += all;
    }
    return size;
  }

  /// All groups are done: their candidates group after group, then the finished nodes, then
  /// nothing.
  __device__ __forceinline__ void place_all() {
    int place = 0;
#pragma unroll 1
    for (int first = 0; first < a.num_groups; first += kBeamThreads) {
      const int n = min(a.num_groups - first, kBeamThreads);
      const int live = thread() < n ? __ldcg(a.live + first + thread()) : 0;
      int all;
      scratch.row[thread()] = place + sum_before(scratch, live, all);
      scratch.token[thread()] = live;
      place += all;
      __syncthreads();
#pragma unroll 1
      for (int i = thread(); i < n * a.width; i += kBeamThreads) {
        const int g = i / a.width, at = i % a.width;
        if (at >= scratch.token[g]) continue;
        const Key* from = a.best + (first + g) * static_cast<int64_t>(a.width) + at;
        const Key key = {__ldcg(&from->reward), __ldcg(&from->place)};
        place_one(scratch.row[g] + at, key.row(), source.token(key), logit_of(key.reward));
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int first = 0; first < a.finished; first += kBeamThreads) {
      const int i = first + thread();
      const int group = i < a.finished ? a.finished_groups[i] : -1;
      const bool chosen = group >= 0 && group < a.num_groups && __ldcg(a.is_chosen + i) != 0;
      int all;
      const int before = sum_before(scratch, chosen ? 1 : 0, all);
      if (chosen) place_one(place + before, a.rows + i, -1, a.finished_scores.at(i));
      place += all;
    }
    const int size = a.num_groups * a.width;
#pragma unroll 1
    for (int i = place + thread(); i < size; i += kBeamThreads) {
      place_one(i, a.rows + a.finished, -1, -INFINITY);
    }
#pragma unroll 1
    for (int i = thread(); i <= a.num_groups; i += kBeamThreads) a.arrived[i] = 0;
  }

  __device__ __forceinline__ void place_one(int place, int parent, int token, float reward) {
    a.parent[place] = parent;
    a.token[place] = token;
    a.reward.set(place, reward);
  }
};

/// The keys and rows behind the scratch, in the `beam_shared` bytes of shared memory.
__device__ __forceinline__ Key* keys_of(BlockScratch& scratch) {
  return reinterpret_cast<Key*>(&scratch + 1);
}

__device__ __forceinline__ RowTable rows_of(BlockScratch& scratch, const Beams& a) {
  auto* offset = reinterpret_cast<int*>(keys_of(scratch) + a.capacity);
  return {offset, offset + a.rows + 1, a.rows};
}

/// The calling block's part of the launch.
template <class Source>
__device__ __forceinline__ void select_beams(const Beams& a, Source& source,
                                             BlockScratch& scratch) {
  Selector<Source>{a, source, scratch, keys_of(scratch), rows_of(scratch, a), 0, 0}.run();
}

}  // namespace saffron::cuda
