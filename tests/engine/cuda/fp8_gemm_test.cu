#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "engine/cuda/kernels/fp8_gemm.h"
#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/fp8_gemm_data.cuh"

namespace latentd {
namespace {

struct Shape {
  int n, k;
  std::vector<int> rows;  // of each group; one: dense
  bool swiglu = false;
  bool exact = false;
  bool grouped() const { return rows.size() > 1; }
  int num_rows() const { return std::accumulate(rows.begin(), rows.end(), 0); }
  int columns() const { return swiglu ? n / 2 : n; }
  std::string Name() const {
    std::string name = std::to_string(n) + "x" + std::to_string(k) + (swiglu ? " swiglu" : "") +
                       (exact ? " exact" : "");
    for (int r : rows) {
      if (name.size() > 80) return name + "...";
      name += ' ';
      name += std::to_string(r);
    }
    return name;
  }
};

constexpr int kSparePitch = 8;  // columns of `out` that belong to nobody

// The arguments of a product and what they point to. Rows that no group has are NaNs, as are their
// scales.
class Problem {
 public:
  explicit Problem(const Shape& shape)
      : shape_(shape),
        groups_(static_cast<int>(shape.rows.size())),
        max_rows_(shape.num_rows() + (shape.grouped() ? 5 : 0)),
        scale_rows_((shape.n + 127) / 128),
        weight_pitch_((shape.k / 128 + 3) / 4 * 4),
        x_pitch_((max_rows_ + 3) / 4 * 4 + 4),
        weights_(static_cast<size_t>(groups_) * shape.n * shape.k),
        weight_scales_(static_cast<size_t>(groups_) * scale_rows_ * weight_pitch_),
        x_(static_cast<size_t>(max_rows_) * shape.k),
        x_scales_(static_cast<size_t>(shape.k / 128) * x_pitch_),
        offsets_(shape.rows.size() + 1),
        out_(static_cast<size_t>(max_rows_) * out_pitch()),
        workspace_(Fp8GemmWorkspaceBytes()) {
    const int rows = shape.num_rows(), blocks = shape.k / 128;
    FillFp8<<<264, 256>>>(weights_.get(), weights_.size(), 1, shape.exact);
    FillFp8<<<264, 256>>>(x_.get(), static_cast<int64_t>(rows) * shape.k, 2, shape.exact);
    // Results of about unit size.
    FillScales<<<264, 256>>>(weight_scales_.get(), groups_ * scale_rows_, blocks, weight_pitch_, 3,
                             shape.exact, 1.0f / (21.3f * std::sqrt(static_cast<float>(shape.k))));
    FillScales<<<264, 256>>>(x_scales_.get(), blocks, rows, x_pitch_, 4, shape.exact, 1.0f);
    std::vector<int32_t> offsets = {0};
    for (int r : shape.rows) offsets.push_back(offsets.back() + r);
    offsets_.Set(offsets);
    workspace_.Zero();
  }

  int64_t out_pitch() const { return shape_.columns() + kSparePitch; }

  Fp8GemmArgs Args() {
    Fp8GemmArgs args;
    args.x = {x_.get(), x_scales_.get(), x_pitch_};
    args.num_rows = max_rows_;
    args.weight.fp8 = weights_.get();
    args.weight.scales = weight_scales_.get();
    args.weight.scale_stride = weight_pitch_;
    args.weight.num_groups = groups_;
    args.weight.n = shape_.n;
    args.weight.k = shape_.k;
    args.group_offsets = shape_.grouped() ? offsets_.get() : nullptr;
    args.out = out_.get();
    args.out_stride = out_pitch();
    args.swiglu = shape_.swiglu;
    args.workspace = workspace_.get();
    return args;
  }

  // Runs and returns `out`, bits, all of it.
  std::vector<uint16_t> Run(const Fp8GemmTuning& tuning = {}) { return Run(Args(), tuning); }
  std::vector<uint16_t> Run(const Fp8GemmArgs& args, const Fp8GemmTuning& tuning) {
    out_.Poison();
    EXPECT_EQ(Fp8Gemm(args, tuning, nullptr), cudaSuccess);
    return Bits();
  }
  std::vector<uint16_t> Reference() {
    out_.Poison();
    EXPECT_EQ(Fp8GemmReference(Args(), nullptr), cudaSuccess);
    return Bits();
  }
  std::vector<std::byte> Workspace() { return workspace_.Get(); }

 private:
  std::vector<uint16_t> Bits() {
    const cudaError_t error = cudaDeviceSynchronize();
    EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
    const std::vector<__nv_bfloat16> values = out_.Get();
    std::vector<uint16_t> bits(values.size());
    std::memcpy(bits.data(), values.data(), bits.size() * 2);
    return bits;
  }

  const Shape shape_;
  const int groups_, max_rows_, scale_rows_, weight_pitch_, x_pitch_;
  DeviceArray<__nv_fp8_e4m3> weights_;
  DeviceArray<float> weight_scales_;
  DeviceArray<__nv_fp8_e4m3> x_;
  DeviceArray<float> x_scales_;
  DeviceArray<int32_t> offsets_;
  DeviceArray<__nv_bfloat16> out_;
  DeviceArray<std::byte> workspace_;
};

float ToFloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// The first wrong elements, or "".
std::string Compare(const Shape& shape, const std::vector<uint16_t>& got,
                    const std::vector<uint16_t>& want) {
  const int64_t pitch = shape.columns() + kSparePitch;
  double squares = 0;
  int64_t count = 0;
  for (int64_t row = 0; row < shape.num_rows(); ++row) {
    for (int64_t c = 0; c < shape.columns(); ++c, ++count) {
      const double v = ToFloat(want[row * pitch + c]);
      squares += v * v;
    }
  }
  const double rms = std::sqrt(squares / std::max<int64_t>(count, 1));
  std::string report;
  int wrong = 0;
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const int64_t row = i / pitch, column = i % pitch;
    const bool used = row < shape.num_rows() && column < shape.columns();
    bool ok = got[i] == want[i];
    if (used && !shape.exact) {
      const double a = ToFloat(got[i]), b = ToFloat(want[i]), error = std::abs(a - b);
      // bf16 rounds by 2^-9 of the value on both sides; the rest is the 14 bits of the tensor
      // cores' sums.
      ok = error <= 6e-3 * rms + std::abs(b) / 128;
      worst = std::max(worst, error / rms);
    }
    if (!ok && ++wrong <= 12) {
      char line[120];
      std::snprintf(line, sizeof(line), "\n  row %lld column %lld: %g (%04x), not %g (%04x)",
                    static_cast<long long>(row), static_cast<long long>(column), ToFloat(got[i]),
                    got[i], ToFloat(want[i]), want[i]);
      report += line;
    }
  }
  if (wrong > 0)
    report = std::to_string(wrong) + " wrong of " + std::to_string(count) + ", rms " +
             std::to_string(rms) + report;
  else
    std::printf("  %s: largest error / rms %.5f\n", shape.Name().c_str(), worst);
  return report;
}

void Check(const Shape& shape, const std::vector<Fp8GemmTuning>& tunings = {{}}) {
  ASSERT_EQ(cudaGetLastError(), cudaSuccess);
  Problem problem(shape);
  const std::vector<uint16_t> want = problem.Reference();
  for (const Fp8GemmTuning& t : tunings) {
    EXPECT_EQ(Compare(shape, problem.Run(t), want), "")
        << shape.Name() << ", tile " << t.row_tile << ", stages " << t.stages << ", segments "
        << t.segments;
    ASSERT_EQ(cudaGetLastError(), cudaSuccess);  // after a failed launch nothing else can work
  }
}

const std::vector<Fp8GemmTuning> kAllTiles = {{8}, {16}, {32}, {64}, {128}};

using Fp8GemmTest = DeviceTest;

TEST_F(Fp8GemmTest, ReferenceAgreesWithTheCpu) {
  const int n = 256, k = 256, rows = 3;
  for (const bool swiglu : {false, true}) {
    const Shape shape = {n, k, {rows}, swiglu};
    Problem problem(shape);
    const std::vector<uint16_t> got = problem.Reference();
    std::vector<__nv_fp8_e4m3> w(n * k), x(rows * k);
    std::vector<float> ws(n / 128 * 4), xs(k / 128 * 8);
    const Fp8GemmArgs args = problem.Args();
    ASSERT_CUDA_OK(cudaMemcpy(w.data(), args.weight.fp8, w.size(), cudaMemcpyDeviceToHost));
    ASSERT_CUDA_OK(cudaMemcpy(x.data(), args.x.data, x.size(), cudaMemcpyDeviceToHost));
    ASSERT_CUDA_OK(
        cudaMemcpy(ws.data(), args.weight.scales, ws.size() * 4, cudaMemcpyDeviceToHost));
    ASSERT_CUDA_OK(cudaMemcpy(xs.data(), args.x.scales, xs.size() * 4, cudaMemcpyDeviceToHost));
    ASSERT_EQ(args.x.scale_stride, 8);
    const auto dot = [&](int row, int weight_row, int scale_row) {
      double sum = 0;
      for (int i = 0; i < k; ++i)
        sum += static_cast<double>(static_cast<float>(w[weight_row * k + i])) *
               static_cast<float>(x[row * k + i]) * ws[scale_row * 4 + i / 128] *
               xs[i / 128 * 8 + row];
      return sum;
    };
    for (int row = 0; row < rows; ++row) {
      for (int column = 0; column < shape.columns(); ++column) {
        double want;
        if (swiglu) {
          const int gate_row = column / 8 * 16 + column % 8;
          const double gate = dot(row, gate_row, 0), up = dot(row, gate_row + 8, 1);
          want = gate / (1 + std::exp(-gate)) * up;
        } else {
          want = dot(row, column, column / 128);
        }
        ASSERT_NEAR(ToFloat(got[row * problem.out_pitch() + column]), want,
                    1e-5 + std::abs(want) / 256)
            << row << " " << column;
      }
    }
  }
}

TEST_F(Fp8GemmTest, ExactIntegersAllTiles) {
  Check({128, 128, {1}, false, true}, kAllTiles);
  Check({128, 256, {9}, false, true}, kAllTiles);
  Check({64, 512, {40}, false, true}, kAllTiles);
  Check({192, 1024, {130}, false, true}, kAllTiles);
  Check({576, 7168, {300}, false, true},
        {{8}, {16}, {32}, {64}, {128}, {16, 2}, {64, 3, 4}, {128, 2, 7}, {32, 0, 56}});
}

TEST_F(Fp8GemmTest, RandomRowsDense) {
  for (const int rows : {1, 2, 7, 8, 9, 17, 33, 65, 127, 129, 257, 300}) Check({320, 896, {rows}});
  Check({512, 896, {37}, true}, kAllTiles);
}

TEST_F(Fp8GemmTest, GroupsRaggedAndEmpty) {
  for (const bool swiglu : {false, true}) {
    Check({256, 384, {3, 0, 17, 1, 0, 0, 64, 129, 5}, swiglu}, kAllTiles);
    Check({256, 384, {0, 0, 0, 1}, swiglu}, kAllTiles);
    Check({256, 384, {0, 0, 0}, swiglu});
  }
  Check({192, 640, {5, 11, 0, 70}, false, true}, kAllTiles);
  std::vector<int> many(300);
  for (size_t i = 0; i < many.size(); ++i) many[i] = Hash(5, i) % 7;
  Check({128, 128, many, false, true}, kAllTiles);
}

// The sizes of the demo model and of DeepSeek-V3.
TEST_F(Fp8GemmTest, DemoShapes) {
  for (const int rows : {1, 5, 70}) {
    Check({704, 256, {rows}});
    Check({768, 128, {rows}});
    Check({256, 512, {rows}});
    Check({1024, 256, {rows}, true});
  }
  Check({256, 256, {1, 0, 4, 9, 0, 2, 3, 3, 20}, true});
  Check({256, 128, {1, 0, 4, 9, 0, 2, 3, 3, 20}});
}

TEST_F(Fp8GemmTest, DeepSeekV3Linears) {
  for (const int rows : {1, 33}) {
    Check({2112, 7168, {rows}});
    Check({24576, 1536, {rows}});
    Check({7168, 16384, {rows}});
    Check({36864, 7168, {rows}, true});
    Check({7168, 18432, {rows}});
  }
  Check({2112, 7168, {300}, false, true});
  Check({7168, 16384, {150}, false, true});
}

TEST_F(Fp8GemmTest, DeepSeekV3Experts) {
  std::vector<int> rows = {8, 3, 0, 12, 9, 1, 8, 7, 8, 30, 0, 8, 2, 8, 8, 8, 64};
  Check({4096, 7168, rows, true});
  Check({7168, 2048, rows, false}, kAllTiles);
  Check({7168, 2048, {1, 140, 0, 300}, false, true}, {{64}, {128}});
  Check({4096, 7168, {1, 140, 0, 300}, true}, {{64}, {128}});
}

// A row's bits do not depend on the rows beside it, their number, the tile, the stages or on who
// computes which segment.
TEST_F(Fp8GemmTest, RowsAreIndependent) {
  for (const bool swiglu : {false, true}) {
    for (const auto& [n, k] :
         {std::pair{4096, 7168}, std::pair{2112 - swiglu * 64, 1536}, std::pair{7168, 2048}}) {
      Problem problem({n, k, {64}, swiglu});
      const int64_t pitch = problem.out_pitch();
      const std::vector<uint16_t> all = problem.Run();
      for (const Fp8GemmTuning& tuning :
           std::vector<Fp8GemmTuning>{{8}, {16}, {32}, {128}, {64, 2}, {8, 3}})
        EXPECT_EQ(problem.Run(tuning), all) << n << "x" << k << ", tile " << tuning.row_tile;
      for (const int row : {0, 1, 31, 63}) {
        Fp8GemmArgs alone = problem.Args();
        alone.x.data += static_cast<int64_t>(row) * k;
        alone.num_rows = 1;
        // Scales are aligned to 16 bytes: move this row's to the front.
        DeviceArray<float> scales(static_cast<size_t>(k / 128) * 4);
        ASSERT_CUDA_OK(cudaMemcpy2D(scales.get(), 16, alone.x.scales + row,
                                    alone.x.scale_stride * 4, 4, k / 128,
                                    cudaMemcpyDeviceToDevice));
        alone.x.scales = scales.get();
        alone.x.scale_stride = 4;
        const std::vector<uint16_t> one = problem.Run(alone, {});
        EXPECT_TRUE(
            std::equal(one.begin(), one.begin() + (pitch - kSparePitch), all.begin() + row * pitch))
            << n << "x" << k << ", row " << row;
      }
    }
  }
}

// An expert's rows have the same bits whichever experts beside it have rows.
TEST_F(Fp8GemmTest, GroupsAreIndependent) {
  std::vector<int> rows(17, 5), sparse(17, 0);
  sparse[0] = 5;
  Problem full({4096, 1024, rows, true}), few({4096, 1024, sparse, true});
  const std::vector<uint16_t> a = full.Run(), b = few.Run();
  EXPECT_TRUE(std::equal(a.begin(), a.begin() + 5 * full.out_pitch(), b.begin()));
}

TEST_F(Fp8GemmTest, Clusters) {
  const std::vector<Fp8GemmTuning> pair = {{128, 0, 0, 1}, {128, 0, 0, 2}};
  Check({256, 256, {40}, false, true}, pair);
  Check({192, 1024, {130}, false, true}, pair);
  Check({64, 512, {300}, false, true}, pair);
  for (const bool swiglu : {false, true})
    Check({256, 384, {3, 0, 17, 1, 0, 0, 64, 129, 5}, swiglu}, pair);
  Check({7168, 2048, {1, 140, 0, 300}, false, true}, pair);
  Check({7168, 16384, {150}, false, true}, pair);
  Check({2112, 7168, {1000}, false, true}, pair);
  Problem problem({4096, 7168, {64}, true});
  for (const Fp8GemmTuning& tuning : pair) EXPECT_EQ(problem.Run(tuning), problem.Run());
}

TEST_F(Fp8GemmTest, WorkspaceServesCallAfterCall) {
  Problem problem({7168, 4096, {20}});
  const std::vector<uint16_t> first = problem.Run();
  for (int i = 0; i < 20; ++i) ASSERT_EQ(problem.Run(), first) << i;
  // What the kernel counts with lies at the beginning.
  const std::vector<std::byte> workspace = problem.Workspace();
  for (int i = 0; i < 4096; ++i) ASSERT_EQ(workspace[i], std::byte{0}) << i;
}

// Back to back, so that each begins under the one before it.
TEST_F(Fp8GemmTest, ManyInOneGraph) {
  Problem problem({7168, 2048, {3, 9, 0, 1, 25, 8, 8, 40}});
  const std::vector<uint16_t> want = problem.Run();
  ASSERT_GT(GraphMicroseconds(
                10, 5, [&](int, cudaStream_t stream) { return Fp8Gemm(problem.Args(), stream); }),
            0);
  EXPECT_EQ(problem.Run(), want);
}

TEST_F(Fp8GemmTest, BadArguments) {
  Problem problem({256, 256, {4}});
  const auto refused = [&](auto change) {
    Fp8GemmArgs args = problem.Args();
    change(args);
    return Fp8Gemm(args, nullptr) == cudaErrorInvalidValue;
  };
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.weight.k = 200; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.weight.n = 100; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.weight.n = 320, a.swiglu = true; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.weight.num_groups = 2; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.out_stride = 252; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.out_stride = 128; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.x.scale_stride = 3; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.num_rows = -1; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.workspace = nullptr; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.x.data += 8; }));
  Fp8GemmArgs none = problem.Args();
  none.num_rows = 0;
  EXPECT_EQ(Fp8Gemm(none, nullptr), cudaSuccess);
}

}  // namespace
}  // namespace latentd
