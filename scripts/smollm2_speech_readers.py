"""What is said in games' scripts and in collections of sayings, as plain text: readers as those of `smollm2_readers`."""

from __future__ import annotations

import re

STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"|\[\[(.*?)\]\]', re.S)
SPEAKER = re.compile(r"\b([A-Z]\w*):says\w*\s?\(_?\(?$")


def script(text: str, path: str) -> str:
    """The sentences among a script's strings (Lua, Python, C and Ren'Py), after who says them where the script tells.

    A sentence has four words or more, or ends like one; what is left of names, keys and paths is no speech.
    """
    text = re.sub(r"^\s*(?:#|--|//).*$", "", text, flags=re.M)
    said: list[str] = []
    for match in STRING.finditer(text):
        words = (match[1] if match[1] is not None else match[2]).replace("\\n", "\n").replace('\\"', '"').replace("\\'", "'")
        words = re.sub(r"^`.|\[/?\w\]|\{/?[a-z]+[^}]*\}", "", words)
        words = re.sub(r"\s*\n\s*", "\n", words.strip())
        if words.count(" ") >= 3 or re.search(r"\w[.!?…]+$", words):
            speaker = SPEAKER.search(text, max(0, match.start() - 40), match.start())
            said.append(f"{speaker[1]}: {words}" if speaker else words)
    return "\n\n".join(said)


def crossfire(text: str, path: str) -> str:
    """The messages of a map: what stands in books and on signs, and the answers to what a player says."""
    found = dict.fromkeys(re.findall(r"^msg\n(.*?)\n^endmsg", text, re.M | re.S))
    kept = [message for message in found if message.count(" ") >= 6 and "decorstyle" not in message]
    return re.sub(r"^@match (.*)$", r"\n> \1", "\n\n".join(kept), flags=re.M)


def gearhead(text: str, path: str) -> str:
    """The messages, questions and answers between angle brackets."""
    found = dict.fromkeys(re.findall(r"<([^<>\n]*)>", text))
    return "\n\n".join(words for words in found if re.search(r"[a-z].*[.!?]\s*$", words) and words.count(" ") >= 3)


def flare(text: str, path: str) -> str:
    """The turns of a game's conversations and the texts of its quests."""
    turns = re.findall(r"^(him|her|you|quest_text)=(.+)$", text, re.M)
    name = re.search(r"^name=(.+)$", text, re.M)
    speakers = {"you": "Hero: ", "him": f"{name[1]}: " if name else "", "her": f"{name[1]}: " if name else "", "quest_text": ""}
    return "\n\n".join(speakers[who] + words.replace("|", "\n") for who, words in turns)


JUDGED_AUTHORS = re.compile(r"Austen|Carroll|Chesterton|Shakespeare|Alice|Hamlet|Jabberwock")  # their works are held out


def fortunes(text: str, path: str) -> str:
    """Sayings and short dialogues, one after another, without those from books and plays that judge."""
    sayings = (saying.strip("\n") for saying in re.split(r"^%\n", text, flags=re.M))
    return "\n\n".join(saying for saying in sayings if not JUDGED_AUTHORS.search(saying))


def aiml(text: str, path: str) -> str:
    """A chatterbot's questions and answers; answers that only pass the question on are left out."""
    pairs: dict[str, str] = {}
    for question, answer in re.findall(r"<pattern>(.*?)</pattern>.*?<template>(.*?)</template>", text, re.S):
        words = re.sub(r"\s+", " ", re.sub(r"<think>.*?</think>|<(?:srai|sr)\b.*|<[^>]+>", "", answer, flags=re.S)).strip()
        if words.count(" ") >= 3 and "*" not in question and "_" not in question:
            pairs.setdefault(words, re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", question)).strip().capitalize())
    return "\n\n".join(f"> {question}\n{answer}" for answer, question in pairs.items())


SPEECH_READERS = {
    "script": script, "crossfire": crossfire, "gearhead": gearhead, "flare": flare, "fortunes": fortunes, "aiml": aiml,
}  # fmt: skip
