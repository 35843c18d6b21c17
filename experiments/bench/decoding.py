"""Beam search of ours and of `transformers`: the same random model, the same input, equal lengths.

The end is kept from coming before the last token, so that both write as much; the words that they
write are compared, too. Called in turns within one process, and ours moreover with the products
that its larger programs have (`xla.EIGEN_PRODUCTS`).
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers

from adapters_jax import xla
from adapters_jax.adapters import registry
from adapters_jax.decoding.rules import Rules
from adapters_jax.decoding.search import Search
from adapters_jax.generation import generate
from adapters_jax.interop import decoder_heads
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig
from experiments.bench import libraries
from experiments.bench.race import Race
from experiments.bench.steps import PAUSE
from experiments.bench.timing import compare

# Shapes of opus-mt and T5 (small), and a BART of the base width and depth, whose heads and
# feed-forward networks are those that the classes of transformers come with (of the large one).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    'marian': (
        'Marian',
        {
            'd_model': 512,
            'encoder_layers': 6,
            'decoder_layers': 6,
            'encoder_attention_heads': 8,
            'decoder_attention_heads': 8,
            'encoder_ffn_dim': 2048,
            'decoder_ffn_dim': 2048,
            'vocab_size': 58101,
            'max_position_embeddings': 512,
            'pad_token_id': 58100,
            'bos_token_id': 0,
            'eos_token_id': 0,
            'decoder_start_token_id': 58100,
            'activation_function': 'swish',
            'scale_embedding': True,
        },
    ),
    't5': ('T5', {'decoder_start_token_id': 0, 'num_layers': 6, 'vocab_size': 32128}),
    'bart': ('Bart', {'encoder_layers': 6, 'decoder_layers': 6, 'd_model': 768}),
}


@dataclasses.dataclass(frozen=True)
class Course:
    """What is written by which model."""

    model: str
    rows: int
    tokens: int  # of each input
    written: int
    beams: int

    @property
    def title(self) -> str:
        """The course in words."""
        return (
            f'{self.model}, {self.rows} texts of {self.tokens} tokens, {self.written} written, '
            f'{self.beams} beams'
        )


COURSES = (
    Course('marian', 16, 32, 32, 5),
    Course('marian', 1, 32, 32, 5),
    Course('t5', 16, 32, 32, 4),
    Course('bart', 8, 128, 48, 4),
)


def races(root: Path, rounds: int) -> Iterator[Race]:
    """Race beam searches; random weights go below `root`."""
    for course in COURSES:
        yield race(course, root, rounds)


def race(course: Course, root: Path, rounds: int) -> Race:
    """Race a course.

    Raises:
        RuntimeError: the two write different words, where both compute in float32.
    """
    theirs, folder = _their_model(course.model, root)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 30000, (course.rows, course.tokens)).astype(np.int32)
    ours, eigen = (_ours(course, folder, ids, few) for few in (True, False))
    expected = _theirs(course, theirs, ids)
    same = float((np.asarray(ours()) == expected().cpu().numpy()).mean())
    if same < 1 and jax.default_backend() == 'cpu':
        raise RuntimeError(f'{course.title}: {100 * same:.1f} % of the words are equal')
    calls = {
        'ours': lambda: jax.block_until_ready(ours()),
        'theirs': lambda: expected()[0, -1].item(),
        'eigen': lambda: jax.block_until_ready(eigen()),
    }
    times = compare(calls, rounds, pause=PAUSE)
    written = course.rows * course.written
    more = {
        'tokens_per_second': {side: written / times[side].median for side in calls},
        'same_words': same,
        'eigen_over_ours': dataclasses.asdict(times['eigen'].over(times['ours'])),
    }
    settings = dataclasses.asdict(course)
    return Race(course.title, times['ours'], times['theirs'], settings, more=more)


def _their_model(name: str, root: Path) -> tuple[Any, Path]:
    """Return a random model in evaluation mode, and the folder that it is stored in."""
    kind, sizes = MODELS[name]
    classes = {'Marian': 'MarianMTModel'}
    make = getattr(transformers, classes.get(kind, f'{kind}ForConditionalGeneration'))
    folder = root / f'random_{name}'
    if not (folder / 'model.safetensors').exists():
        config = getattr(transformers, f'{kind}Config')(**sizes)
        config.forced_eos_token_id = None
        make(config).save_pretrained(folder)
    return make.from_pretrained(folder).to(libraries.prepare()).eval(), folder


def _ours(course: Course, folder: Path, ids: np.ndarray, few: bool) -> Any:
    loaded = load_backbone(str(folder))
    decoder = loaded.config.decoder
    rules = Rules(
        (decoder.start_id,), _END, loaded.config.pad_id, course.written, min_length=course.written
    )
    how = Search(beams=course.beams)
    model = Model(loaded.config, registry.create('head'), HeadConfig(), loaded.config.written)
    batch = {
        'input_ids': jnp.asarray(ids),
        'segments': jnp.ones(ids.shape, jnp.int32),
        'starts': jnp.zeros((len(ids), 1), jnp.int32),
    }
    params = {'backbone': loaded.params, 'heads': {model.name: decoder_heads.read(loaded)}}
    params = jax.device_put(params)
    run = jax.jit(
        lambda params, batch: generate(model, params, batch, rules, how).tokens[:, 0],
        compiler_options=xla.options(few=few),
    )
    return lambda: run(params, batch)


_END = 2  # a word like others to these models, which both sides are told is the end


def _theirs(course: Course, model: Any, ids: np.ndarray) -> Any:
    import torch

    given = torch.from_numpy(ids).long().to(model.device)
    config = transformers.GenerationConfig(
        num_beams=course.beams,
        min_new_tokens=course.written,
        max_new_tokens=course.written,
        eos_token_id=_END,
        pad_token_id=model.config.pad_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id,
        do_sample=False,
    )
    mask = torch.ones_like(given)

    def run() -> Any:
        with torch.inference_mode():
            found = model.generate(given, attention_mask=mask, generation_config=config)
        return found[:, 1:]

    return run
