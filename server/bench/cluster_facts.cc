#include "server/bench/cluster_facts.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"

namespace latentd {
namespace {

using Origin = Fact::Origin;

constexpr char kReadme[] = "engine/cuda/README.md, one H100, 2026-11-24";

void AddKernelFacts(std::vector<Fact>* facts) {
  facts->insert(
      facts->end(),
      {{Origin::kMeasured, "decode step of one rank",
        "16.5, 24.8, 27.3, 28.4, 30.7 ms with 1, 8, 32, 64, 64 sequences of 2k, 2k, 1.8k, 0.8k, "
        "2k; the model gives each within 2.5 %",
        kReadme},
       {Origin::kMeasured, "prefill of one rank",
        "10,800 to 11,000 tok/s in steps of 8,192; the model gives 10,900",
        "engine/cuda/README.md, one H200, 2026-11-30"},
       {Origin::kMeasured, "kernels",
        "FP8 products by rows (1 to 4,096 an expert; from 256 on an H200), absorbed attention by "
        "pairs of query and key, small kernels by tokens, head and sampling",
        kReadme},
       {Origin::kMeasured, "ragged contexts",
        "attention takes 1.43 times as long where contexts vary by half of their mean; in between "
        "in proportion (assumed)",
        kReadme},
       {Origin::kMeasured, "memory beside weights and cache", "4.45 GB of a rank",
        "276,000 tokens of cache beside shard16's weights"},
       {Origin::kDerived, "rest of a layer",
        "19 us, and 0.19 us for each token beyond 64: what the sums of kernels leave of the "
        "measured steps",
        "fitted"}});
}

void AddExchangeFacts(const ClusterModelOptions& options, std::vector<Fact>* facts) {
  if (options.num_ranks() == 1) return;
  const ExchangeOptions& exchange = options.exchange;
  facts->insert(
      facts->end(),
      {{Origin::kPublished, "latency of an all-gather or reduce-scatter",
        absl::StrFormat("NCCL's constants for rings, times %g; the fastest of its three protocols",
                        exchange.latency_factor),
        "tuning model of NVIDIA/nccl"},
       {Origin::kPublished, "InfiniBand",
        absl::StrFormat("%g GB/s a GPU and direction", exchange.infiniband_bytes * 1e-9),
        "43 GB/s of 400 Gb/s by default: DeepEP's README, EP16 on H800"},
       {Origin::kAssumed, "NVLink",
        absl::StrFormat("%g GB/s a GPU and direction", exchange.nvlink_bytes * 1e-9),
        "two thirds of the datasheet by default"},
       {Origin::kAssumed, "exchange",
        absl::StrCat(exchange.scheme == ExchangeScheme::kRing
                         ? "all-gather of FP8 rows and reduce-scatter of bf16 over rings through "
                           "all ranks and all NICs evenly"
                         : "all-gather of FP8 rows and reduce-scatter of bf16, first between "
                           "nodes, then within them",
                     ", padded to the fullest rank; nothing overlaps with it"),
        "as the CUDA engine is designed"},
       {Origin::kAssumed, "routing",
        absl::StrFormat("even but for chance; then the fullest rank has %g times as many rows",
                        options.imbalance),
        "--imbalance"},
       {Origin::kAssumed, "leader", "1 ms a step from result to next plan",
        "the most that is wanted of it"},
       {Origin::kAssumed, "NCCL's memory", "1.5 GB of a rank, and the gathered rows", ""}});
}

}  // namespace

absl::string_view OriginName(Origin origin) {
  switch (origin) {
    case Origin::kMeasured:
      return "measured";
    case Origin::kDerived:
      return "derived";
    case Origin::kPublished:
      return "published";
    case Origin::kAssumed:
      return "assumed";
  }
  return "";
}

std::vector<Fact> ClusterFacts(const ClusterModelOptions& options) {
  std::vector<Fact> facts;
  AddKernelFacts(&facts);
  AddExchangeFacts(options, &facts);
  facts.push_back({Origin::kAssumed, "requests",
                   "Poisson arrivals; lognormal lengths whose means, 161 and 338, are ShareGPT's "
                   "in the vLLM paper; no common prefixes",
                   "--prompt-tokens, --output-tokens"});
  if (options.fp8_cache) {
    facts.push_back({Origin::kMeasured, "FP8 cache",
                     "644 bytes a token and layer; absorbed attention takes 1.33 times as long",
                     "1.1 to 1.46 times by size: engine/cuda/README.md, one H200, 2026-11-30"});
  }
  if (options.mtp_acceptance > 0) {
    facts.push_back(
        {Origin::kAssumed, "MTP",
         absl::StrFormat("one draft a sequence, accepted with %g; a step costs 1.45 times as much "
                         "at 1 sequence, 1.25 from 8 on, its exchange has twice the rows; tokens "
                         "come evenly, not two at a time",
                         options.mtp_acceptance),
         "the most that such a step may cost"});
  }
  std::stable_sort(facts.begin(), facts.end(),
                   [](const Fact& a, const Fact& b) { return a.origin < b.origin; });
  return facts;
}

std::string FormatFacts(const std::vector<Fact>& facts, size_t width) {
  constexpr size_t kIndent = 11;  // of the longest origin, and two
  std::string text;
  for (const Fact& fact : facts) {
    std::string line = absl::StrFormat("%-*s", kIndent, OriginName(fact.origin));
    std::string words = absl::StrCat(fact.what, ": ", fact.value);
    if (!fact.source.empty()) absl::StrAppend(&words, " (", fact.source, ")");
    bool first = true;
    for (const absl::string_view word : absl::StrSplit(words, ' ')) {
      if (!first && line.size() + 1 + word.size() > width) {
        absl::StrAppend(&text, line, "\n");
        line.assign(kIndent, ' ');
        first = true;
      }
      absl::StrAppend(&line, first ? "" : " ", word);
      first = false;
    }
    absl::StrAppend(&text, line, "\n");
  }
  return text;
}

}  // namespace latentd
