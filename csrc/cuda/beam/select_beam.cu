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

  __device__ __forceinline__ bool is_blind() const { return false; }

  __device__ __forceinline__ int token(const Key& key) const {
    return given.tokens[key.place >> 32];
  }
};

__global__ void __launch_bounds__(kBeamThreads, 1) select_kernel(const Given a) {
  auto& desk = shared<Desk>();
  GivenRewards source{a, rows_of(desk, a.beams)};
  select_beams(a.beams, source, desk);
}

int64_t blocks_of(int64_t candidates) {
  return std::clamp<int64_t>((candidates + kOfBlock - 1) / kOfBlock, 1, chip().processors);
}

}  // namespace

bool beam_fits(int64_t rows, int64_t width) {
  return beam_shared(rows, width) <= chip().block_bytes;
}

int64_t select_beam_workspace(int64_t candidates, int64_t num_groups, int64_t width) {
  return BeamWorkspace(blocks_of(candidates), num_groups, width, 0).bytes;
}

void select_beam(const View& rewards, const View& tokens, const View& offsets, const View& groups,
                 const View& widths, const View& parent, const View& token, const View& reward,
                 const View& workspace, const View& counters, int64_t rows, int64_t candidates,
                 int64_t num_groups, int64_t width, DType dtype, const View& fault, Stream stream) {
  if (num_groups == 0) return;
  const int64_t blocks = blocks_of(candidates);
  Given a = {};
  a.beams =
      beams(groups, widths, rows, num_groups, width, counters, parent, token, reward, dtype, fault);
  BeamWorkspace(blocks, num_groups, width, 0).lay_out(workspace.as<char>(), a.beams);
  a.rewards = numbers(rewards, dtype);
  a.tokens = tokens.as<int32_t>();
  a.offsets = offsets.as<int32_t>();
  a.candidates = static_cast<int>(candidates);
  launch<select_kernel>(dim3(static_cast<unsigned>(blocks)), kBeamThreads, beam_shared(rows, width),
                        stream, a);
}

}  // namespace saffron::cuda
