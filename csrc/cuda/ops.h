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
// Besides its file a new op needs a declaration here, a line in bindings.cpp, a function in
// saffron_kernels/backends/cuda, and launches of all its kernels in CASES of
// tests/support/cuda_report.py. The tests of the op in tests/ops/test_<op>.py then run it as they
// are.

#include <cstddef>
#include <cstdint>

namespace saffron::cuda {

using Stream = uintptr_t;  // a cudaStream_t

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat8 = 3 };  // e4m3

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

/// A tensor of at most four dimensions in device memory; strides count elements.
struct View {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};

  bool given() const { return data != nullptr; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

/// k, v `[tokens, kv_heads, head_dim]` in fp32, bf16 or fp16, slots `[tokens]`, caches `[num_slots,
/// kv_heads, head_dim]` in the same dtype or fp8. cos, sin `[tokens, rotated]`, if given, in fp32,
/// bf16 or fp16. k_scale, v_scale `[kv_heads]` fp32 contiguous, if given, for fp8 caches alone.
void append_kv(const View& k, const View& v, const View& slots, const View& k_cache,
               const View& v_cache, const View& cos, const View& sin, const View& k_scale,
               const View& v_scale, int64_t tokens, int64_t kv_heads, int64_t head_dim,
               int64_t v_dim, int64_t rotated, int64_t num_slots, DType dtype, DType stored,
               DType turn, const View& fault, Stream stream);

/// slots `[sequences, length]`; k, v `[sequences, kv_heads, length, head_dim]`, contiguous.
void gather_kv(const View& k_cache, const View& v_cache, const View& slots, const View& k,
               const View& v, int64_t sequences, int64_t length, int64_t kv_heads, int64_t head_dim,
               int64_t v_dim, int64_t num_slots, DType dtype, const View& fault, Stream stream);

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

/// q `[queries, heads, head_dim]` in `dtype`, bf16 or fp16, and caches `[num_slots, kv_heads,
/// head_dim]` and `[num_slots, kv_heads, v_dim]` in `stored`, the same or
/// fp8, whose rows begin at multiples of 16 bytes and are a multiple of that long, their last
/// dimension contiguous; slot, begin, end `[tokens]` contiguous. out and lse contiguous. `count`,
/// if given, holds on the device how many of the tokens there are; `tokens` is then the most there
/// can be. k_scale, v_scale `[kv_heads]` fp32 contiguous, if given, for fp8 caches alone; sinks
/// `[heads]` fp32 contiguous, if given. `softcap` counts if `capped`.
///
/// `counters` holds kCounters zeros and is left so; launches that share it must not overlap.
void tree_attention(const View& q, const View& k_cache, const View& v_cache, const View& slot,
                    const View& begin, const View& end, const View& count, const View& k_scale,
                    const View& v_scale, const View& sinks, double scale, bool capped,
                    double softcap, const View& out, const View& lse, const View& workspace,
                    const View& counters, int64_t queries, int64_t heads, int64_t kv_heads,
                    int64_t head_dim, int64_t v_dim, int64_t tokens, int64_t num_slots, DType dtype,
                    DType stored, const View& fault, Stream stream);

/// Identifies the graph that `stream` is being captured into; 0 if it is not being captured.
uint64_t capture_id(Stream stream);

/// Inputs `[queries, heads, head_dim]` and, fp32, `[queries, heads]`; outputs contiguous.
void merge_attention(const View& out_a, const View& lse_a, const View& out_b, const View& lse_b,
                     const View& out, const View& lse, int64_t queries, int64_t heads,
                     int64_t head_dim, DType dtype, Stream stream);

/// slot, begin, end `[tokens]`, parents, new_slots `[fresh]`, outputs `[tokens + fresh]`; all of
/// them contiguous. `count`, if given, holds on the device how many of the tokens there are; the
/// outputs are then `[tokens]`.
void advance_tree(const View& slot, const View& begin, const View& end, const View& parents,
                  const View& new_slots, const View& count, const View& out_slot,
                  const View& out_begin, const View& out_end, int64_t tokens, int64_t fresh,
                  int64_t queries, const View& fault, Stream stream);

/// How many int64 of workspace a plan of a paged cache needs.
int64_t block_plan_workspace(int64_t requests);

/// The first half of block_plan, some launches: requests in their order, where the queries and the
/// tokens of each begin, to `laid`, which is the workspace; and to count `[1]` how many tokens the
/// plan has. table `[requests, columns]`, lens `[requests]`, start `[requests + 1]` of any layout.
/// What is wrong with them, or more than `size` tokens, sets kPagesFault and makes count 0.
void sort_pages(const View& table, const View& lens, const View& start, const View& laid,
                const View& count, int64_t requests, int64_t columns, int64_t block_size,
                int64_t queries, int64_t size, const View& fault, Stream stream);

/// The second half, one launch: order `[queries]`; slot, begin, end `[size]`, contiguous. A token
/// of a block that cannot be is left out, and sets kPagesFault.
void block_plan(const View& table, const View& lens, const View& start, const View& laid,
                const View& count, const View& order, const View& slot, const View& begin,
                const View& end, int64_t requests, int64_t columns, int64_t block_size,
                int64_t queries, int64_t size, const View& fault, Stream stream);

/// Candidates of rows, in device memory: row `r` owns entries `r * vocab` to `r * vocab +
/// count[r]`, in no particular order. By probability they stand in order of logit descending, then
/// token ascending; entry() of cuda/common/entries.cuh makes one integer of the two. -0.0 comes as
/// 0.0.
struct Candidates {
  int32_t* token;  // [rows, vocab]
  float* logit;    // [rows, vocab]
  int32_t* count;  // [rows]
};

/// How many of the most probable tokens are in the nucleus of a row, and which can never be.
/// Everything may be strided; rows may share theirs (a stride of 0).
struct Limits {
  double top_p;  // of all rows,
  View top_ps;   // or, if given, `[rows]` of each, in fp32 or
  bool wide;     // fp64
  View banned;   // `[rows, num_banned]` int32, -1 pads
  int64_t num_banned;
};

/// The largest vocabulary that find_nuclei serves.
constexpr int64_t kMaxVocab = 1 << 20;

/// 8-byte words of workspace, 16-byte aligned, that find_nuclei needs.
int64_t nucleus_workspace(int64_t rows, int64_t vocab);

/// The nuclei of logits `[rows, vocab]` of any layout, at most kCounters rows, in one launch.
/// groups
/// `[rows]`, if given: a row whose group is not from 0 to `num_groups - 1` takes no part: count 0,
/// nothing of it is read. A row of bad logits has count 0 too, and sets kLogitsFault; so has one
/// with a bad top_p, and sets kTopPFault. stats `[rows, 2]` contiguous, if given, gets each row's
/// largest logit and its sum of e^(logit - largest), in fp32; nonsense for a row of count 0.
///
/// `counters` as for tree_attention.
void find_nuclei(const View& logits, const Limits& limits, const View& groups, int64_t num_groups,
                 const Candidates& found, const View& stats, const View& workspace,
                 const View& counters, int64_t rows, int64_t vocab, DType dtype, const View& fault,
                 Stream stream);

/// find_nuclei for the op: tokens, values `[rows, vocab]` and counts `[rows]`, contiguous.
void nucleus(const View& logits, const Limits& limits, const View& tokens, const View& values,
             const View& counts, const View& stats, const View& workspace, const View& counters,
             int64_t rows, int64_t vocab, DType dtype, const View& fault, Stream stream);

/// What `nucleus` found, in order: tokens and probabilities `[candidates]`, where row `r` begins at
/// offsets[r]. `most` is the largest count. All contiguous; the workspace is that of `nucleus`.
void sort_nuclei(const View& tokens, const View& values, const View& counts, const View& stats,
                 const View& workspace, const View& offsets, const View& out_tokens,
                 const View& out_probabilities, int64_t rows, int64_t vocab, int64_t most,
                 Stream stream);

/// hidden `[rows, size]`, weight `[vocab, size]` of any layout, bias and unseen (bool) `[vocab]` or
/// none; tokens, rewards (fp32) `[candidates]` and offsets `[rows + 1]` contiguous.
void multifurcation_head(const View& hidden, const View& weight, const View& bias, DType bias_dtype,
                         const View& unseen, double unseen_reward, const View& tokens,
                         const View& offsets, const View& rewards, int64_t rows, int64_t vocab,
                         int64_t size, int64_t candidates, DType dtype, const View& fault,
                         Stream stream);

/// The most rows and the widest beam that select_beam and multifurcate serve, and the most groups:
/// what fits shared memory and the counters.
constexpr int64_t kMaxRows = 4096, kMaxWidth = 4096, kMaxGroups = kCounters - 1;

/// Whether the shared memory of a block of the current device, with keys of such a beam and a table
/// of so many rows, is large enough: up to kMaxRows and kMaxWidth where a block may have 128 KB.
bool beam_fits(int64_t rows, int64_t width);

/// Bytes of workspace, 16-byte aligned, that select_beam needs on the current device.
int64_t select_beam_workspace(int64_t candidates, int64_t num_groups, int64_t width);

/// rewards, reward in `dtype`; everything contiguous but rewards. widths `[num_groups]`, if given:
/// one that is not from 1 to `width` sets kWidthFault. Groups that do not ascend, or bad offsets,
/// leave all places empty. `counters` as for tree_attention.
void select_beam(const View& rewards, const View& tokens, const View& offsets, const View& groups,
                 const View& widths, const View& parent, const View& token, const View& reward,
                 const View& workspace, const View& counters, int64_t rows, int64_t candidates,
                 int64_t num_groups, int64_t width, DType dtype, const View& fault, Stream stream);

/// Bytes of workspace, 16-byte aligned, that multifurcate needs on the current device.
int64_t multifurcate_workspace(int64_t rows, int64_t vocab, int64_t num_groups, int64_t width,
                               int64_t carried);

/// Two launches. logits, hidden, weight, bias, unseen, scores, end_tokens `[rows, num_end_tokens]`
/// and carried_scores of any layout; groups, widths, carried_groups and outputs contiguous; none
/// where there is nothing. reward in fp32. What is said of find_nuclei and select_beam holds.
void multifurcate(const View& logits, DType logits_dtype, const View& hidden, const View& weight,
                  DType dtype, const View& bias, DType bias_dtype, const View& unseen,
                  double unseen_reward, const View& groups, const View& widths,
                  const Limits& limits, const View& scores, DType scores_dtype,
                  const View& end_tokens, const View& carried_scores, DType carried_dtype,
                  const View& carried_groups, const View& parent, const View& token,
                  const View& reward, const View& counts, const View& blind, const View& workspace,
                  const View& counters, int64_t rows, int64_t vocab, int64_t size,
                  int64_t num_groups, int64_t width, int64_t num_end_tokens, int64_t carried,
                  const View& fault, Stream stream);

}  // namespace saffron::cuda
