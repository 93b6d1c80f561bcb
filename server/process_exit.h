#ifndef LATENTD_SERVER_PROCESS_EXIT_H_
#define LATENTD_SERVER_PROCESS_EXIT_H_

#include "absl/status/status.h"
#include "server/config.h"

namespace latentd {

// Exit codes of latentd's processes.
inline constexpr int kServeOk = 0;      // asked to end, and every call had ended
inline constexpr int kServeFailed = 1;  // could not listen or load, calls were cut off, engine lost
inline constexpr int kServeUsage = 2;   // a flag or the configuration is wrong

// Says why the process fails: in the log, and in config.termination_log, which Kubernetes shows as
// the reason of a pod's end. kServeFailed.
int FailProcess(const ServeConfig& config, const absl::Status& status);

}  // namespace latentd

#endif  // LATENTD_SERVER_PROCESS_EXIT_H_
