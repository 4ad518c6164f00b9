// Decode times of codec pairs on this CPU, and their file.
#include "kvmix/tune/speed.h"

#include <algorithm>
#include <functional>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kvmix/attention.h"
#include "kvmix/cache.h"
#include "kvmix/version.h"
#include "lib/files/file.h"
#include "lib/files/json_view.h"
#include "lib/files/machine.h"
#include "lib/tune/random_halves.h"
#include "lib/tune/stopwatch.h"

namespace kvmix::tune {
namespace {

constexpr std::string_view kFormat = "kvmix-wisdom", kOldFormat = "kvmix-wisdom-1";
constexpr std::size_t kMajor = 1, kMinor = 0;
constexpr const char* kAdvice = "; delete this file or name another, and speeds are measured anew";

HeadCodec CodecFor(const CodecKind& kind) {
  return {{.storage = kind.storage, .scale = kind.scale, .operands = kind.operands},
          kind.scale == KVMIX_SCALE_HEAD ? kHeadScale : 0.0f};
}

}  // namespace

std::string SpeedName(const CodecKind& kind) {
  return ToString(
      CodecKind{.storage = kind.storage, .scale = kind.scale, .operands = kind.operands});
}

const HeadSpeed* Wisdom::Find(const std::string& k_codec, const std::string& v_codec,
                              const LayerShape& layer, std::size_t context) const {
  const auto it = std::ranges::find_if(speeds, [&](const HeadSpeed& s) {
    return s.k_codec == k_codec && s.v_codec == v_codec && s.group == layer.group() &&
           s.k_dim == layer.k_dim && s.v_dim == layer.v_dim && s.context == layer.seen(context);
  });
  return it == speeds.end() ? nullptr : &*it;
}

Wisdom ThisMachine(std::string_view target) {
  return {internal::CpuName(),
          std::string(target.empty() ? Targets().front() : target),
          std::string(Version()),
          {}};
}

Status SaveWisdom(const Wisdom& wisdom, const std::string& path) {
  nlohmann::ordered_json json = {{"format", kFormat},
                                 {"version", {kMajor, kMinor}},
                                 {"cpu", wisdom.cpu},
                                 {"target", wisdom.target},
                                 {"library_version", wisdom.version}};
  json["speeds"] = nlohmann::ordered_json::array();
  for (const HeadSpeed& s : wisdom.speeds) {
    nlohmann::ordered_json& speed = json["speeds"].emplace_back();
    speed = {{"k", s.k_codec}, {"v", s.v_codec}, {"group", s.group}, {"head_dim", s.k_dim}};
    if (s.v_dim != s.k_dim) speed["v_dim"] = s.v_dim;
    speed["context"] = s.context;
    speed["decode_ns"] = s.decode_ns;
  }
  return internal::WriteFileAtomically(
      path, json.dump(1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n");
}

Result<Wisdom> LoadWisdom(const std::string& path, std::string_view target) {
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
    const internal::JsonView s = speeds[i];
    const double ns = s["decode_ns"].Number();
    if (!(ns > 0.0))
      s["decode_ns"].Fail(ErrorCode::kCorrupt, "a time above 0", fmt::format("{}", ns));
    wisdom.speeds.push_back(
        {s["k"].Text(), s["v"].Text(), s["group"].Count(), s["head_dim"].Count(),
         s[s.has("v_dim") ? "v_dim" : "head_dim"].Count(), s["context"].Count(), ns});
  }
  if (!status.ok()) return status;
  const Wisdom here = ThisMachine(target);
  for (const auto& [what, field] : {std::pair{"cpu", &Wisdom::cpu},
                                    {"target", &Wisdom::target},
                                    {"library_version", &Wisdom::version}}) {
    if (wisdom.*field != here.*field)
      return internal::FileError(ErrorCode::kMismatch, path, what, internal::Quoted(here.*field),
                                 internal::Quoted(wisdom.*field) + kAdvice);
  }
  return wisdom;
}

Status MeasureHeadSpeeds(const std::vector<CodecKind>& k, const std::vector<CodecKind>& v,
                         const LayerShape& layer, std::size_t context, double seconds,
                         Wisdom* wisdom) {
  LayerShape alone = layer;
  alone.kv_layer.reset();
  if (Status s = CheckModel(Model(std::vector{alone})); !s.ok()) return s;
  if (context == 0) return {ErrorCode::kInvalidArgument, "context 0: expected 1 or more tokens"};
  const std::size_t group = layer.group(), tokens = layer.seen(context);
  const Model one_head(std::vector<LayerShape>{
      {.kv_heads = 1, .query_heads = group, .k_dim = layer.k_dim, .v_dim = layer.v_dim}});
  std::vector<Half> k_rows, v_rows;
  Wisdom added;
  std::vector<Cache> caches;  // one KV head each, full: of the speeds in `added`
  for (const CodecKind& k_kind : k) {
    for (const CodecKind& v_kind : v) {
      if (!Fits(k_kind, layer.k_dim) || !Fits(v_kind, layer.v_dim)) continue;
      const HeadCodec kc = CodecFor(k_kind), vc = CodecFor(v_kind);
      HeadSpeed speed{
          ToString(kc.kind), ToString(vc.kind), group, layer.k_dim, layer.v_dim, tokens, 0.0};
      const auto known = [&](const Wisdom& w) {
        return w.Find(speed.k_codec, speed.v_codec, layer, context) != nullptr;
      };
      if (known(*wisdom) || known(added)) continue;
      Result<Cache> cache =
          Cache::Create(UniformPlan(one_head, kc, vc), tokens, {.target = wisdom->target});
      if (!cache.ok()) return cache.status();
      if (k_rows.empty()) {
        k_rows = RandomHalves(tokens * layer.k_dim, 2);
        v_rows = RandomHalves(tokens * layer.v_dim, 3);
      }
      Status s = cache->Append(0, RowsView::F16(k_rows.data(), tokens, 1, layer.k_dim),
                               RowsView::F16(v_rows.data(), tokens, 1, layer.v_dim));
      if (!s.ok()) return s;
      caches.push_back(std::move(*cache));
      added.speeds.push_back(std::move(speed));
    }
  }
  if (caches.empty()) return {};
  Status failed;
  const std::vector<Half> q = RandomHalves(group * layer.k_dim, 1);
  const RowsView queries = RowsView::F16(q.data(), 1, group, layer.k_dim);
  std::vector<float> out(group * layer.v_dim);
  std::vector<std::function<void()>> functions;
  functions.reserve(caches.size());
  for (const Cache& cache : caches) {
    functions.emplace_back([&] {
      Sight sight = cache.sight(0);
      sight.residence = KVMIX_RESIDENCE_MEMORY;
      if (Status s = Attend(cache, 0, queries, out.data(), sight); !s.ok()) failed = s;
    });
  }
  const std::vector<double> medians = MedianSeconds(functions, seconds);
  if (!failed.ok()) return failed;
  for (std::size_t i = 0; i < caches.size(); ++i) {
    added.speeds[i].decode_ns = medians[i] * 1e9;
    wisdom->speeds.push_back(added.speeds[i]);
  }
  return {};
}

}  // namespace kvmix::tune
