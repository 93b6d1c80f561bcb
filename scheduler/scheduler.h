#ifndef LATENTD_SCHEDULER_SCHEDULER_H_
#define LATENTD_SCHEDULER_SCHEDULER_H_

#include <cstdint>

namespace latentd {

struct SchedulerConfig {
  int32_t max_step_tokens = 8192;  // token budget of a step; never more than the engine's
  int32_t max_running = 256;       // sequences in a step; never more than the engine's
  int32_t max_waiting = 1024;      // beyond this, a request is refused
  bool prefix_caching = true;
};

}  // namespace latentd

#endif  // LATENTD_SCHEDULER_SCHEDULER_H_
