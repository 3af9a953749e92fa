"""Where the explorer is shown: a notebook kernel, a frame, a report."""

import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.explorer.large import large
from tests.runs.fake_run import swap_result
from tests.zoo.batches import pairs_of
from vlm_mech.explorer import embedding, showing
from vlm_mech.explorer.embedding import explorer_of
from vlm_mech.runs.configuration import ExploredConfig
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.report import write_report

ROOT = Path(__file__).parents[2]
CELL = "from tests.explorer.large import large\nlarge(2, 2, 4)"


def test_a_cell_of_a_notebook_shows_the_widget_and_a_frame():
    pytest.importorskip("anywidget", reason="anywidget is not installed")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, timeout=120, kernel_name="python3", store_widget_state=True).execute()
    [output] = notebook.cells[0].outputs
    view = output["data"]["application/vnd.jupyter.widget-view+json"]
    held = notebook.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"][view["model_id"]]["state"]
    assert held["data"] == large(2, 2, 4).data and held["_esm"] == showing.module()
    assert (
        output["data"]["text/html"].startswith("<iframe ") and 'sandbox="allow-scripts"' in output["data"]["text/html"]
    )


def test_without_anywidget_there_is_the_frame_alone(monkeypatch):
    monkeypatch.setattr(showing.importlib.util, "find_spec", lambda _: None)
    found = large(2, 2, 4)
    assert found._repr_mimebundle_() == {} and "srcdoc=" in found._repr_html_()
    with pytest.raises(showing.UsageError, match=r'pip install "vlm_mech\[explore\]"'):
        found.widget()


def test_the_page_is_shipped():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["vlm_mech"]
    assert {path.name for path in showing.PAGE.iterdir()} == {"explorer.js", "page.html"}
    assert "explorer/page/*" in shipped and len(showing.module().encode()) < 60_000


def test_a_report_holds_the_examples_once(vlm, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "explore", lambda *_, **__: large(2, 2, 4))
    shown = explorer_of(ExploredConfig(explore=2), vlm, pairs_of(3))
    assert explorer_of(ExploredConfig(), vlm, pairs_of(3)) is None
    path = tmp_path / "report.html"
    write_report(path, Outcome(swap_result(), {}, embedded=shown), command="again")
    page = path.read_text()
    assert page.count(shown.data) == 1 and page.count("class Explorer") == 1 and shown.data.count('"format"') == 2
    monkeypatch.setattr(embedding, "MOST_BYTES", len(large(2, 2, 4).data) + 10)
    assert "1 of 3 examples are shown" in explorer_of(ExploredConfig(explore=9), vlm, pairs_of(3)).caption
    with pytest.raises(embedding.UsageError, match="--explore is -1"):
        explorer_of(ExploredConfig(explore=-1), vlm, pairs_of(3))
