#ifndef LATENTD_SERVER_LOG_H_
#define LATENTD_SERVER_LOG_H_

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>

#include "absl/types/span.h"
#include "spdlog/spdlog.h"

namespace latentd {

enum class LogFormat { kText, kJson };

// One key and value of a record.
class LogField {
 public:
  LogField(std::string_view key, std::string_view value)
      : key_(key), value_(value), quoted_(true) {}
  LogField(std::string_view key, const char* value) : LogField(key, std::string_view(value)) {}
  LogField(std::string_view key, const std::string& value)
      : LogField(key, std::string_view(value)) {}
  LogField(std::string_view key, bool value) : key_(key), value_(value ? "true" : "false") {}
  LogField(std::string_view key, std::integral auto value)
      : key_(key), value_(std::to_string(value)) {}
  LogField(std::string_view key, double value);  // three decimals

  std::string_view key() const { return key_; }
  const std::string& value() const { return value_; }
  bool quoted() const { return quoted_; }

 private:
  std::string_view key_;
  std::string value_;
  bool quoted_ = false;
};

// Sends spdlog's default logger, and gRPC's own messages, to standard error: one line a record,
// each with time (UTC), level and message. Written by a thread of its own; when standard error does
// not drain, the oldest records are dropped and no caller ever waits. Call once, before other
// threads log.
//   level:   debug, info, warning or error.
//   process: which process of several it is: the last fields of every record.
void InitLogging(LogFormat format, std::string_view level, absl::Span<const LogField> process = {});

// Writes out what is left. Later records go nowhere.
void ShutdownLogging();

// Logs `message` with its fields: `message key=value ...`, or the members of the JSON object.
void LogEvent(spdlog::level::level_enum level, std::string_view message,
              absl::Span<const LogField> fields);

// Exposed for tests: one record as InitLogging()'s logger formats it, without time and level.
std::string FormatRecord(LogFormat format, std::string_view message,
                         absl::Span<const LogField> fields);

}  // namespace latentd

#endif  // LATENTD_SERVER_LOG_H_
