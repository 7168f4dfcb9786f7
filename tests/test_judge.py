"""diffuser_lib/judge.py: the classifiers, the network without classes, precision and recall."""

import math
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import REAL_DATA, same

import evaluate
from diffuser_lib import judge
from diffuser_lib.images import ImageData


def features(n, seed, mean=0.0):
    return torch.randn(n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + mean


def test_precision_and_recall_of_known_sets():
    """A set against itself: 1 and 1; far apart: 0 and 0; one that covers half of two clusters: precise, half recalled."""
    one = features(300, 0)
    assert judge.precision_and_recall(one, one) == (1, 1)
    assert judge.precision_and_recall(one, features(300, 1, mean=50)) == (0, 0)
    two_clusters = torch.cat([features(150, 2), features(150, 3, mean=50)])
    precision, recall = judge.precision_and_recall(features(300, 4), two_clusters)
    assert precision > 0.8 and 0.4 < recall <= 0.5


def test_precision_and_recall_agree_with_torch_fidelity():
    """The same numbers from the same features."""
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    drawn, real = features(1500, 0, mean=0.3), features(1500, 1)
    theirs = prc.prc_features_to_metric(drawn, real, prc_neighborhood=3, prc_batch_size=500, save_cpu_ram=True, verbose=False)
    precision, recall = judge.precision_and_recall(drawn, real)
    assert precision == pytest.approx(theirs["precision"], abs=1e-3) and recall == pytest.approx(theirs["recall"], abs=1e-3)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 32, 32), (3, 64, 64), (3, 40, 100), (3, 200, 200), (1, 8, 8), (1, 28, 28), (1, 50, 90)])
def test_a_judge_for_every_size(shape):
    """128 features and a class for each image, whatever its size; its work does not grow with large pictures."""
    network = judge.Classifier(shape, 5).eval()
    found, choice = judge.extract_features(network, torch.randint(0, 256, (4, *shape), dtype=torch.uint8))
    assert found.shape == (4, 128) and found.dtype == torch.float64 and choice.shape == (4,) and found.min() >= 0


def coloured(n, seed, side=8):
    """Pictures of three classes, which are the direction of a stripe: uint8 [n, 3, side, side]."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=random)
    images = torch.rand(n, 3, side, side, generator=random) * 60
    place = torch.randint(1, side - 1, (n,), generator=random)
    for i in range(n):
        if labels[i] == 0:
            images[i, :, place[i]] += 150
        elif labels[i] == 1:
            images[i, :, :, place[i]] += 150
    return ImageData(images.to(torch.uint8), labels, ["across", "down", "none"])


def test_the_colour_judge_learns_and_scores(folder):
    """It knows held-out pictures; real ones are near the floor, precise and recalled, noise is not; it is kept."""
    reference = judge.Reference("stripes", coloured(255, 0, 4), coloured(300, 1, 4), own_test=True)
    stats = judge.ReferenceStats(reference, str(folder), torch.device("cpu"))
    assert stats.accuracy > 0.95
    real = stats.scores(reference.test.images, reference.test.labels)
    noise = stats.scores(torch.randint(0, 256, (300, 3, 4, 4), dtype=torch.uint8), reference.test.labels)
    assert real["accuracy"] == stats.accuracy and real["distance"] == pytest.approx(stats.floor)
    assert real["precision"] > 0.7 and real["recall"] > 0.7
    assert noise["distance"] > 10 * stats.floor and noise["precision"] < 0.2
    [kept] = folder.glob("judge_stripes_*_3x4x4_residual.pt")
    again = judge.ReferenceStats(reference, str(folder), torch.device("cpu"))
    assert again.scores(reference.test.images)["distance"] == pytest.approx(real["distance"], rel=1e-3)
    assert kept.stat().st_mtime_ns == next(folder.glob("judge_*")).stat().st_mtime_ns


def test_two_that_want_the_same_judge_train_it_once(folder, monkeypatch):
    """The second waits for the first and takes its judge, as an evaluation beside a training does."""
    trained = []

    def learn_slowly(data, *rest):
        trained.append(time.sleep(0.5))
        return judge.Classifier(tuple(data.images.shape[1:]), len(data.class_names)).eval()

    monkeypatch.setattr(judge, "train_classifier", learn_slowly)
    reference = judge.Reference("stripes", coloured(20, 0), coloured(20, 1))
    with ThreadPoolExecutor(2) as pool:
        judges = list(pool.map(lambda _: judge.load_or_train_classifier(reference, str(folder), torch.device("cpu"), False), range(2)))
    assert len(trained) == 1 and same(judges[0].state_dict(), judges[1].state_dict())


def test_a_damaged_judge_is_told_to_be_removed(folder, monkeypatch):
    """Half a file, or one of other tensors: what to do stands in the message."""
    monkeypatch.setattr(judge, "train_classifier", lambda data, *rest: judge.Classifier((3, 8, 8), 3).eval())
    reference = judge.Reference("stripes", coloured(20, 0), coloured(20, 1))
    judge.load_or_train_classifier(reference, str(folder), torch.device("cpu"), False)
    [kept] = folder.glob("judge_*.pt")
    for content in (kept.read_bytes()[:500], b""):
        kept.write_bytes(content)
        with pytest.raises(judge.UserError, match="is no judge of stripes: remove it"):
            judge.load_or_train_classifier(reference, str(folder), torch.device("cpu"), False)


def test_without_classes_a_fixed_network_judges():
    """The same one each time; it gives a distance that noise fails, no accuracy, and leaves randomness as it was."""
    data = ImageData(coloured(600, 0).images)
    reference = judge.Reference("stripes", ImageData(data.images[:400]), ImageData(data.images[400:]))
    before = torch.random.get_rng_state()
    stats = judge.ReferenceStats(reference, "nowhere", torch.device("cpu"))
    assert torch.equal(before, torch.random.get_rng_state()) and math.isnan(stats.accuracy)
    scores = stats.scores(data.images[400:], torch.zeros(200, dtype=torch.int64))
    noise = stats.scores(torch.randint(0, 256, (200, 3, 8, 8), dtype=torch.uint8))
    assert set(scores) == {"distance", "precision", "recall"} and noise["distance"] > 10 * scores["distance"]
    assert judge.ReferenceStats(reference, "nowhere", torch.device("cpu")).scores(data.images[400:]) == scores


@pytest.mark.slow
def test_the_colour_judge_of_cifar10(tmp_path):
    """At least 85% of CIFAR-10's test images, in a quarter of an hour on two cores."""
    if not (REAL_DATA / "cifar10-jpg-train.zip").exists():
        pytest.skip("DIFFUSER_TEST_DATA has no cifar10-jpg-train.zip")
    zips = [str(REAL_DATA / f"cifar10-jpg-{part}.zip") for part in ("train", "test")]
    reference = evaluate.load_reference(zips[0], "data", (3, 32, 32), zips[1])
    assert len(reference.train.images) == 50_000 and len(reference.test.images) == 10_000
    assert evaluate.judge_of(reference, str(tmp_path)).accuracy > 0.85
