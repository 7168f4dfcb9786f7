"""Scores while training (--score_every): their rows, the judge that evaluate.py shares, the best checkpoint, resuming."""

import csv
import math
import shutil

import pytest
import torch
from conftest import TINY_FLAGS, same, some_digits, tiny_training

import diffuser
import evaluate
from diffuser import UserError, load_checkpoint
from diffuser_lib import judge
from diffuser_lib.images import ImageData, to_pil

FLAGS = ("--mode", "train", "--dataset", "digits", "--timesteps", "20", "--batch_size", "256", "--log_every", "3", *TINY_FLAGS)


def table(folder):
    [path] = folder.rglob("metrics.csv")
    return list(csv.DictReader(open(path)))


class FakeJudge:
    """Gives the distances that it is told, and remembers what it was shown."""

    def __init__(self, distances):
        self.distances = list(distances)
        self.shown = []

    def scores(self, images, labels):
        self.shown.append((images, labels))
        return {"accuracy": 0.5, "distance": self.distances.pop(0), "recall": 1.0}


@pytest.fixture
def fake_judge(monkeypatch):
    """distances -> a judge that gives these, one after another, in all runs from here on."""
    def install(*distances):
        judge = FakeJudge(distances)
        monkeypatch.setattr(diffuser, "find_judge", lambda *a: judge)
        return judge
    return install


def train(cfg):
    """Train on few digits, so that a small batch makes epochs of eight steps."""
    return diffuser.train(cfg, data=some_digits(235))


def settings(**more):
    """Epochs of eight steps, see train()."""
    return tiny_training(**{**dict(batch_size=28, epochs=3, iterations=0, score_every=1, log_every=2, steps=2), **more})


def test_scores_stand_in_metrics_csv_and_report_and_evaluate_has_the_same_judge(folder, monkeypatch, capsys):
    """The command line: accuracy and distance in the first row after two epochs and at the end; the report draws them;
    evaluate.py finds the judge that was trained here."""
    def learn_nothing(data, *rest):
        """A judge as it is before its training, which takes long."""
        return judge.Classifier(tuple(data.images.shape[1:]), len(data.class_names)).eval()

    monkeypatch.setattr(judge, "train_classifier", learn_nothing)
    assert diffuser.main([*[f for f in FLAGS if f != "--no-report"], "--epochs", "3", "--score_every", "2"]) == 0
    rows = table(folder)
    scored = [row for row in rows if row["distance"]]
    assert [math.ceil(float(row["epoch"])) for row in scored] == [2, 3] and scored[-1] is rows[-1] and len(rows) > 4
    assert all(0 <= float(row["accuracy"]) <= 1 and float(row["distance"]) > 0 for row in scored)
    [report] = folder.rglob("report.html")
    page = report.read_text()
    assert "Distance of drawn images to real ones" in page and "class accuracy" in page and "(highest" in page
    [kept] = (folder / "data").glob("judge_digits_*.pt")
    time = kept.stat().st_mtime_ns
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    (folder / "out" / "images").mkdir(parents=True)
    for i, image in enumerate(images):
        to_pil(image).save(folder / "out" / "images" / f"{i:06}_{i % 10}.png")
    monkeypatch.setattr(judge, "train_classifier", lambda *a: pytest.fail("the judge was trained anew"))
    assert evaluate.main(["out", "--against", "digits"]) == 0 and "accuracy" in capsys.readouterr().out
    assert [kept] == list((folder / "data").glob("judge_*")) and kept.stat().st_mtime_ns == time


@pytest.mark.parametrize("name", ["", pytest.param("mine", marks=pytest.mark.slow)])
def test_the_best_checkpoint_is_kept_beside_the_last(folder, fake_judge, name):
    """The one with the smallest distance, not the last; it is whole, can be drawn from, and resuming ignores it."""
    judge = fake_judge(7.0, 3.0, 5.0)
    cfg = settings(experiment_name=name)
    last = train(cfg)
    best = diffuser.best_path(cfg)
    assert best.parent == (last.parents[1] / "best" if name else last.parent) and best != last
    rows = [row for row in table(folder) if row["distance"]]
    assert [float(row["distance"]) for row in rows] == [7, 3, 5]
    assert load_checkpoint(best)["step"] == int(rows[1]["step"]) < load_checkpoint(last)["step"]
    assert load_checkpoint(last)["best_distance"] == load_checkpoint(best)["best_distance"] == 3
    assert diffuser.load(best).generate([1], num_images=2).shape == (2, 1, 8, 8)
    assert diffuser.find_resume_checkpoint(settings(experiment_name=name, epochs=4), {})[0] == last
    images, labels = judge.shown[0]
    assert images.shape == (300, 1, 8, 8) and labels.bincount().tolist() == [30] * 10


def test_a_resumed_run_remembers_the_best(folder, fake_judge):
    """Going on, a larger distance than the best of before replaces nothing; a smaller one does."""
    fake_judge(4.0, 6.0, 5.0, 2.0)
    train(settings(epochs=2))
    best = diffuser.best_path(settings())
    assert load_checkpoint(best)["epoch"] < 2
    train(settings(epochs=3))
    assert load_checkpoint(best)["epoch"] < 2
    train(settings(epochs=4))
    assert load_checkpoint(best)["epoch"] > 3


def test_a_best_that_could_not_be_written_is_tried_again(folder, fake_judge, monkeypatch, capsys):
    """A full disk: the run goes on, and the next score is held against the file that is there, not against the lost one."""
    fake_judge(4.0, 2.0, 3.0)
    real, calls = diffuser.write_state, []

    def write_state(path, *rest):
        calls.append(path)
        if diffuser.is_best(path) and sum(map(diffuser.is_best, calls)) == 2:
            raise OSError(28, "No space left on device", str(path))
        real(path, *rest)

    monkeypatch.setattr(diffuser, "write_state", write_state)
    last = train(settings())
    assert "No space left" in capsys.readouterr().err
    assert load_checkpoint(diffuser.best_path(settings()))["step"] == load_checkpoint(last)["step"]


def test_going_on_from_the_best_leaves_the_run_where_it_is(folder, fake_judge):
    """--resume_from_checkpoint with the best one: nothing is set aside."""
    fake_judge(1.0, 5.0, 4.0, 3.0)
    train(settings(epochs=2))
    best = diffuser.best_path(settings())
    train(settings(epochs=3, resume_from_checkpoint=str(best)))
    assert not list(folder.rglob("*_old*")) and load_checkpoint(best)["best_distance"] == 1


def test_a_score_that_is_no_number_is_not_the_best(folder, fake_judge):
    """Images of a network that has gone astray: the run goes on, and the checkpoint can be read."""
    fake_judge(math.nan, 3.0, math.nan)
    last = train(settings())
    assert load_checkpoint(last)["best_distance"] == 3


def test_what_is_judged_is_drawn_with_the_averaged_weights(folder, fake_judge, monkeypatch):
    """The score is that of the weights' average, which is what will be drawn with after training."""
    judge = fake_judge(3.0, 2.0, 1.0)
    path = train(settings(ema_decay=0.5))
    model = diffuser.load(path)
    images, labels = judge.shown[-1]
    assert torch.equal(images, torch.cat(list(model.draw(labels.tolist(), model.config))))


def test_scores_leave_the_run_as_it_is(folder, digits_judge):
    """With a real judge: the same weights, to the bit, as without any."""
    (folder / "data").mkdir()
    shutil.copy(digits_judge, "data")
    scored, plain = (load_checkpoint(diffuser.train(settings(score_every=score_every, experiment_name=name, batch_size=224, dropout=0.1)))
                     for score_every, name in ((1, "a"), (0, "b")))
    assert [path.name for path in (folder / "data").iterdir()] == [digits_judge.name]      # evaluate.py's was taken
    assert plain["step"] == scored["step"] and same(plain["model"], scored["model"]) and same(plain["ema"], scored["ema"])
    assert plain["best_distance"] == math.inf > scored["best_distance"] > 0


def test_without_classes_there_is_a_distance(folder):
    """A folder of pictures: a fixed random network judges, nothing is trained or kept; accuracy has no column."""
    (folder / "pictures").mkdir()
    for i, image in enumerate(torch.randint(0, 256, (170, 3, 8, 8), dtype=torch.uint8)):
        to_pil(image).save(folder / "pictures" / f"{i}.png")
    diffuser.train(settings(dataset="folder", path_to_data="pictures", img_size=(8, 8), patch_size=1, batch_size=85, epochs=2))
    rows = table(folder)
    assert float(rows[-1]["distance"]) > 0 and "accuracy" not in rows[-1] and not list(folder.rglob("judge_*"))


def test_too_few_images_are_one_line_before_the_first_step(folder):
    """A Frechet distance over 128 features needs more of them."""
    data = ImageData(torch.zeros(153, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match="153 images are too few to judge others by: it takes 154"):
        diffuser.train(settings(dataset="folder", img_size=(8, 8), channels=3, patch_size=1), data=data)
    assert not list(folder.rglob("*.pt"))


def test_a_run_of_minutes_counts_its_scores(folder, fake_judge, monkeypatch):
    """Scores that take their time leave fewer steps."""
    def slow_scores(self, images, labels):
        diffuser.time.sleep(1)
        return {"distance": 1.0}

    monkeypatch.setattr(FakeJudge, "scores", slow_scores)
    cfg = diffuser.dataclasses.replace(settings(batch_size=224), epochs=0, train_minutes=0.2)
    devices = diffuser.Devices(cfg)
    plenty = diffuser.steps_for_minutes(cfg, devices, None, diffuser.time.perf_counter() + 12)[0].iterations
    fewer, _, end = diffuser.steps_for_minutes(cfg, devices, None, diffuser.time.perf_counter() + 12, None, FakeJudge([]))
    assert fewer.iterations < plenty / 2 and end > 1


def test_a_run_of_minutes_keeps_time_for_its_end(folder, monkeypatch):
    """The last validation, grid and score come after the last step: corrections on the way do not give their time away."""
    deadlines = []

    def trial(cfg, devices, state, deadline, *rest):
        deadlines.append(deadline)
        return diffuser.dataclasses.replace(cfg, iterations=2), None, 7.0

    class Watched(diffuser.Pace):
        def __init__(self, trainer, deadline):
            deadlines.append(deadline)
            super().__init__(trainer, deadline)

    monkeypatch.setattr(diffuser, "steps_for_minutes", trial)
    monkeypatch.setattr(diffuser, "Pace", Watched)
    train(diffuser.dataclasses.replace(settings(score_every=0), epochs=0, train_minutes=0.2))
    assert deadlines[1] == deadlines[0] - 7
