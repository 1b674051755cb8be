"""KeyGrads: gradients of a rank's keys and values, added up from its own and from parts that come home."""

import torch

from magi_attention.comm.exchange import Exchange, Reduce


class KeyGrads:
    """Sums of ``(dk, dv)``. A part is on its way home while the next one is computed.

    Args:
        own: What the rank's own queries give; all is added to it in the end.
        apart: Whether what comes home must not wait for ``own`` to be computed.
    """

    def __init__(self, own: tuple[torch.Tensor, torch.Tensor], apart: bool) -> None:
        self._own = own
        self._arrived = tuple(torch.zeros_like(x) for x in own) if apart else own
        self._homeward: Reduce | None = None

    @property
    def under_way(self) -> bool:
        """Whether a part is on its way home."""
        return self._homeward is not None

    def send_home(
        self, part: tuple[torch.Tensor, torch.Tensor], exchange: Exchange, wire_dtype: torch.dtype | None
    ) -> None:
        """Start sending a stage's part to the owners of its keys, and take in what was sent before it."""
        previous, self._homeward = self._homeward, exchange.reduce(part, wire_dtype)
        if previous is not None:
            previous.wait(into=self._arrived)

    def take_in(self) -> None:
        """Take in what was sent last."""
        if self._homeward is not None:
            self._homeward.wait(into=self._arrived)

    def total(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums, when all was taken in."""
        if self._arrived is not self._own:
            for grad, more in zip(self._own, self._arrived, strict=True):
                grad.add_(more)
        return self._own
