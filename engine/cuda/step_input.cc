#include "engine/cuda/step_input.h"

#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/cuda/cuda_status.h"
#include "engine/status.h"

namespace latentd {
namespace {

StepArrays Carve(const StepShape& shape, size_t plan_words, Carver& carver) {
  StepArrays a;
  a.num_real_tokens = carver.Take<int32_t>(shape.pieces());
  a.tokens = carver.Take<int32_t>(shape.rows);
  a.positions = carver.Take<int32_t>(shape.rows);
  a.slots = carver.Take<int64_t>(shape.rows);
  a.block_begin = carver.Take<int32_t>(shape.sequences);
  a.sample_rows = carver.Take<int32_t>(shape.samples());
  a.samples = carver.Take<SampleRow>(shape.samples());
  a.decode_plan = carver.Take<int32_t>(plan_words);
  a.ids = carver.Take<int32_t>(0);
  return a;
}

// Room for any step.
size_t Bytes(const StepLimits& limits, size_t plan_words) {
  StepShape largest;
  largest.rows = limits.max_tokens;
  largest.sequences = limits.max_sequences;
  largest.piece_samples.assign(limits.max_tokens / kRowTile + 2, 0);
  largest.piece_samples.back() = limits.max_sequences;
  Carver carver(nullptr);
  Carve(largest, plan_words, carver);
  carver.Take<int32_t>(size_t{1} * limits.max_blocks + limits.max_suppressed);
  return carver.used();
}

// Tokens of the pieces that `rows` rows are cut into: as even as whole tiles allow.
int PieceTokens(int rows, int most) {
  const int pieces = (rows + most - 1) / most;
  if (pieces <= 1) return rows;
  return ((rows + pieces - 1) / pieces + kRowTile - 1) / kRowTile * kRowTile;
}

}  // namespace

StepShape StepShape::Decode(int sequences, int most_tokens) {
  StepShape shape;
  shape.rows = shape.absorbed_rows = shape.sequences = shape.exchange_rows = sequences;
  shape.piece_tokens = PieceTokens(sequences, most_tokens);
  for (int end = 0; end < sequences;) {
    end = std::min(end + shape.piece_tokens, sequences);
    shape.piece_samples.push_back(end);
  }
  return shape;
}

StepInput::StepInput(const StepLimits& limits, const MlaDecodePlanner::Options& planner)
    : limits_(limits), planner_(planner) {}

absl::StatusOr<std::unique_ptr<StepInput>> StepInput::Create(
    const StepLimits& limits, const MlaDecodePlanner::Options& planner) {
  std::unique_ptr<StepInput> input(new StepInput(limits, planner));
  const size_t bytes = Bytes(limits, input->planner_.plan_capacity());
  ASSIGN_OR_RETURN(input->pinned_, PinnedMemory::Allocate(bytes));
  ASSIGN_OR_RETURN(input->device_, DeviceMemory::Allocate(bytes));
  return input;
}

size_t StepInput::DeviceBytes(const StepLimits& limits, const MlaDecodePlanner::Options& planner) {
  return Bytes(limits, MlaDecodePlanner(planner).plan_capacity());
}

StepArrays StepInput::Arrays(const StepShape& shape, std::byte* data) const {
  Carver carver(data);
  return Carve(shape, planner_.plan_capacity(), carver);
}

StepArrays StepInput::device(const StepShape& shape) const { return Arrays(shape, device_.data()); }

void StepInput::Begin(const StepShape& shape) {
  shape_ = shape;
  host_ = Arrays(shape_, pinned_.data());
  decode_sequences_.clear();
  prefill_sequences_.clear();
  plan_rows_.clear();
  plan_samples_.clear();
  sampled_.clear();
  num_tokens_ = 0;
  num_ids_ = 0;
}

absl::Status StepInput::Stage(const StepPlan& plan, int graph_rows) {
  if (plan.suppressed.size() > static_cast<size_t>(limits_.max_suppressed)) {
    return absl::InvalidArgumentError(absl::StrCat("plan: suppressed has ", plan.suppressed.size(),
                                                   " elements; the limit is ",
                                                   limits_.max_suppressed));
  }
  if (plan.blocks.size() > static_cast<size_t>(limits_.max_blocks)) {
    return absl::InvalidArgumentError(absl::StrCat("plan: blocks has ", plan.blocks.size(),
                                                   " elements; the limit is ", limits_.max_blocks));
  }
  Order(plan);
  Begin(ShapeOf(plan, graph_rows));
  for (const Item& item : absorbed_) WriteSequence(plan, item, /*absorbed=*/true);
  for (const Item& item : prefill_) WriteSequence(plan, item, /*absorbed=*/false);
  WriteSuppressed(plan);
  Finish();
  return absl::OkStatus();
}

void StepInput::StageNothing(int graph_rows) {
  Begin(Decode(graph_rows));
  Finish();
}

// One token always has room among the absorbed rows. Results of other sequences may not decide how
// a longer chunk is computed when the batch shall change nothing.
void StepInput::Order(const StepPlan& plan) {
  absorbed_.clear();
  prefill_.clear();
  int32_t room = limits_.max_absorbed;
  for (const SequenceStep& s : plan.sequences) room -= s.num_tokens == 1;
  Item item;
  for (const SequenceStep& s : plan.sequences) {
    item.sequence = &s;
    const bool short_chunk =
        s.num_tokens <= room && !limits_.batch_invariant &&
        PreferAbsorbed(s.num_tokens, int64_t{s.num_computed_tokens} + s.num_tokens);
    if (s.num_tokens == 1 || short_chunk) {
      if (s.num_tokens > 1) room -= s.num_tokens;
      absorbed_.push_back(item);
    } else {
      prefill_.push_back(item);
    }
    item.first_token += s.num_tokens;
    item.first_block += s.num_blocks;
    item.first_suppressed += s.num_suppressed;
    item.sample += s.sample;
  }
}

StepShape StepInput::ShapeOf(const StepPlan& plan, int graph_rows) const {
  if (graph_rows > 0) return Decode(graph_rows);
  StepShape shape;
  shape.rows = static_cast<int>(plan.tokens.size());
  shape.sequences = static_cast<int>(absorbed_.size());
  shape.exchange_rows = limits_.in_group ? plan.shape.num_tokens : shape.rows;
  shape.piece_tokens = PieceTokens(shape.exchange_rows, limits_.piece_tokens);
  const int pieces = (shape.exchange_rows + shape.piece_tokens - 1) / shape.piece_tokens;
  shape.piece_samples.assign(pieces + 1, 0);
  int end = 0;
  const auto count = [&](const Item& item) {
    end += item.sequence->num_tokens;
    if (item.sequence->sample) ++shape.piece_samples[(end - 1) / shape.piece_tokens + 1];
  };
  for (const Item& item : absorbed_) count(item);
  shape.absorbed_rows = end;
  for (const Item& item : prefill_) count(item);
  for (int i = 0; i < pieces; ++i) shape.piece_samples[i + 1] += shape.piece_samples[i];
  return shape;
}

void StepInput::WriteSequence(const StepPlan& plan, const Item& item, bool absorbed) {
  const SequenceStep& s = *item.sequence;
  const int32_t* blocks = plan.blocks.data() + item.first_block;
  const int32_t keys = s.num_computed_tokens + s.num_tokens;
  if (absorbed) {
    host_.block_begin[decode_sequences_.size()] = num_ids_;
    decode_sequences_.push_back({.num_queries = s.num_tokens, .num_keys = keys});
  } else {
    prefill_sequences_.push_back(
        {.num_queries = s.num_tokens, .num_keys = keys, .block_begin = num_ids_});
  }
  std::copy_n(blocks, s.num_blocks, host_.ids + num_ids_);
  num_ids_ += s.num_blocks;
  for (int32_t i = 0; i < s.num_tokens; ++i, ++num_tokens_) {
    const int32_t position = s.num_computed_tokens + i;
    host_.tokens[num_tokens_] = plan.tokens[item.first_token + i];
    host_.positions[num_tokens_] = position;
    host_.slots[num_tokens_] =
        int64_t{blocks[position / kBlockSize]} * kBlockSize + position % kBlockSize;
    plan_rows_.push_back(item.first_token + i);
  }
  if (s.sample) WriteSample(item, static_cast<int>(num_tokens_) - 1);
}

void StepInput::WriteSample(const Item& item, int row) {
  const SequenceStep& s = *item.sequence;
  const size_t i = plan_samples_.size();
  host_.sample_rows[i] = row % shape_.piece_tokens;
  host_.samples[i] = {.seed = s.sampling.seed,
                      .position = int64_t{s.num_computed_tokens} + s.num_tokens,
                      .temperature = s.sampling.temperature,
                      .top_p = s.sampling.top_p,
                      .min_p = s.sampling.min_p,
                      .top_k = s.sampling.top_k,
                      .sample_index = s.sampling.sample_index};
  plan_samples_.push_back(item.sample);
  sampled_.push_back(item);
}

void StepInput::WriteSuppressed(const StepPlan& plan) {
  for (size_t i = 0; i < sampled_.size(); ++i) {
    const int32_t count = sampled_[i].sequence->num_suppressed;
    std::copy_n(plan.suppressed.data() + sampled_[i].first_suppressed, count, host_.ids + num_ids_);
    host_.samples[i].suppressed_begin = num_ids_;
    num_ids_ += count;
    host_.samples[i].suppressed_end = num_ids_;
  }
}

// The padding: token 0 at position 0 of nobody, drawn greedily and thrown away.
void StepInput::Finish() {
  const int real = static_cast<int>(num_tokens_);
  for (int piece = 0; piece < shape_.pieces(); ++piece) {
    host_.num_real_tokens[piece] =
        std::clamp(real - piece * shape_.piece_tokens, 0, shape_.piece_tokens);
  }
  for (int row = real; row < shape_.rows; ++row) {
    host_.tokens[row] = 0;
    host_.positions[row] = 0;
    host_.slots[row] = -1;
  }
  for (int i = static_cast<int>(decode_sequences_.size()); i < shape_.sequences; ++i)
    host_.block_begin[i] = 0;
  for (int i = static_cast<int>(plan_samples_.size()); i < shape_.samples(); ++i) {
    host_.sample_rows[i] = i % shape_.piece_tokens;
    host_.samples[i] = {};
  }
  planner_.Plan(decode_sequences_, &decode_plan_);
  std::copy(decode_plan_.begin(), decode_plan_.end(), host_.decode_plan);
}

absl::Status StepInput::Upload(cudaStream_t stream) {
  const auto* end = reinterpret_cast<const std::byte*>(host_.ids + num_ids_);
  RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(device_.data(), pinned_.data(), end - pinned_.data(),
                                       cudaMemcpyHostToDevice, stream));
  return absl::OkStatus();
}

}  // namespace latentd
