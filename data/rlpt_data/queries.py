"""Queries that choose cuts at training time. No arrays here: a run's configuration holds them."""

from pydantic import Field, model_validator

from rlpt_data.strict import Strict


class AnnotatedCuts(Strict):
    """Which positions of annotated documents become cuts; every bound that is given must hold."""

    proxy: str = ""
    """Start of the proxy's hash; "": the only one."""
    horizon: int = Field(default=1, ge=1)
    """Values are means over so many tokens from the cut on."""
    min_entropy: float | None = None
    max_entropy: float | None = None
    """Nats. Both together: a band."""
    min_loss: float | None = None
    max_loss: float | None = None
    min_short_loss: float | None = None
    """With ``max_loss``: hard without the context, easy with it."""
    top_share: float | None = Field(default=None, gt=0.0, le=1.0)
    """Of a document's positions that are left, the share with the highest entropy."""
    tier: tuple[float, float] | None = None
    """Quantiles of the loss over all positions of the split: (0.8, 1.0) is the hardest fifth."""
    min_context: int = Field(default=32, ge=1)
    min_continuation: int = Field(default=32, ge=1)
    min_spacing: int = Field(default=1, ge=1)
    """Tokens between two cuts of a document, at least; the earlier one stays."""

    @model_validator(mode="after")
    def _tier_is_an_interval(self) -> "AnnotatedCuts":
        if self.tier is not None and not 0.0 <= self.tier[0] < self.tier[1] <= 1.0:
            raise ValueError(f"tier = {list(self.tier)}: give two increasing quantiles")
        return self
