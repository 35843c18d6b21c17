"""How often each task comes when several are trained at once: shares, and counts that meet them.

A share is a real number and a batch has whole rows. The counts of an epoch are apportioned with
what was left over of the epochs before, and laid out so that the rows of every beginning of an
epoch, not of the whole only, are those of the shares to within one row of each task.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float64, Int64

SCHEDULES = ('proportional', 'uniform', 'temperature', 'annealed', 'shares')
ANNEALED = 0.8  # how far the exponent falls from 1 (Stickland & Murray 2019, section 4.1)


@dataclasses.dataclass(frozen=True)
class Mixing:
    """The share of each task among the examples of an epoch.

    schedule: 'proportional' to the tasks' sizes; 'uniform'; 'temperature': to the sizes to the
        power 1 / temperature; 'annealed': to a power that falls from 1 in the first epoch to 0.2 in
        the last one (Stickland & Murray 2019, section 4.1); or 'shares', to the numbers given.
    epochs: how many there are, for 'annealed'; later ones are as the last.
    steps: batches of an epoch; 0: as many as have room for every task's examples once.

    Raises ValueError for values out of range.
    """

    schedule: str = 'proportional'
    temperature: float = 2.0
    shares: tuple[float, ...] = ()
    epochs: int = 1
    steps: int = 0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f'mixing.schedule is {self.schedule!r}; expected one of {", ".join(SCHEDULES)}'
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f'mixing.temperature is {self.temperature}; expected more than 0')
        if self.steps < 0:
            raise ValueError(f'mixing.steps is {self.steps}; expected 0 or more')
        if self.schedule == 'shares' and not all(0 < share < math.inf for share in self.shares):
            raise ValueError(f'the shares of the tasks are {self.shares}; each must be above 0')

    def of(self, sizes: Int64[np.ndarray, ' A'], epoch: int) -> Float64[np.ndarray, ' A']:
        """The shares of tasks of these sizes in an epoch, from 0; their sum is 1."""
        if self.schedule == 'shares':
            weights = np.asarray(self.shares, np.float64)
        else:
            # Over the largest: no power of a size overflows, and equal sizes are exactly equal.
            weights = (sizes / sizes.max()) ** self._exponent(epoch)
        return weights / weights.sum()

    def _exponent(self, epoch: int) -> float:
        if self.schedule == 'annealed':
            return 1 - ANNEALED * min(epoch / max(self.epochs - 1, 1), 1)
        return {'proportional': 1.0, 'uniform': 0.0}.get(self.schedule, 1 / self.temperature)

    def average(self, sizes: Int64[np.ndarray, ' A']) -> Float64[np.ndarray, ' A']:
        """The shares over all epochs."""
        epochs = self.epochs if self.schedule == 'annealed' else 1
        return np.mean([self.of(sizes, epoch) for epoch in range(epochs)], axis=0)


def apportion(quotas: Float64[np.ndarray, ' A'], total: int) -> Int64[np.ndarray, ' A']:
    """Whole numbers with the sum `total`, next to quotas with that sum (largest remainders).

    A quota may be negative, of a task that had too much before; its number is then 0.
    """
    counts = np.maximum(np.floor(quotas), 0).astype(np.int64)
    while (missing := total - int(counts.sum())) > 0:
        counts[np.argsort(counts - quotas, kind='stable')[:missing]] += 1
    while counts.sum() > total:
        counts[np.argmax(np.where(counts > 0, counts - quotas, -np.inf))] -= 1
    return counts


def interleave(counts: Int64[np.ndarray, ' A']) -> Int64[np.ndarray, ' H']:
    """An order of H = sum(counts) tasks, each as often as counted, spread out evenly.

    Among the first h there are h * counts / H of each task, give or take less than one
    (Tijdeman 1980, The chairman assignment problem, Discrete Mathematics 32): of the tasks that are
    due, the one comes next that would first be late.
    """
    tasks = [int(task) for task in np.flatnonzero(counts)]
    total, slack = int(counts.sum()), max(2 * len(tasks) - 2, 1)
    each = {task: slack * int(counts[task]) for task in tasks}
    due = {task: -(-total // each[task]) for task in tasks}
    late = {task: (slack - 1) * total // each[task] for task in tasks}
    had = dict.fromkeys(tasks, 0)
    order = np.empty(total, np.int64)
    for place in range(1, total + 1):
        task = min((task for task in tasks if due[task] <= place), key=late.__getitem__)
        order[place - 1] = task
        had[task] += 1
        due[task] = -(-(1 + slack * had[task]) * total // each[task])
        late[task] = ((1 + had[task]) * slack - 1) * total // each[task]
    return order
