"""Exports: how classes of transformers name our weights; folders read back; --init_from.

A folder has model.safetensors, and config.json whose "spectral_nanogpt" holds the fields of Config.
export.py writes it. A model of a class that transformers has keeps its weights by that class's
names, any other by ours.
"""
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from support import checkpoint
from support.machine import first_line

SETTINGS = "config.json"
WEIGHTS = "model.safetensors"
KEY = "spectral_nanogpt"
# What GPT reads of a Config besides its fields.
DERIVED = ("mixers", "vocab_rows", "rope", "mask_documents")


# --------------------------------------------------------------------------------------------------
# Classes of transformers

class Stock(NamedTuple):
    """A class that computes what a model of ours does, with these names for its weights."""
    model_type: str
    # {our name inside a block: its name}
    matrices: dict
    # Its gains in a block: of both norms, of those of queries and keys. Ours have none.
    gains: tuple = ()
    head_gains: tuple = ()
    # It turns queries and keys the other way.
    mirrored: bool = False


ATTENTION = {"mixer.q": "self_attn.q_proj", "mixer.k": "self_attn.k_proj",
             "mixer.v": "self_attn.v_proj", "mixer.proj": "self_attn.o_proj"}
PLAIN = ATTENTION | {"mlp.fc": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}
GATED = PLAIN | {"mlp.gate": "mlp.gate_proj"}
NANOCHAT = ATTENTION | {"mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"}
LLAMA_GAINS = ("input_layernorm", "post_attention_layernorm")
APERTUS_GAINS = ("attention_layernorm", "feedforward_layernorm")
HEAD_GAINS = ("self_attn.q_norm", "self_attn.k_norm")

STOCK = {
    "LlamaForCausalLM": Stock("llama", GATED, LLAMA_GAINS),
    "Qwen3ForCausalLM": Stock("qwen3", GATED, LLAMA_GAINS, HEAD_GAINS),
    "ArceeForCausalLM": Stock("arcee", PLAIN, LLAMA_GAINS),
    "ApertusForCausalLM": Stock("apertus", PLAIN, APERTUS_GAINS, HEAD_GAINS),
    "NanoChatForCausalLM": Stock("nanochat", NANOCHAT, mirrored=True),
}

# {field: what it must be}; of the other fields a class takes any value, or they are folded.
FITS = dict(norm=("pre", "lns"), residual=("add", "gated"), linear=("dense",), pos=("rope",),
            short_conv=(False,), output_conv=(False,), value_residual=(False,),
            x0_shortcut=(False,), unet_skips=(False,), window=(0,), mask_documents=(False,))
# {(norms inside heads, MLP, are logits capped): the class}
CLASSES = {
    ("none", "swiglu", False): "LlamaForCausalLM",
    ("qk", "swiglu", False): "Qwen3ForCausalLM",
    ("none", "gelu", False): "ArceeForCausalLM",
    ("none", "relu2", False): "ArceeForCausalLM",
    ("qk", "gelu", False): "ApertusForCausalLM",
    ("qk", "relu2", False): "ApertusForCausalLM",
    ("qk", "gelu", True): "NanoChatForCausalLM",
    ("qk", "relu2", True): "NanoChatForCausalLM",
}
ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu", "relu2": "relu2"}
# It has no gains for LayerNorm scaling, and always a norm behind the embedding.
NEEDS = {"NanoChatForCausalLM": dict(norm=("pre",), embed_norm=(True,))}


def stock_class(cfg) -> str | None:
    """The class of transformers that computes the same; None: there is none."""
    name = CLASSES.get((cfg.head_norm, cfg.mlp, cfg.logit_softcap > 0))
    needs = FITS | NEEDS.get(name, {})
    if set(cfg.mixers) != {"attn"} or any(getattr(cfg, f) not in needs[f] for f in needs):
        return None
    return name


def names(stock: Stock, cfg) -> dict[str, str]:
    """{our name: its name} of all matrices of a model."""
    found = {"wte.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}
    for i in range(cfg.n_layer):
        for ours, theirs in stock.matrices.items():
            found[f"blocks.{i}.{ours}.weight"] = f"model.layers.{i}.{theirs}.weight"
    return found


def gains(stock: Stock, cfg) -> dict[str, Tensor]:
    """What its gains must be for its norms to be ours: 1, or LayerNorm scaling's."""
    found = {}
    if stock.gains:
        found["model.norm.weight"] = torch.ones(cfg.n_embd)
    for i in range(cfg.n_layer):
        scale = (i + 1) ** -0.5 if cfg.norm == "lns" else 1.0
        for name in stock.gains:
            found[f"model.layers.{i}.{name}.weight"] = torch.full((cfg.n_embd,), scale)
        for name in stock.head_gains:
            found[f"model.layers.{i}.{name}.weight"] = torch.ones(cfg.n_embd // cfg.n_head)
    return found


def mirror(name: str, weight: Tensor, stock: Stock, cfg) -> Tensor:
    """The second half of each head of queries and keys with the other sign, where that is needed.

    Then turning by an angle is what turning by minus the angle was.
    """
    if not stock.mirrored or not name.endswith((".mixer.q.weight", ".mixer.k.weight")):
        return weight
    half = cfg.n_embd // cfg.n_head // 2
    sign = torch.tensor([1.0, -1.0], dtype=weight.dtype).repeat_interleave(half)
    return weight * sign.repeat(len(weight) // len(sign))[:, None]


def to_stock(weights: dict, stock: Stock, cfg) -> dict[str, Tensor]:
    """Our weights -> its weights."""
    found = gains(stock, cfg)
    for ours, theirs in names(stock, cfg).items():
        if ours in weights:
            found[theirs] = mirror(ours, weights[ours], stock, cfg)
    return found


def from_stock(weights: dict, stock: Stock, cfg) -> dict[str, Tensor]:
    """Its weights -> ours. Raises ValueError where its gains are no longer what they were."""
    weights = dict(weights)
    for name, gain in gains(stock, cfg).items():
        if not torch.equal(weights.pop(name).float(), gain):
            raise ValueError(f"{name} was trained, and norms have no gains here")
    table = names(stock, cfg)
    if cfg.tie_embeddings:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    found = {ours: mirror(ours, weights.pop(theirs), stock, cfg) for ours, theirs in table.items()}
    # What has no name here is refused when it is loaded.
    return found | weights


# --------------------------------------------------------------------------------------------------
# Files

def optional(module: str):
    """An optional package's module, or SystemExit with one line."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        package = module.split(".")[0]
        raise SystemExit(f"exports need an optional package: pip install {package}") from None


def digest(weights: dict) -> str:
    """A checksum of {name: tensor}: safetensors has none, and a flipped bit would load."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].contiguous()
        sha.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        sha.update(weight.view(torch.uint8).numpy())
    return sha.hexdigest()


def is_export(path: Path) -> bool:
    return os.path.isfile(path / SETTINGS) or os.path.isfile(path / WEIGHTS)


def read(path: Path, Config) -> dict:
    """An export -> what checkpoint.read gives: config, weights, step, tokenizer.

    SystemExit with one line where something is missing, damaged, or not an export of this code.
    """
    safetensors = optional("safetensors")
    for name in (SETTINGS, WEIGHTS):
        if not os.path.isfile(path / name):
            raise SystemExit(f"{path / name}: no such file: name a folder that export.py has "
                             "written")
    try:
        with open(path / SETTINGS, encoding="utf-8") as f:
            told = json.load(f)
        ours = told[KEY]
        settings = {name: value for name, value in ours["settings"].items() if name not in DERIVED}
        cfg = Config(**settings)
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise SystemExit(f"{path / SETTINGS}: damaged, or not an export of this code "
                         f"({first_line(e)})") from None
    try:
        with safetensors.safe_open(path / WEIGHTS, "pt") as f:
            checksum = (f.metadata() or {}).get("sha256")
            weights = {name: f.get_tensor(name) for name in f.keys()}
    except Exception as e:
        # safetensors' own class of errors, and OSError.
        raise SystemExit(f"{path / WEIGHTS}: cut off, damaged or no safetensors file "
                         f"({first_line(e)})") from None
    # A file that transformers has written anew has none.
    if checksum and digest(weights) != checksum:
        raise SystemExit(f"{path / WEIGHTS}: damaged, its tensors are not those that were "
                         "exported: export again")
    try:
        stock = STOCK.get(told["architectures"][0])
        if stock:
            weights = from_stock(weights, stock, cfg)
        else:
            weights = {name.removeprefix("gpt."): weight for name, weight in weights.items()}
    except (ValueError, LookupError, TypeError, RuntimeError) as e:
        raise SystemExit(f"{path / WEIGHTS}: not the weights that {SETTINGS} tells of "
                         f"({first_line(e)})") from None
    if cfg.tie_embeddings and "wte.weight" in weights:
        weights["head.weight"] = weights["wte.weight"]
    return dict(model=weights, config=asdict(cfg), step=ours.get("step", 0),
                tokenizer=ours.get("tokenizer"))


# --------------------------------------------------------------------------------------------------
# --init_from

# Fields that say how a model is trained, not what it computes.
OF_TRAINING = checkpoint.FREE | {
    "shuffle", "batches", "document_token", "model", "zero_init", "dropout", "gpas_clip",
    "recompute", "afno_backend", "gdn_chunk", "optim", "batch_size", "grad_accumulation_steps",
    "num_iterations", "stages", "schedule", "warmup_iters", "warmdown_iters", "lr_start", "lr_end",
    "learning_rate", "embed_lr_scale", "head_lr_scale", "vector_lr_scale", "kernel_lr_scale",
    "lambda_lr_scale", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "grad_clip",
    "muon_learning_rate", "muon_row_beta", "muon_momentum", "muon_momentum_warmup", "lookahead",
    "ademamix_alpha", "ademamix_beta3", "ademamix_warmup", "soap_beta", "soap_frequency", "minutes",
    "seed", "dtype", "val_tokens",
}


def start_from(cfg, model):
    """--init_from: a run's folder, a checkpoint or an export gives the model its weights.

    SystemExit with one line that names the settings, or the weights, that differ.
    """
    path = Path(cfg.init_from)
    saved = read(path, type(cfg)) if is_export(path) else checkpoint.read(path)
    there = saved["config"]
    others = [f"--{name} is {here}, was {there[name]}" for name, here in asdict(cfg).items()
              if name not in OF_TRAINING and there.get(name, here) != here]
    if others:
        raise SystemExit(f"--init_from {path}: another model: {'; '.join(others[:4])}: give its "
                         "own flags and data of its tokens")
    own = model.state_dict()
    weights = saved["model"]
    for name in sorted(own.keys() | weights.keys()):
        here, there = (tuple(table[name].shape) if name in table else "missing"
                       for table in (own, weights))
        if here != there:
            raise SystemExit(f"--init_from {path}: {name} is {there} there, {here} here")
    if bad := checkpoint.bad_weights(weights):
        raise SystemExit(f"--init_from {path}: {bad}")
    model.load_state_dict(weights)
    return f"starts from the weights of step {saved['step']} of {path}"
