"""The command line, made from the fields of a dataclass and its comments; what its values may be.

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

from support.stages import check_stages, stages_of

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
    "muon_row_beta": BELOW_ONE, "lookahead": SHARE,
    "adam_beta1": BELOW_ONE, "adam_beta2": BELOW_ONE, "ademamix_beta3": (1e-6, BELOW_ONE[1]),
}
LIMITS = {ANY_FLOAT[1]: "finite", BELOW_ONE[1]: "below 1"}
OFF_AT_ZERO = ("logit_softcap",)
# int64 tokens of a step are 8 GiB then.
LARGEST_STEP = 2**30

# {why: settings that contradict one another}
CONTRADICTIONS = {
    "LNS is the scale of the branches: drop one":
        dict(norm=("lns",), branch_scale=(True,)),
    "its schedule takes the logarithm":
        dict(optim=("ademamix",), adam_beta1=(0.0,)),
    "there are no low-rank products to keep: add --linear cola":
        dict(linear=("dense",), recompute=("cola",)),
    "this norm undoes what GPAS does: drop one":
        dict(norm=("hybrid", "hybrid_star", "pre_post"), residual=("gpas",)),
    "RMSNorm takes the scale away: add --no-embed_norm":
        dict(embed_scale=(True,), embed_norm=(True,)),
    "no later layer can take the values: drop it":
        dict(value_residual=(True,), n_layer=(1,)),
    "no two layers can be joined: drop it":
        dict(unet_skips=(True,), n_layer=(1,)),
}


# --------------------------------------------------------------------------------------------------
# Values. What is wrong with one is a ValueError with one line.


PER_LAYER = int | tuple                              # the type of a field that layers may differ in


def listed(value) -> tuple:
    """A field's value -> all its values."""
    return value if isinstance(value, tuple) else (value,)


def per_layer(word: str):
    """"128" -> 128, "128,128,0" -> (128, 128, 0), which tiles down the layers."""
    try:
        values = tuple(map(int, word.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is no int, nor a list like 128,128,0") from None
    return values if len(values) > 1 else values[0]


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


def check_words(cfg, known):
    """Refuse words that do not print in one line, or are none of known[field]."""
    for f in fields(cfg):
        for word in cfg.rows(f.name) if f.type is str else ():
            if not word.isprintable():
                raise ValueError(f"--{f.name} {word!r}: a line break, or what else does not print, "
                                 "is in it: take it out")
            if f.name in known and word not in known[f.name]:
                raise ValueError(f"--{f.name} {word}: no such {f.name}; "
                                 f"{choices(word, known[f.name])}")


def check_settings(cfg, axes, knobs, always):
    """Refuse settings that nothing reads, that contradict one another or are out of range.

    axes {field: its rows}; knobs {field: {axis: the rows that read it}}; always: fields that may be
    set where nothing reads them.
    """
    check_names(cfg)
    check_needs(cfg, axes)
    used = {f.name for f in fields(cfg)} - knobs.keys() | cfg.fields_read()
    for f in fields(cfg):
        unread = f.name not in used and f.name not in always
        if unread and getattr(cfg, f.name) != f.default:
            raise ValueError(f"--{f.name} has no effect here, nothing in use reads it: drop it")
    if cfg.pos == "none" and "rope" not in used:
        raise ValueError("--pos none has no effect here, no mixer in use has rotary positions: "
                         "drop it")
    for why, settings in CONTRADICTIONS.items():
        if all(name in used and getattr(cfg, name) in bad for name, bad in settings.items()):
            both = " with ".join(f"--{name} {getattr(cfg, name)}" for name in settings)
            raise ValueError(f"{both}: {why}")
    for f in fields(cfg):
        if f.type in (int, float, PER_LAYER):
            for value in listed(getattr(cfg, f.name)):
                check_number(f.name, float if f.type is float else int, value)
    check_sizes(cfg, used)
    check_stages(cfg)
    check_ramps(cfg, used)


def check_names(cfg):
    """Refuse half a pair of shards, two sources of them, and a run_name that is no name."""
    if bool(cfg.input_bin) != bool(cfg.input_val_bin):
        one, other = "input_bin", "input_val_bin"
        if cfg.input_val_bin:
            one, other = other, one
        raise ValueError(f"--{one} without --{other}: the model would be scored on another "
                         "vocabulary, or on text it has seen: give both, or --data for a folder "
                         "with both")
    if cfg.input_bin and cfg.data != type(cfg).data:
        raise ValueError(f"--data {cfg.data} with --input_bin and --input_val_bin: two sources of "
                         "shards: drop one")
    name = cfg.run_name
    if name and (os.path.basename(name) != name or name in (".", "..") or "\0" in name):
        raise ValueError(f"--run_name {name!r}: must be the name of a folder, not a path: "
                         "--output_dir says where it appears")


def check_needs(cfg, axes):
    """Refuse a row whose class says that it needs another setting."""
    for axis, table in axes.items():
        for row in cfg.rows(axis):
            for name, (values, why) in getattr(table[row][0], "needs", {}).items():
                value = getattr(cfg, name)
                if value not in values:
                    raise ValueError(f"--{axis} {row} with --{name} {value}: {why}")


def check_sizes(cfg, used: set[str]):
    """Refuse sizes that do not divide, that hold nothing, or that no memory holds."""
    mixers = cfg.rows("mixer")
    if len(mixers) > cfg.n_layer:
        raise ValueError(f"--mixer {cfg.mixer}: {len(mixers)} mixers for {cfg.n_layer} layers: "
                         "some would not be built: raise --n_layer or name fewer")
    for f in fields(cfg):
        n = len(listed(getattr(cfg, f.name)))
        if n > cfg.n_layer:
            raise ValueError(f"--{f.name} has {n} values for {cfg.n_layer} layers: some would not "
                             "be read: raise --n_layer or give fewer")
    heads = "n_head" in used
    if heads and (cfg.n_embd % cfg.n_head or cfg.n_head % (cfg.n_kv_head or 1)):
        raise ValueError(f"{cfg.n_embd} channels, {cfg.n_head} heads, "
                         f"{cfg.n_kv_head or cfg.n_head} key/value heads: each must be a multiple "
                         "of the next")
    if int(cfg.mlp_ratio * cfg.n_embd) < 1:
        raise ValueError(f"--mlp_ratio {cfg.mlp_ratio} of {cfg.n_embd} channels is a hidden width "
                         "of 0: raise one of them")
    most = max(stage.T * stage.B for stage in stages_of(cfg)) * cfg.grad_accumulation_steps
    if most > LARGEST_STEP:
        raise ValueError(f"{most:,} tokens a step, at most {LARGEST_STEP:,} can be: lower "
                         "--batch_size or --grad_accumulation_steps")


def check_ramps(cfg, used: set[str]):
    """Refuse a warm-up and a warm-down that are longer than the run."""
    if cfg.lr_start and cfg.warmup_iters == 0:
        raise ValueError(f"--lr_start {cfg.lr_start} with --warmup_iters 0: nothing warms up: drop "
                         "one")
    ramps = cfg.warmup_steps
    if "warmdown_iters" in used:
        ramps += cfg.warmdown_steps
    if ramps > cfg.num_iterations:
        raise ValueError(f"--num_iterations {cfg.num_iterations} is less than the {ramps} steps of "
                         "warm-up and warm-down")


# --------------------------------------------------------------------------------------------------
# The command line

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


def readers(axes) -> dict[str, dict[str, list[str]]]:
    """{field: {axis: the rows that read it}} of every field that only rows read."""
    found = {}
    for axis, table in axes.items():
        for row, (_, arguments) in table.items():
            for field in arguments.values():
                found.setdefault(field, {}).setdefault(axis, []).append(row)
    return found


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


# {a field's type: what argparse makes of its flag}
KINDS = {int: dict(type=int, metavar="N"), float: dict(type=float, metavar="X"),
         str: dict(type=str, metavar="WORD"), PER_LAYER: dict(type=per_layer, metavar="N,N")}


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
                kind = KINDS[f.type]
            group.add_argument("--" + f.name, *synonyms.get(f.name, []),
                               help=help_text(f, field[2] or "", axes, knobs), **kind)
    return parser


def read_flags(config, parser: Parser, argv: list[str], always):
    """What was typed -> the dataclass; what is wrong with it ends in the parser's one line.

    always: fields that may be set where nothing reads them, but not typed there.
    """
    typed = parser.typed(argv)
    try:
        cfg = config(**typed)
    except ValueError as e:
        parser.error(str(e))
    if cfg.init_from and cfg.resume:
        parser.error("--init_from with --resume: a run that goes on has its weights: drop one")
    for name in always:
        if typed.get(name) and name not in cfg.fields_read():
            parser.error(f"--{name} has no effect here, no mixer in use has heads: drop it")
    return cfg
