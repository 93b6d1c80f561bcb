#include <string>

#include "gmock/gmock.h"
#include "server/batch/batch_metrics.h"
#include "tests/server/batch/batch_fixture.h"

namespace latentd {
namespace {

using testing::HasSubstr;
using testing::Not;

class MetricsTest : public BatchStoreTest {
 protected:
  std::string Text(int64_t num_running = 0) {
    MetricsWriter out("demo");
    absl::MutexLock lock(&mutex_);
    metrics_.Write(num_running, &out, now_);
    return out.Take();
  }
  bool EventuallySays(const std::string& line) {
    return Eventually([&] { return Text().find(line + "\n") != std::string::npos; });
  }

  BatchMetrics metrics_;
};

TEST_F(MetricsTest, AnEmptyStoreHasEverySeriesThatCanBeZero) {
  const BatchMetrics::Watch watch(&metrics_, store_.get(), absl::Milliseconds(1));
  ASSERT_TRUE(Eventually([&] {
    return Text().find("latentd_batch_store_bytes{model=\"demo\"} 0\n") == std::string::npos;
  }));
  const std::string text = Text();
  for (const char* series : {"latentd_batch_jobs{model=\"demo\",state=\"in_progress\"} 0\n",
                             "latentd_batch_items_total{model=\"demo\",state=\"expired\"} 0\n",
                             "latentd_batch_items_pending{model=\"demo\"} 0\n",
                             "latentd_batch_oldest_pending_age_seconds{model=\"demo\"} 0\n",
                             "latentd_batch_recoveries_total{model=\"demo\"} 0\n",
                             "latentd_batch_commit_seconds_count{model=\"demo\"} 0\n",
                             "latentd_batch_store_failed{model=\"demo\"} 0\n"}) {
    EXPECT_THAT(text, HasSubstr(series));
  }
  EXPECT_THAT(text, Not(HasSubstr("latentd_batch_deadline_slack_seconds{")));
}

TEST_F(MetricsTest, ChangesAreSeen) {
  const BatchMetrics::Watch watch(&metrics_, store_.get(), absl::Milliseconds(1));
  const JobId job = NewJob("key", 10).id;
  Pass(absl::Seconds(60));
  ASSERT_TRUE(End(store_.get(), {Succeed(job, 0), Fail(job, 1), Fail(job, 2)}).ok());
  metrics_.OnChange();
  EXPECT_TRUE(EventuallySays("latentd_batch_items_total{model=\"demo\",state=\"failed\"} 2"));
  const std::string text = Text(/*num_running=*/3);
  EXPECT_THAT(text, HasSubstr("latentd_batch_items_total{model=\"demo\",state=\"succeeded\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("latentd_batch_items_running{model=\"demo\"} 3\n"));
  EXPECT_THAT(text, HasSubstr("latentd_batch_items_pending{model=\"demo\"} 4\n"));
  EXPECT_THAT(text, HasSubstr("latentd_batch_oldest_pending_age_seconds{model=\"demo\"} 60\n"));
  EXPECT_THAT(text, HasSubstr("latentd_batch_deadline_slack_seconds{model=\"demo\"} 3540\n"));
  metrics_.OnCommit(absl::Milliseconds(3));
  EXPECT_THAT(Text(),
              HasSubstr("latentd_batch_commit_seconds_bucket{model=\"demo\",le=\"0.005\"} 1"));
}

}  // namespace
}  // namespace latentd
