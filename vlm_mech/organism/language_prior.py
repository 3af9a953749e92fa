"""What a model says of usual colours when it is shown nothing: `python -m vlm_mech.organism.language_prior smollm2`.

Asked is "what colour is the banana?" without a picture, for every kind with a usual colour and every kind without.
A model that likes "red" whatever is asked has no prior of tomatoes: from each colour's log-probability its mean over
all kinds is taken off.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from vlm_mech.data.scenes import COLOURS, PRIORS, SHAPES
from vlm_mech.errors import UsageError, one_line_errors
from vlm_mech.models.loading import locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

KINDS = (*PRIORS, *SHAPES)


@dataclass(frozen=True)
class UsualColour:
    """A kind, its usual colour, how far that leads the best other colour (nats), as said and minus the preference."""

    kind: str
    colour: str
    lead: float
    own_lead: float
    said: str
    """The likeliest of the eight colours."""


def usual_colours(model: "PreTrainedModel", processor: "ProcessorMixin") -> list[UsualColour]:
    """Each kind with a usual colour, and by how much the model prefers that colour unseen."""
    asked = torch.stack([colour_logprobs(model, processor, kind) for kind in KINDS])
    own = asked - asked.mean(0)
    names, found = list(COLOURS), []
    for row, (kind, colour) in enumerate(PRIORS.items()):
        leads = [_lead(table[row], names.index(colour)) for table in (asked, own)]
        found.append(UsualColour(kind, colour, *leads, said=names[int(asked[row].argmax())]))
    return found


def _lead(values: Float[Tensor, " colour"], at: int) -> float:
    return float(values[at] - torch.cat([values[:at], values[at + 1 :]]).max())


@torch.no_grad()
def colour_logprobs(model: "PreTrainedModel", processor: "ProcessorMixin", kind: str) -> Float[Tensor, " colour"]:
    """Log-probability of each colour, of all its tokens and the end, as the answer about a kind without a picture."""
    tokenizer = processor.tokenizer
    chat = [{"role": "user", "content": [{"type": "text", "text": f"what colour is the {kind}?"}]}]
    text = str(processor.apply_chat_template(chat, add_generation_prompt=True))
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = []
    for colour in COLOURS:
        answer = [*tokenizer(colour, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].float()
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(found)


def main(model: tyro.conf.Positional[str]) -> None:
    """Prints each kind with its usual colour, what is said of it, and both leads in nats.

    Args:
        model: `smollm2`, `organism-smol`, or the folder of another such model.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(locate(model))
    if not folder.is_dir():
        raise UsageError(f"model {model!r} is neither a folder nor a model made here")
    opened = AutoModelForImageTextToText.from_pretrained(folder)
    for each in usual_colours(opened, AutoProcessor.from_pretrained(folder)):
        told = f"lead {each.lead:+.2f}, preference off {each.own_lead:+.2f}"
        print(f"{each.kind}: usually {each.colour}, said {each.said}, {told}")


if __name__ == "__main__":
    with one_line_errors():
        tyro.cli(main, description=__doc__)
