// What the tests of ProcessSupervisor start: a process that does as its arguments say.

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "server/cluster/process_supervisor.h"

namespace latentd {
namespace {

// One line at the end of `file`, in one piece.
void Tell(const char* file, const std::string& line) {
  const int fd = open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  const std::string text = line + "\n";
  if (fd < 0 || write(fd, text.data(), text.size()) < 0) _exit(99);
  close(fd);
}

[[noreturn]] void Sleep() {
  while (true) pause();
}

// What it was given by its parent.
std::string Inherited() {
  std::string text;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code code;
    const auto target = std::filesystem::read_symlink(entry.path(), code);
    if (target.string().find("/fd") == std::string::npos) {  // the listing's own
      text += entry.path().filename().string() + " ";
    }
  }
  sigset_t blocked;
  sigprocmask(SIG_BLOCK, nullptr, &blocked);
  struct sigaction on_pipe;
  sigaction(SIGPIPE, nullptr, &on_pipe);
  const char* given = std::getenv("SUPERVISED_GIVEN");
  const char* replaced = std::getenv("SUPERVISED_REPLACED");
  text += std::string("given=") + (given ? given : "none");
  text += std::string(" replaced=") + (replaced ? replaced : "none");
  text += sigismember(&blocked, SIGTERM) ? " blocked" : " unblocked";
  text += on_pipe.sa_handler == SIG_IGN ? " ignored" : " default";
  text += getpgrp() == getpid() ? " own-group" : " same-group";
  return text;
}

// A parent of two that can be killed.
[[noreturn]] void RunFamily(const std::string& dir) {
  ProcessSupervisor supervisor(
      {.command =
           [dir](int32_t rank) {
             return ProcessCommand{
                 "/proc/self/exe",
                 {"child", "tied", dir + "/" + std::to_string(rank), std::to_string(getpid())},
                 {}};
           },
       .on_exit = nullptr});
  supervisor.Start({0, 1});
  Sleep();
}

int Main(int argc, char** argv) {
  const std::string mode = argc > 2 ? argv[1] : "";
  const char* argument = argc > 2 ? argv[2] : "";
  if (mode == "exit") return std::atoi(argument);
  if (mode == "inherited") {
    Tell(argument, Inherited());
    return 0;
  }
  if (mode == "polite") {
    signal(SIGTERM, [](int) { _exit(0); });
    Tell(argument, std::to_string(getpid()));
    Sleep();
  }
  if (mode == "deaf") {
    signal(SIGTERM, SIG_IGN);
    Tell(argument, std::to_string(getpid()));
    Sleep();
  }
  if (mode == "tied" && argc > 3) {
    if (!EndWithParent(std::atoi(argv[3]))) return 3;
    const int fd = open(argument, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || flock(fd, LOCK_EX) != 0) return 4;
    if (write(fd, "locked", 6) != 6) return 5;
    Sleep();  // the lock ends with the process
  }
  if (mode == "family") RunFamily(argument);
  return 98;
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) { return latentd::Main(argc, argv); }
