"""Small modules of our own, one a file, in the forms that papers on autoregressive vision and speech models use.

Each has ``build(seed, batch, sequence) -> (module, example inputs)``; the first two axes of every input are dynamic
unless its ``DYNAMIC`` says otherwise.
"""

WORKLOADS = (
    "cross_attention",
    "delta_residual",
    "dit_block",
    "explicit_mask",
    "hyper_connections",
    "inputs_embeds",
    "mar_masked",
    "matmul_attention",
    "rope",
    "two_heads",
    "var_block_causal",
)
"""Names of the modules of this package that build a workload."""
