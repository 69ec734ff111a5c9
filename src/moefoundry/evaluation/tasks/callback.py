"""In-context tasks inside training, after each evaluation of held-out data."""

from __future__ import annotations

from pathlib import Path

from composer.core import Callback, State
from composer.loggers import Logger

from moefoundry.checkpoint.ranks import rank
from moefoundry.config import Recipe, flatten
from moefoundry.config.tasks import read_gauntlet, read_tasks
from moefoundry.evaluation.prompts import PromptTokenizer
from moefoundry.evaluation.tasks.code import say_what_is_open
from moefoundry.evaluation.tasks.run import (
    Sizes,
    check_tasks,
    evaluate_tasks,
    load_tasks,
    say_what_is_left_out,
    write_samples,
)

DIRECTORY = "evaluation"


class IclTasks(Callback):
    """Evaluates the recipe's ``icl_tasks``; samples go to ``run_dir/evaluation/baN.jsonl``.

    Raises:
        UserError: A task, one of its examples, or the tokenizer cannot be used.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.sizes = Sizes.of(recipe)
        self.gauntlet = None if recipe.eval_gauntlet is None else read_gauntlet(recipe.eval_gauntlet)
        self.tasks = load_tasks(read_tasks(recipe.icl_tasks))
        if any(task.cfg.icl_task_type == "code_evaluation" for task in self.tasks) and rank() == 0:
            say_what_is_open()
        say_what_is_left_out(self.gauntlet, self.tasks)
        self.tokenizer = PromptTokenizer.open(Path(recipe.tokenizer.name), recipe.model.vocab_size)
        self.directory = Path(recipe.run_dir, DIRECTORY)
        self.recipe = flatten(recipe)
        check_tasks(self.tokenizer, self.tasks, self.sizes, self.recipe)
        self.progress = recipe.progress_bar

    def eval_after_all(self, state: State, logger: Logger) -> None:
        model = state.model.model
        training = model.training
        results = evaluate_tasks(
            model,
            self.tokenizer,
            self.tasks,
            self.sizes,
            gauntlet=self.gauntlet,
            recipe=self.recipe,
            progress=self.progress,
        )
        model.train(training)
        logger.log_metrics(results.metrics)
        if rank() == 0:
            write_samples(self.directory / f"ba{state.timestamp.batch.value}.jsonl", results)
