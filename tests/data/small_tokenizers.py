"""Tokenizers of both families as small as they come: WordPiece over letters, BPE over bytes."""

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from experiments.toy import vocabulary


def bert() -> transformers.PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer that lowers, drops accents and control characters."""
    ids = {word: number for number, word in enumerate(vocabulary())}
    backend = tokenizers.BertWordPieceTokenizer(ids)._tokenizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def roberta(trim: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Return a BPE tokenizer without merges; `trim`: whether a piece's space is left out of it."""
    specials = ['<s>', '<pad>', '</s>', '<unk>']
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {word: number for number, word in enumerate([*specials, *letters])}
    backend = tokenizers.Tokenizer(models.BPE(ids, []))
    backend.normalizer = normalizers.Sequence([])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(
        ('</s>', ids['</s>']), ('<s>', ids['<s>']), trim_offsets=trim
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
