"""Chapter 9 of diffuser.py: files that are whole, safe and found again."""

import contextlib
import copy
import dataclasses
import math
import os
import pickle
import random
import re
import stat
import time
import zipfile

import pytest
import torch
from conftest import same, tiny_training, trained_before

import diffuser
from diffuser import Devices, Trainer, UserError, load_checkpoint, train


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
    path = trained_before()
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
    assert load_checkpoint(diffuser.train(direct))["step"] == 4              # at its end already: nothing else is there
    with pytest.raises(UserError, match="checkpoint_4"):
        diffuser.find_checkpoint(tiny_training(experiment_name="e", resume_from_checkpoint="checkpoint_3"))


def damage(path, how):
    """Break a checkpoint the way disks and people do."""
    content = bytearray(path.read_bytes())
    if how == "flipped bit":
        content[len(content) // 2] ^= 1
    elif how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    elif how == "zeros":
        content[1000:] = bytes(len(content) - 1000)
    path.write_bytes(content)


@pytest.mark.parametrize("experiment, how", [("", "flipped bit"), ("e", "flipped bit"), ("", "truncated"), ("", "empty"), ("e", "zeros")])
def test_a_damaged_checkpoint_is_passed_over(folder, capsys, how, experiment):
    """Resuming takes the newest one that is whole, says so, and ends as if nothing had been; without any it stops."""
    cfg = tiny_training(iterations=6, checkpoint_rate=2, num_keep_checkpoints=3, experiment_name=experiment)
    whole = torch.load(train(cfg), weights_only=True)
    newest, second, third = diffuser.kept_checkpoints(cfg)
    damage(newest, how)
    damage(second, how)
    with pytest.raises(UserError, match=re.escape(str(newest))):
        load_checkpoint(newest)
    capsys.readouterr()
    path = train(cfg)
    out = capsys.readouterr().out
    assert str(newest) in out and f"going on from {third} instead" in out
    resumed = load_checkpoint(path)
    assert all(same(whole[part], resumed[part]) for part in ("model", "ema", "optimizer", "loss_history"))
    for kept in diffuser.kept_checkpoints(cfg):
        damage(kept, "truncated")
    with pytest.raises(UserError, match="resume never"):
        train(cfg)


def test_any_flipped_bit_is_found(folder):
    """Wherever a bit flips, the file is refused or its content is the same."""
    path = train(tiny_training(base_channels=4, channel_mults=(1,), num_heads=1))
    good, content, chance = load_checkpoint(path), path.read_bytes(), random.Random(0)
    for i in range(100):
        broken = bytearray(content)
        place = chance.randrange(len(content)) if i % 2 else len(content) - 1 - chance.randrange(4000)
        broken[place] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        with contextlib.suppress(UserError):
            assert same(load_checkpoint(path), good), place


JUNK = [None, -1, 1.5, math.nan, "x", "a\0b", [], [None] * 3, {}, {"a": 1}, True, 10**18, torch.zeros(3), torch.zeros(0),
        torch.zeros(1).expand(10**12), torch.zeros(3, dtype=torch.long), "missing"]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_content_of_any_kind_is_refused_or_used(folder, every):
    """Whatever stands in a checkpoint's place for something: an error of one or two lines or a run, no traceback and no
    memory taken."""
    cfg = tiny_training()
    path = train(cfg)
    good, chance = load_checkpoint(path), random.Random(0)
    places = [(k,) for k in good] + [(k, sub) for k in good if isinstance(good[k], dict) for sub in good[k]]
    places = [p for p in places if len(p) == 1 or p[0] not in ("config", "model", "ema")] + chance.sample(
        [p for p in places if len(p) == 2 and p[0] in ("config", "model", "ema")], 20)
    places += [("optimizer", "state", 0, key) for key in ("step", "exp_avg", "exp_avg_sq")] + [("shape", 0), ("loss_history", 0)]
    for where in places[::every]:
        for junk in chance.sample(JUNK, 1):
            state = copy.deepcopy(good)
            inner = state
            for key in where[:-1]:
                inner = inner[key]
            if isinstance(junk, str) and junk == "missing":
                del inner[where[-1]]
            else:
                inner[where[-1]] = junk
            torch.save(state, path)
            with contextlib.suppress(UserError):
                diffuser.choose_checkpoint({"yes": True})
            with contextlib.suppress(UserError):
                state = load_checkpoint(path)                                # what is refused here is used nowhere
                for use in (lambda: diffuser.load(path, device="cpu"), lambda state=state: Trainer(cfg, Devices(cfg), state)):
                    with contextlib.suppress(UserError):
                        use()


def test_a_huge_network_is_refused_before_memory_is_taken(folder, capsys):
    """A checkpoint or flags for a network that no machine holds: an error in no time, and no memory used."""
    path = trained_before()
    state = load_checkpoint(path)
    for change in (dict(base_channels=4096), dict(base_channels=4096, channel_mults=(64, 64)), dict(num_res_blocks=16)):
        torch.save({**state, "config": {**state["config"], **change}}, path)
        with pytest.raises(UserError, match=r"weights|tensors|channels"):
            load_checkpoint(path)
    wide = tiny_training(base_channels=4096, channel_mults=(1, 4), num_res_blocks=16, head_dim=64)
    with torch.device("meta"):
        network = diffuser.build_unet(wide, 1, 10)
    expanded = {name: torch.zeros(1).expand(v.shape) for name, v in network.state_dict().items()}
    torch.save({**state, "config": dataclasses.asdict(wide), "model": expanded, "ema": None, "optimizer": {"state": {}}}, path)
    with pytest.raises(UserError, match="tensors"):
        load_checkpoint(path)
    flags = ["--mode", "train", "--dataset", "digits", "--base_channels", "4096", "--channel_mults", "1,4",
             "--num_res_blocks", "16", "--device", "cpu", "--resume", "never"]
    begun = time.perf_counter()
    assert diffuser.main(flags) == 2 and "GiB are free" in capsys.readouterr().err
    assert diffuser.main([*flags, "--dry_run"]) == 2 and time.perf_counter() - begun < 30


def test_the_only_good_checkpoint_is_never_removed(folder):
    """Saves made while the loss is out of its range push out each other, but not the last one made before."""
    cfg = tiny_training()
    run = Trainer(cfg, Devices(cfg))
    for step, good in ((1, True), (2, True), (3, False), (4, False), (5, False)):
        run.progress.step = step
        diffuser.save_checkpoint({**run.state(), "good": good}, cfg)
    steps = [(s["step"], s["good"]) for s in map(load_checkpoint, diffuser.kept_checkpoints(cfg))]
    assert steps == [(5, False), (2, True)]
    run.progress.step = 6
    diffuser.save_checkpoint(run.state(), cfg)
    assert [load_checkpoint(p)["step"] for p in diffuser.kept_checkpoints(cfg)] == [6]


def test_a_clock_that_goes_back_removes_nothing_new(folder):
    """Retention never takes the checkpoint that was just written, whatever the files' times say."""
    cfg = tiny_training(experiment_name="e")
    run = Trainer(cfg, Devices(cfg))
    run.progress.step = 1
    os.utime(diffuser.save_checkpoint(run.state(), cfg), (2**33, 2**33))
    run.progress.step = 2
    diffuser.save_checkpoint(run.state(), cfg)
    assert [load_checkpoint(p)["step"] for p in diffuser.kept_checkpoints(cfg)] == [2]


def test_what_was_set_aside_is_not_this_runs(folder):
    """Checkpoints of an earlier run that --resume never has renamed are neither gone back to nor removed."""
    cfg = tiny_training(iterations=4, checkpoint_rate=2, num_keep_checkpoints=2)
    train(cfg)
    path = train(dataclasses.replace(cfg, resume="never", seed=1))
    assert [load_checkpoint(p)["step"] for p in diffuser.kept_checkpoints(cfg)] == [4, 2]
    assert len(list(path.parent.glob("*_old1.pt"))) == 2


def test_a_write_that_went_wrong_is_no_checkpoint(folder, monkeypatch, capsys):
    """What reads back as something else does not take the old one's place, and training goes on."""
    path = train(tiny_training(iterations=2))
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"nothing"))
    with pytest.raises(UserError, match="last checkpoint"):
        train(tiny_training(iterations=6, checkpoint_rate=2))
    assert path.read_bytes() == before and capsys.readouterr().err.count("not written as it should be") == 2


def broken(state, *where_and_value):
    """A copy of a checkpoint's content with another value somewhere in it."""
    *where, key, value = where_and_value
    state = copy.deepcopy(state)
    inner = state
    for step in where:
        inner = inner[step]
    inner[key] = value
    return state


def test_what_would_break_later_is_refused_at_load(folder):
    """Numbers that are not finite or out of their range, wherever they stand, and classes without end: one line with the
    file's name when the file is read, not a failure when they are used."""
    path = trained_before()
    good = load_checkpoint(path)
    weights = good["model"]["conv_in.weight"].clone()
    weights[0, 0, 0, 0] = math.nan
    mean = good["moments"]["mean"]
    adam = good["optimizer"]["state"][0]["exp_avg"]
    cases = {
        "slowed": broken(good, "slowed", 4),
        "faults": broken(good, "faults", torch.full((3,), math.inf)),
        "meter": broken(good, "meter", torch.full((2, 4, 2), math.nan)),
        "arithmetic": broken(good, "arithmetic", "split", 0),
        "epoch": broken(good, "epoch", math.inf),
        "scaler": broken(good, "scaler", 3),
        "weights .*not finite": broken(good, "model", "conv_in.weight", weights),
        "weights .*not finite, in conv_in.weight": broken(good, "ema", "conv_in.weight", weights),
        "optimizer .*not finite": broken(good, "optimizer", "state", 0, "exp_avg", torch.full_like(adam, math.inf)),
        "moments .*not finite": broken(good, "moments", "mean", torch.full_like(mean, math.nan)),
        "moments .*below 0": broken(good, "moments", "var", torch.full_like(mean, -1.0)),
        "moments are not those": broken(good, "moments", "mean", torch.zeros(11, 1, 0, 0)),
        "class_names": broken(good, "class_names", ["x"] * 100_001),
        "class_names is": broken(good, "class_names", ["x" * 1001] * 10),
    }
    for words, state in cases.items():
        torch.save(state, path)
        with pytest.raises(UserError, match=rf"\.pt cannot be used: .*{words}") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    for key in good:
        torch.save({name: value for name, value in good.items() if name != key}, path)
        try:
            load_checkpoint(path)
        except UserError as error:
            assert f"it lacks its {key}" in str(error) or "not a checkpoint" in str(error)


def test_muons_momentum_is_checked_like_adams_moments(folder):
    """A checkpoint of a run with Muon opens; one that lacks a matrix's momentum, or has it with nan, says so."""
    path = train(tiny_training(optimizer="muon"))
    good = load_checkpoint(path)
    number = next(i for i, moments in good["optimizer"]["state"].items() if "momentum" in moments)
    momentum = good["optimizer"]["state"][number]["momentum"]
    for words, state in {"tensors are not those": broken(good, "optimizer", "state", number, {}),
                         "not finite": broken(good, "optimizer", "state", number, "momentum", momentum * math.nan)}.items():
        torch.save(state, path)
        with pytest.raises(UserError, match=words):
            load_checkpoint(path)


def test_moments_in_double_precision_draw(folder):
    """A file may have been written by other hands: drawing computes in float32."""
    path = trained_before()
    state = load_checkpoint(path)
    moments = {name: value.double() for name, value in state["moments"].items()}
    torch.save({**state, "moments": moments}, path)
    assert load_checkpoint(path)["moments"]["mean"].dtype == torch.float32
    assert diffuser.load(path, device="cpu").generate([0], 1, steps=2).dtype == torch.uint8


def test_what_is_no_file_is_no_checkpoint(folder):
    """A folder or a pipe in a checkpoint's place is told at once; nothing waits for a pipe."""
    os.mkfifo(folder / "pipe.pt")
    (folder / "folder.pt").mkdir()
    for name in ("pipe.pt", "folder.pt"):
        with pytest.raises(UserError, match=f"{name} is no file"):
            load_checkpoint(folder / name)


def test_torchs_own_words_stay_inside(folder):
    """A file that torch cannot read is damaged, whatever torch says to itself."""
    with zipfile.ZipFile(folder / "c.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"rubbish")
    with pytest.raises(UserError, match=r"c\.pt (is damaged|is refused)") as error:
        load_checkpoint(folder / "c.pt")
    assert "inline_container" not in str(error.value) and "enforce" not in str(error.value)
