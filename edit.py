#!/usr/bin/env python3
"""edit: interpolate between images, vary a picture and paint parts of it anew, with a trained model.

    python edit.py CKPT interpolate --seeds 1,2 --classes 3          from image to image
    python edit.py CKPT interpolate --seeds 1,2 --classes 3,8        and from class to class
    python edit.py CKPT vary PICTURE --strength 0.5 --num_images 8   other pictures like this one
    python edit.py CKPT inpaint PICTURE MASK --classes 3             white in the mask is painted anew

PICTURE is cropped to the middle and resized to the model's size. Images go to --save_dir: grid.png shows them side by
side, after what they were made from. --sampler, --steps, --seed and others are as for diffuser.py.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

import diffuser
from diffuser import Denoiser, Model, UserError

# ------------------------------------------------------------------------------------------------
# The three edits, over the samplers of diffuser.py. alpha_bar: float64 [T]; ts: descending timesteps; images are
# [N, C, H, W] in [-1, 1]; draw_noise() gives standard normal noise [N, C, H, W].

Sampler = Callable[..., Iterator[tuple[int, Tensor, Tensor]]]


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation, a at weight 0 and b at 1: between two noises the length stays that of noise (Shoemake
    1985; DDIM, 2010.02502, eq. 67)."""
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1)).item()
    if math.sin(angle) < 1e-4:                                               # on one line: there is no arc
        return (1 - weight) * a + weight * b
    return (math.sin((1 - weight) * angle) * a + math.sin(weight * angle) * b) / math.sin(angle)


def mix(first: Denoiser, second: Denoiser, weights: Tensor) -> Denoiser:
    """The denoiser whose estimates go from the first one's to the second one's, by weights [N] in 0..1."""
    weights = weights.view(-1, 1, 1, 1)

    def denoise(xt: Tensor, t: int) -> tuple[Tensor, Tensor]:
        a, b = first(xt, t), second(xt, t)
        return torch.lerp(a[0], b[0], weights), torch.lerp(a[1], b[1], weights)

    return denoise


def add_noise(x: Tensor, level: float, wanted: float, noise: Tensor) -> Tensor:
    """x at the alpha_bar `level` taken on to `wanted`, which is no larger (DDPM, eq. 2, over many steps)."""
    kept = wanted / level
    return math.sqrt(kept) * x + math.sqrt(1 - kept) * noise


def vary(sampler: Sampler, denoise: Denoiser, picture: Tensor, strength: float, ts: list[int], alpha_bar: Tensor,
         draw_noise: Callable[[], Tensor]) -> Tensor:
    """Noise up to the part `strength` of all timesteps, then drawing from there (SDEdit, 2108.01073, algorithm 1)."""
    rest = [t for t in ts if t < strength * len(alpha_bar)] or ts[-1:]
    xt = add_noise(picture, 1.0, alpha_bar[rest[0]].item(), draw_noise())
    *_, (_, x, _) = sampler(denoise, xt, rest, alpha_bar, draw_noise)
    return x


def repaint_walk(steps: int, jump_length: int, resamples: int) -> Iterator[int]:
    """Steps left after each move of RePaint, from steps - 1 to 0: one down at a time, but every jump_length steps the
    last jump_length ones are undone and taken again, until they were taken `resamples` times (2201.09865, sec. 4.2)."""
    again, left = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), resamples - 1), steps
    while left > 0:
        left -= 1
        yield left
        if again.get(left, 0):
            again[left] -= 1
            for _ in range(jump_length):
                left += 1
                yield left


def inpaint(sampler: Sampler, denoise: Denoiser, xT: Tensor, picture: Tensor, mask: Tensor, ts: list[int],
            alpha_bar: Tensor, draw_noise: Callable[[], Tensor], jump_length: int = 5, resamples: int = 5) -> Tensor:
    """The picture with what the mask [1, 1, H, W] has at 1 painted anew (RePaint, 2201.09865, algorithm 1): after each
    step the known part is put in, as noisy as the rest; steps are undone and repeated so that both come to agree."""
    levels = [1.0, *(alpha_bar[t].item() for t in reversed(ts))]             # alpha_bar by the number of steps left
    x, left = xT, len(ts)
    for after in repaint_walk(len(ts), jump_length, resamples):
        if after > left:
            x = add_noise(x, levels[left], levels[after], draw_noise())
        else:
            done = len(ts) - left
            _, x, _ = next(sampler(denoise, x, ts[done : done + 2], alpha_bar, draw_noise))
            known = add_noise(picture, 1.0, levels[after], draw_noise()) if after else picture
            x = mask * x + (1 - mask) * known
        left = after
    return x


# ------------------------------------------------------------------------------------------------
# Commands


def read_picture(path: str, shape: tuple[int, int, int], ground: str = "white") -> Tensor:
    """A picture, cropped to the middle and resized, what is transparent put on a ground: uint8 [1, C, H, W]. Raises
    UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such picture")
    try:
        found = diffuser.Decoder([(Image.open(path), 0)], shape, ground)[0]
    except Exception as error:                                               # Pillow raises many kinds
        found = diffuser.first_line(error)
    if isinstance(found, str):
        raise UserError(f"{path} cannot be read as a picture ({found})")
    return torch.from_numpy(found[0])[None]


def read_mask(path: str, picture: str, shape: tuple[int, int, int]) -> Tensor:
    """A mask for the picture, float [1, 1, H, W]: 1 where it is white, 0 where transparent. Raises UserError."""
    mask = (read_picture(path, (1, *shape[1:]), "black") > 127).float()
    sizes = [ImageOps.exif_transpose(Image.open(p)).size for p in (path, picture)]     # as they are looked at
    if sizes[0] != sizes[1]:
        raise UserError("the mask is {}x{}, the picture {}x{}: make them alike".format(*sizes[0], *sizes[1]))
    if mask.min() == mask.max():
        raise UserError(f"{path} is all {'white' if mask.max() else 'black'}: white is painted anew, black stays")
    return mask


class Context:
    """A model with the settings, labels and noise of one edit. numbers: classes, may be empty; count: images."""

    def __init__(self, model: Model, numbers: list[int], count: int):
        self.model, self.cfg, self.count = model, model.config, count
        self.alpha_bar = model.diffusion.alpha_bar
        self.ts = diffuser.sampling_grid(self.cfg, self.alpha_bar)
        self.sampler = diffuser.SAMPLERS[self.cfg.sampler](self.cfg)
        self.labels = [self.label(number) for number in numbers] or [self.label(len(model.class_names))]
        self.draw_noise = self.noise(self.cfg.seed, range(count))

    def repeated(self, picture: Tensor) -> Tensor:
        """A picture, uint8 [1, C, H, W], once for each image, in [-1, 1]."""
        return diffuser.from_uint8(picture).to(self.model.device).repeat(self.count, 1, 1, 1)

    def label(self, number: int) -> Tensor:
        return torch.full((self.count,), number, device=self.model.device)

    def noise(self, seed: int, images: range) -> Callable[[], Tensor]:
        return diffuser.image_noise(seed, images, self.model.shape, self.model.device)

    def denoiser(self) -> Denoiser:
        return self.model.denoiser(self.labels[0], self.cfg)

    def start(self, noise: Tensor, labels: Tensor) -> Tensor:
        return self.model.start(noise, labels, self.cfg, self.ts[0])


def run_interpolate(context: Context, args: argparse.Namespace) -> tuple[Tensor, list[Tensor]]:
    """Images on the way from one seed's to another's; returns them and what they were made from: nothing."""
    if context.cfg.sampler == "ddpm" or (context.cfg.sampler == "ddim" and context.cfg.eta > 0):
        raise UserError("interpolate wants a sampler that adds no noise: --sampler dpmpp, heun or ddim, --eta 0")
    try:
        first, second = (int(seed) for seed in args.seeds.split(","))
        ends = [context.noise(seed, range(1))()[0] for seed in (first, second)]
    except ValueError:
        raise UserError(f"--seeds wants two whole numbers of 0 or more, such as 1,2, not {args.seeds!r}") from None
    weights = torch.linspace(0, 1, context.count, device=context.model.device)
    noise = torch.stack([slerp(*ends, weight) for weight in weights.tolist()])
    a, b = context.labels[0], context.labels[-1]
    denoise, xT = context.denoiser(), context.start(noise, a)
    if len(context.labels) > 1:
        denoise = mix(denoise, context.model.denoiser(b, context.cfg), weights)
        xT = torch.lerp(xT, context.start(noise, b), weights.view(-1, 1, 1, 1))
    *_, (_, x, _) = context.sampler(denoise, xT, context.ts, context.alpha_bar, context.draw_noise)
    return x, []


def run_vary(context: Context, args: argparse.Namespace) -> tuple[Tensor, list[Tensor]]:
    """Variations of a picture; returns them and the picture."""
    if not 0 < args.strength <= 1:
        raise UserError(f"--strength is above 0 and at most 1, not {args.strength:g}")
    picture = read_picture(args.picture, context.model.shape)
    x0 = context.repeated(picture)
    return vary(context.sampler, context.denoiser(), x0, args.strength, context.ts, context.alpha_bar,
                context.draw_noise), [picture]


def run_inpaint(context: Context, args: argparse.Namespace) -> tuple[Tensor, list[Tensor]]:
    """A picture painted anew where a mask is white; returns the results, the picture, and the picture without that."""
    if args.jump_length < 1 or args.resamples < 1:
        raise UserError("--jump_length and --resamples are 1 or more")
    picture = read_picture(args.picture, context.model.shape)
    mask = read_mask(args.mask, args.picture, context.model.shape)
    x0 = context.repeated(picture)
    xT = context.start(context.draw_noise(), context.labels[0])
    x = inpaint(context.sampler, context.denoiser(), xT, x0, mask.to(x0.device), context.ts, context.alpha_bar,
                context.draw_noise, args.jump_length, args.resamples)
    hole = torch.where(mask > 0, torch.tensor(127, dtype=torch.uint8), picture)
    return x, [picture, hole]


COMMANDS = {"interpolate": run_interpolate, "vary": run_vary, "inpaint": run_inpaint}
OPTIONS = ("device", "precision", "sampler", "steps", "spacing", "eta", "clip_x0", "guidance_scale",
           "guidance_interval")
OPTIONS_OF = {"interpolate": (*OPTIONS, "start"), "vary": (*OPTIONS, "seed"), "inpaint": (*OPTIONS, "seed", "start")}


@torch.no_grad()
def edit(args: argparse.Namespace) -> str:
    """Do what the command line asks for; returns what to say of it. Raises UserError."""
    given = {name: getattr(args, name) for name in OPTIONS_OF[args.command] if getattr(args, name) is not None}
    folder = Path(args.save_dir) if args.save_dir else diffuser.free_path(Path("samples", f"edit_{args.command}_"))
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty: give another --save_dir")
    saved = diffuser.load_checkpoint(args.checkpoint, peek=True)["config"]
    if args.command == "inpaint":                                            # RePaint is ancestral sampling
        given = dict(sampler="ddpm", steps=min(50, saved["timesteps"])) | given
    model = diffuser.load(args.checkpoint, **given)
    numbers = diffuser.parse_classes(args.classes, model.class_names) if args.classes else []
    most = 2 if args.command == "interpolate" else 1
    if len(numbers) > most:
        raise UserError(f"--classes: {args.command} takes at most {most}")
    if not 1 <= args.num_images <= 100:                                      # they are drawn in one batch
        raise UserError("--num_images lies between 1 and 100")
    x, sources = COMMANDS[args.command](Context(model, numbers, args.num_images), args)
    images = diffuser.to_uint8(x)
    for i, image in enumerate(images):
        (folder / "images").mkdir(parents=True, exist_ok=True)
        diffuser.to_pil(image).save(folder / "images" / f"{i:06}.png")
    shown = torch.cat([*sources, images])
    diffuser.save_grid(shown, folder / "grid.png", [], columns=min(10, len(shown)))
    diffuser.write_json(folder / "edit.json", vars(args))
    return f"{len(images)} images in {folder / 'images'}, grid {folder / 'grid.png'}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("edit.py", description=__doc__.partition("\n")[0], allow_abbrev=False,
                                     epilog=__doc__.partition("\n")[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command, about in COMMANDS.items():
        sub = commands.add_parser(command, help=about.__doc__.partition(";")[0], allow_abbrev=False)
        if command == "interpolate":
            sub.add_argument("--seeds", default="0,1", help="the two images to go between [0,1]")
        else:
            sub.add_argument("picture")
        if command == "vary":
            sub.add_argument("--strength", type=float, default=0.5, help="near 0: the picture, 1: nothing of it [0.5]")
        if command == "inpaint":
            sub.add_argument("mask", help="a picture of the same size: white is painted anew, black stays")
            sub.add_argument("--jump_length", type=int, default=5, help="steps that are undone at a time [5]")
            sub.add_argument("--resamples", type=int, default=5, help="how often steps are taken in all [5]")
        number = "one class or two" if command == "interpolate" else "the class"
        sub.add_argument("--classes", default="", help=f"{number} to draw, by name or number")
        sub.add_argument("--num_images", type=int, default=8, help="how many [8]")
        sub.add_argument("--save_dir", default="", help="where to: an empty folder or a new one")
        for name in OPTIONS_OF[command]:
            sub.add_argument(f"--{name}", type=partial(diffuser.parse_value, name), help="as for diffuser.py")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        print(edit(build_parser().parse_args(argv)))
        return 0
    except (UserError, OSError) as error:
        print(f"edit: {error}", file=sys.stderr)
        return getattr(error, "code", 1)
    except KeyboardInterrupt:
        print("\nedit: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
