"""A process that trains in forked children and kills them: python tests/faults.py PLAN.json.

Importing torch once instead of a hundred times is what makes thirty kills affordable. The plan is
{"config": fields of Config, "kills": [seconds, words of a log or null], "signal": number}: one run
a kill, each goes on from the last; prints their exit codes as JSON.
"""
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def child(config, kill, number):
    """Train in a fork; kill it after so many seconds, or when a log has these words -> its exit
    code, as a shell has it."""
    from train_gpt2 import Config, main
    pid = os.fork()
    if not pid:
        # A shell may have started us with it ignored.
        if number != signal.SIGKILL:
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
        logs = Path(config["output_dir"])
        while not any(kill in log.read_text() for log in logs.glob("*/log.txt")):
            time.sleep(0.01)
    elif kill is not None:
        time.sleep(kill)
    if kill is not None:
        os.kill(pid, number)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    import torch
    torch.set_num_threads(1)
    plan = json.loads(Path(sys.argv[1]).read_text())
    codes = []
    for kill in plan["kills"]:
        codes.append(child(plan["config"], kill, plan["signal"]))
    print(json.dumps(codes))
