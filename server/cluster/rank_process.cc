#include "server/cluster/rank_process.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>

#include "engine/status.h"
#include "server/cluster/rank_session.h"
#include "server/engine_factory.h"
#include "server/fingerprint.h"
#include "server/log.h"
#include "server/process_events.h"
#include "server/process_exit.h"
#include "server/version.h"

namespace latentd {
namespace {

// Ends the process where the engine's thread cannot be joined. The driver frees its GPU.
[[noreturn]] void ExitStuck(const absl::Status& why) {
  LogEvent(spdlog::level::err, "the engine does not end: the process does",
           {{"why", std::string(why.message())}});
  ShutdownLogging();
  std::_Exit(kServeFailed);
}

// Ends the session when the process is told to end.
class SignalThread {
 public:
  SignalThread(ProcessEvents* events, RankSession* session)
      : events_(events), thread_([this, session] {
          while (!done_) {
            const int signal = events_->Wait(absl::InfiniteDuration());
            if (signal == 0) continue;
            LogEvent(spdlog::level::info, "signal", {{"name", strsignal(signal)}});
            session->Stop();
          }
        }) {}
  ~SignalThread() {
    done_ = true;
    events_->Wake();
    thread_.join();
  }

 private:
  ProcessEvents* const events_;
  std::atomic<bool> done_{false};
  std::thread thread_;
};

absl::Status ServeAsRank(const ServeConfig& config, const ModelPath& path, int32_t rank,
                         ProcessEvents* events) {
  ASSIGN_OR_RETURN(const ModelConfig model, ReadModelConfig(path));
  ASSIGN_OR_RETURN(EngineSettings settings, ResolveEngine(config, model));
  settings.rank = rank;
  settings.world_size = static_cast<int32_t>(config.world_size);
  settings.tensor_listen = config.num_nodes > 1 ? "0.0.0.0:0" : "127.0.0.1:0";
  // The leader judges a step first, and says where each rank waits.
  settings.call_timeout = 2 * config.step_deadline;
  const LoadFormat format =
      config.load_format == "dummy" ? LoadFormat::kDummy : LoadFormat::kSafetensors;
  ASSIGN_OR_RETURN(const std::string config_hash, ConfigHash(config, path));
  ASSIGN_OR_RETURN(const std::string checkpoint_hash, CheckpointHash(config, path));
  RankSession session({.leader = config.leader,
                       .rank = rank,
                       .node = static_cast<int32_t>(config.node),
                       .version = kVersion,
                       .config_hash = config_hash,
                       .checkpoint_hash = checkpoint_hash,
                       .on_stuck = ExitStuck},
                      [&](int32_t num_blocks, LoadListener* listener) {
                        EngineSettings own = settings;
                        if (num_blocks > 0) own.num_blocks = num_blocks;
                        return MakeGroupMember(model, path.dir, format, own, listener);
                      });
  const SignalThread signals(events, &session);
  return session.Run();
}

}  // namespace

int RunRank(const ServeConfig& config, const ModelPath& model, int32_t rank) {
  ProcessEvents events;
  InitLogging(config.log_format == "json" ? LogFormat::kJson : LogFormat::kText, config.log_level,
              {{"rank", rank}});
  const absl::Status status = ServeAsRank(config, model, rank, &events);
  const bool told = status.ok() || absl::IsCancelled(status);  // by the leader, or by a signal
  if (!told) {
    LogEvent(spdlog::level::err, "rank ends: " + std::string(status.message()),
             {{"code", absl::StatusCodeToString(status.code())}});
  }
  ShutdownLogging();
  return told ? kServeOk : kServeFailed;
}

}  // namespace latentd
