"""Chapter 8 of diffuser.py: averaging, and the model that draws."""

import dataclasses
import math

import pytest
import torch
from conftest import tiny_unet

import diffuser
from diffuser import EMA, Diffusion, Model, Moments, alpha_bar_table, configure

T = 100
BETAS = dict(timesteps=T, beta_start=1e-3, beta_end=0.1)


def test_ema_follows_its_formula():
    """The average with warm-up: decay min(d, (1 + n) / (10 + n)) after n updates, the weights untouched."""
    network = tiny_unet()
    ema = EMA(network, decay=0.25)
    weight, average = network.conv_in.weight, network.conv_in.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            weight.add_(1.0)
        before = weight.detach().clone()
        ema.update(network, step)
        decay = min(0.25, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * before
        assert torch.equal(weight, before) and torch.allclose(ema.network.conv_in.weight, average, atol=1e-6)


def test_ema_starts_late_and_skips():
    """Up to ema_start the average is a copy; between updates it rests."""
    network = tiny_unet()
    ema = EMA(network, decay=0.9, every=2, start=4)
    for step in range(1, 8):
        with torch.no_grad():
            network.conv_in.weight.add_(1.0)
        before = ema.network.conv_in.weight.clone()
        ema.update(network, step)
        if step in (2, 4):
            assert torch.equal(ema.network.conv_in.weight, network.conv_in.weight)
        elif step % 2:
            assert torch.equal(ema.network.conv_in.weight, before)
    assert not torch.equal(ema.network.conv_in.weight, network.conv_in.weight)


def test_a_half_life_is_in_images():
    """--ema_halflife: after so many images half of what the average was is left (EDM), whatever batch and cadence."""
    network = tiny_unet()
    for size, every in ((8, 1), (16, 1), (8, 4)):
        ema = diffuser.build_ema(network, configure(ema_halflife=640.0, ema_update_rate=every), size)
        updates = 640 // (size * every)
        assert ema.decay**updates == pytest.approx(0.5) and ema.every == every
    assert diffuser.build_ema(network, configure(), 8).decay == 0.9999
    assert diffuser.build_ema(network, configure(ema_halflife=640.0, use_ema=False), 8).decay == 0.0


def model(**settings):
    cfg = configure(**{**BETAS, "schedule_type": "linear", "steps": 8, "sampler": "ddim", "device": "cpu", **settings})
    moments = Moments(torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 1, 8, 8).clone(), torch.full((4, 1, 8, 8), 0.1))
    return Model(tiny_unet(), Diffusion(alpha_bar_table(cfg)), moments, cfg, (1, 8, 8), ["a", "b", "c"])


@pytest.mark.parametrize("steps, evaluations", [(dict(sampler="dpmpp"), 25), (dict(sampler="heun", steps=10), 19),
                                                (dict(sampler="ddim"), 50), (dict(sampler="ddpm"), T)])
def test_network_evaluations(steps, evaluations):
    """Default steps of each sampler, and the network calls they cost."""
    m, calls = model(), []
    m.network.register_forward_hook(lambda *_: calls.append(1))
    cfg = dataclasses.replace(m.config, **{"steps": None, **steps})
    assert len(list(m.sample([0, 1], cfg))) == diffuser.sampling_steps(cfg) and len(calls) == evaluations


@pytest.mark.parametrize("settings", [dict(sequential=True), dict(sample_batch_size=3)])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_an_image_does_not_depend_on_its_batch(settings, sampler):
    """Image i is the same one at a time, in batches of three, and all at once, to one grey level."""
    base = dict(sampler=sampler, steps=8, guidance_scale=1.0)
    whole = model(**base).generate(["a", "b", "c"], 7)
    parts = model(**base, **settings).generate(["a", "b", "c"], 7)
    assert (whole.int() - parts.int()).abs().max() <= 1
    assert (whole[0].int() - whole[3].int()).abs().max() > 1                 # same class, another image


def test_more_images_leave_the_first_ones_alone():
    """Asking for more images adds images and changes none; another seed changes all."""
    few, many = model().generate(["a"], 2), model().generate(["a"], 5)
    assert (few.int() - many[:2].int()).abs().max() <= 1
    assert (model().generate(["a"], 2, seed=1).int() - few.int()).abs().max() > 1


def test_pairs_of_numbers_may_be_lists():
    """What configure takes as a list, as JSON has it, generate does, too."""
    drawn = [model().generate(["a"], 1, guidance_scale=1.0, guidance_interval=pair) for pair in ([0.3, 5.0], (0.3, 5.0))]
    assert torch.equal(*drawn)


def test_some_images_of_a_larger_draw():
    """Image i alone, number and class, is the one of the whole draw; an image of a seed is the first one of that seed."""
    m = model(sampler="ddpm")
    labels = m.labels([0, 1, 2], 7)
    whole = torch.cat(list(m.draw(labels, m.config)))
    part = torch.cat(list(m.draw(m.labels([0, 1, 2], 2, first=4), m.config, first=4)))
    assert m.labels([0, 1, 2], 2, first=4) == labels[4:6] and (part.int() - whole[4:6].int()).abs().max() <= 1

    seeds = [5, 2, 2**62]
    for size in (1, 2, 8):
        cfg = dataclasses.replace(m.config, sample_batch_size=size)
        drawn = torch.cat(list(m.draw([1, 1, 1], cfg, seeds=seeds)))
        for image, seed in zip(drawn, seeds):
            alone = torch.cat(list(m.draw([1], dataclasses.replace(cfg, seed=seed))))
            assert (image.int() - alone[0].int()).abs().max() <= 1


@pytest.mark.parametrize("asked, seeds", [("1,2,5-10", [1, 2, *range(5, 11)]), ("3 1,3", [3, 1]), ([7, 8], [7, 8]), ("0-0", [0])])
def test_seeds_are_numbers_and_ranges(asked, seeds):
    """As EDM's --seeds: in the order given, each once."""
    assert diffuser.parse_seeds(asked) == seeds


@pytest.mark.parametrize("asked, words", [
    ("", "none"), ("x", "not 'x'"), ("-3", "not '-3'"), ("5-2", "above its end"), ("0-99999999", "100,000"), ("1.5", "1.5"),
    (f"0-{2**63 - 1}", "at most"), ("0-99999,100000-199999", "at most"), (str(2**63), "between"), ("9" * 5000, "wants"), ("\u0663", "wants")])
def test_seeds_that_are_none(asked, words):
    """What is no list of seeds is refused in a line, however large its range."""
    with pytest.raises(diffuser.UserError, match=words):
        diffuser.parse_seeds(asked)


def test_start_gaussian_is_plain_noise():
    """--start gaussian begins with N(0, I); matched begins elsewhere where signal is left at T."""
    m = model(beta_end=0.01, beta_start=1e-4)
    seen = []
    m.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    for start in ("gaussian", "matched"):
        list(m.sample([0] * 4, dataclasses.replace(m.config, start=start, steps=1)))
    plain = diffuser.image_noise(m.config.seed, range(4), (1, 8, 8), "cpu")()
    assert torch.equal(seen[0], plain) and not torch.allclose(seen[1], plain, atol=0.1)


@pytest.mark.parametrize("asked, numbers", [("b, 2", [1, 2]), ("all", [0, 1, 2]), (["A", 1, "c"], [0, 1, 2])])
def test_classes_by_name_and_number(asked, numbers):
    """Classes are chosen by name or number, several at once, or all."""
    assert diffuser.parse_classes(asked, ["a", "b", "c"]) == numbers


@pytest.mark.parametrize("asked, words", [("dog", "unknown class dog: choose from 0 a"), ("", "no class is named"), ("3", "3"), ("c-a", "ends before"), ("a-x", "unknown class")])
def test_unknown_classes_are_refused_with_the_known_ones(asked, words):
    """A class that does not exist is an error that lists those that do."""
    with pytest.raises(diffuser.UserError, match=words):
        diffuser.parse_classes(asked, ["a", "b", "c"])


@pytest.mark.parametrize("asked, names, numbers", [
    ("3-5", list("0123456789"), [3, 4, 5]), ("3 5", list("0123456789"), [3, 5]), ("0-1, 7 9", list("0123456789"), [0, 1, 7, 9]),
    ("bird-deer", ["bird", "cat", "deer"], [0, 1, 2]), ("de", ["bird", "cat", "deer"], [2]),
    ("golden retriever, cat", ["cat", "golden retriever"], [1, 0]), ("cat dog", ["cat", "dog", "cat dog"], [2]),
    ("1", ["q", "all", "a, b"], [1]), ("2", ["q", "all", "a, b"], [2]), ("0", ["q", "all"], [0]), ("all", ["q", "all"], [0, 1]),
    ("t-shirt", ["t-shirt", "hat"], [0]), ("a", ["A", "a"], [1]), ("A a", ["A", "a"], [0, 1]), ("7", ["3", "5", "7"], [2]), ("3-7", ["3", "5", "7"], [0, 1, 2])])
def test_ranges_beginnings_and_odd_names_of_classes(asked, names, numbers):
    """Ranges, spaces and beginnings choose classes; what reads as something else is chosen by number."""
    assert diffuser.parse_classes(asked, names) == numbers


def test_a_beginning_of_several_classes_names_them():
    """An ambiguous beginning is refused with what it could be."""
    with pytest.raises(diffuser.UserError, match="could be dog, dolphin"):
        diffuser.parse_classes("do", ["cat", "dog", "dolphin"])


def test_a_thousand_classes_are_not_listed_whole():
    """A list of very many classes ends after the first."""
    assert len(diffuser.list_classes([f"class {i}" for i in range(1000)])) < 600


def test_denoising_strip_runs_from_noise_to_image(folder):
    """Rows are images, columns go from noise to the finished image."""
    m = model()
    diffuser.save_strip(m, [0, 1], dataclasses.replace(m.config, steps=T, plot_freq_interval=25), folder / "strip.png")
    from PIL import Image
    with Image.open(folder / "strip.png") as picture:
        columns, rows = picture.width // 64, picture.height // 64
    assert (columns, rows) == (5, 2)


@pytest.mark.parametrize("settings, headings", [
    (dict(steps=100, plot_freq_interval=25), ["t = 99", "t = 74", "t = 49", "t = 24", "t = 0"]),
    (dict(steps=5), ["t = 80", "t = 60", "t = 40", "t = 20", "t = 0"])])
def test_the_columns_of_a_strip_tell_the_timestep(tmp_path, monkeypatch, settings, headings):
    """What is left after each step, counted from 1 as in DDPM, so that the image is at 0."""
    m = model()
    told = []
    monkeypatch.setattr(diffuser, "save_grid", lambda images, path, names, columns: told.append((names, columns)))
    diffuser.save_strip(m, [0, 1], dataclasses.replace(m.config, **settings), tmp_path / "strip.png")
    assert told == [(headings, 5)]


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    """Out of memory while drawing: smaller batches, the same images; not even one fits: the error."""
    drawn = model()
    labels, cfg = drawn.labels([0, 1], 10), dataclasses.replace(drawn.config, steps=3, sample_batch_size=8)
    whole = torch.cat(list(drawn.draw(labels, cfg)))
    sizes, room, network = [], [3], drawn.network

    def small_memory(xt, *rest):
        sizes.append(len(xt))
        if len(xt) > room[0]:
            raise torch.OutOfMemoryError("no room")
        return network(xt, *rest)

    monkeypatch.setattr(drawn, "network", small_memory)
    parts = torch.cat(list(drawn.draw(labels, cfg)))
    assert (parts.int() - whole.int()).abs().max() <= 1 and sizes[:3] == [8, 4, 2]
    room[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        list(drawn.draw(labels, cfg))


def test_a_compiled_network_sees_one_shape_only(monkeypatch):
    """The last batch is filled up rather than compiled anew; what fills it is not among the images."""
    drawn = model()
    labels, cfg = drawn.labels([0, 1], 7), dataclasses.replace(drawn.config, steps=2, sample_batch_size=3)
    plain, sizes, network = torch.cat(list(drawn.draw(labels, cfg))), set(), drawn.network
    monkeypatch.setattr(drawn, "network", lambda xt, *rest: sizes.add(len(xt)) or network(xt, *rest))
    monkeypatch.setattr(drawn, "compute", diffuser.ComputeConfig(compiled=True))
    filled = torch.cat(list(drawn.draw(labels, cfg)))
    assert (filled.int() - plain.int()).abs().max() <= 1 and sizes == {3}


def test_the_batch_size_is_chosen(monkeypatch):
    """By default as many images as keep a CPU busy; --sample_batch_size and --sequential decide otherwise."""
    drawn = model()
    assert drawn.batch_size(drawn.config) == 2**17 // math.prod(drawn.shape[1:])
    assert drawn.batch_size(dataclasses.replace(drawn.config, sample_batch_size=7)) == 7
    assert drawn.batch_size(dataclasses.replace(drawn.config, sample_batch_size=7, sequential=True)) == 1
    assert diffuser.parse_value("sample_batch_size", "auto") is None and diffuser.parse_value("compile", "auto") is None
