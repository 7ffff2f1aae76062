"""--stages: what a step reads early in a run, where that is other than later.

Letters: T tokens a row, B rows a micro-batch.
"""
import re
from typing import NamedTuple


class Stage(NamedTuple):
    """Steps that share the sizes of their batches."""
    until: int                                       # the first step behind it
    T: int                                           # tokens a row
    B: int                                           # rows a micro-batch


def parse(words: str) -> list[Stage]:
    """"256x32@500,512x16@800" -> stages: rows of 256 tokens, 32 to a micro-batch until step 500."""
    stages = []
    for word in filter(None, words.split(",")):
        found = re.fullmatch(r"(\d{1,8})x(\d{1,8})@(\d{1,10})", word)
        if not found or not all(map(int, found.groups())):
            raise ValueError(f"--stages {words}: {word!r} is not tokens x rows @ step, as in "
                             "256x32@500")
        T, B, until = map(int, found.groups())
        stages.append(Stage(until, T, B))
    return stages


def stages_of(cfg) -> list[Stage]:
    """What --stages says, and the flags' own sizes behind it."""
    return [*parse(cfg.stages), Stage(cfg.num_iterations, cfg.sequence_length, cfg.batch_size)]


def check_stages(cfg):
    """Refuse stages that end in no order, and rows that do not make whole windows."""
    T = cfg.sequence_length
    before = 0
    for until, length, rows in parse(cfg.stages):
        name = f"--stages {length}x{rows}@{until}"
        if not before < until < cfg.num_iterations:
            raise ValueError(f"{name}: must end behind step {before}, where the stage before does, "
                             f"and before the run's end at {cfg.num_iterations}")
        # The longest rows say on which grid kernels live.
        if T % length:
            raise ValueError(f"{name}: rows of {T}, the --sequence_length, must be a multiple of "
                             f"{length} tokens long")
        tokens = length * rows * cfg.grad_accumulation_steps
        if tokens % T:
            raise ValueError(f"{name}: a step of {tokens:,} tokens is not a whole number of "
                             f"windows of {T}: change the number of rows")
        before = until
