"""The few pieces of HTML that a report is made of. All text is escaped here, and the page loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --faint: #626a73; --line: #d8dde3; --card: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e3e6ea; --faint: #98a1ab; --line: #333a41; --card: #1b1f24 }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; overflow-wrap: anywhere } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem }
h3 { font-size: 1rem; margin: 0 } p { margin: .2rem 0 } .note, footer { color: var(--faint); font-size: .87rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem;
  grid-auto-flow: dense }
figure { margin: 0; padding: .7rem; border: 1px solid var(--line); border-radius: 8px; background: var(--card);
  min-width: 0 }
figure.wide { grid-column: 1 / -1 }
figure svg { display: block; width: 100%; height: auto; max-width: 40rem; margin: 0 auto; color: var(--ink) }
figure svg text { font-family: inherit !important }
.scroll { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--faint); font-weight: 600 } td.number { text-align: right }
code, pre { font: .85rem ui-monospace, Menlo, Consolas, monospace; overflow-wrap: anywhere; white-space: pre-wrap }
summary { cursor: pointer; font-weight: 600; padding: .5rem 0 }
.state { display: inline-block; padding: 0 .6rem; border-radius: 1rem; border: 1px solid currentColor;
  font-size: .87rem }
.finished { color: #10a37f } .running { color: #3b82f6 } .failed, .stale { color: #ef4444 } .stopped { color: #d97706 }
.problem { color: #ef4444 }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, body: Iterable[str], footer: str) -> str:
    """Write a whole page; ``body`` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<footer><p>{escape(footer)}</p></footer>\n</body>\n</html>\n"
    )


def tag(name: str, text: str, style: str = "") -> str:
    """Write an element around plain text."""
    attribute = f' class="{escape(style)}"' if style else ""
    return f"<{name}{attribute}>{escape(text)}</{name}>"


def table(headings: Sequence[str], rows: Iterable[Sequence[str | float | int | None]]) -> str:
    """Write a table of plain values, which scrolls by itself where it is wider than the page."""
    head = "".join(tag("th", heading) for heading in headings)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>'


def _cell(value: str | float | int | None) -> str:
    if isinstance(value, (int, float)):
        return tag("td", f"{value:,}" if isinstance(value, int) else f"{value:.6g}", "number")
    return tag("td", value or "")


def figure(title: str, note: str, svg: str, wide: bool) -> str:
    """Put a plot into a box with its title."""
    caption = tag("h3", title) + (tag("p", note, "note") if note else "")
    labelled = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f"<figure{' class=wide' if wide else ''}><figcaption>{caption}</figcaption>{labelled}</figure>"


def folded(title: str, content: str, is_open: bool = False) -> str:
    """Put HTML behind a title that unfolds it."""
    return f"<details{' open' if is_open else ''}>{tag('summary', title)}{content}</details>"
