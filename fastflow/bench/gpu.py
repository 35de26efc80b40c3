"""``make gpu``: the kernels verified and measured on a machine with a GPU, within eight minutes.

Three parts: ``verify`` is the table of cases, ``glow`` a model end to end, ``bench`` the figures as JSON. Each runs in
processes of its own, because a kernel that crashes takes every CUDA call of its process with it; and each ends at its
time, says what it left out, and keeps what it has.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastflow.bench.device import BROKEN
from fastflow.ops import _backend
from fastflow.testing.cli import FAMILIES, NAMES, able

__all__ = ["PARTS", "bench", "glow", "main", "verify"]

SECONDS = 470  # for all together; a part that is run alone has all of it
PARTS = {"verify": 130, "glow": 50, "bench": 290}  # seconds
PLAIN = {"OMP_NUM_THREADS": "2"}  # the work is on the GPU; many processes of many threads would slow one another


def verify(
    device: str, out: Path, seconds: float, families: Sequence[str] = FAMILIES, dtypes: Sequence[str] = tuple(NAMES)
) -> bool:
    """The table of cases: a process for every backend, dtype and family in this order, several at a time."""
    end = time.monotonic() + seconds
    reasons = _backend.reasons((torch.zeros(1, device=device),))
    for name, reason in reasons.items():
        print(f"backend {name}: {'can run' if reason is None else reason}")
    names = [name for name in able(device) if name != "reference"] or ["reference"]
    waiting = [(name, dtype, family) for name in names for dtype in dtypes for family in families]
    running: dict[tuple[str, str, str], tuple[subprocess.Popen, Path]] = {}
    good, unfinished = True, []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < _at_once(device) and time.monotonic() < end:
                job = waiting.pop(0)
                name, dtype, family = job
                command = ["-m", "fastflow", "verify", family, "--backend", name, "--dtype", dtype, "--device", device]
                log = Path(folder, "-".join(job))
                running[job] = _start(command, log), log
            if time.monotonic() > end:
                unfinished, waiting = [*running, *waiting], []
            for job, (process, log) in list(running.items()):
                if process.poll() is None and job in unfinished:
                    process.kill()
                    process.wait()
                elif process.poll() is None:
                    continue
                del running[job]
                good &= _report(" ".join(job), process.returncode, log.read_text(), job in unfinished, out)
            time.sleep(0.05)
    if unfinished:
        print(f"verify: out of time; NOT verified: {', '.join(map(' '.join, unfinished))}")
    return good


def _at_once(device: str) -> int:
    return 1 if device == "cpu" else max(1, min(8, (os.cpu_count() or 2) // 2))


def _start(command: Sequence[str], log: Path) -> subprocess.Popen:
    with log.open("w") as file:
        environment = {**os.environ, **{k: os.environ.get(k, v) for k, v in PLAIN.items()}}
        return subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment)


def _report(job: str, code: int, text: str, unfinished: bool, out: Path) -> bool:
    """Prints how a job ended, of many failures the first; the rest goes to a file."""
    lines = text.splitlines()
    failures = [line for line in lines if line.startswith("FAILED")]
    if code == 0 or unfinished and not failures:
        print(f"{job}: {'not done' if unfinished else lines[-1]}", flush=True)
        return True
    print(f"{job}: {lines[-1] if code == 1 else f'exit status {code}'}", flush=True)
    for line in failures[:4] or lines[-4:]:
        print(f"  {line[:400]}")
    log = out / "gpu-verify.log"
    with log.open("a") as file:
        file.write(f"--- {job}\n{text}\n")
    print(f"  all {len(failures)} failures: {log}", flush=True)
    return False


def glow(device: str, out: Path, seconds: float) -> bool:
    """A model end to end."""
    command = [sys.executable, "-m", "fastflow.testing.end_to_end", "--device", device]
    try:
        return subprocess.run(command, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"glow: FAILED: not done within {seconds:.0f} s", flush=True)
        return False


def bench(device: str, out: Path, seconds: float, only: str = "") -> bool:
    """The figures; a process that lost its GPU is started again on what it has not measured yet."""
    from fastflow.bench import cli, table

    end, code = time.monotonic() + seconds, 0
    path = out / f"{name(device)}.json"
    path.unlink(missing_ok=True)
    while (left := end - time.monotonic()) > 1:
        command = [sys.executable, "-m", "fastflow.bench.device", str(path), "--device", device, "--only", only]
        try:
            # its rows end by themselves, 10 s before they would be ended
            code = subprocess.run([*command, "--seconds", f"{left - 10:.0f}"], timeout=left).returncode
        except subprocess.TimeoutExpired:
            print("bench: ended in the middle of a row, which took longer than it says", flush=True)
            break
        if code != BROKEN and code >= 0 or not path.is_file():  # below 0: by a signal
            break
    if not path.is_file():
        print(f"bench: no figures, exit status {code}")
        return False
    result = cli.read(path)
    print(f"\n{table.text(result)}\n{path}", flush=True)
    return not result["failed"]


def name(device: str) -> str:
    """What the result of this GPU is called: gpu-nvidia-h200."""
    of = "cpu-test" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device)
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", of.lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a result is wrong; a missed target is none."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--device", default="cuda", help="cpu only tests this program, on tiny tensors")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "benchmarks/results"))
    arguments = parser.parse_args(argv)
    parts = arguments.part or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"expected {', '.join(PARTS)}, got {', '.join(unknown)}")
    if torch.device(arguments.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.device == "cpu":
        print("on the CPU: a test of this program, which says nothing about a GPU")
    verdicts = {}
    for part in parts:
        left = SECONDS - (time.monotonic() - start)
        seconds = left if part == parts[-1] else min(left, PARTS[part])
        print(f"\n--- {part}: at most {seconds:.0f} s", flush=True)
        verdicts[part] = {"verify": verify, "glow": glow, "bench": bench}[part](
            arguments.device, arguments.out, seconds
        )
    print("\n" + ", ".join(f"{part}: {'ok' if good else 'FAILED'}" for part, good in verdicts.items()))
    return 0 if all(verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
