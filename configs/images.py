r"""Classify images, from folders, a tar file or a set with a column of images.

    python -m adapters_jax.train --config=configs/images.py:backbone=BACKBONE,method=pfeiffer \
        --config.data.dir=DIR --workdir=W    # DIR holds train/CLASS/*.jpg and, if there are, others
    python -m adapters_jax.evaluate --workdir=W --split=test
    python -m adapters_jax.predict --adapter=W/adapter --input=in.jsonl --output=out.jsonl

BACKBONE is any ViT or DeiT, by hub id or folder. `predict` reads {"image": PATH} and adds
`prediction`, `label` and `logits`. DIR may be a tar file of the same layout, and is read in place.
Without a folder for each class a pattern finds the class in the names:
`--config.data.class_pattern='([a-z]+)_'`. Images of a `datasets` set, from the hub or a folder that
it was saved in, come with `--config.data.name=NAME`. What a checkpoint's preprocessor_config.json
says is done to each image; training images are moved and mirrored as `augment` says (`augment=crop`
for digits and letters, which have no mirror images).

A ViT-B/16 at 224 x 224 wants an accelerator. `python -m experiments.domains.images` pretrains a
small one on two cores, on seven classes of a part of CIFAR-10, and adapts it to the three others;
docs/measurements.md has what it reached.
"""

from adapters_jax.config import Config, base, parse_arg

RATES = {'full': 2e-4, 'head': 1e-2}  # of the methods that are no adapters


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(
        argument,
        method='pfeiffer',
        backbone='google/vit-base-patch16-224-in21k',
        augment='crop_flip',
    )
    config = base()
    config.task.name = 'image_classification'
    config.task.augment = given.augment
    config.method = given.method
    config.backbone = given.backbone
    config.head.pooling = 'cls'
    config.optimizer.learning_rate = RATES.get(given.method, 2e-3)
    config.training.epochs = 10.0
    config.training.patience = 3
    return config
