#include "engine/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/engine/model/tiny_checkpoint.h"

namespace latentd {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

template <typename T>
std::string Message(const absl::StatusOr<T>& result) {
  return result.ok() ? "OK" : std::string(result.status().message());
}

class SafetensorsTest : public testing::Test {
 protected:
  // Opens a file of this header and `num_data_bytes` bytes of data. The header is padded so that
  // the data begins at a multiple of 8, as every writer does.
  absl::StatusOr<std::unique_ptr<Checkpoint>> OpenHeader(std::string header,
                                                         size_t num_data_bytes) {
    header.resize((header.size() + 7) / 8 * 8, ' ');
    return OpenBytes(SafetensorsBytes(header, std::string(num_data_bytes, '\1')));
  }
  absl::StatusOr<std::unique_ptr<Checkpoint>> OpenBytes(const std::string& bytes) {
    WriteAll(file_, bytes);
    return Checkpoint::OpenFile(file_);
  }

  TempDir dir_;
  std::filesystem::path file_ = dir_.path() / "model.safetensors";
};

TEST_F(SafetensorsTest, Reads) {
  const std::string header =
      R"({"__metadata__": {"format": "pt"},
          "b": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [8, 20]},
          "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
          "empty": {"dtype": "F32", "shape": [0, 4], "data_offsets": [8, 8]},
          "scalar": {"dtype": "F8_E4M3", "shape": [], "data_offsets": [20, 21]}})";
  const auto checkpoint = OpenHeader(header, 21);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ((*checkpoint)->tensors().size(), 4u);
  EXPECT_EQ((*checkpoint)->num_bytes(), 21u);
  EXPECT_EQ((*checkpoint)->Find("c"), nullptr);
  const TensorView* b = (*checkpoint)->Find("b");
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(b->dtype, DType::kBF16);
  EXPECT_THAT(b->shape, ElementsAre(2, 3));
  EXPECT_EQ(b->ShapeString(), "[2, 3]");
  EXPECT_EQ(b->num_bytes(), 12u);
  EXPECT_EQ(b->data[11], std::byte{1});
  EXPECT_EQ(b->data - (*checkpoint)->Find("a")->data, 8);
  EXPECT_EQ((*checkpoint)->Find("empty")->num_bytes(), 0u);
  EXPECT_EQ((*checkpoint)->Find("scalar")->num_elements(), 1);
}

// The name of a file may go away or to another file while it is mapped.
TEST_F(SafetensorsTest, KeepsItsContentsWhenTheFileIsReplaced) {
  const auto checkpoint =
      OpenHeader(R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})", 4);
  ASSERT_TRUE(checkpoint.ok());
  WriteAll(dir_.path() / "other", "nothing");
  std::filesystem::rename(dir_.path() / "other", file_);
  EXPECT_EQ((*checkpoint)->Find("a")->data[3], std::byte{1});
}

TEST_F(SafetensorsTest, ReadsPartsOfViewsFromTheFile) {
  const auto checkpoint = OpenHeader(
      R"({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]},
          "b": {"dtype": "F8_E4M3", "shape": [9000], "data_offsets": [8, 9008]}})",
      9008);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const TensorView* b = (*checkpoint)->Find("b");
  std::string out(10, 'x');
  auto* bytes = reinterpret_cast<std::byte*>(out.data());
  EXPECT_TRUE((*checkpoint)->Read(b->data + 8990, 9, bytes).ok());
  EXPECT_EQ(out, std::string(9, '\1') + "x");
  EXPECT_TRUE((*checkpoint)->Read(b->data + 9000, 0, bytes).ok());

  // What is left of a file that somebody shortens can still be read.
  std::filesystem::resize_file(file_, std::filesystem::file_size(file_) - 1000);
  EXPECT_TRUE((*checkpoint)->Read(b->data, 10, bytes).ok());
  const absl::Status status = (*checkpoint)->Read(b->data + 7995, 10, bytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr(file_.string()),
                    HasSubstr("tensor 'b' cannot be read: its file was shortened")));
}

TEST_F(SafetensorsTest, FileErrors) {
  EXPECT_EQ(Checkpoint::OpenFile(file_).status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(Message(Checkpoint::OpenFile(dir_.path())), HasSubstr("not a regular file"));
  EXPECT_THAT(Message(OpenBytes("")), HasSubstr("0 bytes are no safetensors file"));
  EXPECT_THAT(Message(OpenBytes("1234567")), HasSubstr("7 bytes are no safetensors file"));
  EXPECT_THAT(Message(OpenBytes(std::string(8, '\0'))), HasSubstr("header: "));
  EXPECT_THAT(Message(OpenBytes(std::string(64, '\xff'))),
              HasSubstr("says its header has 18446744073709551615 bytes; the file has 64"));
  std::string bytes = SafetensorsBytes("{}", "");
  bytes[0] = 3;
  EXPECT_THAT(Message(OpenBytes(bytes)), HasSubstr("says its header has 3 bytes; the file has 10"));
  EXPECT_TRUE(OpenBytes(SafetensorsBytes("{}", "")).ok());
}

struct BadHeader {
  const char* header;
  size_t num_data_bytes;
  const char* message;
};

class BadHeaderTest : public SafetensorsTest, public testing::WithParamInterface<BadHeader> {};

TEST_P(BadHeaderTest, NamesFileAndTensor) {
  const auto checkpoint = OpenHeader(GetParam().header, GetParam().num_data_bytes);
  ASSERT_FALSE(checkpoint.ok()) << GetParam().header;
  EXPECT_EQ(checkpoint.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(checkpoint), AllOf(HasSubstr(file_.string()), HasSubstr(GetParam().message)));
}

constexpr BadHeader kBadHeaders[] = {
    {"", 0, "header: "},
    {"[]", 0, "header: is array, must be a JSON object"},
    {R"({"a": )", 0, "header: "},
    {R"({"a": 1})", 0, "tensor 'a' its header entry is not an object"},
    {R"({"a": {"shape": [1], "data_offsets": [0, 4]}})", 4, "tensor 'a' has no dtype"},
    {R"({"a": {"dtype": "F32", "data_offsets": [0, 4]}})", 4, "tensor 'a' has no shape"},
    {R"({"a": {"dtype": "F32", "shape": [1]}})", 4, "tensor 'a' has no data_offsets"},
    {R"({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}})", 8,
     R"(tensor 'a' has dtype "F64"; supported are)"},
    {R"({"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 8]}})", 8, "tensor 'a' has dtype 3"},
    {R"({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}})", 4, "tensor 'a' has shape 1"},
    {R"({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}})", 4,
     "tensor 'a' has shape [-1]; dims must be integers >= 0"},
    {R"({"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}})", 4,
     "tensor 'a' has shape [1.5]"},
    {R"({"a": {"dtype": "F32", "shape": [18446744073709551615], "data_offsets": [0, 4]}})", 4,
     "tensor 'a' has shape [18446744073709551615]"},
    {R"({"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}})", 0,
     "which is not the 0 bytes"},
    {R"({"a": {"dtype": "F32", "shape": [4611686018427387905], "data_offsets": [0, 4]}})", 4,
     "which is not the 4 bytes"},
    {R"({"a": {"dtype": "F32", "shape": [1,1,1,1,1,1,1,1,1], "data_offsets": [0, 4]}})", 4,
     "must be a list of up to 8 dims"},
    {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}})", 4,
     "must be two integers >= 0"},
    {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}})", 4,
     "must be two integers >= 0"},
    {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}})", 4,
     "outside the file's 4 bytes"},
    {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})", 7,
     "tensor 'a' has data_offsets [0,8] outside the file's 7 bytes of data (truncated?)"},
    {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}})", 4,
     "tensor 'a' has shape [2] F32, which is not the 4 bytes of its data_offsets"},
    {R"({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]},
         "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}})",
     5, "tensor 'b' begins at byte "},
    {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
         "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}})",
     12, "tensor 'b' overlaps tensor 'a'"},
    {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
         "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})",
     4, "tensor 'b' overlaps"},
    {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
         "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}})",
     12, "tensor 'b' begins at byte 8 of the data, 4 bytes after the one before it"},
    {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})", 12,
     "has 12 bytes of data, its tensors 4"},
    {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
         "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})",
     8, "'a' occurs twice"},
    {R"({"a": {"dtype": "F32", "dtype": "I32", "shape": [1], "data_offsets": [0, 4]}})", 4,
     "'dtype' occurs twice"},
};
INSTANTIATE_TEST_SUITE_P(Headers, BadHeaderTest, testing::ValuesIn(kBadHeaders));

TEST_F(SafetensorsTest, HostileNesting) {
  std::string header = "{\"a\":";
  header.append(1'000'000, '[');
  EXPECT_THAT(Message(OpenHeader(header, 0)), HasSubstr("nested deeper than 32 levels"));
}

// Every prefix of a real file, and every single damaged byte of its header, is refused or read,
// never a crash; and no prefix is taken for the whole.
TEST_F(SafetensorsTest, Truncated) {
  const std::string whole = ReadAll(kVariants / "first_k_dense_all" / "model.safetensors");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, whole.data(), sizeof(header_bytes));
  for (size_t size = 0; size < whole.size(); size += size < header_bytes + 64 ? 101 : 19997) {
    EXPECT_FALSE(OpenBytes(whole.substr(0, size)).ok()) << size;
  }
  EXPECT_TRUE(OpenBytes(whole).ok());
  for (size_t i = 0; i < 8 + header_bytes; i += 29) {
    std::string damaged = whole;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x15);
    OpenBytes(damaged).IgnoreError();
  }
}

class ShardsTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const auto& entry : std::filesystem::directory_iterator(kVariants / "sharded")) {
      std::filesystem::copy(entry.path(), dir_.path() / entry.path().filename());
    }
    index_ = json::parse(ReadAll(index_path()));
  }
  std::filesystem::path index_path() const { return dir_.path() / "model.safetensors.index.json"; }
  std::string OpenWithIndex(const json& index) {
    WriteAll(index_path(), index.dump());
    return Message(Checkpoint::Open(dir_.path()));
  }

  TempDir dir_;
  json index_;
};

TEST_F(ShardsTest, AllOfThem) {
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ((*checkpoint)->tensors().size(), index_["weight_map"].size());
  EXPECT_EQ((*checkpoint)->num_bytes(), index_["metadata"]["total_size"]);
}

TEST_F(ShardsTest, IndexErrors) {
  EXPECT_THAT(OpenWithIndex(json::object()), HasSubstr("has no weight_map"));
  EXPECT_THAT(OpenWithIndex({{"weight_map", 3}}), HasSubstr("has no weight_map"));
  for (const json& bad :
       {json("../x.safetensors"), json("/etc/passwd"), json(""), json("."), json(".."), json("a/b"),
        json(7), json(nullptr), json(std::string("a\0b", 3))}) {
    json index = index_;
    index["weight_map"]["model.norm.weight"] = bad;
    EXPECT_THAT(OpenWithIndex(index), AllOf(HasSubstr("index.json: tensor 'model.norm.weight'"),
                                            HasSubstr("is not a file name")));
  }
  json missing = index_;
  missing["weight_map"]["model.norm.weight"] = "model-00009-of-00003.safetensors";
  EXPECT_THAT(OpenWithIndex(missing),
              AllOf(HasSubstr("names a missing shard"), HasSubstr("model-00009-of-00003")));

  json wrong = index_;
  auto& shard = wrong["weight_map"]["model.norm.weight"];
  shard = shard == "model-00001-of-00003.safetensors" ? "model-00002-of-00003.safetensors"
                                                      : "model-00001-of-00003.safetensors";
  EXPECT_THAT(OpenWithIndex(wrong), HasSubstr("tensor 'model.norm.weight' is said to be in"));

  json unnamed = index_;
  unnamed["weight_map"].erase("model.norm.weight");
  EXPECT_THAT(OpenWithIndex(unnamed), HasSubstr("does not name tensor 'model.norm.weight'"));

  json absent = index_;
  absent["weight_map"]["ghost"] = "model-00001-of-00003.safetensors";
  EXPECT_THAT(OpenWithIndex(absent), HasSubstr("tensor 'ghost' is not in"));
}

TEST_F(ShardsTest, ATensorInTwoShards) {
  std::filesystem::copy(dir_.path() / "model-00001-of-00003.safetensors",
                        dir_.path() / "copy.safetensors");
  index_["weight_map"]["ghost"] = "copy.safetensors";
  EXPECT_THAT(OpenWithIndex(index_), HasSubstr("occurs in another file of the checkpoint too"));
}

TEST_F(ShardsTest, MissingShardAndMissingEverything) {
  std::filesystem::remove(dir_.path() / "model-00002-of-00003.safetensors");
  EXPECT_THAT(Message(Checkpoint::Open(dir_.path())),
              HasSubstr("model-00002-of-00003.safetensors"));
  TempDir empty;
  EXPECT_THAT(Message(Checkpoint::Open(empty.path())),
              HasSubstr("has neither model.safetensors nor"));
  EXPECT_THAT(Message(Checkpoint::Open(empty.path() / "none")), HasSubstr("no such directory"));
}

}  // namespace
}  // namespace latentd
