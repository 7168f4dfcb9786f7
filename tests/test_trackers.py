"""trackers.py: what TensorBoard and Weights & Biases themselves read from the files of real runs."""

import csv
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from conftest import TINY_FLAGS, cli, tiny_training

import diffuser
import trackers
from diffuser import train

RUN = ["--mode", "train", "--dataset", "digits", "--timesteps", "20", "--batch_size", "300", "--sample_every", "2", "--log_every", "2",
       "--num_generations", "1", *TINY_FLAGS]


@pytest.fixture
def offline(monkeypatch, folder):
    """No key, no answers, no home with settings of somebody's own."""
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "no-netrc"))
    return folder


def events(folder):
    """What TensorBoard makes of a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    return found


def wandb_records(path):
    """The records in a .wandb file: blocks of 32 KiB, in them pieces with CRC, length and kind, of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):                                                   # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""


def history(path):
    """The rows that were logged, {name: value}."""
    rows = []
    for record in wandb_records(path):
        if record.HasField("history"):
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def metrics(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


def the_run(folder):
    return next(folder.glob("samples/samples_*"))


def test_tensorboard_reads_every_number_the_grids_and_the_hyperparameters(folder):
    """A real run on the command line: each number of metrics.csv at its step, CPU and memory, a grid as it is on the
    disk, all options with the final metrics."""
    from PIL import Image
    from tensorboard.plugins.hparams import plugin_data_pb2

    done = cli(*RUN, "--epochs", 4, "--use_tensorboard", cwd=folder)
    assert done.returncode == 0, done.stderr
    run, rows = the_run(folder), metrics(the_run(folder))
    found = events(run)
    for column in (c for c in rows[0] if c != "step"):
        expected = [(int(r["step"]), float(r[column])) for r in rows if r[column]]
        assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in found.Scalars(column)] == expected
    for name in ("machine/cpu_percent", "machine/memory_gib"):
        assert len(found.Scalars(name)) == len(rows) and found.Scalars(name)[-1].value >= 0
    assert 0.05 < found.Scalars("machine/memory_gib")[-1].value < 24
    grids = sorted(run.glob("epoch_*.png"), key=lambda p: p.stat().st_mtime)
    assert [e.step for e in found.Images("samples")] == [10, 20] and len(grids) == 2
    (folder / "logged.png").write_bytes(found.Images("samples")[-1].encoded_image_string)
    assert Image.open(folder / "logged.png").convert("RGB").tobytes() == Image.open(grids[-1]).convert("RGB").tobytes()

    plugin = found.SummaryMetadata("_hparams_/session_start_info").plugin_data
    options = plugin_data_pb2.HParamsPluginData.FromString(plugin.content).session_start_info.hparams
    assert set(options) == set(diffuser.FIELDS)
    assert options["batch_size"].number_value == 300 and options["channel_mults"].string_value == "(1, 2)"
    assert found.Scalars("final/loss")[-1].value == pytest.approx(float(rows[-1]["loss"]), rel=1e-5)
    assert found.Scalars("final/val_loss")[-1].value == pytest.approx(float(rows[-1]["val_loss"]), rel=1e-5)


def test_tensorboard_shows_a_resumed_run_as_one(folder):
    """Stopped, gone on with: every step once, in one curve."""
    for epochs in (2, 4):
        train(tiny_training(iterations=0, epochs=epochs, batch_size=300, use_tensorboard=True))
    steps = [e.step for e in events(the_run(folder)).Scalars("loss")]
    assert steps == sorted(set(steps)) and steps[-1] == 20


def test_wandb_offline_keeps_the_whole_run(offline):
    """Without a key the run stays on the disk, by itself: numbers by our steps, a grid, options, name, final numbers."""
    done = cli(*RUN, "--epochs", 4, "--use_wandb", "--project_name", "digits-test", cwd=offline)
    assert done.returncode == 0 and "no key is known" in done.stderr, done.stderr
    run = the_run(offline)
    rows, (path,) = metrics(run), run.glob("wandb/offline-run-*/run-*.wandb")
    logged = history(path)
    for row in rows:
        found = next(r for r in logged if r.get("step") == int(row["step"]) and "loss" in r)
        assert found["loss"] == pytest.approx(float(row["loss"])) and found["grad_norm"] == pytest.approx(float(row["grad_norm"]))
        assert found["loss_q4"] == pytest.approx(float(row["loss_q4"])) and found["machine/memory_gib"] > 0.05
    pictures = [r for r in logged if "samples" in r or any(k.startswith("samples") for k in r)]
    assert len(pictures) == 2 and list(run.glob("wandb/offline-run-*/files/media/images/samples*.png"))
    records = list(wandb_records(path))
    about = next(r.run for r in records if r.HasField("run"))
    config = {u.key: json.loads(u.value_json) for u in about.config.update}
    assert about.project == "digits-test" and about.display_name == run.name
    assert about.run_id == json.loads((run / "config.json").read_text())["run_id"]
    assert config["batch_size"] == 300 and config["dataset"] == "digits"
    final = {u.key or ".".join(u.nested_key): u.value_json for r in records if r.HasField("summary") for u in r.summary.update}
    assert float(final["final/loss"]) == pytest.approx(float(rows[-1]["loss"]))


def test_a_resumed_run_goes_on_under_its_id_and_name(offline):
    """Two invocations, one run for W&B: the same id; another experiment is another run."""
    ids = []
    for epochs, name in ((2, "first"), (4, "first"), (2, "second")):
        train(tiny_training(iterations=0, epochs=epochs, batch_size=300, use_wandb=True, wandb_mode="offline", experiment_name=name))
    for name in ("first", "second"):
        runs = list(offline.glob(f"samples/samples_{name}_*/wandb/offline-run-*/run-*.wandb"))
        about = [next(r.run for r in wandb_records(path) if r.HasField("run")) for path in runs]
        assert len(runs) == (2 if name == "first" else 1) and {a.display_name for a in about} == {name}
        ids.append({a.run_id for a in about})
    assert [len(i) for i in ids] == [1, 1] and ids[0] != ids[1]


def test_no_key_is_written_anywhere(offline):
    """A key in the environment is the library's affair: after an offline run it is in no file and no output."""
    key = "0123456789abcdef0123456789abcdef01234567"
    done = cli(*RUN, "--iterations", 2, "--use_wandb", "--use_tensorboard", "--wandb_mode", "offline", cwd=offline,
               env={"WANDB_API_KEY": key})
    assert done.returncode == 0, done.stderr
    assert key not in done.stdout + done.stderr
    files = [p for p in offline.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files) and any("tfevents" in p.name for p in files)
    assert [p for p in files if key.encode() in p.read_bytes()] == []


def test_an_unreachable_server_does_not_stop_training(offline):
    """Online without a network: one warning, a whole run."""
    done = cli(*RUN, "--iterations", 2, "--use_wandb", "--wandb_mode", "online", cwd=offline, timeout=200,
               env={"WANDB_API_KEY": "x" * 40, "WANDB_INIT_TIMEOUT": "5", "WANDB_BASE_URL": "http://127.0.0.1:9"})
    assert done.returncode == 0 and "going on without it" in done.stderr.replace("training goes on", "going on"), done.stderr
    assert list(offline.glob("checkpoints/*.pt"))


def test_a_missing_library_is_one_line(folder, monkeypatch, capsys):
    """Each tracker says what to install, and training goes on."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(tiny_training(use_wandb=True, use_tensorboard=True))
    error = capsys.readouterr().err
    assert "pip install wandb" in error and "pip install tensorboard" in error and error.count("\n") == 2


def test_a_tracker_that_fails_at_any_point_is_dropped(folder, monkeypatch, capsys):
    """At the start, at a row, at the end: said once, and the run ends as it should."""
    class Broken:
        def __init__(self, when):
            self.when = when

        def log(self, step, values):
            if self.when == "log":
                raise RuntimeError("server gone")

        def finish(self, final):
            raise RuntimeError("server gone")

    for when in ("log", "finish"):
        monkeypatch.setattr(trackers, "start_trackers", lambda *a, when=when: {"broken": Broken(when)})
        assert train(tiny_training(experiment_name=when, use_tensorboard=True)).exists()
        assert capsys.readouterr().err.count("server gone") == 1


def test_what_the_machine_does_not_tell_does_not_stop_training(folder, monkeypatch):
    """psutil that may not look into /proc; numbers in metrics.csv that a power cut has spoilt."""
    import psutil

    def forbidden(*arguments):
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(psutil, "cpu_percent", forbidden)
    train(tiny_training(use_tensorboard=True))
    path = the_run(folder) / "metrics.csv"
    path.write_text(path.read_text().replace(metrics(the_run(folder))[0]["loss"], "0.8\0"))
    train(tiny_training(use_tensorboard=True, iterations=6))
    assert "machine/cpu_percent" not in events(the_run(folder)).Tags()["scalars"]
    assert events(the_run(folder)).Scalars("final/loss")


def test_memory_and_use_of_a_gpu_are_read_where_they_can_be(monkeypatch):
    """On CUDA memory and utilisation; without nvidia-ml-py, memory alone; without psutil no CPU, and no error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: 71)
    load = trackers.machine_load()
    assert load["machine/gpu_memory_gib"] == 3 and load["machine/gpu_percent"] == 71 and load["machine/cpu_percent"] >= 0
    monkeypatch.delattr(torch.cuda, "utilization")
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert trackers.machine_load() == {"machine/gpu_memory_gib": 3}


def test_only_the_first_process_talks(folder):
    """Two processes, one event file and one set of rows."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint",
               "localhost:0", diffuser.__file__, *RUN, "--iterations", "4", "--use_tensorboard"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert len(list(folder.rglob("events.out.tfevents*"))) == 2              # the second one is of the hyperparameters
    assert [e.step for e in events(the_run(folder)).Scalars("loss")] == [2, 4]
