"""Whole documents, padded and batched by length: the row `padded` of BATCHES in train_gpt2.py.

Letters: T time, tokens in the longest row.
"""
import math

import numpy as np
import torch

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

    The same interface as Windows in batches.py. Raises SystemExit where a step cannot be shared
    evenly, or nothing is there to predict.
    """
    mask_documents = False
    needs = {"shuffle": ((True,), "documents of one length would follow one another"),
             "stages": (("",), "rows are as long as documents are")}

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
