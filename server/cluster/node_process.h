#ifndef LATENTD_SERVER_CLUSTER_NODE_PROCESS_H_
#define LATENTD_SERVER_CLUSTER_NODE_PROCESS_H_

#include "server/config.h"
#include "server/model_loader.h"
#include "server/process_exit.h"

namespace latentd {

// `latentd node`: the process around a NodeAgent. On SIGTERM or SIGINT it ends its ranks and then
// itself, kServeOk. kServeFailed when the leader refuses it. Call it on the main thread before
// there are others.
int RunNode(const ServeConfig& config, const ModelPath& model);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_NODE_PROCESS_H_
