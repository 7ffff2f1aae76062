"""evals.py: what it scores equals sums of the model's own log-probabilities, and lm-eval's hf model.

lm-eval is optional: pip install lm-eval. What needs it is skipped without.
"""
import json
import math
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data import tasks
from data.text import gpt2_encoding
import evals
from sample import make_tokenizer
from share import harness
from share.likelihood import cut, kept, pieces, score, write
from support.batches import Windows
from support.checkpoint import write as write_checkpoint
from support.decode import Context, generate
from support.shards import open_data
from tests.checks import awake, small
from train_gpt2 import GPT, Config, shifted

T = 32
V = 256


def model_of(mixer="attn", vocab_size=V, **knobs):
    torch.manual_seed(0)
    knobs = dict(n_layer=2, n_head=2, n_embd=16, sequence_length=T) | small(mixer) | knobs
    return awake(GPT(Config(mixer=mixer, vocab_size=vocab_size, **knobs))).eval()


def ids(n, seed=0, vocab_size=V):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (n,), generator=g).tolist()


@torch.no_grad()
def direct(model, context, continuation):
    """The sum, a token at a time, each behind no more than lm-eval's hf model would show."""
    total = 0
    greedy = True
    whole = context + continuation
    for at in range(len(context), len(whole)):
        # The end of the window of T predictions that the token is in.
        end = min(len(context) + ((at - len(context)) // T + 1) * T, len(whole))
        z = model(torch.tensor([whole[max(0, end - T - 1):at]]))[0, -1].double()
        total += z.log_softmax(-1)[whole[at]].item()
        greedy &= z.argmax().item() == whole[at]
    return total, greedy


# Short ones, ones as long as the context and around it, several windows, and twins of one prompt.
LENGTHS = [(1, 1), (5, 3), (T - 1, 1), (T, 1), (T + 1, 1), (T - 3, 4), (90, 7), (1, T), (1, T + 1),
           (3, 2 * T + 5), (50, T)]
PAIRS = [(ids(n, i), ids(m, 50 + i)) for i, (n, m) in enumerate(LENGTHS)]
PAIRS += [(ids(20), [token]) for token in (3, 7, 7)]


# ----------------------------------------------------------------- without lm-eval

@pytest.mark.parametrize("mixer", ["attn", "afno", "gdn"])
def test_a_score_is_the_sum_of_the_models_own_log_probabilities(mixer):
    model = model_of(mixer)
    want = [direct(model, *pair) for pair in PAIRS]
    for batch_size in (1, 4, 64):
        found = score(model, PAIRS, batch_size)
        assert [log_p for log_p, _ in found] == pytest.approx([w for w, _ in want], abs=1e-5)


def test_what_the_model_would_have_said_is_greedy():
    model = model_of()
    context = Context(model, 1)
    context.add(torch.tensor([ids(5)]))
    said = [token for token, in generate(context, 4, [torch.Generator()], temperature=0)]
    other = said[:2] + [(said[2] + 1) % V]
    found = score(model, [(ids(5), said), (ids(5), other), (ids(5), said[:1])], 4)
    assert [greedy for _, greedy in found] == [True, False, True]


def test_pieces_score_every_token_once():
    for context, continuation in PAIRS:
        parts = [*pieces(context, continuation, T)]
        assert sum((after for _, after in parts), []) == continuation
        assert all(before and len(before + after) <= T + 1 for before, after in parts)
    assert [*pieces([9], [], T)] == []


def test_what_is_written_is_what_a_prompt_alone_would_get():
    model = model_of("afno")
    tokenizer = make_tokenizer("bytes", V)
    prompts = [ids(n, n) for n in (4, 7, 4, 3 * T, 7)]
    choice = (("temperature", 0.0),)
    found = write(model, tokenizer, [(p, 6, (), choice) for p in prompts], 2)
    for prompt, text in zip(prompts, found):
        context = Context(model, 1)
        context.add(torch.tensor([prompt[-(T - 6):]]))
        tokens = generate(context, 6, [torch.Generator()], V, None, temperature=0)
        assert text == bytes(token for token, in tokens).decode(errors="replace")
    stop = found[0][2]
    assert write(model, tokenizer, [(prompts[0], 6, [stop], choice)], 1) == [
        found[0][:found[0].index(stop)]]
    assert cut("abcd", ["d", "bc", "x"]) == "a" and cut("abcd", ["x"]) == "abcd"
    assert [kept(32, n) for n in (6, 16, 40)] == [26, 16, 16] and kept(1, 9) == 1


def saved(folder, model):
    write_checkpoint(folder / "model.pt",
                     dict(model=model.state_dict(), config=asdict(model.cfg), step=0))
    return folder


@pytest.fixture
def run(tmp_path, capsys):
    """evals.py on a checkpoint -> the table's lines, the JSON."""
    def call(model, *argv):
        folder = saved(tmp_path, model)
        evals.main([str(folder), "--device", "cpu", "--json", str(tmp_path / "out.json"),
                    *map(str, argv)])
        return capsys.readouterr().out.splitlines(), json.loads((folder / "out.json").read_text())
    return call


@pytest.mark.parametrize("mixer, tokenizer, size", [("afno", "bytes", V), ("attn", "gpt2", 50257)])
def test_bits_per_byte(run, tmp_path, mixer, tokenizer, size):
    model = model_of(mixer, size)
    documents = ["One, a döcument of several lines,\n" * 3, "two.\n"]
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>\n".join(["", documents[0], " \n", documents[1]]))
    lines, report = run(model, "--text", path)
    encode, _, _, start = make_tokenizer(tokenizer, size)
    start = 10 if start is None else start
    nats = -sum(direct(model, [start], encode(document))[0] for document in documents)
    size = len("".join(documents).encode())
    row, = report["results"]
    assert row["value"] == pytest.approx(nats / math.log(2) / size, abs=1e-6)
    assert f"{size:,} bytes" in lines[1] and "2 documents" in lines[1]
    assert row["stderr"] > 0 and row["above_chance"] is False and "not above chance" in lines[-1]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(dict(text=document)) + "\n" for document in documents))
    assert run(model, "--text", rows)[1]["results"][0]["value"] == row["value"]


def test_an_untrained_model_has_chances_bits(run, tmp_path):
    (tmp_path / "a.txt").write_text("some text, " * 20)
    model = GPT(Config(mixer="attn", n_layer=1, n_embd=16, n_head=2, sequence_length=T,
                       vocab_size=V))
    row, = run(model, "--text", tmp_path / "a.txt")[1]["results"]
    assert row["value"] == pytest.approx(8, abs=1e-6) and row["chance"] == 8


def test_losses_by_position_are_the_validation_loss(run):
    """Weighted by their lengths they are its mean; each range is that of the tokens it names."""
    long = 150
    model = model_of("afno,attn", sequence_length=long, data="data/tinyshakespeare",
                     val_tokens=9 * long)
    lines, report = run(model, "--positions", "--batch_size", 4)
    rows = report["results"]
    assert [r["task"] for r in rows] == ["positions 0-63", "positions 64-127", "positions 128-149"]
    assert {r["n"] for r in rows} == {9} and all(0 < r["stderr"] < 1 for r in rows)
    _, shards, _ = open_data(model.cfg)
    windows = Windows(shards, model.cfg, shuffle=False)
    inputs, targets = shifted(torch.from_numpy(windows.read(range(9))))
    with torch.no_grad():
        whole = model(inputs, targets).item()
        log_p = model(inputs).log_softmax(-1).gather(2, targets[..., None])[..., 0]
    assert sum(r["value"] * n for r, n in zip(rows, (64, 64, 22))) / long == pytest.approx(whole)
    assert rows[2]["value"] == pytest.approx(-log_p[:, 128:].mean().item())


def refused(capsys, *argv):
    """The one line of a refusal."""
    with pytest.raises(SystemExit) as e:
        evals.main([*map(str, argv)])
    line = e.value.code
    assert isinstance(line, str) and "\n" not in line
    return line


@pytest.mark.parametrize("argv, why", [
    ([], "nothing to do"),
    (["--text", "none.txt"], "none.txt: no such file"),
    (["--text", "empty.txt"], "empty.txt: holds no text"),
    (["--text", "latin.txt"], "latin.txt is not UTF-8"),
    (["--text", "broken.jsonl"], "not a row of JSON"),
    (["--tasks", "a,,b"], "a name is empty"),
    (["--tasks", "a", "--data", "none"], "none: no such folder"),
    (["--text", "empty.txt", "--limit", "0"], "at least 1"),
    (["--text", "empty.txt", "--num_fewshot", "-1"], "0 or more"),
    (["--text", "empty.txt", "--json", "none/out.json"], "no folder"),
    (["--text", "empty.txt", "--device", "tpu"], "not available"),
    (["--txt", "empty.txt"], "did you mean --text"),
])
def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys, argv, why):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "broken.jsonl").write_text("{\n")
    assert why in refused(capsys, saved(tmp_path, model_of()), *argv)


def test_lm_eval_is_optional(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm-eval" in refused(capsys, saved(tmp_path, model_of()), "--tasks", "piqa")


# ----------------------------------------------------------------- chance

def test_chance():
    choices = [dict(metrics=["acc"], target=1, arguments=[0] * n) for n in (4, 4, 3, 5)]
    choices.append(dict(metrics=["acc"], target=[0, 2], arguments=[0] * 4))
    want = (1 / 4 + 1 / 4 + 1 / 3 + 1 / 5 + 2 / 4) / 5
    assert harness.of_choices(choices, None, None)["acc_norm"] == pytest.approx(want)
    twice = [dict(metrics=["acc", "acc_mutual_info"], target=0, arguments=[0] * 8)]
    assert harness.of_choices(twice, None, None)["acc"] == 1 / 4
    words = [dict(arguments=[("a", " b")]), dict(arguments=[("a", " bcd")])]
    found = harness.of_continuations(words, lambda before, after: len(after) - 1, math.log(10))
    assert found == pytest.approx(dict(acc=(0.1 + 0.001) / 2, perplexity=100))
    texts = [dict(arguments=[("abcd",)], bits_per_byte=(-3.0, 8), word_perplexity=(-3.0, 1))]
    found = harness.of_texts(texts, len, math.log(16))
    assert found == pytest.approx(dict(bits_per_byte=2, word_perplexity=16**4))


@pytest.mark.parametrize("value, stderr, higher, above", [
    (0.34, 0.04, True, True), (0.32, 0.04, True, False), (0.10, 0.04, True, False),
    (0.16, 0.04, False, True), (0.18, 0.04, False, False), (0.9, None, True, None),
])
def test_a_score_near_chance_is_marked(capsys, value, stderr, higher, above):
    row = harness.row("piqa", 100, 0, "acc", value, stderr, 0.25, higher)
    evals.print_table([row])
    assert row["above_chance"] is above
    assert ("not above chance" in capsys.readouterr().out) == (above is False)


# ----------------------------------------------------------------- a folder's files

def hellaswag(n, label=0):
    return [dict(activity_label=f"Act {i}", ctx_a=f"He does {i}.", ctx_b="she",
                 endings=[f"waits {i} [step] {end}." for end in ("now", "here", "there", "twice")],
                 label=label) for i in range(n)]


def arc(n):
    return [dict(id=str(i), question=f"What is {i}?", answerKey="B",
                 choices=dict(text=["one", f"the {i}", "three"], label=["A", "B", "C"]))
            for i in range(n)]


def mmlu(n, *subjects):
    return [dict(question=f" {subject} {i}? ", subject=subject, choices=["a", "b", "c", "d"],
                 answer=i % 4) for subject in subjects for i in range(n)]


FILES = {
    "hellaswag_val": hellaswag(5), "ARC-Easy_validation": arc(5), "ARC-Challenge_validation": arc(4),
    "mmlu_test": mmlu(4, "anatomy", "virology"),
    "piqa_validation": [dict(goal=f"Go {i}", sol1="on", sol2="no", label=1) for i in range(4)],
    "lambada_test": [dict(text=f"all that number {i} wants is number {i}") for i in range(4)],
}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "eval"
    place.mkdir()
    for name, rows in FILES.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def entry(**cfg):
    return SimpleNamespace(kind=SimpleNamespace(name="TASK"), tags=set(), cfg=cfg, yaml_path="x")


def index():
    """What lm-eval's index has of some tasks."""
    made = {name: entry(dataset_path=path, dataset_name=config) for name, path, config in (
        ("hellaswag", "Rowan/hellaswag", None), ("arc_easy", "allenai/ai2_arc", "ARC-Easy"),
        ("mmlu_anatomy", "cais/mmlu", "anatomy"), ("mmlu_law", "cais/mmlu", "law"),
        ("gsm8k", "openai/gsm8k", "main"), ("lambada_openai_mt_de", "EleutherAI/lambada_openai",
                                            "de"))}
    made["bones"] = entry(task=["mmlu_anatomy", {"task": "arc_easy"}])
    made["bones"].kind.name = "GROUP"
    return made


def test_tasks_read_a_folder(folder, tmp_path):
    made = index()
    (folder / "mmlu_dev.jsonl").write_text("".join(json.dumps(row) + "\n"
                                                   for row in mmlu(2, "law", "anatomy")))
    tasks.localise(made, ["bones", "hellaswag"], folder, tmp_path, 2)
    changed = {name: json.loads(Path(made[name].yaml_path).read_text()) for name in made
               if made[name].yaml_path != "x"}
    assert {*changed} == {"mmlu_anatomy", "arc_easy", "hellaswag"}
    assert changed["hellaswag"]["fewshot_split"] == changed["hellaswag"]["test_split"] == "rows"
    assert changed["mmlu_anatomy"]["fewshot_split"] == "examples"
    files = changed["mmlu_anatomy"]["dataset_kwargs"]["data_files"]
    for split, n in ("rows", 4), ("examples", 2):
        rows = [json.loads(line) for line in Path(files[split]).read_text().splitlines()]
        assert rows == mmlu(n, "anatomy")


@pytest.mark.parametrize("name, old, new, why", [
    ("gsm8k", None, None, "has files of ai2_arc, hellaswag,"),
    ("lambada_openai_mt_de", None, None, "has files of"),
    ("mmlu_law", None, None, "has 0 rows"),
    ("mmlu_anatomy", "mmlu_test", None, "has no mmlu_test.jsonl"),
    ("hellaswag", "hellaswag_val", "", "is empty"),
    ("hellaswag", "hellaswag_val", "{", "line 1: not a row of JSON"),
    ("hellaswag", "hellaswag_val", "[1]\n", "line 1: has no activity_label"),
    ("arc_easy", "ARC-Easy_validation", json.dumps(arc(1)[0]), "has 1 rows of it, too few for 1"),
])
def test_files_that_are_missing_or_wrong_are_one_line(folder, tmp_path, name, old, new, why):
    if new is not None:
        (folder / f"{old}.jsonl").write_text(new)
    elif old:
        (folder / f"{old}.jsonl").unlink()
    with pytest.raises(SystemExit) as e:
        tasks.localise(index(), [name], folder, tmp_path, 1)
    assert why in e.value.code and "\n" not in e.value.code


# ----------------------------------------------------------------- with lm-eval

@pytest.fixture
def manager(monkeypatch):
    """lm-eval, with an index of few tasks: its whole one takes twelve seconds."""
    theirs = pytest.importorskip("lm_eval.tasks")
    place = Path(theirs.__file__).parent
    few = [place / name for name in ("hellaswag", "arc", "mmlu/default", "piqa", "lambada")]
    monkeypatch.setattr(theirs, "TaskManager", partial(
        theirs.TaskManager, include_defaults=False, include_path=few))
    return theirs.TaskManager


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


TEXTS = [("The cat sat", " on the mat."), ("", "Alone"), ("Ends in blanks  ", "x"), (" ", "blank"),
         ("long " * 60, "tail, and a long one " * 3), ("The cat sat", " up")]


# In fp32 a sum of -882 over a hundred tokens is rounded by 1.2e-5.
@pytest.mark.parametrize("dtype, near", [(torch.float64, dict(abs=1e-9)),
                                         (torch.float32, dict(abs=1e-5, rel=1e-7))])
@pytest.mark.parametrize("tokenizer, size", [("bytes", V), ("gpt2", 50257)])
def test_lm_evals_likelihoods_are_the_models_own(tokenizer, size, dtype, near):
    utils = pytest.importorskip("lm_eval.utils")
    model = model_of(vocab_size=size).to(dtype)
    codec = make_tokenizer(tokenizer, size)
    lm = harness.as_lm(model, codec, 4)
    start = harness.start_of(codec)
    found = lm.loglikelihood(asked("loglikelihood", *TEXTS))
    for (before, after), (log_p, greedy) in zip(TEXTS, found):
        text = before + after
        n = len(codec.encode(before.rstrip()))
        whole = codec.encode(text)
        want, best = direct(model, whole[:n] or [start], whole[n:])
        assert log_p == pytest.approx(want, **near) and greedy == best
    assert (lm.asked, lm.cut) == (6, 1)
    texts = ["short", "a longer text, " * 20]
    rolled = lm.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in texts)))
    for text, log_p in zip(texts, rolled):
        tokens = codec.encode(text)
        assert log_p == pytest.approx(direct(model, [start], tokens)[0], **near)
        windows = utils.get_rolling_token_windows(tokens, start, T, 1)
        assert [*map(utils.make_disjoint_window, windows)] == [*pieces([start], tokens, T)]


def test_local_tasks_have_lm_evals_prompts(manager, folder, tmp_path):
    made = manager()
    names = ["hellaswag", "mmlu_anatomy", "lambada_openai"]
    tasks.localise(made.task_index, names, folder, tmp_path, 1)
    lm = pytest.importorskip("lm_eval")
    seen = []

    def note(requests):
        seen.extend(request.args for request in requests)
        return [(-1.0, False)] * len(requests)

    model = harness.as_lm(None, None, 1)
    model.loglikelihood = note
    lm.simple_evaluate(model, tasks=names, num_fewshot=1, task_manager=made, bootstrap_iters=0)
    prompt, answer = seen[4]                                      # row 1, ending 0
    shot, _, query = prompt.rpartition("\n\n")
    assert query == "Act 1: He does 1. She" and answer == " waits 1 now."
    # Another row, with its right ending.
    assert shot in [f"Act {i}: He does {i}. She waits {i} now." for i in (0, 2, 3, 4)]
    head = ("The following are multiple choice questions (with answers) about anatomy.\n\n"
            "anatomy {}?\nA. a\nB. b\nC. c\nD. d\nAnswer: {}\n\n"
            "anatomy {}?\nA. a\nB. b\nC. c\nD. d\nAnswer:")
    questions = seen[5 * 4:5 * 4 + 4 * 4]
    assert questions[0] == (head.format(1, "B", 0), " A")        # never its own row
    assert questions[7] == (head.format(0, "A", 1), " D")
    assert seen[-1][0].endswith("all that number 3 wants is number") and seen[-1][1] == " 3"


def test_a_table_of_tasks(manager, folder, run):
    names = "hellaswag,arc_easy,arc_challenge,mmlu_anatomy,piqa,lambada_openai"
    lines, report = run(model_of(sequence_length=64), "--tasks", names, "--data", folder, "--limit",
                        4, "--num_fewshot", 1, "--batch_size", 4)
    rows = {(row["task"], row["metric"]): row for row in report["results"]}
    assert len(rows) == 11 and len(lines) == 3 + 11
    chances = [rows[task, "acc"]["chance"] for task in ("hellaswag", "arc_easy", "piqa")]
    assert chances == [1 / 4, 1 / 3, 1 / 2]
    assert all(row["n"] == 4 and row["shots"] == 1 for row in report["results"])
    assert rows["lambada_openai", "perplexity"]["chance"] == pytest.approx(V**2)
    assert report["cut"] > 0 and "longer than the model's 64 bytes" in lines[1]


def test_unknown_and_unloadable_tasks_are_one_line(manager, folder, tmp_path, capsys, monkeypatch):
    place = saved(tmp_path, model_of())
    assert "did you mean hellaswag" in refused(capsys, place, "--tasks", "helaswag")
    line = refused(capsys, place, "--tasks", "mmlu_stem,mmlu_anatomy", "--data", folder)
    assert "has 0 rows" in line
    theirs = pytest.importorskip("datasets")

    def none(**_):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(theirs, "load_dataset", none)
    line = refused(capsys, place, "--tasks", "piqa")
    assert "cannot be loaded (no network)" in line and "--data" in line


def test_answers_are_written_up_to_their_stops():
    pytest.importorskip("lm_eval")
    model = model_of()
    lm = harness.as_lm(model, make_tokenizer("bytes", V), 2)
    free, = lm.generate_until(asked("generate_until", ("Say:", dict(until=[], max_gen_toks=8))))
    assert len(free) > 2
    wishes = dict(until=free[2], max_gen_toks=8, do_sample=False, temperature=0.0)
    text, other = lm.generate_until(asked("generate_until", ("Say:", wishes), ("x" * 99, wishes)))
    assert text == free[:free.index(free[2])] and (lm.asked, lm.cut) == (3, 1)


# ----------------------------------------------------------------- the oracle

def llama_of(model):
    """transformers' Llama with the weights of ours."""
    transformers = pytest.importorskip("transformers")
    cfg = model.cfg
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.n_embd, num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head, intermediate_size=int(cfg.mlp_ratio * cfg.n_embd),
        max_position_embeddings=cfg.sequence_length, rms_norm_eps=1e-6, rope_theta=10000.0,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=50256, pad_token_id=None))
    weights = {"model.embed_tokens": model.wte, "lm_head": model.head}
    for i, block in enumerate(model.blocks):
        m = block.mixer
        weights |= {f"model.layers.{i}.self_attn.{name}_proj": part for name, part in
                    dict(q=m.q, k=m.k, v=m.v, o=m.proj).items()}
        weights |= {f"model.layers.{i}.mlp.{name}_proj": part for name, part in
                    dict(gate=block.mlp.gate, up=block.mlp.fc, down=block.mlp.proj).items()}
    state = {f"{name}.weight": part.weight[:cfg.vocab_size] if part in (model.wte, model.head)
             else part.weight for name, part in weights.items()}
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    # Gains, which are ones.
    assert all("norm" in name for name in missing.missing_keys)
    return theirs.eval()


def gpt2_tokenizer():
    """GPT-2's, for transformers, from the merges that are here."""
    import bz2

    import transformers
    packed = Path(evals.__file__).parent / "data/gpt2_vocab.bpe.bz2"
    merges = [tuple(line.split()) for line in
              bz2.decompress(packed.read_bytes()).decode().splitlines()[1:]]
    spelled = {token: text for text, token in byte_names().items()}
    encoding = gpt2_encoding()
    vocab = {"".join(spelled[b] for b in encoding.decode_single_token_bytes(i)): i
             for i in range(50256)} | {"<|endoftext|>": 50256}
    return transformers.GPT2TokenizerFast(vocab=vocab, merges=merges)


def byte_names():
    """{GPT-2's character for a byte: the byte}"""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def test_lm_evals_hf_model_gives_the_same_scores(manager, folder, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    hf = pytest.importorskip("lm_eval.models.huggingface")
    model = model_of(vocab_size=50257, sequence_length=48, mlp="swiglu", mlp_ratio=2.0,
                     head_norm="none", embed_norm=False, logit_softcap=0.0)
    tokenizer = gpt2_tokenizer()
    codec = make_tokenizer("gpt2", 50257)
    theirs = hf.HFLM(pretrained=llama_of(model), tokenizer=tokenizer, batch_size=3, device="cpu",
                     max_length=48)
    ours = harness.as_lm(model, codec, 5)
    made = manager()
    names = ["hellaswag", "arc_easy", "mmlu_anatomy", "piqa", "lambada_openai"]
    tasks.localise(made.task_index, names, folder, tmp_path, 1)
    results = [lm_eval.simple_evaluate(lm, tasks=names, num_fewshot=1, task_manager=made,
                                       bootstrap_iters=0) for lm in (ours, theirs)]
    compared = 0
    for name in names:
        for mine, other in zip(*(found["samples"][name] for found in results)):
            assert mine["arguments"] == other["arguments"]
            for (a, greedy), (b, best) in zip(mine["filtered_resps"], other["filtered_resps"]):
                assert a == pytest.approx(b, abs=2e-5) and greedy == best
                compared += 1
        scores = [{key: value for key, value in found["results"][name].items()
                   if isinstance(value, float)} for found in results]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert compared == 5 * 4 + 5 * 3 + 4 * 4 + 4 * 2 + 4 and ours.cut > 10
    texts = [("short",), ("a longer text, " * 30,)]
    rolled = [lm.loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
              for lm in (ours, theirs)]
    assert rolled[0] == pytest.approx(rolled[1], abs=1e-4)
    prompts = [(text, dict(until=["\n"], max_gen_toks=8)) for text in ("To be", "A cat", "x " * 99)]
    written = [lm.generate_until(asked("generate_until", *prompts)) for lm in (ours, theirs)]
    assert written[0] == written[1] and len(written[0][0]) > 8
