"""Counting the tokens of a text under a model's tokenizer, without loading the model."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from specontext.checkpoints.files import check_file
from specontext.checkpoints.wording import in_one_sentence
from specontext.errors import SpeContextError
from specontext.locations import tokenizer_source
from specontext.tasks.problem import TokenCounter


def token_counter(model: str | Path, *, trust_remote_code: bool = False) -> TokenCounter:
    """Counts the tokens of a text, special tokens left out.

    Args:
        model: a name that `resolve_model_path` takes.
        trust_remote_code: let a tokenizer's own code run, where it has no tokenizer.json.

    Raises:
        SpeContextError: there is no such model, or its tokenizer is broken.
    """
    folder = tokenizer_source(model)
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return _slow_counter(model, trust_remote_code)
    check_file(file, SpeContextError)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise SpeContextError(f"cannot read the tokenizer {file}: {in_one_sentence(error)}; download it again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _slow_counter(model: str | Path, trust_remote_code: bool) -> TokenCounter:
    from specontext.models.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
