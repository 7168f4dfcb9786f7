"""Chapter 5: samplers against diffusers and closed forms; guidance; the start; one image at a time."""

import math
from functools import lru_cache

import pytest
import torch
from conftest import tiny_unet
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

import diffuser
from diffuser import Diffusion, Moments, alpha_bar_table, configure, ddim, dpmpp, heun, make_denoiser

PREDICTIONS = [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
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


def trailing(T, n):
    return diffuser.SPACINGS["trailing"](torch.ones(T), n)


def ours(prediction, ts, sampler=ddim, table=TABLE, conversion=None, **options):
    network = tiny_unet()
    denoise = make_denoiser(network, Diffusion(table, prediction), torch.tensor([0, 1, 2, 0]), 3, **(conversion or {}))
    with torch.no_grad():
        return last(sampler(denoise, START, ts, table, noises(), **options))


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


@pytest.mark.parametrize("prediction, name", PREDICTIONS)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_sampling_agrees_with_diffusers(prediction, name, variance, monkeypatch):
    """A whole DDPM trajectory, clipped, small and large variance: within 1e-4 of diffusers'."""
    scheduler = DDPMScheduler(**THEIRS, prediction_type=name, variance_type=f"fixed_{variance}")
    draw = noises()
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: draw())
    reference = theirs(scheduler, list(range(T))[::-1])
    assert (ours(prediction, list(range(T))[::-1], eta=1.0, variance=variance) - reference).abs().max() < 1e-4


@pytest.mark.parametrize("prediction, name", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("spacing, theirs_spacing, steps", [("trailing", "trailing", 20), ("linear", "linspace", 34)])
def test_ddim_agrees_with_diffusers(prediction, name, eta, spacing, theirs_spacing, steps):
    """DDIM with eta, fewer steps and both spacings: within 1e-4 of diffusers' over the whole trajectory."""
    scheduler = DDIMScheduler(**THEIRS, prediction_type=name, timestep_spacing=theirs_spacing)
    if spacing == "linear":                    # diffusers' own grid of the previous timestep assumes equal steps
        ts = [99 - 3 * i for i in range(34)]
        scheduler.set_timesteps = lambda n: setattr(scheduler, "num_inference_steps", 33) or setattr(
            scheduler, "timesteps", torch.tensor(ts))
    else:
        ts = trailing(T, steps)
    assert diffuser.SPACINGS[spacing](TABLE, steps) == ts
    reference = theirs(scheduler, ts, dict(eta=eta, use_clipped_model_output=True))
    assert (ours(prediction, ts, eta=eta) - reference).abs().max() < 1e-4


@pytest.mark.parametrize("prediction, name", PREDICTIONS)
@pytest.mark.parametrize("steps", [5, 20, 33, 100])
@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_dpmpp_agrees_with_diffusers(prediction, name, steps, threshold):
    """DPM-Solver++(2M), plain and with dynamic thresholding: within 1e-4 of diffusers' over the whole trajectory."""
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=T, beta_start=1e-3, beta_end=0.1, prediction_type=name,
                                            timestep_spacing="trailing", final_sigmas_type="zero", solver_order=2,
                                            thresholding=threshold > 0, dynamic_thresholding_ratio=threshold or 0.5,
                                            sample_max_value=1e9)
    reference = theirs(scheduler, trailing(T, steps))
    conversion = dict(clip=False, dynamic_threshold=threshold)
    assert (ours(prediction, trailing(T, steps), dpmpp, conversion=conversion) - reference).abs().max() < 1e-4


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_samplers_agree_with_diffusers_without_terminal_signal(prediction):
    """Zero terminal SNR: DDIM and DPM-Solver++ start from pure noise and stay within 1e-4 of diffusers'."""
    table = alpha_bar_table(configure(**BETAS, zero_terminal_snr=True, prediction=prediction))
    settings = dict(num_train_timesteps=T, beta_start=1e-3, beta_end=0.1, rescale_betas_zero_snr=True,
                    prediction_type=dict(PREDICTIONS)[prediction], timestep_spacing="trailing")
    reference = theirs(DDIMScheduler(**settings, clip_sample=False), trailing(T, 10), dict(eta=0.0))
    assert (ours(prediction, trailing(T, 10), table=table, conversion=dict(clip=False)) - reference).abs().max() < 1e-4
    reference = theirs(DPMSolverMultistepScheduler(**settings, final_sigmas_type="zero"), trailing(T, 10))
    mine = ours(prediction, trailing(T, 10), dpmpp, table, dict(clip=False))
    assert (mine - reference).abs().max() < 2e-3                            # theirs keeps a signal of 2^-12 there
    assert ours(prediction, trailing(T, 10), heun, table).isfinite().all()


@pytest.mark.parametrize("prediction, name", PREDICTIONS[:2])
def test_heun_agrees_with_diffusers(prediction, name):
    """Heun's method: within 1e-4 of diffusers' scheduler, which works on x / sqrt(alpha_bar)."""
    scheduler = HeunDiscreteScheduler(num_train_timesteps=T, beta_start=1e-3, beta_end=0.1, prediction_type=name,
                                      timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    network, x = tiny_unet(), START / TABLE[-1].sqrt().float()
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = network(scheduler.scale_model_input(x, t), t.long().expand(4), torch.tensor([0, 1, 2, 0]))
            x = scheduler.step(out, t, x).prev_sample
    assert (ours(prediction, trailing(T, 10), heun, conversion=dict(clip=False)) - x).abs().max() < 1e-4


@pytest.mark.parametrize("steps", [10, 28])
def test_flow_matching_agrees_with_diffusers(steps):
    """DDIM along a flow is diffusers' Euler step; its grid from 1 to 1/T is `linear`: within 1e-3 over the trajectory."""
    table = alpha_bar_table(configure(timesteps=1000, schedule_type="flow"))
    scheduler, network, x = FlowMatchEulerDiscreteScheduler(1000), tiny_unet(), START
    scheduler.set_timesteps(steps)
    ts = diffuser.timestep_grid("linear", table, steps)
    assert (scheduler.timesteps - 1 - torch.tensor(ts)).abs().max() <= 0.51
    scheduler.set_timesteps(sigmas=[(t + 1) / 1000 for t in ts])     # whole timesteps, for the network
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = network(x, (t.round() - 1).long().expand(4), torch.tensor([0, 1, 2, 0]))
            x = scheduler.step(out, t, x).prev_sample
    assert (ours("flow", ts, ddim, table, dict(clip=False)) - x).abs().max() < 1e-3


def test_edm_agrees_with_diffusers():
    """DDIM on EDM's schedule and output is diffusers' EDM Euler sampler: within 1e-3 over the trajectory."""
    table = alpha_bar_table(configure(timesteps=18, schedule_type="edm"))
    scheduler, network = EDMEulerScheduler(), tiny_unet()
    scheduler.set_timesteps(18)
    x = START * (scheduler.sigmas[0] ** 2 + 1).sqrt()                # theirs is not scaled to unit variance
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            seen = scheduler.scale_model_input(x, t)
            out = network(seen, torch.full((4,), 17 - i), torch.tensor([0, 1, 2, 0]))
            x = scheduler.step(out, t, x).prev_sample
    assert (ours("edm", list(range(18))[::-1], ddim, table, dict(clip=False)) - x).abs().max() < 1e-3


# A mixture of two Gaussians in the plane, of which everything is known.
FINE = alpha_bar_table(configure(timesteps=8000, schedule_type="cosine"))
CENTRES, SPREAD, SHARES = torch.tensor([[-0.6, 0.3], [0.5, -0.2]]).double(), 0.15, torch.tensor([0.3, 0.7]).double()


def mixture_denoiser(table):
    """E[x0 | xt] by Bayes' rule, and the noise that goes with it; xt [N, 2]."""
    def denoise(x, t):
        a, s2 = table[t].sqrt(), 1 - table[t]
        var = a**2 * SPREAD**2 + s2
        apart = x[:, None] - a * CENTRES                                     # [N, 2 components, 2]
        share = (SHARES.log() - apart.square().sum(2) / (2 * var)).softmax(1)[..., None]
        x0_hat = (share * (CENTRES + a * SPREAD**2 / var * apart)).sum(1)
        return x0_hat, (x - a * x0_hat) / s2.sqrt()

    return denoise


@lru_cache
def end_of_the_flow(sampler, n, spacing):
    """Where n steps take 500 fixed points, of the deterministic flow of the mixture."""
    start = torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ts = diffuser.sampling_grid(configure(timesteps=8000, schedule_type="cosine", steps=n, spacing=spacing), FINE)
    return last(sampler(mixture_denoiser(FINE), start, ts, FINE, None))


@pytest.mark.parametrize("sampler, order, spacing", [
    *((ddim, 1, spacing) for spacing in sorted(diffuser.SPACINGS)), (dpmpp, 2, "trailing"), (dpmpp, 2, "logsnr"),
    (dpmpp, 2, "quadratic"), (heun, 2, "linear"), (heun, 2, "logsnr")])
def test_order_of_convergence(sampler, order, spacing):
    """On a Gaussian mixture, half the step leaves half the error for DDIM and a quarter for second-order samplers."""
    truth = end_of_the_flow(dpmpp, 4000, "trailing")
    errors = [(end_of_the_flow(sampler, n, spacing) - truth).norm(dim=1).median().item() for n in (25, 50, 100)]
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert sum(slopes) / 2 == pytest.approx(order, abs=0.35), (errors, slopes)


@pytest.mark.parametrize("sampler, options", [(ddim, {}), (ddim, dict(eta=1.0)), (ddim, dict(eta=1.0, variance="large")),
                                              (dpmpp, {}), (heun, {})])
def test_a_mixture_is_sampled_with_its_mean_and_covariance(sampler, options):
    """Every sampler draws from the mixture: shares, mean and covariance are its own."""
    random = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(20_000, 2, dtype=torch.float64, generator=random)

    table = alpha_bar_table(configure(timesteps=1000, schedule_type="cosine"))
    steps = 300 if options else 100
    x = last(sampler(mixture_denoiser(table), draw(), trailing(1000, steps), table, draw, **options))
    mean = SHARES @ CENTRES
    cov = SPREAD**2 * torch.eye(2) + (CENTRES - mean).T @ (SHARES[:, None] * (CENTRES - mean))
    assert (x.mean(0) - mean).abs().max() < 0.015
    assert (x.T.cov() - cov).abs().max() < 0.012
    assert (x[:, 0] < 0).double().mean().item() == pytest.approx(0.3, abs=0.015)


def test_ancestral_sampling_converges_in_distribution():
    """DDPM: the error of the variance of a Gaussian halves when the steps double."""
    def variance(n):
        random = torch.Generator().manual_seed(1)

        def draw():
            return torch.randn(200_000, dtype=torch.float64, generator=random)

        def denoise(x, t):
            a, s2 = FINE[t].sqrt(), 1 - FINE[t]
            x0_hat = a * 0.25 / (a**2 * 0.25 + s2) * x
            return x0_hat, (x - a * x0_hat) / s2.sqrt()

        return last(ddim(denoise, draw(), trailing(8000, n), FINE, draw, eta=1.0)).var().item()

    errors = [abs(variance(n) - 0.25) for n in (20, 40, 80)]
    assert 0.6 < math.log2(errors[0] / errors[1]) < 1.4 and 0.6 < math.log2(errors[1] / errors[2]) < 1.4, errors


def test_the_mean_is_ddpms_equation_7():
    """One ancestral step without noise is the posterior mean of DDPM eq. 7."""
    x0, eps, t = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), -1.2), 40
    ab, ab_prev, beta = TABLE[t], TABLE[t - 1], 1 - TABLE[t] / TABLE[t - 1]
    xt = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    mean = (ab_prev.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - ab_prev) * xt) / (1 - ab)
    _, x, _ = next(ddim(lambda x, t: (x0, eps), xt, [t, t - 1], TABLE, lambda: torch.zeros(1), eta=1.0))
    assert abs(x - mean).item() < 1e-6


@pytest.mark.parametrize("options, factor", [(dict(noise_scale=0.5), 0.5), (dict(use_noise_scaling=True), 40 / T),
                                             (dict(noise_scale=2.0, use_noise_scaling=True), 80 / T)])
def test_noise_scaling(options, factor):
    """--noise_scale multiplies the injected noise, --use_noise_scaling also by t / T."""
    def step(noise, **o):
        zero = torch.zeros(1, 1, 1, 1)
        return next(ddim(lambda x, t: (zero, zero), zero, [40, 39], TABLE, lambda: torch.full_like(zero, noise), eta=1.0, **o))[1]

    assert step(1.0, **options).item() == pytest.approx(factor * step(1.0).item(), rel=1e-5)


@pytest.mark.parametrize("spacing", sorted(diffuser.SPACINGS))
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 99, 100])
def test_grids_descend_from_the_last_timestep(spacing, steps):
    """Every grid has as many steps as asked for, distinct, descending, from T-1 where the start belongs; but leading,
    which ends at 0 instead."""
    for settings in (BETAS, dict(timesteps=T, schedule_type="cosine"), dict(**BETAS, zero_terminal_snr=True, prediction="v")):
        cfg = configure(spacing=spacing, steps=steps, **settings)
        grid = diffuser.sampling_grid(cfg, alpha_bar_table(cfg))
        first = (steps - 1) * (T // steps) if spacing == "leading" else T - 1
        assert len(grid) == steps and grid[0] == first and grid[-1] >= 0
        assert all(a > b for a, b in zip(grid, grid[1:]))


def test_spacings_are_what_their_names_say():
    """quadratic: roots of t equally spaced; logsnr: log-SNR equally spaced; both to the rounding of t."""
    grid = diffuser.sampling_grid(configure(timesteps=8000, spacing="quadratic", steps=20), FINE)
    roots = torch.tensor(grid).double().sqrt()
    assert (roots.diff().diff().abs() < 0.1).all()
    grid = diffuser.sampling_grid(configure(timesteps=8000, spacing="logsnr", steps=20), FINE)
    log_snr = (FINE / (1 - FINE)).log()[grid]
    assert log_snr.diff()[2:].std() < 0.05 * log_snr.diff()[2:].mean()


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


def test_guidance_acts_within_its_interval():
    """Inside the interval of noise levels the output is guided; outside it is plain, from one undoubled call."""
    network, y, calls = tiny_unet(), torch.tensor([0, 1, 2, 0]), []

    def counted(*inputs):
        calls.append(len(inputs[0]))
        return network(*inputs)

    sigma = ((1 - TABLE) / TABLE).sqrt()
    interval = (sigma[30].item(), sigma[60].item())
    with torch.no_grad():
        limited = make_denoiser(counted, Diffusion(TABLE), y, 3, 2.0, interval)
        always, never = (make_denoiser(network, Diffusion(TABLE), y, 3, w) for w in (2.0, 0.0))
        for t, same in ((20, never), (29, never), (30, always), (60, always), (61, never)):
            assert torch.equal(limited(START, t)[1], same(START, t)[1])
    assert calls == [4, 4, 8, 8, 4]


def test_autoguidance_is_the_documented_combination():
    """(1 + w) of the model's output - w of the guide's, both for the label."""
    network, guide, y = tiny_unet(), tiny_unet(emb_dim=4), torch.tensor([0, 1, 2, 0])
    ts = torch.full((4,), 50)
    with torch.no_grad():
        _, eps_hat = make_denoiser(network, Diffusion(TABLE), y, 3, 1.5, guide=guide, clip=False)(START, 50)
        expected = 2.5 * network(START, ts, y) - 1.5 * guide(START, ts, y)
    assert (eps_hat - expected).abs().max() < 1e-4


def test_matched_start_has_the_moments_of_q_xT():
    """x_T is drawn with mean sqrt(ab) m and variance ab v + 1 - ab, per class and over all."""
    moments = Moments(torch.tensor([0.5, -0.2]).view(2, 1, 1, 1), torch.tensor([0.3, 0.6]).view(2, 1, 1, 1))
    noise = torch.randn(100_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    for row, (mean, var) in enumerate(((0.5, 0.3), (-0.2, 0.6))):
        x = moments.sample_prior(noise, torch.full((100_000,), row), 0.3)
        assert x.mean().item() == pytest.approx(math.sqrt(0.3) * mean, abs=0.01)
        assert x.var().item() == pytest.approx(0.3 * var + 0.7, abs=0.01)
