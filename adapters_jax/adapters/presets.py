"""The settings of papers and libraries, under the names by which people ask for them.

Where a paper and a library share a name, the name has the paper's settings; what differs is said.
"""

import dataclasses

from adapters_jax.adapters.adalora import AdaLoRA
from adapters_jax.adapters.attention import AttentionAdapter, SideAttentionAdapter
from adapters_jax.adapters.baselines import FullFineTuning, HeadOnly, TopLayers
from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.adapters.compacter import Compacter
from adapters_jax.adapters.ia3 import IA3
from adapters_jax.adapters.invertible import Invertible
from adapters_jax.adapters.lora import DoRA, LoRA
from adapters_jax.adapters.method import Method
from adapters_jax.adapters.mtl_lora import MTLLoRA
from adapters_jax.adapters.prefix import PrefixTuning
from adapters_jax.adapters.prompt import PromptTuning
from adapters_jax.adapters.reft import ReFT
from adapters_jax.adapters.tuning import BitFit, LayerNormTuning
from adapters_jax.adapters.union import Union
from adapters_jax.adapters.vera import DVoRA, VeRA

_HOULSBY = Bottleneck(  # Houlsby et al. 2019, section 3.1
    mh_adapter=True,
    output_adapter=True,
    size=64,
    non_linearity='gelu_new',
    init_weights='houlsby',
    train_norms=True,
)
_DOUBLE_SEQ_BN = Bottleneck(  # where Houlsby et al. put it, as `adapters` has it
    mh_adapter=True, output_adapter=True, reduction_factor=16, non_linearity='swish'
)
_SEQ_BN = Bottleneck(  # Pfeiffer et al. 2021, section 3.2
    mh_adapter=False,
    output_adapter=True,
    reduction_factor=16,
    non_linearity='relu',
    original_ln_before=True,
)
_PAR_BN = Bottleneck(  # He et al. 2022, section 4.2
    mh_adapter=False,
    output_adapter=True,
    reduction_factor=2,
    non_linearity='relu',
    is_parallel=True,
    init_weights='mam_adapter',
    scaling=4.0,
)
_SCALED_PAR_BN = Bottleneck(
    mh_adapter=False,
    output_adapter=True,
    reduction_factor=2,
    non_linearity='relu',
    is_parallel=True,
    init_weights='mam_adapter',
    scaling='learned',
)
_ADAPTER_PLUS = Bottleneck(  # Steitz and Roth 2024, section 3
    mh_adapter=False,
    output_adapter=True,
    reduction_factor=96,
    non_linearity='gelu',
    original_ln_before=True,
    original_ln_after=False,
    residual_before_ln=False,
    init_weights='houlsby',
    scaling='channel',
    stochastic_depth=0.1,
)

_INVERTIBLE = Invertible(non_linearity='relu')  # NICE, as in MAD-X (Pfeiffer et al. 2020)
_COMPACTER = Compacter(  # Mahabadi et al. 2021, with the places of `adapters`
    mh_adapter=True, output_adapter=True, reduction_factor=32, non_linearity='gelu'
)
_COMPACTER_PLUS_PLUS = Compacter(
    mh_adapter=False,
    output_adapter=True,
    reduction_factor=32,
    non_linearity='gelu',
    original_ln_before=True,
)
_MAM = Union(  # He et al. 2022, appendix A.2: the setting for GLUE
    members=(
        PrefixTuning(prefix_length=16, bottleneck_size=800),
        dataclasses.replace(_PAR_BN, size=16, reduction_factor=None, scaling=2.0),
    )
)
_MAM_ADAPTERS = Union(members=(PrefixTuning(bottleneck_size=800), _PAR_BN))
# Mao et al. 2022, section 4.1; in their code the gate takes the place of LoRA's alpha / r.
_UNIPELT = Union(
    members=(
        PrefixTuning(prefix_length=10, use_gating=True),
        dataclasses.replace(_SEQ_BN, use_gating=True),
        LoRA(r=8, alpha=8, use_gating=True),
    )
)

PRESETS: dict[str, Method] = {
    'houlsby': _HOULSBY,
    'double_seq_bn': _DOUBLE_SEQ_BN,
    'pfeiffer': _SEQ_BN,
    'seq_bn': _SEQ_BN,
    'par_bn': _PAR_BN,
    'scaled_par_bn': _SCALED_PAR_BN,
    'adapter_plus': _ADAPTER_PLUS,
    'lora': LoRA(r=8, alpha=8),  # Hu et al. 2022, table 9 (RoBERTa-base): query and value
    'dora': DoRA(r=8, alpha=8),  # Liu et al. 2024
    'vera': VeRA(r=8),  # Kopiczko et al. 2024; the rank of `adapters`, where the paper has 256+
    'dvora': DVoRA(r=8),
    'adalora': AdaLoRA(),  # Zhang et al. 2023, with the schedule's defaults of `peft`
    'mtl_lora': MTLLoRA(),  # Yang et al. 2025
    'ia3': IA3(),  # Liu et al. 2022, section 3.3
    'prefix_tuning': PrefixTuning(),  # Li and Liang 2021, section 4.3
    'prefix_tuning_flat': PrefixTuning(flat=True),
    'prompt_tuning': PromptTuning(),  # Lester et al. 2021
    'compacter': _COMPACTER,
    'compacter++': _COMPACTER_PLUS_PLUS,
    'invertible': _INVERTIBLE,
    'seq_bn_inv': Union(members=(_SEQ_BN, _INVERTIBLE)),  # MAD-X
    'double_seq_bn_inv': Union(members=(_DOUBLE_SEQ_BN, Invertible(non_linearity='swish'))),
    'loreft': ReFT(orthogonality=True),  # Wu et al. 2024, eq. 2
    'noreft': ReFT(orthogonality=False),  # ibid., appendix
    'direft': ReFT(orthogonality=False, subtract_projection=False),  # ibid., eq. 3
    'bitfit': BitFit(),  # Ben Zaken et al. 2022
    'layer_norm': LayerNormTuning(),  # LN_TUNING of `peft`
    'mam': _MAM,
    'mam_adapters': _MAM_ADAPTERS,  # the library's sizes
    'unipelt': _UNIPELT,
    'attention': AttentionAdapter(),
    'attention_side': SideAttentionAdapter(),
    'full': FullFineTuning(),
    'head': HeadOnly(),
    'top_layers': TopLayers(layers=2),
}
