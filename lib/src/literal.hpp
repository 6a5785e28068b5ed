// The part of Python's literals that an NPY header is written in: strings, integers, True and
// False, with the punctuation of tuples, lists and dicts left to the caller. Input is untrusted
// UTF-8; every step is bounded by its length.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace sharr::detail {

constexpr std::size_t max_ndim = 64;  // NumPy 2's; 1.x has 32

// What is wrong with a literal, a dtype or a header; becomes an error with a name further up.
struct ParseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A Python string: what it says, and how repr() writes it.
struct Text {
  std::string value;
  std::string repr;
};

class Lexer {
 public:
  explicit Lexer(std::string_view text) noexcept : text_(text) {}

  // Skips white space; the next byte, or NUL at the end.
  char peek() noexcept;
  // Takes c when it is next.
  bool accept(char c) noexcept;
  // Takes c or throws.
  void expect(char c);
  bool at_end() noexcept;

  Text string();
  // An integer that fits, with the suffix L that Python 2 wrote.
  std::int64_t integer();
  bool boolean();
  // A tuple of at most max_ndim integers.
  std::vector<std::int64_t> shape();

 private:
  void escape(std::string& out);

  std::string_view text_;
  std::size_t at_ = 0;
};

// Throws ParseError when text is not UTF-8.
void check_utf8(std::string_view text);
std::string latin1_to_utf8(std::string_view text);
// False, with out undefined, when text has a character beyond latin-1. text is UTF-8.
bool utf8_to_latin1(std::string_view text, std::string& out);

}  // namespace sharr::detail
