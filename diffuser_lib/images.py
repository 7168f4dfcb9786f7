"""Image files in and out: folders, ZIP files, decoding, a cache of bytes; pictures and grids.

Numbers     ImageData, to_uint8, from_uint8: uint8 [N, C, H, W] outside, float in [-1, 1] inside a network
In          open_image; ImageSource: images with labels; ImageFiles: those of a folder or ZIP file; DecodedImages: as
            arrays of one shape
Cache       cached_images: decoded once, then memory-mapped
Out         to_pil, save_png, PictureWriter, PictureFolder, ARCHIVES, save_grid, file_names

Needs torch, numpy, Pillow and tqdm, and filelock for locks.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import time
import unicodedata
import warnings
import zipfile
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffuser_lib.files import UserError, first_line, hold_lock, warn, write_atomically, write_json
from diffuser_lib.listing import Names, OverlapError, ZipIndex

Shape = tuple[int, int, int]                                     # (C, H, W)

# ---- Numbers -----------------------------------------------------------------------------------


@dataclass
class ImageData:
    """Images with labels. images: uint8 [N, C, H, W], perhaps memory-mapped; labels: int64 [N], all 0 without classes.

    class_names: may be empty; uncropped: the same images with a margin around them, to be cropped elsewhere, or None.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: list[str] = field(default_factory=list)
    uncropped: Tensor | None = None

    def __post_init__(self):
        if self.labels is None:
            self.labels = torch.zeros(len(self.images), dtype=torch.int64)

    def digest(self) -> str:
        """A fingerprint of the labels and of some images, a hundred at most, to tell one set from another."""
        some = self.images[:: math.ceil(len(self.images) / 100)].contiguous()
        return hashlib.sha256(self.labels.numpy().tobytes() + some.numpy().tobytes()).hexdigest()


def from_uint8(images: Tensor) -> Tensor:
    """0..255 to float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0..255, on the CPU."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


# ---- In ----------------------------------------------------------------------------------------

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")                  # Pillow goes by content, and knows many more
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")         # of Pillow
MAX_UNPACKED = 2**28                                             # bytes of one entry of a ZIP file


@contextmanager
def strict_pillow() -> Iterator[None]:
    """Pillow's warnings never reach the terminal: too many pixels are an error, other flaws are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                          # damaged EXIF, a strange MPO
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """A picture in one of FORMATS, its pixels not yet read; other formats, some of which start programs, are refused.

    Raises ValueError for those, and for damaged files what Pillow raises, errors of many kinds.
    """
    try:
        with strict_pillow():
            picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:                               # its message names an object in memory
        raise ValueError(f"its content is no {', '.join(FORMATS)} picture") from None
    if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:  # Pillow's own warning knows nothing of threads
        raise ValueError(f"it has {picture.width * picture.height:,} pixels, {Image.MAX_IMAGE_PIXELS:,} at most")
    return picture


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of a picture as it is looked at, whichever way it is stored."""
    with strict_pillow():
        return ImageOps.exif_transpose(picture).size


def require_images(path: str, flag: str) -> None:
    """Raise UserError unless there is something at the path; `flag` is the option that gave it."""
    if not path:
        raise UserError(f"{flag} is needed: a folder or file of images")
    if not os.path.exists(path):
        raise UserError(f"{flag} {path}: there is no such folder or file")
    if not os.path.isdir(path) and not os.path.isfile(path):     # opening a pipe would wait forever
        raise UserError(f"{flag} {path} is a pipe, socket or device: give a folder or file of images")


def walk_once(root: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of what is in it but folders) for all folders below the root, through links, each folder once.

    What is really there comes before what a link leads to; links back up are left out. A folder that cannot be read is
    told.
    """
    def report(error: OSError) -> None:
        warn_once(f"left out: {error.filename} cannot be read ({error.strerror})")

    seen = set()                                                 # links may lead round in circles
    starts = [str(root)]
    while starts:
        for folder, subfolders, names in os.walk(starts.pop(0), onerror=report):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                subfolders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            yield folder, names

            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in subfolders:
                path = os.path.join(folder, name)
                if not os.path.islink(path):                     # os.walk follows folders, but no links
                    continue
                leads_up = Path(folder).resolve().is_relative_to(os.path.realpath(path))
                if not leads_up:
                    starts.append(path)


@lru_cache
def warn_once(text: str) -> None:
    """Print a line on stderr, the first time only: a set of images may be looked at several times."""
    warn(text)


def list_files(path: Path, flag: str) -> Names:
    """All files of a folder or ZIP file, as sorted paths inside it. flag: gave the path. Raises UserError."""
    if path.is_dir():
        return Names(walk_files(path)).sorted()
    try:
        return ZipIndex(path)
    except OverlapError:
        raise UserError(f"{flag} {path} is refused: its entries overlap, as in a ZIP file made to fill the memory. "
                        "Pack the images anew") from None
    except Exception as error:                                   # damage of many kinds
        raise UserError(f"{flag} {path} is no whole ZIP file ({first_line(error)})") from error


def walk_files(root: Path) -> Iterator[str]:
    """All files below a folder, as paths inside it; links that lead nowhere are left out."""
    for folder, names in walk_once(root):
        inside = Path(folder).relative_to(root).as_posix()
        for name in names:
            if os.path.exists(os.path.join(folder, name)):
                yield name if inside == "." else f"{inside}/{name}"


def stat_of(path: Path) -> tuple[int, int]:
    """What changes when a file is rewritten: its size and time."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class ImageSource(Dataset):
    """Images with labels, read on demand: item i is (PIL image, label). Reading a broken one raises, in many kinds.

    labels: int64 [N], -1 where there is none; class_names: may be empty; path: where they are.
    """

    labels: np.ndarray
    class_names: list[str]
    path: Path

    def open_item(self, i: int) -> Image.Image:
        """Picture i, its pixels perhaps not yet read."""
        raise NotImplementedError

    def name_of(self, i: int) -> str:
        """What picture i is called where it cannot be read."""
        raise NotImplementedError

    def files(self) -> Iterable[Path]:
        """All that the images are read from."""
        raise NotImplementedError

    def test_part(self) -> ImageSource | None:
        """The images for testing that stand beside these, with their classes; None where there are none."""
        return None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        if self.labels[i] < 0:
            raise ValueError("it has no label")
        return self.open_item(i), int(self.labels[i])

    def guess_channels(self, looks: int = 32) -> int:
        """1 if all of a few images spread over the set are grey, else 3."""
        for i in range(0, len(self), max(1, len(self) // looks)):
            try:
                image, _ = self[i]
            except Exception:                                    # unreadable: skipped later, and listed
                continue
            with image:
                if image.mode not in GREY_MODES:
                    return 3
        return 1

    def fingerprint(self) -> tuple[str, str]:
        """Changes when a file is added, removed, renamed or rewritten, and with the labels."""
        digest = hashlib.sha256(self.labels)
        for file in self.files():
            name = str(file)[len(str(self.path)) :]
            digest.update(repr((name, stat_of(file))).encode(errors="replace"))
        return str(self.path.resolve()), digest.hexdigest()


class ImageFiles(ImageSource):
    """The images below a folder or in a ZIP file, in order of name. Links are followed.

    The folder that directly holds an image names its class; one folder alone makes no classes. flag: the option that
    gave the path, for messages; names: all that list_files finds, if it is known. Raises UserError where there is no
    image.
    """

    def __init__(self, path: str, flag: str, names: Names | None = None):
        require_images(path, flag)
        self.path = Path(path)
        if names is None:
            names = list_files(self.path, flag)
        self.archive = names if isinstance(names, ZipIndex) else None
        self.names = names if all(map(self.is_image, names)) else Names(filter(self.is_image, names))
        if not self.names:
            kinds = ", ".join(ending[1:].upper() for ending in ENDINGS)
            raise UserError(f"{flag} {path} holds no {kinds} image")
        self.labels, self.class_names = self.classes_of_folders(self.names)

    @classmethod
    def classes_of_folders(cls, names: Names) -> tuple[np.ndarray, list[str]]:
        """The number of each image's class, int64 [N], and the names of the classes."""
        found = {}
        folders = (name.rpartition("/")[0] for name in names)
        labels = np.fromiter((found.setdefault(folder, len(found)) for folder in folders), np.int64, len(names))
        classes = sorted(found)
        number = np.empty(len(found), np.int64)
        number[[found[folder] for folder in classes]] = np.arange(len(found))
        return number[labels], cls.name_classes(classes)

    @staticmethod
    def is_shown(name: str) -> bool:
        """Neither hidden nor what macOS adds to a ZIP file."""
        return not any(part.startswith((".", "__MACOSX")) and part != "." for part in name.split("/"))

    @classmethod
    def is_image(cls, name: str) -> bool:
        """By its ending."""
        return name.lower().endswith(ENDINGS) and cls.is_shown(name)

    @staticmethod
    def name_classes(folders: list[str]) -> list[str]:
        """A name for each folder: its last part, or all of it where two would be called the same."""
        if len(folders) == 1:
            return []
        short = [os.path.basename(folder) or "unsorted" for folder in folders]
        if len(set(short)) == len(short):
            return short
        unsorted = "unsorted"
        while unsorted in folders:
            unsorted += "_"
        return [folder or unsorted for folder in folders]

    def __len__(self) -> int:
        return len(self.names)

    def open_item(self, i: int) -> Image.Image:
        if self.path.is_dir():
            return open_image(self.regular_file(self.names[i]))
        return open_image(io.BytesIO(self.read_bytes(self.names[i])))

    def name_of(self, i: int) -> str:
        return self.names[i]

    def regular_file(self, name: str) -> Path:
        """A file of the folder. Raises ValueError for what opening might wait for forever."""
        path = self.path / name
        if not path.is_file():
            raise ValueError("it is a pipe, socket or device")
        return path

    def read_bytes(self, name: str) -> bytes:
        """All of a file, from the folder or ZIP file. Raises ValueError for a very large one."""
        if self.archive is not None:
            return self.archive.read(name, MAX_UNPACKED)
        path = self.regular_file(name)
        if path.stat().st_size > MAX_UNPACKED:
            raise ValueError(f"it is larger than {MAX_UNPACKED >> 20} MiB")
        return path.read_bytes()

    def files(self) -> Iterable[Path]:
        return [self.path] if self.path.is_file() else (self.path / name for name in self.names)


@dataclass
class DecodedImages(Dataset):
    """Item i of `source`, (PIL image, label), as (uint8 [C, H, W], label); the reason why where it cannot be read.

    shape: (C, H, W); background: the colour behind what is transparent.
    """

    source: Dataset | list
    shape: Shape
    background: str = "white"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int] | str:
        try:
            with strict_pillow():
                image, label = self.source[i]
                pixels = self.decode(image)
            return pixels, label if isinstance(label, int) else 0
        except Exception as error:                               # broken files raise errors of every kind
            return first_line(error)

    def decode(self, image: Image.Image) -> np.ndarray:
        """Upright, on the background, 16 bits to 8, cropped to the middle and resized: uint8 [C, H, W]."""
        channels, height, width = self.shape
        image = ImageOps.exif_transpose(image)

        if image.mode.startswith("I") or image.mode == "F":      # Pillow would clip what lies above 255
            pixels = np.asarray(image, dtype=np.float64)
            if image.mode.startswith("I;16") or pixels.max() > 255:              # I and F may hold 8 bits
                pixels = pixels / 257
            image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

        if image.has_transparency_data:
            image = image.convert("RGBA")
            background = Image.new("RGBA", image.size, self.background)
            image = Image.alpha_composite(background, image)

        image = image.convert("RGB" if channels == 3 else "L")
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        return np.array(image).reshape(height, width, channels).transpose(2, 0, 1).copy()


# ---- Cache -------------------------------------------------------------------------------------


def cached_images(source: Dataset | list, shape: Shape, class_names: list[str], *, folder: Path, name: str, key: tuple,
                  workers: int = 0) -> ImageData:
    """The images of `source`, (PIL image, label) each, in one shape; memory-mapped from a cache that is made once.

    folder: where caches are; name: how this one's name begins; key: what makes the set this one and no other;
    workers: processes that decode. Raises UserError if over a tenth cannot be read.
    """
    from filelock import FileLock  # torch depends on it

    digest = hashlib.sha256(repr((key, shape, "v1")).encode()).hexdigest()[:16]
    index = folder / f"{name}_{digest}.json"
    if not cache_is_whole(index, shape):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(index.with_suffix(".lock")):               # a second run waits for the first
            if not cache_is_whole(index, shape):
                build_cache(index, DecodedImages(source, shape), workers)

    labels = torch.from_numpy(np.fromfile(index.with_suffix(".labels"), np.int64))
    size = (len(labels), *shape)
    images = torch.from_file(str(index.with_suffix(".bin")), size=math.prod(size), dtype=torch.uint8)
    return ImageData(images.view(size), labels, class_names)


def cache_is_whole(index: Path, shape: Shape) -> bool:
    """Whether a cache is there, and as large as its index says."""
    try:
        count = json.loads(index.read_text())["images"]
        sizes = [os.path.getsize(index.with_suffix(ending)) for ending in (".bin", ".labels")]
        return sizes == [count * math.prod(shape), count * np.dtype(np.int64).itemsize]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def build_cache(index: Path, decoded: DecodedImages, workers: int) -> None:
    """Decode all images in worker processes into one file of bytes, and write its index last. Raises UserError."""
    temporary = index.with_suffix(".tmp")
    for stale in (index, index.with_suffix(".bin"), index.with_suffix(".labels"), temporary):
        stale.unlink(missing_ok=True)                            # of a run that was killed, or of another version
    need = len(decoded) * math.prod(decoded.shape)
    free = shutil.disk_usage(index.parent).free
    if need > free:
        raise UserError(f"the decoded images take {need / 2**30:.2g} GiB, {free / 2**30:.2g} GiB are free in "
                        f"{index.parent}: choose another --data_dir or a smaller --img_size", code=1)

    try:
        labels, unreadable = decode_into(temporary, decoded, workers)
        report_unreadable(index.with_suffix(".unreadable.txt"), unreadable, len(decoded))
        os.replace(temporary, index.with_suffix(".bin"))
        write_atomically(index.with_suffix(".labels"), lambda file: file.write(labels.tobytes()))
        write_json(index, dict(images=len(labels), unreadable=len(unreadable)))
    except RuntimeError as error:                                # of the workers
        raise UserError(f"reading images failed ({first_line(error)}): try --num_workers 0", code=1) from error
    finally:
        temporary.unlink(missing_ok=True)


def decode_into(path: Path, decoded: DecodedImages, workers: int) -> tuple[array, list[str]]:
    """Write the bytes of all images into a file; returns their labels, and a line for each that cannot be read.

    How long it takes is told: by a bar on a terminal, elsewhere by a line now and then.
    """
    name_of = getattr(decoded.source, "name_of", str)
    if len(decoded) < 1000:                                      # starting workers takes longer
        workers = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                          # more processes than cores: they wait for the disk
        batches = iter(DataLoader(decoded, batch_size=64, num_workers=workers, collate_fn=list))

    labels = array("q")
    unreadable = []
    with open(path, "wb") as file:
        items = tell_time(itertools.chain.from_iterable(batches), "caching images", len(decoded))
        for i, item in enumerate(items):
            if isinstance(item, str):
                unreadable.append(f"{name_of(i)}: {item}")
                continue
            pixels, label = item
            file.write(pixels.tobytes())
            labels.append(int(label))
        file.flush()
        os.fsync(file.fileno())                                  # the index that calls it whole comes later
    return labels, unreadable


PATIENCE = 30                                                    # seconds before the first line of tell_time


def tell_time(items: Iterable, what: str, total: int) -> Iterator:
    """The items as they come, with a bar and the time left.

    Where there is no terminal: with a line after half a minute, and one each time that has doubled.

    what: is being done; total: how many items there are.
    """
    bar = tqdm(items, what, total, leave=False, disable=None)
    if not bar.disable:
        yield from bar
        return
    start = time.perf_counter()
    due = PATIENCE
    for i, item in enumerate(items):
        yield item
        passed = time.perf_counter() - start
        if passed > due:
            left = passed * (total - i - 1) / (i + 1)
            with suppress(OSError):                              # where nobody reads it any more
                print(f"{what}: {i + 1:,} of {total:,}, about {max(left / 60, 0.1):.1f} minutes left", flush=True)
            due *= 2


def report_unreadable(listing: Path, unreadable: list[str], total: int) -> None:
    """List the images that cannot be read in a file, and say so. Raises UserError for more than a tenth of all."""
    if not unreadable:
        return
    text = "\n".join([*unreadable, ""])
    write_atomically(listing, lambda file: file.write(text.encode(errors="replace")))
    example = f"such as {unreadable[0]}; all are listed in {listing}"
    if len(unreadable) > total / 10:
        raise UserError(f"{len(unreadable)} of {total} images cannot be read, {example}: remove or mend them")
    print(f"skipped {len(unreadable)} of {total} images that cannot be read, {example}")


# ---- Out ---------------------------------------------------------------------------------------


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [C, H, W] as a grey or colour picture."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def save_png(image: Tensor, path: Path) -> None:
    """uint8 [C, H, W] as a PNG file, which is whole or not there, whatever interrupts. Raises OSError."""
    picture = to_pil(image)
    write_atomically(path, lambda file: picture.save(file, "PNG"), through_power_cuts=False)


class PictureWriter:
    """Writes pictures in threads of its own, so that drawing waits neither for their compression nor for the disk.

    A context manager: at its end all pictures are written, after Ctrl-C and other errors, too.
    """

    THREADS = 4
    WAITING = 256                                                # pictures that memory is taken for

    def __init__(self):
        self.pool = ThreadPoolExecutor(min(self.THREADS, os.cpu_count() or 1))
        self.pending = deque()

    def save(self, image: Tensor, path: Path) -> None:
        """uint8 [C, H, W] as a PNG file, soon. Raises OSError where an earlier one could not be written."""
        self.pending.append(self.pool.submit(save_png, image, path))
        while self.pending and (self.pending[0].done() or len(self.pending) > self.WAITING):
            self.pending.popleft().result()

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        self.pool.shutdown()
        if kind is None:
            for written in self.pending:
                written.result()


@dataclass(frozen=True)
class PictureFolder:
    """Where the pictures of one request go: folder/images/, with a record of the request beside it.

    A request that broke off can go on: its record is written first, each picture is whole or not there, and a later
    request of the same identity draws what is missing. record: JSON, written as record_name; identity: of a record,
    what two requests for the same pictures have in common; name: the file of picture number i of `count`; last: the
    file in the folder that is written last.
    """

    folder: Path
    record_name: str
    record: dict
    identity: Callable[[dict], object]
    name: Callable[[int], str]
    count: int
    shape: Shape
    last: str

    def path(self, i: int) -> Path:
        return self.folder / "images" / self.name(i)

    def read(self, i: int) -> Tensor | None:
        """Picture i, uint8 [C, H, W]; None where it is not there, or is not whole after a power cut."""
        try:
            with open_image(self.path(i)) as picture:
                pixels = np.array(picture)
        except Exception:                                        # Pillow raises many kinds
            return None
        channels, height, width = self.shape
        if pixels.dtype != np.uint8 or pixels.shape != ((height, width, channels) if channels > 1 else (height, width)):
            return None
        return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1)

    def require(self, i: int) -> Tensor:
        """Picture i, uint8 [C, H, W]. Raises OSError where somebody has taken it away."""
        image = self.read(i)
        if image is None:
            raise OSError(f"{self.name(i)} has gone, or is damaged")
        return image

    def missing(self) -> list[int]:
        """The numbers of the pictures that are not there."""
        return [i for i in range(self.count) if self.read(i) is None]

    def earlier_record(self) -> dict:
        """The record in the folder where it asks for the same pictures; else an empty one."""
        try:
            there = json.loads((self.folder / self.record_name).read_text())
            same = self.identity(there) == self.identity(json.loads(json.dumps(self.record)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):       # JSON of any kind
            return {}
        return there if same else {}

    def require_open(self) -> None:
        """Raise UserError unless the folder is empty, or pictures of this very request are missing in it."""
        images = self.folder / "images"
        packed = [path for path in map(self.archive, ARCHIVES) if path.exists()]
        if not packed and not (images.is_dir() and any(images.iterdir())):
            return

        place = packed[0] if packed else images
        advice = "give another --save_dir or remove it"
        if not self.earlier_record():
            raise UserError(f"{place} already holds images of another request: {advice}")
        if packed or ((self.folder / self.last).exists() and not self.missing()):
            raise UserError(f"{place} already holds images, all that are asked for: {advice}")

    def archive(self, kind: str) -> Path:
        """Where all pictures stand as one file; kind: a name in ARCHIVES."""
        return self.folder / f"images.{kind}"

    def pack(self, kind: str, labels: Sequence[int], class_names: Sequence[str]) -> None:
        """Put all pictures into one file, and remove theirs once it is whole.

        kind: a name in ARCHIVES; labels: one for each picture; class_names: may be empty. Raises OSError.
        """
        write_atomically(self.archive(kind), lambda file: ARCHIVES[kind](file, self, labels, class_names))
        for i in range(self.count):
            self.path(i).unlink(missing_ok=True)
        with suppress(OSError):                                  # somebody else's files are in it
            (self.folder / "images").rmdir()

    @contextmanager
    def hold(self, go_on: str) -> Iterator[None]:
        """Hold the folder while pictures are written into it; another process is refused.

        go_on: see explain_failures. Raises UserError.
        """
        images = self.folder / "images"
        with hold_lock(images, "--save_dir", "wait until it has ended, or give another --save_dir", patience=0):
            self.require_open()
            with self.explain_failures(go_on):
                images.mkdir(exist_ok=True)
                write_json(self.folder / self.record_name, self.record)
                yield

    @contextmanager
    def explain_failures(self, go_on: str) -> Iterator[None]:
        """Where writing fails, raise UserError with what is kept; go_on: its end, about going on."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise UserError(f"{self.folder / 'images'}: {reason}; {self.what_is_kept()}{go_on}", code=1) from error

    def what_is_kept(self) -> str:
        """How many pictures are there, for people."""
        kept = len(list((self.folder / "images").glob("[!.]*.png")))
        return f"{kept} of {self.count} images are there, whole"


# All pictures as one file, the same bytes for the same pictures: (binary file, pictures, labels, class_names) -> None.


def write_zip(file: BinaryIO, pictures: PictureFolder, labels: Sequence[int], class_names: Sequence[str]) -> None:
    """A ZIP file of the pictures, with dataset.json as EDM's dataset_tool.py has it: {"labels": [[name, label], ...]}.

    Without classes the labels are null. Raises OSError.
    """
    pairs = [[pictures.name(i), label] for i, label in enumerate(labels)]
    index = json.dumps({"labels": pairs if class_names else None})
    with zipfile.ZipFile(file, "w") as archive:                  # PNG is compressed already
        for i in range(pictures.count):
            archive.writestr(zipfile.ZipInfo(pictures.name(i)), pictures.path(i).read_bytes())
        archive.writestr(zipfile.ZipInfo("dataset.json"), index)


def write_npz(file: BinaryIO, pictures: PictureFolder, labels: Sequence[int], class_names: Sequence[str]) -> None:
    """arr_0, uint8 [N, H, W, C], as ADM's evaluator.py takes it; with classes arr_1, int64 [N], and class_names.

    One picture at a time, since all may not fit into memory. Raises OSError.
    """
    channels, height, width = pictures.shape
    header = dict(descr="|u1", fortran_order=False, shape=(pictures.count, height, width, channels))
    arrays = dict(arr_1=np.array(labels, dtype=np.int64), class_names=np.array(class_names)) if class_names else {}
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for i in range(pictures.count):
                member.write(pictures.require(i).permute(1, 2, 0).numpy().tobytes())
        for name, values in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


# To add an archive: write its function and name it here; the name is the ending of its file.
ARCHIVES = {"zip": write_zip, "npz": write_npz}

TILE = 64                                                        # about as many pixels across as a small image gets
GAP = 4                                                          # pixels between images
BLOCK_GAP = 12                                                   # and between blocks of several columns
LINE = 14                                                        # pixels of a line of a heading


@dataclass(frozen=True)
class GridLayout:
    """Where images stand in a grid: in blocks of rows and columns, of which `across` stand side by side.

    Image i is in block i % blocks. width, height: pixels of an image; head: pixels of the headings above blocks.
    """

    count: int
    blocks: int
    across: int
    columns: int                                                 # in a block
    width: int
    height: int
    head: int = 0

    @property
    def rows(self) -> int:
        """In a block."""
        return math.ceil(math.ceil(self.count / self.blocks) / self.columns)

    @property
    def bands(self) -> int:
        """Rows of blocks."""
        return math.ceil(self.blocks / self.across)

    @property
    def block_width(self) -> int:
        return self.columns * (self.width + GAP) - GAP

    def block_corner(self, block: int) -> tuple[int, int]:
        """The left and upper edge of a block, heading and all."""
        band, place = divmod(block, self.across)
        gap = BLOCK_GAP if self.columns > 1 else GAP
        pitch = self.head + self.rows * (self.height + GAP)
        return GAP + place * (self.block_width + gap), band * (pitch + GAP)

    def corner(self, i: int) -> tuple[int, int]:
        """The left and upper edge of an image."""
        left, top = self.block_corner(i % self.blocks)
        row, column = divmod(i // self.blocks, self.columns)
        return left + column * (self.width + GAP), top + self.head + GAP + row * (self.height + GAP)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        left, _ = self.block_corner(self.across - 1)
        _, top = self.block_corner(self.blocks - 1)
        return left + self.block_width + GAP, top + self.head + self.rows * (self.height + GAP) + GAP

    def flaw(self) -> tuple[float, int]:
        """The smaller the better: far from square, empty places, many bands; of two alike the wider one is better."""
        width, height = self.size
        places = self.across * self.bands * self.columns * self.rows
        flaw = abs(math.log(width / height)) + 2 * (1 - self.count / places) + 0.05 * (self.bands - 1)
        return round(flaw, 3), -width


def choose_layout(count: int, blocks: int, width: int, height: int, head: int, columns: int = 0) -> GridLayout:
    """The layout nearest to a square; columns: so many images side by side."""
    if columns:
        across = min(blocks, columns)
        return GridLayout(count, blocks, across, columns // across, width, height, head)

    layouts = (
        GridLayout(count, blocks, across, in_block, width, height, head)
        for across in range(1, blocks + 1)
        for in_block in range(1, math.ceil(count / blocks) + 1)
    )
    return min(layouts, key=GridLayout.flaw)


def heading_font(text: str) -> ImageFont.FreeTypeFont:
    """Pillow's own font for plain English, one of the system's for other scripts, where there is one."""
    for name in () if text.isascii() else ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf"):
        with suppress(OSError):
            return ImageFont.truetype(name, 11)
    return ImageFont.load_default(12)


def fit_heading(text: str, width: int) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """The text as at most two lines of so many pixels, and its font. What is too long ends with three dots."""
    text = " ".join(text.encode(errors="replace").decode().split())
    font = heading_font(text)

    # Two lines, where a space or a mark parts the words.
    lines = [text]
    if font.getlength(text) > width:
        breaks = [match.end() for match in re.finditer(r"[\s_/.-]+", text)]
        fitting = [end for end in breaks if font.getlength(text[:end].strip()) <= width]
        if fitting:
            lines = [text[: fitting[-1]].strip(), text[fitting[-1] :]]

    for i, line in enumerate(lines):
        if font.getlength(line) > width:
            while line and font.getlength(f"{line}...") > width:
                line = line[:-1]
            lines[i] = f"{line}..."
    return lines, font


def save_grid(images: Tensor, path: Path, headings: Sequence[str] = (), columns: int = 0) -> None:
    """uint8 [N, C, H, W] as one picture, nearly square; small images are enlarged by a whole factor and stay sharp.

    headings: of the blocks of columns into which the images are dealt out in turn, such as the classes; one for each
    image where there are as many. columns: how many stand side by side, where that is not to be chosen. Raises OSError.
    """
    headings = list(headings)[: len(images)]
    blocks = max(1, len(headings))
    zoom = max(1, TILE // max(images.shape[2:]))
    height = images.shape[2] * zoom
    width = images.shape[3] * zoom

    head = LINE + GAP if headings else 0
    layout = choose_layout(len(images), blocks, width, height, head, columns)
    texts = [fit_heading(heading, layout.block_width) for heading in headings]
    if any(len(lines) > 1 for lines, _ in texts):
        layout = replace(layout, head=head + LINE)

    grid = Image.new("RGB" if images.shape[1] == 3 else "L", layout.size, "white")
    for i, image in enumerate(images):
        tile = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
        grid.paste(tile, layout.corner(i))

    pen = ImageDraw.Draw(grid)
    for block, (lines, font) in enumerate(texts):
        left, top = layout.block_corner(block)
        for i, line in enumerate(reversed(lines)):               # from the images upwards
            baseline = top + layout.head - 6 - LINE * i
            pen.text((left + layout.block_width / 2, baseline), line, "black", font, anchor="ms")

    write_atomically(path, lambda file: grid.save(file, "PNG"))


def file_name(class_name: str) -> str:
    """A class's name in the names of files."""
    composed = unicodedata.normalize("NFC", class_name)          # an accent and its letter as one
    return re.sub(r"[^\w.-]+", "_", composed).strip(".")[:50] or "class"


def file_names(class_names: Sequence[str]) -> list[str]:
    """All classes' names in the names of files: no two alike, not even on a disk that takes A for a.

    A name that is free stays as file_name has it; of those alike each gets its class's number.
    """
    names = [file_name(class_name) for class_name in class_names]
    count = Counter(name.casefold() for name in names)
    taken = set(count)
    for i, name in enumerate(names):
        if count[name.casefold()] == 1:
            continue
        while name.casefold() in taken:
            name = f"{name}-{i}"
        taken.add(name.casefold())
        names[i] = name
    return names
