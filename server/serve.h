#ifndef LATENTD_SERVER_SERVE_H_
#define LATENTD_SERVER_SERVE_H_

#include "server/config.h"
#include "server/model_loader.h"
#include "server/process_exit.h"
#include "server/server.h"

namespace latentd {

// `latentd serve`: the process around a Server. Loads, serves, and on SIGTERM or SIGINT drains:
// readiness NOT_SERVING, running calls go on for config.drain_timeout at most, then UNAVAILABLE. A
// second signal ends the drain; a signal while loading ends at once. When the engine is lost, or a
// step lasts longer than config.step_deadline, streams get their UNAVAILABLE and the process ends
// with kServeFailed within five seconds. Returns the exit code, or ends the process itself where a
// thread may hang. Call it on the main thread before there are others: it takes over the signals of
// the whole process.
int RunServe(const ServeConfig& config, const ModelPath& model, Server::Loader loader = LoadModel);

}  // namespace latentd

#endif  // LATENTD_SERVER_SERVE_H_
