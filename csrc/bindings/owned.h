// Objects of the engine, as Python holds them.
#pragma once

#include <unistd.h>

#include <memory>
#include <utility>

namespace ktrt {

// Leaks the object in a process that fork() made. There another thread may have been in the middle
// of a forward, whose half-done state can be neither waited for nor freed.
struct DeleteWhereMade {
  pid_t owner = getpid();

  template <class T>
  void operator()(T* object) const {
    if (getpid() == owner) delete object;
  }
};

template <class T, class... Args>
std::shared_ptr<T> make_owned(Args&&... args) {
  auto object = std::make_unique<T>(std::forward<Args>(args)...);
  return std::shared_ptr<T>(object.release(), DeleteWhereMade{});
}

}  // namespace ktrt
