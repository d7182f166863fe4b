"""Untrained encoders and cross-encoders of a few thousand weights, saved as model folders like those of the hub."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from transformers import BertModel as Bert

from agentgym_ig.tinywiki import World

MOST_TOKENS = 64


def save_encoder(folder: Path, seed: int = 0, prompts: dict[str, str] | None = None, size: int = 32) -> Path:
    """A BERT; with `prompts` also the two files that sentence-transformers adds, pooling by the first token."""
    _save_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Bert(_config(folder, size)).save_pretrained(folder)
    if prompts is not None:
        modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
        listed = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ]
        (folder / "modules.json").write_text(json.dumps(listed))
        (folder / "1_Pooling").mkdir()
        pooling = {"word_embedding_dimension": size, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder


def save_cross_encoder(folder: Path, labels: int = 1) -> Path:
    """A BERT that scores pairs."""
    _save_tokenizer(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = _config(folder, 32)
        config.num_labels = labels
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def _config(folder: Path, size: int) -> BertConfig:
    return BertConfig(
        vocab_size=len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]),
        hidden_size=size,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * size,
        max_position_embeddings=MOST_TOKENS,
        initializer_range=0.5,
    )


def _save_tokenizer(folder: Path) -> None:
    words = sorted(
        {word for passage in World(0).passages for word in f"{passage.title} {passage.text}".lower().split()}
    )
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "query", "passage", "prompt", ":", *words]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(known))}, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    marks = [(mark, tokenizer.token_to_id(mark)) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", marks)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MOST_TOKENS,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)


def by_transformers(
    folder: Path, lines: list[str], pooling: str = "mean", most: int | None = None
) -> NDArray[np.float32]:
    """Unit vectors of lines, one line at a time, with transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors: list[torch.Tensor] = []
    with torch.inference_mode():
        for line in lines:
            tokens = tokenizer(line, return_tensors="pt", truncation=True, max_length=most or MOST_TOKENS)
            states = model(**tokens).last_hidden_state[0]
            vectors.append({"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling])
    return torch.nn.functional.normalize(torch.stack(vectors), dim=1).numpy()
