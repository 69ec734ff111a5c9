"""The keys of three parts in a recipe. Checking a recipe imports this alone: torch and Composer come with the parts."""

from dataclasses import dataclass

from moefoundry.config import LossConfig, RouterConfig, key
from moefoundry.registry import Part


@dataclass
class StepsPerSecondConfig:
    every: int = key(10, "Batches between two values.", ge=1)


@dataclass
class TemperedSoftmaxConfig(RouterConfig):  # with the keys that every router has
    temperature: float = key(2.0, "Divides the logits.", gt=0)


steps_per_second = Part(StepsPerSecondConfig, "steps_and_scores_parts:StepsPerSecond")
tempered_softmax = Part(TemperedSoftmaxConfig, "steps_and_scores_parts:tempered_softmax")
smoothing = Part(LossConfig, "steps_and_scores_parts:smoothing")  # whose only key is weight
