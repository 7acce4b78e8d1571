// The kernels of the rank controllers, through their launchers, against plain loops in double.
#include <algorithm>
#include <limits>

#include "ardlora/regularizer.h"
#include "cuda/launch.h"
#include "cuda/row_table.h"
#include "testing/cases.h"

namespace {

using namespace ardlora;
using namespace ardlora::testing;

using Floats = std::vector<float>;
constexpr double kBeta1 = 0.85, kBeta2 = 0.7;

struct Factor {
  std::int64_t rows, cols;
  DType dtype;
  std::int64_t shift;                       // elements before the first row, so that it is not aligned
  std::vector<unsigned char> weight, grad;  // of dtype
  Floats w, g;                              // the same as floats
  Floats sensitivity, uncertainty;

  std::size_t entries() const { return static_cast<std::size_t>(rows * cols); }
};

template <typename T>
void fill(std::vector<unsigned char>* bytes, Floats* floats, std::size_t entries, std::size_t shift) {
  const std::vector<T> values = random_values<T>(entries + shift);
  bytes->resize(values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(bytes->data(), values.data(), bytes->size());
  for (std::size_t i = shift; i < values.size(); ++i) floats->push_back(to_float(values[i]));
}

Factor random_factor(std::int64_t rows, std::int64_t cols, DType dtype, std::int64_t shift) {
  Factor f{rows, cols, dtype, shift, {}, {}, {}, {}, {}, {}};
  const auto at = static_cast<std::size_t>(shift);
  const auto both = [&](auto type) {
    fill<decltype(type)>(&f.weight, &f.w, f.entries(), at);
    fill<decltype(type)>(&f.grad, &f.g, f.entries(), at);
  };
  if (dtype == DType::kFloat32) both(float{});
  if (dtype == DType::kBFloat16) both(BFloat16{});
  if (dtype == DType::kFloat16) both(Float16{});
  for (std::size_t i = 0; i < f.entries(); ++i) {
    f.sensitivity.push_back(std::abs(random_float()));
    f.uncertainty.push_back(std::abs(random_float()));
  }
  return f;
}

std::vector<Factor> random_factors(bool few) {
  constexpr std::int64_t rows[] = {0, 1, 3, 7, 17}, cols[] = {0, 1, 5, 8, 37, 256, 1030, 2048};
  std::vector<Factor> factors;
  for (std::size_t i = 0; i < (few ? 3 : 8); ++i) {
    factors.push_back(random_factor(rows[rng() % std::size(rows)], cols[rng() % std::size(cols)],
                                    static_cast<DType>(rng() % kDTypeCount), rng() % 4 == 0 ? 1 : 0));
  }
  return factors;
}

cuda::RowTable table_of(std::vector<Factor>& factors) {
  std::vector<cuda::RowBuffers> buffers;
  for (Factor& f : factors) {
    const std::int64_t offset = f.shift * dtype_size(f.dtype);
    buffers.push_back({f.weight.data() + offset, f.grad.data() + offset, f.sensitivity.data(), f.uncertainty.data(),
                       f.rows, f.cols, f.dtype});
  }
  return cuda::row_table(buffers, "importance");
}

void expect_near(double want, double got, double scale, const char* what) {
  expect(std::abs(want - got) <= 1e-6 * scale + 1e-12, "%s: %g instead of %g", what, got, want);
}

void test_rows(bool few) {
  std::vector<Factor> factors = random_factors(few);
  const cuda::RowTable table = table_of(factors);
  const cuda::DeviceRows rows{table.words.data(), table.jobs, table.rows};
  const auto n = static_cast<std::size_t>(table.rows);
  Floats dots(n), workspace(n + 1), score(n);
  const std::vector<Factor> before = factors;
  cuda::row_dots(rows, dots.data(), {});
  cuda::importance(rows, {kBeta1, kBeta2, workspace.data(), score.data()}, {});
  expect(workspace[n] == 1.0f, "the mark of a finite step");
  std::size_t row = 0;
  for (std::size_t f = 0; f < factors.size(); ++f) {
    const Factor &old = before[f], &now = factors[f];
    for (std::size_t r = 0; r < static_cast<std::size_t>(old.rows); ++r, ++row) {
      double dot = 0.0, magnitude = 0.0, sum = 0.0;
      for (std::size_t c = 0; c < static_cast<std::size_t>(old.cols); ++c) {
        const std::size_t i = r * static_cast<std::size_t>(old.cols) + c;
        const double product = static_cast<double>(old.w[i]) * old.g[i], entry = std::abs(product);
        const double sensitivity = kBeta1 * old.sensitivity[i] + (1.0 - kBeta1) * entry;
        const double uncertainty = kBeta2 * old.uncertainty[i] + (1.0 - kBeta2) * std::abs(entry - sensitivity);
        expect_near(sensitivity, now.sensitivity[i], 1.0, "sensitivity");
        expect_near(uncertainty, now.uncertainty[i], 1.0, "uncertainty");
        dot += product;
        magnitude += entry;
        sum += sensitivity * uncertainty;
      }
      expect_near(dot, dots[row], magnitude, "a row dot");
      expect_near(magnitude, workspace[row], magnitude, "a row's magnitude");
      const double mean = old.cols > 0 ? sum / static_cast<double>(old.cols) : 0.0;
      expect_near(mean, score[row], mean, "a score");
    }
  }
}

// One bad entry anywhere: no mean and no score of any factor changes.
void test_not_finite(float bad) {
  std::vector<Factor> factors;
  for (int i = 0; i < 3; ++i) factors.push_back(random_factor(9, 40, DType::kFloat32, 0));
  std::memcpy(factors[1].grad.data() + 4 * 77, &bad, 4);
  const cuda::RowTable table = table_of(factors);
  Floats workspace(28), score(27, 5.0f);
  const std::vector<Factor> before = factors;
  cuda::importance({table.words.data(), table.jobs, table.rows}, {kBeta1, kBeta2, workspace.data(), score.data()}, {});
  expect(workspace[27] == 0.0f, "the mark of a step that is not finite");
  expect(score == Floats(27, 5.0f), "a score");
  for (std::size_t f = 0; f < factors.size(); ++f) {
    expect(factors[f].sensitivity == before[f].sensitivity, "a sensitivity");
    expect(factors[f].uncertainty == before[f].uncertainty, "an uncertainty");
  }
}

// Equal the CPU's bit for bit: it is the same formula, compiled for the host.
void test_gates(GateKind kind) {
  std::vector<Floats> ours, theirs;
  std::vector<double> rho;
  for (const std::int64_t count : {0, 1, 7, 8, 37, 200}) {
    ours.emplace_back(count, -1.0f);
    theirs.emplace_back(count, -1.0f);
    rho.push_back(std::uniform_real_distribution<double>(0.0, static_cast<double>(count))(rng));
  }
  std::vector<GateBlock> device, host;
  for (std::size_t u = 0; u < ours.size(); ++u) {
    device.push_back({ours[u].data(), static_cast<std::int64_t>(ours[u].size())});
    host.push_back({theirs[u].data(), static_cast<std::int64_t>(theirs[u].size())});
  }
  const GateParams p{kind, 0.05, 2.0};
  cuda::set_gates(device.data(), static_cast<std::int64_t>(device.size()), rho.data(), p, {});
  set_gates(host, rho.data(), p);
  expect(ours == theirs, "a gate of kind %d", static_cast<int>(kind));
}

}  // namespace

int main(int argc, char** argv) {
  const bool few = small(argc, argv);
  for (unsigned i = 0; i < (few ? 6u : 40u); ++i) {
    set_order(i);
    test_rows(few);
    test_not_finite(i % 2 == 0 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN());
    for (const int kind : {0, 1, 2, 3}) test_gates(static_cast<GateKind>(kind));
  }
  std::puts("controllers' kernels equal their loops");
  return 0;
}
