#include "server/check.h"

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace latentd {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

struct Checked {
  absl::Status status;
  std::string output;
};

Checked Check(ServeConfig config) {
  if (config.engine == "auto") config.engine = "cpu";  // on a machine with a GPU too
  const absl::StatusOr<ModelPath> path = ModelPath::Resolve(config, fs::absolute("build/latentd"));
  if (!path.ok()) return {path.status(), ""};
  std::ostringstream out;
  const absl::Status status = RunCheck(config, *path, uint64_t{79} << 30, out);
  return {status, out.str()};
}

Checked CheckModel(const std::string& model) {
  ServeConfig config;
  config.model = model;
  return Check(config);
}

std::string Message(const Checked& checked) { return std::string(checked.status.message()); }

TEST(CheckTest, TheDemoModelIsTheDefaultAndComplete) {
  const Checked checked = Check({});
  ASSERT_TRUE(checked.status.ok()) << checked.status;
  EXPECT_THAT(checked.output, HasSubstr("model demo-model"));
  EXPECT_THAT(checked.output, HasSubstr("tokenizer: 4096 tokens; chat template: ok"));
  EXPECT_THAT(checked.output, HasSubstr("checkpoint: every tensor is there"));
  // 5 layers of a latent of 512 + 64 floats.
  EXPECT_THAT(checked.output, HasSubstr("KV cache: 11520 bytes a token"));
  EXPECT_THAT(checked.output, HasSubstr("max_model_len: 8192 tokens"));
}

TEST(CheckTest, EveryExampleConfigIsSupported) {
  for (const auto& file : fs::directory_iterator("deploy/configs")) {
    if (file.path().extension() != ".json") continue;
    const Checked checked = CheckModel(file.path().string());
    EXPECT_TRUE(checked.status.ok()) << file.path() << ": " << checked.status;
    EXPECT_THAT(checked.output, HasSubstr("stands alone"));
    EXPECT_THAT(checked.output, HasSubstr("all weights"));
  }
}

TEST(CheckTest, DeepSeekV3HasTheSizeThatItsAuthorsGive) {
  const Checked checked = CheckModel("deploy/configs/deepseek-v3.json");
  EXPECT_THAT(checked.output, HasSubstr("671026419200"));  // parameters
  EXPECT_THAT(checked.output, HasSubstr("KV cache: 140544 bytes a token"));
}

// No GPU is needed to plan for one.
TEST(CheckTest, AGpuIsPlannedFor) {
  ServeConfig config;
  config.engine = "cuda";
  config.model = "deploy/configs/shard16.json";
  const Checked shard = Check(config);
  if (!ChooseEngine("cuda").ok()) {
    EXPECT_EQ(shard.status.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(Message(shard), HasSubstr("without the CUDA engine"));
    return;
  }
  ASSERT_TRUE(shard.status.ok()) << shard.status;
  EXPECT_THAT(shard.output, HasSubstr("engine: cuda"));
  EXPECT_THAT(shard.output, HasSubstr("fits into the 79.0 GiB that such a GPU has left"));
  EXPECT_THAT(shard.output, HasSubstr("max_model_len: 163840 tokens"));  // the cache holds them
  config.model = "deploy/configs/deepseek-v3.json";
  EXPECT_THAT(Check(config).output, HasSubstr("memory: not on such a GPU: "));
  config.model = "deploy/demo-model";
  config.kv_cache_tokens = int64_t{1} << 30;
  EXPECT_EQ(Check(config).status.code(), absl::StatusCode::kResourceExhausted);
}

// Two nodes of eight H100: what the daemon is for, planned from a config.json alone.
TEST(CheckTest, AGroupOfSixteenIsPlannedFor) {
  ServeConfig config;
  config.model = "deploy/configs/deepseek-v3.json";
  config.world_size = 16;
  config.num_nodes = 2;
  config.kv_cache_tokens = 1280;  // 20 blocks
  const Checked cpu = Check(config);
  ASSERT_TRUE(cpu.status.ok()) << cpu.status;
  EXPECT_THAT(cpu.output, HasSubstr("group: 16 ranks on 2 nodes, 8 on each"));
  EXPECT_THAT(cpu.output, HasSubstr("up to 16 of 256 routed experts"));
  // 58 layers of 16 experts of three matrices of 7168 x 2048.
  EXPECT_THAT(cpu.output, HasSubstr(std::to_string(int64_t{58} * 16 * 3 * 7168 * 2048)));
  // Two matrices of 129280 x 7168 bf16.
  EXPECT_THAT(cpu.output, HasSubstr("whole on every rank, 3.45 GiB"));
  EXPECT_THAT(cpu.output, HasSubstr("KV cache: 1280 tokens on each rank, 20480 on all"));
  if (!ChooseEngine("cuda").ok()) return;
  config.engine = "cuda";
  config.kv_cache_tokens = 0;
  const Checked gpu = Check(config);
  ASSERT_TRUE(gpu.status.ok()) << gpu.status;
  EXPECT_THAT(gpu.output, HasSubstr("engine: cuda, each rank:"));
  EXPECT_THAT(gpu.output, HasSubstr("fits into the 79.0 GiB that such a GPU has left"));
  // What README says that two nodes hold.
  EXPECT_THAT(gpu.output, HasSubstr("KV cache: 276672 tokens on each rank, 4426752 on all"));
  config.kv_cache_dtype = "fp8";
  EXPECT_THAT(Check(config).output, HasSubstr("KV cache: 494912 tokens on each rank"));
}

TEST(CheckTest, ExpertsThatCannotBeDealtOutEvenlyAreCountedForTheFullestRank) {
  ServeConfig config;
  config.model = "deploy/configs/deepseek-v3.json";
  config.world_size = 7;
  EXPECT_THAT(Check(config).output, HasSubstr("up to 37 of 256 routed experts"));
}

TEST(CheckTest, WhatTheModelDoesNotAllowIsRefusedByKey) {
  ServeConfig config;
  config.max_model_len = 8193;
  EXPECT_THAT(Message(Check(config)),
              HasSubstr("max_model_len is 8193; the model's max_position_embeddings is 8192"));
  config.max_model_len = 4096;
  config.kv_cache_tokens = 128;
  EXPECT_THAT(Message(Check(config)),
              HasSubstr("max_model_len is 4096; the KV cache holds 128 tokens"));
  config.max_model_len = 0;  // then it is what the cache holds
  EXPECT_THAT(Check(config).output, HasSubstr("max_model_len: 128 tokens"));
  config.kv_cache_tokens = int64_t{1} << 30;
  EXPECT_THAT(Message(Check(config)), HasSubstr("too little memory"));
  EXPECT_THAT(Message(CheckModel("no/such/model")), HasSubstr("no/such/model"));
  EXPECT_THAT(Message(CheckModel("deploy")), HasSubstr("config.json"));
}

TEST(CheckTest, AChatTemplateThatDoesNotCompileIsRefused) {
  const fs::path file = fs::path(::testing::TempDir()) / "broken.jinja";
  std::ofstream(file) << "{% if %}";
  ServeConfig config;
  config.chat_template = file.string();
  EXPECT_THAT(Message(Check(config)), HasSubstr(file.string()));
  config.chat_template = "no/such.jinja";
  EXPECT_THAT(Message(Check(config)), HasSubstr("no/such.jinja"));
}

// A checkpoint of which a part is missing: found without reading a weight.
TEST(CheckTest, AnIncompleteCheckpointIsRefused) {
  const fs::path dir = fs::path(::testing::TempDir()) / "check_test_model";
  fs::remove_all(dir);
  fs::copy("deploy/demo-model", dir);
  fs::resize_file(dir / "model.safetensors", fs::file_size(dir / "model.safetensors") - 1);
  EXPECT_THAT(Message(CheckModel(dir.string())), HasSubstr("model.safetensors"));
  fs::remove(dir / "model.safetensors");
  EXPECT_THAT(Message(CheckModel(dir.string())), HasSubstr("model.safetensors"));
  fs::remove_all(dir);
}

}  // namespace
}  // namespace latentd
