#include "engine/cpu/forward.h"

#include <algorithm>
#include <cmath>

#include "engine/cpu/quantize_row.h"
#include "engine/model/quantization.h"
#include "engine/status.h"

namespace latentd {
namespace {

ptrdiff_t Padded(int64_t k) { return (k + kRowPadding - 1) / kRowPadding * kRowPadding; }

// Tokens per task of a loop over rows of `columns` cheap elements.
int64_t RowGrain(int64_t columns) { return std::max<int64_t>(1, 8192 / columns); }

}  // namespace

Forward::Forward(const CpuModel& model, const Kernels& kernels, ThreadPool& pool,
                 LatentCache& cache, int32_t max_step_tokens)
    : model_(model),
      config_(model.config),
      kernels_(kernels),
      pool_(pool),
      cache_(cache),
      gemm_(kernels, pool),
      moe_(model, kernels, pool, gemm_),
      attention_(cache, model.config.num_attention_heads, kernels, pool),
      x_stride_(Padded(config_.hidden_size)),
      q_a_stride_(Padded(config_.q_lora_rank.value_or(0))),
      // The last head's product may read up to kRowPadding beyond its part: into zeros.
      q_stride_(Padded(config_.num_attention_heads * config_.qk_head_dim()) + kRowPadding),
      kv_a_stride_(Padded(config_.latent_dim())),
      attention_stride_(Padded(config_.num_attention_heads * config_.v_head_dim)) {
  const size_t tile = std::min<int32_t>(max_step_tokens, kTileTokens);
  const size_t heads = config_.num_attention_heads;
  hidden_.resize(size_t(max_step_tokens) * config_.hidden_size);
  x_.resize(tile * x_stride_);
  q_a_.resize(tile * q_a_stride_);
  q_.resize(tile * q_stride_);
  kv_a_.resize(tile * kv_a_stride_);
  latent_q_.resize(tile * heads * cache.dim());
  latent_out_.resize(tile * heads * cache.value_dim());
  attention_out_.resize(tile * attention_stride_);
  block_out_.resize(tile * config_.hidden_size);
  softmax_scale_ = 1.0f / std::sqrt(static_cast<float>(config_.qk_head_dim()));
  if (config_.yarn) softmax_scale_ *= config_.yarn->softmax_scale();
}

uint64_t Forward::NumBytes(const ModelConfig& c, int32_t max_step_tokens,
                           const Placement& placement) {
  const uint64_t tile = std::min<int32_t>(max_step_tokens, kTileTokens);
  const uint64_t heads = c.num_attention_heads;
  uint64_t floats = Padded(c.hidden_size) + Padded(c.q_lora_rank.value_or(0)) +
                    Padded(heads * c.qk_head_dim()) + Padded(c.latent_dim()) +
                    heads * (LatentCache::Dim(c) + LatentCache::ValueDim(c)) +
                    Padded(heads * c.v_head_dim) + c.hidden_size;
  // The MLPs: gathered input, gate and up, activation, output of each (token, expert); the largest
  // split input once more.
  const int64_t experts =
      std::min(c.num_experts_per_tok, placement.Experts(c.n_routed_experts).count);
  floats += uint64_t(experts) * placement.world_size *
            (Padded(c.hidden_size) + 3 * c.moe_intermediate_size + c.hidden_size);
  floats += 3 * uint64_t{static_cast<uint32_t>(
                    std::max(c.intermediate_size, c.n_shared_experts * c.moe_intermediate_size))};
  floats += 2 * heads * LatentCache::ValueDim(c);
  if (placement.world_size > 1) floats += ExpertExchange::NumFloats(c, placement);
  return sizeof(float) * (tile * floats + uint64_t(max_step_tokens) * c.hidden_size);
}

absl::Status Forward::Run(const StepPlan& plan, ExpertExchange* exchange, TraceSink* trace) {
  Embed(plan, trace);
  const int num_tokens = static_cast<int>(plan.tokens.size());
  const int most_tokens = exchange != nullptr ? plan.shape.num_tokens : num_tokens;
  for (int layer = 0; layer < config_.num_hidden_layers; ++layer) {
    for (int first = 0; first < most_tokens; first += kTileTokens) {
      if (exchange != nullptr) exchange->BeginTile(std::min(kTileTokens, most_tokens - first));
      const int begin = std::min(first, num_tokens);
      const int end = std::min(first + kTileTokens, num_tokens);
      RETURN_IF_ERROR(RunTile(plan, layer, begin, end, exchange, trace));
    }
  }
  return absl::OkStatus();
}

// hidden_ of every token, and where its rows of the cache are.
void Forward::Embed(const StepPlan& plan, TraceSink* trace) {
  const int num_tokens = static_cast<int>(plan.tokens.size());
  const int hidden = config_.hidden_size;
  tokens_.clear();
  const BlockId* blocks = plan.blocks.data();
  for (const SequenceStep& sequence : plan.sequences) {
    for (int i = 0; i < sequence.num_tokens; ++i) {
      const int32_t position = sequence.num_computed_tokens + i;
      float* block = cache_.block(0, blocks[position / kBlockSize]);
      tokens_.push_back({position, block + position % kBlockSize * cache_.dim()});
    }
    blocks += sequence.num_blocks;
  }
  TensorView row = model_.weights.embed_tokens;
  row.shape = {hidden};
  for (int i = 0; i < num_tokens; ++i) {
    row.data = model_.weights.embed_tokens.data +
               static_cast<size_t>(plan.tokens[i]) * hidden * DTypeBytes(row.dtype);
    ToFloat(row, hidden_.data() + size_t(i) * hidden);
  }
  if (trace != nullptr) trace->Rows("embed", -1, hidden_.data(), num_tokens, hidden, hidden);
}

absl::Status Forward::RunTile(const StepPlan& plan, int layer, int begin, int end,
                              ExpertExchange* exchange, TraceSink* trace) {
  const int rows = end - begin, hidden = config_.hidden_size;
  float* tile = hidden_.data() + size_t(begin) * hidden;
  if (rows > 0) {
    MakeSpans(plan, begin, end);
    AttentionLayer(layer, begin, end, trace);
    Normalize(tile, hidden, model_.layers[layer].post_attention_layernorm, config_.rms_norm_eps,
              rows, x_.data(), x_stride_);
  }
  RETURN_IF_ERROR(
      moe_.Run(layer, x_.data(), x_stride_, rows, block_out_.data(), hidden, exchange, trace));
  if (trace != nullptr) trace->Rows("mlp_out", layer, block_out_.data(), rows, hidden, hidden);
  kernels_.add(tile, block_out_.data(), rows * hidden);
  if (trace != nullptr) trace->Rows("out", layer, tile, rows, hidden, hidden);
  return absl::OkStatus();
}

void Forward::MakeSpans(const StepPlan& plan, int begin, int end) {
  spans_.clear();
  int first = 0;
  const BlockId* blocks = plan.blocks.data();
  for (const SequenceStep& sequence : plan.sequences) {
    const int from = std::max(first, begin), to = std::min(first + sequence.num_tokens, end);
    if (from < to) {
      spans_.push_back({.first_row = from - begin,
                        .num_rows = to - from,
                        .first_position = sequence.num_computed_tokens + from - first,
                        .blocks = blocks});
    }
    first += sequence.num_tokens;
    blocks += sequence.num_blocks;
  }
}

void Forward::AttentionLayer(int layer, int begin, int end, TraceSink* trace) {
  const PackedLayer& weights = model_.layers[layer];
  const int rows = end - begin, hidden = config_.hidden_size, heads = config_.num_attention_heads;
  float* tile = hidden_.data() + size_t(begin) * hidden;
  Normalize(tile, hidden, weights.input_layernorm, config_.rms_norm_eps, rows, x_.data(),
            x_stride_);
  ProjectQueriesAndKeys(weights, rows);
  if (trace != nullptr) {
    trace->Rows("q", layer, q_.data(), rows, heads * config_.qk_head_dim(), q_stride_);
  }
  FinishQueriesAndKeys(layer, begin, rows, trace);
  attention_.Run(layer, spans_, latent_q_.data(), latent_out_.data());

  // Each head's latent output times its W_UV.
  inputs_.clear();
  jobs_.clear();
  for (int head = 0; head < heads; ++head) {
    inputs_.push_back({.x = latent_out_.data() + head * cache_.value_dim(),
                       .stride = heads * cache_.value_dim(),
                       .rows = rows,
                       .k = config_.kv_lora_rank});
    jobs_.push_back({.input = head,
                     .matrix = &weights.w_uv[head],
                     .out = attention_out_.data() + head * config_.v_head_dim,
                     .out_stride = attention_stride_});
  }
  gemm_.Run(inputs_, jobs_);
  gemm_.Run({.x = attention_out_.data(),
             .stride = attention_stride_,
             .rows = rows,
             .k = heads * config_.v_head_dim},
            weights.o, block_out_.data(), hidden);
  if (trace != nullptr) trace->Rows("attn_out", layer, block_out_.data(), rows, hidden, hidden);
  kernels_.add(tile, block_out_.data(), rows * hidden);
}

// q_ [rows, heads, qk_head_dim] and kv_a_ [rows, latent_dim] from x_.
void Forward::ProjectQueriesAndKeys(const PackedLayer& weights, int rows) {
  const GemmInput x{.x = x_.data(), .stride = x_stride_, .rows = rows, .k = config_.hidden_size};
  const GemmJob kv{
      .input = 0, .matrix = &weights.kv_a, .out = kv_a_.data(), .out_stride = kv_a_stride_};
  if (!config_.q_lora_rank) {
    const GemmJob q{.input = 0, .matrix = &weights.q_b, .out = q_.data(), .out_stride = q_stride_};
    gemm_.Run({x}, {q, kv});
    return;
  }
  const GemmJob q_a{
      .input = 0, .matrix = &weights.q_a, .out = q_a_.data(), .out_stride = q_a_stride_};
  gemm_.Run({x}, {q_a, kv});
  Normalize(q_a_.data(), q_a_stride_, weights.q_a_layernorm, kLatentNormEps, rows, q_a_.data(),
            q_a_stride_);
  gemm_.Run({.x = q_a_.data(), .stride = q_a_stride_, .rows = rows, .k = *config_.q_lora_rank},
            weights.q_b, q_.data(), q_stride_);
}

// Writes the tokens' rows of the cache, and latent_q_: each head's nope part times W_UK, its rope
// part rotated, all times the softmax scale.
void Forward::FinishQueriesAndKeys(int layer, int begin, int rows, TraceSink* trace) {
  const PackedLayer& weights = model_.layers[layer];
  const int heads = config_.num_attention_heads, rank = config_.kv_lora_rank;
  const int nope = config_.qk_nope_head_dim, rope = config_.qk_rope_head_dim;
  const int dim = cache_.dim(), value_dim = cache_.value_dim();
  inputs_.clear();
  jobs_.clear();
  for (int head = 0; head < heads; ++head) {
    inputs_.push_back({.x = q_.data() + head * config_.qk_head_dim(),
                       .stride = q_stride_,
                       .rows = rows,
                       .k = nope});
    jobs_.push_back({.input = head,
                     .matrix = &weights.w_uk[head],
                     .out = latent_q_.data() + head * dim,
                     .out_stride = heads * dim});
  }
  gemm_.Run(inputs_, jobs_);
  const size_t layer_offset = cache_.block(layer, 0) - cache_.block(0, 0);
  pool_.For(rows, RowGrain(int64_t{heads} * dim), [&](int64_t from, int64_t to, int) {
    for (int64_t i = from; i < to; ++i) {
      const Token& token = tokens_[begin + i];
      float* key = token.cache_row + layer_offset;
      const float* kv = kv_a_.data() + i * kv_a_stride_;
      kernels_.rms_norm(kv, weights.kv_a_layernorm.data(), rank, kLatentNormEps, key);
      std::fill(key + rank, key + value_dim, 0.0f);
      model_.rope->Apply(kv + rank, token.position, key + value_dim);
      if (cache_.rounds_to_fp8()) QuantizeCacheRow(key, rank, key + value_dim, rope);
      std::fill(key + value_dim + rope, key + dim, 0.0f);
      for (int head = 0; head < heads; ++head) {
        float* query = latent_q_.data() + (i * heads + head) * dim;
        const float* q = q_.data() + i * q_stride_ + head * config_.qk_head_dim();
        std::fill(query + rank, query + value_dim, 0.0f);
        model_.rope->Apply(q + nope, token.position, query + value_dim);
        std::fill(query + value_dim + rope, query + dim, 0.0f);
        kernels_.scale(query, softmax_scale_, dim, query);
      }
    }
  });
  if (trace != nullptr) {
    for (int i = 0; i < rows; ++i) {
      const float* key = tokens_[begin + i].cache_row + layer_offset;
      trace->Rows("c_kv", layer, key, 1, rank, dim);
      trace->Rows("k_pe", layer, key + value_dim, 1, rope, dim);
    }
  }
}

void Forward::Normalize(const float* x, ptrdiff_t x_stride, const std::vector<float>& weight,
                        float eps, int rows, float* out, ptrdiff_t out_stride) {
  const int n = static_cast<int>(weight.size());
  pool_.For(rows, RowGrain(n), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      kernels_.rms_norm(x + i * x_stride, weight.data(), n, eps, out + i * out_stride);
    }
  });
}

void Forward::Logits(absl::Span<const int32_t> rows, float* out, TraceSink* trace) {
  const int num_rows = static_cast<int>(rows.size());
  if (last_.size() < size_t(num_rows) * x_stride_) last_.resize(size_t(num_rows) * x_stride_);
  for (int i = 0; i < num_rows; ++i) {
    kernels_.rms_norm(hidden_.data() + size_t(rows[i]) * config_.hidden_size, model_.norm.data(),
                      config_.hidden_size, config_.rms_norm_eps, last_.data() + i * x_stride_);
  }
  if (trace != nullptr) {
    trace->Rows("final_hidden", -1, last_.data(), num_rows, config_.hidden_size, x_stride_);
  }
  gemm_.Run({.x = last_.data(), .stride = x_stride_, .rows = num_rows, .k = config_.hidden_size},
            model_.lm_head, out, config_.vocab_size);
  if (trace != nullptr) {
    trace->Rows("logits", -1, out, num_rows, config_.vocab_size, config_.vocab_size);
  }
}

}  // namespace latentd
