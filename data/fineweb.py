"""Download FineWeb as GPT-2 tokens: the validation shard and N training shards.

A shard has 100M tokens and 200 MB.

    python data/fineweb.py          # 14 shards, 3 GB: more than the race uses
    python data/fineweb.py 3        # what is already there and intact is not downloaded again
    python data/fineweb.py 3 --repo karpathy/fineweb-edu-100B-gpt2-token-shards

Source: the dataset kjj0/fineweb10B-gpt2 on huggingface.co, a 10B-token sample of FineWeb (ODC-By
1.0), or any other one of such shards: its files *_val_*.bin and the first N *_train_*.bin, from
whatever folders, into one. A file gets its name only after its checksum, header, size and largest
token have been checked.
"""
import argparse
import errno
import fnmatch
import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPO, MOST = "kjj0/fineweb10B-gpt2", 103     # the default dataset, and its training shards
ATTEMPTS = 5        # with pauses of 1, 2, 4 and 8 s
HOPELESS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
OTHER_WAYS = (
    "behind a proxy set HTTPS_PROXY, or set HF_ENDPOINT to a mirror, or copy the .bin files "
    "to {out} by hand, or make shards of your own text with data/text.py"
)


def fail(message):
    raise SystemExit(f"fineweb.py: {message}")


def defect(path):
    """What is wrong with a shard, or None."""
    from shards import open_shard
    try:
        open_shard(path)
    except SystemExit as why:
        return str(why).removeprefix(f"{path}: ")


def retry(action, name, args, impatient=False):
    """action(name), again after a failure that time may heal; `impatient` gives up when nobody
    answers."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action(name)
        # the hub's client has changed its HTTP library and errors before
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            why = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
            if getattr(error, "errno", None) in HOPELESS:
                fail(f"cannot write {name} to {args.out}: {why}")
            if status and status < 500 and status not in (408, 429):
                fail(f"{args.repo} does not offer {name} (HTTP {status}): check --repo, N and "
                     "HF_TOKEN")
            hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            if attempt == ATTEMPTS or impatient and not status:
                fail(f"cannot get {name} from {hub}: {why.rstrip('.')}; "
                     + OTHER_WAYS.format(out=args.out))
            time.sleep(2 ** (attempt - 1))


def main(argv=None):
    p = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.splitlines()[0])
    # one line, without the usage
    p.error = lambda message: p.exit(2, f"fineweb.py: {message}\n")
    p.add_argument(
        "n", nargs="?", type=int, default=14, metavar="N", help="training shards (default: 14)"
    )
    p.add_argument(
        "--out",
        type=Path,
        help="default: data/fineweb10B, or the name of another --repo below data/",
    )
    p.add_argument("--repo", default=REPO, help="dataset on the hub (default: %(default)s)")
    args = p.parse_args(argv)
    # argparse of Python 3.11 and 3.12 reads `--repo=--` as an empty list.
    if [] in vars(args).values():
        p.error("-- is no value")
    if args.n < 1 or args.repo == REPO and args.n > MOST:
        p.error(f"N must be 1 to {MOST}, not {args.n}")
    args.out = args.out or ROOT / "data" / (
        args.repo.rpartition("/")[2] if args.repo != REPO else "fineweb10B"
    )

    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    try:
        from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError:
        fail("downloading needs huggingface-hub: pip install huggingface-hub")

    def ask(name):
        return get_hf_file_metadata(hf_hub_url(args.repo, name, repo_type="dataset"))

    def fetch(name):
        etag = ask(name).etag       # of a large file, this is its sha256
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

    names = ["fineweb_val_000000.bin"] + [
        f"fineweb_train_{i:06d}.bin" for i in range(1, args.n + 1)
    ]
    if args.repo != REPO:
        here = [sorted(args.out.glob(f"*_{part}_*.bin")) for part in ("val", "train")]
        if here[0] and len(here[1]) >= args.n and not any(map(defect, here[0] + here[1][:args.n])):
            count = len(here[0]) + args.n
            print(f"{args.out}: {count} of {count} shards are there")
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
    print(f"{args.out}: {len(names) - len(missing)} of {len(names)} shards are there", flush=True)
    if not missing:
        return
    need = (retry(ask, missing[0], args, impatient=True).size or 0) * len(missing)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if need > (free := shutil.disk_usage(args.out).free):
            fail(f"{need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free in {args.out}: lower N or "
                 "set --out")
        with tempfile.TemporaryDirectory(dir=args.out, prefix=".unfinished_") as temporary:
            for i, name in enumerate(missing, 1):
                began, path = time.time(), retry(fetch, name, args)
                if why := defect(path):
                    fail(f"what {args.repo} offers as {name} is unfit: {why}")
                size, seconds = path.stat().st_size, time.time() - began
                path.replace(place(name))
                print(f"{place(name).name}  {i}/{len(missing)}  {size / 1e6:.1f} MB in "
                      f"{seconds:.1f} s", flush=True)
    except OSError as error:
        fail(f"cannot write to {args.out}: {error.strerror}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped; the finished shards are kept, the same command continues")
