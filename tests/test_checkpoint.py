"""Checkpoints: round trips, crashes, damage."""

import json
import os

import pytest
import torch
from standins import Tiny

from fastflow.train import checkpoint
from fastflow.train.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def contents(step):
    meta = {"step": step, "model": {}, "data": {}, "config": {}, "optimizer": {}}
    return meta, {"a": torch.full((3,), float(step)), "b": torch.arange(4)}


def test_checkpoint_round_trip(tmp_path):
    shared = torch.randn(4, 4)
    meta, tensors = contents(1)
    save_checkpoint(tmp_path, meta, {**tensors, "s": shared, "t": shared.T, "e": shared[:0]})
    found, loaded = load_checkpoint(tmp_path)
    assert found["step"] == 1 and loaded["e"].shape == (0, 4)
    assert torch.equal(loaded["t"], shared.T) and loaded["b"].dtype == torch.int64


@pytest.mark.parametrize("call", range(6))
def test_a_crash_leaves_the_previous_checkpoint(tmp_path, monkeypatch, call):
    """Saving fsyncs a file, renames it, fsyncs the folder; twice. Die at each of the six."""
    save_checkpoint(tmp_path, *contents(1))
    calls = []

    def die(real):
        def step(*args):
            if len(calls) == call:
                raise SystemExit("crash")
            calls.append(real)
            return real(*args)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die(os.fsync))
        patch.setattr(os, "replace", die(os.replace))
        with pytest.raises(SystemExit):
            save_checkpoint(tmp_path, *contents(2))
    meta, tensors = load_checkpoint(tmp_path)
    assert meta["step"] == (2 if call == 5 else 1)  # renaming the index is the commit
    assert torch.equal(tensors["a"], torch.full((3,), float(meta["step"])))
    save_checkpoint(tmp_path, *contents(3))
    assert load_checkpoint(tmp_path)[0]["step"] == 3
    assert len(list(tmp_path.iterdir())) == 2  # nothing of the crash is left


def test_damaged_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint.json"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, *contents(1))
    index = tmp_path / "checkpoint.json"
    meta = json.loads(index.read_text())
    tensors = tmp_path / meta["tensors"]
    blob = tensors.read_bytes()
    tensors.write_bytes(blob[:-1])
    with pytest.raises(ValueError, match=f"{tensors.name}: damaged"):
        load_checkpoint(tmp_path)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=tensors.name):
        load_checkpoint(tmp_path)
    for text, message in (
        ("{", "expected JSON"),
        ("[]", "got 'list'"),
        (json.dumps({**meta, "format": 99}), "format 1, got 99"),
        (json.dumps({k: v for k, v in meta.items() if k != "config"}), "the key 'config'"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path)


def test_wrong_tensors_are_named(digits):
    model = Tiny(digits.shape)
    tensors = checkpoint.module_tensors(model, "model")
    for change, message in (
        (lambda t: t.pop("model/shift"), "lacks the tensor model/shift"),
        (lambda t: t.update({"model/extra": torch.zeros(1)}), "unknown tensor model/extra"),
        (lambda t: t.update({"model/shift": torch.zeros(1)}), r"model/shift: expected .*\[64\]"),
    ):
        broken = dict(tensors)
        change(broken)
        with pytest.raises(ValueError, match=message):
            checkpoint.load_module(model, broken, "model")
