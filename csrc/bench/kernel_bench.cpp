#include "bench/kernel_bench.h"

#include <chrono>
#include <functional>
#include <memory>
#include <random>

#include "ardlora/check.h"
#include "ardlora/lora_linear.h"
#include "bench/aligned.h"

namespace ardlora::bench {
namespace {

constexpr std::int64_t kSweepBytes = 96 << 20;  // more than the last-level cache of what we measure on

// A matrix that owns its memory, filled with small random values.
class Matrix {
 public:
  Matrix(std::int64_t rows, std::int64_t cols, DType dtype, std::mt19937& rng)
      : bytes_(static_cast<std::size_t>(rows * cols * dtype_size(dtype))),
        view_{bytes_.data(), rows, cols, cols, dtype} {
    std::uniform_real_distribution<float> value(-1.0f, 1.0f);
    for (std::int64_t i = 0; i < rows * cols; ++i) {
      const float v = value(rng);
      if (dtype == DType::kFloat32) static_cast<float*>(view_.data)[i] = v;
      if (dtype == DType::kBFloat16) static_cast<BFloat16*>(view_.data)[i] = from_float<BFloat16>(v);
      if (dtype == DType::kFloat16) static_cast<Float16*>(view_.data)[i] = from_float<Float16>(v);
    }
  }
  const MatrixView& view() const { return view_; }
  double bytes() const { return static_cast<double>(bytes_.size()); }

 private:
  LineVector<char> bytes_;
  MatrixView view_;
};

double live_bytes(const Factor& f, DType dtype) { return static_cast<double>(f.rows * f.width * dtype_size(dtype)); }

double factor_flops(const Factor& f, std::int64_t rows) {
  double flops = 0.0;
  for (const Segment& s : f.segments) flops += 2.0 * static_cast<double>(rows * s.rank * f.width);
  return flops;
}

struct Problem {
  Matrix x, y, a, b, h, dh, da, db;
  Problem(const UnitTable& t, const KernelCase& c, std::mt19937& rng)
      : x(c.rows, t.a().features, c.activation, rng),
        y(c.rows, t.b().features, c.activation, rng),
        a(t.a().rows, t.a().width, c.adapter, rng),
        b(t.b().rows, t.b().width, c.adapter, rng),
        h(c.rows, t.hidden(), DType::kFloat32, rng),
        dh(c.rows, t.hidden(), DType::kFloat32, rng),
        da(t.a().rows, t.a().width, DType::kFloat32, rng),
        db(t.b().rows, t.b().width, DType::kFloat32, rng) {}
};

// Values stay finite over any number of repeats: what accumulates in place is scaled to nearly nothing.
constexpr float kTiny = 1e-8f;

std::function<void()> prepare(const UnitTable& t, const KernelCase& c, Problem& p, KernelTimes& cost) {
  const Factor& f = c.is_a ? t.a() : t.b();
  const Matrix& activations = c.is_a ? p.x : p.y;
  const Matrix& weight = c.is_a ? p.a : p.b;
  cost.flops = factor_flops(f, c.rows);
  const double weight_bytes = live_bytes(f, c.adapter);
  if (c.op == "shrink") {
    cost.read_bytes = activations.bytes() + weight_bytes;
    cost.update_bytes = p.h.bytes();
    return [=, &f, &p, &activations, &weight] {
      shrink({&f, weight.view(), nullptr, 1.0f}, activations.view(), p.h.view(), c.threads);
    };
  }
  if (c.op == "expand") {
    cost.read_bytes = p.h.bytes() + weight_bytes;
    cost.update_bytes = 2.0 * activations.bytes();
    return [=, &f, &p, &activations, &weight] {
      expand({&f, weight.view(), nullptr, kTiny}, p.h.view(), activations.view(), c.threads);
    };
  }
  if (c.op == "outer") {
    cost.read_bytes = activations.bytes() + p.h.bytes();
    cost.update_bytes = live_bytes(f, DType::kFloat32);
    const Matrix& grad = c.is_a ? p.da : p.db;
    return [=, &f, &p, &activations, &grad] {
      outer({&f, grad.view(), nullptr, 1.0f}, p.h.view(), activations.view(), c.threads);
    };
  }
  const double both = factor_flops(t.a(), c.rows) + factor_flops(t.b(), c.rows);
  const double factors = live_bytes(t.a(), c.adapter) + live_bytes(t.b(), c.adapter);
  const LoraParams params{
      &t, p.x.view(), p.a.view(), p.b.view(), nullptr, kTiny, p.h.view(), c.threads, make_dropout(c.dropout, 1234567)};
  if (c.op == "forward") {
    cost.flops = both;
    cost.read_bytes = p.x.bytes() + factors;
    cost.update_bytes = 2.0 * p.y.bytes() + p.h.bytes();
    return [params, &p] { lora_forward(params, p.y.view()); };
  }
  ARDLORA_CHECK(c.op == "backward", "bench_kernel: op must be shrink, expand, outer, forward or backward, got ", c.op);
  // dx is of the size of x and written; x is read.
  cost.flops = 2.0 * both;
  cost.read_bytes = p.x.bytes() + p.y.bytes() + p.h.bytes() + factors;
  cost.update_bytes = 2.0 * p.x.bytes() + p.da.bytes() + p.db.bytes();
  return [=, &t, &p, dx = std::make_shared<LineVector<char>>(static_cast<std::size_t>(p.x.bytes()))] {
    MatrixView view = p.x.view();
    view.data = dx->data();
    lora_backward(params, p.y.view(), p.dh.view(), view, p.da.view(), p.db.view(), nullptr);
  };
}

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

KernelTimes time_kernel(const UnitTable& table, const KernelCase& c) {
  ARDLORA_CHECK(c.rows >= 0, "bench_kernel: rows must be >= 0, got ", c.rows);
  ARDLORA_CHECK(c.repeats >= 1, "bench_kernel: repeats must be at least 1, got ", c.repeats);
  std::mt19937 rng(7);
  Problem problem(table, c, rng);
  KernelTimes times;
  const std::function<void()> run = prepare(table, c, problem, times);
  std::vector<char> sweep(c.cold ? kSweepBytes : 0, 1);
  run();
  for (int i = 0; i < c.repeats; ++i) {
    for (char& byte : sweep) byte = static_cast<char>(byte + 1);
    const double began = seconds();
    run();
    times.seconds.push_back(seconds() - began);
  }
  return times;
}

}  // namespace ardlora::bench
