#include "server/cluster/process_supervisor.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "engine/status.h"
#include "fmt/format.h"
#include "server/log.h"

extern char** environ;

namespace latentd {
namespace {

// Owns what posix_spawn is told beside the command.
class SpawnSettings {
 public:
  SpawnSettings() {
    posix_spawn_file_actions_init(&files_);
    posix_spawn_file_actions_addopen(&files_, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&files_, STDERR_FILENO, STDOUT_FILENO);
    posix_spawn_file_actions_addclosefrom_np(&files_, STDERR_FILENO + 1);
    posix_spawnattr_init(&attributes_);
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_setsigmask(&attributes_, &none);
    posix_spawnattr_setsigdefault(&attributes_, &all);
    posix_spawnattr_setpgroup(&attributes_, 0);
    posix_spawnattr_setflags(
        &attributes_, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETPGROUP);
  }
  ~SpawnSettings() {
    posix_spawn_file_actions_destroy(&files_);
    posix_spawnattr_destroy(&attributes_);
  }
  SpawnSettings(const SpawnSettings&) = delete;
  SpawnSettings& operator=(const SpawnSettings&) = delete;

  const posix_spawn_file_actions_t* files() const { return &files_; }
  const posix_spawnattr_t* attributes() const { return &attributes_; }

 private:
  posix_spawn_file_actions_t files_;
  posix_spawnattr_t attributes_;
};

std::string_view NameOf(std::string_view variable) {
  return variable.substr(0, variable.find('='));
}

std::vector<std::string> Environment(const std::vector<std::string>& own) {
  std::vector<std::string> variables = own;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const bool replaced = std::any_of(own.begin(), own.end(), [&](const std::string& given) {
      return NameOf(given) == NameOf(*variable);
    });
    if (!replaced) variables.emplace_back(*variable);
  }
  return variables;
}

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> pointers;
  for (std::string& string : strings) pointers.push_back(string.data());
  pointers.push_back(nullptr);
  return pointers;
}

struct Spawned {
  pid_t pid = 0;
  int pidfd = -1;  // readable once the process has exited
};

absl::StatusOr<Spawned> Spawn(ProcessCommand command) {
  const SpawnSettings settings;
  std::vector<std::string> variables = Environment(command.environment);
  pid_t pid = 0;
  const int error =
      posix_spawn(&pid, command.executable.c_str(), settings.files(), settings.attributes(),
                  Pointers(command.arguments).data(), Pointers(variables).data());
  if (error != 0) {
    return absl::UnavailableError(
        fmt::format("{} cannot be started: {}", command.executable, strerror(error)));
  }
  const int pidfd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));  // Linux 5.3; close on exec
  if (pidfd < 0) {
    const absl::Status why = absl::UnavailableError(
        fmt::format("process {} cannot be watched: {}", pid, strerror(errno)));
    kill(pid, SIGKILL);
    waitpid(pid, nullptr, 0);
    return why;
  }
  return Spawned{pid, pidfd};
}

}  // namespace

ProcessSupervisor::ProcessSupervisor(Options options)
    : options_(std::move(options)), wake_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  LATENTD_CHECK(wake_ >= 0);
  thread_ = std::thread([this] { Run(); });
}

ProcessSupervisor::~ProcessSupervisor() {
  Stop(absl::ZeroDuration());
  {
    absl::MutexLock lock(&mutex_);
    exiting_ = true;
  }
  Wake();
  thread_.join();
  close(wake_);
}

void ProcessSupervisor::Start(absl::Span<const int32_t> ranks) {
  {
    absl::MutexLock lock(&mutex_);
    for (int32_t rank : ranks) children_.try_emplace(rank);
  }
  Wake();
}

void ProcessSupervisor::KillRank(int32_t rank, int32_t pid, const std::string& why) {
  absl::MutexLock lock(&mutex_);
  const auto found = children_.find(rank);
  if (found == children_.end() || pid == 0 || found->second.pid != pid) return;
  LogEvent(spdlog::level::warn, "killing a rank", {{"rank", rank}, {"pid", pid}, {"why", why}});
  kill(pid, SIGKILL);  // it is not reaped yet: the pid is still its own
}

void ProcessSupervisor::Stop(absl::Duration grace) {
  absl::MutexLock lock(&mutex_);
  // Those that wait to be started again are not.
  std::erase_if(children_, [](const auto& entry) { return entry.second.pid == 0; });
  const bool at_once = grace <= absl::ZeroDuration();
  Signal(at_once ? SIGKILL : SIGTERM);
  kill_at_ = at_once ? absl::InfiniteFuture() : absl::Now() + grace;
  Wake();
  mutex_.Await(absl::Condition(this, &ProcessSupervisor::NoneRuns));
  kill_at_.reset();
  Wake();  // for what was to be started meanwhile
}

bool ProcessSupervisor::NoneRuns() const {
  return std::all_of(children_.begin(), children_.end(),
                     [](const auto& entry) { return entry.second.pid == 0; });
}

int32_t ProcessSupervisor::pid(int32_t rank) const {
  absl::MutexLock lock(&mutex_);
  const auto found = children_.find(rank);
  return found == children_.end() ? 0 : found->second.pid;
}

void ProcessSupervisor::Signal(int signal) {
  for (const auto& [rank, child] : children_) {
    if (child.pid != 0) kill(child.pid, signal);
  }
}

void ProcessSupervisor::Run() {
  absl::Time deadline = absl::InfinitePast();
  while (true) {
    Wait(deadline);
    std::vector<Exit> exits;
    {
      absl::MutexLock lock(&mutex_);
      if (exiting_) return;
      const absl::Time now = absl::Now();
      exits = Reap(now);
      if (kill_at_ && now >= *kill_at_) {
        LogEvent(spdlog::level::warn, "ranks did not exit in time: killing them",
                 {{"ranks", children_.size()}});
        Signal(SIGKILL);
        kill_at_ = absl::InfiniteFuture();
      }
      const std::vector<Exit> failed = StartDue(now);
      exits.insert(exits.end(), failed.begin(), failed.end());
      deadline = NextDeadline();
    }
    for (const Exit& exit : exits) {
      if (options_.on_exit) options_.on_exit(exit.rank, exit.pid, exit.how);
    }
  }
}

void ProcessSupervisor::Wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_, &one, sizeof(one));
}

void ProcessSupervisor::Wait(absl::Time deadline) {
  std::vector<pollfd> fds = {{.fd = wake_, .events = POLLIN, .revents = 0}};
  {
    absl::MutexLock lock(&mutex_);
    for (const auto& [rank, child] : children_) {
      if (child.pid != 0) fds.push_back({.fd = child.pidfd, .events = POLLIN, .revents = 0});
    }
  }
  const absl::Duration left = deadline - absl::Now();
  const int timeout_ms =
      left == absl::InfiniteDuration()
          ? -1
          : static_cast<int>(std::clamp<int64_t>(
                absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1))), 0,
                3600 * 1000));
  poll(fds.data(), fds.size(), timeout_ms);
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t drained = read(wake_, &count, sizeof(count));
}

std::vector<ProcessSupervisor::Exit> ProcessSupervisor::Reap(absl::Time now) {
  std::vector<Exit> exits;
  for (auto entry = children_.begin(); entry != children_.end();) {
    const int32_t rank = entry->first;
    Child& child = entry->second;
    int status = 0;
    if (child.pid == 0 || waitpid(child.pid, &status, WNOHANG) != child.pid) {
      ++entry;
      continue;
    }
    close(child.pidfd);
    const int32_t pid = std::exchange(child.pid, 0);
    const std::string how = DescribeExit(status);
    if (kill_at_) {
      LogEvent(spdlog::level::info, "rank ended", {{"rank", rank}, {"pid", pid}, {"how", how}});
      entry = children_.erase(entry);
      continue;
    }
    ScheduleStart(now, &child);
    LogEvent(spdlog::level::warn, "rank exited",
             {{"rank", rank},
              {"pid", pid},
              {"how", how},
              {"again_in", absl::FormatDuration(child.wait)}});
    exits.push_back({.rank = rank, .pid = pid, .how = how});
    ++entry;
  }
  return exits;
}

void ProcessSupervisor::ScheduleStart(absl::Time now, Child* child) {
  const bool steady = now - child->started_at >= options_.steady_after;
  child->wait = steady || child->wait == absl::ZeroDuration()
                    ? options_.shortest_wait
                    : std::min(2 * child->wait, options_.longest_wait);
  child->start_at = now + child->wait;
}

std::vector<ProcessSupervisor::Exit> ProcessSupervisor::StartDue(absl::Time now) {
  std::vector<Exit> failed;
  if (kill_at_) return failed;
  for (auto& [rank, child] : children_) {
    if (child.pid != 0 || child.start_at > now) continue;
    child.started_at = now;
    const absl::StatusOr<Spawned> spawned = Spawn(options_.command(rank));
    if (!spawned.ok()) {
      ScheduleStart(now, &child);
      const std::string why(spawned.status().message());
      LogEvent(spdlog::level::err, why,
               {{"rank", rank}, {"again_in", absl::FormatDuration(child.wait)}});
      failed.push_back({.rank = rank, .pid = 0, .how = why});
      continue;
    }
    child.pid = spawned->pid;
    child.pidfd = spawned->pidfd;
    LogEvent(spdlog::level::info, "rank started", {{"rank", rank}, {"pid", child.pid}});
  }
  return failed;
}

absl::Time ProcessSupervisor::NextDeadline() const {
  absl::Time next = kill_at_.value_or(absl::InfiniteFuture());
  for (const auto& [rank, child] : children_) {
    if (child.pid == 0) next = std::min(next, child.start_at);
  }
  return next;
}

bool EndWithParent(int32_t parent_pid) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // It may have ended before that was asked for.
  return getppid() == parent_pid;
}

std::string DescribeExit(int wait_status) {
  if (WIFEXITED(wait_status)) return fmt::format("exit code {}", WEXITSTATUS(wait_status));
  const int signal = WTERMSIG(wait_status);
  return fmt::format("signal {} ({})", signal, strsignal(signal));
}

}  // namespace latentd
