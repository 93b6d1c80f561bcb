#include "server/batch/batch_schema.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/batch/store_fixture.h"

namespace latentd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

std::string ReadFile(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

class BatchSchemaTest : public ::testing::Test {
 protected:
  std::unique_ptr<SqliteConnection> Connect(const std::string& name = "batch.db") {
    auto db = SqliteConnection::Open((folder_.path() / name).string(), "",
                                     SqliteConnection::Mode::kWrite);
    EXPECT_TRUE(db.ok()) << db.status();
    return *std::move(db);
  }
  absl::StatusOr<std::unique_ptr<BatchStore>> Open() {
    return BatchStore::Open({.directory = folder_.path(), .now = [] { return kStart; }});
  }

  // All tables and indexes, in the order of their names.
  static std::string Schema(SqliteConnection* db) {
    std::string schema;
    SqliteQuery query =
        db->Query("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY name");
    while (*query.Step()) {
      schema += std::string(query.Text(0)) + ": " + std::string(query.Text(1)) + "\n";
    }
    return schema;
  }

  StoreFolder folder_;
};

TEST_F(BatchSchemaTest, AStoreOfVersion1Opens) {
  ASSERT_TRUE(Connect()->Script(ReadFile("tests/server/batch/store_v1.sql")).ok());
  {
    auto opened = Open();
    ASSERT_TRUE(opened.ok()) << opened.status();
    BatchStore& store = **opened;
    const auto jobs = store.ListJobs({}, 1000, 10);
    ASSERT_TRUE(jobs.ok()) << jobs.status();
    std::vector<std::string> found;
    for (const JobRecord& job : *jobs) {
      found.push_back(job.owner + "/" + job.job.request_id() + " " +
                      v1::JobState_Name(job.job.state()));
    }
    EXPECT_THAT(found,
                ElementsAre("ann/again JOB_STATE_QUEUED", "ann/cancelling JOB_STATE_CANCELLING",
                            "bob/running JOB_STATE_IN_PROGRESS", "ann/done JOB_STATE_COMPLETED"));
    EXPECT_EQ((*jobs)[0].job.spec().DebugString(), MakeSpec().DebugString());
    EXPECT_EQ((*jobs)[0].job.retry_of(), (*jobs)[3].job.name());
    EXPECT_EQ(store.GetUpload("ann", "upload")->item_count, 2);
    const auto results = store.ReadResults(1, 0, 10, 1 << 20);
    ASSERT_TRUE(results.ok()) << results.status();
    ASSERT_THAT(*results, SizeIs(3));
    EXPECT_EQ((*results)[0].result.error().reason(), "INVALID_FIELD");
    EXPECT_EQ((*results)[1].result.complete().request_id(), "answer 0");

    // And it goes on.
    const auto pending = store.ReadPending(2, 0, 10, 1 << 20);
    ASSERT_TRUE(pending.ok()) << pending.status();
    ASSERT_THAT(*pending, SizeIs(3));
    EXPECT_EQ((*pending)[0].attempts, 2);
    EXPECT_EQ((*pending)[0].seed, 22u);
    EXPECT_EQ(store.GetJob(2)->job.recoveries(), 1);
    EXPECT_EQ(store.UsageOf("ann")->items, 5);
    for (const JobId job : {2, 6}) EXPECT_TRUE(FinishJob(&store, job).ok());
    EXPECT_TRUE(*store.FinalizeSome(3, 10));
    ASSERT_TRUE(Append(&store, 4, 2, MakeItems(2, 1)).ok());
    EXPECT_TRUE(store.CommitUpload(4, 3, 1).ok());
    EXPECT_EQ(store.OpenUpload("ann", "next", MakeSpec())->record.id, 7);
    EXPECT_TRUE(store.Purge(absl::InfinitePast()).ok());
    EXPECT_EQ(store.GetJob(6)->job.state(), v1::JOB_STATE_COMPLETED);
  }
  const auto db = Connect();
  EXPECT_EQ(*db->Number("PRAGMA user_version"), BatchSchemaVersion());
  EXPECT_EQ(*db->Number("SELECT count(*) FROM deleted"), 0);
  const auto fresh = Connect("fresh.db");
  ASSERT_TRUE(MigrateBatchSchema(fresh.get()).ok());
  EXPECT_EQ(Schema(db.get()), Schema(fresh.get()));
}

// What was released stays as it was: the schema that version 1 made is that of its dump.
TEST_F(BatchSchemaTest, VersionsStayAsTheyWere) {
  const auto dumped = Connect("dumped.db");
  ASSERT_TRUE(dumped->Script(ReadFile("tests/server/batch/store_v1.sql")).ok());
  const auto made = Connect("made.db");
  ASSERT_TRUE(MigrateBatchSchema(made.get(), 1).ok());
  EXPECT_EQ(Schema(made.get()), Schema(dumped.get()));
}

TEST_F(BatchSchemaTest, EachStepIsWholeOrNot) {
  const auto db = Connect();
  for (int32_t version = 1; version <= BatchSchemaVersion(); ++version) {
    ASSERT_TRUE(MigrateBatchSchema(db.get(), version).ok());
    EXPECT_EQ(*db->Number("PRAGMA user_version"), version);
    EXPECT_TRUE(CheckBatchSchema(db.get()).ok());
  }
  const std::string whole = Schema(db.get());
  // A step that fails in the middle: what it would make second is there.
  ASSERT_TRUE(db->Script("DROP INDEX jobs_not_ended; PRAGMA user_version = 1").ok());
  const std::string before = Schema(db.get());
  EXPECT_FALSE(MigrateBatchSchema(db.get()).ok());
  EXPECT_EQ(Schema(db.get()), before);
  EXPECT_EQ(*db->Number("PRAGMA user_version"), 1);
  ASSERT_TRUE(db->Script("DROP INDEX jobs_to_purge").ok());
  EXPECT_TRUE(MigrateBatchSchema(db.get()).ok());
  EXPECT_EQ(Schema(db.get()), whole);
}

TEST_F(BatchSchemaTest, ANewerStoreIsRefusedAndKept) {
  { ASSERT_TRUE(Open().ok()); }
  ASSERT_TRUE(Connect()->Script("PRAGMA user_version = 1000").ok());
  const std::string before = ReadFile(folder_.path() / "batch.db");
  const auto store = Open();
  EXPECT_TRUE(absl::IsFailedPrecondition(store.status())) << store.status();
  EXPECT_THAT(std::string(store.status().message()), HasSubstr("newer"));
  EXPECT_EQ(ReadFile(folder_.path() / "batch.db"), before);
}

TEST_F(BatchSchemaTest, AnotherProgramsFileIsRefused) {
  ASSERT_TRUE(Connect()->Script("CREATE TABLE other (id INTEGER)").ok());
  const auto store = Open();
  EXPECT_TRUE(absl::IsFailedPrecondition(store.status())) << store.status();
  std::ofstream(folder_.path() / "batch.db") << std::string(5000, 'x');
  EXPECT_TRUE(absl::IsUnavailable(Open().status()));
}

}  // namespace
}  // namespace latentd
