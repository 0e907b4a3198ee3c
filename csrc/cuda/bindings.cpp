// saffron_kernels._cuda: the launchers of cuda/ops.h. A tensor arrives as the tuple (address,
// strides in elements); saffron_kernels/backends/cuda makes them, allocates the outputs and keeps
// all of them alive. Importing the module needs no driver: nothing here calls one before a launch.

#include <pybind11/pybind11.h>

#include "cuda/ops.h"

namespace py = pybind11;

namespace pybind11::detail {

template <>
struct type_caster<saffron::cuda::View> {
  PYBIND11_TYPE_CASTER(saffron::cuda::View, const_name("tuple[int, Sequence[int]] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!isinstance<tuple>(source)) return false;
    const auto parts = reinterpret_borrow<tuple>(source);
    if (parts.size() != 2) return false;
    const auto strides = reinterpret_borrow<tuple>(parts[1]);
    if (strides.size() > 4) return false;
    value.data = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
    for (size_t i = 0; i < strides.size(); ++i) value.stride[i] = strides[i].cast<int64_t>();
    return true;
  }
};

template <>
struct type_caster<saffron::cuda::Limits> {
  PYBIND11_TYPE_CASTER(saffron::cuda::Limits, const_name("tuple"));

  bool load(handle source, bool) {
    if (!isinstance<tuple>(source)) return false;
    const auto parts = reinterpret_borrow<tuple>(source);
    if (parts.size() != 5) return false;
    value.top_p = parts[0].cast<double>();
    value.top_ps = parts[1].cast<saffron::cuda::View>();
    value.wide = parts[2].cast<bool>();
    value.banned = parts[3].cast<saffron::cuda::View>();
    value.num_banned = parts[4].cast<int64_t>();
    return true;
  }
};

template <>
struct type_caster<saffron::cuda::DType> {
  PYBIND11_TYPE_CASTER(saffron::cuda::DType, const_name("int"));

  bool load(handle source, bool) {
    value = static_cast<saffron::cuda::DType>(source.cast<int>());
    return true;
  }
};

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
