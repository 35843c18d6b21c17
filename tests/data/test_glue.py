"""Each task's quirks, with a miniature of its real files."""

import pytest

from adapters_jax.data import glue
from adapters_jax.data.sources import load

MRPC = '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n'
MNLI = (
    'index	promptID	pairID	genre	sentence1_binary_parse	sentence2_binary_parse	'
    'sentence1_parse	sentence2_parse	sentence1	sentence2'
)


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())


def rows(dataset):
    return [tuple(row.values()) for row in dataset]


def test_cola_has_no_header_but_its_test_file_has_one(tmp_path):
    lines = 'gj04\t1\t\tThe car honked.\ngj04\t0\t*\tThe "car honked down.\n'
    put(tmp_path, 'CoLA/train.tsv', lines)
    put(tmp_path, 'CoLA/dev.tsv', lines)
    put(tmp_path, 'CoLA/test.tsv', 'index\tsentence\n0\tBill whistled past.\n')
    splits = load({'glue': 'cola', 'dir': tmp_path}, 'class')
    assert rows(splits['train']) == [
        ('The car honked.', 'acceptable'),
        ('The "car honked down.', 'unacceptable'),
    ]
    assert rows(splits['test']) == [('Bill whistled past.',)]
    assert splits['test'].column_names == ['text_a']


def test_sst2_keeps_unbalanced_quotes(tmp_path):
    lines = 'sentence\tlabel\n"a gorgeous\t1\nbad " stuff \t0\n'
    put(tmp_path, 'SST-2/train.tsv', lines)
    put(tmp_path, 'SST-2/dev.tsv', lines)
    splits = load({'glue': 'SST-2', 'dir': tmp_path / 'SST-2'}, 'class')
    assert rows(splits['validation']) == [('"a gorgeous', 'positive'), ('bad " stuff ', 'negative')]
    assert set(splits) == {'train', 'validation'}


def test_mrpc_byte_order_mark_quality_column_and_quotes(tmp_path):
    lines = MRPC + '1\t7\t8\t"He said " so .\tHe said so .\r\n0\t9\t9\tA .\t"B .\r\n'
    for name in ('train', 'dev'):
        put(tmp_path, f'MRPC/{name}.tsv', lines)
    put(tmp_path, 'MRPC/test.tsv', 'index\t#1 ID\t#2 ID\t#1 String\t#2 String\n0\t1\t2\tC\tD\n')
    splits = load({'glue': 'mrpc', 'dir': tmp_path}, 'class')
    assert rows(splits['train']) == [
        ('"He said " so .', 'He said so .', 'equivalent'),
        ('A .', '"B .', 'not_equivalent'),
    ]
    assert rows(splits['test']) == [('C', 'D')]


def test_mrpc_reads_the_original_corpus_where_the_tsv_files_are_missing(tmp_path):
    lines = [f'{i % 2}\t{i}\t{i}\tfirst {i}\tsecond {i}\r\n' for i in range(20)]
    put(tmp_path, 'MRPC/msr_paraphrase_train.txt', MRPC + ''.join(lines))
    put(tmp_path, 'MRPC/msr_paraphrase_test.txt', MRPC + '1\t1\t2\tx\ty\r\n')
    splits = load({'glue': 'mrpc', 'dir': tmp_path, 'split_fractions': (0.2, 0.2)}, 'class')
    assert {name: len(split) for name, split in splits.items()} == {
        'train': 16,
        'validation': 4,
        'test': 1,
    }
    assert rows(splits['test']) == [('x', 'y', 'equivalent')]


def test_stsb_scores_are_numbers(tmp_path):
    header = ['index', 'genre', 'filename', 'year', 'old_index', 'source1', 'source2']
    header += ['sentence1', 'sentence2']
    cells = ['0', 'main', 'MSR', '2012', '1', 'none', 'none', 'A "plane', 'An air plane']
    for name in ('train', 'dev'):
        content = [[*header, 'score'], [*cells, '3.80']]
        put(tmp_path, f'STS-B/{name}.tsv', '\n'.join(map('\t'.join, content)))
    put(tmp_path, 'STS-B/test.tsv', '\n'.join(map('\t'.join, [header, cells])))
    splits = load({'glue': 'stsb', 'dir': tmp_path}, 'number')
    assert rows(splits['validation']) == [('A "plane', 'An air plane', 3.8)]
    assert rows(splits['test']) == [('A "plane', 'An air plane')]


def test_qqp_leaves_broken_lines_out_and_says_so(tmp_path, caplog):
    header = 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n'
    lines = '1\t1\t2\tHow?\tWhy?\t0\n2\t3\t4\tbroken\n3\t5\t6\tWho?\t\t0\n4\t7\t8\tA?\tA ?\t1\n'
    put(tmp_path, 'QQP/train.tsv', header + lines)
    put(tmp_path, 'QQP/dev.tsv', header + '1\t1\t2\tHow?\tWhy?\t0\n')
    splits = load({'glue': 'qqp', 'dir': tmp_path}, 'class')
    assert rows(splits['train']) == [('How?', 'Why?', 'not_duplicate'), ('A?', 'A ?', 'duplicate')]
    assert 'train.tsv: 2 broken lines left out' in caplog.text
    assert 'dev.tsv' not in caplog.text


def test_an_empty_text_of_any_task_may_be_left_out(tmp_path, caplog):
    header = 'id\tquestion\tsentence\tlabel\n'
    for name in ('train', 'dev'):
        lines = '1\tHow?\tSo.\tentailment\n2\t\tSo.\tentailment\n'
        put(tmp_path, f'QNLI/{name}.tsv', header.replace('id', 'index') + lines)
    given = {'glue': 'qnli', 'dir': tmp_path}
    with pytest.raises(ValueError, match=r'line 3: text_a is empty; .*data\.skip_empty'):
        load(given, 'class')
    splits = load(given | {'skip_empty': True}, 'class')
    assert rows(splits['train']) == [('How?', 'So.', 'entailment')]
    assert 'skipped 1 rows without a text' in caplog.text


def test_mnli_has_two_validation_and_two_test_splits(tmp_path):
    cells = '\t'.join(['0', '1', '2', 'fiction', *['( tree )'] * 4, 'A man "sat', 'He sat'])
    put(tmp_path, 'MNLI/train.tsv', f'{MNLI}\tlabel1\tgold_label\n{cells}\tneutral\tneutral\n')
    five = '\t'.join(f'label{i}' for i in range(1, 6))
    for kind, label in (('matched', 'entailment'), ('mismatched', 'contradiction')):
        labels = '\t'.join([label] * 6)
        content = f'{MNLI}\t{five}\tgold_label\n{cells}\t{labels}\n'
        put(tmp_path, f'MNLI/dev_{kind}.tsv', content)
        put(tmp_path, f'MNLI/test_{kind}.tsv', f'{MNLI}\n{cells}\n')
    splits = load({'glue': 'mnli', 'dir': tmp_path}, 'class')
    assert list(splits) == [
        'train',
        'validation_matched',
        'test_matched',
        'validation_mismatched',
        'test_mismatched',
    ]
    assert rows(splits['train']) == [('A man "sat', 'He sat', 'neutral')]
    assert splits['validation_matched']['label'][:] == ['entailment']
    assert splits['validation_mismatched']['label'][:] == ['contradiction']
    assert rows(splits['test_mismatched']) == [('A man "sat', 'He sat')]


@pytest.mark.parametrize(
    ('name', 'header', 'label', 'expected'),
    [
        ('QNLI', 'index\tquestion\tsentence\tlabel', 'not_entailment', 'not_entailment'),
        ('RTE', 'index\tsentence1\tsentence2\tlabel', 'entailment', 'entailment'),
        ('WNLI', 'index\tsentence1\tsentence2\tlabel', '1', 'entailment'),
    ],
)
def test_inference_tasks(tmp_path, name, header, label, expected):
    content = f'{header}\n0\tWhen did "it end ?\tIt ended " .\t{label}\n'
    put(tmp_path, f'{name}/train.tsv', content)
    put(tmp_path, f'{name}/dev.tsv', content)
    splits = load({'glue': name.lower(), 'dir': tmp_path}, 'class')
    assert rows(splits['train']) == [('When did "it end ?', 'It ended " .', expected)]


def test_the_table_is_consistent():
    assert len(glue.TASKS) == 9
    for task in glue.TASKS.values():
        assert task.primary in task.metrics
        assert (task.text_b is None) == (len(task.hub_columns) == 1)
    assert glue.task('mrpc').labels[1] == 'equivalent'
    assert glue.task('stsb').label_kind == 'number'


@pytest.mark.parametrize(
    ('key', 'value'),
    [('columns', {'text_a': 's'}), ('header', False), ('delimiter', ','), ('quoting', 'csv')],
)
def test_a_layout_that_is_not_the_benchmarks_is_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"data\.{key}.* is .*, but data\.glue is 'rte'.*leave"):
        load({'glue': 'rte', 'dir': tmp_path, key: value}, 'class')


def test_messages(tmp_path):
    with pytest.raises(ValueError, match=r"'squad' is no GLUE task; .* cola, sst2, mrpc"):
        load({'glue': 'squad', 'dir': tmp_path}, 'class')
    with pytest.raises(ValueError, match=r"STS-B are of the kind 'number'.* 'class'"):
        load({'glue': 'stsb', 'dir': tmp_path}, 'class')
    put(tmp_path, 'RTE/dev.tsv', 'x')
    with pytest.raises(FileNotFoundError, match=r'RTE: no train\.tsv; .*RTE holds dev\.tsv'):
        load({'glue': 'rte', 'dir': tmp_path}, 'class')
    with pytest.raises(
        FileNotFoundError, match=r'no train\.tsv and no dev\.tsv; .* does not exist'
    ):
        load({'glue': 'cola', 'dir': tmp_path / 'nowhere'}, 'class')
    put(tmp_path, 'RTE/train.tsv', 'text\tlabel\nhi\t1\n')
    with pytest.raises(ValueError, match=r"train\.tsv is not laid out as RTE: .*'text', 'label'"):
        load({'glue': 'rte', 'dir': tmp_path}, 'class')
    header = 'index\tsentence1\tsentence2\tlabel\n'
    put(tmp_path, 'RTE/train.tsv', f'{header}0\ta\tb\tentailment\n1\ta\tb\tmaybe\n')
    with pytest.raises(ValueError, match=r"train\.tsv, line 3: 'maybe' is no label of RTE"):
        load({'glue': 'rte', 'dir': tmp_path}, 'class')
