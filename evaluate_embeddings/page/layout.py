"""The frame of the report: style sheet and the few pieces of HTML that it is put together from."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape, unescape
from string import Template

# One file that asks nothing of the network: no font, no library, no link that leaves it. Light and dark by the
# reader's system; one column on a phone.
STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #ffffff; --text: #1d1f21; --soft: #5d6268; --line: #dcdcd8;
  --accent: #0072b2; --right: #00805c; --wrong: #c04f00; --mild: #8a6d00; }
@media (prefers-color-scheme: dark) { :root { --page: #16181a; --card: #202326; --text: #e9e9e6; --soft: #a2a8ae;
  --line: #383c40; --accent: #56b4e9; --right: #2fc79a; --wrong: #ff9254; --mild: #e6c229; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: .25rem 0 .75rem; max-width: 75ch; }
.soft { color: var(--soft); font-size: .9rem; }
.verdict { font-size: 1.1rem; padding: .9rem 1.1rem; border-left: 5px solid var(--mild); background: var(--card);
  border-radius: 4px; max-width: none; }
.verdict.good { border-color: var(--right); } .verdict.bad { border-color: var(--wrong); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; margin: 0; }
.card.own { border: 2px solid var(--accent); }
.big { font-size: 1.9rem; font-weight: 650; line-height: 1.1; font-variant-numeric: tabular-nums; }
.figures { display: grid; grid-template-columns: repeat(2, 1fr); gap: .75rem; margin-bottom: .75rem; }
.figures.three { grid-template-columns: repeat(3, 1fr); }
.figures:not(.three) > :last-child:nth-child(odd) { grid-column: 1 / -1; justify-self: center; width: 100%;
  max-width: 36.5rem; }
.figures svg { display: block; width: 100%; height: auto; color: var(--text); }
figcaption { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; max-height: 34rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.scroll + .scroll { margin-top: .75rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
tbody tr:last-child td { border-bottom: 0; }
thead th { font-size: .85rem; line-height: 1.25; color: var(--soft); font-weight: 600; white-space: normal; }
td small { display: block; color: var(--soft); font-size: .75rem; }
tr.own td { font-weight: 600; } tr.own td small { font-weight: 400; }
.keys td { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
.keys td:first-child { white-space: nowrap; color: var(--soft); }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
.example { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem;
  margin: .75rem 0; }
.answers { display: grid; grid-template-columns: repeat(7, 1fr); gap: .6rem; margin-top: .6rem; }
.bands .answers { grid-template-columns: repeat(8, 1fr); } h3 .soft { font-weight: 400; }
.answer { margin: 0; min-width: 0; }
.answer img, .nothing { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 4px;
  border: 4px solid var(--accent); }
.answer.right img, .right .nothing { border-color: var(--right); }
.answer.wrong img, .wrong .nothing { border-color: var(--wrong); border-style: dashed; }
.nothing { display: grid; place-items: center; color: var(--soft); font-size: .75rem; text-align: center; }
.answer b { color: var(--accent); } .right b { color: var(--right); } .wrong b { color: var(--wrong); }
.answer figcaption { font-size: .78rem; line-height: 1.35; margin-top: .2rem; overflow-wrap: anywhere; }
.pairs { display: grid; grid-template-columns: repeat(4, 1fr); gap: .75rem; }
.pairs .example { margin: 0; } .pairs .answers { grid-template-columns: 1fr 1fr; }
nav { font-size: .9rem; line-height: 1.9; } nav a { color: var(--accent); margin-right: .9rem; white-space: nowrap; }
.map svg { display: block; width: 100%; height: auto; } .legend { margin: 0 0 .4rem; font-size: .85rem; }
.mark-right { fill: #0072b2; color: #0072b2; fill-opacity: .75; }
.mark-wrong { fill: #d55e00; color: #d55e00; fill-opacity: .85; }
@media (prefers-color-scheme: dark) { .mark-right { fill: #56b4e9; color: #56b4e9; }
  .mark-wrong { fill: #e69f00; color: #e69f00; } }
#map [data-mark]:hover { stroke: var(--text); stroke-width: 3; }
#tip { position: absolute; z-index: 3; width: 150px; padding: .4rem; background: var(--card); color: var(--text);
  border: 1px solid var(--line); border-radius: 6px; box-shadow: 0 2px 10px #0004; font-size: .75rem; line-height: 1.3;
  pointer-events: none; overflow-wrap: anywhere; }
#tip[hidden] { display: none; } #tip img { display: block; width: 100%; border-radius: 4px; margin-bottom: .25rem; }
#filter { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .5rem; align-items: center;
  padding: .5rem 0; background: var(--page); font-size: .9rem; } #filter[hidden] { display: none; }
#filter input, #filter select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: .3rem .5rem; } #filter input { flex: 1 1 9rem; min-width: 0; max-width: 18rem; }
.away { display: none; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .75rem; }
@media (max-width: 700px) {
  main { padding: 1rem .75rem 2rem; } h1 { font-size: 1.35rem; } .verdict { font-size: 1rem; }
  .figures, .figures.three { grid-template-columns: 1fr; } .pairs { grid-template-columns: 1fr; }
  .tiles { gap: .5rem; grid-template-columns: repeat(2, 1fr); }
  .tiles .card { padding: .6rem; } .big { font-size: 1.3rem; }
  .answers, .bands .answers { grid-template-columns: repeat(4, 1fr); gap: .4rem; }
  .answer figcaption { font-size: .7rem; }
  #map .mark-right, #map .mark-wrong { stroke: currentColor; stroke-width: 9; }
  th, td { padding: .4rem .3rem; font-size: .85rem; } thead th { font-size: .75rem; } td small { font-size: .68rem; }
  td:first-child { white-space: normal; min-width: 4.7rem; }
}
"""

_FRAME = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
<div id="tip" role="status" hidden></div>
<script>$script</script>
</body>
</html>
""")


def build_page(title: str, sections: Iterable[str], script: str) -> str:
    """Return the whole page; the sections are HTML already, the title is text, the script belongs to the page."""
    return _FRAME.substitute(title=escape(title), style=STYLE, body="\n".join(sections), script=script)


def build_section(title: str, lead: str, *parts: str) -> str:
    """Return a section with a heading and a leading sentence, both text, and parts that are HTML already."""
    return "\n".join(
        [
            f'<section id="{make_anchor(title)}">',
            f"<h2>{escape(title)}</h2>",
            f'<p class="soft">{escape(lead)}</p>',
            *parts,
            "</section>",
        ]
    )


def make_anchor(title: str) -> str:
    """Return the id of the section of this title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def build_contents(sections: Iterable[str]) -> str:
    """Return links to the sections, by their headings."""
    titles = [title for section in sections for title in re.findall(r"<h2>(.*?)</h2>", section)]
    links = (f'<a href="#{make_anchor(unescape(title))}">{title}</a>' for title in titles)
    return f"<nav>{' '.join(links)}</nav>"


def build_table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Return a table that scrolls by itself; a row is its class and its cells, which are HTML already."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "\n".join(
        f"<tr{f' class={css!r}' if css else ''}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for css, cells in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def build_key_table(values: Mapping[str, object]) -> str:
    """Return a table of names and values, both text."""
    rows = "\n".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(str(value))}</code></td></tr>" for name, value in values.items()
    )
    return f'<div class="scroll"><table class="keys"><tbody>\n{rows}\n</tbody></table></div>'


def build_figure(svg: str, caption: str) -> str:
    """Return a drawing with its caption, which is text."""
    return f'<figure class="card">{svg}<figcaption>{escape(caption)}</figcaption></figure>'
