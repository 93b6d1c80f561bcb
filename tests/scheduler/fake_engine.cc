#include "tests/scheduler/fake_engine.h"

#include <algorithm>
#include <bit>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr uint64_t kFirst = 0x9e3779b97f4a7c15;  // the KV "before" the first token

uint64_t Mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0xff51afd7ed558ccd;
  hash ^= hash >> 32;
  hash *= 0xc4ceb9fe1a85ec53;
  return hash ^ (hash >> 29);
}

uint64_t NextKv(uint64_t previous, TokenId token) { return Mix(previous, token + 1); }

// A number in [0, 1) of the upper 53 bits.
double Uniform(uint64_t hash) { return static_cast<double>(hash >> 11) * 0x1p-53; }

template <typename... Parts>
absl::Status Breach(const SequenceStep& step, const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat("plan, sequence ", step.id, ": ", parts...));
}

}  // namespace

FakeEngine::FakeEngine(const FakeEngineOptions& options)
    : options_(options), random_(options.failure_seed) {
  if (options_.zero_compute) return;
  cache_.resize(options_.info.num_dp_ranks);
  for (auto& cache : cache_) {
    cache.resize(static_cast<size_t>(options_.info.num_blocks) * options_.block_size);
  }
  RuinCache();
}

absl::StatusOr<StepResult> FakeEngine::Execute(const StepPlan& plan) {
  const absl::Time start = absl::Now();
  ++num_steps_;
  if (lost_) return absl::UnavailableError("injected loss");
  if (!is_there_ || num_unready_looks_ > 0) return absl::AbortedError("a rank is missing");
  RETURN_IF_ERROR(CheckPlan(plan));
  StepResult result;
  Offsets at;
  for (const SequenceStep& step : plan.sequences) {
    const int32_t position = step.num_computed_tokens + step.num_tokens;
    const uint64_t context = options_.zero_compute
                                 ? NextKv(kFirst, plan.tokens[at.token + step.num_tokens - 1])
                                 : Compute(step, plan, at);
    if (step.sample) {
      result.sampled.push_back(
          Draw(context, position, step.sampling,
               absl::MakeConstSpan(plan.suppressed).subspan(at.suppressed, step.num_suppressed)));
    }
    at.token += step.num_tokens;
    at.block += step.num_blocks;
    at.suppressed += step.num_suppressed;
  }
  if (options_.step_delay > absl::ZeroDuration()) {
    absl::SleepFor(options_.step_delay - (absl::Now() - start));
  }
  if (Happens(&num_steps_to_fail_, options_.failure_probability)) {
    RuinCache();
    return absl::UnavailableError("injected failure");
  }
  if (Happens(&num_steps_to_abort_, options_.abort_probability)) {
    RuinCache();
    num_unready_looks_ = static_cast<int>(random_() % (options_.max_unready_looks + 1));
    return absl::AbortedError("injected loss of a rank");
  }
  return result;
}

bool FakeEngine::ready() const {
  if (num_unready_looks_ == 0) return is_there_;
  --num_unready_looks_;
  return false;
}

// Fills the slots of the step and returns the hash of all the sequence's KV.
uint64_t FakeEngine::Compute(const SequenceStep& step, const StepPlan& plan, Offsets at) {
  const auto kv = [&](int32_t position) -> uint64_t& {
    const int64_t block = plan.blocks[at.block + position / options_.block_size];
    return cache_[step.dp_rank][block * options_.block_size + position % options_.block_size];
  };
  const int32_t end = step.num_computed_tokens + step.num_tokens;
  for (int32_t i = step.num_computed_tokens; i < end; ++i) {
    const TokenId token = plan.tokens[at.token + i - step.num_computed_tokens];
    kv(i) = NextKv(i == 0 ? kFirst : kv(i - 1), token);
  }
  uint64_t context = kFirst;
  if (step.sample) {
    for (int32_t i = 0; i < end; ++i) context = Mix(context, kv(i));
  }
  return context;
}

TokenId FakeEngine::Draw(uint64_t context, int32_t position, const SamplingParams& sampling,
                         absl::Span<const TokenId> suppressed) const {
  uint64_t hash = Mix(Mix(context, position), sampling.seed);
  hash = Mix(hash, sampling.sample_index);
  for (const float value : {sampling.temperature, sampling.top_p, sampling.min_p}) {
    hash = Mix(hash, std::bit_cast<uint32_t>(value));
  }
  hash = Mix(hash, sampling.top_k);
  const auto is_suppressed = [&](TokenId token) {
    return std::find(suppressed.begin(), suppressed.end(), token) != suppressed.end();
  };
  if (Uniform(hash) < options_.eos_probability && !is_suppressed(options_.eos_token_id)) {
    return options_.eos_token_id;
  }
  TokenId token = static_cast<TokenId>(Mix(hash, 1) % options_.info.vocab_size);
  // The next one that may be drawn; the end token only as its probability says, above.
  for (int32_t i = 0; i < options_.info.vocab_size; ++i) {
    const bool is_eos = options_.eos_probability > 0 && token == options_.eos_token_id;
    if (!is_eos && !is_suppressed(token)) break;
    token = (token + 1) % options_.info.vocab_size;
  }
  return token;
}

std::vector<TokenId> FakeEngine::Expected(const Request& request) const {
  std::vector<TokenId> drawn;
  uint64_t kv = kFirst;
  uint64_t context = kFirst;
  int32_t position = 0;
  const auto read = [&](TokenId token) {
    ++position;
    kv = NextKv(options_.zero_compute ? kFirst : kv, token);
    context = options_.zero_compute ? kv : Mix(context, kv);
  };
  for (const TokenId token : request.prompt) read(token);
  while (static_cast<int32_t>(drawn.size()) < request.max_new_tokens) {
    const bool suppress = static_cast<int32_t>(drawn.size()) < request.min_new_tokens;
    const absl::Span<const TokenId> stops = request.stop_token_ids;
    const TokenId token =
        Draw(context, position, request.sampling, suppress ? stops : absl::Span<const TokenId>());
    drawn.push_back(token);
    if (std::find(stops.begin(), stops.end(), token) != stops.end()) break;
    read(token);
  }
  return drawn;
}

absl::Status FakeEngine::CheckPlan(const StepPlan& plan) const {
  if (plan.empty()) return absl::InvalidArgumentError("plan has no sequences");
  const EngineInfo& info = options_.info;
  std::vector<int32_t> num_sequences(info.num_dp_ranks), num_tokens(info.num_dp_ranks);
  Offsets at;
  for (const SequenceStep& step : plan.sequences) {
    RETURN_IF_ERROR(CheckSequence(step, plan, at));
    if (++num_sequences[step.dp_rank] > info.max_sequences) {
      return Breach(step, "is one more than the ", info.max_sequences, " that rank ", step.dp_rank,
                    " takes");
    }
    num_tokens[step.dp_rank] += step.num_tokens;
    if (num_tokens[step.dp_rank] > info.max_step_tokens) {
      return Breach(step, "makes ", num_tokens[step.dp_rank], " tokens on rank ", step.dp_rank,
                    "; the limit is ", info.max_step_tokens);
    }
    at.token += step.num_tokens;
    at.block += step.num_blocks;
    at.suppressed += step.num_suppressed;
  }
  if (at.token != plan.tokens.size() || at.block != plan.blocks.size() ||
      at.suppressed != plan.suppressed.size()) {
    return absl::InvalidArgumentError("plan has longer arrays than its sequences say");
  }
  return options_.zero_compute ? absl::OkStatus() : CheckAliasing(plan);
}

absl::Status FakeEngine::CheckSequence(const SequenceStep& step, const StepPlan& plan,
                                       Offsets at) const {
  const EngineInfo& info = options_.info;
  if (step.dp_rank < 0 || step.dp_rank >= info.num_dp_ranks) {
    return Breach(step, "dp_rank is ", step.dp_rank, " of ", info.num_dp_ranks);
  }
  if (step.num_computed_tokens < 0 || step.num_tokens < 1 || step.num_suppressed < 0) {
    return Breach(step, "num_computed_tokens is ", step.num_computed_tokens, ", num_tokens ",
                  step.num_tokens, ", num_suppressed ", step.num_suppressed);
  }
  const int32_t end = step.num_computed_tokens + step.num_tokens;
  if (end >= info.max_model_len) {  // the token drawn next would be beyond it
    return Breach(step, "reaches ", end, " tokens; the model accepts ", info.max_model_len);
  }
  if (step.num_blocks != (end + options_.block_size - 1) / options_.block_size) {
    return Breach(step, "num_blocks is ", step.num_blocks, " for ", end, " tokens");
  }
  if (at.token + step.num_tokens > plan.tokens.size() ||
      at.block + step.num_blocks > plan.blocks.size() ||
      at.suppressed + step.num_suppressed > plan.suppressed.size()) {
    return Breach(step, "the plan's arrays end before it");
  }
  for (int32_t i = 0; i < step.num_tokens; ++i) {
    const TokenId token = plan.tokens[at.token + i];
    if (token < 0 || token >= info.vocab_size) return Breach(step, "token ", token);
  }
  for (int32_t i = 0; i < step.num_suppressed; ++i) {
    const TokenId token = plan.suppressed[at.suppressed + i];
    if (token < 0 || token >= info.vocab_size) return Breach(step, "suppressed token ", token);
  }
  for (int32_t i = 0; i < step.num_blocks; ++i) {
    const BlockId block = plan.blocks[at.block + i];
    if (block < 0 || block >= info.num_blocks) {
      return Breach(step, "block ", block, " of ", info.num_blocks);
    }
  }
  return absl::OkStatus();
}

// A block that is written is listed once; a sequence is in the plan once.
absl::Status FakeEngine::CheckAliasing(const StepPlan& plan) const {
  std::set<RequestId> ids;
  std::map<std::pair<int32_t, BlockId>, int> uses;
  size_t at = 0;
  for (const SequenceStep& step : plan.sequences) {
    if (!ids.insert(step.id).second) return Breach(step, "is listed twice");
    for (int32_t i = 0; i < step.num_blocks; ++i) ++uses[{step.dp_rank, plan.blocks[at + i]}];
    at += step.num_blocks;
  }
  at = 0;
  for (const SequenceStep& step : plan.sequences) {
    for (int32_t i = step.num_computed_tokens / options_.block_size; i < step.num_blocks; ++i) {
      const BlockId block = plan.blocks[at + i];
      if (uses[{step.dp_rank, block}] > 1) {
        return Breach(step, "writes block ", block, " of rank ", step.dp_rank,
                      ", which is listed twice");
      }
    }
    at += step.num_blocks;
  }
  return absl::OkStatus();
}

bool FakeEngine::Happens(std::atomic<int>* forced, double probability) {
  if (*forced > 0) {
    --*forced;
    return true;
  }
  return probability > 0 && Uniform(random_()) < probability;
}

void FakeEngine::RuinCache() {
  for (auto& cache : cache_) {
    for (uint64_t& kv : cache) kv = random_();
  }
}

}  // namespace latentd
