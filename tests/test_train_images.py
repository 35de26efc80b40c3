"""Readers of image files: what they give, and what they say of damaged ones."""

import doctest
import gzip
import struct

import numpy as np
import pytest
import torch
from standins import random_images, save_png

from fastflow.train import data, load_data, pixels


def write_idx(path, array, kind=8):
    raw = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw += array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def test_doctests():
    for module in (data, pixels):
        assert doctest.testmod(module).failed == 0


def test_digits(digits):
    assert digits.shape == (1, 8, 8) and digits.dims == 64 and digits.levels == 17
    assert digits.train.dtype == torch.uint8 and digits.train.max() == 16
    both = torch.cat((digits.train, digits.held_out)).flatten(1)
    assert len(both) == 1797 and len(both.unique(dim=0)) == 1797  # nothing twice, nothing lost
    again = load_data("digits")
    assert torch.equal(again.held_out, digits.held_out)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist(tmp_path, suffix):
    train_set, test_set = random_images(5, 6, 4), random_images(3, 6, 4)
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", train_set)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", test_set)
    found = load_data("mnist", tmp_path)
    assert found.shape == (1, 6, 4) and found.levels == 256
    assert np.array_equal(found.train[:, 0].numpy(), train_set)
    assert np.array_equal(found.held_out[:, 0].numpy(), test_set)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "magic 00 00 08"),
        (b"\x89PNG1234", "got 89 50 4e 47"),
        (b"\0\0\x0d\x03" + bytes(12), "got 00 00 0d 03"),  # floats
        (b"\0\0\x08\x03" + bytes(5), "header of 16 bytes, got 9"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 3) + bytes(17), "expected 18 bytes.*got 17"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 3) + bytes(19), "expected 18 bytes.*got 19"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 0, 3, 3), "at least one value"),
    ],
)
def test_bad_idx(tmp_path, raw, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(raw)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", random_images(3, 3, 3))
    with pytest.raises(ValueError, match=message) as error:
        load_data("mnist", tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bad_mnist_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        load_data("mnist", tmp_path)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", random_images(3, 3, 3))
    with pytest.raises(FileNotFoundError, match="t10k-images-idx3-ubyte"):
        load_data("mnist", tmp_path)
    whole = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="t10k.*whole gzip"):
        load_data("mnist", tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", random_images(3, 4, 3))
    with pytest.raises(ValueError, match="one size"):
        load_data("mnist", tmp_path)


def test_image_folder(tmp_path):
    images = random_images(20, 6, 4, 3)
    for i, image in enumerate(images):
        save_png(tmp_path / f"class{i % 2}" / f"{i:02d}.png", image)
    (tmp_path / "notes.txt").write_text("ignored")
    found = load_data("images", tmp_path)
    assert found.shape == (3, 6, 4) and len(found.train) == 18 and len(found.held_out) == 2
    both = torch.cat((found.train, found.held_out)).permute(0, 2, 3, 1).numpy()
    assert {i.tobytes() for i in both} == {i.tobytes() for i in images}
    assert torch.equal(load_data("images", tmp_path).held_out, found.held_out)


def test_grey_folder_is_one_channel_and_a_size_crops_the_centre(tmp_path):
    wide = np.zeros((4, 8), np.uint8)
    wide[:, 2:6] = 200
    save_png(tmp_path / "a.png", wide)
    save_png(tmp_path / "b.jpg", wide.T.copy())
    found = load_data("images", tmp_path, size=2)
    assert found.shape == (1, 2, 2)
    assert (torch.cat((found.train, found.held_out)).int() - 200).abs().max() < 12  # JPEG


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such"):
        load_data("images", tmp_path / "no-such")
    with pytest.raises(FileNotFoundError, match="found none"):
        load_data("images", tmp_path)
    save_png(tmp_path / "a.png", random_images(4, 4))
    with pytest.raises(ValueError, match="at least 2 samples"):
        load_data("images", tmp_path)
    save_png(tmp_path / "b.png", random_images(4, 6))
    with pytest.raises(ValueError, match=r"b.png: expected 4x4 like a.png, got 6x4; give a size"):
        load_data("images", tmp_path)
    save_png(tmp_path / "b.png", random_images(4, 4).astype(np.uint16))
    with pytest.raises(ValueError, match=r"b.png: expected 8 bits a channel"):
        load_data("images", tmp_path)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[:50])
    with pytest.raises(ValueError, match=r"b.png: expected a whole image"):
        load_data("images", tmp_path)
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"b.png: expected an image"):
        load_data("images", tmp_path)


def test_npz(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, x=random_images(20, 6, 4, high=5), levels=5)
    found = load_data("npz", path)
    assert found.shape == (1, 6, 4) and found.levels == 5 and len(found.held_out) == 2
    np.savez(path, train=random_images(7, 3, 6, 4), test=random_images(2, 3, 6, 4))
    found = load_data("npz", path)
    assert found.shape == (3, 6, 4) and found.levels == 256 and len(found.train) == 7


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": random_images(3, 2, 2)}, r"expected arrays 'x'.*got \['y'\]"),
        ({"train": random_images(3, 2, 2)}, r"'train' and 'test', got \['train'\]"),
        ({"x": random_images(3, 2, 2).astype(np.float32)}, r"uint8 .* got float32 \[3, 2, 2\]"),
        ({"x": random_images(3, 2)}, r"\[N, H, W\].*got uint8 \[3, 2\]"),
        ({"x": np.array([{}, None], object)}, "plain array 'x'"),
        ({"x": random_images(3, 2, 2), "levels": 999}, "one integer of 2..256"),
        ({"x": random_images(30, 2, 2), "levels": 16}, "below levels=16"),
        ({"train": random_images(3, 2, 2), "test": random_images(3, 2, 4)}, "one size"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=message) as error:
        load_data("npz", path)
    assert str(path) in str(error.value)


def test_not_an_npz(tmp_path):
    path = tmp_path / "set.npz"
    for raw in (b"", b"hello", b"PK\x03\x04 broken"):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=r"set.npz: expected a NumPy .npz"):
            load_data("npz", path)
    np.save(tmp_path / "one.npy", random_images(3, 2, 2))
    with pytest.raises(ValueError, match="single array"):
        load_data("npz", tmp_path / "one.npy")


def test_bad_names():
    with pytest.raises(ValueError, match="unknown data set 'cifar'.*digits"):
        load_data("cifar")
    with pytest.raises(ValueError, match="'mnist' needs a root"):
        load_data("mnist")
    with pytest.raises(ValueError, match="size"):
        load_data("digits", size=8)
