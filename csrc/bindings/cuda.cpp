#include "bindings/cuda.h"

#include <pybind11/stl.h>

#include "ardlora/check.h"
#include "cuda/launch.h"
#include "cuda/resize_table.h"

namespace py = pybind11;

namespace ardlora {

std::vector<RowMove> row_moves(const IndexArray& moves) {
  ARDLORA_CHECK(moves.ndim() == 2 && moves.shape(1) == 5, "rank_resize: moves must be [n, 5]");
  const auto r = moves.unchecked<2>();
  std::vector<RowMove> out;
  out.reserve(static_cast<std::size_t>(r.shape(0)));
  for (py::ssize_t i = 0; i < r.shape(0); ++i) {
    out.push_back(
        {reinterpret_cast<const void*>(r(i, 0)), reinterpret_cast<void*>(r(i, 1)), r(i, 2), r(i, 3), r(i, 4)});
  }
  return out;
}

void bind_cuda(py::module_& m) {
  m.def("cuda_built", &cuda::built);
  m.def("cuda_problem", &cuda::problem, py::arg("device"));
  m.def("cuda_overlap_launches", &cuda::overlap_launches, py::arg("on"));
  m.def(
      "cuda_problem_of",
      [](int driver, int runtime, int capability, bool has_code) {
        return cuda::problem_of({driver, runtime, capability, has_code});
      },
      py::arg("driver"), py::arg("runtime"), py::arg("capability"), py::arg("has_code"));
  m.def(
      "cuda_resize_table",
      [](const IndexArray& moves, const std::vector<std::vector<std::int64_t>>& plans) {
        const cuda::ResizeTable table = cuda::resize_table(row_moves(moves), plans);
        const py::array_t<std::int64_t> words(static_cast<py::ssize_t>(table.words.size()), table.words.data());
        return py::make_tuple(words, table.jobs, table.blocks);
      },
      py::arg("moves"), py::arg("plans"));
  m.def(
      "cuda_rank_resize",
      [](std::uintptr_t table, std::int64_t jobs, std::int64_t blocks, int device, std::uintptr_t stream) {
        py::gil_scoped_release release;
        cuda::rank_resize(reinterpret_cast<const std::int64_t*>(table), jobs, blocks,
                          {device, reinterpret_cast<void*>(stream)});
      },
      py::arg("table"), py::arg("jobs"), py::arg("blocks"), py::arg("device"), py::arg("stream"));
  bind_cuda_controller(m);
  bind_cuda_lora(m);
}

}  // namespace ardlora
