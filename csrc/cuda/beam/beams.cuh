#pragma once

// Arguments of the selection of beams (groups.cuh).

#include "cuda/beam/keys.cuh"

namespace saffron::cuda {

/// Arguments. Rows are in groups that ascend; those of group `num_groups` are in none.
struct Beams {
  const int32_t* groups;
  const int32_t* widths;  // `[num_groups]`, each at most `width`; or null: `width` for all
  Numbers finished_scores;
  const int32_t* finished_groups;
  Key* segments;       // `[blocks + num_groups, width]`
  Key* best;           // `[num_groups, width]`
  int32_t* live;       // `[num_groups]` how many of the best are not finished
  int32_t* is_chosen;  // `[finished]`
  uint32_t* arrived;   // `[1 + num_groups]` groups that are done; for each, segments that are
  int32_t* parent;     // `[num_groups, width]`, as token and reward
  int32_t* token;
  Numbers reward;
  bool* all_unseen;  // `[num_groups]`, or null
  int32_t* fault;
  int rows, num_groups, width, finished;
  int capacity;  // keys that a block holds: no fewer than `width` and two for every thread

  __device__ __forceinline__ int width_of(int group) const {
    return widths == nullptr ? width : min(max(widths[group], 1), width);
  }
};

}  // namespace saffron::cuda
