#include "tests/server/batch/fault_vfs.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace latentd {
namespace {

constexpr int64_t kSector = 512;

std::atomic<int> g_num_vfs = 0;

}  // namespace

// As SQLite lays it out: the real file follows.
struct FaultVfs::File {
  sqlite3_file base;
  FaultVfs* vfs;
  std::string* path;
  sqlite3_file* real() { return reinterpret_cast<sqlite3_file*>(this + 1); }
};

struct FaultVfs::Methods {
  static File* Of(sqlite3_file* file) { return reinterpret_cast<File*>(file); }
  static sqlite3_file* Real(sqlite3_file* file) { return Of(file)->real(); }

  static int Close(sqlite3_file* file) {
    delete Of(file)->path;
    return Real(file)->pMethods->xClose(Real(file));
  }
  static int Read(sqlite3_file* file, void* to, int size, sqlite3_int64 offset) {
    return Real(file)->pMethods->xRead(Real(file), to, size, offset);
  }
  static int Write(sqlite3_file* file, const void* from, int size, sqlite3_int64 offset) {
    FaultVfs& vfs = *Of(file)->vfs;
    absl::MutexLock lock(&vfs.mutex_);
    const int code = vfs.Count(false);
    if (code != SQLITE_OK) {
      if (code != SQLITE_IOERR_WRITE || vfs.dead_) return code;
      size /= 2;  // a short write
    }
    vfs.contents_[*Of(file)->path].pending.push_back(
        {.offset = offset,
         .bytes = std::string(static_cast<const char*>(from), static_cast<size_t>(size))});
    const int written = Real(file)->pMethods->xWrite(Real(file), from, size, offset);
    return code != SQLITE_OK ? code : written;
  }
  static int Truncate(sqlite3_file* file, sqlite3_int64 size) {
    FaultVfs& vfs = *Of(file)->vfs;
    absl::MutexLock lock(&vfs.mutex_);
    if (vfs.failed_) ++vfs.calls_after_failure_;
    if (vfs.dead_) return SQLITE_IOERR_TRUNCATE;
    vfs.contents_[*Of(file)->path].pending.push_back({.offset = 0, .bytes = "", .new_size = size});
    return Real(file)->pMethods->xTruncate(Real(file), size);
  }
  static int Sync(sqlite3_file* file, int) {
    FaultVfs& vfs = *Of(file)->vfs;
    absl::MutexLock lock(&vfs.mutex_);
    const int code = vfs.Count(true);
    Content& content = vfs.contents_[*Of(file)->path];
    if (code != SQLITE_OK) {
      // As Linux has it: the pages count as clean, nothing will write them.
      if (!vfs.dead_) content.pending.clear();
      return code;
    }
    content.exists = true;
    for (const Change& change : content.pending) vfs.Apply(change, &content.durable);
    content.pending.clear();
    return SQLITE_OK;
  }
  static int FileSize(sqlite3_file* file, sqlite3_int64* size) {
    return Real(file)->pMethods->xFileSize(Real(file), size);
  }
  static int Lock(sqlite3_file* file, int level) {
    return Real(file)->pMethods->xLock(Real(file), level);
  }
  static int Unlock(sqlite3_file* file, int level) {
    return Real(file)->pMethods->xUnlock(Real(file), level);
  }
  static int CheckReservedLock(sqlite3_file* file, int* result) {
    return Real(file)->pMethods->xCheckReservedLock(Real(file), result);
  }
  static int FileControl(sqlite3_file* file, int op, void* argument) {
    return Real(file)->pMethods->xFileControl(Real(file), op, argument);
  }
  static int SectorSize(sqlite3_file*) { return kSector; }
  // Without power-safe overwrite, and without atomic writes of any size: the least that there is.
  static int DeviceCharacteristics(sqlite3_file*) { return 0; }
  static int ShmMap(sqlite3_file* file, int region, int size, int extend, void volatile** to) {
    return Real(file)->pMethods->xShmMap(Real(file), region, size, extend, to);
  }
  static int ShmLock(sqlite3_file* file, int offset, int n, int flags) {
    return Real(file)->pMethods->xShmLock(Real(file), offset, n, flags);
  }
  static void ShmBarrier(sqlite3_file* file) { Real(file)->pMethods->xShmBarrier(Real(file)); }
  static int ShmUnmap(sqlite3_file* file, int remove) {
    return Real(file)->pMethods->xShmUnmap(Real(file), remove);
  }

  static FaultVfs& Self(sqlite3_vfs* vfs) { return *static_cast<FaultVfs*>(vfs->pAppData); }
  static int Open(sqlite3_vfs* vfs, const char* name, sqlite3_file* file, int flags, int* out) {
    static const sqlite3_io_methods kMethods = [] {
      sqlite3_io_methods methods = {};
      methods.iVersion = 2;
      methods.xClose = Close;
      methods.xRead = Read;
      methods.xWrite = Write;
      methods.xTruncate = Truncate;
      methods.xSync = Sync;
      methods.xFileSize = FileSize;
      methods.xLock = Lock;
      methods.xUnlock = Unlock;
      methods.xCheckReservedLock = CheckReservedLock;
      methods.xFileControl = FileControl;
      methods.xSectorSize = SectorSize;
      methods.xDeviceCharacteristics = DeviceCharacteristics;
      methods.xShmMap = ShmMap;
      methods.xShmLock = ShmLock;
      methods.xShmBarrier = ShmBarrier;
      methods.xShmUnmap = ShmUnmap;
      return methods;
    }();
    FaultVfs& self = Self(vfs);
    file->pMethods = nullptr;  // until it is open
    const int code = self.real_->xOpen(self.real_, name, Of(file)->real(), flags, out);
    if (code != SQLITE_OK) return code;
    file->pMethods = &kMethods;
    Of(file)->vfs = &self;
    Of(file)->path = new std::string(name == nullptr ? "" : name);
    return SQLITE_OK;
  }
  static int Delete(sqlite3_vfs* vfs, const char* name, int sync_directory) {
    FaultVfs& self = Self(vfs);
    absl::MutexLock lock(&self.mutex_);
    if (self.failed_) ++self.calls_after_failure_;
    if (self.dead_) return SQLITE_IOERR_DELETE;
    self.contents_.erase(name);
    return self.real_->xDelete(self.real_, name, sync_directory);
  }
};

FaultVfs::FaultVfs()
    : name_(absl::StrCat("fault", g_num_vfs++)), real_(sqlite3_vfs_find(nullptr)), vfs_(*real_) {
  vfs_.szOsFile = static_cast<int>(sizeof(File)) + real_->szOsFile;
  vfs_.zName = name_.c_str();
  vfs_.pAppData = this;
  vfs_.pNext = nullptr;
  vfs_.xOpen = Methods::Open;
  vfs_.xDelete = Methods::Delete;
  sqlite3_vfs_register(&vfs_, /*makeDflt=*/0);
}

FaultVfs::~FaultVfs() { sqlite3_vfs_unregister(&vfs_); }

void FaultVfs::Adopt(const std::filesystem::path& folder) {
  absl::MutexLock lock(&mutex_);
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::ifstream stream(entry.path(), std::ios::binary);
    Content& content = contents_[entry.path().string()];
    content.durable.assign(std::istreambuf_iterator<char>(stream), {});
    content.exists = true;
  }
}

void FaultVfs::FailAt(Fault fault, int64_t calls) {
  absl::MutexLock lock(&mutex_);
  fault_ = fault;
  calls_left_ = calls;
  failed_ = false;
  calls_after_failure_ = 0;
}

bool FaultVfs::has_failed() const {
  absl::MutexLock lock(&mutex_);
  return failed_;
}

int64_t FaultVfs::calls_after_failure() const {
  absl::MutexLock lock(&mutex_);
  return calls_after_failure_;
}

int64_t FaultVfs::calls() const {
  absl::MutexLock lock(&mutex_);
  return calls_;
}

int FaultVfs::Count(bool is_sync) {
  ++calls_;
  if (failed_) ++calls_after_failure_;
  const int as_io_error = is_sync ? SQLITE_IOERR_FSYNC : SQLITE_IOERR_WRITE;
  if (dead_) return as_io_error;
  const bool counts = fault_ == Fault::kPowerLoss || (fault_ == Fault::kSync) == is_sync;
  if (failed_ || fault_ == Fault::kNone || !counts || --calls_left_ > 0) return SQLITE_OK;
  failed_ = true;
  dead_ = fault_ == Fault::kPowerLoss;
  return fault_ == Fault::kDiskFull ? SQLITE_FULL : as_io_error;
}

void FaultVfs::Apply(const Change& change, std::string* content) {
  if (change.new_size >= 0) {
    content->resize(static_cast<size_t>(change.new_size));
    return;
  }
  const size_t end = static_cast<size_t>(change.offset) + change.bytes.size();
  if (content->size() < end) content->resize(end);
  std::copy(change.bytes.begin(), change.bytes.end(),
            content->begin() + static_cast<std::ptrdiff_t>(change.offset));
}

void FaultVfs::WriteSurvivors(const std::filesystem::path& from, const std::filesystem::path& to,
                              std::mt19937_64* random) {
  absl::MutexLock lock(&mutex_);
  for (const auto& [path, content] : contents_) {
    if (std::filesystem::path(path).parent_path() != from) continue;
    std::string left = content.durable;
    bool exists = content.exists;
    for (const Change& change : content.pending) {
      switch ((*random)() % 3) {
        case 0:
          break;
        case 1:
          exists = true;
          Apply(change, &left);
          break;
        default:  // some of its sectors
          for (size_t begin = 0; begin < change.bytes.size(); begin += kSector) {
            if ((*random)() % 2 == 0) continue;
            exists = true;
            Apply({.offset = change.offset + static_cast<int64_t>(begin),
                   .bytes = change.bytes.substr(begin, kSector)},
                  &left);
          }
      }
    }
    if (!exists) continue;
    std::ofstream file(to / std::filesystem::path(path).filename(), std::ios::binary);
    file << left;
  }
}

}  // namespace latentd
