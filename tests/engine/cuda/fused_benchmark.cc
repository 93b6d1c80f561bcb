// Times the kernels between the products at DeepSeek-V3's sizes: `fused_benchmark [filter]`. Each
// line is the median of replays of a CUDA graph of calls in a row, each call launched as in a step,
// so that its start overlaps the end of the one before. Weights of products come from memory, not
// from the L2 cache; what a decode step has just written is in it, as in a step. The bound is bytes
// over 3.35 TB/s.

#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "engine/cuda/kernels/mla_projection.h"
#include "engine/cuda/kernels/norm.h"
#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/linear_input.h"

namespace latentd {
namespace {

constexpr int kHiddenSize = 7168;
constexpr int kNumHeads = 128;
constexpr int kQueryRank = 1536;
constexpr int kMaxTokens = 8192;
constexpr int kNumChoices = 9;
constexpr int kCopies = 8;  // of W_UK or W_UV: 134 MB
constexpr double kPeakBytes = 3.35e12;

using Enqueue = std::function<cudaError_t(int, cudaStream_t)>;

void Report(const char* filter, const std::string& shape, double bytes, double operations,
            const Enqueue& enqueue) {
  if (shape.find(filter) == std::string::npos) return;
  const int calls = bytes > 50e6 ? 16 : 64;
  const double us = GraphMicroseconds(calls, 20, enqueue);
  std::printf("%-36s | %8.2f us | %6.1f TFLOP/s | %6.0f GB/s | %5.1f %% of bound\n", shape.c_str(),
              us, operations / us * 1e-6, bytes / us * 1e-3, 100 * bytes / kPeakBytes * 1e6 / us);
}

// Buffers for kMaxTokens tokens. Zeros unless said otherwise: none of these kernels' times depends
// on values, but poison in an index would be one.
struct Buffers {
  DeviceArray<float> residual{size_t{kMaxTokens} * kHiddenSize};
  DeviceArray<float> norm_weight{RandomFloats(kHiddenSize, 1, 0.1f, 1)};
  DeviceArray<__nv_bfloat16> delta{size_t{kMaxTokens} * kHiddenSize};
  DeviceArray<__nv_bfloat16> expert_out{size_t{kMaxTokens} * kHiddenSize};
  DeviceArray<int32_t> row_of{size_t{kMaxTokens} * kNumChoices};
  DeviceArray<float> choice_weights{size_t{kMaxTokens} * kNumChoices};
  DeviceArray<__nv_fp8_e4m3> fp8{size_t{kMaxTokens} * kNumHeads * 128};
  DeviceArray<float> scales{size_t{kMaxTokens} * kNumHeads};
  DeviceArray<__nv_bfloat16> bf16{size_t{kMaxTokens} * kHiddenSize};
  DeviceArray<__nv_bfloat16> qkv{size_t{kMaxTokens} * (kQueryRank + 576)};
  DeviceArray<__nv_bfloat16> q{size_t{kMaxTokens} * kNumHeads * 192};
  DeviceArray<__nv_bfloat16> q_out{size_t{kMaxTokens} * kNumHeads * 192};
  DeviceArray<float> cos{RandomFloats(kMaxTokens * 32, 0, 0.5f, 2)};
  DeviceArray<float> sin{RandomFloats(kMaxTokens * 32, 0, 0.5f, 3)};
  DeviceArray<int32_t> positions{kMaxTokens};
  DeviceArray<int64_t> slots{kMaxTokens};
  DeviceArray<__nv_bfloat16> cache{size_t{kMaxTokens} * 576};
  DeviceArray<__nv_bfloat16> weights{size_t{kCopies} * kNumHeads * 128 * 512};

  Buffers() {
    for (auto* array : {&delta, &expert_out, &qkv, &q, &weights})
      array->Set(RandomBf16(array->size() < (64u << 20) ? array->size() : 64u << 20, 1, 4));
    residual.Zero();
    choice_weights.Zero();
    std::vector<int32_t> numbers(row_of.size());
    for (size_t i = 0; i < numbers.size(); ++i)
      numbers[i] = static_cast<int32_t>(i * 7919 % kMaxTokens);
    row_of.Set(numbers);
    for (int i = 0; i < kMaxTokens; ++i) numbers[i] = i;
    numbers.resize(kMaxTokens);
    positions.Set(numbers);
    slots.Set({numbers.begin(), numbers.end()});
  }

  RopeTable rope() const { return {cos.get(), sin.get(), true}; }
  LinearInput Out(bool with_bf16) {
    return {{fp8.get(), scales.get(), kMaxTokens}, with_bf16 ? bf16.get() : nullptr};
  }
};

void BenchmarkNorms(const char* filter, Buffers& b) {
  for (const int rows : {1, 8, 32, 64, 128, 512, 4096, 8192}) {
    const std::string suffix = ", " + std::to_string(rows) + " rows";
    AddNormArgs args;
    args.num_rows = rows;
    args.hidden_size = kHiddenSize;
    args.eps = 1e-6f;
    args.weight = b.norm_weight.get();
    args.residual = b.residual.get();
    args.delta = b.delta.get();
    args.out = b.Out(false);
    const double values = 1.0 * rows * kHiddenSize;
    Report(filter, "AddNorm delta, fp8" + suffix, values * 11, 0,
           [&](int, cudaStream_t stream) { return AddNorm(args, stream); });
    args.out = b.Out(true);
    Report(filter, "AddNorm delta, fp8 + bf16" + suffix, values * 13, 0,
           [&](int, cudaStream_t stream) { return AddNorm(args, stream); });
    args.delta = nullptr;
    args.expert_out = b.expert_out.get();
    args.routing.num_choices = kNumChoices;
    args.routing.row_of = b.row_of.get();
    args.routing.weights = b.choice_weights.get();
    args.out = b.Out(false);
    Report(filter, "AddNorm 9 experts, fp8" + suffix, values * (9 + 2 * kNumChoices), 0,
           [&](int, cudaStream_t stream) { return AddNorm(args, stream); });
    Report(filter, "QuantizeRows 7168" + suffix, values * 3, 0, [&](int, cudaStream_t stream) {
      return QuantizeRows(b.delta.get(), kHiddenSize, rows, nullptr, kHiddenSize, false,
                          b.Out(false).fp8, stream);
    });
  }
  AddNormArgs least;
  least.num_rows = 1;
  least.hidden_size = 128;
  least.weight = b.norm_weight.get();
  least.residual = b.residual.get();
  least.out = b.Out(false);
  Report(filter, "AddNorm of 128 columns, 1 row", 128 * 5, 0,
         [&](int, cudaStream_t stream) { return AddNorm(least, stream); });
}

void BenchmarkProjections(const char* filter, Buffers& b) {
  constexpr double kWeights = 1.0 * kNumHeads * 128 * 512;
  for (const int tokens : {1, 8, 16, 32, 64, 128, 512, 4096}) {
    const std::string suffix = ", " + std::to_string(tokens) + " tokens";
    LatentArgs latents;
    latents.num_tokens = tokens;
    latents.qkv_a = b.qkv.get();
    latents.q_dim = kQueryRank;
    latents.q_a_layernorm = b.norm_weight.get();
    latents.kv_a_layernorm = b.norm_weight.get();
    latents.eps = 1e-6f;
    latents.rope = b.rope();
    latents.positions = b.positions.get();
    latents.slots = b.slots.get();
    latents.cache = {reinterpret_cast<std::byte*>(b.cache.get()), CacheFormat::kBf16};
    latents.q_out = b.Out(false);
    Report(filter, "NormLatents" + suffix, tokens * (3.0 * kQueryRank + 4 * 576), 0,
           [&](int, cudaStream_t stream) { return NormLatents(latents, stream); });
    Report(filter, "RopeQuery" + suffix, tokens * 4.0 * kNumHeads * 64, 0,
           [&](int, cudaStream_t stream) {
             return RopeQuery(b.q.get(), kNumHeads * 192, tokens, kNumHeads, b.rope(),
                              b.positions.get(), stream);
           });
    if (tokens > 512) continue;
    Report(filter, "AbsorbQuery" + suffix, kWeights * 2 + tokens * 2.0 * kNumHeads * (192 + 576),
           2 * kWeights * tokens, [&](int i, cudaStream_t stream) {
             AbsorbQueryArgs args;
             args.num_tokens = tokens;
             args.num_heads = kNumHeads;
             args.q = b.q.get();
             args.q_stride = kNumHeads * 192;
             args.w_uk = b.weights.get() + i % kCopies * static_cast<size_t>(kWeights);
             args.rope = b.rope();
             args.positions = b.positions.get();
             args.out = b.q_out.get();
             return AbsorbQuery(args, stream);
           });
    Report(filter, "ProjectValue" + suffix, kWeights * 2 + tokens * 1.0 * kNumHeads * (1024 + 128),
           2 * kWeights * tokens, [&](int i, cudaStream_t stream) {
             ProjectValueArgs args;
             args.num_tokens = tokens;
             args.num_heads = kNumHeads;
             args.latent = b.q.get();
             args.w_uv = b.weights.get() + i % kCopies * static_cast<size_t>(kWeights);
             args.out = b.Out(false);
             return ProjectValue(args, stream);
           });
  }
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  const char* filter = argc > 1 ? argv[1] : "";
  latentd::Buffers buffers;
  latentd::BenchmarkNorms(filter, buffers);
  latentd::BenchmarkProjections(filter, buffers);
  return 0;
}
