"""Batches: which tokens a step reads. The rows of BATCHES in train_gpt2.py; shards: shards.py.

Windows of a stream of tokens, or whole documents, padded and batched by length.

Letters: T time, tokens in the longest row.
"""
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from support.machine import checksum
from support.shards import bytes_a_token, open_data, refuse_changes

# --------------------------------------------------------------------------------------------------
# Windows

class Windows:
    """Windows of T tokens and one more, each once an epoch: in file order, or shuffled.

    Shuffled, every epoch is cut at a new offset. What a step reads is a pure function of its
    number: processes never overlap, never skip, and a run can be continued anywhere.
    Raises SystemExit where there is less than a window, or a step cannot be shared evenly.
    """
    mask_documents = False

    def __init__(self, shards, cfg, rank: int = 0, world: int = 1,
                 shuffle: bool | None = None):
        self.cfg = cfg
        self.rank = rank
        self.world = world
        self.shuffle = cfg.shuffle if shuffle is None else shuffle
        self.shards = list(shards.values())

        sequences = cfg.batch_size * cfg.grad_accumulation_steps       # in a step, all processes
        self.rows = sequences // world
        self.micro_batch = min(cfg.batch_size, self.rows)
        if sequences % world or self.rows % self.micro_batch:
            raise SystemExit(f"a step of {cfg.grad_accumulation_steps} x {cfg.batch_size} sequences"
                             f" cannot be shared evenly by {world} processes: change "
                             "--grad_accumulation_steps")

        T = cfg.sequence_length
        spare = T - 1 if self.shuffle else 0                           # room for the offset
        windows = [max(0, (len(shard) - 1 - spare) // T) for shard in self.shards]
        if not sum(windows):
            raise SystemExit(f"{next(iter(shards))}: shorter than a sequence of {T:,} tokens: "
                             "lower --sequence_length")
        self.ends = np.cumsum(windows)
        self.per_step = cfg.tokens_per_step                            # targets, all processes

    def __len__(self):
        return int(self.ends[-1])

    def __str__(self):
        return (f"{self.targets(len(self)):,} tokens to predict, {len(self):,} windows in "
                f"{len(self.shards)} shards")

    @property
    def widths(self) -> list[int]:
        """Tokens a row may have."""
        return [self.cfg.sequence_length]

    def shapes(self) -> list[tuple[int, int]]:
        """Of all micro-batches: (rows, tokens a row)."""
        return [(self.micro_batch, self.cfg.sequence_length)]

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

    def batch(self, step: int) -> Tensor:
        """This process's sequences of a step, (rows, T + 1)."""
        n = len(self)
        numbers = (step * self.world + self.rank) * self.rows + np.arange(self.rows)
        parts = []
        for epoch in np.unique(numbers // n):
            windows = numbers[numbers // n == epoch] % n
            offset = 0
            if self.shuffle:
                rng = np.random.default_rng((self.cfg.seed, epoch))
                windows = rng.permutation(n)[windows]
                offset = int(rng.integers(self.cfg.sequence_length))
            parts.append(self.read(windows, offset))
        return torch.from_numpy(np.concatenate(parts))

    def micro_batches(self, step: int):
        """-> [(tokens (rows, T + 1), weight of its loss)], targets predicted by all processes."""
        parts = self.batch(step).split(self.micro_batch)
        return [(rows, 1 / len(parts)) for rows in parts], self.cfg.tokens_per_step


class Packed(Windows):
    """The same windows, but tokens see their own document only.

    A window may begin or end inside a document. Nothing is padded, and attention costs less where
    its kernel skips what a mask hides. Mixers that cannot mask documents are refused.
    """
    mask_documents = True


# --------------------------------------------------------------------------------------------------
# Documents

# How many widths padded rows have: each is compiled by itself. Of documents of 740 tokens on
# average, log-normal like web text's, six make 10% padding at T = 1024, and ten 6%.
WIDTHS = 6

# {vocabulary: token that starts a document}: GPT-2's and Qwen's
DOCUMENT_TOKENS = {50257: 50256, 151665: 151643}


def document_token(cfg, shards, vocab: int) -> int:
    """The token that starts a document in shards of `vocab` tokens.

    Raises SystemExit with one line where none is known, or none is there. With --estimate the model
    may have another vocabulary than the shards, which are then not looked into.
    """
    other_vocab = cfg.estimate and cfg.vocab_size != vocab
    size = cfg.vocab_size if other_vocab else vocab
    token = cfg.document_token
    if token < 0:
        token = DOCUMENT_TOKENS.get(size, size)
    if token >= size:
        raise SystemExit(f"--batches {cfg.batches}: no token of a vocabulary of {size:,} is known "
                         "to start a document: name one by --document_token")
    if not other_vocab and not any((tokens == token).any() for tokens in shards.values()):
        raise SystemExit(f"{next(iter(shards))}: no document starts with token {token}: "
                         "see --document_token")
    return token


def pieces_of(shard, token: int, T: int):
    """Where the documents of a shard lie, in pieces of at most T -> starts, lengths, documents."""
    bounds = np.unique([0, *np.flatnonzero(shard == token), len(shard) - 1])
    pieces = -(-np.diff(bounds) // T)                                  # of each document
    first_piece = np.cumsum(pieces) - pieces
    number_in_document = np.arange(pieces.sum()) - np.repeat(first_piece, pieces)
    start = np.repeat(bounds[:-1], pieces) + T * number_in_document
    length = np.minimum(T, np.repeat(bounds[1:], pieces) - start)
    return start, length, len(pieces)


def best_widths(lengths, T: int) -> np.ndarray:
    """At most WIDTHS widths, multiples of 8 or T, that pad rows of these lengths the least.

    A row is padded to the next width. By dynamic programming over the widths that occur.
    """
    width, count = np.unique(np.minimum(T, -(-lengths // 8) * 8), return_counts=True)
    rows = np.cumsum(count)                          # no wider than a width
    tokens = width * rows                            # padded, if one width is all
    earlier = []
    for _ in range(min(WIDTHS, len(width)) - 1):
        # One width more: up to width j as before, all rows from there up to width i padded to i.
        total = (tokens[:, None] + width * (rows - rows[:, None])).astype(float)
        total[np.tril_indices(len(width))] = math.inf
        earlier.append(total.argmin(0))
        tokens = total.min(0)
    chosen = [len(width) - 1]
    for j in reversed(earlier):
        chosen.append(j[chosen[-1]])
    return width[chosen[::-1]]


def fill(rows: np.ndarray, n: int) -> np.ndarray:
    """Rows without targets behind `rows`, up to n: what is compiled needs one shape."""
    return np.pad(rows, ((0, n - len(rows)), (0, 0)), constant_values=-1)


class Padded:
    """Documents of like lengths together, padded at the end; longer ones than T in several pieces.

    A row is a document's tokens and the next document's first, which ends it: an epoch predicts
    every token of a shard but the first. A micro-batch takes as many rows of one of the few
    `widths` as fit into batch_size * T tokens. Targets behind the end are -1, which no loss counts,
    and what stands there is not seen from before: any causal mixer will do.

    The same interface as Windows. Raises SystemExit where a step cannot be shared
    evenly, or nothing is there to predict.
    """
    mask_documents = False
    needs = {"shuffle": ((True,), "documents of one length would follow one another")}

    def __init__(self, shards, cfg, rank: int = 0, world: int = 1, shuffle: bool = True):
        if cfg.grad_accumulation_steps % world:
            raise SystemExit(f"{cfg.grad_accumulation_steps} micro-batches of documents cannot be "
                             f"shared evenly by {world} processes: change "
                             "--grad_accumulation_steps")
        self.cfg = cfg
        self.rank = rank
        self.world = world
        self.shards = list(shards.values())
        self.documents = 0
        found = []
        for s, shard in enumerate(self.shards):
            start, length, documents = pieces_of(shard, cfg.document_token, cfg.sequence_length)
            found.append(np.stack((np.full_like(start, s), start, length)))
            self.documents += documents
        self.shard, self.start, self.length = np.concatenate(found, axis=1)
        if not len(self.length):
            raise SystemExit(f"{next(iter(shards))}: holds a single token: nothing to predict")
        self.widths = best_widths(self.length, cfg.sequence_length)
        self.cut_micro_batches()

    def width(self, longest: int) -> int:
        """Columns of a micro-batch whose longest row has so many tokens."""
        return int(self.widths[np.searchsorted(self.widths, longest)])

    def rows(self, width: int) -> int:
        """Rows of a micro-batch."""
        return self.cfg.batch_size * self.cfg.sequence_length // width

    def shapes(self) -> list[tuple[int, int]]:
        """Of all micro-batches: (rows, tokens a row)."""
        return [(self.rows(int(width)), int(width)) for width in self.widths]

    def cut_micro_batches(self):
        """Where micro-batches begin among pieces sorted by length: the same in every epoch."""
        lengths = np.sort(self.length)[::-1]
        begins = [0]
        self.padded = 0
        while begins[-1] < len(lengths):
            width = self.width(int(lengths[begins[-1]]))
            begins.append(min(len(lengths), begins[-1] + self.rows(width)))
            self.padded += width * self.rows(width)
        self.begins = np.array(begins)
        self.predictions = np.add.reduceat(lengths, begins[:-1])       # of each micro-batch
        # On average: steps of documents are not all of one size.
        self.per_step = round(self.cfg.grad_accumulation_steps * self.predictions.mean())
        self.plan = (None, None, None)

    def __len__(self):
        return len(self.length)

    def __str__(self):
        tokens = self.targets(len(self))
        return (f"{tokens:,} tokens to predict, {self.documents:,} documents of "
                f"{tokens / self.documents:,.0f} on average, in {len(self):,} pieces of at most "
                f"{self.cfg.sequence_length:,}, {1 - tokens / self.padded:.1%} padding")

    def first(self, tokens: int) -> int:
        """How many pieces hold the first `tokens` targets: one at least."""
        return max(1, int(np.searchsorted(np.cumsum(self.length), tokens, side="right")))

    def targets(self, n: int) -> int:
        """How many tokens the first n pieces predict."""
        return int(self.length[:n].sum())

    def read(self, pieces):
        """Numbers of pieces -> rows (len(pieces), width + 1) int64, -1 behind a document's end."""
        width = self.width(int(self.length[pieces].max()))
        rows = np.full((len(pieces), width + 1), -1, np.int64)
        for row, piece in zip(rows, pieces):
            start = self.start[piece]
            n = self.length[piece]
            row[:n + 1] = self.shards[self.shard[piece]][start:start + n + 1]
        return rows

    def epoch(self, number: int):
        """-> pieces sorted by length, equal ones in random order; the order of micro-batches."""
        if self.plan[0] != number:
            rng = np.random.default_rng((self.cfg.seed, number))
            pieces = rng.permutation(len(self))
            pieces = pieces[np.argsort(-self.length[pieces], kind="stable")]
            self.plan = number, pieces, rng.permutation(len(self.predictions))
        return self.plan[1:]

    def micro_batches(self, step: int):
        """-> [(tokens (rows, width + 1), weight of its loss)], targets of all processes."""
        M = self.cfg.grad_accumulation_steps
        n = len(self.predictions)
        mine = []
        total = 0
        for i in range(M):
            epoch, place = divmod(step * M + i, n)
            pieces, order = self.epoch(epoch)
            b = order[place]
            total += int(self.predictions[b])
            if i % self.world == self.rank:
                rows = self.read(pieces[self.begins[b]:self.begins[b + 1]])
                rows = fill(rows, self.rows(rows.shape[1] - 1))
                mine.append((torch.from_numpy(rows), self.predictions[b]))
        return [(rows, float(count * self.world / total)) for rows, count in mine], total


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

    def val_shapes(self) -> list[tuple[int, int]]:
        """Of all batches of validation: (rows, tokens a row)."""
        rows = self.val_batches.cfg.val_batch_size
        return [(rows, int(width)) for width in self.val_batches.widths]

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
