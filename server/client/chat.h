#ifndef LATENTD_SERVER_CLIENT_CHAT_H_
#define LATENTD_SERVER_CLIENT_CHAT_H_

#include <iosfwd>
#include <string>
#include <vector>

#include "server/client/chat_session.h"

namespace CLI {
class App;
}

namespace latentd {

// Adds `latentd chat [message]` to the program. Its callback runs the command and sets
// `*exit_code`, which must outlive `app`'s parsing, to one of the kExit* of connection.h.
void RegisterChatCommand(CLI::App& app, int* exit_code);

struct ChatOptions {
  ChatSession::Options session;    // its `style` is made by RunChat from what follows
  std::vector<std::string> words;  // the message, to be joined by spaces; "-" alone: standard input
  std::string reasoning = "auto";  // auto (show on a terminal), show, hide
  bool raw = false;
  bool json = false;
};

// Where a command reads and writes: the process's own, or a test's.
struct ChatTerminal {
  int in_fd;
  bool in_is_terminal;
  bool out_is_terminal;
  bool no_color;  // the environment variable NO_COLOR is set and not empty
  std::ostream& out;
  std::ostream& err;
};

// Runs `latentd chat` to its end and returns the exit code. Takes over SIGINT meanwhile.
int RunChat(const ChatOptions& options, const ChatTerminal& terminal);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_CHAT_H_
