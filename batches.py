"""What a step trains on: a row of BATCHES in train_gpt2.py names one of these classes. Letters: T time.

`micro_batches(step)` is a pure function of the step, so processes never overlap, never skip, and a run can be continued
anywhere. A step is the same tokens however many processes share it.
"""
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch

DOCUMENT_TOKENS = {50257: 50256, 151665: 151643}            # {vocabulary: token that starts a document}


def document_token(cfg, shards, vocab):
    """The token that starts a document in shards of `vocab` tokens. Raises SystemExit: none is known, or none is there.

    A model of another vocabulary may be estimated on any shards; these are then not looked into.
    """
    others = cfg.estimate and cfg.vocab_size != vocab
    size = cfg.vocab_size if others else vocab
    token = cfg.document_token if cfg.document_token >= 0 else DOCUMENT_TOKENS.get(size, size)
    if token >= size:
        raise SystemExit(f"--batches {cfg.batches}: no token of a vocabulary of {size:,} is known to start a document: "
                         "name one by --document_token")
    if not others and not any((tokens == token).any() for tokens in shards.values()):
        raise SystemExit(f"{next(iter(shards))}: no document starts with token {token}: see --document_token")
    return token


class Windows:
    """Windows of T tokens and one more, each once an epoch: in file order, or shuffled, then also cut at a new offset.

    Raises SystemExit where there is less than a window, or a step cannot be shared evenly.
    """
    apart = False                                           # may tokens see those of another document? yes

    def __init__(self, shards, cfg, rank=0, world=1, shuffle=None):
        self.cfg, self.shards, self.rank, self.world = cfg, list(shards.values()), rank, world
        self.shuffle = cfg.shuffle if shuffle is None else shuffle
        self.share_step()
        self.index(next(iter(shards)))

    def share_step(self):
        total = self.cfg.batch_size * self.cfg.grad_accumulation_steps               # sequences a step, all processes
        self.rows, self.micro_batch = total // self.world, min(self.cfg.batch_size, total // self.world)
        if total % self.world or self.rows % self.micro_batch:
            raise SystemExit(f"a step of {self.cfg.grad_accumulation_steps} x {self.cfg.batch_size} sequences cannot "
                             f"be shared evenly by {self.world} processes: change --grad_accumulation_steps")

    def index(self, path):
        T = self.cfg.sequence_length
        windows = [max(0, (len(s) - 1 - (T - 1) * self.shuffle) // T) for s in self.shards]
        if not sum(windows):
            raise SystemExit(f"{path}: shorter than a sequence of {T:,} tokens: lower --sequence_length")
        self.ends, self.per_step = np.cumsum(windows), self.cfg.tokens_per_step       # targets, by all processes

    def __len__(self):
        return int(self.ends[-1])

    def __str__(self):
        return f"{self.targets(len(self)):,} tokens to predict, {len(self):,} windows in {len(self.shards)} shards"

    def first(self, tokens):
        """How many windows hold the first `tokens` targets: one at least, and no more than there are."""
        return min(len(self), max(1, tokens // self.cfg.sequence_length))

    def targets(self, n):
        """How many tokens the first n windows predict."""
        return n * self.cfg.sequence_length

    def read(self, windows, offset=0):                      # window numbers (rows,) -> (rows, T + 1) int64
        T, rows = self.cfg.sequence_length, []
        for w in windows:
            s = int(np.searchsorted(self.ends, w, side="right"))
            start = offset + T * int(w - (self.ends[s - 1] if s else 0))
            rows.append(self.shards[s][start:start + T + 1])
        return np.stack(rows).astype(np.int64)

    def batch(self, step):                                  # this process's sequences of a step, (rows, T + 1)
        n, parts = len(self), []
        numbers = (step * self.world + self.rank) * self.rows + np.arange(self.rows)
        for epoch in np.unique(numbers // n):
            windows, offset = numbers[numbers // n == epoch] % n, 0
            if self.shuffle:
                rng = np.random.default_rng((self.cfg.seed, epoch))
                windows, offset = rng.permutation(n)[windows], int(rng.integers(self.cfg.sequence_length))
            parts.append(self.read(windows, offset))
        return torch.from_numpy(np.concatenate(parts))

    def micro_batches(self, step):
        """-> [(tokens (rows, T + 1), its share of the step's loss)], targets predicted by all processes."""
        parts = self.batch(step).split(self.micro_batch)
        return [(rows, 1 / len(parts)) for rows in parts], self.cfg.tokens_per_step

    def stream(self, device, start=0):
        """Steps, forever: [(inputs, targets, share)], predictions. A thread prepares the next while this one runs."""
        def prepare(step):
            rows, predictions = self.micro_batches(step)
            return [(r.pin_memory() if device.type == "cuda" else r, share) for r, share in rows], predictions
        with ThreadPoolExecutor(1) as pool:
            ready = pool.submit(prepare, start)
            for step in count(start + 1):
                (rows, predictions), ready = ready.result(), pool.submit(prepare, step)
                rows = [(r.to(device, non_blocking=True), share) for r, share in rows]
                yield [(r[:, :-1].clamp(min=0), r[:, 1:], share) for r, share in rows], predictions


class Packed(Windows):
    """The same windows, but tokens see their own document only. A window may begin or end inside a document.

    Nothing is padded, and attention costs less, where its kernel skips what a mask hides. Mixers that cannot keep
    documents apart are refused.
    """
    apart = True


class Padded(Windows):
    """Whole documents, of like lengths together, padded at the end; those of more than T tokens in several pieces.

    A row is a document's tokens and the next document's first, which ends it: an epoch predicts every token of a shard
    but the first. A micro-batch takes as many rows of one width, a multiple of 8 or T, as fit into batch_size * T
    tokens. Targets behind the end are -1, which no loss counts, and what stands there is not seen from before: any
    causal mixer will do. Compiled, attention has one graph for all widths; mixers of chunks or long kernels have one a
    width, and from torch's eighth on run uncompiled.
    """
    needs = {"shuffle": ((True,), "documents of one length would follow one another")}

    def share_step(self):
        if self.cfg.grad_accumulation_steps % self.world:
            raise SystemExit(f"{self.cfg.grad_accumulation_steps} micro-batches of documents cannot be shared evenly "
                             f"by {self.world} processes: change --grad_accumulation_steps")

    def index(self, path):
        T, found, self.documents = self.cfg.sequence_length, [], 0
        for s, shard in enumerate(self.shards):
            bounds = np.unique([0, *np.flatnonzero(shard == self.cfg.document_token), len(shard) - 1])
            pieces = -(-np.diff(bounds) // T)               # of each document
            start = np.repeat(bounds[:-1], pieces) + T * (np.arange(pieces.sum()) - np.repeat(
                np.cumsum(pieces) - pieces, pieces))
            length = np.minimum(T, np.repeat(bounds[1:], pieces) - start)
            found.append(np.stack((np.full_like(start, s), start, length)))
            self.documents += len(pieces)
        self.shard, self.start, self.length = np.concatenate(found, axis=1)
        if not len(self.length):
            raise SystemExit(f"{path}: holds a single token: nothing to predict")
        self.cut()

    def cut(self):
        """Where micro-batches begin among pieces sorted by length: the same in any epoch, whatever their order."""
        lengths, T, begins, self.padded = np.sort(self.length)[::-1], self.cfg.sequence_length, [0], 0
        while begins[-1] < len(lengths):
            width = min(T, -(-int(lengths[begins[-1]]) // 8) * 8)
            begins.append(min(len(lengths), begins[-1] + self.cfg.batch_size * T // width))
            self.padded += width * (begins[-1] - begins[-2])
        self.begins, self.sums = np.array(begins), np.add.reduceat(lengths, begins[:-1])
        self.per_step = round(self.cfg.grad_accumulation_steps * self.sums.mean())   # on average
        self.plan = None, None, None

    def __len__(self):
        return len(self.length)

    def __str__(self):
        tokens, T = self.targets(len(self)), self.cfg.sequence_length
        return (f"{tokens:,} tokens to predict, {self.documents:,} documents of {tokens / self.documents:,.0f} on "
                f"average, in {len(self):,} pieces of at most {T:,}, {1 - tokens / self.padded:.1%} padding")

    def first(self, tokens):
        return max(1, int(np.searchsorted(np.cumsum(self.length), tokens, side="right")))

    def targets(self, n):
        return int(self.length[:n].sum())

    def read(self, pieces):                                 # their numbers -> (rows, width + 1) int64
        longest = int(self.length[pieces].max())
        rows = np.full((len(pieces), min(self.cfg.sequence_length, -(-longest // 8) * 8) + 1), -1, np.int64)
        for row, s, start, n in zip(rows, self.shard[pieces], self.start[pieces], self.length[pieces]):
            row[:n + 1] = self.shards[s][start:start + n + 1]
        return rows

    def epoch(self, number):                                # -> pieces by length, and the order of the micro-batches
        if self.plan[0] != number:
            rng = np.random.default_rng((self.cfg.seed, number))
            order = rng.permutation(len(self))
            order = order[np.argsort(-self.length[order], kind="stable")]
            self.plan = number, order, rng.permutation(len(self.sums))
        return self.plan[1:]

    def micro_batches(self, step):
        M, n, mine, predictions = self.cfg.grad_accumulation_steps, len(self.sums), [], 0
        for i, number in enumerate(range(step * M, (step + 1) * M)):
            pieces, batches = self.epoch(number // n)
            b = batches[number % n]
            predictions += int(self.sums[b])
            if i % self.world == self.rank:
                mine.append((self.read(pieces[self.begins[b]:self.begins[b + 1]]), self.sums[b]))
        return [(torch.from_numpy(rows), float(k * self.world / predictions)) for rows, k in mine], predictions
