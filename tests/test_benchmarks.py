"""benchmarks/quality.py: the race and the studies, on the digits and for seconds instead of minutes."""

import importlib.util
import json

import pytest
from conftest import cli


@pytest.fixture(scope="module")
def raced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    done = cli("--dataset", "digits", "--minutes", "0.05", "--images", "140", "--json", "race.json", "--keep", "kept",
               "--pictures", "pictures", "--contestants", "preset,diffusers,lucidrains", script="benchmarks/quality.py", cwd=folder)
    return folder, done


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
    (["--images", "100"], "--images must be above 128"), (["--minutes", "0"], "--minutes"),
    (["--checkpoint", "gone.pt"], "there is no checkpoint gone.pt")])
def test_bad_input_is_refused_before_any_training(folder, flags, words):
    """A name that is not there or a number that makes no sense is one line and exit 2."""
    done = cli(*flags, script="benchmarks/quality.py", cwd=folder)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
