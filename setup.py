"""Build the extension:  pip install -e . --no-build-isolation

The extension is built against the torch that is importable here; the stable ABI makes the result
load in every torch from 2.10 on.

KRRST_FAST_BUILD  auto (default) | 0 pure Python | 1 an error when a module cannot be built
KRRST_FAST_SANITIZE  e.g. address,undefined: build with these sanitizers
"""

import os
import re
import shutil
import sys
from glob import glob

from setuptools import Extension, setup

BUILD = os.environ.get("KRRST_FAST_BUILD", "auto")
SANITIZE = os.environ.get("KRRST_FAST_SANITIZE", "")
TORCH_MIN, TORCH_ABI = (2, 10), "0x020a000000000000"
# No -march=native (one binary serves every machine; csrc/cpu picks at run time), no -ffast-math (it
# sets flush-to-zero for the whole process), no -fopenmp (torch owns the threads).
CXX_FLAGS = ["-O3", "-std=c++17", "-Wall", "-fno-math-errno", "-fvisibility=hidden"]


def give_up(reason: str) -> None:
    """Fail, or go on without the extension, as KRRST_FAST_BUILD says."""
    if BUILD == "1":
        raise SystemExit(f"krrst_fast setup: error: {reason}")
    print(f"krrst_fast setup: warning: pure Python: {reason}", file=sys.stderr, flush=True)


def sanitizer_flags() -> list[str]:
    if not SANITIZE:
        return []
    return [
        f"-fsanitize={SANITIZE}",
        # What follows from these the address sanitizer sees, and they double the compiler's time.
        "-fno-sanitize=null,object-size,pointer-overflow,vptr",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        "-g1",
        "-O1",
    ]


def version() -> str:
    with open("pyproject.toml", encoding="utf-8") as file:
        return re.search(r'^version = "(.+)"', file.read(), re.MULTILINE)[1]


def torch_module(cpp_extension):
    """krrst_fast._C: the operators of csrc/cpu on torch's stable ABI."""
    return cpp_extension.CppExtension(
        "krrst_fast._C",
        sorted(glob("csrc/cpu/*.cpp")),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_ABI}", *sanitizer_flags()]
        },
        extra_link_args=sanitizer_flags(),
        py_limited_api=True,
    )


def native_module():
    """krrst_fast._native: what data workers use without importing torch."""
    import pybind11

    return Extension(
        "krrst_fast._native",
        [*sorted(glob("csrc/native/*.cpp")), "csrc/cpu/views.cpp"],
        include_dirs=[os.path.abspath("csrc"), pybind11.get_include()],
        define_macros=[("KRRST_FAST_VERSION", f'"{version()}"')],
        extra_compile_args=[*CXX_FLAGS, *sanitizer_flags()],
        extra_link_args=sanitizer_flags(),
        language="c++",
    )


def build_command(cpp_extension):
    """Torch's build command; a module that does not compile is left out unless it was demanded."""

    class Build(cpp_extension.BuildExtension):
        def build_extension(self, ext):
            try:
                super().build_extension(ext)
            except Exception as error:
                give_up(f"{ext.name} does not compile: {error}")
                ext.optional = True  # so that nobody looks for the file it did not become

    return Build


def extensions():
    """The modules this machine can build, and the build command they need."""
    if BUILD == "0":
        return [], {}
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        give_up("no C++ compiler")
        return [], {}
    try:
        import pybind11  # noqa: F401
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        give_up(f"{error}; install torch and pybind11, then pip install --no-build-isolation")
        return [], {}
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < TORCH_MIN:
        give_up(f"torch {torch.__version__} is older than 2.10")
        return [], {}
    modules = [torch_module(cpp_extension), native_module()]
    return modules, {"build_ext": build_command(cpp_extension)}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
