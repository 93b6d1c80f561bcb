#include "engine/cuda/cublas.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "tests/engine/cuda/device_test.h"

namespace latentd {
namespace {

using testing::HasSubstr;

TEST(CublasLoadTest, SaysWhereTheLibraryWasLookedFor) {
  setenv("LATENTD_CUBLASLT", "/nowhere/libcublasLt.so.13", 1);
  const auto cublas = Cublas::Create();
  unsetenv("LATENTD_CUBLASLT");
  ASSERT_FALSE(cublas.ok());
  EXPECT_EQ(cublas.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(cublas.status().message()), HasSubstr("/nowhere/libcublasLt.so.13"));
}

TEST(CublasLoadTest, RefusesAnotherLibrary) {
  setenv("LATENTD_CUBLASLT", "libm.so.6", 1);
  const auto cublas = Cublas::Create();
  unsetenv("LATENTD_CUBLASLT");
  ASSERT_FALSE(cublas.ok());
  EXPECT_EQ(cublas.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(cublas.status().message()), HasSubstr("libm.so.6: lacks"));
}

class CublasTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (IsSkipped()) return;
    auto cublas = Cublas::Create();
    ASSERT_TRUE(cublas.ok()) << cublas.status();
    cublas_ = *std::move(cublas);
    ASSERT_CUDA_OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  void TearDown() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  std::vector<float> Random(size_t size, float scale = 1) {
    std::vector<float> values(size);
    std::normal_distribution<float> normal;
    for (float& value : values) value = scale * normal(random_);
    return values;
  }
  std::vector<__nv_bfloat16> RandomBf16(size_t size) {
    std::vector<__nv_bfloat16> values;
    for (float value : Random(size)) values.push_back(__float2bfloat16(value));
    return values;
  }

  std::unique_ptr<Cublas> cublas_;
  cudaStream_t stream_ = nullptr;
  std::mt19937 random_{7};
};

double ToDouble(__nv_bfloat16 x) { return __bfloat162float(x); }
double ToDouble(__nv_fp8_e4m3 x) { return static_cast<float>(x); }

// ||got - want|| / ||want||; NaN when any value is.
double Error(const std::vector<double>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}
constexpr double kBf16Error = 3e-3;  // rounding of the result: at most 2^-8 / sqrt(3) in the mean
constexpr double kF32Error = 1e-5;

// An FP8 product and its reference on some of the columns.
struct Fp8Case {
  int rows, n, k;
};
class CublasFp8Test : public CublasTest, public testing::WithParamInterface<Fp8Case> {};

TEST_P(CublasFp8Test, IsTheProduct) {
  const auto [rows, n, k] = GetParam();
  const int padded = Cublas::PaddedRows(rows), groups = k / kQuantGroup;
  const int64_t out_stride = n + 8;
  std::vector<__nv_fp8_e4m3> x(size_t(rows) * k), w(size_t(n) * k);
  std::generate(x.begin(), x.end(), [&] { return __nv_fp8_e4m3(int(random_() % 256) / 64.f - 2); });
  std::generate(w.begin(), w.end(), [&] { return __nv_fp8_e4m3(int(random_() % 256) / 64.f - 2); });
  WeightMatrix weight;
  weight.n = n;
  weight.k = k;
  weight.scale_stride = (groups + 3) / 4 * 4;
  std::uniform_real_distribution<float> scale(0.5f, 2);
  // What lies between is never read: NaN.
  std::vector<float> x_scales(size_t(groups) * padded, NAN);
  std::vector<float> w_scales(size_t((n + 127) / 128) * weight.scale_stride, NAN);
  for (int g = 0; g < groups; ++g) {
    for (int r = 0; r < rows; ++r) x_scales[size_t(g) * padded + r] = scale(random_);
    for (int b = 0; b < (n + 127) / 128; ++b)
      w_scales[size_t(b) * weight.scale_stride + g] = scale(random_);
  }

  DeviceArray<__nv_fp8_e4m3> device_x(size_t(padded) * k), device_w(w);
  device_x.Set(x);
  DeviceArray<float> device_x_scales(x_scales), device_w_scales(w_scales);
  DeviceArray<__nv_bfloat16> out(size_t(padded) * out_stride);
  weight.fp8 = device_w.get();
  weight.scales = device_w_scales.get();
  LinearInput input;
  input.fp8 = {device_x.get(), device_x_scales.get(), padded};
  const absl::Status status = cublas_->Linear(input, rows, weight, out.get(), out_stride, stream_);
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_CUDA_OK(cudaStreamSynchronize(stream_));

  const std::vector<__nv_bfloat16> result = out.Get();
  std::vector<double> got, want;
  for (int r = 0; r < rows; ++r) {
    for (int c = r % 7; c < n; c += std::max(1, n / 61)) {
      double sum = 0;
      for (int g = 0; g < groups; ++g) {
        double part = 0;
        for (int i = g * 128; i < (g + 1) * 128; ++i)
          part += ToDouble(x[size_t(r) * k + i]) * ToDouble(w[size_t(c) * k + i]);
        sum += part * x_scales[size_t(g) * padded + r] *
               w_scales[size_t(c / 128) * weight.scale_stride + g];
      }
      want.push_back(sum);
      got.push_back(ToDouble(result[r * out_stride + c]));
    }
    for (int64_t c = n; c < out_stride; ++c)
      ASSERT_TRUE(std::isnan(ToDouble(result[r * out_stride + c]))) << "row " << r << " gap " << c;
  }
  EXPECT_LT(Error(got, want), kBf16Error);
}

INSTANTIATE_TEST_SUITE_P(Shapes, CublasFp8Test,
                         testing::Values(Fp8Case{1, 256, 256}, Fp8Case{3, 576, 128},
                                         Fp8Case{5, 832, 384}, Fp8Case{17, 2112, 7168},
                                         Fp8Case{100, 24576, 1536}, Fp8Case{130, 7168, 2304},
                                         Fp8Case{333, 1536, 7168}),
                         [](const auto& info) {
                           return "rows" + std::to_string(info.param.rows) + "_n" +
                                  std::to_string(info.param.n) + "_k" +
                                  std::to_string(info.param.k);
                         });

TEST_F(CublasTest, Bf16AndF32) {
  for (const auto& [rows, n, k] : std::vector<std::tuple<int, int, int>>{
           {1, 256, 256}, {3, 200, 264}, {19, 7168, 96}, {129, 1000, 512}, {257, 256, 7168}}) {
    SCOPED_TRACE(testing::Message() << rows << " rows, n " << n << ", k " << k);
    const std::vector<__nv_bfloat16> x = RandomBf16(size_t(rows) * k),
                                     w = RandomBf16(size_t(n) * k);
    DeviceArray<__nv_bfloat16> device_x(x), device_w(w), out(size_t(rows) * n);
    DeviceArray<float> out_f32(size_t(rows) * n);
    WeightMatrix weight;
    weight.bf16 = device_w.get();
    weight.n = n;
    weight.k = k;
    LinearInput input;
    input.bf16 = device_x.get();
    absl::Status status = cublas_->Linear(input, rows, weight, out.get(), n, stream_);
    ASSERT_TRUE(status.ok()) << status;
    status =
        cublas_->LinearF32(device_x.get(), rows, device_w.get(), n, k, out_f32.get(), n, stream_);
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_CUDA_OK(cudaStreamSynchronize(stream_));
    const std::vector<__nv_bfloat16> result = out.Get();
    const std::vector<float> result_f32 = out_f32.Get();
    std::vector<double> got, got_f32, want;
    for (int r = 0; r < rows; ++r) {
      for (int c = r % 5; c < n; c += 11) {
        double sum = 0;
        for (int i = 0; i < k; ++i)
          sum += ToDouble(x[size_t(r) * k + i]) * ToDouble(w[size_t(c) * k + i]);
        want.push_back(sum);
        got.push_back(ToDouble(result[size_t(r) * n + c]));
        got_f32.push_back(result_f32[size_t(r) * n + c]);
      }
    }
    EXPECT_LT(Error(got, want), kBf16Error);
    EXPECT_LT(Error(got_f32, want), kF32Error);
  }
}

// Both layouts of W, one x for all of a batch, results between other columns.
TEST_F(CublasTest, Batched) {
  for (const bool k_by_n : {false, true}) {
    for (const bool share_x : {false, true}) {
      for (const int rows : {1, 7, 130}) {
        SCOPED_TRACE(testing::Message() << rows << " rows, k_by_n " << k_by_n);
        const int n = 128, k = k_by_n ? 192 : 512, batch = 5, out_width = 192;
        const std::vector<__nv_bfloat16> x = RandomBf16(size_t(share_x ? 1 : batch) * rows * k);
        const std::vector<__nv_bfloat16> w = RandomBf16(size_t(batch) * n * k);
        DeviceArray<__nv_bfloat16> device_x(x), device_w(w), out(size_t(rows) * batch * out_width);
        Cublas::Batched args;
        args.x = device_x.get();
        args.x_stride = share_x ? k : batch * k;
        args.x_batch_stride = share_x ? 0 : k;
        args.weight = device_w.get();
        args.weight_stride = k_by_n ? n : k;
        args.weight_batch_stride = int64_t{n} * k;
        args.weight_is_k_by_n = k_by_n;
        args.out = out.get();
        args.out_stride = batch * out_width;
        args.out_batch_stride = out_width;
        args.rows = rows;
        args.n = n;
        args.k = k;
        args.batch = batch;
        const absl::Status status = cublas_->LinearBatched(args, stream_);
        ASSERT_TRUE(status.ok()) << status;
        ASSERT_CUDA_OK(cudaStreamSynchronize(stream_));
        const std::vector<__nv_bfloat16> result = out.Get();
        std::vector<double> got, want;
        for (int b = 0; b < batch; ++b) {
          for (int r = 0; r < rows; ++r) {
            for (int c = 0; c < out_width; ++c) {
              const double value = ToDouble(result[(size_t(r) * batch + b) * out_width + c]);
              if (c >= n) {
                ASSERT_TRUE(std::isnan(value)) << "row " << r << " batch " << b << " column " << c;
                continue;
              }
              double sum = 0;
              for (int i = 0; i < k; ++i) {
                const size_t at =
                    b * size_t(n) * k + (k_by_n ? size_t(i) * n + c : size_t(c) * k + i);
                sum +=
                    ToDouble(x[r * args.x_stride + b * args.x_batch_stride + i]) * ToDouble(w[at]);
              }
              want.push_back(sum);
              got.push_back(value);
            }
          }
        }
        EXPECT_LT(Error(got, want), kBf16Error);
      }
    }
  }
}

TEST_F(CublasTest, PlannedRowsMakeBitsIndependentOfTheRows) {
  const int n = 384, k = 512, most = 2048;
  DeviceArray<__nv_bfloat16> x(RandomBf16(size_t(most) * k)), w(RandomBf16(size_t(n) * k));
  DeviceArray<__nv_bfloat16> out(size_t(most) * n);
  Cublas::Batched args = {.x = x.get(),
                          .x_stride = k,
                          .weight = w.get(),
                          .weight_stride = k,
                          .out = out.get(),
                          .out_stride = n,
                          .rows = most,
                          .n = n,
                          .k = k,
                          .batch = 1,
                          .planned_rows = most};
  std::vector<__nv_bfloat16> all;
  for (const int rows : {2048, 1, 3, 64, 128, 500, 1024}) {
    args.rows = rows;
    const absl::Status status = cublas_->LinearBatched(args, stream_);
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_CUDA_OK(cudaStreamSynchronize(stream_));
    const std::vector<__nv_bfloat16> result = out.Get();
    if (all.empty()) all = result;
    EXPECT_EQ(std::memcmp(result.data(), all.data(), size_t(rows) * n * sizeof(all[0])), 0)
        << rows << " rows";
    out.Poison();
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
  }
  args.rows = most + 1;
  EXPECT_EQ(cublas_->LinearBatched(args, stream_).code(), absl::StatusCode::kInvalidArgument);
}

// The same call gives the same bits: again, from another Cublas, and replayed by a graph, whether
// or not the graph was the shape's first use.
TEST_F(CublasTest, RepeatsItsBitsAlsoInGraphs) {
  const int rows = 48, n = 512, k = 7168;
  DeviceArray<__nv_bfloat16> x(RandomBf16(size_t(rows) * k)), w(RandomBf16(size_t(n) * k));
  DeviceArray<float> out(size_t(rows) * n);
  const auto run = [&](Cublas* cublas) {
    return cublas->LinearF32(x.get(), rows, w.get(), n, k, out.get(), n, stream_);
  };
  ASSERT_TRUE(run(cublas_.get()).ok());
  ASSERT_CUDA_OK(cudaStreamSynchronize(stream_));
  const std::vector<float> want = out.Get();
  auto fresh = Cublas::Create();
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  for (Cublas* cublas : {fresh->get(), cublas_.get()}) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    ASSERT_CUDA_OK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    const absl::Status status = run(cublas);
    ASSERT_CUDA_OK(cudaStreamEndCapture(stream_, &graph));
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 3; ++i) {
      out.Poison();
      ASSERT_CUDA_OK(cudaGraphLaunch(exec, stream_));
      ASSERT_CUDA_OK(cudaStreamSynchronize(stream_));
      EXPECT_EQ(out.Get(), want);
    }
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
  }
}

TEST_F(CublasTest, RefusesWhatIsNoProduct) {
  DeviceArray<__nv_bfloat16> x(1024), w(1024), out(1024);
  DeviceArray<float> scales(64);
  DeviceArray<__nv_fp8_e4m3> fp8(4096);
  WeightMatrix weight;
  weight.bf16 = w.get();
  weight.n = 16;
  weight.k = 32;
  LinearInput input;
  input.bf16 = x.get();
  const auto code = [&](const LinearInput& input, int rows, int64_t out_stride) {
    return cublas_->Linear(input, rows, weight, out.get(), out_stride, stream_).code();
  };
  EXPECT_EQ(code(input, 0, 16), absl::StatusCode::kOk);
  EXPECT_EQ(code(input, -1, 16), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(input, 2, 15), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code({}, 2, 16), absl::StatusCode::kInvalidArgument);
  input.bf16 = x.get() + 1;  // aligned to 2 bytes
  EXPECT_EQ(code(input, 2, 16), absl::StatusCode::kInvalidArgument);

  weight.fp8 = fp8.get();
  weight.scales = scales.get();
  weight.k = 128;
  weight.scale_stride = 4;
  input.fp8 = {fp8.get(), scales.get(), 4};
  EXPECT_EQ(code(input, 3, 16), absl::StatusCode::kOk);
  EXPECT_EQ(code(input, 5, 16), absl::StatusCode::kInvalidArgument);  // its stride would be 8
  weight.scale_stride = 1;
  EXPECT_EQ(code(input, 3, 16), absl::StatusCode::kInvalidArgument);
  ASSERT_CUDA_OK(cudaStreamSynchronize(stream_));
}

}  // namespace
}  // namespace latentd
