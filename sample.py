"""Let a trained model write, token by token: the text to stdout, which checkpoint it is to stderr.

    python sample.py                                    # the newest checkpoint below logs/
    python sample.py logs/RUN --prompt "To be" --max_new_tokens 500 --temperature 0.7 --top_k 50
    python sample.py --num_samples 4 --top_p 0.9        # four at once, printed one after another
    python sample.py --interactive                      # a line in, a continuation out

--interactive continues every line it reads; the text so far stays in the context, and a line begins
behind it. Ctrl-C stops a text, Ctrl-D or the end of a pipe leaves. How far a model looks back is
said in support/decode.py.
"""
import argparse
import codecs
import os
import re
import signal
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

IGNORED = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
if __name__ == "__main__" and not IGNORED:
    # Ctrl-C while torch is imported: no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

from share.quantize import quantized
from support import exported
from support.checkpoint import read
from support.decode import Context, generate
from support.flags import Parser
from support.machine import first_line, pick_device
from support.shards import TOKENIZERS, tokenizer_of
from train_gpt2 import GPT, ROOT, Config

# --------------------------------------------------------------------------------------------------
# The checkpoint

def find(named=None):
    """A run's folder or a checkpoint file -> the file; none named: the newest below logs/.

    Below logs/ of the working directory, where train_gpt2.py puts runs, else of the repository.
    SystemExit with one line where there is none.
    """
    if named is None:
        for logs in (Path("logs"), ROOT / "logs"):
            saved = [path for path in logs.glob("*/model.pt") if os.path.isfile(path)]
            if saved:
                return max(saved, key=lambda path: path.stat().st_mtime)
        raise SystemExit("no checkpoint below logs/: train first, or name a run's folder")
    if os.path.isdir(named):
        named /= "model.pt"
    if not os.path.isfile(named):
        raise SystemExit(f"{named}: no such file: name a run's folder, or its model.pt")
    return named


def load(path):
    """Checkpoint file -> GPT in eval mode, on the CPU. SystemExit with one line if it is none."""
    return build(read(path), path)


def build(saved, path):
    """What `read` gave -> GPT, as `load` has it."""
    try:
        model = GPT(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
    except Exception as e:
        # Whatever another version of this code had in its fields and weights.
        raise SystemExit(f"{path}: not a checkpoint of this code ({first_line(e)})") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise SystemExit(f"{path}: its weights are not finite: the run had diverged")
    return model.eval()


def val_loss(saved, path) -> str:
    """The step's validation loss where the log beside the checkpoint has it, else nothing."""
    try:
        log = path.with_name("log.txt").read_text(errors="replace")
    except OSError:
        return ""
    losses = re.findall(rf"^step:{saved['step']}/\d+ val_loss:(\S+)", log, re.MULTILINE)
    return losses[-1] if losses else ""


def describe(saved, path) -> str:
    """Path, step and, where it is known, the step's validation loss."""
    loss = val_loss(saved, path)
    return f"checkpoint: {path}, step {saved['step']}" + (f", val_loss {loss}" if loss else "")


class Tokenizer(NamedTuple):
    encode: Callable                                 # text -> ids
    decode: Callable                                 # ids -> bytes of UTF-8
    size: int                                        # V without padding
    stop: int | None                                 # the id that starts a document, and ends one


def make_tokenizer(name, vocab_size: int, ranks=None) -> Tokenizer:
    """By a checkpoint's `tokenizer`; None, as in older ones: by the vocabulary's size.

    SystemExit with one line where it is none of data/text.py's.
    """
    from data import text
    name = name or tokenizer_of(vocab_size)
    if not isinstance(name, str) or vocab_size < min(TOKENIZERS.get(name, [vocab_size + 1])):
        sizes = ", ".join(f"{name} {min(sizes):,}" for name, sizes in TOKENIZERS.items())
        raise SystemExit(f"no tokenizer is known for this vocabulary of {vocab_size} tokens, only "
                         f"{sizes}: the model can be trained, not sampled")
    _, starts, codec = text.TOKENIZERS[name]
    encode, decode, _ = codec(ranks)
    return Tokenizer(lambda text: [int(token) for token in encode([text])[0]], decode,
                     max(TOKENIZERS[name]), next(iter(starts), None))


# --------------------------------------------------------------------------------------------------
# The screen

def say(text: str):
    print(text, end="", flush=True)


def show(columns, decode, heads):
    """Print rows as they are written, one after another: a row waits for those before it to end.

    columns: what `generate` yields; heads: what stands before each row. Never half a character.
    """
    utf8 = [codecs.getincrementaldecoder("utf-8")("replace") for _ in heads]
    waiting = list(heads)
    ended = set()
    row = 0
    for tokens in chain([None], columns, [[None] * len(heads)]):
        for i, token in enumerate(tokens or []):
            if token is not None:
                waiting[i] += utf8[i].decode(decode([token]))
            elif i not in ended:
                waiting[i] += utf8[i].decode(b"", final=True) + "\n"
                ended.add(i)
        while row < len(heads):
            say(waiting[row])
            waiting[row] = ""
            if row not in ended:
                break
            row += 1


def interact(first, answer):
    """Answer the prompt `first`, if there is one, then every line of stdin."""
    on_screen = sys.stdin.isatty() and sys.stdout.isatty()
    lines = [] if first is None else [first]
    while True:
        try:
            answer(lines.pop() if lines else input("> " if on_screen else ""))
        except KeyboardInterrupt:
            say("\n")
        except EOFError:
            say("\n" if on_screen else "")
            return


# --------------------------------------------------------------------------------------------------

def parse(argv=None):
    p = Parser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("checkpoint", nargs="?", type=Path,
                   help="a run's folder or its model.pt (default: the newest below logs/)")
    p.add_argument("--load", type=Path, metavar="DIR",
                   help="instead: a folder that export.py has written")
    p.add_argument("--quantize", choices=("int8",),
                   help="write with int8 weights, and say what that costs; on a CPU")
    p.add_argument("--data", default="", metavar="DIR",
                   help="for --quantize: shards that the loss is measured on (default: the run's)")
    p.add_argument("--prompt", help="what the text begins with (default: a new document, or line)")
    p.add_argument("--interactive", action="store_true",
                   help="continue every line of stdin; Ctrl-C stops a text, Ctrl-D leaves")
    p.add_argument("--num_samples", type=int, default=1, help="at once (default: %(default)s)")
    p.add_argument("--max_new_tokens", type=int, default=300,
                   help="a text ends there, or where a new document begins (default: %(default)s)")
    p.add_argument("--min_new_tokens", type=int, default=0,
                   help="no new document before (default: %(default)s)")
    p.add_argument("--temperature", type=float, default=0.8,
                   help="0: always the likeliest; else 0.001 to 1000 (default: %(default)s)")
    p.add_argument("--top_k", type=int, default=0,
                   help="draw among the k likeliest; 0: among all")
    p.add_argument("--top_p", type=float, default=1.0,
                   help="then among the fewest that have this share (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0,
                   help="sample i draws by seed + i (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    p.add_argument("--ranks", type=Path, metavar="FILE",
                   help="for Qwen's tokens, as in data/text.py")
    args = argparse.Namespace(**p.typed(sys.argv[1:] if argv is None else argv))
    if args.load and args.checkpoint:
        p.error(f"{args.checkpoint} and --load {args.load}: two models: drop one")
    if args.data and not args.quantize:
        p.error("--data is for --quantize: drop it")
    if args.top_k < 0 or args.num_samples < 1:
        p.error("--top_k must not be negative, --num_samples at least 1")
    if not 0 <= args.min_new_tokens <= args.max_new_tokens:
        p.error(f"--min_new_tokens {args.min_new_tokens} and --max_new_tokens "
                f"{args.max_new_tokens}: must be 0 or more, the first at most the second")
    # Beyond these a logit divided by it is no longer a number, or all tokens are equally likely.
    if args.temperature != 0 and not 0.001 <= args.temperature <= 1000:
        p.error(f"--temperature {args.temperature}: must be 0, or 0.001 to 1000")
    if not 0 < args.top_p <= 1:
        p.error(f"--top_p {args.top_p}: must be above 0, at most 1")
    if not 0 <= args.seed < 2**63:
        p.error(f"--seed {args.seed}: must be 0 to 2**63 - 1")
    if args.interactive and args.num_samples > 1:
        p.error("--interactive with --num_samples: it writes one text: drop one")
    return args


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device, 0)
    if args.load:
        path = args.load / exported.WEIGHTS
        saved = exported.read(args.load, Config)
    else:
        path = find(args.checkpoint)
        saved = read(path)
    model = build(saved, path)
    tokenizer = make_tokenizer(saved.get("tokenizer"), model.cfg.vocab_size, args.ranks)
    print(describe(saved, path), file=sys.stderr, flush=True)
    if args.quantize:
        model, cost = quantized(model, device, args.data)
        print(cost, file=sys.stderr, flush=True)
    del saved                                        # the optimizers' memory
    n = args.num_samples
    context = Context(model.to(device), n)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(n)]
    choice = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)

    def answer(prompt, heads):
        """Add the prompt's tokens to the context, and print what follows it."""
        ids = tokenizer.encode(prompt or "")
        if not ids and not context.ids.numel():
            ids = tokenizer.encode("\n") if tokenizer.stop is None else [tokenizer.stop]
            if prompt is not None:
                print("note: an empty prompt: the text begins with a new "
                      f"{'line' if tokenizer.stop is None else 'document'}", file=sys.stderr)
        if len(ids) > context.T:
            print(f"note: the prompt has {len(ids):,} tokens, the model sees the last "
                  f"{context.T:,}", file=sys.stderr)
        context.add(torch.tensor(ids).expand(n, -1))
        columns = generate(context, args.max_new_tokens, generators, tokenizer.size, tokenizer.stop,
                           args.min_new_tokens, **choice)
        show(columns, tokenizer.decode, heads)

    if args.interactive:
        def follow(line):
            # Behind a text, a line begins with a line break, as it does on the screen.
            answer("\n" * bool(context.ids.numel()) + line, [""])

        return interact(args.prompt, follow)
    prompt = (args.prompt or "").encode(errors="replace").decode()
    heads = [prompt]
    if n > 1:
        heads = [f"--- sample {i + 1} of {n} ---\n{prompt}" for i in range(n)]
    answer(args.prompt, heads)


if __name__ == "__main__":
    if not IGNORED:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        say("\n")
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read has had enough: nothing is left for the interpreter to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
