"""Sources, the cache of decoded images, and the data sets."""

import hashlib
import pickle
import random
import zipfile
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from written import write_fashion

from caspr_cli.recipe.schema import Source
from caspr_cli.report import provenance, records
from caspr_cli.tasks.base import DataError
from caspr_cli.tasks.images import data, shapes, sources
from caspr_cli.tasks.images.albums import centred
from caspr_cli.tasks.images.data import SPLITS, Gallery
from caspr_cli.tasks.registry import Augment, Images, ImagesConf

PUBLISHED = Path(__file__).parents[3] / "outputs" / "published" / "records" / "fair_resnet.jsonl.gz"


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as file:
        for image in sorted(folder.rglob("*.*")):
            file.write(image, image.relative_to(folder).as_posix())
    return path


def labels_of(dataset):
    return [label for _, label in dataset]


# ---- sample ------------------------------------------------------------------------------------------------------


def test_the_bundled_images_are_those_of_published_records():
    """On any CPU: records of different images are not in one table."""
    runs = records.find([PUBLISHED]).runs
    assert {provenance.data_hash(run) for run in runs} == {Gallery(ImagesConf(name="images")).describe()["hash"]}


def test_sample_has_three_disjoint_splits_whatever_torchs_state(monkeypatch):
    monkeypatch.setattr(sources, "SAMPLE", {"train": 40, "validation": 20, "test": 10})
    before = torch.get_rng_state()
    gallery = Gallery(ImagesConf(name="images"))
    found = {split: gallery.dataset(split) for split in SPLITS}
    assert [len(found[split]) for split in SPLITS] == [40, 20, 10]
    assert gallery.classes == 10
    assert torch.equal(torch.get_rng_state(), before)
    assert len({image.numpy().tobytes() for split in SPLITS for image, _ in found[split]}) == 70


def test_a_linear_model_learns_little_of_the_shapes():
    (train, labels), (test, expected) = shapes.draw(1500, seed=0), shapes.draw(500, seed=1)
    x, y = (torch.from_numpy(part).float().flatten(1) / 255 - 0.5 for part in (train, test))
    targets = torch.nn.functional.one_hot(torch.from_numpy(labels), 10).float() - 0.1
    # ridge regression in its dual form, which is smaller here
    weights = torch.linalg.solve(x @ x.mT + 1000 * torch.eye(len(x)), targets)
    assert ((y @ x.mT @ weights).argmax(1) == torch.from_numpy(expected)).float().mean() < 0.2


# ---- folders and zips --------------------------------------------------------------------------------------------


def test_folder_holds_out_a_tenth_of_each_class(conf):
    gallery = Gallery(conf())
    found = {split: gallery.dataset(split) for split in SPLITS}
    assert labels_of(found["train"]) == [0] * 9 + [1] * 9 + [2] * 9
    assert labels_of(found["validation"]) == [0, 1, 2]
    assert labels_of(found["test"]) == [0, 0, 1, 1, 2, 2]
    image, label = found["test"][3]
    assert image.dtype == torch.uint8
    assert image.shape == (8, 8, 3)
    assert label == 1
    assert 101 <= image.float().mean() < 106  # shade 80 + 21, and noise


def test_labels_are_those_of_torchvisions_image_folder(conf, folder):
    ours = Gallery(conf()).dataset("test")
    theirs = datasets.ImageFolder(str(folder / "test"))
    assert labels_of(ours) == theirs.targets
    for (image, _), (expected, _) in zip(ours, theirs, strict=True):
        assert np.array_equal(image.numpy(), np.asarray(expected))


def test_a_zip_is_the_folder(conf, folder):
    plain, packed = Gallery(conf()), Gallery(conf(root=str(zipped(folder))))
    assert packed.describe() == plain.describe()
    for split in SPLITS:
        for (one, label), (other, same) in zip(plain.dataset(split), packed.dataset(split), strict=True):
            assert torch.equal(one, other)
            assert label == same


def test_grey_and_palette_images_become_three_channels(conf, folder):
    Image.new("L", (8, 8), 200).save(folder / "test" / "cat" / "0.png")
    Image.new("P", (8, 8)).save(folder / "test" / "cat" / "1.png")
    test = Gallery(conf()).dataset("test")
    assert test[0][0].unique().tolist() == [200]
    assert test[1][0].shape == (8, 8, 3)


@pytest.mark.parametrize(("size", "shape"), [((40, 20), (10, 10)), ((20, 40), (10, 10)), ((8, 10), (10, 10))])
def test_centred_keeps_the_middle(size, shape):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    middle = pixels[size[1] // 2 - 3 : size[1] // 2 + 3, size[0] // 2 - 3 : size[0] // 2 + 3]
    middle[:] = 255
    found = np.asarray(centred(Image.fromarray(pixels), shape[0]))
    assert found.shape == (*shape, 3)
    centre = (shape[0] - 1) / 2
    weights = found[..., 0] / found[..., 0].sum()
    for axis in range(2):
        assert (weights.sum(1 - axis) * np.arange(shape[0])).sum() == pytest.approx(centre, abs=0.3)


def test_large_sizes_are_cut_from_an_eighth_more():
    ramp = np.broadcast_to(np.linspace(0, 255, 256)[:, None, None], (256, 256, 3)).astype(np.uint8)
    found = np.asarray(centred(Image.fromarray(ramp), 224))
    assert np.array_equal(found, ramp[16:240, 16:240])  # 224 of 256, as is usual on ImageNet


# ---- files that are opened when they are read --------------------------------------------------------------------


@pytest.fixture
def opened(conf, folder, monkeypatch):
    """A gallery whose images are too many to decode ahead, in a folder or a zip."""
    monkeypatch.setattr(data, "LARGEST_BYTES", 1)
    monkeypatch.setattr(data, "SMALL", 4)

    def make(packed=False, **changes):
        return Gallery(conf(**changes, **({"root": str(zipped(folder))} if packed else {})))

    return make


@pytest.mark.parametrize("packed", [False, True])
def test_images_that_do_not_fit_are_opened_one_by_one(conf, opened, packed, monkeypatch):
    gallery = opened(packed)
    assert not list(gallery.directory.glob("t*n.npy"))
    assert gallery.moments[0].tolist() == pytest.approx(data.IMAGENET_MEAN)
    found = {split: gallery.dataset(split) for split in SPLITS}
    monkeypatch.undo()
    monkeypatch.setenv("CASPR_CACHE", str(gallery.directory.parent.parent / "other"))
    for split in SPLITS:
        decoded = Gallery(conf()).dataset(split)
        assert found[split].reading_costs
        assert not hasattr(decoded, "reading_costs")
        for (one, label), (other, same) in zip(found[split], decoded, strict=True):
            assert torch.equal(one, other)
            assert label == same


@pytest.mark.parametrize("packed", [False, True])
def test_data_sets_go_to_other_processes(opened, packed):
    found = opened(packed).dataset("test")
    found[0]
    pickled = pickle.dumps(found)
    assert len(pickled) < 3000
    assert torch.equal(pickle.loads(pickled)[3][0], found[3][0])


@pytest.mark.parametrize("augment", [Augment.imagenet, Augment.rand_augment])
def test_crops_and_operations_hang_on_torchs_generator_alone(opened, augment):
    dataset = opened(augment=augment).dataset("train")

    def read(seed):
        torch.manual_seed(seed)
        np.random.seed(seed + 1)  # noqa: NPY002  the wrong generators
        random.seed(seed + 2)
        return torch.stack([dataset[i][0] for i in range(8)])

    one = read(0)
    assert one.shape == (8, 8, 8, 3)
    assert one.dtype == torch.uint8
    torch.manual_seed(0)
    assert torch.equal(torch.stack([dataset[i][0] for i in range(8)]), one)
    assert not torch.equal(read(1), one)


def test_whole_images_are_kept_for_random_crops_of_large_ones(conf, monkeypatch):
    monkeypatch.setattr(data, "SMALL", 4)
    assert list(Gallery(conf()).directory.glob("train.npy"))
    cropped = Gallery(conf(augment=Augment.imagenet))
    assert not list(cropped.directory.glob("train.npy"))
    assert Gallery(conf(augment=Augment.rand_augment)).directory == cropped.directory


def test_small_images_are_cropped_from_the_cache(conf):
    gallery = Gallery(conf(augment=Augment.imagenet))
    assert list(gallery.directory.glob("train.npy"))
    assert gallery.dataset("train")[0][0].shape == (8, 8, 3)


# ---- torchvision's data sets -------------------------------------------------------------------------------------


def write_cifar(root, cls, monkeypatch, images=20):
    """A small archive in the form of the real one, under whose md5 torchvision takes it for real."""
    (root / cls.base_folder).mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name, content):
        path = root / cls.base_folder / name
        path.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]

    def batch(name):
        fine = "labels" if cls is datasets.CIFAR10 else "fine_labels"
        pixels = rng.integers(0, 256, (images, 3072), np.uint8)
        return write(name, {"data": pixels, fine: [i % 10 for i in range(images)]})

    for parts in ("train_list", "test_list"):
        monkeypatch.setattr(cls, parts, [batch(name) for name, _ in getattr(cls, parts)], raising=False)
    _, md5 = write(cls.meta["filename"], {cls.meta["key"]: [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5}, raising=False)


@pytest.mark.parametrize(("images", "cls"), [(Images.cifar10, datasets.CIFAR10), (Images.cifar100, datasets.CIFAR100)])
def test_cifar_as_torchvision_leaves_it(tmp_path, monkeypatch, images, cls):
    # torchvision's CIFAR100 inherits train_list from itself; both are restored after the test
    write_cifar(tmp_path, cls, monkeypatch)
    gallery = Gallery(ImagesConf(name="images", data=Source.files, images=images, root=str(tmp_path)))
    theirs = cls(str(tmp_path), train=False)
    test = gallery.dataset("test")
    assert np.array_equal(np.stack([image.numpy() for image, _ in test]), theirs.data)
    assert labels_of(test) == theirs.targets
    batches = 5 if cls is datasets.CIFAR10 else 1
    assert len(gallery.dataset("train")) == 20 * batches - 10 * max(1, batches // 5)
    assert gallery.meta["classes"] == theirs.classes
    assert gallery.describe()["name"] == images.value


def test_fashion_mnist_becomes_three_channels(tmp_path):
    write_fashion(tmp_path)
    conf = ImagesConf(name="images", data=Source.files, images=Images.fashion_mnist, root=str(tmp_path), size=28)
    image, label = Gallery(conf).dataset("test")[3]
    theirs, same = datasets.FashionMNIST(str(tmp_path), train=False)[3]
    assert label == same
    for channel in range(3):
        assert np.array_equal(image[..., channel].numpy(), np.asarray(theirs))


def test_imagenet_labels_are_torchvisions(tmp_path, folder):
    (folder / "test").rename(folder / "val")
    wnids = {name: (name,) for name in ("cat", "dog", "emu")}
    torch.save((wnids, []), folder / "meta.bin")
    conf = ImagesConf(name="images", data=Source.files, images=Images.imagenet, root=str(folder), size=8)
    gallery = Gallery(conf)
    assert labels_of(gallery.dataset("test")) == datasets.ImageNet(str(folder), "val").targets
    assert [len(gallery.dataset(split)) for split in SPLITS] == [27, 3, 6]
    assert gallery.describe()["name"] == "imagenet"


def test_hub_fetches_once_and_then_needs_no_network(monkeypatch, tmp_path):
    def fetch(self):
        if not Path(self.root, "FashionMNIST").exists():
            write_fashion(Path(self.root))

    monkeypatch.setattr(datasets.FashionMNIST, "download", fetch)
    conf = ImagesConf(name="images", data=Source.hub, images=Images.fashion_mnist)
    Gallery(conf).check()
    monkeypatch.setattr(datasets.FashionMNIST, "download", lambda _: pytest.fail("fetched again"))
    assert len(Gallery(conf).dataset("train")) == 30
    assert not list(tmp_path.rglob("*ubyte"))  # what was fetched is not kept twice


OFFLINE = r"the server of cifar10 cannot be reached \(.*no route>?\)\ntake task\.data"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (URLError("no route"), OFFLINE),
        (RuntimeError("Error downloading x.gz:\nTried m, got:\n<urlopen error no route>"), OFFLINE),
        (RuntimeError("File not found or corrupted."), "cifar10: what came from its server has another md5"),
    ],
)
def test_what_does_not_come_from_a_server_as_torchvision_says_it(monkeypatch, error, message):
    monkeypatch.setattr(datasets.CIFAR10, "download", Mock(side_effect=error))
    with pytest.raises(DataError, match=f"^{message}"):
        Gallery(ImagesConf(name="images", data=Source.hub)).check()


@pytest.mark.parametrize("images", [Images.imagenet, Images.folder])
def test_some_are_on_no_hub(images):
    with pytest.raises(DataError, match=rf"^task\.images={images.value}: .*(by hand|no hub)"):
        Gallery(ImagesConf(name="images", data=Source.hub, images=images)).check()


# ---- malformed files ---------------------------------------------------------------------------------------------


def test_a_file_that_went_away_is_named_when_it_is_read(opened, folder):
    test = opened().dataset("test")
    (folder / "test" / "cat" / "0.png").unlink()
    with pytest.raises(DataError, match=r"/pets/test/cat/0\.png cannot be read \(No such file"):
        test[0]


def test_malformed_cifar(tmp_path, monkeypatch):
    write_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    gallery = Gallery(ImagesConf(name="images", data=Source.files, root=str(tmp_path)))
    part = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    part.write_bytes(b"other")
    with pytest.raises(DataError, match=r"^data_batch_3: has another md5 than it should; fetch cifar10 again$"):
        gallery.check()
    part.unlink()
    missing = r"^task\.root: no cifar-10-batches-py/data_batch_3 in .* \(unpacked, as torchvision's CIFAR10"
    with pytest.raises(DataError, match=missing):
        gallery.check()


def test_imagenet_that_was_not_unpacked(tmp_path):
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"")
    conf = ImagesConf(name="images", data=Source.files, images=Images.imagenet, root=str(tmp_path))
    with pytest.raises(DataError, match=r"^task\.root: no folder train in .*\nunpack its tars"):
        Gallery(conf).check()


# ---- the cache ---------------------------------------------------------------------------------------------------


def test_damaged_list_is_named(opened):
    gallery = opened()
    (gallery.directory / "test.json").write_text('["test/cat')
    with pytest.raises(DataError, match=r"test\.json: damaged; delete"):
        gallery.dataset("test")


def test_moments_are_those_of_the_training_pixels(conf):
    gallery = Gallery(conf())
    pixels = torch.stack([image for image, _ in gallery.dataset("train")]).double().flatten(0, 2) / 255
    torch.testing.assert_close(gallery.moments[0].double(), pixels.mean(0))
    torch.testing.assert_close(gallery.moments[1].double(), pixels.std(0, correction=0))


def test_hash_covers_pixels_labels_and_classes(conf, folder):
    hashes = [Gallery(conf()).describe()["hash"]]
    for change in (
        lambda: Image.new("RGB", (8, 8)).save(folder / "test" / "cat" / "0.png"),
        lambda: (folder / "test" / "cat" / "1.png").rename(folder / "test" / "dog" / "1a.png"),
        lambda: [(folder / split / "emu").rename(folder / split / "fox") for split in ("train", "test")],
    ):
        change()
        hashes.append(Gallery(conf()).describe()["hash"])
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("top", ["", "pets/"])
def test_folders_of_classes_without_splits_are_dealt_out_by_name(top):
    entries = [f"{top}{group}/{i}.png" for group in ("cat", "dog") for i in range(30)] + ["README.md"]
    found = sources.sort_out(entries if not top else entries[:-1], "pets")
    for group in ("cat", "dog"):
        parts = [found[split][group] for split in ("train", "validation", "test")]
        assert [len(part) for part in parts] == [24, 3, 3]
        assert sorted(sum(parts, [])) == sorted(name for name in entries if group in name)  # noqa: RUF017
        names = {name.rpartition("/")[2] for name in parts[1]}
        assert names == {name.rpartition("/")[2] for name in found["validation"]["dog"]}  # whatever the class is called
    with pytest.raises(DataError, match="the class 'dog' has fewer than 3 images, one for each split"):
        sources.sort_out([*entries[:30], f"{top}dog/1.png", f"{top}dog/2.png"], "pets")
