"""The catalogue of papers: `papers.toml` says what they are, the code says which of them are implemented.

A paper is implemented when the file named by its slug, in the folder of its stretch, names the object that implements
it, in one of two ways::

    class FasterVLM(TokenReducer):               # a class says which paper it is
        paper: ClassVar[str] = "fastervlm"

    PAPER = "recurrent_review"                   # a module says it for a function, or to choose one of several classes
    OBJECT = "recurrent_mixer"

The files are parsed and not imported, so that listing the papers costs milliseconds and needs neither torch nor an
optional dependency.
"""

from __future__ import annotations

import ast
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal

from sightline.errors import InputError, unknown

STRETCHES = (
    "encoders",
    "connectors",
    "reduction",
    "grounding",
    "objectives",
    "reasoning",
    "benchmarks",
    "probes",
    "models",
)
"""The stretches of the road that papers belong to, in the order of the road; each is a folder of the package."""

_TYPES = {"title": str, "stretch": str, "year": int, "arxiv": str, "idea": str, "peer": bool}
_WANTED = {str: "a text that is not empty", int: "a whole number above 0", bool: "true, or left out"}
_OPTIONAL = {"arxiv", "peer"}
_DERIVED = {"status", "object"}
_IDEA_LIMIT = 100


@dataclass(frozen=True)
class Paper:
    """One paper of the catalogue.

    Attributes:
        slug: short name; also the name of the paper's file and of its test.
        title: title as published.
        stretch: folder under `sightline` that holds the paper's file, one of `STRETCHES`.
        year: year of the venue, or of the first preprint where no venue is known.
        arxiv: arXiv identifier such as "2412.01818", or None.
        idea: one line of at most 100 characters that says what the paper does.
        object: dotted name of what implements it, such as "sightline.reduction.fastervlm.FasterVLM", or None.
        peer: whether it is not one of the 94 but a well-known method beside them, there as a yardstick.
    """

    slug: str
    title: str
    stretch: str
    year: int
    arxiv: str | None
    idea: str
    object: str | None
    peer: bool = False

    @property
    def status(self) -> Literal["implemented", "planned"]:
        """Whether an object of the package implements the paper."""
        return "planned" if self.object is None else "implemented"


def papers(stretch: str | None = None) -> tuple[Paper, ...]:
    """All papers in the order of the catalogue, or those of one stretch; an unknown stretch is an `InputError`. Peers
    are left out: see `peers`."""
    if stretch is not None and stretch not in STRETCHES:
        raise unknown("stretch", stretch, STRETCHES)
    return tuple(entry for entry in _installed() if not entry.peer and stretch in (None, entry.stretch))


def peers() -> tuple[Paper, ...]:
    """The yardsticks beside the 94 papers."""
    return tuple(entry for entry in _installed() if entry.peer)


def paper(slug: str) -> Paper:
    """The paper or peer with this slug; an unknown one is an `InputError` that suggests the nearest."""
    by_slug = {entry.slug: entry for entry in _installed()}
    if slug not in by_slug:
        raise unknown("paper", slug, by_slug)
    return by_slug[slug]


def as_dict(entry: Paper) -> dict[str, str | None]:
    """What `sightline papers --json` prints of a paper."""
    return {
        "slug": entry.slug,
        "title": entry.title,
        "stretch": entry.stretch,
        "status": entry.status,
        "object": entry.object,
    }


def read_catalogue(package: Traversable, name: str = "sightline") -> tuple[Paper, ...]:
    """Read `papers.toml` of a package folder, and from its code which papers are implemented.

    Args:
        package: folder that holds `papers.toml` and the folders of the stretches.
        name: import name of that folder, the first part of each paper's `object`.

    Raises:
        InputError: the catalogue is damaged (not TOML, a slug twice, a field unknown, missing or of the wrong kind, an
            unknown stretch), or a paper's file contradicts it.
    """
    try:
        tables = tomllib.loads(package.joinpath("papers.toml").read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"papers.toml cannot be read: {error}") from error
    return tuple(_entry(package, name, slug, table) for slug, table in tables.items())


@cache
def _installed() -> tuple[Paper, ...]:
    return read_catalogue(files("sightline"))


def _entry(package: Traversable, name: str, slug: str, table: object) -> Paper:
    checked = _checked(slug, table)
    module = package.joinpath(checked["stretch"], f"{slug}.py")
    implementer = _implementer(module.read_text(encoding="utf-8"), slug) if module.is_file() else None
    dotted = None if implementer is None else f"{name}.{checked['stretch']}.{slug}.{implementer}"
    return Paper(slug=slug, object=dotted, **checked)


def _checked(slug: str, table: object) -> dict[str, Any]:
    where = f"papers.toml, [{slug}]"
    if not slug.isidentifier() or not isinstance(table, dict):
        raise InputError(f"{where}: a paper is a table whose name can name a Python file")
    for key in sorted(table):
        if key in _DERIVED:
            raise InputError(f"{where}: {key!r} is read from the code and not written here")
        if key not in _TYPES:
            raise unknown(f"field of {where}", key, _TYPES)
    for key, kind in _TYPES.items():
        if key not in table and key not in _OPTIONAL:
            raise InputError(f"{where}: the field {key!r} is missing")
        if key in table and (type(table[key]) is not kind or not table[key]):
            raise InputError(f"{where}: {key!r} must be {_WANTED[kind]}, not {table[key]!r}")
    if table["stretch"] not in STRETCHES:
        raise unknown(f"stretch of {where}", table["stretch"], STRETCHES)
    if len(table["idea"]) > _IDEA_LIMIT:
        raise InputError(f"{where}: the idea has {len(table['idea'])} characters, at most {_IDEA_LIMIT} are allowed")
    return {"arxiv": None, "peer": False, **table}


def _implementer(source: str, slug: str) -> str | None:
    """The name of the object in a paper's file that says that it implements the paper, None if nothing does."""
    body = ast.parse(source, filename=f"{slug}.py").body
    claims = {node.name: _assigned(node.body).get("paper") for node in body if isinstance(node, ast.ClassDef)}
    claims = {name: claim for name, claim in claims.items() if claim}
    strays = [f"{name} (of {claim!r})" for name, claim in claims.items() if claim != slug]
    if strays:
        raise InputError(f"{slug}.py: holds another paper's {', '.join(strays)}")
    constants = _assigned(body)
    if "PAPER" in constants or "OBJECT" in constants:
        defined = constants.keys() | {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        claim, chosen = constants.get("PAPER"), constants.get("OBJECT")
        if claim != slug or chosen not in defined:
            raise InputError(
                f"{slug}.py: PAPER must be {slug!r} and OBJECT the name of something that the file defines, "
                f"not {claim!r} and {chosen!r}"
            )
        return chosen
    if len(claims) > 1:
        raise InputError(f"{slug}.py: {', '.join(claims)} all claim the paper; choose one with PAPER and OBJECT")
    return next(iter(claims), None)


def _assigned(body: list[ast.stmt]) -> dict[str, str | None]:
    """The names that the statements assign at their own level: the string each is given, None if it is no string.

    A bare annotation such as `paper: ClassVar[str]` assigns nothing.
    """
    found: dict[str, str | None] = {}
    for node in body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        text = node.value.value if isinstance(node.value, ast.Constant) else None
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                found[target.id] = text if isinstance(text, str) else None
    return found
