"""Where is the answer decodable, where is it used, where is it needed, and what does the model prefer on the way?

One map on the same examples and spans: probes, activation patching, attention knockout and the logit lens over one axis
of layers, with the layers that read what is shown and those that suppress it. Also single examples, patch by patch.
"""

import dataclasses
from typing import Any

from experiments._flow_config import CONFLICT, Config
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace, in_batches

QUESTION = (
    "Where is the answer decodable, where is it used, where is it needed, and what does the model prefer on the way? "
    "Four methods run on the same examples at every layer. Decodable: can a probe read the answer there? Used: does "
    "patching the states from another image change the answer? Needed: is the answer lost when attention is cut "
    "there? Preferred: does the logit lens favour the answer or its rival? What is decodable need not be used, and "
    "what is used need not be needed."
)
COLOURS, PROBES = "scenes/colour", "probes"


def _loaded(config: Config) -> tuple[Any, ...]:
    """The model, the examples and what is cut."""
    from vlm_mech.data.fitting import fitting
    from vlm_mech.data.pairs import load_pairs
    from vlm_mech.errors import UsageError
    from vlm_mech.methods.probing.data import with_objects
    from vlm_mech.methods.visual_flow.data import cases_of, flow_scan

    if config.pages < 0 or config.every < 1:
        raise UsageError(f"pages is {config.pages} and every is {config.every}; they must be at least 0 and 1")
    pairs = load_pairs(config.data, n=config.n, split=config.split, **config.drawn)
    vlm = config.load()
    pairs = fitting(vlm, pairs, **config.fits)
    cases = cases_of(vlm, with_objects(vlm, pairs) if config.probe else pairs, config.measure)
    return vlm, cases, flow_scan(vlm, cases, window=config.window)


def plan(config: Config) -> Any:
    """What swaps and knockouts of the run will need."""
    from vlm_mech.methods.visual_flow.study import plan_flow

    how = {"measure": config.measure, "seed": config.seed, "memory": config.memory}
    return plan_flow(*_loaded(config), batch=config.batch, **how)


def run(config: Config, work: Workspace) -> Outcome:
    """The result, the map, the page of single examples, and findings made from the numbers."""
    from vlm_mech.explorer.embedding import explorer_of
    from vlm_mech.interventions.receipt import add_up
    from vlm_mech.methods.visual_flow import claims, effects, figures, findings, lenses, patch_readings, study
    from vlm_mech.results.result import Result

    vlm, cases, scan = _loaded(config)
    how = {"measure": config.measure, "seed": config.seed, "engine": config.engine, "memory": config.memory}
    for key, rows in work.batches(in_batches(len(cases), config.batch), "swaps, knockouts, lens"):
        work.keep(key, *study.flow(vlm, cases[rows], scan, **how))
    work.together()
    fitted = _probed(config, work, vlm, cases) if config.probe else None
    table, notes = work.collect()
    told = about(QUESTION, vlm, cases.pairs, add_up([each for each in notes if "own" not in each]))
    told |= {"rival": cases.rival, "probes": [each for each in notes if "own" in each], "edges": scan.about}
    result = Result("visual flow", table, study.AXES, study.metrics_of(config.measure))
    found = claims.with_claims(effects.flow_effects(result), config, vlm, cases, scan, **how)
    asked = {"bank": config.context_bank, "tuned": config.tuned_lens}
    others = lenses.lenses_asked(vlm, **asked, folder=work.partial, seed=config.seed)
    named, tables = lenses.named_by(vlm, others, seed=config.seed) if others else ({}, {})
    told |= {"named": named} if named else {}
    options = {"n": config.pages, "folder": work.partial, "measure": config.measure, "seed": config.seed}
    options |= {"lenses": others}
    told["pages"] = patch_readings.patch_readings(vlm, cases, found, fitted, **options) if config.pages else []
    result = dataclasses.replace(result, provenance=told, claims=found.claims)
    result = dataclasses.replace(result, findings=findings.findings(result, cases))
    return Outcome(result, figures.drawn(result), tables=tables, embedded=explorer_of(config, vlm, cases.pairs))


def _probed(config: Config, work: Workspace, vlm: Any, cases: Any) -> Any:
    """What probes are fitted on; their rows are kept among the batches."""
    from vlm_mech.data.pairs import load_pairs
    from vlm_mech.methods.visual_flow.probes import check_apart, probe_examples, probe_rows

    name = config.probe_data or (COLOURS if config.data == CONFLICT else None)
    n = 96 if config.n_probe is None and str(name).startswith("scenes/") else config.n_probe
    others = None if name is None else load_pairs(name, n=n, split=config.split, **config.drawn)
    check_apart(cases.pairs, others)
    options = {"folder": work.partial, "batch": config.batch}
    fitted = probe_examples(vlm, cases, others, every=config.every, seed=config.seed, **options)
    if PROBES not in work:
        work.keep(PROBES, *probe_rows(vlm, cases, fitted, measure=config.measure, **options))
    return fitted


if __name__ == "__main__":
    main(Config, run, name="visual_flow", plan=plan, fewest=2)
