"""Labelled images by index: folders of files, and TFDS. All become arrays of bytes, RGB, NHWC."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from jaxlab.data.pipeline import RandomAccess, Sample, Transform
from jaxlab.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png")
# Splits and what they may be called, the preferred name first.
_SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}
# Images up to this size are decoded once, into memory; larger ones when they are read.
_STORED_SIZE = 64
# The shorter side before the central crop, as a share of the crop: 256 for 224.
_TEST_RESIZE = 256 / 224
_SPEC_HELP = "write 'folder:PATH' or 'tfds:NAME'"

Pixels = UInt8[np.ndarray, "_ _ 3"]


@dataclass(frozen=True, slots=True, eq=False)
class StoredImages:
    """Images in memory. A sample is ``images`` (h, w, 3) and ``labels`` ()."""

    images: UInt8[np.ndarray, "N h w 3"]
    labels: Int32[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return {"images": self.images[index], "labels": self.labels[index]}


@dataclass(frozen=True, slots=True, eq=False)
class FileImages:
    """``count`` images of any size, decoded by ``read`` whenever one is asked for."""

    read: Callable[[int], Sample]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return self.read(index)


@dataclass(frozen=True, slots=True)
class ImageData:
    """The two splits, and the names of the classes in the order of their labels.

    ``train_transform`` cuts a part of each training image at random, on the host, where images come
    in different sizes; None where they have one size already. ``train_in_order`` are the training
    images cut like those of the test.
    """

    train: RandomAccess
    train_in_order: RandomAccess
    test: RandomAccess
    classes: tuple[str, ...]
    train_transform: Transform | None


def load_images(
    spec: str, *, image_size: int, limit: int | None = None, test_limit: int | None = None
) -> ImageData:
    """The images that ``spec`` names: ``folder:PATH`` or ``tfds:NAME``.

    A folder holds ``train/CLASS/*.jpg`` (or png) and ``test/CLASS/*.jpg``; labels follow the sorted
    names of the classes. Up to 64 pixels all images are decoded now; larger ones when read, cut at
    random in training. The limits keep that many images of a split, spread evenly. Raises
    DataError naming the file.
    """
    kind, _, name = spec.partition(":")
    if kind not in _SOURCES or not name:
        raise DataError(f"image source {spec!r} is not understood: {_SPEC_HELP}")
    classes, splits = _SOURCES[kind](name)
    train = _limited(splits["train"], limit)
    test = _limited(splits["test"], test_limit)
    if image_size <= _STORED_SIZE:
        whole = _central_crop(image_size, shorter=image_size)
        stored = _stored(train, whole)
        return ImageData(stored, stored, _stored(test, whole), classes, None)
    crop = _central_crop(image_size, shorter=round(_TEST_RESIZE * image_size))
    cut_train, cut_test = (
        FileImages(lambda index, source=source: _changed(source[index], crop), len(source))
        for source in (train, test)
    )
    return ImageData(train, cut_train, cut_test, classes, random_resized_crop(image_size))


def batches_in_order(source: RandomAccess, batch_size: int) -> Iterator[Sample]:
    """Each sample once, in batches of one size; ``weights`` is 0 where the last is filled up."""
    with ThreadPoolExecutor(_threads()) as pool:
        for start in range(0, len(source), batch_size):
            indices = np.arange(start, start + batch_size)
            part = list(pool.map(lambda i: source[int(i) % len(source)], indices))
            batch = {key: np.stack([sample[key] for sample in part]) for key in part[0]}
            yield batch | {"weights": (indices < len(source)).astype(np.float32)}


def random_resized_crop(size: int) -> Transform:
    """Cuts 8 to 100 % of the area at a ratio of 3/4 to 4/3, resized (arXiv 1409.4842, §6)."""

    def transform(sample: Sample, rng: np.random.Generator) -> Sample:
        height, width = sample["images"].shape[:2]
        box = (0, 0, width, height)
        for _ in range(10):
            area = rng.uniform(0.08, 1.0) * height * width
            ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                box = (left, top, left + w, top + h)
                break
        return sample | {"images": _resized(sample["images"], (size, size), box)}

    return transform


# Folders


def _folder(name: str) -> tuple[tuple[str, ...], dict[str, FileImages]]:
    root = Path(name).expanduser()
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; it should hold train/CLASS/*.jpg and test/CLASS")
    files = {split: _class_files(_split_folder(root, split)) for split in _SPLITS}
    classes = tuple(files["train"])
    if different := set(classes) ^ set(files["test"]):
        one = sorted(different)[0]
        here, there = ("train", "test") if one in classes else ("test", "train")
        raise DataError(f"{root}: class {one!r} is in {here} but not in {there}; make them alike")
    return classes, {split: _file_images(list(found.values())) for split, found in files.items()}


def _split_folder(root: Path, split: str) -> Path:
    names = _SPLITS[split]
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root}: has no folder {names[0]!r}; put the images in {names[0]}/CLASS/")


def _class_files(folder: Path) -> dict[str, list[Path]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise DataError(f"{folder}: holds no folder of a class; put the images in CLASS/*.jpg")
    found = {}
    for path in classes:
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{path}: holds no image ({', '.join(SUFFIXES)}); add one or remove it")
        found[path.name] = files
    return found


def _file_images(by_class: list[list[Path]]) -> FileImages:
    files = [file for group in by_class for file in group]
    labels = np.repeat(np.arange(len(by_class), dtype=np.int32), [len(g) for g in by_class])
    return FileImages(
        lambda index: {"images": _decoded(files[index]), "labels": labels[index]}, len(files)
    )


def _decoded(file: Path) -> Pixels:
    # Imported here: nothing else of the package needs Pillow.
    from PIL import Image

    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three
        raise DataError(f"{file}: is not a whole image ({error}): replace the file") from None


# TensorFlow Datasets, without TensorFlow


def _tfds(name: str) -> tuple[tuple[str, ...], dict[str, FileImages]]:
    spec = f"tfds:{name}"
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"image source {spec!r} needs tensorflow-datasets: install it") from error
    try:
        builder = tfds.builder(name, file_format="array_record")
        found = builder.info.splits
        held_out = next((split for split in _SPLITS["test"] if split in found), "test")
        if not found:
            raise LookupError(f"nothing is prepared in {builder.data_dir}")
        sources = {
            split: builder.as_data_source(split=actual)
            for split, actual in (("train", "train"), ("test", held_out))
        }
        classes = tuple(builder.info.features["label"].names)
    except Exception as error:  # TFDS raises many kinds here, most of them several lines long
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"image source {spec!r}: {reason.rstrip('.')}; prepare it where tensorflow is "
            f"installed (`tfds build {name} --file_format=array_record`), correct the name, or "
            "give a folder:PATH"
        ) from error
    return classes, {split: _tfds_images(source) for split, source in sources.items()}


def _tfds_images(source: Any) -> FileImages:
    def read(index: int) -> Sample:
        record = source[index]
        pixels = np.asarray(record["image"], np.uint8)
        whole = np.broadcast_to(pixels, (*pixels.shape[:2], 3))  # grey images have one channel
        return {"images": whole, "labels": np.int32(record["label"])}

    return FileImages(read, len(source))


_SOURCES = {"folder": _folder, "tfds": _tfds}


# Pixels


def _limited(source: FileImages, limit: int | None) -> FileImages:
    """``limit`` images spread over all, which lie in the order of their classes."""
    if limit is None or limit >= len(source):
        return source
    # Middles of equal parts: every class keeps its share.
    chosen = ((np.arange(limit) + 0.5) * len(source) / limit).astype(int)
    return FileImages(lambda index: source[int(chosen[index])], limit)


def _stored(source: FileImages, resize: Callable[[Pixels], Pixels]) -> StoredImages:
    with ThreadPoolExecutor(_threads()) as pool:
        samples = list(pool.map(lambda i: _changed(source[i], resize), range(len(source))))
    labels = np.array([sample["labels"] for sample in samples], np.int32)
    return StoredImages(np.stack([sample["images"] for sample in samples]), labels)


def _changed(sample: Sample, change: Callable[[Pixels], Pixels]) -> Sample:
    return sample | {"images": change(sample["images"])}


def _threads() -> int:
    return min(16, os.cpu_count() or 1)


def _central_crop(size: int, *, shorter: int) -> Callable[[Pixels], Pixels]:
    """Resizes the shorter side and cuts ``size`` x ``size`` pixels out of the middle."""

    def crop(pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        if (height, width) == (size, size) == (shorter, shorter):
            return pixels
        scale = shorter / min(height, width)
        resized = _resized(pixels, (round(width * scale), round(height * scale)))
        top, left = ((length - size) // 2 for length in resized.shape[:2])
        return resized[top : top + size, left : left + size]

    return crop


def _resized(pixels: Pixels, size: tuple[int, int], box: tuple[int, ...] | None = None) -> Pixels:
    from PIL import Image

    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box=box))
