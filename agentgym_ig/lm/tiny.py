"""The small policy: a Qwen3 of about 0.15 million parameters and a tokenizer that gives TinyWiki one token a word."""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from agentgym_ig.tinywiki.names import BASE_WORDS, FIRST_WORDS, LAST_WORDS
from agentgym_ig.tinywiki.world import RELATIONS, SCHEMA

TAGS = tuple(f"<{slash}{tag}>" for tag in ("think", "search", "information", "answer") for slash in ("", "/"))
_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A lossless tokenizer: a token per TinyWiki word, single bytes for all other text.

    Tags are tokens of their own and may touch the words beside them.
    """
    linking = {word for relations in SCHEMA.values() for word, _ in relations.values()}
    words = ["What", "is", "the", "of", "a", "nothing", *SCHEMA, *RELATIONS, *sorted(linking)]
    words += [*FIRST_WORDS[:BASE_WORDS], *LAST_WORDS[:BASE_WORDS]]
    pieces = [*(f"▁{word}" for word in words), "▁", ",", ".", "?"]
    seldom, often = -20.0, -1.0  # log scores
    vocabulary = [("<unk>", seldom), *((f"<0x{byte:02X}>", seldom) for byte in range(256))]
    vocabulary += [(piece, often) for piece in dict.fromkeys(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", padding_side="left")
    fast.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    # Added, not in the vocabulary above: so text that spells one can be told from the token itself.
    fast.add_special_tokens({"pad_token": "<pad>", "eos_token": "<eos>"})
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def tiny_model(seed: int = 0) -> Qwen3ForCausalLM:
    """The untrained small policy, its weights drawn from the seed."""
    tokenizer = tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
