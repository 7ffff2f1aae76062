"""Signals: which of them end a run behind its step, saved."""
import signal
import threading

# A second one of these ends the run at once. SIGQUIT always does: some way out must not wait for a
# step. Windows has only the first two.
ENDS = ("SIGINT", "SIGTERM", "SIGHUP")
# A batch system's, some minutes before it kills, and that of a limit of CPU seconds, which comes
# again every second.
WARNINGS = ("SIGUSR1", "SIGXCPU")


class Signals:
    """From listen() to the end of the block WARNINGS and a first of ENDS are but noted."""
    def __init__(self):
        self.caught = 0                              # its number
        self.before = {}

    def __enter__(self):
        return self

    def listen(self):
        # Only the main thread may; others run as before.
        if threading.current_thread() is not threading.main_thread():
            return
        for names, handler in ((ENDS, self.end), (WARNINGS, self.warn)):
            for number in filter(None, (getattr(signal, name, None) for name in names)):
                # Ignored on purpose: by nohup, or by a shell that runs us in the background.
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, handler)

    def warn(self, number, frame):
        self.caught = number

    def end(self, number, frame):
        self.caught = number
        # At once, for good: not the handler that was there before.
        for other in self.before:
            if signal.Signals(other).name in ENDS:
                signal.signal(other, signal.SIG_DFL)

    def leave(self, step: int, saved: int, log):
        """End the run behind a step; saved: the step of the last checkpoint."""
        number = self.caught or signal.SIGTERM       # another process may have caught it
        log(f"stopped by {signal.Signals(number).name} after step {step}, the last "
            f"checkpoint is of step {saved}: go on with --resume {log.dir}")
        raise SystemExit(128 + number)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
