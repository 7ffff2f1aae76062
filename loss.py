"""Cross-entropy of a linear head, exact, without ever holding (tokens x vocabulary) logits.

At 124M parameters and 16,384 tokens a micro-batch the full fp32 logits are 3.1 GiB, and their gradient as much again.
The idea is that of cut cross-entropy (arXiv 2411.09009) and Liger's fused linear cross-entropy, in plain torch.
"""
import math

import torch


def softcap(z, cap):
    return cap * torch.tanh(z / cap) if cap else z


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of softcap(h W^T) against y without ever holding all (tokens, V) logits.

    Each chunk of rows computes its logits in fp32, its loss and its gradients, and forgets them: backward only scales.
    h (M, C), W (rows, C), y (M,). W's rows from `vocab` on are padding: never predicted, no gradient. So are targets
    below 0: they count neither in the sum nor in the number that divides it.
    """
    @staticmethod
    def forward(ctx, h, W, y, cap, vocab, chunk):
        dtype = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype
        Wc, M = W.to(dtype), len(h)
        loss, dh, dW = h.new_zeros((), dtype=torch.promote_types(h.dtype, torch.float32)), torch.empty_like(h), None
        n = (y >= 0).sum().clamp(min=1).to(loss.dtype)
        for i in (chunk * c for c in range(-(-M // chunk))):        # range(0, M, chunk) would compile every M anew
            hc, yc, counts = h[i:i + chunk].to(dtype), y[i:i + chunk, None].clamp(min=0), y[i:i + chunk, None] >= 0
            z = softcap((hc @ Wc.T).to(loss.dtype), cap)
            slope = 1 - (z / cap).square() if cap else None  # of the soft-cap, taken before the padding is masked
            z[:, vocab:] = -math.inf
            lse = torch.logsumexp(z, dim=-1, keepdim=True)
            loss += torch.where(counts, lse - z.gather(1, yc), 0).sum() / n
            if ctx.needs_input_grad[0]:
                p = torch.exp(z - lse)
                p.scatter_add_(1, yc, torch.full_like(lse, -1.0))
                p = (p * slope if cap else p).mul_(counts / n).to(dtype)
                dh[i:i + chunk] = p @ Wc
                g = (p.T @ hc).to(loss.dtype)
                dW = g if dW is None else dW.add_(g)
        ctx.save_for_backward(dh, dW)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        dh, dW = ctx.saved_tensors
        return dh * dloss, dW * dloss, None, None, None, None


def linear_cross_entropy(h, W, y, cap=0.0, vocab=None, chunk=None):
    """Mean cross-entropy in nats of logits softcap(h W^T): h (M, C), W (rows, C), y (M,) -> scalar, fp32 or wider.

    Targets below 0 are ignored: the mean is over the others. Same loss as F.cross_entropy(ignore_index=-1).
    `chunk` rows of logits live at a time (default: about 2^27 logits, 512 MiB in fp32).
    """
    vocab = vocab or W.size(0)
    return LinearCrossEntropy.apply(h, W, y, cap, vocab, chunk or max(1, 2**20 // W.size(0)) * 128)
