// Names: what the caller says, checked and turned into a path.
#include <linux/limits.h>

#include <cerrno>
#include <filesystem>
#include <system_error>

#include "sharr/store.hpp"
#include "system.hpp"

namespace sharr {
namespace {

using detail::shm_directory;

constexpr std::string_view shm_scheme = "shm://";
constexpr std::string_view file_scheme = "file://";

std::string_view last_component(std::string_view path) {
  return path.substr(path.rfind('/') + 1);  // npos + 1 is 0
}

// The path below /dev/shm, without its slashes at either end.
std::string_view shm_path(std::string_view given, std::string_view rest, bool directory) {
  if (rest.starts_with('/')) rest.remove_prefix(1);
  if (directory && rest.ends_with('/')) rest.remove_suffix(1);
  if (rest.empty()) {
    if (directory) return rest;
    throw ArgumentError(given, "the name is empty");
  }
  for (std::string_view left = rest;;) {
    const std::size_t slash = left.find('/');
    const std::string_view component = left.substr(0, slash);
    if (component.empty()) throw ArgumentError(given, "the name has an empty component");
    if (component.size() > NAME_MAX) throw Error(ENAMETOOLONG, given);
    if (component == "." || component == "..") {
      throw ArgumentError(given,
                          "the name has a component '.' or '..'; paths begin with / or file://");
    }
    // A namespace too: list() passes over whatever has such a name.
    if (reserved(component)) {
      throw ArgumentError(given, "the name is reserved for temporary files");
    }
    if (slash == std::string_view::npos) break;
    left.remove_prefix(slash + 1);
  }
  return rest;
}

std::string checked_path(std::string_view given, std::string_view path) {
  if (path.empty()) throw Error(ENOENT, given, "the path is empty");
  if (path.find('\0') != std::string_view::npos) {
    throw ArgumentError(given, "the path has a NUL byte");
  }
  if (reserved(last_component(path))) {
    throw ArgumentError(given, "the name is reserved for temporary files");
  }
  return std::string(path);
}

}  // namespace

Name::Name(std::string_view name) : Name(parse(name, false)) {}

Name Name::directory(std::string_view name) { return parse(name, true); }

Name Name::parse(std::string_view name, bool directory) {
  if (name.starts_with(file_scheme) || name.starts_with('/')) {
    const std::size_t skip = name.starts_with('/') ? 0 : file_scheme.size();
    std::string path = checked_path(name, name.substr(skip));
    while (directory && path.size() > 1 && path.ends_with('/')) path.pop_back();
    return {name, std::move(path), false};
  }
  std::string_view rest = name;
  if (name.starts_with(shm_scheme)) {
    rest.remove_prefix(shm_scheme.size());
  } else {
    if (name.find("://") != std::string_view::npos) {
      throw ArgumentError(name, "unknown scheme: names begin with shm:// or file://");
    }
    if (name.starts_with("shm:/") || name.starts_with("file:/")) {
      throw ArgumentError(name, "the scheme is spelled shm:// or file://");
    }
    if (name.empty()) throw ArgumentError(name, "the name is empty");
  }
  if (name.find('\0') != std::string_view::npos) {
    throw ArgumentError(name, "the name has a NUL byte");
  }
  const std::string_view below = shm_path(name, rest, directory);
  std::string path(shm_directory);
  if (!below.empty()) path.append("/").append(below);
  return {name, std::move(path), true};
}

Name Name::from_path(std::string_view path) { return {path, checked_path(path, path), false}; }

Name Name::absolute() const {
  if (path_.starts_with('/')) return *this;
  std::error_code error;
  const std::filesystem::path directory = std::filesystem::current_path(error);
  if (error) throw Error(error.value(), given_);
  return {given_, directory.string() + "/" + path_, shm_};
}

std::string Name::uri() const {
  if (!shm_) return std::string(file_scheme) + path_;
  std::string uri(shm_scheme);
  if (path_.size() > shm_directory.size()) uri.append(path_, shm_directory.size() + 1);
  return uri;
}

}  // namespace sharr
