#include "bindings/bench.h"

#include <pybind11/stl.h>

#include "bench/kernel_bench.h"
#include "bench/roofline.h"

namespace py = pybind11;

namespace ardlora {

void bind_bench(py::module_& m) {
  m.def(
      "bench_kernel",
      [](const UnitTable& table, const std::string& op, bool is_a, std::int64_t rows, int activation, int adapter,
         int threads, int repeats, double dropout, bool cold) {
        const bench::KernelCase c{op,
                                  is_a,
                                  rows,
                                  dtype_from_code(activation, "bench_kernel"),
                                  dtype_from_code(adapter, "bench_kernel"),
                                  dropout,
                                  threads,
                                  repeats,
                                  cold};
        bench::KernelTimes times;
        {
          py::gil_scoped_release release;
          times = bench::time_kernel(table, c);
        }
        py::dict out;
        out["seconds"] = times.seconds;
        out["flops"] = times.flops;
        out["read_bytes"] = times.read_bytes;
        out["update_bytes"] = times.update_bytes;
        return out;
      },
      py::arg("table"), py::arg("op"), py::arg("is_a"), py::arg("rows"), py::arg("activation"), py::arg("adapter"),
      py::arg("threads"), py::arg("repeats"), py::arg("dropout") = 0.0, py::arg("cold") = false);
  m.def(
      "bench_roofline",
      [](std::int64_t bytes, int threads) {
        bench::Roofline r;
        {
          py::gil_scoped_release release;
          r = bench::measure_roofline(bytes, threads);
        }
        py::dict out;
        out["read_gbs"] = r.read_gbs;
        out["update_gbs"] = r.update_gbs;
        out["float32_gflops"] = r.float32_gflops;
        out["bfloat16_gflops"] = r.bfloat16_gflops;
        return out;
      },
      py::arg("bytes"), py::arg("threads"));
}

}  // namespace ardlora
