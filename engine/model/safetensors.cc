#include "engine/model/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <optional>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "engine/model/json.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the safetensors library itself
constexpr size_t kMaxIndexBytes = 256 << 20;
constexpr size_t kMaxDims = 8;
constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";

struct DTypeInfo {
  DType dtype;
  std::string_view name;
  size_t bytes;
};
constexpr DTypeInfo kDTypes[] = {
    {DType::kF32, "F32", 4},        {DType::kBF16, "BF16", 2}, {DType::kF16, "F16", 2},
    {DType::kF8E4M3, "F8_E4M3", 1}, {DType::kI32, "I32", 4},   {DType::kI64, "I64", 8},
};

std::optional<DType> DTypeFromName(std::string_view name) {
  for (const DTypeInfo& info : kDTypes) {
    if (info.name == name) return info.dtype;
  }
  return std::nullopt;
}

// nullopt when the product does not fit.
std::optional<uint64_t> CheckedProduct(const std::vector<int64_t>& shape, uint64_t bytes) {
  uint64_t product = bytes;
  for (int64_t dim : shape) {
    if (__builtin_mul_overflow(product, static_cast<uint64_t>(dim), &product)) return std::nullopt;
  }
  if (product > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return std::nullopt;
  return product;
}

// An index must not reach for files outside its directory.
bool IsPlainFileName(std::string_view name) {
  return !name.empty() && name != "." && name != ".." && name.find('/') == name.npos &&
         name.find('\0') == name.npos;
}

struct Entry {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape = {};
  uint64_t begin = 0;  // bytes from the end of the header, [begin, end)
  uint64_t end = 0;
};

// What one entry of the header says, checked by itself. The error does not name file and tensor.
absl::StatusOr<Entry> ParseEntry(const std::string& name, const nlohmann::json& value,
                                 uint64_t data_bytes) {
  auto error = [](auto&&... parts) { return absl::InvalidArgumentError(absl::StrCat(parts...)); };
  if (!value.is_object()) return error("its header entry is not an object");
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!value.contains(key)) return error("has no ", key);
  }
  const nlohmann::json& dtype = value["dtype"];
  const nlohmann::json& shape = value["shape"];
  const nlohmann::json& offsets = value["data_offsets"];

  Entry entry{.name = name};
  const std::optional<DType> known =
      dtype.is_string() ? DTypeFromName(dtype.get_ref<const std::string&>()) : std::nullopt;
  if (!known) {
    return error("has dtype ", Shown(dtype), "; supported are F32, BF16, F16, F8_E4M3, I32, I64");
  }
  entry.dtype = *known;

  if (!shape.is_array() || shape.size() > kMaxDims) {
    return error("has shape ", Shown(shape), "; must be a list of up to ", kMaxDims, " dims");
  }
  for (const nlohmann::json& dim : shape) {
    constexpr uint64_t kMaxDim = std::numeric_limits<int64_t>::max();
    if (!dim.is_number_unsigned() || dim.get<uint64_t>() > kMaxDim) {
      return error("has shape ", Shown(shape), "; dims must be integers >= 0");
    }
    entry.shape.push_back(dim.get<int64_t>());
  }

  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    return error("has data_offsets ", Shown(offsets), "; must be two integers >= 0");
  }
  entry.begin = offsets[0].get<uint64_t>();
  entry.end = offsets[1].get<uint64_t>();
  if (entry.begin > entry.end || entry.end > data_bytes) {
    return error("has data_offsets ", Shown(offsets), " outside the file's ", data_bytes,
                 " bytes of data (truncated?)");
  }
  const std::optional<uint64_t> size = CheckedProduct(entry.shape, DTypeBytes(entry.dtype));
  if (!size || *size != entry.end - entry.begin) {
    return error("has shape ", Shown(shape), " ", std::string(DTypeName(entry.dtype)),
                 ", which is not the ", entry.end - entry.begin, " bytes of its data_offsets");
  }
  return entry;
}

}  // namespace

std::string_view DTypeName(DType dtype) {
  for (const DTypeInfo& info : kDTypes) {
    if (info.dtype == dtype) return info.name;
  }
  return "unknown";
}

size_t DTypeBytes(DType dtype) {
  for (const DTypeInfo& info : kDTypes) {
    if (info.dtype == dtype) return info.bytes;
  }
  return 0;
}

int64_t TensorView::num_elements() const {
  int64_t product = 1;
  for (int64_t dim : shape) product *= dim;
  return product;
}

std::string TensorView::ShapeString() const {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

// One file, mapped read-only. The mapping keeps the file's contents alive when its name is deleted
// or replaced. A file that is shortened in place is nobody's to survive: LoadWeights() reads it all
// ahead of time and reports that; later it is a bus error, as for every program that maps its
// weights.
class Checkpoint::MappedFile {
 public:
  static absl::StatusOr<std::unique_ptr<MappedFile>> Open(const std::filesystem::path& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
      const std::string message = absl::StrCat(path.string(), ": ", std::strerror(errno));
      return errno == ENOENT ? absl::NotFoundError(message) : absl::PermissionDeniedError(message);
    }
    auto file = Map(fd, path);
    if (!file.ok()) ::close(fd);
    return file;
  }

  ~MappedFile() {
    ::munmap(data_, size_);
    ::close(fd_);
  }
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // Adds the file's tensors to `tensors`.
  absl::Status ReadHeader(std::map<std::string, TensorView, std::less<>>& tensors);

  const std::filesystem::path& path() const { return path_; }
  const std::vector<std::string>& names() const { return names_; }
  bool contains(const std::byte* at) const {
    return at >= static_cast<const std::byte*>(data_) &&
           at < static_cast<const std::byte*>(data_) + size_;
  }

  // What Checkpoint::Read() does, of bytes that are in this file; the errno of what failed, -1 when
  // the file ends before.
  int Read(const std::byte* begin, size_t size, std::byte* out) const;

 private:
  MappedFile(std::filesystem::path path, int fd, void* data, size_t size)
      : path_(std::move(path)), fd_(fd), data_(data), size_(size) {}

  // Owns `fd` when it succeeds.
  static absl::StatusOr<std::unique_ptr<MappedFile>> Map(int fd,
                                                         const std::filesystem::path& path) {
    struct stat info;
    if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
      return absl::InvalidArgumentError(absl::StrCat(path.string(), ": not a regular file"));
    }
    if (info.st_size < 8) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s: %d bytes are no safetensors file", path.string(), info.st_size));
    }
    const size_t size = static_cast<size_t>(info.st_size);
    void* data = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
    if (data == MAP_FAILED) {
      return absl::ResourceExhaustedError(absl::StrFormat(
          "%s: cannot map %d bytes: %s", path.string(), size, std::strerror(errno)));
    }
    return std::unique_ptr<MappedFile>(new MappedFile(path, fd, data, size));
  }

  // The file's entries lie end to end: no overlap, no gap, nothing behind the last one.
  absl::Status CheckLayout(std::vector<Entry>& entries, uint64_t data_bytes) const;
  absl::Status Error(const std::string& tensor, const std::string& message) const {
    return absl::InvalidArgumentError(
        absl::StrCat(path_.string(), ": tensor '", ShownName(tensor), "' ", message));
  }

  std::filesystem::path path_;
  int fd_;
  void* data_;
  size_t size_;
  std::vector<std::string> names_;
};

absl::Status Checkpoint::MappedFile::ReadHeader(
    std::map<std::string, TensorView, std::less<>>& tensors) {
  const auto* bytes = static_cast<const std::byte*>(data_);
  uint64_t header_bytes = 0;  // little-endian, as is every machine that this runs on
  std::memcpy(&header_bytes, bytes, sizeof(header_bytes));
  if (header_bytes > kMaxHeaderBytes || header_bytes > size_ - 8) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: says its header has %d bytes; the file has %d, the limit is %d (truncated, "
        "or not a safetensors file)",
        path_.string(), header_bytes, size_, kMaxHeaderBytes));
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes + 8), header_bytes);
  ASSIGN_OR_RETURN(const nlohmann::json header,
                   ParseJsonObject(text, absl::StrCat(path_.string(), ": header")));

  const uint64_t data_begin = 8 + header_bytes;
  const uint64_t data_bytes = size_ - data_begin;
  std::vector<Entry> entries;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") continue;
    absl::StatusOr<Entry> entry = ParseEntry(name, value, data_bytes);
    if (!entry.ok()) return Error(name, std::string(entry.status().message()));
    if ((data_begin + entry->begin) % DTypeBytes(entry->dtype) != 0) {
      return Error(name, absl::StrCat("begins at byte ", data_begin + entry->begin,
                                      ", not aligned to ", std::string(DTypeName(entry->dtype))));
    }
    entries.push_back(*std::move(entry));
  }
  RETURN_IF_ERROR(CheckLayout(entries, data_bytes));

  for (Entry& entry : entries) {
    TensorView view{.dtype = entry.dtype,
                    .shape = std::move(entry.shape),
                    .data = bytes + data_begin + entry.begin};
    names_.push_back(entry.name);
    if (!tensors.emplace(entry.name, std::move(view)).second) {
      return Error(entry.name, "occurs in another file of the checkpoint too");
    }
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::MappedFile::CheckLayout(std::vector<Entry>& entries,
                                                 uint64_t data_bytes) const {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t end = 0;
  for (size_t i = 0; i < entries.size(); ++i) {
    const Entry& entry = entries[i];
    if (entry.begin < end) {
      return Error(entry.name,
                   absl::StrCat("overlaps tensor '", ShownName(entries[i - 1].name), "'"));
    }
    if (entry.begin > end) {
      return Error(entry.name, absl::StrCat("begins at byte ", entry.begin, " of the data, ",
                                            entry.begin - end, " bytes after the one before it"));
    }
    end = entry.end;
  }
  if (end != data_bytes) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: has %d bytes of data, its tensors %d",
                                                      path_.string(), data_bytes, end));
  }
  return absl::OkStatus();
}

int Checkpoint::MappedFile::Read(const std::byte* begin, size_t size, std::byte* out) const {
  auto offset = static_cast<off_t>(begin - static_cast<const std::byte*>(data_));
  while (size > 0) {
    const ssize_t n = ::pread(fd_, out, size, offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n == 0 ? -1 : errno;
    out += n;
    offset += n;
    size -= static_cast<size_t>(n);
  }
  return 0;
}

Checkpoint::Checkpoint() = default;
Checkpoint::~Checkpoint() = default;

absl::Status Checkpoint::Add(const std::filesystem::path& path) {
  ASSIGN_OR_RETURN(std::unique_ptr<MappedFile> file, MappedFile::Open(path));
  RETURN_IF_ERROR(file->ReadHeader(tensors_));
  for (const std::string& name : file->names()) num_bytes_ += Find(name)->num_bytes();
  files_.push_back(std::move(file));
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::OpenFile(
    const std::filesystem::path& file) {
  auto checkpoint = std::unique_ptr<Checkpoint>(new Checkpoint());
  RETURN_IF_ERROR(checkpoint->Add(file));
  return checkpoint;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::filesystem::path& dir) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(dir, ignored)) {
    return absl::NotFoundError(absl::StrCat(dir.string(), ": no such directory"));
  }
  // Like Transformers: the single file, if there is one, is the checkpoint.
  if (std::filesystem::exists(dir / kSingleFile, ignored)) return OpenFile(dir / kSingleFile);
  if (!std::filesystem::exists(dir / kIndexFile, ignored)) {
    return absl::NotFoundError(
        absl::StrCat(dir.string(), ": has neither ", kSingleFile, " nor ", kIndexFile));
  }
  auto checkpoint = std::unique_ptr<Checkpoint>(new Checkpoint());
  RETURN_IF_ERROR(checkpoint->AddShards(dir));
  return checkpoint;
}

absl::Status Checkpoint::AddShards(const std::filesystem::path& dir) {
  const std::filesystem::path index_path = dir / kIndexFile;
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(index_path, kMaxIndexBytes));
  ASSIGN_OR_RETURN(const nlohmann::json index, ParseJsonObject(text, index_path.string()));
  auto error = [&](auto&&... parts) {
    return absl::InvalidArgumentError(absl::StrCat(index_path.string(), ": ", parts...));
  };
  if (!index.contains("weight_map") || !index["weight_map"].is_object()) {
    return error("has no weight_map");
  }
  std::set<std::string> shards;
  for (const auto& [name, file] : index["weight_map"].items()) {
    if (!file.is_string() || !IsPlainFileName(file.get_ref<const std::string&>())) {
      return error("tensor '", ShownName(name), "' is said to be in ", Shown(file),
                   ", which is not a file name");
    }
    shards.insert(file.get<std::string>());
  }
  for (const std::string& shard : shards) {
    absl::Status status = Add(dir / shard);
    if (absl::IsNotFound(status)) return error("names a missing shard: ", status.message());
    RETURN_IF_ERROR(status);
  }
  for (const auto& file : files_) {
    for (const std::string& name : file->names()) {
      const auto it = index["weight_map"].find(name);
      if (it == index["weight_map"].end()) {
        return error("does not name tensor '", ShownName(name), "' of ",
                     file->path().filename().string());
      }
      if (*it != file->path().filename().string()) {
        return error("tensor '", ShownName(name), "' is said to be in ", Shown(*it), " but is in ",
                     file->path().filename().string());
      }
    }
  }
  for (const auto& [name, file] : index["weight_map"].items()) {
    if (Find(name) == nullptr)
      return error("tensor '", ShownName(name), "' is not in ", Shown(file));
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::Read(const std::byte* begin, size_t size, std::byte* out) const {
  if (size == 0) return absl::OkStatus();
  const auto file = std::find_if(files_.begin(), files_.end(),
                                 [begin](const auto& file) { return file->contains(begin); });
  LATENTD_CHECK(file != files_.end());
  const int error = (*file)->Read(begin, size, out);
  if (error == 0) return absl::OkStatus();
  std::string tensor;
  for (const std::string& name : (*file)->names()) {
    const TensorView& view = *Find(name);
    if (view.data <= begin && begin < view.data + view.num_bytes()) tensor = ShownName(name);
  }
  return absl::DataLossError(absl::StrCat(
      (*file)->path().string(), ": tensor '", tensor,
      "' cannot be read: ", error < 0 ? "its file was shortened" : std::strerror(error)));
}

const TensorView* Checkpoint::Find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

}  // namespace latentd
