#include "ardlora/rank_resize.h"

#include <algorithm>
#include <cstring>

#include "ardlora/check.h"
#include "cpu/parallel.h"

namespace ardlora {
namespace {

using Plan = std::vector<std::int64_t>;

void check_plan(const Plan& plan, std::int64_t src_rows) {
  std::vector<bool> used(static_cast<std::size_t>(src_rows), false);
  for (const std::int64_t source : plan) {
    ARDLORA_CHECK(source >= -1 && source < src_rows, "rank_resize: index must be -1 or a row of ", src_rows, ", got ",
                  source);
    if (source < 0) continue;
    ARDLORA_CHECK(!used[static_cast<std::size_t>(source)], "rank_resize: index must use each row once, got ", source,
                  " twice");
    used[static_cast<std::size_t>(source)] = true;
  }
}

// Whether `next` goes on where `step` ends, from row to row.
bool follows(RowStep step, RowStep next) {
  const bool zeros = step.from == kZeroRow && next.from == kZeroRow;
  return step.to >= 0 && next.to == step.to + 1 && (zeros || (step.from >= 0 && next.from == step.from + 1));
}

// `held` has room for one row.
void run(const RowMove& move, const std::vector<RowStep>& steps, char* held) {
  const char* src = static_cast<const char*>(move.src);
  char* dst = static_cast<char*>(move.dst);
  if (move.row_bytes == 0) return;
  const bool apart = move.src != move.dst;  // then neighbours move as one piece
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const RowStep step = steps[i];
    std::int64_t rows = 1;
    for (; apart && i + 1 < steps.size() && follows(steps[i], steps[i + 1]); ++i) ++rows;
    const auto bytes = static_cast<std::size_t>(rows * move.row_bytes);
    char* to = step.to == kHeldRow ? held : dst + step.to * move.row_bytes;
    if (step.from == kZeroRow) {
      std::memset(to, 0, bytes);
    } else {
      std::memcpy(to, step.from == kHeldRow ? held : src + step.from * move.row_bytes, bytes);
    }
  }
}

std::int64_t bytes_of(const RowMove& move, const std::vector<Plan>& plans) {
  return move.row_bytes * static_cast<std::int64_t>(plans[static_cast<std::size_t>(move.plan)].size());
}

// Of a move: which steps, those of its plan or those of its plan in place.
std::size_t steps_of(const RowMove& move) { return static_cast<std::size_t>(2 * move.plan + (move.src == move.dst)); }

}  // namespace

// The map row <- index[row] consists of chains and cycles. A chain is written from the end that nobody reads, so a
// row is overwritten only after it has moved on; a cycle keeps its first row aside. Zero rows come last.
std::vector<RowStep> row_steps(const std::vector<std::int64_t>& plan, bool in_place) {
  std::vector<RowStep> steps;
  const auto n = static_cast<std::int64_t>(plan.size());
  const auto source_of = [&](std::int64_t row) { return row < n ? plan[static_cast<std::size_t>(row)] : kZeroRow; };
  const auto step = [&](std::int64_t to, std::int64_t from) {
    steps.push_back({static_cast<std::int32_t>(to), static_cast<std::int32_t>(from)});
  };
  if (!in_place) {
    for (std::int64_t row = 0; row < n; ++row) step(row, source_of(row));
    return steps;
  }
  std::vector<bool> read(plan.size(), false), done(plan.size(), false);
  for (const std::int64_t source : plan) {
    if (source >= 0 && source < n) read[static_cast<std::size_t>(source)] = true;
  }
  const auto follow = [&](std::int64_t row, std::int64_t stop) {
    while (source_of(row) >= 0 && source_of(row) != stop) {
      step(row, source_of(row));
      done[static_cast<std::size_t>(row)] = true;
      row = source_of(row);
    }
    return row;
  };
  for (std::int64_t row = 0; row < n; ++row) {
    if (!read[static_cast<std::size_t>(row)]) follow(row, kHeldRow);
  }
  for (std::int64_t row = 0; row < n; ++row) {
    if (done[static_cast<std::size_t>(row)] || source_of(row) < 0 || source_of(row) == row) continue;
    step(kHeldRow, row);
    const std::int64_t last = follow(row, row);
    step(last, kHeldRow);
    done[static_cast<std::size_t>(last)] = true;
  }
  for (std::int64_t row = 0; row < n; ++row) {
    if (source_of(row) < 0) step(row, kZeroRow);
  }
  return steps;
}

void check_moves(const std::vector<RowMove>& moves, const std::vector<Plan>& plans) {
  std::vector<std::int64_t> fits(plans.size(), -1);  // the source rows that a plan was checked with last
  for (const RowMove& move : moves) {
    ARDLORA_CHECK(move.plan >= 0 && move.plan < static_cast<std::int64_t>(plans.size()),
                  "rank_resize: plan must be one of ", plans.size(), ", got ", move.plan);
    ARDLORA_CHECK(move.row_bytes >= 0 && move.src_rows >= 0, "rank_resize: sizes must be >= 0, got ", move.row_bytes,
                  " bytes x ", move.src_rows, " rows");
    const Plan& plan = plans[static_cast<std::size_t>(move.plan)];
    ARDLORA_CHECK(plan.empty() || move.row_bytes == 0 || move.dst != nullptr, "rank_resize: dst must not be null");
    ARDLORA_CHECK(move.src != move.dst || static_cast<std::int64_t>(plan.size()) <= move.src_rows,
                  "rank_resize: an in-place move must not exceed its ", move.src_rows, " rows, got ", plan.size());
    std::int64_t& last = fits[static_cast<std::size_t>(move.plan)];
    if (last != move.src_rows) check_plan(plan, move.src_rows);
    last = move.src_rows;
  }
}

void rank_resize(const std::vector<RowMove>& moves, const std::vector<Plan>& plans, int threads) {
  check_moves(moves, plans);
  // All memory is there before the first row moves: from then on nothing can fail.
  std::int64_t total_bytes = 0, row_bytes = 0;
  std::vector<std::vector<RowStep>> steps(2 * plans.size());
  for (const RowMove& move : moves) {
    const Plan& plan = plans[static_cast<std::size_t>(move.plan)];
    total_bytes += bytes_of(move, plans);
    row_bytes = std::max(row_bytes, move.row_bytes);
    std::vector<RowStep>& way = steps[steps_of(move)];
    if (way.empty()) way = row_steps(plan, move.src == move.dst);
  }
  const auto total = static_cast<double>(total_bytes);
  const int used = cpu::useful_threads(threads, total);
  std::vector<char> held(static_cast<std::size_t>(used * row_bytes));
  // One buffer belongs to one thread: no two threads touch one address.
  cpu::parallel_region(used, [&](const cpu::Team& team) {
    std::int64_t before = 0;
    for (const RowMove& move : moves) {
      const std::int64_t bytes = bytes_of(move, plans);
      if (bytes > 0 && team.owns(static_cast<double>(before), total)) {
        run(move, steps[steps_of(move)], held.data() + team.id * row_bytes);
      }
      before += bytes;
    }
  });
}

}  // namespace ardlora
