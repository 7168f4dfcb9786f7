"""What a run reports: metrics.csv and config.json in its folder, TensorBoard, Weights & Biases.

MetricsFile         metrics.csv: a row per log, no step twice, half-written rows dropped, whatever the disk does
MetricsLogger       that file, config.json and the trackers of a run, behind one object
TensorBoard, WeightsAndBiases       trackers: log(step, {name: number or Path of a picture}), finish({name: number})
machine_load        what the machine is doing

Needs torch; tensorboard, wandb, psutil and nvidia-ml-py where they are asked for. A tracker never stops a run: any
error of one is told, and the run goes on without it. Keys are the libraries' own affair (wandb login).
"""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffuser_lib.files import first_line, warn, warn_on_oserror, write_atomically, write_json

# ---- metrics.csv -------------------------------------------------------------------------------


class MetricsFile:
    """metrics.csv. Rows that cannot be written are kept, and written when there is room.

    step: where the run goes on; rows after it are forgotten, and at 0 all of them. The columns are those of the file,
    then those of the first row that has others.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.columns: list[str] = []
        self.rows: list[dict[str, str]] = []
        self.file = None                                         # None while it cannot be written
        if step:
            with suppress(OSError, ValueError, csv.Error):       # spoilt by a power cut
                self.read()
            self.rewind(step)

    def read(self) -> None:
        """Take over the whole rows of an earlier part of the run."""
        text = self.path.read_text()
        whole = text[: text.rfind("\n") + 1]                     # a row without its end may lack digits
        reader = csv.DictReader(whole.splitlines())
        if "step" not in (reader.fieldnames or []):              # no table of ours
            return
        self.columns = list(reader.fieldnames)
        for row in reader:
            complete = None not in row and None not in row.values()
            if complete and re.fullmatch("[0-9]{1,15}", row["step"]):
                self.rows.append(row)

    def rewind(self, step: int) -> None:
        """Forget the rows after a step, which are trained again."""
        self.rows = [row for row in self.rows if int(row["step"]) <= step]
        if self.columns:
            warn_on_oserror(str(self.path), self.write_all)

    def add(self, values: dict[str, object]) -> None:
        """Add a row; `values` has a step."""
        self.rows.append({name: str(value) for name, value in values.items()})
        new = [name for name in values if name not in self.columns]
        self.columns += new
        can_append = self.file is not None and not new
        warn_on_oserror(str(self.path), self.write_last if can_append else self.write_all)

    def line(self, row: dict[str, str]) -> str:
        """A row as it stands in the file."""
        return ",".join(row.get(column, "") for column in self.columns) + "\n"

    def write_all(self) -> None:
        """Write the file anew and go on at its end. Raises OSError."""
        self.close_file()
        header = ",".join(self.columns) + "\n"
        text = header + "".join(self.line(row) for row in self.rows)
        write_atomically(self.path, lambda file: file.write(text.encode()))
        self.file = open(self.path, "ab", buffering=0)           # noqa: SIM115 (open for the whole run)

    def write_last(self) -> None:
        """Add the last row to the file. Raises OSError, and then the next row writes all."""
        line = self.line(self.rows[-1]).encode()
        file = self.file
        self.file = None
        with_room = file.write(line) == len(line)
        if not with_room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.file = file

    def final(self) -> dict[str, float]:
        """The last number of each column."""
        numbers = {}
        for row in self.rows:
            for name, value in row.items():
                with suppress(ValueError):                       # empty, or spoilt
                    numbers[name] = float(value)
        return numbers

    def close(self) -> None:
        """The file's end, with a last attempt at rows that could not be written."""
        if self.file is None and self.rows:
            warn_on_oserror(str(self.path), self.write_all)
        self.close_file()

    def close_file(self) -> None:
        """Write no more, for now."""
        if self.file is not None:
            self.file.close()
            self.file = None


# ---- Trackers ----------------------------------------------------------------------------------


class TensorBoard:
    """Event files in the folder's tensorboard/. config: the run's options; step: where the run goes on."""

    def __init__(self, folder: Path, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.config = config
        again = step + 1 if step else None                       # what is trained again is shown once
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=again)

    def log(self, step: int, values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, Path):
                with Image.open(value, formats=("PNG",)) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
                self.writer.add_image(name, pixels, step, dataformats="HWC")
            else:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, final: dict) -> None:
        options = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                   for name, value in self.config.items()}
        metrics = {f"final/{name}": value for name, value in final.items()}
        self.writer.add_hparams(options, metrics, run_name=".")
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases under an id of our own, so that a resumed run is one run there.

    name, project: as shown there; mode: online, offline, or auto: WANDB_MODE, else online where a key is known. An
    offline run stays in the folder's wandb/ until `wandb sync`.
    """

    def __init__(self, folder: Path, config: dict, run_id: str, name: str, project: str, mode: str):
        import wandb

        if mode == "auto":
            mode = os.environ.get("WANDB_MODE", "")
        if not mode and not wandb.login(prompt=False):           # nobody may be there to answer
            mode = "offline"
            warn("wandb: no key is known (wandb login): the run is kept for `wandb sync`")

        self.picture = wandb.Image
        self.run = wandb.init(
            project=project, name=name, id=run_id, resume="allow", config=config, mode=mode or None,
            dir=str(folder.absolute()),                          # its service may stand in another folder
            settings=wandb.Settings(console="off", silent=True))                 # it would keep all that is printed
        self.run.define_metric("step")                           # its own count of steps never goes back
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict) -> None:
        row = {name: self.picture(str(value)) if isinstance(value, Path) else value for name, value in values.items()}
        self.run.log({"step": step, **row})

    def finish(self, final: dict) -> None:
        self.run.summary.update({f"final/{name}": value for name, value in final.items()})
        self.run.finish()                                        # does not wait for the file to be written
        if self.run.offline:
            await_end(Path(self.run.settings.sync_file))


def await_end(path: Path, patience: float = 60.0) -> None:
    """Wait until a .wandb file holds the end of its run. patience: seconds. Raises TimeoutError.

    The library's service writes the file, and does so after the library has said that the run is finished.
    """
    deadline = time.monotonic() + patience
    while not holds_end(path):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no end of the run in {path}")
        time.sleep(0.01)


BLOCK = 2**15                                                    # bytes; a .wandb file is made of them
PIECE = struct.Struct("<IHB")                                    # head of a piece of a record: checksum, length, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4                          # kinds


def holds_end(path: Path) -> bool:
    """Whether the record of a run's end is in the last two blocks of a .wandb file.

    The file begins with seven bytes of its own. Blocks hold pieces of protocol buffers (LevelDB's log format).
    """
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    with suppress(OSError, DecodeError), path.open("rb") as file:                # not there yet, or written by half
        start = max(0, path.stat().st_size // BLOCK - 1) * BLOCK
        file.seek(start)
        content = file.read()
        place = 0 if start else 7
        record = None                                            # None: its first piece is further ahead
        while place + PIECE.size <= len(content):
            _, length, kind = PIECE.unpack_from(content, place)
            place += PIECE.size
            piece = content[place : place + length]
            place += length
            if kind in (WHOLE, FIRST):
                record = piece
            elif record is not None:
                record += piece
            if kind in (WHOLE, LAST) and record is not None and Record.FromString(record).HasField("exit"):
                return True

            room = -place % BLOCK                                # of the block
            if room < PIECE.size:
                place += room
    return False


def machine_load() -> dict[str, float]:
    """What the machine is doing, as far as it can be read: percent of all CPUs and of the GPU, GiB of memory that this
    process holds on both. psutil and nvidia-ml-py are optional."""
    load = {}
    with suppress(Exception):                                    # not there, or kept from looking
        import psutil

        load["machine/cpu_percent"] = psutil.cpu_percent()       # since the call before
        load["machine/memory_gib"] = psutil.Process().memory_info().rss / 2**30
    if torch.cuda.is_available():
        load["machine/gpu_memory_gib"] = torch.cuda.memory_reserved() / 2**30
        with suppress(Exception):                                # no nvidia-ml-py, or a driver without it
            load["machine/gpu_percent"] = float(torch.cuda.utilization())
    elif torch.backends.mps.is_available():
        load["machine/gpu_memory_gib"] = torch.mps.driver_allocated_memory() / 2**30
    return load


# ---- Both --------------------------------------------------------------------------------------


class MetricsLogger:
    """metrics.csv, config.json and the trackers of a run, for rank 0.

    folder: the run's; config: its options; step: where it goes on; machine: what it runs on, for people; facts: what
    else config.json says of the run.
    """

    def __init__(self, folder: Path, config: dict, step: int, machine: dict[str, str], facts: dict | None = None):
        self.folder = folder
        self.csv = MetricsFile(folder / "metrics.csv", step)
        self.about = folder / "config.json"
        self.machine = machine
        self.facts = facts or {}
        self.trackers: dict[str, TensorBoard | WeightsAndBiases] = {}

        self.start_time = time.perf_counter()
        self.run_id = os.urandom(8).hex()
        if step:
            # It may be written by other hands, or by half.
            with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
                known = json.loads(self.about.read_text())
                self.run_id = str(known["run_id"])               # trackers go on under it
                self.start_time -= float(known["seconds"])
        self.write_config(config)
        machine_load()                                           # percents count from here

    def start_tracker(self, name: str, start: Callable[[], TensorBoard | WeightsAndBiases]) -> None:
        """Add the tracker that start() makes; one that cannot start is told, and the run goes on without it."""
        try:
            self.trackers[name] = start()
        except Exception as error:
            hint = f"pip install {name}" if isinstance(error, ImportError) else first_line(error)
            warn(f"no {name}: {hint}; training goes on without it")

    def write_config(self, config: dict) -> None:
        """config.json: what repeats the run, what it ran on, and for how long so far."""
        content = dict(self.facts, config=config, torch=torch.__version__, run_id=self.run_id, machine=self.machine,
                       seconds=round(time.perf_counter() - self.start_time, 1))
        warn_on_oserror(str(self.about), lambda: write_json(self.about, content))

    def log(self, values: dict[str, object]) -> None:
        """A row of metrics.csv, and the same numbers to the trackers. values: step and others, "" for none.

        What the machine is doing comes behind them.
        """
        load = {name: float(f"{value:.4g}") for name, value in machine_load().items()}
        row = {**values, **load}
        self.csv.add(row)
        if self.trackers:
            numbers = {name: value for name, value in row.items() if name != "step" and value != ""}
            self.track(values["step"], numbers)

    def track(self, step: int, values: dict) -> None:
        """Numbers and pictures (paths) to the trackers alone."""
        self.each_tracker(lambda tracker: tracker.log(step, values))

    def each_tracker(self, work: Callable) -> None:
        """work(tracker) for each. One that fails is dropped."""
        for name, tracker in list(self.trackers.items()):
            try:
                work(tracker)
            except Exception as error:
                warn(f"{name} failed ({first_line(error)}): going on without it")
                del self.trackers[name]

    def rewind(self, step: int) -> None:
        """Forget the rows after a step."""
        self.csv.rewind(step)

    def close(self, config: dict, facts: dict | None = None) -> None:
        """Write the configuration and the facts as they ended, and let go of trackers and files."""
        if facts is not None:
            self.facts = facts
        self.write_config(config)
        if self.trackers:
            # The load of the machine at the last row is no result of the run.
            final = {name: value for name, value in self.csv.final().items() if not name.startswith("machine/")}
            self.each_tracker(lambda tracker: tracker.finish(final))
        self.csv.close()
