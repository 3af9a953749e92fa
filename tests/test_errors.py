"""Every error has a code, every code a page whose examples are true; a notebook shows one line, and all on demand."""

import importlib.util
import pickle
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from vlm_mech import Site
from vlm_mech.errors import CODES, PAGES, TooFewError, UsageError, code_of, one_line_errors

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def pages():
    """docs/error_messages.py"""
    found = importlib.util.spec_from_file_location("error_messages", DOCS / "error_messages.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_every_module_that_makes_errors_has_a_code_and_every_code_a_page(pages):
    made = pages.made()
    assert len(made) > 1000
    assert [each for each in made if each.code == "general"] == []
    codes = {each.code for each in made} | {"general"}
    assert {page.stem for page in pages.pages()} == codes
    listed = re.findall(r"^\| \[([\w-]+)\]", (DOCS / "errors" / "index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(codes)


def test_every_name_in_the_table_of_codes_is_a_module():
    """But the room of the explorer, which may not be there yet."""
    rooms = (name for name in CODES if name != "explore")
    assert [name for name in rooms if importlib.util.find_spec(f"vlm_mech.{name}") is None] == []


def test_the_innermost_room_says_which_code():
    assert code_of("vlm_mech.inputs.span") == "spans" and code_of("vlm_mech.inputs.prompt_rows") == "prompts"
    assert code_of("experiments.steer") == "options" and code_of("numpy.linalg") == "general"


def test_an_error_keeps_its_code_through_a_process_and_a_kind_has_its_own():
    with pytest.raises(UsageError) as caught:
        Site("llm.residual", 1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.code, again.page, str(again)) == ("sites", f"{PAGES}/sites.md", str(caught.value))
    assert TooFewError("one").code == "too-few"


@pytest.mark.long
def test_examples_on_the_pages_of_errors_are_true():
    """The wrong call fails with the message that is there, the right one runs; without the checks of types."""
    done = subprocess.run(
        [sys.executable, DOCS / "error_messages.py", "--check"], cwd=DOCS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_list_of_a_code_has_its_messages(pages):
    text = pages.with_lists((DOCS / "errors" / "spans.md").read_text())
    assert "<!-- messages" not in text and "vlm_mech.inputs.span" in text
    assert "span … is not known here; named spans: …" in text


def test_debugging_a_command_names_the_page(capsys):
    with pytest.raises(SystemExit), one_line_errors(debug=True):
        Site("llm.residual", 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].endswith(f"{PAGES}/sites.md") and lines[-1].startswith("error: site 'llm.residual'")


def test_a_notebook_shows_one_line_and_the_whole_traceback_on_demand():
    cells = [nbformat.v4.new_code_cell(text) for text in ('from vlm_mech import Site\nSite("llm.residual", 1)', "%tb")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3", allow_errors=True).execute()
    (short,), (whole,) = ([each for each in cell.outputs if each.output_type == "error"] for cell in notebook.cells)
    assert short.ename == "UsageError" and len(short.traceback) == 1
    assert (
        short.traceback[0].startswith("UsageError: site 'llm.residual'") and f"{PAGES}/sites.md" in short.traceback[0]
    )
    assert len(whole.traceback) > 5 and any("architectures/site.py" in line for line in whole.traceback)
