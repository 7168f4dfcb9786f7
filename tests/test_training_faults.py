"""What may happen to a run: kills, signals, full disks, broken files, second runs, divergence. Nothing made is lost."""

import contextlib
import copy
import csv
import dataclasses
import errno
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import prepared
import pytest
import torch
from conftest import (
    ROOT,
    SLOWLY,
    TINY_FLAGS,
    cli,
    heed_interrupts,
    same,
    small_file_system,
    tiny_training,
    trained_before,
)

import diffuser
from diffuser import Devices, Trainer, UserError, load_checkpoint, train
from diffuser_lib.metrics import MetricsFile

DIGITS = ["--mode", "train", "--dataset", "digits", "--batch_size", "16", "--timesteps", "50", "--log_every", "5",
          "--gradient_accumulation_steps", "2", "--dropout", "0.1", "--flip", "--num_workers", "2", *TINY_FLAGS]
TIMES = ("seconds", "images_per_second")                                     # columns that no two runs share


STARTED = []                                                                 # processes of the running test


@pytest.fixture(autouse=True)
def no_process_is_left():
    """A test that fails leaves no run behind that would slow down all others."""
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
    STARTED.clear()


def in_background(command, cwd, **more):
    """A process to be signalled."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_interrupts, **more)
    STARTED.append(process)
    return process


def start(flags, cwd):
    """The real command line in the background."""
    process = prepared.start(ROOT / "diffuser.py", *flags, cwd=cwd)
    STARTED.append(process)
    return process


def metrics(folder):
    """The rows of the newest metrics.csv, without what depends on the clock."""
    path = max(Path(folder).rglob("metrics.csv"), key=lambda p: p.stat().st_mtime)
    return [{k: v for k, v in row.items() if k not in TIMES and not k.startswith("machine/")} for row in csv.DictReader(open(path))]


def wait_for(condition, seconds=60):
    """Wait until it holds, or fail."""
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.01)


def logged(folder, rows):
    """Whether metrics.csv has so many rows by now."""
    return lambda: any(len(p.read_text().splitlines()) > rows for p in Path(folder).rglob("metrics.csv"))


def same_run(a, b):
    """Whether two checkpoints have equal weights, averages, optimizers, loss histories and sums."""
    a, b = load_checkpoint(a), load_checkpoint(b)
    parts = ("step", "model", "ema", "optimizer", "loss_history", "meter", "faults", "lr_schedule")
    return [part for part in parts if not same(a[part], b[part])] == []


def run_with_kills(flags, folder, kills, longest):
    """Run until it ends, killed `kills` times: at random moments, every second time after it has saved something."""
    def newest():
        return max((path.stat().st_mtime_ns for path in Path(folder).rglob("diffusion_checkpoint_*.pt")), default=0)

    moments = random.Random(0)
    for kill in range(kills):
        before, patience = newest(), longest
        process = start(flags, folder)
        if kill % 2:
            while newest() == before and process.poll() is None:
                time.sleep(0.005)
            patience = longest / 4
        time.sleep(moments.uniform(0, patience))
        process.kill()
        process.communicate()
    done = cli(*flags, cwd=folder, timeout=1200)
    assert done.returncode == 0, done.stderr


def compare_with_undisturbed(flags, tmp_path, kills, longest):
    """A killed run and an undisturbed one end alike, and metrics.csv has each step once."""
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    assert cli(*flags, cwd=tmp_path / "whole", timeout=1200).returncode == 0
    run_with_kills(flags, tmp_path / "killed", kills, longest)
    killed, whole = (next((tmp_path / name).rglob("diffusion_checkpoint_*.pt")) for name in ("killed", "whole"))
    assert same_run(killed, whole)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    steps = [int(row["step"]) for row in metrics(tmp_path / "killed")]
    assert steps == sorted(set(steps))
    assert [p.name for p in (tmp_path / "killed/checkpoints").iterdir() if p.suffix == ".tmp"] == []


def test_kills_leave_no_trace(tmp_path):
    """SIGKILL at random moments, in the middle of epochs, while loading and while saving: all ends bit for bit as
    undisturbed, with dropout, flips and accumulation."""
    compare_with_undisturbed([*DIGITS, "--iterations", "40", "--checkpoint_rate", "3"], tmp_path, kills=2, longest=1.2)


@pytest.mark.slow
def test_twenty_kills_on_mnist(real_data, tmp_path):
    """The same, twenty times, on real MNIST, with the settings of its preset but for the size of the network."""
    flags = ["--mode", "train", "--dataset", "mnist", "--data_dir", real_data, "--batch_size", "16", "--iterations", "150",
             "--checkpoint_rate", "10", "--log_every", "7", "--dropout", "0.1", "--flip", "--gradient_accumulation_steps", "2",
             "--base_channels", "32", "--channel_mults", "1,1", "--preview_steps", "2", "--num_generations", "1"]
    compare_with_undisturbed(flags, tmp_path, kills=20, longest=12)


def test_sigusr1_saves_and_goes_on(folder):
    """SIGUSR1 leads to a checkpoint and changes nothing else."""
    flags = [*DIGITS, "--iterations", "40", "--checkpoint_rate", "39", "--log_every", "2"]
    process = prepared.start("-c", SLOWLY, *flags, cwd=folder)
    STARTED.append(process)
    wait_for(logged(folder, 1))
    process.send_signal(signal.SIGUSR1)
    wait_for(lambda: list(folder.rglob("*.pt")))
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "as asked for by a signal" in out, errors
    assert diffuser.main([*flags, "--experiment_name", "whole"]) == 0
    assert same_run(next(folder.rglob("diffusion_checkpoint*.pt")), "checkpoints/whole/checkpoint_40/model.pt")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(folder, first):
    """While a step takes long the second signal does not wait for it, and the last good checkpoint stays."""
    path = trained_before()
    before = path.read_bytes()
    (folder / "slow.py").write_text(
        "import sys, time, diffuser\n"
        "sys.path.append(sys.argv[1])\n"
        "from conftest import tiny_training\n"
        "def slowly(run):\n    print('in a step', flush=True)\n    time.sleep(60)\n"
        "diffuser.Trainer.train_step = slowly\n"
        "diffuser.train(tiny_training(iterations=9))\n")
    ours, theirs = os.pipe()
    with open(theirs, "w") as stdout:
        process = prepared.background([folder / "slow.py", ROOT / "tests"], folder, stdout=stdout)
    STARTED.append(process)
    with open(ours) as lines:
        next(line for line in lines if "in a step" in line)
        process.send_signal(first)
        time.sleep(0.3)
        assert process.poll() is None                                        # the step goes on
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=5) == -signal.SIGINT and path.read_bytes() == before


def test_a_closed_terminal_saves(tmp_path):
    """SIGHUP saves and ends; output that nobody reads any more does not get in the way."""
    ours, theirs = os.pipe()
    with open(theirs, "w") as stdout, open(tmp_path / "errors", "w") as stderr:
        process = prepared.background([ROOT / "diffuser.py", *DIGITS, "--iterations", "100000", "--checkpoint_rate", "50"], tmp_path,
                                   stdout=stdout, stderr=stderr)
    STARTED.append(process)
    os.close(ours)
    wait_for(logged(tmp_path, 5))
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 129 and "saved" in (tmp_path / "errors").read_text()
    assert load_checkpoint(next(tmp_path.rglob("*.pt")))["step"] >= 25


# ---- disks -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes, or a skip."""
    with small_file_system(tmp_path / "checkpoints", "2m") as place:
        yield place


def test_a_full_disk_is_survived(small_disk, folder, capsys):
    """Full from the start: the run warns at each save and goes on, exits 1 at its end; what had been saved is untouched
    and with room again the same command goes on from there."""
    flags = [*DIGITS, "--checkpoint_rate", "5", "--iterations"]
    assert diffuser.main([*flags, "5"]) == 0
    path = next(small_disk.glob("*.pt"))
    before = path.read_bytes()
    with contextlib.suppress(OSError):
        (small_disk / "filler").write_bytes(b"x" * 2**21)
    assert diffuser.main([*flags, "20"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("No space left on device") == 3 and "could not be saved" in errors
    assert path.read_bytes() == before and [row["step"] for row in metrics(folder)] == ["5", "10", "15", "20"]
    (small_disk / "filler").unlink()
    assert diffuser.main([*flags, "20"]) == 0 and "at step 5 of 20" in capsys.readouterr().out
    assert load_checkpoint(path)["step"] == 20 and not list(small_disk.glob(".*.tmp"))


@pytest.mark.parametrize("experiment", ["", "e"])
def test_a_disk_that_fills_up_and_is_emptied(folder, monkeypatch, capsys, experiment):
    """A failed save is tried again at the next interval; the last one decides about the exit status."""
    real, fails = torch.save, [True, True, False, True]

    def save(state, file):
        real(state, file)
        if fails.pop(0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(torch, "save", save)
    cfg = tiny_training(iterations=8, checkpoint_rate=2, experiment_name=experiment, num_keep_checkpoints=2)
    with pytest.raises(UserError, match="last checkpoint") as error:
        train(cfg)
    assert error.value.code == 1 and capsys.readouterr().err.count("No space left") == 3
    kept = diffuser.kept_checkpoints(cfg)
    assert [load_checkpoint(p)["step"] for p in kept] == [6]
    monkeypatch.undo()
    os.chdir(folder)
    assert load_checkpoint(train(cfg))["step"] == 8


def test_metrics_and_grids_on_a_full_disk(folder, monkeypatch, capsys):
    """Rows that could not be written are written when there is room; a grid that cannot is left out."""
    real_grid, full = diffuser.save_grid, [False]

    def grid(*arguments):
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_grid(*arguments)

    def fill_up(name):
        real = getattr(MetricsFile, name)

        def write(file):
            full[0] = 4 <= int(file.rows[-1]["step"]) <= 8
            if full[0]:
                file.file = None
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(file)
        monkeypatch.setattr(MetricsFile, name, write)

    fill_up("write_all"), fill_up("write_last")
    monkeypatch.setattr(diffuser, "save_grid", grid)
    train(tiny_training(iterations=12, checkpoint_rate=6))
    assert [row["step"] for row in metrics(folder)] == ["2", "4", "6", "8", "10", "12"]
    assert len(list(folder.rglob("epoch_*.png"))) == 1 and capsys.readouterr().err.count("No space left") == 4


def test_a_file_in_the_place_of_an_experiment_is_told_at_once(folder, capsys):
    """Before any work, not when the first checkpoint is to be written."""
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "taken").write_text("")
    assert diffuser.main([*DIGITS, "--iterations", "1", "--experiment_name", "taken"]) == 2
    assert "--experiment_name" in capsys.readouterr().err and not list(folder.rglob("metrics.csv"))


def test_a_config_json_of_rubbish_is_no_obstacle(folder):
    """What stands in a run's config.json does not keep it from going on."""
    trained_before()
    next(folder.rglob("config.json")).write_text("[" * 100_000)
    assert load_checkpoint(train(tiny_training(iterations=6)))["step"] == 6


def test_a_place_that_cannot_be_written_is_told_at_once(folder, capsys):
    """A file where a folder should be: one line that names the flag, exit 2, before any work."""
    (folder / "taken").write_text("")
    for flag in ("--working_directory", "--generated_directory"):
        assert diffuser.main([*DIGITS, "--iterations", "1", flag, "taken/x"]) == 2
        out, errors = capsys.readouterr()
        assert flag in errors and len(errors.splitlines()) == 1 and "device" not in out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_warnings_on_a_full_disk(folder):
    """Where stderr itself is a file on the disk that is full the run goes on."""
    flags = [*DIGITS, "--iterations", "10", "--checkpoint_rate", "5"]
    (folder / "checkpoints").mkdir()
    program = "import sys, torch, diffuser\ndef full(*a): raise OSError(28, 'full')\ntorch.save = full\nsys.exit(diffuser.main(sys.argv[1:]))"
    with open("/dev/full", "w") as full, open("printed", "w") as printed:
        process = prepared.background(["-c", program, *flags], folder, stdout=printed, stderr=full)
    assert process.wait(timeout=60) == 1 and "step 10: loss" in (folder / "printed").read_text()





# ---- two runs ----------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_a_dead_one_is_no_obstacle(folder):
    """Two runs that would write the same checkpoint, or the same samples: the second names the first. Killed, that one
    leaves nothing in the way."""
    flags = [*DIGITS, "--iterations", "1000000", "--checkpoint_rate", "20"]
    first = start(flags, folder)
    wait_for(lambda: list(folder.rglob("*.pt")))
    others = start(flags, folder), start([*flags, "--working_directory", "elsewhere"], folder)
    for other in others:
        _, errors = other.communicate(timeout=60)
        assert other.returncode == 2 and f"process {first.pid}" in errors and "Traceback" not in errors
    assert diffuser.main([*flags[:-3], "2", "--experiment_name", "other"]) == 0
    first.kill()
    first.communicate()
    path = next(folder.rglob("diffusion_checkpoint*.pt"))
    further = load_checkpoint(path)["step"] + 1
    assert diffuser.main([*flags[:-3], str(further)]) == 0 and load_checkpoint(path)["step"] == further


# ---- divergence --------------------------------------------------------------------------------


def spoil(monkeypatch, spoils):
    """Make a step's loss infinite, or many times as large, where spoils(run) says so."""
    real = Trainer.batch

    def batch(run):
        x0, t, eps, y, noise = real(run)
        return [x0, t, eps * spoils(run), y, noise]
    monkeypatch.setattr(Trainer, "batch", batch)


@pytest.mark.parametrize("fused, optimizer, loss_fn", [
    (True, "adamw", "mse"), (False, "adamw", "mse"), (True, "muon", "mse"), (False, "muon", "mse"),
    (True, "adamw", "mae"), (False, "muon", "mae")])                         # the gradient of mae stays finite
def test_a_step_that_is_not_finite_is_skipped_and_counted(folder, monkeypatch, capsys, loss_fn, fused, optimizer):
    """Its weights and moments stay as they are, its loss is in no mean, metrics.csv counts it; others are taken."""
    spoil(monkeypatch, lambda run: math.inf if run.step in (3, 5) else 1.0)
    cfg = tiny_training(iterations=8, loss_fn=loss_fn, log_every=2, weight_decay=0.1, optimizer=optimizer)
    run = Trainer(cfg, Devices(cfg))
    run.optimizer.defaults["fused"] = fused                                  # without, as on MPS
    for group in run.optimizer.param_groups:
        group["fused"] = fused
    for step in range(8):
        before = copy.deepcopy(run.network.state_dict()), copy.deepcopy(run.optimizer.state_dict()["state"])
        run.train_step()
        unchanged = same(before[0], run.network.state_dict())
        assert unchanged == (step in (3, 5)), step
        if unchanged:
            assert same(before[1], run.optimizer.state_dict()["state"])
    assert run.progress.nonfinite_steps.tolist() == [0, 1, 2] and run.progress.loss_sums.isfinite().all() and int(run.progress.loss_sums[0, :, 1].sum()) == 6 * 16
    train(cfg)
    rows = metrics(folder)
    assert [row["skipped_steps"] for row in rows] == ["0", "1", "2", "2"] and all(float(r["loss"]) > 0 for r in rows)


def test_a_run_that_diverges_goes_back_and_slows_down(folder, monkeypatch, capsys):
    """Ten steps in a row that are not finite: back to the last good checkpoint with half the learning rate, and on."""
    spoil(monkeypatch, lambda run: math.nan if run.step >= 12 and not run.progress.lr_halvings else 1.0)
    cfg = tiny_training(iterations=30, checkpoint_rate=10, log_every=5, lr_schedule="constant", warmup_steps=0)
    path = train(cfg)
    out = capsys.readouterr().out
    assert "not finite in" in out and "going on from step 10 with 0.5 times the learning rate" in out
    rows = metrics(folder)
    assert [int(r["step"]) for r in rows] == [5, 10, 15, 20, 25, 30]
    assert [float(r["lr"]) / cfg.learning_rate for r in rows] == pytest.approx([1, 1, *[0.5] * 4])
    state = load_checkpoint(path)
    assert state["slowed"] == 1 and all(v.isfinite().all() for v in state["model"].values())
    assert Trainer(cfg, Devices(cfg), state).lr_schedule.get_last_lr()[0] == cfg.learning_rate / 2
    faster = dataclasses.replace(cfg, learning_rate=3e-5)                    # asked for anew: as it is
    assert Trainer(faster, Devices(cfg), state).lr_schedule.get_last_lr()[0] == 3e-5


def test_a_checkpoint_between_rows_is_judged_by_its_own_losses(folder):
    """Losses since the last row that are far above the range keep a checkpoint from being gone back to."""
    run = Trainer(tiny_training(), Devices(tiny_training()))
    run.progress.step = 31
    run.progress.loss_history = [[step, 1.0] for step in range(1, 31)]
    assert run.state()["good"]
    run.progress.loss_sums[0, 0] = torch.tensor([16 * 1.2, 16.0])
    assert run.state()["good"]
    run.progress.loss_sums[0, 0] = torch.tensor([16 * 9.0, 16.0])
    assert not run.state()["good"]


def test_going_back_stays_on_its_branch(folder, monkeypatch, capsys):
    """Resumed from an earlier checkpoint, a run that diverges goes back to that one, not ahead to a later one."""
    cfg = tiny_training(iterations=30, checkpoint_rate=10, num_keep_checkpoints=9, experiment_name="e", log_every=5)
    train(cfg)
    spoil(monkeypatch, lambda run: math.nan if run.step >= 12 and not run.progress.lr_halvings else 1.0)
    train(dataclasses.replace(cfg, resume_from_checkpoint="checkpoint_10"))
    assert "going on from step 10 with" in capsys.readouterr().out


def test_before_the_first_checkpoint_it_begins_again(folder, monkeypatch, capsys):
    """Nothing to go back to: from the first weights, like a run with half the learning rate."""
    spoil(monkeypatch, lambda run: math.inf if run.step >= 2 and not run.progress.lr_halvings and run.cfg.learning_rate == 1e-3 else 1.0)
    again = train(tiny_training(iterations=20, experiment_name="again", learning_rate=1e-3, log_every=5))
    assert "going on from step 0 with 0.5 times" in capsys.readouterr().out
    slow = train(tiny_training(iterations=20, experiment_name="slow", learning_rate=5e-4, log_every=5))
    a, b = load_checkpoint(again), load_checkpoint(slow)
    assert all(same(a[part], b[part]) for part in ("model", "ema", "optimizer", "loss_history"))


def test_a_hopeless_run_gives_up(folder, monkeypatch, capsys):
    """After three times it ends with status 1 and one message; the good checkpoint is as it was."""
    spoil(monkeypatch, lambda run: math.nan if run.step >= 5 else 1.0)
    flags = ["--mode", "train", "--dataset", "digits", "--iterations", "40", "--checkpoint_rate", "4", "--log_every", "2",
             "--batch_size", "16", "--timesteps", "20", *TINY_FLAGS]
    assert diffuser.main(flags) == 1
    out, errors = capsys.readouterr()
    assert "diverged for the fourth time" in errors and "--learning_rate" in errors and out.count("going on from step 4") == 3
    states = map(load_checkpoint, folder.rglob("*.pt"))                      # one was made amid skipped steps
    assert sorted((state["step"], state["good"]) for state in states) == [(4, True), (12, False)]


@pytest.mark.parametrize("checkpoints", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_loss_that_leaves_its_range_for_long(folder, monkeypatch, capsys, checkpoints):
    """A spike is let pass; ten rows far above their range lead back to a checkpoint from before, though others have been
    saved since."""
    spoil(monkeypatch, lambda run: 10.0 if run.step in (24, 25) or (run.step >= 36 and not run.progress.lr_halvings) else 1.0)
    cfg = tiny_training(iterations=60, checkpoint_rate=6, log_every=1, num_keep_checkpoints=checkpoints, timesteps=100)
    path = train(cfg)
    out = capsys.readouterr().out
    assert out.count("far above its range") == 1 and "going on from step 36 with" in out
    assert load_checkpoint(path)["step"] == 60 and len(diffuser.kept_checkpoints(cfg)) == checkpoints
    steps = [int(row["step"]) for row in metrics(folder)]
    assert steps == list(range(1, 61))


def test_another_loss_is_no_divergence(folder, capsys):
    """Resumed with another loss function, whose numbers are larger, a run goes on."""
    train(tiny_training(iterations=25, log_every=1, loss_fn="mse"))
    path = train(tiny_training(iterations=40, log_every=1, loss_fn="huber", label_dropout=0.5))
    assert "going on from step" not in capsys.readouterr().out and load_checkpoint(path)["range_since"] == 25


def test_skips_of_the_gradient_scaler_are_no_faults(folder):
    """In fp16 an overflowing gradient lowers the scale and skips the step, uncounted; a loss that is nan counts."""
    cfg = tiny_training()
    run = Trainer(cfg, Devices(cfg))
    run.scaler, real = torch.amp.GradScaler("cpu", init_scale=2.0**127, enabled=True), run.batch
    before = copy.deepcopy(run.network.state_dict())
    run.batch = lambda: [v * 1e4 if i == 2 else v for i, v in enumerate(real())]
    run.train_step()
    run.batch = real
    assert same(before, run.network.state_dict()) and run.progress.nonfinite_steps.tolist() == [0, 0, 0]
    assert run.scaler.get_scale() == 2.0**126 and int(run.progress.loss_sums[0, :, 1].sum()) == 16
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=True)
    run.train_step()
    assert not same(before, run.network.state_dict())
    before = copy.deepcopy(run.network.state_dict())
    run.batch = lambda: [v * math.nan if i == 2 else v for i, v in enumerate(real())]
    run.train_step()
    assert same(before, run.network.state_dict()) and run.progress.nonfinite_steps.tolist() == [1, 1, 1]


# ---- processes ---------------------------------------------------------------------------------


def torchrun(flags, cwd, *options):
    """Two processes under torchrun, in the background."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", "localhost:0", *options, str(ROOT / "diffuser.py"), *map(str, flags)]
    return in_background(command, cwd, env={**os.environ, "OMP_NUM_THREADS": "1"})


def ranks(pid):
    """{rank: process id} of the workers below a torchrun process."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == pid:
                environment = dict(line.split("=", 1) for line in (entry / "environ").read_text().split("\0") if "=" in line)
                found[int(environment["RANK"])] = int(entry.name)
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")


def kill_a_rank(flags, cwd, victim):
    """Kill a rank once there is a checkpoint; the restarted run's checkpoint, after the checks of what it said."""
    process = torchrun(flags, cwd, "--max-restarts", "1")
    path = Path(cwd, "checkpoints/diffusion_checkpoint_digits_50_8_attention.pt")
    wait_for(path.exists)
    os.kill(ranks(process.pid)[victim], signal.SIGKILL)
    begun = time.perf_counter()
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and time.perf_counter() - begun < 60, errors[-3000:]
    assert "resuming" in out and errors.count("diffuser:") == 1 and "another process has gone" in errors
    return path


def test_a_dead_rank_ends_the_others(tmp_path):
    """Killed, a rank takes the other down in well under a minute with one message, and the same processes, started again,
    go on from the last checkpoint to the end."""
    flags = [*DIGITS, "--iterations", "40", "--checkpoint_rate", "10"]
    processes = prepared.start_ranks(2, ROOT / "diffuser.py", *flags, cwd=tmp_path)
    STARTED.extend(processes)
    path = tmp_path / "checkpoints/diffusion_checkpoint_digits_50_8_attention.pt"
    wait_for(path.exists)
    processes[1].kill()
    begun = time.perf_counter()
    status, _, errors = prepared.result_of(processes, timeout=100)
    assert status != 0 and time.perf_counter() - begun < 60
    assert errors.count("diffuser:") == 1 and "another process has gone" in errors, errors[-3000:]
    status, out, errors = prepared.run_two(ROOT / "diffuser.py", *flags, cwd=tmp_path)
    assert status == 0 and "resuming" in out and load_checkpoint(path)["step"] == 40, errors[-3000:]


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_restarted_run_ends_as_undisturbed(tmp_path, victim):
    """The same under torchrun, with either rank: --max-restarts goes on from the last checkpoint, and ends bit for bit as
    two processes that nobody killed."""
    flags = [*DIGITS, "--iterations", "150", "--checkpoint_rate", "30"]
    whole = torchrun([*flags, "--experiment_name", "whole"], tmp_path)
    _, errors = whole.communicate(timeout=200)
    assert whole.returncode == 0, errors[-2000:]
    assert same_run(kill_a_rank(flags, tmp_path, victim), tmp_path / "checkpoints/whole/checkpoint_150/model.pt")


def test_an_error_of_all_processes_is_told_once(tmp_path, monkeypatch, capsys):
    """Bad flags, and an error that every process meets later on, are one message, not one from each."""
    status, _, errors = prepared.run_two(ROOT / "diffuser.py", *DIGITS[:4], "--batch_size", "1", "--iterations", "2", *TINY_FLAGS,
                                         cwd=tmp_path)
    assert status != 0 and errors.count("diffuser:") == 1 and "too small for 2 processes" in errors, errors[-2000:]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, words in (("0", "--epochs"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert diffuser.main([*DIGITS, "--epochs", "0"]) != 0
        errors = capsys.readouterr().err
        assert words in errors and bool(errors) == bool(words)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_batch(folder):
    """One process, then two, then one: the same batches of the same size, and the weights of an undisturbed run up to
    rounding."""
    flags = [*DIGITS, "--precision", "fp32", "--dropout", "0", "--lr_schedule", "constant", "--warmup_steps", "0",
             "--checkpoint_rate", "10", "--iterations"]
    assert diffuser.main([*flags, "30", "--experiment_name", "whole"]) == 0
    assert diffuser.main([*flags, "10", "--experiment_name", "mixed"]) == 0
    process = torchrun([*flags, 20, "--experiment_name", "mixed"], folder)
    out, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and "10 of 20" in out, errors[-2000:]
    assert diffuser.main([*flags, "30", "--experiment_name", "mixed"]) == 0
    one, mixed = (load_checkpoint(f"checkpoints/{name}/checkpoint_30/model.pt") for name in ("whole", "mixed"))
    difference = sum((one["model"][k] - mixed["model"][k]).abs().sum() for k in one["model"])
    assert difference / sum(v.abs().sum() for v in one["model"].values()) < 1e-3


@needs_proc
def test_ctrl_c_under_torchrun_saves(tmp_path):
    """Workers get the signal from the terminal and again from torchrun: they save all the same."""
    process = torchrun([*DIGITS, "--iterations", "100000", "--checkpoint_rate", "100000"], tmp_path)
    wait_for(logged(tmp_path, 2))
    for pid in (*ranks(process.pid).values(), process.pid):
        os.kill(pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.count("interrupted: saved") == 1, errors[-3000:]
    assert load_checkpoint(next(tmp_path.rglob("*.pt")))["step"] >= 10
