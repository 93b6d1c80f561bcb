// The layout of the weights, on the host alone: no GPU is needed.
#include "engine/cuda/gpu_layout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "engine/cuda/gpu_staging.h"
#include "tests/engine/cuda/gpu_models.h"
#include "tests/engine/cuda/weights_reference.h"

namespace latentd {
namespace {

using testing::HasSubstr;

constexpr int kMaxModelLen = 100;

// Memory of the host in the GPU's place.
struct HostWeights {
  std::vector<std::byte> memory;
  GpuWeights weights;
};

HostWeights LoadToHost(const ModelConfig& config, const MappedWeights& mapped, size_t piece_bytes,
                       const Placement& placement = {}) {
  HostWeights host;
  Carver counter(nullptr);
  LayOutWeights(config, kMaxModelLen, &mapped.weights, counter, placement);
  host.memory.resize(counter.used());
  Carver carver(host.memory.data());
  host.weights = LayOutWeights(config, kMaxModelLen, &mapped.weights, carver, placement);
  const ReadBytes read = [&](const std::byte* begin, size_t size, std::byte* out) {
    return mapped.checkpoint->Read(begin, size, out);
  };
  for (const WeightCopy& copy : PlanCopies(config, mapped.weights, host.weights, placement)) {
    const int64_t step = PieceRows(copy, piece_bytes);
    for (int64_t begin = 0; begin < copy.num_rows; begin += step) {
      const int64_t end = std::min(begin + step, copy.num_rows);
      const auto bytes = static_cast<size_t>((end - begin) * copy.num_cols * 4);
      std::vector<std::byte> scratch(bytes), staged(bytes);
      EXPECT_TRUE(StageRows(copy, begin, end, read, scratch.data(), staged.data()).ok());
      const RowTarget place = PlaceRows(copy, begin, end);
      EXPECT_EQ(place.width * place.height,
                static_cast<size_t>((end - begin) * copy.num_cols) * DTypeBytes(copy.target_dtype));
      for (size_t i = 0; i < place.height; ++i) {
        std::byte* target = place.target + i * place.pitch;
        EXPECT_GE(target, host.memory.data());
        EXPECT_LE(target + place.width, host.memory.data() + host.memory.size());
        std::memcpy(target, staged.data() + i * place.width, place.width);
      }
    }
  }
  return host;
}

void ReadHost(const void* from, size_t size, std::byte* to) { std::memcpy(to, from, size); }

class LayoutTest : public testing::TestWithParam<LayoutCase> {};

TEST_P(LayoutTest, EveryElementHasItsPlace) {
  const TinyCheckpoint checkpoint =
      RandomCheckpoint(SmallConfig(nlohmann::json::parse(GetParam().changes)));
  TempDir dir;
  checkpoint.Save(dir.path());
  const ModelConfig config = Parse(checkpoint.config);
  ASSERT_TRUE(CheckCudaSupports(config).ok()) << CheckCudaSupports(config);
  const auto mapped = MapWeights(config, dir.path());
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  const WeightBytes expected = ExpectedWeights(config, mapped->weights);
  for (const size_t piece_bytes : {size_t{1}, size_t{10'000}, size_t{1} << 22}) {
    SCOPED_TRACE(piece_bytes);
    const HostWeights host = LoadToHost(config, *mapped, piece_bytes);
    EXPECT_EQ(host.memory.size(), GpuWeightBytes(config, kMaxModelLen));
    ExpectEqualWeights(ActualWeights(config, host.weights, ReadHost), expected);
    EXPECT_EQ(host.weights.lm_head == host.weights.embed_tokens, config.tie_word_embeddings);
  }
}

INSTANTIATE_TEST_SUITE_P(Models, LayoutTest, testing::ValuesIn(kLayoutCases),
                         [](const auto& info) { return info.param.name; });

template <typename T>
bool SameBytes(const T* a, const T* b, int64_t count) {
  return (a == nullptr && b == nullptr) ||
         std::memcmp(a, b, static_cast<size_t>(count) * sizeof(T)) == 0;
}

// Whether groups [first, first + count) of `part` are those of `whole` from `from` on.
bool SameGroups(const WeightMatrix& part, int first, int count, const WeightMatrix& whole,
                int from) {
  const int64_t elements = int64_t{part.n} * part.k;
  const int64_t scales = int64_t{(part.n + 127) / 128} * part.scale_stride;
  if (part.is_fp8()) {
    return SameBytes(part.fp8 + first * elements, whole.fp8 + from * elements, count * elements) &&
           SameBytes(part.scales + first * scales, whole.scales + from * scales, count * scales);
  }
  return SameBytes(part.bf16 + first * elements, whole.bf16 + from * elements, count * elements);
}

// Of the routed experts its own, of everything else all; some ranks of 20 have none.
TEST(LayoutTest, ARankHasItsExperts) {
  for (const char* changes : {"{}", R"({"quantization_config": null, "n_shared_experts": 2})"}) {
    const TinyCheckpoint checkpoint = RandomCheckpoint(SmallConfig(nlohmann::json::parse(changes)));
    TempDir dir;
    checkpoint.Save(dir.path());
    const ModelConfig config = Parse(checkpoint.config);
    const auto all = MapWeights(config, dir.path());
    ASSERT_TRUE(all.ok()) << all.status();
    const HostWeights whole = LoadToHost(config, *all, 1 << 20);
    for (const int32_t world_size : {1, 2, 3, 16, 20}) {
      for (int32_t rank = 0; rank < world_size; ++rank) {
        SCOPED_TRACE(testing::Message() << "rank " << rank << " of " << world_size);
        const Placement placement{.rank = rank, .world_size = world_size};
        const auto mapped = MapWeights(config, dir.path(), placement);
        ASSERT_TRUE(mapped.ok()) << mapped.status();
        const HostWeights host = LoadToHost(config, *mapped, 1 << 20, placement);
        EXPECT_EQ(host.memory.size(), GpuWeightBytes(config, kMaxModelLen, placement));
        const ExpertRange experts = placement.Experts(config.n_routed_experts);
        const GpuMlp &part = host.weights.layers[1].mlp, &full = whole.weights.layers[1].mlp;
        ASSERT_EQ(part.gate_up.num_groups, experts.count + config.n_shared_experts);
        EXPECT_TRUE(SameGroups(part.gate_up, 0, experts.count, full.gate_up, experts.first));
        EXPECT_TRUE(SameGroups(part.down, 0, experts.count, full.down, experts.first));
        EXPECT_TRUE(SameGroups(part.gate_up, experts.count, config.n_shared_experts, full.gate_up,
                               config.n_routed_experts));
        EXPECT_TRUE(SameGroups(part.down, experts.count, config.n_shared_experts, full.down,
                               config.n_routed_experts));
        EXPECT_TRUE(SameBytes(host.weights.layers[1].gate_bf16, whole.weights.layers[1].gate_bf16,
                              int64_t{config.n_routed_experts} * config.hidden_size));
        EXPECT_TRUE(
            SameGroups(host.weights.layers[0].mlp.down, 0, 1, whole.weights.layers[0].mlp.down, 0));
      }
    }
  }
}

void ExpectLaidOut(const std::filesystem::path& dir) {
  const auto config = LoadModelConfig(dir);
  ASSERT_TRUE(config.ok()) << config.status();
  const auto mapped = MapWeights(*config, dir);
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  const HostWeights host = LoadToHost(*config, *mapped, 1 << 20);
  ExpectEqualWeights(ActualWeights(*config, host.weights, ReadHost),
                     ExpectedWeights(*config, mapped->weights));
}

TEST(LayoutTest, DemoModel) { ExpectLaidOut("deploy/demo-model"); }

TEST(LayoutTest, DemoModelBf16) {
  const char* dir = std::getenv("LATENTD_DEMO_BF16");
  if (dir == nullptr) GTEST_SKIP() << "LATENTD_DEMO_BF16 is not set";
  ExpectLaidOut(dir);
}

// A router that is stored wider than the rest stays so, and the memory grows by that.
TEST(LayoutTest, F32RouterInABf16Model) {
  TinyCheckpoint checkpoint = RandomCheckpoint(SmallConfig({}));
  TinyCheckpoint::Tensor& gate = checkpoint.tensors["model.layers.1.mlp.gate.weight"];
  gate.dtype = "F32";
  gate.bytes += gate.bytes;
  TempDir dir;
  checkpoint.Save(dir.path());
  const ModelConfig config = Parse(checkpoint.config);
  const auto mapped = MapWeights(config, dir.path());
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  const HostWeights host = LoadToHost(config, *mapped, 10'000);
  EXPECT_EQ(host.weights.layers[1].gate_bf16, nullptr);
  EXPECT_EQ(host.memory.size(), GpuWeightBytes(config, kMaxModelLen) + 16 * 256 * 2);
  ExpectEqualWeights(ActualWeights(config, host.weights, ReadHost),
                     ExpectedWeights(config, mapped->weights));
}

// shard16's 61 layers: what its parts sum to (the dims are DeepSeek-V3's).
TEST(GpuWeightBytesTest, Shard16) {
  const ModelConfig config = Parse(nlohmann::json::parse(ReadAll("deploy/configs/shard16.json")));
  ASSERT_TRUE(CheckCudaSupports(config).ok()) << CheckCudaSupports(config);
  const double h = 7168;
  const double attention =
      61 * (h * (1536 + 576) + 1536.0 * 128 * 192 + 2 * 2.0 * 128 * 128 * 512 + 128 * 128 * h);
  const double mlps = 3 * 3 * h * 18432 + 58 * 17 * 3 * h * 2048;
  const double router = 58 * 16 * h * 2;
  const double vocabulary = 2 * 129280 * h * 2;
  const double scales = (mlps + attention) * 4 / (128 * 128);
  const double rope = 4096 * 64 * 4;
  const double sum = attention + mlps + router + vocabulary + scales + rope;
  const auto bytes = static_cast<double>(GpuWeightBytes(config, 4096));
  EXPECT_NEAR(bytes / sum, 1, 2e-3) << bytes;
  EXPECT_EQ(GpuWeightBytes(config, 8192) - GpuWeightBytes(config, 4096), 4096 * 64 * 4);
}

struct Refusal {
  const char* changes;
  const char* message;
};
const Refusal kRefusals[] = {
    {R"({"kv_lora_rank": 256})", "kv_lora_rank is 256; the CUDA engine serves 512"},
    {R"({"qk_rope_head_dim": 32})", "qk_rope_head_dim is 32"},
    {R"({"qk_nope_head_dim": 64})", "qk_nope_head_dim is 64"},
    {R"({"v_head_dim": 64})", "v_head_dim is 64"},
    {R"({"attention_bias": true})", "attention_bias is true"},
    {R"({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3",
         "activation_scheme": "dynamic", "weight_block_size": [64, 128]}})",
     "weight_block_size[0] is 64"},
    {R"({"hidden_size": 320})", "hidden_size is 320; the CUDA engine serves multiples of 128"},
    {R"({"hidden_size": 131072})", "hidden_size is 131072"},
    {R"({"hidden_size": 16512})",
     "hidden_size is 16512; the CUDA engine serves multiples of 128 up to 16384"},
    {R"({"vocab_size": 400000})", "vocab_size is 400000; the CUDA engine serves up to 380000"},
    {R"({"n_routed_experts": 512})", "n_routed_experts is 512; the CUDA engine serves up to 384"},
    {R"({"n_shared_experts": 33})", "n_shared_experts is 33; the CUDA engine serves up to 32"},
    {R"({"q_lora_rank": 3584})",
     "q_lora_rank is 3584; the CUDA engine serves multiples of 128 up to 3456"},
    {R"({"intermediate_size": 700})", "intermediate_size is 700"},
    {R"({"moe_intermediate_size": 64})", "moe_intermediate_size is 64"},
    {R"({"q_lora_rank": 192})", "q_lora_rank is 192"},
    {R"({"num_attention_heads": 1024})",
     "num_attention_heads is 1024; the CUDA engine serves up to 512"},
    {R"({"q_lora_rank": null, "num_attention_heads": 3})", "num_attention_heads is 3"},
    {R"({"quantization_config": null, "moe_intermediate_size": 48})",
     "multiples of 32 up to 65536"},
};

TEST(CheckCudaSupportsTest, RefusesByName) {
  for (const Refusal& refusal : kRefusals) {
    const absl::Status status =
        CheckCudaSupports(Parse(SmallConfig(nlohmann::json::parse(refusal.changes))));
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << refusal.changes;
    EXPECT_THAT(std::string(status.message()), HasSubstr(refusal.message));
  }
}

TEST(CheckCudaSupportsTest, ExampleConfigs) {
  for (const char* name : {"deepseek-v3", "kimi-k2-like", "moonlight-like", "shard16"}) {
    const std::string path = std::string("deploy/configs/") + name + ".json";
    const absl::Status status = CheckCudaSupports(Parse(nlohmann::json::parse(ReadAll(path))));
    EXPECT_TRUE(status.ok()) << path << ": " << status;
  }
}

}  // namespace
}  // namespace latentd
