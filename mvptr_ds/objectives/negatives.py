"""The negatives of a step: chosen on the device, planned on the host, fetched from where they are.

Which samples are chosen, the device alone knows. The host must know, too: their lengths decide what is computed next.
So all choices of a step travel to the host at once (`PendingExchanges`), and all index arrays that follow from them
travel back at once (`NegativePlan`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mvptr_ds.data import one_block
from mvptr_ds.model import kernels
from mvptr_ds.model.packed import Packed
from mvptr_ds.model.sequence_index import JoinIndex, SequenceIndex
from mvptr_ds.objectives.gather_rows import PendingExchanges, Request, RowExchange

ITM_TEXT, ITM_REGIONS, WPG_REGIONS = "ITM text", "ITM regions", "WPG regions"


@dataclass
class NegativePlan:
    """How negatives are fetched, and what the cross encoder reads of them.

    Attributes:
        exchanges: by name.
        index: of what each exchange gets.
        pairs: matched pairs with mismatched ones behind them, texts joined with regions; None: nothing is mismatched.
        needed_K: the rows of these pairs that are read; None: all.
    """

    exchanges: dict[str, RowExchange]
    index: dict[str, SequenceIndex]
    pairs: JoinIndex | None = None
    needed_K: Tensor | None = None

    def fetch(self, name: str, part: Packed) -> Packed:
        """Returns the samples that were chosen, out of this rank's own."""
        return Packed(self.exchanges[name].fetch(part.rows), self.exchanges[name].lengths, self.index[name])


class Negatives:
    """Choices on their way to the host.

    Args:
        requests: by name, the same names on every rank.
        text, regions: this rank's texts and images, beside which mismatched pairs are computed.
        needed: returns the rows that are read of matched and mismatched pairs, on the host, from the lengths of the
            mismatched texts and regions.
    """

    def __init__(
        self,
        requests: dict[str, Request],
        text: SequenceIndex,
        regions: SequenceIndex,
        needed: Callable[[tuple[int, ...], tuple[int, ...]], Tensor | None],
    ) -> None:
        self.names, self.text, self.regions, self.needed = list(requests), text, regions, needed
        self.pending = PendingExchanges(list(requests.values()))
        self.device = next(iter(requests.values())).wanted_B.device

    def plan(self) -> NegativePlan:
        """Waits for the choices, and returns the plan on their device."""
        exchanges = dict(zip(self.names, self.pending.read(), strict=True))
        index = {name: SequenceIndex(exchange.lengths) for name, exchange in exchanges.items()}
        plan = NegativePlan(exchanges, index)
        if ITM_TEXT in index:
            self._add_mismatched(plan, index[ITM_TEXT].lengths, index[ITM_REGIONS].lengths)
        for of_name in index.values():
            of_name.prepare("starts", "slots", "mask", "filled")
        return one_block.to_device(plan, self.device)

    def _add_mismatched(self, plan: NegativePlan, text: tuple[int, ...], regions: tuple[int, ...]) -> None:
        plan.needed_K = self.needed(text, regions)
        plan.pairs = JoinIndex.of(self.text.lengths + text, self.regions.lengths + regions)
        plan.pairs.prepare("firsts", "seconds")
        plan.pairs.sequences.prepare_attention(kernels.fills_buckets(self.device))
