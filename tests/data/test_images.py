"""Laws of labelled images: folders, TFDS, crops, order."""

import sys

import numpy as np
import pytest
from PIL import Image

from jaxlab.data.images import batches_in_order, load_images, random_resized_crop
from jaxlab.data.pipeline import training_iterator
from jaxlab.errors import DataError

CLASSES = ("ant", "bee", "cat")


def write_folder(root, *, size=8, train=3, test=2):
    """An image folder whose picture i of class c in a split is one colour; returns the colours."""
    colours = {}
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                colour = (40 * label, 10 * number, 200 * (split == "test"))
                Image.new("RGB", (size, size), colour).save(root / split / name / f"{number}.png")
                colours.setdefault(split, []).append(colour)
    return colours


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path)
    return tmp_path


def test_a_folder_gives_every_pixel_and_labels_in_the_order_of_the_names(tmp_path):
    colours = write_folder(tmp_path)
    data = load_images(f"folder:{tmp_path}", image_size=8)
    assert data.classes == CLASSES
    for split, source, count in (("train", data.train, 3), ("test", data.test, 2)):
        assert len(source) == 3 * count
        for i, colour in enumerate(colours[split]):
            sample = source[i]
            assert sample["labels"] == i // count
            assert sample["images"].dtype == np.uint8 and sample["images"].shape == (8, 8, 3)
            assert (sample["images"] == colour).all()


def test_the_limit_takes_the_same_share_of_every_class(folder):
    data = load_images(f"folder:{folder}", image_size=8, limit=6, test_limit=3)
    assert np.bincount([data.train[i]["labels"] for i in range(6)]).tolist() == [2, 2, 2]
    assert np.bincount([data.test[i]["labels"] for i in range(3)]).tolist() == [1, 1, 1]


def test_images_of_another_shape_are_resized_and_cut_from_the_middle(folder):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255  # the middle third is what is left
    Image.fromarray(wide).save(folder / "train" / "ant" / "0.png")
    data = load_images(f"folder:{folder}", image_size=8)
    np.testing.assert_array_equal(data.train[0]["images"], wide[:, 8:16])
    halved = load_images(f"folder:{folder}", image_size=4).train[3]["images"]
    np.testing.assert_array_equal(halved, np.broadcast_to([40, 0, 0], (4, 4, 3)))


def test_each_test_image_comes_once_and_what_fills_up_weighs_nothing(folder):
    data = load_images(f"folder:{folder}", image_size=8)
    batches = list(batches_in_order(data.test, 4))
    assert [batch["weights"].tolist() for batch in batches] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    images = np.concatenate([batch["images"] for batch in batches])[:6]
    np.testing.assert_array_equal(images, [data.test[i]["images"] for i in range(6)])


def test_large_images_are_cropped_by_their_place_in_the_order_and_resume_with_threads(tmp_path):
    rng = np.random.default_rng(0)
    write_folder(tmp_path, size=80)
    for name in CLASSES:
        for number in range(3):
            pixels = rng.integers(0, 256, (100, 90, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{number}.png")
    data = load_images(f"folder:{tmp_path}", image_size=70)

    def batches(threads):
        return training_iterator(
            [data.train],
            [1.0],
            batch_size=2,
            seed=3,
            transform=data.train_transform,
            threads=threads,
        )

    plain, ahead = batches(0), batches(2)
    first = [next(plain) for _ in range(4)]
    assert {batch["images"].shape for batch in first} == {(2, 70, 70, 3)}
    # Four batches of two leave one image of the epoch; crops of one image differ.
    again = [next(ahead) for _ in range(2)]
    resumed = batches(2)
    resumed.set_state(ahead.get_state())
    again += [next(resumed) for _ in range(2)]
    for ours, theirs in zip(first, again, strict=True):
        np.testing.assert_array_equal(ours["images"], theirs["images"])
        np.testing.assert_array_equal(ours["labels"], theirs["labels"])
    assert data.test[0]["images"].shape == (70, 70, 3)


def test_a_random_crop_is_a_resized_part_of_the_image():
    ramp = np.zeros((64, 96, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(64)[:, None], np.arange(96)
    crop = random_resized_crop(16)
    seen = set()
    for seed in range(20):
        image = crop({"images": ramp}, np.random.default_rng(seed))["images"].astype(int)
        assert image.shape == (16, 16, 3)
        # Brightness still rises along each axis alone, within the bounds of the whole.
        assert (np.diff(image[..., 0], axis=0) >= 0).all() and image[..., 0].max() < 64
        assert (np.diff(image[..., 1], axis=1) >= 0).all() and image[..., 1].max() < 96
        area = (np.ptp(image[..., 0]) + 1) * (np.ptp(image[..., 1]) + 1) / (64 * 96)
        assert 0.05 < area <= 1.0
        seen.add(image.tobytes())
    assert len(seen) == 20


def remove_class(root):
    for file in (root / "train" / "bee").iterdir():
        file.unlink()


def damage(root):
    (root / "test" / "cat" / "1.png").write_bytes(b"no image")


def another_class(root):
    (root / "test" / "bee").rename(root / "test" / "dog")


def no_split(root):
    (root / "test").rename(root / "other")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_class, r"train/bee: holds no image \(.jpg, .jpeg, .png\); add one or remove it"),
        (damage, r"test/cat/1.png: is not a whole image \(.*\): replace the file"),
        (another_class, "class 'bee' is in train but not in test; make them alike"),
        (no_split, "has no folder 'test'; put the images in test/CLASS/"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_in_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_images(f"folder:{folder}", image_size=8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("folder:/nowhere", "/nowhere: no such folder"),
        ("cifar10", "write 'folder:PATH' or 'tfds:NAME'"),
        ("tfds:jaxlab_absent", "Dataset jaxlab_absent not found; prepare it where .* correct the"),
        (
            "tfds:cifar10",
            r"nothing is prepared in .*cifar10/.*; prepare .*`tfds build cifar10 --file",
        ),
    ],
)
def test_a_source_that_is_not_there_is_an_error_that_says_what_to_do(
    spec, message, tmp_path, monkeypatch
):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=message):
        load_images(spec, image_size=8)


def test_tfds_gives_the_images_of_a_prepared_dataset(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)

    class JaxlabPictures(tfds.core.GeneratorBasedBuilder):
        """Five pictures, of which two are held out."""

        VERSION = tfds.core.Version("1.0.0")
        code_path = tfds.core.Path(__file__)

        def _info(self):
            image = tfds.features.Image(shape=(8, 8, 3), encoding_format="png")
            label = tfds.features.ClassLabel(names=["no", "yes"])
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {
                "train": self._generate_examples(0, 3),
                "validation": self._generate_examples(3, 5),
            }

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                file = tmp_path / f"{i}.png"  # given an array, TFDS would encode with TensorFlow
                Image.fromarray(pixels[i]).save(file)
                yield i, {"image": str(file), "label": i % 2}

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    JaxlabPictures(file_format="array_record").download_and_prepare()
    data = load_images("tfds:jaxlab_pictures", image_size=8)
    assert data.classes == ("no", "yes") and (len(data.train), len(data.test)) == (3, 2)
    known = {image.tobytes(): i for i, image in enumerate(pixels)}
    found = [source[i] for source in (data.train, data.test) for i in range(len(source))]
    places = [known[sample["images"].tobytes()] for sample in found]
    assert sorted(places[:3]) == [0, 1, 2] and sorted(places[3:]) == [3, 4]
    assert [int(sample["labels"]) for sample in found] == [place % 2 for place in places]
    assert "tensorflow" not in sys.modules
