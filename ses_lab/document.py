"""A report as blocks, and what it is written as: Markdown, or one HTML file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple


class Heading(NamedTuple):
    text: str
    level: int = 2


class Paragraph(NamedTuple):
    text: str


class Table(NamedTuple):
    """Cells are text; a row with an empty first cell belongs to the one above it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """A PNG: its bytes for HTML, the name of its file beside the report for Markdown."""

    title: str
    file: str
    png: bytes


Block = Heading | Paragraph | Table | Picture


def markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Paragraph):
        return block.text
    if isinstance(block, Picture):
        return f"![{block.title}]({block.file})"
    rule = "|---" * len(block.head) + "|"
    return "\n".join([_row(block.head), rule, *map(_row, block.rows)])


def _row(cells: Sequence[str]) -> str:
    shown = (cell.replace("|", r"\|") for cell in cells)
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in shown)


def html(title: str, blocks: Sequence[Block]) -> str:
    """A page with its pictures inside; a click on a heading of a table sorts by that column."""
    body = "\n".join(map(_html, blocks))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n<script>{_SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Picture):
        data = base64.b64encode(block.png).decode()
        image = f'<img alt="" src="data:image/png;base64,{data}">'
        return (
            f'<figure class="wide">{image}<figcaption>{escape(block.title)}</figcaption></figure>'
        )
    head = "".join(f"<th>{escape(cell)}</th>" for cell in block.head)
    rows = "\n".join(
        f"<tr>{''.join(f'<td{_LONG * (len(cell) > 40)}>{escape(cell)}</td>' for cell in row)}</tr>"
        for row in block.rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        "</table></div>"
    )


_LONG = ' class="long"'  # is broken into lines; other cells stay in one

# On a narrow screen the wide scroll by themselves, with the first column in sight.
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
p { overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
img { max-width: 100%; height: auto; display: block; }
@media (max-width: 45rem) { img { max-width: none; width: 56rem; } }
figcaption { font-size: 13px; position: sticky; left: 0; width: fit-content; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 0.25rem 0.6rem; text-align: left; border-bottom: 1px solid #ddd; }
th, td { white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { position: sticky; left: 0; background: white; }
td.long { white-space: normal; min-width: 24rem; }
th { cursor: pointer; border-bottom: 2px solid #888; }
th[aria-sort=ascending]::after { content: " \\25B2"; }
th[aria-sort=descending]::after { content: " \\25BC"; }
"""

# A cell is compared by the number that it begins with, and after those by its text; rows with an
# empty first cell move with the row above them.
_SCRIPT = """
document.querySelectorAll("th").forEach(th => th.addEventListener("click", () => {
  const body = th.closest("table").tBodies[0], column = th.cellIndex, groups = [];
  const sign = th.ariaSort === "ascending" ? -1 : 1;
  for (const row of body.rows)
    row.cells[0].textContent || !groups.length ? groups.push([row]) : groups.at(-1).push(row);
  const key = group => {
    const text = group[0].cells[column].textContent, number = parseFloat(text);
    return [isNaN(number) ? Infinity : number, text];
  };
  groups.sort((a, b) => {
    const [x, s] = key(a), [y, t] = key(b);
    return sign * (x === y ? s.localeCompare(t) : x - y);
  });
  th.parentNode.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  th.ariaSort = sign > 0 ? "ascending" : "descending";
  body.append(...groups.flat());
}));
"""
