#include "tests/engine/cuda/weights_reference.h"

#include <gtest/gtest.h>

#include <cstring>

#include "engine/model/quantization.h"

namespace latentd {
namespace {

int64_t Blocks(int64_t size) { return (size + 127) / 128; }
int64_t ScaleStride(int64_t k) { return (Blocks(k) + 3) / 4 * 4; }

float F32At(const TensorView& view, int64_t i) {
  if (view.dtype == DType::kF32) return reinterpret_cast<const float*>(view.data)[i];
  return Bf16ToFloat(reinterpret_cast<const uint16_t*>(view.data)[i]);
}
uint16_t Bf16At(const TensorView& view, int64_t i) {
  if (view.dtype == DType::kBF16) return reinterpret_cast<const uint16_t*>(view.data)[i];
  return FloatToBf16(F32At(view, i));
}

template <typename T>
std::vector<std::byte> Bytes(const std::vector<T>& values) {
  const auto* begin = reinterpret_cast<const std::byte*>(values.data());
  return {begin, begin + values.size() * sizeof(T)};
}

std::vector<std::byte> F32Bytes(const TensorView& view) {
  std::vector<float> values;
  for (int64_t i = 0; i < view.num_elements(); ++i) values.push_back(F32At(view, i));
  return Bytes(values);
}
std::vector<std::byte> Bf16Bytes(const TensorView& view) {
  std::vector<uint16_t> values;
  for (int64_t i = 0; i < view.num_elements(); ++i) values.push_back(Bf16At(view, i));
  return Bytes(values);
}

// Where an element of a matrix of the GPU comes from.
struct Origin {
  const LinearWeight* linear;
  int64_t row, col;
};

class Reference {
 public:
  Reference(const ModelConfig& config, const ModelWeights& stored)
      : config_(config), stored_(stored) {}

  WeightBytes Build() {
    result_["embed_tokens"] = Bf16Bytes(stored_.embed_tokens);
    for (int32_t i = 0; i < config_.num_hidden_layers; ++i) {
      prefix_ = "layers." + std::to_string(i) + ".";
      Attention(stored_.layers[i]);
      config_.is_moe_layer(i) ? Moe(stored_.layers[i].moe) : Dense(stored_.layers[i].mlp);
    }
    result_["norm"] = F32Bytes(stored_.norm);
    result_["lm_head"] = Bf16Bytes(stored_.lm_head);
    return std::move(result_);
  }

 private:
  // scale(group, block row, block col) says which block it is, by any of its elements.
  using Map = std::function<Origin(int64_t group, int64_t row, int64_t col)>;
  void Matrix(const std::string& name, int64_t groups, int64_t n, int64_t k, const Map& element,
              const Map& block) {
    std::vector<uint8_t> fp8;
    std::vector<uint16_t> bf16;
    std::vector<float> scales;
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t col = 0; col < k; ++col) {
          const Origin at = element(g, row, col);
          const TensorView& weight = at.linear->weight;
          const int64_t i = at.row * weight.shape[1] + at.col;
          if (config_.quantization) {
            fp8.push_back(std::to_integer<uint8_t>(weight.data[i]));
          } else {
            bf16.push_back(Bf16At(weight, i));
          }
        }
      }
      for (int64_t row = 0; row < Blocks(n) && config_.quantization; ++row) {
        for (int64_t col = 0; col < ScaleStride(k); ++col) {
          if (col >= Blocks(k)) {
            scales.push_back(0);
            continue;
          }
          const Origin at = block(g, row, col);
          const TensorView& scale = at.linear->scale_inv;
          scales.push_back(F32At(scale, at.row / 128 * scale.shape[1] + at.col / 128));
        }
      }
    }
    result_[prefix_ + name] = config_.quantization ? Bytes(fp8) : Bytes(bf16);
    if (config_.quantization) result_[prefix_ + name + ".scales"] = Bytes(scales);
  }
  void Matrix(const std::string& name, int64_t n, int64_t k, const Map& element) {
    Matrix(name, 1, n, k, element,
           [&](int64_t g, int64_t row, int64_t col) { return element(g, row * 128, col * 128); });
  }

  void Attention(const LayerWeights& layer) {
    result_[prefix_ + "input_layernorm"] = F32Bytes(layer.input_layernorm);
    const LinearWeight& q = config_.q_lora_rank ? layer.q_a_proj : layer.q_proj;
    const int64_t q_rows = q.weight.shape[0];
    Matrix("qkv_a", q_rows + 576, config_.hidden_size, [&](int64_t, int64_t row, int64_t col) {
      return row < q_rows ? Origin{&q, row, col}
                          : Origin{&layer.kv_a_proj_with_mqa, row - q_rows, col};
    });
    if (config_.q_lora_rank) {
      result_[prefix_ + "q_a_layernorm"] = F32Bytes(layer.q_a_layernorm);
      Matrix("q_b", config_.num_attention_heads * 192, *config_.q_lora_rank,
             [&](int64_t, int64_t row, int64_t col) {
               return Origin{&layer.q_b_proj, row, col};
             });
    }
    result_[prefix_ + "kv_a_layernorm"] = F32Bytes(layer.kv_a_layernorm);
    std::vector<uint16_t> w_uk, w_uv;
    std::vector<float> row(512);
    for (int64_t r = 0; r < layer.kv_b_proj.weight.shape[0]; ++r) {
      Dequantize(layer.kv_b_proj, config_.quantization, r, r + 1, row.data());
      for (float value : row) (r % 256 < 128 ? w_uk : w_uv).push_back(FloatToBf16(value));
    }
    result_[prefix_ + "w_uk"] = Bytes(w_uk);
    result_[prefix_ + "w_uv"] = Bytes(w_uv);
    Matrix("o", config_.hidden_size, config_.num_attention_heads * 128,
           [&](int64_t, int64_t row, int64_t col) {
             return Origin{&layer.o_proj, row, col};
           });
    result_[prefix_ + "post_attention_layernorm"] = F32Bytes(layer.post_attention_layernorm);
  }

  // Group g is columns (down_proj) or rows (the others) [first, first + width) of mlp(g).
  struct Slice {
    const MlpWeights* mlp;
    int64_t first;
  };
  void Mlps(const std::vector<Slice>& groups, int64_t width) {
    const int64_t hidden = config_.hidden_size;
    Matrix(
        "mlp.gate_up", static_cast<int64_t>(groups.size()), 2 * width, hidden,
        [&](int64_t g, int64_t row, int64_t col) {
          const bool up = row % 16 >= 8;
          const int64_t stored = groups[g].first + row / 16 * 8 + row % 8;
          return Origin{up ? &groups[g].mlp->up_proj : &groups[g].mlp->gate_proj, stored, col};
        },
        [&](int64_t g, int64_t row, int64_t col) {
          const bool up = row >= width / 128;
          const int64_t stored = groups[g].first + (up ? row - width / 128 : row) * 128;
          return Origin{up ? &groups[g].mlp->up_proj : &groups[g].mlp->gate_proj, stored,
                        col * 128};
        });
    const Map down = [&](int64_t g, int64_t row, int64_t col) {
      return Origin{&groups[g].mlp->down_proj, row, groups[g].first + col};
    };
    Matrix("mlp.down", static_cast<int64_t>(groups.size()), hidden, width, down,
           [&](int64_t g, int64_t row, int64_t col) { return down(g, row * 128, col * 128); });
  }

  void Dense(const MlpWeights& mlp) { Mlps({{&mlp, 0}}, config_.intermediate_size); }

  void Moe(const MoeWeights& moe) {
    std::vector<Slice> groups;
    for (const MlpWeights& expert : moe.experts) groups.push_back({&expert, 0});
    for (int64_t i = 0; i < config_.n_shared_experts; ++i) {
      groups.push_back({&moe.shared_experts, i * config_.moe_intermediate_size});
    }
    Mlps(groups, config_.moe_intermediate_size);
    result_[prefix_ + "gate"] =
        moe.gate.dtype == DType::kF32 ? F32Bytes(moe.gate) : Bf16Bytes(moe.gate);
    result_[prefix_ + "correction_bias"] = F32Bytes(moe.e_score_correction_bias);
  }

  const ModelConfig& config_;
  const ModelWeights& stored_;
  std::string prefix_;
  WeightBytes result_;
};

}  // namespace

WeightBytes ExpectedWeights(const ModelConfig& config, const ModelWeights& stored) {
  return Reference(config, stored).Build();
}

WeightBytes ActualWeights(const ModelConfig& config, const GpuWeights& gpu,
                          const ReadMemory& read) {
  WeightBytes result;
  const auto get = [&]<typename T>(const std::string& name, const T* data, int64_t count) {
    if (data == nullptr) return;
    std::vector<std::byte> bytes(static_cast<size_t>(count) * sizeof(T));
    read(data, bytes.size(), bytes.data());
    result[name] = std::move(bytes);
  };
  const auto matrix = [&](const std::string& name, const WeightMatrix& m) {
    const int64_t rows = int64_t{m.num_groups} * m.n;
    get(name, m.fp8, rows * m.k);
    get(name, m.bf16, rows * m.k);
    get(name + ".scales", m.scales, m.num_groups * Blocks(m.n) * m.scale_stride);
  };
  const int64_t hidden = config.hidden_size;
  get("embed_tokens", gpu.embed_tokens, config.vocab_size * hidden);
  for (size_t i = 0; i < gpu.layers.size(); ++i) {
    const GpuLayer& layer = gpu.layers[i];
    const std::string prefix = "layers." + std::to_string(i) + ".";
    get(prefix + "input_layernorm", layer.input_layernorm, hidden);
    matrix(prefix + "qkv_a", layer.qkv_a);
    get(prefix + "q_a_layernorm", layer.q_a_layernorm, config.q_lora_rank.value_or(0));
    matrix(prefix + "q_b", layer.q_b);
    get(prefix + "kv_a_layernorm", layer.kv_a_layernorm, 512);
    get(prefix + "w_uk", layer.w_uk, int64_t{config.num_attention_heads} * 128 * 512);
    get(prefix + "w_uv", layer.w_uv, int64_t{config.num_attention_heads} * 128 * 512);
    matrix(prefix + "o", layer.o);
    get(prefix + "post_attention_layernorm", layer.post_attention_layernorm, hidden);
    matrix(prefix + "mlp.gate_up", layer.mlp.gate_up);
    matrix(prefix + "mlp.down", layer.mlp.down);
    get(prefix + "gate", layer.gate_bf16, config.n_routed_experts * hidden);
    get(prefix + "gate", layer.gate_f32, config.n_routed_experts * hidden);
    get(prefix + "correction_bias", layer.correction_bias, config.n_routed_experts);
  }
  get("norm", gpu.norm, hidden);
  get("lm_head", gpu.lm_head, config.vocab_size * hidden);
  return result;
}

void ExpectEqualWeights(const WeightBytes& actual, const WeightBytes& expected) {
  for (const auto& [name, bytes] : actual) EXPECT_TRUE(expected.contains(name)) << name;
  for (const auto& [name, bytes] : expected) {
    const auto it = actual.find(name);
    if (it == actual.end()) {
      ADD_FAILURE() << name << " is absent";
      continue;
    }
    ASSERT_EQ(it->second.size(), bytes.size()) << name;
    size_t different = 0, first = 0;
    for (size_t i = 0; i < bytes.size(); ++i) {
      if (it->second[i] == bytes[i]) continue;
      if (different++ == 0) first = i;
    }
    EXPECT_EQ(different, 0u) << name << ": of " << bytes.size() << " bytes, the first is " << first
                             << ": " << std::to_integer<int>(it->second[first]) << ", not "
                             << std::to_integer<int>(bytes[first]);
  }
}

}  // namespace latentd
