"""spectral-nanogpt: train GPT-2 on one GPU, with or without attention.

This file is the trainer: Config, model, schedules, the axes, the loop and its step. A sequence
mixer is a sibling file and a row of MIXERS; parts.py holds what else a block is made of, kernels.py
the hand-written passes and Muon. A step enters no other file, unless convolutions meet packed
batches (support/masked.py): support/ has what is done before, beside or behind the steps.
Lineage: karpathy/llm.c -> KellerJordan/modded-nanogpt -> BottleCapAI/NoCap-Test (one GPU).

    python train_gpt2.py                                  # the embedded run: any machine, minutes
    python train_gpt2.py --mixer afno,afno,afno,attn --estimate     # what would it cost? then exits
    torchrun --standalone --nproc_per_node=1 train_gpt2.py --model d12 ...  # the race: run_afno.sh
    python -m pytest -q test_causality.py                 # does anything see the future?

To experiment, edit Config and the dicts under "The axes", or write a sibling file and add its row.

Letters: B batch, T time, C channels, H heads, D head width, V vocabulary, L layers. Losses are in
nats per token.
"""
import math
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Until main() listens Ctrl-C ends it at once: no traceback of what torch was importing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from afno import AFNO
from attention import CausalSelfAttention, GatedAttention
from deltanet import GatedDeltaNet
from diff import DiffAttention, DiffAttentionV2
from fan import FAN, FANMLP, TRIG
from fftnet import FFTNet, FILTERS
from kernels import BACKENDS, linear_cross_entropy, product_dtype, softcap
from ngpt import NGPTMLP, LogitGain, NGPTAttention, SphereNorm, SphereResidual
from parts import (GELU, GPAS, Add, CoLA, GatedPolyNorm, GatedResidual, HybridNorm,
                   LayerNormScaling, LearnedPositions, Linear, NoConv, NoHeadNorm, NoPositions,
                   PolyNormMLP, PreNorm, PrePostNorm, QKNorm, QKVNorm, ReLU2, ShortConv,
                   SinusoidalPositions, SwiGLU, check_parts, hybrid_star, keep_all, norm,
                   recompute_block, recompute_high_rank, scaled)
from support import checkpoint, machine, optim
from support.batches import Packed, Windows, open_batches, prepare
from support.compile import compiled, compiles
from support.decode import BlockDecoding, Decoding
from support.documents import Padded, fill
from support.estimate import estimate, utilisation
from support.exported import start_from
from support.flags import check_settings, check_words, listed, make_parser, read_flags, readers
from support.log import Log, NoLog, opening, summary
from support.metrics import hit_rate, per_byte, results
from support.processes import (Buckets, join_processes, leave_processes, process_numbers, restarted,
                               sum_over_processes)
from support.shards import refuse_changes, tokenizer_of
from support.signals import Signals
from support.trackers import TRACKERS

ROOT = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------------------
# Config: every flag, in one place. A default is written here and nowhere else; the race's values
# are in run_*.sh. The comment behind a field is its help text; a comment line up to its first full
# stop is the heading of the flags below it.

MODELS = {                                           # layers, heads, channels
    "tiny": (4, 4, 128),
    "nanoformer": (8, 8, 256),
    "d12": (12, 12, 768),
    "d24": (24, 16, 1024),
    "d36": (36, 20, 1280),
    "d48": (48, 25, 1600),
}


@dataclass(frozen=True)
class Config:
    # Data
    data: str = "data/tinyshakespeare"               # folder: *train.bin, *val.bin, numbered or not
    input_bin: str = ""                              # instead: training shards; glob or folder
    input_val_bin: str = ""                          # and validation shards, likewise
    output_dir: str = "logs"                         # one folder a run appears below it
    run_name: str = ""                               # that folder's name; empty: date, mixer, seed
    sequence_length: int = 256                       # T, tokens a sequence
    shuffle: bool = True                             # windows in random order; FineWeb is shuffled
    batches: str = "windows"                         # what becomes of documents
    document_token: int = -1                         # starts a document; -1: the vocabulary's own
    # Model
    model: str = "tiny"                              # sizes by name; the next three override
    n_layer: int = 0                                 # L, layers; 0: the model's
    n_head: int = 0                                  # H, heads; 0: the model's
    n_embd: int = 0                                  # C, channels; 0: the model's
    vocab_size: int = 0                              # V, vocabulary; 0: read from the shards
    mixer: str = "afno"                              # a list, a,b,c, tiles down the layers
    mlp: str = "relu2"                               # the other branch of a block
    mlp_ratio: float = 4.0                           # hidden width / C
    norm: str = "pre"                                # around the branches of a block
    residual: str = "add"                            # how a branch joins the stream
    linear: str = "dense"                            # projections inside blocks
    pos: str = "rope"                                # positions; rope acts inside attention
    # Switches. Figures are validation losses of modded-nanogpt's logs, at 124M parameters and about
    # 1.7B FineWeb tokens; each is of one change to the recipe of its day, which is not ours.
    zero_init: bool = True                           # every layer starts as the identity
    tie_embeddings: bool = False                     # untied with embed_norm: 10% fewer tokens
    pad_vocab: bool = True                           # to a multiple of 128, for an aligned GEMM
    embed_norm: bool = True                          # RMSNorm after the embedding
    embed_scale: bool = False                        # embedding times sqrt(C), before positions
    logit_softcap: float = 15.0                      # c tanh(z / c), 0 is off: -0.005, at 30 there
    # There (1 - l) v + l v1 from l = 0.5: -0.012. Here v + l v1 from l = 1.
    value_residual: bool = False                     # values plus lambda times layer 1's
    x0_shortcut: bool = False                        # learned share of the embedding in all blocks
    # There 7% fewer tokens, together with a doubled learning rate.
    unet_skips: bool = False                         # layer i feeds layer L - 1 - i
    # Marin's mixtures of experts, with one on q, k and v: -0.053 at 512 channels, -0.023 at 1024.
    output_conv: bool = False                        # short convolutions behind both branches
    branch_scale: bool = False                       # mixer branch / sqrt(2 L): the baseline's
    logit_scale: float = 1.0                         # constant factor on the logits
    logit_gain: bool = False                         # nGPT's s_z: a factor a vocabulary entry
    dropout: float = 0.0                             # on both branches of a block, in training
    gpas_clip: float = 0.01                          # norm to which GPAS's gradients are clipped
    cola_rank: int = 0                               # of CoLA; 0: a quarter of the smaller side
    recompute: str = "none"                          # in backward: less memory, more time
    # Attention
    n_kv_head: int = 0                               # key/value heads (grouped); 0: n_head
    head_norm: str = "qk"                            # norms inside the heads
    # 128,128,0,0 is local attention in the lower two layers of four; shorter lists tile.
    window: int | tuple = 0                          # tokens a token sees, itself too; 0: all
    short_conv: bool = False                         # AFNO's short convolution on q, k, v
    # AFNO
    afno_num_blocks: int = 0                         # blocks of the spectral MLP; 0: 8 if they fit
    afno_sparsity_threshold: float = 0.01            # soft-shrinkage of the kernel's spectrum
    afno_hard_thresholding_fraction: float = 1.0     # share of the frequencies kept, from below
    afno_poles: int = 16                             # frequency features a block
    afno_group_size: int = 0                         # channels that share a kernel; 0: 16 or fewer
    afno_taps: int | tuple = 0                       # tokens of its past a kernel sees; 0: all
    afno_backend: str = "auto"                       # how kernel and sequence are convolved
    # FAN
    fan_ratio: float = 0.125                         # share of a layer's outputs for cos, for sin
    fan_trig: str = "both"                           # the periodic functions; both: cos and sin
    # Gated DeltaNet
    gdn_chunk: int = 32                              # tokens that are one matrix product
    # FFTNet
    fftnet_filter: str = "running"                   # what a token's filter acts on
    fftnet_hidden: int = 0                           # width of the MLP of the mean; 0: C / 8
    # Optimization. A step is batch_size * grad_accumulation_steps sequences, however many processes
    # share them.
    optim: str = "muon"                              # for matrices; AdamW takes the rest
    batch_size: int = 8                              # sequences in a micro-batch
    grad_accumulation_steps: int = 1                 # micro-batches in a step
    num_iterations: int = 1000                       # steps
    stages: str = ""                                 # 256x32@500,...: tokens x rows until a step
    schedule: str = "trapezoid"                      # of the learning rates behind warm-up
    warmup_iters: int = -1                           # linear warm-up; -1: 2% of the steps
    warmdown_iters: int = -1                         # linear warm-down; -1: 60% of the steps
    lr_start: float = 0.0                            # where warm-up starts, a share of the peak
    lr_end: float = 0.0                              # where the run ends, a share of the peak
    learning_rate: float = 0.003                     # AdamW
    embed_lr_scale: float = 1.0                      # multiple of learning_rate for the embedding
    head_lr_scale: float = 1.0                       # ... for the head
    vector_lr_scale: float = 1.0                     # ... for gains and short convolutions
    kernel_lr_scale: float = 3.0                     # ... for parameters that generate kernels
    lambda_lr_scale: float = 10.0                    # ... for lambdas of residuals and skips
    weight_decay: float = 0.01                       # decoupled, never on vectors and kernels
    adam_beta1: float = 0.9                          # decay of the mean gradient
    adam_beta2: float = 0.95                         # decay of the mean squared gradient
    adam_eps: float = 1e-8                           # added to its square root
    grad_clip: float = 0.0                           # global norm; 0 is off
    lookahead: float = 0.0                           # EMA-Nesterov's beta, e.g. 0.6; 0: off
    muon_learning_rate: float = 0.02                 # of the matrices inside blocks
    muon_row_beta: float = 0.0                       # NorMuon: decay of rows' mean squares; 0: off
    muon_momentum: float = 0.95                      # behind its warm-up
    muon_momentum_warmup: int = 300                  # steps from 0.85; -0.013 was seen over 500
    ademamix_alpha: float = 5.0                      # weight of the slow momentum
    ademamix_beta3: float = 0.999                    # decay of the slow momentum
    ademamix_warmup: int = 0                         # steps until both are reached; 0: all steps
    soap_beta: float = 0.95                          # decay of SOAP's moments
    soap_frequency: int = 10                         # steps between refreshes of the eigenbasis
    # The run
    minutes: float = 0.0                             # end then, the schedule in time; 0: by steps
    seed: int = 0                                    # of weights, order and dropout
    device: str = "auto"                             # where it runs; auto: the first there is
    dtype: str = "auto"                              # of products; auto: bf16 where CUDA has it
    compile: bool | None = None                      # torch.compile; not said: on CUDA only
    peak_flops: float = 0.0                          # TFLOP/s of bf16, for MFU; 0: if it is known
    val_tokens: int = 1_048_576                      # first tokens of the validation shards
    val_batch_size: int = 16                         # sequences
    val_loss_every: int = 125                        # steps; 0: at the end only
    val_tail_every: int = 0                          # steps, in the last quarter; 0: as elsewhere
    train_loss_every: int = 25                       # steps between train lines in the log
    save_every: int = 250                            # steps between checkpoints; 0: at the end
    keep: int = 1                                    # how many of them; best.pt is kept besides
    init_from: str = ""                              # first weights: a run's, or an export's
    resume: str = ""                                 # go on from auto, a run's folder or checkpoint
    resume_anyway: bool = False                      # though its flags or its data were others
    skip_bad_steps: int = 0                          # steps without finite gradients to pass over
    target_val_loss: float = 0.0                     # report the time it takes to reach this
    log: str = ""                                    # also to tensorboard, wandb or trackio, a list
    estimate: bool = False                           # print parameters, FLOPs, memory, time; exit

    def __post_init__(self):
        check_words(self, CHOICES)
        for name, size in zip(("n_layer", "n_head", "n_embd"), MODELS[self.model]):
            # A field of the frozen Config is written here, and below.
            object.__setattr__(self, name, getattr(self, name) or size)
        for f in fields(self):
            # A list that was read from a log.
            if isinstance(getattr(self, f.name), list):
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))
        check_settings(self, AXES, KNOBS, ALWAYS_ACCEPTED)

    def rows(self, axis: str) -> list[str]:
        """The words of a field: several of mixers, which tile, and of trackers, else one."""
        value = getattr(self, axis)
        if axis == "log" and not value:
            return []
        return value.split(",") if axis in ("mixer", "log") else [value]

    def at(self, name: str, layer: int):
        """A field's value for a layer: lists tile."""
        values = listed(getattr(self, name))
        return values[layer % len(values)]

    def fields_read(self) -> set[str]:
        """The knobs that the rows in use read."""
        knobs = (AXES[axis][row][1] for axis in AXES for row in self.rows(axis))
        return {name for row in knobs for name in row.values()}

    @property
    def rope(self) -> bool:
        return self.pos == "rope"

    @property
    def mask_documents(self) -> bool:
        return BATCHES[self.batches][0].mask_documents

    @property
    def mixers(self) -> list[str]:
        """One row name a layer."""
        names = self.rows("mixer")
        return [names[i % len(names)] for i in range(self.n_layer)]

    @property
    def warmup_steps(self) -> int:
        return int(0.02 * self.num_iterations) if self.warmup_iters < 0 else self.warmup_iters

    @property
    def warmdown_steps(self) -> int:
        return int(0.6 * self.num_iterations) if self.warmdown_iters < 0 else self.warmdown_iters

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.grad_accumulation_steps * self.sequence_length

    @property
    def vocab_rows(self) -> int:
        """Rows of embedding and head: the vocabulary and its padding, which is never predicted."""
        return math.ceil(self.vocab_size / 128) * 128 if self.pad_vocab else self.vocab_size


# A size of every model, although only some mixers read it. parse() refuses it where it is typed.
ALWAYS_ACCEPTED = ("n_head",)
SYNONYMS = {"fan_ratio": ["--p"]}


def parse(argv: list[str] | None = None) -> Config:
    """Command line -> Config. What is wrong with it is one line on stderr and exit code 1."""
    parser = make_parser(Config, CHOICES, KNOBS, SYNONYMS)
    return read_flags(Config, parser, sys.argv[1:] if argv is None else argv, ALWAYS_ACCEPTED)


# --------------------------------------------------------------------------------------------------
# Model

class Block(BlockDecoding, nn.Module):
    """x + mixer(norm x), then x + mlp(norm x), in the ways that NORMS and RESIDUALS offer."""
    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        C = cfg.n_embd
        T = cfg.sequence_length
        self.mixer = build("mixer", cfg.mixers[layer], cfg, C, T, layer=layer)
        self.mlp = build("mlp", cfg.mlp, cfg, C)
        self.norm = build("norm", cfg.norm, cfg, C, layer)
        self.residual = build("residual", cfg.residual, cfg, C)
        conv = ShortConv if cfg.output_conv else NoConv
        self.mixer_conv = conv(C)
        self.mlp_conv = conv(C)
        self.dropout = nn.Dropout(cfg.dropout)
        self.scale = 1 / math.sqrt(2 * cfg.n_layer) if cfg.branch_scale else 1.0

    def forward(self, x: Tensor, v1: Tensor | None = None, views: dict | None = None,
                age: Tensor | None = None) -> Tensor:
        """v1: what is added to the values; views: {window: what attention may see}, None: all of
        the past; age (B, T): tokens since their documents' starts, which convolutions stop at."""
        x, h = self.norm.mixer(x)
        y = self.mixer(h, v1, *self.seen(views, age))
        x, h = self.join(x, self.mixer_conv(y, age=age))
        return self.end(x, self.mlp_conv(self.mlp(h), age=age))

    def seen(self, views, age) -> tuple:
        """What a mixer takes of its past: its view of {window: view}, or the tokens' age."""
        if hasattr(self.mixer, "view"):
            return (views or {}).get(self.mixer.window),
        return () if age is None else (age,)

    def join(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The stream and the mixer branch's output -> the stream, what the MLP reads."""
        return self.norm.mlp(self.residual(x, self.dropout(scaled(y, self.scale)), 0))

    def end(self, x: Tensor, y: Tensor) -> Tensor:
        """The stream and the MLP branch's output -> the stream."""
        return self.residual(x, self.dropout(y), 1)

    def value(self, x: Tensor) -> Tensor:
        """The mixer's values at this input, for the value residual of later layers."""
        return self.mixer.value(self.norm.mixer(x)[1])


class GPT(Decoding, nn.Module):
    """idx (B, T) int64 -> logits (B, T, V); with targets (B, T) -> mean cross-entropy in nats.

    A target of -1 is none. Raises ValueError where cfg's parts do not fit together.
    """
    role = "lambda"

    def __init__(self, cfg: Config):
        super().__init__()
        if not cfg.vocab_size:
            raise ValueError("GPT needs a vocab_size; main() reads it from the shards")
        self.cfg = cfg
        L = cfg.n_layer
        C = cfg.n_embd
        self.wte = nn.Embedding(cfg.vocab_rows, C)
        self.embed_scale = math.sqrt(C) if cfg.embed_scale else 1.0
        self.positions = build("pos", cfg.pos, cfg, C, cfg.sequence_length)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(L))
        self.run = RECOMPUTE[cfg.recompute][0]
        self.head = nn.Linear(C, cfg.vocab_rows, bias=False)
        if cfg.tie_embeddings:
            self.head.weight = self.wte.weight
        self.head_gain = LogitGain(cfg.vocab_rows, C) if cfg.logit_gain else nn.Identity()

        # Learned shares, each a switch of Config's. Value residual: arXiv 2410.17897.
        self.v_lambda = None
        self.x0_lambda = None
        self.skip_lambda = None
        if cfg.value_residual:
            self.v_lambda = nn.Parameter(torch.ones(L))
        if cfg.x0_shortcut:
            self.x0_lambda = nn.Parameter(torch.tensor([[1.0, 0.0]] * L))
        if cfg.unet_skips:
            self.skip_lambda = nn.Parameter(torch.ones(L // 2))

        self.mask_documents = cfg.mask_documents
        check_parts(self)
        init_weights(self)

    def trunk(self, idx: Tensor, at, run) -> Tensor:
        """(B, T) -> (B, T, C), from embedding to final norm; the stream is as narrow as products.

        run(i, x, v1) applies block i: to a sequence in forward, to one token in step.
        """
        x = self.positions(scaled(self.wte(idx), self.embed_scale), at)
        if self.cfg.embed_norm:
            x = norm(x)
        x0 = x = x.to(product_dtype(x))
        v1 = self.blocks[0].value(x) if self.v_lambda is not None else None
        L = len(self.blocks)
        skips = []
        for i in range(L):
            if self.skip_lambda is not None and i >= L - L // 2:
                x = x + self.skip_lambda[i - (L - L // 2)] * skips.pop()
            if self.x0_lambda is not None:
                x = self.x0_lambda[i, 0] * x + self.x0_lambda[i, 1] * x0
            x = run(i, x, self.v_lambda[i] * v1 if v1 is not None and i > 0 else None)
            if self.skip_lambda is not None and i < L // 2:
                skips.append(x)
        return scaled(norm(x), self.cfg.logit_scale)

    def unembed(self, h: Tensor) -> Tensor:
        return F.linear(h, self.head_gain(self.head.weight))

    def logits(self, h: Tensor) -> Tensor:
        """(..., C) -> (..., V), in fp32 or wider."""
        z = self.unembed(h)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return softcap(z, self.cfg.logit_softcap)[..., :self.cfg.vocab_size]

    def hidden(self, idx: Tensor) -> Tensor:
        """(B, T) -> (B, T, C), what the head reads."""
        at, views, begin = self.sight(idx)
        age = None if begin is None else at
        return self.trunk(idx, at, lambda i, x, v1: self.run(self.blocks[i], x, v1, views, age))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        h = self.hidden(idx)
        if targets is None:
            return self.logits(h)
        return linear_cross_entropy(h.flatten(0, 1), self.head_gain(self.head.weight),
                                    targets.flatten(), self.cfg.logit_softcap, self.cfg.vocab_size)

    def sight(self, idx: Tensor):
        """-> the tokens' positions, {window: what they see}, where their documents start: (B, T)
        or None."""
        T = idx.size(1)
        begin = None
        at = slice(T)
        if self.mask_documents:
            t = torch.arange(T, device=idx.device)
            begin = torch.where(idx == self.cfg.document_token, t, 0).cummax(1).values
            at = t - begin
        views = {}
        mixers = {block.mixer.window: block.mixer for block in self.blocks
                  if hasattr(block.mixer, "view")}
        if self.mask_documents or any(mixers):
            # One for all layers: to make it inside a recomputed block would break the graph.
            views = {window: mixer.view(T, begin, idx.device) for window, mixer in mixers.items()}
        return at, views, begin


def roles(model: GPT) -> dict[nn.Parameter, str]:
    """{parameter: role}: embed, head, proj, matrix, vector, lambda, gate or kernel, exactly one.

    A module may declare `role` for its own parameters (a kernel generator must not meet Muon);
    elsewhere two dimensions or more are a matrix, or a stack of them. Raises TypeError where that
    rule would put one parameter under two roles.
    """
    table = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            if module is model.head:
                role = "embed" if model.cfg.tie_embeddings else "head"
            elif isinstance(module, nn.Embedding):
                role = "embed"
            elif hasattr(module, "role"):
                role = module.role
            elif p.ndim < 2:
                role = "vector"
            elif name.endswith(".proj"):
                role = "proj"
            else:
                role = "matrix"
            if table.setdefault(p, role) != role:
                raise TypeError(f"{name}: a parameter is both {table[p]} and {role}")
    return table


@torch.no_grad()
def init_weights(model: GPT):
    """Initialise embeddings, head and projections; every other parameter's module did its own."""
    cfg = model.cfg
    table = roles(model)
    for p, role in table.items():
        bound = p.size(-1) ** -0.5                       # torch's default for nn.Linear
        if role == "embed" and cfg.tie_embeddings:
            nn.init.uniform_(p, -bound, bound)
        elif role == "embed":
            nn.init.normal_(p)
        elif role in ("head", "proj") and cfg.zero_init:
            nn.init.zeros_(p)
        elif role in ("head", "proj"):
            nn.init.uniform_(p, -bound, bound)
    model.blocks[0].norm.constrain(table)


# --------------------------------------------------------------------------------------------------
# Optimizers and schedules: a builder of support/optim.py turns {parameter: role} into optimizers.

def build_optimizers(cfg: Config, model: GPT):
    builder, _ = OPTIMS[cfg.optim]
    return optim.complete(builder(cfg, roles(model)), model, cfg.lookahead)


def clip_gradients(table, cfg: Config):
    """Clip GPAS's gates to their own norm, and all other gradients to grad_clip."""
    gates = [p for p in table if table[p] == "gate"]
    others = [p for p in table if table[p] != "gate"]
    if gates and cfg.gpas_clip:
        nn.utils.clip_grad_norm_(gates, cfg.gpas_clip)
    if cfg.grad_clip:
        nn.utils.clip_grad_norm_(others, cfg.grad_clip)


def place(step: int, seconds: float, cfg: Config) -> float:
    """Where in its schedule a run is, in steps; with --minutes its training time says it."""
    if not cfg.minutes:
        return step
    return cfg.num_iterations * min(1.0, seconds / (60 * cfg.minutes))


def trapezoid(step: float, cfg: Config) -> float:
    """Share of the peak rate behind warm-up: flat, then linear from 1 to lr_end."""
    left = (cfg.num_iterations - step) / max(1, cfg.warmdown_steps)
    return cfg.lr_end + (1 - cfg.lr_end) * min(1.0, left)


def cosine(step: float, cfg: Config) -> float:
    """Share of the peak rate behind warm-up: half a period of the cosine, from 1 to lr_end."""
    warmup = cfg.warmup_steps
    done = max(0, step - warmup) / max(1, cfg.num_iterations - warmup)
    return cfg.lr_end + (1 - cfg.lr_end) * (1 + math.cos(math.pi * done)) / 2


def rate_share(step: float, cfg: Config) -> float:
    """Of all rates' peaks: linear warm-up, then a row of SCHEDULES."""
    warmup = cfg.lr_start + (1 - cfg.lr_start) * (step + 1) / max(1, cfg.warmup_steps)
    return min(warmup, SCHEDULES[cfg.schedule][0](step, cfg))


def set_schedule(optimizers, step: float, cfg: Config):
    """Set a step's rates, and Muon's momentum."""
    share = rate_share(step, cfg)
    low = min(0.85, cfg.muon_momentum)
    warm = 1.0
    if step < cfg.muon_momentum_warmup:
        warm = step / cfg.muon_momentum_warmup
    momentum = low + warm * (cfg.muon_momentum - low)
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group["peak_lr"] * share
            if "momentum" in group:
                group["momentum"] = momentum


# --------------------------------------------------------------------------------------------------
# The axes: {row: (class or function, {its argument: the field of Config it reads})}. A field that
# no row in use reads must not be set. A field that is itself an axis (linear, head_norm) arrives as
# a factory of the row that was chosen; `layer` is the number of the block.

def same(*names: str) -> dict[str, str]:
    """Arguments that have the names of their fields."""
    return {name: name for name in names}


def own(prefix: str, *names: str) -> dict[str, str]:
    """Arguments whose fields carry the part's name in front."""
    return {name: f"{prefix}_{name}" for name in names}


ATTENTION = same("head_norm", "n_head", "n_kv_head", "rope", "short_conv", "window", "linear")
NGPT_ATTENTION = same("n_head", "n_kv_head", "rope", "short_conv", "window", "linear")
FAN_LAYER = own("fan", "ratio", "trig")
MLP = same("mlp_ratio", "linear")

MIXERS = {
    "attn": (CausalSelfAttention, ATTENTION),
    "attn_gated": (GatedAttention, ATTENTION),
    "afno": (AFNO, own("afno", "num_blocks", "sparsity_threshold", "hard_thresholding_fraction",
                       "poles", "group_size", "taps", "backend") | same("linear")),
    "fan": (FAN, ATTENTION | FAN_LAYER),
    "fftnet": (FFTNet, own("fftnet", "filter", "hidden") | same("n_head", "linear")),
    "gdn": (GatedDeltaNet, own("gdn", "chunk") | same("n_head", "linear")),
    "diff": (DiffAttention, ATTENTION | same("layer")),
    "diff_v2": (DiffAttentionV2, ATTENTION),
    "ngpt": (NGPTAttention, NGPT_ATTENTION),
}
HEAD_NORMS = {
    "none": (NoHeadNorm, {}),
    "qk": (QKNorm, {}),
    "qkv": (QKVNorm, {}),
}
LINEARS = {
    "dense": (Linear, {}),
    "cola": (CoLA, own("cola", "rank")),
}
MLPS = {
    "gelu": (GELU, MLP),
    "relu2": (ReLU2, MLP),
    "swiglu": (SwiGLU, MLP),
    "polynorm": (PolyNormMLP, MLP),
    "polynorm_gated": (GatedPolyNorm, MLP),
    "ngpt": (NGPTMLP, MLP),
    "fan": (FANMLP, MLP | FAN_LAYER),
}
NORMS = {
    "pre": (PreNorm, {}),
    "lns": (LayerNormScaling, {}),
    "hybrid": (HybridNorm, {}),
    "hybrid_star": (hybrid_star, {}),
    "pre_post": (PrePostNorm, {}),
    "ngpt": (SphereNorm, {}),
}
RESIDUALS = {
    "add": (Add, {}),
    "gated": (GatedResidual, {}),
    "gpas": (GPAS, own("gpas", "clip")),
    "ngpt": (SphereResidual, {}),
}
POSITIONS = {
    "rope": (NoPositions, {}),                       # added to nothing here: it acts in attention
    "none": (NoPositions, {}),
    "learned": (LearnedPositions, {}),
    "sinusoidal": (SinusoidalPositions, {}),
}
RECOMPUTE = {
    "none": (keep_all, {}),
    "block": (recompute_block, {}),
    "cola": (recompute_high_rank, {}),
}
BATCHES = {
    "windows": (Windows, {}),
    "packed": (Packed, same("document_token")),
    "padded": (Padded, same("document_token")),
}
SCHEDULES = {
    "trapezoid": (trapezoid, same("warmdown_iters")),
    "cosine": (cosine, {}),
}
OPTIMS = {
    "adamw": (optim.build_adamw, {}),
    "muon": (optim.build_muon,
             own("muon", "learning_rate", "momentum", "momentum_warmup", "row_beta")),
    "ademamix": (optim.build_ademamix, own("ademamix", "alpha", "beta3", "warmup")),
    "soap": (optim.build_soap, own("soap", "beta", "frequency")),
}
# What `build` makes a model of.
PARTS = {
    "mixer": MIXERS, "mlp": MLPS, "norm": NORMS, "residual": RESIDUALS, "linear": LINEARS,
    "head_norm": HEAD_NORMS, "pos": POSITIONS,
}
AXES = PARTS | {
    "recompute": RECOMPUTE, "batches": BATCHES, "optim": OPTIMS, "schedule": SCHEDULES,
}
# {field: the words it may have}
CHOICES = AXES | {
    "model": MODELS, "device": machine.DEVICES, "dtype": ("auto", *machine.PRECISIONS),
    "afno_backend": BACKENDS, "fan_trig": TRIG, "fftnet_filter": FILTERS, "log": TRACKERS,
}
KNOBS = readers(AXES)


def build(axis: str, row: str, cfg: Config, *sizes, layer: int = 0, **more):
    """The module a row names: its sizes, then the arguments that the row takes from cfg."""
    cls, arguments = PARTS[axis][row]
    values = {}
    for argument, field in arguments.items():
        if field == "layer":
            values[argument] = layer
        elif field in PARTS:
            values[argument] = partial(build, field, getattr(cfg, field), cfg)
        else:
            values[argument] = cfg.at(field, layer)
    return cls(*sizes, **values, **more)


# --------------------------------------------------------------------------------------------------
# Bad numbers

class Watch:
    """Looks at each step's loss and gradients on their device, and reads what it saw a step later.

    Gradients that are not finite count as zeros, so that they spoil no weight. More of such steps
    than are allowed end the run.
    """
    def __init__(self, model: GPT, allowed: int, seconds: float, say):
        self.weights = dict(model.named_parameters())
        self.allowed = allowed
        self.say = say
        self.bad = 0
        self.saved = None                            # step of the last checkpoint
        self.told = [0.0, seconds]
        self.unread = None

    def look(self, step: int, loss: Tensor, told: Tensor):
        """told: what the processes tell one another, (2,): a signal's number, training seconds.

        What was read last is in self.told.
        """
        # A weight that nothing reads has none.
        grads = {name: p.grad for name, p in self.weights.items() if p.grad is not None}
        sizes = torch._foreach_norm([*grads.values()])
        seen = torch.cat((loss[None], told, torch.stack(sizes)))
        finite = seen.isfinite().all()
        # On a CPU this reads a number, elsewhere it would wait for the device.
        if seen.device.type != "cpu" or not finite:
            for grad in grads.values():
                grad.masked_fill_(~finite, 0)
        before = self.unread
        copy = torch.empty(seen.shape, pin_memory=seen.is_cuda).copy_(seen, non_blocking=True)
        event = torch.cuda.Event() if seen.is_cuda else None
        if event:
            event.record()
        self.unread = (step, [*grads], copy, event)
        self.judge(before)

    def flush(self):
        """Wait for the last step."""
        self.judge(self.unread)
        self.unread = None

    def gradient_norm(self) -> float:
        """Of the last step, before clipping. Waits for it."""
        _, _, seen, event = self.unread
        if event:
            event.synchronize()
        return float(seen[3:].norm())

    def judge(self, unread):
        if unread is None:
            return
        step, names, seen, event = unread
        if event:
            event.synchronize()
        if not seen.isfinite().all():
            self.bad += 1
            what = checkpoint.bad_numbers(self.weights, names, seen[0], seen[3:])
            if self.bad > self.allowed:
                checkpoint.refuse_numbers(step, what, self.saved)
            self.say(f"note: step {step} had no gradient: {what}; {self.bad} of at most "
                     f"{self.allowed} such steps")
        self.told = seen[1:3].tolist()


# --------------------------------------------------------------------------------------------------
# Train

def shifted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, T + 1) -> inputs, targets, each (B, T): a token predicts the next.

    Targets behind the end of a padded document are -1; as inputs they are any token.
    """
    return rows[:, :-1].clamp(min=0), rows[:, 1:]


def stream(batches, device: torch.device, start: int = 0):
    """Steps, forever: [(inputs, targets, weight of its loss)], targets predicted by all processes.

    A thread prepares the next step while this one runs.
    """
    pin = device.type == "cuda"
    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(prepare, batches, start, pin)
        for step in count(start + 1):
            parts, predictions = ready.result()
            ready = pool.submit(prepare, batches, step, pin)
            micro_batches = []
            for rows, weight in parts:
                micro_batches.append((*shifted(rows.to(device, non_blocking=True)), weight))
            yield micro_batches, predictions


@torch.no_grad()
def evaluate(forward, windows, n: int, device: torch.device, rank: int, world: int) -> float:
    """Mean over the targets of the first n windows, shared by all ranks: of the loss, in nats per
    token, where forward is the model's.

    In fp32, as the public baseline validates.
    """
    refuse_changes(windows)
    B = windows.cfg.val_batch_size
    total = torch.zeros((), dtype=torch.float64)
    for first in range(rank * B, n, world * B):
        rows = fill(windows.read(range(first, min(first + B, n))), B)
        inputs, targets = shifted(torch.from_numpy(rows).to(device))
        total += forward(inputs, targets).cpu().double() * (targets >= 0).sum().cpu()
    return sum_over_processes(total, device, world) / windows.targets(n)


def new_model(cfg: Config, device: torch.device) -> GPT:
    """GPT on a device; on the meta device it has no weights.

    SystemExit with one line for sizes or rates that a part refuses, or that the machine cannot
    hold.
    """
    return machine.new_model(GPT, cfg, device, lambda gpt: optim.check_rates(cfg, roles(gpt)))


def backward(forward, model: GPT, micro_batches, pieces: int, autocast, say, buckets=None):
    """Gradients of a step -> its loss, into how many pieces its micro-batches had to be cut.

    Out of memory, the step is done again by pieces of half as many rows: the same tokens. With
    several processes, whose buckets they are, the last pass sends its gradients off.
    """
    while True:
        try:
            loss = 0
            passes = [(inputs, targets, share * weight) for x, y, weight in micro_batches
                      for inputs, targets, share in cut(x, y, pieces)]
            for i, (inputs, targets, weight) in enumerate(passes, 1):
                with autocast():
                    part = weight * forward(inputs, targets)
                if buckets:
                    buckets.arm(last=i == len(passes))
                part.backward()
                loss = loss + part.detach()
            return loss, pieces
        except (MemoryError, RuntimeError) as e:
            machine.refuse_smaller(e, pieces, rows=max(len(x) for x, _, _ in micro_batches))
        # Outside the except clause, whose traceback holds the tensors of the failed pass.
        pieces *= 2
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"note: out of memory: micro-batches are cut into {pieces} pieces from here on, the "
            "tokens of a step stay")


def cut(x: Tensor, y: Tensor, pieces: int):
    """A micro-batch -> [(inputs, targets, share of its targets)]"""
    if pieces == 1:
        return [(x, y, 1.0)]
    counts = [(part >= 0).sum().item() for part in y.chunk(pieces)]
    shares = [count / max(1, sum(counts)) for count in counts]
    return [piece for piece in zip(x.chunk(pieces), y.chunk(pieces), shares) if piece[2]]


def main(cfg: Config) -> float | None:
    """Train as cfg says and return the final validation loss in nats per token.

    Raises SystemExit with one line for anything the user can mend: missing or damaged shards,
    impossible sizes. With --estimate it prints and returns None. A first SIGINT, SIGTERM, SIGHUP,
    SIGUSR1 or SIGXCPU ends the run behind its step, saved, with exit code 128 + signal.
    """
    with Signals() as signals:
        return train(cfg, signals)


def train(cfg: Config, signals) -> float | None:
    rank, local_rank, world = process_numbers()
    if restarted() and not cfg.resume:
        cfg = replace(cfg, resume="auto")
    device = machine.pick_device(cfg.device, local_rank, only_told=cfg.estimate)
    machine.keep_memory(device)
    precision = machine.pick_precision(cfg.dtype, device)
    autocast = partial(torch.autocast, device.type, precision, enabled=precision != torch.float32)

    # Data, and every check of flags and data before any weights
    cfg, data = open_batches(cfg, BATCHES[cfg.batches], rank, world)
    batches, val_batches, val_n = data[:3]
    if cfg.estimate:
        model = new_model(cfg, torch.device("meta"))
        print(estimate(cfg, model, roles(model), OPTIMS[cfg.optim][0], data, device, precision))
        return None

    # Processes, model, optimizers, log
    join_processes(device, rank, world)
    checksums = checkpoint.by_first(data.checksums, rank)
    state, path = checkpoint.resumed(cfg, data.identity(checksums), rank)
    torch.manual_seed(cfg.seed)
    model = new_model(cfg, device)
    started = start_from(cfg, model) if cfg.init_from and not state else ""
    torch.manual_seed(cfg.seed + rank)               # dropout is drawn apart in every process
    table = roles(model)
    optimizers = build_optimizers(cfg, model)
    mfu = utilisation(cfg, table, model, device, world)
    say = log = NoLog()
    if rank == 0:
        facts = machine.environment(device, world, checksums, precision, compiles(cfg, device))
        say = log = Log(cfg, facts, path.parent if path else None, state["step"] if state else 0)

    for line in opening(cfg, data, model, device, world, started, path):
        say(line)

    # Compilation, outside the clock
    forward = model
    clock = machine.Clock(device)
    pieces = 1                                       # of a micro-batch, where memory asks for it
    if compiles(cfg, device):
        forward, pieces = compiled(model, backward, shifted, *data.shapes(), device, autocast, say)
        torch.manual_seed(cfg.seed + rank)           # as if nothing had been drawn

    # Where the run stands
    start = 0
    at = checkpoint.progress(state, clock.stop())
    buckets = Buckets(model) if world > 1 else None
    watch = Watch(model, cfg.skip_bad_steps, at["seconds"], say)
    if state:
        start = watch.saved = state["step"]
        checkpoint.restore(state, model, optimizers, device, rank, world)
        say(f"goes on from step {start} of {path}" + optim.change_of_rate(state, cfg, SCHEDULES))
        state = None                                 # its memory is given back

    def save(step, best=False):
        """By all processes: one writes."""
        watch.flush()
        random = checkpoint.random_state(device)
        if rank:
            return
        content = dict(
            model=model.state_dict(), config=asdict(cfg), step=step, progress=dict(at),
            tokenizer=tokenizer_of(data.vocab), data=data.identity(checksums), random=random,
            optimizers=[opt.state_dict() for opt in optimizers])
        checkpoint.save(log.dir, content, watch, cfg.keep, best, say)

    signals.listen()
    steps = stream(batches, device, start)
    clock = machine.Clock(device, at["seconds"])
    for step in count(start):
        where = place(step, watch.told[1], cfg)
        last = where >= cfg.num_iterations
        steps_in_all = round(step * cfg.num_iterations / where) if where else cfg.num_iterations

        # Save, then validate, outside the clock
        tail = where >= 0.75 * cfg.num_iterations
        val_every = tail and cfg.val_tail_every or cfg.val_loss_every
        validates = last or val_every and step % val_every == 0
        saves = step > start and (last or cfg.save_every and step % cfg.save_every == 0)
        if validates or saves:
            at["seconds"] = seconds = clock.stop()
            watch.flush()
        if saves:
            save(step)
        if validates:
            model.eval()
            val_loss = evaluate(forward, val_batches, val_n, device, rank, world)
            model.train(not last)
            bits = per_byte(val_loss, data.text_bytes)
            log.validation(step, steps_in_all, at["tokens"], seconds, val_loss, bits)
            checkpoint.check_loss(step, val_loss, watch.saved)
            if at["reached"] is None and val_loss <= cfg.target_val_loss:
                at["reached"] = seconds
            if val_loss < at["best"]:
                at["best"] = val_loss
                if step > start:
                    save(step, best=True)
        if last:
            break
        if validates or saves:
            clock.start()

        # One training step
        set_schedule(optimizers, where, cfg)
        if cfg.lookahead:
            optimizers[-1].look(where / cfg.num_iterations)
        micro_batches, predictions = next(steps)
        train_loss, pieces = backward(forward, model, micro_batches, pieces, autocast, say,
                                      buckets)
        # The clock's time without waiting for the device: at most a step behind.
        seconds = clock.total + perf_counter() - clock.since
        told = torch.tensor([float(signals.caught), seconds], pin_memory=device.type == "cuda")
        told = told.to(device, non_blocking=True)
        if buckets:
            buckets.average([train_loss, told])
        watch.look(step + 1, train_loss, told)
        clip_gradients(table, cfg)
        for opt in optimizers:
            opt.step()
        model.blocks[0].norm.constrain(table)
        for p in table:
            p.grad = None
        at["tokens"] += predictions

        # Stop early
        if watch.told[0] and place(step + 1, watch.told[1], cfg) < cfg.num_iterations:
            at["seconds"] = clock.stop()
            save(step + 1)
            steps.close()
            signals.leave(step + 1, watch.saved, log)

        # Tell
        logged = (step + 1) % cfg.train_loss_every == 0
        progress = log.tty and perf_counter() - log.shown > 1
        if rank == 0 and (logged or progress):
            seconds = clock.stop()
            train_loss = float(train_loss)
            clock.start()
            rate = at["tokens"] / seconds
            if logged:
                log.training(step + 1, steps_in_all, at["tokens"], seconds, train_loss,
                             watch.gradient_norm(), rate_share(where, cfg) * cfg.learning_rate,
                             mfu(rate))
            if log.tty:
                left = seconds / (step + 1) * (steps_in_all - step - 1)
                log.progress(step + 1, steps_in_all, train_loss, rate, left)
    steps.close()

    # Ten times the tokens: less noise, and comparable with modded-nanogpt's figures
    if len(val_batches) >= 10 * val_n:
        loss = evaluate(forward, val_batches, 10 * val_n, device, rank, world)
        say(f"val_loss on {val_batches.targets(10 * val_n):,} tokens:{loss:.4f}")
        checkpoint.check_loss(step, loss, watch.saved)
    say(summary(cfg, val_loss, model, at, clock.total, machine.peak_memory(device)))
    accuracy = evaluate(partial(hit_rate, model), val_batches, val_n, device, rank, world)
    log.close(results(val_loss, accuracy, bits))
    leave_processes(world)
    if rank == 0 and watch.saved != step:
        raise SystemExit(f"the trained weights could not be saved to {log.dir}")
    return val_loss


if __name__ == "__main__":
    main(parse())
