"""Pure tensor functions: no modules, no state. Each fast path has a plain PyTorch reference beside it.

Shape letters, here and in all rooms above: T tokens, D model width, F expert hidden width, E experts, K top-k,
N = T*K routed rows, R received rows, B batch, S sequence, V vocabulary.
"""
