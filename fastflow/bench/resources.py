"""``fastflow bench --resources``: what the compiler makes of every CUDA kernel; it needs no GPU."""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any, NamedTuple

from fastflow.bench import nvrtc
from fastflow.bench.table import align
from fastflow.ops.cuda import source
from fastflow.ops.cuda.instances import USUAL, Instance

__all__ = ["Resources", "measure", "resources", "text", "usual", "warnings"]

REGISTERS = 65536  # of a multiprocessor, on every GPU since 2012
# threads that a multiprocessor holds, where it is not 2048
THREADS = {75: 1024, 86: 1536, 87: 1536, 89: 1536, 120: 1536, 121: 1536}


class Resources(NamedTuple):
    """What one kernel takes; ``loads`` and ``stores`` of global memory as {bytes of an access: their number}."""

    registers: int
    shared: int
    stack: int
    spills: int
    loads: dict[int, int]
    stores: dict[int, int]

    def threads(self, block: int, arch: int) -> int:
        """Threads of a multiprocessor that the registers allow, in whole blocks."""
        block_registers = -(-self.registers // 8) * 8 * block  # granted to a warp in eights per thread
        return min(THREADS.get(arch, 2048), REGISTERS // block_registers * block) // block * block


def measure(family: str | None, arch: int) -> dict[str, Any]:
    """The resources of the usual instances of one family or all, as a result to keep."""
    rows = []
    for instance in usual(family):
        print(instance.name, file=sys.stderr, flush=True)
        found = resources(instance, nvrtc.compiled(source.text(instance), arch))
        threads = found.threads(instance.threads, arch)
        rows.append({"family": instance.file, "name": instance.name, "threads": threads, **found._asdict()})
    return {"arch": arch, "compiler": nvrtc.version(), "rows": rows}


def usual(family: str | None) -> list[Instance]:
    """The usual instances of a family; of all without one."""
    return [instance for instance in USUAL if family in (None, instance.file)]


def resources(instance: Instance, compiled: nvrtc.Compiled) -> Resources:
    """What the compiler says of one of the kernels it compiled."""
    _, _, said = compiled.log.partition(f"Compiling entry function '{instance.name}'")
    said = said.partition("Compiling entry function")[0]
    _, _, body = compiled.ptx.partition(f".entry {instance.name}(")
    body = body.partition(".entry ")[0]
    return Resources(
        registers=_bytes(said, r"Used (\d+) registers"),
        shared=_bytes(said, r"(\d+) bytes smem"),
        stack=_bytes(said, r"(\d+) bytes stack frame"),
        spills=_bytes(said, r"(\d+) bytes spill stores") + _bytes(said, r"(\d+) bytes spill loads"),
        loads=_accesses(body, "ld"),
        stores=_accesses(body, "st"),
    )


def warnings(log: str) -> str:
    """A log without what was asked for."""
    return "\n".join(line for line in log.splitlines() if line.strip() and not re.match(r"ptxas (info|\s*\.) ", line))


def _bytes(said: str, pattern: str) -> int:
    return sum(map(int, re.findall(pattern, said)))  # of the kernel, and of functions that were not inlined


def _accesses(ptx: str, what: str) -> dict[int, int]:
    """{16: 4} for four instructions such as ``ld.global.v4.f32``; one without a state space goes to any memory."""
    counts: Counter[int] = Counter()
    for words in re.findall(rf"^\s*(?:@!?%p\d+ )?{what}\.([\w.:]+)", ptx, re.MULTILINE):
        parts = words.split(".")
        if not {"param", "shared", "local", "const"} & {part.partition("::")[0] for part in parts}:
            (bits,) = re.findall(r"\.[busf](\d+)$", f".{words}")
            counts[int(bits) // 8 * int(next((p[1:] for p in parts if re.fullmatch(r"v\d", p)), 1))] += 1
    return dict(sorted(counts.items(), reverse=True))


def text(result: dict[str, Any]) -> str:
    """The table for a terminal."""
    numbers = ("registers", "threads", "shared", "stack", "spills")
    table = [["", *numbers, "loads", "stores"]]
    for row in result["rows"]:
        accesses = (" ".join(f"{n}×{size}" for size, n in row[what].items()) for what in ("loads", "stores"))
        table.append([row["name"].removeprefix("fastflow_"), *(str(row[name]) for name in numbers), *accesses])
    return (
        f"{align(table)}\n\n{result['compiler']}, sm_{result['arch']}. threads: as many of a multiprocessor as the "
        "registers allow; shared, stack and spills in bytes; loads and stores: instructions × bytes of each."
    )
