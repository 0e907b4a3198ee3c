// saffron_kernels._native: the host trie; cpu/bindings.cpp adds the ops. Arrays are numpy's, 1-D;
// _native.pyi documents every name.
//
// The trie's calls keep the GIL: they last milliseconds at most, and the GIL is what makes a Trie
// safe to share between threads.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "trie/trie.h"

namespace py = pybind11;

namespace saffron::cpu {
void bind(py::module_& native);  // cpu/bindings.cpp
}

using saffron::Ints;
using saffron::Span;
using saffron::Trie;

namespace {

/// A 1-D array of exactly this element type, which is never converted in silence (strided ones are
/// copied).
template <class T>
class Array {
 public:
  Array(const py::object& given, const char* name) {
    if (!py::isinstance<py::array_t<T>>(given) ||
        py::reinterpret_borrow<py::array>(given).ndim() != 1) {
      refuse(given, name);
    }
    array_ = py::array_t<T, py::array::c_style>::ensure(given);
  }
  operator Span<T>() const { return {array_.data(), array_.size()}; }

 private:
  [[noreturn]] static void refuse(const py::object& given, const char* name) {
    py::str got = py::type::of(given).attr("__name__");
    if (py::isinstance<py::array>(given)) {
      got =
          py::str("an array of {} with shape {}").format(given.attr("dtype"), given.attr("shape"));
    }
    throw py::type_error(py::str("{} has to be a 1-D numpy array of {}, got {}")
                             .format(name, py::dtype::of<T>(), got));
  }

  py::array_t<T, py::array::c_style> array_;
};

/// Hands the vector over to numpy, which deletes it in the end.
template <class T>
py::array_t<T> numpy(std::vector<T>&& values) {
  auto* owned = new std::vector<T>(std::move(values));
  const py::capsule owner(owned, [](void* data) { delete static_cast<std::vector<T>*>(data); });
  return py::array_t<T>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

py::tuple insert(Trie& trie, const py::object& tokens, const py::object& offsets) {
  auto made = trie.insert(Array<int32_t>(tokens, "tokens"), Array<int64_t>(offsets, "offsets"));
  return py::make_tuple(numpy(std::move(made.leaves)), numpy(std::move(made.matched)),
                        numpy(std::move(made.created)));
}

py::tuple plan(Trie& trie, const py::object& queries) {
  auto plan = trie.plan(Array<int32_t>(queries, "queries"));
  return py::make_tuple(numpy(std::move(plan.order)), numpy(std::move(plan.slot)),
                        numpy(std::move(plan.begin)), numpy(std::move(plan.end)),
                        numpy(std::move(plan.depth)));
}

py::dict snapshot(const Trie& trie) {
  auto all = trie.snapshot();
  py::dict result;
  result["node"] = numpy(std::move(all.node));
  result["parent"] = numpy(std::move(all.parent));
  result["token"] = numpy(std::move(all.token));
  result["holds"] = numpy(std::move(all.holds));
  result["used"] = numpy(std::move(all.used));
  return result;
}

std::string repr(const Trie& trie) {
  return py::str("Trie(capacity={}, num_nodes={}, num_free={}, num_held={})")
      .format(trie.capacity(), trie.num_nodes(), trie.num_free(), trie.num_held());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native parts of saffron_kernels.";
  py::register_exception<saffron::CacheFullError>(m, "CacheFullError", PyExc_RuntimeError)
      .attr("__module__") = "saffron_kernels";

  using Object = const py::object&;
  py::class_<Trie>(m, "Trie")
      .def(py::init<int64_t>(), py::arg("capacity"))
      .def("__repr__", &repr)
      .def_property_readonly("capacity", &Trie::capacity)
      .def_property_readonly("num_nodes", &Trie::num_nodes)
      .def_property_readonly("num_free", &Trie::num_free)
      .def_property_readonly("num_held", &Trie::num_held)
      .def("grow", &Trie::grow, py::arg("capacity"))
      .def(
          "match",
          [](Trie& t, Object tokens) { return numpy(t.match(Array<int32_t>(tokens, "tokens"))); },
          py::arg("tokens"))
      .def("insert", &insert, py::arg("tokens"), py::arg("offsets"))
      .def(
          "extend",
          [](Trie& t, Object parents, Object tokens) {
            return numpy(
                t.extend(Array<int32_t>(parents, "parents"), Array<int32_t>(tokens, "tokens")));
          },
          py::arg("parents"), py::arg("tokens"))
      .def(
          "advance",
          [](Trie& t, Object nodes, Object parents, Object tokens) {
            return numpy(t.advance(Array<int32_t>(nodes, "nodes"),
                                   Array<int32_t>(parents, "parents"),
                                   Array<int32_t>(tokens, "tokens")));
          },
          py::arg("nodes"), py::arg("parents"), py::arg("tokens"))
      .def(
          "hold", [](Trie& t, Object nodes) { t.hold(Array<int32_t>(nodes, "nodes")); },
          py::arg("nodes"))
      .def(
          "release",
          [](Trie& t, Object nodes, bool discard) {
            t.release(Array<int32_t>(nodes, "nodes"), discard);
          },
          py::arg("nodes"), py::arg("discard") = false)
      .def("evict", &Trie::evict, py::arg("count"))
      .def("clear", [](Trie& t) { return t.evict(t.num_nodes()); })
      .def("plan", &plan, py::arg("queries"))
      .def(
          "path", [](const Trie& t, int32_t node) { return numpy(t.path(node)); }, py::arg("node"))
      .def(
          "tokens",
          [](const Trie& t, Object nodes) {
            return numpy(t.tokens(Array<int32_t>(nodes, "nodes")));
          },
          py::arg("nodes"))
      .def(
          "parents",
          [](const Trie& t, Object nodes) {
            return numpy(t.parents(Array<int32_t>(nodes, "nodes")));
          },
          py::arg("nodes"))
      .def("snapshot", &snapshot);

  saffron::cpu::bind(m);
}
