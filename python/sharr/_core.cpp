// The library for Python: names, dtypes and errors translated, the GIL released around system
// calls. Everything with a docstring for users is in __init__.py.
#include <cxxabi.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <memory>
#include <new>
#include <optional>
#include <sharr/object.hpp>
#include <sharr/store.hpp>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace {

// A daemon thread that wants the GIL back while the interpreter ends, which ends such threads by an
// exception that neither destructors nor C may let through, stops here for good.
[[noreturn]] void stop() {
  while (true) pause();
}

// Without the GIL while it lives.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;
  ~Released() { restore(); }

  // Lets Python hear signals. Throws what their handlers raise.
  void check_signals() {
    restore();
    const std::unique_ptr<Released, void (*)(Released*)> again(
        this, [](Released* self) { self->state_ = PyEval_SaveThread(); });
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  void restore() const noexcept {
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      stop();
    }
  }

  PyThreadState* state_;
};

PyObject* argument_error = nullptr;
PyObject* format_error = nullptr;

py::str decoded(const std::string& text) {
  PyObject* const str =
      PyUnicode_DecodeFSDefaultAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
  if (str == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(str);
}

void set_error(PyObject* type, const sharr::Error& error) {
  // It may quote a file, in which anything can be.
  const std::string& text = error.message();
  const auto message = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), "backslashreplace"));
  if (!message) throw py::error_already_set();
  // OSError picks the subclass of its errno.
  const py::tuple arguments = py::make_tuple(error.errnum(), message, decoded(error.name()));
  PyErr_SetObject(type, arguments.ptr());
}

// What a catch block has caught, as Python's; or what went wrong with that.
void raise() noexcept {
  try {
    try {
      throw;
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const sharr::ArgumentError& error) {
      set_error(argument_error, error);
    } catch (const sharr::FormatError& error) {
      set_error(format_error, error);
    } catch (const sharr::Error& error) {
      set_error(PyExc_OSError, error);
    }
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

// Does what a slot, a method or a function is to do, its exceptions as Python's.
template <class F>
PyObject* run(F&& f) {
  try {
    if constexpr (std::is_void_v<decltype(f())>) {
      f();
      return Py_NewRef(Py_None);
    } else {
      return py::object(f()).release().ptr();
    }
  } catch (const abi::__forced_unwind&) {  // from code in Python that f() has called
    stop();
  } catch (...) {
    raise();
    return nullptr;
  }
}

template <class R, class... A, std::size_t... i>
R call(R (*function)(A...), PyObject* const* arguments, std::index_sequence<i...> /*all*/) {
  return function(py::reinterpret_borrow<py::object>(arguments[i])...);
}

template <class R, class... A>
R call(R (*function)(A...), PyObject* const* arguments, Py_ssize_t count) {
  if (count != sizeof...(A)) {
    throw py::type_error("takes " + std::to_string(sizeof...(A)) + " arguments");
  }
  return call(function, arguments, std::index_sequence_for<A...>());
}

// A function of any of the types that the flags of a PyMethodDef tell apart.
template <class F>
PyCFunction c_function(F* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

// A function of the module, by position. For those that are called so often that pybind11's way of
// calling, which takes a third of a microsecond, counts.
template <auto function>
PyMethodDef positional(const char* name) {
  const auto method = [](PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
    return run([&] { return call(function, arguments, count); });
  };
  return {name, c_function(+method), METH_FASTCALL, nullptr};
}

bool truth(const py::object& object) {
  const int result = PyObject_IsTrue(object.ptr());
  if (result < 0) throw py::error_already_set();
  return result != 0;
}

// A name as sharr takes it: str by the library's rules, os.PathLike as a path.
sharr::Name name_of(const py::object& object, bool directory = false) {
  if (PyUnicode_CheckExact(object.ptr()) != 0 && PyUnicode_IS_COMPACT_ASCII(object.ptr())) {
    const std::string_view text(static_cast<const char*>(PyUnicode_DATA(object.ptr())),
                                static_cast<std::size_t>(PyUnicode_GET_LENGTH(object.ptr())));
    return directory ? sharr::Name::directory(text) : sharr::Name(text);
  }
  py::object path = object;
  const bool is_str = PyUnicode_Check(object.ptr()) != 0;
  if (!is_str) {
    if (PyBytes_Check(object.ptr()) != 0 || !py::hasattr(object, "__fspath__")) {
      throw py::type_error("a name is a str or os.PathLike, not " +
                           std::string(Py_TYPE(object.ptr())->tp_name));
    }
    path = py::reinterpret_steal<py::object>(PyOS_FSPath(object.ptr()));
    if (!path) throw py::error_already_set();
  }
  std::string text;
  if (PyUnicode_Check(path.ptr()) != 0) {
    const auto bytes = py::reinterpret_steal<py::bytes>(PyUnicode_EncodeFSDefault(path.ptr()));
    if (!bytes) throw py::error_already_set();
    text = bytes;
  } else {
    text = path.cast<std::string>();
  }
  if (!is_str) return sharr::Name::from_path(text);
  return directory ? sharr::Name::directory(text) : sharr::Name(text);
}

// Functions written in Python, in which a thread may be told to stop().
PyObject* literal_eval = nullptr;
PyObject* descr_to_dtype = nullptr;
PyObject* dtype_to_descr = nullptr;

py::object result_of(PyObject* function, const py::object& argument) {
  PyObject* result = nullptr;
  try {
    result = PyObject_CallOneArg(function, argument.ptr());
  } catch (const abi::__forced_unwind&) {
    stop();
  }
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

// The dtype that NumPy makes of a descr. The common ones are kept: making one costs microseconds.
// Throws FormatError, named by uri, for what only other releases of NumPy have.
py::dtype numpy_dtype(const sharr::Dtype& dtype, std::string_view uri) {
  static auto& cache = *new std::unordered_map<std::string, py::dtype>;  // outlives the interpreter
  if (dtype.structured()) {
    try {
      // The library has read the text as a list of fields and nothing else.
      const py::object fields = result_of(literal_eval, py::str(dtype.descr()));  // of UTF-8
      return py::dtype::from_args(result_of(descr_to_dtype, fields));
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_ValueError) && !error.matches(PyExc_TypeError)) throw;
      throw sharr::FormatError(uri, std::string("this NumPy cannot read its dtype: ") +
                                        py::str(error.value()).cast<std::string>());
    }
  }
  if (const auto found = cache.find(dtype.descr()); found != cache.end()) return found->second;
  py::dtype made(dtype.descr());
  if (cache.size() < 256) cache.emplace(dtype.descr(), made);
  return made;
}

sharr::Dtype library_dtype_of(const py::dtype& dtype) {
  const bool structured = !dtype.attr("names").is_none();
  try {
    std::string descr;
    if (structured) {
      descr = py::repr(result_of(dtype_to_descr, dtype)).cast<std::string>();
    } else {
      descr = dtype.attr("str").cast<std::string>();
    }
    sharr::Dtype result(descr);
    if (numpy_dtype(result, "").equal(dtype)) return result;
  } catch (const sharr::FormatError&) {  // nor can NumPy
  } catch (const sharr::ArgumentError& error) {
    throw py::type_error("dtype " + py::str(py::handle(dtype)).cast<std::string>() +
                         " cannot be shared: " + error.message());
  } catch (py::error_already_set& error) {
    // Overlapping or unordered fields have no descr.
    if (!error.matches(PyExc_ValueError)) throw;
  }
  throw py::type_error("dtype " + py::str(py::handle(dtype)).cast<std::string>() +
                       " cannot be shared: the NPY format has no way to write it");
}

// The other way; TypeError for what an NPY file cannot give back. NumPy has one object for each of
// the common dtypes, which are kept: to look at one takes longer than a system call.
sharr::Dtype library_dtype(const py::dtype& dtype) {
  static auto& cache =
      *new std::unordered_map<PyObject*, sharr::Dtype>;  // outlives the interpreter
  if (const auto found = cache.find(dtype.ptr()); found != cache.end()) return found->second;
  sharr::Dtype result = library_dtype_of(dtype);
  if (!result.structured() && cache.size() < 64) {  // names can be changed, the rest cannot
    cache.emplace(dtype.inc_ref().ptr(), result);
  }
  return result;
}

sharr::Shape shape_of(const py::object& object) {
  PyObject* const raw = object.ptr();
  const auto plain = [](PyObject* item) { return PyLong_CheckExact(item) != 0; };
  sharr::Shape shape;
  const auto append = [&](PyObject* item) {
    const long long extent = PyLong_AsLongLong(item);
    if (extent == -1 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      throw py::value_error("maximum supported dimension exceeded: " +
                            py::str(object).cast<std::string>());
    }
    shape.push_back(extent);
  };
  if (plain(raw)) {
    append(raw);
    return shape;
  }
  if (PyTuple_CheckExact(raw) != 0 || PyList_CheckExact(raw) != 0) {
    const auto sequence = py::reinterpret_borrow<py::sequence>(object);
    bool all = true;
    for (const py::handle item : sequence) all = all && plain(item.ptr());
    if (all) {
      for (const py::handle item : sequence) append(item.ptr());
      return shape;
    }
  }
  // Everything else that NumPy takes for a shape, by asking NumPy; elements of no bytes cost none.
  const py::module_ numpy = py::module_::import("numpy");
  return numpy.attr("empty")(object, "V0").attr("shape").cast<sharr::Shape>();
}

bool is(const py::object& object, const char* text) {
  return PyUnicode_Check(object.ptr()) != 0 &&
         PyUnicode_CompareWithASCIIString(object.ptr(), text) == 0;
}

sharr::Order order_of(const py::object& order) {
  if (is(order, "C")) return sharr::Order::c;
  if (is(order, "F")) return sharr::Order::fortran;
  throw py::value_error("order must be 'C' or 'F', not " + py::repr(order).cast<std::string>());
}

sharr::Mode mode_of(const py::object& mode) {
  if (is(mode, "r+")) return sharr::Mode::read_write;
  if (is(mode, "r")) return sharr::Mode::read;
  if (is(mode, "c")) return sharr::Mode::copy_on_write;
  throw py::value_error("mode must be 'r', 'r+' or 'c', not " + py::repr(mode).cast<std::string>());
}

// A Python class whose objects hold a T. For those that are made so often that pybind11's, which
// enters each of its own into a table, take too long.
template <class T>
struct Box {
  PyObject_HEAD;
  T value;

  inline static PyTypeObject* type = nullptr;

  static py::object make(T&& value) {
    static_assert(std::is_nothrow_move_constructible_v<T>);
    PyObject* const self = PyType_GenericAlloc(type, 0);
    if (self == nullptr) throw py::error_already_set();
    new (&reinterpret_cast<Box*>(self)->value) T(std::move(value));
    return py::reinterpret_steal<py::object>(self);
  }

  static bool check(const PyObject* object) { return Py_TYPE(object) == type; }
  static const T& of(PyObject* self) { return reinterpret_cast<Box*>(self)->value; }

  // A read-only attribute.
  template <auto get>
  static PyGetSetDef attribute(const char* name) {
    return {name, [](PyObject* self, void*) { return run([&] { return get(of(self)); }); }, nullptr,
            nullptr, nullptr};
  }

  template <auto call>
  static PyMethodDef method(const char* name) {
    return {name, [](PyObject* self, PyObject*) { return run([&] { call(of(self)); }); },
            METH_NOARGS, nullptr};
  }

  static void define(const py::module_& module, const char* name, const char* doc,
                     PyGetSetDef* attributes, std::vector<PyType_Slot> slots) {
    const auto dealloc = [](PyObject* self) {
      PyTypeObject* const own = Py_TYPE(self);
      reinterpret_cast<Box*>(self)->value.~T();
      own->tp_free(self);
      Py_DECREF(own);
    };
    slots.insert(slots.end(),
                 {{Py_tp_dealloc, reinterpret_cast<void*>(static_cast<destructor>(dealloc))},
                  {Py_tp_doc, const_cast<char*>(doc)},
                  {Py_tp_getset, attributes},
                  {0, nullptr}});
    const std::string full = std::string("sharr._core.") + name;
    PyType_Spec spec = {full.c_str(), sizeof(Box), 0,
                        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots.data()};
    type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&spec));
    if (type == nullptr) throw py::error_already_set();
    module.attr(name) = py::handle(reinterpret_cast<PyObject*>(type));
  }
};

// What keeps an array's memory: the base of the ndarrays on it. NumPy lets an array be made
// writeable if its base gives a buffer that is.
class Mapping {
 public:
  Mapping(sharr::Array&& array, py::object name, bool built = false)
      : array_(std::move(array)), name_(std::move(name)), built_(built) {
    const std::string& uri = array_->info().name;
    if (uri.starts_with("file://") && !uri.starts_with("file:///")) {
      std::error_code none;  // it may have been removed
      directory_ = std::filesystem::current_path(none).string();
    }
  }
  Mapping(Mapping&&) noexcept = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  Mapping& operator=(Mapping&&) = delete;
  ~Mapping() {
    // Taking down a large mapping takes long.
    if (array_ && array_->info().nbytes >= (std::uint64_t{64} << 20)) {
      const Released release;
      array_.reset();
    }
  }

  const sharr::Array& array() const { return *array_; }
  // A relative path would lead other processes elsewhere.
  std::string uri() const {
    const std::string& uri = array_->info().name;
    constexpr std::string_view scheme = "file://";
    if (directory_.empty()) return uri;
    return std::string(scheme) + directory_ + "/" + uri.substr(scheme.size());
  }
  const py::object& name() const { return name_; }
  bool built() const { return built_; }

 private:
  std::optional<sharr::Array> array_;
  py::object name_;        // as the caller gave it
  bool built_;             // by sharr.build(): it may not be published
  std::string directory_;  // what a relative path was relative to
};

// Made with the module: a static that Python makes when it is needed first can have one thread wait
// for another that waits for the GIL of the first.
PyTypeObject* array_type = nullptr;    // sharr.Array
PyTypeObject* ndarray_type = nullptr;  // numpy.ndarray
PyTypeObject* strided_type = nullptr;  // of the bases of what numpy's as_strided() gives
PyObject* ndarray_wrap = nullptr;      // numpy.ndarray.__array_wrap__
std::size_t max_ndim = 0;

void look_up_numpy() {
  py::detail::npy_api::get();
  const py::module_ numpy = py::module_::import("numpy");
  ndarray_type = reinterpret_cast<PyTypeObject*>(py::object(numpy.attr("ndarray")).release().ptr());
  ndarray_wrap = py::object(numpy.attr("ndarray").attr("__array_wrap__")).release().ptr();
  const py::object strided = py::module_::import("numpy.lib.stride_tricks")
                                 .attr("as_strided")(py::array(py::dtype("V0"), 0));
  strided_type = reinterpret_cast<PyTypeObject*>(
      py::object(py::type::of(strided.attr("base"))).release().ptr());
  max_ndim = py::getattr(numpy, "MAXDIMS", py::int_(64)).cast<std::size_t>();
  const auto function = [](const char* module, const char* name) {
    return py::object(py::module_::import(module).attr(name)).release().ptr();
  };
  literal_eval = function("ast", "literal_eval");
  descr_to_dtype = function("numpy.lib.format", "descr_to_dtype");
  dtype_to_descr = function("numpy.lib.format", "dtype_to_descr");
}

bool is_ndarray(const PyObject* object) {
  return PyType_IsSubtype(Py_TYPE(object), ndarray_type) != 0;
}

// The object that has the mapping that an array or a view of it stands on; null for memory that is
// not ours. Each object on the way is held by the one before, so what comes last lives as long as
// the array. Bases of other types than these could be anything, new at each look or in a circle.
PyObject* mapping_of(PyObject* array) {
  PyObject* at = array;
  while (at != nullptr) {
    if (is_ndarray(at)) {
      at = py::detail::array_proxy(at)->base;
    } else if (PyMemoryView_Check(at)) {
      at = PyMemoryView_GET_BUFFER(at)->obj;
    } else if (Py_TYPE(at) == strided_type) {
      const auto base = py::reinterpret_steal<py::object>(PyObject_GetAttrString(at, "base"));
      if (!base) throw py::error_already_set();
      at = base.ptr();
    } else {
      break;
    }
  }
  return at != nullptr && Box<Mapping>::check(at) ? at : nullptr;
}

// What NumPy made of an Array, as an ndarray unless it shares the memory; null, as everything here,
// with an error set.
py::object plain(PyObject* made) {
  auto result = py::reinterpret_steal<py::object>(made);
  if (made == nullptr || Py_TYPE(made) != array_type || mapping_of(made) != nullptr) return result;
  return py::reinterpret_steal<py::object>(PyObject_CallMethod(made, "view", "O", ndarray_type));
}

// Array.__getitem__ and Array.__array_wrap__. Here because every operation goes through them. What
// a subclass of Array gives stays of that subclass, as with numpy.memmap.
PyObject* getitem(PyObject* self, PyObject* key) {
  return run([&] { return plain(ndarray_type->tp_as_mapping->mp_subscript(self, key)); });
}

py::object wrapped(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count < 1 || count > 3 || !is_ndarray(args[0])) {
    throw py::type_error("__array_wrap__(array, context=None, return_scalar=False)");
  }
  PyObject* const array = args[0];
  if (Py_TYPE(self) != array_type) {
    const py::tuple all(static_cast<std::size_t>(count) + 1);
    PyTuple_SET_ITEM(all.ptr(), 0, Py_NewRef(self));
    for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SET_ITEM(all.ptr(), i + 1, Py_NewRef(args[i]));
    return py::reinterpret_steal<py::object>(PyObject_Call(ndarray_wrap, all.ptr(), nullptr));
  }
  if (array == self || (Py_TYPE(array) == array_type && mapping_of(array) != nullptr)) {
    return py::reinterpret_borrow<py::object>(array);  // what was given as out=
  }
  // NumPy 1 does not say whether a scalar is wanted: it always is.
  const int scalar = count == 3 ? PyObject_IsTrue(args[2]) : static_cast<int>(count < 3);
  if (scalar < 0) throw py::error_already_set();
  if (scalar != 0 && py::detail::array_proxy(array)->nd == 0) {
    const py::tuple all(0);
    return py::reinterpret_steal<py::object>(PyObject_GetItem(array, all.ptr()));
  }
  if (Py_TYPE(array) == array_type) return plain(Py_NewRef(array));
  // NumPy's squeeze() gives a plain view to be wrapped.
  if (mapping_of(array) == nullptr) return py::reinterpret_borrow<py::object>(array);
  return py::reinterpret_steal<py::object>(PyObject_CallMethod(array, "view", "O", array_type));
}

PyObject* array_wrap(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return run([&] { return wrapped(self, args, count); });
}

// NumPy 1's Array.__array_prepare__.
PyObject* array_prepare(PyObject* /*self*/, PyObject* const* args, Py_ssize_t count) {
  if (count < 1 || count > 2) {
    PyErr_SetString(PyExc_TypeError, "__array_prepare__(array, context=None)");
    return nullptr;
  }
  return Py_NewRef(args[0]);
}

// Called with the class once it is defined.
void install(py::handle type) {
  static PyMethodDef methods[] = {
      {"__getitem__", getitem, METH_O | METH_COEXIST, nullptr},
      {"__array_wrap__", c_function(array_wrap), METH_FASTCALL, nullptr},
      {"__array_prepare__", c_function(array_prepare), METH_FASTCALL, nullptr},
  };
  array_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
  for (PyMethodDef& method : methods) {
    if (!py::hasattr(type, method.ml_name)) continue;  // of another NumPy
    const auto descriptor =
        py::reinterpret_steal<py::object>(PyDescr_NewMethod(array_type, &method));
    if (!descriptor) throw py::error_already_set();
    type.attr(method.ml_name) = descriptor;
  }
}

py::array make_array(PyTypeObject* type, const py::dtype& dtype,
                     const std::vector<py::ssize_t>& shape, const std::vector<py::ssize_t>& strides,
                     void* data, bool writeable, const py::object& base) {
  const auto& numpy = py::detail::npy_api::get();
  const int flags = writeable ? py::detail::npy_api::NPY_ARRAY_WRITEABLE_ : 0;
  auto made = py::reinterpret_steal<py::array>(numpy.PyArray_NewFromDescr_(
      type, py::object(dtype).release().ptr(), static_cast<int>(shape.size()), shape.data(),
      strides.data(), data, flags, nullptr));
  if (!made) throw py::error_already_set();
  if (numpy.PyArray_SetBaseObject_(made.ptr(), py::object(base).release().ptr()) != 0) {
    throw py::error_already_set();
  }
  return made;
}

// upstream: None, or for the drop-in the name as its user gave it; structured elements are
// V<itemsize> there. made: what numpy_dtype() gives for its dtype, if that is known.
py::array ndarray(sharr::Array&& array, const sharr::Name& name, const py::object& upstream,
                  const std::optional<py::dtype>& made = {}, bool built = false) {
  const sharr::Info& info = array.info();
  py::dtype dtype = !upstream.is_none() && info.dtype.structured()
                        ? py::dtype("V" + std::to_string(info.dtype.itemsize()))
                    : made ? *made
                           : numpy_dtype(info.dtype, name.given());
  if (info.shape.size() > max_ndim) {
    throw sharr::FormatError(name.given(), "this NumPy has at most " + std::to_string(max_ndim) +
                                               " dimensions, not " +
                                               std::to_string(info.shape.size()));
  }
  // NumPy makes S1 of S0, and would look at bytes that are not there.
  if (dtype.itemsize() == 0 && (dtype.kind() == 'S' || dtype.kind() == 'U') && info.size() > 0) {
    throw sharr::FormatError(name.given(), "dtype " + info.dtype.str() + " has no bytes");
  }
  std::vector<py::ssize_t> strides(info.shape.size());
  py::ssize_t stride = dtype.itemsize();
  const auto step = [&](std::size_t i) {
    strides[i] = stride;
    // NumPy's rule: an empty dimension counts as one.
    stride *= info.shape[i] > 0 ? static_cast<py::ssize_t>(info.shape[i]) : 1;
  };
  if (info.order == sharr::Order::fortran) {
    for (std::size_t i = 0; i < strides.size(); ++i) step(i);
  } else {
    for (std::size_t i = strides.size(); i-- > 0;) step(i);
  }
  const std::vector<py::ssize_t> shape(info.shape.begin(), info.shape.end());
  void* const data = array.data();
  const bool writeable = array.mode() != sharr::Mode::read;
  const py::object base = Box<Mapping>::make(
      Mapping(std::move(array), upstream.is_none() ? decoded(name.given()) : upstream, built));
  return make_array(upstream.is_none() ? array_type : ndarray_type, dtype, shape, strides, data,
                    writeable, base);
}

// What an array is to be, from what NumPy's functions take.
struct Spec {
  Spec(const py::object& shape, const py::object& dtype, const py::object& order)
      : extents(shape_of(shape)) {
    py::dtype type = py::dtype::from_args(dtype);
    if (type.itemsize() == 0 || (type.kind() == 'V' && !type.attr("subdtype").is_none())) {
      // What numpy.zeros makes of these: S1 of S, and a sub-array's shape is the array's.
      const py::array probe =
          py::module_::import("numpy").attr("empty")(py::make_tuple(0), type).cast<py::array>();
      type = probe.dtype();
      extents.insert(extents.end(), probe.shape() + 1, probe.shape() + probe.ndim());
    }
    if (extents.size() > max_ndim) {
      // Found out too late, the array would be there and nobody could have it.
      throw py::value_error("NumPy has at most " + std::to_string(max_ndim) + " dimensions, not " +
                            std::to_string(extents.size()));
    }
    stored.emplace(library_dtype(type));
    // Made from text by Python code, in which signals are heard: not when the array is there.
    if (stored->structured()) made.emplace(numpy_dtype(*stored, ""));
    options.order = order_of(order);
  }

  // For a call that is made while released lives.
  const sharr::CreateOptions& options_with(Released& released) {
    options.on_signal = [&released] { released.check_signals(); };
    return options;
  }

  sharr::Shape extents;
  std::optional<sharr::Dtype> stored;
  std::optional<py::dtype> made;  // of it, where that takes long
  sharr::CreateOptions options;
};

py::array create(const py::object& name, const py::object& shape, const py::object& dtype,
                 const py::object& order, const py::object& reserve, const py::object& exist_ok,
                 const py::object& huge, const py::object& upstream) {
  const sharr::Name parsed = name_of(name);
  Spec spec(shape, dtype, order);
  if (!huge.is_none()) {
    const PyNumberMethods* const number = Py_TYPE(huge.ptr())->tp_as_number;
    if (number == nullptr || number->nb_bool == nullptr) {
      throw py::type_error("huge must be None, True or False, not " +
                           py::repr(huge).cast<std::string>());
    }
    spec.options.huge = truth(huge);
  }
  spec.options.reserve = truth(reserve);
  spec.options.exist_ok = truth(exist_ok);
  auto made = [&] {
    Released release;
    return sharr::create(parsed, spec.extents, *spec.stored, spec.options_with(release));
  }();
  return ndarray(std::move(made), parsed, upstream, spec.made);
}

// sharr.build: an array that is published when it is filled.
class NewArray {
 public:
  NewArray(const py::object& name, const py::object& shape, const py::object& dtype,
           const py::object& order, bool replace)
      : name_(name_of(name)) {
    Spec spec(shape, dtype, order);
    spec.options.replace = replace;
    made_ = spec.made;
    Released release;
    new_.emplace(name_, spec.extents, *spec.stored, spec.options_with(release));
  }
  py::array array() { return ndarray(alive().take(), name_, py::none(), made_, true); }
  void publish() {
    sharr::NewArray made = std::move(alive());
    new_.reset();
    const Released release;
    made.publish();
  }
  void discard() { new_.reset(); }

 private:
  sharr::NewArray& alive() {
    if (!new_) throw py::value_error("published or discarded before");
    // A child that runs to the end of the block has not filled what its parent fills.
    if (getpid() != maker_) throw py::value_error("begun by another process, which publishes it");
    return *new_;
  }

  sharr::Name name_;
  pid_t maker_ = getpid();
  std::optional<py::dtype> made_;  // as Spec has it
  std::optional<sharr::NewArray> new_;
};

// What an array is to be that is made of source.
Spec spec_of(const py::array& source, const py::object& order) {
  return {py::tuple(source.attr("shape")), source.dtype(), order};
}

// What is to be copied as it is; null where that is for NumPy to do.
const void* elements_of(const py::array& source, const Spec& spec) {
  constexpr int contiguous = py::array::c_style | py::array::f_style;
  // Strings without bytes are stored with one, as numpy.array has it.
  const bool same = spec.stored->itemsize() == static_cast<std::size_t>(source.itemsize());
  return same && (source.flags() & contiguous) != 0 ? source.data() : nullptr;
}

// Copies the source if it is contiguous.
py::array add(sharr::NewNamespace& self, const py::object& leaf, const py::array& source,
              const py::object& order) {
  if (PyUnicode_Check(leaf.ptr()) == 0) throw py::type_error("names in a namespace are str");
  const auto bytes = py::reinterpret_steal<py::bytes>(PyUnicode_EncodeFSDefault(leaf.ptr()));
  if (!bytes) throw py::error_already_set();
  const std::string name = bytes;
  Spec spec = spec_of(source, order);
  const void* const elements = elements_of(source, spec);
  auto made = [&] {
    Released release;
    return self.add(name, spec.extents, *spec.stored, spec.options_with(release), elements);
  }();
  const sharr::Name uri(made.info().name);
  return ndarray(std::move(made), uri, py::none(), spec.made);
}

// source: contiguous in one order or the other.
py::array put(const py::object& name, const py::array& source, bool replace) {
  const sharr::Name parsed = name_of(name);
  const bool fortran = (source.flags() & py::array::c_style) == 0;
  Spec spec = spec_of(source, py::str(fortran ? "F" : "C"));
  spec.options.replace = replace;
  const void* const elements = elements_of(source, spec);
  auto made = [&] {
    Released release;
    return sharr::put(parsed, spec.extents, *spec.stored, elements, spec.options_with(release));
  }();
  return ndarray(std::move(made), parsed, py::none(), spec.made);
}

py::array wait(const py::object& name, const py::object& timeout, const py::object& mode) {
  const sharr::Name parsed = name_of(name);
  const sharr::Mode how = mode_of(mode);
  std::optional<std::chrono::nanoseconds> left;
  if (!timeout.is_none()) {
    const double seconds = PyFloat_AsDouble(timeout.ptr());
    if (seconds == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (std::isnan(seconds)) throw py::value_error("timeout is not a number");
    constexpr double century = 3.2e9;  // more does not fit, and is as good as for ever
    if (seconds < century) {
      left = std::chrono::duration_cast<std::chrono::nanoseconds>(
          std::chrono::duration<double>(std::max(seconds, 0.0)));
    }
  }
  auto array = [&] {
    Released release;
    return sharr::wait(parsed, how, left, [&release] { release.check_signals(); });
  }();
  return ndarray(std::move(array), parsed, py::none());
}

py::list attach_all(const py::object& where, const py::object& mode) {
  const sharr::Name parsed = name_of(where, true);
  const sharr::Mode how = mode_of(mode);
  auto arrays = [&] {
    const Released release;
    return sharr::attach_all(parsed, how);
  }();
  std::string prefix = parsed.uri();
  if (!prefix.ends_with('/')) prefix += '/';
  py::list result;
  for (sharr::Array& array : arrays) {
    const std::string uri = array.info().name;
    result.append(py::make_tuple(decoded(uri.substr(prefix.size())),
                                 ndarray(std::move(array), sharr::Name(uri), py::none())));
  }
  return result;
}

// What a file can be overwritten with in place, so that a view of it means something else. Of many
// fields a sum will do: 64-bit FNV-1a, the same everywhere.
std::string layout(const sharr::Info& info) {
  std::string dtype = info.dtype.descr();
  if (info.dtype.structured()) {
    std::uint64_t sum = 0xCBF29CE484222325U;
    for (const char c : dtype) sum = (sum ^ static_cast<unsigned char>(c)) * 0x100000001B3U;
    dtype = "V" + std::to_string(info.dtype.itemsize()) + "#" + std::to_string(sum);
  }
  return dtype + " " + sharr::shape_text(info.shape) + " " + static_cast<char>(info.order) +
         " at " + std::to_string(info.offset);
}

// What Array.__reduce_ex__ has written, which anybody may have forged. given: None for the array's
// own dtype.
py::array load(const py::object& type, const py::object& name, const py::object& identity,
               const py::object& mode, const py::object& given,
               const std::vector<py::ssize_t>& shape, const std::vector<py::ssize_t>& strides,
               py::ssize_t offset, bool writeable) {
  const sharr::Name parsed = name_of(name);
  const sharr::Mode how = mode_of(mode);
  const std::string replaced = "replaced since it was pickled";
  const auto [device, inode, birth, as_pickled] =
      identity.cast<std::tuple<std::uint64_t, std::uint64_t, std::int64_t, std::string>>();
  auto array = [&] {
    const Released release;
    try {
      return sharr::attach(parsed, how);
    } catch (const sharr::FormatError& error) {
      throw sharr::Error(ESTALE, parsed.given(), replaced + ": " + error.message());
    } catch (const sharr::Error& error) {
      const int errnum = error.errnum();
      if (errnum == EISDIR || errnum == ENOTDIR || errnum == ELOOP) {
        throw sharr::Error(ESTALE, parsed.given(), replaced + ", by what is no array");
      }
      if (errnum != ENOENT) throw;
      throw sharr::Error(ENOENT, parsed.given(),
                         "deleted or renamed since it was pickled, or not published yet, or out of "
                         "sight here (another container?)");
    }
  }();
  if (array.identity() != sharr::Identity{device, inode, birth}) {
    throw sharr::Error(ESTALE, parsed.given(), replaced + " by another array");
  }
  if (const std::string now = layout(array.info()); now != as_pickled) {
    throw sharr::Error(ESTALE, parsed.given(),
                       "overwritten since it was pickled: " + now + ", was " + as_pickled);
  }
  const auto refuse = [&](const char* what) {
    throw sharr::ArgumentError(parsed.given(), std::string("a pickled view ") + what);
  };
  const py::dtype dtype = given.is_none() ? numpy_dtype(array.info().dtype, parsed.given())
                                          : py::dtype::from_args(given);
  if (dtype.attr("hasobject").cast<bool>()) refuse("of Python objects");
  if (shape.size() != strides.size()) refuse("with other strides than extents");
  // No overflow: neither end ever goes beyond the array.
  const __int128 size = static_cast<__int128>(array.info().nbytes);
  const bool empty = std::ranges::find(shape, 0) != shape.end();
  __int128 first = offset;
  __int128 end = first + (empty ? 0 : dtype.itemsize());
  for (std::size_t i = 0; i < shape.size() && !empty; ++i) {
    if (shape[i] < 0) refuse("with a negative extent");
    const __int128 step = static_cast<__int128>(shape[i] - 1) * strides[i];
    (step < 0 ? first : end) += step;
    if (first < 0 || end > size) break;
  }
  if (first < 0 || end > size) refuse("beyond the array");
  void* const data = static_cast<char*>(array.data()) + offset;
  const bool may_write = writeable && array.mode() != sharr::Mode::read;
  const py::object base = Box<Mapping>::make(Mapping(std::move(array), decoded(parsed.given())));
  return make_array(reinterpret_cast<PyTypeObject*>(type.ptr()), dtype, shape, strides, data,
                    may_write, base);
}

py::array attach(const py::object& name, const py::object& mode, const py::object& upstream) {
  const sharr::Name parsed = name_of(name);
  const sharr::Mode how = mode_of(mode);
  auto array = [&] {
    const Released release;
    return sharr::attach(parsed, how);
  }();
  return ndarray(std::move(array), parsed, upstream);
}

void remove_array(const py::object& name) {
  const sharr::Name parsed = name_of(name);
  const Released release;
  sharr::remove(parsed);
}

// The same for an Info.
using InfoPtr = std::shared_ptr<const sharr::Info>;

py::object info_object(sharr::Info info) {
  return Box<InfoPtr>::make(std::make_shared<const sharr::Info>(std::move(info)));
}

py::object info(const py::object& name) {
  const sharr::Name parsed = name_of(name);
  return info_object([&] {
    const Released release;
    return sharr::info(parsed);
  }());
}

// A descriptor, which is the caller's to close, and what it is of.
py::tuple open_array(const py::object& name) {
  const sharr::Name parsed = name_of(name);
  sharr::OpenArray opened = [&] {
    const Released release;
    return sharr::open_array(parsed);
  }();
  const py::object info = info_object(std::move(opened.info));
  return py::make_tuple(opened.fd.release(), info);
}

py::list list(const py::object& where) {
  const sharr::Name parsed = name_of(where, true);
  auto found = [&] {
    const Released release;
    return sharr::list_shared(parsed);
  }();
  py::list result(found.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    PyList_SET_ITEM(result.ptr(), static_cast<py::ssize_t>(i),
                    Box<InfoPtr>::make(std::move(found[i])).release().ptr());
  }
  return result;
}

py::tuple shape_tuple(const sharr::Shape& shape) {
  py::tuple result(shape.size());
  for (std::size_t i = 0; i < shape.size(); ++i) {
    PyTuple_SET_ITEM(result.ptr(), static_cast<py::ssize_t>(i), py::int_(shape[i]).release().ptr());
  }
  return result;
}

// What the drop-in's list() tells of an array.
PyTypeObject* array_desc = nullptr;

void define_array_desc(const py::module_& module) {
  static PyStructSequence_Field fields[] = {
      {"name", "bytes"}, {"dtype", "the scalar type"}, {"dims", "the shape, a tuple of ints"}, {}};
  static PyStructSequence_Desc desc = {
      "SharedArray.ArrayDesc", "What list() tells of an array: name (bytes), scalar type, dims.",
      fields, 3};
  array_desc = PyStructSequence_NewType(&desc);
  if (array_desc == nullptr) throw py::error_already_set();
  const py::handle type(reinterpret_cast<PyObject*>(array_desc));
  type.attr("__name__") = "ArrayDesc";  // so that repr() leaves the module out, as upstream's
  module.attr("ArrayDesc") = type;
}

// The drop-in's list(). Here because there may be 100,000.
py::tuple describe_all() {
  const sharr::Name directory = sharr::Name::directory("shm://");
  const auto found = [&] {
    const Released release;
    return sharr::list_shared(directory);
  }();
  const std::size_t prefix = directory.uri().size();
  py::list result;
  const sharr::Info* last = nullptr;  // arrays come in series: what it has, the next has too
  py::object scalar_type;
  py::object dims;
  for (const auto& info : found) {
    try {
      if (last == nullptr || info->dtype != last->dtype) {
        scalar_type = numpy_dtype(info->dtype, info->name).attr("type");
      }
      if (last == nullptr || info->shape != last->shape) dims = shape_tuple(info->shape);
      last = info.get();
      const py::bytes name(info->name.data() + prefix, info->name.size() - prefix);
      // Python would look for garbage every 700 of them, which takes as long as to make them. No
      // other thread runs meanwhile.
      const bool collects = PyGC_Disable() != 0;
      const auto desc = py::reinterpret_steal<py::object>(PyStructSequence_New(array_desc));
      if (collects) PyGC_Enable();
      if (!desc) throw py::error_already_set();
      PyStructSequence_SET_ITEM(desc.ptr(), 0, Py_NewRef(name.ptr()));
      PyStructSequence_SET_ITEM(desc.ptr(), 1, Py_NewRef(scalar_type.ptr()));
      PyStructSequence_SET_ITEM(desc.ptr(), 2, Py_NewRef(dims.ptr()));
      result.append(desc);
    } catch (const sharr::FormatError&) {  // a dtype that only a later NumPy has
    }
  }
  return py::tuple(result);
}

// The classes of what Python holds: the memory of an array, and what one is.

PyObject* msync(PyObject* self, PyObject* arguments, PyObject* keywords) {
  static const char* names[] = {"flags", nullptr};
  int flags = 0;
  if (PyArg_ParseTupleAndKeywords(arguments, keywords, "i:msync", const_cast<char**>(names),
                                  &flags) == 0) {
    return nullptr;
  }
  return run([&] {
    const Released release;
    Box<Mapping>::of(self).array().msync(flags);
  });
}

py::object mode_text(const Mapping& self) {
  switch (self.array().mode()) {
    case sharr::Mode::read:
      return py::str("r");
    case sharr::Mode::read_write:
      return py::str("r+");
    case sharr::Mode::copy_on_write:
      break;
  }
  return py::str("c");
}

void define_mapping(const py::module_& module) {
  using B = Box<Mapping>;
  static PyGetSetDef attributes[] = {
      B::attribute<[](const Mapping& self) { return self.name(); }>("name"),
      B::attribute<[](const Mapping& self) -> py::object {
        return py::int_(reinterpret_cast<std::uintptr_t>(self.array().data()));
      }>("addr"),
      B::attribute<[](const Mapping& self) -> py::object {
        return py::int_(self.array().info().nbytes);
      }>("size"),
      B::attribute<[](const Mapping& self) -> py::object { return decoded(self.uri()); }>("_uri"),
      B::attribute<[](const Mapping& self) -> py::object {
        return decoded(sharr::Name(self.uri()).path());
      }>("_path"),
      B::attribute<[](const Mapping& self) -> py::object {
        return py::int_(self.array().info().offset);
      }>("_offset"),
      B::attribute<[](const Mapping& self) -> py::object {
        return numpy_dtype(self.array().info().dtype, self.uri());
      }>("_dtype"),
      B::attribute<&mode_text>("_mode"),
      B::attribute<[](const Mapping& self) -> py::object { return py::bool_(self.built()); }>(
          "_built"),
      B::attribute<[](const Mapping& self) -> py::object {
        const sharr::Identity& identity = self.array().identity();
        return py::make_tuple(identity.device, identity.inode, identity.birth,
                              layout(self.array().info()));
      }>("_identity"),
      {}};
  static PyMethodDef methods[] = {
      {"msync", c_function(msync), METH_VARARGS | METH_KEYWORDS, nullptr},
      B::method<[](const Mapping& self) {
        const Released release;
        self.array().mlock();
      }>("mlock"),
      B::method<[](const Mapping& self) {
        const Released release;
        self.array().munlock();
      }>("munlock"),
      {}};
  const auto buffer = [](PyObject* self, Py_buffer* view, int flags) {
    const sharr::Array& array = B::of(self).array();
    return PyBuffer_FillInfo(view, self, array.data(), static_cast<Py_ssize_t>(array.info().nbytes),
                             static_cast<int>(array.mode() == sharr::Mode::read), flags);
  };
  B::define(module, "Mapping", "The memory of an attached array: the base of its ndarrays.",
            attributes,
            {{Py_tp_methods, methods},
             {Py_bf_getbuffer, reinterpret_cast<void*>(static_cast<getbufferproc>(buffer))}});
}

void define_info(const py::module_& module) {
  using B = Box<InfoPtr>;
  static PyGetSetDef attributes[] = {
      B::attribute<[](const InfoPtr& self) -> py::object { return decoded(self->name); }>("name"),
      B::attribute<[](const InfoPtr& self) -> py::object {
        return numpy_dtype(self->dtype, self->name);
      }>("dtype"),
      B::attribute<[](const InfoPtr& self) -> py::object { return shape_tuple(self->shape); }>(
          "shape"),
      B::attribute<[](const InfoPtr& self) -> py::object {
        return py::str(std::string(1, static_cast<char>(self->order)));
      }>("order"),
      B::attribute<[](const InfoPtr& self) -> py::object { return py::int_(self->nbytes); }>(
          "nbytes"),
      B::attribute<[](const InfoPtr& self) -> py::object { return py::int_(self->offset); }>(
          "offset"),
      B::attribute<[](const InfoPtr& self) -> py::object { return py::str(self->format); }>(
          "format"),
      B::attribute<[](const InfoPtr& self) -> py::object { return py::int_(self->huge); }>("huge"),
      {}};
  const auto repr = [](PyObject* self) {
    return run([&]() -> py::object {
      const sharr::Info& info = *B::of(self);
      return py::str("Info(name={!r}, dtype={!r}, shape={!r}, order={!r}, nbytes={})")
          .format(decoded(info.name), decoded(info.dtype.str()), shape_tuple(info.shape),
                  std::string(1, static_cast<char>(info.order)), info.nbytes);
    });
  };
  B::define(module, "Info", "What an array is, read from its file at one moment.", attributes,
            {{Py_tp_repr, reinterpret_cast<void*>(static_cast<reprfunc>(repr))}});
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  look_up_numpy();
  m.doc() = "The compiled part of sharr; use the package.";

  // As io.UnsupportedOperation: an OSError for whoever looks at errno, a ValueError for the others.
  const py::tuple bases = py::make_tuple(py::handle(PyExc_OSError), py::handle(PyExc_ValueError));
  argument_error = PyErr_NewExceptionWithDoc("sharr.ArgumentError",
                                             "A name, shape or dtype that no array can have.",
                                             bases.ptr(), nullptr);
  format_error = PyErr_NewExceptionWithDoc(
      "sharr.FormatError", "What is under the name is no array, or not a whole one.", bases.ptr(),
      nullptr);
  if (argument_error == nullptr || format_error == nullptr) throw py::error_already_set();
  m.attr("ArgumentError") = py::handle(argument_error);
  m.attr("FormatError") = py::handle(format_error);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const sharr::Error&) {
      raise();
    }
  });

  define_mapping(m);
  define_info(m);
  define_array_desc(m);

  m.attr("MS_ASYNC") = MS_ASYNC;
  m.attr("MS_SYNC") = MS_SYNC;
  m.attr("MS_INVALIDATE") = MS_INVALIDATE;
  static PyMethodDef often[] = {positional<&create>("create"),
                                positional<&attach>("attach"),
                                positional<&remove_array>("remove"),
                                {}};
  if (PyModule_AddFunctions(m.ptr(), often) != 0) throw py::error_already_set();
  m.def("put", &put);
  m.def("available_processors", &sharr::available_processors);
  m.def("info", &info);
  m.def("list", &list);
  m.def("describe_all", &describe_all);
  m.def("open_array", &open_array);
  m.def("header_size", [](const py::bytes& head) { return sharr::header_size(head, ""); });
  m.def("parse_header",
        [](const py::bytes& head) { return info_object(sharr::parse_header(head, "")); });
  m.def("format_header", [](const py::object& info) {
    if (!Box<InfoPtr>::check(info.ptr())) throw py::type_error("not an Info");
    return py::bytes(sharr::format_header(*Box<InfoPtr>::of(info.ptr())));
  });
  m.def("mapping", [](const py::array& array) {
    PyObject* const mapping = mapping_of(array.ptr());
    return py::reinterpret_borrow<py::object>(mapping != nullptr ? mapping : Py_None);
  });
  m.def("plain", [](const py::object& result) { return plain(Py_NewRef(result.ptr())); });
  m.def("install", &install);
  m.def("load", &load);
  m.def("wait", &wait);
  m.def("check_new", [](const py::object& name, bool replace) {
    const sharr::Name parsed = name_of(name);
    const Released release;
    sharr::NewArray::check(parsed, replace);
  });
  m.def("attach_all", &attach_all);
  m.def("rename", [](const py::object& from, const py::object& to, bool replace) {
    const sharr::Name old_name = name_of(from);
    const sharr::Name new_name = name_of(to);
    const Released release;
    sharr::rename(old_name, new_name, replace);
  });
  m.def("remove_all", [](const py::object& where) {
    const sharr::Name parsed = name_of(where, true);
    const Released release;
    sharr::remove_all(parsed);
  });
  py::class_<NewArray>(m, "NewArray")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&,
                    bool>())
      .def("array", &NewArray::array)
      .def("publish", &NewArray::publish)
      .def("discard", &NewArray::discard);
  py::class_<sharr::NewNamespace>(m, "NewNamespace")
      .def(py::init(
          [](const py::object& where) { return sharr::NewNamespace(name_of(where, true)); }))
      .def("add", &add)
      .def("publish", &sharr::NewNamespace::publish, py::call_guard<Released>());
}
