"""Checkpoints: a folder with `checkpoint.json` and the safetensors file that it names.

The tensors are written first, under a name that holds their hash; replacing `checkpoint.json` is
the commit. A crash at any moment leaves the previous pair, and nothing is ever unpickled.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError, need

FORMAT = 1

_INDEX = "checkpoint.json"
_KEYS = ("format", "tensors", "sha256", "step", "model", "data", "config", "optimizer")


def has_checkpoint(directory: str | Path) -> bool:
    """Whether `directory` holds a committed checkpoint."""
    return (Path(directory) / _INDEX).is_file()


def save_checkpoint(directory: str | Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Replaces the checkpoint in `directory` by `meta` (JSON values) and `tensors`, atomically."""
    encode = need("safetensors.torch", "safetensors").save
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # a copy each: safetensors refuses tensors that share memory, as tied weights do
    blob = encode({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
    digest = hashlib.sha256(blob).hexdigest()
    file = f"{meta['step']:08d}-{digest[:12]}.safetensors"
    write_file(directory / file, blob)
    index = {"format": FORMAT, "tensors": file, "sha256": digest, **meta}
    write_file(directory / _INDEX, json.dumps(index, indent=1, allow_nan=False).encode())
    for path in directory.iterdir():  # what this checkpoint replaced, and drafts of crashed writes
        if path.suffix in (".safetensors", ".draft") and path.name != file:
            path.unlink(missing_ok=True)


def load_checkpoint(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The (meta, tensors) last saved in `directory`.

    Raises `FileNotFoundError` or `UserError` naming the file that is missing or damaged.
    """
    decode = need("safetensors.torch", "safetensors").load
    path = Path(directory) / _INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{directory}: expected a checkpoint, found no {_INDEX}")
    try:
        meta = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise UserError(f"{path}: expected a checkpoint of format {FORMAT}, got {found!r}")
    missing = [key for key in _KEYS if key not in meta]
    if missing:
        raise UserError(f"{path}: expected the key {missing[0]!r}, got {', '.join(meta)}")
    file = path.parent / Path(str(meta["tensors"])).name
    if not file.is_file():
        raise FileNotFoundError(f"{file}: named by {_INDEX}, but missing")
    blob = file.read_bytes()
    if hashlib.sha256(blob).hexdigest() != meta["sha256"]:
        raise UserError(f"{file}: damaged: its hash is not the one in {_INDEX}")
    return meta, decode(blob)


def write_file(path: Path, blob: bytes) -> None:
    """Writes `path` so that a crash leaves the old file or the new one, on disk, never a part."""
    draft = path.with_name(path.name + ".draft")
    with open(draft, "wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    if os.name == "posix":  # the rename itself lives in the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def module_tensors(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The module's state as `{prefix/name: tensor}`."""
    return {f"{prefix}/{name}": value for name, value in module.state_dict().items()}


def load_module(module: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
    """Loads what `module_tensors` gave; raises `UserError` naming what does not fit."""
    want, have = module.state_dict(), _under(tensors, prefix)
    if lacking := want.keys() - have.keys():
        raise UserError(f"the checkpoint lacks the tensor {prefix}/{min(lacking)}")
    if unknown := have.keys() - want.keys():
        raise UserError(f"the checkpoint has an unknown tensor {prefix}/{min(unknown)}")
    for name, value in have.items():
        if value.shape != want[name].shape or value.dtype != want[name].dtype:
            raise UserError(
                f"{prefix}/{name}: expected {want[name].dtype} {list(want[name].shape)}, "
                f"the checkpoint has {value.dtype} {list(value.shape)}"
            )
    module.load_state_dict(have)


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The optimiser's (scalars, tensors), named after the parameters of `module`."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    scalars: dict[str, Any] = {"groups": [], "state": {}}
    tensors = {}
    for group in optimizer.param_groups:
        scalars["groups"].append({**group, "params": [names[p] for p in group["params"]]})
        for parameter in group["params"]:
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{names[parameter]}/{key}"] = value
                else:
                    scalars["state"].setdefault(names[parameter], {})[key] = value
    return scalars, tensors


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    scalars: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Loads what `optimizer_state` gave."""
    parameters = dict(module.named_parameters())
    numbers = {name: number for number, name in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for name, entries in scalars["state"].items():
        state.setdefault(numbers[name], {}).update(entries)
    for path, value in _under(tensors, "optimizer").items():
        name, _, key = path.rpartition("/")
        state.setdefault(numbers[name], {})[key] = _like(parameters[name], value)
    groups = [{**settings, "params": [numbers[name] for name in settings["params"]]} for settings in scalars["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment in the memory layout of its parameter: other strides may round differently."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {name[len(start) :]: t for name, t in tensors.items() if name.startswith(start)}
