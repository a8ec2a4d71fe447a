"""The command line `msdiff`.

Exit codes: 0 for success; 1 for a bug, with its traceback; 2 for a user error, a full disk or Ctrl-C, with one line;
141 (128 + SIGPIPE, as of programs that a closed pipe ends) if the reader of the output has closed the pipe.

Heavy modules are imported only after a command is named, so `msdiff --help` answers at once.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from .errors import explained
from .escaping import shown
from .parsing import SUMMARIES, parse
from .progress import Progress, shown_reading
from .version import __version__

OVERVIEW = """\
usage: msdiff COMMAND ...

Train diffusion models faster: one shared encoder, a tailored decoder for every noise range.

{commands}

msdiff COMMAND --help shows a command's options, with examples; msdiff --version the version.
msdiff --print-completion bash (or zsh) prints what lets a shell complete commands and options.
--debug (or MSDIFF_DEBUG=1) shows the traceback of every error.

Examples
  msdiff demo
  msdiff quickstart photos/ --out runs/photos
  msdiff train --preset digits --stages stages.json --out runs/digits
  msdiff sample runs/photos --count 64 --out grid.png
"""

SHELLS = ("bash", "zsh")  # for which completion scripts are made
_LONGEST = 1000  # characters of a message


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given or os.environ.get("MSDIFF_DEBUG", "") not in ("", "0")
    name, *arguments = [argument for argument in given if argument != "--debug"] or ["--help"]
    for stream in _streams():
        if isinstance(stream, io.TextIOWrapper):  # characters outside the terminal's encoding are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _answer(name, arguments, debug)
        sys.stdout.flush()  # a closed pipe raises here, not at interpreter exit
    except BrokenPipeError:
        _discard(_closed())
        return 128 + signal.SIGPIPE
    except OSError as error:
        _discard([sys.stdout])
        return _fail(f"standard output: cannot be written ({error.strerror or error})", debug)
    return code


def entry() -> NoReturn:
    """Run the command line of this process and end it.

    After an error or Ctrl-C the process ends without taking the interpreter down, which takes seconds once torch is loaded.
    """
    code = main()
    if code == 2:
        atexit._run_exitfuncs()  # worker processes end, temporary files go
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _streams() -> tuple[TextIO, TextIO]:
    """Return standard output and standard error; where the caller has closed them, what is written goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the life of the process
    return sys.stdout, sys.stderr


def _answer(name: str, arguments: Sequence[str], debug: bool) -> int:
    if name in ("-h", "--help"):
        print(OVERVIEW.format(commands="\n".join(f"  {n:<13}{text}" for n, text in SUMMARIES.items())), end="")
        return 0
    if name == "--version":
        print(f"msdiff {__version__}")
        return 0
    if name == "--print-completion":
        return _print_completion(arguments, debug)
    with warnings.catch_warnings(), _messages_printed():
        told: set[str] = set()  # the same from two places is one

        def show(message: Warning | str, *_: object, **__: object) -> None:
            if str(message) not in told:
                told.add(str(message))
                _warn(message)

        warnings.showwarning = show
        return _run(name, arguments, debug)


def _print_completion(arguments: Sequence[str], debug: bool) -> int:
    """Print the script that completes commands, options and their values in a shell."""
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        return _fail(f"--print-completion {' '.join(arguments)}: name one shell, {' or '.join(SHELLS)}", debug)
    import tyro

    from .commands import COMMANDS

    asked = ("--tyro-print-completion", arguments[0])
    try:
        tyro.extras.subcommand_cli_from_dict(
            dict(COMMANDS), prog="msdiff", args=asked, config=(tyro.conf.FlagCreatePairsOff,)
        )
    except SystemExit as stop:
        return int(stop.code or 0)
    except ImportError as error:  # releases of tyro before 1.0 need shtab
        return _fail(f"--print-completion: {error}", debug)
    return 0


def _run(name: str, arguments: Sequence[str], debug: bool) -> int:
    try:
        with _ended_at_once():
            command = parse(name, arguments)
        _prepare_process(command)
        with _terminated_in_order():
            command.run()
    except KeyboardInterrupt as interrupt:
        return _fail(interrupt if interrupt.args else "interrupted", debug)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _closed():
            raise
        if _interrupted(error):
            return _fail("interrupted", debug)
        line = explained(error)
        if line is None:
            return _bug()
        return _fail(line, debug)
    return 0


@contextlib.contextmanager
def _ended_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once: some modules written in C answer them, in their import, by own errors."""
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(number: int, _: object) -> None:
        os.write(2, b"msdiff: interrupted\n" if number == signal.SIGINT else b"msdiff: terminated\n")
        os._exit(2)

    with _answered_by(end, signal.SIGINT, signal.SIGTERM):
        yield


@contextlib.contextmanager
def _terminated_in_order() -> Iterator[None]:
    """Answer SIGTERM as Ctrl-C: temporary files are removed, worker processes end."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return

    def terminate(*_: object) -> None:
        raise KeyboardInterrupt("terminated")

    with _answered_by(terminate, signal.SIGTERM):
        yield


@contextlib.contextmanager
def _answered_by(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Answer signals by a handler, and then again as before; None stands for a handler that Python did not set."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, signal.SIG_DFL if own is None else own)


def _interrupted(error: BaseException) -> bool:
    """Return whether an exception comes from Ctrl-C, which the import of a module written in C may replace by its own."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, KeyboardInterrupt):
            return True
        found = found.__cause__ or found.__context__
    return False


def _prepare_process(command: Any) -> None:
    """Make settings of the whole process, which library calls must not make, for a command that computes."""
    if hasattr(command, "device"):
        from .performance.devices import keep_memory, resolve_device

        keep_memory(resolve_device(command.device))


def _closed() -> list[TextIO]:
    """Return standard output and standard error as far as they are pipes that nobody reads."""
    found = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor is not a pipe
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
            found += [stream for _, event in poll.poll(0) if event & select.POLLERR]
    return found


def _discard(streams: Iterable[TextIO]) -> None:
    """Discard the buffered output of streams that cannot be written, so that the interpreter exits silently."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nothing, stream.fileno())
    os.close(nothing)


def _fail(message: object, debug: bool) -> int:
    if debug:
        _trace()
    _say(message)
    return 2


def _bug() -> int:
    _trace()
    _say("this is a bug, please report it with the lines above and the command")
    return 1


def _trace() -> None:
    sys.stderr.write(shown(traceback.format_exc(), lines=True))


def _warn(message: object) -> None:
    from .distributed import is_main_process

    if is_main_process():  # print the warning once, not once per process
        _say(f"warning: {message}")


class _Reporter(logging.Handler):
    """Prints log messages on the main process; the same from two openings of a data set is one."""

    def __init__(self) -> None:
        super().__init__()
        self._told = set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        from .distributed import is_main_process

        message = record.getMessage()
        if message not in self._told and is_main_process():
            self._told.add(message)
            _say(message, start="")


@contextlib.contextmanager
def _messages_printed() -> Iterator[None]:
    """Print the library's log messages about data sets and resumed runs, and show how far the reading of images is."""
    loggers, teller = [logging.getLogger(f"{__package__}.{name}") for name in ("data", "workflow")], _Reporter()
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(teller)
        logger.setLevel(logging.INFO)
    before = shown_reading.set(_reading_bar)
    try:
        yield
    finally:
        shown_reading.reset(before)
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(teller)
            logger.setLevel(level)


@contextlib.contextmanager
def _reading_bar() -> Iterator[Progress]:
    """Show how many images have been read."""
    from .console import Bar

    with Bar("reading", "images") as bar:
        yield bar


def _say(message: object, start: str = "msdiff: ") -> None:
    # one write, newline included: several processes may print at once
    text = shown(" ".join(str(message).split()))
    if len(text) > _LONGEST:  # a key or path of thousands of characters would hide the rest of the message
        half = _LONGEST // 2
        text = f"{text[:half]} … {text[-half:]}"
    try:
        sys.stderr.write(f"{start}{text}\n")
        sys.stderr.flush()
    except OSError as error:  # a full disk behind standard error is not reported: there is no other place
        if isinstance(error, BrokenPipeError):
            raise


if __name__ == "__main__":
    entry()
