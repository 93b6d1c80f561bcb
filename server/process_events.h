#ifndef LATENTD_SERVER_PROCESS_EVENTS_H_
#define LATENTD_SERVER_PROCESS_EVENTS_H_

#include "absl/time/time.h"

namespace latentd {

// SIGTERM and SIGINT of the process, and word from its other threads, as one thing to wait for. To
// be made before any other thread.
class ProcessEvents {
 public:
  // Blocks the signals in this thread and those that it begins. SIGPIPE is ignored from then on.
  ProcessEvents();
  ~ProcessEvents();
  ProcessEvents(const ProcessEvents&) = delete;
  ProcessEvents& operator=(const ProcessEvents&) = delete;

  // Ends a Wait(). Any thread.
  void Wake();

  // Waits for a signal, Wake() or the end of `timeout`. The signal's number; 0 if none came.
  int Wait(absl::Duration timeout);

 private:
  int signals_ = -1;  // signalfd
  int wake_ = -1;     // eventfd
};

}  // namespace latentd

#endif  // LATENTD_SERVER_PROCESS_EVENTS_H_
