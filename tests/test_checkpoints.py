"""Chapter 8: averaging; files that are whole, safe and found again."""

import copy
import os
import pickle
import stat

import pytest
import torch
from conftest import tiny_training, tiny_unet

import diffuser
from diffuser import EMA, UserError, load_checkpoint


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


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """If writing breaks off, the old content stays and nothing else is left behind."""
    path = tmp_path / "file.pt"
    diffuser.write_atomically(path, lambda f: f.write(b"old"))

    def broken(file):
        file.write(b"ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        diffuser.write_atomically(path, broken)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file.pt"]


def test_checkpoints_hold_tensors_and_plain_values_only(folder):
    """A checkpoint opens with weights_only=True, has everything the design names, and plain parameter names."""
    path = diffuser.train(tiny_training())
    state = torch.load(path, weights_only=True)
    assert {"format", "config", "step", "epoch", "loss_history", "model", "ema", "optimizer", "lr_schedule", "moments",
            "class_names"} <= set(state)
    assert not [k for k in state["model"] if k.startswith(("module.", "_orig_mod."))]
    assert path.name == "diffusion_checkpoint_digits_20_8_attention.pt"
    assert stat.S_ISREG(os.stat(path).st_mode) and not list(path.parent.glob(".*.tmp"))


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("content", [b"", b"rubbish", pickle.dumps(Evil()), "evil", "truncated", "foreign"])
def test_files_that_are_not_checkpoints_are_refused(folder, content):
    """Empty, foreign, truncated and malicious files are an error that names the file, and nothing is run."""
    path = folder / "c.pt"
    if content == "evil":
        torch.save({"format": diffuser.FORMAT, "x": Evil()}, path)
    elif content == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif content == "truncated":
        torch.save({"format": diffuser.FORMAT, "x": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:2000])
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"c\.pt"):
        load_checkpoint(path)
    assert not (folder / "executed").exists()


def test_a_checkpoint_rebuilds_its_model_alone(folder):
    """load() needs no flag: network, schedule, classes and start come from the file, and EMA weights are used."""
    path = diffuser.train(tiny_training(conditioning="add", schedule_type="sigmoid", prediction="v"))
    model, state = diffuser.load(path, device="cpu"), torch.load(path, weights_only=True)
    assert model.config.prediction == "v" and model.class_names == list("0123456789") and model.shape == (1, 8, 8)
    assert torch.equal(model.network.state_dict()["conv_in.weight"], state["ema"]["conv_in.weight"])
    assert not torch.equal(state["ema"]["conv_in.weight"], state["model"]["conv_in.weight"])
    assert model.generate(["3", 7], 4, steps=3).shape == (4, 1, 8, 8)


def test_a_config_from_a_file_is_checked_like_flags(folder):
    """A checkpoint that asks for an absurd network is refused before any memory is taken."""
    path = diffuser.train(tiny_training())
    state = torch.load(path, weights_only=True)
    for name, value in (("base_channels", 10**9), ("channel_mults", "x"), ("timesteps", 2.5), ("use_attention", "yes")):
        broken = copy.deepcopy(state)
        broken["config"][name] = value
        torch.save(broken, path)
        with pytest.raises(UserError, match=name):
            diffuser.load(path)


@pytest.mark.parametrize("experiment", ["", "exp"])
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_n_checkpoints_are_kept(folder, experiment, keep):
    """num_keep_checkpoints of them stay, the newest, with or without a named experiment."""
    cfg = tiny_training(iterations=8, checkpoint_rate=2, num_keep_checkpoints=keep, experiment_name=experiment, val_fraction=0.0)
    diffuser.train(cfg)
    steps = sorted(load_checkpoint(p)["step"] for p in diffuser.kept_checkpoints(cfg))
    assert steps == [2, 4, 6, 8][-keep:]
    if experiment:
        assert sorted(os.listdir("checkpoints/exp")) == sorted(f"checkpoint_{s}" for s in steps)


def test_resume_from_a_named_checkpoint(folder):
    """--resume_from_checkpoint takes checkpoint_STEP of the experiment or a path; a wrong name lists what is there."""
    cfg = tiny_training(iterations=4, checkpoint_rate=2, num_keep_checkpoints=9, experiment_name="e")
    diffuser.train(cfg)
    named = tiny_training(experiment_name="e", resume_from_checkpoint="checkpoint_2")
    assert load_checkpoint(diffuser.find_checkpoint(named))["step"] == 2
    direct = tiny_training(resume_from_checkpoint="checkpoints/e/checkpoint_4/model.pt")
    assert load_checkpoint(diffuser.find_checkpoint(direct))["step"] == 4
    with pytest.raises(UserError, match="checkpoint_4"):
        diffuser.find_checkpoint(tiny_training(experiment_name="e", resume_from_checkpoint="checkpoint_3"))
