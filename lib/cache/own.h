// What a thread keeps from call to call.
#ifndef KVMIX_LIB_CACHE_OWN_H_
#define KVMIX_LIB_CACHE_OWN_H_

#include <memory>
#include <utility>

namespace kvmix::internal {

// This thread's T, for one call; its memory is that of the call before. A call inside a call has
// another T: a runner may do other work on a thread that waits for its parts.
template <class T>
class Own {
 public:
  Own() : object_(std::exchange(Spare(), nullptr)) {
    if (object_ == nullptr) object_ = std::make_unique<T>();
  }
  Own(const Own&) = delete;
  Own& operator=(const Own&) = delete;
  ~Own() { Spare() = std::move(object_); }

  T& operator*() const { return *object_; }
  T* operator->() const { return object_.get(); }

 private:
  static std::unique_ptr<T>& Spare() {
    thread_local std::unique_ptr<T> spare;
    return spare;
  }
  std::unique_ptr<T> object_;
};

}  // namespace kvmix::internal

#endif  // KVMIX_LIB_CACHE_OWN_H_
