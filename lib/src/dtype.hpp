// The grammar of NPY's descr, for the header's reader and for Dtype itself.
#pragma once

#include <string>

#include "literal.hpp"
#include "sharr/dtype.hpp"

namespace sharr {

// Makes a Dtype of what is already canonical.
struct DtypeAccess {
  static Dtype make(std::string descr, std::size_t itemsize) {
    return {std::move(descr), itemsize};
  }
  // Reads a descr as it stands in a header, where a typestring is in quotes. Throws ParseError.
  static Dtype parse(detail::Lexer& lexer);
};

}  // namespace sharr
