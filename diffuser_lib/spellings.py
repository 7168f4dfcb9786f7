"""What other programs call things: the flags of theirs whose value or unit differs from ours, and those we lack.

They are those of diffusers' train_unconditional.py, of lucidrains' denoising-diffusion-pytorch, and of EDM's train.py
and generate.py. Flags that are only spelt otherwise are aliases where the option itself stands.

FOREIGN_FLAGS       flag -> how it is translated
NO_COUNTERPART      flag -> what to do instead
translate_flags     the options of a command line in our terms

Needs the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from diffuser_lib.files import UserError


@dataclass(frozen=True)
class ForeignFlag:
    """A flag of another program, and what it means here.

    translate: (its text, all that is given: options by name, other foreign flags as text) -> options by name, as text
    or as values. It raises UserError for what has no counterpart.
    """

    help: str
    translate: Callable[[str, dict], dict]
    metavar: str = "NAME"
    value_if_bare: str | None = None                             # of a switch: its text where none follows


def output_folders(text: str, given: dict) -> dict:
    """One folder for all that a run leaves."""
    return dict(working_directory=text, generated_directory=text)


def edm_outdir(text: str, given: dict) -> dict:
    """train.py puts runs there, generate.py pictures."""
    if given.get("mode") == "inference":
        return dict(save_dir=text)
    return output_folders(text, given)


def edm_batch(text: str, given: dict) -> dict:
    """train.py means the images of a step, generate.py those drawn at a time."""
    name = "sample_batch_size" if given.get("mode") == "inference" else "batch_size"
    return {name: text}


def steps_for_images(images: float, given: dict) -> int:
    """Steps that see so many images. Raises UserError where the images of a step are not given."""
    if "batch_size" not in given:
        raise UserError("counts images, which become steps by --batch_size: give it, too")
    return max(1, math.ceil(images / (given["batch_size"] * given.get("gradient_accumulation_steps", 1))))


def parse_positive(text: str) -> float:
    """A number above 0. Raises UserError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError("wants a number above 0")
    return number


def edm_duration(text: str, given: dict) -> dict:
    """Millions of images."""
    return dict(iterations=steps_for_images(1e6 * parse_positive(text), given))


def edm_tick(text: str, given: dict) -> dict:
    """Thousands of images between lines of progress."""
    return dict(log_every=steps_for_images(1e3 * parse_positive(text), given))


def edm_snap(text: str, given: dict) -> dict:
    """Ticks between snapshots; a tick is 50 thousand images unless --tick says otherwise."""
    images = 1e3 * parse_positive(given.get("tick", "50")) * parse_positive(text)
    return dict(checkpoint_rate=steps_for_images(images, given))


def edm_ema(text: str, given: dict) -> dict:
    """Half-life in millions of images; 0 for none."""
    if text.strip() == "0":
        return dict(use_ema=False)
    return dict(ema_halflife=1e6 * parse_positive(text))


def adam_beta(place: int) -> Callable[[str, dict], dict]:
    """The translation of one of Adam's two decays."""
    def translate(text: str, given: dict) -> dict:
        betas = [str(beta) for beta in given.get("adam_betas", (0.9, 0.999))]
        betas[place] = text
        return dict(adam_betas=",".join(betas))

    return translate


BOOLEANS = {"true": True, "yes": True, "y": True, "on": True, "1": True,
            "false": False, "no": False, "n": False, "off": False, "0": False}


def is_switched_on(text: str) -> bool:
    """The value of a switch. Raises UserError."""
    if text.strip().lower() not in BOOLEANS:
        raise UserError("wants True or False")
    return BOOLEANS[text.strip().lower()]


def half_precision(text: str, given: dict) -> dict:
    """A switch between float16 and float32."""
    return dict(precision="fp16" if is_switched_on(text) else "fp32")


def trackers(text: str, given: dict) -> dict:
    """The tracker of that name."""
    known = {"tensorboard": dict(use_tensorboard=True), "wandb": dict(use_wandb=True),
             "all": dict(use_tensorboard=True, use_wandb=True), "none": {}}
    if text not in known:
        raise UserError("wants tensorboard, wandb, all or none")
    return known[text]


def diffusers_lr_scheduler(text: str, given: dict) -> dict:
    """diffusers' constant has no warm-up, its restarts are one cycle unless --lr_num_cycles says otherwise."""
    if text == "cosine_with_restarts":
        return dict(lr_schedule=text, lr_cycles=given.get("lr_cycles") or 1)
    if text == "constant":
        return dict(lr_schedule="constant", warmup_steps=0)
    if text == "constant_with_warmup":
        return dict(lr_schedule="constant")
    return dict(lr_schedule=text)


def diffusers_beta_schedule(text: str, given: dict) -> dict:
    """diffusers calls the curve of GeoDiff sigmoid."""
    return dict(schedule_type="geodiff" if text == "sigmoid" else text)


def lucidrains_beta_schedule(text: str, given: dict) -> dict:
    """lucidrains' linear betas are scaled to T."""
    options = dict(schedule_type=text)
    if text == "linear":
        options["scale_betas"] = True
    return options


def diffusers_center_crop(text: str, given: dict) -> dict:
    """The middle of each image instead of a crop at random."""
    return dict(random_crop=not is_switched_on(text))


def nothing_to_do(text: str, given: dict) -> dict:
    """It is so anyway. Raises UserError where it is switched off."""
    if not is_switched_on(text):
        raise UserError("cannot be switched off here")
    return {}


# In this order: what counts images needs --batch.
FOREIGN_FLAGS = {
    "batch": ForeignFlag("--batch_size; when drawing --sample_batch_size (EDM)", edm_batch, "N"),
    "duration": ForeignFlag("millions of images to train on: --iterations (EDM)", edm_duration, "X"),
    "tick": ForeignFlag("thousands of images: --log_every (EDM)", edm_tick, "N"),
    "snap": ForeignFlag("ticks of 50 thousand images or as --tick says: --checkpoint_rate (EDM)", edm_snap, "N"),
    "outdir": ForeignFlag("as --output_dir; when drawing --save_dir (EDM)", edm_outdir, "PATH"),
    "output_dir": ForeignFlag("--working_directory and --generated_directory (diffusers)", output_folders, "PATH"),
    "results_folder": ForeignFlag("the same (denoising-diffusion-pytorch)", output_folders, "PATH"),
    "ema": ForeignFlag("millions of images: --ema_halflife (EDM)", edm_ema, "X"),
    "adam_beta1": ForeignFlag("the first of --adam_betas (diffusers)", adam_beta(0), "X"),
    "adam_beta2": ForeignFlag("the second of --adam_betas (diffusers)", adam_beta(1), "X"),
    "fp16": ForeignFlag("--precision fp16, or fp32 where False (EDM)", half_precision, "BOOL", "True"),
    "amp": ForeignFlag("the same (denoising-diffusion-pytorch)", half_precision, "BOOL", "True"),
    "logger": ForeignFlag("--use_tensorboard, --use_wandb (diffusers)", trackers, "{tensorboard,wandb}"),
    "report_to": ForeignFlag("the same, or all (diffusers)", trackers),
    "lr_scheduler": ForeignFlag(
        "--lr_schedule; constant is without warm-up, cosine_with_restarts one cycle (diffusers)",
        diffusers_lr_scheduler),
    "ddpm_beta_schedule": ForeignFlag(
        "--schedule_type; sigmoid is geodiff (diffusers)", diffusers_beta_schedule),
    "beta_schedule": ForeignFlag(
        "--schedule_type; linear is with --scale_betas (denoising-diffusion-pytorch)", lucidrains_beta_schedule),
    "center_crop": ForeignFlag("not --random_crop (diffusers)", diffusers_center_crop, "BOOL", "True"),
    "enable_xformers_memory_efficient_attention": ForeignFlag(
        "done anyway, by torch (diffusers)", nothing_to_do, "BOOL", "True"),
}

# Those of their flags that have no counterpart, and what to do instead.
NO_COUNTERPART = {}
for _names, _advice in (
        ("dataset_name dataset_config_name",
         "datasets of the Hugging Face Hub are --path_to_data hf:OWNER/NAME here, or hf:OWNER/NAME:CONFIG"),
        ("push_to_hub hub_token hub_model_id hub_private_repo",
         "leave it out; afterwards python convert.py to-diffusers CKPT DIR makes a folder for the Hub"),
        ("logging_dir", "leave it out: trackers write into the run's folder below --generated_directory"),
        ("overwrite_output_dir", "leave it out; --resume never starts over"),
        ("eval_batch_size", "--num_generations is how many images a grid shows of each class, or in all"),
        ("adam_epsilon", "leave it out: it is 1e-8"),
        ("ema_inv_gamma ema_power",
         "leave it out: the average's decay after n updates is (1 + n) / (10 + n), at most --ema_decay"),
        ("num_samples", "--num_images is how many are drawn, --num_generations how many a grid shows in training"),
        ("mixed_precision_type", "--precision says fp16 or bf16"),
        ("min_snr_loss_weight", "--min_snr_gamma 5 switches it on"),
        ("calculate_fid", "leave it out; python evaluate.py measures drawn images"),
        ("arch precond", "--base_channels, --channel_mults and others set the network, --prediction its output"),
        ("augment", "leave it out; --flip mirrors, --random_crop shifts"),
        ("batch_gpu", "leave it out: a step that does not fit into memory is computed in parts"),
        ("ls bench cache", "leave it out: it is seen to"),
        ("desc nosubdir", "leave it out; --experiment_name names a run"),
        ("dump", "leave it out: a run goes on from any checkpoint; --checkpoint_rate says how often there is one"),
        ("subdirs", "leave it out: images go into one folder"),
        ("sigma_min sigma_max rho disc scaling",
         "leave it out: the noise levels are those of the model's schedule; --spacing picks among them"),
        ("S_churn S_min S_max S_noise", "leave it out; --sampler ddim --eta adds noise on the way")):
    NO_COUNTERPART.update(dict.fromkeys(_names.split(), _advice))


def translate_flags(given: dict, parse: Callable[[str, str], object]) -> dict:
    """Options as they are given on the command line, foreign ones in the terms of this program.

    parse: (option, text) -> value. Raises UserError.
    """
    given = dict(given)
    for name in NO_COUNTERPART:
        if name in given:
            raise UserError(f"--{name} is of another program: {NO_COUNTERPART[name]}")
    for name, flag in FOREIGN_FLAGS.items():
        if name not in given:
            continue
        try:
            options = flag.translate(given[name], given)
            given |= {key: parse(key, value) if isinstance(value, str) else value for key, value in options.items()}
        except UserError as error:
            raise UserError(f"--{name} {given[name]}: {error}") from None
    return {name: value for name, value in given.items() if name not in FOREIGN_FLAGS}
