"""A checkpoint as a model of EleutherAI's lm-eval, its tasks, and what guessing would score there.

What evals.py runs. lm-eval is optional, and imported where it is used; the prompts, the metrics and
their standard errors are its own.
"""
import logging
import math
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean

from data.tasks import localise
from data.text import QUIET
from share.likelihood import kept, score, write
from support.flags import near
from support.machine import first_line

# Draws of lm-eval's bootstrap, for metrics that are no means.
BOOTSTRAP = 1000
# Tokens that a task's answer may have where it does not say, as in lm-eval's hf model.
MAX_NEW_TOKENS = 256


def tell(done: int, of: int):
    """Progress, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{done:,} of {of:,} rows", end="\n" if done == of else "", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# The model as lm-eval sees it

def start_of(tokenizer) -> int:
    """What a text begins behind: it starts a document, or for bytes a line."""
    return tokenizer.encode("\n")[0] if tokenizer.stop is None else tokenizer.stop


def as_lm(model, tokenizer, batch_size: int):
    """GPT and Tokenizer -> an lm_eval.api.model.LM. `asked` and `cut` count its prompts."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs

    class Checkpoint(TemplateLM):
        asked = 0
        cut = 0

        @property
        def eot_token_id(self):
            return start_of(tokenizer)

        def count(self, too_long: bool):
            self.asked += 1
            self.cut += too_long

        def tok_encode(self, string, add_special_tokens=None, **_):
            return tokenizer.encode(string)

        def loglikelihood(self, requests, disable_tqdm=True):
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests, **_):
            # A context of blanks alone has become a part of the continuation.
            pairs = [(before or [start_of(tokenizer)], after) for _, before, after in requests]
            for before, after in pairs:
                self.count(len(before) + len(after) > model.cfg.sequence_length + 1)
            return score(model, pairs, batch_size, tell)

        def loglikelihood_rolling(self, requests, disable_tqdm=True):
            texts = [tokenizer.encode(*request.args) for request in requests]
            pairs = [([start_of(tokenizer)], ids) for ids in texts]
            return [log_p for log_p, _ in score(model, pairs, batch_size, tell)]

        def generate_until(self, requests, disable_tqdm=True):
            prompts = []
            for prompt, wishes in (request.args for request in requests):
                wishes = normalize_gen_kwargs(wishes, MAX_NEW_TOKENS)
                choice = {name: wishes[name] for name in ("top_k", "top_p") if name in wishes}
                choice["temperature"] = wishes.get("temperature", 1.0) * wishes["do_sample"]
                ids = tokenizer.encode(prompt) or [start_of(tokenizer)]
                n = wishes["max_gen_toks"]
                self.count(len(ids) > kept(model.cfg.sequence_length, n))
                prompts.append((ids, n, wishes["until"], (*choice.items(),)))
            return write(model, tokenizer, prompts, batch_size, tell)

        def tokens_of(self, *text) -> int:
            """(text) or (context, continuation) -> tokens that were scored."""
            if len(text) == 1:
                return len(tokenizer.encode(*text))
            before, after = text
            return len(self._encode_pair(*text)[1] if before else tokenizer.encode(after))

    return Checkpoint()


# --------------------------------------------------------------------------------------------------
# Chance: lm-eval's samples of a task, tokens_of, ln V -> {metric: score}

def of_choices(samples, tokens_of, ln_v):
    """One guess among the choices of every row."""
    def share(sample):
        right = sample["target"] if isinstance(sample["target"], list) else [sample["target"]]
        # This metric asks for every choice twice, once without its question.
        asks = 2 if "acc_mutual_info" in sample["metrics"] else 1
        return len(set(right)) * asks / len(sample["arguments"])

    guess = fmean(map(share, samples))
    return dict.fromkeys(("acc", "acc_norm", "acc_bytes", "acc_mutual_info"), guess)


def of_continuations(samples, tokens_of, ln_v):
    """Every token is one of V."""
    lengths = [tokens_of(*sample["arguments"][0]) for sample in samples]
    return {"acc": fmean(math.exp(-n * ln_v) for n in lengths),
            "perplexity": math.exp(fmean(lengths) * ln_v)}


def of_texts(samples, tokens_of, ln_v):
    """Every token is one of V, here a word or a byte of the text."""
    nats = ln_v * sum(tokens_of(*sample["arguments"][0]) for sample in samples)
    found = {}
    for metric in {"word_perplexity", "byte_perplexity", "bits_per_byte"} & {*samples[0]}:
        rate = nats / sum(sample[metric][1] for sample in samples)
        found[metric] = rate / math.log(2) if metric == "bits_per_byte" else math.exp(rate)
    return found


CHANCE = {"multiple_choice": of_choices, "loglikelihood": of_continuations,
          "loglikelihood_rolling": of_texts, "generate_until": lambda *_: {}}


def row(task, n, shots, metric, value, stderr, chance, higher=True):
    """One line of the table, as JSON has it. stderr and chance: a number, or None."""
    above = None
    if None not in (stderr, chance):
        above = bool((value - chance) * (1 if higher else -1) > 2 * stderr)
    return dict(task=task, n=n, shots=shots, metric=metric, value=value, stderr=stderr,
                chance=chance, above_chance=above)


# --------------------------------------------------------------------------------------------------
# Tasks

def run_tasks(names, args, model, tokenizer):
    """-> (rows of all tasks and groups that the names hold, how many prompts were asked, cut)."""
    os.environ |= QUIET | os.environ
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise SystemExit(f"--tasks needs lm-eval ({first_line(e)}): pip install lm-eval") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            raise SystemExit(f"--tasks {name}: lm-eval has no such task; "
                             f"{near(name, manager.all_tasks)}`lm-eval ls tasks` lists them")
    lm = as_lm(model, tokenizer, args.batch_size)
    with tempfile.TemporaryDirectory() as work:
        if args.data:
            localise(manager.task_index, names, args.data, Path(work), args.num_fewshot or 0)
        try:
            tasks = manager.load(names)
        except Exception as e:
            # The hub's errors, and those of the many tasks that need packages of their own.
            raise SystemExit(f"--tasks {','.join(names)}: cannot be loaded ({first_line(e)}): "
                             "without the hub, --data DIR reads a folder's files") from None
        inner = {part for parts in tasks["group_map"].values() for part in parts}
        outer = [part for name, part in (tasks["groups"] | tasks["tasks"]).items()
                 if name not in inner]
        # It prints what it is at.
        with redirect_stdout(sys.stderr):
            found = simple_evaluate(lm, tasks=outer, num_fewshot=args.num_fewshot,
                                    limit=args.limit, bootstrap_iters=BOOTSTRAP,
                                    task_manager=manager)
    return rows_of(found, lm.tokens_of, math.log(model.cfg.vocab_size)), lm.asked, lm.cut


def rows_of(found, tokens_of, ln_v):
    """lm-eval's results -> rows: of tasks, and of groups with the samples of all their tasks."""
    chances = {name: CHANCE[found["configs"][name]["output_type"]](samples, tokens_of, ln_v)
               for name, samples in found["samples"].items()}
    rows = []
    for name, metrics in found["results"].items():
        members = [task for task in leaves(name, found["group_subtasks"]) if task in chances]
        sizes = [len(found["samples"][task]) for task in members]
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            if not filtered or metric.endswith("_stderr"):
                continue
            known = [chances[task].get(metric) for task in members]
            chance = None
            if None not in known:
                chance = sum(n * c for n, c in zip(sizes, known)) / sum(sizes)
            label = metric if filtered == "none" else f"{metric},{filtered}"
            higher = all(found["higher_is_better"][task].get(metric, True) for task in members)
            # "N/A" of one row alone.
            stderr = float(stderr) if isinstance(stderr, float) else None
            rows.append(row(name, sum(sizes), found["n-shot"][members[0]], label, float(value),
                            stderr, chance, higher))
    return rows


def leaves(name, subtasks):
    """A task, or the tasks of a group and of the groups in it."""
    if not subtasks.get(name):
        return [name]
    return [task for part in subtasks[name] for task in leaves(part, subtasks)]
