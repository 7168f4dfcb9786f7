"""The pictures themselves: generated digits judged by their nearest real neighbour."""

import pytest
import torch

import diffuser


def accuracy(path, n=500):
    """Part of n class-conditional digits whose nearest real digit has the class asked for."""
    real = diffuser.load_data(diffuser.configure(dataset="digits"))
    drawn = diffuser.load(path).generate(real.class_names, n).float().flatten(1)
    nearest = torch.cdist(drawn, real.images.float().flatten(1)).argmin(1)
    return (real.labels[nearest] == torch.arange(n) % 10).float().mean().item()


def test_a_short_run_draws_recognisable_digits(folder):
    """Less than half of the demo's steps already give digits of the class asked for, most of the time."""
    path = diffuser.train(diffuser.configure(dataset="digits", iterations=220, preview_steps=5, sample_every=100))
    assert accuracy(path) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_draws_the_digits_asked_for(folder, seed):
    """After the demo's training at least 95% of 500 digits are of the class asked for."""
    assert accuracy(diffuser.train(diffuser.configure(dataset="digits", seed=seed))) >= 0.95
