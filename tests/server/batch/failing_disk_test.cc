// What clients see of a disk that is full or failing.

#include <string>
#include <vector>

#include "server/batch/batch_metrics.h"
#include "tests/server/batch/batch_fixture.h"
#include "tests/server/batch/fault_vfs.h"

namespace latentd {
namespace {

struct Disk {
  FaultVfs disk_;
};

class FailingDiskTest : private Disk,
                        public BatchTest,
                        public testing::WithParamInterface<FaultVfs::Fault> {
 protected:
  FailingDiskTest() : BatchTest({}, /*load=*/true, disk_.name()) {}
  ~FailingDiskTest() override { Stop(); }  // before the disk goes

  void Break() { disk_.FailAt(GetParam(), 1); }
  static void ExpectStoreFailed(const grpc::Status& status) {
    const Error error = Explain(status);
    EXPECT_EQ(error.code, grpc::StatusCode::UNAVAILABLE) << error.message;
    EXPECT_EQ(error.reason, "STORE_FAILED");
  }
};

TEST_P(FailingDiskTest, NothingMoreIsTakenAndNothingIsLost) {
  const std::string name = Create("key", 5).name();
  EndItems(name, 0, 2);
  Break();
  ExpectStoreFailed(
      Send({HeaderFrame("other"), ItemsFrame(CompletionItems(3)), CommitFrame(3)}).status);
  ExpectStoreFailed(
      Send({HeaderFrame("third"), ItemsFrame(CompletionItems(3)), CommitFrame(3)}).status);
  {
    grpc::ClientContext context;
    v1::CancelJobRequest request;
    request.set_name(name);
    v1::CancelJobResponse response;
    ExpectStoreFailed(stub().CancelJob(&context, request, &response));
  }
  EXPECT_EQ(Get(name).counts().succeeded(), 2);  // what is there may be read
  EXPECT_TRUE(store().Stats()->failed);

  Restart();
  EXPECT_EQ(Get(name).counts().succeeded(), 2);
  Create("third", 3);
  EndItems(name, 2, 3);
  Finalize(name);
  EXPECT_EQ(Get(name).state(), v1::JOB_STATE_COMPLETED);
}

// In the midst of an upload: its client is told, and goes on with what was acknowledged.
TEST_P(FailingDiskTest, AnUploadGoesOnLater) {
  grpc::ClientContext context;
  v1::CreateJobResponse response;
  const auto writer = stub().CreateJob(&context, &response);
  ASSERT_TRUE(writer->Write(HeaderFrame("key")));
  ASSERT_TRUE(writer->Write(ItemsFrame(CompletionItems(10))));
  ASSERT_TRUE(Eventually([&] {
    const auto upload = store().GetUpload("localhost", "key");
    return upload.ok() && upload->item_count == 10;
  }));
  Break();
  writer->Write(ItemsFrame(CompletionItems(10, 10)));
  ExpectStoreFailed(writer->Finish());  // without another message of the client's
  Restart();
  const auto upload = store().GetUpload("localhost", "key");
  ASSERT_TRUE(upload.ok()) << upload.status();
  ASSERT_GE(upload->item_count, 10);  // of a write that failed nobody knows what is left
  const int64_t first = upload->item_count;
  const Created created =
      Send({HeaderFrame("key", first), ItemsFrame(CompletionItems(30 - first, first)),
            CommitFrame(30, ChainOf(CompletionItems(30)))});
  EXPECT_TRUE(created.status.ok()) << created.status.error_message();
}

INSTANTIATE_TEST_SUITE_P(Faults, FailingDiskTest,
                         testing::Values(FaultVfs::Fault::kSync, FaultVfs::Fault::kDiskFull,
                                         FaultVfs::Fault::kShortWrite));

}  // namespace
}  // namespace latentd
