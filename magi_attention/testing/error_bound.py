"""The error that a low-precision result may have, derived and not tuned."""

import torch


def assert_close_to_oracle(actual: torch.Tensor, oracle: torch.Tensor, low_precision: torch.Tensor) -> None:
    """Assert that ``actual`` is as good as its precision allows, see :func:`beyond_bound`."""
    complaint = beyond_bound(actual, oracle, low_precision)
    assert complaint is None, complaint


def beyond_bound(actual: torch.Tensor, oracle: torch.Tensor, low_precision: torch.Tensor) -> str | None:
    """How ``actual`` is worse than its precision allows; None when it is not.

    Its largest error may be twice that of the plain dense formula in the same precision, on the same inputs, plus one
    rounding of the largest value.

    Args:
        actual: The result to judge.
        oracle: The float64 result.
        low_precision: The plain formula's result in the precision of the inputs.
    """
    finite = torch.isfinite(oracle)
    if not torch.equal(torch.isfinite(actual), finite):
        return "not finite where the oracle is, and only there"
    if not torch.equal(actual[~finite].double(), oracle[~finite].double()):
        return "infinite with the wrong sign, or not a number"
    if not finite.any():
        return None
    exact = oracle[finite].double()
    error = (actual[finite].double() - exact).abs().max()
    plain_error = (low_precision[finite].double() - exact).abs().max()
    rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs().max()
    if error <= 2 * plain_error + rounding:
        return None
    return f"error {error:.2e}, plain formula {plain_error:.2e}, rounding {rounding:.2e}"
