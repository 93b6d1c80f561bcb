// Makes ThreadSanitizer see absl's locks.
//
// The distribution's absl is built without it, so its locks look like no locks at all and every
// guarded member like a race. In a ThreadSanitizer build these definitions come before the shared
// library's, for our code and for gRPC's; each calls the original and says what it ordered.

#include <dlfcn.h>
#include <sanitizer/tsan_interface.h>

#include <string>
#include <string_view>

#include "absl/base/options.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace {

#define TSAN_ABSL_TEXT_(x) #x
#define TSAN_ABSL_TEXT(x) TSAN_ABSL_TEXT_(x)

// The library's own definition. `mangled` is its name after the namespaces; `qualifier` is K for a
// const method.
template <typename Function>
Function* Original(const char* mangled, const char* qualifier = "") {
  constexpr std::string_view kNamespace = TSAN_ABSL_TEXT(ABSL_OPTION_INLINE_NAMESPACE_NAME);
  const std::string symbol = std::string("_ZN") + qualifier + "4absl" +
                             std::to_string(kNamespace.size()) + std::string(kNamespace) + mangled;
  void* found = dlsym(RTLD_NEXT, symbol.c_str());
  if (found == nullptr) __builtin_trap();  // another absl: look the name up with nm -D
  return reinterpret_cast<Function*>(found);
}

// What this thread did before Release is seen by a thread after its Acquire of the same address.
void Release(const void* address) { __tsan_release(const_cast<void*>(address)); }

struct AcquireAtEnd {
  const void* address;
  ~AcquireAtEnd() { __tsan_acquire(const_cast<void*>(address)); }
};

// absl evaluates a Condition within Await() and within another thread's Unlock(), with the lock
// held but after it was said to be released. What the condition reads there is in order.
class IgnoreConditions {
 public:
  IgnoreConditions() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~IgnoreConditions() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

}  // namespace

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  static auto* const original = Original<void(Mutex*)>("5Mutex4LockEv");
  const AcquireAtEnd acquire{this};
  return original(this);
}

void Mutex::Unlock() {
  static auto* const original = Original<void(Mutex*)>("5Mutex6UnlockEv");
  Release(this);
  const IgnoreConditions ignore;
  return original(this);
}

bool Mutex::TryLock() {
  static auto* const original = Original<bool(Mutex*)>("5Mutex7TryLockEv");
  const AcquireAtEnd acquire{this};
  return original(this);
}

void Mutex::ReaderLock() {
  static auto* const original = Original<void(Mutex*)>("5Mutex10ReaderLockEv");
  const AcquireAtEnd acquire{this};
  return original(this);
}

void Mutex::ReaderUnlock() {
  static auto* const original = Original<void(Mutex*)>("5Mutex12ReaderUnlockEv");
  Release(this);
  const IgnoreConditions ignore;
  return original(this);
}

void Mutex::LockWhen(const Condition& condition) {
  static auto* const original =
      Original<void(Mutex*, const Condition&)>("5Mutex8LockWhenERKNS0_9ConditionE");
  Release(this);
  const AcquireAtEnd acquire{this};
  const IgnoreConditions ignore;
  return original(this, condition);
}

void Mutex::Await(const Condition& condition) {
  static auto* const original =
      Original<void(Mutex*, const Condition&)>("5Mutex5AwaitERKNS0_9ConditionE");
  Release(this);
  const AcquireAtEnd acquire{this};
  const IgnoreConditions ignore;
  return original(this, condition);
}

bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static auto* const original = Original<bool(Mutex*, const Condition&, Duration)>(
      "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  Release(this);
  const AcquireAtEnd acquire{this};
  const IgnoreConditions ignore;
  return original(this, condition, timeout);
}

bool Mutex::AwaitWithDeadline(const Condition& condition, Time deadline) {
  static auto* const original = Original<bool(Mutex*, const Condition&, Time)>(
      "5Mutex17AwaitWithDeadlineERKNS0_9ConditionENS0_4TimeE");
  Release(this);
  const AcquireAtEnd acquire{this};
  const IgnoreConditions ignore;
  return original(this, condition, deadline);
}

void CondVar::Wait(Mutex* mutex) {
  static auto* const original = Original<void(CondVar*, Mutex*)>("7CondVar4WaitEPNS0_5MutexE");
  Release(mutex);
  const AcquireAtEnd acquire{mutex};
  const IgnoreConditions ignore;
  return original(this, mutex);
}

bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  static auto* const original = Original<bool(CondVar*, Mutex*, Duration)>(
      "7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE");
  Release(mutex);
  const AcquireAtEnd acquire{mutex};
  const IgnoreConditions ignore;
  return original(this, mutex, timeout);
}

bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  static auto* const original =
      Original<bool(CondVar*, Mutex*, Time)>("7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE");
  Release(mutex);
  const AcquireAtEnd acquire{mutex};
  const IgnoreConditions ignore;
  return original(this, mutex, deadline);
}

void Notification::Notify() {
  static auto* const original = Original<void(Notification*)>("12Notification6NotifyEv");
  Release(this);
  return original(this);
}

void Notification::WaitForNotification() const {
  static auto* const original =
      Original<void(const Notification*)>("12Notification19WaitForNotificationEv", "K");
  const AcquireAtEnd acquire{this};
  return original(this);
}

bool Notification::WaitForNotificationWithTimeout(Duration timeout) const {
  static auto* const original = Original<bool(const Notification*, Duration)>(
      "12Notification30WaitForNotificationWithTimeoutENS0_8DurationE", "K");
  const AcquireAtEnd acquire{this};
  return original(this, timeout);
}

bool BlockingCounter::DecrementCount() {
  static auto* const original =
      Original<bool(BlockingCounter*)>("15BlockingCounter14DecrementCountEv");
  Release(this);
  const AcquireAtEnd acquire{this};
  return original(this);
}

void BlockingCounter::Wait() {
  static auto* const original = Original<void(BlockingCounter*)>("15BlockingCounter4WaitEv");
  const AcquireAtEnd acquire{this};
  return original(this);
}

ABSL_NAMESPACE_END
}  // namespace absl
