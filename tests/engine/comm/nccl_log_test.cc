#include "engine/comm/nccl_log.h"

#include <optional>
#include <string>

#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

NcclLog Read(const std::string& text) {
  NcclLog log;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) log.AddLine(line);
  return log;
}

TEST(NcclLogTest, TwoNodesOverInfiniband) {
  const NcclLog log = Read(R"(
n1:77:90 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.0.4<0>
n1:77:90 [0] NCCL INFO Using network IB
n1:77:90 [0] NCCL INFO Channel 00/16 :    0   7   6   5   4   3   2   1   8  15  14  13
n1:77:90 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
n1:77:90 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/IPC
n1:77:90 [0] NCCL INFO Channel 00/0 : 15[7] -> 0[0] [receive] via NET/IB/0/GDRDMA
n1:77:90 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0(0)/GDRDMA/Shared
n1:77:90 [0] NCCL INFO Connected all rings, use ring PXN 0 GDR 1)");
  EXPECT_EQ(log.network(), "IB");
  EXPECT_EQ(log.num_channels().at(NcclTransport::kP2p), 2);
  EXPECT_EQ(log.num_channels().at(NcclTransport::kInfiniband), 2);
  EXPECT_EQ(log.slowest(), NcclTransport::kInfiniband);
  EXPECT_TRUE(log.gpu_direct());
  EXPECT_EQ(log.Warning(NcclTransport::kInfiniband), std::nullopt);
}

TEST(NcclLogTest, TheFallBackToSocketsIsLoud) {
  const NcclLog log = Read(R"(
n1:77:90 [0] NCCL INFO NET/IB : No device found.
n1:77:90 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.4<0>
n1:77:90 [0] NCCL INFO Using network Socket
n1:77:90 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via SHM/direct/direct
n1:77:90 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/Socket/0)");
  EXPECT_EQ(log.network(), "Socket");
  EXPECT_EQ(log.num_channels().at(NcclTransport::kShm), 1);
  EXPECT_EQ(log.slowest(), NcclTransport::kSocket);
  EXPECT_FALSE(log.gpu_direct());
  ASSERT_TRUE(log.Warning(NcclTransport::kInfiniband));
  EXPECT_THAT(*log.Warning(NcclTransport::kInfiniband), HasSubstr("InfiniBand was expected"));
  EXPECT_EQ(log.Warning(NcclTransport::kSocket), std::nullopt);
}

TEST(NcclLogTest, StagedInfinibandAndPlugins) {
  EXPECT_FALSE(Read("NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/3").gpu_direct());
  const NcclLog plugin =
      Read("NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/AWS Libfabric/0/GDRDMA");
  EXPECT_EQ(plugin.slowest(), NcclTransport::kInfiniband);
}

TEST(NcclLogTest, OneNodeSaysNothingOfANetwork) {
  const NcclLog log =
      Read("a:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/direct pointer");
  EXPECT_EQ(log.slowest(), NcclTransport::kP2p);
  EXPECT_EQ(TransportName(*log.slowest()), "NVLink");
  EXPECT_FALSE(log.gpu_direct());
}

TEST(NcclLogTest, OtherLinesSayNothing) {
  const NcclLog log = Read(R"(
somebody travels via NET/Socket/0
n1:77:90 [0] NCCL WARN Channel 00/0 : 0[0] -> 1[1] via P2P/IPC
n1:77:90 [0] NCCL INFO Ring 00 : 17 -> 0 -> 7 via P2P/IPC
n1:77:90 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via
n1:77:90 [0] NCCL INFO
)");
  EXPECT_EQ(log.slowest(), std::nullopt);
  EXPECT_TRUE(log.num_channels().empty());
  EXPECT_EQ(log.network(), "");
}

}  // namespace
}  // namespace latentd
