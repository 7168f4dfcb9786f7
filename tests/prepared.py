"""Scripts run from a process that has imported what takes seconds: it forks, and the child is what `python SCRIPT` would be.

A start costs a hundredth of a second in place of two or three. Each run is a process of its own all the same, with
stdin, stdout, stderr, environment, signals and exit status of its own. What depends on how Python itself starts (its
flags, variables that libraries read while they are imported) needs a real start: subprocess.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CAN_FORK = sys.platform == "linux"                                           # Apple's frameworks do not outlive a fork

# What forks. For each run it gets a request and the four ends of pipes and files; another child waits for the run's end
# and tells it.
PREPARED = """
import atexit, contextlib, ctypes, fcntl, functools, gc, importlib, json, os, random, signal, socket, sys, tempfile, termios, threading, types

for name in sys.argv[2].split(","):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
requests = socket.socket(fileno=int(sys.argv[1]))
compiled = functools.lru_cache(functools.partial(compile, mode="exec"))
gc.freeze()                                                                  # no child looks through all that was imported

def next_request():
    size, fds, *_ = socket.recv_fds(requests, 8, 4)
    if not size:
        os._exit(0)
    text = b""
    while len(text) < int(size):
        text += requests.recv(int(size) - len(text))
    return json.loads(text), fds

while True:
    request, (*streams, status) = next_request()
    program, *arguments = request["arguments"]
    code = None
    with contextlib.suppress(SyntaxError, OSError):                          # as the child will say
        if program == "-c":
            code = compiled(arguments[0], "<string>")
        else:
            code = compiled(open(program, "rb").read(), program)
    if os.fork() == 0:
        break
    for fd in (*streams, status):
        os.close(fd)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass

requests.close()
if pid := os.fork():
    for fd in streams:
        os.close(fd)
    os.write(status, f"{pid}\\n".encode())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, f"{code}\\n".encode())
    os._exit(0)

os.close(status)
for number, fd in enumerate(streams):
    os.dup2(fd, number)
    os.close(fd)
if os.isatty(0):                                                             # whose control keys are for this process
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.environ.clear()
os.environ.update(request["env"])
if request["network"]:
    namespace = os.open(f"/run/netns/{request['network']}", os.O_RDONLY)
    assert ctypes.CDLL(None, use_errno=True).setns(namespace, 0x40000000) == 0   # CLONE_NEWNET
    os.close(namespace)
tempfile.tempdir = None                                                      # that of this environment
os.chdir(request["cwd"])
random.seed()
sys.stdin = sys.__stdin__ = open(0, closefd=False)
sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)
sys.argv = ["-c", *arguments[1:]] if program == "-c" else [program, *arguments]
sys.path[0] = "" if program == "-c" else os.path.dirname(os.path.abspath(program))
main = sys.modules["__main__"] = types.ModuleType("__main__")
if program != "-c":
    main.__file__ = program

# As Python would, but for taking all modules apart at the end, which takes as long as a quarter of a start.
status = 0
try:
    exec(code or compile(arguments[0] if program == "-c" else open(program, "rb").read(), program, "exec"), main.__dict__)
except SystemExit as end:
    status = end.code or 0
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
except KeyboardInterrupt:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    sys.excepthook(*sys.exc_info())
    status = 1
threading._shutdown()
atexit._run_exitfuncs()
try:
    sys.stdout.flush()
except Exception:
    status = 120
os._exit(status & 255)
"""
# What the scripts import, at their start or where they need it.
IMPORTED = ("diffuser", "evaluate", "convert", "edit", "plot_loss", "report", "matplotlib", "jinja2", "filelock", "safetensors.torch",
            "torch.utils.flop_counter", "torch._dynamo", "torchvision")


def heed_interrupts():
    """For a child process: a Ctrl-C counts, and a terminal that closes, also where the tests themselves run in the
    background, under nohup, and ignore them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Server:
    """The process that forks; there is one, from the first run to the end of the tests."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen([sys.executable, "-c", PREPARED, str(theirs.fileno()), ",".join(IMPORTED)], cwd=ROOT,
                                            env={name: value for name, value in os.environ.items() if name != "MPLBACKEND"},
                                            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, preexec_fn=heed_interrupts)
        self.requests = ours
        atexit.register(self.close)

    def close(self):
        self.requests.close()
        self.process.wait()

    def send(self, request, streams):
        text = json.dumps(request).encode()
        socket.send_fds(self.requests, [f"{len(text):8}".encode()], streams)
        self.requests.sendall(text)


server = None


class WithOutputs:
    """A process whose `outputs`, two open files, are what it writes to stdout and stderr."""

    def communicate(self, timeout=None):
        """Both as text, once it has ended."""
        self.wait(timeout)
        texts = []
        for file in self.outputs:
            with file:
                file.seek(0)
                texts.append(file.read())
        return tuple(texts)


class Process(WithOutputs):
    """`python ARGUMENTS` in the background, with the methods of subprocess.Popen that the tests use.

    env: what is to be changed in the environment, None: taken away. stdin, stdout, stderr: open files; nothing is there to
    be read, and what is written is lost, where they are left out. network: a network namespace by name, as `ip` makes them.
    """

    def __init__(self, arguments, cwd, env=None, stdin=None, stdout=None, stderr=None, network=""):
        global server
        server = server or Server()
        status, theirs = os.pipe()
        with open(theirs, "wb") as theirs, open(os.devnull, "r+b") as nothing:
            ends = [stdin or nothing, stdout or nothing, stderr or nothing, theirs]
            told = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
            server.send(dict(arguments=list(map(str, arguments)), cwd=str(cwd), env=told, network=network),
                        [end.fileno() for end in ends])
        self.args = arguments
        self.returncode = None
        self.lock = threading.Lock()                             # several threads may wait for it
        self.status = open(status, "rb", buffering=0)
        self.pid = int(self.status.readline())

    def poll(self):
        with self.lock:
            if self.returncode is None and select.select([self.status], [], [], 0)[0]:
                self.returncode = int(self.status.readline())
                self.status.close()
            return self.returncode

    def wait(self, timeout=None):
        with contextlib.suppress(OSError, ValueError):           # closed: another thread has just had the answer
            if self.returncode is None and not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class PlainProcess(WithOutputs, subprocess.Popen):
    """The same by a real start, where nothing may fork."""

    def __init__(self, arguments, cwd, env=None, stdin=None, stdout=None, stderr=None):
        nothing = subprocess.DEVNULL
        told = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
        super().__init__([sys.executable, *map(str, arguments)], cwd=cwd, env=told, stdin=stdin or nothing,
                         stdout=stdout or nothing, stderr=stderr or nothing, preexec_fn=heed_interrupts)


def background(*arguments, **streams):
    """Process where it can be had, else PlainProcess."""
    return (Process if CAN_FORK else PlainProcess)(*arguments, **streams)


def start(*arguments, cwd, stdin="", env=None, **network):
    """`python ARGUMENTS` in the background; communicate() gives what it has written."""
    with tempfile.TemporaryFile("w+") as given:
        given.write(stdin)
        given.seek(0)
        out, err = tempfile.TemporaryFile("w+", errors="replace"), tempfile.TemporaryFile("w+", errors="replace")
        process = background(arguments, cwd, env, stdin=given, stdout=out, stderr=err, **network)
    process.outputs = out, err
    return process


def run(*arguments, cwd, stdin="", env=None, timeout=300):
    """`python ARGUMENTS` to its end, as subprocess.run() would give it with capture_output and text."""
    process = start(*arguments, cwd=cwd, stdin=stdin, env=env)
    try:
        out, err = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def torchrun_store():
    """Where processes meet and leave notes, which torchrun keeps for them and over restarts."""
    from torch.distributed import TCPStore

    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def start_ranks(count, *arguments, cwd, store=None, env=None):
    """`python ARGUMENTS` in several processes in the background, which find what torchrun would tell them, and `env`.

    store: one that they share with others, in place of their own.
    """
    store = store or torchrun_store()
    told = dict(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_ADDR="localhost", MASTER_PORT=str(store.port),
                TORCHELASTIC_USE_AGENT_STORE="True", **(env or {}))
    processes = [start(*arguments, cwd=cwd, env=dict(told, RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(count)]
    for process in processes:
        process.store = store                                                # it lives as long as they do
    return processes


def result_of(processes, timeout=240):
    """(status, stdout, stderr) of all of them, once they have ended; status is 0 where all succeeded."""
    try:
        outputs = [process.communicate(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return max(abs(process.returncode) for process in processes), *map("".join, zip(*outputs))


def run_two(*arguments, cwd, timeout=240):
    """`python ARGUMENTS` in two processes, as start_ranks() starts them: (status, stdout, stderr) of both."""
    return result_of(start_ranks(2, *arguments, cwd=cwd), timeout)
