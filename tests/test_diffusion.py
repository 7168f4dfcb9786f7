"""Chapter 3: q(x_t | x_0), the conversion of predictions, the loss."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

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
    assert (diffusion.prediction.target(x0, eps, *diffusion.scales(t)) - REFERENCE.get_velocity(x0, eps, t)).abs().max() < 1e-6


def test_flow_matching_is_that_of_diffusers():
    """Target, and what the network sees of x_t: noise less image, and diffusers' own noisy image at its u = (t + 1) / T."""
    x0, eps, t = batch()
    diffusion = Diffusion(alpha_bar_table(configure(schedule_type="flow")), "flow")
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    theirs = scheduler.scale_noise(x0, (t + 1).float(), eps)
    seen = diffusion.network_input(diffusion.q_sample(x0, t, eps), t)
    assert (seen - theirs).abs().max() < 1e-4
    assert torch.equal(diffusion.prediction.target(x0, eps, *diffusion.scales(t)), eps - x0)


def test_edm_is_that_of_diffusers():
    """Input and output are scaled as diffusers' EDM scheduler does it, at noise levels from 0.002 to 80."""
    x0, eps, t = batch()
    table = alpha_bar_table(configure(schedule_type="edm"))
    diffusion, scheduler = Diffusion(table, "edm"), EDMEulerScheduler(num_train_timesteps=1000)
    a, s = diffusion.scales(t)
    sigma = s / a
    assert sigma.min() >= 0.0019 and sigma.max() <= 80.1 and (1 / table[0] - 1).sqrt().item() == pytest.approx(0.002)
    assert (1 / table[-1] - 1).sqrt().item() == pytest.approx(80)

    xt, out = diffusion.q_sample(x0, t, eps), torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    theirs = scheduler.precondition_inputs(xt / a, sigma)            # they add noise without scaling the image
    assert (diffusion.network_input(xt, t) - theirs).abs().max() < 1e-5
    x0_hat, _ = diffusion.estimates(out, xt, t, clip=False)
    assert (x0_hat - scheduler.precondition_outputs(xt / a, out, sigma)).abs().max() < 1e-4


def test_edms_loss_is_weighted_as_in_the_paper():
    """The squared error of the output is that of x0_hat times (sigma^2 + sd^2) / (sigma sd)^2 (2206.00364, table 1)."""
    x0, eps, t = batch()
    diffusion = Diffusion(alpha_bar_table(configure(schedule_type="edm")), "edm")
    a, s = diffusion.scales(t)
    p, q = diffusion.prediction.coefficients(a, s)
    sigma = (s / a).double()
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    slope = (p - q * a / s).double()                                 # of the output by x0_hat, x_t held
    assert torch.allclose(slope**2, weight, rtol=1e-4)


@pytest.mark.parametrize("prediction", sorted(diffuser.PREDICTIONS))
def test_a_perfect_network_is_converted_to_the_truth(prediction):
    """From the right target, x0_hat and eps_hat are x0 and eps, whatever is predicted."""
    x0, eps, t = batch()
    diffusion = Diffusion(TABLE, prediction)
    target = diffusion.prediction.target(x0, eps, *diffusion.scales(t))
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


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_one_weighting_of_x0_whatever_the_network_predicts(gamma, zero):
    """An error of x0 costs min(snr, gamma) times its square, whatever is predicted; also where no signal is left."""
    table = alpha_bar_table(configure(timesteps=1000, zero_terminal_snr=zero, prediction="v"))
    x0, eps, _ = batch(8)
    t = torch.tensor([0, 20, 100, 200, 400, 600, 800, 999])
    for name in ("v", "x0", "flow", "edm", "eps")[: 4 if zero else 5]:
        diffusion, wrong = Diffusion(table, name, min_snr_gamma=gamma), x0 + 0.5
        a, s = diffusion.scales(t)
        xt = diffusion.q_sample(x0, t, eps)
        output = diffusion.prediction.target(wrong, (xt - a * wrong) / s, a, s)
        losses = diffusion.loss(lambda *inputs: output, x0, t, eps)
        snr = table[t] / (1 - table[t])
        assert torch.allclose(losses.double(), 0.25 * snr.clamp(max=gamma), rtol=2e-3, atol=1e-9), name


def test_input_perturbation_changes_what_the_network_sees_and_not_its_target():
    """The network sees x_t with the perturbed noise; the loss still asks for the noise itself."""
    x0, eps, t = batch(5)
    noise = eps + 0.1 * torch.randn_like(eps)
    diffusion, seen = Diffusion(TABLE), []
    losses = diffusion.loss(lambda xt, *rest: seen.append(xt) or eps, x0, t, eps, noise=noise)
    assert torch.equal(seen[0], diffusion.q_sample(x0, t, noise)) and losses.abs().max() == 0


def sampled(n=200_000, **settings):
    cfg = configure(timesteps=2000, schedule_type="cosine", **settings)
    diffusion = diffuser.build_diffusion(cfg, "cpu")
    return diffusion, diffusion.timesteps(torch.rand(n, generator=torch.Generator().manual_seed(0)))


def test_detail_weighs_more_and_the_loss_keeps_its_size():
    """--detail_weight 4: an error at an SNR of 1 costs five times one at pure noise, above an SNR of 100 no more than
    there; over the timesteps as they are trained the mean weight is 1."""
    settings = dict(prediction="x0", time_sampling="logit_normal", time_mean=1.0)
    diffusion, t = sampled(detail_weight=4.0, **settings)
    snr = diffusion.alpha_bar / (1 - diffusion.alpha_bar)
    share = diffusion.weight.double() / (1 + 4 * snr.sqrt())
    assert torch.allclose(share[snr < 100], share[-1], rtol=1e-5)
    assert torch.allclose(diffusion.weight[snr > 100].double(), 41 * share[-1], rtol=1e-5)
    assert diffusion.weight[t].mean() == pytest.approx(1, rel=0.01)

    x0, eps, _ = batch(8)
    some = torch.tensor([0, 20, 100, 500, 1000, 1500, 1900, 1999])
    plain, _ = sampled(n=1, **settings)
    losses, unweighted = (each.loss(lambda *_: x0 + 0.5, x0, some, eps) for each in (diffusion, plain))
    assert torch.allclose(losses, unweighted * diffusion.weight[some])


def test_uniform_time_sampling():
    """Every timestep is as likely as any other, the first and the last included."""
    diffusion, t = sampled()
    assert t.min() == 0 and t.max() == 1999 and t.double().mean().item() == pytest.approx(999.5, abs=5)
    assert torch.equal(diffusion.timesteps((torch.arange(2000) + 0.5) / 2000), torch.arange(2000))


@pytest.mark.parametrize("mean, scale", [(0.0, None), (-0.8, 0.7)])
def test_logit_normal_time_sampling(mean, scale):
    """The log-odds of t/T are normal with the mean and deviation asked for."""
    _, t = sampled(time_sampling="logit_normal", time_mean=mean, time_scale=scale)
    odds = torch.logit((t.double() + 0.5) / 2000)
    assert odds.mean().item() == pytest.approx(mean, abs=0.02) and odds.std().item() == pytest.approx(scale or 1, abs=0.02)


@pytest.mark.parametrize("mean, scale", [(0.0, None), (1.0, 0.8)])
def test_laplace_time_sampling(mean, scale):
    """The log-SNR of the timesteps is Laplace distributed with the centre and scale asked for."""
    diffusion, t = sampled(time_sampling="laplace", time_mean=mean, time_scale=scale)
    log_snr = (diffusion.alpha_bar / (1 - diffusion.alpha_bar)).log()[t]
    assert log_snr.median().item() == pytest.approx(mean, abs=0.03)
    assert (log_snr - mean).abs().mean().item() == pytest.approx(scale or 0.5, abs=0.03)


@pytest.mark.parametrize("mean, scale", [(None, None), (0.3, 0.8)])
def test_lognormal_time_sampling(mean, scale):
    """log sigma of the timesteps is normal with the mean and deviation asked for, by default EDM's."""
    diffusion, t = sampled(time_sampling="lognormal", time_mean=mean, time_scale=scale)
    log_sigma = (1 / diffusion.alpha_bar - 1).log()[t] / 2
    assert log_sigma.mean().item() == pytest.approx(-1.2 if mean is None else mean, abs=0.02)
    assert log_sigma.std().item() == pytest.approx(scale or 1.2, abs=0.02)


def test_dynamic_thresholding_is_imagens():
    """x0_hat is clipped at the quantile of its size, where that is above 1, and scaled back into [-1, 1]."""
    x0 = torch.stack([torch.linspace(-4, 4, 101), torch.linspace(-0.5, 0.5, 101)]).view(2, 1, 1, 101)
    diffusion, t = Diffusion(TABLE, "x0"), torch.tensor([500, 500])
    x0_hat, eps_hat = diffusion.estimates(x0, torch.zeros_like(x0), t, dynamic_threshold=0.5)
    assert torch.allclose(x0_hat[0], (x0[0] / 2).clamp(-1, 1)) and torch.equal(x0_hat[1], x0[1])


@pytest.mark.parametrize("prediction", sorted(diffuser.PREDICTIONS))
def test_epsilon_scaling_divides_the_noise(prediction):
    """--eps_scale k: eps_hat is the predicted noise over k, and x0_hat goes with it."""
    x0, eps, _ = batch(6)
    t, diffusion = torch.tensor([50, 100, 300, 500, 600, 700]), Diffusion(TABLE, prediction)
    target, xt = diffusion.prediction.target(x0, eps, *diffusion.scales(t)), diffusion.q_sample(x0, t, eps)
    x0_hat, eps_hat = diffusion.estimates(target, xt, t, clip=False, eps_scale=1.05)
    assert (eps_hat - eps / 1.05).abs().max() < 1e-4 and (diffusion.q_sample(x0_hat, t, eps_hat) - xt).abs().max() < 1e-4
