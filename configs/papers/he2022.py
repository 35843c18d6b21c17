"""He et al. (2022), "Towards a Unified View of Parameter-Efficient Transfer Learning".

    python -m adapters_jax.sweep --config=configs/papers/he2022.py:task=sst2 \
        --config.data.dir=GLUE --workdir=W
    python -m experiments.he2022 --scale=small --data=DATA --output=DIR     # all of the paper

The rows of table 2 for MNLI and SST-2, and the ones that take the design apart (section 4):
sequential (`seq`) or parallel (`par`), at attention or at the feed-forward network (`ffn`), low
rank (`lora`) or bottleneck, and their combination `mam`. RoBERTa-base, a rate of 1e-4, 10 epochs,
batches of 32, a weight decay of 0.1, warm-up of 6 %, Adam with b2 = 0.98.

Its rows on XSum and en-ro, of BART and mBART, are left out. Such runs can be made, with those
backbones and configs/seq2seq.py, but they would not be the paper's: its batches of en-ro are of
16,384 tokens where ours are of so many texts, the scalings of these rows have not been compared
with the paper, and the report of a protocol knows scores in per cent, one for each row and task.

`adapters`' preset of the name `mam` is another, larger setting: `mam_adapters`.
"""

from adapters_jax.config import Config
from configs.papers import protocol
from configs.papers.protocol import RATE, Way

_ATTENTION, _FFN = 'mh_adapter=True,output_adapter=False', 'mh_adapter=False,output_adapter=True'
# About one number of parameters for all once prefixes are their values: 64 D a layer. Parallel and
# sequential adapters differ in that alone; `mam` scales its own by 2, as the paper's code does.
_PARALLEL = 'par_bn[size=32,reduction_factor=None,scaling=1.0,{}]'
_SEQUENTIAL = (
    'double_seq_bn[size=32,reduction_factor=None,non_linearity=relu,init_weights=mam_adapter,{}]'
)
WAYS = {
    'mam': Way('mam', {}),
    'full': protocol.full({RATE: (1e-5, 2e-5, 3e-5)}),
    'bitfit': Way('bitfit', {}),
    'prefix': Way('prefix_tuning[prefix_length=32,bottleneck_size=800]', {}),
    'lora': Way('lora[r=16,alpha=16]', {}),
    'lora_ffn': Way(
        'lora[r=6,alpha=6,selfattn_lora=False,intermediate_lora=True,output_lora=True]', {}
    ),
    'seq_attention': Way(_SEQUENTIAL.format(_ATTENTION), {}),
    'seq_ffn': Way(_SEQUENTIAL.format(_FFN), {}),
    'par_attention': Way(_PARALLEL.format(_ATTENTION), {}),
    'par_ffn': Way(_PARALLEL.format(_FFN), {}),
}


def get_config(argument: str | None = None) -> Config:
    given = protocol.ask(argument, WAYS)
    config = protocol.sweep(given, WAYS[given.way], 'roberta-base', seeds=5)
    if given.scale == 'full':
        config.optimizer.weight_decay = 0.1
        config.optimizer.warmup = 0.06
        config.optimizer.b2 = 0.98
        config.optimizer.learning_rate = 1e-4
        config.training.batch_size = 32
        config.training.epochs = 10.0
        config.head.pooling = 'cls'
    return config
