// The CUDA bindings over kernels that run in the shim: Python takes the way to a device, device memory is the host's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ardlora/check.h"
#include "ardlora/unit_table.h"
#include "bindings/cuda.h"
#include "bindings/lora_adapter.h"
#include "cuda/launch.h"

namespace py = pybind11;

namespace ardlora::cuda {

bool built() { return true; }
std::string problem(int) { return ""; }

}  // namespace ardlora::cuda

PYBIND11_MODULE(simt_core, m) {
  using namespace ardlora;
  py::class_<UnitTable>(m, "UnitTable", py::module_local())
      .def(py::init([](int kind, int factoring, std::int64_t in_features, std::int64_t out_features,
                       std::vector<std::int64_t> ranks) {
        return UnitTable(static_cast<UnitKind>(kind), static_cast<Factoring>(factoring), in_features, out_features,
                         std::move(ranks));
      }))
      .def_property_readonly("units", [](const UnitTable& t) { return t.ranks().size(); })
      .def_property_readonly("unit_begin", &UnitTable::unit_begin)
      .def_property_readonly("hidden", &UnitTable::hidden)
      .def_property_readonly("gate_on_a", &UnitTable::gate_on_a)
      .def_property_readonly("a_rows", [](const UnitTable& t) { return t.a().rows; })
      .def_property_readonly("b_rows", [](const UnitTable& t) { return t.b().rows; });
  bind_lora_adapter(m);
  py::register_exception<Error>(m, "Error", PyExc_ValueError);
  bind_cuda(m);
}
