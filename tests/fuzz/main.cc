// A fuzz target without libFuzzer, for every compiler.
//   TARGET                       the seeds, then random damage to them for a second
//   TARGET --seconds S           the same for S seconds
//   TARGET --write-seeds FOLDER  the seeds as files
//   TARGET FILE...               these files, for one that failed
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "tests/dump_files.h"
#include "tests/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

void Run(const std::string& bytes) {
  // A copy of exactly this size, so that a sanitizer sees a read beyond its end.
  const std::vector<std::uint8_t> copy(bytes.begin(), bytes.end());
  LLVMFuzzerTestOneInput(copy.data(), copy.size());
}

// Bytes changed, removed, doubled, or a number's digits replaced by an extreme number.
void Damage(std::string* bytes, std::mt19937* random) {
  const auto below = [&](std::size_t n) { return (*random)() % (n + 1); };
  const std::size_t at = below(bytes->size());
  const std::size_t length = below(std::min<std::size_t>(bytes->size() - at, 20));
  static const std::vector<std::string> kNumbers = {
      "-1",   "0",    "1e999", "1e-320", "18446744073709551615", "9223372036854775808",
      "null", "\"\"", "[]"};
  switch (below(4)) {
    case 0:
      bytes->erase(at, length);
      break;
    case 1:
      bytes->insert(at, bytes->substr(at, length));
      break;
    case 2: {
      const std::size_t first = bytes->find_first_of("0123456789", at);
      if (first == bytes->npos) break;
      const std::size_t last = bytes->find_first_not_of("0123456789.", first);
      bytes->replace(first, last - first, kNumbers[below(kNumbers.size() - 1)]);
      break;
    }
    default:
      if (at < bytes->size()) (*bytes)[at] = static_cast<char>((*random)());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  const std::vector<std::string> seeds = kvmix::fuzz::Seeds();
  double seconds = 1.0;
  if (arguments.size() == 2 && arguments[0] == "--write-seeds") {
    for (std::size_t i = 0; i < seeds.size(); ++i)
      kvmix::testing::WriteBytes(arguments[1] + "/seed" + std::to_string(i), seeds[i]);
    return 0;
  }
  if (arguments.size() == 2 && arguments[0] == "--seconds") {
    seconds = std::atof(arguments[1].c_str());
  } else if (!arguments.empty()) {
    for (const std::string& path : arguments) Run(kvmix::testing::ReadBytes(path));
    return 0;
  }
  for (const std::string& seed : seeds) Run(seed);
  using Clock = std::chrono::steady_clock;
  const Clock::time_point begin = Clock::now();
  std::mt19937 random(1);
  std::size_t runs = 0;
  while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds) {
    std::string bytes = seeds[random() % seeds.size()];
    for (std::size_t times = 1 + random() % 4; times > 0; --times) Damage(&bytes, &random);
    Run(bytes);
    ++runs;
  }
  std::printf("%zu seeds and %zu damaged files\n", seeds.size(), runs);
  return 0;
}
