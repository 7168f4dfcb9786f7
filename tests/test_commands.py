"""Chapters 11 and 12 of diffuser.py: the real command line, its questions answered by a pipe and a terminal, its errors."""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import prepared
import pytest
import torch
from conftest import ROOT, TINY, TINY_FLAGS, cli, small_file_system, tiny_training, trained_before
from PIL import Image

import convert
import diffuser
import edit
import evaluate
import plot_loss
import report
from diffuser import main
from diffuser_lib import images
from diffuser_lib.files import known_spellings

NETWORK = TINY_FLAGS[: TINY_FLAGS.index("--preview_steps")]
TRAIN = ["--mode", "train", "--dataset", "digits", "--iterations", "2", "--batch_size", "8", "--timesteps", "20", *TINY_FLAGS]


@pytest.fixture
def trained(folder):
    """A folder with one trained checkpoint in it; gives the checkpoint."""
    return trained_before()


def fails(capsys, *arguments, code=2):
    """The one line (or two) that a bad command prints."""
    assert main(list(arguments)) == code
    out, err = capsys.readouterr()
    assert err.startswith("diffuser: ") and "Traceback" not in err and len(err.strip().splitlines()) <= 2
    return err


# Every command line of the five systems that this program replaces, script names replaced.
OTHERS = [
    "--mode train --dataset cifar10 --timesteps 500 --beta_start 1e-5 --beta_end 0.012 --epochs 500 --batch_size 32 "
    "--learning_rate 1e-4 --schedule_type linear --emb_dim 128 --use_attention True",
    "--mode train --dataset cifar10 --iterations 800000 --batch_size 256 --log_to_wandb True",
    "--mode train --dataset cifar10 --learning_rate 2e-4 --batch_size 256 --iterations 800000 --schedule DNS "
    "--schedule_low 1e-4 --schedule_high 0.02 --use_ema True --log_to_wandb True --project_name ddpm-cifar10",
    "--mode train --experiment_name celebA_diffusion_m3_ultra --path_to_data ./celeb_hq_128 --working_directory ./working "
    "--generated_directory ./generated --batch_size 16 --img_size 128 --starting_channels 96 --num_training_steps 100000 "
    "--evaluation_interval 5000 --learning_rate 0.0001 --warmup_steps 5000 --num_workers 4 --loss_fn mse --max_grad_norm 1.0 "
    "--weight_decay 0.0001 --num_keep_checkpoints 2 --num_generations 5 --plot_freq_interval 100",
    "--mode train --experiment_name ddpm_experiment --path_to_data ./celeb_hq_128 --working_directory ./checkpoints "
    "--generated_directory ./samples --num_diffusion_timesteps 1000 --num_training_steps 200000 --batch_size 32 "
    "--gradient_accumulation_steps 2 --learning_rate 1e-4 --warmup_steps 5000 --evaluation_interval 5000 --img_size 128 "
    "--starting_channels 128 --loss_fn mse --use_wandb",
    "--mode train --dataset cifar10",
]
SMALL = "--base_channels 8 --channel_mults 1,2 --num_res_blocks 1 --num_heads 2 --preview_steps 2 --device cpu --img_size 16 --no-report"


@pytest.fixture
def others_folder(folder, image_folder):
    """The folders that those command lines name, with a few images in each."""
    (folder / "celeb_hq_128").symlink_to(image_folder)
    return folder


@pytest.mark.parametrize("line", OTHERS)
def test_command_lines_of_other_systems_start(others_folder, line, monkeypatch, capsys):
    """Each of them resolves with --dry_run, which reads no image and needs no download. No step is timed."""
    monkeypatch.setattr(diffuser, "TRIAL_WORK", 0.0)
    assert main([*shlex.split(line), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out and "signal is left at T" in out and "GiB" in out


@pytest.mark.parametrize("line", OTHERS)
def test_command_lines_of_other_systems_train(others_folder, line, image_folder, monkeypatch):
    """Each of them trains two steps on a few images and leaves a checkpoint."""
    line = line.replace("--dataset cifar10", f"--dataset folder --path_to_data {image_folder}")
    monkeypatch.setitem(sys.modules, "wandb", None)
    flags = [*shlex.split(f"{line} {SMALL}"), "--iterations", "2", "--batch_size", "4", "--timesteps", "20"]
    assert main(flags) == 0
    assert len(list(others_folder.rglob("*.pt"))) == 1


def test_resuming_by_name_as_documented_elsewhere(others_folder):
    """--resume_from_checkpoint checkpoint_2 goes on from that step."""
    flags = shlex.split(f"--mode train --experiment_name ddpm_celeba --path_to_data ./celeb_hq_128 {SMALL} --timesteps 20 "
                        "--batch_size 4 --evaluation_interval 2 --num_keep_checkpoints 5")
    assert main([*flags, "--iterations", "4"]) == 0
    assert main([*flags, "--iterations", "6", "--resume_from_checkpoint", "checkpoint_2"]) == 0
    assert sorted(os.listdir("checkpoints/ddpm_celeba")) == ["checkpoint_2", "checkpoint_4", "checkpoint_6"]


@pytest.mark.parametrize("flags, expected", [
    (["--use_ema"], True), (["--use_ema", "True"], True), (["--use_ema", "false"], False), (["--no-use_ema"], False)])
def test_booleans_in_four_spellings(flags, expected):
    """--flag, --flag True, --flag false and --no-flag."""
    assert vars(diffuser.build_parser().parse_args(flags)) == {"use_ema": expected}


# Command lines of the peers, and what they ask for in the terms of this program.
PEERS = [
    # diffusers' train_unconditional.py, as its README has it, with a folder.
    ("--train_data_dir=pics --resolution=64 --center_crop --random_flip --output_dir=ddpm-ema-64 --train_batch_size=16 "
     "--num_epochs=100 --gradient_accumulation_steps=1 --use_ema --learning_rate=1e-4 --lr_warmup_steps=500 "
     "--mixed_precision=no",
     dict(path_to_data="pics", img_size=(64, 64), random_crop=False, flip=True, working_directory="ddpm-ema-64",
          generated_directory="ddpm-ema-64", batch_size=16, epochs=100, gradient_accumulation_steps=1, use_ema=True,
          learning_rate=1e-4, warmup_steps=500, precision="fp32")),
    ("--save_images_epochs 10 --save_model_epochs 20 --checkpointing_steps 500 --checkpoints_total_limit 3 --logger wandb",
     dict(sample_every=10, checkpoint_every=20, checkpoint_rate=500, num_keep_checkpoints=3, use_wandb=True)),
    ("--report_to all --dataloader_num_workers 4 --adam_weight_decay 1e-6 --ema_max_decay 0.999 --cache_dir there",
     dict(use_wandb=True, use_tensorboard=True, num_workers=4, weight_decay=1e-6, ema_decay=0.999, data_dir="there")),
    ("--ddpm_num_steps 500 --ddpm_beta_schedule squaredcos_cap_v2 --prediction_type epsilon --ddpm_num_inference_steps 50",
     dict(timesteps=500, schedule_type="cosine", prediction="eps", preview_steps=50)),
    ("--prediction_type sample --ddpm_beta_schedule sigmoid --enable_xformers_memory_efficient_attention",
     dict(prediction="x0", schedule_type="geodiff")),
    ("--prediction_type v_prediction --mixed_precision bf16 --logger tensorboard",
     dict(prediction="v", precision="bf16", use_tensorboard=True)),
    ("--lr_scheduler constant --lr_warmup_steps 500", dict(lr_schedule="constant", warmup_steps=0)),
    ("--lr_scheduler constant_with_warmup --lr_warmup_steps 500", dict(lr_schedule="constant", warmup_steps=500)),
    ("--lr_scheduler cosine", dict(lr_schedule="cosine")),
    ("--lr_scheduler linear --adam_beta1 0.95 --adam_beta2 0.99", dict(lr_schedule="linear", adam_betas=(0.95, 0.99))),
    ("--lr_scheduler cosine_with_restarts --adam_beta1 0.95",
     dict(lr_schedule="cosine_with_restarts", lr_cycles=1, adam_betas=(0.95, 0.999))),
    ("--lr_scheduler cosine_with_restarts --lr_num_cycles 3", dict(lr_schedule="cosine_with_restarts", lr_cycles=3)),

    # denoising-diffusion-pytorch's Unet, GaussianDiffusion and Trainer.
    ("--dim 64 --dim_mults 1,2,4,8 --image_size 128 --timesteps 1000 --sampling_timesteps 250 --objective pred_v "
     "--beta_schedule linear --ddim_sampling_eta 1",
     dict(base_channels=64, channel_mults=(1, 2, 4, 8), img_size=(128, 128), timesteps=1000, steps=250, prediction="v",
          schedule_type="linear", scale_betas=True, eta=1.0)),
    ("--train_batch_size 32 --train_lr 8e-5 --train_num_steps 700000 --gradient_accumulate_every 2 --ema_decay 0.995 "
     "--ema_update_every 10 --save_and_sample_every 1000 --results_folder res --amp True --augment_horizontal_flip True",
     dict(batch_size=32, learning_rate=8e-5, iterations=700_000, gradient_accumulation_steps=2, ema_decay=0.995,
          ema_update_rate=10, checkpoint_rate=1000, working_directory="res", generated_directory="res",
          precision="fp16", flip=True)),
    ("--amp False --beta_schedule sigmoid", dict(precision="fp32", schedule_type="sigmoid")),

    # EDM's train.py and generate.py; images become steps, a tick is 50 thousand of them.
    ("--outdir=runs --data=d.zip --cond=1 --duration=200 --batch=512 --lr=1e-3 --dropout=0.13 --fp16=yes --xflip=1 --seed=3",
     dict(working_directory="runs", generated_directory="runs", path_to_data="d.zip", use_labels=True, batch_size=512,
          iterations=390_625, learning_rate=1e-3, dropout=0.13, precision="fp16", flip=True, seed=3)),
    ("--batch 500 --tick 10 --snap 5 --cbase 128 --cres 1,2,2 --workers 1 --transfer there.pt",
     dict(batch_size=500, log_every=20, checkpoint_rate=100, base_channels=128, channel_mults=(1, 2, 2), num_workers=1,
          init_from="there.pt")),
    ("--ema 0.5", dict(ema_halflife=500_000.0)),
    ("--ema 0", dict(use_ema=False)),
    ("--batch-size 1000 --snap 50", dict(batch_size=1000, checkpoint_rate=2500)),
    ("--mode inference --network=C.pt --outdir=out --seeds=0-63 --class=3 --batch=64 --steps=18 --solver=heun",
     dict(mode="inference", model_path="C.pt", save_dir="out", seeds="0-63", classes="3", sample_batch_size=64, steps=18,
          sampler="heun")),
]


@pytest.mark.parametrize("line, options", PEERS)
def test_flags_of_peers_mean_the_same(line, options):
    """Other spellings, units and values are what they mean here, and nothing else is set."""
    given = vars(diffuser.build_parser().parse_args(shlex.split(line)))
    assert diffuser.translate_flags(given, diffuser.parse_value) == options
    diffuser.requested(options)


@pytest.mark.parametrize("line, words", [
    ("--dataset_name huggan/pokemon", "--path_to_data"), ("--push_to_hub", "convert.py"), ("--eval-batch-size 16", "--num_generations"),
    ("--duration 200", "--batch_size"), ("--duration many --batch 4", "above 0"), ("--snap 5", "--batch_size"),
    ("--precond edm", "--prediction"), ("--augment 0.12", "--flip"), ("--S_churn 40", "--eta"), ("--sigma_max 80", "--spacing"),
    ("--logger comet", "tensorboard"), ("--lr_scheduler polynomial", "cosine"), ("--amp maybe", "--amp maybe: wants True or False"),
    ("--enable_xformers_memory_efficient_attention False", "cannot be switched off"), ("--adam_beta1 2", "--adam_beta1 2: "), ("--num_samples 25", "--num_images"), ("--batch none", "--batch none: ")])
def test_flags_of_peers_without_a_counterpart(folder, capsys, line, words):
    """One line that says what to do instead, before anything is made."""
    error = fails(capsys, "--mode", "train", "--dataset", "digits", *shlex.split(line))
    assert words in error and len(error.splitlines()) == 1
    assert not list(folder.iterdir())


def test_a_flag_of_another_program_hides_none_of_ours():
    """No name stands for two things, and each flag of another program names options that exist."""
    spellings = [spelling for name, spec in diffuser.FIELDS.items() for spelling in (f"--{name}", *spec.metadata["aliases"])]
    foreign = [f"--{name}" for name in (*diffuser.FOREIGN_FLAGS, *diffuser.NO_COUNTERPART)]
    assert len(set(spellings + foreign)) == len(spellings + foreign)
    texts = [flag.help for flag in diffuser.FOREIGN_FLAGS.values()] + list(diffuser.NO_COUNTERPART.values())
    for flag in re.findall(r"--\w+", " ".join(texts)):
        assert flag in spellings + foreign, flag


def test_going_on_from_the_latest_checkpoint(others_folder):
    """--resume_from_checkpoint latest goes on from the newest one, and starts a run where there is none."""
    flags = shlex.split(f"--mode train --experiment_name E --path_to_data ./celeb_hq_128 {SMALL} --timesteps 20 "
                        "--batch_size 4 --num_keep_checkpoints 5 --resume_from_checkpoint latest")
    assert main([*flags, "--iterations", "2"]) == 0
    assert main([*flags, "--iterations", "3"]) == 0
    assert sorted(os.listdir("checkpoints/E")) == ["checkpoint_2", "checkpoint_3"]


@pytest.mark.parametrize("flag, hint", [
    ("--resolutoin", "did you mean --resolution?"), ("--epoch", "did you mean --epochs?"), ("--img-sise", "did you mean --img_size?"),
    ("--checkpoint_path", "(see --help)"), ("--save_path", "(see --help)"), ("--width", "(see --help)"),
    ("--beta", "did you mean --beta_start or --beta_end or --beta_schedule?")])
def test_a_hint_names_nothing_else_by_accident(folder, capsys, flag, hint):
    """The nearest flag is named where only a slip lies between, or what begins so; else where to look."""
    assert f"unknown option {flag}" in (error := fails(capsys, "--mode", "train", flag, "3")) and hint in error


@pytest.mark.parametrize("flags, options", [
    (["--learning-rate", "1e-3"], {"learning_rate": 1e-3}), (["--learning-rate=1e-3"], {"learning_rate": 1e-3}),
    (["--no-use-ema"], {"use_ema": False}), (["--no_use_ema"], {"use_ema": False}), (["--dry-run"], {"dry_run": True}),
    (["--no-random-flip"], {"flip": False}), (["--experiment_name=--a-b"], {"experiment_name": "--a-b"})])
def test_dashes_are_as_good_as_underscores(flags, options):
    """In every flag, in its negation and its other spellings; values stay as they are."""
    assert vars(diffuser.build_parser().parse_args(flags)) == options


def test_every_flag_may_be_written_with_dashes():
    """Each flag of the program, all its spellings, is found with dashes alone."""
    known = diffuser.build_parser()._option_string_actions
    for flag in known:
        assert known_spellings([flag.replace("_", "-")], known) == [flag]


def has_good_help(text):
    """One line of usage, then examples, then options, in 80 columns."""
    usage, _, rest = text.partition("\n\n")
    assert usage.startswith("usage: python ") and len(usage.splitlines()) == 1
    assert rest.index("    python ") < rest.index("\n  -")
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("script", ["quality", "speed"])
def test_help_of_benchmarks(script, tmp_path):
    """As of the other scripts: no value is a name in capitals, cut off."""
    done = cli("--help", script=f"benchmarks/{script}.py", cwd=tmp_path, env={"COLUMNS": "80"})
    has_good_help(done.stdout)
    assert "--json PATH" in done.stdout and "--seed SEED" not in done.stdout and "--rounds ROUNDS" not in done.stdout


@pytest.mark.parametrize("script", [diffuser, convert, edit, evaluate, plot_loss, report], ids=lambda script: script.__name__)
def test_help_has_one_line_of_usage_then_examples_then_options(script, monkeypatch):
    """Of every script and command; what stands for a value says of what kind it is."""
    monkeypatch.setenv("COLUMNS", "80")
    parser = script.build_parser()
    has_good_help(parser.format_help())
    commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for each in (parser, *(sub for action in commands for sub in action.choices.values())):
        lines = each.format_help().splitlines()
        assert max(map(len, lines)) <= 80
        assert lines[0].startswith("usage: python ") and lines[1] == ""
        for action in each._actions:
            if action.option_strings and action.metavar is None and action.nargs != 0:
                assert action.dest.upper() not in each.format_help(), action.dest


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "imagenet"], "digits, mnist"), (["--epochs", "0"], "--epochs"), (["--learning_rate", "-1"], "--learning_rate"),
    (["--bach_size", "4"], "did you mean --batch_size"), (["--beta_end", "1e-9"], "beta_end"), (["--dataset"], "--dataset"),
    (["--attention_levels", "9"], "levels 0 to"), (["--num_heads", "5"], "divide"), (["--img_size", "9"], "8 or 10"),
    (["--precision", "fp16", "--device", "cpu"], "fp16"), (["--dataset", "folder", "--path_to_data", "nowhere"], "nowhere"),
    (["--dataset", "folder"], "--path_to_data"), (["--resume_from_checkpoint", "x"], "x: not found")])
def test_bad_flags_are_one_line_and_exit_2(folder, capsys, flags, words):
    """A bad option is told in a line that names it, before anything is made."""
    assert words in fails(capsys, "--mode", "train", "--dataset", "digits", *flags)
    assert not list(folder.iterdir())


def test_every_option_is_read_somewhere():
    """No flag is read and never used: each field is named in the code outside the dataclass, or a parameter of UNet."""
    source = (ROOT / "diffuser.py").read_text()
    body = source[source.index("FIELDS = "):]
    network = diffuser.inspect.signature(diffuser.UNet).parameters
    asked_for = body.split("RECIPES = ")[1]                                  # flags["name"]
    unused = [n for n in diffuser.FIELDS if f".{n}" not in body and f'"{n}"' not in asked_for and n not in network]
    assert unused == []


def test_options_md_is_what_the_program_makes():
    """docs/options.md lists every flag as it is today: python diffuser.py --help markdown > docs/options.md."""
    assert (ROOT / "docs/options.md").read_text() == diffuser.options_page()


def test_help_fits_on_two_screens_and_says_how_to_see_the_rest():
    """--help: the common options, at most 96 lines of 80 columns; --help all: every flag and alias."""
    short, long = (cli("--help", *more, cwd=ROOT, env={"COLUMNS": "80"}) for more in ([], ["all"]))
    assert short.returncode == long.returncode == 0
    assert len(short.stdout.splitlines()) <= 96 and max(map(len, short.stdout.splitlines())) <= 80
    assert "--help all" in short.stdout and "--freq_shift" not in short.stdout
    for spec in diffuser.FIELDS.values():
        assert f"--{spec.name} " in short.stdout or not spec.metadata["common"]
        assert all(flag in long.stdout for flag in (f"--{spec.name}", *spec.metadata["aliases"]))
    for value in ("--seed N", "--learning_rate X", "--save_dir PATH", "--experiment_name NAME", "--prediction {eps,v,x0,flow,edm}"):
        assert value in short.stdout
    assert all(f"--{name}" in long.stdout for name in diffuser.FOREIGN_FLAGS)
    assert cli("--help", "everything", cwd=ROOT).returncode == 2


@pytest.mark.parametrize("sampler, flags", [
    ("dpmpp", ["--eta", "0.5"]), ("heun", ["--variance", "large"]), ("ddpm", ["--eta", "0.5"]), ("dpmpp", ["--use_noise_scaling"])])
def test_options_that_a_sampler_does_not_take_are_refused(trained, capsys, sampler, flags):
    """By its entry in SAMPLERS: a flag that would have no effect is an error that names the samplers it is for."""
    error = fails(capsys, "--mode", "inference", "--model_path", str(trained), "--sampler", sampler, *flags)
    assert flags[0] in error and "ddim" in error and f"not {sampler}" in error


def test_training_through_the_real_command_line(folder):
    """A run leaves checkpoint, grid, metrics and config where the design says, and tells where they are."""
    done = cli(*TRAIN, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "checkpoints/diffusion_checkpoint_digits_20_8_attention.pt").exists()
    run = folder / "samples/samples_digits_cosine_20_8_attention"
    assert {"metrics.csv", "config.json"} < set(os.listdir(run)) and len(list(run.glob("epoch_*_loss_*.png"))) == 1
    assert json.loads((run / "config.json").read_text())["config"]["timesteps"] == 20
    assert "checkpoints/diffusion_checkpoint" in done.stdout and str(run.relative_to(folder)) in done.stdout


def test_inference_without_questions(trained, folder, capsys):
    """--save_dir: numbered, class-named PNGs, a grid, and samples.json with the checkpoint's hash."""
    flags = ["--mode", "inference", "--model_path", str(trained), "--classes", "3,7", "--num_images", "5", "--save_dir", "out",
             "--steps", "3", "--guidance_scale", "1.5", "--trajectory"]
    assert main(flags) == 0
    assert sorted(os.listdir("out/images")) == ["000000_3.png", "000001_7.png", "000002_3.png", "000003_7.png", "000004_3.png"]
    with Image.open("out/images/000001_7.png") as image:
        assert image.size == (8, 8) and image.mode == "L"
    record = json.loads((folder / "out/samples.json").read_text())
    assert record["sha256"] == hashlib.sha256(trained.read_bytes()).hexdigest() and record["config"]["steps"] == 3
    assert (folder / "out/grid.png").exists() and (folder / "out/trajectory.png").exists()
    assert "grid.png, trajectory.png, samples.json" in capsys.readouterr().out
    assert "already holds images" in fails(capsys, *flags)                   # and nothing is overwritten


def drawing(trained, *flags):
    """A command line that draws twenty images of two classes into out/."""
    return ["--mode", "inference", "--model_path", str(trained), "--classes", "3,7", "--num_images", "20", "--steps", "2",
            "--sample_batch_size", "5", "--save_dir", "out", *flags]


@pytest.fixture
def small_disk(folder):
    """out/ is a file system of sixteen pages, each of which holds a small picture; or a skip."""
    with small_file_system(folder / "out", "64k") as place:
        yield place


def test_a_disk_that_is_full_while_drawing(trained, small_disk, capsys):
    """One line with the place, the reason and what is kept, status 1; pictures are whole or not there; with room again the
    same command draws the rest, which are those that it would have drawn."""
    assert main(drawing(trained)) == 1
    errors = capsys.readouterr().err
    kept = sorted(os.listdir("out/images"))
    assert 5 < len(kept) < 20
    assert f"out/images: No space left on device; {len(kept)} of 20 images are there" in errors
    assert "the same command goes on" in errors
    assert len(errors.splitlines()) == 2
    times = {name: os.stat(f"out/images/{name}").st_mtime_ns for name in kept}

    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert main(drawing(trained)) == 0
    assert f"going on: {len(kept)} of 20" in capsys.readouterr().out
    assert times == {name: os.stat(f"out/images/{name}").st_mtime_ns for name in kept}
    shutil.rmtree("whole", ignore_errors=True)
    assert main([*drawing(trained)[:-1], "whole"]) == 0
    assert sorted(os.listdir("out/images")) == sorted(os.listdir("whole/images"))
    for name in os.listdir("whole/images"):
        assert Path(f"out/images/{name}").read_bytes() == Path(f"whole/images/{name}").read_bytes()
    assert (small_disk / "grid.png").exists()


def test_drawing_goes_on_where_it_broke_off(trained, folder, capsys, monkeypatch):
    """Missing pictures, one that a power cut left empty, a missing grid: the same command makes them and leaves the
    others. Another seed, number of images, class or checkpoint is another request, which is refused."""
    assert main(drawing(trained)) == 0
    for name in ("000004_3.png", "000005_7.png", "000019_7.png"):
        os.remove(f"out/images/{name}")
    (folder / "out/images/000011_7.png").write_bytes(b"")
    before = os.stat("out/images/000000_3.png").st_mtime_ns

    drawn = []
    real_draw = diffuser.Model.draw

    def draw(model, labels, cfg, progress, first, seeds, batches):
        drawn.extend(batches)
        return real_draw(model, labels, cfg, progress, first, seeds, batches)

    monkeypatch.setattr(diffuser.Model, "draw", draw)
    for flags in (["--seed", "5"], ["--num_images", "21"], ["--classes", "7,3"], ["--steps", "3"]):
        assert "holds images of another request" in fails(capsys, *drawing(trained), *flags)
    assert main(drawing(trained, "--sample_batch_size", "1")) == 0
    assert drawn == [range(i, i + 1) for i in (4, 5, 11, 19)]
    assert os.stat("out/images/000000_3.png").st_mtime_ns == before
    assert len(os.listdir("out/images")) == 20
    assert json.loads((folder / "out/samples.json").read_text())["batch_size"] == 1

    os.remove("out/grid.png")
    assert main(drawing(trained)) == 0 and (folder / "out/grid.png").exists()
    assert "already holds images, all that are asked for" in fails(capsys, *drawing(trained))
    trained.write_bytes(diffuser.train(tiny_training(iterations=6)).read_bytes())
    os.remove("out/grid.png")
    assert "holds images of another request" in fails(capsys, *drawing(trained))


def test_what_is_missing_is_drawn_in_the_batches_of_before(trained, folder, monkeypatch):
    """Rounding depends on the others in a batch: also where the size was chosen, or is chosen otherwise now."""
    flags = drawing(trained)
    i = flags.index("--sample_batch_size")
    sizes_free = flags[:i] + flags[i + 2 :]
    monkeypatch.setattr(diffuser.Model, "batch_size", lambda model, cfg: cfg.sample_batch_size or 7)
    assert main(sizes_free) == 0
    for name in ("000004_3.png", "000005_7.png", "000019_7.png"):
        os.remove(f"out/images/{name}")

    seen = []
    real_sample = diffuser.Model.sample

    def sample(model, labels, cfg, first=0, seeds=()):
        seen.append(range(first, first + len(labels)))
        return real_sample(model, labels, cfg, first, seeds)

    monkeypatch.setattr(diffuser.Model, "sample", sample)
    monkeypatch.setattr(diffuser.Model, "batch_size", lambda model, cfg: cfg.sample_batch_size or 3)
    assert main(sizes_free) == 0
    assert seen == [range(7), range(14, 20)]

    # A record that somebody has edited counts only as far as it makes sense.
    for nonsense in (0, "7", 10**9, None, True):
        record = json.loads((folder / "out/samples.json").read_text())
        (folder / "out/samples.json").write_text(json.dumps(record | {"batch_size": nonsense}))
        os.remove("out/images/000004_3.png")
        seen.clear()
        assert main(sizes_free) == 0
        assert seen == [range(3, 6)]


def test_how_to_go_on_without_a_folder_of_ones_own(trained, monkeypatch, capsys):
    """The message has the flags that name folder, number and classes where they were not on the command line."""
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images, "save_png", full)
    monkeypatch.setattr("sys.stdin", io.StringIO("3\n4\n"))
    assert main(["--mode", "inference", "--steps", "2", "--device", "cpu"]) == 1
    assert "with --save_dir samples/inference_digits_1 --num_images 4 --classes 3 goes on" in capsys.readouterr().err


def test_auto_is_no_number_of_images(trained, folder, monkeypatch, capsys):
    """It is asked again, since it does not say how many; only q, quit and -1 end the questions."""
    monkeypatch.setattr("sys.stdin", io.StringIO("3\nauto\n2\nq\n"))
    assert main(["--mode", "inference", "--steps", "2", "--device", "cpu"]) == 0
    assert "a number of images, please" in capsys.readouterr().out
    assert len(os.listdir("samples/inference_digits_1/images")) == 2


def test_a_checkpoint_that_is_replaced_while_drawing(trained, folder, monkeypatch, capsys):
    """samples.json has the hash of what was read, though a run has gone on since, or the file is no longer there."""
    digest = hashlib.sha256(trained.read_bytes()).hexdigest()
    real_draw = diffuser.draw_missing

    def draw(*arguments):
        trained.rename("gone.pt")
        return real_draw(*arguments)

    monkeypatch.setattr(diffuser, "draw_missing", draw)
    assert main(drawing(trained)) == 0
    assert json.loads((folder / "out/samples.json").read_text())["sha256"] == digest


def test_the_hash_is_that_of_what_was_read(trained, folder, monkeypatch):
    """A checkpoint that is replaced between hashing and reading is read again."""
    new = diffuser.train(tiny_training(experiment_name="e", iterations=6)).read_bytes()
    real_load, calls = diffuser.load_checkpoint, []

    def load(path):
        calls.append(path)
        if len(calls) == 1:
            (folder / "new.pt").write_bytes(new)
            os.replace(folder / "new.pt", trained)
        return real_load(path)

    monkeypatch.setattr(diffuser, "load_checkpoint", load)
    state, source = diffuser.load_with_digest(trained)
    assert state["step"] == 6
    assert source == dict(checkpoint=str(trained), sha256=hashlib.sha256(new).hexdigest())
    assert len(calls) == 2


def test_a_second_command_that_draws_into_the_same_folder_is_refused(trained, folder, monkeypatch, capsys):
    """At once, with a line that names the first; that one is undisturbed."""
    codes = []
    real_draw = diffuser.draw_missing

    def draw(*arguments):
        monkeypatch.setattr(diffuser, "draw_missing", real_draw)
        done = cli(*drawing(trained), cwd=folder)
        codes.append(done.returncode)
        assert f"in use by process {os.getpid()}" in done.stderr and "another --save_dir" in done.stderr
        return real_draw(*arguments)

    monkeypatch.setattr(diffuser, "draw_missing", draw)
    assert main(drawing(trained)) == 0
    assert codes == [2]
    assert len(os.listdir("out/images")) == 20


def test_two_classes_that_are_alike_as_file_names(folder, monkeypatch):
    """`a b` and `a_b` stay apart in the names of the files."""
    for i, name in enumerate(("a b", "a_b")):
        (folder / "pictures" / name).mkdir(parents=True)
        for k in range(4):
            Image.new("L", (8, 8), 100 * i + k).save(folder / "pictures" / name / f"{k}.png")
    path = diffuser.train(tiny_training(dataset="folder", path_to_data="pictures", img_size=(8, 8), batch_size=4))
    assert main(["--mode", "inference", "--model_path", str(path), "--num_images", "2", "--steps", "2", "--save_dir", "out"]) == 0
    assert sorted(os.listdir("out/images")) == ["000000_a_b-0.png", "000001_a_b-1.png"]


def test_autoguidance_through_the_command_line(trained, folder, capsys):
    """--guide_path guides away from a weaker model, with other images than without; one that does not fit is refused."""
    assert main([*TRAIN, "--emb_dim", "4"]) == 0
    assert main([*TRAIN, "--emb_dim", "4", "--timesteps", "30"]) == 0
    fits, other = (f"checkpoints/diffusion_checkpoint_digits_{T}_4_attention.pt" for T in (20, 30))
    flags = ["--mode", "inference", "--model_path", str(trained), "--num_images", "4", "--steps", "4", "--guidance_scale", "2"]
    assert main([*flags, "--guide_path", fits, "--save_dir", "guided"]) == 0 and main([*flags, "--save_dir", "plain"]) == 0
    first = [np.asarray(Image.open(f"{d}/images/000000_0.png"), dtype=int) for d in ("guided", "plain")]
    assert np.abs(first[0] - first[1]).max() > 0
    assert "does not fit the model in schedule" in fails(capsys, *flags, "--guide_path", other)
    assert "there is no checkpoint gone.pt" in fails(capsys, *flags, "--guide_path", "gone.pt")


def test_first_and_seeds_draw_the_images_of_other_draws(trained, folder, capsys):
    """--first: images N, N + 1, ... of a larger draw, class and number too; --seeds: the first image of each seed."""
    flags = ["--mode", "inference", "--model_path", str(trained), "--classes", "3,7", "--steps", "3"]
    assert main([*flags, "--num_images", "6", "--save_dir", "all"]) == 0
    assert main([*flags, "--first", "3", "--num_images", "2", "--save_dir", "some", "--trajectory"]) == 0
    assert sorted(os.listdir("some/images")) == ["000003_7.png", "000004_3.png"]
    assert main([*flags, "--seeds", "0,8-9", "--save_dir", "seeds", "--trajectory"]) == 0
    assert sorted(os.listdir("seeds/images")) == ["000000_3.png", "000008_7.png", "000009_3.png"]
    assert main([*flags, "--seed", "9", "--num_images", "1", "--save_dir", "nine"]) == 0
    pairs = [("some/images/000003_7.png", "all/images/000003_7.png"), ("seeds/images/000000_3.png", "all/images/000000_3.png"),
             ("seeds/images/000009_3.png", "nine/images/000000_3.png")]
    for ours, theirs in pairs:
        one, other = (np.asarray(Image.open(path), dtype=int) for path in (ours, theirs))
        assert np.abs(one - other).max() <= 1, ours
    assert json.loads((folder / "seeds/samples.json").read_text())["config"]["seeds"] == "0,8-9"
    for more, words in ((["--num_images", "2"], "leave --num_images out"), (["--seed", "1"], "leave --seed out"),
                        (["--first", "1"], "leave --first out")):
        assert words in fails(capsys, *flags, "--seeds", "1,2", *more)
    assert "numbers and ranges" in fails(capsys, *flags, "--seeds", "one")


def test_all_classes_by_default_and_none_on_request(trained, folder):
    """Without --classes every class gets its share; --use_labels False draws without labels."""
    flags = ["--mode", "inference", "--model_path", str(trained), "--num_images", "20", "--steps", "2"]
    assert main([*flags, "--use_labels", "True", "--save_dir", "a"]) == 0
    assert [n[7] for n in sorted(os.listdir("a/images"))] == list("01234567890123456789")
    assert main([*flags, "--use_labels", "False", "--save_dir", "b"]) == 0
    assert {n[7:] for n in os.listdir("b/images")} == {"image.png"}


def test_sequential_and_batch_give_the_same_files(trained, folder):
    """--sequential draws the images of batch generation, to one grey level."""
    flags = ["--mode", "inference", "--model_path", str(trained), "--num_images", "4", "--steps", "4", "--save_dir"]
    assert main([*flags, "one", "--sequential"]) == 0 and main([*flags, "many"]) == 0
    for file in os.listdir("one/images"):
        one, many = (np.asarray(Image.open(f"{d}/images/{file}"), dtype=int) for d in ("one", "many"))
        assert abs(one - many).max() <= 1


@pytest.mark.parametrize("flags, words", [
    (["--model_path", "gone.pt"], "no checkpoint gone.pt"), (["--classes", "cat"], "unknown class cat"),
    (["--timesteps", "30"], "timesteps is 20 there, 30 asked for"), (["--steps", "50"], "steps 50")])
def test_bad_inference_requests(trained, capsys, flags, words):
    """A checkpoint, class or schedule that is not there: exit 2, no output folder."""
    flags = flags if "--model_path" in flags else ["--model_path", str(trained), *flags]
    assert words in fails(capsys, "--mode", "inference", "--save_dir", "out", *flags)
    assert not os.path.exists("out/images")


def test_unconditional_models(folder, capsys):
    """A model without classes is asked only for a number, and asking it for classes is an error."""
    path = diffuser.train(tiny_training(use_labels=False))
    assert "without classes" in fails(capsys, "--mode", "inference", "--model_path", str(path), "--classes", "3")
    done = cli("--mode", "inference", "--model_path", path, "--steps", 2, cwd=folder, stdin="2\nq\n")
    assert done.returncode == 0 and len(os.listdir("samples/inference_digits_1/images")) == 2


def test_conversation_through_a_pipe(trained, folder):
    """Choose a checkpoint, draw twice, with wrong answers in between, and quit."""
    diffuser.train(tiny_training(experiment_name="other"))
    answers = "9\nx\n2\n11\nthree\n3 7\n0\n2\nall\n1\n-1\n"
    done = cli("--mode", "inference", "--steps", 2, "--yes", "false", cwd=folder, stdin=answers)
    assert done.returncode == 0, done.stderr
    assert "digits, epoch" in done.stdout and "a number from 1 to 2" in done.stdout
    assert "unknown class 11" in done.stdout and "unknown class three" in done.stdout and "--num_images" in done.stdout
    assert len(os.listdir("samples/inference_digits_1/images")) == 4 and len(os.listdir("samples/inference_digits_2/images")) == 10
    assert str(trained) in json.loads((folder / "samples/inference_digits_1/samples.json").read_text())["checkpoint"]


def test_training_conversation_through_a_pipe(folder):
    """--mode train asks for data and length, then for other settings on request; a wrong answer is asked again."""
    settings = [n for n, s in diffuser.FIELDS.items() if s.metadata["ask"] and n != "mode"]
    given = {"batch_size": "600", "timesteps": "many\n30", "schedule_type": "l", "emb_dim": "8", "base_channels": "8"}
    answers = "\n".join(["nothing", "digit", "soon", "1 epoch", "y", *(given.get(n, "") for n in settings)])
    done = cli("--mode", "train", "--channel_mults", "1,2", "--num_res_blocks", "1", "--preview_steps", "2", cwd=folder,
               stdin=f"{answers}\n")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is none of the choices" in done.stdout and "--timesteps wants a whole number" in done.stdout
    assert "20 epochs" in done.stdout and "such as 20 epochs" in done.stdout
    config = json.loads(next(folder.rglob("config.json")).read_text())["config"]
    assert (config["timesteps"], config["emb_dim"], config["epochs"], config["batch_size"]) == (30, 8, 1, 600)
    assert config["schedule_type"] == "linear"
    assert config["learning_rate"] == diffuser.PRESETS["digits"]["learning_rate"]  # Enter took the preset's


def answer(monkeypatch, *answers):
    """Answer questions one after the other; gives the list of what was asked."""
    left = iter(answers)
    questions = []

    def reply(question):
        questions.append(question)
        return next(left)

    monkeypatch.setattr("builtins.input", reply)
    return questions


@pytest.mark.parametrize("data, settings", [("digits", []), ("mnist", [""]), ("6", ["pictures"]), ("pictures", [])])
def test_three_questions_at_most_before_the_rest(image_folder, folder, monkeypatch, data, settings):
    """Data, folder or settings to begin with, length; then whether anything else is to be changed, and no more."""
    questions = answer(monkeypatch, data, *settings, "", "n")
    asked = diffuser.ask_training({"mode": "train"})
    assert len(questions) == 3 + len(settings)
    if "pictures" in (data, *settings):
        assert (asked["dataset"], asked["path_to_data"]) == ("folder", "pictures")
    else:
        assert asked["dataset"] == data


@pytest.mark.parametrize("text, chosen", [
    ("digits", "digits"), ("2", "mnist"), ("mn", "mnist"), ("MNIST", "mnist"), ("ce", "celeba"), ("cifar10", "cifar10")])
def test_choices_by_name_number_and_beginning(text, chosen):
    """A choice is meant by its name, its number in the list, or a beginning that no other has."""
    assert diffuser.choose(text, tuple(diffuser.DATASETS)) == chosen


@pytest.mark.parametrize("text, words", [
    ("c", "choose from digits"), ("0", "choose from"), ("minst", "did you mean mnist?"), ("", "nothing is none"),
    ("9" * 5000, "choose from")])
def test_what_is_no_choice(text, words):
    """What means no choice, or several, is told with the nearest or all of them."""
    with pytest.raises(diffuser.UserError) as error:
        diffuser.choose(text, tuple(diffuser.DATASETS))
    assert words in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize("text, length", [
    ("", dict(epochs=10)), ("7", dict(epochs=7)), ("5 minutes", dict(train_minutes=5.0)), ("0.5min", dict(train_minutes=0.5)),
    ("200 s", dict(iterations=200)), ("3 epoch", dict(epochs=3))])
def test_lengths_in_any_unit(monkeypatch, text, length):
    """A length has a unit or takes that of the default."""
    answer(monkeypatch, text)
    asked = diffuser.ask_length({"dataset": "digits"})
    assert asked == {"dataset": "digits", **length}


def test_nothing_is_asked_that_has_no_effect(monkeypatch):
    """Betas are not asked for after a schedule that has its own."""
    def questions(schedule):
        asked = answer(monkeypatch, "digits", "", "y", "", schedule, *[""] * 20)
        diffuser.ask_training({"mode": "train"})
        return "".join(asked)

    assert "beta_start" in questions("linear") and "beta_start" not in questions("cosine")


def test_questions_break_between_words(monkeypatch):
    """At 80 columns no question or hint is broken inside a word."""
    monkeypatch.setenv("COLUMNS", "80")
    asked = answer(monkeypatch, "digits", "", "y", *[""] * 20)
    diffuser.ask_training({"mode": "train"})
    lines = "\n".join(asked).split("\n")
    assert max(map(len, lines)) <= 80 and any(len(line) > 60 for line in lines)


def test_the_experiment_selects_what_is_drawn_from(folder, monkeypatch, capsys):
    """--experiment_name draws from that run, not the newest; the menu and the run's title show names."""
    for name in ("emoji", "emoji2"):
        diffuser.train(tiny_training(experiment_name=name))
    flags = ["--mode", "inference", "--device", "cpu", "--steps", "2", "--num_images", "2"]
    assert main([*flags, "--experiment_name", "emoji", "--yes", "--save_dir", "out"]) == 0
    assert "checkpoints/emoji/" in json.loads((folder / "out/samples.json").read_text())["checkpoint"]
    assert "emoji (digits), epoch" in capsys.readouterr().out

    answer(monkeypatch, "q")
    assert main(flags) == 0
    assert "emoji2 (digits), epoch" in capsys.readouterr().out


@pytest.mark.parametrize("name, words", [("nosuch", "there are emoji"), ("emojy", "did you mean emoji?")])
def test_an_unknown_experiment_lists_those_there_are(folder, capsys, name, words):
    """Nothing is drawn from another run than the one that is named."""
    diffuser.train(tiny_training(experiment_name="emoji"))
    error = fails(capsys, "--mode", "inference", "--experiment_name", name, "--yes")
    assert words in error and name in error


@pytest.mark.parametrize("arguments, flag", [
    ([], "--mode"), (["--mode", "train"], "--dataset"), (["--mode", "train", "--path_to_data", "nowhere"], "nowhere")])
def test_end_of_input_names_the_flag(folder, arguments, flag):
    """When nobody answers the program exits 2 and names the flag that would have."""
    done = cli(*arguments, cwd=folder)
    assert done.returncode == 2 and flag in done.stderr and "Traceback" not in done.stderr


def test_end_of_input_in_a_conversation(trained, folder):
    """The same when input ends at the question for classes."""
    done = cli("--mode", "inference", "--model_path", trained, cwd=folder)
    assert done.returncode == 2 and "--classes" in done.stderr


def test_enter_at_every_question(folder):
    """Enter takes the default everywhere, the dataset included."""
    done = cli("--iterations", 1, "--base_channels", 8, "--channel_mults", "1,2", "--preview_steps", 1, cwd=folder, stdin="\n" * 4)
    assert done.returncode == 0 and len(list(folder.rglob("*digits*.pt"))) == 1, done.stderr


def test_no_checkpoint_says_how_to_make_one(folder, capsys):
    """Inference before training: exit 2 and what to do."""
    assert "train first" in fails(capsys, "--mode", "inference")


def test_yes_asks_nothing(trained, folder):
    """--yes draws from the newest checkpoint without a question."""
    done = cli("--mode", "inference", "--yes", "--num_images", 3, "--steps", 2, cwd=folder)
    assert done.returncode == 0 and len(os.listdir("samples/inference_digits_1/images")) == 3


def terminal(command, cwd, steps, timeout=60):
    """Drive a script through a pseudo-terminal: wait for each text, then send the answer. (output, status)"""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    with open(slave, "r+b", buffering=0) as screen:
        process = prepared.background(command, cwd, {"TERM": "dumb"}, screen, screen, screen)
    output, deadline = "", time.time() + timeout

    def read_until(wanted, until):
        nonlocal output
        while wanted not in output and time.time() < until:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    output += os.read(master, 4096).decode(errors="replace")
                except OSError:                                              # the program has ended
                    return
    for wanted, answer in steps:
        read_until(wanted, deadline)
        assert wanted in output, output
        time.sleep(0.1)                                                      # a key typed before input() reads is lost
        output = ""
        os.write(master, answer)
    while process.poll() is None and time.time() < deadline:
        read_until("\0", time.time() + 2)
        if len(steps[-1][1]) == 1 and process.poll() is None:                # a control key: press it again
            with contextlib.suppress(OSError):
                os.write(master, steps[-1][1])
    process.kill()
    process.wait()
    os.close(master)
    return output, process.returncode


def test_conversation_in_a_terminal(trained, folder):
    """The same questions with a person at a terminal: an answer, a wrong one, quit."""
    command = [ROOT / "diffuser.py", "--mode", "inference", "--steps", "2"]
    output, status = terminal(command, folder, [("classes (names or", b"elephant\n"), ("unknown class", b"5\n"),
                                                ("how many", b"2\n"), ("classes (names or", b"q\n")])
    assert status == 0 and len(os.listdir(folder / "samples/inference_digits_1/images")) == 2


def test_no_bar_is_left_behind(folder, image_folder):
    """In a terminal of 80 columns the first run over a folder, which fills the cache, leaves no dead bar above the live one."""
    command = [ROOT / "diffuser.py", "--mode", "train", "--path_to_data", image_folder, "--img_size", "16", "--iterations", "3",
               "--batch_size", "4", "--timesteps", "20", *TINY_FLAGS]
    output, status = terminal(command, folder, [("caching images", b"")])
    *lines, _ = output.split("\n")
    seen = [line.rstrip("\r").rpartition("\r")[2] for line in lines]            # what stays of each line
    assert status == 0 and any("trained in" in line for line in seen)
    assert not any("caching" in line for line in seen), seen


def test_dry_run_tells_the_time_and_what_is_unusual(folder, capsys, monkeypatch):
    """--dry_run: a time from real steps on made-up images, and the preset's value behind what differs; no data is read."""
    monkeypatch.setattr(diffuser, "load_data", lambda *a: pytest.fail("read"))
    flags = ["--mode", "train", "--dataset", "mnist", "--dry_run", "--timesteps", "30", "--device", "cpu"]
    assert main([*flags, "--base_channels", "8", "--iterations", "50"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"(?m)^timesteps = 30 +\(preset: 500\)$", out) and re.search(r"(?m)^base_channels = 8 +\(preset: 32\)$", out)
    assert re.search(r"(?m)^beta_end = 0.01$", out) and re.search(r"(?m)^time     about .*: 50 steps of [\d.]+ m?s, and the grids$", out)
    assert main([*flags, "--base_channels", "8", "--train_minutes", "2"]) == 0
    assert re.search(r"(?m)^time     2 min: about [\d,]+ steps of ", capsys.readouterr().out)
    monkeypatch.setattr(diffuser, "TRIAL_WORK", 10.0)
    assert main([*flags, "--base_channels", "8"]) == 0
    assert "time     not measured: a step of" in capsys.readouterr().out and not list(folder.iterdir())


def test_dry_run_computes_as_the_run_will(folder, capsys, monkeypatch):
    """Minutes say how long a run is, not the epochs that it would have without them: a long one is compiled on CUDA."""
    asked = []
    choose = diffuser.choose_compute
    monkeypatch.setattr(diffuser, "choose_compute", lambda cfg, device, calls=0, *a: asked.append(calls) or choose(cfg, device, calls, *a))
    monkeypatch.setattr(diffuser, "describe_time", lambda *a: "")
    flags = ["--mode", "train", "--dataset", "digits", "--dry_run", "--device", "cpu"]
    assert main([*flags, "--train_minutes", "60"]) == 0 and main([*flags, "--iterations", "50"]) == 0
    assert asked[0] >= 20_000 and asked[1] == 50


def test_a_time_estimated_with_part_of_a_batch(folder, monkeypatch):
    """A step is as long as the part of its batch that was tried, times the rest."""
    clock = [0.0]
    monkeypatch.setattr(diffuser.time, "perf_counter", lambda: clock[0])

    def step(self):
        clock[0] += 0.01 * self.part

    monkeypatch.setattr(diffuser.Trainer, "train_step", step)
    cfg = tiny_training(batch_size=100, gradient_accumulation_steps=2)
    assert diffuser.time_a_step(cfg, diffuser.Devices(cfg), (1, 8, 8), 10) == pytest.approx(2.0)


def test_check_says_what_is_missing(folder, capsys, monkeypatch):
    """--check: machine, packages, room, speed, a step and a picture; 0 where it can train, 1 with the reason otherwise."""
    monkeypatch.setattr(diffuser, "is_installed", lambda module: module != "wandb")
    assert main(["--check", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for words in ("python ", "torch ", "cpu: ", "GiB free", "fp32 ", "bf16 ", "GFLOP/s", "a step of the digits preset", "a digit in", "can train",
                  "missing  wandb, for --use_wandb: pip install wandb\n"):
        assert words in out, words
    (folder / "file").write_text("")
    assert "choose another --working_directory" in fails(capsys, "--check", "--working_directory", "file/x", code=1)
    monkeypatch.setattr(diffuser.Trainer, "train_step", lambda self: 1 / 0)
    assert "division by zero" in fails(capsys, "--check", code=1)
    if not torch.cuda.is_available():
        assert "--device cpu" in fails(capsys, "--check", "--device", "cuda", code=1)
    assert os.listdir() == ["file"]


def test_without_its_packages_the_program_says_how_to_get_them(folder):
    """No torch: a line that names what is missing, and no traceback."""
    done = subprocess.run([sys.executable, "-S", str(ROOT / "diffuser.py"), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "torch" in done.stderr and "requirements.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_choice_of_a_checkpoint(trained, monkeypatch, capsys):
    """Of several one is asked for, until a number of the list is given; q quits, as at every question of inference."""
    shutil.copy(trained, "checkpoints/other.pt")
    for answers, status in ((["²", "3", "0", "q"], 0), (["2", "q"], 0), (["2", "5", "-1"], 0)):
        left = iter(answers)
        monkeypatch.setattr("builtins.input", lambda question, left=left: next(left))
        assert main(["--mode", "inference", "--device", "cpu"]) == status and list(left) == []
    assert capsys.readouterr().out.count("a number from 1 to 2, please") == 3


@pytest.mark.parametrize("arguments, question", [
    ([], "mode"), (["--mode", "train"], "what to train on"), (["--mode", "inference"], "classes (names or")])
@pytest.mark.parametrize("key, code", [(b"\x03", 130), (b"\x04", 2)])
def test_ctrl_c_and_ctrl_d_at_a_question(trained, folder, arguments, question, key, code):
    """Ctrl-C leaves with 130 and Ctrl-D with 2, without a traceback."""
    output, status = terminal([ROOT / "diffuser.py", *arguments], folder, [(question, key)])
    assert status == code and "Traceback" not in output


def test_interrupted_sampling_keeps_what_is_drawn(trained, folder):
    """Ctrl-C while drawing: exit 130, no traceback, and every picture that is there is whole."""
    command = [ROOT / "diffuser.py", "--mode", "inference", "--model_path", trained, "--num_images", "5000", "--steps", "2",
               "--sample_batch_size", "5", "--save_dir", "out"]
    with open("errors", "w") as errors:
        process = prepared.background(command, folder, stderr=errors)
    deadline = time.time() + 60
    while time.time() < deadline and not (os.path.isdir("out/images") and len(os.listdir("out/images")) > 10):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130 and "Traceback" not in (folder / "errors").read_text()
    for file in os.listdir("out/images"):
        Image.open(f"out/images/{file}").load()


SHORTER = {"epochs=50": "iterations=3, preview_steps=2, base_channels=8, batch_size=16, report=False",
           "iterations=1000": "iterations=2, preview_steps=2, base_channels=32, batch_size=8, report=False", "in range(500)": "in range(3)",
           "iterations=200": "iterations=50, base_channels=8"}


@pytest.mark.parametrize("file, leaves", [("README.md", ["digit.png", "digits.gif", "mine.pt"]), ("CONTRIBUTING.md", [])])
def test_the_python_in_the_documents(folder, capsys, file, leaves):
    """All blocks of Python, one after the other, run as they stand there, in fewer steps, and leave what they name."""
    blocks = [part.split("```")[0] for part in (ROOT / file).read_text().split("```python\n")[1:]]
    code = "\n".join(blocks)
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    exec(compile(code, file, "exec"), {})
    assert all((folder / name).exists() for name in leaves) and "network  UNet, " in capsys.readouterr().out
    if "digits.gif" in leaves:
        with Image.open("digits.gif") as picture:
            assert picture.n_frames > 20 and picture.size == (288, 72)
        assert main(["--mode", "inference", "--model_path", "mine.pt", "--num_images", "2", "--steps", "2", "--save_dir", "out"]) == 0
        assert len(os.listdir("out/images")) == 2


def test_images_of_ones_own(folder):
    """A tensor is trained on and gone on with like any dataset, with the checks of one; its checkpoint draws."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    data = diffuser.ImageData(images, torch.arange(40) % 2, ["cat", "dog"])
    cfg = diffuser.configure(**{**TINY, "dataset": "folder", "iterations": 2, "batch_size": 8, "preview_steps": 2, "device": "cpu",
                                "head_dim": 0, "attention_levels": (), "report": False})
    path = diffuser.train(cfg, data=data)
    assert diffuser.load(path).generate(["dog"], 2, steps=2).shape == (2, 3, 16, 16)
    again = diffuser.train(dataclasses.replace(cfg, iterations=4), data=data)
    assert again == path and diffuser.load_checkpoint(path)["step"] == 4
    with pytest.raises(diffuser.UserError, match="other images"):
        diffuser.train(cfg, data=diffuser.ImageData(255 - images, data.labels, data.class_names))
    unnamed = dataclasses.replace(cfg, dataset="", experiment_name="e")
    assert diffuser.load(diffuser.train(unnamed, data=diffuser.ImageData(images))).class_names == []


@pytest.mark.parametrize("broken, words", [
    (dict(images=torch.zeros(4, 1, 8, 8)), "uint8"), (dict(images=torch.zeros(4, 8, 8, dtype=torch.uint8)), "uint8"),
    (dict(images=torch.zeros(0, 1, 8, 8, dtype=torch.uint8)), "uint8"), (dict(images=torch.zeros(4, 2, 8, 8, dtype=torch.uint8)), "C 1 or 3"),
    (dict(labels=torch.zeros(3, dtype=torch.int64)), "one for each"), (dict(labels=torch.zeros(4)), "int64"),
    (dict(labels=torch.arange(4)), "3, but there are 2"), (dict(class_names=[], labels=torch.ones(4, dtype=torch.int64)), "class_names"),
    (dict(images=torch.zeros(4, 1, 9, 9, dtype=torch.uint8)), "does not divide")])
def test_wrong_images_of_ones_own_are_told(folder, broken, words):
    """Each in a line, before anything is written."""
    data = diffuser.ImageData(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4) % 2, ["a", "b"])
    with pytest.raises(diffuser.UserError, match=words):
        diffuser.Trainer(tiny_training(), data=dataclasses.replace(data, **broken))
    with pytest.raises(diffuser.UserError, match="uncropped"):
        diffuser.train(tiny_training(random_crop=True), data=data)
    with pytest.raises(diffuser.UserError, match="dataset is missing"):
        diffuser.train(diffuser.configure())
    assert not list(folder.rglob("*.pt"))


def test_a_saved_model_is_a_checkpoint(trained, folder):
    """Model.save: loading it gives the same images, also through the command line and for fine-tuning; a network that the options
    do not describe is refused."""
    model = diffuser.load(trained)
    assert model.save("kept/model.pt") == diffuser.Path("kept/model.pt")
    assert torch.equal(diffuser.load("kept/model.pt").generate(["3"], 2, steps=3), model.generate(["3"], 2, steps=3))
    assert main(["--mode", "inference", "--model_path", "kept/model.pt", "--num_images", "2", "--steps", "2", "--save_dir", "out"]) == 0
    assert main([*TRAIN, "--experiment_name", "tuned", "--init_from", "kept/model.pt"]) == 0

    class Nothing(torch.nn.Module):
        def forward(self, xt, t, y):
            return torch.zeros_like(xt)

    own = diffuser.Model.from_network(Nothing(), model.config, (3, 4, 6))
    assert own.generate(2, steps=2).shape == (2, 3, 4, 6)
    with pytest.raises(diffuser.UserError, match=r"nothing\.pt was not written"):
        own.save("nothing.pt")
    assert not os.path.exists("nothing.pt")


def test_models_and_trainers_say_what_they_are(trained):
    """Three lines each: images, network, and how it draws or where it stands."""
    model, trainer = diffuser.load(trained, device="cpu"), diffuser.Trainer(tiny_training())
    trainer.train_step()
    for thing, words in ((model, "dpmpp, 10 steps"), (trainer, "step 1 of 4")):
        lines = repr(thing).splitlines()
        assert len(lines) == 3 and max(map(len, lines)) < 120 and words in lines[2]
        assert "digits 8x8x1, 10 classes: 0, 1" in lines[0] and "parameters on cpu" in lines[1]


def test_a_number_alone_is_a_number_of_images(trained):
    """generate(5): five images; a number in a list is a class; two numbers are ambiguous."""
    model = diffuser.load(trained)
    assert model.generate(5, steps=2).shape == (5, 1, 8, 8) and model.generate([5], steps=2).shape == (1, 1, 8, 8)
    assert torch.equal(model.generate(2, steps=2), model.generate(num_images=2, steps=2))
    assert (model.generate(["3"], 3, steps=2)[2:].int() - model.generate(["3"], 1, first=2, steps=2).int()).abs().max() <= 1
    assert (model.generate(["3"], seeds=[0, 4], steps=2)[1:].int() - model.generate(["3"], seed=4, steps=2).int()).abs().max() <= 1
    for arguments in ((5, 3), (0,), (-1,), (None, 0)):
        with pytest.raises(diffuser.UserError, match="num"):
            model.generate(*arguments, steps=2)
    with pytest.raises(diffuser.UserError, match="one for each"):
        model.generate(3, seeds=[1, 2])


@pytest.mark.parametrize("settings", [dict(prediction="eps"), dict(timesteps=30), dict(base_channels=64)])
def test_load_refuses_another_network_or_schedule(trained, settings):
    """Around the weights of one another would draw noise without a word, as on the command line."""
    with pytest.raises(diffuser.UserError, match="does not fit"):
        diffuser.load(trained, device="cpu", **settings)
    assert diffuser.load(trained, device="cpu", timesteps=20, steps=3).config.steps == 3


@pytest.mark.parametrize("name", ["batch_size", "epochs", "guide_path", "device"])
def test_generate_refuses_what_is_no_sampling_option(trained, name):
    """An option of training, or of a whole invocation, would be passed over without a word."""
    with pytest.raises(diffuser.UserError, match=f"{name} is no sampling option"):
        diffuser.load(trained, device="cpu").generate(1, **{name: 4})


def test_errors_in_python_speak_of_no_flags(trained, capsys):
    """One message, two readers: steps in Python, --steps on the command line; and after a command it is Python again."""
    for _ in range(2):
        with pytest.raises(diffuser.UserError) as error:
            diffuser.load(trained).generate(["3"], steps=5000)
        assert str(error.value) == "steps 5000 is more than the 20 timesteps of the schedule"
        error = fails(capsys, "--mode", "inference", "--model_path", str(trained), "--steps", "5000")
        assert error == "diffuser: --steps 5000 is more than the 20 timesteps of the schedule\n"
    with pytest.raises(diffuser.UserError) as error:
        diffuser.load(trained, timesteps=30, precision="fp16", device="cpu")
    assert "--" not in str(error.value) and "flag" not in str(error.value)


def test_generate_returns_uint8_images(trained):
    """The API gives tensors of images and refuses what it cannot do."""
    model = diffuser.load(trained)
    assert model.generate(["3", 7], num_images=3, steps=2).dtype == torch.uint8
    assert model.generate(steps=2).shape == (1, 1, 8, 8)
    with pytest.raises(diffuser.UserError):
        model.generate(["3"], steps=0)
    with pytest.raises(diffuser.UserError, match=r"^eta is for sampler ddim"):
        model.generate(["3"], sampler="dpmpp", eta=0.5)


def test_mnist_end_to_end(real_data, folder):
    """Real MNIST: ten steps, interrupted, resumed, sampled and plotted through the command lines."""
    flags = ["--mode", "train", "--dataset", "mnist", "--data_dir", real_data, "--batch_size", "32", "--log_every", "5",
             "--checkpoint_rate", "5", *TINY_FLAGS, "--channel_mults", "1,2,2"]
    assert cli(*flags, "--iterations", "5", cwd=folder).returncode == 0
    done = cli(*flags, "--iterations", "10", cwd=folder)
    assert done.returncode == 0 and "resuming" in done.stdout and "28.49% of the signal" in done.stdout
    path = next(folder.rglob("*.pt"))
    assert cli("--mode", "inference", "--model_path", path, "--num_images", 10, "--steps", 3, "--save_dir", "out", cwd=folder).returncode == 0
    assert len(os.listdir("out/images")) == 10
    run = next((folder / "samples").glob("samples_*"))
    assert cli(run, "--no-show", cwd=folder, script="plot_loss.py").returncode == 0 and (run / "loss.png").exists()


ODD = ["", " ", "0", "-1", "1", "7", "16", "1e9", "1e400", "nan", "inf", "9" * 5000, "True", "none", "auto", "x", "1,2", "1x1", "4097",
       ",", "[1,2]", "日本", "\u0663", "\x1b[31m", "-", "../..", "/dev/null", "file", "file/x", "empty", "pictures", "~", "%s",
       "cuda", "fp16", "cat", "all", "best", "ho2020", "folder", "a" * 300, "1," * 50, "0x10", "+5"]


def sensible(name, chance):
    """A value that option `name` takes, or nearly."""
    meta = diffuser.FIELDS[name].metadata
    if diffuser.allowed_values(name):
        return str(chance.choice(diffuser.allowed_values(name)))
    if meta["lo"] is None:
        return chance.choice(ODD)
    value = chance.choice([meta["lo"], meta["hi"], meta["lo"] + 1, 1, 2, 8])
    return str(int(value) if diffuser.TYPES[name] is int else value)


def odd_command(chance, checkpoint):
    """A random command line that draws or trains nothing."""
    flags = list(chance.choice([["--mode", "train", "--dataset", "digits", *NETWORK], ["--mode", "train", "--path_to_data", "pictures", *NETWORK],
                                ["--mode", "inference", "--model_path", checkpoint], ["--mode", "inference"], []]))
    for name in chance.sample([n for n in diffuser.FIELDS if n not in ("mode", "data_dir", "debug", "dry_run", "check")], chance.randrange(1, 4)):
        flags.append(chance.choice([f"--{name}"] * 20 + [f"--no-{name}", f"--{name[:-1]}", f"--{name}=", f"--{name.upper()}"]))
        if chance.random() < 0.9:
            flags.append(sensible(name, chance) if chance.random() < 0.8 else chance.choice(ODD))
    return [*flags, "--dry_run", "True"]


@pytest.mark.parametrize("count", [80, pytest.param(500, marks=pytest.mark.slow)])
def test_no_flag_and_no_answer_leads_to_a_traceback(count, trained, folder, image_folder, monkeypatch, capsys):
    """Random command lines with random answers: each ends with 0, or with 1 or 2 and a message of at most two lines."""
    (folder / "file").write_text("x")
    (folder / "empty").mkdir()
    chance, codes = random.Random(0), set()
    for _ in range(count):
        flags = odd_command(chance, str(trained))
        answers = "\n".join(chance.choice([*ODD, "", "", "", "q"]) for _ in range(40))
        monkeypatch.setattr("sys.stdin", io.StringIO(answers))
        code = main(flags)
        errors = capsys.readouterr().err
        assert code in (0, 2) and len(errors.strip().splitlines()) <= 2 and (not code or errors.startswith("diffuser: ")), flags
        codes.add(code)
    assert codes == {0, 2}


@pytest.mark.slow
def test_every_flag_at_its_ends(folder, monkeypatch, capsys):
    """Training with each flag at the ends of its range or with each of its values works or is refused in two lines."""
    costly = {"batch_size", "gradient_accumulation_steps", "base_channels", "epochs", "iterations", "train_minutes", "mode", "debug",
              "img_size", "emb_dim", "compile", "dataset"}
    monkeypatch.setitem(sys.modules, "wandb", None)
    for name, spec in diffuser.FIELDS.items():
        meta = spec.metadata
        ends = diffuser.allowed_values(name) or (() if meta["lo"] is None else (meta["lo"], meta["hi"]))
        for value in () if name in costly else ends:
            text = str(int(value)) if isinstance(value, (int, float)) and value == int(value) else str(value)
            code = main([*TRAIN, "--experiment_name", "e", "--resume", "never", f"--{name}", text])
            errors = capsys.readouterr().err
            assert code in (0, 2) and len(errors.strip().splitlines()) <= 2, (name, value, errors)


@pytest.mark.parametrize("flags", [["--mode", "train"], ["--mode", "inference"]])
def test_answers_of_any_bytes(trained, folder, flags):
    """What is no text, or no input at all, ends with a question answered, asked again or named; never with a traceback."""
    chance = random.Random(0)
    rubbish = b"\n".join(chance.choice([b"", chance.randbytes(5).replace(b"\n", b""), b"\0", b"\xff\xfe", b"-1"]) for _ in range(60))
    (folder / "rubbish").write_bytes(rubbish + b"\n")
    command = [ROOT / "diffuser.py", *flags, *NETWORK]
    with open("rubbish", "rb") as stdin, open("errors", "w+b") as errors:
        if "train" in flags:
            status = prepared.background([*command, "--dry_run"], folder, None, stdin, stderr=errors).wait(timeout=60)
        else:
            status = subprocess.run([sys.executable, *command], stderr=errors, timeout=60, preexec_fn=lambda: os.close(0)).returncode
    assert status in (0, 2) and "Traceback" not in (folder / "errors").read_text(errors="replace")


def test_a_reader_that_goes_away(folder):
    """Output into a closed pipe, or nowhere at all, is no error and leaves nothing on stderr."""
    for lines in (0, 1):
        ours, theirs = os.pipe()
        with open(ours, "rb", buffering=0) as reader, open("errors", "wb") as errors, open(theirs, "wb") as stdout:
            if not lines:
                reader.close()
            process = prepared.background([ROOT / "diffuser.py", "--help", "all"], folder, None, None, stdout, errors)
            if lines:
                reader.read(1)
        assert process.wait(timeout=60) == 0 and (folder / "errors").read_text() == ""
    done = subprocess.run(f"{sys.executable} {ROOT / 'diffuser.py'} --help >&-", shell=True, capture_output=True, timeout=60)
    assert done.stderr == b""
