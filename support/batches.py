"""Batches: which tokens a step reads. Windows are here, documents.py has whole documents.

Letters: T time, tokens a row.
"""
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from support.documents import Padded, document_token
from support.machine import checksum
from support.shards import bytes_a_token, open_data, refuse_changes
from support.stages import stages_of


class StepPlan(NamedTuple):
    """What a step of a stage reads, in one process."""
    start: int                                       # the stage's first step
    window: int                                      # its first window, of all processes
    windows: int                                     # a step
    T: int                                           # tokens a row
    micro_batch: int                                 # rows


class Windows:
    """Windows of T tokens and one more, each once an epoch: in file order, or shuffled.

    Shuffled, every epoch is cut at a new offset. What a step reads is a pure function of its
    number: processes never overlap, never skip, and a run can be continued anywhere. Stages of
    shorter rows cut the same windows into pieces, so that they too read every token once.
    Raises SystemExit where there is less than a window, or a step cannot be shared evenly.
    """
    mask_documents = False

    def __init__(self, shards, cfg, rank: int = 0, world: int = 1,
                 shuffle: bool | None = None):
        self.cfg = cfg
        self.rank = rank
        self.world = world
        self.shuffle = cfg.shuffle if shuffle is None else shuffle
        self.drawn = None, None, 0                                     # see shuffled
        self.shards = list(shards.values())
        self.plan_stages()

        T = cfg.sequence_length
        spare = T - 1 if self.shuffle else 0                           # room for the offset
        windows = [max(0, (len(shard) - 1 - spare) // T) for shard in self.shards]
        if not sum(windows):
            raise SystemExit(f"{next(iter(shards))}: shorter than a sequence of {T:,} tokens: "
                             "lower --sequence_length")
        self.ends = np.cumsum(windows)

    def plan_stages(self):
        """Where stages begin, and what a step of each reads."""
        cfg = self.cfg
        self.stages = []
        start = window = 0
        for until, T, B in stages_of(cfg):
            sequences = B * cfg.grad_accumulation_steps                # in a step, all processes
            windows = sequences * T // cfg.sequence_length
            pieces = cfg.sequence_length // T                          # of a window
            rows = windows // self.world * pieces
            micro_batch = min(B, rows)
            if windows % self.world or rows % micro_batch:
                raise SystemExit(f"a step of {cfg.grad_accumulation_steps} x {B} sequences cannot "
                                 f"be shared evenly by {self.world} processes: change "
                                 "--grad_accumulation_steps")
            self.stages.append(StepPlan(start, window, windows // self.world, T, micro_batch))
            window += (until - start) * windows
            start = until
        # Targets, all processes; on average where stages differ.
        self.per_step = window * cfg.sequence_length // cfg.num_iterations

    def __len__(self):
        return int(self.ends[-1])

    def __str__(self):
        return (f"{self.targets(len(self)):,} tokens to predict, {len(self):,} windows in "
                f"{len(self.shards)} shards")

    @property
    def widths(self) -> list[int]:
        """Tokens a row may have, in validation."""
        return [self.cfg.sequence_length]

    def shapes(self) -> list[tuple[int, int]]:
        """Of all micro-batches: (rows, tokens a row)."""
        return [*dict.fromkeys((plan.micro_batch, plan.T) for plan in self.stages)]

    def first(self, tokens: int) -> int:
        """How many windows hold the first `tokens` targets: at least one, at most all."""
        return min(len(self), max(1, tokens // self.cfg.sequence_length))

    def targets(self, n: int) -> int:
        """How many tokens the first n windows predict."""
        return n * self.cfg.sequence_length

    def read(self, windows, offset: int = 0):
        """Numbers of windows -> their tokens (len(windows), T + 1) int64."""
        T = self.cfg.sequence_length
        rows = []
        for window in windows:
            s = int(np.searchsorted(self.ends, window, side="right"))
            before = self.ends[s - 1] if s else 0
            start = offset + T * int(window - before)
            rows.append(self.shards[s][start:start + T + 1])
        return np.stack(rows).astype(np.int64)

    def plan(self, step: int) -> StepPlan:
        """Of the last stage that has begun."""
        return [plan for plan in self.stages if plan.start <= step][-1]

    def shuffled(self, epoch: int) -> tuple[np.ndarray, int]:
        """An epoch's order of the windows, and where in the text its first one starts."""
        # Drawn anew in every step it would cost milliseconds where there are a million windows.
        if self.drawn[0] != epoch:
            rng = np.random.default_rng((self.cfg.seed, epoch))
            order = rng.permutation(len(self))
            self.drawn = epoch, order, int(rng.integers(self.cfg.sequence_length))
        return self.drawn[1:]

    def batch(self, step: int) -> Tensor:
        """This process's rows of a step, (rows, T + 1), T of its stage."""
        plan = self.plan(step)
        n = len(self)
        place = (step - plan.start) * self.world + self.rank
        numbers = plan.window + place * plan.windows + np.arange(plan.windows)
        parts = []
        for epoch in np.unique(numbers // n):
            windows = numbers[numbers // n == epoch] % n
            offset = 0
            if self.shuffle:
                order, offset = self.shuffled(epoch)
                windows = order[windows]
            parts.append(self.read(windows, offset))
        rows = torch.from_numpy(np.concatenate(parts))
        # A piece's last target is the next one's first input.
        return rows.unfold(1, plan.T + 1, plan.T).flatten(0, 1)

    def micro_batches(self, step: int):
        """-> [(tokens (rows, T + 1), weight of its loss)], targets predicted by all processes."""
        plan = self.plan(step)
        parts = self.batch(step).split(plan.micro_batch)
        predictions = plan.windows * self.world * self.cfg.sequence_length
        return [(rows, 1 / len(parts)) for rows in parts], predictions


class Packed(Windows):
    """The same windows, but tokens see their own document only.

    Nothing crosses a document's start: no attention, no convolution, no position. A window may
    begin or end inside a document. Nothing is padded, and attention costs less where its kernel
    skips what a mask hides. Mixers that cannot keep documents apart are refused: recurrent ones,
    and AFNO of many taps.
    """
    mask_documents = True


# --------------------------------------------------------------------------------------------------
# A run's batches

def prepare(batches, step: int, pin: bool):
    """A step's micro-batches as its row of BATCHES has them, on the host; pin: for the GPU."""
    refuse_changes(batches)
    parts, predictions = batches.micro_batches(step)
    if pin:
        parts = [(rows.pin_memory(), weight) for rows, weight in parts]
    return parts, predictions


class Data(NamedTuple):
    """What a run reads: objects of a row of BATCHES, and what the log says of them."""
    batches: Windows | Padded
    val_batches: Windows | Padded
    # Rows that are validated on
    val_n: int
    # The shards' own; the model's may be larger.
    vocab: int
    # {path: tokens}
    shards: dict
    val_shards: dict
    # Of validation text, a token; None: nobody has counted.
    text_bytes: float | None

    def shapes(self):
        """Of all micro-batches, and of all batches of validation: [(rows, tokens a row)]."""
        rows = self.val_batches.cfg.val_batch_size
        return self.batches.shapes(), [(rows, int(width)) for width in self.val_batches.widths]

    def checksums(self) -> dict[str, str]:
        """{path: checksum} of all shards."""
        return {path: checksum(path) for path in self.shards | self.val_shards}

    def identity(self, checksums) -> dict[str, list[str]]:
        """What a checkpoint keeps of the data, to know them again."""
        return {"training": [checksums[path] for path in self.shards],
                "validation": [checksums[path] for path in self.val_shards]}


def open_batches(cfg, row, rank: int, world: int):
    """-> cfg with the vocabulary and the document token of its shards, their Data.

    row: of BATCHES. SystemExit with one line for anything wrong with shards or sizes.
    """
    shards, val_shards, vocab = open_data(cfg)
    cfg = replace(cfg, vocab_size=cfg.vocab_size or vocab)
    make_batches, knobs = row
    if "document_token" in knobs:
        cfg = replace(cfg, document_token=document_token(cfg, shards, vocab))
    batches = make_batches(shards, cfg, rank, world)
    val_batches = make_batches(val_shards, cfg, shuffle=False)
    return cfg, Data(batches, val_batches, val_batches.first(cfg.val_tokens), vocab, shards,
                     val_shards, bytes_a_token(val_shards))
