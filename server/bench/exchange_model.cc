#include "server/bench/exchange_model.h"

#include <algorithm>
#include <limits>

namespace latentd {
namespace {

// A ring's latencies by NCCL's tuning model (ncclTunerConstantsDefaults in NVIDIA/nccl), in us, and
// the share of the wires' rate that the protocol leaves.
struct Protocol {
  double base, nvlink, infiniband;
  double rate, rate_in_node;
};
constexpr Protocol kProtocols[] = {
    {.base = 6.6, .nvlink = 0.6, .infiniband = 2.7, .rate = 1 / 4.0, .rate_in_node = 1 / 3.0},
    {.base = 14.0, .nvlink = 1.9, .infiniband = 4.0, .rate = 0.92, .rate_in_node = 0.92},
    {.base = 8.4, .nvlink = 3.4, .infiniband = 14.0, .rate = 1, .rate_in_node = 1}};
// LL's steps over NVLink beside a network.
constexpr double kLlBesideNetwork = 1.8;

// Rings through `num_nodes` nodes of `gpus` ranks: one for each NIC, of which a rank has one.
double RingSeconds(const ExchangeOptions& options, int32_t num_nodes, int32_t gpus, double bytes) {
  const double steps = num_nodes * gpus - 1.0, between = num_nodes - 1.0;
  if (steps <= 0) return 0;
  const double nvlink = gpus > 1 ? bytes * steps / options.nvlink_bytes : 0;
  const double infiniband = num_nodes > 1 ? bytes * steps / gpus / options.infiniband_bytes : 0;
  double best = std::numeric_limits<double>::infinity();
  for (const Protocol& protocol : kProtocols) {
    const bool ll = &protocol == kProtocols;
    const double step = protocol.nvlink * (ll && num_nodes > 1 ? kLlBesideNetwork : 1);
    const double us = protocol.base + (steps - between) * step + between * protocol.infiniband;
    const double rate = num_nodes > 1 ? protocol.rate : protocol.rate_in_node;
    best = std::min(best, us * 1e-6 * options.latency_factor + std::max(nvlink, infiniband) / rate);
  }
  return best;
}

}  // namespace

double DispatchBytes(int32_t hidden_size, int32_t experts_per_token) {
  return hidden_size + hidden_size / 128 * 4 + experts_per_token * (4 + 4);
}

double CombineBytes(int32_t hidden_size) { return 2.0 * hidden_size; }

double CollectiveSeconds(const ExchangeOptions& options, int32_t num_nodes, int32_t gpus_per_node,
                         double bytes) {
  if (options.scheme == ExchangeScheme::kRing) {
    return RingSeconds(options, num_nodes, gpus_per_node, bytes);
  }
  return RingSeconds(options, num_nodes, 1, bytes) +
         RingSeconds(options, 1, gpus_per_node, bytes * num_nodes);
}

}  // namespace latentd
