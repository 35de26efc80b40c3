"""Builds the CPU kernels with ninja, once for every instruction set; without a compiler the install still succeeds.

The sources of the CUDA kernels become part of the package, for the GPU's compiler at run time. With
FASTFLOW_CUDA_ARCHS="80;90" nvcc also compiles the usual ones for these GPUs, which saves that wait.

Nothing here imports torch: the C++ knows nothing of it.
"""

import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

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


class BuildPackage(build_py):
    """The package, and in it the CUDA sources as csrc/; in a checkout they are found beside it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "fastflow", "csrc")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for path in [*(HERE / "csrc").glob("*.h"), *(HERE / "csrc" / "cuda").glob("*.cu*")]:
            copy = target / path.relative_to(HERE / "csrc")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


class BuildKernels(build_ext):
    """One ninja file for all libraries, so that they share the cores; another for all CUDA binaries."""

    def run(self) -> None:
        self.run_cpu()
        if archs := os.environ.get("FASTFLOW_CUDA_ARCHS"):
            self.run_cuda(archs.split(";"))

    def run_cuda(self, archs: list[str]) -> None:
        if self.inplace:
            return say("FASTFLOW_CUDA_ARCHS is for wheels: the CUDA sources of a checkout may change at any time")
        nvcc = find_nvcc()
        if nvcc is None:
            return say("FASTFLOW_CUDA_ARCHS is set but nvcc was not found; CUDA kernels are compiled when first used")
        try:
            self.compile_cuda(nvcc, archs)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            say(f"nvcc failed ({error}); CUDA kernels are compiled when first used")

    def compile_cuda(self, nvcc: str, archs: list[str]) -> None:
        build = Path(self.build_temp).resolve() / "cuda"
        build.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_lib).resolve() / "fastflow" / "csrc" / "cuda"
        codes = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
        lines = [
            "rule compile",
            f"  command = {nvcc} -fatbin -std=c++17 -ftz=true {codes} -MD -MF $out.d $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        usual = runpy.run_path(str(HERE / "fastflow" / "ops" / "cuda" / "instances.py"))["USUAL"]
        for file in dict.fromkeys(instance.file for instance in usual):
            source = build / f"{file}.cu"
            entries = "\n".join(instance.entry for instance in usual if instance.file == file)
            include = HERE.resolve() / "csrc" / "cuda" / f"{file}.cu"
            source.write_text(f'#include "{include}"\nnamespace fastflow {{\n{entries}\n}}\n')
            lines.append(f"build {ninja_path(folder / file)}.fatbin: compile {ninja_path(source)}")
        run_ninja(build, lines)

    def run_cpu(self) -> None:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None or not shutil.which(compiler.split()[0]):
            return self.give_up("no C++ compiler was found")
        try:
            self.compile(compiler)
        except (OSError, ImportError, subprocess.CalledProcessError) as error:
            self.give_up(f"the CPU kernels did not compile ({error})")

    def give_up(self, reason: str) -> None:
        say(f"{reason}; everything will run on the reference backend")
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        self.extensions = []

    def compile(self, compiler: str) -> None:
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
        run_ninja(build, lines)


def find_nvcc() -> str | None:
    """CUDACXX, else that of CUDA_HOME, else the one on the path."""
    home = os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "nvcc")
    nvcc = os.environ.get("CUDACXX") or shutil.which(home) or "nvcc"
    return nvcc if shutil.which(nvcc.split()[0]) else None


def say(line: str) -> None:
    print(f"fastflow: {line}", file=sys.stderr, flush=True)


def run_ninja(build: Path, lines: list[str]) -> None:
    import ninja

    (build / "build.ninja").write_text("\n".join(lines) + "\n")
    program = os.path.join(ninja.BIN_DIR, "ninja")
    subprocess.run([program, "-C", str(build), "-j", str(jobs()), "--quiet"], check=True)


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension(f"fastflow._cpu_{name}", SOURCES) for name in instruction_sets()],
    cmdclass={"build_py": BuildPackage, "build_ext": BuildKernels},
)
