#pragma once

// The ops as saffron_kernels/ops.py documents them, on a CUDA device. Shapes and dtypes were
// checked there; outputs and workspace are allocated by the caller (saffron_kernels/backends/cuda).
//
// How a kernel file is written (one op a file, `<op>.cu`):
//
// - It includes this header, cuda/common/launch.cuh and, where it uses them, cuda/ptx/ptx.cuh, and
//   nothing else of CUDA's or of a framework's: a launcher takes pointers, sizes, strides and a
//   stream. It neither allocates nor synchronises, so that a step can be captured in a CUDA graph.
// - Kernels stand in an anonymous namespace, and are launched by `launch<kernel>(...)` alone.
// - All shared memory is dynamic: a struct that `shared<T>()` returns, its size passed to `launch`.
//   Tests run several blocks side by side in one thread, where a static variable would be shared.
// - Everything the compiler has no built-in for is a function of cuda/ptx/ptx.cuh, or of
//   cuda/ptx/hopper.cuh what only Hopper has. A new one gets its twin in
//   tests/kernels/cuda/host/cuda, which says what it does in plain C++: the tests of every op run
//   the kernels on the CPU through it, in a random order of threads.
// - No block may need another to run at the same time: what is left over is done by the last block
//   to arrive. (One may look for a while whether there is something to help with.)
// - Content that is bad (a slot that does not exist) is left out and sets a bit of `fault`.
// - No local memory: arrays are indexed by constants after unrolling. test_cuda_compile.py verifies
//   that, and docs/cuda-kernels.md lists what each kernel needs: write it again after a change.
//
// Arguments that belong together are a struct here and, with the same name and fields, a NamedTuple
// in saffron_kernels/backends/cuda/arguments.py. Sizes and dtypes are those of the tensors.
//
// Besides its file a new op needs a declaration here, a line in bindings.cpp, a function in
// saffron_kernels/backends/cuda, and launches of all its kernels in CASES of
// tests/support/cuda_report.py. The tests of the op in tests/ops/test_<op>.py then run it as they
// are.

#include <cstddef>
#include <cstdint>

namespace saffron::cuda {

using Stream = uintptr_t;  // a cudaStream_t

/// kFloat8 is e4m3; fp64 is only the dtype of parameters, and of indices and masks nobody asks.
enum class DType : int {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat8 = 3,
  kFloat64 = 4,
  kOther = 5
};

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : dtype == DType::kFloat8 ? 1 : 2;
}

/// Bits of the fault word; saffron_kernels/backends/faults.py has the messages.
enum Fault : int32_t {
  kSlotFault = 1,
  kLogitsFault = 2,
  kCandidateFault = 4,
  kRewardFault = 8,
  kGroupFault = 16,
  kPlanFault = 32,
  kBannedFault = 64,
  kWidthFault = 128,
  kTopPFault = 256,
  kPagesFault = 512,
};

/// A tensor of at most four dimensions in device memory; strides count elements. One that was not
/// given has no data, and sizes of 0.
struct View {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
  DType dtype = DType::kFloat32;
  int64_t shape[4] = {0, 0, 0, 0};

  bool given() const { return data != nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

/// Where an op runs, and the `[1]` int32 that it records bad content in.
struct Launch {
  View fault;
  Stream stream;
};

/// Memory that an op needs besides its arguments. `counters` holds kCounters zeros and is left so;
/// launches that share it must not overlap.
struct Scratch {
  View workspace, counters;
};

/// K `[num_slots, kv_heads, head_dim]` and V `[num_slots, kv_heads, v_dim]` in one dtype; scales
/// `[kv_heads]` fp32 contiguous, if given, for fp8 alone.
struct KVCaches {
  View k, v, k_scale, v_scale;
};

/// RoPE: cos and sin `[tokens, rotated]` in fp32, bf16 or fp16, or neither.
struct Rotary {
  View cos, sin;
};

/// A flattened trie: `[tokens]` int32 contiguous. `count` `[1]`, if given, holds on the device how
/// many of the tokens there are; their number is then the most there can be.
struct TriePlan {
  View slot, begin, end, count;
};

/// k, v `[tokens, kv_heads, head_dim]` in fp32, bf16 or fp16, slots `[tokens]`; caches in the same
/// dtype or fp8.
void append_kv(const View& k, const View& v, const View& slots, const KVCaches& caches,
               const Rotary& rotary, const Launch& on);

/// slots `[sequences, length]`; k, v `[sequences, kv_heads, length, head_dim]`, contiguous.
void gather_kv(const KVCaches& caches, const View& slots, const View& k, const View& v,
               const Launch& on);

/// The largest head size that tree_attention serves.
constexpr int64_t kMaxHeadDim = 256;
/// Counters that tree_attention needs whatever the sizes: those of the most groups that are split.
constexpr int64_t kCounters = 4096;

/// Floats of workspace that tree_attention needs on the current device; `stored` as there.
int64_t tree_attention_workspace(int64_t queries, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                 int64_t tokens, DType stored);

/// Which of its two paths tree_attention takes on the current device: "mma" or "wgmma". A rule
/// chooses (`hopper_takes`); the environment variable SAFFRON_CUDA_ATTENTION, one of these names,
/// overrides it wherever that path can run.
const char* tree_attention_path(int64_t queries, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                DType stored);

/// What scores are multiplied by; what bounds them then, 0 if nothing does; sinks `[heads]` fp32
/// contiguous, if given.
struct Scoring {
  double scale, softcap;
  View sinks;
};

/// out `[queries, heads, v_dim]` and lse `[queries, heads]` fp32.
struct Attended {
  View out, lse;
};

/// q `[queries, heads, head_dim]` in bf16 or fp16, and caches in the same dtype or fp8, whose rows
/// begin at multiples of 16 bytes and are a multiple of that long, their last dimension contiguous.
/// The result is contiguous.
void tree_attention(const View& q, const KVCaches& caches, const TriePlan& plan,
                    const Scoring& scoring, const Attended& result, const Scratch& scratch,
                    const Launch& on);

/// Identifies the graph that `stream` is being captured into; 0 if it is not being captured.
uint64_t capture_id(Stream stream);

/// The result is contiguous.
void merge_attention(const Attended& a, const Attended& b, const Attended& result,
                     const Launch& on);

/// parents, new_slots `[fresh]`, and a result of `[tokens + fresh]`, or with a `count` `[tokens]`;
/// all of them contiguous.
void advance_tree(const TriePlan& plan, const View& parents, const View& new_slots, int64_t queries,
                  const TriePlan& result, const Launch& on);

/// How many int64 of workspace a plan of a paged cache needs.
int64_t block_plan_workspace(int64_t requests);

/// A paged cache: blocks `[requests, columns]`, tokens of each request `[requests]` and its first
/// query `[requests + 1]`, of any layout.
struct BlockTable {
  View blocks, lens, start;
  int64_t block_size;
};

/// The first half of block_plan, some launches: requests in their order, where the queries and the
/// tokens of each begin, to `laid`, which is the workspace; and to count `[1]` how many tokens the
/// plan has. What is wrong with the table, or more than `size` tokens, sets kPagesFault and makes
/// count 0.
void sort_pages(const BlockTable& table, const View& laid, const View& count, int64_t queries,
                int64_t size, const Launch& on);

/// The second half, one launch, into order `[queries]` and the plan, whose count is that of
/// sort_pages. A token of a block that cannot be is left out, and sets kPagesFault.
void block_plan(const BlockTable& table, const View& laid, const View& order, const TriePlan& plan,
                const Launch& on);

/// Candidates of rows, in device memory: row `r` owns entries `r * vocab` to `r * vocab +
/// count[r]`, in no particular order. By probability they stand in order of logit descending, then
/// token ascending; entry() of cuda/common/entries.cuh makes one integer of the two. -0.0 comes as
/// 0.0.
struct NucleusLists {
  int32_t* token;  // [rows, vocab]
  float* logit;    // [rows, vocab]
  int32_t* count;  // [rows]
};

/// How many of the most probable tokens are in the nucleus of a row, and which can never be.
/// Everything may be strided; rows may share theirs (a stride of 0).
struct Limits {
  double top_p;  // of all rows,
  View top_ps;   // or, if given, `[rows]` of each, in fp32 or fp64
  View banned;   // `[rows, banned]` int32, -1 pads
};

/// The largest vocabulary that find_nuclei serves.
constexpr int64_t kMaxVocab = 1 << 20;

/// 8-byte words of workspace, 16-byte aligned, that find_nuclei needs.
int64_t nucleus_workspace(int64_t rows, int64_t vocab);

/// The searches that rows belong to: of_row `[rows]` ascends, and `number` names none; `width`
/// places for each, of which it may take widths `[number]`, if given.
struct Groups {
  View of_row;
  int64_t number, width;
  View widths;
};

/// The nuclei of logits `[rows, vocab]` of any layout, at most kCounters rows, in one launch. A row
/// of no group takes no part, if groups are given: count 0, nothing of it is read. A row of bad
/// logits has count 0 too, and sets kLogitsFault; so has one with a bad top_p, and sets kTopPFault.
/// stats `[rows, 2]` contiguous, if given, gets each row's largest logit and its sum of e^(logit -
/// largest), in fp32; nonsense for a row of count 0.
void find_nuclei(const View& logits, const Limits& limits, const Groups& groups,
                 const NucleusLists& found, const View& stats, const Scratch& scratch,
                 const Launch& on);

/// What find_nuclei finds, as tensors: tokens, logits `[rows, vocab]`, counts `[rows]` and stats.
struct Nuclei {
  View tokens, logits, counts, stats;
};

/// find_nuclei for the op.
void nucleus(const View& logits, const Limits& limits, const Nuclei& found, const Scratch& scratch,
             const Launch& on);

/// Candidates in order, `[candidates]`: row `r` begins at offsets[r] `[rows + 1]`.
struct Candidates {
  View tokens, offsets;
};

/// What `nucleus` found, in order, and their probabilities `[candidates]`. `most` is the largest
/// count. All contiguous; the scratch is that of `nucleus`.
void sort_nuclei(const Nuclei& found, const Candidates& sorted, const View& probabilities,
                 int64_t most, const Scratch& scratch, const Launch& on);

/// hidden `[rows, size]`, weight `[vocab, size]` of any layout, bias and unseen (bool) `[vocab]` or
/// none.
struct RewardHead {
  View hidden, weight, bias, unseen;
  double unseen_reward;
};

/// Candidates and rewards (fp32) `[candidates]` contiguous.
void multifurcation_head(const RewardHead& head, const Candidates& candidates, const View& rewards,
                         const Launch& on);

/// The most rows and the widest beam that select_beam and multifurcate serve, and the most groups:
/// what fits shared memory and the counters.
constexpr int64_t kMaxRows = 4096, kMaxWidth = 4096, kMaxGroups = kCounters - 1;

/// Whether the shared memory of a block of the current device, with keys of such a beam and a table
/// of so many rows, is large enough: up to kMaxRows and kMaxWidth where a block may have 128 KB.
bool beam_fits(int64_t rows, int64_t width);

/// Bytes of workspace, 16-byte aligned, that select_beam needs on the current device.
int64_t select_beam_workspace(int64_t candidates, int64_t num_groups, int64_t width);

/// What was chosen, `[groups * width]` each, contiguous.
struct Beam {
  View parent, token, reward;
};

/// rewards and those of the beam in one dtype; everything contiguous but rewards. A width that is
/// not from 1 to the largest sets kWidthFault. Groups that do not ascend, or bad offsets, leave all
/// places empty.
void select_beam(const View& rewards, const Candidates& candidates, const Groups& groups,
                 const Beam& beam, const Scratch& scratch, const Launch& on);

/// Bytes of workspace, 16-byte aligned, that multifurcate needs on the current device.
int64_t multifurcate_workspace(int64_t rows, int64_t vocab, int64_t num_groups, int64_t width,
                               int64_t finished);

/// What children may take over: scores `[rows]`, by those that are end_tokens `[rows, end]` (-1
/// pads), and by all where everything is unseen. Of any layout; nothing where there are no scores.
struct Inherited {
  View scores, end_tokens;
};

/// Nodes that have ended and compete: scores of any layout, groups contiguous, or neither.
struct Finished {
  View scores, groups;
};

/// Two launches. Rewards of the beam in fp32, counts `[rows]`, all_unseen `[groups]` bool,
/// contiguous. What is said of find_nuclei and select_beam holds.
void multifurcate(const View& logits, const RewardHead& head, const Groups& groups,
                  const Limits& limits, const Inherited& inherited, const Finished& finished,
                  const Beam& beam, const View& counts, const View& all_unseen,
                  const Scratch& scratch, const Launch& on);

}  // namespace saffron::cuda
