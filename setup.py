"""Builds saffron_kernels._native with CMake and ninja; everything else about the package is in pyproject.toml."""

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
        build = Path(self.build_temp).resolve()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            # An isolated build leaves a cache that names tools of an environment deleted since.
            *(program, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        target = ext.name.rpartition(".")[2]
        for command in (configure, [program, "--build", str(build), "--target", target]):
            if subprocess.run(command).returncode:
                raise CompileError(f"could not build {ext.name}; the compiler's messages stand above")


if __name__ == "__main__":
    setup(ext_modules=[Extension("saffron_kernels._native", sources=[])], cmdclass={"build_ext": CMakeBuild})
