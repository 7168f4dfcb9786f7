#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "torchvision>=0.20", "numpy>=1.26", "matplotlib>=3.7", "pillow>=10.1", "tqdm>=4.66"]
# ///
"""diffuser: train and sample denoising diffusion models of images, in one file.

    python diffuser.py                                          asks what to do
    python diffuser.py --mode train --dataset digits            trains on the shipped digits
    python diffuser.py --mode train --dataset folder --path_to_data DIR_OR_ZIP --img_size 64
    python diffuser.py --mode inference                         picks a checkpoint, asks for classes
    python diffuser.py --mode inference --model_path C.pt --num_images 1000 --save_dir out
    torchrun --nproc_per_node 4 diffuser.py --mode train ...    one process per device
    python diffuser.py --help                                   every option

The same command resumes an interrupted run. From Python:

    import diffuser
    config = diffuser.configure(dataset="digits", epochs=50)
    model = diffuser.load(diffuser.train(config))
    images = model.generate(["3", "7"], num_images=8)           # uint8 [8, 1, 8, 8]

Chapters
     1  Configuration         every option once, presets, recipes
     2  Noise schedules       beta_t for t = 0..T-1
     3  Diffusion             q(x_t | x_0), what a network predicts, the loss
     4  U-Net                 residual blocks, attention, the network
     5  Samplers              from noise to image; guidance; the start of sampling
     6  Data                  datasets, the uint8 cache, batches
     7  Runtime               device, precision, processes, signals, logs
     8  EMA and checkpoints   averaging, safe files
     9  Training              one step, the loop
    10  Commands              train, inference, the questions they ask
    11  Command line          flags to settings

Notation
    x0, xt, xT      images [N, C, H, W], float in [-1, 1] before noise; uint8 outside the program
    eps, v          the noise in xt; sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
    t, T, ts        timestep, int64 [N], 0..T-1; their number; a descending grid of them
    beta, alpha_bar variance of step t; product of (1 - beta) up to t; alpha_bar_prev is 1 before t = 0
    x0_hat, eps_hat estimates from the network's output
    y               class labels, int64 [N]; the null class (no label) is num_classes
    cin, cout, emb  channels in, channels out, width of the conditioning vector
"""

from __future__ import annotations

import argparse
import copy
import csv
import ctypes
import dataclasses
import difflib
import errno
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from tqdm import tqdm

# ---- 1  Configuration --------------------------------------------------------------------------
# One frozen dataclass holds every option; each field makes its flag, default, help and question.


class UserError(Exception):
    """An expected end, told in a line or two. `code`: exit status, 2 bad usage, 1 failed, 128 + n signal n."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def first_line(error: Exception) -> str:
    """What a library's error says, on one short line."""
    return str(error).strip().split("\n")[0][:120] or type(error).__name__


def did_you_mean(wrong: str, known) -> str:
    """The nearest of the known names as a question, or nothing."""
    near = difflib.get_close_matches(wrong, known, 1)
    return f": did you mean {near[0]}?" if near else ""


def opt(default, help, *aliases, choices=None, spelled=None, lo=None, hi=None, ask=None, fixed=False, local=False,
        group=None):
    """One option. `choices`: a function that gives the allowed values; `spelled`: other spellings of them; `lo`,
    `hi`: range; `ask`: advice shown where the option is asked for; `fixed`: it shapes the network or the schedule,
    so a checkpoint cannot be resumed with another value; `local`: it belongs to one invocation and is never taken
    from a checkpoint; `group`: heading of this and the following options in --help."""
    return field(default=default, metadata=dict(help=help, aliases=aliases, choices=choices, spelled=spelled or {},
                                                lo=lo, hi=hi, ask=ask, fixed=fixed, local=local, group=group))


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Fields that are None take the dataset's or the device's own value."""

    # ruff: disable[E501]
    mode: str = opt("", "what to do", choices=lambda: COMMANDS, ask="train a model, or draw with one", local=True, group="run")
    dataset: str = opt("", "what to train on", choices=lambda: DATASETS, fixed=True, ask="digits is shipped and trains in a minute or two")
    recipe: str = opt("", "a whole configuration; best: what is best for the dataset today", choices=lambda: RECIPES, local=True)
    device: str = opt("auto", "auto: cuda, then mps, then cpu", choices=lambda: ("auto", "cuda", "mps", "cpu"), local=True)
    config: str = opt("", "options from the config.json of a run, to repeat it; flags beat them", local=True)
    seed: int = opt(0, "seed of everything random", lo=0, hi=2**63 - 1)
    yes: bool = opt(False, "ask nothing: take every default", local=True)
    dry_run: bool = opt(False, "print settings, parameters, steps and memory, then stop", local=True)
    debug: bool = opt(False, "show the traceback of a failure", local=True)

    data_dir: str = opt("data", "where datasets are, are downloaded to, and are cached", local=True, group="data")
    path_to_data: str = opt("", "image folder or ZIP file (dataset folder); subfolders are classes", local=True)
    img_size: tuple[int, int] | None = opt(None, "image size: a number or HxW", "--image_size", lo=1, hi=4096, fixed=True)
    channels: int | None = opt(None, "1 grey, 3 colour (default: what the images are)", choices=lambda: (1, 3), fixed=True)
    use_labels: bool | None = opt(None, "condition on class labels (default: where there are any)", fixed=True)
    flip: bool | None = opt(None, "mirror training images at random (default: where the dataset allows)")
    num_workers: int = opt(2, "processes that decode images into the cache", lo=0, hi=256, local=True)
    val_fraction: float = opt(0.02, "part of the data held out for the validation loss (at most 1,000 images)", lo=0, hi=0.5)

    timesteps: int = opt(1000, "diffusion steps T", "--num_timesteps", "--num_diffusion_timesteps", lo=2, hi=100_000, fixed=True, ask="more steps: finer noise levels; 500 to 1000 is usual", group="diffusion")
    schedule_type: str = opt("linear", "noise schedule", "--schedule", choices=lambda: SCHEDULES, spelled={"l": "linear", "cos": "cosine", "DNS": "dns"}, fixed=True, ask="cosine is gentler on small images")
    beta_start: float = opt(1e-4, "first beta (linear, dns)", "--schedule_low", lo=1e-9, hi=0.999, fixed=True, ask="variance of the first step")
    beta_end: float = opt(0.02, "last beta (linear, dns)", "--schedule_high", lo=1e-9, hi=0.999, fixed=True, ask="variance of the last step")
    cosine_s: float = opt(0.008, "offset s of the cosine schedule", lo=0, hi=1, fixed=True)
    scale_betas: bool = opt(False, "multiply beta_start and beta_end by 1000/T", fixed=True)
    prediction: str = opt("eps", "what the network predicts", choices=lambda: PREDICTIONS, fixed=True)
    zero_terminal_snr: bool = opt(False, "rescale the schedule so that nothing of the image is left at T", fixed=True)
    loss_fn: str = opt("mse", "loss", "--loss_type", choices=lambda: LOSSES, spelled={"l2": "mse", "l1": "mae"})
    min_snr_gamma: float = opt(0.0, "min-SNR weighting of the loss, usually 5; 0: none", "--snr_gamma", lo=0, hi=1e6)
    input_perturbation: float = opt(0.0, "extra noise on the network's input, usually 0.1; 0: none", lo=0, hi=10)
    time_sampling: str = opt("uniform", "how often each timestep is trained", choices=lambda: TIME_DENSITIES)
    time_mean: float = opt(0.0, "centre: log-odds of t/T (logit_normal), log-SNR (laplace)", lo=-100, hi=100)
    time_scale: float | None = opt(None, "width: deviation (logit_normal) [1], b (laplace) [0.5]", lo=1e-3, hi=1e3)

    base_channels: int = opt(64, "channels of the first level", "--starting_channels", lo=2, hi=4096, fixed=True, ask="wider is better and slower", group="network")
    channel_mults: tuple[float, ...] = opt((1, 2, 2), "channel multiplier of each level", lo=0.001, hi=64, fixed=True)
    num_res_blocks: int = opt(2, "residual blocks per level", lo=1, hi=16, fixed=True)
    use_attention: bool = opt(True, "self-attention at --attention_levels and in the bottleneck", fixed=True, ask="better structure for some time")
    attention_levels: tuple[int, ...] = opt((), "levels with attention, 0 the finest", "--attention_resolutions", lo=0, hi=16, fixed=True)
    up_attention_levels: tuple[int, ...] | None = opt(None, "levels with attention on the way up (default: --attention_levels)", lo=0, hi=16, fixed=True)
    mid_attention: str = opt("norm", "attention in the bottleneck: after a group norm, without, or none", choices=lambda: ("norm", "plain", "none"), fixed=True)
    num_heads: int = opt(4, "attention heads", lo=1, hi=1024, fixed=True)
    head_dim: int = opt(0, "channels per head; 0: use --num_heads", lo=0, hi=4096, fixed=True)
    emb_dim: int = opt(128, "embedding size; the conditioning vector has 4 x emb_dim entries", lo=1, hi=4096, fixed=True, ask="128 does for most")
    dropout: float = opt(0.0, "dropout in the residual blocks", lo=0, hi=0.99)
    patch_size: int = opt(1, "side of the squares of pixels that the network takes as one: 2 is up to four times faster at the same width", lo=1, hi=16, fixed=True)
    norm_groups: int = opt(32, "GroupNorm groups, lowered to a divisor of all levels' channels", lo=1, hi=1024, fixed=True)
    norm_eps: float = opt(1e-5, "added to the variance by GroupNorm; DDPM: 1e-6", lo=1e-12, hi=0.1, fixed=True)
    downsample_padding: int = opt(1, "padding of the halving convolutions: 1 on all sides; 0: right and bottom, as in DDPM", choices=lambda: (0, 1), fixed=True)
    freq_shift: float = opt(0.0, "takes this off the number of frequencies in the exponents of the embedding of t; DDPM: 1", lo=-1e4, hi=1e4, fixed=True)
    sin_first: bool = opt(False, "sines before cosines in the embedding of t, as in DDPM", fixed=True)
    conditioning: str = opt("scale_shift", "how time and class enter: scaling and shifting each block, added to it, or as extra input channels", choices=lambda: ("scale_shift", "add", "concat"), fixed=True)

    epochs: int = opt(100, "passes over the data", lo=1, hi=10**7, ask="one pass over the images each", group="training")
    iterations: int = opt(0, "optimizer steps; 0: use --epochs", "--num_training_steps", lo=0, hi=10**9)
    train_minutes: float = opt(0.0, "train for about that long: a few steps are timed, iterations set accordingly; 0: use --epochs", lo=0, hi=10**6)
    batch_size: int = opt(128, "images per step, over all devices", lo=1, hi=10**6, ask="lower it when memory runs out")
    gradient_accumulation_steps: int = opt(1, "micro-batches of batch_size that make one step", lo=1, hi=10**4)
    learning_rate: float = opt(1e-4, "highest learning rate", "--lr", lo=1e-12, hi=10, ask="1e-4 is safe, 1e-3 is fast for small networks")
    optimizer: str = opt("adamw", "optimizer", choices=lambda: OPTIMIZERS)
    weight_decay: float = opt(1e-4, "weight decay", lo=0, hi=10)
    lr_schedule: str = opt("onecycle", "learning rate over time", choices=lambda: LR_SCHEDULES)
    warmup_steps: int | None = opt(None, "steps of rising learning rate (default: a tenth of the run, at most 1000)", lo=0, hi=10**9)
    max_grad_norm: float = opt(1.0, "clip the gradient to this norm; 0: never", lo=0, hi=1e9)
    label_dropout: float = opt(0.1, "chance that a label is dropped, for guidance", lo=0, hi=1)
    use_ema: bool = opt(True, "average the weights and sample from the average")
    ema_decay: float = opt(0.9999, "decay of the average, warmed up as (1 + n) / (10 + n)", lo=0, hi=1)
    ema_update_rate: int = opt(1, "steps between updates of the average", lo=1, hi=10**6)
    ema_start: int = opt(0, "steps before averaging begins", lo=0, hi=10**9)
    early_stop_loss_change: float = opt(0.0, "stop when the mean absolute change of the last ten logged losses is below this; 0: never", lo=0, hi=1e9)
    scale_lr: bool = opt(False, "multiply the learning rate by the number of devices")
    num_gpus: int = opt(0, "GPUs for DataParallel; 0: all there are", lo=0, hi=64, local=True)
    precision: str = opt("auto", "auto: bf16 where it is faster, measured where that is not clear", choices=lambda: ("auto", *PRECISIONS), local=True)
    compile: bool | None = opt(None, "torch.compile the network (default: on cuda, for runs long enough)", local=True)
    channels_last: bool | None = opt(None, "store images channels last (default: but for mps)", local=True)
    deterministic: bool = opt(False, "only kernels that compute the same every time: slower on cuda, where a resumed run then ends bit for bit like an undisturbed one; CPUs always do", local=True)
    gradient_checkpointing: bool = opt(False, "compute activations again on the way back: about a third of the memory, a third more time")

    experiment_name: str = opt("", "names the run; keeps checkpoints by step in a folder of their own", local=True, group="output")
    working_directory: str = opt("checkpoints", "where checkpoints go", local=True)
    generated_directory: str = opt("samples", "where sample grids, metrics.csv and config.json go", local=True)
    sample_every: int = opt(1, "epochs between sample grids", lo=1, hi=10**7, ask="a grid shows how far training is")
    checkpoint_every: int = opt(1, "epochs between checkpoints", lo=1, hi=10**7)
    checkpoint_rate: int = opt(0, "steps between checkpoints, each with a grid, instead of going by epochs; 0: go by epochs", "--evaluation_interval", lo=0, hi=10**9)
    num_keep_checkpoints: int = opt(1, "checkpoints to keep", lo=1, hi=10**6)
    num_generations: int = opt(0, "images per class in a grid and rows of a denoising strip; 0: choose", lo=0, hi=1000)
    plot_freq_interval: int = opt(0, "timesteps between the pictures of a denoising strip beside each grid; 0: one strip, for the report", lo=0, hi=100_000)
    preview_steps: int = opt(20, "sampling steps of the grids drawn in training", lo=1, hi=100_000)
    log_every: int = opt(50, "steps between rows of metrics.csv", "--log_rate", lo=1, hi=10**9)
    resume: str = opt("auto", "auto: go on from the run's checkpoint; never: start over", choices=lambda: ("auto", "never"), local=True)
    resume_from_checkpoint: str = opt("", "go on from this checkpoint: checkpoint_STEP of the experiment, or a path", local=True)
    init_from: str = opt("", "fine-tune: start a new run from the weights in this checkpoint, whose network and schedule it takes over", local=True)
    use_wandb: bool = opt(False, "log to Weights & Biases", "--log_to_wandb", local=True)
    use_tensorboard: bool = opt(False, "log to TensorBoard", local=True)
    project_name: str = opt("diffuser", "Weights & Biases project", local=True)
    wandb_mode: str = opt("auto", "auto: what WANDB_MODE says, else online where a key is known", choices=lambda: ("auto", "online", "offline"), local=True)
    report: bool = opt(True, "write report.html into the samples folder when training ends", local=True)

    model_path: str = opt("", "checkpoint to sample from", local=True, group="sampling")
    classes: str = opt("", "classes to draw, by name or number: cat,3 or all", local=True)
    num_images: int | None = opt(None, "images to draw in all (default: 10 of each class)", lo=1, hi=10**7, local=True)
    save_dir: str = opt("", "folder for images/, grid.png and samples.json", local=True)
    sampler: str = opt("dpmpp", "sampler", choices=lambda: SAMPLERS, spelled={"dpm++": "dpmpp"})
    steps: int | None = opt(None, "sampling steps (default: 25; ddim 50; ddpm all T)", lo=1, hi=100_000)
    spacing: str = opt("trailing", "how the sampling steps lie in 0..T-1", choices=lambda: SPACINGS)
    eta: float = opt(0.0, "noise of ddim: 0 none, 1 as much as ddpm", lo=0, hi=1)
    variance: str = opt("small", "variance of the noise of ddpm: posterior (small) or beta (large)", choices=lambda: ("small", "large"))
    noise_scale: float = opt(1.0, "multiplies the noise added while sampling", lo=0, hi=10)
    use_noise_scaling: bool = opt(False, "let that noise fade in proportion to t/T")
    guidance_scale: float = opt(0.0, "classifier-free guidance w: (1 + w) eps_cond - w eps_uncond", lo=0, hi=1000)
    guidance_interval: tuple[float, float] | None = opt(None, "noise levels sqrt(1/alpha_bar - 1) between which guidance acts, such as 0.2,2 (default: all)", lo=0, hi=1e9)
    guide_path: str = opt("", "checkpoint of a weaker model to guide away from, instead of from the image without a label", local=True)
    eps_scale: float = opt(1.0, "divide the predicted noise by this, such as 1.005", lo=0.5, hi=2)
    clip_x0: bool = opt(True, "clip the estimate of x0 to [-1, 1] at every step")
    dynamic_threshold: float = opt(0.0, "clip it to this quantile of its own size instead, such as 0.995; 0: no", lo=0, hi=1)
    start: str = opt("matched", "start from the Gaussian that matches q(x_T), or from N(0, I)", choices=lambda: ("matched", "gaussian"))
    sequential: bool = opt(False, "draw one image at a time: the same images, slower")
    sample_batch_size: int | None = opt(None, "images drawn at a time (default: as many as keep the device busy)", lo=1, hi=10**6)
    trajectory: bool = opt(False, "also save trajectory.png: rows images, columns from noise to image", local=True)
    # ruff: enable[E501]


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
KINDS = {name: get_args(hint)[0] if type(None) in get_args(hint) else hint      # the type, or that of `type | None`
         for name, hint in get_type_hints(Config).items()}
LOCAL = {name for name, spec in FIELDS.items() if spec.metadata["local"]}

# The recommended settings of each dataset.
PRESETS = {
    "digits": dict(timesteps=1000, schedule_type="cosine", prediction="v", batch_size=64, learning_rate=4e-3,
                   emb_dim=32, base_channels=16, channel_mults=(1, 3), num_res_blocks=1, num_heads=2, norm_groups=8,
                   epochs=20, sample_every=5, checkpoint_every=5, ema_decay=0.995, num_gpus=1,
                   guidance_scale=0.5),
    "mnist": dict(timesteps=500, beta_start=1e-5, beta_end=0.01, batch_size=128, learning_rate=1e-3, emb_dim=32,
                  base_channels=32, channel_mults=(1, 2, 2), num_res_blocks=1, norm_groups=8, num_heads=4,
                  epochs=20, ema_decay=0.999, num_gpus=1),
    "cifar10": dict(timesteps=500, beta_start=1e-5, beta_end=0.012, batch_size=32, learning_rate=1e-4, emb_dim=128,
                    base_channels=128, channel_mults=(1, 2, 2, 2), attention_levels=(1,), num_heads=8,
                    dropout=0.1, epochs=500, sample_every=5),
    "cifar10_optimized": dict(timesteps=500, beta_start=1e-5, beta_end=0.012, batch_size=128, learning_rate=1e-4,
                              emb_dim=128, base_channels=64, channel_mults=(1, 2, 4), attention_levels=(2,),
                              num_heads=4, epochs=500, sample_every=5, num_gpus=1),
    "celeba": dict(timesteps=1000, schedule_type="cosine", batch_size=8, learning_rate=1e-4, emb_dim=256,
                   base_channels=64, channel_mults=(1, 2, 2, 4), attention_levels=(2,), head_dim=64, epochs=50),
    "folder": dict(timesteps=1000, batch_size=32, learning_rate=1e-4, emb_dim=128, base_channels=64,
                   channel_mults=(1, 2, 2, 4), attention_levels=(2,), head_dim=64, epochs=100),
}

# What benchmarks/ found best for a dataset: see its README for the experiments.
BEST = {
    "digits": dict(),                                                        # the preset is at the floor already
    "mnist": dict(timesteps=1000, schedule_type="cosine", prediction="x0", time_sampling="logit_normal", patch_size=2,
                  base_channels=64, channel_mults=(1, 2), batch_size=64, learning_rate=2e-3, train_minutes=10.0,
                  guidance_scale=0.3),
    "cifar10": dict(timesteps=1000, schedule_type="cosine", prediction="v", time_sampling="logit_normal",
                    base_channels=128, channel_mults=(1, 2, 2), attention_levels=(1,), num_heads=4, batch_size=128,
                    learning_rate=5e-4, ema_decay=0.9995, train_minutes=20.0, guidance_scale=0.2),
}

# Whole configurations: ho2020 is DDPM's CIFAR-10 network and training (Ho et al. 2020, appendix B).
RECIPES = {
    "ho2020": dict(base_channels=128, channel_mults=(1, 2, 2, 2), num_res_blocks=2, attention_levels=(1,), num_heads=1,
                   emb_dim=128, dropout=0.1, norm_groups=32, conditioning="add", use_labels=False, timesteps=1000,
                   schedule_type="linear", beta_start=1e-4, beta_end=0.02, optimizer="adam", weight_decay=0.0,
                   learning_rate=2e-4, lr_schedule="constant", warmup_steps=5000, batch_size=128, ema_decay=0.9999,
                   iterations=800_000),
    "celebahq128": dict(img_size=(128, 128), channels=3, base_channels=96, channel_mults=(1, 2, 3, 4), emb_dim=96,
                        attention_levels=(1, 2, 3), head_dim=32, batch_size=16, learning_rate=1e-4, warmup_steps=5000,
                        lr_schedule="cosine", weight_decay=1e-4, max_grad_norm=1.0, iterations=100_000,
                        checkpoint_rate=5000, num_keep_checkpoints=2, num_generations=5, plot_freq_interval=100),
    "best": dict(),
}


def parse_value(name: str, text: str):
    """The value of option `name` written as `text`, checked. Raises UserError."""
    meta, kind, text = FIELDS[name].metadata, KINDS[name], text.strip()
    if text == "auto" and FIELDS[name].default is None:
        return None
    try:
        if kind is bool:
            value = {"true": True, "yes": True, "y": True, "on": True, "1": True,
                     "false": False, "no": False, "n": False, "off": False, "0": False}[text.lower()]
        elif kind is str:
            value = meta["spelled"].get(text, text)
        elif kind in (int, float):
            value = kind(text)
        else:
            number = get_args(kind)[0]
            value = tuple(int(n) if n.isdecimal() else number(n)
                          for n in re.split(r"[,x\s]+", text.strip("[]() ")) if n)
            value = value * 2 if kind == tuple[int, int] and len(value) == 1 else value
    except (KeyError, ValueError):
        wanted = {bool: "True or False", int: "a whole number", float: "a number"}.get(kind, "numbers such as 1,2,2")
        raise UserError(f"--{name} wants {wanted}, not {text[:60]!r}") from None
    check_value(name, value)
    return value


def written(name: str, value) -> str:
    """A value as it is written behind its flag."""
    return ("x" if name == "img_size" else ",").join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_value(name: str, value) -> None:
    """Type, choices and range of one option. Raises UserError."""
    meta, entry_kinds = FIELDS[name].metadata, get_args(KINDS[name])         # of a tuple; () for a single value
    if value == FIELDS[name].default and value in (None, ""):
        return
    shown, entries = repr(value)[:60], value if isinstance(value, tuple) else (value,)
    kind = entry_kinds[0] if entry_kinds else KINDS[name]
    fits = all(isinstance(e, (int, float) if kind is float else kind) and isinstance(e, bool) == (kind is bool)
               for e in entries) and isinstance(value, tuple) == bool(entry_kinds)
    if not fits or (entry_kinds and ... not in entry_kinds and len(entries) != len(entry_kinds)):
        raise UserError(f"--{name} cannot be {shown}")
    if len(entries) > 16:
        raise UserError(f"--{name} takes at most 16 numbers, not {len(entries)}")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"--{name} cannot contain the character 0")
    if meta["choices"] and value not in meta["choices"]():
        raise UserError(f"--{name} is one of {', '.join(map(str, meta['choices']()))}, not {shown}")
    if meta["lo"] is not None and not all(meta["lo"] <= e <= meta["hi"] for e in entries):
        raise UserError(f"--{name} lies between {meta['lo']:g} and {meta['hi']:g}, not {shown}")


MAX_CHANNELS = 16_384                                                        # one 3x3 convolution of them: 10 GB


def check(cfg: Config) -> None:
    """Raise UserError for an option out of range or for options that contradict each other."""
    for name in FIELDS:
        check_value(name, getattr(cfg, name))
    levels = len(cfg.channel_mults)
    if cfg.beta_end < cfg.beta_start:
        raise UserError(f"--beta_end {cfg.beta_end:g} is below --beta_start {cfg.beta_start:g}: noise has to grow")
    if cfg.prediction == "eps" and cfg.zero_terminal_snr:
        raise UserError("--zero_terminal_snr needs --prediction v or x0: at T the noise tells nothing of the image")
    if cfg.guide_path and not cfg.guidance_scale:
        raise UserError("--guide_path needs --guidance_scale above 0")
    if cfg.guidance_interval and cfg.guidance_interval[0] > cfg.guidance_interval[1]:
        raise UserError(f"--guidance_interval {cfg.guidance_interval} begins above its end")
    if levels == 0:
        raise UserError("--channel_mults needs one entry per level, such as 1,2,2")
    widths = level_widths(cfg.base_channels, cfg.channel_mults)
    if max(widths) > MAX_CHANNELS:
        raise UserError(f"--base_channels x --channel_mults makes {max(widths):,} channels: {MAX_CHANNELS:,} at most")
    if any(abs(cfg.base_channels * m - width) > 1e-6 or width < 1
           for m, width in zip(cfg.channel_mults, widths, strict=True)):
        raise UserError(f"--channel_mults {cfg.channel_mults} make no whole numbers of {cfg.base_channels} channels")
    for level in sorted(attended_levels(cfg), reverse=True):
        if level >= levels:
            raise UserError(f"--attention_levels {level}: the network has levels 0 to {levels - 1}")
        width, flag = widths[level], "head_dim" if cfg.head_dim else "num_heads"
        if width % getattr(cfg, flag):
            raise UserError(f"--{flag} {getattr(cfg, flag)} does not divide the {width} channels of level {level}")
    if cfg.base_channels // 2 == cfg.freq_shift:
        raise UserError(f"--freq_shift {cfg.freq_shift:g} leaves none of the {cfg.base_channels // 2} frequencies")
    if cfg.steps and cfg.steps > cfg.timesteps:
        raise UserError(f"--steps {cfg.steps} is more than the {cfg.timesteps} timesteps of the schedule")
    if cfg.dataset:
        check_image_size(*image_shape(cfg)[1:], levels, cfg.patch_size)


def level_widths(base_channels: int, channel_mults: tuple[float, ...]) -> list[int]:
    """Channels of each level; a fraction may miss the whole number that it stands for by rounding."""
    return [round(base_channels * m) for m in channel_mults]


def attended_levels(cfg: Config) -> set[int]:
    """The levels with attention on the way down or up; the bottleneck counts as the last."""
    bottleneck = [len(cfg.channel_mults) - 1] if cfg.mid_attention != "none" else []
    return {*cfg.attention_levels, *(cfg.up_attention_levels or ()), *bottleneck} if cfg.use_attention else set()


def check_image_size(height: int, width: int, levels: int, patch_size: int = 1) -> None:
    """Each level below the first halves the image: raise UserError for a size that cannot be halved."""
    unit = patch_size * 2 ** (levels - 1)
    if height % unit or width % unit:
        near = [" or ".join(dict.fromkeys(str(max(unit, f(n / unit) * unit)) for f in (math.floor, math.ceil)))
                for n in (height, width)]
        raise UserError(f"image size {height}x{width} does not divide by {unit}, as {levels} levels need: nearest that "
                        f"do are height {near[0]}, width {near[1]} (--img_size), or use fewer --channel_mults")


def given_values(given: dict) -> dict:
    """Options asked for: a recipe's, overridden by flags. A path to images means dataset folder."""
    given = as_options(given)
    if given.get("epochs") or given.get("iterations"):                       # a length asked for beats one stored
        if given.get("train_minutes"):
            raise UserError("--train_minutes sets the number of steps: leave out --epochs and --iterations")
        given = {"iterations": 0, "train_minutes": 0.0, **given}
    if given.get("path_to_data") and not given.get("dataset"):
        given["dataset"] = "folder"
    if "num_heads" in given:                                                 # beats a preset's head_dim
        given = {"head_dim": 0, **given}
    stored = read_options(given["config"]) if given.get("config") else {}
    dataset = given.get("dataset") or stored.get("dataset")
    if given.get("recipe") == "best" and dataset:
        if dataset not in BEST:
            raise UserError(f"--recipe best knows {', '.join(BEST)}, not {dataset}: leave it out")
        given = {**BEST[dataset], **given}
    given = {**RECIPES.get(given.get("recipe", ""), {}), **given}
    longer = any(given.get(name) for name in LENGTHS)                        # another length than the stored one
    return {**{name: value for name, value in stored.items() if not (longer and name in LENGTHS)}, **given}


def with_tuples(values: dict) -> dict:
    """The values, lists as tuples: what JSON and checkpoints have for them."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def as_options(values: dict) -> dict:
    """Values as Python or JSON has them, as fields of Config: lists for tuples, a number for a square image, paths.
    Raises UserError for a name that is no option."""
    unknown = next((name for name in values if name not in FIELDS), None)
    if unknown:
        raise UserError(f"there is no option {unknown}{did_you_mean(unknown, FIELDS)}")
    options = {name: str(value) if isinstance(value, Path) else value for name, value in with_tuples(values).items()}
    if type(options.get("img_size")) is int:
        options["img_size"] = (options["img_size"],) * 2
    return options


LENGTHS = ("epochs", "iterations", "train_minutes")                          # settings that leave losses as they are


def read_options(path: str) -> dict:
    """The options in the config.json of a run, or in a file of options alone, that repeat it: those about a single
    invocation are left out, and of its lengths all but the one that counts. Raises UserError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        inner = content.get("config", content)                               # a string: an option of that name
        options = as_options(content if isinstance(inner, str) else inner)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--config {path} holds no options ({first_line(error)}): give a run's config.json") from error
    length = next((name for name in ("iterations", "train_minutes", "epochs") if options.get(name)), "")
    dropped = {"mode", "config", "recipe", "yes", "dry_run", "debug", "resume", "resume_from_checkpoint",
               *LENGTHS} - {length}
    return {"mode": "train", **{name: value for name, value in options.items() if name not in dropped and value != ""}}


def configure(checkpoint: dict | None = None, **given) -> Config:
    """Settings from `given`, then (when resuming) `checkpoint`, the configuration stored in one as a dictionary, then
    what a run takes over from `init_from`, then the dataset's preset, then defaults. Raises UserError."""
    given = given_values(given)
    # a run that goes on needs neither the file nor what it said
    taken_over = starting_options(given) if not checkpoint and Path(given.get("init_from", "")).is_file() else {}
    inherited = with_tuples({k: v for k, v in {**taken_over, **(checkpoint or {})}.items()
                             if k in FIELDS and k not in LOCAL})
    preset = dict(PRESETS.get(given.get("dataset") or inherited.get("dataset", ""), {}))
    if "channel_mults" in given and "attention_levels" in preset:            # only levels that are still there
        preset["attention_levels"] = tuple(n for n in preset["attention_levels"] if n < len(given["channel_mults"]))
    if "head_dim" in preset:                                                 # as far as it divides all levels
        network = {**preset, **inherited, **given}
        for name in ("base_channels", "channel_mults"):
            check_value(name, network[name])
        widths = level_widths(network["base_channels"], network["channel_mults"])
        preset["head_dim"] = math.gcd(preset["head_dim"], *widths)
    cfg = Config(**{**preset, **inherited, **given})
    check(cfg)
    return cfg


# ---- 2  Noise schedules ------------------------------------------------------------------------
# Pure functions (T, beta_start, beta_end, s) -> beta, float64 [T]; t = 0 is the first noise added.


def linear_beta(T: int, beta_start: float, beta_end: float, s: float) -> Tensor:
    """Equal steps from beta_start to beta_end (Ho et al. 2020)."""
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64)


def scaled_linear_beta(T: int, beta_start: float, beta_end: float, s: float) -> Tensor:
    """Equal steps of sqrt(beta) (Rombach et al. 2022, 2112.10752, code)."""
    return torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2


def geodiff_beta(T: int, beta_start: float, beta_end: float, s: float) -> Tensor:
    """beta itself follows a sigmoid from beta_start to beta_end (Xu et al. 2022, GeoDiff, 2203.02923, code)."""
    return torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid() * (beta_end - beta_start) + beta_start


def cosine_beta(T: int, beta_start: float, beta_end: float, s: float) -> Tensor:
    """Squared-cosine alpha_bar with offset s, beta capped at 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    return beta_of(torch.cos((torch.linspace(0, 1, T + 1, dtype=torch.float64) + s) / (1 + s) * math.pi / 2) ** 2)


def dns_beta(T: int, beta_start: float, beta_end: float, s: float, off: float = 5) -> Tensor:
    """Dynamic negative square: beta grows with the square of time between its two ends."""
    w = 1 - ((torch.arange(T, dtype=torch.float64) + off) / (T + 1 + off)) ** 2
    return (1 - w) * (beta_end - beta_start) + beta_start


def sigmoid_beta(T: int, beta_start: float, beta_end: float, s: float, lo: float = -3, hi: float = 3) -> Tensor:
    """Sigmoid alpha_bar between lo and hi, temperature 1, beta capped at 0.999 (Jabri et al. 2022, 2212.11972)."""
    return beta_of(torch.sigmoid(-torch.linspace(lo, hi, T + 1, dtype=torch.float64)) - 1 / (1 + math.exp(hi)))


def beta_of(alpha_bar: Tensor) -> Tensor:
    """beta [T] from a curve of alpha_bar at T + 1 times (any scale), capped at 0.999 so that no step erases all."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_beta, "cosine": cosine_beta, "dns": dns_beta, "sigmoid": sigmoid_beta,
             "scaled_linear": scaled_linear_beta, "geodiff": geodiff_beta}


def alpha_bar_table(cfg: Config) -> Tensor:
    """alpha_bar of the configured schedule, float64 [T], falling: the one curve all else is derived from."""
    scale = 1000 / cfg.timesteps if cfg.scale_betas else 1.0
    beta = SCHEDULES[cfg.schedule_type](cfg.timesteps, cfg.beta_start * scale, cfg.beta_end * scale, cfg.cosine_s)
    if beta.min() < 0 or beta.max() >= 1:
        raise UserError(f"--scale_betas makes betas up to {beta.max():g} with T = {cfg.timesteps}: lower --beta_end")
    alpha_bar = torch.cumprod(1 - beta, 0)
    return zero_terminal_snr(alpha_bar) if cfg.zero_terminal_snr else alpha_bar


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and stretch sqrt(alpha_bar) so that it ends at 0 and begins as it did (2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


# ---- 3  Diffusion ------------------------------------------------------------------------------
# The forward process, the one place where a network's output becomes (x0_hat, eps_hat), and the loss.


@dataclass(frozen=True)
class Prediction:
    """What a network learns. a = sqrt(alpha_bar_t), s = sqrt(1 - alpha_bar_t), snr = a^2 / s^2. target(x0, eps, a, s);
    x0_from(out, xt, a, s); min_snr(snr, gamma): the weight under which its squared error is that of x0 times
    min(snr, gamma) (2303.09556, sec. 3.4)."""

    target: Callable
    x0_from: Callable
    min_snr: Callable


PREDICTIONS = {
    "eps": Prediction(lambda x0, eps, a, s: eps,
                      lambda out, xt, a, s: (xt - s * out) / a,                                # DDPM, eq. 12
                      lambda snr, gamma: (gamma / snr).clamp(max=1)),
    "v": Prediction(lambda x0, eps, a, s: a * eps - s * x0,                                    # 2202.00512, sec. 4
                    lambda out, xt, a, s: a * xt - s * out,
                    lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1)),
    "x0": Prediction(lambda x0, eps, a, s: x0,
                     lambda out, xt, a, s: out,
                     lambda snr, gamma: snr.clamp(max=gamma)),
}

LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


def half_log_snr(alpha_bar: Tensor) -> Tensor:
    """log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), falling with t; where no signal is left a little counts as there."""
    return (alpha_bar.clamp(min=alpha_bar[alpha_bar > 0].min() / 100) / (1 - alpha_bar)).log() / 2


def logit_normal(alpha_bar: Tensor, mean: float, scale: float | None) -> Tensor:
    """t / T = sigmoid(n), n ~ N(mean, scale^2) (2403.03206, eq. 19)."""
    time = (torch.arange(len(alpha_bar), dtype=torch.float64) + 0.5) / len(alpha_bar)
    return -(((torch.logit(time) - mean) / (scale or 1.0)) ** 2) / 2 - (time * (1 - time)).log()


def laplace(alpha_bar: Tensor, mean: float, scale: float | None) -> Tensor:
    """log-SNR ~ Laplace(mean, scale): its density times the spacing of the timesteps (2407.03297, table 1)."""
    log_snr = 2 * half_log_snr(alpha_bar)
    return -(log_snr - mean).abs() / (scale or 0.5) + torch.gradient(-log_snr)[0].log()


# How often each timestep is trained: the logarithm [T], up to a constant, from alpha_bar, a centre and a width.
TIME_DENSITIES = {"uniform": lambda alpha_bar, mean, scale: torch.zeros_like(alpha_bar),
                  "logit_normal": logit_normal, "laplace": laplace}


class Diffusion:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x0, (1 - alpha_bar_t) I), and what a network says about it. alpha_bar:
    float64 [T]; prediction: a key of PREDICTIONS; loss_fn: a key of LOSSES; min_snr_gamma: 0 for no weighting;
    time_weights: float64 [T], how often each timestep is trained, by default alike."""

    def __init__(self, alpha_bar: Tensor, prediction: str = "eps", loss_fn: str = "mse", device="cpu",
                 min_snr_gamma: float = 0.0, time_weights: Tensor | None = None):
        self.alpha_bar, self.T = alpha_bar, len(alpha_bar)
        self.prediction, self.loss_fn = PREDICTIONS[prediction], LOSSES[loss_fn]
        snr, ones = alpha_bar / (1 - alpha_bar), torch.ones_like(alpha_bar)
        weight = self.prediction.min_snr(snr, min_snr_gamma) if min_snr_gamma else ones
        cdf = torch.cumsum(ones if time_weights is None else time_weights, 0)
        tables = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), weight, cdf / cdf[-1]
        self.signal, self.noise, self.weight, self.time_cdf = (table.float().to(device) for table in tables)  # [T] each

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each [N, 1, 1, 1]."""
        return self.signal[t].view(-1, 1, 1, 1), self.noise[t].view(-1, 1, 1, 1)

    def timesteps(self, u: Tensor) -> Tensor:
        """Timesteps to train on, int64 [N], from uniform numbers [N] in [0, 1): the inverse of their distribution."""
        return torch.searchsorted(self.time_cdf, u, right=True).clamp(max=self.T - 1)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t for noise eps (DDPM, eq. 4)."""
        a, s = self.scales(t)
        return a * x0 + s * eps

    def estimates(self, out: Tensor, xt: Tensor, t: Tensor, clip: bool = True, dynamic_threshold: float = 0.0,
                  eps_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(x0_hat, eps_hat) from the network's output, its noise divided by eps_scale (2308.15321). x0_hat is clipped
        to [-1, 1], or to the dynamic_threshold-quantile of its own size; eps_hat follows: they add up to x_t."""
        a, s = self.scales(t)
        x0_hat = self.prediction.x0_from(out, xt, a, s)
        if eps_scale != 1:
            scaled = x0_hat / eps_scale + (1 - 1 / eps_scale) * xt / a       # nonsense where all is noise
            x0_hat = torch.where(a > 0.01, scaled, x0_hat)
        if dynamic_threshold:                                                # Imagen, 2205.11487, sec. 2.3
            limit = x0_hat.flatten(1).abs().quantile(dynamic_threshold, dim=1).clamp(min=1).view(-1, 1, 1, 1)
            x0_hat = x0_hat.clamp(-limit, limit) / limit
        elif clip:
            x0_hat = x0_hat.clamp(-1, 1)
        return x0_hat, (xt - a * x0_hat) / s

    def loss(self, network: Callable, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None,
             noise: Tensor | None = None) -> Tensor:
        """Loss of each sample, float [N] (DDPM, eq. 14, for eps and mse). network: (xt, t, y) -> [N, C, H, W];
        noise: what is added to x0 where that is not eps."""
        out = network(self.q_sample(x0, t, eps if noise is None else noise), t, y).float()
        target = self.prediction.target(x0, eps, *self.scales(t))
        return self.loss_fn(out, target, reduction="none").flatten(1).mean(1) * self.weight[t]


def build_diffusion(cfg: Config, device) -> Diffusion:
    """The configured forward process and loss."""
    alpha_bar = alpha_bar_table(cfg)
    weights = TIME_DENSITIES[cfg.time_sampling](alpha_bar, cfg.time_mean, cfg.time_scale).softmax(0)
    return Diffusion(alpha_bar, cfg.prediction, cfg.loss_fn, device, cfg.min_snr_gamma, weights)


# ---- 4  U-Net ----------------------------------------------------------------------------------
# The network of DDPM (appendix B) with the choices of ADM: each parameter has one counterpart of the
# same shape in diffusers' UNet2DModel. First, what torch is slow at in bf16 on a CPU, written anew
# (benchmarks/README.md has the times); elsewhere these functions are torch's own.


def hand_tuned(x: Tensor) -> bool:
    """Whether x is what the functions below are for: bf16 on a CPU, outside torch.compile."""
    return x.is_cpu and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()


class NormOnCPU(torch.autograd.Function):
    """Group norm of x [N, C, H, W], times weight plus bias (float [N or 1, C]), then SiLU where `silu`: for bf16 on a
    CPU, where torch's own takes up to four times as long."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups: int, eps: float, silu: bool):
        (n, c, h, w), size = x.shape, x[0].numel() // groups

        def means(v: Tensor) -> Tensor:                                      # of each group, float [N, groups, 1]
            parts = math.gcd(4, h * w)                                       # their sums are rounded, and even out
            sums = v.permute(0, 2, 3, 1).reshape(n * parts, -1, c).sum(1).float()
            return sums.view(n, parts, groups, -1).sum((1, 3)).view(n, groups, 1) / size

        def spread(v: Tensor) -> Tensor:                                     # to the channels of the groups
            return v.to(x.dtype).expand(n, groups, c // groups).reshape(n, c, 1, 1)

        mean, square = means(x), means(x.square())
        if (mean**2 > 16 * (square - mean**2)).any():                        # so far from 0, squares lose the variance
            x = x - spread(mean)
            mean, square = means(x), means(x.square())
        rstd = (square - mean**2).clamp_(min=0).add_(eps).rsqrt_()
        a = spread(weight.view(-1, groups, c // groups) * rstd)              # what follows is a x + b
        b = spread(bias.view(-1, groups, c // groups) - mean * a.view(n, groups, -1))
        z = torch.addcmul(b, x, a)
        ctx.save_for_backward(x, weight, mean, rstd, a, b)
        ctx.silu = silu
        return F.silu(z, inplace=True) if silu else z

    @staticmethod
    def backward(ctx, g):
        x, weight, mean, rstd, a, b = ctx.saved_tensors
        (n, c, h, w), groups = x.shape, mean.shape[1]
        if ctx.silu:
            z = torch.addcmul(b, x, a)
            g = torch.ops.aten.silu_backward.grad_input(g, z, grad_input=z)
        db, dot = (v.sum((2, 3)).view(n, groups, -1).float() for v in (g, g * x))                # [N, groups, C/groups]
        dw = (dot - mean * db) * rstd
        along, across = ((weight.view(-1, groups, c // groups) * v).sum(2, keepdim=True) / (c // groups * h * w)
                         for v in (dw, db))                                  # group means of dxhat xhat and of dxhat
        p = -along * rstd**2
        q = -across * rstd - p * mean
        p, q = (v.to(x.dtype).expand_as(dw).reshape(n, c, 1, 1) for v in (p, q))
        dx = torch.addcmul(q, x, p).addcmul_(g, a)                           # a g + p x + q
        return dx, *(v.view(n, c) if len(weight) == n else v.sum(0).view(1, c) for v in (dw, db)), None, None, None


def normalise(norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
              silu: bool = True) -> Tensor:
    """silu(norm(x) * (1 + scale) + shift), scale and shift [N, C] or none; without the SiLU where not `silu`."""
    if hand_tuned(x) and x.shape[2] * x.shape[3] > 16:
        weight, bias = norm.weight[None], norm.bias[None]
        if scale is not None:
            weight, bias = weight * (1 + scale.float()), bias * (1 + scale.float()) + shift.float()
        return NormOnCPU.apply(x, weight, bias, norm.num_groups, norm.eps, silu)
    h = norm(x)
    if scale is not None:                                                    # ADM, adaptive group norm
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(h) if silu else h


class SmallMapConvolution(torch.autograd.Function):
    """3x3 convolution with padding, the gradient of its weight by one matrix product: for maps of a few pixels in bf16
    on a CPU, where torch's own takes up to four times as long."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        (n, cin, h, w), cout = x.shape, len(weight)
        dx, _, _ = torch.ops.aten.convolution_backward(g, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                                                       [True, False, False])
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))            # [N, H + 2, W + 2, cin]
        image, row, column, _ = padded.stride()
        windows = padded.as_strided((n, h, w, 3, 3, cin), (image, row, column, row, column, 1))
        dw = g.permute(1, 0, 2, 3).reshape(cout, -1) @ windows.reshape(n * h * w, -1)            # [cout, 9 cin]
        return dx, dw.view(cout, 3, 3, cin).permute(0, 3, 1, 2), g.sum((0, 2, 3))


class Convolution(nn.Conv2d):
    """3x3 convolution, [N, cin, H, W] -> [N, cout, H, W] divided by `stride`. padding: 1, or 0 for right and bottom."""

    def __init__(self, cin: int, cout: int, stride: int = 1, padding: int = 1):
        super().__init__(cin, cout, 3, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        if hand_tuned(x) and x.shape[2] * x.shape[3] <= 64 and x.shape[1] >= 128 and self.stride == (1, 1):
            return SmallMapConvolution.apply(x, *(v.to(x.dtype) for v in (self.weight, self.bias)))
        return super().forward(x)


class Dropout(nn.Dropout):
    """nn.Dropout, with random bits from numpy on a CPU: torch's take ten times as long. p is a multiple of 2^-16."""

    def forward(self, x: Tensor) -> Tensor:
        if not (hand_tuned(x) and self.training and self.p >= 2**-16):
            return super().forward(x)
        bits = np.random.SFC64(int(torch.randint(2**62, ()))).random_raw(-(-x.numel() // 4)).view(np.int16)
        dropped = round(self.p * 2**16) - 2**15                              # smaller numbers are
        kept = torch.from_numpy(bits[: x.numel()]).clamp_(dropped - 1, dropped).sub_(dropped - 1)
        kept = kept.to(x.dtype).mul_(2**16 / (2**15 - dropped))
        return x * kept.view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


class Concatenation(torch.autograd.Function):
    """torch.cat along the channels, the parts of the gradient laid out in memory like images: as views of the whole
    they would slow every convolution behind them."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.widths = a.shape[1], b.shape[1]
        return torch.cat([a, b], dim=1)

    @staticmethod
    def backward(ctx, g):
        layout = torch.channels_last if g.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        return tuple(part.contiguous(memory_format=layout) for part in g.split(ctx.widths, dim=1))


def concatenate(a: Tensor, b: Tensor) -> Tensor:
    """[N, a, H, W] and [N, b, H, W] -> [N, a + b, H, W]."""
    return Concatenation.apply(a, b) if hand_tuned(a) else torch.cat([a, b], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over [N, heads, tokens, d]."""
    if hand_tuned(q) and q.requires_grad and q.shape[2] <= 256:              # more would take much memory
        weights = (q * q.shape[3] ** -0.5) @ k.transpose(2, 3)               # torch's own backward is 3 times slower
        return weights.softmax(3) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention over all pixels, residual, pre-norm where there is one. [N, C, H, W] -> the same."""

    def __init__(self, channels: int, heads: int, groups: int, eps: float = 1e-5):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        normal = normalise(self.norm, x, silu=False) if self.norm is not None else x
        tokens = normal.flatten(2).transpose(1, 2)                           # [N, HW, C]
        q, k, v = (f(tokens).view(n, h * w, self.heads, -1).transpose(1, 2)  # [N, heads, HW, C/heads]
                   for f in (self.q, self.k, self.v))
        mixed = attend(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.out(mixed).transpose(1, 2).reshape(n, c, h, w)


class ResBlock(nn.Module):
    """x [N, cin, H, W], cond [N, emb] -> [N, cout, H, W]: GroupNorm, SiLU, 3x3 convolution, twice, around a residual
    connection; conditioned in the middle, but for emb = 0; then attention where heads > 0."""

    def __init__(self, cin: int, cout: int, emb: int, groups: int, dropout: float, scale_shift: bool, heads: int = 0,
                 eps: float = 1e-5):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, cin, eps)
        self.conv1 = Convolution(cin, cout)
        self.condition = nn.Linear(emb, 2 * cout if scale_shift else cout) if emb else None
        self.norm2 = nn.GroupNorm(groups, cout, eps)
        self.dropout = Dropout(dropout)
        self.conv2 = Convolution(cout, cout)
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.attention = Attention(cout, heads, groups, eps) if heads else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        h, scale, shift = self.conv1(normalise(self.norm1, x)), None, None   # [N, cout, H, W]
        if self.condition and self.scale_shift:
            scale, shift = self.condition(cond).chunk(2, dim=1)
        elif self.condition:
            h = h + self.condition(cond)[:, :, None, None]
        h = self.conv2(self.dropout(normalise(self.norm2, h, scale, shift)))
        return self.attention(self.shortcut(x) + h)


class UNet(nn.Module):
    """(xt [N, C, H, W], t [N], y [N] or None) -> [N, C, H, W], in the terms of `prediction`. image_channels: C.
    num_classes: 0 for an unconditional network; label num_classes is the null class, taken where y is None. H and W
    must divide by patch_size * 2 ** (levels - 1). Other arguments: see Config."""

    def __init__(self, image_channels: int, num_classes: int = 0, *, base_channels: int = 64,
                 channel_mults: tuple[float, ...] = (1, 2, 2), num_res_blocks: int = 2, use_attention: bool = True,
                 attention_levels: tuple[int, ...] = (), up_attention_levels: tuple[int, ...] | None = None,
                 mid_attention: str = "norm", num_heads: int = 4, head_dim: int = 0, emb_dim: int = 128,
                 dropout: float = 0.0, patch_size: int = 1, norm_groups: int = 32, norm_eps: float = 1e-5,
                 downsample_padding: int = 1, freq_shift: float = 0.0, sin_first: bool = False,
                 conditioning: str = "scale_shift", gradient_checkpointing: bool = False):
        super().__init__()
        self.base_channels, self.num_classes, self.patch_size = base_channels, num_classes, patch_size
        self.freq_shift, self.sin_first, self.gradient_checkpointing = freq_shift, sin_first, gradient_checkpointing
        image_channels *= patch_size**2
        self.concat = conditioning == "concat"
        emb = emb_dim if self.concat else 4 * emb_dim
        widths = level_widths(base_channels, channel_mults)
        groups = math.gcd(norm_groups, base_channels, *widths)
        up_levels = attention_levels if up_attention_levels is None else up_attention_levels

        def block(cin: int, cout: int, attend: bool) -> ResBlock:
            heads = (cout // head_dim if head_dim else num_heads) if attend and use_attention else 0
            return ResBlock(cin, cout, 0 if self.concat else emb, groups, dropout, conditioning == "scale_shift", heads,
                            norm_eps)

        self.time_mlp = nn.Sequential(nn.Linear(base_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.class_embedding = nn.Embedding(num_classes + 1, emb) if num_classes else None
        extra = emb * (1 + bool(num_classes)) if self.concat else 0
        self.conv_in = Convolution(image_channels + extra, base_channels)

        self.down, self.up, skips, cin = nn.ModuleList(), nn.ModuleList(), [base_channels], base_channels
        for i, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.down.append(block(cin, width, i in attention_levels))
                skips.append(cin := width)
            if i < len(widths) - 1:
                self.down.append(Convolution(width, width, 2, downsample_padding))
                skips.append(width)
        self.mid = nn.ModuleList([block(cin, cin, mid_attention != "none"), block(cin, cin, False)])
        if mid_attention == "plain" and use_attention:
            self.mid[0].attention.norm = None
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                self.up.append(block(cin + skips.pop(), width, i in up_levels))
                cin = width
            if i > 0:                                                        # nearest neighbour, then a convolution
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2.0), Convolution(width, width)))

        self.norm_out = nn.GroupNorm(groups, cin, norm_eps)
        self.conv_out = Convolution(cin, image_channels)
        self.apply(self.initialise)

    @staticmethod
    @torch.no_grad()
    def initialise(module: nn.Module) -> None:
        """Weights fan-average uniform, biases 0; zero for what ends a residual branch and for the output,
        so that an untrained block is the identity and the first prediction is 0 (Ho et al. 2020, code)."""
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        for name in {ResBlock: ("conv2",), Attention: ("out",), UNet: ("conv_out",)}.get(type(module), ()):
            nn.init.zeros_(getattr(module, name).weight)

    def embed_time(self, t: Tensor) -> Tensor:
        """Sinusoids of t, [N] -> [N, base_channels] (DDPM appendix B; cosines first, as in diffusers)."""
        half = self.base_channels // 2
        frequency = torch.exp(-math.log(10_000) / (half - self.freq_shift) * torch.arange(half, device=t.device))
        angle = t[:, None].float() * frequency
        waves = [angle.sin(), angle.cos()] if self.sin_first else [angle.cos(), angle.sin()]
        return F.pad(torch.cat(waves, dim=1), (0, self.base_channels % 2))

    def run(self, block: ResBlock, *inputs: Tensor) -> Tensor:
        """block(*inputs), of which only the inputs are kept for the way back where memory is to be saved."""
        if self.gradient_checkpointing and torch.is_grad_enabled():          # 1604.06174
            return torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def forward(self, xt: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        xt = F.pixel_unshuffle(xt, self.patch_size)                          # [N, C p^2, H/p, W/p]
        vectors = [self.time_mlp(self.embed_time(t))]                        # [N, emb] each
        if self.class_embedding is not None:
            vectors.append(self.class_embedding(torch.full_like(t, self.num_classes) if y is None else y))
        if self.concat:
            planes = torch.cat(vectors, dim=1)[:, :, None, None].expand(-1, -1, *xt.shape[2:])
            xt, cond = torch.cat([xt, planes.to(xt.dtype)], dim=1), None     # [N, C + 2 emb, H, W]
        else:
            cond = F.silu(sum(vectors))                                      # [N, emb]

        skips = [self.conv_in(xt)]                                           # every output on the way down
        for module in self.down:
            h = skips[-1]                                                    # [N, width, H / 2^level, W / 2^level]
            skips.append(self.run(module, h, cond) if isinstance(module, ResBlock) else module(h))
        h = skips[-1]
        for block in self.mid:
            h = self.run(block, h, cond)
        for module in self.up:
            h = self.run(module, concatenate(h, skips.pop()), cond) if isinstance(module, ResBlock) else module(h)
        return F.pixel_shuffle(self.conv_out(normalise(self.norm_out, h)), self.patch_size)


def build_unet(cfg: Config, image_channels: int, num_classes: int) -> UNet:
    """The configured network."""
    options = inspect.signature(UNet).parameters.keys() & FIELDS.keys()
    return UNet(image_channels, num_classes, **{name: getattr(cfg, name) for name in options})


# ---- 5  Samplers -------------------------------------------------------------------------------
# Pure functions of a denoiser, (xt, t) -> (x0_hat, eps_hat), that yield (t, x, x0_hat) after each step.
# Guidance wraps the denoiser, so samplers never see it.

Denoiser = Callable[[Tensor, int], tuple[Tensor, Tensor]]

# Where n sampling steps lie in 0..T-1, downwards, given T and alpha_bar.
SPACINGS = {
    "trailing": lambda T, alpha_bar, n: [round(T - i * T / n) - 1 for i in range(n)],              # 2305.08891, table 2
    "leading": lambda T, alpha_bar, n: [(n - 1 - i) * (T // n) for i in range(n)],
    "linear": lambda T, alpha_bar, n: [round((T - 1) * (1 - i / max(n - 1, 1))) for i in range(n)],
    "quadratic": lambda T, alpha_bar, n: [round((T - 1) * (1 - i / n) ** 2) for i in range(n)],    # 2010.02502, D.2
    "logsnr": lambda T, alpha_bar, n: even_in_log_snr(half_log_snr(alpha_bar), n),                 # 2206.00927, 3.4
}


def even_in_log_snr(half_log_snr: Tensor, n: int) -> list[int]:
    """T-1, and the timesteps whose log-SNR is nearest to equally spaced values, the last one short of t = 0's. They
    begin where half of it is -5.1 or higher: cosine falls so steeply at its end that most steps would go there."""
    wanted = torch.linspace(max(half_log_snr[-1].item(), -5.1), half_log_snr[0], n + 1, dtype=torch.float64)[1:n]
    return [len(half_log_snr) - 1, *(half_log_snr[None] - wanted[:, None]).abs().argmin(1).tolist()]


def sampling_steps(cfg: Config) -> int:
    """How many steps the configured sampler takes: as asked for, else its own number."""
    return cfg.steps or min(cfg.timesteps, DEFAULT_STEPS.get(cfg.sampler, cfg.timesteps))


def sampling_grid(cfg: Config, alpha_bar: Tensor) -> list[int]:
    """The timesteps that it visits, downwards, each at most once."""
    ts = SPACINGS[cfg.spacing](cfg.timesteps, alpha_bar, sampling_steps(cfg))
    for i in range(1, len(ts)):                                              # neighbours may round to the same one
        ts[i] = min(ts[i], ts[i - 1] - 1)
    return [max(t, len(ts) - 1 - i) for i, t in enumerate(ts)]


def intervals(ts: list[int], alpha_bar: Tensor) -> Iterator[tuple[int, float, int, float]]:
    """The steps of a descending grid: (t, alpha_bar_t, t_next, its alpha_bar); the last leads to -1, the image."""
    for t, t_next in zip(ts, [*ts[1:], -1], strict=True):
        yield t, alpha_bar[t].item(), t_next, alpha_bar[t_next].item() if t_next >= 0 else 1.0


def ddim(denoise: Denoiser, xT: Tensor, ts: list[int], alpha_bar: Tensor, draw_noise: Callable[[], Tensor], *,
         eta: float = 0.0, variance: str = "small", noise_scale: float = 1.0,
         fade: bool = False) -> Iterator[tuple[int, Tensor, Tensor]]:
    """DDIM (2010.02502, eq. 12) over the descending grid ts. eta = 1 is ancestral DDPM: its posterior mean (eq. 7) and,
    by `variance`, the posterior's noise (small) or beta_t (large). noise_scale multiplies it, `fade` by t / T too."""
    x, T = xT, len(alpha_bar)
    for t, ab, _, ab_next in intervals(ts, alpha_bar):
        x0_hat, eps_hat = denoise(x, t)
        large = eta * math.sqrt(1 - ab / ab_next)                            # DDIM sec. 4, sigma hat
        sigma = large * math.sqrt((1 - ab_next) / (1 - ab))                  # DDIM eq. 16
        x = math.sqrt(ab_next) * x0_hat + math.sqrt(max(1 - ab_next - sigma**2, 0)) * eps_hat
        if sigma > 0:                                                        # the last step adds none
            x = x + noise_scale * (t / T if fade else 1) * (large if variance == "large" else sigma) * draw_noise()
        yield t, x, x0_hat


def dpmpp(denoise: Denoiser, xT: Tensor, ts: list[int], alpha_bar: Tensor,
          draw_noise: Callable[[], Tensor] | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): DDIM steps with x0_hat extrapolated, in half the log-SNR, to
    the middle of the step; second order for one network call. The first and the last step are DDIM's."""
    x, x0_before, h_before, lam = xT, None, math.inf, half_log_snr(alpha_bar)
    for t, ab, t_next, ab_next in intervals(ts, alpha_bar):
        x0_hat, _ = denoise(x, t)
        x0, h = x0_hat, math.inf                                             # from nothing, or to the image itself
        if t_next >= 0 and ab > 0:
            h = (lam[t_next] - lam[t]).item()
            if x0_before is not None:
                x0 = x0_hat + h / (2 * h_before) * (x0_hat - x0_before)
        x = math.sqrt(ab_next) * x0 + math.sqrt((1 - ab_next) / (1 - ab)) * (x - math.sqrt(ab) * x0)
        x0_before, h_before = x0_hat, h
        yield t, x, x0_hat


def heun(denoise: Denoiser, xT: Tensor, ts: list[int], alpha_bar: Tensor,
         draw_noise: Callable[[], Tensor] | None = None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Heun's method in x / sqrt(alpha_bar) over sigma (EDM, 2206.00364, algorithm 1): a DDIM step, then again
    with the mean of the noise at both ends. Two network calls a step, but one at the last, and one where
    sigma > 1000: so long a step leaves the range in which the mean of two slopes is any better."""
    x = xT
    for t, ab, t_next, ab_next in intervals(ts, alpha_bar):
        x0_hat, eps = denoise(x, t)
        x0 = x0_hat
        if t_next >= 0 and ab > 1e-6:
            ahead = math.sqrt(ab_next) * x0_hat + math.sqrt(1 - ab_next) * eps
            eps = (eps + denoise(ahead, t_next)[1]) / 2
            x0 = (x - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
        x = math.sqrt(ab_next) * x0 + math.sqrt(1 - ab_next) * eps
        yield t, x, x0_hat


# To add a sampler: write its function and name it here, with the options it takes from the settings.
SAMPLERS = {
    "dpmpp": lambda cfg: dpmpp,
    "heun": lambda cfg: heun,
    "ddim": lambda cfg: partial(ddim, eta=cfg.eta, variance=cfg.variance, noise_scale=cfg.noise_scale,
                                fade=cfg.use_noise_scaling),
    "ddpm": lambda cfg: partial(SAMPLERS["ddim"](cfg), eta=1.0),
}
DEFAULT_STEPS = {"dpmpp": 25, "heun": 25, "ddim": 50}                        # others visit every timestep


def make_denoiser(network: Callable, diffusion: Diffusion, y: Tensor | None, null: int, guidance_scale: float = 0.0,
                  interval: tuple[float, float] | None = None, guide: Callable | None = None, **conversion) -> Denoiser:
    """The denoiser for labels y. With guidance w its output is (1 + w) out - w weak: the weak one is the network's
    for the null label, from one call on a doubled batch (2207.12598, eq. 6), or that of a weaker network, the
    guide (2406.02507, eq. 3). interval: noise levels sigma between which it acts (2404.07724, eq. 6).
    conversion: options of Diffusion.estimates."""
    low, high = interval or (0, math.inf)
    sigma = ((1 - diffusion.alpha_bar) / diffusion.alpha_bar).sqrt().tolist()
    guided = guidance_scale > 0 and (guide is not None or y is not None)

    def denoise(xt: Tensor, t: int) -> tuple[Tensor, Tensor]:
        ts = torch.full((len(xt),), t, device=xt.device)
        if not guided or not low <= sigma[t] <= high:
            out = network(xt, ts, y).float()
        else:
            if guide is not None:
                strong, weak = network(xt, ts, y).float(), guide(xt, ts, y).float()
            else:
                both = network(torch.cat([xt, xt]), torch.cat([ts, ts]), torch.cat([y, torch.full_like(y, null)]))
                strong, weak = both.float().chunk(2)
            out = (1 + guidance_scale) * strong - guidance_scale * weak
        return diffusion.estimates(out, xt, ts, **conversion)

    return denoise


STREAM_BATCH, STREAM_STEP, STREAM_DROPOUT, STREAM_SAMPLE, STREAM_VALIDATION = range(1, 6)  # independent uses of a seed


def mix(*numbers: int) -> int:
    """One well-spread 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def generator(*numbers: int, device="cpu") -> torch.Generator:
    """A random generator seeded by the numbers."""
    return torch.Generator(device).manual_seed(mix(*numbers))


def image_noise(seed: int, indices: range, shape: tuple[int, ...], device) -> Callable[[], Tensor]:
    """A source of noise [N, *shape]: image i has a generator by (seed, i), so that no batch or device changes it."""
    generators = [generator(seed, STREAM_SAMPLE, i) for i in indices]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each pixel over the training images: float [num_classes + 1, C, h, w], a row per class
    and a last one over all; h x w may be coarser than the images."""

    mean: Tensor
    var: Tensor

    def start(self, noise: Tensor, y: Tensor, alpha_bar_T: float) -> Tensor:
        """x_T from the Gaussian with the first two moments of q(x_T), given noise [N, C, H, W] and rows y [N]."""
        rows = (m.to(noise.device)[y] for m in (self.mean, self.var))
        mean, var = (F.interpolate(m, noise.shape[2:], mode="bilinear") for m in rows)
        return math.sqrt(alpha_bar_T) * mean + (alpha_bar_T * var + 1 - alpha_bar_T).sqrt() * noise


@dataclass
class Model:
    """A network with all that drawing images needs, as `load` makes it from a checkpoint. shape: (C, H, W).
    class_names: may be empty. guide: a weaker network, to guide. arithmetic: how the networks are run."""

    network: nn.Module
    diffusion: Diffusion
    moments: Moments
    config: Config
    shape: tuple[int, int, int]
    class_names: list[str]
    arithmetic: Arithmetic = field(default_factory=lambda: Arithmetic())     # chapter 7 has it
    guide: nn.Module | None = None

    @property
    def device(self):
        return self.diffusion.signal.device

    def labels(self, classes: list[int] | None, num_images: int) -> list[int]:
        """A label per image, the classes in turn; without any, the null class."""
        classes = classes or [len(self.class_names)]
        return [classes[i % len(classes)] for i in range(num_images)]

    @torch.no_grad()
    def sample(self, labels: list[int], cfg: Config, first: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Draw one batch, image numbers first, first + 1, ...: yields (t, x, x0_hat), x [N, C, H, W] after
        each step; the last x is the result. Image i depends on (seed, i, its label, cfg) alone."""
        y = torch.tensor(labels, device=self.device)
        noise = image_noise(cfg.seed, range(first, first + len(labels)), self.shape, self.device)
        alpha_bar = self.diffusion.alpha_bar
        ts = sampling_grid(cfg, alpha_bar)
        xT = self.start(noise(), y, cfg, ts[0])
        yield from SAMPLERS[cfg.sampler](cfg)(self.denoiser(y, cfg), xT, ts, alpha_bar, noise)

    def start(self, noise: Tensor, y: Tensor, cfg: Config, t: int) -> Tensor:
        """What sampling starts from at timestep t for labels y [N], given standard normal noise [N, C, H, W]."""
        return noise if cfg.start == "gaussian" else self.moments.start(noise, y, self.diffusion.alpha_bar[t].item())

    def denoiser(self, y: Tensor, cfg: Config) -> Denoiser:
        """What the samplers see of the network, for labels y [N]."""
        def run(network: Callable, *inputs) -> Tensor:
            with self.arithmetic.running():
                return network(*inputs)

        network, guide = partial(run, self.network), partial(run, self.guide) if self.guide else None
        return make_denoiser(network, self.diffusion, y if self.class_names else None, len(self.class_names),
                             cfg.guidance_scale, cfg.guidance_interval, guide, clip=cfg.clip_x0,
                             dynamic_threshold=cfg.dynamic_threshold, eps_scale=cfg.eps_scale)

    def batch_size(self, cfg: Config) -> int:
        """Images drawn at a time: as asked for, else as many as keep the device busy and fit into its memory."""
        if cfg.sequential or cfg.sample_batch_size:
            return 1 if cfg.sequential else cfg.sample_batch_size
        if self.device.type != "cuda":
            return max(1, 2**17 // math.prod(self.shape[1:]))                # larger ones are no faster
        values = network_size(self.config, self.shape, len(self.class_names))[1] * (2 if cfg.guidance_scale else 1)
        return max(1, min(1024, free_memory(self.device) // (4 * values)))

    def draw(self, labels: list[int], cfg: Config, progress: Callable = lambda: None, first=0) -> Iterator[Tensor]:
        """Images number first, first + 1, ... in batches, uint8 [n, C, H, W]; progress() after every step. A batch that
        does not fit into memory is halved."""
        size, i = min(self.batch_size(cfg), max(1, len(labels))), 0
        while i < len(labels):
            chosen = labels[i : i + size]
            missing = size - len(chosen) if self.arithmetic.compiled else 0  # rather that than to compile again
            try:
                for _, x, _ in self.sample(chosen + chosen[-1:] * missing, cfg, first + i):  # noqa: B007 (the last x)
                    progress()
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = math.ceil(size / 2)
                continue
            yield to_uint8(x[: len(chosen)])
            i += len(chosen)

    def generate(self, classes: list[str | int] | None = None, num_images: int | None = None, *, pil: bool = False,
                 each_step: bool = False, **settings) -> Tensor | list[Image.Image] | Iterator[tuple]:
        """num_images of the classes (names or numbers) in turn, by default one each: uint8 [N, C, H, W] on the CPU, or
        PIL images where `pil`. each_step: an iterator over the sampling steps instead, of (t, x, x0_hat), both images
        of that kind, all drawn at once. settings: sampling options, such as steps, sampler, seed. Raises UserError for
        an unknown class or option."""
        numbers = parse_classes(classes, self.class_names) if classes is not None else None
        wrong = [name for name in settings if name not in FIELDS or FIELDS[name].metadata["fixed"] or name in LOCAL]
        if wrong:
            raise UserError(f"{wrong[0]} is no sampling option")
        cfg = dataclasses.replace(self.config, **settings)
        check(cfg)
        labels = self.labels(numbers, num_images or len(numbers or [0]))

        def images(x: Tensor) -> Tensor | list[Image.Image]:
            return list(map(to_pil, x)) if pil else x

        if each_step:
            return ((t, *map(images, map(to_uint8, found))) for t, *found in self.sample(labels, cfg))
        return images(torch.cat(list(self.draw(labels, cfg))))

    @torch.no_grad()
    def loss(self, images: Tensor, labels: Tensor | None = None, seed: int = 0) -> Tensor:
        """Loss of each image, float [N], at a random timestep each, for uint8 [N, C, H, W] and labels int64 [N]."""
        random, x0 = generator(seed, STREAM_VALIDATION), from_uint8(images)
        t = torch.randint(self.diffusion.T, (len(x0),), generator=random)  # uniform, whatever training prefers
        batch = x0, t, torch.randn(x0.shape, generator=random), labels
        return self.diffusion.loss(self.network, *(None if v is None else v.to(self.device) for v in batch))


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0..255, on the CPU."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def listed(class_names: list[str]) -> str:
    """The classes with their numbers, for people."""
    return ", ".join(f"{i} {name}" if name != str(i) else name for i, name in enumerate(class_names))


def parse_classes(classes: str | list, class_names: list[str]) -> list[int]:
    """Class numbers from names or numbers: a list, or text such as "cat, 3" or "all". Raises UserError."""
    if isinstance(classes, str):
        classes = [c.strip() for c in classes.split(",") if c.strip()]
        classes = class_names if classes == ["all"] else classes
    index = {**{str(i): i for i in range(len(class_names))}, **{n.lower(): i for i, n in enumerate(class_names)}}
    unknown = [str(c) for c in classes if str(c).lower() not in index]
    if unknown or not classes:
        raise UserError(f"unknown class {', '.join(unknown) or '(none)'}: choose from {listed(class_names)}"
                        if class_names else "this model was trained without classes: leave --classes out")
    return [index[str(c).lower()] for c in classes]


# ---- 6  Data -----------------------------------------------------------------------------------
# Every dataset becomes uint8 [N, C, H, W] with labels; batches are a function of (seed, step).


@dataclass
class ImageData:
    """images: uint8 [N, C, H, W], perhaps memory-mapped; labels: int64 [N], all 0 where class_names is empty."""

    images: Tensor
    labels: Tensor
    class_names: list[str]

    def digest(self) -> str:
        """A fingerprint of the labels and of a hundred images, to tell one set from another."""
        some = self.images[:: math.ceil(len(self.images) / 100)].contiguous()
        return hashlib.sha256(self.labels.numpy().tobytes() + some.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Dataset:
    """An entry of DATASETS. load(cfg) -> ImageData; shape: the images' own (C, H, W); num_images: in the
    training part (0: unknown); classes: their names; flip: whether a mirrored image is still a good one."""

    load: Callable[[Config], ImageData]
    shape: tuple[int, int, int]
    num_images: int = 0
    classes: tuple[str, ...] = ()
    flip: bool = False


def load_digits(cfg: Config) -> ImageData:
    """The UCI digits that are shipped in data/digits.npz."""
    places = Path(cfg.data_dir, "digits.npz"), Path(__file__).parent / "data" / "digits.npz"
    path = next((p for p in places if p.exists()), None)
    if path is None:
        raise UserError(f"digits.npz is neither in {cfg.data_dir} nor in data/ beside diffuser.py: copy it there")
    try:
        with np.load(path) as file:
            images, labels = torch.from_numpy(file["images"])[:, None], file["labels"].tolist()
    except Exception as error:                                               # numpy raises many kinds here
        raise UserError(f"{path} is damaged ({first_line(error)}): copy it there anew") from error
    return in_memory(cfg, images, labels)


def load_mnist(cfg: Config) -> ImageData:
    """MNIST, 60,000 handwritten digits (LeCun et al. 1998)."""
    raw = torchvision_dataset("MNIST", cfg, "the four *-ubyte.gz files of MNIST", "MNIST/raw", train=True)
    return in_memory(cfg, raw.data[:, None], raw.targets.tolist())


def load_cifar10(cfg: Config) -> ImageData:
    """CIFAR-10, 50,000 photographs of ten kinds of things (Krizhevsky 2009)."""
    raw = torchvision_dataset("CIFAR10", cfg, "cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz", "", train=True)
    return in_memory(cfg, torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous(), raw.targets)


def load_celeba(cfg: Config) -> ImageData:
    """CelebA, 162,770 faces for training (Liu et al. 2015), without labels."""
    raw = torchvision_dataset("CelebA", cfg, "img_align_celeba.zip (unpacked) and the five list_*.txt and "
                              "identity_CelebA.txt files of CelebA", "celeba", split="train")
    return cached(cfg, raw, ("celeba", len(raw)), [])


def load_folder(cfg: Config) -> ImageData:
    """A folder or ZIP of images; the folder that directly holds them names the class."""
    source = ImageFiles(cfg.path_to_data)
    return cached(cfg, source, ("folder", *source.fingerprint()), source.class_names)


def in_memory(cfg: Config, images: Tensor, labels: list[int]) -> ImageData:
    """The images, uint8 [N, C, H, W], as they are or, where another size is asked for, resized."""
    names = list(DATASETS[cfg.dataset].classes)
    if tuple(images.shape[1:]) == image_shape(cfg):
        return ImageData(images, torch.tensor(labels), names)
    return cached(cfg, list(zip(map(to_pil, images), labels, strict=True)), (cfg.dataset, len(labels)), names)


def torchvision_dataset(name: str, cfg: Config, what: str, where: str, **options):
    """torchvision's dataset of that name, downloaded if it is not there. Raises UserError if it cannot be."""
    import torchvision

    root = Path(cfg.data_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        return getattr(torchvision.datasets, name)(root, download=True, **options)
    except Exception as error:                                               # torchvision raises many kinds here
        raise UserError(f"{name} is not whole in {root} and could not be downloaded ({first_line(error)}).\n"
                        f"Put {what} into {root / where} by hand, or give --data_dir.") from error


DIGITS = tuple("0123456789")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# To add a dataset: write a load function and name it here; PRESETS may give it settings of its own.
DATASETS = {
    "digits": Dataset(load_digits, (1, 8, 8), 1797, DIGITS),
    "mnist": Dataset(load_mnist, (1, 28, 28), 60_000, DIGITS),
    "cifar10": Dataset(load_cifar10, (3, 32, 32), 50_000, CIFAR10, flip=True),
    "cifar10_optimized": Dataset(load_cifar10, (3, 32, 32), 50_000, CIFAR10, flip=True),
    "celeba": Dataset(load_celeba, (3, 64, 64), 162_770, flip=True),
    "folder": Dataset(load_folder, (3, 64, 64), flip=True),
}


def image_shape(cfg: Config, source=None) -> tuple[int, int, int]:
    """(C, H, W) of the training images: as asked for, else the dataset's own; ImageFiles tell their own channels."""
    channels, *size = DATASETS[cfg.dataset].shape
    channels = source.guess_channels() if isinstance(source, ImageFiles) and not cfg.channels else channels
    return cfg.channels or channels, *(cfg.img_size or size)


@lru_cache(maxsize=1)
def open_zip(path: Path, process: int) -> zipfile.ZipFile:
    """The ZIP file, opened once in each process: a handle cannot be shared."""
    return zipfile.ZipFile(path)


class ImageFiles(torch.utils.data.Dataset):
    """The images below a folder or in a ZIP file, in order of name: item i is (PIL image, label)."""

    ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")

    def __init__(self, path: str):
        self.require(path)
        self.path = Path(path)
        if self.path.is_dir():
            names = [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
        else:
            try:
                with zipfile.ZipFile(self.path) as archive:
                    names = archive.namelist()
            except Exception as error:
                raise UserError(f"--path_to_data {path} is no whole ZIP file ({first_line(error)})") from error
        self.names = sorted(n for n in names if n.lower().endswith(self.ENDINGS)
                            and not any(part.startswith((".", "__MACOSX")) for part in n.split("/")))
        if not self.names:
            raise UserError(f"--path_to_data {path} holds no {', '.join(e[1:].upper() for e in self.ENDINGS)} image")
        folders = [n.rpartition("/")[0] for n in self.names]
        number = {c: i for i, c in enumerate(sorted(set(folders)))}
        self.labels, short = [number[f] for f in folders], [os.path.basename(c) or "unsorted" for c in number]
        self.class_names = [] if len(number) == 1 else short if len(set(short)) == len(short) else list(number)

    @staticmethod
    def require(path: str) -> None:
        """Raise UserError unless there is something at the path."""
        if not path:
            raise UserError("dataset folder needs --path_to_data: a folder or ZIP file of images")
        if not os.path.exists(path):
            raise UserError(f"--path_to_data {path}: there is no such folder or ZIP file")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        if self.path.is_dir():
            return Image.open(self.path / self.names[i]), self.labels[i]
        archive = open_zip(self.path, os.getpid())
        if archive.getinfo(self.names[i]).file_size > 2**28:
            raise ValueError("it unpacks to more than 256 MiB")
        return Image.open(io.BytesIO(archive.read(self.names[i]))), self.labels[i]

    def guess_channels(self, looks: int = 32) -> int:
        """1 if all of a few images spread over the set are grey, else 3."""
        for i in range(0, len(self), max(1, len(self) // looks)):
            try:
                if self[i][0].mode not in ("1", "L", "LA", "I", "I;16", "I;16B", "F"):
                    return 3
            except Exception:                                       # unreadable: skipped later, and listed
                continue
        return 1

    def fingerprint(self) -> tuple:
        """Changes when a file is added, removed, renamed or rewritten."""
        files = [self.path] if self.path.is_file() else [self.path / n for n in self.names]
        stats = [(f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return str(self.path.resolve()), hashlib.sha256(repr((self.names, stats)).encode()).hexdigest()


@dataclass
class Decoder(torch.utils.data.Dataset):
    """Item i of `source`, (PIL image, label), as (uint8 [C, H, W], label); the reason why where it cannot be read.
    ground: the colour behind what is transparent."""

    source: torch.utils.data.Dataset | list
    shape: tuple[int, int, int]
    ground: str = "white"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int] | str:
        try:
            with warnings.catch_warnings():                         # of more pixels than PIL takes for an honest image
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image, label = self.source[i]
            return self.decode(image), label if isinstance(label, int) else 0
        except Exception as error:                                  # broken files raise errors of every kind
            return first_line(error)

    def decode(self, image: Image.Image) -> np.ndarray:
        """Upright, on the ground where transparent, 16 bits to 8, cropped to the middle and resized: [C, H, W]."""
        (channels, height, width), image = self.shape, ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":         # PIL would clip what lies above 255
            pixels = np.asarray(image, dtype=np.float64)
            image = Image.fromarray((pixels / (257 if pixels.max() > 255 else 1)).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, self.ground), image)
        image = ImageOps.fit(image.convert("RGB" if channels == 3 else "L"), (width, height), Image.Resampling.LANCZOS)
        return np.array(image).reshape(height, width, channels).transpose(2, 0, 1).copy()


def cached(cfg: Config, source, key: tuple, class_names: list[str]) -> ImageData:
    """source decoded, memory-mapped from a cache made once. Raises UserError if over a tenth cannot be read."""
    from filelock import FileLock  # torch depends on it

    decoder = Decoder(source, image_shape(cfg, source))
    digest = hashlib.sha256(repr((key, decoder.shape, "v1")).encode()).hexdigest()[:16]
    index = Path(cfg.data_dir, "cache", f"{cfg.dataset}_{digest}.json")
    if not cache_is_whole(index, decoder.shape):
        index.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(index.with_suffix(".lock")):                           # a second run waits for the first
            if not cache_is_whole(index, decoder.shape):
                build_cache(index, decoder, cfg.num_workers)
    labels = json.loads(index.read_text())["labels"]
    size = (len(labels), *decoder.shape)
    images = torch.from_file(str(index.with_suffix(".bin")), size=math.prod(size), dtype=torch.uint8)
    return ImageData(images.view(size), torch.tensor(labels), class_names)


def cache_is_whole(index: Path, shape: tuple[int, int, int]) -> bool:
    """Whether a cache is there, and as large as its index says."""
    try:
        return len(json.loads(index.read_text())["labels"]) * math.prod(shape) == os.path.getsize(
            index.with_suffix(".bin"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def build_cache(index: Path, decoder: Decoder, workers: int) -> None:
    """Decode all images in worker processes into one file of bytes, and write its index last."""
    temporary, listing, labels, bad = index.with_suffix(".tmp"), index.with_suffix(".unreadable.txt"), [], []
    names = getattr(decoder.source, "names", range(len(decoder)))
    temporary.unlink(missing_ok=True)                                        # of a run that was killed
    need, free = len(decoder) * math.prod(decoder.shape), shutil.disk_usage(index.parent).free
    if need > free:
        raise UserError(f"the decoded images take {need / 2**30:.2g} GiB, {free / 2**30:.2g} GiB are free in "
                        f"{index.parent}: choose another --data_dir or a smaller --img_size", code=1)
    workers = 0 if len(decoder) < 1000 else workers
    loader = torch.utils.data.DataLoader(decoder, batch_size=64, num_workers=workers, collate_fn=list)
    items = itertools.chain.from_iterable(loader)
    try:
        with open(temporary, "wb") as file:
            for i, item in enumerate(tqdm(items, "caching images", len(decoder), disable=None)):
                if isinstance(item, str):
                    bad.append(f"{names[i]}: {item}")
                else:
                    file.write(item[0].tobytes())
                    labels.append(int(item[1]))
        if bad:
            write_atomically(listing, lambda file: file.write("\n".join((*bad, "")).encode(errors="replace")))
        if len(bad) > len(decoder) / 10 or not labels:
            raise UserError(f"{len(bad)} of {len(decoder)} images cannot be read, such as {bad[0]}; all are listed in "
                            f"{listing}: remove or mend them")
        if bad:
            print(f"skipped {len(bad)} of {len(decoder)} images that cannot be read, such as {bad[0]}; all are listed "
                  f"in {listing}")
        os.replace(temporary, index.with_suffix(".bin"))
        write_json(index, dict(labels=labels, unreadable=len(bad)))
    except RuntimeError as error:                                            # of the workers
        raise UserError(f"reading images failed ({first_line(error)}): try --num_workers 0", code=1) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_data(cfg: Config) -> ImageData:
    """The training images as configured. Raises UserError where they are missing or do not fit."""
    data = DATASETS[cfg.dataset].load(cfg)
    if cfg.use_labels and not data.class_names:
        raise UserError(f"--use_labels: dataset {cfg.dataset} has no classes (in a folder, subfolders make them)")
    return ImageData(data.images, torch.zeros_like(data.labels), []) if cfg.use_labels is False else data


def held_out_size(images: int, fraction: float) -> int:
    return min(int(images * fraction), 1000)


def split(data: ImageData, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out images, the same for every seed."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    held_out = held_out_size(len(order), fraction)
    return order[held_out:].sort().values, order[:held_out].sort().values


def image_moments(data: ImageData, indices: Tensor, flip: bool, limit: int = 20_000, room: int = 2**20) -> Moments:
    """Moments over at most `limit` images, pooled to at most 64 x 64 pixels, fewer where many classes would not fit
    into `room` numbers. A class of fewer than ten images has those of all."""
    indices = indices[:: math.ceil(len(indices) / limit)]
    classes, shape = len(data.class_names), data.images.shape[1:]
    side = max(1, min(64, math.isqrt(room // (shape[0] * (classes + 1)))))
    small = (shape[0], *(min(n, side) for n in shape[1:]))
    sums = torch.zeros(2, max(classes, 1), *small, dtype=torch.float64)      # of x and of x squared
    for chunk in indices.split(1000):
        x = from_uint8(data.images[chunk])
        pooled = torch.stack([F.adaptive_avg_pool2d(power, small[1:]).double() for power in (x, x**2)])
        sums.index_add_(1, data.labels[chunk], pooled)
    counts = torch.bincount(data.labels[indices], minlength=max(classes, 1)).double()
    if classes:
        sums, counts = (torch.cat([v, v.sum(d, keepdim=True)], d) for v, d in ((sums, 1), (counts, 0)))
    few = counts < 10
    sums[:, few], counts[few] = sums[:, -1:].clone(), counts[-1].item()
    sums = (sums + sums.flip(-1)) / 2 if flip else sums
    mean, square = sums / counts.view(-1, 1, 1, 1)
    return Moments(mean.float(), (square - mean**2).clamp(min=0).float())


def from_uint8(images: Tensor) -> Tensor:
    """0..255 to float in [-1, 1]."""
    return images.float() / 127.5 - 1


class Batches:
    """Training batches, step -> (x0 [n, C, H, W] in [-1, 1], y [n]). An epoch is a permutation by (seed, epoch); a
    batch is the same for any number of devices, of which each, `rank` of `world`, takes its share."""

    def __init__(self, data: ImageData, indices: Tensor, size: int, flip: bool, seed: int, device, rank=0, world=1):
        self.indices, self.size, self.flip, self.seed = indices, size, flip, seed
        self.device = device = torch.device(device)
        self.share = slice(rank * size // world, (rank + 1) * size // world)
        fits = device.type == "cuda" and data.images.nbytes < free_memory(device) // 4
        self.images, self.labels = (v.to(device) if fits else v for v in (data.images, data.labels))
        self.steps_per_epoch = max(1, len(indices) // size)
        self.epoch, self.order = -1, indices

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            order = torch.randperm(len(self.indices), generator=generator(self.seed, STREAM_BATCH, epoch))
            repeats = math.ceil(self.size / len(order))             # a set smaller than a batch repeats
            self.epoch, self.order = epoch, self.indices[order].repeat(repeats)
        chosen = self.order[i * self.size : (i + 1) * self.size][self.share]
        if self.images.is_cuda:
            chosen = self.send(chosen)
        x0 = from_uint8(self.send(self.images[chosen]))
        if self.flip:
            mirror = torch.rand(self.size, generator=generator(self.seed, STREAM_BATCH, step, 1))[self.share] < 0.5
            x0 = torch.where(self.send(mirror).view(-1, 1, 1, 1), x0.flip(-1), x0)
        return x0, self.send(self.labels[chosen])

    def send(self, v: Tensor) -> Tensor:
        """v on the device; to CUDA by way of pinned memory, so that nobody waits for it."""
        if v.device == self.device:
            return v
        return v.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else v.to(self.device)


# ---- 7  Runtime --------------------------------------------------------------------------------
# Device, processes, precision and signals of a run, chosen once; and where it reports to.


class Runtime:
    """What a run stands on. Under torchrun each process has a rank; rank 0 alone writes and speaks."""

    def __init__(self, cfg: Config):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")      # read when CUDA is first used
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False      # nothing reads any
        self.device = pick_device(cfg.device)
        gpus = torch.cuda.device_count() if self.device.type == "cuda" else 0
        if cfg.num_gpus > max(gpus, 1):
            raise UserError(f"--num_gpus {cfg.num_gpus}: this machine has {gpus}")
        if self.world > 1 and not torch.distributed.is_initialized():
            join_processes("nccl" if gpus else "gloo")
        self.replicas = 1 if self.world > 1 else cfg.num_gpus or max(gpus, 1)  # of DataParallel
        self.num_devices = self.world * self.replicas
        self.is_main, self.stop_signal, self.save_wanted = self.rank == 0, 0, False
        self.last_look, self.next_look = (0, time.perf_counter()), 0         # (step, clock), step: see requests
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")                       # TF32 for what stays float32
            torch.backends.cudnn.benchmark = not cfg.deterministic           # shapes seldom change
        else:
            keep_freed_memory()
        if cfg.compile and self.replicas > 1:
            raise UserError("--compile does not go with DataParallel: use torchrun, or --num_gpus 1")
        if cfg.precision == "fp16" and self.device.type != "cuda":
            raise UserError("--precision fp16 needs a CUDA device: use bf16 or fp32 here")

    def parallel(self, network: nn.Module, arithmetic: Arithmetic, graphs: bool = False) -> Callable:
        """The network as training calls it: compiled, as CUDA graphs where `graphs`, and spread over devices. Its
        parameters stay its own."""
        forward = compiled_network(network, graphs and self.world == 1) if arithmetic.compiled else network
        if self.world > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(forward, device_ids=devices)
        if self.replicas > 1:
            return nn.DataParallel(InContext(forward, arithmetic.running), list(range(self.replicas)))
        return forward

    def devices(self) -> str:
        """What computes, for people."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else f"{torch.get_num_threads()} threads"
        return f"{self.device.type} x {self.num_devices} ({name})"

    def facts(self, arithmetic: Arithmetic) -> dict[str, str]:
        """The machine and the way it computes, for people."""
        processor = platform.processor() or platform.machine()
        with suppress(OSError, StopIteration):                               # Linux has the name there alone
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return dict(device=self.devices(), arithmetic=str(arithmetic), processor=processor, cores=str(os.cpu_count()),
                    system=platform.platform(), python=platform.python_version())

    @contextmanager
    def main_first(self):
        """Rank 0 goes through the block before the others do, so that downloads and caches are made once."""
        if not self.is_main:
            torch.distributed.barrier()
        try:
            yield
        finally:                                                             # if it failed, the others fail likewise
            if self.is_main and self.world > 1:
                torch.distributed.barrier()

    def agreed(self, number: int, largest: bool = False) -> int:
        """Rank 0's number, or the largest, on every rank."""
        shared = torch.tensor(number, device=self.device)
        if self.world > 1 and largest:
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        elif self.world > 1:
            torch.distributed.broadcast(shared, 0)
        return int(shared)

    def say(self, text: str) -> None:
        """Print a line, once, without breaking a progress bar. Training goes on where nobody reads it any more."""
        if self.is_main:
            with suppress(OSError):
                tqdm.write(text)

    def note(self, number: int, frame) -> None:
        """Signal handler: SIGUSR1 asks for a checkpoint, others for a stop; the second one of those ends the process at
        once, but under torchrun, which repeats them."""
        if number == getattr(signal, "SIGUSR1", None):
            self.save_wanted = True
            return
        self.stop_signal = number
        for stop in stop_signals() if self.world == 1 else ():
            signal.signal(stop, signal.SIG_DFL)

    @contextmanager
    def noting(self, *numbers: int):
        """Within: these signals are noted, to be looked at between steps."""
        alone = threading.current_thread() is threading.main_thread()        # elsewhere handlers are not allowed
        before = {number: signal.signal(number, self.note) for number in numbers if alone}
        try:
            yield
        finally:
            for number, handler in before.items() if self.world == 1 else ():  # of several it is to say why it ends
                signal.signal(number, handler)

    def requests(self, step: int) -> tuple[int, bool]:
        """The signal to stop at (0: go on) and whether to save. Alone at once; processes agree on it every two seconds,
        at most ten steps apart."""
        if step < self.next_look:
            return 0, False
        asked, self.save_wanted = self.save_wanted, False
        if self.world > 1:
            (since, then), now = self.last_look, time.perf_counter()
            steps = 2 * (step - since) / max(1e-9, now - then)
            shared = torch.tensor([self.stop_signal, float(asked), min(10.0, max(1.0, steps))], device=self.device)
            torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
            self.stop_signal, asked, steps = map(int, shared.tolist())
            self.last_look, self.next_look = (step, now), step + steps
        return self.stop_signal, bool(asked)


def stop_signals() -> list[int]:
    """What asks a run to stop: Ctrl-C, the system, and a terminal that closes, but for one under nohup."""
    hangup = getattr(signal, "SIGHUP", None)
    heeded = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([hangup] if heeded else [])]


def join_processes(backend: str) -> None:
    """torch.distributed's processes of a run, as torchrun started them."""
    store, rank, world = next(torch.distributed.rendezvous("env://"))
    patience = timedelta(hours=6)                                            # rank 0 reads and draws, the others wait
    store.set_timeout(patience)
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):                     # else machines may count differently
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")          # torchrun 2.15 keeps what dead processes
        store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)   # wrote there (pytorch issue 135712)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)


def pick_device(wanted: str) -> torch.device:
    """cuda, then mps, then cpu. Raises UserError where the one asked for is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted != "auto" and not there[wanted]:
        raise UserError(f"--device {wanted}: torch {torch.__version__} finds none here")
    device = torch.device(next(k for k in there if there[k]) if wanted == "auto" else wanted)
    if device.type == "cuda":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if processes > torch.cuda.device_count():
            raise UserError(f"{processes} processes on this machine, which has {torch.cuda.device_count()} GPUs: lower "
                            "torchrun's --nproc_per_node")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


class InContext(nn.Module):
    """A network that enters a context at each call: DataParallel's threads do not inherit the precision of autocast."""

    def __init__(self, network: nn.Module, context: Callable):
        super().__init__()
        self.network, self.context = network, context

    def forward(self, *inputs: Tensor) -> Tensor:
        with self.context():
            return self.network(*inputs)


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Arithmetic:
    """How a network is run. Chosen once and kept in checkpoints, so that a run goes on as it began. device: its type;
    split: parts that a step's batch is computed in because it does not fit into memory at once."""

    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    split: int = 1

    def running(self):
        """The context of each call of the network."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()                       # the last call's output is done with
        return torch.autocast(self.device, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        return ", ".join((self.precision, "channels last" if self.channels_last else "channels first",
                          "compiled" if self.compiled else "not compiled"))


def precisions(cfg: Config, device: torch.device) -> list[str]:
    """The precisions that may be the fastest; bf16 is where the hardware multiplies it, fp16 a substitute on CUDA."""
    if cfg.precision != "auto":
        return [cfg.precision]
    if device.type == "cuda":
        return ["bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"]
    if device.type != "cpu" or cfg.base_channels < 32:                       # narrow networks gain nothing
        return ["fp32"]
    amx, bf16 = (getattr(torch.cpu, name, lambda: False)()
                 for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return ["bf16"] if amx else ["fp32", "bf16"] if bf16 else ["fp32"]       # with AMX twice as fast and more


def choose_arithmetic(cfg: Config, device: torch.device, calls: int = 0, stored: dict | None = None,
                      seconds: Callable[[Arithmetic], float] | None = None) -> Arithmetic:
    """As asked for; else as stored by a checkpoint from such a device; else what is fast here. calls: of the network,
    in all; seconds(arithmetic): what a step of the run takes, for where that is not clear beforehand."""
    kept = stored if stored and stored["device"] == device.type else {}
    channels_last = kept.get("channels_last", device.type != "mps") if cfg.channels_last is None else cfg.channels_last
    if cfg.compile is None:                                                  # on a CPU it gains nothing: benchmarks/
        alone = int(os.environ.get("WORLD_SIZE", 1)) > 1 or (cfg.num_gpus or torch.cuda.device_count()) <= 1
        compiled = alone and kept.get("compiled", device.type == "cuda" and calls >= 3000)       # no DataParallel
    else:
        compiled = cfg.compile
    candidates = [kept["precision"]] if kept and cfg.precision == "auto" else precisions(cfg, device)
    options = [Arithmetic(device.type, precision, channels_last, compiled, kept.get("split", 1))
               for precision in candidates]
    if len(options) == 1 or seconds is None:
        return options[0]
    times = [[seconds(option) for option in options] for _ in range(4)][1:]  # in turn: a machine's pace changes
    plain, reduced = map(min, zip(*times, strict=True))
    return options[1] if reduced < 0.85 * plain else options[0]


def compiled_network(network: nn.Module, graphs: bool) -> nn.Module:
    """torch.compile, with CUDA graphs where `graphs`; where it fails the network is run as it is."""
    torch._dynamo.config.suppress_errors = True                              # it prints what went wrong
    return torch.compile(network, mode="reduce-overhead" if graphs else None)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: each step asks for the same again, and memory that is new to the process is mapped
    in page by page, which took a third of a step."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):                              # another C library
            for option, value in ((-4, 0), (-1, -1), (-2, 2**26)):           # M_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD
                ctypes.CDLL(None).mallopt(option, value)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; a large number where nobody can tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**60


class RunLog:
    """metrics.csv and config.json in the run's folder, and the trackers asked for; for rank 0. Rows that cannot be
    written are written later. machine: what it runs on, for people."""

    COLUMNS = ("step", "epoch", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "val_loss", "lr", "grad_norm",
               "images_per_second", "seconds", "skipped_steps")

    def __init__(self, folder: Path, cfg: Config, step: int, machine: dict[str, str]):
        self.path, self.rows, self.file, self.about = folder / "metrics.csv", [], None, folder / "config.json"
        with suppress(OSError, ValueError, KeyError, csv.Error):
            for row in csv.DictReader(self.path.read_text().splitlines(), restval="") if step else ():
                if row["seconds"] and row["step"].isdecimal():               # others were written by half
                    self.rows.append([row.get(column, "") for column in self.COLUMNS])
        self.rewind(step)
        self.machine, self.begun, self.run_id = machine, time.perf_counter(), os.urandom(8).hex()
        with suppress(OSError, ValueError, TypeError, KeyError):             # written by other hands, or by half
            known = json.loads(self.about.read_text()) if step else {}
            self.run_id = str(known["run_id"])                               # trackers go on under it
            self.begun -= float(known["seconds"])
        self.write_config(cfg)
        self.trackers, self.machine_load = {}, dict
        if cfg.use_tensorboard or cfg.use_wandb:
            import trackers

            self.trackers = trackers.start_trackers(cfg, folder, self.run_id, step)
            self.machine_load = trackers.machine_load

    def write_config(self, cfg: Config) -> None:
        """config.json: what repeats the run, what it ran on, and for how long so far."""
        content = dict(config=dataclasses.asdict(cfg), torch=torch.__version__, run_id=self.run_id,
                       machine=self.machine, seconds=round(time.perf_counter() - self.begun, 1))
        attempt(str(self.about), lambda: write_json(self.about, content))

    def rewind(self, step: int) -> None:
        """Forget the rows after a step, which are trained again."""
        self.rows = [row for row in self.rows if int(row[0]) <= step]
        attempt(str(self.path), self.write_all)

    def write_all(self) -> None:
        """Write the file anew and go on at its end."""
        self.file = self.file.close() if self.file else None                 # None as long as this fails
        text = "".join(",".join(row) + "\n" for row in (self.COLUMNS, *self.rows))
        write_atomically(self.path, lambda file: file.write(text.encode()))
        self.file = open(self.path, "ab", buffering=0)                       # noqa: SIM115 (open for the whole run)

    def write_last(self) -> None:
        """Add the last row, or all where the file could not be written before."""
        if self.file is None:
            self.write_all()
        else:
            line = (",".join(self.rows[-1]) + "\n").encode()
            file, self.file = self.file, None
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.file = file

    def row(self, values: dict) -> None:
        """One line of metrics.csv, and the same numbers to the trackers."""
        self.rows.append([str(values[column]) for column in self.COLUMNS])
        attempt(str(self.path), self.write_last)
        if self.trackers:
            self.track(values["step"], {**{k: v for k, v in values.items() if k != "step" and v != ""},
                                        **self.machine_load()})

    def track(self, step: int, values: dict) -> None:
        """Numbers and pictures (paths) to the trackers."""
        self.each_tracker(lambda tracker: tracker.log(step, values))

    def each_tracker(self, work: Callable) -> None:
        """work(tracker) for each. One that fails is dropped: training goes on."""
        for name, tracker in list(self.trackers.items()):
            try:
                work(tracker)
            except Exception as error:
                complain(f"{name} failed ({first_line(error)}): going on without it")
                del self.trackers[name]

    def close(self, cfg: Config) -> None:
        """Write the configuration as it ended; let go of trackers, with the last of each number, and of the file."""
        self.write_config(cfg)
        final = {}
        for row in self.rows if self.trackers else ():
            with suppress(ValueError):                                       # a power cut may leave anything in a file
                final |= {column: float(value) for column, value in zip(self.COLUMNS, row, strict=True) if value}
        self.each_tracker(lambda tracker: tracker.finish(final))
        if self.file:
            self.file.close()


def to_pil(image: Tensor) -> Image.Image:
    """uint8 [C, H, W] as a grey or colour picture."""
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())


def save_grid(images: Tensor, path: Path, column_names: list[str], columns: int = 0) -> None:
    """uint8 [N, C, H, W] as one picture, row by row, a named column per class; small images are enlarged."""
    columns = columns or len(column_names) or math.ceil(math.sqrt(len(images)))
    zoom = max(1, round(64 / max(images.shape[2:])))
    height, width, gap, head = images.shape[2] * zoom, images.shape[3] * zoom, 4, 18 if column_names else 0
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap + head)
    grid = Image.new("RGB" if images.shape[1] == 3 else "L", size, "white")
    for i, image in enumerate(images):
        tile = to_pil(image).resize((width, height), Image.Resampling.BICUBIC)
        grid.paste(tile, (gap + i % columns * (width + gap), gap + head + i // columns * (height + gap)))
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(12)
    for i, name in enumerate(column_names):
        while len(name) > 1 and font.getlength(name) > width:
            name = name[:-1]
        pen.text((gap + i * (width + gap) + width / 2, head - 6), name, "black", font, anchor="ms")
    write_atomically(path, lambda file: grid.save(file, "PNG"))


def draw_with_bar(model: Model, labels: list[int], cfg: Config, first: int = 0) -> Iterator[Tensor]:
    """Model.draw with a progress bar over the network's steps."""
    total = math.ceil(len(labels) / model.batch_size(cfg)) * sampling_steps(cfg)
    with tqdm(total=total, desc="sampling", unit="step", leave=False, disable=None) as bar:
        yield from model.draw(labels, cfg, bar.update, first)


def save_strip(model: Model, labels: list[int], cfg: Config, path: Path, first: int = 0) -> None:
    """The way from noise to image: a row per label, columns every plot_freq_interval timesteps (or ten in all)."""
    every = cfg.plot_freq_interval or max(1, cfg.timesteps // 10)
    frames, last, final = [], cfg.timesteps + every, sampling_grid(cfg, model.diffusion.alpha_bar)[-1]
    for t, x, _ in model.sample(labels, cfg, first):
        if last - t >= every or t == final:
            frames.append(to_uint8(x))
            last = t
    save_grid(torch.stack(frames, 1).flatten(0, 1), path, [], columns=len(frames))


@lru_cache
def network_size(cfg: Config, shape: tuple[int, int, int], num_classes: int) -> tuple[int, int]:
    """Parameters of the configured network, and values that its layers put out for one image, about half of what
    training keeps. No memory is taken for either."""
    outputs = []
    with torch.device("meta"):
        network = build_unet(dataclasses.replace(cfg, gradient_checkpointing=False), shape[0], num_classes)
        for module in network.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda module, inputs, output: outputs.append(output[0].numel()))
            if isinstance(module, Attention):                                # weights and their softmax, see attend
                module.register_forward_hook(lambda module, inputs, output: outputs.append(
                    module.heads * min(output[0, 0].numel(), 256) ** 2))
        network(torch.zeros(2, *shape), torch.zeros(2, dtype=torch.long))   # of one, a norm may not like a 1x1 map
    return sum(p.numel() for p in network.parameters()), sum(outputs)


def training_memory(cfg: Config, shape: tuple[int, int, int], num_classes: int, batch: int,
                    precision: str) -> tuple[int, int]:
    """Bytes for weights, gradients, Adam's two moments, the average and a step's images and noise; and for the
    activations of one micro-batch of `batch` images."""
    weights, values = network_size(cfg, shape, num_classes)
    inputs = 3 * batch * cfg.gradient_accumulation_steps * math.prod(shape)
    activations = 2 * batch * values * (4 if precision == "fp32" else 2)
    return 4 * weights * (4 + cfg.use_ema) + 4 * inputs, activations // (3 if cfg.gradient_checkpointing else 1)


def fitting_parts(cfg: Config, shape: tuple[int, int, int], num_classes: int, batch: int, precision: str,
                  device: torch.device) -> tuple[int, str]:
    """Parts in which a micro-batch fits into the memory that is free, by estimate, and what to say of it. Raises
    UserError where not even weights and images fit."""
    free = 0.9 * free_memory(device) / int(os.environ.get("LOCAL_WORLD_SIZE", 1) if device.type == "cpu" else 1)
    fixed, moving = training_memory(cfg, shape, num_classes, batch, precision)
    need = f"{(fixed + moving) / 2**30:.2g} GiB, {free / 2**30:.2g} GiB are free"
    if fixed > free:
        raise UserError(f"training would take about {need}: lower --base_channels, --channel_mults, --img_size or "
                        "--batch_size")
    parts = max(1, math.ceil(moving / (free - fixed + 1)))
    if parts <= batch:
        return parts, "" if parts == 1 else f"a step is computed in {parts} parts: at once it would take about {need}"
    return batch, (f"even one image at a time takes more memory than is free (a step about {need}): the machine will "
                   "swap or run out; lower --base_channels or --img_size, or use --gradient_checkpointing")


# ---- 8  EMA and checkpoints --------------------------------------------------------------------
# The averaged network that images are drawn from; files that are safe to load and atomic to write.


class EMA:
    """An exponential moving average of the weights in a network of its own; `network` is that one. After n updates
    the decay is min(decay, (1 + n) / (10 + n)); up to step `start` it is a plain copy."""

    def __init__(self, network: nn.Module, decay: float, every: int = 1, start: int = 0):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay, self.every, self.start = decay, every, start

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (1, 2, ...)."""
        if step % self.every:
            return
        n = max(0, step - self.start) // self.every
        decay = min(self.decay, (1 + n) / (10 + n)) if step > self.start else 0.0
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        average(list(self.network.parameters()), list(network.parameters()), n)


FORMAT = 1                                                                   # of checkpoint files


def write_atomically(path: Path, write: Callable, replacing: Callable[[Path], None] = lambda temporary: None) -> None:
    """Make a file by write(binary file): afterwards it is whole and on the disk, or the old one is untouched.
    replacing(new file) is called before it takes the old one's place."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        replacing(temporary)
        os.replace(temporary, path)
        if os.name == "posix":                                               # the rename itself has to last
            folder = os.open(path.parent, os.O_RDONLY)
            with suppress(OSError):                                          # not every file system can
                os.fsync(folder)
            os.close(folder)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def network_name(cfg: Config) -> str:
    return f"{cfg.timesteps}_{cfg.emb_dim}_{'attention' if cfg.use_attention else 'noattention'}"


def checkpoint_path(cfg: Config, step: int) -> Path:
    """Where the checkpoint of that step goes: one file per kind of run, or one folder per step of an experiment."""
    if cfg.experiment_name:
        return Path(cfg.working_directory, cfg.experiment_name, f"checkpoint_{step}", "model.pt")
    return Path(cfg.working_directory, f"diffusion_checkpoint_{cfg.dataset}_{network_name(cfg)}.pt")


def samples_path(cfg: Config) -> Path:
    """The folder for sample grids and metrics."""
    name = cfg.experiment_name or cfg.dataset
    return Path(cfg.generated_directory, f"samples_{name}_{cfg.schedule_type}_{network_name(cfg)}")


def by_age(paths) -> list[Path]:
    """Existing paths, the newest first."""
    times = {}
    for path in paths:
        with suppress(OSError):                                              # of a run that renames it
            times[path] = path.stat().st_mtime_ns
    return sorted(times, key=times.get, reverse=True)


def kept_checkpoints(cfg: Config) -> list[Path]:
    """This run's checkpoints, the newest first."""
    path = checkpoint_path(cfg, 0)
    if cfg.experiment_name:
        return by_age(path.parent.parent.glob("checkpoint_*/model.pt"))
    steps = (p for p in path.parent.glob(f"{path.stem}_step*.pt") if p.stem.rpartition("_step")[2].isdecimal())
    return by_age([path, *steps])                                            # not _step9_old1


def save_checkpoint(state: dict, cfg: Config) -> Path:
    """Write the state and let go of the oldest beyond num_keep_checkpoints, but never of the newest good one. Raises
    OSError where the disk is full or cannot be written to: all is as it was."""
    path, last = checkpoint_path(cfg, state["step"]), cfg.num_keep_checkpoints

    def write(file) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:                                        # its way to say that the disk is full
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(first_line(error)) from error

    def replacing(temporary: Path) -> None:
        if not zip_is_sound(temporary):
            raise OSError(f"{path} was not written as it should be")
        before = None if cfg.experiment_name else readable(path, peek=True)
        if before and before["step"] != state["step"] and (last > 1 or not state["good"]):
            os.replace(path, path.with_stem(f"{path.stem}_step{before['step']}"))

    write_atomically(path, write, replacing)
    others = [p for p in kept_checkpoints(cfg) if p != path]
    spared = None if state["good"] else next((p for p in others if is_good(readable(p))), None)
    for old in others[last - 1 :]:
        with suppress(OSError):                                              # the new one is safe in any case
            if old != spared:
                old.unlink()
                if cfg.experiment_name and not any(old.parent.iterdir()):
                    old.parent.rmdir()
    return path


def zip_is_sound(path) -> bool:
    """Whether every part of a checkpoint, a ZIP file as torch.save writes it, has the checksum noted beside it."""
    try:
        with zipfile.ZipFile(path) as archive:
            # nothing that blows up, nothing that torch takes for a folder and leaves unread
            plain = all(e.compress_type == zipfile.ZIP_STORED and e.external_attr == 0 for e in archive.infolist())
            return plain and archive.testzip() is None
    except zipfile.BadZipFile:
        return False


def is_good(state: dict | None) -> bool:
    """Whether a checkpoint could be read and was made while the loss was finite and in its range."""
    return state is not None and state.get("good", True)


def readable(path: Path, peek: bool = False) -> dict | None:
    """A checkpoint's content; None where there is none that can be read."""
    try:
        return load_checkpoint(path, peek)
    except UserError:
        return None


@contextmanager
def run_lock(cfg: Config) -> Iterator[None]:
    """Hold what the run writes to, checkpoints and samples. Raises UserError where another run does, naming it, or
    where nothing can be written. The operating system lets go for a process that dies."""
    from filelock import FileLock, Timeout  # torch depends on it

    checkpoint = checkpoint_path(cfg, 0)
    places = checkpoint.parents[1] if cfg.experiment_name else checkpoint, samples_path(cfg)
    with ExitStack() as held:
        for place, flag in zip(places, ("--working_directory", "--generated_directory"), strict=True):
            lock, owner = (place.with_name(f".{place.name}.{ending}") for ending in ("lock", "owner"))
            try:
                lock.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(lock, timeout=6))                # forked workers outlive a run by 5 seconds
            except Timeout:
                name = owner.read_text(errors="replace") if owner.exists() else "another run"
                raise UserError(f"{place} is in use by {name}\nWait for it, stop it, or give this run an "
                                "--experiment_name of its own.") from None
            except OSError as error:
                raise UserError(f"cannot write to {lock.parent} ({error.strerror}): choose another {flag}") from error
            with suppress(OSError):                                          # a full disk: see attempt
                owner.write_text(f"process {os.getpid()} on {platform.node()} since {time.ctime()}: "
                                 f"{shlex.join(sys.argv)}")
        yield


def complain(text: str) -> None:
    """A line on stderr, which may be a file on the disk that is full."""
    with suppress(OSError):
        print(text, file=sys.stderr)


def attempt(what: str, write: Callable[[], object]) -> bool:
    """Whether writing succeeds: where the disk is full or cannot be written to it is said, and training goes on."""
    try:
        write()
        return True
    except OSError as error:
        complain(f"\nwarning: {what} could not be written ({error.strerror or error}): going on")
        return False


def find_checkpoint(cfg: Config) -> Path:
    """The checkpoint named by resume_from_checkpoint. Raises UserError if it is not there."""
    name, home = cfg.resume_from_checkpoint, Path(cfg.working_directory)
    for place in (Path(name), home / cfg.experiment_name / name / "model.pt", home / name, home / f"{name}.pt"):
        if place.exists():
            return place / "model.pt" if place.is_dir() else place
    others = ", ".join(map(str, kept_checkpoints(cfg))) or "none"
    raise UserError(f"--resume_from_checkpoint {name}: not found; this run's checkpoints: {others}")


def load_checkpoint(path: str | Path, peek: bool = False) -> dict:
    """A checkpoint's content on the CPU, all of it checked; for a peek read only when used, tensors unchecked. Nothing
    in it is run. Raises UserError."""
    try:
        with open(path, "rb") as file:
            sound = zipfile.is_zipfile(file) if peek else zip_is_sound(file)
        if not sound:
            raise UserError(f"{path} is damaged, or was never a checkpoint of this program")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=peek)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it holds more than tensors and plain values, it could run code") from error
    except Exception as error:                                               # torch raises many kinds here
        raise UserError(f"{path} is not a readable checkpoint of this program ({first_line(error)})") from error
    if not (isinstance(state, dict) and type(state.get("format")) is int and state["format"] == FORMAT):
        raise UserError(f"{path} is not a checkpoint of this program (format {FORMAT})")
    try:
        check_state(state, peek)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    except Exception as error:                                               # anything may be anywhere
        raise UserError(f"{path} cannot be used ({type(error).__name__}: {first_line(error)})") from error
    return state


def is_tensor(v, shape: tuple[int, ...]) -> bool:
    """Whether v is a tensor of floats of that shape, with memory for each of them."""
    return (isinstance(v, Tensor) and v.shape == shape and v.is_floating_point() and v.is_cpu
            and v.untyped_storage().nbytes() >= v.numel() * v.element_size())


def check_state(state: dict, peek: bool) -> None:
    """Raise UserError, or whatever strange content leads to, unless a checkpoint holds what its configuration needs."""
    shape, names, history = state["shape"], state["class_names"], state["loss_history"]
    arithmetic, plain = state.get("arithmetic", vars(Arithmetic())), vars(Arithmetic())
    counts = state["step"], state.get("slowed", 0), state.get("range_since", 0)
    sound = (isinstance(state["config"], dict) and isinstance(shape, list) and isinstance(names, list)
             and len(shape) == 3 and all(type(n) is int and 0 < n <= 4096 for n in shape)
             and all(type(name) is str for name in names) and all(type(n) is int and 0 <= n < 2**40 for n in counts)
             and type(state["epoch"]) in (int, float) and type(state["data"]) is str and type(history) is list
             and all(type(row) is list and [*map(type, row)] == [int, float] for row in history)
             and {k: type(v) for k, v in arithmetic.items()} == {k: type(v) for k, v in plain.items()}
             and arithmetic["precision"] in PRECISIONS and type(state.get("good", True)) is bool
             and all(type(v) in (int, float) for v in state["scaler"].values()))
    if not sound:
        raise UserError("its values are not those of a checkpoint")
    cfg = configure(state["config"])
    if not cfg.dataset:
        raise UserError("it names no dataset")
    if peek:
        return
    check_image_size(*shape[1:], len(cfg.channel_mults), cfg.patch_size)
    with torch.device("meta"):
        wanted = {name: v.shape for name, v in build_unet(cfg, shape[0], len(names)).state_dict().items()}
    adam, moments = state["optimizer"]["state"], Moments(**state["moments"])
    pooled = (len(names) + 1, shape[0], *(min(n, 64) for n in moments.mean.shape[2:]))
    fits = all(part.keys() == wanted.keys() and all(is_tensor(part[k], v) for k, v in wanted.items())
               for part in (state["model"], state["ema"] or state["model"]))
    fits = fits and type(adam) is dict and all(is_tensor(adam[i][key], v if key != "step" else ())
                                               for i, v in enumerate(wanted.values() if adam else ())
                                               for key in ("step", "exp_avg", "exp_avg_sq"))
    if not (fits and is_tensor(moments.mean, pooled) and is_tensor(moments.var, pooled)
            and is_tensor(state["meter"], (2, 4, 2)) and is_tensor(state.get("faults", torch.zeros(3)), (3,))):
        raise UserError("its tensors are not those of a run with its configuration")


def check_fits(path: str | Path, given: dict, saved: dict, advice: str = "Leave those flags out.") -> None:
    """Raise UserError if a setting asked for shapes the network or schedule differently from the checkpoint."""
    differing = [f"{name} is {written(name, saved[name])} there, {written(name, value)} asked for"
                 for name, value in given.items()
                 if FIELDS[name].metadata["fixed"] and value is not None and name in saved and saved[name] != value]
    if differing:
        raise UserError(f"{path} does not fit: {'; '.join(differing)}.\n{advice}")


def starting_options(given: dict) -> dict:
    """What a new run takes over from the checkpoint whose weights it starts from: network, schedule, channels of the
    images and, for a folder of them, their size. Raises UserError for flags that ask for another network."""
    path, state = given["init_from"], load_checkpoint(given["init_from"], peek=True)
    saved = {**dataclasses.asdict(configure(state["config"])), "channels": state["shape"][0]}
    network = inspect.signature(UNet).parameters.keys() | {"channels"}
    check_fits(path, {name: value for name, value in given.items() if name in network}, saved,
               "Leave those flags out, or the recipe that sets them.")
    own = {"dataset", "use_labels", *(("img_size",) if given.get("dataset", "folder") != "folder" else ())}
    return {name: saved[name] for name in FIELDS if FIELDS[name].metadata["fixed"] and name not in own}


def same_run(cfg: Config, state: dict) -> bool:
    """Whether a checkpoint in this run's place is an earlier part of it: not of a run that began with other weights
    than --init_from names, nor the end of the run that --config repeats."""
    done = state["step"] if cfg.iterations else state["epoch"]
    finished = cfg.config and done >= (cfg.iterations or cfg.epochs)
    return not finished and cfg.init_from in ("", state["config"].get("init_from", ""))


def resume_point(cfg: Config, asked: dict, runtime: Runtime | None = None) -> tuple[Path | None, dict | None]:
    """The checkpoint that the run goes on from, and its content, checked against the settings asked for; two times
    None for a new run, or where the newest one is of a run that is not to be gone on with. Without a runtime a peek.
    One that cannot be used is passed over for the one before it."""
    wanted, problems = [find_checkpoint(cfg)] if cfg.resume_from_checkpoint else [], []
    for path in wanted or (kept_checkpoints(cfg) if cfg.resume == "auto" else []):
        try:
            state = load_checkpoint(path, peek=runtime is None)
        except UserError as error:
            if wanted:
                raise
            problems.append(error)
            continue
        if not wanted and not same_run(cfg, state):
            break
        check_fits(path, asked, state["config"], "Leave those flags out to go on with it, or start another run with "
                   "--experiment_name NAME or --resume never.")
        for problem in problems if runtime else ():
            runtime.say(f"{problem}: going on from {path} instead")
        return path, state
    if problems:
        raise UserError(f"{problems[0]}.\nThis run has no other one: --resume never starts over and keeps that file.")
    if cfg.init_from:
        load_checkpoint(cfg.init_from, peek=True)                            # told before anything is made
    return None, None


def load(path: str | Path, device: str = "auto", **settings) -> Model:
    """The model in a checkpoint, averaged where it is. settings: options, as to configure. Raises UserError."""
    state = load_checkpoint(path)
    return restore(state, configure(state["config"], device=device, **settings))


def restore(state: dict, cfg: Config) -> Model:
    """The model in the content of a checkpoint, with its guide. Raises UserError for a guide that does not fit it."""
    device, shape, names = Runtime(cfg).device, tuple(state["shape"]), state["class_names"]
    need, free = 8 * network_size(cfg, shape, len(names))[0], free_memory(device)
    if need > free:
        raise UserError(f"the network takes {need / 2**30:.2g} GiB, {free / 2**30:.2g} GiB are free")
    trained = {**state.get("arithmetic", {"device": ""}), "compiled": False}  # compiling repays itself in long runs
    arithmetic, network = choose_arithmetic(cfg, device, stored=trained), build_unet(cfg, shape[0], len(names))
    network.load_state_dict((cfg.use_ema and state["ema"]) or state["model"])
    network = network.to(device, memory_format=arithmetic.layout).eval().requires_grad_(False)
    model = Model(compiled_network(network, graphs=True) if arithmetic.compiled else network,
                  build_diffusion(cfg, device), Moments(**state["moments"]), cfg, shape, names, arithmetic)
    if cfg.guide_path:                                              # its outputs have to mean the same
        guide = load(cfg.guide_path, cfg.device)
        ours, theirs = (dict(schedule=m.diffusion.alpha_bar.tolist(), images=m.shape, prediction=m.config.prediction,
                             classes=m.class_names) for m in (model, guide))
        differing = " and ".join(name for name in ours if ours[name] != theirs[name])
        if differing:
            raise UserError(f"--guide_path {cfg.guide_path} does not fit the model in {differing}")
        model.guide = guide.network
    return model


# ---- 9  Training -------------------------------------------------------------------------------
# One step, and the loop around it. Blind to which data it trains on, and to the rank but for what it writes.

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def after_warmup(curve: Callable[[float], float], optimizer, lr: float, warmup: int, total: int):
    """Linear warm-up to lr, then lr times curve(part of the rest that is done)."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1.0, (step + 1) / (warmup + 1)) * curve(max(0, step - warmup) / max(1, total - warmup)))


def one_cycle(optimizer, lr: float, warmup: int, total: int):
    """torch's OneCycleLR (Smith & Topin 2017), kept from phases of a single step: it would divide by zero."""
    warmup = min(warmup, total - 2)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, cycle_momentum=False,
                                               pct_start=warmup / total if warmup > 1 else 0.0)


# (optimizer, highest lr, warm-up steps, all steps) -> scheduler
LR_SCHEDULES = {
    "onecycle": one_cycle,
    "cosine": partial(after_warmup, lambda part: (1 + math.cos(math.pi * part)) / 2),
    "constant": partial(after_warmup, lambda part: 1.0),
}


def start_from(network: UNet, state: dict) -> str:
    """Give a new network the weights in another run's checkpoint, averaged where they are, and say what becomes of the
    class embedding: of another number of classes each begins as no label did. Raises UserError."""
    weights, before, now = dict(state["ema"] or state["model"]), len(state["class_names"]), network.num_classes
    if before == now:
        network.load_state_dict(weights)
        return f"{now} classes as there" if now else "no classes"
    if network.concat and not (before and now):
        raise UserError("--init_from: with --conditioning concat, labels cannot come or go: see --use_labels")
    null = weights.pop("class_embedding.weight")[-1] if before else torch.zeros(network.time_mlp[2].out_features)
    if now:
        weights["class_embedding.weight"] = null.repeat(now + 1, 1)
    else:
        weights["time_mlp.2.bias"] = weights["time_mlp.2.bias"] + null
    network.load_state_dict(weights)
    return f"the class embedding begins anew: {now} classes, {before} there"


def training_length(cfg: Config, images: int) -> tuple[int, int, int]:
    """Steps of a run over so many images, steps of an epoch, images of a step."""
    size = cfg.batch_size * cfg.gradient_accumulation_steps
    per_epoch = max(1, images // size)
    return cfg.iterations or cfg.epochs * per_epoch, per_epoch, size


class Training:
    """The state of a run: network, average, optimizer, schedules, losses; and what is done with them."""

    def __init__(self, cfg: Config, runtime: Runtime, state: dict | None = None, arithmetic: Arithmetic | None = None):
        with runtime.main_first():
            data = load_data(cfg)
        names, shape = data.class_names, tuple(data.images.shape[1:])
        flip = DATASETS[cfg.dataset].flip if cfg.flip is None else cfg.flip
        cfg = dataclasses.replace(cfg, flip=flip, use_labels=bool(names), channels=shape[0], img_size=shape[1:])
        self.cfg, self.runtime, self.data, self.shape, self.null = cfg, runtime, data, shape, len(names)
        indices, self.held_out = split(data, cfg.val_fraction)
        self.total, _, self.size = training_length(cfg, len(indices))
        if self.size < runtime.world:
            raise UserError(f"--batch_size {cfg.batch_size} is too small for {runtime.world} processes")
        self.fitting = partial(fitting_parts, cfg, shape, self.null, device=runtime.device, batch=max(
            1, self.size // runtime.num_devices // cfg.gradient_accumulation_steps))
        self.fitting(precision="bf16")                                       # refuses what never fits
        self.moments = image_moments(data, indices, flip)
        self.batches = Batches(data, indices, self.size, flip, cfg.seed, runtime.device, runtime.rank, runtime.world)
        self.diffusion = build_diffusion(cfg, runtime.device)

        self.step, network = 0, build_unet(cfg, shape[0], self.null) if state else self.first_network()
        self.network = network.to(runtime.device)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=False)
        self.arithmetic = arithmetic or self.settle_arithmetic((state or {}).get("arithmetic"))
        self.network.to(memory_format=self.arithmetic.layout)
        # graphs save launches, which is what counts in small steps; gradients of several parts cannot add up in them
        parts = cfg.gradient_accumulation_steps * self.arithmetic.split
        graphs = parts == 1 and self.size * math.prod(shape[1:]) < 2**18
        self.forward = runtime.parallel(self.network, self.arithmetic, graphs)
        average = (cfg.ema_decay, cfg.ema_update_rate, cfg.ema_start) if cfg.use_ema else (0.0,)  # 0: a plain copy
        self.ema = EMA(self.network, *average)
        self.model = Model(self.ema.network, self.diffusion, self.moments, cfg, shape, names,
                           dataclasses.replace(self.arithmetic, compiled=False))
        self.optimizer = OPTIMIZERS[cfg.optimizer](self.network.parameters(), weight_decay=cfg.weight_decay,
                                                   fused=runtime.device.type in ("cpu", "cuda"))
        self.meter = torch.zeros(2, 4, 2, device=runtime.device)             # [log or epoch, quartile, loss or count]
        self.faults = torch.zeros(3, device=runtime.device)                  # in a row: now, most since a log; in all
        self.grad_norm = torch.zeros((), device=runtime.device)
        self.begin()
        if state:
            self.resume(state)

    @property
    def epoch(self) -> float:
        """Epochs done, counted in steps."""
        return self.step / self.batches.steps_per_epoch

    def state(self) -> dict:
        """Everything that a run needs to go on and a model needs to draw: tensors and plain values. Called by all
        processes, for the sums of each."""
        return dict(
            format=FORMAT, config=dataclasses.asdict(self.cfg), step=self.step, epoch=self.epoch,
            shape=list(self.shape), class_names=self.data.class_names, data=self.data.digest(),
            loss_history=self.history, meter=self.gathered(), moments=vars(self.moments), faults=self.faults,
            slowed=self.slowed, range_since=self.range_since, good=self.rows_out() == 0 and not self.faults[0],
            model=self.network.state_dict(), ema=self.ema.network.state_dict() if self.cfg.use_ema else None,
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(), arithmetic=vars(self.arithmetic),
            lr_schedule=dict(name=self.cfg.lr_schedule, step=self.step, total_steps=self.total))

    def gathered(self) -> Tensor:
        """The sums of losses and counts over all processes."""
        meter = self.meter.clone()
        if self.runtime.world > 1:
            torch.distributed.all_reduce(meter)
        return meter

    def first_network(self) -> UNet:
        """The network of step 0: by the seed, and with the weights of another run where they are asked for."""
        torch.manual_seed(mix(self.cfg.seed))
        network = build_unet(self.cfg, self.shape[0], self.null)
        if self.cfg.init_from:
            state = load_checkpoint(self.cfg.init_from)
            self.runtime.say(f"weights  of {self.cfg.init_from}, step {state['step']:,}; {start_from(network, state)}")
        return network

    def begin(self) -> None:
        """Stand at step 0; the weights are those that the network has."""
        self.step, self.history, self.range_since, self.slowed = 0, [], 0, 0
        self.clock = (0, time.perf_counter())
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.arithmetic.precision == "fp16")
        self.meter.zero_()
        self.faults.zero_()
        self.optimizer.state.clear()
        self.fit(self.total)

    def resume(self, state: dict) -> None:
        """Go on from a checkpoint's state; what its optimizer learned is kept, the settings are this run's."""
        shape, names = state["shape"], state["class_names"]
        other = "other images than these" if state["data"] != self.data.digest() else ""
        if names != self.data.class_names:
            other = "{}, the data has {}".format(*((listed(some) or "no classes")[:100]
                                                   for some in (names, self.data.class_names)))
        if tuple(shape) != self.shape:
            other = f"images {shape}, the data has {list(self.shape)}"
        if other:
            raise UserError(f"the checkpoint was trained on {other}: start another run with --experiment_name NAME or "
                            "--resume never, from these weights with --init_from CHECKPOINT")
        self.network.load_state_dict(state["model"])
        self.ema.network.load_state_dict(state["ema"] or state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(dict(state=state["optimizer"]["state"], param_groups=groups))
        if state["scaler"]:                                                  # empty unless it was fp16 as well
            self.scaler.load_state_dict(state["scaler"])
        self.meter.copy_(state["meter"] if self.runtime.is_main else torch.zeros_like(self.meter))  # sums of all
        self.faults.copy_(state.get("faults", torch.zeros(3)))
        self.step, self.history = state["step"], list(state["loss_history"])
        self.clock = (self.step, time.perf_counter())
        before, now = ({name: value for name, value in {**dataclasses.asdict(self.cfg), **config}.items()
                        if name not in (*LOCAL, *LENGTHS)} for config in (state["config"], {}))
        self.range_since = state.get("range_since", 0) if before == now else self.step  # other settings, other losses
        self.slowed = state.get("slowed", 0) if before["learning_rate"] == now["learning_rate"] else 0
        self.fit(self.total)

    def fit(self, total: int) -> None:
        """Make it a run of `total` steps: the learning rate goes on from where such a run would stand by now."""
        lr = self.cfg.learning_rate * (self.runtime.num_devices if self.cfg.scale_lr else 1) / 2**self.slowed
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] = lr
        warmup = min(total // 10, 1000) if self.cfg.warmup_steps is None else self.cfg.warmup_steps
        self.lr_schedule = LR_SCHEDULES[self.cfg.lr_schedule](self.optimizer, lr, warmup, total)
        self.total = total
        self.cfg = dataclasses.replace(self.cfg, iterations=total if self.cfg.iterations else 0)  # what is stored
        if self.step:
            self.lr_schedule.last_epoch = min(self.step, total) - 1
            with warnings.catch_warnings():                                  # it expects the optimizer to go first
                warnings.simplefilter("ignore")
                self.lr_schedule.step()

    def rows_out(self) -> int:
        """How many of the last logged losses, up to ten, are more than half above the range of the twenty before them,
        a few outliers aside."""
        losses = [loss for step, loss in self.history[-30:] if step > self.range_since]
        return next((n for n in range(min(10, len(losses) - 20), 0, -1)
                     if min(losses[-n:]) > 1.5 * sorted(losses[-n - 20 : -n])[-4]), 0)

    def trouble(self, logged: bool) -> str:
        """Why the run cannot go on like this; empty where all is well. Losses are judged when a row of them has been
        logged, so that a checkpoint in between changes nothing. Waits for the device."""
        if not torch.stack([p.isfinite().all() for p in self.network.parameters()]).all():
            return "weights are not finite"
        if not logged:
            return ""
        longest = int(self.faults[1])
        self.faults[1] = self.faults[0]
        if longest >= 10:
            return f"the loss or its gradient was not finite in {longest} steps in a row"
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            return "gradients overflow in fp16 at any scale"
        return "the loss has been far above its range for ten rows of metrics.csv" if self.rows_out() == 10 else ""

    def roll_back(self, reason: str, start: Path | None) -> None:
        """Go back to the start, a checkpoint, or another good one of this run, or to the beginning, with half the
        learning rate. Raises UserError after three times."""
        at, slowed, cfg = self.step, self.slowed + 1, self.cfg
        if slowed > 3:
            raise UserError(f"training has diverged for the fourth time, by step {at}: {reason}.\nThe last good "
                            "checkpoint is as it was: lower --learning_rate or use --precision fp32.", code=1)
        states = map(readable, (*([start] if start else []), *kept_checkpoints(cfg)))
        state = next(filter(is_good, states), None)
        if state:
            self.resume(state)
        else:
            self.network.load_state_dict(self.first_network().state_dict())
            self.ema.network.load_state_dict(self.network.state_dict())
            self.begin()
        self.slowed = max(slowed, self.slowed + 1)
        self.fit(self.total)
        self.runtime.next_look = 0                                           # it may lie far ahead
        self.runtime.say(f"step {at}: {reason}; going on from step {self.step} with {0.5**self.slowed:g} times the "
                         "learning rate")

    def draws(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's share of a step's randomness, a function of (seed, step): t, eps, the noise that the
        network sees, labels to drop. Timesteps are spread evenly over the batch (2107.00630, appendix I.1)."""
        random = generator(self.cfg.seed, STREAM_STEP, self.step, device=self.runtime.device)
        where = dict(device=self.runtime.device, generator=random)
        spread = (torch.arange(self.size, device=self.runtime.device) + torch.rand(1, **where)) / self.size
        t, eps = self.diffusion.timesteps(spread), torch.randn(self.size, *self.shape, **where)
        drop, noise = torch.rand(self.size, **where) < self.cfg.label_dropout, eps
        if self.cfg.input_perturbation:                                      # 2301.11706, algorithm 1
            noise = eps + self.cfg.input_perturbation * torch.randn(eps.shape, **where)
        share = self.batches.share
        return t[share], eps[share], noise[share], drop[share]

    def settle_arithmetic(self, stored: dict | None) -> Arithmetic:
        """How this run computes: as it did so far, else what suits the device, timed on real steps if need be."""
        device, cfg = self.runtime.device, self.cfg

        def seconds(arithmetic: Arithmetic) -> float:
            self.arithmetic = arithmetic
            self.network.to(memory_format=arithmetic.layout)
            batch, begun = [v[:16] for v in self.batch()], time.perf_counter()
            self.gradients(batch, self.network)
            self.network.zero_grad()
            return time.perf_counter() - begun

        calls = self.total * cfg.gradient_accumulation_steps
        chosen = self.arithmetic = choose_arithmetic(cfg, device, calls, stored, seconds)
        if device.type == "cpu":
            parts, warning = self.fitting(precision=chosen.precision)
            if stored and stored["device"] == "cpu":                         # so that the result is the same
                parts, warning = chosen.split, warning if parts > chosen.split else ""
            if warning:
                self.runtime.say(f"memory   {warning}")
            chosen = dataclasses.replace(chosen, split=parts)
        elif device.type == "cuda" and self.runtime.replicas == 1:           # a trial, with room for what is to come
            room = [torch.empty_like(p) for p in self.network.parameters() for _ in range(4)]
            self.gradients_that_fit(self.batch(), self.network)
            self.network.zero_grad()
            chosen = self.arithmetic
            del room
        names, agreed = list(PRECISIONS), self.runtime.agreed                # processes may have measured differently
        return dataclasses.replace(chosen, precision=names[agreed(names.index(chosen.precision))],
                                   split=agreed(chosen.split, largest=True))

    def batch(self) -> list[Tensor]:
        """This process's share of a step's batch: x0, t, eps, y, the noise that the network sees."""
        x0, y = self.batches(self.step)
        t, eps, noise, drop = self.draws()
        x0, eps, noise = (v.contiguous(memory_format=self.arithmetic.layout) for v in (x0, eps, noise))
        return [x0, t, eps, torch.where(drop, self.null, y), noise]

    def gradients(self, batch: list[Tensor], forward: Callable) -> Tensor:
        """Add up the gradient of the mean loss, in micro-batches; returns sums of losses and counts, [quartile, 2]."""
        cfg, sums = self.cfg, torch.zeros(4, 2, device=self.runtime.device)
        if cfg.dropout:
            torch.manual_seed(mix(cfg.seed, STREAM_DROPOUT, self.step, self.runtime.rank))
        micro_batches = list(zip(*(v.chunk(cfg.gradient_accumulation_steps * self.arithmetic.split) for v in batch),
                                 strict=True))
        for i, (x0, t, eps, y, noise) in enumerate(micro_batches, 1):
            alone = forward is self.network or i == len(micro_batches) or self.runtime.world == 1
            with nullcontext() if alone else forward.no_sync():
                with self.arithmetic.running():
                    losses = self.diffusion.loss(forward, x0, t, eps, y, noise)
                # DistributedDataParallel averages over processes: sum / size * world is the batch's mean. A loss that
                # is not finite makes the gradient nan, whatever its derivative, so that all processes learn of it
                total = losses.sum()
                valid = torch.where(total.isfinite(), self.runtime.world / self.size, math.nan)
                self.scaler.scale(total * valid.detach()).backward()
            sums.index_add_(0, t * 4 // self.diffusion.T, torch.stack([losses.detach(), torch.ones_like(losses)], 1))
        return sums

    def gradients_that_fit(self, batch: list[Tensor], forward: Callable) -> Tensor:
        """`gradients`, in twice as many parts, from now on, as long as they do not fit into memory."""
        while True:
            try:
                return self.gradients(batch, forward)
            except torch.OutOfMemoryError:
                if len(batch[0]) <= self.cfg.gradient_accumulation_steps * self.arithmetic.split or (
                        forward is not self.network and self.runtime.world > 1):     # the others would wait for ever
                    raise
            self.network.zero_grad()
            self.arithmetic = dataclasses.replace(self.arithmetic, split=2 * self.arithmetic.split)
            if forward is not self.network:                                  # without graphs
                forward = self.forward = self.runtime.parallel(self.network, self.arithmetic)
            self.runtime.say(f"out of memory: from here on a step is computed in {self.arithmetic.split} parts")

    def train_step(self) -> None:
        """One optimizer step on a batch, skipped where loss or gradient is not finite. Nothing here waits for CUDA."""
        sums = self.gradients_that_fit(self.batch(), self.forward)
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.cfg.max_grad_norm or math.inf)
        finite = sums.isfinite().all().float()
        self.meter += torch.where(finite > 0, sums, 0.0)                     # a loss that is not finite is not averaged
        if self.scaler.is_enabled() and self.runtime.world > 1:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        # in fp16 a gradient may overflow: GradScaler skips the step, too, and lowers its scale
        fault = 1 - (finite if self.scaler.is_enabled() else self.grad_norm.isfinite().float())
        now = (self.faults[0] + 1) * fault
        self.faults = torch.stack([now, torch.maximum(self.faults[1], now), self.faults[2] + fault])
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        elif self.optimizer.defaults["fused"]:                               # these look at found_inf on the device
            self.optimizer.grad_scale, self.optimizer.found_inf = None, fault
            self.optimizer.step()
        elif not fault:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.lr_schedule.step()
        self.step += 1
        self.ema.update(self.network, self.step)

    @torch.no_grad()
    def validate(self) -> float | str:
        """Mean loss over the held-out images, with the same noise and evenly spread timesteps every time."""
        n, total = len(self.held_out), 0.0
        if n == 0:
            return ""
        random, t = generator(self.cfg.seed, STREAM_VALIDATION), torch.arange(n) * self.diffusion.T // n
        with self.arithmetic.running():
            for piece in torch.arange(n).split(self.cfg.batch_size):
                chosen = self.held_out[piece]
                x0 = from_uint8(self.data.images[chosen])
                batch = x0, t[piece], torch.randn(x0.shape, generator=random), self.data.labels[chosen]
                total += self.diffusion.loss(self.ema.network, *(v.to(self.runtime.device) for v in batch)).sum().item()
        return total / n

    def log(self, log: RunLog | None, evaluated: bool) -> float:
        """Write a row of metrics and return the epoch's mean loss."""
        logged, epoch = self.gathered().tolist()
        quartiles = [loss / count if count else math.nan for loss, count in logged]
        counts = [sum(n for _, n in part) for part in (logged, epoch)]       # 0 where every step was skipped
        mean, epoch_mean = (sum(loss for loss, _ in part) / n if n else math.nan
                            for part, n in zip((logged, epoch), counts, strict=True))
        since, start = self.clock
        now, skipped = time.perf_counter(), int(self.faults[2])
        self.history.append([self.step, mean])
        self.meter[0] = 0
        if log:                                                              # only rank 0 has one
            numbers = dict(zip(("loss_q1", "loss_q2", "loss_q3", "loss_q4"), quartiles, strict=True), loss=mean,
                           val_loss=self.validate() if evaluated else "", lr=self.lr_schedule.get_last_lr()[0],
                           grad_norm=self.grad_norm.item(), seconds=now - start,
                           images_per_second=(self.step - since) * self.size / (now - start))
            rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in numbers.items()}
            log.row(dict(step=self.step, epoch=round(self.epoch, 4), skipped_steps=skipped, **rounded))
        self.clock = (self.step, time.perf_counter())
        return epoch_mean

    def preview(self) -> Config:
        """The settings of what is drawn in training."""
        return dataclasses.replace(self.cfg, sampler="dpmpp", steps=min(self.cfg.preview_steps, self.cfg.timesteps))

    def draw_grid(self, folder: Path, loss: float) -> Path:
        """A grid of samples, epoch and loss in its name; a denoising strip beside it where asked for."""
        cfg, classes = self.cfg, list(range(min(self.null, 10)))
        rows = cfg.num_generations or (4 if classes else 16)
        path = folder / f"epoch_{round(self.epoch, 2):g}_loss_{loss:.4f}.png"
        labels = self.model.labels(classes, rows * max(1, len(classes)))
        images = torch.cat(list(draw_with_bar(self.model, labels, self.preview())))
        save_grid(images, path, [self.data.class_names[c] for c in classes])
        if cfg.plot_freq_interval:
            every_step = dataclasses.replace(self.preview(), steps=cfg.timesteps)
            save_strip(self.model, labels[:rows], every_step, folder / f"step_{self.step}.png")
        return path

    def settled(self) -> bool:
        """Whether the mean absolute change of the last ten logged losses is below the one asked for."""
        recent = [loss for _, loss in self.history[-10:]]
        changes = [abs(b - a) for a, b in zip(recent, recent[1:])]
        return len(recent) == 10 and sum(changes) / len(changes) < self.cfg.early_stop_loss_change


def fit_to_minutes(cfg: Config, runtime: Runtime, state: dict | None, deadline: float) -> tuple[Config, Arithmetic]:
    """The configuration with as many iterations as fit until the deadline (a perf_counter), by the time of a few
    real steps, a validation and a grid on a copy of the run; and how that copy computed."""
    def timed(work: Callable) -> float:
        before = time.perf_counter()
        work()
        float(run.grad_norm)                                                 # waits for the device
        return time.perf_counter() - before

    run = Training(dataclasses.replace(cfg, iterations=10**9), runtime, copy.deepcopy(state))
    first, per_epoch = run.step, run.batches.steps_per_epoch
    step = sorted(timed(run.train_step) for _ in range(20))[10]
    with tempfile.TemporaryDirectory() as folder:
        validation, grid = timed(run.validate), timed(lambda: run.draw_grid(Path(folder), 0.0))
    each = step + validation / per_epoch + grid / (cfg.checkpoint_rate or cfg.sample_every * per_epoch)
    left = deadline - time.perf_counter() - validation - grid
    steps = max(1, runtime.agreed(int(left / each)))
    runtime.say(f"{step * 1000:.3g} ms a step: {steps:,} steps fit into {cfg.train_minutes:g} minutes")
    return dataclasses.replace(cfg, iterations=first + steps), run.arithmetic


def train(cfg: Config, runtime: Runtime | None = None) -> Path:
    """Train as configured, from resume_point's checkpoint; returns the last checkpoint. Raises UserError."""
    runtime = runtime or Runtime(cfg)
    save_signals = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []    # Windows has none
    with runtime.noting(*save_signals), run_lock(cfg) if runtime.is_main else nullcontext():
        runtime.agreed(0)                                                    # nobody looks for checkpoints before
        path = train_undisturbed(cfg, runtime)
        with runtime.main_first():                                           # the others wait for its last checkpoint
            return path


def train_undisturbed(cfg: Config, runtime: Runtime) -> Path:
    """What train does once nobody else may write to the run's files."""
    started, (path, state) = time.perf_counter(), resume_point(cfg, dataclasses.asdict(cfg), runtime)
    deadline = arithmetic = None
    if cfg.train_minutes and state and state["config"].get("train_minutes") == cfg.train_minutes:
        cfg = dataclasses.replace(cfg, iterations=state["config"]["iterations"])
    elif cfg.train_minutes:
        deadline = started + 57 * cfg.train_minutes                          # of 60 seconds: some slack
        cfg, arithmetic = fit_to_minutes(cfg, runtime, state, deadline)
    run = Training(cfg, runtime, state, arithmetic)
    del state                                                                # of twice the size of the network and more
    folder, kept = samples_path(cfg), kept_checkpoints(cfg)
    if runtime.is_main and not (path and path.resolve() in [p.resolve() for p in kept]):  # another run's files
        for earlier in (folder, *([kept[0].parents[1]] if cfg.experiment_name and kept else kept)):
            if earlier.is_file() or (earlier.is_dir() and any(earlier.iterdir())):
                old = earlier.rename(free_path(earlier.with_stem(f"{earlier.stem}_old")))
                runtime.say(f"kept an earlier run's {earlier} as {old.name}")
    runtime.say(run_report(run.cfg, runtime, run.shape, run.null, len(run.batches.indices), str(run.arithmetic)))
    others = by_age(p for p in Path(cfg.working_directory).glob(f"diffusion_checkpoint_{cfg.dataset}_*.pt")
                    if "_old" not in p.stem)
    if run.step:
        runtime.say(f"resuming from {path} at step {run.step} of {run.total}")
    elif others and cfg.resume == "auto" and not cfg.experiment_name:
        runtime.say(f"starting a new run: other settings than those of {others[0]}")
    log = RunLog(folder, run.cfg, run.step, runtime.facts(run.arithmetic)) if runtime.is_main else None
    try:
        with runtime.noting(*stop_signals()), tqdm(total=run.total, initial=run.step, unit="step", dynamic_ncols=True,
                                                   disable=None if runtime.is_main else True) as bar:
            path = training_loop(run, log, folder, bar, deadline, path)
    finally:
        if log:
            log.close(run.cfg)
    if log and cfg.report:
        report_run(run, folder)
    return path


def training_loop(run: Training, log: RunLog | None, folder: Path, bar: tqdm, deadline: float | None = None,
                  start: Path | None = None) -> Path:
    """Steps until the end, a signal or a settled loss, with logs, grids and checkpoints when they are due. deadline:
    a perf_counter by which to end; the pace of machines changes, so the number of steps is set anew on the way.
    start: the checkpoint to go back to, at first the one that it went on from."""
    cfg, runtime, per_epoch = run.cfg, run.runtime, run.batches.steps_per_epoch
    first, begun = run.step, time.perf_counter()
    looks = {first + (run.total - first) * tenth // 10 for tenth in (1, 3, 6, 8)} if deadline else ()
    path, done, saved = checkpoint_path(cfg, run.step), run.step >= run.total, True
    while not done:
        run.train_step()
        (stop, wanted), done = runtime.requests(run.step), run.step >= run.total
        epochs = run.step // per_epoch if run.step % per_epoch == 0 else 0   # 0: in the middle of one
        if cfg.checkpoint_rate:
            draw = save = done or run.step % cfg.checkpoint_rate == 0
        else:
            draw = done or (epochs > 0 and epochs % cfg.sample_every == 0)
            save = done or (epochs > 0 and epochs % cfg.checkpoint_every == 0)
        save = save or stop > 0 or wanted
        if log_due := draw or epochs or run.step % cfg.log_every == 0:
            loss = run.log(log, evaluated=draw or epochs > 0)
        if (log_due or save) and (reason := run.trouble(log_due)):
            run.roll_back(reason, start)
            if log:
                log.rewind(run.step)
            runtime.save_wanted |= wanted
            done, first, begun = False, run.step, time.perf_counter()
            continue
        with suppress(OSError):                                              # where the terminal has gone
            bar.total, bar.n = run.total, run.step - 1
            bar.update()
            if log_due:
                bar.set_description(f"epoch {run.epoch:.4g}/{run.total / per_epoch:.4g} loss {loss:.4f}")
        if log_due and cfg.early_stop_loss_change and run.settled():
            runtime.say(f"the loss has settled at step {run.step}: stopping early")
            draw = save = done = True
        if epochs:
            run.meter[1] = 0
        if run.step in looks and not done:                                   # before it is saved
            pace = (time.perf_counter() - begun) / (run.step - first)
            run.fit(run.step + max(1, runtime.agreed(int((deadline - time.perf_counter()) / pace))))
        if save:
            state, path = run.state(), checkpoint_path(cfg, run.step)
            if runtime.is_main:
                saved = attempt(f"checkpoint {path}", partial(save_checkpoint, state, cfg))
            saved = bool(runtime.agreed(int(saved)))
            start = path if saved and state["good"] else start
        if wanted and saved:
            runtime.say(f"saved {path} at step {run.step}, as asked for by a signal")
        if draw and runtime.is_main:
            attempt(f"a grid of samples in {folder}", partial(show_grid, run, log, folder, loss))
        if draw or save:
            run.clock = (run.step, time.perf_counter())                      # drawing and saving are not training
        if stop and not done and saved:
            raise UserError(f"interrupted: saved {path}; the same command goes on", code=128 + stop)
        if (stop or done) and not saved:
            raise UserError("the last checkpoint could not be saved; the one before is as it was.\nMake room: the same "
                            "command goes on from there.", code=1)
    return path


def report_run(run: Training, folder: Path) -> None:
    """Write report.html, with a strip from noise to image where the run has drawn none. If it fails, the run is none
    the worse."""
    try:
        from report import write_report

        if not run.cfg.plot_freq_interval:
            labels = run.model.labels(list(range(min(run.null, 5))), 5)
            save_strip(run.model, labels, run.preview(), folder / f"step_{run.step}.png")
        run.runtime.say(f"report   {write_report(folder)}")
    except Exception as error:
        complain(f"no report: {first_line(error)}")


def show_grid(run: Training, log: RunLog, folder: Path, loss: float) -> None:
    """Draw a grid of samples and say where it is."""
    picture = run.draw_grid(folder, loss)
    log.track(run.step, {"samples": picture})
    run.runtime.say(f"epoch {run.epoch:.4g}, step {run.step}: loss {loss:.4f}, {picture}")


# ---- 10  Commands ------------------------------------------------------------------------------
# What the two modes do, and the questions they ask where flags leave something open.


def ask(question: str, flag: str, parse: Callable[[str], object], default: str = ""):
    """Ask until parse accepts the answer; Enter takes the default. Raises UserError at the end of input."""
    while True:
        try:
            answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip()
        except (EOFError, RuntimeError):                                     # RuntimeError: there is no input at all
            print()
            raise UserError(f"input ended at a question: answer it with {flag}, or all with --yes") from None
        try:
            return parse(answer or default)
        except UserError as error:
            print(error)


def ask_option(name: str, given: dict, default) -> dict:
    """`given` with the answer for one option added."""
    meta = FIELDS[name].metadata
    choices = f"; {', '.join(meta['choices']())}" if meta["choices"] else ""

    def parse(text: str) -> dict:
        answers = {**given, name: parse_value(name, text)}
        if name != "mode":
            configure(**answers)                                             # refuses what contradicts the rest
        return answers

    return ask(f"{name} ({meta['ask']}{choices})", f"--{name}", parse, written(name, default))


def ask_training(given: dict) -> dict:
    """Ask for the dataset and then for every option that has a question and was not given."""
    given = {**given, "dataset": "digits"} if given.get("yes") else ask_option("dataset", given, "digits")
    if given["dataset"] == "folder" and "path_to_data" not in given:
        given = {**given, "path_to_data": ask("path_to_data (a folder or ZIP file of images)", "--path_to_data",
                                              lambda text: ImageFiles(text) and text)}
    for name in FIELDS if not given.get("yes") else ():
        if name == "epochs" and (given.get("iterations") or configure(**given).train_minutes):
            continue                                                         # the length is given otherwise
        if FIELDS[name].metadata["ask"] and name not in ("mode", "dataset") and name not in given:
            given = ask_option(name, given, getattr(configure(**given), name))
    return given


def run_training(given: dict) -> None:
    """--mode train."""
    if "dataset" not in given and not given.get("resume_from_checkpoint"):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("name the data with --dataset: under torchrun nobody can be asked")
        given = given_values(ask_training(given))
    cfg = configure(**given)
    if cfg.dataset == "folder":                                              # told before anything is made
        ImageFiles.require(cfg.path_to_data)
    path, state = resume_point(cfg, given)
    cfg = configure(state["config"], **given) if path else cfg
    del state                                                                # it keeps the file on the disk
    runtime = Runtime(cfg)
    if cfg.dry_run:
        runtime.say(dry_run_report(cfg, runtime))
        return
    started = time.perf_counter()
    path = train(cfg, runtime)
    runtime.say(f"trained in {time.perf_counter() - started:.0f} s: {path}\n"
                f"samples and metrics: {samples_path(cfg)}\n"
                f"draw with it: python diffuser.py --mode inference --model_path {path}")


def run_report(cfg: Config, runtime: Runtime, shape: tuple[int, int, int], num_classes: int, images: int,
               arithmetic: str) -> str:
    """What is about to happen, in a few lines."""
    total, per_epoch, batch = training_length(cfg, images)
    length = f"{total:,} steps of {batch} images ({total / per_epoch:.4g} epochs)"
    if cfg.train_minutes and not cfg.iterations:
        length = f"as many steps of {batch} images as fit into {cfg.train_minutes:g} minutes"
    size, left = "x".join(map(str, (*shape[1:], shape[0]))), alpha_bar_table(cfg)[-1].sqrt().item()
    lines = [f"device   {runtime.devices()}, {arithmetic}",
             f"data     {cfg.dataset}: {images:,} images {size}, {num_classes} classes",
             f"network  {network_size(cfg, shape, num_classes)[0]:,} parameters",
             f"training {length}",
             f"noise    {cfg.schedule_type}, T = {cfg.timesteps}, {left:.2%} of the signal is left at T"]
    if left > 0.01:
        lines.append("         above 1%, so pure noise is the wrong start; " + (
            "sampling starts from the data's mean and variance" if cfg.start == "matched" else "use --start matched"))
    return "\n".join(lines)


def dry_run_report(cfg: Config, runtime: Runtime) -> str:
    """Settings, sizes and memory, without reading an image."""
    dataset, files = DATASETS[cfg.dataset], ImageFiles(cfg.path_to_data) if cfg.dataset == "folder" else None
    classes, images = (files.class_names, len(files)) if files else (dataset.classes, dataset.num_images)
    shape = image_shape(cfg, files)
    labels, options = 0 if cfg.use_labels is False else len(classes), precisions(cfg, runtime.device)
    images -= held_out_size(images, cfg.val_fraction)
    calls = training_length(cfg, images)[0] * cfg.gradient_accumulation_steps
    arithmetic = choose_arithmetic(dataclasses.replace(cfg, precision=options[0]), runtime.device, calls)
    report = run_report(cfg, runtime, shape, labels, images,
                        str(arithmetic).replace(options[0], " or ".join(options)))
    size = math.ceil(cfg.batch_size / runtime.num_devices)
    need = sum(training_memory(cfg, shape, labels, size, options[0]))
    report += f"\nmemory   about {need / 2**30:.2g} GiB for training on each device"
    warning = fitting_parts(cfg, shape, labels, size, options[0], runtime.device)[1]
    return f"{settings_text(cfg)}\n{report}" + (f"\nwarning  {warning}" if warning else "")


def settings_text(cfg: Config) -> str:
    """The settings that a checkpoint keeps, one on a line."""
    return "\n".join(f"{name} = {getattr(cfg, name)}" for name in FIELDS if name not in LOCAL)


def run_inference(given: dict) -> None:
    """--mode inference."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--mode inference runs in one process: start it without torchrun")
    for name in ("config", "init_from"):
        if given.get(name):
            raise UserError(f"--{name} is for --mode train; what to draw with is named by --model_path")
    asked = not any(given.get(name) for name in ("yes", "dry_run", "classes", "num_images", "save_dir"))
    path = Path(given["model_path"]) if given.get("model_path") else choose_checkpoint(given)
    if path is None:
        return
    state = load_checkpoint(path)
    wants_labels = given.pop("use_labels", None)
    check_fits(path, given, state["config"])
    cfg = configure(state["config"], **{k: v for k, v in given.items() if k != "dataset"})
    idle = [name for name in ("eta", "variance", "noise_scale", "use_noise_scaling") if name in given]
    if idle and cfg.sampler not in ("ddim", "ddpm"):
        raise UserError(f"--{idle[0]} is for samplers that add noise: --sampler ddim or ddpm, not {cfg.sampler}")
    model = restore(state, cfg)
    if wants_labels and not model.class_names:
        raise UserError(f"--use_labels: {path} was trained without classes")
    print(f"{path}: {cfg.dataset}, epoch {state['epoch']:.4g}")
    print(f"{cfg.sampler}, {sampling_steps(cfg)} steps, {model.device}")
    if cfg.dry_run:
        print(settings_text(cfg))
    elif asked:
        converse(model, cfg, path)
    else:
        everything = None if wants_labels is False or not model.class_names else list(range(len(model.class_names)))
        numbers = parse_classes(cfg.classes, model.class_names) if cfg.classes else everything
        save_images(model, cfg, numbers, cfg.num_images or 10 * len(numbers or [0]), path)


QUITS = ("-1", "q", "quit", "exit")


def choose_checkpoint(given: dict) -> Path | None:
    """The checkpoint that the user picks from those below the working directory, None to quit; --yes takes the
    newest."""
    home, found = Path(given.get("working_directory") or "checkpoints"), []
    for path in by_age(home.glob("**/*.pt")):
        try:
            state = load_checkpoint(path, peek=True)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        if given.get("dataset") in (None, state["config"]["dataset"]):
            found.append((path, state))
    if not found:
        raise UserError(f"no checkpoint in {home}: train first (python diffuser.py --mode train), or give --model_path")
    if len(found) == 1 or given.get("yes"):
        return found[0][0]
    for i, (path, state) in enumerate(found, 1):
        loss = f"loss {state['loss_history'][-1][1]:.4f}" if state["loss_history"] else "no loss yet"
        print(f"{i:3}  {state['config']['dataset']}, epoch {state['epoch']:.4g}, {loss}  {path}")

    def parse(text: str) -> Path | None:
        if text.lower() in QUITS:
            return None
        if not text.isdecimal() or not 1 <= int(text) <= len(found):
            raise UserError(f"a number from 1 to {len(found)}, please")
        return found[int(text) - 1][0]

    return ask("which checkpoint (the newest is first; q quits)", "--model_path", parse, "1")


def converse(model: Model, cfg: Config, path: Path) -> None:
    """Ask for classes and numbers of images, draw, save and show, until the user quits."""
    if model.class_names:
        print(f"classes: {listed(model.class_names)}")
    drawn = 0                                                                # so that no image is drawn twice
    while True:
        numbers = None
        if model.class_names:
            numbers = ask("classes (names or numbers, separated by commas; all; -1 or q quits)", "--classes",
                          lambda text: None if text.lower() in QUITS else parse_classes(text, model.class_names))
            if numbers is None:
                return
        count = ask(f"how many images{' of each' if numbers else ''} (-1 or q quits)", "--num_images",
                    lambda text: None if text.lower() in QUITS else parse_value("num_images", text), "8")
        if count is None:
            return
        count *= len(numbers or [0])
        folder = save_images(model, cfg, numbers, count, path, drawn)
        drawn += count
        if sys.stdout.isatty() and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
                                    or sys.platform in ("darwin", "win32")):
            Image.open(folder / "grid.png").show()


def free_path(path: Path) -> Path:
    """The path with the first number behind its name that is not taken."""
    return next(p for i in itertools.count(1) if not (p := path.with_stem(f"{path.stem}{i}")).exists())


def file_name(class_name: str) -> str:
    """A class's name in the names of files."""
    return re.sub(r"[^\w.-]+", "_", class_name).strip(".")[:50] or "class"


def save_images(model: Model, cfg: Config, numbers: list[int] | None, count: int, path: Path, first: int = 0) -> Path:
    """Draw `count` images from number first on, the classes in turn; returns the folder with images/, grid.png and
    samples.json: --save_dir, or a new one."""
    inference = Path(cfg.generated_directory, f"inference_{cfg.dataset}_")
    folder = Path(cfg.save_dir) if cfg.save_dir else free_path(inference)
    if (folder / "images").exists() and any((folder / "images").iterdir()):
        raise UserError(f"{folder / 'images'} already holds images: give another --save_dir or remove it")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    labels, shown, i = model.labels(numbers, count), [], 0
    names = [*map(file_name, model.class_names), "image"]
    for batch in draw_with_bar(model, labels, cfg, first):
        for image in batch:
            to_pil(image).save(folder / "images" / f"{first + i:06}_{names[labels[i]]}.png")
            i += 1
        shown.append(batch[: max(0, 100 - sum(map(len, shown)))])
    save_grid(torch.cat(shown), folder / "grid.png", [model.class_names[n] for n in numbers or []])
    if cfg.trajectory:
        save_strip(model, labels[:10], cfg, folder / "trajectory.png", first)
    settings = dict(checkpoint=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), images=count,
                    classes=[model.class_names[n] for n in numbers or []], config=dataclasses.asdict(cfg))
    write_json(folder / "samples.json", settings)
    print(f"{count} images in {folder / 'images'}, grid {folder / 'grid.png'}")
    return folder


# ---- 11  Command line --------------------------------------------------------------------------
# Flags made from the fields of Config; no logic.

COMMANDS = {"train": run_training, "inference": run_inference}


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, with the nearest flag where one is unknown."""

    def error(self, message: str):
        raise UserError(message)

    def parse(self, argv: list[str] | None) -> dict:
        """The options given, by name."""
        options, unknown = self.parse_known_args(argv)
        if unknown:
            hint = did_you_mean(unknown[0].split("=")[0], self._option_string_actions) or ", see --help"
            raise UserError(f"unknown option {unknown[0]}{hint}")
        return vars(options)


def build_parser() -> Parser:
    """One flag per field; only those given end up in the result."""
    intro, _, rest = __doc__.partition("\n")
    parser = Parser("diffuser.py", description=intro, epilog=rest.split("\nChapters")[0], allow_abbrev=False,
                    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, spec in FIELDS.items():
        if spec.metadata["group"]:
            group = parser.add_argument_group(spec.metadata["group"])
        flags = [f"--{name}", *spec.metadata["aliases"]]
        choices = f" ({', '.join(map(str, spec.metadata['choices']()))})" if spec.metadata["choices"] else ""
        default = "" if spec.default in ("", None) else f" [{spec.default}]"
        text = f"{spec.metadata['help']}{choices}{default}".replace("%", "%%")
        parse = partial(parse_value, name)
        if KINDS[name] is bool:
            group.add_argument(*flags, nargs="?", const=True, type=parse, help=text, metavar="BOOL")
            group.add_argument(f"--no-{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS)
        else:
            group.add_argument(*flags, type=parse, help=text, metavar=name.upper()[:12])
    return parser


def speaks_first() -> bool:
    """Whether this process is to say why it fails: of several the first, because of which the others fail."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    if not torch.distributed.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"                      # all have the same flags, and data
    with suppress(Exception):                                                # unless the store has gone as well
        return torch.distributed.distributed_c10d._get_default_store().add("failed", 1) == 1
    return True


def failed(error: Exception, debug: bool) -> int:
    """Say in a line or two why the program ends; returns the exit status. What nobody expected is raised."""
    lost = isinstance(error, getattr(torch.distributed, "DistError", ())) or "gloo/" in str(error)
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(
        "DefaultCPUAllocator: can't|MPS backend out of memory", str(error))
    expected = lost or full or isinstance(error, (UserError, OSError))
    if debug or (not expected and int(os.environ.get("WORLD_SIZE", 1)) == 1):
        raise error
    if not speaks_first():
        return 1
    if lost:
        error = f"another process has gone ({first_line(error)}); the same command goes on"
    elif full:
        error = "out of memory: lower --batch_size or --sample_batch_size"
    if expected:
        complain(f"diffuser: {error}")
    else:
        traceback.print_exception(error)
    no_path = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP)
    return getattr(error, "code", 2 if getattr(error, "errno", None) in no_path else 1)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = {}
    try:
        given = build_parser().parse(argv)
        given = given_values(given)
        if "mode" not in given:
            given = {**given, "mode": "train"} if given.get("yes") else ask_option("mode", given, "train")
        COMMANDS[given["mode"]](given)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return 0
    except Exception as error:
        return failed(error, given.get("debug", False))
    except KeyboardInterrupt:
        print("\ndiffuser: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")                         # noqa: SIM115 (where it was closed)
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(errors="replace")                                 # of answers and names of any bytes
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)                             # it is ending already
    try:
        sys.stdout.flush()
    except OSError:                                                          # its reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)
