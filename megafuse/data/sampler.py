"""Which groups an optimizer step trains on: a pure function of the step, so that resuming needs no state."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BatchSampler:
    """Global batches of a data set: one permutation an epoch, the last batch of an epoch may be smaller."""

    groups: int
    batch_size: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data set."""
        return -(-self.groups // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.epochs

    def batch(self, step: int) -> np.ndarray:
        """Group indices of step `step` (from 0). [<= batch_size] int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.groups)
        return order[place * self.batch_size : (place + 1) * self.batch_size]
