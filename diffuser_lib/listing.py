"""What is kept of each of millions of images: names, labels and places in a ZIP file, some bytes each.

Names       texts in one array of bytes
Labels      numbers or words as they come, each kept as the number of its class
ZipIndex    the names of a ZIP file's entries, and where they are; Python's own takes hundreds of bytes for each

Lists of Python's objects would take a hundred bytes and more for each image, and every worker process would copy them.

Needs numpy.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple

import numpy as np

# ---- Names -------------------------------------------------------------------------------------


class Names(Sequence):
    """A sequence of texts, of which each takes its UTF-8 bytes and 8 more. Items are str; no slices."""

    def __init__(self, texts: Iterable[str] = ()):
        self.bytes = bytearray()
        self.ends = array("q")
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self.bytes += encode(text)
        self.ends.append(len(self.bytes))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        return decode(self.raw(range(len(self))[i]))

    def __iter__(self) -> Iterator[str]:
        return (decode(self.raw(i)) for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Names, list)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None                                              # it can grow

    def raw(self, i: int) -> bytes:
        """The bytes of text i, i from 0 on."""
        return bytes(self.bytes[self.ends[i - 1] if i else 0 : self.ends[i]])

    def find(self, text: str) -> int:
        """The place of a text among sorted ones, -1 where it is not there."""
        wanted = encode(text)
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self.raw(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self.raw(low) == wanted else -1

    def order(self) -> np.ndarray | None:
        """The places of the texts in sorted order, int64 [N], of those alike in turn; None where they are sorted."""
        if all(self.raw(i) <= self.raw(i + 1) for i in range(len(self) - 1)):
            return None
        longest = int(np.diff(self.ends, prepend=0).max())
        if longest * len(self) > 8 * len(self.bytes) + 2**20:    # one very long name among short ones
            return np.array(sorted(range(len(self)), key=self.raw), np.int64)
        raw = np.fromiter(map(self.raw, range(len(self))), f"S{longest}", len(self))
        return np.argsort(raw, kind="stable")

    def take(self, order: Iterable[int]) -> Names:
        """The texts at these places, in this order."""
        taken = Names()
        for i in order:
            taken.bytes += self.raw(i)
            taken.ends.append(len(taken.bytes))
        return taken

    def sorted(self) -> Names:
        """The texts in the order that sorted() gives them."""
        order = self.order()
        return self if order is None else self.take(order)


def encode(text: str) -> bytes:
    """UTF-8, also of names that are none: the bytes stand in the order of the texts."""
    return text.encode("utf-8", "surrogatepass")


def decode(raw: bytes) -> str:
    """See encode."""
    return raw.decode("utf-8", "surrogatepass")


# ---- Labels ------------------------------------------------------------------------------------


class Labels:
    """The label of each image, a number or text, as it comes; 4 bytes each, whatever it is."""

    def __init__(self, values: Iterable = ()):
        self.numbers = array("i")
        self.kinds: dict[tuple[bool, str], int] = {}             # (is it an int, its text) -> its number here
        self.extend(values)

    def append(self, value: object) -> None:
        kind = (type(value) is int, class_text(value))
        self.numbers.append(self.kinds.setdefault(kind, len(self.kinds)))

    def extend(self, values: Iterable) -> None:
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self.numbers)

    def any(self) -> bool:
        """Whether any image has a label."""
        return any(text for _, text in self.kinds)

    def are_below(self, count: int) -> bool:
        """Whether all are whole numbers from 0 to count - 1."""
        return all(is_int and 0 <= int(text) < count for is_int, text in self.kinds)

    def renamed(self, names: Sequence[str]) -> Labels:
        """These with names in place of their numbers, see are_below."""
        new = Labels()
        kinds = [new.kinds.setdefault((False, class_text(names[int(text)])), len(new.kinds)) for _, text in self.kinds]
        new.numbers = array("i", np.array(kinds, np.int32)[np.asarray(self.numbers)].tobytes())
        return new

    def settle(self, names: Sequence[str] = (), classes: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
        """int64 [N] from 0 on, -1 where there is none, and the names of the classes, none unless there are two.

        names: of the numbers, where a file has them; without them numbers are sorted as such, words by the alphabet.
        classes: those of another set that these images belong to, where there is one; what is none of them is -1.
        """
        given = classes is not None
        if given:
            classes = list(classes)
            number = {name: i for i, name in enumerate(classes)}
            words = dict(enumerate(map(str, names)))
            texts = [words.get(int(text), "") if names and is_int else text for is_int, text in self.kinds]
            new = [number.get(text, -1) for text in texts]
        elif names:
            classes = list(map(str, names))
            new = [int(text) if is_int and 0 <= int(text) < len(classes) else -1 for is_int, text in self.kinds]
        else:
            classes = sorted({text for _, text in self.kinds} - {""})
            if all(re.fullmatch(r"-?\d{1,18}", name) for name in classes):
                classes.sort(key=int)
            number = {name: i for i, name in enumerate(classes)}
            new = [number.get(text, -1) for _, text in self.kinds]
        if len(classes) < 2 or (max(new, default=-1) < 0 and not given):
            return np.zeros(len(self), np.int64), []
        return np.array(new, np.int64)[np.asarray(self.numbers)], classes


def class_text(value: object) -> str:
    """A label as text; empty for what is no label."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (int, str)):
        return ""
    return str(value).strip()


# ---- ZIP files ---------------------------------------------------------------------------------

# Records as PKWARE's APPNOTE.TXT has them: of an entry in the list of all, before its content, and of the list itself.
LISTED = struct.Struct("<4s6H3I5H2I")                            # then name, extra field, comment
LOCAL = struct.Struct("<4s5H3I2H")                               # then name, extra field, content
END = struct.Struct("<4s4H2IH")                                  # then a comment
END_64 = struct.Struct("<4sQ2H2I4Q")
PLACE_64 = struct.Struct("<4sIQI")                               # between these two
BLOCK = 2**20                                                    # bytes of the list read at a time


class OverlapError(ValueError):
    """Entries of a ZIP file share bytes: a small file could then unpack to any size."""


class Entry(NamedTuple):
    """What a ZIP file lists of an entry. packed, unpacked: bytes of its content; start: of its record in the file."""

    name: str
    name_size: int                                               # bytes of it in the list
    flags: int
    method: int
    crc: int
    packed: int
    unpacked: int
    start: int

    @property
    def end(self) -> int:
        """Where it ends at the earliest."""
        return self.start + LOCAL.size + self.name_size + self.packed


class ZipIndex(Names):
    """The names of a ZIP file's entries, sorted, each once, and where they are listed: 16 bytes and a name each.

    Raises zipfile.BadZipFile for what is none, OverlapError, OSError.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.places = array("q")
        self.opened = None
        self.rare = None
        starts = array("q")
        ends = array("q")
        with open(path, "rb") as file:
            place, size, self.shift = find_list(file)
            for listed_at, entry in read_entries(file, place, size, self.shift):
                self.append(entry.name)
                self.places.append(listed_at)
                starts.append(entry.start)
                ends.append(entry.end)
        if spans_overlap(np.asarray(starts), np.asarray(ends)):
            raise OverlapError("its entries overlap")
        del starts, ends
        self.settle()

    def settle(self) -> None:
        """Sort the names; of one that is there twice the last entry is meant, as unzip has it."""
        order = self.order()
        places = np.arange(len(self)) if order is None else order
        nexts = (self.raw(i) for i in places[1:])
        last = np.fromiter((self.raw(i) != next(nexts, None) for i in places), bool, len(self))
        if order is None and last.all():
            return
        taken = self.take(places[last])
        self.bytes, self.ends = taken.bytes, taken.ends
        self.places = array("q", np.asarray(self.places)[places[last]].tobytes())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "opened": None, "rare": None}   # on its way to another process

    def open_file(self) -> BinaryIO:
        return open(self.path, "rb")

    def open_once(self) -> BinaryIO:
        """The file, opened once in each process: a handle cannot be shared."""
        if self.opened is None or self.opened[0] != os.getpid():
            self.opened = (os.getpid(), self.open_file())
        return self.opened[1]

    def read(self, name: str, limit: int) -> bytes:
        """The content of an entry. Raises ValueError above `limit` bytes, KeyError, BadZipFile and what zlib raises."""
        i = self.find(name)
        if i < 0:
            raise KeyError(f"there is no {name} in the ZIP file")
        file = self.open_once()
        _, entry = next(read_entries(file, self.places[i], LISTED.size, self.shift))
        if entry.name != name:
            raise zipfile.BadZipFile("the ZIP file has changed since it was listed")
        if max(entry.packed, entry.unpacked) > limit:
            raise ValueError(f"it unpacks to more than {limit >> 20} MiB")
        if entry.flags & 1:
            raise ValueError("it is encrypted")
        if entry.method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return read_content(file, entry)
        with self.open_rare(entry) as content:
            return b"".join(iter(partial(content.read, 2**12), b""))             # to the size it is listed with

    def open_rare(self, entry: Entry) -> IO[bytes]:
        """The content of an entry packed by bzip2 or lzma: by Python's own reader, opened once in each process."""
        if self.rare is None or self.rare[0] != os.getpid():
            archive = zipfile.ZipFile(self.path)
            self.rare = (os.getpid(), archive, {info.header_offset: info for info in archive.infolist()})
        _, archive, infos = self.rare
        return archive.open(infos[entry.start])


def spans_overlap(starts: np.ndarray, ends: np.ndarray) -> bool:
    """Whether spans of a file share bytes. int64 [N] each."""
    if (np.diff(starts) < 0).any():
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], ends[order]
    return bool((starts[1:] < ends[:-1]).any() or (starts < 0).any())


def find_list(file: BinaryIO) -> tuple[int, int, int]:
    """Where the list of entries begins, its bytes, and how far all is moved by what stands before the ZIP file.

    Raises BadZipFile.
    """
    size = file.seek(0, os.SEEK_END)
    tail_at = max(0, size - END.size - 2**16)                    # the comment at the end is shorter
    file.seek(tail_at)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) - at < END.size:
        raise zipfile.BadZipFile("File is not a zip file")
    *_, list_size, list_start, _ = END.unpack_from(tail, at)
    end = tail_at + at

    # Above 65,535 entries or 4 GiB there is a second record before this one.
    before = end - PLACE_64.size - END_64.size
    if before >= 0:
        file.seek(before)
        record = file.read(END_64.size + PLACE_64.size)
        if record.startswith(b"PK\6\6") and record[END_64.size :].startswith(b"PK\6\7"):
            *_, list_size, list_start = END_64.unpack_from(record)
            end = before
    place = end - list_size
    shift = place - list_start
    if place < 0 or shift < 0:
        raise zipfile.BadZipFile("Bad offset for central directory")
    return place, list_size, shift


def read_entries(file: BinaryIO, place: int, size: int, shift: int) -> Iterator[tuple[int, Entry]]:
    """(where it is listed, entry) for `size` bytes of a list that begins at `place`. Raises BadZipFile."""
    end = place + size
    block, at = b"", 0
    while place < end:
        # The record as a whole; its fields take 192 KiB at most.
        if len(block) - at < LISTED.size + 3 * 2**16 and len(block) - at < end - place:
            file.seek(place)
            block, at = file.read(BLOCK if size > LISTED.size else 2**10), 0
        if len(block) - at < LISTED.size:
            raise zipfile.BadZipFile("Truncated central directory")
        (mark, _, _, flags, method, _, _, crc, packed, unpacked, name_size, extra_size, comment_size, _, _, _,
         start) = LISTED.unpack_from(block, at)
        if mark != b"PK\1\2":
            raise zipfile.BadZipFile("Bad magic number for central directory")
        length = LISTED.size + name_size + extra_size + comment_size
        if len(block) - at < length:                             # a single one with long fields
            file.seek(place)
            block, at = file.read(length), 0
        if len(block) - at < length:
            raise zipfile.BadZipFile("Truncated central directory")

        name_at = at + LISTED.size
        raw = block[name_at : name_at + name_size]
        name = raw.decode("utf-8" if flags & 0x800 else "cp437")
        for kind, field in extra_fields(block[name_at + name_size : name_at + name_size + extra_size]):
            if kind == 1:                                        # numbers that take 64 bits, those that do alone
                large = iter(struct.unpack(f"<{len(field) // 8}Q", field[: len(field) // 8 * 8]))
                small = (unpacked, packed, start)
                unpacked, packed, start = (next(large, n) if n == 0xFFFFFFFF else n for n in small)
            elif kind == 0x7075 and len(field) > 5 and field[:5] == struct.pack("<BI", 1, zlib.crc32(raw)):
                name = field[5:].decode("utf-8")                 # beside one in an old code page
        yield place, Entry(name.partition("\0")[0], name_size, flags, method, crc, packed, unpacked, start + shift)
        place += length
        at += length


def extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of each extra field of an entry; broken ones are left out."""
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<2H", extra)
        if size > len(extra) - 4:
            return
        yield kind, extra[4 : 4 + size]
        extra = extra[4 + size :]


def read_content(file: BinaryIO, entry: Entry) -> bytes:
    """The unpacked bytes of an entry, as they are or as zlib packs them. Raises BadZipFile, zlib.error."""
    file.seek(entry.start)
    header = file.read(LOCAL.size)
    if len(header) < LOCAL.size or not header.startswith(b"PK\3\4"):
        raise zipfile.BadZipFile("Bad magic number for file header")
    *_, name_size, extra_size = LOCAL.unpack(header)
    file.seek(name_size + extra_size, os.SEEK_CUR)
    content = file.read(entry.packed)
    if len(content) < entry.packed:
        raise zipfile.BadZipFile("the file ends before it")
    if entry.method == zipfile.ZIP_DEFLATED:
        content = zlib.decompressobj(-15).decompress(content, entry.unpacked + 1)
    if len(content) != entry.unpacked or zlib.crc32(content) != entry.crc:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {entry.name!r}")
    return content
