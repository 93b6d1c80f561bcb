// A process that uses a store is killed at random moments, and the next goes on: nothing that was
// answered is lost, nothing is there twice or in part. LATENTD_TEST_LONG=1: 200 times.
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

#include <cstdlib>
#include <fstream>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "tests/server/batch/store_fixture.h"
#include "tests/server/cluster/within.h"

extern char** environ;

namespace latentd {
namespace {

class StoreKillTest : public ::testing::TestWithParam<int> {
 protected:
  pid_t Spawn() {
    std::string program = STORE_CHILD, folder = folder_.path().string(),
                seed = absl::StrCat(GetParam());
    char* const arguments[] = {program.data(), folder.data(), seed.data(), nullptr};
    pid_t pid = 0;
    EXPECT_EQ(posix_spawn(&pid, STORE_CHILD, nullptr, nullptr, arguments, environ), 0);
    return pid;
  }

  // Lines of the log that begin so.
  int64_t Count(const std::string& word) {
    std::ifstream stream(folder_.path() / "log");
    int64_t count = 0;
    for (std::string line; std::getline(stream, line);) count += line.rfind(word, 0) == 0 ? 1 : 0;
    return count;
  }

  StoreFolder folder_;
};

TEST_P(StoreKillTest, TheNextGoesOn) {
  std::mt19937_64 random(static_cast<uint64_t>(GetParam()));
  const int num_lives = std::getenv("LATENTD_TEST_LONG") != nullptr ? 200 : 10;
  for (int life = 0; life < num_lives; ++life) {
    SCOPED_TRACE(life);
    const int64_t num_known = Count("known");
    const pid_t pid = Spawn();
    int status = 0;
    // Now and then while it opens; else while it works.
    if (random() % 4 != 0) {
      ASSERT_TRUE(Within(kPatience, [&] {
        return Count("known") > num_known || waitpid(pid, &status, WNOHANG) != 0;
      }));
    }
    absl::SleepFor(absl::Microseconds(static_cast<int64_t>(random() % 200'000)));
    kill(pid, SIGKILL);
    if (status == 0) waitpid(pid, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << "it ended by itself, with " << WEXITSTATUS(status);
  }
  EXPECT_GT(Count("known"), num_lives / 2);
}

INSTANTIATE_TEST_SUITE_P(Seeds, StoreKillTest, ::testing::Values(1, 2));

}  // namespace
}  // namespace latentd
