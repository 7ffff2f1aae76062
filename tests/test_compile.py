"""What can be known of torch.compile without a GPU: graph breaks, recompilations, what it sees.

Dynamo's part alone, on a CPU: its graphs are run uncompiled (backend="eager"), whatever the device.
"""
from functools import partial

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.checkpoint import CheckpointPolicy

import kernels
import train_gpt2
from parts import narrow_or_attention
from tests.checks import awake
from tests.runs import RECIPES, recipe
from train_gpt2 import GPT, MIXERS, Config, main, parse

SIZES = ("--n_layer 2 --n_embd 64 --sequence_length 64 --batch_size 4 "
         "--num_iterations 30 --val_loss_every 15 --val_batch_size 4 --val_tokens 640 "
         "--train_loss_every 10 --device cpu --compile").split()
# The document token is a newline.
BATCHES = {
    "windows": [],
    "packed": ["--batches", "packed", "--document_token", "10"],
    "padded": ["--batches", "padded", "--document_token", "10"],
}


# A shorter pattern, for two layers.
GDN = ["--mixer", "gdn,fan"]


@pytest.fixture(autouse=True)
def fresh_dynamo(monkeypatch):
    """Dynamo's own part only, with nothing remembered, and counters at zero."""
    torch._dynamo.reset()
    kernels.compiled_chunk.cache_clear()
    counters.clear()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, **options | dict(backend="eager")))
    # Two widths do for a test.
    monkeypatch.setattr("support.documents.WIDTHS", 2)
    yield
    torch._dynamo.reset()
    kernels.compiled_chunk.cache_clear()


def graphs():
    return counters["stats"]["unique_graphs"]


def cases():
    for name in RECIPES:
        yield name, "windows", GDN if "neollm" in name else []
    yield "run_afno.sh", "padded", []
    yield "run_neollm.sh", "padded", GDN
    yield "run_fftnet.sh", "padded", ["--no-embed_scale"]
    yield "run_nanoformer.sh", "padded", []
    for name in ("run_attn.sh", "run_fan.sh", "run_nanoformer.sh diff", "run_nanoformer.sh ngpt"):
        yield name, "packed", []
    yield "run_afno.sh", "packed", ["--mixer", "afno,attn", "--afno_taps", "16", "--short_conv",
                                    "--output_conv"]
    yield "run_nanoformer.sh", "packed", ["--recompute", "block", "--window", "20"]
    yield "run_fan.sh", "windows", ["--recompute", "cola", "--window", "20,0"]
    yield "run_afno.sh", "windows", ["--stages", "16x16@5,32x8@10"]
    yield "run_afno.sh", "windows", ["--recompute", "block", "--mixer", "afno,attn"]


@pytest.mark.parametrize("name, batches, more", list(cases()), ids=lambda v: "".join(v))
def test_nothing_compiles_inside_the_clock(name, batches, more, tmp_path, monkeypatch):
    """30 steps, three validations: all graphs are there before, and none is broken."""
    if "neollm" in name:
        pytest.importorskip("pytorch_optimizer")
    before = []
    compiled = train_gpt2.compiled

    def counted(*args):
        forward = compiled(*args)
        before.append(graphs())
        return forward

    monkeypatch.setattr(train_gpt2, "compiled", counted)
    main(parse([*recipe(name), *SIZES, *BATCHES[batches], *more, "--output_dir", str(tmp_path)]))
    assert not counters["graph_break"]
    assert before == [graphs()] and graphs() >= 2           # training and validation


def test_a_graph_break_is_told(tmp_path, monkeypatch):
    relu2 = train_gpt2.MLPS["relu2"][0]
    monkeypatch.setattr(relu2, "activation", lambda self, x: F.relu(x) * float(x.max()))
    flags = [*SIZES, "--num_iterations", "1", "--mixer", "attn", "--n_layer", "1"]
    main(parse([*flags, "--output_dir", str(tmp_path)]))
    log = next(tmp_path.glob("*/log.txt")).read_text()
    assert "\nnote: not compiled as a whole: " in log


@pytest.mark.parametrize("knobs", [dict(window=20), dict(batches="packed", document_token=7)], ids=str)
def test_masks_do_not_break_a_recomputed_block(knobs, monkeypatch):
    """As on CUDA, where FlexAttention masks. Forward only, for it has no backward on a CPU."""
    monkeypatch.setattr("attention.FLEX_DEVICES", ("cpu",))
    cfg = Config(mixer="attn", n_layer=2, n_head=2, n_embd=64, vocab_size=50, sequence_length=256,
                 recompute="block", **knobs)
    torch.manual_seed(0)
    model = GPT(cfg)
    idx = torch.randint(50, (2, 256))
    seen = []
    compile = partial(torch._dynamo.optimize, nopython=True)

    def backend(graph, inputs):
        seen.append(str(graph.graph))
        for module in graph.modules():
            if hasattr(module, "graph"):
                seen.append(str(module.graph))
        return graph.forward

    with torch.no_grad():
        dense = model(idx)
        masked = compile(backend)(model)(idx)
    assert any("flex_attention" in text for text in seen)
    assert (masked - dense).abs().max() < 1e-4


def test_what_cola_keeps_of_attention():
    """Both kernels' results are kept; FlexAttention's would be computed twice."""
    for op in (torch.ops.higher_order.flex_attention,
               torch.ops.aten._scaled_dot_product_flash_attention.default):
        assert narrow_or_attention(None, op) == CheckpointPolicy.MUST_SAVE
    assert narrow_or_attention(None, torch.ops.aten.sin.default) == CheckpointPolicy.PREFER_RECOMPUTE


def test_the_compiler_sees_one_operation_however_many_chunks():
    """Inlined, all chunks' logits would live at once, and each number of them be a graph."""
    nodes = []

    def backend(graph, inputs):
        nodes.append(len(graph.graph.nodes))
        return graph.forward

    W = torch.randn(64, 8, requires_grad=True)
    loss = torch._dynamo.optimize(backend, nopython=True, dynamic=False)(kernels.linear_cross_entropy)
    for M in (10, 20, 80):
        h = torch.randn(M, 8, requires_grad=True)
        y = torch.randint(-1, 50, (M,))
        result = loss(h, W, y, 2.0, 50, 10)
        plain = kernels.linear_cross_entropy(h, W, y, 2.0, 50, 10)
        assert torch.allclose(result, plain)
        for ours, theirs in zip(torch.autograd.grad(result, (h, W)),
                                torch.autograd.grad(plain, (h, W))):
            assert torch.allclose(ours, theirs, atol=1e-6)
    # Of three compilations; the graphs of the chunk, which torch.compile makes, are others.
    assert len(nodes) == 3 and len(set(nodes)) == 1


def test_a_chunk_is_one_graph_for_any_number_of_rows():
    """Of 2 to 4096 rows: fewer would be none of a training run's chunks."""
    W = torch.randn(64, 8, requires_grad=True)
    loss = torch.compile(kernels.linear_cross_entropy, fullgraph=True, dynamic=False)
    inner = []
    for M in (25, 25, 32, 48, 99):
        h = torch.randn(M, 8, requires_grad=True)
        before = graphs()
        loss(h, W, torch.randint(50, (M,)), 2.0, 50, 10)
        inner.append(graphs() - before)
    # The whole and the chunk; the chunk again, as compiled() says; then a whole for every new M.
    assert inner[0] == 2 and inner[1] <= 1 and inner[2:] == [1, 1, 1]


PARTS = [
    *({"mixer": row} for row in MIXERS),
    {"mixer": "afno", "afno_backend": "fft"},
    {"mixer": "fftnet", "fftnet_filter": "bank"},
    {"mixer": "attn", "short_conv": True, "mlp": "polynorm_gated", "residual": "gpas", "norm": "lns"},
    {"mixer": "attn", "linear": "cola", "head_norm": "qkv", "norm": "hybrid_star",
     "residual": "gated", "mlp": "swiglu", "recompute": "cola"},
    {"mixer": "attn", "value_residual": True, "x0_shortcut": True, "unet_skips": True,
     "recompute": "block", "mlp": "fan"},
    {"mixer": "afno,attn", "afno_taps": 16, "short_conv": True, "output_conv": True,
     "value_residual": True, "batches": "packed", "document_token": 7},
]


@pytest.mark.parametrize("knobs", PARTS, ids=lambda knobs: "-".join(map(str, knobs.values())))
def test_compiled_gradients_are_the_eager_ones(knobs):
    """Also where a forward by hand returns what it wrote in place: torch 2.11 loses its gradient."""
    torch.manual_seed(0)
    cfg = Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50, sequence_length=72, **knobs)
    model = awake(GPT(cfg))
    idx = torch.randint(50, (2, 73))
    forward = torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)
    results = []
    for f in (model, forward):
        loss = f(idx[:, :-1], idx[:, 1:])
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    for (name, _), eager, compiled in zip(model.named_parameters(), *results):
        assert (eager - compiled).norm() <= 1e-4 * eager.norm() + 1e-9, name
