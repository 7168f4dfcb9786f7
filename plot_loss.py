#!/usr/bin/env python3
"""Plot the loss history of one or more training runs.

    python plot_loss.py DIR [DIR ...]     draw these runs, overlaid
    python plot_loss.py                   choose in a file dialog or, without a display, from a list of the runs here
    python plot_loss.py --list            choose from the list

A run writes epoch and mean loss into the names of its sample grids (epoch_50_loss_0.1234.png), so the folder of
samples is all this needs: no checkpoint, no log file, no torch. Where the folder holds metrics.csv, the numbers are
those of its rows, and the validation loss and the learning rate are drawn as well. The figure shows the raw loss and
its sliding average first; it is saved as loss.png. `python report.py DIR` makes a page with everything a run left.
"""

from __future__ import annotations

# signal itself imports others first, and Ctrl-C would print a traceback there.
import _signal

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)              # Ctrl-C during the imports: no traceback

import argparse
import csv
import io
import math
import os
import re
import sys
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from diffuser_lib.files import (
    Parser,
    UserError,
    add_debug,
    end_process,
    first_line,
    newest_first,
    run_script,
    write_atomically,
)

NUMBER = r"[-+]?(?:nan|inf|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
SAMPLE_NAME = re.compile(rf"epoch_(?P<epoch>\d+(?:\.\d+)?)_loss_(?P<loss>{NUMBER})\.png")
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]

Point = tuple[float, float]                                      # (epoch, loss)
Row = dict[str, str]                                             # of metrics.csv: {column: text}
Curves = list[tuple[str, list[Point]]]                           # (label, points) of each run

TOO_LARGE = 1e100                                                # the arithmetic of axes overflows above that

# ---- Numbers: what the names say ---------------------------------------------------------------


def find_grids(directory: str | Path) -> list[re.Match]:
    """The names of the sample grids in a folder, by epoch, as matches of SAMPLE_NAME. Raises OSError."""
    grids = []
    for name in sorted(os.listdir(directory)):
        match = SAMPLE_NAME.fullmatch(name)
        if match:
            grids.append(match)
    return sorted(grids, key=lambda grid: float(grid["epoch"]))


def parse_losses(directory: str | Path) -> list[Point]:
    """The (epoch, loss) pairs that the file names in a folder carry, by epoch. Raises OSError."""
    return [(float(grid["epoch"]), float(grid["loss"])) for grid in find_grids(directory)]


def read_metrics(folder: str | Path) -> list[Row]:
    """The whole rows of metrics.csv; none where it cannot be read."""
    try:
        text = Path(folder, "metrics.csv").read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]                     # a row without its end may lack digits
        rows = list(csv.DictReader(io.StringIO(whole)))
    except (OSError, csv.Error):
        return []

    # The key None holds what is beyond the columns, the value None stands where cells lack.
    return [row for row in rows if "loss" in row and None not in row and None not in row.values()]


def number(value: object) -> float:
    """The value as a number, nan where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def axis_name(rows: list[Row]) -> str:
    """The column that values are drawn over; older runs have no epochs."""
    if rows and "epoch" not in rows[0]:
        return "step"
    return "epoch"


def series(rows: list[Row], column: str) -> list[Point]:
    """(epoch or step, value) of the rows that have a value in the column, non-finite ones too."""
    axis = axis_name(rows)
    points = []
    for row in rows:
        x = number(row.get(axis))
        if row.get(column) and math.isfinite(x):
            points.append((x, number(row[column])))
    return points


def drawable(points: Iterable[Point]) -> list[Point]:
    """The points that axes can hold: not those with a nan, an infinite or a very large number."""
    return [(x, y) for x, y in points if abs(x) <= TOO_LARGE and abs(y) <= TOO_LARGE]


def sliding_average(points: Sequence[Point], window: float) -> list[Point]:
    """At each epoch e, the mean loss of the points with epoch in (e - window, e]."""
    epochs = [epoch for epoch, _ in points]
    losses = [loss for _, loss in points]

    averages = []
    for epoch in epochs:
        # Rounded, because 10.1 - 10 falls just below 0.1 and would let the point at 0.1 in.
        before = round(epoch - window, 9)
        # Where the window is too small to be told from nothing, the epoch itself is in it all the same.
        first = min(bisect_right(epochs, before), bisect_left(epochs, epoch))
        recent = losses[first:bisect_right(epochs, epoch)]
        averages.append((epoch, fmean(recent)))
    return averages


def wants_log_axis(points: Iterable[Point]) -> bool:
    """Whether the losses span so much that a linear axis would hide the small ones."""
    losses = [loss for _, loss in points]
    if not losses:
        return False
    if not all(0 < loss < math.inf for loss in losses):          # no logarithm; nan fails here too
        return False
    return max(losses) > 20 * min(losses)


def point_text(point: Point) -> str:
    """A point in words."""
    epoch, loss = point
    return f"{loss:.4g} at epoch {epoch:.10g}"


def summary(name: object, points: Sequence[Point], validation: Sequence[Point] = ()) -> str:
    """One run in a few lines of text: points, range, best and final loss, the same of the validation loss."""
    first_epoch = points[0][0]
    last_epoch = points[-1][0]
    lines = [f"{name}", f"  points  {len(points)}, epoch {first_epoch:.10g} to {last_epoch:.10g}"]

    numbers = drawable(points)
    if numbers:
        best = min(numbers, key=lambda point: point[1])
        highest = max(loss for _, loss in numbers)
        lines.append(f"  loss    {best[1]:.4g} to {highest:.4g}")
        lines.append(f"  best    {point_text(best)}")
    lines.append(f"  final   {point_text(points[-1])}")
    if validation:
        lines.append("  validation")
        held_out = drawable(validation)
        if held_out:
            lines.append(f"  best    {point_text(min(held_out, key=lambda point: point[1]))}")
        lines.append(f"  final   {point_text(validation[-1])}")

    left_out = len(points) - len(numbers)
    if left_out:
        lines.append(f"  not in the curve: {left_out} non-finite or too large (nan, inf or beyond 1e100)")
    return "\n".join(lines)


# ---- Folders: which runs there are, and which are meant ----------------------------------------


def find_runs(samples_dir: str | Path) -> list[Path]:
    """The sample folders in `samples_dir` and those at ./samples_*, by the time of their newest sample, or of their
    metrics where there is none yet."""
    newest = {}                                                  # newest file: its folder
    for folder in [*Path(samples_dir).glob("*"), *Path().glob("samples_*")]:
        samples = [path for path in folder.glob("epoch_*") if SAMPLE_NAME.fullmatch(path.name)]
        for file in newest_first(samples or list(folder.glob("metrics.csv")))[:1]:
            newest[file] = folder
    return [newest[file] for file in newest_first(newest)]


def load_run(directory: Path) -> dict[str, list[Point]]:
    """The points of one run by column of metrics.csv or, without that file, the loss in the names of its grids.

    Raises UserError where there are none.
    """
    rows = read_metrics(directory)
    if axis_name(rows) == "epoch":
        curves = {column: series(rows, column) for column in ("loss", "val_loss", "lr")}
        if curves["loss"]:
            return curves

    try:
        points = parse_losses(directory)
    except OSError as error:
        raise UserError(f"cannot read {directory}: {error.strerror}; "
                        "give the folder that a run put its samples in") from error
    if points:
        return {"loss": points}

    runs = find_runs(directory)
    example = f", such as {runs[0]}" if runs else ""
    raise UserError(f"there is no run in {directory}: it holds no metrics.csv with losses by epoch and no file like "
                    f"epoch_50_loss_0.1234.png; give a run's sample folder{example}")


def parse_answer(answer: str, count: int) -> list[int] | None:
    """The places that an answer picks from `count` runs: '2, 1' gives [1, 0], '' the first, 'q' [].

    None where the answer makes no sense.
    """
    if answer.lower() in ("q", "quit"):
        return []
    if not answer:
        return [0]

    places = []
    for part in answer.split(","):
        if not part.strip().isdecimal():
            return None
        place = int(part) - 1
        if not 0 <= place < count:
            return None
        if place not in places:
            places.append(place)
    return places


def choose_runs(runs: list[Path], script: str) -> list[Path]:
    """List runs and ask which are meant until the answer makes sense. Raises UserError where the input ends.

    script: the name of the program that asks.
    """
    print("Sample folders, newest first:")
    for place, folder in enumerate(runs, start=1):
        grids = parse_losses(folder)
        extent = f"to epoch {grids[-1][0]:.10g}" if grids else "no grid yet"
        print(f"  {place}  {folder}  ({extent})")

    while True:
        try:
            answer = input("Which? Numbers separated by commas [1], q quits: ").strip()
        except (EOFError, RuntimeError):                         # RuntimeError: there is no stdin at all
            print()                                              # ends the line of the question
            raise UserError("the input ended before an answer; give a directory on the command line: "
                            f"python {script}.py {runs[0]}") from None
        places = parse_answer(answer, len(runs))
        if places is not None:
            return [runs[place] for place in places]
        print(f"Not understood: {answer!r}. Give numbers from 1 to {len(runs)}, for example 1,2.")


def choose_in_dialog(samples_dir: str | Path) -> list[Path] | None:
    """The run picked in a file dialog, empty where it is closed; None without tkinter or a display.

    samples_dir: where the dialog begins, if it is there.
    """
    try:
        from tkinter import TclError, Tk, filedialog
    except ImportError:
        return None
    try:
        root = Tk()
    except TclError:
        return None

    root.withdraw()                                              # the dialog alone, without an empty main window
    start = samples_dir if os.path.isdir(samples_dir) else "."
    picked = filedialog.askdirectory(title="Folder with a run's samples", initialdir=start)
    root.destroy()
    return [Path(picked)] if picked else []


def ask_for_runs(samples_dir: str, windows: bool, script: str, dialog_first: bool = False) -> list[Path]:
    """The runs that the user picks from a list or, where none is found, in a dialog; empty means quit.

    windows: whether a dialog may open; dialog_first: whether it comes before the list; script: the name of the program
    that asks. Raises UserError.
    """
    runs = find_runs(samples_dir)
    picked = None
    if windows and (dialog_first or not runs):
        picked = choose_in_dialog(samples_dir)
    if picked is None and runs:
        return choose_runs(runs, script)
    if picked is None:
        raise UserError(f"no sample folders in {samples_dir} or at ./samples_*; give a directory on the command line: "
                        f"python {script}.py DIR")
    return picked


def can_open_windows() -> bool:
    """Whether there is a display, and a person at a terminal to look at it."""
    if not sys.stdout.isatty():
        return False
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


# ---- Figure ------------------------------------------------------------------------------------


def label_runs(directories: Iterable[Path]) -> list[str]:
    """A label for each folder: its name, or its path where two share a name."""
    directories = list(directories)
    names = [directory.resolve().name for directory in directories]

    labels = []
    for directory, name in zip(directories, names):
        unique = names.count(name) == 1
        label = name if unique else str(directory)
        labels.append(label.encode(errors="replace").decode())   # a name need not be Unicode, a figure's text does
    return labels


def draw_panel(axes, curves: Iterable[tuple[str, Sequence[Point]]], title: str, log: bool,
               ylabel: str = "loss") -> None:
    """Draw (label, points) of each curve into one panel. log: whether the axis of values is logarithmic."""
    from matplotlib.ticker import LogLocator

    for label, points in curves:
        epochs = [epoch for epoch, _ in points]
        losses = [loss for _, loss in points]
        marker = "o" if len(points) < 15 else ""
        axes.plot(epochs, losses, marker=marker, markersize=4, label=label)
    axes.set(title=title, xlabel="epoch", ylabel=ylabel)

    if log:
        axes.set_yscale("log")
        # Label 0.1, 0.2, 0.5, 1 where there is room, else powers of 10.
        low, high = axes.get_ylim()
        steps = [1, 2, 5] if high < 1000 * low else [1]
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.tick_params(which="minor", labelleft=False)

    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def arrange(figure) -> None:
    """Lay out the panels and the legend of a figure in two columns or, where it is narrow, in one."""
    from matplotlib.gridspec import GridSpec

    # Panels; the last one is wide where it would stand alone.
    columns = 2 if figure.get_figwidth() >= 7 else 1
    rows = math.ceil(len(figure.axes) / columns)
    grid = GridSpec(rows, columns, figure=figure)
    for place, axes in enumerate(figure.axes):
        row, column = divmod(place, columns)
        alone = axes is figure.axes[-1] and column == 0
        axes.set_subplotspec(grid[row, :] if alone else grid[row, column])

    # One legend for all of them, whose names are shortened to what fits; a letter is about 0.09 inches wide.
    lines = figure.axes[0].lines
    longest = max(len(line.get_label()) for line in lines)
    room = int(figure.get_figwidth() / 0.09)
    ncols = 2 if 2 * (longest + 8) <= room else 1
    labels = [shorten(line.get_label(), max(9, room // ncols - 8)) for line in lines]
    for legend in figure.legends:
        legend.remove()
    figure.legend(lines, labels, loc="outside lower center", ncols=ncols, frameon=False)


def shorten(label: str, most: int) -> str:
    """The label in at most so many letters, its middle left out: runs differ at both ends."""
    if len(label) <= most:
        return label
    end = (most - 1) // 2
    return label[: most - 1 - end] + "…" + label[len(label) - end :]


def draw_figure(runs: Curves, window: float, validation: Curves = (), rates: Curves = ()):
    """A matplotlib figure: the losses of each run, (label, points), their sliding averages and, where there are any,
    validation losses and learning rates."""
    import matplotlib.pyplot as plt

    # The curves of each panel; a run has the same colour and line in all of them.
    raw = []
    smooth = []
    everything = []
    for label, points in runs:
        numbers = drawable(points)
        raw.append((label, numbers))
        smooth.append((label, sliding_average(numbers, window)))
        everything += numbers
    held_out = select(runs, validation)
    for _, points in held_out:
        everything += points
    log = wants_log_axis(everything)
    lr = select(runs, rates)

    # Draw, losses on axes that can be compared. A panel that no run has numbers for is left out.
    has_validation = any(points for _, points in held_out)
    has_rates = any(points for _, points in lr)
    count = 2 + has_validation + has_rates
    figure = plt.figure(figsize=(12, (5 if count == 2 else 8) + 0.1 * len(runs)), layout="constrained")
    first = figure.add_subplot()
    draw_panel(first, raw, "raw loss", log)
    draw_panel(figure.add_subplot(sharey=first), smooth, f"sliding average over {window:g} epochs", log)
    if has_validation:
        draw_panel(figure.add_subplot(sharey=first), held_out, "validation loss", log)
    if has_rates:
        draw_panel(figure.add_subplot(), lr, "learning rate", False, "learning rate")
    arrange(figure)
    figure.canvas.mpl_connect("resize_event", lambda event: arrange(figure))
    return figure


def select(runs: Curves, curves: Curves) -> Curves:
    """The drawable points of each run in `curves`, none for a run that is not there, in the order of `runs`."""
    known = dict(curves)
    chosen = []
    for label, _ in runs:
        numbers = drawable(known.get(label, []))
        chosen.append((label, numbers))
    return chosen


def encode(figure, save: Path) -> bytes:
    """A matplotlib figure as the content of a file, in the format that the file's ending names. Raises UserError."""
    kind = save.suffix[1:].lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise UserError(f"cannot write {save}: {kind} is none of the formats {', '.join(sorted(known))}; "
                        "name another file with --save")

    file = io.BytesIO()
    figure.savefig(file, format=kind, dpi=150)
    return file.getvalue()


def plot(runs: Curves, save: Path, window: float = 10, show: bool = False, validation: Curves = (),
         rates: Curves = ()) -> None:
    """Draw (label, points) of each run to a file, in the format that its ending names; then show it where asked.

    window: epochs in the sliding average; validation, rates: (label, points) of the runs that have them. An old file is
    replaced when the new one is whole or, on failure, left as it is. Raises OSError where the file cannot be written,
    UserError for an ending that is no format, RuntimeError for .pgf without LaTeX.
    """
    import matplotlib

    if not show:
        matplotlib.use("Agg")                                    # draws without a display
    import matplotlib.pyplot as plt

    # All colours with solid lines come first, then dashed, then dotted ones: 21 runs look different.
    style = {"axes.prop_cycle": plt.cycler(ls=["-", "--", ":"]) * plt.cycler(color=COLOURS),
             "text.parse_math": False}                           # a $ in a folder's name is just a $
    with plt.rc_context(style):
        figure = draw_figure(runs, window, validation, rates)

        # Save. In memory first, so that whatever a format's writer does, only whole files reach the disk.
        picture = encode(figure, save)
        write_atomically(save, lambda file: file.write(picture))

        # Show, unless there is no toolkit to show it with: the backend is agg then.
        if show and matplotlib.get_backend().lower() != "agg":
            with warnings.catch_warnings():                      # of a window that is too small for its panels
                warnings.filterwarnings("ignore", message="constrained_layout")
                plt.show()
        plt.close(figure)


# ---- Command line ------------------------------------------------------------------------------


def parse_window(text: str) -> float:
    """A number of epochs. Raises UserError."""
    window = number(text)
    if not window > 0:                                           # nan fails too
        raise UserError(f"--window is a number of epochs above 0, not {text[:60]}")
    return window


def build_parser() -> Parser:
    """The flags."""
    parser = Parser("plot_loss.py", usage="python plot_loss.py [DIR ...] [options]", doc=__doc__)
    add = parser.add_argument
    add("directories", nargs="*", type=Path, metavar="DIR", help="sample folders; none: asks")
    add("--save", type=Path, metavar="FILE", help="figure, .png, .pdf, .svg, ... (default: loss.png, in DIR if one)")
    add("--window", type=parse_window, default=10, metavar="EPOCHS", help="epochs in the sliding average (default: 10)")
    add("--no-show", action="store_true", help="open no window")
    add("--list", action="store_true", help="choose from a list of runs, not in a file dialog")
    add("--samples_dir", default="samples", metavar="PATH", help="where to look for runs (default: samples)")
    add("--html", action="store_true", help=argparse.SUPPRESS)   # report.py has taken its place
    add_debug(parser)
    return parser


def figure_path(save: Path | None, directories: list[Path]) -> Path:
    """Where the figure goes: the file asked for, else loss.png in the run's folder or, for several runs, here."""
    if save is None:
        folder = directories[0] if len(directories) == 1 else Path()
        return folder / "loss.png"
    if not save.name:
        raise UserError(f"--save {save} names no file")
    return save if save.suffix else save.with_suffix(".png")


def work(options: argparse.Namespace) -> None:
    """Choose, summarize and draw."""
    if options.html:
        raise UserError("the page is made by report.py: python report.py DIR")

    # Choose; quitting at the question is no error.
    windows = can_open_windows() and not options.no_show
    directories = options.directories
    if not directories:
        directories = ask_for_runs(options.samples_dir, windows, "plot_loss", dialog_first=not options.list)
    runs = {directory: load_run(directory) for directory in directories}
    if not runs:
        return

    # Summarize.
    for directory, curves in runs.items():
        print(summary(directory, curves["loss"], curves.get("val_loss", ())))

    # Draw.
    save = figure_path(options.save, list(runs))
    columns = {"loss": [], "val_loss": [], "lr": []}
    for label, curves in zip(label_runs(runs), runs.values()):
        for column, points in curves.items():
            if points:
                columns[column].append((label, points))
    try:
        plot(columns["loss"], save, options.window, windows, columns["val_loss"], columns["lr"])
    except OSError as error:
        raise UserError(f"cannot write {save}: {error.strerror or error}; name another file with --save") from error
    except RuntimeError as error:                                # .pgf without LaTeX
        raise UserError(f"cannot draw {save}: {first_line(error)}; name another file with --save") from error
    print(f"saved {save}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_script("plot_loss", lambda: build_parser().parse_args(argv), work)


if __name__ == "__main__":
    end_process(main)
