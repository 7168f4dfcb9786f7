"""Chapter 10 of diffuser.py: the step, resuming, signals, processes."""

import copy
import csv
import dataclasses
import gc
import itertools
import json
import os
import signal
import time
import types
import weakref

import prepared
import pytest
import torch
from conftest import ROOT, SLOWLY, TINY_FLAGS, some_digits, tiny_training, tiny_unet, trained_before
from PIL import Image

import diffuser
from diffuser import Devices, Trainer, UserError, load_checkpoint, train


def weights(path):
    state = load_checkpoint(path)
    return {k: state[k] for k in ("model", "ema", "optimizer", "loss_history", "step", "meter", "lr_schedule")}


def same(a, b, exact=True):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-4)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k], exact) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, exact) for x, y in zip(a, b))
    return a == b if exact or not isinstance(a, float) else abs(a - b) < 1e-4


def rows(folder="."):
    path = next(p for p in sorted(diffuser.Path(folder).rglob("metrics.csv")) if "_old" not in str(p))
    return list(csv.DictReader(open(path)))


def test_the_loss_falls(folder):
    """Trainer learns: the loss of the last steps is well below that of the first."""
    train(tiny_training(iterations=100, batch_size=16, learning_rate=1e-2, log_every=5, timesteps=100))
    losses = [float(r["loss"]) for r in rows()]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_metrics_have_every_column_and_each_step_once(folder):
    """metrics.csv: losses with quartiles, learning rate, gradient norm, speed, and validation at the end."""
    train(tiny_training(iterations=6))
    table = rows()
    assert [int(r["step"]) for r in table] == [2, 4, 6] and tuple(table[0])[:13] == (
        "step", "epoch", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "val_loss", "lr", "grad_norm", "images_per_second",
        "seconds", "skipped_steps")
    assert all(float(table[-1][c]) > 0 for c in ("loss", "loss_q1", "val_loss", "grad_norm", "images_per_second"))
    mean = sum(float(table[-1][f"loss_q{i}"]) for i in range(1, 5)) / 4
    assert float(table[-1]["loss"]) == pytest.approx(mean, rel=0.7)


@pytest.mark.parametrize("options", [
    {}, dict(dropout=0.2, flip=True, gradient_accumulation_steps=3), dict(lr_schedule="cosine", optimizer="adam"), dict(optimizer="muon"), dict(optimizer="adamw"),
    dict(precision="bf16", base_channels=32, dropout=0.2, batch_size=8),
    dict(lr_schedule="constant", use_ema=False, warmup_steps=3), dict(adam_betas=(0.8, 0.9), ema_halflife=500.0, flip=True),
    dict(lr_schedule="cosine_with_restarts", lr_cycles=3, random_crop=True, val_fraction=0.5, batch_size=80), dict(lr_schedule="linear"), dict(use_labels=False, dataset="digits", conditioning="concat")])
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(folder, options):
    """Stopped in the middle of an epoch and run again, everything ends as if it had not been."""
    data = None if options.get("random_crop") else some_digits(400)
    settings = {**dict(iterations=16, batch_size=32, val_fraction=0.1, log_every=3), **options}  # 11 steps an epoch
    parts = tiny_training(experiment_name="parts", checkpoint_rate=8, num_keep_checkpoints=9, **settings)
    whole = weights(train(parts, data=data))
    train(dataclasses.replace(parts, resume_from_checkpoint="checkpoint_8"), data=data)
    resumed = weights(diffuser.checkpoint_path(parts, 16))
    for part in whole:
        assert same(whole[part], resumed[part]), part


def test_metrics_continue_after_a_resume(folder):
    """Rows after the checkpoint are written again, not twice; losses are those of the first time."""
    cfg = tiny_training(iterations=12, checkpoint_rate=6, num_keep_checkpoints=5, experiment_name="m")
    train(cfg)
    first = [(r["step"], r["loss"]) for r in rows()]
    train(dataclasses.replace(cfg, resume_from_checkpoint="checkpoint_6"))
    assert [(r["step"], r["loss"]) for r in rows()] == first


def test_accumulation_and_one_big_batch_are_the_same_step(folder):
    """Three micro-batches of 8 are one batch of 24, to float tolerance."""
    big = weights(train(tiny_training(batch_size=24, experiment_name="big", learning_rate=1e-3, precision="fp32")))
    small = weights(train(tiny_training(batch_size=8, gradient_accumulation_steps=3, experiment_name="small", learning_rate=1e-3, precision="fp32")))
    assert same(big["model"], small["model"], exact=False)


def test_a_checkpoint_of_other_images_is_refused(folder, image_folder):
    """A run on another folder of the same shape does not go on from this one's checkpoint."""
    cfg = tiny_training(dataset="folder", path_to_data=str(image_folder), img_size=(8, 8), batch_size=4, val_fraction=0.0)
    train(cfg)
    for picture in image_folder.rglob("*.bmp"):
        Image.new("RGB", (9, 9), "white").save(picture)
    with pytest.raises(UserError, match="other images"):
        train(cfg)


def test_scaler_state_of_another_precision_is_left_alone(folder):
    """A checkpoint from fp16 can be resumed in fp32 and the other way round."""
    path = train(tiny_training())
    state = load_checkpoint(path)
    run = Trainer(tiny_training(), Devices(tiny_training()))
    run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=True)   # as in fp16, which takes a GPU
    run.resume(state)
    assert run.step == 4 and run.scaler.get_scale() == 8.0

    state["scaler"] = {"scale": 65536.0, "growth_factor": 2.0}
    torch.save(state, path)
    assert load_checkpoint(train(tiny_training(iterations=6)))["step"] == 6


def test_epochs_asked_for_beat_iterations_stored():
    """--epochs has an effect beside a recipe or a checkpoint that counts in iterations."""
    assert diffuser.requested({"dataset": "cifar10", "recipe": "ho2020", "epochs": 3})["iterations"] == 0
    assert diffuser.requested({"epochs": 3, "iterations": 7})["iterations"] == 7


def test_running_again_after_the_end_changes_nothing(folder):
    """A finished run is finished; with more iterations it goes on."""
    cfg = tiny_training()
    before = weights(train(cfg))
    assert same(before, weights(train(cfg)))
    assert load_checkpoint(train(dataclasses.replace(cfg, iterations=6)))["step"] == 6


def test_a_checkpoint_that_does_not_fit_is_an_error_that_names_the_settings(folder):
    """Another network or schedule than the checkpoint's is refused, never a silent fresh start."""
    train(tiny_training())
    with pytest.raises(UserError, match="schedule_type is cosine there, linear asked for"):
        train(tiny_training(schedule_type="linear"))
    with pytest.raises(UserError, match="base_channels is 8 there, 16 asked for"):
        train(tiny_training(base_channels=16))


def test_another_file_name_is_not_a_silent_fresh_start(folder, capsys):
    """Settings that change the checkpoint's name start a new run, and the run says so."""
    first = train(tiny_training())
    train(tiny_training(timesteps=30))
    assert f"starting a new run: other settings than those of {first}" in capsys.readouterr().out


def test_a_dataset_whose_name_begins_alike_is_no_other_run_of_this(folder, capsys):
    """cifar10_optimized's checkpoint says nothing of a run of cifar10."""
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "diffusion_checkpoint_digits_more_20_8_attention.pt").touch()
    train(tiny_training())
    assert "starting a new run" not in capsys.readouterr().out


def test_runs_of_other_checkpoints_keep_their_samples(folder, capsys):
    """Two --working_directory, one folder of samples: going on with the first leaves the second's rows as they are."""
    for place, iterations in (("a", 4), ("b", 12), ("a", 6)):
        train(tiny_training(working_directory=place, iterations=iterations, log_every=2))
    said = capsys.readouterr().out
    rows = {path.parent.name[-5:]: [row["step"] for row in csv.DictReader(path.open())] for path in folder.rglob("metrics.csv")}
    assert said.count("kept an earlier run's samples") == 2 and sorted(len(v) for v in rows.values()) == [1, 2, 6]
    train(tiny_training(working_directory="a", iterations=8, log_every=2))
    assert "kept an earlier" not in capsys.readouterr().out
    (folder / "a").rename(folder / "moved")
    train(tiny_training(working_directory="moved", iterations=10, log_every=2))
    assert "kept an earlier" not in capsys.readouterr().out


def test_runs_named_after_another_stay_when_it_starts_over(folder):
    """NAME/INNER is another run: it goes on where it was."""
    for name in ("abl", "abl/lr1"):
        train(tiny_training(experiment_name=name))
    train(tiny_training(experiment_name="abl", resume="never", seed=1))
    home = folder / "checkpoints"
    assert (home / "abl" / "lr1").is_dir() and not (home / "abl_old1" / "lr1").exists()
    assert len(list((home / "abl_old1").glob("checkpoint_*/model.pt"))) == len(list((home / "abl").glob("checkpoint_*/model.pt"))) == 1


def test_an_older_file_of_a_later_step_is_told(folder, capsys):
    """As a copy in another order leaves them: the run goes on from the newest file, and says what else is there."""
    cfg = tiny_training(experiment_name="e", iterations=6, checkpoint_rate=2, num_keep_checkpoints=3)
    train(cfg)
    os.utime(diffuser.checkpoint_path(cfg, 4), (2**33, 2**33))
    train(dataclasses.replace(cfg, iterations=8))
    said = capsys.readouterr().out
    assert "at step 4 of 8" in said and "--resume_from_checkpoint checkpoint_6 goes on from it" in said


def test_starting_over_keeps_what_the_earlier_run_made(folder):
    """--resume never trains anew and renames the old checkpoint and samples instead of overwriting them."""
    path = train(tiny_training())
    old = path.read_bytes()
    train(tiny_training(resume="never", seed=1))
    assert path.with_stem(f"{path.stem}_old1").read_bytes() == old != path.read_bytes()
    assert len([p for p in os.listdir("samples") if "_old1" in p]) == 1


def test_label_dropout_and_null_class(folder):
    """label_dropout 1 trains the null class alone: no class row of the embedding gets a gradient."""
    run = Trainer(tiny_training(label_dropout=1.0, weight_decay=0.0), Devices(tiny_training()))
    before = run.network.class_embedding.weight.detach().clone()
    for _ in range(3):
        run.train_step()
    changed = (run.network.class_embedding.weight != before).any(1)
    assert changed.tolist() == [False] * 10 + [True]


def test_gradients_are_clipped(folder):
    """max_grad_norm bounds the step of plain gradient descent; 0 leaves gradients alone."""
    norms = {}
    for limit in (1e-3, 0.0):
        run = Trainer(tiny_training(max_grad_norm=limit, use_ema=False), Devices(tiny_training()))
        run.optimizer.step, kept = lambda *a, **k: None, []
        run.optimizer.zero_grad = lambda set_to_none: kept.append(
            torch.stack([p.grad.norm() for p in run.network.parameters()]).norm().item())
        run.train_step()
        norms[limit] = kept[0], run.grad_norm.item()
    assert norms[1e-3][0] == pytest.approx(1e-3, rel=0.01) and norms[0.0][0] == pytest.approx(norms[0.0][1], rel=1e-4)


@pytest.mark.parametrize("name, at", [
    ("onecycle", {0: 1e-3 / 25, 10: 1e-3, 99: 1e-3 / 25 / 1e4}), ("constant", {0: 1e-3 / 11, 10: 1e-3, 99: 1e-3}),
    ("cosine", {0: 1e-3 / 11, 10: 1e-3, 55: 5e-4, 99: 3.05e-7})])
def test_learning_rate_schedules(name, at):
    """Warm-up over the first steps, then the named curve."""
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], 1e-3)
    schedule, rates = diffuser.LR_SCHEDULES[name](optimizer, 1e-3, 10, 100), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    for step, rate in at.items():
        nearby = rates[max(0, step - 1) : step + 2]
        assert min(nearby) <= rate * 1.01 + 1e-9 and max(nearby) >= rate * 0.99, (step, nearby)


@pytest.mark.parametrize("ours, theirs, options", [
    ("linear", "linear", {}), ("cosine", "cosine", {}), ("constant", "constant", {}),
    ("cosine_with_restarts", "cosine_with_restarts", dict(cycles=3))])
def test_learning_rates_are_those_of_diffusers(ours, theirs, options):
    """The same command line means the same curve: with and without warm-up, which begins one step earlier here."""
    optimization = pytest.importorskip("diffusers.optimization")

    def rates(make):
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], 1e-3)
        schedule, found = make(optimizer), []
        for _ in range(100):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    for warmup in (0, 10):
        if theirs != "constant":
            given = dict(num_warmup_steps=warmup, num_training_steps=100, num_cycles=options.get("cycles", 1))
            there = rates(lambda o, given=given: optimization.get_scheduler(theirs, o, **given))
        else:
            there = [1e-3] * 100
        here = rates(lambda o, w=warmup: diffuser.LR_SCHEDULES[ours](o, 1e-3, w, 100, **options))
        assert here[warmup:] == pytest.approx(there[warmup:], abs=1e-12) and here[warmup] == 1e-3
        assert all(a < b for a, b in zip(here[:warmup], here[1:]))


def test_restarts_are_as_many_as_asked_for(folder):
    """--lr_cycles reaches the run: the learning rate comes back to its highest as often as said, four times by default."""
    for cycles, peaks in ((2, 2), (None, 4)):
        cfg = tiny_training(iterations=80, lr_schedule="cosine_with_restarts", lr_cycles=cycles, warmup_steps=0)
        run = Trainer(cfg, Devices(cfg))
        rates = [run.lr_schedule.lr_lambdas[0](step) for step in range(80)]
        assert rates.count(1.0) == peaks


def test_adam_gets_its_betas(folder):
    """--adam_betas: the first step leaves moments of 1 - beta times the gradient, and its square."""
    cfg = tiny_training(adam_betas=(0.7, 0.6), max_grad_norm=0.0)
    run, kept = Trainer(cfg, Devices(cfg)), []
    run.optimizer.register_step_pre_hook(lambda o, *_: kept.append(run.network.conv_out.weight.grad.clone()))
    run.train_step()
    moments = run.optimizer.state[run.network.conv_out.weight]
    assert torch.allclose(moments["exp_avg"], 0.3 * kept[0], rtol=1e-4)
    assert torch.allclose(moments["exp_avg_sq"], 0.4 * kept[0] ** 2, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8), (1, 16, 16)])
def test_orthogonalized_matrices(shape):
    """Newton-Schulz keeps a matrix's directions and makes its singular values about alike, tall or wide."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = u.mT @ diffuser.orthogonalize(matrices, torch.float32) @ vh.mT
    diagonal = torch.diagonal(values, dim1=1, dim2=2)
    assert diagonal.min() > 0.3 and diagonal.max() < 1.3
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-4


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest(folder):
    """Three steps: kernels as flattened matrices by torch's own Muon, ends and embeddings by AdamW."""
    network = tiny_unet()
    twin = copy.deepcopy(network)
    options = dict(lr=1e-2, weight_decay=1.0)
    ours = diffuser.OPTIMIZERS["muon"](network, torch.bfloat16, betas=(0.9, 0.999), fused=False, **options)
    named = dict(twin.named_parameters())
    flat = {name: torch.nn.Parameter(p.detach().flatten(1).clone()) for name, p in named.items()
            if diffuser.is_block_matrix(name, p.shape)}
    rest = {name: p for name, p in named.items() if name not in flat}
    assert {"conv_in.weight", "conv_out.weight", "time_mlp.0.weight", "class_embedding.weight"} <= rest.keys()
    assert "down.0.conv1.weight" in flat and "mid.0.attention.q.weight" in flat
    theirs = [torch.optim.Muon(flat.values(), adjust_lr_fn="match_rms_adamw", **options), torch.optim.AdamW(rest.values(), **options)]

    random = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name, p in network.named_parameters():
            p.grad = torch.randn(p.shape, generator=random)
            if name in flat:
                flat[name].grad = p.grad.flatten(1).clone()
            else:
                rest[name].grad = p.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    for name, p in network.named_parameters():
        reference = flat[name].view_as(p) if name in flat else rest[name]
        assert (p - reference).abs().max() < (5e-4 if name in flat else 1e-6), name


def test_a_run_goes_on_with_another_optimizer(folder):
    """From AdamW to Muon and back: what the other one learned is left, weights and step are kept."""
    train(tiny_training(iterations=2, optimizer="adamw"))
    for i, optimizer in enumerate(("muon", "adamw"), 2):
        path = train(tiny_training(iterations=2 * i, optimizer=optimizer))
        state = diffuser.load_checkpoint(path)
        assert state["step"] == 2 * i and state["config"]["optimizer"] == optimizer
        kept = state["optimizer"]["state"].values()
        assert any("momentum" in moments for moments in kept) == (optimizer == "muon")


def test_scale_lr_multiplies_by_the_devices(folder):
    """--scale_lr: the learning rate times the number of devices."""
    devices = Devices(tiny_training())
    devices.count = 3
    rates = [Trainer(tiny_training(scale_lr=s, lr_schedule="constant", warmup_steps=0), devices).optimizer.param_groups[0]["lr"]
             for s in (False, True)]
    assert rates[1] == pytest.approx(3 * rates[0])


def test_early_stopping_looks_at_rows_under_the_same_settings(folder):
    """Losses from before a change of the learning rate do not count."""
    run = Trainer(tiny_training(early_stop_loss_change=0.1), Devices(tiny_training()))
    monitor = diffuser.Monitor(run, None, folder)
    run.progress.loss_history = [(step, 0.5) for step in range(1, 15)]
    assert monitor.plateaued()
    run.progress.baseline_step = 10
    assert not monitor.plateaued()


def test_early_stopping_as_documented(folder):
    """The run stops when the mean absolute change of the last ten logged losses is below the threshold."""
    run = Trainer(tiny_training(early_stop_loss_change=0.1), Devices(tiny_training()))
    monitor = diffuser.Monitor(run, None, folder)
    run.progress.loss_history = [[i, 1.0 + 0.05 * (i % 2)] for i in range(1, 10)]
    assert not monitor.plateaued()
    run.progress.loss_history.append([10, 1.0])
    assert monitor.plateaued()
    run.progress.loss_history[-1][1] = 9.0
    assert not monitor.plateaued()
    for _ in range(2):                                                       # the same again: nothing is left to do
        path = train(tiny_training(iterations=1000, early_stop_loss_change=100.0, log_every=1))
        assert load_checkpoint(path)["step"] == 10
    path = train(tiny_training(iterations=14, log_every=1))
    assert load_checkpoint(path)["step"] == 14


def test_validation_is_the_same_every_time(folder):
    """Fixed noise and timesteps: the same weights give the same held-out loss."""
    monitor = diffuser.Monitor(Trainer(tiny_training(), Devices(tiny_training())), None, folder)
    assert monitor.validate() == monitor.validate() > 0


@pytest.mark.parametrize("options", [{}, dict(min_snr_gamma=5.0, prediction="v"), dict(time_sampling="laplace")])
def test_training_and_validation_estimate_the_same_loss(folder, options):
    """A network that says the same of every image has the same expected loss in both, with the density of timesteps and
    the weights of training, also where classes differ and images are sorted by them."""
    cfg = tiny_training(**{**dict(time_sampling="logit_normal", time_mean=-1.0, timesteps=200, batch_size=500,
                                  prediction="x0", val_fraction=0.4), **options})
    run = Trainer(cfg, Devices(cfg))
    order = run.data.labels[run.val_indices].argsort(stable=True)
    run.val_indices = run.val_indices[order]
    for p in [*run.network.parameters(), *run.ema.network.parameters()]:
        p.data.zero_()
    training = []
    for step in range(8):
        run.progress.step = step
        training.append(run.diffusion.loss(run.network, *run.batch()).mean().item())
    training = sum(training) / len(training)
    assert diffuser.Monitor(run, None, folder).validate() == pytest.approx(training, rel=0.03)


def test_validation_spreads_timesteps_over_the_density_of_training(folder, monkeypatch):
    """One timestep from each of n equal parts of it, in an order that has nothing to do with that of the images."""
    seen = []
    run = Trainer(tiny_training(time_sampling="logit_normal", timesteps=500), Devices(tiny_training()))
    loss = run.diffusion.loss
    monkeypatch.setattr(run.diffusion, "loss", lambda net, x0, t, *rest: seen.append(t) or loss(net, x0, t, *rest))
    diffuser.Monitor(run, None, folder).validate()
    t = torch.cat(seen)
    n = len(run.val_indices)
    assert torch.equal(t.sort().values, run.diffusion.timesteps((torch.arange(n) + 0.5) / n))
    assert (t[1:] < t[:-1]).any() and len(t) == n


def due_rows(total, per_epoch, log_every=20, first=0, **options):
    """{step: whether it has a validation loss} of the rows of a run, that goes on after a row at `first`."""
    cfg = dataclasses.replace(tiny_training(log_every=log_every), **options)
    rows = {}
    for step in range(first + 1, total + 1):
        due = diffuser.what_is_due(cfg, step, per_epoch, total, max(rows, default=first))
        if due.log:
            rows[step] = due.validate
    return rows


def test_rows_are_means_over_equal_numbers_of_steps():
    """Whatever the length of an epoch: every log_every steps, the last row with what is left over as well; a run shorter
    than that has one."""
    assert list(due_rows(100, 7)) == list(due_rows(100, 1)) == list(due_rows(100, 1000)) == [20, 40, 60, 80, 100]
    assert list(due_rows(100, 7, checkpoint_rate=11)) == [20, 40, 60, 80, 100]
    assert list(due_rows(119, 7)) == [20, 40, 60, 80, 119] and list(due_rows(101, 7)) == [20, 40, 60, 80, 101]
    assert due_rows(10, 1) == due_rows(10, 100) == {10: True} and list(due_rows(3, 1, log_every=1)) == [1, 2, 3]
    assert list(due_rows(150, 7, first=101)) == [121, 150]


def test_the_first_row_after_an_epoch_or_checkpoint_has_the_validation_loss():
    """So that it stands in a row, once for each, at the step it was measured."""
    assert due_rows(100, 30) == {20: False, 40: True, 60: True, 80: False, 100: True}
    assert all(due_rows(100, 1).values())
    assert due_rows(100, 1000, checkpoint_rate=50) == {20: False, 40: False, 60: True, 80: False, 100: True}


def test_rows_and_grids_have_the_means_that_they_say(folder, monkeypatch):
    """A row is the mean over its steps, a grid's name that over its epoch; the rate is that of the row's last step."""
    losses = []
    rates = []
    real = Trainer.train_step

    def train_step(run):
        rates.append(run.optimizer.param_groups[0]["lr"])
        before = run.progress.loss_sums[1].clone()
        real(run)
        since = run.progress.loss_sums[1] - before
        losses.append((since[:, 0].sum() / since[:, 1].sum()).item())

    monkeypatch.setattr(Trainer, "train_step", train_step)
    cfg = tiny_training(iterations=22, batch_size=20, val_fraction=0.0, log_every=4, sample_every=1)     # 5 steps an epoch
    train(cfg, data=some_digits(105))
    table = rows()
    assert [int(row["step"]) for row in table] == [4, 8, 12, 16, 22]
    for first, row in zip([0, 4, 8, 12, 16], table):
        last = int(row["step"])
        assert float(row["loss"]) == pytest.approx(sum(losses[first:last]) / (last - first), rel=1e-4)
        assert float(row["lr"]) == pytest.approx(rates[last - 1], rel=1e-5)
    falling = [float(row["lr"]) for row in table]
    assert falling[1:] == sorted(falling[1:], reverse=True)                  # with onecycle the last one is the lowest
    means = {f"epoch_{e}_loss_{sum(losses[5 * e - 5 : 5 * e]) / 5:.4f}.png" for e in (1, 2, 3, 4)}
    assert means < {path.name for path in folder.rglob("epoch_*.png")}


def test_time_before_a_checkpoint_is_in_its_row(folder, monkeypatch):
    """Saving and drawing are no training; the steps before them, in the same row, are."""
    clock, later = time.perf_counter, [0.0]                                  # by how much it has been put on
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + later[0])

    def taking(seconds, work=lambda *given: None):
        def timed(*given):
            work(*given)
            later[0] += seconds
        return timed

    monkeypatch.setattr(Trainer, "train_step", taking(100.0, Trainer.train_step))
    monkeypatch.setattr(diffuser.Monitor, "show_grid", taking(10_000.0))
    train(tiny_training(iterations=8, log_every=8, checkpoint_rate=3))
    (row,) = rows()
    assert 800 <= float(row["seconds"]) < 10_000                             # the two grids before it took 20,000 seconds
    assert float(row["images_per_second"]) * float(row["seconds"]) == pytest.approx(128, rel=1e-4)


def test_a_run_says_what_it_is_and_how_to_repeat_it(folder):
    """config.json: sizes, what was chosen, the command; real.png: images of each class, drawn once."""
    path = train(tiny_training(report=True, iterations=4))
    (run,) = folder.glob("samples/samples_*")
    about = json.loads((run / "config.json").read_text())
    network = load_checkpoint(path)["model"]
    assert about["parameters"] == sum(p.numel() for p in network.values()) and about["classes"] == 10
    assert about["shape"] == [1, 8, 8] and about["images"] == 1762 and about["chosen"]["iterations"] == 4
    assert about["command"].startswith("python diffuser.py --mode train --dataset digits ")

    with Image.open(run / "real.png") as real, Image.open(next(run.glob("epoch_*.png"))) as grid:
        assert real.size == grid.size
    (run / "real.png").write_bytes(b"kept")
    train(tiny_training(report=True, iterations=8))
    assert (run / "real.png").read_bytes() == b"kept"


def test_real_images_are_of_their_classes(folder, image_folder):
    """A column per class with images of it alone, each once, and white where there are too few."""
    cfg = tiny_training(dataset="folder", path_to_data=str(image_folder), img_size=(8, 8), batch_size=4, val_fraction=0.0,
                        num_generations=8)
    run = Trainer(cfg, Devices(cfg))
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffuser, "save_grid", lambda images, path, names: drawn.append((images, names)))
        diffuser.Monitor(run, None, folder).draw_real()
    images, names = drawn[0]
    columns = images.view(8, 2, *run.shape)
    assert names == ["cat", "dog"] and (columns[6:] == 255).all()
    for c in (0, 1):
        assert torch.equal(columns[:6, c], run.data.images[run.data.labels == c])


def test_a_row_has_the_epoch_to_four_digits_behind_the_point(folder):
    """Also where a run is long: other numbers are rounded to six digits, the epoch is not."""
    class Recorder:
        def log(self, values):
            self.values = values

    run, recorder = Trainer(tiny_training(), Devices(tiny_training())), Recorder()
    run.train_step()
    run.progress.step = 123_457
    diffuser.Monitor(run, recorder, folder).log(diffuser.Due())
    assert recorder.values["epoch"] == round(123_457 / run.batches.steps_per_epoch, 4) > 1000
    assert recorder.values["loss"] == float(f"{recorder.values['loss']:.6g}")


def test_a_run_that_is_let_go_of_is_freed_at_once(folder):
    """Nothing in a Trainer points back at it: --train_minutes makes one for a trial, and its memory is needed again."""
    gc.collect()
    gc.disable()
    try:
        run = Trainer(tiny_training(), Devices(tiny_training()))
        run.train_step()
        gone = weakref.ref(run)
        del run
        assert gone() is None
    finally:
        gc.enable()


def test_drawing_does_not_change_training(folder):
    """With and without sample grids on the way the weights are the same, also without EMA."""
    results = []
    for name, rate in (("with", 1), ("without", 0)):
        cfg = tiny_training(iterations=4, use_ema=False, dropout=0.3, experiment_name=name, checkpoint_rate=rate)
        results.append(weights(train(cfg)))
    assert same(results[0]["model"], results[1]["model"])


def test_grids_and_strips_come_at_the_cadence_asked_for(folder):
    """Epoch grids with epoch and loss in the name, strips beside them where asked for."""
    train(tiny_training(batch_size=20, val_fraction=0.0, iterations=0, epochs=4, sample_every=2, plot_freq_interval=5), data=some_digits(105))
    names = sorted(p.name for p in diffuser.Path("samples").rglob("*.png"))
    assert [n[:8] for n in names] == ["epoch_2_", "epoch_4_", "step_10.", "step_20."]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(folder, number, code):
    """Interrupted while training: exit 130 or 143 after saving; run again, it ends as if undisturbed."""
    flags = ["--mode", "train", "--dataset", "digits", "--batch_size", "16", "--iterations", "40", "--log_every", "2",
             "--timesteps", "50", *TINY_FLAGS]
    with open("errors", "w") as errors:
        process = prepared.background(["-c", SLOWLY, *flags], folder, stderr=errors)
    deadline = time.time() + 60
    while time.time() < deadline and not any(len(p.read_text().splitlines()) > 1 for p in folder.rglob("metrics.csv")):
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    errors = (folder / "errors").read_text()
    assert "the same command goes on" in errors and "Traceback" not in errors
    path = next(folder.rglob("*.pt"))
    assert 0 < load_checkpoint(path)["step"] < 40
    assert diffuser.main(flags) == 0
    resumed = weights(path)
    assert diffuser.main([*flags, "--experiment_name", "whole"]) == 0
    whole = weights(folder / "checkpoints/whole/checkpoint_40/model.pt")
    assert all(same(whole[part], resumed[part]) for part in ("model", "ema", "optimizer", "loss_history"))
    assert [r["step"] for r in rows(next(folder.glob("samples/samples_digits_*")))] == sorted(
        {r["step"] for r in rows(next(folder.glob("samples/samples_digits_*")))}, key=int)


def test_two_processes_equal_one(folder):
    """Two CPU processes, as torchrun starts them, end with the weights of one process, on an odd global batch too."""
    flags = ["--mode", "train", "--dataset", "digits", "--batch_size", "13", "--gradient_accumulation_steps", "2",
             "--iterations", "6", "--timesteps", "50", "--log_every", "3", "--flip", "--precision", "fp32", *TINY_FLAGS]
    status, out, errors = prepared.run_two(ROOT / "diffuser.py", *flags, "--experiment_name", "two", cwd=folder)
    assert status == 0, errors[-2000:]
    assert diffuser.main([*flags, "--experiment_name", "one"]) == 0
    one, two = (weights(folder / f"checkpoints/{n}/checkpoint_6/model.pt") for n in ("one", "two"))
    difference = sum((one["model"][k] - two["model"][k]).abs().sum() for k in one["model"])
    assert difference / sum(v.abs().sum() for v in one["model"].values()) < 1e-5
    for a, b in zip(*(rows(next((folder / "samples").glob(f"samples_{n}_*"))) for n in ("one", "two"))):
        for column in ("loss", "loss_q1", "grad_norm"):                      # Adam would not notice a wrong scale
            assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-4)
    assert out.count("device   cpu x 2") == 1                            # one rank speaks


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="DataParallel looks for a second GPU beside this one")
def test_data_parallel_keeps_plain_names(folder):
    """nn.DataParallel wraps the call, not the parameters; without GPUs it is not used and asking for it is refused."""
    devices = Devices(tiny_training())
    devices.replicas = 2
    network = torch.nn.Linear(2, 2)
    wrapped = devices.parallel(network, diffuser.ComputeConfig())
    assert isinstance(wrapped, torch.nn.DataParallel) and wrapped.module.network is network
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="num_gpus"):
            Devices(tiny_training(num_gpus=2))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precisions_train(folder, precision):
    """bf16 autocast trains to about the loss of fp32; weights stay float32."""
    path = train(tiny_training(precision=precision, iterations=30, batch_size=32, learning_rate=3e-3))
    state = load_checkpoint(path)
    assert state["model"]["conv_in.weight"].dtype == torch.float32
    assert state["loss_history"][-1][1] < state["loss_history"][0][1]


def test_devices_are_picked_in_order(monkeypatch):
    """cuda before mps before cpu; one that is not there is refused by name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert diffuser.pick_device("auto").type == "mps" and diffuser.pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="device cuda"):
        diffuser.pick_device("cuda")


@pytest.mark.parametrize("steps, left", [(2, False), (4, False), (6, True)])
def test_a_run_that_has_its_length_says_so(folder, capsys, steps, left):
    """The same command, or one for fewer steps, trains no more and says what would."""
    trained_before()
    diffuser.train(tiny_training(iterations=steps))
    out = capsys.readouterr().out
    assert ("nothing is left to train" in out) is not left and f"at step 4 of {steps}" in out


def test_a_finished_run_has_a_report_and_does_not_depend_on_it(folder, monkeypatch, capsys):
    """report.html with the last grid, curves and a denoising strip, which is drawn for it; one that fails is one line."""
    train(tiny_training(report=True, plot_freq_interval=0))
    (run,) = folder.glob("samples/samples_*")
    page = (run / "report.html").read_text()
    assert [p.name for p in run.glob("step_*.png")] == ["step_4.png"] and "Denoising at step 4" in page
    assert page.count('role="img"') == 2 and "cpu x 1" in page and "report.html" in capsys.readouterr().out
    monkeypatch.setattr("report.write_report", lambda folder: 1 / 0)
    assert train(tiny_training(report=True, experiment_name="b")).exists()
    assert "no report: division by zero" in capsys.readouterr().err


def test_timesteps_of_a_batch_are_spread_evenly(folder):
    """One timestep from each of batch_size equal parts of 0..T-1, other ones at the next step."""
    run = Trainer(tiny_training(timesteps=160, batch_size=16), Devices(tiny_training()))
    first = run.step_noise()[0]
    run.progress.step = 1
    assert torch.equal(first // 10, torch.arange(16)) and not torch.equal(first, run.step_noise()[0])


@pytest.mark.parametrize("perturbation", [0.0, 0.1])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_process_draws_its_own_part_of_the_same_noise(folder, monkeypatch, perturbation, world):
    """The parts of all processes are the noise of one, whatever their number, and no two images have the same; each draws
    hardly more than its own."""
    drawn = []
    normal = torch.Tensor.normal_
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *values, **options: (drawn.append(len(self)), normal(self, *values, **options))[1])
    run = Trainer(tiny_training(batch_size=20, input_perturbation=perturbation))
    whole = run.step_noise()
    parts = []
    for rank in range(world):
        run.batches.rank_slice = here = slice(rank * 20 // world, (rank + 1) * 20 // world)
        drawn.clear()
        parts.append(run.step_noise())
        assert sum(drawn) < (2 if perturbation else 1) * (here.stop - here.start + 2 * diffuser.NOISE_BLOCK)
    for together, apart in zip(whole, zip(*parts)):
        assert torch.equal(together, torch.cat(apart))
    _, eps, noise, _ = whole
    assert len({tuple(image.flatten().tolist()) for image in eps}) == 20
    assert (noise - eps).std() == pytest.approx(perturbation, rel=0.1, abs=1e-9)
    assert eps.std() == pytest.approx(1, rel=0.1)


def test_input_perturbation_adds_its_share_of_noise(folder):
    """The network's noise is the target's plus gamma times other noise: its variance is 1 + gamma^2."""
    def draw(gamma):
        cfg = tiny_training(batch_size=256, input_perturbation=gamma)
        return Trainer(cfg, Devices(cfg)).step_noise()

    _, eps, noise, _ = draw(0.5)
    assert (noise - eps).std().item() == pytest.approx(0.5, rel=0.03) and noise.var().item() == pytest.approx(1.25, rel=0.03)
    _, eps, noise, _ = draw(0.0)
    assert noise is eps or torch.equal(noise, eps)


@pytest.mark.parametrize("recipe", [
    dict(min_snr_gamma=5.0), dict(prediction="v", zero_terminal_snr=True, min_snr_gamma=5.0), dict(prediction="x0", zero_terminal_snr=True),
    dict(input_perturbation=0.1), dict(time_sampling="logit_normal"), dict(time_sampling="laplace", time_mean=1.0), dict(patch_size=2)])
def test_every_training_recipe_learns(folder, recipe):
    """Each switch reaches the training loop: with it the loss falls and the images are finite."""
    cfg = tiny_training(iterations=60, batch_size=16, learning_rate=1e-2, log_every=5, timesteps=100, **recipe)
    path = train(cfg)
    losses = [float(r["loss"]) for r in rows()]
    assert losses[-1] < 0.8 * losses[0], losses
    plain = Trainer(tiny_training(batch_size=16, timesteps=100), Devices(cfg))
    changed = Trainer(dataclasses.replace(plain.cfg, **recipe), Devices(cfg))
    for _ in range(3):                                                       # the first output is 0 in any case
        plain.train_step(), changed.train_step()
    assert not torch.equal(plain.progress.loss_sums, changed.progress.loss_sums)
    assert diffuser.load(path).generate(["3"], 2, steps=5).float().std() > 0


def test_training_for_minutes(folder, capsys):
    """train_minutes: the steps that fit are counted from real ones, stored, kept on resuming, and take about that
    long; another number of minutes adds what fits into those."""
    cfg = tiny_training(iterations=0, train_minutes=0.1, sample_every=1000)
    Trainer(cfg, Devices(cfg))                                               # what torch imports then takes its time
    begun = time.perf_counter()
    path = train(cfg)
    took, first = time.perf_counter() - begun, load_checkpoint(path)
    assert "steps fit into 0.1 minutes" in capsys.readouterr().out
    assert first["step"] == first["config"]["iterations"] > 10 and 1 < took < 100
    assert load_checkpoint(train(cfg))["step"] == first["step"]              # the same call: it is done
    longer, before = dataclasses.replace(cfg, train_minutes=0.03), copy.deepcopy(first["optimizer"])
    diffuser.steps_for_minutes(longer, Devices(longer), first, time.perf_counter() + 2)
    assert same(first["optimizer"], before)                                  # timing a run leaves it alone
    assert load_checkpoint(train(longer))["step"] > first["step"]


def test_a_run_says_once_how_long_it_takes(folder, monkeypatch):
    """After its first seconds, from all steps but the first, which takes longer; not where it has a deadline."""
    cfg = tiny_training(iterations=1000)
    run, now = Trainer(cfg, Devices(cfg)), [0.0]
    monkeypatch.setattr(diffuser.time, "perf_counter", lambda: now[0])
    pace, deadline = diffuser.Pace(run, None), diffuser.Pace(run, 100.0)
    said = []
    for step in range(1, 20):
        run.progress.step = step
        now[0] += 30.0 if step == 1 else 0.5
        pace.take_time(run)
        said.append(pace.tell_time(run))
        assert deadline.tell_time(run) == ""
    assert [text for text in said if text] == ["time     about 8 min for 995 steps of 500 ms"]


def test_the_pace_is_that_of_all_steps_but_the_first(folder, monkeypatch):
    """The first may be compiled. The clock is looked at after a tenth, then by halves of what is left, also where the
    run has got another length or gone back."""
    cfg = tiny_training(iterations=100)
    run, now = Trainer(cfg, Devices(cfg)), [0.0]
    monkeypatch.setattr(diffuser.time, "perf_counter", lambda: now[0])
    pace, looks = diffuser.Pace(run, 60.0), []
    while run.step < run.total:
        run.progress.step += 1
        now[0] += 30.0 if run.step == 1 else 0.5
        pace.take_time(run)
        if pace.is_due(run.step) and run.step < run.total:
            run.set_total_steps(run.step + pace.steps_left(run.step))
            pace.plan_check(run)
            looks.append(run.step)
    assert run.total == 61 and now[0] == 60.0 and looks[0] == 10 and 4 <= len(looks) <= 6
    run.progress.step = 30
    pace.restart(run)
    assert 32 <= pace.next_check < 40


def test_a_run_says_where_everything_goes(folder, capsys):
    """At its start the checkpoint and the folder of samples; at its end every file in that folder, pictures together."""
    flags = ["--mode", "train", "--dataset", "digits", "--timesteps", "20", "--iterations", "4", "--batch_size", "16", *TINY_FLAGS]
    assert diffuser.main([*flags, "--checkpoint_rate", "2", "--plot_freq_interval", "10"]) == 0
    out = capsys.readouterr().out
    path, run = next(folder.rglob("*.pt")), next(folder.glob("samples/samples_*"))
    start, end = out.split("trained in ")
    assert f"checkpoint {path.relative_to(folder)}" in start and f"{run.relative_to(folder)}/" in start
    assert "2 x epoch_*_loss_*.png, 2 x step_*.png, config.json" in end and str(path.relative_to(folder)) in end
    others = {p.name for p in run.iterdir()} - {p.name for kind in ("epoch_*", "step_*", ".*") for p in run.glob(kind)}
    assert {"config.json", "metrics.csv"} <= others and all(name in end for name in others)
    assert diffuser.main([*flags, "--experiment_name", "e"]) == 0
    assert "checkpoint checkpoints/e/checkpoint_STEP/model.pt" in capsys.readouterr().out


def test_the_number_of_steps_follows_the_pace(folder, monkeypatch, capsys):
    """A run against a deadline sets its length anew on the way, in both directions, and says so; the learning rate still
    comes down to its end and the number is stored, also in a checkpoint on the way."""
    ticks = itertools.count()
    monkeypatch.setattr(diffuser.time, "perf_counter", lambda: next(ticks) / 10)  # each look at the clock takes 0.1 s
    for seconds, longer in ((0.0, False), (30.0, True)):
        cfg = tiny_training(iterations=50, experiment_name=str(longer), checkpoint_rate=5, num_keep_checkpoints=99)
        run = Trainer(cfg, Devices(cfg))
        pace = diffuser.Pace(run, next(ticks) / 10 + seconds)
        logger = diffuser.MetricsLogger(folder / "log", {}, 0, {})
        with diffuser.tqdm(disable=True) as bar:
            monitor = diffuser.Monitor(run, logger, folder)
            path = diffuser.TrainingLoop(run, monitor, diffuser.Signals(run.processes), bar, pace).run()
        state = load_checkpoint(path)
        assert "steps fit into the time, not 50" in capsys.readouterr().out
        assert (state["step"] > 50) == longer and state["step"] == state["config"]["iterations"] == run.total
        assert run.lr_schedule.get_last_lr()[0] < 0.1 * cfg.learning_rate
        assert load_checkpoint(diffuser.checkpoint_path(cfg, 5))["config"]["iterations"] != 50


# ---- The pictures themselves -------------------------------------------------------------------


def accuracy(path, n=500):
    """Part of n class-conditional digits whose nearest real digit has the class asked for."""
    real = diffuser.load_data(diffuser.configure(dataset="digits"))
    drawn = diffuser.load(path).generate(real.class_names, n).float().flatten(1)
    nearest = torch.cdist(drawn, real.images.float().flatten(1)).argmin(1)
    return (real.labels[nearest] == torch.arange(n) % 10).float().mean().item()


def test_a_short_run_draws_recognisable_digits(folder):
    """A quarter of the demo's steps already gives digits of the class asked for, most of the time."""
    path = diffuser.train(diffuser.configure(dataset="digits", iterations=60, preview_steps=5, sample_every=100, report=False))
    assert accuracy(path, 100) > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_draws_the_digits_asked_for(folder, seed):
    """After the demo's training at least 95% of 500 digits are of the class asked for."""
    assert accuracy(diffuser.train(diffuser.configure(dataset="digits", seed=seed))) >= 0.95


def test_short_epochs_do_not_draw_and_save_all_the_time(folder, monkeypatch):
    """Epochs of one step leave a grid and a checkpoint at the end, not after each of them; where it is asked for, each."""
    saved = []
    save = diffuser.save_checkpoint
    monkeypatch.setattr(diffuser, "save_checkpoint", lambda state, cfg: saved.append(state["step"]) or save(state, cfg))
    monkeypatch.setattr(diffuser.Cadence, "PAUSE", 1e6)                      # however slow the machine is
    short = dict(iterations=0, epochs=6, batch_size=50, val_fraction=0.0, sample_every=None, checkpoint_every=None)
    train(tiny_training(**short), data=some_digits(55))
    assert saved == [6] and len(list(folder.glob("samples/*/epoch_*.png"))) == 1

    saved.clear()
    train(tiny_training(**{**short, "sample_every": 2, "checkpoint_every": 3}, experiment_name="each"), data=some_digits(55))
    assert saved == [3, 6] and len(list(folder.glob("samples/samples_each*/epoch_*.png"))) == 3


def test_grids_take_a_twentieth_of_the_time(monkeypatch):
    """After a grid of four seconds the next one is due in eighty, after a quick one in fifteen."""
    now = [0.0]
    monkeypatch.setattr(diffuser.time, "perf_counter", lambda: now[0])
    cadence = diffuser.Cadence()
    processes = types.SimpleNamespace(broadcast=lambda number: number)
    for seconds, pause in ((4.0, 80.0), (0.1, 15.0)):
        with cadence.measure():
            now[0] += seconds
        now[0] += pause - 1
        assert not cadence.is_time(processes)
        now[0] += 1
        assert cadence.is_time(processes)


@pytest.mark.slow
def test_a_folder_of_pictures_needs_no_flag_but_its_path(folder):
    """Two minutes on a thousand pictures in class folders, every other setting the program's own: new pictures whose
    nearest real one is of the class asked for."""
    data = diffuser.load_data(diffuser.configure(dataset="digits"))
    for i, (image, label) in enumerate(zip(data.images[:1000], data.labels[:1000].tolist())):
        place = folder / "pictures" / str(label)
        place.mkdir(parents=True, exist_ok=True)
        diffuser.to_pil(image).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB").save(place / f"{i}.png")

    path = train(diffuser.configure(path_to_data="pictures", train_minutes=2.0))
    model = diffuser.load(path)
    labels = torch.arange(200) % 10
    drawn = model.generate([str(i) for i in range(10)], num_images=200).float()
    real = diffuser.load_data(model.config).images.float()
    nearest = torch.cdist(drawn.flatten(1), real.flatten(1)).argmin(1)
    right = diffuser.load_data(model.config).labels[nearest] == labels
    assert right.float().mean() > 0.8


def test_moments_are_laid_out_as_the_weights_are(folder):
    """Fused optimizers go through memory: after resuming, a moment stands in the order of its weight, whatever the layout
    of the checkpoint's tensors, as in a run that goes on with another --channels_last."""
    cfg = tiny_training(precision="fp32", channels_last=True, optimizer="adamw")
    state = load_checkpoint(diffuser.train(cfg))
    for kept in state["optimizer"]["state"].values():
        for name, value in kept.items():
            kept[name] = value.contiguous()
    run = Trainer(cfg, Devices(cfg), state)
    last = [p for p in run.network.parameters() if p.ndim == 4 and not p.is_contiguous()]
    assert last
    for i, p in enumerate(run.optimizer.param_groups[0]["params"]):
        for name in ("exp_avg", "exp_avg_sq"):
            moment = run.optimizer.state[p][name]
            assert moment.stride() == p.stride()
            assert torch.equal(moment, state["optimizer"]["state"][i][name])
