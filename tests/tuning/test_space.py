import pytest

from adapters_jax.tuning import space


def test_values_and_ranges():
    found = space.parse(
        (
            'method=pfeiffer[size=4,dropout=0.1],lora',
            'optimizer.learning_rate=log(1e-4,3e-3)',
            'optimizer.warmup=uniform(0,0.5)',
            'training.epochs=int(2,10,4)',
            'training.batch_size=logint(8,64)',
        )
    )
    assert list(found) == [
        'method',
        'optimizer.learning_rate',
        'optimizer.warmup',
        'training.epochs',
        'training.batch_size',
    ]
    method, rate, warmup, epochs, batch = space.distributions(found).values()
    assert method.choices == ('pfeiffer[size=4,dropout=0.1]', 'lora')
    assert (rate.low, rate.high, rate.log) == (1e-4, 3e-3, True)
    assert (warmup.low, warmup.high, warmup.log) == (0.0, 0.5, False)
    assert (epochs.low, epochs.high, epochs.step, epochs.log) == (2, 10, 4, False)
    assert (batch.low, batch.high, batch.log) == (8, 64, True)


def test_drawn_values_are_the_texts_of_a_grid():
    drawn = {'a': 0.1 + 0.2, 'b': 8, 'c': 'lora[r=4]'}
    assert space.texts_of(drawn) == {'a': '0.30000000000000004', 'b': '8', 'c': 'lora[r=4]'}


def test_an_end_is_tried_out_with_those_of_its_number_and_then_with_others():
    found = space.parse(('method=head,lora,ia3', 'training.epochs=int(2,10)', 'seed=7'))
    first, *others = space.examples(found, 'method', 2)
    assert first == {'method': 'ia3', 'training.epochs': '10', 'seed': '7'}
    assert {texts['method'] for texts in others} == {'ia3'}
    assert {texts['training.epochs'] for texts in others} == {'2', '10'}
    assert others == list(space.examples(found, 'method', 2))[1:]


@pytest.mark.parametrize(
    ('texts', 'expected'),
    [
        (('seed',), "sweep.space holds 'seed'; expected KEY=VALUE,VALUE"),
        (('seed=log(1,x)',), r"holds 'seed=log\(1,x\)', whose range is not one of numbers; expect"),
        (('seed=int(1.5,2)',), 'whose range is not one of whole numbers; expected uniform'),
        (('seed=log(1,2,3)',), 'whose range is not one of numbers'),
        (('seed=uniform(0,inf)',), 'whose range is not one of numbers'),
        (('seed=uniform(2,1)',), 'expected a range whose LOW is below its HIGH'),
        (('seed=log(0,1)',), 'expected a LOW above 0, as logarithms need'),
        (('seed=int(1,10,4)',), 'expected a STEP above 0 that leads from LOW to HIGH'),
        (('seed=int(1,10,0)',), 'expected a STEP above 0'),
        (('seed=1,int(2,3)',), 'has a range beside other values; expected one range'),
        (('seed=1', 'seed=int(2,3)'), "sweep.space has the key 'seed' twice"),
        (('method=head,full', 'method.size=2'), "has both 'method' and one of its options"),
        (('sweep.trials=1,2',), 'a key of the sweep itself cannot be swept'),
    ],
)
def test_mistakes_are_named(texts, expected):
    with pytest.raises(ValueError, match=expected):
        space.parse(texts)
