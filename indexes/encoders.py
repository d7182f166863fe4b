"""Encoders: models that turn queries and passages into vectors, each with its own prefixes and pooling."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from agentgym_ig.errors import IndexUnusable
from agentgym_ig.provenance import file_sha256
from agentgym_ig.text import clean
from agentgym_ig.types import Passage, texts

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

Vectors = NDArray[np.float32]
Precision = Literal["float32", "bfloat16", "float16"]
Pooling = Literal["mean", "cls", "last"]
POOLING = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
"""Our names for how a text's tokens become one vector, and sentence-transformers' names."""
EXTRA = "the extra [dense]: pip install 'agentgym_ig[dense]'"

_WEIB = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the authors of a family of models say about how to use them."""

    query_prefix: str = ""
    passage_prefix: str = ""
    pooling: Pooling = "mean"


FAMILIES: dict[str, Family] = {
    r"e5-mistral": Family(query_prefix=_WEIB, pooling="last"),
    r"e5.*-instruct": Family(query_prefix=_WEIB),
    r"(^|-)e5(-|$)": Family(query_prefix="query: ", passage_prefix="passage: "),
    r"bge-.*-en": Family(query_prefix="Represent this sentence for searching relevant passages: ", pooling="cls"),
    r"bge-m3": Family(pooling="cls"),
    r"gte-.*-en-v1": Family(pooling="cls"),
    r"qwen3-embedding": Family(query_prefix=_WEIB.rstrip(" "), pooling="last"),
}
"""By a pattern for the last part of the model's name; the first that matches counts. Used only where the model's own
files say nothing: its `prompts` and its `modules.json` come first. Any other model: no prefix, mean."""

CONFIGURATION = (
    "config.json", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "*/config.json",
)  # fmt: skip
TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "*.model")
"""With the first of them a tokenizer is whole; only without it do the others count."""
WEIGHTS = ("*.safetensors", "*/*.safetensors")
LEFT_OUT = ("onnx/*", "openvino/*", "original/*")
"""Copies of the weights in other formats."""


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """Which model, and how to use it. What is None is as the model says itself, or as its family is used."""

    model: str
    """A folder, or the full name (`owner/name`) of a model on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    query_prefix: str | None = None
    passage_prefix: str | None = None
    pooling: Pooling | None = None
    """`mean` over the tokens, the first (`cls`) or the `last`."""
    max_tokens: int | None = None
    """Tokens after which a text is cut; never more than the model can take."""
    normalise: bool = True
    """Scale vectors to length 1: the score is then the cosine."""

    def __post_init__(self) -> None:
        if self.pooling is not None and self.pooling not in POOLING:
            raise ValueError(f"pooling={self.pooling!r} must be one of {sorted(POOLING)}")
        if self.max_tokens is not None and self.max_tokens < 3:
            raise ValueError(f"max_tokens={self.max_tokens} must be 3 or more: two go to the marks at both ends")


class Encoder:
    """Embeds queries and passages with a sentence-transformers or plain transformers model.

    Nothing is loaded before it is needed. Passages are embedded in bfloat16 where the machine is faster with it
    (cosine to float32 about 0.9999), queries always in float32, so that a query's vector does not visibly depend on
    what else is in its batch.

    Args:
        settings: the model and its use.
        device: as torch names it; None takes a GPU if there is one.
        dtype: one precision for queries and passages alike, instead of the above.
    """

    def __init__(self, settings: EncoderSettings, device: str | None = None, dtype: Precision | None = None) -> None:
        self.settings, self._device, self._dtype = settings, device, dtype
        self._models: dict[str, SentenceTransformer] = {}

    def queries(self, given: Sequence[str]) -> Vectors:
        """Vectors of queries, (n, dimension)."""
        return self._embed(self._dtype or "float32", given, self.query_prefix)

    def passages(self, given: Sequence[Passage]) -> Vectors:
        """Vectors of passages, title before text, (n, dimension)."""
        return self._embed(self.passage_dtype, texts(given), self.passage_prefix)

    def describe(self) -> dict[str, Any]:
        """All that vectors depend on, as JSON: the settings with nothing left open, and the model's hash."""
        return {
            "model": self.settings.model,
            "revision": self.settings.revision,
            "commit": self._commit,
            "fingerprint": self.fingerprint,
            "query_prefix": self.query_prefix,
            "passage_prefix": self.passage_prefix,
            "pooling": self._pooling,
            "max_tokens": self.max_tokens,
            "normalise": self.settings.normalise,
            "passage_dtype": self.passage_dtype,
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the model's weights, configuration and tokenizer: equal for equal models, wherever they lie."""
        whole = hashlib.sha256()
        for path in _model_files(self.folder):
            whole.update(f"{path.relative_to(self.folder).as_posix()} {file_sha256(path)}\n".encode())
        return whole.hexdigest()

    @cached_property
    def folder(self) -> Path:
        """Where the model's files lie; see `model_folder`."""
        return model_folder(self.settings.model, self.settings.revision)

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return int(self._model(self._any_dtype).get_embedding_dimension() or 0)

    @property
    def query_prefix(self) -> str:
        """What stands before every query."""
        return self._prefixes[0]

    @property
    def passage_prefix(self) -> str:
        """What stands before every passage."""
        return self._prefixes[1]

    @property
    def max_tokens(self) -> int | None:
        """Tokens that are read of a text."""
        return self._model(self._any_dtype).max_seq_length

    @property
    def device(self) -> str:
        """Where the model runs."""
        return self._device or best_device()

    @property
    def passage_dtype(self) -> Precision:
        """The precision in which passages are embedded."""
        return self._dtype or ("bfloat16" if _fast_in_bfloat16(self.device) else "float32")

    @property
    def _any_dtype(self) -> str:
        return next(iter(self._models), self.passage_dtype)

    @property
    def _commit(self) -> str | None:
        return None if Path(self.settings.model).is_dir() else self.folder.name

    @property
    def _pooling(self) -> Pooling | None:
        """How to pool where it is not left to the model's own `modules.json`."""
        own = (self.folder / "modules.json").is_file()
        return self.settings.pooling or (None if own else _family(self.settings.model).pooling)

    @cached_property
    def _prefixes(self) -> tuple[str, str]:
        prompts = {name: text for name, text in self._model(self._any_dtype).prompts.items() if text}
        family = _family(self.settings.model)
        if prompts:
            own = [prompts[name] for name in ("document", "passage", "corpus") if name in prompts]
            family = Family(query_prefix=prompts.get("query", ""), passage_prefix=own[0] if own else "")
        query, passage = self.settings.query_prefix, self.settings.passage_prefix
        return (
            family.query_prefix if query is None else query,
            family.passage_prefix if passage is None else passage,
        )

    def _embed(self, dtype: Precision, given: Sequence[str], prefix: str) -> Vectors:
        model = self._model(dtype)
        if not given:
            return np.zeros((0, self.dimension), np.float32)
        lines = list(map(clean, given))
        if not all(map(str.strip, lines)) and not model.preprocess([""])["input_ids"].numel():
            # This tokenizer puts no marks around a text, and models fail on none at all.
            lines = [line if line.strip() else "." for line in lines]
        tensors: torch.Tensor = model.encode(
            lines,
            prompt=prefix,
            batch_size=256 if self.device.startswith("cuda") else 32,  # on a CPU the caches set the limit: measured
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        vectors: Vectors = tensors.float().cpu().numpy()
        if self.settings.normalise:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _model(self, dtype: str) -> SentenceTransformer:
        if dtype not in self._models:
            self._models[dtype] = self._load(dtype)
        return self._models[dtype]

    def _load(self, dtype: str) -> SentenceTransformer:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns in every process that forks
        try:
            import torch
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(f"an encoder needs {EXTRA}") from error
        with quiet_loading():
            model = SentenceTransformer(
                str(self.folder),
                device=self.device,
                local_files_only=True,
                model_kwargs={"dtype": getattr(torch, dtype), "use_safetensors": True},
            )
        if self._pooling is not None:
            _set_pooling(model, self._pooling)
        if self.settings.max_tokens is not None:
            model.max_seq_length = min(self.settings.max_tokens, model.max_seq_length or self.settings.max_tokens)
        return model.eval()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers from drawing a progress bar for every model that is opened."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def best_device() -> str:
    """A GPU if there is one, as torch names it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _family(model: str) -> Family:
    name = re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()
    return next((family for pattern, family in FAMILIES.items() if re.search(pattern, name)), Family())


def _set_pooling(model: SentenceTransformer, pooling: Pooling) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule

    for place, module in enumerate(model):
        if isinstance(module, PoolingModule):
            model[place] = PoolingModule(module.embedding_dimension, POOLING[pooling])
            return
    raise ValueError(f"pooling={pooling!r}: this model pools nothing (modules {[type(m).__name__ for m in model]})")


def _fast_in_bfloat16(device: str) -> bool:
    import torch

    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    can: dict[str, Any] = dict(getattr(torch.cpu, "get_capabilities", dict)())
    return device == "cpu" and any(can.get(name) for name in ("amx_bf16", "avx512_bf16", "sve_bf16"))


def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model; fetched from the hub if it is no folder itself, and not there yet.

    Raises IndexUnusable when there is no such model, or none that can be loaded without unpickling.
    """
    found = Path(model) if Path(model).is_dir() else _from_hub(model, revision)
    if not (found / "config.json").is_file() and not (found / "modules.json").is_file():
        raise IndexUnusable(f"no model in {found} (found no config.json); give a folder with one, or owner/name")
    if not _having(found, WEIGHTS):
        raise IndexUnusable(f"{found} holds no .safetensors; other weights are pickles, which are never loaded")
    return found


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*CONFIGURATION, *TOKENIZERS, *WEIGHTS]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=list(LEFT_OUT)))
    except (OSError, ValueError) as error:
        raise IndexUnusable(
            f"no model {name}{'@' + revision if revision else ''}: it is no folder, and the hub said "
            f"{str(error).splitlines()[0]!r}; give a model folder, or owner/name, and unset HF_HUB_OFFLINE to fetch it"
        ) from error


def _having(folder: Path, patterns: Sequence[str]) -> set[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path for path in found if not any(path.match(pattern) for pattern in LEFT_OUT)}


def _model_files(folder: Path) -> list[Path]:
    """Everything that vectors depend on, in a fixed order."""
    tokenizer = _having(folder, TOKENIZERS[:1]) or _having(folder, TOKENIZERS)
    return sorted(_having(folder, CONFIGURATION) | tokenizer | _having(folder, WEIGHTS))
