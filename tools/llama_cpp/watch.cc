#include "watch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <list>
#include <map>
#include <mutex>
#include <vector>

#include "ggml-backend-impl.h"
#include "rows.h"

namespace kvmix::llama {
namespace {

struct Layer {
  Mirror* mirror;
  ggml_tensor* tensors[2];  // K, V: [channels, cells, streams]
  bool alone;               // the mirror
  std::vector<bool> empty;  // by stream: the engine's pages are given back

  std::size_t cells() const {
    return static_cast<std::size_t>(tensors[0]->ne[1] * tensors[0]->ne[2]);
  }
  std::size_t StreamOf(std::size_t cell) const {
    return cell / static_cast<std::size_t>(tensors[0]->ne[1]);
  }
};

char* RowOf(const ggml_tensor* t, std::size_t cell) {
  return static_cast<char*>(t->data) + cell * t->nb[1];
}

// Everything here is one engine's, whose contexts may run on threads of their own.
std::recursive_mutex mutex;
std::list<Layer> layers;
std::map<ggml_backend_buffer_t, ggml_backend_buffer_i> buffers;  // as they were

// What part of a layer's tensor some bytes are.
struct Place {
  Layer* layer = nullptr;
  Tensor tensor = KVMIX_K;
  std::size_t first = 0, count = 0;  // cells that cover the bytes
  std::size_t skip = 0;              // bytes of the first cell before them
};

Place Find(const void* data, std::size_t bytes) {
  const char* const at = static_cast<const char*>(data);
  for (Layer& layer : layers) {
    for (const Tensor tensor : {KVMIX_K, KVMIX_V}) {
      const ggml_tensor* const t = layer.tensors[tensor == KVMIX_V];
      const char* const begin = static_cast<const char*>(t->data);
      if (at < begin || at >= begin + layer.cells() * t->nb[1]) continue;
      const std::size_t offset = static_cast<std::size_t>(at - begin);
      const std::size_t first = offset / t->nb[1];
      return {&layer, tensor, first, (offset + bytes - 1) / t->nb[1] - first + 1,
              offset - first * t->nb[1]};
    }
  }
  return {};
}

constexpr std::size_t kCellsAtATime = 64;

// The rows of those of some cells that the mirror holds.
void DecodeRows(const Layer& layer, Tensor tensor, std::size_t first, std::size_t count,
                char* rows) {
  const ggml_tensor* const t = layer.tensors[tensor == KVMIX_V];
  const std::size_t row = static_cast<std::size_t>(t->ne[0]);
  std::vector<float> numbers(std::min(count, kCellsAtATime) * row);
  for (std::size_t c = 0; c < count; ++c) {
    std::size_t n = 0;  // that follow on each other in one stream
    while (n < kCellsAtATime && c + n < count && layer.mirror->Holds(first + c + n) &&
           layer.StreamOf(first + c + n) == layer.StreamOf(first + c)) {
      ++n;
    }
    if (n == 0) continue;
    layer.mirror->Decode(tensor, first + c, n, numbers.data());
    for (std::size_t i = 0; i < n; ++i) {
      FromFloats(t->type, numbers.data() + i * row, rows + (c + i) * t->nb[1], t->ne[0]);
    }
    c += n - 1;
  }
}

// Rows of cells as the engine would have them.
std::vector<char> ReadRows(const Place& at) {
  const ggml_tensor* const t = at.layer->tensors[at.tensor == KVMIX_V];
  const char* const own = RowOf(t, at.first);
  std::vector<char> rows(own, own + at.count * t->nb[1]);
  DecodeRows(*at.layer, at.tensor, at.first, at.count, rows.data());
  return rows;
}

// The engine's rows of some cells hold again, and it may write them.
void HandOver(Layer& layer, std::size_t first, std::size_t count) {
  for (const Tensor tensor : {KVMIX_K, KVMIX_V}) {
    if (!layer.alone) break;
    DecodeRows(layer, tensor, first, count, RowOf(layer.tensors[tensor == KVMIX_V], first));
  }
  for (std::size_t s = layer.StreamOf(first); s <= layer.StreamOf(first + count - 1); ++s) {
    layer.empty[s] = false;
  }
  layer.mirror->Changed(first, count);
}

// Zeros that take no memory.
void Empty(char* data, std::size_t bytes) {
  const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data), end = begin + bytes;
  const std::uintptr_t first = std::min((begin + page - 1) / page * page, end);
  const std::uintptr_t last = std::max(end / page * page, first);
  std::memset(data, 0, first - begin);
  std::memset(reinterpret_cast<char*>(last), 0, end - last);
  if (last == first) return;
  char* const pages = data + (first - begin);
  if (madvise(pages, last - first, MADV_DONTNEED) != 0) std::memset(pages, 0, last - first);
}

// ---- the buffer's functions

void Free(ggml_backend_buffer_t buffer) {
  const std::lock_guard lock(mutex);
  const auto free_buffer = buffers.at(buffer).free_buffer;
  buffers.erase(buffer);
  layers.remove_if([&](const Layer& l) {
    return l.tensors[0]->buffer == buffer || l.tensors[1]->buffer == buffer;
  });
  free_buffer(buffer);
}

void GetTensor(ggml_backend_buffer_t buffer, const ggml_tensor* t, void* data, std::size_t offset,
               std::size_t size) {
  const std::lock_guard lock(mutex);
  const Place at = Find(static_cast<const char*>(t->data) + offset, size);
  if (at.layer == nullptr || !at.layer->alone)
    return buffers.at(buffer).get_tensor(buffer, t, data, offset, size);
  std::memcpy(data, ReadRows(at).data() + at.skip, size);
}

void SetTensor(ggml_backend_buffer_t buffer, ggml_tensor* t, const void* data, std::size_t offset,
               std::size_t size) {
  const std::lock_guard lock(mutex);
  std::vector<char> rows;
  const Place from = Find(data, size);
  if (from.layer != nullptr && from.layer->alone) {  // from stream to stream
    rows = ReadRows(from);
    data = rows.data() + from.skip;
  }
  const Place at = Find(static_cast<char*>(t->data) + offset, size);
  if (at.layer != nullptr) HandOver(*at.layer, at.first, at.count);
  buffers.at(buffer).set_tensor(buffer, t, data, offset, size);
}

void MemsetTensor(ggml_backend_buffer_t buffer, ggml_tensor* t, std::uint8_t value,
                  std::size_t offset, std::size_t size) {
  const std::lock_guard lock(mutex);
  const Place at = Find(static_cast<char*>(t->data) + offset, size);
  if (at.layer != nullptr) HandOver(*at.layer, at.first, at.count);
  buffers.at(buffer).memset_tensor(buffer, t, value, offset, size);
}

// A copy from a buffer that is not the host's: ggml gets and sets instead.
bool CopyTensor(ggml_backend_buffer_t, const ggml_tensor*, ggml_tensor*) { return false; }

void Clear(ggml_backend_buffer_t buffer, std::uint8_t value) {
  const std::lock_guard lock(mutex);
  bool alone = false;
  for (Layer& layer : layers) {
    if (layer.tensors[0]->buffer != buffer && layer.tensors[1]->buffer != buffer) continue;
    alone |= layer.alone;
    layer.mirror->Changed(0, layer.cells());
    layer.empty.assign(layer.empty.size(), value == 0);
  }
  if (!alone || value != 0) return buffers.at(buffer).clear(buffer, value);
  Empty(static_cast<char*>(ggml_backend_buffer_get_base(buffer)),
        ggml_backend_buffer_get_size(buffer));
}

void Hook(ggml_backend_buffer_t buffer) {
  if (!buffers.emplace(buffer, buffer->iface).second) return;
  buffer->iface.free_buffer = Free;
  buffer->iface.get_tensor = GetTensor;
  buffer->iface.set_tensor = SetTensor;
  buffer->iface.memset_tensor = MemsetTensor;
  buffer->iface.get_tensor_2d = nullptr;  // ggml takes the others, row by row
  buffer->iface.set_tensor_2d = nullptr;
  buffer->iface.cpy_tensor = CopyTensor;
  buffer->iface.clear = Clear;
}

}  // namespace

void Watch(Mirror* mirror, ggml_tensor* k, ggml_tensor* v, bool alone) {
  const std::lock_guard lock(mutex);
  layers.push_back({mirror, {k, v}, alone, std::vector<bool>(static_cast<std::size_t>(k->ne[2]))});
  Hook(k->buffer);
  Hook(v->buffer);
}

void Unwatch(Mirror* mirror) {
  const std::lock_guard lock(mutex);
  layers.remove_if([&](const Layer& l) { return l.mirror == mirror; });
}

bool IsGivenBack(const ggml_tensor* tensor) {
  const std::lock_guard lock(mutex);
  if (tensor == nullptr || tensor->data == nullptr) return false;
  const Place at = Find(tensor->data, 1);
  return at.layer != nullptr && at.layer->alone;
}

void GiveBack(Mirror* mirror, std::size_t first_stream, std::size_t streams) {
  const std::lock_guard lock(mutex);
  for (Layer& layer : layers) {
    if (layer.mirror != mirror || !layer.alone) continue;
    for (std::size_t s = first_stream; s < first_stream + streams; ++s) {
      if (layer.empty[s]) continue;
      layer.empty[s] = true;
      for (const ggml_tensor* t : layer.tensors) {
        Empty(static_cast<char*>(t->data) + s * t->nb[2], t->nb[2]);
      }
    }
  }
}

void Restore(const ggml_tensor* tensor) {
  const std::lock_guard lock(mutex);
  const Place at = Find(tensor->data, 1);
  if (at.layer != nullptr && at.layer->alone) HandOver(*at.layer, 0, at.layer->cells());
}

}  // namespace kvmix::llama
