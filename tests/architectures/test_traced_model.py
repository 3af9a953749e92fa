"""What `TracedModel` declares: all that the code written for it reads, and what a contrastive model answers."""

import ast
from pathlib import Path

import pytest

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError
from vlm_mech.models.dual_encoder import DualEncoder

ROOMS = ("interventions", "checks", "sweeps", "extraction", "models")
ROOT = Path(__file__).parents[2] / "vlm_mech"
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def reads(path: Path) -> set[str]:
    """Attributes read of arguments that are annotated `TracedModel`."""
    found = set()
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef):
            given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            named = {each.arg for each in given if each.annotation and ast.unparse(each.annotation) == "TracedModel"}
            attributes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
            found |= {each.attr for each in attributes if isinstance(each.value, ast.Name) and each.value.id in named}
    return found


def test_everything_read_of_it_is_declared():
    known = {*dir(TracedModel), *TracedModel.__annotations__}
    undeclared = {str(path): missing for path in SOURCES if (missing := reads(path) - known)}
    assert undeclared == {}
    assert len(set().union(*map(reads, SOURCES))) > 20


def test_a_contrastive_model_has_no_decoder():
    encoder = DualEncoder.load("clip", check=False)
    n_layers = encoder.config.vision_config.num_hidden_layers
    assert (encoder.vision_depth, encoder.n_class_tokens, encoder.n_kept_class_tokens) == (n_layers, 1, 1)
    assert encoder.n_positions == encoder.config.text_config.max_position_embeddings
    assert (encoder.placeholder, encoder.image_token_id, encoder.taps) == (None, None, ())
    for decoders in ("llm_layers", "backend"):
        with pytest.raises(UsageError, match="is contrastive and has no stream 'llm'; its streams: vision, text"):
            getattr(encoder, decoders)
