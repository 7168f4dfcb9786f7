"""Two machines without a shared disk: two network namespaces with a cable between them, each with a folder of its own."""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import prepared
import pytest
from conftest import ROOT, TINY_FLAGS
from PIL import Image

from diffuser import load_checkpoint

NUMBERS = itertools.count()
DIGITS = ["--mode", "train", "--dataset", "digits", "--batch_size", "16", "--timesteps", "50", "--precision", "fp32",
          "--experiment_name", "two", "--checkpoint_rate", "5", *TINY_FLAGS]


def ip(*arguments):
    """Whether a command of iproute2 succeeds."""
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


class Machines:
    """Two of them, 0 and 1. Rank r of a run is the only process of machine r."""

    def __init__(self, folder):
        self.names = [f"diffuser{os.getpid()}_{next(NUMBERS)}_{i}" for i in range(2)]
        self.cables = ["cable0", "cable1"]
        self.folders = [folder / "first", folder / "second"]
        self.running = []
        for each in self.folders:
            each.mkdir()

    def __enter__(self):
        made = prepared.CAN_FORK and shutil.which("ip") and all(ip("netns", "add", name) for name in self.names)
        made = made and ip("link", "add", "cable0", "netns", self.names[0], "type", "veth", "peer", "name", "cable1", "netns",
                           self.names[1])
        if not made:
            self.__exit__()
            pytest.skip("network namespaces take Linux, root and iproute2")
        for i, name in enumerate(self.names):
            assert ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"cable{i}")
            assert ip("-n", name, "link", "set", "lo", "up") and ip("-n", name, "link", "set", f"cable{i}", "up")
        return self

    def __exit__(self, *error):
        for process in self.running:
            process.kill()
        for name in self.names:
            ip("netns", "del", name)

    def cut(self):
        """The cable between them."""
        assert ip("-n", self.names[1], "link", "set", "cable1", "down")

    def start(self, machine, *arguments):
        """The process of a machine, in the background, as torchrun would start it."""
        env = dict(RANK=str(machine), WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=str(machine),
                   GROUP_WORLD_SIZE="2", MASTER_ADDR="10.77.0.1", MASTER_PORT="29500", GLOO_SOCKET_IFNAME=self.cables[machine],
                   OMP_NUM_THREADS="1")
        self.running.append(prepared.start(*arguments, cwd=self.folders[machine], env=env, network=self.names[machine]))
        return self.running[-1]

    def train(self, first, second=None, script=(ROOT / "diffuser.py",)):
        """Both in the background; second: the flags of machine 1, where they differ."""
        return [self.start(i, *script, *flags) for i, flags in enumerate((first, second or first))]

    def results(self, processes, timeout=120):
        """(status, stdout, stderr) of each."""
        return [(process.returncode, out, err) for process, (out, err) in
                [(process, process.communicate(timeout)) for process in processes]]

    def run(self, first, second=None):
        return self.results(self.train(first, second))

    def checkpoints(self, machine):
        """The steps of the checkpoints that are there."""
        return sorted(int(path.parent.name.split("_")[1]) for path in self.folders[machine].glob("checkpoints/two/*/model.pt"))


@pytest.fixture
def machines(tmp_path):
    with Machines(tmp_path) as both:
        yield both


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def messages(errors):
    """What the program itself says on stderr."""
    return re.findall(r"^diffuser: .*", errors, re.MULTILINE)


def test_two_machines_train_as_one(machines, tmp_path):
    """Each reads its own images and makes its own cache; only the first one writes, what it wrote is all that goes on, though
    the other has no checkpoint; the losses are those that one process gets from the same batches."""
    for folder in (*machines.folders, tmp_path / "alone"):
        for i in range(40):
            place = folder / "pictures" / "ab"[i % 2] / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 6 * i, np.uint8)).save(place)
    flags = [*DIGITS[:2], "--path_to_data", "pictures", "--img_size", "8", *DIGITS[4:], "--lr_schedule", "constant",
             "--warmup_steps", "0", "--log_every", "5", "--iterations"]

    for steps in (10, 15):
        (status, out, errors), (status_1, out_1, errors_1) = machines.run([*flags, str(steps)])
        assert (status, status_1) == (0, 0), errors + errors_1
        assert ("resuming" in out) == (steps == 15)
        assert f"two/checkpoint_{steps}" in out
        assert out_1 == ""
    assert machines.checkpoints(0) == [15]
    assert machines.checkpoints(1) == []
    there = {path.name for path in machines.folders[1].rglob("*") if path.is_file() and path.suffix != ".png"}
    assert {name.partition(".")[2] for name in there} == {"bin", "json", "labels", "lock"}, there

    alone = prepared.run(ROOT / "diffuser.py", *flags, "15", cwd=tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    paths = [folder / "checkpoints/two/checkpoint_15/model.pt" for folder in (machines.folders[0], tmp_path / "alone")]
    together, apart = (load_checkpoint(path)["loss_history"] for path in paths)
    assert [step for step, _ in together] == [5, 10, 15]
    assert [loss for _, loss in together] == pytest.approx([loss for _, loss in apart], rel=1e-2)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_machine_ends_the_other_and_both_go_on(machines, victim):
    """Killed at random, one takes the other down within a minute, with one message; the same commands go on to the end."""
    processes = machines.train([*DIGITS, "--iterations", "20000"])
    wait_until(lambda: machines.checkpoints(0))
    time.sleep(random.random())
    processes[victim].kill()
    killed_at = time.monotonic()
    (status, _, errors) = machines.results(processes)[1 - victim]
    assert time.monotonic() - killed_at < 60
    assert status == 1
    assert len(messages(errors)) == 1 and "another process has gone" in errors, errors

    reached = machines.checkpoints(0)[-1]
    end = str(reached + 10)
    (status, out, errors), (status_1, _, errors_1) = machines.run([*DIGITS, "--iterations", end])
    assert (status, status_1) == (0, 0), errors + errors_1
    assert f"at step {reached} of {end}" in out
    assert machines.checkpoints(0) == [reached + 10]


# A run in which a machine counts as silent after three seconds instead of thirty.
IMPATIENT = ("-c", "import sys, diffuser; from diffuser_lib import processes; processes.BEAT = 0.3; processes.SILENCE = 3; "
             "sys.exit(diffuser.main(sys.argv[1:]))")


def test_a_network_that_fails_ends_both(machines):
    """Where no connection is closed, and an exchange would wait for hours, both end with one message each."""
    processes = machines.train([*DIGITS, "--iterations", "20000"], script=IMPATIENT)
    wait_until(lambda: machines.checkpoints(0))
    machines.cut()
    cut_at = time.monotonic()
    for status, _, errors in machines.results(processes, timeout=60):
        assert status == 1
        assert len(messages(errors)) == 1 and "nothing heard of" in errors, errors
    assert time.monotonic() - cut_at < 20


@pytest.mark.slow
def test_a_machine_that_waits_is_not_taken_for_a_dead_one(machines):
    """Signs of life go on while one machine waits for the other, which draws, saves or reads."""
    slow = ("-c", IMPATIENT[1].replace("sys.exit", "draw = diffuser.Monitor.draw_grid; import time; diffuser.Monitor.draw_grid "
                                       "= lambda *given: (time.sleep(5), draw(*given))[1]; sys.exit"))
    results = machines.results(machines.train([*DIGITS, "--iterations", "5"], script=slow))
    assert [status for status, _, _ in results] == [0, 0], results


def test_what_differs_between_machines_is_named(machines):
    """Other flags, and other images, before the first step, with both values and where they are."""
    one, two = [*DIGITS, "--iterations", "5"], [*DIGITS, "--iterations", "5", "--learning_rate", "0.5", "--data_dir", "elsewhere"]
    for status, _, errors in machines.run(one, two):
        assert status == 2
        assert len(messages(errors)) == 1
        assert re.search(r"--learning_rate: 0.5 on \S+ \(rank 1\), not given on \S+ \(rank 0\)\nStart all", errors), errors
        assert "data_dir" not in errors

    data = dict(np.load(ROOT / "data" / "digits.npz"))
    data["images"] = 255 - data["images"]
    (machines.folders[1] / "elsewhere").mkdir()
    np.savez(machines.folders[1] / "elsewhere" / "digits.npz", **data)
    for status, _, errors in machines.run(one, [*one, "--data_dir", "elsewhere"]):
        assert status == 2
        assert len(messages(errors)) == 1
        assert re.search(r"images: 1,797 with the digest \w+ on \S+ \(rank 1\), 1,797 with the digest", errors), errors
    assert machines.checkpoints(0) == []


def test_a_later_checkpoint_on_the_other_machine_is_not_trained_anew(machines):
    """Ranks may fall to the machines the other way round: then the run does not begin from nothing."""
    flags = [*DIGITS, "--iterations", "5"]
    assert [status for status, _, _ in machines.run(flags)] == [0, 0]
    shutil.move(machines.folders[0] / "checkpoints", machines.folders[1] / "checkpoints")
    for status, _, errors in machines.run(flags):
        assert status == 2
        assert len(messages(errors)) == 1 and "checkpoint of step 5" in errors, errors
    assert [status for status, _, _ in machines.run([*flags, "--resume", "never"])] == [0, 0]


def test_weights_to_start_from_need_be_on_the_first_machine_only(machines):
    """--init_from is read by rank 0 and sent, with the network that it settles."""
    run = prepared.run(ROOT / "diffuser.py", *DIGITS, "--iterations", "5", cwd=machines.folders[0])
    assert run.returncode == 0, run.stderr
    shutil.move(machines.folders[0] / "checkpoints/two/checkpoint_5/model.pt", machines.folders[0] / "start.pt")
    shutil.rmtree(machines.folders[0] / "checkpoints")
    (status, out, errors), (status_1, *_) = machines.run([*DIGITS, "--iterations", "5", "--init_from", "start.pt"])
    assert (status, status_1) == (0, 0), errors
    assert "weights  of start.pt, step 5" in out


DIVERGING = ("-c", """
import sys, torch, diffuser
bad = lambda guard, trainer, logged: "it diverged" if trainer.step == 8 and not trainer.progress.lr_halvings else ""
back = diffuser.Guard.roll_back
def roll_back(guard, trainer, *more):
    back(guard, trainer, *more)
    weights = torch.cat([p.detach().flatten() for p in trainer.network.parameters()]).double()
    trainer.processes.require_same({"weights": repr(weights.sum().item())}, "after going back")
diffuser.Guard.diagnose = bad
diffuser.Guard.roll_back = roll_back
sys.exit(diffuser.main(sys.argv[1:]))
""")


def test_both_go_back_to_a_checkpoint_that_one_has(machines):
    """A run that diverges goes back on both machines to the checkpoint of the first one."""
    flags = [*DIGITS, "--log_every", "4", "--iterations", "12"]
    (status, out, errors), (status_1, _, errors_1) = machines.results(machines.train(flags, script=DIVERGING))
    assert (status, status_1) == (0, 0), errors + errors_1
    assert "it diverged; going on from step 5 with 0.5 times" in out
    assert machines.checkpoints(0)[-1] == 12


def test_a_network_that_is_not_there_is_told(machines):
    """Where they look for each other on a network that is none, one of them says what to name, not only what its socket says."""
    machines.cables = ["lo", "lo"]
    results = machines.results(machines.train([*DIGITS, "--iterations", "5"], script=IMPATIENT))
    assert [status for status, _, _ in results] == [1, 1]
    assert any("name the network between them on each, as in GLOO_SOCKET_IFNAME=eth0" in errors for _, _, errors in results), results


def torchrun(machines, machine, nodes, *flags):
    """torchrun itself on a machine, in the background, with its output in torchrun.txt there."""
    env = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME=f"cable{machine}", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    command = ["ip", "netns", "exec", machines.names[machine], sys.executable, "-m", "torch.distributed.run", "--nnodes", nodes,
               "--nproc_per_node", "1", "--max-restarts", "5", "--rdzv_backend", "c10d", "--rdzv_endpoint", "10.77.0.1:29400",
               "--rdzv_conf", f"is_host={int(machine == 0)}", "--local_addr", f"10.77.0.{machine + 1}", ROOT / "diffuser.py", *flags]
    with open(machines.folders[machine] / "torchrun.txt", "w") as log:
        process = subprocess.Popen(command, cwd=machines.folders[machine], env=env, stdout=log, stderr=log, start_new_session=True)
    machines.running.append(process)
    return process


@pytest.mark.slow
def test_elastic(machines):
    """--nnodes 1:2: one machine goes on alone with the same batch where the other is killed, and both where it comes back."""
    flags = [*DIGITS, "--iterations", "6000", "--checkpoint_rate", "20"]
    first = torchrun(machines, 0, "1:2", *flags)
    second = torchrun(machines, 1, "1:2", *flags)
    log = machines.folders[0] / "torchrun.txt"
    wait_until(lambda: machines.checkpoints(0), 120)
    assert "cpu x 2" in log.read_text()

    pids = subprocess.run(["ip", "netns", "pids", machines.names[1]], capture_output=True, text=True).stdout.split()
    subprocess.run(["kill", "-9", *pids])
    second.wait(timeout=30)
    wait_until(lambda: "cpu x 1" in log.read_text(), 120)
    assert "16 images" in log.read_text()

    torchrun(machines, 1, "1:2", *flags)
    wait_until(lambda: log.read_text().count("cpu x 2") == 2, 120)
    reached = machines.checkpoints(0)[-1]
    wait_until(lambda: machines.checkpoints(0)[-1] > reached, 60)
    assert log.read_text().count("resuming from") == 2
    first.terminate()
    first.wait(timeout=90)


SLURM = {
    "srun": 'shift 2; exec "$@"',                                            # --cpus-per-task N
    "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> scontrol.txt; fi',
    "torchrun": 'echo "$@" > torchrun.txt; while [ "$1" != diffuser.py ]; do shift; done; shift; exec "$PYTHON" "$DIFFUSER" "$@" --iterations "$STEPS"',
}


@pytest.mark.slow
def test_the_slurm_script_saves_and_requeues(tmp_path):
    """The batch script of the documents, with stand-ins for Slurm's commands: before the time is over, the run saves and ends,
    the job goes back into the queue, and its next turn goes on to the end, which is not requeued."""
    script = re.search(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs/clusters.md").read_text(), re.DOTALL)[1]
    small = " ".join(["--dataset digits --batch_size 16 --timesteps 50 --checkpoint_rate 10", *TINY_FLAGS])
    (tmp_path / "train.sh").write_text(script.replace("--dataset cifar10 --recipe ho2020", small))
    for name, text in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = dict(os.environ, PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=sys.executable, DIFFUSER=str(ROOT / "diffuser.py"),
               SLURM_JOB_NODELIST="node[1-2]", SLURM_NNODES="2", SLURM_JOB_ID="77", SLURM_CPUS_PER_TASK="32",
               OMP_NUM_THREADS="1")

    def start(steps):
        return subprocess.Popen(["bash", "train.sh"], cwd=tmp_path, env=dict(env, STEPS=str(steps)), stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    process = start(100_000)
    wait_until(lambda: list(tmp_path.glob("checkpoints/ho2020/*/model.pt")))
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert "interrupted: saved" in out
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"
    assert "--nnodes 2 --nproc_per_node 8 --rdzv_id 77 --rdzv_backend c10d --rdzv_endpoint node1:29400" in (tmp_path / "torchrun.txt").read_text()

    reached = max(int(path.parent.name.split("_")[1]) for path in tmp_path.glob("checkpoints/ho2020/*/model.pt"))
    process = start(reached + 5)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and f"at step {reached} of {reached + 5}" in out, out
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 77\n"
