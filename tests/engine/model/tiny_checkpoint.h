#ifndef LATENTD_TESTS_ENGINE_MODEL_TINY_CHECKPOINT_H_
#define LATENTD_TESTS_ENGINE_MODEL_TINY_CHECKPOINT_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "engine/model/safetensors.h"

namespace latentd {

inline const std::filesystem::path kVariants = "tests/golden/variants";

inline std::string ReadAll(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  EXPECT_TRUE(stream) << file;
  return {std::istreambuf_iterator<char>(stream), {}};
}

inline void WriteAll(const std::filesystem::path& file, std::string_view text) {
  std::ofstream(file, std::ios::binary)
      .write(text.data(), static_cast<std::streamsize>(text.size()));
}

// A safetensors file of this header and data, whatever they say.
inline std::string SafetensorsBytes(std::string_view header, std::string_view data) {
  const uint64_t size = header.size();
  std::string bytes(reinterpret_cast<const char*>(&size), sizeof(size));
  return bytes.append(header).append(data);
}

// A new, empty directory, removed with the object.
class TempDir {
 public:
  TempDir() {
    std::string name = (std::filesystem::path(testing::TempDir()) / "model_XXXXXX").string();
    path_ = ::mkdtemp(name.data());
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// A checkpoint in memory, to be changed and written: a variant of tests/golden, but for one thing.
struct TinyCheckpoint {
  struct Tensor {
    std::string dtype;
    std::vector<int64_t> shape;
    std::string bytes;
  };
  nlohmann::json config;
  std::map<std::string, Tensor> tensors;

  static TinyCheckpoint Load(const std::filesystem::path& dir) {
    TinyCheckpoint result;
    result.config = nlohmann::json::parse(ReadAll(dir / "config.json"));
    const auto checkpoint = Checkpoint::Open(dir);
    EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
    for (const auto& [name, view] : (*checkpoint)->tensors()) {
      result.tensors[name] = {
          std::string(DTypeName(view.dtype)), view.shape,
          std::string(reinterpret_cast<const char*>(view.data), view.num_bytes())};
    }
    return result;
  }

  void Save(const std::filesystem::path& dir) const {
    // Wide elements first keep all of them aligned, as the library's own writer does.
    std::vector<std::pair<std::string, const Tensor*>> order;
    for (const char* dtype : {"I64", "F32", "I32", "BF16", "F16", "F8_E4M3"}) {
      for (const auto& [name, tensor] : tensors) {
        if (tensor.dtype == dtype) order.emplace_back(name, &tensor);
      }
    }
    nlohmann::json header = nlohmann::json::object();
    std::string data;
    for (const auto& [name, tensor] : order) {
      header[name] = {{"dtype", tensor->dtype},
                      {"shape", tensor->shape},
                      {"data_offsets", {data.size(), data.size() + tensor->bytes.size()}}};
      data += tensor->bytes;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    WriteAll(dir / "config.json", config.dump());
    WriteAll(dir / "model.safetensors", SafetensorsBytes(text, data));
  }
};

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_MODEL_TINY_CHECKPOINT_H_
