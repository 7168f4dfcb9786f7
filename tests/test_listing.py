"""diffuser_lib/listing.py: names, labels and ZIP files in some bytes for each image."""

import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from diffuser_lib.listing import Labels, Names, OverlapError, ZipIndex

LIMIT = 2**20
STRANGE = ["", "b", "a/b.png", "a-1/b.png", "a.png", "ä", "日本", "\U0001f600", "\udcff", "\ue000", "A", "b" * 300, "b"]


def test_names_are_those_of_a_list():
    """Items, length, search and order are those of a sorted list, with names that are no UTF-8 and of any length."""
    names = Names(STRANGE)
    assert names == STRANGE and len(names) == len(STRANGE) and names[-1] == "b" and "ä" in names
    with pytest.raises(IndexError):
        names[len(STRANGE)]
    for texts in (STRANGE, STRANGE + ["x" * 10**6], [], ["one"]):
        ordered = Names(texts).sorted()
        assert ordered == sorted(texts)
        assert all(ordered[ordered.find(text)] == text for text in texts)
        assert ordered.find("nothing") == ordered.find("zzz") == -1
    assert pickle.loads(pickle.dumps(names)) == STRANGE


def test_a_name_and_a_label_take_some_bytes():
    """5,000 names and labels take less than 50 bytes each, where strings in a list would take a hundred and more."""
    tracemalloc.start()
    try:
        names = Names(f"class{i % 10}/{i:08}.png" for i in range(5_000)).sorted()
        labels, _ = Labels(f"class{i % 10}" for i in range(5_000)).settle()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(names) == len(labels) == 5_000
    assert kept < 50 * 5_000 and peak < 120 * 5_000


# ---- ZIP files ---------------------------------------------------------------------------------


def contents(n=30):
    return {f"käse/{i}.png" if i % 3 else f"dog/{i}.txt": os.urandom(50) * (i % 5) for i in range(n)}


def check_as_zipfile(path, wanted):
    """The index has these names in order, and reads what zipfile reads."""
    index = ZipIndex(path)
    assert index == sorted(wanted)
    with zipfile.ZipFile(path) as archive:
        for name, content in wanted.items():
            assert index.read(name, LIMIT) == archive.read(name) == content


def write(path, wanted, method=zipfile.ZIP_DEFLATED, mode="w"):
    with zipfile.ZipFile(path, mode, method) as archive:
        for name, content in wanted.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_zipfile_writes_is_read(tmp_path, method):
    """However it is packed, also with a comment, added to, and with something before it."""
    wanted = contents()
    path = write(tmp_path / "a.zip", wanted, method)
    check_as_zipfile(path, wanted)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"x" * 60_000
        archive.writestr("z", b"last")
    check_as_zipfile(path, {**wanted, "z": b"last"})
    moved = tmp_path / "moved.zip"
    moved.write_bytes(b"#!/bin/sh\n" * 10 + path.read_bytes())
    check_as_zipfile(moved, {**wanted, "z": b"last"})
    again = pickle.loads(pickle.dumps(ZipIndex(path)))
    assert again.read("z", LIMIT) == b"last"


def test_more_entries_than_16_bits_count(tmp_path):
    """70,000 entries have a second end record, and all are found."""
    wanted = {f"c{i % 7}/{i:06}.png": b"%d" % i for i in range(70_000)}
    index = ZipIndex(write(tmp_path / "many.zip", wanted, zipfile.ZIP_STORED))
    assert index == sorted(wanted)
    for i in range(0, 70_000, 997):
        assert index.read(f"c{i % 7}/{i:06}.png", LIMIT) == b"%d" % i


def test_an_entry_takes_some_bytes(tmp_path):
    """The index of 5,000 entries takes less than 60 bytes each; zipfile's own takes several hundred."""
    path = write(tmp_path / "many.zip", {f"c{i % 7}/{i:06}.png": b"" for i in range(5_000)}, zipfile.ZIP_STORED)
    tracemalloc.start()
    try:
        index = ZipIndex(path)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(index) == 5_000 and kept < 60 * 5_000


def test_numbers_of_64_bits(tmp_path):
    """Sizes and places that stand in an extra field, as in files above 4 GiB, are taken from there."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"hello")
        archive.writestr("b", b"world")
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2")
    size, start = 5, struct.unpack_from("<I", content, at + 42)[0]
    extra = struct.pack("<2H3Q", 1, 24, size, size, start)
    content[at + 20 : at + 28] = b"\xff" * 8
    content[at + 30 : at + 32] = struct.pack("<H", len(extra))
    content[at + 42 : at + 46] = b"\xff" * 4
    content[at + 47 : at + 47] = extra
    end = content.rindex(b"PK\5\6")
    listed = struct.unpack_from("<I", content, end + 12)[0]
    content[end + 12 : end + 16] = struct.pack("<I", listed + len(extra))
    path.write_bytes(content)
    check_as_zipfile(path, {"a": b"hello", "b": b"world"})


def test_a_name_beside_one_in_an_old_code_page(tmp_path):
    """What other programs write into a field of its own counts where it belongs to the name."""
    info = zipfile.ZipInfo("kase")
    info.extra = struct.pack("<2HBI", 0x7075, 10, 1, zlib.crc32(b"kase")) + "käse".encode()
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, b"hello")
    index = ZipIndex(tmp_path / "a.zip")
    assert list(index) == ["käse"] and index.read("käse", LIMIT) == b"hello"


def test_of_a_name_that_is_there_twice_the_last_counts(tmp_path):
    """Whether the names are in order or not."""
    for names in (["a", "b", "b", "c"], ["c", "b", "a", "b"]):
        with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for i, name in enumerate(names):
                archive.writestr(name, str(i))
        index = ZipIndex(tmp_path / "a.zip")
        assert list(index) == ["a", "b", "c"]
        assert [int(index.read(name, LIMIT)) for name in index] == [max(i for i in range(4) if names[i] == n) for n in index]


def test_damage_is_an_error_of_a_known_kind(tmp_path):
    """A ZIP file with any bytes changed or cut off is read as zipfile reads it, or refused; it never hangs."""
    whole = write(tmp_path / "whole.zip", contents(8)).read_bytes()
    rng = random.Random(0)
    path = tmp_path / "a.zip"
    known = (zipfile.BadZipFile, ValueError, zlib.error, OSError, NotImplementedError, RuntimeError)
    for trial in range(600):
        content = bytearray(whole)
        if trial % 3 == 0:
            del content[rng.randrange(len(content)) :]
        for _ in range(rng.randrange(1, 4)):
            if content:
                content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            index = ZipIndex(path)
        except known:
            continue
        for name in index:
            try:
                index.read(name, LIMIT)
            except known:
                continue


def test_a_small_entry_that_unpacks_to_more_than_it_says(tmp_path):
    """It is refused, after no more than it said was unpacked; one above the limit before anything is."""
    path = write(tmp_path / "a.zip", {"a": bytes(50 * 2**20)})
    with pytest.raises(ValueError, match="more than 1 MiB"):
        ZipIndex(path).read("a", LIMIT)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\1\2")
    content[at + 24 : at + 28] = struct.pack("<I", 1000)
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32"):
            ZipIndex(path).read("a", LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_what_is_no_zip_file_or_none_to_be_read(tmp_path):
    """Nothing, text, an entry that is encrypted, entries that share bytes, a name that is not there."""
    path = tmp_path / "a.zip"
    for content in (b"", b"hello" * 1000, b"PK\5\6" + bytes(17)):
        path.write_bytes(content)
        with pytest.raises(zipfile.BadZipFile):
            ZipIndex(path)
    write(path, {"a": b"hello"})
    with pytest.raises(KeyError):
        ZipIndex(path).read("b", LIMIT)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="encrypted"):
        ZipIndex(path).read("a", LIMIT)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a", b"hello")
        archive.filelist.append(archive.filelist[0])
    path.write_bytes(stream.getvalue())
    with pytest.raises(OverlapError):
        ZipIndex(path)


def test_labels_of_arrays_and_classes_of_names(tmp_path):
    """Labels come as int64, with names in place of numbers where there are some."""
    labels = Labels([1, 0, 1])
    assert labels.are_below(2) and not labels.are_below(1) and not Labels(["1"]).are_below(2)
    numbers, names = labels.renamed(["dog", "cat"]).settle()
    assert numbers.dtype == np.int64 and numbers.tolist() == [0, 1, 0] and names == ["cat", "dog"]
    assert Labels([None, ""]).any() is False and Labels([0]).any()
