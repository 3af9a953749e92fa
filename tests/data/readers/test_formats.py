"""The formats: each is known by its own files alone, and the table of the docs is made from them."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.readers.made import write_json, write_lines
from vlm_mech.data.export.__main__ import export
from vlm_mech.data.readers import registry
from vlm_mech.data.readers.format import Format, ReaderOptions
from vlm_mech.data.readers.tables import read, tables_in
from vlm_mech.data.user_files import Row, Rows

ROOT = Path(__file__).parents[3]


def test_the_table_of_formats_is_that_of_the_docs():
    script = runpy.run_path(str(ROOT / "docs" / "formats_table.py"))
    page = script["PAGE"].read_text()
    assert script["with_table"](page) == page, "run: python docs/formats_table.py"
    assert [f"`{each.name}`" for each in registry.formats()] == re.findall(
        r"^\| (`[\w-]+`) \| (?:pairs|items|text|classes) ", page, re.M
    )


KNOWN = [each for each in registry.formats() if each.known_by_files]


@pytest.mark.parametrize("name", [each.name for each in KNOWN])
def test_files_of_a_format_are_of_no_other(name, tmp_path):
    export(name, tmp_path / "made", n=8)
    tables = tables_in(tmp_path / "made")
    assert {each.name for each in KNOWN for table in tables if registry.is_of(each, table)} == {name}
    source = registry.find_source(tmp_path / "made", others=True)
    assert source is not None and source.format.name == name and len(source.tables) == len(tables)


FIRST = {
    "pope": {"label": "maybe"}, "vstar": {"label": "?"}, "imagewikiqa": {"label": None},
    "vlmclassifier": {"split": "dev set"},
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("lacking", [False, True])
def test_a_first_row_that_cannot_be_used_is_one_of_those_counted_out(name, lacking, tmp_path):
    export(name, tmp_path / "made", n=8)
    source = registry.find_source(f"{name}:{tmp_path / 'made'}", others=True)
    assert source is not None
    path = source.tables[0].path
    rows = list(source.rows(ReaderOptions()).rows)
    first, *others = (row.fields for row in read(source.tables[0]) if isinstance(row, Row))
    changed = FIRST[name]
    first = {key: value for key, value in first.items() if key not in changed} if lacking else first | changed
    (write_json if path.suffix == ".json" else write_lines)(path, [first, *others])
    for each in (f"{name}:{tmp_path / 'made'}", tmp_path / "made"):
        found = registry.find_source(each, others=True)
        assert found is not None and found.format.name == name
        given = found.rows(ReaderOptions())
        assert [row.id for row in given.rows] == [row.id for row in rows[1:]]
        assert len(given.refused) == 1


def test_a_module_with_a_format_is_all_that_is_needed(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("from tests.data.readers.test_formats import MINE\nFORMAT = MINE\n")
    monkeypatch.setattr(registry.readers, "__path__", [*registry.readers.__path__, str(tmp_path)])
    registry.formats.cache_clear()
    try:
        assert "mine" in [each.name for each in registry.formats()]
        assert registry.named("mine:somewhere") == (MINE, Path("somewhere"))
    finally:
        registry.formats.cache_clear()
        sys.modules.pop("vlm_mech.data.readers.mine")


MINE = Format("mine", "items", ("a",), lambda tables, options: Rows((), {}), "a file", "an item")


def test_what_names_no_format_is_a_path(tmp_path):
    assert registry.named("hf:owner/name") == (None, Path("hf:owner/name"))
    assert registry.find_source("hf:owner/name") is None
    assert registry.find_source("x" * 5_000) is None
    assert registry.find_source(tmp_path) is None


def test_formats_are_light_to_import():
    """`--help` imports them."""
    code = (
        "import sys\nfrom vlm_mech.data.readers.registry import formats\nassert len(formats()) > 12\n"
        "heavy = {'torch', 'numpy', 'pandas', 'pyarrow', 'PIL', 'datasets'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
