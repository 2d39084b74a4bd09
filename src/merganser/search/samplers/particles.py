"""Particles that move through the free values: drawn to the best places, and pushed away from the worst.

Source: the succession step of GENOME+ (Zhang et al. 2025, arXiv 2503.01155, and its published code), here over the free values of a
recipe, and not over the weights of adapters; the random factors are drawn anew for each step and dimension, and the step decays once in a
generation. Crossover, mutation and selection of GENOME are the sampler `genome`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..space.dimension import Dimension
from .own import Past, chance

_PARTICLES = 8
_INERTIA, _OWN, _ALL, _WORST = 0.2, 0.2, 0.2, 0.1
_STEP, _DECAY = 0.5, 0.95


def propose_particle(
    dimensions: Sequence[Dimension], past: Mapping[int, Past], number: int, seed: int
) -> Sequence[float]:
    """Return the next place: as `Propose`.

    Trial n is particle n mod 8. With x its place, v its last move divided by the step, p its best place, g the best and w the
    worst of all:
        v' = (0.2 r0 v + 0.2 r1 (p - x) + 0.2 r2 (g - x) - 0.1 r3 (w - x)) / (0.2 r0 + 0.2 r1 + 0.2 r2 + 0.1 r3)
        x' = x + 0.5 * 0.95^generation * v'
    """
    particle, generation = number % _PARTICLES, number // _PARTICLES
    random = chance(seed, number)
    own = [past[n] for n in range(particle, number, _PARTICLES) if n in past]
    # only whole generations count, so that the places of one do not depend on the order within it
    scored = [t for t in past.values() if t.number < generation * _PARTICLES and t.value is not None]
    if not own or not scored:
        return [random.random() for _ in dimensions]

    def worth(trial: Past) -> float:
        return float("-inf") if trial.value is None else trial.value

    here = own[-1].at
    before = own[-2].at if len(own) > 1 else here
    mine, best, worst = max(own, key=worth).at, max(scored, key=worth).at, min(scored, key=worth).at
    last, step = _STEP * _DECAY ** (generation - 1), _STEP * _DECAY**generation
    found = []
    for x, old, p, g, w in zip(here, before, mine, best, worst, strict=True):
        a, b, c, d = (f * random.random() for f in (_INERTIA, _OWN, _ALL, _WORST))
        move = (a * (x - old) / last + b * (p - x) + c * (g - x) - d * (w - x)) / (a + b + c + d)
        found.append(min(max(x + step * move, 0.0), 1.0))
    return found
