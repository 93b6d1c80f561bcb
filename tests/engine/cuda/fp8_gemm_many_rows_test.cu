#include <vector>

#include "engine/cuda/kernels/fp8_gemm.h"
#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/fp8_gemm_data.cuh"
#include "tests/engine/cuda/fp8_gemm_problem.cuh"

namespace latentd {
namespace {

using Tunings = std::vector<Fp8GemmManyRowsTuning>;

const Tunings kTiles = {{128, 1}, {128, 2}, {256, 1}, {256, 2}};
const Tunings kAll = {{}, {128, 1}, {128, 2}, {256, 1}, {256, 2}, {256, 2, 2}, {128, 1, 4}};

void Check(const Shape& shape, const Tunings& tunings = kTiles) { CheckProduct(shape, tunings); }

using Fp8GemmManyRowsTest = DeviceTest;

TEST_F(Fp8GemmManyRowsTest, ExactIntegers) {
  Check({128, 128, {1}, false, true}, kAll);
  Check({128, 256, {9}, false, true}, kAll);
  Check({64, 512, {130}, false, true}, kAll);
  Check({192, 1024, {257}, false, true}, kAll);
  Check({576, 7168, {700}, false, true}, kAll);
}

TEST_F(Fp8GemmManyRowsTest, RandomRowsDense) {
  for (const int rows : {1, 63, 64, 127, 128, 129, 192, 255, 256, 257, 300, 511, 513}) {
    Check({320, 896, {rows}});
    Check({512, 384, {rows}, true});
  }
}

TEST_F(Fp8GemmManyRowsTest, GroupsRaggedAndEmpty) {
  for (const bool swiglu : {false, true}) {
    Check({256, 384, {3, 0, 17, 1, 0, 0, 64, 129, 5}, swiglu}, kAll);
    Check({256, 384, {0, 0, 0, 1}, swiglu}, kAll);
    Check({256, 384, {0, 0, 0}, swiglu}, kAll);
    Check({512, 256, {127, 128, 129, 0, 255, 256, 257, 383, 385, 2}, swiglu}, kAll);
    Check({256, 1024, {0, 1000, 1, 0, 600, 0}, swiglu}, kAll);
  }
  Check({192, 640, {5, 11, 0, 270}, false, true}, kAll);
  std::vector<int> many(300);
  for (size_t i = 0; i < many.size(); ++i) many[i] = Hash(5, i) % 7;
  Check({128, 128, many, false, true}, kAll);
}

// More than 2,048 rows: several bands of tiles over the same weights.
TEST_F(Fp8GemmManyRowsTest, ManyTiles) {
  Check({320, 256, {5000}, false, true}, kAll);
  Check({512, 256, {2049, 0, 4100, 3}, true});
  Check({4096, 128, {2300, 130}, false, true});
}

TEST_F(Fp8GemmManyRowsTest, DeepSeekV3) {
  const std::vector<int> rows = {200, 131, 0,   320, 64, 1,  256, 128, 257,
                                 30,  0,   190, 2,   8,  90, 140, 500};
  Check({4096, 7168, rows, true});
  Check({7168, 2048, rows});
  Check({7168, 2048, rows, false, true});
  for (const int columns : {2112, 24576}) Check({columns, 1536, {300}});
  Check({36864, 7168, {150}, true}, {{}});
}

// Where sums have one order the bits are those of Fp8Gemm().
TEST_F(Fp8GemmManyRowsTest, SameBitsAsFewRows) {
  for (const std::vector<int>& rows : {std::vector<int>{300}, {5, 130, 0, 260}}) {
    Problem problem({512, 2048, rows});
    const std::vector<uint16_t> want = problem.Run(Fp8GemmTuning{.row_tile = 64, .segments = 1});
    for (const Fp8GemmManyRowsTuning& tuning : kAll) EXPECT_EQ(problem.Run(tuning), want);
  }
}

// A row's bits depend on no other row, wherever it lies in a tile.
TEST_F(Fp8GemmManyRowsTest, RowsAreIndependent) {
  for (const bool swiglu : {false, true}) {
    Problem problem({512, 2048, {600}, swiglu});
    const std::vector<uint16_t> all = problem.Run(Fp8GemmManyRowsTuning{});
    for (const Fp8GemmManyRowsTuning& tuning : kAll) EXPECT_EQ(problem.Run(tuning), all);
    const int64_t pitch = problem.out_pitch(), columns = pitch - kSparePitch;
    for (const int first : {4, 64, 148, 332, 596}) {
      Fp8GemmArgs part = problem.Args();
      part.x.data += int64_t{first} * 2048;
      part.x.scales += first;
      part.num_rows = 4;
      const std::vector<uint16_t> got = problem.Run(part, Fp8GemmManyRowsTuning{});
      for (int row = 0; row < 4; ++row)
        EXPECT_TRUE(std::equal(got.begin() + row * pitch, got.begin() + row * pitch + columns,
                               all.begin() + (first + row) * pitch))
            << first + row;
    }
  }
}

// Back to back, so that each begins under the one before it.
TEST_F(Fp8GemmManyRowsTest, ManyInOneGraph) {
  Problem problem({7168, 2048, {3, 300, 0, 1, 250, 128}});
  const std::vector<uint16_t> want = problem.Run(Fp8GemmManyRowsTuning{});
  ASSERT_GT(
      GraphMicroseconds(
          10, 5, [&](int, cudaStream_t stream) { return Fp8GemmManyRows(problem.Args(), stream); }),
      0);
  EXPECT_EQ(problem.Run(Fp8GemmManyRowsTuning{}), want);
}

TEST_F(Fp8GemmManyRowsTest, BadArguments) {
  Problem problem({256, 256, {4}});
  const auto refused = [&](auto change) {
    Fp8GemmArgs args = problem.Args();
    change(args);
    return Fp8GemmManyRows(args, nullptr) == cudaErrorInvalidValue;
  };
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.weight.k = 200; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.weight.num_groups = 2; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.out_stride = 252; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.x.scale_stride = 3; }));
  EXPECT_TRUE(refused([](Fp8GemmArgs& a) { a.x.data += 8; }));
  Fp8GemmArgs none = problem.Args();
  none.num_rows = 0;
  none.workspace = nullptr;
  EXPECT_EQ(Fp8GemmManyRows(none, nullptr), cudaSuccess);
}

}  // namespace
}  // namespace latentd
