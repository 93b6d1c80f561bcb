#include "server/process_exit.h"

#include <fstream>
#include <string>

#include "server/log.h"

namespace latentd {

int FailProcess(const ServeConfig& config, const absl::Status& status) {
  const std::string message(status.message());
  LogEvent(spdlog::level::err, "failed: " + message,
           {{"code", absl::StatusCodeToString(status.code())}});
  if (!config.termination_log.empty()) {
    std::ofstream file(config.termination_log, std::ios::trunc);
    if (!(file << message << '\n') || !file.flush()) {
      LogEvent(spdlog::level::warn, "cannot write the termination log",
               {{"termination_log", config.termination_log}});
    }
  }
  return kServeFailed;
}

}  // namespace latentd
