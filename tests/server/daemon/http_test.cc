#include "server/http.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

int Connect(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  EXPECT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  return fd;
}

// Sends `request` and returns all that comes back before the end of the connection.
std::string Exchange(int port, const std::string& request) {
  const int fd = Connect(port);
  [[maybe_unused]] ssize_t n = send(fd, request.data(), request.size(), MSG_NOSIGNAL);
  std::string answer;
  char buffer[4096];
  while ((n = recv(fd, buffer, sizeof(buffer), 0)) > 0)
    answer.append(buffer, static_cast<size_t>(n));
  close(fd);
  return answer;
}

class HttpTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto server = HttpServer::Start(
        "127.0.0.1:0",
        {{"/ok", [] { return HttpServer::Response{.body = "fine\n"}; }},
         {"/down", [] { return HttpServer::Response{.code = 503, .body = "down\n"}; }}});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ASSERT_GT(server_->port(), 0);
  }
  std::string Get(const std::string& path) {
    return Exchange(server_->port(), "GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n");
  }

  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpTest, AnswersItsPaths) {
  EXPECT_THAT(Get("/ok"), StartsWith("HTTP/1.1 200 OK\r\n"));
  EXPECT_THAT(Get("/ok"), HasSubstr("\r\n\r\nfine\n"));
  EXPECT_THAT(Get("/ok?x=1"), StartsWith("HTTP/1.1 200 "));
  EXPECT_THAT(Get("/down"), StartsWith("HTTP/1.1 503 "));
  EXPECT_THAT(Get("/"), StartsWith("HTTP/1.1 404 "));
  EXPECT_THAT(Get("/../../etc/passwd"), StartsWith("HTTP/1.1 4"));
}

TEST_F(HttpTest, OnlyGetAndHead) {
  const std::string head = Exchange(server_->port(), "HEAD /ok HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_THAT(head, StartsWith("HTTP/1.1 200 "));
  EXPECT_TRUE(head.ends_with("\r\n\r\n")) << head;
  EXPECT_THAT(
      Exchange(server_->port(), "POST /ok HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"),
      StartsWith("HTTP/1.1 405 "));
}

TEST_F(HttpTest, SurvivesWhatIsNotHttp) {
  for (const std::string& garbage :
       {std::string("\0\1\2\3\r\n\r\n", 8), std::string("GET\r\n\r\n"),
        std::string(20000, 'a') + "\r\n\r\n", std::string("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")}) {
    EXPECT_THAT(Exchange(server_->port(), garbage), testing::Not(HasSubstr("200 OK")));
  }
  EXPECT_THAT(Get("/ok"), StartsWith("HTTP/1.1 200 "));
}

TEST_F(HttpTest, ASecondServerOnThePortIsRefused) {
  const std::string address = "127.0.0.1:" + std::to_string(server_->port());
  const auto second = HttpServer::Start(address, {});
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(address));
  EXPECT_FALSE(HttpServer::Start("127.0.0.1:99999", {}).ok());
  EXPECT_FALSE(HttpServer::Start("no.such.host.invalid:80", {}).ok());
}

// More silent clients than there are places: probes still come through at once.
TEST_F(HttpTest, SilentClientsKeepNobodyWaiting) {
  std::vector<int> silent;
  for (int i = 0; i < 200; ++i) silent.push_back(Connect(server_->port()));
  const absl::Time begin = absl::Now();
  EXPECT_THAT(Get("/ok"), StartsWith("HTTP/1.1 200 "));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(2));
  server_.reset();  // and they do not hold up the end
  EXPECT_LT(absl::Now() - begin, absl::Seconds(4));
  for (const int fd : silent) close(fd);
}

TEST_F(HttpTest, ManyAtOnce) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([this] {
      for (int n = 0; n < 20; ++n) EXPECT_THAT(Get("/ok"), HasSubstr("fine"));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace latentd
