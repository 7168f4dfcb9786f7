#!/usr/bin/env python3
"""convert: checkpoints to and from Hugging Face diffusers and safetensors, and to the Hub.

    python convert.py to-diffusers CKPT DIR             a DDPMPipeline: UNet2DModel, scheduler, model card
    python convert.py to-diffusers CKPT DIR --label 3   the network of one class, that takes no labels
    python convert.py from-diffusers DIR CKPT           to draw from here, or to train on with --init_from CKPT
    python convert.py to-safetensors CKPT FILE          bare weights, the configuration in the metadata
    python convert.py from-safetensors FILE CKPT
    python convert.py to-space CKPT DIR                 a page that draws, for Hugging Face Spaces
    python convert.py to-hub DIR OWNER/NAME             publish what to-diffusers or to-space has written

Weights are the averaged ones where there are any (--raw: those being trained). diffusers and safetensors are read and
written by their own libraries (pip install diffusers); but for to-hub nothing is looked for on the network. A network
that its counterpart cannot represent is refused with the reason.
"""

from __future__ import annotations

# signal itself imports others first, and Ctrl-C would print a traceback there.
import _signal

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)              # Ctrl-C while torch is imported: no traceback

import argparse
import copy
import dataclasses
import errno
import inspect
import json
import math
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import diffuser
from diffuser_lib.files import (
    Parser,
    UserError,
    add_debug,
    end_process,
    first_line,
    is_full_disk,
    read_json_object,
    require_writable,
    run_script,
    write_atomically,
    write_json,
)
from diffuser_lib.images import Shape, save_grid
from diffuser_lib.machine import package_version

# ---- Weights -----------------------------------------------------------------------------------
# Which module of a UNet stands where in a UNet2DModel. Both of a pair have the same parameters.

Pairs = Iterator[tuple[nn.Module, nn.Module]]                    # (ours, theirs)


def counterparts(ours: diffuser.UNet, theirs: nn.Module) -> Pairs:
    """Pairs of modules of a UNet and a UNet2DModel of the same shape."""
    yield ours.conv_in, theirs.conv_in
    yield ours.time_mlp[0], theirs.time_embedding.linear_1
    yield ours.time_mlp[2], theirs.time_embedding.linear_2
    if ours.class_embedding is not None:
        yield ours.class_embedding, theirs.class_embedding

    yield from level_pairs(ours.down, theirs.down_blocks)
    yield from level_pairs(ours.up, theirs.up_blocks)
    for a, b in zip(ours.mid, theirs.mid_block.resnets, strict=True):
        yield from residual_pairs(a, b)
    middle = ours.mid[0].attention
    if isinstance(middle, diffuser.Attention):
        yield from attention_pairs(middle, theirs.mid_block.attentions[0])

    yield ours.norm_out, theirs.conv_norm_out
    yield ours.conv_out, theirs.conv_out


def level_pairs(ours: nn.ModuleList, blocks: nn.ModuleList) -> Pairs:
    """Of all levels on the way down or up: ours in one list, theirs a block with lists of its own for each level."""
    modules = iter(ours)
    for block in blocks:
        for i, resnet in enumerate(block.resnets):
            a = next(modules)
            yield from residual_pairs(a, resnet)
            if hasattr(block, "attentions"):
                yield from attention_pairs(a.attention, block.attentions[i])

        for downsampler in getattr(block, "downsamplers", None) or []:
            yield next(modules), downsampler.conv
        for upsampler in getattr(block, "upsamplers", None) or []:
            yield next(modules)[1], upsampler.conv


def residual_pairs(a: diffuser.ResBlock, b: nn.Module) -> Pairs:
    """Of a ResBlock and a ResnetBlock2D."""
    yield a.norm1, b.norm1
    yield a.conv1, b.conv1
    yield a.condition, b.time_emb_proj
    yield a.norm2, b.norm2
    yield a.conv2, b.conv2
    if b.conv_shortcut is not None:
        yield a.shortcut, b.conv_shortcut


def attention_pairs(a: diffuser.Attention, b: nn.Module) -> Pairs:
    """Of the two kinds of attention."""
    yield a.q, b.to_q
    yield a.k, b.to_k
    yield a.v, b.to_v
    yield a.out, b.to_out[0]
    if a.norm is not None:
        yield a.norm, b.group_norm


# ---- Network to diffusers ----------------------------------------------------------------------


def to_unet2d(network: diffuser.UNet, cfg: diffuser.Config, shape: Shape, label: int | None = None):
    """The UNet2DModel with the network's weights, for images of shape (C, H, W).

    label: that of the one class to keep, in a model that takes no labels. Raises UserError where diffusers cannot
    represent it.
    """
    from diffusers import UNet2DModel

    num_classes = network.num_classes
    if label is not None:                                        # silu(time + class): the class is a bias
        network = copy.deepcopy(network)
        network.time_mlp[2].bias += network.class_embedding.weight[label]
        network.class_embedding = None
        cfg = dataclasses.replace(cfg, use_labels=False)
        num_classes = 0

    theirs = UNet2DModel(**unet2d_options(cfg, shape, num_classes)).eval()
    for a, b in counterparts(network, theirs):
        b.load_state_dict(a.state_dict())
    if cfg.prediction == "flow":                                 # there t = 1..T
        theirs.time_embedding.linear_1.weight.data = shift_time(network, -1)
    return theirs


def shift_time(network: diffuser.UNet, by: int) -> Tensor:
    """The weight of time_mlp[0] that makes of the embedding of t what it now makes of that of t + by.

    cos((t + by) f) = cos(by f) cos(t f) - sin(by f) sin(t f), and so for the sine: the weight turns by that angle.
    """
    weight = network.time_mlp[0].weight.detach().double()
    half = network.base_channels // 2
    first = weight[:, :half]
    second = weight[:, half : 2 * half]
    cosines, sines = (second, first) if network.sin_first else (first, second)

    angle = by * network.frequencies().double()
    turned_cosines = cosines * angle.cos() + sines * angle.sin()
    turned_sines = sines * angle.cos() - cosines * angle.sin()
    turned = (turned_sines, turned_cosines) if network.sin_first else (turned_cosines, turned_sines)
    return torch.cat([*turned, weight[:, 2 * half :]], dim=1).float()


def unet2d_options(cfg: diffuser.Config, shape: Shape, num_classes: int) -> dict:
    """Arguments of the UNet2DModel that computes what the configured network does, for images (C, H, W).

    Raises UserError where there is none.
    """
    require_representable(cfg)
    channels, height, width = shape
    widths = tuple(diffuser.level_widths(cfg.base_channels, cfg.channel_mults))
    groups = math.gcd(cfg.norm_groups, *widths)
    up_levels = cfg.up_attention_levels
    if up_levels is None:
        up_levels = cfg.attention_levels

    # The last of the class embeddings is that of no label.
    embeddings = num_classes + 1 if num_classes else None
    return dict(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        down_block_types=block_types(cfg, cfg.attention_levels, "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=block_types(cfg, up_levels, "UpBlock2D", "AttnUpBlock2D")[::-1],
        block_out_channels=widths,
        layers_per_block=cfg.num_res_blocks,
        dropout=cfg.dropout,
        attention_head_dim=attention_head_dim(cfg),
        add_attention=cfg.use_attention and cfg.mid_attention != "none",
        norm_num_groups=groups,
        attn_norm_num_groups=groups if cfg.mid_attention == "norm" else None,
        norm_eps=cfg.norm_eps,
        downsample_padding=cfg.downsample_padding,
        freq_shift=cfg.freq_shift,
        flip_sin_to_cos=not cfg.sin_first,
        time_embedding_dim=4 * cfg.emb_dim,
        num_class_embeds=embeddings,
        resnet_time_scale_shift="scale_shift" if cfg.conditioning == "scale_shift" else "default",
    )


def require_representable(cfg: diffuser.Config) -> None:
    """Raise UserError, with the reason, for a network that no UNet2DModel computes."""
    def refuse(option: str, reason: str):
        raise UserError(f"diffusers' UNet2DModel cannot represent {option}: {reason}")

    if cfg.conditioning == "concat":
        refuse("--conditioning concat", "embeddings enter as input channels")
    if cfg.patch_size > 1:
        refuse(f"--patch_size {cfg.patch_size}", "its network sees squares of pixels as one")
    if cfg.channel_mults[0] != 1:
        refuse(f"--channel_mults {cfg.channel_mults}", "the first has to be 1")
    if cfg.use_attention and cfg.mid_attention == "plain" and cfg.conditioning == "add":
        refuse("--mid_attention plain", "only with --conditioning scale_shift is there attention without a norm")


def block_types(cfg: diffuser.Config, levels: tuple[int, ...], plain: str, attending: str) -> tuple[str, ...]:
    """The type of block of each level, where those in `levels` have attention."""
    types = []
    for level in range(len(cfg.channel_mults)):
        has_attention = cfg.use_attention and level in levels
        types.append(attending if has_attention else plain)
    return tuple(types)


def attention_head_dim(cfg: diffuser.Config) -> int | None:
    """Channels per head; None for one head of all channels. Raises UserError where it differs between levels."""
    if cfg.head_dim:
        return cfg.head_dim

    all_widths = diffuser.level_widths(cfg.base_channels, cfg.channel_mults)
    widths = {all_widths[level] for level in diffuser.attended_levels(cfg)}
    if cfg.num_heads == 1 or not widths:
        return None
    if len(widths) > 1:
        listed = " and ".join(map(str, sorted(widths)))
        raise UserError(f"--num_heads {cfg.num_heads} at levels of {listed} channels: "
                        "diffusers has one number of channels per head for all levels (train with --head_dim)")
    return widths.pop() // cfg.num_heads


# ---- Network from diffusers --------------------------------------------------------------------

# What a UNet2DModel has to be for a UNet to compute the same.
REQUIRED = dict(
    center_input_sample=(False,),
    time_embedding_type=("positional",),
    mid_block_type=("UNetMidBlock2D",),
    mid_block_scale_factor=(1,),
    downsample_type=("conv",),
    upsample_type=("conv",),
    act_fn=("silu", "swish"),
    class_embed_type=(None,),
    resnet_time_scale_shift=("default", "scale_shift"),
    downsample_padding=(0, 1),
    in_channels=(1, 3),
)
BLOCKS = {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"}


def network_options(theirs, known: diffuser.Config | None = None) -> dict:
    """Options of the network that computes what a UNet2DModel with the config `theirs` does.

    known: a configuration that may say the same of its heads in other words. Raises UserError where there is none.
    """
    require_known_network(theirs)
    widths = theirs.block_out_channels
    down = attending_levels(theirs.down_block_types)
    up = attending_levels(theirs.up_block_types[::-1])
    scale_shift = theirs.resnet_time_scale_shift == "scale_shift"

    # Attention in the middle; it lacks a norm only beside scale_shift.
    if not theirs.add_attention:
        mid_attention = "none"
    elif scale_shift and theirs.attn_norm_num_groups is None:
        mid_attention = "plain"
    else:
        mid_attention = "norm"

    heads = dict(num_heads=1, head_dim=theirs.attention_head_dim or 0)
    if known and attention_head_dim(known) == theirs.attention_head_dim:
        heads = dict(num_heads=known.num_heads, head_dim=known.head_dim)

    return dict(
        channels=theirs.in_channels,
        base_channels=widths[0],
        channel_mults=tuple(channel_mult(width, widths[0]) for width in widths),
        num_res_blocks=theirs.layers_per_block,
        use_attention=bool(theirs.add_attention or down or up),
        attention_levels=down,
        up_attention_levels=None if up == down else up,
        mid_attention=mid_attention,
        **heads,
        emb_dim=time_width(theirs) // 4,
        dropout=theirs.dropout,
        norm_groups=theirs.norm_num_groups,
        norm_eps=theirs.norm_eps,
        downsample_padding=theirs.downsample_padding,
        freq_shift=float(theirs.freq_shift),
        sin_first=not theirs.flip_sin_to_cos,
        conditioning="scale_shift" if scale_shift else "add",
    )


def require_known_network(theirs) -> None:
    """Raise UserError, with the entry of its config, for a UNet2DModel that no UNet computes."""
    for name, possible in REQUIRED.items():
        if theirs[name] not in possible:
            raise UserError(f"its {name} is {theirs[name]!r}: here it is {' or '.join(map(repr, possible))}")

    if theirs.out_channels != theirs.in_channels:
        raise UserError(f"it puts out {theirs.out_channels} channels for {theirs.in_channels}: there is no learned "
                        "variance here")
    strange = {*theirs.down_block_types, *theirs.up_block_types} - BLOCKS
    if strange:
        raise UserError(f"it has a {min(strange)}: here blocks are {', '.join(sorted(BLOCKS))}")

    groups = theirs.norm_num_groups
    emb = time_width(theirs)
    if theirs.attn_norm_num_groups not in (None, groups) or emb % 4 != 0:
        raise UserError(f"here its attn_norm_num_groups, {theirs.attn_norm_num_groups}, would have to be its "
                        f"norm_num_groups, {groups}, and its time_embedding_dim, {emb}, a multiple of 4")


def time_width(theirs) -> int:
    """Channels of the embedding of t."""
    return theirs.time_embedding_dim or 4 * theirs.block_out_channels[0]


def attending_levels(block_types: tuple[str, ...]) -> tuple[int, ...]:
    """The levels whose block has attention."""
    return tuple(level for level, kind in enumerate(block_types) if kind.startswith("Attn"))


def channel_mult(width: int, first_width: int) -> int | float:
    """The width of a level as a multiple of the first one's, whole where it can be."""
    if width % first_width == 0:
        return width // first_width
    return width / first_width


# ---- Schedule ----------------------------------------------------------------------------------

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}                 # flow: has its own
SPACINGS = {"trailing": "trailing", "leading": "leading", "linear": "linspace"}            # others become trailing
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2",
                  "geodiff": "sigmoid"}


def same_curve(cfg: diffuser.Config, scheduler) -> bool:
    """Whether a scheduler of diffusers, which computes in float32, has the configured alpha_bar."""
    ours = diffuser.alpha_bar_table(cfg)
    theirs = scheduler.alphas_cumprod.double()
    if len(ours) != len(theirs):
        return False
    return bool((ours - theirs).abs().max() < 1e-5)


def to_scheduler(cfg: diffuser.Config):
    """A DDPMScheduler that adds and removes noise as configured; others load from its config.

    A FlowMatchEulerDiscreteScheduler for flow matching. Raises UserError where there is neither.
    """
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    if cfg.prediction == "flow" and cfg.schedule_type == "flow" and not cfg.zero_terminal_snr:
        return FlowMatchEulerDiscreteScheduler(cfg.timesteps)
    if cfg.prediction not in PREDICTION_TYPES:
        reason = "its networks see log(sigma) / 4, not t"
        if cfg.prediction == "flow":
            reason = "only with --schedule_type flow, without --zero_terminal_snr"
        raise UserError(f"diffusers' schedulers cannot represent --prediction {cfg.prediction}: {reason}")

    scale = 1000 / cfg.timesteps if cfg.scale_betas else 1.0
    options = dict(
        num_train_timesteps=cfg.timesteps,
        beta_start=cfg.beta_start * scale,
        beta_end=cfg.beta_end * scale,
        rescale_betas_zero_snr=cfg.zero_terminal_snr,
        prediction_type=PREDICTION_TYPES[cfg.prediction],
        variance_type=f"fixed_{cfg.variance}",
        timestep_spacing=SPACINGS.get(cfg.spacing, "trailing"),
        clip_sample=cfg.clip_x0 and not cfg.dynamic_threshold,
        thresholding=cfg.dynamic_threshold > 0,
    )
    if cfg.dynamic_threshold:
        options["dynamic_thresholding_ratio"] = cfg.dynamic_threshold
        options["sample_max_value"] = 1000.0

    scheduler = DDPMScheduler(**options, beta_schedule=BETA_SCHEDULES.get(cfg.schedule_type, "linear"))
    if same_curve(cfg, scheduler):
        return scheduler

    # A schedule that it has no name for: beta by beta, and it rescales them itself.
    alpha_bar = diffuser.alpha_bar_table(dataclasses.replace(cfg, zero_terminal_snr=False))
    alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    betas = 1 - alpha_bar / alpha_bar_prev
    return DDPMScheduler(**options, trained_betas=betas.tolist())


def schedule_options(scheduler, notes: list[str], known: diffuser.Config | None = None) -> dict:
    """Options of the schedule, and of drawing, from a DDPMScheduler or a FlowMatchEulerDiscreteScheduler.

    known: a configuration that may have the schedule already; notes: takes lines to be told. Raises UserError for a
    schedule that has no name here.
    """
    theirs = scheduler.config
    if not hasattr(scheduler, "alphas_cumprod"):
        return dict(timesteps=theirs.num_train_timesteps, prediction="flow", schedule_type="flow",
                    zero_terminal_snr=False, clip_x0=bool(known and known.clip_x0))
    predictions = {kind: name for name, kind in PREDICTION_TYPES.items()}
    if theirs.prediction_type not in predictions or not theirs.variance_type.startswith("fixed"):
        raise UserError(f"its scheduler's prediction_type {theirs.prediction_type!r} or variance_type "
                        f"{theirs.variance_type!r} has no counterpart here")
    shared = dict(
        timesteps=len(scheduler.betas),
        prediction=predictions[theirs.prediction_type],
        zero_terminal_snr=bool(theirs.rescale_betas_zero_snr),
    )
    curve = find_curve(scheduler, shared, known)

    # Thresholds of up to 1 are clipping.
    thresholding = theirs.thresholding and theirs.sample_max_value > 1
    if thresholding and theirs.sample_max_value < 1000:
        notes.append(f"its scheduler's thresholds end at {theirs.sample_max_value:g}: here they have no end")
    return dict(
        **shared,
        **curve,
        variance="large" if "large" in theirs.variance_type else "small",
        clip_x0=bool(theirs.clip_sample or theirs.thresholding),
        dynamic_threshold=theirs.dynamic_thresholding_ratio if thresholding else 0.0,
    )


def find_curve(scheduler, shared: dict, known: diffuser.Config | None) -> dict:
    """The options that give a scheduler's alpha_bar, beside those in `shared`. Raises UserError where none do."""
    candidates = []
    if known:
        names = ("schedule_type", "beta_start", "beta_end", "cosine_s", "scale_betas")
        candidates.append({name: getattr(known, name) for name in names})

    # The betas named in the config may not be those in use.
    theirs = scheduler.config
    betas = scheduler.betas.tolist()
    named_ends = (theirs.beta_start, theirs.beta_end)
    actual_ends = (betas[0], betas[-1])
    for schedule in diffuser.SCHEDULES:
        for low, high in (named_ends, actual_ends):
            if 1e-9 <= low <= high <= 0.999:
                candidates.append(dict(schedule_type=schedule, beta_start=low, beta_end=high, cosine_s=0.008,
                                       scale_betas=False))

    for candidate in candidates:
        if same_curve(diffuser.Config(**candidate, **shared), scheduler):
            return candidate
    raise UserError(f"its noise schedule ({theirs.beta_schedule}, unless betas are given one by one) is none of "
                    f"{', '.join(diffuser.SCHEDULES)}")


# ---- Checkpoints -------------------------------------------------------------------------------


def read_model(path: str, raw: bool) -> tuple[diffuser.Model, dict]:
    """The model in a checkpoint, and the checkpoint's content. raw: not with averaged weights. Raises UserError."""
    state = diffuser.load_checkpoint(path)
    cfg = diffuser.configure(state["config"], device="cpu")      # where all other weights are
    if raw:
        cfg = dataclasses.replace(cfg, use_ema=False)
    return diffuser.build_model(state, cfg), state


def write_checkpoint(source: str, path: Path, network: diffuser.UNet, cfg: diffuser.Config, shape: Shape,
                     class_names: list[str], moments: diffuser.Moments) -> None:
    """Write a checkpoint of step 0 with these weights. Raises UserError, naming their source, for no whole model."""
    try:
        diffuser.write_checkpoint(path, network, cfg, shape, class_names, moments)
    except UserError as error:
        raise UserError(f"{source} cannot be used: {error}") from error


def require_free(path: str, name: str) -> Path:
    """The path. Raises UserError where something is that would be overwritten, or where nothing can be written.

    name: that of the argument, for messages.
    """
    if os.path.lexists(path):
        raise UserError(f"{path} exists: give another name, or remove it")
    require_writable(path, name.upper())
    return Path(path)


def require_free_checkpoint(path: str) -> Path:
    """The path. Raises UserError also where it has another ending than a checkpoint."""
    require_free(path, "checkpoint")
    if not path.endswith(".pt"):
        raise UserError(f"{path} does not end in .pt: it would not be found as a checkpoint")
    return Path(path)


# ---- To diffusers ------------------------------------------------------------------------------


def to_diffusers(checkpoint: str, folder: str, raw: bool = False, label: str | None = None) -> str:
    """Write the model in a checkpoint as a DDPMPipeline with a model card; returns what to say of it.

    raw: the weights being trained; label: the one class to keep, in a network that takes no labels. Raises UserError.
    """
    from diffusers import DDPMPipeline

    target = require_free(folder, "folder")
    model, state = read_model(checkpoint, raw)
    number = None
    if label is not None:
        if not model.class_names:
            raise UserError(f"--label {label}: {checkpoint} was trained without classes")
        number = diffuser.parse_classes([label], model.class_names)[0]
    unet = to_unet2d(model.network, model.config, model.shape, number)
    scheduler = to_scheduler(model.config)

    # The folder is whole before it has its name.
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as aside:
        temporary = Path(aside, target.name)
        DDPMPipeline(unet, scheduler).save_pretrained(temporary)
        write_companions(temporary, model, state, number)
        temporary.rename(target)
    return f"{target}: a DDPMPipeline of {unet.num_parameters():,} parameters; how to use it: {target / 'README.md'}"


def write_companions(folder: Path, model: diffuser.Model, state: dict, number: int | None) -> None:
    """Add to an exported model what diffusers has no place for, a grid of samples and the model card.

    number: the class that it is for, where that is one alone. Raises OSError.
    """
    if number is None:
        class_names = model.class_names
        label = ""
        moments = vars(model.moments)
    else:
        class_names = []
        label = model.class_names[number]
        moments = {name: value[[number]] for name, value in vars(model.moments).items()}

    write_extras(folder, model.config, class_names, moments)
    save_samples(folder / "samples.png", model, class_names[:10], number)
    card = model_card(model, state, folder.name, class_names, label)
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_samples(path: Path, model: diffuser.Model, class_names: list[str], number: int | None) -> None:
    """Draw a grid: two images of each of these classes, the model's first ones; eight images where none are given.

    number: the one class to draw where none are given. Raises OSError.
    """
    classes = list(range(len(class_names)))
    if number is not None:
        classes = [number]
    count = 2 * len(class_names) if class_names else 8
    labels = model.labels(classes, count)
    images = torch.cat(list(diffuser.draw_with_bar(model, labels, model.config)))
    save_grid(images, path, class_names)


@dataclass
class Extras:
    """What stands beside a pipeline that was exported here; empty beside others."""

    config: dict = field(default_factory=dict)
    class_names: list[str] | None = None
    moments: diffuser.Moments | None = None


def write_extras(folder: Path, cfg: diffuser.Config, class_names: list[str], moments: dict[str, Tensor]) -> None:
    """Write them; read_extras reads them. Raises OSError."""
    from safetensors.torch import save

    content = save({name: value.contiguous() for name, value in moments.items()})
    (folder / "moments.safetensors").write_bytes(content)
    write_json(folder / "diffuser.json", dict(config=dataclasses.asdict(cfg), class_names=class_names))


def read_extras(folder: Path) -> Extras:
    """What write_extras wrote beside a pipeline, empty elsewhere. Raises UserError."""
    from safetensors.torch import load_file

    if not (folder / "diffuser.json").is_file():
        return Extras()
    about = read_json(folder / "diffuser.json")
    config = about.get("config") or {}
    class_names = about.get("class_names")
    if type(config) is not dict or not diffuser.are_class_names(class_names or []):
        raise UserError(f"{folder / 'diffuser.json'} is damaged: without it the folder is read like any other")

    path = folder / "moments.safetensors"
    try:
        moments = load_file(path)
    except Exception as error:                                   # safetensors raises many kinds
        raise UserError(f"{path} is missing or damaged ({first_line(error)}): without it and diffuser.json the folder "
                        "is read like any other") from error
    if moments.keys() != {"mean", "var"} or any(v.dim() != 4 for v in moments.values()):
        raise UserError(f"{path} does not hold the mean and var of images: without it and diffuser.json the folder is "
                        "read like any other")
    return Extras(config, class_names, diffuser.Moments(**moments))


# ---- From diffusers ----------------------------------------------------------------------------


def from_diffusers(folder: str, checkpoint: str, class_names: str | None = None, img_size: str | None = None) -> str:
    """Write the UNet2DModel in a folder, of a pipeline or alone, as a checkpoint; returns what to say of it.

    class_names: "cat,dog", one for each class embedding or for all but the last, which then is that of no label;
    img_size: where the folder does not tell. Raises UserError.
    """
    # Read what is there.
    target = require_free_checkpoint(checkpoint)
    asked_size = diffuser.parse_value("img_size", img_size) if img_size else None
    home = Path(folder)
    notes = []
    theirs = read_unet2d(home)
    scheduler = read_scheduler(home, notes)
    extras = read_extras(home)

    # Find the configuration that computes the same.
    height, width = asked_size or own_image_size(theirs, folder)
    try:
        known = diffuser.configure(extras.config) if extras.config else None
    except UserError as error:
        raise UserError(f"{home / 'diffuser.json'} cannot be used: {error}") from error
    options = network_options(theirs.config, known) | schedule_options(scheduler, notes, known)
    embeddings = theirs.config.num_class_embeds or 0
    names = read_class_names(class_names, embeddings, extras.class_names)
    dataset = extras.config.get("dataset") or "folder"
    cfg = diffuser.configure({**diffuser.DDPM, **extras.config}, **options, dataset=dataset, img_size=(height, width),
                             use_labels=bool(names))
    shape = (cfg.channels, height, width)

    # Take over the weights.
    if embeddings > 0 and len(names) == embeddings:
        add_null_class(theirs)
        notes.append("it knows no null class: guidance has nothing to guide away from until you train on with one")
    network = diffuser.build_unet(cfg, cfg.channels, len(names))
    for a, b in counterparts(network, theirs):
        a.load_state_dict(b.state_dict())
    if cfg.prediction == "flow":                                 # there t = 1..T
        network.time_mlp[0].weight.data = shift_time(network, 1)

    moments = extras.moments
    if moments is None or len(moments.mean) != len(names) + 1:
        moments = diffuser.standard_moments(shape, len(names))
    write_checkpoint(folder, target, network, cfg, shape, names, moments)

    notes.append(f"{target}: {diffuser.count_parameters(network):,} parameters, "
                 f"images {height}x{width}x{cfg.channels}, {len(names)} classes")
    return "\n".join(notes)


def own_image_size(theirs, folder: str) -> tuple[int, int]:
    """Height and width of the images by the network's config. Raises UserError where they are not in it."""
    size = theirs.config.sample_size
    if size is None:
        raise UserError(f"{folder} does not tell the size of its images: give --img_size")
    if isinstance(size, (tuple, list)):
        height, width = size
        return height, width
    return size, size


def add_null_class(theirs: nn.Module) -> None:
    """Give a UNet2DModel a last class embedding for no label, the mean of the others."""
    table = theirs.class_embedding.weight.data
    null_class = table.mean(0, keepdim=True)
    theirs.class_embedding = nn.Embedding.from_pretrained(torch.cat([table, null_class]))


def read_class_names(given: str | None, embeddings: int, stored: list[str] | None) -> list[str]:
    """Names for that many class embeddings, or for all but the last: as given, else as stored, else their numbers.

    Raises UserError.
    """
    if given is not None:
        names = [name.strip() for name in given.split(",")]
    elif stored is not None:
        names = stored
    else:
        names = [str(i) for i in range(embeddings)]

    possible = (embeddings, embeddings - 1) if embeddings else (0,)
    if len(names) not in possible:
        raise UserError(f"--class_names: {len(names)} for {embeddings} class embeddings")
    if not all(names) or len(set(names)) < len(names):
        raise UserError("--class_names: each needs a name of its own")
    return names


def read_json(path: Path) -> dict:
    """A configuration in JSON. Raises UserError."""
    try:
        return read_json_object(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise UserError(f"{path} is no configuration ({first_line(error)})") from error


def read_unet2d(folder: Path):
    """The UNet2DModel of a pipeline's folder, or in a folder of its own, in float32. Raises UserError."""
    from diffusers import UNet2DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()                                # what is wrong is told below, in a line
    home = folder
    if (folder / "unet").is_dir():
        home = folder / "unet"
    if not (home / "config.json").is_file():
        raise UserError(f"{folder} holds neither unet/config.json nor config.json: it is no folder of diffusers. One "
                        "from the hub has to be downloaded first: hf download NAME --local-dir DIR")
    config = read_json(home / "config.json")
    kind = config.get("_class_name")
    if kind not in (None, "UNet2DModel"):
        raise UserError(f"{home} is a {kind}: this program has the counterpart of UNet2DModel alone")
    require_known_network(sketch_unet2d(home / "config.json", config).config)

    # Of the kinds of files: safetensors before a pickle (read with weights_only), half precision where it is alone.
    names = [path.name for path in home.glob("diffusion_pytorch_model*")]
    use_safetensors = any(name.endswith(".safetensors") for name in names)
    chosen = [name for name in names if name.endswith(".safetensors")] or names
    only_half = chosen and all(".fp16." in name for name in chosen)
    variant = "fp16" if only_half else None
    try:
        theirs, found = UNet2DModel.from_pretrained(
            home, local_files_only=True, use_safetensors=use_safetensors, variant=variant, low_cpu_mem_usage=False,
            output_loading_info=True)
    except (ImportError, MemoryError):
        raise
    except Exception as error:                                   # the libraries raise many kinds
        raise UserError(f"the weights in {home} are missing, damaged, or not those of its config.json "
                        f"({first_line(error)}): download them anew") from error

    # Weights that are missing would be random ones.
    wrong = []
    for key, parameters in found.items():
        if parameters:
            wrong.append(f"{key} {', '.join(map(str, parameters))[:80]}")
    if wrong:
        raise UserError(f"the weights in {home} are not those of its config.json: {'; '.join(wrong)}")
    return theirs.float().eval().requires_grad_(False)


# What a config.json may say before anything is built from it: names of diffusers, and the ranges of our own options.
UNET_RANGES = dict(
    block_out_channels=(1, diffuser.MAX_CHANNELS),
    layers_per_block=(1, diffuser.FIELDS["num_res_blocks"].metadata["hi"]),
    in_channels=(1, 3),
    sample_size=(1, diffuser.FIELDS["img_size"].metadata["hi"]),
    norm_num_groups=(1, diffuser.FIELDS["norm_groups"].metadata["hi"]),
    attn_norm_num_groups=(1, diffuser.FIELDS["norm_groups"].metadata["hi"]),
    attention_head_dim=(1, diffuser.FIELDS["head_dim"].metadata["hi"]),
    time_embedding_dim=(1, 4 * diffuser.FIELDS["emb_dim"].metadata["hi"]),
    num_class_embeds=(1, diffuser.MAX_CLASSES + 1),
    norm_eps=(0, 1),
    dropout=(0, 1),
)
SCHEDULER_RANGES = dict(
    num_train_timesteps=(2, diffuser.FIELDS["timesteps"].metadata["hi"]),
    beta_start=(0, 1),
    beta_end=(0, 1),
    trained_betas=(0, 1),
)
MAX_LEVELS = 16
# What makes the times that a scheduler of flow matching is trained at others than 1/T, 2/T, ..., 1.
BENDS_TIME = ("shift", "use_dynamic_shifting", "shift_terminal", "invert_sigmas", "use_karras_sigmas",
              "use_exponential_sigmas", "use_beta_sigmas")


def check_config(path: Path, config: dict, kind: type, ranges: dict) -> None:
    """Raise UserError, naming the entry, where a config.json holds what no object of diffusers of that kind can have.

    The types are those of the defaults of its constructor.
    """
    for name, parameter in inspect.signature(kind).parameters.items():
        value = config.get(name, parameter.default)
        wrong = f"{path} cannot be used: its {name} is {repr(value)[:60]}"
        if value is None and "None" in str(parameter.annotation):
            continue
        if not has_type_of(value, parameter.default):
            raise UserError(wrong)
        if name in ranges:
            low, high = ranges[name]
            numbers = (int,) if high > 1 else (int, float)
            entries = value if isinstance(value, (list, tuple)) else [value]
            if not all(type(n) in numbers and low <= n <= high for n in entries):
                raise UserError(f"{wrong}, and lies between {low:,} and {high:,} here")


def has_type_of(value, default) -> bool:
    """Whether a value from JSON is of the type that the default has; any but an object will do where that is None."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, (int, float)):
        return type(value) in (int, float)
    if isinstance(default, str):
        return isinstance(value, str)
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and all(has_type_of(entry, default[0]) for entry in value)
    return not isinstance(value, dict)


def sketch_unet2d(path: Path, config: dict):
    """The UNet2DModel of a config.json without its weights, in no memory. Raises UserError, naming the entry."""
    from diffusers import UNet2DModel

    check_config(path, config, UNet2DModel, UNET_RANGES)
    parameters = inspect.signature(UNet2DModel).parameters
    known = {name: config.get(name, parameter.default) for name, parameter in parameters.items()}

    # Levels that fit together.
    widths = known["block_out_channels"] or ()
    if not 1 <= len(widths) <= MAX_LEVELS:
        raise UserError(f"{path} cannot be used: its block_out_channels has {len(widths)} entries, 1 to {MAX_LEVELS} "
                        "are possible")
    for name in ("down_block_types", "up_block_types"):
        if len(known[name] or ()) != len(widths):
            raise UserError(f"{path} cannot be used: its {name} has another number of entries than its "
                            "block_out_channels")
    for name in ("norm_num_groups", "attention_head_dim"):
        unit = known[name]
        if unit and any(width % unit for width in attended_widths(known, every=name == "norm_num_groups")):
            raise UserError(f"{path} cannot be used: its {name}, {unit}, does not divide its block_out_channels")

    try:
        with torch.device("meta"):
            sketch = UNet2DModel(**known)
    except Exception as error:                                   # diffusers raises many kinds here
        raise UserError(f"{path} cannot be used: no network can be made of it ({first_line(error)})") from error

    need = 8 * diffuser.count_parameters(sketch)                 # theirs and ours
    free = diffuser.free_memory(torch.device("cpu"))
    if need > free:
        raise UserError(f"{path}: the network takes {need / 2**30:.2g} GiB, {free / 2**30:.2g} GiB are free")
    return sketch


def attended_widths(config: dict, every: bool) -> list[int]:
    """The channels of all levels, or of those with attention; the middle has those of the last."""
    widths = list(config["block_out_channels"])
    if every:
        return widths
    attended = []
    for width, down, up in zip(widths, config["down_block_types"], config["up_block_types"][::-1]):
        if down.startswith("Attn") or up.startswith("Attn"):
            attended.append(width)
    if config["add_attention"]:
        attended.append(widths[-1])
    return attended


def find_scheduler_config(folder: Path) -> Path | None:
    """The file in a pipeline's folder, or in a folder of the oldest layout."""
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.is_file():
            return path
    return None


def read_scheduler(folder: Path, notes: list[str]):
    """A DDPMScheduler with the schedule of the one in a pipeline's folder; for flow matching, that one.

    notes: takes lines to be told. Raises UserError.
    """
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    path = find_scheduler_config(folder)
    if path is None:
        notes.append("no scheduler_config.json there: taking DDPMScheduler's own defaults")
        return DDPMScheduler()

    config = {name: value for name, value in read_json(path).items() if value is not None}
    if config.get("_class_name") == "FlowMatchEulerDiscreteScheduler":
        check_config(path, config, FlowMatchEulerDiscreteScheduler, SCHEDULER_RANGES)
        usual = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
        for name in BENDS_TIME:
            if config.get(name) not in (None, usual[name].default):
                raise UserError(f"{path} has {name} = {config[name]!r}: here times are evenly spaced")
        return FlowMatchEulerDiscreteScheduler(config.get("num_train_timesteps", 1000))
    if "beta_schedule" not in config and "trained_betas" not in config:
        raise UserError(f"{path} is a {config.get('_class_name')}, which has no betas: nothing here matches it")
    check_config(path, config, DDPMScheduler, SCHEDULER_RANGES)
    limit = config.get("clip_sample_range", 1.0)
    if limit != 1:
        notes.append(f"its scheduler clips images to +-{limit}: here it is +-1, or --clip_x0 false")
    if config.get("_class_name") not in ("DDPMScheduler", "DDIMScheduler"):
        config.setdefault("clip_sample", False)                  # others have no such thing

    known = inspect.signature(DDPMScheduler).parameters
    try:
        return DDPMScheduler(**{name: value for name, value in config.items() if name in known})
    except Exception as error:                                   # diffusers raises many kinds here
        raise UserError(f"{path} cannot be used: no schedule can be made of it, its beta_schedule is "
                        f"{config.get('beta_schedule')!r}") from error


# ---- safetensors -------------------------------------------------------------------------------


def to_safetensors(checkpoint: str, path: str, raw: bool = False) -> str:
    """Write the weights in a checkpoint, configuration, shape and class names as JSON in the metadata.

    raw: the weights being trained. Returns what to say of it. Raises UserError, OSError.
    """
    target = require_free(path, "path")
    model, state = read_model(checkpoint, raw)
    return write_safetensors(model, state, target)


def write_safetensors(model: diffuser.Model, state: dict, target: Path) -> str:
    """See to_safetensors; state: the checkpoint of the model. Raises OSError."""
    from safetensors.torch import save

    tensors = dict(model.network.state_dict())
    for name, value in vars(model.moments).items():
        tensors[f"moments.{name}"] = value
    tensors = {name: value.contiguous() for name, value in tensors.items()}

    about = dict(
        config=dataclasses.asdict(model.config),
        shape=model.shape,
        class_names=model.class_names,
        step=state["step"],
    )
    content = save(tensors, {"format": "pt", "diffuser": json.dumps(about)})
    write_atomically(target, lambda file: file.write(content))
    return f"{target}: {len(tensors)} tensors"


def from_safetensors(path: str, checkpoint: str) -> str:
    """Write a checkpoint from such a file; returns what to say of it. Raises UserError."""
    target = require_free_checkpoint(checkpoint)
    model = read_safetensors(path)
    write_checkpoint(path, target, model.network, model.config, model.shape, model.class_names, model.moments)
    return f"{target}: {diffuser.count_parameters(model.network):,} parameters"


def read_safetensors(path: str | Path) -> diffuser.Model:
    """The model in such a file, on the CPU. Raises UserError."""
    from safetensors import safe_open

    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("diffuser", "null")
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except Exception as error:                                   # safetensors raises many kinds
        raise UserError(f"{path} is no whole file of safetensors ({first_line(error)})") from error

    # The configuration in the metadata.
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise UserError(f"{path} holds no configuration of this program in its metadata")
    for name in ("config", "shape", "class_names"):
        if not diffuser.CHECKPOINT[name].valid(about.get(name)):
            raise UserError(f"{path} cannot be used: the {name} in its metadata is missing, or not that of a model")
    for name in ("moments.mean", "moments.var"):
        if name not in tensors:
            raise UserError(f"{path} cannot be used: it lacks the tensor {name}")
    try:
        cfg = diffuser.configure(about["config"])
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error

    # The network.
    shape = tuple(about["shape"])
    class_names = about["class_names"]
    moments = diffuser.Moments(tensors.pop("moments.mean"), tensors.pop("moments.var"))
    with torch.device("meta"):
        network = diffuser.build_unet(cfg, shape[0], len(class_names))
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} cannot be used: its tensors are not those of its configuration") from error
    return diffuser.Model.from_network(network, cfg, shape, class_names, moments)


# ---- The Hub -----------------------------------------------------------------------------------

# What a Space runs: the page, and what that imports.
SPACE_FILES = ("app.py", "runs.py", "edit.py", "convert.py", "diffuser.py", "plot_loss.py", "report.py", "diffuser_lib")
SPACE_WEIGHTS = "model.safetensors"                              # beside it app.py is a Space
SPACE_GRADIO = "6.31.0"                                          # where none is installed here

SPACE_CARD = """---
title: {quoted}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
---

# {title}

A page that draws with a denoising diffusion model of {shape} images, trained on `{dataset}` ({steps:,} steps).

![samples](samples.png)

To run it on a machine of one's own: `pip install -r requirements.txt`, then `python app.py`.
"""


def to_space(checkpoint: str, folder: str, raw: bool = False) -> str:
    """Write a folder that is a Space for Hugging Face as it stands; returns what to say of it. Raises UserError.

    raw: the weights being trained, not their average.
    """
    target = require_free(folder, "folder")
    model, state = read_model(checkpoint, raw)
    here = Path(__file__).resolve().parent
    height, width = model.shape[1:]
    card = SPACE_CARD.format(
        title=target.name, quoted=json.dumps(target.name), gradio=package_version("gradio") or SPACE_GRADIO,
        shape=f"{height}x{width}x{model.shape[0]}", dataset=model.config.dataset or "images", steps=state["step"])
    requirements = (here / "requirements.txt").read_text(encoding="utf-8")

    # The folder is whole before it has its name.
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as aside:
        temporary = Path(aside, target.name)
        temporary.mkdir()
        for name in SPACE_FILES:
            if (here / name).is_dir():
                shutil.copytree(here / name, temporary / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(here / name, temporary / name)
        write_safetensors(model, state, temporary / SPACE_WEIGHTS)
        save_samples(temporary / "samples.png", model, model.class_names[:10], None)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        (temporary / "requirements.txt").write_text(f"{requirements}safetensors>=0.4\ngradio>=6.0\n", encoding="utf-8")
        temporary.rename(target)
    return (f"{target}: a Space that draws; try it with python {target / 'app.py'}, publish it with\n"
            f"python convert.py to-hub {target} OWNER/NAME")


def to_hub(folder: str, repository: str, private: bool = False) -> str:
    """Push a folder that was exported to the Hub, as a Space or as a model; returns its address.

    repository: OWNER/NAME. Raises UserError, with the command to give by hand where no token is known.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # What it is.
    path = Path(folder)
    is_space = (path / SPACE_WEIGHTS).is_file() and (path / "app.py").is_file()
    if not is_space and not (path / "model_index.json").is_file():
        raise UserError(f"{folder} is no folder as to-space or to-diffusers write it")
    kind = "space" if is_space else "model"
    if repository.count("/") != 1:
        raise UserError(f"{repository} is no name of a repository: write OWNER/NAME")

    if not hub.get_token():
        words = ["hf", "upload", repository, folder, "--repo-type", kind, *["--private"] * private]
        raise UserError("no token of Hugging Face is known here: log in by `hf auth login`, then give this command "
                        f"again, or\n{shlex.join(words)}")
    try:
        if private and hub.repo_exists(repository, repo_type=kind) and not hub.repo_info(
                repository, repo_type=kind).private:
            raise UserError(f"{repository} is there already, and public: choose another name, or leave --private out")
        address = hub.create_repo(repository, repo_type=kind, private=private, exist_ok=True,
                                  space_sdk="gradio" if is_space else None)
        hub.upload_folder(repo_id=repository, repo_type=kind, folder_path=path,
                          ignore_patterns=["__pycache__/**", "**/__pycache__/**"])
    except HFValidationError as error:
        raise UserError(f"{repository} is no name of a repository: {first_line(error)}") from error
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{repository} was not written: {first_line(error)}", code=1) from error
    return f"{folder} is at {address}"


# ---- Model card --------------------------------------------------------------------------------

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [diffusion, ddpm, image-generation]
---

# {{ name }}

A denoising diffusion model of {{ model.shape[1] }}x{{ model.shape[2] }}x{{ model.shape[0] }} images, trained on
`{{ cfg.dataset }}`: {{ state.step }} steps ({{ "%.4g" % state.epoch }} epochs), last loss
{{ "%.4f" % state.loss_history[-1][1] if state.loss_history else "unknown" }}.

![samples](samples.png)

{% if names %}
Labels: {{ listed(names) }}; {{ names | length }} is no label, for guidance.

{% elif label %}
It draws the class {{ label }} alone.

{% endif %}
## Use

```python
{% if not names and signal <= 0.01 %}
from diffusers import {{ classes }}

pipeline = DDPMPipeline.from_pretrained("path/to/this/folder")      # add .to("cuda") for a GPU
{% if flow %}
images = pipeline(batch_size=4, num_inference_steps=50).images
{% else %}
pipeline.scheduler = {{ scheduler }}
images = pipeline(batch_size=4, num_inference_steps=25).images      # without the line before: {{ cfg.timesteps }}
{% endif %}
{% else %}
import torch
from diffusers import {{ classes }}
{% if signal > 0.01 %}
from safetensors.torch import load_file
from torch.nn import functional as F
{% endif %}

folder = "path/to/this/folder"
pipeline = DDPMPipeline.from_pretrained(folder)
unet, scheduler = pipeline.unet, {{ scheduler }}
{% if names %}
labels = torch.tensor({{ range([4, names | length] | min) | list }})
{% endif %}
x = torch.randn({{ "len(labels)" if names else 4 }}, {{ model.shape | join(", ") }})
{% if signal > 0.01 %}

# {{ "%.1f" % (100 * signal) }}% of the signal is left at the last timestep: N(0, I) is the wrong start
moments, left = load_file(f"{folder}/moments.safetensors"), scheduler.alphas_cumprod[-1]
mean, var = (F.interpolate(moments[name][{{ "labels" if names else "-1:" }}], x.shape[2:], mode="bilinear")
             for name in ("mean", "var"))
x = left.sqrt() * mean + (left * var + 1 - left).sqrt() * x
{% endif %}

scheduler.set_timesteps({{ 50 if flow else 25 }})
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t{{ ", class_labels=labels" if names }}).sample, t, x).prev_sample
images = pipeline.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
{% endif %}
```

{% if flow %}
The scheduler is a `FlowMatchEulerDiscreteScheduler`: its steps are those of `diffuser.py --sampler ddim --spacing
linear --clip_x0 false`.
{% else %}
The scheduler is a `DDPMScheduler`; `DDIMScheduler` (with `use_clipped_model_output=True`, and a number of steps that
divides T, it takes the very steps of `diffuser.py --sampler ddim`) and `DPMSolverMultistepScheduler` load from its
config.
{% endif %}
The network was trained to predict {{ cfg.prediction }} on the {{ cfg.schedule_type }} schedule with
T = {{ cfg.timesteps }}.

## Settings

| option | value |
|---|---|
{% for option, value in settings.items() %}
| {{ option }} | {{ value }} |
{% endfor %}
"""


def model_card(model: diffuser.Model, state: dict, name: str, class_names: list[str], label: str = "") -> str:
    """README.md of an exported model, of one label alone where that is given.

    Its Python draws by diffusers' pipeline where that can do it, else by its loop, with labels, and with the start that
    a schedule which leaves signal at T needs.
    """
    import jinja2  # torch depends on it

    cfg = model.config
    usual = diffuser.Config()
    settings = {}
    for option in diffuser.FIELDS:
        value = getattr(cfg, option)
        if option not in diffuser.PER_RUN and value != getattr(usual, option):
            settings[option] = value

    # What draws in its Python.
    flow = cfg.prediction == "flow"
    classes = "DDPMPipeline"
    scheduler = "pipeline.scheduler"
    if not flow:
        classes += ", DPMSolverMultistepScheduler"
        scheduler = "DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)"

    signal_at_T = model.diffusion.alpha_bar[-1].sqrt().item()
    template = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True).from_string(CARD)
    return template.render(model=model, cfg=cfg, state=state, name=name, names=class_names, label=label,
                           settings=settings, signal=signal_at_T, listed=diffuser.list_classes, flow=flow,
                           classes=classes, scheduler=scheduler)


# ---- Command line ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A command: what it runs, and the names of its source and target, which are also those of its arguments."""

    run: Callable[..., str]
    source: str
    target: str


COMMANDS = {
    "to-diffusers": Command(to_diffusers, "checkpoint", "folder"),
    "from-diffusers": Command(from_diffusers, "folder", "checkpoint"),
    "to-safetensors": Command(to_safetensors, "checkpoint", "path"),
    "from-safetensors": Command(from_safetensors, "path", "checkpoint"),
    "to-space": Command(to_space, "checkpoint", "folder"),
    "to-hub": Command(to_hub, "folder", "repository"),
}


def build_parser() -> Parser:
    parser = Parser("convert.py", usage="python convert.py COMMAND FROM TO [options]", doc=__doc__)
    add_debug(parser)

    # --debug may stand behind the command, too; where it does not, it leaves alone what stood before.
    debug = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    add_debug(debug)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subparsers = {}
    for name, command in COMMANDS.items():
        usage = f"python convert.py {name} {command.source} {command.target} [options]"
        sub = commands.add_parser(name, usage=usage, help=f"{command.source} -> {command.target}", parents=[debug])
        sub.add_argument(command.source)
        sub.add_argument(command.target)
        subparsers[name] = sub

    for name in ("to-diffusers", "to-safetensors", "to-space"):
        subparsers[name].add_argument("--raw", action="store_true", help="the weights being trained, not their average")
    subparsers["to-diffusers"].add_argument(
        "--label", help="leave this class alone in it, for pipelines that know no labels")
    subparsers["to-hub"].add_argument("--private", action="store_true", help="for nobody else to see")
    subparsers["from-diffusers"].add_argument(
        "--class_names", help="cat,dog: of all class embeddings, or all but a last for no label")
    subparsers["from-diffusers"].add_argument(
        "--img_size", metavar="HxW", help="where the folder does not tell: a number or HxW")
    return parser


def convert(args: argparse.Namespace) -> str:
    """Do what the command line asks for; returns what to say of it. Raises UserError, whatever the libraries raise."""
    arguments = vars(args).copy()
    del arguments["debug"]
    command = arguments.pop("command")
    try:
        return COMMANDS[command].run(**arguments)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{error.name} is needed: pip install diffusers safetensors huggingface_hub", code=1) from error
    except Exception as error:                                   # the libraries raise many kinds
        clearer = diffuser.explain(error, "close other programs, or use a larger machine")
        if clearer is not error or isinstance(error, OSError):
            raise clearer from None
        if is_full_disk(error):                                  # safetensors says so without a path
            target = arguments[COMMANDS[command].target]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), target) from error
        raise UserError(f"{command} failed ({type(error).__name__}: {first_line(error)})", code=1) from error


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_script("convert", lambda: build_parser().parse_args(argv), lambda args: print(convert(args)))


if __name__ == "__main__":
    end_process(main)
