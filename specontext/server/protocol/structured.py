"""What an output is to look like, as OpenAI (`response_format`) and vLLM (`structured_outputs`, `guided_...`) spell it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, Tag, model_validator

from specontext.sampling_params import LONGEST_GRAMMAR, MOST_CHOICES, StructuredOutputsParams
from specontext.server.protocol.bounds import Name, Schema
from specontext.server.protocol.common import Body, unsupported

Grammar = Annotated[str, Field(min_length=1, max_length=LONGEST_GRAMMAR)]
Choices = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MOST_CHOICES)]


class StructuredOutputs(Body):
    """As vLLM has it."""

    json_: Schema | Grammar | None = Field(None, alias="json")
    regex: Grammar | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    disable_additional_properties: unsupported("say additionalProperties in the schema", False) = None  # type: ignore[valid-type]
    structural_tag: unsupported("structural tags are not implemented: use strict tools") = None  # type: ignore[valid-type]

    def params(self) -> StructuredOutputsParams | None:
        """What the engine takes; raises RequestError."""
        given = self.model_dump(by_alias=True, exclude={"structural_tag", "disable_additional_properties"})
        if all(value in (None, False) for value in given.values()):
            return None
        return StructuredOutputsParams(**given)


class FormatText(Body):
    type: Literal["text"]


class FormatObject(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    name: Name = "schema"
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class FormatSchema(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


def type_tag(value: Any) -> str | None:
    """Which of several types a value says it has; in capitals, as errors do not show tags as fields then."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind.capitalize() if isinstance(kind, str) else None


ResponseFormat = Annotated[
    Annotated[FormatText, Tag("Text")]
    | Annotated[FormatObject, Tag("Json_object")]
    | Annotated[FormatSchema, Tag("Json_schema")],
    Discriminator(
        type_tag,
        custom_error_type="response_format",
        custom_error_message="give an object whose type is text, json_object or json_schema",
    ),
]


class StructuredBody(Body):
    """The fields of vLLM, which chats and completions share."""

    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | Grammar | None = None
    guided_regex: Grammar | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    guided_whitespace_pattern: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    guided_decoding_backend: unsupported("there is one", "auto", "guidance") = None  # type: ignore[valid-type]
    response_format: ResponseFormat | None = None
    _format_field: str = PrivateAttr("response_format")  # by another name in other protocols

    @model_validator(mode="after")
    def _one_form(self) -> StructuredBody:
        formats = [self.response_format is not None and self.response_format.type != "text", self._guided()]
        if sum([*map(bool, formats), self.structured_outputs is not None and self.structured_outputs.params() is not None]) > 1:
            raise ValueError("structured_outputs, guided_... and response_format exclude each other: give one of them")
        return self

    def _guided(self) -> dict[str, Any]:
        names = ("json", "regex", "choice", "grammar")
        return {name: value for name in names if (value := getattr(self, f"guided_{name}")) is not None}

    @property
    def structured_field(self) -> str:
        """The field that says what the output must look like."""
        guided = next(iter(self._guided()), None)
        return (
            f"guided_{guided}" if guided else "structured_outputs" if self.structured_outputs is not None else self._format_field
        )

    def structured_params(self) -> StructuredOutputsParams | None:
        """What the output must look like, None for anything; raises RequestError."""
        if guided := self._guided():
            return StructuredOutputsParams(**guided, whitespace_pattern=self.guided_whitespace_pattern)
        if self.structured_outputs is not None:
            return self.structured_outputs.params()
        if isinstance(self.response_format, FormatObject):
            return StructuredOutputsParams(json_object=True)
        if isinstance(self.response_format, FormatSchema):
            return StructuredOutputsParams(json=self.response_format.json_schema.schema_ or {"type": "object"})
        return None
