// saffron_kernels._native.cpu: the ops of the CPU backend. A tensor arrives as the tuple (address,
// dtype code, shape, strides in elements), an absent one as None; saffron_kernels/backends/cpu.py
// makes them, allocates the outputs and keeps all of them alive. The GIL is not held.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/ops.h"
#include "cpu/simd/kernels.h"

namespace py = pybind11;

namespace pybind11::detail {

template <>
struct type_caster<saffron::cpu::Tensor> {
  PYBIND11_TYPE_CASTER(saffron::cpu::Tensor,
                       const_name("tuple[int, int, Sequence[int], Sequence[int]] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!isinstance<tuple>(source)) return false;
    const auto parts = reinterpret_borrow<tuple>(source);
    if (parts.size() != 4) return false;
    const auto shape = reinterpret_borrow<tuple>(parts[2]),
               strides = reinterpret_borrow<tuple>(parts[3]);
    if (shape.size() != strides.size() || shape.size() < 1 || shape.size() > 4) return false;
    value.data = reinterpret_cast<char*>(parts[0].cast<uintptr_t>());
    value.dtype = static_cast<saffron::cpu::DType>(parts[1].cast<int>());
    value.rank = static_cast<int>(shape.size());
    for (int i = 0; i < value.rank; ++i) {
      value.shape[i] = shape[i].cast<int64_t>();
      value.stride[i] = strides[i].cast<int64_t>();
    }
    return true;
  }
};

}  // namespace pybind11::detail

namespace saffron::cpu {
namespace {

template <class T>
py::array_t<T> numpy(std::vector<T>&& values) {
  auto* owned = new std::vector<T>(std::move(values));
  const py::capsule owner(owned, [](void* data) { delete static_cast<std::vector<T>*>(data); });
  return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

py::tuple run_nucleus(const Tensor& logits, const Tensor& top_p, const Tensor& banned,
                      int threads) {
  Candidates found;
  {
    const py::gil_scoped_release released;
    found = nucleus(logits, top_p, banned, {}, threads);
  }
  return py::make_tuple(numpy(std::move(found.tokens)), numpy(std::move(found.probabilities)),
                        numpy(std::move(found.offsets)));
}

void run_head(const Tensor& hidden, const Tensor& weight, const Tensor& bias, const Tensor& unseen,
              float unseen_reward, const Tensor& tokens, const Tensor& offsets,
              const Tensor& rewards, int threads) {
  multifurcation_head({hidden, weight, bias, unseen, unseen_reward}, tokens, offsets, rewards,
                      threads);
}

void run_select_beam(const Tensor& rewards, const Tensor& tokens, const Tensor& offsets,
                     const Tensor& groups, int64_t num_groups, int64_t width, const Tensor& widths,
                     const Tensor& parent, const Tensor& token, const Tensor& reward) {
  select_beam(rewards, tokens, offsets, groups, {num_groups, width, widths},
              {parent, token, reward});
}

void run_multifurcate(const Tensor& logits, const Tensor& hidden, const Tensor& weight,
                      const Tensor& bias, const Tensor& unseen, float unseen_reward,
                      const Tensor& groups, int64_t num_groups, int64_t width, const Tensor& widths,
                      const Tensor& top_p, const Tensor& banned, const Tensor& scores,
                      const Tensor& end_tokens, const Tensor& finished_scores,
                      const Tensor& finished_groups, const Tensor& parent, const Tensor& token,
                      const Tensor& reward, const Tensor& counts, const Tensor& all_unseen,
                      int threads) {
  const Search search{groups,     top_p,           banned,          scores,
                      end_tokens, finished_scores, finished_groups, {num_groups, width, widths}};
  multifurcate(logits, {hidden, weight, bias, unseen, unseen_reward}, search,
               {parent, token, reward}, counts, all_unseen, threads);
}

py::tuple run_block_plan(const Tensor& block_table, const Tensor& seq_lens,
                         const Tensor& query_start, int64_t block_size, int64_t queries,
                         int64_t most) {
  PagedPlan plan;
  {
    const py::gil_scoped_release released;
    plan = block_plan(block_table, seq_lens, query_start, block_size, queries, most);
  }
  return py::make_tuple(numpy(std::move(plan.order)), numpy(std::move(plan.slot)),
                        numpy(std::move(plan.begin)), numpy(std::move(plan.end)));
}

}  // namespace

void bind(py::module_& native) {
  py::module_ m = native.def_submodule("cpu", "The ops on the CPU.");
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("isa", [] { return kernels().name; }, "Instruction set in use.");
  m.def("append_kv", &append_kv, Unlocked());
  m.def("tree_attention", &tree_attention, Unlocked());
  m.def("merge_attention", &merge_attention, Unlocked());
  m.def("gather_kv", &gather_kv, Unlocked());
  m.def("nucleus", &run_nucleus);
  m.def("multifurcation_head", &run_head, Unlocked());
  m.def("select_beam", &run_select_beam, Unlocked());
  m.def("multifurcate", &run_multifurcate, Unlocked());
  m.def("advance_tree", &advance_tree, Unlocked());
  m.def("block_plan", &run_block_plan);
}

}  // namespace saffron::cpu
