// An adapter as the calls of a layer take it, made once for as long as buffers, gates and ranks stay where they are,
// and what one call adds. Addresses come as integers; h, dh, y and dx are contiguous.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "ardlora/lora_linear.h"
#include "bindings/matrix_arg.h"

namespace ardlora {

using RowsArg = std::tuple<std::uintptr_t, std::int64_t, std::int64_t>;  // address, columns, row stride

struct LoraAdapter {
  const UnitTable* table;
  MatrixView lora_A, lora_B;
  const float* gate;
  float scaling;

  LoraParams params(const MatrixView& x, const MatrixView& h, int threads, const Dropout& dropout) const {
    return {table, x, lora_A, lora_B, gate, scaling, h, threads, dropout};
  }
};

inline MatrixView rows_view(const RowsArg& arg, std::int64_t rows, DType dtype) {
  const auto [data, cols, stride] = arg;
  return {reinterpret_cast<void*>(data), rows, cols, stride, dtype};
}

inline MatrixView packed_view(std::uintptr_t data, std::int64_t rows, std::int64_t cols, DType dtype) {
  return {reinterpret_cast<void*>(data), rows, cols, cols, dtype};
}

// The gradient of a factor: float32, of its shape.
inline MatrixView gradient_view(std::uintptr_t data, const MatrixView& factor) {
  return packed_view(data, factor.rows, factor.cols, DType::kFloat32);
}

// Of rows sorted by expert: `places`, by address, are their numbers in the counter, or 0 for their order.
inline Dropout sorted_dropout(double p, std::uint64_t seed, std::uintptr_t places, std::int64_t rows) {
  return make_dropout(p, seed, reinterpret_cast<const std::int64_t*>(places), rows);
}

inline void bind_lora_adapter(pybind11::module_& m) {
  namespace py = pybind11;
  py::class_<LoraAdapter>(m, "LoraAdapter", "Table, factors, gates and scaling of one adapter, by address.",
                          py::module_local())
      .def(py::init(
               [](const UnitTable& table, const MatrixArg& a, const MatrixArg& b, std::uintptr_t gate, float scaling) {
                 return LoraAdapter{&table, view(a, "lora_adapter"), view(b, "lora_adapter"), floats(gate), scaling};
               }),
           py::arg("table"), py::arg("lora_A"), py::arg("lora_B"), py::arg("gate"), py::arg("scaling"),
           py::keep_alive<1, 2>());
}

}  // namespace ardlora
