"""Calls of tools in the forms of different families, however the text is cut."""

from __future__ import annotations

import copy
import json
import random
import time
from types import SimpleNamespace
from typing import Any

import pytest

from specontext.grammars.compiler import GrammarCompiler
from specontext.sampling_params import StructuredOutputsParams
from specontext.server.tool_support import ToolSupport
from specontext.server.tools.choice import ToolUse
from specontext.server.tools.formats import FORMATS, MAYBE_SPACE, detect
from specontext.server.tools.pieces import CallArguments, CallBegin, Text, Thought, Tool, joined

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = (Tool("weather", SCHEMA), Tool("stop-it"), Tool("w", SCHEMA))
OSLO = {"city": 'Os"lo}] \\ é', "days": 3}
ARGUMENTS = json.dumps(OSLO, ensure_ascii=False)
CALL = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
STOP = '{"name": "stop-it", "arguments": {}}'
WEATHER: Any = ("weather", OSLO)
STOPPED: Any = ("stop-it", {})
PAIRS = f"<arg_key>city</arg_key>\n<arg_value>{OSLO['city']}</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n"
PARAMETERS = f"<parameter=city>\n{OSLO['city']}\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
FUNCTION = f"<function=weather>\n{PARAMETERS}</function>"
OTHER = "<tool_call>\n<function=other>\n</function>\n</tool_call>"
TO_STOP = "<|channel|>commentary to=functions.stop-it<|message|>"
END_TURN = "<|end|><|start|>assistant"
UNKNOWN = '<tool_call>{"name": "other", "arguments": {}}</tool_call> x'


def read(form: str, text: str, cuts: list[int], mode: str = "auto") -> tuple[str, list[tuple[str, Any]]]:
    """The text and the calls of an output, fed in pieces."""
    reader = ToolUse(TOOLS, mode, form=FORMATS[form]).reader()
    pieces, begin = [], 0
    for cut in [*cuts, len(text)]:
        pieces += reader.feed(text[begin:cut])
        begin = cut
    pieces += reader.finish()
    said, calls = "", []
    for piece in pieces:
        if isinstance(piece, Text):
            said += piece.text
        elif isinstance(piece, CallBegin):
            calls.append([piece.name, ""])
        else:
            assert isinstance(piece, CallArguments)
            calls[-1][1] += piece.text
    return said, [(name, json.loads(arguments)) for name, arguments in calls]


CASES: list[tuple[str, str, str, list[Any]]] = [
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
    ("hermes", f"So.\n\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{STOP}\n</tool_call>\n", "So.", [WEATHER, STOPPED]),
    ("hermes", f"<tool_call>{CALL}", "", [WEATHER]),
    ("hermes", f'<tool_call>{{"arguments": {ARGUMENTS}, "name": "weather"}}</tool_call>', "", [WEATHER]),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {json.dumps(ARGUMENTS)}}}</tool_call>', "", [WEATHER]),
    ("hermes", '<tool_call>{"name": "stop-it"}</tool_call>', "", [STOPPED]),
    ("hermes", '<tool_call>{"name": "stop-it", "arguments": null}</tool_call>', "", [STOPPED]),
    ("hermes", '<tool_call>{"name": "stop-it", "arguments": ""}</tool_call>', "", [STOPPED]),
    ("hermes", '<tool_call>{"name": "w", "arguments": [1, 2]}</tool_call>', "", [("w", [1, 2])]),
    ("hermes", '<tool_call>{"name": "w", "arguments": "Oslo"}</tool_call>', "", [("w", "Oslo")]),
    ("hermes", '<tool_call>{"arguments": 3, "name": "w"}</tool_call>', "", [("w", 3)]),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}, "parameters": null}}</tool_call>', "", [WEATHER]),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}, "parameters": {{}}}}</tool_call>', "", [WEATHER]),
    ("hermes", f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}, "name": "w"}}</tool_call>', "", [WEATHER]),
    ("hermes", f"<tool_call>{STOP[:-1]} oops}}</tool_call>", "oops}</tool_call>", [STOPPED]),
    ("hermes", f'<tool_call>{STOP}\n{{"na', '{"na', [STOPPED]),
    ("hermes", UNKNOWN, UNKNOWN, []),
    ("hermes", "1 < 2 and <tool_cal", "1 < 2 and <tool_cal", []),
    ("hermes", "  no call\n", "  no call\n", []),
    ("hermes", f"<tool_call>{CALL}</tool_call> so?", "so?", [WEATHER]),
    ("llama3_json", f'{{"name": "weather", "parameters": {ARGUMENTS}}}', "", [WEATHER]),
    ("llama3_json", f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {ARGUMENTS}}}', "", [WEATHER]),
    ("llama3_json", f'{{"type": "function", "function": "weather", "parameters": {ARGUMENTS}}}', "", [WEATHER]),
    ("llama3_json", '{"function": "cosine", "name": "other"}', '{"function": "cosine", "name": "other"}', []),
    ("llama3_json", f"{CALL}; {STOP}", "", [WEATHER, STOPPED]),
    ("llama3_json", f'{STOP}; {{"name": "other"}} so', '{"name": "other"} so', [STOPPED]),
    ("llama3_json", '{"a": [1, 2]}', '{"a": [1, 2]}', []),
    ("llama3_json", 'So {"name": "w"}', 'So {"name": "w"}', []),
    ("pythonic", f"[weather(city={OSLO['city']!r}, days=3), w()]", "", [WEATHER, ("w", {})]),
    ("pythonic", '<|python_start|>[w(city="]", days=null)]<|python_end|>', "", [("w", {"city": "]", "days": None})]),
    ("pythonic", "[1, 2] are numbers", "[1, 2] are numbers", []),
    ("pythonic", "[other(a=1)]", "[other(a=1)]", []),
    ("pythonic", "[w(days=1, days=2)]", "[w(days=1, days=2)]", []),
    ("pythonic", '[w(**{"city": "Oslo"})]', '[w(**{"city": "Oslo"})]', []),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {STOP}]", "", [WEATHER, STOPPED]),
    ("mistral", f"So: [TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]stop-it{{}}", "So:", [WEATHER, STOPPED]),
    ("mistral_args", f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{ARGUMENTS}", "", [WEATHER]),
    ("mistral", "[TOOL_CALLS]what now", "[TOOL_CALLS]what now", []),
    ("glm4", f"weather\n{ARGUMENTS}", "", [WEATHER]),
    ("glm4", "weather is fine\n{", "weather is fine\n{", []),
    ("glm45", f"<tool_call>weather\n{PAIRS}</tool_call>", "", [WEATHER]),
    ("qwen3_coder", f"Hm.\n<tool_call>\n<function=weather>\n{PARAMETERS}</function>\n</tool_call>", "Hm.", [WEATHER]),
    ("qwen3_coder", OTHER, OTHER, []),
    ("qwen3_coder", f"Hm.\n{FUNCTION}\n</tool_call>\nso", "Hm.so", [WEATHER]),
    ("qwen3_coder", f"{FUNCTION}\n{FUNCTION}", "", [WEATHER, WEATHER]),
    ("qwen3_coder", f"{FUNCTION}\n</tool_call>\n<tool_call>{FUNCTION}</tool_call>", "", [WEATHER, WEATHER]),
    ("qwen3_coder", f"{FUNCTION} </tool", "</tool", [WEATHER]),
    ("qwen3_coder", "a <function=other></function> </tool_call>", "a <function=other></function> </tool_call>", []),
    ("harmony", f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}", "", [WEATHER]),
    ("harmony", f" to=functions.weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>", "", [WEATHER]),
    ("harmony", f"<|channel|>commentary<|message|>So.<|end|><|start|>assistant{TO_STOP}<|call|>", "So.", [STOPPED]),
    ("harmony", f"<|start|>assistant<|channel|>final<|message|>1 <| 2{END_TURN}{TO_STOP}", "1 <| 2", [STOPPED]),
    ("harmony", "<|channel|>final<|message|>\n a <|en<|return|>", "\n a <|en", []),
    ("harmony", "goes on <|here", "goes on <|here", []),
    ("harmony", "<|channel|>commentary to=other <|message|>{}", "<|channel|>commentary to=other <|message|>{}", []),
    ("harmony", "<|channel|>commentary to=functions.wea", "", []),
    ("granite", f"<|tool_call|>[{CALL}]", "", [WEATHER]),
    ("phi4_mini_json", f"functools[{CALL},{STOP}]", "", [WEATHER, STOPPED]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "said", "calls"), CASES)
def test_calls_are_found_however_the_text_is_cut(form: str, text: str, said: str, calls: list[Any]) -> None:
    rng = random.Random(text)
    ways = [[], list(range(1, len(text)))] + [sorted(rng.sample(range(len(text)), min(4, len(text)))) for _ in range(20)]
    for cuts in ways:
        assert read(form, text, cuts) == (said, calls), cuts


@pytest.mark.parametrize("form", ["pythonic", "glm45", "qwen3_coder"])
def test_forced_calls_of_forms_without_json_are_a_list(form: str) -> None:
    assert read(form, f"[{CALL}, {STOP}]", [], mode="required") == ("", [WEATHER, STOPPED])


def test_arguments_come_as_they_are_written() -> None:
    reader = ToolUse(TOOLS, form=FORMATS["hermes"]).reader()
    assert reader.feed('<tool_call>{"name": "weather", "argum') == [CallBegin("weather")]
    assert reader.feed('ents": {"ci') == [CallArguments('{"ci')]
    assert reader.feed('ty": "O') == [CallArguments('ty": "O')]
    assert reader.feed('slo"}}') == [CallArguments('slo"}')]


@pytest.mark.parametrize("form", FORMATS)
def test_long_and_odd_texts_take_no_time_and_lose_nothing(form: str) -> None:
    for text in ("<|channel|>" * 300, "<|start|>assistant" * 300):
        assert not read(form, text, list(range(0, len(text), 7)))[1]
    for text in ("{" * 5000, "[" * 5000, "<" * 5000, "<tool_call>" * 500, '"' * 5000, "weather" * 1000, "[TOOL_CALLS]" * 300):
        said, calls = read(form, text, list(range(0, len(text), 7)))
        assert not calls and said.replace("<tool_call>", "").replace("[TOOL_CALLS]", "") in text


PARTS = (
    *(
        "{",
        "}",
        "[",
        "]",
        '"',
        ",",
        ":",
        " ",
        "\n",
        "\\",
        "é",
        "null",
        "other",
        "weather",
        "stop-it",
        "w",
        "weather\n",
        "<",
        "</",
        STOP,
        CALL,
    ),
    *(
        "[TOOL_CALLS]",
        "<tool_call>",
        "</tool_call>",
        "<|tool_call|>",
        "<|python_start|>",
        "<|python_end|>",
        "[ARGS]",
        "functools",
    ),
    *("<function=weather>", "</function>", "<parameter=city>", "<arg_key>", "</arg_key>", "<arg_value>", "weather(city='a')"),
)


@pytest.mark.parametrize("form", FORMATS)
def test_broken_calls_are_read_alike_however_they_are_cut_and_lose_no_text(form: str) -> None:
    rng = random.Random(0)

    def pieces(text: str, cuts: list[int]) -> list[Any]:
        reader = ToolUse(TOOLS, form=FORMATS[form]).reader()
        places = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return joined([*(piece for begin, end in places for piece in reader.feed(text[begin:end])), *reader.finish()])

    for _ in range(400):
        text = "".join(rng.choices(PARTS, k=rng.choice((2, 4, 8, 14))))
        whole = pieces(text, [])
        for number in (1, 3, len(text)):
            assert pieces(text, sorted(rng.randint(0, len(text)) for _ in range(number))) == whole, text
        if all(isinstance(piece, Text) for piece in whole) and "<|python_" not in text:
            assert "".join(piece.text for piece in whole).strip() == text.strip()


MAYBE_TEXT = {"anyOf": [{"type": "string"}, {"type": "null"}]}
TEXTS_OR_NUMBERS = {"type": ["string", "integer"]}
DOUBLED = {str(i): {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2} for i in range(60)}  # of which each way is no way to go
DEFINED = {"$defs": {"Code": {"enum": ["1", "2"]}, "Self": {"$ref": "#/$defs/Self"}, "60": {"type": "string"}, **DOUBLED}}


@pytest.mark.parametrize("form", ["glm45", "qwen3_coder"])
@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "12345", "12345"),
        ({"type": ["string", "null"]}, "12345", "12345"),
        ({"type": ["string", "null"]}, "null", None),
        (MAYBE_TEXT, "12345", "12345"),
        (MAYBE_TEXT, "true", "true"),
        (MAYBE_TEXT, "[1]", "[1]"),
        (MAYBE_TEXT, '"so"', '"so"'),
        (MAYBE_TEXT, "None", None),
        (TEXTS_OR_NUMBERS, "12", 12),
        (TEXTS_OR_NUMBERS, "1.5", "1.5"),
        ({"type": ["string", "number"]}, "12", 12),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": "1"}, "1", "1"),
        ({"$ref": "#/$defs/Code"}, "1", "1"),
        ({"allOf": [{"$ref": "#/$defs/Code"}], "default": "2"}, "1", "1"),
        ({"anyOf": [{"$ref": "#/$defs/Code"}, {"type": "integer"}]}, "1", 1),
        ({"anyOf": [{"type": "string"}, {}]}, "1", 1),
        ({"$ref": "#/$defs/Self"}, "1", 1),
        ({"$ref": "https://example.org/none"}, "1", 1),
        ({"type": "integer"}, "many", "many"),
        ({"type": "array"}, "['a', True, None]", ["a", True, None]),
        ({"anyOf": [{"type": "object"}, {"type": "null"}]}, "{'a': {'b': 1}}", {"a": {"b": 1}}),
        ({"type": ["array", "string"]}, "['a']", "['a']"),
        ({"type": "array"}, "{'a': 1}", "{'a': 1}"),
        ({"type": "array"}, "[1,", "[1,"),
        (MAYBE_TEXT, "9" * 400, "9" * 400),
        ({"$ref": "#/$defs/0"}, "1", "1"),
        ({"type": 5, "enum": "ab", "anyOf": {}, "$ref": 1}, "1", 1),
    ],
)
def test_values_between_tags_have_the_types_of_their_schemas(form: str, schema: Any, text: str, value: Any) -> None:
    tool = Tool("weather", {"type": "object", "properties": {"other": schema}, **DEFINED})
    reader = ToolUse((tool,), "auto", form=FORMATS[form]).reader()
    pieces = [*reader.feed(TAGGED[form] % text), *reader.finish()]
    arguments = "".join(piece.text for piece in pieces if isinstance(piece, CallArguments))
    assert arguments == json.dumps({"other": value})


@pytest.mark.parametrize("form", ["glm45", "qwen3_coder"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "additionalProperties": {"type": "string"}},
        {"$ref": "#/$defs/All", "$defs": {"All": {"properties": {"other": {"type": "string"}}}}},
        {"allOf": [{"properties": {"other": {}}}, {"properties": {"other": {"type": "string"}}}]},
        {"anyOf": [{"properties": {"more": {}}}, {"properties": {"other": {"type": "string"}}}]},
        {"$ref": "#", "properties": {"other": {"type": "string"}}, "additionalProperties": {"type": "integer"}},
    ],
)
def test_types_are_found_wherever_a_schema_speaks_of_an_argument(form: str, parameters: Any) -> None:
    reader = ToolUse((Tool("weather", parameters),), "auto", form=FORMATS[form]).reader()
    pieces = [*reader.feed(TAGGED[form] % "12"), *reader.finish()]
    assert pieces[-1] == CallArguments('{"other": "12"}')


ODD = [
    "NaN",
    "1e999",
    "[1e999]",
    "{'a': {1, 2}}",
    "b'x'",
    "1j",
    "...",
    "{(1, 2): 3}",
    "{[1]: 2}",
    "{**w}",
    "[" * 5000 + "]" * 5000,
]
TAGGED = {
    "pythonic": "[weather(other=%s)]",
    "glm45": "<tool_call>weather\n<arg_key>other</arg_key>\n<arg_value>%s</arg_value>\n</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=other>\n%s\n</parameter>\n</function>\n</tool_call>",
}


@pytest.mark.parametrize("form", TAGGED)
@pytest.mark.parametrize("value", ODD)
def test_values_that_json_does_not_have_are_texts(form: str, value: str) -> None:
    said, calls = read(form, TAGGED[form] % value, [])
    assert (said, calls) == (("", [("weather", {"other": value})]) if form != "pythonic" else (TAGGED[form] % value, []))


@pytest.mark.parametrize("form", TAGGED)
@pytest.mark.parametrize(
    "value", ["</parameter>x", "a </arg_value>\nb", "if </function> then", "</parameter></arg_value>.", "<b> &amp;\\n"]
)
def test_values_may_have_tags_in_them(form: str, value: str) -> None:
    text = TAGGED[form] % (repr(value) if form == "pythonic" else value)
    assert read(form, text, list(range(0, len(text), 3))) == ("", [("weather", {"other": value})])


@pytest.mark.parametrize("form", TAGGED)
def test_half_characters_of_arguments_are_sent_as_escapes(form: str) -> None:
    reader = ToolUse(TOOLS, "auto", form=FORMATS[form]).reader()
    pieces = [*reader.feed(TAGGED[form] % r'"a\ud83d"'), *reader.finish()]
    arguments = "".join(piece.text for piece in pieces if isinstance(piece, CallArguments))
    assert arguments.isascii()
    assert json.loads(arguments) == {"other": "a\ud83d"}


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>weather" + "<arg_key>a" * 20_000,
        "<tool_call><function=" + "<function=" * 20_000,
        "<tool_call><function=weather>" + "<parameter=a></parameter> </function>." * 10_000,
        "<tool_call>weather" + "<arg_key>a</arg_key><arg_value></arg_value>." * 10_000,
        "<function=weather>" + "</function>" + " " * 20_000,
    ],
)
def test_tags_that_never_close_cost_no_more_than_their_length(text: str) -> None:
    began = time.monotonic()
    for form in ("glm45", "qwen3_coder"):
        read(form, text, list(range(0, len(text), 1000)))
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("form", FORMATS)
def test_blanks_cost_no_more_than_their_length_and_are_read_alike_however_they_are_cut(form: str) -> None:
    mark, many = FORMATS[form].mark, " \n" * 40_000
    for text in ("so" + many, many + mark + many[:99] + "<", f"<|start|>{many[:99]}<|channel|>final<|message|>{many[:99]}x"):
        began = time.process_time()
        cut = read(form, text, list(range(1, len(text))))
        assert time.process_time() - began < 5  # what goes through all of it for every blank takes ten
        assert cut == read(form, text, [])


def test_templates_tell_their_form() -> None:
    templates = {
        "hermes": "{% if tools %}<tool_call>{% endif %}",
        "llama3_json": '{% if tools is not none %}Respond in the format {"name": f, "parameters": {}}{% endif %}',
        "mistral": "{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]",
        "mistral_args": "{% if tools %}{% endif %}[TOOL_CALLS]f[ARGS]",
        "glm4": "{% if tools %}{% endif %}<|observation|>",
        "harmony": "{% if tools %}<|start|>assistant<|channel|>{% endif %}",
        "glm45": "{% if tools %}{% endif %}<|observation|><tool_call>f<arg_key>",
        "qwen3_coder": "{% if tools %}<tool_call><function=f>{% endif %}",
        "phi4_mini_json": "{% if tools %}functools[{}]{% endif %}",
        "pythonic": "{% if tools %}[func_name1(params_name1=params_value1]{% endif %}",
    }
    assert {name: detect(template) for name, template in templates.items()} == {name: name for name in templates}
    assert detect("{{ messages }}<tool_call>") is None


@pytest.mark.parametrize("form", [name for name in FORMATS if FORMATS[name].spelling is not None])
@pytest.mark.parametrize("special", [True, False])
def test_grammars_allow_what_readers_read(form: str, special: bool, tokenizer: Any) -> None:
    """A call in the form, forced or behind text, is taken token by token; other arguments and other texts are not."""
    own = copy.deepcopy(tokenizer)
    if special:
        own.add_tokens(["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|tool_call|>"], special_tokens=True)
    compiler = GrammarCompiler(own, vocab_size=len(own), end_token_ids=[1])

    def token_of(mark: str) -> int | None:
        [first, *rest] = own(mark, add_special_tokens=False)["input_ids"]
        return first if not rest and compiler.is_special(first) else None

    def follows(use: ToolUse, text: str) -> bool:
        wanted = use.grammar(token_of)
        assert wanted is not None
        state, ids = compiler.compile(wanted).begin(), own(text, add_special_tokens=False)["input_ids"]
        return all(state.matcher.consume_token(token) for token in ids) and state.matcher.is_accepting()

    strict = (Tool("weather", SCHEMA | {"required": ["city", "days"], "additionalProperties": False}, strict=True),)
    spelling = FORMATS[form].spelling
    assert spelling is not None
    begin = (spelling.open + spelling.begin.replace("NAME", "weather")).replace(MAYBE_SPACE, " ")
    call = begin + '{"city": "Oslo", "days": 3}' + spelling.end + spelling.close
    assert read(form, call, []) == ("", [("weather", {"city": "Oslo", "days": 3})])
    forced = ToolUse(strict, "required", form=FORMATS[form])
    assert follows(forced, call) and not follows(forced, "Oslo") and not follows(forced, call.replace("3", '"3"'))
    free = ToolUse(strict, form=FORMATS[form])
    if free.grammar(token_of) is not None:
        assert follows(free, call) and follows(free, "Oslo") and not follows(free, call.replace("3", '"3"'))


def test_thinking_in_channels_is_told_from_words_and_calls() -> None:
    reader = ToolUse(TOOLS, form=FORMATS["harmony"]).reader()
    text = f"<|channel|>analysis<|message|>Hm.{END_TURN}{TO_STOP}{{}}"
    pieces = [piece for character in text for piece in reader.feed(character)] + reader.finish()
    assert joined(pieces) == [Thought("Hm."), CallBegin("stop-it"), CallArguments("{}")]


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        ({"json": {"enum": [3]}}, "3", "4"),
        ({"regex": "[0-9]/[0-9]"}, "1/2", "1:2"),
        ({"choice": ["yes", "n\u00f6"]}, "n\u00f6", "no"),
        ({"json_object": True}, '{"a": 1}', "[1]"),
    ],
)
def test_answers_and_calls_in_channels_follow_grammars(wanted: Any, good: str, bad: str, tokenizer: Any) -> None:
    own = copy.deepcopy(tokenizer)
    own.add_tokens(["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>"], special_tokens=True)
    compiler = GrammarCompiler(own, vocab_size=len(own), end_token_ids=[1])

    def token_of(mark: str) -> int | None:
        return int(own.convert_tokens_to_ids(mark)) if compiler.is_special(own.convert_tokens_to_ids(mark)) else None

    def follows(grammar: StructuredOutputsParams | None, text: str) -> bool:
        assert grammar is not None
        state = compiler.compile(grammar).begin()
        ids = own(text, add_special_tokens=False)["input_ids"]
        return all(state.matcher.consume_token(token) for token in ids) and state.matcher.is_accepting()

    strict = (Tool("weather", SCHEMA | {"required": ["days"], "additionalProperties": False}, strict=True),)
    thought = f"<|channel|>analysis<|message|>Hm? {bad} {END_TURN}"
    final, call = "<|channel|>final<|message|>", "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    free = ToolUse(strict, form=FORMATS["harmony"])
    beside = free.grammar_in_channels(StructuredOutputsParams(**wanted), token_of)
    for begun in ("", thought):
        assert follows(beside, f"{begun}{final}{good}") and not follows(beside, f"{begun}{final}{bad}")
        for grammar in (beside, free.grammar(token_of), ToolUse(strict, "required", form=FORMATS["harmony"]).grammar(token_of)):
            assert follows(grammar, begun + call + '{"days": 3}') and not follows(grammar, begun + call + '{"days": "3"}')
    assert follows(free.grammar(token_of), thought + final + bad)
    assert not follows(ToolUse(strict, "required", form=FORMATS["harmony"]).grammar(token_of), final + good)


def test_the_form_of_calls_is_found_in_templates_by_name() -> None:
    """Quotes and line ends are looked at as they stand in the text."""
    tokenizer = SimpleNamespace(
        chat_template={
            "default": "{{ messages }}",
            "tool_use": 'Respond in the format {"name": ..., "parameters": ...} {{ tools }}',
        }
    )
    assert ToolSupport("auto", tokenizer, None).name == "llama3_json"  # type: ignore[arg-type]
