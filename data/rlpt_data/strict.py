"""Strict configuration: TOML and ``key=value`` overrides in, frozen models out.

Nothing is guessed: an unknown key, a wrong type or an impossible combination is a ``UserError``
that says where, what and the remedy in one line. Every user mistake in the project is one.
"""

import copy
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
from pydantic_core import ErrorDetails, from_json

from rlpt_data.visible import without_passwords

_SECRET = re.compile("token|secret|passw|key", re.IGNORECASE)


class UserError(ValueError):
    """The user's mistake, as one line ``where: what; remedy``. The command line exits 2 on it.

    It quotes what the user gave, but no password of an address.
    """

    def __init__(self, message: str) -> None:
        super().__init__(without_passwords(message))


class Strict(pydantic.BaseModel):
    """Base of every configuration: frozen, no unknown keys, no coercion between types."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",
    )


class Grown(Strict):
    """A configuration with fields that came later: where they are None its JSON is the older one's.

    What was planned or prepared before they came is still the same.
    """

    LATER: ClassVar[tuple[str, ...]] = ()

    @pydantic.model_serializer(mode="wrap")
    def _as_before(self, dumped: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        table = dumped(self)
        return {k: v for k, v in table.items() if v is not None or k not in self.LATER}


def located(place: str | Path) -> str | Path:
    """A URL stays text (a path would lose one of its slashes); the rest is a path."""
    return place if "://" in str(place) else Path(place)


Location = Annotated[str | Path, pydantic.AfterValidator(located)]
"""A folder on this machine, or a URL that fsspec reads."""

M = TypeVar("M", bound=pydantic.BaseModel)


def load(model: type[M], path: Path, overrides: Sequence[str] = ()) -> M:
    """Read TOML at ``path``, apply ``a.b.c=value`` overrides, validate.

    An override's value is TOML; a bare word is a string; a number in the path indexes a list
    (``stage.1.steps=5``). Raises UserError for anything wrong with the file or the values.
    """
    table = _read_toml(path)
    for override in overrides:
        _apply(table, override)
    return _validate(model, table, str(path), overrides)


def parse(model: type[M], table: Any, where: str, overrides: Sequence[str] = ()) -> M:
    """Validate a table that was read from ``where``, with overrides as for `load`. Raises UserError."""
    changed = copy.deepcopy(table) if overrides else table
    for override in overrides:
        _apply(changed, override)
    return _validate(model, changed, where, overrides)


def json_of(data: bytes | str) -> Any:
    """What JSON holds, for files that rlpt wrote itself. Raises ValueError for anything else.

    Unlike `json.loads` it also refuses what would fail further on: more than 200 levels, half a
    character. NaN and the infinities are numbers.
    """
    return from_json(data)


def nearest(name: str, valid: Iterable[str]) -> str:
    """The remedy for a mistyped name: the nearest valid one, or all of them."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names) or 'none'}"


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        siblings = [p.name for p in sorted(path.parent.glob("*.toml"))]
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(f"{path}: {what}; {nearest(path.name, siblings)}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    # ValueError: no UTF-8, no TOML, or a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}; correct the file") from error


def _apply(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {override}: not of the form key.key=value; e.g. seed=1")
    here: Any = table
    for part in parts[:-1]:
        here = _descend(here, part, override)
    last = parts[-1]
    if isinstance(here, list):
        here[_index(here, last, override)] = _value(text.strip(), override)
    elif isinstance(here, dict):
        here[last] = _value(text.strip(), override)
    else:
        raise UserError(f"--set {override}: {parts[-2]!r} is a value, not a table; shorten the key")


def _descend(here: Any, part: str, override: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, part, override)]
    if isinstance(here, dict):
        return here.setdefault(part, {})
    raise UserError(f"--set {override}: {part!r} lies below a value; shorten the key")


def _index(items: list[Any], part: str, override: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(items):
        valid = f"0..{len(items) - 1}"
        raise UserError(f"--set {override}: {part!r} is not an index; use one of {valid}")
    return int(part)


def _value(text: str, override: str) -> Any:
    """A TOML value, or the text itself when it is a bare word such as a path."""
    try:
        parsed = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError) as error:
        if not text or text[0] in "\"'[{" or "\n" in text:
            raise UserError(f"--set {override}: not a TOML value: {error}; quote it") from error
        return text
    if set(parsed) != {"v"}:
        raise UserError(f"--set {override}: more than one value; use one --set for each")
    return parsed["v"]


def _validate(model: type[M], table: Any, where: str, overrides: Sequence[str]) -> M:
    """JSON mode: a list is a tuple and a string a path, yet "5" is never a number."""
    try:
        text = json.dumps(table, default=str)
    except RecursionError as error:
        raise UserError(f"{where}: tables within tables without end; flatten them") from error
    try:
        return model.model_validate_json(text)
    except pydantic.ValidationError as error:
        # A mistyped key is also a missing one: the typo is the line that helps.
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        more = f" ({len(details) - 1} more like it)" if len(details) > 1 else ""
        raise UserError(_line(model, details[0], where, overrides) + more) from error


def _line(
    model: type[pydantic.BaseModel], detail: ErrorDetails, where: str, overrides: Sequence[str]
) -> str:
    """One line for one failure: where, [table], key and value, remedy."""
    kind, loc = detail["type"], detail["loc"]
    owner, path = _owner(model, loc[:-1] if kind in ("extra_forbidden", "missing") else loc)
    if kind in ("extra_forbidden", "missing"):
        path = [*path, str(loc[-1])]
    place = _place(path if not kind.startswith("union_tag") else [*path, ""], where, overrides)
    key = path[-1] if path else ""
    if kind == "extra_forbidden":
        remedy = nearest(key, owner.model_fields)
        # A key that rlpt does not have may be somebody's idea of where a secret goes.
        place = _without_value(place) if _SECRET.search(key) else place
        return f"{place}: unknown key {key!r} for {owner.__name__}; {remedy}"
    if kind == "missing":
        return f"{place}: key {key!r} of {owner.__name__} is missing; add it{_about(owner, key)}"
    context = detail.get("ctx", {})
    if kind == "union_tag_invalid":
        valid = [name.strip("' ") for name in str(context["expected_tags"]).split(",")]
        name, tag = str(context["discriminator"]).strip("'"), str(context["tag"])
        return f"{place}: {name} = {tag!r} is unknown; {nearest(tag, valid)}"
    if kind == "union_tag_not_found":
        name = str(context["discriminator"]).strip("'")
        return f"{place}: key {name!r} is missing; {nearest('', _tags(owner, path, name))}"
    if kind in ("value_error", "assertion_error"):
        return f"{place}: {context['error']}"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{place}: {key} = {_show(detail['input'])}: {message}; correct it{_about(owner, key)}"


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _about(owner: type[pydantic.BaseModel], key: str) -> str:
    field = owner.model_fields.get(key)
    text = " ".join((field.description or "").split()) if field else ""
    return f" ({text})" if text else ""


def _place(path: list[str], where: str, overrides: Sequence[str]) -> str:
    """The override that brought the value, else the file and its [table]."""
    dotted = ".".join(path).rstrip(".")
    for override in reversed(overrides):
        key = override.partition("=")[0].strip()
        if dotted and f"{dotted}.".startswith(f"{key}."):
            return f"{where}, --set {override}"
    return f"{where}, [{'.'.join(path[:-1])}]" if len(path) > 1 else where


def _without_value(place: str) -> str:
    """The same place, and of an override its key alone."""
    before, flag, override = place.rpartition("--set ")
    return f"{before}{flag}{override.partition('=')[0]}" if flag else place


def _owner(
    model: type[pydantic.BaseModel], loc: Sequence[int | str]
) -> tuple[type[pydantic.BaseModel], list[str]]:
    """The innermost model along ``loc`` and the path as the user wrote it (without union tags)."""
    owner, here, path = model, [model], []
    for part in loc:
        models = [m for m in here if isinstance(m, type) and issubclass(m, pydantic.BaseModel)]
        tagged = [m for m in models if _has_tag(m, part)]
        if tagged and not any(part in m.model_fields for m in models):
            owner, here = tagged[0], tagged
            continue
        path.append(str(part))
        holder = next((m for m in models if part in m.model_fields), None)
        if holder is not None:
            owner = holder
            here = _members(holder.model_fields[str(part)].annotation)
    inner = [m for m in here if isinstance(m, type) and issubclass(m, pydantic.BaseModel)]
    return (inner[0] if len(inner) == 1 else owner), path


def _tags(owner: type[pydantic.BaseModel], path: list[str], discriminator: str) -> list[str]:
    """What the discriminator of the union at the end of ``path`` may say."""
    field = owner.model_fields[next(part for part in reversed(path) if not part.isdecimal())]
    models = (m for m in _members(field.annotation) if issubclass(m, pydantic.BaseModel))
    fields = (model.model_fields[discriminator] for model in models)
    return [tag for tagged in fields for tag in typing.get_args(tagged.annotation)]


def _has_tag(model: type[pydantic.BaseModel], part: int | str) -> bool:
    tags = (typing.get_args(field.annotation) for field in model.model_fields.values())
    return model.__name__ == part or any(part in tag for tag in tags)


def _members(annotation: Any) -> list[Any]:
    """Every class inside an annotation: through unions, Annotated, lists, tuples and dicts."""
    origin = typing.get_origin(annotation)
    if origin is None:
        return [annotation] if isinstance(annotation, type) else []
    if origin is typing.Literal:
        return []
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        return _members(arguments[0])
    if origin in (typing.Union, types.UnionType, list, tuple, dict):
        return [member for argument in arguments for member in _members(argument)]
    return []
