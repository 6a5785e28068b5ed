// Two ends of a shared array. Run it with "produce", then in another process with "consume".
#include <cstdio>
#include <numeric>
#include <sharr/store.hpp>
#include <string_view>

int main(int argc, char** argv) try {
  if (argc == 2 && std::string_view(argv[1]) == "produce") {
    const sharr::Array a = sharr::create("shm://example", {3, 4}, sharr::Dtype::of<double>());
    std::iota(a.as<double>().begin(), a.as<double>().end(), 0.0);
  } else {
    const sharr::Array a = sharr::attach("shm://example", sharr::Mode::read);
    for (const double x : a.as<const double>()) std::printf("%g ", x);
    std::puts("");
    sharr::remove("shm://example");
  }
} catch (const sharr::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
