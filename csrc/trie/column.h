#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace saffron {

/// One value per slot; index -1 is the value of the virtual node above all the roots of the forest.
template <class T>
class Column {
 public:
  explicit Column(T initial) : initial_(initial) {}

  void resize(int64_t slots) { values_.resize(static_cast<size_t>(slots) + 1, initial_); }
  T& operator[](int32_t slot) { return values_[static_cast<size_t>(slot + 1)]; }
  const T& operator[](int32_t slot) const { return values_[static_cast<size_t>(slot + 1)]; }

 private:
  T initial_;
  std::vector<T> values_;
};

}  // namespace saffron
