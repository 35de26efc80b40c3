"""Sdist and wheel, built in isolation, work where the checkout was never seen, with and without a compiler."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CHECKOUT = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the checkout")
CUDA = {f"fastflow/{p.relative_to(ROOT)}" for p in (*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.cu*"))}
LEFT_OUT = (".*", "*.so", "*.egg-info", "__pycache__", "build", "dist", "demo", "results")


def run(*command, cwd, **environment):
    """A command that must succeed, with neither the checkout nor this process's packages on its path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | environment
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def build(what, source, out, **environment):
    """Builds in an isolated environment: nothing in it but what [build-system] requires, so no torch."""
    done = run(sys.executable, "-m", "build", what, "--outdir", out, source, cwd=out, **environment)
    (path,) = Path(out).glob("*.tar.gz" if what == "--sdist" else "*.whl")
    return path, done


def install(package, folder):
    """A fresh environment with ``package``; its python.

    torch is lent by a .pth file from the environment of this test, behind the new one's own packages, because a copy
    is large. What ``package`` says it needs is checked against its metadata instead.
    """
    run(sys.executable, "-m", "venv", folder, cwd="/")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    (own,) = folder.rglob("site-packages")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", package, cwd=folder)
    (own / "lent.pth").write_text(str(Path(torch.__file__).parent.parent))
    return python


def check(python, folder, library):
    """Imports, commands and a family of checks, away from the checkout."""
    where = run(python, "-c", "import fastflow; print(fastflow.__file__)", cwd=folder).stdout.strip()
    assert Path(where).is_relative_to(python.parent.parent)
    info = run(python, "-m", "fastflow", "info", cwd=folder).stdout
    assert re.search(rf"backend cpu .*{library}", info), info
    verify = run(python, "-m", "fastflow", "verify", "coupling", "--dtype", "float32", cwd=folder).stdout
    assert verify.endswith(" 0 failed\n"), verify
    return verify


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A clean copy of the checkout."""
    folder = tmp_path_factory.mktemp("source") / "fastflow"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return folder


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    return build("--sdist", source, tmp_path_factory.mktemp("sdist"))[0]


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the unpacked sdist, as pip does it."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return build("--wheel", unpacked, folder)[0]


@CHECKOUT
@pytest.mark.slow
def test_sdist(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "fastflow/py.typed",
        "csrc/cpu/module.cpp",
        "csrc/cuda/sums.cu",
    } <= names
    assert not any(name.endswith((".so", ".o")) for name in names)


@CHECKOUT
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and "CXX" not in os.environ, reason="no C++ compiler")
def test_wheel(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("dist-info/METADATA"))).decode()
    libraries = {re.match(r"fastflow/_cpu_(\w+)\.", n)[1] for n in names if n.startswith("fastflow/_cpu_")}
    assert libraries == ({"baseline", "avx2", "avx512"} if os.uname().machine == "x86_64" else {"baseline"})
    assert {"fastflow/py.typed", *CUDA} <= set(names)
    assert not any(name.startswith(("tests/", "benchmarks/", "csrc/")) or name.endswith(".fatbin") for name in names)
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.10"]
    python = install(wheel, tmp_path / "env")
    assert "on cpu, reference" in check(python, tmp_path, "(avx512|avx2|baseline)")
    found = run(python, "-c", "from fastflow.ops.cuda import source; print(source.folder())", cwd=tmp_path).stdout
    assert Path(found.strip()).is_relative_to(tmp_path / "env")


def said(done):
    """The lines of a build that are ours."""
    lines = (done.stdout + done.stderr).splitlines()
    return [line.removeprefix("fastflow: ") for line in lines if line.startswith("fastflow: ")]


@pytest.fixture
def unpacked(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    return next((tmp_path / "unpacked").iterdir())


NO_CXX = "no C++ compiler was found; everything will run on the reference backend"


@CHECKOUT
@pytest.mark.slow
def test_no_compiler(unpacked, tmp_path):
    """The install succeeds, says so in a line, and everything runs on the reference."""
    settings = {"CXX": "/nonexistent/c++", "CUDACXX": "/nonexistent/nvcc", "FASTFLOW_CUDA_ARCHS": "90"}
    path, done = build("--wheel", unpacked, tmp_path, **settings)
    no_nvcc = "FASTFLOW_CUDA_ARCHS is set but nvcc was not found; CUDA kernels are compiled when first used"
    assert said(done) == [NO_CXX, no_nvcc]
    python = install(path, tmp_path / "env")
    assert "on reference" in check(python, tmp_path, "no compiled library")


@CHECKOUT
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("arch", ["90", "nonsense"])
def test_compiled_ahead(unpacked, tmp_path, arch):
    """The binaries are in the wheel; without them, where nvcc fails, it is the wheel of everybody."""
    with (unpacked / "fastflow" / "ops" / "cuda" / "instances.py").open("a") as instances:
        instances.write("\nUSUAL = USUAL[:1] + USUAL[-1:]  # the others would take minutes\n")
    path, done = build("--wheel", unpacked, tmp_path, CXX="/nonexistent/c++", FASTFLOW_CUDA_ARCHS=arch)
    with zipfile.ZipFile(path) as archive:
        binaries = {name: archive.read(name) for name in archive.namelist() if name.endswith(".fatbin")}
        assert CUDA <= set(archive.namelist())
    if arch == "nonsense":
        assert len(said(done)) == 2 and said(done)[1].startswith("nvcc failed") and binaries == {}
        return
    assert said(done) == [NO_CXX]
    assert set(binaries) == {"fastflow/csrc/cuda/coupling.fatbin", "fastflow/csrc/cuda/sums.fatbin"}
    assert all(int.from_bytes(binary[:4], "little") == 0xBA55ED50 for binary in binaries.values())
    python = install(path, tmp_path / "env")
    find = "from fastflow.ops.cuda import source; print(source.binary('coupling'), source.binary('gaussian'))"
    found = run(python, "-c", find, cwd=tmp_path).stdout.split()
    assert Path(found[0]).is_relative_to(tmp_path / "env") and found[1] == "None"


IMPORTED = """
import sys, torch
before = set(sys.modules)
import fastflow
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""


def test_import_needs_torch_alone():
    done = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"fastflow", "torch"}


@CHECKOUT
def test_setup_does_not_import_torch():
    nodes = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    nodes = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    assert "os" in names and not any(name.startswith("torch") for name in names)


@CHECKOUT
def test_versions_are_pinned():
    """Every package of the extra ``test`` has its version in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0].lower() for line in lines if not line.startswith("#")}
    metadata = (ROOT / "pyproject.toml").read_text()
    for extra in ("nvrtc", "bench", "train", "peers", "test"):
        listed = re.search(rf"^{extra} = \[(.*?)\]\n", metadata, re.M | re.S)[1]
        for name in re.findall(r'"([\w-]+)[^"\[]*"', listed):
            assert name.lower() in pinned, name
