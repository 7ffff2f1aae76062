"""What the commands in this folder share: one line, whatever is in it; signals; a folder of work
that is removed with the run, or by the next one where it was killed.
"""
import os
import shlex
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:         # Windows has none: there, the folders of killed runs stay
    fcntl = None

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
           if hasattr(signal, name)]


def printable(text):
    """Text -> one line: a newline, or what a terminal may not show, is spelled as in Python."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def quoted(text):
    """Text -> one word of a shell, in one line: $'…' is that of bash and zsh."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + printable(text.replace("\\", "\\\\").replace("'", "\\'")) + "'"


class Stopped(BaseException):
    """A signal came: no Exception, which who reads from a network takes for one of its own."""


def run(main, name, kept):
    """main(). SIGINT, SIGTERM and SIGHUP end it in one line and with exit code 128 + signal.

    Those that were ignored from the start, as after nohup, stay so.
    """
    def stop(number, _):
        for other in SIGNALS:       # cleaning up takes a moment
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        main()
    except Stopped as e:
        with suppress(OSError):     # after SIGHUP there may be no terminal
            print(f"{name}: stopped; {kept}", file=sys.stderr, flush=True)
        raise SystemExit(128 + e.args[0]) from None


def lock(folder, wait):
    """Lock a folder -> its descriptor; None where another has it, is gone, or cannot be locked."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return descriptor
    except OSError:
        os.close(descriptor)


@contextmanager
def unfinished(out):
    """Path -> a new folder .unfinished_* in it, removed at the end. OSError where none can be.

    It is locked while its process lives: the system ends the lock with the process, however that
    ends. So unlocked ones are of killed runs, and are removed here. Between two machines this needs
    a file system that shares its locks.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob(".unfinished_*"):
        if (descriptor := lock(old, wait=False)) is not None:
            shutil.rmtree(old, ignore_errors=True)
            os.close(descriptor)
    while True:
        folder = tempfile.mkdtemp(dir=out, prefix=".unfinished_")
        descriptor = lock(folder, wait=True)
        if os.path.isdir(folder):
            break
        # Another run has removed it before it was locked.
        if descriptor is not None:
            os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def undisturbed(out):
    """Signals are ignored meanwhile, and other runs wait that want the same: for a short moment."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    descriptor = lock(out, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        for number, handler in before.items():
            signal.signal(number, handler)
