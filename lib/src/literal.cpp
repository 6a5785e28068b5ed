#include "literal.hpp"

#include <algorithm>
#include <charconv>

namespace sharr::detail {
namespace {

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f'; }

void append_utf8(std::string& out, std::uint32_t c) {
  if (c < 0x80) {
    out += static_cast<char>(c);
  } else if (c < 0x800) {
    out += static_cast<char>(0xC0 | (c >> 6));
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    out += static_cast<char>(0xE0 | (c >> 12));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | (c >> 18));
    out += static_cast<char>(0x80 | ((c >> 12) & 0x3F));
    out += static_cast<char>(0x80 | ((c >> 6) & 0x3F));
    out += static_cast<char>(0x80 | (c & 0x3F));
  }
}

// Takes one character off the front of valid or invalid UTF-8; throws when it is invalid.
std::uint32_t take_utf8(std::string_view& text) {
  const auto byte = [&](std::size_t i) -> std::uint32_t {
    return static_cast<unsigned char>(text[i]);
  };
  const std::uint32_t lead = byte(0);
  std::size_t length = 1;
  std::uint32_t c = lead;
  std::uint32_t least = 0;
  if (lead >= 0x80) {
    if (lead >= 0xC0 && lead < 0xE0) {
      length = 2, c = lead & 0x1F, least = 0x80;
    } else if (lead >= 0xE0 && lead < 0xF0) {
      length = 3, c = lead & 0x0F, least = 0x800;
    } else if (lead >= 0xF0 && lead < 0xF8) {
      length = 4, c = lead & 0x07, least = 0x10000;
    } else {
      throw ParseError("not UTF-8");
    }
    if (text.size() < length) throw ParseError("not UTF-8");
    for (std::size_t i = 1; i < length; ++i) {
      if ((byte(i) & 0xC0) != 0x80) throw ParseError("not UTF-8");
      c = (c << 6) | (byte(i) & 0x3F);
    }
    if (c < least || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) throw ParseError("not UTF-8");
  }
  text.remove_prefix(length);
  return c;
}

// Python's repr() of printable ASCII; anything else keeps the spelling it came in, because which
// characters are printable is a table of Python's that has no place here.
std::string repr_of(const std::string& value, std::string_view token) {
  if (!std::ranges::all_of(value, [](char c) { return c >= 0x20 && c < 0x7F; })) {
    return std::string(token);
  }
  const bool has_single = value.find('\'') != std::string::npos;
  const char quote = has_single && value.find('"') == std::string::npos ? '"' : '\'';
  std::string repr{quote};
  for (const char c : value) {
    if (c == '\\' || c == quote) repr += '\\';
    repr += c;
  }
  return repr + quote;
}

}  // namespace

char Lexer::peek() noexcept {
  while (at_ < text_.size() && is_space(text_[at_])) ++at_;
  return at_ < text_.size() ? text_[at_] : '\0';
}

bool Lexer::accept(char c) noexcept {
  if (peek() != c || at_ == text_.size()) return false;
  ++at_;
  return true;
}

void Lexer::expect(char c) {
  if (!accept(c)) {
    throw ParseError(std::string("expected '") + c + "' at byte " + std::to_string(at_));
  }
}

bool Lexer::at_end() noexcept {
  peek();
  return at_ == text_.size();
}

Text Lexer::string() {
  char quote = peek();
  if (quote == 'u' || quote == 'b') {  // prefixes that Python 2 and 3 writers left behind
    ++at_;
    quote = at_ < text_.size() ? text_[at_] : '\0';
  }
  if (quote != '\'' && quote != '"') {
    throw ParseError("expected a string at byte " + std::to_string(at_));
  }
  const std::size_t start = at_++;
  std::string value;
  while (true) {
    if (at_ == text_.size()) throw ParseError("a string is not closed");
    const char c = text_[at_++];
    if (c == quote) break;
    if (c == '\n' || c == '\r') throw ParseError("a string is not closed");
    if (c == '\0') throw ParseError("a NUL byte in a string");
    if (c == '\\') {
      escape(value);
    } else {
      value += c;
    }
  }
  std::string repr = repr_of(value, text_.substr(start, at_ - start));
  return {std::move(value), std::move(repr)};
}

void Lexer::escape(std::string& out) {
  if (at_ == text_.size()) throw ParseError("a string is not closed");
  const char c = text_[at_++];
  const auto number = [&](std::size_t digits, int base) {
    const std::string_view part = text_.substr(at_, digits);
    std::uint32_t value = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), value, base);
    if (error != std::errc{} || end != part.data() + digits || value > 0x10FFFF) {
      throw ParseError("a bad escape in a string");
    }
    at_ += digits;
    append_utf8(out, value);
  };
  switch (c) {
    case '\\':
    case '\'':
    case '"':
      out += c;
      return;
    case 'a':
      out += '\a';
      return;
    case 'b':
      out += '\b';
      return;
    case 'f':
      out += '\f';
      return;
    case 'n':
      out += '\n';
      return;
    case 'r':
      out += '\r';
      return;
    case 't':
      out += '\t';
      return;
    case 'v':
      out += '\v';
      return;
    case 'x':
      number(2, 16);
      return;
    case 'u':
      number(4, 16);
      return;
    case 'U':
      number(8, 16);
      return;
    default:
      throw ParseError("a bad escape in a string");
  }
}

std::int64_t Lexer::integer() {
  const char sign = peek();
  const std::size_t start = at_;
  std::size_t end = start + (sign == '-' ? 1 : 0);
  while (end < text_.size() && text_[end] >= '0' && text_[end] <= '9') ++end;
  std::int64_t value = 0;
  const auto [last, error] = std::from_chars(text_.data() + start, text_.data() + end, value);
  if (error != std::errc{}) {
    throw ParseError("expected an integer of 64 bits at byte " + std::to_string(start));
  }
  at_ = static_cast<std::size_t>(last - text_.data());
  if (at_ < text_.size() && text_[at_] == 'L') ++at_;
  return value;
}

bool Lexer::boolean() {
  peek();
  for (const bool value : {false, true}) {
    const std::string_view word = value ? "True" : "False";
    if (text_.substr(at_).starts_with(word)) {
      at_ += word.size();
      return value;
    }
  }
  throw ParseError("expected True or False at byte " + std::to_string(at_));
}

std::vector<std::int64_t> Lexer::shape() {
  std::vector<std::int64_t> shape;
  expect('(');
  bool comma = true;
  while (!accept(')')) {
    if (!comma) throw ParseError("expected ',' in a shape");
    if (shape.size() == max_ndim) throw ParseError("more than 64 dimensions");
    shape.push_back(integer());
    comma = accept(',');
    if (shape.size() == 1 && !comma) throw ParseError("a shape is no tuple");
  }
  return shape;
}

void check_utf8(std::string_view text) {
  while (!text.empty()) take_utf8(text);
}

std::string latin1_to_utf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const char c : text) append_utf8(out, static_cast<unsigned char>(c));
  return out;
}

bool utf8_to_latin1(std::string_view text, std::string& out) {
  if (std::ranges::all_of(text, [](char c) { return static_cast<unsigned char>(c) < 0x80; })) {
    out = text;
    return true;
  }
  out.clear();
  out.reserve(text.size());
  while (!text.empty()) {
    const std::uint32_t c = take_utf8(text);
    if (c > 0xFF) return false;
    out += static_cast<char>(c);
  }
  return true;
}

}  // namespace sharr::detail
