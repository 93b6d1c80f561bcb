#include "engine/model/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "engine/model/host_memory.h"
#include "engine/model/quantization.h"
#include "engine/model/read_ahead.h"
#include "tests/engine/model/tiny_checkpoint.h"

namespace latentd {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

constexpr char kDemoModel[] = "deploy/demo-model";

absl::StatusOr<ModelWeights> Load(const std::filesystem::path& dir,
                                  LoadFormat format = LoadFormat::kSafetensors,
                                  const LoadProgress& progress = nullptr) {
  const auto config = LoadModelConfig(dir);
  if (!config.ok()) return config.status();
  return LoadWeights(*config, dir, format, progress);
}

std::string Message(const absl::StatusOr<ModelWeights>& weights) {
  return weights.ok() ? "OK" : std::string(weights.status().message());
}

TEST(LoadWeightsTest, DemoModel) {
  const auto weights = Load(kDemoModel);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_THAT(weights->embed_tokens.shape, ElementsAre(4096, 256));
  ASSERT_EQ(weights->layers.size(), 5u);

  const LayerWeights& dense = weights->layers[0];
  EXPECT_THAT(dense.mlp.gate_proj.weight.shape, ElementsAre(768, 256));
  EXPECT_TRUE(dense.moe.gate.empty());
  EXPECT_TRUE(dense.q_proj.weight.empty());
  EXPECT_EQ(dense.kv_a_proj_with_mqa.weight.dtype, DType::kF8E4M3);
  EXPECT_THAT(dense.kv_a_proj_with_mqa.weight.shape, ElementsAre(576, 256));
  EXPECT_THAT(dense.kv_a_proj_with_mqa.scale_inv.shape, ElementsAre(5, 2));  // 576 rows: 4.5 blocks
  EXPECT_TRUE(dense.o_proj.bias.empty());

  const LayerWeights& moe = weights->layers[4];
  EXPECT_TRUE(moe.mlp.gate_proj.weight.empty());
  ASSERT_EQ(moe.moe.experts.size(), 16u);
  EXPECT_THAT(moe.moe.experts[15].down_proj.weight.shape, ElementsAre(256, 128));
  EXPECT_THAT(moe.moe.e_score_correction_bias.shape, ElementsAre(16));

  // Every view is the tensor of that name.
  const auto checkpoint = Checkpoint::Open(kDemoModel);
  const TensorView* o_proj = (*checkpoint)->Find("model.layers.3.self_attn.o_proj.weight");
  EXPECT_EQ(std::memcmp(weights->layers[3].o_proj.weight.data, o_proj->data, o_proj->num_bytes()),
            0);
  const TensorView* head = (*checkpoint)->Find("lm_head.weight");
  EXPECT_EQ(std::memcmp(weights->lm_head.data, head->data, head->num_bytes()), 0);
}

TEST(LoadWeightsTest, StorageOutlivesEverythingElse) {
  ModelWeights copy;
  {
    auto weights = Load(kDemoModel);
    ASSERT_TRUE(weights.ok());
    copy = *weights;
  }
  std::vector<float> norm(256);
  ToFloat(copy.norm, norm.data());
  for (float value : norm) EXPECT_TRUE(std::isfinite(value) && value != 0);
}

TEST(LoadWeightsTest, ProgressRisesToTheTotalOnce) {
  std::vector<uint64_t> done;
  uint64_t total = 0;
  const auto weights = Load(kDemoModel, LoadFormat::kSafetensors, [&](uint64_t d, uint64_t t) {
    done.push_back(d);
    total = t;
  });
  ASSERT_TRUE(weights.ok());
  ASSERT_FALSE(done.empty());
  EXPECT_EQ(done.back(), total);
  EXPECT_EQ(std::count(done.begin(), done.end(), total), 1);
  EXPECT_TRUE(std::is_sorted(done.begin(), done.end()));
  EXPECT_GT(total, 15'000'000u);  // the MTP layer is not read
  EXPECT_LT(total, 17'000'000u);
}

TEST(LoadWeightsTest, EveryVariant) {
  int num_variants = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kVariants)) {
    const auto weights = Load(entry.path());
    EXPECT_TRUE(weights.ok()) << entry.path() << ": " << weights.status();
    ++num_variants;
  }
  EXPECT_GE(num_variants, 20);

  EXPECT_TRUE(Load(kVariants / "q_lora_rank_null")->layers[0].q_a_proj.weight.empty());
  EXPECT_FALSE(Load(kVariants / "q_lora_rank_null")->layers[0].q_proj.weight.empty());
  const auto tied = Load(kVariants / "tie_word_embeddings");
  EXPECT_EQ(tied->lm_head.data, tied->embed_tokens.data);
  const auto biased = Load(kVariants / "attention_bias");
  EXPECT_THAT(biased->layers[0].q_a_proj.bias.shape, ElementsAre(16));
  EXPECT_THAT(biased->layers[0].kv_a_proj_with_mqa.bias.shape, ElementsAre(40));
  EXPECT_THAT(biased->layers[0].o_proj.bias.shape, ElementsAre(32));
  EXPECT_TRUE(biased->layers[0].kv_b_proj.bias.empty());
  EXPECT_TRUE(
      Load(kVariants / "n_shared_experts_0")->layers[1].moe.shared_experts.up_proj.weight.empty());
  EXPECT_EQ(Load(kVariants / "router_bias_bf16")->layers[1].moe.e_score_correction_bias.dtype,
            DType::kBF16);
}

// One thing changed in a valid checkpoint: the error names it.
struct Mutation {
  const char* variant;
  std::function<void(TinyCheckpoint&)> change;
  const char* message;  // "" when it is to be accepted all the same
};

void Rename(TinyCheckpoint& checkpoint, const std::string& from, const std::string& to) {
  auto node = checkpoint.tensors.extract(from);
  node.key() = to;
  checkpoint.tensors.insert(std::move(node));
}

// Makes MTP layer 3 of a 3-layer model out of layer 2.
void AddMtpLayer(TinyCheckpoint& c, const std::string& layer = "3") {
  const std::string prefix = "model.layers." + layer + ".";
  for (const auto& [name, tensor] : std::map(c.tensors)) {
    if (name.starts_with("model.layers.2.")) c.tensors[prefix + name.substr(15)] = tensor;
  }
  for (const char* norm : {"enorm", "hnorm", "shared_head.norm"}) {
    c.tensors[prefix + norm + ".weight"] = c.tensors["model.norm.weight"];
  }
  for (const char* table : {"embed_tokens", "shared_head.head"}) {
    c.tensors[prefix + table + ".weight"] = c.tensors["lm_head.weight"];
  }
  c.tensors[prefix + "eh_proj.weight"] = {"BF16", {32, 64}, std::string(32 * 64 * 2, '\0')};
}

const Mutation kMutations[] = {
    {"base", [](auto&) {}, ""},
    // Missing.
    {"base", [](auto& c) { c.tensors.erase("model.norm.weight"); },
     "'model.norm.weight' [32] is missing"},
    {"base", [](auto& c) { c.tensors.erase("model.embed_tokens.weight"); },
     "'model.embed_tokens.weight' [80, 32] is missing"},
    {"base", [](auto& c) { c.tensors.erase("lm_head.weight"); },
     "'lm_head.weight' [80, 32] is missing"},
    {"base", [](auto& c) { c.tensors.erase("model.layers.1.mlp.experts.7.up_proj.weight"); },
     "'model.layers.1.mlp.experts.7.up_proj.weight' [16, 32] is missing"},
    {"base", [](auto& c) { c.tensors.erase("model.layers.2.mlp.gate.e_score_correction_bias"); },
     "'model.layers.2.mlp.gate.e_score_correction_bias' [8] is missing"},
    {"attention_bias", [](auto& c) { c.tensors.erase("model.layers.0.self_attn.o_proj.bias"); },
     "'model.layers.0.self_attn.o_proj.bias' [32] is missing"},
    {"fp8", [](auto& c) { c.tensors.erase("model.layers.0.self_attn.o_proj.weight_scale_inv"); },
     "'model.layers.0.self_attn.o_proj.weight_scale_inv' [2, 1] is missing"},
    // Surplus.
    {"base", [](auto& c) { c.tensors["extra"] = c.tensors["model.norm.weight"]; },
     "'extra' [32] is surplus"},
    {"attention_bias", [](auto& c) { c.config["attention_bias"] = false; },
     "'model.layers.0.self_attn.o_proj.bias' [32] is surplus"},
    {"base", [](auto& c) { c.config["q_lora_rank"] = nullptr; },
     "'model.layers.0.self_attn.q_a_proj.weight' [16, 32] is surplus"},
    {"base", [](auto& c) { c.config["num_hidden_layers"] = 2; },
     "is surplus: config.json has num_hidden_layers 2 and num_nextn_predict_layers 0"},
    {"base", [](auto& c) { c.config["n_shared_experts"] = 0; },
     "shared_experts.down_proj.weight' [32, 16] is surplus"},
    {"fp8",
     [](auto& c) {
       c.tensors["model.norm.weight_scale_inv"] = {"F32", {1}, "1234"};
     },
     "'model.norm.weight_scale_inv' [1] is surplus"},
    {"base",
     [](auto& c) {
       c.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = {"F32", {1}, "1234"};
     },
     ""},
    // Shapes.
    {"base",
     [](auto& c) {
       c.tensors["model.norm.weight"].shape = {1, 32};
     },
     "'model.norm.weight' has shape [1, 32], config.json asks for [32]"},
    {"base",
     [](auto& c) {
       c.tensors["lm_head.weight"].shape = {32, 80};
     },
     "'lm_head.weight' has shape [32, 80], config.json asks for [80, 32]"},
    {"base", [](auto& c) { c.config["vocab_size"] = 81; },
     "'model.embed_tokens.weight' has shape [80, 32], config.json asks for [81, 32]"},
    {"base", [](auto& c) { c.config["v_head_dim"] = 9; },
     "'model.layers.0.self_attn.kv_b_proj.weight' has shape [48, 24], config.json asks for [51, "
     "24]"},
    {"fp8",
     [](auto& c) {
       c.tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"].shape = {1, 2};
     },
     "o_proj.weight_scale_inv' has shape [1, 2], config.json asks for [2, 1]"},
    {"fp8",
     [](auto& c) {
       c.config["quantization_config"]["weight_block_size"] = {64, 64};
     },
     "_scale_inv' has shape"},
    // Types.
    {"base", [](auto& c) { c.tensors["model.norm.weight"].dtype = "F16"; },
     "'model.norm.weight' is F16, must be F32 or BF16"},
    {"base", [](auto& c) { c.tensors["model.layers.0.self_attn.o_proj.weight"].dtype = "F16"; },
     "o_proj.weight' is F16, must be F8_E4M3, BF16 or F32"},
    {"fp8", [](auto& c) { c.config.erase("quantization_config"); },
     "is F8_E4M3, must be F32 or BF16, as config.json has no quantization_config"},
    {"fp8",
     [](auto& c) { c.tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"].dtype = "I32"; },
     "o_proj.weight_scale_inv' is I32, must be F32"},
    // A projection that the quantisation left out is what it is.
    {"base",
     [](auto& c) {
       c.config["quantization_config"] = {{"quant_method", "fp8"}};
     },
     ""},
    // Tied embeddings.
    {"tie_word_embeddings",
     [](auto& c) { c.tensors["lm_head.weight"] = c.tensors["model.embed_tokens.weight"]; }, ""},
    {"tie_word_embeddings",
     [](auto& c) {
       c.tensors["lm_head.weight"] = c.tensors["model.embed_tokens.weight"];
       c.tensors["lm_head.weight"].bytes[77] ^= 1;
     },
     "'lm_head.weight' differs from 'model.embed_tokens.weight'"},
    {"base", [](auto& c) { c.config["tie_word_embeddings"] = true; },
     "'lm_head.weight' differs from"},
    // MTP layers: all or nothing, and no more than the config says.
    {"base", [](auto& c) { c.config["num_nextn_predict_layers"] = 1; }, ""},
    {"base",
     [](auto& c) {
       AddMtpLayer(c);
       c.config["num_nextn_predict_layers"] = 1;
     },
     ""},
    {"base", [](auto& c) { AddMtpLayer(c); },
     "is surplus: config.json has num_hidden_layers 3 and num_nextn_predict_layers 0"},
    {"base",
     [](auto& c) {
       AddMtpLayer(c);
       c.config["num_nextn_predict_layers"] = 1;
       c.tensors.erase("model.layers.3.eh_proj.weight");
     },
     "'model.layers.3.eh_proj.weight' [32, 64] is missing"},
    {"base",
     [](auto& c) {
       AddMtpLayer(c);
       c.config["num_nextn_predict_layers"] = 1;
       c.tensors["model.layers.3.mystery"] = c.tensors["model.norm.weight"];
     },
     "'model.layers.3.mystery' [32] is surplus"},
    {"base",
     [](auto& c) {
       AddMtpLayer(c, "4");
       c.config["num_nextn_predict_layers"] = 1;
     },
     "'model.layers.4.eh_proj.weight' [32, 64] is surplus"},
    {"base", [](auto& c) { Rename(c, "model.norm.weight", "norm.weight"); },
     "'model.norm.weight' [32] is missing; 'norm.weight' [32] is surplus"},
};

class MutationTest : public testing::TestWithParam<Mutation> {};

TEST_P(MutationTest, IsRefusedByName) {
  TempDir dir;
  TinyCheckpoint checkpoint = TinyCheckpoint::Load(kVariants / GetParam().variant);
  GetParam().change(checkpoint);
  checkpoint.Save(dir.path());
  const auto weights = Load(dir.path());
  if (std::string_view(GetParam().message).empty()) {
    EXPECT_TRUE(weights.ok()) << weights.status();
    return;
  }
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(weights),
              AllOf(HasSubstr(dir.path().string()), HasSubstr(GetParam().message)));
}

INSTANTIATE_TEST_SUITE_P(Checkpoints, MutationTest, testing::ValuesIn(kMutations));

TEST(LoadWeightsTest, ManyProblemsAreCutShort) {
  TempDir dir;
  TinyCheckpoint checkpoint = TinyCheckpoint::Load(kVariants / "base");
  checkpoint.config["moe_intermediate_size"] =
      17;  // 2 layers x (8 experts + 1 shared) x 3 matrices
  checkpoint.Save(dir.path());
  const std::string message = Message(Load(dir.path()));
  EXPECT_THAT(message, HasSubstr("; ... and 34 more"));
  EXPECT_THAT(message, Not(HasSubstr("layers.2.mlp")));
}

TEST(LoadWeightsTest, Truncated) {
  TempDir dir;
  EXPECT_EQ(Load(dir.path()).status().code(), absl::StatusCode::kNotFound);
  TinyCheckpoint checkpoint = TinyCheckpoint::Load(kVariants / "base");
  checkpoint.Save(dir.path());
  const auto file = dir.path() / "model.safetensors";
  std::filesystem::resize_file(file, std::filesystem::file_size(file) - 1);
  EXPECT_THAT(Message(Load(dir.path())), HasSubstr("truncated"));
}

// What a rank reads: its own experts and all else.
TEST(LoadWeightsTest, ARankHasTheViewsOfItsExperts) {
  const auto config = LoadModelConfig(kDemoModel);
  ASSERT_TRUE(config.ok());
  const auto whole = Load(kDemoModel);
  ASSERT_TRUE(whole.ok());
  uint64_t whole_bytes = 0;
  const auto count = [](uint64_t* bytes) { return [bytes](uint64_t, uint64_t t) { *bytes = t; }; };
  ASSERT_TRUE(LoadWeights(*config, kDemoModel, LoadFormat::kSafetensors, count(&whole_bytes)).ok());
  uint64_t expert_bytes = 0;
  for (const LinearWeight* linear :
       {&whole->layers[1].moe.experts[0].gate_proj, &whole->layers[1].moe.experts[0].up_proj,
        &whole->layers[1].moe.experts[0].down_proj}) {
    expert_bytes += 4 * (linear->weight.num_bytes() + linear->scale_inv.num_bytes());  // 4 layers
  }
  for (const int32_t world_size : {2, 3, 16, 20}) {
    for (int32_t rank = 0; rank < world_size; ++rank) {
      const Placement placement{.rank = rank, .world_size = world_size};
      const ExpertRange experts = placement.Experts(16);
      uint64_t bytes = 0;
      const auto slice =
          LoadWeights(*config, kDemoModel, LoadFormat::kSafetensors, count(&bytes), placement);
      ASSERT_TRUE(slice.ok()) << slice.status();
      EXPECT_EQ(bytes, whole_bytes - (16 - experts.count) * expert_bytes);
      const LayerWeights &mine = slice->layers[4], &all = whole->layers[4];
      ASSERT_EQ(mine.moe.experts.size(), 16u);
      for (int32_t e = 0; e < 16; ++e) {
        const LinearWeight& up = mine.moe.experts[e].up_proj;
        EXPECT_EQ(up.weight.empty(), !experts.contains(e));
        EXPECT_EQ(up.scale_inv.empty(), !experts.contains(e));
        if (up.weight.empty()) continue;
        EXPECT_EQ(std::memcmp(up.weight.data, all.moe.experts[e].up_proj.weight.data,
                              up.weight.num_bytes()),
                  0);
      }
      EXPECT_FALSE(mine.moe.gate.empty());
      EXPECT_FALSE(mine.moe.shared_experts.down_proj.weight.empty());
    }
  }
}

// A rank checks the other ranks' experts too: the whole group refuses a checkpoint, or none of it.
TEST(LoadWeightsTest, ARankChecksEveryExpert) {
  TempDir dir;
  TinyCheckpoint checkpoint = TinyCheckpoint::Load(kVariants / "base");
  checkpoint.tensors.erase("model.layers.1.mlp.experts.7.up_proj.weight");
  checkpoint.Save(dir.path());
  const auto config = LoadModelConfig(dir.path());
  ASSERT_TRUE(config.ok());
  EXPECT_THAT(Message(LoadWeights(*config, dir.path(), LoadFormat::kSafetensors, nullptr,
                                  {.rank = 0, .world_size = 4})),
              HasSubstr("'model.layers.1.mlp.experts.7.up_proj.weight' [16, 32] is missing"));
}

TEST(DummyWeightsTest, ARankMakesTheSameAsOneAlone) {
  for (const char* variant : {"base", "fp8"}) {
    const auto config = LoadModelConfig(kVariants / variant);
    ASSERT_TRUE(config.ok());
    const auto whole = LoadWeights(*config, "", LoadFormat::kDummy, nullptr);
    const Placement placement{.rank = 1, .world_size = 3};
    const auto slice = LoadWeights(*config, "", LoadFormat::kDummy, nullptr, placement);
    ASSERT_TRUE(whole.ok() && slice.ok());
    const ExpertRange experts = placement.Experts(config->n_routed_experts);
    for (int32_t e = 0; e < config->n_routed_experts; ++e) {
      const LinearWeight& mine = slice->layers[1].moe.experts[e].down_proj;
      ASSERT_EQ(mine.weight.empty(), !experts.contains(e));
      if (mine.weight.empty()) continue;
      const LinearWeight& all = whole->layers[1].moe.experts[e].down_proj;
      EXPECT_EQ(std::memcmp(mine.weight.data, all.weight.data, all.weight.num_bytes()), 0);
    }
    EXPECT_EQ(std::memcmp(slice->lm_head.data, whole->lm_head.data, whole->lm_head.num_bytes()), 0);
  }
}

TEST(MapWeightsTest, SameViewsAsLoadWeights) {
  const auto config = LoadModelConfig(kDemoModel);
  ASSERT_TRUE(config.ok());
  const auto mapped = MapWeights(*config, kDemoModel);
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  const auto loaded = Load(kDemoModel);
  ASSERT_TRUE(loaded.ok());
  const TensorView& a = mapped->weights.layers[3].o_proj.weight;
  const TensorView& b = loaded->layers[3].o_proj.weight;
  ASSERT_EQ(a.num_bytes(), b.num_bytes());
  std::vector<std::byte> read(a.num_bytes());
  ASSERT_TRUE(mapped->checkpoint->Read(a.data, a.num_bytes(), read.data()).ok());
  EXPECT_EQ(std::memcmp(read.data(), b.data, b.num_bytes()), 0);

  const auto tied = LoadModelConfig(kVariants / "tie_word_embeddings");
  const auto shared = MapWeights(*tied, kVariants / "tie_word_embeddings");
  ASSERT_TRUE(shared.ok()) << shared.status();
  EXPECT_EQ(shared->weights.lm_head.data, shared->weights.embed_tokens.data);
}

// Somebody shortens the file while it is being loaded: an error, not a bus error.
TEST(ReadAheadTest, ShortenedAfterOpening) {
  TempDir dir;
  const auto file = dir.path() / "model.safetensors";
  const std::string header =
      R"({"a": {"dtype": "I64", "shape": [512], "data_offsets": [0, 4096]},
          "b": {"dtype": "I64", "shape": [8192], "data_offsets": [4096, 69632]}})";
  WriteAll(file, SafetensorsBytes(header + std::string(8 - header.size() % 8, ' '),
                                  std::string(69632, '\1')));
  const auto checkpoint = Checkpoint::OpenFile(file);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE(ReadAhead(**checkpoint, {"a", "b", "c"}, nullptr).ok());
  std::filesystem::resize_file(file, 8192);
  EXPECT_TRUE(ReadAhead(**checkpoint, {"a"}, nullptr).ok());
  bool reported_done = false;
  const absl::Status status = ReadAhead(
      **checkpoint, {"a", "b"},
      [&](uint64_t done, uint64_t total) { reported_done = reported_done || done == total; });
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("'b' cannot be read"));
  EXPECT_FALSE(reported_done);
}

TEST(DummyWeightsTest, ShapesOfTheConfigAndTheSameEachTime) {
  const auto a = Load(kDemoModel, LoadFormat::kDummy);
  const auto b = Load(kDemoModel, LoadFormat::kDummy);
  const auto real = Load(kDemoModel);
  ASSERT_TRUE(a.ok() && b.ok() && real.ok()) << a.status();
  for (size_t i = 0; i < a->layers.size(); ++i) {
    const LinearWeight& weight = a->layers[i].kv_b_proj;
    EXPECT_EQ(weight.weight.shape, real->layers[i].kv_b_proj.weight.shape);
    EXPECT_EQ(weight.weight.dtype, DType::kF8E4M3);
    EXPECT_EQ(weight.scale_inv.shape, real->layers[i].kv_b_proj.scale_inv.shape);
    EXPECT_EQ(std::memcmp(weight.weight.data, b->layers[i].kv_b_proj.weight.data,
                          weight.weight.num_bytes()),
              0);
  }
  EXPECT_NE(
      std::memcmp(a->layers[0].kv_b_proj.weight.data, a->layers[1].kv_b_proj.weight.data, 1024), 0);
  EXPECT_NE(std::memcmp(a->embed_tokens.data, a->lm_head.data, 1024), 0);
}

TEST(DummyWeightsTest, NormalWithTheDeviationOfItsWidth) {
  const auto config = LoadModelConfig(kDemoModel);
  const auto weights = Load(kDemoModel, LoadFormat::kDummy);
  ASSERT_TRUE(weights.ok()) << weights.status();
  auto check = [](const std::vector<float>& values, double deviation) {
    double sum = 0, squares = 0;
    for (float value : values) {
      sum += value;
      squares += double{value} * value;
    }
    const auto n = static_cast<double>(values.size());
    EXPECT_NEAR(sum / n, 0.0, 5 * deviation / std::sqrt(n));
    EXPECT_NEAR(std::sqrt(squares / n), deviation, 0.03 * deviation);
  };
  const LinearWeight& kv_b = weights->layers[2].kv_b_proj;  // FP8, [1024, 512]
  std::vector<float> values(1024 * 512);
  Dequantize(kv_b, config->quantization, 0, 1024, values.data());
  check(values, 1 / std::sqrt(512.0));
  values.resize(4096 * 256);
  ToFloat(weights->lm_head, values.data());  // bf16
  check(values, 1 / std::sqrt(256.0));
  values.resize(256);
  ToFloat(weights->norm, values.data());
  EXPECT_EQ(values, std::vector<float>(256, 1.0f));
}

TEST(DummyWeightsTest, EveryVariantAndDType) {
  for (const auto& entry : std::filesystem::directory_iterator(kVariants)) {
    const auto weights = Load(entry.path(), LoadFormat::kDummy);
    ASSERT_TRUE(weights.ok()) << entry.path() << ": " << weights.status();
    EXPECT_FALSE(weights->lm_head.empty());
  }
  EXPECT_EQ(Load(kVariants / "f32", LoadFormat::kDummy)->layers[0].o_proj.weight.dtype,
            DType::kF32);
  EXPECT_EQ(Load(kVariants / "base", LoadFormat::kDummy)->layers[0].o_proj.weight.dtype,
            DType::kBF16);
}

TEST(DummyWeightsTest, TooLittleMemory) {
  auto config = ParseModelConfig(ReadAll("deploy/configs/deepseek-v3.json"));
  ASSERT_TRUE(config.ok());
  config->hidden_size = 1 << 20;  // 98 TB, more than any machine has
  const auto weights = LoadWeights(*config, "", LoadFormat::kDummy, nullptr);
  EXPECT_EQ(weights.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(Message(weights), HasSubstr("bytes of memory"));
}

}  // namespace
}  // namespace latentd
