"""Token shards: opening them, and which of them train and which validate.

A shard is 256 little-endian int32 (magic, version, tokens, vocabulary), then the tokens. The format
is llm.c's. data/text.py adds two numbers that are 0, unknown, in the public FineWeb shards: the
vocabulary in word 3 and, as int64 in words 4 and 5, the UTF-8 bytes of the text that the tokens
stand for. Any defect is SystemExit with one line that says what to do.
"""
import glob
import math
import os
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from support.machine import checksum

ROOT = Path(__file__).resolve().parent.parent

HEADER = 256
FORMATS = {20240520: (1, np.uint16), 20240801: (7, np.uint32)}         # magic: (version, type)
GPT2_VOCAB = 50257
BYTE_VOCAB = 256            # its tokens are the bytes
# bytes; no tokenizer's token spells as many (GPT-2's longest: 128)
LONGEST_TOKEN = 1024

# {tokenizer of data/text.py: sizes of its vocabulary, from bare to padded}
TOKENIZERS = {
    "bytes": range(256, 257),
    "gpt2": range(GPT2_VOCAB, 50_304 + 1),
    "qwen": range(151_643, 151_936 + 1),
}


def tokenizer_of(vocab: int) -> str | None:
    """Which tokenizer made shards of this vocabulary; None: one of your own."""
    return next((name for name, sizes in TOKENIZERS.items() if vocab in sizes), None)


def open_shard(path: str):
    """path -> (memmapped tokens, vocabulary size). Any defect is SystemExit with one line.

    The tokens' `text_bytes` is how many bytes of UTF-8 text they stand for, None where the shard
    does not say; slices do not carry it.
    """
    def refuse(why):
        raise SystemExit(f"{path}: {why}")

    def refuse_error(e):
        refuse(f"cannot be opened ({e.strerror}): with many shards, raise `ulimit -n`")

    if os.path.isdir(path):
        refuse("is a folder, not a shard: name its shards, or the folder without a pattern")
    if not os.path.isfile(path):
        refuse("no such file")
    if not os.access(path, os.R_OK):
        refuse("may not be read")
    size = os.path.getsize(path)
    try:
        header = np.fromfile(path, dtype="<i4", count=HEADER)
    except OSError as e:
        refuse_error(e)
    if len(header) < HEADER or header[0] not in FORMATS:
        refuse("not a token shard (make one with data/text.py)")
    version, dtype = FORMATS[header[0]]
    if header[1] != version:
        refuse(f"shard version {header[1]}, this code reads {version}")
    n = int(header[2])
    vocab = int(header[3]) or GPT2_VOCAB
    promised = 4 * HEADER + n * np.dtype(dtype).itemsize
    if n < 1 or size != promised:
        refuse(f"the header promises {n:,} tokens in {promised:,} bytes, the file has {size:,}: "
               "truncated or damaged, fetch it again")
    try:
        tokens = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r",
                           offset=4 * HEADER, shape=(n,))
    except OSError as e:
        # Each map keeps a file open.
        refuse_error(e)
    text_bytes = int(header[4:6].view("<i8")[0])
    # A text token spells a byte or more. A start token spells none, but no two follow each other.
    if text_bytes and not n // 2 <= text_bytes <= LONGEST_TOKEN * n:
        refuse(f"the header promises {text_bytes:,} bytes of text for {n:,} tokens: damaged, make "
               "or fetch it again (0 would mean unknown)")
    tokens.text_bytes = n if vocab == BYTE_VOCAB else text_bytes or None
    # By which a reader notices that the file has changed.
    tokens.opened = (size, os.stat(path).st_mtime_ns)
    # In parts, so that the check needs no memory for the whole shard.
    largest = max(int(part.max()) for part in np.array_split(tokens, math.ceil(n / 2**24)))
    if largest >= vocab:
        refuse(f"token {largest} is outside the vocabulary of {vocab}")
    return tokens, vocab


def open_shards(pattern: str, kind: str = "train"):
    """Glob, or a folder with shards of a kind (train, val) -> ({path: tokens}, vocabulary size).

    All shards must have the same vocabulary. A relative pattern is tried from the working
    directory, then from the repository.
    """
    if os.path.isdir(pattern) or os.path.isdir(ROOT / pattern):
        flag = {"train": "--input_bin", "val": "--input_val_bin"}[kind]
        return open_all(shards_in(pattern, (kind,), flag)[0], pattern)
    paths = sorted(glob.glob(pattern)) or sorted(glob.glob(str(ROOT / pattern)))
    if not paths:
        raise SystemExit(f"no shard matches {pattern!r}: fetch FineWeb with data/fineweb.py, or "
                         "make some with data/text.py")
    return open_all(paths, pattern)


def open_all(paths, name: str):
    """Paths -> ({path: tokens}, their one vocabulary); `name` is what an error calls them all."""
    shards = {}
    vocabs = set()
    for path in paths:
        shards[path], vocab = open_shard(path)
        vocabs.add(vocab)
    if len(vocabs) > 1:
        raise SystemExit(f"{name}: shards of different vocabularies: {sorted(vocabs)}")
    return shards, vocabs.pop()


# train.bin, x_train.bin, x_train_000001.bin; "valhalla_train.bin" is for training.
SHARD_NAME = re.compile(r"(?:.*[^A-Za-z])?(train|val)(?:[_-]?\d+)?\.bin")


def shards_in(name: str, kinds=("train", "val"), flag: str = "--data"):
    """A folder -> paths of its shards of each kind. SystemExit with one line that names the flag.

    A relative folder is tried from the working directory, then from the repository.
    """
    paths = {"train": [], "val": []}
    try:
        folder = next((path for path in (Path(name), ROOT / name) if path.is_dir()), None)
        for path in sorted(folder.iterdir()) if folder else ():
            if match := SHARD_NAME.fullmatch(path.name):
                paths[match[1]].append(str(path))
    except OSError as e:
        raise SystemExit(f"{flag} {name}: cannot be read ({e.strerror})") from None
    if folder is None:
        raise SystemExit(f"{flag} {name}: no such folder (single files: --input_bin and "
                         "--input_val_bin)")
    for kind in kinds:
        if not paths[kind]:
            raise SystemExit(f"{flag} {name}: no shard there is called *{kind}.bin or "
                             f"*{kind}_000001.bin: make both kinds with data/text.py, or name "
                             "files by --input_bin and --input_val_bin")
    return [paths[kind] for kind in kinds]


def open_data(cfg):
    """-> training shards, validation shards, each {path: tokens}; their vocabulary.

    SystemExit with one line where they have two vocabularies, or share a shard.
    """
    if cfg.input_bin:
        shards, vocab = open_shards(cfg.input_bin)
        val_shards, val_vocab = open_shards(cfg.input_val_bin, "val")
    else:
        train, val = shards_in(cfg.data)
        shards, vocab = open_all(train, f"--data {cfg.data}")
        val_shards, val_vocab = open_all(val, f"--data {cfg.data}")
    if vocab != val_vocab:
        raise SystemExit(f"{next(iter(shards))} has a vocabulary of {vocab}, "
                         f"{next(iter(val_shards))} of {val_vocab}: make both with one tokenizer")
    if vocab > (cfg.vocab_size or vocab):
        raise SystemExit(f"--vocab_size {cfg.vocab_size} is less than the shards' {vocab}: drop it")
    refuse_twice(shards, val_shards)
    return shards, val_shards, vocab


def bytes_a_token(shards) -> float | None:
    """UTF-8 bytes of text a token, over all of these shards; None where one of them has no count.
    """
    sizes = [getattr(tokens, "text_bytes", None) for tokens in shards.values()]
    if not all(sizes):
        return None
    return sum(sizes) / sum(len(tokens) for tokens in shards.values())


def refuse_twice(training, validation):
    """SystemExit where two of these paths hold the same shard, or are the same path.

    Checksums are of shards with the same size and first 64 KiB only: all of FineWeb's have one
    size, and 100 of them are 20 GB.
    """
    alike = defaultdict(list)
    for kind, paths in (("training", training), ("validation", validation)):
        for path in paths:
            with open(path, "rb") as f:
                alike[os.path.getsize(path), f.read(2**16)].append((path, kind))
    for group in alike.values():
        seen = {}
        for path, kind in group if len(group) > 1 else ():
            digest = checksum(path)
            if digest not in seen:
                seen[digest] = path, kind
                continue
            other, other_kind = seen[digest]
            why = f"a shard is there twice for {kind}: remove one"
            if kind != other_kind:
                why = "the model would be scored on text it has seen: validate on another shard"
            both = f"{other} and {path} are the same" if path != other else f"{path} is both"
            raise SystemExit(f"{both}: {why}")


def refuse_changes(batches):
    """SystemExit with one line where a shard is not the file that was opened.

    To read behind the end of a mapped file that was cut ends a process without a word.
    """
    for tokens in batches.shards:
        opened = getattr(tokens, "opened", None)
        try:
            now = opened and os.stat(tokens.filename)
        except OSError:
            # Its name is gone; what is mapped stays.
            continue
        if opened and (now.st_size, now.st_mtime_ns) != opened:
            raise SystemExit(f"{tokens.filename}: has changed while the run read it: put it back, "
                             "then go on by --resume auto")
