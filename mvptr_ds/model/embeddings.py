"""One embedding table for tokens, phrases and tags: word + position + segment, LayerNorm, dropout.

Legend: N slots of all sequences, D hidden, V rows of the table, W word rows.
"""

from __future__ import annotations

from torch import Tensor, nn

from .fused_layer import Fused
from .kernels import LayerNorm, TableLookup
from .packed import Packed

TEXT_SEGMENT = 0
TAG_SEGMENT = 1


class SlotEmbeddings(nn.Module):
    """Embeds the slots of text or of tag sequences; positions run 0.. in each.

    Source: the published code, Inputs.
    """

    def __init__(
        self, num_rows: int, hidden_size: int, max_positions: int, num_segments: int, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(num_rows, hidden_size)
        self.position_embeddings = nn.Embedding(max_positions, hidden_size)
        self.segment_embeddings = nn.Embedding(num_segments, hidden_size)
        self.norm = LayerNorm(hidden_size, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Packed, segment: int | Tensor, rows_ND: Tensor | None = None) -> Packed:
        """Embeds int64 rows [N] as states [N, D].

        Args:
            segment: of all rows, or int64 [N], of each.
            rows_ND: the table's rows `ids`, where they have been read already.

        Raises:
            ValueError: when there are more slots than position embeddings.
        """
        longest, num_positions = max(ids.lengths, default=0), self.position_embeddings.num_embeddings
        if num_positions < longest:
            raise ValueError(f"{longest} slots, but max_positions is {num_positions}: raise it or cut the input")
        if rows_ND is None:
            rows_ND = self.word_embeddings(ids.rows)
        positions_ND, _ = TableLookup.apply(self.position_embeddings.weight, ids.positions(), 0)
        segment_xD, fused = self.segment_embeddings.weight[segment], Fused.on(rows_ND, drops=False)
        if fused is None:
            normed_ND = self.norm(rows_ND + positions_ND + segment_xD)
        elif segment_xD.ndim == 1:
            normed_ND = fused.add_norm(positions_ND, segment_xD, rows_ND, self.norm)
        else:
            normed_ND = fused.add_norm(positions_ND + segment_xD, None, rows_ND, self.norm)
        return ids.like(self.dropout(normed_ND))
