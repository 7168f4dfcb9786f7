"""Chapter 2: noise schedules against closed forms and diffusers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler

import diffuser
from diffuser import alpha_bar_table, configure


@pytest.mark.parametrize("T", [10, 500, 1000])
@pytest.mark.parametrize("ours, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules_agree_with_diffusers(ours, theirs, T):
    """linear and cosine are the schedules of the field: alpha_bar within 1e-6 of diffusers'."""
    cfg = configure(timesteps=T, schedule_type=ours, beta_start=1e-4, beta_end=0.02)
    reference = DDPMScheduler(num_train_timesteps=T, beta_schedule=theirs, beta_start=1e-4, beta_end=0.02)
    assert (alpha_bar_table(cfg) - reference.alphas_cumprod.double()).abs().max() < 1e-6


def test_dns_closed_form():
    """dns: beta_t = (1 - w_t)(high - low) + low with w_t = 1 - ((t + 5) / (T + 6))^2."""
    T, low, high = 100, 1e-4, 0.02
    expected = [(((t + 5) / (T + 6)) ** 2) * (high - low) + low for t in range(T)]
    np.testing.assert_allclose(diffuser.dns_beta(T, low, high, 0.0).numpy(), expected, rtol=1e-12)


def test_sigmoid_closed_form():
    """sigmoid: alpha_bar(u) = (sig(3) - sig(6u - 3)) / (sig(3) - sig(-3)), the curve of Jabri et al."""
    T = 50
    def sig(x):
        return 1 / (1 + math.exp(-x))
    curve = [(sig(3) - sig(6 * (t + 1) / T - 3)) / (sig(3) - sig(-3)) for t in range(T - 1)]
    ours = torch.cumprod(1 - diffuser.sigmoid_beta(T, 0, 0, 0), 0)[:-1]      # the last beta is capped
    np.testing.assert_allclose(ours.numpy(), curve, rtol=1e-10)


def test_cosine_closed_form():
    """cosine: alpha_bar is f(t)/f(0) with f(t) = cos^2((t/T + s) / (1 + s) pi/2), the last beta capped."""
    T, s = 40, 0.01
    def f(u):
        return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    ours = torch.cumprod(1 - diffuser.cosine_beta(T, 0, 0, s), 0)
    np.testing.assert_allclose(ours[:-1].numpy(), [f((t + 1) / T) / f(0) for t in range(T - 1)], rtol=1e-10)


def test_flow_closed_form():
    """flow: noise over signal is u / (1 - u) at u = 1/T, 2/T, ...; at the last, where no signal is left, it is capped."""
    T = 40
    table = alpha_bar_table(configure(timesteps=T, schedule_type="flow"))
    expected = [(t + 1) / (T - t - 1) for t in range(T - 1)]
    np.testing.assert_allclose((1 / table - 1).sqrt()[:-1].numpy(), expected, rtol=1e-10)
    assert 0 < table[-1] < 1e-6


@pytest.mark.parametrize("n", [5, 18])
def test_edms_noise_levels_are_those_of_diffusers(n):
    """Equal steps of the seventh root from 0.002 to 80."""
    reference = EDMEulerScheduler()
    reference.set_timesteps(n)
    ours = (1 / alpha_bar_table(configure(timesteps=n, schedule_type="edm")) - 1).sqrt().flip(0)
    assert torch.allclose(ours, reference.sigmas[:-1].double(), rtol=1e-4)


@pytest.mark.parametrize("name", sorted(diffuser.SCHEDULES))
def test_every_schedule_is_a_falling_curve_in_float64(name):
    """alpha_bar is float64, strictly falling and inside (0, 1) for every schedule."""
    table = alpha_bar_table(configure(timesteps=333, schedule_type=name))
    assert table.dtype == torch.float64 and table.shape == (333,)
    assert (table.diff() < 0).all() and 0 < table[-1] < table[0] < 1


def test_scale_betas_keeps_the_total_noise():
    """--scale_betas multiplies both ends by 1000/T."""
    short = alpha_bar_table(configure(timesteps=500, scale_betas=True))
    assert torch.allclose(short, alpha_bar_table(configure(timesteps=500, beta_start=2e-4, beta_end=0.04)))


def test_scale_betas_that_leaves_the_range_is_refused():
    """Betas of 1 and more are refused with the reason, not turned into NaN."""
    with pytest.raises(diffuser.UserError, match="scale_betas"):
        alpha_bar_table(configure(timesteps=10, scale_betas=True))


def test_terminal_signal_of_the_recommended_schedules():
    """The recommended MNIST and CIFAR-10 schedules keep 0.29 and 0.22 of the signal at T."""
    for dataset, expected in (("mnist", 0.29), ("cifar10", 0.22)):
        assert alpha_bar_table(configure(dataset=dataset))[-1].sqrt().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_zero_terminal_snr_agrees_with_diffusers(schedule):
    """The rescaled schedule is diffusers' rescale_zero_terminal_snr, ends at 0 and begins as it did."""
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
    plain = alpha_bar_table(configure(timesteps=1000, schedule_type=schedule))
    ours = alpha_bar_table(configure(timesteps=1000, schedule_type=schedule, zero_terminal_snr=True, prediction="v"))
    beta = 1 - plain / torch.cat([torch.ones(1).double(), plain[:-1]])
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(beta), 0)
    assert (ours - theirs).abs().max() < 1e-6 and ours[-1] == 0 and abs(ours[0] - plain[0]) < 1e-12
