// Times routing, gathering, the bf16 products and the draw, captured in graphs. An argument
// (routing, products, sampling) chooses one of them.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "engine/cuda/kernels/moe.h"
#include "engine/cuda/kernels/router_logits.h"
#include "engine/cuda/kernels/sampler.h"
#include "tests/engine/cuda/device_test.h"

namespace latentd {
namespace {

// `bytes` and `flops` that have to be; the bound is an H100's 3.35 TB/s and 989 TFLOP/s.
void Line(const std::string& shape, double us, double bytes, double flops = 0) {
  const double bound_us = std::max(bytes / 3.35e6, flops / 989e6);
  std::printf("%-58s | %8.2f us | %8.1f GB/s | %7.1f TFLOP/s | %5.1f %% of the bound\n",
              shape.c_str(), us, bytes / us * 1e-3, flops / us * 1e-6, bound_us / us * 100);
}

std::vector<float> Normals(uint32_t seed, size_t size, float sigma) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> values(size);
  for (float& value : values) value = normal(random);
  return values;
}

// Fills an array with a million random values, again and again.
template <typename T>
void Fill(DeviceArray<T>& array, float sigma) {
  const std::vector<float> some = Normals(1, std::min<size_t>(array.size(), 1'000'003), sigma);
  std::vector<T> values(some.size());
  for (size_t i = 0; i < some.size(); ++i) values[i] = static_cast<T>(some[i]);
  for (size_t done = 0; done < array.size(); done += values.size()) {
    cudaMemcpy(array.get() + done, values.data(),
               std::min(values.size(), array.size() - done) * sizeof(T), cudaMemcpyHostToDevice);
  }
}

void Routing() {
  struct Shape {
    int experts, n_group, topk_group, k, local, shared;
  };
  constexpr int kHidden = 7168, kCalls = 48;
  for (const Shape& s : {Shape{256, 8, 4, 8, 16, 1}, Shape{256, 8, 4, 8, 256, 1},
                         Shape{16, 1, 1, 8, 16, 1}, Shape{384, 1, 1, 8, 24, 1}}) {
    for (int tokens : {1, 8, 16, 32, 64, 128, 256, 1024, 2048, 8192}) {
      const int gates = tokens <= 256 ? std::max(2, 120'000'000 / (s.experts * kHidden * 2)) : 2;
      const int calls = tokens <= 256 ? kCalls : 8, choices = s.k + s.shared;
      DeviceArray<__nv_bfloat16> gate(size_t(gates) * s.experts * kHidden),
          x(size_t(tokens) * kHidden), out(size_t(tokens) * choices * kHidden);
      Fill(gate, 0.02f);
      Fill(x, 1.0f);
      DeviceArray<float> bias(Normals(3, s.experts, 0.01f)), weights(size_t(tokens) * choices);
      DeviceArray<int32_t> real(std::vector<int32_t>{tokens}), row_of(size_t(tokens) * choices),
          ids(size_t(tokens) * s.k), token_of_row(size_t(tokens) * choices),
          offsets(s.local + s.shared + 1);
      DeviceArray<std::byte> workspace(RouterWorkspaceBytes(tokens, s.experts));
      workspace.Zero();
      RouterArgs args = {.num_tokens = tokens,
                         .num_real_tokens = real.get(),
                         .hidden_size = kHidden,
                         .x = x.get(),
                         .correction_bias = bias.get(),
                         .n_routed_experts = s.experts,
                         .n_group = s.n_group,
                         .topk_group = s.topk_group,
                         .num_experts_per_tok = s.k,
                         .routed_scaling_factor = 2.5f,
                         .first_expert = 0,
                         .num_local_experts = s.local,
                         .num_shared = s.shared,
                         .workspace = workspace.get(),
                         .routing = {.num_choices = choices,
                                     .row_of = row_of.get(),
                                     .weights = weights.get(),
                                     .topk_ids = ids.get(),
                                     .token_of_row = token_of_row.get(),
                                     .group_offsets = offsets.get()}};
      const double us = GraphMicroseconds(calls, 20, [&](int i, cudaStream_t stream) {
        args.gate_bf16 = gate.get() + size_t(i % gates) * s.experts * kHidden;
        return RouteTokens(args, stream);
      });
      char name[100];
      std::snprintf(name, sizeof(name), "route E=%d groups %d/%d k=%d local %d T=%d", s.experts,
                    s.topk_group, s.n_group, s.k, s.local, tokens);
      Line(name, us, 2.0 * kHidden * (s.experts + tokens), 2.0 * kHidden * s.experts * tokens);
      const double logits_us = GraphMicroseconds(calls, 20, [&](int i, cudaStream_t stream) {
        return RouterLogits({.num_tokens = tokens,
                             .hidden_size = kHidden,
                             .n_routed_experts = s.experts,
                             .x = x.get(),
                             .gate_bf16 = gate.get() + size_t(i % gates) * s.experts * kHidden,
                             .gate_f32 = nullptr,
                             .out = reinterpret_cast<float*>(workspace.get())},
                            stream);
      });
      Line("  its logits", logits_us, 2.0 * kHidden * (s.experts + tokens),
           2.0 * kHidden * s.experts * tokens);
      if (s.local != s.experts && tokens <= 8192) {
        const int64_t stride = (tokens + 3) / 4 * 4, out_stride = (tokens * choices + 3) / 4 * 4;
        DeviceArray<float> scales(size_t(kHidden / 128) * stride),
            out_scales(size_t(kHidden / 128) * out_stride);
        const GatherArgs gather = {
            .routing = args.routing,
            .num_groups = s.local + s.shared,
            .max_rows = tokens * choices,
            .hidden_size = kHidden,
            .x = {.fp8 = {reinterpret_cast<__nv_fp8_e4m3*>(x.get()), scales.get(), stride}},
            .out = {.fp8 = {reinterpret_cast<__nv_fp8_e4m3*>(out.get()), out_scales.get(),
                            out_stride}}};
        const double gather_us = GraphMicroseconds(
            calls, 20, [&](int, cudaStream_t st) { return GatherRows(gather, st); });
        const int rows = offsets.Get().back();
        std::snprintf(name, sizeof(name), "gather fp8 H=%d T=%d rows %d", kHidden, tokens, rows);
        Line(name, gather_us, rows * (2.0 * kHidden + kHidden / 16.0));
      }
    }
  }
}

void Products() {
  struct Shape {
    int n, k, groups;
    bool swiglu;
  };
  for (const Shape& s : {Shape{4096, 7168, 16, true}, Shape{7168, 2048, 16, false}}) {
    for (int rows : {1, 8, 64, 256}) {
      const int total = rows * s.groups, width = s.swiglu ? s.n / 2 : s.n;
      DeviceArray<__nv_bfloat16> weight(size_t(s.groups) * s.n * s.k), x(size_t(total) * s.k),
          out(size_t(total) * width);
      Fill(weight, 0.02f);
      Fill(x, 1.0f);
      std::vector<int32_t> offsets(s.groups + 1);
      for (int g = 0; g <= s.groups; ++g) offsets[g] = g * rows;
      DeviceArray<int32_t> offsets_device(offsets);
      const Bf16GemmArgs args = {
          .x = x.get(),
          .num_rows = total,
          .weight = {.bf16 = weight.get(), .num_groups = s.groups, .n = s.n, .k = s.k},
          .group_offsets = offsets_device.get(),
          .out = out.get(),
          .out_stride = width,
          .swiglu = s.swiglu};
      const double us = GraphMicroseconds(
          3, 10, [&](int, cudaStream_t stream) { return GroupedBf16Gemm(args, stream); });
      char name[100];
      std::snprintf(name, sizeof(name), "bf16 grouped %d x (%d x %d), %d rows each", s.groups, s.n,
                    s.k, rows);
      Line(name, us, 2.0 * s.groups * s.n * s.k, 2.0 * total * s.n * s.k);
    }
  }
}

void Sampling() {
  struct Kind {
    const char* name;
    SampleRow row;
  };
  const Kind kinds[] = {{"greedy", {.temperature = 0}},
                        {"temperature 1", {.temperature = 1}},
                        {"top_k 50", {.temperature = 1, .top_k = 50}},
                        {"top_p 0.9", {.temperature = 1, .top_p = 0.9f}},
                        {"min_p 0.05", {.temperature = 1, .min_p = 0.05f}},
                        {"top_k 50 top_p 0.9", {.temperature = 0.7f, .top_p = 0.9f, .top_k = 50}}};
  for (int vocab : {129280, 4096}) {
    for (int rows : {1, 8, 64, 128}) {
      const int copies = std::max(1, static_cast<int>(120'000'000 / (4.0 * vocab * rows)));
      const int buffers = std::min(copies + 1, 40);
      DeviceArray<float> logits(size_t(buffers) * rows * vocab);
      Fill(logits, 3.0f);
      DeviceArray<int32_t> sampled(rows), suppressed(std::vector<int32_t>{0});
      DeviceArray<std::byte> workspace(SamplerWorkspaceBytes(rows, vocab));
      for (const Kind& kind : kinds) {
        std::vector<SampleRow> params(rows, kind.row);
        for (int i = 0; i < rows; ++i) params[i].seed = i;
        DeviceArray<SampleRow> params_device(params);
        const double us = GraphMicroseconds(20, 10, [&](int i, cudaStream_t stream) {
          return SampleTokens({.logits = logits.get() + size_t(i % buffers) * rows * vocab,
                               .num_rows = rows,
                               .vocab_size = vocab,
                               .rows = params_device.get(),
                               .suppressed = suppressed.get(),
                               .workspace = workspace.get(),
                               .sampled = sampled.get()},
                              stream);
        });
        Line(std::string("sample ") + kind.name + " V=" + std::to_string(vocab) +
                 " B=" + std::to_string(rows),
             us, 4.0 * rows * vocab);
      }
    }
  }
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const std::string only = argc > 1 ? argv[1] : "";
  if (only.empty() || only == "routing") latentd::Routing();
  if (only.empty() || only == "products") latentd::Products();
  if (only.empty() || only == "sampling") latentd::Sampling();
}
