"""The report as a page: `results/report.html`, which opens from disk, on a phone too, without a network.

It says what `results/README.md` says, from the same saved data and in the same words, shows the figures that lie
beside it, and has one thing more: an explorer, where a person picks step size, batch size and sampling on real data.
The same results give the same bytes. The page's text is `page.html`, its looks `page.css`; `explorer.js` computes what
the library computes (`tests/experiments/test_explorer.py`), and `page.js` draws it.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from markdown_it import MarkdownIt

from experiments.engine import report, results
from experiments.engine.lecture_rows import ROWS, Row, evidence, settled
from experiments.engine.report import Chapter
from experiments.engine.results import Claim, Result
from jaxgrad import atomic, data

HERE = Path(__file__).parent
FEATURES = {"s1": "total cholesterol", "s2": "LDL cholesterol"}
"""The two columns of diabetes that the explorer's bowl is over, and what they are."""
START = (-2.0, 0.8)
"""Where its paths begin: far along the valley, and on its steep side."""


def write(folder: str | Path, chapters: Sequence[Chapter]) -> Path:
    """Write `folder/report.html` from the chapters and the figures that are drawn in `folder`.

    Links lead to the files of `folder` and, where `folder` stands beside them, to `tests/` and `experiments/`.
    """
    path = Path(folder) / "report.html"
    atomic.write(path, document(Path(folder), chapters).encode())
    return path


def document(folder: Path, chapters: Sequence[Chapter]) -> str:
    """The page."""
    claims = report.claims_of(chapters)
    rows = [row for row in ROWS if settled(row, claims)[2]]
    shown = explorer_data()
    parts = {
        "css": _own("page.css"),
        "rows": str(len(rows)),
        "held": str(sum(claim.holds for _, _, claim in claims)),
        "checks": str(len(claims)),
        "experiments": str(len(chapters)),
        "n": str(len(shown["y"])),
        "first": escape(shown["names"][0]),
        "second": escape(shown["names"][1]),
        "correlation": f"{np.corrcoef(np.reshape(shown['x'], (-1, 2)).T)[0, 1]:.2f}",
        "explorer_code": _code(folder, "experiments/engine/page/explorer.js"),
        "rows_table": _rows_table(folder, rows, claims, chapters),
        "contents": "".join(f"<li>{_link(f'#{c.name}', c.name)}: {inline_markdown(c.headline)}</li>" for c in chapters),
        "sections": "\n".join(_section(folder, chapter) for chapter in chapters),
        "origin": _origin(folder, chapters),
        "explorer_data": _json(shown),
        "explorer_js": _own("explorer.js"),
        "page_js": _own("page.js"),
    }
    return Template(_own("page.html")).substitute(parts)


@cache
def explorer_data() -> dict[str, Any]:
    """The explorer's regression: `x` (n rows of two, in one list), `y`, what the two are, and where paths start."""
    diabetes = data.load("diabetes")
    columns = [diabetes.names.index(name) for name in FEATURES]
    return {
        "x": [float(value) for value in diabetes.batch.x[:, columns].ravel()],
        "y": [float(value) for value in diabetes.batch.y],
        "names": list(FEATURES.values()),
        "start": list(START),
    }


def markdown(text: str) -> str:
    """Markdown with tables as HTML; HTML in it is text. Wide tables scroll in a frame of their own."""
    return _parser().render(text)


def inline_markdown(text: str) -> str:
    """One line of Markdown, without a paragraph around it."""
    return _parser().renderInline(" ".join(text.split()))


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.add_render_rule("table_open", lambda *_: f"{_frame('Table')}<table>\n")
    parser.add_render_rule("table_close", lambda *_: "</table>\n</div>\n")
    return parser


def _frame(label: str, kind: str = "scroll") -> str:
    """The start of a frame that scrolls sideways, by keys too."""
    return f'<div class="{kind}" role="region" aria-label="{escape(label)}" tabindex="0">'


def _rows_table(
    folder: Path, rows: Iterable[Row], claims: Sequence[tuple[str, str, Claim]], chapters: Sequence[Chapter]
) -> str:
    devices = {chapter.name: chapter.results[0].device for chapter in chapters}
    head = "".join(f'<th scope="col">{name}</th>' for name in ("id", "the lecture", "verdict", "measured", "evidence"))
    out = [f'<table class="rows"><thead><tr>{head}</tr></thead>']
    for row in rows:
        words, held, of = settled(row, claims)
        links = [_code(folder, row.test, "test"), _code(folder, f"experiments/{row.experiment}.py", "code")]
        if row.experiment in devices:
            file = f"{row.experiment}/{devices[row.experiment]}.json"
            links = [_link(f"#{row.experiment}", "figure"), _link(file, "data"), *links]
        tone = "holds" if held == of and "not settled" not in words else "fails"
        checks = [(name, device, claim) for name, device, claim in claims if claim.id == row.id]
        out.append(
            f'<tbody id="{row.id}"><tr><th scope="row">{row.id}</th>'
            f'<td data-label="The lecture">{inline_markdown(row.says)}</td>'
            f'<td data-label="Verdict" class="{tone}">{inline_markdown(words)}</td>'
            f'<td data-label="Measured">{inline_markdown(evidence(row, claims))}</td>'
            f'<td><span class="evidence">{" ".join(links)}</span></td></tr>'
            f'<tr class="more"><td colspan="5">{_checks(checks, f"{held} of {of} checks of {row.id} hold", True)}'
            "</td></tr></tbody>"
        )
    return "\n".join([*out, "</table>"])


def _checks(claims: Iterable[tuple[str, str, Claim]], summary: str, named: bool) -> str:
    """Checks behind a line that opens them; `named` says of which experiment each is."""
    out = []
    for name, device, claim in claims:
        tone, word = ("holds", "holds") if claim.holds else ("fails", "does not hold")
        place = f" {_link(f'#{name}', name)}" if named else f" ({escape(claim.id)})"
        on = "" if device == "cpu" else f" ({escape(device)})"
        out.append(
            f'<li><span class="{tone}">{word}</span>: {inline_markdown(claim.text)}{on}. '
            f"Measured: <b>{inline_markdown(claim.measured)}</b>. "
            f"Expected: {inline_markdown(claim.expected)}.{place}</li>"
        )
    return f'<details><summary>{escape(summary)}</summary><ul class="checks">{"".join(out)}</ul></details>'


def _section(folder: Path, chapter: Chapter) -> str:
    first = chapter.results[0]
    name, figure = escape(chapter.name), f"{chapter.name}/{report.figure_stem(first.device)}.svg"
    drawn = (folder / figure).is_file()
    parts = [f'<article id="{name}"><h3>{inline_markdown(chapter.headline)}</h3>']
    if bullet := report.headline(chapter):
        parts.append(markdown(bullet.strip().removeprefix("- ")))
    if not drawn:
        parts.append("<p>Its figure is not drawn: <code>python -m experiments report</code> draws it.</p>")
    else:
        swipe = '<p class="small swipe">The figure is wider than this screen: swipe it sideways.</p>'
        shown = f'<img src="{escape(figure)}" alt="{escape(f"Figure: {chapter.headline}")}" loading="lazy">'
        parts.append(f"{_frame(f'Figure of {chapter.name}', 'drawing')}{shown}</div>{swipe}")
    for result in chapter.results:
        if result.device != first.device:
            file = f"{chapter.name}/{report.figure_stem(result.device)}.svg"
            parts.append(f"<p>On {escape(result.device)}: {_link(file, 'figure')}.</p>")
        if hasattr(chapter.module, "report"):
            parts.append(markdown(chapter.module.report(result.numbers)))
        held = sum(claim.holds for claim in result.claims)
        if result.claims:
            checks = [(chapter.name, result.device, claim) for claim in result.claims]
            parts.append(_checks(checks, f"{held} of {len(checks)} checks of this experiment hold", False))
        parts.append(_files(folder, chapter, result))
    if drawn:
        parts.append(f'<p class="small">The figure alone: {_link(figure, "SVG")}.</p>')
    return "\n".join([*parts, "</article>"])


def _files(folder: Path, chapter: Chapter, result: Result) -> str:
    links = [
        _link(f"{chapter.name}/{result.device}.json", "settings, claims and versions"),
        _link(f"{chapter.name}/{result.device}.npz", "arrays"),
        _code(folder, f"experiments/{chapter.name}.py", "code"),
    ]
    made = escape(report.circumstances(chapter, result).replace("`", ""))
    return f'<p class="small">{made}. <span class="evidence">{" ".join(links)}</span></p>'


def _origin(folder: Path, chapters: Sequence[Chapter]) -> str:
    """Machines and versions, each with the experiments that ran on it; digests of arrays and code; what verify says."""
    from experiments.engine import proof, verified  # they load SciPy's distributions, which nothing else here needs

    groups: dict[str, list[str]] = {}
    for chapter in chapters:
        for result in chapter.results:
            made = {key: result.provenance[key] for key in ("machine", "versions", "precision")}
            groups.setdefault(json.dumps(made, sort_keys=True), []).append(f"{chapter.name} ({result.device})")
    out = []
    for made, names in groups.items():
        terms = [
            f"<dt>{escape(f'{group}, {key}'.replace('_', ' '))}</dt><dd>{escape(_said(value))}</dd>"
            for group, values in json.loads(made).items()
            for key, value in values.items()
        ]
        which = "All experiments" if len(groups) == 1 else ", ".join(names)
        out.append(f"<p>{escape(which)}:</p><dl class='made'>{''.join(terms)}</dl>")
    rows = "".join(
        f"<tr><td>{_link(file, file)}</td><td><code>{result.provenance['sha256']}</code></td>"
        f"<td><code>{results.code_digest(result)}</code></td></tr>"
        for chapter in chapters
        for result in chapter.results
        if (file := f"{chapter.name}/{result.device}.npz")
    )
    out.append(
        "<p>Each figure says in its margin which arrays it was drawn from: the first digits of the sha256 of the file, "
        "which <code>sha256sum</code> prints.</p>"
        f"<details><summary>sha256 of every file of arrays, and of the code that made it</summary>{_frame('Digests')}"
        "<table><thead><tr><th>file</th><th>sha256</th><th>of the code</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div><p>The last column is one sha256 over those of all modules that ran, "
        "which the experiment's JSON lists.</p></details>"
        "<p><code>python -m experiments</code> runs everything again; <code>python -m experiments report</code> draws "
        "this page from the saved data; <code>python -m experiments verify</code> runs it again elsewhere and says of "
        "every number whether it came out the same. What it found, so far:</p>"
        f"{markdown(verified.table(folder))}{markdown(proof.tables(folder))}"
    )
    return "\n".join(out)


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "default" if value is None else str(value)


def _link(target: str, text: str) -> str:
    return f'<a href="{escape(target)}">{escape(text)}</a>'


def _code(folder: Path, file: str, text: str | None = None) -> str:
    """A file of the repository: a link where the results stand beside its folder, its name where they do not."""
    if (folder.parent / Path(file).parent).is_dir():
        return _link(f"../{file}", text or file)
    return f"<code>{escape(file)}</code>"


def _own(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8").strip()


def _json(value: Any) -> str:
    """JSON that may stand in a page: no `<` can end the script that holds it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
