"""(seed, stream, entity, counter) -> random numbers, by hashing. No state, no order: a draw depends on its address alone.

A shop of 200 customers therefore begins with the very customers of a shop of 100, and whole columns are drawn at once.
The generator is splitmix64 (Steele, Lea and Flood 2014), addressed by counter.
"""

import zlib

import numpy as np
from scipy.special import gammaincinv, ndtri

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15  # the golden ratio in 64 bits: splitmix64's increment
_HEX = np.array([f"{byte:02x}".encode() for byte in range(256)], dtype="S2")


def keys(seed: int, stream: str, entities: np.ndarray) -> np.ndarray:
    """One 64-bit key per entity; entities: whole numbers or keys. Streams are independent of one another."""
    root = int(_mix(np.array([(seed * _STEP + zlib.crc32(stream.encode()) * 0xD1342543DE82EF95) & _MASK], dtype=np.uint64))[0])
    return _mix(np.asarray(entities).astype(np.uint64) * np.uint64(_STEP) + np.uint64(root))


def children(parents: np.ndarray, counters: int | np.ndarray) -> np.ndarray:
    """The key of the counters-th child of each parent key; the two arrays broadcast."""
    return _mix(_mix(parents + np.uint64(_STEP)) + _whole(counters) * np.uint64(_STEP))


def uniform(key: np.ndarray, counter: int | np.ndarray = 0) -> np.ndarray:
    """Uniform draws in (0, 1), both ends excluded."""
    bits = _mix(key + _whole(counter) * np.uint64(_STEP) + np.uint64(_STEP))
    return np.asarray(((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def normal(key: np.ndarray, counter: int | np.ndarray = 0) -> np.ndarray:
    """Standard normal draws."""
    return np.asarray(ndtri(uniform(key, counter)))


def exponential(key: np.ndarray, counter: int | np.ndarray = 0) -> np.ndarray:
    """Exponential draws of mean 1."""
    return np.asarray(-np.log1p(-uniform(key, counter)))


def gamma(key: np.ndarray, shape: float) -> np.ndarray:
    """Gamma draws of the given shape and scale 1."""
    return np.asarray(gammaincinv(shape, uniform(key)))


def choice(key: np.ndarray, shares: np.ndarray, counter: int | np.ndarray = 0) -> np.ndarray:
    """Indices drawn with the given shares (k,), which sum to 1."""
    return np.asarray(np.searchsorted(np.cumsum(shares)[:-1], uniform(key, counter), side="right"))


def hexadecimal(key: np.ndarray) -> np.ndarray:
    """Keys as 16 lower-case hexadecimal digits, dtype S16."""
    return np.asarray(_HEX[key.astype(">u8").view(np.uint8)].view("S16"))


def _whole(counter: int | np.ndarray) -> np.ndarray:
    """At least one dimension: numpy warns of the intended overflow for scalars, not for arrays."""
    return np.atleast_1d(counter).astype(np.uint64)


def _mix(state: np.ndarray) -> np.ndarray:
    mixed = state ^ (state >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return np.asarray(mixed)
