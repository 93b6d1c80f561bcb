#include <cmath>
#include <utility>
#include <vector>

#include "engine/cuda/kernels/fp8_gemm.h"
#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/fp8_gemm_data.cuh"
#include "tests/engine/cuda/fp8_gemm_problem.cuh"

namespace latentd {
namespace {

void Check(const Shape& shape, const std::vector<Fp8GemmTuning>& tunings = {{}}) {
  CheckProduct(shape, tunings);
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
        const std::vector<uint16_t> one = problem.Run(alone, Fp8GemmTuning{});
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
