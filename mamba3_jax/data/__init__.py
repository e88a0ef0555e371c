"""Text and token ids."""

from mamba3_jax.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    TextStream,
    Tokenizer,
    check_vocabulary,
    load_tokenizer,
)

__all__ = ["ByteTokenizer", "JsonTokenizer", "TextStream", "Tokenizer", "check_vocabulary", "load_tokenizer"]
