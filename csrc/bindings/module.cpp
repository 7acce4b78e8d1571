// The only Python module: converts integers to views, drops the GIL, calls the core, translates errors.
// It knows nothing of torch: a matrix is (address, rows, cols, row stride in elements, dtype code).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numeric>
#include <utility>

#include "ardlora/importance.h"
#include "ardlora/lora_grouped.h"
#include "ardlora/orthogonal_rows.h"
#include "ardlora/rank_resize.h"
#include "ardlora/regularizer.h"
#include "ardlora/soft_orthogonality.h"
#include "bindings/bench.h"
#include "bindings/cuda.h"
#include "bindings/lora_adapter.h"
#include "bindings/matrix_arg.h"
#include "cpu/arena.h"
#include "cpu/kernel_table.h"

namespace py = pybind11;
using namespace ardlora;

namespace {

using DoubleArray = py::array_t<double, py::array::c_style>;
using FloatArray = py::array_t<float, py::array::c_style>;

FactorView factor(const UnitTable& table, bool is_a, const MatrixView& weight, std::uintptr_t row_scale, float scale) {
  return {is_a ? &table.a() : &table.b(), weight, floats(row_scale), scale};
}

void bind_unit_table(py::module_& m) {
  py::class_<UnitTable>(m, "UnitTable", "Units of one adapted matrix and where their components live.")
      .def(py::init([](int kind, int factoring, std::int64_t in_features, std::int64_t out_features,
                       std::vector<std::int64_t> ranks) {
             ARDLORA_CHECK(kind >= 0 && kind <= 3, "unit_table: kind must be 0 to 3, got ", kind);
             ARDLORA_CHECK(factoring >= 0 && factoring <= 1, "unit_table: factoring must be 0 or 1, got ", factoring);
             return UnitTable(static_cast<UnitKind>(kind), static_cast<Factoring>(factoring), in_features, out_features,
                              std::move(ranks));
           }),
           py::arg("kind"), py::arg("factoring"), py::arg("in_features"), py::arg("out_features"), py::arg("ranks"))
      .def_property_readonly("ranks", &UnitTable::ranks)
      .def_property_readonly("units", [](const UnitTable& t) { return t.ranks().size(); })
      .def_property_readonly("unit_begin", &UnitTable::unit_begin)
      .def_property_readonly("hidden", &UnitTable::hidden)
      .def_property_readonly("gate_on_a", &UnitTable::gate_on_a)
      .def_property_readonly("a_rows", [](const UnitTable& t) { return t.a().rows; })
      .def_property_readonly("b_rows", [](const UnitTable& t) { return t.b().rows; })
      .def_property_readonly("a_width", [](const UnitTable& t) { return t.a().width; })
      .def_property_readonly("b_width", [](const UnitTable& t) { return t.b().width; });
}

void bind_primitives(py::module_& m) {
  m.def(
      "shrink",
      [](const UnitTable& table, bool is_a, const MatrixArg& w, std::uintptr_t row_scale, float scale,
         const MatrixArg& x, const MatrixArg& h, int threads) {
        const FactorView f = factor(table, is_a, view(w, "shrink"), row_scale, scale);
        const MatrixView xv = view(x, "shrink"), hv = view(h, "shrink");
        py::gil_scoped_release release;
        shrink(f, xv, hv, threads);
      },
      py::arg("table"), py::arg("is_a"), py::arg("weight"), py::arg("row_scale"), py::arg("scale"), py::arg("x"),
      py::arg("h"), py::arg("threads"));
  m.def(
      "expand",
      [](const UnitTable& table, bool is_a, const MatrixArg& w, std::uintptr_t row_scale, float scale,
         const MatrixArg& h, const MatrixArg& y, int threads) {
        const FactorView f = factor(table, is_a, view(w, "expand"), row_scale, scale);
        const MatrixView hv = view(h, "expand"), yv = view(y, "expand");
        py::gil_scoped_release release;
        expand(f, hv, yv, threads);
      },
      py::arg("table"), py::arg("is_a"), py::arg("weight"), py::arg("row_scale"), py::arg("scale"), py::arg("h"),
      py::arg("y"), py::arg("threads"));
  m.def(
      "outer",
      [](const UnitTable& table, bool is_a, const MatrixArg& dw, std::uintptr_t row_scale, float scale,
         const MatrixArg& h, const MatrixArg& x, int threads) {
        const FactorView f = factor(table, is_a, view(dw, "outer"), row_scale, scale);
        const MatrixView hv = view(h, "outer"), xv = view(x, "outer");
        py::gil_scoped_release release;
        outer(f, hv, xv, threads);
      },
      py::arg("table"), py::arg("is_a"), py::arg("dw"), py::arg("row_scale"), py::arg("scale"), py::arg("h"),
      py::arg("x"), py::arg("threads"));
}

void bind_lora_linear(py::module_& m) {
  bind_lora_adapter(m);
  m.def(
      "lora_forward",
      [](const LoraAdapter& adapter, std::int64_t rows, int dtype, const RowsArg& x, std::uintptr_t h,
         std::int64_t hidden, const RowsArg& y, int threads, double dropout, std::uint64_t seed) {
        const DType type = dtype_from_code(dtype, "lora_forward");
        const LoraParams p = adapter.params(rows_view(x, rows, type), packed_view(h, rows, hidden, DType::kFloat32),
                                            threads, make_dropout(dropout, seed));
        const MatrixView yv = rows_view(y, rows, type);
        py::gil_scoped_release release;
        lora_forward(p, yv);
      },
      py::arg("adapter"), py::arg("rows"), py::arg("dtype"), py::arg("x"), py::arg("h"), py::arg("hidden"),
      py::arg("y"), py::arg("threads"), py::arg("dropout"), py::arg("seed"));
  m.def(
      "lora_backward",
      [](const LoraAdapter& adapter, std::int64_t rows, int dtype, const RowsArg& x, std::uintptr_t h,
         std::int64_t hidden, const RowsArg& dy, std::uintptr_t dh, const RowsArg& dx, std::uintptr_t da,
         std::uintptr_t db, std::uintptr_t dgate, int threads, double dropout, std::uint64_t seed) {
        const DType type = dtype_from_code(dtype, "lora_backward");
        const LoraParams p = adapter.params(rows_view(x, rows, type), packed_view(h, rows, hidden, DType::kFloat32),
                                            threads, make_dropout(dropout, seed));
        const MatrixView dyv = rows_view(dy, rows, type), dxv = rows_view(dx, rows, type);
        const MatrixView dav = gradient_view(da, p.lora_A), dbv = gradient_view(db, p.lora_B);
        py::gil_scoped_release release;
        cpu::Arena::Use arena;
        void* scratch = dh != 0 ? reinterpret_cast<void*>(dh) : arena.take<float>(rows * hidden);
        const MatrixView dhv = {scratch, rows, hidden, hidden, DType::kFloat32};
        lora_backward(p, dyv, dhv, dxv, dav, dbv, reinterpret_cast<float*>(dgate));
      },
      py::arg("adapter"), py::arg("rows"), py::arg("dtype"), py::arg("x"), py::arg("h"), py::arg("hidden"),
      py::arg("dy"), py::arg("dh"), py::arg("dx"), py::arg("dA"), py::arg("dB"), py::arg("dgate"), py::arg("threads"),
      py::arg("dropout"), py::arg("seed"));
}

GroupedParams grouped(const LoraParams& lora, const IndexArray& offsets, const char* op) {
  const auto experts = static_cast<py::ssize_t>(lora.table->ranks().size());
  ARDLORA_CHECK(offsets.ndim() == 1 && offsets.size() == experts + 1, op, ": offsets must have ", experts + 1,
                " entries, one more than there are experts, got ", offsets.size());
  return {lora, offsets.data()};
}

void bind_lora_grouped(py::module_& m) {
  m.def(
      "lora_grouped_forward",
      [](const LoraAdapter& adapter, const IndexArray& offsets, std::uintptr_t places, std::int64_t rows, int dtype,
         const RowsArg& x, std::uintptr_t h, std::int64_t hidden, const RowsArg& y, int threads, double dropout,
         std::uint64_t seed) {
        constexpr const char* op = "lora_grouped_forward";
        const DType type = dtype_from_code(dtype, op);
        const LoraParams lora = adapter.params(rows_view(x, rows, type), packed_view(h, rows, hidden, DType::kFloat32),
                                               threads, sorted_dropout(dropout, seed, places, rows));
        const GroupedParams p = grouped(lora, offsets, op);
        const MatrixView yv = rows_view(y, rows, type);
        py::gil_scoped_release release;
        lora_grouped_forward(p, yv);
      },
      py::arg("adapter"), py::arg("offsets"), py::arg("places"), py::arg("rows"), py::arg("dtype"), py::arg("x"),
      py::arg("h"), py::arg("hidden"), py::arg("y"), py::arg("threads"), py::arg("dropout"), py::arg("seed"));
  m.def(
      "lora_grouped_backward",
      [](const LoraAdapter& adapter, const IndexArray& offsets, std::uintptr_t places, std::int64_t rows, int dtype,
         const RowsArg& x, std::uintptr_t h, std::int64_t hidden, const RowsArg& dy, std::uintptr_t dh,
         const RowsArg& dx, std::uintptr_t da, std::uintptr_t db, std::uintptr_t dgate, int threads, double dropout,
         std::uint64_t seed) {
        constexpr const char* op = "lora_grouped_backward";
        const DType type = dtype_from_code(dtype, op);
        const LoraParams lora = adapter.params(rows_view(x, rows, type), packed_view(h, rows, hidden, DType::kFloat32),
                                               threads, sorted_dropout(dropout, seed, places, rows));
        const GroupedParams p = grouped(lora, offsets, op);
        const MatrixView dyv = rows_view(dy, rows, type), dhv = packed_view(dh, rows, hidden, DType::kFloat32),
                         dxv = rows_view(dx, rows, type), dav = gradient_view(da, lora.lora_A),
                         dbv = gradient_view(db, lora.lora_B);
        py::gil_scoped_release release;
        lora_grouped_backward(p, dyv, dhv, dxv, dav, dbv, reinterpret_cast<float*>(dgate));
      },
      py::arg("adapter"), py::arg("offsets"), py::arg("places"), py::arg("rows"), py::arg("dtype"), py::arg("x"),
      py::arg("h"), py::arg("hidden"), py::arg("dy"), py::arg("dh"), py::arg("dx"), py::arg("dA"), py::arg("dB"),
      py::arg("dgate"), py::arg("threads"), py::arg("dropout"), py::arg("seed"));
}

void bind_controller_passes(py::module_& m) {
  m.def(
      "row_dots",
      [](const IndexArray& table, int dtype, int threads) {  // [n, 4]: weight address, gradient address, rows, columns
        ARDLORA_CHECK(table.ndim() == 2 && table.shape(1) == 4, "row_dots: blocks must be [n, 4]");
        const auto r = table.unchecked<2>();
        std::vector<RowBlock> blocks;
        py::ssize_t rows = 0;
        for (py::ssize_t i = 0; i < r.shape(0); ++i) {
          blocks.push_back(
              {reinterpret_cast<const void*>(r(i, 0)), reinterpret_cast<const void*>(r(i, 1)), r(i, 2), r(i, 3)});
          rows += r(i, 2);
        }
        py::array_t<float> out(rows);
        float* data = out.mutable_data();
        const DType type = dtype_from_code(dtype, "row_dots");
        {
          py::gil_scoped_release release;
          row_dots(blocks, type, data, threads);
        }
        return out;
      },
      py::arg("blocks"), py::arg("dtype"), py::arg("threads"));
  m.def(
      "importance",
      [](const IndexArray& table, double beta1, double beta2, int threads) {
        // [n, 7]: addresses of weight, gradient, sensitivity and uncertainty, rows, columns, dtype code
        ARDLORA_CHECK(table.ndim() == 2 && table.shape(1) == 7, "importance: blocks must be [n, 7]");
        const auto r = table.unchecked<2>();
        std::vector<ImportanceBlock> blocks;
        for (py::ssize_t i = 0; i < r.shape(0); ++i) {
          blocks.push_back({reinterpret_cast<const void*>(r(i, 0)), reinterpret_cast<const void*>(r(i, 1)),
                            reinterpret_cast<float*>(r(i, 2)), reinterpret_cast<float*>(r(i, 3)), r(i, 4) * r(i, 5),
                            dtype_from_code(static_cast<int>(r(i, 6)), "importance")});
        }
        py::gil_scoped_release release;
        return update_importance(blocks, beta1, beta2, threads);
      },
      py::arg("blocks"), py::arg("beta1"), py::arg("beta2"), py::arg("threads"));
  m.def(
      "soft_orthogonality",
      [](const IndexArray& table, const DoubleArray& strength, bool norm, int threads) {
        // [n, 5]: addresses of rows and gradient, rows, columns, dtype code
        ARDLORA_CHECK(table.ndim() == 2 && table.shape(1) == 5 && strength.size() == table.shape(0),
                      "soft_orthogonality: blocks must be [", strength.size(), ", 5]");
        const auto r = table.unchecked<2>();
        std::vector<OrthogonalityBlock> blocks;
        for (py::ssize_t i = 0; i < r.shape(0); ++i) {
          blocks.push_back({reinterpret_cast<const void*>(r(i, 0)), reinterpret_cast<void*>(r(i, 1)), r(i, 2), r(i, 3),
                            dtype_from_code(static_cast<int>(r(i, 4)), "soft_orthogonality")});
        }
        const double* strengths = strength.data();
        py::gil_scoped_release release;
        add_soft_orthogonality(blocks, strengths, norm, threads);
      },
      py::arg("blocks"), py::arg("strength"), py::arg("norm"), py::arg("threads"));
  m.def(
      "rank_resize",
      [](const IndexArray& moves, const std::vector<std::vector<std::int64_t>>& plans, int threads) {
        const std::vector<RowMove> jobs = row_moves(moves);
        py::gil_scoped_release release;
        rank_resize(jobs, plans, threads);
      },
      py::arg("moves"), py::arg("plans"), py::arg("threads"));
  m.def(
      "orthogonal_rows",
      [](const IndexArray& table, const std::vector<std::vector<std::int64_t>>& kept, const std::vector<float>& norms,
         int threads) {  // [n, 5]: address of the others, their rows, columns, address of the new rows, how many
        const auto n = static_cast<py::ssize_t>(kept.size());
        ARDLORA_CHECK(table.ndim() == 2 && table.shape(0) == n && table.shape(1) == 5 && norms.size() == kept.size(),
                      "orthogonal_rows: factors must be [", n, ", 5] with ", n, " norms");
        const auto r = table.unchecked<2>();
        std::vector<NewRows> factors;
        for (py::ssize_t i = 0; i < n; ++i) {
          const auto k = static_cast<std::size_t>(i);
          factors.push_back({reinterpret_cast<const float*>(r(i, 0)), r(i, 1), kept[k],
                             reinterpret_cast<float*>(r(i, 3)), r(i, 4), r(i, 2), norms[k]});
        }
        py::gil_scoped_release release;
        orthogonal_rows(factors, threads);
      },
      py::arg("factors"), py::arg("kept"), py::arg("norms"), py::arg("threads"));
  m.def(
      "draw_uniform",
      [](std::uintptr_t out, std::int64_t count, std::uint64_t seed, int threads) {
        py::gil_scoped_release release;
        draw_uniform(reinterpret_cast<float*>(out), count, seed, threads);
      },
      py::arg("out"), py::arg("count"), py::arg("seed"), py::arg("threads"));
  m.def(
      "secant_slopes",
      [](const FloatArray& dots, const IndexArray& live, const DoubleArray& rho, const DoubleArray& spectrum,
         DoubleArray fisher, double ema) {
        const py::ssize_t n = live.size();
        ARDLORA_CHECK(rho.size() == n && fisher.size() == n && spectrum.ndim() == 2 && spectrum.shape(0) == n,
                      "secant_slopes: arrays must have ", n, " units each");
        const std::int64_t rows = std::accumulate(live.data(), live.data() + n, std::int64_t{0});
        ARDLORA_CHECK(dots.size() == rows, "secant_slopes: dots must have ", rows, " entries, got ", dots.size());
        py::array_t<double> slopes(n);
        secant_slopes(
            {n, dots.data(), live.data(), rho.data(), spectrum.data(), spectrum.shape(1), ema, fisher.mutable_data()},
            slopes.mutable_data());
        return slopes;
      },
      py::arg("dots"), py::arg("live"), py::arg("rho"), py::arg("spectrum"), py::arg("fisher").noconvert(),
      py::arg("ema"));
  m.def(
      "unit_costs",
      [](const DoubleArray& own, const DoubleArray& common, const IndexArray& module_of, const DoubleArray& ranks) {
        const py::ssize_t n = own.size();
        ARDLORA_CHECK(module_of.size() == n && ranks.size() == n, "unit_costs: arrays must have ", n, " units each");
        py::array_t<double> marginal(n);
        const double parameters = unit_costs(
            {n, own.data(), module_of.data(), ranks.data(), common.size(), common.data()}, marginal.mutable_data());
        return std::pair(parameters, std::move(marginal));
      },
      py::arg("own"), py::arg("common"), py::arg("module_of"), py::arg("ranks"));
  m.def(
      "prox_step",
      [](DoubleArray alpha, const DoubleArray& grad, const DoubleArray& weight, const DoubleArray& lo,
         const DoubleArray& hi, double step, double price, double tv) {
        const py::ssize_t n = alpha.size();
        ARDLORA_CHECK(grad.size() == n && weight.size() == n && lo.size() == n && hi.size() == n,
                      "prox_step: arrays must have ", n, " entries each");
        prox_step({n, alpha.mutable_data(), grad.data(), weight.data(), lo.data(), hi.data(), step, price, tv});
      },
      py::arg("alpha").noconvert(), py::arg("grad"), py::arg("weight"), py::arg("lo"), py::arg("hi"), py::arg("step"),
      py::arg("price"), py::arg("tv"));
  m.def(
      "set_gates",
      [](const IndexArray& blocks, const DoubleArray& rho, int kind, double floor, double width) {
        // blocks [units, 2]: gate address, count
        ARDLORA_CHECK(blocks.ndim() == 2 && blocks.shape(1) == 2 && blocks.shape(0) == rho.size(),
                      "set_gates: blocks must be [", rho.size(), ", 2]");
        ARDLORA_CHECK(kind >= 0 && kind <= 3, "set_gates: kind must be 0 to 3, got ", kind);
        const auto r = blocks.unchecked<2>();
        std::vector<GateBlock> jobs(static_cast<std::size_t>(r.shape(0)));
        for (py::ssize_t i = 0; i < r.shape(0); ++i) {
          jobs[static_cast<std::size_t>(i)] = {reinterpret_cast<float*>(r(i, 0)), r(i, 1)};
        }
        set_gates(jobs, rho.data(), {static_cast<GateKind>(kind), floor, width});
      },
      py::arg("blocks"), py::arg("rho"), py::arg("kind"), py::arg("floor"), py::arg("width"));
}

void translate(std::exception_ptr p) {
  try {
    if (p) std::rethrow_exception(p);
  } catch (const Error& e) {
    PyObject* type = PyExc_RuntimeError;
    if (e.kind() == ErrorKind::kValue) type = PyExc_ValueError;
    if (e.kind() == ErrorKind::kType) type = PyExc_TypeError;
    if (e.kind() == ErrorKind::kNotImplemented) type = PyExc_NotImplementedError;
    PyErr_SetString(type, e.what());
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native core of ardlora_ext.";
  m.attr("__version__") = ARDLORA_VERSION;
  py::register_exception_translator(&translate);
  bind_unit_table(m);
  bind_primitives(m);
  bind_lora_linear(m);
  bind_lora_grouped(m);
  bind_controller_passes(m);
  m.def("active_isa", [] { return std::string(cpu::active().name); });
  m.def("available_isas", &cpu::available_isas);
  m.def("built_isas", &cpu::built_isas);
  m.def("set_isa", &cpu::set_isa, py::arg("name"));
  bind_bench(m);
  bind_cuda(m);
}
