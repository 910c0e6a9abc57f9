"""Counter-based random numbers: known values, range, and that nothing but key and counter decides them."""

from __future__ import annotations

import torch

from specontext.kernels.counter_random import combine_keys, counter_uniform, logical_shift, mix

MASK = (1 << 64) - 1
# SplitMix64 started at 1234567, as published with its reference implementation; and the first two outputs from 0.
KNOWN = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
KNOWN_FROM_ZERO = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def as_uniform(bits: int) -> float:
    return ((bits >> 12) + 0.5) / 2**52


def plain_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def test_known_values() -> None:
    for start, outputs in ((1234567, KNOWN), (0, KNOWN_FROM_ZERO)):
        numbers = counter_uniform(torch.tensor(start), torch.arange(len(outputs)))
        assert numbers.tolist() == [as_uniform(bits) for bits in outputs]


def test_mix_and_shift_equal_unsigned_arithmetic() -> None:
    values = [0, 1, 2**63, MASK, 0x123456789ABCDEF0, 2**63 - 1, 0xDEADBEEFCAFEBABE]
    tensor = torch.tensor([signed(v) for v in values])
    assert mix(tensor).tolist() == [signed(plain_mix(v)) for v in values]
    assert logical_shift(tensor, 12).tolist() == [v >> 12 for v in values]


def test_numbers_lie_strictly_between_zero_and_one_and_are_spread_evenly() -> None:
    keys = torch.tensor([0, -1, 2**63 - 1, -(2**63), 17])[:, None]
    numbers = counter_uniform(keys, torch.arange(20000))
    assert numbers.dtype == torch.float64 and (numbers > 0).all() and (numbers < 1).all()
    shares = torch.stack([row.histc(10, 0, 1) for row in numbers]) / 20000
    assert (shares - 0.1).abs().max() < 0.012  # over five standard deviations
    assert numbers.flatten().unique().numel() == numbers.numel()


def test_keys_and_counters_are_independent() -> None:
    numbers = counter_uniform(torch.arange(4)[:, None], torch.arange(20000))
    sequences = [*numbers, numbers[0].roll(1), numbers[1].roll(1)]
    correlation = torch.corrcoef(torch.stack(sequences)) - torch.eye(6)
    assert correlation.abs().max() < 0.04


def test_company_does_not_change_a_number() -> None:
    keys, counters = torch.tensor([[5], [-7], [11]]), torch.arange(9)
    together = counter_uniform(keys, counters)
    for r, key in enumerate(keys):
        for counter in counters:
            assert counter_uniform(key, counter).item() == together[r, counter].item()


def test_combined_keys_depend_on_every_part_and_their_order() -> None:
    parts = torch.cartesian_prod(torch.arange(12), torch.arange(12), torch.arange(12))
    keys = combine_keys(tuple(parts.T))
    assert keys.unique().numel() == len(parts)
    alone = combine_keys((torch.tensor(3), torch.tensor(9), torch.tensor(4)))
    assert keys[(parts == torch.tensor([3, 9, 4])).all(1)].item() == alone.item()
    assert combine_keys((torch.arange(3)[:, None], torch.arange(5))).shape == (3, 5)
