"""What only a GPU shows: bf16 autocast, torch.compile, Newton-Schulz in bf16, at the width of the
race."""

import pytest
import torch
from torch._dynamo.utils import counters

import attention
import train_gpt2
from afno import AFNO
from kernels import fft_conv, linear_cross_entropy, newton_schulz, toeplitz_conv
from tests.checks import apart, awake
from train_gpt2 import GPT, MIXERS, Config, build_optimizers, main, set_schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


def config(row, **knobs):
    return Config(
        **dict(
            mixer=row,
            model="d12",
            n_layer=2,
            vocab_size=50257,
            sequence_length=1024,
            device="cuda",
            num_iterations=5,
            warmup_iters=0,
            warmdown_iters=0,
        )
        | knobs
    )


def model(cfg):
    torch.manual_seed(0)
    return GPT(cfg).to(CUDA)


def tokens(B=2, T=1024, seed=0):
    return torch.randint(50257, (B, T), generator=torch.Generator().manual_seed(seed)).to(CUDA)


def bf16():
    return torch.autocast("cuda", torch.bfloat16)


@pytest.mark.parametrize("row", [*MIXERS, "afno,attn"])
def test_compiled_steps_are_finite_and_near_eager(row):
    torch._dynamo.reset()
    cfg, losses = config(row), {}
    for kind in ("eager", "compiled"):
        m = model(cfg)
        forward, optimizers = (
            torch.compile(m) if kind == "compiled" else m,
            build_optimizers(cfg, m),
        )
        losses[kind] = []
        for step in range(5):
            set_schedule(optimizers, step, cfg)
            idx = tokens(seed=step)
            with bf16():
                loss = forward(idx, idx.roll(-1, 1))
            loss.backward()
            assert all(p.grad.isfinite().all() for p in m.parameters())
            for opt in optimizers:
                opt.step()
            m.zero_grad(set_to_none=True)
            losses[kind].append(loss.item())
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=5e-3)


@pytest.mark.parametrize(
    "knobs", [dict(mixer="attn"), dict(mixer="afno", afno_backend="toeplitz")], ids=str
)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_future_does_not_move_a_bit_of_the_past(knobs, compiled):
    torch._dynamo.reset()
    m = awake(model(config(knobs["mixer"], **{k: v for k, v in knobs.items() if k != "mixer"})))
    forward = torch.compile(m) if compiled else m
    idx = tokens()
    with torch.no_grad(), bf16():
        y = forward(idx)
        for cut in (1, 511, 1000):
            other = torch.cat((idx[:, :cut], tokens(seed=1)[:, cut:]), 1)
            z = forward(other)
            assert torch.equal(z[:, :cut], y[:, :cut]) and not torch.equal(z[:, cut:], y[:, cut:])


@pytest.mark.parametrize(
    "knobs",
    [
        dict(window=100),
        dict(window=100, n_kv_head=4),
        dict(row="diff", window=300),
        dict(batches="packed", document_token=7, window=300),
        dict(row="ngpt", batches="packed", document_token=7),
        dict(batches="packed", document_token=7, recompute="block"),
        dict(row="afno,attn", afno_taps=16, short_conv=True, output_conv=True, batches="packed",
             document_token=7),
        dict(window=100, linear="cola", recompute="cola"),
    ],
    ids=str,
)
def test_flex_attention_is_dense_masked_attention(knobs, monkeypatch):
    """Compiled, masks go to FlexAttention; else to a dense one: loss and gradients of two
    layers."""
    torch._dynamo.reset()
    knobs = dict(row="attn") | knobs
    m, idx, found = awake(model(config(**knobs))), tokens(), []
    idx[:, ::150] = 7                                       # where documents start
    for forward in (m, torch.compile(m)):
        if forward is not m:
            monkeypatch.setattr(attention, "sdpa", None)    # flex it must be
            forward(idx[:1], idx[:1])                       # and for any number of rows
        m.zero_grad()
        with bf16():
            loss = forward(idx, idx.roll(-1, 1))
        loss.backward()
        found.append([loss.detach()] + [p.grad.clone() for p in m.parameters()])
    for dense, flex in zip(*found):
        assert (flex - dense).norm() <= 5e-2 * dense.norm() + 1e-6


def test_backends_agree_across_precisions():
    torch.manual_seed(0)
    u, h = torch.randn(2, 1024, 768, device=CUDA), torch.randn(48, 1024, device=CUDA) / 32
    exact = fft_conv(u.double(), h.double())
    assert apart(fft_conv(u, h).double(), exact) < 1e-5
    assert apart(toeplitz_conv(u.bfloat16(), h).double(), exact) < 2e-2
    assert fft_conv(u.bfloat16(), h).dtype == toeplitz_conv(u.bfloat16(), h).dtype == torch.bfloat16


def test_afno_in_bfloat16_is_near_double():
    m, x = awake(AFNO(768, 1024)).to(CUDA), torch.randn(1, 777, 768, device=CUDA)
    with torch.no_grad(), bf16():
        y = m(x)
    assert y.dtype == torch.bfloat16 and apart(y.double(), m.double()(x.double())) < 5e-2


@pytest.mark.parametrize("shape", [(768, 3072), (3072, 768), (4, 768, 768)])
def test_newton_schulz_in_bfloat16(shape):
    torch.manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(shape, device=CUDA), full_matrices=False)
    S = torch.linspace(0.1, 1, S.size(-1), device=CUDA)
    update = newton_schulz(U * S @ Vh)
    assert update.dtype == torch.bfloat16
    values = torch.linalg.svdvals(update.float())
    assert 0.5 < values.min() and values.max() < 1.4
    # the directions stay
    assert (U.mT @ update.float() @ Vh.mT).diagonal(dim1=-2, dim2=-1).min() > 0.5


@pytest.mark.parametrize("window", [0, 100])
def test_grouped_keys_in_fp32_store_no_scores(window):
    """As validation runs: 16 rows' scores of 12 heads are 768 MiB in fp32."""
    torch._dynamo.reset()
    m = model(config("attn", n_layer=1, n_kv_head=6, window=window)).eval()
    forward = torch.compile(m)
    idx = tokens(B=16)
    with torch.no_grad():
        forward(idx, idx)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward(idx, idx)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 2**30


@pytest.mark.parametrize("M, C, V, limit", [(16384, 768, 50304, 1.3), (32768, 512, 151665, 2.0)])
def test_the_compiled_loss_holds_a_chunk_at_a_time(M, C, V, limit):
    """GiB at the peak, inputs and gradients counted."""
    torch._dynamo.reset()
    h = torch.randn(M, C, device=CUDA, requires_grad=True)
    W = torch.randn(V, C, device=CUDA, requires_grad=True)
    y = torch.randint(V, (M,), device=CUDA)
    loss = torch.compile(linear_cross_entropy, dynamic=False)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with bf16():
            value = loss(h, W, y, 15.0)
        peak = torch.cuda.max_memory_allocated() / 2**30
    assert value.isfinite() and peak < limit


@pytest.mark.parametrize("batches", ["padded", "packed"])
def test_a_compiled_run_of_documents(batches, tmp_path):
    """Nothing compiles inside the clock, by Inductor and for the GPU."""
    counters.clear()
    graphs = []
    say = train_gpt2.Log.__call__

    def counted(log, line):
        graphs.append(counters["stats"]["unique_graphs"])
        say(log, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2.Log, "__call__", counted)
        main(Config(mixer="attn", output_dir=str(tmp_path), num_iterations=20, val_loss_every=10,
                    batches=batches, document_token=10, val_tokens=16384, train_loss_every=5,
                    device="cuda"))
    # The first line is before, the others are behind what compiles.
    assert len(set(graphs[1:])) == 1 and not counters["graph_break"]


def test_a_run(tmp_path):
    cfg = Config(
        mixer="afno,attn",
        output_dir=str(tmp_path),
        num_iterations=20,
        warmup_iters=0,
        warmdown_iters=0,
        val_tokens=16384,
        train_loss_every=5,
        device="cuda",
    )
    assert main(cfg) < 5.0                                  # ln 256 = 5.5 at the start
    assert "peak_memory" in next(tmp_path.glob("*/log.txt")).read_text()
