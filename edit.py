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

# signal itself imports others first, and Ctrl-C would print a traceback there.
import _signal

if __name__ == "__main__" and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)              # Ctrl-C while torch is imported: no traceback

import argparse
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import diffuser
from diffuser_lib.files import (
    Parser,
    UserError,
    add_debug,
    end_process,
    first_line,
    run_script,
    unused_path,
)
from diffuser_lib.images import (
    DecodedImages,
    PictureFolder,
    Shape,
    from_uint8,
    open_image,
    save_grid,
    save_png,
    to_uint8,
    upright_size,
)

# ---- The edits ---------------------------------------------------------------------------------
# Pure functions over the samplers of diffuser.py.
# alpha_bar: float64 [T]; ts: descending timesteps; images: [N, C, H, W] in [-1, 1]; draw_noise(): N(0, 1) [N, C, H, W].

Sampler = Callable[..., Iterator[tuple[int, Tensor, Tensor]]]    # yields (t, x, x0_hat) after each step


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Spherical interpolation, a at weight 0 and b at 1: between two noises the length stays that of noise.

    Shoemake 1985; DDIM, 2010.02502, eq. 67.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1)).item()
    if math.sin(angle) < 1e-4:                                   # on one line: there is no arc
        return (1 - weight) * a + weight * b
    return (math.sin((1 - weight) * angle) * a + math.sin(weight * angle) * b) / math.sin(angle)


def blend_denoisers(first: diffuser.Denoiser, second: diffuser.Denoiser, weights: Tensor) -> diffuser.Denoiser:
    """The denoiser whose estimates go from the first one's to the second one's, by weights [N] in 0..1."""
    weights = weights.view(-1, 1, 1, 1)

    def denoise(xt: Tensor, t: int) -> tuple[Tensor, Tensor]:
        first_x0, first_eps = first(xt, t)
        second_x0, second_eps = second(xt, t)
        return torch.lerp(first_x0, second_x0, weights), torch.lerp(first_eps, second_eps, weights)

    return denoise


def add_noise(x: Tensor, level: float, wanted: float, noise: Tensor) -> Tensor:
    """x at the alpha_bar `level` taken on to `wanted`, which is no larger (DDPM, eq. 2, over many steps)."""
    kept = wanted / level
    return math.sqrt(kept) * x + math.sqrt(1 - kept) * noise


def vary(sampler: Sampler, denoise: diffuser.Denoiser, picture: Tensor, strength: float, ts: list[int],
         alpha_bar: Tensor, draw_noise: Callable[[], Tensor]) -> Tensor:
    """Noise up to the part `strength` of all timesteps, then drawing from there (SDEdit, 2108.01073, algorithm 1)."""
    limit = strength * len(alpha_bar)
    remaining = [t for t in ts if t < limit]
    if not remaining:
        remaining = ts[-1:]

    xt = add_noise(picture, 1.0, alpha_bar[remaining[0]].item(), draw_noise())
    *_, (_, x, _) = sampler(denoise, xt, remaining, alpha_bar, draw_noise)
    return x


def repaint_schedule(steps: int, jump_length: int, resamples: int) -> Iterator[int]:
    """Steps left after each move of RePaint, from steps - 1 to 0 (2201.09865, sec. 4.2).

    One down at a time, but every jump_length steps the last jump_length ones are undone and taken again, until they
    were taken `resamples` times.
    """
    jump_points = range(1, steps - jump_length + 1, jump_length)
    jumps_left = dict.fromkeys(jump_points, resamples - 1)

    left = steps
    while left > 0:
        left -= 1
        yield left
        if jumps_left.get(left, 0) == 0:
            continue

        jumps_left[left] -= 1
        for _ in range(jump_length):
            left += 1
            yield left


def inpaint(sampler: Sampler, denoise: diffuser.Denoiser, xT: Tensor, picture: Tensor, mask: Tensor, ts: list[int],
            alpha_bar: Tensor, draw_noise: Callable[[], Tensor], jump_length: int = 5, resamples: int = 5) -> Tensor:
    """The picture with what the mask [1, 1, H, W] has at 1 painted anew (RePaint, 2201.09865, algorithm 1).

    After each step the known part is put in, as noisy as the rest; steps are undone and repeated so that both come to
    agree.
    """
    # alpha_bar by the number of steps left.
    levels = [1.0, *(alpha_bar[t].item() for t in reversed(ts))]

    x = xT
    left = len(ts)
    for after in repaint_schedule(len(ts), jump_length, resamples):
        # Undo a step.
        if after > left:
            x = add_noise(x, levels[left], levels[after], draw_noise())
            left = after
            continue

        # Take a step, then put in what is known.
        done = len(ts) - left
        _, x, _ = next(sampler(denoise, x, ts[done : done + 2], alpha_bar, draw_noise))
        known = picture
        if after > 0:
            known = add_noise(picture, 1.0, levels[after], draw_noise())
        x = mask * x + (1 - mask) * known
        left = after
    return x


# ---- Pictures ----------------------------------------------------------------------------------


def read_picture(path: str, shape: Shape, background: str = "white") -> Tensor:
    """A picture, cropped to the middle and resized to shape (C, H, W): uint8 [1, C, H, W].

    background: the colour behind what is transparent. Raises UserError.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such picture")

    try:
        decoded = DecodedImages([(open_image(path), 0)], shape, background)[0]
    except Exception as error:                                   # Pillow raises many kinds
        decoded = first_line(error)
    if isinstance(decoded, str):                                 # the reason
        raise UserError(f"{path} cannot be read as a picture ({decoded})")

    pixels, _ = decoded
    return torch.from_numpy(pixels)[None]


def read_mask(path: str, picture: str, shape: Shape) -> Tensor:
    """A mask for the picture, float [1, 1, H, W]: 1 where it is white, 0 where transparent. Raises UserError."""
    _, height, width = shape
    mask = (read_picture(path, (1, height, width), "black") > 127).float()

    mask_width, mask_height = upright_size(open_image(path))
    picture_width, picture_height = upright_size(open_image(picture))
    if (mask_width, mask_height) != (picture_width, picture_height):
        raise UserError(f"the mask is {mask_width}x{mask_height}, the picture {picture_width}x{picture_height}: "
                        "make them alike")

    if mask.min() == mask.max():
        colour = "white" if mask.max() > 0 else "black"
        raise UserError(f"{path} is all {colour} at the model's size: white is painted anew, black stays")
    return mask


# ---- Commands ----------------------------------------------------------------------------------


class EditContext:
    """What every command works with: the model, and the sampler, labels and noise for the images of one edit.

    model: its config holds the settings of drawing; classes: numbers of the classes to draw, may be empty; count: how
    many images.
    """

    def __init__(self, model: diffuser.Model, classes: list[int], count: int):
        self.model = model
        self.cfg = model.config
        self.count = count
        self.numbers = [str(i) for i in range(count)]            # as in the names of the files

        self.alpha_bar = model.diffusion.alpha_bar               # float64 [T]
        self.ts = diffuser.sampling_grid(self.cfg, self.alpha_bar)
        self.sampler = diffuser.build_sampler(self.cfg)

        null_class = len(model.class_names)
        self.labels = [self.same_label(number) for number in classes or [null_class]]      # int64 [count] each
        self.draw_noise = self.noise_source(self.cfg.seed, range(count))

    def same_label(self, number: int) -> Tensor:
        """A class for all images, int64 [count]."""
        return torch.full((self.count,), number, device=self.model.device)

    def noise_source(self, seed: int, images: range) -> Callable[[], Tensor]:
        """What draws the noise [N, C, H, W] of the images with these numbers."""
        return diffuser.image_noise(seed, images, self.model.shape, self.model.device)

    def denoiser(self, labels: Tensor) -> diffuser.Denoiser:
        """What the sampler sees of the network, for labels [count]."""
        return self.model.denoiser(labels, self.cfg)

    def start(self, noise: Tensor, labels: Tensor) -> Tensor:
        """xT for noise [count, C, H, W] and labels [count]."""
        return self.model.sample_prior(noise, labels, self.cfg, self.ts[0])

    def repeat_picture(self, picture: Tensor) -> Tensor:
        """A picture, uint8 [1, C, H, W], once for each image: float [count, C, H, W] in [-1, 1]."""
        return from_uint8(picture).to(self.model.device).repeat(self.count, 1, 1, 1)


def require_deterministic(cfg: diffuser.Config) -> None:
    """Raise UserError for a sampler that adds noise: two seeds then name no two images to go between."""
    sampler = diffuser.SAMPLERS[cfg.sampler]
    if sampler.adds_noise(diffuser.sampler_options(cfg)):
        raise UserError("interpolate wants a sampler that adds no noise: --sampler dpmpp, heun or ddim, --eta 0")


def parse_seed_pair(text: str) -> tuple[int, int]:
    """Two seeds, written 1,2. Raises UserError."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        seeds = []
    if len(seeds) != 2 or min(seeds) < 0:
        raise UserError(f"--seeds wants two whole numbers of 0 or more, such as 1,2, not {text!r}")
    return seeds[0], seeds[1]


@dataclass(frozen=True)
class Plan:
    """What a command is going to make, with all that it needs read and checked.

    draw: makes the images, [N, C, H, W] in [-1, 1]; headings: one for each of them; sources: what they are made from,
    uint8 [1, C, H, W] each, by what it is called.
    """

    draw: Callable[[], Tensor]
    headings: list[str]
    sources: dict[str, Tensor]


def plan_interpolate(context: EditContext, args: argparse.Namespace) -> Plan:
    """Images on the way from one seed's to another's, and from one class to another where two are given.

    Raises UserError.
    """
    require_deterministic(context.cfg)
    first_seed, second_seed = parse_seed_pair(args.seeds)
    first_noise = context.noise_source(first_seed, range(1))()[0]                          # [C, H, W]
    second_noise = context.noise_source(second_seed, range(1))()[0]

    weights = torch.linspace(0, 1, context.count, device=context.model.device)
    noise = torch.stack([slerp(first_noise, second_noise, weight) for weight in weights.tolist()])
    first_labels = context.labels[0]
    denoise = context.denoiser(first_labels)
    xT = context.start(noise, first_labels)

    # From class to class: blend what the network says for either, and where drawing starts.
    if len(context.labels) > 1:
        second_labels = context.labels[1]
        denoise = blend_denoisers(denoise, context.denoiser(second_labels), weights)
        xT = torch.lerp(xT, context.start(noise, second_labels), weights.view(-1, 1, 1, 1))

    def draw() -> Tensor:
        *_, (_, x, _) = context.sampler(denoise, xT, context.ts, context.alpha_bar, context.draw_noise)
        return x

    headings = [f"{weight:.2g}" for weight in weights.tolist()]
    headings[-1] = f"seed {second_seed}"
    headings[0] = f"seed {first_seed}"                           # one image alone is the first
    return Plan(draw, headings, {})


def plan_vary(context: EditContext, args: argparse.Namespace) -> Plan:
    """Variations of a picture. Raises UserError."""
    picture = read_picture(args.picture, context.model.shape)
    x0 = context.repeat_picture(picture)
    denoise = context.denoiser(context.labels[0])
    draw = partial(vary, context.sampler, denoise, x0, args.strength, context.ts, context.alpha_bar, context.draw_noise)
    return Plan(draw, context.numbers, {"original": picture})


def plan_inpaint(context: EditContext, args: argparse.Namespace) -> Plan:
    """A picture painted anew where a mask is white. Raises UserError."""
    picture = read_picture(args.picture, context.model.shape)
    mask = read_mask(args.mask, args.picture, context.model.shape)
    x0 = context.repeat_picture(picture)
    labels = context.labels[0]
    xT = context.start(context.draw_noise(), labels)
    draw = partial(inpaint, context.sampler, context.denoiser(labels), xT, x0, mask.to(x0.device), context.ts,
                   context.alpha_bar, context.draw_noise, args.jump_length, args.resamples)

    grey = torch.tensor(127, dtype=torch.uint8)
    hole = torch.where(mask > 0, grey, picture)
    return Plan(draw, context.numbers, {"original": picture, "known part": hole})


@dataclass(frozen=True)
class Command:
    """A command: its plan, what --help says of it, the options of diffuser.py and the pictures that it takes."""

    plan: Callable[[EditContext, argparse.Namespace], Plan]
    help: str
    options: tuple[str, ...]
    max_classes: int = 1
    pictures: str = ""


SHARED_OPTIONS = ("device", "precision", "sampler", "steps", "spacing", "eta", "clip_x0", "guidance_scale",
                  "guidance_interval")

COMMANDS = {
    "interpolate": Command(plan_interpolate, "images on the way from one seed's to another's",
                           options=(*SHARED_OPTIONS, "start"), max_classes=2),
    "vary": Command(plan_vary, "variations of a picture", options=(*SHARED_OPTIONS, "seed"),
                    pictures="PICTURE "),
    "inpaint": Command(plan_inpaint, "a picture painted anew where a mask is white",
                       options=(*SHARED_OPTIONS, "seed", "start"), pictures="PICTURE MASK "),
}


def check(args: argparse.Namespace) -> None:
    """Raise UserError for what is wrong whatever the model is: reading that takes its time."""
    if not 1 <= args.num_images <= 100:                          # they are drawn in one batch
        raise UserError("--num_images lies between 1 and 100")
    if args.command == "interpolate":
        parse_seed_pair(args.seeds)
    if args.command == "vary" and not 0 < args.strength <= 1:
        raise UserError(f"--strength is above 0 and at most 1, not {args.strength:g}")
    if args.command == "inpaint" and (args.jump_length < 1 or args.resamples < 1):
        raise UserError("--jump_length and --resamples are 1 or more")
    for name in COMMANDS[args.command].pictures.lower().split():
        read_picture(getattr(args, name), (3, 8, 8))


def choose_folder(args: argparse.Namespace) -> Path:
    """Where the images go. Raises UserError where something is there that is no edit's."""
    if not args.save_dir:
        return unused_path(Path("samples"), f"edit_{args.command}_")
    folder = Path(args.save_dir)
    if folder.exists() and not (folder / "edit.json").exists():
        # What is left of an edit that a full disk broke off at once counts as nothing.
        others = [path for path in folder.iterdir() if path.name not in ("images", ".images.lock")]
        if others or any(folder.glob("images/*")):
            raise UserError(f"{folder} is not empty: give another --save_dir")
    return folder


def usual_settings(command: str, timesteps: int) -> dict:
    """How a command draws where nothing else is asked for; other settings are the checkpoint's. timesteps: T."""
    if command == "inpaint":                                     # RePaint is ancestral sampling
        return dict(sampler="ddpm", steps=min(50, timesteps))
    return {}


def edit_request(record: dict) -> dict:
    """What two edit.json have in common where they ask for the same images: of files their content, not their names."""
    return {name: value for name, value in record.items() if name not in ("checkpoint", "save_dir", "picture", "mask")}


def load_model(args: argparse.Namespace) -> tuple[diffuser.Model, dict]:
    """The model in the checkpoint, to draw as the command line asks for, and what names it. Raises UserError."""
    overrides = {}
    for name in COMMANDS[args.command].options:
        value = getattr(args, name)
        if value is not None:
            overrides[name] = value

    state, source = diffuser.load_with_digest(Path(args.checkpoint))
    saved = state["config"]
    settings = usual_settings(args.command, saved["timesteps"]) | overrides
    model = diffuser.build_model(state, diffuser.configure(saved, **dict(device="auto") | settings))

    # A flag that the sampler does not take is refused, as in diffuser.py.
    diffuser.check_sampler_options(overrides, model.config)
    return model, source


@torch.no_grad()
def edit(args: argparse.Namespace) -> str:
    """Do what the command line asks for; returns what to say of it. Raises UserError, OSError."""
    check(args)
    command = COMMANDS[args.command]
    folder = choose_folder(args)
    model, source = load_model(args)

    classes = []
    if args.classes:
        classes = diffuser.parse_classes(args.classes, model.class_names)
    if len(classes) > command.max_classes:
        raise UserError(f"--classes: {args.command} takes at most {command.max_classes}")
    plan = command.plan(EditContext(model, classes, args.num_images), args)

    settings = {name: value for name, value in vars(args).items() if name != "debug"}
    for name in ("picture", "mask"):
        if name in settings:
            settings[f"{name}_sha256"] = hashlib.sha256(Path(settings[name]).read_bytes()).hexdigest()
    pictures = PictureFolder(folder, "edit.json", settings | source, edit_request, name=lambda i: f"{i:06}.png",
                             count=args.num_images, shape=model.shape, last="grid.png")
    again = "the same command" if args.save_dir else f"the same command with --save_dir {folder}"
    with pictures.hold(f".\nOnce that is fixed, {again} goes on with the rest"):
        images = to_uint8(plan.draw())
        for i in pictures.missing():
            save_png(images[i], pictures.path(i))
        shown = torch.cat([*plan.sources.values(), images])
        headings = [*plan.sources, *plan.headings]
        save_grid(shown, folder / "grid.png", headings, columns=min(10, len(shown)))
    return f"{len(images)} images in {folder / 'images'}, grid {folder / 'grid.png'}"


# ---- Command line ------------------------------------------------------------------------------


def build_parser() -> Parser:
    parser = Parser("edit.py", usage="python edit.py CKPT COMMAND [options]", doc=__doc__)
    add_debug(parser)
    parser.add_argument("checkpoint")

    # --debug may stand behind the command, too; where it does not, it leaves alone what stood before.
    debug = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    add_debug(debug)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    subparsers = {}
    for name, command in COMMANDS.items():
        usage = f"python edit.py CKPT {name} {command.pictures}[options]"
        subparsers[name] = commands.add_parser(name, usage=usage, help=command.help, parents=[debug])

    interpolate = subparsers["interpolate"]
    interpolate.add_argument("--seeds", default="0,1", metavar="N,N", help="the two images to go between [0,1]")

    vary = subparsers["vary"]
    vary.add_argument("picture")
    vary.add_argument("--strength", type=float, default=0.5, help="near 0: the picture, 1: nothing of it [0.5]")

    inpaint = subparsers["inpaint"]
    inpaint.add_argument("picture")
    inpaint.add_argument("mask", help="a picture of the same size: white is painted anew, black stays")
    inpaint.add_argument("--jump_length", type=int, default=5, help="steps that are undone at a time [5]")
    inpaint.add_argument("--resamples", type=int, default=5, help="how often steps are taken in all [5]")

    for name, command in COMMANDS.items():
        add_drawing_options(subparsers[name], command)
    return parser


def add_drawing_options(parser: argparse.ArgumentParser, command: Command) -> None:
    """The flags that all commands have, and those of diffuser.py that this one takes."""
    number = "one class or two" if command.max_classes == 2 else "the class"
    parser.add_argument("--classes", default="", help=f"{number} to draw, by name or number")
    parser.add_argument("--num_images", type=int, default=8, help="how many [8]")
    parser.add_argument("--save_dir", default="", metavar="PATH", help="where to: an empty folder or a new one")
    for option in command.options:
        parser.add_argument(f"--{option}", type=partial(diffuser.parse_value, option), metavar=diffuser.metavar(option),
                            help="as for diffuser.py")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_script("edit", lambda: build_parser().parse_args(argv), lambda args: print(edit(args)),
                      partial(diffuser.explain, remedy="lower --num_images"))


if __name__ == "__main__":
    end_process(main)
