"""The table of families in docs/families.md, made from checks: `python -m tests.zoo.families_table` writes it."""

import contextlib
import datetime
import importlib.metadata
import warnings
from pathlib import Path

import torch

from tests.zoo import ONE_IMAGE, ZOO
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import BLOCK_POINTS, Site
from vlm_mech.checks.finding import refuse_unless_all_hold
from vlm_mech.checks.vlm import find_vlm
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Patches
from vlm_mech.interventions.specification import Ablate, Knockout
from vlm_mech.interventions.trace import generate, run
from vlm_mech.models.describe import LAYOUTS
from vlm_mech.models.vlm import VLM

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
START, END = "<!-- made by python -m tests.zoo.families_table -->", "<!-- end -->"
HEAD = (
    "family (model type)", "tower, decoder", "findings", "parity", "sites written: effect + reason",
    "cuts: tower, decoder", "eager = SDPA", "images", "image tokens", "spans besides all, image, question, last",
    "generation", "TransformerLens",
)  # fmt: skip
QUESTION = "is the red star left of the blue circle?"


def rows() -> list[tuple[str, ...]]:
    """One row a tiny model: everything in it was just tried, under both attention back ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [row(name) for name in ZOO]


def row(name: str) -> tuple[str, ...]:
    """What one family's tiny model does."""
    both = [VLM(*ZOO[name](attn, 0), check=False) for attn in ("sdpa", "eager")]
    findings = {len(refuse_unless_all_hold(vlm.name, find_vlm(vlm))) for vlm in both}
    vlm = both[0]
    prompts = [Prompt(QUESTION, picture(1, 120, 64)), Prompt("what is this?", picture(2))]
    encoded = vlm.encode(prompts)
    with torch.no_grad():
        parity = (vlm.model(**encoded.inputs).logits - run(vlm, encoded).logits).abs().max().item()
    cut = Knockout("question", "all", range(4), keep_self=True)
    one, other = (run(each, prompts, cut).last for each in both)
    agree = (one - other).abs().max() <= 1e-5 * max(1.0, one.abs().max().item())
    words = generate(vlm, encoded, cut, max_new_tokens=2, eos_token_id=None).ids.shape[1]
    text = vlm.config.get_text_config()
    towers = f"{type(vlm.model.get_submodule(vlm.family.vision.path)[0]).__name__}, {text.model_type}"
    return (
        f"{vlm.family.name} (`{vlm.family.model_type}`)",
        towers,
        ", ".join(map(str, findings)) + " hold",
        "0.0" if parity == 0.0 else f"{parity:.1g}",
        _written(vlm, encoded),
        _cut(vlm, encoded),
        "≤ 1e-5" if agree else "NO",
        "one" if name in ONE_IMAGE else _several(vlm),
        _tokens(vlm, prompts),
        _spans(encoded),
        "with edits" if words == 2 else "NO",
        _bridge(vlm),
    )


def _written(vlm: VLM, encoded) -> str:
    baseline = run(vlm, encoded)
    every = [Site("projector.in"), Site("projector.out")]
    for stream in ("vision", "llm"):
        every += [Site(f"{stream}.{point}", layer) for layer in range(vlm.n_layers(stream)) for point in BLOCK_POINTS]
    receipts = [run(vlm, encoded, Ablate(site, "image"), baseline=baseline).receipts[0] for site in every]
    moved = sum(receipt.pass_readout_change > 0 for receipt in receipts)
    explained = sum(not receipt.reaches for receipt in receipts)
    return f"{moved} + {explained} of {len(every)}"


def _cut(vlm: VLM, encoded) -> str:
    baseline, counts = run(vlm, encoded), []
    for stream, query in (("vision", "image"), ("llm", "question")):
        layers = range(vlm.n_layers(stream))
        edits = [Knockout(query, "all", layer, stream=stream, keep_self=True) for layer in layers]
        receipts = [run(vlm, encoded, edit, baseline=baseline).receipts[0] for edit in edits]
        counts.append(f"{sum(receipt.blocked_mass == 0 for receipt in receipts)} of {len(layers)}")
    return ", ".join(counts)


def _several(vlm: VLM) -> str:
    encoded = vlm.encode(Prompt(QUESTION, [picture(1, 120, 64), picture(2)]))
    run(vlm, encoded)
    return "several" if len(encoded.rows[0].images) == 2 else "NO"


def _tokens(vlm: VLM, prompts: list[Prompt]) -> str:
    views = vlm.encode(prompts[0]).rows[0].images[0].layout.views
    kind = LAYOUTS[vlm.family.layout]
    return kind if views else f"{kind}, no patches"


def _spans(encoded) -> str:
    """Spans that this prompt has, apart from all, image, question and last, which every prompt has."""
    found = []
    for name, span, place in (
        ("system", "system", "llm"), ("separator", "separator", "llm"), ("answer_prompt", "answer_prompt", "llm"),
        ("patches", Patches(((0, 0),)), "llm"), ("class", "class", "vision"),
    ):  # fmt: skip
        with contextlib.suppress(UsageError):
            encoded.cells(span, place=place)
            found.append(name)
    assert all(len(encoded.cells(span)) for span in ("all", "image", "question", "last"))
    return ", ".join(found)


def _bridge(vlm: VLM) -> str:
    try:
        vlm.to_transformer_lens()
    except UsageError:
        return "no"
    return "yes"


def table() -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *rows())]
    return "\n".join(lines)


def main() -> None:
    """Puts the table and what it was made with into the page."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("transformers", "torch", "nnsight", "transformer_lens")
    )
    today = datetime.date.today().isoformat()
    before, _, rest = PAGE.read_text().partition(START)
    after = rest.partition(END)[2]
    made = f"{table()}\n\nChecked on {today} with {versions}, CPU, float32, engine `trace`."
    PAGE.write_text(f"{before}{START}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()
