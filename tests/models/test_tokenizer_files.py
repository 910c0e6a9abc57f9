"""Tokenizers whose files are missing or broken are refused with the file's name and what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from specontext import SamplingParams
from specontext.cli import main
from specontext.engine.detokenizer import Detokenizer
from specontext.errors import ModelError
from specontext.locations import NANO
from specontext.models.tokenizer_files import load_tokenizer

SENTENCEPIECE, TIKTOKEN = b"\n\r\n\x05<unk>", b"IQ== 0\nIg== 1\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, tmp_path / name)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def of_class(folder: Path, name: str) -> None:
    """Takes the vocabulary away and names the class that would be made without it."""
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("LlamaTokenizer", "tokenizer.model"),
        ("LlamaTokenizerFast", "tokenizer.model"),
        ("Qwen2Tokenizer", "vocab.json nor merges.txt"),
        ("GPT2Tokenizer", "vocab.json nor merges.txt"),
        ("T5Tokenizer", "spiece.model"),
        ("GemmaTokenizer", "tokenizer.json"),
        ("PreTrainedTokenizerFast", "tokenizer.json"),
        ("ClassThatNobodyKnows", "tokenizer.json"),
    ],
)
def test_a_tokenizer_without_its_vocabulary(folder: Path, name: str, file: str) -> None:
    of_class(folder, name)
    said = refusal(folder)
    assert "its vocabulary is missing" in said and f"{file} is in the directory, so download it too" in said


def change_settings(folder: Path, **changes: object) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_code_beside_a_tokenizer_is_not_left_aside(folder: Path) -> None:
    change_settings(folder, auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    said = refusal(folder)
    assert "OwnTokenizer (auto_map in tokenizer_config.json)" in said and "--trust-remote-code" in said
    change_settings(folder, tokenizer_class="LlamaTokenizer", auto_map={"AutoTokenizer": [None, "own.LlamaTokenizerFast"]})
    load_tokenizer(folder)


def test_a_vocabulary_of_nothing(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"] |= {"vocab": {}, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert "has no tokens for a text such as 'a'" in refusal(folder)


def test_texts_of_outputs_are_those_of_their_tokens(folder: Path) -> None:
    change_settings(folder, clean_up_tokenization_spaces=True)
    tokenizer = load_tokenizer(folder)
    prompt, output = (tokenizer.encode(text, add_special_tokens=False) for text in ("Who is it", " ? I do n't know , he said ."))
    detokenizer = Detokenizer(tokenizer, SamplingParams(), prompt)
    for token in output:
        detokenizer.append([token])
        assert tokenizer.decode(output).startswith(detokenizer.text)
    assert detokenizer.finish() == tokenizer.decode(output) == " ? I do n't know , he said ."


@pytest.mark.parametrize(("there", "lacking"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
def test_half_a_vocabulary(folder: Path, there: str, lacking: str) -> None:
    of_class(folder, "Qwen2Tokenizer")
    (folder / there).write_text('{"a": 0, "b": 1}' if there == "vocab.json" else "#version: 0.2\na b\n")
    assert f"{there} alone is not enough" in (said := refusal(folder)) and f"nor {lacking} is in the directory" in said


def test_both_halves_are_enough(folder: Path) -> None:
    of_class(folder, "Qwen2Tokenizer")
    (folder / "vocab.json").write_text(json.dumps({chr(code): number for number, code in enumerate(range(33, 400))}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert len(load_tokenizer(folder)) > 367


@pytest.mark.parametrize(
    ("content", "packages"),
    [(SENTENCEPIECE, "sentencepiece protobuf"), (TIKTOKEN, "tiktoken")],
    ids=["sentencepiece", "tiktoken"],
)
def test_a_vocabulary_that_needs_a_package(
    folder: Path, content: bytes, packages: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_class(folder, "LlamaTokenizer")
    (folder / "tokenizer.model").write_bytes(content)
    find, absent = importlib.util.find_spec, {"sentencepiece", "google.protobuf", "tiktoken"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else find(name, *rest))
    assert f"`pip install {packages}`, or download tokenizer.json" in refusal(folder)
    assert main(["generate", str(folder), "--prompt", "a", "--method", "full"]) == 1
    assert f"pip install {packages}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n", "git lfs pull"),
        (b"", "is empty"),
        (b"<html>log in</html>", "web page"),
        (b"{", "is not JSON"),
        (b"{}", "holds no tokenizer"),
        (b"[]", "not an object"),
        (b"\xff\xff", "is not JSON"),
        (b"\xff\xfe{\0}\0", "byte order mark"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
    ],
    ids=["pointer", "empty", "page", "cut", "no model", "list", "bytes", "UTF-16", "UTF-8 with a mark"],
)
def test_a_broken_vocabulary_is_named(folder: Path, content: bytes, said: str) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    assert str(folder / "tokenizer.json") in (found := refusal(folder)) and said in found


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json", "chat_template.jinja", "merges.txt"])
def test_pointers_in_place_of_what_lies_beside_it(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n")
    assert f"{folder / name} is not the file but Git LFS's pointer to it" in refusal(folder)


def test_a_setting_that_only_encoding_looks_at(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": []}))
    assert "cannot encode a text" in refusal(folder)


@pytest.mark.parametrize("beside", [{"chat_template.json": '{"chat_template": "%s"}'}, {"chat_template.jinja": "%s"}])
def test_a_template_is_found_where_makers_put_it(folder: Path, beside: dict[str, str]) -> None:
    without_template(folder)
    assert load_tokenizer(folder).chat_template is None
    for name, text in beside.items():
        (folder / name).write_text(text % "{{ messages }}")
    assert load_tokenizer(folder).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("chat_template.jinja", "{{ messages }}".encode("utf-16"), "is not UTF-8 text"),
        ("chat_template.json", b'{"chat_template": 5}', "should be a text, got 5"),
        ("chat_template.json", b"[]", "not an object"),
    ],
)
def test_a_template_that_is_no_text_is_named(folder: Path, name: str, content: bytes, said: str) -> None:
    without_template(folder)
    (folder / name).write_bytes(content)
    assert said in refusal(folder)


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
