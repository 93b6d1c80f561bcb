#ifndef LATENTD_SERVER_BENCH_EXCHANGE_MODEL_H_
#define LATENTD_SERVER_BENCH_EXCHANGE_MODEL_H_

#include <cstdint>

namespace latentd {

enum class ExchangeScheme {
  kRing,   // NCCL's rings through all ranks, one for each NIC of a node
  kRails,  // first between the GPUs of one NIC rail, then within the node
};

// What the wires do; of one GPU, in one direction. Nothing here was measured by this project.
struct ExchangeOptions {
  ExchangeScheme scheme = ExchangeScheme::kRing;
  double nvlink_bytes = 300e9;     // a second; NVLink 4's datasheet: 450e9
  double infiniband_bytes = 43e9;  // a second; one NIC of 400 Gb/s a GPU: 50e9
  double latency_factor = 1;       // of NCCL's own constants
};

// Bytes of one token on the wire, of hidden_size h: FP8 with an fp32 scale for 128 columns and the
// routing of k experts out; a bf16 sum back.
double DispatchBytes(int32_t hidden_size, int32_t experts_per_token);
double CombineBytes(int32_t hidden_size);

// Seconds of an all-gather to which each rank gives `bytes`, or of the reduce-scatter from which it
// gets as much: latency and bytes over rate (alpha and beta). N ranks, g of them on a node:
//
//   ring   N - 1 steps. Through each NIC go bytes (N - 1) / g, over NVLink bytes (N - 1); the
//          slower of the two counts. Latency and rate are those of NCCL's three protocols by its
//          own tuning model, and the fastest of the three is taken, as NCCL does.
//   rails  bytes (N / g - 1) through each NIC, then bytes N / g (g - 1) over NVLink, one after the
//          other; two rings of N / g and of g ranks.
//
// 0 for one rank.
double CollectiveSeconds(const ExchangeOptions& options, int32_t num_nodes, int32_t gpus_per_node,
                         double bytes);

}  // namespace latentd

#endif  // LATENTD_SERVER_BENCH_EXCHANGE_MODEL_H_
