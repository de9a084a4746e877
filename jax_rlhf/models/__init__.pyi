from .cache import KVCache as KVCache, create_cache as create_cache, grow_cache as grow_cache
from .config import DecoderConfig as DecoderConfig
from .decoder import (
    Decoder as Decoder,
)
from .parameters import (
    NORM_AXES as NORM_AXES,
    abstract_params as abstract_params,
    compute_dtypes as compute_dtypes,
    init_params as init_params,
    kernels_by_output as kernels_by_output,
    logical_axes as logical_axes,
    unstack_layers as unstack_layers,
)
from .precision import model_jit as model_jit, narrowed as narrowed, traced as traced
from .rotary import Rotary as Rotary
