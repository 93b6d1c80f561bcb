#include "server/log.h"

#include <grpc/support/log.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "absl/time/time.h"
#include "fmt/format.h"
#include "nlohmann/json.hpp"
#include "spdlog/async.h"
#include "spdlog/sinks/stdout_sinks.h"

namespace latentd {
namespace {

constexpr size_t kQueueRecords = 8192;
// Begins the payload of a record whose fields LogEvent() has already formatted.
constexpr char kFormatted = '\x1e';

std::atomic<LogFormat> g_format{LogFormat::kText};
std::shared_ptr<spdlog::details::thread_pool>
    g_writer;  // of InitLogging() and ShutdownLogging() alone

std::string JsonString(std::string_view text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

bool NeedsQuotes(std::string_view text) {
  return text.empty() || std::any_of(text.begin(), text.end(), [](unsigned char c) {
           return c <= ' ' || c == '"' || c == '=' || c == '\\' || c == 0x7f;
         });
}

// A free message must stay on its line.
std::string OneLine(std::string_view text) {
  std::string line(text);
  std::replace_if(
      line.begin(), line.end(), [](unsigned char c) { return c < ' ' || c == 0x7f; }, ' ');
  return line;
}

// What stands behind a record's message.
std::string FormatFields(LogFormat format, absl::Span<const LogField> fields) {
  std::string text;
  for (const LogField& field : fields) {
    if (format == LogFormat::kJson) {
      text += fmt::format(",{}:{}", JsonString(field.key()),
                          field.quoted() ? JsonString(field.value()) : field.value());
    } else {
      const bool quotes = field.quoted() && NeedsQuotes(field.value());
      text +=
          fmt::format(" {}={}", field.key(), quotes ? JsonString(field.value()) : field.value());
    }
  }
  return text;
}

class RecordFormatter : public spdlog::formatter {
 public:
  // `process`: the fields of all records, formatted.
  RecordFormatter(LogFormat format, std::string process)
      : format_(format), process_(std::move(process)) {}

  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    std::string_view payload(message.payload.data(), message.payload.size());
    std::string formatted;
    if (!payload.empty() && payload.front() == kFormatted) {
      payload.remove_prefix(1);
    } else {
      formatted = FormatRecord(format_, payload, {});
      payload = formatted;
    }
    const std::string time = absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ",
                                              absl::FromChrono(message.time), absl::UTCTimeZone());
    const auto level_view = spdlog::level::to_string_view(message.level);
    const std::string_view level(level_view.data(), level_view.size());
    const std::string line = format_ == LogFormat::kJson
                                 ? fmt::format(R"({{"time":"{}","level":"{}",{}{}}})"
                                               "\n",
                                               time, level, payload, process_)
                                 : fmt::format("{} {:<7} {}{}\n", time, level, payload, process_);
    out.append(line.data(), line.data() + line.size());
  }

  std::unique_ptr<spdlog::formatter> clone() const override {
    return std::make_unique<RecordFormatter>(format_, process_);
  }

 private:
  const LogFormat format_;
  const std::string process_;
};

void LogGrpc(gpr_log_func_args* args) {
  const auto level = args->severity == GPR_LOG_SEVERITY_ERROR  ? spdlog::level::err
                     : args->severity == GPR_LOG_SEVERITY_INFO ? spdlog::level::info
                                                               : spdlog::level::debug;
  LogEvent(level, args->message, {{"source", "grpc"}});
}

}  // namespace

LogField::LogField(std::string_view key, double value)
    : key_(key), value_(fmt::format("{:.3f}", value)) {}

std::string FormatRecord(LogFormat format, std::string_view message,
                         absl::Span<const LogField> fields) {
  const std::string text =
      format == LogFormat::kJson ? "\"msg\":" + JsonString(message) : OneLine(message);
  return text + FormatFields(format, fields);
}

void LogEvent(spdlog::level::level_enum level, std::string_view message,
              absl::Span<const LogField> fields) {
  spdlog::logger* logger = spdlog::default_logger_raw();
  if (logger == nullptr || !logger->should_log(level)) return;
  std::string payload(1, kFormatted);
  payload += FormatRecord(g_format, message, fields);
  logger->log(level, spdlog::string_view_t(payload.data(), payload.size()));
}

void InitLogging(LogFormat format, std::string_view level, absl::Span<const LogField> process) {
  g_format = format;
  g_writer = std::make_shared<spdlog::details::thread_pool>(kQueueRecords, 1);
  // Never destroyed: a thread that the end of the process does not wait for may still hold it.
  static auto* const logger = new std::shared_ptr<spdlog::async_logger>();
  *logger = std::make_shared<spdlog::async_logger>(
      "latentd", std::make_shared<spdlog::sinks::stderr_sink_mt>(), g_writer,
      spdlog::async_overflow_policy::overrun_oldest);
  (*logger)->set_formatter(
      std::make_unique<RecordFormatter>(format, FormatFields(format, process)));
  (*logger)->set_level(spdlog::level::from_str(std::string(level)));
  spdlog::set_default_logger(*logger);
  gpr_set_log_function(LogGrpc);
}

void ShutdownLogging() {
  gpr_set_log_function(nullptr);
  spdlog::default_logger_raw()->set_level(spdlog::level::off);
  g_writer.reset();  // writes what is queued, then joins
}

}  // namespace latentd
