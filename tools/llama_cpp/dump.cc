#include "dump.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <utility>

#include <kvmix/mirror.h>

namespace kvmix::llama {
namespace {

// An engine warms up on a token or two; that is no text.
constexpr std::size_t kShortestPrompt = 8;

// Cells that one query of a mask sees.
std::size_t Seen(MaskView mask, std::size_t query) {
  const auto number = static_cast<std::ptrdiff_t>(kvmix_dtype_bytes(mask.dtype));
  mask.data = static_cast<const char*>(mask.data) +
              static_cast<std::ptrdiff_t>(query) * mask.stride * number;
  mask.queries = 1;
  std::vector<std::uint8_t> cells(mask.cells);
  SeenCells(mask, cells.data());
  return mask.cells - static_cast<std::size_t>(std::ranges::count(cells, 0));
}

}  // namespace

Status Dump::Add(std::size_t number, const LayerShape& shape, const RowsView& q, const RowsView& k,
                 const RowsView& v, const MaskView& mask, std::size_t stream) {
  const auto [at, is_new] = layers_.try_emplace(number);
  Layer& layer = at->second;
  if (is_new) layer.shape = shape;
  if (k.tokens != q.tokens || v.tokens != q.tokens) {  // reads another's K, or padded
    left_out_ += q.tokens;
    return {};
  }
  Stream& s = layer.streams[stream];
  std::size_t first = 0;  // token that the dump does not have yet
  const auto write = [&](std::size_t end) {
    const std::size_t begin = std::exchange(first, end), n = end - begin;
    if (n == 0) return Status();
    return writer_.Add(number, k.Tokens(begin, n), v.Tokens(begin, n), q.Tokens(begin, n), stream);
  };
  for (std::size_t t = 0; t < q.tokens; ++t) {
    const std::size_t seen = Seen(mask, t);
    if (seen == 1) {
      if (Status error = write(t); !error.ok()) return error;
      if (Status error = DropShortPrompt(number, stream); !error.ok()) return error;
      s.prompts.push_back(0);
    } else if (s.prompts.empty() || (seen != s.seen + 1 && seen != s.seen)) {
      if (Status error = write(t); !error.ok()) return error;
      first = t + 1;
      ++left_out_;
      continue;
    } else if (seen == s.seen && seen == layer.most) {
      layer.shape.window = seen;  // it no longer grows
    }
    if (seen > layer.most) {  // it does: a token was computed twice
      layer.most = seen;
      layer.shape.window = 0;
    }
    s.seen = seen;
    ++s.prompts.back();
  }
  return write(q.tokens);
}

// The last prompt, if it is too short to be one.
Status Dump::DropShortPrompt(std::size_t number, std::size_t stream) {
  std::vector<std::size_t>& prompts = layers_.at(number).streams.at(stream).prompts;
  if (prompts.empty() || prompts.back() >= kShortestPrompt) return {};
  const std::size_t tokens = prompts.back();
  prompts.pop_back();
  left_out_ += tokens;
  return writer_.Drop(number, tokens, stream);
}

Status Dump::Finish() {
  if (layers_.empty()) return {};  // a context that the engine only tried
  const auto prompts_of = [](const Layer& layer) {
    std::vector<std::size_t> all;
    for (const auto& [_, s] : layer.streams) {
      all.insert(all.end(), s.prompts.begin(), s.prompts.end());
    }
    return all;
  };
  for (const auto& [number, layer] : layers_) {
    for (const auto& [stream, _] : layer.streams) {
      if (Status error = DropShortPrompt(number, stream); !error.ok()) return error;
    }
  }
  const std::vector<std::size_t> prompts = prompts_of(layers_.begin()->second);
  const std::size_t tokens = std::accumulate(prompts.begin(), prompts.end(), std::size_t{0});
  if (std::ranges::all_of(layers_, [&](const auto& l) { return prompts_of(l.second).empty(); })) {
    return {ErrorCode::kMismatch, path_ + ": expected a prompt of " +
                                      std::to_string(kShortestPrompt) +
                                      " tokens or more into an empty cache, found none"};
  }
  tune::DumpInfo info;
  info.prompt_tokens = prompts;
  info.model.layers.resize(layers_.rbegin()->first + 1);
  for (const auto& [number, layer] : layers_) {
    if (prompts_of(layer) != prompts) {
      return {ErrorCode::kMismatch, path_ + ": layers saw unlike prompts"};
    }
    info.model.layers[number] = layer.shape;
  }
  if (Status error = writer_.Finish(info); !error.ok()) return error;
  std::fprintf(stderr, "kvmix: %s: %zu layers, %zu prompts, %zu tokens (%zu rows left out)\n",
               path_.c_str(), layers_.size(), prompts.size(), tokens, left_out_);
  return {};
}

}  // namespace kvmix::llama
