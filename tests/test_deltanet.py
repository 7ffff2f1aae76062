"""Gated DeltaNet: the chunkwise rule against its recurrence, and against fla's and transformers'
independent code.

The oracles are optional: pip install transformers; pip install --no-deps fla-core einops. They
compute in fp32.
"""
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from functorch.compile import make_boxed_func

from deltanet import GatedDeltaNet, best_rule, gated_delta_rule, gated_delta_rule_naive, with_kernel
from tests.checks import apart, awake

# -g: a token forgets 40%, or all but 2e-9
MILD, STRONG = 0.5, 20.0


def inputs(T, decay=MILD, dtype=torch.float64, B=2, H=3, dk=8, dv=12):
    """q, k, v, g, beta and a state that need gradients; g in [-1.5, -0.5] * decay."""
    torch.manual_seed(T)
    q, k = (F.normalize(torch.randn(B, T, H, dk, dtype=torch.float64), dim=-1) for _ in range(2))
    v, S = (
        torch.randn(B, T, H, dv, dtype=torch.float64),
        torch.randn(B, H, dk, dv, dtype=torch.float64),
    )
    g, beta = -decay * (0.5 + torch.rand(B, T, H).double()), torch.rand(B, T, H).double()
    return [x.to(dtype).requires_grad_() for x in (q, k, v, g, beta, S)]


def with_gradients(rule, x, **knobs):
    """o, the final state, and the gradient of a fixed random function of both by each input."""
    *x, S = x
    o, last = rule(*x, **knobs, state=S)
    weights = torch.Generator().manual_seed(0)
    loss = sum(
        (y * torch.randn(y.shape, generator=weights, dtype=torch.float64).to(y.dtype)).sum()
        for y in (o, last)
    )
    return dict(zip(("o", "last", "q", "k", "v", "g", "beta", "state"),
                    (o, last, *torch.autograd.grad(loss, [*x, S]))))


def same(a, b, allowed):
    for name in b:
        assert a[name].shape == b[name].shape and (a[name] - b[name]).abs().max() <= allowed * (
            1 + b[name].abs().max()), name


# ---------------------------------------------------------------- the rule

@pytest.mark.parametrize("decay", [MILD, STRONG])
@pytest.mark.parametrize("T", [1, 5, 63, 64, 65, 130])
def test_chunks_equal_the_recurrence_in_values_and_gradients(T, decay):
    x = inputs(T, decay)
    same(with_gradients(gated_delta_rule, x), with_gradients(gated_delta_rule_naive, x), 1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 16, 100, 1000])
def test_any_chunk_gives_the_same(chunk):
    x = inputs(70)
    same(
        with_gradients(gated_delta_rule, x, chunk=chunk),
        with_gradients(gated_delta_rule_naive, x),
        1e-12,
    )


@pytest.mark.parametrize("rule", [gated_delta_rule, gated_delta_rule_naive])
def test_the_equation(rule):
    """Two tokens, with the matrix I - beta k k^T written out."""
    q, k, v, g, beta, S = (x.detach() for x in inputs(2, B=1, H=1))
    o, last = rule(q, k, v, g, beta, state=S)
    state = S[0, 0]
    for t in range(2):
        k_t, b = k[0, t, 0], beta[0, t, 0]
        forget = torch.eye(8, dtype=k.dtype) - b * torch.outer(k_t, k_t)
        state = g[0, t, 0].exp() * forget @ state + b * torch.outer(k_t, v[0, t, 0])
        assert torch.allclose(o[0, t, 0], state.T @ q[0, t, 0] / 8 ** 0.5, rtol=1e-12, atol=1e-13)
    assert torch.allclose(last[0, 0], state, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", [gated_delta_rule, gated_delta_rule_naive])
def test_a_state_carries_on(rule):
    *x, S = inputs(130)
    whole, last = rule(*x, state=S)
    first, middle = rule(*(u[:, :37] for u in x), state=S)
    second, end = rule(*(u[:, 37:] for u in x), state=middle)
    assert apart(torch.cat((first, second), 1), whole) < 1e-12 and apart(end, last) < 1e-12
    zeros = torch.zeros_like(S)
    assert all(torch.equal(a, b) for a, b in zip(rule(*x), rule(*x, state=zeros)))


def test_the_rule_overwrites():
    """beta = 1 and no decay: what is read at a stored key is the last value written there."""
    keys, v = torch.eye(4).double(), torch.randn(1, 8, 1, 5).double()
    k = keys[[0, 1, 2, 0, 3, 1, 0, 2]][None, :, None]
    o, _ = gated_delta_rule(
        2 * k, k, v, torch.zeros(1, 8, 1).double(), torch.ones(1, 8, 1).double(), chunk=3
    )
    assert torch.allclose(o, v, atol=1e-14)                 # 2 = sqrt(dk)


@pytest.mark.parametrize("top", [1.0, 2.0])
def test_repeated_keys_in_single_precision(top):
    """The hard case of the triangular system: a run of one token. A product of powers of A is off
    by 1e10 here."""
    q, k, v, g, beta, S = (x.detach() for x in inputs(130, decay=1e-3))
    x = [q, k[:, :1].expand_as(k), v, g, beta * 0 + top, S]
    same(with_gradients(gated_delta_rule, [u.float().requires_grad_() for u in x]),
         with_gradients(gated_delta_rule_naive, [u.requires_grad_() for u in x]), 1e-3)


@pytest.mark.parametrize("g", [0.0, -30.0, -1e4])
def test_extreme_gates_stay_finite(g):
    q, k, v, _, beta, S = inputs(130, dtype=torch.float32)
    x = [q, k, v, torch.full_like(beta, g).requires_grad_(), beta, S]
    result = with_gradients(gated_delta_rule, x)
    assert all(u.isfinite().all() for u in result.values())
    same(result, with_gradients(gated_delta_rule_naive, x), 1e-5)


def test_precision_island():
    *x, S = inputs(70, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        o, last = gated_delta_rule(*x, state=S)
    exact, _ = gated_delta_rule_naive(*(u.double() for u in x), state=S.double())
    assert (
        o.dtype == torch.bfloat16
        and last.dtype == torch.float32
        and apart(o.double(), exact) < 1e-2
    )


def counting(graphs):
    """A backend for torch.compile that appends how many operators each graph has, and runs it."""
    from torch._dynamo.backends.common import aot_autograd

    def compiler(graph, inputs):
        graphs.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)
    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


@pytest.mark.parametrize("T", [1, 20, 32, 70])
def test_compiles_without_a_graph_break(T):
    torch._dynamo.reset()
    x = inputs(T, dtype=torch.float32)
    compiled = torch.compile(gated_delta_rule, backend="aot_eager", fullgraph=True)
    same(with_gradients(compiled, x, chunk=32), with_gradients(gated_delta_rule, x, chunk=32), 1e-5)


def test_a_compiled_graph_does_not_grow_with_time():
    """Traced, the loop over chunks is a copy of its body a chunk, each with passes over all."""
    operators = []
    for T in (96, 320):
        torch._dynamo.reset()
        graphs = []
        compiled = torch.compile(gated_delta_rule, backend=counting(graphs), fullgraph=True,
                                 dynamic=False)
        # Wide enough for the CPU's several stretches of time in eager.
        x = inputs(T, dtype=torch.float32, B=4, H=8, dk=64, dv=3)
        same(with_gradients(compiled, x), with_gradients(gated_delta_rule, x), 1e-5)
        operators.append(graphs)
    assert len(operators[0]) == 2 and operators[0] == operators[1]


@pytest.mark.parametrize("shapes", [
    [(2, 64), (3, 64), (4, 64), (7, 64)],
    # padded rows: multiples of 8, of a chunk of 32 or not
    [(2, 64), (2, 96), (2, 40), (2, 136), (2, 200), (2, 128)],
], ids=["batches", "lengths"])
def test_one_compiled_graph_serves_all_shapes(shapes):
    """The second batch or length makes the size dynamic; after that nothing is compiled anew."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph
    compiled = torch.compile(gated_delta_rule, backend=backend, fullgraph=True)
    for B, T in shapes:
        x = inputs(T, dtype=torch.float32, B=B, H=2)
        same(with_gradients(compiled, x), with_gradients(gated_delta_rule, x), 1e-5)
    assert len(graphs) == 2


def test_the_operators_keep_their_promises():
    """Fake shapes and strides are the real ones; no output is an input, and no input is written."""
    N, H, C, dk, dv = 3, 2, 4, 5, 6
    shapes = (N * H, C, dv), (N * H, C, dk), (N * H, C, dk), (N * H, C, C), (N * H, 1, 1)
    x = [torch.randn(shape) for shape in (*shapes, (H, dk, dv), (N * H, dk, dv))]
    operators = torch.ops.spectral_nanogpt
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.chunk_states.default, x[:6], test_utils=checks)
    torch.library.opcheck(operators.chunk_gradients.default, x, test_utils=checks)


def test_the_compiled_layer_equals_the_eager_one():
    torch._dynamo.reset()
    m = layer().float()
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    results = []
    for forward in (m, compiled):
        x = torch.randn(2, 70, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
        y = forward(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()])])
    assert all(apart(a, b) < 1e-4 for a, b in zip(*results))


def test_stretches_of_time_give_the_same():
    """Wide enough for the CPU to take the time in several stretches, the last one shorter and
    padded."""
    x = inputs(150, B=4, H=8, dk=64, dv=3)                  # 2^17 numbers are 64 tokens
    same(with_gradients(gated_delta_rule, x), with_gradients(gated_delta_rule_naive, x), 1e-11)


def test_the_gradient_is_right_in_autocast_too():
    x = inputs(70, dtype=torch.float32)
    expected = with_gradients(gated_delta_rule, x)
    with torch.autocast("cpu", torch.bfloat16):             # the backward runs inside as well
        same(with_gradients(gated_delta_rule, x), expected, 1e-6)


@pytest.mark.parametrize("loss", [torch.sum, lambda o: o.square().sum()])
def test_a_second_derivative_is_refused(loss):
    *x, S = inputs(40)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss(gated_delta_rule(*x, state=S)[0]), x, create_graph=True)


def test_inputs_and_an_expanded_gradient_stay_as_they_are():
    # one chunk of one head: its layout is the input's own
    x = inputs(32, B=1, H=1)
    before = [u.detach().clone() for u in x]
    o, last = gated_delta_rule(*x[:5], state=x[5])
    kept, grads = (
        (o.detach().clone(), last.detach().clone()),
        (torch.ones_like(o), torch.ones_like(last)),
    )
    torch.autograd.grad((o, last), x, grads)
    assert all(
        torch.equal(a, b)
        for a, b in zip((*x, o, last, *grads), (*before, *kept, *map(torch.ones_like, kept)))
    )


def kernel(scale=1.0):                                      # fla's signature
    def chunk_gated_delta_rule(q, k, v, g, beta, initial_state=None, output_final_state=False):
        o, S = gated_delta_rule(q, k, v, g, beta, state=initial_state)
        return o * scale, S
    return chunk_gated_delta_rule


@pytest.fixture
# -> puts a kernel where best_rule looks for fla's
def fake_fla(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    best_rule.cache_clear()
    def put(module):
        for name in ("fla", "fla.ops"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    yield put
    best_rule.cache_clear()


def test_a_kernel_that_agrees_is_used(fake_fla, capsys):
    calls, right = [], kernel()
    fake_fla(
        SimpleNamespace(
            chunk_gated_delta_rule=lambda *x, **knobs: calls.append(1) or right(*x, **knobs)
        )
    )
    rule = best_rule("cpu")
    # compared once a process
    assert rule.func is with_kernel and best_rule("cpu") is rule and len(calls) == 1
    assert capsys.readouterr().err == ""
    x = [u.detach() for u in inputs(9)[:5]]
    # on the CPU, ours
    assert torch.equal(rule(*x)[0], gated_delta_rule(*x)[0]) and len(calls) == 1


def wrong_in_the_gradient(q, k, v, g, beta, **knobs):
    return kernel()(q, k, v, g.detach() + 0 * g, beta, **knobs)


def broken(*x, **knobs):
    raise RuntimeError("no such\narchitecture")


def nan(*x, **knobs):
    return tuple(u * float("nan") for u in kernel()(*x, **knobs))


@pytest.mark.parametrize("wrong", [kernel(1.1), wrong_in_the_gradient, broken, nan])
def test_a_kernel_that_does_not_is_left_aside_with_one_line(wrong, fake_fla, capsys):
    fake_fla(SimpleNamespace(chunk_gated_delta_rule=wrong))
    numbers = torch.get_rng_state()
    assert best_rule("cpu") is gated_delta_rule and best_rule("cpu") is gated_delta_rule
    said = capsys.readouterr().err
    assert said.startswith("gdn: without fla's kernel: ") and said.count("\n") == 1
    assert torch.equal(torch.get_rng_state(), numbers)


def test_a_package_that_does_not_import_is_left_aside(fake_fla, capsys):
    class Module(ModuleType):
        def __getattr__(self, name):
            raise OSError("libtriton.so")
    fake_fla(Module("fla.ops.gated_delta_rule"))
    assert best_rule("cpu") is gated_delta_rule and capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------- the layer

CASES = [
    dict(),
    dict(k_heads=2, head_dim=6, expand_v=2.0, neg_eigval=True),
    dict(k_heads=1, expand_v=0.5, chunk=7),
]


def layer(dim=16, seq_len=150, n_head=4, **knobs):
    torch.manual_seed(0)
    return awake(GatedDeltaNet(dim, seq_len, n_head=n_head, **knobs)).double()


@pytest.mark.parametrize("knobs", CASES, ids=str)
def test_prefixes(knobs):
    m, x = layer(**knobs), torch.randn(2, 150, 16, dtype=torch.float64)
    y = m(x)
    assert y.shape == x.shape and all(
        apart(m(x[:, :t]), y[:, :t]) < 1e-11 for t in (1, 2, 63, 64, 65, 101, 129, 149)
    )


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("knobs", CASES, ids=str)
def test_step_equals_forward(knobs, residual):
    m, x = layer(**knobs), torch.randn(2, 70, 16, dtype=torch.float64)
    v1 = torch.randn_like(m.value(x)) if residual else None
    state, columns = m.init_state(2), []
    for t in range(70):
        y, state = m.step(x[:, t], state, v1 if v1 is None else v1[:, t])
        columns.append(y)
    assert apart(torch.stack(columns, 1), m(x, v1)) < 1e-10


def test_a_value_residual_is_added_to_the_projected_values():
    m, x, v1 = (
        layer(),
        torch.randn(2, 9, 16, dtype=torch.float64),
        torch.randn(2, 9, 16, dtype=torch.float64),
    )
    y = m(x, v1)
    assert not torch.allclose(m(x), y)
    m.v.register_forward_hook(lambda module, inputs, v: v + v1)
    assert torch.equal(m(x), y)


def test_parameters_by_hand():
    def count(m):
        return sum(p.numel() for p in m.parameters())
    dim = 512
    # 5 d^2, b and a, convolution, A_log and dt_bias, gain
    plain = GatedDeltaNet(dim, 64, n_head=8)
    assert count(plain) == 5 * dim * dim + 2 * 8 * dim + 4 * 3 * dim + 2 * 8 + 64
    # 6 d^2: H dk = 0.75 d
    paper = GatedDeltaNet(dim, 64, n_head=4, head_dim=96, expand_v=2.0)
    assert count(paper) == 6 * dim * dim + 2 * 4 * dim + 4 * 3 * dim + 2 * 4 + 192
    shared = GatedDeltaNet(dim, 64, n_head=8, k_heads=2)
    assert (
        count(shared) == 3 * dim * dim + 2 * dim * 128 + 2 * 8 * dim + 4 * (dim + 256) + 2 * 8 + 64
    )
    assert all(p.ndim == 1 for p in (plain.A_log, plain.dt_bias, plain.gain))
    assert plain.gate.weight.shape == plain.proj.weight.shape == (dim, dim)


def test_initial_gates():
    torch.manual_seed(0)
    m = GatedDeltaNet(512, 1, n_head=512)
    dt, A = F.softplus(m.dt_bias), m.A_log.exp()
    assert 0.001 <= dt.min() and dt.max() <= 0.1001 and 0.01 <= A.min() and A.max() <= 16
    assert A.mean().item() == pytest.approx(8, rel=0.1) and dt.log().mean().item() == pytest.approx(
        -4.6, rel=0.05
    )


def test_the_factory_makes_the_large_projections_only():
    made = []
    class Counted(nn.Linear):
        def __init__(self, d_in, d_out, bias):
            super().__init__(d_in, d_out, bias=bias)
            made.append((d_in, d_out, bias))
    m = GatedDeltaNet(8, 16, n_head=2, expand_v=2.0, linear=Counted)
    assert made == [(8, 8, False), (8, 8, False), (8, 16, False), (8, 16, False), (16, 8, False)]
    assert (
        not isinstance(m.a, Counted)
        and m.a.bias is None
        and m(torch.randn(1, 3, 8)).shape == (1, 3, 8)
    )


@pytest.mark.parametrize(
    "knobs",
    [
        dict(n_head=3),
        dict(n_head=4, k_heads=3),
        dict(n_head=4, expand_v=0.1),
        dict(n_head=4, chunk=-1),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(knobs):
    with pytest.raises(ValueError, match="gdn: .*--gdn_chunk"):
        GatedDeltaNet(16, 8, **knobs)


def test_flops_count_the_matrix_products(monkeypatch):
    from torch.utils.flop_counter import FlopCounterMode
    # The counter does not know oneDNN's products, which linear layers are on a CPU.
    monkeypatch.setattr("kernels.has_products", lambda: False)
    m, T = GatedDeltaNet(64, 128, n_head=2, expand_v=2.0), 128
    # not in the counter
    in_place = {torch.ops.aten.baddbmm_: lambda c, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        m(torch.randn(1, T, 64))
    weights = 2 * sum(
        p.numel() for name, p in m.named_parameters() if p.ndim == 2 and "conv" not in name
    )
    # the triangular solve is no matrix product to the counter
    inverse = m.n_head * m.chunk ** 2
    assert counter.get_total_flops() / T == weights + m.flops(T) - inverse


# ---------------------------------------------------------------- oracles

def fla_naive():
    """fla's plain PyTorch file on its own: importing fla.ops would ask for Triton, which a CPU does
    not need."""
    pytest.importorskip("einops")
    if (package := importlib.util.find_spec("fla")) is None:
        pytest.skip("fla is not installed")
    file = Path(package.submodule_search_locations[0]) / "ops/gated_delta_rule/naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def olmo():
    """transformers' module with its own PyTorch code inside, also where fla is there: it would call
    Triton."""
    module = pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    names = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", "causal_conv1d_fn")
    return module, {name: inspect.unwrap(getattr(module, name)) for name in names}


def oracle(name):                                           # -> a rule with our signature
    family, kind = name.split("/")
    if family == "fla":
        theirs = getattr(fla_naive(), f"naive_{kind}_gated_delta_rule")
    else:
        theirs = olmo()[1][f"torch_{kind}_gated_delta_rule"]
    return lambda q, k, v, g, beta, state: theirs(
        q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True
    )


@pytest.mark.parametrize("decay", [MILD, STRONG])
@pytest.mark.parametrize(
    "name", ["transformers/chunk", "transformers/recurrent", "fla/chunk", "fla/recurrent"]
)
def test_oracles_agree_in_values_and_gradients(name, decay):
    rule = oracle(name)
    for T in (1, 65, 130):
        x = inputs(T, decay, torch.float32)
        expected = with_gradients(rule, x)
        same(with_gradients(gated_delta_rule, x), expected, 2e-5)
        same(with_gradients(gated_delta_rule_naive, x), expected, 2e-5)


@pytest.mark.parametrize("knobs", CASES, ids=str)
def test_the_layer_agrees_with_olmo_hybrid(knobs, monkeypatch):
    """Every weight of theirs is mapped to one of ours: outputs, and gradients of the input and of
    every parameter."""
    module, functions = olmo()
    for name, function in functions.items():
        monkeypatch.setattr(module, name, function)
    ours = layer(seq_len=70, **knobs).float()
    dk, dv, heads = ours.dk, ours.dv, ours.n_head
    config = module.OlmoHybridConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        linear_num_key_heads=heads // ours.share,
        linear_num_value_heads=heads,
        linear_key_head_dim=dk,
        linear_value_head_dim=dv,
        linear_allow_neg_eigval=ours.beta_max == 2,
    )
    theirs = module.OlmoHybridGatedDeltaNet(config, layer_idx=0)
    names = {
        "q.weight": "q_proj.weight",
        "k.weight": "k_proj.weight",
        "v.weight": "v_proj.weight",
        "gate.weight": "g_proj.weight",
        "a.weight": "a_proj.weight",
        "b.weight": "b_proj.weight",
        "proj.weight": "o_proj.weight",
        "gain": "o_norm.weight",
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "short_conv.weight": "conv1d.weight",
    }
    # (4, C) -> (C, 1, 4)
    reshape = {"short_conv.weight": lambda w: w.T[:, None]}
    same_shape = lambda w: w                                # noqa: E731
    mine = dict(ours.named_parameters())
    # strict
    theirs.load_state_dict(
        {names[n]: reshape.get(n, same_shape)(p.detach()) for n, p in mine.items()}
    )
    x = torch.randn(2, 70, 16, requires_grad=True)
    weights, results = torch.randn(2, 70, 16), []
    for m, parameters in (
        (ours, mine),
        (theirs, {n: theirs.get_parameter(names[n]) for n in mine}),
    ):
        y = m(x)
        grads = torch.autograd.grad((y * weights).sum(), [x, *parameters.values()])
        results.append(dict(zip(("y", "x", *mine), (y, *grads))))
    results[0] |= {n: reshape[n](results[0][n]) for n in reshape}
    for name in results[0]:
        assert apart(results[0][name], results[1][name]) < 1e-4, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_agrees_with_ours():
    pytest.importorskip("fla.ops.gated_delta_rule")
    rule = best_rule()
    assert rule is not gated_delta_rule
    x = [u.detach().cuda() for u in inputs(777, dtype=torch.float32, H=4, dk=64, dv=64)]
    q, k, v, g, beta, S = ((u.bfloat16() if i < 3 else u).requires_grad_() for i, u in enumerate(x))
    weights, results = torch.randn(2, 777, 4, 64, device="cuda"), []
    for f in (rule, gated_delta_rule):
        o, last = f(q, k, v, g, beta, state=S)
        results.append(
            (o, last, *torch.autograd.grad((o.float() * weights).sum(), (q, k, v, g, beta, S)))
        )
    for name, kernel, plain in zip(("o", "last", "q", "k", "v", "g", "beta", "state"), *results):
        assert apart(kernel.double(), plain.double()) < 3e-2, name
