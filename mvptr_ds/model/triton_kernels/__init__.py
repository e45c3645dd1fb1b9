"""Triton kernels of the training step, each as a function with a gradient, and the same functions in plain torch.

    residual_norm.py     LayerNorm(residual + dropout(x + bias))
    bias_gelu.py         gelu(x + bias), by erf
    short_attention.py   attention within packed sequences of at most 128 rows, with dropout
    word_log_p.py        log probabilities of words, from the logits of a product
    sum_rows.py          sums of picked rows: the gradient of a gather
    sum_stripes.py       what the programs of a backward pass have summed, added up
    functions.py         the functions of all of them
    reference.py         all of them in torch, signature by signature: for a CPU, and for tests
    philox.py            the random numbers of dropout, in torch; philox_bits.py has them in Triton
    launch.py            how a kernel is started

The files of kernels import triton, which is optional. So nothing imports them by a statement: `kernels.triton_module`
does, after it has looked whether triton is there. No kernel uses atomic additions, so the same inputs give the same
bits. None keeps a mask of dropout: the backward pass draws the numbers again (philox.py).
"""
