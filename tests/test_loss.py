"""linear_cross_entropy against F.cross_entropy of explicit logits, and what it keeps in memory."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import linear_cross_entropy, softcap

M, C, V, ROWS = 37, 8, 50, 64                               # 37: no chunk below divides it


def draw(dtype=torch.float64, scale=1.0):
    torch.manual_seed(0)
    h, W = scale * torch.randn(M, C, dtype=dtype), torch.randn(ROWS, C, dtype=dtype)
    return h.requires_grad_(), W.requires_grad_(), torch.randint(V, (M,))


def plain(h, W, y, cap, vocab):
    return F.cross_entropy(softcap(F.linear(h, W), cap)[:, :vocab], y)


@pytest.mark.parametrize("chunk", [1, 10, 37, 100, None])
@pytest.mark.parametrize("vocab", [V, None])
@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_value_and_gradients(cap, vocab, chunk):
    h, W, y = draw()
    results = []
    for loss in (linear_cross_entropy(h, W, y, cap, vocab, chunk), plain(h, W, y, cap, vocab)):
        # an upstream gradient, too
        results.append((loss, *torch.autograd.grad(3.0 * loss, (h, W))))
    for ours, reference in zip(*results):
        assert torch.allclose(ours, reference, rtol=1e-12, atol=1e-14)
    assert vocab is None or not results[0][2][vocab:].any()


def test_padding_is_never_predicted():
    h, W, y = draw()
    with torch.no_grad():
        W[V:] = 1e4
    assert torch.allclose(linear_cross_entropy(h, W, y, 15.0, V, 10), plain(h, W[:V], y, 15.0, V))


def test_large_logits_do_not_overflow():
    h, W, y = draw(scale=1e4)
    loss = linear_cross_entropy(h, W, y, 0.0, V, 10)
    assert torch.allclose(loss, plain(h, W, y, 0.0, V)) and loss.isfinite()


def test_tied_weight_gets_both_gradients():
    (_, W, y), idx = draw(), torch.randint(V, (M,))
    losses = [f(F.embedding(idx, W).tanh(), W, y, 5.0, V) for f in (linear_cross_entropy, plain)]
    grads = [torch.autograd.grad(loss, W)[0] for loss in losses]
    assert torch.allclose(*grads, rtol=1e-12)


def test_bfloat16_autocast():
    h, W, y = draw(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, W, y, 15.0, V, 10)
    dh, dW = torch.autograd.grad(loss, (h, W))
    exact = plain(h, W, y, 15.0, V)
    assert loss.dtype == dh.dtype == dW.dtype == torch.float32 and abs(loss - exact) < 2e-3 * exact
    for ours, reference in zip((dh, dW), torch.autograd.grad(exact, (h, W))):
        assert (ours - reference).norm() < 1e-2 * reference.norm()


def test_without_gradients():
    h, W, y = draw()
    with torch.no_grad():
        loss = linear_cross_entropy(h, W, y, 2.0, V, 10)
    assert not loss.requires_grad and torch.allclose(loss, plain(h, W, y, 2.0, V))


# the largest tensor any operation returns
class Sizes(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.largest = max(self.largest, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def test_logits_are_never_whole():
    h, W, y = draw()
    with Sizes() as ours:
        linear_cross_entropy(h, W, y, 2.0, V, 10).backward()
    with Sizes() as reference:
        plain(h, W, y, 2.0, V).backward()
    assert ours.largest <= 10 * ROWS and reference.largest == M * ROWS


def test_default_chunk_is_bounded():
    h, W, y = torch.zeros(3000, 1), torch.zeros(50304, 1), torch.zeros(3000, dtype=torch.int64)
    with torch.no_grad(), Sizes() as sizes:
        linear_cross_entropy(h, W, y)
    assert sizes.largest <= 2**27
