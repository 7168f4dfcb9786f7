"""Chapter 5: samplers against diffusers and closed forms; guidance; the start; one image at a time."""

import dataclasses
import math

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDIMScheduler, DDPMScheduler

import diffuser
from diffuser import Diffusion, Model, Moments, alpha_bar_table, configure, ddim, make_denoiser

T = 100
BETAS = dict(timesteps=T, beta_start=1e-3, beta_end=0.1)
TABLE = alpha_bar_table(configure(**BETAS))
THEIRS = dict(num_train_timesteps=T, beta_start=1e-3, beta_end=0.1, clip_sample=True)
START = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def noises(seed=6):
    random = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(START.shape, generator=random)


def last(trajectory):
    return list(trajectory)[-1][1]


def ours(prediction, ts, **options):
    network = tiny_unet()
    denoise = make_denoiser(network, Diffusion(TABLE, prediction), torch.tensor([0, 1, 2, 0]), 3)
    with torch.no_grad():
        return last(ddim(denoise, START, ts, TABLE, noises(), **options))


def theirs(scheduler, ts, step_options=None, seed=6):
    network, x, draw = tiny_unet(), START, noises(seed)
    scheduler.set_timesteps(len(ts))
    assert scheduler.timesteps.tolist() == ts
    with torch.no_grad():
        for t in ts:
            out = network(x, torch.full((4,), t), torch.tensor([0, 1, 2, 0]))
            noise = {} if step_options is None else {"variance_noise": draw(), **step_options}
            x = scheduler.step(out, t, x, **noise).prev_sample
    return x


@pytest.mark.parametrize("prediction, name", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_sampling_agrees_with_diffusers(prediction, name, variance, monkeypatch):
    """A whole DDPM trajectory, clipped, small and large variance: within 1e-4 of diffusers'."""
    scheduler = DDPMScheduler(**THEIRS, prediction_type=name, variance_type=f"fixed_{variance}")
    draw = noises()
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: draw())
    reference = theirs(scheduler, list(range(T))[::-1])
    assert (ours(prediction, list(range(T))[::-1], eta=1.0, variance=variance) - reference).abs().max() < 1e-4


@pytest.mark.parametrize("prediction, name", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("spacing, theirs_spacing, steps", [("trailing", "trailing", 20), ("linear", "linspace", 17)])
def test_ddim_agrees_with_diffusers(prediction, name, eta, spacing, theirs_spacing, steps):
    """DDIM with eta, fewer steps and both spacings: within 1e-4 of diffusers' over the whole trajectory."""
    scheduler = DDIMScheduler(**THEIRS, prediction_type=name, timestep_spacing=theirs_spacing)
    if spacing == "linear":                    # diffusers' own grid of the previous timestep assumes equal steps
        steps = 34
        ts = [99 - 3 * i for i in range(34)]
        scheduler.set_timesteps = lambda n: setattr(scheduler, "num_inference_steps", 33) or setattr(
            scheduler, "timesteps", torch.tensor(ts))
    else:
        ts = diffuser.SPACINGS[spacing](T, steps)
    assert diffuser.SPACINGS[spacing](T, steps) == ts
    reference = theirs(scheduler, ts, dict(eta=eta, use_clipped_model_output=True))
    assert (ours(prediction, ts, eta=eta) - reference).abs().max() < 1e-4


def test_the_mean_is_ddpms_equation_7():
    """One ancestral step without noise is the posterior mean of DDPM eq. 7."""
    x0, eps, t = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), -1.2), 40
    ab, ab_prev, beta = TABLE[t], TABLE[t - 1], 1 - TABLE[t] / TABLE[t - 1]
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    mean = (ab_prev.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - ab_prev) * xt) / (1 - ab)
    _, x, _ = next(ddim(lambda x, t: (x0, eps), xt, [t, t - 1], TABLE, lambda: torch.zeros(1), eta=1.0))
    assert abs(x - mean).item() < 1e-6


@pytest.mark.parametrize("options, factor", [(dict(noise_scale=0.5), 0.5), (dict(fade=True), 40 / T),
                                             (dict(noise_scale=2.0, fade=True), 80 / T)])
def test_noise_scaling(options, factor):
    """--noise_scale multiplies the injected noise, --use_noise_scaling also by t / T."""
    def step(noise, **o):
        zero = torch.zeros(1, 1, 1, 1)
        return next(ddim(lambda x, t: (zero, zero), zero, [40, 39], TABLE, lambda: torch.full_like(zero, noise), eta=1.0, **o))[1]

    assert step(1.0, **options).item() == pytest.approx(factor * step(1.0).item(), rel=1e-5)


@pytest.mark.parametrize("eta, variance, steps", [(0.0, "small", 500), (1.0, "small", 1000), (1.0, "large", 1000), (0.5, "small", 500)])
def test_a_gaussian_is_sampled_with_its_mean_and_variance(eta, variance, steps):
    """With the exact denoiser of N(0.4, 0.3^2), samples have that mean and standard deviation."""
    mean, var, table = 0.4, 0.09, alpha_bar_table(configure(timesteps=1000))
    random = torch.Generator().manual_seed(0)

    def denoise(x, t):
        a, s2 = table[t].sqrt(), 1 - table[t]
        x0_hat = mean + a * var / (a**2 * var + s2) * (x - a * mean)
        return x0_hat, (x - a * x0_hat) / s2.sqrt()

    def draw():
        return torch.randn(20_000, dtype=torch.float64, generator=random)

    x = last(ddim(denoise, draw(), diffuser.SPACINGS["trailing"](1000, steps), table, draw, eta=eta, variance=variance))
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    assert x.std().item() == pytest.approx(math.sqrt(var), rel=0.03)


@pytest.mark.parametrize("spacing", sorted(diffuser.SPACINGS))
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 99, 100])
def test_grids_descend_from_the_last_timestep(spacing, steps):
    """Every grid has as many steps as asked for, distinct, descending, from T-1 where the start belongs."""
    grid = diffuser.SPACINGS[spacing](T, steps)
    assert len(grid) == steps and grid[0] == T - 1 and grid[-1] >= 0
    assert all(a > b for a, b in zip(grid, grid[1:]))


def test_guidance_is_the_documented_combination_in_one_call():
    """(1 + w) eps_cond - w eps_uncond, from one network call on a doubled batch."""
    network, y, calls = tiny_unet(), torch.tensor([0, 1, 2, 0]), []

    def counted(*inputs):
        calls.append(len(inputs[0]))
        return network(*inputs)

    diffusion, ts = Diffusion(TABLE), torch.full((4,), 50)
    with torch.no_grad():
        _, eps_hat = make_denoiser(counted, diffusion, y, 3, guidance_scale=2.0, clip=False)(START, 50)
        expected = 3 * network(START, ts, y) - 2 * network(START, ts, None)
    assert calls == [8] and (eps_hat - expected).abs().max() < 1e-4


def model(**settings):
    cfg = configure(**{**BETAS, "schedule_type": "linear", "steps": 8, "sampler": "ddim", "device": "cpu", **settings})
    moments = Moments(torch.linspace(-1, 1, 4).view(4, 1, 1, 1).expand(4, 1, 8, 8).clone(), torch.full((4, 1, 8, 8), 0.1))
    return Model(tiny_unet(), Diffusion(alpha_bar_table(cfg)), moments, cfg, (1, 8, 8), ["a", "b", "c"])


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


def test_matched_start_has_the_moments_of_q_xT():
    """x_T is drawn with mean sqrt(ab) m and variance ab v + 1 - ab, per class and over all."""
    moments = Moments(torch.tensor([0.5, -0.2]).view(2, 1, 1, 1), torch.tensor([0.3, 0.6]).view(2, 1, 1, 1))
    noise = torch.randn(100_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    for row, (mean, var) in enumerate(((0.5, 0.3), (-0.2, 0.6))):
        x = moments.start(noise, torch.full((100_000,), row), 0.3)
        assert x.mean().item() == pytest.approx(math.sqrt(0.3) * mean, abs=0.01)
        assert x.var().item() == pytest.approx(0.3 * var + 0.7, abs=0.01)


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


@pytest.mark.parametrize("asked, words", [("dog", "unknown class dog: choose from 0 a"), ("", "none"), ("3", "3")])
def test_unknown_classes_are_refused_with_the_known_ones(asked, words):
    """A class that does not exist is an error that lists those that do."""
    with pytest.raises(diffuser.UserError, match=words):
        diffuser.parse_classes(asked, ["a", "b", "c"])


def test_denoising_strip_runs_from_noise_to_image(folder):
    """Rows are images, columns go from noise to the finished image."""
    m = model()
    diffuser.save_strip(m, [0, 1], dataclasses.replace(m.config, steps=T, plot_freq_interval=25), folder / "strip.png")
    from PIL import Image
    with Image.open(folder / "strip.png") as picture:
        columns, rows = picture.width // 64, picture.height // 64
    assert (columns, rows) == (5, 2)
