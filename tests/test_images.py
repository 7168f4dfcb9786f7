"""diffuser_lib/images.py: pictures of every kind and every kind of damage, classes from folders, the cache, grids."""

import contextlib
import copy
import io
import json
import os
import socket
import struct
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import prepared
import pytest
import torch
from conftest import STATUS
from PIL import Image, ImageOps

from diffuser_lib import images
from diffuser_lib.files import UserError
from diffuser_lib.images import (
    DecodedImages,
    ImageData,
    ImageFiles,
    cached_images,
    file_name,
    from_uint8,
    open_image,
    require_images,
    save_grid,
    to_pil,
    to_uint8,
)
from diffuser_lib.listing import spans_overlap


def load(path, data_dir, shape=(3, 16, 16), workers=0):
    """The images at a path, by way of a cache below data_dir."""
    source = ImageFiles(str(path), "--images")
    return cached_images(source, shape, source.class_names, folder=data_dir / "cache", name="folder",
                         key=source.fingerprint(), workers=workers)


def decode(picture, shape=(3, 16, 16), **options):
    """One picture as uint8 [C, H, W], having been through a file where it has a format."""
    pixels, _ = DecodedImages([(picture, 0)], shape, **options)[0]
    return pixels


def png(picture, **options):
    """A picture as the bytes of a PNG file."""
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def numbered_zip(path, count):
    """A ZIP file of grey pictures, each of one brightness: its number modulo 251."""
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            archive.writestr(f"{i:04}.png", png(Image.new("L", (8, 8), i % 251)))


# ---- Numbers -----------------------------------------------------------------------------------


def test_bytes_and_numbers_convert_exactly():
    """0..255 is [-1, 1] and comes back as it was; what lies outside is clipped."""
    every = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(every)
    assert (x[0], x[255], x.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(x), every)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0])).tolist() == [0, 255, 128]
    assert to_uint8(x.bfloat16()).dtype == torch.uint8


def test_a_digest_tells_sets_apart():
    """Another label or another image is another fingerprint; the same set always has the same, however it lies in
    memory."""
    pixels = torch.randint(0, 256, (250, 1, 4, 4), dtype=torch.uint8)
    data = ImageData(pixels, torch.arange(250), [])
    same = ImageData(pixels.contiguous(memory_format=torch.channels_last), torch.arange(250), ["other name"])
    assert data.digest() == same.digest()
    assert data.digest() != ImageData(pixels, torch.arange(250).flip(0), []).digest()
    assert data.digest() != ImageData(255 - pixels, torch.arange(250), []).digest()


# ---- In: folders and ZIP files -----------------------------------------------------------------


def test_a_folder_of_class_subfolders(image_folder, tmp_path):
    """Every format is read, subfolders are classes, and the images are those on disk."""
    data = load(image_folder, tmp_path)
    assert data.images.shape == (12, 3, 16, 16)
    assert data.class_names == ["cat", "dog"]
    assert data.labels.tolist() == [0] * 6 + [1] * 6
    means = data.images.float().mean((1, 2, 3))
    assert means[:6].max() < 70
    assert means[6:].min() > 120


def test_files_are_taken_in_order_of_name(image_folder):
    """Item i is the i-th name, whatever order the file system has."""
    source = ImageFiles(str(image_folder), "--images")
    assert source.names == sorted(source.names)
    assert source.names[0] == "cat/0.png"
    image, label = source[7]
    assert (source.names[7], label) == ("dog/1.jpg", 1)
    assert image.format == "JPEG"
    assert len(source) == 12


@pytest.mark.parametrize("prefix", ["", "set/train/"])
def test_a_zip_file_equals_its_folder(image_folder, tmp_path, prefix):
    """Read in place, with the same images and classes; a folder around them changes nothing, and neither does what macOS
    adds."""
    plain = load(image_folder, tmp_path)
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(image_folder.rglob("*.*")):
            archive.write(file, prefix + file.relative_to(image_folder).as_posix())
        archive.writestr("__MACOSX/cat/._0.png", b"rubbish")
        archive.writestr(f"{prefix}cat/._0.png", b"rubbish")
        archive.writestr(f"{prefix}cat/folder.png/", b"")

    data = load(path, tmp_path)
    assert torch.equal(data.images, plain.images)
    assert torch.equal(data.labels, plain.labels)
    assert data.class_names == plain.class_names


def test_what_is_hidden_or_no_picture_is_left_alone(tmp_path):
    """Hidden files and folders, and files of other kinds; endings count in any case."""
    for name in ("a.PNG", "b.JPeG", ".hidden.png", ".cache/c.png", "__MACOSX/d.png", "notes.txt", "png"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_bytes(png(Image.new("L", (4, 4))))
    assert ImageFiles(str(tmp_path / "p"), "--images").names == ["a.PNG", "b.JPeG"]


def test_images_in_one_folder_have_no_classes(image_folder):
    """Side by side, also where that folder stands inside another."""
    assert ImageFiles(str(image_folder / "cat"), "--images").class_names == []
    (image_folder / "dog").rename(image_folder.parent / "dog")
    source = ImageFiles(str(image_folder), "--images")
    assert source.class_names == []
    assert set(source.labels) == {0}


def test_classes_of_the_same_name_keep_their_paths(tmp_path):
    """Two folders called alike are told apart by all of their names; images beside folders are a class of their own."""
    for name in ("train/cat/0.png", "test/cat/0.png", "dog/0.png"):
        (tmp_path / "p" / name).parent.mkdir(parents=True)
        (tmp_path / "p" / name).write_bytes(png(Image.new("L", (4, 4))))
    assert ImageFiles(str(tmp_path / "p"), "--images").class_names == ["dog", "test/cat", "train/cat"]

    assert ImageFiles.name_classes(["", "a/cat"]) == ["unsorted", "cat"]


@pytest.mark.parametrize("what, words", [
    ("missing", "images .*missing: there is no such folder or file"),
    ("empty", "images .*empty holds no PNG, JPG, JPEG, BMP, GIF, WEBP image"),
    ("broken.zip", "images .*broken.zip is no whole ZIP file"),
    ("text.png", "images .*text.png is no whole ZIP file"),
    ("", "images is needed: a folder or file of images")])
def test_a_place_without_images_is_refused(tmp_path, what, words):
    """No folder, nothing in it, a file that is no ZIP file, no path at all: one line that says so and names the option."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.zip").write_bytes(b"PK\3\4 and then nothing")
    (tmp_path / "text.png").write_bytes(b"hello")
    path = str(tmp_path / what) if what else ""
    with pytest.raises(UserError, match=words) as error:
        ImageFiles(path, "--images")
    assert "\n" not in str(error.value)


def test_a_path_can_be_checked_before_anything_is_read(tmp_path):
    """Dry runs only ask whether something is there."""
    require_images(str(tmp_path), "--images")
    with pytest.raises(UserError, match="images"):
        require_images(str(tmp_path / "gone"), "--images")


@pytest.mark.parametrize("modes, channels", [
    (["L", "L"], 1), (["1", "LA", "I", "I;16", "F"], 1), (["L", "RGB"], 3), (["P"], 3), (["RGBA"], 3), (["CMYK"], 3)])
def test_channels_follow_the_images(modes, channels):
    """Grey in any depth, with transparency or without, is one channel; a single coloured picture makes three."""
    class Pictures(ImageFiles):
        def __init__(self):
            self.names = modes

        def __getitem__(self, i):
            return Image.new(modes[i], (4, 4)), 0

    assert Pictures().guess_channels() == channels


def test_channels_are_guessed_past_broken_images(tmp_path):
    """A file that cannot be read decides nothing, and only a few of many are looked at."""
    for i in range(100):
        (tmp_path / f"{i:03}.png").write_bytes(png(Image.new("L", (4, 4))) if i else b"broken")
    source = ImageFiles(str(tmp_path), "--images")
    assert source.guess_channels() == 1
    (tmp_path / "001.png").write_bytes(png(Image.new("RGB", (4, 4))))
    assert source.guess_channels(looks=100) == 3
    assert source.guess_channels(looks=10) == 1


def test_a_fingerprint_follows_the_files(image_folder):
    """Added, removed, renamed or rewritten: each is another fingerprint; reading changes none."""
    def fingerprint():
        return ImageFiles(str(image_folder), "--images").fingerprint()

    seen = [fingerprint()]
    ImageFiles(str(image_folder), "--images")[0][0].load()
    assert fingerprint() == seen[0]

    Image.new("RGB", (9, 9)).save(image_folder / "cat" / "new.png")
    seen.append(fingerprint())
    (image_folder / "cat" / "new.png").rename(image_folder / "cat" / "other.png")
    seen.append(fingerprint())
    os.utime(image_folder / "cat" / "other.png", ns=(1, 1))
    seen.append(fingerprint())
    (image_folder / "dog" / "0.png").unlink()
    seen.append(fingerprint())
    assert len(set(seen)) == 5


@pytest.mark.parametrize("names", [("cat", "dog"), ("inner/cat", "inner/dog")])
def test_folders_behind_links_are_classes_too(image_folder, tmp_path, names):
    """A folder of links to the classes, as people make it to choose some of many, equals the folder itself."""
    for name in names:
        (tmp_path / "links" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "links" / name).symlink_to(image_folder / Path(name).name)
    source = ImageFiles(str(tmp_path / "links"), "--images")
    assert source.class_names == ["cat", "dog"]
    assert source.labels.tolist() == [0] * 6 + [1] * 6
    assert torch.equal(load(tmp_path / "links", tmp_path).images, load(image_folder, tmp_path).images)


def test_links_in_circles_come_to_an_end(image_folder, capsys):
    """Each folder is read once and under its own name, whatever leads back to it; nothing beside the folder is taken."""
    Image.new("L", (4, 4)).save(image_folder.parent / "beside.png")
    (image_folder / "a").symlink_to(image_folder / "dog")
    (image_folder / "cat" / "self").symlink_to(".")
    (image_folder / "cat" / "up").symlink_to("../..")
    (image_folder / "dog" / "round").symlink_to(image_folder / "cat")
    (image_folder / "zz").symlink_to("zz")
    source = ImageFiles(str(image_folder), "--images")
    assert source.class_names == ["cat", "dog"]
    assert len(source) == 12


def test_what_is_hidden_is_not_walked_through(image_folder, monkeypatch):
    """A .git beside the images may hold a million files."""
    (image_folder / ".git" / "objects").mkdir(parents=True)
    walked = [os.path.basename(folder) for folder, _ in images.walk_once(image_folder)]
    assert walked == ["pictures", "cat", "dog"]


def test_a_folder_that_cannot_be_read_is_told_once(image_folder, monkeypatch, capsys):
    """Else a class would silently be missing."""
    real_scandir = os.scandir

    def scandir(path):
        if os.path.basename(path) == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return real_scandir(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for _ in range(2):
        assert len(ImageFiles(str(image_folder), "--images")) == 6
    assert capsys.readouterr().err == f"left out: {image_folder / 'dog'} cannot be read (Permission denied)\n"


@pytest.mark.parametrize("path", ["pipe", "socket", "/dev/zero"])
def test_what_is_no_file_is_never_opened(tmp_path, path):
    """A pipe would wait for a writer, a device has no end: refused in one line, as the path itself."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)                                       # names of sockets are short
        server.bind("socket")
        with pytest.raises(UserError, match=f"images {path} is a pipe, socket or device"):
            ImageFiles(path, "--images")


def test_a_pipe_among_the_images_is_skipped(image_folder, tmp_path, capsys):
    """With the name of an image, it is one that cannot be read: listed, and never opened."""
    os.mkfifo(image_folder / "cat" / "0000.png")
    data = load(image_folder, tmp_path, (3, 8, 8))
    assert len(data.images) == 12
    assert "cat/0000.png: it is a pipe, socket or device" in capsys.readouterr().out
    assert ImageFiles(str(image_folder), "--images").guess_channels() == 3


def overlapping_zip(path, entries):
    """A ZIP file whose index names the one picture in it as often as asked for."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", png(Image.new("L", (64, 64))))
        for i in range(1, entries):
            twin = copy.copy(archive.filelist[0])
            twin.filename = twin.orig_filename = f"{i}.png"
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin


def test_every_class_of_folders_has_a_name_of_its_own():
    """Its last part where that tells them apart, else all of it; what lies in no folder is called by no other's name."""
    name = ImageFiles.name_classes
    assert name(["", "cat"]) == ["unsorted", "cat"] and name(["a/cat", "b/dog"]) == ["cat", "dog"]
    assert name(["a/cat", "b/cat"]) == ["a/cat", "b/cat"]
    assert name(["", "a/cat", "b/cat"]) == ["unsorted", "a/cat", "b/cat"]
    assert name(["", "unsorted"]) == ["unsorted_", "unsorted"]


def test_a_zip_file_whose_entries_overlap_is_refused(tmp_path):
    """A few bytes named a million times: one line, before anything is unpacked."""
    overlapping_zip(tmp_path / "bomb.zip", 1000)
    with pytest.raises(UserError, match=r"images .*bomb.zip is refused: its entries overlap"):
        ImageFiles(str(tmp_path / "bomb.zip"), "--images")


def test_entries_one_inside_another_overlap(tmp_path):
    """Not only those that begin at the same place."""
    assert spans_overlap(np.array([500, 0]), np.array([510, 1000]))
    assert not spans_overlap(np.array([1000, 0]), np.array([1010, 1000]))


def test_honest_zip_files_do_not_overlap(tmp_path):
    """Packed in one go, added to later, written to a stream, with names of any script."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(20):
            archive.writestr(f"käse 日本/{i}.png", png(Image.new("L", (8, 8), i)))
    with zipfile.ZipFile(tmp_path / "a.zip", "a") as archive:
        archive.writestr("dog/0.png", png(Image.new("L", (8, 8))))
    assert len(ImageFiles(str(tmp_path / "a.zip"), "--images")) == 21

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

    stream = Pipe()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", png(Image.new("L", (8, 8), i)))
    (tmp_path / "b.zip").write_bytes(stream.getvalue())
    assert len(ImageFiles(str(tmp_path / "b.zip"), "--images")) == 3


# For a child process: open sets as training does, and tell how many KiB the last one took at most beyond the others.
OPEN = STATUS + """
import sys
from diffuser_lib.sources import open_images

for path in sys.argv[1:]:
    before = status("VmHWM")
    source = open_images(path, "--path_to_data")
    source.fingerprint()
    found = len(source), source.guess_channels(), len(source.class_names)
print(*found, status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_hardly_grows_with_the_entries_of_a_zip_file(tmp_path):
    """20,000 pictures in one: 10 MiB at most, where zipfile's own list of them alone takes 16."""
    some = [png(Image.new("RGB", (8, 8), (i, 0, 0))) for i in range(10)]
    for name, count in (("few.zip", 100), ("many.zip", 20_000)):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for i in range(count):
                archive.writestr(f"class{i % 10}/{i:08}.png", some[i % 10])
    done = prepared.run("-c", OPEN, tmp_path / "few.zip", tmp_path / "many.zip", cwd=tmp_path)
    count, channels, classes, kilobytes = map(int, done.stdout.split())
    assert (count, channels, classes) == (20_000, 3, 10)
    assert kilobytes < 10 * 2**10


def test_a_name_that_is_there_twice_counts_once(tmp_path):
    """In a ZIP file the last of its entries is meant, as unzip has it."""
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        for brightness in (10, 200):
            archive.writestr("a.png", png(Image.new("L", (8, 8), brightness)))
    data = load(tmp_path / "twice.zip", tmp_path, (1, 8, 8))
    assert data.images.unique().tolist() == [200]
    assert len(data.images) == 1


# ---- In: formats -------------------------------------------------------------------------------


def postscript():
    """The content of an EPS file, which Pillow hands to Ghostscript where it may."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "EPS")
    return file.getvalue()


@pytest.mark.parametrize("packed", [False, True])
def test_content_of_other_formats_is_refused(tmp_path, packed, monkeypatch):
    """PostScript under the name of a PNG file starts no interpreter, in a folder and in a ZIP file."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: pytest.fail("it was started"))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "x.png").write_bytes(postscript())
    path = tmp_path / "p"
    if packed:
        path = tmp_path / "p.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "p" / "x.png", "x.png")
    source = ImageFiles(str(path), "--images")
    assert DecodedImages(source, (3, 8, 8))[0] == "its content is no PNG, JPEG, BMP, GIF, WEBP picture"


def test_photographs_of_phones_are_read(tmp_path):
    """A JPEG file that holds a second picture, which Pillow calls MPO."""
    photo = Image.new("RGB", (32, 32), (200, 10, 10))
    photo.save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    assert open_image(tmp_path / "photo.jpg").format == "MPO"
    pixels, _ = DecodedImages(ImageFiles(str(tmp_path), "--images"), (3, 8, 8))[0]
    assert pixels[0].min() > 180


def test_what_pillow_warns_of_never_reaches_the_terminal(tmp_path, recwarn):
    """Damaged EXIF is let pass; too many pixels are a reason, also where only the kind of a picture is looked at."""
    exif = Image.Exif()
    exif[0x0112] = 1
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif.tobytes()[:20])
    (tmp_path / "b.png").write_bytes(png(Image.new("1", (10_000, 10_000))))
    source = ImageFiles(str(tmp_path), "--images")
    assert source.guess_channels() == 3
    decoded = DecodedImages(source, (3, 8, 8))
    assert decoded[0][0].shape == (3, 8, 8)
    assert "exceeds limit" in decoded[1]
    assert [str(warning.message) for warning in recwarn] == []


# ---- In: decoding ------------------------------------------------------------------------------


def test_images_are_cropped_and_never_squashed():
    """A wide picture with a square in its middle: the square fills the result; a shape is height by width."""
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    assert decode(picture)[2].mean() > 245
    wide = decode(picture, (3, 16, 48))
    assert wide.shape == (3, 16, 48)
    assert 75 < wide[2].mean() < 95


def test_an_image_of_the_right_size_keeps_every_pixel():
    """Channels first, rows and columns in place, nothing resampled."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    decoded = decode(Image.fromarray(pixels), (3, 12, 20))
    assert np.array_equal(decoded, pixels.transpose(2, 0, 1))
    assert decoded.flags.c_contiguous
    grey = decode(Image.fromarray(pixels[..., 0]), (1, 12, 20))
    assert np.array_equal(grey[0], pixels[..., 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(tmp_path, orientation):
    """A camera that was turned says so in EXIF; the picture is turned back."""
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 16, 3), dtype=np.uint8))
    turns = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
             4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
             7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    turn = turns[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    as_taken = upright.transpose(turn) if turn is not None else upright
    as_taken.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as photo:
        decoded = decode(photo, (3, 10, 16))
    assert np.array_equal(decoded, np.asarray(upright).transpose(2, 0, 1))


def transparent(kind, path):
    """Write a PNG file that is red, and nowhere to be seen."""
    if kind == "colour":
        Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(path)
    elif kind == "grey":
        Image.new("LA", (20, 20), (90, 0)).save(path)
    elif kind == "palette":
        picture = Image.new("P", (20, 20), 1)
        picture.putpalette([0, 0, 0, 255, 0, 0])
        picture.save(path, transparency=1)
    else:
        Image.new("RGB", (20, 20), (255, 0, 0)).save(path, transparency=(255, 0, 0))


@pytest.mark.parametrize("kind", ["colour", "grey", "palette", "key colour"])
def test_what_is_transparent_shows_the_background(tmp_path, kind):
    """In colour, in grey, by a palette's entry and by a PNG's key colour; white unless told otherwise."""
    transparent(kind, tmp_path / "p.png")
    for options, colour in ({}, [255, 255, 255]), (dict(background="black"), [0] * 3), (dict(background="blue"), [0, 0, 255]):
        with Image.open(tmp_path / "p.png") as picture:
            assert decode(picture, **options).mean((1, 2)).round().tolist() == colour


def test_half_transparent_pixels_are_mixed():
    """Alpha is a share, not a switch."""
    picture = Image.new("RGBA", (20, 20), (255, 0, 0, 128))
    assert decode(picture).mean((1, 2)).round().tolist() == [255, 127, 127]


def test_palette_deep_and_moving_images(tmp_path):
    """A palette in its colours, 16 bits scaled to 8, floats as they are, an animation by its first frame."""
    Image.new("RGB", (20, 20), (0, 255, 0)).quantize(4).save(tmp_path / "b.gif")
    Image.fromarray(np.full((20, 20), 32896, np.uint16)).save(tmp_path / "c.png")
    first = Image.new("L", (20, 20), 0)
    first.save(tmp_path / "d.gif", save_all=True, append_images=[Image.new("L", (20, 20), 255)])
    expected = {"b.gif": [0, 255, 0], "c.png": [128] * 3, "d.gif": [0] * 3}
    for name, colour in expected.items():
        with Image.open(tmp_path / name) as picture:
            assert decode(picture).mean((1, 2)).round().tolist() == colour

    assert decode(Image.new("F", (4, 4), 200.4), (1, 4, 4)).max() == 200
    assert decode(Image.new("I", (4, 4), 200), (1, 4, 4)).max() == 200         # 8 bits in a wide type
    assert decode(Image.new("I", (4, 4), 65535), (1, 4, 4)).max() == 255
    assert decode(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), (3, 4, 4)).min() == 255
    assert decode(Image.new("1", (4, 4), 1), (1, 4, 4)).min() == 255


def test_labels_that_are_no_numbers_are_0():
    """Some datasets have attributes or boxes instead of a class."""
    picture = Image.new("L", (4, 4))
    decoded = DecodedImages([(picture, 3), (picture, torch.zeros(40)), (picture, None)], (1, 4, 4))
    assert [decoded[i][1] for i in range(len(decoded))] == [3, 0, 0]


def chunk(kind, content):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def handmade_png(width, height, extra=b""):
    """A PNG file that says to be of that size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(10_000)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def broken_pictures():
    """{name: content} of files that are no pictures, or none that should be opened."""
    long_comment = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 20_000_000))
    screen = struct.pack("<HH", 65535, 65535)
    gif = b"GIF89a" + screen + b"\0\0\0," + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\2;"
    files = {"empty.png": b"", "text.jpg": b"hello", "bomb.png": handmade_png(60_000, 60_000), "bomb.gif": gif,
             "large.png": png(Image.new("1", (10_000, 10_000))), "none.png": handmade_png(0, 10),
             "comment.png": handmade_png(8, 8, long_comment)}
    for kind in ("png", "jpeg", "gif", "webp", "bmp"):
        picture = io.BytesIO()
        Image.effect_noise((64, 64), 90).convert("RGB").save(picture, kind)
        files[f"half.{kind}"] = picture.getvalue()[: len(picture.getvalue()) // 2]
    return files


@pytest.mark.parametrize("name, content", broken_pictures().items(), ids=broken_pictures())
def test_a_picture_that_cannot_be_read_is_a_reason(tmp_path, name, content):
    """Truncated, empty and absurdly sized files: no error, no memory taken, but a line that says why."""
    (tmp_path / name).write_bytes(content)
    item = DecodedImages(ImageFiles(str(tmp_path), "--images"), (3, 8, 8))[0]
    assert isinstance(item, str)
    assert 0 < len(item) <= 120
    assert "\n" not in item


def test_broken_and_hostile_pictures_are_skipped(tmp_path, capsys):
    """They are counted and listed with the reason, from a folder and from a ZIP file; the others are all there. One more
    than a tenth is an error that names the list."""
    broken = broken_pictures()
    home = tmp_path / "p" / "cat"
    home.mkdir(parents=True)
    for name, content in broken.items():
        (home / name).write_bytes(content)
    for i in range(9 * len(broken)):
        Image.new("RGB", (9, 9), (i, 2 * i % 256, 3)).save(home / f"good{i}.png")
    (home / "gone.png").symlink_to("nowhere")
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(home.glob("*.*")):
            if path.exists():
                archive.write(path, f"cat/{path.name}")

    for source in ("p", "p.zip"):
        data = load(tmp_path / source, tmp_path / source.replace(".", "_out"), (3, 8, 8))
        assert f"skipped {len(broken)} of {10 * len(broken)} images" in capsys.readouterr().out
        assert len(data.images) == len(data.labels) == 9 * len(broken)
        listing, = (tmp_path / source.replace(".", "_out") / "cache").glob("*.unreadable.txt")
        lines = listing.read_text().splitlines()
        assert len(lines) == len(broken)
        assert all(": " in line for line in lines)

    (home / "one_more.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"remove or mend") as error:
        load(tmp_path / "p", tmp_path / "out", (3, 8, 8))
    listing, = (tmp_path / "out" / "cache").glob("*.unreadable.txt")
    assert str(listing) in str(error.value)
    assert not list((tmp_path / "out" / "cache").glob("*.bin"))


def test_an_entry_that_would_fill_the_memory_is_not_unpacked(tmp_path, capsys):
    """A few bytes of a ZIP file that unpack to more than 256 MiB are skipped like a broken picture."""
    with zipfile.ZipFile(tmp_path / "huge.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(9):
            archive.writestr(f"cat/{i}.png", png(Image.new("RGB", (9, 9))))
        archive.writestr("cat/zeros.png", bytes(2**28 + 1))
    data = load(tmp_path / "huge.zip", tmp_path, (3, 8, 8))
    assert len(data.images) == 9
    assert "cat/zeros.png: it unpacks to more than 256 MiB" in capsys.readouterr().out


# ---- Cache -------------------------------------------------------------------------------------


def test_unreadable_images_are_listed(image_folder, tmp_path, capsys):
    """A broken file among good ones is left out, named and listed, and the labels stay with their images."""
    (image_folder / "cat" / "broken.png").write_bytes(b"not a picture")
    data = load(image_folder, tmp_path)
    assert data.labels.tolist() == [0] * 6 + [1] * 6
    assert data.images[6:].float().mean() > 120
    assert "broken.png" in capsys.readouterr().out
    listing, = (tmp_path / "cache").glob("*.unreadable.txt")
    text = listing.read_text()
    assert text.startswith("cat/broken.png: its content is no PNG, JPEG, BMP, GIF, WEBP picture")
    assert text.count("\n") == 1

    for i in range(3):
        (image_folder / "dog" / f"bad{i}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="4 of 16 images cannot be read"):
        load(image_folder, tmp_path)


def test_a_cache_is_made_once_and_follows_its_source(image_folder, tmp_path, monkeypatch):
    """The second load decodes nothing; a changed file or size builds anew; nothing temporary is left."""
    built = []
    real_build = images.build_cache

    def build(*arguments):
        built.append(1)
        real_build(*arguments)

    monkeypatch.setattr(images, "build_cache", build)
    first = load(image_folder, tmp_path).images.clone()
    assert torch.equal(load(image_folder, tmp_path).images, first)
    assert len(built) == 1
    load(image_folder, tmp_path, (3, 8, 8))
    assert len(built) == 2
    Image.new("RGB", (9, 9)).save(image_folder / "cat" / "0.png")
    changed = load(image_folder, tmp_path)
    assert len(built) == 3
    assert changed.images[0].max() == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_caching_says_how_long_it_takes(image_folder, tmp_path, monkeypatch, capsys):
    """Without a terminal, which would show a bar: a line now and then, with the time left; none for what is done soon."""
    load(image_folder, tmp_path)
    assert "caching" not in capsys.readouterr().out
    monkeypatch.setattr(images, "PATIENCE", 1e-9)
    load(image_folder, tmp_path / "again")
    assert "caching images: 1 of 12, about 0.1 minutes left" in capsys.readouterr().out


def test_worker_processes_decode_the_same(tmp_path):
    """A set large enough for worker processes comes out complete and in order."""
    numbered_zip(tmp_path / "many.zip", 1100)
    data = load(tmp_path / "many.zip", tmp_path, (1, 8, 8), workers=2)
    assert data.images[:, 0, 0, 0].tolist() == [i % 251 for i in range(1100)]


def test_workers_that_fail_are_told(tmp_path, monkeypatch):
    """Killed for lack of memory, say: one line that says what to try, and nothing half-made is left."""
    numbered_zip(tmp_path / "some.zip", 3)

    def fail(*arguments):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(images, "decode_into", fail)
    with pytest.raises(UserError, match=r"worker .* killed .* try num_workers 0") as error:
        load(tmp_path / "some.zip", tmp_path)
    assert error.value.code == 1
    assert not list((tmp_path / "cache").glob("*.bin"))


# Loads numbered pictures; prints whether this process built the cache, and the images.
LOADER = """
import sys, time
from pathlib import Path
from diffuser_lib import images

real_build = images.build_cache
def build(*arguments):
    print("built")
    real_build(*arguments)
images.build_cache = build

source = images.ImageFiles(sys.argv[1], "--images")
Path(sys.argv[4]).touch()                                        # ready
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
data = images.cached_images(source, (1, 8, 8), [], folder=Path(sys.argv[2]), name="x", key=source.fingerprint())
print(data.images[:, 0, 0, 0].tolist())
"""


def test_two_processes_at_once_make_one_cache(tmp_path):
    """Started together they do not disturb each other: one decodes, both have all images."""
    numbered_zip(tmp_path / "some.zip", 400)
    go = tmp_path / "go"
    pair = [prepared.start("-c", LOADER, tmp_path / "some.zip", tmp_path / "cache", go, f"{go}_{i}", cwd=tmp_path) for i in range(2)]
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("go_*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    go.touch()
    results = [process.communicate(timeout=300) for process in pair]

    assert [process.returncode for process in pair] == [0, 0], results
    expected = f"{[i % 251 for i in range(400)]}\n"
    assert sorted(out for out, _ in results) == sorted([expected, f"built\n{expected}"])
    assert not list(tmp_path.rglob("*.tmp"))


def cut(path):
    """Half of a file is lost."""
    os.truncate(path, os.path.getsize(path) // 2)


@pytest.mark.parametrize("damage", [
    lambda pixels: pixels.write_bytes(b""),
    lambda pixels: pixels.unlink(),
    cut,
    lambda pixels: pixels.with_suffix(".json").unlink(),
    lambda pixels: pixels.with_suffix(".json").write_text("{"),
    lambda pixels: pixels.with_suffix(".json").write_text("[]"),
    lambda pixels: pixels.with_suffix(".json").write_text('{"images": "3"}'),
    lambda pixels: pixels.with_suffix(".labels").unlink(),
    lambda pixels: cut(pixels.with_suffix(".labels")),
    lambda pixels: pixels.with_suffix(".json").write_bytes(b"\xff\0"),
], ids=["emptied", "gone", "cut", "no index", "half an index", "no table", "no number", "no labels", "half the labels", "no text"])
def test_a_damaged_cache_is_made_anew(image_folder, tmp_path, damage):
    """A cache that is not as large as its index says, or whose index cannot be read, is built again."""
    first = load(image_folder, tmp_path).images.clone()
    damage(next((tmp_path / "cache").glob("*.bin")))
    again = load(image_folder, tmp_path)
    assert torch.equal(again.images, first)
    assert again.labels.tolist() == [0] * 6 + [1] * 6


def test_a_killed_run_leaves_no_cache_that_counts(image_folder, tmp_path, monkeypatch):
    """Broken off between pixels and index, or in the midst of the pixels: the next run builds it whole."""
    def interrupted(*arguments):
        raise KeyboardInterrupt

    for place in ("write_json", "report_unreadable"):
        with monkeypatch.context() as patched:
            patched.setattr(images, place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                load(image_folder, tmp_path)
        assert not list((tmp_path / "cache").glob("*.json"))
        assert not list((tmp_path / "cache").glob("*.tmp"))

    left = next((tmp_path / "cache").glob("*.lock")).with_suffix(".tmp")
    left.write_bytes(b"x" * 10**6)                               # of a run that was killed outright
    assert load(image_folder, tmp_path).images.shape == (12, 3, 16, 16)
    assert not left.exists()


def test_a_cache_larger_than_the_disk_is_refused(image_folder, tmp_path, monkeypatch):
    """Before decoding, not when the disk is full; the message has both numbers."""
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(images.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"GiB are free in .*data_dir") as error:
        load(image_folder, tmp_path)
    assert error.value.code == 1
    assert not list((tmp_path / "cache").glob("*.bin"))


def test_a_cache_is_mapped_and_not_read(tmp_path):
    """The images are a view of the file: the process need not hold them in its memory."""
    numbered_zip(tmp_path / "some.zip", 5)
    data = load(tmp_path / "some.zip", tmp_path, (1, 8, 8))
    pixels = next((tmp_path / "cache").glob("*.bin"))
    with open(pixels, "r+b") as file:
        file.write(b"\xee")
    assert data.images[0, 0, 0, 0] == 0xEE


def test_every_key_and_shape_has_a_cache_of_its_own(tmp_path):
    """Sets that differ in nothing but their key do not share a file."""
    for key, brightness in (("a",), 10), (("b",), 20):
        source = [(Image.new("L", (4, 4), brightness), 0)] * 3
        data = cached_images(source, (1, 4, 4), [], folder=tmp_path, name="set", key=key)
        assert data.images.unique().tolist() == [brightness]
    assert len(list(tmp_path.glob("set_*.bin"))) == 2
    assert json.loads(next(tmp_path.glob("set_*.json")).read_text()) == dict(images=3, unreadable=0)


# ---- Out ---------------------------------------------------------------------------------------


def test_tensors_become_pictures():
    """Grey for one channel, colour for three, each pixel in its place."""
    colour = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    picture = to_pil(colour)
    assert (picture.mode, picture.size) == ("RGB", (7, 5))
    assert np.array_equal(np.asarray(picture), colour.permute(1, 2, 0).numpy())
    grey = to_pil(colour[:1])
    assert (grey.mode, grey.size) == ("L", (7, 5))
    assert np.array_equal(np.asarray(grey), colour[0].numpy())


def grid(tmp_path, pictures, names=(), columns=0):
    """A grid as it stands in its file."""
    save_grid(pictures, tmp_path / "grids" / "grid.png", names, columns)
    assert os.listdir(tmp_path / "grids") == ["grid.png"]
    with Image.open(tmp_path / "grids" / "grid.png") as picture:
        picture.load()
    return picture


def flat(*brightnesses, channels=1, side=64):
    """Images of one brightness each."""
    values = torch.tensor(brightnesses, dtype=torch.uint8)
    return values.view(-1, 1, 1, 1).expand(-1, channels, side, side).clone()


@pytest.mark.parametrize("count, columns, expected", [(4, 0, (2, 2)), (5, 0, (3, 2)), (6, 6, (6, 1)), (1, 0, (1, 1))])
def test_a_grid_is_filled_row_by_row(tmp_path, count, columns, expected):
    """Each image in its place, with four white pixels between them; about as many columns as rows by default."""
    brightnesses = [20 * i + 1 for i in range(count)]
    picture = grid(tmp_path, flat(*brightnesses), columns=columns)
    across, down = expected
    assert picture.size == (68 * across + 4, 68 * down + 4)
    assert picture.mode == "L"
    pixels = np.asarray(picture)
    for i, brightness in enumerate(brightnesses):
        top = 4 + 68 * (i // across)
        left = 4 + 68 * (i % across)
        assert (pixels[top : top + 64, left : left + 64] == brightness).all()
    assert (pixels[:4] == 255).all()
    assert (pixels[:, :4] == 255).all()


def test_pictures_are_written_beside_the_work(tmp_path):
    """All that were handed over are there at the end of the block, whole, also where an error or Ctrl-C ends it."""
    pixels = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8)
    for error in (None, KeyboardInterrupt, ZeroDivisionError):
        folder = tmp_path / str(error)
        folder.mkdir()
        with contextlib.suppress(KeyboardInterrupt, ZeroDivisionError), images.PictureWriter() as writer:
            for i, image in enumerate(pixels):
                writer.save(image, folder / f"{i}.png")
            if error:
                raise error
        assert len(os.listdir(folder)) == 300
        for i, image in enumerate(pixels):
            assert np.array_equal(np.asarray(Image.open(folder / f"{i}.png")), image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("count", [1, 1000])
def test_a_picture_that_cannot_be_written_stops_the_work(tmp_path, monkeypatch, count):
    """At the end at the latest; before it, memory is taken for a few hundred pictures that wait and no more."""
    real_save = images.save_png
    saved = []

    def save(image, path):
        saved.append(path)
        if path.stem == "0":
            time.sleep(0.3)
            raise OSError(28, "No space left on device")
        real_save(image, path)

    monkeypatch.setattr(images, "save_png", save)
    with pytest.raises(OSError, match="No space left"), images.PictureWriter() as writer:
        for i in range(count):
            writer.save(torch.zeros(1, 8, 8, dtype=torch.uint8), tmp_path / f"{i}.png")
    assert len(saved) <= writer.WAITING + 2


def test_small_images_are_enlarged(tmp_path):
    """To about 64 pixels, in colour too; images that are large enough stay as they are."""
    assert grid(tmp_path, flat(9, channels=3, side=8)).size == (72, 72)
    assert grid(tmp_path, flat(9, channels=3, side=8)).mode == "RGB"
    assert grid(tmp_path, flat(9, side=28)).size == (64, 64)
    assert grid(tmp_path, flat(9, side=100)).size == (108, 108)


def test_pixels_of_small_images_stay_sharp(tmp_path):
    """Each becomes a square of its own value, never a blur, at a whole factor."""
    pixels = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8)
    enlarged = pixels[0, 0].repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert np.array_equal(np.asarray(grid(tmp_path, pixels))[4:68, 4:68], enlarged.numpy())


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 64, 64), (3, 48, 64), (3, 96, 96)], ids=str)
@pytest.mark.parametrize("count, classes", [
    (1, 1), (100, 1), (100, 2), (100, 3), (100, 10), (100, 17), (100, 100), (100, 1000), (40, 10), (10, 10), (7, 0), (16, 0)])
def test_a_grid_is_nearly_square(tmp_path, count, classes, shape):
    """However many images and classes there are, and of whatever size: no ribbon, little of it empty."""
    names = [f"class {i}" for i in range(classes)]
    picture = grid(tmp_path, torch.zeros(count, *shape, dtype=torch.uint8), names)
    assert 0.6 <= picture.width / picture.height <= 1.6
    _, height, width = shape
    zoom = max(1, 64 // max(height, width))
    if count > 10:
        assert count * height * width * zoom**2 > 0.55 * picture.width * picture.height


def test_the_images_of_a_class_stand_together(tmp_path):
    """Drawn in turn, each class becomes a block of neighbouring columns, in the order of its images."""
    brightness = [100 * (i % 2) + i // 2 + 1 for i in range(100)]            # 1..50 and 101..150
    picture = grid(tmp_path, flat(*brightness), ["left", "right"])
    pixels = np.asarray(picture)
    block = 5 * 68 + 8
    assert picture.size == (2 * block - 4, 18 + 10 * 68 + 4)
    for i in range(100):
        row, column = divmod(i // 2, 5)
        left = 4 + (i % 2) * block + 68 * column
        top = 18 + 4 + 68 * row
        assert (pixels[top : top + 64, left : left + 64] == brightness[i]).all()
    head = ImageOps.invert(picture).crop((0, 0, picture.width, 18))
    for i in range(2):
        box = head.crop((i * block, 0, (i + 1) * block, 18)).getbbox()
        assert abs((box[0] + box[2]) / 2 - (4 + 5 * 34)) <= 4                # in the middle above its block


def test_blocks_go_on_below(tmp_path):
    """A hundred classes of one image each: rows of them, each image with its name."""
    picture = grid(tmp_path, flat(*range(100)), [str(i) for i in range(100)])
    layout = images.choose_layout(100, 100, 64, 64, 18)
    assert picture.size == layout.size
    pixels = np.asarray(picture)
    for i in range(100):
        left, top = layout.corner(i)
        assert (pixels[top : top + 64, left : left + 64] == i).all()
        assert pixels[top - 18 : top - 4, left : left + 64].min() < 100


@pytest.mark.parametrize("name, lines", [
    ("cat", ["cat"]), ("bird of prey", ["bird of prey"]), ("a mouse in a house", ["a mouse in", "a house"]),
    ("deer_with_antlers", ["deer_with_", "antlers"]), ("train/automobile", ["train/", "automobile"]),
    ("incomprehensible", ["incompre..."]), ("very incomprehensible", ["very", "incompre..."]),
    ("one\ntwo\tthree", ["one two", "three"]), ("", [""]), ("bad \udcff byte", ["bad ? byte"])])
def test_long_names_take_two_lines_or_say_that_they_are_cut(name, lines):
    """Between words where that helps; else three dots stand for what is missing."""
    found, font = images.fit_heading(name, 64)
    assert found == lines
    assert all(font.getlength(line) <= 64 for line in found)


def test_names_of_two_lines_lie_above_their_images(tmp_path):
    """All headings of a grid are then as high, and short names stand next to the images."""
    picture = grid(tmp_path, flat(0, 0), ["a mouse in a house", "cat"])
    assert picture.size == (140, 32 + 68 + 4)
    head = ImageOps.invert(picture).crop((0, 0, 140, 32))
    long, short = (head.crop((68 * i, 0, 68 * i + 68, 32)).getbbox() for i in range(2))
    assert long[1] < 12
    assert short[1] > 14
    assert long[3] <= 32
    assert np.asarray(picture)[36:100, 4:68].max() == 0


def test_names_of_any_script_are_drawn(tmp_path):
    """Where the system has a font; else with Pillow's own, and no error."""
    assert images.heading_font("cat").getname()[0] != "DejaVu Sans"
    lines, _ = images.fit_heading("käse 日本", 200)
    assert lines == ["käse 日本"]
    grid(tmp_path, flat(0), ["käse 日本"])


def test_a_column_has_the_name_of_its_class(tmp_path):
    """Names stand above their columns, and one too long is cut at the column's edge."""
    names = ["cat", "", "i" * 500]
    picture = grid(tmp_path, flat(0, 0, 0, 9, 9, 9), names)
    assert picture.size == (3 * 68 + 4, 18 + 2 * 68 + 4)
    head = ImageOps.invert(picture).crop((0, 0, picture.width, 18))
    columns = [head.crop((4 + 68 * i, 0, 68 + 68 * i, 18)).getbbox() for i in range(3)]
    assert columns[0] is not None
    assert columns[1] is None
    assert columns[2] is not None
    gaps = np.asarray(head)[:, [0, 1, 70, 71, 138, 139, 206, 207]]
    assert gaps.max() == 0


def test_a_grid_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    """A full disk is an OSError for the caller to tell, and no half picture."""
    path = tmp_path / "grid.png"
    save_grid(flat(9), path, [])
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_grid(flat(99), path, [])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["grid.png"]


@pytest.mark.parametrize("name, expected", [
    ("cat", "cat"), ("..", "class"), ("../../up", "_.._up"), ("/abs/olute", "_abs_olute"), ("y" * 300, "y" * 50),
    ("a\0b", "a_b"), ("\x1b[31m", "_31m"), ("c:\\win", "c_win"), ("", "class"), ("käse 日本", "käse_日本"),
    ("v1.5-b", "v1.5-b")])
def test_names_of_classes_lead_nowhere_as_names_of_files(name, expected):
    """No separator, no leading dot, no control character, no endless name; letters of any script stay."""
    assert file_name(name) == expected
    assert Path(file_name(name)).name == expected


@pytest.mark.parametrize("names, expected", [
    (["a b", "a_b", "c"], ["a_b-0", "a_b-1", "c"]), (["Cat", "cat", "dog"], ["Cat-0", "cat-1", "dog"]),
    (["y" * 60 + "1", "y" * 60 + "2"], ["y" * 50 + "-0", "y" * 50 + "-1"]), (["a b", "a_b", "a_b-0"], ["a_b-0-0", "a_b-1", "a_b-0"]),
    (["e\u0301", "\xe9"], ["\xe9-0", "\xe9-1"]), (["", ".", ".."], ["class-0", "class-1", "class-2"]), (["3", "7"], ["3", "7"])])
def test_no_two_classes_have_the_same_file_name(names, expected):
    """Also where a disk knows no case, and where long names are cut; a name that is alone stays as it is."""
    found = images.file_names(names)
    assert found == expected
    assert len({name.casefold() for name in found}) == len(names)
    assert all(Path(name).name == name for name in found)


def test_names_in_a_zip_file_are_names_only(tmp_path):
    """Entries with dots and slashes are classes at most; no file is made beside the cache."""
    home = tmp_path / "home"
    home.mkdir()
    with zipfile.ZipFile(home / "evil.zip", "w") as archive:
        for name in ("../../up", "/abs/olute", "a/..", "c:\\win", "x" * 300, "plain", "\x1b[31m"):
            archive.writestr(f"{name}/0.png", png(Image.new("RGB", (8, 8))))
    data = load(home / "evil.zip", home, (3, 8, 8))
    assert len(data.images) == len(data.class_names) == 5        # those with dots count as hidden
    assert os.listdir(tmp_path) == ["home"]
    assert sorted(os.listdir(home)) == ["cache", "evil.zip"]


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path):
    """Its range is that of its kind of file, not of its values: all of a series are read alike."""
    for name, value in (("dark", 200), ("bright", 51_400)):
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / f"{name}.png")
    data = load(tmp_path, tmp_path / "data", (1, 8, 8))
    assert sorted(image.max().item() for image in data.images) == [1, 200]


def test_one_core_is_no_reason_to_warn(tmp_path, monkeypatch, recwarn):
    """Where a thousand pictures are decoded by more processes than there are cores, torch's advice is not shown."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    for i in range(1000):
        (tmp_path / f"{i}.png").write_bytes(png(Image.new("L", (8, 8), i % 256)))
    assert len(load(tmp_path, tmp_path / "data", (1, 8, 8), workers=2).images) == 1000
    assert not [str(each.message) for each in recwarn if "worker" in str(each.message)]
