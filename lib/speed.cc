#include "kvmix/speed.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "file.h"
#include "json_view.h"
#include "kernels/kernels.h"
#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "machine.h"
#include "random_halves.h"

namespace kvmix {
namespace {

constexpr std::string_view kFormat = "kvmix-wisdom", kOldFormat = "kvmix-wisdom-1";
constexpr std::size_t kMajor = 1, kMinor = 0;
constexpr const char* kAdvice = "; delete this file or name another, and speeds are measured anew";

HeadCodec CodecFor(const CodecKind& kind) {
  HeadCodec codec{kind.storage, kind.scale, kind.scale_type, 0.0f, {}};
  if (kind.scale == ScaleKind::kHead) codec.head_scale = internal::kHeadScale;
  return codec;
}

// One KV head's cache, full, and the decode of one token over it.
struct Decode {
  HeadSpeed speed;
  Cache cache;
};

Status CheckSameMachine(const Wisdom& found, const std::string& path) {
  const Wisdom here = ThisMachine();
  const auto check = [&](const char* what, const std::string& expected, const std::string& value) {
    return expected == value
               ? Status()
               : internal::FileError(ErrorCode::kMismatch, path, what, internal::Quoted(expected),
                                     internal::Quoted(value) + kAdvice);
  };
  if (Status s = check("cpu", here.cpu, found.cpu); !s.ok()) return s;
  if (Status s = check("target", here.target, found.target); !s.ok()) return s;
  return check("library_version", here.version, found.version);
}

constexpr std::size_t kModelBytes = std::size_t{64} << 20;

}  // namespace

const HeadSpeed* Wisdom::Find(const std::string& k_codec, const std::string& v_codec,
                              std::size_t group, std::size_t head_dim, std::size_t context) const {
  for (const HeadSpeed& s : speeds)
    if (s.k_codec == k_codec && s.v_codec == v_codec && s.group == group &&
        s.head_dim == head_dim && s.context == context)
      return &s;
  return nullptr;
}

Wisdom ThisMachine() {
  return {internal::CpuName(), kernels::ActiveKernels().target, KVMIX_VERSION, {}};
}

Status SaveWisdom(const Wisdom& wisdom, const std::string& path) {
  nlohmann::ordered_json json = {{"format", kFormat},
                                 {"version", {kMajor, kMinor}},
                                 {"cpu", wisdom.cpu},
                                 {"target", wisdom.target},
                                 {"library_version", wisdom.version}};
  json["speeds"] = nlohmann::ordered_json::array();
  for (const HeadSpeed& s : wisdom.speeds)
    json["speeds"].push_back({{"k", s.k_codec},
                              {"v", s.v_codec},
                              {"group", s.group},
                              {"head_dim", s.head_dim},
                              {"context", s.context},
                              {"decode_ns", s.decode_ns}});
  return internal::WriteFileAtomically(
      path, json.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

Result<Wisdom> LoadWisdom(const std::string& path) {
  const Result<nlohmann::json> document = internal::LoadJson(path);
  if (!document.ok()) return document.status();
  Status status;
  const internal::JsonView root(*document, path, &status);
  if (root.has("format") && root["format"].Text() == kOldFormat)
    return internal::FileError(ErrorCode::kVersion, path, "format", internal::Quoted(kFormat),
                               internal::Quoted(kOldFormat) + kAdvice);
  internal::CheckVersion(root, kFormat, kMajor);
  if (!status.ok()) return status;
  Wisdom wisdom{root["cpu"].Text(), root["target"].Text(), root["library_version"].Text(), {}};
  const internal::JsonView speeds = root["speeds"];
  const std::size_t size = speeds.size();
  for (std::size_t i = 0; i < size; ++i) {
    const internal::JsonView s = speeds[i], ns = s["decode_ns"];
    wisdom.speeds.push_back({s["k"].Text(), s["v"].Text(), s["group"].Count(),
                             s["head_dim"].Count(), s["context"].Count(), ns.Number()});
    if (!(wisdom.speeds.back().decode_ns > 0.0))
      ns.Fail(ErrorCode::kCorrupt, "a time above 0",
              fmt::format("{}", wisdom.speeds.back().decode_ns));
  }
  if (!status.ok()) return status;
  if (Status s = CheckSameMachine(wisdom, path); !s.ok()) return s;
  return wisdom;
}

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

Status MeasureHeadSpeeds(const std::vector<CodecKind>& k, const std::vector<CodecKind>& v,
                         std::size_t group, std::size_t head_dim, std::size_t context,
                         double seconds, Wisdom* wisdom) {
  Geometry geometry{1, 1, group, head_dim};
  if (Status s = CheckGeometry(geometry); !s.ok()) return s;
  if (context == 0) return {ErrorCode::kInvalidArgument, "context 0: expected 1 or more tokens"};
  // Layers enough that attention reads one as it does in a model, of which L2 does not hold the
  // whole; only the first is filled.
  geometry.layers += std::min<std::size_t>(kModelBytes / (context * head_dim * 4), 999);
  std::vector<Half> k_rows, v_rows;
  const std::vector<Half> q = internal::RandomHalves(group * head_dim, 1);
  std::vector<float> out(q.size());
  std::vector<std::unique_ptr<Decode>> decodes;
  for (const CodecKind& kk : k) {
    for (const CodecKind& vk : v) {
      const HeadCodec kc = CodecFor(kk), vc = CodecFor(vk);
      HeadSpeed speed{CodecName(kc), CodecName(vc), group, head_dim, context, 0.0};
      const bool measuring = std::any_of(decodes.begin(), decodes.end(), [&](const auto& d) {
        return d->speed.k_codec == speed.k_codec && d->speed.v_codec == speed.v_codec;
      });
      if (measuring || wisdom->Find(speed.k_codec, speed.v_codec, group, head_dim, context))
        continue;
      Result<Cache> cache = Cache::Create(geometry, UniformPlan(geometry, kc, vc), context);
      if (!cache.ok()) return cache.status();
      if (k_rows.empty()) {
        k_rows = internal::RandomHalves(context * head_dim, 2);
        v_rows = internal::RandomHalves(context * head_dim, 3);
      }
      if (Status s = cache->Append(0, k_rows.data(), v_rows.data(), context); !s.ok()) return s;
      decodes.push_back(std::make_unique<Decode>(Decode{std::move(speed), std::move(*cache)}));
    }
  }
  Status failed;
  std::vector<std::function<void()>> functions;
  for (const auto& d : decodes) {
    functions.push_back([&, cache = &d->cache] {
      if (Status s = Attend(*cache, 0, q.data(), 1, out.data()); !s.ok()) failed = s;
    });
  }
  if (functions.empty()) return {};
  const std::vector<double> medians = MedianSeconds(functions, seconds);
  if (!failed.ok()) return failed;
  for (std::size_t i = 0; i < decodes.size(); ++i) {
    decodes[i]->speed.decode_ns = medians[i] * 1e9;
    wisdom->speeds.push_back(std::move(decodes[i]->speed));
  }
  return {};
}

}  // namespace kvmix
