"""The command line, made from the fields of a dataclass and the comments in its source.

A comment line of its own, up to its first full stop, is a heading; the comment behind a field is
the flag's help. Whatever is wrong is one line on stderr and exit code 1.
"""
import argparse
import difflib
import inspect
import re
from dataclasses import fields


def near(word: str, names, prefix: str = "") -> str:
    """"did you mean NAME? " where one of the names resembles the word, else nothing."""
    found = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {prefix}{found[0]}? " if found else ""


def choices(word: str, names) -> str:
    """What to do about a word that is none of the names."""
    return f"{near(word, names)}choose from {', '.join(names)}"


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line: without the list of all flags before it."""
    def error(self, message):
        raise SystemExit(f"{self.prog}: error: {message} (--help lists the flags)")

    def typed(self, argv) -> dict:
        """{field: value} of the flags that are there, and of no others."""
        for word in argv:
            # argparse takes this for no value at all.
            if word.endswith("=--"):
                self.error(f"{word}: -- is no value")
        known, unknown = self.parse_known_args(argv)
        if unknown:
            # Without the dashes, which would make all flags alike.
            names = [flag.lstrip("-") for flag in self._option_string_actions]
            hint = near(unknown[0].split("=")[0].lstrip("-"), names, "--").strip()
            self.error(f"unrecognized argument {unknown[0]}" + (hint and f": {hint}"))
        return vars(known)


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
        allow_abbrev=False, argument_default=argparse.SUPPRESS, usage="%(prog)s [--flag value ...]",
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
