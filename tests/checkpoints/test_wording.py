"""What libraries say becomes one sentence, with its advice whole."""

from __future__ import annotations

import pytest

from specontext.checkpoints.wording import LONGEST, in_one_sentence


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError("You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/org/name."),
            "You are trying to access a gated repo. Make sure to have access to it at https://huggingface.co/org/name",
        ),
        (
            ImportError("\nX requires einops but it was not found\n\nRun `pip install einops`.\n"),
            "X requires einops but it was not found. Run `pip install einops`",
        ),
        (
            ValueError("Unrecognized class Bert.\nModel type should be one of AConfig, BConfig, CConfig."),
            "Unrecognized class Bert",
        ),
        (RuntimeError("\x1b[1mbold\x1b[0m and\n  more"), "bold and more"),
        (KeyError("added_tokens"), "KeyError: 'added_tokens'"),
        (AttributeError("'X' object has no attribute 'y'"), "AttributeError: 'X' object has no attribute 'y'"),
        (EOFError(), "EOFError"),
        (
            OSError("/x has no conf.py. Checkout 'https://huggingface.co//x/tree/main' for available files."),
            "/x has no conf.py",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_messages(error: Exception, sentence: str) -> None:
    assert in_one_sentence(error) == sentence


def test_advice_that_would_switch_a_safety_check_off_is_not_passed_on() -> None:
    said = (
        "Weights only load failed. This file can still be loaded, to do so you have two options, do those steps only if you "
        "trust the source.\n\t(1) Re-running `torch.load` with `weights_only` set to `False` will likely succeed.\n\t"
        "WeightsUnpickler error: Unsupported global: GLOBAL a.B was not an allowed global by default. Please use "
        "`torch.serialization.add_safe_globals([a.B])` to allowlist this global if you trust this class/function.\n\n"
        "Check the documentation of torch.load to learn more about types accepted by default https://pytorch.org."
    )
    sentence = in_one_sentence(RuntimeError(said))
    assert "GLOBAL a.B was not an allowed global" in sentence and "trust" not in sentence and "documentation" not in sentence


def test_a_list_of_hundreds_of_names_keeps_its_beginning_and_its_end() -> None:
    sentence = in_one_sentence(RuntimeError("size mismatch for " + "name, " * 1000 + "and that is all"))
    assert sentence.startswith("size mismatch") and sentence.endswith("that is all") and len(sentence) < LONGEST + 10
