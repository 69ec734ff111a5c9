"""What a recipe may say of two parts. Checking a recipe imports this alone: torch and Composer come with the parts."""

from dataclasses import dataclass

from moefoundry.config import RouterConfig, key
from moefoundry.registry import Part


@dataclass
class StepsPerSecondConfig:
    """Optimizer steps a second."""

    every: int = key(10, "Batches between two values.", ge=1)


@dataclass
class TemperedSoftmaxConfig(RouterConfig):  # with the keys that every router has
    temperature: float = key(2.0, "Divides the logits.", gt=0)


steps_per_second = Part(StepsPerSecondConfig, "steps_and_scores_parts:StepsPerSecond")
tempered_softmax = Part(TemperedSoftmaxConfig, "steps_and_scores_parts:tempered_softmax")
