"""Files that survive, and scripts that end with a clear line.

Errors      UserError, first_line, did_you_mean, warn, warn_on_oserror, cannot_write, is_full_disk
Text        printable, read_json_object: what others wrote, shown and read with care
Scripts     Parser, run_script, end_process: every script parses, fails and ends in the same way
Writing     write_atomically, write_json: a file is whole and on the disk, or the old one is untouched;
            require_writable: whether it could be, before there is work to lose
Checking    zip_is_sound: every part of a ZIP file against its checksum
Names       newest_first, unused_path
Locks       hold_lock: one process at a time; lock_holder: which

Needs the standard library, and filelock for locks.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import json
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import BinaryIO, TextIO

# ---- Errors ------------------------------------------------------------------------------------


# Whether a script is at work, so that options are flags.
IN_SCRIPT = ContextVar("IN_SCRIPT", default=False)


class UserError(Exception):
    """An expected failure, whose message says in a line or two what is wrong and what to do.

    message: it names options as flags, such as --steps; called from Python, where there are none, it names them
    without the dashes. code: the exit status; 1 failed at run time, 2 bad usage or input, 128 + n ended by signal n.
    about_flags: whether it is about flags in any case.
    """

    def __init__(self, message: str, code: int = 2, about_flags: bool = False):
        if not (about_flags or IN_SCRIPT.get()):
            message = re.sub(r"(?<![\w-])--(?=[a-z])", "", message)
        super().__init__(message)
        self.code = code


def first_line(error: Exception) -> str:
    """What a library's error says, on one short line, without addresses of its objects."""
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    text = re.sub(r" ?<[\w.]+ object at 0x[0-9a-fA-F]+>", "", text)
    return text.strip().split("\n")[0][:120] or type(error).__name__


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The nearest of the known names, or the few that begin with it, as the end of a message; empty where none is near.

    Near is a name whose words are all spelt alike: what merely sounds alike is more often something else.
    """
    words = split_words(wrong)
    near = []
    longer = []
    for name in known:
        others = split_words(name)
        if spelt_alike(words, others):
            near.append(name)
        elif words and others[: len(words)] == words:
            longer.append(name)

    if near:
        return f": did you mean {max(near, key=lambda name: likeness(wrong, name))}?"
    if 1 <= len(longer) <= 3:
        return f": did you mean {' or '.join(longer)}?"
    return ""


def split_words(name: str) -> list[str]:
    """The words of a name or flag, without what joins them."""
    return [word for word in re.split(r"[-_\s]+", name.lower()) if word]


def spelt_alike(words: list[str], others: list[str]) -> bool:
    """Whether two names are the same but for what joins their words, and a slip behind the first letter of each."""
    if "".join(words) == "".join(others):
        return True
    if len(words) != len(others):
        return False
    return all(a[0] == b[0] and likeness(a, b) >= 0.75 for a, b in zip(words, others))


def likeness(a: str, b: str) -> float:
    """Of two texts, from 0 to 1: the share of their letters that stand in the same order."""
    return difflib.SequenceMatcher(None, a, b).ratio()


def warn(text: str) -> None:
    """Print a line on stderr. stderr may itself be a file on a full disk, so a failure is ignored."""
    with suppress(OSError):
        print(printable(text), file=sys.stderr)


def warn_on_oserror(what: str, write: Callable[[], object]) -> bool:
    """Call write(); where the disk is full or read-only, warn that `what` was not written. Returns whether it was."""
    try:
        write()
        return True
    except OSError as error:
        warn(f"\nwarning: {what} could not be written ({error.strerror or error}): going on")
        return False


# Errors of the operating system that mean a bad path was given, not that the machine failed.
BAD_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENOENT, errno.EACCES,
            errno.EPERM, errno.ENXIO, errno.ENODEV)
FULL_DISK = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error says that a disk, or a user's share of it, is full. Some libraries have words of their own."""
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return True
    return re.search("No space left on device|StorageFull|[Qq]uota exceeded", str(error)) is not None


def cannot_write(path: str | Path, flag: str, error: OSError) -> UserError:
    """What to say where nothing can be written to a path; flag: the option that chooses it."""
    message = f"cannot write to {path} ({error.strerror or error}): choose another {flag}"
    return UserError(message, code=1 if is_full_disk(error) else 2)


# ---- Text --------------------------------------------------------------------------------------

# All control characters but newline and tab, and those that turn the direction of writing round.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

# What progress bars write: back to the start of the line, up a line, clear it. And colours, as some libraries write.
BAR_MOVES = re.compile(r"(?:[\r\n]|\x1b\[\d*[AK])+")
COLOURS = re.compile(r"\x1b\[[\d;]*m")


def printable(text: str) -> str:
    """Text with its control characters spelled out, as in \\x1b[2J, so that no file name can control the terminal."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_beside_bars(text: str) -> str:
    """The same for stderr, where progress bars move about and libraries write in colours, which are left out."""
    if BAR_MOVES.fullmatch(text):
        return text
    if text.startswith("\r"):                                    # a bar, with somebody's name in it
        return "\r" + printable(text[1:])
    return printable(COLOURS.sub("", text))


def write_printably(stream: TextIO, name: str, filter_text: Callable[[str], str]) -> None:
    """Let filter_text have all that is written to a stream of this process.

    An error of a full disk gets the stream's name, and is kept as its attribute full_disk: callers may let it pass.
    """
    def named(call: Callable) -> Callable:
        def call_named(*arguments):
            try:
                return call(*arguments)
            except OSError as error:
                if is_full_disk(error):
                    error.filename = name
                    stream.full_disk = error
                raise

        return call_named

    write = named(stream.write)
    stream.write = lambda text: write(filter_text(text))
    stream.flush = named(stream.flush)


def read_json_object(path: Path, most: int = 2**24) -> dict:
    """The object in a JSON file of at most so many bytes. Raises OSError, or ValueError for anything else."""
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most / 2**20:.0f} MiB")
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no names with values")
    return value


# ---- Scripts -----------------------------------------------------------------------------------


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that keeps its lines where they fit, and shows a value as N, X, PATH or NAME, by the type of the option."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X", Path: "PATH"}.get(action.type, "NAME")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(fit_paragraph(paragraph, width) for paragraph in text.split("\n\n"))


def fit_paragraph(paragraph: str, width: int) -> str:
    """A paragraph of help in so many columns: prose is wrapped, what stands behind an example goes below it."""
    lines = paragraph.splitlines()
    if all(len(line) <= width for line in lines):
        return paragraph
    if not paragraph.startswith(" "):
        return textwrap.fill(" ".join(lines), width, break_on_hyphens=False)

    fitted = []
    for line in lines:
        example, _, meaning = line.rstrip().rpartition("  ")
        if example.strip():
            fitted.append(example.rstrip())
            fitted.append(textwrap.fill(meaning, width, initial_indent=8 * " ", subsequent_indent=8 * " "))
        else:
            fitted.append(line)
    return "\n".join(fitted)


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError of one line, with the nearest flag where one is unknown.

    Between the words of a flag a dash is as good as an underscore. doc: a text such as a module's docstring; in --help
    it stands above the options up to its examples, the indented lines, and below them from there on.
    """

    def __init__(self, *args, doc: str = "", **options):
        if doc:
            options["description"], options["epilog"] = split_behind_examples(doc)
        formatter = partial(HelpFormatter, max_help_position=28)
        super().__init__(*args, allow_abbrev=False, formatter_class=formatter, **options)

    def error(self, message: str):
        raise UserError(f"{message} (see --help)", about_flags=True)

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse does, but for the dashes."""
        arguments = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(known_spellings(arguments, self._option_string_actions), namespace)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """The options given. Raises UserError."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            hint = did_you_mean(flag, self._option_string_actions) or " (see --help)"
            raise UserError(f"unknown option {unknown[0]}{hint}", about_flags=True)
        return options


def known_spellings(arguments: list[str], flags: Iterable[str]) -> list[str]:
    """The arguments, each --flag with dashes and underscores as in `flags`. What follows -- is left alone."""
    known = {flag[2:].replace("-", "_"): flag for flag in flags if flag.startswith("--")}
    result = []
    for i, argument in enumerate(arguments):
        if argument == "--":
            return result + arguments[i:]
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            flag = known.get(flag[2:].replace("-", "_"), flag)
        result.append(flag + equals + value)
    return result


def split_behind_examples(doc: str) -> tuple[str, str]:
    """A text up to the end of its first indented paragraph, and the rest."""
    paragraphs = doc.strip().split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if paragraph.startswith(" "):
            return "\n\n".join(paragraphs[: i + 1]), "\n\n".join(paragraphs[i + 1 :])
    return doc.strip(), ""


def add_debug(parser: argparse.ArgumentParser) -> None:
    """The flag that every script has."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")


def run_script(script: str, parse: Callable[[], argparse.Namespace], work: Callable[[argparse.Namespace], object],
               explain: Callable[[Exception], Exception | None] = lambda error: error) -> int:
    """Run a script and return its exit status; a failure is told in a line or two on stderr.

    parse: gives the options; work: does what they ask for; explain: turns an error into a clearer one, or into None
    where another process tells it. With --debug errors pass through, traceback and all.
    """
    debug = False
    outside = IN_SCRIPT.set(True)
    try:
        options = parse()
        debug = getattr(options, "debug", False)
        work(options)
        return 0
    except KeyboardInterrupt:
        warn(f"\n{script}: interrupted")
        return 130
    except Exception as error:
        if was_interrupted(error):
            warn(f"\n{script}: interrupted")
            return 130
        if debug:
            raise
        clearer = explain(error)
        return 1 if clearer is None else report_failure(script, clearer)
    finally:
        IN_SCRIPT.reset(outside)


def was_interrupted(error: BaseException | None) -> bool:
    """Whether an error came of Ctrl-C, which some libraries turn into errors of their own while they are imported."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def report_failure(script: str, error: Exception) -> int:
    """Say in a line or two why a script ends; returns the exit status. What nobody expected is kept in a file."""
    if isinstance(error, UserError):
        warn(f"{script}: {error}")
        return 1 if is_full_disk(error.__cause__) else error.code
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        warn(f"{script}: {package} is not installed: pip install {package}")
        return 1
    if isinstance(error, OSError):
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        warn(f"{script}: {place}{error.strerror}" if place and error.strerror else f"{script}: {error}")
        return 2 if error.errno in BAD_PATH else 1
    if is_full_disk(error):
        warn(f"{script}: the disk is full ({first_line(error)})")
        return 1
    if isinstance(error, UnicodeEncodeError) or "embedded null byte" in str(error):
        warn(f"{script}: a path holds characters that no file can have in its name ({first_line(error)})")
        return 2

    message = f"{script}: unexpected {type(error).__name__}: {first_line(error)}"
    with suppress(OSError):
        handle, path = tempfile.mkstemp(".log", f"{script}_traceback_")
        with open(handle, "w", errors="replace") as file:
            traceback.print_exception(error, file=file)
        message += f"\nThe traceback is in {path}; --debug shows it."
    warn(message)
    return 1


def end_process(main: Callable[[], int]) -> None:
    """Run main() and end the process with its status, whatever has become of stdin, stdout and stderr."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:        # set while the imports ran
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:                           # closed before the start
            setattr(sys, name, open(os.devnull, "w"))            # noqa: SIM115 (open until the end)
    for stream in (sys.stdin, sys.stdout):
        if stream is not None:
            stream.reconfigure(errors="replace")                 # answers and names may hold any bytes
    write_printably(sys.stdout, "standard output", printable)
    write_printably(sys.stderr, "standard error", printable_beside_bars)

    try:
        status = main()
    except SystemExit as end:                                    # argparse ends so after --help
        status = end.code

    signal.signal(signal.SIGINT, signal.SIG_IGN)                 # it is ending already
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:                                          # its reader has gone, or its disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    lost = getattr(sys.stdout, "full_disk", None)
    if lost is not None and not status:                          # what it printed is what it was run for
        warn(f"{Path(sys.argv[0]).stem}: standard output: {lost.strerror}")
        status = 1
    sys.exit(status)


# ---- Writing -----------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[BinaryIO], object],
                     before_replace: Callable[[Path], None] | None = None, through_power_cuts: bool = True) -> None:
    """Make a file by write(binary file): afterwards it is whole and on the disk, or the old one is untouched.

    before_replace: called with the path of the new file before it takes the old one's place; by raising an error it
    refuses the file. through_power_cuts: wait until the disk has it; without, it is whole after anything else, such as
    Ctrl-C or a kill, and thousands of files take no longer than usual. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            write(file)
            if through_power_cuts:
                file.flush()
                os.fsync(file.fileno())
        if before_replace is not None:
            before_replace(temporary)
        os.replace(temporary, path)
        if through_power_cuts:
            sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)                           # what the message is to name
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder last through a power cut, where the system has that."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):                                      # not every file system can
        os.fsync(handle)
    os.close(handle)


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically. Raises OSError."""
    text = json.dumps(content, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


def require_writable(path: str | Path, flag: str, folder: bool = False) -> None:
    """Raise UserError, naming the option that chooses the path, where no file can be written there, or into it.

    folder: whether it is to be a folder of files. Where it is not there yet, it is not made.
    """
    path = Path(path)
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)                                       # a name too long, a file for a folder, a loop of links
            if folder and not path.is_dir():
                raise UserError(f"{flag} {path} is no folder: name another")
            if not folder and not path.is_file():
                raise UserError(f"{flag} {path} is no file that could be replaced: name another")
        if not folder:
            with suppress(FileNotFoundError):
                os.lstat(path.absolute().with_name(f".{path.name}.tmp"))         # as write_atomically has it

        try_to_write(path if folder else path.parent, 1)
    except OSError as error:
        raise cannot_write(path, flag, error) from error


def nearest_folder(path: str | Path) -> Path:
    """The path, or the nearest one above it that is there."""
    path = Path(path).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def try_to_write(folder: str | Path, size: int) -> None:
    """Make a nameless file of so many bytes in a folder that is there, or is to be made; it is gone at once.

    Raises OSError.
    """
    with tempfile.TemporaryFile(dir=nearest_folder(folder)) as file:
        file.write(bytes(size))
        file.flush()


def why_not_writable(folder: str | Path) -> str:
    """Why no file can be made in a folder that is there, or is to be made; empty where one can."""
    try:
        try_to_write(folder, 2**16)
        return ""
    except OSError as error:
        return error.strerror or str(error)


# ---- Checking ----------------------------------------------------------------------------------


def zip_is_sound(file: str | Path | BinaryIO) -> bool:
    """Whether each part of an uncompressed ZIP file, such as torch.save writes, has the checksum noted beside it.

    Raises OSError where the file cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:    # it might blow up
                    return False
                if entry.external_attr != 0:                     # torch takes it for a folder and leaves it unread
                    return False
            return archive.testzip() is None
    except OSError:
        raise
    except Exception:                                            # zipfile raises many kinds for a damaged index
        return False


# ---- Names -------------------------------------------------------------------------------------


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """The paths that exist, the one changed last first."""
    times = {}
    for path in paths:
        with suppress(OSError):                                  # another process may just rename it
            times[path] = path.stat().st_mtime_ns
    return sorted(times, key=times.get, reverse=True)


def unused_path(folder: Path, name: str, suffix: str = "") -> Path:
    """The path of that name in a folder with the first number behind it that is not taken: out1, out2, ..."""
    number = 1
    while (folder / f"{name}{number}{suffix}").exists():
        number += 1
    return folder / f"{name}{number}{suffix}"


# ---- Locks -------------------------------------------------------------------------------------


@contextmanager
def hold_lock(place: Path, flag: str, advice: str, patience: float = 6.0) -> Iterator[None]:
    """Hold a file or folder that this process writes to; beside it stand a lock and the name of its owner.

    place: what is written to; flag: the option that chooses it; advice: what to do where another process holds it;
    patience: seconds to wait for that one, -1: as long as it takes. The operating system lets go for a process that
    dies. Raises UserError.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(place.with_name(f".{place.name}.lock"))
    owner = place.with_name(f".{place.name}.owner")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=patience)
    except Timeout:
        name = "another process"
        with suppress(OSError):                                  # it may just have ended, or be another user's
            name = owner.read_text(errors="replace")
        raise UserError(f"{place} is in use by {name}\n{advice}") from None
    except OSError as error:
        raise cannot_write(place.parent, flag, error) from error

    try:
        with suppress(OSError):                                  # a full disk is no reason not to start
            owner.unlink(missing_ok=True)                        # that of one that was killed
            command = shlex.join(sys.argv)
            owner.write_text(f"process {os.getpid()} on {platform.node()} since {time.ctime()}: {command}",
                             errors="replace")
        yield
    finally:
        with suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


LOOKING = threading.Lock()                                       # who looks takes the lock for a moment


def lock_holder(place: Path) -> int | None:
    """The process that holds a place by hold_lock: None if nobody does, 0 for one that is not known here."""
    from filelock import FileLock, Timeout

    file = place.with_name(f".{place.name}.lock")
    if not file.exists():
        return None
    try:
        with LOOKING, FileLock(file, timeout=0):
            return None
    except Timeout:
        pass
    except OSError:                                              # not ours to look at
        return None

    with suppress(OSError):
        owner = place.with_name(f".{place.name}.owner").read_text(errors="replace")
        match = re.match(r"process (\d{1,9}) on (.*?) since ", owner)
        if match and match[2] == platform.node():
            return int(match[1])
    return 0
