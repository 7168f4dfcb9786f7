"""diffuser_lib/files.py: writes that survive, locks between real processes, scripts that end with a clear line."""

import argparse
import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, heed_interrupts, small_file_system

from diffuser_lib.files import (
    Parser,
    UserError,
    add_debug,
    did_you_mean,
    first_line,
    hold_lock,
    known_spellings,
    nearest_folder,
    newest_first,
    printable,
    read_json_object,
    require_writable,
    run_script,
    unused_path,
    warn,
    warn_on_oserror,
    why_not_writable,
    write_atomically,
    write_json,
    zip_is_sound,
)

needs_dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def no_space(*arguments, **options):
    """Stands for any function that meets a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullStream(io.StringIO):
    """A stream into a file on a full disk."""

    write = no_space


def start(program, *arguments, **options):
    """Python code in a process of its own, which can import diffuser_lib."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], env=environment, text=True,
                            preexec_fn=heed_interrupts, **options)


# ---- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("message, expected", [
    ("one\ntwo", "one"), ("\n  one  \n", "one"), ("x" * 500, "x" * 120), ("", "ValueError"), ("\n", "ValueError"),
    ("cannot identify image file <_io.BytesIO object at 0x7f12ab>", "cannot identify image file")])
def test_what_a_library_says_becomes_one_short_line(message, expected):
    """The first line, cut where it is long; the kind of error where there is no text."""
    assert first_line(ValueError(message)) == expected
    assert first_line(KeyError("mean")) == "there is no 'mean'"


def test_the_nearest_name_is_suggested():
    """A slip of the pen finds its name; what is like nothing known gets no suggestion."""
    assert did_you_mean("--bach_size", ["--epochs", "--batch_size"]) == ": did you mean --batch_size?"
    assert did_you_mean("zzz", ["--epochs", "--batch_size"]) == ""
    assert did_you_mean("--resolution", ["--precision"]) == ""               # it merely sounds alike
    assert did_you_mean("--checkpoint_path", ["--checkpoint_rate"]) == ""
    assert did_you_mean("--beta", ["--eta"]) == ""
    assert did_you_mean("--batchsize", ["--epochs", "--batch_size"]) == ": did you mean --batch_size?"
    assert did_you_mean("batch", ["batch_size", "batch_rate", "epochs"]) == ": did you mean batch_size or batch_rate?"


def test_a_user_error_is_bad_usage_unless_it_says_otherwise():
    """The exit status is 2 by default."""
    assert UserError("x").code == 2
    assert UserError("x", code=1).code == 1


def test_a_warning_goes_to_stderr_and_a_full_disk_there_is_let_pass(monkeypatch, capsys):
    """A warning that cannot be written must not stop the work it is about."""
    warn("careful")
    out, errors = capsys.readouterr()
    assert (out, errors) == ("", "careful\n")
    monkeypatch.setattr(sys, "stderr", FullStream())
    warn("careful")


def test_a_failed_write_is_told_and_survived(capsys):
    """On an OSError one warning names what was not written and why; other errors are bugs, and pass."""
    written = []
    assert warn_on_oserror("notes", lambda: written.append(1)) is True
    assert written == [1]
    assert capsys.readouterr().err == ""

    assert warn_on_oserror("notes", no_space) is False
    error = capsys.readouterr().err
    assert "warning: notes could not be written" in error
    assert os.strerror(errno.ENOSPC) in error

    with pytest.raises(ZeroDivisionError):
        warn_on_oserror("notes", lambda: 1 / 0)


HOSTILE = "\x1b]0;title\x07 \x1b[2J \r over \u202e back \x9b1m \x7f"


def test_control_characters_are_spelled_out():
    """A name commands no terminal; newline, tab and all letters stay as they are."""
    assert printable("a\tb\nc é 猫 🙂") == "a\tb\nc é 猫 🙂"
    assert printable(HOSTILE) == r"\x1b]0;title\x07 \x1b[2J \r over \u202e back \x9b1m \x7f"


# ---- Scripts: the parser -----------------------------------------------------------------------


def example_parser():
    """A parser as scripts have it."""
    parser = Parser("example", description="first line\n  second line, indented")
    parser.add_argument("--batch_size", type=int, default=4)
    add_debug(parser)
    return parser


def test_options_are_parsed():
    """Given options, defaults, and the --debug that every script has."""
    options = example_parser().parse_args(["--batch_size", "7"])
    assert (options.batch_size, options.debug) == (7, False)
    assert example_parser().parse_args(["--debug"]).debug is True


def test_dashes_are_as_good_as_underscores():
    """In flags; what follows -- is no flag, and a value keeps its dashes."""
    assert example_parser().parse_args(["--batch-size", "7"]).batch_size == 7
    assert example_parser().parse_args(["--batch-size=7"]).batch_size == 7
    assert known_spellings(["--a-b", "c-d", "--a-b=--c-d", "--", "--a-b"], ["--a_b"]) == [
        "--a_b", "c-d", "--a_b=--c-d", "--", "--a-b"]


@pytest.mark.parametrize("arguments, words", [
    (["--bach_size", "4"], "unknown option --bach_size: did you mean --batch_size?"),
    (["--bach_size=4"], "unknown option --bach_size=4: did you mean --batch_size?"),
    (["--zzz"], "unknown option --zzz (see --help)"),
    (["stray"], "unknown option stray (see --help)"),
    (["--batch", "4"], "unknown option --batch: did you mean --batch_size?"),                # no abbreviations
    (["--batch_size", "many"], "--batch_size"),
    (["--batch_size"], "--batch_size")])
def test_a_mistake_on_the_command_line_is_a_user_error_of_one_line(arguments, words):
    """The message names the option, and the nearest one that exists."""
    with pytest.raises(UserError) as error:
        example_parser().parse_args(arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.code == 2


def test_the_help_keeps_its_lines(capsys):
    """Descriptions are shown as they are written, and --help ends with 0."""
    with pytest.raises(SystemExit) as end:
        example_parser().parse_args(["--help"])
    assert end.value.code == 0
    assert "first line\n  second line, indented" in capsys.readouterr().out


def test_help_of_a_docstring(monkeypatch):
    """Up to the examples above the options, then below; lines too long for the terminal are wrapped, examples below each
    other with what they mean; a value is N, X, PATH or NAME."""
    monkeypatch.setenv("COLUMNS", "60")
    doc = f"""What it does.

    python example.py A    {"meaning " * 6}
    python example.py B    another

{"Prose that goes on. " * 6}
"""
    parser = Parser("example", usage="python example.py", doc=doc)
    parser.add_argument("--count", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--place", type=Path)
    parser.add_argument("--title")
    text = parser.format_help()
    places = [text.index(part) for part in (
        "What it does.", "    python example.py A\n        meaning", "python example.py B\n        another", "--count N",
        "--rate X", "--place PATH", "--title NAME", "Prose")]
    assert places == sorted(places)
    assert max(map(len, text.splitlines())) <= 60


# ---- Scripts: how they end ---------------------------------------------------------------------


def run(work, *arguments, **options):
    """The exit status of a script that does `work`."""
    return run_script("example", lambda: example_parser().parse_args(arguments), work, **options)


def raising(error):
    """Work that fails."""
    def work(options):
        raise error

    return work


def test_work_gets_the_options_and_ends_with_0(capsys):
    """A script that works says nothing by itself."""
    seen = []
    assert run(seen.append, "--batch_size", "9") == 0
    assert seen[0].batch_size == 9
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("code", [2, 1, 129])
def test_a_user_error_is_its_message_and_its_code(capsys, code):
    """Nothing but the message, behind the script's name."""
    assert run(raising(UserError("no such thing\ndo this instead", code))) == code
    assert capsys.readouterr() == ("", "example: no such thing\ndo this instead\n")


def test_bad_options_are_told_like_other_errors(capsys):
    """What the parser refuses is one line and exit 2, whether or not --debug stands beside it."""
    assert run(raising(AssertionError), "--debug", "--bach_size", "4") == 2
    assert capsys.readouterr().err == "example: unknown option --bach_size: did you mean --batch_size?\n"


def test_a_bad_path_is_bad_usage(tmp_path, capsys):
    """A file where a folder should be, a folder where a file should be, a name too long, a loop of links: exit 2."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    bad_paths = [
        lambda options: (tmp_path / "file" / "x").write_text(""),
        lambda options: tmp_path.write_text(""),
        lambda options: (tmp_path / ("x" * 300)).write_text(""),
        lambda options: (tmp_path / "loop").read_text(),
        lambda options: (tmp_path / "file").mkdir(),
    ]
    for work in bad_paths:
        assert run(work) == 2
        error = capsys.readouterr().err
        assert error.startswith("example: ")
        assert str(tmp_path) in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_machine_that_fails_is_exit_1(capsys, number):
    """A full, read-only or broken disk is no mistake of the user's."""
    assert run(raising(OSError(number, os.strerror(number)))) == 1
    error = capsys.readouterr().err
    assert os.strerror(number) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("error, code", [
    (PermissionError(errno.EACCES, "Permission denied", "there.json"), 2),
    (FileNotFoundError(errno.ENOENT, "No such file", "there.json"), 2),
    (OSError(errno.ENOSPC, "No space left on device", "there.json"), 1),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "there.json"), 1),
    (RuntimeError("IoError(Os { code: 28, kind: StorageFull, message: there.json })"), 1)])
def test_the_status_tells_a_full_disk_from_a_bad_path(capsys, error, code):
    """1 for a disk that is full, 2 for a path that was given wrongly, also where a script has a line of its own for it;
    the path is in the line."""
    assert run(raising(error)) == code
    text = capsys.readouterr().err
    assert "there.json" in text and text.count("\n") == 1 and "Errno" not in text

    def explained(options):
        raise UserError("cannot draw it") from error

    assert run(explained) == code


def test_a_missing_package_is_named(capsys):
    """The line says what to install: the package, not the module inside it."""
    def work(options):
        import surely_not_installed.part  # noqa: F401

    assert run(work) == 1
    expected = "example: surely_not_installed is not installed: pip install surely_not_installed\n"
    assert capsys.readouterr().err == expected


def test_an_unexpected_error_is_one_line_and_a_traceback_in_a_file(tmp_path, monkeypatch, capsys):
    """Nobody sees a traceback on the screen, and nothing of it is lost, odd characters included."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def work(options):
        raise ValueError("what is this\nand more \udcff")

    assert run(work) == 1
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert len(lines) == 2
    assert "unexpected ValueError: what" in lines[0]
    assert "and more" not in error
    assert "--debug" in lines[1]

    path = Path(re.search(r"The traceback is in (\S+);", lines[1])[1])
    assert path.parent == tmp_path
    text = path.read_text()
    assert "Traceback (most recent call last)" in text
    assert "in work" in text
    assert "and more" in text


def test_without_room_for_the_traceback_the_line_stays(monkeypatch, capsys):
    """A full disk must not hide what happened."""
    monkeypatch.setattr("tempfile.mkstemp", no_space)
    assert run(raising(ValueError("odd"))) == 1
    assert capsys.readouterr().err == "example: unexpected ValueError: odd\n"


def test_debug_lets_errors_pass(capsys):
    """With --debug the error itself is raised, for a traceback or a debugger."""
    for error in (UserError("x"), ValueError("y"), OSError(errno.ENOSPC, "z")):
        with pytest.raises(type(error)) as raised:
            run(raising(error), "--debug")
        assert raised.value is error
    assert capsys.readouterr().err == ""


def test_an_error_can_be_explained(capsys):
    """A script may turn a library's error into a clearer one."""
    def explain(error):
        return UserError("out of memory: lower --batch_size", code=1) if isinstance(error, MemoryError) else error

    assert run(raising(MemoryError()), explain=explain) == 1
    assert capsys.readouterr().err == "example: out of memory: lower --batch_size\n"
    assert run(raising(UserError("other")), explain=explain) == 2
    assert capsys.readouterr().err == "example: other\n"


def test_an_interrupt_is_130(capsys):
    """Ctrl-C is told in a line, also with --debug."""
    for arguments in ([], ["--debug"]):
        assert run(raising(KeyboardInterrupt()), *arguments) == 130
        assert capsys.readouterr().err == "\nexample: interrupted\n"


def test_an_interrupt_that_a_library_hides_is_130(capsys):
    """An error that came of Ctrl-C during an import somewhere deep is told as what it is."""
    def work(options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            raise ImportError("no such part") from interrupt

    assert run(work) == 130
    assert capsys.readouterr().err == "\nexample: interrupted\n"


# Interrupts itself when its first import after its header begins.
EARLY = """
import os, runpy, signal, sys
import _signal

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name in ("signal", "argparse", "torch"):
            sys.meta_path.remove(self)
            os.kill(os.getpid(), 2)

for name in ("signal", "argparse", "torch"):
    sys.modules.pop(name, None)
_signal.signal(2, _signal.default_int_handler)
sys.meta_path.insert(0, Interrupt())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize("script", [
    "convert.py", "diffuser.py", "edit.py", "evaluate.py", "plot_loss.py", "report.py", "benchmarks/quality.py",
    "benchmarks/speed.py"])
def test_ctrl_c_during_the_first_imports_leaves_no_traceback(script, tmp_path):
    """From the first import on that takes any time, in every script: it ends as a program does at Ctrl-C."""
    done = subprocess.run([sys.executable, "-c", EARLY, str(ROOT / script)], cwd=tmp_path, capture_output=True, text=True,
                          preexec_fn=heed_interrupts, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


# ---- Scripts: in a process of their own --------------------------------------------------------

# Asks for nothing, prints what it is told to, and may wait to be interrupted.
SCRIPT = """
import signal, sys, time
from diffuser_lib.files import Parser, add_debug, end_process, run_script

def work(options):
    print(options.text * options.times)
    if options.wait:
        print("waiting", flush=True)
        while True:
            time.sleep(0.05)

def main():
    parser = Parser("example")
    parser.add_argument("--text", default="hello")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--wait", action="store_true")
    add_debug(parser)
    return run_script("example", parser.parse_args, work)

if "--imports" in sys.argv:                              # as a script has it that imports torch
    sys.argv.remove("--imports")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
end_process(main)
"""


@pytest.mark.parametrize("flags", [[], ["--debug"], ["--imports"]])
def test_ctrl_c_ends_a_script_with_130(flags):
    """In the midst of its work, without a traceback; also where its imports ran with the system's own handler."""
    process = start(SCRIPT, "--wait", *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process.stdout as lines:
        assert "waiting\n" in iter(lines.readline, "")
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 130
    assert errors == "\nexample: interrupted\n"


@pytest.mark.parametrize("flags", [[], ["--help"]])
def test_a_reader_that_has_gone_is_no_error(flags):
    """What stays in the buffer is dropped in silence, after --help as well."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start(SCRIPT, *flags, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_a_reader_that_goes_while_much_is_written_leaves_a_line():
    """More than the buffer holds: the write itself fails, and that is told like any failure."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start(SCRIPT, "--times", 100_000, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == "example: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("closed", [0, 1])
def test_a_script_works_with_stdin_or_stdout_closed(closed):
    """As under some schedulers: Python then has no such stream at all."""
    def close():
        heed_interrupts()
        os.close(closed)

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, text=True, stderr=subprocess.PIPE,
                          preexec_fn=close, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_text_that_no_encoding_has_can_be_printed():
    """Names of files may hold any bytes; printing one is no reason to fail."""
    process = start(SCRIPT, "--text", b"\xff".decode(errors="surrogateescape"), stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (0, "?\n", "")


@needs_dev_full
def test_a_full_disk_under_both_streams_leaves_the_status():
    """Neither the warning nor the end of the script can be written, and the status still tells."""
    with open("/dev/full", "w") as full:
        process = start(SCRIPT, "--no_such_flag", stdout=full, stderr=full)
        assert process.wait(timeout=60) == 2


@needs_dev_full
def test_output_that_is_lost_is_told():
    """What a script prints is what it was run for: on a full disk that is exit 1 and one line."""
    with open("/dev/full", "w") as full:
        process = start(SCRIPT, stdout=full, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "-c: standard output: No space left on device\n")
    with open("/dev/full", "w") as full:                         # argparse lets the error of its own write pass
        done = subprocess.run([sys.executable, "-u", ROOT / "report.py", "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "report: standard output: No space left on device\n")
    with open("/dev/full", "w") as full:
        process = start(SCRIPT, "--times", 100_000, stdout=full, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "example: standard output: No space left on device\n")


# Prints, warns, raises and shows a bar with a name in it.
TELLER = """
import sys
from tqdm import tqdm
from diffuser_lib.files import UserError, end_process, run_script, warn

name = sys.argv[1]

def work(options):
    print(name)
    print(name, file=sys.stderr)
    warn(name)
    for i in tqdm(range(3), name, file=sys.stderr):
        tqdm.write(name)
    raise UserError(name)

end_process(lambda: run_script("teller", lambda: None, work))
"""


@pytest.mark.parametrize("environment", [
    {}, {"PYTHONIOENCODING": "ascii:strict"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_no_name_reaches_the_terminal_raw(environment):
    """However a script writes, control characters in names come out spelled, on any terminal; bars move as ever."""
    process = subprocess.Popen([sys.executable, "-c", TELLER, HOSTILE + "é"], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in errors
    assert out.count(r"\x1b]0;title\x07 \x1b[2J") == 4
    assert errors.count(r"\x1b]0;title\x07 \x1b[2J") > 3
    for text in (out, errors):
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", text)


# ---- Writing -----------------------------------------------------------------------------------


def test_a_file_is_written_whole_with_its_folders(tmp_path):
    """Missing folders are made, an old file is replaced, and nothing temporary stays."""
    path = tmp_path / "a" / "b" / "file.pt"
    for content in (b"first", b"second"):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file.pt"]
    assert stat.S_ISREG(os.stat(path).st_mode)


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("a bug"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path, error):
    """If writing breaks off, for whatever reason, the old content stays and nothing else is left behind."""
    path = tmp_path / "file.pt"
    write_atomically(path, lambda file: file.write(b"old"))

    def broken(file):
        file.write(b"ne")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, broken)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.pt"]


def test_the_new_file_can_be_refused_before_it_counts(tmp_path):
    """before_replace sees the whole new file while the old one is in place; an error there keeps the old one."""
    path = tmp_path / "file.pt"
    path.write_bytes(b"old")
    seen = []

    def look(new):
        seen.append((new.read_bytes(), path.read_bytes()))

    def refuse(new):
        raise OSError("not as it should be")

    with pytest.raises(OSError, match="not as it should be"):
        write_atomically(path, lambda file: file.write(b"new"), refuse)
    assert path.read_bytes() == b"old"
    write_atomically(path, lambda file: file.write(b"new"), look)
    assert seen == [(b"new", b"old")]
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file.pt"]


@pytest.mark.skipif(os.name != "posix", reason="folders cannot be synchronized")
def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """Content, then the rename, then the folder: a power cut at any moment leaves a whole file, old or new."""
    order = []
    real_fsync = os.fsync
    real_replace = os.replace

    def fsync(handle):
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        size = os.fstat(handle).st_size
        order.append("folder" if is_folder else f"{size} bytes")
        real_fsync(handle)

    def replace(*paths):
        order.append("rename")
        real_replace(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(tmp_path / "file", lambda file: file.write(b"x" * 100))
    assert order == ["100 bytes", "rename", "folder"]


def test_a_folder_that_cannot_be_synchronized_is_no_error(tmp_path, monkeypatch):
    """Some network file systems refuse that; the file is written all the same."""
    real_fsync = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not here")
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert (tmp_path / "file").read_bytes() == b"x"


# Writes the same file again and again, of one letter each time, in many pieces.
WRITER = """
import sys
from pathlib import Path
from diffuser_lib.files import write_atomically

def write(file):
    for _ in range(64):
        file.write(letter * 4096)

for i in range(10**9):
    letter = b"ab"[i % 2 : i % 2 + 1]
    write_atomically(Path(sys.argv[1]), write)
    if i == 0:
        print("written", flush=True)
"""


def test_readers_and_kills_never_meet_half_a_file(tmp_path):
    """Another process that reads all the time, and SIGKILL in the midst of writing, find whole files only."""
    path = tmp_path / "file"
    for _ in range(3):
        process = start(WRITER, path, stdout=subprocess.PIPE)
        with process.stdout:
            assert process.stdout.readline() == "written\n"
            contents = {path.read_bytes() for _ in range(100)}
            process.kill()
            process.wait(timeout=60)
        contents.add(path.read_bytes())
        assert contents <= {b"a" * 2**18, b"b" * 2**18}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte, or a skip."""
    with small_file_system(tmp_path / "disk", "1m") as place:
        yield place


def test_a_disk_that_is_full_keeps_the_old_file(small_disk):
    """A real one: the new file does not fit, the old one stays, and the room of the attempt is free again."""
    path = small_disk / "file"
    path.write_bytes(b"old" * 1000)
    free = shutil.disk_usage(small_disk).free
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, lambda file: file.write(b"x" * 2**21))
    assert path.read_bytes() == b"old" * 1000
    assert os.listdir(small_disk) == ["file"]
    assert shutil.disk_usage(small_disk).free == free


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path):
    """The line names the flag; nothing is made or replaced."""
    (tmp_path / "file").write_text("")
    for path, as_folder in (("file/x.json", False), ("x" * 300, False), ("x" * 252, False), (".", False), ("file", True),
                            ("/dev/null", False), ("/proc/nothing/x.json", False)):
        with pytest.raises(UserError, match="json") as error:
            require_writable(tmp_path / path, "--json", folder=as_folder)
        assert error.value.code == 2 and "\n" not in str(error.value)
    require_writable(tmp_path / "new" / "deeper" / "x.json", "--json")
    require_writable(tmp_path / "new", "--save_dir", folder=True)
    with contextlib.suppress(UserError):                         # root may write there
        require_writable("/", "--save_dir", folder=True)
    require_writable(tmp_path / "file", "--json")
    require_writable("x.json", "--json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_place_is_judged_by_the_folder_that_is_there(tmp_path):
    """A folder that is to be made can be written to where the nearest one above it can; nothing is left behind."""
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path and why_not_writable(tmp_path / "a" / "b") == ""
    (tmp_path / "file").write_text("")
    assert why_not_writable(tmp_path / "file" / "b") != ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_names_the_file(tmp_path):
    """Not the one beside it that has its content until it is whole."""
    with pytest.raises(OSError) as error:
        write_atomically(tmp_path / "x.json", no_space)
    assert error.value.filename == str(tmp_path / "x.json")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"{", b"\xff", b'{"a": ' + b"1" * 5000 + b"}", b" " * (2**24 + 1)])
def test_json_of_any_kind_is_an_object_or_an_error(tmp_path, content):
    """Nested without end, of another kind, or endless: a ValueError, which callers tell in their own words."""
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json_object(tmp_path / "x.json")


def test_json_is_written_whole(tmp_path):
    """It reads back as it was; what is not JSON leaves the old file."""
    path = tmp_path / "deep" / "record.json"
    content = dict(name="käse", numbers=[1, 2.5, None], nested=dict(a=True))
    write_json(path, content)
    assert json.loads(path.read_text()) == content
    with pytest.raises(TypeError):
        write_json(path, dict(a=object()))
    assert json.loads(path.read_text()) == content
    assert os.listdir(path.parent) == ["record.json"]


# ---- Checking ----------------------------------------------------------------------------------

PARTS = {"c/data.pkl": b"hello" * 5, "c/datä/0": bytes(range(200))}


def stored_zip(**options):
    """The bytes of an uncompressed ZIP file with two parts."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in PARTS.items():
            archive.writestr(name, content)
            archive.getinfo(name).external_attr = 0              # as torch has it
    return file.getvalue()


def test_a_sound_zip_is_told_by_path_name_or_file(tmp_path):
    """What torch.save writes, and any uncompressed ZIP file, is sound; the position of an open file does not matter."""
    path = tmp_path / "c.pt"
    torch.save({"weights": torch.arange(1000.0)}, path)
    assert zip_is_sound(path)
    assert zip_is_sound(str(path))
    with open(path, "rb") as file:
        assert zip_is_sound(file)
        assert zip_is_sound(file)
    assert zip_is_sound(io.BytesIO(stored_zip()))


@pytest.mark.parametrize("how", ["flipped bit", "truncated", "one byte short", "empty", "zeros", "rubbish"])
def test_a_damaged_zip_is_found(tmp_path, how):
    """The ways in which disks and people break a file."""
    path = tmp_path / "c.pt"
    torch.save({"weights": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    if how == "flipped bit":
        content[len(content) // 2] ^= 1
    elif how == "truncated":
        content = content[: len(content) // 2]
    elif how == "one byte short":
        content = content[:-1]
    elif how == "empty":
        content = b""
    elif how == "zeros":
        content[1000:] = bytes(len(content) - 1000)
    else:
        content = b"PK\3\4 and then nothing"
    path.write_bytes(content)
    assert zip_is_sound(path) is False


def test_any_flipped_bit_is_found():
    """Each bit of a file in turn, those of its index included: it is refused without an error, or what it still lists is
    as it was (torch tells what is missing)."""
    whole = stored_zip()
    accepted = 0
    for place in range(len(whole) * 8):
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << (place % 8)
        file = io.BytesIO(bytes(broken))
        if zip_is_sound(file):
            accepted += 1
            with zipfile.ZipFile(file) as archive:
                found = {name: archive.read(name) for name in archive.namelist()}
            assert found.items() <= PARTS.items(), place
    assert accepted < len(whole) * 8 / 2                         # dates and the like have no checksum


def test_a_zip_that_could_blow_up_or_hide_something_is_refused():
    """Compressed parts are none of torch's; a part marked as a folder would be left unread by it."""
    assert not zip_is_sound(io.BytesIO(stored_zip(compression=zipfile.ZIP_DEFLATED)))

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        entry = zipfile.ZipInfo("c/data/0")
        entry.external_attr = 0x10
        archive.writestr(entry, b"hidden")
    assert not zip_is_sound(file)


def test_a_zip_that_is_not_there_is_an_oserror(tmp_path):
    """Missing is not damaged: the caller can tell them apart."""
    with pytest.raises(FileNotFoundError):
        zip_is_sound(tmp_path / "gone.pt")


# ---- Names -------------------------------------------------------------------------------------


def test_paths_are_sorted_by_age(tmp_path):
    """The newest first; what has gone meanwhile is left out."""
    order = list(range(8))
    random.Random(0).shuffle(order)
    paths = [tmp_path / f"{i}.pt" for i in order]
    for i, path in zip(order, paths):
        path.write_text("")
        os.utime(path, ns=(0, 10**18 + i))                       # nanoseconds apart
    (tmp_path / "link").symlink_to("nowhere")

    found = newest_first([*paths, tmp_path / "gone", tmp_path / "link"])
    assert [path.stem for path in found] == ["7", "6", "5", "4", "3", "2", "1", "0"]
    assert newest_first(iter([])) == []


def test_the_first_free_number_is_taken(tmp_path):
    """out1, then out2; the ending of a file stays; a gap is used."""
    assert unused_path(tmp_path, "out") == tmp_path / "out1"
    (tmp_path / "out1").mkdir()
    (tmp_path / "out3").mkdir()
    assert unused_path(tmp_path, "out") == tmp_path / "out2"
    (tmp_path / "model_old1.pt").write_text("")
    assert unused_path(tmp_path, "model_old", ".pt") == tmp_path / "model_old2.pt"


# ---- Locks -------------------------------------------------------------------------------------

# Holds a place until its stdin closes.
HOLDER = """
import sys
from pathlib import Path
from diffuser_lib.files import hold_lock

with hold_lock(Path(sys.argv[1]), "--out", "wait for it"):
    print("held", flush=True)
    sys.stdin.read()
print("let go", flush=True)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the place tmp_path/run/model.pt."""
    process = start(HOLDER, tmp_path / "run" / "model.pt", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_place_in_use_is_refused_and_its_owner_is_named(tmp_path, holder):
    """The second process is told who holds the place and what to do, after as much patience as was asked for."""
    begun = time.monotonic()
    with pytest.raises(UserError) as error, hold_lock(tmp_path / "run" / "model.pt", "--out", "wait for it", 0.3):
        pytest.fail("held twice")
    assert time.monotonic() - begun >= 0.3

    first, second = str(error.value).split("\n")
    assert f"{tmp_path / 'run' / 'model.pt'} is in use by process {holder.pid} on " in first
    assert second == "wait for it"
    assert error.value.code == 2

    with hold_lock(tmp_path / "run" / "other.pt", "--out", "wait for it", 0.3):
        pass                                                     # another place beside it is free


def test_a_process_that_died_is_no_obstacle(tmp_path, holder):
    """Killed, it leaves its files but not its hold."""
    holder.kill()
    holder.wait(timeout=60)
    with hold_lock(tmp_path / "run" / "model.pt", "--out", "wait for it"):
        assert f"process {os.getpid()}" in (tmp_path / "run" / ".model.pt.owner").read_text()


def test_a_process_waits_for_one_that_is_about_to_end(tmp_path):
    """Within its patience it gets the place as soon as that is free."""
    place = tmp_path / "run" / "model.pt"
    with hold_lock(place, "--out", "wait for it"):
        waiting = start(HOLDER.replace('"wait for it"', '"wait for it", patience=300'), place, stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE)
    out, _ = waiting.communicate(timeout=60)
    assert (waiting.returncode, out) == (0, "held\nlet go\n")


def test_an_error_lets_go(tmp_path):
    """What goes wrong inside passes through, and the place is free again."""
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), hold_lock(tmp_path / "model.pt", "--out", "wait for it", 0.1):
            raise ZeroDivisionError


def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path):
    """A file where a folder should be: the message names the option that chose it."""
    (tmp_path / "taken").write_text("")
    with (pytest.raises(UserError, match="choose another out") as error,
          hold_lock(tmp_path / "taken" / "x" / "model.pt", "--out", "wait for it")):
        pytest.fail("held")
    assert "\n" not in str(error.value)


def test_a_full_disk_is_no_reason_not_to_start(tmp_path, monkeypatch):
    """The note of who holds the place is a courtesy; without room for it the place is held all the same."""
    monkeypatch.setattr(Path, "write_text", no_space)
    with hold_lock(tmp_path / "model.pt", "--out", "wait for it"):
        begun = start(HOLDER.replace('"wait for it"', '"wait for it", patience=0.1'), tmp_path / "model.pt",
                      stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        _, errors = begun.communicate(timeout=60)
    assert "is in use by another process" in errors


# ---- The file itself ---------------------------------------------------------------------------


def test_the_file_needs_neither_torch_nor_the_project():
    """Scripts without torch use it, and it must start as fast as they do."""
    program = "import sys, diffuser_lib.files; print([m for m in ('torch', 'numpy', 'PIL', 'filelock', 'diffuser') if m in sys.modules])"
    process = start(program, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=60)
    assert out == "[]\n"


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b"])
def test_a_path_that_no_file_can_have_is_one_line(tmp_path, capsys, path):
    """A character 0, or half a character, in a path: bad input, not a surprise."""
    status = run_script("test", argparse.Namespace, lambda options: write_json(tmp_path / path, {}))
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and "a path holds characters" in error
