"""The tokenizer: the model's own from its folder, or a byte-level one that needs no files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.config import ModelSection
from trainer.errors import ConfigError

PAD, END = "<|pad|>", "<|end|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

BYTE_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""Role token, content, end token; the assistant's content and end token are marked as generated."""


def open_tokenizer(section: ModelSection) -> Any:
    """The fast tokenizer that `section` names, with a chat template and a padding token.

    Raises ConfigError where the folder has no such tokenizer.
    """
    if section.tokenizer == "byte":
        return byte_tokenizer()
    folder = Path(section.tokenizer or str(section.pretrained_model_name_or_path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as problem:
        raise ConfigError(
            f"No tokenizer can be read in {folder}: {str(problem).splitlines()[0]}",
            remedy=f"ls {folder}  # tokenizer.json and tokenizer_config.json must be there",
            context={"key": "model.tokenizer", "folder": folder},
        ) from problem
    if not tokenizer.is_fast or tokenizer.chat_template is None:
        missing = "a chat template" if tokenizer.is_fast else "a fast version (tokenizer.json)"
        raise ConfigError(
            f"The tokenizer in {folder} has no {missing[2:]}, so the assistant's tokens can't be told apart.",
            remedy=f"add {missing} to {folder}, or set model.tokenizer to a folder that has one",
            context={"key": "model.tokenizer", "folder": folder},
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a UTF-8 byte (ids 0 to 255), then the six special tokens: 262 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, END, *ROLE_TOKENS)])
    fast: Any = PreTrainedTokenizerFast  # its annotations are incomplete
    wrapped: PreTrainedTokenizerFast = fast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, chat_template=BYTE_CHAT_TEMPLATE
    )
    return wrapped
