// Memory of a pool of caches: pages of a few sizes, each used by one cache or shared by several.
#ifndef KVMIX_LIB_CACHE_PAGES_H_
#define KVMIX_LIB_CACHE_PAGES_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace kvmix::internal {

// A page is written only by a cache that is its one user.
struct Page {
  std::uint8_t* memory;
  std::size_t kind;
  std::atomic<std::uint32_t> users;
  Page* next;         // of a list, for whoever holds the page alone
  std::size_t place;  // free for the same
};

// Whether a page may be written.
inline bool IsOwn(const Page* page) {
  return page != nullptr && page->users.load(std::memory_order_acquire) == 1;
}

// Thread-safe. Memory comes from the system in chunks, where huge pages are asked for, and goes
// back to it page by page.
class PageMemory {
 public:
  // `most`: bytes in use at a time.
  explicit PageMemory(std::size_t most) : most_(most) {}
  ~PageMemory();
  PageMemory(const PageMemory&) = delete;
  PageMemory& operator=(const PageMemory&) = delete;

  // A kind of pages, all of `bytes`, whose contents mean the same. Returns its number.
  std::size_t AddKind(std::size_t bytes);

  // A page for one user, all zeros or as its last user left it; null if `most` would be exceeded.
  Page* Get(std::size_t kind);
  // One more user, and one less.
  static void Share(Page* page) { page->users.fetch_add(1, std::memory_order_relaxed); }
  void Release(Page* page);

  std::size_t most() const { return most_; }
  std::size_t used() const { return used_.load(std::memory_order_relaxed); }
  std::size_t page_bytes(std::size_t kind) const;

 private:
  struct Kind {
    std::size_t bytes;
    Page* dirty;  // lists of unused pages; the clean ones hold no memory
    Page* clean;
  };
  struct Chunk {
    std::uint8_t* memory;
    std::size_t bytes;
  };
  std::uint8_t* Carve(std::size_t bytes);
  void GiveBack();

  const std::size_t most_;
  mutable std::mutex mutex_;
  std::vector<Kind> kinds_;
  std::vector<std::unique_ptr<Page>> pages_;
  std::vector<Chunk> chunks_;
  std::size_t carved_ = 0;  // bytes of the last chunk
  std::size_t dirty_ = 0;   // bytes of unused pages that hold memory
  std::atomic<std::size_t> used_{0};
};

// Pages that nobody has yet; those that are left go back.
struct PageList {
  PageMemory& memory;
  Page* first = nullptr;
  ~PageList() {
    while (first != nullptr) memory.Release(std::exchange(first, first->next));
  }
};

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_PAGES_H_
