"""spectral-nanogpt: train GPT-2 on one GPU, with or without attention.

Config, model, data and loop are this file; mixers and other parts are siblings, picked by flags: see "The axes".
Lineage: karpathy/llm.c -> KellerJordan/modded-nanogpt -> BottleCapAI/NoCap-Test (the one-GPU benchmark).

    python train_gpt2.py                                          # the embedded run: any machine, minutes
    python train_gpt2.py --mixer afno,afno,afno,attn --estimate   # what would it cost? prints, then exits
    torchrun --standalone --nproc_per_node=1 train_gpt2.py --model d12 ...   # the race: see run_afno.sh, run_attn.sh
    python -m pytest -q test_causality.py                         # does anything see the future?

To experiment, edit Config and the dicts (MIXERS, MLPS, POSITIONS, OPTIMS), or write a sibling file and add its row.
Letters: B batch, T time, C channels, H heads, D head width, V vocabulary. Losses are in nats per token.
"""
import argparse
import inspect
import math
import os
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch._functorch.config
import torch.distributed as dist
import torch.nn as nn

from afno import AFNO
from attention import CausalSelfAttention, NoHeadNorm, QKNorm, QKVNorm
from batches import Packed, Padded, Windows, document_token
from blocks import (GPAS, Add, GatedResidual, HybridNorm, LayerNormScaling, LearnedPositions, NoPositions, PreNorm,
                    PrePostNorm, SinusoidalPositions, hybrid_star, norm)
from data.shards import open_shards
from deltanet import GatedDeltaNet
from diff import DiffAttention, DiffAttentionV2
from fan import FAN, FANMLP, TallFAN
from fftnet import FFTNet
from linear import CoLA, Linear, keep_all, recompute_block, recompute_high_rank
from log import Log, save
from loss import linear_cross_entropy, softcap
from machine import Clock, device_name, device_peak_flops, duration, flops_per_token, peak_memory, pick_device, report
from mlp import GELU, GatedPolyNorm, PolyNormMLP, ReLU2, SwiGLU
from ngpt import NGPTMLP, LogitGain, NGPTAttention, SphereNorm, SphereResidual
from optimizers import build_adamw, build_ademamix, build_muon, build_soap, clip_gradients, cosine, trapezoid

ROOT = Path(__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------------------
# Config: every flag, in one place. A default is written here and nowhere else; the race's values are in run_*.sh.

MODELS = {                                                  # layers, heads, channels
    "tiny": (4, 4, 128), "d12": (12, 12, 768), "d24": (24, 16, 1024), "d36": (36, 20, 1280), "d48": (48, 25, 1600)}


@dataclass(frozen=True)
class Config:
    # data
    input_bin: str = "data/tinyshakespeare/train.bin"       # training shards: a path or a glob
    input_val_bin: str = "data/tinyshakespeare/val.bin"     # validation shards
    output_dir: str = "logs"                                # one folder a run appears below it
    sequence_length: int = 256                              # T, tokens
    shuffle: bool = True                                    # windows in random order; off for pre-shuffled FineWeb
    batches: str = "windows"                                # row of BATCHES: what becomes of documents
    document_token: int = -1                                # starts a document; -1: the vocabulary's (GPT-2's 50256)
    # model
    model: str = "tiny"                                     # sizes by name (MODELS); the next three override it
    n_layer: int = 0
    n_head: int = 0
    n_embd: int = 0                                         # C, channels
    vocab_size: int = 0                                     # 0: read from the shards
    mixer: str = "afno"                                     # row of MIXERS; "afno,afno,afno,attn" tiles down the layers
    mlp: str = "relu2"                                      # row of MLPS
    mlp_ratio: float = 4.0                                  # hidden width / C
    norm: str = "pre"                                       # row of NORMS
    residual: str = "add"                                   # row of RESIDUALS
    linear: str = "dense"                                   # row of LINEARS: how projections inside blocks are made
    pos: str = "rope"                                       # row of POSITIONS; rope acts inside attention
    # Switches. The figures are validation loss at 124M and about 1.7B FineWeb tokens, from modded-nanogpt's logs.
    zero_init: bool = True                                  # every layer starts as the identity
    tie_embeddings: bool = False                            # untied with embed_norm: 10% fewer tokens
    pad_vocab: bool = True                                  # to a multiple of 128: aligned head GEMM; never predicted
    embed_norm: bool = True                                 # RMSNorm after the embedding
    embed_scale: bool = False                               # embedding times sqrt(C), before positions are added
    logit_softcap: float = 15.0                             # c tanh(z / c), 0 is off: -0.005, and 15 beats 30
    value_residual: bool = False                            # v + lambda v of layer 1: -0.012; lambda learned: -0.009
    x0_shortcut: bool = False                               # learned share of the embedding in every block: -0.009
    unet_skips: bool = False                                # layer i feeds layer L - 1 - i: 7% fewer tokens
    branch_scale: bool = False                              # mixer branch times 1 / sqrt(2 L); the public baseline's
    logit_scale: float = 1.0                                # constant factor on the logits
    logit_gain: bool = False                                # nGPT's s_z: a learned factor a vocabulary entry
    dropout: float = 0.0                                    # on both branches of a block, in training only
    gpas_clip: float = 0.01                                 # norm to which GPAS's gate gradients are clipped, apart
    cola_rank: int = 0                                      # of CoLA's projections; 0: a quarter of the smaller side
    recompute: str = "none"                                 # row of RECOMPUTE: less memory for one more forward
    # attention
    n_kv_head: int = 0                                      # grouped-query attention: key/value heads; 0 is n_head
    head_norm: str = "qk"                                   # row of HEAD_NORMS: RMSNorm inside the heads
    window: int = 0                                         # tokens a token sees, itself counted; 0: all before it
    short_conv: bool = False                                # AFNO's short convolution on q, k, v, as a fair control
    # AFNO
    afno_num_blocks: int = 0                                # blocks of the spectral MLP; 0: 8 if they fit
    afno_sparsity_threshold: float = 0.01                   # soft-shrinkage of the kernel's spectrum
    afno_hard_thresholding_fraction: float = 1.0            # share of the frequencies kept, from below
    afno_hidden_size_factor: float = 1.0                    # hidden width of the spectral MLP / poles
    afno_poles: int = 16                                    # frequency features a block
    afno_group_size: int = 0                                # channels that share one kernel; 0: 16 if they fit
    afno_backend: str = "auto"                              # fft | toeplitz | auto
    # FAN
    fan_ratio: float = 0.125                                # share of a FAN layer's outputs for cos, and for sin
    fan_trig: str = "both"                                  # both | sin
    # Gated DeltaNet
    gdn_k_heads: int = 0                                    # query/key heads; 0 is n_head, the number of value heads
    gdn_head_dim: int = 0                                   # width of a query or key; 0: C / n_head
    gdn_expand_v: float = 1.0                               # width of a value / width of a key
    gdn_chunk: int = 32                                     # tokens that are worked on as one matrix product
    gdn_neg_eigval: bool = False                            # beta up to 2: the state may be reflected
    # FFTNet
    fftnet_filter: str = "running"                          # running | bank
    fftnet_modes: int = 0                                   # modes a head; 0: half its channels, or 4 for bank
    fftnet_hidden: int = 0                                  # width of the MLP of the mean; 0: C / 8
    # optimization. A step is batch_size * grad_accumulation_steps sequences, however many processes share them.
    optim: str = "muon"                                     # row of OPTIMS
    batch_size: int = 8                                     # sequences in a micro-batch
    grad_accumulation_steps: int = 1                        # micro-batches in a step
    num_iterations: int = 1000                              # steps
    schedule: str = "trapezoid"                             # row of SCHEDULES
    warmup_iters: int = -1                                  # linear warm-up; -1: 2% of the steps
    warmdown_iters: int = -1                                # linear warm-down; -1: 60% of the steps
    lr_start: float = 0.0                                   # where warm-up starts, a share of the peak
    lr_end: float = 0.0                                     # where the run ends, a share of the peak
    learning_rate: float = 0.003                            # AdamW
    embed_lr_scale: float = 1.0                             # multiples of learning_rate
    head_lr_scale: float = 1.0
    kernel_lr_scale: float = 3.0                            # parameters that generate kernels
    weight_decay: float = 0.01                              # decoupled, never on vectors and kernels
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    grad_clip: float = 0.0                                  # global norm; 0 is off
    muon_learning_rate: float = 0.02
    muon_momentum: float = 0.95
    muon_momentum_warmup: int = 300                         # steps from 0.85: -0.013
    ademamix_alpha: float = 5.0                             # weight of the slow momentum
    ademamix_beta3: float = 0.999                           # its decay
    ademamix_warmup: int = 0                                # steps until both are reached; 0: all steps
    soap_beta: float = 0.95                                 # of both moments
    soap_frequency: int = 10                                # steps between refreshes of the eigenbasis
    # the run
    seed: int = 0
    device: str = "auto"                                    # cuda | cpu | mps
    compile: bool | None = None                             # torch.compile; not said: on CUDA only
    val_tokens: int = 1_048_576                             # first tokens of the validation shards
    val_batch_size: int = 16
    val_loss_every: int = 125                               # steps; 0: at the end only
    train_loss_every: int = 25                              # steps between train lines in the log
    save_every: int = 0                                     # steps between checkpoints; 0: none
    target_val_loss: float = 0.0                            # report the time it takes to reach this
    estimate: bool = False                                  # print parameters, FLOPs, memory and time, then exit

    def __post_init__(self):
        known, used = set(), set()
        for axis, rows in AXES.items():
            named = getattr(self, axis).split(",") if axis == "mixer" else [getattr(self, axis)]     # only mixers tile
            for row in named:
                if row not in rows:
                    raise ValueError(f"--{axis} {row}: no such row; choose from {', '.join(rows)}")
                for name, (values, why) in getattr(rows[row][0], "needs", {}).items():
                    if getattr(self, name) not in values:
                        raise ValueError(f"--{axis} {row} with --{name} {getattr(self, name)}: {why}")
            known |= {knob for _, knobs in rows.values() for knob in knobs}
            used |= {knob for row in named for knob in rows[row][1]}
        for knob in sorted(known - used - {"n_head", "rope", "layer"}):
            if getattr(self, knob) != Config.__dataclass_fields__[knob].default:
                raise ValueError(f"--{knob} has no effect here, nothing in use reads it: drop it")
        for why, setting in CLASHES.items():
            clash = all(getattr(self, name) in values for name, values in setting.items())
            if clash and setting.keys() & known <= used:
                raise ValueError(f"{' with '.join(f'--{name} {getattr(self, name)}' for name in setting)}: {why}")
        if self.model not in MODELS:
            raise ValueError(f"--model {self.model}: no such size; choose from {', '.join(MODELS)}")
        for name, size in zip(("n_layer", "n_head", "n_embd"), MODELS[self.model]):
            object.__setattr__(self, name, getattr(self, name) or size)              # the one place that writes a field
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type in (int, float) and not LEAST.get(f.name, 0) <= value < BELOW.get(f.name, math.inf):
                raise ValueError(f"--{f.name} {value} is out of range")
        if self.n_embd % self.n_head or self.n_head % (self.n_kv_head or 1):
            raise ValueError(f"{self.n_embd} channels, {self.n_head} heads, {self.n_kv_head or self.n_head} "
                             "key/value heads: each must be a multiple of the next")
        if self.ramps[0] + self.ramps[1] * ("warmdown_iters" in used) > self.num_iterations:
            raise ValueError(f"--num_iterations {self.num_iterations} is less than warm-up and warm-down: {self.ramps}")

    @property
    def rope(self):
        return self.pos == "rope"

    @property
    def mixers(self):                                       # one row name a layer
        names = self.mixer.split(",")
        return [names[i % len(names)] for i in range(self.n_layer)]

    @property
    def ramps(self):                                        # steps of warm-up and of warm-down
        return tuple(int(self.num_iterations * share) if steps < 0 else steps
                     for steps, share in ((self.warmup_iters, 0.02), (self.warmdown_iters, 0.6)))

    @property
    def tokens_per_step(self):
        return self.batch_size * self.grad_accumulation_steps * self.sequence_length


CLASHES = {                                                 # {why: settings that contradict one another}
    "LNS is the scale of the branches: drop one": dict(norm=("lns",), branch_scale=(True,)),
    "its schedule takes the logarithm": dict(optim=("ademamix",), adam_beta1=(0.0,)),
    "there are no low-rank products to keep: add --linear cola": dict(linear=("dense",), recompute=("cola",)),
    "this norm undoes what GPAS does: drop one": dict(norm=("hybrid", "hybrid_star", "pre_post"), residual=("gpas",)),
    "RMSNorm takes the scale away: add --no-embed_norm": dict(embed_scale=(True,), embed_norm=(True,)),
}
# The smallest value a number may have, else 0; and what it stays below, else infinity.
LEAST = dict.fromkeys(("warmup_iters", "warmdown_iters", "document_token"), -1) | dict.fromkeys((
    "sequence_length", "batch_size", "grad_accumulation_steps", "num_iterations", "val_tokens", "val_batch_size",
    "train_loss_every"), 1) | {"afno_poles": 2, "mlp_ratio": 0.25, "logit_scale": 1e-6,
                                               "ademamix_beta3": 1e-6, "soap_frequency": 1, "gdn_chunk": 1}
BELOW = {"adam_beta1": 1, "adam_beta2": 1, "muon_momentum": 1, "ademamix_beta3": 1, "soap_beta": 1, "dropout": 1,
         "seed": 2**63} | dict.fromkeys(
             ("lr_start", "lr_end", "afno_hard_thresholding_fraction"), 1 + 1e-9)             # these may be 1
SYNONYMS = {"fan_ratio": ("--p",)}


class Parser(argparse.ArgumentParser):
    def error(self, message):                               # one line; argparse would print all flags first
        raise SystemExit(f"{self.prog}: error: {message} (--help lists the flags)")


def parse(argv=None):
    """Command line -> Config. A wrong flag, value or combination is one line on stderr and exit code 1."""
    parser = Parser(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                    description="Train a GPT-2-class model with the mixer you choose. Flags are the fields of Config.")
    notes = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(Config), re.MULTILINE))
    for f in fields(Config):                                # a field's comment is its help text
        kind = dict(action=argparse.BooleanOptionalAction) if f.type in (bool, bool | None) else dict(type=f.type)
        parser.add_argument("--" + f.name, *SYNONYMS.get(f.name, ()), default=f.default,
                            help=notes.get(f.name, " ").replace("%", "%%"), **kind)
    try:
        return Config(**vars(parser.parse_args(argv)))
    except ValueError as e:
        parser.error(str(e))


# ----------------------------------------------------------------------------------------------------------------------
# Model

class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x), in the ways that NORMS and RESIDUALS offer. Parts are pure maps."""
    def __init__(self, cfg, layer):
        super().__init__()
        self.mixer = build("mixer", cfg.mixers[layer], cfg, cfg.n_embd, cfg.sequence_length, layer=layer)
        self.mlp = build("mlp", cfg.mlp, cfg, cfg.n_embd)
        self.norm, self.residual = build("norm", cfg.norm, cfg, cfg.n_embd, layer), build(
            "residual", cfg.residual, cfg, cfg.n_embd)
        self.dropout, self.scale = nn.Dropout(cfg.dropout), 1 / math.sqrt(2 * cfg.n_layer) if cfg.branch_scale else 1.0

    def around(self, x, mixer):                             # mixer(h) -> (y, state)
        x, h = self.norm.mixer(x)
        y, state = mixer(h)
        x, h = self.norm.mlp(self.residual(x, self.dropout(self.scale * y), 0))
        return self.residual(x, self.dropout(self.mlp(h)), 1), state

    def forward(self, x, v1=None, *docs):                   # docs: where each token's document starts, if masked
        return self.around(x, lambda h: (self.mixer(h, v1, *docs), None))[0]

    def step(self, x, state, v1=None, *docs):
        return self.around(x, lambda h: self.mixer.step(h, state, v1, *docs))

    def value(self, x):
        return self.mixer.value(self.norm.mixer(x)[1])


class GPT(nn.Module):
    """idx (B, T) int64 -> logits (B, T, V); with targets (B, T), of which -1 is none -> mean cross-entropy, nats."""
    def __init__(self, cfg):
        super().__init__()
        if not cfg.vocab_size:
            raise ValueError("GPT needs a vocab_size; main() reads it from the shards")
        self.cfg, L, C = cfg, cfg.n_layer, cfg.n_embd
        rows = -cfg.vocab_size % 128 * cfg.pad_vocab + cfg.vocab_size
        self.wte, self.scale = nn.Embedding(rows, C), math.sqrt(C) if cfg.embed_scale else 1.0
        self.positions = build("pos", cfg.pos, cfg, C, cfg.sequence_length)
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(L))
        self.run = RECOMPUTE[cfg.recompute][0]
        self.head = nn.Linear(C, rows, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.wte.weight
        self.head_gain = LogitGain(rows, C) if cfg.logit_gain else nn.Identity()
        self.v_lambda = nn.Parameter(torch.ones(L)) if cfg.value_residual and L > 1 else None  # arXiv 2410.17897
        self.x0_lambda = nn.Parameter(torch.tensor([[1.0, 0.0]] * L)) if cfg.x0_shortcut else None
        self.skip_lambda = nn.Parameter(torch.ones(L // 2)) if cfg.unet_skips and L > 1 else None
        widths = {block.mixer.v.out_features if hasattr(block.mixer, "v") else 0 for block in self.blocks}
        if cfg.value_residual and (0 in widths or len(widths) > 1):
            raise ValueError("--value_residual needs values of one width in all layers: leave out --n_kv_head")
        self.apart = BATCHES[cfg.batches][0].apart
        if self.apart and cfg.document_token < 0:
            raise ValueError("GPT needs a document_token to keep documents apart; main() takes the vocabulary's")
        for name, block in zip(cfg.mixers, self.blocks):
            if self.apart and not getattr(block.mixer, "keeps_documents_apart", False):
                raise ValueError(f"--batches {cfg.batches}: {name} as set here cannot keep documents apart, attention "
                                 "without --short_conv can: change --mixer, or take --batches padded")
        init_weights(self)

    def trunk(self, idx, at, run):
        """(B, T) -> (B, T, C), embedding to final norm; run(i, x, v1) applies block i, to a sequence or to one step."""
        x = self.positions(self.scale * self.wte(idx), at)
        x = x0 = norm(x) if self.cfg.embed_norm else x
        v1 = self.blocks[0].value(x) if self.v_lambda is not None else None
        L, skips = len(self.blocks), []
        for i in range(L):
            if self.skip_lambda is not None and i >= L - L // 2:
                x = x + self.skip_lambda[i - (L - L // 2)] * skips.pop()
            if self.x0_lambda is not None:
                x = self.x0_lambda[i, 0] * x + self.x0_lambda[i, 1] * x0
            x = run(i, x, None if v1 is None or i == 0 else self.v_lambda[i] * v1)
            if self.skip_lambda is not None and i < L // 2:
                skips.append(x)
        return self.cfg.logit_scale * norm(x)

    def logits(self, h):
        z = nn.functional.linear(h, self.head_gain(self.head.weight))
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return softcap(z, self.cfg.logit_softcap)[..., :self.cfg.vocab_size]

    def forward(self, idx, targets=None):
        at, docs = slice(idx.size(1)), ()
        if self.apart:
            t = torch.arange(idx.size(1), device=idx.device)
            docs = torch.where(idx == self.cfg.document_token, t, 0).cummax(1).values,
            at = t - docs[0]
        h = self.trunk(idx, at, lambda i, x, v1: self.run(self.blocks[i], x, v1, *docs))
        if targets is None:
            return self.logits(h)
        return linear_cross_entropy(h.flatten(0, 1), self.head_gain(self.head.weight), targets.flatten(),
                                    self.cfg.logit_softcap, self.cfg.vocab_size)

    def init_state(self, B):
        return [block.mixer.init_state(B) for block in self.blocks], 0, self.head.weight.new_zeros(B, dtype=torch.long)

    def step(self, idx, state):
        """One token, idx (B,) -> logits (B, V): the same numbers as forward's column t, at the cost of one column."""
        states, t, begin = state
        begin = torch.where(idx == self.cfg.document_token, t, begin) if self.apart else begin
        states, docs = list(states), (begin,) if self.apart else ()

        def run(i, x, v1):
            x, states[i] = self.blocks[i].step(x[:, 0], states[i], v1 if v1 is None else v1[:, 0], *docs)
            return x[:, None]
        return self.logits(self.trunk(idx[:, None], t - begin[:, None], run))[:, 0], (states, t + 1, begin)


def roles(model):
    """{parameter: role}: embed, head, proj, matrix, vector, gate or kernel. Exactly one role a parameter.

    A module may declare `role` for its own parameters (a kernel generator must not meet Muon); elsewhere two dimensions
    or more are (a stack of) matrices. Raises TypeError where that rule would put one parameter under two roles.
    """
    table = {}
    for name, module in model.named_modules():
        role = getattr(module, "role", None)
        if module is model.head:
            role = "embed" if model.cfg.tie_embeddings else "head"
        elif isinstance(module, nn.Embedding):
            role = "embed"
        for p in module.parameters(recurse=False):
            shape = "vector" if p.ndim < 2 or module is model else "proj" if name.endswith(".proj") else "matrix"
            own = role or shape
            if table.setdefault(p, own) != own:
                raise TypeError(f"{name}: a parameter is both {table[p]} and {own}")
    return table


@torch.no_grad()
def init_weights(model):
    """The one initialiser of embeddings, head and projections; every other parameter is initialised by its module."""
    cfg = model.cfg
    def uniform(p):                                         # torch's default for nn.Linear
        nn.init.uniform_(p, -p.size(-1) ** -0.5, p.size(-1) ** -0.5)
    for p, role in roles(model).items():
        if role == "embed":
            uniform(p) if cfg.tie_embeddings else nn.init.normal_(p)
        elif role == "head" or role == "proj":
            nn.init.zeros_(p) if cfg.zero_init else uniform(p)
    model.blocks[0].norm.constrain(roles(model))


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers and schedule

def build_optimizers(cfg, model):
    optimizers = OPTIMS[cfg.optim][0](cfg, roles(model))
    owned = [p for opt in optimizers for group in opt.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) and set(owned) == set(model.parameters()), "a parameter without one optimizer"
    for opt in optimizers:
        for group in opt.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def schedule(optimizers, step, cfg):
    """Set learning rates: linear warm-up from lr_start, then a row of SCHEDULES; and Muon's momentum warm-up."""
    warmup = cfg.lr_start + (1 - cfg.lr_start) * (step + 1) / max(1, cfg.ramps[0])
    for group in (group for opt in optimizers for group in opt.param_groups):
        group["lr"] = group["peak_lr"] * min(warmup, SCHEDULES[cfg.schedule][0](step, cfg))
        if "momentum" in group:
            warm = step / cfg.muon_momentum_warmup if step < cfg.muon_momentum_warmup else 1.0
            low = min(0.85, cfg.muon_momentum)
            group["momentum"] = low + warm * (cfg.muon_momentum - low)


# ----------------------------------------------------------------------------------------------------------------------
# The axes: {row: (class or function, the Config fields it reads)}. A field that no row in use reads must not be set.
# A knob that is itself an axis (linear, head_norm) arrives as a factory of the row that was chosen.

ATTENTION = ("head_norm", "n_head", "n_kv_head", "rope", "short_conv", "window", "linear")
FOURIER = ("fan_ratio", "fan_trig")
MIXERS = {
    "attn": (CausalSelfAttention, ATTENTION),
    "afno": (AFNO, ("afno_num_blocks", "afno_sparsity_threshold", "afno_hard_thresholding_fraction",
                    "afno_hidden_size_factor", "afno_poles", "afno_group_size", "afno_backend", "linear")),
    "fan": (FAN, ATTENTION + FOURIER), "fan_tall": (TallFAN, ATTENTION + FOURIER),
    "diff": (DiffAttention, (*ATTENTION, "layer")), "diff_v2": (DiffAttentionV2, ATTENTION),
    "ngpt": (NGPTAttention, ATTENTION[1:]),                 # its head norm is its own
    "fftnet": (FFTNet, ("n_head", "fftnet_filter", "fftnet_modes", "fftnet_hidden", "linear")),
    "gdn": (GatedDeltaNet, ("n_head", "gdn_k_heads", "gdn_head_dim", "gdn_expand_v", "gdn_chunk", "gdn_neg_eigval",
                            "linear")),
}
HEAD_NORMS = {"none": (NoHeadNorm, ()), "qk": (QKNorm, ()), "qkv": (QKVNorm, ())}
LINEARS = {"dense": (Linear, ()), "cola": (CoLA, ("cola_rank",))}
HIDDEN = ("mlp_ratio", "linear")
MLPS = {"gelu": (GELU, HIDDEN), "relu2": (ReLU2, HIDDEN), "swiglu": (SwiGLU, HIDDEN), "polynorm": (PolyNormMLP, HIDDEN),
        "polynorm_gated": (GatedPolyNorm, HIDDEN), "ngpt": (NGPTMLP, HIDDEN), "fan": (FANMLP, HIDDEN + FOURIER)}
NORMS = {"pre": (PreNorm, ()), "lns": (LayerNormScaling, ()), "hybrid": (HybridNorm, ()),
         "hybrid_star": (hybrid_star, ()), "pre_post": (PrePostNorm, ()), "ngpt": (SphereNorm, ())}
RESIDUALS = {"add": (Add, ()), "gated": (GatedResidual, ()), "gpas": (GPAS, ("gpas_clip",)),
             "ngpt": (SphereResidual, ())}
POSITIONS = {"rope": (NoPositions, ()), "none": (NoPositions, ()), "learned": (LearnedPositions, ()),
             "sinusoidal": (SinusoidalPositions, ())}
BATCHES = {"windows": (Windows, ()), "packed": (Packed, ("document_token",)), "padded": (Padded, ("document_token",))}
RECOMPUTE = {"none": (keep_all, ()), "block": (recompute_block, ()), "cola": (recompute_high_rank, ())}
SCHEDULES = {"trapezoid": (trapezoid, ("warmdown_iters",)), "cosine": (cosine, ())}
OPTIMS = {"adamw": (build_adamw, ()),
          "muon": (build_muon, ("muon_learning_rate", "muon_momentum", "muon_momentum_warmup")),
          "ademamix": (build_ademamix, ("ademamix_alpha", "ademamix_beta3", "ademamix_warmup")),
          "soap": (build_soap, ("soap_beta", "soap_frequency"))}
AXES = {"mixer": MIXERS, "mlp": MLPS, "norm": NORMS, "residual": RESIDUALS, "linear": LINEARS, "head_norm": HEAD_NORMS,
        "pos": POSITIONS, "recompute": RECOMPUTE, "batches": BATCHES, "optim": OPTIMS, "schedule": SCHEDULES}


def build(axis, row, cfg, *sizes, layer=0, **more):
    """The module a row names, knobs from cfg, each under its field's name without the row's; `layer` is the block's."""
    cls, knobs = AXES[axis][row]
    values = [partial(build, knob, getattr(cfg, knob), cfg) if knob in AXES else
              layer if knob == "layer" else getattr(cfg, knob) for knob in knobs]
    names = [knob.removeprefix(row.split("_")[0] + "_") for knob in knobs]
    return cls(*sizes, **dict(zip(names, values)), **more)


# ----------------------------------------------------------------------------------------------------------------------
# Train

@torch.no_grad()
def evaluate(forward, windows, n, device, rank, world):
    """Mean loss of the first n windows, nats per token, shared by all ranks; fp32, as the public baseline validates."""
    B, total = windows.cfg.val_batch_size, torch.zeros((), dtype=torch.float64)
    for i in range(rank * B, n, world * B):
        rows = torch.from_numpy(windows.read(range(i, min(i + B, n)))).to(device)
        x, y = rows[:, :-1].clamp(min=0), rows[:, 1:]
        total += forward(x, y).cpu().double() * (y >= 0).sum().cpu()
    if world > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return total.item() / windows.targets(n)


def new_model(cfg, device):
    """GPT on a device: weights drawn on the CPU, so that a seed means the same everywhere (on meta: no weights)."""
    try:
        with torch.device("meta" if device.type == "meta" else "cpu"):
            return GPT(cfg).to(device)
    except ValueError as e:                                 # a size that a mixer refuses
        raise SystemExit(str(e)) from None


def average(model, loss, world):
    """All-reduce gradients and loss at once: each process weighs its own by its share of the step's tokens."""
    grads = [p.grad for p in model.parameters()] + [loss]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, mean in zip(grads, (flat / world).split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


def main(cfg):
    """Train as cfg says and return the final validation loss in nats per token.

    Raises SystemExit with one line for anything the user can mend: missing or damaged shards, impossible sizes.
    """
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1).items())
    device = pick_device(cfg.device, local_rank)
    shards, vocab = open_shards(cfg.input_bin)
    val_shards, val_vocab = open_shards(cfg.input_val_bin)
    cfg = replace(cfg, vocab_size=cfg.vocab_size or vocab)
    if max(vocab, val_vocab) > cfg.vocab_size:
        raise SystemExit(f"vocabulary of {cfg.vocab_size}, but training shards have {vocab}, validation {val_vocab}")
    make, knobs = BATCHES[cfg.batches]
    cfg = replace(cfg, document_token=document_token(cfg, shards, vocab)) if knobs else cfg
    windows, val_windows = make(shards, cfg, rank, world), make(val_shards, cfg, shuffle=False)
    val_n = val_windows.first(cfg.val_tokens)
    if cfg.estimate:                                        # after every check of flags and data, before any weights
        model = new_model(cfg, torch.device("meta"))
        return print(report(cfg, model, roles(model), device, windows if vocab == cfg.vocab_size else None))

    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(cfg.seed)
    model = new_model(cfg, device)
    torch.manual_seed(cfg.seed + rank)                      # dropout is drawn apart in every process
    table, optimizers = roles(model), build_optimizers(cfg, model)
    n_params, peak = sum(p.numel() for p in model.parameters()), device_peak_flops(device)
    flops = flops_per_token(table, model.blocks, cfg.sequence_length)
    log = Log(cfg, device, world, shards | val_shards) if rank == 0 else None
    say = log or (lambda line: None)
    say(f"{n_params:,} parameters, {cfg.mixer}, {device_name(device)} x {world}, {cfg.num_iterations:,} steps of "
        f"{windows.per_step:,} tokens, validated on {val_windows.targets(val_n):,} tokens")

    autocast = (lambda: torch.autocast("cuda", torch.bfloat16)) if device.type == "cuda" else nullcontext
    compiled = cfg.compile if cfg.compile is not None else device.type == "cuda"
    if hasattr(torch._functorch.config, "backward_pass_autocast"):       # else the backward of an fp32 island that is
        torch._functorch.config.backward_pass_autocast = "off"           # compiled under autocast runs in bf16
    forward, stream, clock = torch.compile(model) if compiled else model, windows.stream(device), Clock(device)
    if compiled:                                            # compile outside the clock, without a step
        warm, seen = windows.stream(device), set()
        for x, y, _ in (batch for _ in range(8) for batch in next(warm)[0]):
            if x.shape not in seen and len(seen) < 2:       # of documents: a second shape makes a graph for all
                with autocast():
                    forward(x, y).backward()
            seen.add(x.shape)
        warm.close()
        model.zero_grad(set_to_none=True)
    compile_time, clock, reached, tokens = clock.stop(), Clock(device), None, 0

    for step in range(cfg.num_iterations + 1):
        last = step == cfg.num_iterations
        if last or cfg.val_loss_every and step % cfg.val_loss_every == 0:
            seconds = clock.stop()
            model.eval()
            val_loss = evaluate(forward, val_windows, val_n, device, rank, world)
            model.train(not last)
            say(f"step:{step}/{cfg.num_iterations} val_loss:{val_loss:.4f} train_time:{1e3 * seconds:.0f}ms "
                f"step_avg:{1e3 * seconds / max(1, step):.2f}ms")
            reached = seconds if reached is None and val_loss <= cfg.target_val_loss else reached
            clock.start()
        if log and (last or cfg.save_every and step and step % cfg.save_every == 0):
            save(log.dir / "model.pt", model, cfg, step)
        if last:
            break

        schedule(optimizers, step, cfg)
        (batches, predictions), train_loss = next(stream), torch.zeros((), device=device)
        tokens += predictions
        for x, y, share in batches:
            with autocast():
                loss = share * forward(x, y)
            loss.backward()
            train_loss += loss.detach()
        if world > 1:
            average(model, train_loss, world)
        clip_gradients(table, cfg)
        for opt in optimizers:
            opt.step()
        model.blocks[0].norm.constrain(table)
        model.zero_grad(set_to_none=True)

        line = (step + 1) % cfg.train_loss_every == 0
        if line or log and log.tty and time.perf_counter() - log.shown > 1:
            seconds, train_loss = clock.stop(), float(train_loss)
            clock.start()
            if line and not math.isfinite(train_loss):
                raise SystemExit(f"step {step + 1}: the training loss is {train_loss}: lower the learning rates")
            rate = tokens / seconds
            text = (f"step:{step + 1}/{cfg.num_iterations} train_loss:{train_loss:.4f} "
                    f"train_time:{1e3 * seconds:.0f}ms step_avg:{1e3 * seconds / (step + 1):.2f}ms tok/s:{rate:.0f}"
                    + (f" mfu:{rate * flops / peak / world:.3f}" if peak else ""))
            if line:
                say(text)
            if log and log.tty:
                log.progress(f"{text} eta:{duration(seconds / (step + 1) * (cfg.num_iterations - step - 1))}")

    stream.close()
    if len(val_windows) >= 10 * val_n:                      # less noise, and comparable with modded-nanogpt's figures
        say(f"val_loss on {val_windows.targets(10 * val_n):,} tokens:"
            f"{evaluate(forward, val_windows, 10 * val_n, device, rank, world):.4f}")
    target = f"time_to_{cfg.target_val_loss}:{'never' if reached is None else f'{reached:.1f}s'} "
    say(f"final val_loss:{val_loss:.4f} params:{n_params} tokens:{tokens} "
        f"train_time:{clock.total:.1f}s with_compile:{clock.total + compile_time:.1f}s "
        f"{target if cfg.target_val_loss else ''}peak_memory:{peak_memory(device)}MiB")
    if log:
        print(f"log and checkpoint: {log.dir}")
    if world > 1:
        dist.destroy_process_group()
    return val_loss


if __name__ == "__main__":
    main(parse())
