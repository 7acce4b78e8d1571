// Every instruction set that this processor runs against the scalar kernels: LoRA linear forward and backward with and
// without dropout (whose masks must be the same bits), importance, row dots and soft orthogonality. Meant for
// processors that the Python tests do not reach, under an emulator.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "ardlora/importance.h"
#include "ardlora/lora_linear.h"
#include "ardlora/soft_orthogonality.h"
#include "cpu/kernel_table.h"

using namespace ardlora;

namespace {

std::mt19937 rng(5);

float random_float() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(rng); }

// A matrix of any type with values that all types hold exactly to their own precision.
struct Matrix {
  std::vector<float> wide;
  std::vector<std::uint16_t> narrow;
  MatrixView view;

  Matrix(std::int64_t rows, std::int64_t cols, DType dtype) {
    const auto n = static_cast<std::size_t>(rows * cols);
    wide.resize(n);
    narrow.resize(n);
    for (std::size_t i = 0; i < n; ++i) set(i, random_float(), dtype);
    void* data = dtype == DType::kFloat32 ? static_cast<void*>(wide.data()) : static_cast<void*>(narrow.data());
    view = {data, rows, cols, cols, dtype};
  }
  Matrix(const Matrix& other) : wide(other.wide), narrow(other.narrow), view(other.view) {
    view.data = view.dtype == DType::kFloat32 ? static_cast<void*>(wide.data()) : static_cast<void*>(narrow.data());
  }
  void set(std::size_t i, float value, DType dtype) {
    if (dtype == DType::kFloat32) wide[i] = value;
    if (dtype == DType::kBFloat16) narrow[i] = from_float<BFloat16>(value).bits;
    if (dtype == DType::kFloat16) narrow[i] = from_float<Float16>(value).bits;
  }
  float at(std::size_t i) const {
    if (view.dtype == DType::kBFloat16) return to_float(BFloat16{narrow[i]});
    if (view.dtype == DType::kFloat16) return to_float(Float16{narrow[i]});
    return wide[i];
  }
  std::size_t size() const { return wide.size(); }
};

void compare(const Matrix& got, const Matrix& wanted, const char* isa, const char* what) {
  double scale = 1.0;
  for (std::size_t i = 0; i < wanted.size(); ++i) scale = std::max(scale, std::abs(double{wanted.at(i)}));
  const double bound = scale * (wanted.view.dtype == DType::kFloat32   ? 2e-5
                                : wanted.view.dtype == DType::kFloat16 ? 2e-3
                                                                       : 1.6e-2);
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    if (std::abs(double{got.at(i)} - double{wanted.at(i)}) <= bound) continue;
    std::printf("%s: %s[%zu] must be %g, got %g\n", isa, what, i, wanted.at(i), got.at(i));
    std::exit(1);
  }
}

struct Results {
  Matrix y, h, dx, da, db, dgate;
};

Results run(const std::string& isa, const UnitTable& t, const Matrix& x, const Matrix& a, const Matrix& b,
            const Matrix& gate, const Matrix& dy, const Matrix& y, const Matrix& dx, double dropout) {
  cpu::set_isa(isa);
  const std::int64_t rows = x.view.rows;
  constexpr DType kFloat = DType::kFloat32;
  const std::int64_t gates = t.gate_on_a() ? t.a().rows : t.b().rows;
  Results r{y,
            Matrix(rows, t.hidden(), kFloat),
            dx,
            Matrix(t.a().rows, t.a().width, kFloat),
            Matrix(t.b().rows, t.b().width, kFloat),
            Matrix(1, gates, kFloat)};
  Matrix dh(rows, t.hidden(), kFloat);
  const LoraParams p{&t, x.view, a.view, b.view, gate.wide.data(), 0.5f, r.h.view, 1, make_dropout(dropout, 77)};
  lora_forward(p, r.y.view);
  lora_backward(p, dy.view, dh.view, r.dx.view, r.da.view, r.db.view, r.dgate.wide.data());
  return r;
}

void check_lora(const std::vector<std::string>& isas, int number) {
  const auto pick = [](std::initializer_list<std::int64_t> from) { return from.begin()[rng() % from.size()]; };
  constexpr std::int64_t kUnits = 3;
  const auto kind = static_cast<UnitKind>(number % 3);
  const auto factoring = static_cast<Factoring>(number / 3 % 2);
  std::vector<std::int64_t> ranks;
  for (std::int64_t u = 0; u < (kind == UnitKind::kMatrix ? 1 : kUnits); ++u) ranks.push_back(pick({0, 1, 3, 8, 17}));
  const UnitTable t(kind, factoring, kUnits * pick({5, 16, 43}), kUnits * pick({7, 32, 45}), ranks);
  const DType type = static_cast<DType>(number / 6 % 3), adapter = number / 18 % 2 == 0 ? DType::kFloat32 : type;
  const std::int64_t rows = pick({1, 2, 9, 70});
  const Matrix x(rows, t.a().features, type), dy(rows, t.b().features, type), y(rows, t.b().features, type),
      dx(rows, t.a().features, type), a(t.a().rows, t.a().width, adapter), b(t.b().rows, t.b().width, adapter),
      gate(1, t.gate_on_a() ? t.a().rows : t.b().rows, DType::kFloat32);
  const double dropout = number % 2 == 0 ? 0.0 : 0.3;
  const Results wanted = run("scalar", t, x, a, b, gate, dy, y, dx, dropout);
  for (const std::string& isa : isas) {
    const Results got = run(isa, t, x, a, b, gate, dy, y, dx, dropout);
    compare(got.y, wanted.y, isa.c_str(), "y");
    compare(got.h, wanted.h, isa.c_str(), "H");
    compare(got.dx, wanted.dx, isa.c_str(), "dx");
    compare(got.da, wanted.da, isa.c_str(), "dA");
    compare(got.db, wanted.db, isa.c_str(), "dB");
    compare(got.dgate, wanted.dgate, isa.c_str(), "dgate");
  }
}

void check_passes(const std::vector<std::string>& isas, int number) {
  const std::int64_t rows = 3, cols = 1 + number % 41;
  const DType type = static_cast<DType>(number % 3);
  const Matrix weight(rows, cols, type), grad(rows, cols, type), mean(2 * rows, cols, DType::kFloat32);
  const auto passes = [&](const std::string& isa) {
    cpu::set_isa(isa);
    Matrix means(mean), dots(1, rows, DType::kFloat32);
    float* first = means.wide.data();
    update_importance({{weight.view.data, grad.view.data, first, first + rows * cols, rows * cols, type}}, 0.85, 0.9,
                      1);
    row_dots({{weight.view.data, grad.view.data, rows, cols}}, type, dots.wide.data(), 1);
    Matrix pulled(grad);
    const double strength = 0.1;
    add_soft_orthogonality({{weight.view.data, pulled.view.data, rows, cols, type}}, &strength, number % 2 == 0, 1);
    return std::tuple{means, dots, pulled};
  };
  const auto wanted = passes("scalar");
  for (const std::string& isa : isas) {
    const auto got = passes(isa);
    compare(std::get<0>(got), std::get<0>(wanted), isa.c_str(), "mean");
    compare(std::get<1>(got), std::get<1>(wanted), isa.c_str(), "row dot");
    compare(std::get<2>(got), std::get<2>(wanted), isa.c_str(), "soft orthogonality");
  }
}

}  // namespace

int main() {
  const std::vector<std::string> isas = cpu::available_isas();
  for (int number = 0; number < 144; ++number) {
    check_lora(isas, number);
    check_passes(isas, number);
  }
  for (const std::string& isa : isas) std::printf("%s ", isa.c_str());
  std::puts("agree");
}
