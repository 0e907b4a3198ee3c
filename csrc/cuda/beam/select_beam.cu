// The best `width` candidates of every group of rows, given their rewards: groups.cuh, with
// keys made of what is in memory.
//
// Floor: 8 bytes per candidate, nothing for thousands. Predicted 4 us on an H200 for one search of
// 640 candidates: a launch, the rows, the candidates, four digits of a radix selection.

#include "cuda/beam/groups.cuh"
#include "cuda/common/launch.cuh"

namespace saffron::cuda {
namespace {

constexpr int64_t kOfBlock = 2 * kBeamThreads;  // candidates: for fewer another block does not pay

struct Given {
  Beams beams;
  Numbers rewards;
  const int32_t *tokens, *offsets;
  int candidates;
};

struct GivenRewards {
  const Given& given;
  const RowTable table;

  __device__ __forceinline__ int count(int row) const {
    const int begin = given.offsets[row], end = given.offsets[row + 1];
    const bool first = row > 0 || begin == 0;
    const bool last = row + 1 < given.beams.rows || end == given.candidates;
    return first && last && begin >= 0 && end <= given.candidates ? max(end - begin, -1) : -1;
  }

  __device__ __forceinline__ void open(int, int) {}

  __device__ __forceinline__ void collect(int first, int n, Key* to) {
    if (thread() >= n) return;
    const int i = first + thread();
    to[thread()] = make_key(given.rewards.at(i), table.row_of(i), static_cast<Entry>(i) << 32,
                            given.beams.fault);
  }

  __device__ __forceinline__ bool is_all_unseen() const { return false; }

  __device__ __forceinline__ int token(const Key& key) const {
    return given.tokens[key.place >> 32];
  }
};

__global__ void __launch_bounds__(kBeamThreads, 1) select_kernel(const Given a) {
  auto& scratch = shared<BlockScratch>();
  GivenRewards source{a, rows_of(scratch, a.beams)};
  select_beams(a.beams, source, scratch);
}

int64_t blocks_of(int64_t candidates) {
  return std::clamp<int64_t>((candidates + kOfBlock - 1) / kOfBlock, 1,
                             device_properties().processors);
}

}  // namespace

bool beam_fits(int64_t rows, int64_t width) {
  return beam_shared(rows, width) <= device_properties().block_bytes;
}

int64_t select_beam_workspace(int64_t candidates, int64_t num_groups, int64_t width) {
  return BeamWorkspace(blocks_of(candidates), num_groups, width, 0).bytes;
}

void select_beam(const View& rewards, const Candidates& candidates, const Groups& groups,
                 const Beam& beam, const Scratch& scratch, const Launch& on) {
  if (groups.number == 0) return;
  const int64_t count = rewards.shape[0], blocks = blocks_of(count);
  Given a = {};
  a.beams = beams(groups, beam, scratch, on);
  BeamWorkspace(blocks, groups.number, groups.width, 0)
      .lay_out(scratch.workspace.as<char>(), a.beams);
  a.rewards = numbers(rewards);
  a.tokens = candidates.tokens.as<int32_t>();
  a.offsets = candidates.offsets.as<int32_t>();
  a.candidates = static_cast<int>(count);
  launch<select_kernel>(dim3(static_cast<unsigned>(blocks)), kBeamThreads,
                        beam_shared(groups.of_row.shape[0], groups.width), on.stream, a);
}

}  // namespace saffron::cuda
