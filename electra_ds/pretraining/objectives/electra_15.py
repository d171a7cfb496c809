"""ELECTRA 15%: as ELECTRA, but the discriminator's loss counts only at the tokens that were selected for replacement.

Clark et al. 2020, section 3.5. It shows how much of ELECTRA's gain comes from a loss over all tokens. The loss is the
mean over the selected tokens; the paper does not say whether its weight was changed, so it is the recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from electra_ds.pretraining.masking import Masks
from electra_ds.pretraining.objectives.base import TextBatch
from electra_ds.pretraining.objectives.electra import ElectraObjective


class Electra15Objective(ElectraObjective):
    """ELECTRA with a discriminator that is judged at the selected tokens only.

    So its accuracy, its AUC and the share of replaced tokens are over those, and not comparable with ELECTRA's.
    """

    metric_labels: ClassVar[Mapping[str, str]] = {
        **ElectraObjective.metric_labels,
        "replaced_share": "share of the selected tokens that were replaced",
    }

    def counted(self, text: TextBatch, masks: Masks) -> np.ndarray:
        return masks.selected
