"""Karimi Mahabadi et al. (2021), "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers".

    python -m adapters_jax.sweep --config=configs/papers/mahabadi2021.py:task=rte \
        --config.data.dir=GLUE --workdir=W
    python -m experiments.mahabadi2021 --scale=small --data=DATA --output=DIR     # all of the paper

The rows of table 1 that are no prompts: sizes 96, 48, 24 and n of 4, 8, 12, a rate of 3e-3, 3
epochs on large tasks and 20 on small ones, batches of 100 (section 4). The paper's backbone is
T5-base, which writes the label as a text. T5 is there, and so are tasks whose answer is written
(configs/seq2seq.py), but not GLUE put as such texts; these rows classify with `bert-base-uncased`,
so their scores are not the paper's.

The backbone's LayerNorms are trained with every adapter, as in the published code, whose other
settings are `source=code`: a reduction of 32 with n = 4, gelu_new in place of our gelu, 20 epochs
everywhere. Its 500 steps of warm-up are a tenth of the steps here. It trains all of T5, and BitFit,
with 3e-4; that is BitFit's rate here too, but full fine-tuning keeps 2e-5 and 5e-5, which are usual
for BERT, in both versions.
"""

from adapters_jax.config import Config
from configs.papers import protocol
from configs.papers.protocol import RATE, Way

LARGE = ('mnli', 'qqp', 'qnli', 'sst2')
SIZES, PRODUCTS = 'method.size', 'method.phm_dim'
_SIZES = {SIZES: (24, 48, 96)}
_GRID = _SIZES | {PRODUCTS: (4, 8, 12)}
_NORMS = 'reduction_factor=None,size=24,train_norms=True'
_BLOCKS = 'factorized_phm_W=False,shared_phm_rule=False'
WAYS = {
    'compacter': Way(f'compacter[{_NORMS}]', _GRID),
    'compacter++': Way(f'compacter++[{_NORMS}]', _GRID),
    'phm_adapter': Way(f'compacter[{_NORMS},{_BLOCKS}]', _GRID),
    'adapter': Way('houlsby[size=24]', _SIZES),
    'pfeiffer': Way(f'pfeiffer[{_NORMS}]', _SIZES),
    'bitfit': Way('bitfit', {RATE: (3e-4,)}),
    'full': protocol.full({RATE: (2e-5, 5e-5)}),
}


def get_config(argument: str | None = None) -> Config:
    given = protocol.ask(argument, WAYS, protocol.BOTH)
    config = protocol.sweep(given, WAYS[given.way], 'bert-base-uncased', seeds=5)
    if given.source == 'code' and 'compacter' in given.way:
        options = 'reduction_factor=32,train_norms=True,non_linearity=gelu_new'
        config.method = f'{given.way}[{options}]'
        # The code has one size; the rates of small scale stay.
        own = (axis for axis in config.sweep.grid if not axis.startswith('method.'))
        config.sweep.grid = tuple(own)
    if given.scale == 'full':
        config.optimizer.learning_rate = 3e-3
        config.training.batch_size = 100
        large = protocol.whole(given.task) in LARGE and given.source == 'paper'
        config.training.epochs = 3.0 if large else 20.0
        config.head.pooling = 'pooler'
    return config
