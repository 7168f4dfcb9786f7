"""--init_from: new runs from given weights; --config: repeating a run from its config.json."""

import csv
import dataclasses
import json
import os
import time

import pytest
import torch
from conftest import TINY_FLAGS, cli, tiny_training, trained_before
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import convert
import diffuser
from diffuser import Devices, Trainer, UserError, configure, load, load_checkpoint, train

NEW = dict(device="cpu", batch_size=4, iterations=2, preview_steps=2, log_every=1, num_generations=1, report=False)


def start_of(**settings):
    """A run before its first step."""
    cfg = configure(**{**NEW, **settings})
    return Trainer(cfg, Devices(cfg))


def metrics(folder):
    """Rows of metrics.csv but for the times."""
    path, = folder.glob("samples/*/metrics.csv") if folder.is_dir() else [folder]
    times = ("seconds", "images_per_second", "machine/")
    return [{k: v for k, v in row.items() if not k.startswith(times)} for row in csv.DictReader(path.open())]


@pytest.fixture
def digits_model(folder):
    """A short run on the digits."""
    return train(tiny_training(timesteps=30, schedule_type="cosine", learning_rate=1e-2, iterations=12))


def test_a_new_run_takes_over_weights_network_and_schedule(digits_model, capsys):
    """The average's weights, nothing of the optimizer, the network and schedule of the checkpoint without naming them."""
    run = start_of(dataset="digits", init_from=str(digits_model), experiment_name="tuned")
    state = load_checkpoint(digits_model)
    assert all(torch.equal(v, state["ema"][k]) for k, v in run.network.state_dict().items())
    assert all(torch.equal(v, state["ema"][k]) for k, v in run.ema.network.state_dict().items())
    assert run.step == 0 and run.optimizer.state == {} and run.lr_schedule.last_epoch == 0
    assert (run.cfg.base_channels, run.cfg.timesteps, run.cfg.schedule_type) == (8, 30, "cosine")
    assert "step 12; 10 classes as there" in capsys.readouterr().out
    path = train(configure(**NEW, dataset="digits", init_from=str(digits_model), experiment_name="tuned"))
    assert load_checkpoint(path)["step"] == 2 and load(path, device="cpu").generate(["3"], 1, steps=2).shape == (1, 1, 8, 8)


def test_the_same_weights_by_another_path_are_the_same_run(digits_model, capsys):
    """A relative path and an absolute one."""
    for path in (os.path.relpath(digits_model), str(digits_model.resolve())):
        train(configure(**NEW, dataset="digits", init_from=path, experiment_name="tuned"))
    assert "nothing is left to train" in capsys.readouterr().out and not list(digits_model.parent.glob("tuned_old*"))


@pytest.mark.parametrize("name", ["", "mine"])
def test_weights_in_the_new_runs_own_place_are_found_again(folder, monkeypatch, name):
    """A run that was killed before its first checkpoint: the same command begins with the same weights."""
    weights = train(tiny_training(experiment_name=name))
    again = tiny_training(experiment_name=name, init_from=str(weights), learning_rate=1e-5)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(diffuser.TrainingLoop, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            train(again)
    assert load_checkpoint(train(again))["config"]["init_from"] == str(weights)


def test_another_number_of_classes_begins_as_no_label(digits_model, image_folder, capsys):
    """Two classes instead of ten: a new class embedding, each class at first what no label was; said."""
    run = start_of(path_to_data=str(image_folder), img_size=(8, 8), init_from=str(digits_model), channels=1)
    assert "begins anew: 2 classes, 10 there" in capsys.readouterr().out
    before = load(digits_model, device="cpu", precision="fp32").network
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 10, 25])
    with torch.no_grad():
        for label in (0, 1, 2):
            assert torch.allclose(run.network(x, t, torch.full((3,), label)), before(x, t), atol=1e-6)


def test_classes_can_come_and_go(digits_model, capsys):
    """A conditional model continued without labels is what it drew without one; an unconditional one gets labels."""
    before = load(digits_model, device="cpu", precision="fp32").network
    run = start_of(dataset="digits", use_labels=False, init_from=str(digits_model))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 10, 25])
    with torch.no_grad():
        assert torch.allclose(run.network(x, t), before(x, t), atol=1e-6)
    plain = train(configure(**NEW, dataset="digits", use_labels=False, init_from=str(digits_model), experiment_name="plain"))
    again = start_of(dataset="digits", init_from=str(plain))
    assert again.null_class == 10 and "10 classes, 0 there" in capsys.readouterr().out
    with torch.no_grad():
        assert torch.allclose(again.network(x, t, torch.tensor([0, 4, 10])), load(plain, device="cpu", precision="fp32").network(x, t), atol=1e-6)


def test_what_cannot_be_taken_over_is_refused(folder, digits_model):
    """Flags for another network or other channels name the difference; a missing file is named; concat keeps its labels."""
    for flags, words in ((dict(base_channels=16), "base_channels is 8 there, 16 asked for"), (dict(channels=3), "channels is 1 there"),
                         (dict(init_from="nothing.pt"), "no checkpoint nothing.pt")):
        with pytest.raises(UserError, match=words):
            train(configure(dataset="digits", experiment_name="new", **{"init_from": str(digits_model), **flags}))
    concat = train(tiny_training(conditioning="concat", experiment_name="concat"))
    with pytest.raises(UserError, match="labels cannot come or go"):
        start_of(dataset="digits", use_labels=False, init_from=str(concat))


def test_a_run_that_was_there_before_is_kept_and_not_gone_on_with(digits_model):
    """--init_from in the place of a run that began otherwise: that one is kept aside, the new one begins with the weights,
    also those of that very checkpoint; the same command then resumes."""
    for length, kept in ((2, 1), (4, 1)):
        train(configure(**{**NEW, "iterations": length}, dataset="digits", init_from=str(digits_model), timesteps=30, emb_dim=8,
                        checkpoint_rate=2))
        assert len(list(digits_model.parent.glob("*_old*.pt"))) == kept
        assert load_checkpoint(digits_model)["step"] == length
    old, = digits_model.parent.glob("*_old*.pt")
    assert load_checkpoint(old)["step"] == 12 and load_checkpoint(old)["config"]["init_from"] == ""


def test_the_schedule_can_be_changed_on_the_way(digits_model):
    """What a flag says of schedule or prediction beats the checkpoint."""
    cfg = configure(dataset="digits", init_from=str(digits_model), timesteps=50, prediction="v")
    assert (cfg.timesteps, cfg.prediction, cfg.base_channels) == (50, "v", 8)


def test_the_same_command_resumes_instead_of_starting_again(digits_model):
    """A second invocation goes on from the run's own checkpoint, to the weights of an undisturbed run, bit for bit."""
    for name, lengths in (("once", [4]), ("twice", [2, 4])):
        for length in lengths:
            path = train(configure(**{**NEW, "iterations": length}, dataset="digits", init_from=str(digits_model), experiment_name=name,
                                   lr_schedule="constant", warmup_steps=0, checkpoint_rate=2, num_keep_checkpoints=5))
    a, b = (load_checkpoint(path.parents[2] / name / "checkpoint_4" / "model.pt")["model"] for name in ("once", "twice"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_a_run_goes_on_without_the_weights_that_it_began_with(digits_model):
    """The given checkpoint may be gone once the run has one of its own; a new run says that it is missing."""
    flags = ["--mode", "train", "--dataset", "digits", "--init_from", "base.pt", "--experiment_name", "tuned", "--batch_size", "4",
             "--preview_steps", "2", "--device", "cpu", "--no-report"]
    base = digits_model.rename("base.pt")
    assert diffuser.main([*flags, "--iterations", "2"]) == 0
    base.unlink()
    assert diffuser.main([*flags, "--iterations", "4"]) == 0
    assert load_checkpoint("checkpoints/tuned/checkpoint_4/model.pt")["config"]["timesteps"] == 30
    assert diffuser.main([*flags, "--experiment_name", "other"]) == 2


def test_going_back_to_the_beginning_is_going_back_to_the_given_weights(digits_model):
    """A run that diverges before its first checkpoint starts again from the weights it was given."""
    run = start_of(dataset="digits", init_from=str(digits_model), experiment_name="diverging")
    before = {k: v.clone() for k, v in run.network.state_dict().items()}
    run.train_step()
    run.guard.roll_back(run, "for a test", None)
    assert run.step == 0 and all(torch.equal(v, before[k]) for k, v in run.network.state_dict().items())


def test_a_model_of_diffusers_is_fine_tuned_on_a_folder(folder, image_folder):
    """from-diffusers, then --init_from on the command line: the images take the model's size and channels."""
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=None,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), freq_shift=1,
                       flip_sin_to_cos=False, downsample_padding=0)
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=50)).save_pretrained("there")
    convert.from_diffusers("there", "start.pt")
    flags = ["--mode", "train", "--path_to_data", image_folder, "--init_from", "start.pt", "--iterations", 2, "--batch_size", 4,
             "--preview_steps", 2, "--no-report"]
    done = cli(*flags, cwd=folder)
    assert done.returncode == 0 and "2 classes, 0 there" in done.stdout, done.stderr
    path, = folder.glob("checkpoints/*.pt")
    state = load_checkpoint(path)
    assert state["shape"] == [3, 16, 16] and state["config"]["timesteps"] == 50 and state["config"]["sin_first"]
    with pytest.raises(UserError, match="init_from CHECKPOINT"):           # it is no earlier part of this run
        train(configure(load_checkpoint("start.pt")["config"], **NEW, path_to_data=str(image_folder), resume_from_checkpoint="start.pt"))


# ---- --config ----------------------------------------------------------------------------------

FLAGS = ["--mode", "train", "--dataset", "digits", "--timesteps", 20, "--batch_size", 64, "--log_every", 2, "--num_generations", 1,
         "--schedule_type", "cosine", *TINY_FLAGS]


def test_config_json_repeats_a_run(folder, monkeypatch):
    """The same losses to the last digit, where the first run was and elsewhere; the first run is kept."""
    assert diffuser.main([*map(str, FLAGS), "--epochs", "1"]) == 0
    config, = folder.glob("samples/*/config.json")
    first = metrics(folder)
    done = cli("--config", config, cwd=folder)
    assert done.returncode == 0, done.stderr
    kept, = folder.glob("samples/*_old1/metrics.csv")
    assert metrics(config.with_name("metrics.csv")) == first == metrics(kept) and list(folder.glob("checkpoints/*_old1.pt"))
    other = folder / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert diffuser.main(["--config", str(config), "--seed", "5"]) == 0
    assert metrics(other) != first and len(metrics(other)) == len(first)


def test_a_name_with_a_dot_is_set_aside_whole(folder):
    """What is behind the dot of v1.5 is no ending."""
    for _ in range(2):
        train(tiny_training(experiment_name="v1.5", resume="never"))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()) == ["v1.5", "v1.5_old1"]


def test_config_json_repeats_a_run_from_python(folder):
    """train(configure(config=...)) begins anew where that run is finished."""
    path = trained_before()
    config, = folder.glob("samples/*/config.json")
    assert train(configure(config=str(config))) == path and list(folder.glob("checkpoints/*_old1.pt"))
    a, b = (load_checkpoint(p)["model"] for p in (path, *folder.glob("checkpoints/*_old1.pt")))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_config_json_of_a_stopped_run_goes_on(folder, capsys):
    """A run that has not reached its end is resumed, not begun again."""
    train(tiny_training(iterations=4, experiment_name="stopped"))
    content = json.loads(next(folder.glob("samples/*/config.json")).read_text())
    content["config"]["iterations"] = 8
    (folder / "again.json").write_text(json.dumps(content))
    assert diffuser.main(["--config", "again.json"]) == 0
    assert "step 4 of 8" in capsys.readouterr().out


def test_a_run_of_minutes_with_config_goes_on_until_its_own_end(folder):
    """Its length is the number of steps in its checkpoint, not the preset's epochs: it is resumed before, and begun
    again behind."""
    (folder / "c.json").write_text(json.dumps(dict(dataset="digits", batch_size=16)))
    cfg = configure(config="c.json", train_minutes=2.0)
    for step, epoch, goes_on in ((40, cfg.epochs + 1, True), (100, 0.1, False)):
        state = dict(step=step, epoch=epoch, config=dict(iterations=100, train_minutes=2.0))
        assert diffuser.same_run(cfg, state) == goes_on


def test_flags_beat_the_file_and_the_file_beats_presets(folder):
    """Every option of the file counts; a length on the command line replaces those of the file; channels per head too."""
    (folder / "c.json").write_text(json.dumps(dict(dataset="mnist", batch_size=7, iterations=30, train_minutes=3.0, channel_mults=[1, 4],
                                                   head_dim=8, resume="never", mode="inference", recipe="ho2020")))
    cfg = configure(**dict(config="c.json", batch_size=9))
    assert (cfg.dataset, cfg.batch_size, cfg.iterations, cfg.train_minutes, cfg.channel_mults) == ("mnist", 9, 30, 0, (1, 4))
    assert (cfg.mode, cfg.resume, cfg.recipe, cfg.beta_end, cfg.head_dim) == ("train", "auto", "", 0.01, 8)
    cfg = configure(config="c.json", epochs=5, num_heads=2)
    assert (cfg.epochs, cfg.iterations, cfg.num_heads, cfg.head_dim) == (5, 0, 2, 0)
    assert configure(config="c.json", train_minutes=2.0).iterations == 0
    cfg = configure(**dict(config="c.json", recipe="best"))
    assert {name: getattr(cfg, name) for name in diffuser.BEST["mnist"]} == diffuser.BEST["mnist"]
    (folder / "whole.json").write_text(json.dumps(dataclasses.asdict(configure(dataset="digits", batch_size=9, config="c.json", yes=True,
                                                                                resume_from_checkpoint="x"))))
    cfg = configure(config="whole.json")
    assert (cfg.batch_size, cfg.config, cfg.yes, cfg.resume_from_checkpoint) == (9, "whole.json", False, "")


@pytest.mark.parametrize("text, words", [
    (None, "holds no options"), ("{", "holds no options"), ("[1]", "holds no options"), ('{"config": 3}', "holds no options"),
    ('{"nonsense": 1}', "no option nonsense"), ('{"dataset": "digits", "batch_size": "many"}', "--batch_size cannot be"),
    ('{"dataset": "digits", "channel_mults": {"a": 1}}', "--channel_mults cannot be"), ('{"dataset": "digits", "batch_size": 0}', "--batch_size")])
def test_a_bad_config_file_is_one_line(text, words, folder, capsys):
    """What is wrong with it, before anything is made; status 2."""
    if text is not None:
        (folder / "c.json").write_text(text)
    assert diffuser.main(["--config", "c.json"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert diffuser.main(["--mode", "inference", "--config", "c.json"]) == 2
    assert {p.name for p in folder.iterdir()} <= {"c.json"}


def test_config_json_tells_machine_and_time(folder):
    """What it ran on and for how long, added up over interruptions; the options as they ended."""
    before = 0
    for length in (2, 4):
        begun = time.perf_counter()
        train(tiny_training(iterations=length))
        took = time.perf_counter() - begun
        content = json.loads(next(folder.glob("samples/*/config.json")).read_text())
        assert content["config"]["iterations"] == length and content["machine"]["device"].startswith("cpu x 1")
        assert before <= content["seconds"] <= before + took + 0.1 and content["machine"]["processor"]
        before = content["seconds"]


# ---- what generate returns ---------------------------------------------------------------------

def test_generate_returns_tensors_pictures_and_steps(digits_model):
    """uint8 tensors, the same as PIL images, and every step, of which the last is what is returned otherwise."""
    model = load(digits_model, device="cpu")
    images = model.generate(["3", "7"], 4, steps=5)
    pictures = model.generate(["3", "7"], 4, steps=5, pil=True)
    assert [p.size for p in pictures] == [(8, 8)] * 4 and pictures[1].tobytes() == images[1].numpy().tobytes()
    steps = list(model.generate(["3", "7"], 4, steps=5, each_step=True))
    assert [t for t, _, _ in steps] == diffuser.sampling_grid(configure(timesteps=30, steps=5), model.diffusion.alpha_bar)
    assert all(x.shape == x0.shape == (4, 1, 8, 8) and x.dtype == torch.uint8 for _, x, x0 in steps)
    assert torch.equal(steps[-1][1], images) and not torch.equal(steps[0][1], images) and not torch.equal(steps[0][1], steps[0][2])
    t, x, x0 = next(iter(model.generate(["3"], 2, steps=5, each_step=True, pil=True)))
    assert x[0].size == x0[1].size == (8, 8) and t == 29
    with pytest.raises(UserError, match="nonsense"):                         # at the call, not at the first step
        model.generate(["3"], each_step=True, nonsense=1)
