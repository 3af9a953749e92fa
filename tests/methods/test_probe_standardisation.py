"""Features in the span of the training examples: nothing that can be learned is lost."""

import torch

from vlm_mech.methods.probing.standardisation import fit, rotation


def test_coordinates_in_the_span_keep_every_product():
    """More features than examples, one feature constant and one example there twice, so that the span is smaller."""
    states = 5 + 3 * torch.randn(50, 90, generator=torch.Generator().manual_seed(0))
    states[:, 7] = 3.0
    states[11] = states[12]
    rows = torch.arange(0, 40)
    scaling, own = fit(states, rows, rotation(44))
    standard = scaling.standard(states).double()
    assert own.shape == (50, 44) and bool((standard[:, 7] == 0).all())
    products = own.double() @ own[:40].double().T
    assert torch.allclose(products, standard @ standard[:40].T, atol=2e-3 * float(products.diagonal().mean()))
    assert torch.allclose(scaling(states[45:]), own[45:], atol=1e-3)
    assert int(torch.linalg.matrix_rank(own[:40], rtol=1e-3)) == 38
    # Coordinates are alike, as Adam moves all of them alike.
    sizes = own[:40].std(0)
    assert float(sizes.max() / sizes.min()) < 3
