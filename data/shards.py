"""The token shard format, read: 256 little-endian int32 (magic, version, tokens, vocabulary), then the tokens.

The format is llm.c's, plus the vocabulary in word 3, where the public FineWeb shards have 0. data/text.py writes it.
"""
import glob
import os
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
HEADER = 256
FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}                       # magic: (version, token type)
GPT2_VOCAB = 50257                                          # what a vocabulary of 0 means: the public FineWeb shards


def open_shard(path):
    """path -> (memmapped tokens, vocabulary size). Any defect is one line and SystemExit, before training starts."""
    def refuse(why):
        raise SystemExit(f"{path}: {why}")
    if not os.path.isfile(path):
        refuse("no such file")
    size = os.path.getsize(path)
    head = np.fromfile(path, dtype="<i4", count=HEADER)
    if len(head) < HEADER or head[0] not in FORMATS:
        refuse("not a token shard (make one with data/text.py)")
    version, dtype = FORMATS[head[0]]
    n, vocab, itemsize = int(head[2]), int(head[3]) or GPT2_VOCAB, np.dtype(dtype).itemsize
    if head[1] != version:
        refuse(f"shard version {head[1]}, this code reads {version}")
    if n < 1 or size != 4 * HEADER + n * itemsize:
        refuse(f"the header promises {n:,} tokens in {4 * HEADER + n * itemsize:,} bytes, the file has {size:,}: "
               "truncated or damaged, fetch it again")
    tokens = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r", offset=4 * HEADER, shape=(n,))
    if (largest := max(int(part.max()) for part in np.array_split(tokens, -(-n // 2**24)))) >= vocab:
        refuse(f"token {largest} is outside the vocabulary of {vocab}")
    return tokens, vocab


def find(pattern):                                          # a relative pattern is tried from here, then from the repo
    return sorted(glob.glob(pattern)) or sorted(glob.glob(str(ROOT / pattern)))


def open_shards(pattern):
    """Glob -> ({path: tokens}, vocabulary size); the shards must agree on the vocabulary."""
    shards = {path: open_shard(path) for path in find(pattern)}
    if not shards:
        raise SystemExit(f"no shard matches {pattern!r}: "
                         "fetch FineWeb with data/fineweb.py, or make some with data/text.py")
    if len(vocabs := {vocab for _, vocab in shards.values()}) > 1:
        raise SystemExit(f"{pattern}: shards of different vocabularies: {sorted(vocabs)}")
    return {path: tokens for path, (tokens, _) in shards.items()}, vocabs.pop()
