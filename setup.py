"""Packages, and the C++ row kernels built by CMake. Everything else is in pyproject.toml.

The C++ library is optional: without a compiler or cmake the install succeeds, says so here (`pip -v`), and
opsd_kernels says once at run time that it uses torch row kernels.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "_rows.so"  # loaded with ctypes: no Python ABI in the name


class BuildRows(build_ext):
    """Configure and build CMakeLists.txt, and put its library into the package."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        target.unlink(missing_ok=True)  # never ship the library of an earlier build
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        try:
            shutil.rmtree(build, ignore_errors=True)
            subprocess.run(["cmake", "-S", str(ROOT), "-B", str(build), *generator], check=True)
            subprocess.run(["cmake", "--build", str(build), "--config", "Release"], check=True)
            built = next(build.rglob(LIBRARY))
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            print(
                f"opsd-trainer: the C++ row kernels were not built ({error}); "
                "fused_token_kl will use torch row kernels, with the same results, more slowly. "
                "To get them, install a C++17 compiler and cmake and install again.",
                file=sys.stderr,
            )
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(
    packages=[*find_packages(include=["opsd", "opsd.*"]), "opsd_kernels"],
    # kernels/ is a source root, never a package: transformers imports a package of that name when there is one
    package_dir={"opsd_kernels": "kernels/opsd_kernels"},
    package_data={"opsd": ["**/*.yaml", "page/page.*", "py.typed"], "opsd_kernels": ["py.typed"]},
    # optional: a missing library is skipped, not an error
    ext_modules=[Extension("opsd_kernels._rows", sources=[], optional=True)],
    cmdclass={"build_ext": BuildRows},
)
