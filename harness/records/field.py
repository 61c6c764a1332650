"""How the fields of a record are written: their types, and marks for the schema, the pandas table and publication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeVar, Union

from msgspec import Meta, Struct, UnsetType


@dataclass(frozen=True)
class Column:
    """The field is a column of the pandas table, under its own name or this one, of its own type or this one."""

    name: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Private:
    """The field is not for publication, though what it stands in is. `harness.records.public` leaves it out."""


@dataclass(frozen=True)
class Old(Private):
    """The field is of schema 1 alone: what is private of `measured` and of stages now stands under `diagnostics`."""


@dataclass(frozen=True)
class Came:
    """The field says what came of a stage, and is absent where it was not begun."""


def says(text: str) -> Meta:
    """What a field means, for the schema."""
    return Meta(description=text)


T = TypeVar("T")
Maybe = Union[T, UnsetType]  # noqa: UP007 (mypy knows this one as an alias)
Id = Annotated[str, Meta(pattern="^[0-9a-f]{12}$")]
Short = Annotated[str, Meta(pattern="^[0-9a-f]{8}$")]
Digest = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Suite = Annotated[str, Meta(pattern="^[a-z0-9]+(-[a-z0-9]+)*$")]
Relation = Literal["add-or-remove", "replace-one", "zero-out"] | None
Count = Annotated[int, Meta(ge=1)]
Tally = Annotated[int, Meta(ge=0)]
Amount = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Probability = Annotated[float, Meta(gt=0, lt=1)]
Bounds = dict[str, Amount | None]
Text = Annotated[str, Meta(min_length=1)]
CATEGORY = "category"


class Closed(Struct, kw_only=True, gc=False):
    """An object with the keys below and, in what is packed, no others."""

    open: ClassVar[bool] = False


class Open(Struct, kw_only=True, gc=False):
    """An object with the keys below, and others."""

    open: ClassVar[bool] = True
