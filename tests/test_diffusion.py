"""Chapter 3: q(x_t | x_0), the conversion of predictions, the loss."""

import pytest
import torch
from diffusers import DDPMScheduler

import diffuser
from diffuser import Diffusion, alpha_bar_table, configure

TABLE = alpha_bar_table(configure(timesteps=1000, beta_start=1e-4, beta_end=0.02))
REFERENCE = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)
REFERENCE.alphas_cumprod = TABLE               # its own float32 table is 1e-6 off, see test_schedules.py


def batch(n=64):
    random = torch.Generator().manual_seed(0)
    x0, eps = torch.rand(n, 3, 4, 6, generator=random) * 2 - 1, torch.randn(n, 3, 4, 6, generator=random)
    return x0, eps, torch.randint(1000, (n,), generator=random)


def test_q_sample_agrees_with_diffusers():
    """Noise is added as diffusers adds it, to 1e-6."""
    x0, eps, t = batch()
    assert (Diffusion(TABLE).q_sample(x0, t, eps) - REFERENCE.add_noise(x0, eps, t)).abs().max() < 1e-6


def test_q_sample_has_the_moments_of_the_closed_form():
    """Mean sqrt(alpha_bar) x0 and variance 1 - alpha_bar, over many draws."""
    diffusion, x0 = Diffusion(TABLE), torch.full((200_000, 1, 1, 1), 0.7)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    xt = diffusion.q_sample(x0, torch.full((len(x0),), 300), eps).double()
    assert xt.mean().item() == pytest.approx(0.7 * TABLE[300].sqrt().item(), abs=5e-3)
    assert xt.var().item() == pytest.approx(1 - TABLE[300].item(), abs=5e-3)


def test_v_target_agrees_with_diffusers():
    """v is diffusers' velocity, to 1e-6."""
    x0, eps, t = batch()
    diffusion = Diffusion(TABLE, "v")
    assert (diffusion.target(x0, eps, *diffusion.scales(t)) - REFERENCE.get_velocity(x0, eps, t)).abs().max() < 1e-6


@pytest.mark.parametrize("prediction", sorted(diffuser.PREDICTIONS))
def test_a_perfect_network_is_converted_to_the_truth(prediction):
    """From the right target, x0_hat and eps_hat are x0 and eps, for eps, v and x0 prediction."""
    x0, eps, t = batch()
    diffusion = Diffusion(TABLE, prediction)
    target = diffusion.target(x0, eps, *diffusion.scales(t))
    x0_hat, eps_hat = diffusion.estimates(target, diffusion.q_sample(x0, t, eps), t, clip=False)
    early = t < 900                                       # eps prediction divides by sqrt(alpha_bar), small at the end
    assert (x0_hat - x0)[early].abs().max() < 1e-4 and (eps_hat - eps)[t > 50].abs().max() < 1e-4


def test_clipping_keeps_the_estimates_consistent():
    """After clipping, sqrt(alpha_bar) x0_hat + sqrt(1 - alpha_bar) eps_hat is still x_t."""
    x0, eps, t = batch()
    diffusion = Diffusion(TABLE)
    xt = diffusion.q_sample(3 * x0, t, eps)
    x0_hat, eps_hat = diffusion.estimates(eps, xt, t, clip=True)
    assert x0_hat.abs().max() <= 1 and (diffusion.q_sample(x0_hat, t, eps_hat) - xt).abs().max() < 1e-4


@pytest.mark.parametrize("loss_fn, expected", [("mse", 4.0), ("mae", 2.0), ("huber", 1.5)])
def test_loss_per_sample(loss_fn, expected):
    """The loss is one number per sample: for an error of 2 everywhere 4, 2 and huber's 2 - 1/2."""
    x0, eps, t = batch(5)
    losses = Diffusion(TABLE, "eps", loss_fn).loss(lambda xt, t, y: eps + 2, x0, t, eps)
    assert losses.shape == (5,) and torch.allclose(losses, torch.full((5,), expected), atol=1e-5)


def test_loss_gives_the_network_what_it_needs():
    """The network sees x_t, t and y of its own sample."""
    x0, eps, t = batch(7)
    diffusion, y, seen = Diffusion(TABLE), torch.arange(7), {}
    diffusion.loss(lambda *inputs: seen.update(inputs=inputs) or eps, x0, t, eps, y)
    xt, ts, ys = seen["inputs"]
    assert torch.equal(xt, diffusion.q_sample(x0, t, eps)) and torch.equal(ts, t) and torch.equal(ys, y)
