#include "server/client/line_reader.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <thread>

namespace latentd {
namespace {

class LineReaderTest : public testing::Test {
 protected:
  LineReaderTest() { EXPECT_EQ(pipe(pipe_), 0); }
  ~LineReaderTest() override {
    close(pipe_[0]);
    CloseInput();
  }
  void Write(const std::string& text) {
    EXPECT_EQ(write(pipe_[1], text.data(), text.size()), static_cast<ssize_t>(text.size()));
  }
  void CloseInput() {
    if (pipe_[1] >= 0) close(pipe_[1]);
    pipe_[1] = -1;
  }

  int pipe_[2];
  Interrupts interrupts_;
};

TEST_F(LineReaderTest, SplitsLines) {
  LineReader reader(pipe_[0], interrupts_);
  Write("one\ntwo\r\n\nlast");
  CloseInput();
  std::string line;
  for (const char* expected : {"one", "two", "", "last"}) {
    EXPECT_EQ(reader.Read(&line), LineReader::Event::kLine);
    EXPECT_EQ(line, expected);
  }
  EXPECT_EQ(reader.Read(&line), LineReader::Event::kEnd);
  EXPECT_EQ(reader.Read(&line), LineReader::Event::kEnd);
}

TEST_F(LineReaderTest, JoinsWhatComesInPieces) {
  LineReader reader(pipe_[0], interrupts_);
  std::thread writer([this] {
    for (const char* piece : {"he", "ll", "o\nrest"}) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      Write(piece);
    }
  });
  std::string line;
  EXPECT_EQ(reader.Read(&line), LineReader::Event::kLine);
  EXPECT_EQ(line, "hello");
  writer.join();
}

TEST_F(LineReaderTest, CtrlCDropsTheLine) {
  LineReader reader(pipe_[0], interrupts_);
  Write("half a li");
  std::thread ctrl_c([] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    std::raise(SIGINT);
  });
  std::string line;
  EXPECT_EQ(reader.Read(&line), LineReader::Event::kInterrupted);
  ctrl_c.join();
  interrupts_.Clear();
  Write("whole\n");
  EXPECT_EQ(reader.Read(&line), LineReader::Event::kLine);
  EXPECT_EQ(line, "whole");
}

TEST_F(LineReaderTest, ReadAllTakesEverythingUpToItsLimit) {
  Write("a\nb\n");
  CloseInput();
  EXPECT_EQ(ReadAll(pipe_[0], 4, interrupts_).value(), "a\nb\n");
}

TEST_F(LineReaderTest, ReadAllRefusesTooMuch) {
  Write("12345");
  CloseInput();
  EXPECT_EQ(ReadAll(pipe_[0], 4, interrupts_).status().message(),
            "standard input has more than 4 bytes");
}

TEST(InterruptsTest, PendingUntilCleared) {
  Interrupts interrupts;
  EXPECT_FALSE(interrupts.pending());
  EXPECT_FALSE(interrupts.Sleep(absl::Milliseconds(1)));
  std::raise(SIGINT);
  EXPECT_TRUE(interrupts.pending());
  EXPECT_TRUE(interrupts.Sleep(absl::Seconds(60)));
  interrupts.Clear();
  EXPECT_FALSE(interrupts.pending());
}

TEST(InterruptsTest, OnInterruptActsOnceOrNever) {
  Interrupts interrupts;
  std::atomic<int> calls = 0;
  {
    const OnInterrupt never(interrupts, [&] { ++calls; });
  }
  EXPECT_EQ(calls, 0);
  {
    const OnInterrupt once(interrupts, [&] { ++calls; });
    std::raise(SIGINT);
    std::raise(SIGINT);
    while (calls == 0 && !interrupts.Sleep(absl::Milliseconds(1))) {
    }
  }
  EXPECT_EQ(calls, 1);
}

}  // namespace
}  // namespace latentd
