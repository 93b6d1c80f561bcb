#include "engine/comm/network_interfaces.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace latentd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// A node of a cloud: two cards, InfiniBand with addresses, docker, one card without a cable.
std::vector<NetworkInterface> Node() {
  return {{.name = "lo", .addresses = {"127.0.0.1"}, .up = true},
          {.name = "eth0", .addresses = {"10.0.0.4", "fe80::1"}, .up = true},
          {.name = "eth01", .addresses = {"10.1.0.4"}, .up = true},
          {.name = "eth2", .addresses = {}, .up = true},
          {.name = "ens5", .addresses = {"10.2.0.4"}, .up = false},
          {.name = "ib0", .addresses = {"192.168.0.4"}, .up = true},
          {.name = "docker0", .addresses = {"172.17.0.1"}, .up = true}};
}

std::vector<std::string> Found(const std::string& variable,
                               const std::vector<NetworkInterface>& interfaces = Node()) {
  const auto found = FindSocketInterfaces({.socket_ifname = variable}, interfaces);
  return found.ok() ? *found : std::vector<std::string>();
}

TEST(FindSocketInterfacesTest, PrefixesExactNamesAndExclusions) {
  EXPECT_THAT(Found("eth"), ElementsAre("eth0", "eth01"));
  EXPECT_THAT(Found("eth0"), ElementsAre("eth0", "eth01"));  // a prefix: the classic surprise
  EXPECT_THAT(Found("=eth0"), ElementsAre("eth0"));
  EXPECT_THAT(Found("=eth0,ib0"), ElementsAre("eth0", "ib0"));
  EXPECT_THAT(Found("ib,eth01"), ElementsAre("eth01", "ib0"));
  EXPECT_THAT(Found("^docker,lo,ib"), ElementsAre("eth0", "eth01"));
  EXPECT_THAT(Found("^=eth0,lo"), ElementsAre("eth01", "ib0", "docker0"));
  EXPECT_THAT(Found("lo"), ElementsAre("lo"));
  EXPECT_THAT(Found(",eth0,,"), ElementsAre("eth0", "eth01"));
  EXPECT_THAT(Found("=eth"), IsEmpty());
  EXPECT_THAT(Found("^"), ElementsAre("ib0"));  // one character: not set, says NCCL
}

TEST(FindSocketInterfacesTest, WithoutTheVariableNcclHasAnOrder) {
  std::vector<NetworkInterface> node = Node();
  EXPECT_THAT(Found("", node), ElementsAre("ib0"));
  node.erase(node.begin() + 5);
  EXPECT_THAT(Found("", node), ElementsAre("eth0", "eth01"));
  node.erase(node.begin() + 1, node.begin() + 5);
  EXPECT_THAT(Found("", node), ElementsAre("docker0"));
  node.pop_back();
  EXPECT_THAT(Found("", node), ElementsAre("lo"));
}

TEST(FindSocketInterfacesTest, TheErrorNamesTheInterfacesThereAre) {
  const absl::Status status = FindSocketInterfaces({.socket_ifname = "ens"}, Node()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(),
            "NCCL_SOCKET_IFNAME=ens matches no network interface that is up and has an address; "
            "there are: lo (127.0.0.1), eth0 (10.0.0.4, fe80::1), eth01 (10.1.0.4), eth2 (no "
            "address), ens5 (down), ib0 (192.168.0.4), docker0 (172.17.0.1)");
  EXPECT_EQ(FindSocketInterfaces({}, {}).status().message(),
            "no network interface is up and has an address; there are: none");
}

TEST(ListNetworkInterfacesTest, TheLoopbackOfThisMachineIsThereOnce) {
  const auto interfaces = ListNetworkInterfaces();
  ASSERT_TRUE(interfaces.ok()) << interfaces.status();
  int loopbacks = 0;
  for (const NetworkInterface& interface : *interfaces) {
    EXPECT_FALSE(interface.name.empty());
    if (interface.name != "lo") continue;
    ++loopbacks;
    EXPECT_TRUE(interface.up);
    EXPECT_THAT(interface.addresses, ElementsAre("127.0.0.1"));
  }
  EXPECT_EQ(loopbacks, 1);
}

TEST(InterfaceFilterTest, PortsOfInfinibandDevices) {
  EXPECT_TRUE(InterfaceFilter("mlx5").Matches("mlx5_3", 1));
  EXPECT_TRUE(InterfaceFilter("=mlx5_0:1,mlx5_1:2").Matches("mlx5_1", 2));
  EXPECT_FALSE(InterfaceFilter("=mlx5_0:1,mlx5_1:2").Matches("mlx5_1", 1));
  EXPECT_FALSE(InterfaceFilter("=mlx5_1").Matches("mlx5_10", 1));
  EXPECT_FALSE(InterfaceFilter("^=mlx5_1,mlx5_2").Matches("mlx5_2", 1));
  EXPECT_TRUE(InterfaceFilter("").Matches("anything"));
}

class InfinibandTest : public ::testing::Test {
 protected:
  InfinibandTest() {
    std::string name = std::filesystem::temp_directory_path() / "infinibandXXXXXX";
    root_ = mkdtemp(name.data());
  }
  ~InfinibandTest() override { std::filesystem::remove_all(root_); }

  void Add(const std::string& device, int port, const std::string& state,
           const std::string& link_layer) {
    const auto folder = root_ / device / "ports" / absl::StrCat(port);
    std::filesystem::create_directories(folder);
    std::ofstream(folder / "state") << state << "\n";
    std::ofstream(folder / "link_layer") << link_layer << "\n";
    std::ofstream(folder / "rate") << "400 Gb/sec (4X NDR)\n";
  }

  std::filesystem::path root_;
};

TEST_F(InfinibandTest, PortsAreReadFromSysfs) {
  Add("mlx5_1", 1, "1: DOWN", "InfiniBand");
  Add("mlx5_0", 2, "4: ACTIVE", "Ethernet");
  Add("mlx5_0", 1, "4: ACTIVE", "InfiniBand");
  std::filesystem::create_directories(root_ / "mlx5_2");  // without ports
  const std::vector<InfinibandPort> ports = ListInfinibandPorts(root_);
  ASSERT_EQ(ports.size(), 3);
  EXPECT_EQ(ports[0].device, "mlx5_0");
  EXPECT_EQ(ports[0].port, 1);
  EXPECT_TRUE(ports[0].active);
  EXPECT_FALSE(ports[0].ethernet);
  EXPECT_EQ(ports[0].rate, "400 Gb/sec (4X NDR)");
  EXPECT_EQ(ports[1].port, 2);
  EXPECT_TRUE(ports[1].ethernet);
  EXPECT_FALSE(ports[2].active);
  EXPECT_EQ(DescribeInfiniband({.ib_hca = "=mlx5_0:2"}, ports),
            "mlx5_0:1 InfiniBand 400 Gb/sec (4X NDR) 4: ACTIVE excluded by NCCL_IB_HCA, "
            "mlx5_0:2 RoCE 400 Gb/sec (4X NDR) 4: ACTIVE, "
            "mlx5_1:1 InfiniBand 400 Gb/sec (4X NDR) 1: DOWN");
}

TEST_F(InfinibandTest, WhatToExpectDependsOnPortsAndSettings) {
  EXPECT_EQ(ExpectedNetwork({}, ListInfinibandPorts(root_ / "nothing")), NcclTransport::kSocket);
  Add("mlx5_0", 1, "2: INIT", "InfiniBand");
  EXPECT_EQ(ExpectedNetwork({}, ListInfinibandPorts(root_)), NcclTransport::kSocket);
  Add("mlx5_0", 1, "4: ACTIVE", "InfiniBand");
  const std::vector<InfinibandPort> ports = ListInfinibandPorts(root_);
  EXPECT_EQ(ExpectedNetwork({}, ports), NcclTransport::kInfiniband);
  EXPECT_EQ(ExpectedNetwork({.ib_disable = "0"}, ports), NcclTransport::kInfiniband);
  EXPECT_EQ(ExpectedNetwork({.net = "IB"}, ports), NcclTransport::kInfiniband);
  EXPECT_EQ(ExpectedNetwork({.ib_disable = "1"}, ports), NcclTransport::kSocket);
  EXPECT_EQ(ExpectedNetwork({.net = "Socket"}, ports), NcclTransport::kSocket);
  EXPECT_EQ(ExpectedNetwork({.ib_hca = "mlx5_7"}, ports), NcclTransport::kSocket);
}

TEST(NcclNetworkSettingsTest, AreReadFromTheEnvironment) {
  setenv("NCCL_SOCKET_IFNAME", "eth", 1);
  unsetenv("NCCL_IB_HCA");
  EXPECT_EQ(NcclNetworkSettings::FromEnvironment().socket_ifname, "eth");
  EXPECT_EQ(NcclNetworkSettings::FromEnvironment().ib_hca, "");
  unsetenv("NCCL_SOCKET_IFNAME");
}

}  // namespace
}  // namespace latentd
