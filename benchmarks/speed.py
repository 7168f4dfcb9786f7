#!/usr/bin/env python3
"""speed: training and sampling speed of diffuser, diffusers and denoising-diffusion-pytorch on the same networks.

    python benchmarks/speed.py                                   the MNIST preset: one table
    python benchmarks/speed.py --networks ho2020 --batches 16,64
    python benchmarks/speed.py --curves size,batch,width,dataset  time against one thing at a time, for diffuser alone
    python benchmarks/speed.py --jpegs 20000                     what a folder of JPEGs costs: caching, loading, memory
    python benchmarks/speed.py --sets 10000,1000000              what sets of many images cost
    python benchmarks/speed.py --processes 1,2                  how well processes share a batch
    python benchmarks/speed.py --start                           from the command to the first step

Every measurement but those of --jpegs is a process of its own, contestants take turns, and medians over the rounds are
shown, so that a machine whose pace changes is fair to all. diffusers trains as its unconditional example does, through
accelerate, with a UNet2DModel of the same shapes; denoising-diffusion-pytorch with its own Trainer and a Unet of about
as many parameters; each as documented and with bf16. TFLOP/s count a network's own multiplications, forward and
backward; the percentage beside them is the share of what this machine does in a product of two matrices of 2048 x
2048 (8192 on a GPU), in bf16 where diffuser would take it, measured between the rounds.
"""

from __future__ import annotations

# signal itself imports others first, and Ctrl-C would print a traceback there.
import _signal

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)              # Ctrl-C while torch is imported: no traceback

import argparse
import dataclasses
import io
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import diffuser
import diffuser_lib.images
from benchmarks.quality import leave_out_missing, machine, table
from diffuser_lib.files import (
    Parser,
    UserError,
    add_debug,
    end_process,
    require_writable,
    run_script,
    warn_on_oserror,
    write_json,
)

# ---- Networks and images -----------------------------------------------------------------------

# Networks by name: settings of diffuser.py that the contestants are given shapes from.
NETWORKS = {
    "mnist": dict(diffuser.PRESETS["mnist"], img_size=(28, 28), channels=1, conditioning="add"),
    "ho2020": dict(diffuser.RECIPES["ho2020"], img_size=(32, 32), channels=3),
    "ho2020_heads8": dict(diffuser.RECIPES["ho2020"], img_size=(32, 32), channels=3, head_dim=8),
    "64x64": dict(
        diffuser.DDPM, base_channels=64, channel_mults=(1, 2, 2, 4), attention_levels=(2,), head_dim=64, emb_dim=128,
        batch_size=32, learning_rate=1e-4, img_size=(64, 64), channels=3, conditioning="add"),
    "tiny": dict(diffuser.PRESETS["digits"], img_size=(8, 8), channels=1, conditioning="add"),
}


def settings(network: str, batch: int, **more) -> diffuser.Config:
    """The configuration of a network of that name for a benchmark: random images, no labels, no end."""
    fields = dict(NETWORKS[network])
    for name in ("epochs", "num_gpus"):
        fields.pop(name, None)
    fields.update(dataset="random", batch_size=batch, iterations=10**6, use_labels=False, val_fraction=0.0)
    fields.update(more)
    return diffuser.configure(**fields)


def random_images(cfg: diffuser.Config, count: int = 2048) -> diffuser.ImageData:
    """Noise as uint8 images of the configured shape, at least a batch of them."""
    shape = (max(count, cfg.batch_size), *diffuser.image_shape(cfg))
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return diffuser.ImageData(images, torch.zeros(len(images), dtype=torch.long), [])


def offer_noise(count: int = 2048) -> None:
    """Make a dataset of so many random images, "random", for this process."""
    diffuser.DATASETS["random"] = diffuser.DatasetSpec(
        lambda cfg, train: random_images(cfg, count), "noise", (3, 32, 32))


# ---- Contestants: (configuration, precision) -> Contestant -------------------------------------


@dataclasses.dataclass
class Contestant:
    """What is measured: a training step; drawing so many images in so many steps; its network's work."""

    step: Callable[[], None]
    draw: Callable[[int, int], object]
    network: nn.Module
    call: Callable[[nn.Module, Tensor, Tensor], Tensor]          # (network, xt, t) -> output


def ours(cfg: diffuser.Config, precision: str) -> Contestant:
    """diffuser.py as it is."""
    cfg = dataclasses.replace(cfg, precision=precision)
    run = diffuser.Trainer(cfg, diffuser.Devices(cfg))

    def draw(count: int, steps: int) -> None:
        ddim = dataclasses.replace(run.cfg, sampler="ddim", steps=steps)
        torch.cat(list(run.model.draw(run.model.labels(None, count), ddim)))

    return Contestant(run.train_step, draw, run.network, lambda network, xt, t: network(xt, t))


def diffusers_network(cfg: diffuser.Config) -> nn.Module:
    """A UNet2DModel of the configured shape."""
    from diffusers import UNet2DModel

    down = []
    for level in range(len(cfg.channel_mults)):
        attends = cfg.use_attention and level in cfg.attention_levels
        down.append("AttnDownBlock2D" if attends else "DownBlock2D")
    up = [name.replace("Down", "Up") for name in reversed(down)]

    head_dim = cfg.head_dim
    if not head_dim and cfg.num_heads > 1:
        head_dim = cfg.base_channels * cfg.channel_mults[-1] // cfg.num_heads
    return UNet2DModel(
        sample_size=cfg.img_size,
        in_channels=cfg.channels,
        out_channels=cfg.channels,
        layers_per_block=cfg.num_res_blocks,
        block_out_channels=[cfg.base_channels * mult for mult in cfg.channel_mults],
        down_block_types=down,
        up_block_types=up,
        dropout=cfg.dropout,
        attention_head_dim=head_dim or None,
        norm_num_groups=math.gcd(cfg.norm_groups, cfg.base_channels),
        add_attention=cfg.use_attention,
    )


def repeat(loader: torch.utils.data.DataLoader) -> Iterator[Tensor]:
    """Its batches, epoch after epoch."""
    while True:
        yield from loader


def diffusers(cfg: diffuser.Config, precision: str) -> Contestant:
    """The loop of diffusers' examples/unconditional_image_generation/train_unconditional.py, with --use_ema."""
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator(mixed_precision=precision)
    model = diffusers_network(cfg)
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    noising = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    images = diffuser.from_uint8(random_images(cfg).images)
    loader = torch.utils.data.DataLoader(images, batch_size=cfg.batch_size, shuffle=True)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10**6)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    ema.to(accelerator.device)
    batches = repeat(loader)

    def step() -> None:
        clean = next(batches)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
        with accelerator.accumulate(model):
            out = model(noising.add_noise(clean, noise, t), t).sample
            loss = F.mse_loss(out.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.step(model.parameters())
        loss.detach().item()                                     # its progress bar shows it

    def draw(count: int, steps: int) -> None:
        with accelerator.autocast():                             # nothing in float32, its default
            pipeline = DDIMPipeline(accelerator.unwrap_model(model), DDIMScheduler(num_train_timesteps=1000))
            pipeline.set_progress_bar_config(disable=True)
            pipeline.unet.eval()
            pipeline(batch_size=count, num_inference_steps=steps, output_type="np")

    return Contestant(step, draw, accelerator.unwrap_model(model), lambda network, xt, t: network(xt, t).sample)


def lucidrains_network(cfg: diffuser.Config) -> nn.Module:
    """The Unet of denoising-diffusion-pytorch with about as many parameters as ours."""
    from denoising_diffusion_pytorch import Unet

    mults = {8: (1, 2), 28: (1, 2, 4), 32: (1, 2, 4, 8), 64: (1, 2, 4, 8)}.get(cfg.img_size[0], (1, 2, 4))
    distances = {}                                               # width: how far it is from our number of parameters
    with torch.device("meta"):
        wanted = diffuser.count_parameters(diffuser.build_unet(cfg, cfg.channels, 0))
        for dim in range(8, 160, 4):
            distances[dim] = abs(diffuser.count_parameters(Unet(dim, dim_mults=mults, channels=cfg.channels)) - wanted)
    nearest = min(distances, key=distances.get)
    return Unet(nearest, dim_mults=mults, channels=cfg.channels, dropout=cfg.dropout)


def lucidrains(cfg: diffuser.Config, precision: str) -> Contestant:
    """denoising-diffusion-pytorch's Trainer over a folder of PNG files."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

    network = lucidrains_network(cfg)

    # Its Trainer reads files.
    kept = tempfile.TemporaryDirectory(prefix="speed_")
    folder = Path(kept.name)
    images = random_images(cfg, 512).images
    for i, image in enumerate(images):
        diffuser.to_pil(image).save(folder / f"{i}.png")

    diffusion = GaussianDiffusion(network, image_size=cfg.img_size[0], timesteps=1000, sampling_timesteps=50)
    trainer = Trainer(
        diffusion,
        folder,
        train_batch_size=cfg.batch_size,
        train_lr=1e-4,
        calculate_fid=False,
        train_num_steps=0,
        save_and_sample_every=10**9,
        results_folder=str(folder / "results"),
        amp=precision == "bf16",
        mixed_precision_type="bf16",
    )
    trainer.images = kept                                        # until the process ends

    def step() -> None:
        trainer.train_num_steps = trainer.step + 1
        trainer.train()

    def draw(count: int, steps: int) -> None:
        diffusion.eval().sampling_timesteps = steps
        with torch.no_grad(), trainer.accelerator.autocast():
            diffusion.sample(batch_size=count)

    return Contestant(step, draw, network, lambda network, xt, t: network(xt, t))


# name: (contestant, precision)
CONTESTANTS = {
    "diffuser": (ours, "auto"),
    "diffuser fp32": (ours, "fp32"),
    "diffusers": (diffusers, "no"),
    "diffusers bf16": (diffusers, "bf16"),
    "denoising-diffusion-pytorch": (lucidrains, "no"),
    "denoising-diffusion-pytorch bf16": (lucidrains, "bf16"),
}
PACKAGES = {ours: (), diffusers: ("diffusers", "accelerate"), lucidrains: ("denoising_diffusion_pytorch",)}


# ---- Measuring ---------------------------------------------------------------------------------


def wait() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], budget: float, warmup: int = 3, least: int = 3) -> float:
    """Median time of one call, after some to warm up, of as many as fit into `budget` seconds: `least` to 200."""
    for _ in range(warmup):
        work()
    wait()

    times = []
    start = time.perf_counter()
    while len(times) < least or (time.perf_counter() - start < budget and len(times) < 200):
        before = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def matrix_rate() -> float:
    """FLOP/s of a product of matrices on this machine, in the precision that is fast here."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    n = 8192 if cuda else 2048
    dtype = diffuser.PRECISIONS[diffuser.pick_precision(diffuser.Config(), device)]
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / seconds(lambda: a @ b, 1.0)


def flops(contestant: Contestant, cfg: diffuser.Config) -> int:
    """Multiplications and additions of one image, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(contestant.network.parameters()).device
    xt = torch.zeros(1, cfg.channels, *cfg.img_size, device=device)
    t = torch.zeros(1, dtype=torch.long, device=device)
    with FlopCounterMode(display=False) as counter:
        contestant.call(contestant.network, xt, t).square().mean().backward()
    return counter.get_total_flops()


def peak_memory() -> float:
    """GiB that this process has taken at most: of the GPU's memory where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    if sys.platform == "linux":                                  # getrusage counts the parent's, too
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20

    unit = 2**30 if sys.platform == "darwin" else 2**20          # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(args: argparse.Namespace) -> dict:
    """In a process of its own: everything about one contestant, network and batch size."""
    make, precision = CONTESTANTS[args.contestants]
    cfg = settings(args.networks, int(args.batches))
    contestant = make(cfg, precision)
    step = seconds(contestant.step, args.seconds)
    memory = peak_memory()

    drawing = math.nan
    if args.images:
        contestant.draw(args.images, 2)                          # to warm up
        drawing = seconds(lambda: contestant.draw(args.images, args.steps), 0, 0, 1)

    work = flops(contestant, cfg)
    parameters = diffuser.count_parameters(contestant.network)
    return dict(parameters=parameters, step=step, memory=memory, drawing=drawing, flops=work)


def in_process(*flags: object, processes: int = 0) -> dict:
    """The JSON that this script prints last when it is run with the flags. Raises UserError where it fails.

    processes: so many of them under torchrun, with a thread each.
    """
    command = [sys.executable, __file__, *map(str, flags)]
    env = os.environ
    if processes:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        env = {**env, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise UserError(reason(done.stderr), code=1)
    return json.loads(lines[-1])


def reason(stderr: str) -> str:
    """Why a process ended, in one line: its own last message, or the last line of what it printed."""
    lines = stderr.strip().splitlines() or ["no message"]
    messages = [line for line in lines if line.startswith(("speed: ", "diffuser: "))] or lines
    return messages[-1]


def medians(results: list[dict]) -> dict:
    """The median of each value over results with the same keys."""
    return {key: statistics.median(result[key] for result in results) for key in results[0]}


def tell(row: dict, rows: list[dict], args: argparse.Namespace) -> None:
    """Add a row to the others, print it and keep it: those after it take minutes each, and may fail."""
    rows.append(row)
    print(row, flush=True)
    if args.json:
        warn_on_oserror(args.json, lambda: write_rows(args, rows))


def write_rows(args: argparse.Namespace, rows: list[dict]) -> None:
    """Write the file that --json asks for. Raises OSError."""
    write_json(Path(args.json), dict(machine=machine(), command=sys.argv[1:], rows=rows))


def short(number: float) -> float:
    """Three digits of it."""
    return float(f"{number:.3g}")


def millions(number: float) -> str:
    """A number of parameters."""
    return f"{number / 1e6:.2f}M"


# ---- The comparison ----------------------------------------------------------------------------


def compare(args: argparse.Namespace) -> list[dict]:
    """A row per network, batch size and contestant: medians over the rounds, who takes part taking turns."""
    rows = []
    rates = []
    for network in args.networks.split(","):
        for batch in args.batches.split(","):
            results = take_turns(args, network, batch, rates)
            for name, found in results.items():
                row = {"network": network, "batch": batch, "": name}
                row.update(compare_row(args, int(batch), found, statistics.median(rates)))
                tell(row, rows, args)

    middle = statistics.median(rates) / 1e12
    print(f"matrix rate: {middle:.2f} TFLOP/s ({min(rates) / 1e12:.2f} to {max(rates) / 1e12:.2f})")
    return rows


def take_turns(args: argparse.Namespace, network: str, batch: str, rates: list[float]) -> dict[str, list[dict]]:
    """What each contestant measured in each round, without those that failed; `rates` gets a matrix rate a round."""
    results: dict[str, list[dict]] = {}
    for _ in range(args.rounds):
        rates.append(in_process("--rate")["rate"])
        for name in args.contestants.split(","):
            try:
                found = in_process(
                    "--measure", "--networks", network, "--batches", batch, "--contestants", name,
                    "--seconds", args.seconds, "--images", args.images, "--steps", args.steps)
            except UserError as error:
                print(f"{network}, {batch}, {name}: failed ({error})", flush=True)
            else:
                results.setdefault(name, []).append(found)
    return results


def compare_row(args: argparse.Namespace, batch: int, found: list[dict], rate: float) -> dict:
    """The measurements of one contestant, network and batch size for a table. rate: of the machine, in FLOP/s."""
    middle = medians(found)
    speeds = [batch / result["step"] for result in found]
    work = batch / middle["step"] * middle["flops"]              # FLOP/s
    return {
        "parameters": millions(middle["parameters"]),
        "training images/s": short(batch / middle["step"]),
        "from": short(min(speeds)),
        "to": short(max(speeds)),
        "TFLOP/s": short(work / 1e12),
        "of matrix rate": f"{work / rate:.0%}",
        "peak GiB": short(middle["memory"]),
        "sampling images/s": short(args.images / middle["drawing"]) if args.images else "",
    }


# ---- Cost curves -------------------------------------------------------------------------------

# What a cost curve varies, from a small network on small images: (settings, batch, images in the data set)
CURVES = {
    "size": [(dict(img_size=(n, n)), 16, 2048) for n in (16, 32, 64, 128)],
    "batch": [({}, n, 2048) for n in (1, 4, 16, 64, 256)],
    "width": [(dict(base_channels=n), 16, 2048) for n in (16, 32, 64, 128)],
    "dataset": [({}, 16, n) for n in (1_000, 10_000, 100_000)],
}


def curve_point(args: argparse.Namespace) -> dict:
    """In a process of its own: one step of one point of a cost curve."""
    changes, batch, images = CURVES[args.curves][args.point]
    offer_noise(images)
    cfg = settings("64x64", batch, **{"img_size": (32, 32), "num_heads": 4, "head_dim": 0, **changes})
    run = diffuser.Trainer(cfg, diffuser.Devices(cfg))

    loading = seconds(lambda: run.batches(run.step), 1.0)
    step = seconds(run.train_step, args.seconds)
    return dict(step=step, loading=loading, memory=peak_memory(), parameters=diffuser.count_parameters(run.network))


def curves(args: argparse.Namespace) -> list[dict]:
    """A row per point of the curves asked for; medians over the rounds."""
    rows = []
    for name in args.curves.split(","):
        # Measure, the points taking turns.
        points = CURVES[name]
        found: list[list[dict]] = [[] for _ in points]
        for _ in range(args.rounds):
            for i in range(len(points)):
                try:
                    point = in_process("--measure", "--curves", name, "--point", i, "--seconds", args.seconds)
                except UserError as error:                       # the largest may be too large
                    print(f"{name}, point {i + 1}: failed ({error})", flush=True)
                else:
                    found[i].append(point)

        # Tell.
        for (changes, batch, images), results in zip(points, found, strict=True):
            if not results:
                continue
            middle = medians(results)
            height, width = changes.get("img_size", (32, 32))
            row = {
                "": name,
                "images": f"{images} of {height}x{width}",
                "batch": batch,
                "channels": changes.get("base_channels", 64),
                "parameters": millions(middle["parameters"]),
                "step (s)": short(middle["step"]),
                "images/s": short(batch / middle["step"]),
                "loading (ms)": short(1000 * middle["loading"]),
                "peak GiB": short(middle["memory"]),
            }
            tell(row, rows, args)
    return rows


# ---- A folder of JPEGs -------------------------------------------------------------------------


def make_jpegs(folder: Path, count: int) -> None:
    """Write so many smooth random images of 96 x 80."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        small.resize((96, 80), Image.Resampling.BICUBIC).save(folder / f"{i:06}.jpg", quality=90)


def jpegs(args: argparse.Namespace) -> list[dict]:
    """A folder of that many JPEGs: the time to cache them and to open the cache, and what loading is of a step."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "images")
        make_jpegs(folder, args.jpegs)
        for pass_name in ("first", "cached"):
            cfg = diffuser.configure(dataset="folder", path_to_data=str(folder), data_dir=place, img_size=(64, 64),
                                     iterations=10**6, num_workers=os.cpu_count())
            start = time.perf_counter()
            run = diffuser.Trainer(cfg, diffuser.Devices(cfg))
            opened = time.perf_counter() - start

            step = seconds(run.train_step, args.seconds)
            steps = iter(range(10**6))
            loading = seconds(lambda run=run, steps=steps: run.batches(next(steps)), 5.0)
            row = {
                "": pass_name,
                "images": args.jpegs,
                "ready after (s)": round(opened, 1),
                "step (ms)": round(1000 * step),
                "loading (ms)": round(1000 * loading, 2),
                "of the step": f"{loading / step:.1%}",
            }
            tell(row, rows, args)
    return rows


# ---- Sets of many images -----------------------------------------------------------------------

SET_CLASSES = 10


def picture(i: int, side: int) -> Image.Image:
    """One of a hundred pictures in one colour each, of a shade that tells its number."""
    return Image.new("RGB", (side, side), (i % 100, 10 * (i % 10), 255 - i % 100))


def png(i: int, side: int) -> bytes:
    """The same as the bytes of a PNG file."""
    file = io.BytesIO()
    picture(i, side).save(file, "PNG")
    return file.getvalue()


def write_folder(path: Path, count: int, side: int) -> None:
    """Image i as CLASS/i.png in a folder."""
    some = [png(i, side) for i in range(min(count, 100))]
    for name in range(SET_CLASSES):
        Path(path, f"class{name}").mkdir(parents=True)
    for i in range(count):
        Path(path, f"class{i % SET_CLASSES}", f"{i:08}.png").write_bytes(some[i % 100])


def write_zip(path: Path, count: int, side: int) -> None:
    """Image i as CLASS/i.png in a ZIP file."""
    some = [png(i, side) for i in range(min(count, 100))]
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            archive.writestr(f"class{i % SET_CLASSES}/{i:08}.png", some[i % 100])


def write_tar(path: Path, count: int, side: int) -> None:
    """Image i as i.png beside i.cls in a tar file."""
    some = [png(i, side) for i in range(min(count, 100))]
    with tarfile.open(path, "w") as archive:
        for i in range(count):
            for ending, content in (("png", some[i % 100]), ("cls", str(i % SET_CLASSES).encode())):
                entry = tarfile.TarInfo(f"{i:08}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
                archive.members.clear()                          # it would keep all of them


def write_parquet(path: Path, count: int, side: int) -> None:
    """Image i as row i, in groups of 1,000 rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    some = [png(i, side) for i in range(min(count, 1000))]
    schema = pa.schema([("image", pa.binary()), ("label", pa.int64())])
    with pq.ParquetWriter(path, schema, use_dictionary=False) as writer:
        for first in range(0, count, 1000):
            numbers = range(first, min(first + 1000, count))
            rows = dict(image=[some[i % 1000] for i in numbers], label=[i % SET_CLASSES for i in numbers])
            writer.write_table(pa.table(rows, schema))


def write_npz(path: Path, count: int, side: int) -> None:
    """Image i as entry i of an array that is not packed."""
    some = [np.asarray(picture(i, side)).tobytes() for i in range(min(count, 100))]
    labels = np.arange(count) % SET_CLASSES
    header = dict(descr="|u1", fortran_order=False, shape=(count, side, side, 3))
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("images.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for i in range(count):
                file.write(some[i % 100])
        with archive.open("labels.npy", "w") as file:
            np.lib.format.write_array(file, labels)


SET_KINDS = {"folder": write_folder, "zip": write_zip, "tar": write_tar, "parquet": write_parquet, "npz": write_npz}


class AnonymousMemory:
    """A context manager that looks at this process's anonymous memory all the time: what no file on disk stands behind.

    peak: MiB, the most that was seen; nan where there is no /proc.
    """

    def __init__(self):
        self.peak = math.nan
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def look(self) -> None:
        with suppress(OSError):
            status = Path("/proc/self/status").read_text()
            now = int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 2**10
            self.peak = now if math.isnan(self.peak) else max(self.peak, now)

    def watch(self) -> None:
        while not self.ended.wait(0.01):
            self.look()

    def __enter__(self) -> AnonymousMemory:
        self.look()
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.ended.set()
        self.thread.join()
        self.look()


def write_black_cache(index: Path, decoded: diffuser_lib.images.DecodedImages, workers: int) -> None:
    """In place of build_cache: no picture is decoded, all are black, in a file that takes no room on the disk."""
    labels = decoded.source.labels
    with open(index.with_suffix(".bin"), "wb") as file:
        file.truncate(len(labels) * math.prod(decoded.shape))
    labels.tofile(index.with_suffix(".labels"))
    write_json(index, dict(images=len(labels), unreadable=0))


def set_point(args: argparse.Namespace) -> dict:
    """In a process of its own: seconds until a set is open, until a first step is done, and the memory."""
    cfg = diffuser.configure(dataset="folder", path_to_data=args.opened, data_dir=args.data_dir, device="cpu",
                             img_size=(args.side, args.side), patch_size=max(1, args.side // 8), base_channels=8,
                             channel_mults=(1, 2), emb_dim=8, batch_size=16, iterations=10**6, num_workers=args.workers)
    if args.black:
        diffuser_lib.images.build_cache = write_black_cache
    start = time.perf_counter()
    with AnonymousMemory() as memory:
        at_start = memory.peak
        run = diffuser.Trainer(cfg, diffuser.Devices(cfg))
        opened = time.perf_counter() - start
        run.train_step()
        first = time.perf_counter() - start
        run.batches.shuffle(1)
        run.train_step()
    return dict(images=len(run.data.images), opened=opened, first=first, memory=memory.peak, at_start=at_start)


def sets(args: argparse.Namespace) -> list[dict]:
    """Sets of those sizes, made of a few pictures: the time to cache them and to the first step, and the memory."""
    rows = []
    for count in map(int, args.sets.split(",")):
        with tempfile.TemporaryDirectory(dir=args.data_dir) as place:
            path = Path(place, f"set.{args.kind}" if args.kind != "folder" else "set")
            SET_KINDS[args.kind](path, count, args.side)
            flags = ["--measure", "--opened", path, "--data_dir", place, "--side", args.side, "--workers", args.workers]
            flags += ["--black"] * args.black
            built = in_process(*flags)
            cached = in_process(*flags)
        row = {
            "": args.kind,
            "images": built["images"],
            "size": f"{args.side}x{args.side}",
            "opening (s)" if args.black else "caching (s)": round(built["opened"], 1),
            "MiB then": round(built["memory"]),
            "cached: to the first step (s)": round(cached["first"], 2),
            "MiB": round(cached["memory"]),
            "at the start": round(cached["at_start"]),
        }
        tell(row, rows, args)
    return rows


# ---- The first step ----------------------------------------------------------------------------

# Trains up to the end of the first step, then prints when torch was imported, the rest was, and the step was done.
FIRST_STEP = """\
import sys, time; sys.path.insert(0, {program!r})
import torch; a = time.time(); import diffuser; b = time.time()
step = diffuser.Trainer.train_step
def first(run):
    step(run); print(a, b, time.time(), flush=True); import os; os._exit(0)
diffuser.Trainer.train_step = first
diffuser.main(['--mode', 'train', '--dataset', {dataset!r}, '--data_dir', {data_dir!r}])
"""


def time_first_step(dataset: str, data_dir: str) -> tuple[float, float, float, float]:
    """Seconds to import torch, to import the rest, from there to the end of the first step, and in all."""
    code = FIRST_STEP.format(program=str(Path(diffuser.__file__).parent), dataset=dataset,
                             data_dir=str(Path(data_dir).resolve()))
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        raise UserError(reason(done.stderr), code=1)

    torch_in, ours_in, end = map(float, done.stdout.split()[-3:])
    return torch_in - start, ours_in - torch_in, end - ours_in, end - start


def start(args: argparse.Namespace) -> list[dict]:
    """From the command to the end of the first step, for each dataset named; and what of it importing torch takes."""
    names = ("import torch (s)", "import the rest", "to the first step", "in all")
    rows = []
    for dataset in args.start.split(","):
        found = [time_first_step(dataset, args.data_dir) for _ in range(max(3, args.rounds))]
        row: dict[str, object] = {"": dataset}
        for name, column in zip(names, zip(*found, strict=True), strict=True):
            row[name] = round(statistics.median(column), 2)
        tell(row, rows, args)
    return rows


# ---- Processes that share a batch --------------------------------------------------------------


def shared_step(args: argparse.Namespace) -> dict:
    """In each of several processes: seconds of a step, and those in which the exchange of gradients is under way."""
    cfg = settings(args.networks, int(args.batches))
    run = diffuser.Trainer(cfg, diffuser.Devices(cfg))
    step = seconds(run.train_step, 0, least=args.steps)          # as many on each, or they would wait for one another

    with torch.profiler.profile() as profile:
        for _ in range(5):
            run.train_step()
    exchanges = [event for event in profile.key_averages() if re.match("(gloo|nccl):all_?reduce", event.key)]
    exchange = sum(event.cpu_time_total for event in exchanges)
    return dict(step=step, exchange=exchange / 5e6, gradients=4 * diffuser.count_parameters(run.network))


def processes(args: argparse.Namespace) -> list[dict]:
    """Each number of processes in turn, on the same batch: of one thread each, where they are CPU processes."""
    counts = [int(count) for count in args.processes.split(",")]
    shared = ["--measure", "--shared", "--networks", args.networks, "--batches", args.batches, "--steps", args.steps]
    found: dict[int, list[dict]] = {count: [] for count in counts}
    for _ in range(args.rounds):
        for count in counts:
            found[count].append(in_process(*shared, processes=count))

    rows = []
    alone = None
    for count, results in found.items():
        middle = medians(results)
        alone = alone or count * middle["step"]
        row = {
            "": f"{args.networks}, batch {args.batches}",
            "processes": count,
            "step (ms)": round(1000 * middle["step"], 1),
            "images/s": round(int(args.batches) / middle["step"], 1),
            "efficiency": f"{alone / (count * middle['step']):.0%}",
            "exchange under way": f"{middle['exchange'] / middle['step']:.0%}",
            "gradients (MB)": round(middle["gradients"] / 1e6, 1),
        }
        tell(row, rows, args)
    return rows


# ---- Command line ------------------------------------------------------------------------------


def build_parser() -> Parser:
    """The flags."""
    parser = Parser("speed.py", usage="python benchmarks/speed.py [options]", doc=__doc__)
    add = parser.add_argument
    add("--networks", default="mnist", metavar="NAME,NAME", help=f"{', '.join(NETWORKS)} [mnist]")
    add("--batches", default="128", metavar="N,N", help="batch sizes [128]")
    add("--contestants", default=",".join(CONTESTANTS), metavar="NAME,NAME",
        help=f"who is measured [{','.join(CONTESTANTS)}]")
    add("--rounds", type=int, default=3, help="times that each is measured [3]")
    add("--seconds", type=float, default=5, help="for timing steps: at least 3, after 3 to warm up [5]")
    add("--images", type=int, default=100, help="images to draw by DDIM; 0: none [100]")
    add("--steps", type=int, default=50, help="sampling steps [50]")
    add("--curves", default="", metavar="NAME,NAME", help=f"cost curves instead: {', '.join(CURVES)}")
    add("--jpegs", type=int, default=0, help="instead: a folder of so many JPEGs")
    add("--sets", default="", metavar="N,N", help="instead: sets of so many images, made of a few pictures")
    add("--kind", default="zip", choices=sorted(SET_KINDS), help="how --sets stores them [zip]")
    add("--side", type=int, default=64, help="pixels of their width and height, a multiple of 8 [64]")
    add("--workers", type=int, default=0, help="processes that decode them [0]")
    add("--black", action="store_true", help="do not decode them: for sizes that take too long, or too much room")
    add("--processes", default="", metavar="N,N", help="instead: so many processes that share a batch")
    add("--start", nargs="?", const="digits", default="", help="instead: time to a first step [digits]")
    add("--data_dir", default="data", metavar="PATH",
        help="where --start finds its datasets and --sets has room [data]")
    add("--json", default="", metavar="PATH", help="also write the rows to this file")
    add_debug(parser)

    # What in_process runs.
    add("--measure", action="store_true", help=argparse.SUPPRESS)
    add("--rate", action="store_true", help=argparse.SUPPRESS)
    add("--shared", action="store_true", help=argparse.SUPPRESS)
    add("--point", type=int, default=0, help=argparse.SUPPRESS)
    add("--opened", default="", help=argparse.SUPPRESS)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise UserError for a name or number that would fail later."""
    lists = [(args.networks, NETWORKS), (args.contestants, CONTESTANTS), (args.curves, CURVES),
             (args.start, diffuser.PRESETS)]
    for given, known in lists:
        unknown = [name for name in given.split(",") if name not in known]
        if given and unknown:
            raise UserError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")

    if not args.networks or not args.contestants:
        raise UserError("--networks and --contestants each want a name at least")
    sound = all(batch.isdecimal() and int(batch) > 0 for batch in args.batches.split(","))
    if not sound or args.rounds < 1 or args.images < 0:
        raise UserError("--batches wants numbers such as 16,64, --rounds at least 1, --images at least 0")
    if args.steps < 1 or args.jpegs < 0 or not 0 <= args.seconds < 10**6:
        raise UserError("--steps wants at least 1, --jpegs at least 0, --seconds at least 0")
    if args.sets and not all(count.isdecimal() and int(count) >= 100 for count in args.sets.split(",")):
        raise UserError("--sets wants numbers of at least 100, such as 10000,100000")
    if args.processes and not all(count.isdecimal() and int(count) for count in args.processes.split(",")):
        raise UserError("--processes wants numbers such as 1,2")
    if args.processes and ("," in args.networks or "," in args.batches):
        raise UserError("--processes wants one network and one number in --batches")
    if args.side < 8 or args.side % 8 or args.workers < 0:
        raise UserError("--side wants a multiple of 8, --workers at least 0")
    if args.sets and not Path(args.data_dir).is_dir():
        raise UserError(f"--data_dir {args.data_dir}: there is no such folder, and --sets takes room in it")


def measure_one(args: argparse.Namespace) -> dict:
    """What a process of in_process measures."""
    if args.rate:
        return dict(rate=matrix_rate())
    if args.shared:
        return shared_step(args)
    if args.opened:
        return set_point(args)
    if args.curves:
        return curve_point(args)
    return measure(args)


def work(args: argparse.Namespace) -> None:
    """Measure what is asked for, and print the table."""
    check(args)
    offer_noise()
    if args.rate or args.measure:
        measured = measure_one(args)
        if os.environ.get("RANK", "0") == "0":
            print("\n" + json.dumps(measured))
        return

    if args.json:
        require_writable(args.json, "--json")
    if not (args.curves or args.jpegs or args.sets or args.processes or args.start):
        args.contestants = leave_out_missing(args.contestants, lambda name: PACKAGES[CONTESTANTS[name][0]])

    print(machine(), flush=True)
    if args.curves:
        rows = curves(args)
    elif args.jpegs:
        rows = jpegs(args)
    elif args.sets:
        rows = sets(args)
    elif args.processes:
        rows = processes(args)
    elif args.start:
        rows = start(args)
    else:
        rows = compare(args)
    print(table(rows))
    if args.json:
        write_rows(args, rows)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    explain = partial(diffuser.explain, remedy="smaller --batches")
    return run_script("speed", lambda: build_parser().parse_args(argv), work, explain)


if __name__ == "__main__":
    end_process(main)
