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

void gather(const RowMove& move, const Plan& plan) {
  const char* src = static_cast<const char*>(move.src);
  char* dst = static_cast<char*>(move.dst);
  const auto bytes = static_cast<std::size_t>(move.row_bytes);
  for (const std::int64_t source : plan) {
    if (source < 0) {
      std::memset(dst, 0, bytes);
    } else {
      std::memcpy(dst, src + source * move.row_bytes, bytes);
    }
    dst += move.row_bytes;
  }
}

// The map row <- index[row] consists of chains and cycles. A chain is written from the end that nobody reads, so a
// row is overwritten only after it has moved on; a cycle keeps its first row in scratch. Zero rows come last.
void gather_in_place(const RowMove& move, const Plan& plan) {
  char* base = static_cast<char*>(move.dst);
  const auto bytes = static_cast<std::size_t>(move.row_bytes);
  const auto n = static_cast<std::int64_t>(plan.size());
  const auto source_of = [&](std::int64_t row) { return row < n ? plan[static_cast<std::size_t>(row)] : -1; };
  const auto copy = [&](std::int64_t to, std::int64_t from) {
    std::memcpy(base + to * move.row_bytes, base + from * move.row_bytes, bytes);
  };
  std::vector<bool> read(static_cast<std::size_t>(std::max(n, move.src_rows)), false), done(read.size(), false);
  for (const std::int64_t source : plan) {
    if (source >= 0) read[static_cast<std::size_t>(source)] = true;
  }
  const auto follow = [&](std::int64_t row, std::int64_t stop) {
    while (source_of(row) >= 0 && source_of(row) != stop && !done[static_cast<std::size_t>(row)]) {
      copy(row, source_of(row));
      done[static_cast<std::size_t>(row)] = true;
      row = source_of(row);
    }
    return row;
  };
  for (std::int64_t row = 0; row < n; ++row) {
    if (!read[static_cast<std::size_t>(row)]) follow(row, -1);
  }
  std::vector<char> scratch(bytes);
  for (std::int64_t row = 0; row < n; ++row) {
    if (done[static_cast<std::size_t>(row)] || source_of(row) < 0 || source_of(row) == row) continue;
    std::memcpy(scratch.data(), base + row * move.row_bytes, bytes);
    const std::int64_t last = follow(row, row);
    std::memcpy(base + last * move.row_bytes, scratch.data(), bytes);
    done[static_cast<std::size_t>(last)] = true;
  }
  for (std::int64_t row = 0; row < n; ++row) {
    if (source_of(row) < 0) std::memset(base + row * move.row_bytes, 0, bytes);
  }
}

}  // namespace

void rank_resize(const std::vector<RowMove>& moves, const std::vector<Plan>& plans, int threads) {
  std::int64_t total_bytes = 0;
  for (const RowMove& move : moves) {  // everything is checked before anything moves
    ARDLORA_CHECK(move.plan >= 0 && move.plan < static_cast<std::int64_t>(plans.size()),
                  "rank_resize: plan must be one of ", plans.size(), ", got ", move.plan);
    ARDLORA_CHECK(move.row_bytes >= 0 && move.src_rows >= 0, "rank_resize: sizes must be >= 0, got ", move.row_bytes,
                  " bytes x ", move.src_rows, " rows");
    const Plan& plan = plans[static_cast<std::size_t>(move.plan)];
    ARDLORA_CHECK(plan.empty() || move.row_bytes == 0 || move.dst != nullptr, "rank_resize: dst must not be null");
    ARDLORA_CHECK(move.src != move.dst || static_cast<std::int64_t>(plan.size()) <= move.src_rows,
                  "rank_resize: an in-place move must not exceed its ", move.src_rows, " rows, got ", plan.size());
    check_plan(plan, move.src_rows);
    total_bytes += move.row_bytes * static_cast<std::int64_t>(plan.size());
  }
  // One buffer belongs to one thread: no two threads touch one address.
  const int used = cpu::useful_threads(threads, static_cast<double>(total_bytes));
  cpu::parallel_for(static_cast<std::int64_t>(moves.size()), 1, used, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const RowMove& move = moves[static_cast<std::size_t>(i)];
      const Plan& plan = plans[static_cast<std::size_t>(move.plan)];
      if (move.src == move.dst) {
        gather_in_place(move, plan);
      } else {
        gather(move, plan);
      }
    }
  });
}

}  // namespace ardlora
