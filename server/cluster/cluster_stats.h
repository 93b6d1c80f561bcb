#ifndef LATENTD_SERVER_CLUSTER_CLUSTER_STATS_H_
#define LATENTD_SERVER_CLUSTER_CLUSTER_STATS_H_

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace latentd {

// Where a rank stands.
enum class RankState {
  kAbsent,    // no process of it has joined
  kLoading,   // its weights
  kReady,     // in no group
  kForming,   // told to join the group
  kFormed,    // in the group
  kAborting,  // told to leave it
};
inline constexpr std::array<std::string_view, 6> kRankStateNames = {
    "absent", "loading", "ready", "forming", "formed", "aborting"};

// Why a rank was lost, or the group given up.
enum class LossReason {
  kExited,        // its process ended, or the connection broke
  kSilent,        // no sign of life: stopped, or cut off
  kFailed,        // it said so: it could not load, or its engine is lost
  kGarbage,       // it sent what cannot be
  kAbortTimeout,  // it did not leave the group in time
  kUnfit,         // another process of it has a smaller cache than the group
  kStepError,     // no rank is lost: a step failed on one
  kStepDeadline,  // no rank is lost: a step took too long
  kFormError,     // no rank is lost: the group could not be formed
};
inline constexpr std::array<std::string_view, 9> kLossReasonNames = {
    "exited", "silent",     "failed",        "garbage",   "abort_timeout",
    "unfit",  "step_error", "step_deadline", "form_error"};
inline constexpr size_t kNumLossReasons = kLossReasonNames.size();
constexpr bool IsLossOfRank(LossReason reason) { return reason < LossReason::kStepError; }

// A picture of a group of ranks at one moment; for metrics.
struct ClusterStats {
  struct Rank {
    int32_t node = 0;  // the last that it was on
    RankState state = RankState::kAbsent;
  };
  std::vector<Rank> ranks;  // [world_size]
  int64_t epoch = 0;        // of the latest forming
  bool formed = false;
  int64_t num_formed = 0;                                     // formings that succeeded
  std::array<int64_t, kNumLossReasons> ranks_lost = {};       // by reason
  std::array<int64_t, kNumLossReasons> groups_given_up = {};  // by its first reason
  int64_t num_steps = 0;
  std::string transport;            // of the tensors; empty before the first forming
  double last_forming_seconds = 0;  // from the loss, or the start, to the latest group
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_CLUSTER_STATS_H_
