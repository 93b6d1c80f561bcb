#ifndef LATENTD_SERVER_CLUSTER_LEADER_CHANNEL_H_
#define LATENTD_SERVER_CLUSTER_LEADER_CHANNEL_H_

#include <memory>
#include <string>

#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"

namespace latentd {

// How ranks and agents dial the leader: messages of any size, a ping that is not answered ends the
// streams, and a leader that comes back, at another address of its name too, is found within a
// second or two.
//   leader             host:port
//   keepalive_time     between pings
//   keepalive_timeout  until a ping counts as unanswered
std::shared_ptr<grpc::Channel> DialLeader(const std::string& leader, absl::Duration keepalive_time,
                                          absl::Duration keepalive_timeout);

// What this machine calls itself; empty if it does not say.
std::string HostName();

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_LEADER_CHANNEL_H_
