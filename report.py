"""The report of a training run: one HTML page that needs no other file and no network.

It is made from what the run's folder holds: the grids of samples, the denoising strips, metrics.csv and config.json.
Any of them may be missing or broken; the page then shows the rest.
"""

import base64
import csv
import io
import json
import math
import os
import re
from html import escape
from pathlib import Path
from statistics import median

from plot_loss import COLOURS, draw_panel, find_grids, finite, wants_log_axis

MOST_GRIDS = 60
MOST_ROWS = 100
FIGURES = {  # title: {label: column of metrics.csv}
    "Training and validation": {"training": "loss", "validation": "val_loss"},
    "By quartile of the timestep": {"q1 (least noise)": "loss_q1", "q2": "loss_q2", "q3": "loss_q3",
                                    "q4 (most noise)": "loss_q4"},
}
INK = "#010203"  # what matplotlib draws in this colour takes the colour of the page's text
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
.slider { display: flex; flex-wrap: wrap; align-items: center; gap: .25rem 1rem; margin-bottom: .75rem }
.slider input { flex: 1 1 12rem; max-width: 32rem; min-height: 1.75rem; accent-color: var(--accent) }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 2rem }
.curves figure { max-width: 32rem }
svg { display: block; width: 100%; height: auto }
svg text { font-family: system-ui, sans-serif !important }
details { margin-top: 1.5rem }
summary { cursor: pointer }
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
{% if grids | length < grid_count %}
<p class="note">{{ grids | length }} of {{ grid_count }} grids, evenly chosen.</p>
{% endif %}
{% else %}
<p>This run has no grids of samples.</p>
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
<figcaption>Not in the curves: {{ figure.left_out }} non-finite (nan or inf).</figcaption>
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
<div class="scroll" tabindex="0" role="region" aria-label="Denoising strip">
<img src="{{ strip.data }}" alt="Denoising at step {{ strip.step }}, from noise to samples">
</div>
<figcaption>After {{ strip.step }} steps of training: each row is one sample, from noise on the left to the image on \
the right.</figcaption>
</figure>
</section>
{% endif %}
{% if machine %}
<section aria-labelledby="machine">
<h2 id="machine">Machine and timings</h2>
{{ pairs(machine) }}
</section>
{% endif %}
{% if settings %}
<section aria-labelledby="settings">
<h2 id="settings">Settings</h2>
<div class="columns">{{ pairs(settings) }}</div>
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


# ---- what the folder holds ----------------------------------------------------------------------

def read_metrics(folder) -> list[dict[str, str]]:
    """Return the whole rows of metrics.csv as {column: text}; none where it cannot be read."""
    try:
        text = (folder / "metrics.csv").read_text(encoding="utf-8", errors="replace")
        whole = text[:text.rfind("\n") + 1]  # a row without its end may lack digits
        rows = list(csv.DictReader(io.StringIO(whole)))
    except (OSError, csv.Error):
        return []
    return [row for row in rows if "loss" in row and None not in row and None not in row.values()]


def read_config(folder) -> dict:
    """Return what config.json holds; nothing where it cannot be read."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_part(config, name) -> dict[str, str]:
    """Return one table of config.json as texts: JSON, but strings as they are."""
    part = config.get(name)
    if not isinstance(part, dict):
        return {}
    return {key: value if value and isinstance(value, str) else json.dumps(value) for key, value in part.items()}


def embed(path) -> str:
    """Return a PNG file as a data URI."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def read_strip(folder) -> dict | None:
    """Return the step and the picture of the last denoising strip, None where there is none."""
    names = (re.fullmatch(r"step_(\d+)\.png", name) for name in os.listdir(folder))
    last = max(filter(None, names), key=lambda match: int(match[1]), default=None)
    return dict(step=last[1], data=embed(folder / last[0])) if last else None


# ---- numbers ------------------------------------------------------------------------------------

def evenly(items, most) -> list:
    """Return at most `most` (2 or more) of the items, evenly spaced, the first and the last among them."""
    last = len(items) - 1
    return items if last < most else [items[round(i * last / (most - 1))] for i in range(most)]


def number(value) -> float:
    """Return the value as a number, nan where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def series(rows, column) -> list[tuple[float, float]]:
    """Return (epoch or step, value) of the rows that have a value in the column, non-finite ones too."""
    points = [(number(row.get(axis_name(rows))), number(row[column])) for row in rows if row.get(column)]
    return [(x, y) for x, y in points if math.isfinite(x)]


def axis_name(rows) -> str:
    """Return the column that values are drawn over; older runs have no epochs."""
    return "epoch" if "epoch" in rows[0] else "step"


def describe(rows, column) -> str:
    """Return the last value of a column and the lowest one, in words."""
    points = series(rows, column)
    last = f"{points[-1][1]:.4g}"
    if not finite(points):
        return last
    x, lowest = min(finite(points), key=lambda point: point[1])
    return f"{last} (lowest {lowest:.4g} at {axis_name(rows)} {x:.4g})"


def duration(seconds) -> str:
    """Return a time in its two largest units: '44 s', '1 h 7 min'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{n} {unit}" for n, unit in zip((days, hours, minutes, seconds), ("d", "h", "min", "s")) if n]
    return " ".join(parts[:2]) or "0 s"


def measure_time(rows, config) -> dict[str, str]:
    """Return the time and the speed of a run by name, as far as they are known."""
    whole = number(config.get("seconds"))
    parts, speeds = ([value for _, value in finite(series(rows, name))] for name in ("seconds", "images_per_second"))
    times = {}
    if math.isfinite(whole):
        times["training time"] = duration(whole)
    elif parts:
        times["time in training steps"] = duration(sum(parts))
    if speeds:
        times["median images/s"] = f"{median(speeds):.4g}"
    return times


def summarise(rows, dataset, times) -> list[str]:
    """Return the facts of a run, a few words each."""
    last = rows[-1] if rows else {}
    facts = [dataset] if dataset else []
    facts += [f"{name} {number(last[name]):.10g}" for name in ("epoch", "step") if last.get(name)]
    facts += [f"{name} {describe(rows, column)}" for column, name in (("loss", "loss"), ("val_loss", "validation loss"))
              if series(rows, column)]
    return facts + [f"{name} {value}" for name, value in times.items()]


# ---- the page -----------------------------------------------------------------------------------

def draw(curves, xlabel, text, prefix) -> str:
    """Return {label: points} as an SVG element, with a text in its place for those who cannot see it. It takes the
    colour of the page's text. Its ids begin with the prefix, so that several fit on one page."""
    import matplotlib
    from matplotlib.figure import Figure

    cycle = matplotlib.cycler(color=COLOURS[:4], ls=["-", "--", "-.", ":"])
    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": cycle}):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.add_subplot()
        draw_panel(axes, curves.items(), "", wants_log_axis([point for curve in curves.values() for point in curve]))
        axes.set_xlabel(xlabel)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", file.getvalue().replace(INK, "currentColor"))
    return f'<svg role="img" aria-label="{escape(text)}"' + svg.partition("<svg")[2]


def make_figures(rows) -> list[dict]:
    """Return the figures that the rows have values for: title, SVG, and how many values are not in it because they
    are not finite."""
    figures = []
    for place, (title, columns) in enumerate(FIGURES.items()):
        points = {label: series(rows, column) for label, column in columns.items() if series(rows, column)}
        curves = {label: finite(curve) for label, curve in points.items() if finite(curve)}
        text = "; ".join(f"{label} {describe(rows, columns[label])}" for label in curves)
        left_out = sum(map(len, points.values())) - sum(map(len, curves.values()))
        if points:
            svg = draw(curves, axis_name(rows), text, f"figure{place}") if curves else ""
            figures.append(dict(title=title, svg=svg, left_out=left_out))
    return figures


def render(folder) -> str:
    """Return the report of a run's folder as HTML."""
    from jinja2 import Environment

    found, config, metrics = find_grids(folder), read_config(folder), read_metrics(folder)
    rows = metrics or [grid.groupdict() for grid in found]
    times, settings = measure_time(rows, config), read_part(config, "config")
    machine = read_part(config, "machine")
    if "torch" in config:
        machine["torch"] = str(config["torch"])
    grids = [dict(title=f"epoch {grid['epoch']}, loss {grid['loss']}", data=embed(folder / grid[0]))
             for grid in evenly(found, MOST_GRIDS)]
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    return page.render(
        name=folder.resolve().name, summary=summarise(rows, settings.get("dataset"), times), grids=grids,
        grid_count=len(found), figures=make_figures(rows), rows=evenly(rows, MOST_ROWS), row_count=len(rows),
        source="metrics.csv" if metrics else "the names of the grids", strip=read_strip(folder), settings=settings,
        machine={**machine, **times})


def write_report(folder) -> Path:
    """Write report.html into a run's folder and return its path. An old report is replaced at once or, where that
    fails, left as it is. Raises OSError where the folder cannot be read or written, ValueError where a loss is too
    large for an axis."""
    path = Path(folder) / "report.html"
    page = render(path.parent).encode(errors="replace")  # names of files need not be Unicode
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(page)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
