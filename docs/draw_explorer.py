"""Makes docs/explorer.html: one pair of generated scenes, in the two embedded models side by side.

`python docs/draw_explorer.py` takes some seconds on the CPU; the page asks nothing of a network.
"""

from pathlib import Path

from vlm_mech import VLM, explore, load_pairs

PAGE = Path(__file__).parent / "explorer.html"
MODELS = ("organism", "organism-grounded")

if __name__ == "__main__":
    pair = load_pairs("scenes/colour-conflict", n=1)[0]
    one, other = (explore(VLM.load(name), pair) for name in MODELS)
    one.beside(other).save(PAGE)
    print(f"{PAGE}: {PAGE.stat().st_size / 1000:.0f} kB")
