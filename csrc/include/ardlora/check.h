// The one exception of the core and the macro that throws it. Message form: "op: argument must <rule>, got <value>".
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace ardlora {

enum class ErrorKind { kValue, kType, kNotImplemented, kRuntime };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

template <typename... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(kind, message.str());
}

}  // namespace ardlora

#define ARDLORA_CHECK(condition, ...)                                             \
  do {                                                                            \
    if (!(condition)) ::ardlora::fail(::ardlora::ErrorKind::kValue, __VA_ARGS__); \
  } while (false)
