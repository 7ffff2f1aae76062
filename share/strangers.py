"""Whose model the leak lab looks at: how it is found, built and called. Nothing of ours is in it.

A stranger is a class, a factory or a module, in a file or an installed package, or a model of
transformers. It maps (B, T, C) to (B, T, any width), or ids (B, T) to logits (B, T, V). What it
returns may be a tensor, a tuple that begins with it, or one of transformers' outputs.

Letters: B batch, T time, C channels, V vocabulary.
"""
import ast
import copy
import importlib
import importlib.util
import inspect
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.flags import near
from support.machine import first_line

ROOT = Path(__file__).resolve().parent.parent
# Where modules of ours are; an environment may lie below ROOT, too.
OURS = ROOT, ROOT / "share", ROOT / "tests", ROOT / "data"
# What people call C and V, as arguments, attributes or fields of a config.
WIDTHS = ("dim", "d_model", "hidden_size", "n_embd", "embed_dim", "model_dim", "emb_dim",
          "channels", "in_channels", "in_features", "input_size", "hidden_dim", "d", "C")
VOCABS = ("vocab_size", "num_tokens", "n_vocab", "vocab", "n_tokens", "num_embeddings", "V")
# Longer than a block of 128 and a multiple of nothing; then what a stranger may insist on.
LENGTHS = 151, 128, 64, 32, 16, 8
# A forward that takes more seconds is tried with fewer tokens: about fifty follow.
SLOW = 0.4
# {dtype: the rounding that is no leak, relative to the largest output}. Scans in fp32 reach 3e-5 in
# weights drawn anew, on outputs that no change of later inputs moves by a bit.
NOISE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32,
        torch.complex32: torch.float16}


class Trouble(Exception):
    """What is wrong with the stranger or the command, in one line."""


@dataclass
class Origin:
    """Where a stranger comes from; `build` gives a new one at every call."""
    name: str
    build: Callable[[], nn.Module]
    sizes: dict                                      # {argument: its value}, to find C and V
    small: Callable[[], nn.Module] | None = None     # a smaller one, for training; None: build
    trained: bool = False                            # its weights are kept as they are
    ids: bool = False                                # surely a language model


def said(e: BaseException) -> str:
    """An exception in one line, with the line of code that it comes from."""
    frames = [frame for frame in traceback.extract_tb(e.__traceback__)
              if Path(frame.filename).parent not in OURS and not frame.filename.startswith("<")
              and not any(part in frame.filename for part in ("torch/nn/modules", "importlib"))]
    if isinstance(e, SyntaxError):
        return f"SyntaxError: {e.msg} (line {e.lineno})"
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(e).__name__}: {first_line(e)}{place}"


# --------------------------------------------------------------------------------------------------
# Files and packages

def read_kwargs(text: str) -> dict:
    """JSON, or Python's literals. Trouble where it is no dict."""
    for read in json.loads, ast.literal_eval:
        try:
            kwargs = read(text)
        except (ValueError, SyntaxError):
            continue
        if isinstance(kwargs, dict):
            return kwargs
    raise Trouble(f"--kwargs {text}: must be an object as JSON has it, such as '{{\"dim\": 64}}'")


def import_file(path: Path):
    """A Python file as a module. It sees its neighbours before files of ours of the same name."""
    if not path.is_file():
        raise Trouble(f"{path}: no such file")
    for name, module in list(sys.modules.items()):
        where = getattr(module, "__dict__", {})
        folders = where.get("__path__") or [os.path.dirname(where.get("__file__") or "/")]
        if name != "__main__" and any(Path(folder) in OURS for folder in folders):
            del sys.modules[name]
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location("stranger", path.resolve())
    if spec is None:
        raise Trouble(f"{path}: no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["stranger"] = module
    spec.loader.exec_module(module)
    return module


def find(source: str):
    """"FILE.py:NAME", "FILE.py" with one module class in it, or "PACKAGE.MODULE:NAME" -> it."""
    place, _, name = source.partition(":") if ".py:" not in source else source.rpartition(":")
    try:
        with redirect_stdout(sys.stderr):
            if place.endswith(".py"):
                module = import_file(Path(place))
            else:
                sys.path.insert(0, os.getcwd())
                module = importlib.import_module(place)
    except Trouble:
        raise
    except (Exception, SystemExit) as e:
        raise Trouble(f"{place}: cannot be imported: {said(e)}") from None
    classes = [key for key, value in vars(module).items() if isinstance(value, type)
               and issubclass(value, nn.Module) and value.__module__ == module.__name__]
    if not name and len(classes) == 1:
        name = classes[0]
    if not name:
        raise Trouble(f"{place}: say which: {place}:NAME, one of "
                      f"{', '.join(classes) or 'its functions: it has no class of nn.Module'}")
    thing = module
    for part in name.split("."):
        thing = getattr(thing, part, None)
    if thing is None:
        hint = near(name, vars(module)) or f"there are {', '.join(classes) or 'no modules'}"
        raise Trouble(f"{place}: has no {name}: {hint.strip()}")
    if not callable(thing):
        raise Trouble(f"{source}: is a {type(thing).__name__}, no class, function or module")
    return thing


def from_source(source: str, kwargs: dict) -> Origin:
    """Of a class, a factory, or a module that is there already, which is copied."""
    thing = find(source)
    if isinstance(thing, nn.Module):
        if kwargs:
            raise Trouble(f"{source}: is built already: drop --kwargs")
        return Origin(source, lambda: copy.deepcopy(thing), {})

    def build():
        try:
            with redirect_stdout(sys.stderr):
                module = thing(**kwargs)
        except (Exception, SystemExit) as e:
            raise Trouble(f"{source}: cannot be built with {kwargs}: {said(e)}") from None
        if not isinstance(module, nn.Module):
            raise Trouble(f"{source}: gives a {type(module).__name__}, not an nn.Module")
        return module

    try:
        arguments = inspect.signature(thing).parameters.values()
        defaults = {p.name: p.default for p in arguments}
    except (TypeError, ValueError):
        defaults = {}
    return Origin(source, build, defaults | kwargs)


# --------------------------------------------------------------------------------------------------
# transformers

# Fields of its configs, where a config has them: a model that trains in seconds.
SMALL = dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=128, head_dim=16, lru_width=64, num_heads=8,
             state_size=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
             shared_expert_intermediate_size=64, linear_key_head_dim=16, linear_value_head_dim=16,
             linear_num_key_heads=2, linear_num_value_heads=4, max_position_embeddings=512,
             chunk_size=32, mamba_chunk_size=32, mamba_d_state=16,
             pad_token_id=0, bos_token_id=1, eos_token_id=2)


def from_transformers(name: str, kwargs: dict) -> Origin:
    """A folder, a name on the hub, or a kind of model such as "llama".

    Without weights there is no reason for the full size: a small one is drawn. It keeps the
    config's switches. kwargs are further fields of the config.
    """
    try:
        import transformers
    except ImportError:
        raise Trouble("--hf needs transformers: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    folder = Path(name)
    known = transformers.AutoConfig
    try:
        if name in transformers.CONFIG_MAPPING and not folder.exists():
            config = known.for_model(name)
        else:
            config = known.from_pretrained(name)
    except Exception as e:
        raise Trouble(f"--hf {name}: no such kind, folder or model: {first_line(e)}") from None
    families = (transformers.AutoModelForCausalLM, transformers.AutoModelForMaskedLM)
    family = next((f for f in families if type(config) in f._model_mapping), None)
    if family is None:
        raise Trouble(f"--hf {name}: {type(config).__name__} has no language model that reads a "
                      "text from left to right")

    def small():
        switches = {key: value for key, value in config.to_diff_dict().items()
                    if isinstance(value, (bool, str, float)) and hasattr(type(config)(), key)}
        sizes = {key: value for key, value in SMALL.items() if hasattr(config, key)}
        return made(lambda: family.from_config(type(config)(**switches | sizes | kwargs)))

    def made(make):
        try:
            with redirect_stdout(sys.stderr):
                return make()
        except Exception as e:
            raise Trouble(f"--hf {name}: cannot be built: {said(e)}") from None

    weights = [path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind)]
    trained = name not in transformers.CONFIG_MAPPING and (not folder.is_dir() or bool(weights))
    build = small
    if trained:
        def build():
            return made(lambda: family.from_pretrained(name, **kwargs))
    return Origin(name, build, {}, small, trained, ids=True)


# --------------------------------------------------------------------------------------------------
# Inputs that it takes

class Least(TorchDispatchMode):
    """Notes the least precise type of all that is computed from x: it decides what is rounding.

    What does not depend on x, such as a mask or a table of positions, rounds the same every time.
    """
    def __init__(self, x: Tensor):
        super().__init__()
        self.dtype = torch.float64
        # Held, so that no other tensor takes an id.
        self.from_x = {id(x): x}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(id(leaf) in self.from_x for leaf in tree_leaves((args, kwargs))):
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.from_x[id(leaf)] = leaf
                    dtype = REAL.get(leaf.dtype, leaf.dtype)
                    if NOISE.get(dtype, 0) > NOISE[self.dtype]:
                        self.dtype = dtype
        return out


def result(out, x: Tensor) -> Tensor:
    """What a module returns for x -> its (B, T, width), logits or hidden states.

    Trouble where it is something else.
    """
    for field in "logits", "last_hidden_state":
        out = getattr(out, field, out)
    if isinstance(out, dict):
        out = tuple(out.values())
    while isinstance(out, (tuple, list)) and out:
        out = out[0]
    if not isinstance(out, Tensor):
        raise Trouble(f"returns a {type(out).__name__}: it must be a tensor, or begin with one")
    if out.dim() != 3 or out.shape[:2] != x.shape[:2]:
        want = "(B, T, V)" if x.dim() == 2 else "(B, T, width)"
        raise Trouble(f"gives {tuple(out.shape)} for {tuple(x.shape)}: it must give {want}")
    if not out.isfinite().all():
        raise Trouble("gives NaN or Inf for ordinary inputs")
    return torch.view_as_real(out).flatten(2) if out.is_complex() else out


def candidates(module: nn.Module, sizes: dict, dim: int | None, vocab: int | None, ids: bool):
    """[(is it ids?, C or V)], likeliest first."""
    def named(names):
        places = sizes, vars(module), vars(getattr(module, "config", None) or Origin)
        found = [place.get(name) for place in places for name in names]
        return [n for n in found if type(n) is int and 0 < n < 2**24]

    layers = list(module.modules())
    first = [getattr(layer, field, None) for layer in layers
             for field in ("in_features", "in_channels", "input_size", "embed_dim", "num_features")]
    first += [layer.normalized_shape[-1] for layer in layers if isinstance(layer, nn.LayerNorm)]
    tables = [layer.num_embeddings for layer in layers if isinstance(layer, nn.Embedding)]
    widths = named(WIDTHS) + [n for n in first if type(n) is int] + [64]
    floats = [(False, C) for C in ([dim] if dim else dict.fromkeys(widths))]
    tokens = [(True, V) for V in ([vocab] if vocab else dict.fromkeys(named(VOCABS) + tables))]
    return tokens if ids or vocab else floats if dim else floats[:6] + tokens[:4]


class Stranger:
    """A module and the inputs it takes: ids or floats, of this size (V or C) and length T."""
    def __init__(self, origin: Origin, ids: bool, size: int, T: int, dtype, module=None):
        self.origin = origin
        self.module = module or origin.build().eval().to(dtype)
        self.ids, self.size, self.T, self.dtype = ids, size, T, dtype
        # Copied for every call where it keeps a state, so that no call sees another.
        self.copies = False
        # Of its own: every call seeds the global one anew.
        self.generator = torch.Generator().manual_seed(1)

    def inputs(self, B: int, T: int | None = None) -> Tensor:
        """Random ids (B, T), or floats (B, T, C), never the same twice."""
        T = T or self.T
        if self.ids:
            return torch.randint(self.size, (B, T), generator=self.generator)
        x = torch.randn(B, T, self.size, dtype=torch.float64, generator=self.generator)
        return x.to(self.dtype)

    def __call__(self, x: Tensor, **arguments) -> Tensor:
        """-> (B, T, width), as fp64; what it draws is the same in every call."""
        module = copy.deepcopy(self.module) if self.copies else self.module
        torch.manual_seed(0)
        with redirect_stdout(sys.stderr):
            return result(module(x, **arguments), x).double()

    def takes(self, *shape) -> bool:
        """Whether it works on (B, T) of such inputs."""
        try:
            with torch.no_grad():
                self(self.inputs(*shape))
        except Exception:
            return False
        return True


def settle(origin: Origin, dim=None, vocab=None, T=None) -> Stranger:
    """Find the kind of input, its size, a length and the most exact dtype that a stranger takes.

    Trouble with its own words, about the likeliest of each kind, where it takes none.
    """
    module = origin.build()
    tried = candidates(module, origin.sizes, dim, vocab, origin.ids)
    if not tried:
        raise Trouble(f"{origin.name}: how many tokens it knows is not found: --vocab N")
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    for dtype in dict.fromkeys((torch.float64, torch.float32, own)):
        reasons = {}
        for length in [T] if T else LENGTHS:
            for ids, size in tried:
                try:
                    with torch.no_grad():
                        stranger = Stranger(origin, ids, size, length, dtype)
                        stranger(stranger.inputs(2))
                        start = time.monotonic()
                        stranger(stranger.inputs(2))
                    if T or length <= 32 or time.monotonic() - start < SLOW:
                        # A new one: these calls may have left something behind.
                        return Stranger(origin, ids, size, length, dtype)
                except Exception as e:
                    reasons.setdefault(ids, str(e) if isinstance(e, Trouble) else said(e))
    kinds = {False: "floats", True: "ids"}
    why = [f"given {kinds[ids]}: {reason}" for ids, reason in sorted(reasons.items())]
    raise Trouble(f"{origin.name}: {'; '.join(why)}")
