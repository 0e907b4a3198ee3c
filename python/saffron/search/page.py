"""One search drawn as a page that needs nothing but itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from saffron.errors import ConfigError
from saffron.search.result import SearchResult
from saffron.storage.folders import write_replaceable

PAGE = b'<meta name="generator" content="saffron-kernels">'


def write_page(file: str | Path, traced: SearchResult, undefended: SearchResult | None = None) -> None:
    """Writes `page_of`.

    Raises:
        ConfigError: the result holds no trace; the file cannot be written, or holds something else than such a page.
    """
    write_replaceable(Path(file), page_of(traced, undefended).encode(), PAGE)


def page_of(traced: SearchResult, undefended: SearchResult | None = None) -> str:
    """The search tree of a traced result as HTML.

    Raises:
        ConfigError: the result holds no trace.
    """
    if traced.trace is None:
        raise ConfigError("traced: this search was not traced; ask for it with trace=True")
    environment = Environment(loader=PackageLoader("saffron"), autoescape=select_autoescape())
    # "</" would end the script element the data stands in.
    data = json.dumps(draw(traced)).replace("</", "<\\/")
    return environment.get_template("search.html").render(result=traced, undefended=undefended, data=data)


def draw(traced: SearchResult) -> dict[str, Any]:
    """The tree as the page's script reads it: nodes by step, with their candidates; parents before children."""
    assert traced.trace is not None
    nodes: dict[int, dict[str, Any]] = {0: _node(0, None, 0, "", None, False, False)}
    for record in traced.trace:
        for expanded in record["expanded"]:
            nodes[expanded["node"]]["candidates"] = expanded["candidates"]
        texts = {c["child"]: c for e in record["expanded"] for c in e["candidates"] if c["child"] is not None}
        for member in record["beam"]:
            if member["node"] not in nodes:
                candidate = texts[member["node"]]
                nodes[member["node"]] = _node(
                    member["node"],
                    member["parent"],
                    record["step"] + 1,
                    candidate["text"],
                    member["score"],
                    candidate["unseen"],
                    member["finished"],
                )
    last = {member["node"] for member in traced.trace[-1]["beam"]}
    _mark(nodes, last, "alive")
    _mark(nodes, {_answer(nodes, traced)}, "answer")
    return {"nodes": list(nodes.values()), "steps": len(traced.trace)}


def _node(
    number: int, parent: int | None, step: int, text: str, score: float | None, unseen: bool, finished: bool
) -> dict[str, Any]:
    return {
        "id": number,
        "parent": parent,
        "step": step,
        "text": text,
        "score": score,
        "unseen": unseen,
        "finished": finished,
        "alive": False,
        "answer": False,
        "candidates": [],
    }


def _mark(nodes: dict[int, dict[str, Any]], leaves: set[int], flag: str) -> None:
    """Sets `flag` on the nodes and everything above them."""
    for leaf in leaves:
        number: int | None = leaf
        while number is not None:
            nodes[number][flag] = True
            number = nodes[number]["parent"]


def _answer(nodes: dict[int, dict[str, Any]], traced: SearchResult) -> int:
    """The node of the answer, found by its tokens."""
    at = 0
    for token in traced.token_ids:
        at = next(c["child"] for c in nodes[at]["candidates"] if c["token"] == token)
    return at
