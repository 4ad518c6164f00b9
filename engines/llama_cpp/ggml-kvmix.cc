// A back-end of ggml that takes llama.cpp's attention: FLASH_ATTN_EXT over the KV cache, and the
// SET_ROWS that fill it. README.md says how to build and load it. Here are ggml's tables.
//
// llama.cpp adds every device of type ACCEL to a context, and gives it the nodes that it supports
// and whose tensors are in host memory. The engine's cache tensors stay what they are: rows are
// written to them as well, so that all that reads them (state files, a context shift) goes on
// working, and a Mirror of each layer notices when they change.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <string_view>
#include <utility>

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <kvmix/version.h>

#include "engines/common/settings.h"
#include "engines/llama_cpp/context.h"
#include "engines/llama_cpp/nodes.h"
#include "engines/llama_cpp/plugin.h"

namespace kvmix::llama {
namespace {

const char* Name(ggml_backend_t) { return "KVMIX"; }
const char* DeviceName(ggml_backend_dev_t) { return "KVMIX"; }
const char* DeviceDescription(ggml_backend_dev_t) { return "attention by kvmix"; }
const char* RegistryName(ggml_backend_reg_t) { return "KVMIX"; }

// ---- a back-end

Context& ContextOf(ggml_backend_t backend) { return *static_cast<Context*>(backend->context); }

void Free(ggml_backend_t backend) {
  delete &ContextOf(backend);
  delete backend;
}
ggml_status Compute(ggml_backend_t backend, ggml_cgraph* graph) {
  return ContextOf(backend).Compute(graph);
}
void SetThreads(ggml_backend_t backend, int threads) { ContextOf(backend).set_threads(threads); }

ggml_guid_t Guid() {
  static ggml_guid guid = {0x6b, 0x76, 0x6d, 0x69, 0x78, 0x2d, 0x67, 0x67,
                           0x6d, 0x6c, 0x2d, 0x61, 0x74, 0x74, 0x6e, 0x31};
  return &guid;
}

// ---- the device

Plugin& PluginOf(ggml_backend_dev_t device) { return *static_cast<Plugin*>(device->context); }

ggml_backend_t Init(ggml_backend_dev_t device, const char*) {
  ggml_backend_i table{};
  table.get_name = Name;
  table.free = Free;
  table.graph_compute = Compute;
  return new ggml_backend{Guid(), table, device, new Context(PluginOf(device))};
}

bool SupportsOp(ggml_backend_dev_t device, const ggml_tensor* op) {
  Plugin& plugin = PluginOf(device);
  if (IsView(op) || IsWrite(op) || plugin.Take(const_cast<ggml_tensor*>(op))) return true;
  if (op->op == GGML_OP_MUL_MAT && LayerOf(op->src[0], KVMIX_K)) {
    plugin.SayOnce("flash",
                   "not taken, and left to the CPU: attention that is no flash attention (-fa on)");
  }
  // Nobody else may touch a cache that is not there.
  const auto is_away = [&](const ggml_tensor* t) {
    return IsCache(t) && plugin.watch.IsGivenBack(t);
  };
  return plugin.settings.memory && (is_away(op) || std::ranges::any_of(op->src, is_away));
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

ggml_backend_device_i DeviceTable() {
  ggml_backend_device_i d{};
  d.get_name = DeviceName;
  d.get_description = DeviceDescription;
  d.get_memory = Memory;
  d.get_type = DeviceType;
  d.get_props = Properties;
  d.init_backend = Init;
  d.get_buffer_type = BufferType;
  d.supports_op = SupportsOp;
  d.supports_buft = SupportsBuffer;
  return d;
}

// ---- the registry

std::size_t DeviceCount(ggml_backend_reg_t) { return 1; }
ggml_backend_dev_t Device(ggml_backend_reg_t registry, std::size_t) {
  return &static_cast<Plugin*>(registry->context)->device;
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

// Null, after a line that says why, where a setting is wrong.
Plugin* MakePlugin() {
  Result<engine::Settings> settings = engine::ReadSettings(environ);
  if (!settings.ok()) {
    Say("error: " + settings.status().message() + ". kvmix is not used.");
    return nullptr;
  }
  const std::string version(Version());
  if (settings->help) {
    std::fprintf(stderr, "kvmix %s for llama.cpp, flash attention on (-fa on). Settings:\n%s",
                 version.c_str(), engine::SettingsHelp().c_str());
  }
  std::fprintf(stderr,
               "kvmix %s: %s%s; takes flash attention (-fa on) over caches of f16, bf16, f32 and "
               "q8_0\n",
               version.c_str(), engine::Summary(*settings).c_str(),
               settings->memory ? ", in place of the engine's cache" : "");
  Plugin* const plugin = new Plugin(std::move(*settings));
  plugin->registry = {
      GGML_BACKEND_API_VERSION, {RegistryName, DeviceCount, Device, Procedure}, plugin};
  plugin->device = {DeviceTable(), &plugin->registry, plugin};
  return plugin;
}

}  // namespace
}  // namespace kvmix::llama

// Null: the engine goes on without kvmix, and has been told why. The plug-in stays as long as the
// process, for an engine may free its contexts after all else.
extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
  using namespace kvmix::llama;
  static Plugin* plugin = nullptr;
  if (!AreLibrariesThese()) return nullptr;
  if (plugin == nullptr) plugin = MakePlugin();
  return plugin != nullptr ? &plugin->registry : nullptr;
}
