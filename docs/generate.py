"""Write the documents that are made from the code: method pages and index, recipe schema, command line, errors.

scripts/docs            write them
scripts/docs --check    fail where one is out of date
"""

import inspect
import json
import re
import sys
from pathlib import Path

from command_line import NOTE, cli_page, manual_page

ROOT = Path(__file__).resolve().parent.parent

SCOPES = {
    "element": "elements: each by itself, in chunks of any size",
    "row": "rows: all weights of an output unit together",
    "tensor": "whole tensors: one at a time in memory",
    "matrix": "whole matrices: one at a time in memory; `others` and `embeddings` say what becomes of the rest",
    "factors": "factors of adapters: one module at a time in memory; see [adapters](../adapters.md)",
}
FAMILIES = {
    "averages": "Averages",
    "spherical": "Averages on spheres",
    "task vectors": "Task vectors",
    "spectral": "Spectral methods",
    "layers": "Layers",
    "data": "With statistics from data",
    "sidecars": "Sidecars",
}


def main() -> int:
    """Write the documents, or compare them."""
    check = "--check" in sys.argv[1:]
    pages = documents()
    known = set((ROOT / "docs" / "methods").glob("*.md"))
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    orphans = sorted(known - pages.keys())
    if check:
        for path in [*stale, *orphans]:
            print(f"{path.relative_to(ROOT)}: out of date; run scripts/docs", file=sys.stderr)
        return 1 if stale or orphans else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pages[path], encoding="utf-8")
    for path in orphans:
        path.unlink()
    print(f"{len(pages)} documents, {len(stale)} written, {len(orphans)} removed")
    return 0


def documents() -> dict[Path, str]:
    """Make every generated document."""
    from merganser.method.registry import every_method, methods
    from merganser.recipe.schema import json_schema

    found = methods()
    alone = {name: method for name, method in every_method().items() if name not in found}
    works = bibliography()
    docs = ROOT / "docs"
    pages = {docs / "methods" / f"{name}.md": method_page(method, works) for name, method in (found | alone).items()}
    pages[docs / "methods" / "README.md"] = method_index(found, alone)
    pages[docs / "errors.md"] = errors_page()
    pages[docs / "cli.md"] = cli_page()
    pages[docs / "merganser.1"] = manual_page()
    pages[ROOT / "src" / "merganser" / "recipe" / "recipe.schema.json"] = compact_json(json_schema()) + "\n"
    pages[ROOT / "src" / "merganser" / "catalogue" / "catalogue.json"] = compact_json(catalogue(found | alone)) + "\n"
    return pages


def catalogue(found) -> dict[str, object]:
    """Make what `merganser methods` shows without importing a method."""
    from dataclasses import asdict

    from merganser.method.description import describe
    from merganser.testing.passes import passes

    return {
        name: {**asdict(describe(method)), "passes": [asdict(one) for one in passes(method)]}
        for name, method in sorted(found.items())
    }


def compact_json(value: object, indent: int = 0, before: int = 0) -> str:
    """Write JSON with a list or object on one line where it fits or holds none; `before` letters are on the line."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or indent + before + len(line) < 120:
        return line
    if not any(isinstance(each, dict | list) for each in (value.values() if isinstance(value, dict) else value)):
        return line
    keys = (
        [f"{json.dumps(key, ensure_ascii=False)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    )
    children = value.values() if isinstance(value, dict) else value
    items = [key + compact_json(child, indent + 1, len(key)) for key, child in zip(keys, children, strict=True)]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    inner = "\n" + " " * (indent + 1)
    return f"{opening}{inner}" + f",{inner}".join(items) + f"\n{' ' * indent}{closing}"


def method_page(method, works: dict[str, dict[str, str]]) -> str:
    """Make the page of one method."""
    doc = method.doc
    source = Path(inspect.getsourcefile(method.combine)).resolve().relative_to(ROOT).as_posix()
    lines = [f"# {method.name}", "", doc.summary, ""]
    lines += fenced(doc.body)
    lines += ["## Use when", "", doc.sections["Use when"], "", "## Parameters", ""]
    lines += parameter_table(method)
    lines += ["", f"Takes {method.models_text()}."]
    lines += needs_from_data(method)
    if method.sidecar is not None:
        lines += ["", "Stores what restores each model: see [sidecars](../sidecars.md)."]
    if method.ignored:
        lines += ["", "Accepted for mergekit's sake, without effect:"]
        lines += [f"`{name}` ({why})" for name, why in method.ignored.items()]
    if method.mergekit:
        values = ", ".join(f"`{name}: {value}`" for name, value in method.mergekit.items())
        lines += ["", f"`compat: mergekit` sets {values}."]
    lines += ["", "## Differs from the paper", "", doc.sections["Differs from the paper"], ""]
    lines += ["## Works on", "", f"{SCOPES[method.scope].capitalize()}.", ""]
    if method.statistics:
        passes = sum(len(statistic.rounds) for statistic in method.statistics.values())
        names = ", ".join(method.statistics)
        lines += [f"Measures beforehand: {names} ({passes} pass{'es' * (passes > 1)} over the inputs, at most).", ""]
    if method.breaks:
        lines += ["Does not hold:", ""]
        lines += [f"- {LAWS[law]}: {why}." for law, why in method.breaks.items()] + [""]
    lines += ["## Example", "", "```yaml", example(method), "```", "", "## Reference", "", citation(method.cite, works)]
    lines += ["", f"Source: [`{source}`](../../{source}), version {method.version}."]
    return NOTE + "\n".join(lines) + "\n"


LAWS = {
    "identical": "identical models return that model",
    "zero_delta": "models equal to the base return the base",
    "order": "the order of the models does not matter",
    "differs": "the result differs from every input",
}


def fenced(body: str) -> list[str]:
    """Set the indented formulas of a docstring's body as code."""
    lines: list[str] = []
    inside = False
    for line in body.splitlines():
        formula = line.startswith("    ")
        if formula and not inside:
            lines.append("```")
        if inside and line and not formula:
            while lines[-1] == "":
                lines.pop()
            lines += ["```", ""]
        inside = formula or (inside and not line)
        lines.append(line[4:] if formula else line)
    if inside:
        lines.append("```")
    return [*lines, ""]


def parameter_table(method) -> list[str]:
    """Make the table of a method's parameters."""
    if not method.parameters:
        return ["None."]
    lines = ["| name | per model | value | default | |", "|---|---|---|---|---|"]
    for p in method.parameters.values():
        default = "required" if p.required else f"`{str(p.default).lower() if p.kind == 'flag' else p.default}`"
        # a bar in the text would end the cell
        said = p.help.replace("|", "\\|")
        lines.append(f"| `{p.name}` | {'yes' if p.per_model else ''} | {p.allowed} | {default} | {said} |")
    return lines


def needs_from_data(method) -> list[str]:
    """Return the lines of a page on the statistics from data that a method takes, and on how a recipe gives them."""
    own = [each.statistic for each in method.from_data.values() if each.of != "base_on_models"]
    own += [each.measured for each in method.numbers.values()]
    of_base = [each.statistic for each in method.from_data.values() if each.of == "base_on_models"]
    whose = {"models": "every model", "base": "the base", "first": "the first model"}[method.data_of]
    found = [(own, whose), (of_base, "the base on the data of every model")]
    needed = [f"of {of} `{', '.join(dict.fromkeys(names))}`" for names, of in found if names]
    if not needed:
        return []
    takes = "Needs" if needs_text(method) else "Takes, if they are given,"
    said = f"{takes} [statistics from data](../calibrate.md): {', and '.join(needed)}"
    if method.data_inputs != "own":
        return [
            "",
            f"{said}, measured [within the merge](../calibrate.md#within-a-merge) on the recipe's [`data`](../recipes.md#data).",
        ]
    folders = ["`statistics`"] * bool(own) + ["`base_statistics`"] * bool(of_base)
    return [
        "",
        f"{said}. The merge makes them from the text that the recipe names as [`data`](../recipes.md#data); or name folders that "
        f"`merganser calibrate` wrote, as {' and '.join(folders)}.",
    ]


def needs_text(method) -> bool:
    """Return whether a recipe of the method must name text or statistics."""
    return bool(method.from_data) or any(not own.optional for own in method.numbers.values())


def example(method) -> str:
    """Make a recipe that runs, with every required parameter."""
    needs_base = method.base == "required"
    lines = [f"merge_method: {method.name}"] + ["base_model: path/to/base"] * needs_base + ["models:"]
    count = max(method.min_models, min(2, method.max_models or 2))
    # models that are compared token by token read the same text
    together = method.reads_alike
    needs = needs_text(method)
    if needs and method.data_of == "base":
        lines += ["  - model: path/to/base", "    data: path/to/text.txt"]
    for i in range(count):
        kind = "adapter" if method.scope == "factors" else "expert"
        lines.append(f"  - model: path/to/{kind}-{'abcdefgh'[i]}")
        if needs and not together and (method.data_of == "models" or (method.data_of == "first" and i == 0)):
            lines.append(f"    data: path/to/text-{'abcdefgh'[i]}.txt")
        each = [p for p in method.parameters.values() if p.per_model and p.required]
        if each:
            lines.append("    parameters:")
            lines += [f"      {p.name}: {suggestion(p)}" for p in each]
    shared = [p for p in method.parameters.values() if not p.per_model and p.required]
    if shared:
        lines.append("parameters:")
        lines += [f"  {p.name}: {suggestion(p)}" for p in shared]
    return "\n".join([*lines, *["data: path/to/text.txt"] * together, "dtype: bfloat16"])


def suggestion(parameter) -> float:
    """Suggest a value for a required parameter."""
    low, high = (parameter.range.search if parameter.range else None) or (0.0, 1.0)
    return round((low + high) / 2, 3)


def method_index(found, alone) -> str:
    """Make the index: grouped by family, with what methods declare and the contract suite checks."""
    lines = [
        "# Merge methods",
        "",
        f"{len(found)} methods for models and {len(alone)} for adapters only. The page of a method has its formula, when to",
    ]
    lines += [
        "use it, its parameters, and where it differs from its paper. [Choosing a method](../choosing-a-method.md) has advice.",
        "",
    ]
    lines += ["| column | |", "|---|---|"]
    lines += [
        "| works on | what is in memory at a time: elements (blocks of any size), rows, whole tensors, or whole matrices |"
    ]
    lines += ["| memory | measured peak for one such piece, in multiples of all models' values of it in float32 |"]
    lines += ["| order matters | whether the result depends on the order of the models |"]
    lines += ["| random | whether the method draws random numbers (`--seed`) |", ""]
    lines += ["The contract suite checks the columns.", ""]
    families = dict.fromkeys([*FAMILIES, *sorted({m.family for m in found.values()})])
    for family in families:
        members = [m for m in found.values() if m.family == family]
        if not members:
            continue
        lines += [f"## {FAMILIES.get(family, family.capitalize())}", ""]
        lines += [
            "| method | | takes | works on | memory | order matters | identical models return that model | random |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [*map(index_row, members), ""]
    lines += [
        "## Adapters",
        "",
        "These merge adapters only. Most of the others merge adapters, too: see [adapters](../adapters.md).",
        "",
    ]
    lines += ["| method | |", "|---|---|"]
    lines += [f"| [{m.name}]({m.name}.md) | {m.doc.summary} |" for m in alone.values()]
    lines += ["", *elsewhere()]
    return NOTE + "\n".join(lines) + "\n"


def index_row(method) -> str:
    """Make the row of a method in the index."""
    from merganser.testing.breakable import applies
    from merganser.testing.laws import peak_memory

    def holds(*laws: str) -> str:
        known = [law for law in laws if applies(law, method)]
        return "unknown" if not known else "no" if known[0] in method.breaks else "yes"

    plural = {"element": "elements", "row": "rows", "tensor": "tensors", "matrix": "matrices"}
    yes = {True: "yes", False: "no"}
    order = "order" in method.breaks or method.random
    return (
        f"| [{method.name}]({method.name}.md) | {method.doc.summary} | {method.models_text()} | {plural[method.scope]} | "
        f"{peak_memory(method):g} | {yes[order]} | {holds('identical', 'zero_delta')} | {yes[method.random]} |"
    )


def elsewhere() -> list[str]:
    """List published methods that no recipe can name: those in another form, and those that are not here."""
    from merganser.catalogue import ELSEWHERE

    def shown(own) -> str:
        # names in lower case are further spellings of those before
        return ", ".join([name for name in own.names if not name.islower()] or own.names)

    lines = ["## Under another name, or elsewhere", "", "Published methods that are available in another form.", ""]
    lines += ["| published as | |", "|---|---|"]
    for own in (each for each in ELSEWHERE if each.page):
        inside = own.page.removeprefix("methods/")
        link = inside if inside != own.page else f"../{own.page}"
        lines.append(f"| {shown(own)} | {own.says} ([more]({link})) |")
    lines += [
        "",
        "## Not here",
        "",
        "Published methods that are not available. The error for such a name says the same.",
        "",
    ]
    lines += ["| published as | why |", "|---|---|"]
    lines += [f"| {shown(own)} | {own.says} |" for own in ELSEWHERE if not own.page]
    return lines


def bibliography() -> dict[str, dict[str, str]]:
    """Read the fields of references.bib that a page shows."""
    text = (ROOT / "references.bib").read_text(encoding="utf-8")
    works = {}
    for entry in re.split(r"^@", text, flags=re.MULTILINE)[1:]:
        key = entry.partition("{")[2].partition(",")[0].strip()
        if key in works:
            raise SystemExit(f"references.bib: {key} is there twice")
        fields = re.findall(r"^\s*(\w+)\s*=\s*[{\"](.*?)[}\"],?\s*$", entry, flags=re.MULTILINE)
        works[key] = {name.lower(): re.sub(r"[{}]", "", value) for name, value in fields}
    return works


def citation(key: str, works: dict[str, dict[str, str]]) -> str:
    """Set a citation."""
    if key == "-":
        return "No publication."
    work = works[key]
    number = work.get("eprint") or ""
    link = f" [arXiv:{number}](https://arxiv.org/abs/{number})" if number else ""
    link = link or (f" {work['url']}" if "url" in work else "")
    return f"{work['author'].replace(' and ', ', ')} ({work['year']}). *{work['title']}*.{link} `{key}`"


def errors_page() -> str:
    """Make the page of errors from the tree in the module."""
    from merganser import errors

    lines = inspect.cleandoc(errors.__doc__).splitlines()
    return (
        NOTE
        + "\n".join(["# Errors", "", lines[0], "", "```", *(line[4:] for line in lines[2:-2]), "```", "", lines[-1]])
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
