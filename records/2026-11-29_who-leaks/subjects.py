"""Models that packages publish, small enough for the lab. Nothing of this repository is in it."""


def gmlp():
    from g_mlp_pytorch import gMLP
    return gMLP(num_tokens=64, dim=64, depth=2, seq_len=151, causal=True)


def aft_full():
    from aft_pytorch import AFTFull
    return AFTFull(max_seqlen=151, dim=64)


def aft_simple():
    from aft_pytorch import AFTSimple
    return AFTSimple(max_seqlen=151, dim=64)


def gss():
    from gated_state_spaces_pytorch.gss import GatedStateSpacesLM
    return GatedStateSpacesLM(num_tokens=64, dim=64, depth=2, dim_expansion_factor=2)


def dsconv():
    from gated_state_spaces_pytorch.dsconv import GatedDsConvLM
    return GatedDsConvLM(num_tokens=64, dim=64, depth=2)


def exponential_smoothing():
    from gated_state_spaces_pytorch.mhesa import GatedExponentialSmoothingLM
    return GatedExponentialSmoothingLM(num_tokens=64, dim=64, depth=2)


def gateloop():
    from gateloop_transformer import Transformer
    return Transformer(num_tokens=64, dim=64, depth=2, use_gate_looped_attn=True)


def simple_gateloop():
    from gateloop_transformer import SimpleGateLoopLayer
    return SimpleGateLoopLayer(dim=64)


def mega():
    from mega_pytorch import Mega
    return Mega(num_tokens=64, dim=64, depth=2)


def x_transformer():
    from x_transformers import Decoder, TransformerWrapper
    return TransformerWrapper(num_tokens=64, max_seq_len=151,
                              attn_layers=Decoder(dim=64, depth=2, heads=4))


def performer():
    from performer_pytorch import PerformerLM
    return PerformerLM(num_tokens=64, max_seq_len=152, dim=64, depth=2, heads=4, causal=True)


def topogpt():
    from topogpt3.model import TopoGPT2, TopoGPT2Config
    return TopoGPT2(TopoGPT2Config(SCALE="micro", VOCAB_SIZE=64, DEVICE="cpu"))


def topogpt_no_window():
    from topogpt3.model import TopoGPT2, TopoGPT2Config
    config = TopoGPT2Config(SCALE="micro", VOCAB_SIZE=64, DEVICE="cpu")
    config.ATTN_WINDOW = 0
    return TopoGPT2(config)


def axiom():
    from axiomlm.models.transformer import ModelConfig, Transformer
    return Transformer(ModelConfig(block_size=151, vocab_size=64, n_layer=2, n_head=4, n_embd=64))


def spectrans(name, layers=2):
    """A language model of that name, at small size."""
    import spectrans.models as models
    return getattr(models, name)(vocab_size=64, hidden_dim=64, num_layers=layers,
                                 max_sequence_length=151)


def fno_decoder():
    return spectrans("FNODecoder")


def lst_decoder():
    return spectrans("LSTDecoder")


def wavelet_decoder():
    return spectrans("WaveletDecoder")
