"""The metrics of LongBench (arXiv 2308.14508), each the similarity in 0..1 of an output and one accepted answer.

They give the numbers of upstream's `metrics.py` with the packages it names (`rouge` 1.0.1; `fuzzywuzzy` without its C
extension), with one exception: where upstream's Rouge-L runs out of stack (sentences of about a thousand words) and scores 0, it
is computed here.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

from specontext.evaluation.suites.data_files import INSTALL, DataFileError

Metric = Callable[[str, str, Sequence[str]], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NUMBERS = re.compile(r"\d+")
_PUNCTUATION = frozenset(string.punctuation)
_CHINESE_PUNCTUATION = _PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def qa_f1(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, in lower case and without articles and punctuation."""
    return _f1(_english_words(output), _english_words(answer))


def qa_f1_zh(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words that `jieba` finds, without punctuation."""
    return _f1(_chinese_words(output), _chinese_words(answer))


def rouge(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Rouge-L over whole texts, as the package `rouge` has it.

    Texts are cut into sentences at full stops. Of every pair of sentences the longest common subsequence is taken (of equally
    long ones that which is met going back through the output first); the distinct words of all of these, over the distinct words
    of answer and output, are recall and precision.
    """
    outputs, answers = _sentences(output), _sentences(answer)
    if not outputs or not answers:
        return 0.0
    common = {word for mine in outputs for theirs in answers for word in _common_subsequence(theirs, mine)}
    precision = len(common) / len({word for sentence in outputs for word in sentence})
    recall = len(common) / len({word for sentence in answers for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_zh(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Rouge-L of the words that `jieba` finds."""
    return rouge(" ".join(_cut(output)), " ".join(_cut(answer)))


def classification(output: str, answer: str, classes: Sequence[str]) -> float:
    """One over the number of classes that the output names, if the right one is among them.

    A class that is part of the right class's name does not count, but of several such neighbours upstream passes over every
    second.
    """
    named = [name for name in classes if name in output]
    place = 0
    while place < len(named):
        if named[place] in answer and named[place] != answer:
            named.remove(named[place])
        place += 1
    return 1 / len(named) if answer in named else 0.0


def count(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the output's numbers that are the answer."""
    numbers = _NUMBERS.findall(output)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the output's numbers that are the paragraph's ("Paragraph 7")."""
    return count(output, _paragraph(r"Paragraph (\d+)", answer))


def retrieval_zh(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the output's numbers that are the paragraph's ("段落7")."""
    return count(output, _paragraph(r"段落(\d+)", answer))


def code_similarity(output: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Similarity in whole percent of the answer and the output's first line that is neither a comment nor a code fence."""
    lines = output.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


METRICS: dict[str, Metric] = {
    metric.__name__: metric
    for metric in (qa_f1, qa_f1_zh, rouge, rouge_zh, classification, count, retrieval, retrieval_zh, code_similarity)
}
NEED_JIEBA = frozenset({"qa_f1_zh", "rouge_zh"})


def load_jieba() -> Any:
    """The package that finds words in Chinese text.

    Raises:
        DataFileError: it is not installed.
    """
    try:
        return importlib.import_module("jieba")
    except ImportError as error:
        raise DataFileError(f"scoring Chinese answers needs the package jieba: {INSTALL}") from error


def _f1(output: Sequence[str], answer: Sequence[str]) -> float:
    same = sum((Counter(output) & Counter(answer)).values())
    if not same:
        return 0.0
    precision, recall = same / len(output), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def _english_words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return _ARTICLES.sub(" ", bare).split()


def _cut(text: str) -> list[str]:
    return list(load_jieba().cut(text, cut_all=False))


def _chinese_words(text: str) -> list[str]:
    bare = ("".join(c for c in word.lower() if c not in _CHINESE_PUNCTUATION) for word in _cut(text))
    return [word for word in ("".join(word.split()) for word in bare) if word]


def _sentences(text: str) -> list[list[str]]:
    # A sentence of blanks only is one empty word, which counts like any other.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> list[str]:
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for place, other in enumerate(second):
            row.append(above[place] + 1 if word == other else max(above[place + 1], row[place]))
        table.append(row)
    words: list[str] = []
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            words.append(first[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _paragraph(pattern: str, answer: str) -> str:
    found = re.search(pattern, answer)
    if not found:
        raise DataFileError(f"the answer {answer!r} names no paragraph")
    return found[1]
