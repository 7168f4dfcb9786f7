"""Images with labels as others store them, each kind opened by its path and read on demand.

open_images     picks the kind: a folder or ZIP file, with metadata.csv or without, .npz, .tar, .parquet, hf:OWNER/NAME
check_images    whether there is something at the path, and what it takes to read it, before any work

Every kind is an ImageSource: item i is (PIL image, label). Where a set is stored in parts these are the images to train
on; test_part() has those to test with. Pictures are decoded by open_image alone, arrays are read
without pickle, nothing is unpacked onto the disk, and no entry above MAX_UNPACKED bytes is read. What cannot be read
raises, item by item; DecodedImages makes reasons of it.

Needs what images.py needs; pyarrow for Parquet files, datasets for hf:.
"""

from __future__ import annotations

import bisect
import csv
import importlib
import io
import itertools
import json
import math
import os
import re
import tarfile
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType

import numpy as np
from PIL import Image

from diffuser_lib.files import UserError, first_line
from diffuser_lib.images import (
    ENDINGS,
    MAX_UNPACKED,
    ImageFiles,
    ImageSource,
    list_files,
    open_image,
    require_images,
    warn_once,
)
from diffuser_lib.listing import LOCAL, Labels, Names, spans_overlap

# What columns are called, the first one that is there counts.
LABEL_COLUMNS = ("label", "labels", "class", "cls", "category", "target", "fine_label", "y")
IMAGE_COLUMNS = ("image", "img", "picture", "png", "jpg")

HUB = "hf:"                                                      # how the name of a data set of the Hub begins
MAX_TEXT = 2**20                                                 # bytes of the label of one image in a tar file


def open_images(path: str, flag: str, label_column: str = "") -> ImageSource:
    """The images at a path, of whatever kind they are.

    flag: the option that gave the path, for messages; label_column: the column, array or key with the labels, by
    default one of LABEL_COLUMNS. Raises UserError where there are none, or no such column.
    """
    source = open_kind(path, flag, label_column)
    if label_column and not source.class_names:
        raise UserError(f"--label_column {label_column}: it has to hold two classes or more, as numbers or words, "
                        f"for the images in {path}")
    return source


def open_kind(path: str, flag: str, label_column: str) -> ImageSource:
    """See open_images."""
    if path.startswith(HUB):
        return HubImages(path, flag, label_column)
    require_images(path, flag)
    ending = Path(path).suffix.lower()
    if os.path.isfile(path):
        if path.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
            raise UserError(f"{flag} {path} is compressed, so it could only be read from front to end: unpack it to a "
                            ".tar file or a folder")
        if ending in READERS:
            return READERS[ending](path, flag, label_column)

    names = list_files(Path(path), flag)
    if any(ImageFiles.is_image(name) for name in names) or os.path.isfile(path):
        return open_files(path, flag, label_column, names)
    for ending, reader in READERS.items():
        if any(name.lower().endswith(ending) and ImageFiles.is_shown(name) for name in names):
            return reader(path, flag, label_column)
    return ImageFiles(path, flag, names)                         # says that there are none


def check_images(path: str, flag: str) -> None:
    """Raise UserError unless there is something at the path, and the package that reads hf: or a .parquet file.

    A folder of Parquet files is looked into only when it is opened.
    """
    if path.startswith(HUB):
        import_package("datasets", "4.0", f"{flag} {path}")
        return
    require_images(path, flag)
    if Path(path).suffix.lower() == ".parquet":
        import_package("pyarrow.parquet", "15.0", f"{flag} {path}")


def import_package(module: str, version: str, what: str) -> ModuleType:
    """A module of an optional package, of that version or a later one: older ones run what is in a file.

    what: needs it. Raises UserError where it is missing.
    """
    package = module.partition(".")[0]
    try:
        there = importlib.import_module(package).__version__
        loaded = importlib.import_module(module)
    except (ImportError, AttributeError):                        # a folder of that name is a module, too
        raise UserError(f"{what} takes {package}: pip install {package}", code=1) from None
    if int(there.partition(".")[0]) < int(version.partition(".")[0]):
        raise UserError(f"{what} takes {package} {version} or later, not {there}: pip install -U {package}", code=1)
    return loaded


# ---- Labels ------------------------------------------------------------------------------------


def choose_column(columns: Iterable[str], label_column: str, what: str) -> str:
    """The column with the labels, empty where there is none. Raises UserError where one is asked for and missing."""
    columns = list(columns)
    if label_column and label_column not in columns:
        raise UserError(f"--label_column {label_column}: {what} has none of that name, but {', '.join(columns)[:500]}")
    return label_column or next((name for name in LABEL_COLUMNS if name in columns), "")


def files_of_part(paths: list[Path], part: str) -> list[Path]:
    """Those whose names begin with train, or test, sorted: the Hub keeps the parts of a set together."""
    return sorted(path for path in paths if path.name.lower().startswith(part))


# ---- A folder with a table ---------------------------------------------------------------------

TABLES = ("metadata.csv", "metadata.jsonl")


class ListedFiles(ImageFiles):
    """The images of a folder or ZIP file that its tables list, with the labels there; see read_table.

    What is listed and not there is a broken entry.
    """

    def __init__(self, path: str, flag: str, names: Names, labels: dict[str, object]):
        super().__init__(path, flag, names)
        unlisted = sum(name not in labels for name in self.names)
        if unlisted:
            warn_once(f"left out: {unlisted} images in {path} that its metadata does not list")
        self.there = self.names
        self.names = Names(labels).sorted()
        self.labels, self.class_names = Labels(labels[name] for name in self.names).settle()

    def open_item(self, i: int) -> Image.Image:
        if self.there.find(self.names[i]) < 0:                   # a name that leads elsewhere is none of them
            raise ValueError("it is listed in the metadata, but not there")
        return super().open_item(i)

    def files(self) -> Iterable[Path]:
        if self.path.is_file():
            return [self.path]
        return (self.path / name for name in self.names if self.there.find(name) >= 0)


def open_files(path: str, flag: str, label_column: str, names: Names) -> ImageFiles:
    """Image files with the labels of a table beside them, if it has any, else with those of their folders."""
    labels = {}
    plain = ImageFiles(path, flag, names)
    for table in sorted(name for name in names if PurePosixPath(name).name in TABLES and plain.is_shown(name)):
        labels |= read_table(plain, table, f"{flag} {path}: {table}", label_column)
    if labels:
        return ListedFiles(path, flag, names, labels)
    if label_column:
        raise UserError(f"--label_column {label_column}: {path} has no column at all, as its images are in no "
                        f"{' or '.join(TABLES)}")
    return plain


def read_table(files: ImageFiles, table: str, what: str, label_column: str) -> dict[str, object]:
    """The label of each image that metadata.csv or .jsonl lists, by its path; empty where it has no labels.

    Hugging Face's imagefolder: a column file_name, as a path from the table's own folder. Raises UserError.
    """
    try:
        text = files.read_bytes(table).decode("utf-8-sig")
        columns = dict.fromkeys(column for row in read_rows(table, text) for column in row if isinstance(column, str))
    except Exception as error:                                   # csv, json and zipfile raise many kinds
        raise UserError(f"{what} cannot be read ({first_line(error)})") from None

    if "file_name" not in columns:
        return {}
    column = choose_column(columns, label_column, f"{files.path}: {table}")
    if not column:
        return {}
    folder = PurePosixPath(table).parent
    return {str(folder / str(row.get("file_name"))): row.get(column) for row in read_rows(table, text)}


def read_rows(table: str, text: str) -> Iterator[dict]:
    """The rows of metadata.csv or .jsonl, one at a time. Raises what csv raises, ValueError."""
    return csv.DictReader(io.StringIO(text)) if table.endswith(".csv") else read_json_lines(text)


def read_json_lines(text: str) -> Iterator[dict]:
    """A JSON object for each line. Raises ValueError with the line's number."""
    for i, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"line {i} is no JSON object")
        yield row


# ---- Files of many images ----------------------------------------------------------------------


class PackedImages(ImageSource):
    """Images in one file or several, of which each process keeps one open at a time.

    paths: the files; what: flag and path, for messages; training: the images to train on, where these
    are to test with.
    """

    def __init__(self, path: str, flag: str, label_column: str, training: PackedImages | None = None):
        self.request = (path, flag, label_column)
        self.what = f"{flag} {path}"
        self.training = training
        self.path = Path(path)
        self.paths = [self.path]
        self.test_paths = []
        if self.path.is_dir():
            names = [name for name in list_files(self.path, flag) if name.lower().endswith(self.ending)]
            shown = [self.path / name for name in names if ImageFiles.is_shown(name)]
            to_train_on = files_of_part(shown, "train")
            self.test_paths = files_of_part(shown, "test") if to_train_on else []
            self.paths = to_train_on or sorted(shown)
        if training is not None:
            self.paths = training.test_paths or self.paths
        self.opened = None

    def settle_labels(self, labels: Labels, names: Sequence[str] = ()) -> None:
        """See Labels.settle; images to test with have the classes of those to train on."""
        classes = None if self.training is None else self.training.class_names
        self.labels, self.class_names = labels.settle(names, classes)

    def has_test_part(self) -> bool:
        return bool(self.test_paths)

    def test_part(self) -> PackedImages | None:
        if self.training is not None or not self.has_test_part():
            return None
        try:
            part = type(self)(*self.request, training=self)
        except UserError as error:
            warn_once(f"left out: the images to test with ({error})")
            return None
        if not len(part) or part.class_names != self.class_names or (part.labels < 0).any():
            warn_once(f"left out: the images of {self.what} to test with, whose classes are not those to train on")
            return None
        return part

    def fingerprint(self) -> tuple:
        return super().fingerprint() if self.training is None else (*super().fingerprint(), "test")

    def open_once(self, path: Path):
        """The file as open_file has it, kept until another one is needed: a handle cannot be shared by processes."""
        key = (os.getpid(), path)
        if self.opened is None or self.opened[0] != key:
            self.opened = (key, self.open_file(path))
        return self.opened[1]

    def open_file(self, path: Path):
        return open(path, "rb")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "opened": None}                 # on its way to another process

    def files(self) -> Iterable[Path]:
        return self.paths


def picture_of(content: bytes | None) -> Image.Image:
    """A picture from the bytes of its file. Raises ValueError, and whatever Pillow raises."""
    if content is None:
        raise ValueError("it has no bytes")
    if len(content) > MAX_UNPACKED:
        raise ValueError(f"it unpacks to more than {MAX_UNPACKED >> 20} MiB")
    return open_image(io.BytesIO(content))


# Arrays of numpy: images and labels.
ARRAYS = (
    ("train_images", "train_labels"),                            # MedMNIST; beside them test_images and so on
    ("x_train", "y_train"),                                      # Keras; beside them x_test, y_test
    ("images", "labels"),
    ("arr_0", "arr_1"),                                          # ADM, and numpy without names
)


class NpzImages(PackedImages):
    """The images of a .npz file: uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1, 3 or 4, and labels [N].

    The array of images is never unpacked as a whole.
    """

    ending = ".npz"

    def __init__(self, path: str, flag: str, label_column: str, training: NpzImages | None = None):
        super().__init__(path, flag, label_column, training)
        if self.path.is_dir():
            raise UserError(f"{self.what} holds no images but .npz files: give one of them, such as {self.paths[0]}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                self.read_index(archive, label_column)
        except UserError:
            raise
        except Exception as error:                               # zipfile and numpy raise many kinds
            raise UserError(f"{self.what} is no whole .npz file ({first_line(error)})") from error

    def read_index(self, archive: zipfile.ZipFile, label_column: str) -> None:
        """Find the arrays, see where the images begin, read the labels. Raises UserError, and what numpy raises."""
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        listed = archive.infolist()
        starts = np.array([entry.header_offset for entry in listed], np.int64)
        sizes = np.array([LOCAL.size + len(entry.filename) + entry.compress_size for entry in listed], np.int64)
        if spans_overlap(starts, starts + sizes):
            raise UserError(f"{self.what} is refused: its entries overlap, as in a file made to fill the memory")
        pair = next((pair for pair in ARRAYS if pair[0] in entries), None)
        if pair is None:
            raise UserError(f"{self.what} has no array of images: {', '.join(pair[0] for pair in ARRAYS)}, but "
                            f"{', '.join(entries)[:500] or 'nothing'}")
        if self.training is not None:
            pair = tuple(name.replace("train", "test") for name in pair)
            label_column = label_column.replace("train", "test")

        # The images.
        self.entry = entries[pair[0]].filename
        with archive.open(self.entry) as file:
            shape, self.dtype = read_array_header(file, entries[pair[0]].file_size)
            self.start = file.tell()
        if self.dtype != np.uint8 or len(shape) not in (3, 4):
            raise UserError(f"{self.what}: {pair[0]} is {self.dtype} {list(shape)}: it has to be uint8, 0 to 255, "
                            "[N, H, W] or [N, H, W, C]")
        self.shape = shape[1:]
        self.channels_first = len(shape) == 4 and shape[3] not in (1, 3, 4)
        self.depth = 1 if len(shape) == 3 else shape[1 if self.channels_first else 3]
        self.size = math.prod(self.shape)
        if self.depth not in (1, 3, 4) or not 0 < self.size <= MAX_UNPACKED or not shape[0]:
            raise UserError(f"{self.what}: {pair[0]} {list(shape)} are no images in grey or colour")

        # The labels.
        others = [name for name in entries if name != pair[0]]
        key = label_column or (pair[1] if pair[1] in entries else "")
        test_names = {name.replace("train", "test") for name in (pair[0], key) if name}
        self.has_test = "train" in pair[0] and (not key or "train" in key) and test_names <= set(entries)
        choose_column(others, label_column, str(self.path))
        labels = self.read_labels(archive, entries[key], shape[0], key == label_column) if key else None
        if labels is None:
            self.labels, self.class_names = np.zeros(shape[0], np.int64), []
            return
        names = self.read_names(archive, entries)
        if names and labels.are_below(len(names)):
            labels = labels.renamed(names)
        self.settle_labels(labels)

    def has_test_part(self) -> bool:
        return self.has_test

    def read_names(self, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> Sequence[str]:
        """What the numbers of classes stand for, as --save_format npz writes it; nothing elsewhere."""
        entry = entries.get("class_names")
        if entry is None or entry.file_size > MAX_UNPACKED:
            return ()
        with archive.open(entry) as file:
            names = np.lib.format.read_array(file, allow_pickle=False)
        return names.tolist() if names.ndim == 1 and names.dtype.kind == "U" else ()

    def read_labels(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, count: int, asked: bool) -> Labels | None:
        """An array of labels; None where it holds no single number or word for each image, unless `asked`."""
        if entry.file_size > MAX_UNPACKED:
            raise UserError(f"{self.what}: {entry.filename} unpacks to more than {MAX_UNPACKED >> 20} MiB")
        with archive.open(entry) as file:
            read_array_header(file, entry.file_size)
        with archive.open(entry) as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]

        name = entry.filename.removesuffix(".npy")
        if values.ndim != 1 or values.dtype.kind not in "biuU":
            text = f"{name} in {self.path} is {values.dtype} {list(values.shape)}, no class for each image"
            if asked:
                raise UserError(f"--label_column {name}: {text}")
            warn_once(f"left out: {text}")
            return None
        if len(values) != count:
            raise UserError(f"{self.what}: {count} images, but {len(values)} in {name}")
        labels = Labels()
        for i in range(0, count, 10_000):
            labels.extend(values[i : i + 10_000].tolist())
        return labels

    def open_file(self, path: Path):
        return zipfile.ZipFile(path).open(self.entry)

    def open_item(self, i: int) -> Image.Image:
        file = self.open_once(self.path)
        skip_to(file, self.start + i * self.size)
        content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError("the file ends before it")
        pixels = np.frombuffer(content, np.uint8).reshape(self.shape)
        if self.channels_first:
            pixels = pixels.transpose(1, 2, 0)
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels))

    def guess_channels(self, looks: int = 32) -> int:
        return 1 if self.depth == 1 else 3

    def name_of(self, i: int) -> str:
        return f"{self.entry}[{i}]"


def skip_to(file, place: int) -> None:
    """Go to a place in an entry of a ZIP file; its own seek would unpack 16 MB at a time. Raises ValueError."""
    if place < file.tell():
        file.seek(0)
    while file.tell() < place:
        if not file.read(min(2**18, place - file.tell())):
            raise ValueError("the file ends before it")


def read_array_header(file, size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of a .npy file, which is read up to its numbers.

    Raises ValueError unless it is as long as they say, and for Python objects and arrays in Fortran's order.
    """
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"an array of version {version}")
    shape, fortran_order, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded")
    if fortran_order and len(shape) > 1:
        raise ValueError("it is in Fortran's order: save it through numpy.ascontiguousarray")
    if file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError("an array is cut short")
    return shape, dtype


class ParquetImages(PackedImages):
    """The images of Parquet files: a column of struct{bytes, path}, as the Hub stores data sets, or of bytes alone.

    Rows are read forward, a few at a time. Of a folder, files called train... are taken where there are any.
    """

    ending = ".parquet"

    def __init__(self, path: str, flag: str, label_column: str, training: ParquetImages | None = None):
        super().__init__(path, flag, label_column, training)
        import_package("pyarrow.parquet", "15.0", self.what)
        self.column = ""
        self.starts = []                                         # the number of each file's first row
        labels = Labels()
        for file in self.paths:
            self.starts.append(len(labels))
            try:
                labels.extend(self.read_index(file, label_column))
            except UserError:
                raise
            except Exception as error:                           # pyarrow raises many kinds
                raise UserError(f"{self.what}: {file.name} is no whole Parquet file ({first_line(error)})") from error
        if not len(labels):
            raise UserError(f"{self.what} holds no rows")
        self.settle_labels(labels, self.names_of_numbers)

    def read_index(self, path: Path, label_column: str) -> Iterable:
        """Check one file, and return its labels. Raises UserError, and what pyarrow raises."""
        reader = ParquetReader(path)
        schema = reader.file.schema_arrow
        column = image_column(schema)
        if not column:
            raise UserError(f"{self.what}: {path.name} has no column of images, as bytes or as struct{{bytes, path}}, "
                            f"but {', '.join(schema.names)[:500]}")
        features = hub_features(schema.metadata)
        label = choose_column(schema.names, label_column, path.name)
        if not label:                                            # one that the Hub calls classes
            label = next((name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"), "")
        if label and not reader.has_labels(label):
            text = f"{label} in {path.name} is {schema.field(label).type}, neither numbers nor words"
            if label_column:
                raise UserError(f"--label_column {label_column}: {text}")
            warn_once(f"left out: {text}")
            label = ""
        if not self.column:
            self.column, self.label = column, label
            self.names_of_numbers = features.get(label, {}).get("names") or ()
        if (column, label) != (self.column, self.label):
            raise UserError(f"{self.what}: {path.name} has other columns than {self.paths[0].name}: give one of them")

        reader.refuse_bombs(column, self.what)
        if reader.file.metadata.num_rows > path.stat().st_size:  # an image takes a byte and more
            raise UserError(f"{self.what}: {path.name} claims {reader.file.metadata.num_rows:,} rows: it is broken")
        if label:
            return reader.read_labels(label)
        return itertools.repeat(None, reader.file.metadata.num_rows)

    def open_file(self, path: Path) -> ParquetReader:
        return ParquetReader(path, self.column)

    def place(self, i: int) -> tuple[Path, int]:
        """The file that image i is in, and its row there."""
        file = bisect.bisect_right(self.starts, i) - 1
        return self.paths[file], i - self.starts[file]

    def open_item(self, i: int) -> Image.Image:
        path, row = self.place(i)
        return picture_of(self.open_once(path).read(row))

    def name_of(self, i: int) -> str:
        path, row = self.place(i)
        return f"{path.name}, row {row}"


class ParquetReader:
    """One Parquet file, its column of images read forward; pages are mapped, not copied, until they are needed."""

    ROWS = 16                                                    # unpacked at a time

    def __init__(self, path: Path, column: str = ""):
        parquet = importlib.import_module("pyarrow.parquet")
        self.file = parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
        field = self.file.schema_arrow.field(column).type if column else None
        self.is_struct = column and field.num_fields > 0
        self.columns = [f"{column}.bytes" if self.is_struct else column]
        groups = [self.file.metadata.row_group(i).num_rows for i in range(self.file.num_row_groups)]
        self.starts = [0, *itertools.accumulate(groups)][:-1]
        self.group = None
        self.broken = {}                                         # group -> its first row that cannot be read, and why

    def read(self, row: int) -> bytes | None:
        """The bytes of an image. Raises whatever pyarrow raises."""
        group = bisect.bisect_right(self.starts, row) - 1
        if group in self.broken and row >= self.broken[group][0]:
            raise ValueError(self.broken[group][1])
        if group != self.group or row < self.first:
            self.group = group
            self.first = self.starts[group]
            self.batch = []
            self.batches = self.file.iter_batches(self.ROWS, [group], self.columns, use_threads=False)
        while row >= self.first + len(self.batch):
            self.first += len(self.batch)
            try:
                self.batch = next(self.batches).column(0)
            except Exception as error:                           # the rest of the group is lost with it
                self.broken[group] = (self.first, first_line(error))
                self.group = None
                raise
        values = self.batch.field("bytes") if self.is_struct else self.batch
        return values[row - self.first].as_py()

    def refuse_bombs(self, column: str, what: str) -> None:
        """Raise UserError for images that unpack to a hundred times their size: they are compressed already."""
        for i in range(self.file.num_row_groups):
            group = self.file.metadata.row_group(i)
            for chunk in map(group.column, range(group.num_columns)):
                if chunk.path_in_schema not in (column, f"{column}.bytes"):
                    continue
                unpacked = chunk.total_uncompressed_size
                if unpacked > MAX_UNPACKED and unpacked > 100 * chunk.total_compressed_size:
                    raise UserError(f"{what} is refused: it unpacks to a hundred times its size, as a file made to "
                                    "fill the memory")

    def has_labels(self, column: str) -> bool:
        """Whether a column holds whole numbers or words."""
        types = importlib.import_module("pyarrow.types")
        kind = self.file.schema_arrow.field(column).type
        if types.is_dictionary(kind):
            kind = kind.value_type
        tests = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string)
        return any(test(kind) for test in tests)

    def read_labels(self, column: str) -> Iterator:
        """All labels, as numbers, text or None."""
        for batch in self.file.iter_batches(1024, columns=[column], use_threads=False):
            yield from batch.column(0).to_pylist()


def image_column(schema) -> str:
    """The column of a pyarrow schema that holds images as bytes; empty where none does."""
    types = importlib.import_module("pyarrow.types")

    def holds_bytes(kind) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    candidates = [name for name in schema.names if holds_bytes(schema.field(name).type)]
    usual = [name for name in IMAGE_COLUMNS if name in candidates]
    structs = [name for name in candidates if types.is_struct(schema.field(name).type)]
    return next(iter([*usual, *structs, *candidates]), "")


def hub_features(metadata: dict | None) -> dict:
    """What the Hub's library wrote about each column; empty where it wrote none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


class TarImages(PackedImages):
    """The images of .tar files, as WebDataset has them: files of one name but for the ending belong together.

    The label of NAME.jpg is NAME.cls or a key of NAME.json; where there is neither, the folder's name in the tar file.
    Files are read in place.
    """

    ending = ".tar"

    def __init__(self, path: str, flag: str, label_column: str, training: TarImages | None = None):
        super().__init__(path, flag, label_column, training)
        self.names = Names()
        self.file_numbers = array("i")
        self.offsets = array("q")
        self.sizes = array("q")
        labels = Labels()
        for number, file in enumerate(self.paths):
            try:
                with tarfile.open(file, "r:") as archive:
                    for image, label in read_samples(archive, label_column):
                        self.names.append(image.name)
                        self.file_numbers.append(number)
                        self.offsets.append(image.offset_data)
                        self.sizes.append(image.size)
                        labels.append(label)
            except Exception as error:                           # tarfile raises many kinds
                raise UserError(f"{self.what}: {file.name} is no whole .tar file ({first_line(error)})") from error

        if not self.names:
            raise UserError(f"{self.what} holds no {', '.join(ending[1:].upper() for ending in ENDINGS)} image")
        if label_column and not labels.any():
            raise UserError(f"--label_column {label_column}: no .json in {path} has a number or text of that name")
        if labels.any():
            self.settle_labels(labels)
        elif self.training is not None:
            self.settle_labels(Labels(PurePosixPath(name).parent.name for name in self.names))
        else:
            self.labels, self.class_names = ImageFiles.classes_of_folders(self.names)

    def open_item(self, i: int) -> Image.Image:
        if self.sizes[i] > MAX_UNPACKED:
            raise ValueError(f"it takes more than {MAX_UNPACKED >> 20} MiB")
        file = self.open_once(self.paths[self.file_numbers[i]])
        file.seek(self.offsets[i])
        return picture_of(file.read(self.sizes[i]))

    def name_of(self, i: int) -> str:
        return f"{self.paths[self.file_numbers[i]].name}: {self.names[i]}"


def read_samples(archive: tarfile.TarFile, label_column: str) -> Iterator[tuple[tarfile.TarInfo, object]]:
    """(image, label or None) of each sample. Its files follow one another. Raises what tarfile raises.

    A sample is what is called the same up to the first dot. Where none of its files is called NAME.jpg or the like, all
    of its pictures are taken, as those of IMG.2024.jpg and IMG.2025.jpg are.
    """
    key, image, label, others = None, None, None, []
    end = -1
    for member in iter(archive.next, None):
        if archive.offset <= end or member.size < 0:             # which would lead round in circles
            raise ValueError("its entries go backwards")
        end = archive.offset
        archive.members.clear()                                  # it would keep all of them
        if not member.isreg() or member.issparse() or not ImageFiles.is_shown(member.name):
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        ending = f".{ending.lower()}"
        if (folder, stem) != key:
            for picture in [image] if image else others:
                yield picture, label
            key, image, label, others = (folder, stem), None, None, []

        if ending in ENDINGS and image is None:
            image = member
        elif ending.endswith(ENDINGS):                           # a second picture, such as a mask; or a name with dots
            others.append(member)
        elif ending in (".cls", ".json") and member.size <= MAX_TEXT:
            found = read_label(archive.extractfile(member).read(), ending, label_column)
            label = found if label is None else label
    for picture in [image] if image else others:
        yield picture, label


def read_label(content: bytes, ending: str, label_column: str) -> object:
    """The label in a .cls file, or in a .json file under the key label_column, else under one of LABEL_COLUMNS."""
    if ending == ".cls":
        return None if label_column else content.decode(errors="replace").strip()
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    keys = [label_column] if label_column else LABEL_COLUMNS
    return next((values[key] for key in keys if key in values), None)


# ---- The Hugging Face Hub ----------------------------------------------------------------------


class HubImages(PackedImages):
    """A data set of the Hugging Face Hub, hf:OWNER/NAME or hf:OWNER/NAME:CONFIG, its training part.

    The library downloads it, or takes it from its cache where it is there.
    """

    def __init__(self, path: str, flag: str, label_column: str, training: HubImages | None = None):
        self.request = (path, flag, label_column)
        self.what = f"{flag} {path}"
        self.training = training
        self.opened = None
        datasets = import_package("datasets", "4.0", self.what)
        name, _, config = path.removeprefix(HUB).partition(":")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", path.removeprefix(HUB)):
            raise UserError(f"{self.what}: say hf:OWNER/NAME, or hf:OWNER/NAME:CONFIG")
        self.path = Path(name)
        try:
            parts = datasets.load_dataset(name, config or None)
            self.has_test = "train" in parts and "test" in parts
            first = "train" if "train" in parts else next(iter(parts))
            table = parts["test" if training is not None else first]
        except Exception as error:                               # the library raises many kinds
            raise UserError(f"{self.what} is neither in the cache nor to be had from the Hub ({first_line(error)})",
                            code=1) from error

        # The columns.
        features = table.features
        columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if not columns:
            raise UserError(f"{self.what} has no column of images, but {', '.join(features)[:500]}")
        self.column = next((name for name in IMAGE_COLUMNS if name in columns), columns[0])
        label = choose_column(features, label_column, name)
        if not label:
            label = next((name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)), "")

        # Its pictures stay bytes, because the library would open any format.
        self.print = table._fingerprint
        self.table = table.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        labels = Labels()
        for batch in table.select_columns([label]).iter(1000) if label else ():
            labels.extend(batch[label])
        names = features[label].names if label and isinstance(features[label], datasets.ClassLabel) else ()
        self.labels, self.class_names = np.zeros(len(table), np.int64), []
        if label:
            self.settle_labels(labels, names)

    def has_test_part(self) -> bool:
        return self.has_test

    def open_item(self, i: int) -> Image.Image:
        entry = self.table[i][self.column]
        path = entry.get("path") or ""
        if entry.get("bytes") is None and os.path.isfile(path):  # in the library's cache
            return open_image(path)
        return picture_of(entry.get("bytes"))

    def name_of(self, i: int) -> str:
        return f"row {i}"

    def files(self) -> Iterable[Path]:
        return []

    def fingerprint(self) -> tuple:
        _, digest, *part = super().fingerprint()
        return str(self.path), f"{self.print} {digest}", *part


READERS = {".parquet": ParquetImages, ".tar": TarImages, ".npz": NpzImages}
