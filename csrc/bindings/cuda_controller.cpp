// The rank controllers' passes on a CUDA device. A table is `cuda_row_table`'s words in device memory.
#include <pybind11/stl.h>

#include "ardlora/check.h"
#include "bindings/cuda.h"
#include "cuda/launch.h"
#include "cuda/row_table.h"

namespace py = pybind11;

namespace ardlora {
namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cuda::DeviceRows device_rows(std::uintptr_t table, std::int64_t jobs, std::int64_t rows) {
  return {pointer<const std::int64_t>(table), jobs, rows};
}

cuda::Stream device_stream(int device, std::uintptr_t stream) { return {device, pointer<void>(stream)}; }

}  // namespace

void bind_cuda_controller(py::module_& m) {
  m.def(
      "cuda_row_table",
      [](const IndexArray& factors) {
        // factors [n, 7]: addresses of weight, grad, sensitivity and uncertainty (0: none), rows, columns, dtype
        ARDLORA_CHECK(factors.ndim() == 2 && factors.shape(1) == 7, "row_table: factors must be [n, 7]");
        const auto r = factors.unchecked<2>();
        std::vector<cuda::RowBuffers> buffers;
        for (py::ssize_t i = 0; i < r.shape(0); ++i) {
          const auto address = [&](py::ssize_t column) { return static_cast<std::uintptr_t>(r(i, column)); };
          buffers.push_back({pointer<const void>(address(0)), pointer<const void>(address(1)),
                             pointer<float>(address(2)), pointer<float>(address(3)), r(i, 4), r(i, 5),
                             dtype_from_code(static_cast<int>(r(i, 6)), "row_table")});
        }
        const cuda::RowTable table = cuda::row_table(buffers, "row_table");
        const py::array_t<std::int64_t> words(static_cast<py::ssize_t>(table.words.size()), table.words.data());
        return py::make_tuple(words, table.jobs, table.rows);
      },
      py::arg("factors"));
  m.def(
      "cuda_row_dots",
      [](std::uintptr_t table, std::int64_t jobs, std::int64_t rows, std::uintptr_t out, int device,
         std::uintptr_t stream) {
        cuda::row_dots(device_rows(table, jobs, rows), pointer<float>(out), device_stream(device, stream));
      },
      py::arg("table"), py::arg("jobs"), py::arg("rows"), py::arg("out"), py::arg("device"), py::arg("stream"));
  m.def(
      "cuda_importance",
      [](std::uintptr_t table, std::int64_t jobs, std::int64_t rows, double beta1, double beta2,
         std::uintptr_t workspace, std::uintptr_t score, int device, std::uintptr_t stream) {
        cuda::importance(device_rows(table, jobs, rows),
                         {beta1, beta2, pointer<float>(workspace), pointer<float>(score)},
                         device_stream(device, stream));
      },
      py::arg("table"), py::arg("jobs"), py::arg("rows"), py::arg("beta1"), py::arg("beta2"), py::arg("workspace"),
      py::arg("score"), py::arg("device"), py::arg("stream"));
  m.def(
      "cuda_set_gates",
      [](std::uintptr_t blocks, std::int64_t units, std::uintptr_t rho, int kind, double floor, double width,
         int device, std::uintptr_t stream) {
        // blocks [units, 2] int64: gate address, count
        ARDLORA_CHECK(kind >= 0 && kind <= 3, "set_gates: kind must be 0 to 3, got ", kind);
        cuda::set_gates(pointer<const GateBlock>(blocks), units, pointer<const double>(rho),
                        {static_cast<GateKind>(kind), floor, width}, device_stream(device, stream));
      },
      py::arg("blocks"), py::arg("units"), py::arg("rho"), py::arg("kind"), py::arg("floor"), py::arg("width"),
      py::arg("device"), py::arg("stream"));
}

}  // namespace ardlora
