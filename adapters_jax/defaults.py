"""Every key of a run's configuration, with its default and its meaning, in one place.

Each key that is here is read by something; a key that is not here is refused (`config.py`).
"""

from typing import Any

from ml_collections import ConfigDict

Config = ConfigDict


def base() -> Config:
    """Return a fresh, locked config with every key at its default."""
    config = ConfigDict()
    # All randomness of a run follows from this number: order, dropout, initialisation.
    config.seed = 0
    # A short name ('minilm'), a Hugging Face id, or a directory with config.json and weights.
    config.backbone = 'minilm'
    # A method with options, or several joined by '|': 'houlsby', 'pfeiffer[reduction_factor=8]',
    # 'lora[r=16]|houlsby[size=8]', 'full'. Names: adapters_jax/adapters/presets.py; options: the
    # fields of the class that the name stands for.
    config.method = 'houlsby'
    # Adapters by name, for a method that is an expression over them: 'en=DIR,task=pfeiffer' with
    # the method 'stack(en, task)'. A folder is a finished adapter, which stays as it is; a method
    # is a fresh one, which is trained. Expressions: adapters_jax/adapters/composition.py.
    config.adapters = ''
    # A finished adapter, of any format, that training begins with instead of a fresh one; the
    # method must be its own. The head is fresh, unless the task is the same, labels and all.
    config.start = ''
    # Options of the attention that mixes adapters in 'fuse(a, b)': AdapterFusion.
    config.fusion = _fusion()
    config.task = task()
    config.data = data()
    # Several tasks trained in one run, by name: `add_task`. Empty: the one of `task` and `data`.
    # Each has an adapter and a head; leaves of the backbone that a method trains are common.
    config.tasks = ConfigDict()
    # How often each of them comes.
    config.mixing = _mixing()
    config.head = _head()
    config.optimizer = _optimizer()
    config.training = _training()
    config.sweep = _sweep()
    config.mesh = ConfigDict(
        {
            # Devices that the rows of a batch are spread over; -1 takes all that the others leave.
            'data': -1,
            # Spread the members of a population over these devices, where their number divides over
            # them, fsdp and tensor are 1, and no large trunk would be computed by each of them:
            # each trains its own members on whole batches. Else, rows.
            'members': True,
            # Devices over which rows and, in parts that are gathered for use, matrices are spread.
            'fsdp': 1,
            # Devices that each compute a part of every matrix product (Megatron's cut).
            'tensor': 1,
            # Frozen weights: 'sharded' over fsdp and tensor, or 'replicated' on every device.
            'frozen': 'sharded',
            # Where leaves lie, before the backbone's own rules: ('REGEX=axis,axis', ...), with '-'
            # for a dimension left whole: "('adapters/.*/down/kernel=fsdp,-',)".
            'rules': (),
        }
    )
    config.lock()
    return config


def _fusion() -> Config:
    return ConfigDict(
        {
            # Whether queries, keys and values are projected; values start as the identity.
            'query': True,
            'key': True,
            'value': True,
            'value_initialized': True,
            # True: the query is the sub-layer's output; False: what the last adapter reads.
            'query_before_ln': False,
            # Add 0.01 times the squared distance of the values' projection from the identity.
            'regularization': True,
            # Add the residual before the mixing, to each value, instead of after it.
            'residual_before': False,
            # Divide the scores by a temperature that falls from 50 to 1.
            'temperature': False,
            # True: project values before they are weighted; False: project their weighted sum.
            'value_before_softmax': True,
            # Of the scores, in training.
            'dropout_prob': 0.1,
        }
    )


def task() -> Config:
    """Return the section `task`: what is learned."""
    return ConfigDict(
        {
            # 'classification', 'regression', 'multi_label' (any number of classes, also none),
            # 'multiple_choice' (one of the candidates that each row has), 'tagging',
            # 'question_answering', 'masked_lm' (no labels), 'image_classification', 'seq2seq' (a
            # text for a text) or 'speech_recognition' (what is said in a recording).
            'name': 'classification',
            # Class names in their order; empty: the sorted labels of the training data.
            'labels': (),
            # What is reported; empty: the task's own list.
            'metrics': (),
            # The metric that picks the best step and stops training early; empty: the task's own.
            'primary': '',
            # The class that 'precision', 'recall' and 'f1' are about; empty: with two classes the
            # second one.
            'positive': '',
            # How tagging is to learn spans: 'bio', 'iobes', or 'none': tags as they are; empty: as
            # the training data have them.
            'scheme': '',
            # 'multi_label': the least probability of a class that is predicted.
            'label_threshold': 0.5,
            # 'image_classification': other views of the training images in each epoch: 'none',
            # 'crop' (shifted by up to an eighth of a side, black coming in), 'flip' (half of them
            # mirrored) or 'crop_flip'.
            'augment': 'none',
            # 'masked_lm': the share of words that are hidden, and whether only as a whole.
            'mask_rate': 0.15,
            'whole_words': False,
            **_answers(),
            **_written(),
        }
    )


def _answers() -> dict[str, int | str]:
    return {
        # Question answering, in tokens: what two windows share, the most of a question (the rest is
        # cut) and of an answer; whether types tell a question from its context (in PEFT: no).
        'stride': 128,
        'question_length': 64,
        'answer_length': 30,
        'token_types': True,
        'n_best': 20,  # answers that are listed for a question
        # A question has no answer where that scores better than the best one by more than this:
        # a number, 'tuned' (on the validation split), 'none' (each has one), or 'auto': 'tuned'
        # where training questions lack answers.
        'threshold': 'auto',
    }


def _written() -> dict[str, Any]:
    return {
        # Of texts that are written: the most tokens, the end included, and the least, without it;
        # beams (1: greedy search); the power of the length that a beam's log-probability is divided
        # by; how many tokens in a row never occur twice (0: the checkpoint's no_repeat_ngram_size).
        'target_length': 128,
        'min_length': 0,
        'beams': 1,
        'length_penalty': 1.0,
        'repeated': 0,
        # 'seq2seq': what stands before each text, as T5 wants it ('translate English to German:
        # '), and the languages of texts and of what is written, as the tokenizer of mBART calls
        # them: ('en_XX', 'de_DE'); what BLEU counts as words, as sacrebleu calls it ('zh', 'char',
        # 'ja-mecab', 'flores200'; '': by the second of the languages, else '13a').
        'prefix': '',
        'languages': (),
        'bleu_tokenizer': '',
        # 'speech_recognition': the seconds that the encoder reads of each recording, of which
        # shorter ones are filled up with silence and longer ones cut (0: as many as the
        # checkpoint was trained with, 30 of Whisper); and, of a checkpoint of several
        # languages, the one that is spoken ('de'), and whether to write English.
        'window': 0.0,
        'language': '',
        'translate': False,
    }


def data() -> Config:
    """Return the section `data`: where examples come from, and how they are read."""
    return ConfigDict(
        {
            # A built-in data set ('trec', 'trec_fine', 'movie_sentiment', 'sms_spam') or a hub id.
            'name': '',
            # The hub data set's configuration, where it has several.
            'config_name': '',
            # A folder: of train/validation/test files, or of GLUE task folders when `glue` is set.
            # Of images: of folders train, validation (or dev, valid, val) and test with a folder
            # for each class, or of such folders of classes alone; or a tar file that holds these.
            'dir': '',
            # A GLUE task: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli.
            'glue': '',
            # Explicit files instead of a folder: CSV, TSV, JSONL, JSON, Parquet or text, also .gz;
            # for tagging CoNLL, CoNLL-U, JSONL, JSON or Parquet. Of a JSON object of lists
            # FILE.json#KEY, or FILE.json#KEY+KEY for two after each other. Of images, folders of
            # classes or tar files of them.
            'train': '',
            'validation': '',
            'test': '',
            # Column names, or numbers from 0 in files without a header; empty: detected. To answer
            # questions: text_a is the question, text_b the context, label the answers. To tag:
            # text_a is the words (the first column; FORM), label the tags (the last; UPOS). Of
            # sets of images: text_a is the image.
            # `choices`, of 'multiple_choice': that of a list, or several: 'ending0+ending1'.
            'columns': ConfigDict({'text_a': '', 'text_b': '', 'label': '', 'choices': ''}),
            # Where images are in no folders of their classes: a regular expression whose group
            # finds the class in a name, '([a-z]+)_'.
            'class_pattern': '',
            # Whether rows with an empty text are left out, and counted in the log; else refused.
            # Of texts with classes, sets of labels or numbers; 'masked_lm' always leaves them out.
            'skip_empty': False,
            # Of 'seq2seq': the languages of texts and of what is written, 'de,en', by which files
            # (train.de, train.en) or columns are called.
            'languages': '',
            # What stands between the labels of a text that has several ('multi_label').
            'label_separator': ',',
            # The number that the first candidate has in the labels of 'multiple_choice'.
            'first_choice': 0,
            **_layout(),
            **_examples(),
            # Steps that each text goes through, in this order, before it is tokenized:
            # ('nfkc', 'lower', 'stop_words[language=en]', 'tags[spacy=en_core_web_sm]'), on a
            # command line the flag once for each. There are 'nfc', 'nfd', 'nfkc', 'nfkd' (Unicode's
            # normal forms), 'lower', 'stop_words' (of a language, by code or name, or of several:
            # "stop_words[language=['en','fr']]") and 'tags' (each word's part of speech, by a spaCy
            # pipeline or a tagging adapter, adapter=DIR, for methods that read tags:
            # 'attention[tags=18]'). The adapter's folder remembers them.
            'preprocess': (),
            # Tokens of an example, special ones included; longer texts are cut.
            'max_length': 128,
            # 'packed': several short texts to a row, about `training.batch_size` examples a step.
            # 'buckets': one text a row, a few fixed lengths, exactly that many examples a step.
            'batching': 'packed',
            # Where token ids, and the pixels of images, are kept between runs; empty: the project's
            # cache; 'none': nowhere.
            'cache_dir': '',
        }
    )


def _examples() -> dict[str, Any]:
    return {
        # Shares of the training file that become validation and, where there is no file of it,
        # test; with a validation file nothing is cut off.
        'split_fractions': (0.1, 0.1),
        'split_seed': 0,
        # The order of the training examples follows from it; -1: from the run's seed. A sweep
        # over seeds gives all members one order, so that they share their batches.
        'seed': -1,
        # Use only so many examples of each split; 0: all of them.
        'limit': 0,
        # The same of the training split alone, to see how a method does with few examples.
        'train_limit': 0,
    }


def _layout() -> dict[str, str]:
    return {
        # Whether a file's first line names its columns: 'true', 'false' or 'auto'.
        'header': 'auto',
        # The files' encoding; a byte-order mark is dropped by 'utf-8-sig'.
        'encoding': 'utf-8-sig',
        # The character between columns; empty: by the file's ending, which may be any other
        # one where this is set.
        'delimiter': '',
        # 'csv': quotes delimit fields; 'none': quotes are text; 'auto': 'csv' for .csv files,
        # 'none' for others.
        'quoting': 'auto',
    }


def _mixing() -> Config:
    return ConfigDict(
        {
            # Shares of the tasks' examples: 'proportional' to their training splits' sizes,
            # 'uniform', 'temperature' (to the sizes to the power 1 / temperature), 'annealed' (from
            # proportional in the first epoch towards uniform in the last), or 'shares' (as each
            # task's `share` says).
            'schedule': 'proportional',
            'temperature': 2.0,
            # Batches of an epoch; 0: as many as hold every training example once.
            'steps': 0,
            # Whose adapters are kept: those of the step with the best 'mean' of the tasks' primary
            # metrics, or for 'each' task those of its own best step.
            'best': 'mean',
        }
    )


def _head() -> Config:
    return ConfigDict(
        {
            # 'mean', 'cls' or 'pooler': how an example's tokens become one vector.
            'pooling': 'mean',
            # Dense layers; all but the last keep the hidden size and end in `activation`.
            'layers': 1,
            'activation': 'tanh',
            'dropout': 0.1,
            # Whether it is trained: 'all', 'none', or 'auto': unless it is the language head of
            # 'masked_lm' and comes with the checkpoint.
            'train': 'auto',
        }
    )


def _optimizer() -> Config:
    return ConfigDict(
        {
            'learning_rate': 1e-3,
            # After warm-up: 'linear' to zero, 'cosine' to zero, or 'constant'.
            'schedule': 'linear',
            # Share of all steps in which the learning rate rises from zero.
            'warmup': 0.1,
            'weight_decay': 0.01,
            # Leaves without weight decay: regular expressions over '/'-joined paths.
            'decay_exclude': (
                r'(.*/)?bias',
                r'(.*/)?((input_)?scale|scaling|magnitude)',
            ),
            # Largest global norm of the gradient; 0: no clipping.
            'clip_norm': 1.0,
            'b1': 0.9,
            'b2': 0.999,
            'epsilon': 1e-8,
            # False reproduces the AdamWeightDecay of the original BERT code.
            'bias_correction': True,
        }
    )


def _training() -> Config:
    return ConfigDict(
        {
            # Examples of one update, over all devices and accumulation steps.
            'batch_size': 32,
            # Passes over the training data; `steps`, when above 0, replaces it.
            'epochs': 3.0,
            'steps': 0,
            # Steps between evaluations on the validation split; 0: once per epoch.
            'evaluate_every': 0,
            # Evaluations without improvement after which training stops; 0: never.
            'patience': 0,
            # Steps between checkpoints (there is one at every evaluation, too); 0: only those.
            'checkpoint_every': 200,
            # Steps between lines in the log (metrics.jsonl has every step); 0: fifty lines a run.
            'log_every': 20,
            # Parts that a batch is cut into, to save memory, and on a CPU time; dropout draws in
            # each. 0: 1, and on a CPU so many that each has 1,024 tokens or more.
            'accumulate': 0,
            'label_smoothing': 0.0,
            # Whether the backbone's and the adapter's dropout run in training.
            'dropout': True,
            # What activations are computed in: 'float32' or 'bfloat16'.
            'dtype': 'float32',
            # Drop the adapter from the lowest layers: 'none', or 'robust': from so many as are
            # drawn anew in each step, none to all but one (AdapterDrop).
            'adapter_drop': 'none',
            # Keep what the frozen layers below the first adapted place compute, on disk, and begin
            # there: 'none', or the number format, 'float32' or 'bfloat16'.
            'trunk_cache': 'none',
            # What frozen weights are stored in: 'float32', 'bfloat16', or 'int8': the backbone's
            # matrices in 8 bits with a scale for each output or word, the rest in float32.
            'frozen_dtype': 'float32',
            # What of a block's activations is computed again in the backward pass instead of being
            # kept: 'none', 'dots' (all but the outputs of its projections), or 'full' (all).
            'remat': 'none',
        }
    )


def _sweep() -> Config:
    return ConfigDict(
        {
            # What `adapters_jax.sweep` trains: every combination of these values, each a text
            # 'KEY=VALUE,VALUE,...' (quoted values keep blanks and commas). KEY is any key of this
            # file with dots between levels, or 'method.OPTION' ('method.NAME.OPTION' where several
            # methods are joined): ('method.size=8,64', 'seed=0,1,2').
            'grid': (),
            # Instead of a grid, what a search draws its trials from: 'KEY=VALUE,VALUE,...' as
            # there, or 'KEY=RANGE' with one of uniform(LOW,HIGH), log(LOW,HIGH),
            # int(LOW,HIGH[,STEP]) and logint(LOW,HIGH): ('optimizer.learning_rate=log(1e-4,1e-2)',
            # 'method.size=8,16,32').
            'space': (),
            # How many trials a search has, each of other values as long as such are found, and who
            # proposes them: 'tpe' (from the trials before, Bergstra et al. 2011) or 'random'.
            'trials': 32,
            'sampler': 'tpe',
            # What a search draws follows from it, and from the results alone.
            'seed': 0,
            # Which members end early: 'none'; 'median': those worse than the median of the others
            # at the same step (searches only); 'halving': those not among the best 1/`reduction`
            # at a rung. Rungs are the shares grace, grace x reduction, ... of a member's steps;
            # nothing ends before the first.
            'pruner': 'none',
            'reduction': 2.0,
            'grace': 0.25,
            # Recommend one of a grid's members: the cheapest of those trained to the end whose
            # score is at most `margin` worse than the best. Cheap is what has few trained
            # 'parameters', or what computes little in 'inference' (FLOPs).
            'recommend': False,
            'margin': 0.01,
            'cost': 'parameters',
            # Most members that are trained at once; 0: all that can be. Of a search: how many
            # trials are proposed at a time; 0: eight.
            'size': 0,
            # Members computed at a time in a step, to save memory and cache; 0: chosen by device.
            'chunk': 0,
        }
    )
