// Where the files in a tar are: ustar, with GNU and pax names, no compression.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace krrst::native {

struct Member {
  std::string name;
  int64_t offset, size;
};

struct DamagedTar : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The regular files of the archive, in their order.
// Throws std::system_error when the file cannot be read, DamagedTar when it is not a whole tar.
std::vector<Member> scan_tar(const std::string& path);

}  // namespace krrst::native
