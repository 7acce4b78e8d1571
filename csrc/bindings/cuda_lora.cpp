// The LoRA linear on a CUDA device. A call's last argument is (plans, table, workspace, workspace bytes, address of the
// seed, device, stream): the table is `cuda_segment_table`'s words in device memory; where the seed's address is not 0
// the kernels read it there.
#include <pybind11/stl.h>

#include <tuple>

#include "ardlora/lora_linear.h"
#include "bindings/cuda.h"
#include "bindings/lora_adapter.h"
#include "cuda/gemm_plan.h"
#include "cuda/lora_linear.h"
#include "cuda/segment_table.h"

namespace py = pybind11;

namespace ardlora {
namespace {

using CallArg = std::tuple<const cuda::LoraPlans*, std::uintptr_t, std::uintptr_t, std::int64_t, std::uintptr_t, int,
                           std::uintptr_t>;

Dropout device_dropout(Dropout dropout, const CallArg& arg) {
  dropout.seed_at = reinterpret_cast<const std::uint64_t*>(std::get<4>(arg));
  return dropout;
}

cuda::DeviceCall device_call(const CallArg& arg) {
  const auto [plans, table, workspace, bytes, seed, device, stream] = arg;
  return {plans,
          reinterpret_cast<const void*>(table),
          reinterpret_cast<void*>(workspace),
          bytes,
          {device, reinterpret_cast<void*>(stream)}};
}

cuda::Gemm gemm_kind(const std::string& name) {
  if (name == "shrink") return cuda::Gemm::kShrink;
  if (name == "expand") return cuda::Gemm::kExpand;
  if (name == "outer") return cuda::Gemm::kOuter;
  ARDLORA_CHECK(name == "outer_shrink", "gemm_plan: kind must be shrink, expand, outer or outer_shrink, got ", name);
  return cuda::Gemm::kOuterShrink;
}

void bind_forward_and_backward(py::module_& m) {
  m.def(
      "cuda_lora_forward",
      [](const LoraAdapter& adapter, std::int64_t rows, int dtype, const RowsArg& x, std::uintptr_t h,
         std::int64_t hidden, const RowsArg& y, double dropout, std::uint64_t seed, const CallArg& call, bool fresh,
         std::uintptr_t bias) {
        const DType type = dtype_from_code(dtype, "lora_forward");
        const LoraParams p = adapter.params(rows_view(x, rows, type), packed_view(h, rows, hidden, type), 1,
                                            device_dropout(make_dropout(dropout, seed), call));
        const MatrixView yv = rows_view(y, rows, type);
        py::gil_scoped_release release;
        cuda::lora_forward(p, yv, device_call(call), {fresh, reinterpret_cast<const void*>(bias)});
      },
      py::arg("adapter"), py::arg("rows"), py::arg("dtype"), py::arg("x"), py::arg("h"), py::arg("hidden"),
      py::arg("y"), py::arg("dropout"), py::arg("seed"), py::arg("call"), py::arg("fresh"), py::arg("bias"));
  m.def(
      "cuda_lora_backward",
      [](const LoraAdapter& adapter, std::int64_t rows, int dtype, const RowsArg& x, std::uintptr_t h,
         std::int64_t hidden, const RowsArg& dy, std::uintptr_t dh, const RowsArg& dx, std::uintptr_t da,
         std::uintptr_t db, std::uintptr_t dgate, double dropout, std::uint64_t seed, const CallArg& call, bool fresh) {
        const DType type = dtype_from_code(dtype, "lora_backward");
        const LoraParams p = adapter.params(rows_view(x, rows, type), packed_view(h, rows, hidden, type), 1,
                                            device_dropout(make_dropout(dropout, seed), call));
        const MatrixView dyv = rows_view(dy, rows, type), dhv = packed_view(dh, rows, hidden, type),
                         dxv = rows_view(dx, rows, type), dav = gradient_view(da, p.lora_A),
                         dbv = gradient_view(db, p.lora_B);
        py::gil_scoped_release release;
        cuda::lora_backward(p, dyv, dhv, dxv, dav, dbv, reinterpret_cast<float*>(dgate), device_call(call), {fresh});
      },
      py::arg("adapter"), py::arg("rows"), py::arg("dtype"), py::arg("x"), py::arg("h"), py::arg("hidden"),
      py::arg("dy"), py::arg("dh"), py::arg("dx"), py::arg("dA"), py::arg("dB"), py::arg("dgate"), py::arg("dropout"),
      py::arg("seed"), py::arg("call"), py::arg("fresh"));
}

const std::int64_t* offsets_at(std::uintptr_t address) { return reinterpret_cast<const std::int64_t*>(address); }

// The offsets and places by address, in device memory.
void bind_grouped(py::module_& m) {
  m.def(
      "cuda_lora_grouped_forward",
      [](const LoraAdapter& adapter, std::uintptr_t offsets, std::uintptr_t places, std::int64_t rows, int dtype,
         const RowsArg& x, std::uintptr_t h, std::int64_t hidden, const RowsArg& y, double dropout, std::uint64_t seed,
         const CallArg& call) {
        const DType type = dtype_from_code(dtype, "lora_grouped_forward");
        const LoraParams p = adapter.params(rows_view(x, rows, type), packed_view(h, rows, hidden, type), 1,
                                            device_dropout(sorted_dropout(dropout, seed, places, rows), call));
        const MatrixView yv = rows_view(y, rows, type);
        py::gil_scoped_release release;
        cuda::lora_grouped_forward({p, offsets_at(offsets)}, yv, device_call(call));
      },
      py::arg("adapter"), py::arg("offsets"), py::arg("places"), py::arg("rows"), py::arg("dtype"), py::arg("x"),
      py::arg("h"), py::arg("hidden"), py::arg("y"), py::arg("dropout"), py::arg("seed"), py::arg("call"));
  m.def(
      "cuda_lora_grouped_backward",
      [](const LoraAdapter& adapter, std::uintptr_t offsets, std::uintptr_t places, std::int64_t rows, int dtype,
         const RowsArg& x, std::uintptr_t h, std::int64_t hidden, const RowsArg& dy, std::uintptr_t dh,
         const RowsArg& dx, std::uintptr_t da, std::uintptr_t db, std::uintptr_t dgate, double dropout,
         std::uint64_t seed, const CallArg& call) {
        const DType type = dtype_from_code(dtype, "lora_grouped_backward");
        const LoraParams p = adapter.params(rows_view(x, rows, type), packed_view(h, rows, hidden, type), 1,
                                            device_dropout(sorted_dropout(dropout, seed, places, rows), call));
        const MatrixView dyv = rows_view(dy, rows, type), dhv = packed_view(dh, rows, hidden, type),
                         dxv = rows_view(dx, rows, type), dav = gradient_view(da, p.lora_A),
                         dbv = gradient_view(db, p.lora_B);
        py::gil_scoped_release release;
        cuda::lora_grouped_backward({p, offsets_at(offsets)}, dyv, dhv, dxv, dav, dbv, reinterpret_cast<float*>(dgate),
                                    device_call(call));
      },
      py::arg("adapter"), py::arg("offsets"), py::arg("places"), py::arg("rows"), py::arg("dtype"), py::arg("x"),
      py::arg("h"), py::arg("hidden"), py::arg("dy"), py::arg("dh"), py::arg("dx"), py::arg("dA"), py::arg("dB"),
      py::arg("dgate"), py::arg("dropout"), py::arg("seed"), py::arg("call"));
}

}  // namespace

void bind_cuda_lora(py::module_& m) {
  m.def(
      "cuda_segment_table",
      [](const UnitTable& table) {
        const std::vector<std::int64_t> words = cuda::segment_table(table);
        return py::array_t<std::int64_t>(static_cast<py::ssize_t>(words.size()), words.data());
      },
      py::arg("table"));
  m.def(
      "cuda_gemm_plan",
      [](const UnitTable& table, bool is_a, const std::string& kind, std::int64_t rows, int dtype, bool dropout,
         const std::pair<int, int>& multiprocessors) {
        return describe(cuda::plan_gemm(
            gemm_kind(kind), is_a ? table.a() : table.b(), table.hidden(), rows, dtype_from_code(dtype, "gemm_plan"),
            dropout, {multiprocessors.first, multiprocessors.second}, table.kind() == UnitKind::kExperts));
      },
      py::arg("table"), py::arg("is_a"), py::arg("kind"), py::arg("rows"), py::arg("dtype"), py::arg("dropout"),
      py::arg("multiprocessors"));
  py::class_<cuda::LoraPlans>(m, "LoraPlans", "How the launches of one adapter's calls are cut.", py::module_local())
      .def_readonly("workspace", &cuda::LoraPlans::workspace);
  m.def(
      "cuda_lora_plans",
      [](const UnitTable& table, std::int64_t rows, int dtype, bool dropout, int device) {
        return cuda::plan_lora(table, rows, dtype_from_code(dtype, "lora_plans"), dropout, device);
      },
      py::arg("table"), py::arg("rows"), py::arg("dtype"), py::arg("dropout"), py::arg("device"));
  bind_forward_and_backward(m);
  bind_grouped(m);
}

}  // namespace ardlora
