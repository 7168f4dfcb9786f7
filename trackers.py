"""Optional trackers of a training run: TensorBoard and Weights & Biases.

diffuser.py imports this file when one is asked for. Each tracker is a class with log(step, {name: number or path of a
picture}) and finish({name: number}), the last numbers of the run. Whoever calls them expects any error: a tracker
never stops a run. Keys are the libraries' own affair (wandb login); none passes through here.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image


class TensorBoard:
    """Event files in the folder's tensorboard/. cfg: a diffuser.Config; folder: the run's; run_id: the same when it is
    resumed; step: where it goes on."""

    def __init__(self, cfg, folder: Path, run_id: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.cfg, again = cfg, step + 1 if step else None                    # what is trained again is shown once
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=again)

    def log(self, step: int, values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, Path):
                with Image.open(value) as picture:
                    self.writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
            else:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, final: dict) -> None:
        options = {name: value if isinstance(value, (bool, int, float, str)) else str(value)
                   for name, value in dataclasses.asdict(self.cfg).items()}
        self.writer.add_hparams(options, {f"final/{name}": value for name, value in final.items()}, run_name=".")
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases under the run's own id, so that a resumed one goes on. Without a known key, or with
    --wandb_mode offline, it stays in the folder's wandb/ until `wandb sync`. Arguments: as for TensorBoard."""

    def __init__(self, cfg, folder: Path, run_id: str, step: int):
        import wandb

        mode = cfg.wandb_mode if cfg.wandb_mode != "auto" else os.environ.get("WANDB_MODE", "")
        if not mode and not wandb.login(prompt=False):                       # nobody may be there to answer
            mode = "offline"
            print("wandb: no key is known (wandb login): the run is kept for `wandb sync`", file=sys.stderr)
        settings = wandb.Settings(console="off", silent=True)                # it would write what we print to its files
        self.picture = wandb.Image
        self.run = wandb.init(project=cfg.project_name, name=cfg.experiment_name or folder.name, id=run_id,
                              resume="allow", config=dataclasses.asdict(cfg), dir=str(folder), mode=mode or None,
                              settings=settings)
        self.run.define_metric("step")                                       # its own count of steps never goes back
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict) -> None:
        self.run.log({"step": step, **{name: self.picture(str(v)) if isinstance(v, Path) else v
                                       for name, v in values.items()}})

    def finish(self, final: dict) -> None:
        self.run.summary.update({f"final/{name}": value for name, value in final.items()})
        self.run.finish()


def machine_load() -> dict[str, float]:
    """What the machine is doing, where it can be read: percent of all CPUs, GiB of memory of this process, GiB of GPU
    memory taken by it, percent of the GPU. psutil and nvidia-ml-py are optional."""
    load = {}
    with suppress(Exception):                                                # not there, or kept from looking
        import psutil

        load["machine/cpu_percent"] = psutil.cpu_percent()                   # since the call before
        load["machine/memory_gib"] = psutil.Process().memory_info().rss / 2**30
    if torch.cuda.is_available():
        load["machine/gpu_memory_gib"] = torch.cuda.memory_reserved() / 2**30
        with suppress(Exception):                                            # no nvidia-ml-py, or a driver without it
            load["machine/gpu_percent"] = float(torch.cuda.utilization())
    elif torch.backends.mps.is_available():
        load["machine/gpu_memory_gib"] = torch.mps.driver_allocated_memory() / 2**30
    return load


def start_trackers(cfg, folder: Path, run_id: str, step: int) -> dict[str, TensorBoard | WeightsAndBiases]:
    """The trackers asked for, by name. One that cannot start is reported, and training goes on without it."""
    trackers = {}
    for name, wanted, start in (("tensorboard", cfg.use_tensorboard, TensorBoard),
                                ("wandb", cfg.use_wandb, WeightsAndBiases)):
        try:
            if wanted:
                trackers[name] = start(cfg, folder, run_id, step)
        except Exception as error:
            hint = f"pip install {name}" if isinstance(error, ImportError) else str(error).strip().split("\n")[0][:200]
            print(f"no {name}: {hint}; training goes on without it", file=sys.stderr)
    if trackers:
        machine_load()                                                       # percents count from here
    return trackers
