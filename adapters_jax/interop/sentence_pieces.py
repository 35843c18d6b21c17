"""The tokenizers of opus-mt: two SentencePiece models over one list of words.

Such a folder has source.spm, target.spm and vocab.json, and no tokenizer.json; what `transformers`
has for it is a slow tokenizer (`MarianTokenizer`). Here each side becomes a fast one with the same
ids, but for this: several letters on end that a side's model does not know are one unknown word,
also where the other side's model has them as a word.
"""

import json
import logging
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

_LOG = logging.getLogger(__name__)

SOURCE, TARGET, WORDS = 'source.spm', 'target.spm', 'vocab.json'
_UNK, _END, _PAD = '<unk>', '</s>', '<pad>'
_SPACE = '▁'
# Before words that a side's own model does not cut: no text has this character (it is none), so
# they are never found in one. It is left out where they are decoded.
_OTHERS = '\U0010ffff'


def suits(folder: Path) -> bool:
    """Tell whether the folder has tokenizers of this kind."""
    return all((folder / name).is_file() for name in (SOURCE, TARGET, WORDS))


def read(folder: Path, side: str) -> Any:
    """Return the fast tokenizer of one side, `SOURCE` or `TARGET`.

    Raises:
        ValueError: the model does not cut by probabilities (it is no Unigram model), or the list of
            words has gaps, or lacks the words that every text needs.
    """
    from transformers import PreTrainedTokenizerFast  # late: see `adapters_jax.lazy`

    words = json.loads((folder / WORDS).read_text('utf-8'))
    if sorted(words.values()) != list(range(len(words))):
        raise ValueError(f'the ids in {folder / WORDS} are not 0 to {len(words) - 1}, each once')
    if missing := [word for word in (_UNK, _END, _PAD) if word not in words]:
        raise ValueError(f'{folder / WORDS} has no {", ".join(missing)}')
    return PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(folder / side, words),
        unk_token=_UNK,
        eos_token=_END,
        pad_token=_PAD,
        clean_up_tokenization_spaces=False,
    )


def _tokenizer(path: Path, words: dict[str, int]) -> tokenizers.Tokenizer:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(path.read_bytes())
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise ValueError(f'{path} is no Unigram model, which is the only kind that is read here')
    own = _own(model)
    if lost := own.keys() - words.keys():
        _LOG.warning(
            '%s has %d words without an id in %s (%s, ...): texts are cut into others',
            path,
            len(lost),
            WORDS,
            ', '.join(sorted(lost)[:5]),
        )
    found = tokenizers.Tokenizer(models.Unigram(_scored(own, words), words[_UNK]))
    letters = model.normalizer_spec.precompiled_charsmap
    # A letter that this side's model does not know may be a word of the other's; several on end are
    # one unknown word.
    spelling = [normalizers.Precompiled(letters)] if letters else []
    spaces = [normalizers.Strip(), normalizers.Replace(Regex(' {2,}'), ' ')]
    unknown = Regex(f'[^ {"".join(_escaped(letter) for letter in own if len(letter) == 1)}]{{2,}}')
    runs = [normalizers.Replace(unknown, _OTHERS)]
    found.normalizer = normalizers.Sequence([*spelling, *spaces, *runs])
    found.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme='always')
    found.decoder = decoders.Sequence(
        [
            decoders.Replace(_OTHERS, ''),
            decoders.Replace(_SPACE, ' '),
            decoders.Fuse(),
            decoders.Replace(Regex('^ +| +$'), ''),
        ]
    )
    found.post_processor = processors.TemplateProcessing(
        single=f'$A {_END}', pair=f'$A $B {_END}', special_tokens=[(_END, words[_END])]
    )
    found.add_special_tokens([_UNK, _END, _PAD])
    found.add_tokens([AddedToken(word, normalized=False) for word in words if _is_code(word)])
    return found


def _is_code(word: str) -> bool:
    """Tell whether a word names a language, as what many of them are translated to begins."""
    return word.startswith('>>') and word.endswith('<<')


def _own(model: Any) -> dict[str, float]:
    """Return the words that a model cuts, with their scores."""
    known = (model.SentencePiece.NORMAL, model.SentencePiece.USER_DEFINED)
    return {piece.piece: piece.score for piece in model.pieces if piece.type in known}


def _escaped(letter: str) -> str:
    """Return a letter as it stands in a class of a regular expression."""
    return f'\\{letter}' if letter.isascii() and not letter.isalnum() else letter


def _scored(own: dict[str, float], words: dict[str, int]) -> list[tuple[str, float]]:
    """Return each word with its score, by id."""
    # An unknown letter costs more than the least of all.
    least = min(own.values())

    def scored(word: str) -> tuple[str, float]:
        if word in own:
            return word, own[word]
        plain = len(word) == 1 or word in (_UNK, _END, _PAD) or _is_code(word)
        return word if plain else _OTHERS + word, least

    return [scored(word) for word in sorted(words, key=words.get)]
