#!/usr/bin/env python3
"""convert: checkpoints to and from Hugging Face diffusers and safetensors.

    python convert.py to-diffusers CKPT DIR             a DDPMPipeline: UNet2DModel, scheduler, model card
    python convert.py to-diffusers CKPT DIR --label 3   the network of one class, that takes no labels
    python convert.py from-diffusers DIR CKPT           to draw from here, or to train on with --init_from CKPT
    python convert.py to-safetensors CKPT FILE          bare weights, the configuration in the metadata
    python convert.py from-safetensors FILE CKPT

Weights are the averaged ones where there are any (--raw: those being trained). diffusers and safetensors are read and
written by their own libraries (pip install diffusers), and nothing is looked for on the network. A network that its
counterpart cannot represent is refused with the reason.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import inspect
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import diffuser
from diffuser import Config, Model, Moments, UNet, UserError

PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SPACINGS = {"trailing": "trailing", "leading": "leading", "linear": "linspace"}     # others become trailing
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2",
                  "geodiff": "sigmoid"}


# ------------------------------------------------------------------------------------------------
# The network


def counterparts(ours: UNet, theirs: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Pairs of modules of a UNet and a UNet2DModel of the same shape; both of a pair have the same parameters."""
    def residual(a: diffuser.ResBlock, b: nn.Module) -> Iterator:
        yield from ((a.norm1, b.norm1), (a.conv1, b.conv1), (a.condition, b.time_emb_proj), (a.norm2, b.norm2),
                    (a.conv2, b.conv2))
        if b.conv_shortcut is not None:
            yield a.shortcut, b.conv_shortcut

    def attention(a: diffuser.Attention, b: nn.Module) -> Iterator:
        yield from ((a.q, b.to_q), (a.k, b.to_k), (a.v, b.to_v), (a.out, b.to_out[0]))
        if a.norm is not None:
            yield a.norm, b.group_norm

    yield from ((ours.conv_in, theirs.conv_in), (ours.time_mlp[0], theirs.time_embedding.linear_1),
                (ours.time_mlp[2], theirs.time_embedding.linear_2))
    if ours.class_embedding is not None:
        yield ours.class_embedding, theirs.class_embedding
    for mine, blocks in ((ours.down, theirs.down_blocks), (ours.up, theirs.up_blocks)):
        modules = iter(mine)
        for block in blocks:
            for i, b in enumerate(block.resnets):
                yield from residual(a := next(modules), b)
                if hasattr(block, "attentions"):
                    yield from attention(a.attention, block.attentions[i])
            for b in getattr(block, "downsamplers", None) or []:
                yield next(modules), b.conv
            for b in getattr(block, "upsamplers", None) or []:
                yield next(modules)[1], b.conv
    for a, b in zip(ours.mid, theirs.mid_block.resnets, strict=True):
        yield from residual(a, b)
    if isinstance(ours.mid[0].attention, diffuser.Attention):
        yield from attention(ours.mid[0].attention, theirs.mid_block.attentions[0])
    yield from ((ours.norm_out, theirs.conv_norm_out), (ours.conv_out, theirs.conv_out))


def attention_head_dim(cfg: Config) -> int | None:
    """Channels per head; None for one head of all channels. Raises UserError where it differs between levels."""
    if cfg.head_dim:
        return cfg.head_dim
    all_widths = diffuser.level_widths(cfg.base_channels, cfg.channel_mults)
    widths = {all_widths[level] for level in diffuser.attended_levels(cfg)}
    if cfg.num_heads == 1 or not widths:
        return None
    if len(widths) > 1:
        raise UserError(f"--num_heads {cfg.num_heads} at levels of {' and '.join(map(str, sorted(widths)))} channels: "
                        "diffusers has one number of channels per head for all levels (train with --head_dim)")
    return widths.pop() // cfg.num_heads


def unet2d_options(cfg: Config, shape: tuple[int, int, int], num_classes: int) -> dict:
    """The UNet2DModel that computes what the configured network does. Raises UserError where there is none."""
    refused = {
        "--conditioning concat": cfg.conditioning == "concat" and "embeddings enter as input channels",
        f"--patch_size {cfg.patch_size}": cfg.patch_size > 1 and "its network sees squares of pixels as one",
        f"--channel_mults {cfg.channel_mults}": cfg.channel_mults[0] != 1 and "the first has to be 1",
        "--mid_attention plain": cfg.mid_attention == "plain" and cfg.conditioning == "add" and cfg.use_attention
        and "only with --conditioning scale_shift is there attention without a norm"}
    for option, reason in refused.items():
        if reason:
            raise UserError(f"diffusers' UNet2DModel cannot represent {option}: {reason}")

    def blocks(levels: tuple[int, ...], plain: str, attending: str) -> tuple[str, ...]:
        return tuple(attending if i in levels and cfg.use_attention else plain for i in range(len(cfg.channel_mults)))

    widths = tuple(diffuser.level_widths(cfg.base_channels, cfg.channel_mults))
    up_levels, groups = cfg.up_attention_levels, math.gcd(cfg.norm_groups, *widths)
    up_levels = cfg.attention_levels if up_levels is None else up_levels
    return dict(
        sample_size=shape[1] if shape[1] == shape[2] else shape[1:], in_channels=shape[0], out_channels=shape[0],
        down_block_types=blocks(cfg.attention_levels, "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=blocks(up_levels, "UpBlock2D", "AttnUpBlock2D")[::-1], block_out_channels=widths,
        layers_per_block=cfg.num_res_blocks, dropout=cfg.dropout, attention_head_dim=attention_head_dim(cfg),
        add_attention=cfg.use_attention and cfg.mid_attention != "none", norm_num_groups=groups,
        attn_norm_num_groups=groups if cfg.mid_attention == "norm" else None, norm_eps=cfg.norm_eps,
        downsample_padding=cfg.downsample_padding, freq_shift=cfg.freq_shift, flip_sin_to_cos=not cfg.sin_first,
        time_embedding_dim=4 * cfg.emb_dim, num_class_embeds=num_classes + 1 if num_classes else None,
        resnet_time_scale_shift="scale_shift" if cfg.conditioning == "scale_shift" else "default")


BLOCKS = {"DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"}
# What a UNet2DModel has to be for a UNet to compute the same.
REQUIRED = dict(center_input_sample=(False,), time_embedding_type=("positional",), mid_block_type=("UNetMidBlock2D",),
                mid_block_scale_factor=(1,), downsample_type=("conv",), upsample_type=("conv",),
                act_fn=("silu", "swish"), class_embed_type=(None,), resnet_time_scale_shift=("default", "scale_shift"),
                downsample_padding=(0, 1), in_channels=(1, 3))


def network_options(theirs, known: Config | None = None) -> dict:
    """Options of the network that computes what a UNet2DModel with the config `theirs` does. known: a configuration
    that may say the same of its heads in other words. Raises UserError where there is none."""
    for name, possible in REQUIRED.items():
        if theirs[name] not in possible:
            raise UserError(f"its {name} is {theirs[name]!r}: here it is {' or '.join(map(repr, possible))}")
    if theirs.out_channels != theirs.in_channels:
        raise UserError(f"it puts out {theirs.out_channels} channels for {theirs.in_channels}: there is no learned "
                        "variance here")
    strange = {*theirs.down_block_types, *theirs.up_block_types} - BLOCKS
    if strange:
        raise UserError(f"it has a {min(strange)}: here blocks are {', '.join(sorted(BLOCKS))}")
    scale_shift, widths = theirs.resnet_time_scale_shift == "scale_shift", theirs.block_out_channels
    groups, time_width = theirs.norm_num_groups, theirs.time_embedding_dim or 4 * widths[0]
    if theirs.attn_norm_num_groups not in (None, groups) or time_width % 4:
        raise UserError(f"here its attn_norm_num_groups, {theirs.attn_norm_num_groups}, would have to be its "
                        f"norm_num_groups, {groups}, and its time_embedding_dim, {time_width}, a multiple of 4")
    heads = dict(num_heads=1, head_dim=theirs.attention_head_dim or 0)
    if known and attention_head_dim(known) == theirs.attention_head_dim:
        heads = dict(num_heads=known.num_heads, head_dim=known.head_dim)
    plain = scale_shift and theirs.attn_norm_num_groups is None
    down, up = ([i for i, kind in enumerate(kinds) if kind.startswith("Attn")]
                for kinds in (theirs.down_block_types, theirs.up_block_types[::-1]))
    return dict(
        channels=theirs.in_channels, base_channels=widths[0], num_res_blocks=theirs.layers_per_block,
        channel_mults=tuple(w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths),
        use_attention=bool(theirs.add_attention or down or up), attention_levels=tuple(down),
        up_attention_levels=None if up == down else tuple(up),
        mid_attention="none" if not theirs.add_attention else "plain" if plain else "norm", **heads,
        emb_dim=time_width // 4, dropout=theirs.dropout, norm_groups=groups, norm_eps=theirs.norm_eps,
        downsample_padding=theirs.downsample_padding, freq_shift=float(theirs.freq_shift),
        sin_first=not theirs.flip_sin_to_cos, conditioning="scale_shift" if scale_shift else "add")


def to_unet2d(network: UNet, cfg: Config, shape: tuple[int, int, int], label: int | None = None):
    """The UNet2DModel with the network's weights. label: that of the one class to keep, in a model that takes no
    labels. Raises UserError where diffusers cannot represent it."""
    from diffusers import UNet2DModel

    if label is not None:                                                    # silu(time + class): class is a bias
        network, cfg = copy.deepcopy(network), dataclasses.replace(cfg, use_labels=False)
        network.time_mlp[2].bias += network.class_embedding.weight[label]
        network.class_embedding = None
    theirs = UNet2DModel(**unet2d_options(cfg, shape, network.num_classes if label is None else 0)).eval()
    for a, b in counterparts(network, theirs):
        b.load_state_dict(a.state_dict())
    return theirs


# ------------------------------------------------------------------------------------------------
# The schedule


def same_curve(cfg: Config, scheduler) -> bool:
    """Whether a scheduler of diffusers, which computes in float32, has the configured alpha_bar."""
    ours, theirs = diffuser.alpha_bar_table(cfg), scheduler.alphas_cumprod.double()
    return len(ours) == len(theirs) and bool((ours - theirs).abs().max() < 1e-5)


def to_scheduler(cfg: Config):
    """A DDPMScheduler that adds and removes noise as configured; others load from its config."""
    from diffusers import DDPMScheduler

    scale = 1000 / cfg.timesteps if cfg.scale_betas else 1.0
    options = dict(
        num_train_timesteps=cfg.timesteps, beta_start=cfg.beta_start * scale, beta_end=cfg.beta_end * scale,
        prediction_type=PREDICTION_TYPES[cfg.prediction], variance_type=f"fixed_{cfg.variance}",
        timestep_spacing=SPACINGS.get(cfg.spacing, "trailing"), rescale_betas_zero_snr=cfg.zero_terminal_snr,
        clip_sample=cfg.clip_x0 and not cfg.dynamic_threshold, thresholding=cfg.dynamic_threshold > 0)
    if cfg.dynamic_threshold:
        options |= dict(dynamic_thresholding_ratio=cfg.dynamic_threshold, sample_max_value=1000.0)
    scheduler = DDPMScheduler(**options, beta_schedule=BETA_SCHEDULES.get(cfg.schedule_type, "linear"))
    if same_curve(cfg, scheduler):
        return scheduler
    alpha_bar = diffuser.alpha_bar_table(dataclasses.replace(cfg, zero_terminal_snr=False))    # one it has no name for
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return DDPMScheduler(**options, trained_betas=(1 - alpha_bar / before).tolist())


def schedule_options(scheduler, noticed: list[str], known: Config | None = None) -> dict:
    """Options of the schedule, and of drawing, from a DDPMScheduler. known: a configuration that may have the schedule
    already; noticed: takes lines to be told. Raises UserError for a schedule that has no name here."""
    theirs, betas = scheduler.config, scheduler.betas.tolist()
    predictions = {kind: name for name, kind in PREDICTION_TYPES.items()}
    if theirs.prediction_type not in predictions or not theirs.variance_type.startswith("fixed"):
        raise UserError(f"its scheduler's prediction_type {theirs.prediction_type!r} or variance_type "
                        f"{theirs.variance_type!r} has no counterpart here")
    ends = [(low, high) for low, high in ((theirs.beta_start, theirs.beta_end), (betas[0], betas[-1]))
            if 1e-9 <= low <= high <= 0.999]
    shared = dict(timesteps=len(betas), prediction=predictions[theirs.prediction_type],
                  zero_terminal_snr=bool(theirs.rescale_betas_zero_snr))
    curve = ("schedule_type", "beta_start", "beta_end", "cosine_s", "scale_betas")
    candidates = [{name: getattr(known, name) for name in curve}] if known else []
    candidates += [dict(schedule_type=name, beta_start=low, beta_end=high, cosine_s=0.008, scale_betas=False)
                   for name in diffuser.SCHEDULES for low, high in ends]
    fitting = next((c for c in candidates if same_curve(Config(**c, **shared), scheduler)), None)
    if fitting is None:
        raise UserError(f"its noise schedule ({theirs.beta_schedule}, unless betas are given one by one) is none of "
                        f"{', '.join(diffuser.SCHEDULES)}")
    thresholding = theirs.thresholding and theirs.sample_max_value > 1       # up to 1 it is clipping
    if thresholding and theirs.sample_max_value < 1000:
        noticed.append(f"its scheduler's thresholds end at {theirs.sample_max_value:g}: here they have no end")
    return dict(shared, **fitting, variance="large" if "large" in theirs.variance_type else "small",
                clip_x0=bool(theirs.clip_sample or theirs.thresholding),
                dynamic_threshold=theirs.dynamic_thresholding_ratio if thresholding else 0.0)


# ------------------------------------------------------------------------------------------------
# Files


def read_model(path: str, raw: bool) -> tuple[Model, dict]:
    """The model in a checkpoint, and the checkpoint's content. Raises UserError."""
    state = diffuser.load_checkpoint(path)
    cfg = diffuser.configure(state["config"])
    return diffuser.restore(state, dataclasses.replace(cfg, use_ema=cfg.use_ema and not raw)), state


def write_checkpoint(path: Path, network: UNet, cfg: Config, shape: tuple[int, int, int], class_names: list[str],
                     moments: Moments) -> None:
    """A checkpoint of step 0 with these weights."""
    state = dict(format=diffuser.FORMAT, config=dataclasses.asdict(cfg), step=0, epoch=0.0, shape=list(shape),
                 class_names=class_names, data="", loss_history=[], meter=torch.zeros(2, 4, 2), moments=vars(moments),
                 model=network.state_dict(), ema=None, optimizer=dict(state={}, param_groups=[]), scaler={})
    if not all(v.isfinite().all() for v in state["model"].values()):
        raise UserError("its weights are not all finite")
    diffuser.check_state(state, peek=False)
    diffuser.write_atomically(path, lambda file: torch.save(state, file))


def standard_moments(shape: tuple[int, int, int], num_classes: int) -> Moments:
    """Those of images of which nothing is known: drawing starts from N(0, I)."""
    size = (num_classes + 1, shape[0], *(min(n, 64) for n in shape[1:]))
    return Moments(torch.zeros(size), torch.ones(size))


def require_free(path: str, ending: str = "") -> Path:
    """Raise UserError where something is that would be overwritten, and for another ending."""
    if Path(path).exists():
        raise UserError(f"{path} exists: give another name, or remove it")
    if not path.endswith(ending):
        raise UserError(f"{path} does not end in {ending}: it would not be found as a checkpoint")
    return Path(path)


def to_diffusers(checkpoint: str, folder: str, raw: bool = False, label: str | None = None) -> str:
    """Write the model in a checkpoint as a DDPMPipeline with a model card; returns what to say of it. label: the one
    class to keep, in a network that takes no labels. Raises UserError."""
    from diffusers import DDPMPipeline

    target, (model, state) = require_free(folder), read_model(checkpoint, raw)
    if label is not None and not model.class_names:
        raise UserError(f"--label {label}: {checkpoint} was trained without classes")
    number = None if label is None else diffuser.parse_classes([label], model.class_names)[0]
    unet = to_unet2d(model.network, model.config, model.shape, number)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as aside:
        temporary = Path(aside, target.name)                                 # whole before it has its name
        DDPMPipeline(unet, to_scheduler(model.config)).save_pretrained(temporary)
        describe(temporary, model, state, number)
        temporary.rename(target)
    return f"{target}: a DDPMPipeline of {unet.num_parameters():,} parameters; how to use it: {target / 'README.md'}"


def describe(folder: Path, model: Model, state: dict, number: int | None) -> None:
    """Add to an exported model what diffusers has no place for, a grid of samples and the model card. number: the
    class that it is for, where that is one alone."""
    from safetensors.torch import save

    names = model.class_names if number is None else []
    rows = slice(None) if number is None else [number]
    moments = {name: v[rows].contiguous() for name, v in vars(model.moments).items()}
    (folder / "moments.safetensors").write_bytes(save(moments))
    diffuser.write_json(folder / "diffuser.json", dict(config=dataclasses.asdict(model.config), class_names=names))
    classes = list(range(min(10, len(names)))) if number is None else [number]
    labels = model.labels(classes, 2 * len(names[:10]) if names else 8)
    images = torch.cat(list(diffuser.draw_with_bar(model, labels, model.config)))
    diffuser.save_grid(images, folder / "samples.png", names[:10])
    label = "" if number is None else model.class_names[number]
    (folder / "README.md").write_text(model_card(model, state, folder.name, names, label), encoding="utf-8")


def from_diffusers(folder: str, checkpoint: str, class_names: str | None = None, img_size: str | None = None) -> str:
    """Write the UNet2DModel in a folder, of a pipeline or alone, as a checkpoint; returns what to say of it.
    class_names: "cat,dog", one for each class embedding or for all but the last, which then is that of no label;
    img_size: where the folder does not tell. Raises UserError."""
    target, home, noticed = require_free(checkpoint, ".pt"), Path(folder), []
    theirs, scheduler, aside = read_unet2d(home), read_scheduler(home, noticed), read_aside(home)
    size = diffuser.parse_value("img_size", img_size) if img_size else theirs.config.sample_size
    if size is None:
        raise UserError(f"{folder} does not tell the size of its images: give --img_size")
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    stored = aside.get("config") or {}
    known = diffuser.configure(stored) if stored else None
    options = network_options(theirs.config, known) | schedule_options(scheduler, noticed, known)
    embeddings, dataset = theirs.config.num_class_embeds or 0, stored.get("dataset") or "folder"
    names = read_class_names(class_names, embeddings, aside.get("class_names"))
    cfg = diffuser.configure(stored, **options, dataset=dataset, img_size=(height, width), use_labels=bool(names))
    shape = (cfg.channels, height, width)
    network = diffuser.build_unet(cfg, shape[0], len(names))
    if len(names) == embeddings > 0:                                         # none for no label: their mean
        noticed.append("it knows no null class: guidance has nothing to guide away from until you train on with one")
        table = theirs.class_embedding.weight.data
        theirs.class_embedding = nn.Embedding.from_pretrained(torch.cat([table, table.mean(0, keepdim=True)]))
    for a, b in counterparts(network, theirs):
        a.load_state_dict(b.state_dict())
    moments = aside.get("moments")
    if moments is None or len(moments.mean) != len(names) + 1:
        moments = standard_moments(shape, len(names))
    write_checkpoint(target, network, cfg, shape, names, moments)
    return "\n".join([*noticed, f"{target}: {sum(p.numel() for p in network.parameters()):,} parameters, images "
                      f"{height}x{width}x{shape[0]}, {len(names)} classes"])


def read_class_names(given: str | None, embeddings: int, stored: list[str] | None) -> list[str]:
    """Names for that many class embeddings, or for all but the last: as given, else as stored, else their numbers.
    Raises UserError."""
    names = [str(i) for i in range(embeddings)] if stored is None else stored
    if given is not None:
        names = [name.strip() for name in given.split(",")]
    if len(names) not in ((embeddings, embeddings - 1) if embeddings else (0,)):
        raise UserError(f"--class_names: {len(names)} for {embeddings} class embeddings")
    if not all(names) or len(set(names)) < len(names):
        raise UserError("--class_names: each needs a name of its own")
    return names


def read_json(path: Path) -> dict:
    """A configuration in JSON. Raises UserError."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no configuration ({diffuser.first_line(error)})") from error


def read_unet2d(folder: Path):
    """The UNet2DModel of a pipeline's folder, or in a folder of its own, in float32. Raises UserError."""
    from diffusers import UNet2DModel

    home = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (home / "config.json").is_file():
        raise UserError(f"{folder} holds neither unet/config.json nor config.json: it is no folder of diffusers. One "
                        "from the hub has to be downloaded first: hf download NAME --local-dir DIR")
    kind = read_json(home / "config.json").get("_class_name")
    if kind not in (None, "UNet2DModel"):
        raise UserError(f"{home} is a {kind}: this program has the counterpart of UNet2DModel alone")
    names = [path.name for path in home.glob("diffusion_pytorch_model*")]
    modern = any(name.endswith(".safetensors") for name in names)            # else a pickle, read with weights_only
    variant = "fp16" if names and all(".fp16." in name for name in names) else None
    theirs, found = UNet2DModel.from_pretrained(home, local_files_only=True, use_safetensors=modern, variant=variant,
                                                low_cpu_mem_usage=False, output_loading_info=True)
    wrong = [f"{key} {', '.join(map(str, found[key]))[:80]}" for key in found if found[key]]
    if wrong:
        raise UserError(f"the weights in {home} are not those of its config.json: {'; '.join(wrong)}")
    return theirs.float().eval().requires_grad_(False)


def read_scheduler(folder: Path, noticed: list[str]):
    """A DDPMScheduler with the schedule of the one in a pipeline's folder. Raises UserError."""
    from diffusers import DDPMScheduler

    path = next((p for p in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
                 if p.is_file()), None)
    config = {name: value for name, value in (read_json(path) if path else {}).items() if value is not None}
    if path is None:
        noticed.append("no scheduler_config.json there: taking DDPMScheduler's own defaults")
    elif "beta_schedule" not in config and "trained_betas" not in config:
        raise UserError(f"{path} is a {config.get('_class_name')}, which has no betas: nothing here matches it")
    limit = config.get("clip_sample_range", 1.0)
    if limit != 1:
        noticed.append(f"its scheduler clips images to +-{limit}: here it is +-1, or --clip_x0 false")
    if path and config.get("_class_name") not in ("DDPMScheduler", "DDIMScheduler"):
        config.setdefault("clip_sample", False)                              # others have no such thing
    known = inspect.signature(DDPMScheduler).parameters
    return DDPMScheduler(**{name: value for name, value in config.items() if name in known})


def read_aside(folder: Path) -> dict:
    """What `describe` wrote beside a pipeline: the configuration, class names, moments; empty elsewhere."""
    from safetensors.torch import load_file

    if not (folder / "diffuser.json").is_file():
        return {}
    return {**read_json(folder / "diffuser.json"),
            "moments": Moments(**load_file(folder / "moments.safetensors"))}


def to_safetensors(checkpoint: str, path: str, raw: bool = False) -> str:
    """Write the weights in a checkpoint, configuration, shape and class names as JSON in the metadata; returns what
    to say of it. Raises UserError."""
    from safetensors.torch import save

    target, (model, state) = require_free(path), read_model(checkpoint, raw)
    tensors = {**model.network.state_dict(), **{f"moments.{k}": v for k, v in vars(model.moments).items()}}
    about = dict(config=dataclasses.asdict(model.config), shape=model.shape, class_names=model.class_names,
                 step=state["step"])
    content = save({k: v.contiguous() for k, v in tensors.items()}, {"format": "pt", "diffuser": json.dumps(about)})
    diffuser.write_atomically(target, lambda file: file.write(content))
    return f"{target}: {len(tensors)} tensors"


def from_safetensors(path: str, checkpoint: str) -> str:
    """Write a checkpoint from such a file; returns what to say of it. Raises UserError."""
    from safetensors import safe_open

    target = require_free(checkpoint, ".pt")
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file")
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("diffuser", "null"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}      # noqa: SIM118 (not a dictionary)
    if about is None:
        raise UserError(f"{path} holds no configuration of this program in its metadata")
    cfg, shape, names = diffuser.configure(about["config"]), tuple(about["shape"]), about["class_names"]
    moments = Moments(tensors.pop("moments.mean"), tensors.pop("moments.var"))
    with torch.device("meta"):
        network = diffuser.build_unet(cfg, shape[0], len(names))
    network.load_state_dict(tensors, assign=True)
    write_checkpoint(target, network, cfg, shape, names, moments)
    return f"{target}: {sum(p.numel() for p in network.parameters()):,} parameters"


# ------------------------------------------------------------------------------------------------
# The model card

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
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler

pipeline = DDPMPipeline.from_pretrained("path/to/this/folder")      # add .to("cuda") for a GPU
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
images = pipeline(batch_size=4, num_inference_steps=25).images      # or without the line before, and 1000 steps
{% else %}
import torch
from diffusers import DDPMPipeline, DPMSolverMultistepScheduler
{% if signal > 0.01 %}
from safetensors.torch import load_file
from torch.nn import functional as F
{% endif %}

folder = "path/to/this/folder"
pipeline = DDPMPipeline.from_pretrained(folder)
unet, scheduler = pipeline.unet, DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
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

scheduler.set_timesteps(25)
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t{{ ", class_labels=labels" if names }}).sample, t, x).prev_sample
images = pipeline.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
{% endif %}
```

The scheduler is a `DDPMScheduler`; `DDIMScheduler` (with `use_clipped_model_output=True`, and a number of steps that
divides T, it takes the very steps of `diffuser.py --sampler ddim`) and `DPMSolverMultistepScheduler` load from its
config. The network was trained to predict {{ cfg.prediction }} on the {{ cfg.schedule_type }} schedule with
T = {{ cfg.timesteps }}.

## Settings

| option | value |
|---|---|
{% for option, value in settings.items() %}
| {{ option }} | {{ value }} |
{% endfor %}
"""


def model_card(model: Model, state: dict, name: str, names: list[str], label: str = "") -> str:
    """README.md of an exported model, of one label alone where that is given. Its Python draws by diffusers' pipeline
    where that can do it, else by its loop, with labels, and with the start that a schedule which leaves signal at T
    needs."""
    import jinja2  # torch depends on it

    cfg, usual = model.config, Config()
    settings = {option: getattr(cfg, option) for option in diffuser.FIELDS
                if option not in diffuser.LOCAL and getattr(cfg, option) != getattr(usual, option)}
    template = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True).from_string(CARD)
    return template.render(model=model, cfg=cfg, state=state, name=name, names=names, label=label, settings=settings,
                           signal=model.diffusion.alpha_bar[-1].sqrt().item(), listed=diffuser.listed)


# ------------------------------------------------------------------------------------------------
# Command line


COMMANDS = {"to-diffusers": to_diffusers, "from-diffusers": from_diffusers, "to-safetensors": to_safetensors,
            "from-safetensors": from_safetensors}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("convert.py", description=__doc__.partition("\n")[0], allow_abbrev=False,
                                     epilog=__doc__.partition("\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = dict(action="store_true", help="the weights being trained, not their average")
    for command in COMMANDS:
        source, target, *_ = inspect.signature(COMMANDS[command]).parameters
        sub = commands.add_parser(command, help=f"{source} -> {target}", allow_abbrev=False)
        sub.add_argument(source)
        sub.add_argument(target)
        if command.startswith("to-"):
            sub.add_argument("--raw", **raw)
        if command == "to-diffusers":
            sub.add_argument("--label", help="leave this class alone in it, for pipelines that know no labels")
        if command == "from-diffusers":
            sub.add_argument("--class_names", help="cat,dog: of all class embeddings, or all but a last for no label")
            sub.add_argument("--img_size", help="where the folder does not tell: a number or HxW")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = vars(build_parser().parse_args(argv))
    command = options.pop("command")
    try:
        print(COMMANDS[command](**options))
        return 0
    except ImportError as error:
        print(f"convert: {error.name} is needed: pip install diffusers safetensors", file=sys.stderr)
    except UserError as error:
        print(f"convert: {error}", file=sys.stderr)
        return error.code
    except Exception as error:                                               # the libraries raise many kinds
        print(f"convert: {command} failed ({type(error).__name__}: {diffuser.first_line(error)})", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nconvert: interrupted", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
