"""PyTorch's own samples of its functions (its OpInfo database), run through ours.

They need `expecttest`, which PyTorch's test library imports; without it these tests skip.
"""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")

from nki_kernels.machine.errors import NkiKernelsError
from nki_kernels.torch_ops import functional
from tests.torch_ops.test_functional import close

#: Samples per function: (equal to the original, refused in words). PyTorch 2.13. What is refused is
#: dropout, and a negative eps, which no kernel takes.
COUNTS = {
    "scaled_dot_product_attention": (13, 12), "layer_norm": (5, 1), "group_norm": (17, 4),
    "rms_norm": (5, 1), "linear": (18, 0),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COUNTS)
def test_samples_of_pytorch(name):
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = [op for op in op_db if op.name == f"nn.functional.{name}"]
    equal = refused = 0
    for sample in info.sample_inputs("cpu", torch.float32):
        try:
            got = getattr(functional, name)(sample.input, *sample.args, **sample.kwargs)
        except NkiKernelsError:
            refused += 1
            continue
        want = info.op(sample.input, *sample.args, **sample.kwargs)
        if want.numel():
            close(got, want, name, chain=1024)
        assert got.shape == want.shape
        equal += 1
    assert (equal, refused) == COUNTS[name]
