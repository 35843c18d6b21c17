"""The tokenizers of opus-mt, against the slow one of `transformers`: the same ids and texts."""

import io
import json

import jax
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from transformers.models.mbart.modeling_mbart import shift_tokens_right

from adapters_jax.adapters import registry
from adapters_jax.data import tokenize, written
from adapters_jax.generation import generate
from adapters_jax.interop import decoder_heads, sentence_pieces
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig
from adapters_jax.tasks.sequence_to_sequence import SequenceToSequence

ENGLISH = [
    'A small dog runs over the green grass and barks at two children.',
    'The quick brown fox jumps over the lazy dog, again and again!',
    'She sells sea-shells on the sea-shore; 1,234 of them in 2024.',
    'Is this a question? Yes, it is: "quoted", (bracketed) and — dashed.',
] * 20
GERMAN = [
    'Ein kleiner Hund läuft über das grüne Gras und bellt zwei Kinder an.',
    'Der schnelle braune Fuchs springt über den faulen Hund, wieder und wieder!',
    'Sie verkauft Muscheln am Meer; 1.234 Stück im Jahr 2024, für 5 €.',
    'Ist das eine Frage? Ja, gewiß: „zitiert“, (geklammert) – mit Strichen.',
] * 20


def learnt(texts, **options):
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=file, hard_vocab_limit=False, **options
    )
    return file.getvalue()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder like that of opus-mt-en-mul: the ids are of both models' words together."""
    folder = tmp_path_factory.mktemp('opus')
    for name, texts in (('source.spm', ENGLISH), ('target.spm', GERMAN)):
        (folder / name).write_bytes(learnt(texts, vocab_size=180, minloglevel=2))
    models = [_model(folder / name) for name in ('source.spm', 'target.spm')]
    pieces = {m.id_to_piece(i) for m in models for i in range(3, m.get_piece_size())}
    words = [
        '</s>',
        '<unk>',
        *sorted(pieces, key=lambda piece: piece[::-1]),
        '>>deu<<',
        '>>fra<<',
        '<pad>',
    ]
    (folder / 'vocab.json').write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / 'config.json').write_text('{"model_type": "marian"}')
    return folder


def _model(path):
    model = sentencepiece.SentencePieceProcessor()
    model.Load(str(path))
    return model


@pytest.fixture(scope='module')
def slow(folder):
    with pytest.warns(UserWarning, match='sacremoses'):
        return transformers.MarianTokenizer.from_pretrained(folder)


def texts(seed, corpus):
    """Return texts of the corpus' letters: some of its words, some made up, odd spaces."""
    rng = np.random.default_rng(seed)
    letters = sorted(set(''.join(corpus)))
    words = ' '.join(corpus).split()
    for _ in range(200):
        made_up = [''.join(rng.choice(letters, rng.integers(1, 9))) for _ in range(4)]
        known = list(rng.choice(words, 5))
        yield (' ' * int(rng.integers(1, 4))).join(rng.permutation(made_up + known))
    yield from ['', ' ', '  two  spaces ', 'ﬁ ligature, ① and Å', '\ttab\nline', 'x' * 300]


def test_what_is_translated_gets_the_same_ids(folder, slow):
    ours = tokenize.load_tokenizer(folder)
    assert ours.is_fast
    for text in [*texts(0, ENGLISH), '>>deu<< A small dog.', '>>fra<<The fox']:
        assert ours(text)['input_ids'] == slow(text)['input_ids'], text
    assert ours.num_special_tokens_to_add() == 1
    assert (ours.eos_token_id, ours.pad_token_id) == (slow.eos_token_id, slow.pad_token_id)


def test_what_is_written_gets_the_same_ids(folder, slow):
    ours = tokenize.load_writer(folder)
    for text in texts(1, GERMAN):
        assert ours(text)['input_ids'] == slow(text_target=text)['input_ids'], text


def test_what_was_written_reads_the_same(folder, slow):
    ours, rng = tokenize.load_writer(folder), np.random.default_rng(2)
    ids = [rng.integers(0, len(slow), 12).tolist() for _ in range(200)]  # of either model's words
    ids += [slow(text_target=text)['input_ids'] for text in texts(3, GERMAN)]
    expected = slow.batch_decode(ids, skip_special_tokens=True)
    assert ours.batch_decode(ids, skip_special_tokens=True) == expected


def test_what_no_model_has_seen_is_unknown(folder, slow):
    ours = tokenize.load_tokenizer(folder)
    for text in ('日本語', 'a 日本 dog', '日', '🙂 fox 🙂🙂'):
        assert ours(text)['input_ids'] == slow(text)['input_ids']


def test_a_tokenizer_json_is_preferred(folder, tmp_path):
    for name in (sentence_pieces.SOURCE, sentence_pieces.TARGET, 'vocab.json', 'config.json'):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    tokenize.load_tokenizer(folder).save_pretrained(tmp_path)
    assert tokenize.load_writer(tmp_path) is None
    text = ENGLISH[0]
    assert tokenize.load_tokenizer(tmp_path)(text) == tokenize.load_tokenizer(folder)(text)


@pytest.mark.parametrize(
    ('name', 'spoilt', 'message'),
    [
        ('vocab.json', b'{"a": 0, "</s>": 2}', 'are not 0 to 1, each once'),
        ('vocab.json', b'{"a": 0, "</s>": 1}', 'has no <unk>, <pad>'),
        ('source.spm', None, 'no Unigram model'),
    ],
)
def test_folders_that_cannot_be_read(folder, tmp_path, name, spoilt, message):
    for own in (sentence_pieces.SOURCE, sentence_pieces.TARGET, 'vocab.json'):
        (tmp_path / own).write_bytes((folder / own).read_bytes())
    other = spoilt or learnt(ENGLISH, vocab_size=100, model_type='bpe', minloglevel=2)
    (tmp_path / name).write_bytes(other)
    with pytest.raises(ValueError, match=message):
        tokenize.load_tokenizer(tmp_path)


def test_words_without_an_id_are_told(folder, tmp_path, caplog):
    for own in (sentence_pieces.SOURCE, sentence_pieces.TARGET):
        (tmp_path / own).write_bytes((folder / own).read_bytes())
    words = json.loads((folder / 'vocab.json').read_text())
    short = sorted(words, key=words.get)
    source = _model(folder / 'source.spm')
    own = [source.id_to_piece(i) for i in range(3, source.get_piece_size())]
    lost = next(word for word in own if word.startswith('▁') and len(word) > 2)
    short.remove(lost)
    (tmp_path / 'vocab.json').write_text(json.dumps({word: i for i, word in enumerate(short)}))
    ids = tokenize.load_tokenizer(tmp_path)(lost.removeprefix('▁'))['input_ids']
    assert len(ids) > 2  # in pieces, and the end
    assert '1 words without an id' in caplog.text
    assert all(i < len(short) for i in ids)


def test_a_model_translates_as_in_transformers(folder, slow, tmp_path):
    """From text to text, through everything: the ids, the search and the rules of a checkpoint."""
    for own in (sentence_pieces.SOURCE, sentence_pieces.TARGET, 'vocab.json'):
        (tmp_path / own).write_bytes((folder / own).read_bytes())
    sizes = dict.fromkeys(['encoder_layers', 'decoder_layers'], 2)
    sizes |= dict.fromkeys(['encoder_ffn_dim', 'decoder_ffn_dim'], 64)
    sizes |= dict.fromkeys(['encoder_attention_heads', 'decoder_attention_heads'], 4)
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=len(slow),
        pad_token_id=slow.pad_token_id,
        decoder_start_token_id=slow.pad_token_id,
        eos_token_id=slow.eos_token_id,
        d_model=32,
        max_position_embeddings=64,
        init_std=0.5,
        **sizes,
    )
    theirs = transformers.MarianMTModel(config).eval()
    rules = theirs.generation_config
    rules.bad_words_ids, rules.forced_eos_token_id = [[slow.pad_token_id]], slow.eos_token_id
    theirs.save_pretrained(tmp_path)
    given = [*ENGLISH[:4], 'dogs and children', '']
    batch = slow(given, return_tensors='pt', padding=True)
    with torch.no_grad():
        written = theirs.generate(**batch, max_new_tokens=16, num_beams=3)
    expected = slow.batch_decode(written, skip_special_tokens=True)
    assert len(set(expected)) > 3
    assert translated(tmp_path, given) == expected


def translated(folder, texts):
    loaded = load_backbone(str(folder))
    task = SequenceToSequence(target_length=16, beams=3).fitted(loaded.config, folder)
    ids = tokenize.load_tokenizer(folder)(texts, padding=True, return_tensors='np')
    real, starts = ids['attention_mask'].astype(np.int32), np.zeros((len(texts), 1), int)
    batch = {'input_ids': ids['input_ids'], 'segments': real, 'starts': starts}
    model = Model(loaded.config, registry.create('head'), HeadConfig(), loaded.config.written)
    params = {'backbone': loaded.params, 'heads': {model.name: decoder_heads.read(loaded)}}
    write = jax.jit(lambda params, batch: generate(model, params, batch, task.rules, task.search))
    found = write(params, batch)
    return task.tokenizer.batch_decode(found.tokens[:, 0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ('family', 'file', 'slow'),
    [
        ('t5', 'spiece.model', transformers.T5Tokenizer),
        ('mbart', 'sentencepiece.bpe.model', transformers.MBart50Tokenizer),
    ],
)
def test_one_model_alone_becomes_a_fast_tokenizer(folder, tmp_path, family, file, slow):
    """As mT5 and mBART-50 come."""
    (tmp_path / file).write_bytes((folder / 'source.spm').read_bytes())
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': family}))
    settings = {'tokenizer_class': slow.__name__}
    settings |= {'legacy': True} if family == 't5' else {'src_lang': 'en_XX', 'tgt_lang': 'de_DE'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
    ours, theirs = tokenize.load_tokenizer(tmp_path), slow.from_pretrained(tmp_path)
    for text in (*ENGLISH[:4], 'dogs'):
        assert ours(text)['input_ids'] == theirs(text)['input_ids']


@pytest.mark.parametrize(
    ('kind', 'start', 'first'),
    [
        (transformers.MBartTokenizerFast, 'de_DE', -1),
        (transformers.MBart50TokenizerFast, 2, 'de_DE'),
    ],
    ids=['cc25', '50'],
)
def test_a_language_is_where_mbart_puts_it(folder, tmp_path, kind, start, first):
    """What a decoder reads while it learns is what the original is trained with, and the search
    begins as it does."""
    (tmp_path / 'sentencepiece.bpe.model').write_bytes((folder / 'source.spm').read_bytes())
    tokenizer = kind(str(tmp_path / 'sentencepiece.bpe.model'), src_lang='en_XX', tgt_lang='de_DE')
    task = SequenceToSequence(languages=('en_XX', 'de_DE'))
    codes = tokenizer.lang_code_to_id
    own = task.prepared(tokenizer)
    begun = task.start(2, own)
    assert begun == (codes.get(start, start),)
    assert task.forced(own) == {'first': codes.get(first, first)}
    (labels,), cut = written.encode_texts(['dogs'], own, 20)
    assert not cut
    assert labels[-1] == tokenizer.eos_token_id
    theirs = torch.tensor([tokenizer(text_target='dogs')['input_ids']])
    read = shift_tokens_right(theirs, tokenizer.pad_token_id)[0].tolist()
    assert [*begun, *labels[:-1]] == read[: len(labels)]
