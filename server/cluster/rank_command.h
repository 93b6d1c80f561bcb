#ifndef LATENTD_SERVER_CLUSTER_RANK_COMMAND_H_
#define LATENTD_SERVER_CLUSTER_RANK_COMMAND_H_

#include <cstdint>
#include <string>

#include "server/cluster/process_supervisor.h"
#include "server/config.h"

namespace latentd {

// How this process starts a rank of its node: this very program as `latentd rank`, with the
// configuration that this process has, whatever its file says by now. A node's ranks share its
// cores, unless `threads` is given, and have a GPU each, from `device` on.
//   rank    of this node: [node * RanksPerNode, (node + 1) * RanksPerNode)
//   leader  host:port that it dials
ProcessCommand RankCommand(const ServeConfig& config, const std::string& leader, int32_t rank);

// Where a process of the leader's own machine reaches what listens on `listen`: at the loopback
// address if that is all addresses, else at that one.
//   port  on which it listens, when that of `listen` is 0
std::string DialAddress(const std::string& listen, int port);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_RANK_COMMAND_H_
