// One step of a search in two launches: nucleus.cu finds the nuclei, and this launch scores their
// members and selects (groups.cuh). Candidates are in no order within their row; the total
// order of a group is by reward, then row, then logit, then token id.
//
// A block scores its share of all candidates with a warp each, 16 bytes of the named row of the
// head a lane and all of 4 KB at once. Whether a group is blind every block of it finds out by
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
  Candidates candidates;
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
  Desk& desk;
  const RowTable table;

  // Of the group the block is at.
  int begin = 0, end = 0;
  Member looked_at = {};
  bool settled = false, blind = false;

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
    blind = false;
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
    blind = any_unseen;
  }

  __device__ __forceinline__ void collect(int first, int n, Key* to) {
    Member m = {};
    bool inherits = false;
    if (thread() < n) {
      m = member(first + thread());
      inherits = a.scores.given() && is_end(m);
      // With more candidates than warps it pays to know first whose row need not be read.
      const bool needless = n > kBeamWarps && (m.unseen || inherits);
      desk.row[thread()] = m.row;
      desk.token[thread()] = needless ? ~m.token : m.token;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread() / 32; i < n; i += kBeamWarps) {
      const int token = desk.token[i];
      if (token < 0) continue;
      const float product = dot(a.head, desk.row[i], token);
      if (thread() % 32 == 0) desk.product[i] = product;
    }
    settle();
    __syncthreads();
    if (thread() < n) {
      const int row = desk.row[thread()], found = desk.token[thread()];
      const int token = found < 0 ? ~found : found;
      float reward = desk.product[thread()];
      if (a.bias.given()) reward += a.bias.at(token);
      if (m.unseen) reward = a.unseen_reward;
      if (inherits || (blind && a.scores.given())) reward = a.scores.at(row);
      to[thread()] = make_key(reward, row, entry(m.logit, token), a.beams.fault);
    }
  }

  __device__ __forceinline__ bool is_blind() const { return blind; }

  __device__ __forceinline__ int token(const Key& key) const { return token_of(key.place); }
};

template <class HeadRows>
__global__ void __launch_bounds__(kBeamThreads, 1) multifurcate_kernel(const Step<HeadRows> a) {
  auto& desk = shared<Desk>();
  Members<HeadRows> source{a, desk, rows_of(desk, a.beams)};
  select_beams(a.beams, source, desk);
}

/// Where in the workspace, in bytes, what stands.
struct Workspace {
  int64_t token, logit, beams, bytes;

  Workspace(int64_t rows, int64_t vocab, int64_t num_groups, int64_t width, int64_t carried) {
    const int64_t list = (rows * vocab * 4 + 15) / 16 * 16;
    token = nucleus_workspace(rows, vocab) * 8;
    token = (token + 15) / 16 * 16;
    logit = token + list;
    beams = logit + list;
    bytes = beams + BeamWorkspace(chip().processors, num_groups, width, carried).bytes;
  }
};

}  // namespace

int64_t multifurcate_workspace(int64_t rows, int64_t vocab, int64_t num_groups, int64_t width,
                               int64_t carried) {
  return Workspace(rows, vocab, num_groups, width, carried).bytes;
}

void multifurcate(const View& logits, DType logits_dtype, const View& hidden, const View& weight,
                  DType dtype, const View& bias, DType bias_dtype, const View& unseen,
                  double unseen_reward, const View& groups, const View& widths,
                  const Limits& limits, const View& scores, DType scores_dtype,
                  const View& end_tokens, const View& carried_scores, DType carried_dtype,
                  const View& carried_groups, const View& parent, const View& token,
                  const View& reward, const View& counts, const View& blind, const View& workspace,
                  const View& counters, int64_t rows, int64_t vocab, int64_t size,
                  int64_t num_groups, int64_t width, int64_t num_end_tokens, int64_t carried,
                  const View& fault, Stream stream) {
  const Workspace places(rows, vocab, num_groups, width, carried);
  char* at = workspace.as<char>();
  const Candidates candidates{reinterpret_cast<int32_t*>(at + places.token),
                              reinterpret_cast<float*>(at + places.logit), counts.as<int32_t>()};
  find_nuclei(logits, limits, groups, num_groups, candidates, View{}, workspace, counters, rows,
              vocab, logits_dtype, fault, stream);
  if (num_groups == 0) return;
  const int64_t blocks = chip().processors;
  with_head_rows(hidden, weight, size, dtype, [&](auto head) {
    Step<decltype(head)> a = {};
    a.beams = beams(groups, widths, rows, num_groups, width, counters, parent, token, reward,
                    DType::kFloat32, fault);
    a.beams.blind = blind.as<bool>();
    a.beams.carried = static_cast<int>(carried);
    a.beams.carried_groups = carried_groups.as<int32_t>();
    a.beams.carried_scores = numbers(carried_scores, carried_dtype);
    BeamWorkspace(blocks, num_groups, width, carried).lay_out(at + places.beams, a.beams);
    a.candidates = candidates;
    a.head = head;
    a.bias = numbers(bias, bias_dtype);
    a.scores = numbers(scores, scores_dtype);
    a.unseen = unseen.as<uint8_t>();
    a.unseen_stride = unseen.stride[0];
    a.vocab = vocab;
    a.unseen_reward = static_cast<float>(unseen_reward);
    a.end_tokens = end_tokens.as<int32_t>();
    a.stride_end_row = end_tokens.stride[0];
    a.stride_end = end_tokens.stride[1];
    a.num_end_tokens = static_cast<int>(num_end_tokens);
    launch<multifurcate_kernel<decltype(head)>>(dim3(static_cast<unsigned>(blocks)), kBeamThreads,
                                                beam_shared(rows, width), stream, a);
  });
}

}  // namespace saffron::cuda
