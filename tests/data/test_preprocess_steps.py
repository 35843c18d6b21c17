"""The chain: what each step does, what order means, what is refused; properties on odd texts."""

import dataclasses
import re
import unicodedata

import pytest
import stop_words
from hypothesis import given
from hypothesis import strategies as st

from adapters_jax.data.preprocess import chain, tags
from adapters_jax.data.preprocess.chain import Chain
from adapters_jax.data.preprocess.document import Document, find_words

# Letters with marks apart, ligatures, joined emoji, spaces of many kinds, scripts from the right.
ODD = st.text(
    st.sampled_from(
        "abcAÉé\u0301\u0308ﬁℌΣςİßäñ狐क्षس \u200d\u200c\u00a0\u3000\t\n\x00\x85\u2028.,'’-_!?@"
        '\ufe0f0123🦊👩👧🇩🇪'
    ),
    max_size=30,
)
WORDS = st.lists(st.sampled_from(['the', 'Cat', "isn't", 'of', '3.5', 'fox', ',', '(']), max_size=9)
TEXTS = ODD | WORDS.map(' '.join) | WORDS.map('  '.join) | st.text(max_size=20)
TAG = tags.LoadedTagger(
    lambda texts: [['NOUN' if len(w) % 2 else 'X' for w in words] for words in texts],
    tags.UNIVERSAL,
    'by length',
)


def make(*names, tagger=TAG):
    """Return a chain whose tagging adapters are all one and the same function."""
    return chain.create(names, lambda directory: tagger)


def after(text, *names, **options):
    """Return one text after these steps."""
    (document,), _ = make(*names, **options).run([text])
    return document


def giving(*answers):
    """Return a tagger that always gives the same."""
    return TAG._replace(tag=lambda texts: [list(answers) for _ in texts])


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('How far is it ?', ['How', 'far', 'is', 'it', '?']),
        ("Don't (stop)!", ["Don't", '(', 'stop', ')', '!']),
        ('the U.S. and 3.5 or 1,000.', ['the', 'U.S.', 'and', '3.5', 'or', '1,000', '.']),
        ('e\u0301te\u0301\tis\u00a0é', ['e\u0301te\u0301', 'is', 'é']),
        ('👩\u200d👧 \U0001f1e9\U0001f1ea', ['👩\u200d👧', '\U0001f1e9\U0001f1ea']),
        ('so-so', ['so', '-', 'so']),
        (' \n\x00', []),
    ],
)
def test_words(text, words):
    assert Document(text).words == words


@given(TEXTS)
def test_words_are_in_order_and_all_that_is_visible_is_in_one(text):
    ends = [place for span in find_words(text) for place in span]
    assert ends == sorted(ends) and all(begin < end for begin, end in find_words(text))
    edges = [0, *ends, len(text)]
    rest = ''.join(text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
    assert not any(unicodedata.category(letter)[0] in 'LMNPS' for letter in rest)


@pytest.mark.parametrize('step', ['nfc', 'nfd', 'nfkc', 'nfkd', 'lower', 'stop_words'])
@given(TEXTS)
def test_doing_a_step_twice_is_doing_it_once(step, text):
    once = after(text, step).text
    assert after(once, step).text == once


@given(TEXTS)
def test_normal_forms_are_those_of_unicode(text):
    assert after(text, 'nfkc').text == unicodedata.normalize('NFKC', text)
    assert after(after(text, 'nfd').text, 'nfc').text == after(text, 'nfc').text


def test_the_order_of_steps_is_theirs():
    assert after('ℌ', 'lower', 'nfkc').text == 'H'
    assert after('ℌ', 'nfkc', 'lower').text == 'h'
    # A wide letter is in no list.
    assert after('ｔｈｅ cat', 'stop_words', 'nfkc').text == 'the cat'
    assert after('ｔｈｅ cat', 'nfkc', 'stop_words').text == 'cat'


@given(TEXTS, st.permutations(['lower', 'stop_words', 'nfkc']))
def test_a_chain_is_one_step_after_another(text, names):
    step_by_step = text
    for name in names:
        step_by_step = after(step_by_step, name).text
    assert after(text, *names).text == step_by_step


@pytest.mark.parametrize(
    ('language', 'text', 'left'),
    [
        ('en', 'The cat and THE dog , it isn’t (the) fox', 'cat dog , () fox'),
        ('english', '  the   cat  ', 'cat  '),
        ('de', 'der Fuchs und die Katze', 'Fuchs Katze'),
        ('[de,en]', 'the Fuchs und the Katze', 'Fuchs Katze'),
        ('sk', 'a líška', 'líška'),  # the library's list begins with a byte order mark
    ],
)
def test_stop_words_go_with_the_space_before_them(language, text, left):
    assert after(text, f'stop_words[language={language}]').text == left


@given(TEXTS)
def test_what_stays_are_the_words_that_are_in_no_list_unless_none_would(text):
    listed = {word.casefold() for word in stop_words.get_stop_words('en')}
    words = Document(text).words
    kept = [word for word in words if word.casefold().replace('’', "'") not in listed]
    documents, emptied = make('stop_words').run([text])
    says = [any(map(str.isalnum, ''.join(some))) for some in (words, kept)]
    assert emptied == (says == [True, False])
    assert documents[0].words == (words if emptied else kept)
    if emptied or words == kept:
        assert documents[0].text == text


def test_a_text_of_stop_words_alone_stays_and_is_counted():
    documents, emptied = make('lower', 'stop_words').run(['Who is it ?', 'The cat', '!!'])
    assert [document.text for document in documents] == ['who is it ?', 'cat', '!!']
    assert emptied == 1


@given(TEXTS, st.permutations(['lower', 'stop_words', 'nfkc', 'tags[adapter=x]']))
def test_each_word_keeps_its_tag_whatever_comes_after(text, names):
    place = names.index('tags[adapter=x]')
    tagged = after(text, *names[: place + 1])
    document = after(text, *names)
    assert len(document.spans) == len(document.tags)
    begins = [0, *(place for span in document.spans for place in span)]
    assert begins == sorted(begins) and begins[-1] <= len(document.text)
    # Following steps change a word but not its tag, and take words away with theirs.
    expected = iter(zip(tagged.words, tagged.tags, strict=True))
    for word, tag in zip(document.words, document.tags, strict=True):
        assert any(after(old, *names[place + 1 :]).text == word and t == tag for old, t in expected)


def test_tags_are_of_the_text_as_it_is_then():
    early = after('The cat', 'tags[adapter=x]', 'stop_words')
    late = after('The cat', 'stop_words', 'tags[adapter=x]')
    assert (early.text, early.tags) == (late.text, late.tags) == ('cat', ('NOUN',))
    seen = []
    tagger = TAG._replace(tag=lambda texts: seen.append(texts) or [['X'] * len(w) for w in texts])
    after('The cat', 'tags[adapter=x]', 'stop_words', tagger=tagger)
    after('The cat', 'stop_words', 'tags[adapter=x]', tagger=tagger)
    assert seen == [[['The', 'cat']], [['cat']]]


def test_a_text_without_words_is_not_given_to_the_tagger():
    seen = []
    tagger = TAG._replace(tag=lambda texts: seen.extend(texts) or [['X']] * len(texts))
    documents, _ = make('tags[adapter=x]', tagger=tagger).run(['\x00', 'cat'])
    assert seen == [['cat']] and [document.tags for document in documents] == [(), ('X',)]


@pytest.mark.parametrize(
    ('tagger', 'sentence'),
    [
        (giving('X'), "by length gave 1 tags to the 2 words of 'the cat'; expected one for each"),
        (giving('X', 'NN'), "gave the tag 'NN', which is none of ADJ, ADP"),
        (giving('', ''), 'gave no word a part of speech'),
    ],
)
def test_a_tagger_that_breaks_its_promise_is_refused(tagger, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        after('the cat', 'tags[adapter=x]', tagger=tagger)


@pytest.mark.parametrize(
    ('names', 'sentence'),
    [
        (['stopwords'], "unknown step 'stopwords' in data.preprocess; known: lower, nfc, nfd,"),
        (['lower|nfc'], "'lower|nfc' is not a step of data.preprocess"),
        (['lower,nfc'], "'lower,nfc' is not a step of data.preprocess; expected name or name["),
        ([''], "'' is not a step"),
        (['lower[a=1]'], "lower has no option 'a'; known: none"),
        (['nfkc[form=NFC]'], "nfkc has no option 'form'; known: none"),
        (['stop_words[lang=en]'], "stop_words has no option 'lang'; known: language"),
        (['stop_words[language=xx]'], "no language 'xx'; known: ar (arabic), bg (bulgarian)"),
        (['stop_words[language=3]'], 'no language 3; known: ar'),
        (['stop_words[language=[en,[de]]]'], "no language ['de']; known: ar"),
        (['tags'], 'tags needs one tagger: a spaCy pipeline'),
        (['tags[spacy=a,adapter=b]'], 'tags needs one tagger'),
        (['tags[spacy=[1]]'], 'tags: spacy=[1] is not valid'),
        (['tags[adapter=a]', 'lower', 'tags[adapter=b]'], 'tags[adapter=a] and tags[adapter=b]'),
    ],
)
def test_mistakes_are_named(names, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make(*names)


def test_an_unknown_normal_form_is_refused():
    with pytest.raises(ValueError, match=r"normal form is 'NFX'; expected one of \('NFC'"):
        chain.Normalise('NFX')


def test_no_steps_change_nothing():
    assert not Chain() and Chain().num_tags == 0 and Chain().to_json() == []
    assert Chain().run(['The  cat\n']) == ([Document('The  cat\n')], 0)


def test_a_description_makes_the_same_chain():
    made = make(' lower ', 'stop_words[language=en]', 'tags[adapter=x]')
    described = made.to_json()
    assert [step['step'] for step in described] == list(made.names)
    assert described[0] == {'step': 'lower'}
    assert described[2] == {
        'step': 'tags[adapter=x]',
        'source': 'by length',
        'tags': list(tags.UNIVERSAL),
    }
    again = chain.from_json(described, lambda directory: TAG)
    assert again.to_json() == described and again.identity == made.identity
    assert made.num_tags == 18 and made.inventory == tags.UNIVERSAL


@pytest.mark.parametrize('changed', [{'source': 'by weight'}, {'inventory': ('NOUN', 'X')}])
def test_a_chain_that_does_something_else_by_now_is_refused(changed):
    described = make('lower', 'tags[adapter=x]').to_json()
    with pytest.raises(ValueError, match=r"after the step tags\[adapter=x\] with 'by length'"):
        chain.from_json(described, lambda directory: TAG._replace(**changed))


def test_another_list_of_words_is_another_chain(monkeypatch):
    described, identity = make('stop_words').to_json(), make('stop_words').identity
    monkeypatch.setattr(stop_words, 'get_stop_words', lambda name: ['cat'])
    assert make('stop_words').identity != identity
    with pytest.raises(ValueError, match=r"1333 stop words, .*here it works with '1 stop words, "):
        chain.from_json(described, lambda directory: TAG)


def test_steps_are_values():
    for one, two in (('stop_words', 'stop_words[language=en]'), ('nfc', 'nfc')):
        assert make(one).steps == make(two).steps
    assert make('nfc').steps != make('nfd').steps
    with pytest.raises(dataclasses.FrozenInstanceError):
        make('nfc').steps[0].form = 'NFD'
