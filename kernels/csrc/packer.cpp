// Python module megafuse.kernels._C. The algorithms are in packing.hpp, balance.hpp and cost.hpp, the documentation in
// ../packing.py. Arguments are copied while the GIL is held: another thread may write to an array after its release.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "balance.hpp"
#include "cost.hpp"

namespace py = pybind11;

namespace {

using namespace megafuse;
using IntArray = py::array_t<int64_t, py::array::c_style>;
using FloatArray = py::array_t<double, py::array::c_style>;

template <class T>
std::vector<T> copy_1d(const py::array_t<T, py::array::c_style>& array, const char* name) {
  if (array.ndim() != 1)
    throw DataError(std::string(name) + " has " + std::to_string(array.ndim()) + " dimensions; fix: give a flat array");
  return std::vector<T>(array.data(), array.data() + array.size());
}

template <class T>
py::array_t<T> to_array(std::vector<T>&& values) {  // without a copy: the array owns the vector
  auto* owner = new std::vector<T>(std::move(values));
  py::capsule release(owner, [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(static_cast<py::ssize_t>(owner->size()), owner->data(), release);
}

py::list to_list(const Rows& rows) {
  py::list result(rows.size());
  for (size_t r = 0; r < rows.size(); ++r)
    result[r] = py::array_t<int64_t>(static_cast<py::ssize_t>(rows[r].size()), rows[r].data());
  return result;
}

py::list py_pack_rows(const IntArray& tokens, int64_t budget) {
  const Ints t = copy_1d(tokens, "tokens");
  Rows rows;
  {
    py::gil_scoped_release release;
    rows = pack_rows(t, budget);
  }
  return to_list(rows);
}

py::list py_pack_batch(const IntArray& tokens, const FloatArray& cost, int64_t budget, int64_t ranks) {
  const Ints t = copy_1d(tokens, "tokens");
  const std::vector<double> c = copy_1d(cost, "cost");
  Plan plan;
  {
    py::gil_scoped_release release;
    plan = pack_batch(t, c, budget, ranks);
  }
  py::list result(plan.size());
  for (size_t rank = 0; rank < plan.size(); ++rank) result[rank] = to_list(plan[rank]);
  return result;
}

struct Lengths {
  Ints prompt, response, offsets;
  Lengths(const IntArray& p, const IntArray& r, const IntArray& o)
      : prompt(copy_1d(p, "prompt_lengths")), response(copy_1d(r, "response_lengths")), offsets(copy_1d(o, "offsets")) {}
};

py::array_t<int64_t> py_group_tokens(const IntArray& p, const IntArray& r, const IntArray& o, bool prefix_sharing) {
  const Lengths in(p, r, o);
  Ints out;
  {
    py::gil_scoped_release release;
    out = group_tokens(in.prompt, in.response, in.offsets, prefix_sharing);
  }
  return to_array(std::move(out));
}

py::array_t<double> py_group_cost(const IntArray& p, const IntArray& r, const IntArray& o, double linear_cost,
                                  double attention_cost, bool prefix_sharing) {
  const Lengths in(p, r, o);
  std::vector<double> out;
  {
    py::gil_scoped_release release;
    out = group_cost(in.prompt, in.response, in.offsets, linear_cost, attention_cost, prefix_sharing);
  }
  return to_array(std::move(out));
}

void raise_megafuse(const char* name, const char* message) {
  py::set_error(py::module_::import("megafuse.errors").attr(name), message);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Group packing in C++; use it through megafuse.kernels.packing.";
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const DataError& e) {
      raise_megafuse("DataError", e.what());
    } catch (const ConfigError& e) {
      raise_megafuse("ConfigError", e.what());
    }
  });
  using py::arg;
  // noconvert: packing.py converts and checks; a silent cast of floats to int64 would lose what they say.
  m.def("pack_rows", &py_pack_rows, arg("tokens").noconvert(), arg("budget"));
  m.def("pack_batch", &py_pack_batch, arg("tokens").noconvert(), arg("cost").noconvert(), arg("budget"), arg("ranks"));
  m.def("group_tokens", &py_group_tokens, arg("prompt_lengths").noconvert(), arg("response_lengths").noconvert(),
        arg("offsets").noconvert(), arg("prefix_sharing"));
  m.def("group_cost", &py_group_cost, arg("prompt_lengths").noconvert(), arg("response_lengths").noconvert(),
        arg("offsets").noconvert(), arg("linear_cost"), arg("attention_cost"), arg("prefix_sharing"));
}
