#ifndef LATENTD_SERVER_METRICS_H_
#define LATENTD_SERVER_METRICS_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "scheduler/engine_core.h"
#include "server/cluster/cluster_stats.h"
#include "server/histogram.h"
#include "server/metrics_writer.h"
#include "server/request_observer.h"

namespace latentd {

// What the daemon is doing. The order is that of a life.
enum class ServerState { kStarting, kLoading, kWarming, kServing, kDraining, kStopped };
inline constexpr std::array<std::string_view, 6> kServerStateNames = {
    "starting", "loading", "warming", "serving", "draining", "stopped"};

// Every metric of the daemon. Observers only count; names, help and series are written in Text(),
// on the thread that scrapes. Any thread may call anything.
//
// Written out by ourselves: an observation through prometheus-cpp takes a lock, on the core thread
// too, and the distribution has it as a shared object only. The format is a page long, and promtool
// checks it.
//
// To add one: a member, the place that counts it, and its line in Text().
class Metrics final : public RequestObserver {
 public:
  // `model`: the label `model` of every series that concerns requests or the engine.
  explicit Metrics(std::string model);

  // ---- the daemon's life ----
  void SetState(ServerState state) { state_ = state; }
  ServerState state() const { return state_; }
  void SetAlive(bool alive) { alive_ = alive; }
  void SetLoadProgress(uint64_t loaded_bytes, uint64_t total_bytes);
  void SetStartupPhase(std::string_view phase, absl::Duration duration);
  // From now on the core's own counts are read at each scrape. `stats` must not block, and must
  // stay valid until it is replaced; an empty one ends it.
  void SetEngine(const EngineInfo& info, std::string engine, bool prefix_caching,
                 std::function<CoreStats()> stats);

  // The same of a group of ranks.
  void SetCluster(std::function<ClusterStats()> stats);
  void SetEngineReady(bool ready) { engine_ready_ = ready; }

  // What batch jobs have to say; written at each scrape, so it must not block, and must stay valid
  // until it is replaced.
  void SetBatch(std::function<void(MetricsWriter*)> write);

  // EngineCore::Callbacks::on_step.
  void OnStep(const StepReport& report);

  // ---- RequestObserver ----
  void OnFinished(const RequestRecord& record) override;
  void OnRejected(std::string_view reason) override;
  void OnFirstToken(absl::Duration since_arrival) override;
  void OnTokens(absl::Duration since_last, int64_t count) override;

  // What `GET /metrics` answers with: Prometheus' text format, version 0.0.4.
  std::string Text() const;

 private:
  static constexpr std::array<std::string_view, 4> kMethods = {"Chat", "StreamChat", "Complete",
                                                               "StreamComplete"};
  static constexpr std::array<std::string_view, 4> kFinishReasons = {"", "stop", "length",
                                                                     "tool_calls"};
  static constexpr int kNumCodes = 17;  // grpc::StatusCode

  const std::string model_;
  const absl::Time start_;
  std::atomic<ServerState> state_{ServerState::kStarting};
  std::atomic<bool> alive_{true};
  std::atomic<bool> engine_ready_{true};
  std::atomic<uint64_t> load_bytes_loaded_{0};
  std::atomic<uint64_t> load_bytes_total_{0};
  std::atomic<int64_t> generation_tokens_{0};
  std::atomic<int64_t> background_tokens_{0};
  std::atomic<int64_t> client_cancelled_{0};
  std::atomic<int64_t> requests_[kMethods.size()][kNumCodes][kFinishReasons.size()] = {};

  Histogram time_to_first_token_;
  Histogram inter_token_latency_;
  Histogram time_per_output_token_;
  Histogram request_duration_;
  Histogram queue_;
  Histogram prefill_;
  Histogram decode_step_;
  Histogram prefill_step_;
  Histogram device_busy_;
  Histogram device_idle_;
  Histogram scheduler_;
  Histogram step_tokens_;
  Histogram step_sequences_;
  Histogram request_prompt_tokens_;
  Histogram request_generation_tokens_;

  mutable absl::Mutex mutex_;
  std::map<std::string, int64_t, std::less<>> rejections_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, double, std::less<>> startup_seconds_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, std::string> engine_labels_ ABSL_GUARDED_BY(mutex_);
  std::function<CoreStats()> core_stats_ ABSL_GUARDED_BY(mutex_);
  std::function<ClusterStats()> cluster_stats_ ABSL_GUARDED_BY(mutex_);
  std::function<void(MetricsWriter*)> write_batch_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace latentd

#endif  // LATENTD_SERVER_METRICS_H_
