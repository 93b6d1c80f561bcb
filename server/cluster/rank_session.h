#ifndef LATENTD_SERVER_CLUSTER_RANK_SESSION_H_
#define LATENTD_SERVER_CLUSTER_RANK_SESSION_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "engine/group_member.h"
#include "grpcpp/grpcpp.h"
#include "latentd/v1/rank.grpc.pb.h"
#include "server/engine_factory.h"

namespace latentd {

struct RankSessionOptions {
  std::string leader;  // host:port
  int32_t rank = 0;
  int32_t node = 0;
  std::string version;
  std::string config_hash;
  std::string checkpoint_hash;
  absl::Duration connect_timeout = absl::Minutes(1);  // how long it dials, and waits for its place
  absl::Duration keepalive_time = absl::Seconds(3);   // a leader that does not answer is gone
  absl::Duration keepalive_timeout = absl::Seconds(3);
  absl::Duration leave_timeout = absl::Seconds(3);  // from the end to the engine's
  // Called when the engine has not ended by then: it hangs, and its thread cannot be joined.
  std::function<void(const absl::Status& why)> on_stuck = nullptr;
};

// A rank's side of RankService, from joining to the end: loads the engine as one member of a group,
// and has it join and compute as the leader says.
//
// Three threads: Run()'s reads what the leader sends and never waits for the engine; the engine's
// does what it says, in order; the pulse tells the leader that the process is there.
class RankSession {
 public:
  // Makes the engine; by the engine's thread. `num_blocks`: of the cache; 0: as configured.
  using Loader = std::function<absl::StatusOr<std::unique_ptr<GroupMember>>(
      int32_t num_blocks, LoadListener* listener)>;

  RankSession(RankSessionOptions options, Loader loader);

  // Until the leader says that it ends: OK. Or until the leader is gone or does not take this rank,
  // the engine is lost: an error. Or until Stop(): CANCELLED. Then the engine is gone too. To be
  // called once.
  absl::Status Run();

  // Ends Run() soon, as if the leader were gone. Any thread.
  void Stop() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  class Listener;

  absl::StatusOr<v1::Welcome> Connect();
  absl::StatusOr<v1::Welcome> TryJoin(v1::RankService::Stub* stub);
  absl::Status ReadUntilEnd();
  void OnMessage(v1::LeaderMessage* message) ABSL_LOCKS_EXCLUDED(mutex_);
  void End(const absl::Status& why) ABSL_LOCKS_EXCLUDED(mutex_);
  // False when the stream is broken.
  bool Send(const v1::RankMessage& message) ABSL_LOCKS_EXCLUDED(write_mutex_);

  void RunEngine(int32_t num_blocks) ABSL_LOCKS_EXCLUDED(mutex_);
  bool LoadEngine(int32_t num_blocks);
  void Do(const v1::LeaderMessage& work);
  void Form(const v1::Form& form);
  void Step(const v1::Step& step);
  absl::StatusOr<StepResult> Compute(const std::string& plan) ABSL_LOCKS_EXCLUDED(mutex_);
  void ConfirmAbort(int64_t epoch);
  bool Begin(int64_t epoch) ABSL_LOCKS_EXCLUDED(mutex_);
  void Finish() ABSL_LOCKS_EXCLUDED(mutex_);
  void Fail(const absl::Status& why) ABSL_LOCKS_EXCLUDED(mutex_);
  void RunPulse(absl::Duration interval) ABSL_LOCKS_EXCLUDED(mutex_);
  void AbortAgain() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const RankSessionOptions options_;
  const Loader loader_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::RankService::Stub> stub_;

  absl::Mutex mutex_;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;        // no more work is taken
  bool engine_done_ ABSL_GUARDED_BY(mutex_) = false;  // its thread ends
  absl::Status why_ended_ ABSL_GUARDED_BY(mutex_);    // as the engine's thread says, or Stop()
  std::unique_ptr<grpc::ClientContext> context_ ABSL_GUARDED_BY(mutex_);
  std::vector<v1::LeaderMessage> work_ ABSL_GUARDED_BY(mutex_);  // form, step, abort
  int64_t working_epoch_ ABSL_GUARDED_BY(mutex_) = 0;  // of what the engine does; 0: nothing
  int64_t aborted_epoch_ ABSL_GUARDED_BY(mutex_) = 0;  // this one and all before it
  absl::Status why_aborted_ ABSL_GUARDED_BY(mutex_);
  int64_t step_ ABSL_GUARDED_BY(mutex_) = -1;  // under way, or the last
  // Set and reset by the engine's thread, which alone may use it without the mutex.
  std::unique_ptr<GroupMember> member_;
  GroupMember* shared_member_ ABSL_GUARDED_BY(mutex_) = nullptr;

  absl::Mutex write_mutex_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::RankMessage, v1::LeaderMessage>> stream_;

  // The engine thread's, used again.
  StepPlan plan_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_RANK_SESSION_H_
