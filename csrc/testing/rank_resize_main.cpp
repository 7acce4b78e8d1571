// The resize kernel against a plain gather, through its table and launcher. "small": few cases, for slow builds.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/resize_table.h"
#include "testing/cases.h"

namespace {

using namespace ardlora;
using Plan = std::vector<std::int64_t>;
using Bytes = std::vector<unsigned char>;

constexpr std::int64_t kRowBytes[] = {1, 6, 20, 37, 128, 148, 2064, 4096};

struct Case {
  std::vector<Bytes> src, dst;
  std::vector<Plan> plans;
  std::vector<RowMove> moves;
};

Plan random_plan(std::mt19937& rng, std::int64_t rows, bool in_place) {
  Plan order(static_cast<std::size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), rng);
  order.resize(rng() % (order.size() + 1));
  const std::size_t room = static_cast<std::size_t>(rows) - order.size();
  order.insert(order.end(), in_place ? rng() % (room + 1) : rng() % 4, kZeroRow);
  if (rng() % 2 == 0) std::shuffle(order.begin(), order.end(), rng);
  return order;
}

Case random_case(std::mt19937& rng, int buffers, std::int64_t max_rows) {
  Case c;
  for (int i = 0; i < buffers; ++i) {
    const auto rows = static_cast<std::int64_t>(rng() % static_cast<unsigned>(max_rows + 1));
    const bool in_place = rng() % 3 != 0;
    const std::int64_t bytes = kRowBytes[rng() % std::size(kRowBytes)];
    Bytes src(static_cast<std::size_t>(rows * bytes));
    for (auto& b : src) b = static_cast<unsigned char>(rng() % 255 + 1);
    c.plans.push_back(random_plan(rng, rows, in_place));
    c.dst.emplace_back(in_place ? 0 : c.plans.back().size() * static_cast<std::size_t>(bytes), 0xee);
    c.src.push_back(std::move(src));
    void* from = c.src.back().data();
    c.moves.push_back({from, in_place ? from : c.dst.back().data(), bytes, rows, i});
  }
  return c;
}

bool run(std::mt19937& rng, int buffers, std::int64_t max_rows) {
  Case c = random_case(rng, buffers, max_rows);
  const std::vector<Bytes> before = c.src;
  const cuda::ResizeTable table = cuda::resize_table(c.moves, c.plans);
  cuda::rank_resize(table.words.data(), table.jobs, table.blocks, {});
  for (std::size_t i = 0; i < c.moves.size(); ++i) {
    const RowMove& m = c.moves[i];
    const auto bytes = static_cast<std::size_t>(m.row_bytes);
    const bool in_place = m.src == m.dst;
    const Bytes& got = in_place ? c.src[i] : c.dst[i];
    Bytes want = in_place ? before[i] : Bytes(got.size());
    for (std::size_t row = 0; row < c.plans[i].size(); ++row) {
      const std::int64_t source = c.plans[i][row];
      const auto to = want.begin() + static_cast<std::ptrdiff_t>(row * bytes);
      if (source < 0) {
        std::fill_n(to, bytes, static_cast<unsigned char>(0));
      } else {
        std::copy_n(before[i].begin() + static_cast<std::ptrdiff_t>(source * m.row_bytes), bytes, to);
      }
    }
    if (got != want || (!in_place && c.src[i] != before[i])) {
      std::printf("buffer %zu differs: %zu rows of %zu bytes, in_place %d\n", i, c.plans[i].size(), bytes, in_place);
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const bool few = testing::small(argc, argv);
  std::mt19937 rng(7);
  const int cases = few ? 20 : 200;
  for (int i = 0; i < cases; ++i) {
    testing::set_order(static_cast<unsigned>(i));
    if (!run(rng, few ? 3 : 6, few ? 9 : 40)) return 1;
  }
  std::printf("%d cases\n", cases);
  return 0;
}
