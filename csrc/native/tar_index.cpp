#include "tar_index.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string_view>
#include <system_error>

namespace krrst::native {
namespace {

constexpr int64_t kBlock = 512;
// Longer names and pax records mean a damaged archive.
constexpr int64_t kMaxText = 1 << 20;

using Header = std::array<char, kBlock>;

class File {
 public:
  explicit File(const std::string& path)
      : path_(path), file_(std::fopen(path.c_str(), "rb"), &std::fclose) {
    if (!file_) fail();
    if (fseeko(file_.get(), 0, SEEK_END) != 0) fail();
    size_ = ftello(file_.get());
  }

  int64_t size() const { return size_; }

  void read(int64_t offset, char* data, int64_t count) {
    if (fseeko(file_.get(), offset, SEEK_SET) != 0) fail();
    if (std::fread(data, 1, count, file_.get()) != static_cast<size_t>(count)) fail();
  }

 private:
  [[noreturn]] void fail() const {
    throw std::system_error(errno ? errno : EIO, std::generic_category(), path_);
  }

  std::string path_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
  int64_t size_ = 0;
};

[[noreturn]] void damaged(const std::string& what, int64_t offset) {
  throw DamagedTar("damaged tar: " + what + " at byte " + std::to_string(offset));
}

// A text field ends at its first zero byte, or fills its place.
std::string text(const char* field, size_t length) {
  return std::string(field, strnlen(field, length));
}

// Octal digits between blanks, or, with the top bit set, a big-endian number (GNU).
bool number(const char* field, size_t length, int64_t* value) {
  *value = 0;
  if (static_cast<unsigned char>(field[0]) == 0x80) {
    for (size_t i = 1; i < length; ++i) {
      if (*value > (std::numeric_limits<int64_t>::max() >> 8)) return false;
      *value = (*value << 8) | static_cast<unsigned char>(field[i]);
    }
    return true;
  }
  const std::string digits = text(field, length);
  const size_t first = digits.find_first_not_of(' '), last = digits.find_last_not_of(' ');
  if (first == std::string::npos) return true;
  const char* end = digits.data() + last + 1;
  const auto parsed = std::from_chars(digits.data() + first, end, *value, 8);
  return parsed.ec == std::errc() && parsed.ptr == end && *value >= 0;
}

// The sum of the header's bytes with blanks for the sum itself; old writers added signed bytes.
bool checksum_holds(const Header& header) {
  int64_t stored, plain = 8 * ' ', as_signed = 8 * ' ';
  if (!number(&header[148], 8, &stored)) return false;
  for (int64_t i = 0; i < kBlock; ++i) {
    if (i >= 148 && i < 156) continue;
    plain += static_cast<unsigned char>(header[i]);
    as_signed += static_cast<signed char>(header[i]);
  }
  return stored == plain || stored == as_signed;
}

std::string header_name(const Header& header) {
  const std::string name = text(&header[0], 100);
  const bool posix = std::memcmp(&header[257], "ustar\0", 6) == 0;
  const std::string prefix = posix ? text(&header[345], 155) : "";
  return prefix.empty() ? name : prefix + "/" + name;
}

// Values of extended headers, which hold for the next member.
struct Extended {
  std::string name, target;
  int64_t size = -1;
};

// pax records: "LENGTH KEY=VALUE\n", where LENGTH counts the whole record.
void read_pax(std::string_view records, int64_t offset, Extended* next) {
  while (!records.empty() && records.front() != '\0') {
    size_t length = 0;
    const auto parsed = std::from_chars(records.data(), records.data() + records.size(), length);
    const size_t start = parsed.ptr - records.data() + 1;
    if (parsed.ec != std::errc() || length <= start || length > records.size() ||
        records[start - 1] != ' ' || records[length - 1] != '\n')
      damaged("pax record", offset);
    const std::string_view record = records.substr(start, length - 1 - start);
    const size_t equals = record.find('=');
    if (equals == std::string_view::npos) damaged("pax record", offset);
    const std::string_view key = record.substr(0, equals), value = record.substr(equals + 1);
    if (key == "path") next->name = value;
    if (key == "linkpath") next->target = value;
    if (key == "size") {
      const auto size = std::from_chars(value.data(), value.data() + value.size(), next->size);
      if (size.ec != std::errc() || size.ptr != value.data() + value.size() || next->size < 0)
        damaged("pax size", offset);
    }
    if (key.substr(0, 11) == "GNU.sparse.") throw DamagedTar("sparse members are not read");
    records.remove_prefix(length);
  }
}

bool is_zero(const Header& header) {
  return std::all_of(header.begin(), header.end(), [](char byte) { return byte == 0; });
}

// Links, devices and folders have no data, whatever size their header gives.
bool has_data(char type) { return type == '\0' || std::strchr("123456", type) == nullptr; }

// Writers before POSIX mark a folder by the end of its name alone.
bool is_folder(char type, const std::string& name) {
  return type == '5' || (type == '\0' && !name.empty() && name.back() == '/');
}

}  // namespace

std::vector<Member> index_tar(const std::string& path) {
  File file(path);
  std::vector<Member> members;
  Extended next;
  Header header;
  int64_t offset = 0;
  if (file.size() == 0) damaged("empty file", 0);
  while (offset < file.size()) {
    if (file.size() - offset < kBlock) damaged("header cut short", offset);
    file.read(offset, header.data(), kBlock);
    if (is_zero(header)) return members;
    if (!checksum_holds(header)) damaged(offset == 0 ? "no tar header" : "header checksum", offset);
    const char type = header[156];
    int64_t size;
    if (!number(&header[124], 12, &size)) damaged("member size", offset);
    const bool extends = type == 'L' || type == 'K' || type == 'x' || type == 'g';
    if (!extends && next.size >= 0) size = next.size;
    if (!has_data(type)) size = 0;
    const int64_t data = offset + kBlock, room = file.size() - data;
    if (size > room || (size + kBlock - 1) / kBlock * kBlock > room)
      damaged("member cut short", offset);
    if (type == 'S') throw DamagedTar("sparse members are not read");
    if (extends && size > kMaxText) damaged("extended header of impossible length", offset);
    if (type == 'L' || type == 'K' || type == 'x') {
      std::string content(size, '\0');
      file.read(data, content.data(), size);
      if (type == 'L') next.name = content.c_str();
      if (type == 'K') next.target = content.c_str();
      if (type == 'x') read_pax(content, offset, &next);
    } else if (!extends) {
      const std::string name = next.name.empty() ? header_name(header) : next.name;
      const bool is_link = type == '1' || type == '2';
      const std::string target = !is_link              ? ""
                                 : next.target.empty() ? text(&header[157], 100)
                                                       : next.target;
      const char kind = type == '\0' || type == '7' ? '0' : type;
      if (!is_folder(type, name))
        members.push_back({name, data, kind == '0' ? size : 0, kind, target});
      next = Extended{};
    }
    offset = data + (size + kBlock - 1) / kBlock * kBlock;
  }
  return members;
}

}  // namespace krrst::native
