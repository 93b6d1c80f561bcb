#include "server/status.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "tests/server/service/service_fixture.h"

namespace latentd {
namespace {

TEST(StatusTest, DetailsSurviveTheRoundTrip) {
  const absl::Status status = MakeBadRequest({{"a.b", "is 1; must be 2"}, {"c", "is empty"}});
  EXPECT_EQ(FromGrpcStatus(ToGrpcStatus(status)), status);
  EXPECT_EQ(status.message(), "a.b is 1; must be 2; c is empty");
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
}

TEST(StatusTest, EveryErrorHasOneErrorInfo) {
  for (int code = 1; code <= 16; ++code) {
    const Error error =
        Explain(ToGrpcStatus(absl::Status(static_cast<absl::StatusCode>(code), "why")));
    EXPECT_EQ(error.code, code);
    EXPECT_EQ(error.message, "why");
    EXPECT_EQ(error.reason, absl::StatusCodeToString(static_cast<absl::StatusCode>(code)));
  }
}

TEST(StatusTest, ARetryDelayOfOursIsKept) {
  const Error error = Explain(
      ToGrpcStatus(WithRetryDelay(absl::UnavailableError("loading"), absl::Milliseconds(2500))));
  EXPECT_DOUBLE_EQ(error.retry_seconds.value(), 2.5);
}

TEST(StatusTest, LongTextsAreCutBetweenCharacters) {
  std::string euros;
  for (int i = 0; i < 100000; ++i) euros += "€";
  std::vector<FieldViolation> violations(1000, {euros, euros});
  const grpc::Status status = ToGrpcStatus(WithFieldViolations(
      MakeError(absl::StatusCode::kInvalidArgument, "WHY", euros, {{"euros", euros}}), violations));
  // In trailers: the message percent-encoded, the details in base64; clients accept 8 KiB.
  EXPECT_LT(status.error_message().size() * 3 + status.error_details().size() * 4 / 3, 8000u);
  EXPECT_EQ(Explain(status).reason, "WHY");  // it parses, so it is UTF-8
  EXPECT_THAT(status.error_message(), testing::EndsWith("€..."));
}

TEST(StatusTest, ManyShortViolationsAreTold) {
  std::vector<FieldViolation> violations;
  for (int i = 0; i < 1000; ++i)
    violations.push_back({"items[" + std::to_string(i) + "]", "is bad"});
  const grpc::Status status = ToGrpcStatus(MakeBadRequest(violations));
  EXPECT_EQ(Explain(status).violations.size(), 100u);
  EXPECT_LT(status.error_message().size() * 3 + status.error_details().size() * 4 / 3, 8000u);
}

TEST(StatusTest, AForeignStatusWithoutDetailsHasAReason) {
  EXPECT_EQ(ErrorReason(absl::OkStatus()), "");
  EXPECT_EQ(ErrorReason(FromGrpcStatus(grpc::Status(grpc::StatusCode::INTERNAL, "x"))), "INTERNAL");
}

}  // namespace
}  // namespace latentd
