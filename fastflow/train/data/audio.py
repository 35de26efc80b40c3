"""Audio as mu-law codes."""

import io
import math
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastflow.errors import UserError, need
from fastflow.models.wavenet import mu_law_encode

from ..checkpoint import write_file
from .dataset import Dataset, whole
from .npz import read_npz

LEVELS = 256


@dataclass(frozen=True)
class Audio(Dataset):
    """Pieces of recordings: the parts are uint8 [N, T], mu-law codes; a model sees them as int64; bits/sample."""

    rate: int

    kind = "audio"
    levels = LEVELS

    @property
    def unit(self) -> str:
        return "bits/sample"

    def inputs(self, stored: Tensor, index: Tensor, key: int) -> Tensor:
        return stored.long()

    def cost(self, log_prob: Tensor) -> Tensor:
        return -log_prob / (self.shape[0] * math.log(2))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"levels": LEVELS, "rate": self.rate}

    def baseline(self) -> tuple[float, str]:
        return bigram_bits(self.train, self.final), "order-1 bigram of codes"


def bigram_bits(train: Tensor, held_out: Tensor) -> float:
    """Bits a sample of a table p(code | code before it), fitted on `train` [N, T] with one count added everywhere."""
    counts = torch.ones(LEVELS, LEVELS, dtype=torch.float64)
    pairs = LEVELS * train[:, :-1].long() + train[:, 1:].long()
    counts += torch.bincount(pairs.flatten(), minlength=LEVELS**2).view(LEVELS, LEVELS)
    log_p = (counts / counts.sum(1, keepdim=True)).log2()
    return -log_p[held_out[:, :-1].long(), held_out[:, 1:].long()].mean().item()


def load_audio(name: str, root: Path, *, length: int = 4000, rate: int | None = None, test_takes: int = 5) -> Audio:
    """Clips one after another, cut into pieces of `length` samples.

    `root` is a folder of WAV files (mono or more channels, which are averaged; all of one rate; every tenth file of
    the sorted list is held out), or an npz file: `audio` (int16, or float in [-1, 1]) of all clips, `offsets` [n + 1]
    where they begin and end, and which are held out: `test` (bool [n]) or `take` (integers [n], held out below
    `test_takes`); `rate` is 8000 for it where nothing is given.

    Raises `UserError` for damaged files, samples out of range and clips of fewer than `length` samples altogether.
    """
    whole(2, length=length)
    whole(0, test_takes=test_takes)
    if rate is not None:
        whole(1, rate=rate)
    if root.is_dir():
        clips, held, found = _wav_folder(root)
        if rate not in (None, found):
            raise UserError(f"{root}: expected {rate} samples a second, got {found}")
    else:
        clips, held = _npz_clips(root, test_takes)
        found = rate or 8000
    pieces = {}
    for part, wanted in (("train", False), ("held_out", True)):
        codes = [mu_law_encode(c).to(torch.uint8) for c, h in zip(clips, held, strict=True) if h == wanted]
        stream = torch.cat(codes or [torch.empty(0)])
        if len(stream) < length:
            raise UserError(f"{root}: expected at least length={length} samples in {part}, got {len(stream)}")
        pieces[part] = stream[: len(stream) // length * length].view(-1, length)
    return Audio(name, pieces["train"], pieces["held_out"], found)


def _npz_clips(path: Path, test_takes: int) -> tuple[list[Tensor], list[bool]]:
    np = need("numpy", "NumPy")
    arrays = read_npz(path)
    if missing := [key for key in ("audio", "offsets") if key not in arrays]:
        raise UserError(f"{path}: expected the arrays 'audio' and 'offsets', got no {missing[0]!r}")
    audio, offsets = arrays["audio"], arrays["offsets"]
    if audio.ndim != 1 or not (audio.dtype == np.int16 or audio.dtype.kind == "f"):
        raise UserError(
            f"{path}: expected 'audio' to be int16 or float [samples], got {audio.dtype} {list(audio.shape)}"
        )
    rising = (
        offsets.ndim == 1
        and offsets.dtype.kind in "iu"
        and len(offsets) > 1
        and (np.diff(offsets.astype("int64")) >= 0).all()
    )
    if not rising or offsets[0] < 0 or offsets[-1] > len(audio):
        raise UserError(f"{path}: expected 'offsets' to be integers that rise from 0 to at most {len(audio)}")
    if audio.dtype == np.int16:
        wave_form = torch.from_numpy(audio.astype("float32") / 32768)
    else:
        wave_form = torch.from_numpy(audio.astype("float32"))
        if not bool((wave_form.abs() <= 1).all()):  # NaN is not
            raise UserError(
                f"{path}: expected 'audio' within [-1, 1], got values up to {wave_form.abs().max().item():g}"
            )
    n = len(offsets) - 1
    if "test" in arrays:
        held = arrays["test"].astype(bool)
    elif "take" in arrays:
        if arrays["take"].dtype.kind not in "iu":
            raise UserError(f"{path}: expected 'take' to be integers, got {arrays['take'].dtype}")
        held = arrays["take"] < test_takes
    else:
        held = np.arange(n) % 10 == 0
    if held.shape != (n,):
        raise UserError(f"{path}: expected 'test' or 'take' for the {n} clips, got {list(held.shape)}")
    return [wave_form[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)], held.tolist()


def _wav_folder(root: Path) -> tuple[list[Tensor], list[bool], int]:
    paths = sorted(p for p in root.rglob("*") if p.suffix.lower() == ".wav")
    if len(paths) < 2:
        raise UserError(f"{root}: expected at least 2 .wav files, found {len(paths)}")
    clips, rate = [], None
    for path in paths:
        clip, found = read_wav(path)
        rate = rate or found
        if found != rate:
            raise UserError(f"{path}: expected {rate} samples a second like {paths[0].name}, got {found}")
        clips.append(clip)
    return clips, [number % 10 == 0 for number in range(len(clips))], rate


def read_wav(path: Path) -> tuple[Tensor, int]:
    """(waveform in [-1, 1], float32 [samples], samples a second) of PCM of 8, 16, 24 or 32 bits."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, frames = file.getparams()[:4]
            raw = file.readframes(frames)
    except (wave.Error, EOFError, RuntimeError) as error:
        raise UserError(f"{path}: expected a WAV file of PCM ({error or 'it ends too early'})") from error
    if len(raw) != frames * channels * width:
        raise UserError(f"{path}: expected {frames * channels * width} bytes of samples, got {len(raw)}")
    if not frames:
        raise UserError(f"{path}: expected at least one sample, got none")
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(frames, channels, width)
    if width == 1:  # unsigned, unlike the others
        x = (data[..., 0].float() - 128) / 128
    else:  # little endian; the last byte has the sign
        weights = 256.0 ** torch.arange(-width, 0, dtype=torch.float64)
        x = (data.double() * weights).sum(2) * 2
        x = torch.where(x >= 1, x - 2, x)
    return x.mean(1).float(), rate


def write_wav(path: str | Path, x: Tensor, rate: int) -> None:
    """Writes a waveform [samples] in [-1, 1] as mono PCM of 16 bits, whole or not at all."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((x.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes())
    write_file(Path(path), made.getvalue())
