"""Bank conflicts of the CUDA decoder's look-ups, simulated."""

import count_conflicts
import numpy as np
from payloads import random_weights

from df11_jax import compress


def test_cycles():
    lanes = np.arange(32)
    same_bank = 32 * lanes
    words = np.stack([lanes, 0 * lanes, same_bank, same_bank % 64, lanes + 5, lanes])
    active = np.ones_like(words, bool)
    active[4], active[5] = False, lanes < 3
    cycles = count_conflicts.count_cycles(words, active)
    # One word a bank; one word for all; all words of a bank; two words of a bank; nothing.
    np.testing.assert_array_equal(cycles, [1, 1, 32, 2, 0, 1])


def test_look_ups_of_real_payloads():
    # 2 x 2 whole chunks, and others that do not count.
    found = count_conflicts.simulate(compress(random_weights((272, 128))))
    assert len(found.lookups) == 4 * 128
    assert found.lookups.min() >= 1
    # Like words at random, within what so few of them say.
    assert 3 < found.lookups.mean() < 4.5
    assert len(found.refills) <= 4 * 64
    assert 1 <= found.refills.mean() < 3


def test_copies_of_the_table():
    array = compress(random_weights((256, 128)))
    cycles = [count_conflicts.simulate(array, copies).lookups.mean() for copies in (1, 4, 32)]
    assert cycles[0] > cycles[1] > cycles[2] == 1  # each lane has a copy of its own


def test_raw_chunks_have_no_look_ups():
    noise = np.random.default_rng(0).integers(0, 65536, (128, 64), dtype=np.uint16)
    found = count_conflicts.simulate(compress(noise.view(random_weights(()).dtype)))
    assert found.lookups.size == found.refills.size == 0
