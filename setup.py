"""Builds the CPU kernels with ninja, once for every instruction set; without a compiler the install still succeeds.

Nothing here imports torch: the C++ knows nothing of it.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
SOURCES = sorted(path.relative_to(HERE).as_posix() for path in (HERE / "csrc" / "cpu").glob("*.cpp"))

# contraction only where the target has the instruction; NaN and infinity keep their meaning
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast"
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"


def instruction_sets() -> dict[str, str]:
    """The libraries this machine's compiler can build: name -> flags."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return {"baseline": "", "avx2": AVX2, "avx512": AVX512}
    return {"baseline": ""}


def jobs() -> int:
    """As many as there are cores, but no more than the free memory carries: a file takes up to a gigabyte."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, free // 2**30))


class BuildKernels(build_ext):
    """One ninja file for all libraries, so that they share the cores."""

    def run(self) -> None:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None or not shutil.which(compiler.split()[0]):
            return self.give_up("no C++ compiler was found")
        try:
            self.compile(compiler)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            self.give_up(f"the CPU kernels did not compile ({error})")

    def give_up(self, reason: str) -> None:
        print(f"fastflow: {reason}; everything will run on the reference backend", file=sys.stderr, flush=True)
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        self.extensions = []

    def compile(self, compiler: str) -> None:
        import ninja
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), *{sysconfig.get_path("include"), sysconfig.get_path("platinclude")}]
        shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
        extra = os.environ.get("FASTFLOW_CXXFLAGS", "")  # sanitizers
        lines = [
            f"cxx = {compiler}",
            f"flags = {FLAGS} {extra} " + " ".join(f'"-I{path}"' for path in includes),
            "rule compile",
            "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx {shared} {extra} $in -o $out -ldl",
        ]
        targets = []
        for extension in self.extensions:
            name = extension.name.rpartition("_cpu_")[2]
            objects = []
            for source in SOURCES:
                target = ninja_path(build / name / (Path(source).stem + ".o"))
                lines += [
                    f"build {target}: compile {ninja_path(HERE.resolve() / source)}",
                    f"  isa = {instruction_sets()[name]} -DFASTFLOW_MODULE=_cpu_{name}",
                ]
                objects.append(target)
            library = Path(self.get_ext_fullpath(extension.name)).resolve()
            library.parent.mkdir(parents=True, exist_ok=True)
            lines.append(f"build {ninja_path(library)}: link {' '.join(objects)}")
            targets.append(ninja_path(library))
        lines.append(f"default {' '.join(targets)}\n")
        (build / "build.ninja").write_text("\n".join(lines))
        program = os.path.join(ninja.BIN_DIR, "ninja")
        subprocess.run([program, "-C", str(build), "-j", str(jobs()), "--quiet"], check=True)


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension(f"fastflow._cpu_{name}", SOURCES) for name in instruction_sets()],
    cmdclass={"build_ext": BuildKernels},
)
