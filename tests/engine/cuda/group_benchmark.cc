// What a group costs a step beside what crosses the wires: the kernels of the exchange with the
// tokens of 16 ranks, and decode steps of an engine that is alone and of one rank over NCCL (which
// moves nothing between GPUs) in captured graphs.
//
//   group_benchmark [layers]
//
// Lines: `shape | us`.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <vector>

#include "engine/cuda/kernels/exchange.h"
#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/group_harness.h"

namespace latentd {
namespace {

constexpr int kRanks = 16, kExperts = 256, kTopK = 8, kHidden = 7168;

// Random choices of all ranks' tokens, and the kernels that rank 3 runs on them.
void MeasureKernels(int rows) {
  const int tokens = kRanks * rows, choices = kTopK + 1, max_rows = tokens * kTopK + rows;
  const int64_t stride = (rows + 3) / 4 * 4;
  const size_t ids_bytes = (size_t(rows) * kTopK * 4 + 255) / 256 * 256;
  const size_t x_bytes = size_t(rows) * kHidden, scale_bytes = kHidden / kQuantGroup * stride * 4;
  const size_t slot = (2 * ids_bytes + x_bytes + scale_bytes + 255) / 256 * 256;
  std::vector<uint8_t> data(slot * kRanks);
  uint32_t random = 1;
  std::vector<int32_t> experts(kExperts);
  std::iota(experts.begin(), experts.end(), 0);
  for (int t = 0; t < tokens; ++t) {
    for (int j = 0; j < kTopK; ++j) {
      random = random * 1664525u + 1013904223u;
      std::swap(experts[j], experts[j + (random >> 8) % (kExperts - j)]);
      auto* ids = reinterpret_cast<int32_t*>(&data[t / rows * slot]);
      ids[t % rows * kTopK + j] = experts[j];
    }
  }
  DeviceArray<uint8_t> slots(data), out(size_t(max_rows) * kHidden);
  DeviceArray<float> scales(size_t(kHidden / kQuantGroup) * ((max_rows + 3) / 4 * 4));
  DeviceArray<__nv_bfloat16> expert_out(size_t(max_rows) * kHidden), sums(size_t(tokens) * kHidden);
  DeviceArray<int32_t> real(std::vector<int32_t>{rows}), row_of(size_t(tokens) * choices),
      token_of_row(max_rows), offsets(kExperts / kRanks + 2);
  const RankSlots of_ranks = {.num_ranks = kRanks,
                              .rows = rows,
                              .slot_bytes = static_cast<int64_t>(slot),
                              .topk_ids = reinterpret_cast<int32_t*>(slots.get()),
                              .weights = reinterpret_cast<float*>(slots.get() + ids_bytes)};
  const MoeRouting routing = {.num_choices = choices,
                              .row_of = row_of.get(),
                              .token_of_row = token_of_row.get(),
                              .group_offsets = offsets.get()};
  const RouteSlotsArgs route = {.slots = of_ranks,
                                .own_rank = 3,
                                .num_real_tokens = real.get(),
                                .num_experts_per_tok = kTopK,
                                .first_expert = 3 * kExperts / kRanks,
                                .num_local_experts = kExperts / kRanks,
                                .num_shared = 1,
                                .max_rows = max_rows,
                                .routing = routing};
  const GatherArgs gather = {
      .routing = routing,
      .num_groups = kExperts / kRanks + 1,
      .max_rows = max_rows,
      .hidden_size = kHidden,
      .x = {.fp8 = {reinterpret_cast<__nv_fp8_e4m3*>(slots.get() + 2 * ids_bytes),
                    reinterpret_cast<float*>(slots.get() + 2 * ids_bytes + x_bytes), stride}},
      .out = {.fp8 = {reinterpret_cast<__nv_fp8_e4m3*>(out.get()), scales.get(),
                      (max_rows + 3) / 4 * 4}},
      .num_ranks = kRanks,
      .rank_rows = rows,
      .slot_bytes = static_cast<int64_t>(slot)};
  const SumExpertsArgs sum = {.slots = of_ranks,
                              .num_experts_per_tok = kTopK,
                              .hidden_size = kHidden,
                              .expert_out = expert_out.get(),
                              .routing = routing,
                              .out = sums.get()};
  const auto time = [](auto enqueue) {
    return GraphMicroseconds(50, 20, [&](int, cudaStream_t stream) { return enqueue(stream); });
  };
  const double route_us = time([&](cudaStream_t s) { return RouteSlots(route, s); });
  const double gather_us = time([&](cudaStream_t s) { return GatherRows(gather, s); });
  const double sum_us = time([&](cudaStream_t s) { return SumExperts(sum, s); });
  std::printf("16 ranks x %3d tokens: slot %zu B | route %.1f gather %.1f sum %.1f\n", rows, slot,
              route_us, gather_us, sum_us);
}

// Median seconds of decode steps.
double DecodeSeconds(Engine& engine, const CudaEngine& timed, int batch, int prompt) {
  constexpr int kSteps = 24;
  std::vector<Runner::Part> parts;
  const int blocks = (prompt + kSteps + kBlockSize) / kBlockSize;
  for (int i = 0; i < batch; ++i) {
    parts.push_back({.tokens = SomeTokens(prompt, 2048, 7 + static_cast<uint32_t>(i)),
                     .num_computed = 0,
                     .blocks = ConsecutiveBlocks(prompt, i * blocks)});
  }
  std::vector<double> seconds;
  for (int step = 0; step <= kSteps; ++step) {
    StepPlan plan = Runner::MakePlan(parts);
    for (SequenceStep& s : plan.sequences) s.sample = true;
    for (SequenceStep& s : plan.sequences) s.sampling.temperature = 0;
    const auto result = engine.Execute(plan);
    if (!result.ok()) {
      std::fprintf(stderr, "Execute: %s\n", result.status().ToString().c_str());
      std::exit(1);
    }
    if (step > 4) seconds.push_back(timed.last_step().busy_s);
    for (int i = 0; i < batch; ++i) {
      parts[i] = {.tokens = {result->sampled[i]},
                  .num_computed = prompt + step,
                  .blocks = ConsecutiveBlocks(prompt + step + 1, i * blocks)};
    }
  }
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return seconds[seconds.size() / 2];
}

void MeasureSteps(int layers) {
  nlohmann::json json = nlohmann::json::parse(std::ifstream("deploy/configs/shard16.json"));
  json["num_hidden_layers"] = layers;
  json["vocab_size"] = 2048;
  const auto config = ParseModelConfig(json.dump());
  const CudaEngineOptions options{.num_blocks = 256,
                                  .max_step_tokens = 4096,
                                  .max_sequences = 64,
                                  .max_model_len = 2048,
                                  .max_graph_sequences = 64};
  auto alone = MakeCudaEngine(*config, "", LoadFormat::kDummy, options);
  GpuGroup group = MakeGpuGroup(*config, "", LoadFormat::kDummy, options, 1, nullptr);
  std::printf("%d layers, %d of them with experts; %s\n", layers,
              layers - config->first_k_dense_replace, group.ranks[0]->transport().c_str());
  for (const int batch : {1, 8, 32, 64}) {
    const double one = DecodeSeconds(*alone, *alone, batch, 60);
    const double rank = DecodeSeconds(*group.group, *group.ranks[0], batch, 60);
    std::printf("decode of %2d | alone %.0f, one rank %.0f: %.1f more a layer\n", batch, one * 1e6,
                rank * 1e6, (rank - one) * 1e6 / (layers - config->first_k_dense_replace));
  }
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  if (latentd::CudaDeviceCount() == 0) {
    std::printf("no GPU\n");
    return 0;
  }
  for (const int rows : {1, 8, 64, 256}) latentd::MeasureKernels(rows);
  latentd::MeasureSteps(argc > 1 ? std::atoi(argv[1]) : 13);
  return 0;
}
