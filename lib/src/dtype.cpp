#include "dtype.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <optional>
#include <unordered_set>
#include <utility>
#include <vector>

#include "format.hpp"
#include "sharr/store.hpp"

namespace sharr {
namespace {

using detail::Lexer;
using detail::ParseError;
using detail::Text;

constexpr char native_order = std::endian::native == std::endian::little ? '<' : '>';
// NumPy keeps the itemsize in a C int.
constexpr std::size_t max_itemsize = 0x7FFFFFFF;
// Nesting is the one thing that costs stack: far more than any real dtype, far less than a stack.
constexpr int max_depth = 32;

struct Field;

// One type of the grammar. itemsize includes subshapes.
struct Type {
  char order = '|';
  char kind = 'V';
  std::string unit;     // of M and m: "[ns]", "[25s]", or empty for the generic unit
  bool record = false;  // fields count, kind does not
  std::vector<Field> fields;
  std::vector<std::vector<std::int64_t>> subshapes;  // of sub-arrays, the innermost first
  std::size_t base_size = 0;
  std::size_t itemsize = 0;
};

struct Field {
  Text name;
  std::optional<Text> title;
  Type type;
  std::size_t offset = 0;
  bool padding = false;  // how NPY writes a gap: an unnamed void, which is no field to NumPy
};

std::size_t multiply(std::size_t a, std::int64_t b) {
  std::size_t product = 0;
  if (b < 0 || static_cast<std::size_t>(b) > max_itemsize ||
      __builtin_mul_overflow(a, static_cast<std::size_t>(b), &product) || product > max_itemsize) {
    throw ParseError("a dtype whose elements are too large");
  }
  return product;
}

// The decimal number that text is, all of it; none for anything else.
std::optional<std::int64_t> decimal(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < 0) return {};
  return value;
}

// "[25s]" as numpy.datetime_data sees it, written the one way that dtype.str has.
std::string datetime_unit(std::string_view text, std::string_view whole) {
  if (text.empty()) return {};
  static constexpr std::array<std::string_view, 13> units = {"Y",  "M",  "W",  "D",  "h",  "m", "s",
                                                             "ms", "us", "ns", "ps", "fs", "as"};
  if (text.size() > 2 && text.front() == '[' && text.back() == ']') {
    text = text.substr(1, text.size() - 2);
    if (text == "generic") return {};
    const std::size_t digits = std::min(text.find_first_not_of("0123456789"), text.size());
    const std::int64_t count = digits == 0 ? 1 : decimal(text.substr(0, digits)).value_or(0);
    const std::string_view unit = text.substr(digits);
    if (std::ranges::find(units, unit) != units.end() && count >= 1 && count <= 0x7FFFFFFF) {
      return "[" + (count == 1 ? std::string() : std::to_string(count)) + std::string(unit) + "]";
    }
  }
  throw ParseError("unknown datetime unit in '" + std::string(whole) + "'");
}

// The kind and bytes that NumPy's one-letter codes and names stand for; kind 0 for none.
std::pair<char, std::size_t> alias(std::string_view name) {
  struct Code {
    char code, kind;
    std::size_t size;
  };
  static constexpr std::array codes = {Code{'?', 'b', 1},  Code{'b', 'i', 1},
                                       Code{'B', 'u', 1},  Code{'h', 'i', 2},
                                       Code{'H', 'u', 2},  Code{'i', 'i', 4},
                                       Code{'I', 'u', 4},  Code{'l', 'i', sizeof(long)},
                                       Code{'q', 'i', 8},  Code{'Q', 'u', 8},
                                       Code{'e', 'f', 2},  Code{'L', 'u', sizeof(long)},
                                       Code{'f', 'f', 4},  Code{'d', 'f', 8},
                                       Code{'F', 'c', 8},  Code{'g', 'f', sizeof(long double)},
                                       Code{'D', 'c', 16}, Code{'S', 'S', 0},
                                       Code{'U', 'U', 0},  Code{'G', 'c', 2 * sizeof(long double)},
                                       Code{'V', 'V', 0},  Code{'O', 'O', 8}};
  if (name.size() == 1) {
    const auto* found = std::ranges::find(codes, name.front(), &Code::code);
    return found == codes.end() ? std::pair<char, std::size_t>{0, 0}
                                : std::pair{found->kind, found->size};
  }
  if (name == "bool") return {'b', 1};
  if (name == "object") return {'O', 8};
  static constexpr std::array<std::pair<std::string_view, char>, 4> stems = {
      {{"int", 'i'}, {"uint", 'u'}, {"float", 'f'}, {"complex", 'c'}}};
  for (const auto& [stem, kind] : stems) {
    if (!name.starts_with(stem)) continue;
    const std::string_view rest = name.substr(stem.size());
    if (rest.empty()) return {kind, kind == 'c' ? 16 : 8};
    const auto bits = decimal(rest);
    if (bits && *bits % 8 == 0) return {kind, static_cast<std::size_t>(*bits) / 8};
  }
  return {0, 0};
}

bool known(char kind, std::size_t size) {
  switch (kind) {
    case 'b':
      return size == 1;
    case 'i':
    case 'u':
      return size == 1 || size == 2 || size == 4 || size == 8;
    case 'f':
      return size == 2 || size == 4 || size == 8 || size == sizeof(long double);
    case 'c':
      return size == 8 || size == 16 || size == 2 * sizeof(long double);
    case 'S':
    case 'U':
    case 'V':
      return true;
    case 'M':
    case 'm':
      return size == 8;
    default:
      return false;
  }
}

// A typestring, "<f8", or one of the names that numpy.dtype takes for it.
Type scalar(std::string_view text) {
  std::string_view rest = text;
  Type type;
  char order = '=';
  if (!rest.empty() && std::string_view("<>|=").find(rest.front()) != std::string_view::npos) {
    order = rest.front();
    rest.remove_prefix(1);
  }
  if (rest.empty()) throw ParseError("unknown dtype '" + std::string(text) + "'");
  if (const auto [kind, size] = alias(rest); kind != 0) {
    type.kind = kind;
    type.base_size = size;
  } else if (rest.front() == 'M' || rest.front() == 'm') {
    type.kind = rest.front();
    rest.remove_prefix(1);
    if (rest.starts_with('8')) rest.remove_prefix(1);
    type.unit = datetime_unit(rest, text);
    type.base_size = 8;
  } else {
    type.kind = rest.front() == 'a' ? 'S' : rest.front();
    const auto size = decimal(rest.substr(1));
    if (!size) throw ParseError("unknown dtype '" + std::string(text) + "'");
    type.base_size = multiply(type.kind == 'U' ? 4 : 1, *size);
  }
  if (type.kind == 'O') throw ParseError("object dtype: its elements are pointers, not data");
  if (!known(type.kind, type.base_size)) {
    throw ParseError("unknown dtype '" + std::string(text) + "'");
  }
  const bool bytes =
      type.kind == 'S' || type.kind == 'V' || (type.kind != 'U' && type.base_size == 1);
  type.order = bytes ? '|' : (order == '<' || order == '>' ? order : native_order);
  type.itemsize = type.base_size;
  return type;
}

std::vector<std::int64_t> subshape(Lexer& lexer) {
  if (lexer.peek() == '(') return lexer.shape();
  // A bare number is a shape of one dimension, but NumPy reads 1 as no sub-array at all; no writer
  // makes either.
  const std::int64_t extent = lexer.integer();
  if (extent < 2) throw ParseError("a sub-array's shape is no tuple");
  return {extent};
}

// By NumPy's rules.
void apply_subshape(Type& type, std::vector<std::int64_t> shape) {
  if (!type.record && type.base_size == 0) throw ParseError("a sub-array of elements of any size");
  std::size_t elements = std::ranges::count(shape, 0) > 0 ? 0 : 1;
  for (const std::int64_t extent : shape) {
    elements = multiply(elements, extent);
    type.itemsize = multiply(type.itemsize, extent);
  }
  // To NumPy a sub-array of shape () is none.
  if (!shape.empty()) type.subshapes.push_back(std::move(shape));
}

Type parse_type(Lexer& lexer, int depth);

Field parse_field(Lexer& lexer, int depth) {
  Field field;
  lexer.expect('(');
  if (lexer.accept('(')) {
    field.title = lexer.string();
    lexer.expect(',');
    field.name = lexer.string();
    lexer.expect(')');
  } else {
    field.name = lexer.string();
  }
  lexer.expect(',');
  field.type = parse_type(lexer, depth);
  if (lexer.accept(',') && lexer.peek() != ')') {
    apply_subshape(field.type, subshape(lexer));
    lexer.accept(',');
  }
  lexer.expect(')');
  // What NumPy's reader takes for a gap: to it a sub-array is a void too.
  field.padding = !field.title && field.name.value.empty() &&
                  (!field.type.subshapes.empty() || (!field.type.record && field.type.kind == 'V'));
  return field;
}

Type parse_type(Lexer& lexer, int depth) {
  if (depth > max_depth) throw ParseError("a dtype that is nested too deeply");
  if (lexer.accept('(')) {
    Type type = parse_type(lexer, depth + 1);
    lexer.expect(',');
    apply_subshape(type, subshape(lexer));
    lexer.accept(',');
    lexer.expect(')');
    return type;
  }
  if (!lexer.accept('[')) return scalar(lexer.string().value);
  Type type;
  type.record = true;
  std::unordered_set<std::string> names;
  bool comma = true;
  while (!lexer.accept(']')) {
    if (!comma) throw ParseError("expected ',' in a list of fields");
    Field field = parse_field(lexer, depth + 1);
    if (!field.padding) {
      // NumPy keeps names and titles in one dictionary.
      if (!names.insert(field.name.value).second ||
          (field.title && !names.insert(field.title->value).second)) {
        throw ParseError("two fields named " + field.name.repr);
      }
    }
    field.offset = type.itemsize;
    type.itemsize += field.type.itemsize;
    if (type.itemsize > max_itemsize) throw ParseError("a dtype whose elements are too large");
    type.fields.push_back(std::move(field));
    comma = lexer.accept(',');
  }
  type.base_size = type.itemsize;
  return type;
}

// "<f8", or "U" and "S" with the number of characters.
std::string typestring(const Type& type) {
  std::string text{type.order, type.kind};
  if (type.kind == 'M' || type.kind == 'm') return text + "8" + type.unit;
  return text + std::to_string(type.kind == 'U' ? type.base_size / 4 : type.base_size);
}

// A type's text with its first levels of sub-arrays around it.
std::string subarray(std::string text, const std::vector<std::vector<std::int64_t>>& shapes,
                     std::size_t levels) {
  for (std::size_t i = 0; i < levels; ++i) {
    text = detail::formatted("({}, {})", text, shape_text(shapes[i]));
  }
  return text;
}

// The descr of a type without its sub-arrays, as a Python literal.
std::string literal_of(const Type& type) {
  if (!type.record) return "'" + typestring(type) + "'";
  std::string text = "[";
  for (const Field& field : type.fields) {
    if (text.size() > 1) text += ", ";
    text += field.title ? "((" + field.title->repr + ", " + field.name.repr + ")"
                        : "(" + field.name.repr;
    const auto& shapes = field.type.subshapes;
    text += ", " + subarray(literal_of(field.type), shapes, shapes.empty() ? 0 : shapes.size() - 1);
    if (!shapes.empty()) text += ", " + shape_text(shapes.back());
    text += ")";
  }
  return text + "]";
}

// What NumPy prints for a field's type: numpy/core/_dtype.py describes the forms.
std::string construction(const Type& type);

std::string record_str(const Type& type) {
  std::string names, formats, offsets, titles, items;
  bool packed = true, titled = false;
  std::size_t expected = 0;
  const auto append = [](std::string& list, const std::string& item) {
    if (!list.empty()) list += ", ";
    list += item;
  };
  for (const Field& field : type.fields) {
    if (field.padding) continue;
    packed = packed && field.offset == expected;
    expected = field.offset + field.type.itemsize;
    append(names, field.name.repr);
    std::string format = construction(field.type);
    append(formats, format);
    append(offsets, std::to_string(field.offset));
    append(titles, field.title ? field.title->repr : "None");
    titled = titled || field.title;
    if (!field.type.subshapes.empty()) format = format.substr(1, format.size() - 2);
    append(items, (field.title ? "((" + field.title->repr + ", " + field.name.repr + "), "
                               : "(" + field.name.repr + ", ") +
                      format + ")");
  }
  if (packed && expected == type.base_size) return "[" + items + "]";
  return "{'names': [" + names + "], 'formats': [" + formats + "], 'offsets': [" + offsets + "]" +
         (titled ? ", 'titles': [" + titles + "]" : "") +
         ", 'itemsize': " + std::to_string(type.base_size) + "}";
}

std::string construction(const Type& type) {
  std::string text;
  if (type.record) {
    text = record_str(type);
  } else if (type.kind == 'b') {
    text = "'?'";
  } else if (type.base_size == 0) {
    text = type.kind == 'U' ? std::string{'\'', type.order, 'U', '\''}
                            : std::string{'\'', type.kind, '\''};
  } else {
    text = typestring(type);
    text = "'" + (type.order == '|' ? text.substr(1) : text) + "'";
  }
  return subarray(std::move(text), type.subshapes, type.subshapes.size());
}

Dtype dtype_of(const Type& type) {
  if (!type.subshapes.empty()) {
    throw ParseError("a sub-array dtype: its shape belongs to the array's");
  }
  return DtypeAccess::make(type.record ? literal_of(type) : typestring(type), type.itemsize);
}

Type parse_bare(std::string_view descr) {
  Lexer lexer(descr);
  if (lexer.peek() != '[') return scalar(descr);
  Type type = parse_type(lexer, 0);
  if (!lexer.at_end()) throw ParseError("something follows the list of fields");
  return type;
}

}  // namespace

Dtype DtypeAccess::parse(Lexer& lexer) { return dtype_of(parse_type(lexer, 0)); }

Dtype::Dtype(std::string_view descr) {
  try {
    detail::check_utf8(descr);
    *this = dtype_of(parse_bare(descr));
  } catch (const ParseError& error) {
    throw ArgumentError("", error.what());
  }
}

std::string Dtype::literal() const { return structured() ? descr_ : "'" + descr_ + "'"; }

std::string Dtype::str() const {
  const Type type = parse_bare(descr_);
  if (type.record) return record_str(type);
  if (type.kind == 'S' || type.kind == 'U' || type.kind == 'V' ||
      (type.order != '|' && type.order != native_order)) {
    return descr_;
  }
  const std::string bits = std::to_string(type.base_size * 8);
  switch (type.kind) {
    case 'b':
      return "bool";
    case 'i':
      return "int" + bits;
    case 'u':
      return "uint" + bits;
    case 'f':
      return "float" + bits;
    case 'c':
      return "complex" + bits;
    case 'M':
      return "datetime64" + type.unit;
    default:
      return "timedelta64" + type.unit;
  }
}

}  // namespace sharr
