"""benchmarks/: the races and studies of quality.py, on the digits and for seconds; the measurements of speed.py."""

import argparse
import importlib
import importlib.util
import io
import json
import shutil
import subprocess
import zipfile

import prepared
import pytest
import torch
from conftest import TINY, cli
from PIL import Image

import diffuser
from diffuser_lib import judge
from diffuser_lib.images import to_pil


@pytest.fixture(autouse=True)
def datasets_of_its_own(monkeypatch):
    """What the benchmarks add to the table of datasets is seen by no other test."""
    monkeypatch.setattr(diffuser, "DATASETS", dict(diffuser.DATASETS))


@pytest.fixture(scope="module")
def raced(tmp_path_factory, digits_judge):
    """The real race over one number of minutes: (its folder, how it ended)."""
    folder = tmp_path_factory.mktemp("race")
    (folder / "data").mkdir()
    shutil.copy(digits_judge, folder / "data")
    done = cli("--dataset", "digits", "--minutes", "0.05", "--images", "140", "--json", "race.json", "--keep", "kept",
               "--pictures", "pictures", "--contestants", "preset,diffusers,lucidrains", script="benchmarks/quality.py", cwd=folder)
    return folder, done


def test_a_race_of_a_small_network(folder, digits_judge, monkeypatch, capsys):
    """--race: a row for each contestant and number of minutes, network calls as they were made, and a picture of it; peers
    that are missing are named; images and checkpoints are kept."""
    quality = importlib.import_module("benchmarks.quality")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "denoising_diffusion_pytorch" else found(name))
    monkeypatch.setitem(diffuser.PRESETS, "digits", {**diffuser.PRESETS["digits"], **TINY, "preview_steps": 2, "steps": 4})
    (folder / "data").mkdir()
    shutil.copy(digits_judge, "data")
    assert quality.main(["--dataset", "digits", "--race", "race.png", "--minutes", "0.01,0.02", "--images", "140", "--json",
                         "race.json", "--keep", "kept", "--pictures", "pictures", "--contestants", "preset,lucidrains"]) == 0
    out = capsys.readouterr().out
    rows = json.loads((folder / "race.json").read_text())["rows"]
    assert [row[""] for row in rows] == ["preset", "preset"] and all(row["distance"] > 0 and row["images seen"] > 0 for row in rows)
    assert all(4 <= row["evaluations"] <= 8 for row in rows)
    assert "lucidrains: left out" in out and "judge: accuracy" in out and "floor" in out and "| preset |" in out
    assert (folder / "pictures/digits_preset_0.02.png").exists() and (folder / "kept/digits_preset_0.02.pt").exists()
    with Image.open(folder / "race.png") as picture:
        assert picture.size == (1000, 400)


@pytest.mark.slow
def test_the_race_trains_and_scores_all_who_are_there(raced):
    """One table: every contestant trained, drew as many images and was judged; peers that are missing are named."""
    folder, done = raced
    assert done.returncode == 0, done.stderr
    rows = {row[""]: row for row in json.loads((folder / "race.json").read_text())["rows"]}
    there = ["preset", "diffusers"] + ["lucidrains"] * bool(importlib.util.find_spec("denoising_diffusion_pytorch"))
    assert list(rows) == there and all(row["distance"] > 0 and row["images seen"] > 0 for row in rows.values())
    assert ("lucidrains: left out" in done.stdout) == ("lucidrains" not in there)
    assert "judge: accuracy" in done.stdout and "floor" in done.stdout and "| preset |" in done.stdout
    assert (folder / "pictures/digits_preset.png").exists() and (folder / "kept/digits_preset.pt").exists()


@pytest.mark.slow
def test_curves_over_minutes_of_training(folder, digits_judge):
    """--race on the command line, with the best recipe: rows and picture."""
    (folder / "data").mkdir()
    shutil.copy(digits_judge, "data")
    done = cli("--dataset", "digits", "--race", "race.png", "--minutes", "0.03,0.05", "--images", "140", "--json", "race.json",
               "--contestants", "best", script="benchmarks/quality.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "race.json").read_text())["rows"]
    assert [row[""] for row in rows] == ["best", "best"]
    cfg = diffuser.configure(dataset="digits", recipe="best")
    assert all(diffuser.sampling_steps(cfg) <= row["evaluations"] <= 2 * diffuser.sampling_steps(cfg) for row in rows)
    with Image.open(folder / "race.png") as picture:
        assert picture.size == (1000, 400)


@pytest.mark.slow
def test_a_study_varies_one_model(raced):
    """--study scores a checkpoint under each variation of a setting."""
    folder, _ = raced
    done = cli("--dataset", "digits", "--checkpoint", "kept/digits_preset.pt", "--study", "eps_scale", "--images", "140",
               "--json", "study.json", script="benchmarks/quality.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "study.json").read_text())["rows"]
    assert len(rows) == 5 and len({row["distance"] for row in rows}) > 1


@pytest.mark.parametrize("flags, words", [
    (["--contestants", "nobody"], "unknown: nobody"), (["--dataset", "celeba"], "unknown: celeba"),
    (["--images", "100"], "--images must be above 128"), (["--minutes", "0"], "--minutes"), (["--minutes", "1,x"], "--minutes 1,x"),
    (["--race", "/proc/none/race.png"], "--race"), (["--dataset", "digits", "--batch_size", "5000"], "--batch_size 5000 is more"),
    (["--checkpoint", "gone.pt"], "there is no checkpoint gone.pt")])
def test_bad_input_is_refused_before_any_training(folder, flags, words):
    """A name that is not there or a number that makes no sense is one line and exit 2."""
    done = cli(*flags, script="benchmarks/quality.py", cwd=folder)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


SPEED = ["--networks", "tiny", "--batches", "8", "--rounds", "1", "--seconds", "0.1", "--images", "2", "--steps", "2", "--json", "speed.json"]


def check_speeds(rows):
    """Each contestant has its speed, memory and share of the matrix rate."""
    for row in rows:
        assert row["training images/s"] > 0 and row["sampling images/s"] > 0 and row["TFLOP/s"] > 0 and 0.1 < row["peak GiB"] < 8


def test_speed_is_measured(folder, monkeypatch, capsys):
    """speed.py measures in processes of their own, forked here, and makes a row of it; one that fails is named."""
    speed = importlib.import_module("benchmarks.speed")

    def run(command, **options):
        if "diffuser fp32" in command:
            command = [*command[:2], "--rounds", "none"]
        return prepared.run(*command[1:], cwd=folder)

    monkeypatch.setattr(speed.subprocess, "run", run)
    assert speed.main([*SPEED, "--contestants", "diffuser,diffuser fp32"]) == 0
    out = capsys.readouterr().out
    rows = json.loads((folder / "speed.json").read_text())["rows"]
    assert [row[""] for row in rows] == ["diffuser"] and "matrix rate" in out and "diffuser fp32: failed" in out
    check_speeds(rows)


@pytest.mark.slow
def test_speed_is_measured_for_all_who_are_there(folder):
    """The same by the real command line, beside diffusers."""
    done = cli(*SPEED, "--contestants", "diffuser,diffusers", script="benchmarks/speed.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = {row[""]: row for row in json.loads((folder / "speed.json").read_text())["rows"]}
    assert "diffuser" in rows and "matrix rate" in done.stdout
    assert ("diffusers" in rows) == ("diffusers: failed" not in done.stdout)
    check_speeds(rows.values())


@pytest.mark.slow
def test_a_cost_curve_has_all_its_points(folder):
    """--curves: a row per point, slower with more channels."""
    done = cli("--curves", "width", "--rounds", "1", "--seconds", "0.1", "--json", "curve.json", script="benchmarks/speed.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "curve.json").read_text())["rows"]
    assert [row["channels"] for row in rows] == [16, 32, 64, 128] and rows[0]["step (s)"] < rows[-1]["step (s)"]


@pytest.mark.slow
def test_loading_jpegs_is_a_small_part_of_a_step(folder):
    """--jpegs: the second opening comes from the cache and is faster; loading takes less than 3% of a step."""
    done = cli("--jpegs", "1500", "--seconds", "0.5", "--json", "jpegs.json", script="benchmarks/speed.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    first, again = json.loads((folder / "jpegs.json").read_text())["rows"]
    assert again["ready after (s)"] < first["ready after (s)"] and again["loading (ms)"] < 0.03 * again["step (ms)"]


@pytest.mark.slow
def test_sets_of_many_images_are_measured(folder):
    """--sets: a row per size with the time to cache it, the time to a first step once it is cached, and the memory."""
    (folder / "data").mkdir()
    done = cli("--sets", "100", "--kind", "npz", "--side", "8", "--json", "sets.json", script="benchmarks/speed.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "sets.json").read_text())["rows"]
    assert [row["images"] for row in rows] == [100] and not list((folder / "data").iterdir())
    for row in rows:
        assert row["caching (s)"] > 0 and row["cached: to the first step (s)"] > 0 and 50 < row["at the start"] <= row["MiB"] < 2000


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "folder", "tar", "parquet", "npz"])
def test_memory_hardly_grows_with_the_set(folder, kind):
    """200,000 images take a few megabytes more of this process's own memory than 2,000, while they are cached and later."""
    (folder / "data").mkdir()
    done = cli("--sets", "2000,200000", "--kind", kind, "--side", "8", "--json", "sets.json", script="benchmarks/speed.py", cwd=folder,
               timeout=1800)
    assert done.returncode == 0, done.stderr
    few, many = json.loads((folder / "sets.json").read_text())["rows"]
    assert many["MiB"] - few["MiB"] < 40 and many["MiB then"] - few["MiB then"] < 40


@pytest.mark.slow
def test_processes_that_share_a_batch_are_measured(folder):
    """--processes: a row for each number of them under torchrun, of which only several exchange gradients."""
    done = cli("--processes", "1,2", "--networks", "tiny", "--batches", "32", "--rounds", "1", "--steps", "3", "--json", "shared.json",
               script="benchmarks/speed.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    one, two = json.loads((folder / "shared.json").read_text())["rows"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["exchange under way"] == "0%" != two["exchange under way"]
    assert one["efficiency"] == "100%" and two["images/s"] > 0


@pytest.mark.slow
def test_the_first_step_is_timed(folder):
    """--start: a row with the time to the first step, of which importing torch is a part."""
    done = cli("--start", "digits", "--rounds", "1", "--json", "start.json", script="benchmarks/speed.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    row, = json.loads((folder / "start.json").read_text())["rows"]
    assert 0 < row["import torch (s)"] < row["in all"] < 60


@pytest.mark.parametrize("flags, words", [
    (["--networks", "nothing"], "unknown: nothing"), (["--contestants", "nobody"], "unknown: nobody"),
    (["--batches", "0"], "--batches"), (["--curves", "none"], "unknown: none"), (["--sets", "10,x"], "--sets"),
    (["--processes", "1", "--batches", "8,16"], "--processes wants one"), (["--sets", "100", "--side", "9"], "--side"), (["--sets", "100", "--data_dir", "gone"], "--data_dir gone")])
def test_speed_refuses_bad_input(folder, flags, words):
    """One line and exit 2, before anything is measured."""
    done = cli(*flags, script="benchmarks/speed.py", cwd=folder)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_who_is_not_installed_is_told_at_the_start(folder, monkeypatch, capsys):
    """Missing contestants are named before anything is measured, the others go on, and their rows are kept as they come;
    a process that ends without a word is a failure of that contestant alone."""
    speed = importlib.import_module("benchmarks.speed")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "denoising_diffusion_pytorch" else found(name))
    lines = []
    result = dict(parameters=1000, step=0.1, memory=1.0, drawing=1.0, flops=10)

    def run(command, **options):
        lines.append(capsys.readouterr().out)
        kept = folder / "rows.json"
        lines.append(json.loads(kept.read_text())["rows"] if kept.exists() else [])
        silent = "--batches" in command and command[command.index("--batches") + 1] == "4" and "diffuser fp32" in command
        text = json.dumps(dict(rate=1.0) if "--rate" in command else result)
        return subprocess.CompletedProcess(command, 0, "" if silent else text, "")

    monkeypatch.setattr(speed.subprocess, "run", run)
    flags = ["--networks", "tiny", "--batches", "2,4", "--rounds", "1", "--json", "rows.json"]
    assert speed.main([*flags, "--contestants", "denoising-diffusion-pytorch,diffuser,diffuser fp32"]) == 0
    assert "denoising-diffusion-pytorch: left out" in lines[0]
    assert len(lines[-1]) == 2
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    assert [(row["batch"], row[""]) for row in rows] == [("2", "diffuser"), ("2", "diffuser fp32"), ("4", "diffuser")]

    assert speed.main([*flags, "--contestants", "denoising-diffusion-pytorch"]) == 2
    assert "none of the --contestants is installed" in capsys.readouterr().err


@pytest.mark.parametrize("script", ["speed", "quality"])
def test_a_place_for_the_rows_that_cannot_be_written_is_told_first(folder, capsys, script):
    """--json is looked at before anything is measured."""
    module = importlib.import_module(f"benchmarks.{script}")
    (folder / "file").write_text("")
    assert module.main(["--json", "file/rows.json"]) == 2
    assert "choose another --json" in capsys.readouterr().err


@pytest.mark.parametrize("name, words", [("race.xyz", "has to be one of"), ("race", "has to be one of")])
def test_a_picture_that_cannot_be_written_is_told_before_the_race(folder, capsys, name, words):
    """Its ending is looked at before anybody trains."""
    quality = importlib.import_module("benchmarks.quality")
    assert quality.main(["--dataset", "digits", "--race", name]) == 2 and words in capsys.readouterr().err


def test_a_contestant_that_fails_leaves_the_others_their_rows(folder, digits_judge, monkeypatch, capsys):
    """Its reason is told; a checkpoint that is kept replaces none of an earlier call."""
    quality = importlib.import_module("benchmarks.quality")

    def fail(*_):
        raise torch.OutOfMemoryError("a big one")

    monkeypatch.setitem(quality.CONTESTANTS, "diffusers", (fail, ()))
    monkeypatch.setitem(diffuser.PRESETS, "digits", {**diffuser.PRESETS["digits"], **TINY, "preview_steps": 2, "steps": 2})
    (folder / "data").mkdir()
    shutil.copy(digits_judge, "data")
    (folder / "kept").mkdir()
    (folder / "kept/digits_preset.pt").write_text("mine")
    assert quality.main(["--dataset", "digits", "--minutes", "0.01", "--images", "140", "--json", "race.json", "--keep", "kept",
                         "--contestants", "diffusers,preset"]) == 0
    assert [row[""] for row in json.loads((folder / "race.json").read_text())["rows"]] == ["preset"]
    assert "diffusers, 0.01 minutes: failed (out of memory" in capsys.readouterr().out
    assert (folder / "kept/digits_preset.pt").read_text() == "mine" and (folder / "kept/digits_preset_1.pt").exists()
    assert quality.main(["--dataset", "digits", "--contestants", "diffusers", "--images", "140"]) == 1
    assert "none of the contestants has got through" in capsys.readouterr().err


def test_a_point_that_fails_leaves_the_others_their_rows(folder, monkeypatch, capsys):
    """The largest of a cost curve may not fit into memory."""
    speed = importlib.import_module("benchmarks.speed")

    def measure(*flags, **_):
        if flags[flags.index("--point") + 1] == 3:
            raise diffuser.UserError("out of memory")
        return dict(step=1.0, loading=0.1, memory=1.0, parameters=10)

    monkeypatch.setattr(speed, "in_process", measure)
    assert speed.main(["--curves", "size", "--json", "rows.json"]) == 0
    assert len(json.loads((folder / "rows.json").read_text())["rows"]) == 3
    assert "size, point 4: failed (out of memory)" in capsys.readouterr().out


def test_the_best_for_pictures_in_a_zip_is_that_of_the_dataset(monkeypatch):
    """--path_to_data with a colour dataset's shape: the same network, by the minutes, as --dataset cifar10 --recipe best."""
    quality = importlib.import_module("benchmarks.quality")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = argparse.Namespace(path_to_data="train.zip", dataset="cifar10")
    ours = diffuser.configure(**quality.our_settings(args, "best"), train_minutes=30)
    own = diffuser.configure(dataset="cifar10", recipe="best", train_minutes=30)
    assert (ours.img_size, ours.channels, ours.path_to_data) == ((32, 32), 3, "train.zip")
    for name in ("base_channels", "channel_mults", "patch_size", "optimizer", "prediction", "batch_size", "learning_rate"):
        assert getattr(ours, name) == getattr(own, name)
    preset = diffuser.configure(**quality.our_settings(args, ""), train_minutes=30)
    assert preset.base_channels == 128 and preset.prediction == "eps" and preset.dataset == "folder"


def test_a_zip_of_colour_pictures_races_with_its_own_test_part(folder, monkeypatch, capsys):
    """--path_to_data and --test: the judge learns from all of the one and is tested on the other; a row has every figure."""
    quality = importlib.import_module("benchmarks.quality")
    judged = []

    def learn_nothing(data, *rest):
        """A judge as it is before its training, which takes long."""
        judged.append(len(data.images))
        return judge.Classifier(tuple(data.images.shape[1:]), len(data.class_names)).eval()

    monkeypatch.setattr(judge, "train_classifier", learn_nothing)
    monkeypatch.setattr(diffuser, "picture_preset", lambda *a: {**diffuser.PRESETS["folder"], **TINY, "steps": 2, "batch_size": 8})
    for name, count in (("train", 150), ("test", 140)):
        with zipfile.ZipFile(f"{name}.zip", "w") as archive:
            for i in range(count):
                picture = io.BytesIO()
                to_pil(torch.randint(256, (3, 32, 32), dtype=torch.uint8)).save(picture, "PNG")
                archive.writestr(f"{'cat' if i % 2 else 'dog'}/{i}.png", picture.getvalue())
    assert quality.main(["--dataset", "cifar10", "--path_to_data", "train.zip", "--test", "test.zip", "--minutes", "0.01", "--images",
                         "130", "--json", "race.json", "--contestants", "best"]) == 0, capsys.readouterr().err
    [row] = json.loads((folder / "race.json").read_text())["rows"]
    assert judged == [150] and row["images seen"] > 0 and row["evaluations"] == 2 and row["accuracy"].endswith("%")
    assert row["distance"] > 0 and row["x floor"] > 0 and 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1


@pytest.mark.parametrize("dataset", [name for name in diffuser.DATASETS if name != "folder"])
@pytest.mark.parametrize("path", ["", "train.zip"])
def test_any_dataset_can_race(dataset, path):
    """Whatever cadences its preset names, a contestant trains for the minutes of the race, without grids on the way."""
    quality = importlib.import_module("benchmarks.quality")
    args = argparse.Namespace(path_to_data=path, dataset=dataset, data_dir="data", seed=0)
    for recipe in ("", "best") if dataset in diffuser.BEST else ("",):
        cfg = diffuser.configure(**quality.run_settings(args, recipe, 3.0, "folder"))
        assert cfg.train_minutes == 3 and cfg.sample_every == cfg.checkpoint_every == 10**6
