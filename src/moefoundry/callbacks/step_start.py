"""State of a training step before its forward pass, to which a step that has failed returns."""

from __future__ import annotations

from composer.core import State

from moefoundry.retry import forget_step, generator_states, restore_generators


class StepStart:
    """Keeps a step's batch, and where torch's generators stand."""

    def __init__(self, state: State) -> None:
        self.batch, self.generators = state.batch, generator_states()

    def restore(self, state: State) -> None:
        """Forget what the step has computed, so that it can be repeated."""
        state.batch, state.outputs, state.loss = self.batch, [], []
        restore_generators(self.generators)
        forget_step(state.model)
