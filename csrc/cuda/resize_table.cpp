#include "cuda/resize_table.h"

#include <cstring>

#include "ardlora/check.h"

namespace ardlora::cuda {
namespace {

std::int64_t word_size(const RowMove& move) {
  const std::uint64_t bits = reinterpret_cast<std::uint64_t>(move.src) | reinterpret_cast<std::uint64_t>(move.dst) |
                             static_cast<std::uint64_t>(move.row_bytes);
  for (const std::int64_t word : {16, 4, 2}) {
    if (bits % static_cast<std::uint64_t>(word) == 0) return word;
  }
  return 1;
}

}  // namespace

ResizeTable resize_table(const std::vector<RowMove>& moves, const std::vector<std::vector<std::int64_t>>& plans) {
  check_moves(moves, plans);
  std::vector<ResizeJob> jobs;
  std::vector<RowStep> steps;
  std::int64_t blocks = 0;
  for (const RowMove& move : moves) {
    const std::vector<RowStep> own = row_steps(plans[static_cast<std::size_t>(move.plan)], move.src == move.dst);
    if (own.empty() || move.row_bytes == 0) continue;
    const std::int64_t word = word_size(move);
    jobs.push_back({reinterpret_cast<std::uint64_t>(move.src), reinterpret_cast<std::uint64_t>(move.dst),
                    move.row_bytes, static_cast<std::int64_t>(steps.size()), static_cast<std::int64_t>(own.size()),
                    blocks, word});
    blocks += (move.row_bytes / word + kResizeThreads - 1) / kResizeThreads;
    steps.insert(steps.end(), own.begin(), own.end());
  }
  ARDLORA_CHECK(blocks < (std::int64_t{1} << 31), "rank_resize: one call must need less than 2^31 blocks, got ",
                blocks);
  constexpr std::size_t per_job = sizeof(ResizeJob) / 8;
  std::vector<std::int64_t> words(jobs.size() * per_job + steps.size());
  if (!jobs.empty()) {
    std::memcpy(words.data(), jobs.data(), jobs.size() * sizeof(ResizeJob));
    std::memcpy(words.data() + jobs.size() * per_job, steps.data(), steps.size() * sizeof(RowStep));
  }
  return {std::move(words), static_cast<std::int64_t>(jobs.size()), blocks};
}

}  // namespace ardlora::cuda
