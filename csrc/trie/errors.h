#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace saffron {

[[noreturn]] inline void invalid(const std::string& message) {
  throw std::invalid_argument(message);
}

/// "name[index] = value", the beginning of a message about one entry of an argument.
inline std::string item(const char* name, int64_t index, int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "] = " + std::to_string(value);
}

}  // namespace saffron
