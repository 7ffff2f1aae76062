"""What a validation says besides its loss."""
import math

from torch import Tensor


def per_byte(loss: float, text_bytes: float | None) -> dict[str, float]:
    """A loss in nats per token, in bits; nothing where nobody counted the text's bytes.

    text_bytes: of the text, a token.
    """
    return {"bits_per_byte": loss / math.log(2) / text_bytes} if text_bytes else {}


def hit_rate(model, idx: Tensor, targets: Tensor) -> Tensor:
    """idx and targets (B, T) -> share of the targets that are the model's likeliest token, ()."""
    hits = 0
    # Whole logits: of some 4,096 tokens at a time.
    rows = max(1, 4096 // idx.size(1))
    for inputs, wanted in zip(idx.split(rows), targets.split(rows)):
        hits = hits + (model(inputs).argmax(-1) == wanted).sum()
    return hits / (targets >= 0).sum()


def results(loss: float, accuracy: float, bits: dict) -> dict[str, float]:
    """All of it, for test_metrics.txt. bits: of per_byte."""
    return dict(loss=loss, perplexity=math.exp(min(loss, 700)), accuracy=accuracy, **bits)
