// Work in pieces, by several threads.
#include "memory.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace sharr::detail {
namespace {

TEST(InPieces, CoverAllOnce) {
  for (const std::uint64_t size : {0, 1, 9, 10, 11, 1000}) {
    std::vector<std::atomic<int>> seen(size);
    int calls = 0;
    const auto task = [&](std::uint64_t from, std::uint64_t length) {
      EXPECT_LE(length, 10U);
      for (std::uint64_t i = from; i < from + length; ++i) ++seen[i];
      return 0;
    };
    EXPECT_EQ(in_pieces(size, 10, task, [&] { ++calls; }), 0);
    for (const std::atomic<int>& count : seen) EXPECT_EQ(count, 1);
    EXPECT_LE(calls, 100);
  }
}

TEST(InPieces, AnErrorEndsTheWork) {
  std::atomic<int> calls = 0;
  const auto task = [&](std::uint64_t from, std::uint64_t) {
    ++calls;
    return from == 30 ? ENOSPC : 0;
  };
  EXPECT_EQ(in_pieces(std::uint64_t{1} << 40, 10, task, {}), ENOSPC);
  EXPECT_LT(calls, 1 << 20);
}

TEST(InPieces, WhatTheSignalHandlerThrowsEndsTheWork) {
  std::atomic<int> running = 0;
  const auto task = [&](std::uint64_t, std::uint64_t) {
    ++running;
    --running;
    return 0;
  };
  const auto enough = [] { throw std::runtime_error("enough"); };
  EXPECT_THROW(in_pieces(std::uint64_t{1} << 40, 10, task, enough), std::runtime_error);
  EXPECT_EQ(running, 0);  // all threads have ended
}

TEST(Populate, SaysWhatAFaultWouldHave) {
  void* const none = mmap(nullptr, 8192, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(none, MAP_FAILED);
  EXPECT_NE(populate(static_cast<std::byte*>(none), 8192), 0);
  ASSERT_EQ(mprotect(none, 8192, PROT_READ | PROT_WRITE), 0);
  EXPECT_EQ(populate(static_cast<std::byte*>(none), 8192), 0);
  munmap(none, 8192);
}

}  // namespace
}  // namespace sharr::detail
