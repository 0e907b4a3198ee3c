// saffron_kernels._cuda: the launchers of cuda/ops.h. A tensor arrives as the tuple (address,
// strides in elements, dtype code, shape), a struct as the tuple of its fields;
// saffron_kernels/backends/cuda makes them, allocates the outputs and keeps all of them alive.
// Importing the module needs no driver: nothing here calls one before a launch.

#include <pybind11/pybind11.h>

#include <type_traits>

#include "cuda/ops.h"

namespace py = pybind11;

namespace pybind11::detail {

template <>
struct type_caster<saffron::cuda::DType> {
  PYBIND11_TYPE_CASTER(saffron::cuda::DType, const_name("int"));

  bool load(handle source, bool) {
    value = static_cast<saffron::cuda::DType>(source.cast<int>());
    return true;
  }
};

template <>
struct type_caster<saffron::cuda::View> {
  PYBIND11_TYPE_CASTER(saffron::cuda::View,
                       const_name("tuple[int, Sequence[int], int, Sequence[int]] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!isinstance<tuple>(source)) return false;
    const auto parts = reinterpret_borrow<tuple>(source);
    if (parts.size() != 4) return false;
    const auto strides = reinterpret_borrow<tuple>(parts[1]),
               shape = reinterpret_borrow<tuple>(parts[3]);
    if (strides.size() > 4 || shape.size() != strides.size()) return false;
    value.data = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
    value.dtype = parts[2].cast<saffron::cuda::DType>();
    for (size_t i = 0; i < strides.size(); ++i) {
      value.stride[i] = strides[i].cast<int64_t>();
      value.shape[i] = shape[i].cast<int64_t>();
    }
    return true;
  }
};

/// A struct from the tuple of these fields.
template <class Struct, auto... fields>
struct struct_caster {
  PYBIND11_TYPE_CASTER(Struct, const_name("tuple"));

  bool load(handle source, bool) {
    if (!isinstance<tuple>(source)) return false;
    const auto parts = reinterpret_borrow<tuple>(source);
    if (parts.size() != sizeof...(fields)) return false;
    size_t i = 0;
    ((value.*fields = parts[i++].template cast<std::decay_t<decltype(value.*fields)>>()), ...);
    return true;
  }
};

#define SAFFRON_STRUCT(Struct, ...) \
  template <>                       \
  struct type_caster<saffron::cuda::Struct> : struct_caster<saffron::cuda::Struct, __VA_ARGS__> {}

SAFFRON_STRUCT(Launch, &saffron::cuda::Launch::fault, &saffron::cuda::Launch::stream);
SAFFRON_STRUCT(Scratch, &saffron::cuda::Scratch::workspace, &saffron::cuda::Scratch::counters);
SAFFRON_STRUCT(KVCaches, &saffron::cuda::KVCaches::k, &saffron::cuda::KVCaches::v,
               &saffron::cuda::KVCaches::k_scale, &saffron::cuda::KVCaches::v_scale);
SAFFRON_STRUCT(Rotary, &saffron::cuda::Rotary::cos, &saffron::cuda::Rotary::sin);
SAFFRON_STRUCT(TriePlan, &saffron::cuda::TriePlan::slot, &saffron::cuda::TriePlan::begin,
               &saffron::cuda::TriePlan::end, &saffron::cuda::TriePlan::count);
SAFFRON_STRUCT(BlockTable, &saffron::cuda::BlockTable::blocks, &saffron::cuda::BlockTable::lens,
               &saffron::cuda::BlockTable::start, &saffron::cuda::BlockTable::block_size);
SAFFRON_STRUCT(Scoring, &saffron::cuda::Scoring::scale, &saffron::cuda::Scoring::softcap,
               &saffron::cuda::Scoring::sinks);
SAFFRON_STRUCT(Attended, &saffron::cuda::Attended::out, &saffron::cuda::Attended::lse);
SAFFRON_STRUCT(Limits, &saffron::cuda::Limits::top_p, &saffron::cuda::Limits::top_ps,
               &saffron::cuda::Limits::banned);
SAFFRON_STRUCT(Groups, &saffron::cuda::Groups::of_row, &saffron::cuda::Groups::number,
               &saffron::cuda::Groups::width, &saffron::cuda::Groups::widths);
SAFFRON_STRUCT(Nuclei, &saffron::cuda::Nuclei::tokens, &saffron::cuda::Nuclei::logits,
               &saffron::cuda::Nuclei::counts, &saffron::cuda::Nuclei::stats);
SAFFRON_STRUCT(Candidates, &saffron::cuda::Candidates::tokens, &saffron::cuda::Candidates::offsets);
SAFFRON_STRUCT(RewardHead, &saffron::cuda::RewardHead::hidden, &saffron::cuda::RewardHead::weight,
               &saffron::cuda::RewardHead::bias, &saffron::cuda::RewardHead::unseen,
               &saffron::cuda::RewardHead::unseen_reward);
SAFFRON_STRUCT(Beam, &saffron::cuda::Beam::parent, &saffron::cuda::Beam::token,
               &saffron::cuda::Beam::reward);
SAFFRON_STRUCT(Inherited, &saffron::cuda::Inherited::scores, &saffron::cuda::Inherited::end_tokens);
SAFFRON_STRUCT(Finished, &saffron::cuda::Finished::scores, &saffron::cuda::Finished::groups);

}  // namespace pybind11::detail

PYBIND11_MODULE(_cuda, m) {
  using namespace saffron::cuda;
  m.doc() = "The ops on a CUDA device.";
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("append_kv", &append_kv, Unlocked());
  m.def("gather_kv", &gather_kv, Unlocked());
  m.attr("MAX_HEAD_DIM") = kMaxHeadDim;
  m.attr("COUNTERS") = kCounters;
  m.def("tree_attention_workspace", &tree_attention_workspace);
  m.def("tree_attention_path", &tree_attention_path);
  m.def("tree_attention", &tree_attention, Unlocked());
  m.def("capture_id", &capture_id);
  m.def("merge_attention", &merge_attention, Unlocked());
  m.def("advance_tree", &advance_tree, Unlocked());
  m.def("block_plan_workspace", &block_plan_workspace);
  m.def("sort_pages", &sort_pages, Unlocked());
  m.def("block_plan", &block_plan, Unlocked());
  m.attr("MAX_VOCAB") = kMaxVocab;
  m.def("nucleus_workspace", &nucleus_workspace);
  m.def("nucleus", &nucleus, Unlocked());
  m.def("sort_nuclei", &sort_nuclei, Unlocked());
  m.def("multifurcation_head", &multifurcation_head, Unlocked());
  m.attr("MAX_ROWS") = kMaxRows;
  m.attr("MAX_WIDTH") = kMaxWidth;
  m.attr("MAX_GROUPS") = kMaxGroups;
  m.def("beam_fits", &beam_fits);
  m.def("select_beam_workspace", &select_beam_workspace);
  m.def("select_beam", &select_beam, Unlocked());
  m.def("multifurcate_workspace", &multifurcate_workspace);
  m.def("multifurcate", &multifurcate, Unlocked());
}
