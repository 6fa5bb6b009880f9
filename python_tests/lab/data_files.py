"""Small archives in the published formats, CIFAR's as Python 2 wrote its pickles."""

import io
import struct
import tarfile
import zipfile

import numpy as np
import torch
from PIL import Image

RNG = np.random.default_rng(0)


def check(dataset, train, test, channels, size):
    """Dtypes, shapes and labels that the contract of load() asks for."""
    for split, count in ((dataset.train, train), (dataset.test, test)):
        assert split.images.shape == (count, channels, size, size)
        assert split.images.dtype == torch.uint8
        assert split.images.is_contiguous()
        assert split.labels.shape == (count,)
        assert split.labels.dtype == torch.int64
        assert 0 <= split.labels.min() <= split.labels.max() < len(dataset.classes)


def python2_pickle(value):
    """Protocol 2 as Python 2's cPickle wrote it: str are byte strings, arrays those of NumPy 1."""

    def emit(v):
        if isinstance(v, bytes):
            return (b"U%c" % len(v) if len(v) < 256 else b"T" + struct.pack("<i", len(v))) + v
        if isinstance(v, bool | None):
            return {None: b"N", False: b"\x89", True: b"\x88"}[v]
        if isinstance(v, int):
            return b"J" + struct.pack("<i", v)
        if isinstance(v, list):
            return b"](" + b"".join(map(emit, v)) + b"e"
        if isinstance(v, tuple):
            return b"(" + b"".join(map(emit, v)) + b"t"
        if isinstance(v, dict):
            return b"}(" + b"".join(emit(k) + emit(x) for k, x in v.items()) + b"u"
        dtype = b"cnumpy\ndtype\n" + emit((v.dtype.str[1:].encode(), 0, 1)) + b"R"
        dtype += emit((3, b"|", None, None, None, -1, -1, 0)) + b"b"
        made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + emit((0,))
        # NumPy writes an array that runs along its columns as it is, and says so.
        columns = not v.flags.c_contiguous
        pixels = v.tobytes("F" if columns else "C")
        state = b"(" + emit(1) + emit(v.shape) + dtype + emit(columns) + emit(pixels) + b"t"
        return made + b"U\x01btR" + state + b"b"

    return b"\x80\x02" + emit(value) + b"."


def cifar_batch(count, label_key, classes):
    pixels = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = [k % classes for k in range(count)]
    names = [b"%d.png" % k for k in range(count)]
    batch = {b"data": pixels, label_key: labels, b"batch_label": b"one", b"filenames": names}
    return batch | ({b"coarse_labels": [0] * count} if label_key == b"fine_labels" else {})


def write_cifar(root, name, packed=True):
    """The archive or its folder, 4 images a batch -> {file: batch}."""
    if name == "cifar10":
        folder, archive = "cifar-10-batches-py", "cifar-10-python.tar.gz"
        names = [b"airplane", b"automobile", b"bird", b"cat"]
        files = {f"data_batch_{k}": cifar_batch(4, b"labels", 4) for k in (4, 3, 2, 5, 1)}
        files["test_batch"] = cifar_batch(4, b"labels", 4)
        meta = {"batches.meta": {b"num_cases_per_batch": 4, b"label_names": names}}
    else:
        folder, archive = "cifar-100-python", "cifar-100-python.tar.gz"
        names = [b"apple", b"aquarium_fish", b"baby"]
        files = {
            "test": cifar_batch(4, b"fine_labels", 3),
            "train": cifar_batch(4, b"fine_labels", 3),
        }
        meta = {"meta": {b"fine_label_names": names, b"coarse_label_names": [b"fish"]}}
    contents = {f: python2_pickle(v) for f, v in (files | meta).items()}
    write_archive(root / (archive if packed else ""), folder, contents | {"readme.html": b"<html>"})
    return files


def write_archive(path, folder, contents):
    """A .tar.gz or .zip of that folder, or the folder itself inside of a folder."""
    if path.is_dir():
        for name, data in contents.items():
            (path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (path / folder / name).write_bytes(data)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in contents.items():
                archive.writestr(f"{folder}/{name}", data)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, data in contents.items():
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def jpeg(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write_medmnist(path, *shape, classes=3, **changes):
    arrays = {}
    for split, count in (("train", 6), ("val", 3), ("test", 3)):
        images = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays |= {
            f"{split}_images": images,
            f"{split}_labels": np.arange(count, dtype=np.uint8)[:, None] % classes,
        }
    arrays |= changes
    np.savez_compressed(path, **arrays)
    return arrays
