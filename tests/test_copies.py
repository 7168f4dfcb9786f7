"""diffuser_lib/copies.py, through evaluate.py --copies too: the nearest training images, mirrored ones, the page."""

import base64
import io
import json
import re

import pytest
import torch
from conftest import cli
from PIL import Image

from diffuser_lib import copies
from diffuser_lib.images import to_pil


def pictures(n, seed, side=16):
    """Smooth colour pictures, all different: uint8 [n, 3, side, side]."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear").to(torch.uint8)


def nearest_to(drawn, training, **options):
    vectors = copies.pixel_vectors
    return copies.nearest(vectors(drawn), vectors(drawn.flip(-1)), vectors(training), **options)


def test_distances_are_root_mean_squares_in_grey_levels():
    """By brute force over all pairs, and both ways round."""
    drawn, training = pictures(7, 0), pictures(1200, 1)
    found = nearest_to(drawn, training)
    for i, image in enumerate(drawn):
        both = [(image.flip(-1) if mirror else image).float() - training.float() for mirror in (False, True)]
        rms = torch.stack([d.square().mean((1, 2, 3)).sqrt() for d in both])
        assert found.distance[i].item() == pytest.approx(rms.min().item(), rel=1e-3)
        assert found.index[i] == rms.min(0).values.argmin() and found.mirrored[i] == (rms[1].min() < rms[0].min())


def test_copies_are_told_from_new_pictures():
    """Copies, mirrored and a little brighter ones included, lie below the limit; new pictures hardly ever do."""
    training, others = pictures(900, 1), pictures(700, 2)
    copied = torch.cat([training[:20], training[20:40].flip(-1), (training[40:60].float() + 3).clamp(max=255).to(torch.uint8)])
    drawn = torch.cat([copied, pictures(200, 3)])
    compared = copies.compare("pixels", nearest_to(drawn, training), nearest_to(others, training))
    suspicious = compared.suspicious()
    assert suspicious[:60].all() and suspicious[60:].double().mean() < 0.05
    assert compared.drawn.index[:60].tolist() == list(range(60)) and compared.drawn.mirrored[20:40].all()
    assert 0 < (compared.real.distance < compared.limit).double().mean() <= 0.02
    assert compared.figures()["nearer by pixels than 99% of real images"] == suspicious.double().mean().item()


def test_an_image_is_not_its_own_neighbour_and_doubles_do_not_count():
    """Where real images are taken from the training set they pass themselves over; the same picture twice is left out."""
    training = pictures(600, 1)
    training[5] = training[17]
    itself = torch.arange(600)
    found = nearest_to(training, training, itself=itself)
    assert not (found.index == itself).any() and found.index[5] == 17
    compared = copies.compare("pixels", nearest_to(training[:9], training), found)
    assert compared.doubles == 2 and compared.limit > 1 and compared.suspicious().all()


def test_large_pictures_are_compared_at_64_pixels():
    """So that memory stays small; the distance of flat pictures is the difference of their levels."""
    black, grey = torch.zeros(1, 3, 200, 100, dtype=torch.uint8), torch.full((1, 3, 200, 100), 50, dtype=torch.uint8)
    assert copies.pixel_vectors(black).shape == (1, 3 * 64 * 32)
    assert nearest_to(grey, black).distance.item() == pytest.approx(50, rel=1e-4)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_page_shows_the_nearest_pairs_first(folder, held_out):
    """evaluate.py --copies on folders without classes: a copied picture leads, names cannot break the page, the page asks
    for nothing from outside; figures are in the JSON too."""
    for name, images in (("real", pictures(150, 1)), ("other", pictures(40, 2)), ("drawn", pictures(30, 3))):
        (folder / name).mkdir()
        for i, image in enumerate(images):
            to_pil(image).save(folder / name / f"{i:03}.png")
    to_pil(pictures(150, 1)[77].flip(-1)).save(folder / "drawn" / "a<script>&.png")
    flags = ("--test", "other") if held_out else ()
    done = cli("drawn", "--against", "real", "--copies", "--json", "f.json", *flags, script="evaluate.py", cwd=folder)
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "f.json").read_text())
    assert figures["images"] == 31 and 1 / 31 <= figures["nearer by pixels than 99% of real images"] < 0.2
    assert 1 / 31 <= figures["nearer by features than 99% of real images"] < 0.3
    assert "the nearest pairs are in copies.html" in done.stdout and not (folder / "data").exists()

    page = (folder / "copies.html").read_text()
    assert "<script" not in page and "a&lt;script&gt;&amp;.png" in page and "http:" not in page and "https:" not in page
    captions = re.findall(r"<figcaption.*?>(.*?)</figcaption>", page)
    assert captions[0] == "a&lt;script&gt;&amp;.png" and len(captions) == 3 * 31
    assert re.fullmatch("by pixels: [0-9.e-]+, mirrored", captions[1]) and re.fullmatch("by features: [0-9.e-]+, mirrored", captions[2])
    sources = re.findall(r'src="data:image/png;base64,(.*?)"', page)[:3]
    drawn, by_pixels, by_features = (Image.open(io.BytesIO(base64.b64decode(source))).tobytes() for source in sources)
    assert drawn == by_pixels == by_features                     # shown the way round that it was found


@pytest.mark.parametrize("flags, words", [
    (("--copies", "d/0.png/x.html"), "--copies"),
    (("--copies", "--test", "nowhere"), "nowhere is no folder or file with images in it")])
def test_what_cannot_be_is_one_line(folder, flags, words):
    """A page that cannot be written, a test part that is not there."""
    (folder / "d").mkdir()
    for i, image in enumerate(pictures(15, 0)):
        to_pil(image).save(folder / "d" / f"{i}.png")
    done = cli("d", "--against", "d", *flags, script="evaluate.py", cwd=folder)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
