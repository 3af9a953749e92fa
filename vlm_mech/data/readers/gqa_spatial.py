"""GQA-spatial: `vg_qa_one_obj.json`, `vg_qa_two_obj.json` (see `spatial_captions`)."""

from collections.abc import Sequence

from vlm_mech.data.readers.format import Format, ReaderOptions, Table
from vlm_mech.data.readers.spatial_captions import is_named, rows_of
from vlm_mech.data.user_files import Rows


def rows(tables: Sequence[Table], options: ReaderOptions) -> Rows:
    """The items, about pictures of Visual Genome."""
    return rows_of(tables, options, lambda table, number: table.picture(f"{number}.jpg", "vg_images"))


FORMAT = Format(
    name="gqa-spatial",
    holds="items",
    columns=("0", "1", "2"),
    rows=rows,
    layout="`vg_qa_one_obj.json`, `vg_qa_two_obj.json`: a list of [number of the picture, right caption, wrong caption]"
    "; `vg_images/{number}.jpg`",
    becomes="as coco-spatial",
    fits=lambda table: is_named(table, "vg_qa_one_obj.json", "vg_qa_two_obj.json"),
)
