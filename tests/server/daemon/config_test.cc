#include "server/config.h"

#include <filesystem>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace latentd {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

absl::StatusOr<ServeConfig> Parse(std::string_view yaml) {
  ServeConfig config;
  if (absl::Status status = ApplyYaml(yaml, "latentd.yaml", &config); !status.ok()) return status;
  return config;
}

std::string Error(std::string_view yaml) {
  const absl::StatusOr<ServeConfig> config = Parse(yaml);
  if (config.ok()) return "(accepted)";
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(config.status().message());
}

TEST(ConfigTest, DefaultsAreWithinTheirOwnRanges) {
  const ServeConfig defaults;
  for (const ConfigKey& key : ConfigKeys()) {
    ServeConfig copy;
    EXPECT_TRUE(SetConfigValue(key, ConfigValue(key, defaults), &copy).ok()) << key.name;
    EXPECT_EQ(ConfigValue(key, copy), ConfigValue(key, defaults)) << key.name;
    EXPECT_FALSE(key.help.empty());
    EXPECT_NE(ConfigUnit(key), "") << key.name;
  }
  EXPECT_TRUE(LoadServeConfig("", {}).ok());
}

TEST(ConfigTest, EveryTypeIsParsed) {
  const auto config = Parse(
      "model: /models/v3\n"
      "http_listen: ''\n"
      "threads: 8\n"
      "kv_cache_memory: 1.5GiB\n"
      "max_message_bytes: 4096\n"
      "prefix_caching: false\n"
      "drain_timeout: 1h30m\n"
      "log_format: json\n");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->model, "/models/v3");
  EXPECT_EQ(config->http_listen, "");
  EXPECT_EQ(config->threads, 8);
  EXPECT_EQ(config->kv_cache_memory, int64_t{3} << 29);
  EXPECT_EQ(config->max_message_bytes, 4096);
  EXPECT_FALSE(config->prefix_caching);
  EXPECT_EQ(config->drain_timeout, absl::Minutes(90));
  EXPECT_EQ(config->log_format, "json");
  EXPECT_EQ(config->max_running, ServeConfig().max_running);
}

TEST(ConfigTest, SizesHaveUnits) {
  for (const auto& [text, bytes] :
       std::initializer_list<std::pair<const char*, int64_t>>{{"1048576", 1 << 20},
                                                              {"2MiB", 2 << 20},
                                                              {"2 MiB", 2 << 20},
                                                              {"3GB", 3000000000},
                                                              {"5TiB", int64_t{5} << 40}}) {
    ServeConfig config;
    ASSERT_TRUE(SetConfigValue(*FindConfigKey("kv_cache_memory"), text, &config).ok()) << text;
    EXPECT_EQ(config.kv_cache_memory, bytes) << text;
  }
  for (const char* text : {"", "GiB", "-1GiB", "1XiB", "1.5", "nan GiB", "inf GiB",
                           "99999999999TiB", "1e400GiB", "0x10"}) {
    ServeConfig config;
    const absl::Status status = SetConfigValue(*FindConfigKey("kv_cache_memory"), text, &config);
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("kv_cache_memory"), HasSubstr(text)))
        << text;
  }
}

TEST(ConfigTest, ErrorsNameKeyValueLimitAndLine) {
  EXPECT_EQ(Error("model: x\nmax_running: 0\n"),
            "latentd.yaml:2: max_running is '0'; allowed are 1 .. 65536");
  EXPECT_EQ(Error("max_running: 1.5\n"),
            "latentd.yaml:1: max_running is '1.5'; it must be a whole number");
  EXPECT_EQ(Error("load_format: pickle\n"),
            "latentd.yaml:1: load_format is 'pickle'; allowed are auto, safetensors, dummy");
  EXPECT_EQ(Error("\n\ndrain_timeout: 300\n"),
            "latentd.yaml:3: drain_timeout is '300'; it must be a duration with its unit, such as "
            "300s, 5m or 1h30m");
  EXPECT_THAT(Error("drain_timeout: -1s\n"), HasSubstr("allowed are 0 .. 24h"));
  EXPECT_THAT(Error("step_deadline: inf\n"), HasSubstr("allowed are 1s .. 24h"));
  EXPECT_THAT(Error("prefix_caching: yes\n"), HasSubstr("allowed are true, false"));
  EXPECT_THAT(Error("listen: nowhere\n"), HasSubstr("host:port"));
  EXPECT_THAT(Error("listen: 0.0.0.0:70000\n"), HasSubstr("0 .. 65535"));
}

TEST(ConfigTest, UnknownKeysNameTheNearest) {
  EXPECT_EQ(Error("max_runing: 5\n"),
            "latentd.yaml:1: unknown key 'max_runing'; did you mean 'max_running'?");
  EXPECT_EQ(Error("Max-Waitng: 5\n"),
            "latentd.yaml:1: unknown key 'Max-Waitng'; did you mean 'max_waiting'?");
  EXPECT_EQ(Error("zzzzzzzzzz: 5\n"), "latentd.yaml:1: unknown key 'zzzzzzzzzz'");
  EXPECT_EQ(NearestConfigKey("htp-listen"), "http_listen");
}

TEST(ConfigTest, MalformedFilesAreRefused) {
  EXPECT_THAT(Error("- a\n- b\n"), HasSubstr("must be a mapping"));
  EXPECT_THAT(Error("just words\n"), HasSubstr("must be a mapping"));
  EXPECT_THAT(Error("threads: [1, 2]\n"), HasSubstr("threads must be one value"));
  EXPECT_THAT(Error("threads:\n"), HasSubstr("threads has no value"));
  EXPECT_THAT(Error("threads: 1\nthreads: 2\n"),
              StartsWith("latentd.yaml:2: key 'threads' is given twice"));
  EXPECT_THAT(Error("threads: 1\n---\nthreads: 2\n"), HasSubstr("second document"));
  EXPECT_THAT(Error("threads: {\n"), StartsWith("latentd.yaml:"));
  EXPECT_THAT(Error("? [a]\n: 1\n"), HasSubstr("a key must be a plain word"));
  EXPECT_THAT(Error(std::string(5000, '[')), StartsWith("latentd.yaml:"));
  EXPECT_TRUE(Parse("").ok());
  EXPECT_TRUE(Parse("# nothing\n").ok());
}

TEST(ConfigTest, FlagsWinOverTheFile) {
  const std::filesystem::path file =
      std::filesystem::path(::testing::TempDir()) / "config_test.yaml";
  std::ofstream(file) << "max_running: 8\nmax_waiting: 9\n";
  const auto config = LoadServeConfig(file, {{"max_running", "16"}, {"max-running", "32"}});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->max_running, 32);
  EXPECT_EQ(config->max_waiting, 9);
  std::filesystem::remove(file);
  EXPECT_THAT(std::string(LoadServeConfig(file, {}).status().message()), HasSubstr(file.string()));
}

TEST(ConfigTest, KeysThatContradictEachOtherAreRefused) {
  const auto error = [](std::vector<std::pair<std::string, std::string>> flags) {
    return std::string(LoadServeConfig("", flags).status().message());
  };
  EXPECT_THAT(error({{"max_step_tokens", "8"}}),
              AllOf(HasSubstr("max_step_tokens is 8"), HasSubstr("max_running is 256")));
  EXPECT_THAT(error({{"http_listen", "0.0.0.0:50051"}}), HasSubstr("must differ"));
  EXPECT_THAT(error({{"batch_dir", "/data"}, {"max_message_bytes", "1MiB"}}),
              HasSubstr("batch_max_item_bytes is 4MiB and max_message_bytes is 1MiB"));
  EXPECT_THAT(error({{"listen", ""}}), HasSubstr("listen is empty"));
  EXPECT_EQ(error({{"listen", "0.0.0.0:0"}, {"http_listen", "0.0.0.0:0"}}), "");
}

// One process of a LeaderWorkerSet of `size` pods.
Environment Pod(std::string size, std::string index) {
  return [size, index](const char* name) -> const char* {
    if (std::string_view(name) == "LWS_GROUP_SIZE") return size.c_str();
    if (std::string_view(name) == "LWS_WORKER_INDEX") return index.c_str();
    return std::string_view(name) == "LWS_LEADER_ADDRESS" ? "latentd-0.latentd.ns" : nullptr;
  };
}

const Environment kNoPod = [](const char*) -> const char* { return nullptr; };

TEST(ConfigTest, ALeaderWorkerSetGivesAProcessItsPlace) {
  const auto worker = LoadServeConfig("", {{"world_size", "16"}}, Pod("2", "1"));
  ASSERT_TRUE(worker.ok()) << worker.status();
  EXPECT_EQ(worker->num_nodes, 2);
  EXPECT_EQ(worker->node, 1);
  EXPECT_EQ(worker->leader, "latentd-0.latentd.ns:50052");
  EXPECT_EQ(RanksPerNode(*worker), 8);

  const auto other_port =
      LoadServeConfig("", {{"world_size", "2"}, {"cluster_listen", "0.0.0.0:7000"}}, Pod("2", "1"));
  ASSERT_TRUE(other_port.ok()) << other_port.status();
  EXPECT_EQ(other_port->leader, "latentd-0.latentd.ns:7000");

  const auto leader = LoadServeConfig("", {{"world_size", "2"}}, Pod("2", "0"));
  ASSERT_TRUE(leader.ok()) << leader.status();
  EXPECT_EQ(leader->leader, "");  // it dials itself through cluster_listen
  EXPECT_EQ(ClusterListenAddress(*leader), "0.0.0.0:50052");

  // What is given wins.
  const auto given = LoadServeConfig(
      "", {{"world_size", "6"}, {"num_nodes", "3"}, {"node", "2"}, {"leader", "10.0.0.1:9"}},
      Pod("2", "1"));
  ASSERT_TRUE(given.ok()) << given.status();
  EXPECT_EQ(given->num_nodes, 3);
  EXPECT_EQ(given->node, 2);
  EXPECT_EQ(given->leader, "10.0.0.1:9");

  EXPECT_THAT(std::string(LoadServeConfig("", {}, Pod("two", "0")).status().message()),
              AllOf(HasSubstr("num_nodes is 'two'"), HasSubstr("from LWS_GROUP_SIZE")));
  // A daemon alone in a set of two pods has been told nothing of the other.
  EXPECT_THAT(std::string(LoadServeConfig("", {}, Pod("2", "0")).status().message()),
              AllOf(HasSubstr("world_size is 1"), HasSubstr("LWS_GROUP_SIZE")));
}

TEST(ConfigTest, AGroupThatCannotBeIsRefused) {
  const auto error = [](std::vector<std::pair<std::string, std::string>> flags) {
    return std::string(LoadServeConfig("", flags, kNoPod).status().message());
  };
  EXPECT_THAT(error({{"world_size", "16"}, {"num_nodes", "3"}}),
              AllOf(HasSubstr("world_size is 16"), HasSubstr("num_nodes is 3")));
  EXPECT_THAT(error({{"world_size", "4"}, {"num_nodes", "2"}, {"node", "2"}}),
              HasSubstr("node is 2; with num_nodes 2 allowed are 0 .. 1"));
  EXPECT_THAT(error({{"world_size", "4"}, {"num_nodes", "2"}, {"node", "1"}}),
              HasSubstr("leader is empty; node 1"));
  EXPECT_THAT(error({{"world_size", "4"}, {"num_nodes", "2"}, {"node", "1"}, {"leader", "x:0"}}),
              HasSubstr("leader is 'x:0'"));
  EXPECT_THAT(error({{"world_size", "4"}, {"num_nodes", "2"}, {"cluster_listen", "0.0.0.0:0"}}),
              HasSubstr("cluster_listen is '0.0.0.0:0'; with num_nodes 2"));
  EXPECT_THAT(error({{"world_size", "2"}, {"cluster_listen", "0.0.0.0:50051"}}),
              HasSubstr("cluster_listen and listen are both"));
  EXPECT_THAT(error({{"world_size", "2"}, {"cluster_listen", "0.0.0.0:9090"}}),
              HasSubstr("cluster_listen and http_listen are both"));
  EXPECT_THAT(error({{"world_size", "0"}}), HasSubstr("allowed are 1 .. 1024"));
}

TEST(ConfigTest, RanksAreProcessesWhereThereAreSeveralOrItIsAsked) {
  ServeConfig config;
  EXPECT_FALSE(HasRankProcesses(config));
  config.isolate = true;
  EXPECT_TRUE(HasRankProcesses(config));
  EXPECT_EQ(ClusterListenAddress(config), "127.0.0.1:0");  // nobody else can reach it
  config = {};
  config.world_size = 2;
  EXPECT_TRUE(HasRankProcesses(config));
  config.cluster_listen = "10.0.0.1:7";
  EXPECT_EQ(ClusterListenAddress(config), "10.0.0.1:7");
}

// deploy/latentd.yaml shows every key with its default; it is written by `latentd config`.
TEST(ConfigTest, TheExampleFileIsUpToDate) {
  std::ifstream stream("deploy/latentd.yaml");
  std::ostringstream text;
  text << stream.rdbuf();
  EXPECT_EQ(text.str(), ExampleYaml());
  ServeConfig config;
  ASSERT_TRUE(ApplyYaml(text.str(), "deploy/latentd.yaml", &config).ok());
  EXPECT_EQ(DescribeConfig(config), DescribeConfig(ServeConfig()));
}

// The README's two commands.
TEST(ConfigTest, TheExampleOfTwoNodesIsOneOfTwoNodes) {
  const auto serve = LoadServeConfig("deploy/deepseek-v3-2x8.yaml", {}, kNoPod);
  ASSERT_TRUE(serve.ok()) << serve.status();
  EXPECT_EQ(serve->world_size, 16);
  EXPECT_EQ(RanksPerNode(*serve), 8);
  EXPECT_EQ(serve->node, 0);
  const auto node = LoadServeConfig("deploy/deepseek-v3-2x8.yaml",
                                    {{"node", "1"}, {"leader", "NODE0:50052"}}, kNoPod);
  ASSERT_TRUE(node.ok()) << node.status();
  const auto pod = LoadServeConfig("deploy/deepseek-v3-2x8.yaml", {}, Pod("2", "1"));
  ASSERT_TRUE(pod.ok()) << pod.status();
  EXPECT_EQ(pod->leader, "latentd-0.latentd.ns:50052");
}

}  // namespace
}  // namespace latentd
