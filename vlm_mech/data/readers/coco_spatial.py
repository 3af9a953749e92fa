"""COCO-spatial: `coco_qa_one_obj.json`, `coco_qa_two_obj.json` (see `spatial_captions`)."""

from collections.abc import Sequence

from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.spatial_captions import is_named, rows_of
from vlm_mech.data.user_files import Rows


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items, about pictures of COCO val2017."""
    return rows_of(tables, options, lambda table, number: table.picture(f"{number:012d}.jpg", "val2017"))


FORMAT = Format(
    name="coco-spatial",
    holds="items",
    columns=("0", "1", "2"),
    rows=rows,
    layout="`coco_qa_one_obj.json`, `coco_qa_two_obj.json`: a list of [number of the picture, right caption, wrong "
    "caption]; `val2017/{number:012d}.jpg`",
    becomes="one item a row; questions of arXiv 2411.05195 (ours for above/below, top/bottom), the options exchanged "
    "with probability .5",
    fits=lambda table: is_named(table, "coco_qa_one_obj.json", "coco_qa_two_obj.json"),
)
