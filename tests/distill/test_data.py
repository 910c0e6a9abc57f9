"""Training sequences: drawn from nothing but their arguments, marked where the model has to speak, held out for good."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from specontext import LLM, SamplingParams, SpeContextConfig
from specontext.distill.data import DataError, Mixed, OnPolicy, Sequences, Source, Weighted, open_sources, sizes_of_share
from specontext.distill.data.encoder import Encoder, chunks
from specontext.distill.data.held_out import Split
from specontext.distill.data.hub import parse
from specontext.distill.data.specs import open_documents
from specontext.tasks.training import KINDS, sequence
from specontext.tasks.words import NOUNS, count_words

QWEN_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WANDERING = (  # the system prompt stands in the last user turn, as in Mistral's
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{% if m == last and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "where is the owl"},
    {"role": "assistant", "content": "in the oak"},
    {"role": "user", "content": "and the crab"},
    {"role": "assistant", "content": "under the boat"},
]


@pytest.fixture(scope="module")
def other() -> PreTrainedTokenizerFast:
    """A tokenizer unlike nano's: merged words, a beginning of text, digits one by one, an end token of another name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<|im_end|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" " + " ".join(NOUNS), "Question: Answer: Remember the facts in this text."] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One token a word, no beginning of text, so that token counts can be read off."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", "a", *(f"w{i}" for i in range(400))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("nano", None, SpeContextConfig(method="full"), device="cpu", max_model_len=256)


Write = Callable[..., str]


@pytest.fixture
def write_rows(tmp_path: Path) -> Write:
    def write(*rows: Any, name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
        return str(tmp_path / name)

    return write


def wordy(first: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(first, first + count))


def same(a: Sequences, b: Sequences) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("ids", "lengths", "wanted"))


def real(drawn: Sequences, n: int = 0) -> list[int]:
    return drawn.ids[n, : drawn.lengths[n]].tolist()


def said(drawn: Sequences, tokenizer: Any, n: int = 0) -> list[str]:
    """The texts that the model has to say, one for each run of wanted positions."""
    runs: list[list[int]] = []
    previous = -2
    for place in drawn.wanted[n].nonzero().flatten().tolist():
        if place != previous + 1:
            runs.append([])
        runs[-1].append(int(drawn.ids[n, place + 1]))
        previous = place
    return [tokenizer.decode(run) for run in runs]


def check(drawn: Sequences, length: int, rows: int) -> None:
    assert drawn.ids.shape == drawn.wanted.shape == (rows, length)
    assert drawn.ids.dtype == drawn.lengths.dtype == torch.int64 and drawn.wanted.dtype == torch.bool
    for n, real_tokens in enumerate(drawn.lengths.tolist()):
        assert 2 <= real_tokens <= length
        assert not drawn.wanted[n, real_tokens - 1 :].any() and drawn.wanted[n].any()


# ---- every source


@pytest.fixture
def every_spec(tmp_path: Path, write_rows: Write) -> dict[str, list[str]]:
    text = tmp_path / "book.txt"
    text.write_text(" ".join(NOUNS) * 3)
    rows = write_rows(*({"prompt": f" {noun} =", "completion": " 7."} for noun in NOUNS[:30]), {"text": " ".join(NOUNS[:50])})
    return {"tasks": ["tasks"], "text": [str(text)], "rows": [rows], "mixed": ["tasks:retrieval", str(text), rows]}


@pytest.mark.parametrize("kind", ["tasks", "text", "rows", "mixed"])
def test_a_batch_depends_on_its_arguments_alone(kind: str, every_spec: dict[str, list[str]], other: Any) -> None:
    def fresh(seed: int = 3, held_out: bool = False) -> Source:
        return open_sources(every_spec[kind], tokenizer=other, seed=seed, held_out=held_out)

    source, again = fresh(), fresh()
    batches = [source.draw(step, 160, 3) for step in range(4)]
    for batch in batches:
        check(batch, 160, 3)
    assert same(again.draw(3, 160, 3), batches[3]), "a continued training draws what the stopped one would have"
    again.draw(0, 224, 1)
    assert same(again.draw(1, 160, 3), batches[1])
    assert not same(batches[0], batches[1])
    assert not same(fresh(seed=4).draw(0, 160, 3), batches[0])
    assert not same(fresh(held_out=True).draw(0, 160, 3), batches[0])
    check(fresh(held_out=True).draw(0, 160, 3), 160, 3)


# ---- generated tasks


def test_nanos_task_texts_are_those_that_trained_it() -> None:
    digest = hashlib.sha256()
    for kind in KINDS:
        for length in (64, 320, 1280):
            digest.update(repr(sequence(kind, length, random.Random(f"{kind}/{length}"), count_words)).encode())
    assert digest.hexdigest() == "a37385e782f9879f44cd3e4f9dacbde44b1e39a9e55376e1e57962478d6599f7"


def task_answers(text: str, turn: str, end: str) -> list[str]:
    """What has to be said in a task text: after every `Answer:` the rest of the line, after `Run:` the rest."""
    return re.findall(r"(?:(?<=Answer:)|(?<=Run:))" + f"(?:{turn})?( [^\n]*)", text.removesuffix(end))


@pytest.mark.parametrize("kind", KINDS)
def test_wanted_marks_of_tasks_are_the_answers(kind: str, tokenizer: Any, other: Any) -> None:
    for each, end in ((tokenizer, "<|end|>"), (other, "<|im_end|>")):
        source, chats = open_sources([f"tasks:{kind}"], tokenizer=each, seed=1), 0
        drawn = source.draw(0, 256, 12)
        check(drawn, 256, 12)
        for n in range(12):
            ids, text = real(drawn, n), each.decode(real(drawn, n))
            assert ids[0] == each.bos_token_id and ids[-1] == each.eos_token_id and text.count(end) == 1
            chats += "<|user|>" in text
            expected = task_answers(text, re.escape("<|assistant|>"), end)
            expected[-1] += end
            assert said(drawn, each, n) == expected
        assert bool(chats) == (each is tokenizer)


def test_tasks_fill_the_length_and_never_exceed_it(tokenizer: Any, other: Any) -> None:
    for each in (tokenizer, other):
        longest = open_sources(["tasks"], tokenizer=each, seed=0).draw(5, 600, 16).lengths.max()
        assert 570 <= longest <= 600


def test_tasks_under_a_tokenizer_without_offsets(other: Any) -> None:
    class Slow:
        """Python tokenizers of checkpoints with their own code tell no offsets."""

        is_fast, eos_token_id, pad_token_id, unk_token_id = False, 1, None, None

        def __call__(self, text: str, return_offsets_mapping: bool = False, **options: Any) -> Any:
            assert not return_offsets_mapping
            return {"input_ids": other(text, **options)["input_ids"]}

    slow: Any = Slow()
    for step in range(3):
        expected = open_sources(["tasks"], tokenizer=other, seed=0).draw(step, 200, 4)
        assert same(open_sources(["tasks"], tokenizer=slow, seed=0).draw(step, 200, 4), expected)


def test_task_errors(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"'riddles'.*retrieval, multivalue, tracking, program"):
        open_sources(["tasks:retrieval,riddles"], tokenizer=tokenizer, seed=0)
    with pytest.raises(DataError, match=r"20 tokens do not hold.*program.*raise the length"):
        open_sources(["tasks:program"], tokenizer=tokenizer, seed=0).draw(0, 20, 1)
    with pytest.raises(DataError, match="no data was given"):
        open_sources([], tokenizer=tokenizer, seed=0)
    with pytest.raises(DataError, match="no file or directory nowhere"):
        open_sources(["nowhere.txt"], tokenizer=tokenizer, seed=0)
    with pytest.raises(DataError, match="cannot draw"):
        open_sources(["tasks"], tokenizer=tokenizer, seed=0).draw(0, 1, 1)


# ---- texts


def test_a_long_text_gives_windows_all_of_whose_tokens_are_wanted(tmp_path: Path, words: Any) -> None:
    (tmp_path / "a.txt").write_text(wordy(0, 300))
    drawn = open_sources([str(tmp_path / "a.txt")], tokenizer=words, seed=0).draw(0, 50, 20)
    check(drawn, 50, 20)
    starts = set()
    for n in range(20):
        ids = real(drawn, n)
        assert len(ids) == 50 and ids == list(range(ids[0], ids[0] + 50)) and drawn.wanted[n].sum() == 49
        starts.add(ids[0])
    assert len(starts) > 12


def test_windows_open_as_the_tokenizer_opens_texts(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.md").write_text(" owl" * 5 + " oak" * 200)
    drawn = open_sources([str(tmp_path / "a.md")], tokenizer=tokenizer, seed=0).draw(0, 20, 4)
    assert (drawn.ids[:, 0] == tokenizer.bos_token_id).all() and (drawn.lengths == 20).all()
    assert not (drawn.ids[:, 1:] == tokenizer.bos_token_id).any()


def test_short_documents_fill_rows_and_stand_apart(tmp_path: Path, words: Any, tokenizer: Any) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(wordy(10 * i, 10))
    drawn = open_sources([str(tmp_path)], tokenizer=words, seed=0).draw(0, 64, 4)
    for n in range(4):
        ids = real(drawn, n)
        assert len(ids) == 64
        pieces = words.decode(ids).split(" <end> ")
        assert len(pieces) == 6 and len(set(pieces)) == 6, "no document comes twice in a row"
        for piece in pieces[:5]:
            first = int(piece.split()[0][1:])
            assert piece == wordy(first, 10) and first % 10 == 0
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "a.txt").write_text(" owl oak")
    drawn = open_sources([str(tmp_path / "nano")] * 2, tokenizer=tokenizer, seed=0).draw(0, 16, 1)
    assert tokenizer.decode(real(drawn)) == "<|begin|> owl oak", "too little text leaves padding; the end is held out"


def test_the_end_token_is_said_and_what_follows_it_is_not(write_rows: Write, other: Any) -> None:
    rows = write_rows(*({"text": f" {noun}"} for noun in NOUNS[:3]))
    drawn = open_sources([rows], tokenizer=other, seed=0).draw(0, 64, 1)
    assert sorted(said(drawn, other)) == sorted(f" {noun}<|im_end|>" for noun in NOUNS[:2])
    assert other.decode(real(drawn)).count("<s>") == 2


def test_long_texts_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    text = "\n".join(" ".join(NOUNS[i : i + 9]) for i in range(0, 300, 7))
    whole = other(text, add_special_tokens=False)["input_ids"]
    assert Encoder(other).ids(text) == whole
    monkeypatch.setattr("specontext.distill.data.encoder.CHUNK", 200)
    assert Encoder(other).ids(text) == whole, "parts end with lines"
    assert "".join(chunks("abc def" * 9, 10)) == "abc def" * 9 and list(chunks("abcdef", 4)) == ["abcd", "ef"]


def test_directories_take_texts_and_rows_and_leave_out_the_rest(tmp_path: Path, words: Any, write_rows: Write) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10")
    (tmp_path / "sub" / "a").write_text("w20")
    (tmp_path / "sub" / "picture.png").write_bytes(b"\x89PNG\0\0 w50")
    (tmp_path / ".git" / "c.txt").write_text("w51")
    write_rows({"text": "w30"}, {"text": "w31"}, {"text": "w32"}, name="rows.jsonl")
    seen = set(words.decode(real(open_sources([str(tmp_path)], tokenizer=words, seed=0).draw(0, 64, 1))).split())
    assert {"w1", "w10", "w20", "w30", "w31"} == seen & {"w1", "w10", "w20", "w30", "w31", "w32", "w50", "w51"}
    (tmp_path / "sub" / "latin.TXT").write_bytes("w1 Käse".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.TXT is no UTF-8 text, as its name says: convert it, or move it out of"):
        open_sources([str(tmp_path)], tokenizer=words, seed=0)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"none has no text files and no \.jsonl files"):
        open_sources([str(tmp_path / "none")], tokenizer=words, seed=0)


def test_text_errors(tmp_path: Path, words: Any) -> None:
    (tmp_path / "latin.txt").write_bytes("w1 Käse".encode("latin-1"))
    with pytest.raises(DataError, match="no UTF-8 text"):
        open_sources([str(tmp_path / "latin.txt")], tokenizer=words, seed=0)
    (tmp_path / "short.txt").write_text("")
    with pytest.raises(DataError, match=r"short.txt has 0 tokens: give more text"):
        open_sources([str(tmp_path / "short.txt")], tokenizer=words, seed=0)


# ---- held out


@pytest.mark.parametrize("documents", [1, 2, 5, 9, 10, 11, 19, 20, 105])
@pytest.mark.parametrize("running", [True, False])
def test_the_parts_are_disjoint_and_complete(documents: int, running: bool) -> None:
    seen: list[tuple[int, int]] = []
    for held_out in (False, True):
        split = Split(documents, running, held_out)
        assert split.count > 0
        for index in range(split.count):
            first, last = split.bounds(30)
            assert last > first
            seen += [(split.number(index), token) for token in range(first, last)]
    assert sorted(seen) == [(number, token) for number in range(documents) for token in range(30)]


def test_training_never_sees_what_is_held_out(tmp_path: Path, words: Any, write_rows: Write) -> None:
    (tmp_path / "a.txt").write_text(wordy(0, 200))
    rows = write_rows(*({"text": f"w{i}"} for i in range(40)))
    for spec, share in ((str(tmp_path / "a.txt"), 20), (rows, 4)):
        seen = []
        for held_out, seed in ((False, 0), (True, 0), (True, 9)):
            source = open_sources([spec], tokenizer=words, seed=seed, held_out=held_out)
            seen.append({i for step in range(60) for i in source.draw(step, 12, 2).ids.flatten().tolist()} - {1})
        assert not seen[0] & seen[1] and seen[1] == seen[2] and len(seen[1]) == share
        assert share * 9 - 6 <= len(seen[0]) <= share * 9, "the first and last words of a long text are in few windows"


# ---- rows


def test_forms_of_rows(write_rows: Write, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other, "chat_template", QWEN_LIKE)
    forms: list[tuple[dict[str, Any], list[str]]] = [
        ({"text": " owl oak", "meta": 1}, [" owl oak<|im_end|>"]),
        ({"prompt": "Where?\n", "completion": "in the oak"}, ["in the oak<|im_end|>"]),
        ({"prompt": " owl", "response": " oak", "id": "x"}, [" oak<|im_end|>"]),
        ({"prompt": " owl", "output": " oak<|im_end|>"}, [" oak<|im_end|>"]),
        ({"prompt": "x", "messages": CHAT[:2]}, ["<think>\n\n</think>\n\nin the oak<|im_end|>\n"]),
        ({"input_ids": other(" owl oak")["input_ids"]}, [" owl oak<|im_end|>"]),
        ({"input_ids": [5, 6, 7, 8, 9], "wanted": [0, 1, 0, 1, False]}, [other.decode([7]), other.decode([9])]),
    ]
    for row, expected in forms:
        drawn = open_sources([write_rows(row, {"text": "held out"})], tokenizer=other, seed=0).draw(0, 64, 1)
        assert said(drawn, other) == expected, row
        check(drawn, 64, 1)


def test_long_rows_give_windows_with_something_to_say(write_rows: Write, words: Any) -> None:
    rows = write_rows({"prompt": wordy(0, 300), "completion": " w301 w302"}, {"text": "w1"})
    source = open_sources([rows], tokenizer=words, seed=0)
    for step in range(10):
        drawn = source.draw(step, 40, 2)
        check(drawn, 40, 2)
        assert all(re.match(r"w301|w302|<end>", said(drawn, words, n)[0]) for n in range(2))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?", "answer": "!"}, r"line 2 of .* has 'question', 'answer'; understood are rows with 'text'; 'prompt'"),
        ({"prompt": "alone"}, r"has 'prompt'; understood"),
        ([1, 2], r"line 2 of .* is list, not an object"),
        ("{nonsense", r"line 2 of .* is no JSON: .*; each row must be an object in a line of its own"),
        ('{"text": ' + "[" * 100_000, r"line 2 of .* is no JSON"),
        ({"text": 5}, r"'text' of line 2 .* must be a string, got int"),
        ({"prompt": "a", "completion": ""}, "empty completion"),
        ({"input_ids": [1, -1]}, r"'input_ids' of line 2 of .*: -1 is not a token id"),
        ({"input_ids": [1, 2], "wanted": [True]}, r"'wanted' of line 2 .* list of 2 values"),
        ({"input_ids": [1, 2], "wanted": [0, 0]}, "no wanted position"),
        ({"messages": "hello"}, r"'messages' of line 2 .* must be a list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of role 'assistant'"),
        ({"messages": CHAT}, "the tokenizer no chat template"),
        ({"text": "a\ud800b"}, r"line 2 of .*: the text is not Unicode: half a character at 1"),
        ({"prompt": "w1 \udfff", "completion": "w2"}, "line 2 of .*: the text is not Unicode"),
        ({"prompt": "w1", "completion": "w2 \udfff"}, "line 2 of .*: the text is not Unicode"),
    ],
)
def test_rows_that_are_not_understood(row: Any, message: str, write_rows: Write, words: Any) -> None:
    rows = write_rows({"text": ""}, row, {"text": "held out"})
    with pytest.raises(DataError, match=message):
        open_sources([rows], tokenizer=words, seed=0)


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.ndjson"])
def test_rows_under_other_endings(name: str, tmp_path: Path, words: Any) -> None:
    rows = "\n".join(json.dumps({"text": wordy(number, 40)}) for number in range(12))
    (tmp_path / name).write_text(rows)
    (tmp_path / "rows.jsonl").write_text(rows)
    read, plain = (open_documents(str(tmp_path / each), Encoder(words)) for each in (name, "rows.jsonl"))
    assert len(read) == 12 and all(torch.equal(read[number].ids, plain[number].ids) for number in range(12))


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.TSV"])
def test_tables_are_not_read_as_one_text(name: str, tmp_path: Path, words: Any) -> None:
    (tmp_path / name).write_text(json.dumps([{"text": wordy(0, 40)}]))
    with pytest.raises(DataError, match=f"{name} would be read as one text: give its rows as a .jsonl"):
        open_sources([str(tmp_path / name)], tokenizer=words, seed=0)
    open_sources([str(tmp_path)], tokenizer=words, seed=0)  # as a file among code


def test_blank_lines_are_no_rows_and_lines_keep_their_numbers(write_rows: Write, words: Any) -> None:
    rows = write_rows({"text": "w1 w2"}, "", {"text": "w3 w4"}, "  ", {"nothing": 1}, {"text": "w5"})
    source = open_sources([rows], tokenizer=words, seed=0)
    with pytest.raises(DataError, match="line 5 of"):
        source.draw(0, 32, 1)
    with pytest.raises(DataError, match="has no rows"):
        open_sources([write_rows("", name="blank.jsonl")], tokenizer=words, seed=0)
    with pytest.raises(DataError, match="nothing in the held-out part"):
        prompt_only = write_rows({"input_ids": [3] * 40, "wanted": [1] + [0] * 39}, name="one.jsonl")
        open_sources([prompt_only], tokenizer=words, seed=0, held_out=True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN_LIKE, ["in the oak<|im_end|>", "<think>\n\n</think>\n\nunder the boat<|im_end|>\n"]),
        (MARKING, ["in the oak<|im_end|>", "under the boat<|im_end|>"]),
        (WANDERING, [" in the oak<|im_end|>", " under the boat<|im_end|>"]),
        (None, ["in the oak<|end|>", "under the boat<|end|>"]),
    ],
)
def test_only_the_assistant_s_parts_are_wanted(
    template: str | None, expected: list[str], write_rows: Write, other: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = other if template else tokenizer
    if template:
        monkeypatch.setattr(other, "chat_template", template)
    messages = [{"role": "system", "content": "be brief"}, *CHAT] if template is WANDERING else CHAT
    rows = write_rows({"messages": messages}, {"text": "held out"})
    drawn = open_sources([rows], tokenizer=each, seed=0).draw(0, 256, 1)
    assert said(drawn, each) == expected
    assert each.decode(real(drawn)).removeprefix("<s>") == each.apply_chat_template(messages, tokenize=False).removeprefix("<s>")


def test_messages_that_a_template_refuses(write_rows: Write, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"messages of line 1 .* cannot be written out: .*roles must alternate"):
        open_sources([write_rows({"messages": CHAT}, {"text": "held out"})], tokenizer=other, seed=0)
    shouting = "{% for m in messages %}{{ m.content | upper }}{{ loop.revindex }}{% endfor %}"
    monkeypatch.setattr(other, "chat_template", shouting)
    with pytest.raises(DataError, match=r"does not show where message 2 of line 1 .* stands"):
        open_sources([write_rows({"messages": CHAT}, {"text": "held out"})], tokenizer=other, seed=0)


def test_a_message_that_a_template_drops_makes_no_row(write_rows: Write, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}{% if m.role != 'tool' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
    monkeypatch.setattr(other, "chat_template", template)
    said = [
        {"role": "user", "content": "apple"},
        {"role": "tool", "content": "banana"},
        {"role": "assistant", "content": "cherry"},
    ]
    with pytest.raises(DataError, match=r"leaves out text of message 1, whose role is 'tool'"):
        open_sources([write_rows({"messages": said})], tokenizer=other, seed=0).draw(0, 64, 1)


# ---- data sets of the Hub


class Table(list):
    column_names = ("body", "chat")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """A stand-in for `datasets`; the calls of load_dataset."""
    calls: list[tuple] = []

    def load_dataset(*arguments: str, split: str) -> Table:
        calls.append((*arguments, split))
        if split == "nowhere":
            raise ValueError("unknown split 'nowhere'")
        return Table({"body": wordy(10 * i, 10), "chat": CHAT[:2]} for i in range(20))

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    yield calls


def test_data_sets_by_field(asked: list[tuple], words: Any, tokenizer: Any) -> None:
    drawn = open_sources(["hf:org/name:train[:10%]:body"], tokenizer=words, seed=0).draw(0, 64, 2)
    check(drawn, 64, 2)
    assert asked == [("org/name", "train[:10%]")] and (drawn.lengths == 64).all()
    drawn = open_sources(["hf:org/name/subset:test:chat"], tokenizer=tokenizer, seed=0).draw(0, 64, 1)
    assert asked[1:] == [("org/name", "subset", "test")]
    assert said(drawn, tokenizer)[0] == "in the oak<|end|>"


def test_data_set_errors(asked: list[tuple], words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("hf:org/name") == ("org/name", "train", None)
    for spec, message in (
        ("hf:org/name", r"row 0 of hf:org/name has 'body', 'chat'; understood are"),
        ("hf:org/name:train:title", "no field 'title': its fields are body, chat"),
        ("hf:org/name:nowhere", "cannot load hf:org/name:nowhere: unknown split"),
        ("hf:org/name:a:b:c", "cannot read 'hf:org/name:a:b:c': write hf:"),
        ("hf:", "cannot read 'hf:'"),
    ):
        with pytest.raises(DataError, match=message):
            open_sources([spec], tokenizer=words, seed=0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install .*\[datasets\]"):
        open_sources(["hf:org/name"], tokenizer=words, seed=0)


# ---- mixing


class Constant:
    """Sequences of one token; remembers the steps that it was asked for."""

    def __init__(self, token: int) -> None:
        self.token, self.steps = token, list[int]()

    def draw(self, step: int, length: int, rows: int) -> Sequences:
        self.steps.append(step)
        wanted = torch.ones((rows, length), dtype=torch.bool)
        wanted[:, -1] = False
        return Sequences(torch.full((rows, length), self.token), torch.full((rows,), length), wanted)


def test_several_sources_are_mixed_by_weight() -> None:
    source = Weighted([Constant(0), Constant(1), Constant(2)], [1, 1, 2], seed=5)
    rows = torch.cat([source.draw(step, 8, 4).ids[:, 0] for step in range(200)])
    assert all(
        expected - 40 < count < expected + 40 for count, expected in zip(rows.bincount().tolist(), (200, 200, 400), strict=True)
    )
    assert not same(source.draw(0, 8, 16), Weighted(source.sources, source.weights, seed=6).draw(0, 8, 16))


def test_specs_say_their_weights(tokenizer: Any, tmp_path: Path) -> None:
    for name in ("often.txt", "seldom.txt", "a=3"):
        (tmp_path / name).write_text("The lamp is on . " * 40)
    specs = [f"{tmp_path}/often.txt=7.5", f"{tmp_path}/seldom.txt", f"{tmp_path}/a=3", f"{tmp_path}/a=3=2", "tasks:retrieval=0.5"]
    source = open_sources(specs, tokenizer=tokenizer, seed=0)
    assert isinstance(source, Weighted) and source.weights == (7.5, 1.0, 1.0, 2.0, 0.5)
    for wrong in ("0", "-1", "nan", "inf"):
        with pytest.raises(DataError, match="weight of tasks must be a number above 0"):
            open_sources([f"tasks={wrong}"], tokenizer=tokenizer, seed=0)
    with pytest.raises(DataError, match="there is no file or directory nowhere=b"):
        open_sources(["nowhere=b"], tokenizer=tokenizer, seed=0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 1.0])
def test_a_share_of_the_steps_is_on_policy(share: float) -> None:
    mine, theirs = Constant(1), Constant(0)
    source = Mixed(mine, theirs, share)
    kinds = [int(source.draw(step, 4, 2).ids[0, 0]) for step in range(40)]
    assert sum(kinds) == round(share * 40)
    assert mine.steps == list(range(len(mine.steps))) and theirs.steps == list(range(len(theirs.steps)))
    if share:
        sizes = sizes_of_share(lambda step: (step, 1), share)
        assert [sizes(k)[0] for k in mine.steps] == [step for step, kind in enumerate(kinds) if kind]
    with pytest.raises(DataError, match="share"):
        Mixed(mine, theirs, 1.5)


# ---- on-policy


def test_the_target_continues_the_prompts_itself(llm: LLM, tokenizer: Any) -> None:
    prompts = open_sources(["tasks:retrieval,tracking"], tokenizer=tokenizer, seed=0)
    source = OnPolicy(prompts, llm, seed=0, temperature=0.0, together=6)
    for step in (0, 1):
        drawn = source.draw(step, 128, 3)
        check(drawn, 128, 3)
        for n in range(3):
            ids, wanted = real(drawn, n), drawn.wanted[n].nonzero().flatten()
            cut = int(wanted[0]) + 1
            assert wanted.tolist() == list(range(cut - 1, len(ids) - 1)), "everything that was generated, and nothing else"
            assert re.search(r"Answer:(<\|assistant\|>)?$", tokenizer.decode(ids[:cut]))
            greedy = SamplingParams(temperature=0.0, max_tokens=128 - cut)
            assert llm.generate([ids[:cut]], greedy)[0].token_ids == ids[cut:]


def test_on_policy_batches_depend_on_their_arguments_alone(llm: LLM, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f" the {noun} found a {NOUNS[-i]}." for i, noun in enumerate(NOUNS)))
    texts = open_sources([str(tmp_path / "a.txt")], tokenizer=tokenizer, seed=0)

    def fresh(seed: int = 0, **options: Any) -> OnPolicy:
        return OnPolicy(texts, llm, seed=seed, together=4, **options)

    source = fresh()
    batches = [source.draw(step, 48, 2) for step in range(3)]
    assert same(fresh().draw(2, 48, 2), batches[2]) and same(fresh().draw(1, 48, 2), batches[1])
    assert not same(fresh(seed=1).draw(0, 48, 2), batches[0])
    planned = fresh(sizes=lambda step: (48, 2) if step % 2 else (32, 1))
    assert same(planned.draw(1, 48, 2), batches[1]) and planned.draw(0, 32, 1).ids.shape == (1, 32)
    assert same(planned.draw(0, 48, 2), batches[0]), "a size that was not announced is drawn all the same"
    for batch in batches:
        check(batch, 48, 2)
        cuts = [int(batch.wanted[n].nonzero()[0]) + 1 for n in range(2)]
        assert all(12 <= cut <= 36 for cut in cuts), "a quarter to three quarters of a text are the prompt"
    row = batches[0].ids[0]
    assert row[0] == tokenizer.bos_token_id


def test_blocks_hold_steps_until_there_are_rows_enough(tokenizer: Any, llm: LLM) -> None:
    prompts = open_sources(["tasks:retrieval"], tokenizer=tokenizer, seed=0)
    made: list[int] = []

    class Counting:
        tokenizer, config, shape = llm.tokenizer, llm.config, llm.shape

        def generate(self, prompts: Any, params: Any) -> Any:
            made.append(len(prompts))
            return llm.generate(prompts, params)

    source = OnPolicy(prompts, Counting(), seed=0, temperature=0.0, together=5, sizes=lambda step: (64, 1 + step % 2))
    for step in range(8):
        source.draw(step, 64, 1 + step % 2)
    assert made == [6, 6], "steps 0 .. 3 and 4 .. 7, of 1 and 2 rows by turns"


def test_on_policy_errors(tokenizer: Any) -> None:
    streaming = LLM("nano", None, SpeContextConfig(method="streaming"), device="cpu", max_model_len=128)
    with pytest.raises(DataError, match="method 'full', got 'streaming'"):
        OnPolicy(open_sources(["tasks"], tokenizer=tokenizer, seed=0), streaming, seed=0)
