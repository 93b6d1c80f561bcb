#include "engine/cpu/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/sampling.h"

namespace latentd {
namespace {

constexpr double kLowestExponent = -45.0;

// Written so that the compiler can vectorise: these two loops see the whole vocabulary at every
// step.
bool AllFinite(absl::Span<const float> values) {
  constexpr uint32_t kExponent = 0x7f800000u;
  uint32_t bad = 0;
  for (float value : values) bad |= (std::bit_cast<uint32_t>(value) & kExponent) == kExponent;
  return bad == 0;
}

float Largest(absl::Span<const float> values) {
  constexpr size_t kLanes = 16;
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -INFINITY);
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j)
      lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
  }
  float largest = *std::max_element(lanes, lanes + kLanes);
  for (; i < values.size(); ++i) largest = std::max(largest, values[i]);
  return largest;
}

}  // namespace

bool Sampler::Before(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

absl::StatusOr<TokenId> Sampler::Sample(absl::Span<float> logits,
                                        absl::Span<const TokenId> suppressed,
                                        const SamplingParams& params, int64_t position) {
  if (!AllFinite(logits)) {
    const auto bad =
        std::find_if(logits.begin(), logits.end(), [](float x) { return !std::isfinite(x); });
    return absl::InternalError(absl::StrCat("logit of token ", bad - logits.begin(), " is ", *bad));
  }
  for (TokenId id : suppressed) logits[id] = -INFINITY;
  const float largest = Largest(logits);
  if (largest == -INFINITY) {
    return absl::InvalidArgumentError(
        absl::StrCat("suppressed: all ", logits.size(), " tokens are suppressed"));
  }
  const auto greedy =
      static_cast<TokenId>(std::find(logits.begin(), logits.end(), largest) - logits.begin());
  if (params.temperature == 0.0f) return greedy;

  // A temperature near 0 would overflow the division; the limit is then the greedy token's
  // weight 1.
  const double temperature = params.temperature;
  const double maximum = largest;
  const double lowest = maximum + kLowestExponent * temperature;
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] < lowest) continue;
    candidates_.push_back({logits[i], static_cast<TokenId>(i), 0.0});
  }
  if (params.top_k > 0 && static_cast<size_t>(params.top_k) < candidates_.size()) {
    std::nth_element(candidates_.begin(), candidates_.begin() + params.top_k - 1, candidates_.end(),
                     Before);
    candidates_.resize(params.top_k);
  }
  for (Candidate& c : candidates_) c.weight = std::exp((c.logit - maximum) / temperature);
  if (params.top_p < 1.0f) KeepTopP(params.top_p);
  if (params.min_p > 0.0f) {
    std::erase_if(candidates_, [&](const Candidate& c) { return c.weight < params.min_p; });
  }

  // Only top_k and top_p disturb the order of ids.
  if (!std::is_sorted(candidates_.begin(), candidates_.end(),
                      [](const Candidate& a, const Candidate& b) { return a.id < b.id; })) {
    std::sort(candidates_.begin(), candidates_.end(),
              [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  }
  double sum = 0.0;
  for (const Candidate& c : candidates_) sum += c.weight;
  const double target = UniformDraw(params.seed, params.sample_index, position) * sum;
  double running = 0.0;
  for (const Candidate& c : candidates_) {
    running += c.weight;
    if (running > target) return c.id;
  }
  return greedy;  // target rounded up to sum: as likely as 2^-53
}

// Sorts no more than it needs: the best 64, then four times as many, until they hold `top_p` of all
// weight.
void Sampler::KeepTopP(double top_p) {
  double total = 0.0;
  for (const Candidate& c : candidates_) total += c.weight;
  const double enough = top_p * total;
  double running = 0.0;
  size_t kept = 0, sorted = 0;
  for (size_t chunk = 64; kept < candidates_.size(); chunk *= 4) {
    const size_t end = std::min(sorted + chunk, candidates_.size());
    std::partial_sort(candidates_.begin() + sorted, candidates_.begin() + end, candidates_.end(),
                      Before);
    for (sorted = end; kept < end;) {
      running += candidates_[kept++].weight;
      if (running >= enough) return candidates_.resize(kept);
    }
  }
}

}  // namespace latentd
