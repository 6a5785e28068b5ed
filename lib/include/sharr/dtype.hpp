// The type of an array's elements, in NumPy's terms.
//
// The source of the notation is NumPy's array interface and NEP 1 (the NPY format): a simple type
// is its typestring ("<f8", "|S3", ">M8[ns]"), a structured type a list of fields
// ("[('x', '<f4'), ('y', '<i2', (3,))]").
#pragma once

#include <bit>
#include <complex>
#include <concepts>
#include <cstddef>
#include <string>
#include <string_view>

namespace sharr {

// An immutable value; safe to share between threads.
class Dtype {
 public:
  // Reads a typestring ("<f8", "f8", "float64") or a list of fields. Throws ArgumentError when
  // descr is no dtype of fixed size that NumPy has; object dtype is refused like this too.
  explicit Dtype(std::string_view descr);

  // The dtype of a C++ number: of<float>() is "<f4" on a little-endian machine.
  template <class T>
  static Dtype of();

  // As the NPY header has it, in UTF-8: the bare typestring with its byte order, or the list.
  const std::string& descr() const noexcept { return descr_; }
  // The same as a Python literal: the typestring in quotes, or the list.
  std::string literal() const;
  // What str(numpy.dtype) prints: "float64", ">f8", "[('x', '<f4')]".
  std::string str() const;
  // Bytes an element takes.
  std::size_t itemsize() const noexcept { return itemsize_; }
  bool structured() const noexcept { return !descr_.empty() && descr_.front() == '['; }

  friend bool operator==(const Dtype& a, const Dtype& b) noexcept { return a.descr_ == b.descr_; }

 private:
  friend struct DtypeAccess;
  Dtype(std::string descr, std::size_t itemsize) : descr_(std::move(descr)), itemsize_(itemsize) {}

  std::string descr_;
  std::size_t itemsize_ = 0;
};

namespace detail {
template <class T>
constexpr char kind_of() {
  if constexpr (std::same_as<T, bool>)
    return 'b';
  else if constexpr (std::signed_integral<T>)
    return 'i';
  else if constexpr (std::unsigned_integral<T>)
    return 'u';
  else if constexpr (std::floating_point<T>)
    return 'f';
  else {
    static_assert(std::same_as<T, std::complex<typename T::value_type>>, "no NumPy dtype for this");
    return 'c';
  }
}
}  // namespace detail

template <class T>
Dtype Dtype::of() {
  const char order =
      sizeof(T) == 1 ? '|' : (std::endian::native == std::endian::little ? '<' : '>');
  return Dtype(std::string{order, detail::kind_of<T>()} + std::to_string(sizeof(T)), sizeof(T));
}

}  // namespace sharr
