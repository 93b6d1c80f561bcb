#ifndef LATENTD_SERVER_CLIENT_INTERRUPTS_H_
#define LATENTD_SERVER_CLIENT_INTERRUPTS_H_

#include <array>
#include <csignal>
#include <functional>
#include <thread>

#include "absl/time/time.h"

namespace latentd {

// Ctrl-C as an event rather than the end of the program. While an object lives, SIGINT makes fd()
// readable, until Clear(). At most one object at a time; not for use from several threads, except
// pending() and fd().
class Interrupts {
 public:
  Interrupts();
  ~Interrupts();
  Interrupts(const Interrupts&) = delete;
  Interrupts& operator=(const Interrupts&) = delete;

  // For poll(2): readable while pending().
  int fd() const { return pipe_[0]; }
  // Whether Ctrl-C came since construction or Clear().
  bool pending() const;
  void Clear();
  // Sleeps for `duration`; true, and at once, when Ctrl-C is pending or comes.
  bool Sleep(absl::Duration duration) const;

 private:
  std::array<int, 2> pipe_;
  struct sigaction previous_;
};

// Calls `action` once, from its own thread, when Ctrl-C is pending or comes within the object's
// life.
class OnInterrupt {
 public:
  OnInterrupt(const Interrupts& interrupts, std::function<void()> action);
  ~OnInterrupt();
  OnInterrupt(const OnInterrupt&) = delete;
  OnInterrupt& operator=(const OnInterrupt&) = delete;

 private:
  int end_fd_;  // eventfd: readable when the object's life ends
  std::thread thread_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_INTERRUPTS_H_
