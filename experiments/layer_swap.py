"""At which layer, and through which tokens, does the answer come to depend on the image?

Activation patching (causal tracing, interchange intervention): each question is run on an image with hidden states from
its counterfactual, layer by layer and span by span, in both directions. Measures the recovered fraction of the way to
the other answer. With `--swap weights`, decoder blocks are patched from a fine-tuned checkpoint instead (after arXiv
2606.06890).
"""

from typing import Any

from experiments._swap_config import Config
from experiments._weight_swap import swap_weights
from vlm_mech.errors import UsageError
from vlm_mech.runs.configuration import check_n
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace, in_batches


def plan(config: Config) -> Any:
    """What the run will need."""
    from vlm_mech.methods.layer_swap.study import plan_swap
    from vlm_mech.sweeps.generated_answers import part_of

    if config.swap == "weights":
        raise UsageError("--dry-run covers --swap state only; patching weights takes one pass per hybrid model")
    *what, directions, controls = _loaded(config)
    how = {"measure": config.measure, "part": part_of(config), "batch": config.batch, "memory": config.memory}
    how |= {"n_controls": 0 if controls is None else len(controls.names)}
    return plan_swap(*what, directions=directions, **how)


def run(config: Config, work: Workspace) -> Outcome:
    """The result, its figures, and example images."""
    if config.swap == "weights" and config.explore:
        raise UsageError("--explore shows swaps of states, token by token; leave it out with --swap weights")
    return swap_weights(config, work) if config.swap == "weights" else _swap_states(config, work)


def _loaded(config: Config) -> tuple[Any, ...]:
    """The model, the pairs, and what is swapped: sites, spans, directions, and the donors of controls."""
    from vlm_mech.data.examples import check_made, load_examples
    from vlm_mech.data.fitting import fitting
    from vlm_mech.data.pairs import DIRECTIONS
    from vlm_mech.methods.layer_swap.controls import donors_of
    from vlm_mech.methods.layer_swap.data import default_spans, swap_sites

    check_n(config.n, 2)
    check_made(config.data, config.counterfactual, "a swap of states")
    how = {"n": config.n, "split": config.split, "counterfactual": config.counterfactual}
    pairs = load_examples(config.data or "scenes/colour", **how, **config.drawn)
    vlm = config.load()
    directions = DIRECTIONS if config.direction == "both" else (config.direction,)
    sites = swap_sites(vlm, config.site, config.point)
    pairs = fitting(vlm, pairs, **config.fits)
    spans = config.spans or default_spans(vlm, config.site, pairs=pairs, measure=config.measure)
    controls = donors_of(vlm, pairs, config.control, directions=directions, seed=config.seed)
    return vlm, pairs, sites, spans, directions, controls


def _swap_states(config: Config, work: Workspace) -> Outcome:
    """The result, its heatmap and line figure, and example images."""
    from vlm_mech.data.pairs import pictures
    from vlm_mech.explorer.embedding import explorer_of
    from vlm_mech.interventions.receipt import add_up, summarise
    from vlm_mech.methods.layer_swap.figures import drawn
    from vlm_mech.methods.layer_swap.layer_swap import question_of, swap_result, told, with_claims
    from vlm_mech.methods.layer_swap.study import swap_states
    from vlm_mech.results.generated_answers import examples
    from vlm_mech.sweeps.generated_answers import part_of

    vlm, pairs, sites, spans, directions, controls = _loaded(config)
    how = {"directions": directions, "only_correct": not config.all, "measure": config.measure, "controls": controls}
    how |= {"part": part_of(config), "engine": config.engine, "memory": config.memory}
    for key, rows in work.batches(in_batches(len(pairs), config.batch), "swaps"):
        table, receipts = swap_states(vlm, pairs[rows], sites, spans, **how)
        work.keep(key, table, summarise(receipts))
    table, receipts = work.collect()
    provenance = about(question_of(pairs), vlm, pairs, add_up(receipts))
    result = swap_result(config.site, table, provenance, config.measure, controls)
    result = told(with_claims(result, config, vlm, pairs, sites, spans, how), pairs)
    said = examples(result.table, result.axes, {pair.id: pair.question for pair in pairs})
    return Outcome(result, drawn(result), pictures(pairs), said=said, embedded=explorer_of(config, vlm, pairs))


if __name__ == "__main__":
    main(Config, run, name="layer_swap", plan=plan)
