"""Which JSON types a schema lets a value have, as far as is needed to read arguments that are written without quotes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Types = frozenset[str] | None  # None: any


def type_of(value: Any) -> str:
    """The JSON type of a value; a number without a fraction is an integer."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "number"
    if isinstance(value, str):
        return "string"
    return "null" if value is None else "array" if isinstance(value, list) else "object"


def argument_types(parameters: Mapping[str, Any], name: str) -> Types:
    """The types that an argument may have by the schema of all arguments, None where it does not say."""
    return _Reading(parameters).of_member(parameters, name)


class _Reading:
    """Looks each reference up once, however often and in what circles schemas refer to each other."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._known: dict[str, Types] = {}
        self._known_of_member: dict[str, Types] = {}

    def of_member(self, schema: Any, name: str) -> Types:
        """Of what an object of a schema has under a name."""
        return _all_of(self._stated_of_member(schema, name)) if isinstance(schema, Mapping) else None

    def _stated_of_member(self, schema: Mapping[str, Any], name: str) -> Iterator[Types]:
        listed = schema.get("properties")
        if isinstance(listed, Mapping) and name in listed:
            yield self.types(listed[name])
        else:
            yield self.types(schema.get("additionalProperties"))
        for word in ("anyOf", "oneOf"):  # a way that does not speak of the name says nothing against the others
            ways = [self.of_member(way, name) for way in _listed(schema.get(word))]
            known = [way for way in ways if way is not None]
            yield frozenset().union(*known) if known else None
        for part in _listed(schema.get("allOf")):
            yield self.of_member(part, name)
        if isinstance(reference := schema.get("$ref"), str):
            if reference not in self._known_of_member:
                self._known_of_member[reference] = None  # as long as it is being looked up
                self._known_of_member[reference] = self.of_member(_referred(reference, self._root), name)
            yield self._known_of_member[reference]

    def types(self, schema: Any) -> Types:
        return _all_of(self._stated(schema)) if isinstance(schema, Mapping) else None

    def _stated(self, schema: Mapping[str, Any]) -> Iterator[Types]:
        """What each part of a schema says of the types; all of them hold."""
        named = schema.get("type")
        names = {name for name in ([named] if isinstance(named, str) else _listed(named)) if isinstance(name, str)}
        if names:
            yield frozenset(names | ({"integer"} if "number" in names else set()))
        if isinstance(schema.get("enum"), list):
            yield frozenset(map(type_of, schema["enum"]))
        if "const" in schema:
            yield frozenset((type_of(schema["const"]),))
        for name in ("anyOf", "oneOf"):
            ways = [self.types(way) for way in _listed(schema.get(name))]
            known = [way for way in ways if way is not None]
            if ways and len(known) == len(ways):
                yield frozenset().union(*known)
        for part in _listed(schema.get("allOf")):
            yield self.types(part)
        if isinstance(reference := schema.get("$ref"), str):
            if reference not in self._known:
                self._known[reference] = None  # as long as it is being looked up
                self._known[reference] = self.types(_referred(reference, self._root))
            yield self._known[reference]


def _all_of(stated: Iterator[Types]) -> Types:
    found: Types = None
    for types in stated:
        if types is not None:
            found = types if found is None else found & types
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference such as #/$defs/Name names, None where that is not in the schema."""
    begin, *steps = reference.split("/")
    found: Any = root if begin == "#" else None
    for step in steps:
        found = found.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found
