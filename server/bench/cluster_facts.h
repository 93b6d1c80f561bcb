#ifndef LATENTD_SERVER_BENCH_CLUSTER_FACTS_H_
#define LATENTD_SERVER_BENCH_CLUSTER_FACTS_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "server/bench/cluster_model.h"

namespace latentd {

// One thing that a simulation rests on.
struct Fact {
  enum class Origin {
    kMeasured,   // by this project, on an H100
    kDerived,    // computed from what was measured
    kPublished,  // by others; not measured here
    kAssumed,
  };
  Origin origin;
  std::string what, value, source;
};

// "measured", "derived", "published", "assumed".
absl::string_view OriginName(Fact::Origin origin);

// All that a run with these options rests on, by origin.
std::vector<Fact> ClusterFacts(const ClusterModelOptions& options);

// For people, lines of up to `width` columns, ending in '\n'.
std::string FormatFacts(const std::vector<Fact>& facts, size_t width);

}  // namespace latentd

#endif  // LATENTD_SERVER_BENCH_CLUSTER_FACTS_H_
