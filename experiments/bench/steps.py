"""Training steps and forward passes of ours and of the libraries, on equal padded work.

Rows of full length, so that nothing is gained by packing; the same weights, AdamW, dropout on in
training; called in turns within one process.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from adapters_jax.interop.backbones import load_backbone
from experiments.bench import backbones, libraries, programs
from experiments.bench.race import Race
from experiments.bench.timing import Times, compare

# torch's threads turn for a while after they have nothing to do, and would slow what comes next.
PAUSE = 0.3
# Steps that an accelerator is given without waiting in between, as both sides' training loops do.
TOGETHER = 10
CPU_DEVICES = 2  # that the bench has of a CPU (JAX_NUM_CPU_DEVICES)
OURS = 'ours'


@dataclasses.dataclass(frozen=True)
class Course:
    """What is raced: a backbone, a method of both sides, the batch."""

    backbone: str
    method: str  # ours
    library: str  # 'adapters' or 'peft'
    size: int  # the bottleneck's, or the rank
    rows: int
    tokens: int
    parts: int = 0  # that ours cuts a batch into; 0: as our commands do
    devices: int = 1  # that ours spreads the rows over
    frozen_dtype: str = 'float32'  # of ours, as training.frozen_dtype
    mode: str = 'default'  # of torch.compile, where theirs is compiled: `peft` on a GPU

    @property
    def title(self) -> str:
        """The course in words."""
        more = ' uncut' if self.parts == 1 else ''
        more += f' over {self.devices} devices' if self.devices > 1 else ''
        more += f', frozen weights in {self.frozen_dtype}' * (self.frozen_dtype != 'float32')
        more += f', theirs compiled with mode={self.mode!r}' * (self.mode != 'default')
        return f'{self.method} on {self.backbone}, {self.rows} x {self.tokens}{more}'


def courses() -> list[Course]:
    """Return the courses for this machine; the first one is that which claims are made of."""
    if jax.default_backend() == 'cpu':
        return [
            Course('minilm', 'double_seq_bn[size=24]', 'adapters', 24, 32, 128),
            Course('minilm', 'double_seq_bn[size=24]', 'adapters', 24, 32, 128, parts=1),
            # One core goes on where the other waits for the rest of a product.
            Course(
                *('minilm', 'double_seq_bn[size=24]', 'adapters', 24, 32, 128), devices=CPU_DEVICES
            ),
            Course('minilm', 'pfeiffer[size=24]', 'adapters', 24, 32, 128),
            Course('minilm', 'lora[r=8]', 'peft', 8, 32, 128),
            Course('base', 'double_seq_bn[size=48]', 'adapters', 48, 8, 128),
            Course('large', 'double_seq_bn[size=64]', 'adapters', 64, 4, 128),
        ]
    lora = Course('base', 'lora[r=8]', 'peft', 8, 64, 128, frozen_dtype='bfloat16')
    return [
        lora,
        dataclasses.replace(lora, frozen_dtype='float32'),
        Course('base', 'double_seq_bn[size=48]', 'adapters', 48, 64, 128),
        Course('minilm', 'double_seq_bn[size=24]', 'adapters', 24, 256, 128),
        Course('large', 'lora[r=8]', 'peft', 8, 64, 128, frozen_dtype='bfloat16'),
        # Kernels are recorded once (CUDA graphs) and no longer launched one by one from Python.
        dataclasses.replace(lora, mode='reduce-overhead'),
    ]


def train_step(root: Path, rounds: int) -> Iterator[Race]:
    """Race training steps."""
    yield from _races('training', root, rounds)


def inference(root: Path, rounds: int) -> Iterator[Race]:
    """Race forward passes."""
    yield from _races('inference', root, rounds)


def _races(mode: str, root: Path, rounds: int) -> Iterator[Race]:
    dtype = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
    for course in courses():
        yield race(mode, course, dtype, root, rounds)
        gc.collect()


def race(mode: str, course: Course, dtype: str, root: Path, rounds: int) -> Race:
    """Race a course in a mode, 'training' or 'inference'; random weights go below `root`.

    Where ours cuts the batch, theirs runs cut so and uncut, and the faster one of these counts.
    """
    folder = backbones.folder(course.backbone, root)
    loaded = load_backbone(str(folder))
    batch = programs.random_batch(course.rows, course.tokens, loaded.config.vocabulary)
    made = programs.make(loaded, course.method, dtype)
    options = {name: getattr(course, name) for name in ('parts', 'devices', 'frozen_dtype')}
    ours = getattr(programs, mode)(*made, batch, **options)
    model = libraries.make(course.library, folder, course.method, course.size, 2)
    # As its documentation recommends on a GPU; on a CPU theirs is eager.
    compiled = course.mode if course.library == 'peft' and dtype == 'bfloat16' else ''
    run = libraries.train_step if mode == 'training' else libraries.forward
    together = 1 if jax.default_backend() == 'cpu' else TOGETHER
    products = {size: programs.product(size, dtype) for size in programs.sizes()}
    calls = {OURS: _repeated(ours.call, together)}
    calls |= {size: _repeated(product.call, together) for size, product in products.items()}
    for parts in sorted({1, ours.parts}):
        theirs = run(model, batch, dtype, compiled, parts)
        calls[f'theirs in {parts}'] = _repeated(theirs, together, lambda tensor: tensor.item())
    found = compare(calls, rounds, pause=PAUSE)
    times = {
        side: Times(tuple(s / together for s in seconds.seconds)) for side, seconds in found.items()
    }
    own, reached = times.pop(OURS), {size: times.pop(size) for size in products}
    best = min(times.values(), key=lambda theirs: theirs.median)
    rates = {size: products[size].flops / seconds.median for size, seconds in reached.items()}
    fastest = max(rates, key=rates.get)
    told = {'flops': ours.flops, 'product_rate': rates[fastest]}
    # Each round by itself, since a machine that does other work has another rate in each.
    told['share_of_rate'] = reached[fastest].over(own).value * ours.flops / products[fastest].flops
    told |= {'seconds': {side: seconds.median for side, seconds in times.items()}}
    settings = dataclasses.asdict(course) | {'parts': ours.parts, 'dtype': dtype}
    settings['padding'] = programs.padding(batch)
    return Race(course.title, own, best, settings, more=told)


def _repeated(
    call: Callable[[], Any], times: int, wait: Callable[[Any], Any] = lambda last: last
) -> Callable[[], Any]:
    """Return a function that calls `times` times and waits for the last."""

    def run() -> Any:
        for _ in range(times):
            last = call()
        return wait(last)

    return run
