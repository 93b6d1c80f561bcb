// MLA decode over a cold cache: `shape | us | TFLOP/s | GB/s | % of bound`. The bound is the larger
// of the cache's bytes at 3.0 TB/s and the operations at 600 TFLOP/s.
#include <cstdio>
#include <random>
#include <string>

#include "engine/cuda/kernels/mla_decode.h"
#include "tests/engine/cuda/device_test.h"

namespace latentd {
namespace {

constexpr int kBlockKeys = 64;
constexpr int64_t kBlockElements = kBlockKeys * 576;
constexpr double kBytesPerSecond = 3.0e12;
constexpr double kOperationsPerSecond = 600e12;

__global__ void FillRandom(__nv_bfloat16* data, int64_t size) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    float sum = -2;  // of four uniform values: close to normal
    for (int k = 0; k < 4; ++k) sum += static_cast<float>((x >> (16 * k)) & 0xffff) / 65536.f;
    data[i] = __float2bfloat16(sum * 1.7f);
  }
}

void Measure(const std::string& name, const std::vector<MlaSequence>& sequences,
             bool batch_invariant, DeviceArray<__nv_bfloat16>* cache) {
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

  const int64_t layer = static_cast<int64_t>(blocks.size()) * kBlockElements;
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
    args.cache = cache->get() + i % layers * layer;
    return MlaDecode(args, stream);
  });
  const double operations = pairs * kHeads * 2.0 * (576 + 512);
  const double bytes = keys * 576 * 2.0 + q.bytes() + out.bytes();
  const double bound = std::max(bytes / kBytesPerSecond, operations / kOperationsPerSecond) * 1e6;
  std::printf("%-34s | %7.1f | %6.1f | %6.0f | %5.1f\n", name.c_str(), us, operations / us * 1e-6,
              bytes / us * 1e-3, 100 * bound / us);
}

int Main() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
    std::printf("no GPU\n");
    return 1;
  }
  DeviceArray<__nv_bfloat16> cache(int64_t{700} << 20);
  FillRandom<<<1024, 256>>>(cache.get(), cache.size());
  std::printf("%-34s | %7s | %6s | %6s | %% of bound\n", "128 heads", "us", "TFLOP/s", "GB/s");
  std::mt19937 random(2);
  std::vector<MlaSequence> ragged;
  for (int i = 0; i < 64; ++i)
    ragged.push_back({1, std::uniform_int_distribution<int>(256, 4096)(random)});
  for (bool invariant : {false, true}) {
    const std::string suffix = invariant ? ", batch invariant" : "";
    for (int keys : {2048, 4096}) {
      for (int batch : {1, 2, 4, 8, 16, 32, 64, 128}) {
        Measure("B=" + std::to_string(batch) + " " + std::to_string(keys) + suffix,
                std::vector<MlaSequence>(batch, {1, keys}), invariant, &cache);
      }
    }
    Measure("B=64 256-4096" + suffix, ragged, invariant, &cache);
    Measure("B=32 4096, 2 queries" + suffix, std::vector<MlaSequence>(32, {2, 4096}), invariant,
            &cache);
    Measure("B=1 131072" + suffix, {{1, 131072}}, invariant, &cache);
  }
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 1;
}

}  // namespace
}  // namespace latentd

int main() { return latentd::Main(); }
