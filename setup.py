"""Builds saffron_kernels._native, and _cuda where nvcc is found, with CMake and ninja; the rest is in pyproject.toml.

Environment: `SAFFRON_CUDA=auto|on|off` (auto: where nvcc is found, and without it if the build fails), and
`SAFFRON_CUDA_ARCHS`, e.g. `80;90a`: what machine code is made for, besides PTX that every GPU from 8.0 on can load
(default: the GPUs of this machine; without one, PTX alone).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")


def find_compiler() -> str:
    """Path of the C++ compiler: the one CXX names, else the first of COMPILERS on PATH.

    Raises:
        CompileError: there is none.
    """
    chosen = os.environ.get("CXX", "").strip()
    for name in [shlex.split(chosen)[0]] if chosen else COMPILERS:
        if found := shutil.which(name):
            return found
    missing = f"CXX={chosen}, which is not on PATH" if chosen else f"none of {', '.join(COMPILERS)} on PATH"
    raise CompileError(
        f"saffron-kernels needs a C++17 compiler, but found {missing}: install one "
        "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"
    )


def find_nvcc() -> str | None:
    """Path of the CUDA compiler that CMake will take; None if there is none."""
    for variable, name in (("CUDACXX", ""), ("CUDA_HOME", "bin/nvcc"), ("CUDA_PATH", "bin/nvcc")):
        if (place := os.environ.get(variable)) and (found := shutil.which(str(Path(place, name)))):
            return found
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def extensions() -> list[Extension]:
    """What is built here.

    Raises:
        CompileError: CUDA is asked for and nvcc is missing, or SAFFRON_CUDA has another value.
    """
    native = Extension("saffron_kernels._native", sources=[])
    wanted = os.environ.get("SAFFRON_CUDA", "auto")
    if wanted not in ("auto", "on", "off"):
        raise CompileError(f"SAFFRON_CUDA: got {wanted!r}, expected auto, on or off")
    if wanted == "on" and find_nvcc() is None:
        raise CompileError(
            "SAFFRON_CUDA is on, but nvcc was not found: install the CUDA toolkit, or name it in CUDACXX"
        )
    if wanted == "off" or find_nvcc() is None:
        return [native]
    return [native, Extension("saffron_kernels._cuda", sources=[], optional=wanted == "auto")]


class CMakeBuild(build_ext):
    """Builds each extension as the CMake target named like the last part of its module name."""

    def run(self) -> None:
        find_compiler()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # Build requirements: imported here so that metadata and source distributions do without them.
        import cmake
        import ninja
        import pybind11

        program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        target = ext.name.rpartition(".")[2]
        build = Path(self.build_temp).resolve() / target
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            # An isolated build leaves a cache that names tools of an environment deleted since.
            *(program, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSAFFRON_CUDA={'on' if target == '_cuda' else 'off'}",
            f"-DSAFFRON_CUDA_ARCHS={os.environ.get('SAFFRON_CUDA_ARCHS', '')}",
            *([f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"] if target == "_cuda" else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for command in (configure, [program, "--build", str(build), "--target", target]):
            if subprocess.run(command).returncode:
                raise CompileError(f"could not build {ext.name}; the compiler's messages stand above")


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
