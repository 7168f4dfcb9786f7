#!/usr/bin/env python3
"""quality: train for the same time with diffuser, diffusers and denoising-diffusion-pytorch, and compare the images.

    python benchmarks/quality.py --dataset mnist --minutes 10           who is best after ten minutes: one table
    python benchmarks/quality.py --dataset mnist --race race.png        the way there: curves over minutes of training
    python benchmarks/quality.py --checkpoint C.pt --study guidance     what a setting does to a trained model
    python benchmarks/quality.py --minutes 1 --contestants preset,diffusers
    python benchmarks/quality.py --dataset cifar10 --path_to_data A.zip

Each contestant trains from scratch for each number of minutes, alone on the machine, and draws the same number of
images; a classifier trained on the real images judges them (see evaluate.py). The peers train as their own training
scripts do, with their optimizer, learning rate, schedule and averaging, in float32, and draw with 50 DDIM steps; the
size of the network and the batch are chosen for small images, and diffusers' network is given the labels. Peers that
are not installed are left out.
"""

from __future__ import annotations

# signal itself imports others first, and Ctrl-C would print a traceback there.
import _signal

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)              # Ctrl-C while torch is imported: no traceback

import argparse
import dataclasses
import itertools
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import diffuser
from diffuser import ImageData
from diffuser_lib.files import (
    Parser,
    UserError,
    add_debug,
    end_process,
    first_line,
    require_writable,
    run_script,
    unused_path,
    write_json,
)
from diffuser_lib.judge import FEATURES, ReferenceStats
from diffuser_lib.machine import is_installed
from evaluate import judge_of, load_reference

Draw = Callable[[list[int]], tuple[Tensor, int]]                 # labels -> uint8 [N, C, H, W], calls an image


@dataclass
class Trained:
    """A contestant after training: how it draws, and the images it saw. labels: whether it takes them."""

    draw: Draw
    images_seen: int
    labels: bool = True


def batches(data: ImageData, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches without end: float [N, C, H, W] in [-1, 1], labels."""
    while True:
        for chosen in torch.randperm(len(data.images)).split(size):
            if len(chosen) == size:
                yield diffuser.from_uint8(data.images[chosen]), data.labels[chosen]


# ---- Contestants: (settings of the benchmark, training images, minutes) -> Trained -------------


def our_settings(args: argparse.Namespace, recipe: str) -> dict:
    """The settings of diffuser.py that name the dataset and the recipe; the same ones for images in --path_to_data."""
    if not args.path_to_data:
        return dict(dataset=args.dataset, recipe=recipe)

    channels, *size = diffuser.DATASETS[args.dataset].shape
    images = dict(dataset="folder", path_to_data=args.path_to_data, img_size=tuple(size), channels=channels)
    if recipe and channels == 3:
        return dict(images, recipe=recipe)                       # the best for pictures is that of a folder

    name = diffuser.settings_name(args.dataset)
    settings = diffuser.DDPM | diffuser.PRESETS.get(name, {})    # nothing of the folder's own preset
    if recipe:
        settings.update(diffuser.BEST[name])
    settings.pop("epochs", None)
    return {**settings, **images}


def run_settings(args: argparse.Namespace, recipe: str, minutes: float, folder: str) -> dict:
    """The settings of a run of so many minutes in a folder, without grids on the way."""
    settings = our_settings(args, recipe)
    settings.update(                                             # some presets name cadences of their own
        train_minutes=minutes,
        data_dir=args.data_dir,
        seed=args.seed,
        working_directory=f"{folder}/checkpoints",
        generated_directory=f"{folder}/samples",
        sample_every=10**6,
        checkpoint_every=10**6,
    )
    return settings


def train_ours(args: argparse.Namespace, data: ImageData, minutes: float, recipe: str) -> Trained:
    """diffuser.py, with the dataset's preset or its best recipe."""
    # Train.
    with tempfile.TemporaryDirectory() as folder:
        path = diffuser.train(diffuser.configure(**run_settings(args, recipe, minutes, folder)))
        model = diffuser.load(path)
        if args.keep:
            Path(args.keep).mkdir(parents=True, exist_ok=True)
            ending = f"_{minutes:g}" if len(args.minutes) > 1 else ""
            kept = Path(args.keep, f"{args.dataset}_{recipe or 'preset'}{ending}.pt")
            if kept.exists():                                    # of another seed, say
                kept = unused_path(kept.parent, f"{kept.stem}_", ".pt")
            shutil.copy(path, kept)

    cfg = dataclasses.replace(model.config, seed=args.seed + 1)
    images_seen = model.config.iterations * cfg.batch_size * cfg.gradient_accumulation_steps
    return Trained(lambda labels: draw_ours(model, labels, cfg), images_seen, labels=bool(model.class_names))


def draw_ours(model: diffuser.Model, labels: list[int], cfg: diffuser.Config) -> tuple[Tensor, int]:
    """Images, uint8 [N, C, H, W], and the network calls for each; a guided step has two."""
    calls = []
    counter = model.network.register_forward_pre_hook(lambda network, inputs: calls.append(len(inputs[0])))
    images = torch.cat(list(model.draw(labels, cfg)))
    counter.remove()
    return images, round(sum(calls) / len(labels))


def train_loop(minutes: float, step: Callable[[float, int], None]) -> int:
    """Call step(part of the time that is over, steps done) again and again for so long; returns how often."""
    start = time.perf_counter()
    steps = 0
    while True:
        part = (time.perf_counter() - start) / (60 * minutes)
        if part >= 1:
            return steps
        step(part, steps)
        steps += 1


def train_diffusers(args: argparse.Namespace, data: ImageData, minutes: float) -> Trained:
    """The loop of diffusers' examples/unconditional_image_generation/train_unconditional.py, with class labels."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    side = data.images.shape[-1]
    channels = data.images.shape[1]
    levels = 3 if side >= 28 else 2
    network = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=(32, 64, 128)[:levels],
        num_class_embeds=len(data.class_names),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
    ).to(args.device)
    noising = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), eps=1e-8, weight_decay=1e-6)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    source = batches(data, args.batch_size)

    def step(part: float, done: int) -> None:
        # Gradients.
        images, labels = next(source)
        images = images.to(args.device)
        labels = labels.to(args.device)
        noise = torch.randn_like(images)
        t = torch.randint(1000, (len(images),), device=args.device)
        out = network(noising.add_noise(images, noise, t), t, labels).sample
        torch.nn.functional.mse_loss(out, noise).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)

        # Learning rate: 500 steps of warm-up, a cosine.
        warmup = min(1.0, (done + 1) / 500)
        cosine = 0.5 * (1 + math.cos(part * math.pi))
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * (warmup * cosine)

        # Weights and their average.
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    steps = train_loop(minutes, step)
    average.copy_to(network.parameters())
    scheduler = DDIMScheduler(num_train_timesteps=1000)

    @torch.no_grad()
    def draw(labels: list[int]) -> tuple[Tensor, int]:
        scheduler.set_timesteps(50)
        drawn = []
        for part in torch.tensor(labels, device=args.device).split(250):
            x = torch.randn(len(part), channels, side, side, device=args.device)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x, t, part).sample, t, x).prev_sample
            drawn.append(diffuser.to_uint8(x))
        return torch.cat(drawn), 50

    return Trained(draw, steps * args.batch_size)


def train_lucidrains(args: argparse.Namespace, data: ImageData, minutes: float) -> Trained:
    """denoising-diffusion-pytorch's Unet and GaussianDiffusion with its Trainer's optimizer and average.

    Without labels, which it does not take.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    side = data.images.shape[-1]
    channels = data.images.shape[1]
    mults = (1, 2, 4) if side >= 28 else (1, 2)
    network = Unet(dim=32, dim_mults=mults, channels=channels)
    diffusion = GaussianDiffusion(network, image_size=side, timesteps=1000, sampling_timesteps=50).to(args.device)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-4, (0.9, 0.99))
    average = EMA(diffusion, beta=0.995, update_every=10)
    source = batches(data, args.batch_size)

    def step(part: float, done: int) -> None:
        images, _ = next(source)
        loss = diffusion((images.to(args.device) + 1) / 2)       # it takes images in [0, 1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    steps = train_loop(minutes, step)
    average.ema_model.eval()

    @torch.no_grad()
    def draw(labels: list[int]) -> tuple[Tensor, int]:
        drawn = []
        for i in range(0, len(labels), 250):
            drawn.append(average.ema_model.sample(batch_size=min(250, len(labels) - i)))
        return diffuser.to_uint8(torch.cat(drawn) * 2 - 1), 50   # it gives images in [0, 1]

    return Trained(draw, steps * args.batch_size, labels=False)


# name: (how it is trained, the packages it needs)
CONTESTANTS = {
    "best": (partial(train_ours, recipe="best"), ()),
    "preset": (partial(train_ours, recipe=""), ()),
    "diffusers": (train_diffusers, ("diffusers",)),
    "lucidrains": (train_lucidrains, ("denoising_diffusion_pytorch",)),
}

# What a contestant is called in a picture.
LABELS = {"best": "diffuser, best", "preset": "diffuser, preset", "lucidrains": "denoising-diffusion-pytorch"}


# ---- The race ----------------------------------------------------------------------------------

RACE_MINUTES = (0.5, 1.0, 2.0, 4.0, 10.0)                        # of --race, where none are named


def race(args: argparse.Namespace, stats: ReferenceStats, data: ImageData) -> Iterator[dict]:
    """Train and score each contestant for each number of minutes: a row each, as they come."""
    for name, minutes in itertools.product(args.contestants.split(","), args.minutes):
        train, _ = CONTESTANTS[name]

        labels = [i % len(stats.class_names) for i in range(args.images)]
        try:
            # Train.
            torch.manual_seed(args.seed)
            start = time.perf_counter()
            trained = train(args, data, minutes)
            taken = (time.perf_counter() - start) / 60

            # Draw.
            start = time.perf_counter()
            images, calls = trained.draw(labels)
            seconds = time.perf_counter() - start
        except Exception as error:                               # the others have trained, or will
            if args.debug:
                raise
            print(f"{name}, {minutes:g} minutes: failed ({first_line(diffuser.explain(error) or error)})", flush=True)
            continue

        # Score.
        row = {"": name, "minutes": round(taken, 2), "images seen": trained.images_seen, "evaluations": calls,
               "seconds to draw": round(seconds, 1)}
        row.update(verdict(stats, images, labels if trained.labels else None))
        picture(images, f"{name}_{minutes:g}" if len(args.minutes) > 1 else name, args)
        yield row


def plot_race(rows: list[dict], minutes: tuple[float, ...], path: Path, title: str) -> None:
    """Distance and accuracy over minutes of training, a curve for each contestant, as a picture.

    minutes: those asked for, which the axis names; a point is where the training took it.
    """
    import matplotlib

    matplotlib.use("Agg")                                        # draws without a display
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in dict.fromkeys(row[""] for row in rows):
        own = [row for row in rows if row[""] == name]
        taken = [row["minutes"] for row in own]
        left.plot(taken, [row["x floor"] for row in own], "o-", label=LABELS.get(name, name))
        if own[0]["accuracy"] != "no labels":
            right.plot(taken, [float(row["accuracy"].rstrip("%")) for row in own], "o-")

    left.axhline(1, color="grey", linestyle=":", label="real images")
    left.set_yscale("log")
    left.set_title("Frechet distance, times that of as many real images")
    right.set_title("images that the judge takes for the class asked for, %")
    right.set_ylim(0, 101)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("minutes of training")
        axes.set_xticks(minutes)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def verdict(stats: ReferenceStats, images: Tensor, labels: list[int] | None) -> dict:
    """Accuracy, distance, precision, recall and brightness of images, for a table."""
    scores = stats.scores(images, None if labels is None else torch.tensor(labels))
    accuracy = f"{scores['accuracy']:.1%}" if labels else "no labels"
    return {
        "accuracy": accuracy,
        "distance": round(scores["distance"], 2),
        "x floor": round(scores["distance"] / stats.floor_of(len(images)), 2),
        "precision": round(scores["precision"], 2),
        "recall": round(scores["recall"], 2),
        "brightness": round(images.double().mean().item(), 1),
    }


def picture(images: Tensor, name: str, args: argparse.Namespace) -> None:
    """A grid of the first hundred images, where --pictures asks for it."""
    if args.pictures:
        diffuser.save_grid(images[:100], Path(args.pictures, f"{args.dataset}_{name}.png"), [], columns=10)


# ---- Studies: one trained model, settings varied while sampling --------------------------------


def study_few_calls() -> list[dict]:
    """Six network calls an image and a little more: spacings, with guidance at no, some and all steps."""
    changes = []
    for spacing in ("trailing", "logsnr"):
        changes += [
            dict(spacing=spacing, steps=6, guidance_scale=0.0),
            dict(spacing=spacing, steps=3, guidance_scale=0.3, guidance_interval=None),
            dict(spacing=spacing, steps=10, guidance_scale=0.3, guidance_interval=(0.3, 5.0)),
            dict(spacing=spacing, steps=10, guidance_scale=0.5, guidance_interval=(0.3, 5.0)),
            dict(spacing=spacing, steps=25, guidance_scale=0.3, guidance_interval=None),
        ]
    return changes


def study_starts() -> list[dict]:
    """Each start of the sampling with three samplers."""
    changes = []
    for sampler, steps in (("ddim", 50), ("dpmpp", 25), ("ddpm", 100)):
        for start in ("gaussian", "matched"):
            changes.append(dict(start=start, sampler=sampler, steps=steps))
    return changes


STUDIES = {
    "guidance": [
        *[dict(guidance_scale=w) for w in (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0)],
        *[dict(guidance_scale=w, guidance_interval=(0.2, 5.0)) for w in (0.5, 1.0)],
    ],
    "steps": [
        *[dict(sampler="ddim", steps=n) for n in (10, 20, 50)],
        *[dict(sampler="dpmpp", steps=n) for n in (10, 20, 50)],
        *[dict(sampler="heun", steps=n) for n in (5, 10, 25)],
    ],
    "ancestral": [
        dict(sampler="dpmpp", steps=25),
        dict(sampler="ddpm", steps=None),                        # None: all T
    ],
    "spacing": [
        *[dict(spacing=s, steps=10) for s in diffuser.SPACINGS],
        *[dict(spacing=s, steps=25) for s in diffuser.SPACINGS],
    ],
    "few_calls": study_few_calls(),
    "start": study_starts(),
    "eps_scale": [dict(eps_scale=k) for k in (0.995, 1.0, 1.005, 1.01, 1.02)],
}


def study(args: argparse.Namespace, model: diffuser.Model, stats: ReferenceStats) -> Iterator[dict]:
    """A row per variation of the model's own sampling settings, as they come."""
    for name in args.study.split(","):
        for change in STUDIES[name]:
            cfg = dataclasses.replace(model.config, seed=args.seed + 1, **change)
            diffuser.check(cfg)

            # Draw.
            labels = model.labels(list(range(len(model.class_names))), args.images)
            start = time.perf_counter()
            images, calls = draw_ours(model, labels, cfg)

            # Score.
            changed = [f"{setting} {value}" for setting, value in change.items() if value is not None]
            row = {"": ", ".join(changed), "calls": calls}
            row["seconds to draw"] = round(time.perf_counter() - start, 1)
            row.update(verdict(stats, images, labels if model.class_names else None))
            yield row


# ---- Tables ------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table."""
    if not rows:
        return "nobody took part"

    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append([str(value) for value in row.values()])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """What the figures were made on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    return f"{platform.machine()}, {device}, torch {torch.__version__}, Python {platform.python_version()}"


# ---- Command line ------------------------------------------------------------------------------


def build_parser() -> Parser:
    """The flags."""
    parser = Parser("quality.py", usage="python benchmarks/quality.py [options]", doc=__doc__)
    add = parser.add_argument
    add("--dataset", default="mnist", help="digits, mnist, cifar10 or cifar10_optimized [mnist]")
    add("--data_dir", default="data", metavar="PATH", help="where datasets are and the judge is kept [data]")
    add("--path_to_data", default="", metavar="PATH", help="folder or ZIP that holds its images, in class folders")
    add("--test", default="", metavar="PATH", help="folder or ZIP of images to test the judge with [a sixth of them]")
    add("--minutes", metavar="N,N", help="training time of each contestant [10; 0.5,1,2,4,10 for --race]")
    add("--race", nargs="?", const="race.png", default="", metavar="PATH",
        help="draw curves over minutes of training into this picture [race.png]")
    add("--images", type=int, default=1000, help="images drawn by each [1000]")
    add("--batch_size", type=int, default=64, help="of the peers [64]")
    add("--contestants", default=",".join(CONTESTANTS), metavar="NAME,NAME",
        help=f"who trains [{','.join(CONTESTANTS)}]")
    add("--checkpoint", default="", metavar="PATH", help="study this model instead of racing")
    add("--study", default="guidance", help=f"{', '.join(STUDIES)} [guidance]")
    add("--seed", type=int, default=0, help="of training and drawing [0]")
    add("--keep", default="", metavar="PATH", help="folder for the checkpoints of ours")
    add("--pictures", default="", metavar="PATH", help="folder for grids of samples")
    add("--json", default="", metavar="PATH", help="also write the rows to this file")
    add_debug(parser)
    return parser


def check(args: argparse.Namespace) -> diffuser.Model | None:
    """The model to study, if any. Raises UserError for what would fail later."""
    unknown = [name for name in args.contestants.split(",") if name not in CONTESTANTS]
    unknown += [name for name in args.study.split(",") if name not in STUDIES]
    if args.dataset not in diffuser.BEST or not diffuser.DATASETS[args.dataset].classes:
        unknown.append(args.dataset)
    if unknown:
        raise UserError(f"unknown: {', '.join(unknown)}, see --help")
    args.minutes = parse_minutes(args.minutes, RACE_MINUTES if args.race else (10.0,))
    if args.images <= FEATURES or args.batch_size < 1:
        raise UserError(f"--images must be above {FEATURES}, --batch_size above 0")

    if not args.checkpoint:
        return None
    if args.race:
        raise UserError("--race is for contestants that train: leave it or --checkpoint out")
    model = diffuser.load(args.checkpoint)
    if model.shape != diffuser.DATASETS[args.dataset].shape:
        raise UserError(f"{args.checkpoint} draws images {model.shape}, unlike {args.dataset}: give its --dataset")
    return model


def parse_minutes(text: str | None, usual: tuple[float, ...]) -> tuple[float, ...]:
    """Numbers between commas, the usual ones without any. Raises UserError."""
    if text is None:
        return usual
    try:
        minutes = tuple(float(part) for part in text.split(","))
    except ValueError:
        minutes = ()
    if not minutes or not all(0 < n < math.inf for n in minutes):
        raise UserError(f"--minutes {text}: numbers above 0, such as 10 or 0.5,1,2")
    return minutes


def require_format(path: str) -> None:
    """Raise UserError where matplotlib is missing, or writes no pictures with such an ending."""
    if not is_installed("matplotlib"):
        raise UserError("--race draws with matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in known:
        raise UserError(f"--race {path}: its ending has to be one of {', '.join(sorted(known))}")


def leave_out_missing(contestants: str, packages: Callable[[str], tuple[str, ...]]) -> str:
    """The contestants, names between commas, but for those of which packages(name) are missing, which are told.

    Raises UserError where nobody is left.
    """
    there = []
    for name in contestants.split(","):
        missing = [package for package in packages(name) if not is_installed(package)]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            print(f"{name}: left out, {' and '.join(missing)} {verb} not installed", flush=True)
        else:
            there.append(name)
    if not there:
        raise UserError("none of the --contestants is installed")
    return ",".join(there)


def work(args: argparse.Namespace) -> None:
    """Race or study, and print the table."""
    for flag in ("json", "race"):
        if getattr(args, flag):
            require_writable(getattr(args, flag), f"--{flag}")
    if args.race:
        require_format(args.race)
    for flag in ("keep", "pictures"):
        if getattr(args, flag):
            require_writable(getattr(args, flag), f"--{flag}", folder=True)
    model = check(args)
    if not model:
        args.contestants = leave_out_missing(args.contestants, lambda name: CONTESTANTS[name][1])
    args.device = diffuser.pick_device("auto")

    # The real images, and the judge trained on them.
    shape = diffuser.DATASETS[args.dataset].shape
    reference = load_reference(args.path_to_data or args.dataset, args.data_dir, shape, args.test)
    if len(reference.train.class_names) < 2 or len(reference.train.images) <= FEATURES:
        raise UserError(f"{args.path_to_data or args.dataset}: a race needs images of two classes or more, in folders "
                        f"of their names, and more than {FEATURES} to train the judge on")
    if model and model.class_names not in ([], reference.train.class_names):
        raise UserError(f"{args.checkpoint} has other classes than {reference.name}, by which it would be judged")
    to_train = len(reference.everything().images)
    if not model and args.batch_size > to_train:
        raise UserError(f"--batch_size {args.batch_size} is more than the {to_train:,} images to train on")
    count = len(reference.test.images)
    if count < args.images:
        if count <= FEATURES:
            raise UserError(f"there are {count} images to test with: a Frechet distance needs "
                            f"{FEATURES + 1}")
        args.images = count
        print(f"drawing {args.images} images, as many as there are to test with")
    stats = judge_of(reference, args.data_dir)
    floor = stats.floor_of(args.images)
    print(machine())
    print(f"judge: accuracy {stats.accuracy:.2%}; floor: {floor:.3g} for {args.images:,} real images, "
          f"{stats.floor:.3g} for {count:,}", flush=True)

    # The contestants, or the variations of one model; what is there is kept as it comes.
    rows = []
    for row in study(args, model, stats) if model else race(args, stats, reference.everything()):
        rows.append(row)
        print(row, flush=True)
        if args.json:
            write_json(Path(args.json), dict(machine=machine(), floor=stats.floor, rows=rows))
        if args.race:
            plot_race(rows, args.minutes, Path(args.race), f"{args.dataset}, {machine()}")
    if not rows:
        raise UserError("none of the contestants has got through", code=1)
    print(table(rows))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    explain = partial(diffuser.explain, remedy="give fewer --images or a smaller --batch_size")
    return run_script("quality", lambda: build_parser().parse_args(argv), work, explain)


if __name__ == "__main__":
    end_process(main)
