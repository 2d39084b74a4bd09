"""The site of the documents: it builds without a warning, is searchable, and a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("material")

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_every_document_is_a_page(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    built = {path.relative_to(site) for path in site.rglob("*.html")}
    assert {page for page in pages if page.name != "README.html"} <= built
    assert {Path("index.html"), Path("methods/index.html")} <= built


def test_no_link_leads_nowhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
            if ":" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(site)}: {target}"


def test_methods_are_found(site: Path) -> None:
    index = next(path for path in site.rglob("search_index.js*"))
    text = index.read_text(encoding="utf-8")
    found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert any("regmean_plus" in entry["location"] for entry in found["docs"])


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_a_browser_shows_it(site: Path) -> None:
    assert BROWSER is not None
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    page = (site / "methods" / "ties.html").as_uri()
    shown = subprocess.run([BROWSER, *words, page], capture_output=True, text=True, timeout=120, check=True).stdout
    # the script of the search has run: it makes the page's list of results
    assert "md-search-result__meta" in shown
    assert "ties" in shown
