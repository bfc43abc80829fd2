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
  // As in the header, with '0' for all regular files: '1' is a hard link, '2' a symbolic one.
  char type;
  // Of a link, as it is written.
  std::string target;
};

struct DamagedTar : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// All members of the archive but its folders, in their order.
// Throws std::system_error when the file cannot be read, DamagedTar when it is not a whole tar.
std::vector<Member> index_tar(const std::string& path);

}  // namespace krrst::native
