// A back-end of ggml that takes llama.cpp's attention: FLASH_ATTN_EXT over the KV cache, and the
// SET_ROWS that fill it. README.md says how to build and load it.
//
// llama.cpp adds every device of type ACCEL to a context, and gives it the nodes that it supports
// and whose tensors are in host memory. The engine's cache tensors stay what they are: rows are
// written to them as well, so that all that reads them (state files, a context shift) goes on
// working, and a Mirror of each layer notices when they change.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <kvmix/mirror.h>
#include <kvmix/version.h>

#include "dump.h"
#include "rows.h"
#include "settings.h"
#include "watch.h"

namespace kvmix::llama {
namespace {

void Say(const std::string& line) { std::fprintf(stderr, "kvmix: %s\n", line.c_str()); }
// A line for every reason only once.
void SayOnce(const std::string& reason, const std::string& line) {
  static std::mutex mutex;
  static std::map<std::string, bool> said;
  const std::lock_guard lock(mutex);
  if (!std::exchange(said[reason], true)) Say(line);
}

// ---- the engine's tensors

ggml_tensor* Base(const ggml_tensor* t) {
  return t->view_src != nullptr ? t->view_src : const_cast<ggml_tensor*>(t);
}

// "cache_k_l12" -> 12; nothing for other tensors.
std::optional<std::size_t> LayerOf(const ggml_tensor* t, Tensor tensor) {
  const std::string_view name = Base(t)->name;
  const std::string_view prefix = tensor == KVMIX_K ? "cache_k_l" : "cache_v_l";
  if (!name.starts_with(prefix)) return {};
  const char *const digits = name.data() + prefix.size(), *const end = name.data() + name.size();
  std::size_t layer = 0;
  const auto [stop, error] = std::from_chars(digits, end, layer);
  if (error != std::errc() || stop != end) return {};
  return layer;
}

// K (1) or V (2) of an attention: llama.cpp gives it a copy of an f32 cache in f16.
const ggml_tensor* CacheOf(const ggml_tensor* op, int src) {
  const ggml_tensor* const t = op->src[src];
  const bool is_copy = t->op == GGML_OP_CPY && t->src[0]->type == GGML_TYPE_F32;
  return is_copy ? t->src[0] : t;
}

EngineRows RowsOf(const ggml_tensor* view, std::size_t stream) {
  return {static_cast<const char*>(view->data) + stream * view->nb[3], view->nb[1],
          ggml_row_size(view->type, view->ne[0] * view->ne[2]), ToFloats(view->type)};
}

// ---- what is taken

struct Attention {
  std::size_t layer;
  LayerShape shape;
  AttendOptions options;
  float max_bias;
};

std::optional<Attention> Read(const ggml_tensor* op) {
  const ggml_tensor *q = op->src[0], *k = CacheOf(op, 1), *v = CacheOf(op, 2);
  const auto k_layer = LayerOf(k, KVMIX_K), v_layer = LayerOf(v, KVMIX_V);
  if (!k_layer || k_layer != v_layer) return {};
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  Attention a{*k_layer,
              {.kv_heads = size(k->ne[2]),
               .query_heads = size(q->ne[2]),
               .k_dim = size(k->ne[0]),
               .v_dim = size(v->ne[0])},
              {},
              0.0f};
  std::memcpy(&a.options.attention_scale, op->op_params, sizeof(float));
  std::memcpy(&a.max_bias, reinterpret_cast<const float*>(op->op_params) + 1, sizeof(float));
  std::memcpy(&a.options.soft_cap, reinterpret_cast<const float*>(op->op_params) + 2,
              sizeof(float));
  if (op->src[4] != nullptr) a.options.sinks = static_cast<const float*>(op->src[4]->data);
  return a;
}

// Why an attention stays with the CPU; empty: it does not.
std::string Refusal(const ggml_tensor* op) {
  const ggml_tensor *q = op->src[0], *k = CacheOf(op, 1), *v = CacheOf(op, 2), *mask = op->src[3];
  const std::optional<Attention> a = Read(op);
  if (!a) return "attention without a KV cache";
  if (q->type != GGML_TYPE_F32 || !IsRowType(k->type) || !IsRowType(v->type)) {
    return std::string("K of ") + ggml_type_name(k->type) + ", V of " + ggml_type_name(v->type);
  }
  if (TheSettings().memory && (k != op->src[1] || v != op->src[2])) {
    return "a cache of f32, which the engine copies, with KVMIX_MEMORY";
  }
  if (mask == nullptr || (mask->type != GGML_TYPE_F16 && mask->type != GGML_TYPE_F32)) {
    return "attention without a mask";
  }
  if (k->nb[2] != ggml_row_size(k->type, k->ne[0]) ||
      v->nb[2] != ggml_row_size(v->type, v->ne[0])) {
    return "heads of a cell that do not lie side by side";
  }
  const Model model{std::vector<LayerShape>{a->shape}};
  if (const Status s = CheckModel(model); !s.ok()) return s.message();
  return {};
}

// The plan is one of this model, as far as a layer shows; an error names both.
Status CheckPlan(const Settings& settings, const Attention& a) {
  if (!settings.plan) return {};
  const Plan& plan = *settings.plan;
  const std::vector<LayerShape>& layers = plan.model.layers;
  const auto same = [&](const LayerShape& shape) {
    return shape.owns_kv() && shape.kv_heads == a.shape.kv_heads && shape.k_dim == a.shape.k_dim &&
           shape.v_dim == a.shape.v_dim && shape.query_heads == a.shape.query_heads;
  };
  if (a.layer < layers.size() && same(layers[a.layer])) return {};
  return {ErrorCode::kMismatch, settings.plan_path + ": a plan of " + ToString(plan.model) + " (" +
                                    NameOf(plan) + "); layer " + std::to_string(a.layer) +
                                    " here is " +
                                    ToString(Model{std::vector<LayerShape>{a.shape}})};
}

// The plan of one layer, of a plan that was checked.
Plan PlanOf(const Settings& settings, const Attention& a) {
  const Model model{std::vector<LayerShape>{a.shape}};
  Plan one = UniformPlan(model, settings.codec, settings.codec);
  if (!settings.plan) return one;
  one.exact_first = settings.plan->exact_first;
  for (std::size_t h = 0; h < a.shape.kv_heads; ++h) {
    for (const Tensor t : {KVMIX_K, KVMIX_V}) {
      one.codec(0, h, t) = settings.plan->codec(a.layer, h, t);
    }
  }
  return one;
}

bool IsView(ggml_op op) {
  return op == GGML_OP_NONE || op == GGML_OP_RESHAPE || op == GGML_OP_VIEW ||
         op == GGML_OP_PERMUTE || op == GGML_OP_TRANSPOSE;
}

// A part of the engine's cache.
bool IsCache(const ggml_tensor* t) {
  return t != nullptr && (LayerOf(t, KVMIX_K) || LayerOf(t, KVMIX_V));
}

// Attention, and writes to the cache, that are computed here.
bool IsTaken(const ggml_tensor* op) {
  if (op->op == GGML_OP_SET_ROWS) {
    return IsCache(op->src[2]) && IsRowType(op->src[2]->type) && op->src[2]->ne[0] > 1 &&
           op->src[0]->type == GGML_TYPE_F32 && op->src[1]->type == GGML_TYPE_I64 &&
           op->src[0]->ne[2] == 1 && op->src[0]->ne[3] == 1;
  }
  if (op->op != GGML_OP_FLASH_ATTN_EXT) return false;
  std::string why = Refusal(op), reason = why;
  if (why.empty()) {
    why = CheckPlan(TheSettings(), *Read(op)).message();
    reason = "plan";
  }
  if (!why.empty()) SayOnce(reason, "not taken, and left to the CPU: " + why);
  return why.empty();
}

// ---- a context's back-end

using NewRows = std::vector<float>;  // [tokens][heads][channels]

struct Context {
  int threads = 1;
  std::map<const void*, Mirror> mirrors;  // by the data of the layer's K
  std::vector<std::uint8_t> seen;         // by any query of `seen_mask`
  const ggml_tensor* seen_mask = nullptr;
  std::vector<float> slopes;
  const void* last_k = nullptr;  // the K that SET_ROWS wrote to last
  std::unique_ptr<Dump> dump;    // of what attention sees, with the rows written before it
  NewRows new_k, new_v;
  std::unique_ptr<ggml_backend, decltype(&ggml_backend_free)> cpu{nullptr, ggml_backend_free};
};

// Made at the first attention of a layer.
Result<Mirror*> MirrorOf(Context& c, const ggml_tensor* k, const ggml_tensor* v,
                         const Attention& a) {
  ggml_tensor* const base = Base(k);
  if (const auto it = c.mirrors.find(base->data); it != c.mirrors.end()) return &it->second;
  const Pool* const beside = c.mirrors.empty() ? nullptr : &c.mirrors.begin()->second.pool();
  Result<Mirror> mirror = Mirror::Create(
      PlanOf(TheSettings(), a), static_cast<std::size_t>(base->ne[2]),
      static_cast<std::size_t>(base->ne[1]),
      {.pool = {.target = TheSettings().target, .beside = beside}, .alone = TheSettings().memory});
  if (!mirror.ok()) return mirror.status();
  Mirror* const made = &c.mirrors.emplace(base->data, std::move(*mirror)).first->second;
  Watch(made, base, Base(v), TheSettings().memory);
  SayOnce("threads", std::to_string(c.threads) + " threads");
  return made;
}

// SET_ROWS: the engine's own rows, and the mirror's if there is one already; that one's alone where
// the engine's are given back.
Status SetRows(Context& c, const ggml_tensor* op) {
  const ggml_tensor *from = op->src[0], *cells = op->src[1], *to = op->src[2];
  const std::int64_t *const at = static_cast<const std::int64_t*>(cells->data), n = from->ne[0];
  const Tensor tensor = LayerOf(to, KVMIX_K) ? KVMIX_K : KVMIX_V;
  // V's rows belong to the K that was written before them.
  if (tensor == KVMIX_K) c.last_k = Base(to)->data;
  const auto mirror = c.mirrors.find(c.last_k);
  const bool alone = mirror != c.mirrors.end() && TheSettings().memory;
  NewRows& kept = tensor == KVMIX_K ? c.new_k : c.new_v;
  kept.clear();
  for (std::int64_t i = 0; i < from->ne[1]; ++i) {
    const float* const row = reinterpret_cast<const float*>(
        static_cast<const char*>(from->data) + static_cast<std::size_t>(i) * from->nb[1]);
    if (c.dump != nullptr) kept.insert(kept.end(), row, row + n);
    if (alone) continue;
    FromFloats(to->type, row,
               static_cast<char*>(to->data) + static_cast<std::size_t>(at[i]) * to->nb[1], n);
  }
  if (mirror == c.mirrors.end()) return {};
  const std::size_t heads = mirror->second.shape().kv_heads;
  RowsView view =
      RowsView::F32(static_cast<const float*>(from->data), static_cast<std::size_t>(from->ne[1]),
                    heads, static_cast<std::size_t>(n) / heads);
  view.token_stride = static_cast<std::ptrdiff_t>(from->nb[1] / sizeof(float));
  return mirror->second.Write(tensor, {at, static_cast<std::size_t>(from->ne[1])}, view);
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

// What the requests see, with the rows that were written before them, stream by stream.
Status AddToDump(Context& c, const Attention& a, std::span<const MirrorRequest> requests) {
  LayerShape shape = a.shape;
  shape.attention_scale = a.options.attention_scale;
  shape.soft_cap = a.options.soft_cap;
  const auto view = [&](const NewRows& rows, std::size_t dim, std::size_t request) {
    const std::size_t heads = shape.kv_heads, n = rows.size() / heads / dim / requests.size();
    return RowsView::F32(rows.data() + request * n * heads * dim, n, heads, dim);
  };
  Status s;
  for (std::size_t i = 0; s.ok() && i < requests.size(); ++i) {
    const MirrorRequest& r = requests[i];
    s = c.dump->Add(a.layer, shape, r.q, view(c.new_k, shape.k_dim, i),
                    view(c.new_v, shape.v_dim, i), r.mask, r.stream);
  }
  c.new_k.clear();  // a layer that reads another's K and V has written none
  c.new_v.clear();
  return s;
}

void WarnOfLength(std::size_t cells) {
  const std::optional<Plan>& plan = TheSettings().plan;
  if (!plan || !IsFarBeyond(*plan, cells)) return;
  SayOnce("length", "warning: a context of " + std::to_string(cells) +
                        " tokens, but the plan was calibrated on prompts of at most " +
                        std::to_string(plan->provenance.longest_prompt) +
                        ": it may be less accurate there. Calibrate on prompts as long as those "
                        "that are served.");
}

Status Attend(Context& c, const ggml_tensor* op) {
  const ggml_tensor *q = op->src[0], *k = CacheOf(op, 1), *v = CacheOf(op, 2), *mask = op->src[3];
  const std::optional<Attention> a = Read(op);
  const Result<Mirror*> mirror = MirrorOf(c, k, v, *a);
  if (!mirror.ok()) return mirror.status();
  const std::size_t streams = static_cast<std::size_t>(q->ne[3]),
                    queries = static_cast<std::size_t>(q->ne[1]),
                    cells = static_cast<std::size_t>(k->ne[1]);
  if (a->max_bias > 0.0f) MakeSlopes(a->shape.query_heads, a->max_bias, &c.slopes);
  const bool is_new = c.seen_mask != mask;  // all layers of a kind have one mask
  if (is_new) WarnOfLength(cells);
  c.seen_mask = mask;
  c.seen.resize(streams * cells);
  std::vector<MirrorRequest> requests(streams);
  const std::size_t first_stream = k->view_offs / std::max<std::size_t>(Base(k)->nb[2], 1);
  for (std::size_t s = 0; s < streams; ++s) {
    MirrorRequest& r = requests[s];
    const bool f32 = mask->type == GGML_TYPE_F32;
    const std::size_t number = f32 ? sizeof(float) : sizeof(Half);
    r.stream = first_stream + s;
    r.q = {static_cast<const char*>(q->data) + s * q->nb[3],
           KVMIX_F32,
           queries,
           a->shape.query_heads,
           a->shape.k_dim,
           static_cast<std::ptrdiff_t>(q->nb[1] / sizeof(float)),
           static_cast<std::ptrdiff_t>(q->nb[2] / sizeof(float))};
    r.out = reinterpret_cast<float*>(static_cast<char*>(op->data) + s * op->nb[3]);
    r.mask = {static_cast<const char*>(mask->data) +
                  s % static_cast<std::size_t>(mask->ne[3]) * mask->nb[3],
              f32 ? KVMIX_F32 : KVMIX_F16,
              queries,
              cells,
              static_cast<std::ptrdiff_t>(mask->nb[1] / number),
              a->max_bias > 0.0f ? c.slopes.data() : nullptr};
    r.seen = c.seen.data() + s * cells;
    if (is_new) SeenCells(r.mask, c.seen.data() + s * cells);
    r.k = RowsOf(k, s);
    r.v = RowsOf(v, s);
  }
  if (c.dump != nullptr) {
    if (const Status s = AddToDump(c, *a, requests); !s.ok()) {  // a full disk, say
      Say(s.message() + ". The dump is dropped, the engine goes on.");
      c.dump.reset();
    }
  }
  const Status s = (*mirror)->Attend(requests, a->options, c.threads);
  if (s.ok() && TheSettings().memory) GiveBack(*mirror, first_stream, streams);
  return s;
}

// What else reads or writes a cache that is not there: the CPU, once its rows are.
Status RunOnCpu(Context& c, ggml_tensor* node) {
  for (const ggml_tensor* t : node->src) {
    if (t != nullptr) Restore(t);
  }
  Restore(node);
  if (c.cpu == nullptr) {
    c.cpu.reset(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
  }
  const std::unique_ptr<ggml_context, decltype(&ggml_free)> memory(
      ggml_init({ggml_graph_overhead_custom(1, false), nullptr, true}), ggml_free);
  ggml_cgraph* const graph = ggml_new_graph_custom(memory.get(), 1, false);
  ggml_graph_add_node(graph, node);
  if (c.cpu != nullptr && ggml_backend_graph_compute(c.cpu.get(), graph) == GGML_STATUS_SUCCESS) {
    return {};
  }
  return {ErrorCode::kMismatch, std::string("the CPU does not compute ") + ggml_op_name(node->op)};
}

ggml_status Compute(ggml_backend_t backend, ggml_cgraph* graph) {
  Context& c = *static_cast<Context*>(backend->context);
  c.seen_mask = nullptr;
  for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
    ggml_tensor* const node = ggml_graph_node(graph, i);
    Status s;
    if (IsView(node->op)) continue;
    // Only where the engine's rows are away are there nodes of other kinds.
    if (TheSettings().memory && !IsTaken(node)) {
      s = RunOnCpu(c, node);
    } else {
      s = node->op == GGML_OP_SET_ROWS ? SetRows(c, node) : Attend(c, node);
    }
    if (s.ok()) continue;
    Say(std::string(node->name) + ": " + s.message());
    return GGML_STATUS_FAILED;
  }
  return GGML_STATUS_SUCCESS;
}

// ---- ggml's tables

const char* Name(ggml_backend_t) { return "KVMIX"; }
const char* DeviceName(ggml_backend_dev_t) { return "KVMIX"; }
const char* DeviceDescription(ggml_backend_dev_t) { return "attention by kvmix"; }
const char* RegistryName(ggml_backend_reg_t) { return "KVMIX"; }

void Free(ggml_backend_t backend) {
  Context* const c = static_cast<Context*>(backend->context);
  if (c->dump != nullptr) {
    if (const Status s = c->dump->Finish(); !s.ok()) Say(s.message());
  }
  if (TheSettings().verbose && !c->mirrors.empty()) {
    MirrorCounts sum;
    std::size_t bytes = 0;
    for (const auto& [_, mirror] : c->mirrors) {
      sum.written += mirror.counts().written;
      sum.read += mirror.counts().read;
      bytes += mirror.bytes();
    }
    Say(std::to_string(c->mirrors.size()) + " layers, " + std::to_string(sum.written) +
        " cells written, " + std::to_string(sum.read) + " read from the engine's, " +
        std::to_string(bytes >> 20) + " MiB of codes");
  }
  for (auto& [_, mirror] : c->mirrors) Unwatch(&mirror);
  delete c;
  delete backend;
}

ggml_guid_t Guid() {
  static ggml_guid guid = {0x6b, 0x76, 0x6d, 0x69, 0x78, 0x2d, 0x67, 0x67,
                           0x6d, 0x6c, 0x2d, 0x61, 0x74, 0x74, 0x6e, 0x31};
  return &guid;
}

ggml_backend_t Init(ggml_backend_dev_t device, const char*) {
  static const ggml_backend_i kBackend = [] {
    ggml_backend_i b{};
    b.get_name = Name;
    b.free = Free;
    b.graph_compute = Compute;
    return b;
  }();
  auto context = std::make_unique<Context>();
  if (!TheSettings().dump.empty()) context->dump = std::make_unique<Dump>(TheSettings().dump);
  return new ggml_backend{Guid(), kBackend, device, context.release()};
}

void SetThreads(ggml_backend_t backend, int threads) {
  static_cast<Context*>(backend->context)->threads = threads;
}

bool SupportsOp(ggml_backend_dev_t, const ggml_tensor* op) {
  if (IsView(op->op) || IsTaken(op)) return true;
  if (op->op == GGML_OP_MUL_MAT && LayerOf(op->src[0], KVMIX_K)) {
    SayOnce("flash",
            "not taken, and left to the CPU: attention that is no flash attention (-fa on)");
  }
  // Nobody else may touch a cache that is not there.
  const auto is_away = [](const ggml_tensor* t) { return IsCache(t) && IsGivenBack(t); };
  return TheSettings().memory && (is_away(op) || std::ranges::any_of(op->src, is_away));
}

bool SupportsBuffer(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
  return ggml_backend_buft_is_host(type);
}
ggml_backend_buffer_type_t BufferType(ggml_backend_dev_t) { return ggml_backend_cpu_buffer_type(); }
void Memory(ggml_backend_dev_t, std::size_t* free, std::size_t* total) { *free = *total = 0; }
enum ggml_backend_dev_type DeviceType(ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_ACCEL; }
void Properties(ggml_backend_dev_t device, ggml_backend_dev_props* p) {
  *p = {};
  p->name = DeviceName(device);
  p->description = DeviceDescription(device);
  p->type = DeviceType(device);
}

std::size_t DeviceCount(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t Device(ggml_backend_reg_t registry, std::size_t) {
  static ggml_backend_device device = [&] {
    ggml_backend_device d{};
    d.iface.get_name = DeviceName;
    d.iface.get_description = DeviceDescription;
    d.iface.get_memory = Memory;
    d.iface.get_type = DeviceType;
    d.iface.get_props = Properties;
    d.iface.init_backend = Init;
    d.iface.get_buffer_type = BufferType;
    d.iface.supports_op = SupportsOp;
    d.iface.supports_buft = SupportsBuffer;
    d.reg = registry;
    return d;
  }();
  return &device;
}
void* Procedure(ggml_backend_reg_t, const char* name) {
  const bool threads = std::string_view(name) == "ggml_backend_set_n_threads";
  return threads ? reinterpret_cast<void*>(SetThreads) : nullptr;
}

// The libraries that this was built for: the structs of ggml change with its version.
bool AreLibrariesThese() {
  const auto is_same = [](const char* library, std::string_view built, std::string_view found) {
    if (built == found) return true;
    Say(std::string("error: built for ") + library + " " + std::string(built) + ", found " +
        std::string(found) + ". kvmix is not used.");
    return false;
  };
  return is_same("ggml", KVMIX_GGML_VERSION, ggml_version()) &&
         is_same("libkvmix", KVMIX_VERSION, Version());
}

}  // namespace
}  // namespace kvmix::llama

// Null: the engine goes on without kvmix, and has been told why.
extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
  using namespace kvmix::llama;
  if (!AreLibrariesThese() || !LoadSettings()) return nullptr;
  static ggml_backend_reg registry = {
      GGML_BACKEND_API_VERSION, {RegistryName, DeviceCount, Device, Procedure}, nullptr};
  return &registry;
}
