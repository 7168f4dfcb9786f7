"""--mode inference with several processes or GPUs, whose files are those of one; and all pictures as one file."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import prepared
import pytest
import torch
from conftest import ROOT, cli, small_file_system, tiny_training
from PIL import Image

import diffuser
import evaluate
from diffuser import main
from diffuser_lib import images

COUNT = 240


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a checkpoint in it, and with what one process draws of it, `one`: COUNT digits, 12 at a time."""
    folder = tmp_path_factory.mktemp("drawing")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        diffuser.train(tiny_training()).rename("model.pt")
        assert main(drawing("one", "--sample_batch_size", "12")) == 0
    return folder


def drawing(place, *flags):
    """A command line that draws COUNT digits."""
    return ["--mode", "inference", "--model_path", "model.pt", "--num_images", str(COUNT), "--device", "cpu",
            "--save_dir", place, *flags]


def several(count, flags, cwd):
    """The command line in several processes, in the background."""
    return prepared.start_ranks(count, ROOT / "diffuser.py", *flags, cwd=cwd)


def result(processes):
    """(status, stdout, stderr), of which the last has one message of ours at most. Where one fails the others are told to
    end, as torchrun does."""
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            for process in processes:
                process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    status, out, errors = prepared.result_of(processes)
    assert errors.count("diffuser:") <= 1, errors
    assert "unexpected" not in errors, errors
    return status, out, errors


def content(folder, *files):
    """{name: bytes} of a drawing's pictures and of other files in its folder."""
    paths = [*Path(folder, "images").iterdir(), *(Path(folder, file) for file in files)]
    return {path.name: path.read_bytes() for path in paths}


def wait_for_pictures(folder, count):
    """Wait until more than so many pictures are there."""
    deadline = time.monotonic() + 120
    while not Path(folder, "images").is_dir() or len(os.listdir(Path(folder, "images"))) <= count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_three_processes_draw_the_files_of_one(home):
    """All pictures and the grid, byte for byte, and one set of lines, not three; samples.json says the same."""
    status, out, errors = result(several(3, drawing("three", "--sample_batch_size", "12"), home))
    assert status == 0, errors
    assert content(home / "three", "grid.png") == content(home / "one", "grid.png")
    assert out.count(f"{COUNT} images in three/images") == out.count("3 processes") == 1
    one, three = (json.loads((home / name / "samples.json").read_text()) for name in ("one", "three"))
    assert diffuser.drawing_request(one) == diffuser.drawing_request(three)
    assert three["batch_size"] == 12


def test_other_numbers_of_processes_go_on_with_a_drawing(home):
    """A process is killed, then Ctrl-C is pressed, each time with one message and only whole pictures; the same command
    goes on with others, in the batches that it began with, to the files of one process."""
    processes = several(3, drawing("mixed", "--sample_batch_size", "12"), home)
    wait_for_pictures(home / "mixed", 12)
    processes[1].kill()
    status, _, errors = result(processes)
    assert status != 0
    assert f"of {COUNT} images are there, whole; the same command goes on with the rest" in errors
    kept = content(home / "mixed")
    assert 12 < len(kept) < COUNT

    # Pictures are missing in the middle of batches, too.
    one = content(home / "one", "grid.png")
    for name in sorted(kept)[3::7]:
        (home / "mixed/images" / name).unlink()
    processes = several(2, drawing("mixed"), home)
    wait_for_pictures(home / "mixed", len(kept))
    for process in processes:
        process.send_signal(signal.SIGINT)
    status, out, errors = result(processes)
    assert status != 0
    assert "going on: " in out
    assert "stopped by SIGINT: " in errors
    kept = content(home / "mixed")
    whole = {name: picture for name, picture in kept.items() if not name.endswith(".tmp")}         # one may be of the kill
    assert len(whole) < COUNT
    assert whole.items() <= one.items()

    done = cli(*drawing("mixed"), cwd=home)
    assert done.returncode == 0, done.stderr
    assert content(home / "mixed", "grid.png") == one


def test_what_several_processes_refuse(home, monkeypatch, capsys):
    """No folder, several checkpoints to choose from, another request: one line, before any work."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--mode", "inference", "--model_path", "model.pt"]) == 2
    assert "name the folder for images with --save_dir" in capsys.readouterr().err
    (home / "several").mkdir()
    for name in ("a.pt", "b.pt"):
        shutil.copy("model.pt", home / "several" / name)
    assert main(["--mode", "inference", "--working_directory", "several", "--save_dir", "new"]) == 2
    assert "several has 2 checkpoints: name one with --model_path" in capsys.readouterr().err
    assert not Path("new").exists()

    status, _, errors = result(several(2, drawing("one", "--seed", "5"), home))
    assert status != 0
    assert "one/images already holds images of another request" in errors


def test_a_disk_that_is_full_while_several_draw(home, tmp_path):
    """One message with what is kept, by whichever process meets it; with room again the same command goes on."""
    with small_file_system(tmp_path / "out", "400k") as place:
        flags = drawing(place, "--sample_batch_size", "12")
        status, _, errors = result(several(2, flags, home))
        assert status != 0
        assert "out/images: No space left on device; " in errors
        assert f"of {COUNT} images are there, whole" in errors
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        assert cli(*flags, cwd=home).returncode == 0
        assert content(place, "grid.png") == content(home / "one", "grid.png")


# ---- Several GPUs of one process ---------------------------------------------------------------


class Halves(torch.nn.Module):
    """nn.DataParallel as if there were two GPUs: each call runs a half of the batch after the other."""

    seen: ClassVar[list] = []

    def __init__(self, module, device_ids):
        super().__init__()
        assert device_ids == [0, 1]
        self.module = module

    def forward(self, *inputs):
        parts = [v if v is None else v.chunk(2) for v in inputs]
        out = []
        for i in range(len(parts[0])):
            out.append(self.module(*(v if v is None else v[i] for v in parts)))
        self.seen.append([len(v) for v in out])
        return torch.cat(out)


@pytest.fixture
def two_gpus(monkeypatch):
    """This process pretends to have two GPUs, both of which are its CPU; gives the parts that batches run in."""
    real_start = diffuser.Devices.__init__

    def start(devices, cfg):
        real_start(devices, cfg)
        devices.replicas = cfg.num_gpus or 2

    monkeypatch.setattr(diffuser.Devices, "__init__", start)
    monkeypatch.setattr(torch.nn, "DataParallel", Halves)
    monkeypatch.setattr(Halves, "seen", [])
    return Halves.seen


@pytest.mark.parametrize("flags, parts", [
    (["--guidance_scale", "0"], [2, 2]), (["--guidance_scale", "1"], [4, 4]),
    (["--guidance_scale", "1", "--guide_path", "model.pt"], [2, 2])], ids=str)
def test_all_gpus_draw(home, tmp_path, monkeypatch, two_gpus, capsys, flags, parts):
    """Without torchrun each batch is shared by the GPUs, the guide's, too; the pictures are the same to a grey level."""
    monkeypatch.chdir(home)
    command = ["--mode", "inference", "--model_path", "model.pt", "--num_images", "9", "--steps", "2", "--device", "cpu",
               "--sample_batch_size", "4", *flags, "--save_dir"]
    assert main([*command, str(tmp_path / "one"), "--num_gpus", "1"]) == 0
    assert two_gpus == []
    assert "2 GPUs" not in capsys.readouterr().out
    assert main([*command, str(tmp_path / "two"), "--num_gpus", "0"]) == 0
    assert "steps, cpu, 2 GPUs" in capsys.readouterr().out
    assert two_gpus[0] == parts
    assert len(two_gpus) == 3 * 2 * (2 if "--guide_path" in flags else 1)
    for path in (tmp_path / "one/images").iterdir():
        one, two = (np.asarray(Image.open(file), dtype=int) for file in (path, tmp_path / "two/images" / path.name))
        assert abs(one - two).max() <= 1


@pytest.mark.skipif(0 < torch.cuda.device_count() < 3, reason="DataParallel looks for two more GPUs beside this one")
def test_a_batch_is_larger_on_several_gpus(home, monkeypatch):
    """What fits into the memory of one, times their number, where no size is asked for."""
    model = diffuser.load(home / "model.pt", device="cpu")
    monkeypatch.setattr(diffuser.Model, "device", torch.device("cuda"))
    monkeypatch.setattr(diffuser, "free_memory", lambda device: 2**23)
    alone = model.batch_size(model.config)
    devices = diffuser.Devices(tiny_training())
    devices.replicas = 3
    spread = model.spread(devices)
    assert 1 < alone < 1024
    assert spread.batch_size(model.config) == 3 * alone
    assert spread.batch_size(dataclasses.replace(model.config, sample_batch_size=5)) == 5
    assert (model.replicas, spread.replicas) == (1, 3)


# ---- One file ----------------------------------------------------------------------------------


def small(place, *flags):
    """A command line that draws twenty digits of two classes, seven at a time."""
    return ["--mode", "inference", "--model_path", "model.pt", "--num_images", "20", "--classes", "3,7", "--steps", "2",
            "--sample_batch_size", "7", "--device", "cpu", "--save_dir", str(place), *flags]


@pytest.fixture
def plain(home, tmp_path, monkeypatch):
    """Twenty digits in a folder, and the flags that draw them elsewhere."""
    monkeypatch.chdir(home)
    assert main(small(tmp_path / "png")) == 0
    return tmp_path


def without_images(folder):
    """What stands in a drawing's folder, but for locks."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def test_a_zip_file_of_pictures(plain):
    """The same files, and dataset.json as EDM's dataset_tool.py reads it; grid and record as always, images/ is gone; the
    same bytes whenever it is made."""
    assert main(small(plain / "zip", "--save_format", "zip")) == 0
    assert without_images(plain / "zip") == ["grid.png", "images.zip", "samples.json"]
    assert (plain / "zip/grid.png").read_bytes() == (plain / "png/grid.png").read_bytes()
    pictures = content(plain / "png")
    with zipfile.ZipFile(plain / "zip/images.zip") as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist() if name != "dataset.json"} == pictures
        labels = dict(json.loads(archive.read("dataset.json"))["labels"])
    assert labels == {name: 3 if "_3" in name else 7 for name in pictures}

    assert main(small(plain / "again", "--save_format", "zip")) == 0
    assert (plain / "again/images.zip").read_bytes() == (plain / "zip/images.zip").read_bytes()
    flags = [flag for flag in small(plain / "none", "--save_format", "zip") if flag not in ("--classes", "3,7")]
    assert main([*flags, "--use_labels", "False"]) == 0
    with zipfile.ZipFile(plain / "none/images.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}


def test_an_array_of_pictures(plain):
    """arr_0 and arr_1 as ADM's evaluation takes them, in order; without classes arr_0 alone."""
    assert main(small(plain / "npz", "--save_format", "npz", "--trajectory")) == 0
    assert without_images(plain / "npz") == ["grid.png", "images.npz", "samples.json", "trajectory.png"]
    with np.load(plain / "npz/images.npz") as found:
        assert sorted(found) == ["arr_0", "arr_1", "class_names"]
        pixels = found["arr_0"]
        assert (pixels.dtype, pixels.shape) == (np.uint8, (20, 8, 8, 1))
        assert found["arr_1"].dtype == np.int64
        assert found["arr_1"].tolist() == [3, 7] * 10
        assert found["class_names"].tolist() == list("0123456789")
    for image, path in zip(pixels, sorted((plain / "png/images").iterdir()), strict=True):
        assert np.array_equal(image[:, :, 0], np.asarray(Image.open(path)))

    flags = [flag for flag in small(plain / "none", "--save_format", "npz") if flag not in ("--classes", "3,7")]
    assert main([*flags, "--use_labels", "False"]) == 0
    with np.load(plain / "none/images.npz") as found:
        assert list(found) == ["arr_0"]


def test_evaluate_reads_all_of_them(plain):
    """A folder, its ZIP and its array, by the path of the drawing or of the file: the same pictures, labels and names."""
    for kind in ("zip", "npz"):
        assert main(small(plain / kind, "--save_format", kind)) == 0
    first = evaluate.read_images(str(plain / "png"))
    assert first.images.shape == (20, 1, 8, 8)
    assert (first.class_names, first.labels.tolist()) == (["3", "7"], [0, 1] * 10)
    for place in ("png/images", "zip", "zip/images.zip", "npz", "npz/images.npz"):
        data = evaluate.read_images(str(plain / place))
        assert torch.equal(data.images, first.images), place
        assert torch.equal(data.labels, first.labels)
        assert data.class_names == first.class_names
        assert len(evaluate.find_images(str(plain / place))) == 20
    colour = evaluate.read_images(str(plain / "npz"), (3, 16, 16))
    assert torch.equal(colour.images, evaluate.read_images(str(plain / "png"), (3, 16, 16)).images)


@pytest.mark.parametrize("kind", ["zip", "npz"])
def test_a_drawing_that_broke_off_still_becomes_one_file(plain, monkeypatch, capsys, kind):
    """While drawing there are pictures, with which the same command goes on; a full disk at the end loses none, nor does
    it leave half a file. What is there already is refused, and so are other images."""
    flags = small(plain / kind, "--save_format", kind)
    assert main(flags) == 0
    whole = (plain / kind / f"images.{kind}").read_bytes()

    # Begun as pictures, and some are missing: one file all the same.
    flags = small(plain / "png", "--save_format", kind)
    for name in ("000004_3.png", "000013_7.png"):
        (plain / "png/images" / name).unlink()
    with monkeypatch.context() as patched:
        patched.setitem(images.ARCHIVES, kind, full_disk)
        capsys.readouterr()
        assert main(flags) == 1
        assert "png/images: No space left on device; 20 of 20 images are there, whole" in capsys.readouterr().err
    assert without_images(plain / "png") == ["grid.png", "images", "samples.json"]
    assert main(flags) == 0
    assert (plain / "png" / f"images.{kind}").read_bytes() == whole
    assert without_images(plain / "png") == ["grid.png", f"images.{kind}", "samples.json"]

    # Nothing is drawn over it.
    for more, words in (([], "all that are asked for"), (["--save_format", "png"], "all that are asked for"),
                        (["--seed", "5"], "images of another request")):
        capsys.readouterr()
        assert main([*flags, *more]) == 2
        errors = capsys.readouterr().err
        assert f"images.{kind} already holds images" in errors
        assert words in errors
    assert (plain / "png" / f"images.{kind}").read_bytes() == whole


def full_disk(file, *arguments):
    """An archive that does not fit."""
    file.write(b"half")
    raise OSError(28, "No space left on device")


def arrays(**content):
    """The content of an .npz file, of two grey images where nothing else is said."""
    return {"arr_0": np.zeros((2, 4, 4, 1), np.uint8), **content}


@pytest.mark.parametrize("content, words", [
    (arrays(arr_0=np.zeros((2, 4), np.uint8)), "uint8 [2, 4]"),
    (arrays(arr_0=np.zeros((2, 4, 4, 3))), "float64 [2, 4, 4, 3]"),
    (arrays(arr_0=np.zeros((0, 4, 4, 3), np.uint8)), "[0, 4, 4, 3]"),
    (arrays(arr_1=np.zeros(3, np.int64)), "2 images, but 3 in arr_1"),
    (arrays(arr_1=np.array([{}, {}])), "Python objects, which are not loaded"),
    ({"x": np.zeros(3)}, "arr_0"),
    (b"", "no whole .npz file"), (b"PK\3\4 damaged", "no whole .npz file")])
def test_arrays_that_are_no_images(tmp_path, capsys, content, words):
    """Another type or shape, labels of others, objects that would run code, no array at all: one line."""
    path = tmp_path / "other.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    assert evaluate.main([str(path), "--against", "digits"]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("more, labels, names", [
    ({}, [0, 0], []), ({"arr_1": np.array([7, 3], np.int32)}, [1, 0], ["3", "7"]),
    ({"arr_1": np.array([1, 1]), "class_names": np.array(["cat", "dog"])}, [0, 0], []),
    ({"arr_1": np.array([1, 2]), "class_names": np.array(["cat", "dog"])}, [0, 1], ["1", "2"]),
    ({"arr_1": np.array([-1, 2]), "class_names": np.array(["a", "b", "c"])}, [0, 1], ["-1", "2"])])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_other_programs(tmp_path, more, labels, names, save):
    """Without labels, with numbers for classes, with names that do or do not go with them; compressed, too."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    save(tmp_path / "a.npz", arr_0=pixels, **more)
    data = evaluate.read_images(str(tmp_path / "a.npz"))
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), pixels)
    assert (data.labels.tolist(), data.class_names) == (labels, names)
