"""Every reward a configuration may name. A new one is a file beside this and a line here; CONTRIBUTING shows one."""

from typing import Annotated

from pydantic import Field

from rlpt.reward.answer import AnswerReward
from rlpt.reward.choice import ChoiceReward
from rlpt.reward.form import FormReward
from rlpt.reward.judge import JudgeReward
from rlpt.reward.likelihood import LikelihoodReward
from rlpt.reward.match import MatchReward
from rlpt.reward.overlap import OverlapReward

RewardConfig = Annotated[
    LikelihoodReward
    | MatchReward
    | AnswerReward
    | OverlapReward
    | ChoiceReward
    | FormReward
    | JudgeReward,
    Field(discriminator="kind"),
]
