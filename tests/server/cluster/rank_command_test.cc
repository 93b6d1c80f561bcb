#include "server/cluster/rank_command.h"

#include <stdlib.h>
#include <unistd.h>

#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace latentd {
namespace {

using ::testing::Contains;
using ::testing::Not;
using ::testing::StartsWith;

// What a child makes of its arguments, as main() and CLI11 take them apart.
ServeConfig Understood(const ProcessCommand& command, const Environment& environment) {
  std::vector<std::pair<std::string, std::string>> flags;
  for (size_t i = 2; i < command.arguments.size(); ++i) {
    const std::string& argument = command.arguments[i];
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(2, equals - 2);
    if (name == "rank" || name == "parent-pid") continue;
    flags.emplace_back(
        name, equals == std::string::npos ? command.arguments[++i] : argument.substr(equals + 1));
  }
  const auto config = LoadServeConfig("", flags, environment);
  EXPECT_TRUE(config.ok()) << config.status();
  return config.value_or(ServeConfig());
}

const Environment kNone = [](const char*) -> const char* { return nullptr; };

TEST(RankCommandTest, ARankHasTheConfigurationOfItsParent) {
  // Every key at a value that is not its default.
  ServeConfig config;
  for (const ConfigKey& key : ConfigKeys()) {
    for (const char* value : {"7s", "12GiB", "4000", "12", "4", "1", "true", "false", "cpu",
                              "dummy", "debug", "json", "a b=c", "10.0.0.1:77"}) {
      if (ConfigValue(key, config) != ConfigValue(key, ServeConfig())) break;
      (void)SetConfigValue(key, value, &config);
    }
  }
  config.world_size = 12;
  config.num_nodes = 3;
  config.node = 2;
  config.max_step_tokens = config.max_running;
  config.listen = "0.0.0.0:1";
  config.http_listen = "";
  config.threads = 3;
  config.device = 2;
  const ProcessCommand command = RankCommand(config, "leader:5", 9);
  EXPECT_EQ(command.executable, "/proc/self/exe");
  ASSERT_GE(command.arguments.size(), 4u);
  EXPECT_EQ(command.arguments[1], "rank");
  EXPECT_THAT(command.arguments, Contains("--rank=9"));
  EXPECT_THAT(command.arguments, Contains("--parent-pid=" + std::to_string(getpid())));
  ServeConfig expected = config;
  expected.leader = "leader:5";
  expected.device = 3;  // the second rank of its node
  EXPECT_EQ(DescribeConfig(Understood(command, kNone)), DescribeConfig(expected));
}

// The environment of a pod says what its configuration may have said otherwise.
TEST(RankCommandTest, APodsVariablesDoNotMoveAChild) {
  ServeConfig config;
  config.world_size = 2;
  const Environment pod = [](const char* name) -> const char* {
    return std::string_view(name) == "LWS_GROUP_SIZE"     ? "2"
           : std::string_view(name) == "LWS_WORKER_INDEX" ? "1"
                                                          : "elsewhere";
  };
  const ServeConfig child = Understood(RankCommand(config, "127.0.0.1:5", 1), pod);
  EXPECT_EQ(child.num_nodes, 1);
  EXPECT_EQ(child.node, 0);
  EXPECT_EQ(child.leader, "127.0.0.1:5");
}

TEST(RankCommandTest, RanksOfANodeShareItsCores) {
  ServeConfig config;
  config.world_size = 1024;
  EXPECT_EQ(Understood(RankCommand(config, "a:1", 0), kNone).threads, 1);
}

TEST(RankCommandTest, NvlinkMulticastIsOffUnlessTheEnvironmentSaysOtherwise) {
  unsetenv("NCCL_NVLS_ENABLE");
  EXPECT_THAT(RankCommand({}, "a:1", 0).environment, Contains("NCCL_NVLS_ENABLE=0"));
  EXPECT_THAT(RankCommand({}, "a:1", 0).environment, Contains("NVSHMEM_DISABLE_NVLS=1"));
  setenv("NCCL_NVLS_ENABLE", "1", 1);
  EXPECT_THAT(RankCommand({}, "a:1", 0).environment, Not(Contains(StartsWith("NCCL_NVLS"))));
  unsetenv("NCCL_NVLS_ENABLE");
}

TEST(DialAddressTest, AllAddressesAreReachedAtLoopback) {
  EXPECT_EQ(DialAddress("0.0.0.0:0", 7), "127.0.0.1:7");
  EXPECT_EQ(DialAddress("[::]:50052", 50052), "[::1]:50052");
  EXPECT_EQ(DialAddress("10.1.2.3:0", 7), "10.1.2.3:7");
  EXPECT_EQ(DialAddress("host:9", 9), "host:9");
}

}  // namespace
}  // namespace latentd
