"""The functions of all kernels under one name: what reference.py is in torch. Importing it imports triton."""

from __future__ import annotations

from .bias_gelu import bias_gelu
from .residual_norm import dropout_add_norm
from .short_attention import short_attention
from .sum_rows import sum_rows
from .word_log_p import word_log_p, word_nll

__all__ = ["bias_gelu", "dropout_add_norm", "short_attention", "sum_rows", "word_log_p", "word_nll"]
