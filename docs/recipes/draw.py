"""Runs recipes and writes the figure of each to docs/recipes/figures: `python docs/recipes/draw.py [NAME ...]`.

Needs the extra `export` and Chrome or Chromium. `capitals` needs a real language model, and is drawn only when named.
"""

import base64
import io
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kaleido
from PIL import Image, ImageFilter

HERE = Path(__file__).resolve().parent
NOT_RUN = ("capitals", "draw")
MOST_BYTES = 60_000


def main() -> None:
    """Draws those that are named, or all."""
    from vlm_mech.results.plotting import save_picture

    names = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NOT_RUN)
    kaleido.start_sync_server(silence_warnings=True)
    (HERE / "figures").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in names:
            began = time.perf_counter()
            figure = runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")["figure"]
            for slider in figure.layout.sliders:
                show_last(figure, slider)
            for shown in figure.layout.images:
                shown.source = smooth(shown.source)
            path = save_picture(figure, HERE / "figures" / f"{name}.png", scale=1)
            make_small(path)
            print(f"## {name}: {time.perf_counter() - began:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)
    kaleido.stop_sync_server()


def show_last(figure: Any, slider: Any) -> None:
    """Puts a slider at its last step."""
    slider.active = len(slider.steps) - 1
    for trace, visible in zip(figure.data, slider.steps[-1].args[0]["visible"], strict=True):
        trace.visible = visible


def smooth(source: str) -> str:
    """A picture in a figure without its noise, which takes most of the bytes."""
    with Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) as shown:
        flat = shown.convert("RGB").filter(ImageFilter.MedianFilter(5)).quantize(32).convert("RGB")
    flat.save(file := io.BytesIO(), "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def make_small(path: Path) -> None:
    """At most 256 colours where it needs fewer bytes, then fewer pixels, until the picture takes less than 60 kB."""
    with Image.open(path) as drawn:
        picture = drawn.convert("RGB")
    while True:
        picture.save(path, optimize=True)
        if path.stat().st_size < MOST_BYTES:
            return
        picture.quantize(256).save(path, optimize=True)
        if path.stat().st_size < MOST_BYTES:
            return
        picture = picture.resize((round(0.9 * picture.width), round(0.9 * picture.height)), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
