"""Our tokenizers as files of the tokenizers library, by which transformers knows them."""

from data.text import GPT2_PATTERN, QWEN_PATTERN, byte_characters

END = "<|endoftext|>"
# {tokenizer of text.py: (how it cuts a text into words, what it does to the text before)}
CUTS = {"bytes": (None, None), "gpt2": (GPT2_PATTERN, None),
        "qwen": (QWEN_PATTERN, {"type": "NFC"})}

CHARACTER = {b: c for c, b in byte_characters().items()}


def halves(token, ranks):
    """The two tokens that a token is merged from: all merges of a lower rank, lowest first."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def spell(token):
    """A token in GPT-2's visible spelling."""
    return "".join(CHARACTER[b] for b in token)


def tokenizer_files(name, tokenizer, T):
    """{file: content} of the tokenizers library, by what sample.make_tokenizer gave."""
    count = tokenizer.size if tokenizer.stop is None else tokenizer.stop
    ranks = {tokenizer.decode([i]): i for i in range(count)}
    merges = [[spell(half) for half in halves(token, ranks)] for token in ranks if len(token) > 1]
    pattern, normalizer = CUTS[name]
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    cuts = [level]
    if pattern:
        cuts = [dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False),
                level]
    ends = {}
    added = []
    if tokenizer.stop is not None:
        ends = dict(bos_token=END, eos_token=END)
        added = [dict(id=tokenizer.stop, content=END, single_word=False, lstrip=False,
                      rstrip=False, normalized=False, special=True)]
    vocab = {spell(token): i for token, i in ranks.items()}
    return {
        "tokenizer.json": dict(
            version="1.0", truncation=None, padding=None, added_tokens=added,
            normalizer=normalizer, pre_tokenizer=dict(type="Sequence", pretokenizers=cuts),
            post_processor=None, decoder=level,
            model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                       end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, vocab=vocab,
                       merges=merges)),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", model_max_length=T,
            clean_up_tokenization_spaces=False, **ends),
    }
