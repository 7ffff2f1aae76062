"""Download FineWeb as GPT-2 tokens: the validation shard and N training shards.

A shard has 100M tokens and 200 MB.

    python data/fineweb.py          # 14 shards, 3 GB: more than the race uses
    python data/fineweb.py 3        # what is already there and intact is not downloaded again
    python data/fineweb.py 3 --repo karpathy/fineweb-edu-100B-gpt2-token-shards

Source: the dataset kjj0/fineweb10B-gpt2 on huggingface.co, a 10B-token sample of FineWeb (ODC-By
1.0), or any other one of such shards: its files *_val_*.bin and the first N *_train_*.bin, from
whatever folders, into one. A file gets its name only after its checksum, header, size and largest
token have been checked. Where no bar shows the progress, a line does, and a hub that stops sending
ends the command after --patience seconds.
"""
import argparse
import errno
import fnmatch
import hashlib
import os
import shutil
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPO, MOST = "kjj0/fineweb10B-gpt2", 103     # the default dataset, and its training shards
ATTEMPTS = 5        # with pauses of 1, 2, 4 and 8 s
PROGRESS = 1 << 20      # bytes; a hub that sends fewer in --patience seconds sends nothing
# s. The hub's client writes 10 MB at once: with this patience, 17 kB/s are enough.
PATIENCE = 600
LOOK, SPEAK = 0.5, 20   # s between two looks at a download, and two lines on it
HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
OTHER_WAYS = (
    "behind a proxy set HTTPS_PROXY, or set HF_ENDPOINT to a mirror, or copy the .bin files "
    "to {out} by hand, or make shards of your own text with data/text.py"
)


def fail(message):
    from data.command import printable
    raise SystemExit(f"fineweb.py: {printable(message)}")


def hub():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def defect(path):
    """What is wrong with a shard, or None."""
    from support.shards import open_shard
    try:
        open_shard(path)
    except SystemExit as why:
        return str(why).removeprefix(f"{path}: ")


def bytes_below(folder):
    """Bytes of the files in a folder, while another thread makes and removes some."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.path.getsize(os.path.join(place, name))
    return total


class Watch:
    """Looks at the folder where one file arrives: tells the progress, and ends a run without."""
    def __init__(self, name, args, folder=None, size=None):
        self.name, self.args, self.folder, self.size = name, args, folder, size
        self.progressed = self.spoke = time.monotonic()
        self.most = self.told = 0           # bytes, at those two moments

    def look(self):
        from data.command import printable
        now, came = time.monotonic(), bytes_below(self.folder) if self.folder else 0
        if came >= self.most + PROGRESS:
            self.progressed, self.most = now, came
        if now - self.progressed > self.args.patience:
            fail(f"{hub()} stalls: of {self.name} {came / 1e6:.1f} MB came, and nothing more for "
                 f"{self.args.patience:g} s (--patience); the finished shards are kept, the same "
                 "command continues")
        if self.size and self.args.speak and now - self.spoke > SPEAK:
            rate = (came - self.told) / (now - self.spoke)
            print(f"{printable(Path(self.name).name)}  {came / 1e6:.1f} of "
                  f"{self.size / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s", flush=True)
            self.spoke, self.told = now, came


def attended(action, name, watch):
    """action(name) in a thread. This one looks on, and hears signals: the client may be deaf."""
    answers, errors = [], []

    def work():
        try:
            answers.append(action(name))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(LOOK)
    while thread.is_alive():
        watch.look()
        thread.join(LOOK)
    for error in errors:
        raise error
    return answers[0]


def retry(action, name, args, impatient=False, watch=None):
    """action(name), again after a failure that time may heal. OSError where the disk failed.

    `impatient` gives up when nobody answers. Patience is one for all attempts.
    """
    watch = watch or Watch(name, args)
    for attempt in range(1, ATTEMPTS + 1):
        watch.most = watch.told = 0         # the client may begin anew
        try:
            return attended(action, name, watch)
        # the hub's client has changed its HTTP library and errors before
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            why = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
            if watch.folder and getattr(error, "errno", None) in HOPELESS:
                raise
            if status and status < 500 and status not in (408, 429):
                fail(f"{args.repo} does not offer {name} (HTTP {status}): check --repo, N and "
                     "HF_TOKEN")
            if attempt == ATTEMPTS or impatient and not status:
                fail(f"cannot get {name} from {hub()}: {why.rstrip('.')}; "
                     + OTHER_WAYS.format(out=args.out))
            time.sleep(2 ** (attempt - 1))


def main(argv=None):
    from data.command import printable, unfinished
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    # one line, without the usage
    p.error = lambda message: p.exit(2, f"fineweb.py: {printable(message)}\n")
    p.add_argument(
        "n", nargs="?", type=int, default=14, metavar="N", help="training shards (default: 14)"
    )
    p.add_argument(
        "--out",
        type=Path,
        help="default: data/fineweb10B, or the name of another --repo below data/",
    )
    p.add_argument("--repo", default=REPO, help="dataset on the hub (default: %(default)s)")
    p.add_argument("--patience", type=float, default=PATIENCE, metavar="S",
                   help="end when the hub sends nothing for so many seconds (default: %(default)s)")
    args = p.parse_args(argv)
    # argparse of Python 3.11 and 3.12 reads `--repo=--` as an empty list.
    if [] in vars(args).values():
        p.error("-- is no value")
    if args.n < 1 or args.repo == REPO and args.n > MOST:
        p.error(f"N must be 1 to {MOST}, not {args.n}")
    if not args.patience > 0:
        p.error(f"--patience must be above 0, not {args.patience}")
    args.out = args.out or ROOT / "data" / (
        args.repo.rpartition("/")[2] if args.repo != REPO else "fineweb10B"
    )

    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    args.speak = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] != "0"
    # of a full disk, say, which is told below
    warnings.filterwarnings("ignore", module="huggingface_hub")
    try:
        from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError:
        fail("downloading needs huggingface-hub: pip install huggingface-hub")

    def ask(name):
        return get_hf_file_metadata(hf_hub_url(args.repo, name, repo_type="dataset"))

    def fetch(name):
        refuse_small_disk()
        etag = left[name].etag      # of a large file, this is its sha256
        path = Path(hf_hub_download(args.repo, name, repo_type="dataset", local_dir=temporary))
        if len(etag or "") == 64 and hashlib.sha256(path.read_bytes()).hexdigest() != etag:
            path.unlink()
            raise OSError("its checksum is wrong, so it was damaged on the way")
        return path

    def listed(_):
        HfApi().dataset_info(args.repo)     # without a hub, this fails at once
        return HfApi().list_repo_files(args.repo, repo_type="dataset")

    def place(name):
        return args.out / Path(name).name

    def still_needed():
        return sum(offer.size or 0 for offer in left.values())

    def free_space():
        # Where there is no such folder, the disk is that of one above.
        places = (args.out, *args.out.resolve().parents)
        return shutil.disk_usage(next(filter(os.path.isdir, places))).free

    def refuse_small_disk():
        # The client may go on from what an attempt has left.
        need, free = still_needed() / 1e9, (free_space() + bytes_below(temporary)) / 1e9
        if need > free:
            fail(f"{need:.1f} GB needed, {free:.1f} GB free in {args.out}, so {need - free:.1f} GB "
                 "are missing: lower N or set --out")

    names = ["fineweb_val_000000.bin"] + [
        f"fineweb_train_{i:06d}.bin" for i in range(1, args.n + 1)
    ]
    if args.repo != REPO:
        here = [sorted(args.out.glob(f"*_{part}_*.bin")) for part in ("val", "train")]
        if here[0] and len(here[1]) >= args.n and not any(map(defect, here[0] + here[1][:args.n])):
            count = len(here[0]) + args.n
            print(f"{printable(args.out)}: {count} of {count} shards are there")
            return
        files = sorted(retry(listed, "the list of its files", args, impatient=True))
        val, train = (fnmatch.filter(files, f"*_{part}_*.bin") for part in ("val", "train"))
        if not val or len(train) < args.n:
            fail(f"{args.repo} offers {len(val)} files *_val_*.bin and {len(train)} *_train_*.bin: "
                 "check --repo and N")
        names = val + train[:args.n]
        taken = {}
        for name in names:
            other = taken.setdefault(place(name), name)
            if other != name:
                fail(f"{args.repo} has both {other} and {name}: they would be one file here; fetch "
                     "those you want by hand")
    missing = [name for name in names if not place(name).is_file() or defect(place(name))]
    print(f"{printable(args.out)}: {len(names) - len(missing)} of {len(names)} shards are there",
          flush=True)
    if not missing:
        return
    # All of them, before anything is fetched: one of a later number may not be offered.
    left = {name: retry(ask, name, args, impatient=True) for name in missing}
    try:
        with unfinished(args.out) as temporary:
            refuse_small_disk()
            for i, name in enumerate(missing, 1):
                began, watch = time.time(), Watch(name, args, temporary, left[name].size)
                path = retry(fetch, name, args, watch=watch)
                if why := defect(path):
                    fail(f"what {args.repo} offers as {name} is unfit: {why}")
                size, seconds = path.stat().st_size, time.time() - began
                path.replace(place(name))
                del left[name]
                print(f"{printable(place(name).name)}  {i}/{len(missing)}  {size / 1e6:.1f} MB in "
                      f"{seconds:.1f} s", flush=True)
    except OSError as error:
        fail(f"cannot write to {args.out}: {error.strerror}; {still_needed() / 1e9:.2f} GB are "
             f"still to come, {free_space() / 1e9:.2f} GB are free")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from data.command import run
    run(main, "fineweb.py", "the finished shards are kept, the same command continues")
