"""Decoding: what a model writes behind a prompt, token by token, several samples at once.

What Block and GPT of train_gpt2.py do with states stands first: no training run needs it. The
mixers' states are carried from token to token, and a prompt is one forward. A state holds T
tokens. Where a text grows longer, decoding starts anew from its last T/2 tokens, so the model sees
T/2 to T of the past. Where a mixer has no step, the last T tokens are run for every token.

Letters: B samples, T the model's sequence_length, V vocabulary.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# The model, token by token

class BlockDecoding:
    """Of a Block: the states of its mixer and of the convolutions behind its branches."""
    def init_state(self, B: int) -> tuple:
        """The states before the first token: of the mixer, of the convolutions behind branches."""
        return tuple(m.init_state(B) for m in (self.mixer, self.mixer_conv, self.mlp_conv))

    def prefill(self, x: Tensor, v1: Tensor | None = None, views: dict | None = None,
                age: Tensor | None = None):
        """A prompt: forward's output, and the states behind it."""
        x, h = self.norm.mixer(x)
        y, state = self.mixer.prefill(h, v1, *self.seen(views, age))
        x, h = self.join(x, self.mixer_conv(y, age=age))
        z = self.mlp(h)
        states = state, self.mixer_conv.state_behind(y), self.mlp_conv.state_behind(z)
        return self.end(x, self.mlp_conv(z, age=age)), states

    def step(self, x: Tensor, states: tuple, v1: Tensor | None = None, *age: Tensor):
        """One token, (B, C) and the states, its age (B,) -> (B, C), the next states."""
        state, behind_mixer, behind_mlp = states
        x, h = self.norm.mixer(x)
        y, state = self.mixer.step(h, state, v1, *age)
        y, behind_mixer = self.mixer_conv.step(y, behind_mixer, *age)
        x, h = self.join(x, y)
        y, behind_mlp = self.mlp_conv.step(self.mlp(h), behind_mlp, *age)
        return self.end(x, y), (state, behind_mixer, behind_mlp)


class Decoding:
    """Of a GPT: the states of its blocks, the time, where the rows' documents start."""
    def init_state(self, B: int):
        """What decoding B rows starts from: the mixers' states, the time, the documents' starts."""
        begin = next(self.parameters()).new_zeros(B, dtype=torch.long)
        return [block.init_state(B) for block in self.blocks], 0, begin

    def prefill(self, idx: Tensor):
        """A prompt, idx (B, T), T >= 1 -> the logits behind it (B, V), the state behind it."""
        at, views, begin = self.sight(idx)
        age = None if begin is None else at
        states = []

        def run(i, x, v1):
            x, state = self.blocks[i].prefill(x, v1, views, age)
            states.append(state)
            return x

        h = self.trunk(idx, at, run)
        begin = torch.zeros_like(idx[:, 0]) if begin is None else begin[:, -1]
        return self.logits(h[:, -1:])[:, 0], (states, idx.size(1), begin)

    def step(self, idx: Tensor, state):
        """One token, idx (B,) -> logits (B, V), the next state; the old one is used up.

        The same numbers as forward's column t, at the cost of one column.
        """
        states, t, begin = state
        states = list(states)
        age = ()
        if self.mask_documents:
            begin = torch.where(idx == self.cfg.document_token, t, begin)
            age = (t - begin,)

        def run(i, x, v1):
            if v1 is not None:
                v1 = v1[:, 0]
            x, states[i] = self.blocks[i].step(x[:, 0], states[i], v1, *age)
            return x[:, None]

        h = self.trunk(idx[:, None], t - begin[:, None], run)
        return self.logits(h)[:, 0], (states, t + 1, begin)


# --------------------------------------------------------------------------------------------------
# Texts

class Context:
    """B rows of tokens, and the model's state behind as many of them as it has seen."""
    def __init__(self, model, rows: int):
        mixers = [block.mixer for block in model.blocks]
        self.model = model
        self.device = next(model.parameters()).device
        self.T = model.cfg.sequence_length
        self.decodes = all(hasattr(mixer, "step") for mixer in mixers)
        self.prefills = all(hasattr(mixer, "prefill") for mixer in mixers)
        self.ids = torch.empty(rows, 0, dtype=torch.long)
        self.first = 0                               # where the state's window begins
        self.state = None                            # (of the mixers, tokens seen, ...)

    def add(self, ids: Tensor):
        """Append (B, n) tokens."""
        self.ids = torch.cat((self.ids, ids), dim=1)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """-> (B, V) behind all tokens, in fp64 on the CPU. One of them must be new."""
        n = self.ids.size(1)
        if not self.decodes:
            return self.model(self.ids[:, -self.T:].to(self.device))[:, -1].double().cpu()
        if n - self.first > self.T:
            # A state holds T tokens, so that one token more would move it at every token.
            keep = self.T if self.state is None else max(1, self.T // 2)
            self.state = None
            self.first = n - keep
        seen = self.state[1] if self.state else 0
        new = self.ids[:, self.first + seen:].to(self.device)
        if self.state is None and self.prefills:
            logits, self.state = self.model.prefill(new)
        else:
            self.state = self.state or self.model.init_state(len(new))
            for column in new.unbind(1):
                logits, self.state = self.model.step(column, self.state)
        return logits.double().cpu()


def probabilities(logits: Tensor, temperature=1.0, top_k=0, top_p=1.0) -> Tensor:
    """Logits (B, V) -> what tokens are drawn with, (B, V).

    Temperature 0 is the likeliest token alone. top_k leaves the k likeliest (0: all), then top_p
    the fewest of them, likeliest first, that together have that share (Holtzman et al., arXiv
    1904.09751). Of equals the smaller id is the likelier.
    """
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).type_as(logits)
    p = F.softmax(logits / temperature, dim=-1)
    if not top_k and top_p == 1:
        return p
    p, order = p.sort(dim=-1, descending=True, stable=True)
    if top_k:
        p[:, top_k:] = 0
    before = p.cumsum(-1) - p                        # the share of those likelier than it
    p[before >= top_p * p.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(p).scatter(1, order, p / p.sum(-1, keepdim=True))


def generate(context: Context, n: int, generators, size=None, stop=None, at_least=0, **choice):
    """Yield the next tokens of the B rows, n times: [id, or None behind the row's end].

    A row ends at `stop`, which cannot come in the first `at_least` tokens. Ids from `size` on are
    padding. A row draws from its own generator: it does not depend on the others. choice: of
    `probabilities`.
    """
    ended = torch.zeros(len(generators), dtype=torch.bool)
    for i in range(n):
        logits = context.logits()[:, :size]
        if stop is not None and i < at_least:
            logits[:, stop] = -torch.inf
        p = probabilities(logits, **choice)
        rows = [torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators)]
        tokens = torch.stack(rows)                   # (B, 1)
        if stop is not None:
            ended |= tokens[:, 0] == stop
        if ended.all():
            return
        context.add(tokens)
        yield [None if end else int(token) for token, end in zip(tokens, ended)]
