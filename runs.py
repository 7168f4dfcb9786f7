"""Training runs on this machine: what there is, starting one, watching, stopping, comparing, deleting.

Runs        a run is known by its folder of samples; whether it goes on, by the lock on that folder
Starting    the ordinary command as a process of its own, which outlives the one that started it
Uploads     pictures from elsewhere, put where training finds them
Comparing   a table and the curves of several runs
Deleting    all that is a run's

For app.py; it shows nothing itself.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import diffuser
from diffuser_lib.files import UserError, first_line, lock_holder, printable, read_json_object, unused_path
from diffuser_lib.images import ImageFiles, open_image
from plot_loss import find_grids, load_run, number, plot, read_metrics

ROOT = Path(__file__).resolve().parent

MOST_UPLOADED = 20_000                                           # pictures of one upload


@dataclass(frozen=True)
class Places:
    """Where runs put what they make, and where datasets are."""

    checkpoints: Path = Path("checkpoints")
    samples: Path = Path("samples")
    data: Path = Path("data")

    def options(self) -> dict:
        """As options of diffuser.py."""
        return dict(working_directory=str(self.checkpoints), generated_directory=str(self.samples),
                    data_dir=str(self.data))


# ---- Runs --------------------------------------------------------------------------------------

# Processes that were started here, by the keys of their runs: until a run has its lock, only they know of it.
CHILDREN: dict[str, subprocess.Popen] = {}
ASKED: dict[str, int] = {}                                       # to stop: a second signal would end it without saving
STARTING = threading.Lock()
STOPPING = threading.Lock()
NAME_ENDING = re.compile(rf"_({'|'.join(diffuser.SCHEDULES)})_\d+_\d+_(no)?attention$")


@dataclass(frozen=True)
class Run:
    """A training run as its folder shows it.

    cfg: None where it is not written yet, or broken; images: how many it trains on; rows: those of metrics.csv; grids:
    of samples, the oldest first; process: what trains it, 0 on another machine, None if nobody does.
    """

    folder: Path
    cfg: diffuser.Config | None
    images: int
    rows: list[dict]
    grids: list[Path]
    process: int | None

    @property
    def key(self) -> str:
        return self.folder.name

    @property
    def name(self) -> str:
        """What it is called: its experiment or its dataset, as its folder's name begins."""
        return NAME_ENDING.sub("", self.folder.name.removeprefix("samples_"))

    @property
    def step(self) -> int:
        step = number(self.rows[-1].get("step")) if self.rows else 0.0
        return int(step) if 0 <= step < 2**53 else 0             # nan is not

    @property
    def total(self) -> int:
        """Steps in all, 0 where that is not known."""
        if self.cfg is None or self.images < 1:
            return 0
        steps, _, _ = diffuser.training_length(self.cfg, self.images)
        return steps

    @property
    def status(self) -> str:
        if self.process is not None:
            return "training" if self.rows else "starting"
        done = self.step >= self.total if self.total else (self.folder / "report.html").exists()
        return "finished" if done else "stopped"

    @property
    def seconds_left(self) -> float:
        """What it still takes, by its last rows; 0 where they do not say."""
        rows = self.rows[-6:]
        if len(rows) < 2 or self.total <= self.step:
            return 0.0
        steps = number(rows[-1].get("step")) - number(rows[0].get("step"))
        seconds = sum(number(row.get("seconds")) for row in rows[1:])
        if not (steps > 0 and seconds > 0):                      # nan is neither
            return 0.0
        return (self.total - self.step) * seconds / steps


def log_path(folder: Path) -> Path:
    """What the process of a run says: beside its folder, which makes room for another run's when that begins."""
    return folder.with_name(f".{folder.name}.log")


def process_of(folder: Path) -> int | None:
    """The process that trains the run of a folder: None if nobody does, 0 for one of another machine."""
    child = CHILDREN.get(folder.name)
    if child and child.poll() is None:
        return child.pid
    return lock_holder(folder)


def read_run(places: Places, folder: Path) -> Run:
    """All that there is of a run; what is missing or broken is left out."""
    cfg = None
    images = 0
    path = folder / "config.json"
    with suppress(UserError, OSError, ValueError):
        cfg = dataclasses.replace(diffuser.configure(config=str(path)), **places.options())
        count = read_json_object(path).get("images")
        if isinstance(count, int):
            images = count

    grids = []
    with suppress(OSError):
        grids = [folder / match[0] for match in find_grids(folder)]
    return Run(folder, cfg, images, read_metrics(folder), grids, process_of(folder))


def list_folders(places: Places) -> set[Path]:
    """The folders of all runs."""
    folders = {path for path in places.samples.glob("samples_*") if (path / "config.json").is_file()}
    for log in places.samples.glob(".samples_*.log"):            # it may have just begun
        folders.add(log.with_name(log.name[1:].removesuffix(".log")))
    return folders


def read_runs(places: Places) -> list[Run]:
    """All runs: first those that are training; within each group, the one that wrote last comes first."""
    folders = sorted(list_folders(places), key=last_change, reverse=True)
    found = [read_run(places, folder) for folder in folders]
    found.sort(key=lambda run: run.process is None)
    return found


def titles(runs: list[Run]) -> list[str]:
    """What runs are called: by their names, those that are alike by their folders'."""
    names = [run.name for run in runs]
    return [run.key.removeprefix("samples_") if names.count(run.name) > 1 else run.name for run in runs]


def last_change(folder: Path) -> float:
    """When a run has last written anything, in seconds; 0 for never."""
    times = [0.0]
    for path in (folder / "metrics.csv", folder / "config.json", log_path(folder)):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def find_run(places: Places, key: str | None) -> Run:
    """The run of that key. Raises UserError."""
    for folder in list_folders(places):
        if folder.name == key:
            return read_run(places, folder)
    raise UserError("this run is gone: choose another one")


def last_words(run: Run, lines: int = 12) -> str:
    """The last lines that the process of a run has said, harmless to show; empty where there are none."""
    path = log_path(run.folder)
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 2**14))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return printable("\n".join(text.splitlines()[-lines:]))


# ---- Starting and stopping ---------------------------------------------------------------------


def to_words(options: dict) -> list[str]:
    """Options as on a command line, but for those that are empty."""
    words = []
    for name, value in options.items():
        if value != "":
            words += [f"--{name}", diffuser.format_value(name, value)]
    return words


def parse_words(words: list[str]) -> dict:
    """The options on a command line, whatever their spelling. Raises UserError."""
    try:
        options = diffuser.build_parser().parse_args(words)
    except SystemExit:
        raise UserError("--help is for the command line: python diffuser.py --help all") from None
    return diffuser.translate_flags(vars(options), diffuser.parse_value)


def check_words(words: list[str]) -> diffuser.Config:
    """The settings that a command line stands for. Raises UserError."""
    return diffuser.complete(diffuser.requested(parse_words(words)))


# Options that are settled elsewhere or reach beyond this machine, beside all that name files.
SETTLED = {"mode", "experiment_name", "dataset", "yes", "check", "dry_run", "debug", "use_wandb", "wandb_mode",
           "project_name"}


def parse_further(text: str) -> list[str]:
    """Options as on a command line from somebody's text; those that name files are refused. Raises UserError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"other options: {first_line(error)}") from error
    for name in parse_words(words):
        if name in diffuser.PATHS | SETTLED:
            raise UserError(f"--{name} is not taken here: use the other fields, or the command line")
    return words


def start_run(words: list[str]) -> str:
    """Start the command with these options; returns the key of its run. Raises UserError."""
    return launch(words, diffuser.samples_path(check_words(words)))


def launch(words: list[str], folder: Path) -> str:
    """Start the command, whose run has that folder; returns the run's key. Raises UserError."""
    log = log_path(folder)
    with STARTING:
        if process_of(folder) is not None:
            raise UserError(f"{folder.name} is training already: give this run another name")
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "wb") as file:
                file.write(f"{shlex.join(['python', 'diffuser.py', *words])}\n".encode())
                file.flush()
                child = subprocess.Popen([sys.executable, str(ROOT / "diffuser.py"), *words], stdin=subprocess.DEVNULL,
                                         stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        except OSError as error:
            raise UserError(f"training could not be started: {error.strerror}") from error
        CHILDREN[folder.name] = child
        ASKED.pop(folder.name, None)

    with suppress(OSError, AttributeError):                      # what shows the run goes before
        os.setpriority(os.PRIO_PROCESS, child.pid, 5)
    threading.Thread(target=child.wait, daemon=True).start()     # or it would stay as a zombie
    return folder.name


def resume_run(places: Places, run: Run) -> str:
    """Go on with a run from its newest checkpoint; returns its key. Raises UserError."""
    kept = []
    if run.cfg and diffuser.samples_path(run.cfg) == run.folder:         # else one that was set aside or renamed
        kept = [path for path in diffuser.kept_checkpoints(run.cfg) if is_of(places, run, path)]
    if not kept:
        raise UserError(f"{run.name} has no checkpoint to go on from: start it again")
    # What no checkpoint keeps: the options about a single invocation that differ from their defaults.
    options = dict(mode="train", resume_from_checkpoint=str(kept[0]), path_to_data=run.cfg.path_to_data,
                   experiment_name=run.cfg.experiment_name, **places.options())
    for name in diffuser.REPEATED | {"num_workers", "report", "use_tensorboard", "use_wandb", "wandb_mode"}:
        value = getattr(run.cfg, name)
        if name not in options and name != "init_from" and value != diffuser.FIELDS[name].default:
            options[name] = value
    return launch(to_words(options), run.folder)


def stop_run(run: Run) -> str:
    """Ask the process of a run to save and end, as Ctrl-C does; returns what to say of it. Raises UserError."""
    if run.process is None:
        return f"{run.name} is not training"
    if run.process == 0:
        raise UserError(f"{run.name} trains on another machine: stop it there")
    if not is_training(run.process):
        raise UserError(f"{run.name}: it is not known which process trains it; stop it where it was started")

    with STOPPING:                                               # a button and a page that closes may ask at once
        if ASKED.get(run.key) == run.process:
            return f"{run.name} is saving already"
        try:
            os.kill(run.process, signal.SIGINT)
        except ProcessLookupError:                               # it has just ended
            pass
        except OSError as error:
            raise UserError(f"{run.name} cannot be stopped: {error.strerror}") from error
        ASKED[run.key] = run.process
    return f"{run.name} saves and stops"


def is_training(process: int) -> bool:
    """Whether that is a process of this program, as far as the system tells: numbers are used again."""
    try:
        return b"diffuser" in Path(f"/proc/{process}/cmdline").read_bytes() or process == os.getpid()
    except FileNotFoundError:                                    # it has ended, or there is no such folder
        return True
    except OSError:
        return False


def dry_run(words: list[str]) -> str:
    """What is known of a run before it begins: device, data, network, memory, time. Raises UserError."""
    check_words(words)
    command = [sys.executable, str(ROOT / "diffuser.py"), *words, "--dry_run"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
                              timeout=120)
    except subprocess.TimeoutExpired:
        raise UserError("to find that out takes longer than two minutes") from None
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("diffuser: ") or f"it failed with status {done.returncode}")

    # Behind the settings.
    lines = done.stdout.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith("device ")), 0)
    return printable("\n".join(lines[begin:]))


# ---- Uploads -----------------------------------------------------------------------------------


def keep_uploads(folder: Path, files: list[str], name: str) -> Path:
    """Copy pictures, or one ZIP file of them, to below a folder; returns the path to train on. Raises UserError.

    Nothing is unpacked, and no file keeps the name that it came with. name: what the copies are called after.
    """
    if not files:
        raise UserError("drop a ZIP file of pictures, or pictures, into the field first")
    zips = [path for path in files if path.lower().endswith(".zip")]
    if zips and len(files) > 1:
        raise UserError("either one ZIP file or pictures, please")
    count = len(ImageFiles(zips[0], "the upload:")) if zips else len(files)
    if count > MOST_UPLOADED:
        raise UserError(f"{count:,} pictures are more than the {MOST_UPLOADED:,} that are taken here: train on them by "
                        "the command line, with --path_to_data")

    pictures = [] if zips else files
    endings = []
    for path in pictures:
        try:
            with open_image(path) as picture:
                kind = picture.format.lower()
                endings.append("jpg" if kind == "mpo" else kind)         # JPEG files with several pictures
        except Exception as error:                               # Pillow raises many kinds
            raise UserError(f"{Path(path).name} cannot be read as a picture ({first_line(error)})") from None

    target = unused_path(folder, f"{name}_", ".zip" if zips else "")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if zips:
            target.touch(exist_ok=False)
        else:
            target.mkdir()
    except OSError as error:                                     # also where another upload has just taken the name
        raise UserError(f"the upload cannot be kept: {error.strerror}", code=1) from error

    # The name is taken: what fails from here on leaves nothing behind.
    try:
        if zips:
            shutil.copyfile(zips[0], target)
            return target
        for i, (path, ending) in enumerate(zip(pictures, endings)):
            shutil.copyfile(path, target / f"{i:06}.{ending}")
        return target
    except OSError as error:
        remove(target)
        raise UserError(f"the upload cannot be kept: {error.strerror}", code=1) from error


# ---- Comparing ---------------------------------------------------------------------------------


def differing_settings(runs: list[Run]) -> list[str]:
    """The settings in which runs differ, in the order of the options."""
    known = [run.cfg for run in runs if run.cfg]
    differing = []
    for name, spec in diffuser.FIELDS.items():
        if spec.metadata["per_run"] or name == "experiment_name":
            continue
        if len({repr(getattr(cfg, name)) for cfg in known}) > 1:
            differing.append(name)
    return differing


def table_of_runs(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: what became of each run, and in what its settings differ from the others'."""
    settings = differing_settings(runs)
    rows = []
    for run, title in zip(runs, titles(runs)):
        last = run.rows[-1] if run.rows else {}
        validation = [row["val_loss"] for row in run.rows if row.get("val_loss")]
        row = [title, run.status, f"{run.step:,}", last.get("loss", ""), validation[-1] if validation else ""]
        for name in settings:
            row.append(diffuser.format_value(name, getattr(run.cfg, name)) if run.cfg else "")
        rows.append(row)
    return ["run", "status", "steps", "loss", "validation", *settings], rows


PLOTTING = threading.Lock()                                      # matplotlib's figures know nothing of threads


def overlaid_curves(runs: list[Run]) -> bytes:
    """The losses of runs over each other, as plot_loss.py draws them: a PNG file.

    Runs without a number yet are left out. Raises UserError where all are.
    """
    begun = [run for run in runs if run.rows or run.grids]
    if not begun:
        raise UserError("none of these runs has a number yet: wait for its first grid")
    columns = {"loss": [], "val_loss": [], "lr": []}
    for run, title in zip(begun, titles(begun)):
        for column, points in load_run(run.folder).items():
            if points:
                columns[column].append((title, points))
    with tempfile.TemporaryDirectory() as folder, PLOTTING:
        path = Path(folder, "loss.png")
        plot(columns["loss"], path, validation=columns["val_loss"], rates=columns["lr"])
        return path.read_bytes()


# ---- Deleting ----------------------------------------------------------------------------------


def parts_of(places: Places, run: Run) -> list[Path]:
    """The files and folders that are this run's alone. Raises UserError while it trains."""
    if run.process is not None:
        raise UserError(f"{run.name} is training: stop it first")
    parts = [run.folder, log_path(run.folder)]
    if run.cfg and diffuser.samples_path(run.cfg) == run.folder:         # else a folder that was renamed
        checkpoint = diffuser.checkpoint_path(run.cfg, 0)
        if run.cfg.experiment_name:
            place = checkpoint.parents[1]
            own = [path.parent for path in place.glob("*/model.pt")]
            others = [path for path in place.glob("*") if path not in own]       # runs named NAME/..., exports, notes
            found = own if others else [place]
            owned = all(is_of(places, run, path / "model.pt") for path in own)
        else:
            place = checkpoint
            found = [*diffuser.kept_checkpoints(run.cfg), diffuser.best_path(run.cfg)]
            owned = all(is_of(places, run, path) for path in found if path.exists())
        # Runs that differ in little can share the names of their checkpoints.
        if owned and process_of(place) is None:
            parts += found
    if run.cfg and is_its_upload(places, run):
        parts.append(Path(run.cfg.path_to_data))
    return [path for path in parts if path.exists()]


def is_its_upload(places: Places, run: Run) -> bool:
    """Whether a run's pictures were uploaded for it, and no other run trains on them."""
    data = Path(run.cfg.path_to_data).resolve()
    if data.parent != (places.data / "uploads").resolve():
        return False
    others = [other for other in read_runs(places) if other.folder != run.folder]
    return all(other.cfg and Path(other.cfg.path_to_data).resolve() != data for other in others)


def is_of(places: Places, run: Run, path: Path) -> bool:
    """Whether a checkpoint is that run's, by what is in it."""
    try:
        config = diffuser.load_checkpoint(path, peek=True)["config"]
        name = config.get("experiment_name") or run.cfg.experiment_name
        cfg = diffuser.configure(config, experiment_name=name, **places.options())
    except UserError:
        return False
    return diffuser.samples_path(cfg) == run.folder


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it; what is not there is let pass. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def delete_run(places: Places, run: Run) -> None:
    """Delete all that is this run's alone. Raises UserError."""
    with STARTING:                                               # nobody resumes it meanwhile
        now = dataclasses.replace(run, process=process_of(run.folder))
        for path in parts_of(places, now):
            try:
                remove(path)
            except OSError as error:
                raise UserError(f"{path} cannot be deleted: {error.strerror}") from error
