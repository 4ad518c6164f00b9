#include "engines/llama_cpp/context.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "engines/llama_cpp/rows.h"

namespace kvmix::llama {

using engine::EngineRows;
using engine::Mirror;
using engine::MirrorCounts;
using engine::MirrorRequest;

namespace {

std::size_t Size(std::int64_t n) { return static_cast<std::size_t>(n); }

EngineRows RowsOf(const ggml_tensor* view, std::size_t stream) {
  return {static_cast<const char*>(view->data) + stream * view->nb[3], view->nb[1],
          ggml_row_size(view->type, view->ne[0] * view->ne[2]), ToFloats(view->type)};
}

RowsView QueriesOf(const ggml_tensor* q, std::size_t stream) {
  return {static_cast<const char*>(q->data) + stream * q->nb[3],
          KVMIX_F32,
          Size(q->ne[1]),
          Size(q->ne[2]),
          Size(q->ne[0]),
          static_cast<std::ptrdiff_t>(q->nb[1] / sizeof(float)),
          static_cast<std::ptrdiff_t>(q->nb[2] / sizeof(float))};
}

MaskView MaskOf(const Attention& a, std::size_t stream, const float* slopes) {
  const ggml_tensor* const mask = a.mask;
  const bool f32 = mask->type == GGML_TYPE_F32;
  return {static_cast<const char*>(mask->data) + stream % Size(mask->ne[3]) * mask->nb[3],
          f32 ? KVMIX_F32 : KVMIX_F16,
          Size(a.q->ne[1]),
          Size(a.k->ne[1]),
          static_cast<std::ptrdiff_t>(mask->nb[1] / (f32 ? sizeof(float) : sizeof(Half))),
          slopes};
}

// ggml's slopes of ALiBi.
void MakeSlopes(std::size_t heads, float max_bias, std::vector<float>* slopes) {
  const float n = std::exp2(std::floor(std::log2(static_cast<float>(heads))));
  const float m0 = std::exp2(-max_bias / n), m1 = std::exp2(-max_bias / 2.0f / n);
  slopes->resize(heads);
  for (std::size_t h = 0; h < heads; ++h) {
    const float i = static_cast<float>(h);
    (*slopes)[h] = i < n ? std::pow(m0, i + 1.0f) : std::pow(m1, 2.0f * (i - n) + 1.0f);
  }
}

}  // namespace

Context::Context(Plugin& plugin) : plugin_(plugin) {
  const std::string& path = plugin.settings.dump;
  if (!path.empty()) dump_ = std::make_unique<engine::Dump>(path);
}

Context::~Context() {
  if (dump_ != nullptr) {
    if (const Status s = dump_->Finish(); !s.ok()) Say(s.message());
  }
  for (auto& [_, mirror] : mirrors_) plugin_.watch.Remove(&mirror);
  if (!plugin_.settings.verbose || mirrors_.empty()) return;
  MirrorCounts sum;
  std::size_t bytes = 0;
  for (const auto& [_, mirror] : mirrors_) {
    sum.written += mirror.counts().written;
    sum.read += mirror.counts().read;
    bytes += mirror.bytes();
  }
  Say(std::to_string(mirrors_.size()) + " layers, " + std::to_string(sum.written) +
      " cells written, " + std::to_string(sum.read) + " read from the engine's, " +
      std::to_string(bytes >> 20) + " MiB of codes");
}

// Made at the first attention of a layer.
Result<Mirror*> Context::MirrorOf(const Attention& a) {
  ggml_tensor *const k = Base(a.k), *const v = Base(a.v);
  if (const auto it = mirrors_.find(k->data); it != mirrors_.end()) return &it->second;
  const engine::Settings& settings = plugin_.settings;
  const Pool* const beside = mirrors_.empty() ? nullptr : &mirrors_.begin()->second.pool();
  Result<Mirror> mirror = Mirror::Create(
      settings.plans.OfLayer(a.layer, a.shape), Size(k->ne[2]), Size(k->ne[1]),
      {.pool = {.target = settings.target, .beside = beside}, .alone = settings.memory});
  if (!mirror.ok()) return mirror.status();
  Mirror* const made = &mirrors_.emplace(k->data, std::move(*mirror)).first->second;
  by_data_[k->data] = by_data_[v->data] = made;
  plugin_.watch.Add(made, k, v, settings.memory);
  plugin_.SayOnce("threads", std::to_string(threads_) + " threads");
  return made;
}

// SET_ROWS: the engine's own rows, and the mirror's if there is one already; that one's alone where
// the engine's are given back.
Status Context::Write(const ggml_tensor* op) {
  const ggml_tensor *from = op->src[0], *cells = op->src[1], *to = op->src[2];
  const std::int64_t *const at = static_cast<const std::int64_t*>(cells->data), n = from->ne[0];
  const Tensor tensor = LayerOf(to, KVMIX_K) ? KVMIX_K : KVMIX_V;
  const auto found = by_data_.find(Base(to)->data);
  Mirror* const mirror = found != by_data_.end() ? found->second : nullptr;
  const bool alone = mirror != nullptr && plugin_.settings.memory;
  NewRows& kept = tensor == KVMIX_K ? new_k_ : new_v_;
  kept.clear();
  for (std::int64_t i = 0; i < from->ne[1]; ++i) {
    const float* const row = reinterpret_cast<const float*>(static_cast<const char*>(from->data) +
                                                            Size(i) * from->nb[1]);
    if (dump_ != nullptr) kept.insert(kept.end(), row, row + n);
    if (alone) continue;
    FromFloats(to->type, row, static_cast<char*>(to->data) + Size(at[i]) * to->nb[1], n);
  }
  if (mirror == nullptr) return {};
  const std::size_t heads = mirror->shape().kv_heads;
  RowsView view = RowsView::F32(static_cast<const float*>(from->data), Size(from->ne[1]), heads,
                                Size(n) / heads);
  view.token_stride = static_cast<std::ptrdiff_t>(from->nb[1] / sizeof(float));
  return mirror->Write(tensor, {at, Size(from->ne[1])}, view);
}

// What the requests see, with the rows that were written before them, stream by stream.
Status Context::AddToDump(const Attention& a) {
  LayerShape shape = a.shape;
  shape.attention_scale = a.sight.scale;
  shape.soft_cap = a.sight.soft_cap;
  const auto view = [&](const NewRows& rows, std::size_t dim, std::size_t request) {
    const std::size_t heads = shape.kv_heads, n = rows.size() / heads / dim / requests_.size();
    return RowsView::F32(rows.data() + request * n * heads * dim, n, heads, dim);
  };
  Status s;
  for (std::size_t i = 0; s.ok() && i < requests_.size(); ++i) {
    const MirrorRequest& r = requests_[i];
    s = dump_->Add(a.layer, shape, r.q, view(new_k_, shape.k_dim, i), view(new_v_, shape.v_dim, i),
                   r.mask, r.stream);
  }
  new_k_.clear();  // a layer that reads another's K and V has written none
  new_v_.clear();
  return s;
}

// A request for each stream of an attention.
void Context::FillRequests(const Attention& a, std::size_t first_stream) {
  const std::size_t streams = Size(a.q->ne[3]), cells = Size(a.k->ne[1]);
  if (a.max_bias > 0.0f) MakeSlopes(a.shape.query_heads, a.max_bias, &slopes_);
  const float* const slopes = a.max_bias > 0.0f ? slopes_.data() : nullptr;
  const bool is_new = seen_mask_ != a.mask;  // all layers of a kind have one mask
  seen_mask_ = a.mask;
  seen_.resize(streams * cells);
  requests_.assign(streams, {});
  for (std::size_t s = 0; s < streams; ++s) {
    MirrorRequest& r = requests_[s];
    r.stream = first_stream + s;
    r.q = QueriesOf(a.q, s);
    r.out = reinterpret_cast<float*>(static_cast<char*>(a.op->data) + s * a.op->nb[3]);
    r.mask = MaskOf(a, s, slopes);
    r.seen = seen_.data() + s * cells;
    if (is_new) engine::SeenCells(r.mask, seen_.data() + s * cells);
    r.k = RowsOf(a.k, s);
    r.v = RowsOf(a.v, s);
  }
  if (!is_new) return;
  const std::string warning = plugin_.settings.plans.LengthWarning(a.layer, a.shape, cells);
  if (!warning.empty()) plugin_.SayOnce("length", "warning: " + warning);
}

Status Context::Attend(const Attention& a) {
  const Result<Mirror*> mirror = MirrorOf(a);
  if (!mirror.ok()) return mirror.status();
  const std::size_t first_stream = a.k->view_offs / std::max<std::size_t>(Base(a.k)->nb[2], 1);
  FillRequests(a, first_stream);
  if (dump_ != nullptr) {
    if (const Status s = AddToDump(a); !s.ok()) {  // a full disk, say
      Say(s.message() + ". The dump is dropped, the engine goes on.");
      dump_.reset();
    }
  }
  const Status s = (*mirror)->Attend(requests_, a.sight, threads_);
  if (s.ok()) plugin_.watch.GiveBack(*mirror, first_stream, requests_.size());
  return s;
}

// What else reads or writes a cache that is not there: the CPU, once its rows are.
Status Context::RunOnCpu(ggml_tensor* node) {
  for (const ggml_tensor* t : node->src) {
    if (t != nullptr) plugin_.watch.Restore(t);
  }
  plugin_.watch.Restore(node);
  if (cpu_ == nullptr) {
    cpu_.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
  }
  const std::unique_ptr<ggml_context, decltype(&ggml_free)> memory(
      ggml_init({ggml_graph_overhead_custom(1, false), nullptr, true}), ggml_free);
  ggml_cgraph* const graph = ggml_new_graph_custom(memory.get(), 1, false);
  ggml_graph_add_node(graph, node);
  if (cpu_ != nullptr && ggml_backend_graph_compute(cpu_.get(), graph) == GGML_STATUS_SUCCESS) {
    return {};
  }
  return {ErrorCode::kMismatch, std::string("the CPU does not compute ") + ggml_op_name(node->op)};
}

ggml_status Context::Compute(ggml_cgraph* graph) {
  seen_mask_ = nullptr;
  for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
    ggml_tensor* const node = ggml_graph_node(graph, i);
    if (IsView(node)) continue;
    Status s;
    if (IsWrite(node)) {
      s = Write(node);
    } else if (const std::optional<Attention> a = plugin_.Take(node)) {
      s = Attend(*a);
    } else {  // only where the engine's rows are away are there nodes of other kinds
      s = RunOnCpu(node);
    }
    if (s.ok()) continue;
    Say(std::string(node->name) + ": " + s.message());
    return GGML_STATUS_FAILED;
  }
  return GGML_STATUS_SUCCESS;
}

}  // namespace kvmix::llama
