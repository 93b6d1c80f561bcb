#include "engine/cuda/gpu_weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>

#include "engine/cuda/gpu_copy.h"
#include "engine/model/rope.h"
#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/gpu_models.h"
#include "tests/engine/cuda/weights_reference.h"

namespace latentd {
namespace {

using testing::HasSubstr;

constexpr int kMaxModelLen = 100;

void ReadDevice(const void* from, size_t size, std::byte* to) {
  EXPECT_EQ(cudaMemcpy(to, from, size, cudaMemcpyDeviceToHost), cudaSuccess);
}

// What is on the GPU is what the stored tensors of `weights` say.
void ExpectLoaded(const ModelConfig& config, const GpuWeights& gpu, const ModelWeights& stored) {
  ExpectEqualWeights(ActualWeights(config, gpu, ReadDevice), ExpectedWeights(config, stored));
  EXPECT_EQ(gpu.memory.bytes(), GpuWeightBytes(config, kMaxModelLen));
  const Rope rope(config, kMaxModelLen);
  for (const auto& [table, expected] :
       {std::pair(gpu.rope.cos, &rope.cos()), std::pair(gpu.rope.sin, &rope.sin())}) {
    std::vector<float> actual(expected->size());
    ReadDevice(table, actual.size() * sizeof(float), reinterpret_cast<std::byte*>(actual.data()));
    EXPECT_EQ(actual, *expected);
  }
  EXPECT_EQ(gpu.rope.interleave, config.rope_interleave);
}

// LoadGpuWeights() and a check of its progress.
absl::StatusOr<std::unique_ptr<GpuWeights>> Load(const ModelConfig& config,
                                                 const std::filesystem::path& dir,
                                                 LoadFormat format) {
  std::vector<uint64_t> done;
  uint64_t total_bytes = 0;
  auto weights = LoadGpuWeights(config, dir, format, kMaxModelLen, [&](uint64_t d, uint64_t total) {
    done.push_back(d);
    total_bytes = total;
  });
  if (weights.ok()) {
    EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
    EXPECT_EQ(std::count(done.begin(), done.end(), total_bytes), 1);
    EXPECT_EQ(done.back(), total_bytes);
  }
  return weights;
}

class GpuWeightsTest : public DeviceTest {};

void ExpectLoads(const std::filesystem::path& dir) {
  const auto config = LoadModelConfig(dir);
  ASSERT_TRUE(config.ok()) << config.status();
  const auto gpu = Load(*config, dir, LoadFormat::kSafetensors);
  ASSERT_TRUE(gpu.ok()) << gpu.status();
  const auto mapped = MapWeights(*config, dir);
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  ExpectLoaded(*config, **gpu, mapped->weights);
}

TEST_F(GpuWeightsTest, DemoModel) { ExpectLoads("deploy/demo-model"); }

TEST_F(GpuWeightsTest, DemoModelBf16) {
  const char* dir = std::getenv("LATENTD_DEMO_BF16");
  if (dir == nullptr) GTEST_SKIP() << "LATENTD_DEMO_BF16 is not set";
  ExpectLoads(dir);
}

class GpuModelsTest : public GpuWeightsTest, public testing::WithParamInterface<LayoutCase> {};

TEST_P(GpuModelsTest, Checkpoint) {
  TempDir dir;
  RandomCheckpoint(SmallConfig(nlohmann::json::parse(GetParam().changes))).Save(dir.path());
  ExpectLoads(dir.path());
}

// The random model of the CPU engine, bit for bit: what either engine does can be compared.
TEST_P(GpuModelsTest, Dummy) {
  const ModelConfig config = Parse(SmallConfig(nlohmann::json::parse(GetParam().changes)));
  const auto gpu = Load(config, "", LoadFormat::kDummy);
  ASSERT_TRUE(gpu.ok()) << gpu.status();
  const auto stored = LoadWeights(config, "", LoadFormat::kDummy, nullptr);
  ASSERT_TRUE(stored.ok()) << stored.status();
  ExpectLoaded(config, **gpu, *stored);
}

INSTANTIATE_TEST_SUITE_P(Models, GpuModelsTest, testing::ValuesIn(kLayoutCases),
                         [](const auto& info) { return info.param.name; });

// An odd vocabulary size and number of experts, DeepSeek-V3's widths.
TEST_F(GpuWeightsTest, DummyOfRealWidths) {
  const ModelConfig config = Parse(SmallConfig(nlohmann::json::parse(
      R"({"hidden_size": 7168, "vocab_size": 301, "num_hidden_layers": 1, "n_group": 1,
          "first_k_dense_replace": 0, "moe_intermediate_size": 2048, "n_routed_experts": 3,
          "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 1536, "num_attention_heads": 16})")));
  const auto gpu = Load(config, "", LoadFormat::kDummy);
  ASSERT_TRUE(gpu.ok()) << gpu.status();
  const auto stored = LoadWeights(config, "", LoadFormat::kDummy, nullptr);
  ASSERT_TRUE(stored.ok()) << stored.status();
  ExpectLoaded(config, **gpu, *stored);
}

TEST_F(GpuWeightsTest, TooLarge) {
  const ModelConfig config =
      Parse(nlohmann::json::parse(ReadAll("deploy/configs/deepseek-v3.json")));
  const auto gpu = Load(config, "", LoadFormat::kDummy);
  EXPECT_EQ(gpu.status().code(), absl::StatusCode::kResourceExhausted) << gpu.status();
  EXPECT_THAT(std::string(gpu.status().message()),
              HasSubstr(std::to_string(GpuWeightBytes(config, kMaxModelLen)) + " bytes asked for"));
  EXPECT_TRUE(Load(Parse(SmallConfig({})), "", LoadFormat::kDummy).ok());  // the device lives on
}

// These need no GPU: they are found before one is touched.
TEST(LoadGpuWeightsErrorTest, Unsupported) {
  ModelConfig config = Parse(SmallConfig({}));
  config.v_head_dim = 64;
  EXPECT_EQ(Load(config, "", LoadFormat::kDummy).status().code(), absl::StatusCode::kUnimplemented);
}

TEST(LoadGpuWeightsErrorTest, CheckpointsErrorsAreThoseOfLoadWeights) {
  TinyCheckpoint checkpoint = RandomCheckpoint(SmallConfig({}));
  const ModelConfig config = Parse(checkpoint.config);
  checkpoint.tensors.erase("model.norm.weight");
  TempDir dir;
  EXPECT_EQ(Load(config, dir.path(), LoadFormat::kSafetensors).status().code(),
            absl::StatusCode::kNotFound);
  checkpoint.Save(dir.path());
  const absl::Status status = Load(config, dir.path(), LoadFormat::kSafetensors).status();
  EXPECT_EQ(status, LoadWeights(config, dir.path(), LoadFormat::kSafetensors, nullptr).status());
  EXPECT_THAT(std::string(status.message()), HasSubstr("'model.norm.weight' [256] is missing"));
}

TEST(LoadGpuWeightsErrorTest, Bf16ProjectionInAnFp8Model) {
  TinyCheckpoint checkpoint = RandomCheckpoint(SmallConfig({}));
  const std::string name = "model.layers.0.self_attn.o_proj.weight";
  TinyCheckpoint::Tensor& weight = checkpoint.tensors[name];
  weight.dtype = "BF16";
  weight.bytes += weight.bytes;
  checkpoint.tensors.erase(name + "_scale_inv");
  TempDir dir;
  checkpoint.Save(dir.path());
  const auto gpu = Load(Parse(checkpoint.config), dir.path(), LoadFormat::kSafetensors);
  EXPECT_EQ(gpu.status().code(), absl::StatusCode::kUnimplemented) << gpu.status();
  EXPECT_THAT(std::string(gpu.status().message()), HasSubstr("'" + name + "' is BF16"));
}

// The file is shortened between the checks and the copies.
TEST_F(GpuWeightsTest, ShortenedWhileLoading) {
  TempDir dir;
  const TinyCheckpoint checkpoint = RandomCheckpoint(SmallConfig({}));
  checkpoint.Save(dir.path());
  const ModelConfig config = Parse(checkpoint.config);
  const auto mapped = MapWeights(config, dir.path());
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  const auto memory = DeviceMemory::Allocate(GpuWeightBytes(config, kMaxModelLen));
  ASSERT_TRUE(memory.ok()) << memory.status();
  Carver carver(memory->data());
  const GpuWeights gpu = LayOutWeights(config, kMaxModelLen, &mapped->weights, carver);
  const auto copies = PlanCopies(config, mapped->weights, gpu);
  EXPECT_TRUE(CopyToGpu(*mapped->checkpoint, copies, nullptr).ok());
  std::filesystem::resize_file(dir.path() / "model.safetensors", 1 << 20);
  const absl::Status status = CopyToGpu(*mapped->checkpoint, copies, nullptr);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()),
              testing::AllOf(HasSubstr("model.safetensors: tensor 'model."),
                             HasSubstr("its file was shortened")));
}

}  // namespace
}  // namespace latentd
