"""The public libraries `adapters` and `peft` (torch), set up as their documentation has it.

Imported by the functions alone, so that ours can be timed where they are not installed.
"""

import logging
import os
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[], Any]  # returns a tensor that is perhaps still being computed
RACED = ('adapters', 'peft', 'torch')


def describe() -> dict[str, Any]:
    """Return hardware, versions and commit as `provenance` does, the libraries' versions with it.

    Raises:
        ValueError: one of them is not installed.
    """
    from adapters_jax.training import provenance  # and with it JAX, which no worker of theirs has

    found = provenance.describe()
    return found | {'versions': found['versions'] | {name: _version(name) for name in RACED}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            f'{name} is not installed, and it is what is raced against; pip install -r '
            'requirements-test.txt'
        ) from error


def prepare() -> str:
    """Let torch use all cores; return its device: 'cuda' where it has one."""
    import torch

    logging.getLogger('adapters').setLevel(logging.ERROR)
    logging.getLogger('transformers').setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if not torch.cuda.is_available():
        return 'cpu'
    torch.set_float32_matmul_precision('high')  # TF32, as XLA multiplies there
    return 'cuda'


def adapters_model(
    folder: Path, places: str, size: int, classes: int, left_out: Sequence[int] = ()
) -> Any:
    """Return a model of `adapters` that trains bottlenecks of that size, and a fresh head.

    `places` is 'pfeiffer' (after the feed-forward network) or 'houlsby' (after both sub-layers);
    the layers `left_out` have none.
    """
    import adapters

    kind = {'pfeiffer': adapters.SeqBnConfig, 'houlsby': adapters.DoubleSeqBnConfig}[places]
    model = adapters.AutoAdapterModel.from_pretrained(folder)
    factor = model.config.hidden_size / size
    model.add_adapter('a', config=kind(reduction_factor=factor, leave_out=list(left_out)))
    model.add_classification_head('a', num_labels=classes)
    model.train_adapter('a')
    return model


def peft_model(folder: Path, rank: int, classes: int) -> Any:
    """Return a model of `peft` that trains LoRA of that rank on queries and values, and a head."""
    import peft
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=classes
    )
    config = peft.LoraConfig(
        task_type='SEQ_CLS', r=rank, lora_alpha=rank, target_modules=['query', 'value']
    )
    return peft.get_peft_model(model, config)


def make(library: str, folder: Path, method: str, size: int, classes: int) -> Any:
    """Return the model of 'adapters' or 'peft' that trains what our method of that name does."""
    if library == 'peft':
        return peft_model(folder, size, classes)
    places = 'houlsby' if method.startswith('double') else 'pfeiffer'
    return adapters_model(folder, places, size, classes)


def save(library: str, model: Any, folder: Path) -> Path:
    """Write what a model of `make` trains, and its head, by its library; return the folder."""
    if library == 'peft':
        model.save_pretrained(folder)
    else:
        model.save_adapter(folder, 'a', with_head=True)
    return folder


def train_step(
    model: Any, batch: dict[str, np.ndarray], dtype: str, compiled: str, parts: int = 1
) -> Step:
    """Return a step of AdamW on that batch, cut into parts.

    `compiled` is the mode of torch.compile; empty: the model stays as it is.
    """
    import torch

    device = prepare()
    model = model.to(device).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)  # as their Trainer has it
    ids, labels = _tensors(batch, device)
    run = _compiled(model, compiled)

    def step() -> float:
        for rows, wanted in zip(ids.chunk(parts), labels.chunk(parts), strict=True):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'):
                loss = run(input_ids=rows, attention_mask=torch.ones_like(rows), labels=wanted).loss
            (loss / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def forward(
    model: Any, batch: dict[str, np.ndarray], dtype: str, compiled: str, parts: int = 1
) -> Step:
    """Return a forward pass without dropout on that batch; the rest as for `train_step`."""
    import torch

    device = prepare()
    model = model.to(device).eval()
    ids, _ = _tensors(batch, device)
    run = _compiled(model, compiled)

    def step() -> float:
        with (
            torch.inference_mode(),
            torch.autocast(device, torch.bfloat16, enabled=dtype == 'bfloat16'),
        ):
            cut = ids.chunk(parts)
            found = [run(input_ids=x, attention_mask=torch.ones_like(x)).logits for x in cut]
            return torch.cat(found).sum()

    return step


def _compiled(model: Any, mode: str) -> Any:
    import torch

    return torch.compile(model, mode=mode) if mode else model


def _tensors(batch: dict[str, np.ndarray], device: str) -> tuple[Any, Any]:
    import torch

    ids = torch.tensor(batch['input_ids'].astype(np.int64), device=device)
    return ids, torch.tensor(batch['label'][:, 0].astype(np.int64), device=device)
