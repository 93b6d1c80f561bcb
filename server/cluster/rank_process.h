#ifndef LATENTD_SERVER_CLUSTER_RANK_PROCESS_H_
#define LATENTD_SERVER_CLUSTER_RANK_PROCESS_H_

#include <cstdint>

#include "server/config.h"
#include "server/model_loader.h"

namespace latentd {

// `latentd rank`: dials the leader (config.leader), loads its part of the model and computes until
// the leader ends or SIGTERM, then returns kServeOk. When the leader is lost, and when it cannot
// load or its engine is lost, it frees the engine within seconds and returns kServeFailed: whoever
// keeps it running starts it again, and it joins the next leader. Where the engine hangs it ends
// the process instead of returning.
//
// To be called on the main thread before there are others: it takes over the process' signals.
int RunRank(const ServeConfig& config, const ModelPath& model, int32_t rank);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_RANK_PROCESS_H_
