"""One embedding table for tokens, phrases and tags: word + position + segment, LayerNorm, dropout.

Legend: B samples, L slots (text or tag), D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TEXT_SEGMENT = 0
TAG_SEGMENT = 1


class SlotEmbeddings(nn.Module):
    """Embeds the slots of a text or of a tag sequence; positions run 0.. in each.

    Source: REFERENCE, Inputs.
    """

    def __init__(
        self, num_rows: int, hidden_size: int, max_positions: int, num_segments: int, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(num_rows, hidden_size)
        self.position_embeddings = nn.Embedding(max_positions, hidden_size)
        self.segment_embeddings = nn.Embedding(num_segments, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids_BL: Tensor, segment: int) -> Tensor:
        """int64 rows [B, L] of one segment -> [B, L, D].

        Raises:
            ValueError: when there are more slots than position embeddings.
        """
        num_slots = ids_BL.shape[1]
        positions_LD = self.position_embeddings.weight[:num_slots]
        if positions_LD.shape[0] < num_slots:
            raise ValueError(
                f"{num_slots} slots, but max_positions is {positions_LD.shape[0]}: raise it or cut the input"
            )
        summed_BLD = self.word_embeddings(ids_BL) + positions_LD + self.segment_embeddings.weight[segment]
        return self.dropout(self.norm(summed_BLD))


def gather_rows(weight_VD: Tensor, rows_P: Tensor) -> Tensor:
    """Rows of the embedding table [P, D]; an unset row (-1) is an error of the indexing kernel, never the last row."""
    return torch.index_select(weight_VD, 0, rows_P)
