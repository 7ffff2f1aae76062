"""Turn your own UTF-8 text, or a dataset of the hub, into shards for train_gpt2.py.

    python data/text.py book.txt more.jsonl.gz --out data/mine
    python data/text.py corpus.txt.bz2 --val held_out.txt --out data/mine
    python data/text.py notes.txt --tokenizer bytes --out data/notes
    python data/text.py --hub roneneldan/TinyStories --out data/stories
    python data/text.py --hub HuggingFaceFW/fineweb --hub_config sample-10BT --rows 10000 --estimate

.txt holds documents separated by a line `--separator` (without any, one document), .jsonl one
document a row, as has a dataset of the Hugging Face hub (or a folder that holds one), which is
streamed. A null is a blank document, and those are left out. `--estimate` only counts.

Text is taken verbatim, but for a byte order mark that begins a file (qwen: in Unicode's normal form
C, like its own tokenizer). `<|endoftext|>` inside a line is ordinary text, and only the tokenizer's
start token marks where a document begins. Documents keep their order. Memory is bounded, and the
shards appear together, when everything is done.
"""
import argparse
import base64
import bz2
import filecmp
import gc
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import time
import unicodedata
import zlib
from collections import deque
from contextlib import suppress
from functools import partial
from itertools import chain, islice, product
from pathlib import Path

import numpy as np

PIECE = 1 << 20         # characters; a longer document is tokenised in pieces of about this size
# characters given to the tokenizer's threads together: this bounds the memory
BATCH = 8 << 20
AUTO_VAL = (1 << 20) + 1     # tokens: the race validates on 2**20 predictions
# A piece ends before a space, or between a letter or digit and a newline. No pattern below joins
# those, so the pieces' tokens are exactly the whole document's. (A megabyte without one such place
# is cut where it stands.) The scripts left out have letters that normal form C takes apart, into a
# letter and a mark.
WORD_END = re.compile(r"(?s).*(?:\S(?= )|[^\W_\u0900-\u0fff\ufb00-\ufb4f](?=\n))")
# OpenAI's GPT-2 pattern, with possessive quantifiers, which match the same and do not backtrack
GPT2_PATTERN = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
# Qwen2's, written in the same way: no two digits in a token, and newlines may stay with the
# punctuation before them
QWEN_PATTERN = (
    r"'(?i:[sdmt]|ll|re|ve)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s*[\r\n]|\s++$|\s+(?!\S)|\s"
)
QWEN_REPO = "Qwen/Qwen2.5-0.5B"     # Qwen3 has the same merges
# of the ranks, however stored
QWEN_SHA256 = "92a28645c27ae7dfbb3b5710eb590c37b59169daa4b8c2167648e63244629329"
QUIET = {"HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
         "DATASETS_VERBOSITY": "critical", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
HUB_ADVICE = {  # what a dataset that gives no row raises: what to do; the first that fits
    ConnectionError: "check the network and HF_HUB_OFFLINE; a proxy needs HTTPS_PROXY, a mirror "
                     "HF_ENDPOINT",
    FileNotFoundError: "check NAME; a private or gated one asks for HF_TOKEN, of an account that "
                       "may read it",
    Exception: "check NAME, --hub_config and --split, then the network",
}


def fail(message):
    from data.command import printable
    raise SystemExit(f"text.py: {printable(message)}")


def brief(error):
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def byte_characters():
    """GPT-2's spelling, {visible character: byte}: the 68 invisible ones as U+0100 and up."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def merge_ranks(merges):
    """GPT-2's spelling of merges -> {token: rank}: the 256 bytes, then what each merge makes."""
    byte_of = byte_characters()
    ranks = {bytes([b]): rank for rank, b in enumerate(byte_of.values())}
    for line in merges:
        ranks[bytes(byte_of[c] for c in line.replace(" ", ""))] = len(ranks)
    return ranks


def qwen_ranks(path):
    """Qwen's {token: rank} from a file of its tokenizer; path None: from the hub or its cache."""
    if path is None:
        os.environ |= QUIET | os.environ
        try:
            from huggingface_hub import (
                get_hf_file_metadata,
                hf_hub_download,
                hf_hub_url,
                try_to_load_from_cache,
            )

            path = try_to_load_from_cache(QWEN_REPO, "merges.txt")
            if not isinstance(path, str):
                # without a hub, this fails at once
                get_hf_file_metadata(hf_hub_url(QWEN_REPO, "merges.txt"))
                path = hf_hub_download(QWEN_REPO, "merges.txt")
        # the hub's client has changed its HTTP library and errors before
        except Exception as error:
            fail(f"cannot get merges.txt of {QWEN_REPO} from the hub ({brief(error)}): fetch it by "
                 "hand, then pass --ranks merges.txt")
    try:
        raw = Path(path).read_bytes()
        if raw.startswith(b"{"):                        # tokenizer.json
            ranks = merge_ranks("".join(merge) for merge in json.loads(raw)["model"]["merges"])
        elif raw.split(maxsplit=2)[1].isdigit():  # qwen.tiktoken
            ranks = {
                base64.b64decode(token): int(rank)
                for token, rank in map(bytes.split, raw.splitlines())
            }
        else:                                           # merges.txt
            ranks = merge_ranks(re.sub("^#version.*\n", "", raw.decode()).splitlines())
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except (ValueError, LookupError, TypeError, RecursionError):
        ranks = {}
    rows = b"".join(b"%b %d\n" % row for row in ranks.items())
    if hashlib.sha256(rows).hexdigest() != QWEN_SHA256:
        fail(f"{path} is damaged or not Qwen's: --ranks takes its merges.txt, tokenizer.json or "
             "qwen.tiktoken")
    return ranks


def bpe_encoding(name, pattern, ranks, size):
    """tiktoken.Encoding: the ranks, then <|endoftext|> and, up to `size` tokens, numbered ones."""
    try:
        import tiktoken
    except ImportError:
        fail(f"the {name} tokenizer needs tiktoken: pip install tiktoken")
    special = {f"<|{i}|>": i for i in range(len(ranks) + 1, size)} | {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def gpt2_encoding():
    """GPT-2's encoding from the merges in this folder; tiktoken itself would download them."""
    packed = Path(__file__).with_name("gpt2_vocab.bpe.bz2")
    try:
        merges = bz2.decompress(packed.read_bytes())
    except (OSError, ValueError):
        merges = b""
    if hashlib.sha256(merges).hexdigest() != GPT2_SHA256:
        fail(f"{packed} is missing or damaged: restore it with git checkout")
    return bpe_encoding("gpt2", GPT2_PATTERN, merge_ranks(merges.decode().splitlines()[1:]), 50257)


def bpe_codec(encoding, normal=str):
    threads = min(os.cpu_count() or 1, 16)
    sizes = np.zeros(encoding.n_vocab, int)
    for token in range(encoding.eot_token):
        sizes[token] = len(encoding.decode_single_token_bytes(token))

    def encode(texts):
        return encoding.encode_ordinary_batch([*map(normal, texts)], num_threads=threads)
    return encode, encoding.decode_bytes, sizes


def bytes_codec():
    def encode(texts):
        return [np.frombuffer(text.encode("utf-8", "replace"), np.uint8) for text in texts]
    return encode, bytes, np.ones(256, int)


# Qwen's sizes: Qwen2.5 counts 151,665, Qwen3 four more, and their models are padded to 151,936,
# which may be sampled. name: (vocabulary size, tokens that start a document, file of ranks or
# None -> (texts -> token lists, tokens -> UTF-8, bytes of text that each token spells))
TOKENIZERS = {
    "gpt2": (50257, [50256], lambda _: bpe_codec(gpt2_encoding())),
    # any value may be a byte of the text: none is left for the start
    "bytes": (256, [], lambda _: bytes_codec()),
    "qwen": (151665, [151643], lambda ranks: bpe_codec(bpe_encoding(
        "qwen", QWEN_PATTERN, qwen_ranks(ranks), 151936), partial(unicodedata.normalize, "NFC"))),
}
UNPACK = {".gz": lambda raw: gzip.GzipFile(fileobj=raw), ".bz2": bz2.BZ2File}


def read_lines(path, longest=-1):
    """The lines of a file, line ends untouched; one of over `longest` characters comes in parts."""
    number = 0
    try:
        with open(path, "rb") as raw:
            stream = UNPACK[path.suffix](raw) if path.suffix in UNPACK else raw
            text = io.TextIOWrapper(stream, "utf-8-sig", newline="\n")
            for line in iter(partial(text.readline, longest), ""):
                number += 1
                yield line
    except UnicodeDecodeError:
        fail(f"{path} is not UTF-8 text, near line {number + 1}: convert it first, for example "
             "with iconv")
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or f"damaged or cut off ({error})"
        fail(f"cannot read {path}: {why}")


def text_pieces(path, args):
    held, size, starts, fresh = [], 0, True, True
    for line in read_lines(path, PIECE):
        if fresh and line.rstrip("\r\n") == args.separator:
            yield "".join(held), starts
            held, size, starts = [], 0, True
        else:
            held.append(line)
            size += len(line)
        fresh = line.endswith("\n")
        if size >= PIECE:
            text = "".join(held)
            end = found.end() if (found := WORD_END.match(text)) else size
            yield text[:end], starts
            # blank: dropped below
            held, size, starts = [text[end:]], size - end, starts and not text[:end].strip()
    yield "".join(held), starts


def text_of(row, args, place):
    text = row.get(args.field, 0) if isinstance(row, dict) else 0
    if text is None:
        return ""
    if not isinstance(text, str):
        found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        fail(f"{place}: no text in field {args.field!r} of {found[:200]}: see --field")
    return text


def jsonl_pieces(path, args):
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line) if line.strip() else {args.field: ""}
        except (ValueError, RecursionError):
            fail(f"{path}, line {number}: not a row of JSON")
        yield text_of(row, args, f"{path}, line {number}"), True


def hub_pieces(name, args):
    os.environ |= QUIET | os.environ
    try:
        from datasets import load_dataset
    except ImportError:
        fail("--hub needs datasets: pip install datasets")
    number = 0
    try:
        rows = load_dataset(name, args.hub_config, split=args.split, streaming=True)
        for number, row in enumerate(islice(rows, args.rows), 1):
            yield text_of(row, args, f"{name}, row {number}"), True
    # the library's own kinds, its HTTP client's, and those of every format it reads
    except Exception as error:
        advice = (
            f"no shard was made; run it again, or end before that row with --rows {number}"
            if number
            else next(advice for kind, advice in HUB_ADVICE.items() if isinstance(error, kind))
        )
        fail(f"cannot read row {number + 1} of {name}: {brief(error)}: {advice}")
    finally:
        # ends pyarrow's readers: one left behind by --rows may abort Python as it exits
        gc.collect()


READERS = {".txt": text_pieces, ".jsonl": jsonl_pieces}


def reader_of(path):
    inner = Path(path.stem).suffix or ".txt" if path.suffix in UNPACK else path.suffix
    if inner not in READERS:
        fail(f"{path}: the name must end in {' or '.join(READERS)}, then perhaps "
             f"{' or '.join(UNPACK)}")
    if not path.is_file():
        fail(f"{path}: no such file")
    return READERS[inner]


def batches(sources):
    batch, size = [], 0
    for name, pieces in sources:
        for text, starts in pieces:
            if text.strip() or not starts:      # a blank document is none
                batch.append((text, starts))
                size += len(text)
            if size >= BATCH:
                yield name, batch
                batch, size = [], 0
    yield name, batch


def tokenise(sources, start, encode, dtype):
    """Yield (tokens, do they start a document) in the order of the text, and print the progress."""
    from data.command import printable
    read, made, began, spoke, live = 0, 0, time.time(), time.time(), sys.stdout.isatty()
    if not sources:
        return
    for name, batch in batches(sources):
        for tokens, (text, starts) in zip(encode([text for text, _ in batch]), batch, strict=True):
            made, read = made + len(tokens), read + len(text.encode("utf-8", "replace"))
            tokens = [start if starts else [], tokens]
            yield np.concatenate(tokens, dtype=dtype, casting="unsafe"), starts
        now = time.time()
        megabytes = read / 1e6
        line = (f"{megabytes:.1f} MB read, {megabytes / (now - began):.1f} MB/s, {made:,} tokens, "
                f"{printable(name)}")
        if live or now - spoke > 10:
            print(f"\033[K{line}\r" if live else line, end="" if live else "\n", flush=True)
            spoke = now
    print(line)


def set_aside(total, wanted):
    """How many of the tokens validate: the last `wanted` (None: a tenth, at most AUTO_VAL)."""
    limit = min(AUTO_VAL, -(-total // 10)) if wanted is None else wanted
    if limit >= total:
        fail(f"{total:,} tokens of text are too few to set {limit:,} aside (--val_tokens)" if total
             else "the files or rows hold no text")
    return limit


def split(stream, wanted):
    """Yield (tokens, is it validation)."""
    limit, held, count, total = AUTO_VAL if wanted is None else wanted, deque(), 0, 0
    for tokens, *_ in stream:
        held.append(tokens)
        count, total = count + len(tokens), total + len(tokens)
        while held and count - len(held[0]) >= limit:
            count -= len(held[0])
            yield held.popleft(), False
    limit = set_aside(total, wanted)
    for tokens in held:
        border = min(max(count - limit, 0), len(tokens))
        yield tokens[:border], False
        yield tokens[border:], True
        count -= len(tokens)


def estimate(held_out, stream, spelled, args):
    """Read both, write nothing, and print what the shards would hold."""
    documents, read, longest, length, total, val = 0, 0, 0, 0, 0, 0
    for part in (held_out, stream):
        val, total = total, 0
        for tokens, starts in part:
            documents, total = documents + starts, total + len(tokens)
            read += spelled[tokens].sum()
            length = len(tokens) + (0 if starts else length)
            longest = max(longest, length)
    aside = set_aside(total, 0 if args.val else args.val_tokens)
    shards = [-(-count // args.shard_tokens) for count in (total - aside, aside + val)]
    total += val
    print(
        f"{f'of the first {args.rows:,} rows: ' if args.rows else ''}{documents:,} documents, "
        f"{total:,} tokens, {read:,} bytes of UTF-8, {read / total:.3f} bytes a token\n"
        f"{total / documents:,.1f} tokens a document, {longest:,} in the longest; shards of up to "
        f"{args.shard_tokens:,}: {shards[0]:,} to train on, {shards[1]:,} to validate on"
    )


class ShardWriter:
    """A stream of tokens -> STEM_000001.bin and so on, each of `shard_tokens` tokens."""
    def __init__(self, stem, number, vocab_size, shard_tokens, spelled):
        from support.shards import BYTE_VOCAB, FORMATS
        self.dtype = np.uint16 if vocab_size <= 65535 else np.uint32
        self.magic, self.version = next(
            (m, v) for m, (v, dtype) in FORMATS.items() if dtype == self.dtype
        )
        self.stem, self.number = stem, number
        self.vocab_size, self.shard_tokens = vocab_size, shard_tokens
        # Bytes of text a token; those of a vocabulary of bytes need no count.
        self.spelled = spelled if vocab_size != BYTE_VOCAB else 0 * spelled
        self.file, self.count, self.text_bytes = None, 0, 0

    def write(self, tokens):
        while len(tokens):
            if self.file is None or self.count == self.shard_tokens:
                self.close()
                self.file = open(f"{self.stem}_{self.number:06d}.bin", "w+b")
                self.count, self.text_bytes = 0, 0
                self.file.write(bytes(1024))
                self.number += 1
            part, tokens = np.split(tokens, [self.shard_tokens - self.count])
            self.file.write(part.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes())
            self.count += len(part)
            self.text_bytes += int(self.spelled[part].sum())

    def close(self):
        if self.file:
            header = np.zeros(256, "<i4")
            header[:4] = self.magic, self.version, self.count, self.vocab_size
            header[4:6] = np.array([self.text_bytes], "<i8").view("<i4")
            self.file.seek(0)
            self.file.write(header.tobytes())
            self.file.flush()
            os.fsync(self.file.fileno())    # a full disk may speak up only here
            self.file.close()


def parse(argv):
    from data.command import printable
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    # one line, without the usage
    p.error = lambda message: p.exit(2, f"text.py: {printable(message)}\n")
    p.add_argument("files", nargs="*", type=Path, metavar="FILE",
                   help=".txt or .jsonl, plain or .gz or .bz2")
    p.add_argument("--hub", metavar="NAME",
                   help="instead of files: a dataset of the hub, or a folder that holds one")
    p.add_argument("--hub_config", metavar="NAME",
                   help="the dataset's configuration, for example sample-10BT")
    p.add_argument("--split", default="train", metavar="NAME",
                   help="of the dataset (default: %(default)s)")
    p.add_argument("--rows", type=int, metavar="N", help="take only the dataset's first N rows")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder for the shards")
    p.add_argument("--estimate", action="store_true",
                   help="count documents, tokens and shards, and write nothing")
    p.add_argument("--prefix", help="how the shards' names begin (default: the name of the folder)")
    p.add_argument("--tokenizer", choices=TOKENIZERS, default="gpt2", help="default: %(default)s")
    p.add_argument("--ranks", type=Path, metavar="FILE",
                   help="qwen's merges.txt, tokenizer.json or qwen.tiktoken (default: fetched from "
                        "the hub once)")
    p.add_argument("--separator", default="<|endoftext|>", metavar="LINE",
                   help="line between two documents of a .txt (default: %(default)s; '' is an "
                        "empty line)")
    p.add_argument("--field", default="text", help="field of a row (default: %(default)s)")
    p.add_argument("--val_tokens", type=int, metavar="N",
                   help="validate on the last N tokens, 0: on none (default: a tenth of the text, "
                        f"at most {AUTO_VAL:,})")
    p.add_argument("--val", nargs="+", type=Path, default=[], metavar="FILE",
                   help="validate on these files instead")
    p.add_argument("--shard_tokens", type=int, default=100_000_000, metavar="N",
                   help="default: %(default)s")
    args = p.parse_args(argv)
    if bool(args.files) == bool(args.hub):
        p.error("give either FILEs or --hub NAME")
    if not args.hub and (args.hub_config or args.rows is not None or args.split != "train"):
        p.error("--hub_config, --split and --rows are for --hub")
    if not args.out and not args.estimate:
        p.error("choose a folder for the shards with --out, or --estimate")
    if args.val and args.val_tokens is not None:
        p.error("choose either --val or --val_tokens")
    if args.prefix and Path(args.prefix).name != args.prefix:
        p.error(f"--prefix {args.prefix} is no beginning of a name: choose the folder by --out")
    if args.ranks and args.tokenizer != "qwen":
        p.error("--ranks is for --tokenizer qwen")
    rows = 1 if args.rows is None else args.rows
    if args.shard_tokens < 1 or rows < 1 or (args.val_tokens or 0) < 0:
        p.error("--shard_tokens and --rows must be at least 1, and --val_tokens at least 0")
    return args


def refuse_seen(args):
    """One line where --val names a training file, or one of the same content."""
    for held_out, path in product(args.val, args.files):
        with suppress(OSError):         # reading it will tell
            if held_out.samefile(path) or filecmp.cmp(held_out, path, shallow=False):
                fail(f"--val {held_out} has the text of {path}, which trains: the model would be "
                     "scored on text it has seen")


def refuse_old(args, prefix):
    names = [f"{glob.escape(prefix)}_{part}_*.bin" for part in ("train", "val")]
    if old := sorted(path for name in names for path in args.out.glob(name)):
        fail(f"{old[0]} is already there: remove the old shards or choose another --prefix")


def main(argv=None):
    from data.command import printable, quoted, undisturbed, unfinished
    args = parse(argv)
    sources, held_out = (
        [(path.name, reader_of(path)(path, args)) for path in part]
        for part in (args.files, args.val)
    )
    refuse_seen(args)
    if not args.estimate:
        prefix = args.prefix or args.out.resolve().name
        refuse_old(args, prefix)
    vocab_size, start, codec = TOKENIZERS[args.tokenizer]
    encode, _, spelled = codec(args.ranks)
    if args.hub:        # the first row is asked for before anything is written
        rows = hub_pieces(args.hub, args)
        sources = [(args.hub, chain([*islice(rows, 1)], rows))]
    if args.estimate:
        return estimate(
            *(tokenise(part, start, encode, np.uint32) for part in (held_out, sources)),
            spelled, args)
    try:
        with unfinished(args.out) as temporary:
            train, val = (
                ShardWriter(f"{temporary}/{prefix}_{part}", number, vocab_size, args.shard_tokens,
                            spelled)
                for part, number in (("train", 1), ("val", 0))
            )
            for tokens, *_ in tokenise(held_out, start, encode, val.dtype):
                val.write(tokens)
            stream = tokenise(sources, start, encode, train.dtype)
            for tokens, is_val in split(stream, 0 if args.val else args.val_tokens):
                (val if is_val else train).write(tokens)
            train.close()
            val.close()
            with undisturbed(args.out):
                # another run with this prefix may have ended meanwhile
                refuse_old(args, prefix)
                made = [path.replace(args.out / path.name)
                        for path in sorted(Path(temporary).iterdir())]
    except OSError as error:    # an input's was answered where it was read: this is the output's
        fail(f"cannot write to {args.out}: {error.strerror}; no shard was made")
    for path in made:
        print(printable(path))
    stem = glob.escape(str(args.out / prefix))
    files = f"--input_bin {quoted(f'{stem}_train_*.bin')} --input_val_bin"
    mine = set(args.out.glob(f"{glob.escape(prefix)}_*.bin"))
    if not val.file:
        print(f"nothing was held out: train with {files} and other shards to validate on")
    elif mine < set(args.out.glob("*.bin")):         # --data would take all sets in the folder
        print(f"train with: python train_gpt2.py {files} {quoted(f'{stem}_val_*.bin')}")
    else:
        print(f"train with: python train_gpt2.py --data {quoted(str(args.out))}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from data.command import run
    run(main, "text.py", "no shard was made")
