"""Chat formats of real model families, each with a small byte-level BPE tokenizer that knows its special tokens, and
policies that have learnt a few conversations by heart.

The templates are written here as facts of the formats, in our own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agentgym_ig.lm.encode import OBSERVED, ConversationEncoder, Encoded
from agentgym_ig.lm.policy import TransformersPolicy
from agentgym_ig.prompts import PROMPTS
from agentgym_ig.types import Conversation, Message


@dataclass(frozen=True)
class Format:
    """A family's template, its special tokens (the end of a turn first), and tokens that are whole but not special."""

    template: str
    special: tuple[str, ...]
    plain: tuple[str, ...] = ()


_CHATML = (
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

# Thoughts of answers before the last question are dropped, and an answer after it gets an empty thought.
_THINKING = (
    "{%- set last = namespace(asked=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.asked = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}"
    "{%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- elif m.role == 'assistant' %}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > last.asked and loop.last %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
    "{{- said + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

_LLAMA = (
    "{{- bos_token }}"
    "{%- for m in messages %}"
    "{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{{- (m.content | tojson if m.role == 'tool' else m.content | trim) + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)

_GEMMA = (
    "{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}{{- raise_exception('no system role') }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{%- endif %}"
    "{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{- m.content | trim + '<end_of_turn>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"
)

# The system's text stands in the last question; what a tool says is not shown.
_MISTRAL = (
    "{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{{- bos_token }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}"
    "{{- '[INST] ' + (system if loop.last else '') + m.content + ' [/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}{%- endif %}"
    "{%- endfor %}"
)

_QWEN_PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_QWEN = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")

FORMATS = {
    "chatml": Format(_CHATML, _QWEN, _QWEN_PLAIN),
    "thinking": Format(_THINKING, _QWEN, _QWEN_PLAIN),
    "llama-3": Format(
        _LLAMA,
        tuple("<|eot_id|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eom_id|> <|end_of_text|>".split()),
    ),
    "gemma": Format(_GEMMA, ("<end_of_turn>", "<bos>", "<eos>", "<pad>", "<start_of_turn>")),
    "mistral": Format(_MISTRAL, ("</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]")),
}

_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LINES = [
    *("Marie Curie, born in Warsaw, discovered radium and polonium in 1898.\n", "U.S.</answer>\n", "No.\n\n"),
    *("Yes!</answer>", "東京都は日本の首都です。</answer>", "São Paulo (1554)</answer>", "<search>x</search>\n"),
]


@cache
def tokenizer(name: str) -> Any:
    """The family's tokenizer. Its merges cross from an answer's last character into what follows (`.</`, `.\\n`)."""
    own = FORMATS[name]
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_PIECES), "isolated"), to_bytes])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=True)
    lines = [text for prompt in PROMPTS.values() for text in (prompt.question, prompt.system)] + _LINES * 50
    bpe.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, padding_side="left")
    fast.add_special_tokens({"eos_token": own.special[0], "pad_token": own.special[-1], "bos_token": own.special[1]})
    fast.add_tokens([AddedToken(text, normalized=False, special=True) for text in own.special], special_tokens=True)
    fast.add_tokens([AddedToken(text, normalized=False, special=False) for text in own.plain])
    fast.chat_template = own.template
    return fast


def said(name: str, text: str, *, ended: bool = False) -> Message:
    """What a policy sampled: a token a character, as nobody would tokenise it."""
    own = tokenizer(name)
    ids = [token for character in text for token in own(character, add_special_tokens=False)["input_ids"]]
    return Message("assistant", text, (*ids, *([own.eos_token_id] if ended else [])))


def parrot(name: str, lessons: tuple[Conversation, ...], **settings: Any) -> TransformersPolicy:
    """A real small policy that says after each opening and reply what the lessons say there."""
    own = tokenizer(name)
    size: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(own), max_position_embeddings=16_384, **size))
    encoded = [ConversationEncoder(own).encode(lesson) for lesson in lessons]
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        losses = [_loss(model, each) for each in encoded]
        if max(float(loss.detach()) for loss in losses) < 0.02:
            break
        optimiser.zero_grad()
        sum(losses).backward()
        optimiser.step()
    return TransformersPolicy(model.eval(), own, temperature=0, **settings)


def _loss(model: Any, lesson: Encoded) -> Any:
    ids, own = torch.tensor(lesson.ids), torch.tensor(lesson.turn[1:]) != OBSERVED
    return torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1][own], ids[1:][own])
