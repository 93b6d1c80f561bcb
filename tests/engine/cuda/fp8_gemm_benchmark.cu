// Fp8Gemm() at DeepSeek-V3's shapes, weights cold. A line for each: shape, rows, tile | us |
// TFLOP/s | GB/s of weights | % of the bound. Arguments: any of `experts`, `linears`, `prefill`,
// `tiles` (every tile of rows); none: the first three.
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
    const size_t bytes = static_cast<size_t>(groups) * n * k;
    const int copies =
        static_cast<int>(std::max<size_t>(1, std::min<size_t>(kWeightBytes / bytes, 64)));
    const double flops = 2.0 * n * k * offsets.back(),
                 weight_bytes = static_cast<double>(active) * n * k;
    const int calls = flops > 1e13 ? 2 : flops > 1e12 ? 8 : std::max(20, copies);
    const double us = GraphMicroseconds(calls, 5, [&](int i, cudaStream_t stream) {
      Fp8GemmArgs args;
      args.x = {x_.get(), scales_.get(), (offsets.back() + 3) / 4 * 4};
      args.num_rows = offsets.back();
      args.weight.fp8 = weights_.get() + bytes * (i % copies);
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
      return Fp8Gemm(args, tuning, stream);
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

 private:
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
                   !wanted("cluster") && !wanted("variants") && !wanted("brief");
  Bench bench;
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
