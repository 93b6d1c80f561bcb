#include "engine/model/host_memory.h"

#include <gtest/gtest.h>

#include "tests/engine/model/tiny_checkpoint.h"

namespace latentd {
namespace {

constexpr uint64_t kMib = 1 << 20;

// A /proc and /sys made of files.
class HostMemoryTest : public testing::Test {
 protected:
  void Write(const std::string& file, const std::string& text) {
    const std::filesystem::path path = dir_.path() / file;
    std::filesystem::create_directories(path.parent_path());
    WriteAll(path, text);
  }
  uint64_t Available() const { return AvailableMemoryBytes(dir_.path()); }

  TempDir dir_;
};

TEST_F(HostMemoryTest, ThisMachineHasSome) {
  EXPECT_GT(AvailableMemoryBytes(), kMib);
  EXPECT_LT(AvailableMemoryBytes(), uint64_t{1} << 50);
}

TEST_F(HostMemoryTest, NothingToReadIsNoLimit) { EXPECT_EQ(Available(), UINT64_MAX); }

TEST_F(HostMemoryTest, MemAvailable) {
  Write("proc/meminfo", "MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:    2048 kB\n");
  EXPECT_EQ(Available(), 2 * kMib);
}

TEST_F(HostMemoryTest, GroupOfVersion2) {
  Write("proc/meminfo", "MemAvailable: 1048576 kB\n");
  Write("proc/self/cgroup", "0::/pod/app\n");
  Write("sys/fs/cgroup/pod/app/memory.max", "max\n");
  EXPECT_EQ(Available(), 1024 * kMib);
  // The limit of a group above counts; cached files can be dropped.
  Write("sys/fs/cgroup/pod/memory.max", std::to_string(100 * kMib));
  Write("sys/fs/cgroup/pod/memory.current", std::to_string(90 * kMib));
  Write("sys/fs/cgroup/pod/memory.stat", "anon 5\ninactive_file 41943040\nactive_file 20971520\n");
  EXPECT_EQ(Available(), 70 * kMib);
  Write("sys/fs/cgroup/memory.max", std::to_string(60 * kMib));
  EXPECT_EQ(Available(), 60 * kMib);
  // Over its limit: nothing is left, not a huge number.
  Write("sys/fs/cgroup/memory.current", std::to_string(61 * kMib));
  EXPECT_EQ(Available(), 0u);
}

TEST_F(HostMemoryTest, ContainerWhosePathIsTheHosts) {
  Write("proc/self/cgroup", "0::/kubepods/burstable/pod1234\n");
  Write("sys/fs/cgroup/memory.max", std::to_string(8 * kMib));
  EXPECT_EQ(Available(), 8 * kMib);
}

TEST_F(HostMemoryTest, GroupOfVersion1) {
  Write("proc/self/cgroup", "5:cpu,cpuacct:/x\n9:memory:/docker/a\n1:name=systemd:/y\n");
  Write("sys/fs/cgroup/memory/docker/a/memory.limit_in_bytes", std::to_string(10 * kMib));
  Write("sys/fs/cgroup/memory/docker/a/memory.usage_in_bytes", std::to_string(4 * kMib));
  EXPECT_EQ(Available(), 6 * kMib);
}

TEST_F(HostMemoryTest, Garbage) {
  Write("proc/meminfo", "MemAvailable: lots\nMemAvailable:\n\n");
  Write("proc/self/cgroup", "0\n:::\n0::\n");
  Write("sys/fs/cgroup/memory.max", "many\n");
  EXPECT_EQ(Available(), UINT64_MAX);
}

}  // namespace
}  // namespace latentd
