// krrst_fast._native: functions for the workers of the input path, which do not import torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <system_error>

#include "cpu/views.h"
#include "tar_index.h"

namespace py = pybind11;

namespace {

using krrst::cpu::Draw;
using krrst::cpu::Images;

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void need(bool holds, const char* what) {
  if (!holds) throw py::value_error(std::string("gather_views: ") + what);
}

void gather_views(Array<uint8_t> images, Array<int64_t> index, Array<int64_t> offset,
                  Array<bool> flip, int64_t padding, const std::vector<double>& mean,
                  const std::vector<double>& std, Array<float> out) {
  need(images.ndim() == 4, "images must be [N, C, H, W]");
  const int64_t count = images.shape(0), channels = images.shape(1), height = images.shape(2),
                width = images.shape(3);
  const int64_t batch = index.size(), per_channel = height * width;
  need(index.ndim() == 1 && offset.ndim() == 2 && offset.shape(0) == batch &&
           offset.shape(1) == 2 && flip.ndim() == 1 && flip.size() == batch,
       "index, offset and flip must be [B], [B, 2] and [B]");
  need(static_cast<int64_t>(mean.size()) == channels && mean.size() == std.size(),
       "mean and std must have one number for each channel");
  for (const double scale : std) need(scale > 0, "std must be above zero");
  need(out.ndim() == 4 && out.shape(0) == batch && out.shape(1) == channels &&
           out.shape(2) == height && out.shape(3) == width,
       "out must be [B, C, H, W]");
  const Images source{images.data(), count, channels,
                      height,        width, {channels * per_channel, per_channel, width, 1}};
  const Draw draw{index.data(), offset.data(), flip.data(), batch, padding};
  float* target = out.mutable_data();
  py::gil_scoped_release without_gil;
  if (const char* reason = krrst::cpu::refuse_views(source, draw)) {
    py::gil_scoped_acquire with_gil;
    need(false, reason);
  }
  const std::vector<float> levels =
      krrst::cpu::normalised_levels(mean.data(), std.data(), channels);
  krrst::cpu::views(source, draw, levels.data(), 0, batch, target);
}

py::str any_bytes(const std::string& text) {
  auto* decoded = PyUnicode_DecodeUTF8(text.data(), text.size(), "surrogateescape");
  if (!decoded) throw py::error_already_set();
  return py::reinterpret_steal<py::str>(decoded);
}

py::list index_tar(const std::string& path) {
  std::vector<krrst::native::Member> members;
  {
    py::gil_scoped_release without_gil;
    members = krrst::native::index_tar(path);
  }
  py::list rows;
  for (const auto& member : members)
    rows.append(py::make_tuple(
        any_bytes(member.name), member.offset, member.size,
        py::reinterpret_steal<py::str>(PyUnicode_DecodeLatin1(&member.type, 1, nullptr)),
        any_bytes(member.target)));
  return rows;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["standard"] = static_cast<int64_t>(__cplusplus);
  info["pybind11"] = py::str("{}.{}").format(PYBIND11_VERSION_MAJOR, PYBIND11_VERSION_MINOR);
#if defined(__x86_64__)
  info["isa"] = "x86-64";
#elif defined(__aarch64__)
  info["isa"] = "aarch64";
#else
  info["isa"] = "other";
#endif
  info["version"] = KRRST_FAST_VERSION;
  return info;
}

void translate(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
  } catch (const krrst::native::DamagedTar& error) {
    py::set_error(PyExc_ValueError, error.what());
  }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Parts of krrst_fast that need no torch: the tar index and views in NumPy memory.";
  py::register_local_exception_translator(&translate);
  m.def("index_tar", &index_tar, py::arg("path"),
        "(name, offset, length, type, target) of each member of an uncompressed tar but folders: "
        "type 0 is a file, 1 a hard link to target, 2 a symbolic one; ValueError if it is "
        "damaged.");
  m.def("gather_views", &gather_views, py::arg("images").noconvert(), py::arg("index").noconvert(),
        py::arg("offset").noconvert(), py::arg("flip").noconvert(), py::kw_only(),
        py::arg("padding"), py::arg("mean"), py::arg("std"), py::arg("out").noconvert(),
        "krrst_fast.ops.views on NumPy arrays, into float32 `out`; runs without the GIL.");
  m.def("build_info", &build_info,
        "Compiler, C++ standard, instruction set and version of this build.");
}
