"""Chapter 6 of diffuser.py: the datasets in their real on-disk formats, the cache, batches, moments."""

import bz2
import gzip
import inspect
import io
import json
import os
import pickle
import struct
import zipfile

import filelock
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, tiny_training
from PIL import Image
from sklearn.datasets import load_digits

import diffuser
from diffuser import Batches, ImageData, UserError, configure, load_data
from diffuser_lib.images import from_uint8

SHIPPED = ROOT / "data" / "digits.npz"


def write_idx(path, array, compressed):
    """MNIST's file format: magic number, sizes, bytes."""
    content = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    (gzip.open(f"{path}.gz", "wb") if compressed else open(path, "wb")).write(content)


def test_digits_are_shipped():
    """The digits load from the repository wherever the program runs, labelled, in 0..255."""
    data = load_data(configure(dataset="digits", data_dir="nowhere"))
    assert data.images.shape == (1797, 1, 8, 8) and data.images.dtype == torch.uint8 and data.images.max() == 255
    assert data.class_names == list("0123456789") and data.labels[:10].tolist() == list(range(10))


def test_mnist_from_idx_files(tmp_path):
    """mnist reads torchvision's raw files, without a network."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = np.random.default_rng(0).integers(0, 256, (60, 28, 28), np.uint8), np.arange(60, dtype=np.uint8) % 10
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels),
                        ("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)):
        write_idx(raw / name, array, compressed=False)
    data = load_data(configure(dataset="mnist", data_dir=str(tmp_path)))
    assert np.array_equal(data.images[:, 0].numpy(), images) and data.labels.tolist() == labels.tolist()
    bigger = load_data(configure(dataset="mnist", data_dir=str(tmp_path), img_size=(32, 32), channels=3, num_workers=0))
    assert bigger.images.shape == (60, 3, 32, 32) and bigger.labels.tolist() == labels.tolist()


def test_cifar10_from_python_batches(tmp_path, monkeypatch):
    """cifar10 and cifar10_optimized read the pickled batches of cifar-10-python.tar.gz."""
    home, images = tmp_path / "cifar-10-batches-py", np.random.default_rng(0).integers(0, 256, (5, 4, 3072), np.uint8)
    home.mkdir()
    for i in range(5):
        (home / f"data_batch_{i + 1}").write_bytes(pickle.dumps({"data": images[i], "labels": [0, 1, 2, 3 + i]}))
    (home / "test_batch").write_bytes(pickle.dumps({"data": images[0], "labels": [0, 1, 2, 3]}))
    (home / "batches.meta").write_bytes(pickle.dumps({"label_names": list(diffuser.CIFAR10)}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *a: True)
    for name in ("cifar10", "cifar10_optimized"):
        data = load_data(configure(dataset=name, data_dir=str(tmp_path)))
        assert np.array_equal(data.images.numpy().reshape(20, 3072), images.reshape(20, 3072))
        assert data.labels[:5].tolist() == [0, 1, 2, 3, 0] and data.class_names[3] == "cat"


def test_celeba_from_its_files(tmp_path, monkeypatch):
    """celeba reads the aligned JPEGs and list files, training part only, cropped to a square of 64."""
    home = tmp_path / "celeba"
    (home / "img_align_celeba").mkdir(parents=True)
    names = [f"{i:06}.jpg" for i in range(1, 7)]
    for i, name in enumerate(names):
        Image.new("RGB", (178, 218), (40 * i, 0, 0)).save(home / "img_align_celeba" / name)
    (home / "list_eval_partition.txt").write_text("".join(f"{n} {0 if i < 4 else 1}\n" for i, n in enumerate(names)))
    (home / "identity_CelebA.txt").write_text("".join(f"{n} {i}\n" for i, n in enumerate(names)))
    (home / "list_attr_celeba.txt").write_text("6\nSmiling Young\n" + "".join(f"{n} 1 -1\n" for n in names))
    (home / "list_bbox_celeba.txt").write_text("6\nimage_id x_1 y_1 width height\n" + "".join(f"{n} 1 2 3 4\n" for n in names))
    (home / "list_landmarks_align_celeba.txt").write_text("6\nx y\n" + "".join(f"{n} 1 2\n" for n in names))
    monkeypatch.setattr(torchvision.datasets.CelebA, "_check_integrity", lambda self: True)
    data = load_data(configure(dataset="celeba", data_dir=str(tmp_path), num_workers=0))
    assert data.images.shape == (4, 3, 64, 64) and data.class_names == []
    assert data.images[3, 0].float().mean() == pytest.approx(120, abs=3)


@pytest.mark.parametrize("dataset, words", [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-python.tar.gz"), ("celeba", "img_align_celeba"),
                                            ("kmnist", "KMNIST/raw"), ("pets", "oxford-iiit-pet"), ("eurosat", "2750")])
def test_without_a_network_the_message_says_what_to_put_where(tmp_path, dataset, words, monkeypatch):
    """A download that fails is an error that names the files and the folder."""
    def fail(*arguments, **options):
        raise OSError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", fail)
    for module in (torchvision.datasets.celeba,):
        monkeypatch.setattr(module, "download_file_from_google_drive", fail)
    with pytest.raises(UserError) as error:
        load_data(configure(dataset=dataset, data_dir=str(tmp_path)))
    assert words in str(error.value) and str(tmp_path) in str(error.value)

# ---- What torchvision has ----------------------------------------------------------------------


def pixels(*shape):
    return np.random.default_rng(1).integers(0, 256, shape, np.uint8)


def flat_picture(path, brightness, side=70):
    """A picture of one brightness, which JPEG keeps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (brightness, brightness, brightness)).save(path)


def write_idx_pairs(names, first=0):
    """Files like MNIST's; labels count from `first`."""
    def write(root):
        raw = root / names[0]
        raw.mkdir(parents=True)
        for part in names[1:]:
            write_idx(raw / f"{part}-images-idx3-ubyte", pixels(6, 28, 28), compressed=False)
            write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(first, first + 6, dtype=np.uint8), compressed=False)
        return pixels(6, 1, 28, 28)
    return write


def write_emnist(root):
    write_idx_pairs(("EMNIST/raw", "emnist-letters-train", "emnist-letters-test"), first=1)(root)
    return pixels(6, 28, 28).transpose(0, 2, 1)[:, None]


def write_qmnist(root):
    raw = root / "QMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "test"):
        write_idx(raw / f"qmnist-{part}-images-idx3-ubyte", pixels(6, 28, 28), compressed=False)
        labels = np.zeros((6, 8), ">i4")
        labels[:, 0] = range(6)
        header = struct.pack(">HBB", 0, 12, 2) + struct.pack(">2I", *labels.shape)
        (raw / f"qmnist-{part}-labels-idx2-int").write_bytes(header + labels.tobytes())
    return pixels(6, 1, 28, 28)


def write_usps(root):
    lines = [f"{i + 1} " + " ".join(f"{j + 1}:{v}" for j, v in enumerate(np.full(256, -1 + 2 * (i % 2)))) for i in range(6)]
    for name in ("usps.bz2", "usps.t.bz2"):
        (root / name).write_bytes(bz2.compress("\n".join(lines).encode()))
    return np.repeat(np.array([0, 255] * 3, np.uint8), 256).reshape(6, 1, 16, 16)


def write_semeion(root):
    bits = np.random.default_rng(1).integers(0, 2, (6, 256))
    np.savetxt(root / "semeion.data", np.concatenate([bits, np.eye(10, dtype=int)[:6]], 1), fmt="%d")
    return (bits * 255).astype(np.uint8).reshape(6, 1, 16, 16)


def write_cifar100(root):
    home = root / "cifar-100-python"
    home.mkdir()
    for part in ("train", "test"):
        (home / part).write_bytes(pickle.dumps({"data": pixels(6, 3072), "fine_labels": list(range(6))}))
    (home / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"thing {i}" for i in range(100)]}))
    return pixels(6, 3072).reshape(6, 3, 32, 32)


def write_svhn(root):
    for part in ("train", "test"):
        content = dict(X=pixels(6, 3, 32, 32).transpose(2, 3, 1, 0), y=np.array([10, 1, 2, 3, 4, 5])[:, None])
        pytest.importorskip("scipy.io").savemat(root / f"{part}_32x32.mat", content)
    return pixels(6, 3, 32, 32)


def write_stl10(root):
    home = root / "stl10_binary"
    home.mkdir()
    for part in ("train", "test"):
        (home / f"{part}_X.bin").write_bytes(pixels(6, 3, 96, 96).transpose(0, 1, 3, 2).tobytes())
        (home / f"{part}_y.bin").write_bytes(bytes(range(1, 7)))
    return pixels(6, 3, 96, 96)


def write_flowers102(root):
    io = pytest.importorskip("scipy.io")
    home = root / "flowers-102"
    for i in range(6):
        flat_picture(home / "jpg" / f"image_{i + 1:05}.jpg", 40 * i)
    io.savemat(home / "setid.mat", dict(trnid=[[1, 2]], valid=[[3, 4]], tstid=[[5, 6]]))
    io.savemat(home / "imagelabels.mat", dict(labels=[[1, 2, 3, 4, 5, 6]]))


def write_food101(root):
    home = root / "food-101"
    (home / "meta").mkdir(parents=True)
    names = {f"dish{i}": [f"dish{i}/1"] for i in range(6)}
    for i in range(6):
        flat_picture(home / "images" / f"dish{i}" / "1.jpg", 40 * i)
    for part in ("train", "test"):
        (home / "meta" / f"{part}.json").write_text(json.dumps(names))


def write_pets(root):
    home = root / "oxford-iiit-pet"
    (home / "annotations").mkdir(parents=True)
    lines = [f"breed_{i}_7 {i + 1} 1 1" for i in range(6)]
    for i in range(6):
        flat_picture(home / "images" / f"breed_{i}_7.jpg", 40 * i)
    for part in ("trainval", "test"):
        (home / "annotations" / f"{part}.txt").write_text("\n".join(lines))


def write_gtsrb(root):
    home = root / "gtsrb"
    rows = ["Filename;ClassId"]
    for i in range(6):
        flat_picture(home / "GTSRB" / "Training" / f"{i:05}" / "0.ppm", 40 * i)
        flat_picture(home / "GTSRB" / "Final_Test" / "Images" / f"{i}.ppm", 40 * i)
        rows.append(f"{i}.ppm;{i}")
    (home / "GT-final_test.csv").write_text("\n".join(rows))


def write_eurosat(root):
    for i in range(6):
        flat_picture(root / "eurosat" / "2750" / f"Land{i}" / f"Land{i}_1.jpg", 40 * i)


def write_aircraft(root):
    data = root / "fgvc-aircraft-2013b" / "data"
    for i in range(6):
        flat_picture(data / "images" / f"{i}.jpg", 40 * i)
    (data / "variants.txt").write_text("\n".join(f"Model {i}" for i in range(6)))
    for part in ("trainval", "test"):
        (data / f"images_variant_{part}.txt").write_text("\n".join(f"{i} Model {i}" for i in range(6)))


def write_dtd(root):
    home = root / "dtd" / "dtd"
    (home / "labels").mkdir(parents=True)
    for i in range(6):
        flat_picture(home / "images" / f"kind{i}" / "1.jpg", 40 * i)
    names = [f"kind{i}/1.jpg" for i in range(6)]
    for part in ("train", "test"):
        (home / "labels" / f"{part}1.txt").write_text("\n".join(names))
    (home / "labels" / "val1.txt").write_text("")


def write_imagenette(root):
    kinds = sorted(torchvision.datasets.Imagenette._WNID_TO_CLASS)[:6]
    for part in ("train", "val"):
        for i, kind in enumerate(kinds):
            flat_picture(root / "imagenette2-160" / part / kind / "1.jpeg", 40 * i)


WRITERS = {
    "fashion_mnist": write_idx_pairs(("FashionMNIST/raw", "train", "t10k")), "kmnist": write_idx_pairs(("KMNIST/raw", "train", "t10k")),
    "emnist": write_emnist, "qmnist": write_qmnist, "usps": write_usps, "semeion": write_semeion, "cifar100": write_cifar100,
    "svhn": write_svhn, "stl10": write_stl10, "flowers102": write_flowers102, "food101": write_food101, "pets": write_pets,
    "gtsrb": write_gtsrb, "eurosat": write_eurosat, "fgvc_aircraft": write_aircraft, "dtd": write_dtd,
    "imagenette": write_imagenette}
FIRST_CLASSES = {
    "fashion_mnist": "T-shirt or top", "kmnist": "o", "emnist": "a", "cifar100": "thing 0", "stl10": "airplane",
    "flowers102": "pink primrose", "food101": "dish0", "pets": "Breed 0", "gtsrb": "20 km/h", "eurosat": "Land0",
    "fgvc_aircraft": "Model 0", "dtd": "kind0", "imagenette": "tench"}


@pytest.mark.parametrize("dataset", WRITERS)
def test_what_torchvision_has_in_its_own_files(dataset, tmp_path, monkeypatch):
    """Pixels, upright and in order, labels from 0 on and names of classes, from files as they are published; the test part
    where there is one."""
    expected = WRITERS[dataset](tmp_path)
    spec = diffuser.DATASETS[dataset]
    monkeypatch.setattr(torchvision.datasets.utils, "check_integrity", lambda path, md5=None: os.path.isfile(path))
    for name in ("cifar", "svhn", "stl10", "semeion", "flowers102", "mnist"):
        monkeypatch.setattr(getattr(torchvision.datasets, name), "check_integrity", lambda path, md5=None: os.path.isfile(path))
    kind = getattr(torchvision.datasets, spec.download.name)
    if dataset in ("cifar100", "stl10", "svhn", "semeion"):
        monkeypatch.setattr(kind, "_check_integrity", lambda self: True)

    cfg = configure(dataset=dataset, data_dir=str(tmp_path), num_workers=0, img_size=spec.shape[1:])
    for train in (True, False) if spec.has_test else (True,):
        data = load_data(cfg, train)
        assert tuple(data.images.shape[1:]) == spec.shape and data.images.dtype == torch.uint8
        assert data.labels.tolist() == list(range(6))
        assert data.class_names[0] == FIRST_CLASSES.get(dataset, "0") and len(data.class_names) > 5
        if expected is None:
            expected = np.broadcast_to(40 * np.arange(6).reshape(6, 1, 1, 1), data.images.shape)
        assert np.abs(data.images.numpy().astype(int) - expected).max() <= 1

    small = load_data(configure(dataset=dataset, data_dir=str(tmp_path), num_workers=0, img_size=8, patch_size=1, channel_mults=(1,)))
    assert tuple(small.images.shape[2:]) == (8, 8) and small.class_names == data.class_names


def test_the_table_of_datasets_agrees_with_torchvision():
    """Every entry names a dataset that torchvision has, and parts of it by options that it takes; none was forgotten here."""
    with_download = {name: spec for name, spec in diffuser.DATASETS.items() if spec.download}
    assert set(with_download) == {*WRITERS, "mnist", "cifar10", "cifar10_optimized"}
    for name, spec in with_download.items():
        kind = getattr(torchvision.datasets, spec.download.name)
        known = set(inspect.signature(kind.__init__).parameters)
        if issubclass(kind, torchvision.datasets.MNIST):
            known.add("train")
        for options in spec.download.train + spec.download.test:
            assert set(options) <= known, name
        assert spec.class_count > 1 and spec.num_images > 1000 and diffuser.settings_name(name) in diffuser.BEST
        assert not spec.has_test or spec.download.test


@pytest.mark.parametrize("dataset", WRITERS)
def test_datasets_take_the_settings_of_one_that_is_like_them(dataset):
    """Grey ones those of mnist, small colour ones those of cifar10, pictures those of a folder; so does --recipe best."""
    spec = diffuser.DATASETS[dataset]
    for recipe in ("", "best"):
        ours = vars(configure(dataset=dataset, recipe=recipe, device="cpu"))
        theirs = vars(configure(dataset=spec.like, recipe=recipe, device="cpu"))
        assert {**ours, "dataset": ""} == {**theirs, "dataset": ""}
    assert (spec.shape[0] == 1) == (spec.like == "mnist")


def test_a_missing_package_of_torchvision_is_told(tmp_path, monkeypatch):
    """Where torchvision wants scipy: one line that says how to get it, and none about files."""
    def fail(*arguments, **options):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")
    monkeypatch.setattr(torchvision.datasets, "SVHN", fail)
    with pytest.raises(UserError, match=r"^SVHN takes scipy: pip install scipy$"):
        load_data(configure(dataset="svhn", data_dir=str(tmp_path)))


# ---- Folders and ZIP files ---------------------------------------------------------------------


def folder_config(path, tmp_path, **more):
    return configure(**{**dict(dataset="folder", path_to_data=str(path), data_dir=str(tmp_path / "data"), img_size=(16, 16),
                               num_workers=0), **more})


def test_folder_of_class_subfolders(image_folder, tmp_path):
    """Every format is read, subfolders are classes, and the images are those on disk."""
    data = load_data(folder_config(image_folder, tmp_path))
    assert data.images.shape == (12, 3, 16, 16) and data.class_names == ["cat", "dog"]
    assert data.labels.tolist() == [0] * 6 + [1] * 6
    means = data.images.float().mean((1, 2, 3))
    assert means[:6].max() < 70 and means[6:].min() > 120


def test_flat_folder_has_no_classes(image_folder, tmp_path):
    """Images side by side in one folder have no classes, and asking for labels says why there are none."""
    assert load_data(folder_config(image_folder / "cat", tmp_path)).class_names == []
    with pytest.raises(UserError, match="no classes"):
        load_data(folder_config(image_folder / "cat", tmp_path, use_labels=True))


def test_grey_images_make_a_grey_dataset(tmp_path):
    """Channels follow the images unless --channels says otherwise."""
    (tmp_path / "p").mkdir()
    Image.new("L", (20, 20), 77).save(tmp_path / "p" / "a.png")
    assert load_data(folder_config(tmp_path / "p", tmp_path)).images.shape[1] == 1
    assert load_data(folder_config(tmp_path / "p", tmp_path, channels=3)).images.shape[1] == 3


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_folder_without_images_is_refused(tmp_path, what):
    """No folder, or nothing in it: one line that says so."""
    if what == "empty":
        (tmp_path / what).mkdir()
    with pytest.raises(UserError, match=what):
        load_data(folder_config(tmp_path / what, tmp_path))


def test_a_class_name_that_no_checkpoint_holds_is_told_before_training():
    """Text in place of a label would be trained on, and its checkpoint refused."""
    data = diffuser.ImageData(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), ["cat", "x" * 1001])
    with pytest.raises(diffuser.UserError, match="1,001 characters, 1,000 at"):
        diffuser.select_labels(diffuser.configure(dataset="folder"), data)
    assert diffuser.select_labels(diffuser.configure(dataset="folder", use_labels=False), data).class_names == []


def numbered(n=50):
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 4, 4).clone()
    return ImageData(images, torch.arange(n), [str(i) for i in range(n)])


def test_batches_are_a_function_of_the_step():
    """Any step can be had at any time; an epoch sees every image once; epochs differ."""
    data = numbered()
    def make():
        return Batches(data, torch.arange(50), 10, False, 3, "cpu")
    forward = [make()(s)[1].tolist() for s in range(10)]
    one = make()
    assert [one(s)[1].tolist() for s in (7, 2, 9)] == [forward[s] for s in (7, 2, 9)]
    assert sorted(sum(forward[:5], [])) == list(range(50)) == sorted(sum(forward[5:], []))
    assert forward[:5] != forward[5:]
    x0, y = one(0)
    assert torch.equal(x0[:, 0, 0, 0], y / 127.5 - 1)


def test_devices_share_a_batch():
    """Two processes see the two halves of the batch that one process sees, flips included."""
    data = ImageData(torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8), torch.arange(50), [])
    def make(rank, world):
        return Batches(data, torch.arange(50), 9, True, 3, "cpu", rank, world)(2)
    whole, parts = make(0, 1), [make(r, 2) for r in range(2)]
    assert torch.equal(whole[0], torch.cat([p[0] for p in parts])) and torch.equal(whole[1], torch.cat([p[1] for p in parts]))


def test_flips_mirror_about_half_of_the_images():
    """With flips on, images are mirrored left to right, about half of them; off, none."""
    images = torch.zeros(200, 1, 1, 2, dtype=torch.uint8)
    images[..., 0] = 255
    data = ImageData(images, torch.zeros(200, dtype=torch.long), [])
    def mirrored(flip):
        return (Batches(data, torch.arange(200), 200, flip, 0, "cpu")(0)[0][:, 0, 0, 0] < 0).sum().item()
    assert mirrored(False) == 0 and 70 < mirrored(True) < 130


def test_random_crops_are_a_function_of_the_step():
    """--random_crop: crops of the right size at every place of the margin, the same for any number of processes; the
    held-out images and the moments are of the middle."""
    pixels = torch.arange(9 * 9, dtype=torch.uint8).view(1, 1, 9, 9).repeat(64, 1, 1, 1)
    data = diffuser.crop_to_middle(ImageData(pixels, torch.arange(64), []), 8, 8)
    assert data.images.shape == (64, 1, 8, 8) and torch.equal(data.images, pixels[:, :, :8, :8])

    def make(rank=0, world=1):
        return Batches(data, torch.arange(64), 63, False, 3, "cpu", rank, world)

    x0, y = make()(5)
    corners = ((x0[:, 0, 0, 0] + 1) * 127.5).round().int()
    assert x0.shape == (63, 1, 8, 8) and set(corners.tolist()) == {0, 1, 9, 10}
    for image, corner in zip(x0, corners.tolist()):
        top, left = divmod(corner, 9)
        assert torch.equal(image, diffuser.from_uint8(pixels[0, :, top : top + 8, left : left + 8]))
    assert torch.equal(torch.cat([make(rank, 2)(5)[0] for rank in range(2)]), x0)
    assert torch.equal(make()(5)[0], x0) and not torch.equal(make()(6)[0], x0)


def test_images_to_crop_are_decoded_larger(image_folder, tmp_path):
    """With --random_crop the cache has an eighth more on each side; what is trained keeps its size."""
    data = load_data(folder_config(image_folder, tmp_path, random_crop=True))
    assert data.images.shape == (12, 3, 16, 16) and data.uncropped.shape == (12, 3, 18, 18)
    assert torch.equal(data.images, data.uncropped[:, :, 1:17, 1:17])
    without = load_data(folder_config(image_folder, tmp_path, random_crop=True, use_labels=False))
    assert without.class_names == [] and without.uncropped is not None
    cfg = tiny_training(random_crop=True, batch_size=200)
    x0, _ = diffuser.Trainer(cfg, diffuser.Devices(cfg)).batches(0)
    assert x0.shape == (200, 1, 8, 8)


def test_a_set_smaller_than_a_batch_still_trains():
    """Five images and a batch of twelve: the images repeat."""
    x0, y = Batches(numbered(5), torch.arange(5), 12, False, 0, "cpu")(3)
    assert len(x0) == 12 and set(y.tolist()) == set(range(5))


def test_moments_are_those_of_the_data():
    """Mean and variance per class and over all, at reduced size for large images."""
    data = load_data(configure(dataset="digits"))
    moments = diffuser.image_moments(data, torch.arange(1797), flip=False)
    x = diffuser.from_uint8(data.images)
    assert torch.allclose(moments.mean[-1], x.mean(0), atol=1e-5) and torch.allclose(
        moments.var[-1], x.var(0, correction=0), atol=1e-4)
    threes = x[data.labels == 3]
    assert torch.allclose(moments.mean[3], threes.mean(0), atol=1e-5)
    assert torch.allclose(moments.var[3], threes.var(0, correction=0), atol=1e-4)
    large = ImageData(torch.zeros(2, 3, 128, 256, dtype=torch.uint8), torch.zeros(2, dtype=torch.long), [])
    assert diffuser.image_moments(large, torch.arange(2), False).mean.shape == (1, 3, 64, 64)
    mirrored = diffuser.image_moments(data, torch.arange(1797), flip=True).mean
    assert torch.allclose(mirrored, mirrored.flip(-1), atol=1e-6)


def test_moments_stay_small_and_sound():
    """With many classes the moments are coarser, a megabyte or so; a class of few images has the moments of all."""
    many = ImageData(torch.randint(0, 256, (600, 3, 64, 64), dtype=torch.uint8), torch.arange(600) % 200, [str(i) for i in range(200)])
    moments = diffuser.image_moments(many, torch.arange(600), False)
    assert len(moments.mean) == 201 and moments.mean.numel() <= 2**20 and moments.mean.shape[-1] > 16
    assert torch.equal(moments.mean[7], moments.mean[-1]) and torch.equal(moments.var[7], moments.var[-1])


def test_moments_of_large_images_are_taken_a_few_at_a_time(monkeypatch):
    """A thousand images of 256x256 as floats would take gigabytes; the sums are the same however many are taken at once."""
    data = ImageData(torch.randint(0, 256, (30, 3, 256, 256), dtype=torch.uint8), torch.arange(30) % 2, ["a", "b"])
    whole = diffuser.image_moments(ImageData(data.images[:, :, :64, :64], data.labels, data.class_names), torch.arange(30), False)
    sizes = []
    monkeypatch.setattr(diffuser, "from_uint8", lambda images: sizes.append(images.numel()) or from_uint8(images))
    diffuser.image_moments(data, torch.arange(30), False)
    assert max(sizes) <= 2**20 and len(sizes) == 6
    x = from_uint8(data.images[:, :, :64, :64]).double()
    for row, chosen in enumerate((data.labels == 0, data.labels == 1, data.labels >= 0)):
        assert torch.allclose(whole.mean[row], x[chosen].mean(0).float(), atol=1e-6)


def test_held_out_images_are_not_trained_on():
    """The held-out part is disjoint from the rest, at most a thousand, the same every time."""
    data = numbered(200)
    train, held_out = diffuser.split(data, 0.1)
    assert len(held_out) == 20 and sorted([*train.tolist(), *held_out.tolist()]) == list(range(200))
    assert torch.equal(diffuser.split(data, 0.1)[1], held_out)


def test_real_mnist(real_data):
    """The real files give 60,000 images and the first label 5."""
    data = load_data(configure(dataset="mnist", data_dir=str(real_data)))
    assert data.images.shape == (60_000, 1, 28, 28) and data.labels[0] == 5


def test_real_cifar10_zip(real_data, tmp_path):
    """Ten thousand JPEGs in a ZIP, classes by folder, read in place."""
    data = load_data(folder_config(real_data / "cifar10-jpg-test.zip", tmp_path, img_size=(32, 32), num_workers=2))
    assert data.images.shape == (10_000, 3, 32, 32) and data.class_names == list(diffuser.CIFAR10)
    assert torch.bincount(data.labels).tolist() == [1000] * 10


def test_importing_touches_nothing(tmp_path):
    """Importing diffuser writes nothing and needs none of the optional packages."""
    import subprocess
    import sys

    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import diffuser; print([m for m in ('wandb', 'tensorboard', "
            "'diffusers', 'safetensors', 'matplotlib', 'torchvision') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and not list(tmp_path.iterdir())


def test_names_in_a_zip_file_lead_nowhere(folder, capsys):
    """Entries and class names with dots and slashes are names of classes, and no file is made outside the output."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    (folder / "run").mkdir()
    os.chdir(folder / "run")
    with zipfile.ZipFile("evil.zip", "w") as archive:
        for i, name in enumerate(("../../up", "/abs/olute", "a/..", "c:\\win", "x" * 300, "plain", "\x1b[31m")):
            for j in range(4):
                archive.writestr(f"{name}/{i}{j}.png", picture.getvalue())
    path = diffuser.train(tiny_training(dataset="folder", path_to_data="evil.zip", img_size=(8, 8), batch_size=4, val_fraction=0.0))
    assert "20 images 8x8x3, 5 classes" in capsys.readouterr().out           # entries with dots are left out
    state = diffuser.load_checkpoint(path)
    torch.save({**state, "class_names": ["..", "../../up", "/abs/olute", "y" * 300, "a\0b"]}, path)
    assert diffuser.main(["--mode", "inference", "--model_path", str(path), "--num_images", "5", "--steps", "1", "--save_dir", "out"]) == 0
    assert sorted(name[7:] for name in os.listdir("out/images")) == ["_.._up.png", "_abs_olute.png", "a_b.png", "class.png", "y" * 50 + ".png"]
    assert os.listdir(folder) == ["run"]


def test_a_cache_larger_than_the_disk_is_refused(image_folder, tmp_path, monkeypatch):
    """Before decoding, not when the disk is full."""
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("diffuser_lib.images.shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="data_dir"):
        load_data(folder_config(image_folder, tmp_path))


@pytest.mark.parametrize("dataset, file", [("digits", "digits.npz"), ("mnist", "MNIST/raw/train-images-idx3-ubyte"), ("folder", "pictures.zip")])
def test_damaged_datasets_are_told(tmp_path, dataset, file):
    """A shipped or downloaded file that is broken: one error that names it or what to put there."""
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"PK\3\4 and then nothing")
    path = str(tmp_path / file) if dataset == "folder" else ""
    with pytest.raises(UserError):
        load_data(configure(dataset=dataset, data_dir=str(tmp_path), path_to_data=path))


def test_digits_are_those_of_scikit_learn():
    """Image for image and label for label the source's, scaled from 0..16 to 0..255."""
    source = load_digits()
    with np.load(SHIPPED) as shipped:
        assert sorted(shipped) == ["images", "labels"]
        images, labels = shipped["images"], shipped["labels"]
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8)
    assert labels.dtype == np.int64 and labels.shape == (1797,)
    np.testing.assert_array_equal(images, np.round(source.images * 255 / 16))
    np.testing.assert_array_equal(labels, source.target)
    assert images.min() == 0 and images.max() == 255


def test_digits_file_is_small():
    """The repository stays light: the shipped data set takes less than 100 kB."""
    assert SHIPPED.stat().st_size < 100_000


def test_what_is_there_is_not_downloaded_again_and_leaves_no_lock(folder, monkeypatch):
    """A data folder may be read-only; where something is missing, one run downloads it and others wait for it."""
    torchvision = pytest.importorskip("torchvision")
    asked = []

    class Absent:
        def __init__(self, root, download, **options):
            asked.append((download, (folder / "data/.MNIST.lock").exists()))
            if not download:
                raise RuntimeError("Dataset not found")

    cfg = diffuser.configure(dataset="mnist")
    monkeypatch.setattr(torchvision.datasets, "MNIST", Absent)
    diffuser.torchvision_dataset("MNIST", cfg, "files", "place", train=True)
    assert asked == [(False, False), (True, True)]

    (folder / "data/.MNIST.lock").unlink(missing_ok=True)
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda root, download, train: "images")
    assert diffuser.torchvision_dataset("MNIST", cfg, "files", "place", train=True) == "images"

    assert list((folder / "data").iterdir()) == []

    # Where the folder and its lock are others', who have them for all to read.
    (folder / "data/.MNIST.lock").touch()

    def no_lock(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(filelock, "FileLock", no_lock)
    assert diffuser.torchvision_dataset("MNIST", cfg, "files", "place", train=True) == "images"
