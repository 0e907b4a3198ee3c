#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

// What the files in simd/ use is always inlined there; see simd/vec.h.
#define SAFFRON_INLINE inline __attribute__((always_inline))

namespace saffron::cpu {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kInt32 = 2, kBool = 3, kFloat64 = 4 };

SAFFRON_INLINE int64_t item_size(DType dtype) {
  constexpr int64_t sizes[] = {4, 2, 4, 1, 8};
  return sizes[static_cast<int>(dtype)];
}

/// A tensor of at most four dimensions that somebody else owns; strides count elements.
struct Tensor {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = 0;
  int64_t shape[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};

  bool given() const { return rank > 0; }  // an optional argument that is None has no dimensions
  template <class T>
  SAFFRON_INLINE T* as() const {
    return reinterpret_cast<T*>(data);
  }
  /// Address of an element, by its first coordinates.
  SAFFRON_INLINE char* at(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data + (i * stride[0] + j * stride[1] + k * stride[2]) * item_size(dtype);
  }
};

/// A 1-D int32 tensor.
struct IntView {
  const int32_t* data;
  int64_t size;
  int64_t stride;

  IntView(const Tensor& t)  // NOLINT: a tensor is passed as it is
      : data(t.as<int32_t>()), size(t.shape[0]), stride(t.stride[0]) {}
  /// Of a list for all rows, that list; of a list per row, the one of row `r`.
  IntView(const Tensor& lists, int64_t r)
      : data(reinterpret_cast<const int32_t*>(lists.rank == 2 ? lists.at(r) : lists.data)),
        size(lists.shape[lists.rank - 1]),
        stride(lists.stride[lists.rank - 1]) {}
  int32_t operator[](int64_t i) const { return data[i * stride]; }
};

/// Reads element `i` of a 1-D tensor of fp32 or bf16.
inline float load_float(const Tensor& t, int64_t i) {
  const int64_t at = i * t.stride[0];
  if (t.dtype == DType::kFloat32) return t.as<float>()[at];
  const uint32_t bits = static_cast<uint32_t>(t.as<uint16_t>()[at]) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

/// Throws unless every value lies in `lowest .. size - 1`.
inline void check_index(const char* name, const IntView& index, int64_t size, int64_t lowest = 0) {
  for (int64_t i = 0; i < index.size; ++i) {
    if (index[i] < lowest || index[i] >= size) {
      throw std::invalid_argument(std::string(name) + ": holds the value " +
                                  std::to_string(index[i]) + ", allowed are " +
                                  std::to_string(lowest) + " to " + std::to_string(size - 1));
    }
  }
}

}  // namespace saffron::cpu
