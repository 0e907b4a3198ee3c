// One step of a search in two launches: nucleus.cu finds the nuclei, and this launch scores their
// members and selects (groups.cuh). Candidates are in no order within their row; the total
// order of a group is by reward, then row, then logit, then token id.
//
// A block scores its share of all candidates with a warp each, 16 bytes of the named row of the
// head a lane and all of 4 KB at once. Whether a group is all unseen every block of it finds out by
// itself: one seen candidate settles it, which is almost always among the first 512, and their
// loads are under way together with the rows of the head.
//
// Floor of this launch: the named rows of the head, once. 32 rows of 20 candidates of 2048 numbers
// in bf16 are 2.6 MB, 0.6 us at 4.3 TB/s. What it takes are dependent steps: launch 1, sizes and
// groups 0.6, tokens 0.4, rows of the head 1.0, keys out and arrival 1.2, keys in 0.5,
// selection 1.5, output 0.5; predicted 7 us on an H200, and with the 2 us of logits and launch 1
// about 13 us per step.

#include "cuda/beam/groups.cuh"
#include "cuda/beam/head_rows.cuh"
#include "cuda/common/launch.cuh"

namespace saffron::cuda {
namespace {

template <class HeadRows>
struct Step {
  Beams beams;
  NucleusLists candidates;
  HeadRows head;
  Numbers bias, scores;
  const uint8_t* unseen;
  int64_t unseen_stride, vocab;
  float unseen_reward;
  const int32_t* end_tokens;  // `[rows, num_end_tokens]`
  int64_t stride_end_row, stride_end;
  int num_end_tokens;
};

/// A candidate as it was found, with what is known of its token.
struct Member {
  int row, token;
  float logit;
  uint8_t unseen;
};

template <class HeadRows>
struct Members {
  const Step<HeadRows>& a;
  BlockScratch& scratch;
  const RowTable table;

  // Of the group the block is at.
  int begin = 0, end = 0;
  Member looked_at = {};
  bool settled = false, all_unseen = false;

  __device__ __forceinline__ int count(int row) const { return a.candidates.count[row]; }

  __device__ __forceinline__ Member member(int candidate) const {
    Member m = {};
    m.row = table.row_of(candidate);
    const int64_t at = m.row * a.vocab + (candidate - table.offset[m.row]);
    m.token = a.candidates.token[at];
    m.logit = a.candidates.logit[at];
    if (a.unseen != nullptr) m.unseen = a.unseen[m.token * a.unseen_stride];
    return m;
  }

  __device__ __forceinline__ bool is_end(const Member& m) const {
    const int32_t* ends = a.end_tokens + m.row * a.stride_end_row;
    bool found = false;
#pragma unroll 1
    for (int i = 0; i < a.num_end_tokens; ++i) found |= ends[i * a.stride_end] == m.token;
    return found;
  }

  __device__ __forceinline__ void open(int group_begin, int group_end) {
    begin = group_begin;
    end = group_end;
    settled = a.unseen == nullptr;
    all_unseen = false;
    if (!settled && begin + thread() < end) looked_at = member(begin + thread());
  }

  /// Whether the group has unseen candidates and, end tokens aside, no seen one.
  __device__ __forceinline__ void settle() {
    if (settled) return;
    settled = true;
    bool any_unseen = false;
#pragma unroll 1
    for (int first = begin; first < end; first += kBeamThreads) {
      const int i = first + thread();
      if (first > begin && i < end) looked_at = member(i);
      const bool counts = i < end && !is_end(looked_at);
      if (__syncthreads_or(counts && !looked_at.unseen)) return;
      any_unseen |= __syncthreads_or(counts && looked_at.unseen) != 0;
    }
    all_unseen = any_unseen;
  }

  __device__ __forceinline__ void collect(int first, int n, Key* to) {
    Member m = {};
    bool inherits = false;
    if (thread() < n) {
      m = member(first + thread());
      inherits = a.scores.given() && is_end(m);
      // With more candidates than warps it pays to know first whose row need not be read.
      const bool needless = n > kBeamWarps && (m.unseen || inherits);
      scratch.row[thread()] = m.row;
      scratch.token[thread()] = needless ? ~m.token : m.token;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread() / 32; i < n; i += kBeamWarps) {
      const int token = scratch.token[i];
      if (token < 0) continue;
      const float product = dot(a.head, scratch.row[i], token);
      if (thread() % 32 == 0) scratch.product[i] = product;
    }
    settle();
    __syncthreads();
    if (thread() < n) {
      const int row = scratch.row[thread()], found = scratch.token[thread()];
      const int token = found < 0 ? ~found : found;
      float reward = scratch.product[thread()];
      if (a.bias.given()) reward += a.bias.at(token);
      if (m.unseen) reward = a.unseen_reward;
      if (inherits || (all_unseen && a.scores.given())) reward = a.scores.at(row);
      to[thread()] = make_key(reward, row, entry(m.logit, token), a.beams.fault);
    }
  }

  __device__ __forceinline__ bool is_all_unseen() const { return all_unseen; }

  __device__ __forceinline__ int token(const Key& key) const { return token_of(key.place); }
};

template <class HeadRows>
__global__ void __launch_bounds__(kBeamThreads, 1) multifurcate_kernel(const Step<HeadRows> a) {
  auto& scratch = shared<BlockScratch>();
  Members<HeadRows> source{a, scratch, rows_of(scratch, a.beams)};
  select_beams(a.beams, source, scratch);
}

/// Where in the workspace, in bytes, what stands.
struct Workspace {
  int64_t token, logit, beams, bytes;

  Workspace(int64_t rows, int64_t vocab, int64_t num_groups, int64_t width, int64_t finished) {
    const int64_t list = (rows * vocab * 4 + 15) / 16 * 16;
    token = nucleus_workspace(rows, vocab) * 8;
    token = (token + 15) / 16 * 16;
    logit = token + list;
    beams = logit + list;
    bytes =
        beams + BeamWorkspace(device_properties().processors, num_groups, width, finished).bytes;
  }
};

}  // namespace

int64_t multifurcate_workspace(int64_t rows, int64_t vocab, int64_t num_groups, int64_t width,
                               int64_t finished) {
  return Workspace(rows, vocab, num_groups, width, finished).bytes;
}

void multifurcate(const View& logits, const RewardHead& head, const Groups& groups,
                  const Limits& limits, const Inherited& inherited, const Finished& finished,
                  const Beam& beam, const View& counts, const View& all_unseen,
                  const Scratch& scratch, const Launch& on) {
  const int64_t rows = logits.shape[0], vocab = logits.shape[1],
                num_finished = finished.scores.shape[0];
  const Workspace places(rows, vocab, groups.number, groups.width, num_finished);
  char* at = scratch.workspace.as<char>();
  const NucleusLists candidates{reinterpret_cast<int32_t*>(at + places.token),
                                reinterpret_cast<float*>(at + places.logit), counts.as<int32_t>()};
  find_nuclei(logits, limits, groups, candidates, View{}, scratch, on);
  if (groups.number == 0) return;
  const int64_t blocks = device_properties().processors;
  with_head_rows(head.hidden, head.weight, [&](auto head_rows) {
    Step<decltype(head_rows)> a = {};
    a.beams = beams(groups, beam, scratch, on);
    a.beams.all_unseen = all_unseen.as<bool>();
    a.beams.finished = static_cast<int>(num_finished);
    a.beams.finished_groups = finished.groups.as<int32_t>();
    a.beams.finished_scores = numbers(finished.scores);
    BeamWorkspace(blocks, groups.number, groups.width, num_finished)
        .lay_out(at + places.beams, a.beams);
    a.candidates = candidates;
    a.head = head_rows;
    a.bias = numbers(head.bias);
    a.scores = numbers(inherited.scores);
    a.unseen = head.unseen.as<uint8_t>();
    a.unseen_stride = head.unseen.stride[0];
    a.vocab = vocab;
    a.unseen_reward = static_cast<float>(head.unseen_reward);
    a.end_tokens = inherited.end_tokens.as<int32_t>();
    a.stride_end_row = inherited.end_tokens.stride[0];
    a.stride_end = inherited.end_tokens.stride[1];
    a.num_end_tokens = static_cast<int>(inherited.end_tokens.shape[1]);
    launch<multifurcate_kernel<decltype(head_rows)>>(dim3(static_cast<unsigned>(blocks)),
                                                     kBeamThreads, beam_shared(rows, groups.width),
                                                     on.stream, a);
  });
}

}  // namespace saffron::cuda
