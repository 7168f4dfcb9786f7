"""Chapter 6: the datasets in their real on-disk formats, the cache, batches, moments."""

import gzip
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, tiny_training
from PIL import Image

import diffuser
from diffuser import Batches, ImageData, UserError, configure, load_data


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


@pytest.mark.parametrize("dataset, words", [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-python.tar.gz"), ("celeba", "img_align_celeba")])
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


def test_zip_equals_folder(image_folder, tmp_path):
    """A ZIP file is read in place and gives the same images and classes; so does one with a folder around it."""
    plain = load_data(folder_config(image_folder, tmp_path))
    for prefix in ("", "set/train/"):
        path = tmp_path / f"pictures{len(prefix)}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(image_folder.rglob("*.*")):
                archive.write(file, prefix + file.relative_to(image_folder).as_posix())
            archive.writestr("__MACOSX/cat/._0.png", b"rubbish")
        data = load_data(folder_config(path, tmp_path))
        assert torch.equal(data.images, plain.images) and data.class_names == plain.class_names
        assert torch.equal(data.labels, plain.labels)


def test_flat_folder_has_no_classes(image_folder, tmp_path):
    """Images side by side in one folder have no classes, and asking for labels says why there are none."""
    assert load_data(folder_config(image_folder / "cat", tmp_path)).class_names == []
    with pytest.raises(UserError, match="no classes"):
        load_data(folder_config(image_folder / "cat", tmp_path, use_labels=True))


def test_images_are_cropped_and_never_squashed(tmp_path):
    """A wide picture with a square in its middle: the square fills the result; HxW is height by width."""
    (tmp_path / "p").mkdir()
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    picture.save(tmp_path / "p" / "a.png")
    data = load_data(folder_config(tmp_path / "p", tmp_path))
    assert data.images[0, 2].float().mean() > 245
    wide = load_data(folder_config(tmp_path / "p", tmp_path, img_size=(16, 48)))
    assert wide.images.shape == (1, 3, 16, 48) and 75 < wide.images[0, 2].float().mean() < 95


def test_grey_alpha_palette_and_deep_images(tmp_path):
    """Transparent on white, palette in its colours, 16 bits scaled to 8, animation by its first frame."""
    home = tmp_path / "p"
    home.mkdir()
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(home / "a.png")
    Image.new("RGB", (20, 20), (0, 255, 0)).quantize(4).save(home / "b.gif")
    Image.fromarray(np.full((20, 20), 32896, np.uint16)).save(home / "c.png")
    Image.new("L", (20, 20), 0).save(home / "d.gif", save_all=True, append_images=[Image.new("L", (20, 20), 255)])
    data = load_data(folder_config(home, tmp_path))
    assert data.images.float().mean((2, 3)).round().tolist() == [[255] * 3, [0, 255, 0], [128] * 3, [0] * 3]


def test_grey_images_make_a_grey_dataset(tmp_path):
    """Channels follow the images unless --channels says otherwise."""
    (tmp_path / "p").mkdir()
    Image.new("L", (20, 20), 77).save(tmp_path / "p" / "a.png")
    assert load_data(folder_config(tmp_path / "p", tmp_path)).images.shape[1] == 1
    assert load_data(folder_config(tmp_path / "p", tmp_path, channels=3)).images.shape[1] == 3


def test_unreadable_images_are_skipped_and_listed(image_folder, tmp_path, capsys):
    """A broken file among good ones is left out, named and listed; too many of them are an error."""
    (image_folder / "cat" / "broken.png").write_bytes(b"not a picture")
    data = load_data(folder_config(image_folder, tmp_path))
    assert len(data.images) == 12 and data.labels.tolist() == [0] * 6 + [1] * 6
    assert "broken.png" in capsys.readouterr().out
    listing = next((tmp_path / "data" / "cache").glob("*.unreadable.txt"))
    assert listing.read_text().startswith("cat/broken.png: cannot identify image file") and listing.read_text().count("\n") == 1
    for i in range(3):
        (image_folder / "dog" / f"bad{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        load_data(folder_config(image_folder, tmp_path))


def test_cache_is_built_once_and_follows_its_source(image_folder, tmp_path, monkeypatch):
    """The second load decodes nothing; a changed file or size builds anew; nothing temporary is left."""
    built = []
    real = diffuser.build_cache
    monkeypatch.setattr(diffuser, "build_cache", lambda *a: built.append(1) or real(*a))
    first = load_data(folder_config(image_folder, tmp_path)).images.clone()
    assert torch.equal(load_data(folder_config(image_folder, tmp_path)).images, first) and len(built) == 1
    load_data(folder_config(image_folder, tmp_path, img_size=(8, 8)))
    Image.new("RGB", (9, 9)).save(image_folder / "cat" / "0.png")
    load_data(folder_config(image_folder, tmp_path))
    assert len(built) == 3 and not list((tmp_path / "data").rglob("*.tmp"))


def test_worker_processes_decode_the_same(tmp_path):
    """A set large enough for worker processes comes out complete and in order."""
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for i in range(1100):
            picture = diffuser.io.BytesIO()
            Image.new("L", (8, 8), i % 251).save(picture, "PNG")
            archive.writestr(f"{i:04}.png", picture.getvalue())
    data = load_data(folder_config(tmp_path / "many.zip", tmp_path, num_workers=2, img_size=(8, 8)))
    assert data.images[:, 0, 0, 0].tolist() == [i % 251 for i in range(1100)]


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_a_folder_without_images_is_refused(tmp_path, what):
    """No folder, or nothing in it: one line that says so."""
    if what == "empty":
        (tmp_path / what).mkdir()
    with pytest.raises(UserError, match=what):
        load_data(folder_config(tmp_path / what, tmp_path))


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
    from conftest import subprocess, sys
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import diffuser; print([m for m in ('wandb', 'tensorboard', "
            "'diffusers', 'safetensors', 'matplotlib', 'torchvision') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and not list(tmp_path.iterdir())


def broken_pictures():
    """{name: content} of files that are no pictures, or none that should be opened."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def png(width, height, extra=b""):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")

    files = {"empty.png": b"", "text.jpg": b"hello", "bomb.png": png(60_000, 60_000), "none.png": png(0, 10),
             "comment.png": png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 20_000_000))),
             "bomb.gif": b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0," + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\2;"}
    for kind in ("png", "jpeg", "gif", "webp", "bmp"):
        picture = diffuser.io.BytesIO()
        Image.effect_noise((64, 64), 90).convert("RGB").save(picture, kind)
        files[f"half.{kind}"] = picture.getvalue()[: len(picture.getvalue()) // 2]
    return files


def test_broken_and_hostile_pictures(tmp_path, capsys):
    """Truncated, empty and absurdly sized files are skipped, counted and listed with the reason, from a folder and from
    a ZIP file; the others are all there. One more than a tenth is an error that names the list."""
    broken = broken_pictures()
    (tmp_path / "p" / "cat").mkdir(parents=True)
    for name, content in broken.items():
        (tmp_path / "p" / "cat" / name).write_bytes(content)
    for i in range(9 * len(broken)):
        Image.new("RGB", (9, 9), (i, 2 * i, 3)).save(tmp_path / "p" / "cat" / f"good{i}.png")
    (tmp_path / "p" / "cat" / "gone.png").symlink_to("nowhere")
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((tmp_path / "p" / "cat").glob("*.*")):
            if path.exists():
                archive.write(path, f"cat/{path.name}")
    with zipfile.ZipFile(tmp_path / "huge.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(9):
            archive.write(tmp_path / "p" / "cat" / f"good{i}.png", f"cat/{i}.png")
        archive.writestr("cat/zeros.png", bytes(2**28 + 1))
    for source, bad in (("p", len(broken)), ("p.zip", len(broken)), ("huge.zip", 1)):
        data = load_data(folder_config(tmp_path / source, tmp_path, img_size=(8, 8)))
        assert f"skipped {bad} of {10 * bad} images" in capsys.readouterr().out and len(data.images) == 9 * bad
        listing = max((tmp_path / "data" / "cache").glob("*.unreadable.txt"), key=lambda p: p.stat().st_mtime).read_text()
        assert len(listing.splitlines()) == bad and all(": " in line for line in listing.splitlines())
    (tmp_path / "p" / "cat" / "one_more.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"unreadable\.txt"):
        load_data(folder_config(tmp_path / "p", tmp_path, img_size=(8, 8)))


def test_names_in_a_zip_file_lead_nowhere(folder, capsys):
    """Entries and class names with dots and slashes are names of classes, and no file is made outside the output."""
    picture = diffuser.io.BytesIO()
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


@pytest.mark.parametrize("break_it", [lambda bin: bin.write_bytes(b""), lambda bin: bin.unlink(),
                                      lambda bin: bin.with_suffix(".json").write_text("{"), lambda bin: bin.with_suffix(".json").write_text("[]")])
def test_a_damaged_cache_is_made_anew(image_folder, tmp_path, break_it):
    """A cache that is not as large as its index says, or whose index cannot be read, is built again."""
    cfg = folder_config(image_folder, tmp_path)
    first = load_data(cfg).images.clone()
    break_it(next((tmp_path / "data" / "cache").glob("*.bin")))
    assert torch.equal(load_data(cfg).images, first)


def test_a_cache_larger_than_the_disk_is_refused(image_folder, tmp_path, monkeypatch):
    """Before decoding, not when the disk is full."""
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(diffuser.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="--data_dir"):
        load_data(folder_config(image_folder, tmp_path))


@pytest.mark.parametrize("dataset, file", [("digits", "digits.npz"), ("mnist", "MNIST/raw/train-images-idx3-ubyte"), ("folder", "pictures.zip")])
def test_damaged_datasets_are_told(tmp_path, dataset, file):
    """A shipped or downloaded file that is broken: one error that names it or what to put there."""
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"PK\3\4 and then nothing")
    path = str(tmp_path / file) if dataset == "folder" else ""
    with pytest.raises(UserError):
        load_data(configure(dataset=dataset, data_dir=str(tmp_path), path_to_data=path))
