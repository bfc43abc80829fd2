// KRRST_CHECK(condition, text...) throws the text as a std::runtime_error if the condition fails.
// Torch's STD_TORCH_CHECK writes it to a std::ostringstream, which crashed where the compiler had
// linked its own copy of libstdc++ into the extension: that copy's locale was never set up.
#pragma once
#include <stdexcept>
#include <string>
#include <type_traits>

namespace krrst {

template <typename Piece>
auto as_text(const Piece& piece) {
  if constexpr (std::is_arithmetic_v<Piece>)
    return std::to_string(piece);
  else
    return std::string(piece);
}

template <typename... Text>
[[noreturn]] void fail(const Text&... text) {
  std::string message;
  (message.append(as_text(text)), ...);
  throw std::runtime_error(message);
}

}  // namespace krrst

#define KRRST_CHECK(condition, ...)             \
  do {                                          \
    if (!(condition)) krrst::fail(__VA_ARGS__); \
  } while (false)
