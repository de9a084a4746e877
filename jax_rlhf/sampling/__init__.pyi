from .logprobs import score_hidden as score_hidden, token_logprobs as token_logprobs
from .sampler import (
    Samples as Samples,
    Sampling as Sampling,
    check_positions as check_positions,
    check_prompts as check_prompts,
    decode_stages as decode_stages,
    in_rows as in_rows,
    loop_turns as loop_turns,
    rollout as rollout,
    sample as sample,
    sample_program as sample_program,
)
from .weights import (
    decodes_unrolled as decodes_unrolled,
    reshard as reshard,
    rollout_form as rollout_form,
    sampling_layout as sampling_layout,
)
