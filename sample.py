"""Let a trained model write, token by token, by the step of its mixers where all have one.

    python sample.py                                    # the newest checkpoint below logs/
    python sample.py logs/RUN --prompt "To be" --tokens 500 --temperature 0.7 --top_k 50

The text goes to stdout; which checkpoint wrote it goes to stderr.
"""
import argparse
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import read
from machine import first_line
from train_gpt2 import GPT, ROOT, Config


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
    saved = read(path)
    try:
        model = GPT(Config(**saved["config"]))
        model.load_state_dict(saved["model"])
    except Exception as e:
        # Whatever another version of this code had in its fields and weights.
        raise SystemExit(f"{path}: not a checkpoint of this code ({first_line(e)})") from None
    if not all(p.isfinite().all() for p in model.parameters()):
        raise SystemExit(f"{path}: its weights are not finite: the run had diverged")
    return model.eval()


def codec(vocab_size, ranks=None):
    """Vocabulary size -> (text -> ids, ids -> text), with text.py's tokenizer of that size."""
    from data.text import TOKENIZERS
    # Unpadded, and padded.
    sizes = {"bytes": (256, 256), "gpt2": (50257, 50304), "qwen": (151_643, 151_936)}
    name = next((name for name, (low, high) in sizes.items() if low <= vocab_size <= high), None)
    if not name:
        raise SystemExit(f"no tokenizer for a vocabulary of {vocab_size:,} tokens, only for "
                         f"{sizes}")
    encode, decode, _ = TOKENIZERS[name][2](ranks)
    return lambda text: [int(token) for token in encode([text])[0]], decode


@torch.no_grad()
def generate(model, ids, n, temperature=1.0, top_k=0):
    """Yield n token ids after the prompt ids (not empty).

    The window moves on when sequence_length is reached: decoding then starts again from its last
    half. Where a mixer has no step, the whole window is run for every token.
    """
    T = model.cfg.sequence_length
    ids = list(ids)
    decodes = all(hasattr(block.mixer, "step") for block in model.blocks)
    t = T                                    # tokens the state has seen; T: start anew
    for _ in range(n):
        if decodes:
            if t == T:
                if len(ids) >= T:
                    ids = ids[-max(1, T // 2):]
                state = model.init_state(1)
                t = 0
            for token in ids[t:]:
                logits, state = model.step(torch.tensor([token]), state)
            t = len(ids)
        else:
            logits = model(torch.tensor([ids[-T:]]))[:, -1]
        token = pick(logits, temperature, top_k)
        ids.append(token)
        yield token


def pick(logits, temperature, top_k):
    """Logits (1, V) -> a token id; temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return int(torch.multinomial(F.softmax(logits / temperature, dim=-1), 1))


def main(argv=None):
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.error = lambda message: p.exit(2, f"sample.py: {message}\n")
    p.add_argument("checkpoint", nargs="?", type=Path,
                   help="a run's folder or its model.pt (default: the newest below logs/)")
    p.add_argument("--prompt", default="\n")
    p.add_argument("--tokens", type=int, default=300)
    p.add_argument("--temperature", type=float, default=0.8,
                   help="0: always the likeliest; else 0.001 to 1000 (default: %(default)s)")
    p.add_argument("--top_k", type=int, default=0,
                   help="sample among the k likeliest; 0: among all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--ranks", type=Path, metavar="FILE",
                   help="for Qwen's tokens, as in data/text.py")
    args = p.parse_args(argv)
    # argparse of Python 3.11 and 3.12 reads `--prompt=--` as an empty list.
    if [] in vars(args).values():
        p.error("-- is no value")
    if args.tokens < 0 or args.top_k < 0:
        p.error("--tokens and --top_k must not be negative")
    # Beyond these a logit divided by it is no longer a number, or all tokens are equally likely.
    if args.temperature != 0 and not 0.001 <= args.temperature <= 1000:
        p.error(f"--temperature {args.temperature}: must be 0, or 0.001 to 1000")
    if not 0 <= args.seed < 2**63:
        p.error(f"--seed {args.seed}: must be 0 to 2**63 - 1")
    path = find(args.checkpoint)
    model = load(path)
    encode, decode = codec(model.cfg.vocab_size, args.ranks)
    print(f"checkpoint: {path}", file=sys.stderr)
    torch.manual_seed(args.seed)
    prompt = encode(args.prompt)[-model.cfg.sequence_length:] or encode("\n")
    print(decode(prompt + list(generate(model, prompt, args.tokens, args.temperature, args.top_k))))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    main()
