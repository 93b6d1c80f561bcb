// MLA decode over a cold cache: `shape | us | TFLOP/s | GB/s | % of bound`. The bound is the larger
// of the cache's bytes at 89 % of the memory's bandwidth (what a copy reaches: 3.0 TB/s on an H100,
// 4.3 on an H200) and the operations at 600 TFLOP/s. Arguments: bf16, fp8; none: both.
#include <cuda_fp8.h>

#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "engine/cuda/kernels/mla_decode.h"
#include "tests/engine/cuda/device_test.h"

namespace latentd {
namespace {

constexpr int kBlockKeys = 64;
constexpr double kOperationsPerSecond = 600e12;

__device__ float RandomNormal(uint64_t i) {
  uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  float sum = -2;  // of four uniform values: close to normal
  for (int k = 0; k < 4; ++k) sum += static_cast<float>((x >> (16 * k)) & 0xffff) / 65536.f;
  return sum * 1.7f;
}

__global__ void FillRandom(__nv_bfloat16* data, int64_t size) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x) {
    data[i] = __float2bfloat16(RandomNormal(i));
  }
}

constexpr int64_t kFp8BlockBytes = MlaCacheBlockBytes(CacheFormat::kFp8);

__global__ void FillRandomFp8(std::byte* data, int64_t num_blocks) {
  constexpr float kScale = 1.f / 64;
  for (int64_t b = blockIdx.x; b < num_blocks; b += gridDim.x) {
    std::byte* block = data + b * kFp8BlockBytes;
    for (int i = threadIdx.x; i < kBlockKeys * kMlaLatentDim; i += blockDim.x) {
      block[i] = std::byte{__nv_cvt_float_to_fp8(
          RandomNormal(b * kBlockKeys * kMlaKeyDim + i) / kScale, __NV_SATFINITE, __NV_E4M3)};
    }
    for (int i = threadIdx.x; i < kBlockKeys * kMlaRopeDim; i += blockDim.x) {
      reinterpret_cast<__nv_bfloat16*>(block + kMlaFp8RopeOffset)[i] =
          __float2bfloat16(RandomNormal(i) / kScale);
    }
    for (int i = threadIdx.x; i < kBlockKeys; i += blockDim.x)
      reinterpret_cast<float*>(block + kMlaFp8ScaleOffset)[i] = kScale;
  }
}

double CopyBytesPerSecond() {
  int khz = 0, bits = 0;
  cudaDeviceGetAttribute(&khz, cudaDevAttrMemoryClockRate, 0);
  cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, 0);
  return 0.89 * 2 * khz * 1e3 * bits / 8;
}

void Measure(const std::string& name, const std::vector<MlaSequence>& sequences,
             bool batch_invariant, CacheFormat format, DeviceArray<std::byte>* cache) {
  constexpr int kHeads = 128;
  MlaDecodePlanner::Options options;
  options.num_heads = kHeads;
  cudaDeviceGetAttribute(&options.num_sms, cudaDevAttrMultiProcessorCount, 0);
  options.max_sequences = static_cast<int32_t>(sequences.size());
  options.batch_invariant = batch_invariant;
  std::vector<int32_t> block_begin, blocks;
  int64_t pairs = 0, keys = 0;
  for (const MlaSequence& s : sequences) {
    options.max_queries += s.num_queries;
    block_begin.push_back(static_cast<int32_t>(blocks.size()));
    for (int i = 0; i < (s.num_keys + kBlockKeys - 1) / kBlockKeys; ++i) {
      blocks.push_back(static_cast<int32_t>(blocks.size()));
    }
    pairs += int64_t{s.num_queries} * s.num_keys;
    keys += s.num_keys;
  }
  std::mt19937 random(1);
  std::shuffle(blocks.begin(), blocks.end(), random);
  const MlaDecodePlanner planner(options);
  std::vector<int32_t> words;
  planner.Plan(sequences, &words);
  DeviceArray<int32_t> plan(words), table(blocks), begin(block_begin);
  DeviceArray<std::byte> workspace(planner.workspace_bytes());
  workspace.Zero();
  DeviceArray<__nv_bfloat16> q(int64_t{options.max_queries} * kHeads * 576);
  DeviceArray<__nv_bfloat16> out(int64_t{options.max_queries} * kHeads * 512);
  FillRandom<<<1024, 256>>>(q.get(), q.size());

  const int64_t layer = static_cast<int64_t>(blocks.size()) * MlaCacheBlockBytes(format);
  const int layers = static_cast<int>(static_cast<int64_t>(cache->size()) / layer);
  MlaDecodeArgs args;
  args.q = q.get();
  args.blocks = table.get();
  args.block_begin = begin.get();
  args.plan = plan.get();
  args.workspace = workspace.get();
  args.num_heads = kHeads;
  args.softmax_scale = 0.1352f;
  args.out = out.get();
  const double us = GraphMicroseconds(24, 11, [&](int i, cudaStream_t stream) {
    args.cache = {cache->get() + i % layers * layer, format};
    return MlaDecode(args, stream);
  });
  const double operations = pairs * kHeads * 2.0 * (576 + 512);
  const double token_bytes = static_cast<double>(MlaCacheBlockBytes(format)) / kBlockKeys;
  const double bytes = keys * token_bytes + q.bytes() + out.bytes();
  const double bound =
      std::max(bytes / CopyBytesPerSecond(), operations / kOperationsPerSecond) * 1e6;
  std::printf("%-34s | %7.1f | %6.1f | %6.0f | %5.1f\n", name.c_str(), us, operations / us * 1e-6,
              bytes / us * 1e-3, 100 * bound / us);
}

void MeasureAll(CacheFormat format, DeviceArray<std::byte>* cache) {
  const bool fp8 = format == CacheFormat::kFp8;
  if (fp8) {
    FillRandomFp8<<<1024, 256>>>(cache->get(), cache->size() / MlaCacheBlockBytes(format));
  } else {
    FillRandom<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(cache->get()), cache->size() / 2);
  }
  std::mt19937 random(2);
  std::vector<MlaSequence> ragged;
  for (int i = 0; i < 64; ++i)
    ragged.push_back({1, std::uniform_int_distribution<int>(256, 4096)(random)});
  for (bool invariant : {false, true}) {
    const std::string suffix = std::string(fp8 ? " fp8" : "") + (invariant ? " invariant" : "");
    for (int keys : {2048, 4096}) {
      for (int batch : {1, 2, 4, 8, 16, 32, 64, 128}) {
        Measure("B=" + std::to_string(batch) + " " + std::to_string(keys) + suffix,
                std::vector<MlaSequence>(batch, {1, keys}), invariant, format, cache);
      }
    }
    Measure("B=64 256-4096" + suffix, ragged, invariant, format, cache);
    Measure("B=32 4096, 2 queries" + suffix, std::vector<MlaSequence>(32, {2, 4096}), invariant,
            format, cache);
    Measure("B=1 131072" + suffix, {{1, 131072}}, invariant, format, cache);
  }
}

int Main(const std::string& formats) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("no GPU\n");
    return 1;
  }
  std::printf("%-34s | %7s | %6s | %6s | %% of bound\n", "128 heads", "us", "TFLOP/s", "GB/s");
  DeviceArray<std::byte> cache(int64_t{1400} << 20);
  if (formats != "fp8") MeasureAll(CacheFormat::kBf16, &cache);
  if (formats != "bf16") MeasureAll(CacheFormat::kFp8, &cache);
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) { return latentd::Main(argc > 1 ? argv[1] : ""); }
