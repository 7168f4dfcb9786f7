#!/usr/bin/env python3
"""Plot the loss history of one or more training runs.

    python plot_loss.py DIR [DIR ...]     draw these runs, overlaid
    python plot_loss.py                   list the runs found here and ask which to draw
    python plot_loss.py --html DIR ...    write DIR/report.html for each: a page with all a run left

A run writes epoch and mean loss into the names of its sample grids (epoch_50_loss_0.1234.png), so
the folder of samples is all this needs: no checkpoint, no log file, no torch. The figure has two
panels, the raw loss and its sliding average, and is saved as loss.png. The page (see report.py)
also shows the grids, the strips, metrics.csv and config.json, where the folder holds them.
"""

import argparse
import math
import os
import re
import sys
from bisect import bisect_right
from pathlib import Path
from statistics import fmean

NUMBER = r"[-+]?(?:nan|inf|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)"
SAMPLE_NAME = re.compile(rf"epoch_(?P<epoch>\d+(?:\.\d+)?)_loss_(?P<loss>{NUMBER})\.png")
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


class BadInput(Exception):
    """Something the user can put right; the message says what and how."""


# ---- numbers: what the names say ----------------------------------------------------------------

def find_grids(directory) -> list[re.Match]:
    """Return the names of the sample grids in `directory`, by epoch, as matches of SAMPLE_NAME."""
    matches = (SAMPLE_NAME.fullmatch(name) for name in sorted(os.listdir(directory)))
    return sorted(filter(None, matches), key=lambda match: float(match["epoch"]))


def parse_losses(directory) -> list[tuple[float, float]]:
    """Return the (epoch, loss) pairs that the file names in `directory` carry, by epoch."""
    return [(float(match["epoch"]), float(match["loss"])) for match in find_grids(directory)]


def finite(points) -> list[tuple[float, float]]:
    """Return the points whose loss is neither nan nor infinite."""
    return [(epoch, loss) for epoch, loss in points if math.isfinite(loss)]


def sliding_average(points, window) -> list[tuple[float, float]]:
    """Return, at each epoch e, the mean loss of the points with epoch in (e - window, e]."""
    epochs = [epoch for epoch, _ in points]
    losses = [loss for _, loss in points]
    averages = []
    for epoch in epochs:
        before = round(epoch - window, 9)  # 10.1 - 10 would fall just below 0.1 and let it in
        recent = losses[bisect_right(epochs, before):bisect_right(epochs, epoch)]
        averages.append((epoch, fmean(recent)))
    return averages


def wants_log_axis(points) -> bool:
    """Say whether the losses span so much that a linear axis would hide the small ones."""
    losses = [loss for _, loss in points] or [1]
    return all(0 < loss < math.inf for loss in losses) and max(losses) > 20 * min(losses)


def summary(name, points) -> str:
    """Describe one run in a few lines of text."""
    def at(point):
        return f"{point[1]:.4g} at epoch {point[0]:.10g}"

    lines = [f"{name}",
             f"  points  {len(points)}, epoch {points[0][0]:.10g} to {points[-1][0]:.10g}"]
    numbers = finite(points)
    if numbers:
        losses = [loss for _, loss in numbers]
        lines.append(f"  loss    {min(losses):.4g} to {max(losses):.4g}")
        lines.append(f"  best    {at(min(numbers, key=lambda point: point[1]))}")
    lines.append(f"  final   {at(points[-1])}")
    if len(numbers) < len(points):
        lines.append(f"  not in the curve: {len(points) - len(numbers)} non-finite (nan or inf)")
    return "\n".join(lines)


# ---- folders: which runs there are, and which are meant -----------------------------------------

def newest_sample(folder) -> float:
    """Return the time of the newest sample in `folder`, 0 where it holds none."""
    samples = (path for path in folder.glob("epoch_*") if SAMPLE_NAME.fullmatch(path.name))
    return max((path.stat().st_mtime for path in samples), default=0)


def find_runs(samples_dir) -> list[Path]:
    """Return the sample folders in `samples_dir` and those at ./samples_*, newest first."""
    folders = [*Path(samples_dir).glob("*"), *Path().glob("samples_*")]
    times = {folder: newest_sample(folder) for folder in folders}
    return sorted((folder for folder in times if times[folder]), key=times.get, reverse=True)


def load_run(directory) -> list[tuple[float, float]]:
    """Return the points of one run, or say why there are none."""
    try:
        points = parse_losses(directory)
    except OSError as error:
        raise BadInput(f"cannot read {directory}: {error.strerror}; "
                       "give the folder that a run put its samples in") from error
    if not points:
        inside = "".join(f", such as {run}" for run in find_runs(directory)[:1])
        raise BadInput(f"nothing to plot in {directory}: it holds no file named like "
                       f"epoch_50_loss_0.1234.png; give a run's sample folder{inside}")
    return points


def parse_answer(answer, count) -> list[int] | None:
    """Turn '', 'q' or '2, 1' into places in a list of `count`; None for anything else."""
    if answer.lower() in ("q", "quit"):
        return []
    parts = (answer or "1").split(",")
    chosen = [int(part) - 1 for part in parts if part.strip().isdecimal()]
    valid = len(chosen) == len(parts) and all(0 <= place < count for place in chosen)
    return list(dict.fromkeys(chosen)) if valid else None


def choose_runs(runs) -> list[Path]:
    """List `runs`, ask which to draw until the answer makes sense, and return those."""
    print("Sample folders, newest first:")
    for number, folder in enumerate(runs, start=1):
        print(f"  {number}  {folder}  (to epoch {parse_losses(folder)[-1][0]:.10g})")
    while True:
        try:
            answer = input("Which? Numbers separated by commas [1], q quits: ").strip()
        except EOFError:
            print()  # ends the line of the question
            raise BadInput("the input ended before an answer; give a directory on the command "
                           f"line: python plot_loss.py {runs[0]}") from None
        chosen = parse_answer(answer, len(runs))
        if chosen is not None:
            return [runs[place] for place in chosen]
        print(f"Not understood: {answer!r}. Give numbers from 1 to {len(runs)}, for example 1,2.")


def choose_in_dialog() -> list[Path] | None:
    """Let a file dialog pick the run; None where there is no tkinter or its display is gone."""
    try:
        from tkinter import TclError, Tk, filedialog
    except ImportError:
        return None
    try:
        root = Tk()
    except TclError:
        return None
    root.withdraw()  # the dialog alone, without an empty main window
    picked = filedialog.askdirectory(title="Folder with a run's samples")
    root.destroy()
    return [Path(picked)] if picked else []


def ask_for_runs(samples_dir, windows) -> list[Path]:
    """Return the runs that the user picks from a list or a dialog; empty means quit."""
    runs = find_runs(samples_dir)
    if runs:
        return choose_runs(runs)
    picked = choose_in_dialog() if windows else None
    if picked is None:
        raise BadInput(f"no sample folders in {samples_dir} or at ./samples_*; give a directory "
                       "on the command line: python plot_loss.py DIR")
    return picked


# ---- pictures -----------------------------------------------------------------------------------

def can_open_windows() -> bool:
    """Say whether there is a display, and a person at a terminal to look at it."""
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(display or sys.platform in ("darwin", "win32")) and sys.stdout.isatty()


def label_runs(directories) -> list[str]:
    """Return a label for each directory: its name, or its path where two share a name."""
    names = [directory.resolve().name for directory in directories]
    return [name if names.count(name) == 1 else str(directory)
            for directory, name in zip(directories, names)]


def draw_panel(axes, curves, title, log):
    """Draw a list of (label, points) into one panel."""
    from matplotlib.ticker import LogLocator

    for label, points in curves:
        epochs, losses = zip(*points) if points else ((), ())
        axes.plot(epochs, losses, marker="o" if len(points) < 15 else "", markersize=4, label=label)
    axes.set(title=title, xlabel="epoch", ylabel="loss")
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()  # label 0.1, 0.2, 0.5, 1 where there is room, else powers of 10
        axes.yaxis.set_major_locator(LogLocator(subs=[1, 2, 5] if high < 1000 * low else [1]))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.tick_params(which="minor", labelleft=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def plot(runs, save, window=10, show=False):
    """Draw `runs`, a list of (label, points), to the file `save`; then show it where asked."""
    import matplotlib

    if not show:
        matplotlib.use("Agg")  # draws without a display
    import matplotlib.pyplot as plt

    log = wants_log_axis([point for _, points in runs for point in points])
    raw = [(label, finite(points)) for label, points in runs]
    smooth = [(label, sliding_average(points, window)) for label, points in raw]
    style = {"axes.prop_cycle": plt.cycler(ls=["-", "--", ":"]) * plt.cycler(color=COLOURS),
             "text.parse_math": False}  # a $ in a folder's name is just a $
    with plt.rc_context(style):
        figure, panels = plt.subplots(1, 2, figsize=(12, 5 + 0.1 * len(runs)), layout="constrained")
        draw_panel(panels[0], raw, "raw loss", log)
        draw_panel(panels[1], smooth, f"sliding average over {window:g} epochs", log)
        figure.legend(handles=panels[0].lines, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(save, dpi=150)
        if show and matplotlib.get_backend().lower() != "agg":  # agg: no toolkit to show it with
            plt.show()
        plt.close(figure)


# ---- command line -------------------------------------------------------------------------------

def build_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("directories", nargs="*", type=Path, metavar="DIR", help="sample folders; none: asks")
    output = parser.add_mutually_exclusive_group().add_argument
    output("--save", type=Path, metavar="FILE",
           help="the figure (default: loss.png, in DIR if one)")
    output("--html", action="store_true", help="write DIR/report.html, not a figure")
    add("--window", type=float, default=10, help="epochs in the sliding average (default: 10)")
    add("--no-show", action="store_true", help="open no window")
    add("--samples_dir", default="samples", help="where to look for runs (default: samples)")
    return parser


def write_reports(directories):
    """Write and announce the report of each run."""
    from report import write_report  # not above: report.py imports this module

    for directory in directories:
        if not os.path.isfile(directory / "metrics.csv"):
            load_run(directory)  # says what is wrong where there are no grids either
        try:
            print(f"saved {write_report(directory)}")
        except (OSError, ValueError) as error:  # ValueError: no axis holds a loss of 1e308
            raise BadInput(f"cannot write the report of {directory}: {error}") from error


def run(args):
    """Choose, summarise and draw; or choose and write reports."""
    if not args.window > 0:  # written so that nan fails too
        raise BadInput(f"--window is a number of epochs above 0, not {args.window:g}")
    windows = can_open_windows() and not args.no_show
    directories = args.directories or ask_for_runs(args.samples_dir, windows)
    if args.html:
        return write_reports(directories)
    runs = {directory: load_run(directory) for directory in directories}
    if not runs:
        return
    for directory, points in runs.items():
        print(summary(directory, points))
    save = args.save or (next(iter(runs)) if len(runs) == 1 else Path()) / "loss.png"
    try:
        save = save if save.suffix else save.with_suffix(".png")
        save.parent.mkdir(parents=True, exist_ok=True)
        plot(list(zip(label_runs(runs), runs.values())), save, args.window, show=windows)
    except (OSError, ValueError) as error:  # no permission, no space; a name that ends in .xyz
        raise BadInput(f"cannot write {save}: {error}; name another file with --save") from error
    print(f"saved {save}")


def main(argv=None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except BadInput as error:
        print(f"plot_loss: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"plot_loss: {error}; run: pip install -r requirements.txt", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
