"""What is learned: labels, loss, metrics and predictions, one file a kind of task."""

from adapters_jax.tasks.classification import Classification
from adapters_jax.tasks.image_classification import ImageClassification
from adapters_jax.tasks.masked_lm import MaskedLM
from adapters_jax.tasks.multi_label import MultiLabel
from adapters_jax.tasks.multiple_choice import MultipleChoice
from adapters_jax.tasks.question_answering import QuestionAnswering
from adapters_jax.tasks.registry import create, from_json, kind, names
from adapters_jax.tasks.regression import Regression
from adapters_jax.tasks.sequence_to_sequence import SequenceToSequence
from adapters_jax.tasks.speech_recognition import SpeechRecognition
from adapters_jax.tasks.tagging import Tagging
from adapters_jax.tasks.task import Task

__all__ = [
    'Classification',
    'ImageClassification',
    'MaskedLM',
    'MultiLabel',
    'MultipleChoice',
    'QuestionAnswering',
    'Regression',
    'SequenceToSequence',
    'SpeechRecognition',
    'Tagging',
    'Task',
    'create',
    'from_json',
    'kind',
    'names',
]
