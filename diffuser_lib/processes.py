"""The processes of one run, as torchrun starts them, and the signals that reach them.

Processes       rank and number; barrier, wait_for_all, machine_first, broadcast, from_main, require_same, sum_, print0
Meeting         how they find each other, and notice a machine that has gone
SharedBar       one progress bar over what all processes do
Signals         what asks a run to stop or to save, heard at once and acted upon between steps
Failing         speaks_first, is_lost: one message for a failure that all processes share

Needs torch and tqdm. A process alone is rank 0 of 1, and everything here is then free of cost.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import math
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from diffuser_lib.files import UserError, warn

# ---- Processes ---------------------------------------------------------------------------------

PATIENCE = timedelta(hours=6)                                    # rank 0 reads and draws, the others wait
LOOK = 0.5                                                       # seconds between two looks at what others have done
BEAT = 4.0                                                       # seconds between two signs of life of a machine
SILENCE = 30.0                                                   # seconds without one, after which it has gone
MEETING = 600.0                                                  # seconds in which all have to come

T = TypeVar("T")

# Names in the store that processes share. All come to the same places in the same order, so numbers name them.
MEETINGS = itertools.count()
COUNTS = itertools.count()


def world_size() -> int:
    """How many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def machine() -> int:
    """The number of this machine among those of the run, from 0."""
    return int(os.environ.get("GROUP_RANK", 0))


def machines() -> int:
    """How many machines torchrun runs on, 1 without it."""
    return int(os.environ.get("GROUP_WORLD_SIZE", 1))


def is_first_here() -> bool:
    """Whether this is the first of the processes of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


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
    def machine_first(self) -> Iterator[None]:
        """The first process of each machine goes through the block before its others, to download and cache once."""
        if not is_first_here():
            self.barrier()
        try:
            yield
        finally:                                                 # if it failed, the others fail likewise
            if is_first_here():
                self.barrier()

    def broadcast(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        shared = torch.tensor(number, device=self.device)
        if self.world > 1:
            dist.broadcast(shared, 0)
        return int(shared)

    def from_main(self, make: Callable[[], T]) -> T:
        """What make() gives on rank 0, on all ranks; the others need not have the files that it reads.

        It may hold all that can be pickled. Tensors travel one by one and keep their layout in memory, which optimizers
        rely on. Raises UserError on all ranks where make() does.
        """
        if self.world == 1:
            return make()
        value = failure = None
        if self.is_main:
            try:
                value = make()
            except UserError as error:
                failure = (str(error), error.code)

        tensors = []
        parcel = [(failure, without_tensors(value, tensors))]
        dist.broadcast_object_list(parcel, 0, device=self.device)
        failure, skeleton = parcel[0]
        if failure is not None:
            raise UserError(failure[0], code=failure[1])
        if not self.is_main:
            value = with_tensors(skeleton, tensors)
        for tensor in tensors:
            content = torch.empty(tensor.nbytes, dtype=torch.uint8, device=self.device)  # every backend has it
            if self.is_main:
                content.copy_(tensor.contiguous().reshape(-1).view(torch.uint8))
            dist.broadcast(content, 0)
            if not self.is_main:
                tensor.copy_(content.cpu().view(tensor.dtype).view(tensor.shape))
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on all ranks. For small things that can be pickled."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def require_same(self, values: dict[str, str], advice: str) -> None:
        """Raise UserError on all ranks where they do not agree on these values, with a line for each that differs.

        values: for people, by name; a name that is missing counts as a value of its own; advice: what to do about it.
        """
        everyone = self.gather((f"{platform.node()} (rank {self.rank})", values))
        first_place, first = everyone[0]
        lines = []
        for name in dict.fromkeys(name for _, values in everyone for name in values):
            ours = first.get(name, "not given")
            for place, theirs in everyone[1:]:
                if theirs.get(name, "not given") != ours:
                    lines.append(f"{name}: {theirs.get(name, 'not given')} on {place}, {ours} on {first_place}")
                    break
        if lines:
            raise UserError("\n".join(["the processes do not agree:", *lines, advice]))

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


# What from_main sends: a nest of dicts, lists and tuples, and the tensors in it.


def empty_like(tensor: Tensor, device: str) -> Tensor:
    """A tensor of the same shape and type, and channels last where that one is."""
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(tensor, device=device, memory_format=layout)


def without_tensors(value: object, tensors: list[Tensor]) -> object:
    """A copy of a nest with empty tensors, on no device, in place of its own; those are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value.detach())
        return empty_like(value, "meta")
    if isinstance(value, dict):
        return type(value)({key: without_tensors(each, tensors) for key, each in value.items()})
    if type(value) in (list, tuple):
        return type(value)(without_tensors(each, tensors) for each in value)
    return value


def with_tensors(value: object, tensors: list[Tensor]) -> object:
    """The way back: a copy of a nest with tensors that have memory. They are appended to `tensors`, to be filled."""
    if isinstance(value, Tensor):
        tensors.append(empty_like(value, "cpu"))
        return tensors[-1]
    if isinstance(value, dict):
        return type(value)({key: with_tensors(each, tensors) for key, each in value.items()})
    if type(value) in (list, tuple):
        return type(value)(with_tensors(each, tensors) for each in value)
    return value


# ---- Meeting -----------------------------------------------------------------------------------

WATCHES: list[Watch] = []                                        # at most one


def join(backend: str) -> None:
    """Meet the other processes of the run. Raises UserError where their machines cannot reach each other."""
    store, rank, world = next(dist.rendezvous("env://"))
    store.set_timeout(PATIENCE)
    name = name_meeting(store, rank, world)
    if machines() > 1 and is_first_here():
        WATCHES.append(Watch(name))
    try:
        dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank, world_size=world,
                                timeout=PATIENCE)
        dist.barrier()                                           # NCCL connects at the first exchange
    except RuntimeError as error:
        if machines() == 1:
            raise
        raise UserError(f"{platform.node()} does not reach the other machines: name the network between them on each, "
                        "as in GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0", code=1) from error


def leave() -> None:
    """Part from the other processes at the end of a run."""
    say_goodbye()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def name_meeting(store: dist.Store, rank: int, world: int) -> str:
    """A name for this meeting: the same for all ranks, and no earlier meeting's.

    torchrun keeps what dead processes wrote to the store (pytorch issue 135712), and its machines count restarts
    differently, so nothing that stands there need be of today. Each rank therefore writes down a word of its own. Rank
    0 proposes the list of all words; a rank agrees once its own is on it; rank 0 begins once all have agreed. What it
    begins with holds words of living ranks only.
    """
    word = uuid.uuid4().hex
    store.set(f"here {rank}", word)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    deadline = time.monotonic() + MEETING
    while True:
        if rank == 0:
            words = [read(f"here {each}") for each in range(world)]
            proposal = " ".join(words)
            store.set("proposal", proposal)
            absent = [each for each in range(1, world) if read(f"agreed {each}") != proposal]
            if not absent:
                store.set("begun", proposal)
                break
        else:
            absent = [0]
            proposal = read("proposal")
            if word in proposal.split():
                store.set(f"agreed {rank}", proposal)
                if read("begun") == proposal:
                    break
        if time.monotonic() > deadline:
            raise UserError(f"rank {absent[0]} did not come within {MEETING / 60:.0f} minutes: see what it says on its "
                            "machine", code=1)
        time.sleep(0.02)
    return hashlib.sha256(proposal.encode()).hexdigest()[:16]


class Watch:
    """Ends this machine's part of a run where another machine falls silent: its power, or the network, has failed.

    A process that dies closes its connections, which the others notice. A machine that loses power closes none, and the
    others would wait for it for hours, perhaps in a call that no Python code can end. So one thread gives signs of life
    and looks for those of the others, and another one watches the clock. For the first process of each machine.
    """

    GONE_WELL = 2**40                                            # a count of beats that is not reached otherwise

    def __init__(self, meeting: str):
        """meeting: its name. The connection to the store is its own, because calls wait in the others'."""
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.PrefixStore(f"{meeting} beats", dist.TCPStore(*address, is_master=False))
        self.over = threading.Event()
        self.failed = False
        self.heard = [time.monotonic()] * machines()             # when each was heard last
        self.counts = [0] * machines()
        for work in (self.beat, self.look):
            threading.Thread(target=work, daemon=True).start()

    def beat(self) -> None:
        """Give signs of life, and read those of the others."""
        while not self.over.is_set():
            with suppress(Exception):                            # the store is gone: look() will tell
                self.store.add(str(machine()), 1)
                for other in range(machines()):
                    count = self.store.add(str(other), 0)
                    if count != self.counts[other]:
                        self.heard[other] = time.monotonic()
                    if count >= self.GONE_WELL:
                        self.heard[other] = math.inf
                    self.counts[other] = count
            self.over.wait(BEAT)

    def look(self) -> None:
        """End the process once another machine has been silent for too long."""
        last = time.monotonic()
        while not self.over.wait(1):
            now = time.monotonic()
            if now - last > 10:                                  # this process was stopped for a while, and goes on
                self.heard = [max(heard, now) for heard in self.heard]
            last = now
            silent = [i for i, heard in enumerate(self.heard) if now - heard > SILENCE]
            if silent:
                which = "every other machine" if machine() in silent else f"machine {silent[0]}"
                warn(f"diffuser: nothing heard of {which} for {SILENCE:.0f} seconds. Start all of them again: the run "
                     "goes on from its last checkpoint")
                os._exit(1)

    def end(self) -> None:
        """This machine leaves, and need not be heard of again; one that has failed says no goodbye."""
        self.over.set()
        if not self.failed:
            with suppress(Exception):
                self.store.add(str(machine()), self.GONE_WELL)


@atexit.register
def say_goodbye() -> None:
    """End the watch over the other machines. Also where a program that uses this one as a library just ends."""
    while WATCHES:
        WATCHES.pop().end()


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
        self.last_poll = (math.inf, 0.0)                         # step, clock; at first: the next one at the next step
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
        stop = self.stop
        save = False
        if self.save:
            self.save = False
            save = True
        if self.processes.world > 1:
            stop, save = self.agree(step, stop, save)
        return stop, save

    def require_none(self) -> None:
        """Raise Stopped if this process was asked to stop. For work in which no process waits for another."""
        if self.stop:
            raise Stopped(self.stop)

    def agree(self, step: int, stop: int, save: bool) -> tuple[int, bool]:
        """What any rank was asked for: the signal to stop at, whether to save. Settles the step of the next poll."""
        since, then = self.last_poll
        now = time.perf_counter()
        steps = 2 * (step - since) / max(1e-9, now - then)       # in two seconds
        steps = min(10.0, max(1.0, steps))

        shared = torch.tensor([float(stop), float(save), steps], device=self.processes.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        stop, save, steps = shared.tolist()
        if stop:                                                 # one that has come meanwhile waits for the next poll
            self.stop = int(stop)
        self.last_poll = (step, now)
        self.next_poll = step + int(steps)
        return int(stop), bool(save)

    def poll_at_once(self) -> None:
        """Look at the next step, whatever was settled: the run has gone back to an earlier one."""
        self.next_poll = 0


# ---- Failing -----------------------------------------------------------------------------------


def speaks_first() -> bool:
    """Whether this process is to say why it fails: of several on a machine the first, because of which others fail."""
    for watch in WATCHES:
        watch.failed = True
    if world_size() == 1:
        return True
    if not dist.is_initialized():                                # all have the same flags, and data
        if not is_first_here():
            time.sleep(3)                                        # torchrun ends the first one when this one ends
        return is_first_here()
    with suppress(Exception):                                    # unless the store has gone as well
        return add_to_store(f"failed on {machine()}", 1) == 1
    return True


def is_lost(error: Exception) -> bool:
    """Whether an error says that another process has gone."""
    return isinstance(error, getattr(dist, "DistError", ())) or "gloo/" in str(error)
