"""The normalised GPT: against the paper's equations and OLMo-core's block, what stays at length 1,
what is refused.

OLMo-core (pip install --no-deps ai2-olmo-core, and a few more) is optional. A tolerance of 1e-6 is
rotary positions'
fp32 table, or a norm taken in fp32.
"""
import math

import pytest
import torch
import torch.nn.functional as F

from kernels import Muon
from parts import Linear
from ngpt import Scale, SphereResidual, unit, unit_weights
from sample import load
from tests.checks import SMALL, apart, awake, small
from tests.runs import TINY, same_run, steps, train, train_in_processes, weights
from train_gpt2 import GPT, MIXERS, MLPS, Block, Config, build, build_optimizers, parse, roles

ROWS = dict(mixer="ngpt", mlp="ngpt", norm="ngpt", residual="ngpt")
RECIPE = ROWS | dict(
    logit_gain=True, zero_init=False, embed_norm=False, weight_decay=0.0, logit_softcap=0.0
)
SIZES = dict(n_layer=3, n_head=4, n_embd=32, vocab_size=50, sequence_length=16, optim="adamw")


def config(**knobs):
    return Config(**SIZES | RECIPE | small(knobs.get("mixer", "")) | knobs)


def stir(m):
    """Move every weight and scale, then restore the unit lengths, as a step does."""
    awake(m)
    m.blocks[0].norm.constrain(roles(m))
    return m


def model(**knobs):
    torch.manual_seed(0)
    return stir(GPT(config(**knobs)))


def tokens(B=2, T=16):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(1))


def points(*shape):
    return unit(torch.randn(*shape, 32, dtype=torch.float64)).requires_grad_()


def same(ours, theirs, inputs, tolerance):
    """Equal values, and equal gradients of a random projection in which every input takes part."""
    assert ours.shape == theirs.shape and apart(ours, theirs) < tolerance
    dy = torch.randn_like(ours)
    for a, b in zip(
        *(torch.autograd.grad(y, inputs, dy, retain_graph=True) for y in (ours, theirs))
    ):
        assert b.any() and apart(a, b) < 10 * tolerance


# ---------------- the paper's equations, by other means

def length(x):
    return x.square().sum(-1, keepdim=True).sqrt()


def rotate(u):                                              # RoPE as complex numbers, (..., T, D)
    half = u.size(-1) // 2
    angle = torch.outer(
        torch.arange(u.size(-2)).double(), 10000.0 ** (-torch.arange(half).double() / half)
    )
    z = torch.complex(u[..., :half], u[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def plain_block(P, h, n_head=4, n_kv_head=4):
    """Section 2 of the paper on a block's parameters P, by name: s_qk and 20 alpha are stored
    divided by sqrt(C)."""
    C, T = h.size(-1), h.size(1)
    D, out = C // n_head, []
    s = (P["mixer.s_qk.p"] * math.sqrt(C)).view(n_head, D)
    q, k, v = (h @ P[f"mixer.{w}.weight"].T for w in "qkv")
    for i in range(n_head):
        g = i * n_kv_head // n_head
        qi, ki = rotate(q[..., i * D:][..., :D]), rotate(k[..., g * D:][..., :D])
        scores = math.sqrt(D) * (s[i] * qi / length(qi)) @ (s[i] * ki / length(ki)).mT
        out.append(
            (scores + torch.full((T, T), -math.inf).triu(1)).softmax(-1) @ v[..., g * D :][..., :D]
        )
    alpha = (P["residual.alpha.p"] * 0.05 * math.sqrt(C)).abs()
    y = torch.cat(out, -1) @ P["mixer.proj.weight"].T
    # the same vector; its gradient has no radial part
    h = h / length(h)
    h = h + alpha[0] * (y / length(y) - h)
    h = h / length(h)
    s_v, s_u = P["mlp.s_uv.p"].chunk(2)
    u, v = s_u * (h @ P["mlp.fc.weight"].T), s_v * math.sqrt(C) * (h @ P["mlp.gate.weight"].T)
    y = (u * v * torch.sigmoid(v)) @ P["mlp.proj.weight"].T
    h = h + alpha[1] * (y / length(y) - h)
    return h / length(h)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_a_block_follows_the_equations(n_kv_head):
    m, x = model(n_kv_head=n_kv_head).double().blocks[1], points(2, 9)
    P = dict(m.named_parameters())
    same(m(x), plain_block(P, x, n_kv_head=n_kv_head), [x, *P.values()], 1e-6)


def test_the_model_follows_the_equations():
    m, idx = model().double(), tokens()
    h = m.wte.weight[idx]
    for block in m.blocks:
        h = plain_block(dict(block.named_parameters()), h)
    s_z = m.head_gain.p * math.sqrt(32)
    # the last RMSNorm's epsilon
    z = (s_z * (h @ m.head.weight.T))[..., :50] / math.sqrt(1 + 32e-6)
    # without rounding to fp32
    m.logits = lambda h: F.linear(h, m.head_gain(m.head.weight))[..., :50]
    same(m(idx), z, [*m.parameters()], 1e-6)
    loss = F.cross_entropy(z.flatten(0, 1), idx.roll(1, 1).flatten())
    same(m(idx, idx.roll(1, 1)), loss, [*m.parameters()], 1e-6)


def test_a_block_equals_olmo_core():
    """Its attention normalises over all heads at once, scales before the rotation, and works in
    fp32: one head, no
    positions."""
    olmo = pytest.importorskip("olmo_core.nn.transformer.block", exc_type=ImportError)
    attention, feed_forward, layer_norm = (pytest.importorskip(f"olmo_core.nn.{name}") for name in (
        "attention", "feed_forward", "layer_norm"))
    m, raw = model(n_head=1, pos="none").blocks[0], points(2, 9).detach().float().requires_grad_()
    # drops the radial gradient that only OLMo-core's x has
    x = unit(raw)
    mixer = attention.AttentionConfig(
        name="normalized",
        n_heads=1,
        backend="torch",
        bias=None,
        qk_norm=layer_norm.LayerNormConfig(
            name="l2_norm", bias=None, full_precision=None, eps=None
        ),
    )
    mlp = feed_forward.FeedForwardConfig(
        name="normalized", hidden_size=m.mlp.fc.out_features, bias=None
    )
    theirs = olmo.NormalizedTransformerBlock(
        d_model=32, block_idx=0, n_layers=3, sequence_mixer=mixer, feed_forward=mlp
    )
    s_v, s_u = m.mlp.s_uv.p.detach().chunk(2)
    values = {
        "attn_alpha": m.residual.alpha.p[0],
        "mlp_alpha": m.residual.alpha.p[1],
        "attention.sq": m.mixer.s_qk.p,
        "attention.sk": m.mixer.s_qk.p,
        "feed_forward.sw1": s_v,
        "feed_forward.sw3": s_u,
        "feed_forward.w1.weight": m.mlp.gate.weight,
        "feed_forward.w3.weight": m.mlp.fc.weight,
        "feed_forward.w2.weight": m.mlp.proj.weight,
        "attention.w_out.weight": m.mixer.proj.weight,
    } | {f"attention.w_{w}.weight": getattr(m.mixer, w).weight for w in "qkv"}
    theirs.load_state_dict({name: value.detach() for name, value in values.items()})
    same(m(x), theirs(x), [raw], 1e-5)

    weights = {name: p for name, p in values.items() if name.endswith("weight")}
    # and the axes along which weights are normalised
    with torch.no_grad():
        for name, p in weights.items():
            theirs.get_parameter(name).copy_(p.copy_(torch.randn_like(p)))
    theirs.attention.normalize_matrices()
    theirs.feed_forward.normalize_matrices()
    unit_weights({p: "proj" if name.endswith(("w2.weight", "w_out.weight")) else "matrix"
                  for name, p in weights.items()}, 32)
    for name, p in weights.items():
        assert apart(p, theirs.get_parameter(name)) < 1e-6, name


# ---------------------------------------------------------------- what has length 1

def lengths(m):
    """{name: lengths} of everything that the paper normalises, by name: along the axis of C
    channels."""
    table = {"wte": m.wte.weight.norm(dim=1), "head": m.head.weight.norm(dim=1)}
    for i, block in enumerate(m.blocks):
        for part, names in ((block.mixer, ("q", "k", "v")), (block.mlp, ("gate", "fc"))):
            table |= {f"{i}.{name}": getattr(part, name).weight.norm(dim=1) for name in names}
            table[f"{i}.{type(part).__name__}.proj"] = part.proj.weight.norm(dim=0)
    return table


def check_lengths(m):
    for name, found in lengths(m).items():
        assert (found - 1).abs().max() < 1e-6, name


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_weights_have_length_1_after_every_step(optim):
    torch.manual_seed(0)
    m, idx = GPT(config(optim=optim, n_kv_head=2)), tokens()
    check_lengths(m)  # after initialisation
    optimizers, table, before = (
        build_optimizers(config(optim=optim), m),
        roles(m),
        m.blocks[0].mlp.proj.weight.clone(),
    )
    for _ in range(4):
        m(idx, idx.roll(1, 1)).backward()
        for opt in optimizers:
            opt.step()
        # the step does change lengths
        assert max((found - 1).abs().max() for found in lengths(m).values()) > 1e-4
        vectors = [p.clone() for p in table if table[p] == "vector"]
        m.blocks[0].norm.constrain(table)
        check_lengths(m)
        assert all(
            torch.equal(p, q) for p, q in zip(vectors, (p for p in table if table[p] == "vector"))
        )
        m.zero_grad()
    assert apart(m.blocks[0].mlp.proj.weight, before) > 1e-3
    assert isinstance(optimizers[0], Muon) == (optim == "muon")


@pytest.mark.parametrize("n", [1, 2])
def test_the_trainer_normalises_after_every_step(shards, tmp_path, n):
    _, folder = train(tmp_path, **shards, **RECIPE, num_iterations=n)
    m = load(folder / "model.pt")
    check_lengths(m)
    saved = weights(folder)["model"]                        # and loading changes nothing
    assert all(torch.equal(p, saved[name]) for name, p in m.state_dict().items())
    assert not torch.equal(m.head_gain.p, GPT(m.cfg).head_gain.p)


@pytest.mark.parametrize(
    "knobs",
    [
        *(dict(mixer=row) for row in MIXERS),
        *(dict(mlp=row) for row in MLPS),
        dict(mixer="ngpt,afno", value_residual=True, **SMALL["afno"]),
        dict(pos="none"),
        dict(tie_embeddings=True),
        dict(dropout=0.2),
        dict(short_conv=True),
    ],
    ids=str,
)
def test_hidden_states_have_length_1(knobs):
    """In the recipe, and with any mixer or MLP inside."""
    m, idx, seen = model(**knobs), tokens(), []
    for block in m.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    loss = m(idx, idx.roll(1, 1))
    loss.backward()
    assert len(seen) == 6 and all((x.norm(dim=-1) - 1).abs().max() < 1e-6 for x in seen)
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in m.parameters())
    for x in seen[1::2]:                                    # the blocks do something
        assert apart(x, seen[0]) > 1e-3


def test_unit():
    x = torch.randn(5, 7)
    assert (
        apart(unit(x), x / x.norm(dim=1, keepdim=True)) < 1e-6 and not unit(torch.zeros(2, 3)).any()
    )
    assert unit(x.bfloat16()).dtype == torch.float32 and unit(x.double()).dtype == torch.float64
    assert (unit(1e-10 * x).norm(dim=1) - 1).abs().max() < 1e-6


def test_what_has_no_axis_of_channels_stays():
    ps = [
        torch.randn(5, 7),
        torch.randn(7, 5),
        torch.randn(7),
        torch.randn(2, 7),
        torch.randn(3, 4, 7),
    ]
    table = dict(zip(ps, ("matrix", "matrix", "vector", "kernel", "matrix")))
    before = [p.clone() for p in ps]
    unit_weights(table, 7)
    assert [torch.equal(p, q) for p, q in zip(ps, before)] == [False, True, True, True, False]
    assert (ps[4].norm(dim=-1) - 1).abs().max() < 1e-6


# ---------------------------------------------------------------- the residual, the learned scales

def test_alpha():
    m, x, y = (
        SphereResidual(32).double(),
        points(2, 5).detach(),
        torch.randn(2, 5, 32, dtype=torch.float64),
    )
    with torch.no_grad():
        m.alpha.p[1].zero_()
        assert apart(m(x, y, 1), x) < 1e-12                 # stays
        m.alpha.p[1].fill_(20 * 32 ** -0.5)
        assert apart(m(x, y, 1), unit(y)) < 1e-6            # arrives
        assert apart(m(x, 9 * y, 0), m(x, y, 0)) < 1e-12    # y's length does not matter
        out = m(x, y, 0)
        m.alpha.p[0].neg_()
        assert torch.equal(m(x, y, 0), out)                 # nor does the sign of alpha
    assert apart(out, unit(0.95 * x + 0.05 * unit(y))) < 1e-6


@pytest.mark.parametrize("branch", [0, 1])
def test_the_embedding_has_no_radial_gradient(branch):
    m, w, idx = SphereResidual(32).double(), points(50), tokens()
    y, direction = torch.randn(2, 2, 16, 32, dtype=torch.float64)
    loss = (m(w[idx], y, branch) * direction).sum()
    g, = torch.autograd.grad(loss, w)
    assert g.any() and (g * w).sum(-1).abs().max() < 1e-12 * g.abs().max()


def test_alpha_zero_is_the_identity_block():
    m, x = model().double().blocks[0], points(2, 9)
    assert apart(m(x), x) > 1e-2
    with torch.no_grad():
        m.residual.alpha.p.zero_()
    assert apart(m(x), x) < 1e-12


@pytest.mark.parametrize("init, scale", [(0.05, 0.125), (1.0, 0.2), (2.0, 2.0)])
def test_a_scale_learns_at_its_own_rate(init, scale):
    m, weight = Scale(6, init=init, scale=scale), torch.randn(6)
    assert apart(m(), torch.full((6,), init)) < 1e-6
    (weight * m()).sum().backward()
    assert apart(m.p.grad, weight * init / scale) < 1e-6
    torch.optim.Adam(m.parameters(), lr=1e-3).step()
    assert apart(m() - init, -1e-3 * init / scale * weight.sign()) < 1e-3


def test_initial_scales():
    m = GPT(config())
    for block in m.blocks:
        for found, value in (
            (block.residual.alpha(), 0.05),
            (block.mixer.s_qk(), 1.0),
            (block.mlp.s_uv(), 1.0),
        ):
            assert apart(found, torch.full_like(found, value)) < 1e-6
        assert block.residual.alpha.p.shape == (2, 32) and block.mixer.s_qk.p.shape == (32,)
    idx = tokens()
    h = m.trunk(idx, slice(idx.size(1)), lambda i, x, v1: m.blocks[i](x))
    cosine = (unit(h) @ m.head.weight.T)[..., :50]          # s_z = 1
    assert apart(m(idx), cosine) < 1e-4
    table = {name: roles(m)[p] for name, p in m.named_parameters()}
    scales = {name for name in table if name.endswith(".p")}
    # never Muon, never decayed
    assert len(scales) == 3 * 3 + 1 and {table[name] for name in scales} == {"vector"}


def test_logit_gain_without_the_rest():
    bare, scaled = (GPT(Config(**SIZES, zero_init=False, logit_gain=on)) for on in (False, True))
    idx = tokens()
    scaled.load_state_dict(bare.state_dict(), strict=False)
    assert apart(scaled(idx), bare(idx)) > 0.1
    with torch.no_grad():
        scaled.head_gain.p.fill_(1.0)
    assert torch.equal(scaled(idx), bare(idx)) and torch.equal(scaled(idx, idx), bare(idx, idx))


# ---------------- flags, decoding, precision, whole runs

REFUSED = [
    (dict(residual="add"), "length 1"),
    (dict(residual="gpas"), "its scales"),
    (dict(norm="pre"), "unit vectors"),
    (dict(norm="lns"), "its scales"),
    (dict(norm="hybrid", head_norm="qkv", mixer="attn"), "unit"),
    (dict(linear="cola"), "channels"),
    (dict(weight_decay=0.01), "grow"),
    (dict(zero_init=True), "zeros"),
    (dict(embed_norm=True), "already"),
    (dict(embed_scale=True), "stay"),
    (dict(pos="learned"), "sum"),
    (dict(pos="sinusoidal"), "sum"),
    (dict(x0_shortcut=True), "embedding"),
    (dict(unet_skips=True), "layer"),
    (dict(branch_scale=True), "lost"),
    (dict(head_norm="none"), "head_norm"),
]


@pytest.mark.parametrize("knobs, word", REFUSED, ids=str)
def test_contradictions_are_one_line(knobs, word):
    def flags(knobs):
        return [
            f"--{'' if value is not False else 'no-'}{name}"
            + ("" if isinstance(value, bool) else f"={value}")
            for name, value in knobs.items()
        ]
    with pytest.raises(SystemExit) as e:
        parse(flags(RECIPE | knobs))
    assert (
        word in str(e.value) and f"--{list(knobs)[0]}" in str(e.value) and "\n" not in str(e.value)
    )
    assert len(str(e.value)) < 200 and parse(flags(RECIPE))


@pytest.mark.parametrize(
    "knobs",
    [dict(), dict(n_kv_head=2, value_residual=True), dict(short_conv=True, pos="none")],
    ids=str,
)
def test_step_equals_forward(knobs):
    m, idx = model(**knobs), tokens()
    state, columns = m.init_state(2), []
    for t in range(16):
        y, state = m.step(idx[:, t], state)
        columns.append(y)
    assert apart(torch.stack(columns, 1), m(idx)) < 1e-5


def test_bfloat16_autocast_is_near():
    m, idx = model(), tokens()
    exact = m(idx, idx.roll(1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = m(idx, idx.roll(1, 1))
        x = m.blocks[0](points(2, 9).float())
    assert abs(loss - exact) < 0.02 * exact and loss.dtype == torch.float32
    # the stream stays fp32
    assert x.dtype == torch.float32 and (x.norm(dim=-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_training_learns(shards, tmp_path, optim):
    _, folder = train(
        tmp_path,
        **shards,
        **RECIPE,
        optim=optim,
        num_iterations=60,
        val_loss_every=60,
        learning_rate=0.01,
    )
    first, last = steps(folder, "val")
    assert abs(first - math.log(24)) < 0.1 and last < first - 1.0


def test_two_processes_train_like_one(shards, tmp_path):
    _, one = train(tmp_path / "one", **shards, **RECIPE)
    two = train_in_processes(2, tmp_path / "two", **shards, **RECIPE)
    same_run(one, two, 1e-4)
    check_lengths(load(two / "model.pt"))


def test_the_rows_alone():
    """nGPT's attention is attention with QK-norm as long as its scales are 1; a block need not know
    of it."""
    torch.manual_seed(0)
    cfg = Config(**SIZES | dict(mixer="ngpt", zero_init=False))
    m, plain = (
        Block(cfg, 0).mixer,
        build("mixer", "attn", Config(**SIZES | dict(mixer="attn")), 32, 16),
    )
    plain.load_state_dict(m.state_dict(), strict=False)
    x = torch.randn(2, 9, 32)
    assert apart(m(x), plain(x)) < 1e-4                     # QK-norm's epsilon
    assert isinstance(m.q, Linear) and m.flops(9) == plain.flops(9) and TINY["mixer"] == "attn"
