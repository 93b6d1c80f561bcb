#include "server/cluster/plan_codec.h"

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "absl/strings/str_cat.h"

namespace latentd {
namespace {

static_assert(std::endian::native == std::endian::little);

constexpr uint32_t kPlanTag = 0x01504c01;    // version, 'L', 'P', version
constexpr uint32_t kResultTag = 0x01524c01;  // version, 'L', 'R', version

// The structures have no padding: every byte of a message is a value's.
struct PlanHead {
  uint32_t tag;
  uint32_t decode;  // 0 or 1
  int64_t step;
  int32_t shape_tokens;
  int32_t shape_sequences;
  uint32_t num_sequences;
  uint32_t num_tokens;
  uint32_t num_blocks;
  uint32_t num_suppressed;
};
static_assert(sizeof(PlanHead) == 40 && std::has_unique_object_representations_v<PlanHead>);

struct PlanSequence {
  uint64_t id;
  uint64_t seed;
  int32_t dp_rank;
  int32_t num_computed_tokens;
  int32_t num_tokens;
  int32_t num_blocks;
  int32_t num_suppressed;
  int32_t sample_index;
  float temperature;
  float top_p;
  int32_t top_k;
  float min_p;
  uint32_t sample;  // 0 or 1
  uint32_t zero;    // fills the 64 bytes
};
static_assert(sizeof(PlanSequence) == 64);

struct ResultHead {
  uint32_t tag;
  uint32_t has_device;  // 0 or 1; then DeviceTimes follow the tokens
  uint32_t num_sampled;
  uint32_t zero;
};
static_assert(sizeof(ResultHead) == 16 && std::has_unique_object_representations_v<ResultHead>);
static_assert(sizeof(DeviceTimes) == 16);

template <typename T>
char* Put(const T* values, size_t count, char* out) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (count > 0) std::memcpy(out, values, count * sizeof(T));
  return out + count * sizeof(T);
}

// REQUIRES: `in` has so many bytes; the sizes are checked before.
template <typename T>
const char* Take(const char* in, size_t count, T* values) {
  static_assert(std::is_trivially_copyable_v<T>);
  if (count > 0) std::memcpy(values, in, count * sizeof(T));
  return in + count * sizeof(T);
}

template <typename T>
const char* Take(const char* in, size_t count, std::vector<T>* values) {
  values->resize(count);
  return Take(in, count, values->data());
}

template <typename... Parts>
absl::Status Bad(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

PlanSequence ToWire(const SequenceStep& from) {
  return {.id = from.id,
          .seed = from.sampling.seed,
          .dp_rank = from.dp_rank,
          .num_computed_tokens = from.num_computed_tokens,
          .num_tokens = from.num_tokens,
          .num_blocks = from.num_blocks,
          .num_suppressed = from.num_suppressed,
          .sample_index = from.sampling.sample_index,
          .temperature = from.sampling.temperature,
          .top_p = from.sampling.top_p,
          .top_k = from.sampling.top_k,
          .min_p = from.sampling.min_p,
          .sample = from.sample,
          .zero = 0};
}

SequenceStep FromWire(const PlanSequence& from) {
  return {.id = from.id,
          .dp_rank = from.dp_rank,
          .num_computed_tokens = from.num_computed_tokens,
          .num_tokens = from.num_tokens,
          .num_blocks = from.num_blocks,
          .num_suppressed = from.num_suppressed,
          .sample = from.sample == 1,
          .sampling = {.temperature = from.temperature,
                       .top_p = from.top_p,
                       .top_k = from.top_k,
                       .min_p = from.min_p,
                       .seed = from.seed,
                       .sample_index = from.sample_index}};
}

// Takes the sequences and holds their sums against the lengths of the arrays.
absl::Status TakeSequences(const PlanHead& head, const char** in, StepPlan* plan) {
  uint64_t num_tokens = 0, num_blocks = 0, num_suppressed = 0;
  plan->sequences.resize(head.num_sequences);
  for (uint32_t i = 0; i < head.num_sequences; ++i) {
    PlanSequence wire;
    *in = Take(*in, 1, &wire);
    if (wire.num_tokens < 0 || wire.num_blocks < 0 || wire.num_suppressed < 0 || wire.sample > 1 ||
        wire.zero != 0) {
      return Bad("sequence ", i, " of the plan: num_tokens is ", wire.num_tokens, ", num_blocks ",
                 wire.num_blocks, ", num_suppressed ", wire.num_suppressed, ", sample ",
                 wire.sample, ", fill ", wire.zero);
    }
    num_tokens += wire.num_tokens;
    num_blocks += wire.num_blocks;
    num_suppressed += wire.num_suppressed;
    plan->sequences[i] = FromWire(wire);
  }
  if (num_tokens != head.num_tokens || num_blocks != head.num_blocks ||
      num_suppressed != head.num_suppressed) {
    return Bad("the plan has ", head.num_tokens, " tokens, ", head.num_blocks, " blocks and ",
               head.num_suppressed, " suppressed tokens; its sequences have ", num_tokens, ", ",
               num_blocks, " and ", num_suppressed);
  }
  return absl::OkStatus();
}

}  // namespace

size_t EncodedPlanSize(const StepPlan& plan) {
  return sizeof(PlanHead) + plan.sequences.size() * sizeof(PlanSequence) +
         plan.tokens.size() * sizeof(TokenId) + plan.blocks.size() * sizeof(BlockId) +
         plan.suppressed.size() * sizeof(TokenId);
}

void EncodePlan(const StepPlan& plan, char* out) {
  const PlanHead head = {.tag = kPlanTag,
                         .decode = plan.shape.decode,
                         .step = plan.step,
                         .shape_tokens = plan.shape.num_tokens,
                         .shape_sequences = plan.shape.num_sequences,
                         .num_sequences = static_cast<uint32_t>(plan.sequences.size()),
                         .num_tokens = static_cast<uint32_t>(plan.tokens.size()),
                         .num_blocks = static_cast<uint32_t>(plan.blocks.size()),
                         .num_suppressed = static_cast<uint32_t>(plan.suppressed.size())};
  out = Put(&head, 1, out);
  for (const SequenceStep& sequence : plan.sequences) {
    const PlanSequence wire = ToWire(sequence);
    out = Put(&wire, 1, out);
  }
  out = Put(plan.tokens.data(), plan.tokens.size(), out);
  out = Put(plan.blocks.data(), plan.blocks.size(), out);
  Put(plan.suppressed.data(), plan.suppressed.size(), out);
}

absl::Status DecodePlan(std::string_view bytes, StepPlan* plan) {
  PlanHead head;
  if (bytes.size() < sizeof(head)) return Bad("the plan has ", bytes.size(), " bytes");
  const char* in = Take(bytes.data(), 1, &head);
  if (head.tag != kPlanTag || head.decode > 1) {
    return Bad("the plan begins with ", absl::Hex(head.tag), ", ", head.decode);
  }
  // No sum of four 32-bit counts of at most 64 bytes each overflows.
  const uint64_t size = sizeof(head) + uint64_t{head.num_sequences} * sizeof(PlanSequence) +
                        (uint64_t{head.num_tokens} + head.num_blocks + head.num_suppressed) * 4;
  if (bytes.size() != size) {
    return Bad("the plan has ", bytes.size(), " bytes; ", size, " by its own count");
  }
  plan->step = head.step;
  plan->shape = {.num_tokens = head.shape_tokens,
                 .num_sequences = head.shape_sequences,
                 .decode = head.decode == 1};
  if (absl::Status status = TakeSequences(head, &in, plan); !status.ok()) return status;
  in = Take(in, head.num_tokens, &plan->tokens);
  in = Take(in, head.num_blocks, &plan->blocks);
  Take(in, head.num_suppressed, &plan->suppressed);
  return absl::OkStatus();
}

size_t EncodedResultSize(const StepResult& result) {
  return sizeof(ResultHead) + result.sampled.size() * sizeof(TokenId) +
         (result.device ? sizeof(DeviceTimes) : 0);
}

void EncodeResult(const StepResult& result, char* out) {
  const ResultHead head = {.tag = kResultTag,
                           .has_device = result.device.has_value(),
                           .num_sampled = static_cast<uint32_t>(result.sampled.size()),
                           .zero = 0};
  out = Put(&head, 1, out);
  out = Put(result.sampled.data(), result.sampled.size(), out);
  if (result.device) Put(&*result.device, 1, out);
}

absl::Status DecodeResult(std::string_view bytes, StepResult* result) {
  ResultHead head;
  if (bytes.size() < sizeof(head)) return Bad("the result has ", bytes.size(), " bytes");
  const char* in = Take(bytes.data(), 1, &head);
  if (head.tag != kResultTag || head.has_device > 1 || head.zero != 0) {
    return Bad("the result begins with ", absl::Hex(head.tag), ", ", head.has_device, ", ",
               head.zero);
  }
  const uint64_t size = sizeof(head) + uint64_t{head.num_sampled} * sizeof(TokenId) +
                        head.has_device * sizeof(DeviceTimes);
  if (bytes.size() != size) {
    return Bad("the result has ", bytes.size(), " bytes; ", size, " by its own count");
  }
  in = Take(in, head.num_sampled, &result->sampled);
  result->device.reset();
  if (head.has_device == 1) {
    DeviceTimes times;
    Take(in, 1, &times);
    result->device = times;
  }
  return absl::OkStatus();
}

}  // namespace latentd
