#include "lib/tune/layers.h"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "lib/files/file.h"

namespace kvmix::tune {

using internal::Error;

namespace {

// The most bytes of outputs that layers side by side may hold.
constexpr std::size_t kOutputBytes = std::size_t{1} << 30;

}  // namespace

Status Cancelled() { return Error(ErrorCode::kCancelled, "stopped by the caller"); }

Status CheckDumps(const std::vector<const Dump*>& dumps) {
  if (dumps.empty()) return Error(ErrorCode::kInvalidArgument, "measuring needs at least one dump");
  const Dump& first = *dumps[0];
  for (const Dump* dump : dumps) {
    if (!dump->has_q())
      return Error(ErrorCode::kInvalidArgument, "{}: has no Q, which attention errors need",
                   dump->path());
    if (dump->model() != first.model())
      return Error(ErrorCode::kMismatch, "{}: {}, but {} has {}", dump->path(),
                   ToString(dump->model()), first.path(), ToString(first.model()));
  }
  return {};
}

Result<std::vector<std::size_t>> OwnLayers(const Dump& dump, std::size_t first, std::size_t last) {
  const std::vector<LayerShape>& shapes = dump.model().layers;
  if (first > last || last > shapes.size())
    return Error(ErrorCode::kInvalidArgument, "layers {} to {}: {} has layers 0 to {}", first, last,
                 dump.path(), shapes.size());
  std::vector<std::size_t> own;
  for (std::size_t layer = first; layer < last; ++layer)
    if (shapes[layer].owns_kv()) own.push_back(layer);
  return own;
}

Status ForLayers(const std::vector<std::size_t>& layers, const std::vector<const Dump*>& dumps,
                 const MeasureOptions& options,
                 const std::function<Status(std::size_t, const MeasureOptions&)>& work) {
  if (Status s = options.runner.Check(); !s.ok()) return s;
  std::size_t layer_bytes = 1;  // of an exact and an approximate output
  for (const Dump* dump : dumps) {
    for (const LayerShape& shape : dump->model().layers) {
      layer_bytes = std::max(layer_bytes,
                             2 * sizeof(float) * dump->tokens() * shape.query_heads * shape.v_dim);
    }
  }
  const std::size_t most =
      std::max<std::size_t>(1, std::min(kOutputBytes / layer_bytes, layers.size()));
  const std::size_t side_by_side = std::min(options.runner.threads(), most);
  MeasureOptions within = options;
  if (side_by_side > 1) within.runner = Runner::Here();
  std::vector<Status> results(layers.size());
  std::mutex progress_mutex;
  std::size_t done = 0;
  std::atomic<bool> failed = false;
  const auto run_layer = [&](std::size_t i) {
    if (failed) return;
    std::vector<DumpLayer> held;
    for (const Dump* dump : dumps) {
      Result<DumpLayer> layer = dump->Load(layers[i]);
      if (layer.ok()) held.push_back(std::move(*layer));
      if (results[i].ok()) results[i] = layer.status();
    }
    if (results[i].ok()) results[i] = work(layers[i], within);
    const std::lock_guard lock(progress_mutex);
    const bool goes_on = !options.progress || options.progress(++done, layers.size());
    if (results[i].ok() && !goes_on) results[i] = Cancelled();
    if (!results[i].ok()) failed = true;
  };
  // Parts that take layers, so that no more layers are in memory, whatever the runner does.
  std::atomic<std::size_t> next = 0;
  options.runner.Run(side_by_side, [&](std::size_t) {
    for (std::size_t i = next++; i < layers.size(); i = next++) run_layer(i);
  });
  const auto bad = std::ranges::find_if_not(results, &Status::ok);
  return bad == results.end() ? Status() : *bad;
}

}  // namespace kvmix::tune
