#include "bench/roofline.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "ardlora/check.h"
#include "bench/aligned.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace ardlora::bench {
namespace {

constexpr int kRuns = 5;
constexpr double kSecondsPerRun = 0.01;

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Best rate of `work` units per call: each thread repeats fn(thread) as often as fits a run.
template <typename F>
double best_rate(int threads, double work, F&& fn) {
  double rate = 0.0;
  std::int64_t repeats = 1;
  for (int run = 0; run < kRuns;) {
    const double began = seconds();
    cpu::parallel_for(threads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t) {
        for (std::int64_t i = 0; i < repeats; ++i) fn(t);
      }
    });
    const double took = seconds() - began;
    if (took < kSecondsPerRun / 2) {
      repeats *= 2;
      continue;
    }
    rate = std::max(rate, work * static_cast<double>(repeats) / took);
    ++run;
  }
  return rate;
}

}  // namespace

Roofline measure_roofline(std::int64_t bytes, int threads) {
  constexpr std::int64_t kMinimum = 4096;
  ARDLORA_CHECK(threads >= 1, "bench_roofline: threads must be at least 1, got ", threads);
  ARDLORA_CHECK(bytes >= kMinimum * threads, "bench_roofline: bytes must be at least ", kMinimum, " per thread, got ",
                bytes);
  const cpu::KernelTable& isa = cpu::active();
  constexpr std::int64_t kGrain = 32 * 16;  // floats: whole unrolled steps of every instruction set
  const std::int64_t share = bytes / 4 / threads / kGrain * kGrain;
  std::vector<LineVector<float>> memory(static_cast<std::size_t>(threads));
  std::vector<float> sums(static_cast<std::size_t>(threads) * 16);  // apart, so that no two threads share a line
  // Each thread touches its part first.
  cpu::parallel_for(threads, 1, threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      memory[static_cast<std::size_t>(t)].assign(static_cast<std::size_t>(share), 1.0f);
    }
  });
  const auto data = [&](std::int64_t t) { return memory[static_cast<std::size_t>(t)].data(); };
  const auto sum = [&](std::int64_t t) -> float& { return sums[static_cast<std::size_t>(t) * 16]; };
  const double touched = 4.0 * static_cast<double>(share * threads);
  const auto peak = [&](cpu::PeakLoopFn loop, std::int64_t depth) {
    constexpr std::int64_t kSteps = 4096;
    const double flops = 2.0 * static_cast<double>(kSteps * cpu::kPeakChains * isa.lanes * depth * threads);
    return best_rate(threads, flops, [&](std::int64_t t) { sum(t) += loop(kSteps); }) / 1e9;
  };
  Roofline out;
  out.read_gbs = best_rate(threads, touched, [&](std::int64_t t) { sum(t) += isa.stream_read(data(t), share); }) / 1e9;
  out.update_gbs = best_rate(threads, 2.0 * touched, [&](std::int64_t t) { isa.stream_update(data(t), share); }) / 1e9;
  out.float32_gflops = peak(isa.fma_loop, 1);
  out.bfloat16_gflops = isa.pair_loop == nullptr ? out.float32_gflops : peak(isa.pair_loop, 2);
  return out;
}

}  // namespace ardlora::bench
