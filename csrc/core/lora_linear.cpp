#include "ardlora/lora_linear.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/lora_checks.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace ardlora {
namespace {

using cpu::KernelFactor;

constexpr std::int64_t kRowBlock = 32;  // rows that go through shrink and expand together, while they are in cache
constexpr std::int64_t kMaskedFloats = 1 << 16;  // floats of a block under dropout: a quarter of a typical L2

KernelFactor kernel_factor(const FactorView& w) {
  return {w.factor->segments.data(),
          static_cast<std::int64_t>(w.factor->segments.size()),
          w.factor->width,
          w.weight.data,
          w.weight.row_stride,
          w.row_scale,
          w.scale};
}

double factor_flops(const Factor& f, std::int64_t rows) {
  return 2.0 * static_cast<double>(rows) * static_cast<double>(f.rows) * static_cast<double>(f.width);
}

// One side of a row pass: a factor, its activations, and the kernel that takes them.
struct Side {
  const FactorView& w;
  const MatrixView& activations;
  KernelFactor kernel = kernel_factor(w);
  int act = static_cast<int>(activations.dtype);
  int wt = static_cast<int>(w.weight.dtype);
};

void shrink_block(const Side& in, const MatrixView& h, std::int64_t begin, std::int64_t end) {
  float* hp = static_cast<float*>(h.data);
  for (std::int64_t m = begin; m < end; ++m) {
    std::memset(hp + m * h.row_stride, 0, static_cast<std::size_t>(h.cols) * sizeof(float));
  }
  cpu::active().shrink[in.act][in.wt](in.kernel, in.activations.data, in.activations.row_stride, hp, h.row_stride,
                                      begin, end);
}

void expand_block(const Side& out, const MatrixView& h, std::int64_t begin, std::int64_t end, float* scratch) {
  cpu::active().expand[out.act][out.wt](out.kernel, static_cast<const float*>(h.data), h.row_stride,
                                        out.activations.data, out.activations.row_stride, begin, end, scratch);
}

// Activations of a block of rows under dropout: a float copy that lives in the caller's scratch.
MatrixView masked_rows(const MatrixView& x, std::vector<float>& scratch, std::int64_t first) {
  // Addressed from `first`, so that kernels index it by the rows they are given.
  return {scratch.data() - first * x.cols, x.rows, x.cols, x.cols, DType::kFloat32};
}

// Which side of a row pass dropout acts on: x of the forward pass, dx of the backward pass.
enum class Masked { kNone, kIn, kOut };

// y += expand(shrink(x)); `out` null: shrink alone. h keeps the result of shrink.
void row_pass(const Side& in, const Side* out, const MatrixView& h, int threads, const Dropout& dropout = {},
              Masked masked = Masked::kNone) {
  const std::int64_t rows = in.activations.rows;
  const MatrixView& wide = masked == Masked::kOut ? out->activations : in.activations;
  const std::int64_t block =
      masked == Masked::kNone
          ? kRowBlock
          : std::clamp(kMaskedFloats / wide.cols / cpu::kMaxRowTile * cpu::kMaxRowTile, cpu::kMaxRowTile, kRowBlock);
  double flops = factor_flops(*in.w.factor, rows);
  if (out != nullptr) flops += factor_flops(*out->w.factor, rows);
  const auto run = [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scratch(out == nullptr ? 0
                                              : static_cast<std::size_t>(cpu::kMaxRowTile * out->w.factor->max_rank));
    std::vector<float> values(masked == Masked::kNone ? 0 : static_cast<std::size_t>(block * wide.cols));
    const int type = static_cast<int>(wide.dtype);
    for (std::int64_t m = begin; m < end; m += block) {
      const std::int64_t stop = std::min(end, m + block);
      const MatrixView local = masked_rows(wide, values, m);
      if (masked == Masked::kIn) {
        cpu::active().dropout_copy[type](dropout, wide.data, wide.row_stride, values.data(), wide.cols, m, stop, 0,
                                         wide.cols);
        shrink_block(Side{in.w, local}, h, m, stop);
      } else {
        shrink_block(in, h, m, stop);
      }
      if (out == nullptr) continue;
      if (masked == Masked::kOut) {
        std::fill(values.begin(), values.end(), 0.0f);
        expand_block(Side{out->w, local}, h, m, stop, scratch.data());
        cpu::active().dropout_add[type](dropout, values.data(), wide.cols, wide.data, wide.row_stride, m, stop,
                                        wide.cols);
      } else {
        expand_block(*out, h, m, stop, scratch.data());
      }
    }
  };
  cpu::parallel_for(rows, cpu::kMaxRowTile, cpu::useful_threads(threads, flops), run);
}

struct OuterJob {
  FactorView w;  // weight is the gradient
  const MatrixView* h;
  const MatrixView* x;
  Dropout dropout = {};  // of x
};

struct OuterTask {
  const OuterJob* job;
  const Segment* segment;
  std::int64_t begin, end;
};

// Under dropout the task's columns of x are masked into `slab` [M, columns] first.
void run_outer(const OuterTask& task, std::vector<float>& slab) {
  const OuterJob& job = *task.job;
  const MatrixView& x = *job.x;
  const float* h = static_cast<const float*>(job.h->data);
  if (!job.dropout.active()) {
    cpu::active().outer[static_cast<int>(x.dtype)](kernel_factor(job.w), *task.segment, h, job.h->row_stride, x.data,
                                                   x.row_stride, x.rows, task.begin, task.end);
    return;
  }
  const std::int64_t cols = task.end - task.begin, first = task.segment->col_begin + task.begin;
  slab.resize(static_cast<std::size_t>(x.rows * cols));
  cpu::active().dropout_copy[static_cast<int>(x.dtype)](job.dropout, x.data, x.row_stride, slab.data(), cols, 0, x.rows,
                                                        first, first + cols);
  // The kernel adds the segment's and the task's first column; the slab starts there.
  cpu::active().outer[static_cast<int>(DType::kFloat32)](kernel_factor(job.w), *task.segment, h, job.h->row_stride,
                                                         slab.data() - first, cols, x.rows, task.begin, task.end);
}

// Gradients of several factors in one parallel region; a task is a block of columns of one segment.
void outer_pass(const std::vector<OuterJob>& jobs, int threads) {
  std::vector<OuterTask> tasks;
  double flops = 0.0;
  for (const OuterJob& job : jobs) {
    const Factor& f = *job.w.factor;
    for (std::int64_t r = f.rows; r < job.w.weight.rows; ++r) {
      std::memset(static_cast<float*>(job.w.weight.data) + r * job.w.weight.row_stride, 0,
                  static_cast<std::size_t>(f.width) * sizeof(float));
    }
    for (const Segment& s : f.segments) {
      for (std::int64_t c = 0; c < f.width; c += cpu::kOuterBlock) {
        tasks.push_back({&job, &s, c, std::min(f.width, c + cpu::kOuterBlock)});
      }
    }
    flops += factor_flops(f, job.x->rows);
  }
  const auto run = [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> slab;
    for (std::int64_t t = begin; t < end; ++t) run_outer(tasks[static_cast<std::size_t>(t)], slab);
  };
  cpu::parallel_for(static_cast<std::int64_t>(tasks.size()), 1, cpu::useful_threads(threads, flops), run);
}

// From the gradient of the factor with gates left out: dg_i = <dW_i, W_i>, then dW_i *= g_i. Right at g_i = 0 too.
void gate_gradient(const FactorView& grad, const MatrixView& weight, const float* gate, float* dgate) {
  const cpu::RowDotFn dot = cpu::active().row_dot[static_cast<int>(weight.dtype)][static_cast<int>(DType::kFloat32)];
  const std::int64_t width = grad.factor->width, row_bytes = weight.row_stride * dtype_size(weight.dtype);
  for (std::int64_t i = 0; i < grad.factor->rows; ++i) {
    float* dw = static_cast<float*>(grad.weight.data) + i * grad.weight.row_stride;
    dgate[i] = dot(static_cast<const char*>(weight.data) + i * row_bytes, dw, width);
    for (std::int64_t n = 0; n < width; ++n) dw[n] *= gate[i];
  }
}

}  // namespace

void shrink(const FactorView& w, const MatrixView& x, const MatrixView& h, int threads) {
  check_factor(w, "shrink", "weight");
  check_activations(w, x, "shrink", "x");
  check_hidden(h, w, x.rows, "shrink");
  row_pass(Side{w, x}, nullptr, h, threads);
}

void expand(const FactorView& w, const MatrixView& h, const MatrixView& y, int threads) {
  check_factor(w, "expand", "weight");
  check_activations(w, y, "expand", "y");
  check_hidden(h, w, y.rows, "expand");
  const Side out{w, y};
  const int used = cpu::useful_threads(threads, factor_flops(*w.factor, y.rows));
  cpu::parallel_for(y.rows, cpu::kMaxRowTile, used, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scratch(static_cast<std::size_t>(cpu::kMaxRowTile * w.factor->max_rank));
    expand_block(out, h, begin, end, scratch.data());
  });
}

void outer(const FactorView& w, const MatrixView& h, const MatrixView& x, int threads) {
  check_gradient(w, "outer", "weight");
  check_view(x, w.factor->features, "outer", "x");
  check_hidden(h, w, x.rows, "outer");
  outer_pass({{w, &h, &x}}, threads);
}

void lora_forward(const LoraParams& p, const MatrixView& y) {
  check_forward(p, y);
  const FactorView a = factor_a(p), b = factor_b(p);
  const Side out{b, y};
  row_pass(Side{a, p.x}, &out, p.h, p.threads, p.dropout, p.dropout.active() ? Masked::kIn : Masked::kNone);
}

void lora_backward(const LoraParams& p, const MatrixView& dy, const MatrixView& dh, const MatrixView& dx,
                   const MatrixView& dA, const MatrixView& dB, float* dgate) {
  check_backward(p, dy, dh, dx, dA, dB, dgate);
  const FactorView a = factor_a(p), b = factor_b(p);
  if (dx.data == nullptr) {
    row_pass(Side{b, dy}, nullptr, dh, p.threads);
  } else {
    const Side out{a, dx};
    row_pass(Side{b, dy}, &out, dh, p.threads, p.dropout, p.dropout.active() ? Masked::kOut : Masked::kNone);
  }
  FactorView grad_a = with_weight(a, dA), grad_b = with_weight(b, dB);
  const bool on_a = p.table->gate_on_a();
  FactorView& gated = on_a ? grad_a : grad_b;
  if (dgate != nullptr) gated.row_scale = nullptr;
  outer_pass({{grad_b, &p.h, &dy}, {grad_a, &dh, &p.x, p.dropout}}, p.threads);
  if (dgate != nullptr) gate_gradient(gated, on_a ? p.lora_A : p.lora_B, p.gate, dgate);
}

}  // namespace ardlora
