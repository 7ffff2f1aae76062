"""Copies runs into a record: a log of each without its sources, and the sources once.

    python records/add.py logs/2026-11-24_hybrid --to records/2026-11-24_hybrid      # after run.sh
    python records/add.py logs/RUN=wide logs/OTHER --to records/2026-12-01_wide

A folder is read, and its variants named, as by records/table.py; =VARIANT names them otherwise. A
log becomes VARIANT_sSEED.txt, that of a run that did not finish VARIANT_sSEED_failed.txt, which
tables leave out. Its first line names the file of its sources and their checksum. Sources that the
record has already are not copied again; others become sources_2.txt.gz and so on. Folders of the
machine become `logs` and `data/…`. Nothing is written if one run is refused, or a log is there.
"""
import argparse
import gzip
import hashlib
import json
import re
import zlib
from pathlib import Path

from table import ENV, FINAL, logs, read, variant

START = re.compile(r"^=== config$", re.MULTILINE)
# What a browser shows as it is: no escapes of a terminal, no carriage returns.
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
ABSOLUTE = re.compile(r"""(?:^|[\s"'=])(~?/[\w.~-]+/[^\s"',]*)""", re.MULTILINE)
WIDTH = 160


def unreadable(text):
    """A record's log -> what keeps it from being read in a browser, or None.

    The first screen shows the run: sources, config and env take two lines at most each. The two
    lines of JSON are as long as they are, so that a program reads them; others are not.
    """
    lines = text.splitlines()
    if found := CONTROL.search(text):
        return f"holds the control character {found[0]!r}"
    if "=== run" not in lines[:6]:
        return "=== run is not among its first six lines"
    for line in lines:
        if len(line) > WIDTH and not line.startswith("{"):
            return f"has a line of {len(line)} characters, more than {WIDTH}: {line[:40]}…"
    return None


def split(path):
    """log.txt -> (its sources, bytes; the rest of it, text from === config on).

    The sources stand at its start, or in sources*.txt.gz beside it: those of its start first, then
    of each time that it went on with others. Raises SystemExit if they cannot be read.
    """
    text, _ = read(path)
    start = START.search(text).start()
    if text.startswith("=== source "):
        return text[:start].encode(), text[start:]
    sources = b""
    first = path.with_name("sources.txt.gz")
    for packed in (first, *sorted(path.parent.glob("sources_*.txt.gz"))):
        try:
            sources += gzip.decompress(packed.read_bytes())
        except (OSError, EOFError, zlib.error) as e:
            raise SystemExit(f"{packed}: the sources of {path} cannot be read ({e})") from None
    return sources, text[start:]


def without_folders(text, config):
    """A log's text with the machine's folders as `logs` and `data/…`.

    Raises ValueError if another absolute path remains.
    """
    env = json.loads(ENV.findall(text)[-1])
    shards = [config["input_bin"], config["input_val_bin"], *env["shards"]]
    folders = {str(Path(shard).parent): f"data/{Path(shard).parent.name}" for shard in shards}
    folders |= {str(Path(env["command"][0]).parent) + "/": "", config["output_dir"]: "logs"}
    # the longest first: one may lie in another
    for folder in sorted(folders, key=len, reverse=True):
        if re.match("/.", folder):
            text = text.replace(folder, folders[folder])
    if found := ABSOLUTE.search(text):
        raise ValueError(f"names a folder of the machine, {found[1]}: edit the log")
    return text


def keep(sources, record, new):
    """Sources, folder, {path: bytes} of what will be written -> the file that holds them."""
    n = 1
    while True:
        path = record / (f"sources_{n}.txt.gz" if n > 1 else "sources.txt.gz")
        if path not in new and not path.exists():
            # as gzip -9n: the same sources give the same file
            new[path] = gzip.compress(sources, 9, mtime=0)
        held = new.get(path) or path.read_bytes()
        if gzip.decompress(held) == sources:
            return path.name, hashlib.sha256(held).hexdigest()
        n += 1


def collect(folder, name, record, new):
    """Adds a folder's runs to new {path: bytes}. Raises SystemExit with one line if one cannot."""
    found = [path for path in logs(folder) if path.name == "log.txt"]
    if not found:
        raise SystemExit(f"{folder}: no log.txt in it, nor in its folders")
    for path in found:
        sources, text = split(path)
        _, config = read(path)
        ending = "" if FINAL.search(text) else "_failed"
        label = name or variant(path, folder, config)
        target = record / f"{label}_s{config['seed']}{ending}.txt"
        if target in new or target.exists():
            raise SystemExit(f"{path}: {target} is there already: name it, {path.parent}=VARIANT")
        file, checksum = keep(sources, record, new)
        try:
            text = f"=== sources {file} sha256 {checksum}\n{without_folders(text, config)}"
        except ValueError as e:
            raise SystemExit(f"{path}: {e}") from None
        if why := unreadable(text):
            raise SystemExit(f"{path}: {why}")
        new[target] = text.encode()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="FOLDER[=VARIANT]")
    parser.add_argument("--to", required=True, type=Path, metavar="RECORD")
    args = parser.parse_args()
    new = {}
    for run in args.runs:
        folder, _, name = run.partition("=")
        collect(Path(folder), name, args.to, new)
    args.to.mkdir(parents=True, exist_ok=True)
    for path, data in new.items():
        path.write_bytes(data)
        print(path)


if __name__ == "__main__":
    main()
