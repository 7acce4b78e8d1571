// The wrappers of cuda/ptx.h and the shim's own checks. `ptx_main` compares each wrapper with a plain loop;
// `ptx_main <fault>` commits one of the faults the shim must report.
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "testing/cases.h"
#include "testing/ptx_kernels.cuh"

namespace {

using namespace ardlora;
using namespace ardlora::cuda;
using namespace ardlora::cuda::testing;
using namespace ardlora::testing;

struct alignas(16) Bytes2k {
  unsigned char data[2048];
};

void test_copies() {
  for (const int bytes : {0, 1, 17, 1024, 1030, 2047, 2048}) {
    Bytes2k from, to{};
    for (auto& b : from.data) b = static_cast<unsigned char>(rng());
    simt::launch(copy_kernel, {}, {kCopyThreads}, 2048, from.data, to.data, bytes);
    bool right = true;
    for (int i = 0; i < 2048; ++i) right &= to.data[i] == (i < bytes ? from.data[i] : 0);
    expect(right, "cp.async");
  }
}

template <int kCount, bool kTrans>
void test_ldmatrix() {
  struct alignas(16) Rows {
    std::uint16_t data[8 * kCount][8];
  } rows;
  for (auto& row : rows.data) {
    for (auto& e : row) e = static_cast<std::uint16_t>(rng());
  }
  std::vector<std::uint32_t> out(32 * kCount);
  simt::launch(ldmatrix_kernel<kCount, kTrans>, {}, {32}, 128 * kCount, &rows.data[0][0], out.data());
  // Lane l of matrix i holds elements (l / 4, 2 (l % 4)) and the next in the row; of the transpose with `trans`.
  for (int i = 0; i < kCount; ++i) {
    for (int row = 0; row < 8; ++row) {
      for (int column = 0; column < 8; ++column) {
        const std::uint32_t r = out[static_cast<std::size_t>((row * 4 + column / 2) * kCount + i)];
        const std::uint16_t want = kTrans ? rows.data[8 * i + column][row] : rows.data[8 * i + row][column];
        expect(static_cast<std::uint16_t>(r >> (column % 2 * 16)) == want, "ldmatrix");
      }
    }
  }
}

template <typename T>
void expect_product(const std::vector<T>& a, const std::vector<T>& b, const std::vector<float>& before,
                    const std::vector<float>& d, std::size_t depth, const std::function<float(T)>& value) {
  for (std::size_t m = 0; m < 16; ++m) {
    for (std::size_t n = 0; n < 8; ++n) {
      double sum = before[m * 8 + n];
      for (std::size_t k = 0; k < depth; ++k) {
        sum += static_cast<double>(value(a[m * depth + k])) * value(b[n * depth + k]);
      }
      expect(std::abs(sum - d[m * 8 + n]) < 1e-6, "mma");
    }
  }
}

template <typename T>
void test_mma() {
  const auto a = random_values<T>(256), b = random_values<T>(128);
  const auto before = random_values<float>(128);
  auto d = before;
  simt::launch(mma_kernel<T>, {}, {32}, 0, a.data(), b.data(), d.data());
  expect_product<T>(a, b, before, d, 16, [](T v) { return to_float(v); });
}

void test_mma_tf32() {
  const auto a = random_values<float>(128), b = random_values<float>(64), before = random_values<float>(128);
  auto d = before;
  simt::launch(mma_tf32_kernel, {}, {32}, 0, a.data(), b.data(), d.data());
  // ten bits of mantissa, ties away from zero
  expect_product<float>(a, b, before, d, 8, [](float v) {
    int exponent;
    const double m = std::frexp(static_cast<double>(v), &exponent);
    return static_cast<float>(std::ldexp(std::round(std::ldexp(m, 11)), exponent - 11));
  });
}

void test_shuffles() {
  const auto v = random_values<float>(32);
  std::vector<float> out(128);
  simt::launch(shuffle_kernel, {}, {32}, 0, v.data(), out.data());
  double sum = 0.0;
  for (const float x : v) sum += x;
  for (std::size_t l = 0; l < 32; ++l) {
    expect(out[l] == v[l ^ 5] && out[32 + l] == v[l + 3 < 32 ? l + 3 : l] && out[64 + l] == v[7], "shfl");
    expect(std::abs(out[96 + l] - sum) < 1e-5, "the sum over a warp");
  }
}

template <typename T>
void test_conversions() {
  auto v = random_values<float>(1000);
  for (const float special : {0.0f, -0.0f, 1e-30f, -1e-7f, 65519.0f, 65520.0f, 3e38f, INFINITY}) v.push_back(special);
  std::vector<float> out(v.size());
  std::vector<std::uint32_t> packed(v.size() / 2);
  const int n = static_cast<int>(v.size());
  simt::launch(convert_kernel<T>, {static_cast<unsigned>(n / 2 + 63) / 64}, {64}, 0, v.data(), out.data(),
               packed.data(), n);
  for (std::size_t i = 0; i < v.size(); ++i) {
    expect(out[i] == to_float(from_float<T>(v[i])), "a conversion");
    expect(static_cast<std::uint16_t>(packed[i / 2] >> (i % 2 * 16)) == from_float<T>(v[i]).bits, "a packed pair");
  }
}

// ---- faults

void exchange_without_barrier(float* out) {
  ARDLORA_SHARED(shared);
  auto* values = reinterpret_cast<float*>(shared);
  const unsigned i = threadIdx.x;
  values[i] = static_cast<float>(i);
  out[i] = values[blockDim.x - 1 - i];
}

void exchange_without_syncwarp(float* out) {
  ARDLORA_SHARED(shared);
  auto* values = reinterpret_cast<float*>(shared);
  const unsigned i = threadIdx.x;
  values[i] = static_cast<float>(i);
  out[i] = __shfl_xor_sync(kFullWarp, values[i ^ 1], 1);  // a shuffle orders no memory
}

void two_blocks_on_one_address(float* out) { out[threadIdx.x] = static_cast<float>(blockIdx.x); }

void leave_before_barrier(float* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

void split_warp(float* out) {
  const float v = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = threadIdx.x < 16 ? __shfl_xor_sync(kFullWarp, v, 1) : __shfl_sync(kFullWarp, v, 0);
}

void past_shared(float* out) {
  ARDLORA_SHARED(shared);
  reinterpret_cast<float*>(shared)[threadIdx.x + 1] = 1.0f;
  out[threadIdx.x] = 1.0f;
}

void copy_past_shared(float* out) {
  ARDLORA_SHARED(shared);
  cp_async16(shared_address(shared + 16 * (threadIdx.x + 1)), out);
}

void read_before_wait(float* out) {
  ARDLORA_SHARED(shared);
  cp_async16(shared_address(shared + 16 * threadIdx.x), out);
  cp_async_commit();
  out[64 + threadIdx.x] = reinterpret_cast<float*>(shared)[4 * threadIdx.x];
}

int commit(const std::string& name) {
  struct Fault {
    void (*kernel)(float*);
    unsigned blocks, threads, shared;
  };
  const std::map<std::string, Fault> faults = {
      {"exchange_without_barrier", {exchange_without_barrier, 1, 64, 256}},
      {"exchange_without_syncwarp", {exchange_without_syncwarp, 1, 32, 128}},
      {"two_blocks_on_one_address", {two_blocks_on_one_address, 2, 32, 0}},
      {"leave_before_barrier", {leave_before_barrier, 1, 32, 0}},
      {"split_warp", {split_warp, 1, 32, 0}},
      {"past_shared", {past_shared, 1, 32, 128}},
      {"copy_past_shared", {copy_past_shared, 1, 32, 512}},
      {"read_before_wait", {read_before_wait, 1, 32, 512}},
  };
  struct alignas(16) Out {
    float data[256] = {};
  } out;
  const Fault& f = faults.at(name);
  simt::launch(f.kernel, {f.blocks}, {f.threads}, f.shared, static_cast<float*>(out.data));
  for (const float v : out.data) {
    if (std::isnan(v)) expect(false, "NaN: the result");
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return commit(argv[1]);
  for (unsigned i = 0; i < 4; ++i) {
    set_order(i);
    test_copies();
    test_ldmatrix<4, false>();
    test_ldmatrix<4, true>();
    test_ldmatrix<2, false>();
    test_ldmatrix<2, true>();
    test_mma<BFloat16>();
    test_mma<Float16>();
    test_mma_tf32();
    test_shuffles();
    test_conversions<BFloat16>();
    test_conversions<Float16>();
  }
  std::puts("every wrapper equals its loop");
  return 0;
}
