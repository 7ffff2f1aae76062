"""Score a checkpoint on the tasks of EleutherAI's lm-eval, and in bits per byte of any text.

    python evals.py logs/RUN --tasks hellaswag,arc_easy,arc_challenge,mmlu --num_fewshot 1
    python evals.py logs/RUN --tasks hellaswag,mmlu --data DIR --limit 100 --json out.json
    python evals.py logs/RUN --text book.txt            # .txt or .jsonl, perhaps .gz or .bz2
    python evals.py logs/RUN --positions                # the run's validation loss, by position

--tasks takes any name of lm-eval (pip install lm-eval), in its own prompts and metrics. Rows come
from the hub, or with --data from a folder's files, data/tasks.py says which. --limit is lm-eval's:
the first rows of a task, for mmlu of each of its 57 subjects.

chance is what guessing among the choices gives, or a model for which all tokens are equally likely;
written answers have none. A score that is not 2 standard errors better is "not above chance". A
model that knows lengths alone may be below (records/2026-11-29_evals).

--text needs no package. Documents are scored apart, T tokens at a time, as lm-eval's rolling
likelihoods. Bits are per byte of the text, so models of any vocabulary compare; the standard error
is over windows. What a text begins behind is the token that starts a document, for bytes a newline.

--positions needs the run's shards: nats per token where it had so many tokens to look back on. A
model that uses a long context has lower losses far from the start.
"""
import argparse
import json
import math
import os
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from sample import build, describe, find, make_tokenizer
from share.harness import row, run_tasks, start_of, tell
from share.likelihood import pieces, score
from support.checkpoint import read
from support.flags import Parser
from support.machine import pick_device
from support.shards import BYTE_VOCAB, open_data
from train_gpt2 import BATCHES, shifted

# --------------------------------------------------------------------------------------------------
# Bits per byte

def documents(path: Path, tokenizer):
    """A text file -> the ids of its documents; the bytes of them all, as UTF-8.

    As data/text.py reads it: a line <|endoftext|> separates documents, and blank ones are none.
    """
    from data import text
    if not path.is_file():
        raise SystemExit(f"--text {path}: no such file")
    reader = text.jsonl_pieces if ".jsonl" in path.suffixes else text.text_pieces
    found = []
    size = 0
    for piece, starts in reader(path, argparse.Namespace(separator="<|endoftext|>", field="text")):
        if not piece.strip() and starts:
            continue
        if starts:
            found.append([])
        found[-1] += tokenizer.encode(piece)
        size += len(piece.encode(errors="replace"))
    if not found:
        raise SystemExit(f"--text {path}: holds no text")
    return found, size


def run_text(path: Path, args, model, tokenizer):
    """-> the row of a text."""
    found, size = documents(path, tokenizer)
    T = model.cfg.sequence_length
    windows = [pair for ids in found for pair in pieces([start_of(tokenizer)], ids, T)]
    bits = [-log_p / math.log(2) for log_p, _ in score(model, windows, args.batch_size, tell)]
    lengths = [len(after) for _, after in windows]
    mean = sum(bits) / sum(lengths)
    stderr = None
    if len(windows) > 1:
        off = sum((b - mean * n)**2 for b, n in zip(bits, lengths))
        stderr = math.sqrt(off * len(windows) / (len(windows) - 1)) / size
    print(f"{path}: {size:,} bytes, {sum(lengths):,} tokens, {len(found):,} documents, "
          f"{len(windows):,} windows of at most {T:,} tokens")
    chance = math.log2(model.cfg.vocab_size) * sum(lengths) / size
    return row(path.name, len(windows), 0, "bits_per_byte", sum(bits) / size, stderr, chance, False)


# --------------------------------------------------------------------------------------------------
# By position in the row

@torch.no_grad()
def run_positions(args, model):
    """-> rows, one a range of positions: 64 tokens, then as many as all before them.

    Over the run's own validation windows; the standard error is over windows.
    """
    cfg = model.cfg
    T = cfg.sequence_length
    _, shards, vocab = open_data(cfg)
    if vocab > cfg.vocab_size:
        raise SystemExit(f"--positions: the shards have a vocabulary of {vocab}, the model of "
                         f"{cfg.vocab_size}: they are not those it was trained on")
    batches = BATCHES[cfg.batches][0](shards, cfg, shuffle=False)
    if batches.widths != [T]:
        raise SystemExit(f"--positions: rows of --batches {cfg.batches} have many lengths: it "
                         "needs windows, or packed ones")
    device = next(model.parameters()).device
    n = batches.first(cfg.val_tokens)
    losses = []                                      # (windows, T)
    for first in range(0, n, args.batch_size):
        rows = torch.from_numpy(batches.read(range(first, min(first + args.batch_size, n))))
        inputs, targets = shifted(rows.to(device))
        # A row at a time: whole logits of a batch may not fit.
        for one, wanted in zip(inputs, targets):
            losses.append(F.cross_entropy(model(one[None])[0], wanted, reduction="none").cpu())
        tell(len(losses), n)
    losses = torch.stack(losses).double()
    ends = [end for end in (64 * 2**i for i in range(24)) if end < T] + [T]
    rows = []
    for begin, end in zip([0, *ends], ends):
        mean = losses[:, begin:end].mean(1)
        stderr = float(mean.std() / math.sqrt(n)) if n > 1 else None
        rows.append(row(f"positions {begin}-{end - 1}", n, 0, "nats_per_token", float(mean.mean()),
                        stderr, math.log(cfg.vocab_size), False))
    return rows


# --------------------------------------------------------------------------------------------------

def print_table(rows):
    print(f"{'task':28} {'n':>6} {'shots':>5}  {'metric':22} {'value':>10} {'stderr':>8} "
          f"{'chance':>10}")
    for r in rows:
        numbers = [f"{'—':>{width}}" if r[name] is None else f"{r[name]:{width}.4g}"
                   for name, width in (("value", 10), ("stderr", 8), ("chance", 10))]
        mark = "  not above chance" if r["above_chance"] is False else ""
        print(f"{r['task']:28} {r['n']:6,} {r['shots']:5}  {r['metric']:22} {' '.join(numbers)}"
              f"{mark}")


def parse(argv=None):
    p = Parser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("checkpoint", nargs="?", type=Path,
                   help="a run's folder or its model.pt (default: the newest below logs/)")
    p.add_argument("--tasks", default="", help="names of lm-eval, a list a,b,c")
    p.add_argument("--data", type=Path, metavar="DIR", help="the tasks' files, instead of the hub")
    p.add_argument("--num_fewshot", type=int, metavar="N",
                   help="solved examples in a prompt (default: the task's own)")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N rows of every task")
    p.add_argument("--text", type=Path, metavar="FILE", help="bits per byte of this text")
    p.add_argument("--positions", action="store_true",
                   help="loss by position in the row, on the run's validation shards")
    p.add_argument("--batch_size", type=int, default=16, help="rows (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--ranks", type=Path, metavar="FILE",
                   help="for Qwen's tokens, as in data/text.py")
    args = argparse.Namespace(**p.typed(sys.argv[1:] if argv is None else argv))
    if not (args.tasks or args.text or args.positions):
        p.error("nothing to do: give --tasks, --text or --positions")
    if args.tasks and not all(args.tasks.split(",")):
        p.error(f"--tasks {args.tasks}: a name is empty")
    least = {"batch_size": 1, "limit": 1, "num_fewshot": 0}
    if any((value := getattr(args, name)) is not None and value < n for name, n in least.items()):
        p.error("--batch_size and --limit must be at least 1, --num_fewshot 0 or more")
    if args.data and not args.data.is_dir():
        p.error(f"--data {args.data}: no such folder")
    if args.json and not os.access(args.json.absolute().parent, os.W_OK):
        p.error(f"--json {args.json}: no folder there that may be written to")
    return args


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device, 0)
    path = find(args.checkpoint)
    saved = read(path)
    model = build(saved, path).to(device)
    tokenizer = make_tokenizer(saved.get("tokenizer"), model.cfg.vocab_size, args.ranks)
    print(describe(saved, path), flush=True)
    rows = []
    report = dict(checkpoint=str(path), step=saved["step"], torch=torch.__version__,
                  parameters=sum(p.numel() for p in model.parameters()),
                  context=model.cfg.sequence_length, vocabulary=model.cfg.vocab_size)
    if args.text:
        rows.append(run_text(args.text, args, model, tokenizer))
    if args.positions:
        rows += run_positions(args, model)
    shown = [*rows]
    if args.tasks:
        names = args.tasks.split(",")
        found, asked, cut = run_tasks(names, args, model, tokenizer)
        rows += found
        # Of a group its own line; all tasks are in the JSON.
        shown += [r for r in found if r["task"] in names] or found
        report |= dict(lm_eval=version("lm_eval"), limit=args.limit, prompts=asked, cut=cut)
        if cut:
            print(f"note: {cut:,} of {asked:,} prompts are longer than the model's "
                  f"{report['context']:,} {'bytes' if tokenizer.size == BYTE_VOCAB else 'tokens'}: "
                  "their left ends were cut off")
    print_table(shown)
    if args.json:
        args.json.write_text(json.dumps(report | dict(results=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
