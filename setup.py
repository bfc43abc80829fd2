"""Build the extension:  pip install -e . --no-build-isolation

The extension is built against the torch that is importable here; the stable ABI makes the result
load in every torch from 2.10 on.

KRRST_FAST_BUILD  auto (default) | 0 pure Python | 1 an error when a module cannot be built
KRRST_FAST_CUDA   auto (default) where nvcc and torch's CUDA agree | 0 | 1 an error when they do not
TORCH_CUDA_ARCH_LIST  as for every torch extension; without it 8.0, 9.0 and PTX for what comes after
KRRST_FAST_SANITIZE  e.g. address,undefined: build with these sanitizers
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob

from setuptools import Extension, setup

BUILD = os.environ.get("KRRST_FAST_BUILD", "auto")
CUDA = os.environ.get("KRRST_FAST_CUDA", "auto")
SANITIZE = os.environ.get("KRRST_FAST_SANITIZE", "")
TORCH_MIN, TORCH_ABI = (2, 10), "0x020a000000000000"
# No -march=native (one binary serves every machine; csrc/cpu picks at run time), no -ffast-math (it
# sets flush-to-zero for the whole process), no -fopenmp (torch owns the threads).
CXX_FLAGS = ["-O3", "-std=c++17", "-Wall", "-fno-math-errno", "-fvisibility=hidden"]


def give_up(reason: str, switch: str = BUILD, without: str = "pure Python") -> None:
    """Fail, or go on without the extension, as the switch says."""
    if switch == "1":
        raise SystemExit(f"krrst_fast setup: error: {reason}")
    print(f"krrst_fast setup: warning: {without}: {reason}", file=sys.stderr, flush=True)


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


def cuda_refusal(torch, cpp_extension) -> str | None:
    """Why the CUDA module cannot be built here; no GPU is needed."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "no nvcc; set CUDA_HOME"
    nvcc = os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc")
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvcc does not run: {error}"
    release = re.search(r"release ([\d.]+)", told.stdout)
    if release is None or release[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {release and release[1]}, torch was built for {torch.version.cuda}"
    return None


def cuda_module(cpp_extension):
    """krrst_fast._C_cuda: the operators of csrc/cuda on torch's stable ABI."""
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return cpp_extension.CUDAExtension(
        "krrst_fast._C_cuda",
        sorted([*glob("csrc/cuda/*.cpp"), *glob("csrc/cuda/*.cu")]),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_ABI}", "-DUSE_CUDA"],
            "nvcc": ["-O3", "-std=c++17", "-lineinfo"],
        },
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
                of_cuda = ext.name.endswith("_cuda")
                choice = (CUDA, "no CUDA operators") if of_cuda else (BUILD, "pure Python")
                give_up(f"{ext.name} does not compile: {error}", *choice)
                ext.optional = True  # so that nobody looks for the file it did not become

    return Build


def extensions():
    """Return the modules that this machine can build, and their build command."""
    if BUILD == "0":
        return [], {}
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        give_up("no C++ compiler")
        return [], {}
    # Found by torch otherwise where `which nvcc` is, which may be a script that calls it.
    if "CUDA_HOME" not in os.environ and os.path.exists("/usr/local/cuda/bin/nvcc"):
        os.environ["CUDA_HOME"] = "/usr/local/cuda"
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
    if CUDA == "1" or (CUDA == "auto" and torch.version.cuda is not None):
        refusal = cuda_refusal(torch, cpp_extension)
        if refusal is None:
            modules.append(cuda_module(cpp_extension))
        else:
            give_up(refusal, CUDA, "no CUDA operators")
    return modules, {"build_ext": build_command(cpp_extension)}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
