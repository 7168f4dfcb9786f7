"""plot_loss.py: its pure functions against closed forms, and the real command line."""

import errno
import math
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import prepared
import pytest
from conftest import heed_interrupts

import plot_loss

SCRIPT = Path(plot_loss.__file__)


# ---- helpers ------------------------------------------------------------------------------------

def make_run(folder, *names, age=0):
    """Make a folder of empty sample files, `age` seconds old; '3:0.5' is epoch 3, loss 0.5."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / "epoch_{}_loss_{}.png".format(*name.split(":"))
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    return folder


HIDDEN = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")


def environment(**changes):
    """Return this environment without a display, and with `changes`."""
    kept = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    return {**kept, **changes}


def command(cwd, *args, answers="", **changes):
    """Run plot_loss.py as a user would, without a display, with `answers` piped to its questions."""
    if changes:                                                              # matplotlib reads them while it is imported
        return subprocess.run([sys.executable, str(SCRIPT), *args], cwd=cwd, input=answers, text=True,
                              capture_output=True, timeout=120, env=environment(**changes))
    return prepared.run(SCRIPT, *args, cwd=cwd, stdin=answers, env=dict.fromkeys(HIDDEN), timeout=120)


def is_png(path):
    """Say whether a file starts as a PNG does."""
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def assert_refused(result, *words, script="plot_loss"):
    """Check for exit code 2 and a single line on stderr that holds `words`."""
    assert result.returncode == 2
    assert result.stderr.startswith(f"{script}: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def modules_after(code, *names):
    """Which of these modules a fresh Python has loaded after it ran `code`."""
    code += f"; import sys; print([name for name in {names} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, text=True, capture_output=True,
                            stdin=subprocess.DEVNULL, timeout=120, env=environment())
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def fill_disk(monkeypatch):
    """From now on this process finds no room for what it has written."""
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)


@pytest.fixture
def three_runs(tmp_path):
    """Three runs in the places that are searched: old, new, and of middle age beside samples/."""
    make_run(tmp_path / "samples" / "old", "1:0.9", age=3000)
    make_run(tmp_path / "samples" / "new", "1:0.8", "2:0.4", age=1000)
    make_run(tmp_path / "samples_middle", "1:0.7", age=2000)
    (tmp_path / "samples" / "empty").mkdir()
    (tmp_path / "samples" / "note.txt").touch()
    return tmp_path


# ---- names --------------------------------------------------------------------------------------

def test_names_become_points_in_order_of_epoch(tmp_path):
    """Epochs sort as numbers, and decimals and exponents are read."""
    make_run(tmp_path, "100:0.5", "20:1e-05", "3:2.5E+3", "0.21:1.5", "7:3")
    assert plot_loss.parse_losses(tmp_path) == [
        (0.21, 1.5), (3, 2500), (7, 3), (20, 1e-5), (100, 0.5)]


def test_losses_that_are_no_numbers_are_parsed_too(tmp_path):
    """A run that diverged still shows its points, nan and infinity included."""
    make_run(tmp_path, "1:0.5", "2:nan", "3:inf", "4:-inf")
    losses = [loss for _, loss in plot_loss.parse_losses(tmp_path)]
    assert losses[0] == 0.5 and math.isnan(losses[1]) and losses[2:] == [math.inf, -math.inf]


@pytest.mark.parametrize("name", [
    "step_50.png", "epoch_5.png", "epoch_5_loss_.png", "epoch_5_loss_abc.png", "loss.png",
    "epoch_5_loss_0.1.png.tmp", "epoch_5_loss_0.1.jpg", "old_epoch_5_loss_0.1.png",
    "epoch_x_loss_0.1.png", "epoch_5_loss_0.1e.png", "epoch_5_loss_1.2.3.png"])
def test_other_files_are_ignored(tmp_path, name):
    """Files beside the samples never become points, nor do they stop the program."""
    (tmp_path / name).touch()
    assert plot_loss.parse_losses(tmp_path) == []


# ---- sliding average ----------------------------------------------------------------------------

def test_average_of_a_line_is_the_line_half_a_window_late():
    """With loss = epoch at every epoch, the mean over (e-10, e] is e - 4.5 once it is full."""
    averages = plot_loss.sliding_average([(e, float(e)) for e in range(1, 41)], 10)
    assert averages[0] == (1, 1.0)
    assert averages[3] == (4, 2.5)
    assert averages[9:] == [(e, e - 4.5) for e in range(10, 41)]


def test_window_counts_epochs_not_points():
    """A sample every 5 epochs puts two points in a window of 10; every half epoch, twenty."""
    sparse = plot_loss.sliding_average([(e, float(e)) for e in range(5, 55, 5)], 10)
    assert sparse[1:] == [(e, e - 2.5) for e in range(10, 55, 5)]
    dense = plot_loss.sliding_average([(i / 2, i / 2) for i in range(1, 101)], 10)
    assert dense[19:] == [(i / 2, pytest.approx(i / 2 - 4.75)) for i in range(20, 101)]


def test_window_is_open_at_its_start():
    """The point exactly 10 epochs back is out, also where 10.1 - 10 is not 0.1 in floats."""
    assert plot_loss.sliding_average([(0, 100.0), (10, 1.0)], 10)[1] == (10, 1.0)
    assert plot_loss.sliding_average([(0.1, 100.0), (10.1, 1.0)], 10)[1] == (10.1, 1.0)
    assert plot_loss.sliding_average([(0.2, 100.0), (10.1, 1.0)], 10)[1] == (10.1, 50.5)


def test_points_of_one_epoch_share_one_average():
    """Two losses at one epoch (a repeated run) are averaged with each other."""
    assert plot_loss.sliding_average([(1, 2.0), (1, 4.0)], 10) == [(1, 3.0), (1, 3.0)]


def test_average_does_not_drift():
    """One huge loss leaves no rounding error behind, as it would in a running sum."""
    averages = plot_loss.sliding_average([(0, 1e18)] + [(e, 0.1) for e in range(1, 5000)], 10)
    assert averages[-1][1] == pytest.approx(0.1, rel=1e-15)


# ---- axis, labels, summary, answers -------------------------------------------------------------

@pytest.mark.parametrize("losses, log", [
    ([1.0, 0.05], False), ([1.0, 0.049], True), ([1.0, 0.5], False), ([0.3], False), ([], False),
    ([1.0, 0.001, math.nan], False), ([math.inf, 0.1], False), ([1.0, 0.0], False),
    ([1.0, -0.01], False)])
def test_log_axis_needs_a_ratio_above_twenty_and_finite_positive_losses(losses, log):
    """A log axis is drawn where it helps, and never where a loss has no logarithm."""
    assert plot_loss.wants_log_axis(list(enumerate(losses))) is log


def test_runs_that_share_a_name_are_told_apart():
    """Two runs never carry the same label in the legend."""
    paths = [Path("a/samples"), Path("b/samples"), Path("c/other")]
    assert plot_loss.label_runs(paths) == [str(paths[0]), str(paths[1]), "other"]


def test_summary_names_range_best_and_final():
    """The printed summary holds each figure it promises."""
    text = plot_loss.summary("runs/a", [(1, 0.5), (2.5, 0.125), (4, 0.25), (9, math.nan)])
    for part in ("runs/a\n", "points  4, epoch 1 to 9", "loss    0.125 to 0.5",
                 "best    0.125 at epoch 2.5", "final   nan at epoch 9", "1 non-finite"):
        assert part in text


def test_summary_of_a_finite_run_mentions_nothing_left_out():
    """The line about nan and infinity stands only where there are some."""
    assert "non-finite" not in plot_loss.summary("a", [(1, 0.5)])


@pytest.mark.parametrize("answer, places", [
    ("", [0]), ("2", [1]), ("2, 1", [1, 0]), ("3,3", [2]), ("q", []), ("Q", []), ("quit", []),
    ("0", None), ("4", None), ("1,4", None), ("-1", None), ("1.5", None), ("x", None),
    ("1,", None), ("1 2", None), ("²", None)])
def test_answers(answer, places):
    """An answer is understood in full or not at all."""
    assert plot_loss.parse_answer(answer, 3) == places


@pytest.mark.parametrize("display, terminal, expected", [
    ({}, True, False), ({"DISPLAY": ":0"}, True, True), ({"WAYLAND_DISPLAY": "w"}, True, True),
    ({"DISPLAY": ":0"}, False, False), ({"DISPLAY": ""}, True, False)])
def test_windows_need_a_display_and_a_terminal(monkeypatch, display, terminal, expected):
    """A batch job or a machine without a screen never waits for a window to be closed."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "environ", display)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert plot_loss.can_open_windows() is expected


# ---- figure -------------------------------------------------------------------------------------

def panels_of(monkeypatch, tmp_path, runs, window=10):
    """Return the two panels of the figure that plot() draws."""
    import matplotlib.pyplot as plt

    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    plot_loss.plot(runs, tmp_path / "loss.png", window)
    monkeypatch.undo()
    plt.close(kept[0])
    return kept[0].axes


def test_figure_shows_raw_and_averaged_curves(monkeypatch, tmp_path):
    """Left the losses as they are, right their average, each run in a colour of its own."""
    runs = [("a", [(5.0, 1.0), (10.0, 0.5), (15.0, math.nan)]), ("b", [(1.0, 0.2)])]
    raw, smooth = panels_of(monkeypatch, tmp_path, runs)
    assert [list(line.get_ydata()) for line in raw.lines] == [[1.0, 0.5], [0.2]]
    assert [list(line.get_ydata()) for line in smooth.lines] == [[1.0, 0.75], [0.2]]
    assert list(raw.lines[0].get_xdata()) == [5.0, 10.0]
    assert raw.lines[0].get_color() != raw.lines[1].get_color()
    assert [text.get_text() for text in raw.figure.legends[0].get_texts()] == ["a", "b"]
    assert "10 epochs" in smooth.get_title() and raw.get_xlabel() == "epoch"


def test_figure_axis_is_log_only_where_losses_span_much(monkeypatch, tmp_path):
    """The scale of both panels follows the ratio of the losses."""
    wide = panels_of(monkeypatch, tmp_path, [("a", [(1.0, 1.0), (2.0, 0.01)])])
    assert [axes.get_yscale() for axes in wide] == ["log", "log"]
    flat = panels_of(monkeypatch, tmp_path, [("a", [(1.0, 1.0), (2.0, 0.5)])])
    assert [axes.get_yscale() for axes in flat] == ["linear", "linear"]


def test_twenty_runs_look_different(monkeypatch, tmp_path):
    """However many runs are overlaid, no two share both colour and line style."""
    runs = [(str(number), [(1.0, 0.5), (2.0, 0.4)]) for number in range(20)]
    lines = panels_of(monkeypatch, tmp_path, runs)[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20


@pytest.mark.parametrize("window", [1e-320, 1e-12, math.inf])
def test_any_window_holds_at_least_the_epoch_itself(window):
    """A window too small to be told from nothing, or epochs too large to be told from the ones before, average a point
    with itself."""
    first, second = plot_loss.sliding_average([(1e15, 1.0), (1e200, 3.0)], window)
    assert first == (1e15, 1.0) and second == (1e200, 2.0 if window == math.inf else 3.0)


def add_metrics(run, rows=32, name="metrics.csv"):
    """A metrics.csv of losses 1 / epoch with four rows an epoch, a validation loss and a rate; the best is in its
    middle."""
    lines = ["step,epoch,loss,val_loss,lr"]
    for i in range(1, rows + 1):
        loss = 0.01 if i == rows // 2 else 1 / i
        lines.append(f"{10 * i},{i / 4},{loss:.6g},{0.02 + loss if i % 4 == 0 else ''},{1e-3 / i:.6g}")
    (run / name).write_text("\n".join(lines) + "\n")
    return run


def test_metrics_are_drawn_where_they_are(tmp_path, monkeypatch, capsys):
    """Beside metrics.csv the few numbers in file names are passed over: every row, validation loss and learning rate are
    drawn, and best and final are those that the report tells."""
    import report

    run = add_metrics(make_run(tmp_path / "run", "4:0.9", "8:0.8"))
    kept = []
    monkeypatch.setattr(plot_loss, "encode", lambda figure, save: kept.append(figure) or b"")
    assert plot_loss.main([str(run)]) == 0
    raw, smooth, validation, rate = kept[0].axes
    assert [len(axes.lines[0].get_xdata()) for axes in kept[0].axes] == [32, 32, 8, 32]
    assert list(raw.lines[0].get_xdata()[:2]) == [0.25, 0.5] and rate.lines[0].get_ydata()[1] == 5e-4
    assert validation.get_title() == "validation loss" and validation.get_ylim() == raw.get_ylim()

    text = capsys.readouterr().out
    assert "points  32" in text and "best    0.01 at epoch 4\n" in text and "best    0.03 at epoch 4\n" in text
    told = report.describe(report.read_metrics(run), "loss"), report.describe(report.read_metrics(run), "val_loss")
    assert told == ("0.03125 (lowest 0.01 at epoch 4)", "0.05125 (lowest 0.03 at epoch 4)")
    assert "final   0.03125 at epoch 8" in text and "final   0.05125 at epoch 8" in text


def test_runs_with_and_without_metrics_share_a_figure(tmp_path, monkeypatch):
    """A run keeps its colour in every panel, also in those that other runs have no numbers for."""
    plain = make_run(tmp_path / "plain", "1:0.5", "2:0.4")
    rich = add_metrics(make_run(tmp_path / "rich", "1:0.5"))
    monkeypatch.chdir(tmp_path)
    kept = []
    monkeypatch.setattr(plot_loss, "encode", lambda figure, save: kept.append(figure) or b"")
    assert plot_loss.main([str(plain), str(rich)]) == 0
    colours = [[line.get_color() for line in axes.lines] for axes in kept[0].axes]
    assert len(colours) == 4 and all(pair == colours[0] for pair in colours)
    assert [len(line.get_xdata()) for line in kept[0].axes[2].lines] == [0, 8]


@pytest.mark.parametrize("content", ["", "step,loss\n1,0.5\n", "step,epoch,loss\n1,1,\n", "\0", "epoch,loss\n1,0.5"])
def test_metrics_that_tell_nothing_leave_the_names(tmp_path, content):
    """A metrics.csv that is empty, spoilt or has no epochs costs nothing: the file names are what it lives on."""
    run = make_run(tmp_path / "run", "4:0.9")
    (run / "metrics.csv").write_text(content)
    assert plot_loss.load_run(run) == {"loss": [(4, 0.9)]}


@pytest.mark.parametrize("width, columns", [(12, 2), (4, 1)])
def test_panels_fit_a_narrow_window(tmp_path, width, columns):
    """In a narrow window panels stand below each other, and panels, titles and long names stay within it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.backend_bases import ResizeEvent

    runs = [(f"samples_{name}_" + "long_" * 20, [(1.0, 0.5), (2.0, 0.4)]) for name in ("one", "two")]
    figure = plot_loss.draw_figure(runs, 10, validation=runs, rates=runs)
    figure.set_size_inches(width, 9)
    figure.canvas.callbacks.process("resize_event", ResizeEvent("resize_event", figure.canvas))
    figure.canvas.draw()
    places = {round(axes.get_position().x0, 1) for axes in figure.axes}
    parts = [*figure.axes, *figure.legends]
    boxes = [part.get_tightbbox(figure.canvas.get_renderer()) for part in parts]
    plt.close(figure)
    assert len(places) == columns and len(figure.legends) == 1
    assert all(box.x0 >= 0 and box.x1 <= width * figure.dpi for box in boxes)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(set(labels)) == 2 and "one" in labels[0] and ("…" in labels[0]) == (columns == 1)


# ---- command line -------------------------------------------------------------------------------

def test_importing_loads_neither_torch_nor_matplotlib():
    """The script starts fast and alone: it needs nothing of the trainer, and draws only later."""
    assert modules_after("import plot_loss", "torch", "diffuser", "report", "matplotlib") == "[]"


def test_drawing_loads_no_torch(tmp_path):
    """A figure is drawn without torch too, so that plotting works beside a run and on a machine without it."""
    make_run(tmp_path / "run", "1:0.5")
    code = f"import plot_loss; assert plot_loss.main([{str(tmp_path / 'run')!r}]) == 0"
    assert modules_after(code, "torch", "diffuser", "report", "matplotlib") == "['matplotlib']"
    assert is_png(tmp_path / "run" / "loss.png")


def test_one_directory_gets_its_figure_inside(tmp_path):
    """One DIR: summary on stdout, DIR/loss.png written and announced; nothing else is left."""
    make_run(tmp_path / "run", "1:0.5", "2:0.25")
    result = command(tmp_path, "run")
    assert result.returncode == 0 and "points  2, epoch 1 to 2" in result.stdout
    assert f"saved {Path('run/loss.png')}" in result.stdout
    assert is_png(tmp_path / "run" / "loss.png")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(list((tmp_path / "run").iterdir())) == 3


def test_several_directories_get_one_figure_here(tmp_path):
    """Several DIRs: one summary each, one figure in the current directory."""
    make_run(tmp_path / "a", "1:0.5")
    make_run(tmp_path / "b", "1:0.25")
    result = command(tmp_path, "a", "b")
    assert result.returncode == 0 and "saved loss.png" in result.stdout
    assert "a\n  points  1" in result.stdout and "b\n  points  1" in result.stdout
    assert is_png(tmp_path / "loss.png") and not (tmp_path / "a" / "loss.png").exists()


def test_drawing_again_replaces_the_figure_and_counts_the_same(tmp_path):
    """loss.png inside a run is not taken for a sample the next time."""
    make_run(tmp_path / "run", "1:0.5")
    assert command(tmp_path, "run").stdout == command(tmp_path, "run").stdout


@pytest.mark.parametrize("name, written", [
    ("new/folder/curve.png", "new/folder/curve.png"), ("curve", "curve.png")])
def test_save_writes_where_it_says(tmp_path, name, written):
    """--save makes missing folders, and the printed path is the file that exists."""
    make_run(tmp_path / "run", "1:0.5")
    result = command(tmp_path, "run", "--save", name)
    assert f"saved {Path(written)}" in result.stdout and is_png(tmp_path / written)


@pytest.mark.parametrize("name, magic", [
    ("curve.pdf", b"%PDF"), ("curve.svg", b"<?xml"), ("curve.SVG", b"<?xml"), ("curve.jpg", b"\xff\xd8\xff")])
def test_save_draws_in_the_format_of_the_ending(tmp_path, name, magic):
    """Every format that matplotlib writes can be saved, not only PNG, and no temporary file is left."""
    plot_loss.plot([("run", [(1.0, 0.5), (2.0, 0.25)])], tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["curve.xyz", "curve.x y", "."])
def test_save_with_an_ending_that_is_no_picture(tmp_path, name):
    """An unknown format or no name is one line that names --save, and nothing is written."""
    make_run(tmp_path / "run", "1:0.5")
    assert_refused(command(tmp_path, "run", "--save", name), name, "--save")
    assert os.listdir(tmp_path) == ["run"]


def test_save_where_no_file_can_be(tmp_path):
    """A folder in the figure's place is one line that names it, and the folder stays."""
    make_run(tmp_path / "run", "1:0.5")
    (tmp_path / "curve.png").mkdir()
    assert_refused(command(tmp_path, "run", "--save", "curve.png"), "cannot write curve.png", "--save")
    assert sorted(os.listdir(tmp_path)) == ["curve.png", "run"]


def test_full_disk_leaves_the_old_figure(tmp_path, monkeypatch, capsys):
    """Where there is no room one line says so, the old figure is as it was, and no half file is left."""
    run = make_run(tmp_path / "run", "1:0.5")
    (run / "loss.png").write_bytes(b"old")
    before = sorted(run.iterdir())

    fill_disk(monkeypatch)
    assert plot_loss.main([str(run)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("plot_loss: cannot write") and errors.count("\n") == 1
    assert "loss.png" in errors and os.strerror(errno.ENOSPC) in errors and "--save" in errors
    assert (run / "loss.png").read_bytes() == b"old"
    assert sorted(run.iterdir()) == before


def test_read_only_folder(tmp_path):
    """A folder that only others may write is one line, and the old figure is as it was."""
    run = make_run(tmp_path / "run", "1:0.5")
    (run / "loss.png").write_bytes(b"old")
    run.chmod(0o500)
    try:
        if os.access(run, os.W_OK):
            pytest.skip("this user may write everywhere")
        assert_refused(command(tmp_path, "run"), "cannot write", "loss.png", "--save")
        assert (run / "loss.png").read_bytes() == b"old"
    finally:
        run.chmod(0o700)


@pytest.mark.parametrize("names", [("1:1e308",), ("1:1e308", "2:1e308")])
def test_loss_too_large_to_draw(tmp_path, names):
    """A loss that no axis or no average can hold is left out of the figure, and counted."""
    make_run(tmp_path / "run", *names)
    result = command(tmp_path, "run")
    assert result.returncode == 0 and f"not in the curve: {len(names)} non-finite or too large" in result.stdout


@pytest.mark.parametrize("row", ["1e200,0.5", "1,1e308", "1,1e300", "2,-1e308"])
def test_numbers_that_no_axis_holds_are_left_out(tmp_path, capsys, recwarn, row):
    """An epoch of 1e200 or a loss of 1e308: counted, and the others are drawn; nothing of numpy's is printed."""
    run = make_run(tmp_path / "run")
    (run / "metrics.csv").write_text(f"step,epoch,loss\n1,1,0.5\n2,{row}\n")
    assert plot_loss.main([str(run)]) == 0
    told = capsys.readouterr()
    assert "not in the curve: 1 non-finite or too large" in told.out and not told.err and not recwarn.list


def test_small_window_draws(tmp_path, capsys):
    """--window 1e-320 is above 0: each point is its own average."""
    run = make_run(tmp_path / "run", "1:0.5", "2:0.4")
    assert plot_loss.main([str(run), "--window", "1e-320"]) == 0 and capsys.readouterr().err == ""


def test_window_is_an_option(tmp_path):
    """--window reaches the averaging; 0 epochs are refused."""
    make_run(tmp_path / "run", "1:0.5")
    assert command(tmp_path, "run", "--window", "2.5").returncode == 0
    assert_refused(command(tmp_path, "run", "--window", "0"), "--window")
    assert_refused(command(tmp_path, "run", "--window", "nan"), "--window")


def test_losses_without_a_single_number_still_draw(tmp_path):
    """A run that was nan from its first epoch is reported, not a crash."""
    make_run(tmp_path / "run", "1:nan", "2:inf")
    result = command(tmp_path, "run")
    assert result.returncode == 0 and "2 non-finite" in result.stdout


def test_backend_of_the_environment_does_no_harm(tmp_path):
    """Where no window opens Agg draws; a notebook names a backend that need not be installed."""
    make_run(tmp_path / "run", "1:0.5")
    result = command(tmp_path, "run", MPLBACKEND="module://no_such_module.backend_inline")
    assert result.returncode == 0 and is_png(tmp_path / "run" / "loss.png")


def test_folder_name_that_looks_like_a_formula(tmp_path):
    """Dollar signs in a folder's name are text, not TeX."""
    make_run(tmp_path / r"a_$\frac$", "1:0.5")
    assert command(tmp_path, r"a_$\frac$").returncode == 0


def test_missing_directory_file_and_empty_directory_are_each_one_line(tmp_path):
    """Bad input is one line on stderr that names the path and what to give instead."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert_refused(command(tmp_path, "nowhere"), "nowhere", "give")
    assert_refused(command(tmp_path, "file"), "file", "give")
    assert_refused(command(tmp_path, "empty"), "empty", "epoch_50_loss_0.1234.png", "give")


def test_a_run_without_a_grid_yet_is_listed(tmp_path):
    """It has numbers already."""
    (tmp_path / "samples" / "young").mkdir(parents=True)
    (tmp_path / "samples" / "young" / "metrics.csv").write_text("step,epoch,loss\n1,1,0.5\n2,2,0.4\n")
    result = command(tmp_path, "--list", "--no-show", answers="\n")
    assert result.returncode == 0 and "young" in result.stdout, result.stderr


def test_a_panel_without_numbers_is_left_out(tmp_path):
    """A validation loss that is nan throughout has nothing to show."""
    folder = tmp_path / "run"
    folder.mkdir()
    panels = []
    for number in ("nan", "0.4"):
        (folder / "metrics.csv").write_text(f"step,epoch,loss,val_loss,lr\n1,1,0.5,{number},0.1\n2,2,0.4,{number},0.1\n")
        curves = {name: [("run", points)] for name, points in plot_loss.load_run(folder).items()}
        figure = plot_loss.draw_figure(curves["loss"], 2, curves["val_loss"], curves["lr"])
        panels.append(len(figure.axes))
    assert panels == [3, 4]


def test_parent_of_the_runs_is_met_with_a_suggestion(three_runs):
    """`plot_loss.py samples` names a run inside it that would work."""
    assert_refused(command(three_runs, "samples"), str(Path("samples/new")))


def test_without_matplotlib_the_line_says_what_to_install(tmp_path):
    """A bare Python gets one line with the command to run, exit 1, not a traceback."""
    make_run(tmp_path / "run", "1:0.5")
    code = ("import sys; sys.modules['matplotlib'] = None; "
            "import plot_loss; sys.exit(plot_loss.main([sys.argv[1]]))")
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], cwd=SCRIPT.parent,
                            capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=60)
    assert result.returncode == 1
    assert "pip install matplotlib" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("flags, words", [
    (["--windw", "5"], "did you mean --window?"), (["--bogus"], "unknown option --bogus"),
    (["--window", "soon"], "--window"), (["--save"], "--save")])
def test_wrong_flags_are_one_line(tmp_path, flags, words):
    """A flag that is unknown or lacks its value is named in one line, with the nearest one."""
    make_run(tmp_path / "run", "1:0.5")
    assert_refused(command(tmp_path, "run", *flags), words)


@pytest.mark.parametrize("arguments", [["--html", "run"], ["run", "--html"], ["--html"], ["run", "--html", "--save", "x.png"]])
def test_html_names_the_script_that_makes_pages(tmp_path, arguments):
    """Those who know the old flag are told the new command; nothing is asked or written, and --help is silent on it."""
    make_run(tmp_path / "run", "1:0.5")
    assert_refused(command(tmp_path, *arguments), "python report.py DIR")
    assert len(list(tmp_path.rglob("*"))) == 2
    assert "html" not in command(tmp_path, "--help").stdout


def test_debug_shows_the_traceback(tmp_path):
    """With --debug a failure comes with its traceback, for those who repair the script."""
    result = command(tmp_path, "nowhere", "--debug")
    assert result.returncode != 0 and "Traceback" in result.stderr and "nowhere" in result.stderr


def test_ctrl_c_while_drawing(tmp_path, monkeypatch, capsys):
    """Ctrl-C while the figure is drawn leaves with 130, without a traceback and without a file."""
    def interrupted(*arguments):
        raise KeyboardInterrupt

    run = make_run(tmp_path / "run", "1:0.5")
    monkeypatch.setattr(plot_loss, "encode", interrupted)
    assert plot_loss.main([str(run)]) == 130
    assert capsys.readouterr().err == "\nplot_loss: interrupted\n"
    assert not (run / "loss.png").exists()


# ---- the prompt, through a pipe -----------------------------------------------------------------

def test_runs_are_listed_newest_first(three_runs):
    """samples/* and ./samples_* are found, dated by their samples, and only if they hold some."""
    lines = command(three_runs, answers="q\n").stdout.splitlines()
    listed = [line.split()[1] for line in lines if re.match(r"  \d", line)]
    assert listed == [str(Path("samples/new")), "samples_middle", str(Path("samples/old"))]


def test_enter_takes_the_newest(three_runs):
    """An empty answer draws the first run of the list."""
    result = command(three_runs, answers="\n")
    assert result.returncode == 0 and is_png(three_runs / "samples" / "new" / "loss.png")


def test_several_numbers_are_overlaid(three_runs):
    """'3, 1' draws those two runs into one figure here."""
    result = command(three_runs, answers="3, 1\n")
    assert result.returncode == 0 and is_png(three_runs / "loss.png")
    assert "old\n  points  1" in result.stdout and "new\n  points  2" in result.stdout
    assert "middle\n" not in result.stdout


def test_wrong_answers_are_asked_again(three_runs):
    """Each answer that makes no sense is named, and the question comes back."""
    result = command(three_runs, answers="x\n0\n9\n1,9\n2\n")
    assert result.returncode == 0 and "samples_middle\n  points  1" in result.stdout
    assert result.stdout.count("Not understood") == 4 and result.stdout.count("Which?") == 5
    assert "from 1 to 3" in result.stdout


def test_q_quits_without_a_figure(three_runs):
    """Quitting is no error and writes nothing."""
    assert command(three_runs, answers="q\n").returncode == 0
    assert not list(three_runs.rglob("loss.png"))


def test_closed_input_is_no_answer(three_runs):
    """Without any stdin, as under some schedulers, the question ends the script in one line too."""
    result = subprocess.run(["sh", "-c", 'exec "$0" "$@" <&-', sys.executable, str(SCRIPT)], cwd=three_runs, text=True,
                            capture_output=True, timeout=120, env=environment())
    assert_refused(result, "command line", "samples/new")


@pytest.mark.parametrize("answers", ["", "x\n"])
def test_end_of_input_names_the_way_to_answer(three_runs, answers):
    """Where nobody can answer the program stops, and says to give a directory."""
    assert_refused(command(three_runs, answers=answers), "command line", "samples/new")


class Dialog:
    """A tkinter whose dialog is answered with `picked`."""

    TclError = RuntimeError

    def __init__(self, picked):
        self.picked = picked
        self.asked = []
        self.filedialog = self

    def Tk(self):
        if self.picked is None:
            raise self.TclError("no display")
        return self

    def askdirectory(self, **options):
        self.asked.append(options)
        return self.picked

    def withdraw(self):
        pass

    destroy = withdraw


@pytest.mark.parametrize("flags, picked, asked, drawn", [
    ([], "samples/old", 1, ["old"]), ([], "", 1, []), (["--list"], "samples/old", 0, ["new"]),
    (["--no-show"], "samples/old", 0, ["new"]), ([], None, 0, ["new"])])
def test_a_dialog_opens_where_it_can(three_runs, monkeypatch, flags, picked, asked, drawn):
    """Without a directory: the file dialog where there is a display, which may be closed; the list with --list, without
    windows, and where tkinter finds no display."""
    dialog = Dialog(picked)
    monkeypatch.setitem(sys.modules, "tkinter", dialog)
    monkeypatch.setattr(plot_loss, "can_open_windows", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "")
    monkeypatch.chdir(three_runs)
    assert plot_loss.main(flags) == 0
    assert len(dialog.asked) == asked and all(options["initialdir"] == "samples" for options in dialog.asked)
    assert [path.parent.name for path in three_runs.rglob("loss.png")] == drawn


def test_nothing_to_list(tmp_path):
    """Without runs and without a display the user is told where it looked and what to give."""
    assert_refused(command(tmp_path), "samples", "DIR")


def test_samples_dir_is_an_option(three_runs):
    """--samples_dir moves the search."""
    make_run(three_runs / "elsewhere" / "run", "1:0.5")
    result = command(three_runs, "--samples_dir", "elsewhere", answers="\n")
    assert result.returncode == 0 and is_png(three_runs / "elsewhere" / "run" / "loss.png")


# ---- the prompt, at a terminal ------------------------------------------------------------------

def at_terminal(cwd, keys, script=SCRIPT):
    """Run a script at a pseudo-terminal, type `keys` at its question; return code and text."""
    pty = pytest.importorskip("pty")
    import fcntl
    import termios

    def own_terminal():  # in the child: make it the terminal whose Ctrl-C reaches the process
        heed_interrupts()
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ours, theirs = pty.openpty()
    child = subprocess.Popen([sys.executable, str(script)], cwd=cwd, env=environment(),
                             stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal)
    os.close(theirs)
    text, type_at, deadline = b"", None, time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    chunk = os.read(ours, 4096)
                except OSError:  # how Linux says that the other end was closed
                    break
                if not chunk:
                    break
                text += chunk
            if type_at is None and b"q quits: " in text:
                type_at = time.monotonic() + 0.3  # the question is out before the reading begins
            if type_at is not None and time.monotonic() > type_at:
                os.write(ours, keys)
                type_at += 5
        return child.wait(timeout=max(1, deadline - time.monotonic())), text.decode()
    finally:
        child.kill()
        child.wait()
        os.close(ours)


def test_answer_typed_at_a_terminal(three_runs):
    """A person at a terminal without a display gets the figure, and no window is waited for."""
    code, text = at_terminal(three_runs, b"3\n")
    assert code == 0 and "saved" in text and is_png(three_runs / "samples" / "old" / "loss.png")


def test_ctrl_c_at_the_prompt(three_runs):
    """Ctrl-C leaves with 130 and without a traceback."""
    code, text = at_terminal(three_runs, b"\x03")
    assert code == 130 and "Traceback" not in text and "KeyboardInterrupt" not in text


def test_ctrl_d_at_the_prompt(three_runs):
    """Ctrl-D is the end of input, as in a pipe."""
    code, text = at_terminal(three_runs, b"\x04")
    assert code == 2 and "Traceback" not in text and "command line" in text


def test_a_folder_whose_name_is_no_unicode_is_drawn(tmp_path):
    """Names of any bytes: a label with question marks, not a traceback."""
    folder = tmp_path / os.fsdecode(b"run\xff\xfe")
    folder.mkdir()
    for epoch in (1, 2):
        (folder / f"epoch_{epoch}_loss_0.{epoch}.png").write_bytes(b"")
    assert plot_loss.label_runs([folder]) == ["run??"]
    assert plot_loss.main([str(folder), "--no-show"]) == 0 and (folder / "loss.png").exists()
