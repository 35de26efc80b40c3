"""Data sets other than pictures of grey levels: bits, rows, toys, patches, audio; damaged files of each."""

import gzip
import math
import struct
import wave

import numpy as np
import pytest
import torch
from standins import files, random_images, save_png

from fastflow.models.wavenet import mu_law_encode
from fastflow.train import Images, UserError, load_data, noise
from fastflow.train.data import BUNDLED, NAMES, TOYS, Rows, audio
from fastflow.train.data.rows import gaussian_nats


def first(data, n=3, key=1):
    """What a model sees of the first training samples."""
    return data.inputs(data.train[:n], torch.arange(n), key)


def refuses(message, name, path, **options):
    """Loading answers in one line that names the path."""
    with pytest.raises((UserError, FileNotFoundError), match=message) as error:
        load_data(name, path, **options)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# --- forms of images --------------------------------------------------------------------------


def images(levels=17, **options):
    pixels = torch.arange(levels, dtype=torch.uint8).repeat(200, 4)[:, :levels, None, None].view(-1, 1, 1, levels)
    return Images("x", pixels, pixels[:20], levels, **options)


def test_integers_are_the_pixels():
    data = images(form="integers", flat=True)
    x = first(data)
    assert x.dtype == torch.int64 and torch.equal(x, data.train[:3].flatten(1).long()) and data.shape == (17,)
    # a uniform mass function on 17 levels
    assert data.cost(torch.tensor([-17 * math.log(17)])).item() == pytest.approx(math.log2(17))


def test_bits_are_drawn_with_the_grey_level_as_probability():
    data = images(form="dynamic")
    index = torch.arange(len(data.train))
    x = data.inputs(data.train, index, noise.key(0))
    assert data.unit == "nats" and set(x.unique().tolist()) == {0.0, 1.0}
    mean = x.mean(0).flatten()
    assert mean[0] == 0 and mean[-1] == 1 and torch.allclose(mean, torch.linspace(0, 1, 17), atol=0.15)
    assert torch.equal(data.inputs(data.train[5:9], index[5:9], noise.key(0)), x[5:9])  # noise belongs to the sample
    assert not torch.equal(data.inputs(data.train, index, noise.key(1)), x)


@pytest.mark.parametrize("form", ["static", "threshold"])
def test_bits_once_and_for_all(form):
    data, again = images(form=form), images(form=form)
    assert data.levels == 2 and data.train.max() == 1 and torch.equal(data.train, again.train)
    assert torch.equal(first(data, key=1), first(data, key=2))
    if form == "threshold":
        assert torch.equal(data.train[0].flatten(), (torch.arange(17) > 8).to(torch.uint8))
    else:  # held-out images do not repeat the draws of the training images
        assert not torch.equal(data.held_out, data.train[:20])


def test_two_levels_are_bits_in_every_form():
    pixels = torch.randint(2, (8, 1, 3, 3), dtype=torch.uint8)
    for form in ("dynamic", "static", "threshold"):
        assert torch.equal(first(Images("x", pixels, pixels, 2, form)), pixels[:3].float())


def test_bernoulli_baseline():
    ones = torch.tensor([[1, 0], [1, 0], [1, 1], [1, 0]], dtype=torch.uint8).view(4, 1, 1, 2)
    p = torch.tensor([5 / 6, 2 / 6])
    held_out = ones[2:]
    expected = -(held_out.view(2, 2) * p.log() + (1 - held_out.view(2, 2)) * (1 - p).log()).sum(1).mean().item()
    value, name = Images("x", ones, held_out, 2, "static").baseline()
    assert value == pytest.approx(expected) and "Bernoulli" in name


def test_validation_set():
    data = load_data("digits", form="dynamic", valid=100)
    whole = load_data("digits")
    assert len(data.train) == 1338 and len(data.held_out) == 100 and torch.equal(data.test, whole.held_out)
    assert data.final is data.test and whole.final is whole.held_out
    with pytest.raises(UserError, match="valid: expected fewer than the 1438"):
        load_data("digits", valid=1438)


def test_bad_options():
    with pytest.raises(UserError, match="form: expected one of dequantized.*'grey'"):
        load_data("digits", form="grey")
    with pytest.raises(UserError, match="for images only, got 'moons'"):
        load_data("moons", flat=True)
    with pytest.raises(UserError, match="colour: no option of 'rows', which has drop, separator, standardize"):
        load_data("rows", "x.csv", colour=1)


def test_options_of_the_wrong_type(tmp_path):
    (tmp_path / "x.csv").write_text("1,2\n3,4\n")
    for name, option, value in (
        ("audio", "length", "long"),
        ("audio", "length", 10.5),
        ("audio", "rate", 0),
        ("audio", "test_takes", None),
        ("patches", "side", 1),
        ("patches", "side", "8"),
        ("patches", "train", 0),
        ("images", "size", "8"),
    ):
        with pytest.raises(UserError, match=f"{option}: .*got {value!r}"):
            load_data(name, tmp_path, **{option: value})
    with pytest.raises(UserError, match="separator: expected one character, got 3"):
        load_data("rows", tmp_path / "x.csv", separator=3)


# --- bits, faces, drawings, silhouettes -------------------------------------------------------


def test_packed_bits(tmp_path):
    path, bits = tmp_path / "static.npz", random_images(6, 784, high=2)
    np.savez(
        path, **{part: np.packbits(bits[i : i + 2], axis=1) for part, i in (("train", 0), ("valid", 2), ("test", 4))}
    )
    data = load_data("mnist-static", path, flat=True)
    assert data.form == "static" and load_data("mnist-static", path, form="dequantized").levels == 2
    assert data.shape == (784,) and data.image_shape == (1, 28, 28)
    for part, i in ((data.train, 0), (data.held_out, 2), (data.test, 4)):
        assert np.array_equal(part.flatten(1).numpy(), bits[i : i + 2])
    np.savez(path, train=random_images(2, 97), test=random_images(2, 98))
    refuses(r"'train' to be uint8 \[N, 98\], 784 packed bits each, got uint8 \[2, 97\]", "mnist-static", path)
    np.savez(path, train=random_images(2, 98))
    refuses("no 'test'", "mnist-static", path)


def test_rows_of_bits(tmp_path):
    path = tmp_path / "dna.npz"
    np.savez(path, train=random_images(5, 7, high=2), test=random_images(3, 7, high=2))
    data = load_data("binary", path, form="static", flat=True)
    assert data.shape == (7,) and data.test is None and len(data.held_out) == 3
    np.savez(path, train=random_images(5, 7, high=3), test=random_images(3, 7, high=2))
    refuses(r"'train' to be 0/1 \[N, D\]", "binary", path)
    np.savez(path, train=random_images(5, 7, high=2), test=random_images(3, 8, high=2))
    refuses("one size in every part", "binary", path)


def test_faces(tmp_path):
    path = tmp_path / "faces.npz"
    np.savez(path, x=random_images(1965, 4, 3))
    data = load_data("freyfaces", path, form="integers")
    assert [len(p) for p in (data.train, data.held_out, data.test)] == [1565, 200, 200]
    np.savez(path, y=random_images(4, 4, 3))
    refuses(r"the array 'x', got \['y'\]", "freyfaces", path)


def test_drawings(tmp_path):
    ink = np.zeros((2, 3, 105, 105), bool)
    ink[..., :52] = True  # the left half
    for word in ("background", "evaluation"):
        np.savez(tmp_path / f"omniglot_{word}.npz", ink=ink)
    data = load_data("omniglot", tmp_path)
    assert data.image_shape == (1, 28, 28) and [len(p) for p in (data.train, data.held_out, data.test)] == [5, 1, 6]
    assert data.train[..., :13].min() == 255 and data.train[..., 15:].max() == 0
    np.savez(tmp_path / "omniglot_evaluation.npz", ink=ink.astype(np.uint8))
    with pytest.raises(UserError, match=r"evaluation.npz: expected 'ink' to be bool"):
        load_data("omniglot", tmp_path)
    (tmp_path / "omniglot_evaluation.npz").unlink()
    refuses(r"\*evaluation\*.npz, found none", "omniglot", tmp_path)


def test_silhouettes(tmp_path):
    io = pytest.importorskip("scipy.io")
    path, upright = tmp_path / "x.mat", np.zeros((10, 4, 4), np.uint8)
    upright[:, 0] = 1  # the object is the top row; stored on its side with the object 0
    io.savemat(path, {"X": 1 - upright.transpose(0, 2, 1).reshape(10, 16)})
    data = load_data("caltech", path, form="static")
    assert data.levels == 2 and data.train[:, 0, 0].min() == 1 and data.train[:, 0, 1:].max() == 0
    assert [len(p) for p in (data.train, data.held_out, data.test)] == [8, 1, 1]
    for options in ({"do_compression": True}, {"format": "5", "long_field_names": True}):
        io.savemat(path, {"names": np.array(["a", "b"], object), "X": io.loadmat(path)["X"].astype(float)}, **options)
        assert torch.equal(load_data("caltech", path).train, data.train)
    raw = load_data("caltech", path, transpose=False, invert=False)
    assert raw.train[0, 0, :, 0].max() == 0 and raw.train[0, 0, :, 1:].min() == 1
    whole = path.read_bytes()
    for damaged in (b"", b"hello", whole[:130], whole[:150], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        refuses("MATLAB file", "caltech", path)
    for arrays, message in (
        ({"Y": upright}, r"numbers 'X', got \['Y'\]"),
        ({"X": ["a", "b"]}, r"numbers 'X', got \['X'\]"),
        ({"X": np.full((3, 16), 2)}, "values 0 and 1"),
        ({"X": np.zeros((3, 15))}, r"\[N, S\*S\], got float64 \[3, 15\]"),
    ):
        io.savemat(path, arrays)
        refuses(message, "caltech", path)


# --- rows -------------------------------------------------------------------------------------


TABLE = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([1, 5, 0.1])


def text(separator=",", header=None, rows=TABLE):
    lines = [] if header is None else [header]
    return "\n".join(lines + [separator.join(repr(v) for v in row) for row in rows.tolist()]) + "\n"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
def test_csv(tmp_path, separator, header, suffix):
    path = tmp_path / f"t{suffix}"
    raw = text(separator, separator.join(('"fixed acidity"', "pH", "alcohol")) if header else None).encode()
    path.write_bytes(gzip.compress(raw) if suffix == ".csv.gz" else raw)
    data = load_data("rows", path)
    assert data.unit == "nats" and data.shape == (3,)
    assert [len(p) for p in (data.train, data.held_out, data.test)] == [48, 6, 6]
    assert data.train.mean(0).abs().max() < 1e-5 and (data.train.std(0, correction=0) - 1).abs().max() < 1e-5
    rows = torch.cat((data.train, data.held_out, data.test)) * data.std + data.mean
    assert torch.allclose(rows.sort(0).values, TABLE.sort(0).values)
    assert torch.equal(load_data("rows", path).test, data.test)
    plain = load_data("rows", path, standardize=False, drop=(-1,))
    assert plain.shape == (2,) and plain.mean is None
    assert torch.allclose(plain.train.double(), (data.train.double() * data.std + data.mean)[:, :2], atol=1e-5)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "rows of numbers, got none"),
        (b"a,b,c\n", "rows of numbers, got none"),
        (b"1,2\n3\n", "2 values in row 2, got 1"),
        (b"1,2\n3,4,5\n", "2 values in row 2, got 3"),
        (b"x,y\n1,2\n3,\n", "number in row 3, column y, got ''"),
        (b"1,2\n3,?\n", r"number in row 2, column 1, got '\?'"),
        (b"1,2\n3,nan\n", "finite numbers in row 2"),
        (b"1,2\n3,inf\n", "finite numbers in row 2"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"1,2\n1,3\n1,4\n1,5\n", "the constant column 0"),
        (b"1,2\n1,3\n", "at least 3 samples"),
    ],
)
def test_bad_csv(tmp_path, raw, message):
    path = tmp_path / "t.csv"
    path.write_bytes(raw)
    refuses(message, "rows", path)
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(raw))
    refuses(message, "rows", path)
    path.write_bytes(gzip.compress(text().encode())[:-9])
    refuses("whole gzip", "rows", path)


def test_npz_rows(tmp_path):
    path = tmp_path / "t.npz"
    np.savez(path, train=TABLE[:40], valid=TABLE[40:50], test=TABLE[50:])
    data = load_data("rows", path, standardize=False)
    assert torch.equal(data.held_out, TABLE[40:50].float()) and torch.equal(data.test, TABLE[50:].float())
    bad = TABLE.clone()
    bad[7, 1] = math.nan
    np.savez(path, x=bad)
    refuses("nan or inf in row 7 of train", "rows", path)
    np.savez(path, x=TABLE[0])
    refuses(r"'x' to be numbers \[N, D\], got float64 \[3\]", "rows", path)
    np.savez(path, y=TABLE)
    refuses("arrays 'x', or 'train'", "rows", path)
    np.savez(path, train=TABLE[:40], test=TABLE[40:, :2])
    refuses("one size in every part", "rows", path)
    path.write_bytes(path.read_bytes()[:-30])
    refuses("NumPy .npz archive", "rows", path)


def test_a_folder_of_npz_rows(tmp_path):
    np.savez(tmp_path / "mini_val.npz", x=TABLE[:40])
    np.savez(tmp_path / "mini_test.npz", x=TABLE[40:])
    data = load_data("rows", tmp_path)  # no training rows: those of the validation
    assert [len(p) for p in (data.train, data.held_out, data.test)] == [36, 4, 20]
    assert data.mean is not None and load_data("miniboone", tmp_path).mean is None
    np.savez(tmp_path / "mini_train.npz", x=TABLE)
    data = load_data("rows", tmp_path)
    assert [len(p) for p in (data.train, data.held_out, data.test)] == [60, 40, 20]
    np.savez(tmp_path / "other_train.npz", x=TABLE)
    refuses("one file each", "rows", tmp_path)


def test_bad_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text())
    refuses(r"expected columns of -3..2 in .*, got 3", "rows", path, drop=(3,))
    constant = TABLE.clone()
    constant[:, 2] = 0.1
    path.write_text(text(rows=constant))
    refuses("the constant column 2", "rows", path)
    np.savez(tmp_path / "t.npz", x=TABLE.double() * torch.tensor([1, 1e300, 1], dtype=torch.float64))
    refuses("variance is finite, not so in column 1", "rows", tmp_path / "t.npz")
    np.savez(tmp_path / "t.npz", x=TABLE.double() * torch.tensor([1, 1e60, 1], dtype=torch.float64))
    refuses("in float32: expected finite numbers", "miniboone", tmp_path / "t.npz")
    assert load_data("rows", path, drop=2).shape == (2,)
    refuses("keep at least one of the 3 columns", "rows", path, drop=(0, 1, 2))
    with pytest.raises(UserError, match="separator: expected one character, got ';;'"):
        load_data("rows", path, separator=";;")


def test_gaussian_baseline():
    generator = torch.Generator().manual_seed(0)
    mix = torch.tensor([[1.0, 0.0], [2.0, 0.5]])
    rows = torch.randn(20000, 2, generator=generator) @ mix.T + 3
    entropy = math.log(2 * math.pi * math.e) + math.log(0.5)
    assert gaussian_nats(rows[:10000], rows[10000:]) == pytest.approx(entropy, abs=0.03)
    value, name = Rows("x", rows[:10000], rows[10000:]).baseline()
    assert value == pytest.approx(entropy, abs=0.03) and "Gaussian" in name


@pytest.mark.parametrize("name", TOYS)
def test_toys(name):
    data = load_data(name)
    assert data.train.shape == (50000, 2) and data.held_out.shape == (10000, 2) and data.train.isfinite().all()
    assert torch.equal(load_data(name).held_out, data.held_out)
    assert (data.train.mean(0) - data.held_out.mean(0)).abs().max() < 0.1
    assert not torch.equal(data.train[:10000], data.held_out)


def test_moons_cost_a_gaussian_what_is_known():
    assert load_data("moons").baseline()[0] == pytest.approx(1.91, abs=0.02)


# --- patches ----------------------------------------------------------------------------------


def test_patches(tmp_path):
    ramp = np.add.outer(20 * np.arange(12), np.arange(14)).astype(np.uint8)
    for part, n in (("train", 11), ("test", 2)):
        for i in range(n):
            save_png(tmp_path / part / f"{i:02d}.png", (ramp if i % 2 else ramp.T.copy()) // 2 + i)
    data = load_data("patches", tmp_path, side=4, train=300, held_out=50, test=20)
    assert data.shape == (15,) and [len(p) for p in (data.train, data.held_out, data.test)] == [300, 50, 20]
    for patch in data.train.view(-1, 4, 4).int():  # every patch is a piece of an image: a plane, up to rounding
        steps = {(int(patch[1, 0] - patch[0, 0])), (int(patch[0, 1] - patch[0, 0]))}
        assert steps <= {9, 10, 11, 0, 1}, patch
    x = first(data, 5)
    assert x.shape == (5, 15) and x.abs().max() < 1
    whole = torch.cat((x, -x.sum(1, keepdim=True)), 1)  # the mean is zero: the last pixel is minus the others
    pixels = data.train[:5].float() / 256
    assert ((whole - whole.mean(1, keepdim=True)) - (pixels - pixels.mean(1, keepdim=True))).abs().max() < 1 / 256
    assert len({int(p.int().min()) for p in data.train}) > 3  # of many places
    save_png(tmp_path / "test" / "small.png", random_images(3, 9))
    with pytest.raises(UserError, match=r"small.png: expected at least 4x4 pixels, got \[3, 9\]"):
        load_data("patches", tmp_path, side=4)
    refuses("the folders train and test, found no train", "patches", tmp_path / "train")


# --- audio ------------------------------------------------------------------------------------


def write_wav(path, samples, width=2, channels=1, rate=8000):
    """Integer samples [n, channels]."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        low = 128 if width == 1 else 0
        raw = b"".join(int(v + low).to_bytes(width, "little", signed=width > 1) for v in np.ravel(samples))
        file.writeframes(raw)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav(tmp_path, width):
    top = 1 << (8 * width - 1)
    samples = np.array([[-top, 0], [-top // 2, top // 2], [0, top // 4], [top - 1, top - 1]])
    write_wav(tmp_path / "a.wav", samples, width, channels=2)
    x, rate = audio.read_wav(tmp_path / "a.wav")
    assert rate == 8000 and torch.allclose(x, torch.tensor([-0.5, 0.0, 0.125, 1.0]), atol=1.01 / top)
    audio.write_wav(tmp_path / "b.wav", x, 8000)
    assert torch.allclose(audio.read_wav(tmp_path / "b.wav")[0], x, atol=2e-4)


def test_a_folder_of_wav(tmp_path):
    for i in range(20):
        write_wav(tmp_path / f"{i:02d}.wav", (1000 * np.sin(np.arange(100) * (1 + i / 10))).astype(int)[:, None])
    data = load_data("audio", tmp_path, length=30)
    assert len(data.train) == 18 * 100 // 30 and len(data.held_out) == 200 // 30 and data.rate == 8000
    x = first(data)
    assert x.dtype == torch.int64 and x.shape == (3, 30) == (3, *data.shape) and data.unit == "bits/sample"
    assert data.cost(torch.tensor([-30 * math.log(256)])).item() == pytest.approx(8)
    refuses("at least length=500 samples in held_out, got 200", "audio", tmp_path, length=500)
    refuses("expected 16000 samples a second, got 8000", "audio", tmp_path, rate=16000)
    write_wav(tmp_path / "x.wav", np.zeros((10, 1)), rate=16000)
    with pytest.raises(UserError, match=r"x.wav: expected 8000 samples a second like 00.wav, got 16000"):
        load_data("audio", tmp_path)
    whole = (tmp_path / "00.wav").read_bytes()
    for raw, message in ((b"", "WAV file"), (b"RIFFxxxx", "WAV file"), (whole[:-50], "bytes of samples, got 150")):
        (tmp_path / "x.wav").write_bytes(raw)
        with pytest.raises(UserError, match=message) as error:
            load_data("audio", tmp_path)
        assert "x.wav" in str(error.value) and "\n" not in str(error.value)
    as_float = whole[:20] + struct.pack("<H", 3) + whole[22:]  # format 3: no PCM
    (tmp_path / "x.wav").write_bytes(as_float)
    with pytest.raises(UserError, match=r"x.wav: expected a WAV file of PCM"):
        load_data("audio", tmp_path)


def test_npz_clips(tmp_path):
    path = tmp_path / "clips.npz"
    sound = (20000 * np.sin(np.arange(400) / 5)).astype(np.int16)
    good = {"audio": sound, "offsets": np.array([0, 100, 250, 400]), "take": np.array([5, 2, 9])}
    np.savez(path, **good)
    data = load_data("audio", path, length=50, test_takes=5)
    assert len(data.train) == 5 and len(data.held_out) == 3 and data.rate == 8000
    codes = mu_law_encode(torch.from_numpy(sound / 32768)).to(torch.uint8)
    assert torch.equal(data.held_out.flatten(), codes[100:250])
    assert torch.equal(data.train.flatten()[:100], codes[:100])
    np.savez(path, audio=sound / 32768, offsets=good["offsets"], test=np.array([False, True, False]))
    assert torch.equal(load_data("audio", path, length=50).held_out, data.held_out)
    for change, message in (
        ({"offsets": np.array([0, 300, 250, 400])}, "integers that rise from 0 to at most 400"),
        ({"offsets": np.array([0, 100, 250, 401])}, "at most 400"),
        ({"audio": sound / 30.0}, r"within \[-1, 1\], got values up to"),
        ({"audio": np.full(400, np.nan)}, r"within \[-1, 1\]"),
        ({"audio": sound.astype(np.int32)}, "int16 or float"),
        ({"take": np.array([1, 2])}, "for the 3 clips"),
        ({"take": np.array(["5", "2", "9"])}, "'take' to be integers"),
    ):
        np.savez(path, **(good | change))
        refuses(message, "audio", path, length=50)
    np.savez(path, audio=sound)
    refuses("no 'offsets'", "audio", path)
    np.savez(path, **good)
    path.write_bytes(path.read_bytes()[:-100])
    refuses("NumPy .npz archive", "audio", path)


def test_bigram_baseline():
    codes = torch.tensor([[1, 2, 1, 2, 1, 2, 1, 2]], dtype=torch.uint8).repeat(5000, 1)
    assert audio.bigram_bits(codes, codes) < 0.1
    uniform = torch.randint(256, (50, 1000), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert audio.bigram_bits(uniform, uniform) == pytest.approx(8, abs=1)


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BUNDLED])
def test_damaged_files(tmp_path, name):
    """Cut anywhere and with bytes changed anywhere: data, or one line; nothing else."""
    generator = np.random.default_rng(7)
    root = files(name, tmp_path)
    options = {"patches": {"train": 60, "held_out": 20, "test": 20}, "audio": {"length": 64}}.get(name, {})
    path = root if root.is_file() else next(p for p in sorted(root.rglob("*")) if p.is_file())
    whole = path.read_bytes()
    for trial in range(12):
        raw = bytearray(whole)
        if trial % 3 == 0:
            raw = raw[: generator.integers(len(raw))]
        for at in generator.integers(min(len(raw), (64, 400, len(raw))[trial % 3]), size=4 * (trial % 3 > 0)):
            raw[at if trial % 2 else -1 - at] = generator.integers(256)
        path.write_bytes(raw)
        try:
            load_data(name, root, **options)
        except (UserError, FileNotFoundError) as error:
            assert "\n" not in str(error)
