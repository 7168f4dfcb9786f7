"""The processes of one run, as torchrun starts them, and the signals that reach them.

Processes       rank and number; barrier, wait_for_all, main_first, broadcast, broadcast_list, largest, sum_, print0
SharedBar       one progress bar over what all processes do
Signals         what asks a run to stop or to save, heard at once and acted upon between steps
Failing         speaks_first, is_lost: one message for a failure that all processes share

Needs torch and tqdm. A process alone is rank 0 of 1, and everything here is then free of cost.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

# ---- Processes ---------------------------------------------------------------------------------

PATIENCE = timedelta(hours=6)                                    # rank 0 reads and draws, the others wait
LOOK = 0.5                                                       # seconds between two looks at what others have done

# Names in the store that processes share. All come to the same places in the same order, so numbers name them.
MEETINGS = itertools.count()
COUNTS = itertools.count()


def world_size() -> int:
    """How many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Processes:
    """This process among those of the run: `rank` of `world`. Rank 0 alone writes and speaks."""

    def __init__(self, device: torch.device, backend: str):
        """Join the others. device: where numbers are exchanged; backend: of torch.distributed, nccl or gloo."""
        self.rank = int(os.environ.get("RANK", 0))
        self.world = world_size()
        self.device = device
        self.is_main = self.rank == 0
        if self.world > 1 and not dist.is_initialized():
            join(backend)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def wait_for_all(self, look: Callable[[], object]) -> None:
        """Wait for all ranks as in `barrier`, and call look() meanwhile; what it raises ends the waiting.

        Every rank has looked at least once when the waiting ends: what one tells in look(), all can know then.
        """
        if self.world == 1:
            return
        look()
        name = f"meeting {next(MEETINGS)}"
        add_to_store(name, 1)
        while add_to_store(name, 0) < self.world:
            look()
            time.sleep(LOOK)
        self.barrier()                                           # the store is needed until all have seen it

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others do, so that downloads and caches are made once."""
        if not self.is_main:
            self.barrier()
        try:
            yield
        finally:                                                 # if it failed, the others fail likewise
            if self.is_main:
                self.barrier()

    def broadcast(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        shared = torch.tensor(number, device=self.device)
        if self.world > 1:
            dist.broadcast(shared, 0)
        return int(shared)

    def broadcast_list(self, numbers: list[int]) -> list[int]:
        """Rank 0's list of numbers, on every rank."""
        shared = torch.zeros(self.broadcast(len(numbers)), dtype=torch.int64, device=self.device)
        if self.is_main:
            shared = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        if self.world > 1:
            dist.broadcast(shared, 0)
        return shared.tolist()

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers, on every rank."""
        shared = torch.tensor(number, device=self.device)
        if self.world > 1:
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def sum_(self, values: Tensor) -> Tensor:
        """Replace values by their sums over all ranks; returns them."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def print0(self, text: str) -> None:
        """Print a line, once, without breaking a progress bar. A run goes on where nobody reads it any more."""
        if self.is_main:
            with suppress(OSError):
                tqdm.write(text)


def join(backend: str) -> None:
    """Meet the other processes of the run."""
    store, rank, world = next(dist.rendezvous("env://"))
    store.set_timeout(PATIENCE)
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):         # else machines may count attempts differently
        # torchrun 2.15 keeps what dead processes wrote to the store (pytorch issue 135712).
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt_{attempt}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)


def leave() -> None:
    """Part from the other processes at the end of a run."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def add_to_store(name: str, number: int) -> int:
    """Add to a number that all processes share, at first 0; returns it. Nobody waits for anybody."""
    store = dist.distributed_c10d._get_default_store()
    return store.add(name, number)


class SharedBar:
    """One progress bar over what all processes do, which rank 0 shows. The processes tell each other twice a second.

    total: of all processes together; options: of tqdm. A context manager; made by all ranks.
    """

    def __init__(self, processes: Processes, total: int, **options):
        self.alone = processes.world == 1
        self.name = f"count {next(COUNTS)}"
        self.done = 0                                            # by all, as far as known
        self.untold = 0                                          # by this process since the last look
        self.last_look = time.perf_counter()
        hide = None if processes.is_main else True               # None: where there is no terminal
        self.bar = tqdm(total=total, disable=hide, **options)

    def update(self) -> None:
        """Count one more."""
        if self.alone:
            self.done += 1
            self.bar.update()
            return
        self.untold += 1
        if time.perf_counter() - self.last_look > LOOK:
            self.look()

    def look(self) -> None:
        """Tell the others, and show what all have done."""
        before = self.done
        self.done = add_to_store(self.name, self.untold)
        self.untold = 0
        self.last_look = time.perf_counter()
        self.bar.update(self.done - before)

    def __enter__(self) -> SharedBar:
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()


# ---- Signals -----------------------------------------------------------------------------------


def save_signals() -> list[int]:
    """What asks a run for a checkpoint; Windows has none."""
    return [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []


def stop_signals() -> list[int]:
    """What asks a run to stop: Ctrl-C, the system, and a terminal that closes, but for one under nohup."""
    signals = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        signals.append(hangup)
    return signals


class Stopped(Exception):
    """This process was asked to stop, by the signal of that number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """Signals to a run, to be looked at between its steps.

    Several processes agree on them, since all have to stop at the same step: about every two seconds, at most ten
    steps apart.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self.stop = 0                                            # the signal to stop at, 0: go on
        self.save = False                                        # whether a checkpoint is asked for
        self.last_poll = (0, time.perf_counter())                # step, clock
        self.next_poll = 0                                       # step

    def handle(self, number: int, frame) -> None:
        """Signal handler. The second signal to stop ends the process at once, unless torchrun may be repeating it."""
        if number in save_signals():
            self.save = True
            return
        self.stop = number
        if self.processes.world == 1:
            for each in stop_signals():
                signal.signal(each, signal.SIG_DFL)

    @contextmanager
    def catch(self, *numbers: int) -> Iterator[None]:
        """Within the block these signals are handled here."""
        before = {}
        if threading.current_thread() is threading.main_thread():                # elsewhere handlers are not allowed
            before = {number: signal.signal(number, self.handle) for number in numbers}
        try:
            yield
        finally:
            if self.processes.world == 1:                        # one of several still has to say why it ends
                for number, handler in before.items():
                    signal.signal(number, handler)

    def poll(self, step: int) -> tuple[int, bool]:
        """The signal to stop at (0: go on) and whether to save, the same on all ranks."""
        if step < self.next_poll:
            return 0, False
        save = self.save
        self.save = False
        if self.processes.world > 1:
            save = self.agree(step, save)
        return self.stop, save

    def require_none(self) -> None:
        """Raise Stopped if this process was asked to stop. For work in which no process waits for another."""
        if self.stop:
            raise Stopped(self.stop)

    def agree(self, step: int, save: bool) -> bool:
        """Take over what any rank was asked for, and settle on the step of the next poll; returns whether to save."""
        since, then = self.last_poll
        now = time.perf_counter()
        steps = 2 * (step - since) / max(1e-9, now - then)       # in two seconds
        steps = min(10.0, max(1.0, steps))

        shared = torch.tensor([self.stop, float(save), steps], device=self.processes.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        stop, save, steps = shared.tolist()
        self.stop = int(stop)
        self.last_poll = (step, now)
        self.next_poll = step + int(steps)
        return bool(save)

    def poll_at_once(self) -> None:
        """Look at the next step, whatever was settled: the run has gone back to an earlier one."""
        self.next_poll = 0


# ---- Failing -----------------------------------------------------------------------------------


def speaks_first() -> bool:
    """Whether this process is to say why it fails: of several the first, because of which the others fail."""
    if world_size() == 1:
        return True
    if not dist.is_initialized():                                # all have the same flags, and data
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if not first:
            time.sleep(3)                                        # torchrun ends the first one when this one ends
        return first
    with suppress(Exception):                                    # unless the store has gone as well
        return add_to_store("failed", 1) == 1
    return True


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process has gone."""
    return isinstance(error, getattr(dist, "DistError", ())) or "gloo/" in str(error)
