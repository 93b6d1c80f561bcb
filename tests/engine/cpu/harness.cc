#include "tests/engine/cpu/harness.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "absl/strings/str_cat.h"

namespace latentd {
namespace {

template <typename T>
T OrDie(absl::StatusOr<T> result) {
  if (!result.ok()) {
    std::fprintf(stderr, "%s\n", result.status().ToString().c_str());
    std::exit(1);
  }
  return *std::move(result);
}

void OrDie(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

std::string FullName(std::string_view name, int layer) {
  const std::string text(name);
  return layer < 0 ? text : absl::StrCat("layer", layer, "_", text);
}

const TensorView& FindOrDie(const Checkpoint& golden, const std::string& name, DType dtype) {
  const TensorView* tensor = golden.Find(name);
  if (tensor == nullptr || tensor->dtype != dtype) {
    std::fprintf(stderr, "golden tensor %s is missing or of another type\n", name.c_str());
    std::exit(1);
  }
  return *tensor;
}

template <typename T>
std::vector<T> Copy(const TensorView& tensor) {
  std::vector<T> values(tensor.num_elements());
  std::memcpy(values.data(), tensor.data, tensor.num_bytes());
  return values;
}

}  // namespace

LoadedModel LoadModel(const std::filesystem::path& dir, LoadFormat format) {
  LoadedModel model;
  model.config = OrDie(LoadModelConfig(dir));
  model.weights = OrDie(LoadWeights(model.config, dir, format, nullptr));
  return model;
}

std::unique_ptr<Checkpoint> OpenGolden(const std::filesystem::path& file) {
  return OrDie(Checkpoint::OpenFile(file));
}
std::vector<float> GoldenFloats(const Checkpoint& golden, const std::string& name) {
  return Copy<float>(FindOrDie(golden, name, DType::kF32));
}
std::vector<int32_t> GoldenInts(const Checkpoint& golden, const std::string& name) {
  return Copy<int32_t>(FindOrDie(golden, name, DType::kI32));
}

std::vector<TokenId> SomeTokens(int count, int vocab_size, uint32_t seed) {
  std::vector<TokenId> tokens(count);
  for (TokenId& token : tokens) {
    seed = seed * 1664525u + 1013904223u;
    token = static_cast<TokenId>((seed >> 8) % vocab_size);
  }
  return tokens;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void TraceRecorder::Rows(std::string_view name, int layer, const float* data, int rows, int columns,
                         ptrdiff_t stride) {
  std::vector<float>& all = floats[FullName(name, layer)];
  for (int i = 0; i < rows; ++i)
    all.insert(all.end(), data + i * stride, data + i * stride + columns);
}

void TraceRecorder::Rows(std::string_view name, int layer, const int32_t* data, int rows,
                         int columns) {
  std::vector<int32_t>& all = ints[FullName(name, layer)];
  all.insert(all.end(), data, data + rows * columns);
}

Runner::Runner(const LoadedModel& model, const RunnerOptions& options)
    : pool_(std::make_unique<ThreadPool>(options.num_threads)),
      model_(OrDie(CpuModel::Build(
          model.config, model.weights,
          options.max_positions > 0 ? options.max_positions : model.config.max_position_embeddings,
          *pool_, options.quantize_activations, options.placement))),
      cache_(
          std::make_unique<LatentCache>(model.config, options.num_blocks, options.quantize_cache)),
      forward_(std::make_unique<Forward>(*model_, *options.kernels, *pool_, *cache_,
                                         options.max_step_tokens)),
      max_step_tokens_(options.max_step_tokens) {
  // A read of a row that no token has written cannot go unnoticed.
  std::fill_n(cache_->block(0, 0), cache_->num_floats(), NAN);
}

StepPlan Runner::MakePlan(const std::vector<Part>& parts) {
  StepPlan plan;
  for (const Part& part : parts) {
    SequenceStep& s = plan.sequences.emplace_back();
    s.id = plan.sequences.size();
    s.num_computed_tokens = part.num_computed;
    s.num_tokens = static_cast<int32_t>(part.tokens.size());
    s.num_blocks = (s.num_computed_tokens + s.num_tokens + kBlockSize - 1) / kBlockSize;
    plan.tokens.insert(plan.tokens.end(), part.tokens.begin(), part.tokens.end());
    plan.blocks.insert(plan.blocks.end(), part.blocks.begin(), part.blocks.begin() + s.num_blocks);
  }
  return plan;
}

std::vector<float> Runner::Step(const std::vector<Part>& parts, TraceSink* trace) {
  const StepPlan plan = MakePlan(parts);
  OrDie(forward_->Run(plan, nullptr, trace));
  std::vector<int32_t> rows(plan.tokens.size());
  std::iota(rows.begin(), rows.end(), 0);
  std::vector<float> logits(rows.size() * config().vocab_size);
  forward_->Logits(rows, logits.data(), trace);
  return logits;
}

std::vector<float> Runner::Prefill(const std::vector<TokenId>& tokens, int chunk, int num_rows,
                                   BlockId first_block) {
  const int length = static_cast<int>(tokens.size());
  const int first_row = num_rows == 0 ? 0 : std::max(0, length - num_rows);
  std::vector<float> logits;
  for (int begin = 0; begin < length; begin += chunk) {
    const int end = std::min(begin + chunk, length);
    OrDie(forward_->Run(MakePlan({{.tokens = {tokens.begin() + begin, tokens.begin() + end},
                                   .num_computed = begin,
                                   .blocks = ConsecutiveBlocks(length, first_block)}})));
    if (end <= first_row) continue;
    std::vector<int32_t> rows(end - std::max(begin, first_row));
    std::iota(rows.begin(), rows.end(), std::max(begin, first_row) - begin);
    const size_t at = logits.size();
    logits.resize(at + rows.size() * config().vocab_size);
    forward_->Logits(rows, logits.data() + at);
  }
  return logits;
}

std::vector<TokenId> Runner::Greedy(const std::vector<TokenId>& prompt, int count, TokenId eos) {
  std::vector<TokenId> answer;
  std::vector<float> logits = Prefill(prompt, max_step_tokens_, 1);
  const int length = static_cast<int>(prompt.size());
  while (true) {
    answer.push_back(
        static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
    if (static_cast<int>(answer.size()) == count || answer.back() == eos) return answer;
    logits = Step({{.tokens = {answer.back()},
                    .num_computed = length + static_cast<int>(answer.size()) - 1,
                    .blocks = ConsecutiveBlocks(length + count)}});
  }
}

std::vector<BlockId> ConsecutiveBlocks(int num_tokens, BlockId first) {
  std::vector<BlockId> blocks((num_tokens + kBlockSize - 1) / kBlockSize);
  std::iota(blocks.begin(), blocks.end(), first);
  return blocks;
}

}  // namespace latentd
