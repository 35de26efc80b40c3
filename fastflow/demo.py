"""``make demo``: trains a small Glow on digits, draws it, and measures the kernels. ``python -m fastflow.demo OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

from fastflow.__main__ import main as fastflow

__all__ = ["main"]

HISTOGRAM = 2.421  # bits/dim that a histogram per pixel reaches on these digits: what the model has to beat


def main(out: str) -> int:
    """Writes checkpoint, metrics, samples.png and curve.png to the folder ``out``; 0 if the model has learned."""
    if code := fastflow(["train", "glow", "--data", "digits", "--out", out]):
        return code
    if not _learned(Path(out)):
        return 1
    print("\nfastflow against plain PyTorch (eager) and torch.compile on this machine, a short measurement:\n")
    from fastflow.bench import cli, table

    result = cli.measure(demo=True)
    if result is None:
        return 1
    print(table.text(result))
    return 0


def _learned(out: Path) -> bool:
    """Is the model better than a histogram per pixel on digits it has not seen?"""
    from fastflow.train.metrics import read_metrics

    bits = [record["held_out"] for record in read_metrics(out / "metrics.jsonl") if "held_out" in record][-1]
    if bits >= HISTOGRAM:
        print(f"demo: {bits:.3f} bits/dim held out, not below the histogram's {HISTOGRAM}", file=sys.stderr)
    return bits < HISTOGRAM


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
