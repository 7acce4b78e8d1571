// The LoRA linear's kernels through their launchers, forward and backward, against the equations in double.
// Half of the cases have small whole numbers, for which every step is exact: results must be equal. The others have
// random numbers and a bound that follows from the roundings.
#include <algorithm>
#include <cinttypes>

#include "cuda/gemm_plan.h"
#include "cuda/lora_linear.h"
#include "cuda/segment_table.h"
#include "testing/lora_reference.h"

namespace {

using namespace ardlora;
using namespace ardlora::testing;
using Ranks = std::vector<std::int64_t>;

struct Shape {
  std::int64_t rows, in_features, out_features;
};

struct Case {
  UnitKind kind;
  Factoring factoring;
  Ranks ranks;
  Shape shape;
  DType activations, adapters;
  std::int64_t padding = 0;  // elements between rows
  std::int64_t shift = 0;    // elements before the first row
  std::int64_t slack = 0;    // rows of the factors past the live ones
  int multiprocessors = 8;   // decide how sums are divided
  bool gates = false, dropout = false, dx = true, dgate = false, exact = true;
  bool seed_in_memory = false;
  bool fresh = false, bias = false;                    // y and dx are written, not added to
  bool spoiled = false;                                // NaN in row 0 of x and dy: no other row may see it
  std::vector<std::int64_t> offsets = {}, given = {};  // of experts; `given` to the device, not all of it valid
};

std::string describe(const Case& c) {
  constexpr const char* kKinds[] = {"matrix", "out_heads", "in_heads", "experts"};
  std::string ranks;
  for (const std::int64_t r : c.ranks) ranks += std::to_string(r) + " ";
  for (const std::int64_t o : c.offsets) ranks += (o == 0 ? "rows to " : "") + std::to_string(o) + " ";
  char text[400];
  std::snprintf(text, sizeof text,
                "%s %s, ranks %s, %" PRId64 " rows %" PRId64 " to %" PRId64 ", %s with %s adapters, padding %" PRId64
                ", shift %" PRId64 ", slack %" PRId64
                ", multiprocessors %d, gates %d, dropout %d, dx %d, dgate %d, exact %d, spoiled %d, seed in memory %d, "
                "fresh %d, bias %d",
                kKinds[static_cast<int>(c.kind)], c.factoring == Factoring::kShared ? "shared" : "independent",
                ranks.c_str(), c.shape.rows, c.shape.in_features, c.shape.out_features, dtype_name(c.activations),
                dtype_name(c.adapters), c.padding, c.shift, c.slack, c.multiprocessors, c.gates, c.dropout, c.dx,
                c.dgate, c.exact, c.spoiled, c.seed_in_memory, c.fresh, c.bias);
  return text;
}

// How far one rounding to the activations' type moves a value, relative; for float the three tf32 products.
double rounding(DType dtype) {
  return dtype == DType::kBFloat16 ? 0x1p-9 : (dtype == DType::kFloat16 ? 0x1p-12 : 0x1p-21);
}

class Run {
 public:
  explicit Run(const Case& c) : c_(c), table_(c.kind, c.factoring, c.shape.in_features, c.shape.out_features, c.ranks) {
    const Factor &a = table_.a(), &b = table_.b();
    x_ = make(c.shape.rows, c.shape.in_features);
    y_ = make(c.shape.rows, c.shape.out_features);
    dy_ = make(c.shape.rows, c.shape.out_features);
    dx_ = make(c.shape.rows, c.shape.in_features);
    a_ = Matrix(c.adapters, a.rows + c.slack, a.width);
    b_ = Matrix(c.adapters, b.rows + c.slack, b.width);
    // A whole class of columns more, as where the factors have room for more ranks.
    h_ = Matrix(c.activations, c.shape.rows, table_.hidden() + c.slack);
    dh_ = h_;
    da_ = Matrix(DType::kFloat32, a_.rows, a_.cols);
    db_ = Matrix(DType::kFloat32, b_.rows, b_.cols);
    for (Matrix* m : {&x_, &y_, &dy_, &dx_, &a_, &b_}) m->fill([&] { return value(); });
    for (std::int64_t j = 0; c.spoiled && c.shape.rows > 0 && j < 8; ++j) {
      x_.set(0, j, std::nan(""));
      dy_.set(0, j, std::nan(""));
    }
    const std::int64_t gated = table_.gate_on_a() ? a.rows : b.rows;
    if (c.gates) {
      for (std::int64_t i = 0; i < gated; ++i)
        gate_.push_back(c.exact ? static_cast<float>(rng() % 4) - 1.0f : random_float());
      if (!gate_.empty()) gate_[0] = 0.0f;
    }
    dgate_.assign(gate_.size(), std::nanf(""));
    if (c.dropout) dropout_ = make_dropout(0.5, rng() | std::uint64_t{rng()} << 32);
    if (c.dropout && experts()) {
      for (std::int64_t m = 0; m < c.shape.rows; ++m) places_.push_back(rng());
      dropout_.rows = places_.data();
      dropout_.count = c.shape.rows;
    }
  }

  void operator()() {
    Matrix y_before = y_, dx_before = dx_;
    if (fresh()) {
      bias_ = Matrix(c_.activations, 1, c_.shape.out_features);
      for (std::int64_t j = 0; j < y_.cols; ++j) bias_.set(0, j, c_.bias ? static_cast<double>(j % 3 - 1) : 0.0);
      for (std::int64_t i = 0; i < y_.rows; ++i) {
        for (std::int64_t j = 0; j < y_.cols; ++j) y_before.set(i, j, bias_.at(0, j));
        for (std::int64_t j = 0; j < dx_.cols; ++j) dx_before.set(i, j, 0.0);
      }
      for (Matrix* m : {&y_, &dx_}) m->fill([] { return std::nan(""); });
    }
    call();
    const Side a{table_.a(), a_, table_.gate_on_a() ? gate() : nullptr, 1.0, row_range()};
    const Side b{table_.b(), b_, table_.gate_on_a() ? nullptr : gate(), kScaling, row_range()};
    const std::int64_t hidden = table_.hidden();
    const Sums h = reference_shrink(a, x_, hidden, dropout_), dh = reference_shrink(b, dy_, hidden, {});
    compare(h, h_, "H", 2);
    compare(reference_expand(b, h, c_.shape.rows, {}), y_, "y", 5, &y_before);
    compare(dh, dh_, "dH", 2);
    if (c_.dx) compare(reference_expand(a, dh, c_.shape.rows, dropout_), dx_, "dx", 5, &dx_before);
    if (!c_.spoiled) {
      compare_gradient(a, reference_outer(a, dh, x_, dropout_), da_, "dA");
      compare_gradient(b, reference_outer(b, h, dy_, {}), db_, "dB");
    }
    for (const Matrix* m : {&x_, &y_, &dy_, &dx_}) expect(m->padding_untouched(), "%s: padding", name().c_str());
  }

 private:
  static constexpr double kScaling = 2.0;

  Matrix make(std::int64_t rows, std::int64_t cols) const {
    return Matrix(c_.activations, rows, cols, c_.padding, c_.shift);
  }
  double value() const { return c_.exact ? static_cast<double>(rng() % 3) - 1.0 : random_float(); }
  const float* gate() const { return gate_.empty() ? nullptr : gate_.data(); }
  std::string name() const { return describe(c_); }

  void call() {
    simt::multiprocessors = c_.multiprocessors;
    std::vector<std::int64_t> words = cuda::segment_table(table_);
    const cuda::LoraPlans plans = cuda::plan_lora(table_, c_.shape.rows, c_.activations, dropout_.active(), 0);
    const std::int64_t bytes = plans.workspace;
    std::vector<float> workspace(static_cast<std::size_t>(bytes / 4), std::nanf(""));
    const cuda::DeviceCall call{&plans, words.data(), workspace.data(), bytes, {}};
    Dropout dropout = dropout_;
    if (c_.seed_in_memory) {
      dropout.seed_at = &dropout_.seed;
      dropout.seed = 0;
    }
    const LoraParams p{&table_,   x_.view(), a_.view(), b_.view(), gate(), static_cast<float>(kScaling),
                       h_.view(), 1,         dropout};
    MatrixView dx = dx_.view();
    if (!c_.dx) dx.data = nullptr;
    float* const dgate = c_.dgate && gate() != nullptr ? dgate_.data() : nullptr;
    simt::begins = {};
    if (experts()) {
      const GroupedParams grouped{p, c_.given.data()};
      cuda::lora_grouped_forward(grouped, y_.view(), call);
      expect_one_first();
      cuda::lora_grouped_backward(grouped, dy_.view(), dh_.view(), dx, da_.view(), db_.view(), dgate, call);
    } else {
      const cuda::Onto onto{fresh(), c_.bias && fresh() ? bias_.view().data : nullptr};
      cuda::lora_forward(p, y_.view(), call, onto);
      expect_one_first();
      cuda::lora_backward(p, dy_.view(), dh_.view(), dx, da_.view(), db_.view(), dgate, call, onto);
    }
    expect_one_first();
  }

  // All launches of a call but its first follow one of ours.
  void expect_one_first() const {
    const auto [launches, following, _] = simt::begins;
    expect(launches - following == (launches > 0 ? 1u : 0u), "%s: %u of %u launches follow another, which",
           name().c_str(), following, launches);
    simt::begins = {};
  }

  bool fresh() const {
    return c_.fresh && !experts() && std::ranges::all_of(c_.ranks, [](std::int64_t r) { return r > 0; });
  }
  bool experts() const { return c_.kind == UnitKind::kExperts; }
  // Those of each expert that has ranks, as the factors' segments.
  std::vector<std::int64_t> row_range() const {
    std::vector<std::int64_t> rows;
    for (std::size_t e = 0; experts() && e < c_.ranks.size(); ++e) {
      if (c_.ranks[e] > 0) rows.insert(rows.end(), {c_.offsets[e], c_.offsets[e + 1]});
    }
    return rows;
  }
  // Columns of H past an expert's rank, and rows of no expert, are not written.
  std::int64_t hidden(std::int64_t row) const {
    if (!experts()) return table_.hidden();
    for (std::size_t e = 0; e < c_.ranks.size(); ++e) {
      if (row >= c_.offsets[e] && row < c_.offsets[e + 1]) return c_.ranks[e];
    }
    return 0;
  }

  // `roundings` to the activations' type lie on the way to a term; the sums themselves are float.
  void expect_close(double want, double size, double got, double roundings, double of_result, const char* what,
                    std::int64_t i, std::int64_t j) const {
    const double terms = static_cast<double>(c_.shape.rows + c_.shape.in_features + c_.shape.out_features);
    const double bound =
        c_.exact ? 0.0
                 : size * (roundings * rounding(c_.activations) + terms * 0x1p-24) + std::abs(want) * of_result + 1e-7;
    expect(std::abs(got - want) <= bound, "%s: %s[%" PRId64 ", %" PRId64 "] = %.9g, expected %.9g +- %.3g",
           name().c_str(), what, i, j, got, want, bound);
  }

  void compare(const Sums& want, const Matrix& got, const char* what, double roundings,
               const Matrix* before = nullptr) {
    const double of_result = got.dtype == DType::kFloat32 ? 0x1p-22 : rounding(got.dtype);
    for (std::int64_t i = c_.spoiled ? 1 : 0; i < got.rows; ++i) {
      const std::int64_t cols = before == nullptr ? hidden(i) : want.cols;
      for (std::int64_t j = 0; j < cols; ++j) {
        const double base = before == nullptr ? 0.0 : before->at(i, j);
        double value = base + want.value[want.index(i, j)];
        if (c_.exact) value = got.rounded(value);
        expect_close(value, std::abs(base) + want.size[want.index(i, j)], got.at(i, j), roundings, of_result, what, i,
                     j);
      }
    }
  }

  // dW without its gates, and where a gate's gradient is asked for also <dW_i, W_i>; dead rows are zero.
  void compare_gradient(const Side& w, const Sums& raw, const Matrix& got, const char* what) {
    const bool gated = w.gate != nullptr;
    for (std::int64_t i = 0; i < got.rows; ++i) {
      const bool live = i < w.factor.rows;
      const double gate = gated && live ? w.gate[i] : 1.0;
      double dgate = 0.0, dgate_size = 0.0;
      for (std::int64_t j = 0; j < got.cols; ++j) {
        const double value = raw.value[raw.index(i, j)], size = raw.size[raw.index(i, j)];
        expect_close(live ? gate * value : 0.0, std::abs(gate) * size, got.at(i, j), 5, 0x1p-22, what, i, j);
        dgate += live ? value * w.weight.at(i, j) : 0.0;
        dgate_size += live ? size * std::abs(w.weight.at(i, j)) : 0.0;
      }
      if (gated && live && c_.dgate) {
        expect_close(dgate, dgate_size, dgate_[static_cast<std::size_t>(i)], 5, 0x1p-22, "dgate", i, 0);
      }
    }
  }

  Case c_;
  UnitTable table_;
  Matrix x_, y_, dy_, dx_, a_, b_, h_, dh_, da_, db_, bias_;
  std::vector<float> gate_, dgate_;
  std::vector<std::int64_t> places_;
  Dropout dropout_;
};

template <typename T, std::size_t n>
const T& pick(const T (&values)[n]) {
  return values[rng() % n];
}

constexpr std::pair<DType, DType> kTypes[] = {{DType::kBFloat16, DType::kFloat32},
                                              {DType::kBFloat16, DType::kBFloat16},
                                              {DType::kFloat16, DType::kFloat32},
                                              {DType::kFloat16, DType::kFloat16},
                                              {DType::kFloat32, DType::kFloat32}};
const Ranks kMatrixRanks[] = {{0}, {1}, {7}, {8}, {37}, {64}, {200}};
const Ranks kHeadRanks[] = {{0, 0, 0, 0}, {8, 8, 8, 8}, {3, 0, 8, 5}, {0, 37, 1, 12}, {16, 64, 0, 4}};

// Every option drawn from its list; `number` walks through types and ranks, so that each is met.
Case draw(unsigned number, bool few) {
  constexpr std::int64_t rows[] = {0, 1, 5, 64, 129, 300}, features[] = {64, 72, 100, 136, 264};
  constexpr int multiprocessors[] = {1, 3, 8, 54};
  constexpr std::int64_t padding[] = {0, 0, 8, 3}, shift[] = {0, 0, 8, 1}, slack[] = {0, 1, 3, 4};
  Case c{};
  c.multiprocessors = multiprocessors[number % 4];
  c.kind = static_cast<UnitKind>(number % 3);
  c.factoring = static_cast<Factoring>(number / 3 % 2);
  c.ranks = c.kind == UnitKind::kMatrix ? kMatrixRanks[number / 3 % std::size(kMatrixRanks)]
                                        : kHeadRanks[number / 3 % std::size(kHeadRanks)];
  c.shape = few ? Shape{rows[number % 5], 264, number % 2 == 0 ? 100 : 136}
                : Shape{pick(rows), pick(features), pick(features)};
  std::tie(c.activations, c.adapters) = kTypes[number % std::size(kTypes)];
  c.padding = pick(padding);
  c.shift = pick(shift);
  c.slack = pick(slack);
  c.gates = rng() % 2 == 0;
  c.dgate = rng() % 2 == 0;
  c.dropout = rng() % 3 == 0;
  c.dx = rng() % 4 != 0;
  c.exact = rng() % 2 == 0;
  c.spoiled = rng() % 5 == 0;
  c.seed_in_memory = number % 2 == 0;
  c.fresh = number % 4 < 2;
  c.bias = number % 3 > 0;
  return c;
}

// As `draw`, of heads with factors of their own, whose columns of H begin anywhere.
Case draw_ragged(unsigned number, bool few) {
  constexpr std::int64_t features[] = {64, 72, 104, 136, 264};
  Case c = draw(number, few);
  c.kind = number % 2 == 0 ? UnitKind::kOutHeads : UnitKind::kInHeads;
  c.factoring = Factoring::kIndependent;
  c.ranks.assign(number % 3 == 0 ? 8 : 4, 0);
  for (std::int64_t& r : c.ranks) r = static_cast<std::int64_t>(rng() % (number % 4 == 0 ? 45 : 18));
  c.shape = {c.shape.rows, pick(features), pick(features)};
  return c;
}

const Ranks kWideMatrixRanks[] = {{65}, {100}, {128}, {129}, {200}, {232}, {300}};
const Ranks kWideUnitRanks[] = {{70, 0, 5, 129}, {129, 66}};

// As `draw`, of rows and ranks with which blocks are wide.
Case draw_wide(unsigned number, bool few) {
  constexpr std::int64_t features[] = {64, 100, 136, 264};
  Case c = draw(number, few);
  std::tie(c.activations, c.adapters) = kTypes[number % 4];
  c.multiprocessors = number % 2 == 0 ? 3 : 10;
  c.shape = {few ? 129 : 129 + 65 * (number % 3), few ? 72 : pick(features), few ? 72 : pick(features)};
  c.kind = UnitKind::kMatrix;
  c.ranks = kWideMatrixRanks[number % std::size(kWideMatrixRanks)];
  if (number % 3 == 1) {
    c.kind = number % 2 == 0 ? UnitKind::kOutHeads : UnitKind::kInHeads;
    c.ranks = kWideUnitRanks[number / 3 % 2];
  } else if (number % 12 == 5) {
    c.kind = UnitKind::kExperts;
    c.factoring = Factoring::kIndependent;
    c.ranks = {100, 70};
    c.shape.rows = 300;
    c.offsets = {0, 70, 290};
    c.given = c.offsets;
    c.spoiled = false;
  }
  return c;
}

const Ranks kExpertRanks[] = {
    {8}, {3, 0, 8, 5}, {1, 1, 1, 1}, {0, 0, 0}, {0, 37, 1, 12}, {16, 64, 0, 4}, {100, 1, 0, 70}};

// As `draw`, of experts: rows cut at random, so that some have none, one has half, or some belong to no expert.
Case draw_experts(unsigned number, bool few) {
  constexpr std::int64_t rows[] = {0, 1, 5, 64, 129, 300, 700}, most[] = {700, 64, 1500, 4096, 1500};
  Case c = draw(number, few);
  c.kind = UnitKind::kExperts;
  c.factoring = Factoring::kIndependent;
  c.ranks = kExpertRanks[number % std::size(kExpertRanks)];
  if (number % 40 == 2) {  // more than the lanes that cut the rows
    c.ranks.assign(70, 0);
    for (std::int64_t& r : c.ranks) r = static_cast<std::int64_t>(rng() % 4);
  }
  c.shape.rows = few ? rows[number % 6] : rows[number % 7];
  if (!few && number % 9 == 1) {
    c.shape = {most[number / 9 % 5], 136, 72};
    c.spoiled = false;
  }
  c.offsets = {0};
  const std::int64_t used = c.shape.rows - (rng() % 3 == 0 ? c.shape.rows / 8 : 0);
  for (std::size_t e = 1; e < c.ranks.size(); ++e) {
    c.offsets.push_back(used == 0 ? 0 : static_cast<std::int64_t>(rng() % static_cast<unsigned>(used)));
    if (e == 1 && rng() % 3 == 0) c.offsets.back() = used / 2;
    if (rng() % 4 == 0) c.offsets.back() = c.offsets[e - 1];  // none for the one before
  }
  c.offsets.push_back(used);
  const bool bad = rng() % 5 == 0;  // not ascending, or outside the rows: rows stay with the first that has them
  if (bad) c.offsets[rng() % c.offsets.size()] = rng() % 2 == 0 ? c.shape.rows + 200 : -7;
  if (!bad) std::sort(c.offsets.begin(), c.offsets.end());
  c.given = c.offsets;
  for (std::size_t e = 0; e < c.offsets.size(); ++e) {
    c.offsets[e] = std::clamp<std::int64_t>(c.offsets[e], 0, c.shape.rows);
    if (e > 0) c.offsets[e] = std::max(c.offsets[e], c.offsets[e - 1]);
  }
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  const bool few = small(argc, argv);
  const unsigned cases = few ? 12 : 105, of_experts = few ? 8 : 42, ragged = few ? 2 : 12;
  const unsigned wide = few ? 3 : 24;
  std::mt19937 for_experts(4), for_ragged(5), for_wide(6);
  for (unsigned i = 0; i < cases; ++i) {
    set_order(i);
    Run{draw(i, few)}();
    if (i < ragged) {
      std::swap(rng, for_ragged);  // the others' numbers stay
      Run{draw_ragged(i, few)}();
      std::swap(rng, for_ragged);
    }
    if (i < wide) {
      std::swap(rng, for_wide);
      Run{draw_wide(i, few)}();
      std::swap(rng, for_wide);
    }
    if (i >= of_experts) continue;
    std::swap(rng, for_experts);
    Run{draw_experts(i, few)}();
    std::swap(rng, for_experts);
  }
  std::printf("%u cases equal the equations\n", cases + of_experts + ragged + wide);
  return 0;
}
