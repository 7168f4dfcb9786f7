#!/usr/bin/env python3
"""app: draw, edit and train in a browser.

    python app.py                                     a page for this machine alone: http://127.0.0.1:7860
    python app.py --open                              and a browser that shows it
    python app.py --host 0.0.0.0 --password SECRET    a page for others, too, who are asked for the password

The page draws with the checkpoints that are here, varies and mends pictures, starts training runs and watches them; for
what it does it shows the command that does the same. A run is a process of its own, the ordinary command: it goes on
when the page is closed. Nothing is fetched from the internet.

Beside a file model.safetensors the page draws and edits with that model alone: `python convert.py to-space` makes such
a folder, which is a Space for Hugging Face as it stands.
"""

from __future__ import annotations

# signal itself imports others first, and Ctrl-C would print a traceback there.
import _signal

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)              # Ctrl-C while torch is imported: no traceback

import argparse
import asyncio
import atexit
import dataclasses
import functools
import hmac
import inspect
import io
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.parse
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import diffuser
import edit
import report
import runs
from convert import SPACE_WEIGHTS, read_safetensors
from diffuser_lib.files import (
    Parser,
    UserError,
    add_debug,
    end_process,
    first_line,
    newest_first,
    printable,
    run_script,
    warn,
)
from diffuser_lib.images import FORMATS, file_name, open_image, save_grid, to_pil, to_uint8
from diffuser_lib.machine import duration
from runs import Places, Run

# What the page makes and what is uploaded to it: for this user alone, and gone with the page.
SCRATCH = Path(tempfile.mkdtemp(prefix="diffuser_app_"))
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
os.environ["GRADIO_TEMP_DIR"] = str(SCRATCH / "gradio")          # before gradio is imported
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
except ModuleNotFoundError as error:
    sys.exit(f"app: {error.name} is not installed: pip install gradio")

ROOT = Path(__file__).resolve().parent
SPACE_MODEL = ROOT / SPACE_WEIGHTS                               # there in a Space alone

MOST_IMAGES = 64                                                 # drawn at a time: they are one batch
MOST_BUTTONS = 100                                               # classes that are shown as buttons
MOST_PAINTED = 2**22                                             # pixels of a layer that is painted on
UPLOAD_SIZE = 2**31                                              # bytes of one upload
FRAME_SECONDS = 0.1                                              # between two views of a drawing that is under way
SIGN_SECONDS = 20.0                                              # between two signs of life of an open page
GRACE = 45.0                                                     # seconds that a page may take to come back


# ---- What is here ------------------------------------------------------------------------------
# Checkpoints and the models in them. What comes from the browser is looked up in lists made here, and never a path.


@dataclass(frozen=True)
class Found:
    """A checkpoint: its path, what it is called, the folder of its run's samples, if any."""

    path: Path
    label: str
    samples: Path | None


@dataclass(frozen=True)
class Loaded:
    """A model ready to draw, and what names its checkpoint for good: path and SHA-256."""

    model: diffuser.Model
    source: dict


class Home:
    """The folders of this page, and the models that are loaded, of which the last two are kept."""

    def __init__(self, places: Places, space: bool = False):
        self.places = places
        self.space = space
        self.lock = threading.Lock()
        self.known: dict[Path, tuple] = {}                       # (what the file was when it was read, what is in it)
        self.loaded: OrderedDict[tuple, Loaded] = OrderedDict()

    def checkpoints(self) -> tuple[dict[str, Found], list[str]]:
        """All checkpoints by their paths, the newest first; and a line for each file that is none."""
        if self.space:
            return {SPACE_MODEL.name: Found(SPACE_MODEL, SPACE_MODEL.stem, None)}, []

        found = {}
        unusable = []
        for path in newest_first(self.places.checkpoints.glob("**/*.pt")):
            about = self.look(path)
            if isinstance(about, Found):
                found[str(path)] = about
            else:
                unusable.append(about)
        return found, unusable

    def look(self, path: Path) -> Found | str:
        """What a checkpoint is, or the reason why it is none; a file that has not changed is not read again."""
        try:
            stamp = file_stamp(path)
            if self.known.get(path, (None,))[0] == stamp:
                return self.known[path][1]
            about = self.describe(path)
        except OSError as error:                                 # gone by now, or not for us to read
            return f"{path}: {error.strerror}"
        except UserError as error:
            about = printable(first_line(error))
        self.known[path] = stamp, about
        return about

    def describe(self, path: Path) -> Found:
        """Read what a checkpoint says of itself. Raises UserError."""
        state = diffuser.load_checkpoint(path, peek=True)
        history = state["loss_history"]
        loss = f", loss {history[-1][1]:.4f}" if history else ""
        best = ", best" if diffuser.is_best(path) else ""
        label = f"{diffuser.run_title(state['config'])}, step {state['step']:,}{loss}{best}"

        name = state["config"].get("experiment_name") or ""
        cfg = diffuser.configure(state["config"], experiment_name=name, **self.places.options())
        return Found(path, printable(label), diffuser.samples_path(cfg))

    def find(self, key: str | None) -> Found:
        """The checkpoint of that key. Raises UserError."""
        found, _ = self.checkpoints()
        if not found:
            raise UserError("there is no checkpoint yet: train one first")
        if key not in found:
            raise UserError("this checkpoint is gone: choose another one")
        return found[key]

    def load(self, key: str | None) -> Loaded:
        """The model of that key. Raises UserError."""
        path = self.find(key).path
        with self.lock:
            stamp = file_stamp(path)
            if stamp not in self.loaded:
                self.loaded[stamp] = self.read(path)
                while len(self.loaded) > 2:
                    self.loaded.popitem(last=False)
            self.loaded.move_to_end(stamp)
            return self.loaded[stamp]

    def read(self, path: Path) -> Loaded:
        """Read a model. Raises UserError."""
        if path.suffix == ".safetensors":
            return Loaded(read_safetensors(path), dict(checkpoint=path.name))
        state, source = diffuser.load_with_digest(path)
        return Loaded(diffuser.build_model(state, diffuser.configure(state["config"], device="auto")), source)


def scratch_file(ending: str) -> Path:
    """A new name for a file that lives as long as the page, or an hour."""
    folder = SCRATCH / "made"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > 3600:
                old.unlink()
    return folder / f"{random.getrandbits(64):016x}{ending}"


def file_stamp(path: Path) -> tuple:
    """What changes when a file does. Raises OSError."""
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


# ---- Pictures ----------------------------------------------------------------------------------
# As HTML, with the pixels inside: nothing is written to the disk, and they stay sharp however large they are shown.

CHOOSE_PICTURE = """
element.addEventListener('click', event => {
  const chosen = event.target.closest('button[data-index]');
  if (!chosen) return;
  element.querySelectorAll('button[data-index]').forEach(button =>
    button.setAttribute('aria-pressed', button === chosen));
  trigger('select', {index: Number(chosen.dataset.index)});
});
"""


def data_address(picture: Image.Image) -> str:
    """A picture as the address of an <img>."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return report.png_address(file.getvalue())


def show_pictures(images: Tensor, names: list[str]) -> str:
    """uint8 [N, C, H, W] as buttons with pictures, each of which has a name."""
    buttons = []
    for i, (image, name) in enumerate(zip(images, names)):
        title = escape(name, quote=True)
        buttons.append(f'<button type="button" data-index="{i}" aria-pressed="false" title="{title}">'
                       f'<img src="{data_address(to_pil(image))}" alt="{title}"></button>')
    return f'<div class="pictures">{"".join(buttons)}</div>'


def show_file(path: Path | None, alt: str) -> str:
    """A PNG file that a run has drawn; nothing where it is not there."""
    if path is None:
        return ""
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    return f'<img class="sharp" src="{report.png_address(content)}" alt="{escape(alt, quote=True)}">'


def note(text: str) -> str:
    """A line of words."""
    return f'<p class="note">{escape(text)}</p>' if text else ""


# ---- Draw --------------------------------------------------------------------------------------


@dataclass
class Drawing:
    """Images, and what they were drawn with.

    key: of the checkpoint; images: uint8 [N, C, H, W]; labels: their class numbers; titles: what they are called on the
    page; names: those of their files; record: of samples.json; command: the command line that draws the same; sources:
    the files that stand in it, by name.
    """

    key: str
    images: Tensor
    labels: list[int]
    titles: list[str]
    names: list[str]
    record: dict
    command: list[str]
    sources: dict[str, Path] = field(default_factory=dict)


def check_request(count: int, seed: int) -> None:
    """Raise UserError for a number of images or a seed that cannot be."""
    if not 1 <= count <= MOST_IMAGES:
        raise UserError(f"between 1 and {MOST_IMAGES} images can be drawn at a time")
    diffuser.check_value("seed", seed)


def own_settings(model: diffuser.Model) -> dict:
    """How a checkpoint draws where nothing else is asked for."""
    cfg = model.config
    return dict(sampler=cfg.sampler, steps=diffuser.sampling_steps(cfg), guidance_scale=cfg.guidance_scale)


def changed_settings(model: diffuser.Model, sampler: str, steps: float, guidance: float) -> dict:
    """The settings that are not the checkpoint's own. A number of steps goes with its sampler."""
    own = own_settings(model)
    wanted = dict(sampler=sampler, steps=int(steps), guidance_scale=float(guidance))
    changed = {name: value for name, value in wanted.items() if value != own[name]}
    if "sampler" in changed:
        changed["steps"] = wanted["steps"]
    return changed


def class_numbers(model: diffuser.Model, classes: list[str] | str) -> list[int]:
    """Class numbers from names on buttons, or from text; all where none is named. Raises UserError."""
    if not model.class_names:
        return []
    if not classes or (isinstance(classes, str) and not classes.strip()):
        return list(range(len(model.class_names)))
    return diffuser.parse_classes(classes, model.class_names)


def class_titles(model: diffuser.Model, labels: list[int]) -> list[str]:
    """What images with these labels are called."""
    names = [*model.class_names, "image"]
    return [f"{i}: {names[label]}" for i, label in enumerate(labels)]


def draw(home: Home, classes: list[str] | str, count: int, seed: int, key: str, taken: str | None, sampler: str,
         steps: int, guidance: float) -> Iterator[Drawing]:
    """Draw images: after each step, from noise on, what there is of them.

    taken: the checkpoint whose values the controls have; where it is another one, they do not count yet. Raises
    UserError.
    """
    loaded = home.load(key)
    model = loaded.model
    check_request(count, seed)
    numbers = class_numbers(model, classes)
    settings = changed_settings(model, sampler, steps, guidance) if taken == key else {}
    cfg = model.sampling_config(dict(settings, seed=seed))

    # What it is called, and how it is drawn again.
    labels = model.labels(numbers, count)
    record = diffuser.drawing_record(model, cfg, numbers, count, loaded.source)
    command = ["python", "diffuser.py", "--mode", "inference", "--model_path", loaded.source["checkpoint"]]
    if numbers != list(range(len(model.class_names))):
        command += ["--classes", ",".join(map(str, numbers))]
    command += runs.to_words(dict(num_images=count, seed=seed, **settings))
    drawing = Drawing(key, torch.empty(0), labels, class_titles(model, labels), diffuser.picture_names(model, labels),
                      record, command)

    for _, x, _ in model.generate(numbers or None, count, each_step=True, seed=seed, **settings):
        drawing.images = x
        yield drawing


def pack(drawing: Drawing) -> str:
    """The path of a ZIP file as the command fills a folder, images/, grid.png and settings, with what it names."""
    path = scratch_file(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for image, name in zip(drawing.images, drawing.names):
            file = io.BytesIO()
            to_pil(image).save(file, "PNG")
            archive.writestr(f"images/{name}", file.getvalue())
        grid = scratch_file(".png")
        save_grid(drawing.images, grid, drawing.record.get("classes") or [])
        archive.write(grid, "grid.png")
        grid.unlink()
        for name, source in drawing.sources.items():
            archive.write(source, name)
        settings = "edit.json" if "edit.py" in drawing.command else "samples.json"
        archive.writestr(settings, json.dumps(drawing.record, indent=1))
    return str(path)


# ---- Edit --------------------------------------------------------------------------------------
# The commands of edit.py, with files made of what the page holds.


def edit_settings(model: diffuser.Model, command: str) -> dict:
    """The settings in which an edit differs from the checkpoint's own drawing, on the command line as well."""
    sampler = diffuser.SAMPLERS[model.config.sampler]
    if command == "interpolate" and sampler.adds_noise(diffuser.sampler_options(model.config)):
        return dict(sampler="dpmpp")                             # two seeds then name two images
    return {}


def class_of(model: diffuser.Model, name: str | None) -> list[int]:
    """The class of that name as a list, empty for none. Raises UserError."""
    if not name or not model.class_names or name == NO_CLASS:
        return []
    return diffuser.parse_classes([name], model.class_names)


def run_edit(home: Home, key: str, command: str, classes: list[str | None], count: int, seed: int = 0,
             **arguments) -> Drawing:
    """What a command of edit.py makes. arguments: its own. Raises UserError."""
    check_request(count, seed)
    loaded = home.load(key)
    model = loaded.model
    changed = edit_settings(model, command)
    settings = {**edit.usual_settings(command, model.diffusion.T), **changed, "seed": seed}
    model = dataclasses.replace(model, config=model.sampling_config(settings))
    numbers = []
    for name in classes:
        numbers += class_of(model, name)
    if 0 < len(numbers) < len(classes):
        raise UserError("from one class to another: choose both, or none")
    if len(set(numbers)) < 2:
        numbers = numbers[:1]

    context = edit.EditContext(model, numbers, count)
    with torch.no_grad():
        plan = edit.COMMANDS[command].plan(context, argparse.Namespace(**arguments))
        images = to_uint8(plan.draw())

    # How the same is done on the command line, with files of one's own.
    words = ["python", "edit.py", loaded.source["checkpoint"], command]
    sources = {f"{name}.png": Path(arguments[name]) for name in ("picture", "mask") if name in arguments}
    words += list(sources)
    words += [f"--{name}={arguments[name]}" for name in ("seeds", "strength") if name in arguments]
    options = dict(classes=",".join(map(str, numbers)), num_images=count, **changed)
    if command != "interpolate":
        options["seed"] = seed
    words += runs.to_words(options)

    labels = [numbers[0] if numbers else model.null_class] * count
    titles = [f"{i}: {heading}" for i, heading in enumerate(plan.headings)]
    record = dict(loaded.source, command=shlex.join(words), config=dataclasses.asdict(model.config))
    names = [f"{i:06}.png" for i in range(count)]
    return Drawing(key, images, labels, titles, names, record, words, sources)


def uploaded_picture(file: str | None, model: diffuser.Model) -> Path:
    """An uploaded picture as the model sees it, in a file. Raises UserError."""
    if not file:
        raise UserError("choose a picture first")
    with own_name(file):
        return save_picture(edit.read_picture(file, model.shape)[0])


@contextmanager
def own_name(*files: str) -> Iterator[None]:
    """Errors name uploaded files as their owner does, without the folder that they are kept in."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for file in files:
            text = text.replace(file, Path(file).name)
        raise UserError(text) from None


def save_picture(image: Tensor) -> Path:
    """uint8 [C, H, W] in a file for edit.py."""
    path = scratch_file(".png")
    to_pil(image).save(path)
    return path


def painted_mask(editor: dict | None, shape: tuple[int, int, int]) -> Tensor:
    """What is painted in the editor, at the model's size: uint8 [1, H, W], 255 where anything is. Raises UserError."""
    layers = (editor or {}).get("layers") or []
    if not layers:
        raise UserError("paint over the part that is to be drawn anew")
    layer = layers[0]                                            # the page has one
    if layer.width * layer.height > MOST_PAINTED:
        raise UserError("this is too large to paint on")

    alpha = torch.from_numpy(np.array(layer.convert("RGBA").getchannel("A"), dtype=np.float32))[None]
    painted = torch.nn.functional.adaptive_max_pool2d(alpha, shape[1:]) > 127
    if painted.all() or not painted.any():
        raise UserError("paint over the part that is to be drawn anew, and leave the rest")
    return painted.to(torch.uint8) * 255


def canvas(path: Path) -> Image.Image:
    """A picture for the editor, enlarged by a whole factor so that there is something to paint on."""
    picture = open_image(path)
    zoom = max(1, 384 // max(picture.size))
    size = (picture.width * zoom, picture.height * zoom)
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


# ---- Runs --------------------------------------------------------------------------------------
# What the page shows of training runs.


def describe_progress(run: Run) -> str:
    """A bar and a line: how far a run is, how long it still takes, how good it is."""
    words = [run.status]
    if run.rows:
        words.append(f"step {run.step:,} of {run.total:,}" if run.total else f"step {run.step:,}")
        words.append(f"loss {run.rows[-1].get('loss')}")
    if run.process is not None and run.seconds_left:
        words.append(f"{duration(run.seconds_left)} left")

    done = 0.0                                                   # also where the number of steps is not known
    if run.status == "finished":
        done = 1.0
    elif run.total:
        done = min(1.0, run.step / run.total)
    percent = f"{100 * done:.1f}"
    return (f'<div class="bar" role="progressbar" aria-label="progress of the run" aria-valuenow="{percent}">'
            f'<div style="width: {percent}%"></div></div><p>{escape(", ".join(words))}</p>')


def draw_curves(run: Run) -> str:
    """The curves of a run, as in its report."""
    with runs.PLOTTING:
        figures = [figure for figure in report.make_figures(run.rows) if figure["svg"]]
    parts = [f'<figure><figcaption>{escape(figure["title"])}</figcaption>{figure["svg"]}</figure>'
             for figure in figures]
    return f'<div class="curves">{"".join(parts)}</div>'


def show_grid(run: Run, place: int) -> str:
    """The grid of that place, counted from 1."""
    if not run.grids:
        return note("A grid of samples appears here as soon as one is drawn.")
    path = run.grids[min(max(1, int(place)), len(run.grids)) - 1]
    words = path.stem.replace("_", " ")
    return show_file(path, words) + note(words)


def show_overlay(chosen: list[Run]) -> str:
    """The losses of runs over each other. Raises UserError."""
    picture = report.png_address(runs.overlaid_curves(chosen))
    names = escape(", ".join(run.name for run in chosen), quote=True)
    return f'<img class="figure" src="{picture}" alt="losses of {names}">'


def show_report(run: Run) -> str:
    """The report of a run inside the page, shut off from it. Raises UserError."""
    try:
        with runs.PLOTTING:
            content = report.render(run.folder)
    except OSError as error:
        raise UserError(f"there is no report of {run.name}: {first_line(error)}") from error
    return (f'<iframe class="report" sandbox="allow-scripts" title="report of {escape(run.name, quote=True)}" '
            f'srcdoc="{escape(content, quote=True)}"></iframe>')


# ---- The page ----------------------------------------------------------------------------------

NO_CLASS = "no class"
OWN_PICTURES = "my own pictures"
UNITS = {"minutes": "train_minutes", "epochs": "epochs", "steps": "iterations"}
GO_ON = "training goes on"
STOP = "training stops and saves"

CSS = """
.pictures { display: grid; gap: 6px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 5.5rem), 1fr)) }
.pictures button { padding: 2px; border: 2px solid transparent; border-radius: 6px; background: none; cursor: pointer }
.pictures button:hover { border-color: var(--border-color-primary) }
.pictures button[aria-pressed=true] { border-color: var(--color-accent) }
.pictures button:focus-visible { outline: 2px solid var(--color-accent); outline-offset: 1px }
.pictures img, img.sharp { display: block; width: 100%; image-rendering: pixelated }
img.sharp { max-width: 40rem }
img.figure { width: 100%; max-width: 60rem }
.thumbnail img.sharp { max-width: 14rem }
.one-picture .pictures { grid-template-columns: minmax(0, 14rem) }
.note { margin: .25rem 0; color: var(--body-text-color-subdued) }
.bar { height: .6rem; border-radius: .3rem; overflow: hidden; background: var(--border-color-primary) }
.bar div { height: 100%; background: var(--color-accent) }
input[role=combobox] { padding-right: 1.75rem !important; text-overflow: ellipsis }
.curves { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)) }
.curves svg { display: block; width: 100%; height: auto }
.curves svg text { font-family: system-ui, sans-serif !important }
iframe.report { width: 100%; height: 70vh; border: 1px solid var(--border-color-primary); border-radius: 6px }
"""

INTRODUCTION = "# diffuser\nDraw with a diffusion model, change pictures with it, or train one."
NOTHING_YET = ("**There is no checkpoint yet**, so there is nothing to draw with. Train one first: the digits that "
               "come with the program take about a minute.")


def told(work: Callable) -> Callable:
    """A callback of the page whose failures are a line in the page; what nobody expected is told on stderr, too."""
    def told_error(error: Exception) -> gr.Error:
        clearer = diffuser.explain(error, "draw fewer images at a time") or error
        if not isinstance(clearer, (UserError, OSError)):
            warn(f"app: unexpected {type(error).__name__}: {first_line(error)}")
        return gr.Error(escape(printable(str(clearer) if isinstance(clearer, UserError) else first_line(clearer))),
                        print_exception=False)

    if inspect.isgeneratorfunction(work):
        @functools.wraps(work)
        def steps(*values):
            try:
                yield from work(*values)
            except gr.Error:
                raise
            except Exception as error:
                raise told_error(error) from None
        return steps

    @functools.wraps(work)
    def call(*values):
        try:
            return work(*values)
        except gr.Error:
            raise
        except Exception as error:
            raise told_error(error) from None
    return call


def on(trigger: Callable, work: Callable, inputs: list | None = None, outputs: list | None = None, **options):
    """Call work(values of inputs) at an event of the page; what it returns goes to outputs."""
    return trigger(told(work), inputs, outputs, api_visibility="private", show_progress="hidden", **options)


def checkpoint_choices(home: Home) -> list[tuple[str, str]]:
    """(label, key) of all checkpoints; labels that are alike have the path added."""
    found, _ = home.checkpoints()
    labels = [about.label for about in found.values()]
    choices = []
    for key, about in found.items():
        label = about.label
        if labels.count(label) > 1:
            label = f"{label} ({printable(key)})"
        choices.append((label, key))
    return choices


def checkpoint_menu(home: Home, label: str) -> gr.Dropdown:
    """The list of checkpoints, the newest chosen."""
    choices = checkpoint_choices(home)
    return gr.Dropdown(choices, value=choices[0][1] if choices else None, label=label, visible=not home.space)


def choose_again(home: Home, key: str | None):
    """The list of checkpoints as it is now, with the one that was chosen, or else the newest."""
    return keep_choice(checkpoint_choices(home), key)


def keep_choice(choices: list[tuple[str, str]], key: str | None):
    """A menu of (label, key) with the key that was chosen or, where that is gone, the first."""
    keys = [key for _, key in choices]
    value = key if key in keys else next(iter(keys), None)
    return gr.update(choices=choices, value=value)


def passed_over(home: Home) -> dict:
    """What shows a line for each file that is no checkpoint."""
    _, unusable = home.checkpoints()
    text = "".join(note(f"passed over: {reason}") for reason in unusable[:5])
    return gr.update(value=text, visible=bool(text))


@dataclass(frozen=True)
class Filler:
    """What brings a tab up to date with what there is, when the page is loaded: a callback, its inputs and outputs.

    on_select: also when the tab is gone back to.
    """

    work: Callable
    inputs: list
    outputs: list
    on_select: bool = True


@dataclass
class DrawingControls:
    """The controls of one way to draw."""

    checkpoint: gr.Dropdown
    thumbnail: gr.HTML
    sampler: gr.Dropdown
    steps: gr.Slider
    guidance: gr.Slider
    taken: gr.State                                              # the checkpoint whose values they have

    def inputs(self) -> list:
        """As draw takes them."""
        return [self.checkpoint, self.taken, self.sampler, self.steps, self.guidance]

    def own_values(self) -> list:
        """What take_own_values fills."""
        return [self.thumbnail, self.taken, self.sampler, self.steps, self.guidance]


def drawing_controls(home: Home, label: str) -> DrawingControls:
    """Checkpoint, sampler, steps, guidance; they take the checkpoint's own values when it is chosen."""
    checkpoint = checkpoint_menu(home, label)
    thumbnail = gr.HTML(elem_classes="thumbnail", visible=False)
    with gr.Accordion("How it is drawn", open=False):
        sampler = gr.Dropdown(list(diffuser.SAMPLERS), label="sampler")
        steps = gr.Slider(1, 1000, 10, step=1, label="steps", info="more are slower, and up to a point better")
        guidance = gr.Slider(0, 5, 0, step=0.05, label="guidance",
                             info="more makes classes clearer, and images more alike")
    controls = DrawingControls(checkpoint, thumbnail, sampler, steps, guidance, gr.State(None))

    def take_own_steps(key: str, sampler: str):
        model = home.load(key).model
        if sampler == model.config.sampler:
            return diffuser.sampling_steps(model.config)
        return diffuser.sampling_steps(dataclasses.replace(model.config, sampler=sampler, steps=None))

    on(sampler.input, take_own_steps, [checkpoint, sampler], [steps])
    return controls


def take_own_values(home: Home, key: str | None):
    """What the controls of one way to draw become when a checkpoint is chosen."""
    if not key:
        return gr.update(visible=False), None, gr.skip(), gr.skip(), gr.skip()
    model = home.load(key).model
    own = own_settings(model)
    samples = home.find(key).samples
    grids = runs.read_run(home.places, samples).grids if samples else []
    thumbnail = show_file(grids[-1] if grids else None, "the run's last grid of samples")
    return (gr.update(value=thumbnail, visible=bool(thumbnail)), key, own["sampler"],
            gr.update(maximum=model.diffusion.T, value=own["steps"]),
            gr.update(maximum=max(5, own["guidance_scale"]), value=own["guidance_scale"]))


def show_classes(home: Home, key: str | None):
    """The classes of a checkpoint: as buttons or, where they are many, as a field for text."""
    names = home.load(key).model.class_names if key else []
    few = 0 < len(names) <= MOST_BUTTONS
    return (gr.update(choices=names if few else [], value=[], visible=few),
            gr.update(value="", visible=len(names) > MOST_BUTTONS))


def class_menu(home: Home, key: str | None):
    """The classes of a checkpoint as a menu."""
    names = home.load(key).model.class_names if key else []
    return gr.update(choices=[NO_CLASS, *names], value=NO_CLASS, visible=bool(names))


@dataclass
class Output:
    """Where pictures appear: they, what they were drawn with, the command, the download."""

    pictures: gr.HTML
    drawing: gr.State
    chosen: gr.State
    command: gr.Code
    download: gr.DownloadButton

    def all(self) -> list:
        return [self.pictures, self.drawing, self.chosen, self.command, self.download]


def output_area(label: str) -> Output:
    """A place for pictures, of which one can be chosen."""
    pictures = gr.HTML(js_on_load=CHOOSE_PICTURE, label=label, apply_default_css=False)
    drawing = gr.State(None)
    chosen = gr.State(-1)
    download = gr.DownloadButton("download as ZIP", visible=False, size="sm")
    command = gr.Code(label="the same on the command line", language="shell", interactive=False, visible=False,
                      show_line_numbers=False, wrap_lines=True, lines=1, buttons=["copy"])

    def choose(event: gr.EventData) -> int:
        index = event._data.get("index") if isinstance(event._data, dict) else None
        return index if isinstance(index, int) else -1

    # Not by `on`: gradio looks at the annotation.
    pictures.select(choose, None, [chosen], api_visibility="private", show_progress="hidden")
    return Output(pictures, drawing, chosen, command, download)


def show_drawing(home: Home, drawing: Drawing) -> tuple:
    """Values for all of an Output, once everything is drawn."""
    try:
        download = gr.update(value=pack(drawing), visible=True)
    except OSError as error:                                     # a full disk takes away the download alone
        download = gr.update(visible=False)
        gr.Warning(f"there is no file to download: {error.strerror or error}")
    return (show_pictures(drawing.images, drawing.titles), drawing, -1,
            gr.update(value=shlex.join(drawing.command), visible=not home.space), download)


def watch_drawing(home: Home, steps: Iterator[Drawing]) -> Iterator[tuple]:
    """Values for all of an Output while images are drawn, a few times a second, and at the end."""
    shown = 0.0
    drawing = None
    for drawing in steps:
        if time.monotonic() - shown > FRAME_SECONDS:
            hidden = gr.update(visible=False)                    # until there is something whole to take away
            yield show_pictures(drawing.images, drawing.titles), None, -1, hidden, hidden
            shown = time.monotonic()
    yield show_drawing(home, drawing)


def chosen_picture(drawing: Drawing | None, chosen: int) -> tuple[Tensor, int]:
    """The picture that is chosen, and its class number. Raises UserError."""
    if drawing is None or not 0 <= chosen < len(drawing.images):
        raise UserError("choose a picture first: click on one that is finished")
    return drawing.images[chosen], drawing.labels[chosen]


@dataclass
class DrawForm:
    """What is to be drawn, and the buttons. unusable: where checkpoints are told that cannot be drawn from."""

    first: DrawingControls
    second: DrawingControls
    beside: gr.Checkbox
    buttons: gr.CheckboxGroup
    text: gr.Textbox
    count: gr.Slider
    seed: gr.Number
    start: gr.Button
    again: gr.Button
    stop: gr.Button
    unusable: gr.HTML

    def inputs(self) -> list:
        return [self.buttons, self.text, self.count, self.seed, self.beside, *self.first.inputs(),
                *self.second.inputs()]


def draw_form(home: Home) -> DrawForm:
    """The form, which follows the checkpoint that is chosen."""
    first = drawing_controls(home, "checkpoint")
    unusable = gr.HTML(visible=False)                            # an empty one would take room
    buttons = gr.CheckboxGroup(choices=[], label="classes", info="none: all of them in turn", visible=False)
    text = gr.Textbox(label="classes", info="names or numbers, such as 3, 5 or 3-5", visible=False)
    count = gr.Slider(1, MOST_IMAGES, 16, step=1, label="images")
    seed = gr.Number(0, label="seed", precision=0, minimum=0, info="the same seed, the same images")
    with gr.Row():
        start = gr.Button("draw", variant="primary", min_width=90)
        again = gr.Button("new seed", min_width=90)
        stop = gr.Button("stop", min_width=90)
    with gr.Accordion("Side by side", open=False):
        gr.Markdown("The same seeds and classes, drawn in a second way.")
        beside = gr.Checkbox(False, label="draw side by side")
        second = drawing_controls(home, "second checkpoint")
    return DrawForm(first, second, beside, buttons, text, count, seed, start, again, stop, unusable)


def follow_checkpoints(home: Home, form: DrawForm) -> list[Filler]:
    """Let the form show a checkpoint's own settings and classes when it is chosen, and when the tab is opened."""
    fillers = []
    for controls in (form.first, form.second):
        fillers.append(Filler(functools.partial(take_own_values, home), [controls.checkpoint], controls.own_values(),
                              on_select=False))
    fillers.append(Filler(functools.partial(show_classes, home), [form.first.checkpoint], [form.buttons, form.text],
                          on_select=False))
    for filler in fillers:
        on(filler.inputs[0].change, filler.work, filler.inputs, filler.outputs)
    return fillers


@dataclass
class DrawArea:
    """Where what was drawn appears, in one way or in two, and what makes more like one of the pictures."""

    left: Output
    right: Output
    right_column: gr.Column
    strength: gr.Slider
    like: gr.Button


def draw_area() -> DrawArea:
    """Places for the pictures of two ways, of which the second shows where it is asked for."""
    with gr.Row():
        with gr.Column(min_width=280):
            left = output_area("pictures")
        with gr.Column(min_width=280, visible=False) as right_column:
            right = output_area("pictures of the second way")
    with gr.Row():
        strength = gr.Slider(0.05, 1, 0.5, step=0.05, label="strength", min_width=160,
                             info="near 0: hardly anything changes; 1: everything")
        like = gr.Button("more like the chosen one", min_width=160)
    return DrawArea(left, right, right_column, strength, like)


def connect_drawing(home: Home, form: DrawForm, area: DrawArea) -> None:
    """Let the buttons draw, draw with another seed, and stop."""
    def run(names, words, count, seed, beside, *ways):
        what = (words if words and words.strip() else names, int(count), int(seed or 0))
        first_way, second_way = ways[:5], ways[5:]
        leave_left = (gr.skip(),) * len(area.left.all())
        leave_right = (gr.skip(),) * len(area.right.all())
        column = gr.update(visible=bool(beside))
        for values in watch_drawing(home, draw(home, *what, *first_way)):
            yield (*values, *leave_right, column)
        if beside:
            for values in watch_drawing(home, draw(home, *what, *second_way)):
                yield (*leave_left, *values, column)

    outputs = [*area.left.all(), *area.right.all(), area.right_column]
    drawing = on(form.start.click, run, form.inputs(), outputs)
    seeding = on(form.again.click, lambda: random.randrange(2**31), None, [form.seed])
    drawing_again = on(seeding.then, run, form.inputs(), outputs)
    form.stop.click(None, cancels=[drawing, drawing_again], api_visibility="private")


def connect_variations(home: Home, form: DrawForm, area: DrawArea) -> None:
    """Let the button make more like the chosen picture."""
    def vary(drawing, chosen, strength, count, seed):
        picture, label = chosen_picture(drawing, chosen)
        names = home.load(drawing.key).model.class_names
        made = run_edit(home, drawing.key, "vary", [names[label] if label < len(names) else None], int(count),
                        int(seed or 0), picture=str(save_picture(picture)), strength=float(strength))
        return show_drawing(home, made)

    inputs = [area.left.drawing, area.left.chosen, area.strength, form.count, form.seed]
    on(area.like.click, vary, inputs, area.left.all())


def draw_tab(home: Home, tabs: gr.Tabs) -> list[Filler]:
    """The tab that draws, or that sends to the training where nothing is trained yet."""
    there = bool(checkpoint_choices(home))
    with gr.Group(visible=not there) as nothing:
        gr.Markdown(NOTHING_YET, container=True)
        go_train = gr.Button("train digits", variant="primary")
    with gr.Row(visible=there) as everything:
        with gr.Column(scale=1, min_width=300):
            form = draw_form(home)
        with gr.Column(scale=2, min_width=300):
            area = draw_area()

    fillers = follow_checkpoints(home, form)
    connect_drawing(home, form, area)
    connect_variations(home, form, area)
    go_train.click(lambda: gr.Tabs(selected="train"), None, [tabs], api_visibility="private")

    def fill(key, other):
        there = bool(checkpoint_choices(home))
        return (choose_again(home, key), choose_again(home, other), gr.update(visible=not there),
                gr.update(visible=there), passed_over(home))

    both = [form.first.checkpoint, form.second.checkpoint]
    return [Filler(fill, both, [*both, nothing, everything, form.unusable]), *fillers]


def class_choice(label: str) -> gr.Dropdown:
    """A menu of classes, shown where the checkpoint has any."""
    return gr.Dropdown([NO_CLASS], value=NO_CLASS, label=label, visible=False)


def between_tab(home: Home, checkpoint: gr.Dropdown) -> list[gr.Dropdown]:
    """Images on the way from one seed to another; returns its menus of classes."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            seeds = [gr.Number(i, label=f"{name} seed", precision=0, minimum=0)
                     for i, name in enumerate(("first", "second"))]
            menus = [class_choice(f"{name} class") for name in ("first", "second")]
            between = gr.Slider(2, 32, 9, step=1, label="images on the way")
            draw_button = gr.Button("draw the way", variant="primary")
        with gr.Column(scale=2, min_width=300):
            place = gr.Slider(0, 8, 0, step=1, label="place on the way")
            with gr.Column(elem_classes="one-picture"):
                one = gr.HTML()
            way = output_area("the way")

    def show_one(drawing, place):
        if drawing is None:
            return ""
        i = min(int(place), len(drawing.images) - 1)
        return show_pictures(drawing.images[i : i + 1], drawing.titles[i : i + 1])

    def draw_way(key, first_seed, second_seed, first_class, second_class, count):
        drawing = run_edit(home, key, "interpolate", [first_class, second_class], int(count),
                           seeds=f"{int(first_seed or 0)},{int(second_seed or 0)}")
        middle = len(drawing.images) // 2
        return (*show_drawing(home, drawing), gr.update(maximum=len(drawing.images) - 1, value=middle),
                show_one(drawing, middle))

    on(draw_button.click, draw_way, [checkpoint, *seeds, *menus, between], [*way.all(), place, one])
    on(place.input, show_one, [way.drawing, place], [one], trigger_mode="always_last")
    return menus


def vary_tab(home: Home, checkpoint: gr.Dropdown) -> gr.Dropdown:
    """Images like a picture; returns its menu of classes."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            file = gr.File(label="picture", file_count="single", height=140, elem_id="vary-picture")
            thumbnail = gr.HTML(elem_classes="thumbnail")
            menu = class_choice("class")
            strength = gr.Slider(0.05, 1, 0.5, step=0.05, label="strength",
                                 info="near 0: the picture, 1: nothing of it")
            count = gr.Slider(1, 32, 8, step=1, label="images")
            seed = gr.Number(0, label="seed", precision=0, minimum=0)
            draw_button = gr.Button("draw others like it", variant="primary")
        with gr.Column(scale=2, min_width=300):
            varied = output_area("variations")

    def view(key, file):
        if not key or not file:
            return ""
        return show_file(uploaded_picture(file, home.load(key).model), "the picture as the model sees it")

    def draw_variations(key, file, name, strength, count, seed):
        path = uploaded_picture(file, home.load(key).model)
        drawing = run_edit(home, key, "vary", [name], int(count), int(seed or 0), picture=str(path),
                           strength=float(strength))
        return show_drawing(home, drawing)

    for trigger in (file.change, checkpoint.change):
        on(trigger, view, [checkpoint, file], [thumbnail])
    on(draw_button.click, draw_variations, [checkpoint, file, menu, strength, count, seed], varied.all())
    return menu


def part_tab(home: Home, checkpoint: gr.Dropdown) -> gr.Dropdown:
    """A part of a picture drawn anew; returns its menu of classes."""
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            file = gr.File(label="picture", file_count="single", height=140, elem_id="fill-picture")
            editor = gr.ImageEditor(label="paint what is to change", type="pil", sources=(), transforms=(),
                                    layers=False, height=460, image_mode="RGBA", visible=False,
                                    brush=gr.Brush(default_size=40, colors=["#e03030"], color_mode="fixed"))
            with gr.Accordion("Or a mask from a file", open=False):
                mask_file = gr.File(label="white is drawn anew, black stays", file_count="single", height=140,
                                    elem_id="fill-mask")
            menu = class_choice("class")
            count = gr.Slider(1, 32, 8, step=1, label="images")
            seed = gr.Number(0, label="seed", precision=0, minimum=0)
            draw_button = gr.Button("draw the part anew", variant="primary")
        with gr.Column(scale=2, min_width=300):
            filled = output_area("pictures with the part anew")

    def put_on_canvas(key, file):
        if not key or not file:
            return gr.update(value=None, visible=False)
        picture = canvas(uploaded_picture(file, home.load(key).model))
        return gr.update(value=dict(background=picture, layers=[], composite=None), visible=True)

    def draw_part(key, file, editor, mask_file, name, count, seed):
        model = home.load(key).model
        path = uploaded_picture(file, model)
        if mask_file:
            with own_name(mask_file, file):
                painted = edit.read_mask(mask_file, file, model.shape)[0].to(torch.uint8) * 255
        else:
            painted = painted_mask(editor, model.shape)
        drawing = run_edit(home, key, "inpaint", [name], int(count), int(seed or 0), picture=str(path),
                           mask=str(save_picture(painted)), jump_length=5, resamples=5)
        return show_drawing(home, drawing)

    for trigger in (file.change, checkpoint.change):
        on(trigger, put_on_canvas, [checkpoint, file], [editor])
    on(draw_button.click, draw_part, [checkpoint, file, editor, mask_file, menu, count, seed], filled.all())
    return menu


def edit_tab(home: Home) -> list[Filler]:
    """The tab that edits."""
    checkpoint = checkpoint_menu(home, "checkpoint")
    with gr.Tabs():
        with gr.Tab("Between two images"):
            menus = between_tab(home, checkpoint)
        with gr.Tab("Like a picture"):
            menus.append(vary_tab(home, checkpoint))
        with gr.Tab("A part anew"):
            menus.append(part_tab(home, checkpoint))

    fillers = [Filler(functools.partial(choose_again, home), [checkpoint], [checkpoint])]
    for menu in menus:
        fillers.append(Filler(functools.partial(class_menu, home), [checkpoint], [menu], on_select=False))
        on(checkpoint.change, fillers[-1].work, [checkpoint], [menu])
    return fillers


@dataclass
class TrainForm:
    """What is to be trained. settings: the inputs that `form_words` takes; name: one of them."""

    settings: list
    name: gr.Textbox
    tied: gr.Radio
    start: gr.Button


def train_form(places: Places) -> TrainForm:
    """The form, with its estimate of what a run would take."""
    datasets = [(f"{name}: {spec.about}", name) for name, spec in diffuser.DATASETS.items() if name != "folder"]
    dataset = gr.Dropdown([*datasets, (OWN_PICTURES, "folder")], value="digits", label="train on")
    files = gr.File(label="a ZIP file of pictures, whose folders are classes, or pictures",
                    file_count="multiple", visible=False, height=160, elem_id="train-pictures")
    recipe = gr.Radio(["preset", "best"], value="preset", label="settings",
                      info="preset: the documented ones; best: those that draw best today")
    with gr.Row():
        length = gr.Number(10, label="how long", minimum=0, min_width=100)
        unit = gr.Dropdown(list(UNITS), value="epochs", label="in", min_width=100)
    name = gr.Textbox("digits1", label="name of the run", max_length=100)
    with gr.Accordion("More", open=False):
        further = gr.Textbox("", label="other options", placeholder="--learning_rate 1e-3",
                             info="as on the command line; python diffuser.py --help all lists them")
        tied = gr.Radio([GO_ON, STOP], value=GO_ON, label="when the last page is closed")
    with gr.Row():
        plan = gr.Button("estimate", min_width=120)
        start = gr.Button("train", variant="primary", min_width=120)
    planned = gr.Code(label="before it starts", language=None, interactive=False, visible=False,
                      show_line_numbers=False, wrap_lines=True, buttons=["copy"])

    def take_dataset(dataset):
        cfg = diffuser.configure(dataset=dataset)
        option = diffuser.length_that_counts(vars(cfg))
        unit = next(unit for unit, name in UNITS.items() if name == option)
        return (gr.update(visible=dataset == "folder"),
                gr.update(visible=bool(diffuser.BEST.get(diffuser.settings_name(dataset))), value="preset"),
                getattr(cfg, option), unit, free_name(places, dataset))

    def make_plan(dataset, files, *settings):
        with tempfile.TemporaryDirectory() as folder:
            data = runs.keep_uploads(Path(folder), files or [], "plan") if dataset == "folder" else ""
            text = runs.dry_run(form_words(places, data, dataset, *settings))
        return gr.update(value=text, visible=True)

    settings = [dataset, files, recipe, length, unit, name, further]
    on(dataset.change, take_dataset, [dataset], [files, recipe, length, unit, name])
    on(plan.click, make_plan, settings, [planned])
    return TrainForm(settings, name, tied, start)


def form_words(places: Places, data: Path | str, dataset: str, recipe: str, length: float | None, unit: str, name: str,
               further: str) -> list[str]:
    """The command line that the form stands for; data: where pictures of one's own are."""
    options = dict(mode="train", dataset=dataset, path_to_data=str(data),
                   recipe="best" if recipe == "best" else "", experiment_name=name.strip(), **places.options())
    if length is not None:
        if length <= 0:
            raise UserError("how long: more than 0, please")
        if unit != "minutes" and length != int(length):
            raise UserError(f"how long: a whole number of {unit}, please")
        options[UNITS[unit]] = float(length) if unit == "minutes" else int(length)
    return runs.to_words(options) + runs.parse_further(further)


def start_from_form(places: Places, dataset: str, files: list[str] | None, *settings) -> str:
    """Start the run that the form stands for; returns its key. Raises UserError."""
    name = settings[3].strip()
    if not name or "/" in name or "\\" in name:
        raise UserError("give the run a name, without slashes")
    # First what can be wrong, then what takes room on the disk.
    data = ""
    if dataset == "folder":
        runs.check_words(form_words(places, "uploads", dataset, *settings))
        data = runs.keep_uploads(places.data / "uploads", files or [], file_name(name))
    try:
        return runs.start_run(form_words(places, data, dataset, *settings))
    except UserError:
        if data:
            runs.remove(data)                                    # no run has it
        raise


@dataclass
class WatchArea:
    """A run being watched. watched: its key; seen: what of it the page shows already."""

    watched: gr.Dropdown
    seen: gr.State


def watch_area(places: Places, pages: Pages) -> WatchArea:
    """What is to be seen of a run, and the buttons that stop it and go on with it."""
    watched = gr.Dropdown([], label="run", info="those that train come first")
    progress = gr.HTML()
    with gr.Row():
        stop = gr.Button("stop and save", min_width=120, interactive=False)
        resume = gr.Button("resume", min_width=120, interactive=False)
    grid = gr.HTML()
    which = gr.Slider(1, 2, 1, step=1, label="grid of samples", visible=False)
    curves = gr.HTML()
    log = gr.Code(label="what the run says", language=None, interactive=False, show_line_numbers=False,
                  wrap_lines=True, buttons=["copy"])
    seen = gr.State({})
    timer = gr.Timer(1.0)

    view = [progress, stop, resume, grid, which, curves, log, seen]
    look = functools.partial(look_at_run, places)
    on(timer.tick, look, [watched, which, seen], view)
    on(watched.change, look, [watched, which, seen], view)
    on(which.input, lambda key, place: show_grid(runs.find_run(places, key), place), [watched, which], [grid],
       trigger_mode="always_last")

    def stop_watched(key):
        gr.Info(escape(runs.stop_run(runs.find_run(places, key))))
        return gr.update(interactive=False)

    def resume_watched(key):
        run = runs.find_run(places, key)
        runs.resume_run(places, run)
        if key in pages.once_tied:
            pages.tie(key)
        return {}

    on(stop.click, stop_watched, [watched], [stop])
    on(resume.click, resume_watched, [watched], [seen])
    return WatchArea(watched, seen)


def look_at_run(places: Places, key: str | None, place: int, seen: dict) -> tuple:
    """What is new of a run since the last look, for the parts of a `watch_area`, and what is now seen of it.

    place: the grid that is shown; it follows the newest one until somebody moves it.
    """
    unchanged = gr.skip()
    if not key:
        return note("There is no run yet."), *(unchanged,) * 6, {}
    try:
        run = runs.find_run(places, key)
    except UserError as error:                                   # it may have been deleted
        off = gr.update(interactive=False)
        return note(str(error)), off, off, *(unchanged,) * 4, {}
    now = dict(key=key, rows=len(run.rows), grids=len(run.grids), status=run.status, words=runs.last_words(run))
    another = seen.get("key") != key

    def changed(name: str) -> bool:
        return another or seen[name] != now[name]

    shown_grid = slider = unchanged
    if changed("grids"):
        newest = max(1, len(run.grids))
        if another or place >= seen["grids"]:
            place = newest
        shown_grid = show_grid(run, place)
        slider = gr.update(maximum=max(2, newest), value=place, visible=newest > 1)
    can_stop = can_resume = unchanged
    if changed("status"):
        can_stop = gr.update(interactive=run.process is not None)
        can_resume = gr.update(interactive=run.status == "stopped")
    drawn_curves = draw_curves(run) if changed("rows") else unchanged
    words = now["words"] if changed("words") else unchanged
    return describe_progress(run), can_stop, can_resume, shown_grid, slider, drawn_curves, words, now


def train_tab(home: Home, pages: Pages) -> list[Filler]:
    """The tab that trains and watches."""
    places = home.places
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            form = train_form(places)
        with gr.Column(scale=2, min_width=300):
            area = watch_area(places, pages)

    def begin(tied, *settings):
        key = start_from_form(places, *settings)
        if tied == STOP:
            pages.tie(key)
        choices = run_choices(runs.read_runs(places))
        return gr.update(choices=choices, value=key), {}, free_name(places, settings[0])

    def fill(key, name):
        free = free_name(places, "digits") if name == "digits1" else gr.skip()
        return keep_choice(run_choices(runs.read_runs(places)), key), free

    on(form.start.click, begin, [form.tied, *form.settings], [area.watched, area.seen, form.name])
    return [Filler(fill, [area.watched, form.name], [area.watched, form.name])]


def run_choices(there: list[Run]) -> list[tuple[str, str]]:
    """(title, key) of runs."""
    return list(zip(runs.titles(there), [run.key for run in there]))


def free_name(places: Places, dataset: str) -> str:
    """A name for a run that none has had here."""
    beginning = "pictures" if dataset == "folder" else dataset
    number = 1
    while (places.checkpoints / f"{beginning}{number}").exists() or any(
            places.samples.glob(f"*samples_{beginning}{number}_*")):
        number += 1
    return f"{beginning}{number}"


def runs_tab(home: Home) -> list[Filler]:
    """The tab that compares runs."""
    places = home.places
    table = gr.Dataframe(label="runs", interactive=False, max_height=420, buttons=["copy"])
    chosen = gr.CheckboxGroup([], label="which", info="curves: of all that are chosen; report: of the first")
    with gr.Row():
        compare = gr.Button("curves", variant="primary", min_width=120)
        read = gr.Button("report", min_width=120)
        delete = gr.Button("delete ...", variant="stop", min_width=120)
    with gr.Group(visible=False) as question:
        listing = gr.HTML(padding=True)
        with gr.Row():
            yes = gr.Button("delete them for good", variant="stop", min_width=120)
            no = gr.Button("keep them", min_width=120)
    doomed = gr.State([])
    figure = gr.HTML()

    def runs_of(keys):
        if not keys:
            raise UserError("choose runs first")
        return [runs.find_run(places, key) for key in keys]

    def fill(keys):
        there = runs.read_runs(places)
        headings, rows = runs.table_of_runs(there)
        left = [run.key for run in there if run.key in keys]
        return (gr.update(value=dict(headers=headings, data=rows)),
                gr.update(choices=run_choices(there), value=left))

    def ask(keys):
        lines = [f"{run.name}: {', '.join(map(str, runs.parts_of(places, run)))}" for run in runs_of(keys)]
        text = "<p>This cannot be undone. It deletes:</p>" + "".join(note(line) for line in lines)
        return gr.update(visible=True), text, keys

    def do_delete(keys):
        for run in runs_of(keys):
            try:
                runs.delete_run(places, run)
            except UserError as error:
                gr.Warning(escape(str(error)))
        return gr.update(visible=False), [], "", *fill([])

    on(compare.click, lambda keys: show_overlay(runs_of(keys)), [chosen], [figure])
    on(read.click, lambda keys: show_report(runs_of(keys)[0]), [chosen], [figure])
    on(delete.click, ask, [chosen], [question, listing, doomed])
    on(yes.click, do_delete, [doomed], [question, doomed, figure, table, chosen])
    on(no.click, lambda: (gr.update(visible=False), []), None, [question, doomed])
    return [Filler(fill, [chosen], [table, chosen])]


class Pages:
    """The pages that are open, and the runs that are to stop when the last one is closed, or when the program ends.

    A page gives a sign of life every SIGN_SECONDS. tied: keys of runs; once_tied: also of those that were stopped.
    """

    def __init__(self, places: Places):
        self.places = places
        self.lock = threading.Lock()
        self.seen: dict[str, float] = {}                         # when each page has last given a sign of life
        self.tied: set[str] = set()
        self.once_tied: set[str] = set()

    def sign(self, request: gr.Request) -> None:
        """A page is open."""
        with self.lock:
            self.seen[request.session_hash] = time.monotonic()

    def closed(self, request: gr.Request) -> None:
        """A page is gone, as far as the connection tells; it may come back at once, or give its sign."""
        with self.lock:
            self.seen.pop(request.session_hash, None)
        self.look_later()

    def look_later(self) -> None:
        """Stop the tied runs after a while, unless a page is open then."""
        timer = threading.Timer(GRACE, self.stop_tied)
        timer.daemon = True
        timer.start()

    def tie(self, key: str) -> None:
        """Let a run stop with the pages."""
        with self.lock:
            self.tied.add(key)
            self.once_tied.add(key)

    def stop_tied(self, always: bool = False) -> list[Run]:
        """Stop the runs that are tied to the pages, unless one is open; returns those that save now."""
        with self.lock:
            recent = time.monotonic() - 4 * SIGN_SECONDS         # browsers slow the clocks of hidden pages down
            if not always and any(seen > recent for seen in self.seen.values()):
                if self.tied:                                    # that page may be gone without having said so
                    self.look_later()
                return []
            keys = self.tied.copy()
            self.tied.clear()
        stopped = []
        for key in keys:
            with suppress(UserError):
                run = runs.find_run(self.places, key)
                if run.process is not None:                      # it may have ended by itself
                    runs.stop_run(run)
                    stopped.append(run)
        return stopped


class OwnPagesOnly:
    """Middleware: lets other sites' pages, which a visitor may have open beside this one, do nothing here.

    hosts: names by which the page may be called, none for any, as behind a password. What gradio would fetch from the
    internet for whoever asks is refused, too, and uploads that are too large.
    """

    def __init__(self, app: Callable, hosts: tuple[str, ...] = (), behind_proxy: bool = False):
        self.app = app
        self.hosts = hosts
        self.behind_proxy = behind_proxy

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        reason = self.refusal(scope) if scope["type"] in ("http", "websocket") else ""
        if reason:
            await PlainTextResponse(reason, 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def refusal(self, scope: dict) -> str:
        """Why a request is refused; empty where it is not."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if self.hosts and urllib.parse.urlsplit(f"//{host}").hostname not in self.hosts:
            return "this page is for its own machine"
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return "this page is not for other sites"
        origin = headers.get("origin")
        if origin and not self.behind_proxy and origin.partition("://")[2] != host:
            return "this page is not for other sites"

        path = urllib.parse.unquote(scope["path"]).lower()
        if "/proxy=" in path or ("file=" in path and "//" in path.partition("file=")[2][:10]):
            return "nothing is fetched from elsewhere"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > UPLOAD_SIZE:
            return "this is too large"
        return ""


def build_page(home: Home, pages: Pages) -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="diffuser", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw") as draw_on:
                fillers = {draw_on: draw_tab(home, tabs)}
            with gr.Tab("Edit", id="edit") as edit_on:
                fillers[edit_on] = edit_tab(home)
            if not home.space:
                with gr.Tab("Train", id="train") as train_on:
                    fillers[train_on] = train_tab(home, pages)
                with gr.Tab("Runs", id="runs") as runs_on:
                    fillers[runs_on] = runs_tab(home)

        # What there is may have changed since the page was made.
        for tab, several in fillers.items():
            for filler in several:
                on(page.load, filler.work, filler.inputs, filler.outputs)
                if filler.on_select:
                    on(tab.select, filler.work, filler.inputs, filler.outputs)
        # Signs of life.
        page.load(pages.sign, None, None, api_visibility="private")
        gr.Timer(SIGN_SECONDS).tick(pages.sign, None, None, api_visibility="private", show_progress="hidden")
        page.unload(pages.closed)
    return page


# ---- Command line ------------------------------------------------------------------------------


def build_parser() -> Parser:
    """The flags."""
    parser = Parser("app.py", usage="python app.py [options]", doc=__doc__)
    add = parser.add_argument
    add("--host", default="", metavar="ADDRESS", help="where to listen [127.0.0.1: for this machine alone]")
    add("--port", type=int, default=0, metavar="N", help="[the first free one from 7860 on]")
    add("--password", default=os.environ.get("DIFFUSER_PASSWORD", ""),
        help="what a visitor has to know [that in the variable DIFFUSER_PASSWORD]")
    add("--share", action="store_true", help="a public address by way of gradio's servers, with --password")
    add("--open", action="store_true", help="open the page in a browser")
    add("--working_directory", default="checkpoints", metavar="PATH", help="where checkpoints are [checkpoints]")
    add("--generated_directory", default="samples", metavar="PATH", help="where samples are [samples]")
    add("--data_dir", default="data", metavar="PATH", help="where datasets are, and uploads go [data]")
    add_debug(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError for a page that everybody could use."""
    if args.host not in ("", "127.0.0.1", "localhost", "::1") and not args.password:
        raise UserError(f"--host {args.host} shows the page to other machines: give a --password, too")
    if args.share and not args.password:
        raise UserError("--share shows the page to the whole internet: give a --password, too")
    if args.port and not 1 <= args.port <= 65535:
        raise UserError("--port lies between 1 and 65535")


def refuse_other_formats() -> None:
    """Let Pillow open no other pictures than the project does: some formats start programs."""
    Image.init()
    Image.ID[:] = [name for name in Image.ID if name in FORMATS]
    Image.MAX_IMAGE_PIXELS = 2**26


def refuse_downloads() -> None:
    """Let gradio fetch nothing from the internet: it takes addresses in place of files, from whoever asks."""
    async def refuse(url: str, cache_dir: str) -> str:
        raise gr.Error("nothing is fetched from elsewhere")

    gr.processing_utils.async_ssrf_protected_download = refuse


def serve(args: argparse.Namespace) -> None:
    """Show the page until Ctrl-C."""
    check(args)
    refuse_other_formats()
    refuse_downloads()
    for number in (signal.SIGINT, signal.SIGTERM):               # also where they were ignored, as behind a &
        signal.signal(number, signal.default_int_handler)

    space = SPACE_MODEL.is_file()
    if space:
        print(f"{SPACE_MODEL} is here: the page draws and edits with it alone", flush=True)
    places = Places(Path(args.working_directory), Path(args.generated_directory), Path(args.data_dir))
    pages = Pages(places)
    page = build_page(Home(places, space), pages)

    # Who may come.
    in_the_cloud = space and bool(os.environ.get("SPACE_ID"))
    host = args.host or ("0.0.0.0" if in_the_cloud else "127.0.0.1")
    loopback = ("127.0.0.1", "localhost", "::1")
    local = loopback if host in loopback and not (args.share or in_the_cloud) else ()
    guard = Middleware(OwnPagesOnly, hosts=local, behind_proxy=in_the_cloud or args.share)
    auth = None
    if args.password:
        async def auth(_, password: str) -> bool:
            known = hmac.compare_digest(password.encode(), args.password.encode())
            if not known:
                await asyncio.sleep(0.5)                         # slows guessing down
            return known

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        page.launch(server_name=host, server_port=args.port or None, auth=auth, share=args.share, inbrowser=args.open,
                    auth_message="any name, and the password" if auth else None, quiet=True, prevent_thread_lock=True,
                    max_file_size=UPLOAD_SIZE, ssr_mode=False, theme=theme, css=CSS, show_error=True, footer_links=[],
                    app_kwargs=dict(middleware=[guard]))
    except OSError as error:
        raise UserError(f"the page cannot be served: {first_line(error)}; try another --port", code=1) from error
    print(f"{page.local_url}    Ctrl-C ends it", flush=True)

    with suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)                                        # not without end: another thread may get the Ctrl-C
    end(page, pages)


def end(page: gr.Blocks, pages: Pages) -> None:
    """Stop the runs that are tied to the page, wait until they have saved, and end the process."""
    stopped = pages.stop_tied(always=True)
    if stopped:
        print(f"stopping {', '.join(run.name for run in stopped)}, which takes a moment", flush=True)
    while any(runs.process_of(run.folder) is not None for run in stopped):
        time.sleep(0.2)
    page.close(verbose=False)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    sys.stdout.flush()
    os._exit(0)                                                  # a drawing under way would hold up the usual end


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_script("app", lambda: build_parser().parse_args(argv), serve, diffuser.explain)


if __name__ == "__main__":
    end_process(main)
