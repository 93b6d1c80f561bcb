#include "engine/cpu/moe.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/container/inlined_vector.h"
#include "engine/model/placement.h"
#include "engine/status.h"

namespace latentd {
namespace {

ptrdiff_t Padded(int k) { return (k + kRowPadding - 1) / kRowPadding * kRowPadding; }

// Grows only: pads keep their zeros, and no step allocates once the largest has been seen.
template <typename Vector>
void Grow(Vector& buffer, size_t size) {
  if (buffer.size() < size) buffer.resize(size);
}

// chosen[k] = the indices of the k largest of values[n], the lower index first on a tie, ascending.
// Only indices with allowed[i / per_group].
void LargestK(const float* values, int n, int k, const bool* allowed, int per_group,
              int32_t* chosen) {
  int found = 0;
  for (int i = 0; i < n; ++i) {
    if (!allowed[i / per_group]) continue;
    int at = found;
    while (at > 0 && values[i] > values[chosen[at - 1]]) --at;
    if (at >= k) continue;
    found = std::min(found + 1, k);
    for (int j = found - 1; j > at; --j) chosen[j] = chosen[j - 1];
    chosen[at] = i;
  }
  // Fewer than k only for scores that are no numbers; any choice will do, but it must be one.
  for (int i = 0; found < k; ++i) {
    if (std::find(chosen, chosen + found, i) == chosen + found) chosen[found++] = i;
  }
  std::sort(chosen, chosen + k);
}

}  // namespace

void RouteToken(const ModelConfig& config, const float* scores, const float* bias, int32_t* experts,
                float* weights) {
  const int n = config.n_routed_experts, per_group = n / config.n_group;
  absl::InlinedVector<float, 512> choice(n);
  for (int i = 0; i < n; ++i) choice[i] = scores[i] + bias[i];

  absl::InlinedVector<bool, 32> allowed(config.n_group, config.topk_group == config.n_group);
  if (config.topk_group < config.n_group) {
    absl::InlinedVector<float, 32> group_scores(config.n_group);
    for (int g = 0; g < config.n_group; ++g) {
      float best = -INFINITY, second = -INFINITY;
      for (int i = g * per_group; i < (g + 1) * per_group; ++i) {
        if (choice[i] > best) {
          second = best;
          best = choice[i];
        } else if (choice[i] > second) {
          second = choice[i];
        }
      }
      group_scores[g] = best + second;
    }
    const bool any = true;
    absl::InlinedVector<int32_t, 32> groups(config.topk_group);
    LargestK(group_scores.data(), config.n_group, config.topk_group, &any, config.n_group,
             groups.data());
    for (int32_t g : groups) allowed[g] = true;
  }
  LargestK(choice.data(), n, config.num_experts_per_tok, allowed.data(), per_group, experts);

  float sum = 0.0f;
  for (int j = 0; j < config.num_experts_per_tok; ++j) sum += scores[experts[j]];
  for (int j = 0; j < config.num_experts_per_tok; ++j) {
    float weight = scores[experts[j]];
    if (config.norm_topk_prob) weight /= sum + 1e-20f;
    weights[j] = weight * config.routed_scaling_factor;
  }
}

absl::Status Moe::Run(int layer, const float* x, ptrdiff_t x_stride, int rows, float* out,
                      ptrdiff_t out_stride, ExpertExchange* exchange, TraceSink* trace) {
  const bool moe = model_.config.is_moe_layer(layer);
  first_.assign(model_.config.n_routed_experts + 1, 0);
  if (moe) {
    Route(layer, x, x_stride, rows, trace);
    RoutedRows routed{.x = x, .x_stride = x_stride, .experts = experts_.data(), .rows = rows};
    if (exchange != nullptr) {
      ASSIGN_OR_RETURN(routed, exchange->Dispatch(routed));
    }
    GroupByExpert(routed, x_stride);
  }
  ComputeMlps(layer, x, x_stride, rows, out, out_stride);
  if (moe) {
    ExpertOutputs outputs{.outputs = outputs_.data(), .places = places_.data()};
    if (exchange != nullptr) {
      ASSIGN_OR_RETURN(outputs, exchange->Combine(outputs));
    }
    AddOutputs(outputs, rows, out, out_stride);
  }
  return absl::OkStatus();
}

// outputs_ of the assignments; out [rows, out_stride] of the dense MLP or the shared experts.
void Moe::ComputeMlps(int layer, const float* x, ptrdiff_t x_stride, int rows, float* out,
                      ptrdiff_t out_stride) {
  const ModelConfig& config = model_.config;
  const PackedLayer& weights = model_.layers[layer];
  const int assignments = first_.back();
  const int width = config.moe_intermediate_size;
  const int shared_width = weights.mlp.width;  // 0: no shared experts

  // Gate and up of every expert and of the shared one, side by side.
  Grow(gate_up_, size_t{2} * (assignments * size_t(width) + rows * size_t(shared_width)));
  inputs_.clear();
  jobs_.clear();
  for (int e = 0; e < config.n_routed_experts; ++e) {
    if (first_[e] == first_[e + 1]) continue;
    jobs_.push_back({.input = static_cast<int>(inputs_.size()),
                     .matrix = &weights.experts[e].gate_up,
                     .out = gate_up_.data() + size_t{2} * first_[e] * width,
                     .out_stride = 2 * width});
    inputs_.push_back({.x = gathered_.data() + first_[e] * x_stride,
                       .stride = x_stride,
                       .rows = first_[e + 1] - first_[e],
                       .k = config.hidden_size});
  }
  if (shared_width > 0) {
    jobs_.push_back({.input = static_cast<int>(inputs_.size()),
                     .matrix = &weights.mlp.gate_up,
                     .out = gate_up_.data() + size_t{2} * assignments * width,
                     .out_stride = 2 * shared_width});
    inputs_.push_back({.x = x, .stride = x_stride, .rows = rows, .k = config.hidden_size});
  }
  gemm_.Run(inputs_, jobs_);
  Activate(assignments, rows, width, shared_width);

  const ptrdiff_t stride = Padded(width), shared_stride = Padded(shared_width);
  Grow(outputs_, size_t(assignments) * config.hidden_size);
  size_t next = 0;
  for (int e = 0; e < config.n_routed_experts; ++e) {
    if (first_[e] == first_[e + 1]) continue;
    inputs_[next].x = activations_.data() + first_[e] * stride;
    inputs_[next].stride = stride;
    inputs_[next].k = width;
    jobs_[next].matrix = &weights.experts[e].down;
    jobs_[next].out = outputs_.data() + size_t(first_[e]) * config.hidden_size;
    jobs_[next].out_stride = config.hidden_size;
    ++next;
  }
  if (shared_width > 0) {
    inputs_[next].x = activations_.data() + assignments * stride;
    inputs_[next].stride = shared_stride;
    inputs_[next].k = shared_width;
    jobs_[next].matrix = &weights.mlp.down;
    jobs_[next].out = out;
    jobs_[next].out_stride = out_stride;
  } else {
    for (int row = 0; row < rows; ++row)
      std::fill_n(out + row * out_stride, config.hidden_size, 0.0f);
  }
  gemm_.Run(inputs_, jobs_);
}

// activations_ from gate_up_.
void Moe::Activate(int assignments, int rows, int width, int shared_width) {
  const ptrdiff_t stride = Padded(width), shared_stride = Padded(shared_width);
  Grow(activations_, assignments * stride + rows * shared_stride);
  const float* shared_gate_up = gate_up_.data() + size_t{2} * assignments * width;
  float* shared_activations = activations_.data() + assignments * stride;
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max(shared_width, width));
  pool_.For(assignments + (shared_width > 0 ? rows : 0), grain,
            [&](int64_t begin, int64_t end, int) {
              for (int64_t i = begin; i < end; ++i) {
                const bool routed = i < assignments;
                const int64_t row = routed ? i : i - assignments;
                const int w = routed ? width : shared_width;
                const float* gate = (routed ? gate_up_.data() : shared_gate_up) + 2 * row * w;
                float* activation = routed ? activations_.data() + row * stride
                                           : shared_activations + row * shared_stride;
                kernels_.silu_multiply(gate, gate + w, w, activation);
                // The buffers are laid out anew for each layer, so the padding may hold old
                // numbers.
                std::fill(activation + w, activation + (routed ? stride : shared_stride), 0.0f);
              }
            });
}

void Moe::Route(int layer, const float* x, ptrdiff_t x_stride, int rows, TraceSink* trace) {
  const ModelConfig& config = model_.config;
  const PackedLayer& weights = model_.layers[layer];
  const int n = config.n_routed_experts, k = config.num_experts_per_tok;
  Grow(scores_, size_t(rows) * n);
  Grow(experts_, size_t(rows) * k);
  Grow(weights_, size_t(rows) * k);
  gemm_.Run({.x = x, .stride = x_stride, .rows = rows, .k = config.hidden_size}, weights.router,
            scores_.data(), n);
  if (trace != nullptr) trace->Rows("router_logits", layer, scores_.data(), rows, n, n);
  pool_.For(rows, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      float* scores = scores_.data() + row * n;
      for (int i = 0; i < n; ++i) scores[i] = 1.0f / (1.0f + std::exp(-scores[i]));
      RouteToken(config, scores, weights.e_score_correction_bias.data(), experts_.data() + row * k,
                 weights_.data() + row * k);
    }
  });
  if (trace != nullptr) {
    trace->Rows("router_scores", layer, scores_.data(), rows, n, n);
    trace->Rows("experts", layer, experts_.data(), rows, k);
    trace->Rows("expert_weights", layer, weights_.data(), rows, k, k);
  }
}

// first_, places_ and gathered_ of the assignments that are for experts of this rank.
void Moe::GroupByExpert(const RoutedRows& routed, ptrdiff_t x_stride) {
  const int k = model_.config.num_experts_per_tok, hidden = model_.config.hidden_size;
  const int count = routed.rows * k;
  const ExpertRange here = model_.experts;
  for (int i = 0; i < count; ++i) {
    if (here.contains(routed.experts[i])) ++first_[routed.experts[i] + 1];
  }
  for (int e = 0; e < model_.config.n_routed_experts; ++e) first_[e + 1] += first_[e];
  Grow(places_, count);
  std::vector<int32_t> next(first_.begin(), first_.end() - 1);
  for (int i = 0; i < count; ++i) {
    places_[i] = here.contains(routed.experts[i]) ? next[routed.experts[i]]++ : -1;
  }
  Grow(gathered_, size_t(first_.back()) * x_stride);  // whose columns beyond hidden_size stay 0
  pool_.For(count, 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      if (places_[i] < 0) continue;
      std::memcpy(gathered_.data() + places_[i] * x_stride, routed.x + i / k * routed.x_stride,
                  sizeof(float) * hidden);
    }
  });
}

// out holds the shared experts' output. Transformers adds the routed ones first, from zero.
void Moe::AddOutputs(const ExpertOutputs& experts, int rows, float* out, ptrdiff_t out_stride) {
  const int hidden = model_.config.hidden_size, k = model_.config.num_experts_per_tok;
  const int64_t grain = std::max(1, 8192 / (hidden * k));
  pool_.For(rows, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* places = experts.places + row * k;
      // The first expert's output becomes the sum: every output is read by its token alone.
      float* sum = experts.outputs + size_t(places[0]) * hidden;
      kernels_.scale(sum, weights_[row * k], hidden, sum);
      for (int j = 1; j < k; ++j) {
        kernels_.add_scaled(sum, weights_[row * k + j],
                            experts.outputs + size_t(places[j]) * hidden, hidden);
      }
      kernels_.add(out + row * out_stride, sum, hidden);
    }
  });
}

}  // namespace latentd
