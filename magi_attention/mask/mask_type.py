"""The four published mask types of a slice."""

from contextlib import suppress
from enum import Enum
from typing import SupportsIndex

from magi_attention.mask.integers import as_int


class AttnMaskType(Enum):
    """How a slice masks its rectangle of queries and keys.

    The integer codes of ``attn_type_map`` are ``FULL`` 0, ``CAUSAL`` 1, ``INVCAUSAL`` 2 and ``BICAUSAL`` 3.

    * ``FULL``: every query sees every key.
    * ``CAUSAL``: aligned at the bottom right: the last query sees every key, each one before it one fewer.
    * ``INVCAUSAL``: aligned at the top left: the first query sees every key, each one after it one fewer.
    * ``BICAUSAL``: both of the above at once: a diagonal band, the shape of a sliding window.
    """

    FULL = "full"
    CAUSAL = "causal"
    INVCAUSAL = "inv_causal"
    BICAUSAL = "bi_causal"

    @classmethod
    def parse(cls, value: "AttnMaskType | str | SupportsIndex") -> "AttnMaskType":
        """Read a mask type from an enum member, its string, or its integer code.

        Raises:
            ValueError: If ``value`` is none of them.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            if value.lower() in _BY_NAME:
                return _BY_NAME[value.lower()]
        else:
            with suppress(TypeError):
                code = as_int(value, "attn_mask_type")
                if 0 <= code < len(_BY_CODE):
                    return _BY_CODE[code]
        names = ", ".join(repr(member.value) for member in cls)
        raise ValueError(f"unknown attn_mask_type {value!r}: use an AttnMaskType, one of {names}, or a code 0 to 3")

    def to_int_type(self) -> int:
        """The integer code used in ``attn_type_map``."""
        return _BY_CODE.index(self)

    @classmethod
    def from_int_type(cls, code: int) -> "AttnMaskType":
        """The mask type of an ``attn_type_map`` code.

        Raises:
            TypeError: If ``code`` is no integer.
            ValueError: If it is not 0, 1, 2 or 3.
        """
        return cls.parse(as_int(code, "code"))


_BY_CODE = list(AttnMaskType)
_BY_NAME = {member.value: member for member in AttnMaskType}
