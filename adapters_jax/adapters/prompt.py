"""Prompt tuning (Lester et al. 2021): trained vectors among those of the text, and nothing else.

The libraries differ in where they put them. `adapters` does so after the embedding LayerNorm: the
prompt has neither positions nor a LayerNorm, and the text keeps its positions. `peft` does so
before both: the prompt takes the first positions and the text those after it. The option `site`
tells the two apart.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray, Shaped

from adapters_jax.adapters.method import At, Inserted, Method
from adapters_jax.params import Tree
from adapters_jax.sites import Dimensions, Stream, Words


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Prompt tuning as `adapters` or as `peft` has it.

    There is no identity to start from: a fresh prompt already takes a share of the attention. A
    head that takes the first token's state takes that of the first vector in the row, the prompt's
    with `combine='prefix'`, as in both libraries.
    """

    architecture: ClassVar[str] = 'prompt_tuning'

    prompt_length: int = 10  # P
    # Uniform random numbers, the words of a text, or random words (Lester et al. 2021, sec. 3.2).
    prompt_init: Literal['random_uniform', 'from_string', 'vocabulary'] = 'random_uniform'
    prompt_init_text: str | None = None  # of 'from_string'; repeated or cut to P tokens
    prompt_init_ids: tuple[int, ...] | None = None  # its tokens; found by `prepare`
    random_uniform_scale: float = 0.5  # of 'random_uniform': the largest absolute value
    combine: Literal['prefix', 'prefix_after_bos'] = 'prefix'  # before or after the first token
    site: Literal['embeddings', 'words'] = 'embeddings'  # after the LayerNorm, before positions
    init_weights_seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range, and a text that is missing."""
        super().__post_init__()
        self.require(
            self.prompt_length >= 1, f'prompt_length={self.prompt_length} is not at least 1'
        )
        self.require(
            self.random_uniform_scale >= 0,
            f'random_uniform_scale={self.random_uniform_scale} is negative',
        )
        given = self.prompt_init_text is not None or self.prompt_init_ids is not None
        self.require(
            given or self.prompt_init != 'from_string',
            "prompt_init='from_string' without prompt_init_text; give the text to start from",
        )

    @property
    def packable(self) -> bool:
        """Never: each text of a row would need a prompt of its own."""
        return False

    @property
    def inserted(self) -> Inserted:
        """The prompt, and what stands before it."""
        return Inserted(self.prompt_length, 0 if self.combine == 'prefix' else 1)

    @property
    def reserved_positions(self) -> int:
        """The prompt's positions, where it has some."""
        return self.prompt_length if self.site == 'words' else 0

    def prepare(self, encode: Callable[[str], list[int]]) -> Self:
        """Turn the initial text into token ids, unless they are known.

        Raises:
            ValueError: a text without tokens, or one that `prompt_init` does not use.
        """
        self.require(
            self.prompt_init_text is None or self.prompt_init == 'from_string',
            f'prompt_init_text is given, but prompt_init={self.prompt_init!r}; '
            "set prompt_init='from_string', or leave the text away",
        )
        if self.prompt_init != 'from_string' or self.prompt_init_ids is not None:
            return self
        ids = tuple(encode(self.prompt_init_text))
        self.require(bool(ids), f'prompt_init_text={self.prompt_init_text!r} has no tokens')
        return dataclasses.replace(self, prompt_init_ids=ids)

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return a fresh prompt; equal seeds give equal ones whatever the key.

        Raises:
            ValueError: a prompt that the backbone has no words or no positions for.
        """
        self.require(
            dimensions.reads_words
            or (self.site != 'words' and self.prompt_init == 'random_uniform'),
            f'site={self.site!r} with prompt_init={self.prompt_init!r} is about vectors of words, '
            "and the backbone reads none; use site='embeddings' and prompt_init='random_uniform'",
        )
        left = dimensions.positions - self.reserved_positions
        self.require(
            left >= 1,
            f"prompt_length={self.prompt_length} with site='words' leaves no position for the "
            f'text; the backbone has {dimensions.positions}',
        )
        if self.init_weights_seed is not None:
            key = jax.random.key(self.init_weights_seed)
        width = dimensions.word  # at both sites
        if self.prompt_init == 'random_uniform':
            scale, shape = self.random_uniform_scale, (self.prompt_length, width)
            prompt = jax.random.uniform(key, shape, minval=-scale, maxval=scale)
        else:
            rows = self._rows(key, dimensions.vocabulary)
            table = backbone['embeddings']['word']['embedding']
            prompt = jnp.take(table, rows, axis=0).astype(jnp.float32)
            if self.site == 'words':  # where the text's own have their size by then
                prompt = prompt * dimensions.word_scale
        return {'embeddings': {'prompt': prompt}}

    def _rows(self, key: PRNGKeyArray, vocabulary: int) -> Shaped[Array, 'P']:
        """Return the words whose vectors the prompt starts from."""
        count = self.prompt_length
        if self.prompt_init == 'vocabulary':
            self.require(
                count <= vocabulary,
                f"prompt_length={count} with prompt_init='vocabulary' is more than the "
                f"vocabulary's {vocabulary} words",
            )
            return jax.random.choice(key, vocabulary, (count,), replace=False)
        ids = self.prompt_init_ids
        self.require(
            bool(ids), 'prompt_init_ids is missing; let `prepare` find the tokens of the text first'
        )
        unknown = [i for i in ids if not 0 <= i < vocabulary]
        self.require(
            not unknown,
            f'prompt_init_ids has {unknown[:1]}, but the vocabulary has the words 0 to '
            f'{vocabulary - 1}',
        )
        return jnp.asarray([ids[i % len(ids)] for i in range(count)])

    def words(self, params: Tree, words: Words, at: At) -> Words:
        """Insert the prompt before positions and LayerNorm; its token type is 0."""
        if self.site != 'words':
            return words
        count, index = self.inserted
        positions = words.positions
        after = positions[:, index:] + count
        positions = jnp.concatenate([positions[:, :index], after], axis=1)
        numbers = jnp.arange(index, index + count, dtype=positions.dtype)
        return words.replace(
            vectors=self._insert(words.vectors, params['embeddings']['prompt']),
            token_types=self._insert(words.token_types),
            positions=self._insert(positions, numbers),
            mask=self._widen(words.mask),
            tags=None if words.tags is None else self._insert(words.tags),
        )

    def embeddings(self, params: Tree, stream: Stream, at: At) -> Stream:
        """Insert the prompt after the embedding LayerNorm, where it stands for no word."""
        if self.site != 'embeddings':
            return stream
        return stream.replace(
            hidden=self._insert(stream.hidden, params['embeddings']['prompt']),
            mask=self._widen(stream.mask),
            word_vectors=self._insert(stream.word_vectors),
            tags=None if stream.tags is None else self._insert(stream.tags),
        )

    def _insert(
        self, x: Shaped[Array, 'B T ...'], new: Shaped[Array, 'P ...'] | None = None
    ) -> Shaped[Array, 'B P+T ...']:
        """Insert the same vectors into every row, or zeros."""
        count, index = self.inserted
        shape = (len(x), count, *x.shape[2:])
        new = jnp.zeros(shape, x.dtype) if new is None else new.astype(x.dtype)[None]
        parts = [x[:, :index], jnp.broadcast_to(new, shape), x[:, index:]]
        return jnp.concatenate(parts, axis=1)

    def _widen(self, mask: Bool[Array, '#B 1 #T T'] | None) -> Bool[Array, '#B 1 #P+T P+T'] | None:
        """Let every token look at the prompt, and the prompt at what the first token looks at."""
        if mask is None:
            return None
        count, index = self.inserted
        if mask.shape[2] > 1:
            rows = jnp.broadcast_to(mask[:, :, :1], (*mask.shape[:2], count, mask.shape[3]))
            mask = jnp.concatenate([mask[:, :, :index], rows, mask[:, :, index:]], axis=2)
        seen = jnp.ones((*mask.shape[:3], count), bool)
        return jnp.concatenate([mask[..., :index], seen, mask[..., index:]], axis=3)
