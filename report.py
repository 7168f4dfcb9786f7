#!/usr/bin/env python3
"""Make report.html: one page with everything a training run left.

    python report.py DIR [DIR ...]     write DIR/report.html for each of these runs
    python report.py                   list the runs found here and ask for which

The page needs no other file and no network. It is made from what the run's folder holds: the grids of samples, the
denoising strips, metrics.csv and config.json. Any of them may be missing or broken; the page then shows the rest.
"""

from __future__ import annotations

# signal itself imports others first, and Ctrl-C would print a traceback there.
import _signal

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)              # Ctrl-C during the imports: no traceback

import argparse
import base64
import io
import json
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from statistics import median

from diffuser_lib.files import (
    Parser,
    UserError,
    add_debug,
    end_process,
    read_json_object,
    run_script,
    write_atomically,
)
from plot_loss import (
    COLOURS,
    Point,
    Row,
    ask_for_runs,
    axis_name,
    can_open_windows,
    draw_panel,
    drawable,
    find_grids,
    load_run,
    number,
    read_metrics,
    series,
    wants_log_axis,
)

MOST_GRIDS = 60
MOST_ROWS = 100

# Title of a figure: {label of a curve: column of metrics.csv}.
FIGURES = {
    "Training and validation": {"training": "loss", "validation": "val_loss"},
    "By quartile of the timestep": {"q1 (least noise)": "loss_q1", "q2": "loss_q2", "q3": "loss_q3",
                                    "q4 (most noise)": "loss_q4"},
    "Distance of drawn images to real ones": {"distance": "distance"},
    "Drawn images taken for their class": {"accuracy": "accuracy"},
}
# What the machine did, by columns of metrics.csv: {column: (name, how its values become one, unit)}.
LOAD = {
    "machine/cpu_percent": ("use of all CPUs", median, "%"),
    "machine/memory_gib": ("memory", max, "GiB"),
    "machine/gpu_percent": ("use of the GPU", median, "%"),
    "machine/gpu_memory_gib": ("memory of the GPU", max, "GiB"),
}

INK = "#010203"                                                  # drawn in this colour: takes that of the page's text
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 12, "legend.fontsize": 12,
         "lines.linewidth": 2, "text.usetex": False, "text.color": INK, "axes.edgecolor": INK,
         "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": INK}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}</title>
<style>
:root { color-scheme: light dark; --page: #fdfdfc; --text: #1d2126; --muted: #59616a; --line: #d8dce0;
        --accent: #0b5cad }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --text: #e4e7ea; --muted: #a2abb4; --line: #363c43; --accent: #7db7f0 } }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 70rem; background: var(--page); color: var(--text);
       font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25 }
h2 { margin: 3rem 0 1rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); font-size: 1.2rem }
h3 { margin: 0 0 .5rem; font-size: 1rem }
p { margin: .5rem 0 }
figure { margin: 0 }
img { display: block; max-width: 100% }
[hidden] { display: none }
figcaption, header p, summary, .note { color: var(--muted) }
div + figcaption, svg + figcaption { margin-top: .5rem }
.slider { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem 1rem; min-height: 1.75rem;
          margin-bottom: .75rem }
.slider input { flex: 1 1 12rem; max-width: 32rem; min-height: 1.75rem; accent-color: var(--accent) }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 2rem }
.curves figure { max-width: 32rem }
svg { display: block; width: 100%; height: auto }
svg text { font-family: system-ui, sans-serif !important }
details { margin-top: 1.5rem }
summary { cursor: pointer }
.pictures { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1.5rem 2rem }
.pictures > figure { max-width: min(100%, max(calc(50% - 1rem), 24rem)) }
.pictures > figure:only-of-type { max-width: 100% }
.frames { display: flex; flex-wrap: wrap; gap: .5rem .25rem; margin: 0; padding: 0; list-style: none }
pre { margin: .75rem 0 1.5rem; white-space: pre-wrap; font-size: .8125rem }
.scroll { overflow: auto; max-height: 32rem; overflow-wrap: normal }
.scroll img { max-width: none }
details .scroll { margin-top: .75rem; border: 1px solid var(--line) }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 3px }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .5rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { font-weight: 600 }
.numbers th, .numbers td { padding: .3rem .75rem; text-align: right; white-space: nowrap }
.numbers th { position: sticky; top: 0; background: var(--page) }
.pairs { width: 100%; max-width: 40rem }
.pairs th { width: 35%; font-weight: 400; color: var(--muted) }
.columns { columns: 20rem; column-gap: 3rem }
.columns th { width: 62% }
tr { break-inside: avoid }
</style>
</head>
<body>
{% macro pairs(rows) %}
<table class="pairs">
{% for name, value in rows.items() %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endmacro %}
<header>
<h1>{{ name }}</h1>
<p>{{ summary | join(" · ") }}</p>
</header>
<main>
<section aria-labelledby="samples">
<h2 id="samples">Samples</h2>
<div class="pictures">
{% if grids %}
<figure>
<figcaption class="slider">
{% if grids | length > 1 %}
<label for="epoch" hidden>Epoch</label>
<input type="range" id="epoch" min="0" max="{{ grids | length - 1 }}" value="{{ grids | length - 1 }}" \
autocomplete="off" aria-valuetext="{{ grids[-1].title }}" hidden>
{% endif %}
<output>{{ grids[-1].title }}</output>
</figcaption>
{% for grid in grids %}
<img src="{{ grid.data }}" alt="Samples: {{ grid.title }}" data-title="{{ grid.title }}"\
{{ "" if loop.last else " hidden" }}>
{% endfor %}
</figure>
{% else %}
<p>This run has no grids of samples.</p>
{% endif %}
{% if real %}
<figure>
<figcaption class="slider">Images of the data</figcaption>
<img src="{{ real }}" alt="Images that the run was trained on">
</figure>
{% endif %}
</div>
{% if grids | length < grid_count %}
<p class="note">{{ grids | length }} of {{ grid_count }} grids, evenly chosen.</p>
{% endif %}
</section>
<section aria-labelledby="loss">
<h2 id="loss">Loss</h2>
<div class="curves">
{% for figure in figures %}
<figure>
<h3>{{ figure.title }}</h3>
{% if figure.svg %}
{{ figure.svg | safe }}
{% endif %}
{% if figure.left_out %}
<figcaption>Not in the curves: {{ figure.left_out }} non-finite or too large (nan, inf or beyond 1e100).</figcaption>
{% endif %}
</figure>
{% else %}
<p>This run has no losses.</p>
{% endfor %}
</div>
{% if rows %}
<details>
<summary>Numbers, from {{ source }}{% if rows | length < row_count %}: {{ rows | length }} of {{ row_count }} rows, \
evenly chosen{% endif %}</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Table of numbers">
<table class="numbers">
<thead><tr>{% for column in rows[0] %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</details>
{% endif %}
</section>
{% if strip %}
<section aria-labelledby="denoising">
<h2 id="denoising">Denoising</h2>
<figure>
{% if strip.frames %}
<ol class="frames">
{% for frame in strip.frames %}
<li><img src="{{ frame }}" alt="Denoising at step {{ strip.step }}, {{ loop.index }} of \
{{ strip.frames | length }}"></li>
{% endfor %}
</ol>
<figcaption>After {{ strip.step }} steps of training: each column is a moment on the way from noise, the first one, to \
the images, the last one.</figcaption>
{% else %}
<div class="scroll" tabindex="0" role="region" aria-label="Denoising strip">
<img src="{{ strip.data }}" alt="Denoising at step {{ strip.step }}, from noise to samples">
</div>
<figcaption>After {{ strip.step }} steps of training: each row is one sample, from noise on the left to the image on \
the right.</figcaption>
{% endif %}
</figure>
</section>
{% endif %}
{% if machine %}
<section aria-labelledby="machine">
<h2 id="machine">Machine and timings</h2>
{{ pairs(machine) }}
</section>
{% endif %}
{% if settings or chosen or command %}
<section aria-labelledby="settings">
<h2 id="settings">Settings</h2>
{% if command %}
<p>Repeat it with</p>
<pre><code>{{ command }}</code></pre>
{% endif %}
{% if chosen %}
<h3>Chosen, other than the dataset has by default</h3>
{{ pairs(chosen) }}
{% endif %}
{% if chosen_known %}
<details>
<summary>All {{ settings | length }} settings</summary>
<div class="columns">{{ pairs(settings) }}</div>
</details>
{% else %}
<div class="columns">{{ pairs(settings) }}</div>
{% endif %}
</section>
{% endif %}
</main>
{% if grids | length > 1 %}
<script>
const slider = document.getElementById("epoch")
const grids = document.querySelectorAll("img[data-title]")
function show() {
  grids.forEach((grid, place) => { grid.hidden = place !== slider.valueAsNumber })
  const title = grids[slider.valueAsNumber].dataset.title
  document.querySelector("output").textContent = title
  slider.setAttribute("aria-valuetext", title)
}
slider.addEventListener("input", show)
document.querySelectorAll(".slider [hidden]").forEach(part => { part.hidden = false })
</script>
{% endif %}
</body>
</html>
"""

# ---- What the folder holds ---------------------------------------------------------------------


def read_config(folder: Path) -> dict:
    """What config.json holds; nothing where it cannot be read."""
    try:
        return read_json_object(folder / "config.json")
    except (OSError, ValueError):
        return {}


def read_part(config: dict, name: str) -> dict[str, str]:
    """One table of config.json as texts: JSON, but strings as they are unless empty."""
    part = config.get(name)
    if not isinstance(part, dict):
        return {}

    texts = {}
    for key, value in part.items():
        plain = isinstance(value, str) and value != ""
        texts[key] = value if plain else json.dumps(value)
    return texts


def png_address(content: bytes) -> str:
    """The content of a PNG file as the address of an <img>."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def embed(path: Path) -> str:
    """A PNG file as the address of an <img>. Raises OSError."""
    return png_address(path.read_bytes())


def read_strip(folder: Path) -> dict | None:
    """The last denoising strip: its step, the picture and its frames; None where there is none. Raises OSError."""
    strips = {}                                                  # step: name of the file
    for name in os.listdir(folder):
        match = re.fullmatch(r"step_(\d+)\.png", name)
        if match:
            strips[match[1]] = name
    if not strips:
        return None

    last = max(strips, key=int)
    path = folder / strips[last]
    return dict(step=last, data=embed(path), frames=cut_strip(path))


def cut_strip(path: Path) -> list[str]:
    """The frames of a denoising strip as data URIs, so that a page can wrap them; none where it cannot be cut."""
    try:
        from PIL import Image

        with Image.open(path, formats=["PNG"]) as picture:
            picture.load()
        places = find_frames(picture.convert("L"))
    except Exception:                                            # no Pillow, or no picture: it is shown as it is
        return []

    frames = []
    for left, right in places:
        file = io.BytesIO()
        picture.crop((left, 0, right, picture.height)).save(file, "PNG")
        frames.append(png_address(file.getvalue()))
    return frames


def find_frames(picture) -> list[tuple[int, int]]:
    """(left, right) of the frames of a strip, a grey PIL image; none where it has no frames side by side.

    White lines from top to bottom part frames of equal widths. A frame may have white columns of its own, such as the
    last one of a drawing on paper, but not the first one, which is noise.
    """
    import numpy as np

    white = np.asarray(picture).min(axis=0) == 255               # of each column, whether all of it is
    gap = int(np.argmin(white))                                  # the same on both sides of each frame
    width = int(np.argmax(white[gap:]))                          # of the first frame
    period = gap + width
    if gap == 0 or width == 0 or (picture.width - gap) % period:
        return []

    starts = range(gap, picture.width, period)
    parted = all(white[start + width : start + period].all() for start in starts)
    return [(start, start + width) for start in starts] if parted else []


# ---- Numbers -----------------------------------------------------------------------------------


def evenly(items: Sequence, most: int) -> Sequence:
    """At most `most` (2 or more) of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return items
    last = len(items) - 1
    return [items[round(i * last / (most - 1))] for i in range(most)]


def describe(rows: list[Row], column: str) -> str:
    """The last value of a column that has values, and the best one, in words: the lowest, or an accuracy's highest."""
    points = series(rows, column)
    last = f"{points[-1][1]:.4g}"
    numbers = drawable(points)
    if not numbers:
        return last

    word, choose = ("highest", max) if column == "accuracy" else ("lowest", min)
    x, best = choose(numbers, key=lambda point: point[1])
    return f"{last} ({word} {best:.4g} at {axis_name(rows)} {x:.10g})"


def duration(seconds: float) -> str:
    """A time in its two largest units: '44 s', '1 h 7 min'."""
    if not math.isfinite(seconds):                               # a sum of numbers that were spoilt
        return "unknown"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    amounts = {"d": days, "h": hours, "min": minutes, "s": seconds}
    parts = [f"{amount} {unit}" for unit, amount in amounts.items() if amount]
    return " ".join(parts[:2]) or "0 s"


def measure_time(rows: list[Row], config: dict) -> dict[str, str]:
    """The time and the speed of a run by name, as far as they are known."""
    whole = number(config.get("seconds"))
    parts = [seconds for _, seconds in drawable(series(rows, "seconds"))]
    speeds = [speed for _, speed in drawable(series(rows, "images_per_second"))]

    times = {}
    if math.isfinite(whole):
        times["training time"] = duration(whole)
    elif parts:
        times["time in training steps"] = duration(sum(parts))
    if speeds:
        times["median images/s"] = f"{median(speeds):.4g}"
    return times


def measure_load(rows: list[Row]) -> dict[str, str]:
    """What the machine did by name, as far as it is known."""
    load = {}
    for column, (name, reduce, unit) in LOAD.items():
        values = [value for _, value in drawable(series(rows, column))]
        if values:
            load[name] = f"{reduce(values):.3g} {unit}"
    return load


def describe_sizes(config: dict) -> list[str]:
    """The sizes of data and network that config.json knows, in words."""
    def whole(value: object) -> bool:
        return type(value) is int and value >= 0

    images = config.get("images")
    shape = config.get("shape")
    classes = config.get("classes")
    parameters = config.get("parameters")

    facts = []
    if whole(images):
        size = ""
        if isinstance(shape, list) and len(shape) == 3 and all(map(whole, shape)):
            size = f" of {shape[1]}x{shape[2]}x{shape[0]}"
        facts.append(f"{images:,} images{size}")
    if whole(classes):
        facts.append(f"{classes:,} classes" if classes else "no classes")
    if whole(parameters):
        facts.append(f"{parameters:,} parameters")
    return facts


def summarize(rows: list[Row], dataset: str | None, times: dict[str, str]) -> list[str]:
    """The facts of a run, a few words each."""
    facts = []
    if dataset:
        facts.append(dataset)

    last = rows[-1] if rows else {}
    for name in ("epoch", "step"):
        if last.get(name):
            facts.append(f"{name} {number(last[name]):.10g}")

    for column, name in (("loss", "loss"), ("val_loss", "validation loss"), ("accuracy", "class accuracy"),
                         ("distance", "distance to real images")):
        if series(rows, column):
            facts.append(f"{name} {describe(rows, column)}")

    for name, value in times.items():
        facts.append(f"{name} {value}")
    return facts


# ---- The page ----------------------------------------------------------------------------------


def draw(curves: dict[str, list[Point]], xlabel: str, text: str, prefix: str, ylabel: str = "loss") -> str:
    """{label: points} as an SVG element that takes the colour of the page's text.

    text: stands in its place for those who cannot see it; prefix: its ids begin with it, so that several fit on one
    page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    everything = [point for points in curves.values() for point in points]
    log = wants_log_axis(everything)

    # Draw, in colours and lines that differ.
    cycle = matplotlib.cycler(color=COLOURS[:4], ls=["-", "--", "-.", ":"])
    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": cycle}):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.add_subplot()
        draw_panel(axes, curves.items(), "", log, ylabel)
        axes.set_xlabel(xlabel)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)

    # Fit it into the page: its colour, its ids and what refers to them, its text; nothing before the element.
    svg = file.getvalue().replace(INK, "currentColor")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", svg)
    rest = svg.partition("<svg")[2]
    return f'<svg role="img" aria-label="{escape(text)}"{rest}'


def make_figures(rows: list[Row]) -> list[dict]:
    """The figures that the rows have values for, each as title, svg and left_out.

    svg: empty without a drawable value; left_out: how many values are not in it because no axis holds them.
    """
    figures = []
    for place, (title, columns) in enumerate(FIGURES.items()):
        # Collect the curves, and what they show in words.
        curves = {}
        texts = []
        left_out = 0
        for label, column in columns.items():
            points = series(rows, column)
            numbers = drawable(points)
            left_out += len(points) - len(numbers)
            if numbers:
                curves[label] = numbers
                texts.append(f"{label} {describe(rows, column)}")

        # Draw them.
        svg = ""
        if curves:
            ylabel = "loss" if "loss" in "".join(columns.values()) else "score"
            svg = draw(curves, axis_name(rows), "; ".join(texts), f"figure{place}", ylabel)
        if svg or left_out:
            figures.append(dict(title=title, svg=svg, left_out=left_out))
    return figures


def render(folder: Path) -> str:
    """The report of a run's folder as HTML. Raises OSError where the folder cannot be read."""
    from jinja2 import Environment

    # Numbers: those of metrics.csv or, without it, those in the names of the grids.
    found = find_grids(folder)
    metrics = read_metrics(folder)
    rows = metrics or [grid.groupdict() for grid in found]
    source = "metrics.csv" if metrics else "the names of the grids"

    # Tables: settings, machine, timings.
    config = read_config(folder)
    settings = read_part(config, "config")
    command = config.get("command")
    machine = read_part(config, "machine")
    if "torch" in config:
        machine["torch"] = str(config["torch"])
    times = measure_time(rows, config)

    # Pictures.
    grids = []
    for grid in evenly(found, MOST_GRIDS):
        title = f"epoch {grid['epoch']}, loss {grid['loss']}"
        with suppress(OSError):                                  # one that cannot be read is left out
            grids.append(dict(title=title, data=embed(folder / grid[0])))

    real = folder / "real.png"

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    return page.render(
        name=folder.resolve().name,
        summary=summarize(rows, settings.get("dataset"), times) + describe_sizes(config),
        grids=grids,
        grid_count=len(found),
        figures=make_figures(rows),
        rows=evenly(rows, MOST_ROWS),
        row_count=len(rows),
        source=source,
        strip=read_strip(folder),
        real=embed(real) if real.is_file() else "",
        machine={**machine, **times, **measure_load(rows)},
        settings=settings,
        chosen=read_part(config, "chosen"),
        chosen_known="chosen" in config,
        command=command if isinstance(command, str) else "",
    )


def write_report(folder: str | Path) -> Path:
    """Write report.html into a run's folder; returns its path.

    An old report is replaced when the new one is whole or, on failure, left as it is. Raises OSError where the folder
    cannot be read or written.
    """
    path = Path(folder) / "report.html"
    page = render(path.parent).encode(errors="replace")          # names of files need not be Unicode
    write_atomically(path, lambda file: file.write(page))
    return path


# ---- Command line ------------------------------------------------------------------------------


def build_parser() -> Parser:
    """The flags."""
    parser = Parser("report.py", usage="python report.py [DIR ...] [options]", doc=__doc__)
    add = parser.add_argument
    add("directories", nargs="*", type=Path, metavar="DIR", help="sample folders; none: asks")
    add("--samples_dir", default="samples", metavar="PATH", help="where to look for runs (default: samples)")
    add_debug(parser)
    return parser


def work(options: argparse.Namespace) -> None:
    """Write and announce the report of each run."""
    directories = options.directories or ask_for_runs(options.samples_dir, can_open_windows(), "report")
    for directory in directories:
        # A run has metrics or grids; load_run says what is wrong where there are none of either.
        if not os.path.isfile(directory / "metrics.csv"):
            load_run(directory)
    for directory in directories:
        try:
            path = write_report(directory)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise UserError(f"cannot write the report of {directory}: {place}{error.strerror or error}") from error
        print(f"saved {path}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_script("report", lambda: build_parser().parse_args(argv), work)


if __name__ == "__main__":
    end_process(main)
