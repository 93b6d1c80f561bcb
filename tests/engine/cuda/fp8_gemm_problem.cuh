#ifndef LATENTD_TESTS_ENGINE_CUDA_FP8_GEMM_PROBLEM_CUH_
#define LATENTD_TESTS_ENGINE_CUDA_FP8_GEMM_PROBLEM_CUH_

#include <algorithm>
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
  std::vector<uint16_t> Run(const Fp8GemmManyRowsTuning& tuning) { return Run(Args(), tuning); }
  std::vector<uint16_t> Run(const Fp8GemmArgs& args, const Fp8GemmManyRowsTuning& tuning) {
    out_.Poison();
    EXPECT_EQ(Fp8GemmManyRows(args, tuning, nullptr), cudaSuccess);
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

inline float ToFloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// The first wrong elements, or "".
inline std::string Compare(const Shape& shape, const std::vector<uint16_t>& got,
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

// Beside the reference, with each of `tunings`.
template <typename Tuning>
void CheckProduct(const Shape& shape, const std::vector<Tuning>& tunings) {
  ASSERT_EQ(cudaGetLastError(), cudaSuccess);
  Problem problem(shape);
  const std::vector<uint16_t> want = problem.Reference();
  for (size_t i = 0; i < tunings.size(); ++i) {
    EXPECT_EQ(Compare(shape, problem.Run(tunings[i]), want), "")
        << shape.Name() << ", tuning " << i;
    ASSERT_EQ(cudaGetLastError(), cudaSuccess);  // after a failed launch nothing else can work
  }
}

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CUDA_FP8_GEMM_PROBLEM_CUH_
