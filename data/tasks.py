"""A folder's files in the place of the hub, for tasks of lm-eval whose prompts and metrics stay.

    hellaswag_val.jsonl                              examples: hellaswag_train.jsonl
    ARC-Easy_test.jsonl, else ARC-Easy_validation    ARC-Easy_train.jsonl; ARC-Challenge likewise
    mmlu_test.jsonl, all subjects                    mmlu_dev.jsonl
    piqa_validation.jsonl                            piqa_train.jsonl
    lambada_test.jsonl                               none

Each in its original layout, plain or .gz or .bz2. Where there is no file of examples, those of a
few-shot prompt are other rows of the same file, never the row that is asked for.
"""
import json
from pathlib import Path
from typing import NamedTuple


class Rows(NamedTuple):
    asked: tuple         # stems of files, the first that is there
    examples: tuple
    fields: tuple        # that a row must have


ARC = ("question", "choices", "answerKey")
MMLU = Rows(("mmlu_test",), ("mmlu_dev",), ("question", "choices", "answer", "subject"))
# {lm-eval's (data set, its configuration)}
LOCAL = {
    ("hellaswag", None): Rows(("hellaswag_val",), ("hellaswag_train",),
                              ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    ("ai2_arc", "ARC-Easy"): Rows(("ARC-Easy_test", "ARC-Easy_validation"), ("ARC-Easy_train",),
                                  ARC),
    ("ai2_arc", "ARC-Challenge"): Rows(("ARC-Challenge_test", "ARC-Challenge_validation"),
                                       ("ARC-Challenge_train",), ARC),
    ("piqa", None): Rows(("piqa_validation",), ("piqa_train",), ("goal", "sol1", "sol2", "label")),
    ("lambada_openai", "default"): Rows(("lambada_test",), (), ("text",)),
}
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.bz2")


def find(folder: Path, stems) -> Path | None:
    paths = (folder / f"{stem}{ending}" for stem in stems for ending in ENDINGS)
    return next((path for path in paths if path.is_file()), None)


def read(path: Path, fields) -> list[dict]:
    """A file's rows. SystemExit with one line where it is damaged or lacks a field."""
    from data.text import read_lines
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise SystemExit(f"{path}, line {number}: not a row of JSON") from None
        missing = [name for name in fields if not isinstance(row, dict) or name not in row]
        if missing:
            raise SystemExit(f"{path}, line {number}: has no {missing[0]}: not the file in its "
                             "original layout")
        rows.append(row)
    if not rows:
        raise SystemExit(f"{path}: is empty")
    return rows


def tasks_of(index, name):
    """A name of lm-eval's index: a task, a tag or a group -> the names of its tasks."""
    entry = index[name]
    parts = sorted(entry.tags)
    if entry.kind.name == "GROUP":
        parts = [part if isinstance(part, str) else part.get("task") or part.get("group")
                 for part in entry.cfg["task"]]
    elif entry.kind.name != "TAG":
        return [name]
    return [task for part in parts if part in index for task in tasks_of(index, part)]


def local_rows(task: str, cfg: dict) -> tuple[Rows, str | None]:
    """A task's configuration -> its files, and the subject that its rows have."""
    dataset = str(cfg.get("dataset_path")).rpartition("/")[2]
    config = cfg.get("dataset_name")
    if dataset in ("mmlu", "mmlu_no_train"):
        return MMLU, config
    if (dataset, config) not in LOCAL:
        names = ", ".join(sorted({name for name, _ in LOCAL} | {"mmlu"}))
        raise SystemExit(f"--tasks {task}: --data has files of {names} only: leave --data out, and "
                         "its rows come from the hub")
    return LOCAL[dataset, config], None


def localise(index, names, folder: Path, work: Path, shots: int):
    """Let the tasks below these names in lm-eval's index read a folder's files.

    Copies of their rows, and definitions that include lm-eval's own, appear in `work`, which must
    last as long as the tasks. SystemExit with one line where a file is missing or has too few rows.
    """
    files = {}
    for task in [task for name in names for task in tasks_of(index, name)]:
        entry = index[task]
        kind, subject = local_rows(task, entry.cfg)
        asked = find(folder, kind.asked)
        if asked is None:
            raise SystemExit(f"--tasks {task}: {folder} has no {kind.asked[0]}.jsonl: put it there, "
                             "or leave --data out")
        splits = {"rows": asked, "examples": find(folder, kind.examples)}
        data = {}
        for split, path in splits.items():
            if path is None:
                continue
            if path not in files:
                files[path] = read(path, kind.fields)
            rows = [row for row in files[path] if subject in (None, row.get("subject"))]
            spare = split == "rows" and splits["examples"] is None
            if len(rows) < (1 + shots if spare else shots if split == "examples" else 1):
                raise SystemExit(f"--tasks {task}: {path} has {len(rows)} rows of it, too few for "
                                 f"{shots} examples in a prompt")
            data[split] = str(work / f"{task}_{split}.jsonl")
            Path(data[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        entry.yaml_path = redefine(task, entry.yaml_path, data, work)


def redefine(task: str, definition: Path, data: dict, work: Path) -> Path:
    """lm-eval's definition of a task -> the path of one on {split: file}. JSON is YAML, too."""
    mine = dict(include=str(definition), task=task, dataset_path="json", dataset_name=None,
                dataset_kwargs=dict(data_files=data, cache_dir=str(work / "cache")),
                # lm-eval keeps a row out of its own prompt where both splits are one.
                training_split=None, validation_split=None, test_split="rows",
                fewshot_split="examples" if "examples" in data else "rows")
    path = work / f"{task}.yaml"
    path.write_text(json.dumps(mine))
    return path
