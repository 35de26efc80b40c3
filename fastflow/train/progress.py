"""The progress bar: tqdm on a terminal, plain lines elsewhere, nothing where it is not shown."""


class Progress:
    """Counts steps; shows the rate, the time left and the latest loss where it can."""

    def __init__(self, total: int, done: int, show: bool, unit: str = "bits/dim") -> None:
        self._show, self._bar, self._unit = show, None, unit
        if show:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            # disable=None: no bar where the output is not a terminal
            self._bar = tqdm(total=total, initial=done, unit="step", disable=None, leave=False)

    def advance(self, steps: int, loss: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"{loss:.3f} {self._unit}", refresh=False)
            self._bar.update(steps)

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line)
        elif self._show:
            print(line, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
