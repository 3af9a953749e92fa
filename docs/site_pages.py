"""What the site has beyond the pages: reference, gallery, lists of messages; a Sphinx extension (see docs/conf.py)."""

import ast
import hashlib
import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import error_messages

import vlm_mech

HERE = Path(__file__).parent
GENERATED = HERE / "generated"
REPOSITORY = "https://github.com/vlm-mech/vlm_mech/blob/main"
ROOMS = {
    "models": ("Models", ("models.", "architectures.")),
    "inputs": ("Prompts, images, spans", ("inputs.",)),
    "data": ("Data", ("data.",)),
    "interventions": ("Interventions, runs, receipts", ("interventions.",)),
    "sweeps": ("Sweeps and measures", ("sweeps.",)),
    "methods": ("Methods", ("methods.",)),
    "results": ("Results and figures", ("results.", "extraction.")),
    "others": ("Errors, decoding and others", ("",)),
}
"""Pages of the reference: title, and the rooms whose names stand there; a name stands on the first that fits."""


def _tree(*entries: str, hidden: bool = True) -> str:
    return "\n\n```{toctree}\n:glob:\n" + (":hidden:\n" if hidden else "") + "\n" + "\n".join(entries) + "\n```\n"


TREES = {
    "errors/index": _tree("*"),
    "gallery": _tree("recipes/README"),
    "methods": _tree("methods/*"),
    "notebooks": _tree("notebooks/*"),
    "reference": _tree(*(f"generated/reference/{page}" for page in ROOMS), hidden=False),
}
"""What stands below a page, where GitHub has a table or a list."""
PLOTLY = "application/vnd.plotly.v1+json"
CODE = re.compile(r"(``.+?``|(?<!`)`[^`\n]+`(?!`))")


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    draw_plotly()
    app.connect("config-inited", write_reference)
    app.connect("source-read", completed)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=1)
    app.connect("html-page-context", with_script)
    app.connect("build-finished", copy_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def completed(app: Any, name: str, source: list[str]) -> None:
    """Puts in what is made from the source: messages, recipes, links from names to the reference."""
    text = source[0]
    if name.startswith("errors/"):
        text = error_messages.with_lists(text)
    if name == "gallery":
        text = text.replace("<!-- gallery -->", gallery())
    if name == "changelog":
        text = text.replace("<!-- changelog -->", changelog())
    text += TREES.get(name, "")
    if name == "api":
        text = re.sub(r"(?m)^\| `(\w+)` \|", r"| {py:obj}`\1 <vlm_mech.\1>` |", text)
    text = re.sub(r"\]\(((?:\.\./)+[^)#]+\.(?:md|cff))", lambda found: _on_github(app.srcdir / name, found), text)
    # Drawn only where a page may load a script from elsewhere.
    source[0] = text.replace("```mermaid", "```text")


def changelog() -> str:
    """CHANGELOG.md without its title, its links as seen from here."""
    text = (HERE.parent / "CHANGELOG.md").read_text().partition("\n")[2]
    return re.sub(r"\]\((?!http|#)[^)]+\)", _from_here, text)


def _on_github(page: Path, found: re.Match[str]) -> str:
    """A link to a file beside the folder of the documentation, which the site does not have."""
    there = (page.parent / found[1]).resolve()
    return found[0] if there.is_relative_to(HERE) else f"]({REPOSITORY}/{there.relative_to(HERE.parent)}"


def _from_here(found: re.Match[str]) -> str:
    return found[0].replace("](docs/", "](") if "](docs/" in found[0] else found[0].replace("](", "](../")


def gallery() -> str:
    """Every recipe: what it asks, its figure if there is one, its code."""
    parts = []
    for path in sorted((HERE / "recipes").glob("*.py")):
        code = path.read_text()
        doc = ast.get_docstring(ast.parse(code)) or ""
        first, _, rest = doc.partition("\n\n")
        title = path.stem.replace("_", " ").capitalize()
        figure = HERE / "recipes" / "figures" / f"{path.stem}.png"
        shown = f"![What {path.name} draws](recipes/figures/{figure.name})\n\n" if figure.exists() else ""
        body = code[code.index('"""', 3) + 3 :].strip("\n")
        parts.append(
            f"## {title}\n\n{first}\n\n{rest}\n\n{shown}`python docs/recipes/{path.name}`:\n\n```python\n{body}\n```\n"
        )
    return "\n".join(parts)


def homes() -> dict[str, str]:
    """The module, within `vlm_mech`, of every public name."""
    return vlm_mech._HOME_OF | vlm_mech._MODULES


def rooms() -> dict[str, list[str]]:
    """The public names on each page of the reference."""
    found: dict[str, list[str]] = {page: [] for page in ROOMS}
    for name in sorted(homes(), key=str.lower):
        page = next(page for page, (_, starts) in ROOMS.items() if homes()[name].startswith(starts))
        found[page].append(name)
    return found


def write_reference(app: Any, config: Any) -> None:
    """Writes the pages of the reference from the public names, into a folder that git ignores."""
    folder = GENERATED / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    for page, names in rooms().items():
        title = ROOMS[page][0]
        rows = "".join(f"   * - :py:obj:`vlm_mech.{name}`\n     - {summary(name)}\n" for name in names)
        text = f"{title}\n{'=' * len(title)}\n\n.. list-table::\n   :widths: 30 70\n\n{rows}\n"
        text += "\n".join(entry(name) for name in names)
        path = folder / f"{page}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def summary(name: str) -> str:
    """The first sentence of what a name says of itself."""
    given = getattr(vlm_mech, name)
    doc = inspect.getdoc(given) if isinstance(given, type | ModuleType) or callable(given) else None
    first = " ".join((doc or "a union of types").split("\n\n")[0].split())
    return escaped(first) if first else name


def entry(name: str) -> str:
    """The directives for one name, below its heading."""
    given = getattr(vlm_mech, name)
    head = f"{name}\n{'-' * len(name)}\n\n"
    if isinstance(given, ModuleType):
        functions = "".join(f".. autofunction:: {given.__name__}.{each}\n\n" for each in own_functions(given))
        return f"{head}.. py:module:: vlm_mech.{name}\n\n{summary(name)}\n\n{functions}"
    if inspect.isclass(given):
        bases = "" if given.__bases__ == (object,) else "   :show-inheritance:\n"
        return f"{head}.. autoclass:: vlm_mech.{name}\n   :members:\n{bases}"
    if inspect.isfunction(inspect.unwrap(given)):
        return f"{head}.. autofunction:: vlm_mech.{name}\n"
    kinds = " | ".join(each.__name__ for each in getattr(given, "__args__", ()) if hasattr(each, "__name__"))
    return f"{head}.. py:data:: vlm_mech.{name}\n\n   One of: {escaped(kinds)}\n"


def own_functions(module: ModuleType) -> list[str]:
    """The public functions that a module defines itself, in its order."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and inspect.isfunction(value) and value.__module__ == module.__name__
    ]


def as_restructured_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written with single backticks, and with stars and bars that mean themselves."""
    lines[:] = [escaped(line) for line in lines]


def escaped(line: str) -> str:
    """A line of plain text in reStructuredText: code in double backticks, stars and bars as they are."""
    parts = CODE.split(line)
    plain = [re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts]
    shown = [f"``{part.strip('`')}``" if number % 2 else plain[number] for number, part in enumerate(parts)]
    return _apart(shown)


def _apart(parts: list[str]) -> str:
    """Code and the letters that follow it at once, with a mark between, as reStructuredText needs it."""
    text = ""
    for number, part in enumerate(parts):
        text += "\\ " if number % 2 == 0 and number and part[:1].isalnum() else ""
        text += part
    return text


class Plotly:
    """Draws the figures of notebooks, by the copy of plotly that the site has (a plug-in of MyST-NB)."""

    mime_priority_overrides = (("*", PLOTLY, 1),)

    @staticmethod
    def handle_mime(renderer: Any, data: Any, inline: bool) -> list[Any] | None:
        """A figure as HTML; None for anything else."""
        from docutils import nodes

        if data.mime_type != PLOTLY:
            return None
        figure = json.dumps({key: data.content.get(key) for key in ("data", "layout")}).replace("</", "<\\/")
        place = "plotly-" + hashlib.sha256(figure.encode()).hexdigest()[:12]
        options = "{responsive: true, displaylogo: false}"
        draw = f"const f = {figure}; Plotly.newPlot('{place}', f.data, f.layout, {options});"
        text = f"<script>addEventListener('DOMContentLoaded', () => {{{draw}}});</script>"
        return [nodes.raw(text=f'<div id="{place}" class="plotly-figure"></div>{text}', format="html")]


def draw_plotly() -> None:
    """Adds it to the plug-ins that MyST-NB finds among installed packages; the documentation is none."""
    from myst_nb.core import render

    if Plotly not in (found := render.load_mime_renders()):
        render.load_mime_renders = lambda: [*found, Plotly]  # type: ignore[assignment]


def with_script(app: Any, name: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Loads plotly on pages of notebooks."""
    if name.startswith("notebooks/"):
        app.add_js_file("plotly.min.js", loading_method=None)


def copy_script(app: Any, error: Exception | None) -> None:
    """Copies plotly's script, as it was installed, to the site."""
    if error is None and app.builder.format == "html":
        from plotly.offline import get_plotlyjs

        (Path(app.outdir) / "_static" / "plotly.min.js").write_text(get_plotlyjs())
