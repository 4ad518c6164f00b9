#include "console.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <system_error>

#include <CLI/CLI.hpp>

namespace kvmix::tools {
namespace {

std::string ended;  // the line below; a handler may not make it

// Says on stderr that a signal ends the program, and lets it end it.
void SayAndEnd(int signal) {
  [[maybe_unused]] const ssize_t n = write(STDERR_FILENO, ended.data(), ended.size());
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

}  // namespace

int RunProgram(CLI::App* app, int argc, char** argv, const std::function<void()>& run) try {
  app->parse(argc, argv);
  ended = app->get_name() + ": error: ended by SIGTERM\n";
  std::signal(SIGTERM, SayAndEnd);
  run();
  return 0;
} catch (const CLI::Success& e) {
  return app->exit(e);
} catch (const std::exception& e) {
  std::string message = e.what();
  std::ranges::replace(message, '\n', ' ');
  std::fputs(fmt::format("{}: error: {}\n", app->get_name(), message).c_str(), stderr);
  return 1;
}

void Warn(const std::string& message) {
  std::fputs(fmt::format("{}: warning: {}\n", program_invocation_short_name, message).c_str(),
             stderr);
}

void Print(const std::string& text) {
  if (std::fputs(text.c_str(), stdout) < 0 || std::fflush(stdout) != 0)
    Refuse("writing to the standard output failed");
}

void WriteFile(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  if (!(file << text << std::flush))
    Refuse("{}: expected a file that can be written, found: {}", path, std::strerror(errno));
}

std::optional<std::pair<std::size_t, std::size_t>> ParsePair(std::string_view text) {
  std::pair<std::size_t, std::size_t> pair;
  const char* end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, pair.first);
  if (first.ec != std::errc() || first.ptr == end || *first.ptr != ':') return std::nullopt;
  const auto second = std::from_chars(first.ptr + 1, end, pair.second);
  if (second.ec != std::errc() || second.ptr != end) return std::nullopt;
  return pair;
}

StatusLine::StatusLine(Clock::time_point start)
    : on_terminal_(isatty(STDERR_FILENO) == 1), start_(start), shown_(start) {}

void StatusLine::Show(const std::string& text, Clock::time_point now) {
  if (on_terminal_) {
    std::fputs(fmt::format("\r{}\033[K", text).c_str(), stderr);
  } else if (now - shown_ >= std::chrono::minutes(1)) {
    const auto minutes = std::chrono::duration_cast<std::chrono::minutes>(now - start_);
    std::fputs(fmt::format("{}, {} min\n", text, minutes.count()).c_str(), stderr);
    shown_ = now;
  }
  std::fflush(stderr);
}

void StatusLine::Wipe() {
  if (on_terminal_) Show("");
}

ProgressBar::ProgressBar(std::string label) : label_(std::move(label)) { Update(0, 1); }

void ProgressBar::Update(std::size_t done, std::size_t total, StatusLine::Clock::time_point now) {
  if (!line_.on_terminal())
    return line_.Show(fmt::format("{}: {} of {} layers", label_, done, total), now);
  constexpr std::size_t kWidth = 40;
  const std::size_t filled = kWidth * done / total;
  line_.Show(fmt::format("{} [{:#<{}}{:.<{}}] {:3} %", label_, "", filled, "", kWidth - filled,
                         100 * done / total));
}

void StepBar::Update(const std::string& step, std::size_t done, std::size_t total) {
  if (!bar_ || step != step_) {
    bar_.reset();  // the line that it wrote goes first
    bar_.emplace(step_ = step);
  }
  bar_->Update(done, total);
}

std::string Table::Text() const {
  std::vector<std::vector<std::string>> rows;
  std::vector<std::size_t> widths;
  for (const std::string& row : rows_) {
    rows.push_back(CLI::detail::split(row, '\t'));
    widths.resize(std::max(widths.size(), rows.back().size()));
    for (std::size_t c = 0; c < rows.back().size(); ++c)
      widths[c] = std::max(widths[c], rows.back()[c].size());
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t c = 0; c < row.size(); ++c)
      line += fmt::format(fmt::runtime(c < left_ ? "  {:<{}}" : "  {:>{}}"), row[c], widths[c]);
    text += line.erase(line.find_last_not_of(' ') + 1) + "\n";
  }
  return text;
}

}  // namespace kvmix::tools
