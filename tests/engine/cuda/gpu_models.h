#ifndef LATENTD_TESTS_ENGINE_CUDA_GPU_MODELS_H_
#define LATENTD_TESTS_ENGINE_CUDA_GPU_MODELS_H_

#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/model/config.h"
#include "engine/model/dummy_hash.h"
#include "engine/model/dummy_weights.h"
#include "engine/model/layout.h"
#include "engine/model/quantization.h"
#include "tests/engine/model/tiny_checkpoint.h"

namespace latentd {

// A small config.json that the CUDA engine serves: the demo model's, with `changes`.
inline nlohmann::json SmallConfig(const nlohmann::json& changes) {
  nlohmann::json config = nlohmann::json::parse(ReadAll("deploy/demo-model/config.json"));
  config["vocab_size"] = 96;
  config["num_hidden_layers"] = 2;
  config["num_nextn_predict_layers"] = 0;
  for (const auto& [name, value] : changes.items()) {
    if (value.is_null() && name == "quantization_config") {
      config.erase(name);
    } else {
      config[name] = value;
    }
  }
  config["num_key_value_heads"] = config["num_attention_heads"];
  return config;
}

inline ModelConfig Parse(const nlohmann::json& json) {
  absl::StatusOr<ModelConfig> config = ParseModelConfig(json.dump());
  EXPECT_TRUE(config.ok()) << config.status();
  return config.ok() ? *std::move(config) : ModelConfig();
}

// A checkpoint of the config's shapes in which each element of each tensor is random, scales and
// norms too: nothing can be mistaken for something else.
inline TinyCheckpoint RandomCheckpoint(const nlohmann::json& json) {
  class Writer : public WeightVisitor {
   public:
    explicit Writer(TinyCheckpoint& checkpoint) : checkpoint_(checkpoint) {}
    void Tensor(const TensorSpec& spec, TensorView& view) override { Write(spec.name, view); }
    void Linear(const TensorSpec& spec, LinearWeight& linear) override {
      Write(spec.name, linear.weight);
      if (!linear.scale_inv.shape.empty()) Write(spec.name + "_scale_inv", linear.scale_inv);
    }

   private:
    void Write(const std::string& name, const TensorView& view) {
      ++number_;
      std::string bytes(view.num_bytes(), '\0');
      for (int64_t i = 0; i < view.num_elements(); ++i) {
        const uint64_t random = DummyHash(number_, static_cast<uint64_t>(i));
        const float value = static_cast<float>(random >> 40) * 0x1p-23f - 1.0f;
        char* at = bytes.data() + static_cast<size_t>(i) * DTypeBytes(view.dtype);
        if (view.dtype == DType::kF8E4M3) {
          *at = static_cast<char>(FloatToE4m3(value * kE4m3Max));
        } else if (view.dtype == DType::kBF16) {
          const uint16_t bits = FloatToBf16(value);
          std::memcpy(at, &bits, sizeof(bits));
        } else {
          std::memcpy(at, &value, sizeof(value));
        }
      }
      checkpoint_.tensors[name] = {std::string(DTypeName(view.dtype)), view.shape, bytes};
    }

    TinyCheckpoint& checkpoint_;
    uint64_t number_ = 0;
  };

  TinyCheckpoint checkpoint;
  checkpoint.config = json;
  const ModelConfig config = Parse(json);
  ModelWeights shapes;
  PlanDummyWeights(config, shapes);
  Writer writer(checkpoint);
  VisitWeights(config, shapes, writer);
  return checkpoint;
}

// Configs between which every branch of the layout is taken.
struct LayoutCase {
  const char* name;
  const char* changes;  // JSON
};
inline constexpr LayoutCase kLayoutCases[] = {
    {"fp8", "{}"},
    {"bf16", R"({"quantization_config": null})"},
    {"f32", R"({"quantization_config": null, "torch_dtype": "float32"})"},
    {"q_proj", R"({"q_lora_rank": null})"},
    {"q_proj_bf16", R"({"q_lora_rank": null, "quantization_config": null})"},
    {"shared_2", R"({"n_shared_experts": 2})"},
    {"shared_3_bf16", R"({"n_shared_experts": 3, "quantization_config": null})"},
    {"shared_0", R"({"n_shared_experts": 0})"},
    {"tied", R"({"tie_word_embeddings": true})"},
    {"dense", R"({"first_k_dense_replace": 2})"},
    {"widths", R"({"hidden_size": 640, "moe_intermediate_size": 384, "intermediate_size": 1152,
                   "q_lora_rank": 256, "num_attention_heads": 2})"},
    {"widths_bf16", R"({"hidden_size": 96, "moe_intermediate_size": 32, "intermediate_size": 160,
                        "q_lora_rank": 32, "num_attention_heads": 3, "quantization_config": null})"},
};

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CUDA_GPU_MODELS_H_
