#ifndef LATENTD_SERVER_CLUSTER_PROCESS_SUPERVISOR_H_
#define LATENTD_SERVER_CLUSTER_PROCESS_SUPERVISOR_H_

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/cluster/node_control.h"

namespace latentd {

// How a process is started: no shell, no search path.
struct ProcessCommand {
  std::string executable;
  std::vector<std::string> arguments;  // with argv[0]
  // NAME=VALUE: the parent's environment otherwise, of which these take the place.
  std::vector<std::string> environment;
};

// Keeps the ranks of one node running, each a process of its own: a rank that exits is started
// again, with backoff.
//
// Processes are posix_spawned, never forked: gRPC's threads would leave their locks behind. A child
// gets no open file of the parent's but standard error, which its standard output goes to as well,
// no blocked signals, and a process group of its own, so that a terminal's ^C reaches the parent
// alone. To end with its parent it asks for itself: EndWithParent(). What it asks for is the end of
// the *thread* that started it; that is the supervisor's own, which outlives all children.
//
// Any thread.
class ProcessSupervisor final : public NodeControl {
 public:
  struct Options {
    // Called before each start, by the supervisor's thread.
    std::function<ProcessCommand(int32_t rank)> command;
    // May be empty. By the supervisor's thread, with no lock held; not for the exits that Stop()
    // asks for. pid 0: it could not be started.
    OnRankExit on_exit;
    // The wait after the first exit; doubled for each one more, up to the longest, and forgotten by
    // a process that ran so long as is said here.
    absl::Duration shortest_wait = absl::Milliseconds(100);
    absl::Duration longest_wait = absl::Seconds(10);
    absl::Duration steady_after = absl::Minutes(1);
  };

  explicit ProcessSupervisor(Options options);
  ~ProcessSupervisor() override;  // Stop() without grace

  // Keeps these running too; no-op for those that are.
  void Start(absl::Span<const int32_t> ranks) ABSL_LOCKS_EXCLUDED(mutex_);

  void KillRank(int32_t rank, int32_t pid, const std::string& why) override
      ABSL_LOCKS_EXCLUDED(mutex_);

  // Ends all: SIGTERM, and SIGKILL for those that are there after `grace`. Returns when none is
  // left. Start() is possible again, and meanwhile takes effect afterwards. One call at a time, not
  // from on_exit.
  void Stop(absl::Duration grace) ABSL_LOCKS_EXCLUDED(mutex_);

  // The process of `rank`; 0 while there is none.
  int32_t pid(int32_t rank) const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  // One rank that shall run. `pid` 0: it is to be started at `start_at`.
  struct Child {
    int32_t pid = 0;
    int pidfd = -1;
    absl::Time started_at;
    absl::Time start_at = absl::InfinitePast();
    absl::Duration wait = absl::ZeroDuration();  // before the latest start
  };
  struct Exit {
    int32_t rank = 0;
    int32_t pid = 0;
    std::string how;
  };

  void Run() ABSL_LOCKS_EXCLUDED(mutex_);
  void Wake();
  // Until a child exits, Wake(), or `deadline`.
  void Wait(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mutex_);
  std::vector<Exit> Reap(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::vector<Exit> StartDue(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Signal(int signal) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Time NextDeadline() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ScheduleStart(absl::Time now, Child* child) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool NoneRuns() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Options options_;
  const int wake_;  // eventfd
  mutable absl::Mutex mutex_;
  std::map<int32_t, Child> children_ ABSL_GUARDED_BY(mutex_);  // by rank
  std::optional<absl::Time> kill_at_ ABSL_GUARDED_BY(mutex_);  // while Stop() waits
  bool exiting_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// For a child, first thing in main(): it is killed when the thread that started it ends, which is
// with its process at the latest. False when `parent_pid` is its parent no more.
bool EndWithParent(int32_t parent_pid);

// "exit code 1", "signal 9 (Killed)", of what waitpid() says of a process that is gone.
std::string DescribeExit(int wait_status);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_PROCESS_SUPERVISOR_H_
