"""How an exploration is shown: a widget where anywidget is installed, a frame in other notebooks, a page from disk."""

import functools
import html
import importlib.util
import json
from pathlib import Path
from typing import Any

from vlm_mech.errors import UsageError

PAGE = Path(__file__).parent / "page"
HEIGHT = 900
"""Of the frame in a notebook without anywidget, in pixels."""


class Shown:
    """What has a `title` and `data` for the explorer."""

    title: str
    data: str

    @property
    def page(self) -> str:
        """A whole HTML page: the explorer, its data, and nothing from anywhere else."""
        import jinja2

        how: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined, "keep_trailing_newline": True}
        template = jinja2.Environment(**how).from_string((PAGE / "page.html").read_text(encoding="utf-8"))
        return template.render(title=self.title, data=in_script(self.data), module=module())

    def save(self, path: str | Path) -> Path:
        """Writes a page that opens from disk by itself, without a network; where it was written."""
        path = Path(path)
        if not path.parent.is_dir():
            raise UsageError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}")
        path.write_text(self.page, encoding="utf-8")
        return path

    def widget(self) -> Any:
        """A Jupyter widget, whose `state` says which token (by number), layer and head are looked at.

        Raises:
            UsageError: anywidget is not installed.
        """
        if importlib.util.find_spec("anywidget") is None:
            raise UsageError('widget() needs anywidget: pip install "vlm_mech[explore]"; without it the page shows')
        return _widget_class()(data=self.data)

    def _repr_html_(self) -> str:
        told, source = html.escape(self.title), html.escape(self.page)
        frame = f'<iframe title="{told}" srcdoc="{source}" sandbox="allow-scripts" width="100%" height="{HEIGHT}"'
        return f'{frame} style="border:0"></iframe>'

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any] | tuple[dict[str, Any], dict[str, Any]]:
        """The widget where there is anywidget; the frame stands beside it, for pages that run no widgets."""
        if importlib.util.find_spec("anywidget") is None:
            return {}
        return self.widget()._repr_mimebundle_() or {}


@functools.cache
def module() -> str:
    """The explorer: one ES module."""
    return (PAGE / "explorer.js").read_text(encoding="utf-8")


def in_script(data: str) -> str:
    """JSON that can stand in a script of a page: no text in it can end the script."""
    return json.dumps(json.loads(data)).replace("<", "\\u003c")


@functools.cache
def _widget_class() -> Any:
    """The class of widgets; anywidget is an optional package."""
    import anywidget
    import traitlets

    class Explorer(anywidget.AnyWidget):
        """The explorer as a widget."""

        _esm = module()
        data = traitlets.Unicode().tag(sync=True)
        state = traitlets.Dict().tag(sync=True)

    return Explorer
