"""The classes of entailment, in the order in which they are counted everywhere: that of the published code."""

ENTAILMENT_CLASSES = ("contradiction", "neutral", "entailment")  # 0, 1, 2
