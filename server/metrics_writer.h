#ifndef LATENTD_SERVER_METRICS_WRITER_H_
#define LATENTD_SERVER_METRICS_WRITER_H_

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "server/histogram.h"

namespace latentd {

using MetricLabels = std::vector<std::pair<std::string_view, std::string>>;

// Writes families in Prometheus' text format; every series has the label `model`.
class MetricsWriter {
 public:
  explicit MetricsWriter(std::string_view model);

  // Begins a family; its series follow.
  MetricsWriter& Family(std::string_view name, std::string_view help, std::string_view type);
  MetricsWriter& Value(double value, const MetricLabels& labels = {}) {
    return Line("", value, labels);
  }
  void Gauge(std::string_view name, std::string_view help, double value) {
    Family(name, help, "gauge").Value(value);
  }
  void Counter(std::string_view name, std::string_view help, double value) {
    Family(name, help, "counter").Value(value);
  }
  // One histogram of the family.
  MetricsWriter& Buckets(const Histogram& histogram, const MetricLabels& labels = {});
  void Distribution(std::string_view name, std::string_view help, const Histogram& histogram) {
    Family(name, help, "histogram").Buckets(histogram);
  }
  std::string Take() { return std::move(text_); }

 private:
  MetricsWriter& Line(std::string_view suffix, double value, const MetricLabels& labels);

  std::string base_;
  std::string name_;
  std::string text_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_METRICS_WRITER_H_
