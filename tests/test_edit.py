"""edit.py: slerp, SDEdit and RePaint against closed forms and against what the model draws."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, cli, interrupted, tiny_training
from PIL import Image

import diffuser
import edit
from diffuser import Diffusion, alpha_bar_table, configure
from diffuser_lib import images
from diffuser_lib.files import UserError

TABLE = alpha_bar_table(configure(timesteps=200, schedule_type="cosine"))
TS = diffuser.SPACINGS["trailing"](TABLE, 50)
DDPM = diffuser.build_sampler(configure(sampler="ddpm"))
DDIM = diffuser.build_sampler(configure(sampler="ddim"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a few steps on the digits, and a picture with a mask."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        path = diffuser.train(tiny_training(timesteps=100, schedule_type="cosine", learning_rate=1e-2, iterations=30))
    digits = np.load(ROOT / "data" / "digits.npz")["images"]
    Image.fromarray(digits[3]).resize((40, 60)).save(folder / "three.png")
    mask = np.zeros((60, 40), np.uint8)
    mask[30:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder, folder / path


def noises(shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=random)


def gaussian_denoiser(mean, covariance):
    """The exact denoiser of images from N(mean, covariance): mean [D], covariance [D, D], images [N, 1, 1, D]."""
    diffusion = Diffusion(TABLE, "x0")

    def denoise(xt, t):
        bar = TABLE[t].item()
        gain = math.sqrt(bar) * covariance @ torch.linalg.inv(bar * covariance + (1 - bar) * torch.eye(len(mean)))
        x0_hat = (mean + (xt.flatten(1) - math.sqrt(bar) * mean) @ gain.T).view(xt.shape)
        return diffusion.estimates(x0_hat, xt, torch.full((len(xt),), t), clip=False)

    return denoise


def test_slerp_goes_along_the_sphere():
    """It begins and ends at its ends, keeps the length between equally long ones, and falls back where there is no arc."""
    a, b = torch.randn(2, 500, generator=torch.Generator().manual_seed(0))
    a, b = a / a.norm(), b / b.norm()
    assert torch.allclose(edit.slerp(a, b, 0.0), a) and torch.allclose(edit.slerp(a, b, 1.0), b)
    for weight in (0.2, 0.5, 0.9):
        assert edit.slerp(a, b, weight).norm().item() == pytest.approx(1, abs=1e-5)
    half = edit.slerp(a, b, 0.5)
    assert torch.allclose(half, (a + b) / (a + b).norm(), atol=1e-6)
    assert torch.allclose(edit.slerp(a, a, 0.3), a) and edit.slerp(a, -a, 0.5).norm() < 1e-5


def test_noise_in_two_steps_is_noise_in_one():
    """x0 to t and from there to a later t has the mean and variance of q(x_t | x0)."""
    x0, draw = torch.full((200_000, 1, 1, 1), 0.7), noises((200_000, 1, 1, 1))
    x = edit.add_noise(edit.add_noise(x0, 1.0, 0.8, draw()), 0.8, 0.3, draw())
    assert x.mean().item() == pytest.approx(math.sqrt(0.3) * 0.7, abs=0.01) and x.var().item() == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("steps, jump, resamples", [(10, 3, 2), (50, 5, 5), (7, 1, 3), (6, 10, 4), (12, 4, 1)])
def test_the_schedule_of_repaint(steps, jump, resamples):
    """One step at a time; steps that are repeated are taken `resamples` times, never the one to the clean image."""
    walk = [steps, *edit.repaint_schedule(steps, jump, resamples)]
    moves = [b - a for a, b in zip(walk, walk[1:])]
    assert walk[-1] == 0 and 0 not in walk[:-1] and set(moves) <= {1, -1}
    taken = [sum(a == left + 1 and b == left for a, b in zip(walk, walk[1:])) for left in range(steps)]
    resting = [left for left in range(1, steps) if left >= 1 + (steps - 1) // jump * jump or steps <= jump]
    assert taken[0] == 1 and all(taken[left] == 1 for left in resting)
    assert all(taken[left] == resamples for left in range(1, 1 + (steps - 1) // jump * jump))
    if (steps, jump, resamples) == (10, 3, 2):
        assert walk == [10, 9, 8, 7, 8, 9, 10, 9, 8, 7, 6, 5, 4, 5, 6, 7, 6, 5, 4, 3, 2, 1, 2, 3, 4, 3, 2, 1, 0]


def test_repaint_draws_from_the_conditional_distribution():
    """Correlated Gaussian pixels, two of four known: mean and covariance of the others are the exact conditional ones,
    which without resampling they are not."""
    distance = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    covariance, mean = 0.95**distance, torch.tensor([0.5, -0.3, 0.2, 0.0])
    picture = torch.tensor([1.9, 1.4, 0.0, 0.0]).view(1, 1, 1, 4).repeat(4000, 1, 1, 1)
    mask = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4)
    gain = covariance[2:, :2] @ torch.linalg.inv(covariance[:2, :2])
    expected = mean[2:] + gain @ (picture[0, 0, 0, :2] - mean[:2])
    spread = covariance[2:, 2:] - gain @ covariance[:2, 2:]

    def error(resamples):
        draw = noises(picture.shape)
        x = edit.inpaint(DDPM, gaussian_denoiser(mean, covariance), draw(), picture, mask, TS, TABLE, draw, 5, resamples)
        assert torch.equal(x[..., :2], picture[..., :2])
        unknown = x[:, 0, 0, 2:]
        return (unknown.mean(0) - expected).abs().max().item(), (unknown.T.cov() - spread).abs().max().item()

    with_it, without = error(10), error(1)
    assert with_it[0] < 0.15 and with_it[1] < 0.05 and without[0] > 3 * with_it[0]


def test_varying_keeps_as_much_of_the_picture_as_asked_for():
    """SDEdit with the exact denoiser of N(0, 1) pixels: correlation with the picture falls with the strength, from one
    to none, and the variance stays that of the data."""
    denoise = gaussian_denoiser(torch.zeros(2), torch.eye(2))
    draw, previous = noises((20_000, 1, 1, 2)), 1.1
    picture = draw()
    for strength in (0.02, 0.3, 0.6, 1.0):
        x = edit.vary(DDPM, denoise, picture, strength, TS, TABLE, draw)
        correlation = torch.corrcoef(torch.stack([x.flatten(), picture.flatten()]))[0, 1].item()
        start = next(t for t in TS if t < strength * 200)
        assert correlation == pytest.approx(TABLE[start].item(), abs=0.03) and correlation < previous
        assert x.var().item() == pytest.approx(1, abs=0.1)                   # the small variance of 50 steps is a little small
        previous = correlation
    assert abs(correlation) < 0.03


def test_interpolation_begins_and_ends_with_the_images_of_its_seeds(trained, monkeypatch):
    """The first and last image are what these seeds draw, but for the rounding of batches, with one class and with two."""
    folder, path = trained
    monkeypatch.chdir(folder)
    model = diffuser.load(path, device="cpu", precision="fp32")
    for classes, name in ((["3", "3"], "3"), (["3", "8"], "3,8")):
        assert edit.main([str(path), "interpolate", "--seeds", "4,5", "--classes", name, "--num_images", "5", "--steps", "5",
                          "--device", "cpu", "--precision", "fp32", "--save_dir", f"between{name}"]) == 0
        images = [np.array(Image.open(f"between{name}/images/{i:06}.png")) for i in range(5)]
        for i, seed, label in ((0, 4, classes[0]), (4, 5, classes[1])):
            alone = model.generate([label], 1, seed=seed, steps=5)
            assert np.abs(images[i].astype(int) - alone[0, 0].numpy()).max() <= 1
        assert all((a != b).any() for a, b in zip(images, images[1:]))


def test_the_command_line_varies_and_inpaints(trained):
    """As a user types it: images, a grid, and known pixels that stay as they are, byte for byte."""
    folder, path = trained
    done = cli(path, "inpaint", "three.png", "mask.png", "--classes", "3", "--num_images", 2, "--steps", 10, cwd=folder, script="edit.py")
    assert done.returncode == 0 and "edit_inpaint_1" in done.stdout, done.stderr
    picture = edit.read_picture(str(folder / "three.png"), (1, 8, 8))[0, 0].numpy()
    images = [np.array(Image.open(p)) for p in sorted((folder / "samples/edit_inpaint_1/images").iterdir())]
    assert len(images) == 2 and all((image[:4] == picture[:4]).all() for image in images)
    assert (images[0][4:] != images[1][4:]).any() and Image.open(folder / "samples/edit_inpaint_1/grid.png").width > 200


def test_a_mask_lies_on_the_picture_as_it_is_looked_at(tmp_path):
    """A photograph that is stored turned, and a mask made on it upright: they fit; one made on the stored pixels does not."""
    exif = Image.Exif()
    exif[0x0112] = 6                                                         # turned by a quarter
    Image.new("L", (60, 40), 99).save(tmp_path / "photo.jpg", exif=exif)
    for size, name in (((40, 60), "upright.png"), ((60, 40), "stored.png")):
        mask = Image.new("L", size)
        mask.paste(255, (0, 0, 40, 20))
        mask.save(tmp_path / name)
    mask = edit.read_mask(str(tmp_path / "upright.png"), str(tmp_path / "photo.jpg"), (1, 12, 8))
    assert mask[0, 0, :4].min() == 1 and mask[0, 0, 4:].max() == 0
    with pytest.raises(UserError, match="60x40, the picture 40x60"):
        edit.read_mask(str(tmp_path / "stored.png"), str(tmp_path / "photo.jpg"), (1, 12, 8))


def test_a_transparent_mask_is_white_where_it_is_painted(tmp_path):
    """White strokes on nothing, as paint programs save them."""
    Image.new("L", (8, 8), 99).save(tmp_path / "picture.png")
    mask = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 8, 3))
    mask.save(tmp_path / "mask.png")
    found = edit.read_mask(str(tmp_path / "mask.png"), str(tmp_path / "picture.png"), (1, 8, 8))
    assert found[0, 0, :3].min() == 1 and found[0, 0, 3:].max() == 0
    exif = Image.Exif()
    exif[0x0112] = 3                                                         # stored upside down
    mask.save(tmp_path / "mask.png", exif=exif)
    found = edit.read_mask(str(tmp_path / "mask.png"), str(tmp_path / "picture.png"), (1, 8, 8))
    assert found[0, 0, 5:].min() == 1 and found[0, 0, :5].max() == 0


def test_postscript_called_a_picture_is_refused(tmp_path, monkeypatch):
    """Pillow goes by content and would start Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *arguments, **options: pytest.fail("it was started"))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", "EPS")
    with pytest.raises(UserError, match=r"x.png cannot be read as a picture .its content is no PNG"):
        edit.read_picture(str(tmp_path / "x.png"), (3, 8, 8))


def test_the_image_does_not_depend_on_how_many_are_made(trained, monkeypatch):
    """Image i of three is image i of two."""
    folder, path = trained
    monkeypatch.chdir(folder)
    for count in (2, 3):
        assert edit.main([str(path), "vary", "three.png", "--num_images", str(count), "--steps", "5", "--save_dir", f"vary{count}"]) == 0
    for name in ("000000.png", "000001.png"):
        a, b = (np.array(Image.open(f"vary{count}/images/{name}"), dtype=int) for count in (2, 3))
        assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize("arguments, words", [
    ("vary nowhere.png", "no such picture"), ("vary three.png --strength 2", "--strength"), ("interpolate --seeds x", "--seeds"),
    ("inpaint three.png mask.png --jump_length 0", "--jump_length")])
def test_what_is_wrong_whatever_the_model_is_told_first(trained, arguments, words, monkeypatch, capsys):
    """Before a checkpoint is read, which may take long."""
    folder, _ = trained
    monkeypatch.chdir(folder)
    assert edit.main(["gone.pt", *arguments.split()]) == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    ("vary nowhere.png", "no such picture"), ("vary text.png", "cannot be read"), ("vary three.png --strength 0", "--strength"),
    ("inpaint three.png text.png", "cannot be read"), ("inpaint three.png small.png", "make them alike"),
    ("inpaint three.png black.png", "all black"), ("inpaint three.png mask.png --resamples 0", "--resamples"),
    ("interpolate --seeds 1", "--seeds"), ("interpolate --seeds 1,-2", "--seeds"), ("interpolate --sampler ddpm", "no noise"),
    ("interpolate --classes 1,2,3", "at most 2"), ("vary three.png --classes cat", "unknown class"), ("vary three.png --steps 500", "--steps"),
    ("vary three.png --sampler dpmpp --eta 0.5", "--eta"), ("vary three.png --num_images 101", "--num_images"), ("vary three.png --save_dir full", "not empty")])
def test_mistakes_are_one_line(trained, arguments, words, monkeypatch, capsys):
    """Status 2 and a line that names what is wrong, before anything is written."""
    folder, path = trained
    monkeypatch.chdir(folder)
    (folder / "text.png").write_text("no picture")
    Image.new("L", (8, 8), 255).save("small.png")
    Image.new("L", (40, 60)).save("black.png")
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full" / "x").touch()
    before = sorted(map(str, folder.rglob("*")))
    assert edit.main([str(path), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("edit: ") and error.count("\n") == 1 and words in error
    assert sorted(map(str, folder.rglob("*"))) == before


def test_unconditional_models_are_edited_too(folder):
    """No classes, three channels, a rectangle: nothing assumes digits."""
    random = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(20):
        Image.fromarray(random.integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(folder / f"pictures/{i}.png")
    path = diffuser.train(configure(dataset="folder", path_to_data="pictures", img_size=(8, 12), device="cpu", batch_size=4, iterations=2,
                                    preview_steps=2, timesteps=20, num_workers=0, report=False,
                                    **{**TINY, "attention_levels": ()}))
    assert edit.main([str(path), "inpaint", "pictures/0.png", "pictures/1.png", "--save_dir", "out", "--num_images", "2"]) == 0
    assert Image.open("out/images/000000.png").size == (12, 8)
    assert edit.main([str(path), "interpolate", "--save_dir", "out2", "--steps", "3"]) == 0


def test_both_estimates_are_blended_by_the_weights():
    """At 0 the first denoiser's, at 1 the second one's, image by image."""
    denoise = edit.blend_denoisers(lambda xt, t: (xt, xt + t), lambda xt, t: (-xt, xt - t), torch.tensor([0.0, 0.25, 1.0]))
    x0_hat, eps_hat = denoise(torch.ones(3, 1, 1, 1), 2)
    assert x0_hat.flatten().tolist() == [1, 0.5, -1] and eps_hat.flatten().tolist() == [3, 2, -1]


@pytest.mark.parametrize("sampler, eta, deterministic", [
    ("ddpm", 0.0, False), ("ddim", 0.5, False), ("ddim", 0.0, True), ("dpmpp", 0.0, True), ("heun", 0.0, True)])
def test_samplers_that_add_noise_have_no_way_between_two_seeds(sampler, eta, deterministic):
    """They are refused by interpolate, the others are not."""
    cfg = configure(sampler=sampler, eta=eta)
    if deterministic:
        edit.require_deterministic(cfg)
    else:
        with pytest.raises(UserError, match="adds no noise"):
            edit.require_deterministic(cfg)


def test_what_is_written_is_whole_or_not_there(trained, monkeypatch):
    """A disk that fills up leaves no half picture under its name."""
    folder, path = trained
    monkeypatch.chdir(folder)

    def full(file, format):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffuser_lib.images.to_pil", lambda image: type("Picture", (), {"save": staticmethod(full)}))
    assert edit.main([str(path), "vary", "three.png", "--num_images", "1", "--steps", "3", "--save_dir", "half"]) == 1
    assert list((folder / "half" / "images").iterdir()) == []


def test_an_edit_that_a_full_disk_broke_off_goes_on(trained, monkeypatch, capsys):
    """One message with the place, what is kept and what to do, status 1; then the same command writes the rest, and no
    other command."""
    folder, path = trained
    monkeypatch.chdir(folder)
    command = [str(path), "vary", "three.png", "--num_images", "6", "--steps", "3", "--save_dir", "broken"]
    real_save = edit.save_png

    def save(image, place):
        if place.name == "000004.png":
            raise OSError(28, "No space left on device")
        real_save(image, place)

    monkeypatch.setattr(edit, "save_png", save)
    assert edit.main(command) == 1
    errors = capsys.readouterr().err
    assert "broken/images: No space left on device; 4 of 6 images are there" in errors
    assert "the same command goes on" in errors and len(errors.splitlines()) == 2
    assert edit.main([*command, "--seed", "7"]) == 2 and "another request" in capsys.readouterr().err

    written = []
    monkeypatch.setattr(edit, "save_png", lambda image, place: (written.append(place.name), real_save(image, place)))
    assert edit.main(command) == 0 and written == ["000004.png", "000005.png"]
    assert Image.open("broken/grid.png").width == 7 * 68 + 4
    assert edit.main(command) == 2 and "all that are asked for" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_before_drawing(trained, monkeypatch, capsys):
    """Nothing is drawn that could not be kept; what an attempt has left there is no hindrance to the next."""
    folder, path = trained
    monkeypatch.chdir(folder)
    drawn = []
    monkeypatch.setattr(edit, "vary", lambda *arguments: drawn.append(1))
    monkeypatch.setattr(images, "write_json", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    command = [str(path), "vary", "three.png", "--num_images", "2", "--steps", "3", "--save_dir", "no_room"]
    assert edit.main(command) == 1 and not drawn and "No space left" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert edit.main(command) == 0


def test_another_picture_under_the_same_name_is_another_request(trained, monkeypatch, capsys):
    """What is edited is known by its content: after a change of the mask nothing of before is gone on with."""
    folder, path = trained
    monkeypatch.chdir(folder)
    mask = Image.open("mask.png").convert("L")
    mask.save("changing.png")
    command = [str(path), "inpaint", "three.png", "changing.png", "--num_images", "2", "--steps", "3", "--save_dir", "masked"]
    assert edit.main(command) == 0
    mask.point(lambda value: 255 - value).save("changing.png")
    assert edit.main(command) == 2 and "another request" in capsys.readouterr().err
    Path("renamed.png").write_bytes(Path("three.png").read_bytes())
    mask.save("changing.png")
    assert edit.main([*command[:2], "renamed.png", *command[3:]]) == 2 and "all that are asked for" in capsys.readouterr().err


def test_the_message_of_a_full_disk_names_the_folder_to_go_on_in(trained, monkeypatch, capsys):
    """Where the program has chosen it."""
    folder, path = trained
    monkeypatch.chdir(folder)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(edit, "save_png", full)
    assert edit.main([str(path), "interpolate", "--num_images", "1", "--steps", "3"]) == 1
    assert "with --save_dir samples/edit_interpolate_1 goes on" in capsys.readouterr().err


def test_every_picture_of_an_edit_has_a_heading(trained, monkeypatch):
    """What it was made from, seeds and weights on the way between them, the numbers of the files."""
    folder, path = trained
    monkeypatch.chdir(folder)
    headings = []
    monkeypatch.setattr(edit, "save_grid", lambda images, place, names, columns: headings.append(names))
    common = ["--steps", "3", "--num_images", "3", "--save_dir"]
    assert edit.main([str(path), "vary", "three.png", *common, "h1"]) == 0
    assert edit.main([str(path), "inpaint", "three.png", "mask.png", *common, "h2"]) == 0
    assert edit.main([str(path), "interpolate", "--seeds", "8,9", *common, "h3"]) == 0
    assert edit.main([str(path), "interpolate", "--seeds", "8,9", "--num_images", "1", "--save_dir", "h4"]) == 0
    assert headings == [["original", "0", "1", "2"], ["original", "known part", "0", "1", "2"], ["seed 8", "0.5", "seed 9"],
                        ["seed 8"]]


def test_out_of_memory_is_told_with_what_to_do(trained, monkeypatch, capsys):
    """As diffuser.py does, with a flag that edit.py has."""
    folder, path = trained
    monkeypatch.chdir(folder)

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(edit, "vary", fail)
    assert edit.main([str(path), "vary", "three.png", "--steps", "3"]) == 1
    assert capsys.readouterr().err == "edit: out of memory: lower --num_images\n"


def test_the_settings_are_kept_beside_the_images(trained, monkeypatch):
    """edit.json holds what was asked for, and nothing about debugging."""
    folder, path = trained
    monkeypatch.chdir(folder)
    assert edit.main([str(path), "vary", "three.png", "--num_images", "1", "--steps", "3", "--save_dir", "kept"]) == 0
    kept = json.loads((folder / "kept" / "edit.json").read_text())
    assert kept["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert kept["command"] == "vary" and kept["steps"] == 3 and kept["strength"] == 0.5 and "debug" not in kept


def test_ctrl_c_ends_without_a_traceback(folder):
    """Status 130 and one line."""
    done = interrupted("edit.py", "some.pt", "interpolate", cwd=folder)
    assert done.returncode == 130 and done.stderr.strip() == "edit: interrupted"


@pytest.mark.parametrize("arguments", [["some.pt", "interpolate", "--debug"], ["--debug", "some.pt", "interpolate"]])
def test_debug_shows_the_traceback(arguments, folder):
    """Before the command and behind it."""
    done = cli(*arguments, cwd=folder, script="edit.py")
    assert done.returncode == 1 and "Traceback" in done.stderr and "UserError" in done.stderr
    assert "Traceback" not in cli("some.pt", "interpolate", cwd=folder, script="edit.py").stderr


@pytest.mark.parametrize("arguments, words", [
    ("some.pt vary three.png --strenght 0.3", "unknown option --strenght"), ("some.pt interpolate --strength 0.3", "--strength"),
    ("some.pt vary", "picture"), ("some.pt", "COMMAND"), ("some.pt vary three.png --num_images x", "--num_images")])
def test_a_mistyped_command_line_is_one_line(arguments, words, capsys):
    """Status 2, no usage text of a screen."""
    assert edit.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("edit: ") and error.count("\n") == 1 and words in error
