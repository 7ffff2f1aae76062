"""What a model makes of tokens: log-probabilities of given ones, and what it writes behind prompts.

The parts that evals.py gives to lm-eval, in ids instead of text. Rows of a batch are padded on the
right, which a causal model does not see, and go by length, the longest first.

Letters: B rows of a batch, T the model's sequence_length, C channels, V vocabulary.
"""
from collections import defaultdict

import torch
from torch import Tensor

from support.decode import Context, generate
from train_gpt2 import GPT

# Tokens whose logits exist at a time: 200 MB with GPT-2's vocabulary.
LOGITS = 1024


def pieces(context, continuation, T: int):
    """Ids -> [(context, continuation)] that score every token of the continuation once.

    T tokens at a time, each piece behind as many tokens as T + 1 leave room for: of one piece the
    left end is cut, as lm-eval's hf model does; several are its rolling windows.
    """
    whole = [*context, *continuation]
    for begin in range(len(context), len(whole), T):
        end = min(begin + T, len(whole))
        yield whole[max(0, end - T - 1):begin], whole[begin:end]


@torch.no_grad()
def score(model: GPT, pairs, batch_size: int, tell=lambda done, of: None):
    """[(context, continuation)] of ids -> [(log-probability, is each token the likeliest?)].

    In nats, summed over the continuation. A context has at least one token. tell(done, of) hears
    how many rows have gone.
    """
    device = next(model.parameters()).device
    rows = defaultdict(list)
    for pair, (context, continuation) in enumerate(pairs):
        for before, tokens in pieces(context, continuation, model.cfg.sequence_length):
            # What reads the same is one row: the answers A, B, C and D to a question.
            rows[*before, *tokens[:-1]].append((pair, tokens))
    order = sorted(rows, key=len, reverse=True)
    total = torch.zeros(len(pairs), dtype=torch.float64)
    misses = torch.zeros(len(pairs), dtype=torch.long)
    for first in range(0, len(order), batch_size):
        batch = order[first:first + batch_size]
        idx = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
        for b, row in enumerate(batch):
            idx[b, :len(row)] = torch.tensor(row)
        hidden = model.hidden(idx.to(device))                        # (B, T, C)
        for part in torch.tensor(scored(batch, rows)).split(LOGITS):
            b, t, target, pair = part.unbind(1)
            log_p, hit = of_targets(model, hidden[b.to(device), t.to(device)], target.to(device))
            total.index_add_(0, pair, log_p.cpu().double())
            misses.index_add_(0, pair, (~hit).cpu().long())
        tell(first + len(batch), len(order))
    return list(zip(total.tolist(), (misses == 0).tolist()))


def scored(batch, rows):
    """[(row of the batch, time, the token that follows, its pair)] of all that is asked for."""
    return [(b, t, token, pair) for b, row in enumerate(batch) for pair, tokens in rows[row]
            for t, token in enumerate(tokens, len(row) - len(tokens))]


def of_targets(model: GPT, hidden: Tensor, target: Tensor):
    """hidden (N, C), target (N,) -> the targets' log-probabilities, are they the likeliest?"""
    z = model.logits(hidden)                                         # (N, V)
    return z.gather(1, target[:, None])[:, 0] - z.logsumexp(-1), z.argmax(-1) == target


def write(model: GPT, tokenizer, requests, batch_size: int, tell=lambda done, of: None):
    """[(ids, n, stops, choice)] -> texts of at most n tokens, each up to the first of its stops.

    choice: temperature, top_k and top_p, of decode.probabilities, as a tuple of pairs. Only prompts
    of one length share a batch, for a state has no padding.
    """
    T = model.cfg.sequence_length
    alike = defaultdict(list)
    for i, (ids, n, stops, choice) in enumerate(requests):
        ids = ids[-kept(T, n):]
        alike[len(ids), n, tuple(stops), choice].append((i, ids))
    texts = [""] * len(requests)
    done = 0
    for (_, n, stops, choice), prompts in sorted(alike.items(), reverse=True):
        for first in range(0, len(prompts), batch_size):
            batch = prompts[first:first + batch_size]
            context = Context(model, len(batch))
            context.add(torch.tensor([ids for _, ids in batch]))
            for (i, _), text in zip(batch, continued(context, tokenizer, n, stops, dict(choice))):
                texts[i] = text
            done += len(batch)
            tell(done, len(requests))
    return texts


def kept(T: int, n: int) -> int:
    """How many of its last tokens a prompt keeps where n follow.

    lm-eval's hf model has T - n. Here at least T/2: support/decode.py says how a text grows beyond
    T.
    """
    return max(T - n, T // 2, 1)


def continued(context: Context, tokenizer, n: int, stops, choice) -> list[str]:
    """What the rows of a context go on with; it ends where every row has met a stop."""
    rows = context.ids.size(0)
    generators = [torch.Generator().manual_seed(i) for i in range(rows)]
    written = [[] for _ in range(rows)]
    texts = [""] * rows
    for column in generate(context, n, generators, tokenizer.size, tokenizer.stop, **choice):
        for i, token in enumerate(column):
            if token is not None:
                written[i].append(token)
                texts[i] = tokenizer.decode(written[i]).decode(errors="replace")
        if all(token is None or any(stop in text for stop in stops)
               for token, text in zip(column, texts)):
            break
    return [cut(text, stops) for text in texts]


def cut(text: str, stops) -> str:
    """The text before the first of the stops."""
    return text[:min((text.index(stop) for stop in stops if stop in text), default=None)]
