"""report.py: the page against the files it was made from, and in a real browser."""

import base64
import csv
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, cli
from PIL import Image
from test_plot_loss import assert_refused, at_terminal, environment, fill_disk, modules_after

import report

COLUMNS = ("step", "epoch", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "val_loss", "lr", "grad_norm",
           "images_per_second", "seconds", "skipped_steps")
MACHINE = {"device": "cuda", "processor": "Some GPU, 40 GB"}
HOSTILE = "</title><script>broken=1<!--<img src=x onerror='broken=1'>&quot;\"'&{{ 7 * 7 }}"


# ---- helpers ------------------------------------------------------------------------------------

def grey(epoch):
    """The brightness of an epoch's grid, so that pictures can be told apart."""
    return int(20 + 30 * epoch) % 256


def add_grids(folder, *epochs):
    """Sample grids of these epochs, whose loss is 1 / epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    for epoch in epochs:
        Image.new("L", (120, 60), grey(epoch)).save(folder / f"epoch_{epoch:g}_loss_{1 / epoch:.4f}.png")
    return folder


def metrics_text(count):
    """A metrics.csv of `count` rows, every second one with a validation loss; no two numbers are the same."""
    rows = [[10 * i, i / 2, *(round(1 / i + j / 7, 6) for j in range(5)), round(1.1 / i, 6) if i % 2 == 0 else "", 1e-3,
             0.3 + i / 1000, 900 + i, 30.5, 0] for i in range(1, count + 1)]
    return "".join(",".join(map(str, row)) + "\n" for row in (COLUMNS, *rows))


def make_run(folder, epochs=(1, 2.5, 4), rows=8):
    """A run's folder with everything that a run can leave."""
    add_grids(folder, *epochs)
    (folder / "metrics.csv").write_text(metrics_text(rows))
    settings = {"dataset": "digits", "channel_mults": [1, 3], "path_to_data": "", "compile": None, "eta": 0.0,
                "save_dir": "a/rather/long/path/" * 5}
    (folder / "config.json").write_text(json.dumps({"config": settings, "torch": "2.9", "run_id": "ab",
                                                    "machine": MACHINE, "seconds": 4000.2}))
    for step in (9, 80):
        Image.new("RGB", (900, 50), (step, 90, 0)).save(folder / f"step_{step}.png")
    return folder


class Page(HTMLParser):
    """What a written report holds: tags as (name, attributes), the text, and the tables as rows of cells."""

    def __init__(self, folder):
        super().__init__()
        self.tags, self.tables, self.text, self.cell = [], [], "", None
        self.source = report.write_report(folder).read_text(encoding="utf-8", errors="surrogatepass")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        self.text += data
        if self.cell is not None:
            self.cell += data

    def all(self, tag):
        """The attributes of each such tag."""
        return [attributes for name, attributes in self.tags if name == tag]

    def labels(self):
        """What is said of each figure in words."""
        return [attributes["aria-label"] for attributes in self.all("svg")]


def embedded(image):
    """The bytes of a picture in the page."""
    return base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)


def in_order(folder):
    """The grids of a folder as bytes, by epoch."""
    return [(folder / match[0]).read_bytes() for match in report.find_grids(folder)]


# ---- numbers and pictures -----------------------------------------------------------------------

def test_numbers_are_those_of_the_file(tmp_path):
    """Every cell of metrics.csv stands in the table as it is; nothing is rounded, moved or dropped."""
    page = Page(make_run(tmp_path))
    assert page.tables[0] == list(csv.reader((tmp_path / "metrics.csv").open()))


def test_pictures_are_those_of_the_folder(tmp_path):
    """Grids in order of epoch and the strip of the last step, each byte for byte; the last grid shows."""
    page = Page(make_run(tmp_path, epochs=(10, 2.5, 4)))
    *grids, strip = page.all("img")
    assert [embedded(grid) for grid in grids] == in_order(tmp_path)
    assert [grid["data-title"] for grid in grids] == ["epoch 2.5, loss 0.4000", "epoch 4, loss 0.2500",
                                                      "epoch 10, loss 0.1000"]
    assert ["hidden" in grid for grid in grids] == [True, True, False]
    assert embedded(strip) == (tmp_path / "step_80.png").read_bytes() and "80" in strip["alt"]


def test_summary_settings_and_machine(tmp_path):
    """The head of the page states the run's facts; options and machine are tables of what config.json says."""
    page = Page(make_run(tmp_path / "my run"))
    assert page.text.count("my run") == 2                                    # title and heading
    for fact in ("digits · epoch 4 · step 80 · loss 0.125 (lowest 0.125 at epoch 4)",
                 "validation loss 0.1375 (lowest 0.1375 at epoch 4)", "training time 1 h 6 min",
                 "median images/s 904.5"):
        assert fact in page.text
    _, machine, settings = page.tables
    assert machine == [*map(list, MACHINE.items()), ["torch", "2.9"], ["training time", "1 h 6 min"],
                       ["median images/s", "904.5"]]
    assert settings[:5] == [["dataset", "digits"], ["channel_mults", "[1, 3]"], ["path_to_data", '""'],
                            ["compile", "null"], ["eta", "0.0"]]


def test_figures_say_their_numbers(tmp_path):
    """Both figures are described by last and lowest value for those who cannot see them."""
    losses, quartiles = Page(make_run(tmp_path)).labels()
    assert losses == ("training 0.125 (lowest 0.125 at epoch 4); validation 0.1375 (lowest 0.1375 at epoch 4)")
    assert quartiles.startswith("q1 (least noise) 0.2679 (lowest 0.2679 at epoch 4); q2 0.4107")


def test_curves_pass_through_the_points(tmp_path):
    """The curve has the shape of the numbers: heights in proportion, no point moved or lost. It carries its text."""
    svg = report.draw({"a": [(0.0, 1.0), (1.0, 3.0), (2.0, 2.0)]}, "epoch", '"<', "x")
    assert svg.startswith('<svg role="img" aria-label="&quot;&lt;" ')
    path = re.search(r'id="x-line2d_\d+">\s*<path d="([^"]*)" clip-path[^>]*stroke: #0072b2', svg)[1]
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", path)]
    assert x0 < x1 and y0 > y1                                               # y points down
    assert x1 - x0 == pytest.approx(x2 - x1, abs=1e-4) and y0 - y1 == pytest.approx(2 * (y0 - y2), abs=1e-4)


def test_figures_of_one_page_share_no_ids(tmp_path):
    """Each id is there once and each reference inside the page leads to one, or curves would take others' marks."""
    page = Page(make_run(tmp_path))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(page.all("svg")) == 2 and len(set(ids)) == len(ids)
    referred = re.findall(r'(?:href="#|url\(#|labelledby="|for=")([^")]+)', page.source)
    assert len(referred) > 20 and set(referred) <= set(ids)


def test_losses_far_apart_get_a_log_axis(tmp_path):
    """Small losses stay visible beside large ones: 1, 0.1 and 0.01 lie at equal distances."""
    def heights(*losses):
        svg = report.draw({"a": list(enumerate(losses))}, "epoch", "", "x")
        path = re.search(r'<path d="([^"]*)" clip-path[^>]*stroke: #0072b2', svg)[1]
        return [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]

    a, b, c = heights(1, 0.1, 0.01)
    assert a - b == pytest.approx(b - c, abs=1e-4)
    a, b, c = heights(1, 0.6, 0.2)
    assert a - b == pytest.approx(b - c, abs=1e-4)


def test_same_folder_same_page(tmp_path):
    """Written again from the same files, the report has the same bytes, so it can be compared and cached."""
    assert Page(make_run(tmp_path)).source == Page(tmp_path).source


@pytest.mark.parametrize("seconds, text", [(0, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (4000, "1 h 6 min"),
                                           (90000, "1 d 1 h"), (86400 * 12 + 300, "12 d 5 min")])
def test_duration(seconds, text):
    """Times are given in the units that people use."""
    assert report.duration(seconds) == text


@pytest.mark.parametrize("count", [0, 1, 2, 59, 60, 61, 119, 200, 1000])
def test_evenly(count):
    """At most 60, in order, each once, with first and last and no gap much above another."""
    items = report.evenly(range(count), 60)
    steps = [b - a for a, b in zip(items, items[1:])]
    assert len(items) == min(count, 60) and list(items[:1] + items[-1:] if count > 60 else []) in ([], [0, count - 1])
    assert not steps or 0 < max(steps) <= min(steps) + 1


def about_run(folder, **more):
    """A config.json as runs write it, with `more`."""
    content = dict(config={"dataset": "digits", "epochs": 12, "batch_size": 64}, chosen={"epochs": 12},
                   command="python diffuser.py --mode train --dataset digits --epochs 12", parameters=383649,
                   images=1762, shape=[1, 8, 8], classes=10)
    (folder / "config.json").write_text(json.dumps({**content, **more}))


def test_what_was_chosen_stands_out(tmp_path):
    """Sizes of data and network in the head, the command that repeats the run, what was chosen; all settings folded."""
    about_run(make_run(tmp_path))
    page = Page(tmp_path)
    for fact in ("1,762 images of 8x8x1", "10 classes", "383,649 parameters",
                 "python diffuser.py --mode train --dataset digits --epochs 12"):
        assert fact in page.text
    *_, chosen, settings = page.tables
    assert chosen == [["epochs", "12"]] and len(settings) == 3
    folded = page.source.rindex("<details>")
    assert page.source.rindex("Chosen") < folded < page.source.index("batch_size") and "All 3 settings" in page.text


@pytest.mark.parametrize("more", [
    dict(command=[1], chosen="x", images="many", shape=5, classes=None, parameters=-1), dict(shape=[1, None, 8]),
    dict(shape=[{}, 1, 2], images=True)])
def test_facts_of_another_shape_cost_themselves_only(tmp_path, more):
    """What is no number of images is not shown; the rest of the page is there."""
    about_run(make_run(tmp_path), **more)
    page = Page(tmp_path)
    assert len(page.all("svg")) == 2 and "many" not in page.text and "x8 " not in page.text and "True" not in page.text


def test_images_of_the_data_stand_beside_the_samples(tmp_path):
    """real.png is the second picture of the section, byte for byte, and is no grid of the slider."""
    make_run(tmp_path)
    Image.new("L", (50, 40), 7).save(tmp_path / "real.png")
    page = Page(tmp_path)
    (real,) = [image for image in page.all("img") if "trained on" in image["alt"]]
    assert embedded(real) == (tmp_path / "real.png").read_bytes() and "data-title" not in real
    assert page.source.index("Images of the data") < page.source.index('id="loss"')


def strip(frames=11, rows=3, size=16, gap=4, head=0):
    """A strip as runs draw it, from noise to drawings on white paper; with labels above, a higher `head`."""
    random = np.random.default_rng(0)
    picture = np.full((rows * (size + gap) + gap + head, frames * (size + gap) + gap), 255, np.uint8)
    for row in range(rows):
        for i in range(frames):
            frame = random.integers(0, 256, (size, size)) if i < frames // 2 else np.full((size, size), 255)
            frame[4:8, 4:8] = 10 * i
            top = gap + head + row * (size + gap)
            left = gap + i * (size + gap)
            picture[top : top + size, left : left + size] = frame
            picture[2 : 2 + head // 2, left + 3 : left + 9] = 0
    return Image.fromarray(picture)


@pytest.mark.parametrize("head", [0, 18])
def test_a_strip_is_cut_into_its_frames(tmp_path, head):
    """Frames in order, each as it is in the strip, with all rows and its label, so that a narrow page wraps them."""
    make_run(tmp_path)
    whole = strip(head=head)
    whole.save(tmp_path / "step_90.png")
    page = Page(tmp_path)
    frames = [Image.open(BytesIO(embedded(image))) for image in page.all("img") if "Denoising" in image["alt"]]
    assert [frame.size for frame in frames] == [(16, whole.height)] * 11
    for i, frame in enumerate(frames):
        assert frame.tobytes() == whole.crop((4 + 20 * i, 0, 20 + 20 * i, whole.height)).tobytes()
    assert "11 of 11" in page.source and "Denoising strip" not in page.source


@pytest.mark.parametrize("picture", [
    Image.new("L", (90, 20), 255), Image.new("L", (90, 20), 0), strip(frames=3).crop((0, 0, 50, 40)),
    strip(frames=3).resize((101, 40)), b"no picture"])
def test_other_strips_are_shown_whole(tmp_path, picture):
    """A picture that is not frames side by side is one picture in a box that scrolls."""
    make_run(tmp_path)
    if isinstance(picture, bytes):
        (tmp_path / "step_90.png").write_bytes(picture)
    else:
        picture.save(tmp_path / "step_90.png")
    shown = Page(tmp_path).all("img")[-1]
    assert embedded(shown) == (tmp_path / "step_90.png").read_bytes()


def test_the_load_of_the_machine_is_told(tmp_path):
    """Its columns of metrics.csv become lines of the table about the machine."""
    (tmp_path / "metrics.csv").write_text("step,epoch,loss,machine/cpu_percent,machine/memory_gib\n1,1,0.5,50,0.75\n"
                                          "2,2,0.5,80,0.5\n3,3,0.5,70,\n")
    assert Page(tmp_path).tables[-1] == [["use of all CPUs", "70 %"], ["memory", "0.75 GiB"]]


# ---- what is missing, broken, long or hostile ---------------------------------------------------

def test_nothing_comes_from_outside(tmp_path):
    """Every address in the page is inside it, and the page forbids others."""
    page = Page(make_run(tmp_path))
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    addresses = [value for _, attributes in page.tags for name, value in attributes.items()
                 if name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "rdf:resource")]
    assert addresses and all(value.startswith(("data:image/png;base64,", "#")) for value in addresses)
    assert set(re.findall(r"url\((.)", page.source)) == {"#"} and "@import" not in page.source
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}


def test_hostile_names_are_text(tmp_path):
    """Names of runs, options, columns and machines are shown, never run or taken for markup."""
    folder = make_run(tmp_path / HOSTILE.replace("/", ""))
    part = {HOSTILE: HOSTILE, "dataset": HOSTILE}
    (folder / "config.json").write_text(json.dumps({"config": part, "torch": HOSTILE, "machine": part}))
    quoted = '"' + HOSTILE.replace('"', '""') + '"'
    (folder / "metrics.csv").write_text(f"step,loss,{quoted}\n1,0.5,{quoted}\n")
    page, plain = Page(folder), Page(make_run(tmp_path / "plain"))
    assert [tag for tag, _ in page.tags if tag in ("script", "title", "h1")] == ["title", "h1", "script"]
    assert len(page.all("img")) == len(plain.all("img"))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.tables[0][0][2] == page.tables[0][1][2] == HOSTILE
    assert page.tables[1] == [[HOSTILE, HOSTILE], ["dataset", HOSTILE], ["torch", HOSTILE]]
    assert page.tables[2] == [[HOSTILE, HOSTILE], ["dataset", HOSTILE]]
    assert page.text.count(folder.name) == 2


def test_names_that_are_no_unicode(tmp_path):
    """A lone surrogate, which no file can hold, does not stop the report."""
    make_run(tmp_path)
    (tmp_path / "config.json").write_text(r'{"config": {"a\ud800": "b\udc00"}}')
    assert ["a?", "b?"] in Page(tmp_path).tables[-1]


def replace(path, content):
    """Put other content, text or bytes, into a file; None removes it."""
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("content", [
    None, "", "\n", "step,epo", ",".join(COLUMNS) + "\n", "a,b\n1\n", "\0\n\0\n", b"\xff\xfe\x00\n", "x" * 200_000 + "\n"])
def test_without_metrics_the_grids_tell(tmp_path, content):
    """Where metrics.csv is missing or holds nothing, curve, table and summary come from the names of the grids."""
    make_run(tmp_path)
    replace(tmp_path / "metrics.csv", content)
    page = Page(tmp_path)
    assert page.tables[0] == [["epoch", "loss"], ["1", "1.0000"], ["2.5", "0.4000"], ["4", "0.2500"]]
    assert page.labels() == ["training 0.25 (lowest 0.25 at epoch 4)"]
    assert "names of the grids" in page.text and "epoch 4 · loss 0.25" in page.text


@pytest.mark.parametrize("end", ["90,4.5,0.1", "90,4.5,0.1,1,1,1,1,,1,1,1,1,0", "90,4.5,0.1\n"])
def test_half_written_row_is_left_out(tmp_path, end):
    """A row that the run was writing when it died is no result, also where only digits of its last number lack."""
    make_run(tmp_path)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write(end)
    page = Page(tmp_path)
    assert len(page.tables[0]) == 9 and "loss 0.125 (lowest 0.125 at epoch 4)" in page.text


def test_fewer_columns(tmp_path):
    """A run from before there were epochs and quartiles gets its curve over steps, and no empty figure."""
    (tmp_path / "metrics.csv").write_text("step,loss\n10,0.5\n20,0.25\n30,0.375\n")
    page = Page(tmp_path)
    assert page.labels() == ["training 0.375 (lowest 0.25 at step 20)"]
    assert page.tables == [[["step", "loss"], ["10", "0.5"], ["20", "0.25"], ["30", "0.375"]]]
    assert "step 30 · loss" in page.text and "no grids" in page.text and not page.all("img")


def test_losses_that_are_no_numbers_are_counted(tmp_path):
    """nan and inf are in the table, counted under the figure, and not in the curve or its description."""
    add_grids(tmp_path, 1, 2)
    (tmp_path / "epoch_3_loss_nan.png").write_bytes(b"")
    (tmp_path / "metrics.csv").write_text("step,epoch,loss,val_loss\n1,1,0.5,\n2,2,nan,inf\n3,3,inf,0.5\n4,nan,9,\n")
    page = Page(tmp_path)
    assert page.labels() == ["training inf (lowest 0.5 at epoch 1); validation 0.5 (lowest 0.5 at epoch 3)"]
    assert "Not in the curves: 3 non-finite" in page.text and ["2", "2", "nan", "inf"] in page.tables[0]
    assert "epoch 3, loss nan" in page.text
    (tmp_path / "metrics.csv").write_text("step,epoch,loss\n1,1,nan\n")
    page = Page(tmp_path)
    assert not page.all("svg") and "1 non-finite" in page.text and "loss nan" in page.text


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"x"', "null", "[" * 200_000, b"\xff",
                                     '{"config": [1], "machine": "x", "seconds": "soon"}',
                                     '{"config": null, "seconds": NaN}', '{"seconds": 1' + "0" * 400 + "}"])
def test_without_config_the_rest_is_there(tmp_path, content):
    """A config.json that is missing, broken or of another shape costs its tables only."""
    make_run(tmp_path)
    replace(tmp_path / "config.json", content)
    page = Page(tmp_path)
    assert len(page.all("img")) == 4 and len(page.all("svg")) == 2 and len(page.tables) == 2
    assert page.tables[1] == [["time in training steps", "4 min 4 s"], ["median images/s", "904.5"]]


def test_long_runs_are_thinned_out(tmp_path):
    """200 grids and 1000 rows become 60 and 100 with the first and the last, and the page says so."""
    page = Page(make_run(tmp_path, epochs=range(1, 201), rows=1000))
    grids, files = page.all("img")[:-1], in_order(tmp_path)
    assert len(grids) == 60 and [embedded(grids[0]), embedded(grids[-1])] == [files[0], files[-1]]
    assert "60 of 200 grids" in page.text and "100 of 1000 rows" in page.text
    assert [page.tables[0][1][0], page.tables[0][-1][0], len(page.tables[0])] == ["10", "10000", 101]


@pytest.mark.parametrize("count, words", [(0, "no grids"), (1, "epoch 1, loss 1.0000")])
def test_fewer_than_two_grids_need_no_slider(tmp_path, count, words):
    """A slider with nothing to choose is not shown, nor is its script; what is missing is said."""
    page = Page(make_run(tmp_path, epochs=range(1, count + 1)))
    assert not page.all("input") and not page.all("script") and words in page.text
    assert len(page.all("img")) == count + 1


def test_empty_folder(tmp_path):
    """A folder that holds nothing of a run still gets a page that says so."""
    page = Page(tmp_path)
    assert "no grids" in page.text and "no losses" in page.text and page.tables == []


def test_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    """An old report is whole until the new one takes its place, and no temporary file is left."""
    make_run(tmp_path)
    (tmp_path / "report.html").write_text("old")
    before = sorted(tmp_path.iterdir())

    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        report.write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old" and sorted(tmp_path.iterdir()) == before


# ---- command line -------------------------------------------------------------------------------

def command(*arguments, cwd, **more):
    """report.py with these arguments, as a user without a display would run it."""
    return cli(*arguments, cwd=cwd, script="report.py", env=dict(DISPLAY="", WAYLAND_DISPLAY=""), **more)


def refused(result, *words):
    """Check for exit code 2 and a single line of report.py that holds `words`."""
    assert_refused(result, *words, script="report")


def test_importing_is_light():
    """Neither torch nor the libraries that draw are loaded before a report is written."""
    assert modules_after("import report", "torch", "diffuser", "matplotlib", "jinja2") == "[]"


def test_writing_loads_no_torch(tmp_path):
    """A report is written without torch too, so that pages can be made where there is none."""
    make_run(tmp_path)
    code = f"import report; assert report.main([{str(tmp_path)!r}]) == 0"
    assert modules_after(code, "torch", "diffuser", "matplotlib", "jinja2") == "['matplotlib', 'jinja2']"
    assert (tmp_path / "report.html").exists()


def test_command_writes_a_report_for_each_run(tmp_path):
    """Each folder gets its page, and no figure or other file is left."""
    make_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.csv").write_text(metrics_text(3))             # a run without grids

    result = command("a", "b", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert result.stdout.splitlines() == [f"saved {Path(run, 'report.html')}" for run in "ab"]
    assert sorted(os.listdir(tmp_path / "b")) == ["metrics.csv", "report.html"]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and (tmp_path / "a" / "report.html").exists()


def test_command_writes_what_the_function_writes(tmp_path):
    """The page made by hand is byte for byte the one that a run makes when it ends."""
    make_run(tmp_path)
    written = report.write_report(tmp_path).read_bytes()
    assert command(".", cwd=tmp_path).returncode == 0
    assert (tmp_path / "report.html").read_bytes() == written


def test_one_folder_that_is_no_run_stops_all_before_any(tmp_path):
    """Of several runs no report is written where one of them is none."""
    make_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    refused(command("a", "b", cwd=tmp_path), "there is no run in b")
    assert not (tmp_path / "a" / "report.html").exists()


def test_command_asks_which_run(tmp_path):
    """Without a folder the runs are listed, as for the figure."""
    make_run(tmp_path / "samples" / "run")
    result = command(cwd=tmp_path, stdin="1\n")
    assert result.returncode == 0 and (tmp_path / "samples" / "run" / "report.html").exists()


def test_samples_dir_is_an_option(tmp_path):
    """--samples_dir moves the search."""
    make_run(tmp_path / "elsewhere" / "run")
    result = command("--samples_dir", "elsewhere", cwd=tmp_path, stdin="\n")
    assert result.returncode == 0 and (tmp_path / "elsewhere" / "run" / "report.html").exists()


def test_quitting_and_the_end_of_input(tmp_path):
    """q is no error; where nobody answers, one line says to give a directory to report.py; nothing is written."""
    make_run(tmp_path / "samples" / "run")
    assert command(cwd=tmp_path, stdin="q\n").returncode == 0
    refused(command(cwd=tmp_path), f"python report.py {Path('samples/run')}")
    assert not list(tmp_path.rglob("report.html"))


def test_nothing_to_list(tmp_path):
    """Without runs and without a display the user is told where it looked and what to give."""
    refused(command(cwd=tmp_path), "samples", "python report.py DIR")


def test_ctrl_c_at_the_question(tmp_path):
    """Ctrl-C leaves with 130 and without a traceback."""
    make_run(tmp_path / "samples" / "run")
    code, text = at_terminal(tmp_path, b"\x03", script=ROOT / "report.py")
    assert code == 130 and "Traceback" not in text and "KeyboardInterrupt" not in text


def test_ctrl_c_while_writing(tmp_path, monkeypatch, capsys):
    """So does Ctrl-C while the page is made, and an old report is as it was."""
    def interrupted(folder):
        raise KeyboardInterrupt

    make_run(tmp_path)
    (tmp_path / "report.html").write_text("old")
    monkeypatch.setattr(report, "render", interrupted)
    assert report.main([str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nreport: interrupted\n"
    assert (tmp_path / "report.html").read_text() == "old"


def test_wrong_folders_are_one_line(tmp_path):
    """A folder that is missing, a file or empty is named in one line, and nothing is written."""
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "file", "empty"):
        refused(command(name, cwd=tmp_path), name, "give")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "file"]


def test_parent_of_the_runs_is_met_with_a_suggestion(tmp_path):
    """`report.py samples` names a run inside it that would work."""
    make_run(tmp_path / "samples" / "run")
    refused(command("samples", cwd=tmp_path), str(Path("samples/run")))


@pytest.mark.parametrize("flags, words", [
    (["--sample_dir", "x"], "did you mean --samples_dir?"), (["--save", "x.png"], "unknown option --save"),
    (["--samples_dir"], "--samples_dir")])
def test_wrong_flags_are_one_line(tmp_path, flags, words):
    """A flag that is unknown, such as one for figures, or lacks its value is named in one line; nothing is written."""
    make_run(tmp_path / "run")
    refused(command("run", *flags, cwd=tmp_path), words)
    assert not list(tmp_path.rglob("report.html"))


def test_debug_shows_the_traceback(tmp_path):
    """With --debug a failure comes with its traceback, for those who repair the script."""
    result = command("nowhere", "--debug", cwd=tmp_path)
    assert result.returncode != 0 and "Traceback" in result.stderr and "nowhere" in result.stderr


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_package_is_named(tmp_path, package):
    """A bare Python gets one line with the command to run, exit 1, not a traceback; an old report is as it was."""
    make_run(tmp_path)
    (tmp_path / "report.html").write_text("old")
    code = (f"import sys; sys.modules[{package!r}] = None; "
            "import report; sys.exit(report.main([sys.argv[1]]))")
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                            stdin=subprocess.DEVNULL, timeout=60, env=environment())
    assert result.returncode == 1
    assert f"pip install {package}" in result.stderr and result.stderr.count("\n") == 1
    assert (tmp_path / "report.html").read_text() == "old"


def test_full_disk_leaves_the_old_report(tmp_path, monkeypatch, capsys):
    """Where there is no room one line says so, the old report is as it was, and no half file is left."""
    make_run(tmp_path)
    (tmp_path / "report.html").write_text("old")
    before = sorted(tmp_path.iterdir())

    fill_disk(monkeypatch)
    assert report.main([str(tmp_path)]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("report: cannot write") and errors.count("\n") == 1 and str(tmp_path) in errors
    assert (tmp_path / "report.html").read_text() == "old" and sorted(tmp_path.iterdir()) == before


def test_folder_that_cannot_be_written(tmp_path):
    """A place that the report cannot take is one line that names it, and nothing is left beside it."""
    make_run(tmp_path / "run")
    (tmp_path / "run" / "report.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    refused(command("run", cwd=tmp_path), "cannot write", str(Path("run/report.html")))
    assert sorted(tmp_path.rglob("*")) == before


def test_read_only_folder(tmp_path):
    """So is a folder that only others may write."""
    make_run(tmp_path / "run").chmod(0o500)
    try:
        if os.access(tmp_path / "run", os.W_OK):
            pytest.skip("this user may write everywhere")
        refused(command("run", cwd=tmp_path), "cannot write", "run")
    finally:
        (tmp_path / "run").chmod(0o700)


def test_a_grid_that_cannot_be_read_is_left_out(tmp_path):
    """The page shows the rest."""
    whole = len(re.findall("data:image/png", Page(make_run(tmp_path / "a")).source))
    run = make_run(tmp_path / "b")
    broken = sorted(run.glob("epoch_*.png"))[0]
    broken.unlink()
    broken.mkdir()
    assert len(re.findall("data:image/png", Page(run).source)) == whole - 1


def test_loss_too_large_to_draw(tmp_path):
    """A loss that no axis can hold is left out and counted; the largest of 32 bits is drawn."""
    (tmp_path / "metrics.csv").write_text("step,loss\n1,1e308\n2,0.5\n1e200,0.4\n")
    assert "2 non-finite or too large" in Page(tmp_path).text
    (tmp_path / "metrics.csv").write_text("step,loss\n1,3.4e38\n2,1e-45\n3,-3.4e38\n")
    assert "3.4e+38" in Page(tmp_path).labels()[0]


# ---- in a browser -------------------------------------------------------------------------------

EPOCHS = (1, 2.5, 4, 5)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run with a long name, wide tables and a wide strip, and its report."""
    folder = make_run(tmp_path_factory.mktemp("browser") / ("samples_" + "long_" * 20), EPOCHS, rows=40)
    report.write_report(folder)
    return folder


@pytest.fixture
def view(browser, run_folder):
    """A function that opens the report offline from its file; the page must cause no error and no request."""
    contexts, problems, requests = [], [], []

    def view(folder=run_folder, **more):
        contexts.append(browser.new_context(offline=True, **more))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((folder / "report.html").as_uri())
        return page

    yield view
    for context in contexts:
        context.close()
    assert problems == []
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert len([url for url in requests if url.startswith("file:")]) == len(contexts)


def visible_grid(page):
    """The epoch whose grid can be seen, told by its pixels."""
    grid = page.locator("img[data-title]:visible")
    assert grid.count() == 1
    picture = Image.open(BytesIO(grid.screenshot())).convert("L")
    return next(epoch for epoch in EPOCHS if abs(picture.getpixel((60, 30)) - grey(epoch)) <= 2)


def test_arrow_keys_change_the_grid(view):
    """The slider starts at the last epoch; arrow keys move picture, spoken value and text together, to the ends."""
    page = view()
    slider = page.get_by_role("slider", name="Epoch")
    slider.focus()
    assert visible_grid(page) == 5
    for key, epoch in (("ArrowLeft", 4), ("ArrowLeft", 2.5), ("ArrowRight", 4), ("Home", 1), ("ArrowLeft", 1), ("End", 5)):
        page.keyboard.press(key)
        title = f"epoch {epoch:g}, loss {1 / epoch:.4f}"
        assert visible_grid(page) == epoch
        assert slider.get_attribute("aria-valuetext") == page.get_by_role("status").inner_text() == title
        assert page.get_by_role("img", name=f"Samples: {title}").is_visible()


def test_without_scripts_the_last_grid_shows(view):
    """Where scripts are off there is no dead slider, and the newest samples are there."""
    page = view(java_script_enabled=False)
    assert visible_grid(page) == 5 and not page.locator("input").is_visible()
    assert page.get_by_role("status").inner_text() == "epoch 5, loss 0.2000"


def test_phone(view):
    """On 360 pixels only boxes scroll sideways, not the page; they take focus for those without a mouse."""
    api = pytest.importorskip("playwright.sync_api")
    page = view(viewport=dict(width=360, height=740))
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("Table of numbers", "Denoising strip"):
        box = page.get_by_role("region", name=name)
        assert box.evaluate("box => box.scrollWidth > box.clientWidth")
        box.focus()
        page.keyboard.press("ArrowRight")
        api.expect(box).not_to_have_js_property("scrollLeft", 0)
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height))"
    assert page.evaluate(smallest) >= 10


def test_phone_shows_the_last_frame(view, tmp_path):
    """On 390 pixels the way from noise to image wraps: its last frame is on the page, samples and data as well."""
    folder = make_run(tmp_path)
    strip(size=64).save(folder / "step_90.png")
    Image.new("L", (684, 290), 7).save(folder / "real.png")
    about_run(folder)
    report.write_report(folder)
    page = view(folder, viewport=dict(width=390, height=844))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for name in ("Denoising at step 90, 11 of 11", "Images that the run was trained on"):
        box = page.get_by_role("img", name=name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] >= 60


def contrast(one, other):
    """The ratio of two colours 'rgb(r, g, b)' as WCAG 2 defines it."""
    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    return max(luminance(one), luminance(other)) / min(luminance(one), luminance(other))


def styles(page, selector, name):
    """The values that a style has on the elements found."""
    return set(page.locator(selector).evaluate_all(f"found => found.map(element => getComputedStyle(element).{name})"))


def test_light_and_dark(view):
    """The page follows the system; text has a contrast of 4.5 and lines one of 3 on both, figures included."""
    seen = []
    for scheme in ("light", "dark"):
        page = view(color_scheme=scheme)
        (background,), (text,) = styles(page, "body", "backgroundColor"), styles(page, "body", "color")
        assert styles(page, "svg text", "fill") == {text}
        texts = styles(page, "h1, h2, p, th, td, label, output, summary, figcaption", "color")
        assert len(texts) == 2 and min(contrast(colour, background) for colour in texts) >= 4.5
        lines = styles(page, "svg path, svg use", "stroke") - {"none"}
        assert len(lines) == 5 and text in lines and min(contrast(line, background) for line in lines) >= 3
        seen.append((background, text))
    assert contrast(seen[0][0], seen[1][0]) > 10 and contrast(seen[0][1], seen[1][1]) > 10


def test_roles_and_names(view):
    """Those who hear the page or use keys find landmarks, headings, names for all pictures, and see the focus."""
    page = view()
    assert page.get_by_role("banner").count() == page.get_by_role("main").count() == 1
    headings = page.get_by_role("heading").all_inner_texts()
    assert headings[1:] == ["Samples", "Loss", "Training and validation", "By quartile of the timestep", "Denoising",
                            "Machine and timings", "Settings"]
    assert headings[0] == page.title() and page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("region").count() == 6                           # five sections and the box of the strip
    images = page.get_by_role("img")
    assert images.count() == page.get_by_role("img", name=re.compile(r"\w")).count() == 4
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "epoch" and styles(page, ":focus", "outlineStyle") == {"solid"}


def test_hostile_names_run_nothing(view, tmp_path):
    """What a parser takes for text a browser takes for text too."""
    folder = make_run(tmp_path / HOSTILE.replace("/", ""))
    (folder / "config.json").write_text(json.dumps({"config": {HOSTILE: HOSTILE}}))
    report.write_report(folder)
    page = view(folder)
    assert page.evaluate("typeof broken") == "undefined" and page.locator("h1").inner_text() == folder.name


def test_times_that_are_no_times_are_unknown():
    """Seconds that add up to infinity do not stop a report."""
    assert report.duration(math.inf) == report.duration(math.nan) == "unknown" and report.duration(67) == "1 min 7 s"
