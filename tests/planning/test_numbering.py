"""Ranks are numbered along the sequence: the shares stay, and fewer rows cross to other nodes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from magi_attention.mask import AttnMask, builders
from magi_attention.planning.chunking import ChunkWork
from magi_attention.planning.locality import locality
from magi_attention.planning.numbering import number_along_sequence
from magi_attention.testing.strategies import masks

from .test_assignment import TOLERANCE, packed_documents, work_of


def centre(work: ChunkWork, chunks: np.ndarray) -> float:
    """The mean place of the cells of some chunks; ranks without any come first."""
    areas = work.areas[chunks]
    return float(np.average(chunks, weights=areas)) if areas.any() else 0.0


@settings(max_examples=100, deadline=None)
@given(masks(max_seqlen=80, square=True), st.integers(1, 6), st.integers(1, 8), st.randoms())
def test_shares_stay_and_centres_ascend(mask: AttnMask, cp_size: int, chunk_size: int, random) -> None:
    work = work_of(mask, cp_size, chunk_size)
    owner = np.repeat(np.arange(cp_size), work.num_chunks // cp_size)
    random.shuffle(shuffled := owner.tolist())
    owner = np.array(shuffled)
    numbered = number_along_sequence(work, owner, cp_size)
    shares, new_shares = ([np.flatnonzero(x == rank) for rank in range(cp_size)] for x in (owner, numbered))
    assert sorted(share.tolist() for share in shares) == sorted(share.tolist() for share in new_shares)
    assert (np.diff([centre(work, share) for share in new_shares]) >= -1e-9).all()


def test_ranks_of_a_document_share_a_node() -> None:
    """64 ranks in nodes of 8: rows that cross, each once to every node that needs it, against numbers at random."""
    ratios = []
    for seed in range(3):
        work = work_of(builders.varlen(packed_documents(1 << 19, seed), causal=True), 64, 512)
        owner = locality(work, 64, TOLERANCE)
        at_random = np.random.default_rng(seed).permutation(64)[owner]
        assert work.rows_moved(owner) == work.rows_moved(at_random)
        ratios.append(work.rows_moved(owner // 8) / work.rows_moved(at_random // 8))
    assert max(ratios) < 0.65 and np.mean(ratios) < 0.55
