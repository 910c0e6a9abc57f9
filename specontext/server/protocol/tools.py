"""Tools in bodies: their descriptions, what is chosen among them, and calls in messages."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, field_validator

from specontext.server.protocol.bounds import MOST_TOOLS, Name, Schema
from specontext.server.protocol.common import Body

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]


class Function(Body):
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = Field(None, description="Arguments follow the schema.")

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        stated = (value or {}).get("type", "object")
        if stated != "object" and not (isinstance(stated, list) and "object" in stated):
            raise ValueError("arguments are an object: the schema's type must be 'object'")
        return value

    def for_template(self) -> dict[str, Any]:
        """As chat templates know functions."""
        shown: dict[str, Any] = {"name": self.name, "description": self.description or ""}
        return shown | {"parameters": self.parameters or {"type": "object", "properties": {}}}


class FunctionTool(Body):
    type: Literal["function"]
    function: Function

    @field_validator("type", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "function":
            raise ValueError(f"tools of type '{value[:50]}' are not supported: only functions are")
        return value


ToolList = Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MOST_TOOLS)]


class ChosenFunction(Body):
    name: ToolName


class NamedChoice(Body):
    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(fail_fast=True, min_length=1, max_length=MOST_TOOLS)]


class AllowedChoice(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice


def arguments_object(text: str) -> dict[str, Any]:
    """Arguments as an object; what is none, since the model left it unfinished or wrote no JSON, is shown as it is."""
    if text.strip() in ("", "null"):
        return {}
    try:
        found = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"unfinished": text}


def _as_object(value: Any) -> Any:
    """Arguments as chat templates write them out. Clients send back what a model wrote, for it to do better, whatever it was."""
    if isinstance(value, str):
        return arguments_object(value)
    if value is not None and not isinstance(value, dict):
        raise ValueError("the arguments of a call must be a JSON object, as a text")
    return value or {}


class CalledFunction(Body):
    name: ToolName
    arguments: Annotated[
        dict[str, Any], BeforeValidator(_as_object), WithJsonSchema({"type": "string", "description": "A JSON object."})
    ] = Field(default_factory=dict)
    parsed_arguments: Any = Field(None, description="What clients made of the arguments; changes nothing.")


class CallInMessage(Body):
    """A call that an assistant made earlier."""

    id: Name
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="Of streamed deltas; changes nothing.")


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
