"""From the files of a package to plain text: one reader for each format, and the cleaning that all of them share.

A reader takes a file's text and its path inside the package, and returns plain text ('' leaves the file out).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser

from smollm2_speech_readers import SPEECH_READERS

Reader = Callable[[str, str], str]

CHAT_MARKS = re.compile(r"<\|[a-z_]+\|>")
UNWANTED = {code: None for code in range(0x20) if chr(code) not in "\n\t"} | {code: None for code in range(0x7F, 0xA0)}


def clean(text: str) -> str:
    """Without control characters, the tokenizer's special marks, trailing blanks and runs of empty lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ").replace("\ufeff", "")
    text = CHAT_MARKS.sub("", re.sub(".\b", "", text)).translate(UNWANTED)
    return re.sub(r"\n{4,}", "\n\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip("\n")


def plain(text: str, path: str) -> str:
    return text


class _Page(HTMLParser):
    BLOCKS = frozenset("p div br li tr h1 h2 h3 h4 h5 h6 pre dt dd table ul ol dl section blockquote".split())
    SPACED = frozenset("p pre h1 h2 h3 h4 h5 h6 table dl ul ol blockquote".split())
    SKIPPED = frozenset("script style head nav footer header svg".split())
    VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
    FURNITURE = re.compile(
        r"\b(nav(header|footer|igation)?|related|sphinxsidebar\w*|mobile-nav|headerlink|top(lang|nav)|bottomlang|"
        r"page-header|up|path|menu-wrapper|footer|toc|breadcrumbs?)\b"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []  # tags and whether each hides what is in it
        self.hidden = self.verbatim = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            names = " ".join(value or "" for name, value in attributes if name in ("class", "id", "role"))
            hides = tag in self.SKIPPED or (tag != "body" and bool(self.FURNITURE.search(names)))
            self.open.append((tag, hides))
            self.hidden += hides
        self.verbatim += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n\n" if tag in self.SPACED else "\n")
        elif tag in ("td", "th"):
            self.parts.append("\t")

    def handle_endtag(self, tag: str) -> None:
        if any(name == tag for name, _ in self.open):
            while self.open:
                name, hides = self.open.pop()
                self.hidden -= hides
                if name == tag:
                    break
        if tag == "pre":
            self.verbatim = max(0, self.verbatim - 1)
        if tag in self.BLOCKS:
            self.parts.append("\n\n" if tag in self.SPACED else "\n")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def html(text: str, path: str) -> str:
    """The text of a page without navigation, each block on lines of its own."""
    page = _Page()
    page.feed(text)
    text = re.sub(r"[ \t]+\n", "\n", "".join(page.parts).replace("¶", "").replace("\n\t", "\n"))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"\n {1,3}(?=\S)", "\n", text))


MARKS = {  # of a line's comment where it is not //
    "py": "#", "sh": "#", "pm": "#", "pl": "#", "rb": "#", "nim": "#", "tcl": "#", "erl": "%", "el": ";;", "lisp": ";;",
    "scm": ";;", "adb": "--", "ads": "--", "sql": "--", "lua": "--", "vim": '"',
}  # fmt: skip


def source_code(text: str, path: str) -> str:
    """A source file under a comment that names it; generated and minified files are left out."""
    lines = text.split("\n")
    if not lines or max(map(len, lines)) > 1500 or len(text) / len(lines) > 120:
        return ""
    mark = MARKS.get(path.removesuffix(".gz").rpartition(".")[2], "//")
    if "/" not in mark and "." not in path.rpartition("/")[2] and not text.startswith("//"):
        mark = "#"
    if "." not in path.rpartition("/")[2]:
        mark = "//" if "#include" in text or "/*" in text[:200] else "#"
    return f"{mark} File: {'/'.join(path.split('/')[-4:])}\n\n{text}"


def pod(text: str, path: str) -> str:
    """Perl's documentation without its inline codes."""
    for _ in range(2):
        text = re.sub(r"\b[BCFILSX]<<? ?((?:[^<>]|(?<=-)>)*?) ?>>?", r"\1", text)
    text = re.sub(r"^=(?:cut|pod|back|over\b.*|begin\b.*|end\b.*|encoding\b.*|for\b.*)$", "", text, flags=re.M)
    return re.sub(r"^=(?:head\d|item) *", "", text, flags=re.M).replace("E<lt>", "<").replace("E<gt>", ">")


ROFF_ESCAPES = {
    r"\-": "-", r"\(aq": "'", r"\(dq": '"', r"\e": "\\", r"\&": "", r"\(bu": "*", r"\ ": " ", r"\(em": "--", r"\(en": "-",
    r"\(co": "(c)", r"\(lq": '"', r"\(rq": '"', r"\(oq": "'", r"\(cq": "'", r"\(->": "->", r"\(<=": "<=", r"\(>=": ">=",
    r"\(mu": "x", r"\(ha": "^", r"\(ti": "~", r"\/": "", r"\,": "", r"\|": "", r"\^": "", r"\:": "", r"\%": "", r"\c": "",
}  # fmt: skip


def man(text: str, path: str) -> str:
    """A manual page as running text with its headings."""
    lines: list[str] = []
    for line in text.split("\n"):
        if line.startswith((r".\"", r"'\"", ".if", ".ie", ".el", ".so")):
            continue
        if request := re.match(r"[.'] *(\w+)\s*(.*)", line):
            name, rest = request.groups()
            rest = rest if name in ("SH", "SS") else rest.replace(' "', " ").replace('" ', "").strip('"')
            if name in ("BR", "IR", "RB", "RI", "BI", "IB"):  # alternating fonts join their words
                rest = "".join(part.strip('"') for part in re.findall(r'"[^"]*"|\S+', request[2]))
            if name in ("SH", "SS"):
                line = "\n" + rest.strip('"')
            elif name in ("B", "I", "BR", "IR", "RB", "RI", "BI", "IB", "SM", "SB", "TH"):
                line = rest
            elif name in ("IP", "TQ"):
                line = "\n" + re.sub(r" \d+$", "", rest)
            elif name in ("PP", "P", "LP", "sp", "TP", "HP", "EX", "EE", "nf", "fi"):
                line = ""
            else:
                continue
        line = re.sub(r"\\f(?:[BIRPC]|\(..|\[\w*\])|\\s[-+]?\d|\\m\[\w*\]", "", line)
        for escape, character in ROFF_ESCAPES.items():
            line = line.replace(escape, character)
        lines.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def mallard(text: str, path: str) -> str:
    """A page of GNOME's help."""
    text = re.sub(r"<info>.*?</info>|<!--.*?-->|<\?.*?\?>", "", text, flags=re.S)
    text = re.sub(r"</(p|title|item|td|note|steps|list)>", "\n\n", text)
    text = re.sub(r"\s*\n\s*\n\s*", "\n\n", re.sub(r"<[^>]+>", "", text))
    text = "\n\n".join(re.sub(r"\s+", " ", part).strip() for part in text.split("\n\n"))
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def factbook(text: str, path: str) -> str:
    """A country of the World Factbook as headings and facts."""

    def lines(node: object, depth: int) -> list[str]:
        if not isinstance(node, dict):
            return []
        found: list[str] = []
        for name, value in node.items():
            if name == "text" and isinstance(value, str):
                found.append(re.sub(r"<[^>]+>", "", value))
            elif isinstance(value, dict):
                inner = lines(value, depth + 1)
                if inner and depth == 0:
                    found += ["", name.upper(), "", *inner]
                elif len(inner) == 1:
                    found.append(f"{name}: {inner[0]}")
                elif inner:
                    found += [f"{name}:", *("  " + line for line in inner)]
        return found

    return "\n".join(lines(json.loads(text), 0)) if path.count("/") == 2 and "package.json" not in path else ""


def mail(text: str, path: str) -> str:
    """A message with its main headers; HTML and encoded messages are left out."""
    head, _, body = text.partition("\n\n")
    if re.search(r"text/html|base64|quoted-printable|multipart", head, re.I):
        return ""
    kept = [line for line in head.split("\n") if re.match(r"(From|To|Subject|Date): ", line)]
    body = re.sub(r"\n_{20,}\n.*", "\n", body, flags=re.S)  # a mailing list's footer
    return "\n".join(kept) + "\n\n" + body


def play(text: str, path: str) -> str:
    """A play in Markdown as `NAME: what is said`, with headings and stage directions."""
    text = re.sub(r"^\*\*(.+?)\*\*[ ]*\n", r"\1: ", text, flags=re.M)
    return re.sub(r"^#+ *", "", text, flags=re.M).replace("_", "").replace("**", "")


def wesnoth(text: str, path: str) -> str:
    """The narration and the speeches of a campaign's scenario."""
    text = re.sub(r'"\s*\+\s*_?\s*"', "", text)
    said: list[str] = []
    for tag, body in re.findall(
        r"\[(message|part|scenario|option|then)\](.*?)(?=\[/?(?:message|part|scenario|option|then)\])", text, re.S
    ):
        found = re.search(r'(?:message|story|name)\s*=\s*_\s*"((?:[^"]|"")*)"', body)
        speaker = re.search(r"(?:speaker|id|role)\s*=\s*\"?([\w' -]+)", body)
        if not found:
            continue
        words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", found[1].replace('""', '"'))).strip()
        if tag == "message" and speaker and speaker[1] not in ("narrator", "unit", "second_unit"):
            words = f"{speaker[1].strip()}: {words}"
        said.append(words)
    return "\n\n".join(said)


def endless_sky(text: str, path: str) -> str:
    """The conversations of a game's missions: what is told, and the answers one can choose."""
    said: list[str] = []
    for line in text.split("\n"):
        if line.startswith("mission "):
            said.append("\n" + line[len("mission ") :].strip('" ').upper())
        elif (found := re.match(r"\t*(?:dialog )?`(.*)`", line)) and line.startswith("\t"):
            choice = said and line.startswith("\t\t\t\t")
            said.append(("> " if choice else "") + found[1].strip())
    return "\n\n".join(said)


def chatterbot(text: str, path: str) -> str:
    """A list of short conversations as `A:` and `B:` in turn, each once."""
    conversations: dict[str, None] = {}
    for block in re.split(r"^- (?=- )", text, flags=re.M)[1:]:
        turns = [line.strip("'\" ") for line in re.findall(r"^\s*- (.+)", block, flags=re.M)]
        conversations["\n".join(f"{'AB'[i % 2]}: {turn}" for i, turn in enumerate(turns))] = None
    return "\n\n".join(conversations)


READERS: dict[str, Reader] = {
    "plain": plain, "html": html, "code": source_code, "pod": pod, "man": man, "mallard": mallard, "factbook": factbook,
    "mail": mail, "play": play, "wesnoth": wesnoth, "endless_sky": endless_sky, "chatterbot": chatterbot, **SPEECH_READERS,
}  # fmt: skip
