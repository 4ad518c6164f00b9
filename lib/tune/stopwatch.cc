#include "lib/tune/stopwatch.h"

#include <algorithm>
#include <chrono>

namespace kvmix::tune {

std::vector<double> MedianSeconds(const std::vector<std::function<void()>>& functions,
                                  double seconds, std::size_t min_rounds) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  };
  for (const std::function<void()>& f : functions) f();
  std::vector<std::vector<double>> times(functions.size());
  const Clock::time_point begin = Clock::now();
  for (std::size_t round = 0; round < min_rounds || since(begin) < seconds; ++round) {
    for (std::size_t i = 0; i < functions.size(); ++i) {
      const Clock::time_point start = Clock::now();
      functions[i]();
      times[i].push_back(since(start));
    }
  }
  std::vector<double> medians;
  for (std::vector<double>& t : times) {
    const auto middle = t.begin() + static_cast<std::ptrdiff_t>(t.size() / 2);
    std::nth_element(t.begin(), middle, t.end());
    medians.push_back(t.empty() ? 0.0 : *middle);
  }
  return medians;
}

}  // namespace kvmix::tune
