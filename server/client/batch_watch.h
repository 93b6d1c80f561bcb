#ifndef LATENTD_SERVER_CLIENT_BATCH_WATCH_H_
#define LATENTD_SERVER_CLIENT_BATCH_WATCH_H_

#include <functional>
#include <string>

#include "latentd/v1/batch.pb.h"
#include "server/client/batch_client.h"

namespace latentd {

// Exit codes of commands that wait for a job's end, beside kExitOk: every item succeeded.
inline constexpr int kExitItemsFailed = 3;   // completed, and items failed
inline constexpr int kExitJobExpired = 4;    // its completion window passed
inline constexpr int kExitJobCancelled = 5;  // by somebody
inline constexpr int kExitJobFailed = 6;     // --fail-fast, and an item failed

// REQUIRES: the job has ended.
int ExitCodeOf(const v1::Job& job);

// Follows a job to its end, over the server's own ends and starts. `*job` is the job as it is at
// the return; `on_change` is told of each state of it that comes before.
grpc::Status FollowJob(BatchClient& client, const std::string& name,
                       const std::function<void(const v1::Job&)>& on_change, v1::Job* job);

// The same with a bar, or lines of JSON on `out` where `json`; tells the end in words, and returns
// the exit code. Ctrl-C ends the watching, not the job.
int WatchJob(BatchClient& client, const std::string& name, bool json,
             const BatchTerminal& terminal);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BATCH_WATCH_H_
