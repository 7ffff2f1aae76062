"""Flags are the fields of Config, and everything a user can get wrong is one line, not a
traceback."""

import inspect
import math
import re
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from support.estimate import flops_per_token
from support.flags import PER_LAYER
from support.machine import device_name, device_peak_flops
from support.optim import ramp_notes
from support.shards import open_data
from train_gpt2 import (AXES, CHOICES, GPT, MIXERS, ROOT, Config, main, new_model, parse, roles)

# small enough for any machine, should a run start that must not
SMALL = [
    "--n_layer=2",
    "--n_embd=32",
    "--sequence_length=16",
    "--batch_size=2",
    "--num_iterations=2",
    "--val_tokens=32",
    "--device=cpu",
    "--warmup_iters=0",
    "--warmdown_iters=0",
]
TRAIN = "data/tinyshakespeare/train.bin"
VAL = "data/tinyshakespeare/val.bin"
ATTN, AFNO = ["--mixer=attn"], ["--mixer=afno", "--afno_num_blocks=2", "--afno_group_size=4"]
DEFAULT = {f.name: f.default for f in fields(Config)}


def flags(argv):
    command = [sys.executable, "train_gpt2.py", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_every_field_is_one_flag(capsys):
    with pytest.raises(SystemExit) as e:
        parse(["--help"])
    shown = re.findall(r"^  (?:-h, )?--(\[no-\])?(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert e.value.code == 0 and [name for _, name in shown] == ["help", *DEFAULT]
    switches = {f.name for f in fields(Config) if f.type in (bool, bool | None)}
    assert {name for negative, name in shown if negative} == switches


@pytest.mark.parametrize("f", fields(Config), ids=lambda f: f.name)
def test_a_flag_sets_its_field_and_no_other(f, monkeypatch):
    # values need not make sense together
    monkeypatch.setattr(Config, "__post_init__", lambda self: None)
    monkeypatch.setattr("train_gpt2.ALWAYS_ACCEPTED", ())
    value = (
        not f.default
        if f.type in (bool, bool | None)
        else "word"
        if f.type is str
        else 7.0
        if f.type is float
        else 7
    )
    argv = (
        [f"--{'' if value else 'no-'}{f.name}"]
        if isinstance(value, bool)
        else [f"--{f.name}", str(value)]
    )
    got = asdict(parse(argv))
    assert got == DEFAULT | {f.name: value} and type(got[f.name]) is type(value)


@pytest.mark.parametrize("columns", [40, 80])
def test_help_has_headings_rows_and_defaults(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns
    headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert {"Data", "Model", "Switches", "AFNO", "Gated DeltaNet", "Optimization",
            "The run"} <= set(headings) and not any("There" in heading for heading in headings)
    entries = re.split(r"\n  (?=-)", text)
    entry = {re.search(r"--(?:\[no-\])?(\w+)", e)[1]: " ".join(e.split())
             for e in entries if "--" in e}
    for name, words in CHOICES.items():
        assert ", ".join(words) in entry[name]
    for name, default in DEFAULT.items():
        assert default in ("", None) or f"default: {default})" in entry[name], name
    assert "for --mixer afno;" in entry["afno_poles"]
    assert "for --mixer fan; for --mlp fan;" in entry["fan_ratio"]


def test_a_saved_config_of_older_code_loads():
    saved = asdict(Config(input_bin=TRAIN, input_val_bin=VAL))
    del saved["data"], saved["run_name"]
    assert Config(**saved) == Config(input_bin=TRAIN, input_val_bin=VAL)


@pytest.mark.parametrize("row", MIXERS)
def test_n_head_is_refused_only_where_it_is_typed(row):
    assert Config(mixer=row, n_head=2).n_head == 2
    # Its divisors do not matter to a mixer without heads.
    if "n_head" not in Config(mixer=row).fields_read():
        assert Config(mixer=row, n_embd=33).n_head == 4
        assert parse([f"--mixer={row}", "--n_head=0"]) == Config(mixer=row)


def odd_values(f):
    values = [0, 1, 2, 3, 7, -1, 1024, 2**24, 2**31 - 1, 2**63]
    if f.type is PER_LAYER:
        values.append((3, 0, -1))
    return values if f.type is not float else [*map(float, values), 1e-30, 1e30, math.inf, math.nan]


# Everything numeric with attention, then what the other rows read.
WALK = [("mixer", row) for row in MIXERS] + [("linear", "cola"), ("residual", "gpas"),
                                             ("optim", "ademamix"), ("optim", "soap")]


@pytest.mark.parametrize("axis, row", WALK)
def test_odd_numbers_make_a_model_or_one_line(axis, row):
    base = dict(mixer="attn", n_layer=1, n_embd=32, sequence_length=16, vocab_size=50) | {axis: row}
    sizes = {"n_embd", "n_head", "sequence_length", "mlp_ratio"}
    everything = row == "attn"
    for f in fields(Config):
        read = everything or f.name in sizes | set(AXES[axis][row][1].values())
        for value in odd_values(f) if read and f.type in (int, float, PER_LAYER) else ():
            try:
                cfg = Config(**base | {f.name: value})
                cfg = replace(cfg, vocab_size=cfg.vocab_size or 50)
                new_model(cfg, torch.device("meta"))
            except (ValueError, SystemExit) as e:
                assert "\n" not in str(e) and 10 < len(str(e)) < 400, (f.name, value)


@pytest.mark.parametrize(
    "knobs, line",
    [
        (dict(num_iterations=20), "note: --muon_momentum_warmup 300 is longer than the run, "
                                  "which ends in the middle of that ramp"),
        (dict(num_iterations=300), None),
        (dict(mixer="attn", window=255), None),
        (dict(mixer="attn", window=256),
         "note: --window 256 has no effect: no sequence is longer"),
        (dict(num_iterations=20, muon_momentum_warmup=0), None),
        (dict(num_iterations=20, optim="adamw"), None),
        (dict(num_iterations=20, optim="ademamix"), None),
        (dict(num_iterations=20, optim="ademamix", ademamix_warmup=50),
         "note: --ademamix_warmup 50 is longer than the run, which ends in the middle of that ramp"),
    ],
)
def test_a_ramp_that_is_longer_than_the_run_is_noted(knobs, line):
    assert ramp_notes(Config(**knobs)) == ([line] if line else [])


def test_a_run_prints_its_notes_and_has_the_name_it_was_given(tmp_path, capsys):
    argv = [*SMALL, *ATTN, f"--output_dir={tmp_path}", "--run_name=first try"]
    (tmp_path / "first try").mkdir()                        # empty: nothing is lost
    main(parse(argv))
    assert [path.name for path in tmp_path.iterdir()] == ["first try"]
    lines = capsys.readouterr().out.splitlines()
    assert "parameters" in lines[0] and lines[1].startswith("note: --muon_momentum_warmup 300 is longer than the run")
    before = (tmp_path / "first try/log.txt").read_text()
    with pytest.raises(SystemExit, match="is not empty: choose another name"):
        main(parse(argv))
    assert (tmp_path / "first try/log.txt").read_text() == before


def test_a_folder_stands_for_its_shards_of_a_kind():
    folder = "data/tinyshakespeare"
    named = open_data(Config(input_bin=TRAIN, input_val_bin=VAL))
    found = open_data(Config(input_bin=folder, input_val_bin=folder))
    for shards, same in zip(found[:2], named[:2]):
        assert [Path(path).name for path in shards] == [Path(path).name for path in same]


def test_no_flags_is_the_config_without_arguments():
    assert parse([]) == Config()


def test_sizes_by_name_and_by_number():
    cfg = Config(model="d12", n_layer=3)
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd) == (3, 12, 768)
    cfg = Config(mixer="afno,afno,attn", n_layer=5)
    assert cfg.mixers == ["afno", "afno", "attn", "afno", "afno"]


WRONG = [  # (flags, what the line must name)
    (["--nonsense=1"], "nonsense"),
    (["--learning=0.1"], "learning"),
    (["stray"], "stray"),
    (["--seed"], "seed"),
    (["--n_layer=x"], "n_layer"),
    (["--n_layer=2.5"], "n_layer"),
    (["--shuffle=yes"], "shuffle"),
    (["--mixer=lstm"], "lstm"),
    (["--mixer=afno,lstm"], "lstm"),
    (["--mixer="], "mixer"),
    (["--mixer=attn,"], "mixer"),
    (["--mlp=lstm"], "mlp"),
    (["--pos=lstm"], "pos"),
    (["--optim=sgd"], "sgd"),
    (["--model=d13"], "d13"),
    (["--optim=adamw,muon"], "optim"),
    (["--mlp=relu2,gelu"], "mlp"),
    (["--pos=rope,learned"], "pos"),
    (["--embed_scale"], "--no-embed_norm"),
    (["--norm=pre_post", "--residual=gpas"], "gpas"),
    ([*ATTN, "--fftnet_hidden=9"], "fftnet_hidden"),
    ([*ATTN, "--afno_poles=9"], "afno_poles"),
    (["--mixer=afno", "--n_kv_head=2"], "n_kv_head"),
    (["--mixer=afno", "--head_norm=none"], "head_norm"),
    (["--optim=adamw", "--muon_momentum=0.5"], "muon_momentum"),
    (["--optim=muon", "--muon_momentum=1"], "muon"),
    (["--sequence_length=0"], "sequence_length"),
    (["--batch_size=-1"], "batch_size"),
    (["--n_layer=-1"], "n_layer"),
    (["--num_iterations=0"], "num_iterations"),
    (["--seed=-1"], "seed"),
    (["--seed=9" + 30 * "9"], "seed"),
    (["--learning_rate=-1"], "learning_rate"),
    (["--learning_rate=nan"], "learning_rate"),
    (["--mlp_ratio=0"], "mlp"),
    (["--weight_decay=inf"], "at least 0 and finite"),
    (["--adam_beta1=1"], "at least 0 and below 1"),
    (["--adam_beta2=1.5"], "adam_beta2"),
    (["--warmup_iters=-2"], "warmup_iters"),
    (["--num_iterations=10", "--warmdown_iters=11"], "num_iterations"),
    ([*ATTN, "--n_embd=34", "--n_head=4"], "34 channels"),
    ([*ATTN, "--n_head=2", "--n_kv_head=4"], "key/value"),
    ([*AFNO, "--afno_num_blocks=3"], "afno_num_blocks"),
    ([*AFNO, "--afno_group_size=5"], "afno_group_size"),
    ([*AFNO, "--afno_backend=fpga"], "fpga"),
    ([*AFNO, "--afno_poles=1"], "afno_poles"),
    ([*ATTN, "--pos=rope", "--n_embd=18", "--n_head=2"], "even"),
    (["--mixer=afno,attn", *AFNO[1:], "--value_residual", "--n_kv_head=1"], "value_residual"),
    (["--input_bin=no/such*.bin", "--input_val_bin=x"], "no/such"),
    (["--input_bin=data/tinyshakespeare/train.bin", "--input_val_bin=requirements.txt"],
     "requirements.txt"),
    ([*ATTN, "--vocab_size=10"], "10"),
    (["--sequence_length=9000000"], "sequence_length"),
    (["--device=tpu"], "tpu"),
    ([*ATTN, "--output_dir=/dev/null/x"], "/dev/null/x"),
    # Near misses are named.
    (["--learning_rat=1"], "did you mean --learning_rate?"),
    (["--foo"], "argument --foo (--help"),
    (["--input-bin", "x"], "did you mean --input_bin?"),
    (["--mixer=atn"], "did you mean attn?"),
    (["--model=d11"], "did you mean d12?"),
    # argparse takes this for no value.
    (["--mixer=--"], "--mixer=--"),
    (["--afno_backend=toplitz"], "did you mean toeplitz?"),
    (["--mixer=fan", "--fan_trig=sinus"], "did you mean sin?"),
    (["--mixer=fftnet", "--fftnet_filter=runing"], "did you mean running?"),
    (["--device=cud"], "did you mean cuda?"),
    (["--dtype=bf32"], "did you mean fp32?"),
    # A shell makes several words of a glob or a blank that is not quoted.
    (["--input_bin", TRAIN, VAL, f"--input_val_bin={VAL}"], "--input_bin 'data/tinyshakespeare/*"),
    (["--run_name", "first", "try", "--seed=1"], "--run_name 'first try'"),
    # What does not print is told in one line.
    (["--run_name=a\nb"], r"--run_name 'a\nb'"),
    (["--input_bin=a\nb", "--input_val_bin=b"], r"--input_bin 'a\nb'"),
    (["--mixer=attn\n"], r"--mixer 'attn\n'"),
    (["--non\nsense"], r"--non\nsense"),
    (["a\nb"], r"a\nb"),
    (["--n_layer=--"], "--n_layer=--"),
    # Shards: where they come from, and that none is used twice.
    ([f"--input_bin={TRAIN}"], "without --input_val_bin"),
    ([f"--input_val_bin={VAL}"], "without --input_bin"),
    (["--data=data/mine", f"--input_bin={TRAIN}", f"--input_val_bin={VAL}"], "two sources"),
    (["--data=no/such"], "no such folder"),
    ([f"--data={TRAIN}"], "--input_bin"),
    (["--data=tests"], "*train.bin"),
    (["--data=" + 300 * "x"], "too long"),
    (["--input_bin=tests", f"--input_val_bin={VAL}"], "--input_bin tests: no shard there"),
    ([f"--input_bin={TRAIN}", "--input_val_bin=tests"], "--input_val_bin tests: no shard there"),
    (["--input_bin=data/tinyshakespear*", f"--input_val_bin={VAL}"], "is a folder, not a shard"),
    ([f"--input_bin={TRAIN}", f"--input_val_bin={TRAIN}"], "text it has seen"),
    ([f"--input_bin={TRAIN}", "--input_val_bin=data/tinyshakespeare/*.bin"], "text it has seen"),
    # Named, but not built.
    (["--mixer=attn,afno,fftnet"], "3 mixers for 2 layers"),
    # Sizes that no real model reaches, and factors that stop learning.
    (["--n_layer=999999"], "n_layer"),
    (["--n_embd=9999999"], "n_embd"),
    (["--batch_size=99999", "--grad_accumulation_steps=9999"], "tokens a step"),
    ([*ATTN, "--n_embd=1", "--n_head=1", "--mlp_ratio=0.5", "--pos=none"], "mlp_ratio"),
    (["--logit_scale=1e30"], "logit_scale"),
    (["--logit_softcap=1e-45"], "logit_softcap"),
    # Set without effect.
    (["--n_head=2"], "n_head"),
    (["--pos=none"], "pos none"),
    (["--lr_start=0.5"], "warmup_iters 0"),
    (["--n_layer=1", "--value_residual"], "n_layer 1"),
    (["--n_layer=1", "--unet_skips"], "n_layer 1"),
    ([*ATTN, "--kernel_lr_scale=2"], "kernel_lr_scale"),
    (["--tie_embeddings", "--head_lr_scale=2"], "head_lr_scale"),
    (["--lambda_lr_scale=2"], "lambda_lr_scale"),
    (["--lambda_lr_scale=2", "--estimate"], "lambda_lr_scale"),
    # A name, not a path.
    (["--run_name=a/b"], "run_name"),
    (["--run_name=.."], "run_name"),
    (["--run_name=."], "run_name"),
    (["--run_name=" + 300 * "x"], "too long"),
]


@pytest.mark.parametrize(
    "argv, word", WRONG, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_what_is_wrong_is_one_line(argv, word, tmp_path):
    with pytest.raises(SystemExit) as e:
        main(parse([*SMALL, f"--output_dir={tmp_path}", *argv]))
    line = e.value.code
    assert isinstance(line, str) and word in line and "\n" not in line and 10 < len(line) < 800
    assert not list(tmp_path.iterdir())                     # refused before anything was written


@pytest.mark.parametrize(
    "argv, word", [WRONG[0], (["--n_head=5"], "heads"), (["--data=none"], "none")]
)
def test_one_line_on_stderr(argv, word):
    done = flags(argv)
    assert done.returncode != 0 and word in done.stderr and len(done.stderr.splitlines()) == 1, (
        done.stderr
    )
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "argv", [["--n_layer=1"], ["--sequence_length=1"], ["--num_iterations=1"]]
)
def test_extreme_sizes_run(argv, tmp_path):
    assert main(parse([*SMALL, *ATTN, f"--output_dir={tmp_path}", *argv])) > 0


@pytest.mark.parametrize(
    "name, known",
    [
        ("NVIDIA GeForce RTX 4090", True),
        ("NVIDIA H200", True),
        ("", False),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", False),
        ("NVIDIA RTX A1000", False),
    ],
)
def test_no_mfu_of_a_gpu_that_only_sounds_familiar(name, known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert (device_peak_flops(torch.device("cuda")) is not None) == known


def test_the_peak_may_be_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a new card")
    card = torch.device("cuda")
    assert device_peak_flops(card) is None and device_peak_flops(card, 250.0) == 250e12
    assert device_peak_flops(torch.device("cpu"), 1.5) == 1.5e12


def test_a_card_is_named_with_its_memory(monkeypatch):
    """An RTX 4090 says 25,386,352,640 bytes."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda device: SimpleNamespace(total_memory=25_386_352_640))
    assert device_name(torch.device("cuda")) == "NVIDIA GeForce RTX 4090, 24 GiB"


def test_a_told_peak_is_the_mfu_of_the_log(tmp_path):
    knobs = [*SMALL, *ATTN, f"--output_dir={tmp_path}", "--train_loss_every=1"]
    main(parse([*knobs, "--peak_flops=1e-6"]))
    log = next(tmp_path.glob("*/log.txt")).read_text()
    cfg = parse(SMALL + ATTN)
    model = new_model(replace(cfg, vocab_size=256), torch.device("meta"))
    flops = flops_per_token(roles(model), model.blocks, cfg.sequence_length)
    for rate, mfu in re.findall(r"tok/s:(\d+) grad_norm:\S+ mfu:([\d.]+)", log):
        assert float(mfu) == pytest.approx(int(rate) * flops / 1e6, rel=0.01)
    assert len(re.findall(r"tok/s:\d+ grad_norm:\S+ mfu:", log)) == 2


def test_an_estimate_guesses_the_time_by_a_told_peak(capsys):
    def guess(*flags):
        main(parse(["--estimate", "--model=d12", "--mixer=attn", "--device=cpu", *flags]))
        found = re.search(r"about .* on a GPU of \d+ TFLOP/s at 50% MFU, a guess: ([\d,]+) tokens/s",
                          capsys.readouterr().out)
        return found and int(found[1].replace(",", ""))

    assert guess() is None
    assert guess("--peak_flops=400") == pytest.approx(2 * guess("--peak_flops=200"), abs=1)


def test_an_estimate_ends_with_the_notes_of_the_run(capsys):
    main(parse(["--estimate", *SMALL, *ATTN, "--window=16"]))
    out = capsys.readouterr().out
    assert out.startswith("device ") and "note: --window 16 has no effect" in out.splitlines()[-2]
    assert "--muon_momentum_warmup 300 is longer" in out.splitlines()[-1]


def test_estimate(tmp_path, capsys):
    assert (
        main(
            parse(
                [
                    *"--mixer attn --model d12 --vocab_size 50257 --tie_embeddings --no-pad_vocab --mlp gelu "
                    "--sequence_length 1024 --batch_size 16 --grad_accumulation_steps 32 --num_iterations 4768 "
                    "--estimate".split(),
                    f"--output_dir={tmp_path}",
                ]
            )
        )
        is None
    )
    text = capsys.readouterr().out
    # 6 a parameter, and the causal half of attention
    flops = 6 * 123_532_032 + 6 * 12 * 768 * 1024
    for line in (
        r"parameters +123,532,032 ",
        r"tokens a step +524,288 ",
        r"tokens +2,499,805,184 ",
        rf"FLOPs a token +{flops:,} ",
        r"memory +about [\d,]+ MiB ",
        r"time +about .* RTX 4090",
    ):
        assert re.search("^" + line, text, re.MULTILINE), line
    assert not list(tmp_path.iterdir())


def twice_written():
    """(row's name, argument, the part's default, Config's) of all rows of all axes."""
    for axis, table in AXES.items():
        for row, (part, arguments) in table.items():
            for name, parameter in inspect.signature(part).parameters.items():
                field = arguments.get(name)
                if field in DEFAULT and parameter.default is not inspect.Parameter.empty:
                    default = DEFAULT[field]
                    if field in AXES:       # a factory: the class of the row that is the default
                        default = AXES[field][default][0]
                    yield f"{axis} {row}", name, parameter.default, default


def test_defaults_that_are_written_twice_agree():
    found = list(twice_written())
    assert len(found) > 20
    for where, name, ours, config in found:
        assert ours == config, f"{where}: {name} is {ours} in its class, {config} in Config"


def test_a_list_gives_each_layer_its_own():
    cfg = parse("--mixer attn,afno --n_layer 5 --window 8,0 --afno_taps 0,4,0,2".split())
    assert cfg.window == (8, 0) and Config(window=[8, 0], mixer="attn").window == (8, 0)
    model = GPT(replace(cfg, vocab_size=50))
    mixers = [block.mixer for block in model.blocks]
    assert [m.window for m in mixers[::2]] == [8, 8, 8]
    assert [m.kernel.taps for m in mixers[1::2]] == [4, 2]


@pytest.mark.parametrize("flags, words", [
    ("--mixer attn --window 1,2,3,4,5", "--window has 5 values for 4 layers"),
    ("--mixer attn --window 1,-2", "--window -2 is out of range"),
    ("--mixer attn --window 1,x", "argument --window: '1,x' is no int"),
    ("--mixer afno --window 1,2", "nothing in use reads it"),
])
def test_a_wrong_list_is_one_line(flags, words):
    with pytest.raises(SystemExit, match=words):
        parse(flags.split())


@pytest.mark.parametrize("flags, words", [
    ("--stages 64x8", "'64x8' is not tokens x rows @ step, as in 256x32@500"),
    ("--stages 64x0@5", "'64x0@5' is not tokens x rows @ step"),
    ("--stages 100x64@5", "rows of 256, the --sequence_length, must be a multiple of 100"),
    ("--stages 512x64@5", "must be a multiple of 512"),
    ("--stages 64x3@5", "a step of 192 tokens is not a whole number of windows of 256"),
    ("--stages 64x8@1000", "and before the run's end at 1000"),
    ("--stages 64x8@5,128x8@5", "--stages 128x8@5: must end behind step 5"),
    ("--stages 64x33554432@5", "2,147,483,648 tokens a step, at most 1,073,741,824 can be"),
    ("--stages 64x8@5 --batches padded", "rows are as long as documents are"),
])
def test_wrong_stages_are_one_line(flags, words):
    with pytest.raises(SystemExit, match=re.escape(words)) as e:
        parse(flags.split())
    assert "\n" not in str(e.value)


def test_an_estimate_takes_the_largest_stage(capsys):
    def lines(*flags):
        main(parse(["--estimate", *SMALL, *ATTN, *flags]))
        return capsys.readouterr().out
    one = re.search(r"memory .*", lines())[0]
    assert re.search(r"memory .*", lines("--stages=8x2@1"))[0] == one
    larger = lines("--stages=8x64@1")
    assert re.search(r"memory .*", larger)[0] != one
    tokens = re.search(r"\ntokens a step +([\d,]+) on average, behind --stages ([\d,]+) = ", larger)
    average, later = (int(number.replace(",", "")) for number in tokens.groups())
    assert average > later
