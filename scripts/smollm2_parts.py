"""Parts of packages that only train: many and small, since what a head does not know yet is another text, not more of the same.

Each package gives at most about 0.4 million tokens of a kind. None is a version, a translation or a part of what judges.
"""

from __future__ import annotations

from smollm2_sources import TESTS, Part

REFERENCE = 1_600_000  # characters of a package at most; reference has about four a token,
CODE = 1_100_000  # code about three
SPEECH = 2_000_000


def reference(reader: str, *files: str, without: tuple[str, ...] = ()) -> tuple[Part, ...]:
    return (Part("reference", "train", reader, files, without, REFERENCE),)


def manuals(*sections: str) -> tuple[Part, ...]:
    return reference("man", *(f"*/man/man{section}/*.gz" for section in sections))


def code(*files: str, without: tuple[str, ...] = ()) -> tuple[Part, ...]:
    return (Part("code", "train", "code", files, (*TESTS, *without), CODE),)


def speech(reader: str, *files: str, without: tuple[str, ...] = ()) -> tuple[Part, ...]:
    return (Part("dialogue", "train", reader, files, without, SPEECH),)


def campaign() -> tuple[Part, ...]:
    return speech("wesnoth", "*/campaigns/*/scenarios/*.cfg")


def sphinx(*files: str) -> tuple[Part, ...]:
    return reference("plain", *(files or ("*/doc*/*.rst", "*/doc*/*.txt", "*/doc*/*.md")), without=("*/requirements*", "*/_*"))
