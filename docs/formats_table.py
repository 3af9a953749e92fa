"""The table of formats in docs/data.md, made from the formats themselves: `python docs/formats_table.py` writes it."""

from pathlib import Path

from vlm_mech.data.readers.registry import formats

PAGE = Path(__file__).with_name("data.md")
START, END = "<!-- made by docs/formats_table.py -->", "<!-- end of what is made -->"


def table() -> str:
    """A row for each format, as Markdown."""
    rows = [(f"`{each.name}`", each.holds, each.layout, each.becomes) for each in formats()]
    head = [("format", "holds", "files", "what their rows become"), ("---",) * 4]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (*head, *rows))


def with_table(page: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = page.partition(START)
    return f"{before}{START}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
