// How long a collective call of small and middling size takes. The ranks are threads of this
// process, for TCP too, whose bytes go through the loopback device: with more ranks than CPUs the
// numbers are those of the CPUs.

#include <benchmark/benchmark.h>

#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "engine/comm/communicator.h"
#include "engine/comm/local_communicator.h"
#include "tests/engine/comm/harness.h"

namespace latentd {
namespace {

using MakeGroup = Group (*)(int world_size, absl::Duration call_timeout);

// AllGather of `bytes` from each rank, or Barrier when that is 0.
void BM_Call(benchmark::State& state, MakeGroup make_group, size_t bytes) {
  const int world_size = static_cast<int>(state.range(0));
  Group group = make_group(world_size, absl::Minutes(1));
  const auto call = [&](int rank, std::vector<std::byte>* in, std::vector<std::byte>* out) {
    return bytes == 0 ? group[rank]->Barrier() : group[rank]->AllGather(*in, absl::MakeSpan(*out));
  };
  std::vector<std::thread> peers;
  for (int rank = 1; rank < world_size; ++rank) {
    peers.emplace_back([&, rank] {
      std::vector<std::byte> in(bytes), out(bytes * world_size);
      while (call(rank, &in, &out).ok()) continue;  // until rank 0 ends it
    });
  }
  std::vector<std::byte> in(bytes), out(bytes * world_size);
  for (auto _ : state) {
    if (const absl::Status status = call(0, &in, &out); !status.ok()) {
      state.SkipWithError(status.ToString().c_str());
      break;
    }
  }
  group[0]->Abort(absl::CancelledError("measured"));
  for (std::thread& peer : peers) peer.join();
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(bytes) * world_size);
}

void Ranks(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgName("ranks")->Arg(2)->Arg(4)->Arg(16)->UseRealTime()->Unit(
      benchmark::kMicrosecond);
}

BENCHMARK_CAPTURE(BM_Call, local_barrier, MakeLocalCommunicators, 0)->Apply(Ranks);
BENCHMARK_CAPTURE(BM_Call, local_8k, MakeLocalCommunicators, 8 << 10)->Apply(Ranks);
BENCHMARK_CAPTURE(BM_Call, local_1m, MakeLocalCommunicators, 1 << 20)->Apply(Ranks);
BENCHMARK_CAPTURE(BM_Call, tcp_barrier, MakeTcpGroup, 0)->Apply(Ranks);
BENCHMARK_CAPTURE(BM_Call, tcp_8k, MakeTcpGroup, 8 << 10)->Apply(Ranks);
BENCHMARK_CAPTURE(BM_Call, tcp_1m, MakeTcpGroup, 1 << 20)->Apply(Ranks);

}  // namespace
}  // namespace latentd

BENCHMARK_MAIN();
