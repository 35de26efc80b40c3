"""What the documents say: the examples run, the commands exist."""

import doctest
import re
import shlex
from pathlib import Path

import pytest

from fastflow.__main__ import parser
from fastflow.bench.table import BEGIN, END, GPU_BEGIN, GPU_END

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PARENTS = (".", "fastflow", "csrc", "fastflow/ops", "fastflow/train")

pytestmark = pytest.mark.skipif(not README.is_file(), reason="needs the checkout")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.M | re.S)


@pytest.mark.parametrize("code", blocks("python") if README.is_file() else [])
def test_example(code):
    test = doctest.DocTestParser().get_doctest(code, {}, "README", str(README), 0)
    assert test.examples, code
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


def test_commands():
    """Every ``fastflow`` and ``make`` line can be parsed."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    seen = 0
    for line in "".join(blocks("sh")).splitlines():
        program, *words = shlex.split(line, comments=True) or [""]
        if program == "fastflow":
            parser(words[0]).parse_args(words)
        elif program == "make":
            assert {word for word in words if "=" not in word} <= targets, line
        seen += program in ("fastflow", "make")
    assert seen >= 6


def test_markers():
    text = README.read_text()
    assert all(text.count(marker) == 1 for marker in (BEGIN, END, GPU_BEGIN, GPU_END))


def test_map():
    """The folders that CONTRIBUTING draws are there."""
    house = re.search(r"^```\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)[1]
    for folder in re.findall(r"^\s*([a-z0-9_]+)/ ", house, re.M):
        assert any((ROOT / parent / folder).is_dir() for parent in PARENTS), folder
