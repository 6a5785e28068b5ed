// The library for Python: names, dtypes and errors translated, the GIL released around system
// calls. Everything with a docstring for users is in __init__.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <climits>
#include <optional>
#include <sharr/store.hpp>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace py = pybind11;
using namespace py::literals;

namespace {

PyObject* argument_error = nullptr;
PyObject* format_error = nullptr;

py::str decoded(const std::string& text) {
  PyObject* const str =
      PyUnicode_DecodeFSDefaultAndSize(text.data(), static_cast<Py_ssize_t>(text.size()));
  if (str == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(str);
}

// A name as sharr takes it: str by the library's rules, os.PathLike as a path.
sharr::Name name_of(const py::object& object, bool directory = false) {
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

// The dtype that NumPy makes of a descr. The common ones are kept: making one costs microseconds.
py::dtype numpy_dtype(const sharr::Dtype& dtype) {
  static auto& cache = *new std::unordered_map<std::string, py::dtype>;  // outlives the interpreter
  if (dtype.structured()) {
    // The library has read the text as a list of fields and nothing else.
    const py::object fields =
        py::module_::import("ast").attr("literal_eval")(decoded(dtype.descr()));
    return py::dtype::from_args(
        py::module_::import("numpy.lib.format").attr("descr_to_dtype")(fields));
  }
  if (const auto found = cache.find(dtype.descr()); found != cache.end()) return found->second;
  py::dtype made(dtype.descr());
  if (cache.size() < 256) cache.emplace(dtype.descr(), made);
  return made;
}

// The other way; TypeError for what an NPY file cannot give back.
sharr::Dtype library_dtype(const py::dtype& dtype) {
  const bool structured = !dtype.attr("names").is_none();
  try {
    std::string descr;
    if (structured) {
      descr = py::repr(py::module_::import("numpy.lib.format").attr("dtype_to_descr")(dtype))
                  .cast<std::string>();
    } else {
      descr = dtype.attr("str").cast<std::string>();
    }
    sharr::Dtype result(descr);
    if (numpy_dtype(result).equal(dtype)) return result;
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

// What keeps an array's memory: the base of the ndarrays on it. It deliberately has no buffer
// interface: without one NumPy does not let a read-only array be made writeable again.
class Mapping {
 public:
  Mapping(sharr::Array array, py::str name) : array_(std::move(array)), name_(std::move(name)) {}
  Mapping(Mapping&&) = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  Mapping& operator=(Mapping&&) = delete;
  ~Mapping() {
    // Taking down a large mapping takes long.
    if (array_ && array_->info().nbytes >= (std::uint64_t{64} << 20)) {
      const py::gil_scoped_release release;
      array_.reset();
    }
  }

  const sharr::Array& array() const { return *array_; }
  const py::str& name() const { return name_; }

 private:
  std::optional<sharr::Array> array_;
  py::str name_;  // as the caller gave it
};

// upstream: None, or for the drop-in the name as its user gave it; structured elements are
// V<itemsize> there.
py::array ndarray(sharr::Array array, const sharr::Name& name, const py::object& upstream) {
  const sharr::Info& info = array.info();
  py::dtype dtype = !upstream.is_none() && info.dtype.structured()
                        ? py::dtype("V" + std::to_string(info.dtype.itemsize()))
                        : numpy_dtype(info.dtype);
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
  const py::object base = py::cast(
      Mapping(std::move(array), upstream.is_none() ? decoded(name.given()) : py::str(upstream)));
  py::array result(std::move(dtype), shape, strides, data, base);
  if (!writeable) {
    py::detail::array_proxy(result.ptr())->flags &= ~py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  }
  return result;
}

py::array create(const py::object& name, const py::object& shape, const py::object& dtype,
                 const py::object& order, bool reserve, bool exist_ok, const py::object& upstream) {
  const sharr::Name parsed = name_of(name);
  sharr::Shape extents = shape_of(shape);
  py::dtype type = py::dtype::from_args(dtype);
  if (type.itemsize() == 0 || !type.attr("subdtype").is_none()) {
    // What numpy.zeros makes of these: S1 of S, and a sub-array's shape is the array's.
    const py::array probe =
        py::module_::import("numpy").attr("empty")(py::make_tuple(0), type).cast<py::array>();
    type = probe.dtype();
    extents.insert(extents.end(), probe.shape() + 1, probe.shape() + probe.ndim());
  }
  static const auto max_ndim =
      py::getattr(py::module_::import("numpy"), "MAXDIMS", py::int_(64)).cast<std::size_t>();
  if (extents.size() > max_ndim) {
    // Found out too late, the array would be there and nobody could have it.
    throw py::value_error("NumPy has at most " + std::to_string(max_ndim) + " dimensions, not " +
                          std::to_string(extents.size()));
  }
  const sharr::Dtype stored = library_dtype(type);
  sharr::CreateOptions options;
  options.order = order_of(order);
  options.reserve = reserve;
  options.exist_ok = exist_ok;
  options.on_signal = [] {
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
  auto made = [&] {
    const py::gil_scoped_release release;
    return sharr::create(parsed, extents, stored, options);
  }();
  return ndarray(std::move(made), parsed, upstream);
}

py::array attach(const py::object& name, const py::object& mode, const py::object& upstream) {
  const sharr::Name parsed = name_of(name);
  const sharr::Mode how = mode_of(mode);
  auto array = [&] {
    const py::gil_scoped_release release;
    return sharr::attach(parsed, how);
  }();
  return ndarray(std::move(array), parsed, upstream);
}

void remove_array(const py::object& name) {
  const sharr::Name parsed = name_of(name);
  const py::gil_scoped_release release;
  sharr::remove(parsed);
}

sharr::Info info(const py::object& name) {
  const sharr::Name parsed = name_of(name);
  const py::gil_scoped_release release;
  return sharr::info(parsed);
}

std::vector<sharr::Info> list(const py::object& where) {
  const sharr::Name parsed = name_of(where, true);
  const py::gil_scoped_release release;
  return sharr::list(parsed);
}

// The mapping that an array or a view of it stands on; none for memory that is not ours.
const Mapping* mapping_of(const py::array& array) {
  for (py::object base = array.base(); base; base = py::getattr(base, "base", py::object())) {
    if (py::isinstance<Mapping>(base)) return base.cast<const Mapping*>();
  }
  return nullptr;
}

// As the "i" of CPython's own argument parsing: pybind11 calls an overflow a TypeError.
int int_of(const py::object& object) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) throw py::error_already_set();
  const long value = PyLong_AsLong(index.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (value < INT_MIN || value > INT_MAX) {
    PyErr_SetString(PyExc_OverflowError, "flags do not fit a C int");
    throw py::error_already_set();
  }
  return static_cast<int>(value);
}

void set_error(PyObject* type, const sharr::Error& error) {
  // OSError picks the subclass of its errno.
  const py::tuple arguments =
      py::make_tuple(error.errnum(), error.message(), decoded(error.name()));
  PyErr_SetObject(type, arguments.ptr());
}

}  // namespace

PYBIND11_MODULE(_core, m) {
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
    } catch (const sharr::ArgumentError& error) {
      set_error(argument_error, error);
    } catch (const sharr::FormatError& error) {
      set_error(format_error, error);
    } catch (const sharr::Error& error) {
      set_error(PyExc_OSError, error);
    }
  });

  py::class_<Mapping>(m, "Mapping", "The memory of an attached array: the base of its ndarrays.")
      .def_property_readonly("name", &Mapping::name)
      .def_property_readonly(
          "addr",
          [](const Mapping& self) { return reinterpret_cast<std::uintptr_t>(self.array().data()); })
      .def_property_readonly("size", [](const Mapping& self) { return self.array().info().nbytes; })
      .def(
          "msync",
          [](const Mapping& self, const py::object& flags) {
            const int value = int_of(flags);
            const py::gil_scoped_release release;
            self.array().msync(value);
          },
          "flags"_a)
      .def(
          "mlock", [](const Mapping& self) { self.array().mlock(); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "munlock", [](const Mapping& self) { self.array().munlock(); },
          py::call_guard<py::gil_scoped_release>());

  py::class_<sharr::Info>(m, "Info", "What an array is, read from its file at one moment.")
      .def_property_readonly("name", [](const sharr::Info& self) { return decoded(self.name); })
      .def_property_readonly("dtype",
                             [](const sharr::Info& self) { return numpy_dtype(self.dtype); })
      .def_property_readonly(
          "shape", [](const sharr::Info& self) { return py::tuple(py::cast(self.shape)); })
      .def_property_readonly(
          "order",
          [](const sharr::Info& self) { return std::string(1, static_cast<char>(self.order)); })
      .def_readonly("nbytes", &sharr::Info::nbytes)
      .def_readonly("offset", &sharr::Info::offset)
      .def_readonly("format", &sharr::Info::format)
      .def("__repr__", [](const sharr::Info& self) {
        return py::str("Info(name={!r}, dtype={!r}, shape={!r}, order={!r}, nbytes={})")
            .format(decoded(self.name), py::str(py::handle(numpy_dtype(self.dtype))),
                    py::tuple(py::cast(self.shape)), std::string(1, static_cast<char>(self.order)),
                    self.nbytes);
      });

  m.attr("MS_ASYNC") = MS_ASYNC;
  m.attr("MS_SYNC") = MS_SYNC;
  m.attr("MS_INVALIDATE") = MS_INVALIDATE;
  m.def("create", &create, "name"_a, "shape"_a, "dtype"_a, "order"_a, "reserve"_a, "exist_ok"_a,
        "upstream"_a = py::none());
  m.def("attach", &attach, "name"_a, "mode"_a, "upstream"_a = py::none());
  m.def("remove", &remove_array);
  m.def("info", &info);
  m.def("list", &list);
  m.def("mapping", [](const py::array& array) { return py::cast(mapping_of(array)); });
}
