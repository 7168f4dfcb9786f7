"""diffuser_lib/metrics.py: metrics.csv whatever the disk does, config.json, and what TensorBoard and Weights & Biases
themselves read from the files."""

import csv
import dataclasses
import errno
import json
import os
import struct
import sys
import threading
from pathlib import Path

import prepared
import pytest
import torch
from conftest import TINY_FLAGS, cli, small_file_system, tiny_training
from PIL import Image

import diffuser
from diffuser_lib import metrics
from diffuser_lib.metrics import MetricsFile, MetricsLogger, TensorBoard, WeightsAndBiases, machine_load


def rows(path):
    """The rows of a metrics.csv."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def steps(path):
    """The steps of its rows."""
    return [int(row["step"]) for row in rows(path)]


def no_space(*arguments, **options):
    """Stands for any function that meets a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- metrics.csv -------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    """Where a metrics.csv goes."""
    return tmp_path / "run" / "metrics.csv"


def written(path, *at, start=0):
    """A MetricsFile with a row at each of these steps."""
    file = MetricsFile(path, start)
    for step in at:
        file.add(dict(step=step, loss=1 / step))
    return file


def test_each_row_is_in_the_file_at_once(path):
    """A header, then a row per log; a kill at any moment loses none, for nothing waits in a buffer."""
    file = MetricsFile(path, 0)
    assert not path.exists()
    for step in (2, 4, 6):
        file.add(dict(step=step, loss=0.5, val_loss=""))
        assert steps(path)[-1] == step
    assert path.read_text() == "step,loss,val_loss\n2,0.5,\n4,0.5,\n6,0.5,\n"


def test_a_new_run_forgets_the_old_file(path):
    """From step 0 the rows of an earlier run are gone with the first row, and stay readable until then."""
    written(path, 1, 2, 3).close()
    file = MetricsFile(path, 0)
    assert steps(path) == [1, 2, 3]
    file.add(dict(step=1, loss=9))
    assert rows(path) == [dict(step="1", loss="9")]


def test_a_resumed_run_goes_on_in_the_file(path):
    """Up to the step of its checkpoint the rows stay; what is trained again stands there once."""
    written(path, 10, 20, 30, 40).close()
    file = MetricsFile(path, 25)
    assert steps(path) == [10, 20]
    file.add(dict(step=30, loss=0.25))
    assert steps(path) == [10, 20, 30]
    assert rows(path)[-1]["loss"] == "0.25"


def test_a_run_that_goes_back_rewinds_the_file(path):
    """After divergence: rows past the step are forgotten at once, down to none of them."""
    file = written(path, 10, 20, 30)
    file.rewind(20)
    assert steps(path) == [10, 20]
    file.add(dict(step=30, loss=2))
    assert steps(path) == [10, 20, 30]
    file.rewind(0)
    assert path.read_text() == "step,loss\n"
    file.add(dict(step=10, loss=3))
    assert rows(path) == [dict(step="10", loss="3")]


def test_a_step_that_is_no_number_is_left_out(path):
    """A row with thousands of digits where the step was, or with other signs, is none of ours."""
    written(path, 1, 2).close()
    path.write_text(path.read_text() + "9" * 5000 + ",1\n²,1\n-3,1\n")
    assert [row["step"] for row in MetricsFile(path, 2).rows] == ["1", "2"]


def test_rows_of_a_full_disk_are_written_at_the_end(path, monkeypatch):
    """Also where no other row follows, once there is room."""
    file = written(path, 1)
    with monkeypatch.context() as full:
        full.setattr(MetricsFile, "write_last", lambda self: (setattr(self, "file", None), (_ for _ in ()).throw(OSError(28, "full")))[1])
        full.setattr(metrics, "write_atomically", lambda *a: (_ for _ in ()).throw(OSError(28, "full")))
        file.file.close()
        file.file = None
        file.add(dict(step=2, loss=0.5))
    assert steps(path) == [1]
    file.close()
    assert steps(path) == [1, 2]


def test_new_columns_appear(path):
    """Numbers that an older version or an earlier part of the run did not have: a column more, empty before; one that is
    no longer there stays, empty from now on."""
    written(path, 1, 2).close()
    file = MetricsFile(path, 2)
    file.add(dict(step=3, loss=0.1, skipped_steps=0))
    file.add(dict(step=4, skipped_steps=1))
    assert rows(path) == [
        dict(step="1", loss="1.0", skipped_steps=""), dict(step="2", loss="0.5", skipped_steps=""),
        dict(step="3", loss="0.1", skipped_steps="0"), dict(step="4", loss="", skipped_steps="1")]


@pytest.mark.parametrize("end, kept", [
    ("3,0.3333", [1, 2]),                                        # cut off, perhaps within the number
    ("3\n", [1, 2]),
    ("3,0.3,7,8\n", [1, 2]),
    ("x,0.3\n", [1, 2]),
    ("-3,0.3\n", [1, 2]),
    ("²,0.3\n", [1, 2]),
    (",\n", [1, 2]),
    ("\0\0\0\0\0\0\0\0", [1, 2]),
    ("\0\0\0,\0\n", [1, 2]),
    ("\n\n3,0.3\n", [1, 2, 3]),
    ("3,0.3\n3", [1, 2, 3]),
    ("3,\"" + "\0" * 200_000 + "\n", [1, 2]),                    # more than csv takes for a field
], ids=range(12))
def test_what_was_written_by_half_is_dropped(path, end, kept):
    """A power cut may leave half a row, or anything: whole rows before it stay, and the file is sound again."""
    written(path, 1, 2).close()
    with open(path, "a") as file:
        file.write(end)
    file = MetricsFile(path, 100)
    assert steps(path) == kept
    file.add(dict(step=101, loss=0.5))
    assert steps(path) == [*kept, 101]


@pytest.mark.parametrize("content", [
    b"", b"\n", b"\n\n\n", b"step", b"step,loss", b"\xff\xfe\x00", b"\0" * 5000, b"\0\n" * 500, b"some,other,table\n1,2,3\n",
    b"step,epoch\n1,\"" + b"\0" * 200_000, b"a\n1\n", b"\"\n", b"{}\n[]\n"], ids=range(13))
def test_a_file_that_is_no_table_is_begun_anew(path, content):
    """Whatever stands there, a resumed run starts, and its rows are all there is."""
    path.parent.mkdir()
    path.write_bytes(content)
    file = MetricsFile(path, 100)
    for step in (150, 200):
        file.add(dict(step=step, epoch=1))
    assert [(row["step"], row["epoch"]) for row in rows(path)] == [("150", "1"), ("200", "1")]


def test_a_missing_file_is_begun_anew(path):
    """Resumed where only the checkpoint was copied to."""
    written(path, 150, 200, start=100)
    assert steps(path) == [150, 200]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_rows_that_could_not_be_written_are_written_later(path, monkeypatch, capsys):
    """On a full disk each row is one warning; with room again all stand there, in order and once."""
    file = written(path, 1)
    file.file.close()
    file.file = open("/dev/full", "ab", buffering=0)
    file.add(dict(step=2, loss=0.5))
    with monkeypatch.context() as full:
        full.setattr(metrics, "write_atomically", no_space)
        for step in (3, 4):
            file.add(dict(step=step, loss=0.5))
    errors = capsys.readouterr().err
    assert errors.count("No space left") == 3
    assert str(path) in errors
    assert steps(path) == [1]
    file.add(dict(step=5, loss=0.5))
    assert steps(path) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err == ""


def test_a_row_that_went_in_by_half_is_written_anew(path, capsys):
    """The system may take some bytes of a row before the disk is full: the half row does not stay."""
    class HalfFull:
        def write(self, line):
            with open(path, "ab") as file:
                file.write(line[: len(line) // 2])
            return len(line) // 2

    file = written(path, 1)
    file.file.close()
    file.file = HalfFull()
    file.add(dict(step=2, loss=0.5))
    assert "No space left" in capsys.readouterr().err
    file.add(dict(step=3, loss=0.25))
    assert path.read_text() == "step,loss\n1,1.0\n2,0.5\n3,0.25\n"


def test_rows_that_were_taken_back_do_not_return(path, monkeypatch):
    """Rewinding while the disk is full: with room again each step stands there once."""
    file = written(path, 50, 100, 150)
    with monkeypatch.context() as full:
        full.setattr(metrics, "write_atomically", no_space)
        file.rewind(50)
        file.add(dict(step=100, loss=2))
    file.add(dict(step=150, loss=2))
    assert steps(path) == [50, 100, 150]
    assert [row["loss"] for row in rows(path)] == ["0.02", "2", "2"]


def test_a_disk_that_fills_up_and_is_emptied(tmp_path, capsys):
    """A real one: rows appended until it is full, then room: nothing is missing, and nothing is there twice."""
    with small_file_system(tmp_path / "disk", "64k") as place:
        file = written(place / "metrics.csv", *range(1, 10))
        filler = place / "filler"
        with pytest.raises(OSError, match="No space left"):
            filler.write_bytes(b"x" * 2**20)
        for step in range(10, 500):
            file.add(dict(step=step, loss=1 / step))
        assert "No space left" in capsys.readouterr().err
        filler.unlink()
        file.add(dict(step=500, loss=1 / 500))
        assert steps(place / "metrics.csv") == list(range(1, 501))
        file.close()


def test_the_last_number_of_each_column(path):
    """Of the last row that has one: what trackers show as the result of a run. What is no number is left out."""
    file = MetricsFile(path, 0)
    file.add(dict(step=1, loss=0.5, val_loss=0.75, note="x"))
    file.add(dict(step=2, loss=0.25, val_loss="", note=""))
    file.add(dict(step=3, loss="0.8\0", val_loss="", note=""))
    assert file.final() == dict(step=3, loss=0.25, val_loss=0.75)


def test_the_file_is_let_go(path):
    """Closed twice is closed once, and a closed file can be added to."""
    file = written(path, 1)
    handle = file.file
    file.close()
    file.close()
    assert handle.closed
    file.add(dict(step=2, loss=0.5))
    assert steps(path) == [1, 2]
    file.close()


# ---- MetricsLogger -----------------------------------------------------------------------------


class Recorder:
    """A tracker that remembers."""

    def __init__(self):
        self.logged = []
        self.final = None

    def log(self, step, values):
        self.logged.append((step, values))

    def finish(self, final):
        self.final = final


def about(folder):
    """What config.json holds."""
    return json.loads((folder / "config.json").read_text())


def test_config_json_says_what_repeats_the_run(tmp_path):
    """The options, the machine, the version of torch; an id that no other run has."""
    MetricsLogger(tmp_path / "a", dict(batch_size=3), 0, dict(cpu="one"))
    MetricsLogger(tmp_path / "b", dict(batch_size=3), 0, dict(cpu="one"))
    content = about(tmp_path / "a")
    assert content["config"] == dict(batch_size=3)
    assert content["machine"] == dict(cpu="one")
    assert content["torch"] == torch.__version__
    assert content["seconds"] >= 0
    assert content["run_id"] != about(tmp_path / "b")["run_id"]


def test_id_and_seconds_go_on_in_a_resumed_run(tmp_path):
    """A run in two parts is one run, as long as both; from step 0 it is another."""
    MetricsLogger(tmp_path, {}, 0, {})
    first = about(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**first, "seconds": 1000.0}))

    resumed = MetricsLogger(tmp_path, dict(epochs=9), 5, {})
    assert about(tmp_path)["run_id"] == first["run_id"] == resumed.run_id
    assert about(tmp_path)["seconds"] >= 1000
    assert about(tmp_path)["config"] == dict(epochs=9)
    resumed.close(dict(epochs=10))
    assert about(tmp_path)["seconds"] >= 1000
    assert about(tmp_path)["config"] == dict(epochs=10)

    MetricsLogger(tmp_path, {}, 0, {})
    assert about(tmp_path)["run_id"] != first["run_id"]
    assert about(tmp_path)["seconds"] < 1000


@pytest.mark.parametrize("content", [
    "", "{", "[]", "3", "{}", '{"run_id": "x"}', '{"run_id": "x", "seconds": null}', '{"run_id": "x", "seconds": "long"}', "\0"])
def test_a_spoilt_config_json_is_no_obstacle(tmp_path, content):
    """Written by half or by other hands: the run goes on, and the file is whole again."""
    (tmp_path / "config.json").write_text(content)
    logger = MetricsLogger(tmp_path, {}, 5, {})
    assert about(tmp_path)["run_id"] == logger.run_id
    assert logger.run_id


def test_a_full_disk_at_the_start_is_told_and_survived(tmp_path, monkeypatch, capsys):
    """Neither config.json nor metrics.csv can be written, at first and at the end: warnings, no error."""
    monkeypatch.setattr(metrics, "write_atomically", no_space)
    monkeypatch.setattr(metrics, "write_json", no_space)
    logger = MetricsLogger(tmp_path, {}, 0, {})
    logger.log(dict(step=1, loss=0.5))
    logger.close({})
    errors = capsys.readouterr().err
    assert errors.count("config.json could not be written") == 2
    assert errors.count("metrics.csv could not be written") == 2


def test_trackers_get_the_numbers_of_a_row_and_of_the_machine(tmp_path, monkeypatch):
    """Without the step, which is apart, and without what is empty; at the end the last of each."""
    monkeypatch.setattr(metrics, "machine_load", lambda: {"machine/cpu_percent": 7.0})
    logger = MetricsLogger(tmp_path, {}, 0, {})
    recorder = Recorder()
    logger.start_tracker("recorder", lambda: recorder)
    logger.log(dict(step=1, loss=0.5, val_loss=0.75))
    logger.log(dict(step=2, loss=0.25, val_loss=""))
    logger.track(2, dict(samples=Path("grid.png")))
    logger.rewind(1)
    logger.close({})
    assert recorder.logged == [
        (1, {"loss": 0.5, "val_loss": 0.75, "machine/cpu_percent": 7.0}),
        (2, {"loss": 0.25, "machine/cpu_percent": 7.0}),
        (2, {"samples": Path("grid.png")})]
    assert recorder.final == dict(step=1, loss=0.5, val_loss=0.75)
    assert steps(tmp_path / "metrics.csv") == [1]


def test_the_load_of_the_machine_is_in_each_row(tmp_path, monkeypatch):
    """Without trackers too, as far as it can be read; a file from before that goes on with the new columns."""
    (tmp_path / "metrics.csv").write_text("step,loss\n1,0.5\n")
    load = {"machine/cpu_percent": 7.123456, "machine/memory_gib": 0.5}
    monkeypatch.setattr(metrics, "machine_load", lambda: load)
    logger = MetricsLogger(tmp_path, {}, 1, {})
    logger.log(dict(step=2, loss=0.25))
    load.clear()
    logger.log(dict(step=3, loss=0.125))
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,loss,machine/cpu_percent,machine/memory_gib", "1,0.5,,", "2,0.25,7.123,0.5", "3,0.125,,"]


def test_config_json_has_the_facts_as_they_end(tmp_path):
    """What else is said of a run stands beside its options, and in its last state when it ends."""
    logger = MetricsLogger(tmp_path, dict(batch_size=3), 0, {}, dict(images=7, command="a"))
    assert (about(tmp_path)["images"], about(tmp_path)["command"]) == (7, "a")
    logger.close(dict(batch_size=4), dict(images=7, command="b"))
    assert (about(tmp_path)["command"], about(tmp_path)["config"]) == ("b", dict(batch_size=4))


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, capsys):
    """What to install, or what is wrong; the others start."""
    logger = MetricsLogger(tmp_path, {}, 0, {})

    def missing():
        import surely_not_installed  # noqa: F401

    def broken():
        raise RuntimeError("no such server\nand more")

    logger.start_tracker("wandb", missing)
    logger.start_tracker("tensorboard", broken)
    logger.start_tracker("recorder", Recorder)
    assert capsys.readouterr().err == (
        "no wandb: pip install wandb; training goes on without it\n"
        "no tensorboard: no such server; training goes on without it\n")
    assert list(logger.trackers) == ["recorder"]


def test_a_tracker_that_fails_is_dropped(tmp_path, capsys):
    """At a row or at the end: said once, and the others go on."""
    class Broken(Recorder):
        def __init__(self, when):
            super().__init__()
            self.when = when

        def log(self, step, values):
            super().log(step, values)
            if self.when == step:
                raise RuntimeError("server gone")

        def finish(self, final):
            raise RuntimeError("server gone")

    logger = MetricsLogger(tmp_path, {}, 0, {})
    at_a_row = Broken(when=2)
    recorder = Recorder()
    for name, tracker in ("row", at_a_row), ("end", Broken(when=None)), ("recorder", recorder):
        logger.start_tracker(name, lambda tracker=tracker: tracker)
    for step in (1, 2, 3):
        logger.log(dict(step=step, loss=0.5))
    assert capsys.readouterr().err == "row failed (server gone): going on without it\n"
    logger.close({})
    assert capsys.readouterr().err == "end failed (server gone): going on without it\n"
    assert [step for step, _ in at_a_row.logged] == [1, 2]
    assert [step for step, _ in recorder.logged] == [1, 2, 3]
    assert recorder.final == dict(step=3, loss=0.5)
    assert steps(tmp_path / "metrics.csv") == [1, 2, 3]


def test_memory_and_use_of_a_gpu_are_read_where_they_can_be(monkeypatch):
    """On CUDA memory and utilization; without nvidia-ml-py, memory alone; without psutil no CPU, and no error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "utilization", lambda: 71)
    load = machine_load()
    assert load["machine/gpu_memory_gib"] == 3
    assert load["machine/gpu_percent"] == 71
    assert load["machine/cpu_percent"] >= 0
    assert 0.05 < load["machine/memory_gib"] < 24
    monkeypatch.delattr(torch.cuda, "utilization")
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert machine_load() == {"machine/gpu_memory_gib": 3}


# ---- TensorBoard and Weights & Biases: read back by their own libraries ------------------------


@pytest.fixture
def offline(monkeypatch, folder):
    """No key, no answers, no home with settings of somebody's own."""
    for name in list(os.environ):
        if name.startswith("WANDB"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "no-netrc"))
    return folder


def events(folder):
    """What TensorBoard makes of a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"images": 0, "scalars": 0}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=everything).Reload()


def hyperparameters(found):
    """The options that TensorBoard lists a run under."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    plugin = found.SummaryMetadata("_hparams_/session_start_info").plugin_data
    return plugin_data_pb2.HParamsPluginData.FromString(plugin.content).session_start_info.hparams


def scalars(found, name):
    """[(step, value)] of a curve."""
    return [(event.step, event.value) for event in found.Scalars(name)]


def wandb_records(path):
    """The records of a run that has ended."""
    records = list(parse_wandb(path.read_bytes()))
    assert any(record.HasField("exit") for record in records), f"{path} has no end"
    return records


def parse_wandb(content):
    """The whole records in a .wandb file: blocks of 32 KiB, in them pieces with CRC, length and kind, of protocol
    buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    block = 32768
    header = 7
    place = header                                               # of the file
    whole = b""
    while place + header <= len(content):
        assert content[:4] == b":W&B"
        if block - place % block < header:                       # no header fits: the next block
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + header])
        piece = content[place + header : place + header + length]
        if len(piece) < length:                                  # not yet written
            return
        whole += piece
        place += header + length
        if kind in (1, 4):                                       # whole, or the last piece
            yield Record.FromString(whole)
            whole = b""


def history(path):
    """The rows that were logged, {name: value}."""
    found = []
    for record in wandb_records(path):
        if record.HasField("history"):
            items = record.history.item
            found.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def wandb_run(path):
    """What a .wandb file says about its run."""
    return next(record.run for record in wandb_records(path) if record.HasField("run"))


def wandb_final(path):
    """The final numbers in a .wandb file."""
    final = {}
    for record in wandb_records(path):
        if record.HasField("summary"):
            for update in record.summary.update:
                final[update.key or ".".join(update.nested_key)] = update.value_json
    return final


CONFIG = dict(batch_size=300, flip=True, dropout=0.1, dataset="digits", channel_mults=(1, 2), seed=None)


def test_tensorboard_reads_what_was_logged(tmp_path):
    """Each number at its step, a picture as it is on the disk, options with the final numbers; a resumed run is one
    curve."""
    grid = tmp_path / "grid.png"
    Image.effect_noise((30, 20), 90).save(grid)
    for step, last in (0, 6), (4, 8):                            # stopped after step 6, resumed from step 4
        tracker = TensorBoard(tmp_path, CONFIG, step)
        for at in range(step + 2, last + 1, 2):
            tracker.log(at, dict(loss=1 / at, lr=0.5))
        tracker.log(last, dict(samples=grid))
        tracker.finish(dict(loss=1 / last))

    found = events(tmp_path)
    assert scalars(found, "loss") == [(at, pytest.approx(1 / at)) for at in (2, 4, 6, 8)]
    assert scalars(found, "lr") == [(at, 0.5) for at in (2, 4, 6, 8)]
    picture, = (event for event in found.Images("samples") if event.step == 8)
    (tmp_path / "logged.png").write_bytes(picture.encoded_image_string)
    with Image.open(tmp_path / "logged.png") as logged, Image.open(grid) as original:
        assert logged.convert("RGB").tobytes() == original.convert("RGB").tobytes()

    assert found.Scalars("final/loss")[-1].value == pytest.approx(1 / 8)
    options = hyperparameters(found)
    assert set(options) == set(CONFIG)
    assert options["batch_size"].number_value == 300
    assert options["flip"].number_value == 1
    assert options["channel_mults"].string_value == "(1, 2)"
    assert options["seed"].string_value == "None"


def test_wandb_has_written_a_run_once_it_is_finished(offline, monkeypatch):
    """The library's service writes the file after run.finish() has returned, here half a second later: finish() waits for
    the end of it, so that a process that ends at once, or a `wandb sync` right after, loses nothing."""
    from wandb.sdk.lib.service.service_connection import ServiceConnection

    inform = ServiceConnection.inform_finish
    monkeypatch.setattr(ServiceConnection, "inform_finish",
                        lambda self, run_id: threading.Timer(0.5, inform, (self, run_id)).start())
    (offline / "run").mkdir()
    tracker = WeightsAndBiases(offline / "run", {}, "id4", "late", "my project", "offline")
    tracker.log(2, dict(loss=0.5))
    tracker.finish({})
    path, = (offline / "run").glob("wandb/offline-run-*/run-*.wandb")
    assert [row["step"] for row in history(path) if "loss" in row] == [2]
    assert wandb_run(path).run_id == "id4"


def test_an_end_that_wandb_does_not_write_is_told(offline, monkeypatch, capsys):
    """A full disk, a service that was killed: one line, and training ends as it should."""
    from wandb.sdk.lib.service.service_connection import ServiceConnection

    monkeypatch.setattr(ServiceConnection, "inform_finish", lambda self, run_id: None)
    monkeypatch.setattr(metrics.await_end, "__defaults__", (0.3,))
    assert diffuser.train(tiny_training(use_wandb=True, wandb_mode="offline")).exists()
    assert capsys.readouterr().err.count("no end of the run in") == 1


def test_the_end_of_a_wandb_run_is_found_wherever_it_lies(tmp_path):
    """In the first block, in later ones, across two; not before it is there."""
    from wandb.proto.wandb_internal_pb2 import Record

    path = tmp_path / "run.wandb"
    end = Record(num=9)
    end.exit.exit_code = 3
    for size in (10, 32768 - 7 - 7 - 12, *range(32768 - 40, 32768 + 10), 70_000, 32768 * 3 - 60):
        row = Record(num=1)
        row.output_raw.line = "x" * size
        content = b":W&B" + bytes(3)
        for record in (row, end):
            path.write_bytes(content)
            assert not metrics.holds_end(path)
            content = append_record(content, record.SerializeToString())
        path.write_bytes(content)
        assert metrics.holds_end(path)
    assert not metrics.holds_end(tmp_path / "nothing")


def append_record(content, body):
    """The content of a .wandb file with a record behind it, in as many pieces as blocks ask for."""
    first = True
    while first or body:
        room = -len(content) % 32768 or 32768
        if room < 7:
            content += bytes(room)
            continue
        piece, body = body[: room - 7], body[room - 7 :]
        kind = (1 if first else 4) if not body else (2 if first else 3)
        content += struct.pack("<IHB", 0, len(piece), kind) + piece
        first = False
    return content


def test_wandb_keeps_a_run_without_a_key(offline, capsys):
    """By itself offline, and says so: numbers by our steps, which may go back, a picture, options, name, final numbers."""
    Image.effect_noise((30, 20), 90).save(offline / "grid.png")
    (offline / "run").mkdir()
    tracker = WeightsAndBiases(offline / "run", dict(batch_size=300), "id1", "my run", "my project", "auto")
    assert "no key is known" in capsys.readouterr().err
    for step, loss in (10, 0.5), (20, 0.25), (10, 0.75):
        tracker.log(step, dict(loss=loss))
    tracker.log(10, dict(samples=offline / "grid.png"))
    tracker.finish(dict(loss=0.75))

    path, = (offline / "run").glob("wandb/offline-run-*/run-*.wandb")
    logged = history(path)
    assert [(row["step"], row["loss"]) for row in logged if "loss" in row] == [(10, 0.5), (20, 0.25), (10, 0.75)]
    assert list((offline / "run").glob("wandb/offline-run-*/files/media/images/samples*.png"))
    run = wandb_run(path)
    assert (run.run_id, run.display_name, run.project) == ("id1", "my run", "my project")
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["batch_size"] == 300
    assert float(wandb_final(path)["final/loss"]) == 0.75


def test_wandb_obeys_its_own_setting(offline, monkeypatch, capsys):
    """WANDB_MODE counts where the option leaves the choice open; the option counts before it."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (offline / "run").mkdir()
    tracker = WeightsAndBiases(offline / "run", {}, "id1", "my run", "my project", "auto")
    tracker.log(1, dict(loss=0.5))
    tracker.finish(dict(loss=0.5))
    assert not list((offline / "run").rglob("*.wandb"))
    assert capsys.readouterr().err == ""

    tracker = WeightsAndBiases(offline / "run", {}, "id2", "my run", "my project", "offline")
    tracker.finish({})
    assert len(list((offline / "run").rglob("*.wandb"))) == 1


# ---- Whole runs of diffuser.py -----------------------------------------------------------------

RUN = ["--mode", "train", "--dataset", "digits", "--timesteps", "20", "--batch_size", "300", "--sample_every", "2",
       "--log_every", "2", "--num_generations", "1", *TINY_FLAGS]


def the_run(folder):
    """The folder of the only run."""
    found, = folder.glob("samples/samples_*")
    return found


def test_tensorboard_shows_a_whole_run(folder):
    """On the command line: each number of metrics.csv at its step, CPU and memory, a grid as it is on the disk, all options
    with the final metrics."""
    done = cli(*RUN, "--sample_every", 1, "--epochs", 2, "--use_tensorboard", cwd=folder)
    assert done.returncode == 0, done.stderr
    run = the_run(folder)
    table = rows(run / "metrics.csv")
    found = events(run)
    for column in table[0]:
        if column != "step":
            expected = [(int(row["step"]), pytest.approx(float(row[column]), rel=1e-5)) for row in table if row[column]]
            assert scalars(found, column) == expected
    for name in ("machine/cpu_percent", "machine/memory_gib"):
        assert len(found.Scalars(name)) == len(table)
        assert found.Scalars(name)[-1].value >= 0
    assert 0.05 < found.Scalars("machine/memory_gib")[-1].value < 24

    grids = sorted(run.glob("epoch_*.png"), key=lambda path: path.stat().st_mtime_ns)
    assert len(grids) == 2
    assert [event.step for event in found.Images("samples")] == [5, 10]
    (folder / "logged.png").write_bytes(found.Images("samples")[-1].encoded_image_string)
    with Image.open(folder / "logged.png") as logged, Image.open(grids[-1]) as original:
        assert logged.convert("RGB").tobytes() == original.convert("RGB").tobytes()

    options = hyperparameters(found)
    assert set(options) == {field.name for field in dataclasses.fields(diffuser.Config)}
    assert options["batch_size"].number_value == 300
    assert options["channel_mults"].string_value == "(1, 2)"
    for name in ("loss", "val_loss"):
        final = found.Scalars(f"final/{name}")[-1].value
        assert final == pytest.approx(float(table[-1][name]), rel=1e-5)


def test_tensorboard_shows_a_resumed_run_as_one(folder):
    """Stopped, gone on with: every step once, in one curve."""
    for epochs in (2, 4):
        diffuser.train(tiny_training(iterations=0, epochs=epochs, batch_size=300, use_tensorboard=True))
    at = [step for step, _ in scalars(events(the_run(folder)), "loss")]
    assert at == sorted(set(at))
    assert at[-1] == 20


def test_wandb_offline_keeps_a_whole_run(offline):
    """Without a key the run stays on the disk, by itself: numbers by our steps, grids, options, name, final numbers."""
    done = cli(*RUN, "--sample_every", 1, "--epochs", 2, "--use_wandb", "--project_name", "digits-test", cwd=offline)
    assert done.returncode == 0, done.stderr
    assert "no key is known" in done.stderr
    run = the_run(offline)
    table = rows(run / "metrics.csv")
    path, = run.glob("wandb/offline-run-*/run-*.wandb")
    logged = history(path)
    for row in table:
        found = next(each for each in logged if each.get("step") == int(row["step"]) and "loss" in each)
        for name in ("loss", "grad_norm", "loss_q4"):
            assert found[name] == pytest.approx(float(row[name]))
        assert found["machine/memory_gib"] > 0.05

    pictures = [row for row in logged if any(name.startswith("samples") for name in row)]
    assert len(pictures) == 2
    assert list(run.glob("wandb/offline-run-*/files/media/images/samples*.png"))
    entry = wandb_run(path)
    assert (entry.project, entry.display_name, entry.run_id) == ("digits-test", run.name, about(run)["run_id"])
    config = {update.key: json.loads(update.value_json) for update in entry.config.update}
    assert (config["batch_size"], config["dataset"]) == (300, "digits")
    assert float(wandb_final(path)["final/loss"]) == pytest.approx(float(table[-1]["loss"]))


@pytest.mark.slow
def test_wandb_shows_a_resumed_run_as_one(offline):
    """Two invocations, one run: the same id and name; another experiment is another run."""
    for epochs, name in ((2, "first"), (4, "first"), (2, "second")):
        diffuser.train(tiny_training(iterations=0, epochs=epochs, batch_size=300, use_wandb=True, wandb_mode="offline",
                                     experiment_name=name))
    ids = []
    for name, parts in ("first", 2), ("second", 1):
        paths = list(offline.glob(f"samples/samples_{name}_*/wandb/offline-run-*/run-*.wandb"))
        entries = [wandb_run(path) for path in paths]
        assert len(paths) == parts
        assert {entry.display_name for entry in entries} == {name}
        ids.append({entry.run_id for entry in entries})
    assert [len(each) for each in ids] == [1, 1]
    assert ids[0] != ids[1]


def test_no_key_is_written_anywhere(offline):
    """A key in the environment is the library's affair: after an offline run it is in no file and no output."""
    key = "0123456789abcdef0123456789abcdef01234567"
    done = cli(*RUN, "--iterations", 2, "--use_wandb", "--use_tensorboard", "--wandb_mode", "offline", cwd=offline,
               env={"WANDB_API_KEY": key})
    assert done.returncode == 0, done.stderr
    assert key not in done.stdout + done.stderr
    files = [path for path in offline.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any("tfevents" in path.name for path in files)
    assert [path for path in files if key.encode() in path.read_bytes()] == []


def test_an_unreachable_server_does_not_stop_training(offline):
    """Online without a network: one warning, a whole run."""
    server = {"WANDB_API_KEY": "x" * 40, "WANDB_INIT_TIMEOUT": "2", "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = cli(*RUN, "--iterations", 2, "--use_wandb", "--wandb_mode", "online", cwd=offline, env=server)
    assert done.returncode == 0, done.stderr
    assert "goes on without it" in done.stderr or "going on without it" in done.stderr
    assert list(offline.glob("checkpoints/*.pt"))


def test_a_missing_library_is_one_line(folder, monkeypatch, capsys):
    """Each tracker says what to install, and training goes on."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    diffuser.train(tiny_training(use_wandb=True, use_tensorboard=True))
    error = capsys.readouterr().err
    assert "pip install wandb" in error
    assert "pip install tensorboard" in error
    assert error.count("\n") == 2


@pytest.mark.parametrize("when", ["log", "finish"])
def test_training_goes_on_without_a_tracker_that_fails(folder, monkeypatch, capsys, when):
    """At a row, or at the end: said once, and the run ends as it should."""
    def fail(*arguments):
        raise RuntimeError("server gone")

    monkeypatch.setattr(TensorBoard, when, fail)
    assert diffuser.train(tiny_training(use_tensorboard=True)).exists()
    assert capsys.readouterr().err.count("server gone") == 1


def test_what_the_machine_does_not_tell_does_not_stop_training(folder, monkeypatch):
    """psutil that may not look into /proc; numbers in metrics.csv that a power cut has spoilt."""
    import psutil

    def forbidden(*arguments):
        raise RuntimeError("no /proc here")

    monkeypatch.setattr(psutil, "cpu_percent", forbidden)
    diffuser.train(tiny_training(use_tensorboard=True))
    path = the_run(folder) / "metrics.csv"
    path.write_text(path.read_text().replace(rows(path)[0]["loss"], "0.8\0"))
    diffuser.train(tiny_training(use_tensorboard=True, iterations=6))
    found = events(the_run(folder))
    assert "machine/cpu_percent" not in found.Tags()["scalars"]
    assert found.Scalars("final/loss")


def test_only_the_first_process_reports(folder):
    """Two processes, one event file and one set of rows."""
    status, _, errors = prepared.run_two(diffuser.__file__, *RUN, "--iterations", "4", "--use_tensorboard", cwd=folder)
    assert status == 0, errors
    assert len(list(folder.rglob("events.out.tfevents*"))) == 2  # the second one is of the hyperparameters
    assert [step for step, _ in scalars(events(the_run(folder)), "loss")] == [2, 4]
    assert steps(the_run(folder) / "metrics.csv") == [2, 4]
