#include "tests/engine/cpu/naive_model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/model/quantization.h"
#include "engine/model/rope.h"

namespace latentd {
namespace {

using Vector = std::vector<float>;

Vector Floats(const TensorView& tensor) {
  Vector values(tensor.num_elements());
  ToFloat(tensor, values.data());
  return values;
}

class Naive {
 public:
  Naive(const ModelConfig& config, int num_tokens) : config_(config), rope_(config, num_tokens) {}

  Vector Linear(const LinearWeight& linear, const Vector& x) const {
    const int64_t n = linear.weight.shape[0], k = linear.weight.shape[1];
    Vector w(n * k), y(n);
    Dequantize(linear, config_.quantization, 0, n, w.data());
    const Vector bias = linear.bias.empty() ? Vector(n, 0.0f) : Floats(linear.bias);
    for (int64_t i = 0; i < n; ++i) {
      double sum = bias[i];
      for (int64_t j = 0; j < k; ++j) sum += double{w[i * k + j]} * x[j];
      y[i] = static_cast<float>(sum);
    }
    return y;
  }

  static Vector Norm(const Vector& x, const TensorView& weight, float eps) {
    double sum = 0.0;
    for (float v : x) sum += double{v} * v;
    const double factor = 1.0 / std::sqrt(sum / static_cast<double>(x.size()) + eps);
    Vector y = Floats(weight);
    for (size_t i = 0; i < x.size(); ++i) y[i] = static_cast<float>(x[i] * factor * y[i]);
    return y;
  }

  // Adds the attention of all tokens to `hidden`.
  void Attend(const LayerWeights& w, std::vector<Vector>& hidden) const {
    const int heads = config_.num_attention_heads, nope = config_.qk_nope_head_dim;
    const int rope = config_.qk_rope_head_dim, value = config_.v_head_dim;
    const int qk = config_.qk_head_dim(), rank = config_.kv_lora_rank;
    double scale = 1.0 / std::sqrt(static_cast<double>(qk));
    if (config_.yarn) scale *= config_.yarn->softmax_scale();
    std::vector<Vector> queries, expanded, rope_keys;
    for (size_t t = 0; t < hidden.size(); ++t) {
      const Vector x = Norm(hidden[t], w.input_layernorm, config_.rms_norm_eps);
      Vector q =
          config_.q_lora_rank
              ? Linear(w.q_b_proj, Norm(Linear(w.q_a_proj, x), w.q_a_layernorm, kLatentNormEps))
              : Linear(w.q_proj, x);
      for (int h = 0; h < heads; ++h) Rotate(q.data() + h * qk + nope, t);
      const Vector kv = Linear(w.kv_a_proj_with_mqa, x);
      Vector rope_key(kv.begin() + rank, kv.end());
      Rotate(rope_key.data(), t);
      queries.push_back(std::move(q));
      rope_keys.push_back(std::move(rope_key));
      expanded.push_back(Linear(w.kv_b_proj, Norm(Vector(kv.begin(), kv.begin() + rank),
                                                  w.kv_a_layernorm, kLatentNormEps)));
    }
    for (size_t t = 0; t < hidden.size(); ++t) {
      Vector out(heads * value);
      for (int h = 0; h < heads; ++h) {
        std::vector<double> scores(t + 1);
        for (size_t s = 0; s <= t; ++s) {
          const float* q = queries[t].data() + h * qk;
          const float* k = expanded[s].data() + h * (nope + value);
          double dot = 0.0;
          for (int i = 0; i < nope; ++i) dot += double{q[i]} * k[i];
          for (int i = 0; i < rope; ++i) dot += double{q[nope + i]} * rope_keys[s][i];
          scores[s] = dot * scale;
        }
        const double largest = *std::max_element(scores.begin(), scores.end());
        double sum = 0.0;
        for (double& s : scores) sum += s = std::exp(s - largest);
        for (int i = 0; i < value; ++i) {
          double total = 0.0;
          for (size_t s = 0; s <= t; ++s) {
            total += scores[s] * expanded[s][h * (nope + value) + nope + i];
          }
          out[h * value + i] = static_cast<float>(total / sum);
        }
      }
      Add(Linear(w.o_proj, out), hidden[t]);
    }
  }

  Vector Mlp(const MlpWeights& w, const Vector& x) const {
    Vector gate = Linear(w.gate_proj, x);
    const Vector up = Linear(w.up_proj, x);
    for (size_t i = 0; i < gate.size(); ++i)
      gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    return Linear(w.down_proj, gate);
  }

  Vector Moe(const MoeWeights& w, const Vector& x) const {
    const int n = config_.n_routed_experts, per_group = n / config_.n_group;
    const LinearWeight gate{.weight = w.gate, .scale_inv = {}, .bias = {}};
    Vector scores = Linear(gate, x), choice = Floats(w.e_score_correction_bias);
    for (int i = 0; i < n; ++i) {
      scores[i] = 1.0f / (1.0f + std::exp(-scores[i]));
      choice[i] += scores[i];
    }
    Vector group_scores;
    for (int g = 0; g < config_.n_group; ++g) {
      Vector group(choice.begin() + g * per_group, choice.begin() + (g + 1) * per_group);
      std::sort(group.rbegin(), group.rend());
      group_scores.push_back(per_group > 1 ? group[0] + group[1] : group[0]);
    }
    const std::vector<int> groups = Order(group_scores);
    for (int g = config_.topk_group; g < config_.n_group; ++g) {
      std::fill_n(choice.begin() + groups[g] * per_group, per_group, -INFINITY);
    }
    const std::vector<int> order = Order(choice);
    double sum = 1e-20;
    for (int j = 0; j < config_.num_experts_per_tok; ++j) sum += scores[order[j]];
    Vector out(x.size(), 0.0f);
    for (int j = 0; j < config_.num_experts_per_tok; ++j) {
      Vector y = Mlp(w.experts[order[j]], x);
      double weight = scores[order[j]] * double{config_.routed_scaling_factor};
      if (config_.norm_topk_prob) weight /= sum;
      for (float& v : y) v = static_cast<float>(v * weight);
      Add(y, out);
    }
    if (config_.n_shared_experts > 0) Add(Mlp(w.shared_experts, x), out);
    return out;
  }

  static void Add(const Vector& x, Vector& sum) {
    for (size_t i = 0; i < x.size(); ++i) sum[i] += x[i];
  }

 private:
  void Rotate(float* x, size_t position) const {
    const Vector copy(x, x + config_.qk_rope_head_dim);
    rope_.Apply(copy.data(), static_cast<int32_t>(position), x);
  }
  // Indices from the largest value to the smallest.
  static std::vector<int> Order(const Vector& values) {
    std::vector<int> order(values.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return values[a] > values[b]; });
    return order;
  }

  const ModelConfig& config_;
  Rope rope_;
};

}  // namespace

std::vector<float> NaiveLogits(const ModelConfig& config, const ModelWeights& weights,
                               const std::vector<TokenId>& tokens) {
  const Naive naive(config, static_cast<int>(tokens.size()));
  const Vector embeddings = Floats(weights.embed_tokens);
  std::vector<Vector> hidden;
  for (TokenId token : tokens) {
    const auto row = embeddings.begin() + int64_t{token} * config.hidden_size;
    hidden.emplace_back(row, row + config.hidden_size);
  }
  for (int i = 0; i < config.num_hidden_layers; ++i) {
    const LayerWeights& layer = weights.layers[i];
    naive.Attend(layer, hidden);
    for (Vector& h : hidden) {
      const Vector x = Naive::Norm(h, layer.post_attention_layernorm, config.rms_norm_eps);
      Naive::Add(config.is_moe_layer(i) ? naive.Moe(layer.moe, x) : naive.Mlp(layer.mlp, x), h);
    }
  }
  const LinearWeight head{.weight = weights.lm_head, .scale_inv = {}, .bias = {}};
  std::vector<float> logits;
  for (const Vector& h : hidden) {
    const Vector row = naive.Linear(head, Naive::Norm(h, weights.norm, config.rms_norm_eps));
    logits.insert(logits.end(), row.begin(), row.end());
  }
  return logits;
}

}  // namespace latentd
