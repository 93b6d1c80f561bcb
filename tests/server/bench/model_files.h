#ifndef LATENTD_TESTS_SERVER_BENCH_MODEL_FILES_H_
#define LATENTD_TESTS_SERVER_BENCH_MODEL_FILES_H_

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <string>

#include "engine/model/config.h"

namespace latentd {

// An example configuration: a file, where a model is a folder.
inline ModelConfig ReadConfigFile(const std::string& path) {
  std::ifstream file(path);
  auto config = ParseModelConfig(std::string(std::istreambuf_iterator<char>(file), {}));
  EXPECT_TRUE(config.ok()) << path << ": " << config.status();
  return *std::move(config);
}

inline ModelConfig DeepSeekV3() { return ReadConfigFile("deploy/configs/deepseek-v3.json"); }
// One rank's work of it under expert parallelism over 16.
inline ModelConfig Shard16() { return ReadConfigFile("deploy/configs/shard16.json"); }

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_BENCH_MODEL_FILES_H_
