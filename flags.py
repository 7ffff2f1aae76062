"""The command line, made from the fields of a dataclass and its comments; what numbers may be.

A comment line of its own, up to its first full stop, is a heading; the comment behind a field is
the flag's help. Whatever is wrong is one line on stderr and exit code 1.
"""
import argparse
import difflib
import inspect
import math
import os
import re
import shutil
import sys
from dataclasses import fields

# What a number may be, (lowest, highest): no real model reaches the highest sizes, and beyond them
# torch hangs or overflows.
ANY_INT = (0, 2**31 - 1)
ANY_FLOAT = (0.0, sys.float_info.max)
SHARE = (0.0, 1.0)
BELOW_ONE = (0.0, math.nextafter(1.0, 0.0))
RANGES = {
    "n_layer": (1, 1024), "n_embd": (1, 2**16), "vocab_size": (0, 2**24), "mlp_ratio": (0.25, 1024),
    "peak_flops": (0.0, 1e6),
    "sequence_length": (1, 2**24), "batch_size": (1, 2**20), "val_batch_size": (1, 2**20),
    "grad_accumulation_steps": (1, 2**20), "num_iterations": (1, 2**31 - 1),
    "val_tokens": (1, 2**40), "train_loss_every": (1, 2**31 - 1), "seed": (0, 2**63 - 1),
    "warmup_iters": (-1, 2**31 - 1), "warmdown_iters": (-1, 2**31 - 1),
    "document_token": (-1, 2**31 - 1),
    # Beyond these the soft-cap or the softmax saturates, and the loss stands still.
    "logit_softcap": (1.0, 1e4), "logit_scale": (1e-4, 100.0),
    "afno_poles": (2, 4096), "afno_hard_thresholding_fraction": SHARE, "fan_ratio": (0.0, 0.5),
    "cola_rank": (0, 2**16), "fftnet_hidden": (0, 2**20), "gdn_chunk": (1, 2**24),
    "soap_frequency": (1, 2**31 - 1), "soap_beta": BELOW_ONE,
    "lr_start": SHARE, "lr_end": SHARE, "dropout": BELOW_ONE, "muon_momentum": BELOW_ONE,
    "adam_beta1": BELOW_ONE, "adam_beta2": BELOW_ONE, "ademamix_beta3": (1e-6, BELOW_ONE[1]),
}
LIMITS = {ANY_FLOAT[1]: "finite", BELOW_ONE[1]: "below 1"}
OFF_AT_ZERO = ("logit_softcap",)
# int64 tokens of a step are 8 GiB then.
LARGEST_STEP = 2**30


def check_number(name: str, kind: type, value: float):
    """ValueError where a field's value is outside its range; NaN is in none."""
    low, high = RANGES.get(name, ANY_INT if kind is int else ANY_FLOAT)
    off = name in OFF_AT_ZERO
    if not (low <= value <= high or off and value == 0):
        top = LIMITS.get(high, f"at most {high:,}")
        raise ValueError(f"--{name} {value} is out of range: at least {low:g} and {top}"
                         + (", or 0" if off else ""))


def near(word: str, names, prefix: str = "") -> str:
    """"did you mean NAME? " where one of the names resembles the word, else nothing."""
    found = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {prefix}{found[0]}? " if found else ""


def choices(word: str, names) -> str:
    """What to do about a word that is none of the names."""
    return f"{near(word, names)}choose from {', '.join(names)}"


def stray(word: str, argv) -> str:
    """What to do about a word that is neither a flag nor the value of one."""
    before = argv[:argv.index(word)]
    flag = next((w for w in reversed(before) if w.startswith("--")), "")
    if not flag or "=" in flag:
        return "belongs to no flag: a flag starts with --, and a value with blanks needs quotes"
    values = argv[argv.index(flag) + 1:]
    values = values[:next((i for i, w in enumerate(values) if w.startswith("--")), len(values))]
    pattern = os.path.commonprefix(values) + "*" + os.path.commonprefix(
        [v[::-1] for v in values])[::-1]
    quoted = pattern if all(map(os.path.exists, values)) else " ".join(values)
    return f"{flag} takes one value: quote it, {flag} '{quoted}'"


def check_words(name: str, words: list[str], known=None):
    """ValueError for a word that does not print in one line, or is none of those known."""
    for word in words:
        if not word.isprintable():
            raise ValueError(f"--{name} {word!r}: a line break, or what else does not print, is in "
                             "it: take it out")
        if known and word not in known:
            raise ValueError(f"--{name} {word}: no such {name}; {choices(word, known)}")


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line: without the list of all flags before it."""
    def error(self, message):
        if not message.isprintable():
            message = repr(message)[1:-1]
        raise SystemExit(f"{self.prog}: error: {message} (--help lists the flags)")

    def typed(self, argv) -> dict:
        """{field: value} of the flags that are there, and of no others."""
        for word in argv:
            # argparse takes this for no value at all.
            if re.fullmatch(r"--\w+=--", word):
                self.error(f"{word}: -- is no value")
        known, unknown = self.parse_known_args(argv)
        if unknown and unknown[0][:1] != "-":
            self.error(f"{unknown[0]}: {stray(unknown[0], argv)}")
        if unknown:
            # Without the dashes, which would make all flags alike.
            names = [flag.lstrip("-") for flag in self._option_string_actions]
            hint = near(unknown[0].split("=")[0].lstrip("-"), names, "--").strip()
            self.error(f"unrecognized argument {unknown[0]}" + (hint and f": {hint}"))
        return vars(known)


class Help(argparse.HelpFormatter):
    """A switch is one word, --[no-]NAME; on a narrow terminal the text stands below the flag."""
    def __init__(self, prog: str):
        narrow = shutil.get_terminal_size().columns < 60
        super().__init__(prog, max_help_position=6 if narrow else 24)

    def _format_action_invocation(self, action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]")
        return super()._format_action_invocation(action)


def help_text(f, comment: str, axes, knobs) -> str:
    """A field's comment, the rows of an axis, the rows that read a knob, and the default."""
    notes = []
    for axis, rows in knobs.get(f.name, {}).items():
        if len(rows) < len(axes[axis]):
            notes.append(f"for --{axis} {', '.join(rows)}")
    if f.default not in ("", None):
        notes.append(f"default: {f.default}")
    text = ": ".join(part for part in (comment, ", ".join(axes.get(f.name, ()))) if part)
    if notes:
        text += f" ({'; '.join(notes)})"
    return text.strip().replace("%", "%%")


def make_parser(config, axes, knobs, synonyms) -> Parser:
    """A parser with a flag for each field of the dataclass.

    axes {field: its rows}; knobs {field: {axis: the rows that read it}}; synonyms {field: flags}.
    """
    parser = Parser(
        allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=Help,
        usage="%(prog)s [--flag value ...]",
        description=f"Train a GPT-2-class model with the mixer you choose. Flags are the fields of "
                    f"{config.__name__}.")
    known = {f.name: f for f in fields(config)}
    group = parser
    for line in inspect.getsource(config).splitlines():
        heading = re.match(r"    # ([A-Z][A-Za-z ]*)(\.|$)", line)
        field = re.match(r"    (\w+): [^#]*(?:# (.*))?$", line)
        if heading:
            group = parser.add_argument_group(heading[1])
        elif field and field[1] in known:
            f = known[field[1]]
            if f.type in (bool, bool | None):
                kind = dict(action=argparse.BooleanOptionalAction)
            else:
                kind = dict(type=f.type, metavar={int: "N", float: "X", str: "WORD"}[f.type])
            group.add_argument("--" + f.name, *synonyms.get(f.name, []),
                               help=help_text(f, field[2] or "", axes, knobs), **kind)
    return parser
