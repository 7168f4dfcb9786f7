"""Optional trackers of a training run: TensorBoard and Weights & Biases.

Each is a function (step, {name: number or path of a picture}); diffuser.py imports this file when one is
asked for. `cfg` is a diffuser.Config, `folder` the run's folder, `run_id` stays the same when it is resumed.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def tensorboard_tracker(cfg, folder: Path, run_id: str) -> Callable[[int, dict], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def track(step: int, values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, Path):
                writer.add_image(name, np.asarray(Image.open(value).convert("RGB")), step, dataformats="HWC")
            else:
                writer.add_scalar(name, value, step)
        writer.flush()

    return track


def wandb_tracker(cfg, folder: Path, run_id: str) -> Callable[[int, dict], None]:
    import wandb

    run = wandb.init(project=cfg.project_name, name=cfg.experiment_name or folder.name, id=run_id, resume="allow",
                     config=dataclasses.asdict(cfg), dir=str(folder), reinit=True)
    return lambda step, values: run.log({name: wandb.Image(str(v)) if isinstance(v, Path) else v
                                         for name, v in values.items()}, step=step)


def start_trackers(cfg, folder: Path, run_id: str) -> dict[str, Callable[[int, dict], None]]:
    """The trackers asked for: functions of (step, {name: number or path of a picture}). One that cannot
    start is reported, and training goes on without it."""
    trackers = {}
    for name, wanted, start in (("tensorboard", cfg.use_tensorboard, tensorboard_tracker),
                                ("wandb", cfg.use_wandb, wandb_tracker)):
        try:
            if wanted:
                trackers[name] = start(cfg, folder, run_id)
        except Exception as error:                                           # a tracker never stops a run
            hint = f"pip install {name}" if isinstance(error, ImportError) else str(error)
            print(f"no {name}: {hint}; training goes on without it", file=sys.stderr)
    return trackers
