"""diffuser_lib/processes.py: a process alone, two real ones, also under torchrun, real signals."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import types

import prepared
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, heed_interrupts

from diffuser_lib.processes import (
    Processes,
    SharedBar,
    Signals,
    Stopped,
    is_lost,
    leave,
    save_signals,
    speaks_first,
    stop_signals,
    world_size,
)

CPU = torch.device("cpu")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

needs_user_signals = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has no user signals")


@pytest.fixture
def alone(monkeypatch):
    """This process, not under torchrun."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return Processes(CPU, "gloo")


# ---- A process alone ---------------------------------------------------------------------------


def test_a_process_alone_is_rank_0_of_1(alone):
    """It joins nobody: numbers come back as they are, and nothing waits."""
    assert (alone.rank, alone.world, alone.is_main) == (0, 1, True)
    assert world_size() == 1
    assert not dist.is_initialized()
    with alone.machine_first():
        pass
    assert alone.broadcast(7) == 7
    assert alone.largest(-3) == -3
    assert alone.from_main(lambda: []) == []
    assert alone.from_main(lambda: [2**40, -1]) == [2**40, -1]
    alone.wait_for_all(lambda: 1 / 0)
    with SharedBar(alone, 3) as bar:
        bar.update()
        bar.update()
        assert bar.done == 2
    values = torch.tensor([1.0, 2.0])
    assert alone.sum_(values) is values
    assert values.tolist() == [1, 2]
    leave()


def test_an_error_passes_through_machine_first(alone):
    """What goes wrong inside is not swallowed."""
    with pytest.raises(ZeroDivisionError), alone.machine_first():
        raise ZeroDivisionError


def test_a_line_is_printed_by_rank_0_alone(alone, monkeypatch, capsys):
    """Once, and a run whose reader has gone goes on."""
    alone.print0("hello")
    assert capsys.readouterr().out == "hello\n"

    def gone(text):
        raise BrokenPipeError

    with monkeypatch.context() as patched:
        patched.setattr("tqdm.tqdm.write", gone)
        alone.print0("hello")
    alone.is_main = False
    alone.print0("hello")
    assert capsys.readouterr().out == ""


def test_a_process_alone_says_why_it_fails(alone, monkeypatch):
    """Of several that have not met yet, the first on the machine does: all have the same flags and data."""
    assert speaks_first()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, speaks in ("0", True), ("1", False):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert speaks_first() == speaks
    assert world_size() == 2


def test_an_error_of_another_process_is_known_by_its_kind_or_its_words():
    """What torch raises when a process has gone; errors of one's own are none of these."""
    assert is_lost(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    if hasattr(dist, "DistError"):
        assert is_lost(dist.DistError("gone"))
    assert not is_lost(RuntimeError("out of memory"))
    assert not is_lost(ValueError(""))


# ---- Signals to a process alone ----------------------------------------------------------------


@pytest.mark.parametrize("number", stop_signals())
def test_a_signal_to_stop_is_heard_at_the_next_step(alone, number):
    """It interrupts nothing: the next poll tells its number, and after the block signals are handled as before."""
    signals = Signals(alone)
    before = [signal.getsignal(each) for each in stop_signals()]
    with signals.catch(*stop_signals()):
        assert signals.poll(1) == (0, False)
        os.kill(os.getpid(), number)
        assert signals.poll(2) == (number, False)
        assert signals.poll(3) == (number, False)                # until the run has ended
        with pytest.raises(Stopped, match=signal.Signals(number).name) as stopped:
            signals.require_none()
        assert stopped.value.number == number
    assert [signal.getsignal(each) for each in stop_signals()] == before


def test_a_signal_during_the_exchange_is_not_lost(monkeypatch):
    """One that comes while the processes tell each other what they were asked for is told at the next exchange."""
    signals = Signals(types.SimpleNamespace(world=2, device=torch.device("cpu")))
    monkeypatch.setattr(dist, "all_reduce", lambda *_: signals.handle(signal.SIGTERM, None))
    assert signals.poll(1) == (0, False)
    assert signals.poll(signals.next_poll) == (signal.SIGTERM, False)


@needs_user_signals
def test_a_signal_to_save_is_heard_once(alone):
    """SIGUSR1 asks for one checkpoint, however often it comes before the next step, and stops nothing."""
    signals = Signals(alone)
    with signals.catch(*stop_signals(), *save_signals()):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.poll(1) == (0, True)
        assert signals.poll(2) == (0, False)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.poll(3) == (0, True)


def test_signals_are_handled_as_before_after_an_error(alone):
    """Also when training fails within the block."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Signals(alone).catch(*stop_signals()):
        assert signal.getsignal(signal.SIGTERM) != before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_nothing_is_caught(alone):
    """Python allows handlers in the main thread only; in a notebook's or a server's thread a run starts all the same."""
    signals = Signals(alone)
    seen = []

    def work():
        with signals.catch(*stop_signals()):
            seen.append(signals.poll(1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=60)
    assert seen == [(0, False)]


# A step that never ends, in which signals are heard.
LONG_STEP = """
import signal, time, torch
from diffuser_lib.processes import Processes, Signals, save_signals, stop_signals

signals = Signals(Processes(torch.device("cpu"), "gloo"))
with signals.catch(*stop_signals(), *save_signals()):
    print([int(each) for each in stop_signals()], flush=True)
    while not signals.stop:
        time.sleep(0.02)
    print("heard", flush=True)
    while True:
        time.sleep(0.02)
"""


def long_step(prepare=None):
    """The step in a process of its own, started as `prepare` does, and the signals that would stop it."""
    if prepare:
        process = subprocess.Popen([sys.executable, "-c", LONG_STEP], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True,
                                   preexec_fn=prepare)
    else:
        ours, theirs = os.pipe()
        with open(theirs, "w") as stdout:
            process = prepared.background(["-c", LONG_STEP], ROOT, stdout=stdout)
        process.stdout = open(ours)
    return process, json.loads(process.stdout.readline())


@pytest.mark.parametrize("first, second", [
    (signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_the_second_signal_ends_the_process_at_once(first, second):
    """The first waits for the step, which may take long; the second does not."""
    process, _ = long_step()
    with process.stdout:
        process.send_signal(first)
        assert process.stdout.readline() == "heard\n"
        assert process.poll() is None
        process.send_signal(second)
        assert process.wait(timeout=60) == -second


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no terminals that hang up")
def test_under_nohup_a_closed_terminal_changes_nothing():
    """nohup has the signal ignored; a run must not hear it then. Without nohup it stops the run."""
    def nohup():
        heed_interrupts()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process, numbers = long_step(nohup)
    with process.stdout:
        assert signal.SIGHUP not in numbers
        process.send_signal(signal.SIGHUP)                       # comes before the next, and is dropped
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "heard\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM

    process, numbers = long_step()
    with process.stdout:
        assert signal.SIGHUP in numbers
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "heard\n"
        process.kill()
        process.wait(timeout=60)


# ---- Two processes -----------------------------------------------------------------------------


def notes_of_both(folder):
    """What rank 0 noted, and what rank 1 noted."""
    return [json.loads((folder / f"notes{rank}.json").read_text()) for rank in range(2)]


def two(program, folder):
    """Run a program in two processes as torchrun starts them: (stdout, what rank 0 noted, what rank 1 noted)."""
    (folder / "program.py").write_text(START + program)
    status, out, errors = prepared.run_two(folder / "program.py", cwd=folder)
    assert status == 0, errors[-3000:]
    return out, *notes_of_both(folder)


def torchrun(program, folder, *options):
    """The same under torchrun itself."""
    (folder / "program.py").write_text(START + program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
               "--rdzv_endpoint", "localhost:0", *options, "program.py"]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
                          preexec_fn=heed_interrupts)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, *notes_of_both(folder)


# What every program below begins with.
START = """
import json, os, signal, sys, time, torch
import torch.distributed as dist
from pathlib import Path
from diffuser_lib.processes import *

def wait_for(path):
    deadline = time.monotonic() + 120
    while not Path(path).exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)

def note(**values):
    Path(f"notes{rank}.json").write_text(json.dumps(values))

processes = Processes(torch.device("cpu"), "gloo")
rank = processes.rank
"""

NUMBERS = """
# Rank 1 is at the door before rank 0 even begins, and rank 0 takes its time.
if rank == 1:
    Path("rank 1 is here").touch()
else:
    wait_for("rank 1 is here")
with processes.machine_first():
    made_before = Path("made").exists()
    if rank == 0:
        time.sleep(0.5)
        Path("made").touch()

# The others get through where rank 0 fails.
failed = False
try:
    with processes.machine_first():
        if rank == 0:
            raise OSError("no network")
except OSError:
    failed = True

processes.print0(f"a line from {rank}")
values = torch.tensor([1.0 + rank, 10.0])
same = processes.sum_(values) is values
again = Processes(torch.device("cpu"), "gloo")                   # a second run in the same processes

# One bar for both. Rank 1 takes its time: rank 0 sees meanwhile how far it is, and is waited for in turn.
seen = []
for wait in range(2):
    with SharedBar(processes, 20) as bar:
        for _ in range(5 + 5 * rank):
            bar.update()
        if rank != wait:
            time.sleep(0.8)                                      # longer than LOOK
        processes.wait_for_all(bar.look)
        if rank == 1:
            time.sleep(0.3)                                      # too late to tell rank 0 anything now
        bar.look()
        seen.append(bar.done)

# What is raised while waiting ends it.
def give_up():
    raise ZeroDivisionError

try:
    if rank == 0:
        processes.wait_for_all(give_up)
except ZeroDivisionError:
    gave_up = True
else:
    gave_up = False
speaks = [speaks_first(), speaks_first()]
note(rank=rank, world=processes.world, is_main=processes.is_main, made_before=made_before, failed=failed,
     broadcast=processes.broadcast(100 + rank), largest=processes.largest(7 * rank - 5), sums=values.tolist(),
     same=same, seen=seen, gave_up=gave_up, numbers=processes.from_main(lambda: [7 + rank] * (3 - rank)), large=processes.broadcast(2**40 + rank), again=again.largest(rank), speaks=speaks)
leave()
assert not dist.is_initialized()
"""


def test_two_processes_work_as_one(tmp_path):
    """Rank 0 first where files are made, and the others after it even if it fails; numbers agreed on; a line printed once;
    one of the two says why both fail."""
    out, zero, one = two(NUMBERS, tmp_path)
    assert [(each["rank"], each["world"], each["is_main"]) for each in (zero, one)] == [(0, 2, True), (1, 2, False)]
    assert [zero["made_before"], one["made_before"]] == [False, True]
    assert [zero["failed"], one["failed"]] == [True, False]
    for each in (zero, one):
        assert each["broadcast"] == 100
        assert each["large"] == 2**40
        assert each["largest"] == 2
        assert each["again"] == 1
        assert each["sums"] == [3, 20]
        assert each["same"]
        assert each["numbers"] == [7, 7, 7]
    assert zero["seen"] == [15, 15]
    assert [zero["gave_up"], one["gave_up"]] == [True, False]
    assert out.count("a line from") == 1
    assert "a line from 0" in out
    assert sum([*zero["speaks"], *one["speaks"]]) == 1


SENT = """
from diffuser_lib.files import UserError
from diffuser_lib.processes import name_meeting

made = []
def make():
    made.append(rank)
    torch.manual_seed(0)
    return dict(weights=[torch.randn(300, 7), torch.randn(5).bfloat16(), torch.tensor(2**40), torch.zeros(0, 3), torch.ones(2, 1).expand(2, 3),
                         torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)],
                truth=torch.tensor([True, False]), step=7, name="x", nothing=None, pair=(1, torch.arange(3)), path=Path("a"))

value = processes.from_main(make)
expected = make()
made.pop()
tensors = [*value["weights"], value["truth"], value["pair"][1]]
same = all(a.dtype == b.dtype and (a.ndim < 4 or a.stride() == b.stride()) and torch.equal(a, b) for a, b in zip(tensors, [*expected["weights"], expected["truth"], expected["pair"][1]]))

def refuse():
    raise UserError("there is no such file", code=7)

try:
    processes.from_main(refuse)
except UserError as error:
    refused = [str(error), error.code]

gathered = processes.gather(dict(rank=rank))
processes.require_same({"a": "1"}, "never told")
try:
    processes.require_same({"a": "1", "b": str(rank), **({"c": "3"} if rank else {})}, "do this.")
except UserError as error:
    differs = str(error)

# A second meeting finds what the first one left in the store, and that of a process that was never there.
store = dist.distributed_c10d._get_default_store()
if rank == 0:
    store.set("proposal", "old words")
    store.set("begun", "old words")
    store.set("here 1", "a dead one")
processes.barrier()
names = []
for _ in range(2):
    names.append(name_meeting(store, rank, 2))
    processes.barrier()
note(made=made, same=same, others=[value["step"], value["name"], value["nothing"], value["pair"][0], str(value["path"])],
     refused=refused, gathered=gathered, differs=differs, names=names)
leave()
"""


def test_what_one_process_has_and_what_all_must_agree_on(tmp_path):
    """What rank 0 reads, tensors and their layout, and its failure, is every rank's; what differs is named once, with both values; a
    meeting has a name of its own, whatever is left in the store of an earlier one."""
    _, zero, one = two(SENT, tmp_path)
    assert [zero.pop("made"), one.pop("made")] == [[0], []]
    assert zero == one
    assert zero["same"]
    assert zero["others"] == [7, "x", None, 1, "a"]
    assert zero["refused"] == ["there is no such file", 7]
    assert zero["gathered"] == [{"rank": 0}, {"rank": 1}]
    first, *lines, advice = zero["differs"].splitlines()
    assert first == "the processes do not agree:" and advice == "do this."
    assert [re.sub(r" on \S+ \(rank", " on X (rank", line) for line in lines] == [
        "b: 1 on X (rank 1), 0 on X (rank 0)", "c: 3 on X (rank 1), not given on X (rank 0)"]
    assert len(set(zero["names"])) == 2


SIGNALS = """
heard = []
signals = Signals(processes)
with signals.catch(*stop_signals(), *save_signals()):
    for step in range(100):
        if rank == 0 and step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        if rank == 1 and step == 35:
            os.kill(os.getpid(), signal.SIGTERM)
        if rank == 1 and step == 36:
            os.kill(os.getpid(), signal.SIGTERM)                 # torchrun repeats what the terminal has sent
        stop, save = signals.poll(step)
        if stop or save:
            heard.append([step, stop, save])
        if stop:
            break
os.kill(os.getpid(), signal.SIGTERM)                             # the end is still to be told

# Gone back to an earlier step, the processes do not wait until they are where they were.
signals.stop = 0
signals.next_poll = 1000
signals.save = rank == 0
waiting = signals.poll(5)
signals.poll_at_once()
at_once = signals.poll(5)

# Steps of half a second are polled after four of them, fast ones after ten, slow ones each time.
distances = []
for seconds_a_step in (0.45, 0.001, 30.0):
    signals.last_poll = (100, time.perf_counter() - 20 * seconds_a_step)
    signals.poll_at_once()
    signals.poll(120)
    distances.append(signals.next_poll - 120)
note(heard=heard, waiting=waiting, at_once=at_once, distances=distances)
leave()
"""


@needs_user_signals
def test_two_processes_stop_and_save_at_the_same_step(tmp_path):
    """A signal to one counts for both, at most ten steps or about two seconds later; a repeated one does not end the
    process that is about to save."""
    _, zero, one = two(SIGNALS, tmp_path)
    assert zero == one
    (saved_at, *saved), (stopped_at, *stopped) = zero["heard"]
    assert 3 <= saved_at <= 13
    assert saved == [0, True]
    assert 35 <= stopped_at <= 45
    assert stopped == [signal.SIGTERM, False]
    assert zero["waiting"] == [0, False]
    assert zero["at_once"][1] is True
    assert zero["distances"] == [4, 10, 1]


LOST = """
processes.broadcast(1)
if rank == 1:
    note()
    os._exit(0)                                                  # a success to torchrun, which then lets the other be
try:
    for _ in range(100):
        processes.largest(1)
except Exception as error:
    note(lost=is_lost(error), speaks=speaks_first())
"""


def test_a_process_that_has_gone_is_noticed(tmp_path):
    """The other one's next exchange fails at once, with an error that is known for what it is."""
    _, zero, _ = two(LOST, tmp_path)
    assert zero == {"lost": True, "speaks": True}


RESTART = """
speaks = speaks_first()
processes.largest(1)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    Path(f"first{rank}").write_text(str(speaks))
    os._exit(1)
note(speaks=speaks, number=processes.broadcast(5 + rank))
leave()
"""


def test_restarted_processes_meet_anew(tmp_path):
    """After a failure they are started again: they meet, and what the dead ones had noted does not count."""
    store = prepared.torchrun_store()
    (tmp_path / "program.py").write_text(START + RESTART)
    for count in "01":
        ranks = prepared.start_ranks(2, tmp_path / "program.py", cwd=tmp_path, store=store,
                                     env=dict(TORCHELASTIC_RESTART_COUNT=count))
        status, _, errors = prepared.result_of(ranks)
        assert status == 1 - int(count), errors[-3000:]
    zero, one = notes_of_both(tmp_path)
    assert sorted((tmp_path / f"first{rank}").read_text() for rank in range(2)) == ["False", "True"]
    assert sorted([zero["speaks"], one["speaks"]]) == [False, True]
    assert [zero["number"], one["number"]] == [5, 5]


@pytest.mark.slow
def test_processes_that_torchrun_restarts_meet_anew(tmp_path):
    """The same under torchrun itself."""
    _, zero, one = torchrun(RESTART, tmp_path, "--max-restarts", "1")
    assert sorted((tmp_path / f"first{rank}").read_text() for rank in range(2)) == ["False", "True"]
    assert sorted([zero["speaks"], one["speaks"]]) == [False, True]
    assert [zero["number"], one["number"]] == [5, 5]
