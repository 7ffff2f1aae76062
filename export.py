"""Write a trained model as a folder that transformers loads, and the hub takes.

    python export.py --out DIR                          # the newest checkpoint below logs/
    python export.py logs/RUN --out DIR                 # ... or a run's
    python sample.py --load DIR                         # reads it back
    python train_gpt2.py --init_from DIR ...            # trains on from its weights

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True)

Attention becomes a class of transformers with the same logits where there is one (`stock_class`);
everything else brings its own sources, which need torch and transformers only.
"""
import argparse
import ast
import json
import os
import re
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from data.tokenizer import tokenizer_files
from parts import norm
from sample import build, find, make_tokenizer, val_loss
from support import checkpoint
from support.exported import (ACTIVATIONS, DERIVED, KEY, SETTINGS, STOCK, WEIGHTS, digest, optional,
                              stock_class, to_stock)
from support.flags import Parser, listed
from support.shards import tokenizer_of
from train_gpt2 import GPT, ROOT, Config

MODELING = "modeling_spectral_nanogpt"


# --------------------------------------------------------------------------------------------------
# Attention as a class of transformers

def fold(model: GPT, keep_norm: bool) -> tuple[Config, dict[str, Tensor]]:
    """-> a plainer Config and weights that give the same logits.

    What is done to embedding, branches or logits is done to the weights. keep_norm: but the norm
    behind the embedding stays.
    """
    cfg = model.cfg
    V = cfg.vocab_size
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    wte = model.embed_scale * weights["wte.weight"][:V]
    if cfg.embed_norm and not keep_norm:
        wte = norm(wte)
    head = cfg.logit_scale * model.head_gain(model.head.weight)[:V]
    weights["wte.weight"] = wte
    weights["head.weight"] = head
    for i, block in enumerate(model.blocks):
        factors = [block.scale, 1.0]
        if cfg.residual == "gated":
            factors = [f * torch.sigmoid(g)[:, None] for f, g in zip(factors, block.residual.g)]
        for branch, factor in zip(("mixer", "mlp"), factors):
            weights[f"blocks.{i}.{branch}.proj.weight"] *= factor
    plain = replace(cfg, pad_vocab=False, embed_scale=False, logit_scale=1.0, logit_gain=False,
                    embed_norm=cfg.embed_norm and keep_norm, branch_scale=False, residual="add",
                    tie_embeddings=torch.equal(wte, head), head_lr_scale=1.0)
    there = GPT(plain).state_dict()
    return plain, {name: weights[name] for name in there}


def stock_settings(name: str, cfg: Config) -> dict:
    """config.json of a class of transformers."""
    T = cfg.sequence_length
    return dict(
        model_type=STOCK[name].model_type, hidden_size=cfg.n_embd, num_hidden_layers=cfg.n_layer,
        num_attention_heads=cfg.n_head, num_key_value_heads=cfg.n_kv_head or cfg.n_head,
        head_dim=cfg.n_embd // cfg.n_head, intermediate_size=int(cfg.mlp_ratio * cfg.n_embd),
        hidden_act=ACTIVATIONS[cfg.mlp], max_position_embeddings=T, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0), attention_bias=False,
        final_logit_softcapping=cfg.logit_softcap or None)


# --------------------------------------------------------------------------------------------------
# Sources of everything else

def names_in(node) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def model_source() -> str:
    """The part of train_gpt2.py that GPT consists of; a Config is a bag of config.json's fields."""
    text = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    source = text.splitlines()
    defined = {}
    imports = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined[node.targets[0].id] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                imports[alias.asname or alias.name.split(".")[0]] = (node, alias)
    # The one method of Config's that GPT calls; its properties are values here.
    at = next(part for part in defined["Config"].body if getattr(part, "name", "") == "at")
    needed = {"GPT", *names_in(at)}
    ready = set()
    while new := needed - ready - {"Config"}:
        ready |= new
        for name in new & defined.keys():
            needed |= names_in(defined[name])
    lines = ['"""The model, taken from train_gpt2.py of spectral-nanogpt by its export.py."""',
             "from types import SimpleNamespace"]
    for name in sorted(ready & imports.keys()):
        node, alias = imports[name]
        if isinstance(node, ast.ImportFrom):
            lines.append(f"from {node.module} import {ast.unparse(alias)}")
        else:
            lines.append(f"import {ast.unparse(alias)}")
    lines += ["", "", "class Config(SimpleNamespace):", *source[at.lineno - 1:at.end_lineno]]
    for name, node in defined.items():
        if name in ready - {"Config"}:
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            lines += ["", "", *source[first - 1:node.end_lineno]]
    return "\n".join(lines) + "\n"


def sources() -> dict[str, str]:
    """{file: text} of all that a model of ours needs besides torch and transformers: one folder."""
    local = {path.stem: path for folder in (ROOT, ROOT / "support") for path in folder.glob("*.py")}
    found = {"gpt": model_source()}
    waiting = ["decode", "gpt"]
    while waiting:
        name = waiting.pop()
        text = found.get(name) or local[name].read_text(encoding="utf-8")
        text = text.replace("from train_gpt2 import", "from gpt import")
        imports = r"^from (?:support\.)?({}) import"
        used = [word for word in re.findall(imports.format(r"\w+"), text, re.MULTILINE)
                if word in local or word == "gpt"]
        ours = imports.format("|".join(used or ["-"]))
        found[name] = re.sub(ours, r"from .\1 import", text, flags=re.MULTILINE)
        waiting += [word for word in used if word not in found]
    modeling = (ROOT / "share/modeling.py").read_text(encoding="utf-8")
    return {f"{name}.py": text for name, text in found.items()} | {f"{MODELING}.py": modeling}


# --------------------------------------------------------------------------------------------------
# The rest of the folder

def recipe(cfg: Config) -> str:
    """The command line of a Config, without what checkpoint.FREE says does not matter."""
    words = ["python train_gpt2.py"]
    for f in fields(Config):
        value = getattr(cfg, f.name)
        if f.name in checkpoint.FREE or value == f.default or not value and f.type is int:
            continue
        if f.type is bool:
            words.append(f"--{f.name}" if value else f"--no-{f.name}")
        else:
            words.append(f"--{f.name} {shlex.quote(','.join(map(str, listed(value))))}")
    return " ".join(words)


def card(model: GPT, facts: dict, name: str | None, log: bool) -> str:
    """README.md: what was trained, how, on how much, and where that is written down."""
    cfg = model.cfg
    how = "" if name else ", trust_remote_code=True"
    known = {"n": "{:,} parameters", "tokens": "trained on {:,} tokens", "step": "{:,} steps",
             "val_loss": "validation loss {} nats per token", "tokenizer": "tokenizer: {}"}
    lines = [f"* {line.format(facts[name])}" for name, line in known.items() if facts.get(name)]
    if log:
        lines.append("* [the run's log](log.txt), with its machine and the checksums of its data")
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
---
# A language model by {cfg.mixer}

Trained with spectral-nanogpt, context {cfg.sequence_length:,} tokens:

    {recipe(cfg)}

{chr(10).join(lines)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("this folder"{how})
model = AutoModelForCausalLM.from_pretrained("this folder"{how})
```

Code and weights: MIT ([LICENSE](LICENSE)). The text it was trained on has a licence of its own.
"""


def converted(model: GPT) -> tuple[str | None, Config, dict, dict[str, Tensor]]:
    """-> the class of transformers or None, its Config, what config.json has of it, its weights."""
    cfg = model.cfg
    name = stock_class(cfg)
    if name:
        cfg, weights = fold(model, keep_norm=name == "NanoChatForCausalLM")
        config = stock_settings(name, cfg)
        weights = to_stock(weights, STOCK[name], cfg)
    else:
        weights = {f"gpt.{key}": weight for key, weight in model.state_dict().items()}
        config = dict(model_type=KEY, hidden_size=cfg.n_embd, num_hidden_layers=cfg.n_layer,
                      num_attention_heads=cfg.n_head,
                      auto_map={"AutoConfig": f"{MODELING}.SpectralConfig",
                                "AutoModelForCausalLM": f"{MODELING}.SpectralForCausalLM"})
    if cfg.tie_embeddings:
        weights = {key: weight for key, weight in weights.items() if "head.weight" not in key}
    config |= dict(architectures=[name or "SpectralForCausalLM"], dtype="float32",
                   vocab_size=cfg.vocab_size, tie_word_embeddings=cfg.tie_embeddings)
    return name, cfg, config, weights


def folder_files(saved: dict, path: Path, ranks) -> tuple[str | None, dict, dict[str, Tensor]]:
    """A checkpoint's content -> the class of transformers or None, {file: text}, its weights."""
    model = build(saved, path)
    name, cfg, config, weights = converted(model)
    kind = saved.get("tokenizer") or tokenizer_of(cfg.vocab_size)
    facts = dict(n=sum(p.numel() for p in model.parameters()), step=saved["step"], tokenizer=kind,
                 tokens=saved.get("progress", {}).get("tokens"), val_loss=val_loss(saved, path))
    settings = {key: value for key, value in asdict(cfg).items() if key not in checkpoint.FREE}
    settings |= {key: getattr(cfg, key) for key in DERIVED}

    contents = {}
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if kind:
        tokenizer = make_tokenizer(kind, cfg.vocab_size, ranks)
        contents = tokenizer_files(kind, tokenizer, cfg.sequence_length)
        ends = dict.fromkeys(ends, tokenizer.stop)
    contents[SETTINGS] = config | ends | {KEY: facts | dict(settings=settings)}
    contents["generation_config.json"] = ends
    files = {file: json.dumps(content, indent=1) + "\n" for file, content in contents.items()}
    files["LICENSE"] = (ROOT / "LICENSE").read_text(encoding="utf-8")
    if not name:
        files |= sources()
    log = path.with_name("log.txt")
    if log.is_file():
        files["log.txt"] = log.read_text(encoding="utf-8", errors="replace")
    files["README.md"] = card(model, facts, name, log="log.txt" in files)
    return name, files, weights


def parse(argv=None):
    p = Parser(allow_abbrev=False, description=__doc__.splitlines()[0])
    p.add_argument("checkpoint", nargs="?", type=Path,
                   help="a run's folder or its model.pt (default: the newest below logs/)")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    p.add_argument("--ranks", type=Path, metavar="FILE",
                   help="for Qwen's tokens, as in data/text.py")
    return argparse.Namespace(**p.typed(sys.argv[1:] if argv is None else argv))


def main(argv=None):
    args = parse(argv)
    save = optional("safetensors.torch").save_file
    out = args.out
    if os.path.lexists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise SystemExit(f"--out {out}: is there already, and no empty folder: name another")
    path = find(args.checkpoint)
    name, files, weights = folder_files(checkpoint.read(path), path, args.ranks)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not there.
        with TemporaryDirectory(prefix=".export_", dir=out.parent) as place:
            part = Path(place, "part")
            part.mkdir()
            save(weights, part / WEIGHTS, metadata=dict(format="pt", sha256=digest(weights)))
            for file, content in files.items():
                (part / file).write_text(content, encoding="utf-8")
            os.replace(part, out)
    except OSError as e:
        raise SystemExit(f"--out {out}: cannot be written ({e.strerror or e})") from None
    print(f"{out}: {name or 'a class of its own'}, {len(files) + 1} files")


if __name__ == "__main__":
    main()
