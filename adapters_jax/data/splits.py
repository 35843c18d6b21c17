"""Cuts held-out splits from one pool without letting a text stand on both sides.

Real data repeats itself: the same question twice, one premise under three hypotheses. Cut at
random, some held-out texts have then been trained on, and the score is too good. Rows that share a
text are therefore kept together, and classes are kept in proportion.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import datasets
import numpy as np
from jaxtyping import Int64

from adapters_jax.lazy import Functions

sparse, csgraph = Functions('scipy.sparse'), Functions('scipy.sparse.csgraph')
selection = Functions('sklearn.model_selection')
LARGEST_GROUP = 0.2  # of all rows; beyond it, keeping every shared text together splits nothing
INPUTS = ('text_a', 'text_b', 'question', 'context', 'choices', 'tokens', 'digest')  # of an example
FEW = 0.05  # of a split, as real sets have in common: no more than that is worth a warning

_LOG = logging.getLogger(__name__)


def split_off(
    pool: datasets.Dataset,
    fractions: dict[str, float],
    seed: int,
    groups: Int64[np.ndarray, ' N'] | None = None,
) -> dict[str, datasets.Dataset]:
    """Cuts the named fractions off `pool`; what is left is 'train'.

    fractions: split name -> share of all groups, e.g. {'validation': 0.1, 'test': 0.1}. groups: a
    number for each row; rows of one group stay together (None: those that share a text). Each split
    keeps the order of the pool, and depends on the rows and the seed alone. Classes (labels that
    are str, or of a list of them, or of a sentence's tags, the rarest) keep their proportions as
    far as their sizes allow, and one example each in 'train'.
    Raises ValueError where a split would be empty.
    """
    fractions = {name: share for name, share in fractions.items() if share}
    if min(fractions.values(), default=0) < 0 or sum(fractions.values()) >= 1:
        raise ValueError(f'data.split_fractions is {fractions}; it needs shares that sum below 1.')
    if groups is None:
        pair = 'text_b' in pool.column_names
        groups = same_text_groups(pool['text_a'][:], pool['text_b'][:] if pair else None)
    _, first_row, numbers = np.unique(groups, return_index=True, return_inverse=True)
    classes = _classes(pool, first_row, numbers)
    left = np.arange(len(first_row))
    members = {}
    for name, share in fractions.items():
        size = round(share * len(first_row))
        held, left = _hold_out(left, classes, size, np.random.default_rng([seed, len(members)]))
        if not held.size:
            many = len(np.unique(classes))
            kept = f', of {many} classes, which keep one each' if many > 1 else ''
            raise ValueError(
                f'{len(pool)} rows ({len(first_row)} with texts of their own{kept}) are too few to '
                f'cut {share:.0%} off as {name}; give a file for it, or change '
                'data.split_fractions.'
            )
        members[name] = held
    members = {'train': left, **members}
    return {k: pool.select(np.flatnonzero(np.isin(groups, held))) for k, held in members.items()}


def same_text_groups(texts_a: Sequence[str], texts_b: Sequence[str] | None) -> np.ndarray:
    """A group number for each row, [N]: rows that share a text, directly or by others, share it.

    Texts that differ only in case or white space count as the same. Where one text (a fixed
    question, say) ties most rows together, only rows equal in both texts are grouped.
    """
    keys = {}

    def numbered(texts: Sequence[str]) -> np.ndarray:
        return np.array(
            [keys.setdefault(' '.join(text.casefold().split()), len(keys)) for text in texts]
        )

    first = numbered(texts_a)
    if texts_b is None:
        return first
    second = numbered(texts_b)
    edges = sparse.coo_matrix((np.ones(len(first), bool), (first, second)), shape=(len(keys),) * 2)
    groups = csgraph.connected_components(edges, directed=False)[1][first]
    groups = np.unique(groups, return_inverse=True)[1]
    if np.bincount(groups).max() <= LARGEST_GROUP * len(groups):
        return groups
    _LOG.warning(
        'One text ties more than %.0f %% of the rows together: only rows that are equal in both '
        'texts are kept in one split.',
        100 * LARGEST_GROUP,
    )
    return np.unique(first * np.int64(len(keys)) + second, return_inverse=True)[1]


def tell_shared(found: Mapping[str, datasets.Dataset]) -> None:
    """Tell how many held-out examples are in the training split, too, whatever their labels."""
    known = set(_examples(found['train'])) if 'train' in found else set()
    for name, split in found.items():
        shared = sum(example in known for example in _examples(split)) if name != 'train' else 0
        if shared:
            _LOG.log(
                logging.WARNING if shared > FEW * len(split) else logging.INFO,
                '%d of %d examples of %s (%.1f %%) are training examples, too: scores of these say '
                'what was learnt by heart.',
                *(shared, len(split), name, 100 * shared / len(split)),
            )


def _examples(rows: datasets.Dataset) -> Iterator[tuple[str | tuple[str, ...], ...]]:
    """Yield what a model is given of each row; of recordings nothing."""
    given = [rows[name][:] for name in INPUTS if name in rows.column_names]
    for row in zip(*given, strict=True):
        yield tuple(x if isinstance(x, str) else tuple(x) for x in row)


def _classes(pool: datasets.Dataset, rows: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the class of each group: of its first row, unless another's would then be of none."""
    key = next((key for key in ('label', 'tags') if key in pool.column_names), None)
    labels = pool[key][:] if key else []
    if labels and isinstance(labels[0], list):
        labels = _rarest(labels)
    if not labels or not isinstance(labels[0], str):
        return np.zeros(len(rows), np.int64)
    every = np.array(labels)
    found = every[rows]
    names, first = np.unique(every, return_index=True)
    lost = first[~np.isin(names, found)]
    found[groups[lost]] = every[lost]
    return np.unique(found, return_inverse=True)[1]


def _rarest(sets: Sequence[Sequence[str]]) -> list[str]:
    """For each set of classes the one that the fewest rows have, which is the easiest to lose."""
    counts = Counter(name for names in sets for name in names)
    return [min(names, key=lambda name: (counts[name], name), default='') for names in sets]


def _hold_out(
    groups: np.ndarray, classes: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Divides group numbers into `size` held-out ones and the rest."""
    shuffled = rng.permutation(groups)
    # The first of each class stays: a class that is only held out could never be learned.
    anchors = shuffled[np.unique(classes[shuffled], return_index=True)[1]]
    free = np.setdiff1d(groups, anchors)
    held = free
    if size < len(free):
        held = _draw(free, classes, size, int(rng.integers(2**31)))
    return held, np.setdiff1d(groups, held)


def _draw(free: np.ndarray, classes: np.ndarray, size: int, seed: int) -> np.ndarray:
    if not size:
        return free[:0]
    kinds, counts = np.unique(classes[free], return_counts=True)
    common = free[np.isin(classes[free], kinds[counts > 1])]
    # scikit-learn stratifies only with at least one place for each class on both sides.
    if size >= len(kinds) and len(common) - size >= len(kinds):
        return selection.train_test_split(
            common, test_size=size, stratify=classes[common], random_state=seed
        )[1]
    return selection.train_test_split(free, test_size=size, random_state=seed)[1]
