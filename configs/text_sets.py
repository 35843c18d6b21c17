r"""Six public sets of short texts, from the files in which they are handed out.

    python -m adapters_jax.train --config=configs/text_sets.py:task=cr,method=pfeiffer \
        --config.data.dir=DIR --workdir=W
    python -m adapters_jax.evaluate --workdir=W --split=test

| task | classes | DIR holds |
|---|---|---|
| trec | 6 kinds of questions | TREC.train.all, TREC.test.all |
| cr | customer reviews, good or bad | custrev.all |
| subj | subjective or not | subj.all |
| mpqa | opinions, good or bad | mpqa.all |
| banking77 | 77 intents | train.csv, test.csv |
| clinc150 | 150 intents, and `oos`: none of them | data_full.json |

The first four are lines of `LABEL text` in Latin-1, as collected by Kim (2014, section 3.1). What
has no test or validation part gives a tenth of its texts for each. A method that trains the whole
backbone takes a smaller learning rate, one that trains the head alone a larger one.
"""

from adapters_jax.config import Config, base, parse_arg

FILES = {
    'trec': {'train': 'TREC.train.all', 'test': 'TREC.test.all'},
    'cr': {'train': 'custrev.all'},
    'subj': {'train': 'subj.all'},
    'mpqa': {'train': 'mpqa.all'},
    'banking77': {'train': 'train.csv', 'test': 'test.csv'},
    'clinc150': {
        'train': 'data_full.json#train+oos_train',
        'validation': 'data_full.json#val+oos_val',
        'test': 'data_full.json#test+oos_test',
    },
}
EPOCHS = {'trec': 5.0, 'cr': 5.0, 'subj': 2.0, 'mpqa': 3.0, 'banking77': 6.0, 'clinc150': 4.0}
RATES = {'full': 2e-4, 'head': 1e-2}  # of the methods that are no adapters
RATE = 2e-3


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, task='trec', method='pfeiffer', backbone='minilm')
    if given.task not in FILES:
        raise ValueError(f'unknown task {given.task!r}; known: {", ".join(FILES)}')
    config = base()
    config.backbone = given.backbone
    config.method = given.method
    config.data.update(FILES[given.task])
    config.data.max_length = 64
    if given.task == 'clinc150':
        config.data.columns.update({'text_a': '0', 'label': '1'})
    elif given.task != 'banking77':
        config.data.skip_empty = True  # reviews and opinions have a few
        config.data.update({'delimiter': ' ', 'encoding': 'latin-1', 'header': 'false'})
        config.data.columns.update({'text_a': '1', 'label': '0'})
    config.task.primary = 'accuracy'
    config.optimizer.learning_rate = RATES.get(given.method, RATE)
    config.training.epochs = EPOCHS[given.task]
    return config
