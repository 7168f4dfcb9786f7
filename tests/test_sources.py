"""diffuser_lib/sources.py: images as other tools store them, read back pixel for pixel; damage and malice; labels."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from fake_hub import fake_hub
from PIL import Image

import diffuser
import evaluate
from diffuser_lib import sources
from diffuser_lib.files import UserError
from diffuser_lib.images import cached_images
from diffuser_lib.listing import Labels
from diffuser_lib.sources import check_images, open_images

COUNT = 20
LABELS = [i % 3 for i in range(COUNT)]
WORDS = [("cat", "dog", "emu")[label] for label in LABELS]


@pytest.fixture
def pixels():
    """Random images, uint8 [N, H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (COUNT, 12, 10, 3), np.uint8)


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def load(path, tmp_path, label_column="", shape=(3, 12, 10), workers=0):
    """The images at a path, by way of a cache."""
    source = open_images(str(path), "--path_to_data", label_column)
    return cached_images(source, shape, source.class_names, folder=tmp_path / "cache", name="folder",
                         key=source.fingerprint(), workers=workers)


def check_same(data, pixels, class_names, labels=LABELS):
    """Every pixel and label, in order."""
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), pixels)
    assert data.labels.tolist() == list(labels)
    assert data.class_names == class_names


# ---- Labels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("values, names, expected", [
    ([3, 10, 3], (), ([0, 1, 0], ["3", "10"])),
    (["3", "10", "3"], (), ([0, 1, 0], ["3", "10"])),
    (["b", "a", " b "], (), ([1, 0, 1], ["a", "b"])),
    (["a", "", None, "b", [1]], (), ([0, -1, -1, 1, -1], ["a", "b"])),
    ([True, False], (), ([1, 0], ["False", "True"])),
    ([1.0, 2.0, 2.5], (), ([0, 1, -1], ["1", "2"])),
    ([1, 0, -1, 7], ("cat", "dog"), ([1, 0, -1, -1], ["cat", "dog"])),
    ([-1, -1], ("cat", "dog"), ([0, 0], [])),
    (["a", "a", None], (), ([0, 0, 0], [])),
    ([], (), ([], []))])
def test_labels_become_numbers_from_0_on(values, names, expected):
    """Numbers in their order, words in that of the alphabet; what is no label is -1; one class alone is none."""
    labels, class_names = Labels(values).settle(names)
    assert (labels.tolist(), class_names) == expected


# ---- A folder with a table ---------------------------------------------------------------------


def write_listed(home, pixels, ending="csv", column="label", values=WORDS):
    """Hugging Face's imagefolder."""
    home.mkdir()
    rows = [dict(file_name=f"{i:02}.png", **{column: values[i]}) for i in range(COUNT)]
    for i, row in enumerate(rows):
        (home / row["file_name"]).write_bytes(png(pixels[i]))
    if ending == "csv":
        lines = [f"file_name,{column}", *(f"{row['file_name']},{row[column]}" for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    (home / f"metadata.{ending}").write_text("\n".join(lines), encoding="utf-8-sig" if ending == "csv" else "utf-8")
    return home


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("packed", [False, True])
def test_labels_from_a_table_beside_the_images(tmp_path, pixels, ending, packed):
    """metadata.csv and .jsonl name the class of each image, in a folder and in a ZIP file, also in a folder inside it."""
    home = write_listed(tmp_path / "set", pixels, ending)
    if packed:
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(home.iterdir()):
                archive.write(file, f"train/{file.name}")
            archive.writestr("__MACOSX/metadata.csv", "file_name,label\nnothing,1\n")
        home = path
    check_same(load(home, tmp_path), pixels, ["cat", "dog", "emu"])


def test_the_library_of_the_hub_reads_the_same_folder(tmp_path, pixels):
    """What its imagefolder makes of the table is what we make of it."""
    datasets = pytest.importorskip("datasets")
    home = write_listed(tmp_path / "set", pixels, "csv")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(home), split="train", cache_dir=str(tmp_path / "hub"))
    ours = open_images(str(home), "--images")
    assert [ours.class_names[label] for label in ours.labels] == list(theirs["label"])
    for i in range(COUNT):
        assert np.array_equal(np.asarray(ours[i][0]), np.asarray(theirs[i]["image"]))


def test_another_column_is_asked_for_by_name(tmp_path, pixels):
    """--label_column takes any column; one that is not there is told with those that are; another is another cache."""
    home = write_listed(tmp_path / "set", pixels, "csv", column="species")
    assert load(home, tmp_path).class_names == []
    check_same(load(home, tmp_path, "species"), pixels, ["cat", "dog", "emu"])
    with pytest.raises(UserError, match=r"label_column colour: .*metadata\.csv has none of that name, but file_name, species"):
        open_images(str(home), "--images", "colour")


def test_a_folder_without_labels_in_its_table_has_those_of_its_folders(image_folder):
    """Captions are no labels; --label_column without any table says so."""
    (image_folder / "metadata.csv").write_text("file_name,text\ncat/0.png,a cat\n")
    assert open_images(str(image_folder), "--images").class_names == ["cat", "dog"]
    (image_folder / "metadata.csv").unlink()
    with pytest.raises(UserError, match="has no column at all"):
        open_images(str(image_folder), "--images", "label")


def test_what_a_table_lists_and_lacks(tmp_path, pixels, capsys):
    """A missing file, one outside the folder and one without label are skipped and listed; an unlisted one is left out."""
    home = write_listed(tmp_path / "set", pixels)
    (tmp_path / "secret.png").write_bytes(png(pixels[0]))
    table = (home / "metadata.csv").read_text(encoding="utf-8-sig").splitlines()
    table[1] = "00.png,"
    table += ["../secret.png,cat"]
    (home / "metadata.csv").write_text("\n".join(table))
    (home / "unlisted.png").write_bytes(png(pixels[0]))
    data = load(home, tmp_path)
    check_same(data, pixels[1:], ["cat", "dog", "emu"], LABELS[1:])
    listing = next((tmp_path / "cache").glob("*.unreadable.txt")).read_text()
    assert "../secret.png: it is listed in the metadata, but not there" in listing
    assert "00.png: it has no label" in listing
    assert "left out: 1 images" in capsys.readouterr().err


@pytest.mark.parametrize("name, content", [
    ("metadata.jsonl", '{"file_name": "00.png", "label": 1}\n[1, 2]'), ("metadata.jsonl", "[" * 100_000),
    ("metadata.csv", "file_name,label\n" + "x" * 200_000), ("metadata.csv", b"\xff\xfe\x00")])
def test_a_broken_table_is_told(tmp_path, name, content):
    """One line that names the table."""
    (tmp_path / "00.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"{name} cannot be read") as error:
        open_images(str(tmp_path), "--images")
    assert "\n" not in str(error.value)


# ---- numpy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", sources.ARRAYS)
def test_arrays_of_numpy(tmp_path, pixels, save, names):
    """MedMNIST's names, Keras', ADM's and plain ones, packed or not, the labels in a column or a row."""
    labels = np.array(LABELS, np.uint8)
    save(tmp_path / "set.npz", **{names[0]: pixels, names[1]: labels[:, None] if names[0].startswith("train") else labels,
                                  "test_images": pixels[:3]})
    check_same(load(tmp_path / "set.npz", tmp_path), pixels, ["0", "1", "2"])


def test_parts_to_test_with(tmp_path, pixels):
    """MedMNIST's and Keras' arrays come with others to test with, which have the classes of those to train on, and a cache
    of their own; without labels of theirs, or under other names, there are none."""
    few = np.array([2, 0, 2], np.uint8)
    for train, test in ((("train_images", "train_labels"), ("test_images", "test_labels")), (("x_train", "y_train"), ("x_test", "y_test"))):
        path = tmp_path / f"{train[0]}.npz"
        np.savez(path, **{train[0]: pixels, train[1]: LABELS, test[0]: pixels[5:8], test[1]: few})
        source = open_images(str(path), "--images")
        part = source.test_part()
        assert part.labels.tolist() == [2, 0, 2] and part.class_names == ["0", "1", "2"] and part.test_part() is None
        assert np.array_equal(np.asarray(part[1][0]), pixels[6]) and part[1][1] == 0
        assert part.fingerprint() != source.fingerprint()
        assert open_images(str(path), "--images", train[1]).test_part().labels.tolist() == [2, 0, 2]
        np.savez(path, **{train[0]: pixels, train[1]: LABELS, test[0]: pixels[5:8]})
        assert open_images(str(path), "--images").test_part() is None
    np.savez(path, images=pixels, labels=LABELS, test_images=pixels)
    assert open_images(str(path), "--images").test_part() is None


def test_what_medmnist_reads_is_what_we_read(tmp_path, pixels, monkeypatch):
    """A file in its layout, of which its own class reads training, validation and test images: so do we, the first to train
    on and the last to test with."""
    monkeypatch.setenv("HOME", str(tmp_path))                                # it makes a folder there
    medmnist = pytest.importorskip("medmnist.dataset", reason="medmnist is not installed", exc_type=ImportError)
    images = np.random.default_rng(1).integers(0, 256, (60, 28, 28, 3), np.uint8)
    labels = np.arange(60, dtype=np.uint8)[:, None] % 8
    parts = dict(train=slice(0, 32), val=slice(32, 40), test=slice(40, 60))
    arrays = {f"{part}_{kind}": array[place] for part, place in parts.items() for kind, array in (("images", images), ("labels", labels))}
    np.savez_compressed(tmp_path / "bloodmnist.npz", **arrays)
    ours = open_images(str(tmp_path / "bloodmnist.npz"), "--path_to_data")
    for part, source in (("train", ours), ("test", ours.test_part())):
        theirs = medmnist.BloodMNIST(part, root=str(tmp_path))
        assert len(source) == len(theirs.imgs)
        for i in range(len(source)):
            picture, target = theirs[i]
            assert np.array_equal(np.asarray(source[i][0]), np.asarray(picture))
            assert source.class_names[source[i][1]] == str(target.item()) and str(target.item()) in theirs.info["label"]


def test_drawn_images_are_judged_by_the_test_part(tmp_path, pixels):
    """What --score_every and evaluate.py hold them against: all training images, and the test part of the same file."""
    np.savez(tmp_path / "set.npz", train_images=pixels, train_labels=LABELS, test_images=pixels[::-1][:6], test_labels=LABELS[::-1][:6])
    cfg = diffuser.configure(dataset="folder", path_to_data=str(tmp_path / "set.npz"), data_dir=str(tmp_path), img_size=(12, 12),
                             channel_mults=(1,), patch_size=1, num_workers=0)
    data = diffuser.load_data(cfg)
    for reference in (diffuser.real_images(cfg, data), evaluate.load_reference(str(tmp_path / "set.npz"), str(tmp_path), (3, 12, 12))):
        assert reference.own_test and torch.equal(reference.train.images, data.images)
        assert torch.equal(reference.test.images, data.images.flip(0)[:6])
        assert torch.equal(reference.test.labels, data.labels.flip(0)[:6]) and reference.test.class_names == ["0", "1", "2"]


def test_an_array_is_never_unpacked_as_a_whole(tmp_path):
    """40 MB of images in a small file: opening it and reading the last one takes less than a twentieth of that."""
    path = tmp_path / "set.npz"
    np.savez_compressed(path, images=np.zeros((10_000, 64, 64), np.uint8), labels=np.arange(10_000) % 10)
    tracemalloc.start()
    try:
        image, label = open_images(str(path), "--images")[9_999]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (image.size, label) == ((64, 64), 9)
    assert peak < 2 * 2**20


@pytest.mark.parametrize("kind", ["grey", "grey [N, H, W, 1]", "channels first", "RGBA"])
def test_arrays_of_other_shapes(tmp_path, pixels, kind):
    """Grey images are grey, channels may come first, and transparency is put on white."""
    arrays = {"grey": pixels[..., 0], "grey [N, H, W, 1]": pixels[..., :1], "channels first": pixels.transpose(0, 3, 1, 2),
              "RGBA": np.concatenate([pixels, np.full((COUNT, 12, 10, 1), 255, np.uint8)], -1)}
    np.savez(tmp_path / "set.npz", images=arrays[kind])
    source = open_images(str(tmp_path / "set.npz"), "--images")
    channels = 1 if kind.startswith("grey") else 3
    assert source.guess_channels() == channels and source.class_names == []
    data = load(tmp_path / "set.npz", tmp_path, shape=(channels, 12, 10))
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), pixels[..., :channels])


def test_labels_of_numpy_by_name(tmp_path, pixels, capsys):
    """Words may be labels, too; several numbers for each image are none, and an error where they are asked for."""
    path = tmp_path / "set.npz"
    np.savez(path, images=pixels, words=np.array(WORDS), labels=np.zeros((COUNT, 14), int), few=np.arange(3))
    assert open_images(str(path), "--images").class_names == []
    assert "no class for each image" in capsys.readouterr().err
    check_same(load(path, tmp_path, "words"), pixels, ["cat", "dog", "emu"])
    for column, words in (("labels", "no class for each image"), ("few", "20 images, but 3"), ("other", "has none of that name")):
        with pytest.raises(UserError, match=words):
            open_images(str(path), "--images", column)


class Trap:
    """What a pickle may do on loading."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("arrays, words", [
    (dict(images=np.array([Trap()])), "Python objects"),
    (dict(images=np.zeros((3, 8, 8), np.uint8), labels=np.array([Trap()] * 3)), "Python objects"),
    (dict(images=np.zeros((3, 8, 8), np.float32)), "float32"), (dict(images=np.zeros((3, 8), np.uint8)), r"uint8 \[3, 8\]"),
    (dict(images=np.zeros((3, 8, 8, 2), np.uint8)), "no images in grey or colour"), (dict(other=np.zeros(3)), "no array of images"),
    (dict(images=np.zeros((0, 8, 8), np.uint8)), "no images"),
    (dict(images=np.asfortranarray(np.zeros((3, 8, 8), np.uint8))), "Fortran")])
def test_arrays_that_are_no_images_are_refused(folder, arrays, words):
    """One line, and nothing that is in a pickle is run."""
    np.savez("set.npz", **arrays)
    with pytest.raises(UserError, match=words) as error:
        open_images("set.npz", "--images")
    assert "\n" not in str(error.value) and not os.path.exists("executed")


def test_an_array_that_is_not_as_long_as_it_says(tmp_path):
    """A header that promises more than there is, and a file that is cut short."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(10**9, 64, 64)))
    for i, content in enumerate((file.getvalue() + b"\0" * 100, b"\x93NUMPY\x09\x09 what", b"")):
        with zipfile.ZipFile(tmp_path / f"{i}.npz", "w") as archive:
            archive.writestr("images.npy", content)
        with pytest.raises(UserError, match=r"no whole \.npz file"):
            open_images(str(tmp_path / f"{i}.npz"), "--images")
    (tmp_path / "3.npz").write_bytes((tmp_path / "0.npz").read_bytes()[:50])
    with pytest.raises(UserError, match=r"no whole \.npz file"):
        open_images(str(tmp_path / "3.npz"), "--images")


def test_damage_inside_an_array_is_skipped_or_told(tmp_path, pixels):
    """Bytes that cannot be unpacked: broken images, more than a tenth of them an error."""
    path = tmp_path / "set.npz"
    np.savez_compressed(path, images=pixels)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(UserError, match="images cannot be read"):
        load(path, tmp_path)


# ---- Parquet -----------------------------------------------------------------------------------


def write_parquet(path, pixels, labels=LABELS, rows=slice(None), names=("cat", "dog", "emu"), group=7, **columns):
    """As the Hub's library writes a data set: bytes and path, a class label, names in the metadata of the schema."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    pictures = [dict(bytes=png(image), path=None) for image in pixels[rows]]
    table = pa.table({"image": pa.array(pictures, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                      "label": pa.array(list(labels)[rows]), **{name: pa.array(value[rows]) for name, value in columns.items()}})
    if names:
        features = dict(image=dict(_type="Image"), label=dict(names=list(names), _type="ClassLabel"))
        table = table.replace_schema_metadata({"huggingface": json.dumps(dict(info=dict(features=features)))})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


@pytest.mark.parametrize("group", [1, 7, 1000])
def test_parquet_as_the_hub_has_it(tmp_path, pixels, group):
    """One file, row groups of any size; a folder of several, of which those to train on; in any order."""
    write_parquet(tmp_path / "one.parquet", pixels, group=group)
    check_same(load(tmp_path / "one.parquet", tmp_path), pixels, ["cat", "dog", "emu"])

    for i in range(2):
        write_parquet(tmp_path / "set" / "data" / f"train-0000{i}-of-00002.parquet", pixels, rows=slice(10 * i, 10 * i + 10))
    write_parquet(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", pixels)
    check_same(load(tmp_path / "set", tmp_path), pixels, ["cat", "dog", "emu"])
    source = open_images(str(tmp_path / "set"), "--images")
    part = source.test_part()
    assert len(part) == COUNT and part.class_names == source.class_names and part.labels.tolist() == LABELS
    for i in (19, 3, 11, 10, 0, 9):
        assert np.array_equal(np.asarray(source[i][0]), pixels[i])


def test_parquet_of_the_hubs_own_library(tmp_path, pixels):
    """Dataset.to_parquet, with its class label and its own metadata."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog", "emu"]))
    made = datasets.Dataset.from_dict(dict(image=[Image.fromarray(image) for image in pixels], label=LABELS), features)
    made.to_parquet(str(tmp_path / "set.parquet"))
    check_same(load(tmp_path / "set.parquet", tmp_path), pixels, ["cat", "dog", "emu"])


def test_parquet_of_pandas(tmp_path, pixels):
    """Bytes alone and words as labels, or categories, as a table of pandas has them."""
    pytest.importorskip("pyarrow")
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(dict(img=[png(image) for image in pixels], category=WORDS, number=LABELS))
    frame.to_parquet(tmp_path / "set.parquet")
    check_same(load(tmp_path / "set.parquet", tmp_path), pixels, ["cat", "dog", "emu"])
    check_same(load(tmp_path / "set.parquet", tmp_path, "number"), pixels, ["0", "1", "2"])
    frame["category"] = frame["category"].astype("category")
    frame.to_parquet(tmp_path / "set.parquet")
    check_same(load(tmp_path / "set.parquet", tmp_path), pixels, ["cat", "dog", "emu"])


def test_parquet_in_worker_processes(tmp_path, pixels):
    """The cache is the same however many processes decode."""
    many = np.tile(pixels, (60, 1, 1, 1))
    write_parquet(tmp_path / "set.parquet", many, LABELS * 60, group=100)
    check_same(load(tmp_path / "set.parquet", tmp_path, workers=2), many, ["cat", "dog", "emu"], LABELS * 60)


def test_broken_rows_of_parquet_are_skipped(tmp_path, pixels, capsys):
    """No bytes, bytes that are no picture, no label: counted, and listed by file and row."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    content = [png(image) for image in np.tile(pixels, (2, 1, 1, 1))]
    content[4] = None
    content[7] = b"%!PS (this would start Ghostscript)"
    labels = LABELS * 2
    labels[9] = None
    pq.write_table(pa.table(dict(image=pa.array(content, pa.binary()), label=labels)), tmp_path / "set.parquet")
    data = load(tmp_path / "set.parquet", tmp_path)
    assert len(data.images) == 37
    listing = next((tmp_path / "cache").glob("*.unreadable.txt")).read_text()
    assert "set.parquet, row 4: it has no bytes" in listing
    assert "set.parquet, row 7: its content is no PNG" in listing
    assert "set.parquet, row 9: it has no label" in listing
    assert "skipped 3 of 40" in capsys.readouterr().out


def test_a_damaged_group_of_rows_is_lost_alone(tmp_path, pixels):
    """Rows of a group that cannot be unpacked are skipped, each with the reason, and those of others are read."""
    many = np.tile(pixels, (10, 1, 1, 1))
    write_parquet(tmp_path / "set.parquet", many, LABELS * 10, group=10)
    import pyarrow.parquet as pq
    chunk = pq.ParquetFile(tmp_path / "set.parquet").metadata.row_group(3).column(0)
    content = bytearray((tmp_path / "set.parquet").read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    content[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    (tmp_path / "set.parquet").write_bytes(content)
    data = load(tmp_path / "set.parquet", tmp_path)
    check_same(data, np.delete(many, range(30, 40), 0), ["cat", "dog", "emu"], (LABELS * 10)[:30] + (LABELS * 10)[40:])


def test_parquet_that_holds_no_images_is_refused(tmp_path, pixels):
    """No column of images, another file than the first, no label of that name, damage: one line each."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    pq.write_table(pa.table(dict(text=["a"], label=[1])), tmp_path / "text.parquet")
    write_parquet(tmp_path / "set" / "a.parquet", pixels)
    pq.write_table(pa.table(dict(png=[png(pixels[0])])), tmp_path / "set" / "b.parquet")
    write_parquet(tmp_path / "lists.parquet", pixels, labels=[[1, 2]] * COUNT, names=())
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing PAR1")
    for name, column, words in (
            ("text.parquet", "", "no column of images"), ("set", "", "b.parquet has other columns than a.parquet"),
            ("lists.parquet", "label", "neither numbers nor words"), ("set/a.parquet", "colour", "none of that name, but image, label"),
            ("broken.parquet", "", "no whole Parquet file")):
        with pytest.raises(UserError, match=words) as error:
            open_images(str(tmp_path / name), "--images", column)
        assert "\n" not in str(error.value)
    assert open_images(str(tmp_path / "lists.parquet"), "--images").class_names == []


def test_parquet_made_to_fill_the_memory_is_refused(tmp_path):
    """A few kilobytes that unpack to 300 MB: refused before any row is read."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    zeros = bytes(30 * 2**20)
    pq.write_table(pa.table(dict(image=[zeros[i:] for i in range(10)])), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 2**20
    with pytest.raises(UserError, match="made to fill the memory"):
        open_images(str(tmp_path / "bomb.parquet"), "--images")


# ---- tar ---------------------------------------------------------------------------------------


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_tar_as_webdataset_writes_it(tmp_path, pixels):
    """A folder of shards from its own writer, with .cls or with .json."""
    webdataset = pytest.importorskip("webdataset")
    for kind in ("cls", "json"):
        home = tmp_path / kind
        home.mkdir()
        for shard in range(2):
            with webdataset.TarWriter(str(home / f"set-{shard:06}.tar")) as writer:
                for i in range(10 * shard, 10 * shard + 10):
                    label = LABELS[i] if kind == "cls" else dict(label=WORDS[i], colour=LABELS[i])
                    writer.write({"__key__": f"sample{i:06}", "png": Image.fromarray(pixels[i]), kind: label})
    check_same(load(tmp_path / "cls", tmp_path), pixels, ["0", "1", "2"])
    check_same(load(tmp_path / "json", tmp_path), pixels, ["cat", "dog", "emu"])
    check_same(load(tmp_path / "json", tmp_path, "colour"), pixels, ["0", "1", "2"])
    with pytest.raises(UserError, match=r"no \.json .* of that name"):
        open_images(str(tmp_path / "json"), "--images", "size")


def test_a_tar_file_of_class_folders(tmp_path, pixels):
    """Without labels beside the images the folder is the class, as in a ZIP file."""
    members = [(f"./set/{WORDS[i]}/{i:02}.png", png(pixels[i])) for i in range(COUNT)]
    write_tar(tmp_path / "set.tar", [*members, ("./set/cat/._0.png", b"rubbish"), ("notes.txt", b"hello")])
    check_same(load(tmp_path / "set.tar", tmp_path), pixels, ["cat", "dog", "emu"])


def test_names_with_dots_in_a_tar_file(tmp_path, pixels):
    """WebDataset's samples end at the first dot, and masks beside a picture are none; names as of screenshots are read."""
    names = ["a/IMG.2024.png", "a/IMG.2025.png", "b/000.mask.png", "b/000.png", "b/000.left.png", "b/Screenshot 10.32.11.png"]
    write_tar(tmp_path / "set.tar", [(name, png(pixels[i])) for i, name in enumerate(names)])
    data = load(tmp_path / "set.tar", tmp_path)
    check_same(data, pixels[[0, 1, 3, 5]], ["a", "b"], [0, 0, 1, 1])


def test_hostile_tar_files(tmp_path, pixels):
    """Links, devices and names that lead out are never followed or made; what cannot be read is skipped and listed."""
    members = [(f"/etc/{i:02}.{ending}", content) for i in range(COUNT)
               for ending, content in (("png", png(pixels[i])), ("cls", WORDS[i].encode()))]
    members[2 * 5] = ("/etc/05.png", b"no picture")
    members[2 * 6 + 1] = ("/etc/06.json", b"[" * 100_000)
    path = tmp_path / "inner" / "set.tar"
    write_tar(path, [*members, ("../../out.png", png(pixels[0])), ("../../out.cls", b"cat")])
    with tarfile.open(path, "a") as archive:
        for i, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(f"link{i}.png")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
    data = load(path, tmp_path)
    keep = [i for i in range(COUNT) if i not in (5, 6)]
    check_same(data, pixels[keep], ["cat", "dog", "emu"], [LABELS[i] for i in keep])
    listing = next((tmp_path / "cache").glob("*.unreadable.txt")).read_text()
    assert "set.tar: /etc/05.png: its content is no PNG" in listing and "set.tar: /etc/06.png: it has no label" in listing
    assert sorted(os.listdir(tmp_path)) == ["cache", "inner"] and os.listdir(path.parent) == ["set.tar"]


def backwards():
    """A header whose size is below 0, so that the next entry is the same again."""
    entry = tarfile.TarInfo("a.png")
    header = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (-512 & (256**12 - 1)).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def refuses_backwards():
    """Whether tarfile itself refuses such a header; behind another entry it then takes it for the end of the file."""
    try:
        tarfile.open(fileobj=io.BytesIO(backwards() + bytes(10_240)))
    except tarfile.ReadError:
        return True
    return False


@pytest.mark.parametrize("content, words", [
    (b"hello" * 1000, "no whole .tar file"),
    (backwards() + bytes(10_240), "no whole .tar file" if refuses_backwards() else "entries go backwards"),
    pytest.param(tarfile.TarInfo("0.png").tobuf() + backwards() + bytes(10_240), "entries go backwards",
                 marks=pytest.mark.skipif(refuses_backwards(), reason="this tarfile takes it for the end of the file")),
    (bytes(10_240), "holds no PNG"),
    (None, "no whole .tar file")])
def test_tar_files_that_are_none_are_told(tmp_path, pixels, content, words):
    """Other content, entries in circles, nothing, and one that is cut short."""
    path = tmp_path / "set.tar"
    if content is None:
        write_tar(path, [(f"{i}.png", png(pixels[i])) for i in range(COUNT)])
        content = path.read_bytes()[:3000]
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        open_images(str(path), "--images")
    assert "\n" not in str(error.value)


def test_an_entry_above_the_limit_is_not_read(tmp_path, pixels, monkeypatch):
    """In a tar, a Parquet and a .npz file as in a ZIP file."""
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(sources, "MAX_UNPACKED", 300)
    write_tar(tmp_path / "set.tar", [("0.png", png(pixels[0]))])
    write_parquet(tmp_path / "set.parquet", pixels)
    for name in ("set.tar", "set.parquet"):
        with pytest.raises(ValueError, match="more than 0 MiB"):
            open_images(str(tmp_path / name), "--images")[0]
    np.savez(tmp_path / "set.npz", images=pixels)
    with pytest.raises(UserError, match="no images"):
        open_images(str(tmp_path / "set.npz"), "--images")


# ---- The Hugging Face Hub ----------------------------------------------------------------------


# For a child process: read data sets and their test parts, leave what was read, and try to train on one that is not there.
READ_HUB = """
import sys
import numpy as np
import diffuser
from diffuser_lib.sources import open_images

for request in sys.argv[1:]:
    name, _, column = request.partition(" ")
    source = open_images(name, "--path_to_data", column)
    for part, images in (("train", source), ("test", source.test_part())):
        pixels = np.stack([np.asarray(images[i][0]) for i in range(len(images))])
        np.savez(part + column, images=pixels, labels=images.labels, names=images.class_names, key=repr(images.fingerprint()))
sys.exit(diffuser.main(["--mode", "train", "--path_to_data", "hf:somebody/bees"]))
"""

# What says where the Hub and its cache are.
HUB_VARIABLES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT")


def test_a_data_set_of_the_hub(folder, pixels):
    """hf:OWNER/NAME as its own client downloads it from a server, once, and again without one from the cache that it left:
    pixels, labels, names, the test part; another column; one line for a set that is not there."""
    pytest.importorskip("datasets")
    write_parquet(folder / "birds" / "data" / "train-00000-of-00001.parquet", pixels, words=WORDS)
    write_parquet(folder / "birds" / "data" / "test-00000-of-00001.parquet", pixels[::-1], LABELS[::-1], rows=slice(5), words=WORDS[::-1])
    (folder / "birds" / "README.md").write_text("---\npretty_name: Birds\n---\n")
    env = {name: value for name, value in os.environ.items() if name not in HUB_VARIABLES and not name.lower().endswith("_proxy")}
    env |= dict(HF_HOME=str(folder / "home"), HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])

    def read(*requests, **more):
        done = subprocess.run([sys.executable, "-c", READ_HUB, *requests], env={**env, **more}, capture_output=True, text=True, timeout=200)
        assert done.returncode == 1 and "hf:somebody/bees is neither in the cache nor to be had from the Hub" in done.stderr
        assert "Traceback" not in done.stderr
        keys = []
        for column in (request.partition(" ")[2] for request in requests):
            for part, wanted, labels in (("train", pixels, LABELS), ("test", pixels[::-1][:5], LABELS[::-1][:5])):
                with np.load(f"{part}{column}.npz") as file:
                    assert np.array_equal(file["images"], wanted) and file["labels"].tolist() == labels
                    assert file["names"].tolist() == ["cat", "dog", "emu"]
                    keys.append(str(file["key"]))
                os.unlink(f"{part}{column}.npz")
        return keys

    with fake_hub("somebody/birds", folder / "birds") as (address, asked):
        online = read("hf:somebody/birds", HF_ENDPOINT=address)
    assert sum(request.startswith("GET") and "train-00000-of-00001.parquet" in request for request in asked) == 1
    assert len(set(online)) == 2                                             # each part has a cache of decoded images of its own
    offline = read("hf:somebody/birds", "hf:somebody/birds:default words", HF_HUB_OFFLINE="1")
    assert offline[:2] == online


@pytest.mark.parametrize("name", ["hf:", "hf:../../etc", "hf:a/b/c", "hf:http://x"])
def test_names_that_the_hub_cannot_have(name):
    """Paths and addresses are none."""
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="say hf:OWNER/NAME"):
        open_images(name, "--images")


# ---- What all have in common -------------------------------------------------------------------


@pytest.mark.parametrize("name, package", [("set.parquet", "pyarrow"), ("hf:somebody/birds", "datasets")])
def test_a_missing_package_is_one_line(folder, monkeypatch, name, package, capsys):
    """It says how to get it, before anything else is done."""
    (folder / "set.parquet").write_bytes(b"PAR1")
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    for call in (check_images, open_images):
        with pytest.raises(UserError, match=f"takes {package}: pip install {package}$"):
            call(name, "--path_to_data")
    assert diffuser.main(["--mode", "train", "--path_to_data", name]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_old_package_is_refused(monkeypatch):
    """Old versions of both run code that a file brings along."""
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(pyarrow, "__version__", "13.0.0")
    with pytest.raises(UserError, match=r"takes pyarrow 15.0 or later, not 13.0.0: pip install -U pyarrow"):
        sources.import_package("pyarrow", "15.0", "it")


def test_a_compressed_tar_file_is_refused(tmp_path):
    """It says what to do instead."""
    (tmp_path / "set.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="unpack it"):
        open_images(str(tmp_path / "set.tar.gz"), "--images")


def write_kind(kind, home, pixels):
    """The same images as one kind of source."""
    if kind == "table":
        return write_listed(home / "set", pixels, values=LABELS)
    path = home / f"set.{kind}"
    if kind == "npz":
        np.savez(path, images=pixels, labels=LABELS)
    elif kind == "parquet":
        write_parquet(path, pixels, names=())
    else:
        write_tar(path, [(f"{i:02}.{ending}", content) for i in range(COUNT)
                         for ending, content in (("png", png(pixels[i])), ("cls", str(LABELS[i]).encode()))])
    return path


KINDS = ("table", "npz", "parquet", "tar")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_follows_images_and_labels(tmp_path, pixels, kind):
    """It stays as long as the file does, and changes with it; a source goes to other processes by pickle."""
    path = write_kind(kind, tmp_path, pixels)
    source = open_images(str(path), "--images")
    source[3]
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint() == open_images(str(path), "--images").fingerprint() == source.fingerprint()
    assert np.array_equal(np.asarray(again[3][0]), pixels[3]) and again[3][1] == LABELS[3]
    before = source.fingerprint()
    target = path / "03.png" if kind == "table" else path
    os.utime(target, ns=(1, 1))
    assert open_images(str(path), "--images").fingerprint() != before


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_trains(folder, pixels, kind):
    """From the command line, with classes, and from a dry run that counts them."""
    write_kind(kind, folder, pixels)
    path = "set" if kind == "table" else f"set.{kind}"
    flags = ["--mode", "train", "--path_to_data", path, "--img_size", "8", "--patch_size", "1", "--iterations", "2", "--batch_size", "4",
             "--device", "cpu", "--base_channels", "8", "--channel_mults", "1,2", "--emb_dim", "8", "--no-report", "--num_workers", "0",
             "--preview_steps", "2", "--label_column", "cls" if kind == "tar" else "label" + "s" * (kind == "npz")]
    if kind == "tar":
        flags = flags[:-2]
    assert diffuser.main(flags) == 0
    state = diffuser.load_checkpoint(next(folder.rglob("*.pt")))
    assert state["class_names"] == ["0", "1", "2"]


def test_a_column_without_a_path_is_refused(capsys):
    """--label_column is for images of one's own."""
    assert diffuser.main(["--mode", "train", "--dataset", "digits", "--label_column", "label"]) == 2
    assert "--label_column is for --path_to_data" in capsys.readouterr().err


def test_hidden_files_of_a_mac_are_no_set(tmp_path):
    """A folder with nothing but ._data.npz is one without images, as the message says."""
    (tmp_path / "._data.npz").write_bytes(b"x")
    with pytest.raises(UserError, match="holds no"):
        open_images(str(tmp_path), "--path_to_data")
