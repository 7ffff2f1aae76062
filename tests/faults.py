"""A process that trains in forked children and kills them: python tests/faults.py PLAN.json.

Importing torch once instead of a hundred times is what makes thirty kills affordable. The plan is
a list of [fields of Config, seconds after its first line or words of a log or null, number of a
signal], a run each; prints their exit codes as JSON.
"""
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def size(logs):
    return sum(log.stat().st_size for log in logs.glob("*/log.txt"))


def child(config, kill, number):
    """Train in a fork; kill it so many seconds after its first line in a log, or when a log has
    these words -> its exit code, as a shell has it."""
    from train_gpt2 import Config, main
    logs = Path(config["output_dir"])
    before = size(logs)
    pid = os.fork()
    if not pid:
        # A shell may have started us with it ignored.
        if number not in (0, signal.SIGKILL):
            signal.signal(number, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            main(Config(**config))
        except SystemExit as e:
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr, flush=True)
            os._exit(e.code if isinstance(e.code, int) else 1)
        except BaseException as e:
            print(repr(e), file=sys.stderr, flush=True)
            os._exit(99)
        os._exit(0)
    if isinstance(kill, str):
        while not any(kill in log.read_text() for log in logs.glob("*/log.txt")):
            time.sleep(0.01)
    elif kill is not None:
        while size(logs) == before:
            time.sleep(0.001)
        time.sleep(kill)
    if kill is not None:
        os.kill(pid, number)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    # What torch.optim imports at its first step takes each child a second.
    import torch._dynamo
    torch.set_num_threads(1)
    plan = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([child(*run) for run in plan]))
