"""evaluate.py: distances against closed forms and other programs, the classifier, the variational bound, the command line."""

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import cli, interrupted, tiny_training
from PIL import Image

import diffuser
import evaluate
from diffuser import alpha_bar_table, configure
from diffuser_lib import judge
from diffuser_lib.files import UserError
from diffuser_lib.images import ImageData, to_pil


def gaussian(n, mean, scale, seed=0):
    return torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * scale + mean


def test_frechet_distance_of_known_gaussians():
    """For diagonal covariances it is |m1 - m2|^2 + sum (s1 - s2)^2; for equal ones 0."""
    m1, m2 = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s1, s2 = torch.linspace(0.1, 2, 6).double(), torch.linspace(3, 0, 6).double()
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    found = judge.frechet_distance((m1, torch.diag(s1**2)), (m2, torch.diag(s2**2)))
    assert found == pytest.approx(expected.item(), rel=1e-9)
    some = judge.moments(gaussian(500, 1, 2))
    assert abs(judge.frechet_distance(some, some)) < 1e-9


def test_frechet_distance_agrees_with_pytorch_fid():
    """On correlated features: the figure of pytorch-fid's own function, to 1e-6."""
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    mixing = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    a, b = gaussian(300, 0, 1) @ mixing, gaussian(200, 0.5, 2, seed=1)
    theirs = fid_score.calculate_frechet_distance(*(np.asarray(v) for f in (a, b) for v in judge.moments(f)))
    assert judge.frechet_distance(judge.moments(a), judge.moments(b)) == pytest.approx(theirs, rel=1e-6)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """Weights for the Inception network that metrics use: random ones, the same for all programs."""
    pytest.importorskip("torch_fidelity")
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_v3(weights=None, aux_logits=False, num_classes=1008, init_weights=False).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    """Two folders of 70 images each, of different brightness, in the layout that --save_dir leaves."""
    random, folders = np.random.default_rng(0), []
    for name, top in (("ours", 256), ("real", 200)):
        folder = tmp_path_factory.mktemp(name)
        (folder / "images").mkdir()
        for i in range(70):
            blocks = random.integers(0, top, (4, 4, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(blocks).save(folder / "images" / f"{i:06}_thing.png")
        folders.append(folder)
    return folders


def printed_metrics(random_inception, two_folders, capsys):
    """{metric: what evaluate.py prints for it}: FID and KID of the two folders, on 64 features."""
    code = evaluate.main([*map(str, two_folders[:1]), "--against", str(two_folders[1]), "--metrics", "fid,kid", "--features",
                          "64", "--weights", str(random_inception), "--kid_subset_size", "50"])
    printed = dict(line.rsplit(None, 1) for line in capsys.readouterr().out.splitlines())
    assert code == 0
    return printed


def test_metrics_agree_with_torch_fidelity(random_inception, two_folders, capsys):
    """FID and KID on the same weights and images: torch-fidelity's own run over the folders, to 1e-3."""
    from torch_fidelity import calculate_metrics

    printed = printed_metrics(random_inception, two_folders, capsys)
    reference = calculate_metrics(
        input1=str(two_folders[0] / "images"), input2=str(two_folders[1] / "images"), fid=True, kid=True, kid_subset_size=50,
        feature_layer_fid="64", feature_layer_kid="64", feature_extractor_weights_path=str(random_inception), cuda=False,
        verbose=False)
    assert float(printed["frechet_inception_distance"]) == pytest.approx(reference["frechet_inception_distance"], rel=1e-3)
    kid = "kernel_inception_distance_mean"                                   # a small difference of kernels around 1
    assert float(printed[kid]) == pytest.approx(reference[kid], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_fid_agrees_with_pytorch_fid(random_inception, two_folders, monkeypatch, capsys):
    """FID on the same weights and images: pytorch-fid's network and formula, to 1e-3."""
    from pytorch_fid import fid_score, inception
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    printed = printed_metrics(random_inception, two_folders, capsys)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: torch.load(random_inception))
    network = inception.InceptionV3([0], resize_input=False, normalize_input=False).eval()
    features = []
    for folder in two_folders:
        images = evaluate.read_images(str(folder)).images.float()
        images = (interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False) - 128) / 128
        with torch.no_grad():
            features.append(torch.cat([network(part)[0].mean((2, 3)) for part in images.split(35)]).double())
    theirs = fid_score.calculate_frechet_distance(*(np.asarray(v) for f in features for v in judge.moments(f)))
    assert float(printed["frechet_inception_distance"]) == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("flags, words", [
    (["--metrics", "fid"], "70 images are too few for fid: it needs 2049"),
    (["--metrics", "kid"], "too few for kid: it needs 1000"),
    (["--metrics", "beauty"], "choose from judge, fid, kid, is, pr"),
    (["--metrics", "fid", "--features", "64", "--weights", "other.pth"], "the Inception network could not be loaded")])
def test_what_makes_no_sense_is_refused_with_the_reason(two_folders, folder, flags, words):
    """Too few images, images without classes, unknown metrics, other weights: one line, no traceback."""
    torch.save({"weight": torch.zeros(3)}, folder / "other.pth")
    done = cli(two_folders[0], "--against", two_folders[1], *flags, script="evaluate.py", cwd=folder)
    assert done.returncode in (1, 2) and words in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_file_is_told_with_its_reason(folder):
    """Not as if nothing were there."""
    (folder / "broken.zip").write_bytes(b"PK no more")
    done = cli("broken.zip", "--against", "digits", script="evaluate.py", cwd=folder)
    assert done.returncode == 2 and "broken.zip is no whole ZIP file" in done.stderr


def test_without_classes_and_with_few_images_nothing_can_be_judged(folder):
    """That is an error, and no table without a figure."""
    for name, count in (("drawn", 20), ("real", 200)):
        (folder / name).mkdir()
        for i in range(count):
            Image.new("L", (8, 8), i).save(folder / name / f"{i}.png")
    done = cli("drawn", "--against", "real", "--metrics", "judge", script="evaluate.py", cwd=folder)
    assert done.returncode == 2 and "accuracy needs classes, which real does not have" in done.stderr


def test_a_folder_named_images_is_a_class_like_others(tmp_path):
    """It is what diffuser.py has left only where samples.json stands beside it."""
    for name, count in (("images", 2), ("more", 3)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("L", (8, 8), i).save(tmp_path / name / f"{i}.png")
    assert len(evaluate.find_images(str(tmp_path))) == 5
    (tmp_path / "samples.json").touch()
    assert len(evaluate.find_images(str(tmp_path))) == 2


def test_photographs_that_lie_on_their_side_give_the_size_as_seen(tmp_path):
    """Phones store pictures turned and say so in EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6                                             # a quarter turn
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert evaluate.read_images(str(tmp_path)).images.shape == (1, 3, 40, 20)


def test_real_images_with_a_test_part_all_train_the_judge(tmp_path):
    """A sixth is set aside only where there are no others to test with."""
    for i in range(12):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i}.png")
    assert evaluate.count_reference(str(tmp_path), "") == (12, 10) and evaluate.count_reference(str(tmp_path), "other") == (12, 12)
    assert evaluate.count_reference("mnist", "") == (60_000, 60_000) and evaluate.count_reference("digits", "")[1] == 1498


def test_a_folder_that_is_not_there(folder):
    """Named as it was given."""
    done = cli("nowhere", "--against", "digits", script="evaluate.py", cwd=folder)
    assert done.returncode == 2 and "nowhere is no folder or file with images in it" in done.stderr


@pytest.mark.slow
def test_inception_score_precision_and_recall(random_inception, two_folders, folder):
    """is and pr come from torch-fidelity: of a folder against itself, precision and recall are 1."""
    for name, there in zip(("a", "b"), two_folders):
        for file in sorted((there / "images").iterdir())[:50]:
            (folder / f"{name}{file.name}").write_bytes(file.read_bytes())
    done = cli(folder, "--against", folder, "--metrics", "pr", "--features", "64", "--weights", random_inception,
               script="evaluate.py", cwd=folder)
    figures = dict(line.rsplit(None, 1) for line in done.stdout.splitlines())
    assert done.returncode == 0 and float(figures["precision"]) == float(figures["recall"]) == 1


def test_weights_that_would_run_code_are_refused(two_folders, folder):
    """--weights is opened without running what is in it: torch-fidelity alone would run it."""
    import pickle

    class Evil:
        def __reduce__(self):
            return open, (str(folder / "ran"), "w")

    (folder / "evil.pth").write_bytes(pickle.dumps(Evil()))
    done = cli(two_folders[0], "--against", two_folders[1], "--metrics", "fid", "--features", "64", "--weights", "evil.pth",
               script="evaluate.py", cwd=folder)
    assert done.returncode == 2 and "evil.pth" in done.stderr and not (folder / "ran").exists()


def save_images(folder, data, names):
    (folder / "images").mkdir(parents=True)
    for i, (image, label) in enumerate(zip(data.images, data.labels.tolist())):
        to_pil(image).save(folder / "images" / f"{i:06}_{names[label]}.png")


def test_the_judge_knows_digits_from_noise(folder, digits_judge):
    """Real held-out digits score near the floor and are recognised; with wrong names they are not; noise is far off.
    The judge that was kept is taken."""
    (folder / "data").mkdir()
    shutil.copy(digits_judge, "data")
    reference = evaluate.load_reference("digits", "data", (1, 8, 8))
    save_images(folder / "real", reference.test, diffuser.DIGITS)
    wrong = ImageData(reference.test.images, (reference.test.labels + 1) % 10, reference.test.class_names)
    save_images(folder / "wrong", wrong, diffuser.DIGITS)
    grey = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = ImageData(grey, reference.test.labels[:200], [])
    save_images(folder / "noise", noise, diffuser.DIGITS)
    scores = {}
    for name in ("real", "wrong", "noise"):
        done = cli(name, "--against", "digits", "--json", f"{name}.json", script="evaluate.py", cwd=folder)
        assert done.returncode == 0 and "training the judge" not in done.stderr, done.stderr
        scores[name] = json.loads((folder / f"{name}.json").read_text())
    assert scores["real"]["judge's own accuracy"] > 0.97
    assert scores["real"]["accuracy"] > 0.97 and scores["wrong"]["accuracy"] < 0.05 and scores["noise"]["accuracy"] < 0.4
    assert scores["real"]["distance"] == pytest.approx(scores["real"]["floor"], rel=0.02)
    assert scores["noise"]["distance"] > 20 * scores["real"]["floor"]
    assert [path.name for path in (folder / "data").iterdir()] == [digits_judge.name]
    too_few = folder / "real" / "images"
    for picture in sorted(too_few.iterdir())[100:]:
        picture.unlink()
    done = cli("real", "--against", "digits", script="evaluate.py", cwd=folder)
    assert done.returncode == 0 and "100 images are too few for a Frechet distance over 128 features" in done.stderr
    assert "it needs 129" in done.stderr and "accuracy" in done.stdout and "distance" not in done.stdout


def test_figures_of_before_are_not_replaced_by_nothing(monkeypatch, tmp_path):
    """Where it fails before anything is found, the file of an earlier call stays."""
    def stages(args):
        yield {"images": 5}
        raise UserError("no judge")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.json").write_text("{}")
    monkeypatch.setattr(evaluate, "evaluate", stages)
    assert evaluate.main(["DIR", "--against", "digits", "--json", "f.json"]) == 2
    assert (tmp_path / "f.json").read_text() == "{}"


def test_what_is_found_is_kept_where_something_fails_later(monkeypatch, capsys, tmp_path):
    """A judge takes a quarter of an hour: its figures are printed and in the file though Inception fails after it."""
    monkeypatch.chdir(tmp_path)

    def stages(args):
        yield {"images": 123456, "accuracy": 0.5}
        raise UserError("no weights")

    monkeypatch.setattr(evaluate, "evaluate", stages)
    assert evaluate.main(["DIR", "--against", "digits", "--json", "f.json"]) == 2
    assert json.loads((tmp_path / "f.json").read_text()) == {"images": 123456, "accuracy": 0.5}
    assert "123456" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["out"], ["--against", "digits"], ["--test", "out"], ["--metrics", "judge"]])
def test_a_bound_takes_no_images(flags, capsys):
    """--bpd is about a model: what asks for figures of images beside it is refused, not passed over."""
    assert evaluate.main([*flags, "--bpd", "some.pt"]) == 2
    assert "leave out the folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# The variational bound, where everything is known: data N(0.1, 0.2^2) and its exact denoiser.

MEAN, VAR = 0.1, 0.04


def exact(table):
    def denoise(x, t):
        a, s2 = table[t].sqrt(), 1 - table[t]
        x0_hat = MEAN + a * VAR / (a**2 * VAR + s2) * (x - a * MEAN)
        return x0_hat, (x - a * x0_hat) / s2.sqrt()

    return denoise


def levels(n):
    """Grey levels drawn from the data, as numbers in [-1, 1]."""
    x = torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * math.sqrt(VAR) + MEAN
    return ((x + 1) * 127.5).round() / 127.5 - 1


def test_the_bound_has_the_terms_of_the_closed_form():
    """Prior and every term with t > 0 are what the Gaussian formulas give; t = 0 is the discretised likelihood."""
    table, x0 = alpha_bar_table(configure(timesteps=50, beta_start=1e-3, beta_end=0.15)), levels(20_000)
    random = torch.Generator().manual_seed(1)
    found = evaluate.bits_per_dimension(exact(table), x0, table, noise=lambda x: torch.randn(
        x.shape, dtype=torch.float64, generator=random))
    beta = 1 - table / torch.cat([torch.ones(1).double(), table[:-1]])
    for t in (1, 5, 20, 49):
        before, ab = table[t - 1], table[t]
        spread = 1 / (1 / VAR + ab / (1 - ab))                               # E |x0 - x0_hat|^2
        posterior = beta[t] * (1 - before) / (1 - ab)
        nats = before * beta[t] ** 2 / (1 - ab) ** 2 * spread / (2 * posterior)
        assert found["terms"][t] == pytest.approx(nats.item() / math.log(2), rel=0.04), t
    ab = table[-1].item()
    prior = 0.5 * (ab * (VAR + MEAN**2) + 1 - ab - 1 - math.log(1 - ab)) / math.log(2)
    assert found["prior"] == pytest.approx(prior, rel=0.05)
    assert found["total"] == pytest.approx(found["prior"] + sum(found["terms"]))


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_bound_is_above_the_entropy_and_close_to_it(variance):
    """With the exact denoiser and many steps the bound comes down to the entropy of the grey levels, not below it."""
    table, x0 = alpha_bar_table(configure(timesteps=1000)), levels(4000)
    random = torch.Generator().manual_seed(2)
    found = evaluate.bits_per_dimension(exact(table), x0, table, variance, noise=lambda x: torch.randn(
        x.shape, dtype=torch.float64, generator=random))
    entropy = 0.5 * math.log2(2 * math.pi * math.e * VAR) + math.log2(127.5)
    assert entropy - 0.02 < found["total"] < entropy + (0.85 if variance == "small" else 0.2)  # here beta_t is the better one


def test_the_discretised_likelihood_is_a_distribution():
    """Over the 256 grey levels the probabilities add up to one, the open ends included."""
    grey = torch.arange(256).double() / 127.5 - 1
    for mean, sigma in ((0.3, 0.2), (-0.99, 0.02), (0.9, 1.0)):
        assert torch.exp(-evaluate.discretised_nll(grey, torch.tensor(mean), sigma)).sum().item() == pytest.approx(1, abs=1e-4)


def test_bits_per_dimension_of_a_checkpoint(folder):
    """--bpd CKPT prints the bound of a trained model over images that it was not trained on."""
    path = diffuser.train(tiny_training(iterations=5, timesteps=20))
    done = cli("--bpd", path, "--num_images", "20", script="evaluate.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    figures = dict(line.rsplit(None, 1) for line in done.stdout.splitlines())
    assert float(figures["images"]) == 20 and 0 < float(figures["bits per dimension"]) < 100
    assert float(figures["bits per dimension"]) > float(figures["of these t = 0"]) > 0


def test_without_torch_fidelity_it_says_what_to_install(monkeypatch):
    """Its absence is one clear line."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    images = torch.zeros(10, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        evaluate.inception_scores(images, images, ["fid"], "", 64, 10)


@pytest.mark.parametrize("broken", ["000000.png", "000001.png"])
def test_a_broken_picture_is_named(tmp_path, broken):
    """Figures of a folder with a picture missing would be wrong: the first that cannot be read is an error."""
    for i in range(3):
        Image.new("L", (8, 8), i).save(tmp_path / f"{i:06}.png")
    (tmp_path / broken).write_bytes(b"no picture")
    with pytest.raises(UserError, match=broken):
        evaluate.read_images(str(tmp_path))


def test_class_names_come_from_file_names_or_folders(tmp_path):
    """000012_cat.png is a cat; without names in all of them there are no classes; folders count first."""
    for name in ("000000_dog.png", "000001_cat_2.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    found = evaluate.read_images(str(tmp_path))
    assert found.class_names == ["cat_2", "dog"] and found.labels.tolist() == [1, 0]
    Image.new("L", (8, 8)).save(tmp_path / "000002.png")
    found = evaluate.read_images(str(tmp_path))
    assert found.class_names == [] and found.labels.tolist() == [0, 0, 0] and found.labels.dtype == torch.int64
    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a" / "x.png")
    assert "a" in evaluate.read_images(str(tmp_path)).class_names


def test_classes_alike_as_file_names_are_told_apart():
    """Drawn images of the classes `a b` and `a_b` get the labels that they were drawn with."""
    generated = ImageData(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([1, 0, 2]), ["a_b-0", "a_b-1", "c"])
    assert evaluate.labels_in_reference(generated, ["a b", "a_b", "c"]).tolist() == [1, 0, 2]


def test_out_of_memory_is_told_with_what_to_do(monkeypatch, capsys):
    """As diffuser.py does: one line, status 1."""
    def fail(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(evaluate, "evaluate", fail)
    assert evaluate.main(["out", "--against", "digits"]) == 1
    assert capsys.readouterr().err.startswith("evaluate: out of memory: give fewer images at a time")


def test_ctrl_c_ends_without_a_traceback(folder):
    """Status 130 and one line."""
    done = interrupted("evaluate.py", "--bpd", "some.pt", cwd=folder)
    assert done.returncode == 130 and done.stderr.strip() == "evaluate: interrupted"


def test_debug_shows_the_traceback(folder):
    """Of an expected failure, too."""
    done = cli("nowhere", "--against", "digits", "--debug", script="evaluate.py", cwd=folder)
    assert done.returncode == 1 and "Traceback" in done.stderr and "UserError" in done.stderr


@pytest.mark.parametrize("arguments, words", [
    ("out --agianst mnist", "unknown option --agianst: did you mean --against?"), ("out --features 65", "--features"),
    ("out", "--against"), ("out --against digits --kid_subset_size 1", "--kid_subset_size")])
def test_a_mistyped_command_line_is_one_line(arguments, words, capsys):
    """Status 2, no usage text of a screen."""
    assert evaluate.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate: ") and error.count("\n") == 1 and words in error


def small_folders(folder, with_names, **counts):
    """Folders of so many digits each, with or without their classes in the file names."""
    reference = evaluate.load_reference("digits", "data", (1, 8, 8))
    names = diffuser.DIGITS if with_names else [""] * 10
    for name, count in counts.items():
        part = ImageData(reference.test.images[:count], reference.test.labels[:count], reference.test.class_names)
        save_images(folder / name, part, names)


@pytest.mark.parametrize("flags, words", [
    (["hundred", "--against", "digits"], "accuracy needs the classes of digits"),
    (["forty", "--against", "hundred"], "40 images are too few for fid: it needs 2049"),
    (["hundred", "--against", "digits", "--metrics", "is,fid", "--features", "192", "--weights", "gone.pth"], "gone.pth"),
    (["hundred", "--against", "digits", "--json", "hundred/images/000000_.png/x"], "--json"),
    (["hundred", "--against", "digits", "--data_dir", "hundred/images/000000_.png"], "--data_dir")])
def test_nothing_is_done_where_nothing_can_come_of_it(folder, monkeypatch, capsys, flags, words):
    """Counts, packages and places to write to come first: no judge is trained for an error."""
    small_folders(folder, with_names="--data_dir" in flags, hundred=100, forty=40)
    if "--data_dir" in flags:
        flags = [*flags[:-1], "hundred/images/" + min(path.name for path in (folder / "hundred/images").iterdir())]
    monkeypatch.setattr(judge, "train_classifier", None)
    assert evaluate.main(flags) == 2
    errors = capsys.readouterr().err
    assert words in errors and "unexpected" not in errors


def test_the_judge_is_taken_with_other_images_to_test_with_and_offered_where_fid_needs_more(folder, monkeypatch, capsys):
    """--test is for the judge, so it needs no --metrics; 140 images are enough for it and too few for FID."""
    small_folders(folder, with_names=True, real=200, other=150, drawn=140)
    assert evaluate.main(["drawn", "--against", "real"]) == 2
    assert capsys.readouterr().err.endswith("; --metrics judge needs fewer images\n")

    monkeypatch.setattr(judge, "train_classifier", lambda *a: judge.Classifier((1, 8, 8), 10).eval())
    assert evaluate.main(["drawn", "--against", "real", "--test", "other"]) == 0
    assert {"accuracy", "distance"} <= set(capsys.readouterr().out.split())


def test_what_can_be_computed_is(folder, monkeypatch, capsys):
    """Accuracy needs no covariance: of a hundred images it is told, before the judge is trained that the distance is not;
    a judge that cannot be kept is no reason to stop."""
    small_folders(folder, with_names=True, hundred=100)
    told = []
    monkeypatch.setattr(judge, "train_classifier", lambda *a: told.append(capsys.readouterr().err)
                        or judge.Classifier((1, 8, 8), 10).eval())
    monkeypatch.setattr(judge, "write_atomically", lambda path, write: (_ for _ in ()).throw(OSError(28, "full")))
    assert evaluate.main(["hundred", "--against", "digits", "--json", "scores.json"]) == 0
    assert "left out: 100 images are too few for a Frechet distance" in told[0]
    assert {"images", "accuracy", "judge's own accuracy"} == set(json.loads((folder / "scores.json").read_text()))
    assert "could not be written" in capsys.readouterr().err


def test_out_of_memory_is_said_as_everywhere(monkeypatch, capsys):
    """What torch says of memory is one line that says what to do."""
    def work(args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:100] data. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(evaluate, "run", work)
    assert evaluate.main(["x"]) == 1
    assert capsys.readouterr().err == "evaluate: out of memory: give fewer images at a time, or close other programs\n"
