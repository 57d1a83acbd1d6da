"""The report as a page: whole, self-contained, generated from the data alone, and alive in a real browser."""

import dataclasses
import hashlib
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from browser import browser, missing

import experiments
from experiments.engine import page, plots, report, results, verified, verify
from experiments.engine.kinds import EXACT
from experiments.engine.report import Chapter
from experiments.engine.results import Claim
from jaxgrad.theory import least_squares as theory
from jaxgrad.types import Batch

ROOT = Path(experiments.__file__).parent.parent
VOID = {"meta", "input", "br", "hr", "link", "img", "wbr", "col"}
HOSTILE = "<script>alert(1)</script> & \"quoted\" 'too' <b>"


class Outline(HTMLParser):
    """Every tag with its attributes; what was opened must be closed, in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {self.get_starttag_text()}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def values(self, attribute):
        return [found[attribute] for _, found in self.tags if attribute in found]


@dataclasses.dataclass(frozen=True)
class Config:
    n: int = 3


def made_up(folder, words=HOSTILE):
    """A study of two experiments, whose every text is hostile."""
    chapters = []
    for name in ("one", "two"):
        claims = [Claim("F1", words, words, words, True), Claim("C1", words, words, words, False)]
        numbers = {"x": np.arange(3.0)}
        results.write(folder, name, "cpu", Config(), numbers, claims, {"seconds": 1.0, "compile_seconds": 0.5})
        module = SimpleNamespace(
            Config=Config,
            QUICK=Config(n=1),
            report=lambda numbers: f"{words}\n\n| a |\n|---|\n| {words} |\n",
            headline=lambda numbers: f"- {words}",
        )
        figure, (axis,) = plots.figure()
        axis.plot([1, 2, 3], label=name)
        axis.fill_between([1, 2, 3], [1, 2, 3], alpha=0.3)
        result = results.read(folder, name, "cpu")
        report.save_figure(folder, result, figure)
        chapters.append(Chapter(name, words, module, (result,)))
    return chapters


@pytest.fixture(scope="module")
def committed():
    folder = ROOT / "results"
    if not results.saved(folder):
        pytest.skip("no results are committed yet")
    return (folder / "report.html").read_text(encoding="utf-8")


class TestDocument:
    def test_the_same_results_give_the_same_bytes(self, tmp_path):
        chapters = made_up(tmp_path / "results")
        first = page.write(tmp_path / "results", chapters).read_bytes()
        assert page.write(tmp_path / "results", made_up(tmp_path / "results")).read_bytes() == first

    def test_it_says_which_code_ran_and_what_verify_found(self, tmp_path):
        chapters = made_up(tmp_path)
        text = page.document(tmp_path, chapters)
        assert "Nothing has been verified" in text
        (one,) = chapters[0].results
        digest = results.code_digest(one)
        assert re.fullmatch("[0-9a-f]{16}", digest)
        assert f"<code>{one.provenance['sha256']}</code></td><td><code>{digest}</code>" in text
        changed = one._replace(provenance=one.provenance | {"code": {"experiments.one": "0" * 16}})
        assert results.code_digest(changed) != digest
        verified.note(tmp_path, tmp_path, "cpu", [verify.study(tmp_path, tmp_path, "one", "cpu", {"*": EXACT})])
        text = page.document(tmp_path, chapters)
        assert "Nothing has been verified" not in text
        assert re.search(r"<td>Python [^<]*</td>\n<td>1</td>", text)

    def test_every_text_is_escaped_and_every_id_is_one(self, tmp_path):
        outline = Outline(page.document(tmp_path, made_up(tmp_path)))
        scripts = [attributes for tag, attributes in outline.tags if tag == "script"]
        assert scripts == [{"type": "application/json", "id": "explorer-data"}, {}]
        assert sum("<script>alert(1)</script>" in text for text in outline.text) >= 8
        images = [attributes for tag, attributes in outline.tags if tag == "img"]
        assert [(image["src"], image["alt"]) for image in images] == [
            (f"{name}/figure.svg", f"Figure: {HOSTILE}") for name in ("one", "two")
        ]
        ids = outline.values("id")
        assert len(set(ids)) == len(ids)
        assert {f"#{id}" for id in ids} >= set(outline.values("href")) - {
            h for h in outline.values("href") if h[0] != "#"
        }

    def test_without_a_figure_or_the_tests_beside_it_it_says_so(self, tmp_path):
        chapters = made_up(tmp_path)
        (tmp_path / "one" / "figure.svg").unlink()
        text = page.document(tmp_path, chapters)
        assert "Its figure is not drawn" in text
        assert "<code>tests/library/test_lecture.py</code>" in text
        assert 'href="../tests' not in text

    def test_the_margin_names_the_data_by_what_sha256sum_prints(self, tmp_path):
        result = made_up(tmp_path)[0].results[0]
        digest = hashlib.sha256((tmp_path / "one" / "cpu.npz").read_bytes()).hexdigest()
        margin = report.origin(result.name, result.device, result.provenance)
        assert margin.startswith(f"one/cpu.npz sha256 {digest[:12]} · jax ")
        # Matplotlib notes each text that it draws as glyphs.
        assert f"<!-- {margin} -->" in (tmp_path / "one" / "figure.svg").read_text(encoding="utf-8")


class TestCommitted:
    def test_it_is_whole_and_loads_nothing_but_the_figures_beside_it(self, committed):
        outline = Outline(committed)
        assert not {tag for tag, _ in outline.tags} & {
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "form:action",
        }
        figures = [f"{name}/figure.svg" for name, _ in results.saved(ROOT / "results")]
        assert sorted(outline.values("src")) == sorted(set(figures))
        for tag, attributes in outline.tags:
            if tag in ("use", "image"):
                assert attributes.get("href", "#").startswith("#"), attributes
        assert "@import" not in committed
        assert re.findall(r"url\((?!#)", committed) == []
        assert any(attributes.get("http-equiv") == "Content-Security-Policy" for _, attributes in outline.tags)
        assert not re.search(r"/(home|root|tmp|work|usr|Users)/", committed)

    def test_every_id_is_one_and_every_link_leads_somewhere(self, committed):
        outline = Outline(committed)
        ids = outline.values("id")
        assert len(set(ids)) == len(ids)
        references = [m for text in outline.values("clip-path") for m in re.findall(r"url\(#([^)]+)\)", text)]
        for attribute in ("href", "for", "aria-labelledby", "aria-describedby"):
            references += [v.removeprefix("#") for v in outline.values(attribute) if attribute != "href" or v[0] == "#"]
        assert set(references) <= set(ids)
        files = {v for tag, found in outline.tags if tag == "a" and (v := found["href"])[0] != "#"}
        assert len(files) > 60
        for file in files:
            assert (ROOT / "results" / file).is_file(), file

    def test_every_row_of_the_lecture_opens_its_evidence(self, committed):
        for id in [f"F{i}" for i in range(1, 17)] + [f"C{i}" for i in range(1, 9)]:
            row = re.search(rf'<tbody id="{id}">(.*?)</tbody>', committed, re.DOTALL)
            assert row, id
            links = dict(re.findall(r'<a href="([^"]+)">(figure|data|test|code)</a>', row[1]))
            assert sorted(links.values()) == ["code", "data", "figure", "test"], id

    def test_every_figure_is_there_and_says_what_it_shows(self, committed):
        drawn = [found for tag, found in Outline(committed).tags if tag == "img"]
        assert len(drawn) == len({name for name, _ in results.saved(ROOT / "results")})
        assert all((ROOT / "results" / found["src"]).is_file() for found in drawn)
        assert all(found["alt"].startswith("Figure: ") for found in drawn)
        assert len(committed.encode()) < 3e5


@pytest.fixture(scope="class")
def chromium():
    if missing():
        pytest.skip(f"there is no {missing()} here: apt-get install chromium chromium-driver")
    with browser() as opened:
        yield opened


READY = "document.getElementById('explorer').getAttribute('aria-busy') === 'false'"
DRAWN = "return document.getElementById(arguments[0]).innerHTML"
SET = """
    const control = document.getElementById(arguments[0]);
    control.value = arguments[1];
    control.dispatchEvent(new Event("input", { bubbles: true }));
"""


class TestBrowser:
    @pytest.fixture
    def opened(self, chromium, committed):
        chromium.screen(1000)
        chromium.open(ROOT / "results" / "report.html")
        chromium.wait(READY)
        return chromium

    @pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (360, "dark"), (320, "light")])
    def test_it_loads_without_a_complaint_and_fits(self, opened, width, scheme):
        opened.complaints()
        opened.screen(width, scheme=scheme)
        opened.open(ROOT / "results" / "report.html")
        opened.wait(READY)
        assert opened.complaints() == []
        assert opened.run("return document.documentElement.scrollWidth") == width
        brightness = opened.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", brightness))) > 3 * 128) == (scheme == "light")
        # Nothing was asked for but the figures, and they came.
        asked = opened.run("return performance.getEntriesByType('resource').map((each) => each.name)")
        assert all(re.fullmatch(r"file:///.*/results/\w+/figure\.svg", name) for name in asked)
        opened.wait("Array.from(document.images).every((each) => { each.loading = 'eager'; return each.complete; })")
        assert opened.run("return Array.from(document.images).every((each) => each.naturalWidth > 0)")

    def test_each_control_changes_the_drawing(self, opened):
        def drawn():
            opened.wait(READY)
            return opened.run(DRAWN, "bowl"), opened.run(DRAWN, "curve"), opened.run(DRAWN, "said")

        seen = [drawn()]
        for act in (
            lambda: opened.run(SET, "eta", "-1"),
            lambda: opened.run(SET, "batch", "5"),
            lambda: opened.run(SET, "steps", "50"),
            lambda: opened.click("input[value='with replacement']"),
            lambda: opened.click("input[value='reshuffled']"),
            lambda: opened.click("input[value='full batch']"),
            lambda: opened.click("#explorer-form [data-sampling='with replacement']"),
            lambda: opened.click("#seeds"),
            lambda: opened.keys("#eta", "\ue012"),  # the left arrow key
        ):
            act()
            seen.append(drawn())
        for kind in range(3):
            changed = [old[kind] != new[kind] for old, new in itertools.pairwise(seen)]
            assert all(changed), (kind, changed)
        assert opened.complaints() == []

    def test_run_plays_the_paths_and_ends_where_they_end(self, opened):
        opened.run(SET, "steps", "50")
        opened.wait(READY)
        whole = opened.run(DRAWN, "bowl")
        opened.click("#run")
        assert opened.run("return document.getElementById('explorer').getAttribute('aria-busy')") == "true"
        assert len(opened.run(DRAWN, "bowl")) < len(whole)
        opened.wait(READY)
        assert opened.run(DRAWN, "bowl") == whole

    def test_the_moment_of_divergence_is_the_one_that_theory_predicts(self, opened):
        shown = page.explorer_data()
        problem = theory.problem(Batch(np.reshape(shown["x"], (-1, 2)), np.array(shown["y"])), bias=False)
        gaps = theory.gd_excess(problem, shown["start"], 10**0.04 * theory.edge(problem), np.arange(201))
        step = int(np.argmax(gaps > 10 * gaps[0]))
        assert 0 < step < 200
        opened.run(SET, "eta", "0.04")
        opened.wait(READY)
        assert f"GD is out at step {step}<" in opened.run(DRAWN, "curve")
        assert f"at step {step} it is out of the bowl" in opened.run(DRAWN, "said")
        assert opened.run("return document.querySelectorAll('#bowl .cross.gd, #curve .cross.gd').length") == 2
        opened.run(SET, "eta", "-0.04")
        opened.wait(READY)
        assert "out at step" not in opened.run(DRAWN, "curve")

    def test_the_links_of_the_table_resolve(self, opened):
        links = opened.run("return Array.from(document.querySelectorAll('.rows a'), (a) => a.href)")
        assert len(links) >= 24 * 4
        for link in set(links):
            file, _, id = link.partition("#")
            assert Path(file.removeprefix("file://")).is_file(), link
            assert not id or opened.run("return document.getElementById(arguments[0]) !== null", id), link
        opened.click("#F3 .evidence a")
        assert opened.run("return location.hash") == "#stopping"
        top = opened.run("return document.querySelector('#stopping h3').getBoundingClientRect().top")
        assert 0 <= top < 200

    def test_a_row_opens_its_checks_by_the_keyboard(self, opened):
        opened.keys("#C6 summary", "\ue007")  # Enter
        assert opened.run("return document.querySelector('#C6 details').open")
        assert opened.run("return document.querySelector('#C6 .checks').getBoundingClientRect().height") > 50

    def test_everything_that_can_be_used_can_be_reached_by_tab_and_has_a_name(self, opened):
        nameless = opened.run("""
            const named = (e) => e.labels?.length || e.textContent.trim() || e.getAttribute("aria-label");
            return Array.from(document.querySelectorAll("a, button, input, select, summary, [tabindex], svg"))
                .filter((e) => !e.closest(".glyphs") && !named(e) || e.tabIndex < 0 && e.tagName !== "svg")
                .map((e) => e.outerHTML.slice(0, 200));
        """)
        assert nameless == []
