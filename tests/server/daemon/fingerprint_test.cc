#include "server/fingerprint.h"

#include <filesystem>
#include <fstream>
#include <set>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace latentd {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;

constexpr char kModel[] = "tests/golden/variants/base";

ModelPath Path(const fs::path& model) {
  ServeConfig config;
  config.model = model.string();
  const auto path = ModelPath::Resolve(config, fs::absolute("build/latentd"));
  EXPECT_TRUE(path.ok()) << path.status();
  return *path;
}

std::string HashOf(const ServeConfig& config, const fs::path& model = kModel) {
  const auto hash = ConfigHash(config, Path(model));
  EXPECT_TRUE(hash.ok()) << hash.status();
  return hash.value_or("");
}

std::string CheckpointHashOf(const fs::path& model) {
  const auto hash = CheckpointHash({}, Path(model));
  EXPECT_TRUE(hash.ok()) << hash.status();
  return hash.value_or("");
}

// A copy of the model that a test may damage.
class FingerprintTest : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(copy_);
    fs::copy(kModel, copy_);
  }
  void TearDown() override { fs::remove_all(copy_); }

  void Flip(const fs::path& file, std::streamoff offset_from_end) {
    std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
    stream.seekg(-offset_from_end, std::ios::end);
    const char byte = static_cast<char>(stream.peek() ^ 1);
    stream.seekp(-offset_from_end, std::ios::end);
    stream.put(byte);
  }

  const fs::path copy_ = fs::path(::testing::TempDir()) / "fingerprint_test_model";
};

TEST_F(FingerprintTest, IsSha256AndTheSameEverywhere) {
  EXPECT_THAT(HashOf({}), MatchesRegex("[0-9a-f]{64}"));
  EXPECT_THAT(CheckpointHashOf(kModel), MatchesRegex("[0-9a-f]{64}"));
  EXPECT_EQ(HashOf({}), HashOf({}, copy_));
  EXPECT_EQ(CheckpointHashOf(kModel), CheckpointHashOf(copy_));
}

// What differs from process to process of one group by its nature.
const std::set<std::string_view> kOwn = {"node", "device", "leader", "listen", "log_level"};
// What changes the ranks' results, or the shape of their steps.
const std::set<std::string_view> kShared = {
    "world_size",      "num_nodes",           "engine",         "load_format",
    "kv_cache_memory", "kv_cache_dtype",      "max_running",    "max_model_len",
    "max_step_tokens", "max_graph_sequences", "batch_invariant"};

TEST_F(FingerprintTest, CountsTheKeysThatRanksMustShareAndNoOther) {
  size_t known = 0;
  for (const ConfigKey& key : ConfigKeys()) {
    if (const bool own = kOwn.count(key.name) > 0; own || kShared.count(key.name) > 0) {
      EXPECT_EQ(key.shared, !own) << key.name;
      ++known;
    }
    ServeConfig changed;
    bool set = false;
    for (const char* value : {"3", "true", "false", "4s", "5h", "2MiB", "cuda", "dummy", "fp8",
                              "error", "json", "1.2.3.4:5"}) {
      ServeConfig other;
      if (!SetConfigValue(key, value, &other).ok()) continue;
      if (ConfigValue(key, other) == ConfigValue(key, ServeConfig())) continue;
      changed = other;
      set = true;
      break;
    }
    ASSERT_TRUE(set) << key.name;
    EXPECT_EQ(HashOf(changed) != HashOf({}), key.shared) << key.name;
  }
  EXPECT_EQ(known, kOwn.size() + kShared.size());
}

TEST_F(FingerprintTest, AnotherConfigJsonIsAnotherConfig) {
  std::ofstream(copy_ / "config.json", std::ios::app) << "\n";
  EXPECT_NE(HashOf({}), HashOf({}, copy_));
  fs::remove(copy_ / "config.json");
  const ModelPath gone{
      .dir = copy_, .config_file = copy_ / "config.json", .name = "", .demo_dir = ""};
  EXPECT_THAT(std::string(ConfigHash({}, gone).status().message()), HasSubstr("config.json"));
}

// Same names and shapes, other values: another training of the same model.
TEST_F(FingerprintTest, OtherWeightsOfTheSameShapesAreTold) {
  const std::string hash = CheckpointHashOf(copy_);
  Flip(copy_ / "model.safetensors", 1);
  EXPECT_NE(CheckpointHashOf(copy_), hash);
  Flip(copy_ / "model.safetensors", 1);
  EXPECT_EQ(CheckpointHashOf(copy_), hash);
  EXPECT_NE(CheckpointHashOf("deploy/demo-model"), hash);
}

TEST_F(FingerprintTest, RandomWeightsHaveNone) {
  ServeConfig dummy;
  dummy.load_format = "dummy";
  fs::remove(copy_ / "model.safetensors");
  EXPECT_EQ(CheckpointHash(dummy, Path(copy_)).value_or("failed"), "");
  EXPECT_THAT(std::string(CheckpointHash({}, Path(copy_)).status().message()),
              HasSubstr("model.safetensors"));
}

}  // namespace
}  // namespace latentd
