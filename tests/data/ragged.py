"""Random examples of given lengths."""

import numpy as np

from adapters_jax.data.encoded import Encoded


def ragged(lengths, seed=0) -> Encoded:
    """Random tokens of these lengths, with a label and a vector for each example."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(
        tokens={
            'input_ids': rng.integers(5, 999, offsets[-1], dtype=np.int32),
            'token_type_ids': rng.integers(0, 2, offsets[-1], dtype=np.int32),
        },
        offsets=offsets,
        examples={
            'label': rng.integers(1, 9, len(lengths), dtype=np.int32),
            'target': rng.normal(size=(len(lengths), 3)).astype(np.float32),
        },
    )
