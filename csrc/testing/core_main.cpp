// The core through its public headers, without Python, for builds with sanitizers: random shapes on every instruction
// set, in memory exactly as large as it must be. Results of three threads must be the bits of one.
//   core_main [cases]     prints the instruction sets
//   core_main FAULT       makes one that a sanitizer must report: past_end, overflow, race
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "ardlora/importance.h"
#include "ardlora/lora_grouped.h"
#include "ardlora/lora_linear.h"
#include "ardlora/orthogonal_rows.h"
#include "ardlora/rank_resize.h"
#include "ardlora/regularizer.h"
#include "ardlora/soft_orthogonality.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

using namespace ardlora;

namespace {

using Count = std::int64_t;

std::mt19937 rng(7);

float random_float() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(rng); }

Count pick(std::initializer_list<Count> from) { return from.begin()[rng() % from.size()]; }

std::vector<float> floats(Count n) {
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = random_float();
  return values;
}

std::vector<double> doubles(Count n, double low, double high) {
  std::vector<double> values(static_cast<std::size_t>(n));
  for (double& v : values) v = std::uniform_real_distribution<double>(low, high)(rng);
  return values;
}

// A matrix that ends where its last row does.
struct Matrix {
  std::vector<char> bytes;
  Count rows, cols, stride;
  DType dtype;

  Matrix(Count row_count, Count col_count, DType type, Count padding = 0)
      : rows(row_count), cols(col_count), stride(col_count + padding), dtype(type) {
    const Count elements = rows == 0 ? 0 : (rows - 1) * stride + cols;
    bytes.resize(static_cast<std::size_t>(elements * dtype_size(type)));
    for (Count i = 0; i < elements; ++i) set(i, random_float());
  }
  void set(Count i, float value) {
    char* to = bytes.data() + i * dtype_size(dtype);
    const BFloat16 b = from_float<BFloat16>(value);
    const Float16 h = from_float<Float16>(value);
    const void* from = &value;
    if (dtype == DType::kBFloat16) from = &b;
    if (dtype == DType::kFloat16) from = &h;
    std::memcpy(to, from, static_cast<std::size_t>(dtype_size(dtype)));
  }
  MatrixView view() { return {bytes.empty() ? nullptr : bytes.data(), rows, cols, stride, dtype}; }
  float* data() { return reinterpret_cast<float*>(bytes.data()); }
};

void expect_same(const std::vector<char>& one, const std::vector<char>& other, const char* what) {
  if (one == other) return;
  std::printf("%s depends on the number of threads\n", what);
  std::exit(1);
}

UnitTable random_table() {
  const auto kind = static_cast<UnitKind>(rng() % 3);
  const Count units = kind == UnitKind::kMatrix ? 1 : pick({1, 2, 5});
  std::vector<Count> ranks;
  for (Count u = 0; u < units; ++u) ranks.push_back(pick({0, 0, 1, 2, 3, 7, 8, 9, 17, 33}));
  return UnitTable(kind, static_cast<Factoring>(rng() % 2), units * pick({1, 3, 16, 43}), units * pick({1, 5, 32, 45}),
                   ranks);
}

// A call with operands of random types and padding.
struct RandomCall {
  UnitTable t;
  Count rows;
  DType type = static_cast<DType>(rng() % 3), adapter = rng() % 2 == 0 ? DType::kFloat32 : type;
  Count padding = pick({0, 0, 1, 3}), slack = pick({0, 0, 4});
  Matrix x{rows, t.a().features, type, padding}, dy{rows, t.b().features, type, padding};
  Matrix a{t.a().rows + slack, t.a().width, adapter}, b{t.b().rows + slack, t.b().width, adapter};
  Matrix y0{rows, t.b().features, type, padding}, dx0{rows, t.a().features, type, padding};
  std::vector<float> gate = floats(t.gate_on_a() ? t.a().rows : t.b().rows);
  bool gated = rng() % 2 == 0 && !gate.empty(), want_dx = rng() % 4 != 0;
  Dropout dropout = rng() % 2 == 0 ? Dropout{} : make_dropout(0.3, rng());

  // Computes on one thread and on three, which must agree in every bit; returns y.
  template <typename Forward, typename Backward>
  Matrix on_any_threads(const char* what, Forward forward, Backward backward) {
    constexpr DType kFloat = DType::kFloat32;
    std::vector<std::vector<char>> first;
    Matrix y = y0;
    for (const int threads : {1, 3}) {
      y = y0;
      Matrix dx = dx0, h(rows, t.hidden() + slack, kFloat), dh(rows, t.hidden() + slack, kFloat);
      Matrix da(a.rows, a.cols, kFloat), db(b.rows, b.cols, kFloat);
      std::vector<float> dgate(gate.size());
      const LoraParams p{&t,   x.view(), a.view(), b.view(), gated ? gate.data() : nullptr,
                         0.5f, h.view(), threads,  dropout};
      forward(p, y.view());
      MatrixView to = dx.view();
      if (!want_dx) to.data = nullptr;
      backward(p, dy.view(), dh.view(), to, da.view(), db.view(), gated ? dgate.data() : nullptr);
      std::vector<char> gates(dgate.size() * sizeof(float));
      if (!gates.empty()) std::memcpy(gates.data(), dgate.data(), gates.size());
      const std::vector<std::vector<char>> found = {y.bytes, dx.bytes, da.bytes, db.bytes, gates};
      if (first.empty()) first = found;
      for (std::size_t i = 0; i < found.size(); ++i) expect_same(found[i], first[i], what);
    }
    return y;
  }
};

void lora_case() {
  RandomCall call{random_table(), pick({0, 1, 2, 9, 40})};
  call.on_any_threads("lora_linear", lora_forward, lora_backward);
}

// Experts with no rows, no rank or neither among them, and rows past the last one's, which must stay as they are.
void grouped_case() {
  const Count experts = pick({1, 2, 5});
  std::vector<Count> ranks, offsets{0};
  for (Count e = 0; e < experts; ++e) {
    ranks.push_back(pick({0, 1, 2, 8, 9, 17}));
    offsets.push_back(offsets.back() + pick({0, 0, 1, 7, 8, 21}));
  }
  const UnitTable t(UnitKind::kExperts, Factoring::kIndependent, pick({1, 3, 16, 43}), pick({1, 5, 32, 45}), ranks);
  RandomCall call{t, offsets.back() + pick({0, 0, 3})};
  const Matrix y = call.on_any_threads(
      "lora_grouped", [&](const LoraParams& p, MatrixView to) { lora_grouped_forward({p, offsets.data()}, to); },
      [&](const LoraParams& p, auto... rest) { lora_grouped_backward({p, offsets.data()}, rest...); });
  const auto past = static_cast<std::size_t>(offsets.back() * y.stride * dtype_size(y.dtype));
  if (past < y.bytes.size() && !std::equal(y.bytes.begin() + static_cast<Count>(past), y.bytes.end(),
                                           call.y0.bytes.begin() + static_cast<Count>(past))) {
    std::puts("lora_grouped writes past the rows of its experts");
    std::exit(1);
  }
}

void resize_case() {
  const Count rows = pick({0, 1, 2, 5, 17}), room = pick({0, 1, 4, 17});
  std::vector<Count> sources(static_cast<std::size_t>(rows));
  for (std::size_t i = 0; i < sources.size(); ++i) sources[i] = static_cast<Count>(i);
  std::shuffle(sources.begin(), sources.end(), rng);
  std::vector<std::vector<Count>> plans(2);
  for (std::size_t i = 0; i < static_cast<std::size_t>(rows); ++i) plans[0].push_back(rng() % 3 == 0 ? -1 : sources[i]);
  for (std::size_t i = 0; i < static_cast<std::size_t>(room); ++i) {
    plans[1].push_back(i < sources.size() && rng() % 3 != 0 ? sources[i] : -1);
  }
  std::vector<std::vector<char>> first;
  const std::mt19937 seed = rng;
  for (const int threads : {1, 3}) {
    rng = seed;
    std::vector<Matrix> buffers;
    std::vector<RowMove> moves;
    for (int i = 0; i < 5; ++i) {
      const Count cols = pick({1, 3, 16});
      buffers.emplace_back(rows, cols, DType::kFloat32);
      buffers.emplace_back(room, cols, DType::kFloat32);
    }
    for (std::size_t i = 0; i < buffers.size(); i += 2) {
      const MatrixView from = buffers[i].view(), to = buffers[i + 1].view();
      moves.push_back({from.data, to.data, 4 * from.cols, rows, 1});
    }
    rank_resize(moves, plans, threads);
    for (std::size_t i = 0; i < moves.size(); ++i)
      moves[i] = {moves[i].src, buffers[2 * i].view().data, moves[i].row_bytes, rows, 0};
    rank_resize(moves, plans, threads);
    std::vector<std::vector<char>> found;
    for (const Matrix& m : buffers) found.push_back(m.bytes);
    if (first.empty()) first = found;
    for (std::size_t i = 0; i < found.size(); ++i) expect_same(found[i], first[i], "rank_resize");
  }
}

void passes_case() {
  std::vector<std::vector<char>> first;
  const std::mt19937 seed = rng;
  for (const int threads : {1, 3}) {
    rng = seed;
    const DType type = static_cast<DType>(rng() % 3);
    std::vector<Matrix> held;
    std::vector<ImportanceBlock> blocks;
    std::vector<RowBlock> rows;
    std::vector<OrthogonalityBlock> pulls;
    std::vector<NewRows> fresh;
    held.reserve(44);
    const auto matrix = [&](Count r, Count c, DType t) -> Matrix& { return held.emplace_back(r, c, t); };
    Count dots = 0;
    for (int i = 0; i < 4; ++i) {
      const Count r = pick({0, 1, 3, 8}), c = pick({1, 2, 15, 16, 17, 70});
      Matrix &weight = matrix(r, c, type), &grad = matrix(r, c, type);
      Matrix &mean = matrix(r, c, DType::kFloat32), &spread = matrix(r, c, DType::kFloat32);
      blocks.push_back({weight.view().data, grad.view().data, mean.data(), spread.data(), r * c, type});
      rows.push_back({weight.view().data, grad.view().data, r, c});
      pulls.push_back({weight.view().data, matrix(r, c, type).view().data, r, c, type});
      std::vector<Count> kept;
      for (Count k = 0; k < r; ++k) {
        if (rng() % 2 == 0) kept.push_back(k);
      }
      const float* others = matrix(r, c, DType::kFloat32).data();
      const Count count = pick({0, 1, 3});
      fresh.push_back({others, r, kept, matrix(count, c, DType::kFloat32).data(), count, c, 0.5f});
      dots += r;
    }
    Matrix out(1, dots, DType::kFloat32);
    row_dots(rows, type, out.data(), threads);
    update_importance(blocks, 0.85, 0.9, threads);
    const std::vector<double> strength = doubles(4, 0.0, 1.0);
    add_soft_orthogonality(pulls, strength.data(), rng() % 2 == 0, threads);
    orthogonal_rows(fresh, threads);
    Matrix drawn(3, 700, DType::kFloat32);
    draw_uniform(drawn.data(), 2100, 11, threads);
    std::vector<std::vector<char>> found = {out.bytes, drawn.bytes};
    for (const Matrix& m : held) found.push_back(m.bytes);
    if (first.empty()) first = found;
    for (std::size_t i = 0; i < found.size(); ++i) expect_same(found[i], first[i], "a pass");
  }
}

void regularizer_case() {
  const Count units = pick({1, 2, 7}), width = pick({1, 5, 9});
  std::vector<Count> live, module_of;
  Count rows = 0;
  for (Count u = 0; u < units; ++u) {
    live.push_back(1 + static_cast<Count>(rng() % static_cast<unsigned>(width)));
    module_of.push_back(u / 2);
    rows += live.back();
  }
  const Count modules = (units + 1) / 2;
  const std::vector<float> dots = floats(rows);
  const std::vector<double> rho = doubles(units, 0.0, static_cast<double>(width)),
                            spectrum = doubles(units * width, 0, 1);
  std::vector<double> fisher = doubles(units, 0, 1), slopes(static_cast<std::size_t>(units));
  secant_slopes({units, dots.data(), live.data(), rho.data(), spectrum.data(), width, 0.9, fisher.data()},
                slopes.data());
  const std::vector<double> own = doubles(units, 1, 9), common = doubles(modules, 0, 9);
  std::vector<double> marginal(static_cast<std::size_t>(units));
  unit_costs({units, own.data(), module_of.data(), rho.data(), modules, common.data()}, marginal.data());
  std::vector<double> alpha = doubles(units, 0, 2);
  const std::vector<double> lo(alpha.size(), 0.1), hi(alpha.size(), 2.0);
  prox_step({units, alpha.data(), slopes.data(), marginal.data(), lo.data(), hi.data(), 0.1, 0.5, 0.2});
  std::vector<float> gates(static_cast<std::size_t>(rows));
  std::vector<GateBlock> blocks;
  for (Count u = 0, at = 0; u < units; at += live[static_cast<std::size_t>(u)], ++u) {
    blocks.push_back({gates.data() + at, live[static_cast<std::size_t>(u)]});
  }
  set_gates(blocks, rho.data(), {static_cast<GateKind>(rng() % 4), 0.05, 0.5});
}

int plant(const std::string& fault) {
  std::vector<int> values(4, 1);
  if (fault == "past_end") return values.data()[rng() % 1 + 4];
  if (fault == "overflow") return 0x7fffffff + values[0];
  int count = 0;
  cpu::parallel_region(2, [&](const cpu::Team& team) { count += static_cast<int>(team.size); });
  return count > 9 ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string word = argc > 1 ? argv[1] : "100";
  if (word == "past_end" || word == "overflow" || word == "race") return plant(word);
  for (const std::string& isa : cpu::available_isas()) {
    cpu::set_isa(isa);
    for (int number = 0; number < std::atoi(word.c_str()); ++number) {
      lora_case();
      grouped_case();
      resize_case();
      passes_case();
      regularizer_case();
    }
    std::printf("%s ", isa.c_str());
  }
  std::puts("held");
}
