"""Draws which room of `vlm_mech` imports which, from the imports themselves, into docs/architecture.md.

`python docs/draw_rooms.py` rewrites the picture and the counts under it; a test compares them with what stands there.
"""

from pathlib import Path

import grimp

PAGE = Path(__file__).parent / "architecture.md"
BEGIN, END = "<!-- drawn by docs/draw_rooms.py -->", "<!-- end of what is drawn -->"


def arrows() -> dict[str, set[str]]:
    """For each room the rooms that it imports; the front door (`__init__.py`), which names everything, is no room."""
    graph = grimp.build_graph("vlm_mech", cache_dir=None)
    found: dict[str, set[str]] = {name.partition(".")[2]: set() for name in graph.find_children("vlm_mech")}
    for importer in graph.modules - {"vlm_mech"}:
        for imported in graph.find_modules_directly_imported_by(importer) - {"vlm_mech"}:
            ends = [name.split(".")[1] for name in (importer, imported)]
            if ends[0] != ends[1]:
                found[ends[0]].add(ends[1])
    return found


def floors(found: dict[str, set[str]]) -> dict[str, int]:
    """How many rooms stand on one another below each room, by the longest way down.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    made: dict[str, int] = {}
    while len(made) < len(found):
        ready = [room for room in found if room not in made and found[room] <= set(made)]
        if not ready:
            raise ValueError(f"a circle of rooms: {', '.join(sorted(set(found) - set(made)))}")
        made |= {room: 1 + max((made[below] for below in found[room]), default=-1) for room in ready}
    return made


def needed(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that do not follow from others (transitive reduction)."""
    reach: dict[str, set[str]] = {}
    for room in sorted(found, key=floors(found).__getitem__):
        reach[room] = set().union(*({below} | reach[below] for below in found[room]))
    return {
        room: {each for each in below if not any(each in reach[other] for other in below)}
        for room, below in found.items()
    }


def drawn() -> str:
    """The picture as a mermaid flowchart, and what it counts."""
    found = arrows()
    heights = floors(found)
    rooms = {room: below - {"errors"} for room, below in found.items() if room != "errors"}
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {room}["{room}/"]' for room in sorted(rooms, key=lambda room: (-heights[room], room))]
    for room, below in sorted(needed(rooms).items()):
        lines += [f"    {room} --> {each}" for each in sorted(below)]
    counts = (
        f"{len(rooms)} rooms on {max(heights.values())} floors, {sum(map(len, rooms.values()))} arrows between them"
    )
    lines += ["```", "", f"{counts}. Drawn are those that do not follow from others;"]
    return "\n".join([*lines, "`errors.py`, which all may import, is left out."])


def with_picture(page: str) -> str:
    """The page with the picture of today between its marks."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{drawn()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_picture(PAGE.read_text()))
