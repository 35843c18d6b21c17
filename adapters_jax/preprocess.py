"""Look at what the steps of a config do to its texts, before anything is trained.

    python -m adapters_jax.preprocess --config=FILE --config.data.preprocess=STEP ... [--examples=5]

For a few training examples it prints the text as it is in the data, as it is after each step that
changed it, and the word pieces that the backbone's tokenizer makes of it, each with its tag. Then
what the steps did to the whole training split.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters_jax import entry, tasks
from adapters_jax.config import Config
from adapters_jax.data import sources, tokenize
from adapters_jax.data.preprocess.align import piece_tags
from adapters_jax.data.preprocess.chain import Chain, Stage
from adapters_jax.data.preprocess.document import Document
from adapters_jax.interop import hub
from adapters_jax.training import preprocessing

TEXTS = ('text_a', 'text_b')


@dataclasses.dataclass(frozen=True)
class Preview:
    """A split's texts before the steps, and what they are after each of them."""

    texts: list[str]
    stages: list[Stage]
    prefix: str = ''  # before each text, after the steps

    @functools.cached_property
    def documents(self) -> list[Document]:
        """The texts after the last step, as the tokenizer gets them."""
        last = self.stages[-1].documents if self.stages else [Document(t) for t in self.texts]
        return [document.preceded(self.prefix) for document in last]

    def history(self, row: int) -> list[tuple[str, Document]]:
        """One text as it is in the data, and after each step that changed it."""
        found = [('text', Document(self.texts[row]))]
        for name, documents, _ in self.stages:
            if documents[row] != found[-1][1]:
                found.append((name, documents[row]))
        if self.prefix:
            found.append(('prefix', self.documents[row]))
        return found

    def changes(self) -> Iterator[tuple[str, int, int, int]]:
        """Of each step: how many texts it changed, how many words are left, and how many texts
        stayed as they were because no word of them would have been."""
        before = [Document(text) for text in self.texts]
        for name, documents, emptied in self.stages:
            changed = sum(old != new for old, new in zip(before, documents, strict=True))
            yield name, changed, sum(len(d.places) for d in documents), emptied
            before = documents


def preprocess(config: Config) -> tuple[dict[str, Preview], Chain]:
    """Return what the steps of a config make of its training texts, by their column, and the steps.

    Raises:
        ValueError, FileNotFoundError: a mistake in the steps or in the data.
    """
    if config.tasks:
        raise ValueError(
            f'the config has several tasks ({", ".join(config.tasks)}); give that of one of them'
        )
    kind, chain = tasks.kind(config.task.name), preprocessing.make_chain(config)
    preprocessing.check_task(kind, chain)
    splits = sources.limited(kind.read(config.data), config.data)
    if 'train' not in splits:
        raise ValueError('data has no training split; set data.train or data.dir')
    split = splits['train']
    columns = {name: list(split[name]) for name in TEXTS if name in split.column_names}
    if TEXTS[0] not in columns:
        raise ValueError(f'{kind.name} takes no steps of data.preprocess: there is nothing to show')
    prefixes = {TEXTS[0]: config.task.prefix if kind.writes else ''}
    return {
        name: Preview(texts, list(chain.stages(texts)), prefixes.get(name, ''))
        for name, texts in columns.items()
    }, chain


def show(
    previews: dict[str, Preview],
    chain: Chain,
    tokenizer: tokenize.Tokenizer,
    examples: int,
    console: Console,
) -> None:
    """Print the first examples, and what the steps did to all of them."""
    for row in range(min(examples, len(previews['text_a'].texts))):
        console.rule(f'example {row + 1}', style='dim', align='left')
        grid = Table.grid(padding=(0, 2))
        grid.add_column(justify='right', style='cyan', no_wrap=True)
        grid.add_column(overflow='fold')
        for preview in previews.values():
            for name, document in preview.history(row):
                grid.add_row(name.partition('[')[0], _shown(document))
        documents = [preview.documents[row] for preview in previews.values()]
        grid.add_row(*_pieces(tokenizer, documents, chain))
        console.print(grid)
    console.rule('all examples', style='dim', align='left')
    for name, preview in previews.items():
        console.print(_summary(name, preview))
        if chain.inventory:
            console.print(_tag_counts(preview.documents), style='dim')


def _shown(document: Document) -> Text:
    """Return the text, and in it after each word its tag."""
    if document.spans is None:
        return Text(document.text)
    shown, last = Text(), 0
    for (_, end), tag in zip(document.spans, document.tags, strict=True):
        shown.append(document.text[last:end])
        shown.append(f'/{tag}' if tag else '', 'green')
        last = end
    return shown.append(document.text[last:])


def _pieces(
    tokenizer: tokenize.Tokenizer, documents: Sequence[Document], chain: Chain
) -> tuple[str, Text]:
    """Return how many word pieces there are, and each with its tag."""
    encoding = tokenizer(*(document.text for document in documents)).encodings[0]
    ids = {tag: number for number, tag in enumerate(chain.inventory, 1)}
    tags = piece_tags(encoding.offsets, encoding.sequence_ids, documents, ids)
    shown = Text()
    for piece, tag in zip(encoding.tokens, tags, strict=True):
        shown.append(piece, 'dim' if piece in tokenizer.all_special_tokens else '')
        shown.append(f'/{chain.inventory[tag - 1]} ' if tag else ' ', 'green')
    return f'{len(tags)} pieces', shown


def _summary(name: str, preview: Preview) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), title_justify='left')
    for heading, justify in (
        (name, 'left'),
        ('texts changed', 'right'),
        ('words left', 'right'),
        ('kept as they were', 'right'),
    ):
        table.add_column(heading, justify=justify)
    words = sum(len(Document(text).places) for text in preview.texts)
    table.add_row('before', f'of {len(preview.texts):,}', f'{words:,}', '')
    for step, changed, left, emptied in preview.changes():
        table.add_row(step, f'{changed:,}', f'{left:,}', f'{emptied:,}')
    return table


def _tag_counts(documents: Sequence[Document]) -> str:
    counts = collections.Counter(tag or 'none' for d in documents for tag in d.tags)
    return 'tags left  ' + ', '.join(f'{tag} {count:,}' for tag, count in counts.most_common())


def main(config: Config, examples: int) -> None:
    """Print the examples and the summary."""
    previews, chain = preprocess(config)
    tokenizer = tokenize.load_tokenizer(hub.locate(config.backbone))
    show(previews, chain, tokenizer, examples, Console(highlight=False, markup=False))


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'config': config_flags.DEFINE_config_file('config', None, 'FILE.py[:key=value,...]'),
        'examples': flags.DEFINE_integer('examples', 5, 'How many to show.', lower_bound=0),
    }


if __name__ == '__main__':
    entry.run(_define, main)
