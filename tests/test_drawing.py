"""--mode inference with several processes, and what is left of it: the files are those of one process."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, cli, heed_interrupts, small_file_system, tiny_training

import diffuser
from diffuser import main

COUNT = 1000
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a checkpoint in it, and with what one process draws of it, `one`: a thousand digits, 50 at a time."""
    folder = tmp_path_factory.mktemp("drawing")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        diffuser.train(tiny_training()).rename("model.pt")
        assert main(drawing("one", "--sample_batch_size", "50")) == 0
    return folder


def drawing(place, *flags):
    """A command line that draws a thousand digits."""
    return ["--mode", "inference", "--model_path", "model.pt", "--num_images", str(COUNT), "--device", "cpu",
            "--save_dir", place, *flags]


def torchrun(processes, flags, cwd):
    """The command line in several processes, in the background."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--rdzv_backend",
               "c10d", "--rdzv_endpoint", "localhost:0", str(ROOT / "diffuser.py"), *map(str, flags)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=heed_interrupts)


def result(process):
    """(status, stdout, stderr), of which the last has one message of ours at most."""
    out, errors = process.communicate(timeout=200)
    assert errors.count("diffuser:") <= 1, errors
    assert "unexpected" not in errors, errors
    return process.returncode, out, errors


def ranks(pid):
    """{rank: process id} of the workers below a torchrun process."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                lines = (entry / "environ").read_text().split("\0")
                found[int(dict(line.split("=", 1) for line in lines if "=" in line)["RANK"])] = int(entry.name)
    return found


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
    """A thousand pictures and the grid, byte for byte, and one set of lines, not three; samples.json says the same."""
    status, out, errors = result(torchrun(3, drawing("three", "--sample_batch_size", "50"), home))
    assert status == 0, errors
    assert content(home / "three", "grid.png") == content(home / "one", "grid.png")
    assert out.count("1000 images in three/images") == out.count("3 processes") == 1
    one, three = (json.loads((home / name / "samples.json").read_text()) for name in ("one", "three"))
    assert diffuser.drawing_request(one) == diffuser.drawing_request(three)
    assert three["batch_size"] == 50


@needs_proc
def test_other_numbers_of_processes_go_on_with_a_drawing(home):
    """A process is killed, then Ctrl-C is pressed, each time with one message and only whole pictures; the same command
    goes on with others, in the batches that it began with, to the files of one process."""
    process = torchrun(3, drawing("mixed", "--sample_batch_size", "50"), home)
    wait_for_pictures(home / "mixed", 20)
    os.kill(ranks(process.pid)[1], signal.SIGKILL)
    status, _, errors = result(process)
    assert status != 0
    assert "of 1000 images are there, whole; the same command goes on with the rest" in errors
    kept = content(home / "mixed")
    assert 20 < len(kept) < COUNT

    # Pictures are missing in the middle of batches, too.
    one = content(home / "one", "grid.png")
    for name in sorted(kept)[3::7]:
        (home / "mixed/images" / name).unlink()
    process = torchrun(2, drawing("mixed"), home)
    wait_for_pictures(home / "mixed", len(kept))
    for pid in (*ranks(process.pid).values(), process.pid):
        os.kill(pid, signal.SIGINT)
    status, out, errors = result(process)
    assert status != 0
    assert "going on: " in out
    assert "stopped by SIGINT: " in errors
    kept = content(home / "mixed")
    assert len(kept) < COUNT
    assert kept.items() <= one.items()

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

    status, _, errors = result(torchrun(2, drawing("one", "--seed", "5"), home))
    assert status != 0
    assert "one/images already holds images of another request" in errors


def test_a_disk_that_is_full_while_several_draw(home, tmp_path):
    """One message with what is kept, by whichever process meets it; with room again the same command goes on."""
    with small_file_system(tmp_path / "out", "400k") as place:
        flags = drawing(place, "--sample_batch_size", "50")
        status, _, errors = result(torchrun(2, flags, home))
        assert status != 0
        assert "out/images: No space left on device; " in errors
        assert "of 1000 images are there, whole" in errors
        subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
        assert cli(*flags, cwd=home).returncode == 0
        assert content(place, "grid.png") == content(home / "one", "grid.png")
