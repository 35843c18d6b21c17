"""Speech recognition: what is said in recordings.

    python -m adapters_jax.train --config=configs/speech.py:method=lora --config.data.dir=DIR \
        --config.task.window=5 --workdir=W

DIR has train.tsv, validation.tsv and test.tsv (or .csv, .jsonl, .parquet) with the columns `audio`,
a path in DIR of a WAV, FLAC, OGG or MP3 file of any rate, and `text`. `task.window` is in seconds;
as many as the longest recording has are best, and the checkpoint's own 30 the default. Reported are
the rates of wrong words and characters (jiwer, as fractions) after Whisper's normaliser, and the
cross-entropy of a token.
"""

from adapters_jax.config import Config, base, parse_arg


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, method='houlsby', backbone='whisper-tiny.en')
    config = base()
    config.task.name = 'speech_recognition'
    # The length of what is said in half a minute.
    config.task.target_length = 128
    config.backbone, config.method = given.backbone, given.method
    return config
