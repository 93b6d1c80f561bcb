// Fp8Gemm() at DeepSeek-V3's shapes, weights cold. A line for each: shape, rows, tile | us |
// TFLOP/s | GB/s of weights | % of the bound. Arguments: any of `experts`, `linears`, `prefill`,
// `tiles` (every tile of rows), `many` (the kernels for many rows side by side); none: the first
// three.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "engine/cuda/cublas.h"
#include "engine/cuda/kernels/fp8_gemm.h"
#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/fp8_gemm_data.cuh"

namespace latentd {
namespace {

constexpr double kBytesPerSecond = 3.35e12, kFlops = 1979e12;  // H100 SXM5
constexpr size_t kWeightBytes = size_t{1} << 30;
constexpr size_t kXBytes = size_t{1100} << 20, kOutBytes = size_t{1200} << 20;

class Bench {
 public:
  Bench()
      : weights_(kWeightBytes),
        x_(kXBytes),
        out_(kOutBytes / 2),
        scales_(size_t{16} << 20),
        workspace_(Fp8GemmWorkspaceBytes()),
        offsets_(513) {
    FillFp8<<<528, 256>>>(weights_.get(), weights_.size(), 1, false);
    FillFp8<<<528, 256>>>(x_.get(), x_.size(), 2, false);
    FillScales<<<528, 256>>>(scales_.get(), 1, scales_.size(), scales_.size(), 3, false, 0.01f);
    workspace_.Zero();
  }

  // Rows of each group; one: dense.
  void Run(const char* name, int n, int k, const std::vector<int>& rows, bool swiglu,
           const Fp8GemmTuning& tuning) {
    const int groups = static_cast<int>(rows.size());
    std::vector<int32_t> offsets = {0};
    int active = 0;
    for (int r : rows) offsets.push_back(offsets.back() + r), active += r > 0;
    offsets_.Set(offsets);
    const int copies = Copies(groups, n, k);
    const double flops = 2.0 * n * k * offsets.back(),
                 weight_bytes = static_cast<double>(active) * n * k;
    const int calls = flops > 1e13 ? 2 : flops > 1e12 ? 8 : std::max(20, copies);
    const double us = GraphMicroseconds(calls, 5, [&](int i, cudaStream_t stream) {
      return Fp8Gemm(Args(n, k, offsets, swiglu, i), tuning, stream);
    });
    const double bound = std::max(flops / kFlops, weight_bytes / kBytesPerSecond) * 1e6;
    std::printf(
        "%-8s %5dx%-5d groups %2d rows %5d %s tile %3d x%d stages %2d seg %2d guess %2d | %8.1f us "
        "| "
        "%6.0f TFLOP/s | %5.0f GB/s | %3.0f %%\n",
        name, n, k, groups, rows[0], swiglu ? "swiglu" : "      ", tuning.row_tile, tuning.cluster,
        tuning.stages, tuning.segments, tuning.guess_blocks, us, flops / us * 1e-6,
        weight_bytes / us * 1e-3, 100 * bound / us);
    std::fflush(stdout);
  }

  // The same product by each kernel that may compute it for many rows: TFLOP/s of Fp8Gemm(), of
  // Fp8GemmManyRows() with each of `tunings`, of cuBLASLt where the rows are of one group.
  void Compare(const char* name, int n, int k, const std::vector<int>& rows, bool swiglu,
               const std::vector<Fp8GemmManyRowsTuning>& tunings) {
    const int groups = static_cast<int>(rows.size());
    std::vector<int32_t> offsets = {0};
    for (int r : rows) offsets.push_back(offsets.back() + r);
    offsets_.Set(offsets);
    const double flops = 2.0 * n * k * offsets.back();
    const int calls = std::max(Copies(groups, n, k), static_cast<int>(1e13 / flops));
    std::vector<std::function<cudaError_t(int, cudaStream_t)>> kernels = {
        [&](int i, cudaStream_t stream) {
          return Fp8Gemm(Args(n, k, offsets, swiglu, i), stream);
        }};
    for (const Fp8GemmManyRowsTuning& tuning : tunings) {
      kernels.push_back([&, tuning](int i, cudaStream_t stream) {
        return Fp8GemmManyRows(Args(n, k, offsets, swiglu, i), tuning, stream);
      });
    }
    if (groups == 1 && !swiglu && cublas_ != nullptr) {
      kernels.push_back([&](int i, cudaStream_t stream) {
        const Fp8GemmArgs args = Args(n, k, offsets, swiglu, i);
        const absl::Status status = cublas_->Linear({args.x, nullptr}, args.num_rows, args.weight,
                                                    args.out, args.out_stride, stream);
        if (!status.ok()) std::printf("%s\n", status.ToString().c_str());
        return status.ok() ? cudaSuccess : cudaErrorUnknown;
      });
      kernels.back()(0, nullptr);  // chooses the algorithm
    }
    // At the limit of its power the GPU is the slower the more the kernel before took: in turns.
    constexpr int kRounds = 3;
    std::vector<std::vector<double>> us(kernels.size());
    for (int round = 0; round < kRounds; ++round) {
      for (size_t i = 0; i < kernels.size(); ++i)
        us[i].push_back(GraphMicroseconds(calls, 2, kernels[i]));
    }
    std::printf("%s %dx%d g%d r%d:", name, n, k, groups, rows[0]);
    for (std::vector<double>& times : us) {
      std::sort(times.begin(), times.end());
      std::printf(" %.0f", flops / times[kRounds / 2] * 1e-6);
    }
    std::printf("\n");
    std::fflush(stdout);
  }

  // Products of zeros take little power: what the kernels are without its limit.
  void Zero() {
    x_.Zero();
    weights_.Zero();
  }

 private:
  static int Copies(int groups, int n, int k) {
    const size_t bytes = static_cast<size_t>(groups) * n * k;
    return static_cast<int>(std::max<size_t>(1, std::min<size_t>(kWeightBytes / bytes, 64)));
  }

  // Of call i, which has weights that were not used for as long as may be.
  Fp8GemmArgs Args(int n, int k, const std::vector<int32_t>& offsets, bool swiglu, int i) {
    const int groups = static_cast<int>(offsets.size()) - 1;
    Fp8GemmArgs args;
    args.x = {x_.get(), scales_.get(), (offsets.back() + 3) / 4 * 4};
    args.num_rows = offsets.back();
    args.weight.fp8 =
        weights_.get() + static_cast<size_t>(groups) * n * k * (i % Copies(groups, n, k));
    args.weight.scales = scales_.get();
    args.weight.scale_stride = (k / 128 + 3) / 4 * 4;
    args.weight.num_groups = groups;
    args.weight.n = n;
    args.weight.k = k;
    args.group_offsets = groups > 1 ? offsets_.get() : nullptr;
    args.out = out_.get();
    args.out_stride = swiglu ? n / 2 : n;
    args.swiglu = swiglu;
    args.workspace = workspace_.get();
    return args;
  }

  std::unique_ptr<Cublas> cublas_ = [] {
    absl::StatusOr<std::unique_ptr<Cublas>> cublas = Cublas::Create();
    return cublas.ok() ? *std::move(cublas) : nullptr;
  }();
  DeviceArray<__nv_fp8_e4m3> weights_, x_;
  DeviceArray<__nv_bfloat16> out_;
  DeviceArray<float> scales_;
  DeviceArray<std::byte> workspace_;
  DeviceArray<int32_t> offsets_;
};

struct Case {
  const char* name;
  int n, k;
  bool swiglu;
};
constexpr Case kExperts[] = {{"gate_up", 4096, 7168, true}, {"down", 7168, 2048, false}};
constexpr Case kLinears[] = {{"qkv_a", 2112, 7168, false},
                             {"q_b", 24576, 1536, false},
                             {"o", 7168, 16384, false},
                             {"gate_up", 36864, 7168, true},
                             {"down", 7168, 18432, false}};

// Tiles worth a try: those that do not cut few rows into many tiles, nor leave most of one empty.
std::vector<Fp8GemmTuning> Tunings(int rows, bool tiles) {
  std::vector<Fp8GemmTuning> tunings = {{}};
  for (int tile : {8, 16, 32, 64, 128}) {
    if (tiles && rows <= 2 * tile && tile <= 8 * rows) tunings.push_back({tile});
  }
  return tunings;
}

void Main(const std::vector<std::string>& arguments) {
  const auto wanted = [&](const char* what) {
    for (const std::string& a : arguments) {
      if (a == what) return true;
    }
    return false;
  };
  const bool tiles = wanted("tiles");
  const bool all = !wanted("experts") && !wanted("linears") && !wanted("prefill") &&
                   !wanted("cluster") && !wanted("variants") && !wanted("brief") && !wanted("many");
  Bench bench;
  if (wanted("many")) {
    const std::vector<Fp8GemmManyRowsTuning> tunings = {{128, 1}, {128, 2}, {256, 1}, {256, 2}};
    std::printf("TFLOP/s: few rows, many rows in tiles x cluster");
    for (const Fp8GemmManyRowsTuning& t : tunings) std::printf(" %dx%d", t.row_tile, t.cluster);
    std::printf(", cuBLASLt\n");
    // As a router deals rows out, and the shared expert with all tokens.
    const auto experts = [](int rows) {
      std::vector<int> groups(17, 2 * rows);
      for (int i = 0; i < 16; ++i) groups[i] = rows + static_cast<int>(Hash(7, i) % 64) - 32;
      return groups;
    };
    for (const int rows : {128, 256, 512, 1024, 2048, 4096}) {
      for (const Case& c : kExperts)
        bench.Compare(c.name, c.n, c.k, experts(rows), c.swiglu, tunings);
    }
    for (const int rows : {1024, 8192}) {
      for (const Case& c : kLinears) bench.Compare(c.name, c.n, c.k, {rows}, c.swiglu, tunings);
    }
    std::printf("zeros:\n");
    bench.Zero();
    for (const Case& c : kExperts)
      bench.Compare(c.name, c.n, c.k, experts(2048), c.swiglu, tunings);
    bench.Compare("o", 7168, 16384, {8192}, false, tunings);
  }
  if (all || wanted("experts")) {
    for (const Case& c : kExperts) {
      for (int groups : {16, 17}) {
        for (int rows : {1, 4, 8, 16, 32, 64, 128, 256}) {
          for (const Fp8GemmTuning& t : Tunings(rows, tiles))
            bench.Run(c.name, c.n, c.k, std::vector<int>(groups, rows), c.swiglu, t);
        }
      }
      bench.Run("ragged", c.n, c.k, {1, 0, 3, 17, 8, 8, 2, 30, 0, 5, 9, 12, 6, 6, 11, 10}, c.swiglu,
                {});
      bench.Run("one row", c.n, c.k, {1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1}, c.swiglu,
                {});
    }
  }
  if (all || wanted("linears")) {
    for (const Case& c : kLinears) {
      for (int rows : {1, 8, 32, 64, 128}) {
        for (const Fp8GemmTuning& t : Tunings(rows, tiles))
          bench.Run(c.name, c.n, c.k, {rows}, c.swiglu, t);
      }
    }
  }
  if (wanted("brief")) {
    for (int tile : {64, 128}) {
      for (int cluster : {1, 2}) {
        bench.Run("o", 7168, 16384, {4096}, false, {tile, 0, 0, cluster});
        bench.Run("down", 7168, 2048, std::vector<int>(17, 1024), false, {tile, 0, 0, cluster});
        bench.Run("gate_up", 4096, 7168, std::vector<int>(17, 1024), true, {tile, 0, 0, cluster});
        bench.Run("o", 7168, 16384, {4096}, false, {tile, 3, 0, cluster});
      }
    }
    bench.Run("o", 7168, 16384, {8}, false, {8, 0, 1, 1});
    bench.Run("gate_up", 4096, 7168, std::vector<int>(17, 8), true, {});
  }
  if (wanted("variants")) {
    std::vector<Fp8GemmTuning> tunings = {{}};
    for (int stages : {6, 12}) tunings.push_back({0, stages});
    for (int segments : {1, 2, 3, 4}) tunings.push_back({0, 0, segments});
    tunings.push_back({0, 0, 0, 0, 0});
    for (const Fp8GemmTuning& t : tunings) {
      for (const Case& c : kExperts)
        bench.Run(c.name, c.n, c.k, std::vector<int>(17, 8), c.swiglu, t);
      for (const Case& c : kLinears) bench.Run(c.name, c.n, c.k, {8}, c.swiglu, t);
    }
    const std::vector<Fp8GemmTuning> wide = {{32}, {64}, {128, 0, 0, 1}, {128, 0, 0, 2}};
    for (const Fp8GemmTuning& t : wide) {
      for (int rows : {32, 64, 128, 256}) {
        for (const Case& c : kExperts)
          bench.Run(c.name, c.n, c.k, std::vector<int>(17, rows), c.swiglu, t);
        for (const Case& c : kLinears) bench.Run(c.name, c.n, c.k, {rows}, c.swiglu, t);
      }
    }
  }
  if (wanted("cluster")) {
    for (int tile : {64, 128})
      for (int cluster : {1, 2}) {
        for (const Case& c : kExperts) {
          for (int rows : {64, 128, 256, 1024, 4096})
            bench.Run(c.name, c.n, c.k, std::vector<int>(17, rows), c.swiglu,
                      {tile, 0, 0, cluster});
        }
        for (const Case& c : kLinears)
          bench.Run(c.name, c.n, c.k, {4096}, c.swiglu, {tile, 0, 0, cluster});
      }
  }
  if (all || wanted("prefill")) {
    for (const Case& c : kExperts) {
      for (int rows : {1024, 4096})
        bench.Run(c.name, c.n, c.k, std::vector<int>(17, rows), c.swiglu, {});
    }
    for (const Case& c : kLinears) bench.Run(c.name, c.n, c.k, {4096}, c.swiglu, {});
  }
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) { latentd::Main(std::vector<std::string>(argv + 1, argv + argc)); }
