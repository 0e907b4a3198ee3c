// The plan of a paged KV cache: rows of the block table sorted, then one look-up a token.
//
// Rows are sorted like words. In a round every row of a group (rows that are equal as far as was
// looked) is compared with one row of its group, the pivot; next it counts who comes before it by
// what all found. Rows that differ from their pivot at one block, and there have the same one, stay
// a group. A round at least halves a group with a probability of one half, and reads no block a
// second time but those of the pivots; what is left after the last round is compared row with row.
// Rows are counted, never exchanged, so nothing but the table decides about the result.

#include "cuda/common/launch.cuh"
#include "cuda/moves/pages.cuh"

namespace saffron::cuda {
namespace {

constexpr int kLayThreads = 1024;

/// Block `r`: the group of row `r` after the round before, and its key in this round.
template <bool kFirst>
__global__ void __launch_bounds__(kThreads)
    refine_kernel(Pages pages, State before, State after, unsigned round) {
  Shared& counted = shared<Shared>();
  const int row = static_cast<int>(blockIdx.x);
  const Request request = pages.at(row);
  int start = kFirst ? (request.live ? 0 : -1) : before.start[row];
  int common = kFirst ? 0 : before.common[row];
  Key key = kFirst ? 0 : before.key[row];
  if (start >= 0) {
    count<kFirst>(pages, before, row, start, key, round, counted);
    start += counted.before;
    common = max(common, counted.common);
    if (!kFirst && settled(key)) {
      start += counted.earlier;
      if (counted.earlier > 0) common = request.full;
    } else if (counted.equal > 1) {
      const int pivot = static_cast<int>(counted.pivot * kInverse - round);
      key = compared(pages, row, pivot, kFirst ? 0 : parting(key) + 1, counted);
    }
  }
  if (threadIdx.x == 0) {
    after.start[row] = start;
    after.common[row] = common;
    after.key[row] = key;
  }
}

/// Block `r`: the place of row `r`, compared with every row of its group that the rounds did not
/// tell apart. Writes rows, and the blocks shared with the row before, in their order.
template <bool kFirst>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(Pages pages, State state, int32_t* rows, int32_t* commons) {
  Shared& counted = shared<Shared>();
  const int row = static_cast<int>(blockIdx.x);
  const Request request = pages.at(row);
  if (!request.live) return;
  const int start = kFirst ? 0 : state.start[row];
  const Key key = kFirst ? 0 : state.key[row];
  count<kFirst>(pages, state, row, start, key, 0, counted);
  int place = start + counted.before;
  int common = max(kFirst ? 0 : state.common[row], counted.common);
  if (!kFirst && settled(key)) {
    place += counted.earlier;
    if (counted.earlier > 0) common = request.full;
  } else if (counted.equal > 1) {
    for (int other = 0; other < pages.requests; ++other) {
      const bool same =
          kFirst ? pages.at(other).live : state.start[other] == start && state.key[other] == key;
      if (!same || other == row) continue;
      const Key theirs = compared(pages, row, other, kFirst ? 0 : parting(key) + 1, counted);
      const int where = static_cast<int>(theirs >> 32);
      if (where > kEqual || (where == kEqual && other < row)) {
        ++place;
        common = max(common, min(parting(theirs), request.full));
      }
    }
  }
  if (threadIdx.x == 0) {
    rows[place] = row;
    commons[place] = common;
  }
}

struct LayShared {
  int64_t tokens[kLayThreads / 32];
  int queries[kLayThreads / 32];
};

/// The sum of the values of all threads up to and with this one; `all` is the sum of all.
template <class T>
__device__ T scan(T value, T* warps, T& all) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, value, by);
    if (lane >= by) value += other;
  }
  if (lane == 31) warps[warp] = value;
  __syncthreads();
  T before = 0;
  all = 0;
  for (int i = 0; i < kLayThreads / 32; ++i) {
    if (i < warp) before += warps[i];
    all += warps[i];
  }
  __syncthreads();
  return before + value;
}

/// One block: where the queries and the tokens of each request begin, in their order. Behind the
/// last request `commons` gets what no row shares.
__global__ void __launch_bounds__(kLayThreads)
    lay_kernel(Pages pages, const int32_t* rows, int32_t* commons, int32_t* first, int32_t* offset,
               int32_t* out_count, int64_t queries, int64_t size, int32_t* fault) {
  LayShared& sums = shared<LayShared>();
  const int n = pages.requests, thread = static_cast<int>(threadIdx.x);
  int64_t written = 0;
  int live = 0, placed = 0;
  bool bad = pages.start[0] != 0 || pages.start[n * pages.start_stride] > queries;
  for (int begin = 0; begin < n; begin += kLayThreads) {
    const Request request = begin + thread < n ? pages.at(begin + thread) : Request{};
    live += __syncthreads_count(request.live);
    bad = __syncthreads_or(bad || request.bad);
  }
  if (thread == 0) commons[live] = -1;
  for (int begin = 0; begin <= n; begin += kLayThreads) {
    const int place = begin + thread;
    int own = 0;
    int64_t tokens = 0;
    if (place < live && !bad) {
      const Request request = pages.at(rows[place]);
      own = static_cast<int>(request.queries);
      tokens = request.length - static_cast<int64_t>(commons[place]) * pages.block_size;
    }
    int all_own;
    int64_t all_tokens;
    const int before = scan(own, sums.queries, all_own) - own + placed;
    const int64_t at = scan(tokens, sums.tokens, all_tokens) - tokens + written;
    if (place <= n) {
      first[place] = before;
      offset[place] = static_cast<int32_t>(at);  // what exceeds 32 bits is no plan
    }
    placed += all_own;
    written += all_tokens;
  }
  if (thread == 0) {
    bad = bad || written > size;
    if (bad) atomicOr(fault, kPagesFault);
    *out_count = bad ? 0 : static_cast<int32_t>(written);
  }
}

/// The last `i` of `0 .. n` with `bounds[i] <= value`; bounds[0] is.
__device__ __forceinline__ int place_of(const int32_t* bounds, int n, int value) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (bounds[middle] <= value) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

struct EmitShared {
  int row, column, near;
};

/// What `lay_kernel` made, to be read.
struct Laid {
  const int32_t *rows, *commons, *first, *offset, *count;
};

/// The first row behind `row` that shares no more than `column` blocks with the one before it. A
/// block of threads skips together what closes the interval of none of them.
__device__ int closing_row(const Laid& laid, int n, bool open, int row, int column,
                           EmitShared& shared) {
  if (threadIdx.x == 0) shared = {n, -1, n};
  if (!__syncthreads_or(open)) return 0;
  if (open) {
    atomicMin(&shared.row, row);
    atomicMax(&shared.column, column);
  }
  __syncthreads();
  for (int from = shared.row + 1; from <= n; from += kThreads) {
    const int place = from + static_cast<int>(threadIdx.x);
    const bool closes = place <= n && laid.commons[place] <= shared.column;
    if (closes) atomicMin(&shared.near, place);
    if (__syncthreads_or(closes)) break;
  }
  int closing = max(row + 1, shared.near);
  while (open && laid.commons[closing] > column) ++closing;
  return closing;
}

__global__ void __launch_bounds__(kThreads)
    emit_kernel(Pages pages, Laid laid, int32_t* order, int32_t* slot, int32_t* begin, int32_t* end,
                int64_t queries, int64_t size, int last_block, int32_t* fault) {
  const int n = pages.requests, count = *laid.count;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry < queries) {
    // Where there is no plan, queries stay where they are; so do those of no request.
    int query = static_cast<int>(entry);
    if (count > 0 && entry < laid.first[n]) {
      const int row = place_of(laid.first, n, query);
      query += pages.start[laid.rows[row] * pages.start_stride] - laid.first[row];
    }
    order[entry] = query;
  }

  const bool live = entry < count;
  int row = 0, own = 0, past = 0, position = 0, context = 0, column = 0, block = -1;
  if (live) {
    row = place_of(laid.offset, n, static_cast<int>(entry));
    const int request = laid.rows[row];
    own = laid.first[row];
    past = laid.first[row + 1];
    context = pages.lens[request * pages.lens_stride] - (past - own);
    position = laid.commons[row] * pages.block_size + static_cast<int>(entry) - laid.offset[row];
    column = position / pages.block_size;
    block = pages.row(request)[column * pages.column_stride];
    if (block < 0 || block > last_block) atomicOr(fault, kPagesFault);
  }
  // A full block is seen as far as rows share it.
  const bool open = live && column < context / pages.block_size;
  const int closing = closing_row(laid, n, open, row, column, shared<EmitShared>());
  if (entry >= size) return;
  const bool good = live && block >= 0 && block <= last_block;
  slot[entry] = good ? block * pages.block_size + position % pages.block_size : -1;
  begin[entry] = good ? own + max(position - context, 0) : 0;
  end[entry] = good ? (open ? laid.first[closing] : past) : 0;
}

/// How often all rows are compared with pivots, before what is left is compared row with row.
int rounds(int64_t requests) {
  return requests <= 4 ? 0 : requests <= 64 ? 2 : requests <= 512 ? 3 : 4;
}

Pages pages_of(const BlockTable& table) {
  const View &blocks = table.blocks, &lens = table.lens, &start = table.start;
  return {blocks.as<int32_t>(),
          lens.as<int32_t>(),
          start.as<int32_t>(),
          blocks.stride[0],
          blocks.stride[1],
          lens.stride[0],
          start.stride[0],
          static_cast<int>(blocks.shape[0]),
          static_cast<int>(blocks.shape[1]),
          static_cast<int>(table.block_size)};
}

}  // namespace

int64_t block_plan_workspace(int64_t requests) { return 6 * requests + 2; }

void sort_pages(const BlockTable& table, const View& laid, const View& count, int64_t queries,
                int64_t size, const Launch& on) {
  const Pages pages = pages_of(table);
  const int64_t requests = pages.requests;
  const Stream stream = on.stream;
  auto* keys = laid.as<Key>();
  auto* numbers = reinterpret_cast<int32_t*>(keys + 2 * requests);
  State old = {numbers, numbers + requests, keys};
  State fresh = {numbers + 2 * requests, numbers + 3 * requests, keys + requests};
  int32_t* rows = numbers + 4 * requests;
  int32_t* commons = rows + requests + 1;
  int32_t* first = commons + requests + 1;
  const dim3 grid(static_cast<unsigned>(requests));
  const int compared = rounds(requests);
  for (int round = 0; round < compared; ++round) {
    const auto salt = static_cast<unsigned>(round);
    if (round == 0) {
      launch<refine_kernel<true>>(grid, kThreads, sizeof(Shared), stream, pages, old, fresh, salt);
    } else {
      launch<refine_kernel<false>>(grid, kThreads, sizeof(Shared), stream, pages, old, fresh, salt);
    }
    std::swap(old, fresh);
  }
  if (compared == 0) {
    launch<finish_kernel<true>>(grid, kThreads, sizeof(Shared), stream, pages, old, rows, commons);
  } else {
    launch<finish_kernel<false>>(grid, kThreads, sizeof(Shared), stream, pages, old, rows, commons);
  }
  launch<lay_kernel>(dim3(1), kLayThreads, sizeof(LayShared), stream, pages, rows, commons, first,
                     first + requests + 1, count.as<int32_t>(), queries, size,
                     on.fault.as<int32_t>());
}

void block_plan(const BlockTable& table, const View& laid, const View& order, const TriePlan& plan,
                const Launch& on) {
  const Pages pages = pages_of(table);
  const int64_t requests = pages.requests, n = requests + 1;
  const int64_t queries = order.shape[0], size = plan.slot.shape[0];
  const auto* rows = reinterpret_cast<const int32_t*>(laid.as<Key>() + 2 * requests) + 4 * requests;
  const Laid made = {rows, rows + n, rows + 2 * n, rows + 3 * n, plan.count.as<int32_t>()};
  const int64_t last_block = (int64_t{1} << 31) / table.block_size - 1;
  launch<emit_kernel>(dim3(blocks_for(std::max(queries, size), kThreads)), kThreads,
                      sizeof(EmitShared), on.stream, pages, made, order.as<int32_t>(),
                      plan.slot.as<int32_t>(), plan.begin.as<int32_t>(), plan.end.as<int32_t>(),
                      queries, size, last_block, on.fault.as<int32_t>());
}

}  // namespace saffron::cuda
