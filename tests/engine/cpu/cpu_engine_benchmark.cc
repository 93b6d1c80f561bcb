// Times the CPU engine through its public interface. Reads one JSON object per line and answers
// each with one, so that another program can take turns with it
// (scripts/bench_cpu_vs_transformers.py):
//   {"run": "prefill", "tokens": 1024}
//   {"run": "decode", "batch": 8, "context": 16, "tokens": 32}
//   {"run": "peak"}
// Usage: cpu_engine_benchmark MODEL_DIR NUM_THREADS [NUM_RANKS [local|tcp]]
// With ranks: a group of them in threads of this process, each with NUM_THREADS, among which a
// batch is dealt out.

#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/cpu/cpu_engine.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/local_transport.h"
#include "engine/cpu/tcp_transport.h"
#include "engine/cpu/thread_pool.h"
#include "engine/local_group.h"
#include "engine/model/config.h"
#include "engine/model/weights.h"
#include "nlohmann/json.hpp"

namespace latentd {
namespace {

constexpr int32_t kMaxStepTokens = 2048;
constexpr int32_t kNumBlocks = 4096;  // of all ranks

struct Ranks {
  int count = 1;
  std::string transport;  // empty: no group
};

template <typename T>
T OrDie(absl::StatusOr<T> result) {
  if (result.ok()) return *std::move(result);
  std::fprintf(stderr, "%s\n", result.status().ToString().c_str());
  std::exit(1);
}

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
double CpuSeconds() {
  rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
         1e-6 * (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

// FLOPs (2 per multiply-add) of the products that this engine computes for one token at `position`:
// absorbed MLA, the experts that the router chose; without norms, RoPE, softmax and the output
// head.
double TokenFlops(const ModelConfig& c, int position) {
  const double heads = c.num_attention_heads, hidden = c.hidden_size;
  const double q = c.q_lora_rank ? *c.q_lora_rank * (hidden + heads * c.qk_head_dim())
                                 : hidden * heads * c.qk_head_dim();
  const double projections = q + hidden * c.latent_dim() +
                             heads * c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim) +
                             hidden * heads * c.v_head_dim;
  const double attention = heads * (position + 1.0) * (c.latent_dim() + c.kv_lora_rank);
  const double dense = 3.0 * hidden * c.intermediate_size;
  const double moe = hidden * c.n_routed_experts + 3.0 * hidden * c.moe_intermediate_size *
                                                       (c.num_experts_per_tok + c.n_shared_experts);
  const int num_dense = std::min(c.first_k_dense_replace, c.num_hidden_layers);
  return 2.0 * (c.num_hidden_layers * (projections + attention) + num_dense * dense +
                (c.num_hidden_layers - num_dense) * moe);
}

class Benchmark {
 public:
  Benchmark(const std::string& dir, int num_threads, const Ranks& ranks)
      : config_(OrDie(LoadModelConfig(dir))),
        weights_(OrDie(LoadWeights(config_, dir, LoadFormat::kSafetensors, nullptr))),
        num_threads_(num_threads),
        num_ranks_(ranks.count) {
    if (ranks.transport.empty()) {
      engine_ = MakeRank(0, nullptr);
      return;
    }
    std::vector<std::unique_ptr<GroupTransport>> transports =
        MakeLocalTransports(num_ranks_, kCallTimeout);
    std::vector<std::unique_ptr<GroupMember>> members;
    for (int rank = 0; rank < num_ranks_; ++rank) {
      if (ranks.transport == "tcp") {
        transports[rank] = OrDie(MakeTcpTransport({.call_timeout = kCallTimeout}));
      }
      members.push_back(MakeRank(rank, std::move(transports[rank])));
    }
    engine_ = OrDie(LocalGroup::Create(std::move(members)));
  }

  nlohmann::json Run(const nlohmann::json& command) {
    const std::string run = command.at("run");
    if (run == "peak") return Peak();
    const int batch = command.value("batch", 1), tokens = command.at("tokens");
    if (run == "prefill") {
      return Timed([&] { Compute(batch, 0, tokens); }, batch * tokens,
                   batch * Flops(0, tokens) + batch * HeadFlops());
    }
    const int context = command.at("context");
    Compute(batch, 0, context);
    return Timed(
        [&] {
          for (int i = 0; i < tokens; ++i) Compute(batch, context + i, 1);
        },
        batch * tokens, batch * (Flops(context, tokens) + tokens * HeadFlops()));
  }

 private:
  static constexpr absl::Duration kCallTimeout = absl::Minutes(5);

  std::unique_ptr<GroupMember> MakeRank(int rank, std::unique_ptr<GroupTransport> transport) {
    CpuEngineOptions options;
    options.num_threads = num_threads_;
    options.num_blocks = kNumBlocks / num_ranks_;
    options.max_step_tokens = kMaxStepTokens;
    options.placement = {.rank = rank, .world_size = num_ranks_};
    return OrDie(CpuEngine::Create(config_, weights_, options, std::move(transport)));
  }

  // Computes `num_tokens` of each of `batch` sequences behind `num_computed`, and draws.
  void Compute(int batch, int num_computed, int num_tokens) {
    StepPlan plan;
    for (int b = 0; b < batch; ++b) {
      SequenceStep& s = plan.sequences.emplace_back();
      s.id = b;
      s.dp_rank = b % num_ranks_;
      s.num_computed_tokens = num_computed;
      s.num_tokens = num_tokens;
      s.num_blocks = (num_computed + num_tokens + kBlockSize - 1) / kBlockSize;
      s.sample = true;
      s.sampling.temperature = 0.0f;
      for (int i = 0; i < num_tokens; ++i) {
        const uint32_t mixed = (b * 7919u + num_computed + i + 1) * 2654435761u;
        plan.tokens.push_back(static_cast<TokenId>((mixed >> 8) % config_.vocab_size));
      }
      const int of_rank = (batch + num_ranks_ - 1) / num_ranks_;
      const int first = b / num_ranks_ * (kNumBlocks / num_ranks_ / of_rank);
      for (int i = 0; i < s.num_blocks; ++i) plan.blocks.push_back(first + i);
    }
    const StepResult result = OrDie(engine_->Execute(plan));
    if (result.sampled.size() != static_cast<size_t>(batch)) std::exit(1);
  }

  double Flops(int begin, int count) const {
    double flops = 0.0;
    for (int i = 0; i < count; ++i) flops += TokenFlops(config_, begin + i);
    return flops;
  }
  double HeadFlops() const { return 2.0 * config_.hidden_size * config_.vocab_size; }

  template <typename Body>
  nlohmann::json Timed(const Body& body, int tokens, double flops) {
    const double wall = Now(), cpu = CpuSeconds();
    body();
    const double seconds = Now() - wall;
    return {{"seconds", seconds},
            {"cpu_seconds", CpuSeconds() - cpu},
            {"tokens_per_second", tokens / seconds},
            {"gflops", flops / seconds * 1e-9}};
  }

  // What all threads reach with fused multiply-add on registers alone.
  nlohmann::json Peak() {
    ThreadPool pool(num_threads_);
    const Kernels& kernels = *SupportedKernels().front();
    std::vector<double> flops(num_threads_);
    double best = 0.0;
    for (int repeat = 0; repeat < 5; ++repeat) {
      const double begin = Now();
      pool.For(num_threads_, 1,
               [&](int64_t i, int64_t, int) { flops[i] = kernels.fma_peak(2000000); });
      double sum = 0.0;
      for (double f : flops) sum += f;
      best = std::max(best, sum / (Now() - begin) * 1e-9);
    }
    return {{"peak_gflops", best}, {"kernels", kernels.name}, {"threads", num_threads_}};
  }

  ModelConfig config_;
  ModelWeights weights_;
  int num_threads_;
  int num_ranks_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  latentd::Ranks ranks;
  if (argc > 3) ranks = {.count = std::atoi(argv[3]), .transport = argc > 4 ? argv[4] : "local"};
  const bool transport_known =
      ranks.transport.empty() || ranks.transport == "local" || ranks.transport == "tcp";
  if (argc < 3 || argc > 5 || std::atoi(argv[2]) < 1 || ranks.count < 1 || !transport_known) {
    std::fprintf(stderr, "usage: %s MODEL_DIR NUM_THREADS [NUM_RANKS [local|tcp]] < commands\n",
                 argv[0]);
    return 2;
  }
  latentd::Benchmark benchmark(argv[1], std::atoi(argv[2]), ranks);
  for (std::string line; std::getline(std::cin, line);) {
    const auto command = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const bool known = command.is_object() && command.contains("run") &&
                       (command["run"] == "peak" || command["run"] == "prefill" ||
                        (command["run"] == "decode" && command.contains("context")));
    if (!known || (command["run"] != "peak" && !command.contains("tokens"))) {
      std::fprintf(stderr, "not a command: %s\n", line.c_str());
      return 2;
    }
    nlohmann::json answer = benchmark.Run(command);
    answer["command"] = command;
    std::cout << answer.dump() << std::endl;
  }
  return 0;
}
