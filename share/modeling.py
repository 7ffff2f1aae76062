"""A model of spectral-nanogpt for transformers: AutoModelForCausalLM, trust_remote_code=True.

A copy of this file stands in a folder that export.py has written, beside gpt.py (the model, taken
from train_gpt2.py) and the files it imports. Needs torch and transformers.

Letters: B batch, T time, V vocabulary.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .decode import Context
from .gpt import GPT, Config


class SpectralConfig(PretrainedConfig):
    """config.json; `spectral_nanogpt` holds the fields of train_gpt2.Config."""
    model_type = "spectral_nanogpt"

    def __init__(self, spectral_nanogpt=None, **common):
        self.spectral_nanogpt = spectral_nanogpt
        super().__init__(**common)


class SpectralForCausalLM(PreTrainedModel, GenerationMixin):
    """input_ids (B, T) -> logits (B, T, V). `generate` carries the mixers' states, as decode.py.

    Padding belongs behind the tokens, where causal models do not see it; in front of them it is a
    ValueError.
    """
    config_class = SpectralConfig
    _tied_weights_keys = {"gpt.head.weight": "gpt.wte.weight"}

    def __init__(self, config: SpectralConfig):
        super().__init__(config)
        # JSON knows no tuples.
        settings = {name: tuple(value) if isinstance(value, list) else value
                    for name, value in config.spectral_nanogpt["settings"].items()}
        self.gpt = GPT(Config(**settings))
        self.post_init()

    def _init_weights(self, module):
        """Nothing: GPT has done it."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading leaves tables that are no weights, such as sines, without content.
        with torch.device("cpu"):
            tables = dict(type(model.gpt)(model.gpt.cfg).named_buffers())
        for name, buffer in model.gpt.named_buffers():
            buffer.copy_(tables[name])
        return loaded

    def get_input_embeddings(self):
        return self.gpt.wte

    def set_input_embeddings(self, embedding):
        self.gpt.wte = embedding

    def get_output_embeddings(self):
        return self.gpt.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                labels: Tensor | None = None, decoding: Context | None = None, **kwargs):
        """labels (B, T), -100 for none: each is predicted from the tokens before it.

        decoding: what has seen some of input_ids already; only the last logits come then, (B, 1, V).
        """
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("padding in front of a text would be read as text: give rows of one "
                             "length, or padding_side='right' where nothing is generated")
        if decoding is not None:
            logits = decoding.behind(input_ids)[:, None].to(self.gpt.head.weight)
            return CausalLMOutput(logits=logits)
        if input_ids.size(1) > self.gpt.cfg.sequence_length:
            raise ValueError(f"{input_ids.size(1)} tokens: this model takes at most "
                             f"{self.gpt.cfg.sequence_length} at once")
        logits = self.gpt(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    # What `generate` calls.

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        """The mixers' states are in `decoding`; without use_cache a token costs a whole forward."""
        if generation_config.use_cache is not False:
            model_kwargs["decoding"] = State(self.gpt, 0)

    def prepare_inputs_for_generation(self, input_ids, decoding=None, attention_mask=None,
                                      **kwargs):
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("generate takes rows of one length, without padding")
        if decoding is None:
            input_ids = input_ids[:, -self.gpt.cfg.sequence_length:]
        return dict(input_ids=input_ids, decoding=decoding)


class State(Context):
    """decode.py's, which is told the whole rows every time: beams may have exchanged them."""
    def behind(self, ids: Tensor) -> Tensor:
        """Tokens (B, n) -> logits (B, V) behind them, where at least one is new."""
        ids = ids.cpu()
        if not torch.equal(ids[:, :self.ids.size(1)], self.ids):
            self.state = None
        self.ids = ids
        return self.logits()
