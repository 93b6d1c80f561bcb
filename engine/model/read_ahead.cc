#include "engine/model/read_ahead.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/model/load_jobs.h"

namespace latentd {
namespace {

// Brings [begin, begin + size) of a mapped file into memory.
absl::Status Populate(const std::string& name, const std::byte* begin, size_t size) {
#ifndef MADV_POPULATE_READ
  constexpr int MADV_POPULATE_READ = 22;  // Linux 5.14
#endif
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(begin) / page * page;
  const size_t length = reinterpret_cast<uintptr_t>(begin) + size - address;
  if (::madvise(reinterpret_cast<void*>(address), length, MADV_POPULATE_READ) == 0) {
    return absl::OkStatus();
  }
  if (errno == EINVAL) {  // An older kernel: it reads in the background.
    ::madvise(reinterpret_cast<void*>(address), length, MADV_WILLNEED);
    return absl::OkStatus();
  }
  return absl::DataLossError(absl::StrCat("'", name, "' cannot be read: ", std::strerror(errno),
                                          " (was its file shortened, or is its disk failing?)"));
}

}  // namespace

absl::Status ReadAhead(const Checkpoint& checkpoint,
                       const std::set<std::string, std::less<>>& names,
                       const LoadProgress& progress) {
  std::vector<LoadJob> jobs;
  for (const std::string& name : names) {
    const TensorView* view = checkpoint.Find(name);
    if (view == nullptr) continue;
    for (size_t offset = 0; offset < view->num_bytes(); offset += kLoadJobBytes) {
      const size_t size = std::min<size_t>(kLoadJobBytes, view->num_bytes() - offset);
      jobs.push_back(
          {size, [&name, data = view->data + offset, size] { return Populate(name, data, size); }});
    }
  }
  return RunLoadJobs(jobs, progress);
}

}  // namespace latentd
