#include "engine/comm/nccl_communicator.h"

#include <dlfcn.h>
#include <nccl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "engine/comm/library_function.h"
#include "engine/comm/nccl_log.h"
#include "engine/comm/network_interfaces.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr int kMinVersion = 21800;  // the first whose non-blocking communicators can be aborted

// The functions of NCCL that are used.
struct Api {
  decltype(&ncclGetVersion) GetVersion;
  decltype(&ncclGetUniqueId) GetUniqueId;
  decltype(&ncclGetErrorString) GetErrorString;
  decltype(&ncclGetLastError) GetLastError;
  decltype(&ncclCommInitRankConfig) CommInitRankConfig;
  decltype(&ncclCommGetAsyncError) CommGetAsyncError;
  decltype(&ncclCommAbort) CommAbort;
  decltype(&ncclAllGather) AllGather;
  decltype(&ncclReduceScatter) ReduceScatter;
  int version = 0;  // 22809 is 2.28.9

  std::string name() const {
    return absl::StrCat("NCCL ", version / 10000, ".", version / 100 % 100, ".", version % 100);
  }
};

bool FindAll(void* library, Api* api) {
  return FindFunction(library, "ncclGetVersion", &api->GetVersion) &&
         FindFunction(library, "ncclGetUniqueId", &api->GetUniqueId) &&
         FindFunction(library, "ncclGetErrorString", &api->GetErrorString) &&
         FindFunction(library, "ncclGetLastError", &api->GetLastError) &&
         FindFunction(library, "ncclCommInitRankConfig", &api->CommInitRankConfig) &&
         FindFunction(library, "ncclCommGetAsyncError", &api->CommGetAsyncError) &&
         FindFunction(library, "ncclCommAbort", &api->CommAbort) &&
         FindFunction(library, "ncclAllGather", &api->AllGather) &&
         FindFunction(library, "ncclReduceScatter", &api->ReduceScatter) &&
         api->GetVersion(&api->version) == ncclSuccess;
}

// NCCL's log, in memory, from which it is read what NCCL chose; none when the environment says
// where the log goes. One for the process: NCCL reads its environment once.
class LogFile {
 public:
  LogFile() {
    if (std::getenv("NCCL_DEBUG") != nullptr || std::getenv("NCCL_DEBUG_FILE") != nullptr) return;
    fd_ = memfd_create("nccl-log", MFD_CLOEXEC);
    if (fd_ < 0) return;
    setenv("NCCL_DEBUG", "INFO", /*overwrite=*/0);
    setenv("NCCL_DEBUG_FILE", absl::StrCat("/proc/self/fd/", fd_).c_str(), /*overwrite=*/0);
  }

  off_t size() const { return fd_ < 0 ? 0 : lseek(fd_, 0, SEEK_END); }
  // All that was written from `begin` on.
  NcclLog ReadFrom(off_t begin) const {
    NcclLog log;
    std::string text;
    std::array<char, 1 << 14> buffer;
    while (fd_ >= 0) {
      const ssize_t size = pread(fd_, buffer.data(), buffer.size(), begin);
      if (size <= 0) break;
      text.append(buffer.data(), size);
      begin += size;
    }
    for (const absl::string_view line : absl::StrSplit(text, '\n')) log.AddLine(line);
    return log;
  }

 private:
  int fd_ = -1;
};

const LogFile& TheLog() {
  static const auto* log = new LogFile();
  return *log;
}

absl::Status CheckInterfaces() {
  ASSIGN_OR_RETURN(const std::vector<NetworkInterface> interfaces, ListNetworkInterfaces());
  return FindSocketInterfaces(NcclNetworkSettings::FromEnvironment(), interfaces).status();
}

// The library stays loaded until the process ends: CUDA's libraries do not like to be unloaded.
absl::StatusOr<Api> LoadApi() {
  // Multicast over NVLink needs a fabric to itself; where GPUs are shared it fails in ways that
  // take the job along, and these messages gain little by it. NCCL reads its environment once.
  setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/0);
  TheLog();
  constexpr char kName[] = "libnccl.so.2";
  std::vector<std::string> names;
  if (const char* path = std::getenv("LATENTD_NCCL"); path != nullptr && *path != '\0') {
    names = {path};
  } else {
    names = {kName, absl::StrCat("/usr/local/cuda/lib64/", kName),
             absl::StrCat(LATENTD_NCCL_LIBRARIES "/", kName)};
  }
  std::vector<std::string> errors;
  for (const std::string& name : names) {
    void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      errors.push_back(dlerror());  // begins with the name
      continue;
    }
    Api api;
    if (!FindAll(library, &api)) {
      errors.push_back(absl::StrCat(name, ": lacks a function of NCCL"));
    } else if (api.version < kMinVersion) {
      errors.push_back(absl::StrCat(name, ": version ", api.version, ", needed is ", kMinVersion));
    } else {
      return api;
    }
  }
  return absl::UnavailableError(absl::StrCat("no NCCL: ", absl::StrJoin(errors, "; ")));
}

const absl::StatusOr<Api>& LoadedApi() {
  static const auto* api = new absl::StatusOr<Api>(LoadApi());
  return *api;
}

class Nccl : public NcclCommunicator {
 public:
  Nccl(const Api& api, int rank, int world_size, const ncclUniqueId& id)
      : api_(api), rank_(rank), world_size_(world_size), id_(id), log_begin_(TheLog().size()) {}

  ~Nccl() override {
    Abort(absl::CancelledError("the communicator is destroyed"));
    if (aborter_.joinable()) aborter_.join();
  }

  absl::Status Form(absl::Time deadline) override {
    RETURN_IF_ERROR(CheckInterfaces());
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;  // or neither a deadline nor Abort() could end it
    RETURN_IF_ERROR(Call("ncclCommInitRankConfig", [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return api_.CommInitRankConfig(&comm_, world_size_, id_, rank_, &config);
    }));
    return Settle("ncclCommInitRankConfig", deadline);
  }

  absl::Status AllGather(std::byte* slots, size_t bytes, cudaStream_t stream) override {
    RETURN_IF_ERROR(Call("ncclAllGather", [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return api_.AllGather(slots + rank_ * bytes, slots, bytes, ncclUint8, comm_, stream);
    }));
    return Settle("ncclAllGather", absl::InfiniteFuture());
  }

  absl::Status ReduceScatterBf16(const void* in, void* out, int64_t count,
                                 cudaStream_t stream) override {
    RETURN_IF_ERROR(Call("ncclReduceScatter", [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return api_.ReduceScatter(in, out, static_cast<size_t>(count), ncclBfloat16, ncclSum, comm_,
                                stream);
    }));
    return Settle("ncclReduceScatter", absl::InfiniteFuture());
  }

  absl::Status Check() override {
    absl::MutexLock lock(&mutex_);
    return CheckLocked("the group").status();
  }

  void Abort(const absl::Status& why) override {
    absl::MutexLock lock(&mutex_);
    AbortLocked(why);
  }

  std::string version() const override { return api_.name(); }
  std::string transport() const override {
    const std::optional<NcclTransport> slowest = TheLog().ReadFrom(log_begin_).slowest();
    return slowest ? TransportName(*slowest) : "";
  }
  std::string warning() const override {
    const NcclTransport expected =
        ExpectedNetwork(NcclNetworkSettings::FromEnvironment(), ListInfinibandPorts());
    return TheLog().ReadFrom(log_begin_).Warning(expected).value_or("");
  }

 private:
  // Calls NCCL unless it is over. A call of a non-blocking communicator is short, so the lock is.
  template <typename Function>
  absl::Status Call(const char* name, const Function& call) {
    absl::MutexLock lock(&mutex_);
    RETURN_IF_ERROR(why_);
    const ncclResult_t result = call();
    if (result != ncclSuccess && result != ncclInProgress) AbortLocked(Failure(name, result));
    return why_;
  }

  // Waits until the last call is done, and with it what it has enqueued.
  absl::Status Settle(const char* name, absl::Time deadline) {
    constexpr absl::Duration kPause = absl::Milliseconds(1);
    for (int64_t i = 0;; ++i) {
      {
        absl::MutexLock lock(&mutex_);
        ASSIGN_OR_RETURN(const bool in_progress, CheckLocked(name));
        if (!in_progress) return absl::OkStatus();
        if (absl::Now() >= deadline) {
          AbortLocked(absl::DeadlineExceededError(absl::StrCat(
              name, ": rank ", rank_, " of ", world_size_, " waited for the others in vain")));
          return why_;
        }
      }
      if (i < 1000) {
        std::this_thread::yield();  // a collective is enqueued in microseconds
      } else {
        absl::SleepFor(kPause);
      }
    }
  }

  // Whether something is in progress.
  absl::StatusOr<bool> CheckLocked(const char* name) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    RETURN_IF_ERROR(why_);
    if (comm_ == nullptr) return false;
    ncclResult_t state = ncclSuccess;
    ncclResult_t result = api_.CommGetAsyncError(comm_, &state);
    if (result == ncclSuccess) result = state;
    if (result == ncclSuccess || result == ncclInProgress) return result == ncclInProgress;
    AbortLocked(Failure(name, result));
    return why_;
  }

  absl::Status Failure(const char* name, ncclResult_t result) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const char* last = api_.GetLastError(comm_);
    return absl::UnavailableError(absl::StrCat(name, ": ", api_.GetErrorString(result),
                                               last != nullptr && *last != '\0' ? ": " : "",
                                               last != nullptr ? last : ""));
  }

  // ncclCommAbort tells the kernels to end first of all, and then waits for them and for the graphs
  // that know the communicator to go: in a thread of its own, as who waits for the step is to
  // destroy those.
  void AbortLocked(const absl::Status& why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!why_.ok()) return;
    why_ = why;
    if (comm_ == nullptr) return;
    aborter_ = std::thread([this, comm = std::exchange(comm_, nullptr)] { api_.CommAbort(comm); });
  }

  const Api api_;
  const int rank_, world_size_;
  const ncclUniqueId id_;
  const off_t log_begin_;
  absl::Mutex mutex_;
  ncclComm_t comm_ ABSL_GUARDED_BY(mutex_) = nullptr;
  absl::Status why_ ABSL_GUARDED_BY(mutex_);  // it is over
  std::thread aborter_;                       // started under the mutex, at most once
};

}  // namespace

absl::StatusOr<std::string> NcclCommunicator::MakeUniqueId() {
  RETURN_IF_ERROR(LoadedApi().status());
  RETURN_IF_ERROR(CheckInterfaces());
  const Api& api = *LoadedApi();
  ncclUniqueId id;
  if (const ncclResult_t result = api.GetUniqueId(&id); result != ncclSuccess) {
    return absl::UnavailableError(absl::StrCat("ncclGetUniqueId: ", api.GetErrorString(result),
                                               ": ", api.GetLastError(nullptr)));
  }
  return std::string(id.internal, sizeof(id.internal));
}

absl::StatusOr<std::unique_ptr<NcclCommunicator>> NcclCommunicator::Create(
    int rank, int world_size, const std::string& unique_id) {
  ncclUniqueId id;
  if (rank < 0 || rank >= world_size || unique_id.size() != sizeof(id.internal)) {
    return absl::InvalidArgumentError(absl::StrCat("NCCL: rank ", rank, " of ", world_size,
                                                   ", a unique id of ", unique_id.size(),
                                                   " bytes; it has ", sizeof(id.internal)));
  }
  RETURN_IF_ERROR(LoadedApi().status());
  std::memcpy(id.internal, unique_id.data(), sizeof(id.internal));
  return std::make_unique<Nccl>(*LoadedApi(), rank, world_size, id);
}

}  // namespace latentd
