#include "server/metrics_writer.h"

#include <cmath>

#include "fmt/format.h"

namespace latentd {
namespace {

// Integers as such, the rest as short as it can be read back.
std::string NumberText(double value) {
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  return std::abs(value) < 1e15 && value == std::floor(value) ? fmt::format("{:.0f}", value)
                                                              : fmt::format("{}", value);
}

void Append(std::string_view name, std::string_view value, std::string* labels) {
  *labels += fmt::format("{}{}=\"", labels->empty() ? "" : ",", name);
  for (const char c : value) {
    if (c == '\n') {
      *labels += "\\n";
      continue;
    }
    if (c == '\\' || c == '"') *labels += '\\';
    *labels += c;
  }
  *labels += '"';
}

}  // namespace

MetricsWriter::MetricsWriter(std::string_view model) { Append("model", model, &base_); }

MetricsWriter& MetricsWriter::Family(std::string_view name, std::string_view help,
                                     std::string_view type) {
  name_ = name;
  text_ += fmt::format("# HELP {} {}\n# TYPE {} {}\n", name, help, name, type);
  return *this;
}

MetricsWriter& MetricsWriter::Buckets(const Histogram& histogram, const MetricLabels& labels) {
  const Histogram::Snapshot snapshot = histogram.Collect();
  MetricLabels bucket = labels;
  bucket.emplace_back("le", "");
  for (size_t i = 0; i < snapshot.bounds.size(); ++i) {
    bucket.back().second = NumberText(snapshot.bounds[i]);
    Line("_bucket", static_cast<double>(snapshot.cumulative[i]), bucket);
  }
  Line("_sum", snapshot.sum, labels);
  return Line("_count", static_cast<double>(snapshot.cumulative.back()), labels);
}

MetricsWriter& MetricsWriter::Line(std::string_view suffix, double value,
                                   const MetricLabels& labels) {
  std::string all = base_;
  for (const auto& [name, label_value] : labels) Append(name, label_value, &all);
  text_ += fmt::format("{}{}{{{}}} {}\n", name_, suffix, all, NumberText(value));
  return *this;
}

}  // namespace latentd
