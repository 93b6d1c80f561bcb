// How fast weights reach the GPU.
//   gpu_load_benchmark dummy CONFIG                random weights of a config.json, made on the GPU
//   gpu_load_benchmark write CONFIG DIR [LAYERS]   writes a sharded checkpoint of its first layers
//   gpu_load_benchmark load DIR [REPEATS]          loads a checkpoint; from the page cache from the
//                                                  second time on
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/cuda/gpu_weights.h"
#include "engine/model/dummy_hash.h"
#include "engine/model/dummy_weights.h"
#include "engine/model/layout.h"
#include "engine/model/load_jobs.h"
#include "engine/status.h"

namespace latentd {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxModelLen = 163840;
constexpr uint64_t kShardBytes = uint64_t{4} << 30;  // as the published checkpoints

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Shard {
  nlohmann::json header = nlohmann::json::object();
  uint64_t bytes = 0;
};

// Deals the tensors of a model out to shards.
class Sharder : public WeightVisitor {
 public:
  void Tensor(const TensorSpec& spec, TensorView& view) override { Add(spec.name, view); }
  void Linear(const TensorSpec& spec, LinearWeight& linear) override {
    Add(spec.name, linear.weight);
    if (!linear.scale_inv.shape.empty()) Add(spec.name + "_scale_inv", linear.scale_inv);
  }
  std::vector<Shard> shards = std::vector<Shard>(1);

 private:
  void Add(const std::string& name, const TensorView& view) {
    if (shards.back().bytes > 0 && shards.back().bytes + view.num_bytes() > kShardBytes) {
      shards.emplace_back();
    }
    Shard& shard = shards.back();
    shard.header[name] = {{"dtype", std::string(DTypeName(view.dtype))},
                          {"shape", view.shape},
                          {"data_offsets", {shard.bytes, shard.bytes + view.num_bytes()}}};
    shard.bytes += view.num_bytes();
  }
};

absl::Status WriteShard(const Shard& shard, const fs::path& file, const std::string& noise) {
  std::ofstream out(file, std::ios::binary);
  std::string header = shard.header.dump();
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const uint64_t header_bytes = header.size();
  out.write(reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));
  out.write(header.data(), static_cast<std::streamsize>(header.size()));
  for (uint64_t at = 0; at < shard.bytes; at += noise.size()) {
    const uint64_t size = std::min<uint64_t>(noise.size(), shard.bytes - at);
    out.write(noise.data(), static_cast<std::streamsize>(size));
  }
  out.close();
  return out ? absl::OkStatus() : absl::UnavailableError("cannot write " + file.string());
}

absl::Status Write(const fs::path& config_file, const fs::path& dir, int layers) {
  nlohmann::json json = nlohmann::json::parse(std::ifstream(config_file));
  if (layers > 0) json["num_hidden_layers"] = layers;
  ASSIGN_OR_RETURN(const ModelConfig config, ParseModelConfig(json.dump()));
  ModelWeights shapes;
  PlanDummyWeights(config, shapes);
  Sharder sharder;
  VisitWeights(config, shapes, sharder);

  std::string noise(16 << 20, '\0');
  for (size_t i = 0; i < noise.size(); ++i) noise[i] = static_cast<char>(DummyHash(0, i));
  fs::create_directories(dir);
  std::ofstream(dir / "config.json") << json.dump();
  nlohmann::json index = {{"weight_map", nlohmann::json::object()}};
  std::vector<LoadJob> jobs;
  for (size_t i = 0; i < sharder.shards.size(); ++i) {
    const Shard& shard = sharder.shards[i];
    const std::string name = "model-" + std::to_string(i) + ".safetensors";
    for (const auto& [tensor, entry] : shard.header.items()) index["weight_map"][tensor] = name;
    jobs.push_back({shard.bytes, [&shard, &noise, file = dir / name] {
                      return WriteShard(shard, file, noise);
                    }});
  }
  std::ofstream(dir / "model.safetensors.index.json") << index.dump();
  return RunLoadJobs(jobs, nullptr);
}

absl::Status Load(const ModelConfig& config, const fs::path& dir, LoadFormat format) {
  uint64_t total_bytes = 0;
  const double begin = Seconds();
  ASSIGN_OR_RETURN(const auto weights,
                   LoadGpuWeights(config, dir, format, kMaxModelLen,
                                  [&](uint64_t, uint64_t total) { total_bytes = total; }));
  const double seconds = Seconds() - begin;
  std::printf("%s | %.2f GB of weights, %.2f GB on the GPU | %.3f s | %.2f GB/s\n",
              format == LoadFormat::kDummy ? "dummy" : dir.c_str(), double(total_bytes) / 1e9,
              double(weights->memory.bytes()) / 1e9, seconds, double(total_bytes) / 1e9 / seconds);
  return absl::OkStatus();
}

absl::Status Run(const std::vector<std::string>& args) {
  const std::string mode = args.empty() ? "" : args[0];
  if (mode == "dummy" && args.size() == 2) {
    const nlohmann::json json = nlohmann::json::parse(std::ifstream(args[1]));
    ASSIGN_OR_RETURN(const ModelConfig config, ParseModelConfig(json.dump()));
    return Load(config, "", LoadFormat::kDummy);
  }
  if (mode == "write" && args.size() >= 3) {
    return Write(args[1], args[2], args.size() > 3 ? std::atoi(args[3].c_str()) : 0);
  }
  if (mode == "load" && args.size() >= 2) {
    ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(args[1]));
    const int repeats = args.size() > 2 ? std::atoi(args[2].c_str()) : 3;
    for (int i = 0; i < repeats; ++i) {
      RETURN_IF_ERROR(Load(config, args[1], LoadFormat::kSafetensors));
    }
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      "usage: gpu_load_benchmark dummy CONFIG | write CONFIG DIR [LAYERS] | load DIR [REPEATS]");
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  // The context is not the weights': it is made before the clock starts.
  cudaFree(nullptr);
  const absl::Status status = latentd::Run({argv + 1, argv + argc});
  if (!status.ok()) std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  return status.ok() ? 0 : 1;
}
