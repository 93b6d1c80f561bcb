#ifndef LATENTD_ENGINE_MODEL_SAFETENSORS_H_
#define LATENTD_ENGINE_MODEL_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace latentd {

enum class DType { kF32, kBF16, kF16, kF8E4M3, kI32, kI64 };

std::string_view DTypeName(DType dtype);  // "F32", as in a safetensors header
size_t DTypeBytes(DType dtype);

// A tensor in memory that somebody else owns: row-major, contiguous, aligned to its element.
struct TensorView {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;

  bool empty() const { return data == nullptr; }
  int64_t num_elements() const;
  size_t num_bytes() const { return static_cast<size_t>(num_elements()) * DTypeBytes(dtype); }
  std::string ShapeString() const;  // "[576, 256]"
};

// The tensors of a Hugging Face checkpoint: model.safetensors, or the shards that
// model.safetensors.index.json names. Files are mapped, never copied: a view is valid as long as
// the Checkpoint lives. Thread-safe after Open().
class Checkpoint {
 public:
  // Maps the files and checks every header: sizes, offsets, overlaps, dtypes. An error names the
  // file and, where there is one, the tensor.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::filesystem::path& dir);
  // One file.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> OpenFile(const std::filesystem::path& file);
  ~Checkpoint();

  const TensorView* Find(std::string_view name) const;  // nullptr if there is none
  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }
  uint64_t num_bytes() const { return num_bytes_; }

  // Copies [begin, begin + size) of one view to `out` by reading its file, not through the mapping:
  // no page is mapped for bytes that are wanted once, and a file that was shortened since Open(),
  // or whose disk fails, is DATA_LOSS that names the tensor. Thread-safe.
  absl::Status Read(const std::byte* begin, size_t size, std::byte* out) const;

 private:
  class MappedFile;
  Checkpoint();
  absl::Status Add(const std::filesystem::path& path);
  absl::Status AddShards(const std::filesystem::path& dir);  // those of the index file

  std::vector<std::unique_ptr<MappedFile>> files_;
  std::map<std::string, TensorView, std::less<>> tensors_;
  uint64_t num_bytes_ = 0;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_SAFETENSORS_H_
