"""What the tests share: a small network, a few small images, the real command line, real data where it is."""

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import prepared
import pytest
import torch
from filelock import FileLock
from PIL import Image
from prepared import heed_interrupts  # noqa: F401 (the tests take it from here)

import diffuser
import evaluate

ROOT = Path(diffuser.__file__).resolve().parent
REAL_DATA = Path(os.environ.get("DIFFUSER_TEST_DATA", ROOT / "data"))

# A network small enough to train in a second.
TINY = dict(base_channels=8, channel_mults=(1, 2), num_res_blocks=1, emb_dim=8, num_heads=2)
TINY_FLAGS = ["--base_channels", "8", "--channel_mults", "1,2", "--num_res_blocks", "1", "--emb_dim", "8",
              "--num_heads", "2", "--preview_steps", "2", "--device", "cpu", "--no-report"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A temporary folder that is also the current one, so that outputs land there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def real_data():
    """The folder with real MNIST and CIFAR-10, or a skip."""
    if not (REAL_DATA / "MNIST").is_dir():
        pytest.skip(f"no real data in {REAL_DATA}: set DIFFUSER_TEST_DATA to a folder with MNIST in torchvision's layout")
    return REAL_DATA


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of small colour images that are not square, in the formats people have."""
    random = np.random.default_rng(0)
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i, ending in enumerate(("png", "jpg", "jpeg", "bmp", "gif", "webp")):
            pixels = random.integers(0, 100, (20, 30, 3), dtype=np.uint8) + np.uint8(100 * c)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.{ending}")
    return tmp_path / "pictures"


SWITCHES = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync")


@pytest.fixture(scope="session")
def browser():
    """A Chromium without a window, one for all tests."""
    api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if not path:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def digits_judge(tmp_path_factory):
    """The file in which evaluate.py keeps its judge of the digits, trained once for all tests and all their processes."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    place = place / "digits_judge"
    with FileLock(f"{place}.lock"), torch.random.fork_rng():
        place.mkdir(exist_ok=True)
        evaluate.judge_of(evaluate.load_reference("digits", "data", (1, 8, 8)), str(place))
    [file] = place.glob("judge_digits_*.pt")
    return file


def some_digits(n):
    """The first n digits as images of one's own, for epochs of few steps and small batches."""
    data = diffuser.load_data(diffuser.configure(dataset="digits"))
    return diffuser.ImageData(data.images[:n], data.labels[:n], data.class_names)


@contextmanager
def small_file_system(place, size):
    """A file system of that size, such as 64k, mounted at a new folder for a while; or a skip."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def cli(*arguments, cwd, stdin="", script="diffuser.py", env=None, timeout=300):
    """The real command line in a process of its own."""
    return prepared.run(ROOT / script, *arguments, cwd=cwd, stdin=stdin, env=env, timeout=timeout)


# For a child process: status("VmHWM") is the most memory it has taken, in KiB; see proc(5).
STATUS = ("import re\n"
          "def status(name): return int(re.search(name + r':\\s+(\\d+)', open('/proc/self/status').read())[1])\n")


# For a child process: run a script whose reading of a checkpoint is where Ctrl-C comes.
INTERRUPTED = """
import os, runpy, signal, sys
import diffuser

diffuser.load_checkpoint = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def interrupted(script, *arguments, cwd):
    """A script in a process of its own that gets a real Ctrl-C while it reads its checkpoint."""
    return prepared.run("-c", INTERRUPTED, ROOT / script, *arguments, cwd=cwd)


# A run whose steps leave time for a signal, for `python -c`.
SLOWLY = """
import sys, time, diffuser
step = diffuser.Trainer.train_step
diffuser.Trainer.train_step = lambda run: (step(run), time.sleep(0.1))
sys.exit(diffuser.main(sys.argv[1:]))
"""


def tiny_training(**more):
    """Settings of a run of a few steps on the digits."""
    return diffuser.configure(**{**dict(dataset="digits", device="cpu", batch_size=16, iterations=4, preview_steps=2,
                                        timesteps=20, log_every=2, num_generations=1, report=False), **TINY,
                                **more})


TRAINED = {}                                                                 # settings: (folder, checkpoint in it)


def trained_before(**more):
    """The run of tiny_training(**more) in the current folder; gives its checkpoint.

    It is trained once, elsewhere, and copied from then on: for tests of what comes after training.
    """
    key = tuple(sorted(more.items()))
    if key not in TRAINED:
        place, here = tempfile.TemporaryDirectory(), os.getcwd()
        os.chdir(place.name)
        try:
            TRAINED[key] = place, diffuser.train(tiny_training(**more))
        finally:
            os.chdir(here)
    place, path = TRAINED[key]
    shutil.copytree(place.name, ".", dirs_exist_ok=True)
    return path


def tiny_unet(channels=1, classes=3, **more):
    """A network whose output is not zero everywhere."""
    torch.manual_seed(0)
    network = diffuser.UNet(channels, classes, **{**TINY, **more}).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def same(a, b):
    """Whether two checkpoints, or parts of them, hold the very same numbers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b
