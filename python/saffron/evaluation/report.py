"""A report on results: Markdown, figures, and one page that holds them all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote
from zlib import crc32

from saffron.errors import ConfigError, outside
from saffron.evaluation import plots
from saffron.evaluation.metrics import Curve, Group, curves, group
from saffron.evaluation.store import Record
from saffron.evaluation.tables import Table, by_width, efficiency, matched, overview, utility
from saffron.storage.folders import PICTURE, check_replaceable, write_replaceable
from saffron.storage.text import read_bytes

UNDEFENDED = ("greedy", "sample")
FORMATS = ("svg", "png", "pdf")
STEMS = ("dilemma", "scaling")  # how the names of figures end
# By which files of earlier reports are known.
MARKS = {"report.md": b"<!-- by saffron report -->", "report.html": b"<title>Attack success under search</title>"}


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What a report is of.

    Attributes:
        judge: whose verdicts count.
        reference: the method whose compute the others are compared at; None: Best-of-32, or else the most expensive
            Best-of-N, or else the most expensive of all.
        limit: FLOPs, for the scaling efficiency; None: 1.5 times the most expensive run of each comparison.
        formats: of the figures.
        scatter: predicted against true rewards as a picture (SAFFRON-1, figure 4b), as `saffron eval-mrm` draws it.
    """

    judge: str = "oracle"
    reference: str | None = None
    limit: float | None = None
    formats: tuple[str, ...] = ("svg",)
    scatter: Path | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """Tables and figures of one data set under one attack."""

    title: str
    tables: list[Table]
    figures: list[tuple[str, Path]]


def write_report(records: Sequence[Record], out: Path, options: ReportOptions) -> list[Path]:
    """Writes report.md, report.html and figures/ into a folder; returns the files.

    Raises:
        ConfigError: nothing to report, or an unknown judge, reference or format.
        MissingDependencyError: figures need Matplotlib.
    """
    for name in options.formats:
        if name not in FORMATS:
            raise ConfigError(f"format: got {name!r}, expected one of {', '.join(FORMATS)}")
    if options.scatter is not None:
        read_bytes(options.scatter)  # whatever is wrong with it is said now
    groups = group(records)
    if not groups:
        raise ConfigError("results: there are none")
    plots.pyplot()
    if options.limit is not None and not 0 < options.limit < float("inf"):
        raise ConfigError(f"limit: got {options.limit}, expected a number above 0")
    places = list(dict.fromkeys((g.data, g.attack, g.variant) for g in groups))
    names = _file_names([_title(place) for place in places])
    for name, mark in MARKS.items():
        if (out / name).exists():
            check_replaceable("output", out / name, mark)
    if not (out / "report.md").exists():  # next to a report of ours, the figures are ours too
        for file in (file for name in names for stem in STEMS for file in _pictures(name, stem, out, options)):
            if file.exists():
                check_replaceable("output", file, PICTURE)
    with outside(f"{out}: cannot be made"):
        (out / "figures").mkdir(parents=True, exist_ok=True)
    sections = [
        _section(place, name, [g for g in groups if (g.data, g.attack, g.variant) == place], out, options)
        for place, name in zip(places, names, strict=True)
    ]
    sections.append(Section("What the answers are like", [utility(groups)], []))
    if options.scatter is not None:
        sections.append(Section("Figure 4b. Rewards, predicted and true", [], [("Figure 4b", options.scatter)]))
    text = f"# Results\n\n{MARKS['report.md'].decode()}\n\n" + "\n".join(_markdown(part, out) for part in sections)
    for name, content in (("report.md", text), ("report.html", _page(sections))):
        write_replaceable(out / name, content.encode(), MARKS[name])
    drawn = [file for section in sections for _, file in section.figures]
    return [out / "report.md", out / "report.html", *drawn]


def reference_group(groups: Iterable[Group], wanted: str | None = None) -> Group:
    """The group whose compute is that of the comparison."""
    groups = list(groups)
    if wanted is not None:
        found = [g for g in groups if g.method == wanted]
        if not found:
            raise ConfigError(f"reference: got {wanted!r}, the results hold {', '.join(g.method for g in groups)}")
        return found[0]
    samples = [g for g in groups if g.method.partition(":")[0] == "best-of-n"]
    return next((g for g in samples if g.budget == 32), None) or max(samples or groups, key=lambda g: g.flops)


def _title(place: tuple[str, str, str]) -> str:
    data, attack, variant = place
    return f"{data}, attack {attack}" + (f", {variant}" if variant else "")


def _section(place: tuple[str, str, str], name: str, groups: list[Group], out: Path, options: ReportOptions) -> Section:
    """name: how the names of its figures begin."""
    tables = [overview(groups, options.judge)]
    drawn: list[tuple[str, Path]] = []
    defended = curves(g for g in groups if g.method.partition(":")[0] not in UNDEFENDED)
    if defended:
        reference = reference_group([g for c in defended for g in c.groups], options.reference)
        tables.append(matched(defended, reference, options.judge))
        drawn = _figures(name, defended, groups, out, options)
    tables += [t for t in (efficiency(groups, options.judge, options.limit), by_width(groups, options.judge)) if t]
    return Section(_title(place), tables, drawn)


def _figures(
    name: str, defended: list[Curve], groups: list[Group], out: Path, options: ReportOptions
) -> list[tuple[str, Path]]:
    """Figure 2 without Saffron, figure 4a with all; one of them where they are the same."""
    undefended = next((g for g in groups if g.method.partition(":")[0] == "greedy"), None)
    # One budget is no curve; where there is nothing else, points have to do.
    defended = [c for c in defended if len(c.groups) > 1] or defended
    conventional = [c for c in defended if not c.name.startswith("saffron") and "-mrm" not in c.name]
    wanted = [("Figure 4a. Attack success over compute", "scaling", defended)]
    if conventional and len(conventional) < len(defended):
        wanted.insert(0, ("Figure 2. Search with a PRM, one call per candidate", "dilemma", conventional))
    drawn = []
    for title, stem, shown in wanted:
        files = _pictures(name, stem, out, options)
        plots.scaling(shown, options.judge, files, title.partition(". ")[2], undefended)
        drawn.append((title, files[0]))
    return drawn


def _pictures(name: str, stem: str, out: Path, options: ReportOptions) -> list[Path]:
    return [out / "figures" / f"{name}-{stem}.{suffix}" for suffix in options.formats]


def _file_names(titles: list[str]) -> list[str]:
    """One for each title, short enough for a file system (4 bytes a character), and none twice."""
    names = ["".join(c if c.isalnum() else "-" for c in title.lower())[:50].strip("-") for title in titles]
    return [
        name if names.count(name) == 1 else f"{name}-{crc32(title.encode()):08x}"
        for name, title in zip(names, titles, strict=True)
    ]


def _markdown(section: Section, out: Path) -> str:
    parts = [f"## {section.title}", *(table.markdown() for table in section.tables)]
    parts += [f"![{title}]({_relative(file, out)})\n" for title, file in section.figures]
    return "\n\n".join(parts)


def _relative(file: Path, out: Path) -> str:
    return quote(os.fsencode(file.relative_to(out) if file.is_relative_to(out) else file))


def _page(sections: list[Section]) -> str:
    """One page that needs nothing but itself: the figures stand in it."""
    import base64

    from jinja2 import Environment, PackageLoader, select_autoescape

    def source(file: Path) -> str:
        kind = "svg+xml" if file.suffix == ".svg" else file.suffix[1:]
        return f"data:image/{kind};base64," + base64.b64encode(read_bytes(file)).decode()

    environment = Environment(loader=PackageLoader("saffron"), autoescape=select_autoescape())
    return environment.get_template("report.html").render(sections=sections, source=source)
