#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.5", "torchvision>=0.20", "numpy>=1.26", "matplotlib>=3.7", "pillow>=10.1", "tqdm>=4.66"]
# ///
"""diffuser: train and sample denoising diffusion models of images.

    python diffuser.py                                asks what to do
    python diffuser.py --mode train --dataset digits  on the shipped digits
    python diffuser.py --mode train --path_to_data PHOTOS --img_size 64
    python diffuser.py --mode inference               asks what to draw
    python diffuser.py --mode inference --num_images 1000 --save_dir out
    python diffuser.py --check                        what this machine can do
    torchrun --nproc_per_node 4 diffuser.py --mode train --dataset cifar10

The same command resumes an interrupted run. From Python:

    import diffuser
    config = diffuser.configure(dataset="digits", epochs=50)
    model = diffuser.load(diffuser.train(config))
    images = model.generate(["3", "7"], num_images=8)           # uint8 [8, 1, 8, 8]

Chapters
     1  Configuration         every option once, presets, recipes; where settings become final
     2  Noise schedules       beta_t for t = 0..T-1
     3  Diffusion             q(x_t | x_0), what a network predicts, the loss
     4  U-Net                 norm, attention, residual block, network
     5  Samplers              from noise to image; guidance; the start of sampling
     6  Data                  datasets, the held-out part, batches as a function of (seed, step)
     7  Devices               cuda, mps, cpu; precision and memory; several devices
     8  Model                 EMA; from settings to objects; the model that draws
     9  Checkpoints           what is in one; saving, finding, checking, resuming
    10  Training              one step; the guard against divergence; the loop
    11  Commands              train, inference, the questions they ask
    12  Command line          flags to settings

Chapters 2 to 5 know no settings and no files, and choose no device. What knows nothing of diffusion is in
diffuser_lib/: files and how scripts end, images, CPU kernels, processes and signals, metrics.

Notation
    x0, xt, xT      images [N, C, H, W], float in [-1, 1] before noise; uint8 outside the program
    eps, v          the noise in xt; sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
    t, T, ts        timestep, int64 [N], 0..T-1; their number; a descending grid of them
    beta, alpha_bar variance of step t; product of (1 - beta) up to t; alpha_bar_prev is 1 before t = 0
    x0_hat, eps_hat estimates from the network's output
    y               class labels, int64 [N]; the null class (no label) is num_classes
    cin, cout, emb  channels in, channels out, the conditioning vector or its width
"""

from __future__ import annotations

# signal itself imports others first, and Ctrl-C would print a traceback there.
import _signal

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)              # Ctrl-C while torch is imported: no traceback

import importlib.util
import sys

if __name__ == "__main__":
    missing = [name for name in ("torch", "numpy", "PIL", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"diffuser: not installed: {', '.join(missing)}; pip install -r requirements.txt, or uv run "
                 "diffuser.py")

import argparse
import copy
import dataclasses
import gc
import hashlib
import inspect
import itertools
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import statistics
import string
import tempfile
import textwrap
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from tqdm import tqdm

from diffuser_lib import cpu_kernels
from diffuser_lib.files import (
    Parser,
    UserError,
    cannot_write,
    did_you_mean,
    end_process,
    first_line,
    hold_lock,
    nearest_folder,
    newest_first,
    printable,
    read_json_object,
    require_writable,
    run_script,
    unused_path,
    warn,
    warn_on_oserror,
    why_not_writable,
    write_atomically,
    zip_is_sound,
)
from diffuser_lib.images import (
    ARCHIVES,
    ImageData,
    ImageSource,
    PictureFolder,
    PictureWriter,
    cached_images,
    file_names,
    from_uint8,
    open_image,
    save_grid,
    to_pil,
    to_uint8,
)
from diffuser_lib.judge import FEATURES, Reference, ReferenceStats, divide
from diffuser_lib.machine import (
    PACKAGES,
    duration,
    is_installed,
    matrix_rate,
    package_version,
)
from diffuser_lib.metrics import MetricsLogger, TensorBoard, WeightsAndBiases
from diffuser_lib.processes import (
    Processes,
    SharedBar,
    Signals,
    Stopped,
    is_lost,
    leave,
    save_signals,
    speaks_first,
    stop_signals,
    world_size,
)
from diffuser_lib.sources import check_images, open_images
from diffuser_lib.spellings import BOOLEANS, FOREIGN_FLAGS, NO_COUNTERPART, translate_flags
from diffuser_lib.tensors import write_tensors

# ---- 1  Configuration --------------------------------------------------------------------------
# One frozen dataclass holds every option; each field makes its flag, its help, its question and its check.


def opt(default, help, *aliases, choices=None, synonyms=None, lo=None, hi=None, ask=None, architectural=False,
        per_run=False, common=False, group=None):
    """One option.

    choices: the allowed values, or the name of the registry that has them; synonyms: other spellings of them; lo, hi:
    range; ask: advice, shown where the option is asked for; architectural: it shapes the network or the schedule, so a
    checkpoint cannot be resumed with another value; per_run: it belongs to one invocation and is never taken from a
    checkpoint; common: it stands in the short --help; group: heading of this and the following options.
    """
    metadata = dict(help=help, aliases=aliases, choices=choices, synonyms=synonyms or {}, lo=lo, hi=hi, ask=ask,
                    architectural=architectural, per_run=per_run, common=common, group=group)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Fields that are None take the dataset's or the device's own value."""

    mode: str = opt(
        "", "what to do", choices="COMMANDS", per_run=True, common=True, group="run",
        ask="train a model, or draw with one")
    dataset: str = opt(
        "", "what to train on", choices="DATASETS", architectural=True, common=True)
    recipe: str = opt(
        "", "a whole configuration; best: what is best for the dataset today", choices="RECIPES", per_run=True,
        common=True)
    device: str = opt(
        "auto", "auto: cuda, then mps, then cpu", choices=("auto", "cuda", "mps", "cpu"), per_run=True,
        common=True)
    config: str = opt(
        "", "options from a run's config.json, to repeat it", per_run=True, common=True)
    seed: int = opt(0, "seed of everything random", lo=0, hi=2**63 - 1, common=True)
    yes: bool = opt(False, "ask nothing: take every default", per_run=True, common=True)
    dry_run: bool = opt(False, "print settings, sizes, memory, time; then stop", per_run=True, common=True)
    check: bool = opt(False, "see what this machine has, lacks and can do", per_run=True, common=True)
    debug: bool = opt(False, "show the traceback of a failure", per_run=True)

    data_dir: str = opt(
        "data", "where datasets are kept, cached ones too", "--cache_dir", per_run=True, common=True,
        group="data")
    path_to_data: str = opt(
        "", "folder, ZIP, tar, Parquet, npz or hf:NAME", "--train_data_dir", "--data",
        per_run=True, common=True)
    label_column: str = opt(
        "", "column, array or key of --path_to_data that names the class (default: label and the like)")
    img_size: tuple[int, int] | None = opt(
        None, "image size: a number or HxW", "--image_size", "--resolution", lo=1, hi=4096, architectural=True,
        common=True)
    channels: int | None = opt(
        None, "1 grey, 3 colour (default: what the images are)", choices=(1, 3), architectural=True)
    use_labels: bool | None = opt(
        None, "condition on classes (default: if there are any)", "--cond", architectural=True, common=True)
    flip: bool | None = opt(
        None, "mirror training images at random (default: where the dataset allows)", "--random_flip", "--xflip",
        "--augment_horizontal_flip")
    random_crop: bool = opt(
        False, "train on crops at random places, of images decoded an eighth larger, instead of the middle")
    num_workers: int = opt(
        2, "processes that decode images into the cache", "--dataloader_num_workers", "--workers", lo=0, hi=256,
        per_run=True)
    val_fraction: float = opt(
        0.02, "part of the data held out for the validation loss (at most 1,000 images)", lo=0, hi=0.5)

    timesteps: int = opt(
        1000, "diffusion steps T", "--num_timesteps", "--num_diffusion_timesteps", "--ddpm_num_steps", lo=2, hi=100_000,
        architectural=True, common=True, group="diffusion",
        ask="more are finer noise levels; 500 to 1000 are usual")
    schedule_type: str = opt(
        "linear", "noise schedule", "--schedule", choices="SCHEDULES",
        synonyms={"l": "linear", "cos": "cosine", "DNS": "dns", "squaredcos_cap_v2": "cosine"}, architectural=True,
        common=True, ask="how fast an image turns into noise")
    beta_start: float = opt(
        1e-4, "first beta (linear, dns)", "--schedule_low", lo=1e-9, hi=0.999, architectural=True,
        ask="variance of the first step")
    beta_end: float = opt(
        0.02, "last beta (linear, dns)", "--schedule_high", lo=1e-9, hi=0.999, architectural=True,
        ask="variance of the last step")
    cosine_s: float = opt(0.008, "offset s of the cosine schedule", lo=0, hi=1, architectural=True)
    scale_betas: bool = opt(False, "multiply beta_start and beta_end by 1000/T", architectural=True)
    prediction: str = opt(
        "eps", "what the network predicts", "--prediction_type", "--objective", choices="PREDICTIONS",
        synonyms={"epsilon": "eps", "v_prediction": "v", "sample": "x0", "pred_noise": "eps", "pred_v": "v",
                  "pred_x0": "x0", "flow_prediction": "flow"},
        architectural=True, common=True)
    zero_terminal_snr: bool = opt(
        False, "rescale the schedule so that nothing of the image is left at T", architectural=True)
    loss_fn: str = opt("mse", "loss", "--loss_type", choices="LOSSES", synonyms={"l2": "mse", "l1": "mae"})
    min_snr_gamma: float = opt(0.0, "min-SNR weighting of the loss, usually 5; 0: none", "--snr_gamma", lo=0, hi=1e6)
    detail_weight: float = opt(
        0.0, "weight of a timestep's loss, 1 + X sqrt(SNR): more for fine detail, 4 for x0; 0: none", lo=0, hi=1e3)
    input_perturbation: float = opt(0.0, "extra noise on the network's input, usually 0.1; 0: none", lo=0, hi=10)
    time_sampling: str = opt("uniform", "how often each timestep is trained", choices="TIME_DENSITIES")
    time_mean: float | None = opt(
        None, "centre of --time_sampling: log-odds of t/T (logit_normal) [0], log-SNR (laplace) [0], log sigma "
        "(lognormal) [-1.2]", lo=-100, hi=100)
    time_scale: float | None = opt(
        None, "width of --time_sampling: deviation (logit_normal [1], lognormal [1.2]), b (laplace) [0.5]", lo=1e-3,
        hi=1e3)

    base_channels: int = opt(
        64, "channels of the first level", "--starting_channels", "--dim", "--cbase", lo=2, hi=4096,
        architectural=True, common=True, group="network", ask="wider is better and slower")
    channel_mults: tuple[float, ...] = opt(
        (1, 2, 2), "channel multiplier of each level", "--dim_mults", "--cres", lo=0.001, hi=64, architectural=True,
        common=True)
    num_res_blocks: int = opt(2, "residual blocks per level", lo=1, hi=16, architectural=True)
    use_attention: bool = opt(
        True, "self-attention at --attention_levels and in the bottleneck", architectural=True,
        ask="better structure, more time")
    attention_levels: tuple[int, ...] = opt(
        (), "levels with attention, 0 the finest", "--attention_resolutions", lo=0, hi=16, architectural=True,
        common=True)
    up_attention_levels: tuple[int, ...] | None = opt(
        None, "levels with attention on the way up (default: --attention_levels)", lo=0, hi=16, architectural=True)
    mid_attention: str = opt(
        "norm", "attention in the bottleneck: after a group norm, without, or none",
        choices=("norm", "plain", "none"), architectural=True)
    num_heads: int = opt(4, "attention heads", lo=1, hi=1024, architectural=True)
    head_dim: int = opt(0, "channels per head; 0: use --num_heads", lo=0, hi=4096, architectural=True)
    emb_dim: int = opt(
        128, "embedding size; the conditioning vector has 4 x emb_dim entries", lo=1, hi=4096, architectural=True,
        common=True, ask="numbers that say which timestep and class it is")
    dropout: float = opt(0.0, "dropout in the residual blocks", lo=0, hi=0.99, common=True)
    patch_size: int = opt(
        1, "side of the squares of pixels that the network takes as one: 2 is up to four times faster", lo=1, hi=16,
        architectural=True)
    norm_groups: int = opt(
        32, "GroupNorm groups, lowered to a divisor of all levels' channels", lo=1, hi=1024, architectural=True)
    norm_eps: float = opt(1e-5, "added to the variance by GroupNorm; DDPM: 1e-6", lo=1e-12, hi=0.1, architectural=True)
    downsample_padding: int = opt(
        1, "padding of the halving convolutions: 1 on all sides; 0: right and bottom, as in DDPM",
        choices=(0, 1), architectural=True)
    freq_shift: float = opt(
        0.0, "taken off the number of frequencies in the exponents of the embedding of t; DDPM: 1", lo=-1e4, hi=1e4,
        architectural=True)
    sin_first: bool = opt(False, "sines before cosines in the embedding of t, as in DDPM", architectural=True)
    conditioning: str = opt(
        "scale_shift",
        "how time and class enter: scaling and shifting each block, added to it, or as extra input channels",
        choices=("scale_shift", "add", "concat"), architectural=True)

    epochs: int = opt(
        100, "passes over the data", "--num_epochs", "--num_train_epochs", lo=1, hi=10**7, common=True,
        group="training")
    iterations: int = opt(
        0, "optimizer steps; 0: use --epochs", "--num_training_steps", "--train_num_steps", "--max_train_steps", lo=0,
        hi=10**9, common=True)
    train_minutes: float = opt(
        0.0, "train for about that long; iterations are set by timing a few steps; 0: use --epochs", lo=0, hi=10**6,
        common=True)
    batch_size: int = opt(
        128, "images at a time, over all devices", "--train_batch_size", lo=1, hi=10**6, common=True,
        ask="lower it when memory runs out")
    gradient_accumulation_steps: int = opt(
        1, "micro-batches of batch_size that make one step", "--gradient_accumulate_every", lo=1, hi=10**4)
    learning_rate: float = opt(
        1e-4, "highest learning rate", "--lr", "--train_lr", lo=1e-12, hi=10, common=True,
        ask="too high diverges, too low takes for ever; wide networks want less")
    optimizer: str = opt("adamw", "optimizer", choices="OPTIMIZERS")
    adam_betas: tuple[float, float] = opt(
        (0.9, 0.999), "Adam's two decays: of the mean gradient, of its square", lo=0, hi=0.999999)
    weight_decay: float = opt(1e-4, "weight decay", "--adam_weight_decay", lo=0, hi=10)
    lr_schedule: str = opt("onecycle", "learning rate over time", choices="LR_SCHEDULES")
    lr_cycles: int | None = opt(
        None, "cycles of --lr_schedule cosine_with_restarts (default: 4)", "--lr_num_cycles", lo=1, hi=10**6)
    warmup_steps: int | None = opt(
        None, "steps of rising learning rate (default: a tenth of the run, at most 1000)", "--lr_warmup_steps", lo=0,
        hi=10**9)
    max_grad_norm: float = opt(1.0, "clip the gradient to this norm; 0: never", lo=0, hi=1e9)
    label_dropout: float = opt(0.1, "chance that a label is dropped, for guidance", lo=0, hi=1)
    use_ema: bool = opt(True, "average the weights and sample from the average")
    ema_decay: float = opt(
        0.9999, "decay of the average, warmed up as (1 + n) / (10 + n)", "--ema_max_decay", lo=0, hi=1, common=True)
    ema_halflife: float = opt(
        0.0, "half-life of the average in images, instead of --ema_decay; EDM: 500000; 0: use --ema_decay", lo=0,
        hi=1e12)
    ema_update_rate: int = opt(1, "steps between updates of the average", "--ema_update_every", lo=1, hi=10**6)
    ema_start: int = opt(0, "steps before averaging begins", lo=0, hi=10**9)
    early_stop_loss_change: float = opt(
        0.0, "stop when the mean absolute change of the last ten logged losses is below this; 0: never", lo=0,
        hi=1e9)
    scale_lr: bool = opt(False, "multiply the learning rate by the number of devices")
    num_gpus: int = opt(0, "GPUs to train and draw on; 0: all there are", lo=0, hi=64, per_run=True, common=True)
    precision: str = opt(
        "auto", "auto: bf16 where the hardware multiplies it (on CPUs from 32 base channels on), else fp32",
        "--mixed_precision", choices=("auto", "fp32", "bf16", "fp16"), synonyms={"no": "fp32"}, per_run=True,
        common=True)
    compile: bool | None = opt(None, "torch.compile the network (default: on cuda, for long runs)", per_run=True)
    channels_last: bool | None = opt(None, "store images channels last (default: on, except on mps)", per_run=True)
    deterministic: bool = opt(
        False, "only kernels that compute the same every time: slower on cuda; CPUs do so anyway", per_run=True)
    gradient_checkpointing: bool = opt(
        False, "compute activations again in the backward pass: a third of the memory, a third more time")

    experiment_name: str = opt(
        "", "names the run; keeps checkpoints by step in a folder of their own", per_run=True, common=True,
        group="output")
    working_directory: str = opt("checkpoints", "where checkpoints go", per_run=True, common=True)
    generated_directory: str = opt(
        "samples", "where grids and metrics.csv go", per_run=True, common=True)
    sample_every: int | None = opt(
        None, "epochs between sample grids (default: 1, more where they would take over a twentieth of the time)",
        "--save_images_epochs", lo=1, hi=10**7, common=True,
        ask="a grid shows how far training is; auto: one, more where epochs are short")
    checkpoint_every: int | None = opt(
        None, "epochs between checkpoints (default: as for grids)", "--save_model_epochs", lo=1, hi=10**7, common=True)
    checkpoint_rate: int = opt(
        0, "steps between checkpoints, each with a grid; 0: go by epochs", "--evaluation_interval",
        "--checkpointing_steps", "--save_and_sample_every", lo=0, hi=10**9)
    score_every: int = opt(
        0, "epochs between scores: a judge looks at drawn images, and the best checkpoint is kept, too; 0: never", lo=0,
        hi=10**7)
    num_keep_checkpoints: int = opt(1, "checkpoints to keep", "--checkpoints_total_limit", lo=1, hi=10**6, common=True)
    num_generations: int = opt(
        0, "images per class in a grid, and rows of the strip beside it; 0: choose", lo=0, hi=1000)
    plot_freq_interval: int = opt(
        0, "timesteps between the pictures of a denoising strip beside each grid; 0: one strip, at the end", lo=0,
        hi=100_000)
    preview_steps: int = opt(
        20, "sampling steps of the grids drawn in training", "--ddpm_num_inference_steps", lo=1, hi=100_000)
    log_every: int = opt(
        20, "steps between rows of metrics.csv; each is the mean over them, the last also over those left over",
        "--log_rate", lo=1, hi=10**9)
    resume: str = opt(
        "auto", "auto: go on from the run's checkpoint; never: start over", choices=("auto", "never"),
        per_run=True, common=True)
    resume_from_checkpoint: str = opt(
        "", "go on from this checkpoint: checkpoint_STEP of the experiment, a path, or latest", per_run=True)
    init_from: str = opt(
        "", "fine-tune: start a new run from the weights, network and schedule of this checkpoint", "--transfer",
        per_run=True, common=True)
    use_wandb: bool = opt(False, "log to Weights & Biases", "--log_to_wandb", per_run=True, common=True)
    use_tensorboard: bool = opt(False, "log to TensorBoard", per_run=True, common=True)
    project_name: str = opt("diffuser", "Weights & Biases project", "--tracker_project_name", per_run=True)
    wandb_mode: str = opt(
        "auto", "auto: what WANDB_MODE says, else online where a key is known",
        choices=("auto", "online", "offline"), per_run=True)
    report: bool = opt(True, "write report.html into the samples folder when training ends", per_run=True)

    model_path: str = opt("", "checkpoint to sample from", "--network", per_run=True, common=True, group="sampling")
    classes: str = opt("", "classes to draw, by name or number: cat,3 or all", "--class", per_run=True, common=True)
    num_images: int | None = opt(
        None, "images to draw in all (default: 10 of each class)", lo=1, hi=10**7, per_run=True, common=True)
    first: int = opt(
        0, "number of the first image: images N, N + 1, ... of a larger draw, each the same as there", lo=0, hi=10**9,
        per_run=True)
    seeds: str = opt(
        "", "an image for each of these seeds, such as 1,2,5-10: as --seed S --num_images 1 draws it", per_run=True)
    save_dir: str = opt("", "folder for images/, grid.png and samples.json", per_run=True, common=True)
    save_format: str = opt(
        "png", "as pictures, one ZIP file or one array", choices=("png", *ARCHIVES), per_run=True,
        common=True)
    sampler: str = opt(
        "dpmpp", "sampler", "--solver", choices="SAMPLERS", synonyms={"dpm++": "dpmpp", "euler": "ddim"}, common=True)
    steps: int | None = opt(
        None, "sampling steps (preset's or 25; ddim 50; ddpm T)", "--sampling_timesteps",
        "--num_inference_steps", lo=1, hi=100_000, common=True)
    spacing: str = opt("trailing", "how the sampling steps lie in 0..T-1", choices="SPACINGS")
    eta: float = opt(0.0, "noise of ddim: 0 none, 1 as much as ddpm", "--ddim_sampling_eta", lo=0, hi=1)
    variance: str = opt(
        "small", "variance of the noise of ddpm: posterior (small) or beta (large)",
        choices=("small", "large"))
    noise_scale: float = opt(1.0, "multiplies the noise that ddim and ddpm add", lo=0, hi=10)
    use_noise_scaling: bool = opt(False, "let the noise of ddim and ddpm fade in proportion to t/T")
    guidance_scale: float = opt(
        0.0, "classifier-free guidance w: (1 + w) eps_cond - w eps_uncond", lo=0, hi=1000, common=True)
    guidance_interval: tuple[float, float] | None = opt(
        None, "noise levels sqrt(1/alpha_bar - 1) between which guidance acts, such as 0.2,2 (default: all)", lo=0,
        hi=1e9)
    guide_path: str = opt(
        "", "checkpoint of a weaker model to guide away from, instead of from the null class", per_run=True)
    eps_scale: float = opt(1.0, "divide the predicted noise by this, such as 1.005", lo=0.5, hi=2)
    clip_x0: bool = opt(True, "clip the estimate of x0 to [-1, 1] at every step")
    dynamic_threshold: float = opt(
        0.0, "clip the estimate of x0 to this quantile of its own size instead, such as 0.995; 0: no", lo=0, hi=1)
    start: str = opt(
        "matched", "start from the Gaussian that matches q(x_T), or from N(0, I)",
        choices=("matched", "gaussian"))
    sequential: bool = opt(False, "draw one image at a time: the same images, slower")
    sample_batch_size: int | None = opt(
        None, "images drawn at a time (default: as many as keep the device busy)", lo=1, hi=10**6)
    trajectory: bool = opt(
        False, "also save trajectory.png, from noise to image", per_run=True, common=True)


def value_type(hint: object) -> type:
    """The type of an option's value: `int` for the hint `int | None`."""
    return get_args(hint)[0] if type(None) in get_args(hint) else hint


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
TYPES = {name: value_type(hint) for name, hint in get_type_hints(Config).items()}
PER_RUN = {name for name, spec in FIELDS.items() if spec.metadata["per_run"]}
ARCHITECTURAL = {name for name, spec in FIELDS.items() if spec.metadata["architectural"]}
SAMPLING = {"seed", *itertools.dropwhile(lambda name: name != "sampler", FIELDS)} - PER_RUN
# The ways to say how long a run is, of which one counts, and their units for people.
LENGTH_UNITS = {"epochs": "epochs", "iterations": "steps", "train_minutes": "minutes"}
LENGTHS = tuple(LENGTH_UNITS)
# What has to be the same where losses are compared: all that comes before the names of a run.
OF_THE_LOSS = {"log_every", *itertools.takewhile(lambda name: name != "experiment_name", FIELDS)}
OF_THE_LOSS -= {*PER_RUN, *LENGTHS, "early_stop_loss_change"}


def length_that_counts(options: dict) -> str:
    """The name of the one that settles how long a run is: steps before minutes before epochs; empty without any."""
    return next((name for name in ("iterations", "train_minutes", "epochs") if options.get(name)), "")


# The recommended settings of each dataset.
PRESETS = {
    "digits": dict(
        timesteps=1000, schedule_type="cosine", prediction="v", batch_size=64, learning_rate=4e-3, emb_dim=32,
        base_channels=16, channel_mults=(1, 3), num_res_blocks=1, num_heads=2, norm_groups=8, optimizer="muon",
        epochs=10, sample_every=5, checkpoint_every=5, ema_decay=0.995, num_gpus=1, guidance_scale=0.5, steps=10),
    "mnist": dict(
        timesteps=500, beta_start=1e-5, beta_end=0.01, batch_size=128, learning_rate=1e-3, emb_dim=32,
        base_channels=32, channel_mults=(1, 2, 2), num_res_blocks=1, norm_groups=8, num_heads=4, epochs=20,
        ema_decay=0.999, num_gpus=1),
    "cifar10": dict(
        timesteps=500, beta_start=1e-5, beta_end=0.012, batch_size=32, learning_rate=1e-4, emb_dim=128,
        base_channels=128, channel_mults=(1, 2, 2, 2), attention_levels=(1,), num_heads=8, dropout=0.1, epochs=500,
        sample_every=5),
    "cifar10_optimized": dict(
        timesteps=500, beta_start=1e-5, beta_end=0.012, batch_size=128, learning_rate=1e-4, emb_dim=128,
        base_channels=64, channel_mults=(1, 2, 4), attention_levels=(2,), num_heads=4, epochs=500, sample_every=5,
        num_gpus=1),
    "celeba": dict(
        timesteps=1000, schedule_type="cosine", batch_size=8, learning_rate=1e-4, emb_dim=256, base_channels=64,
        channel_mults=(1, 2, 2, 4), attention_levels=(2,), head_dim=64, epochs=50),
    "folder": dict(                                              # and picture_preset, by what is asked for
        timesteps=1000, schedule_type="cosine", prediction="x0", time_sampling="logit_normal", emb_dim=128, head_dim=64,
        ema_decay=0.9995, spacing="logsnr", steps=10),
}


@dataclass(frozen=True)
class FolderNetwork:
    """What suits a folder of pictures where training takes up to so many `minutes` of two CPU cores.

    side: of the images, where none is asked for; tokens: what the network's finest level has of them, side by side;
    blocks: residual blocks at a level.
    """

    minutes: float
    side: int
    tokens: int
    base_channels: int
    channel_mults: tuple[float, ...]
    batch_size: int
    guidance_scale: float
    optimizer: str = "muon"
    blocks: int = 2


# The first row was found on sets of 300 to 3,000 pictures in three minutes of two CPU cores, the next two on CIFAR-10
# in 15 to 95 minutes of one, the last one there in twenty minutes of a GPU: see benchmarks/README.md. The shorter the
# time, the coarser the patches, because they let the network see each picture more often, and the stronger the
# guidance, because it makes up for unclear classes. Each of the last two rows has about four times the arithmetic per
# image of the one before; the fourth was not measured. The last one is for CUDA: two cores without AMX show it fewer
# pictures in a day than a GPU in a minute.
FOLDER_NETWORKS = (
    FolderNetwork(10, 32, 8, 64, (1, 2), 16, 1.5, "adamw"),
    FolderNetwork(30, 64, 16, 64, (1, 2), 128, 1.5, blocks=1),
    FolderNetwork(150, 64, 16, 64, (1, 2), 128, 1.0),
    FolderNetwork(300, 64, 16, 128, (1, 2), 128, 1.0),
    FolderNetwork(math.inf, 64, 32, 128, (1, 2, 2), 128, 0.5),
)
FOLDER_MINUTES = 3.0                                             # of training, where no length is asked for
MINUTES_WORTH = {"cpu": 1, "mps": 5, "cuda": 30}                 # in minutes of two CPU cores, roughly
LARGER_BATCH = 2                                                 # times as large on CUDA, in hardly more time


def picture_preset(known: dict, shape: tuple[int, int, int] | None = None) -> dict:
    """The preset of pictures: by the time that training may take, what computes, and the images' size.

    known: the settings that are settled already; shape: (C, H, W) of the dataset, None for a folder, whose images
    get the size that suits the time.
    """
    preset = dict(PRESETS["folder"])
    if not any(known.get(name) for name in LENGTHS):
        preset["train_minutes"] = FOLDER_MINUTES

    # A run by epochs or steps counts as one of an hour.
    minutes = preset.get("train_minutes") or known.get("train_minutes") or 60
    device = known.get("device", "auto")
    if device == "auto":
        device = best_device()
    minutes *= MINUTES_WORTH[device]
    if device != "cuda":
        minutes = min(minutes, FOLDER_NETWORKS[-2].minutes)
    row = next(row for row in FOLDER_NETWORKS if minutes <= row.minutes)

    if shape is None:
        preset["img_size"] = (row.side, row.side)
    preset["base_channels"] = row.base_channels
    preset["channel_mults"] = row.channel_mults
    preset["num_res_blocks"] = row.blocks
    preset["batch_size"] = row.batch_size * (LARGER_BATCH if device == "cuda" else 1)
    preset["optimizer"] = row.optimizer
    preset["guidance_scale"] = row.guidance_scale
    settings = {**preset, **known}
    if settings["prediction"] == "x0" and not settings.get("min_snr_gamma"):     # other losses weigh details otherwise
        preset["detail_weight"] = 4.0
    levels = len(settings["channel_mults"])
    preset["attention_levels"] = (max(0, levels - 1),)           # the coarsest
    preset["learning_rate"] = 2e-3 * min(1.0, 64 / max(1, settings["base_channels"]))

    # Patches: as large as leaves that many of them, if they divide the image.
    height, width = settings.get("img_size") or (shape or DATASETS["folder"].shape)[1:]
    patch_size = 1
    while 2 * patch_size * row.tokens <= min(height, width) and patch_size < 16:
        patch_size *= 2
    while patch_size > 1 and not divides(height, width, levels, patch_size):
        patch_size //= 2
    preset["patch_size"] = patch_size
    return preset


def settings_name(dataset: str) -> str:
    """The dataset whose preset and recipe this one takes: itself, or the one that its entry names."""
    return DATASETS[dataset].like or dataset if dataset in DATASETS else dataset


def preset_of(known: dict) -> dict:
    """The preset of the dataset among the settings that are known; empty without one."""
    dataset = known.get("dataset", "")
    name = settings_name(dataset)
    if name == "folder":
        return picture_preset(known)
    if known.get("recipe") == "best" and name in BEST and DATASETS[dataset].shape[0] == 3:
        return picture_preset(known, DATASETS[dataset].shape)
    return dict(PRESETS.get(name, {}))


# --recipe best: what benchmarks/ found best for a dataset; see its README for the experiments.
BEST = {
    "digits": dict(),                                            # the preset is at the floor already
    "mnist": dict(
        timesteps=1000, schedule_type="cosine", prediction="x0", time_sampling="logit_normal", patch_size=2,
        base_channels=32, channel_mults=(1, 2), batch_size=64, learning_rate=4e-3, adam_betas=(0.9, 0.95),
        time_mean=1.0, detail_weight=4.0, ema_decay=0.9995, train_minutes=10.0, spacing="logsnr", steps=10,
        guidance_scale=0.7, guidance_interval=(0.3, 5.0)),
    # Pictures: by the time there is, see picture_preset.
    "cifar10": dict(train_minutes=30.0),
    "cifar10_optimized": dict(train_minutes=30.0),
    "celeba": dict(train_minutes=60.0),
    "folder": dict(),                                            # its preset is that already
}

# What DDPM's training does (2006.11239), where datasets have other settings.
DDPM = dict(
    timesteps=1000, schedule_type="linear", beta_start=1e-4, beta_end=0.02, prediction="eps", time_sampling="uniform",
    patch_size=1, ema_decay=0.9999, guidance_scale=0.0)

# Whole configurations.
RECIPES = {
    # DDPM's CIFAR-10 network and training (Ho et al. 2020, appendix B).
    "ho2020": dict(
        DDPM, base_channels=128, channel_mults=(1, 2, 2, 2), num_res_blocks=2, attention_levels=(1,), num_heads=1,
        emb_dim=128, dropout=0.1, norm_groups=32, conditioning="add", use_labels=False,
        optimizer="adam", weight_decay=0.0, learning_rate=2e-4, lr_schedule="constant", warmup_steps=5000,
        batch_size=128, iterations=800_000),

    # ddpm_abarankab for CIFAR-10: its README, and its train_cifar.py for the schedule, the intervals and what it leaves
    # out (decay, warm-up, mirroring, dropped labels).
    "ddpm_abarankab": dict(
        DDPM, dataset="cifar10", base_channels=128, channel_mults=(1, 2, 2, 2), num_res_blocks=2, attention_levels=(1,),
        num_heads=1, emb_dim=128, dropout=0.01, conditioning="add", sin_first=True, use_labels=False,
        label_dropout=0.0, flip=False, schedule_type="dns", scale_betas=True, loss_fn="mse", optimizer="adam",
        weight_decay=0.0, learning_rate=2e-4, lr_schedule="constant", warmup_steps=0, batch_size=256,
        iterations=800_000, use_ema=True, ema_update_rate=1, ema_start=1, log_every=100, checkpoint_rate=10_000),

    # diffusion_mac_m3.py for folders of 128x128 photographs: the tables of arguments and the network in its README,
    # which knows neither classes nor averaged weights. Attention follows each halving and each doubling.
    "diffusion_mac_m3": dict(
        DDPM, img_size=(128, 128), channels=3, use_labels=False, base_channels=128, channel_mults=(1, 2, 3, 4),
        num_res_blocks=2, attention_levels=(1, 2, 3), up_attention_levels=(0, 1, 2), num_heads=4, emb_dim=128,
        dropout=0.0, conditioning="add", loss_fn="mse", optimizer="adamw", weight_decay=1e-4, learning_rate=1e-4,
        lr_schedule="cosine", warmup_steps=5000, max_grad_norm=1.0, batch_size=32, gradient_accumulation_steps=1,
        iterations=150_000, use_ema=False, checkpoint_rate=5000, num_keep_checkpoints=1, num_generations=5,
        plot_freq_interval=100),

    # Its recommended settings for an Apple M3 Ultra, but with averaged weights and attention at fewer levels.
    "celebahq128": dict(
        DDPM, img_size=(128, 128), channels=3, base_channels=96, channel_mults=(1, 2, 3, 4), emb_dim=96,
        attention_levels=(1, 2, 3), head_dim=32, batch_size=16, learning_rate=1e-4, warmup_steps=5000,
        lr_schedule="cosine", weight_decay=1e-4, max_grad_norm=1.0, iterations=100_000, checkpoint_rate=5000,
        num_keep_checkpoints=2, num_generations=5, plot_freq_interval=100),

    # create_cifar10_ddpm of the project diffusion_models: the configuration in its README, which knows neither classes
    # nor averaged weights.
    "cifar10_ddpm": dict(
        DDPM, dataset="cifar10", use_labels=False, base_channels=64, channel_mults=(1, 2, 4), num_res_blocks=2,
        attention_levels=(1, 2), num_heads=4, emb_dim=128, dropout=0.0, conditioning="add", loss_fn="mse",
        optimizer="adam", weight_decay=0.0, learning_rate=2e-4, lr_schedule="constant", warmup_steps=0, batch_size=128,
        epochs=100, use_ema=False, checkpoint_every=10, sample_every=20, use_tensorboard=True),

    # What is best for the dataset: see BEST.
    "best": dict(),
}


# One value: text to value, value to text, and its check.

def parse_value(name: str, text: str):
    """The value of option `name` written as `text`, checked. Raises UserError."""
    kind = TYPES[name]
    text = text.strip()
    if text == "auto" and FIELDS[name].default is None:
        return None

    try:
        if kind is bool:
            value = BOOLEANS[text.lower()]
        elif kind is str:
            value = FIELDS[name].metadata["synonyms"].get(text, text)
        elif kind in (int, float):
            value = kind(text)
        else:
            value = parse_tuple(kind, text)
    except (KeyError, ValueError, OverflowError):
        wanted = {bool: "True or False", int: "a whole number", float: "a number"}.get(kind, "numbers such as 1,2,2")
        raise UserError(f"--{name} wants {wanted}, not {text[:60]!r}") from None

    check_value(name, value)
    return value


def parse_tuple(kind: type, text: str) -> tuple:
    """Numbers between commas, spaces or x; one alone stands for both sides of an image. Raises ValueError."""
    number = get_args(kind)[0]
    parts = [part for part in re.split(r"[,x\s]+", text.strip("[]() ")) if part]
    value = tuple(int(part) if part.isdecimal() else number(part) for part in parts)
    if kind == tuple[int, int] and len(value) == 1:
        return value * 2
    return value


def format_value(name: str, value) -> str:
    """A value as it is written behind its flag."""
    if value is None:
        return "auto"
    if isinstance(value, tuple):
        return ("x" if name == "img_size" else ",").join(map(str, value))
    return str(value)


def readable(number: float) -> str:
    """A number as people write it: 10,000,000 and 0.0001."""
    return f"{number:,.0f}" if number == math.floor(number) else f"{number:g}"


def allowed_values(name: str) -> tuple:
    """The choices of an option; empty where any value will do."""
    choices = FIELDS[name].metadata["choices"]
    if isinstance(choices, str):                                 # a registry, which stands further down
        choices = globals()[choices]
    return tuple(choices or ())


def has_type(value, kind: type) -> bool:
    """Whether a single value is of that type; an int is a float, a bool is no int."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    return isinstance(value, kind)


def fits_type(value, kind: type) -> bool:
    """Whether a value is of an option's type: a single value, or a tuple of a fixed or of any length."""
    kinds = get_args(kind)                                       # of a tuple
    if not kinds:
        return has_type(value, kind)
    if not isinstance(value, tuple):
        return False
    if ... not in kinds and len(value) != len(kinds):
        return False
    return all(has_type(entry, kinds[0]) for entry in value)


def check_value(name: str, value) -> None:
    """Type, choices and range of one option. Raises UserError."""
    spec = FIELDS[name]
    if isinstance(value, (str, type(None))) and value == spec.default and not value:
        return

    # Its type.
    try:
        shown = repr(value)[:60]
    except ValueError:                                           # Python writes out no number of thousands of digits
        shown = "a number of thousands of digits"
    if not fits_type(value, TYPES[name]):
        raise UserError(f"--{name} cannot be {shown}")
    entries = value if isinstance(value, tuple) else (value,)
    if len(entries) > 16:
        raise UserError(f"--{name} takes at most 16 numbers, not {len(entries)}")
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"--{name} cannot contain a null character")

    # Its choices and its range.
    choices = allowed_values(name)
    if choices and value not in choices:
        raise UserError(f"--{name} is one of {', '.join(map(str, choices))}, not {shown}")
    lo, hi = spec.metadata["lo"], spec.metadata["hi"]
    if lo is not None and not all(lo <= entry <= hi for entry in entries):
        raise UserError(f"--{name} lies between {readable(lo)} and {readable(hi)}, not {shown}")


def check_values(options: dict) -> None:
    """Type, choices and range of each option by itself. Raises UserError."""
    for name, value in options.items():
        check_value(name, value)


# All values together.

MAX_CHANNELS = 16_384                                            # one 3x3 convolution of them: 10 GB


def check(cfg: Config) -> None:
    """Raise UserError for an option out of range or for options that contradict each other."""
    check_values(vars(cfg))
    check_network(cfg)
    if cfg.beta_end < cfg.beta_start:
        raise UserError(f"--beta_end {cfg.beta_end:g} is below --beta_start {cfg.beta_start:g}: noise has to grow")
    if cfg.prediction == "eps" and cfg.zero_terminal_snr:
        raise UserError("--zero_terminal_snr needs another --prediction than eps: at T, where xt is pure noise, eps "
                        "says nothing about x0")
    alpha_bar_table(cfg)                                         # raises UserError, too
    if cfg.guide_path and not cfg.guidance_scale:
        raise UserError("--guide_path needs --guidance_scale above 0")
    if cfg.guidance_interval and cfg.guidance_interval[0] > cfg.guidance_interval[1]:
        raise UserError(f"--guidance_interval {cfg.guidance_interval} begins above its end")
    if cfg.lr_cycles and cfg.lr_schedule != "cosine_with_restarts":
        raise UserError(f"--lr_cycles is for --lr_schedule cosine_with_restarts, not {cfg.lr_schedule}: leave it out")
    if cfg.steps and cfg.steps > cfg.timesteps:
        raise UserError(f"--steps {cfg.steps} is more than the {cfg.timesteps} timesteps of the schedule")
    if cfg.experiment_name:
        check_experiment_name(cfg)
    if cfg.label_column and cfg.dataset not in ("", "folder"):
        raise UserError(f"--label_column is for --path_to_data, not --dataset {cfg.dataset}: leave it out")
    if cfg.dataset:
        _, height, width = image_shape(cfg)
        check_image_size(height, width, len(cfg.channel_mults), cfg.patch_size)


MAX_FILE_NAME = 255                                              # bytes, on all usual file systems


def check_experiment_name(cfg: Config) -> None:
    """Raise UserError for a name that makes no folder below --working_directory, or one whose name is too long."""
    name = cfg.experiment_name
    shown = name if len(name) <= 60 else f"{name[:60]}..."
    for part in re.split(r"[/\\]", name):
        if part.strip() in ("", ".", ".."):
            raise UserError(f"--experiment_name {shown} is no name for a folder below --working_directory: leave out "
                            "'.', '..' and a slash at either end")
    if Path(name).drive:
        raise UserError(f"--experiment_name {shown} is no name for a folder below --working_directory")

    # The longest of the names made of it, with that of the lock beside it.
    folders = samples_path(cfg).relative_to(cfg.generated_directory).parts
    longest = max(len(os.fsencode(f".{folder}.owner")) for folder in folders)
    if longest > MAX_FILE_NAME:
        raise UserError(f"--experiment_name {shown} is too long by {longest - MAX_FILE_NAME} bytes: the run's folders "
                        f"are named after it, and a name has {MAX_FILE_NAME} at most")
    size = len(os.fsencode(name))
    if size > 1000:
        raise UserError(f"--experiment_name {shown} is too long: it has {size:,} bytes, 1,000 at most")


def check_network(cfg: Config) -> None:
    """Raise UserError for options that no network can have together."""
    levels = len(cfg.channel_mults)
    if levels == 0:
        raise UserError("--channel_mults needs one entry per level, such as 1,2,2")

    # Channels of each level.
    widths = level_widths(cfg.base_channels, cfg.channel_mults)
    if max(widths) > MAX_CHANNELS:
        raise UserError(f"--base_channels x --channel_mults makes {max(widths):,} channels: {MAX_CHANNELS:,} at most")
    for multiplier, width in zip(cfg.channel_mults, widths):
        if width < 1 or abs(cfg.base_channels * multiplier - width) > 1e-6:
            raise UserError(f"--channel_mults {cfg.channel_mults} make no whole numbers of {cfg.base_channels} "
                            "channels")

    # Heads of each level with attention.
    flag = "head_dim" if cfg.head_dim else "num_heads"
    for level in sorted(attended_levels(cfg), reverse=True):
        if level >= levels:
            of = "attention_levels" if level in cfg.attention_levels else "up_attention_levels"
            raise UserError(f"--{of} {level}: the network has levels 0 to {levels - 1}")
        if widths[level] % getattr(cfg, flag):
            raise UserError(f"--{flag} {getattr(cfg, flag)} does not divide the {widths[level]} channels of level "
                            f"{level}")

    frequencies = cfg.base_channels // 2
    if frequencies == cfg.freq_shift:
        raise UserError(f"--freq_shift {cfg.freq_shift:g} leaves none of the {frequencies} frequencies")


def attended_levels(cfg: Config) -> set[int]:
    """The levels with attention on the way down or up; the bottleneck counts as the last."""
    if not cfg.use_attention:
        return set()
    levels = {*cfg.attention_levels, *(cfg.up_attention_levels or ())}
    if cfg.mid_attention != "none":
        levels.add(len(cfg.channel_mults) - 1)
    return levels


def size_unit(levels: int, patch_size: int) -> int:
    """What both sides of an image have to divide by, so that it can be halved at each level below the first."""
    return patch_size * 2 ** (levels - 1)


def divides(height: int, width: int, levels: int, patch_size: int) -> bool:
    """Whether an image of this size can be halved at each level below the first."""
    unit = size_unit(levels, patch_size)
    return height % unit == 0 and width % unit == 0


def check_image_size(height: int, width: int, levels: int, patch_size: int = 1) -> None:
    """Raise UserError for an image that cannot be halved at each level below the first."""
    if divides(height, width, levels, patch_size):
        return
    unit = size_unit(levels, patch_size)

    def nearest(size: int) -> str:
        below = max(unit, size // unit * unit)
        above = math.ceil(size / unit) * unit
        return f"{below} or {above}" if below != above else str(below)

    raise UserError(f"image size {height}x{width} does not divide by {unit}, as {levels} levels need: nearest that do "
                    f"are height {nearest(height)}, width {nearest(width)} (--img_size), or use fewer --channel_mults")


# Where settings become final. What counts is, in this order:
#
#     1. flags  2. their recipe  3. the file of --config        `requested`: what may not contradict a checkpoint
#     4. the checkpoint  5. the dataset's preset  6. defaults   `complete`: the settings, final and checked
#
# Later only these are resolved: what the images alone tell (their size, whether they have labels), which Trainer adds;
# how many steps a run by minutes takes, which the clock says (`settle_run`, `steps_for_minutes`, `Pace`); and where
# things are on each machine of a run (OWN_PLACES).


def configure(checkpoint: dict | None = None, **overrides) -> Config:
    """The settings of a run or of drawing, final and checked.

    overrides: options by name, as on the command line; checkpoint: the configuration stored in the checkpoint that is
    gone on with or drawn from. Raises UserError.
    """
    return complete(requested(overrides), checkpoint)


def requested(overrides: dict) -> dict:
    """What is asked for: flags, then the recipe that they name, then the file of --config. Raises UserError."""
    # 1. Flags.
    asked = normalize_options(overrides)
    check_values(asked)
    if asked.get("train_minutes") and (asked.get("epochs") or asked.get("iterations")):
        raise UserError("--train_minutes sets the number of steps: leave out --epochs and --iterations")
    if asked.get("path_to_data") and not asked.get("dataset"):
        asked["dataset"] = "folder"
    if asked.get("resume_from_checkpoint") == "latest":
        asked.update(resume_from_checkpoint="", resume="auto")

    if asked.get("ema_halflife") and "ema_decay" in asked:
        raise UserError("--ema_halflife takes the place of --ema_decay: leave out one of them")

    # 2. The recipe.
    stored = read_options(asked["config"]) if asked.get("config") else {}
    dataset = asked.get("dataset") or stored.get("dataset")
    recipe = RECIPES.get(asked.get("recipe", ""), {})
    if asked.get("recipe") == "best" and dataset:
        name = settings_name(dataset)
        if name not in BEST:
            raise UserError(f"--recipe best knows {', '.join(BEST)}, not {dataset}: leave it out")
        recipe = BEST[name]
    asked = add_below(asked, normalize_options(recipe))

    # 3. The file of --config.
    asked = add_below(asked, stored)
    if asked.get("epochs") or asked.get("iterations"):
        # Name the others, too, or a checkpoint would add its own.
        asked = {"iterations": 0, "train_minutes": 0.0, **asked}
    return asked


def add_below(asked: dict, options: dict) -> dict:
    """`asked`, completed by weaker options.

    A run has one length, and its average one: where `asked` names one, the weaker ones are ignored.
    """
    ignored = set()
    if any(asked.get(name) for name in LENGTHS):
        ignored.update(LENGTHS)
    if asked.get("ema_halflife") or options.get("ema_halflife"):
        ignored.add("ema_decay")
    options = {name: value for name, value in options.items() if name not in ignored}
    return {**without_foreign_steps(options, asked), **asked}


def without_foreign_steps(options: dict, asked: dict) -> dict:
    """`options` without their number of sampling steps, where `asked` names another sampler than they have."""
    sampler = options.get("sampler", Config.sampler)
    if asked.get("sampler", sampler) == sampler:
        return options
    return {name: value for name, value in options.items() if name != "steps"}


def complete(asked: dict, checkpoint: dict | None = None) -> Config:
    """The final settings: `asked`, as from `requested`, filled up from checkpoint, preset and defaults, and checked.

    Raises UserError.
    """
    # 4. The checkpoint, or what a new run takes over from the one whose weights it starts from.
    inherited = checkpoint or {}
    if not checkpoint and Path(asked.get("init_from", "")).is_file():
        inherited = pretrained_options(asked)
    inherited = {name: value for name, value in inherited.items() if name in FIELDS and name not in PER_RUN}
    known = {**with_tuples(without_foreign_steps(inherited, asked)), **asked}
    check_values(known)

    # 5. The preset, where it fits what is known by now; an older checkpoint is what it was without later presets.
    preset = without_foreign_steps(preset_of(known), known)
    if checkpoint:
        preset = {name: value for name, value in preset.items() if name in PER_RUN}
    if preset.get("steps"):
        preset["steps"] = min(preset["steps"], {**preset, **known}["timesteps"])
    if "channel_mults" in asked and "attention_levels" in preset:                # only levels that are still there
        levels = range(len(asked["channel_mults"]))
        preset["attention_levels"] = tuple(level for level in preset["attention_levels"] if level in levels)
    if "head_dim" in preset:                                     # as far as it divides all levels
        network = {**preset, **known}
        widths = level_widths(network["base_channels"], network["channel_mults"])
        preset["head_dim"] = math.gcd(preset["head_dim"], *widths)

    # 6. Defaults; then the settings are final.
    cfg = Config(**{**preset, **known})
    check(cfg)
    return cfg


# Of the options about a single invocation, those that a command needs to do the same again.
REPEATED = {"path_to_data", "data_dir", "init_from", "experiment_name", "device", "num_gpus", "precision", "compile",
            "channels_last", "deterministic"}


def options_for(cfg: Config, length: dict) -> dict:
    """The options that lead to `cfg`: those that a run of this `length` on its dataset would not have by itself.

    length: one of LENGTHS with its value, which is among the options as well; empty: the dataset's own.
    """
    spec = DATASETS[cfg.dataset]
    channels, *size = spec.shape
    labelled = spec.class_count > 0 or cfg.dataset == "folder"
    of_the_images = dict(flip=spec.flip, use_labels=labelled, channels=channels, img_size=tuple(size))
    names = [name for name in FIELDS if name not in LENGTHS and (name not in PER_RUN or name in REPEATED)]
    wanted = {name: getattr(cfg, name) for name in names if name != "dataset"}
    if cfg.ema_halflife:                                         # in place of it
        del wanted["ema_decay"]
    for name, value in of_the_images.items():
        if wanted[name] is None:
            wanted[name] = value

    # One option may change the preset of others, so look again until nothing is missing.
    options = dict(length)
    missing = {name: wanted[name] for name in ("path_to_data", "init_from", "device")
               if wanted[name] != FIELDS[name].default}
    while True:
        options |= missing
        try:
            plain = vars(configure(dataset=cfg.dataset, **options))
        except UserError:                                        # these alone do not go together
            plain = vars(Config())
        missing = {}
        for name, value in wanted.items():
            own = of_the_images.get(name) if plain[name] is None else plain[name]
            if name not in options and value != own:
                missing[name] = value
        if not missing:
            break
    return {name: options[name] for name in FIELDS if name in options}


def chosen_length(cfg: Config) -> dict:
    """The length of a run as it was asked for; empty where it is that of its dataset."""
    # Minutes first: a run of so many minutes has a number of steps as well, which nobody asked for.
    name = next((name for name in ("train_minutes", "iterations", "epochs") if getattr(cfg, name)), "")
    plain = complete(dict(dataset=cfg.dataset))
    if not name or (name == length_that_counts(vars(plain)) and getattr(plain, name) == getattr(cfg, name)):
        return {}
    return {name: getattr(cfg, name)}


def chosen_options(cfg: Config) -> dict:
    """The options of a run that differ from what its dataset has without any flag."""
    return options_for(cfg, chosen_length(cfg))


def repeating_command(cfg: Config) -> str:
    """The command line that trains like this, for as many steps."""
    length = dict(iterations=cfg.iterations) if cfg.iterations else chosen_length(cfg)
    words = ["python", "diffuser.py", "--mode", "train", "--dataset", cfg.dataset]
    for name, value in options_for(cfg, length).items():
        text = format_value(name, value)
        words += [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]
    return shlex.join(words)


def with_tuples(values: dict) -> dict:
    """The values, lists as tuples: JSON and checkpoints have lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def normalize_options(values: dict) -> dict:
    """Values as Python or JSON has them, as fields of Config: lists for tuples, a number for a square image, paths.

    An option switches off what would overrule it, or needs another value of it, in a weaker source: num_heads a
    head_dim, ema_decay an ema_halflife, another lr_schedule the lr_cycles. Raises UserError for a name that is no
    option.
    """
    options = {}
    for name, value in with_tuples(values).items():
        if name not in FIELDS:
            raise UserError(f"there is no option {name}{did_you_mean(name, FIELDS)}")
        if value == "" and FIELDS[name].metadata["choices"]:     # nothing chosen
            continue
        options[name] = str(value) if isinstance(value, Path) else value
    if type(options.get("img_size")) is int:
        options["img_size"] = (options["img_size"], options["img_size"])
    if "num_heads" in options:
        options.setdefault("head_dim", 0)
    if "ema_decay" in options:
        options.setdefault("ema_halflife", 0.0)
    if options.get("lr_schedule", "cosine_with_restarts") != "cosine_with_restarts":
        options.setdefault("lr_cycles", None)
    return options


def read_options(path: str) -> dict:
    """The options in the config.json of a run, or in a file of options alone, that repeat it.

    Those about a single invocation are left out, and of its lengths all but the one that counts. Raises UserError.
    """
    advice = "give a run's config.json"
    try:
        content = read_json_object(Path(path))
    except OSError as error:
        raise UserError(f"--config {path} holds no options ({error.strerror}): {advice}") from error
    except ValueError as error:
        raise UserError(f"--config {path} holds no options ({first_line(error)}): {advice}") from error

    inner = content.get("config", content)                       # a string there: the option of that name
    if isinstance(inner, str):
        inner = content
    if not isinstance(inner, dict):
        raise UserError(f"--config {path} holds no options (its \"config\" is no object): {advice}")
    try:
        options = normalize_options(inner)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None

    dropped = {"mode", "config", "recipe", "yes", "dry_run", "check", "debug", "resume", "resume_from_checkpoint",
               *LENGTHS}
    dropped.discard(length_that_counts(options))
    kept = {name: value for name, value in options.items() if name not in dropped and value != ""}
    try:
        check_values(kept)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    return {"mode": "train", **kept}


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
    time = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    return beta_from_alpha_bar(torch.cos((time + s) / (1 + s) * math.pi / 2) ** 2)


def dns_beta(T: int, beta_start: float, beta_end: float, s: float, off: float = 5) -> Tensor:
    """Dynamic negative square: beta grows with the square of time between its two ends."""
    w = 1 - ((torch.arange(T, dtype=torch.float64) + off) / (T + 1 + off)) ** 2
    return (1 - w) * (beta_end - beta_start) + beta_start


def sigmoid_beta(T: int, beta_start: float, beta_end: float, s: float, lo: float = -3, hi: float = 3) -> Tensor:
    """Sigmoid alpha_bar between lo and hi, temperature 1, beta capped at 0.999 (Jabri et al. 2022, 2212.11972)."""
    time = torch.linspace(lo, hi, T + 1, dtype=torch.float64)
    return beta_from_alpha_bar(torch.sigmoid(-time) - 1 / (1 + math.exp(hi)))


def flow_beta(T: int, beta_start: float, beta_end: float, s: float) -> Tensor:
    """The straight line (1 - u) x0 + u eps, u = 1/T, ..., 1, scaled to unit variance (Lipman et al. 2022, 2210.02747,
    sec. 4.1): alpha_bar = (1 - u)^2 / ((1 - u)^2 + u^2)."""
    u = torch.linspace(0, 1, T + 1, dtype=torch.float64)
    return beta_from_alpha_bar((1 - u) ** 2 / ((1 - u) ** 2 + u**2))


def edm_beta(T: int, beta_start: float, beta_end: float, s: float, rho: float = 7.0) -> Tensor:
    """Noise levels sqrt(1 / alpha_bar - 1) from 0.002 to 80 in equal steps of their rho-th root (2206.00364, eq. 5)."""
    sigma = torch.linspace(0.002 ** (1 / rho), 80.0 ** (1 / rho), T, dtype=torch.float64) ** rho
    return beta_from_alpha_bar(torch.cat([torch.ones(1, dtype=torch.float64), 1 / (1 + sigma**2)]))


def beta_from_alpha_bar(alpha_bar: Tensor) -> Tensor:
    """beta [T] from a curve of alpha_bar at T + 1 times (any scale), capped at 0.999 so that no step erases all."""
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


# To add a schedule: write its function and name it here.
SCHEDULES = {
    "linear": linear_beta,
    "cosine": cosine_beta,
    "dns": dns_beta,
    "sigmoid": sigmoid_beta,
    "scaled_linear": scaled_linear_beta,
    "geodiff": geodiff_beta,
    "flow": flow_beta,
    "edm": edm_beta,
}


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and stretch sqrt(alpha_bar) so that it ends at 0 and begins as it did (2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def half_log_snr(alpha_bar: Tensor) -> Tensor:
    """log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), falling with t.

    alpha_bar = 0 counts as a hundredth of the smallest value above it.
    """
    least = alpha_bar[alpha_bar > 0].min() / 100
    return (alpha_bar.clamp(min=least) / (1 - alpha_bar)).log() / 2


# ---- 3  Diffusion ------------------------------------------------------------------------------
# The forward process, the one place where a network's output becomes (x0_hat, eps_hat), and the loss (DDPM,
# 2006.11239).


@dataclass(frozen=True)
class Prediction:
    """What a network learns: out = p x0 + q eps.

    coefficients: (p, q) from a = sqrt(alpha_bar_t) and s = sqrt(1 - alpha_bar_t), each [N, 1, 1, 1] or [T];
    input_scale: what x_t is multiplied by before the network sees it; None: nothing.
    """

    coefficients: Callable[[Tensor, Tensor], tuple]
    input_scale: Callable[[Tensor, Tensor], Tensor] | None = None

    def target(self, x0: Tensor, eps: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """What the output should be."""
        p, q = self.coefficients(a, s)
        return p * x0 + q * eps

    def x0_from(self, out: Tensor, xt: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """x0_hat, from out = p x0 + q eps and x_t = a x0 + s eps; for eps it is DDPM's eq. 15."""
        p, q = self.coefficients(a, s)
        return q / (q * a - p * s) * xt - s / (q * a - p * s) * out

    def min_snr(self, a: Tensor, s: Tensor, gamma: float) -> Tensor:
        """The weight under which its squared error is that of x0_hat times min(snr, gamma) (2303.09556, sec. 3.4)."""
        p, q = self.coefficients(a, s)
        return (s / (q * a - p * s)) ** 2 * (a / s).square().clamp(max=gamma)


EDM_DEVIATION = 0.5                                              # of the images that EDM is made for


def edm_scale(a: Tensor, s: Tensor) -> Tensor:
    """The deviation of x_t for images of deviation EDM_DEVIATION."""
    return (s**2 + EDM_DEVIATION**2 * a**2).sqrt()


def edm_coefficients(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """A target of unit variance for such images (EDM, 2206.00364, table 1, c_skip and c_out)."""
    d = edm_scale(a, s)
    return s / (EDM_DEVIATION * d), -EDM_DEVIATION * a / d


# To add a prediction: name its coefficients here.
PREDICTIONS = {
    "eps": Prediction(lambda a, s: (0, 1)),
    "v": Prediction(lambda a, s: (-s, a)),                       # 2202.00512, sec. 4
    "x0": Prediction(lambda a, s: (1, 0)),
    "flow": Prediction(lambda a, s: (-1, 1),                     # eps - x0; it sees (1 - u) x0 + u eps
                       input_scale=lambda a, s: 1 / (a + s)),
    "edm": Prediction(edm_coefficients,                          # it sees unit variance: EDM's c_in
                      input_scale=lambda a, s: 1 / edm_scale(a, s)),
}

# To add a loss: name it here; it is called with reduction="none".
LOSSES = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


# How often each timestep is trained: the logarithm, float64 [T], up to a constant.


def uniform_density(alpha_bar: Tensor, mean: float | None, scale: float | None) -> Tensor:
    """Each timestep alike."""
    return torch.zeros_like(alpha_bar)


def logit_normal_density(alpha_bar: Tensor, mean: float | None, scale: float | None) -> Tensor:
    """t / T = sigmoid(n), n ~ N(mean, scale^2), by default N(0, 1) (2403.03206, eq. 19)."""
    time = (torch.arange(len(alpha_bar), dtype=torch.float64) + 0.5) / len(alpha_bar)
    return -(((torch.logit(time) - (mean or 0.0)) / (scale or 1.0)) ** 2) / 2 - (time * (1 - time)).log()


def laplace_density(alpha_bar: Tensor, mean: float | None, scale: float | None) -> Tensor:
    """log-SNR ~ Laplace(mean, scale), by default (0, 0.5): its density times the spacing of the timesteps (2407.03297,
    table 1)."""
    log_snr = 2 * half_log_snr(alpha_bar)
    return -(log_snr - (mean or 0.0)).abs() / (scale or 0.5) + torch.gradient(-log_snr)[0].log()


def lognormal_density(alpha_bar: Tensor, mean: float | None, scale: float | None) -> Tensor:
    """log sigma ~ N(mean, scale^2), sigma = sqrt(1 / alpha_bar - 1), by default N(-1.2, 1.2^2) (EDM, 2206.00364, table
    1): its density times the spacing of the timesteps."""
    log_sigma = -half_log_snr(alpha_bar)
    deviation = (log_sigma - (-1.2 if mean is None else mean)) / (scale or 1.2)
    return -(deviation**2) / 2 + torch.gradient(log_sigma)[0].log()


TIME_DENSITIES = {
    "uniform": uniform_density,
    "logit_normal": logit_normal_density,
    "laplace": laplace_density,
    "lognormal": lognormal_density,
}


def detail_weights(alpha_bar: Tensor, time_weights: Tensor, amount: float) -> Tensor:
    """Weights of the loss, float64 [T]: 1 + amount sqrt(SNR), with an SNR of at most 100; their mean in training is 1.

    With an amount of about 4 all noise levels weigh alike, for the mean loss of x0_hat falls so with the noise: what
    EDM2 learns for each level as it trains (2312.02696), without anything to learn.
    """
    snr = alpha_bar / (1 - alpha_bar)
    weight = 1 + amount * snr.clamp(max=100).sqrt()
    return weight * time_weights.sum() / (weight * time_weights).sum()


class Diffusion:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x0, (1 - alpha_bar_t) I), and what a network says about it.

    alpha_bar: float64 [T]; prediction: a key of PREDICTIONS; loss_fn: a key of LOSSES; min_snr_gamma, detail_weight: 0
    for no weighting; time_weights: float64 [T], how often each timestep is trained, by default alike.
    """

    def __init__(self, alpha_bar: Tensor, prediction: str = "eps", loss_fn: str = "mse", min_snr_gamma: float = 0.0,
                 detail_weight: float = 0.0, time_weights: Tensor | None = None):
        self.alpha_bar = alpha_bar
        self.T = len(alpha_bar)
        self.prediction = PREDICTIONS[prediction]
        self.loss_fn = LOSSES[loss_fn]

        # Tables [T], computed in float64.
        weight = torch.ones_like(alpha_bar)
        if min_snr_gamma:
            weight = self.prediction.min_snr(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), min_snr_gamma)
        if time_weights is None:
            time_weights = torch.ones_like(alpha_bar)
        cdf = torch.cumsum(time_weights, 0)
        if detail_weight:
            weight = weight * detail_weights(alpha_bar, time_weights, detail_weight)
        self.signal = alpha_bar.sqrt().float()
        self.noise = (1 - alpha_bar).sqrt().float()
        self.weight = weight.float()
        self.time_cdf = (cdf / cdf[-1]).float()

    def to(self, device) -> Diffusion:
        """Move the tables; returns itself."""
        for name in ("signal", "noise", "weight", "time_cdf"):
            setattr(self, name, getattr(self, name).to(device))
        return self

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

    def network_input(self, xt: Tensor, t: Tensor) -> Tensor:
        """x_t as the network sees it."""
        if self.prediction.input_scale is None:
            return xt
        return self.prediction.input_scale(*self.scales(t)) * xt

    def estimates(self, out: Tensor, xt: Tensor, t: Tensor, clip: bool = True, dynamic_threshold: float = 0.0,
                  eps_scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(x0_hat, eps_hat) from the network's output, its noise divided by eps_scale (2308.15321).

        x0_hat is clipped to [-1, 1], or to the dynamic_threshold-quantile of its own size; eps_hat follows from it, so
        that the two add up to x_t.
        """
        a, s = self.scales(t)
        x0_hat = self.prediction.x0_from(out, xt, a, s)
        if eps_scale != 1:
            scaled = x0_hat / eps_scale + (1 - 1 / eps_scale) * xt / a
            x0_hat = torch.where(a > 0.01, scaled, x0_hat)                   # it means nothing where all is noise

        if dynamic_threshold:                                                # Imagen, 2205.11487, sec. 2.3
            size = x0_hat.flatten(1).abs()
            limit = size.quantile(dynamic_threshold, dim=1).clamp(min=1).view(-1, 1, 1, 1)
            x0_hat = x0_hat.clamp(-limit, limit) / limit
        elif clip:
            x0_hat = x0_hat.clamp(-1, 1)
        return x0_hat, (xt - a * x0_hat) / s

    def loss(self, network: Callable, x0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None,
             noise: Tensor | None = None) -> Tensor:
        """Loss of each sample, float [N] (DDPM, eq. 14, for eps and mse).

        network: (xt, t, y) -> [N, C, H, W]; noise: what is added to x0 where that is not eps.
        """
        xt = self.q_sample(x0, t, eps if noise is None else noise)
        out = network(self.network_input(xt, t), t, y).float()
        target = self.prediction.target(x0, eps, *self.scales(t))
        return self.loss_fn(out, target, reduction="none").flatten(1).mean(1) * self.weight[t]


# ---- 4  U-Net ----------------------------------------------------------------------------------
# The network of DDPM (appendix B) with the choices of ADM (2105.05233): each parameter has one counterpart of the same
# shape in diffusers' UNet2DModel. Names of attributes are keys in checkpoints: never rename one. Plain torch; chapter 7
# may swap in faster twins of Norm, Conv3x3, nn.Dropout, Concat and DotProduct.


class Norm(nn.GroupNorm):
    """silu(norm(x) * (1 + scale) + shift), [N, C, H, W] -> the same; without the SiLU where not `silu`."""

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = True):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        h = super().forward(x)
        if scale is not None:                                                # [N, C]; ADM, adaptive group norm
            h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(h) if self.silu else h


class Conv3x3(nn.Conv2d):
    """3x3 convolution, [N, cin, H, W] -> [N, cout, H, W] divided by `stride`. padding: 1, or 0 for right and bottom."""

    def __init__(self, cin: int, cout: int, stride: int = 1, padding: int = 1):
        super().__init__(cin, cout, 3, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


class Concat(nn.Module):
    """[N, a, H, W] and [N, b, H, W] -> [N, a + b, H, W]."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=1)


class DotProduct(nn.Module):
    """softmax(q k^T / sqrt(d)) v over [N, heads, tokens, d]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention over all pixels, residual, pre-norm where there is one. [N, C, H, W] -> the same."""

    def __init__(self, channels: int, heads: int, groups: int, eps: float = 1e-5):
        super().__init__()
        self.heads = heads
        self.norm = Norm(groups, channels, eps, silu=False)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.dot_product = DotProduct()

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        normal = x if self.norm is None else self.norm(x)
        tokens = normal.flatten(2).transpose(1, 2)                           # [N, HW, C]

        def split_heads(v: Tensor) -> Tensor:                                # [N, heads, HW, C/heads]
            return v.view(n, h * w, self.heads, -1).transpose(1, 2)

        q, k, v = split_heads(self.q(tokens)), split_heads(self.k(tokens)), split_heads(self.v(tokens))
        mixed = self.dot_product(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.out(mixed).transpose(1, 2).reshape(n, c, h, w)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a residual connection; then attention where heads > 0.

    x [N, cin, H, W], emb [N, E] -> [N, cout, H, W]. emb enters in the middle, scaling and shifting the second norm or
    added before it; emb_dim = 0: not at all.
    """

    def __init__(self, cin: int, cout: int, emb_dim: int, groups: int, dropout: float, scale_shift: bool,
                 heads: int = 0, eps: float = 1e-5):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = Norm(groups, cin, eps)
        self.conv1 = Conv3x3(cin, cout)
        self.condition = nn.Linear(emb_dim, 2 * cout if scale_shift else cout) if emb_dim else None
        self.norm2 = Norm(groups, cout, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(cout, cout)
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()
        self.attention = Attention(cout, heads, groups, eps) if heads else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None) -> Tensor:
        h = self.conv1(self.norm1(x))                                        # [N, cout, H, W]

        if self.condition is None:
            h = self.norm2(h)
        elif self.scale_shift:
            scale, shift = self.condition(emb).chunk(2, dim=1)               # [N, cout] each
            h = self.norm2(h, scale, shift)
        else:
            h = self.norm2(h + self.condition(emb)[:, :, None, None])

        h = self.conv2(self.dropout(h))
        return self.attention(self.shortcut(x) + h)


def level_widths(base_channels: int, channel_mults: tuple[float, ...]) -> list[int]:
    """Channels of each level; a fraction may miss the whole number that it stands for by rounding."""
    return [round(base_channels * m) for m in channel_mults]


class UNet(nn.Module):
    """(xt [N, C, H, W], t [N], y [N] or None) -> [N, C, H, W], in the terms of `prediction`.

    image_channels: C; num_classes: 0 for an unconditional network; label num_classes is the null class, taken where y
    is None. H and W must divide by patch_size * 2 ** (levels - 1). Other arguments: see Config.
    """

    def __init__(self, image_channels: int, num_classes: int = 0, *, base_channels: int = 64,
                 channel_mults: tuple[float, ...] = (1, 2, 2), num_res_blocks: int = 2, use_attention: bool = True,
                 attention_levels: tuple[int, ...] = (), up_attention_levels: tuple[int, ...] | None = None,
                 mid_attention: str = "norm", num_heads: int = 4, head_dim: int = 0, emb_dim: int = 128,
                 dropout: float = 0.0, patch_size: int = 1, norm_groups: int = 32, norm_eps: float = 1e-5,
                 downsample_padding: int = 1, freq_shift: float = 0.0, sin_first: bool = False,
                 conditioning: str = "scale_shift", gradient_checkpointing: bool = False):
        super().__init__()
        self.base_channels = base_channels
        self.num_classes = num_classes
        self.patch_size = patch_size
        self.freq_shift = freq_shift
        self.sin_first = sin_first
        self.gradient_checkpointing = gradient_checkpointing
        self.emb_as_channels = conditioning == "concat"

        patch_channels = image_channels * patch_size**2
        emb_width = emb_dim if self.emb_as_channels else 4 * emb_dim
        widths = level_widths(base_channels, channel_mults)
        groups = math.gcd(norm_groups, base_channels, *widths)
        if up_attention_levels is None:
            up_attention_levels = attention_levels

        def block(cin: int, cout: int, attend: bool) -> ResBlock:
            heads = 0
            if attend and use_attention:
                heads = cout // head_dim if head_dim else num_heads
            emb = 0 if self.emb_as_channels else emb_width
            return ResBlock(cin, cout, emb, groups, dropout, conditioning == "scale_shift", heads, norm_eps)

        # Time, class, the first convolution.
        self.time_mlp = nn.Sequential(nn.Linear(base_channels, emb_width), nn.SiLU(), nn.Linear(emb_width, emb_width))
        self.class_embedding = nn.Embedding(num_classes + 1, emb_width) if num_classes else None
        emb_channels = 0
        if self.emb_as_channels:
            emb_channels = 2 * emb_width if num_classes else emb_width
        self.conv_in = Conv3x3(patch_channels + emb_channels, base_channels)

        # Down: blocks at each level, then a convolution that halves.
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        cin = base_channels
        skips = [cin]                                                        # widths of what is handed across
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                self.down.append(block(cin, width, level in attention_levels))
                skips.append(width)
                cin = width
            if level < len(widths) - 1:
                self.down.append(Conv3x3(width, width, 2, downsample_padding))
                skips.append(width)

        # Bottleneck.
        self.mid = nn.ModuleList([block(cin, cin, mid_attention != "none"), block(cin, cin, False)])
        if mid_attention == "plain" and use_attention:
            self.mid[0].attention.norm = None

        # Up: each block takes one output of the way down beside its own input.
        self.concat = Concat()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                self.up.append(block(cin + skips.pop(), width, level in up_attention_levels))
                cin = width
            if level > 0:                                                    # nearest neighbour, then a convolution
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2.0), Conv3x3(width, width)))

        self.norm_out = Norm(groups, cin, norm_eps)
        self.conv_out = Conv3x3(cin, patch_channels)
        self.apply(self.init_weights)

    @staticmethod
    @torch.no_grad()
    def init_weights(module: nn.Module) -> None:
        """Xavier-uniform weights and zero biases; zero weights at the end of each residual branch and at the output.

        So an untrained block passes on its shortcut, and the first output is 0 (Ho et al. 2020, code).
        """
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, Attention):
            nn.init.zeros_(module.out.weight)
        if isinstance(module, UNet):
            nn.init.zeros_(module.conv_out.weight)

    def frequencies(self, device=None) -> Tensor:
        """Frequencies of the embedding of t, from 1 down to about 1e-4, float [base_channels // 2]."""
        half = self.base_channels // 2
        return torch.exp(-math.log(10_000) / (half - self.freq_shift) * torch.arange(half, device=device))

    def embed_time(self, t: Tensor) -> Tensor:
        """Sinusoids of t, [N] -> [N, base_channels] (DDPM appendix B; cosines first, as in diffusers)."""
        angle = t[:, None].float() * self.frequencies(t.device)              # [N, half]
        waves = [angle.sin(), angle.cos()] if self.sin_first else [angle.cos(), angle.sin()]
        return F.pad(torch.cat(waves, dim=1), (0, self.base_channels % 2))

    def run_block(self, block: ResBlock, x: Tensor, emb: Tensor | None) -> Tensor:
        """block(x, emb); to save memory only its inputs are kept for the backward pass (1604.06174)."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)

    def forward(self, xt: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        h = F.pixel_unshuffle(xt, self.patch_size)                           # [N, C p^2, H/p, W/p]

        # What conditions the blocks: time, and class where there are any.
        embeddings = [self.time_mlp(self.embed_time(t))]                     # [N, E] each
        if self.class_embedding is not None:
            if y is None:
                y = torch.full_like(t, self.num_classes)
            embeddings.append(self.class_embedding(y))
        if self.emb_as_channels:
            planes = torch.cat(embeddings, dim=1)[:, :, None, None].expand(-1, -1, *h.shape[2:])
            h = torch.cat([h, planes.to(h.dtype)], dim=1)                    # [N, C p^2 + 2 E, H/p, W/p]
            emb = None
        else:
            emb = F.silu(sum(embeddings))                                    # [N, E]

        # Down, keeping every output.
        h = self.conv_in(h)
        skips = [h]
        for module in self.down:
            h = self.run_block(module, h, emb) if isinstance(module, ResBlock) else module(h)
            skips.append(h)                                                  # [N, width, H / 2^level, W / 2^level]

        for block in self.mid:
            h = self.run_block(block, h, emb)

        # Up, taking them in again.
        for module in self.up:
            if isinstance(module, ResBlock):
                h = self.run_block(module, self.concat(h, skips.pop()), emb)
            else:
                h = module(h)
        return F.pixel_shuffle(self.conv_out(self.norm_out(h)), self.patch_size)


# ---- 5  Samplers -------------------------------------------------------------------------------
# Pure functions of a denoiser, (xt, t) -> (x0_hat, eps_hat), that yield (t, x, x0_hat) after each step.
# Guidance wraps the denoiser, so samplers never see it.

Denoiser = Callable[[Tensor, int], tuple[Tensor, Tensor]]
Steps = Iterator[tuple[int, Tensor, Tensor]]


# Spacings: where n sampling steps lie in 0..T-1, downwards.


def trailing_spacing(alpha_bar: Tensor, n: int) -> list[int]:
    """From T-1 in equal steps (2305.08891, table 2)."""
    T = len(alpha_bar)
    return [round(T - i * T / n) - 1 for i in range(n)]


def leading_spacing(alpha_bar: Tensor, n: int) -> list[int]:
    """To 0 in equal steps, as in DDIM's code."""
    return [(n - 1 - i) * (len(alpha_bar) // n) for i in range(n)]


def linear_spacing(alpha_bar: Tensor, n: int) -> list[int]:
    """From T-1 to 0 in equal steps."""
    return [round((len(alpha_bar) - 1) * (1 - i / max(n - 1, 1))) for i in range(n)]


def quadratic_spacing(alpha_bar: Tensor, n: int) -> list[int]:
    """In equal steps of sqrt(t), closer at little noise (2010.02502, D.2)."""
    return [round((len(alpha_bar) - 1) * (1 - i / n) ** 2) for i in range(n)]


def logsnr_spacing(alpha_bar: Tensor, n: int) -> list[int]:
    """T-1, and the timesteps whose log-SNR is nearest to equally spaced values, the last one short of t = 0's.

    They begin where half of it is -5.1 or higher: cosine falls so steeply at its end that most steps would go there
    (2206.00927, 3.4).
    """
    lam = half_log_snr(alpha_bar)
    wanted = torch.linspace(max(lam[-1].item(), -5.1), lam[0], n + 1, dtype=torch.float64)[1:n]
    nearest = (lam[None] - wanted[:, None]).abs().argmin(1)
    return [len(alpha_bar) - 1, *nearest.tolist()]


SPACINGS = {
    "trailing": trailing_spacing,
    "leading": leading_spacing,
    "linear": linear_spacing,
    "quadratic": quadratic_spacing,
    "logsnr": logsnr_spacing,
}


def timestep_grid(spacing: str, alpha_bar: Tensor, n: int) -> list[int]:
    """The n timesteps that sampling visits, downwards, each once."""
    ts = SPACINGS[spacing](alpha_bar, n)
    # Neighbours may round to the same timestep: the later one moves down.
    for i in range(1, n):
        ts[i] = min(ts[i], ts[i - 1] - 1)

    # That may lead below 0: each step leaves room for those behind it.
    return [max(t, n - 1 - i) for i, t in enumerate(ts)]


def intervals(ts: list[int], alpha_bar: Tensor) -> Iterator[tuple[int, float, int, float]]:
    """The steps of a descending grid: (t, alpha_bar_t, t_next, its alpha_bar); the last leads to -1, the image."""
    for t, t_next in zip(ts, [*ts[1:], -1]):
        ab_next = alpha_bar[t_next].item() if t_next >= 0 else 1.0
        yield t, alpha_bar[t].item(), t_next, ab_next


# Samplers: (denoise, xT [N, C, H, W], descending grid ts, alpha_bar float64 [T], source of noise, their own options).


def ddim(denoise: Denoiser, xT: Tensor, ts: list[int], alpha_bar: Tensor, draw_noise: Callable[[], Tensor], *,
         eta: float = 0.0, variance: str = "small", noise_scale: float = 1.0,
         use_noise_scaling: bool = False) -> Steps:
    """DDIM (2010.02502, eq. 12). eta = 1 is ancestral DDPM: the posterior mean of its eq. 7, and its noise.

    variance: of that noise, the posterior's (small) or beta_t (large); noise_scale multiplies the noise,
    use_noise_scaling by t / T too.
    """
    x = xT
    for t, ab, _, ab_next in intervals(ts, alpha_bar):
        x0_hat, eps_hat = denoise(x, t)
        large = eta * math.sqrt(1 - ab / ab_next)                            # DDIM sec. 5, sigma hat
        sigma = large * math.sqrt((1 - ab_next) / (1 - ab))                  # DDIM eq. 16
        x = math.sqrt(ab_next) * x0_hat + math.sqrt(max(1 - ab_next - sigma**2, 0)) * eps_hat

        if sigma > 0:                                                        # the last step adds none
            deviation = large if variance == "large" else sigma
            fade = t / len(alpha_bar) if use_noise_scaling else 1
            x = x + noise_scale * fade * deviation * draw_noise()
        yield t, x, x0_hat


def dpmpp(denoise: Denoiser, xT: Tensor, ts: list[int], alpha_bar: Tensor,
          draw_noise: Callable[[], Tensor] | None = None) -> Steps:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): second order for one network call a step.

    DDIM steps with x0_hat extrapolated, in half the log-SNR, to the middle of the step. The first and the last step
    are DDIM's.
    """
    x = xT
    x0_before = None
    h_before = math.inf
    lam = half_log_snr(alpha_bar)
    for t, ab, t_next, ab_next in intervals(ts, alpha_bar):
        x0_hat, _ = denoise(x, t)

        x0 = x0_hat
        h = math.inf                                                         # from pure noise, or to the image
        if t_next >= 0 and ab > 0:
            h = (lam[t_next] - lam[t]).item()
            if x0_before is not None:
                x0 = x0_hat + h / (2 * h_before) * (x0_hat - x0_before)

        x = math.sqrt(ab_next) * x0 + math.sqrt((1 - ab_next) / (1 - ab)) * (x - math.sqrt(ab) * x0)
        x0_before = x0_hat
        h_before = h
        yield t, x, x0_hat


def heun(denoise: Denoiser, xT: Tensor, ts: list[int], alpha_bar: Tensor,
         draw_noise: Callable[[], Tensor] | None = None) -> Steps:
    """Heun's method in x / sqrt(alpha_bar) over sigma (EDM, 2206.00364, algorithm 1).

    A DDIM step, then again with the mean of the noise at both ends: two network calls a step. One alone at the last,
    and where sigma > 1000: so long a step leaves the range in which the mean of two slopes is any better.
    """
    x = xT
    for t, ab, t_next, ab_next in intervals(ts, alpha_bar):
        x0_hat, eps = denoise(x, t)
        x0 = x0_hat
        if t_next >= 0 and ab > 1e-6:
            ahead = math.sqrt(ab_next) * x0_hat + math.sqrt(1 - ab_next) * eps
            _, eps_ahead = denoise(ahead, t_next)
            eps = (eps + eps_ahead) / 2
            x0 = (x - math.sqrt(1 - ab) * eps) / math.sqrt(ab)
        x = math.sqrt(ab_next) * x0 + math.sqrt(1 - ab_next) * eps
        yield t, x, x0_hat


@dataclass(frozen=True)
class Sampler:
    """An entry of SAMPLERS. run: the function; steps: its own number of steps, None for every timestep.

    options: the settings it takes, by name; others that belong to samplers are refused with it. adds_noise: whether it
    does, given its options.
    """

    run: Callable[..., Steps]
    steps: int | None = None
    options: tuple[str, ...] = ()
    adds_noise: Callable[[dict], bool] = lambda options: False


# To add a sampler: write its function and name it here.
SAMPLERS = {
    "dpmpp": Sampler(dpmpp, steps=25),
    "heun": Sampler(heun, steps=25),
    "ddim": Sampler(ddim, steps=50, options=("eta", "variance", "noise_scale", "use_noise_scaling"),
                    adds_noise=lambda options: options["eta"] > 0),
    "ddpm": Sampler(partial(ddim, eta=1.0), options=("variance", "noise_scale", "use_noise_scaling"),
                    adds_noise=lambda options: True),
}


def make_denoiser(network: Callable, diffusion: Diffusion, y: Tensor | None, null_class: int,
                  guidance_scale: float = 0.0, interval: tuple[float, float] | None = None,
                  guide: Callable | None = None, **conversion) -> Denoiser:
    """The denoiser for labels y [N], guided where guidance_scale w > 0.

    Its output is (1 + w) strong - w weak. The weak one is the network's for the null class, from one call on a doubled
    batch (2207.12598, eq. 6), or that of a weaker network, the guide (2406.02507, eq. 3). interval: noise levels sigma
    between which guidance acts (2404.07724, eq. 6); conversion: options of Diffusion.estimates.
    """
    low, high = interval or (0, math.inf)
    sigma = ((1 - diffusion.alpha_bar) / diffusion.alpha_bar).sqrt().tolist()
    guided = guidance_scale > 0 and (guide is not None or y is not None)

    def strong_and_weak(seen: Tensor, ts: Tensor) -> tuple[Tensor, Tensor]:
        if guide is not None:
            return network(seen, ts, y).float(), guide(seen, ts, y).float()
        both = network(torch.cat([seen, seen]), torch.cat([ts, ts]), torch.cat([y, torch.full_like(y, null_class)]))
        return both.float().chunk(2)

    def denoise(xt: Tensor, t: int) -> tuple[Tensor, Tensor]:
        ts = torch.full((len(xt),), t, device=xt.device)
        seen = diffusion.network_input(xt, ts)
        if guided and low <= sigma[t] <= high:
            strong, weak = strong_and_weak(seen, ts)
            out = (1 + guidance_scale) * strong - guidance_scale * weak
        else:
            out = network(seen, ts, y).float()
        return diffusion.estimates(out, xt, ts, **conversion)

    return denoise


# Randomness: every number drawn is a function of a seed and of what it is for.

# Independent uses of a seed. The numbers are part of every seed, so they never change.
STREAM_BATCH = 1
STREAM_STEP = 2
STREAM_DROPOUT = 3
STREAM_SAMPLE = 4
STREAM_VALIDATION = 5


def derive_seed(*numbers: int) -> int:
    """One well-spread 63-bit seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def generator(*numbers: int, device="cpu") -> torch.Generator:
    """A random generator seeded by the numbers."""
    return torch.Generator(device).manual_seed(derive_seed(*numbers))


def image_noise(seed: int, indices: range, shape: tuple[int, ...], device,
                seeds: Sequence[int] = ()) -> Callable[[], Tensor]:
    """A source of noise [N, *shape]: image i has a generator by (seed, i), so that no batch or device changes it.

    seeds: one for each of all images, instead of `seed`: image i is the first one of its own seed.
    """
    keys = [(seeds[i], 0) if seeds else (seed, i) for i in indices]
    generators = [generator(seed, STREAM_SAMPLE, i) for seed, i in keys]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each pixel over the training images, for the start of sampling.

    float [num_classes + 1, C, h, w], a row per class and a last one over all; h x w may be coarser than the images.
    """

    mean: Tensor
    var: Tensor

    def sample_prior(self, noise: Tensor, y: Tensor, alpha_bar_T: float) -> Tensor:
        """x_T from the Gaussian with the first two moments of q(x_T), given noise [N, C, H, W] and rows y [N]."""
        size = noise.shape[2:]
        mean = F.interpolate(self.mean.to(noise.device)[y], size, mode="bilinear")
        var = F.interpolate(self.var.to(noise.device)[y], size, mode="bilinear")
        return math.sqrt(alpha_bar_T) * mean + (alpha_bar_T * var + 1 - alpha_bar_T).sqrt() * noise


def standard_moments(shape: tuple[int, int, int], num_classes: int) -> Moments:
    """Moments of images of which nothing is known: sampling starts from N(0, I)."""
    channels, height, width = shape
    size = (num_classes + 1, channels, min(height, 64), min(width, 64))
    return Moments(torch.zeros(size), torch.ones(size))


# ---- 6  Data -----------------------------------------------------------------------------------
# Every dataset becomes ImageData, uint8 [N, C, H, W] with labels; a batch is a function of (seed, step).


@dataclass(frozen=True)
class Download:
    """How torchvision has a dataset.

    name: its class there; files, place: what to put where below --data_dir, without a network; train, test: options of
    its parts, of which several are put together.
    """

    name: str
    files: str
    place: str
    train: tuple[dict, ...] = (dict(train=True),)
    test: tuple[dict, ...] = (dict(train=False),)


@dataclass(frozen=True)
class DatasetSpec:
    """An entry of DATASETS.

    load: (cfg, train) -> ImageData, the training or the test part; about: what they are, where one is asked to choose;
    shape: the images' own (C, H, W); num_images: in the training part (0: unknown); classes: their names; num_classes:
    how many there are where only the files name them; flip: whether a mirrored image is still a good one; has_test:
    whether there is a test part; like: the dataset whose preset and recipe it takes; download: for load_torchvision.
    """

    load: Callable[[Config, bool], ImageData]
    about: str
    shape: tuple[int, int, int]
    num_images: int = 0
    classes: tuple[str, ...] = ()
    num_classes: int = 0
    flip: bool = False
    has_test: bool = False
    like: str = ""
    download: Download | None = None

    @property
    def class_count(self) -> int:
        """How many classes there are; 0 where they are unknown, too."""
        return len(self.classes) or self.num_classes


def load_digits(cfg: Config, train: bool) -> ImageData:
    """The UCI digits that are shipped in data/digits.npz."""
    places = [Path(cfg.data_dir, "digits.npz"), Path(__file__).parent / "data" / "digits.npz"]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise UserError(f"digits.npz is neither in {cfg.data_dir} nor in data/ beside diffuser.py: copy it there")
    try:
        with np.load(path) as file:
            images = torch.from_numpy(file["images"])[:, None]
            labels = file["labels"].tolist()
    except Exception as error:                                   # numpy raises many kinds here
        raise UserError(f"{path} is damaged ({first_line(error)}): copy it there anew") from error
    return in_shape(cfg, images, labels)


def load_celeba(cfg: Config, train: bool) -> ImageData:
    """CelebA, 162,770 faces for training (Liu et al. 2015), without labels."""
    files = "img_align_celeba.zip (unpacked) and the five list_*.txt and identity_CelebA.txt files of CelebA"
    raw = torchvision_dataset("CelebA", cfg, files, "celeba", split="train")
    return cached(cfg, raw, image_shape(cfg), ("celeba", len(raw)), [])


def load_torchvision(cfg: Config, train: bool) -> ImageData:
    """A dataset that torchvision has, as its entry says. Small images come as arrays, larger ones through the cache."""
    spec = DATASETS[cfg.dataset]
    parts = download_parts(cfg, train)
    names = list(spec.classes) or names_of_classes(parts[0], spec.num_classes)
    if not hasattr(parts[0], "data"):
        key = (cfg.dataset, *map(len, parts), "train" if train else "test")
        return cached(cfg, ConcatDataset(parts), image_shape(cfg), key, names)

    images = []
    labels = []
    for part in parts:
        images.append(channels_first(torch.as_tensor(part.data)))
        numbers = torch.as_tensor(part.targets if hasattr(part, "targets") else part.labels)
        if numbers.ndim == 2:                                    # QMNIST: the class, then where the digit is from
            numbers = numbers[:, 0]
        labels += numbers.tolist()
    return in_shape(cfg, torch.cat(images), labels, train, names)


def load_emnist(cfg: Config, train: bool) -> ImageData:
    """EMNIST's letters (Cohen et al. 2017): stored on their side, and counted from 1."""
    raw = download_parts(cfg, train)[0]
    images = raw.data.transpose(1, 2).contiguous()
    return in_shape(cfg, channels_first(images), (raw.targets - 1).tolist(), train)


def download_parts(cfg: Config, train: bool) -> list:
    """The training or test part of a dataset of torchvision, perhaps as several. Raises UserError."""
    source = DATASETS[cfg.dataset].download
    parts = source.train if train else source.test
    return [torchvision_dataset(source.name, cfg, source.files, source.place, **options) for options in parts]


def channels_first(images: Tensor) -> Tensor:
    """[N, H, W], [N, H, W, 3] or [N, 3, H, W] as uint8 [N, C, H, W]."""
    if images.ndim == 3:
        return images[:, None]
    if images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous()


def names_of_classes(raw, count: int) -> list[str]:
    """The classes as torchvision calls them, each by the first of its names; by number where it has none."""
    names = getattr(raw, "classes", None) or range(count)
    return [name[0] if isinstance(name, tuple) else str(name) for name in names]


def load_folder(cfg: Config, train: bool) -> ImageData:
    """Images of one's own, of any kind that open_images knows; most often the folder that holds them is the class.

    train: those to train on, else those that has_test_part told of.
    """
    source = open_images(cfg.path_to_data, "--path_to_data", cfg.label_column)
    if not train:
        source = source.test_part()
    return cached(cfg, source, image_shape(cfg, source), ("folder", *source.fingerprint()), source.class_names)


def has_test_part(cfg: Config) -> bool:
    """Whether images of one's own come with others to test with."""
    return open_images(cfg.path_to_data, "--path_to_data", cfg.label_column).test_part() is not None


def in_shape(cfg: Config, images: Tensor, labels: list[int], train: bool = True,
             class_names: Sequence[str] = ()) -> ImageData:
    """The images, uint8 [N, C, H, W], as they are or, where another size is asked for, resized.

    class_names: those of the dataset's entry by default.
    """
    names = list(class_names or DATASETS[cfg.dataset].classes)
    shape = image_shape(cfg)
    if tuple(images.shape[1:]) == shape:
        return ImageData(images, torch.tensor(labels), names)
    pictures = [(to_pil(image), label) for image, label in zip(images, labels)]
    key = (cfg.dataset, len(labels)) if train else (cfg.dataset, len(labels), "test")
    return cached(cfg, pictures, shape, key, names)


def cached(cfg: Config, source, shape: tuple[int, int, int], key: tuple, class_names: list[str]) -> ImageData:
    """The images of `source`, (PIL image, label) each, from a cache below --data_dir. Raises UserError."""
    folder = Path(cfg.data_dir, "cache")
    try:
        return cached_images(source, shape, class_names, folder=folder, name=cfg.dataset, key=key,
                             workers=cfg.num_workers)
    except OSError as error:
        raise cannot_write(folder, "--data_dir", error) from error


def torchvision_dataset(name: str, cfg: Config, files: str, place: str, **options):
    """torchvision's dataset of that name, downloaded if it is not there.

    files, place: what to put where by hand. Raises UserError if it cannot be had.
    """
    import torchvision
    from filelock import FileLock  # torch depends on it

    root = Path(cfg.data_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        dataset = partial(getattr(torchvision.datasets, name), root, **options)
        lock = root / f".{name}.lock"
        if not lock.exists():                                    # where it is, another run, or machine, may be at it
            with suppress(RuntimeError, FileNotFoundError):      # not there, or not whole
                return dataset(download=False)
        try:
            with FileLock(lock):
                return dataset(download=True)
        except PermissionError:                                  # others keep it, for all to read
            return dataset(download=False)
    except ModuleNotFoundError as error:                         # scipy, for some
        raise UserError(f"{name} takes {error.name}: pip install {error.name}", code=1) from error
    except Exception as error:                                   # torchvision raises many kinds here
        raise UserError(f"{name} is not whole in {root} and could not be downloaded ({first_line(error)}).\n"
                        f"Put {files} into {root / place} by hand, or give --data_dir.") from error


DIGITS = tuple("0123456789")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

CLOTHES = ("T-shirt or top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
KUZUSHIJI = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

# The German traffic signs in the order of their numbers, which is all that the files have.
SIGNS = (
    "20 km/h", "30 km/h", "50 km/h", "60 km/h", "70 km/h", "80 km/h", "end of 80 km/h", "100 km/h", "120 km/h",
    "no overtaking", "no overtaking by lorries", "right of way at the crossing", "priority road", "give way", "stop",
    "no vehicles", "no lorries", "no entry", "danger", "curve to the left", "curve to the right", "double curve",
    "bumpy road", "slippery road", "road narrows on the right", "road works", "traffic lights", "pedestrians",
    "children", "bicycles", "ice or snow", "wild animals", "end of all limits", "turn right ahead", "turn left ahead",
    "ahead only", "straight or right", "straight or left", "keep right", "keep left", "roundabout",
    "end of no overtaking", "end of no overtaking by lorries")

CIFAR10_IMAGES = DatasetSpec(
    load_torchvision, "photographs of ten kinds of things", (3, 32, 32), 50_000, CIFAR10, flip=True, has_test=True,
    download=Download("CIFAR10", "cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz", ""))

# How torchvision names the parts of a dataset.
TRAIN = (dict(split="train"),)
TRAIN_AND_VAL = (dict(split="train"), dict(split="val"))
TRAINVAL = (dict(split="trainval"),)
TEST = (dict(split="test"),)

# To add a dataset: write a load function and name it here; PRESETS may give it settings of its own. What torchvision
# has takes load_torchvision, and its settings from the dataset that it is like.
DATASETS = {
    "digits": DatasetSpec(load_digits, "small handwritten digits, part of the program", (1, 8, 8), 1797, DIGITS),
    "mnist": DatasetSpec(
        load_torchvision, "handwritten digits", (1, 28, 28), 60_000, DIGITS, has_test=True,
        download=Download("MNIST", "the four *-ubyte.gz files of MNIST", "MNIST/raw")),
    "cifar10": CIFAR10_IMAGES,
    "cifar10_optimized": dataclasses.replace(CIFAR10_IMAGES, about="the same, with a smaller network"),
    "celeba": DatasetSpec(load_celeba, "faces", (3, 64, 64), 162_770, flip=True),
    "folder": DatasetSpec(load_folder, "pictures of your own, a folder or file", (3, 64, 64), flip=True),

    # Small grey images.
    "fashion_mnist": DatasetSpec(
        load_torchvision, "clothes", (1, 28, 28), 60_000, CLOTHES, flip=True, has_test=True, like="mnist",
        download=Download("FashionMNIST", "the four *-ubyte.gz files of Fashion-MNIST", "FashionMNIST/raw")),
    "kmnist": DatasetSpec(
        load_torchvision, "handwritten Japanese", (1, 28, 28), 60_000, KUZUSHIJI, has_test=True, like="mnist",
        download=Download("KMNIST", "the four *-ubyte.gz files of Kuzushiji-MNIST", "KMNIST/raw")),
    "emnist": DatasetSpec(
        load_emnist, "handwritten letters", (1, 28, 28), 124_800, tuple(string.ascii_lowercase), has_test=True,
        like="mnist", download=Download(
            "EMNIST", "the four unpacked emnist-letters-*-ubyte files of EMNIST's gzip.zip", "EMNIST/raw",
            train=(dict(split="letters", train=True),), test=(dict(split="letters", train=False),))),
    "qmnist": DatasetSpec(
        load_torchvision, "MNIST with all 60,000 test digits", (1, 28, 28), 60_000, DIGITS, has_test=True,
        like="mnist", download=Download("QMNIST", "the four qmnist-*.gz files of QMNIST", "QMNIST/raw")),
    "usps": DatasetSpec(
        load_torchvision, "digits from envelopes", (1, 16, 16), 7291, DIGITS, has_test=True, like="mnist",
        download=Download("USPS", "usps.bz2 and usps.t.bz2 from LIBSVM's data sets", "")),
    "semeion": DatasetSpec(
        load_torchvision, "digits of eighty people", (1, 16, 16), 1593, DIGITS, like="mnist",
        download=Download("SEMEION", "semeion.data from the UCI repository", "", train=({},), test=())),

    # Small colour images.
    "cifar100": DatasetSpec(
        load_torchvision, "photographs of a hundred kinds of things", (3, 32, 32), 50_000, num_classes=100, flip=True,
        has_test=True, like="cifar10",
        download=Download("CIFAR100", "cifar-100-python.tar.gz from www.cs.toronto.edu/~kriz", "")),
    "svhn": DatasetSpec(
        load_torchvision, "house numbers", (3, 32, 32), 73_257, DIGITS, has_test=True, like="cifar10",
        download=Download("SVHN", "train_32x32.mat and test_32x32.mat of SVHN", "", TRAIN, TEST)),

    # Pictures, in a size that suits the time.
    "stl10": DatasetSpec(
        load_torchvision, "photographs of ten kinds of things", (3, 96, 96), 5000, STL10, flip=True, has_test=True,
        like="folder", download=Download("STL10", "stl10_binary.tar.gz of STL-10", "", TRAIN, TEST)),
    "flowers102": DatasetSpec(
        load_torchvision, "flowers", (3, 64, 64), 8189, num_classes=102, flip=True, like="folder", download=Download(
            "Flowers102", "jpg/, imagelabels.mat and setid.mat of Oxford's 102 flowers", "flowers-102",
            TRAIN_AND_VAL + TEST, ())),
    "food101": DatasetSpec(
        load_torchvision, "dishes", (3, 64, 64), 75_750, num_classes=101, flip=True, has_test=True, like="folder",
        download=Download("Food101", "the unpacked food-101.tar.gz", "food-101", TRAIN, TEST)),
    "pets": DatasetSpec(
        load_torchvision, "cats and dogs of 37 breeds", (3, 64, 64), 3680, num_classes=37, flip=True, has_test=True,
        like="folder", download=Download(
            "OxfordIIITPet", "the unpacked images.tar.gz and annotations.tar.gz of Oxford's pets", "oxford-iiit-pet",
            TRAINVAL, TEST)),
    "gtsrb": DatasetSpec(
        load_torchvision, "German traffic signs", (3, 64, 64), 26_640, SIGNS, has_test=True, like="folder",
        download=Download("GTSRB", "GTSRB/ and GT-final_test.csv, unpacked, of the German traffic signs", "gtsrb",
                          TRAIN, TEST)),
    "eurosat": DatasetSpec(
        load_torchvision, "satellite images", (3, 64, 64), 27_000, num_classes=10, flip=True, like="folder",
        download=Download("EuroSAT", "the unpacked EuroSAT.zip, a folder 2750", "eurosat", ({},), ())),
    "fgvc_aircraft": DatasetSpec(
        load_torchvision, "aircraft of a hundred kinds", (3, 64, 64), 6667, num_classes=100, flip=True, has_test=True,
        like="folder", download=Download("FGVCAircraft", "the unpacked fgvc-aircraft-2013b.tar.gz",
                                         "fgvc-aircraft-2013b", TRAINVAL, TEST)),
    "dtd": DatasetSpec(
        load_torchvision, "textures", (3, 64, 64), 3760, num_classes=47, flip=True, has_test=True, like="folder",
        download=Download("DTD", "the unpacked dtd-r1.0.1.tar.gz", "dtd/dtd", TRAIN_AND_VAL, TEST)),
    "imagenette": DatasetSpec(
        load_torchvision, "ten kinds of ImageNet", (3, 64, 64), 9469, num_classes=10, flip=True, has_test=True,
        like="folder", download=Download(
            "Imagenette", "the unpacked imagenette2-160.tgz", "imagenette2-160",
            (dict(split="train", size="160px"),), (dict(split="val", size="160px"),))),
}

# The first of them, which the questions and the short --help show by themselves.
USUAL_DATASETS = 6


def image_shape(cfg: Config, source: ImageSource | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the training images: as asked for, else the dataset's own; `source` tells its own channels."""
    channels, height, width = DATASETS[cfg.dataset].shape
    if cfg.channels:
        channels = cfg.channels
    elif source is not None:
        channels = source.guess_channels()
    if cfg.img_size:
        height, width = cfg.img_size
    return channels, height, width


def load_data(cfg: Config, train: bool = True) -> ImageData:
    """The training or test images as configured. Raises UserError where they are missing or do not fit."""
    load = DATASETS[cfg.dataset].load
    if not cfg.random_crop:
        return select_labels(cfg, load(cfg, train))

    _, height, width = image_shape(cfg)
    larger = (height + math.ceil(height / 8), width + math.ceil(width / 8))
    data = load(dataclasses.replace(cfg, img_size=larger), train)
    return select_labels(cfg, crop_to_middle(data, height, width))


def real_images(cfg: Config, data: ImageData) -> Reference:
    """The images of the dataset that drawn ones are judged by: its training and test part, or one divided in two."""
    spec = DATASETS[cfg.dataset]
    if spec.has_test and tuple(data.images.shape[1:]) == spec.shape:
        return Reference(cfg.dataset, data, load_data(cfg, train=False), own_test=True)
    name = Path(cfg.path_to_data).stem or cfg.dataset
    if cfg.dataset == "folder" and has_test_part(cfg):
        channels, *size = data.images.shape[1:]
        alike = dataclasses.replace(cfg, channels=channels, img_size=tuple(size))
        return Reference(name, data, load_data(alike, train=False), own_test=True)
    return Reference(name, *divide(data))


def settle_dataset(cfg: Config, data: ImageData | None = None) -> Config:
    """The settings with a dataset; images of one's own, `data`, have the folder's. Raises UserError for wrong ones."""
    if data is None:
        if not cfg.dataset:
            raise UserError(f"--dataset is missing: one of {', '.join(DATASETS)}")
        return cfg

    images = data.images
    labels = data.labels
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise UserError(f"images have to be uint8 [N, C, H, W], C 1 or 3, not {images.dtype} {list(images.shape)}; "
                        "to_uint8 makes them of float ones in [-1, 1]")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise UserError(f"labels have to be int64 [{len(images)}], one for each image, not {labels.dtype} "
                        f"{list(labels.shape)}")
    if labels.min() < 0 or labels.max() >= max(1, len(data.class_names)):
        raise UserError(f"labels lie between {labels.min()} and {labels.max()}, but there are {len(data.class_names)} "
                        "class_names")
    if cfg.random_crop and data.uncropped is None:
        raise UserError("--random_crop needs larger images: ImageData with them as uncropped, see crop_to_middle")
    channels, height, width = images.shape[1:]
    check_image_size(height, width, len(cfg.channel_mults), cfg.patch_size)
    return dataclasses.replace(cfg, dataset=cfg.dataset or "folder", channels=channels, img_size=(height, width))


def crop_to_middle(data: ImageData, height: int, width: int) -> ImageData:
    """The middle of all images, height x width; the whole ones stay beside it, for crops at other places."""
    top = (data.images.shape[2] - height) // 2
    left = (data.images.shape[3] - width) // 2
    middle = data.images[:, :, top : top + height, left : left + width]
    return dataclasses.replace(data, images=middle, uncropped=data.images)


def select_labels(cfg: Config, data: ImageData) -> ImageData:
    """The images with or without labels, as asked for. Raises UserError where there are none."""
    if len(data.class_names) > MAX_CLASSES:
        raise UserError(f"there are {len(data.class_names):,} classes, {MAX_CLASSES:,} at most: put images into fewer "
                        "folders")
    if cfg.use_labels and not data.class_names:
        raise UserError(f"--use_labels: dataset {cfg.dataset} has no classes (subfolders make them, or --label_column)")
    if cfg.use_labels is False:
        return dataclasses.replace(data, labels=torch.zeros_like(data.labels), class_names=[])
    long = [name for name in data.class_names if len(name) > MAX_CLASS_NAME]
    if long:
        raise UserError(f"the class {long[0][:60]}... has a name of {len(long[0]):,} characters, {MAX_CLASS_NAME:,} at "
                        "most: name another --label_column, or use --no-use_labels")
    return data


def count_val_images(images: int, fraction: float) -> int:
    """How many of so many images are held out for the validation loss."""
    return min(int(images * fraction), 1000)


def split(data: ImageData, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the held-out images, the same for every seed."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    count = count_val_images(len(order), fraction)
    return order[count:].sort().values, order[:count].sort().values


def image_moments(data: ImageData, indices: Tensor, flip: bool, limit: int = 20_000, room: int = 2**20) -> Moments:
    """Moments over at most `limit` images, pooled to at most 64 x 64 pixels.

    Fewer pixels where many classes would not fit into `room` numbers. A class of fewer than ten images has those of
    all.
    """
    indices = indices[:: math.ceil(len(indices) / limit)]
    num_classes = len(data.class_names)
    channels, height, width = data.images.shape[1:]
    side = max(1, min(64, math.isqrt(room // (channels * (num_classes + 1)))))
    size = (min(height, side), min(width, side))

    # Sums of x and of x squared, by class.
    sums = torch.zeros(2, max(num_classes, 1), channels, *size, dtype=torch.float64)
    for chunk in indices.split(max(1, min(1000, 2**20 // math.prod(data.images.shape[1:])))):
        x = from_uint8(data.images[chunk])
        powers = [F.adaptive_avg_pool2d(power, size).double() for power in (x, x**2)]
        sums.index_add_(1, data.labels[chunk], torch.stack(powers))
    counts = torch.bincount(data.labels[indices], minlength=max(num_classes, 1)).double()

    # A last row over all of them, which stands in for classes of a few images.
    if num_classes:
        sums = torch.cat([sums, sums.sum(1, keepdim=True)], 1)
        counts = torch.cat([counts, counts.sum(0, keepdim=True)], 0)
    few = counts < 10
    sums[:, few] = sums[:, -1:].clone()
    counts[few] = counts[-1].item()

    if flip:
        sums = (sums + sums.flip(-1)) / 2
    mean, square = sums / counts.view(-1, 1, 1, 1)
    return Moments(mean.float(), (square - mean**2).clamp(min=0).float())


class Batches:
    """Training batches, step -> (x0 [n, C, H, W] in [-1, 1], y [n]).

    An epoch is a permutation by (seed, epoch). A batch is the same for any number of processes, of which each, `rank`
    of `world`, takes its slice. Where the images have a margin, each is cropped at a place by (seed, step).
    """

    def __init__(self, data: ImageData, indices: Tensor, size: int, flip: bool, seed: int, device, rank: int = 0,
                 world: int = 1):
        self.indices = indices
        self.size = size
        self.flip = flip
        self.seed = seed
        self.device = torch.device(device)
        self.rank_slice = slice(rank * size // world, (rank + 1) * size // world)
        self.steps_per_epoch = max(1, len(indices) // size)
        self.epoch = -1
        self.order = indices

        self.shape = data.images.shape[1:]
        self.crops = data.uncropped is not None
        self.images = data.uncropped if self.crops else data.images
        self.labels = data.labels
        if self.device.type == "cuda" and self.images.nbytes < free_memory(self.device) // 4:
            self.images = self.images.to(device)
            self.labels = self.labels.to(device)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, i = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.shuffle(epoch)
        chosen = self.order[i * self.size : (i + 1) * self.size][self.rank_slice]
        if self.images.is_cuda:
            chosen = self.to_device(chosen)

        pixels = self.to_device(self.images[chosen])
        if self.crops:
            pixels = self.crop(pixels, step)
        x0 = from_uint8(pixels)
        if self.flip:
            chance = torch.rand(self.size, generator=generator(self.seed, STREAM_BATCH, step, 1))[self.rank_slice]
            mirrored = self.to_device(chance < 0.5).view(-1, 1, 1, 1)
            x0 = torch.where(mirrored, x0.flip(-1), x0)
        return x0, self.to_device(self.labels[chosen])

    def crop(self, pixels: Tensor, step: int) -> Tensor:
        """A crop of each image, [n, C, H + margin, W + margin] -> [n, C, H, W]."""
        _, height, width = self.shape
        random = generator(self.seed, STREAM_BATCH, step, 2)

        def places(size: int, cropped: int) -> Tensor:           # [n, cropped]: rows or columns
            start = torch.randint(size - cropped + 1, (self.size, 1), generator=random)
            return self.to_device(start[self.rank_slice] + torch.arange(cropped))

        rows = places(pixels.shape[2], height)
        columns = places(pixels.shape[3], width)
        images = torch.arange(len(pixels), device=pixels.device)
        crops = pixels[images[:, None, None], :, rows[:, :, None], columns[:, None, :]]       # [n, H, W, C]
        return crops.permute(0, 3, 1, 2)

    def shuffle(self, epoch: int) -> None:
        """Settle the order of an epoch; a set smaller than a batch repeats."""
        order = torch.randperm(len(self.indices), generator=generator(self.seed, STREAM_BATCH, epoch))
        repeats = math.ceil(self.size / len(order))
        self.order = self.indices[order].repeat(repeats)
        self.epoch = epoch

    def to_device(self, v: Tensor) -> Tensor:
        """v on the device; to CUDA by way of pinned memory, so that nobody waits for it."""
        if v.device == self.device:
            return v
        if self.device.type == "cuda":
            return v.pin_memory().to(self.device, non_blocking=True)
        return v.to(self.device)


# ---- 7  Devices --------------------------------------------------------------------------------
# Where and how a network computes: device, precision and layout, memory, several devices.

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def is_here(kind: str) -> bool:
    """Whether this machine has such a device."""
    if kind == "cuda":
        return torch.cuda.is_available()
    if kind == "mps":
        return torch.backends.mps.is_available()
    return True


def best_device() -> str:
    """The kind that auto means here: cuda, then mps, then cpu."""
    return next(filter(is_here, ("cuda", "mps", "cpu")))


def pick_device(wanted: str) -> torch.device:
    """The device asked for, auto: the best one. Raises UserError where it is not there."""
    if wanted == "auto":
        wanted = best_device()
    if not is_here(wanted):
        raise UserError(f"--device {wanted}: torch {torch.__version__} finds none here")
    if wanted != "cuda":
        return torch.device(wanted)

    count = torch.cuda.device_count()
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_world > count:
        raise UserError(f"{local_world} processes on this machine, which has {count} GPUs: lower torchrun's "
                        "--nproc_per_node")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def meet(device: torch.device) -> Processes:
    """The processes of the run, which exchange numbers on their devices."""
    return Processes(device, "nccl" if device.type == "cuda" else "gloo")


class Devices:
    """What a run computes on. device: this process's own; replicas: GPUs of DataParallel; processes: of torchrun."""

    def __init__(self, cfg: Config):
        """Pick and set up the device, and join the other processes. Raises UserError."""
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")          # read when CUDA is first used
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False          # nothing reads any

        self.device = pick_device(cfg.device)
        cuda = self.device.type == "cuda"
        gpus = torch.cuda.device_count() if cuda else 0
        if cfg.num_gpus > max(gpus, 1):
            raise UserError(f"--num_gpus {cfg.num_gpus}: this machine has {gpus}")

        self.processes = meet(self.device)
        self.replicas = 1
        if self.processes.world == 1:
            self.replicas = cfg.num_gpus or max(gpus, 1)
        self.count = self.processes.world * self.replicas

        if cuda:
            torch.set_float32_matmul_precision("high")                       # TF32 for what stays float32
        else:
            cpu_kernels.keep_freed_memory()
        if cfg.compile and self.replicas > 1:
            raise UserError("--compile does not go with DataParallel: use torchrun, or --num_gpus 1")
        if cfg.precision == "fp16" and not cuda:
            raise UserError("--precision fp16 needs a CUDA device: use bf16 or fp32 here")

    def parallel(self, network: nn.Module, compute: ComputeConfig, inputs: tuple = ()) -> Callable:
        """The network as training calls it: compiled, as CUDA graphs, and spread over devices.

        inputs: what it will be called with, where graphs are wanted. Its parameters stay its own.
        """
        forward = network
        if compute.compiled:
            forward = compile_network(network, graphs=bool(inputs))
        elif inputs:
            forward = as_graphs(InContext(network, compute.autocast), inputs)
        if self.processes.world > 1:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(forward, device_ids=device_ids)
        return self.replicate(forward, compute)

    def replicate(self, network: nn.Module, compute: ComputeConfig) -> nn.Module:
        """The network spread over all GPUs of this process: each computes a part of the batch."""
        if self.replicas == 1:
            return network
        return nn.DataParallel(InContext(network, compute.autocast), list(range(self.replicas)))

    def __str__(self) -> str:
        """For people."""
        name = f"{torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        return f"{self.device.type} x {self.count} ({name})"

    def machine_info(self, compute: ComputeConfig) -> dict[str, str]:
        """The machine and the way it computes, for people."""
        processor = platform.processor() or platform.machine()
        with suppress(OSError, StopIteration):                               # Linux has the name there alone
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        return dict(device=str(self), arithmetic=str(compute), processor=processor, cores=str(os.cpu_count()),
                    system=platform.platform(), python=platform.python_version())


class InContext(nn.Module):
    """A network that enters a context at each call: DataParallel's threads do not inherit the precision of autocast."""

    def __init__(self, network: nn.Module, context: Callable):
        super().__init__()
        self.network = network
        self.context = context

    def forward(self, *inputs: Tensor) -> Tensor:
        with self.context():
            return self.network(*inputs)


# Precision, layout, compilation.


@dataclass(frozen=True)
class ComputeConfig:
    """How a network is run. Chosen once and kept in checkpoints, so that a run goes on as it began.

    device: its type; split: parts that a step's batch is computed in because it does not fit into memory at once.
    """

    device: str = "cpu"
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    split: int = 1

    def autocast(self) -> torch.autocast:
        """The context of each call of the network."""
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()                       # the last call's output is done with
        return torch.autocast(self.device, PRECISIONS[self.precision], enabled=self.precision != "fp32")

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        layout = "channels last" if self.channels_last else "channels first"
        return f"{self.precision}, {layout}, {'compiled' if self.compiled else 'not compiled'}"


def pick_precision(cfg: Config, device: torch.device) -> str:
    """As asked for, else what the hardware is built for. A rule, so that the same command computes the same.

    Measured on CPUs (benchmarks/README.md): with AMX or AVX512_BF16, bf16 is faster from 32 channels on; without, and
    for narrower networks, float32 is.
    """
    if cfg.precision != "auto":
        return cfg.precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if device.type == "cpu" and cfg.base_channels >= 32:
        for unit in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            if getattr(torch.cpu, unit, lambda: False)():
                return "bf16"
    return "fp32"


def choose_compute(cfg: Config, device: torch.device, calls: int = 0, stored: dict | None = None) -> ComputeConfig:
    """As asked for; else as stored by a checkpoint from such a device; else what is fast here.

    calls: of the network, in all; stored: a ComputeConfig as a dictionary.
    """
    kept = stored if stored and stored["device"] == device.type else {}

    precision = cfg.precision
    if precision == "auto":
        precision = kept.get("precision") or pick_precision(cfg, device)

    channels_last = cfg.channels_last
    if channels_last is None:
        channels_last = kept.get("channels_last", device.type != "mps")

    compiled = cfg.compile
    if compiled is None:                                         # on a CPU it gains nothing: benchmarks/
        data_parallel = world_size() == 1 and (cfg.num_gpus or torch.cuda.device_count()) > 1
        long = calls >= 20_000 and not 0 < cfg.train_minutes < 8             # compiling takes a minute and a half
        worth_it = kept.get("compiled", device.type == "cuda" and long)
        compiled = worth_it and not data_parallel

    return ComputeConfig(device.type, precision, channels_last, compiled, kept.get("split", 1))


def compile_network(network: nn.Module, graphs: bool) -> nn.Module:
    """torch.compile, with CUDA graphs where `graphs`; where it fails the network is run as it is."""
    torch._dynamo.config.suppress_errors = True                              # it prints what went wrong
    return torch.compile(network, mode="reduce-overhead" if graphs else None)


def as_graphs(function: Callable, inputs: tuple[Tensor, ...]) -> Callable:
    """A network or a function of tensors as CUDA graphs, forward and backward, for inputs of these shapes.

    A step of small images has two thousand kernels of a few microseconds each, and launching them one by one takes
    longer than running them. Where no graph can be made, for lack of memory say, they are launched one by one.
    """
    # Graphs are captured on a stream of their own on purpose; its gradients are waited for.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
    try:
        return torch.cuda.make_graphed_callables(function, inputs, allow_unused_input=True)
    except RuntimeError as error:                                # also torch.OutOfMemoryError
        warn(f"no CUDA graphs, which make small steps faster: {first_line(error)}")
        return function


def uncompiled(network: nn.Module) -> nn.Module:
    """The network itself, within a compiled one."""
    return getattr(network, "_orig_mod", network)


def use_cpu_kernels(network: nn.Module, compute: ComputeConfig) -> None:
    """Swap in the faster twins of modules where they are for this way of computing."""
    if compute.device == "cpu" and compute.precision == "bf16":
        cpu_kernels.install(network)


# Threads of a CPU.

ALL_THREADS = torch.get_num_threads()                            # one per core, or OMP_NUM_THREADS
SMALL_STEP = 8e9                                                 # operations


def use_threads(cfg: Config, shape: tuple[int, int, int], num_classes: int) -> None:
    """Let torch use all threads, or one for networks so small that threads mostly wait for each other.

    Two threads make digits' steps (2.6e9 operations) a quarter faster on two idle cores and three times slower where
    anything else uses one of them. A rule, so that the same command computes the same.
    """
    operations = network_size(cfg, shape, num_classes).operations
    step = 3 * cfg.batch_size * operations                       # the backward pass is twice the forward
    torch.set_num_threads(1 if step < SMALL_STEP else ALL_THREADS)


class CoreWatch:
    """Notices, once in a run, that other programs hold the cores which its threads are meant for.

    Threads that compute one thing together wait for the slowest: with one of two cores taken, a step takes three times
    as long, not twice. The processor time that a process gets shows it.
    """

    ENOUGH = 0.8                                                 # of the time of all threads
    SECONDS = 10.0                                               # to look at, at least

    def __init__(self, threads: int):
        self.threads = threads
        self.told = threads == 1                                 # nobody to wait for
        self.wall_time = 0.0                                     # of the steps since the last look
        self.cpu_time = 0.0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Count the time of a step. That of saving and drawing does not count: it keeps few threads busy."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall_time += time.perf_counter() - wall
        self.cpu_time += time.process_time() - cpu

    def look(self) -> str:
        """What to say of the steps since the last look; empty where all is well, or has been said."""
        if self.told or self.wall_time < self.SECONDS:
            return ""
        share = self.cpu_time / self.wall_time / self.threads
        self.wall_time = self.cpu_time = 0.0
        if share > self.ENOUGH:
            return ""
        self.told = True
        fewer = max(1, min(self.threads - 1, int(share * self.threads)))
        return (f"cores    other programs hold them: the {self.threads} threads of this run get {share:.0%} of their "
                f"time and wait for each other.\n         Fewer are faster then: stop it and go on with "
                f"OMP_NUM_THREADS={fewer} before the same command")


# Memory.


def count_parameters(network: nn.Module) -> int:
    """How many numbers it has to learn."""
    return sum(p.numel() for p in network.parameters())


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


@dataclass(frozen=True)
class NetworkSize:
    """parameters: how many; values: what the layers put out for one image, about half of what training keeps;
    operations: additions and multiplications for one image."""

    parameters: int
    values: int
    operations: int


def network_size(cfg: Config, shape: tuple[int, int, int], num_classes: int) -> NetworkSize:
    """The size of the configured network. Nothing is computed, and no memory taken."""
    options = network_options(cfg) | {"gradient_checkpointing": False}
    return count_layers(tuple(sorted(options.items())), shape, num_classes)


@lru_cache
def count_layers(options: tuple[tuple[str, object], ...], shape: tuple[int, int, int], num_classes: int) -> NetworkSize:
    """The size of a UNet with these options, each (name, value)."""
    # Importing it takes a third of a second, which --help need not wait.
    from torch.utils.flop_counter import FlopCounterMode

    outputs = []

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if isinstance(module, DotProduct):                       # weights and their softmax, see cpu_kernels
            heads, tokens, _ = output[0].shape
            outputs.append(heads * min(tokens, 256) ** 2)
        elif not isinstance(module, Concat):
            outputs.append(output[0].numel())

    with torch.device("meta"):
        network = UNet(shape[0], num_classes, **dict(options))
        for module in network.modules():
            if not list(module.children()):
                module.register_forward_hook(count)
        with FlopCounterMode(display=False) as counter:
            # Two images: of one, a norm may not like a 1x1 map.
            network(torch.zeros(2, *shape), torch.zeros(2, dtype=torch.long))
    return NetworkSize(count_parameters(network), sum(outputs), counter.get_total_flops() // 2)


def training_memory(cfg: Config, shape: tuple[int, int, int], num_classes: int, batch: int,
                    precision: str) -> tuple[int, int]:
    """Bytes that training takes: fixed, and for the activations of one micro-batch of `batch` images.

    Fixed are weights, gradients, Adam's two moments, the average, and a step's images and noise.
    """
    network = network_size(cfg, shape, num_classes)
    inputs = 3 * batch * cfg.gradient_accumulation_steps * math.prod(shape)
    fixed = 4 * network.parameters * (4 + cfg.use_ema) + 4 * inputs

    activations = 2 * batch * network.values * (4 if precision == "fp32" else 2)
    if cfg.gradient_checkpointing:
        activations //= 3
    return fixed, activations


def plan_memory(cfg: Config, shape: tuple[int, int, int], num_classes: int, batch: int, precision: str,
                device: torch.device) -> tuple[int, str]:
    """Parts in which a micro-batch of `batch` images fits into the memory that is free, and what to say of it.

    By estimate. Raises UserError where not even weights and images fit.
    """
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if device.type == "cpu" else 1
    free = 0.9 * free_memory(device) / sharing
    fixed, moving = training_memory(cfg, shape, num_classes, batch, precision)
    need = f"{(fixed + moving) / 2**30:.2g} GiB, {free / 2**30:.2g} GiB are free"
    if fixed > free:
        raise UserError(f"training would take about {need}: lower --base_channels, --channel_mults, --img_size or "
                        "--batch_size")

    parts = max(1, math.ceil(moving / (free - fixed + 1)))
    if parts == 1:
        return 1, ""
    if parts <= batch:
        return parts, f"a step is computed in {parts} parts: at once it would take about {need}"
    return batch, (f"even one image at a time takes more memory than is free (a step about {need}): the machine will "
                   "swap or run out; lower --base_channels or --img_size, or use --gradient_checkpointing")


# ---- 8  Model ----------------------------------------------------------------------------------
# The averaged network that images are drawn from, and all that drawing them needs.


class EMA:
    """An exponential moving average of the weights in a network of its own; `network` is that one.

    After n updates the decay is min(decay, (1 + n) / (10 + n)); up to step `start` it is a plain copy. every: steps
    between updates.
    """

    def __init__(self, network: nn.Module, decay: float, every: int = 1, start: int = 0):
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        self.every = every
        self.start = start

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (1, 2, ...)."""
        if step % self.every:
            return
        n = max(0, step - self.start) // self.every              # updates so far
        decay = min(self.decay, (1 + n) / (10 + n))
        if step <= self.start:
            decay = 0.0                                          # a copy
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        average(list(self.network.parameters()), list(network.parameters()), n)


# From settings to the objects of chapters 2 to 5, and the average.


def build_ema(network: nn.Module, cfg: Config, images_per_step: int) -> EMA:
    """The configured average of the network; a plain copy where there is to be none.

    A half-life in images means the same for every batch size (EDM, 2206.00364, code).
    """
    if not cfg.use_ema:
        return EMA(network, decay=0.0)
    decay = cfg.ema_decay
    if cfg.ema_halflife:
        decay = 0.5 ** (images_per_step * cfg.ema_update_rate / cfg.ema_halflife)
    return EMA(network, decay, cfg.ema_update_rate, cfg.ema_start)


def alpha_bar_table(cfg: Config) -> Tensor:
    """alpha_bar of the configured schedule, float64 [T], falling: the one curve all else is derived from.

    Raises UserError for betas of 1 and more, and where they leave nothing that eps could be taken from.
    """
    scale = 1000 / cfg.timesteps if cfg.scale_betas else 1.0
    beta = SCHEDULES[cfg.schedule_type](cfg.timesteps, cfg.beta_start * scale, cfg.beta_end * scale, cfg.cosine_s)
    if beta.min() < 0 or beta.max() >= 1:
        raise UserError(f"--scale_betas makes betas up to {beta.max():g} with T = {cfg.timesteps}: lower --beta_end")
    alpha_bar = torch.cumprod(1 - beta, 0)
    if cfg.zero_terminal_snr:
        return zero_terminal_snr(alpha_bar)
    if cfg.prediction == "eps" and alpha_bar[-1] < 1e-60:        # x0_hat = (x_t - s eps) / a has no digit left
        raise UserError(f"--schedule_type {cfg.schedule_type} with {cfg.timesteps} timesteps leaves nothing of the "
                        "picture at T, where eps says nothing about it: take --scale_betas, a lower --beta_end or "
                        "another --prediction")
    return alpha_bar


def build_diffusion(cfg: Config, device) -> Diffusion:
    """The configured forward process and loss."""
    alpha_bar = alpha_bar_table(cfg)
    density = TIME_DENSITIES[cfg.time_sampling](alpha_bar, cfg.time_mean, cfg.time_scale)
    diffusion = Diffusion(alpha_bar, cfg.prediction, cfg.loss_fn, cfg.min_snr_gamma, cfg.detail_weight,
                          density.softmax(0))
    return diffusion.to(device)


def build_unet(cfg: Config, image_channels: int, num_classes: int) -> UNet:
    """The configured network."""
    return UNet(image_channels, num_classes, **network_options(cfg))


def network_options(cfg: Config) -> dict:
    """The settings that UNet takes, by name."""
    names = inspect.signature(UNet).parameters.keys() & FIELDS.keys()
    return {name: getattr(cfg, name) for name in names}


def sampling_steps(cfg: Config) -> int:
    """How many steps the configured sampler takes: as asked for, else its own number."""
    return cfg.steps or min(cfg.timesteps, SAMPLERS[cfg.sampler].steps or cfg.timesteps)


def sampling_grid(cfg: Config, alpha_bar: Tensor) -> list[int]:
    """The timesteps that the configured sampler visits, downwards."""
    return timestep_grid(cfg.spacing, alpha_bar, sampling_steps(cfg))


def sampler_options(cfg: Config) -> dict:
    """The settings that the configured sampler takes."""
    return {name: getattr(cfg, name) for name in SAMPLERS[cfg.sampler].options}


def build_sampler(cfg: Config) -> Callable[..., Steps]:
    """The configured sampler, (denoise, xT, ts, alpha_bar, draw_noise) -> steps."""
    return partial(SAMPLERS[cfg.sampler].run, **sampler_options(cfg))


def check_sampler_options(overrides: dict, cfg: Config) -> None:
    """Raise UserError where a setting of samplers is asked for that the configured one does not take."""
    for name in overrides:
        takers = [key for key, sampler in SAMPLERS.items() if name in sampler.options]
        if takers and cfg.sampler not in takers:
            raise UserError(f"--{name} is for --sampler {' or '.join(takers)}, not {cfg.sampler}: leave it out")


@dataclass(repr=False)
class Model:
    """A network with all that drawing images needs, as `load` makes it from a checkpoint.

    shape: (C, H, W); class_names: may be empty; compute: how the networks are run; guide: a weaker network, to guide;
    replicas: GPUs that share a batch, see `spread`.
    """

    network: nn.Module
    diffusion: Diffusion
    moments: Moments
    config: Config
    shape: tuple[int, int, int]
    class_names: list[str]
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    guide: nn.Module | None = None
    replicas: int = 1

    @classmethod
    def from_network(cls, network: nn.Module, config: Config, shape: tuple[int, int, int],
                     class_names: Sequence[str] = (), moments: Moments | None = None) -> Model:
        """The model around a network of one's own, (xt [N, C, H, W], t [N], y [N] or None) -> [N, C, H, W].

        config: schedule, prediction, and how to draw; shape: (C, H, W); y: class numbers, or len(class_names) for no
        class; moments: those of the images, for the start of sampling, by default of noise. The network is used where
        it is, in float32, and put into eval mode.
        """
        if moments is None:
            moments = standard_moments(shape, len(class_names))
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        return cls(network.eval(), build_diffusion(config, device), moments, config, tuple(shape), list(class_names),
                   ComputeConfig(device.type))

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint that `load` and --mode inference take; returns its path.

        Raises UserError for a network that the options do not describe.
        """
        cfg = dataclasses.replace(self.config, dataset=self.config.dataset or "folder", channels=self.shape[0],
                                  img_size=self.shape[1:], use_labels=bool(self.class_names))
        try:
            write_checkpoint(Path(path), uncompiled(self.network), cfg, self.shape, self.class_names, self.moments)
        except UserError as error:
            raise UserError(f"{path} was not written: {error}") from error
        return Path(path)

    def __repr__(self) -> str:
        """Three lines for people."""
        cfg = self.config
        guidance = f", guidance {cfg.guidance_scale:g}" if cfg.guidance_scale else ""
        return "\n".join([
            f"Model    {describe_images(cfg, self.shape, self.class_names)}",
            f"network  {describe_network(self.network)} on {self.device}, {self.compute}",
            f"drawing  {cfg.schedule_type}, T = {self.diffusion.T}, predicts {cfg.prediction}; "
            f"{cfg.sampler}, {sampling_steps(cfg)} steps{guidance}"])

    @property
    def device(self) -> torch.device:
        return self.diffusion.signal.device

    @property
    def null_class(self) -> int:
        """The label of no label."""
        return len(self.class_names)

    def spread(self, devices: Devices) -> Model:
        """The same model, which draws each batch on all GPUs of this process, as training does."""
        network = devices.replicate(self.network, self.compute)
        guide = None
        if self.guide is not None:
            guide = devices.replicate(self.guide, self.compute)
        return dataclasses.replace(self, network=network, guide=guide, replicas=devices.replicas)

    def generate(self, classes: int | str | list[str | int] | None = None, num_images: int | None = None, *,
                 first: int = 0, seeds: str | Sequence[int] = (), pil: bool = False, each_step: bool = False,
                 **settings) -> Tensor | list[Image.Image] | Iterator[tuple]:
        """num_images of the classes (names or numbers) in turn, by default one each: uint8 [N, C, H, W] on the CPU.

        A number alone is that of images, of no class. first: number of the first image; seeds: an image for each of
        them; pil: PIL images instead; each_step: an iterator over the sampling steps instead, of (t, x, x0_hat), both
        images of that kind, all drawn at once; settings: sampling options, such as steps, sampler, seed. Raises
        UserError for an unknown class or option.
        """
        if isinstance(classes, (int, np.integer)):
            if num_images is not None:
                raise UserError(f"{classes} and {num_images} are both numbers of images: put a class into a list, "
                                f"generate([{classes}], {num_images})")
            num_images = int(classes)
            classes = None
        cfg = self.sampling_config(settings)
        numbers = [] if classes is None else parse_classes(classes, self.class_names)

        # Which images.
        if num_images is not None:
            check_value("num_images", num_images)
        check_value("first", first)
        if isinstance(seeds, str) or len(seeds):
            seeds = parse_seeds(seeds)
            if num_images is not None or first or "seed" in settings:
                raise UserError("seeds are one for each image: leave seed, first and the number of images out")
        labels = self.labels(numbers, len(seeds) or num_images or max(1, len(numbers)), first)

        def as_images(x: Tensor) -> Tensor | list[Image.Image]:
            return [to_pil(image) for image in x] if pil else x

        if each_step:
            return ((t, as_images(to_uint8(x)), as_images(to_uint8(x0_hat)))
                    for t, x, x0_hat in self.sample(labels, cfg, first, seeds))
        return as_images(torch.cat(list(self.draw(labels, cfg, first=first, seeds=seeds))))

    def sampling_config(self, settings: dict) -> Config:
        """The model's settings with others for sampling. Raises UserError."""
        for name in settings:
            if name not in SAMPLING:
                raise UserError(f"{name} is no sampling option{did_you_mean(name, SAMPLING)}")
        settings = with_tuples(settings)
        cfg = Config(**{**without_foreign_steps(vars(self.config), settings), **settings})
        check(cfg)
        check_sampler_options(settings, cfg)
        return cfg

    def labels(self, classes: list[int], num_images: int, first: int = 0) -> list[int]:
        """A label for each of the images number first, first + 1, ...: the classes in turn; without any, the null
        class."""
        if not classes:
            classes = [self.null_class]
        return [classes[i % len(classes)] for i in range(first, first + num_images)]

    def draw(self, labels: list[int], cfg: Config, progress: Callable = lambda: None, first: int = 0,
             seeds: Sequence[int] = (), batches: Sequence[range] | None = None) -> Iterator[Tensor]:
        """Images number first, first + 1, ... in batches, uint8 [n, C, H, W]; progress() after every step.

        batches: those of `batches` to draw, by default all. A batch that does not fit into memory is halved, and so
        are those behind it. seeds: see `sample`.
        """
        size = min(self.batch_size(cfg), max(1, len(labels)))
        for batch in self.batches(len(labels), cfg) if batches is None else batches:
            i = batch.start
            while i < batch.stop:
                chosen = labels[i : min(i + size, batch.stop)]
                missing = size - len(chosen) if self.compute.compiled else 0     # filling up beats compiling again
                filled = chosen + chosen[-1:] * missing
                all_seeds = [*seeds, *seeds[-1:] * missing]
                try:
                    for _, x, _ in self.sample(filled, cfg, first + i, all_seeds):       # noqa: B007
                        progress()
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    size = math.ceil(size / 2)
                    continue
                yield to_uint8(x[: len(chosen)])
                i += len(chosen)

    def batches(self, count: int, cfg: Config) -> list[range]:
        """The batches that so many images are drawn in, as places in 0..count-1; the last one may be smaller."""
        size = self.batch_size(cfg)
        return [range(i, min(i + size, count)) for i in range(0, count, size)]

    def batch_size(self, cfg: Config) -> int:
        """Images drawn at a time: as asked for, else as many as keep the device busy and fit into its memory."""
        if cfg.sequential:
            return 1
        if cfg.sample_batch_size:
            return cfg.sample_batch_size
        if self.device.type != "cuda":
            return max(1, 2**17 // math.prod(self.shape[1:]))                # larger ones are no faster
        values = network_size(self.config, self.shape, len(self.class_names)).values
        if cfg.guidance_scale:
            values *= 2
        return self.replicas * max(1, min(1024, free_memory(self.device) // (4 * values)))

    @torch.no_grad()
    def sample(self, labels: list[int], cfg: Config, first: int = 0, seeds: Sequence[int] = ()) -> Steps:
        """Draw one batch, image numbers first, first + 1, ...: yields (t, x, x0_hat), x [N, C, H, W] after each step.

        The last x is the result. Image i depends on (seed, i, its label, cfg) alone; with seeds, one for each of all
        images, it is the first one of seeds[i].
        """
        y = torch.tensor(labels, device=self.device)
        noise = image_noise(cfg.seed, range(first, first + len(labels)), self.shape, self.device, seeds)
        alpha_bar = self.diffusion.alpha_bar
        ts = sampling_grid(cfg, alpha_bar)
        xT = self.sample_prior(noise(), y, cfg, ts[0])
        yield from build_sampler(cfg)(self.denoiser(y, cfg), xT, ts, alpha_bar, noise)

    def sample_prior(self, noise: Tensor, y: Tensor, cfg: Config, t: int) -> Tensor:
        """What sampling starts from at timestep t for labels y [N], given standard normal noise [N, C, H, W]."""
        if cfg.start == "gaussian":
            return noise
        return self.moments.sample_prior(noise, y, self.diffusion.alpha_bar[t].item())

    def denoiser(self, y: Tensor, cfg: Config) -> Denoiser:
        """What the samplers see of the network, for labels y [N]."""
        def run(network: Callable, *inputs) -> Tensor:
            with self.compute.autocast():
                return network(*inputs)

        network = partial(run, self.network)
        guide = partial(run, self.guide) if self.guide else None
        return make_denoiser(network, self.diffusion, y if self.class_names else None, self.null_class,
                             cfg.guidance_scale, cfg.guidance_interval, guide, clip=cfg.clip_x0,
                             dynamic_threshold=cfg.dynamic_threshold, eps_scale=cfg.eps_scale)

    @torch.no_grad()
    def loss(self, images: Tensor, labels: Tensor | None = None, seed: int = 0) -> Tensor:
        """Loss of each image, float [N], at a random timestep each, for uint8 [N, C, H, W] and labels int64 [N].

        In float32, however images are drawn.
        """
        random = generator(seed, STREAM_VALIDATION)
        x0 = from_uint8(images)
        t = torch.randint(self.diffusion.T, (len(x0),), generator=random)    # uniform, whatever training prefers
        eps = torch.randn(x0.shape, generator=random)
        y = labels.to(self.device) if labels is not None else None
        return self.diffusion.loss(self.network, x0.to(self.device), t.to(self.device), eps.to(self.device), y)


def describe_images(cfg: Config, shape: tuple[int, int, int], class_names: list[str]) -> str:
    """What images are drawn or trained on, on part of a line."""
    channels, height, width = shape
    text = f"{cfg.dataset or 'images'} {height}x{width}x{channels}, {len(class_names)} classes"
    if class_names:
        text += f": {textwrap.shorten(', '.join(class_names), 60, placeholder=' ...')}"
    return text


def describe_network(network: nn.Module) -> str:
    """Its kind and size, on part of a line."""
    return f"{type(uncompiled(network)).__name__}, {count_parameters(network):,} parameters"


def list_classes(class_names: list[str], most: int = 30) -> str:
    """The classes with their numbers, for people; of many, the first."""
    shown = [name if name == str(i) else f"{i} {name}" for i, name in enumerate(class_names[:most])]
    if len(class_names) > most:
        shown.append(f"... {len(class_names):,} in all")
    return ", ".join(shown)


def parse_classes(classes: str | list, class_names: list[str]) -> list[int]:
    """Class numbers from names, unambiguous beginnings of names, or numbers. Raises UserError.

    classes: a list of these, or text such as "cat, 3", "3-5 7" or "all". Names go before numbers.
    """
    if not class_names:
        raise UserError("this model was trained without classes: leave --classes out")
    if isinstance(classes, str):
        numbers = parse_class_list(classes, class_names)
    else:
        numbers = [parse_class(str(c), class_names) for c in classes]
    if not numbers:
        raise UserError(f"no class is named: choose from {list_classes(class_names)}")
    return numbers


def parse_class_list(text: str, class_names: list[str]) -> list[int]:
    """Class numbers from text: classes and ranges of them between commas or spaces, or "all". Raises UserError."""
    if text.strip().lower() == "all":                            # a class of that name can be chosen by its number
        return list(range(len(class_names)))
    numbers = []
    for part in text.split(","):
        if not part.strip():
            continue
        try:
            numbers += parse_class_range(part.strip(), class_names)
        except UserError:
            words = part.split()
            if len(words) == 1:
                raise
            for word in words:                                   # no name with spaces: several classes
                numbers += parse_class_range(word, class_names)
    return numbers


def parse_class_range(text: str, class_names: list[str]) -> list[int]:
    """Class numbers from one class, or from two with a dash between them. Raises UserError."""
    try:
        return [parse_class(text, class_names)]
    except UserError:
        ends = re.fullmatch(r"(\S+?)\s*-\s*(\S+)", text)
        if not ends:
            raise
    first = parse_class(ends[1], class_names)
    last = parse_class(ends[2], class_names)
    if last < first:
        raise UserError(f"classes {text}: the range ends before it begins")
    return list(range(first, last + 1))


def parse_class(text: str, class_names: list[str]) -> int:
    """A class's number from its name, its number, or the beginning of its name. Raises UserError."""
    if text in class_names:                                      # some may differ in case alone
        return class_names.index(text)
    text = text.lower()
    names = [name.lower() for name in class_names]
    if text in names:
        return names.index(text)
    numbers = [str(i) for i in range(len(names))]
    if text in numbers:
        return int(text)

    beginning = [i for i, name in enumerate(names) if name.startswith(text)]
    if len(beginning) == 1 and not text.isdecimal():             # a number means a number
        return beginning[0]
    if len(beginning) > 1:
        several = ", ".join(class_names[i] for i in beginning[:5])
        raise UserError(f"class {text} could be {several}: write more of the name, or its number")
    hint = did_you_mean(text, names) or f": choose from {list_classes(class_names)}"
    raise UserError(f"unknown class {text[:60]}{hint}")


MAX_SEEDS = 100_000


def parse_seeds(seeds: str | Sequence[int]) -> list[int]:
    """Seeds from numbers and ranges: a list, or text such as "1,2,5-10"; each once. Raises UserError."""
    if not isinstance(seeds, str):
        seeds = ",".join(map(str, seeds))
    found = {}                                                   # of a dict the keys, in the order given
    for part in filter(None, re.split(r"[,\s]+", seeds)):
        bounds = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part, re.ASCII)
        if not bounds:
            raise UserError(f"--seeds wants numbers and ranges such as 1,2,5-10, not {part[:60]!r}")
        low = int(bounds[1])
        high = int(bounds[2] or low)
        if high < low:
            raise UserError(f"--seeds {part} begins above its end")
        check_value("seed", high)
        if high - low < MAX_SEEDS:
            found.update(dict.fromkeys(range(low, high + 1)))
        if high - low >= MAX_SEEDS or len(found) > MAX_SEEDS:
            raise UserError(f"--seeds takes at most {MAX_SEEDS:,} seeds")
    if not found:
        raise UserError("--seeds names none: say such as 1,2,5-10")
    return list(found)


def draw_with_bar(model: Model, labels: list[int], cfg: Config, first: int = 0,
                  seeds: Sequence[int] = ()) -> Iterator[Tensor]:
    """Model.draw with a progress bar over the network's steps."""
    batches = model.batches(len(labels), cfg)
    total = len(batches) * sampling_steps(cfg)
    with tqdm(total=total, desc="sampling", unit="step", leave=False, disable=None) as bar:
        yield from model.draw(labels, cfg, bar.update, first, seeds, batches)


def save_strip(model: Model, labels: list[int], cfg: Config, path: Path, first: int = 0,
               seeds: Sequence[int] = ()) -> None:
    """The way from noise to image: a row per label, columns every plot_freq_interval timesteps (or ten in all).

    Above each column stands the timestep that is left, counted as in DDPM: the image is x_0.
    """
    every = cfg.plot_freq_interval or max(1, cfg.timesteps // 10)
    ts = sampling_grid(cfg, model.diffusion.alpha_bar)
    left = {t: t_next + 1 for t, t_next in zip(ts, [*ts[1:], -1])}
    frames = []
    headings = []
    shown = cfg.timesteps + every                                            # the timestep of the last frame
    for t, x, _ in model.sample(labels, cfg, first, seeds):
        if shown - t >= every or t == ts[-1]:
            frames.append(to_uint8(x))
            headings.append(f"t = {left[t]}")
            shown = t
    save_grid(torch.stack(frames, 1).flatten(0, 1), path, headings, columns=len(frames))


# ---- 9  Checkpoints ----------------------------------------------------------------------------
# What is in one; finding, saving, checking and resuming. Tensors and plain values only: nothing in a file is ever run.

FORMAT = 1                                                       # of checkpoint files
REQUIRED = object()                                              # stands for a default where there is none


@dataclass(frozen=True)
class Entry:
    """A value in a checkpoint. valid: whether a value is acceptable; default: stands in where a file has none."""

    valid: Callable[[object], bool]
    default: object = REQUIRED

    def make_default(self) -> object:
        """A copy of the default, to be changed freely."""
        return copy.deepcopy(self.default)


def is_count(v, least: int = 0, most: int = 2**40) -> bool:
    return type(v) is int and least <= v <= most


def is_number(v) -> bool:
    return type(v) in (int, float) and abs(v) < 2**40            # nan fails too


def is_distance(v) -> bool:
    return type(v) is float and v >= 0


def is_type(kind: type) -> Callable[[object], bool]:
    return lambda v: type(v) is kind


def is_list(valid: Callable[[object], bool], length: int | None = None) -> Callable[[object], bool]:
    """A list of valid values, of any length or of the one given."""
    def check_list(v) -> bool:
        if type(v) is not list:
            return False
        return length in (None, len(v)) and all(valid(entry) for entry in v)

    return check_list


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_tensor(v, shape: tuple[int, ...]) -> bool:
    """Whether v is a tensor of floats of that shape, with memory for each of them."""
    if not (isinstance(v, Tensor) and v.shape == shape and v.dtype in FLOATS and v.is_cpu):
        return False
    return v.untyped_storage().nbytes() >= v.numel() * v.element_size()


def is_finite(v: Tensor) -> bool:
    """Whether all numbers are finite in float32, which everything is computed from."""
    return bool(v.float().isfinite().all())


def is_finite_tensor(v, shape: tuple[int, ...]) -> bool:
    return is_tensor(v, shape) and is_finite(v)


MAX_CLASSES = 100_000
MAX_CLASS_NAME = 1000                                            # characters


def are_class_names(v) -> bool:
    if type(v) is not list or len(v) > MAX_CLASSES:
        return False
    return all(type(name) is str and len(name) <= MAX_CLASS_NAME for name in v)


def is_log(v) -> bool:
    """[step, mean loss]."""
    return type(v) is list and [type(n) for n in v] == [int, float] and is_count(v[0])


def is_compute(v) -> bool:
    if type(v) is not dict:
        return False
    plain = vars(ComputeConfig())
    same_types = {name: type(n) for name, n in v.items()} == {name: type(n) for name, n in plain.items()}
    return same_types and v["precision"] in PRECISIONS and is_count(v["split"], least=1)


def is_scaler(v) -> bool:
    """The state of a GradScaler, empty for one that is not used."""
    return type(v) is dict and all(is_number(n) for n in v.values())


def saved_field(key: str, valid: Callable[[object], bool], initial: object, required: bool = False):
    """A field of Progress.

    key: its name in a checkpoint; initial: its value at step 0, and what a file without it means, unless it is required
    there.
    """
    at_start = Entry(valid, initial)
    in_file = Entry(valid) if required else at_start
    return field(default_factory=at_start.make_default, metadata=dict(key=key, entry=in_file))


@dataclass
class Progress:
    """The numbers of a run that change as it goes on and are saved.

    To save one more, add a line here: it is then written, checked and read back. Names in files are older than those
    here, and stay.
    """

    step: int = saved_field("step", is_count, 0, required=True)
    # [[step, mean loss], ...], a row per log.
    loss_history: list = saved_field("loss_history", is_list(is_log), [], required=True)
    # Sums since the last log and since the epoch began: [log or epoch, quartile of t, loss or count].
    loss_sums: Tensor = saved_field(
        "meter", partial(is_finite_tensor, shape=(2, 4, 2)), torch.zeros(2, 4, 2), required=True)
    # Steps that were not finite: in a row now, most in a row since the last log, in all.
    nonfinite_steps: Tensor = saved_field("faults", partial(is_finite_tensor, shape=(3,)), torch.zeros(3))
    # How often the learning rate was halved after a divergence.
    lr_halvings: int = saved_field("slowed", lambda v: is_count(v, most=Guard.MAX_HALVINGS), 0)
    # The distance of drawn images to real ones, the smallest so far; inf before the first.
    best_distance: float = saved_field("best_distance", is_distance, math.inf)
    # Losses from this step on can be compared: since then no setting has changed.
    baseline_step: int = saved_field("range_since", is_count, 0)

    @classmethod
    def from_checkpoint(cls, state: dict, device: torch.device) -> Progress:
        """The numbers in a checkpoint, tensors and lists as copies."""
        progress = cls(**{f.name: copy.deepcopy(state[f.metadata["key"]]) for f in dataclasses.fields(cls)})
        return progress.to(device)

    def to(self, device: torch.device) -> Progress:
        """Move the tensors; returns itself."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def entries(self) -> dict:
        """The numbers by their names in a checkpoint."""
        return {f.metadata["key"]: getattr(self, f.name) for f in dataclasses.fields(self)}


# All that is in a checkpoint: saving writes these, loading checks them and fills in the defaults.
CHECKPOINT = {
    "format": Entry(lambda v: type(v) is int and v == FORMAT, FORMAT),
    "config": Entry(is_type(dict)),
    "shape": Entry(is_list(partial(is_count, least=1, most=4096), length=3)),    # (C, H, W)
    "class_names": Entry(are_class_names),
    "data": Entry(is_type(str)),                                 # ImageData.digest
    "epoch": Entry(is_number),
    **{f.metadata["key"]: f.metadata["entry"] for f in dataclasses.fields(Progress)},
    "good": Entry(is_type(bool), True),                          # made while the loss was finite and in its range
    "arithmetic": Entry(is_compute, vars(ComputeConfig(device=""))),
    "lr_schedule": Entry(is_type(dict), {}),                     # for other readers: the rate follows from the step
    "scaler": Entry(is_scaler),
    # Tensors, checked by check_tensors against the configured network.
    "model": Entry(lambda v: isinstance(v, dict)),               # state_dict() gives an OrderedDict
    "ema": Entry(lambda v: v is None or isinstance(v, dict)),
    "optimizer": Entry(is_type(dict)),
    "moments": Entry(is_type(dict)),
}


def new_checkpoint(**values) -> dict:
    """The content of a checkpoint: `values`, and the default of everything else in CHECKPOINT."""
    required = {name for name, entry in CHECKPOINT.items() if entry.default is REQUIRED}
    wrong = (values.keys() - CHECKPOINT.keys()) | (required - values.keys())
    if wrong:
        raise TypeError(f"a checkpoint has no {', '.join(wrong)}, or needs it")

    state = {name: entry.make_default() for name, entry in CHECKPOINT.items()}
    return {**state, **values}


# Names of files and folders.


def network_name(cfg: Config) -> str:
    return f"{cfg.timesteps}_{cfg.emb_dim}_{'attention' if cfg.use_attention else 'noattention'}"


def checkpoint_path(cfg: Config, step: int) -> Path:
    """Where the checkpoint of that step goes: one file per kind of run, or one folder per step of an experiment."""
    if cfg.experiment_name:
        return Path(cfg.working_directory, cfg.experiment_name, f"checkpoint_{step}", "model.pt")
    return Path(cfg.working_directory, f"diffusion_checkpoint_{cfg.dataset}_{network_name(cfg)}.pt")


def best_path(cfg: Config) -> Path:
    """Where the checkpoint with the best score goes, beside the last one."""
    path = checkpoint_path(cfg, 0)
    if cfg.experiment_name:
        return path.parents[1] / "best" / path.name
    return path.with_stem(f"{path.stem}_best")


def is_best(path: Path) -> bool:
    """Whether a checkpoint has one of best_path's names."""
    if path.name == "model.pt":
        return path.parent.name == "best"
    return path.name.startswith("diffusion_checkpoint_") and path.stem.endswith("_best")


def run_title(config: dict) -> str:
    """What a run is called, by the configuration in its checkpoint: its name and its dataset."""
    name = config.get("experiment_name")
    return f"{name} ({config['dataset']})" if name else config["dataset"]


def samples_path(cfg: Config) -> Path:
    """The folder for sample grids and metrics."""
    name = cfg.experiment_name or cfg.dataset
    return Path(cfg.generated_directory, f"samples_{name}_{cfg.schedule_type}_{network_name(cfg)}")


def kept_checkpoints(cfg: Config) -> list[Path]:
    """This run's checkpoints, the newest first."""
    path = checkpoint_path(cfg, 0)
    if cfg.experiment_name:
        return newest_first(path.parent.parent.glob("checkpoint_*/model.pt"))
    steps = [p for p in path.parent.glob(f"{path.stem}_step*.pt") if p.stem.rpartition("_step")[2].isdecimal()]
    return newest_first([path, *steps])                          # not _step9_old1


def find_checkpoint(cfg: Config) -> Path:
    """The checkpoint named by resume_from_checkpoint. Raises UserError if it is not there."""
    name = cfg.resume_from_checkpoint
    home = Path(cfg.working_directory)
    for place in (Path(name), home / cfg.experiment_name / name / "model.pt", home / name, home / f"{name}.pt"):
        if place.exists():
            return place / "model.pt" if place.is_dir() else place
    others = ", ".join(map(str, kept_checkpoints(cfg))) or "none"
    raise UserError(f"--resume_from_checkpoint {name}: not found; this run's checkpoints: {others}")


@contextmanager
def run_lock(cfg: Config) -> Iterator[None]:
    """Hold what the run writes to, checkpoints and samples.

    Raises UserError where another run does, naming it, or where nothing can be written.
    """
    checkpoint = checkpoint_path(cfg, 0)
    place = checkpoint.parents[1] if cfg.experiment_name else checkpoint
    if cfg.experiment_name and place.is_file():
        raise UserError(f"{place} is a file: give this run another --experiment_name")
    advice = "Wait for it, stop it, or give this run an --experiment_name of its own."
    with (hold_lock(place, "--working_directory", advice),
          hold_lock(samples_path(cfg), "--generated_directory", advice)):
        yield


# Saving.


def save_checkpoint(state: dict, cfg: Config) -> Path:
    """Write the state and let go of the oldest beyond num_keep_checkpoints, but never of the newest good one.

    Raises OSError where the disk is full or cannot be written to: all is as it was.
    """
    path = checkpoint_path(cfg, state["step"])

    def set_others_aside() -> None:
        if not cfg.experiment_name:
            set_aside(path, state, cfg)

    write_state(path, state, set_others_aside)
    remove_old_checkpoints(path, state, cfg)
    return path


def write_state(path: Path, state: dict, before_replace: Callable[[], None] = lambda: None) -> None:
    """Write a checkpoint that takes the place of one there only if it is sound. Raises OSError."""
    def check(temporary: Path) -> None:
        if not zip_is_sound(temporary):
            raise OSError(f"{path} was not written as it should be")
        before_replace()

    write_atomically(path, partial(write_tensors, state), check)


def write_checkpoint(path: Path, network: nn.Module, cfg: Config, shape: tuple[int, int, int], class_names: list[str],
                     moments: Moments) -> None:
    """Write a checkpoint of step 0 with these weights. Raises UserError where they are no whole model."""
    weights = {name: value.cpu() for name, value in network.state_dict().items()}
    state = new_checkpoint(
        **Progress().entries(),
        config=dataclasses.asdict(cfg),
        epoch=0.0,
        shape=list(shape),
        class_names=class_names,
        data="",
        moments=vars(moments),
        model=weights,
        ema=None,
        optimizer=dict(state={}, param_groups=[]),
        scaler={},
    )
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError("its weights are not all finite")
    write_state(path, check_state(state))


def set_aside(path: Path, state: dict, cfg: Config) -> None:
    """Rename the checkpoint that `state` is about to replace, where it is to be kept."""
    before = try_load(path, peek=True)
    if before is None or before["step"] == state["step"]:
        return
    if cfg.num_keep_checkpoints > 1 or not state["good"]:
        os.replace(path, path.with_stem(f"{path.stem}_step{before['step']}"))


def remove_old_checkpoints(path: Path, state: dict, cfg: Config) -> None:
    """Keep the one just written and num_keep_checkpoints - 1 before it, and the newest good one in any case."""
    others = [p for p in kept_checkpoints(cfg) if p != path]
    spared = None
    if not state["good"]:
        spared = next((p for p in others if is_good(try_load(p))), None)

    for old in others[cfg.num_keep_checkpoints - 1 :]:
        if old == spared:
            continue
        with suppress(OSError):                                  # the new one is safe in any case
            old.unlink()
            if cfg.experiment_name and not any(old.parent.iterdir()):
                old.parent.rmdir()


def averaged_weights(state: dict) -> dict:
    """The weights to draw with: the average where there is one."""
    return state["ema"] or state["model"]


def is_good(state: dict | None) -> bool:
    """Whether a checkpoint could be read and was made while the loss was finite and in its range."""
    return state is not None and state["good"]


# Loading and checking.


def load_checkpoint(path: str | Path, peek: bool = False) -> dict:
    """A checkpoint's content on the CPU, all of it checked, older files filled up with defaults.

    peek: tensors are read only when used; weights, optimizer and moments are not checked. Nothing in a file is run.
    Raises UserError.
    """
    state = read_checkpoint(path, peek)
    try:
        return check_state(state, peek)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
    except Exception as error:                                   # anything may be anywhere
        raise UserError(f"{path} cannot be used: its content is not that of a checkpoint of this program "
                        f"({type(error).__name__}: {first_line(error)})") from error


def read_checkpoint(path: str | Path, peek: bool) -> dict:
    """What torch.load finds in a file of this program. Raises UserError."""
    if not os.path.exists(path):
        raise UserError(f"there is no checkpoint {path}")
    if not os.path.isfile(path):
        raise UserError(f"{path} is no file: name a checkpoint, such as checkpoints/NAME.pt")
    damaged = f"{path} is damaged, or was never a checkpoint of this program"
    try:
        with open(path, "rb") as file:
            sound = zipfile.is_zipfile(file) if peek else zip_is_sound(file)
        if not sound:
            raise UserError(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=peek)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is refused: it holds more than tensors and plain values, it could run code") from error
    except Exception as error:                                   # torch raises many kinds here, for itself to read
        raise UserError(damaged) from error

    if type(state) is not dict or not CHECKPOINT["format"].valid(state.get("format")):
        raise UserError(f"{path} is not a checkpoint of this program (format {FORMAT})")
    return state


def try_load(path: Path, peek: bool = False) -> dict | None:
    """A checkpoint's content; None where there is none that can be read."""
    try:
        return load_checkpoint(path, peek)
    except UserError:
        return None


def check_state(state: dict, peek: bool = False) -> dict:
    """A checkpoint's content with defaults for what it lacks, if it holds what its configuration needs.

    Raises UserError, or whatever strange content leads to.
    """
    state = dict(state)
    for name, entry in CHECKPOINT.items():
        if name not in state and entry.default is not REQUIRED:
            state[name] = entry.make_default()
        if name not in state:
            raise UserError(f"it lacks its {name}")
        if not entry.valid(state[name]):
            raise UserError(f"its {name} is not that of a checkpoint")

    cfg = configure(state["config"])
    if not cfg.dataset:
        raise UserError("it names no dataset")
    if not peek:
        state["moments"] = dict(state["moments"])
        check_tensors(state, cfg)
        for name, v in state["moments"].items():                 # drawing computes with them as they are
            state["moments"][name] = v.float()
    return state


def check_tensors(state: dict, cfg: Config) -> None:
    """Raise UserError unless weights, average, optimizer and moments are those of the configured network."""
    channels, height, width = state["shape"]
    num_classes = len(state["class_names"])
    check_image_size(height, width, len(cfg.channel_mults), cfg.patch_size)
    wrong = UserError("its tensors are not those of a run with its configuration")

    # Weights and their average.
    with torch.device("meta"):
        network = build_unet(cfg, channels, num_classes)
    shapes = {name: v.shape for name, v in network.state_dict().items()}
    for weights in (state["model"], averaged_weights(state)):
        if weights.keys() != shapes.keys():
            raise wrong
        if not all(is_tensor(weights[name], shape) for name, shape in shapes.items()):
            raise wrong

        for name in shapes:
            if not is_finite(weights[name]):
                raise UserError(f"its weights hold numbers that are not finite, in {name}: its training went wrong")

    # What the optimizer keeps of each; a run of no step has none.
    adam = state["optimizer"].get("state")
    if type(adam) is not dict:
        raise wrong
    for i, (name, shape) in enumerate(shapes.items() if adam else ()):
        kept = adam.get(i)
        if type(kept) is not dict:
            raise wrong
        sizes = {"exp_avg": shape, "exp_avg_sq": shape, "step": ()}
        if cfg.optimizer == "muon" and is_block_matrix(name, shape):
            sizes = {"momentum": shape, "step": ()}
        for key, size in sizes.items():
            if not is_tensor(kept.get(key), size):
                raise wrong
            if not is_finite(kept[key]):
                raise UserError(f"its optimizer holds numbers that are not finite, of {name}: its training went wrong")

    # The moments of the images.
    check_moments(state["moments"], num_classes, channels)


def check_moments(moments: dict, num_classes: int, channels: int) -> None:
    """Raise UserError unless these are Moments of so many classes, of at most 64 x 64 pixels."""
    wrong = UserError("its moments are not those of its images")
    mean = moments.get("mean")
    if moments.keys() != {"mean", "var"} or not isinstance(mean, Tensor) or mean.dim() != 4:
        raise wrong
    if not all(1 <= n <= 64 for n in mean.shape[2:]):
        raise wrong
    for v in moments.values():
        if not is_tensor(v, (num_classes + 1, channels, *mean.shape[2:])):
            raise wrong
        if not is_finite(v):
            raise UserError("its moments hold numbers that are not finite")
    if moments["var"].min() < 0:
        raise UserError("its moments hold variances below 0")


def check_compatible(path: str | Path, overrides: dict, stored: dict, advice: str = "Leave those options out.") -> None:
    """Raise UserError if a setting asked for shapes the network or schedule differently from the checkpoint."""
    differing = []
    for name, value in overrides.items():
        if name in ARCHITECTURAL and name in stored and value is not None and value != stored[name]:
            there, here = format_value(name, stored[name]), format_value(name, value)
            differing.append(f"{name} is {there} there, {here} asked for")
    if differing:
        raise UserError(f"{path} does not fit: {'; '.join(differing)}.\n{advice}")


# Resuming, and starting from the weights of another run.


ResumePoint = tuple[Path | None, dict | None]


def find_resume_checkpoint(cfg: Config, asked: dict, processes: Processes | None = None) -> ResumePoint:
    """The checkpoint that the run goes on from, and its content, checked against the settings asked for.

    None and None for a new run, or where the newest one is of a run that is not to be gone on with. One that cannot be
    used is passed over for the one before it. processes: those of the run, to say so and to read all of the file;
    without them it is a look beforehand. Raises UserError.
    """
    named = bool(cfg.resume_from_checkpoint)
    candidates = []
    if named:
        candidates = [find_checkpoint(cfg)]
    elif cfg.resume == "auto":
        candidates = kept_checkpoints(cfg)

    problems = []
    for path in candidates:
        try:
            state = load_checkpoint(path, peek=processes is None)
        except UserError as error:
            if named:
                raise
            problems.append(error)
            continue
        if not named and not same_run(cfg, state):
            break
        check_compatible(path, asked, state["config"], "Leave those options out to go on with it, or start another run "
                         "with --experiment_name NAME or --resume never.")
        if processes is not None:
            for problem in problems:
                processes.print0(f"{problem}: going on from {path} instead")
        return path, state

    if problems:
        raise UserError(f"{problems[0]}.\nThis run has no other one: --resume never starts over and keeps that file.")
    if cfg.init_from:
        load_checkpoint(cfg.init_from, peek=True)                # told before anything is made
    return None, None


def same_run(cfg: Config, state: dict) -> bool:
    """Whether a checkpoint in this run's place is an earlier part of it.

    False if it began from another --init_from, or if --config repeats a run that has already ended there.
    """
    if cfg.config:
        total = cfg.iterations
        if cfg.train_minutes and not total:                      # a run of so many minutes has its length in its file
            total = state["config"].get("iterations", 0)
        has_ended = state["step"] >= total if total else state["epoch"] >= cfg.epochs
        if has_ended:
            return False
    before = state["config"].get("init_from", "")
    return not cfg.init_from or (before != "" and Path(cfg.init_from).resolve() == Path(before).resolve())


def pretrained_options(asked: dict) -> dict:
    """What a new run takes over from the checkpoint whose weights it starts from.

    Network, schedule, channels of the images and, for a folder of them, their size. Raises UserError for flags that ask
    for another network.
    """
    path = asked["init_from"]
    state = load_checkpoint(path, peek=True)
    stored = {**dataclasses.asdict(configure(state["config"])), "channels": state["shape"][0]}

    network = inspect.signature(UNet).parameters.keys() | {"channels"}
    check_compatible(path, {name: value for name, value in asked.items() if name in network}, stored,
                     "Leave those options out, or the recipe that sets them.")

    own = {"dataset", "use_labels"}
    if asked.get("dataset", "folder") != "folder":
        own.add("img_size")
    return {name: stored[name] for name in FIELDS if name in ARCHITECTURAL and name not in own}


def load_pretrained(network: UNet, state: dict) -> str:
    """Give a new network the weights in another run's checkpoint, averaged where they are.

    With another number of classes, each begins as the null class did there. Returns what to say of it. Raises
    UserError.
    """
    weights = dict(averaged_weights(state))
    before = len(state["class_names"])
    now = network.num_classes
    if before == now:
        network.load_state_dict(weights)
        return f"{now} classes as there" if now else "no classes"
    if network.emb_as_channels and not (before and now):
        raise UserError("--init_from: with --conditioning concat, labels cannot come or go: see --use_labels")

    null_class = torch.zeros(network.time_mlp[2].out_features)
    if before:
        null_class = weights.pop("class_embedding.weight")[-1]
    if now:
        weights["class_embedding.weight"] = null_class.repeat(now + 1, 1)
    else:
        weights["time_mlp.2.bias"] = weights["time_mlp.2.bias"] + null_class
    network.load_state_dict(weights)
    return f"the class embedding begins anew: {now} classes, {before} there"


# From a checkpoint to a model.


def load(path: str | Path, device: str = "auto", **settings) -> Model:
    """The model in a checkpoint, averaged where it is.

    settings: options, as to configure. Raises UserError, also for settings that ask for another network or schedule.
    """
    state = load_checkpoint(path)
    asked = requested({"device": device, **settings})
    check_compatible(path, asked, state["config"])
    cfg = complete(asked, state["config"])
    check_sampler_options(asked, cfg)
    return build_model(state, cfg)


def build_model(state: dict, cfg: Config, devices: Devices | None = None) -> Model:
    """The model in the content of a checkpoint, with its guide. Raises UserError for a guide that does not fit it."""
    device = (devices or Devices(cfg)).device
    shape = tuple(state["shape"])
    names = state["class_names"]
    parameters = network_size(cfg, shape, len(names)).parameters
    free = free_memory(device)
    if 8 * parameters > free:
        raise UserError(f"the network takes {8 * parameters / 2**30:.2g} GiB, {free / 2**30:.2g} GiB are free")

    trained = {**state["arithmetic"], "compiled": False}         # compiling repays itself in long runs
    compute = choose_compute(cfg, device, stored=trained)
    network = build_unet(cfg, shape[0], len(names))
    network.load_state_dict(averaged_weights(state) if cfg.use_ema else state["model"])
    network = network.to(device, memory_format=compute.memory_format).eval().requires_grad_(False)
    use_cpu_kernels(network, compute)
    if compute.compiled:
        network = compile_network(network, graphs=True)

    model = Model(network, build_diffusion(cfg, device), Moments(**state["moments"]), cfg, shape, names, compute)
    if cfg.guide_path:
        model.guide = load_guide(model, cfg)
    if device.type == "cpu":                                     # after the guide, which is smaller
        use_threads(cfg, shape, len(names))
    return model


def load_guide(model: Model, cfg: Config) -> nn.Module:
    """The network of the guide. Raises UserError unless its outputs mean the same as the model's."""
    guide = load(cfg.guide_path, cfg.device)
    differing = []
    if not torch.equal(guide.diffusion.alpha_bar, model.diffusion.alpha_bar):
        differing.append("schedule")
    if guide.shape != model.shape:
        differing.append("images")
    if guide.config.prediction != model.config.prediction:
        differing.append("prediction")
    if guide.class_names != model.class_names:
        differing.append("classes")
    if differing:
        raise UserError(f"--guide_path {cfg.guide_path} does not fit the model in {' and '.join(differing)}")
    use_cpu_kernels(guide.network, model.compute)
    return guide.network


# ---- 10  Training ------------------------------------------------------------------------------
# One step, the guard against divergence beside it, what is seen of a run, and the loop. Each rank takes its slice of
# the same batch; rank 0 writes.


def is_block_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a matrix or a kernel of the UNet's blocks: not of its ends or its embeddings."""
    return name.split(".")[0] in ("down", "mid", "up") and len(shape) > 1


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """About U V^T of each matrix U S V^T, [K, m, n] -> the same: Newton-Schulz, five steps in dtype (Muon, code).

    Its polynomial takes singular values to between 0.7 and 1.2 instead of to 1, in fewer steps.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT                                          # [K, m, m], m the shorter side
        mix = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, mix, x, beta=3.4445)
    return (x if wide else x.mT).float()


class Muon(torch.optim.AdamW):
    """Muon for the matrices of a UNet's blocks, AdamW for its other parameters (Jordan 2024,
    kellerjordan.github.io/posts/muon).

    A matrix steps along its orthogonalized momentum, so that all directions of it learn alike; a kernel counts as a
    matrix [cout, cin k k]. The root mean square of a step is 0.2 of the learning rate, as it is about AdamW's, so that
    one rate and one weight decay suit both (2502.16982, eq. 4).
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, momentum: float = 0.95, **options):
        """dtype: of the matrix products; options: AdamW's."""
        super().__init__(network.parameters(), **options)
        self.dtype = dtype
        self.momentum = momentum
        self.matrices = [p for name, p in network.named_parameters() if is_block_matrix(name, p.shape)]
        self.graphs = None                                       # `orthogonal` on CUDA

    @torch.no_grad()
    def step(self) -> None:
        """One step. Where found_inf is 1 on the device there is none, as with torch's fused optimizers."""
        # AdamW leaves alone what has no gradient.
        gradients = [p.grad for p in self.matrices]
        for p in self.matrices:
            p.grad = None
        super().step()

        # Nesterov's momentum.
        for p in self.matrices:
            if not self.state[p]:                                # a step is what AdamW looks for when it is loaded
                self.state[p].update(step=torch.zeros(()), momentum=torch.zeros_like(p))
        momenta = [self.state[p]["momentum"] for p in self.matrices]
        skip = getattr(self, "found_inf", None)
        if skip is not None:
            skip = skip > 0
            gradients = [torch.where(skip, m, g) for m, g in zip(momenta, gradients)]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        ahead = torch._foreach_lerp(gradients, momenta, self.momentum)

        # On CUDA a graph launches the hundreds of small products at once.
        orthogonal = self.orthogonal
        if ahead[0].is_cuda and world_size() == 1:
            self.graphs = self.graphs or as_graphs(orthogonal, tuple(ahead))
            orthogonal = self.graphs
        steps = orthogonal(*ahead)

        # Decay the weights and add the step.
        group = self.param_groups[0]
        scale = -0.2 * group["lr"]
        decay = 1 - group["lr"] * group["weight_decay"]
        if skip is not None:
            scale = torch.where(skip, 0.0, scale)
            decay = torch.where(skip, 1.0, decay)
        torch._foreach_mul_(steps, scale)
        torch._foreach_mul_(self.matrices, decay)
        torch._foreach_add_(self.matrices, steps)

    def orthogonal(self, *directions: Tensor) -> list[Tensor]:
        """The step of each matrix along its direction, of a root mean square of 1; those of one shape are one batch."""
        batches = {}
        for i, direction in enumerate(directions):
            batches.setdefault(direction.flatten(1).shape, []).append(i)

        steps = [None] * len(directions)
        for (height, width), numbers in batches.items():
            matrices = torch.stack([directions[i].flatten(1) for i in numbers])
            orthogonalized = orthogonalize(matrices, self.dtype) * math.sqrt(max(height, width))
            for i, step in zip(numbers, orthogonalized):
                steps[i] = step.view_as(directions[i])
        return steps


# To add an optimizer: name it here; it is called with the network, the type that it is computed in, AdamW's options.
OPTIMIZERS = {
    "adamw": lambda network, dtype, **options: torch.optim.AdamW(network.parameters(), **options),
    "adam": lambda network, dtype, **options: torch.optim.Adam(network.parameters(), **options),
    "muon": Muon,
}


# Schedules of the learning rate: (optimizer, highest lr, warm-up steps, all steps, cycles) -> scheduler.


def one_cycle(optimizer, lr: float, warmup: int, total: int, cycles: int = 1):
    """torch's OneCycleLR (Smith & Topin 2017), kept from phases of a single step: it would divide by zero."""
    warmup = min(warmup, total - 2)
    part = warmup / total if warmup > 1 else 0.0
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, cycle_momentum=False, pct_start=part)


def after_warmup(curve: Callable[[float, int], float], optimizer, lr: float, warmup: int, total: int,
                 cycles: int = 1):
    """Linear warm-up to lr, then lr times curve(part of the rest that is done, cycles)."""
    def factor(step: int) -> float:
        rising = min(1.0, (step + 1) / (warmup + 1))
        done = min(1.0, max(0, step - warmup) / max(1, total - warmup))
        return rising * curve(done, cycles)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def half_cosine(done: float, cycles: int = 1) -> float:
    """From 1 to 0."""
    return (1 + math.cos(math.pi * done)) / 2


def cosine_with_restarts(done: float, cycles: int) -> float:
    """From 1 to 0, again and again (SGDR, 1608.03983, eq. 5)."""
    return half_cosine(done * cycles % 1 if done < 1 else 1.0)


# The curves after the warm-up are those of diffusers' get_scheduler.
LR_SCHEDULES = {
    "onecycle": one_cycle,
    "cosine": partial(after_warmup, half_cosine),
    "cosine_with_restarts": partial(after_warmup, cosine_with_restarts),
    "linear": partial(after_warmup, lambda done, cycles: 1 - done),
    "constant": partial(after_warmup, lambda done, cycles: 1.0),
}


def training_length(cfg: Config, images: int) -> tuple[int, int, int]:
    """Steps of a run over so many images, steps of an epoch, images of a step."""
    size = cfg.batch_size * cfg.gradient_accumulation_steps
    per_epoch = max(1, images // size)
    return cfg.iterations or cfg.epochs * per_epoch, per_epoch, size


NOISE_BLOCK = 8                                                  # images whose noise is drawn at once, for GPUs' sake


class Trainer:
    """The state of a run, and its step: network, average, optimizer, learning rate, progress."""

    def __init__(self, cfg: Config, devices: Devices | None = None, state: dict | None = None,
                 compute: ComputeConfig | None = None, data: ImageData | None = None):
        """devices: by default those of the settings; state: the checkpoint to go on from; compute: how the network is
        run, by default chosen here; data: images of one's own, instead of the dataset's.

        Raises UserError for data, checkpoint and settings that do not go together.
        """
        devices = devices or Devices(cfg)
        self.devices = devices
        self.device = devices.device
        self.processes = devices.processes
        self.load_images(cfg, data)
        cfg = self.cfg                                           # completed by what the images are
        self.require_same_run()

        # Length and memory, before anything large is made.
        indices, self.val_indices = split(self.data, cfg.val_fraction)
        self.total, _, self.size = training_length(cfg, len(indices))
        if self.size < self.processes.world:
            raise UserError(f"--batch_size {cfg.batch_size} is too small for {self.processes.world} processes")
        self.count_parts("bf16")                                 # raises where the smallest precision does not fit
        if self.device.type == "cpu":
            use_threads(cfg, self.shape, self.null_class)

        # Data and diffusion.
        self.moments = image_moments(self.data, indices, cfg.flip)
        self.batches = Batches(self.data, indices, self.size, cfg.flip, cfg.seed, self.device,
                               self.processes.rank, self.processes.world)
        self.diffusion = build_diffusion(cfg, self.device)

        # The network, and how it is run.
        self.progress = Progress().to(self.device)
        if state:
            network = build_unet(cfg, self.shape[0], self.null_class)
        else:
            network = self.first_network(announce=compute is None)           # else a trial before it has done so
        self.network = network.to(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=False)
        self.compute = compute
        if compute is None:
            self.settle_compute(state["arithmetic"] if state else None)
        self.network.to(memory_format=self.compute.memory_format)
        use_cpu_kernels(self.network, self.compute)
        self.forward = self.build_forward()

        # The average, and the model that draws with it.
        self.ema = build_ema(self.network, cfg, self.size)
        self.model = Model(self.ema.network, self.diffusion, self.moments, cfg, self.shape, self.data.class_names,
                           dataclasses.replace(self.compute, compiled=False))

        self.optimizer = OPTIMIZERS[cfg.optimizer](self.network, PRECISIONS[self.compute.precision],
                                                   betas=cfg.adam_betas, weight_decay=cfg.weight_decay,
                                                   fused=self.device.type in ("cpu", "cuda"))
        self.grad_norm = torch.zeros((), device=self.device)
        self.lr = 0.0                                            # of the last step
        self.guard = Guard()
        self.start_over()
        if state:
            self.resume(state)

    def __repr__(self) -> str:
        """Three lines for people."""
        cfg = self.cfg
        lr = self.optimizer.param_groups[0]["lr"]
        images = f"{len(self.batches.indices):,} images of {describe_images(cfg, self.shape, self.data.class_names)}"
        return "\n".join([
            f"Trainer  {images}",
            f"network  {describe_network(self.network)} on {self.devices}, {self.compute}",
            f"training step {self.step:,} of {self.total:,}, epoch {self.epoch:.4g}, {self.size} images a step, "
            f"{cfg.optimizer}, learning rate {lr:.3g}"])

    def load_images(self, cfg: Config, data: ImageData | None = None) -> None:
        """Load the images; what they settle, size, channels, labels and flips, becomes part of the settings."""
        cfg = settle_dataset(cfg, data)
        if data is not None:
            self.data = select_labels(cfg, data)
        else:
            with self.processes.machine_first():
                self.data = load_data(cfg)
        self.shape = tuple(self.data.images.shape[1:])
        self.null_class = len(self.data.class_names)
        flip = DATASETS[cfg.dataset].flip if cfg.flip is None else cfg.flip
        self.cfg = dataclasses.replace(cfg, flip=flip, use_labels=self.null_class > 0, channels=self.shape[0],
                                       img_size=self.shape[1:])

    def require_same_run(self) -> None:
        """Raise UserError where the processes are about to train with other settings, or on other images."""
        if self.processes.world == 1:
            return
        values = {f"--{name}": format_value(name, getattr(self.cfg, name)) for name in FIELDS if name not in PER_RUN}
        values["images"] = f"{len(self.data.images):,} with the digest {self.data.digest()[:12]}"
        values["classes"] = list_classes(self.data.class_names)
        self.processes.require_same(values, "Give all of them the same flags, and the same images.")

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    @property
    def epoch(self) -> float:
        """Epochs done, counted in steps."""
        return self.step / self.batches.steps_per_epoch

    @property
    def micro_batches(self) -> int:
        """Parts that a step's batch is computed in: those asked for, each in as many as fit into memory."""
        return self.cfg.gradient_accumulation_steps * self.compute.split

    # One step.

    def train_step(self) -> None:
        """One optimizer step on a batch, skipped where loss or gradient is not finite. Nothing here waits for CUDA."""
        # Accumulate gradients.
        loss_sums = self.accumulate_with_oom_retry(self.batch(), self.forward)

        # Clip; decide on the device whether to skip the step.
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.cfg.max_grad_norm or math.inf)
        skip = self.guard.record(self, loss_sums, self.grad_norm)

        # Update weights and their average.
        self.apply_gradients(skip)
        self.lr = self.lr_schedule.get_last_lr()[0]
        self.lr_schedule.step()
        self.progress.step += 1
        self.ema.update(self.network, self.step)

    def batch(self) -> list[Tensor]:
        """This process's slice of a step's batch: x0, t, eps, y, the noise that the network sees."""
        x0, y = self.batches(self.step)
        t, eps, noise, drop = self.step_noise()
        y = torch.where(drop, self.null_class, y)
        x0, eps, noise = (v.contiguous(memory_format=self.compute.memory_format) for v in (x0, eps, noise))
        return [x0, t, eps, y, noise]

    def step_noise(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A step's randomness, a function of (seed, step): t, eps, the noise that the network sees, labels to drop.

        Each process draws timesteps and dropped labels for the whole batch, a number for each image, but noise only for
        its own images. The result does not depend on the number of processes. Timesteps are spread evenly over the
        batch (2107.00630, appendix I.1).
        """
        here = self.batches.rank_slice
        base = derive_seed(self.cfg.seed, STREAM_STEP, self.step)
        random = torch.Generator(self.device).manual_seed(base)
        options = dict(device=self.device, generator=random)
        spread = (torch.arange(self.size, device=self.device) + torch.rand(1, **options)) / self.size
        t = self.diffusion.timesteps(spread)[here]
        drop = torch.rand(self.size, **options)[here] < self.cfg.label_dropout

        # A block of images has noise by (seed, step, its number in the batch).
        blocks = range(here.start // NOISE_BLOCK, math.ceil(here.stop / NOISE_BLOCK))
        kinds = 2 if self.cfg.input_perturbation else 1
        drawn = torch.empty(kinds, len(blocks), NOISE_BLOCK, *self.shape, device=self.device)
        for i, block in enumerate(blocks):
            random.manual_seed(base + 1 + block)
            for noise in drawn[:, i]:
                noise.normal_(generator=random)
        offset = here.start - blocks.start * NOISE_BLOCK
        eps, *further = drawn.flatten(1, 2)[:, offset : offset + here.stop - here.start]

        noise = eps
        if further:                                              # 2301.11706, algorithm 1
            noise = eps + self.cfg.input_perturbation * further[0]
        return t, eps, noise, drop

    def accumulate(self, batch: list[Tensor], forward: Callable) -> Tensor:
        """Add up the gradient of the mean loss, in micro-batches; returns sums of losses and counts, [quartile, 2]."""
        if self.cfg.dropout:
            torch.manual_seed(derive_seed(self.cfg.seed, STREAM_DROPOUT, self.step, self.processes.rank))
        loss_sums = torch.zeros(4, 2, device=self.device)
        world = self.processes.world

        micro_batches = list(zip(*(v.chunk(self.micro_batches) for v in batch)))
        for i, (x0, t, eps, y, noise) in enumerate(micro_batches, 1):
            # Processes exchange gradients once, after the last micro-batch.
            distributed = world > 1 and forward is not self.network
            postpone = distributed and i < len(micro_batches)
            with forward.no_sync() if postpone else nullcontext():
                with self.compute.autocast():
                    losses = self.diffusion.loss(forward, x0, t, eps, y, noise)

                # DistributedDataParallel averages over processes: sum / size * world is the batch's mean. A loss that
                # is not finite makes the gradient nan, whatever its derivative, so that all processes learn of it.
                total = losses.sum()
                scale = torch.where(total.isfinite(), world / self.size, math.nan)
                self.scaler.scale(total * scale).backward()

            quartile = t * 4 // self.diffusion.T
            loss_sums.index_add_(0, quartile, torch.stack([losses.detach(), torch.ones_like(losses)], 1))
        return loss_sums

    def accumulate_with_oom_retry(self, batch: list[Tensor], forward: Callable) -> Tensor:
        """`accumulate`, in twice as many parts, from now on, as long as they do not fit into memory."""
        while True:
            try:
                return self.accumulate(batch, forward)
            except torch.OutOfMemoryError:
                single_images = len(batch[0]) <= self.micro_batches
                others_wait = forward is not self.network and self.processes.world > 1
                if single_images or others_wait:
                    raise

            self.network.zero_grad()
            self.compute = dataclasses.replace(self.compute, split=2 * self.compute.split)
            if forward is not self.network:                      # without graphs, whose memory this one needs
                self.forward = forward = None
                gc.collect()
                self.forward = forward = self.build_forward()
            self.processes.print0(f"out of memory: from here on a step is computed in {self.compute.split} parts")

    def apply_gradients(self, skip: Tensor) -> None:
        """Step the optimizer, unless `skip` is 1 on the device."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)                     # looks for itself
        elif self.optimizer.defaults["fused"]:
            # What GradScaler does with fused optimizers: they skip the update where found_inf is 1, on the device.
            self.optimizer.grad_scale = None
            self.optimizer.found_inf = skip
            self.optimizer.step()
        elif not skip:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    # How it is run.

    def build_forward(self) -> Callable:
        """The network as a step calls it: compiled, as CUDA graphs where that pays, spread over devices."""
        return self.devices.parallel(self.network, self.compute, self.graph_inputs())

    def graph_inputs(self) -> tuple[Tensor, ...]:
        """Inputs of the network for CUDA graphs of a step to be captured with; empty where there are to be none.

        Graphs save launches, which is what counts in small steps. The gradients of several parts cannot add up in them.
        """
        cfg = self.cfg
        positions = self.size * math.prod(self.shape[1:]) // cfg.patch_size**2
        own_step = type(self).accumulate is not Trainer.accumulate           # it may call the network as it likes
        if self.device.type != "cuda" or self.devices.count > 1 or positions > 2**18:
            return ()
        if self.micro_batches > 1 or cfg.gradient_checkpointing or own_step:
            return ()
        x0, t, _, y, _ = self.batch()
        return x0, t, y

    def count_parts(self, precision: str) -> tuple[int, str]:
        """Parts in which a micro-batch fits into memory, and what to say of it. Raises UserError."""
        batch = math.ceil(self.size / (self.devices.count * self.cfg.gradient_accumulation_steps))
        return plan_memory(self.cfg, self.shape, self.null_class, batch, precision, self.device)

    def settle_compute(self, stored: dict | None) -> None:
        """Settle how this run computes: as it did so far, else what suits the device, in parts that fit into memory."""
        calls = self.total * self.cfg.gradient_accumulation_steps
        self.compute = choose_compute(self.cfg, self.device, calls, stored)
        if self.device.type == "cpu":
            parts, warning = self.count_parts(self.compute.precision)
            if stored and stored["device"] == "cpu":             # in as many as before, so that the result is the same
                warning = warning if parts > self.compute.split else ""
                parts = self.compute.split
            if warning:
                self.processes.print0(f"memory   {warning}")
            self.compute = dataclasses.replace(self.compute, split=parts)
        elif self.device.type == "cuda" and self.devices.replicas == 1:
            self.try_a_step()

        # Machines may differ: all processes compute like the first, in as many parts as the smallest needs.
        precisions = list(PRECISIONS)
        first = self.processes.broadcast(precisions.index(self.compute.precision))
        split = self.processes.largest(self.compute.split)
        self.compute = dataclasses.replace(self.compute, precision=precisions[first], split=split)

    def try_a_step(self) -> None:
        """Find out in how many parts a step fits, with room for what training keeps beside it."""
        room = [torch.empty_like(p) for p in self.network.parameters() for _ in range(4)]
        self.accumulate_with_oom_retry(self.batch(), self.network)
        self.network.zero_grad()
        del room

    # Beginning, resuming, saving.

    def first_network(self, announce: bool = True) -> UNet:
        """The network of step 0: by the seed, and with the weights of another run where they are asked for."""
        torch.manual_seed(derive_seed(self.cfg.seed))
        network = build_unet(self.cfg, self.shape[0], self.null_class)
        if self.cfg.init_from:
            state = self.processes.from_main(partial(load_checkpoint, self.cfg.init_from))
            text = load_pretrained(network, state)
            if announce:
                self.processes.print0(f"weights  of {self.cfg.init_from}, step {state['step']:,}; {text}")
        return network

    def start_over(self) -> None:
        """Stand at step 0; the weights are those that the network has."""
        self.progress = Progress().to(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.compute.precision == "fp16")
        self.optimizer.state.clear()
        self.set_total_steps(self.total)

    def resume(self, state: dict) -> None:
        """Go on from a checkpoint's state; what its optimizer learned is kept, the settings are this run's.

        Raises UserError where it was trained on other images.
        """
        self.check_same_data(state)
        self.network.load_state_dict(state["model"])
        self.ema.network.load_state_dict(averaged_weights(state))

        # Adam's moments and Muon's do not stand for each other.
        before = {**dataclasses.asdict(self.cfg), **state["config"]}
        learned = state["optimizer"]["state"]
        if (before["optimizer"] == "muon") != (self.cfg.optimizer == "muon"):
            learned = {}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(dict(state=learned, param_groups=groups))
        for p, kept in self.optimizer.state.items():             # fused steps want them laid out as the weights are
            for name, value in kept.items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
                    kept[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        if state["scaler"]:                                      # empty unless it was fp16 as well
            self.scaler.load_state_dict(state["scaler"])

        self.progress = Progress.from_checkpoint(state, self.device)
        if not self.processes.is_main:                           # the sums are those of all processes
            self.progress.loss_sums.zero_()

        # Losses under other settings cannot be compared with those before.
        now = dataclasses.asdict(self.cfg)
        if any(before[name] != now[name] for name in OF_THE_LOSS):
            self.progress.baseline_step = self.step

        # Another learning rate is taken as it is, without the halvings of the one before.
        if before["learning_rate"] != now["learning_rate"]:
            self.progress.lr_halvings = 0
        self.set_total_steps(self.total)

    def check_same_data(self, state: dict) -> None:
        """Raise UserError for a checkpoint that was trained on other images."""
        names = state["class_names"]
        if tuple(state["shape"]) != self.shape:
            other = f"images {state['shape']}, the data has {list(self.shape)}"
        elif names != self.data.class_names:
            theirs, ours = (list_classes(some)[:100] or "no classes" for some in (names, self.data.class_names))
            other = f"{theirs}, the data has {ours}"
        elif state["config"].get("random_crop", False) != self.cfg.random_crop:
            ways = {True: "images cropped at random places", False: "images cropped to the middle"}
            other = f"{ways[not self.cfg.random_crop]}, these are {ways[self.cfg.random_crop]}"
        elif state["data"] != self.data.digest():
            other = "other images than these"
        else:
            return
        raise UserError(f"the checkpoint was trained on {other}: start another run with --experiment_name NAME or "
                        "--resume never, from these weights with --init_from CHECKPOINT")

    def set_total_steps(self, total: int) -> None:
        """Make it a run of `total` steps: the learning rate goes on from where such a run would stand by now."""
        scale = self.devices.count if self.cfg.scale_lr else 1
        lr = self.cfg.learning_rate * scale / 2**self.progress.lr_halvings
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["initial_lr"] = lr

        warmup = min(total // 10, 1000) if self.cfg.warmup_steps is None else self.cfg.warmup_steps
        cycles = self.cfg.lr_cycles or 4
        self.lr_schedule = LR_SCHEDULES[self.cfg.lr_schedule](self.optimizer, lr, warmup, total, cycles)
        self.total = total
        # A checkpoint keeps the number of steps, which the clock may have changed; a run by epochs keeps its epochs.
        if self.cfg.iterations:
            self.cfg = dataclasses.replace(self.cfg, iterations=total)
        if self.step:
            self.lr_schedule.last_epoch = min(self.step, total) - 1
            with warnings.catch_warnings():                      # it expects the optimizer to go first
                warnings.simplefilter("ignore")
                self.lr_schedule.step()

    def gathered_losses(self) -> Tensor:
        """The sums of losses and counts over all processes, [2, 4, 2]. Called by all of them."""
        return self.processes.sum_(self.progress.loss_sums.clone())

    def state(self) -> dict:
        """The content of a checkpoint of this run. Called by all processes, for the sums of each."""
        sums = self.gathered_losses()
        numbers = {**self.progress.entries(), "meter": sums}
        return new_checkpoint(
            **numbers, config=dataclasses.asdict(self.cfg), epoch=self.epoch, shape=list(self.shape),
            class_names=self.data.class_names, data=self.data.digest(), moments=vars(self.moments),
            good=self.guard.is_healthy(self.progress, sums[0]), arithmetic=vars(self.compute),
            model=self.network.state_dict(),
            ema=self.ema.network.state_dict() if self.cfg.use_ema else None, optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            lr_schedule=dict(name=self.cfg.lr_schedule, step=self.step, total_steps=self.total))


class Guard:
    """Watches a run for divergence: counts steps that are not finite, judges losses against their range, goes back."""

    MAX_NONFINITE_STEPS = 10                                     # in a row
    MAX_HALVINGS = 3                                             # of the learning rate

    # Rows of metrics.csv: a loss is an outlier if it is above OUTLIER_FACTOR times the largest of the RANGE_ROWS before
    # it, of which the OUTLIERS_IGNORED largest do not count.
    OUTLIER_ROWS = 10
    RANGE_ROWS = 20
    OUTLIER_FACTOR = 1.5
    OUTLIERS_IGNORED = 3

    def record(self, trainer: Trainer, loss_sums: Tensor, grad_norm: Tensor) -> Tensor:
        """Add up a step's losses, [quartile, 2], and count it where it is not finite; all of it on the device.

        Returns 1 where the step is to be skipped, else 0. In fp16 a gradient may overflow: GradScaler skips such a step
        and lowers its scale, so only a loss that is not finite counts.
        """
        progress = trainer.progress
        scaler = trainer.scaler
        finite = loss_sums.isfinite().all().float()
        progress.loss_sums += torch.where(finite > 0, loss_sums, 0.0)

        if scaler.is_enabled():
            if trainer.processes.world > 1:
                torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
            skip = 1 - finite
        else:
            skip = 1 - grad_norm.isfinite().float()
        in_a_row, longest, in_all = progress.nonfinite_steps
        in_a_row = (in_a_row + 1) * skip
        progress.nonfinite_steps = torch.stack([in_a_row, torch.maximum(longest, in_a_row), in_all + skip])
        return skip

    def count_loss_outliers(self, progress: Progress) -> int:
        """How many of the last logged losses, up to OUTLIER_ROWS, are all far above the range of those before them."""
        rows = progress.loss_history[-self.OUTLIER_ROWS - self.RANGE_ROWS :]
        losses = [loss for step, loss in rows if step > progress.baseline_step and math.isfinite(loss)]
        for n in range(min(self.OUTLIER_ROWS, len(losses) - self.RANGE_ROWS), 0, -1):
            before = sorted(losses[-n - self.RANGE_ROWS : -n])
            top = before[-1 - self.OUTLIERS_IGNORED]
            if min(losses[-n:]) > self.OUTLIER_FACTOR * top:
                return n
        return 0

    def is_healthy(self, progress: Progress, since_log: Tensor) -> bool:
        """Whether the loss is finite and in its range, so that a checkpoint made now is worth going back to.

        since_log: the sums of losses and counts since the last row, [4, 2], which are judged like a row.
        """
        loss = mean_loss(since_log.tolist())
        if math.isfinite(loss):
            rows = [*progress.loss_history, [progress.step, loss]]
            progress = dataclasses.replace(progress, loss_history=rows)
        return self.count_loss_outliers(progress) == 0 and not progress.nonfinite_steps[0]

    def diagnose(self, trainer: Trainer, logged: bool) -> str:
        """Why the run cannot go on like this; empty where all is well. Waits for the device.

        Losses are judged when a row of them has been `logged`, so that a checkpoint in between changes nothing.
        """
        finite = torch.stack([p.isfinite().all() for p in trainer.network.parameters()])
        if not finite.all():
            return "weights are not finite"
        if not logged:
            return ""

        # The longest series since the last row; one that goes on counts for the next row, too.
        nonfinite = trainer.progress.nonfinite_steps
        longest = int(nonfinite[1])
        nonfinite[1] = nonfinite[0]
        if longest >= self.MAX_NONFINITE_STEPS:
            return f"the loss or its gradient was not finite in {longest} steps in a row"
        if trainer.scaler.is_enabled() and trainer.scaler.get_scale() < 1:
            return "gradients overflow in fp16 at any scale"
        if self.count_loss_outliers(trainer.progress) == self.OUTLIER_ROWS:
            return f"the loss has been far above its range for {self.OUTLIER_ROWS} rows of metrics.csv"
        return ""

    def roll_back(self, trainer: Trainer, reason: str, last_good: Path | None) -> None:
        """Go back to the checkpoint `last_good`, or to another good one of this run, or to the beginning.

        With half the learning rate; raises UserError after three times.
        """
        diverged_at = trainer.step
        halvings = trainer.progress.lr_halvings + 1
        if halvings > self.MAX_HALVINGS:
            raise UserError(f"training has diverged for the fourth time, by step {diverged_at}: {reason}.\nThe last "
                            "good checkpoint is as it was: lower --learning_rate or use --precision fp32.", code=1)

        def load_good() -> dict | None:
            paths = [last_good] if last_good else []
            states = filter(is_good, map(try_load, paths + kept_checkpoints(trainer.cfg)))
            return next((state for state in states if same_run(trainer.cfg, state)), None)

        state = trainer.processes.from_main(load_good)
        if state:
            trainer.resume(state)
        else:
            trainer.network.load_state_dict(trainer.first_network(announce=False).state_dict())
            trainer.ema.network.load_state_dict(trainer.network.state_dict())
            trainer.start_over()

        halvings = max(halvings, trainer.progress.lr_halvings + 1)
        trainer.progress.lr_halvings = min(halvings, self.MAX_HALVINGS)
        trainer.set_total_steps(trainer.total)
        part = 0.5**trainer.progress.lr_halvings
        trainer.processes.print0(f"step {diverged_at}: {reason}; going on from step {trainer.step} with {part:g} times "
                                 "the learning rate")


SCORED_IMAGES = 300                                              # drawn for a score


def find_judge(cfg: Config, devices: Devices, data: ImageData | None) -> ReferenceStats | None:
    """The judge of what is drawn in training, the one that evaluate.py keeps, or else it is trained here; for rank 0.

    data: images of one's own. Raises UserError.
    """
    with devices.processes.machine_first():
        if data is None:
            real = real_images(cfg, load_data(cfg))
        else:
            real = Reference("images", *divide(select_labels(cfg, data)))
    if len(real.train.images) <= FEATURES:
        raise UserError(f"--score_every: {len(real.everything().images)} images are too few to judge others by: "
                        f"it takes {math.ceil(1.2 * FEATURES)}")
    if not devices.processes.is_main:
        return None

    bf16 = pick_precision(Config(), devices.device) == "bf16"
    on_gpu = [devices.device] if devices.device.type == "cuda" else []
    with torch.random.fork_rng(on_gpu):                          # the run's own numbers stay what they are
        return ReferenceStats(real, cfg.data_dir, devices.device, bf16)


class Monitor:
    """What is seen of a run: rows of metrics, validation, scores, grids of samples, the report.

    logger, judge: of rank 0 alone.
    """

    def __init__(self, trainer: Trainer, logger: MetricsLogger | None, folder: Path,
                 judge: ReferenceStats | None = None):
        self.trainer = trainer
        self.logger = logger
        self.folder = folder
        self.judge = judge
        self.distance = math.inf                                 # of the last score
        self.best_distance = math.inf                            # of the checkpoint at best_path
        self.timed_steps = 0                                     # since the last row
        self.timed_seconds = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Count time from here: drawing and saving are not training."""
        self.clock_step = self.trainer.step
        self.clock_time = time.perf_counter()

    def stop_clock(self) -> None:
        """Count the steps and the time up to here. The device has finished its work."""
        self.timed_steps += self.trainer.step - self.clock_step
        self.timed_seconds += time.perf_counter() - self.clock_time

    def log(self, due: Due) -> float:
        """Write a row of metrics, with validation loss and score where they are due; returns the epoch's mean loss."""
        trainer = self.trainer
        since_log, since_epoch = trainer.gathered_losses().tolist()
        self.stop_clock()
        loss = mean_loss(since_log)
        trainer.progress.loss_history.append([trainer.step, loss])
        trainer.progress.loss_sums[0] = 0

        if self.logger:
            # To add a metric, name it here: metrics.csv, the trackers and the report then have it.
            quartiles = [mean_loss([row]) for row in since_log]
            images = self.timed_steps * trainer.size
            values = dict(
                step=trainer.step,
                epoch=round(trainer.epoch, 4),
                loss=loss,
                loss_q1=quartiles[0],
                loss_q2=quartiles[1],
                loss_q3=quartiles[2],
                loss_q4=quartiles[3],
                val_loss=self.validate() if due.validate else "",
                **(self.score() if due.score else {}),
                lr=trainer.lr,
                grad_norm=trainer.grad_norm.item(),
                images_per_second=images / self.timed_seconds,
                seconds=self.timed_seconds,
                skipped_steps=int(trainer.progress.nonfinite_steps[2]),
            )
            rounded = {name: round_digits(value) for name, value in values.items()}
            self.logger.log(dict(rounded, epoch=values["epoch"]))
        self.timed_steps = 0
        self.timed_seconds = 0.0
        self.restart_clock()
        return mean_loss(since_epoch)

    def epoch_loss(self) -> float:
        """The mean loss since the epoch began. Called by all processes; waits for the device."""
        return mean_loss(self.trainer.gathered_losses()[1].tolist())

    @torch.no_grad()
    def validate(self) -> float | str:
        """Mean loss over the held-out images, with the same noise and timesteps every time.

        Timesteps are spread evenly over the density that training draws from, as in Trainer.step_noise, so that both
        losses estimate the same quantity.
        """
        trainer = self.trainer
        n = len(trainer.val_indices)
        if n == 0:
            return ""
        random = generator(trainer.cfg.seed, STREAM_VALIDATION)
        spread = (torch.arange(n) + 0.5) / n
        t = trainer.diffusion.timesteps(spread.to(trainer.device)).cpu()
        t = t[torch.randperm(n, generator=random)]               # images may be sorted by class
        total = 0.0
        with trainer.compute.autocast():
            for piece in torch.arange(n).split(trainer.cfg.batch_size):
                chosen = trainer.val_indices[piece]
                x0 = from_uint8(trainer.data.images[chosen])
                eps = torch.randn(x0.shape, generator=random)
                batch = [v.to(trainer.device) for v in (x0, t[piece], eps, trainer.data.labels[chosen])]
                total += trainer.diffusion.loss(trainer.ema.network, *batch).sum().item()
        return total / n

    def find_best(self) -> None:
        """Look up what the best checkpoint's distance is, where a run is gone on with."""
        state = try_load(best_path(self.trainer.cfg), peek=True)
        if state and self.trainer.step:
            self.best_distance = state["best_distance"]

    def score(self) -> dict[str, float]:
        """Accuracy and distance of images drawn as after training."""
        trainer = self.trainer
        classes = range(0, trainer.null_class, max(1, math.ceil(trainer.null_class / SCORED_IMAGES)))
        labels = trainer.model.labels(list(classes), SCORED_IMAGES)
        images = torch.cat(list(draw_with_bar(trainer.model, labels, trainer.cfg)))
        scores = self.judge.scores(images, torch.tensor(labels))
        self.distance = scores["distance"]
        return {name: scores[name] for name in ("accuracy", "distance") if name in scores}

    def preview_config(self) -> Config:
        """The settings of what is drawn in training."""
        cfg = self.trainer.cfg
        return dataclasses.replace(cfg, sampler="dpmpp", steps=min(cfg.preview_steps, cfg.timesteps))

    def grid_plan(self) -> tuple[list[int], int]:
        """The classes that grids show, at most ten, and how many images of each, or in all without classes."""
        classes = list(range(min(self.trainer.null_class, 10)))
        return classes, self.trainer.cfg.num_generations or (4 if classes else 16)

    def draw_grid(self, loss: float) -> Path:
        """A grid of samples, epoch and loss in its name; a denoising strip beside it where asked for."""
        trainer = self.trainer
        cfg = self.preview_config()
        classes, rows = self.grid_plan()
        labels = trainer.model.labels(classes, rows * max(1, len(classes)))

        images = torch.cat(list(draw_with_bar(trainer.model, labels, cfg)))
        path = self.folder / f"epoch_{round(trainer.epoch, 2):g}_loss_{loss:.4f}.png"
        save_grid(images, path, [trainer.data.class_names[c] for c in classes])
        if cfg.plot_freq_interval:
            every_step = dataclasses.replace(cfg, steps=cfg.timesteps)
            save_strip(trainer.model, labels[:rows], every_step, self.folder / f"step_{trainer.step}.png")
        return path

    def draw_real(self) -> None:
        """real.png: images of the training data, by class as in the grids of samples, to compare those with."""
        trainer = self.trainer
        path = self.folder / "real.png"
        if path.exists():                                        # drawn before the run was resumed
            return
        classes, rows = self.grid_plan()
        indices = trainer.batches.indices
        labels = trainer.data.labels[indices]

        # Evenly chosen in each class; white where a class has fewer than a column holds.
        columns = []
        for c in classes or [0]:
            own = indices[labels == c] if classes else indices
            some = own[torch.arange(rows) * len(own) // rows] if len(own) > rows else own
            white = torch.full((rows, *trainer.shape), 255, dtype=torch.uint8)
            white[: len(some)] = trainer.data.images[some]
            columns.append(white)
        images = torch.stack(columns, 1).flatten(0, 1)
        save_grid(images, path, [trainer.data.class_names[c] for c in classes])

    def show_grid(self, loss: float) -> None:
        """Draw a grid of samples and say where it is."""
        trainer = self.trainer
        picture = self.draw_grid(loss)
        self.logger.track(trainer.step, {"samples": picture})
        trainer.processes.print0(f"epoch {trainer.epoch:.4g}, step {trainer.step}: loss {loss:.4f}, {picture}")

    def plateaued(self) -> bool:
        """Whether the mean absolute change of the last ten logged losses is below the one asked for."""
        progress = self.trainer.progress
        recent = [loss for step, loss in progress.loss_history if step > progress.baseline_step][-10:]
        changes = [abs(b - a) for a, b in zip(recent, recent[1:])]
        return len(recent) == 10 and sum(changes) / len(changes) < self.trainer.cfg.early_stop_loss_change

    def write_report(self) -> None:
        """Write report.html, with a strip from noise to image where the run has drawn none.

        If it fails, the run is none the worse.
        """
        trainer = self.trainer
        try:
            from report import write_report

            if not trainer.cfg.plot_freq_interval:
                labels = trainer.model.labels(list(range(min(trainer.null_class, 5))), 5)
                save_strip(trainer.model, labels, self.preview_config(), self.folder / f"step_{trainer.step}.png")
            trainer.processes.print0(f"report   {write_report(self.folder)}")
        except Exception as error:
            warn(f"no report: {first_line(error)}")


def mean_loss(sums: list[list[float]]) -> float:
    """The mean from rows of (sum of losses, count); nan where every step was skipped."""
    total = sum(loss for loss, _ in sums)
    count = sum(n for _, n in sums)
    return total / count if count else math.nan


def round_digits(value: float | int | str) -> float | int | str:
    """A float to six digits, as it is written down."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


# A run of so many minutes.


class Pace:
    """Ends a run by a deadline: the pace of machines changes, so its length is set anew on the way.

    deadline: a perf_counter; None: the run has its length. The clock is looked at after a tenth of the steps, and then
    whenever half of those that were left are done.
    """

    def __init__(self, trainer: Trainer, deadline: float | None):
        self.deadline = deadline
        self.told = deadline is not None                         # how long it will take
        self.restart(trainer)

    def restart(self, trainer: Trainer) -> None:
        """Measure from here: the run has begun, or gone back."""
        self.start_step = trainer.step + 1                       # the first one takes longer and does not count
        self.next_check = trainer.step + max(2, (trainer.total - trainer.step) // 10)

    def take_time(self, trainer: Trainer) -> None:
        """Note the time after each step from which the pace is measured."""
        if trainer.step == self.start_step:
            self.start_time = time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Whether to look at the clock after this step."""
        return self.deadline is not None and step >= self.next_check

    def steps_left(self, step: int) -> int:
        """How many more steps fit."""
        now = time.perf_counter()
        seconds_a_step = (now - self.start_time) / (step - self.start_step)
        return int((self.deadline - now) / seconds_a_step)

    def plan_check(self, trainer: Trainer) -> None:
        """Set the next look at the clock, after one; there is none in the last twentieth of the run."""
        left = trainer.total - trainer.step
        self.next_check = trainer.step + (left // 2 if left > trainer.total // 20 else left)

    def tell_time(self, trainer: Trainer) -> str:
        """What to say, once, of how long the run will take, by its first seconds; empty at all other times."""
        steps = trainer.step - self.start_step
        if self.told or steps < 3:
            return ""
        now = time.perf_counter()
        if now - self.start_time < 2:
            return ""
        self.told = True
        seconds = (now - self.start_time) / steps
        left = trainer.total - trainer.step
        return f"time     about {duration(left * seconds)} for {left:,} steps of {duration(seconds)}"


USABLE_SECONDS = 57                                              # of a minute of --train_minutes: some slack


def seconds_of(trainer: Trainer, work: Callable) -> float:
    """How long work() takes, with all that the device has to do for it."""
    before = time.perf_counter()
    work()
    float(trainer.grad_norm)                                     # waits for the device
    return time.perf_counter() - before


ENDLESS = 10**9                                                  # steps of a run by minutes, until its pace is known


def steps_for_minutes(cfg: Config, devices: Devices, state: dict | None, deadline: float,
                      data: ImageData | None = None,
                      judge: ReferenceStats | None = None) -> tuple[Config, ComputeConfig, float]:
    """How long a run by minutes is: by a few real steps, a validation, a grid and a score of a copy, thrown away after.

    Returns the configuration with as many iterations as fit until the deadline (a perf_counter), how the trial
    computed, and the seconds that the end of the run takes after its last step.
    """
    endless = dataclasses.replace(cfg, iterations=ENDLESS)
    trainer = Trainer(endless, devices, copy.deepcopy(state), data=data)
    first = trainer.step

    measure = partial(seconds_of, trainer)
    step = statistics.median_high(measure(trainer.train_step) for _ in range(8))
    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(trainer, None, Path(folder), judge)
        validation = measure(monitor.validate)
        grid = measure(lambda: monitor.draw_grid(0.0))
        score = measure(monitor.score) if judge else 0.0

    per_epoch = trainer.batches.steps_per_epoch
    between_grids = cfg.checkpoint_rate or (cfg.sample_every or 1) * per_epoch
    if not cfg.checkpoint_rate and cfg.sample_every is None:
        between_grids = max(between_grids, Cadence.pause(grid) / step)
    between_validations = max(cfg.log_every, min(between_grids, per_epoch))
    each = step + validation / between_validations + grid / between_grids
    if cfg.score_every:
        each += score / max(cfg.log_every, cfg.score_every * per_epoch)
    end = validation + grid + score
    left = deadline - end - time.perf_counter()
    steps = max(1, devices.processes.broadcast(int(left / each)))
    devices.processes.print0(f"{step * 1000:.3g} ms a step: {steps:,} steps fit into {cfg.train_minutes:g} minutes")
    return dataclasses.replace(cfg, iterations=first + steps), trainer.compute, end


class TrialTrainer(Trainer):
    """A trainer whose steps take only `part` of a batch, to find out how long a whole one takes."""

    part = 1

    def batch(self) -> list[Tensor]:
        return [values[: self.part] for values in super().batch()]


TRIAL_WORK = 1e11                                                # operations of a CPU that may take a second or two


def time_a_step(cfg: Config, devices: Devices, shape: tuple[int, int, int], num_classes: int) -> float | None:
    """Seconds that a step takes here, from a few real ones on made-up images; None where that would take long.

    With as many images, up to a batch, as are done within half a second, or with four.
    """
    network = network_size(cfg, shape, num_classes)
    work = 3 * network.operations                                # of an image, forwards and backwards
    budget = TRIAL_WORK if devices.device.type == "cpu" else 100 * TRIAL_WORK
    if work + 100 * network.parameters > budget:
        return None

    size = cfg.batch_size * cfg.gradient_accumulation_steps
    batch = max(devices.count, min(size, int(budget / work)))
    images = torch.randint(256, (16, *shape), dtype=torch.uint8)
    data = ImageData(images, torch.zeros(16, dtype=torch.int64), [str(i) for i in range(num_classes)])
    trial = dataclasses.replace(cfg, batch_size=batch, gradient_accumulation_steps=1, iterations=1000, init_from="",
                                compile=False, random_crop=False, val_fraction=0.0)
    trainer = TrialTrainer(trial, devices, data=data)

    def measure() -> float:                                      # by rank 0's clock: all do as many
        return devices.processes.broadcast(int(1e9 * seconds_of(trainer, trainer.train_step))) / 1e9

    measure()                                                    # the first one takes longer
    seconds = measure()
    here = batch // devices.processes.world                      # images of this process
    while trainer.part < here and (seconds < 0.4 or trainer.part < 4):
        trainer.part = min(here, 4 * trainer.part)
        trainer.forward = trainer.build_forward()
        seconds = measure()

    times = [seconds]
    while len(times) < 10 and sum(times) + seconds < 0.5:
        times.append(measure())
    return statistics.median(times) * size / (trainer.part * devices.processes.world)


# The run.


def train(cfg: Config, devices: Devices | None = None, data: ImageData | None = None) -> Path:
    """Train as configured, going on from find_resume_checkpoint's; returns the last checkpoint.

    data: images of one's own, instead of the dataset's. Raises UserError.
    """
    cfg = settle_dataset(cfg, data)
    devices = devices or Devices(cfg)
    processes = devices.processes
    signals = Signals(processes)
    with signals.catch(*save_signals()), run_lock(cfg) if processes.is_main else nullcontext():
        processes.barrier()                                      # until rank 0 holds the lock
        path = train_locked(cfg, devices, signals, data)
        processes.barrier()                                      # until rank 0 has saved its last checkpoint
        return path


def train_locked(cfg: Config, devices: Devices, signals: Signals, data: ImageData | None) -> Path:
    """What train does once nobody else may write to the run's files."""
    processes = devices.processes
    # Once more, now under the lock and read in full: a command line has only had a look.
    path, state = processes.from_main(partial(find_resume_checkpoint, cfg, dataclasses.asdict(cfg), processes))
    require_furthest(cfg, state, processes)

    judge = find_judge(cfg, devices, data) if cfg.score_every else None

    # The length of a run of so many minutes.
    deadline = compute = None
    if cfg.train_minutes and state and state["config"].get("train_minutes") == cfg.train_minutes:
        cfg = dataclasses.replace(cfg, iterations=state["config"]["iterations"])
    elif cfg.train_minutes:
        deadline = time.perf_counter() + USABLE_SECONDS * cfg.train_minutes
        cfg, compute, end = steps_for_minutes(cfg, devices, state, deadline, data, judge)
        deadline -= end                                          # of the steps
        gc.collect()                                             # the trial's graphs refer to each other

    trainer = Trainer(cfg, devices, state, compute, data)
    del state                                                    # of twice the size of the network and more
    folder = samples_path(cfg)
    if processes.is_main:
        set_earlier_run_aside(cfg, path, folder, processes)
    announce(trainer, path)

    logger = start_logger(trainer, folder) if processes.is_main else None
    monitor = Monitor(trainer, logger, folder, judge)
    monitor.find_best()
    if logger and cfg.report:                                    # it stands beside the samples there
        warn_on_oserror(str(folder / "real.png"), monitor.draw_real)
    hide_bar = None                                              # tqdm hides it where there is no terminal
    if not processes.is_main or trainer.step >= trainer.total:
        hide_bar = True
    try:
        # Before this Ctrl-C ends the process at once: there is nothing to save yet.
        with (signals.catch(*stop_signals()),
              tqdm(total=trainer.total, initial=trainer.step, unit="step", dynamic_ncols=True,
                   disable=hide_bar) as bar):
            path = TrainingLoop(trainer, monitor, signals, bar, Pace(trainer, deadline), path).run()
    finally:
        if logger:
            logger.close(dataclasses.asdict(trainer.cfg), run_facts(trainer))
    if logger and cfg.report:
        monitor.write_report()
    return path


def require_furthest(cfg: Config, state: dict | None, processes: Processes) -> None:
    """Raise UserError where another machine has a later part of this run than rank 0, which would train it anew."""
    own = 0
    if processes.world > 1 and cfg.resume == "auto" and not cfg.resume_from_checkpoint:
        checkpoint = next(filter(None, map(partial(try_load, peek=True), kept_checkpoints(cfg))), None)
        if checkpoint and same_run(cfg, checkpoint):
            own = checkpoint["step"]

    # Where all see the same disk, all see the same step, even if that checkpoint turned out to be damaged.
    (ours, here), *others = processes.gather((own, platform.node()))
    furthest, place = max(others, default=(0, here))
    if furthest > max(ours, state["step"] if state else 0):
        raise UserError(f"{place} has this run's checkpoint of step {furthest:,}, and the machine of rank 0, {here}, "
                        "none so late: copy it there, or start over with --resume never, or --experiment_name NAME")


def set_earlier_run_aside(cfg: Config, path: Path | None, folder: Path, processes: Processes) -> None:
    """Rename the files of another run that stand where this one's go. path: the checkpoint that it goes on from."""
    own = [place for place in (*kept_checkpoints(cfg), best_path(cfg)) if place.is_file()]
    goes_on = path and path.resolve() in [place.resolve() for place in own]

    begins_with = Path(cfg.init_from).resolve() if cfg.init_from else None

    def move(place: Path, old: Path) -> None:
        """Rename a file or folder; what this run begins with stays too, for the same command to begin with again."""
        if begins_with not in (place.resolve(), (place / "model.pt").resolve()):
            place.rename(old)
        elif place.is_dir():
            shutil.copytree(place, old)
        else:
            shutil.copy2(place, old)

    def set_aside(place: Path) -> None:
        name, suffix = (place.name, "") if place.is_dir() else (place.stem, place.suffix)
        old = unused_path(place.parent, f"{name}_old", suffix)
        move(place, old)
        processes.print0(f"kept an earlier run's {place} as {old.name}")

    if folder.is_dir() and any(folder.iterdir()) and (not goes_on or is_of_other_checkpoints(folder, cfg)):
        set_aside(folder)
    if goes_on or not own:
        return
    if not cfg.experiment_name:
        for place in own:
            set_aside(place)
        return

    # Of an experiment's folder only what is this run's: others may be named after it, NAME/...
    home = checkpoint_path(cfg, 0).parents[1]
    old = unused_path(home.parent, f"{home.name}_old")
    old.mkdir()
    for place in own:
        move(place.parent, old / place.parent.name)
    processes.print0(f"kept an earlier run's {home} as {old.name}")


def is_of_other_checkpoints(folder: Path, cfg: Config) -> bool:
    """Whether a folder of samples belongs to a run with another name or --working_directory, which is still there."""
    with suppress(OSError, ValueError, TypeError, KeyError):     # not there, or of somebody's own making
        stored = read_json_object(folder / "config.json")["config"]
        places = {name: stored[name] for name in ("working_directory", "experiment_name")}
        other = dataclasses.replace(cfg, **places)
        apart = checkpoint_path(other, 0).resolve() != checkpoint_path(cfg, 0).resolve()
        return apart and bool(kept_checkpoints(other))
    return False


def announce(trainer: Trainer, path: Path | None) -> None:
    """Say what is about to happen."""
    cfg = trainer.cfg
    print0 = trainer.processes.print0
    images = len(trainer.batches.indices)
    print0(describe_run(cfg, trainer.devices, trainer.shape, trainer.null_class, images, trainer.compute))

    others = Path(cfg.working_directory).glob(f"diffusion_checkpoint_{cfg.dataset}_[0-9]*.pt")
    others = newest_first(p for p in others if "_old" not in p.stem and not is_best(p))
    if trainer.step:
        print0(f"resuming from {path} at step {trainer.step} of {trainer.total}")
        if cfg.experiment_name and not cfg.resume_from_checkpoint:
            for later in kept_checkpoints(cfg):                  # copied in another order
                step = later.parent.name.removeprefix("checkpoint_")
                if step.isdecimal() and int(step) > trainer.step:
                    print0(f"{later} is of a later step, but an older file: --resume_from_checkpoint "
                           f"{later.parent.name} goes on from it")
        if trainer.step >= trainer.total:
            print0("nothing is left to train: a greater length goes on, --resume never begins anew")
    elif others and cfg.resume == "auto" and not cfg.experiment_name:
        print0(f"starting a new run: other settings than those of {others[0]}")


def start_logger(trainer: Trainer, folder: Path) -> MetricsLogger:
    """What the run reports to: its folder and the trackers asked for."""
    cfg = trainer.cfg
    options = dataclasses.asdict(cfg)
    machine = trainer.devices.machine_info(trainer.compute)
    logger = MetricsLogger(folder, options, trainer.step, machine, run_facts(trainer))
    if cfg.use_tensorboard:
        logger.start_tracker("tensorboard", lambda: TensorBoard(folder, options, trainer.step))
    if cfg.use_wandb:
        name = cfg.experiment_name or folder.name
        logger.start_tracker("wandb", lambda: WeightsAndBiases(
            folder, options, logger.run_id, name, cfg.project_name, cfg.wandb_mode))
    return logger


def run_facts(trainer: Trainer) -> dict:
    """What config.json says of a run beside its options: what was chosen, how to repeat it, sizes."""
    cfg = trainer.cfg
    return dict(chosen=chosen_options(cfg), command=repeating_command(cfg),
                parameters=count_parameters(trainer.network), images=len(trainer.batches.indices),
                shape=list(trainer.shape), classes=len(trainer.data.class_names))


@dataclass
class Due:
    """What is due after a step."""

    log: bool = False
    validate: bool = False                                       # in that row
    score: bool = False                                          # in that row, too
    grid: bool = False
    save: bool = False
    epoch_ends: bool = False


class Cadence:
    """Says when it is time again for what takes a while, a grid or a checkpoint, where nobody has said how often.

    By the clock: epochs of small sets of images are over in a moment.
    """

    SHARE = 1 / 20                                               # of a run's time, at most
    PAUSE = 15.0                                                 # seconds, at least

    def __init__(self):
        self.due_at = time.perf_counter() + self.PAUSE

    @classmethod
    def pause(cls, seconds: float) -> float:
        """Seconds until the next one, after one that took so long."""
        return max(cls.PAUSE, seconds / cls.SHARE)

    def is_time(self, processes: Processes) -> bool:
        """Whether the next one is due; all processes of a run get the same answer."""
        return bool(processes.broadcast(int(time.perf_counter() >= self.due_at)))

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Time what is done in this context, which settles when the next one is due."""
        before = time.perf_counter()
        yield
        now = time.perf_counter()
        self.due_at = now + self.pause(now - before)


def what_is_due(cfg: Config, step: int, per_epoch: int, total: int, last_row: int) -> Due:
    """By the cadences of the settings, in steps or in epochs. total: steps of the run; last_row: where the last row of
    metrics stands, 0 before the first."""
    due = Due()
    last = step >= total
    epochs, rest = divmod(step, per_epoch)
    due.epoch_ends = rest == 0
    if cfg.checkpoint_rate:
        due.grid = due.save = step % cfg.checkpoint_rate == 0
    elif due.epoch_ends:
        due.grid = epochs % (cfg.sample_every or 1) == 0
        due.save = epochs % (cfg.checkpoint_every or 1) == 0
    if last:
        due.grid = due.save = True

    # A row is a mean over log_every steps, whatever else is due, so that rows can be compared. The last one takes in
    # the steps that would be left.
    full = step - last_row >= cfg.log_every
    due.log = last or (full and total - step >= cfg.log_every)

    # The first row after an epoch or a checkpoint has the validation loss.
    cadences = [per_epoch]
    if cfg.checkpoint_rate:
        cadences.append(cfg.checkpoint_rate)
    passed = any(step // every > last_row // every for every in cadences)
    due.validate = due.log and (last or passed)
    if cfg.score_every:
        every = cfg.score_every * per_epoch
        due.score = due.log and (last or step // every > last_row // every)
    return due


class TrainingLoop:
    """A run, step by step, until its end, a signal or a loss that no longer changes: after each step comes what is due.

    done: whether the last step has been made; path: the last checkpoint; last_good: the one to go back to after a
    divergence; loss: the mean that a grid is named after; stop_signal: the signal to stop for, 0 for none;
    save_wanted: whether a signal asks for a checkpoint.
    """

    def __init__(self, trainer: Trainer, monitor: Monitor, signals: Signals, bar: tqdm, pace: Pace,
                 last_good: Path | None = None):
        """last_good: the checkpoint that the run goes on from, if any."""
        self.trainer = trainer
        self.cfg = trainer.cfg
        self.processes = trainer.processes
        self.monitor = monitor
        self.signals = signals
        self.bar = bar
        self.pace = pace
        self.cores = CoreWatch(torch.get_num_threads() if trainer.device.type == "cpu" else 1)
        self.grids = Cadence()
        self.saves = Cadence()

        self.done = trainer.step >= trainer.total or self.has_stopped_early()
        self.path = last_good or checkpoint_path(self.cfg, trainer.step)
        self.last_good = last_good
        self.save_succeeded = True
        self.loss = 0.0
        self.stop_signal = 0
        self.save_wanted = False

    def run(self) -> Path:
        """Train; returns the last checkpoint.

        Raises UserError where it was stopped, has diverged for good, or could not be saved.
        """
        while not self.done:
            with self.cores.watch():
                self.trainer.train_step()
            due = self.look()
            self.log(due)
            if self.roll_back_if_diverged(due):
                continue
            self.show_progress(due)
            self.settle_length(due)
            self.save_and_draw(due)
            self.stop_where_asked()
        return self.path

    def has_stopped_early(self) -> bool:
        """Whether the loss had settled in an earlier part of this run, under the same settings; says so."""
        if not self.cfg.early_stop_loss_change or not self.monitor.plateaued():
            return False
        self.processes.print0("the loss had settled before: --early_stop_loss_change 0 trains on all the same")
        return True

    def look(self) -> Due:
        """What is due: by the step, by the clock, by a signal, at the end."""
        cfg = self.cfg
        step = self.trainer.step
        total = self.trainer.total
        self.done = step >= total
        history = self.trainer.progress.loss_history
        last_row = history[-1][0] if history else 0
        due = what_is_due(cfg, step, self.trainer.batches.steps_per_epoch, total, last_row)

        # Epochs may be short: where nobody has said how often, the clock has a word in it.
        by_epochs = due.epoch_ends and not self.done and not cfg.checkpoint_rate
        if due.grid and by_epochs and cfg.sample_every is None:
            due.grid = self.grids.is_time(self.processes)
        if due.save and by_epochs and cfg.checkpoint_every is None:
            due.save = self.saves.is_time(self.processes)

        self.stop_signal, self.save_wanted = self.signals.poll(step)
        if self.stop_signal or self.save_wanted:
            due.save = True
        return due

    def log(self, due: Due) -> None:
        """A row of metrics, or the loss for a grid between two rows."""
        if due.log:
            self.loss = self.monitor.log(due)
        elif due.grid:
            self.loss = self.monitor.epoch_loss()
        if due.epoch_ends:                                       # the mean of the next epoch starts anew
            self.trainer.progress.loss_sums[1] = 0

    def roll_back_if_diverged(self, due: Due) -> bool:
        """Go back to a good checkpoint where the run has diverged; returns whether it did."""
        if not due.log and not due.save:
            return False
        guard = self.trainer.guard
        reason = guard.diagnose(self.trainer, logged=due.log)
        if not reason:
            return False

        guard.roll_back(self.trainer, reason, self.last_good)
        if self.monitor.logger:
            self.monitor.logger.rewind(self.trainer.step)
        # A checkpoint that a signal asked for is not written yet: it comes after the next step.
        self.signals.save = self.signals.save or self.save_wanted
        self.signals.poll_at_once()
        self.monitor.restart_clock()
        self.pace.restart(self.trainer)
        self.done = False
        return True

    def show_progress(self, due: Due) -> None:
        """The bar, and what is to be said of the machine."""
        trainer = self.trainer
        with suppress(OSError):                                  # where the terminal has gone
            self.bar.total = trainer.total
            self.bar.n = trainer.step - 1
            self.bar.update()
            if due.log or due.grid:
                epochs = trainer.total / trainer.batches.steps_per_epoch
                self.bar.set_description(f"epoch {trainer.epoch:.4g}/{epochs:.4g} loss {self.loss:.4f}")

        advice = self.cores.look()
        if advice:
            self.processes.print0(f"\n{advice}")

    def settle_length(self, due: Due) -> None:
        """End early where the loss has settled; take more or fewer steps where the run is to end on time.

        Before anything is saved: a checkpoint holds the number of steps.
        """
        trainer = self.trainer
        print0 = self.processes.print0
        if due.log and self.cfg.early_stop_loss_change and self.monitor.plateaued():
            print0(f"the loss has settled at step {trainer.step}: stopping early")
            due.grid = due.save = self.done = True

        self.pace.take_time(trainer)
        if self.pace.is_due(trainer.step) and not self.done:
            left = self.processes.broadcast(self.pace.steps_left(trainer.step))
            before = trainer.total
            trainer.set_total_steps(trainer.step + max(1, left))
            self.pace.plan_check(trainer)
            if abs(trainer.total - before) > before // 100:
                print0(f"step {trainer.step:,}: {trainer.total:,} steps fit into the time, not {before:,}")
        time_needed = self.pace.tell_time(trainer)
        if time_needed and not self.done:
            print0(time_needed)

    def save_and_draw(self, due: Due) -> None:
        """The checkpoint, the best one, the grid: none of their time counts as training."""
        better = self.monitor.distance < self.monitor.best_distance
        best_so_far = due.score and bool(self.processes.broadcast(int(better)))
        if not (due.save or best_so_far or due.grid):
            return
        self.monitor.stop_clock()
        if due.save:
            self.save()
        if best_so_far:
            self.save_best()
        if due.grid and self.processes.is_main:
            with self.grids.measure():
                warn_on_oserror(f"a grid of samples in {self.monitor.folder}",
                                partial(self.monitor.show_grid, self.loss))
        self.monitor.restart_clock()

    def save(self) -> None:
        """The checkpoint of this step; where it cannot be written, the one before stays as it is."""
        self.path = checkpoint_path(self.cfg, self.trainer.step)
        state = self.trainer.state()
        succeeded = True
        if self.processes.is_main:
            with self.saves.measure():
                succeeded = warn_on_oserror(f"checkpoint {self.path}", partial(save_checkpoint, state, self.cfg))
        self.save_succeeded = bool(self.processes.broadcast(int(succeeded)))
        if self.save_succeeded and state["good"]:
            self.last_good = self.path
        if self.save_succeeded and self.save_wanted:
            self.processes.print0(f"saved {self.path} at step {self.trainer.step}, as asked for by a signal")

    def save_best(self) -> None:
        """The checkpoint whose images are the nearest to real ones so far."""
        distance = self.monitor.distance
        self.trainer.progress.best_distance = distance
        state = self.trainer.state()
        path = best_path(self.cfg)
        if self.processes.is_main and warn_on_oserror(f"checkpoint {path}", partial(write_state, path, state)):
            self.monitor.best_distance = distance

    def stop_where_asked(self) -> None:
        """Raise UserError where a signal asks to stop, or where the end could not be saved."""
        if self.stop_signal and not self.done and self.save_succeeded:
            raise UserError(f"interrupted: saved {self.path}; the same command goes on", code=128 + self.stop_signal)
        if (self.stop_signal or self.done) and not self.save_succeeded:
            raise UserError("the last checkpoint could not be saved; the one before is as it was.\nMake room: the same "
                            "command goes on from there.", code=1)


# ---- 11  Commands ------------------------------------------------------------------------------
# What the two modes do, and the questions they ask where flags leave something open.


QUITS = ("-1", "q", "quit", "exit")


def ask(question: str, flag: str, parse: Callable[[str], object], default: str = "", can_quit: bool = False):
    """Ask until parse accepts the answer; Enter takes the default. None where it is one of QUITS and that is possible.

    Raises UserError at the end of input; flag: what answers the question on the command line.
    """
    shown = f" [{default}]" if default else ""
    while True:
        try:
            answer = input(wrap(printable(f"{question}{shown}: "))).strip()
        except (EOFError, RuntimeError):                         # RuntimeError: there is no input at all
            print()
            raise UserError(f"input ended at a question: answer it with {flag}, or all with --yes") from None
        if can_quit and answer.lower() in QUITS:
            return None
        try:
            return parse(answer or default)
        except UserError as error:
            print(wrap(str(error)))


def wrap(text: str) -> str:
    """Text for the terminal, broken between words; its last space is kept, for a question."""
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [textwrap.fill(line, width, break_on_hyphens=False) for line in text.split("\n")]
    return "\n".join(lines) + " " * text.endswith(" ")


def choose(text: str, choices: tuple) -> str:
    """The one of the choices that is meant: by name, by number from 1 on, or by the beginning of its name.

    Raises UserError.
    """
    names = [str(choice) for choice in choices]
    if text in names:
        return text
    numbers = [str(i) for i in range(1, len(names) + 1)]
    if text in numbers:
        return names[numbers.index(text)]
    beginning = [name for name in names if text and name.startswith(text.lower())]
    if len(beginning) == 1:
        return beginning[0]
    few = names if len(names) <= 12 else [*names[:USUAL_DATASETS], "..."]
    hint = did_you_mean(text.lower(), names) or f": choose from {', '.join(few)}, by name or number"
    raise UserError(f"{text[:60] or 'nothing'} is none of the choices{hint}")


def ask_option(name: str, asked: dict, default) -> dict:
    """`asked` with the answer for one option added. An answer that contradicts the rest is asked for again."""
    choices = allowed_values(name)
    hint = FIELDS[name].metadata["ask"]
    if choices:
        hint += "; " + ", ".join(f"{i} {choice}" for i, choice in enumerate(choices, 1))

    def parse(text: str) -> dict:
        if choices:
            text = choose(FIELDS[name].metadata["synonyms"].get(text, text), choices)
        answers = {**asked, name: parse_value(name, text)}
        if name != "mode":
            configure(**answers)
        return answers

    return ask(f"{name} ({hint})", f"--{name}", parse, format_value(name, default))


# Training.


# Where things are, which may differ from one machine of a run to another.
OWN_PLACES = ("path_to_data", "data_dir", "working_directory", "generated_directory", "num_workers")


def settle_run(asked: dict) -> Config:
    """The settings of a run: they say where its checkpoint is, and with what that stores they are final."""
    cfg = complete(asked)
    path, state = find_resume_checkpoint(cfg, asked)
    if not path:
        return cfg
    settled = complete(asked, state["config"])
    if asked.get("train_minutes") and asked["train_minutes"] != state["config"].get("train_minutes"):
        settled = dataclasses.replace(settled, iterations=0)     # as many steps more as fit into those
    return settled


def run_training(asked: dict) -> None:
    """--mode train. asked: what the command line asks for, as from `requested`."""
    if "dataset" not in asked and not asked.get("resume_from_checkpoint"):
        if world_size() > 1:
            raise UserError("name the data with --dataset: under torchrun nobody can be asked")
        asked = ask_training(asked)

    processes = meet(pick_device(asked.get("device", "auto")))
    shared = {f"--{name}": format_value(name, value) for name, value in asked.items() if name not in OWN_PLACES}
    processes.require_same(shared, "Start all of them with the same flags.")
    cfg = processes.from_main(partial(settle_run, asked))
    cfg = dataclasses.replace(cfg, **{name: asked.get(name, FIELDS[name].default) for name in OWN_PLACES})
    if cfg.dataset == "folder":                                  # told before anything is made
        check_images(cfg.path_to_data, "--path_to_data")

    devices = Devices(cfg)
    if cfg.dry_run:
        processes.print0(describe_dry_run(cfg, devices))
        return
    start_time = time.perf_counter()
    path = train(cfg, devices)
    if devices.processes.is_main:
        print(f"trained in {duration(time.perf_counter() - start_time)}: {path}\n"
              f"samples  {describe_folder(samples_path(cfg))}\n"
              f"draw with it: python diffuser.py --mode inference --model_path {path}")


def describe_folder(folder: Path) -> str:
    """What a run has written into its folder, the pictures of a kind together."""
    kinds = {"epoch_*_loss_*.png": [], "step_*.png": []}
    others = []
    for path in sorted(folder.iterdir()):
        kind = next((kind for kind in kinds if path.match(kind)), None)
        if kind:
            kinds[kind].append(path.name)
        elif not path.name.startswith("."):
            others.append(path.name + "/" * path.is_dir())

    parts = []
    for kind, names in kinds.items():
        if len(names) > 1:
            parts.append(f"{len(names)} x {kind}")
        else:
            parts += names
    return f"{folder}/: {', '.join(parts + others)}"


def ask_training(asked: dict) -> dict:
    """Ask for the data, the settings to begin with and the length; for all other settings only where that is wanted.

    Returns all that is asked for. Raises UserError.
    """
    if asked.get("yes"):
        return {**asked, "dataset": "digits"}
    asked = requested(ask_data(asked))                           # a recipe may know it
    if asked["dataset"] == "folder":
        if "path_to_data" not in asked:
            question = "path_to_data (a folder or file of images)"
            asked = {**asked, "path_to_data": ask(question, "--path_to_data", parse_image_path)}
    elif BEST.get(settings_name(asked["dataset"])) and "recipe" not in asked:
        asked = ask_recipe(asked)
    if not any(asked.get(name) for name in LENGTHS):
        asked = ask_length(asked)

    yes = ask("change other settings? (y or n)", "--yes", partial(parse_value, "yes"), "n")
    for name in FIELDS if yes else ():
        if FIELDS[name].metadata["ask"] and name not in asked:
            cfg = complete(asked)
            if has_effect(name, cfg):
                asked = ask_option(name, asked, getattr(cfg, name))
    return requested(asked)


def ask_data(asked: dict) -> dict:
    """`asked` with the dataset added, and with its path where somebody gives the path of a folder at once."""
    for i, (name, spec) in enumerate(DATASETS.items(), 1):
        if i > USUAL_DATASETS:
            break
        size = f", {spec.num_images:,} of {spec.shape[1]}x{spec.shape[2]}" if spec.num_images else ""
        print(f"{i:3}  {name:18} {spec.about}{size}")
    others = ", ".join(list(DATASETS)[USUAL_DATASETS:])
    print(textwrap.fill(f"or {others}", 79, initial_indent=5 * " ", subsequent_indent=8 * " "))

    def parse(text: str) -> dict:
        if text not in DATASETS and (os.path.exists(text) or text.startswith("hf:")):
            return {**asked, "dataset": "folder", "path_to_data": parse_image_path(text)}
        answers = {**asked, "dataset": choose(text, tuple(DATASETS))}
        configure(**answers)
        return answers

    return ask("what to train on (a number, a name, or a path)", "--dataset", parse, "digits")


def ask_recipe(asked: dict) -> dict:
    """`asked` with --recipe best added, if that is wanted rather than the preset."""
    def parse(text: str) -> dict:
        if choose(text, ("preset", "best")) == "preset":
            return asked
        return requested({**asked, "recipe": "best"})

    question = "settings (preset: the documented ones; best: those that draw best today)"
    return ask(question, "--recipe", parse, "preset")


def ask_length(asked: dict) -> dict:
    """`asked` with the length of the run added. A number alone has the unit of the default."""
    cfg = complete(asked)
    name = length_that_counts(vars(cfg))
    default = f"{getattr(cfg, name):g} {LENGTH_UNITS[name]}"

    def parse(text: str) -> dict:
        answer = re.fullmatch(r"([\d.]+)\s*([a-z]*)", text.lower())
        if not answer:
            raise UserError("how long: such as 20 epochs, 5 minutes or 10000 steps")
        option = name
        if answer[2]:
            unit = choose(answer[2], tuple(LENGTH_UNITS.values()))
            option = next(key for key, value in LENGTH_UNITS.items() if value == unit)
        length = parse_value(option, answer[1])
        if not length:
            raise UserError("how long: more than 0")
        answers = {**asked, option: length}
        configure(**answers)
        return answers

    return ask("how long (minutes, epochs or steps)", "--train_minutes, --epochs or --iterations", parse, default)


def has_effect(name: str, cfg: Config) -> bool:
    """Whether a setting that is asked for changes anything, beside the others."""
    if name == "sample_every":
        return not cfg.checkpoint_rate
    if name in ("beta_start", "beta_end"):                       # a schedule that makes something else of other betas
        schedule = SCHEDULES[cfg.schedule_type]
        return not torch.equal(schedule(10, 1e-4, 0.02, 0.008), schedule(10, 2e-4, 0.03, 0.008))
    return True


def parse_image_path(text: str) -> str:
    """The path, if it holds images. Raises UserError."""
    open_images(text, "--path_to_data")
    return text


def describe_run(cfg: Config, devices: Devices, shape: tuple[int, int, int], num_classes: int, images: int,
                 compute: ComputeConfig) -> str:
    """What is about to happen, in a few lines."""
    total, per_epoch, batch = training_length(cfg, images)
    length = f"{total:,} steps of {batch} images ({total / per_epoch:.4g} epochs)"
    if length_that_counts(vars(cfg)) == "train_minutes":
        length = f"as many steps of {batch} images as fit into {cfg.train_minutes:g} minutes"
    channels, height, width = shape
    parameters = network_size(cfg, shape, num_classes).parameters
    left = alpha_bar_table(cfg)[-1].sqrt().item()

    lines = [f"device   {devices}, {compute}",
             f"data     {cfg.dataset}: {images:,} images {height}x{width}x{channels}, {num_classes} classes",
             f"network  {parameters:,} parameters",
             f"training {length}",
             f"output   checkpoint {checkpoint_path(cfg, 'STEP')}",
             f"         grids of samples, metrics.csv, config.json and report in {samples_path(cfg)}/",
             f"noise    {cfg.schedule_type}, T = {cfg.timesteps}, {left:.2%} of the signal is left at T"]
    if left > 0.01:
        start = "use --start matched"
        if cfg.start == "matched":
            start = "sampling starts from the data's mean and variance"
        lines.append(f"         above 1%, so pure noise is the wrong start; {start}")
    return "\n".join(lines)


def describe_dry_run(cfg: Config, devices: Devices) -> str:
    """Settings, sizes, memory and time, without reading an image."""
    # What is known of the data.
    spec = DATASETS[cfg.dataset]
    num_classes = spec.class_count
    images = spec.num_images
    files = None
    if cfg.dataset == "folder":
        files = open_images(cfg.path_to_data, "--path_to_data", cfg.label_column)
        num_classes = len(files.class_names)
        images = len(files)
    images -= count_val_images(images, cfg.val_fraction)
    if cfg.use_labels is False:
        num_classes = 0
    shape = image_shape(cfg, files)

    # What follows from it.
    steps, *_ = training_length(cfg, images)
    if length_that_counts(vars(cfg)) == "train_minutes":
        steps = ENDLESS
    compute = choose_compute(cfg, devices.device, steps * cfg.gradient_accumulation_steps)
    batch = math.ceil(cfg.batch_size / devices.count)
    need = sum(training_memory(cfg, shape, num_classes, batch, compute.precision))
    _, warning = plan_memory(cfg, shape, num_classes, batch, compute.precision, devices.device)

    lines = [describe_settings(cfg, usual_settings(cfg)),
             describe_run(cfg, devices, shape, num_classes, images, compute),
             f"memory   about {need / 2**30:.2g} GiB for training on each device"]
    if warning:
        lines.append(f"warning  {warning}")
    lines.append(f"time     {describe_time(cfg, devices, shape, num_classes, images)}")
    return "\n".join(lines)


def usual_settings(cfg: Config) -> Config:
    """What the preset alone makes of the dataset; that of pictures depends on their size and the run's length."""
    known = dict(dataset=cfg.dataset, path_to_data=cfg.path_to_data, device=cfg.device)
    if settings_name(cfg.dataset) == "folder":
        length = length_that_counts(vars(cfg))
        known |= {"img_size": cfg.img_size, length: getattr(cfg, length)}
    return complete(known)


def describe_time(cfg: Config, devices: Devices, shape: tuple[int, int, int], num_classes: int, images: int) -> str:
    """How long the run will take here, by a few steps on made-up images."""
    try:
        step = time_a_step(cfg, devices, shape, num_classes)
    except (UserError, torch.OutOfMemoryError) as error:
        return f"not measured: {first_line(error)}"
    if length_that_counts(vars(cfg)) == "train_minutes":
        length = duration(60 * cfg.train_minutes)
        if step is None:
            return length
        return f"{length}: about {int(60 * cfg.train_minutes / step):,} steps of {duration(step)}"

    total, _, size = training_length(cfg, images)
    if step is None:
        work = 3 * network_size(cfg, shape, num_classes).operations * size
        return f"not measured: a step of {work / 1e12:.3g} teraflop takes long on {devices.device.type}"
    return f"about {duration(total * step)}: {total:,} steps of {duration(step)}, and the grids"


def describe_settings(cfg: Config, usual: Config | None = None) -> str:
    """The settings that a checkpoint keeps, one on a line; behind those that differ, what is usual."""
    lines = []
    for name in FIELDS:
        if name in PER_RUN:
            continue
        line = f"{name} = {getattr(cfg, name)}"
        if usual is not None and getattr(cfg, name) != getattr(usual, name):
            line = f"{line:40} (preset: {getattr(usual, name)})"
        lines.append(line)
    return "\n".join(lines)


# The machine.


def check_machine(asked: dict) -> None:
    """--check: say what this machine has, what is missing and how to get it. Raises UserError where it cannot train."""
    start_time = time.perf_counter()
    options = ("device", "precision", "data_dir", "working_directory", "generated_directory")
    cfg = configure(dataset="digits", **{name: asked[name] for name in options if name in asked})
    problems = []

    print(f"python   {platform.python_version()}, {platform.platform()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"torch    {torch.__version__}; cuda: {', '.join(gpus) or 'none'}; "
          f"mps: {'yes' if torch.backends.mps.is_available() else 'none'}; cpu: {torch.get_num_threads()} threads, "
          f"{os.cpu_count()} cores")
    check_packages()
    check_places(cfg, problems)
    check_device(cfg, problems)

    took = duration(time.perf_counter() - start_time)
    if problems:
        raise UserError("this machine cannot train as it is: " + "; ".join(problems), code=1)
    print(f"all well: this machine can train (looked at in {took})")


def check_packages() -> None:
    """Say which optional packages are there, and how to get the others."""
    there = [f"{package} {package_version(package)}".strip() for module, package, _ in PACKAGES if is_installed(module)]
    print(f"packages {', '.join(there) or 'none of the optional ones'}")
    for module, package, purpose in PACKAGES:
        if not is_installed(module):
            print(f"missing  {package}, for {purpose}: pip install {package}")


def check_places(cfg: Config, problems: list[str]) -> None:
    """Say how much room there is, and whether files can be made where a run makes them."""
    for name in ("data_dir", "working_directory", "generated_directory"):
        folder = getattr(cfg, name)
        free = shutil.disk_usage(nearest_folder(folder)).free
        reason = why_not_writable(folder)
        state = f"cannot be written to ({reason})" if reason else "can be written to"
        print(f"disk     --{name} {folder}: {free / 2**30:.1f} GiB free, {state}")
        if reason and name != "data_dir":                        # that one is for downloads and caches
            problems.append(f"{folder} cannot be written to ({reason}): choose another --{name}")
        elif free < 2**28:
            problems.append(f"{folder} has {free / 2**20:.0f} MiB left: make room, or choose another --{name}")


def check_device(cfg: Config, problems: list[str]) -> None:
    """Say what the device has and how fast it is; train and draw for a moment."""
    try:
        devices = Devices(cfg)
        free = free_memory(devices.device)
        if free < 2**59:
            print(f"memory   {free / 2**30:.1f} GiB free on {devices.device.type}")
        rates = {name: matrix_rate(devices.device, PRECISIONS[name]) for name in ("fp32", "bf16")}
        shown = [f"{name} {rate:,.0f}" if rate >= 10 else f"{name} {rate:.1f}" for name, rate in rates.items()]
        print(f"speed    {', '.join(shown)} GFLOP/s in products of matrices on {devices}")

        trainer = Trainer(cfg, devices)
        seconds_of(trainer, trainer.train_step)                  # the first step takes longer
        took = statistics.median(seconds_of(trainer, trainer.train_step) for _ in range(5))
        if not trainer.grad_norm.isfinite():
            problems.append(f"a training step on {devices.device.type} gives no finite gradient: try another --device")
        print(f"training {duration(took)} a step of the digits preset, {trainer.size} images, "
              f"{trainer.compute}")

        before = time.perf_counter()
        trainer.model.generate(["3"], steps=20)
        print(f"drawing  a digit in {duration(time.perf_counter() - before)}, 20 steps")
    except Exception as error:                                   # whatever it is, it is what was looked for
        print(f"failed   {first_line(error)}")
        problems.append(f"training on --device {cfg.device} fails ({first_line(error)}): try --device cpu, or "
                        "install torch anew (pytorch.org says how)")


# Inference.


def run_inference(asked: dict) -> None:
    """--mode inference. asked: what the command line asks for, as from `requested`."""
    if world_size() > 1 and not asked.get("save_dir"):
        raise UserError("name the folder for images with --save_dir: under torchrun nobody can be asked")
    for name in ("config", "init_from"):
        if asked.get(name):
            raise UserError(f"--{name} is for --mode train; what to draw with is named by --model_path")
    seeds = parse_seeds(asked["seeds"]) if asked.get("seeds") else []
    for name in ("seed", "num_images", "first"):
        if seeds and name in asked:
            raise UserError(f"--seeds draws one image for each seed: leave --{name} out")
    if asked.get("save_dir"):
        require_writable(asked["save_dir"], "--save_dir", folder=True)
    path = Path(asked["model_path"]) if asked.get("model_path") else choose_checkpoint(asked)
    if path is None:
        return

    # The settings of the checkpoint, and those asked for where they do not shape the network.
    state, source = load_with_digest(path)
    wants_labels = asked.pop("use_labels", None)
    check_compatible(path, asked, state["config"])
    asked.pop("dataset", None)
    cfg = complete(asked, state["config"])
    check_sampler_options(asked, cfg)

    devices = Devices(cfg)
    processes = devices.processes
    require_same_checkpoint(source, processes)
    model = build_model(state, cfg, devices).spread(devices)
    if wants_labels and not model.class_names:
        raise UserError(f"--use_labels: {path} was trained without classes")
    several = f", {processes.world} processes" if processes.world > 1 else ""
    if model.replicas > 1:
        several = f", {model.replicas} GPUs"
    processes.print0(f"{path}: {run_title(state['config'])}, epoch {state['epoch']:.4g}")
    processes.print0(f"{cfg.sampler}, {sampling_steps(cfg)} steps, {model.device}{several}")

    if cfg.dry_run:
        processes.print0(describe_settings(cfg))
    elif cfg.yes or cfg.classes or cfg.num_images or cfg.save_dir or cfg.first or seeds:
        numbers = []                                             # of the classes; none for no label
        if cfg.classes:
            numbers = parse_classes(cfg.classes, model.class_names)
        elif wants_labels is not False:
            numbers = list(range(len(model.class_names)))
        count = len(seeds) or cfg.num_images or 10 * max(1, len(numbers))
        save_images(model, cfg, numbers, count, source, processes, cfg.first, seeds)
    else:
        interactive_sampling(model, cfg, source, processes)


def load_with_digest(path: Path) -> tuple[dict, dict]:
    """A checkpoint's content, and what names it for good: its path and SHA-256. Raises UserError.

    Both are of one file, though a run may put its next checkpoint there at any time.
    """
    def stamp() -> tuple | None:
        with suppress(OSError):
            status = path.stat()
            return status.st_ino, status.st_mtime_ns, status.st_size
        return None

    while True:
        before = stamp()
        digest = ""
        with suppress(OSError):                                  # load_checkpoint says what is wrong
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        state = load_checkpoint(path)
        if digest and stamp() in (before, None):                 # the same, or gone by now
            return state, dict(checkpoint=str(path), sha256=digest)


def require_same_checkpoint(source: dict, processes: Processes) -> None:
    """Raise UserError where a run has replaced the checkpoint while several processes were reading it."""
    number = int(source["sha256"][:15], 16)
    differs = number != processes.broadcast(number)
    if processes.largest(differs):
        raise UserError(f"{source['checkpoint']} was replaced while it was read: start again, or name with "
                        "--model_path one that stays as it is", code=1)


def choose_checkpoint(asked: dict) -> Path | None:
    """The checkpoint that the user picks from those below the working directory, None to quit.

    --experiment_name and --dataset leave those of their runs; --yes takes the newest. Raises UserError where there is
    none, and under torchrun where there are several.
    """
    home = Path(asked.get("working_directory") or FIELDS["working_directory"].default)
    found = []
    for path in newest_first(home.glob("**/*.pt")):
        try:
            found.append((path, load_checkpoint(path, peek=True)))
        except UserError as error:
            warn(f"passed over: {error}")
    if not found:
        raise UserError(f"no checkpoint in {home}: train first (python diffuser.py --mode train), or give --model_path")

    for option in ("experiment_name", "dataset"):
        if asked.get(option):
            found = of_that_run(found, option, asked[option], home)
            # Of a run that is named, the last one; its best one is taken where it is picked or named itself.
            last = [(path, state) for path, state in found if not is_best(path)]
            found = last if len(last) == 1 else found
    if len(found) == 1 or asked.get("yes"):
        path, _ = found[0]
        return path
    if world_size() > 1:
        raise UserError(f"{home} has {len(found)} checkpoints: name one with --model_path, or take the newest with "
                        "--yes; under torchrun nobody can be asked")

    for i, (path, state) in enumerate(found, 1):
        loss = f"loss {state['loss_history'][-1][1]:.4f}" if state["loss_history"] else "no loss yet"
        print(f"{i:3}  {run_title(state['config'])}, epoch {state['epoch']:.4g}, {loss}  {path}")

    def parse(text: str) -> Path:
        if text not in map(str, range(1, len(found) + 1)):
            raise UserError(f"a number from 1 to {len(found)}, please")
        path, _ = found[int(text) - 1]
        return path

    return ask("which checkpoint (the newest is first; q quits)", "--model_path", parse, "1", can_quit=True)


def of_that_run(found: list[tuple[Path, dict]], option: str, wanted: str, home: Path) -> list[tuple[Path, dict]]:
    """The checkpoints of which a setting has the value that is wanted. Raises UserError, naming the values there are,
    where there is none."""
    chosen = [(path, state) for path, state in found if state["config"].get(option) == wanted]
    if chosen:
        return chosen
    there = sorted({state["config"].get(option) for _, state in found} - {"", None})
    others = f"there are {', '.join(there)}" if there else "the runs there have no name"
    raise UserError(f"--{option} {wanted}: {home} has no checkpoint of it{did_you_mean(wanted, there)}; {others}")


def interactive_sampling(model: Model, cfg: Config, source: dict, processes: Processes) -> None:
    """Ask for classes and numbers of images, draw, save and show, until the user quits."""
    if model.class_names:
        print(f"classes: {list_classes(model.class_names)}")
    drawn = 0                                                    # so that no image is drawn twice
    while True:
        classes = []
        if model.class_names:
            question = "which classes (names or numbers, such as 3, 5 or 3-5; all; -1 or q quits)"
            classes = ask(question, "--classes", partial(parse_classes, class_names=model.class_names), can_quit=True)
            if classes is None:
                return
        question = f"how many images{' of each' if classes else ''} (-1 or q quits)"
        count = ask(question, "--num_images", parse_count, "8", can_quit=True)
        if count is None:
            return

        count *= max(1, len(classes))
        folder = save_images(model, cfg, classes, count, source, processes, drawn)
        drawn += count
        if sys.stdout.isatty() and has_display():
            open_image(folder / "grid.png").show()


def parse_count(text: str) -> int:
    """How many images, as answered. Raises UserError."""
    count = parse_value("num_images", text)
    if count is None:                                            # auto
        raise UserError("a number of images, please")
    return count


def has_display() -> bool:
    """Whether a window can be opened here."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def save_images(model: Model, cfg: Config, classes: list[int], count: int, source: dict, processes: Processes,
                first: int = 0, seeds: Sequence[int] = ()) -> Path:
    """Draw `count` images from number first on, of the `classes`, by number, in turn.

    source: path and hash of the checkpoint, as from load_with_digest; processes: all of them call this, each draws its
    share, and the files are those of one process; seeds: one for each image, which is then named after it. Returns the
    folder with images/, grid.png and samples.json: --save_dir, or a new one. Where images of the same request are
    there, the others are drawn. Raises UserError where there are other images, all of them, or another command that
    draws into the folder. As --save_format asks for, images/ becomes one file in the end.
    """
    folder = Path(cfg.save_dir)
    if not cfg.save_dir:
        folder = unused_path(Path(cfg.generated_directory), f"inference_{cfg.dataset}_")
    labels = model.labels(classes, count, first)
    names = picture_names(model, labels, first, seeds)
    record = drawing_record(model, cfg, classes, count, source, first)
    last = "trajectory.png" if cfg.trajectory else "grid.png"
    if cfg.save_format in ARCHIVES:
        last = f"images.{cfg.save_format}"
    pictures = PictureFolder(folder, "samples.json", record, drawing_request, name=names.__getitem__, count=count,
                             shape=model.shape, last=last)

    # The same batches in all processes, and whenever drawing goes on: rounding depends on them.
    size = processes.broadcast(drawing_batch_size(model, cfg, pictures.earlier_record()))
    in_batches = dataclasses.replace(cfg, sample_batch_size=size, sequential=False)
    record.update(batch_size=size, device=model.device.type)

    # Rank 0 holds the folder for all.
    signals = Signals(processes)
    go_on = how_to_go_on(cfg, folder, classes, count, first)
    hold = pictures.hold if processes.is_main else pictures.explain_failures
    with signals.catch(*stop_signals()) if processes.world > 1 else nullcontext(), hold(go_on):
        processes.barrier()

        # The images, each by its number and class.
        missing = processes.from_main(pictures.missing)
        if len(missing) < count:
            processes.print0(f"going on: {count - len(missing)} of {count} images are in {folder / 'images'}")
        draw_missing(model, labels, in_batches, pictures, missing, processes, signals, first, seeds)

        if processes.is_main:
            show_drawn(model, cfg, labels, pictures, len(classes), first, seeds)

        # All of them as one file.
        place = folder / "images"
        if cfg.save_format in ARCHIVES:
            place = pictures.archive(cfg.save_format)
            if processes.is_main:
                pictures.pack(cfg.save_format, labels, model.class_names if classes else [])
    written = ["grid.png", *["trajectory.png"] * cfg.trajectory, "samples.json"]
    processes.print0(f"{count} images in {place}, beside them in {folder}: {', '.join(written)}")
    return folder


def show_drawn(model: Model, cfg: Config, labels: list[int], pictures: PictureFolder, num_classes: int, first: int,
               seeds: Sequence[int]) -> None:
    """Write grid.png of the first hundred pictures, side by side, and the way of the first ten where it is wanted."""
    shown = torch.stack([pictures.require(i) for i in range(min(len(labels), 100))])
    columns = [model.class_names[label] for label in labels[:num_classes]]
    save_grid(shown, pictures.folder / "grid.png", columns)
    if cfg.trajectory:
        save_strip(model, labels[:10], cfg, pictures.folder / "trajectory.png", first, seeds)


def drawing_batch_size(model: Model, cfg: Config, earlier: dict) -> int:
    """Images drawn at a time: as asked for, else as those that are there already were drawn, else as the model chooses.

    earlier: what samples.json says of those, empty where there are none.
    """
    size = earlier.get("batch_size")
    asked = cfg.sequential or cfg.sample_batch_size
    if not asked and earlier.get("device") == model.device.type and is_count(size, least=1, most=10**6):
        return size
    return model.batch_size(cfg)


def draw_missing(model: Model, labels: list[int], cfg: Config, pictures: PictureFolder, missing: list[int],
                 processes: Processes, signals: Signals, first: int, seeds: Sequence[int]) -> None:
    """Draw the pictures that are missing, each process its share, and wait until all are there.

    They are drawn in whole batches, with those that are there already, since rounding depends on the others in a batch.
    Raises OSError where one cannot be written, UserError where a signal asks to stop.
    """
    wanted = set(missing)
    batches = [batch for batch in model.batches(len(labels), cfg) if not wanted.isdisjoint(batch)]
    share = batches[processes.rank :: processes.world]
    total = len(batches) * sampling_steps(cfg)
    try:
        with SharedBar(processes, total, desc="sampling", unit="step", leave=False) as bar:

            def after_step() -> None:
                signals.require_none()
                bar.update()

            with PictureWriter() as writer:
                drawn = itertools.chain.from_iterable(model.draw(labels, cfg, after_step, first, seeds, share))
                for i, image in zip(itertools.chain.from_iterable(share), drawn):
                    if i in wanted:
                        writer.save(image, pictures.path(i))

            def look() -> None:
                signals.require_none()
                bar.look()

            processes.wait_for_all(look)
    except Stopped as error:
        raise UserError(f"{error}: {pictures.what_is_kept()}; the same command goes on with the rest",
                        code=128 + error.number) from None

    lost = [i for i in missing if processes.is_main and not pictures.path(i).exists()]
    if lost:
        raise UserError(f"{len(lost)} images are not in {pictures.folder}: processes on several machines need one "
                        "folder that all of them see", code=1)


def picture_names(model: Model, labels: list[int], first: int = 0, seeds: Sequence[int] = ()) -> list[str]:
    """The files of images number first, first + 1, ... with these labels: by number, or seed, and class."""
    classes = [*file_names(model.class_names), "image"]
    numbers = seeds or range(first, first + len(labels))
    return [f"{number:06}_{classes[label]}.png" for number, label in zip(numbers, labels)]


def drawing_record(model: Model, cfg: Config, classes: list[int], count: int, source: dict, first: int = 0) -> dict:
    """What samples.json says of images: all that is needed to draw them once more. See save_images."""
    class_names = [model.class_names[number] for number in classes]
    return dict(source, images=count, first=first, seeds=cfg.seeds, classes=class_names,
                config=dataclasses.asdict(cfg))


def drawing_request(record: dict) -> tuple:
    """What two samples.json have in common where they ask for the same images, but for rounding."""
    ignored = (PER_RUN | {"sequential", "sample_batch_size"}) - {"guide_path"}
    settings = {name: record["config"][name] for name in FIELDS if name not in ignored}
    return record["sha256"], record["images"], record["first"], record.get("seeds", ""), record["classes"], settings


def how_to_go_on(cfg: Config, folder: Path, classes: list[int], count: int, first: int) -> str:
    """What to do where drawing broke off, as the end of a message; nothing where no command line draws the same."""
    if first != cfg.first:                                       # drawn in a conversation
        return ""
    flags = []
    if not cfg.save_dir:
        flags.append(f"--save_dir {shlex.quote(str(folder))}")
        if not cfg.num_images and not cfg.seeds:
            flags.append(f"--num_images {count}")
        if classes and not cfg.classes:
            flags.append(f"--classes {','.join(map(str, classes))}")
    command = " ".join(["the same command", *(["with"] if flags else []), *flags])
    return f".\nOnce that is fixed, {command} goes on with the rest"


# ---- 12  Command line --------------------------------------------------------------------------
# Flags made from the fields of Config.

COMMANDS = {"train": run_training, "inference": run_inference}


class ShowHelp(argparse.Action):
    """--help: what most people need; --help all: every option; --help markdown: docs/options.md."""

    def __call__(self, parser, namespace, value, option_string=None):
        if value not in ("", "all", "markdown"):
            parser.error(f"--help {value}: say --help, --help all or --help markdown")
        text = options_page() if value == "markdown" else build_parser(every=value == "all").format_help()
        with suppress(OSError):                                  # a reader that has gone has seen enough
            print(text.rstrip(), flush=True)
        parser.exit()


PATHS = {"config", "data_dir", "path_to_data", "working_directory", "generated_directory", "resume_from_checkpoint",
         "init_from", "model_path", "save_dir", "guide_path"}


def metavar(name: str) -> str:
    """What stands for an option's value in --help: N, X, PATH, NAME, or the choices where they are few."""
    choices = "{" + ",".join(map(str, allowed_values(name))) + "}"
    if 2 < len(choices) < 40:
        return choices
    if name in PATHS:
        return "PATH"
    if name == "img_size":
        return "HxW"
    return {bool: "BOOL", int: "N", float: "X", str: "NAME"}.get(TYPES[name], "N,N")


def option_help(name: str, choices: bool = True, every: bool = True) -> str:
    """What an option is for, its choices and its default. every: all choices, where there are many."""
    text = FIELDS[name].metadata["help"]
    default = FIELDS[name].default
    values = [str(value) for value in allowed_values(name)]
    if choices and values:
        shown = ", ".join(values)
        if name == "dataset" and not every:
            shown = f"{', '.join(values[:USUAL_DATASETS])}; {len(values) - USUAL_DATASETS} more: --help all"
        text += f" ({shown})"
    if default not in ("", None, ()) and default is not False:
        text += f" [{format_value(name, default)}]"
    return text


def build_parser(every: bool = True) -> Parser:
    """One flag per field; only those given end up in the result. every: show all options and spellings in --help."""
    more = "" if every else "Every option: python diffuser.py --help all"
    parser = Parser("diffuser.py", usage="python diffuser.py [--mode train | inference] [options]",
                    description=__doc__.split("\n\nThe same command")[0], epilog=more, add_help=False,
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", nargs="?", const="", action=ShowHelp, metavar="all", help=argparse.SUPPRESS)

    for name, spec in FIELDS.items():
        if spec.metadata["group"]:
            group = parser.add_argument_group(spec.metadata["group"])
        aliases = spec.metadata["aliases"]
        text = argparse.SUPPRESS
        if every or spec.metadata["common"]:
            text = option_help(name, "{" not in metavar(name), every).replace("%", "%%")
        if every and aliases:
            text += "; also " + ", ".join(aliases)

        # The aliases stand in the help of the option itself.
        values = dict(type=partial(parse_value, name), metavar=metavar(name), dest=name)
        if TYPES[name] is bool:
            values.update(nargs="?", const=True)
            for flag in (f"--{name}", *aliases):
                group.add_argument(f"--no-{flag[2:]}", dest=name, action="store_const", const=False,
                                   help=argparse.SUPPRESS)
        group.add_argument(f"--{name}", help=text, **values)
        if aliases:
            group.add_argument(*aliases, help=argparse.SUPPRESS, **values)
    if every:
        add_foreign_flags(parser.add_argument_group("flags of other programs"))
    return parser


def add_foreign_flags(group: argparse._ArgumentGroup) -> None:
    """Flags whose text translate_flags understands or refuses."""
    for name, flag in FOREIGN_FLAGS.items():
        nargs = "?" if flag.value_if_bare else None
        group.add_argument(f"--{name}", nargs=nargs, const=flag.value_if_bare, metavar=flag.metavar, help=flag.help)
    for name in NO_COUNTERPART:
        group.add_argument(f"--{name}", nargs="?", help=argparse.SUPPRESS)


def options_page() -> str:
    """docs/options.md: a table of all options for each group."""
    lines = ["# Options", "", "Made by `python diffuser.py --help markdown`. A default in brackets is that of the "
             "program; datasets and recipes have their own (`--dry_run` prints all)."]
    for name, spec in FIELDS.items():
        if spec.metadata["group"]:
            lines += ["", f"## {spec.metadata['group'].capitalize()}", "", "| option | what it does |", "|---|---|"]
        flags = ", ".join(f"`{flag}`" for flag in (f"--{name}", *spec.metadata["aliases"]))
        text = option_help(name).replace("|", "\\|")
        lines.append(f"| {flags} | {text} |")
    lines += ["", "## Flags of other programs", "", "| flag | what it means here |", "|---|---|"]
    lines += [f"| `--{name}` | {flag.help} |" for name, flag in FOREIGN_FLAGS.items()]
    return "\n".join(lines) + "\n"


def run_command(options: argparse.Namespace) -> None:
    """Do what the command line asks for; asks for the mode where that is open."""
    asked = requested(translate_flags(vars(options), parse_value))
    if asked.get("check"):
        return check_machine(asked)
    if "mode" not in asked:
        asked = {**asked, "mode": "train"} if asked.get("yes") else ask_option("mode", asked, "train")
    COMMANDS[asked["mode"]](asked)
    leave()


def explain(error: Exception, remedy: str = "lower --batch_size or --sample_batch_size") -> Exception | None:
    """A clearer error for what torch says; None where another process of the run tells it.

    remedy: what to do where memory is too small.
    """
    if not speaks_first():
        return None
    if isinstance(error, UserError):
        return error
    if is_lost(error):
        return UserError(f"another process has gone ({first_line(error)}); the same command goes on", code=1)
    no_memory = re.search("DefaultCPUAllocator: can't|MPS backend out of memory", str(error))
    if no_memory or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return UserError(f"out of memory: {remedy}", code=1)
    return error


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_script("diffuser", lambda: build_parser().parse_args(argv), run_command, explain)


if __name__ == "__main__":
    end_process(main)
