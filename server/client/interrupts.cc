#include "server/client/interrupts.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <utility>

#include "engine/status.h"

namespace latentd {
namespace {

// The write end of the living object's pipe; -1: there is none. A signal handler reaches only this.
std::atomic<int> interrupt_fd = -1;

void OnSignal(int) {
  const int saved_errno = errno;
  const int fd = interrupt_fd.load();
  // Where the pipe is full there is nothing to add.
  if (fd >= 0) (void)!write(fd, "!", 1);
  errno = saved_errno;
}

}  // namespace

Interrupts::Interrupts() {
  LATENTD_CHECK(pipe2(pipe_.data(), O_CLOEXEC | O_NONBLOCK) == 0);
  LATENTD_CHECK(interrupt_fd.exchange(pipe_[1]) == -1);
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;  // who wants to wake up polls fd()
  sigemptyset(&action.sa_mask);
  LATENTD_CHECK(sigaction(SIGINT, &action, &previous_) == 0);
}

Interrupts::~Interrupts() {
  sigaction(SIGINT, &previous_, nullptr);
  interrupt_fd = -1;
  close(pipe_[0]);
  close(pipe_[1]);
}

bool Interrupts::pending() const {
  pollfd poll_fd = {.fd = fd(), .events = POLLIN, .revents = 0};
  return poll(&poll_fd, 1, 0) > 0;
}

void Interrupts::Clear() {
  char bytes[64];
  while (read(fd(), bytes, sizeof(bytes)) > 0) {
  }
}

bool Interrupts::Sleep(absl::Duration duration) const {
  const absl::Time end = absl::Now() + duration;
  while (true) {
    const timespec left = absl::ToTimespec(std::max(end - absl::Now(), absl::ZeroDuration()));
    pollfd poll_fd = {.fd = fd(), .events = POLLIN, .revents = 0};
    const int ready = ppoll(&poll_fd, 1, &left, nullptr);
    if (ready > 0) return true;
    if (ready == 0) return false;
    if (errno != EINTR) return false;
  }
}

OnInterrupt::OnInterrupt(const Interrupts& interrupts, std::function<void()> action)
    : end_fd_(eventfd(0, EFD_CLOEXEC)) {
  LATENTD_CHECK(end_fd_ >= 0);
  thread_ = std::thread([interrupt = interrupts.fd(), end = end_fd_, action = std::move(action)] {
    pollfd poll_fds[] = {{.fd = interrupt, .events = POLLIN, .revents = 0},
                         {.fd = end, .events = POLLIN, .revents = 0}};
    while (poll(poll_fds, 2, -1) < 0 && errno == EINTR) {
    }
    if (poll_fds[0].revents != 0) action();
  });
}

OnInterrupt::~OnInterrupt() {
  eventfd_write(end_fd_, 1);
  thread_.join();
  close(end_fd_);
}

}  // namespace latentd
