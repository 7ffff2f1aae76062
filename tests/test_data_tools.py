"""data/text.py and data/fineweb.py: round trips, refusals, the embedded shards. Only loopback is
used."""

import argparse
import base64
import bz2
import glob
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex  # tiktoken needs it too

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
sys.path[:0] = [str(ROOT), str(DATA)]

import fineweb  # noqa: E402  (data/ is no package: its scripts are run, not installed)
import text as tool  # noqa: E402
from data import command  # noqa: E402
from support.shards import open_data, open_shard  # noqa: E402
from train_gpt2 import parse  # noqa: E402

EOT = 50256
DOCS = [
    "hello world",
    "Zwölf Boxkämpfer 💡\r\n  \n\nit's  <|endoftext|> here\t\n",
    "a\u2028b 1234\n\n\n",
]


@pytest.fixture(scope="session")
def gpt2():
    return tool.gpt2_encoding()


def make(*argv):
    tool.main([str(a) for a in argv])
    out = Path(argv[argv.index("--out") + 1])
    assert not [p for p in out.iterdir() if p.suffix != ".bin"], "temporary files left"
    shards = {p.stem.removeprefix(out.name + "_"): open_shard(p) for p in sorted(out.iterdir())}
    return {part: tokens.tolist() for part, (tokens, _) in shards.items()}, {
        v for _, v in shards.values()
    }


def run(script, *argv, env=None, **kwargs):
    return subprocess.run(
        [sys.executable, DATA / script, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | (env or {}),
        **kwargs,
    )


def refused(done, *words):
    """The run failed, and said why in one line."""
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


# ---------------------------------------------------------------- what the repository ships
@pytest.mark.parametrize("name, count, sha", [
    ("train", 1_003_854, "dcb364f3775720bb463507dfed557aee2d15f20ff7133a43e942bc2f2a9c9986"),
    ("val", 111_540, "5ed57de70b0ff601f0bed4aa2a1a1f3c321a9c74b0a273736f1a6b91dada9d30")])
def test_embedded_shards(name, count, sha):
    path = DATA / f"tinyshakespeare/{name}.bin"
    tokens, vocab = open_shard(path)
    assert (len(tokens), vocab) == (count, 256)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha
    assert sha in (DATA / "README.md").read_text(encoding="utf-8")


def test_text_py_remakes_the_embedded_shards(tmp_path):
    whole = np.concatenate(
        [open_shard(DATA / f"tinyshakespeare/{part}.bin")[0] for part in ("train", "val")]
    )
    (tmp_path / "input.txt").write_bytes(whole.astype(np.uint8).tobytes())
    make(tmp_path / "input.txt", "--tokenizer", "bytes", "--out", tmp_path / "t")
    for made, shipped in (("t_train_000001", "train"), ("t_val_000000", "val")):
        embedded = (DATA / f"tinyshakespeare/{shipped}.bin").read_bytes()
        assert (tmp_path / f"t/{made}.bin").read_bytes() == embedded


def test_gpt2_encoding(gpt2):
    assert gpt2.n_vocab == 50257 and gpt2.eot_token == EOT
    assert gpt2.encode_ordinary("hello world") == [31373, 995]
    assert EOT not in gpt2.encode_ordinary("<|endoftext|>")
    assert gpt2.encode_ordinary("\n\n\n") == [628, 198]
    hidden = [*range(33), *range(127, 161), 173]
    assert gpt2.decode_bytes(range(256)) == bytes(
        [b for b in range(256) if b not in hidden] + hidden
    )


# ---------------------------------------------------------------- text.py: what goes in comes out
@pytest.mark.parametrize(
    "name", "d.jsonl d.jsonl.gz d.jsonl.bz2 d.txt d.txt.gz d.txt.bz2 d.gz d.bz2".split()
)
def test_every_kind_of_file(name, tmp_path, gpt2):
    docs = [d if d.endswith("\n") else d + "\n" for d in DOCS]
    if "jsonl" in name:
        raw = "\n".join(json.dumps({"text": d, "id": i}) for i, d in enumerate(docs)) + "\n\n"
    else:
        raw = "<|endoftext|>\n".join(docs[:2]) + "<|endoftext|>\r\n \n<|endoftext|>\n" + docs[2]
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(raw.encode()))
    shards, vocab = make(tmp_path / name, "--out", tmp_path / "s", "--val_tokens", 3)
    assert list(shards) == ["train_000001", "val_000000"] and vocab == {50257}
    want = [token for d in docs for token in [EOT] + gpt2.encode_ordinary(d)]
    assert shards["train_000001"] == want[:-3] and shards["val_000000"] == want[-3:]


def test_bytes_other_separator_and_held_out_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n", newline="")
    (tmp_path / "b.txt").write_text("three\r\n", newline="")
    shards, vocab = make(tmp_path / "a.txt", "--val", tmp_path / "b.txt", "--out", tmp_path / "s",
                         "--tokenizer", "bytes", "--separator", "")
    assert vocab == {256}
    assert (
        bytes(shards["train_000001"]) == b"one\ntwo\n"
        and bytes(shards["val_000000"]) == b"three\r\n"
    )


def test_pieces_of_one_big_document_give_the_tokens_of_the_whole(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(tool, "PIECE", 97)
    monkeypatch.setattr(tool, "BATCH", 500)
    text = "".join(f"{d} don't_stop... {i}\n\n\n  x  \n" for i in range(60) for d in DOCS)
    (tmp_path / "big.txt").write_text(text, newline="")
    shards, _ = make(tmp_path / "big.txt", "--out", tmp_path / "s",
                     "--val_tokens", 1000, "--shard_tokens", 2000)
    whole = [EOT] + gpt2.encode_ordinary(text)
    assert shards.pop("val_000000") == whole[-1000:]
    assert [len(s) for s in shards.values()][:-1] == [2000] * (len(shards) - 1)
    assert sum(shards.values(), []) == whole[:-1000]


def test_a_document_that_begins_with_a_blank_piece_still_has_its_start(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(tool, "PIECE", 97)
    (tmp_path / "a.txt").write_text("\n" * 300 + "hello world")
    shards, _ = make(tmp_path / "a.txt", "--out", tmp_path / "s", "--val_tokens", 0)
    tokens = shards["train_000001"]
    assert (
        tokens[0] == EOT
        and tokens.count(EOT) == 1
        and gpt2.decode(tokens[1:]).strip() == "hello world"
    )


def test_default_validation_part_and_none(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1001)
    shards, _ = make(tmp_path / "a.txt", "--out", tmp_path / "s", "--tokenizer", "bytes")
    assert {k: len(v) for k, v in shards.items()} == {"train_000001": 900, "val_000000": 101}
    shards, _ = make(
        tmp_path / "a.txt", "--out", tmp_path / "n", "--tokenizer", "bytes", "--val_tokens", 0
    )
    assert {k: len(v) for k, v in shards.items()} == {"train_000001": 1001}


def test_big_vocabularies_get_uint32(tmp_path):
    writer = tool.ShardWriter(tmp_path / "q", 0, 151_643, 100, np.full(151_643, 3))
    writer.write(np.array([7, 151_642]))
    writer.close()
    tokens, vocab = open_shard(tmp_path / "q_000000.bin")
    assert (tokens.tolist(), tokens.dtype, vocab) == ([7, 151_642], np.uint32, 151_643)


@pytest.mark.parametrize("shard_tokens", [1, 7, 10**6])
def test_the_bytes_of_a_set_of_shards_are_those_of_its_text(shard_tokens, tmp_path, monkeypatch):
    # Pieces, shards and validation begin inside documents, and inside characters.
    monkeypatch.setattr(tool, "PIECE", 97)
    rows = [{"text": text} for text in [*DOCS, "💡" * 60, " \n", "half a pair: \ud83d"]]
    make(write_rows(tmp_path / "a.jsonl", rows), "--out", tmp_path / "s",
         "--shard_tokens", shard_tokens)
    parts = {path.name: open_shard(path)[0] for path in (tmp_path / "s").iterdir()}
    # Half a pair is no text: its tokens are those of U+FFFD.
    texts = [row["text"].replace("\ud83d", "\ufffd") for row in rows if row["text"].strip()]
    assert sum(t.text_bytes or 0 for t in parts.values()) == sum(len(t.encode()) for t in texts)
    for tokens in parts.values():
        # A shard of a lone start token spells nothing, which reads as unknown.
        assert (tokens.text_bytes is None) == (tokens.tolist() == [EOT])


def test_the_bytes_that_a_header_promises(tmp_path):
    def promising(count, vocab=50257, n=10):
        header = np.frombuffer(shard(n)[:1024], "<i4").copy()
        header[3] = vocab
        header[4:6] = np.array([count], "<i8").view("<i4")
        (tmp_path / "a.bin").write_bytes(header.tobytes() + shard(n)[1024:])
        return open_shard(tmp_path / "a.bin")[0].text_bytes

    assert promising(0) is None and promising(0, vocab=0) is None and promising(0, vocab=256) == 10
    assert [promising(count) for count in (5, 43, 10240)] == [5, 43, 10240]
    for count in (-1, 4, 10241, 2**62):
        with pytest.raises(SystemExit, match=f"a.bin: the header promises {count:,} bytes of text "
                                             "for 10 tokens: damaged"):
            promising(count)


# ---------------------------------------------------------------- text.py: Qwen's tokenizer
QWEN_SPLIT = regex.compile(  # as transformers has it
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CRUMBS = (
    "\n|\n\n|\r\n|\t| |  |   |.|!?|'s|'LLama|'\u017f|-|_|1|23|\u00b2|hello|world|Zw\u00f6lf|e\u0301|\u212b|"
    "\u0301|\u4e2d\u6587|\u1112\u1161\u11ab|\u0958|\u0915\u093c|\u2028|\u3000|\u00a0|\U0001f4a1"
).split("|")


def crumbs(seed):
    rng = random.Random(seed)
    return "".join(rng.choices(CRUMBS, k=rng.randint(0, 40)))


def naive_bpe(text, ranks):
    ids = []
    for word in QWEN_SPLIT.findall(unicodedata.normalize("NFC", text)):
        parts = [bytes([b]) for b in word.encode()]
        while pairs := [
            (ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks
        ]:
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.fixture(scope="session")
def synthetic(gpt2, tmp_path_factory):
    """151,387 merges: 400 learned from crumbs, others that no text can reach -> (merges, ranks,
    file, digest)."""
    # unsplit: a wrong split shows
    words = [[bytes([b]) for b in crumbs(i).encode()] for i in range(200)]
    learned = []
    for _ in range(400):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        learned.append(best)
        for word in words:
            for i in reversed(range(len(word) - 1)):
                if tuple(word[i:i + 2]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
    ranks = {gpt2.decode_single_token_bytes(i): i for i in range(256)}
    learned = list({a + b: (a, b) for a, b in learned if a + b not in ranks}.values())
    learned += [(b"\xff", b"\xfe%d" % i) for i in range(151_387 - len(learned))]
    ranks |= {a + b: 256 + i for i, (a, b) in enumerate(learned)}
    path = tmp_path_factory.mktemp("ranks") / "qwen.tiktoken"
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    )
    return (
        learned,
        ranks,
        path,
        hashlib.sha256(b"".join(b"%b %d\n" % row for row in ranks.items())).hexdigest(),
    )


@pytest.fixture
def qwen(synthetic, monkeypatch):
    """A synthetic qwen.tiktoken that text.py takes for Qwen's -> (its path, its ranks)."""
    _, ranks, path, digest = synthetic
    monkeypatch.setattr(tool, "QWEN_SHA256", digest)
    # the same file, as sample.py imports it
    monkeypatch.setattr("data.text.QWEN_SHA256", digest)
    return path, ranks


HIDDEN = [*range(33), *range(127, 161), 173]
SPELLING = {b: chr(256 + HIDDEN.index(b)) for b in HIDDEN}


def spelled(token):
    return token.decode("latin1").translate(SPELLING)


def test_qwen_agrees_with_a_naive_bpe(qwen):
    path, ranks = qwen
    texts = ["<|endoftext|>" + crumbs(-i) for i in range(1, 1500)]
    encode, decode, spelled = tool.TOKENIZERS["qwen"][2](path)
    got = encode(texts)
    for text, tokens in zip(texts, got):
        assert tokens == naive_bpe(text, ranks), ascii(text)
        normal = unicodedata.normalize("NFC", text).encode()
        assert decode(tokens) == normal
        assert spelled[tokens].sum() == len(normal)
    assert sum(map(len, got)) < 0.7 * sum(len(t.encode()) for t in texts), "the merges are not used"
    assert decode([151_643, 151_935]) == b"<|endoftext|><|151935|>"


def test_qwen_shards(qwen, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "PIECE", 97)
    monkeypatch.setattr(tool, "BATCH", 500)
    path, ranks = qwen
    # newlines stay with what is no letter before them, and U+0958 becomes such in normal form C: no
    # cut there
    docs = [
        "".join(f"{crumbs(i)} w\u0958\nit's <|endoftext|> {i}.\nlong{'x' * 20}\n\n" for i in part)
        for part in (range(60), range(60, 70))
    ]
    (tmp_path / "a.txt").write_text("<|endoftext|>\n".join(docs), newline="")
    shards, vocab = make(
        tmp_path / "a.txt",
        "--out",
        tmp_path / "s",
        "--tokenizer",
        "qwen",
        "--ranks",
        path,
        "--val_tokens",
        500,
        "--shard_tokens",
        700,
    )
    want = [token for doc in docs for token in [151_643] + naive_bpe(doc, ranks)]
    assert shards.pop("val_000000") == want[-500:] and vocab == {151_665}
    assert sum(shards.values(), []) == want[:-500] and want.count(151_643) == 2 and len(shards) > 2
    header = np.fromfile(tmp_path / "s/s_train_000001.bin", "<i4", 256)
    assert header[:4].tolist() == [20240801, 7, 700, 151_665] and not header[6:].any()
    total = sum(open_shard(p)[0].text_bytes for p in (tmp_path / "s").iterdir())
    assert total == sum(len(unicodedata.normalize("NFC", doc).encode()) for doc in docs)
    assert (tmp_path / "s/s_train_000001.bin").stat().st_size == 1024 + 4 * 700


def test_no_letter_before_a_cut_loses_its_end_to_normal_form_c():
    for c in map(chr, [*range(0xd800), *range(0xe000, 0x30000)]):
        if tool.WORD_END.match(c + "\n"):
            assert unicodedata.category(unicodedata.normalize("NFC", c)[-1])[0] in "LN", ascii(c)


def test_every_kind_of_ranks_file(qwen, synthetic, tmp_path):
    _, ranks = qwen
    pairs = [(spelled(a), spelled(b)) for a, b in synthetic[0]]
    lines = [" ".join(pair) for pair in pairs]
    files = {"merges.txt": "\n".join(["#version: 0.2", *lines, ""]), "bare.txt": "\n".join(lines)}
    # old and new spelling
    files["tokenizer.json"] = json.dumps({"model": {"merges": lines[:9] + pairs[9:]}})
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert tool.qwen_ranks(tmp_path / name) == ranks, name


def test_other_ranks_are_refused(qwen, tmp_path, capsys):
    raw = qwen[0].read_bytes()
    wrong = {
        "cut.tiktoken": raw[:-40],
        "flipped.tiktoken": raw.replace(b"//4x ", b"//4Y ", 1),
        "empty": b"",
        "gpt2.txt": bz2.decompress((DATA / "gpt2_vocab.bpe.bz2").read_bytes()),
        "vocab.json": b'{"!": 0}',
        "cut.json": b'{"model": {"merges"',
        "page.html": b"<html> sign in",
        "torn": b"\xff \xff \xff",
    }
    assert wrong["flipped.tiktoken"] != raw
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            SystemExit,
            match=f"^text.py: .*{name} is damaged or not Qwen's: [^\n]*merges.txt[^\n]*$",
        ):
            tool.qwen_ranks(tmp_path / name)
    with pytest.raises(SystemExit, match="cannot read .*missing: No such file"):
        tool.qwen_ranks(tmp_path / "missing")
    with pytest.raises(SystemExit):
        tool.main(["a.txt", "--out", str(tmp_path), "--ranks", "x"])
    assert capsys.readouterr().err == "text.py: --ranks is for --tokenizer qwen\n"


@pytest.mark.parametrize("hub", [fineweb.REPO], indirect=True)
def test_qwen_from_the_hub(hub, synthetic, qwen, tmp_path):
    hub.files = {
        "merges.txt": "\n".join(f"{spelled(a)} {spelled(b)}" for a, b in synthetic[0]).encode()
    }
    code = (
        f"import text; text.QWEN_SHA256 = {tool.QWEN_SHA256!r}; print(len(text.qwen_ranks(None)))"
    )
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    for url in (hub.url, "http://127.0.0.1:9"):  # the second one is answered from the cache
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=DATA,
            env=env | {"HF_ENDPOINT": url},
            capture_output=True,
            text=True,
        )
        assert (done.stdout, done.stderr) == ("151643\n", "")
    (tmp_path / "a.txt").write_text("hello")
    env["HF_HOME"] = str(tmp_path / "empty")
    done = run("text.py", tmp_path / "a.txt", "--out", tmp_path / "s", "--tokenizer", "qwen",
               env=env | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    refused(done, "merges.txt", "--ranks", tool.QWEN_REPO, "refused")
    assert not (tmp_path / "s").exists()


def test_sample_finds_the_tokenizer_of_a_vocabulary(qwen):
    import sample
    # what an older checkpoint has: None
    for name, vocab, ranks, stop in ((None, 256, None, None), (None, 50257, None, 50256),
                                     ("bytes", 50304, None, None), ("gpt2", 60000, None, 50256),
                                     (None, 151_665, qwen[0], 151_643)):
        tokenizer = sample.make_tokenizer(name, vocab, ranks)
        ids = tokenizer.encode("Zw\u00f6lf e\u0301<|endoftext|>")
        assert {type(i) for i in ids} == {int} and max(ids) < 50256 and tokenizer.stop == stop
        text = tokenizer.decode(ids).decode()
        assert unicodedata.normalize("NFC", text) == "Zw\u00f6lf \u00e9<|endoftext|>"
    for name, vocab in ((None, 300), ("mine", 256), (["bytes"], 256), ("gpt2", 256)):
        with pytest.raises(SystemExit, match=f"no tokenizer .* vocabulary of {vocab} tokens.*qwen"):
            sample.make_tokenizer(name, vocab)
    # the padded size is Qwen's too
    with pytest.raises(SystemExit, match="cannot read .*missing"):
        sample.make_tokenizer(None, 151_936, qwen[0].with_name("missing"))


# ---------------------------------------------------------------- text.py: refusals
BAD_INPUT = {           # name: (content, more arguments, words of the answer)
    "latin1.txt": (b"ok\n\xe9t\xe9\n", [], ["not UTF-8", "latin1.txt", "near line"]),
    "missing.txt": (None, [], ["no such file"]),
    "empty.txt": (b"", [], ["hold no text"]),
    "blank.txt": (b" \n\n", [], ["hold no text"]),
    "short.txt": (b"hello", ["--val_tokens", "99"], ["too few", "99"]),
    "paper.pdf": (b"%PDF", [], [".txt", ".jsonl"]),
    "-": (None, [], [".txt"]),
    "cut.txt.gz": (gzip.compress(os.urandom(3000).hex().encode())[:1500], [], ["damaged"]),
    "fake.gz": (b"no gzip at all", [], ["damaged"]),
    "cut.txt.bz2": (bz2.compress(bytes(3000))[:30], [], ["damaged"]),
    "fake.bz2": (b"no bzip2 at all", [], ["damaged"]),
    "row.jsonl": (b'{"text": "a"}\n{"text": \n', [], ["line 2", "not a row"]),
    "field.jsonl": (b'{"text": "a"}\n{"body": "b"}\n', [], ["line 2", "'text'", "body", "--field"]),
    "list.jsonl": (b'["a"]\n', [], ["line 1", "list"]),
    "both.txt": (b"a", ["--val", "x.txt", "--val_tokens", "3"], ["either"]),
    "zero.txt": (b"a", ["--shard_tokens", "0"], ["at least 1"]),
    "abbreviated.txt": (b"a", ["--shard", "5"], ["--shard"]),
    "hub.txt": (b"a", ["--hub", "me/set"], ["either", "--hub"]),
    "rows.txt": (b"a", ["--rows", "3"], ["--rows", "for --hub"]),
    "split.txt": (b"a", ["--split", "test"], ["--split", "for --hub"]),
    "config.txt": (b"a", ["--hub_config", "b"], ["--hub_config", "for --hub"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_and_leaves_nothing(name, tmp_path, capsys):
    content, more, words = BAD_INPUT[name]
    path = Path(name) if name == "-" else tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        tool.main([str(path), "--out", str(tmp_path / "s"), "--tokenizer", "bytes", *more])
    answer = (
        stop.value.code
        if isinstance(stop.value.code, str)
        else capsys.readouterr().err.rstrip("\n")
    )
    assert answer.startswith("text.py: ") and "\n" not in answer
    assert all(word in answer for word in words), answer
    assert not (tmp_path / "s").exists() or not list((tmp_path / "s").iterdir())


def test_the_command_itself_refuses_in_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("hello " * 50_000)
    refused(run("text.py", tmp_path / "no.txt", "--out", tmp_path / "s"), "no such file")
    refused(run("text.py", tmp_path / "a.txt"), "--out")
    refused(run("text.py", "--out", tmp_path / "s"), "either", "--hub")
    refused(run("text.py", tmp_path / "a.txt", "--out", tmp_path / "a.txt/s"), "cannot write")

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    done = run("text.py", tmp_path / "a.txt", "--out", tmp_path / "s", preexec_fn=small_disk)
    refused(done, "cannot write")
    assert not list((tmp_path / "s").iterdir())


def test_old_shards_are_neither_overwritten_nor_mixed(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    make(tmp_path / "a.txt", "--out", tmp_path / "s", "--tokenizer", "bytes", "--val_tokens", 0)
    with pytest.raises(SystemExit, match="already there"):
        make(tmp_path / "a.txt", "--out", tmp_path / "s", "--tokenizer", "bytes")


def test_the_last_line_says_how_to_train(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello " * 50)
    more = ["--out", tmp_path / "s", "--tokenizer", "bytes"]

    def last_line(*flags):
        tool.main([str(word) for word in [tmp_path / "a.txt", *more, *flags]])
        return capsys.readouterr().out.splitlines()[-1]

    line = last_line()
    assert line == f"train with: python train_gpt2.py --data {tmp_path / 's'}"
    cfg = parse(shlex.split(line)[4:])
    assert [len(shards) for shards in open_data(cfg)[:2]] == [1, 1]
    # A second set in the same folder, which --data would mix with the first.
    line = last_line("--prefix", "other")
    cfg = parse(shlex.split(line)[4:])
    assert f"{tmp_path}/s/other_val_*.bin" == cfg.input_val_bin
    assert "nothing was held out" in last_line("--prefix", "third", "--val_tokens", 0)


def test_nothing_appears_before_everything_is_written(tmp_path, monkeypatch):
    def broken(*_):
        yield np.arange(5), True
        assert not list((tmp_path / "s").glob("*.bin"))
        raise RuntimeError("power cut")
    (tmp_path / "a.txt").write_text("hello")
    monkeypatch.setattr(tool, "tokenise", broken)
    with pytest.raises(RuntimeError):
        make(tmp_path / "a.txt", "--out", tmp_path / "s", "--val_tokens", 0, "--shard_tokens", 2)
    assert not list((tmp_path / "s").iterdir())


def test_damaged_merges_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "__file__", str(tmp_path / "text.py"))
    for content in (None, b"", b"BZh9", bz2.compress(b"#version: 0.2\n")):
        if content is not None:
            (tmp_path / "gpt2_vocab.bpe.bz2").write_bytes(content)
        with pytest.raises(SystemExit, match="missing or damaged"):
            tool.gpt2_encoding()


# ---------------------------------------------------------------- text.py: faults
def test_a_byte_order_mark_is_no_text_where_a_file_begins(tmp_path):
    mark = "\ufeff".encode()
    contents = {"a.txt": mark + b"one" + mark + b"\n",
                "b.jsonl": mark + b'{"text": "two"}\n',
                "c.txt.gz": gzip.compress(mark + b"three")}
    for name, raw in contents.items():
        (tmp_path / name).write_bytes(raw)
    shards, _ = make(*[tmp_path / name for name in contents], "--out", tmp_path / "s",
                     "--tokenizer", "bytes", "--val_tokens", 0)
    # Inside a text it is U+FEFF, a character.
    assert bytes(shards["train_000001"]) == b"one" + mark + b"\ntwothree"


def test_a_null_is_a_blank_document_in_files_too(tmp_path):
    rows = [{"text": "one"}, {"text": None}, {"text": "two"}]
    shards, _ = make(write_rows(tmp_path / "a.jsonl", rows), "--out", tmp_path / "s",
                     "--tokenizer", "bytes", "--val_tokens", 0)
    assert bytes(shards["train_000001"]) == b"onetwo"


@pytest.mark.parametrize("how", ["the same name", "a link", "a copy"])
def test_no_training_file_validates(how, tmp_path):
    train, val = tmp_path / "a.txt", tmp_path / "b.txt"
    train.write_text("hello " * 50)
    {"the same name": lambda: None, "a link": lambda: os.link(train, val),
     "a copy": lambda: val.write_bytes(train.read_bytes())}[how]()
    argv = [str(train), "--tokenizer", "bytes", "--out", str(tmp_path / "s"), "--val"]
    with pytest.raises(SystemExit, match="^text.py: --val .* has the text of .*a.txt.*seen$"):
        tool.main([*argv, str(val if val.exists() else train)])
    assert not (tmp_path / "s").exists()
    val.unlink(missing_ok=True)
    val.write_text("other " * 50)
    tool.main([*argv, str(val)])


@pytest.mark.parametrize("prefix", ["../x", "/x", "a/b", "a/", "."])
def test_a_prefix_is_no_path(prefix, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello " * 50)
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "a.txt"), "--tokenizer", "bytes", "--out", str(tmp_path / "s"),
                   "--prefix", prefix])
    assert capsys.readouterr().err == (f"text.py: --prefix {prefix} is no beginning of a name: "
                                       "choose the folder by --out\n")


def test_a_newline_in_a_name_breaks_no_line(tmp_path, capsys):
    odd = tmp_path / "new\nline's \x1b[31m"
    odd.mkdir()
    (odd / "a\nb.txt").write_text("hello " * 50)
    argv = [str(odd / "a\nb.txt"), "--tokenizer", "bytes"]
    for more in ([], ["--prefix", "p\nq"]):
        tool.main([*argv, "--out", str(odd / "s"), *more])
        read, train, val, last = capsys.readouterr().out.splitlines()
        assert read.endswith("tokens, a\\nb.txt") and train.isprintable() and val.isprintable()
        assert train.endswith("_train_000001.bin") and last.startswith("train with: ")
        # What a shell makes of the command names the folder. The trainer refuses such names.
        words = subprocess.run(["bash", "-c", f"printf '%s\\0' {last[12:]}"],
                               capture_output=True, text=True).stdout.split("\0")
        # As it is, or in a glob.
        named = {str(odd / "s"), glob.escape(str(odd / "s"))}
        assert any(name in word for name in named for word in words)
        assert "--data" in words or {"--input_bin", "--input_val_bin"} <= {*words}
    for bad in ([*argv, "--out", str(odd / "s")], [str(odd / "no\n.txt"), "--estimate"],
                [*argv, "--estimate", "--prefix", "\n/"], [*argv, "--no\nflag"]):
        with pytest.raises(SystemExit) as stop:
            tool.main(bad)
        said = capsys.readouterr().err
        said += f"{stop.value.code}\n" if isinstance(stop.value.code, str) else ""
        assert said.count("\n") == 1 and said[:-1].isprintable() and "\\n" in said


def fork(action, said):
    """Run action() in a fork, which has all imports -> its process number; `said` has its words."""
    pid = os.fork()
    if not pid:
        code = 99
        try:
            # Another test may have had them ignored.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            with open(said, "w", buffering=1) as sys.stderr:
                sys.stdout = sys.stderr
                action()
                code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
            if isinstance(e.code, str):
                said.write_text(said.read_text() + e.code + "\n")
        except BaseException as e:
            said.write_text(repr(e))
        finally:
            os._exit(code)
    return pid


def ended(pid, seconds=20):
    """Wait for a fork -> its exit code, as a shell has it; AssertionError if it takes too long."""
    for _ in range(seconds * 50):
        if (done := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(done[1])
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"no end after {seconds} s")


def wait_for(pattern, folder):
    """Wait until a file is there -> its path."""
    for _ in range(500):
        if found := sorted(folder.glob(pattern)):
            return found[0]
        time.sleep(0.02)
    raise AssertionError(f"no {pattern}")


def endless(tmp_path, prefix="p"):
    """Start text.py, as a command, on a text that takes long -> its process, once it writes."""
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello " * 2**20, 1) * 200)
    argv = ["text.py", str(tmp_path / "a.txt.gz"), "--out", str(tmp_path / "s"),
            "--tokenizer", "bytes", "--val_tokens", "0", "--prefix", prefix]

    def command():
        sys.argv = argv
        runpy.run_path(str(DATA / "text.py"), run_name="__main__")
    pid = fork(command, tmp_path / f"said_{prefix}")
    wait_for(f".unfinished_*/{prefix}_*.bin", tmp_path / "s")
    return pid


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_text_py_in_one_line_and_leaves_nothing(name, tmp_path):
    pid = endless(tmp_path)
    number = getattr(signal, name)
    os.kill(pid, number)
    assert ended(pid) == 128 + number
    assert (tmp_path / "said_p").read_text() == "text.py: stopped; no shard was made\n"
    assert not list((tmp_path / "s").iterdir())


@pytest.mark.parametrize("before, code", [(signal.SIG_DFL, 129), (signal.SIG_IGN, 0)])
def test_a_signal_that_nohup_ignores_stays_ignored(before, code, tmp_path):
    def start():
        signal.signal(signal.SIGHUP, before)
        command.run(lambda: os.kill(os.getpid(), signal.SIGHUP), "x", "y")
    assert ended(fork(start, tmp_path / "said")) == code


def test_what_a_killed_run_left_is_swept_and_a_living_one_is_not(tmp_path):
    (tmp_path / "b.txt").write_text("hello " * 50)
    more = ["--out", str(tmp_path / "s"), "--tokenizer", "bytes"]
    killed = endless(tmp_path, "killed")
    os.kill(killed, signal.SIGKILL)
    assert ended(killed) == -signal.SIGKILL
    folder, = (tmp_path / "s").iterdir()
    # So that the next one does not sweep it.
    folder.rename(tmp_path / "later")
    alive = endless(tmp_path, "alive")
    # A stopped process lives.
    os.kill(alive, signal.SIGSTOP)
    try:
        (tmp_path / "later").rename(folder)
        assert len(list((tmp_path / "s").glob(".unfinished_*"))) == 2
        tool.main([str(tmp_path / "b.txt"), *more, "--prefix", "new"])
        folder, = (tmp_path / "s").glob(".unfinished_*")
        assert [path.name for path in folder.iterdir()] == ["alive_train_000001.bin"]
        assert len(list((tmp_path / "s").glob("new_*.bin"))) == 2
    finally:
        os.kill(alive, signal.SIGTERM)
        os.kill(alive, signal.SIGCONT)
    assert ended(alive) == 128 + signal.SIGTERM


@pytest.mark.parametrize("prefixes, codes", [("ab", [0, 0]), ("aa", [0, 1])])
def test_two_runs_at_once(prefixes, codes, tmp_path):
    """Neither sweeps the other's folder; with one prefix the later one is refused."""
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"hello {i} " * 50)
    for out in (tmp_path / f"s{n}" for n in range(8)):
        def one(i, out=out):
            tool.main([str(tmp_path / f"{i}.txt"), "--tokenizer", "bytes", "--out", str(out),
                       "--prefix", prefixes[i]])
        pids = [fork(lambda i=i: one(i), tmp_path / f"said{i}") for i in range(2)]
        assert sorted(ended(pid) for pid in pids) == codes, (tmp_path / "said0").read_text()
        assert len(list(out.iterdir())) == 2 * len(set(prefixes))
        # The shards of one prefix are of one text.
        for prefix in set(prefixes):
            text = b"".join(open_shard(path)[0].astype(np.uint8).tobytes()
                            for path in sorted(out.glob(f"{prefix}_*")))
            assert len(set(text.split()) - {b"hello"}) == 1


def test_shards_that_appeared_meanwhile_are_not_overwritten(tmp_path, monkeypatch):
    out = tmp_path / "s"

    def other_run(*_):
        (out / "s_val_000000.bin").write_bytes(b"another run's")
        yield np.arange(50), True
    (tmp_path / "a.txt").write_text("hello")
    monkeypatch.setattr(tool, "tokenise", other_run)
    with pytest.raises(SystemExit, match="s_val_000000.bin is already there"):
        tool.main([str(tmp_path / "a.txt"), "--out", str(out), "--tokenizer", "bytes"])
    assert [p.read_bytes() for p in out.iterdir()] == [b"another run's"]


def test_a_folder_swept_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, swept = command.lock, []

    def late(folder, wait):
        if wait and not swept:
            swept.append(folder)
            os.rmdir(folder)
        return lock(folder, wait)
    monkeypatch.setattr(command, "lock", late)
    with command.unfinished(tmp_path) as folder:
        assert os.path.isdir(folder) and [folder] != swept


# ---------------- text.py: a dataset of the hub, and --estimate
ROWS = [
    {"id": i, "text": d, "body": f"{d} twice {d}"} for i, d in enumerate([*DOCS, " \n", "the end"])
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def library(monkeypatch):
    """Stands in for `datasets`: streams `rows`, raises an exception among them in its turn, notes
    what is asked."""
    fake = types.SimpleNamespace(rows=ROWS, asked=[], given=0)

    def stream():
        for row in fake.rows:
            if isinstance(row, Exception):
                raise row
            fake.given += 1
            yield row

    def load_dataset(*args, **kwargs):
        fake.asked.append((args, kwargs))
        if fake.rows and isinstance(fake.rows[0], Exception):
            raise fake.rows[0]
        return stream()
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--field", "body"],
        ["--val_tokens", "4"],
        ["--val", "held.txt"],
        ["--tokenizer", "bytes", "--shard_tokens", "9"],
    ],
    ids=lambda more: "_".join(more) or "as is",
)
def test_streamed_rows_give_the_shards_of_the_same_jsonl(
    more, library, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("held.txt").write_text("held out")
    make(write_rows(tmp_path / "a.jsonl", ROWS), "--out", tmp_path / "x", "--prefix", "p", *more)
    capsys.readouterr()
    make(
        "--hub",
        "me/set",
        "--hub_config",
        "small",
        "--split",
        "test",
        "--out",
        tmp_path / "y",
        "--prefix",
        "p",
        *more,
    )
    assert library.asked == [(("me/set", "small"), {"split": "test", "streaming": True})]
    assert " tokens, me/set\n" in capsys.readouterr().out
    x, y = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in "xy")
    assert x == y and len(x) > 1


def test_only_the_first_rows_are_asked_for(library, tmp_path, gpt2):
    # a null, as columns may hold, is no document
    library.rows = [{"text": None}, *ROWS]
    shards, _ = make("--hub", "me/set", "--rows", 3, "--val_tokens", 0, "--out", tmp_path / "s")
    assert shards == {
        "train_000001": [token for d in DOCS[:2] for token in [EOT] + gpt2.encode_ordinary(d)]
    }
    assert library.given == 3 and library.asked == [
        (("me/set", None), {"split": "train", "streaming": True})
    ]


BAD_HUB = {  # name: (rows, more arguments, words of the answer)
    "no network": (
        [ConnectionError("Couldn't reach it.")],
        [],
        ["row 1 of me/set", "reach it: check", "HTTPS_PROXY"],
    ),
    "no such set": (
        [FileNotFoundError("Dataset doesn't exist.")],
        [],
        ["doesn't exist: check NAME", "HF_TOKEN"],
    ),
    "no such split": (
        [ValueError("Bad split: x.\nThere are\n ['train']")],
        [],
        ["There are ['train']: ", "--split"],
    ),
    "says nothing": ([RuntimeError()], [], ["RuntimeError: check"]),
    "breaks off": ([*ROWS, OSError("gone")], [], ["row 6 of me/set: gone", "no shard", "--rows 5"]),
    "no field": ([{"id": 1, "body": "b"}], [], ["me/set, row 1", "'text' of id, body", "--field"]),
    "no text": (ROWS, ["--field", "id"], ["me/set, row 1", "'id' of id, text, body", "--field"]),
    "field lost": ([*ROWS, {"id": 1}], [], ["me/set, row 6", "'text' of id", "--field"]),
    "no rows": ([], [], ["hold no text"]),
    "nulls": ([{"text": None}], [], ["hold no text"]),
    "none wanted": (ROWS, ["--rows", "0"], ["--rows must be at least 1"]),
}


@pytest.mark.parametrize("name", BAD_HUB)
def test_a_bad_dataset_is_refused_and_leaves_nothing(name, library, tmp_path, monkeypatch, capsys):
    # so shards are being written when it breaks off
    monkeypatch.setattr(tool, "BATCH", 1)
    library.rows, more, words = BAD_HUB[name]
    out = tmp_path / "s"
    for last in (["--out", str(out), "--val_tokens", "0", "--shard_tokens", "3"], ["--estimate"]):
        with pytest.raises(SystemExit) as stop:
            tool.main(["--hub", "me/set", *more, *last])
        answer = (
            stop.value.code
            if isinstance(stop.value.code, str)
            else capsys.readouterr().err.rstrip("\n")
        )
        assert answer.startswith("text.py: ") and "\n" not in answer
        assert all(word in answer for word in words), answer
    # a dataset that fails at once does so before there is a folder
    assert out.exists() == (name in ("breaks off", "field lost", "no rows", "nulls"))
    assert not out.exists() or not list(out.iterdir())


def test_without_the_library_its_installation_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="^text.py: --hub needs datasets: pip install datasets$"):
        tool.main(["--hub", "me/set", "--out", str(tmp_path / "s")])
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "more",
    [[], ["--val_tokens", "0"], ["--val", "held.jsonl"], ["--hub", "me/set", "--rows", "3"]],
    ids=lambda more: "_".join(more) or "as is",
)
def test_an_estimate_counts_what_is_then_made(more, library, tmp_path, monkeypatch, capsys, gpt2):
    monkeypatch.setattr(tool, "PIECE", 97)
    monkeypatch.setattr(tool, "BATCH", 500)
    monkeypatch.chdir(tmp_path)
    long = "A long document, in pieces.\n" * 40
    Path("a.txt").write_text(
        f"hello\n<|endoftext|>\n{long}<|endoftext|>\n \n<|endoftext|>\nZw\u00f6lf\n"
    )
    write_rows(tmp_path / "held.jsonl", ROWS)
    argv = (
        [*more, "--shard_tokens", "50"]
        if "--hub" in more
        else ["a.txt", *more, "--shard_tokens", "50"]
    )
    before = sorted(tmp_path.iterdir())
    tool.main([*argv, "--estimate"])
    assert sorted(tmp_path.iterdir()) == before
    said = capsys.readouterr().out.splitlines()[-2:]
    shards, _ = make(*argv, "--out", tmp_path / "s")
    docs = [d for d in (DOCS if "--hub" in more else ["hello\n", long, "Zw\u00f6lf\n"])]
    docs += [row["text"] for row in ROWS if row["text"].strip()] if "--val" in more else []
    sizes, raw = (
        [1 + len(gpt2.encode_ordinary(d)) for d in docs],
        sum(len(d.encode()) for d in docs),
    )
    assert sum(sizes) == sum(map(len, shards.values()))
    assert said == [
        f"{'of the first 3 rows: ' if '--hub' in more else ''}{len(docs)} documents, {sum(sizes):,} tokens, "
        f"{raw:,} bytes of UTF-8, {raw / sum(sizes):.3f} bytes a token",
        f"{sum(sizes) / len(docs):.1f} tokens a document, {max(sizes)} in the longest; shards of up to 50: "
        f"{sum(k[0] == 't' for k in shards)} to train on, {sum(k[0] == 'v' for k in shards)} to validate on",
    ]


def test_an_estimate_needs_as_much_text_as_the_shards(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "blank.txt").write_text("\n")
    for name, more, words in (("a", ["--val_tokens", "99"], "too few"),
                              ("blank", ["--val", str(tmp_path / "a.txt")], "hold no text")):
        with pytest.raises(SystemExit, match=words):
            tool.main([str(tmp_path / f"{name}.txt"), *more, "--estimate"])


def test_the_real_library_streams_a_folder(tmp_path):
    pytest.importorskip("datasets")
    from pyarrow import Table, parquet
    for kind in ("j", "p"):
        (tmp_path / kind).mkdir()
    write_rows(tmp_path / "j/train.jsonl", ROWS)
    parquet.write_table(Table.from_pylist(ROWS), tmp_path / "p/train.parquet", row_group_size=2)
    make(write_rows(tmp_path / "a.jsonl", ROWS), "--out", tmp_path / "x", "--prefix", "p")
    make(write_rows(tmp_path / "b.jsonl", ROWS[:3]), "--out", tmp_path / "y", "--prefix", "p")
    code = """import text
for kind, more in (("j", []), ("p", ["--rows", "3"])):
    text.main(["--hub", kind, "--out", "out_" + kind, "--prefix", "p", *more])
for more in (["j", "--split", "no"], ["j", "--hub_config", "no"], ["j", "--field", "no"], ["me/no"]):
    try:
        text.main(["--out", "no", "--hub", *more])
    except SystemExit as stop:
        print(stop)"""
    env = {
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(ROOT), str(DATA), os.environ.get("PYTHONPATH")])
        ),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | env,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and not (tmp_path / "no").exists()
    for ours, theirs in (("out_j", "x"), ("out_p", "y")):
        x, y = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in (ours, theirs))
        assert x == y and len(x) == 2
    answers = done.stdout.splitlines()[-4:]
    for answer, words in zip(
        answers, ("['train']", "['default']", "of id, text, body", "HTTPS_PROXY"), strict=True
    ):
        assert answer.startswith("text.py: ") and words in answer


# ---------------- fineweb.py against a hub on the loopback
def shard(count, magic=20240520):
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, count
    return header.tobytes() + (np.arange(count) % 50257).astype("<u2").tobytes()


@pytest.fixture(params=[fineweb.REPO, "me/toy"])
def hub(request):
    """A hub with one dataset, and Qwen's repository: `files`, `faults` of the next GETs, `busy`
    statuses before all.

    The default dataset is fetched without a list of its files; another is listed, and names its
    files otherwise.
    """
    class Hub(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        files, faults, busy, log, repo = {}, [], [], [], request.param
        gone = threading.Event()

        def do_HEAD(self):
            self.log.append(f"{self.command} {self.path}")
            name = self.path.rpartition("/")[2]
            known = self.path in [f"/{repo}/resolve/{rev}/{name}" for rev in ("main", "c" * 40)
                                  for repo in (f"datasets/{self.repo}", tool.QWEN_REPO)]
            body = self.files.get(name) if known else None
            if self.repo != fineweb.REPO and self.path.startswith(
                f"/api/datasets/{self.repo}/tree/main?"
            ):
                known, body = (
                    True,
                    json.dumps(
                        [
                            {"type": "file", "path": name, "size": len(data), "oid": "0"}
                            for name, data in reversed(self.files.items())
                        ]
                    ).encode(),
                )
            elif self.repo != fineweb.REPO and self.path == f"/api/datasets/{self.repo}":
                known, body = True, json.dumps({"id": self.repo}).encode()
            status = self.busy.pop() if known and self.busy else 200 if body is not None else 404
            self.send_response(status)
            self.send_header("X-Repo-Commit", "c" * 40)
            if status == 200:
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            elif status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            body = body if status == 200 else b""
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return body

        def do_GET(self):
            body = self.do_HEAD()
            fault = self.faults.pop(0) if body and self.faults and "/resolve/" in self.path else ""
            self.close_connection = fault == "cut off"
            if fault in ("stall", "drip"):
                # 1 KB, then silence; or a tenth every tenth of a second
                step = 1000 if fault == "stall" else -(-len(body) // 10)
                for i in range(0, len(body), step):
                    self.wfile.write(body[i:i + step])
                    self.wfile.flush()
                    if self.gone.wait(60 if fault == "stall" else 0.1):
                        return
                return
            self.wfile.write({"cut off": body[:500], "flipped": body[:-1] + b"x"}.get(fault, body))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.url = f"http://127.0.0.1:{server.server_port}"
    stem = "fineweb" if Hub.repo == fineweb.REPO else "edu_fineweb"
    Hub.files = {f"{stem}_{name}.bin": shard(n) for name, n in
                 (("val_000000", 300), ("train_000001", 1000), ("train_000002", 2000))}
    yield Hub
    Hub.gone.set()
    server.shutdown()
    server.server_close()


def fetch(tmp_path, url, repo, *argv):
    env = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    return run("fineweb.py", *argv, "--out", tmp_path / "out", "--repo", repo, env=env)


def test_download_survives_and_continues(hub, tmp_path, capsys):
    """A busy hub, a body cut off, a flipped byte: retried. A damaged file is replaced, an intact
    one kept."""
    out, (val, one, two) = tmp_path / "out", hub.files
    out.mkdir()
    (out / one).write_bytes(hub.files[one][:-2])
    (out / two).write_bytes(hub.files[two])
    hub.busy, hub.faults = [503], ["cut off", "", "flipped"] if hub.repo == fineweb.REPO else []
    done = fetch(tmp_path, hub.url, hub.repo, 2)
    assert done.returncode == 0 and not hub.faults and not hub.busy, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [
        [val, "1/2"],
        [one, "2/2"],
    ]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == hub.files
    assert not any(two in line for line in hub.log)
    assert any("/tree/" in line for line in hub.log) == (hub.repo != fineweb.REPO)
    if hub.repo == fineweb.REPO:
        fineweb.main(["2", "--out", str(out)])      # all there: no hub is asked
        assert "3 of 3" in capsys.readouterr().out


def test_another_dataset_has_its_own_folder_and_names(tmp_path, monkeypatch, capsys):
    listing = [
        "README.md",
        "x/my_train_000002.bin",
        "x/my_train_000001.bin",
        "x/my_val_000000.bin",
        "my_train_3.npy",
    ]
    monkeypatch.setattr(fineweb, "ROOT", tmp_path)
    monkeypatch.setattr(fineweb, "retry", lambda action, name, *_, **__: (
        listing if "list" in name else argparse.Namespace(size=10**15)))
    with pytest.raises(SystemExit, match="3000000.0 GB needed"):
        fineweb.main(["2", "--repo", "me/toy"])
    assert capsys.readouterr().out == f"{tmp_path}/data/toy: 0 of 3 shards are there\n"
    (tmp_path / "data/toy/my_train_000001.bin").write_bytes(shard(9))
    (tmp_path / "data/toy/my_val_000000.bin").write_bytes(shard(9))
    fineweb.main(["1", "--repo", "me/toy"])
    assert "2 of 2" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match="me/toy offers 1 files .*_val_.* and 2 .*_train_.*check --repo and N"
    ):
        fineweb.main(["3", "--repo", "me/toy"])


def test_files_of_one_name_in_two_folders_are_refused(tmp_path, monkeypatch):
    listing = ["a/x_train_1.bin", "a/x_val_0.bin", "b/x_train_1.bin", "b/x_train_2.bin"]
    monkeypatch.setattr(fineweb, "retry", lambda action, name, *_, **__: (
        listing if "list" in name else argparse.Namespace(size=10**15)))
    with pytest.raises(SystemExit, match="a/x_train_1.bin and b/x_train_1.bin: .*by hand") as e:
        fineweb.main(["2", "--repo", "me/toy", "--out", str(tmp_path)])
    assert "\n" not in e.value.code
    # One of them alone is no trouble.
    with pytest.raises(SystemExit, match="GB needed"):
        fineweb.main(["1", "--repo", "me/toy", "--out", str(tmp_path)])


def test_a_full_disk_is_noticed_before_downloading(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "retry", lambda *_, **__: argparse.Namespace(size=10**15))
    with pytest.raises(SystemExit, match="2000000.0 GB needed"):
        fineweb.main(["1", "--out", str(tmp_path)])


@pytest.mark.parametrize("hub", [fineweb.REPO], indirect=True)
def test_a_file_that_is_no_shard_is_refused(hub, tmp_path):
    val, one, _ = hub.files
    hub.files[one] = b"<html>sign in</html>" * 100
    refused(fetch(tmp_path, hub.url, hub.repo, 1), one, "not a token shard")
    assert [p.name for p in (tmp_path / "out").iterdir()] == [val]


def test_a_file_that_is_not_offered(hub, tmp_path):
    val, *_ = hub.files
    del hub.files[val]
    words = (
        [val, "404", "--repo"] if hub.repo == fineweb.REPO else ["0 files *_val_*.bin", "--repo"]
    )
    refused(fetch(tmp_path, hub.url, hub.repo, 1), *words)
    if hub.repo != fineweb.REPO:
        refused(fetch(tmp_path, hub.url, "me/typo", 1), "me/typo", "404", "--repo")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repo", [fineweb.REPO, "me/toy"])
def test_no_hub_at_all(repo, tmp_path):
    began = time.time()
    done = fetch(tmp_path, "http://127.0.0.1:9", repo, 1)
    assert time.time() - began < 20, "the client's own retries take longer"
    refused(done, "127.0.0.1:9", "HTTPS_PROXY", "HF_ENDPOINT", "by hand", "data/text.py")
    assert not (tmp_path / "out").exists()
    refused(run("fineweb.py", "104"), "N must be 1 to 103")
    # shards that were copied there by hand need no hub
    if repo != fineweb.REPO:
        (tmp_path / "a.txt").write_text("Some words. " * 50)
        make(tmp_path / "a.txt", "--out", tmp_path / "out")
        assert fetch(tmp_path, "http://127.0.0.1:9", repo, 1).returncode == 0


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "1.5", "--repo=--"])
def test_a_wrong_number_of_shards(wrong, capsys):
    with pytest.raises(SystemExit):
        fineweb.main([wrong])
    assert capsys.readouterr().err.count("\n") == 1


def fork_fetch(hub, tmp_path, *argv, before=lambda: None, **constants):
    """Start fineweb.py as a command, with other constants, in a fork -> its process."""
    def start():
        os.environ.update(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0",
                          NO_PROXY="127.0.0.1")
        os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
        # Its constants are read on import.
        for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
            del sys.modules[name]
        for name, value in constants.items():
            assert hasattr(fineweb, name)
            setattr(fineweb, name, value)
        before()
        command.run(lambda: fineweb.main([*map(str, argv), "--out", str(tmp_path / "out"),
                                          "--repo", hub.repo]), "fineweb.py", "kept")
    return fork(start, tmp_path / "said")


def small_chunks():
    """The client writes 10 MB at once: too coarse for a test."""
    from huggingface_hub import constants
    constants.DOWNLOAD_CHUNK_SIZE = 1000


@pytest.mark.parametrize("hub", ["me/toy"], indirect=True)
def test_a_hub_that_stalls_ends_in_one_line(hub, tmp_path):
    _, one, _ = hub.files
    # The client begins anew each second, so silence alone is no error.
    hub.faults = ["", *["stall"] * 99]
    pid = fork_fetch(hub, tmp_path, 1, "--patience", 2, before=small_chunks)
    assert ended(pid) == 1
    first, val, last = (tmp_path / "said").read_text().splitlines()
    assert last.startswith(f"fineweb.py: {hub.url} stalls: of {one} 0.0 MB came, and nothing more "
                           "for 2 s (--patience)")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [val.split()[0]]


@pytest.mark.parametrize("hub", ["me/toy"], indirect=True)
def test_a_slow_file_is_told_of_and_awaited(hub, tmp_path):
    val, one, _ = hub.files
    hub.files[one] = shard(50_000)
    hub.faults = ["", "drip"]
    pid = fork_fetch(hub, tmp_path, 1, "--patience", 0.8, before=small_chunks,
                     LOOK=0.02, SPEAK=0.2, PROGRESS=1000)
    assert ended(pid) == 0, (tmp_path / "said").read_text()
    lines = (tmp_path / "said").read_text().splitlines()[2:-1]
    told = [re.fullmatch(one + r"  (0\.\d) of 0\.1 MB, (\d\.\d\d) MB/s", line) for line in lines]
    assert 2 <= len(told) <= 6 and all(told), lines
    assert max(float(line[2]) for line in told) > 0
    assert (tmp_path / "out" / one).read_bytes() == hub.files[one]


def test_a_shard_that_is_not_offered_is_missed_before_anything_is_fetched(hub, tmp_path):
    *_, two = hub.files
    del hub.files[two]
    pid = fork_fetch(hub, tmp_path, 2)
    assert ended(pid) == 1
    assert len((tmp_path / "said").read_text().splitlines()) <= 2
    assert not any(line.startswith("GET") and "/resolve/" in line for line in hub.log)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hub", ["me/toy"], indirect=True)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_a_signal_ends_fineweb_py_and_the_next_run_sweeps(name, hub, tmp_path):
    hub.faults = ["", "stall"]
    pid = fork_fetch(hub, tmp_path, 1)
    wait_for(".unfinished_*/.cache/**/*.incomplete", tmp_path / "out")
    wait_for("*_val_*.bin", tmp_path / "out")
    time.sleep(0.3)
    os.kill(pid, getattr(signal, name))
    if name == "SIGKILL":
        assert ended(pid) == -signal.SIGKILL
        assert len(list((tmp_path / "out").glob(".unfinished_*"))) == 1
        assert ended(fork_fetch(hub, tmp_path, 1)) == 0, (tmp_path / "said").read_text()
        assert {path.name for path in (tmp_path / "out").iterdir()} == set(list(hub.files)[:2])
    else:
        assert ended(pid) == 128 + getattr(signal, name)
        assert (tmp_path / "said").read_text().splitlines()[2:] == ["fineweb.py: stopped; kept"]
        assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".bin"]


@pytest.mark.parametrize("hub", ["me/toy"], indirect=True)
@pytest.mark.parametrize("how", ["between two files", "within one"])
def test_a_disk_that_fills_meanwhile_is_one_line(how, hub, tmp_path):
    _, one, two = hub.files
    hub.files[two] = shard(100_000)

    def fill():
        usage, asked = types.SimpleNamespace(free=10**12), []

        def disk_usage(_):
            asked.append(0)
            # Before all, before the validation shard, before the first: the rest does not fit.
            return usage if len(asked) <= 3 or how == "within one" else types.SimpleNamespace(free=1)
        fineweb.shutil = types.SimpleNamespace(disk_usage=disk_usage)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    pid = fork_fetch(hub, tmp_path, 2, before=fill)
    assert ended(pid) == 1
    lines = (tmp_path / "said").read_text().splitlines()
    assert len(lines) == 4, lines
    if how == "within one":
        assert lines[3] == (f"fineweb.py: cannot write to {tmp_path}/out: File too large; 0.00 GB "
                            "are still to come, 1000.00 GB are free")
    else:
        assert lines[3].startswith("fineweb.py: 0.0 GB needed, 0.0 GB free")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        line.split()[0] for line in lines[1:3])


def test_a_newline_in_what_fineweb_py_prints(tmp_path, capsys):
    out = tmp_path / "a\nb"
    out.mkdir()
    for name in ("x_val_0.bin", "x_train_1.bin"):
        (out / name).write_bytes(shard(9))
    fineweb.main(["1", "--repo", "me/toy", "--out", str(out)])
    assert capsys.readouterr().out == f"{tmp_path}/a\\nb: 2 of 2 shards are there\n"
    with pytest.raises(SystemExit):
        fineweb.main(["1", "--no\nflag"])
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(fineweb, "retry", lambda *_, **__: argparse.Namespace(size=2 * 10**8))
    with pytest.raises(SystemExit, match="cannot write to .*: Not a directory; 0.40 GB are still "
                                         r"to come, \d+.\d\d GB are free$"):
        fineweb.main(["1", "--out", str(tmp_path / "file/out")])


@pytest.mark.parametrize("wrong", ["0", "-1", "nan"])
def test_patience_is_above_zero(wrong, capsys):
    with pytest.raises(SystemExit):
        fineweb.main(["1", f"--patience={wrong}"])
    assert capsys.readouterr().err.startswith("fineweb.py: --patience must be above 0")
