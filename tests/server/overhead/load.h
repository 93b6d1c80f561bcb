#ifndef LATENTD_TESTS_SERVER_OVERHEAD_LOAD_H_
#define LATENTD_TESTS_SERVER_OVERHEAD_LOAD_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace latentd {

// What clients saw in a window of time.
struct LoadCounts {
  int64_t deltas = 0;
  int64_t single_token_deltas = 0;
  int64_t tokens = 0;
  std::vector<int32_t> latency_histogram;  // tokens by age on arrival, in TokenClock ticks
};

// Reads many StreamChat answers at once, on one thread over a few connections, doing as little as
// it can.
class Load {
 public:
  Load(const std::string& address, int num_streams, int num_connections);
  ~Load();  // cancels the streams

  // Until each stream has had a token. False if a stream has ended.
  bool AwaitAllFlowing();
  // What came since the last call. False if a stream has ended.
  bool TakeCounts(LoadCounts* counts);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_OVERHEAD_LOAD_H_
