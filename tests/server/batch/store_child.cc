// One life of a store for store_kill_test, which ends it: store_child FOLDER SEED. What it knows it
// appends to FOLDER/log, a line each, from which the next life goes on:
//   open        the store is about to be opened
//   found N R   it was after N operations, and opened R times there
//   known N     N operations were answered
// Exits 1 when the store is not as the log wants it.
#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "tests/server/batch/store_driver.h"

namespace latentd {
namespace {

// Operations that may have been asked for after the last that is known, those that were refused
// too.
constexpr int64_t kMaxUnknown = 1000;

struct Past {
  StorePoint point;
  int64_t num_known = 0;
  int num_opened = 0;  // since that point
};

Past ReadLog(uint64_t seed, const std::string& file) {
  Past past;
  std::ifstream stream(file);
  for (std::string word; stream >> word;) {
    if (word == "open") {
      ++past.num_opened;
    } else if (word == "known") {
      stream >> past.num_known;
    } else {
      int64_t num_ops = 0, reopened = 0;
      stream >> num_ops >> reopened;
      for (; past.point.num_ops < num_ops; ++past.point.num_ops) {
        past.point.model.Apply(OpAt(seed, past.point));
      }
      for (; reopened > 0; --reopened) past.point.model.Reopen();
      past.num_known = num_ops;
      past.num_opened = 0;
    }
  }
  return past;
}

int Live(const std::string& folder, uint64_t seed) {
  const std::string log = folder + "/log";
  const Past past = ReadLog(seed, log);
  const int fd = open(log.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  const auto note = [fd](const std::string& line) {
    if (write(fd, line.data(), line.size()) != static_cast<ssize_t>(line.size())) std::abort();
  };
  StoreDriver clock(seed, past.point, nullptr);
  StoreDriver* driver = &clock;
  note("open\n");
  absl::StatusOr<std::unique_ptr<BatchStore>> store =
      BatchStore::Open({.directory = folder + "/store",
                        .now = [&] { return driver->now(); },
                        .checkpoint_pages = 60});
  if (!store.ok()) {
    std::fprintf(stderr, "%s\n", store.status().ToString().c_str());
    return 1;
  }
  const std::string described = Describe(**store);
  const std::optional<StorePoint> point =
      FindPoint(seed, past.point, past.num_known, past.num_known + kMaxUnknown, past.num_opened + 1,
                described);
  if (!point.has_value()) {
    std::fprintf(stderr, "after %lld operations:\n%s", static_cast<long long>(past.num_known),
                 described.c_str());
    return 1;
  }
  note(absl::StrCat("found ", point->num_ops, " ", point->num_reopened, "\n"));
  StoreDriver life(seed, *point, [&](int64_t known) { note(absl::StrCat("known ", known, "\n")); });
  driver = &life;
  life.Run(std::numeric_limits<int64_t>::max(), store->get());
  for (const std::string& wrong : life.wrong()) std::fprintf(stderr, "%s\n", wrong.c_str());
  return 1;  // it was to be killed
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  return latentd::Live(argv[1], std::strtoull(argv[2], nullptr, 10));
}
